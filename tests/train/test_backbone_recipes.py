"""The recipes of davit and strip-mlp: their loss, their figures with a model that knows, resuming, a smoke run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("torchmetrics")
pytest.importorskip("timm")

from foveate import train
from foveate.data.scenes import Scenes
from foveate.method import InputError
from foveate.methods.image.davit import CONFIGURATIONS as DAVIT
from foveate.methods.image.davit import Davit
from foveate.methods.image.strip_mlp import CONFIGURATIONS as STRIP_MLP
from foveate.methods.image.strip_mlp import StripMlp
from foveate.train.backbone import BackboneRecipe, BackboneSettings
from foveate.train.loop import train as run
from foveate.train.tiny_vit import scene_batch

RECIPES = {"davit": Davit, "strip-mlp": StripMlp}


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        DAVIT, "narrow", {"widths": (8, 16), "heads": (2, 2), "depths": (1, 1), "window": 6, "classes": 40}
    )
    monkeypatch.setitem(STRIP_MLP, "narrow", {"width": 8, "depths": (1, 1, 1, 1), "groups": 2})


def recipe(name: str, **overrides: Any) -> BackboneRecipe:
    torch.manual_seed(0)
    made: BackboneRecipe = train.recipe(name)(
        BackboneSettings(**(BackboneRecipe.smoke | {"config": "narrow"} | overrides)), 3
    )
    return made


@pytest.mark.parametrize("name", RECIPES)
def test_loss(name: str) -> None:
    made = recipe(name)
    batch = made.batch(1, 0, 1)
    assert torch.equal(batch["image"], scene_batch([Scenes("train", 3)[i] for i in (2, 3)])["image"])
    made.student.eval()
    loss, parts = made.loss(made.model, batch)
    pixels = batch["image"].float() / 127.5 - 1
    backbone = made.student.backbone
    with torch.no_grad():
        logits = backbone(pixels)
        patches = torch.zeros(2, 41, 12, 12)
        for head, one in zip(made.student.patch_heads, backbone.maps(pixels)):
            norm, linear = head
            flat = one.flatten(1)
            scale = (flat.var(1, correction=0) + norm.eps).sqrt()
            one = (one - flat.mean(1)[:, None, None, None]) / scale[:, None, None, None]
            one = F.conv2d(one * norm.weight[:, None, None] + norm.bias[:, None, None], linear.weight, linear.bias)
            # From 24 places a side, what lies in the middle of four is their mean.
            patches += F.avg_pool2d(one, 2) if one.shape[-1] == 24 else F.interpolate(one, (12, 12), mode="bilinear")
    names = F.binary_cross_entropy_with_logits(logits, batch["present"], reduction="sum") / 2
    wrong = F.cross_entropy(patches.flatten(2), batch["labels"])
    assert parts == {"names": pytest.approx(float(names), rel=1e-4), "patches": pytest.approx(float(wrong), rel=1e-4)}
    assert float(loss.detach()) == pytest.approx(float(names + 2 * wrong), rel=1e-4)


class Knows(torch.nn.Module):
    """Knows the answers of the test split's first scenes."""

    def __init__(self, count: int, blind: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(7))
        self.blind = blind
        truth = [scene_batch([Scenes("test", 0)[i]]) for i in range(count)]
        self.truth = {one["image"].numpy().tobytes(): one for one in truth}

    def both(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        if not bool(pictures.any()):
            return (pictures.flatten(1) @ torch.zeros(27648, 1), pictures)  # counted
        raw = ((pictures + 1) * 127.5).round().to(torch.uint8)
        known = [self.truth[one.numpy().tobytes()] for one in raw]
        names, labels = torch.cat([one["present"] for one in known]), torch.cat([one["labels"] for one in known])
        return names, F.one_hot(labels * (not self.blind), 41).float()

    def forward(self, pictures: Tensor) -> Tensor:
        return self.both(pictures)[0]


@pytest.mark.parametrize("blind", [False, True])
def test_figures_of_a_model_that_knows(blind: bool) -> None:
    made = recipe("davit")
    made.student = Knows(6, blind)
    metrics = made.evaluate()
    labels = torch.cat([one["labels"].flatten() for one in made.student.truth.values()])
    background = float((labels == 0).double().mean()) / len(labels.unique())
    # Names that no scene has count as 0.
    there = torch.cat([one["present"] for one in made.student.truth.values()]).any(0).float().mean()
    assert metrics["names_mean_average_precision"] == pytest.approx(float(there))
    assert metrics["patch_mean_iou"] == pytest.approx(background if blind else 1)
    assert metrics["flops"] == 2 * 27648 and metrics["parameters"] == 7 and metrics["scenes"] == 6


def test_batch_statistics_survive_a_stop(tmp_path: Path) -> None:
    options = BackboneRecipe.smoke | {"config": "narrow", "threads": 1, "steps": 3}
    chosen = train.recipe("strip-mlp")
    run(chosen, out=tmp_path / "whole", **options)
    assert run(chosen, out=tmp_path / "parts", stop_after=2, **options) == {}
    run(chosen, out=tmp_path / "parts", **options)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    moving = [name for name in whole if "running_mean" in name]
    assert moving and all(bool(whole[name].any()) for name in moving)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("name", RECIPES)
def test_smoke(name: str, tmp_path: Path) -> None:
    metrics = train.run(name, out=tmp_path, smoke=True, threads=1)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text()) and metrics["scenes"] == 6
    assert 0 <= metrics["names_mean_average_precision"] <= 1 and 0 <= metrics["patch_mean_iou"] <= 1
    # "scenes" costs what tiny-vit does: 347 MFLOPs for both outputs.
    assert metrics["flops"] == pytest.approx(347e6, rel=0.03)
    model: Any = RECIPES[name].from_pretrained(tmp_path)
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 40)
    assert len(load_file(tmp_path / "patch_heads.safetensors")) == 16


def test_learns(tmp_path: Path) -> None:
    options = {"steps": 40, "batch": 8, "lr": 3e-3, "warmup": 5, "config": "narrow", "threads": 1}
    train.run("davit", out=tmp_path, smoke=True, **options)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for part in ("names", "patches"):
        assert sum(line[part] for line in lines[-3:]) < 0.8 * sum(line[part] for line in lines[:3]), part


def test_unknown_configuration(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no configuration 'scene'; did you mean scenes"):
        train.run("davit", out=tmp_path, smoke=True, config="scene")
