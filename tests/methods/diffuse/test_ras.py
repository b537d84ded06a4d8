"""RAS on real tiny pipelines, against a sampler and two transformers that are written out here token by token."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import foveate
from foveate.measure.flops import count_flops
from foveate.method import InputError, Method
from foveate.methods.diffuse.ras import CONFIGURATIONS, Ras
from foveate.nn.calls import SamplerStep
from foveate.tokens import DROPPED, Tokens
from tiny_diffusion import embedding, noise, pipeline, pooled, sample

EARLY: dict[str, Any] = {"start": 2, "resets": (5,), "ratio": 0.4, "high": 0.3, "starvation": 0.5}
"""Settings that leave tokens out in steps 2, 3, 4, 6 and 7 of 8."""
SIZE = {"height": 8, "width": 12}
PATCHES, STEPS = 4 * 6, 8
SD35 = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
"""Stable Diffusion 3.5's further attention, and norms of its keys."""
each = pytest.mark.parametrize("name", ("sd3", "lumina"))


def draw(name: str, pipe: Any, **given: Any) -> Tensor:
    return sample(name, pipe, **{"steps": STEPS, "latents": noise(pipe, 1, **SIZE), **SIZE, **given})


# -- the reference


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float) -> Tensor:
    """(B, R, H D) of (B, R, H D) and (B, S, H D), head by head."""
    width, made = query.shape[2] // heads, []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        made.append((query[..., part] @ key[..., part].mT * scale).softmax(-1) @ value[..., part])
    return torch.cat(made, 2)


def normed(norm: Any, x: Tensor, heads: int) -> Tensor:
    """Stable Diffusion 3.5's norm of each head; `x` where there is none."""
    return x if norm is None else norm(x.unflatten(2, (heads, -1))).flatten(2)


