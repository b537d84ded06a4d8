"""What every vision-language host must do with methods applied, on real classes of transformers at tiny sizes.

What is special about one of them is in its own file under `tests/hosts/`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.method import InputError, registry
from running import METHODS, fingerprint, generate, lively, logits, none, odd, supervise
from tiny import IMAGE, LLAVA, QWEN_VL, VIDEO, VLMS, probe, prompt, single, vlm

STAGES = (
    ("vision.patches", -1), ("vision.layer", 2), ("vision.mlp", 1), ("vision.output", -1), ("projector", -1),
    ("llm.layer", 0), ("llm.layer", 2), ("llm.layer", 3),
)  # fmt: skip
QWEN_METHODS: list[tuple[str, dict[str, Any]]] = [
    ("fopru", {"keep": 0.5, "strategy": "row", "layer": 2}),
    *((name, settings) for name, settings in METHODS if name != "resolution"),
    ("random", {"keep": 0.5}),
    ("grid", {"keep": 0.5}),
]


@dataclass(frozen=True)
class Host:
    """A model and a batch for it: samples with one picture, without and with several, some of them clips.

    Attributes:
        vlm, config: for `tiny.vlm`.
        samples, sizes: for `tiny.prompt`. Lengths differ, so that there is padding.
        alike: samples and sizes with as many tokens in several pictures, if not those.
        methods: name and settings.
        stages: where a probe can act.
        exact: whether a method that keeps everything changes no bit.
        empty: whether nothing may be left at any of the stages.
        refused: methods that keep everything and still cannot be applied.
        trained: modules that a loss must reach, in the language model, between, and in the encoder.
        attends: whether a method leaves the number of attention calls as it is.
    """

    vlm: str
    samples: list[tuple[int, ...]]
    sizes: list[tuple[int, ...]] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    alike: tuple[list[tuple[int, ...]], list[tuple[int, ...]]] | None = None
    methods: list[tuple[str, dict[str, Any]]] = field(default_factory=lambda: METHODS)
    stages: tuple[tuple[str, int], ...] = STAGES
    exact: bool = True
    empty: bool = False
    refused: tuple[str, ...] = ()
    trained: tuple[str, ...] = ("language_model.layers.3", "multi_modal_projector", "vision_tower.encoder.layers.0")
    attends: bool = True

    def build(self) -> Any:
        return vlm(self.vlm, **self.config)

    def batch(self, model: Any, padding: str = "left", alike: bool = False) -> dict[str, Tensor]:
        samples, sizes = self.alike if alike and self.alike is not None else (self.samples, self.sizes)
        return prompt(model, samples, sizes=sizes, padding=padding)


MIXED: list[tuple[int, ...]] = [(2, 5), (4,), (0, 3, 6)]
"""One image; none; two, one of which opens the prompt."""
CLIPS: list[tuple[int, ...]] = [(2, 5, 3), (4,), (1, 5), (0, 2, 3), (3, 2)]
CLIP_SIZES: list[tuple[int, ...]] = [(24, 12), (3, 16, 16), (30, 30), (20, 20), (16, 16), (3, 16, 16)]
"""A lone image with crops (2 x 1) and a clip of three frames; none; an image with crops (2 x 2); two whole images, one
of which opens the prompt; a clip."""
QWEN_STAGES = (*STAGES[3:6], ("llm.layer", 1), *STAGES[6:])

HOSTS: dict[str, Host] = {
    **{name: Host(name, MIXED) for name in LLAVA},
    "next": Host("next", MIXED, [(24, 12), (10, 40), (30, 30)]),
    "onevision": Host("onevision", CLIPS, CLIP_SIZES, exact=False),
    # Images of more than two crops: the 2 x 2 ones are resampled, 8 x 8 patches to 5 x 5 cells, to blocks of unequal
    # numbers of tokens, which AIM does not take. They are encoded apart from the others.
    "onevision-resampled": Host(
        "onevision", CLIPS, CLIP_SIZES, {"vision_aspect_ratio": "anyres_max_2"}, exact=False, attends=False,
        methods=[one for one in METHODS if one[0] != "aim"],
    ),
    # A picture of three tiles; none; two pictures, one of which opens the prompt.
    "internvl": Host(
        "internvl", [(2, 0, 0, 5), (4,), (0, 3, 6)], empty=True,
        trained=("language_model.layers.3", "multi_modal_projector", "vision_tower.encoder.layer.0"),
    ),
    # An image; text alone; an image that opens the prompt and a clip of three temporal patches; a small image.
    **{
        name: Host(
            name, [(2, 5), (4,), (0, 3, 6), (3, 4)], [(8, 8), (6, 10), (3, 8, 4), (4, 6)], methods=QWEN_METHODS,
            alike=([(2, 5), (1, 6), (3, 2), (0, 3, 6)], [(8, 8), (8, 8), (8, 8), (6, 10), (2, 8, 4)]),
            stages=QWEN_STAGES, empty=True, refused=("mustdrop", "resolution", "tome"),
            trained=("language_model.layers.3", "visual.merger", "visual.blocks.0"),
        )
        for name in QWEN_VL
    },
}  # fmt: skip
OTHERS = tuple(name for name in HOSTS if name not in VLMS)


def runs(*names: str, only: tuple[str, ...] | None = None) -> list[tuple[str, str, dict[str, Any]]]:
    """(host, method, settings) of these hosts."""
    found = [(name, *method) for name in names for method in HOSTS[name].methods]
    return [one for one in found if only is None or one[1] in only]


FEW = [
    *runs("onevision-resampled", "internvl", *QWEN_VL),
    *runs("onevision", only=("aim",)),
]
"""Each of the hosts beside LLaVA, each method once."""


def each(pairs: list[tuple[str, str, dict[str, Any]]]) -> Any:
    ids = ["-".join((host, name, *settings.get("metric", ""))) for host, name, settings in pairs]
    return pytest.mark.parametrize("host, name, settings", pairs, ids=ids)


def assert_single_runs(model: Any, inputs: dict[str, Tensor], alone: list[dict[str, Tensor]]) -> None:
    together = logits(model, inputs)
    for b, inputs_b in enumerate(alone):
        real = inputs["attention_mask"][b].bool()
        assert torch.allclose(together[b, real], logits(model, inputs_b)[0], atol=1e-4)


def singles(model: Any, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [single(model, inputs, b) for b in range(len(inputs["input_ids"]))]


# -- nothing changed, nothing left behind


@pytest.mark.parametrize("host", HOSTS)
def test_methods_that_keep_everything_change_nothing(host: str) -> None:
    case = HOSTS[host]
    model = case.build()
    inputs = case.batch(model)
    dense, real = logits(model, inputs), inputs["attention_mask"].bool()
    refused = []
    for name, cls in registry().items():
        if cls.card.identity is None or "hf-vlm" not in cls.card.hosts:
            continue
        try:
            applied = foveate.apply(model, name, **cls.card.identity)
        except InputError:
            refused.append(name)
            continue
        with applied:
            ours = logits(model, inputs)
            assert torch.equal(ours, dense) if case.exact else torch.allclose(ours, dense, atol=1e-5), name
    assert set(refused) <= set(case.refused)
    for stage, layer in case.stages:
        with foveate.apply(model, probe(stage, lambda tokens, at: tokens.mask(), layer=layer)):
            assert torch.allclose(logits(model, inputs)[real], dense[real], atol=1e-5), stage


@each([*runs("clip-qwen2", "next"), *FEW])
def test_the_model_is_as_before(host: str, name: str, settings: dict[str, Any]) -> None:
    model = HOSTS[host].build()
    inputs = HOSTS[host].batch(model)
    dense, before, weights = logits(model, inputs), fingerprint(model), copy.deepcopy(model.state_dict())
    applied = foveate.apply(model, name, **settings)
    changed = logits(model, inputs)
    generate(model, inputs, max_new_tokens=2)
    assert list(model.state_dict()) == list(weights)
    applied.remove()
    applied.remove()
    assert not torch.equal(changed, dense)
    assert torch.equal(logits(model, inputs), dense)
    assert fingerprint(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


# -- generation


@each(runs(*HOSTS))
def test_generation_is_the_same_without_cache_and_alone(host: str, name: str, settings: dict[str, Any]) -> None:
    model = HOSTS[host].build()
    inputs = HOSTS[host].batch(model)
    alone = singles(model, inputs)
    with foveate.apply(model, name, **settings):
        tokens = generate(model, inputs, max_new_tokens=5)
        assert torch.equal(generate(model, inputs, max_new_tokens=5, use_cache=False), tokens)
        for b, inputs_b in enumerate(alone):
            assert torch.equal(generate(model, inputs_b, max_new_tokens=5)[0], tokens[b])


@pytest.mark.parametrize(
    "host, stage, layer, rule",
    [
        (host, stage, layer, rule)
        for host in ("next", *OTHERS[1:]) for stage, layer in HOSTS[host].stages for rule in (odd, lively, none)
        if rule is not none or HOSTS[host].empty
    ],
)  # fmt: skip
def test_any_stage_with_and_without_cache(host: str, stage: str, layer: int, rule: Any) -> None:
    model = HOSTS[host].build()
    inputs = HOSTS[host].batch(model)
    with foveate.apply(model, probe(stage, rule, layer=layer, renumbers=False)):
        cached = generate(model, inputs, max_new_tokens=4)
        assert torch.equal(cached, generate(model, inputs, max_new_tokens=4, use_cache=False))


@each([*runs("clip-llama", only=("fopru", "vtc-cls", "pyramiddrop", "aim")),
       *runs(*OTHERS[1:], only=("fopru", "pyramiddrop", "aim"))])  # fmt: skip
def test_beams_and_samples(host: str, name: str, settings: dict[str, Any]) -> None:
    model = HOSTS[host].build()
    inputs = HOSTS[host].batch(model)
    alone, batch = singles(model, inputs), len(inputs["input_ids"])
    with foveate.apply(model, name, **settings) as applied:
        beams = generate(model, inputs, num_beams=3, max_new_tokens=5)
        assert torch.equal(generate(model, inputs, num_beams=3, max_new_tokens=5, use_cache=False), beams)
        for b, inputs_b in enumerate(alone):
            assert torch.equal(generate(model, inputs_b, num_beams=3, max_new_tokens=5)[0], beams[b])
        drawn = generate(model, inputs, do_sample=True, num_return_sequences=2, max_new_tokens=2)
        assert drawn.shape == (2 * batch, 2)
        generate(model, inputs, num_beams=3, max_new_tokens=1)
        entry = next(record for record in applied.trace if record.stage == "llm.input")
        # Pictures and clips went to the copies of their own samples.
        for b in range(batch):
            mine = entry.source[3 * b : 3 * b + 3]
            assert len(set(entry.tokens_in[3 * b : 3 * b + 3])) == 1 and torch.equal(mine, mine[:1].expand_as(mine))


# -- batches


@pytest.mark.parametrize("padding", ("left", "right"))
@each(runs(*HOSTS))
def test_a_batch_equals_single_runs(host: str, name: str, settings: dict[str, Any], padding: str) -> None:
    model = HOSTS[host].build()
    inputs = HOSTS[host].batch(model, padding)
    alone = singles(model, inputs)
    with foveate.apply(model, name, **settings):
        assert_single_runs(model, inputs, alone)


@pytest.mark.parametrize(
    "host, stage, layer, implementation",
    [
        (host, stage, layer, implementation)
        for host in ("clip-llama", "siglip-qwen2", "next", *OTHERS) for stage, layer in HOSTS[host].stages
        # InternVL's tower hands no mask to its attention; what is padding there is hidden all the same.
        for implementation in (("sdpa", "eager") if host == "internvl" else ("sdpa",))
    ],
)  # fmt: skip
def test_samples_that_keep_different_numbers(host: str, stage: str, layer: int, implementation: str) -> None:
    model = HOSTS[host].build()
    inputs = HOSTS[host].batch(model, alike=True)
    alone = singles(model, inputs)
    model.set_attn_implementation(implementation)
    with foveate.apply(model, probe(stage, lively, layer=layer)) as applied:
        logits(model, inputs)
        record = next(one for one in applied.trace if one.stage.startswith(stage))
        assert len(set(record.tokens_out[:3])) > 1
        assert_single_runs(model, inputs, alone)


# -- training, precision, attention


@pytest.mark.parametrize("checkpointing", (False, True))
@each([*runs("clip-llama", "siglip-qwen2", "next"), *FEW])
def test_training(host: str, name: str, settings: dict[str, Any], checkpointing: bool) -> None:
    case = HOSTS[host]
    model = case.build().train()
    inputs = supervise(case.batch(model, "right"))
    with foveate.apply(model, name, **settings):
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        plain = {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}
        if checkpointing:
            model.zero_grad()
            model.gradient_checkpointing_enable()
            model(**inputs, use_cache=False).loss.backward()
            for key, weight in model.named_parameters():
                if key in plain:
                    assert torch.allclose(weight.grad, plain[key], atol=1e-5), key
    assert torch.isfinite(loss)
    for part in case.trained:
        assert any(part in key and grad.abs().sum() > 0 for key, grad in plain.items()), part


@pytest.mark.parametrize(
    "host, name, settings, dtype",
    [
        *((*one, torch.bfloat16) for one in [*runs("clip-llama"), *FEW]),
        *((*one, torch.float16) for one in runs("clip-llama", *QWEN_VL)),
    ],
)
def test_half_precision(host: str, name: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    model = HOSTS[host].build()
    inputs = HOSTS[host].batch(model)
    model.to(dtype)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    with foveate.apply(model, name, **settings):
        result = logits(model, inputs)
        assert result.dtype == dtype and bool(result.isfinite().all())
        assert generate(model, inputs, max_new_tokens=2).shape == (len(result), 2)


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
@each(runs("clip-llama", *(name for name in OTHERS if HOSTS[name].attends)))
def test_the_implementation_stays(
    implementation: str, host: str, name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HOSTS[host].build()
    inputs = HOSTS[host].batch(model)
    calls = 0
    attend = torch.nn.functional.scaled_dot_product_attention

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        assert model.config._attn_implementation == implementation
        return attend(*args, **kwargs)

    with foveate.apply(model, name, **settings):
        expected = logits(model, inputs)
    model.set_attn_implementation(implementation)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    logits(model, inputs)
    dense, calls = calls, 0
    assert (dense > 0) == (implementation == "sdpa")
    with foveate.apply(model, name, **settings):
        # Rows of tokens that see nothing, padding and hidden ones at the start, are anything.
        ids = inputs["input_ids"]
        real = inputs["attention_mask"].bool() & (ids != IMAGE) & (ids != VIDEO)
        assert torch.allclose(logits(model, inputs)[real], expected[real], atol=1e-4)
        # Methods add none.
        assert calls == dense
        for config in (model.config, model.config.text_config, model.config.vision_config):
            assert config._attn_implementation == implementation
