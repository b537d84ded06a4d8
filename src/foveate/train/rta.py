"""Recipe for `rta`: a vision transformer that names the object of a scene, also where the picture is corrupted.

tiny-vit's weights are fine-tuned on clean scenes alone, with token-aware pooling before each attention and the
attention diversification loss; `scales=0` and `weight=0.0` leave them out. The corruptions of the test are never seen
in training.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from foveate import zoo
from foveate.data.corruptions import CORRUPTIONS, STRENGTHS, corrupted
from foveate.data.scenes import NAMES
from foveate.method import InputError
from foveate.methods.image.rta import Rta
from foveate.train.loop import Batch, Recipe, Settings, write_json
from foveate.train.recognition import drawn, logits_of, single_objects
from foveate.train.tiny_vit import normalised

BACKBONE = "vit_base_patch16_clip_quickgelu_224"
"""timm's model of tiny-vit's form; the sizes are options."""
_CALIBRATION = 20
"""Batches from which the running statistics of the pooling's batch norm are taken."""


@dataclasses.dataclass(frozen=True)
class RtaSettings(Settings):
    """`scales`, `threshold`, `weight`: see `foveate.methods.image.rta.Rta`.

    Attributes:
        pictures: how many scenes there are to learn from.
        start: "tiny-vit" for its weights, or "scratch".
        width, depth, heads: of the transformer; from scratch only.
        probes: test pictures that attention is compared on, clean and with noise.
    """

    steps: int = 800
    batch: int = 48
    lr: float = 3e-4
    warmup: int = 80
    workers: int = 0
    test_scenes: int = 500
    pictures: int = 4000
    start: str = "tiny-vit"
    scales: int = 4
    threshold: float = 2.0
    weight: float = 1.0
    width: int = 128
    depth: int = 5
    heads: int = 4
    probes: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in ("tiny-vit", "scratch"):
            raise InputError(f"start must be tiny-vit or scratch, not {self.start!r}")
        for name in ("pictures", "probes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, not {getattr(self, name)}")


class _Objective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it."""

    def __init__(self, rta: Rta) -> None:
        super().__init__()
        self.rta = rta

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.rta.weight == 0:
            task = F.cross_entropy(self.rta(normalised(image)), label)
            return task, {"task": task}
        logits, maps = self.rta.attend(normalised(image))
        return self.rta.loss(logits, maps, label)


class RtaRecipe(Recipe):
    """See the module."""

    name = "rta"
    settings_type = RtaSettings
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 2, "batch": 4, "warmup": 1, "start": "scratch", "width": 16, "depth": 2, "heads": 2, "pictures": 6,
        "test_scenes": 2, "probes": 2,
    }  # fmt: skip

    def __init__(self, settings: RtaSettings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        options = {
            "img_size": 96, "patch_size": 8, "embed_dim": settings.width, "depth": settings.depth,
            "num_heads": settings.heads, "num_classes": len(NAMES), "norm_layer": "layernorm",
        }  # fmt: skip
        self.rta = Rta(
            backbone=BACKBONE, scales=settings.scales, threshold=settings.threshold, weight=settings.weight,
            options=options,
        )  # fmt: skip
        if settings.start == "tiny-vit":
            self.rta.load_backbone(zoo.load("tiny-vit"))
        self.model = _Objective(self.rta.train())
        self.pictures = single_objects("train", seed, settings.pictures)

    def batch(self, step: int, rank: int, world: int) -> Batch:
        numbers = drawn(self.settings.pictures, self.seed, step, self.settings.batch)[rank::world]
        return {name: self.pictures[name][numbers] for name in ("image", "label")}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        loss, parts = model(**batch)
        return loss, {name: float(value.detach()) for name, value in parts.items()}

    def export(self, folder: Path) -> None:
        # Checkpoints hold weights only. Taken anew, these statistics are a function of them, after a resume too.
        batches = [self.batch(step, 0, 1)["image"] for step in range(_CALIBRATION)]
        device = next(self.rta.parameters()).device
        update_bn([normalised(one) for one in batches], self.rta, device)
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            self.rta.save_pretrained(partial)
            for name in ("model.safetensors", "config.json"):
                os.replace(Path(partial) / name, folder / name)
        write_json(folder / "labels.json", list(NAMES))

    def evaluate(self) -> dict[str, Any]:
        """Errors on clean and corrupted pictures of the test split, and how attention differs."""
        settings, device = self.settings, next(self.rta.parameters()).device
        test = single_objects("test", 0, settings.test_scenes)
        image, label = test["image"], test["label"]

        def error(images: Tensor) -> float:
            return float((logits_of(self.rta, images.to(device)).argmax(1) != label).float().mean())

        errors = {
            corruption: [error(corrupt_all(image, corruption, strength)) for strength in STRENGTHS]
            for corruption in CORRUPTIONS
        }
        probes = image[: settings.probes]
        return {
            "split": "test",
            "pictures": settings.test_scenes,
            "clean_error": error(image),
            "corruption_error": errors,
            "mean_corruption_error": float(np.mean(list(errors.values()))),
            **attention_figures(self.rta, probes.to(device), corrupt_all(probes, "gaussian_noise", 3).to(device)),
        }


def corrupt_all(images: Tensor, corruption: str, strength: int) -> Tensor:
    """Pictures (n, 3, H, W) uint8 with a corruption, each with random numbers of its own."""
    made = [
        corrupted(one.permute(1, 2, 0).numpy(), corruption, strength, seed=number) for number, one in enumerate(images)
    ]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)


@torch.no_grad()
def attention_figures(rta: Rta, clean: Tensor, noisy: Tensor) -> dict[str, float]:
    """Mean over layers and queries, with heads averaged: the cosine of two different rows of the clean pictures'
    attention ("row_similarity"), and of the same row of the clean and the noisy picture ("row_stability")."""
    similar, stable = [], []
    for some, other in zip(clean.split(20), noisy.split(20)):
        for one, two in zip(rta.attend(normalised(some))[1], rta.attend(normalised(other))[1]):
            rows, disturbed = F.normalize(one.mean(1), dim=-1), F.normalize(two.mean(1), dim=-1)
            count = rows.shape[1]
            # All pairs at once: the squared length of the sum, less the pairs of a row with itself.
            pairs = rows.sum(1).square().sum(-1) - count
            similar.append(pairs / (count * (count - 1)))
            stable.append((rows * disturbed).sum(-1).mean(1))
    return {
        "row_similarity": float(torch.cat(similar).mean()),
        "row_stability": float(torch.cat(stable).mean()),
    }
