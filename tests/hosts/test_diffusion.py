"""The adapter of diffusers pipelines: real classes at tiny sizes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor

import foveate
from foveate.method import Card, InputError, Method, Stage, at
from foveate.nn.calls import DenoiserAttention, DenoiserCall
from tiny_diffusion import PIPELINES, SIDE, denoiser, embedding, noise, pipeline, sample

each = pytest.mark.parametrize("name", PIPELINES)


def acting(stage: str, function: Callable[[Any], Any] = lambda call: call.function()) -> Method:
    """A method that does `function` at a stage."""

    class Acting(Method):
        card = Card("acting", "", "", "diffuse", ("diffusers",), "Acts.")

        @at(stage)
        def act(self, call: Any, at: Stage) -> Any:
            assert at.name == stage and at.layer == (call.step if stage == "denoiser.call" else call.index)
            assert at.host.family == "diffusers"
            return function(call)

    return Acting()


def noting(into: list[Any], stage: str = "denoiser.call") -> Method:
    """A method that changes nothing, and collects the calls."""

    def note(call: Any) -> Any:
        into.append(call)
        return call.function()

    return acting(stage, note)


def left(pipe: Any) -> Any:
    """All that an adapter could leave behind, but weights."""
    modules = list(denoiser(pipe).modules())
    hooks = [(sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    return hooks, sorted(pipe.__dict__), sorted(pipe.scheduler.__dict__), dict(denoiser(pipe).config)


# -- nothing changed, nothing left behind


@each
@pytest.mark.parametrize("guidance", (4.0, 1.0))
def test_passing_calls_on_changes_no_bit_and_removal_leaves_nothing(name: str, guidance: float) -> None:
    pipe = pipeline(name)
    dense, before = sample(name, pipe, guidance=guidance), left(pipe)
    weights = copy.deepcopy(denoiser(pipe).state_dict())
    methods = [acting("denoiser.call"), acting("denoiser.attention")]
    with foveate.apply(pipe, methods) as applied:
        assert torch.equal(sample(name, pipe, guidance=guidance), dense)
        assert torch.equal(sample(name, pipe, guidance=guidance), dense)
    applied.remove()
    with foveate.apply(pipe, acting("denoiser.call", lambda call: call.function() * 0.5)):
        assert not torch.equal(sample(name, pipe, guidance=guidance), dense)
    assert left(pipe) == before
    assert torch.equal(sample(name, pipe, guidance=guidance), dense)
    assert all(torch.equal(value, weights[key]) for key, value in denoiser(pipe).state_dict().items())


def test_outputs_have_the_form_that_was_asked_for() -> None:
    pipe = pipeline("sd")
    given = (noise(pipe, 2), torch.tensor(3), embedding("sd", 2, 1))
    dense = pipe.unet(*given).sample
    with foveate.apply(pipe, acting("denoiser.call")), torch.no_grad():
        assert torch.equal(pipe.unet(*given).sample, dense)
        (pair,) = pipe.unet(*given, return_dict=False)
        assert torch.equal(pair, dense)


# -- steps


@pytest.mark.parametrize(
    "scheduler, count",
    # PNDM makes two calls of its second timestep; Heun two of each but the last.
    [("DDIMScheduler", 4), ("PNDMScheduler", 5), ("EulerDiscreteScheduler", 4), ("HeunDiscreteScheduler", 7),
     ("DPMSolverMultistepScheduler", 4)],
)  # fmt: skip
def test_steps_are_the_samplers(scheduler: str, count: int) -> None:
    pipe, calls = pipeline("sd", getattr(diffusers, scheduler)), list[DenoiserCall]()
    with foveate.apply(pipe, noting(calls)):
        for _ in range(2):
            sample("sd", pipe, steps=4)
    assert [call.step for call in calls] == [*range(count)] * 2
    assert {(call.steps, call.begin, call.number) for call in calls} == {(count, 0, 0)}
    assert [call.first for call in calls] == [step == 0 for step in range(count)] * 2
    assert [float(call.timestep) for call in calls[:count]] == pipe.scheduler.timesteps.tolist()


@pytest.mark.parametrize("name", ("sd3", "lumina", "lumina2"))
def test_steps_of_flow_matching(name: str) -> None:
    pipe, calls = pipeline(name), list[DenoiserCall]()
    with foveate.apply(pipe, noting(calls)):
        sample(name, pipe, steps=4)
    # Lumina2 guides by a second call.
    numbers = (0, 1) if name == "lumina2" else (0,)
    assert [(call.step, call.number) for call in calls] == [(step, one) for step in range(4) for one in numbers]
    assert {(call.steps, call.begin) for call in calls} == {(4, 0)}


@pytest.mark.parametrize("scheduler", ("DDIMScheduler", "DPMSolverMultistepScheduler"))
def test_a_run_from_a_picture_starts_late(scheduler: str) -> None:
    pipe, calls = pipeline("sd", getattr(diffusers, scheduler)), list[DenoiserCall]()
    from_picture = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    from_picture.set_progress_bar_config(disable=True)
    with foveate.apply(from_picture, noting(calls)):
        from_picture(
            prompt_embeds=embedding("sd", 1, 1), negative_prompt_embeds=embedding("sd", 1, 2), image=noise(pipe, 1),
            strength=0.6, num_inference_steps=10, output_type="latent",
        )  # fmt: skip
    assert [call.step for call in calls] == [4, 5, 6, 7, 8, 9]
    assert {(call.steps, call.begin) for call in calls} == {(10, 4)}
    assert [call.first for call in calls] == [True, *[False] * 5] and calls[0].guided


def test_what_methods_remember_lasts_for_one_run() -> None:
    pipe, seen = pipeline("sd"), list[int]()

    class Remembering(Method):
        card = Card("remembering", "", "", "diffuse", ("diffusers",), "Remembers.")

        @at("denoiser.call")
        def act(self, call: DenoiserCall, at: Stage) -> Tensor:
            at.memory["calls"] = at.memory.get("calls", 0) + 1
            seen.append(at.memory["calls"])
            return call.function()

    with foveate.apply(pipe, Remembering()):
        for _ in range(2):
            sample("sd", pipe)
    assert seen == [1, 2, 3, 1, 2, 3]


# -- guidance


@each
@pytest.mark.parametrize("prompts, per_prompt", [(1, 1), (2, 2)])
def test_conditional_rows_see_the_prompt(name: str, prompts: int, per_prompt: int) -> None:
    # The others take no embeddings of fewer prompts than pictures.
    per_prompt = per_prompt if name in ("sd", "pixart") else 1
    pipe, calls = pipeline(name), list[DenoiserCall]()
    several = {} if name == "dit" else {"num_images_per_prompt": per_prompt}
    pictures = prompts * per_prompt
    with foveate.apply(pipe, noting(calls)):
        sample(name, pipe, prompts, **several)
        guided, calls[:] = [*calls], []
        sample(name, pipe, prompts, guidance=1.0, **several)
    for call, both in ((guided[0], True), (calls[0], False)):
        assert call.guided == (both and name != "lumina2")
        rows = torch.arange(len(call.latents))[call.conditional].tolist()
        if name == "dit":
            assert call.arguments["class_labels"][rows].tolist() == list(range(prompts))
        else:
            expected = embedding(name, prompts, 1).repeat_interleave(per_prompt, 0)
            seen = call.arguments["encoder_hidden_states"][rows]
            assert torch.equal(seen, expected)
        assert call.sample.shape[0] == len(rows) == pictures
        assert torch.equal(call.latents[rows], call.sample)
    if name == "lumina2":
        assert guided[1].conditional == slice(0, 0)
        assert torch.equal(guided[1].arguments["encoder_hidden_states"], embedding(name, prompts, 2))


def test_two_pictures_from_the_same_noise_are_no_guidance() -> None:
    pipe, calls = pipeline("sd"), list[DenoiserCall]()
    with foveate.apply(pipe, noting(calls)):
        sample("sd", pipe, 2, guidance=1.0, latents=noise(pipe, 1).expand(2, -1, -1, -1))
    assert torch.equal(*calls[0].latents.chunk(2)) and not calls[0].guided


# -- other latents


@pytest.mark.parametrize("scheduler", ("DDIMScheduler", "EulerDiscreteScheduler"))
def test_the_sampler_goes_on_from_a_replaced_sample(scheduler: str) -> None:
    pipe, steps = pipeline("sd", getattr(diffusers, scheduler)), 4
    other = noise(pipe, 1, seed=8)

    def replace(call: DenoiserCall) -> Tensor:
        if call.step != 2:
            return call.function()
        latents = call.replace_sample(call.sample + other)
        assert torch.equal(*latents.chunk(2)) and latents.shape == call.latents.shape
        return call.function(latents)

    with foveate.apply(pipe, acting("denoiser.call", replace)):
        ours = sample("sd", pipe, steps=steps, latents=noise(pipe, 1))

    text = torch.cat([embedding("sd", 1, seed) for seed in (2, 1)])
    sampler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    sampler.set_timesteps(steps)
    latents = noise(pipe, 1) * sampler.init_noise_sigma
    with torch.no_grad():
        for step, t in enumerate(sampler.timesteps):
            latents = latents + other if step == 2 else latents
            given = sampler.scale_model_input(torch.cat([latents] * 2), t)
            without, having = pipe.unet(given, t, text).sample.chunk(2)
            latents = sampler.step(without + 4.0 * (having - without), t, latents).prev_sample
    torch.testing.assert_close(ours, latents)


@pytest.mark.parametrize("name", ("sd3", "dit"))
def test_a_sample_is_replaced_in_every_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flow matching does not scale; DiT's sampler steps both halves of a guided batch."""
    pipe = pipeline(name)
    start = noise(pipe, 1, seed=8)

    def replace(call: DenoiserCall) -> Tensor:
        return call.function(call.replace_sample(start) if call.first else None)

    with foveate.apply(pipe, acting("denoiser.call", replace)):
        ours = sample(name, pipe)
    if name == "sd3":
        expected = sample(name, pipe, latents=start)
    else:
        monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *args, **given: start)
        expected = sample(name, pipe)
    torch.testing.assert_close(ours, expected)


