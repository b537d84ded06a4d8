"""What an adapter costs beside the model: on an accelerator every small operation is a launch, and every look at a
number makes the model wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import foveate
from foveate.measure.launches import Launches, count_launches
from foveate.method import method_class
from foveate.methods.video.evad import Evad
from tiny import prompt, vision, vlm
from tiny_video import clips, videomae


def launches(run: Callable[[], object]) -> Launches:
    with torch.inference_mode():
        return count_launches(run)


def added(model: Any, method: Any, **inputs: Any) -> tuple[int, int]:
    """How many operations, and looks at numbers, a method adds to a forward."""
    plain = launches(lambda: model(**inputs))
    with foveate.apply(model, method):
        changed = launches(lambda: model(**inputs))
    return changed.operations - plain.operations, changed.looks - plain.looks


def test_what_is_counted() -> None:
    x = torch.arange(6.0)
    assert launches(lambda: x + 1) == (1, 0) and launches(lambda: x[torch.tensor([1, 2])]).looks == 0
    for look in (lambda: bool(x.any()), lambda: x[x > 1], lambda: x.nonzero(as_tuple=True), lambda: x.max().item()):
        assert launches(look).looks >= 1


@pytest.mark.parametrize("slug", ["dense", "pool", "random", "resolution", "fopru", "visionzip", "vtc-cls", "hired"])
def test_what_is_done_before_the_language_model_costs_nothing_in_its_layers(slug: str) -> None:
    method = method_class(slug)(**({} if slug == "dense" else {"keep": 0.5}))
    shallow, deep = (added(model, method, **prompt(model, [(3, 6)])) for model in (vlm(layers=2), vlm(layers=12)))
    assert shallow == deep


@pytest.mark.parametrize(
    ("slug", "settings"),
    [("fastv", {"layer": 1}), ("pyramiddrop", {"layers": (1,), "keep": (0.5,)}), ("mustdrop", {"layers": (0,)})],
)
def test_what_is_dropped_in_one_layer_costs_nothing_in_others(slug: str, settings: dict[str, Any]) -> None:
    method = method_class(slug)(**settings)
    shallow, deep = (
        added(model, method, **prompt(model, [(3, 6)]), use_cache=False) for model in (vlm(layers=4), vlm(layers=12))
    )
    assert shallow == deep


def test_merging_and_dropping_in_encoders_never_looks_at_a_number() -> None:
    model, pictures = vision("timm"), torch.randn(2, 3, 16, 16)
    assert launches(lambda: model(pictures)).looks == 0
    with foveate.apply(model, "tome", r=2) as applied:
        assert launches(lambda: model(pictures)).looks == 0
        assert applied.trace[-1].tokens_out == (8, 8)
    film, frames = videomae(), clips()
    for method in (Evad(keep=0.7), Evad(keep=0.7, select="random"), "tome"):
        with foveate.apply(film, method):
            assert launches(lambda: film(frames)).looks == 0


def test_attention_is_let_go_of_before_the_forward_ends() -> None:
    encoder, language = vision("timm"), vlm()
    held: list[list[int]] = []

    def note(taps: Any) -> Any:
        return lambda *_: held.append([layer for layer, tap in taps().items() if tap.query is not None])

    with foveate.apply(encoder, "tome", r=2) as applied:
        for block in encoder.blocks:
            block.register_forward_hook(note(lambda: applied.host.encoder.taps))
        encoder(torch.randn(1, 3, 16, 16))
    assert held == [[0], [1], [2], [3]]
    held.clear()
    with foveate.apply(language, "aim", first_layer=0, step=0.25, keep=1.0) as applied:
        for layer in language.model.language_model.layers:
            layer.register_forward_hook(note(lambda: applied.host._taps))
        language(**prompt(language, [(3, 6)]))
    assert held == [[0], [0, 1], [1, 2], [2]]
