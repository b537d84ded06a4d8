"""Attention entropy scaling: the rule, and that each layer of each pipeline gets its own factor."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor
from torch.nn import functional as F

import foveate
from foveate.measure.flops import count_flops
from foveate.method import InputError, Stage, at
from foveate.methods.diffuse.variable_size import VariableSize, attention_factor, attention_scale, entropy
from foveate.nn.calls import DenoiserAttention
from tiny_diffusion import PIPELINES, denoiser, embedding, noise, pipeline, sample

COUNTS = (2, 16, 64, 77, 784, 4096, 16384)


# -- the rule


def test_the_factor() -> None:
    for t in COUNTS:
        factors = [attention_factor(n, t) for n in COUNTS]
        assert factors == sorted(set(factors)) and attention_factor(t, t) == 1.0
        for n, factor in zip(COUNTS, factors):
            assert (factor > 1) == (n > t) and (factor < 1) == (n < t)
            assert factor * attention_factor(t, n) == pytest.approx(1)
            for base in (2, 10):
                assert factor**2 == pytest.approx(math.log(n, base) / math.log(t, base))
            assert attention_scale(n, t, 40) ** 2 * 40 == pytest.approx(math.log(n, t))
    assert [attention_factor(n, t) for n, t in ((1, 64), (0, 64), (64, 1), (1, 1))] == [1.0] * 4
    keys = torch.tensor([1, 16, 64, 256])
    expected = torch.tensor([1.0, attention_factor(16, 64), 1.0, attention_factor(256, 64)])
    torch.testing.assert_close(attention_factor(keys, 64), expected)
    assert attention_factor(keys, keys).tolist() == [1.0] * 4


def test_scaled_queries_a_scale_and_an_explicit_softmax_are_the_same() -> None:
    query, key, value = torch.randn(3, 2, 4, 96, 8, generator=torch.Generator().manual_seed(0))
    scale = math.sqrt(math.log(96) / math.log(24) / 8)
    expected = (query @ key.transpose(-1, -2) * scale).softmax(-1) @ value
    for ours in (
        F.scaled_dot_product_attention(query, key, value, scale=attention_scale(96, 24, 8)),
        F.scaled_dot_product_attention(query * attention_factor(96, 24), key, value),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_entropy_grows_with_the_logarithm_of_the_keys_and_less_when_scaled() -> None:
    counts = [64, 256, 1024, 4096]
    plain = [entropy(n) for n in counts]
    scaled = [entropy(n, attention_factor(n, 1024)) for n in counts]
    assert plain == sorted(plain) and scaled == sorted(scaled) and plain[2] == scaled[2]
    assert scaled[-1] - scaled[0] < plain[-1] - plain[0]
    # At most the logarithm: that of uniform attention.
    assert all(value < math.log(n) for n, value in zip(counts, plain))
    assert entropy(4096, 0.0, queries=1) == pytest.approx(math.log(4096))


# -- pipelines


@pytest.mark.parametrize("name", PIPELINES)
def test_the_size_of_the_training_changes_no_bit(name: str) -> None:
    pipe = pipeline(name)
    dense = sample(name, pipe)
    weights = sum(weight.numel() for weight in denoiser(pipe).parameters())
    with foveate.apply(pipe, "variable-size"):
        assert torch.equal(sample(name, pipe), dense)
        assert sum(weight.numel() for weight in denoiser(pipe).parameters()) == weights


@pytest.mark.parametrize("height, width", [(16, 16), (8, 32), (24, 8)])
@pytest.mark.parametrize("guidance", (4.0, 1.0))
def test_every_layer_of_a_unet_has_its_own_factor(height: int, width: int, guidance: float) -> None:
    """The reference sets `Attention.scale` of each level, which the processor that is not fused reads."""
    pipe = pipeline("sd")
    settings: dict[str, Any] = {"height": height, "width": width, "guidance": guidance}
    dense = sample("sd", pipe, **settings)
    with foveate.apply(pipe, "variable-size"):
        ours = sample("sd", pipe, **settings)
    assert not torch.allclose(ours, dense, rtol=1e-2, atol=1e-2)
    pipe.unet.set_attn_processor(AttnProcessor())
    outer = math.sqrt(math.log(height * width) / math.log(64))
    inner = math.sqrt(math.log(height * width // 4) / math.log(16))
    assert 1 < outer < inner
    for name, module in pipe.unet.named_modules():
        if isinstance(module, Attention) and name.endswith("attn1"):
            module.scale *= outer if name.startswith(("down_blocks.0", "up_blocks.1")) else inner
    torch.testing.assert_close(ours, sample("sd", pipe, **settings), rtol=1e-3, atol=1e-3)


class Noting(VariableSize):
    """Notes the factor that each layer gets."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    @at("denoiser.attention")
    def scale(self, attention: DenoiserAttention, at: Stage) -> Any:
        def function(factor: float = 1.0) -> Any:
            self.found[attention.name] = factor
            return attention.function(factor)

        return super().scale(replace(attention, function=function), at)


