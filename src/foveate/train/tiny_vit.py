"""Recipe for `tiny-vit`: a vision transformer that names the objects of a scene and the object under every patch.

The loss is the weighted sum of: binary cross entropy of the 40 names on the class token (summed over the names, since
most are absent), cross entropy of 41 classes on the patch tokens of the last layer and of the last but one, and a
smooth L1 distance of the boxes predicted by the last but one layer's tokens that lie on an object. Every step sees new
scenes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate import zoo
from foveate.data.scenes import NAMES, Scene, Scenes, patch_labels, patch_owner, presence
from foveate.measure.quality import mean_iou
from foveate.method import InputError
from foveate.train.loop import Batch, Recipe, Settings, write_json, write_tensors


@dataclasses.dataclass(frozen=True)
class TinyVitSettings(Settings):
    """`width`, `depth`, `heads`: of the transformer; pictures have 96 px and patches 8 px."""

    steps: int = 2800
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 150
    width: int = 128
    depth: int = 5
    heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 2:
            raise InputError(f"depth must be >= 2, not {self.depth}")
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise InputError(f"width must be a multiple of heads, not {self.width} with {self.heads} heads")


class _Objective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, image: Tensor, present: Tensor, labels: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        tower = self.tower
        early, last = tower.layers(normalised(image))
        names = F.binary_cross_entropy_with_logits(tower.forward_head(last), present, reduction="none")
        on_object = (labels > 0)[..., None]
        distance = F.smooth_l1_loss(tower.early_box_head(early[:, 1:]), boxes, reduction="none", beta=0.05)
        return {
            "names": names.sum(1).mean(),
            "patches": F.cross_entropy(tower.patch_head(last[:, 1:]).flatten(0, 1), labels.flatten()),
            "early": F.cross_entropy(tower.early_patch_head(early[:, 1:]).flatten(0, 1), labels.flatten()),
            "boxes": (distance * on_object).sum() / on_object.sum().clamp(min=1),
        }


class TinyVit(Recipe):
    """See the module."""

    name = "tiny-vit"
    settings_type = TinyVitSettings
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 2, "batch": 4, "warmup": 1, "width": 16, "depth": 2, "heads": 2, "workers": 0, "test_scenes": 8,
    }  # fmt: skip

    def __init__(self, settings: TinyVitSettings, seed: int) -> None:
        self.settings = settings
        self.config = {
            "img_size": 96,
            "patch_size": 8,
            "embed_dim": settings.width,
            "depth": settings.depth,
            "num_heads": settings.heads,
            "num_classes": len(NAMES),
        }
        self.tower = zoo.build_vit(self.config)
        self.model = _Objective(self.tower)
        self.scenes = Scenes("train", seed)

    def batch(self, step: int, rank: int, world: int) -> Batch:
        first = step * self.settings.batch
        return scene_batch([self.scenes[first + i] for i in range(rank, self.settings.batch, world)])

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        parts: dict[str, Tensor] = model(**batch)
        total = parts["names"] + 2 * parts["patches"] + 2 * parts["early"] + 5 * parts["boxes"]
        return total, {name: float(value.detach()) for name, value in parts.items()}

    def export(self, folder: Path) -> None:
        write_tensors(folder / "model.safetensors", self.tower.state_dict())
        write_json(folder / "config.json", {"name": self.name, **self.config})

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Macro mean average precision of the names, and mean intersection over union of the patches' 41 classes."""
        try:
            from torchmetrics.classification import MultilabelAveragePrecision
        except ImportError:
            raise InputError("evaluating tiny-vit needs torchmetrics: pip install 'foveate[metrics]'") from None
        tower: Any = self.tower
        scenes, count = Scenes("test", 0), self.settings.test_scenes
        precision = MultilabelAveragePrecision(len(NAMES), average="macro")
        classes = len(NAMES) + 1
        confusion = {name: torch.zeros(classes, classes, dtype=torch.long) for name in ("last", "early")}
        box_error, boxes_seen = 0.0, 0
        device = next(tower.parameters()).device
        for first in range(0, count, 50):
            batch = scene_batch([scenes[i] for i in range(first, min(first + 50, count))])
            early, last = tower.layers(normalised(batch["image"].to(device)))
            precision.update(tower.forward_head(last).cpu(), batch["present"].long())
            labels = batch["labels"].flatten()
            for name, logits in (
                ("last", tower.patch_head(last[:, 1:])),
                ("early", tower.early_patch_head(early[:, 1:])),
            ):
                found = logits.argmax(-1).flatten().cpu()
                confusion[name] += torch.bincount(labels * classes + found, minlength=classes**2).view(classes, classes)
            distance = (tower.early_box_head(early[:, 1:]).cpu() - batch["boxes"]).abs()[batch["labels"] > 0]
            box_error, boxes_seen = box_error + float(distance.sum()), boxes_seen + distance.numel()
        return {
            "split": "test",
            "scenes": count,
            "names_mean_average_precision": float(precision.compute()),
            "patch_mean_iou": mean_iou(confusion["last"]),
            "patch_accuracy": float(confusion["last"].diag().sum() / confusion["last"].sum()),
            "patch_mean_iou_last_but_one_layer": mean_iou(confusion["early"]),
            "box_mean_absolute_error_px": 96 * box_error / max(1, boxes_seen),
        }


def normalised(image: Tensor) -> Tensor:
    """uint8 pictures as float in -1..1, what the zoo's vision towers read."""
    return image.float() / 127.5 - 1


def scene_batch(scenes: list[Scene]) -> Batch:
    """`image` (B, 3, H, W) uint8, `present` (B, 40), `labels` (B, N) long, `boxes` (B, N, 4): see SceneTransformer."""
    side = scenes[0].image.shape[0]
    boxes = []
    for scene in scenes:
        corners = np.array([(0, 0, 0, 0), *(thing.box for thing in scene.objects)], dtype=np.float32) / side
        centre, extent = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
        boxes.append(np.concatenate([centre, extent], axis=1)[patch_owner(scene, 8).ravel() + 1])
    return {
        "image": torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).contiguous(),
        "present": torch.from_numpy(np.stack([presence(scene) for scene in scenes])),
        "labels": torch.from_numpy(np.stack([patch_labels(scene, 8).ravel() for scene in scenes])),
        "boxes": torch.from_numpy(np.stack(boxes)),
    }
