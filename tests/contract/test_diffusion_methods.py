"""What every method must do that is applied to diffusers pipelines; `test_contract.py` has what all methods share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import foveate
from foveate.method import InputError, registry
from tiny_diffusion import PIPELINES, denoiser, noise, pipeline, sample

METHODS = {slug: cls for slug, cls in registry().items() if "diffusers" in cls.card.hosts}
OTHER_SIZE = {"height": 16, "width": 8}
"""Twice as high as the models were trained for."""
SETTINGS: dict[str, dict[str, Any]] = {"a-star": {"words": (1, 2)}}
"""What methods have to be told where the prompt is an embedding."""
per_method = pytest.mark.parametrize("slug", METHODS)


def hosts(slug: str, settings: dict[str, Any] | None = None) -> Iterator[tuple[str, Any, Any]]:
    """(name, pipeline, method) of those that the method can be applied to as it is set by default."""
    for name in PIPELINES:
        if name == "dit":
            continue
        pipe, made = pipeline(name), METHODS[slug](**settings or SETTINGS.get(slug, {}))
        try:
            foveate.apply(pipe, made).remove()
        except InputError:
            continue
        yield name, pipe, made


@per_method
def test_identity_settings_change_nothing(slug: str) -> None:
    identity = METHODS[slug].card.identity
    if identity is None:
        return
    for name, pipe, made in hosts(slug, dict(identity)):
        dense = sample(name, pipe, **OTHER_SIZE)
        with foveate.apply(pipe, made):
            assert torch.equal(sample(name, pipe, **OTHER_SIZE), dense)


@per_method
def test_the_same_noise_gives_the_same_picture_and_the_method_comes_off(slug: str) -> None:
    for name, pipe, made in hosts(slug):
        dense = sample(name, pipe, steps=6, **OTHER_SIZE)
        with foveate.apply(pipe, made):
            first = sample(name, pipe, steps=6, **OTHER_SIZE)
            assert first.isfinite().all() and torch.equal(first, sample(name, pipe, steps=6, **OTHER_SIZE))
        assert torch.equal(sample(name, pipe, steps=6, **OTHER_SIZE), dense)
        assert all(weight.grad is None for weight in denoiser(pipe).parameters())


@per_method
def test_a_picture_does_not_depend_on_its_batch(slug: str) -> None:
    for name, pipe, made in hosts(slug):
        latents = noise(pipe, 2, 16, 8)
        with foveate.apply(pipe, made):
            together = sample(name, pipe, 2, latents=latents, **OTHER_SIZE)
            alone = sample(name, pipe, 1, latents=latents[:1], **OTHER_SIZE)
        torch.testing.assert_close(together[:1], alone, rtol=1e-3, atol=1e-3)


@per_method
def test_half_precision(slug: str) -> None:
    for name, pipe, made in hosts(slug):
        pipe.to(dtype=torch.bfloat16)
        with foveate.apply(pipe, made):
            given = {"latents": noise(pipe, 1, 16, 8).bfloat16(), **OTHER_SIZE}
            assert sample(name, pipe, dtype=torch.bfloat16, **given).isfinite().all()