def test_gradients_reach_the_sample_through_a_run() -> None:
    pipe, found = pipeline("sd", diffusers.EulerDiscreteScheduler), list[Tensor]()

    def differentiate(call: DenoiserCall) -> Tensor:
        with torch.enable_grad():
            latents = call.sample.clone().requires_grad_()
            text = call.arguments["encoder_hidden_states"][call.conditional]
            output = call.function(call.replace_sample(latents)[call.conditional], encoder_hidden_states=text)
            found.append(torch.autograd.grad(output.square().sum(), latents)[0])
        return call.function()

    with foveate.apply(pipe, acting("denoiser.call", differentiate)):
        changed = sample("sd", pipe)
    assert all(grad.abs().sum() > 0 for grad in found) and not changed.requires_grad
    assert all(weight.grad is None for weight in pipe.unet.parameters())
    assert torch.equal(changed, sample("sd", pipe))


# -- attention


def attentions(name: str, pipe: Any, **given: Any) -> list[DenoiserAttention]:
    """Those of the first call of the denoiser."""
    calls: list[DenoiserAttention] = []
    with foveate.apply(pipe, noting(calls, "denoiser.attention")):
        sample(name, pipe, steps=1, **given)
    return [one for one in calls if one.call is calls[0].call]


def test_layers_of_a_unet_are_numbered_as_they_run() -> None:
    layers = attentions("sd", pipeline("sd"), height=8, width=24)
    assert [one.index for one in layers] == list(range(14))
    assert [one.cross for one in layers] == [False, True] * 7
    places = [one.name.split(".attentions")[0] for one in layers[::2]]
    assert places == ["down_blocks.0", "down_blocks.1", "mid_block", *["up_blocks.0"] * 2, *["up_blocks.1"] * 2]
    for one in layers:
        outer = one.name.startswith(("down_blocks.0", "up_blocks.1"))
        assert one.grid == ((8, 24) if outer else (4, 12)) and one.native == (64 if outer else 16)
        assert one.hidden.shape[1] == math.prod(one.grid)
        assert (one.keys, one.image) == ((7, 0) if one.cross else (math.prod(one.grid),) * 2)


