"""`apply`: what it refuses, and several methods at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import foveate
from foveate.method import InputError, build
from tiny import probe, prompt, vision, vlm


def test_methods_compose_where_their_stages_differ() -> None:
    model = vlm()
    inputs = prompt(model, [(2, 5)])
    with foveate.apply(model, [build("fopru", {"keep": 0.5}), "pyramiddrop"]) as applied, torch.no_grad():
        model(**inputs)
        assert [record.method for record in applied.trace] == ["fopru", "", *["pyramiddrop"] * 3]
        assert [record.tokens_out for record in applied.trace] == [(8,), (8,), (4,), (2,), (1,)]
        # 16 patches, of which the last stage carries one.
        assert (applied.trace[-1].source >= 0).sum() == 1


def test_methods_that_clash_are_both_named() -> None:
    with pytest.raises(InputError, match=r"aim and pyramiddrop clash: both act at llm\.layer"):
        foveate.apply(vlm(), ["aim", "pyramiddrop"])


def test_applying_twice_is_refused_for_the_model_and_its_parts() -> None:
    model = vlm()
    with foveate.apply(model, "fopru"):
        for one in (model, model.model.vision_tower):
            with pytest.raises(InputError, match="applied already"):
                foveate.apply(one, "fopru")
    with foveate.apply(model.model.vision_tower, "fopru", layer=3), pytest.raises(InputError, match="applied already"):
        foveate.apply(model, "fopru")
    foveate.apply(model, "fopru").remove()


def test_what_is_not_known_is_said_in_one_line() -> None:
    with pytest.raises(InputError, match="no adapter for Linear") as error:
        foveate.apply(nn.Linear(2, 2), "fopru")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"pyramiddrop needs the stage llm\.layer, which ViTModel does not have"):
        foveate.apply(vision("vit"), "pyramiddrop")
    with pytest.raises(InputError, match="did you mean pyramiddrop"):
        foveate.apply(vlm(), "pyramid-drop")
    with pytest.raises(InputError, match="no setting 'keeep'"):
        foveate.apply(vlm(), "fopru", keeep=0.5)
    with pytest.raises(InputError, match="empty list"):
        foveate.apply(vlm(), [])
    with pytest.raises(InputError, match="settings go with one method"):
        foveate.apply(vlm(), ["fopru"], keep=0.5)


def test_nothing_is_left_of_an_attempt_that_fails() -> None:
    model = vlm()
    wrong = probe("vision.output", lambda tokens, at: tokens.mask(), reads=("vision.attention[99]",))
    before = sum(len(module._forward_pre_hooks) for module in model.modules())
    with pytest.raises(foveate.InputError, match="layer 99 of 5"):
        foveate.apply(model, wrong)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == before
    foveate.apply(model, "fopru").remove()
