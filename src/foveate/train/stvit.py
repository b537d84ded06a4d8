"""Recipe for `stvit`: tiny-vit's deep layers on 16 semantic tokens, started from its weights; no loss but the task's.

With an r at the end of `layers` all tokens are recovered, and the object under every patch is learned too, with
tiny-vit's loss and its head to start from.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from foveate import zoo
from foveate.methods.reduce.stvit import STViT
from foveate.train.fine_tune import FineTune, FineTuneSettings, patch_mean_iou
from foveate.train.loop import Batch, write_tensors
from foveate.train.sit_slim import save
from foveate.train.tiny_vit import normalised


@dataclasses.dataclass(frozen=True)
class STViTSettings(FineTuneSettings):
    """`layers` (5 letters), `regions`, `seeds`, `centres`, `residual`: of `foveate.methods.reduce.stvit.STViT`.

    `scratch`: whether to start from random weights, as the paper does, instead of tiny-vit's.
    """

    layers: str = "ffggs"
    regions: int = 4
    seeds: str = "predicted"
    centres: str = "both"
    residual: str = "query"
    scratch: bool = False


class _Objective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it."""

    def __init__(self, student: STViT, patch_head: nn.Module | None) -> None:
        super().__init__()
        self.student, self.patch_head = student, patch_head

    def forward(self, image: Tensor, present: Tensor, labels: Tensor) -> dict[str, Tensor]:
        tokens = self.student.forward_features(normalised(image))
        names = F.binary_cross_entropy_with_logits(self.student.forward_head(tokens), present.float(), reduction="none")
        parts = {"names": names.sum(1).mean()}
        if self.patch_head is not None:
            parts["patches"] = F.cross_entropy(self.patch_head(tokens).flatten(0, 1), labels.flatten())
        return parts

    def segment(self, pictures: Tensor) -> Tensor:
        """(B, N, 41) logits of the object under every patch."""
        assert self.patch_head is not None
        logits: Tensor = self.patch_head(self.student.forward_features(pictures))
        return logits


class STViTRecipe(FineTune):
    """See the module."""

    name = "stvit"
    settings_type = STViTSettings
    smoke: ClassVar[dict[str, Any]] = {"steps": 2, "batch": 2, "warmup": 1, "workers": 0, "test_scenes": 8}

    def __init__(self, settings: STViTSettings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.dense = zoo.load("tiny-vit")
        changes = {name: getattr(settings, name) for name in ("layers", "regions", "seeds", "centres", "residual")}
        self.student: STViT = STViT.named("tiny", **changes)
        if not settings.scratch:
            self.student.load_backbone(self.dense)
        head = self.dense.patch_head if self.student.semantic.recovers else None
        if head is not None and settings.scratch:
            head.reset_parameters()
        self.model: _Objective = _Objective(self.student, head)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        parts: dict[str, Tensor] = model(batch["image"], batch["present"], batch["labels"])
        total = parts["names"]
        if "patches" in parts:
            total = total + 2 * parts["patches"]
        return total, {name: float(value.detach()) for name, value in parts.items()}

    def export(self, folder: Path) -> None:
        save(self.student, folder)
        if self.model.patch_head is not None:
            write_tensors(folder / "patch_head.safetensors", self.model.patch_head.state_dict())

    def evaluate(self) -> dict[str, Any]:
        """As `FineTune`, and the mean intersection over union of the patches' classes where tokens are recovered."""
        figures = super().evaluate()
        if self.model.patch_head is not None:
            count, objective = self.settings.test_scenes, self.model
            dense = zoo.load("tiny-vit").to(next(self.student.parameters()).device)
            for name, model in (("patch_mean_iou", objective), ("dense_patch_mean_iou", dense)):
                figures[name] = patch_mean_iou(model.segment, count)
        return figures