def test_odd_grids_are_rounded_up() -> None:
    layers = attentions("sd", pipeline("sd", block_out_channels=(8, 8, 8), **THREE), height=24, width=40)
    small = attentions("sd", pipeline("sd", sample_size=28, block_out_channels=(8, 8, 8), **THREE))
    assert {one.grid for one in layers} == {(24, 40), (12, 20), (6, 10)}
    # Half of 7 is 4 to the convolution that makes it.
    assert {one.native for one in small} == {28 * 28, 14 * 14, 7 * 7}


THREE = {"down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3}


@pytest.mark.parametrize(
    "name, expected",
    [  # cross, picture's keys, all keys, of the picture at the trained size: a pair of layers
        ("sd3", [(False, 32, 39, 16)] * 2),
        ("pixart", [(False, 32, 32, 16), (True, 0, 7, 16)]),
        ("lumina", [(False, 32, 32, 16), (True, 0, 7, 16)]),
        # The text's own layer, the picture's own, and two of both.
        ("lumina2", [(False, 0, 7, 16), (False, 32, 32, 16), (False, 32, 39, 16), (False, 32, 39, 16)]),
    ],
)
def test_keys_of_transformers(name: str, expected: list[tuple[bool, int, int, int]]) -> None:
    layers = attentions(name, pipeline(name), height=8, width=16)
    found = [(one.cross, one.image, one.keys, one.native) for one in layers[: len(expected)]]
    flat = [tuple(int(torch.as_tensor(value).flatten()[0]) for value in row) for row in found]
    assert flat == [tuple(int(value) for value in row) for row in expected]
    assert {one.grid for one in layers} == {(4, 8)}


def test_masked_keys_do_not_count() -> None:
    pipe, calls = pipeline("lumina2"), list[DenoiserAttention]()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    with foveate.apply(pipe, noting(calls, "denoiser.attention")):
        sample("lumina2", pipe, 2, prompt_attention_mask=mask, guidance=1.0, steps=1)
    assert calls[-1].keys.tolist() == [16 + 7, 16 + 4] and calls[-1].image == 16


def test_scaling_queries_scales_the_logits_of_any_processor() -> None:
    """The reference changes `Attention.scale`, which the processor that is not fused reads."""
    explicit = pipeline("sd")
    explicit.unet.set_attn_processor(AttnProcessor())
    for module in explicit.unet.modules():
        if isinstance(module, Attention) and not module.is_cross_attention:
            module.scale *= 1.5
    expected = sample("sd", explicit)

    def scale(attention: DenoiserAttention) -> Any:
        return attention.function() if attention.cross else attention.function(1.5)

    for processor in (None, AttnProcessor()):
        pipe = pipeline("sd")
        if processor is not None:
            pipe.unet.set_attn_processor(processor)
        dense = sample("sd", pipe)
        with foveate.apply(pipe, acting("denoiser.attention", scale)):
            ours = sample("sd", pipe)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, dense, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ("sd3", "lumina", "lumina2"))
