"""What the recipes of backbones share: scenes of 96 px, whose objects they name and find under every patch of 8 px.

The loss is tiny-vit's without what only its language model needs: binary cross entropy of the 40 names, summed over
them, plus twice the cross entropy of 41 classes of the patches. Every step sees new scenes, and nothing is pre-trained.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.data.scenes import NAMES
from foveate.train.fine_tune import (
    FineTune,
    FineTuneSettings,
    average_precision,
    flops_of_a_picture,
    patch_mean_iou,
)
from foveate.train.loop import Batch, write_tensors
from foveate.train.tiny_vit import normalised

SIDE, PATCH = 96, 8
"""px of a picture and of a patch."""


@dataclasses.dataclass(frozen=True)
class BackboneSettings(FineTuneSettings):
    """`config`: a name in the method's `CONFIGURATIONS`; `drop_path`: stochastic depth."""

    lr: float = 1e-3
    warmup: int = 60
    config: str = "scenes"
    drop_path: float = 0.0


class SceneBackbone(nn.Module):
    """A backbone with `maps` and `forward_head`, and a linear head on each of its maps for the patches.

    Patch logits are the sum over the maps, each normalised over channels and places, taken to 41 classes and resized
    to the 12 x 12 patches. Pictures are (B, 3, 96, 96) in -1..1.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone.eval()
        with torch.no_grad():
            widths = [one.shape[1] for one in backbone.maps(torch.zeros(1, 3, SIDE, SIDE))]
        self.patch_heads = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, width), nn.Conv2d(width, 1 + len(NAMES), 1)) for width in widths
        )
        self.train()

    def both(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, 40) of the names, and (B, 144, 41) of the patches, class 0 being background."""
        maps, side = self.backbone.maps(pictures), SIDE // PATCH
        parts = [
            F.interpolate(head(one), size=(side, side), mode="bilinear") for head, one in zip(self.patch_heads, maps)
        ]
        return self.backbone.forward_head(maps[-1]), torch.stack(parts).sum(0).flatten(2).transpose(1, 2)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (B, 40) of the names."""
        return self.backbone(pictures)


class Output(nn.Module):
    """`model` with the output of `read(model, pictures)`."""

    def __init__(self, model: Any, read: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.read = model, read

    def forward(self, pictures: Tensor) -> Any:
        return self.read(self.model, pictures)


class _Objective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it."""

    def __init__(self, student: Any) -> None:
        super().__init__()
        self.student = student

    def forward(self, image: Tensor, present: Tensor, labels: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        names, patches = self.student.both(normalised(image))
        return {
            "names": F.binary_cross_entropy_with_logits(names, present, reduction="none").sum(1).mean(),
            "patches": F.cross_entropy(patches.flatten(0, 1), labels.flatten()),
        }


class BackboneRecipe(FineTune):
    """See the module. `build` makes what is trained, a module with `both` as `SceneBackbone` has it."""

    settings_type = BackboneSettings
    smoke: ClassVar[dict[str, Any]] = {"steps": 2, "batch": 2, "warmup": 1, "workers": 0, "test_scenes": 6}

    def __init__(self, settings: BackboneSettings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.student = self.build(settings)
        self.model = _Objective(self.student)

    @staticmethod
    @abstractmethod
    def build(settings: BackboneSettings) -> Any: ...

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        parts: dict[str, Tensor] = model(**batch)
        return parts["names"] + 2 * parts["patches"], {name: float(value.detach()) for name, value in parts.items()}

    def export(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            self.student.backbone.save_pretrained(partial)
            for name in ("model.safetensors", "config.json"):
                os.replace(Path(partial) / name, folder / name)
        write_tensors(folder / "patch_heads.safetensors", self.student.patch_heads.state_dict())

    def evaluate(self) -> dict[str, Any]:
        """Macro mean average precision of the names and mean IoU of the patches; FLOPs of a picture with both outputs,
        and parameters."""
        count, both = self.settings.test_scenes, Output(self.student, lambda model, x: model.both(x))
        return {
            "split": "test",
            "scenes": count,
            "names_mean_average_precision": average_precision(self.student, count),
            "patch_mean_iou": patch_mean_iou(Output(self.student, lambda model, x: model.both(x)[1]), count),
            "flops": flops_of_a_picture(both),
            "parameters": sum(weight.numel() for weight in self.student.parameters()),
        }
