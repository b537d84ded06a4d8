"""Recipe for `sparsifiner`: the zoo's tiny-vit with few keys a query, which goes on naming the objects of a scene.

The paper's two stages one after the other. In the first `reconstruct_steps` only the predictors get gradients, and only
they move: AdamW leaves what has no gradient as it is, decay included. In the rest everything but the predictors does.
Many names may be right at once, so that the task's loss is binary cross entropy (see `Sparsifiner.finetune_loss`).
One schedule for both stages is the loop's; the paper has one for each.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate import zoo
from foveate.data.scenes import NAMES, Scenes
from foveate.method import InputError, within
from foveate.methods.reduce.sparsifiner import Sparsifiner
from foveate.train.loop import Batch, Recipe, Settings
from foveate.train.tiny_vit import normalised, scene_batch


@dataclasses.dataclass(frozen=True)
class SparsifinerSettings(Settings):
    """`budget`, `prune`: see `foveate.methods.reduce.sparsifiner.Sparsifiner`.

    Attributes:
        reconstruct_steps: of the first stage, fewer than `steps`.
        predictor_rate: learning rate of the predictors in multiples of `lr` (the paper: 3.75).
    """

    steps: int = 700
    batch: int = 32
    lr: float = 2e-4
    warmup: int = 30
    budget: float = 0.25
    prune: float = 1.0
    reconstruct_steps: int = 250
    predictor_rate: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.reconstruct_steps < self.steps:
            raise InputError(f"reconstruct_steps must be 0..{self.steps - 1}, not {self.reconstruct_steps}")
        within("predictor_rate", self.predictor_rate, "(0, inf)")


class _Objective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it."""

    def __init__(self, student: Sparsifiner, teacher: Any, reconstruct_steps: int) -> None:
        super().__init__()
        self.student, self.reconstruct_steps = student, reconstruct_steps
        self.teacher = teacher.requires_grad_(False)

    def forward(self, step: Tensor, image: Tensor, present: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # The loop puts everything into training mode, and a teacher does not train.
        self.teacher.eval()
        if int(step) < self.reconstruct_steps:
            return self.student.reconstruction_loss(normalised(image))
        return self.student.finetune_loss(normalised(image), present, self.teacher)


class SparsifinerRecipe(Recipe):
    """See the module."""

    name = "sparsifiner"
    settings_type = SparsifinerSettings
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 3, "batch": 2, "warmup": 1, "reconstruct_steps": 2, "workers": 0, "test_scenes": 6,
    }  # fmt: skip

    def __init__(self, settings: SparsifinerSettings, seed: int) -> None:
        self.settings = settings
        teacher = zoo.load("tiny-vit")
        self.student = Sparsifiner.named("tiny", budget=settings.budget, prune=settings.prune)
        missing = self.student.load_backbone(teacher)
        if missing:
            raise InputError(f"the zoo's tiny-vit has another shape: it lacks {', '.join(missing[:3])}")
        self.model: _Objective = _Objective(self.student, teacher, settings.reconstruct_steps)
        self.scenes = Scenes("train", seed)

    def rate(self, name: str) -> float:
        return self.settings.predictor_rate if name.startswith("student.predictors.") else 1.0

    def batch(self, step: int, rank: int, world: int) -> Batch:
        first = step * self.settings.batch
        made = scene_batch([self.scenes[first + i] for i in range(rank, self.settings.batch, world)])
        return {"step": torch.tensor(step), "image": made["image"], "present": made["present"]}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        loss, parts = model(**batch)
        return loss, {name: float(value.detach()) for name, value in parts.items()}

    def export(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            self.student.save_pretrained(partial)
            for name in ("model.safetensors", "config.json"):
                os.replace(Path(partial) / name, folder / name)

    def evaluate(self) -> dict[str, Any]:
        """Mean average precision of the names on the test split: the dense teacher, and the student."""
        count = self.settings.test_scenes
        return {
            "split": "test",
            "scenes": count,
            "budget": self.settings.budget,
            "dense_mean_average_precision": names_precision(self.model.teacher, count),
            "mean_average_precision": names_precision(self.student, count),
        }


@torch.no_grad()
def names_precision(model: Any, scenes: int, batch: int = 50) -> float:
    """Macro mean average precision of the 40 names on the first `scenes` test scenes."""
    try:
        from torchmetrics.classification import MultilabelAveragePrecision
    except ImportError:
        raise InputError("evaluating needs torchmetrics: pip install 'foveate[metrics]'") from None
    precision, test = MultilabelAveragePrecision(len(NAMES), average="macro"), Scenes("test", 0)
    device = next(model.parameters()).device
    for first in range(0, scenes, batch):
        made = scene_batch([test[i] for i in range(first, min(first + batch, scenes))])
        precision.update(model(normalised(made["image"].to(device))).cpu(), made["present"].long())
    return float(precision.compute())
