"""What recipes share that make tiny-vit cheaper: scenes, its weights to start from, and the figures to compare.

Every step sees new scenes; the loss on names is tiny-vit's, binary cross entropy summed over the names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate import zoo
from foveate.data.scenes import NAMES, Scenes
from foveate.measure.flops import count_flops
from foveate.measure.quality import mean_iou
from foveate.method import InputError
from foveate.train.loop import Batch, Recipe, Settings
from foveate.train.tiny_vit import normalised, scene_batch

CHUNK = 50
"""Scenes at a time in evaluation."""


@dataclasses.dataclass(frozen=True)
class FineTuneSettings(Settings):
    """Defaults for a model of tiny-vit's size that starts from its weights."""

    steps: int = 600
    batch: int = 32
    lr: float = 3e-4
    warmup: int = 30
    test_scenes: int = 1000


class FineTune(Recipe):
    """Batches of scenes, and evaluation. Recipes set `student`, the model whose logits count."""

    student: Any
    seed: int
    settings: Any

    def batch(self, step: int, rank: int, world: int) -> Batch:
        scenes, first = Scenes("train", self.seed), step * self.settings.batch
        return scene_batch([scenes[first + i] for i in range(rank, self.settings.batch, world)])

    def evaluate(self) -> dict[str, Any]:
        """Macro mean average precision of the names beside tiny-vit's on the same scenes, and both models' FLOPs."""
        dense = zoo.load("tiny-vit").to(next(self.student.parameters()).device)
        count = self.settings.test_scenes
        return {
            "split": "test",
            "scenes": count,
            "names_mean_average_precision": average_precision(self.student, count),
            "dense_names_mean_average_precision": average_precision(dense, count),
            "flops": flops_of_a_picture(self.student),
            "dense_flops": flops_of_a_picture(dense),
        }


@torch.no_grad()
def flops_of_a_picture(model: Any) -> int:
    """FLOPs of one forward of one picture."""
    picture = torch.zeros(1, 3, 96, 96, device=next(model.parameters()).device)
    return count_flops(lambda: model(picture))


@torch.no_grad()
def average_precision(model: Callable[[Tensor], Tensor], count: int) -> float:
    """Macro mean average precision of the names in the first `count` scenes of the test split."""
    try:
        from torchmetrics.classification import MultilabelAveragePrecision
    except ImportError:
        raise InputError("evaluating this needs torchmetrics: pip install 'foveate[metrics]'") from None
    precision = MultilabelAveragePrecision(len(NAMES), average="macro")
    for batch in _batches(count):
        precision.update(_logits(model, batch), batch["present"].long())
    return float(precision.compute())


@torch.no_grad()
def patch_mean_iou(model: Callable[[Tensor], Tensor], count: int) -> float:
    """Mean intersection over union of the 41 classes of the patches in those scenes, of logits (B, N, 41)."""
    classes = len(NAMES) + 1
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    for batch in _batches(count):
        found, labels = _logits(model, batch).argmax(-1).flatten(), batch["labels"].flatten()
        confusion += torch.bincount(labels * classes + found, minlength=classes**2).view(classes, classes)
    return mean_iou(confusion)


def _batches(count: int) -> Any:
    scenes = Scenes("test", 0)
    return (
        scene_batch([scenes[i] for i in range(first, min(first + CHUNK, count))]) for first in range(0, count, CHUNK)
    )


def _logits(model: Any, batch: Batch) -> Tensor:
    device = next(model.parameters()).device if hasattr(model, "parameters") else "cpu"
    logits: Tensor = model(normalised(batch["image"].to(device))).float().cpu()
    return logits
