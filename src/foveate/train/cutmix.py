"""Recipe for `cutmix`: a small vision transformer that names the object of a scene, from few pictures.

Every epoch sees the same `pictures` scenes, so that there is something to overfit to; `augment` says what is done
against it: nothing, Cutout, mixup or CutMix, with everything else equal. Beside the accuracy on new scenes, `evaluate`
tells how well the class's activation map finds the object, which the model was never shown.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from foveate.data.scenes import NAMES
from foveate.method import InputError
from foveate.methods.learn.cutmix import CutMix
from foveate.train.loop import Batch, Recipe, Settings, write_json, write_tensors
from foveate.train.recognition import (
    accuracy_and_calibration,
    drawn,
    localisation,
    logits_of,
    single_objects,
    vision_transformer,
)
from foveate.train.tiny_vit import normalised

AUGMENTATIONS = ("cutmix", "mixup", "cutout", "none")


@dataclasses.dataclass(frozen=True)
class CutMixSettings(Settings):
    """`width`, `depth`, `heads`: of the transformer; pictures have 96 px and patches 8 px.

    Attributes:
        pictures: how many scenes there are to learn from, each seen again and again.
        augment: one of `AUGMENTATIONS`. Cutout is a square of half the side, set to the mean (torchvision's
            RandomErasing, so that it lies within the picture).
        alpha: of CutMix or mixup.
        probability: share of the steps that are augmented.
        patch: see `foveate.methods.learn.cutmix.CutMix`.
    """

    steps: int = 1600
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 100
    workers: int = 0
    pictures: int = 2000
    augment: str = "cutmix"
    alpha: float = 1.0
    probability: float = 0.5
    patch: int = 1
    width: int = 96
    depth: int = 4
    heads: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augment not in AUGMENTATIONS:
            raise InputError(f"augment must be one of {', '.join(AUGMENTATIONS)}, not {self.augment!r}")
        if self.pictures < 1:
            raise InputError(f"pictures must be >= 1, not {self.pictures}")


class _Objective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it."""

    def __init__(self, tower: Any, settings: CutMixSettings) -> None:
        super().__init__()
        self.tower, self.augment = tower, settings.augment
        self.mix = CutMix(
            num_classes=len(NAMES), probability=settings.probability, patch=settings.patch,
            alpha=settings.alpha if settings.augment == "cutmix" else 0.0,
            mixup=settings.alpha if settings.augment == "mixup" else 0.0,
        )  # fmt: skip
        self.erase = v2.RandomErasing(p=settings.probability, scale=(0.25, 0.25), ratio=(1.0, 1.0))

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        pixels, weights = self.mix(normalised(image), label)
        if self.augment == "cutout":
            pixels = torch.stack([self.erase(one) for one in pixels])
        return F.cross_entropy(self.tower(pixels), weights)


class CutMixRecipe(Recipe):
    """See the module."""

    name = "cutmix"
    settings_type = CutMixSettings
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 2, "batch": 4, "warmup": 1, "width": 16, "depth": 2, "heads": 2, "pictures": 6, "test_scenes": 8,
    }  # fmt: skip

    def __init__(self, settings: CutMixSettings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.tower = vision_transformer(
            settings.width, settings.depth, settings.heads, class_token=False, global_pool="avg", fc_norm=False
        )
        self.model = _Objective(self.tower, settings)
        self.pictures = single_objects("train", seed, settings.pictures)

    def batch(self, step: int, rank: int, world: int) -> Batch:
        numbers = drawn(self.settings.pictures, self.seed, step, self.settings.batch)[rank::world]
        return {name: self.pictures[name][numbers] for name in ("image", "label")}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        return model(**batch), {}

    def export(self, folder: Path) -> None:
        write_tensors(folder / "model.safetensors", self.tower.state_dict())
        settings = self.settings
        write_json(
            folder / "config.json",
            {"name": self.name, "width": settings.width, "depth": settings.depth, "heads": settings.heads,
             "labels": list(NAMES)},
        )  # fmt: skip

    def evaluate(self) -> dict[str, Any]:
        """Accuracy, calibration and localisation on the test split."""
        count = self.settings.test_scenes
        device = next(self.tower.parameters()).device
        validation, test = (
            {name: value.to(device) for name, value in single_objects(split, 0, some).items()}
            for split, some in (("validation", min(count, 500)), ("test", count))
        )
        logits, label = logits_of(self.tower, test["image"]), test["label"].cpu()
        validation["box"], test["box"] = validation["box"].cpu(), test["box"].cpu()
        return {
            "split": "test",
            "pictures": count,
            **accuracy_and_calibration(logits, label),
            **localisation(self.tower, validation, test, logits.argmax(1) == label),
        }