def sd3(model: Any, x: Tensor, t: Tensor, text: Tensor, given: Tensor, active: list[int], cache: dict[Any, Any]) -> Any:
    """Tokens `active` of Stable Diffusion 3; others get zeros. `cache` is of keys and values after their norm."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    hidden, condition = model.pos_embed(x)[:, active], model.time_text_embed(t.expand(len(x)), given)
    text = model.context_embedder(text)

    def self_attention(layer: Any, hidden: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor | None]:
        heads = layer.heads
        query = normed(layer.norm_q, layer.to_q(hidden), heads)
        fresh = normed(layer.norm_k, layer.to_k(hidden), heads), layer.to_v(hidden)
        held = cache.setdefault(layer, [torch.full((len(x), height * width, one.shape[2]), math.nan) for one in fresh])
        for old, new in zip(held, fresh):
            for place, token in enumerate(active):
                old[:, token] = new[:, place]
        key, value = held
        if text is not None:
            query = torch.cat([query, normed(layer.norm_added_q, layer.add_q_proj(text), heads)], 1)
            key = torch.cat([key, normed(layer.norm_added_k, layer.add_k_proj(text), heads)], 1)
            value = torch.cat([value, layer.add_v_proj(text)], 1)
        made = attend(query, key, value, heads, (query.shape[2] // heads) ** -0.5)
        count = hidden.shape[1]
        return layer.to_out[0](made[:, :count]), None if text is None else made[:, count:]

    for block in model.transformer_blocks:
        entered, further = hidden, ()
        first, gate, shift_mlp, scale_mlp, gate_mlp, *further = block.norm1(entered, emb=condition)
        if block.context_pre_only:
            words, rest = block.norm1_context(text, condition), None
        else:
            words, *rest = block.norm1_context(text, emb=condition)
        made, said = self_attention(block.attn, first, words)
        hidden = entered + gate[:, None] * made
        if further:
            second, second_gate = further
            hidden = hidden + second_gate[:, None] * self_attention(block.attn2, second, None)[0]
        hidden = hidden + gate_mlp[:, None] * block.ff(
            block.norm2(hidden) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        )
        if rest:
            gate, shift_mlp, scale_mlp, gate_mlp = rest
            text = text + gate[:, None] * block.attn.to_add_out(said)
            inner = block.norm2_context(text) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
            text = text + gate_mlp[:, None] * block.ff_context(inner)
    made = model.proj_out(model.norm_out(hidden, condition))
    return unpatched(made, active, height, width)


def lumina(model: Any, x: Tensor, t: Tensor, text: Tensor, given: Tensor, active: list[int], cache: Any) -> Any:
    """The same of Lumina-Next; `given` are the frequencies of its positions."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    whole, _, _, turns = model.patch_embedder(x, given)
    hidden, turns = whole[:, active], turns[0]
    mask = torch.ones(text.shape[:2])
    condition = model.time_caption_embed(1 - t.expand(len(x)) / 1000, text, mask)

    def rotated(x: Tensor, tokens: list[int], heads: int) -> Tensor:
        made = x.unflatten(2, (heads, -1, 2)).clone()
        for place, token in enumerate(tokens):
            cos, sin = turns[token].real, turns[token].imag
            even, odd = made[:, place, ..., 0].clone(), made[:, place, ..., 1].clone()
            made[:, place, ..., 0], made[:, place, ..., 1] = even * cos - odd * sin, even * sin + odd * cos
        return made.flatten(2)

    for block in model.layers:
        first, gate, scale_mlp, gate_mlp = block.norm1(hidden, condition)
        layer, heads = block.attn1, block.attn1.heads
        query = rotated(layer.norm_q(layer.to_q(first)), active, heads)
        fresh = rotated(layer.norm_k(layer.to_k(first)), active, heads), layer.to_v(first)
        held = cache.setdefault(layer, [torch.full((len(x), height * width, one.shape[2]), math.nan) for one in fresh])
        for old, new in zip(held, fresh):
            for place, token in enumerate(active):
                old[:, token] = new[:, place]
        # Proportional attention: the pipeline counts tokens of 16 pixels, and its default is a side of 64.
        scale = math.sqrt(math.log(height * width) / math.log(16)) * (query.shape[2] // heads) ** -0.5
        made = attend(query, held[0], held[1], heads, scale)
        layer, words = block.attn2, block.norm1_context(text)
        query = rotated(layer.norm_q(layer.to_q(first)), active, heads)
        key, value = layer.norm_k(layer.to_k(words)), layer.to_v(words)
        across = attend(query, key, value, heads, (query.shape[2] // heads) ** -0.5)
        made = made + (across.unflatten(2, (heads, -1)) * block.gate.tanh()[:, None]).flatten(2)
        hidden = hidden + gate[:, None].tanh() * block.norm2(layer.to_out[0](made))
        inner = block.feed_forward(block.ffn_norm1(hidden) * (1 + scale_mlp[:, None]))
        hidden = hidden + gate_mlp[:, None].tanh() * block.ffn_norm2(inner)
    return unpatched(model.norm_out(hidden, condition), active, height, width)


def unpatched(made: Tensor, active: list[int], height: int, width: int) -> Tensor:
    channels = made.shape[2] // 4
    output = torch.zeros(len(made), channels, 2 * height, 2 * width)
    for place, token in enumerate(active):
        row, column = divmod(token, width)
        for pixel in range(4):
            y, x = divmod(pixel, 2)
            part = made[:, place, pixel * channels : (pixel + 1) * channels]
            output[:, :, 2 * row + y, 2 * column + x] = part
    return output


def chosen(metric: list[float], drops: list[int], low: int, high: int, k: float, relieved: bool = True) -> list[int]:
    """Which tokens are left out, by sorting; `drops` counts on."""
    tokens = range(len(metric))
    out = sorted(tokens, key=lambda j: metric[j] * math.exp(k * drops[j]))[:low]
    sign = -1 if relieved else 1
    rest = sorted(
        (j for j in tokens if j not in out), key=lambda j: metric[j] * math.exp(sign * k * drops[j]), reverse=True
    )
    out += rest[:high]
    for j in out:
        drops[j] += 1
    return out


@torch.no_grad()
def reference(name: str, pipe: Any, latents: Tensor, counts: dict[int, tuple[int, int]], k: float, metric: str) -> Any:
    """Latents (1, C, h, w) at the end, and the tokens left out in each step; `counts`: step -> lowest, highest."""
    model, x, cache = pipe.transformer, latents.clone(), {}
    height, width = x.shape[2] // 2, x.shape[3] // 2
    prompts = [embedding(name, 1, seed) for seed in (2, 1)]
    if name == "sd3":
        given = torch.cat([pooled(1, 4), pooled(1, 3)])
    else:
        prompts.reverse()
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

        factor = math.sqrt(x.shape[2] * x.shape[3] / 8**2)
        given = get_2d_rotary_pos_embed_lumina(model.head_dim, 384, 384, linear_factor=factor)
    sigmas = pipe.scheduler.sigmas
    drops, skipped, before, history = [0] * (height * width), [], None, []
    for step in range(STEPS):
        history.append(skipped)
        active = [j for j in range(height * width) if j not in skipped]
        forward = sd3 if name == "sd3" else lumina
        output = forward(
            model, torch.cat([x, x]), pipe.scheduler.timesteps[step], torch.cat(prompts), given, active, cache
        )
        if name == "sd3":
            v = output[:1] + 4.0 * (output[1:] - output[:1])
        else:
            v = -output[:1, :4]
            v[:, :3] = -(output[1:, :3] + 4.0 * (output[:1, :3] - output[1:, :3]))
        for j in skipped:
            row, column = (2 * place for place in divmod(j, width))
            v[:, :, row : row + 2, column : column + 2] = before[:, :, row : row + 2, column : column + 2]
        moved, before = (sigmas[step + 1] - sigmas[step]) * v, v
        x, skipped = x + moved, []
        if step + 1 in counts:
            sizes = []
            for j in range(height * width):
                row, column = (2 * place for place in divmod(j, width))
                pixels = moved[0, :, row : row + 2, column : column + 2].flatten(1).T
                spread = [pixel.std() if metric == "std" else pixel.square().sum().sqrt() for pixel in pixels]
                sizes.append(float(sum(spread)) / 4)
            skipped = chosen(sizes, drops, *counts[step + 1], k)
    return x, history


@pytest.mark.parametrize("name, config, metric", [("sd3", {}, "std"), ("sd3", SD35, "l2norm"), ("lumina", {}, "std")])
def test_the_whole_sampling_is_the_papers(name: str, config: dict[str, Any], metric: str) -> None:
    """24 tokens at ratio 0.4: 14 are left out, 4 of them (0.3) from the top."""
    pipe = pipeline(name, lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), **config)
    dense = draw(name, pipe)
    with foveate.apply(pipe, Ras(metric=metric, **EARLY)) as applied:
        made = draw(name, pipe)
        trace = applied.trace
    counts = dict.fromkeys((2, 3, 4, 6, 7), (10, 4))
    expected, history = reference(name, pipe, noise(pipe, 1, **SIZE), counts, EARLY["starvation"], metric)
    assert {record.stage: (record.source[0] == DROPPED).nonzero().flatten().tolist() for record in trace} == {
        f"denoiser.patches[{step}]": sorted(skipped) for step, skipped in enumerate(history) if skipped
    }
    assert all(torch.equal(*record.source) for record in trace), "both halves of a guided batch"
    assert len({tuple(sorted(one)) for one in history}) == 6, "different regions in each step"
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)
    assert (made - dense).abs().max() > 0.1


# -- how many tokens, and which


def test_lumina_skips_what_the_card_lists() -> None:
    runs = [(0, 4), (1280, 4), (1536, 4), (0, 1), (1792, 3), (2048, 4), (2304, 2), (0, 1), (2304, 1), (2560, 4)]
    expected = [count for count, times in [*runs, (2816, 2)] for _ in range(times)]
    assert Ras(**CONFIGURATIONS["lumina"]).skips(30, 4096) == expected and len(expected) == 30


@pytest.mark.parametrize("rounding", ("exact", "released"))
@pytest.mark.parametrize("ratio, high", [(0.5, 0.3), (0.3, 0.0), (0.7, 1.0), (0.9, 0.5), (0.1, 0.7), (1.0, 0.3)])
def test_counts(rounding: str, ratio: float, high: float) -> None:
    """In whole numbers: ratio and high are tenths."""
    method = Ras(ratio=ratio, high=high, rounding=rounding, start=3, end=9, resets=(5, 40))
    for patches in (24, 100, 4096):
        skip, tenths = (10 - round(10 * ratio)) * patches // 10, round(10 * high)
        top, low = skip * tenths // 10, skip * (10 - tenths) // 10
        for step in range(12):
            expected = (low if rounding == "released" else skip - top, top)
            assert method.tails(step, 12, patches) == (expected if step in (3, 4, 6, 7, 8) else (0, 0))
            assert rounding == "released" or sum(expected) == skip


def test_a_token_is_always_left() -> None:
    assert Ras(ratio=1e-9).tails(4, 8, 16) == (0, 15)
    assert max(Ras(ramp=512, ramp_every=1).skips(30, 64)) == 63 and min(Ras(ramp=512).skips(30, 64)) == 0


@pytest.mark.parametrize("top", ("relieved", "published"))
@pytest.mark.parametrize("low, high", [(7, 0), (0, 7), (4, 3), (1, 6), (0, 0), (0, 15)])
def test_which_are_left_out(top: str, low: int, high: int) -> None:
    method = Ras(starvation=0.7, top=top)
    metric, drops = torch.rand(3, 16) + 0.1, torch.randint(0, 5, (3, 16))
    skipped = method.leave_out(metric, drops, low, high)
    for b in range(3):
        expected = chosen(metric[b].tolist(), drops[b].tolist(), low, high, 0.7, top == "relieved")
        assert skipped[b].nonzero().flatten().tolist() == sorted(expected) and len(expected) == low + high
    plain = Ras(starvation=0.0).leave_out(metric, drops, low, high)
    for b in range(3):
        order = metric[b].argsort().tolist()
        assert set(plain[b].nonzero().flatten().tolist()) == {*order[:low], *order[16 - high :]}


def test_huge_factors_and_flat_regions_have_an_order() -> None:
    method = Ras(starvation=1000.0)
    drops = torch.arange(8).expand(1, 8)
    assert method.leave_out(torch.zeros(1, 8), drops, 2, 0)[0].tolist() == [True] * 2 + [False] * 6
    # Not any of those that are out from below already.
    assert int(method.leave_out(torch.zeros(1, 8), drops, 2, 4).sum()) == 6


def test_starving_tokens_come_up_unless_the_published_factor_keeps_them_down() -> None:
    metric = torch.linspace(1, 2, 16).unsqueeze(0)
    for top, high, starving in (("relieved", 8, 0), ("published", 8, 8), ("relieved", 0, 0), ("published", 0, 0)):
        method, drops = Ras(top=top, starvation=0.3), torch.zeros(1, 16, dtype=torch.long)
        for _ in range(40):
            drops = drops + method.leave_out(metric, drops, 8 - high, high)
        assert int((drops == 40).sum()) == starving


def test_metrics() -> None:
    v = torch.randn(2, 5, 4, 6)
    for metric in ("std", "l2norm"):
        found = Ras(metric=metric).measure(v, 2)
        for b in range(2):
            for j in range(6):
                y, x = (2 * place for place in divmod(j, 3))
                sizes = []
                for pixel in v[b, :, y : y + 2, x : x + 2].flatten(1).T:
                    centre = pixel.mean() if metric == "std" else 0.0
                    total = float((pixel - centre).square().sum())
                    sizes.append(math.sqrt(total / 5 if metric == "std" else total))
                assert math.isclose(float(found[b, j]), sum(sizes) / 4, rel_tol=1e-5)


# -- the run


@each
@pytest.mark.parametrize("settings", [{"ratio": 1.0}, {"start": 8}, {"resets": (*range(9),)}, {"end": 2}])
def test_without_skipped_tokens_it_is_the_plain_sampler(name: str, settings: dict[str, Any]) -> None:
    pipe = pipeline(name)
    dense = draw(name, pipe)
    with foveate.apply(pipe, Ras(**EARLY | settings)) as applied:
        assert torch.equal(draw(name, pipe), dense) and not applied.trace
        assert torch.equal(draw(name, pipe), dense)


@each
def test_what_is_left_out_keeps_its_velocity(name: str) -> None:
    pipe = pipeline(name, lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0))
    seen = [noise(pipe, 1, **SIZE)]

    def note(pipe: Any, step: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return {}

    with foveate.apply(pipe, Ras(**EARLY)) as applied:
        draw(name, pipe, callback_on_step_end=note)
        out = {int(one.stage[17:-1]): one.source[0].view(4, 6) == DROPPED for one in applied.trace}
    sigmas = pipe.scheduler.sigmas
    velocity = [(seen[i + 1] - seen[i]) / (sigmas[i + 1] - sigmas[i]) for i in range(STEPS)]
    for step, skipped in out.items():
        pixels = skipped.repeat_interleave(2, 0).repeat_interleave(2, 1)
        constant = (velocity[step] - velocity[step - 1]).abs().amax((0, 1)) < 1e-3
        assert torch.equal(constant, pixels)


@each
def test_runs_have_nothing_to_do_with_each_other(name: str) -> None:
    pipe = pipeline(name)
    both = noise(pipe, 2, **SIZE)
    prompts = {"prompt_embeds": embedding(name, 2, 1), "negative_prompt_embeds": embedding(name, 2, 2)}
    if name == "sd3":
        prompts |= {"pooled_prompt_embeds": pooled(2, 3), "negative_pooled_prompt_embeds": pooled(2, 4)}
    other = {"latents": both[1:], **{key: value[1:] for key, value in prompts.items()}}
    with foveate.apply(pipe, Ras(**EARLY)) as applied:
        first, second = draw(name, pipe, latents=both[:1]), draw(name, pipe, **other)
        # Each picture of a batch has its own regions.
        together = draw(name, pipe, prompts=2, latents=both)
        assert not torch.equal(*applied.trace[0].source[:2])
        unguided = draw(name, pipe, guidance=1.0)
    torch.testing.assert_close(together, torch.cat([first, second]), rtol=1e-3, atol=1e-4)
    with foveate.apply(pipe, Ras(**EARLY)):
        assert torch.equal(draw(name, pipe, **other), second)
    with foveate.apply(pipe, Ras(**EARLY)):
        assert torch.equal(draw(name, pipe, guidance=1.0), unguided)


@each
def test_half_precision(name: str) -> None:
    pipe = pipeline(name).to(dtype=torch.bfloat16)
    with foveate.apply(pipe, Ras(**EARLY)) as applied:
        assert draw(name, pipe, dtype=torch.bfloat16, latents=noise(pipe, 1, **SIZE).bfloat16()).isfinite().all()
        assert len(applied.trace) == 5


@each
def test_what_is_saved_is_counted(name: str) -> None:
    """14 of 24 tokens less in 5 steps, on both halves of the batch."""
    pipe = pipeline(name)
    dense = count_flops(lambda: draw(name, pipe))
    with foveate.apply(pipe, Ras(**EARLY)):
        saved = dense - count_flops(lambda: draw(name, pipe))
    width, layers, text, output = (16, 2, 7, 4 * 16) if name == "sd3" else (32, 2, 7, 4 * 8)
    if name == "sd3":
        macs = layers * (12 * width**2 + 2 * (PATCHES + text) * width)
    else:
        inner = pipe.transformer.layers[0].feed_forward.linear_1.out_features
        macs = layers * (5 * width**2 + 3 * width * inner + 2 * (PATCHES + text) * width)
    assert saved == 2 * (macs + width * output) * 14 * 2 * 5


@pytest.mark.parametrize("name, config", [("sd3", {}), ("sd3", SD35), ("lumina", {})])
@torch.no_grad()
def test_with_nothing_new_the_tokens_that_run_make_what_they_made(name: str, config: dict[str, Any]) -> None:
    """Keys and values that are held are those of the step before, in every layer, at their places."""
    pipe, kept = pipeline(name, **config), torch.tensor([[17, 3, 4, 20], [0, 23, 1, 9]])

    class Some(Method):
        card, step = Ras.card, -1

        @foveate.method.at("denoiser.patches")
        def choose(self, tokens: Tokens, at: Any) -> Tokens:
            self.step += 1
            return tokens.keep(kept) if self.step else tokens

        @foveate.method.at("sampler.step")
        def merge(self, step: SamplerStep, at: Any) -> Tensor:
            return torch.zeros_like(step.output)

    x, arguments = noise(pipe, 2, **SIZE), {"encoder_hidden_states": embedding(name, 2, 1)}
    if name == "sd3":
        arguments |= {"timestep": torch.full((2,), 500.0), "pooled_projections": torch.randn(2, 8)}
    else:
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

        arguments |= {
            "timestep": torch.full((2,), 0.5), "encoder_mask": torch.ones(2, 7),
            "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 384, 384), "cross_attention_kwargs": {},
        }  # fmt: skip
    with foveate.apply(pipe, Some()):
        pipe.scheduler.set_timesteps(4)
        dense = pipe.transformer(x, **arguments).sample
        after = pipe.scheduler.step(torch.ones_like(x), pipe.scheduler.timesteps[0], x).prev_sample
        assert torch.equal(after, x), "the sampler took the zeros"
        some = pipe.transformer(x, **arguments).sample
    expected = torch.zeros_like(dense)
    for b in range(2):
        for token in kept[b].tolist():
            y, z = (2 * place for place in divmod(token, 6))
            expected[b, :, y : y + 2, z : z + 2] = dense[b, :, y : y + 2, z : z + 2]
    torch.testing.assert_close(some, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(some == 0, expected == 0)


def test_calls_with_skipped_layers_are_left_alone() -> None:
    """Stable Diffusion 3.5's further guidance: a second call in a step, of one half of the batch."""
    pipe = pipeline("sd3")
    guidance = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.9}
    dense, plain = draw("sd3", pipe, **guidance), draw("sd3", pipe)
    with foveate.apply(pipe, Ras(**EARLY)) as applied:
        made = draw("sd3", pipe, **guidance)
        assert [len(record.tokens_out) for record in applied.trace] == [2] * 5
        assert not torch.equal(made, draw("sd3", pipe)) and made.isfinite().all()
    assert not torch.equal(dense, plain)


@each
def test_other_methods_see_the_keys_that_are_there(name: str) -> None:
    """At the size of the training, variable-size has nothing to do, however few tokens run."""
    pipe, square = pipeline(name), {"latents": None, "height": 8, "width": 8}
    with foveate.apply(pipe, Ras(**EARLY)):
        alone = draw(name, pipe, **square)
    with foveate.apply(pipe, [Ras(**EARLY), "variable-size"]):
        torch.testing.assert_close(draw(name, pipe, **square), alone, rtol=1e-4, atol=1e-5)


# -- what it cannot do


@pytest.mark.parametrize("name", ("sd", "pixart", "lumina2"))
def test_denoisers_that_run_all_tokens(name: str) -> None:
    with pytest.raises(InputError, match=r"ras needs the stage (denoiser\.patches|sampler\.step)"):
        foveate.apply(pipeline(name), "ras")


def test_fused_projections() -> None:
    pipe = pipeline("sd3")
    with foveate.apply(pipe, Ras(**EARLY)):
        pipe.transformer.fuse_qkv_projections()
        with pytest.raises(InputError, match="unfuse_qkv_projections"):
            draw("sd3", pipe)


@torch.no_grad()
def test_a_control_net() -> None:
    pipe = pipeline("sd3")
    with foveate.apply(pipe, Ras(**EARLY)), pytest.raises(InputError, match="ControlNet"):
        pipe.transformer(
            noise(pipe, 1), embedding("sd3", 1, 1), torch.zeros(1, 8), torch.zeros(1), [torch.zeros(1, 16, 16)]
        )