def test_scaling_behind_the_norm_of_queries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference scales inside the fused attention. A row can have its own scale."""
    pipe = pipeline(name, **({"qk_norm": "rms_norm"} if name == "sd3" else {}))
    factors = torch.tensor([1.5, 0.5])

    def run(batch: Tensor) -> Tensor:
        with foveate.apply(pipe, acting("denoiser.attention", lambda one: one.function(batch[: len(one.hidden)]))):
            return sample(name, pipe, 2, guidance=1.0)

    ours, dense = run(factors), sample(name, pipe, 2, guidance=1.0)
    fused = torch.nn.functional.scaled_dot_product_attention

    def scaled(query: Tensor, *args: Any, **given: Any) -> Tensor:
        return fused(query * factors.view(-1, 1, 1, 1), *args, **given)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", scaled)
    torch.testing.assert_close(ours, sample(name, pipe, 2, guidance=1.0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, dense, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ("sd", "pixart"))
def test_attention_that_is_watched(name: str) -> None:
    """The reference is what a processor that is not fused makes of the layer's projections and mask."""
    pipe = pipeline(name)
    mask = torch.ones(1, 7, dtype=torch.long)
    mask[0, 5:] = 0
    given = {"prompt_attention_mask": mask} if name == "pixart" else {}
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    dense = sample(name, pipe, steps=1, **given)

    def watch(attention: DenoiserAttention) -> Any:
        output, weights = attention.watch()
        ours.append(weights)
        return output

    with foveate.apply(pipe, acting("denoiser.attention", watch)):
        assert torch.equal(sample(name, pipe, steps=1, **given), dense)

    own = Attention.get_attention_scores

    def noted(self: Attention, *args: Any) -> Tensor:
        theirs.append(own(self, *args).unflatten(0, (-1, self.heads)))
        return theirs[-1].flatten(0, 1)

    Attention.get_attention_scores = noted  # type: ignore[method-assign]
    try:
        for module in denoiser(pipe).modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor())
        sample(name, pipe, steps=1, **given)
    finally:
        Attention.get_attention_scores = own  # type: ignore[method-assign]
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


