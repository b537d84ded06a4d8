"""Vision encoders with methods applied, against plain hooks written here and against single pictures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate
from foveate.method import InputError, Stage, registry
from foveate.tokens import Tokens
from tiny import TIMM, VISION, clip_dual, pixels, probe, vision

HOSTS = (*VISION, *TIMM)
hosts = pytest.mark.parametrize("host", HOSTS)


def answer(model: Any, images: Tensor) -> Tensor:
    """(B, D): what the model says of each picture, whatever the number of its tokens."""
    output = model(images) if not hasattr(model, "config") else model(pixel_values=images)
    if isinstance(output, Tensor):
        return output
    return output.logits if "logits" in output else output.pooler_output


def blocks(model: Any) -> list[nn.Module]:
    """The encoder layers, found by their number: there are four of them."""
    lists = [one for one in model.modules() if isinstance(one, nn.ModuleList | nn.Sequential)]
    return list(next(one for one in lists if len(one) == 4))


def prefix(host: str) -> int:
    return {"siglip": 0, "siglip-head": 0, "dinov2-reg": 4, "timm-reg-avg": 4, "timm-distilled": 2}.get(host, 1)


def odd(tokens: Tokens, at: Stage) -> Tensor:
    return torch.arange(tokens.x.shape[1]).expand(tokens.x.shape[:2]) % 2 == 1


def lively(tokens: Tokens, at: Stage) -> Tensor:
    return tokens.x[..., 0] > 0.3


def fingerprint(model: Any) -> Any:
    return [
        (sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for module in model.modules()
    ]


@hosts
def test_the_identity_changes_no_bit_and_nothing_is_left_behind(host: str) -> None:
    model = vision(host)
    images = pixels(2)
    family = "timm" if host in TIMM else "hf-vision"
    with torch.no_grad():
        dense, before, weights = answer(model, images), fingerprint(model), copy.deepcopy(model.state_dict())
        for name, cls in registry().items():
            if family not in cls.card.hosts:
                continue
            with foveate.apply(model, name, **cls.card.identity or {}):
                assert torch.equal(answer(model, images), dense), name
            with foveate.apply(model, name):
                answer(model, images)
        assert fingerprint(model) == before
        assert torch.equal(answer(model, images), dense)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@hosts
@pytest.mark.parametrize("layer", (0, 2))
def test_dropping_between_layers_equals_a_plain_hook(host: str, layer: int) -> None:
    model = vision(host)
    images = pixels(2)
    first = prefix(host)

    def drop(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.cat([args[0][:, :first], args[0][:, first + 1 :: 2]], 1), *args[1:])

    with torch.no_grad():
        handle = blocks(model)[layer].register_forward_pre_hook(drop)
        expected = answer(model, images)
        handle.remove()
        stages = [probe("vision.layer", odd, layer=layer)] + ([probe("vision.patches", odd)] if layer == 0 else [])
        for method in stages:
            with foveate.apply(model, method) as applied:
                assert torch.allclose(answer(model, images), expected, atol=1e-5)
                assert applied.trace[0].tokens_out == (8, 8)
                assert applied.host.shape.prefix == first
    assert applied.trace[0].source[0].tolist() == [n // 2 if n % 2 else -1 for n in range(16)]


@hosts
@pytest.mark.parametrize("stage, layer", [("vision.patches", -1), ("vision.layer", 2), ("vision.output", -1)])
def test_pictures_that_keep_different_numbers(host: str, stage: str, layer: int) -> None:
    model = vision(host)
    images = pixels(6)
    with foveate.apply(model, probe(stage, lively, layer=layer)) as applied, torch.no_grad():
        together = answer(model, images)
        assert len(set(applied.trace[0].tokens_out)) > 1
        for b in range(6):
            assert torch.allclose(together[b], answer(model, images[b : b + 1])[0], atol=1e-5)


@pytest.mark.parametrize("settings", ({"global_pool": "map"}, {"global_pool": "avgmax"}, {"qk_norm": True}))
def test_other_timm_heads(settings: dict[str, Any]) -> None:
    model = vision("timm", **settings)
    images = pixels(3)
    with foveate.apply(model, probe("vision.output", lively)), torch.no_grad():
        together = answer(model, images)
        for b in range(3):
            assert torch.allclose(together[b], answer(model, images[b : b + 1])[0], atol=1e-5)


@pytest.mark.parametrize("host", VISION)
def test_a_smaller_picture_equals_the_model_on_a_smaller_picture(host: str) -> None:
    model = vision(host)
    images = pixels(2)
    if host == "siglip-head":
        # Its head has no argument for it.
        return
    small = torch.nn.functional.interpolate(images, size=(8, 8), mode="bilinear", antialias=True)
    extra = {} if host.startswith("dino") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        output = model(pixel_values=small, **extra)
        expected = output.logits if "logits" in output else output.pooler_output
        with foveate.apply(model, "resolution", keep=0.25) as applied:
            assert torch.allclose(answer(model, images), expected, atol=1e-5)
    (record,) = applied.trace
    assert (record.stage, record.method, record.tokens_in, record.tokens_out) == (
        "vision.pixels", "resolution", (16, 16), (4, 4),
    )  # fmt: skip
    assert record.source[1].tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]


def test_timm_has_no_pixels_stage_but_with_dynamic_image_size() -> None:
    with pytest.raises(InputError, match=r"vision\.pixels"):
        foveate.apply(vision("timm"), probe("vision.pixels", odd))
    assert "vision.pixels" in foveate.apply(vision("timm", dynamic_img_size=True), "dense").host.shape.stages


def test_two_towers() -> None:
    model = clip_dual()
    ids = torch.randint(3, 9, (2, 7))
    with torch.no_grad():
        dense = model(input_ids=ids, pixel_values=pixels(2))
        with foveate.apply(model, probe("vision.layer", odd, layer=1)):
            fewer = model(input_ids=ids, pixel_values=pixels(2))
    assert torch.equal(fewer.text_embeds, dense.text_embeds)
    assert not torch.allclose(fewer.image_embeds, dense.image_embeds)


@hosts
def test_gradients_and_bfloat16(host: str) -> None:
    model = vision(host).train()
    with foveate.apply(model, "fopru", keep=0.5):
        answer(model, pixels(2)).square().sum().backward()
        grads = [weight.grad for weight in blocks(model)[0].parameters()]
        assert all(grad is not None for grad in grads) and sum(grad.abs().sum() for grad in grads) > 0
        half = model.to(torch.bfloat16)
        assert bool(answer(half, pixels(2).bfloat16()).isfinite().all())


@pytest.mark.parametrize(
    ("host", "option"),
    [("timm", {"drop_path_rate": 0.3}), ("timm", {"init_values": 0.1}), ("dinov2", {"drop_path_rate": 0.3})],
)
def test_between_attention_and_mlp_in_training(host: str, option: dict[str, float]) -> None:
    """Stochastic depth draws a number for each sample of the branch that is withheld."""
    model = vision(host, **option).train()
    with foveate.apply(model, "tome", r=2) as applied:
        found = answer(model, pixels(2))
        found.square().sum().backward()
    assert bool(found.isfinite().all()) and applied.trace[-1].tokens_out[0] < 16
    for block in blocks(model):
        assert all(bool(one.grad.isfinite().all()) for one in block.parameters() if one.grad is not None)
