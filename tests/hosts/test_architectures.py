"""Exact shapes against published parameter counts, and twins that treat tokens alike."""

from __future__ import annotations

import pytest
import torch

from foveate.hosts.architectures import ARCHITECTURES, architecture
from foveate.method import InputError


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_are_the_published_ones_and_take_no_memory(name: str) -> None:
    model = architecture(name).build_meta()
    assert sum(weight.numel() for weight in model.parameters()) == architecture(name).parameters
    assert {weight.device.type for weight in model.parameters()} == {"meta"}


def test_llava_7b_in_particular() -> None:
    assert architecture("llava-1.5-7b").parameters == 7_063_427_072


@pytest.mark.parametrize(
    ("name", "visual", "text"), [("llava-1.5-7b", 576, 3), ("llava-onevision-7b", 392, 5), ("internvl2-8b", 256, 4)]
)
def test_a_twin_has_the_depth_and_the_tokens(name: str, visual: int, text: int) -> None:
    shape = architecture(name)
    model, inputs = shape.twin(visual, text)
    with torch.inference_mode():
        cache = model(**inputs, use_cache=True).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [visual + text] * shape.text["num_hidden_layers"]
    encoder = model.model.vision_tower.encoder
    depth = len(encoder.layer if name.startswith("internvl") else encoder.layers)
    assert depth == shape.vision["num_hidden_layers"]
    again, same = shape.twin(visual, text)
    assert torch.equal(inputs["pixel_values"], same["pixel_values"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_a_twin_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    architecture("llava-1.5-7b").twin()
    assert torch.equal(before, torch.random.get_rng_state())


def test_errors_say_what_to_do() -> None:
    with pytest.raises(InputError, match=r"did you mean llava-1\.5-7b"):
        architecture("llava-1.5-7B")
    with pytest.raises(InputError, match="no language model"):
        architecture("vit-b-16").twin()
    with pytest.raises(InputError, match="576 visual tokens a crop"):
        architecture("llava-1.5-7b").twin(577)