# -- what is refused


def test_what_cannot_work_is_said_in_one_line() -> None:
    pipe = pipeline("sd")
    with pytest.raises(InputError, match=r"pyramiddrop needs the stage llm\.layer"):
        foveate.apply(pipe, "pyramiddrop")
    with foveate.apply(pipe, acting("denoiser.call")), pytest.raises(InputError, match="applied already"):
        foveate.apply(pipe, acting("denoiser.call"))
    with pytest.raises(InputError, match="has no unet or transformer"):
        foveate.apply(diffusers.DiffusionPipeline(), acting("denoiser.call"))
    with foveate.apply(pipe, acting("denoiser.call")):
        pipe.scheduler = diffusers.DDIMScheduler()
        with pytest.raises(InputError, match="another scheduler"):
            sample("sd", pipe)
    with foveate.apply(pipe, acting("denoiser.attention", lambda one: one.function(2.0))):
        pipe.fuse_qkv_projections(vae=False)
        with pytest.raises(InputError, match="unfuse_qkv_projections"):
            sample("sd", pipe)
    lumina = pipeline("lumina")
    with (
        foveate.apply(lumina, acting("denoiser.attention", lambda one: one.watch()[0])),
        pytest.raises(InputError, match="rotated positions"),
    ):
        sample("lumina", lumina)
    sd = pipeline("sd")
    wrong = acting("denoiser.call", lambda call: call.function(call.replace_sample(call.latents)))
    with foveate.apply(sd, wrong), pytest.raises(ValueError, match="a sample of shape"):
        sample("sd", sd)


def test_dense_changes_nothing_and_can_be_applied_again() -> None:
    pipe = pipeline("sd")
    before = sample("sd", pipe)
    for _ in range(2):
        with foveate.apply(pipe, "dense"):
            assert torch.equal(sample("sd", pipe), before)
    assert before.shape[-1] == SIDE
