"""The recipe of `droppos`: its schedule, its probe on features that are known, and a smoke run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("timm")

import timm
from safetensors.torch import load_file

from foveate import train
from foveate.method import InputError
from foveate.train.droppos import DropPosRecipe, DropPosSettings, linear_probe
from foveate.train.tiny_vit import normalised


def recipe(**overrides: Any) -> DropPosRecipe:
    torch.manual_seed(0)
    return DropPosRecipe(DropPosSettings(**(DropPosRecipe.smoke | overrides)), 3)


def test_sigma_falls_from_step_to_step() -> None:
    made = recipe(steps=4, sigma=2.0)
    for step, sigma in ((0, 2.0), (3, 0.5)):
        batch = made.batch(step, 0, 1)
        torch.manual_seed(7)
        loss, parts = made.loss(made.model, batch)
        torch.manual_seed(7)
        wanted, _ = made.droppos.loss(normalised(batch["image"]), sigma)
        assert float(loss.detach()) == pytest.approx(float(wanted.detach()), abs=1e-6)
        assert set(parts) == {"positions", "accuracy"}
    assert torch.equal(made.batch(1, 1, 2)["image"], made.batch(1, 0, 1)["image"][1::2])


class Sees:
    """A "model" whose features are the mean of each colour, which says the class, or the same for all."""

    def __init__(self, blind: bool) -> None:
        self.blind = blind

    def forward_features(self, pixels: Tensor) -> Tensor:
        return pixels * (not self.blind)

    def forward_head(self, pixels: Tensor, pre_logits: bool) -> Tensor:
        assert pre_logits
        return pixels.mean((2, 3))


def test_the_probe_finds_what_is_linear() -> None:
    label = torch.arange(60) % 3
    image = torch.randint(0, 40, (60, 3, 8, 8), dtype=torch.uint8)
    for k in range(60):
        image[k, label[k]] += 120
    data = {"image": image, "label": label}
    assert linear_probe(Sees(False), data, data) == 1.0
    assert linear_probe(Sees(True), data, data) == pytest.approx(1 / 3)


def test_scratch_is_what_pretraining_began_with() -> None:
    made = recipe()
    before = made._classifier(made.untrained)
    with torch.no_grad():
        made.droppos.encoder.blocks[0].attn.qkv.weight.add_(1)
    after = made._classifier(made.untrained)
    pixels = torch.randn(2, 3, 96, 96)
    assert torch.equal(before(pixels), after(pixels)) and not after.pos_embed.requires_grad
    assert not torch.equal(made._classifier(made.droppos.encoder.state_dict())(pixels), after(pixels))


def test_bad_settings() -> None:
    for settings in ({"labels": 0.0}, {"pictures": 0}, {"tune_steps": 0}, {"decoder_width": 20}, {"width": 30}):
        with pytest.raises(InputError, match=next(iter(settings))):
            DropPosSettings(**settings)  # type: ignore[arg-type]


def test_smoke(tmp_path: Path) -> None:
    metrics = train.run("droppos", out=tmp_path, smoke=True, threads=1)
    assert metrics["labels"] == 2 and metrics["chance"] == pytest.approx(1 / 144)
    for name in ("pretrained", "scratch"):
        assert 0 <= metrics[f"{name}_linear_probe"] <= 1 and 0 <= metrics[f"{name}_fine_tuned"] <= 1
    config = json.loads((tmp_path / "config.json").read_text())
    del config["name"]
    encoder = timm.create_model("vit_base_patch16_224", num_classes=0, **config)
    encoder.load_state_dict(load_file(tmp_path / "model.safetensors"))