def factors(name: str, pipe: Any, height: int, width: int) -> dict[str, float]:
    """layer -> its factor."""
    with foveate.apply(pipe, made := Noting()):
        sample(name, pipe, steps=1, height=height, width=width)
    return made.found


def test_only_the_number_of_tokens_counts() -> None:
    pipe = pipeline("sd3")
    # 4 x 4 tokens in training, 8 x 8 now, and 7 of text.
    expected = math.sqrt(math.log(64 + 7) / math.log(16 + 7))
    for height, width in ((16, 16), (8, 32), (32, 8)):
        assert set(factors("sd3", pipe, height, width).values()) == {expected}


@pytest.mark.parametrize("name", ("pixart", "sd"))
def test_cross_attention_stays_as_it_is(name: str) -> None:
    pipe = pipeline(name)
    calls: list[tuple[Any, Any, dict[str, Any], Tensor]] = []
    layers = [(one, module) for one, module in denoiser(pipe).named_modules() if one.endswith(("attn1", "attn2"))]
    hooks = [
        module.register_forward_hook(
            lambda module, args, given, output, one=one: calls.append((one, module, (args, given), output)),
            with_kwargs=True,
        )
        for one, module in layers
    ]
    with foveate.apply(pipe, "variable-size"):
        sample(name, pipe, steps=1, height=16)
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(layers)
    with torch.no_grad():
        for one, module, (args, given), output in calls:
            assert torch.equal(module(*args, **given), output) == one.endswith("attn2")


def test_factors_of_stable_diffusions_layout() -> None:
    pipe = pipeline(
        "sd", sample_size=64, block_out_channels=(8, 8, 8, 8), attention_head_dim=2,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    )  # fmt: skip
    outer, middle, inner, core = (
        math.sqrt(math.log(n) / math.log(t)) for n, t in ((768, 4096), (192, 1024), (48, 256), (12, 64))
    )
    assert 1 > outer > middle > inner > core
    for name, factor in factors("sd", pipe, height=32, width=24).items():
        place = name.split(".attentions")[0]
        if name.endswith("attn2"):
            assert factor == 1
        elif place == "mid_block":
            assert factor == core
        else:
            depth = int(place[-1]) if place.startswith("down") else 3 - int(place[-1])
            assert factor == (outer, middle, inner)[depth]


def test_padding_does_not_count() -> None:
    """A short prompt beside a long one is drawn as it is alone: Lumina2 masks what pads it."""
    pipe, latents = pipeline("lumina2"), noise(pipeline("lumina2"), 2, 16, 8)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    settings = {"height": 16, "guidance": 1.0}
    with foveate.apply(pipe, "variable-size"):
        both = sample("lumina2", pipe, 2, latents=latents, prompt_attention_mask=mask, **settings)
        text = embedding("lumina2", 2, 1)[1:, :4]
        alone = sample(
            "lumina2", pipe, latents=latents[1:], prompt_embeds=text, prompt_attention_mask=mask[1:, :4],
            negative_prompt_embeds=text, negative_prompt_attention_mask=mask[1:, :4], **settings,
        )  # fmt: skip
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_tokens_that_were_merged_away_do_not_count() -> None:
    told: list[Any] = []
    # Half of the 64 tokens that the layer had in training.
    call = SimpleNamespace(keys=32, image=32, native=64, arguments={}, function=told.append)
    VariableSize().scale(call, None)  # type: ignore[arg-type]
    assert told == [math.sqrt(math.log(32) / math.log(64))]


def test_luminas_own_scale_is_not_applied_twice() -> None:
    pipe = pipeline("lumina")
    dense = sample("lumina", pipe, height=16)
    with foveate.apply(pipe, "variable-size"):
        assert torch.equal(sample("lumina", pipe, height=16), dense)
        changed = sample("lumina", pipe, height=16, proportional_attn=False)
    assert not torch.equal(changed, sample("lumina", pipe, height=16, proportional_attn=False))


def test_it_costs_nothing() -> None:
    pipe = pipeline("sd")

    def flops() -> int:
        return count_flops(lambda: sample("sd", pipe, steps=1, height=16))

    dense = flops()
    with foveate.apply(pipe, "variable-size"):
        assert flops() == dense


def test_a_model_that_does_not_say_what_it_was_trained_at_is_refused() -> None:
    pipe = pipeline("sd")
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(InputError, match="no sample_size"):
        foveate.apply(pipe, "variable-size")
