"""Recipe for `dtop`: which object is under every patch of a scene, from the zoo's tiny-vit, with tokens that finish.

First the base model, whose tokens all go to the end, then the paper's fine-tuning with early exits. Heads learn at
`head_rate` times the backbone's rate (the paper: 10). Heads are linear by default; the
paper's ATM heads are `head="atm"`.
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
from foveate.measure.flops import flop_counter
from foveate.method import InputError, within
from foveate.methods.reduce.dtop import Dtop
from foveate.train.loop import Batch, Recipe, Settings, write_json
from foveate.train.tiny_vit import normalised, scene_batch

CLASSES = ("background", *NAMES)
VARIANTS: tuple[tuple[float, int], ...] = ((1.0, 5), (0.95, 5), (0.9, 5), (0.9, 0), (0.7, 5), (0.7, 0))
"""(confidence, context) of the final evaluation, all with the same weights."""


@dataclasses.dataclass(frozen=True)
class DtopSettings(Settings):
    """`confidence`, `context`, `head`, `width`: see `foveate.methods.reduce.dtop.Dtop`.

    Attributes:
        finetune_steps: how many of the `steps`, the last, have early exits.
        head_rate: learning rate of the heads in multiples of `lr`.
    """

    steps: int = 700
    batch: int = 32
    lr: float = 1e-4
    warmup: int = 50
    weight_decay: float = 0.01
    test_scenes: int = 500
    confidence: float = 0.9
    context: int = 5
    head: str = "linear"
    width: int = 64
    finetune_steps: int = 200
    head_rate: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.finetune_steps <= self.steps:
            raise InputError(f"finetune_steps must be 0..{self.steps}, not {self.finetune_steps}")
        within("head_rate", self.head_rate, "(0, inf)")


class _Objective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it."""

    def __init__(self, segmenter: Dtop, settings: DtopSettings) -> None:
        super().__init__()
        self.segmenter, self.settings = segmenter, settings

    def forward(self, step: Tensor, image: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        exits = int(step) >= self.settings.steps - self.settings.finetune_steps
        self.segmenter.set_exits(confidence=self.settings.confidence if exits else 1.0)
        return self.segmenter.loss(normalised(image), labels)


class DtopRecipe(Recipe):
    """See the module."""

    name = "dtop"
    settings_type = DtopSettings
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 3, "batch": 2, "warmup": 1, "finetune_steps": 1, "width": 16, "workers": 0, "test_scenes": 4,
    }  # fmt: skip

    def __init__(self, settings: DtopSettings, seed: int) -> None:
        self.settings = settings
        self.segmenter = Dtop.named(
            "tiny", confidence=settings.confidence, context=settings.context, head=settings.head, width=settings.width
        )
        missing = self.segmenter.load_backbone(zoo.load("tiny-vit"))
        if missing:
            raise InputError(f"the zoo's tiny-vit has another shape: it lacks {', '.join(missing[:3])}")
        self.model: _Objective = _Objective(self.segmenter, settings)
        self.scenes = Scenes("train", seed)

    def rate(self, name: str) -> float:
        return self.settings.head_rate if name.startswith("segmenter.decoders.") else 1.0

    def batch(self, step: int, rank: int, world: int) -> Batch:
        first = step * self.settings.batch
        made = scene_batch([self.scenes[first + i] for i in range(rank, self.settings.batch, world)])
        side = self.segmenter.backbone.patch_embed.grid_size
        return {"step": torch.tensor(step), "image": made["image"], "labels": made["labels"].unflatten(1, side)}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        loss, parts = model(**batch)
        return loss, {name: float(value.detach()) for name, value in parts.items()}

    def export(self, folder: Path) -> None:
        self.segmenter.set_exits(confidence=self.settings.confidence, context=self.settings.context)
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            self.segmenter.save_pretrained(partial)
            for name in ("model.safetensors", "config.json"):
                os.replace(Path(partial) / name, folder / name)
        write_json(folder / "labels.json", list(CLASSES))

    def evaluate(self) -> dict[str, Any]:
        """`evaluate` for each of `VARIANTS`."""
        figures = []
        for confidence, context in VARIANTS:
            self.segmenter.set_exits(confidence=confidence, context=context)
            figures.append({"confidence": confidence, "context": context, **evaluate(self.segmenter, self.settings)})
        self.segmenter.set_exits(confidence=self.settings.confidence, context=self.settings.context)
        return {"split": "test", "scenes": self.settings.test_scenes, "by_exit": figures}


@torch.inference_mode()
def evaluate(segmenter: Dtop, settings: Settings) -> dict[str, Any]:
    """On the first `settings.test_scenes` test scenes: mean IoU of the patches' 41 classes (torchmetrics), the share of
    tokens at each head, and FLOPs of a picture, heads included."""
    try:
        from torchmetrics.classification import MulticlassJaccardIndex
    except ImportError:
        raise InputError("evaluating dtop needs torchmetrics: pip install 'foveate[metrics]'") from None
    iou, scenes, count = MulticlassJaccardIndex(len(CLASSES), average=None), Scenes("test", 0), settings.test_scenes
    device, stages = next(segmenter.parameters()).device, len(segmenter.exits)
    finished, flops = torch.zeros(stages, dtype=torch.long), 0
    for first in range(0, count, settings.batch):
        made = scene_batch([scenes[i] for i in range(first, min(first + settings.batch, count))])
        pictures = normalised(made["image"].to(device))
        with flop_counter() as counter:
            said = segmenter.stages(pictures)
        flops += counter.get_total_flops()
        iou.update(segmenter.patch_scores(said).argmax(1).flatten(1).cpu(), made["labels"])
        finished += said.finished.cpu().flatten().bincount(minlength=stages)
    # Classes that are neither there nor found have no figure.
    counts = iou.confmat
    there = counts.sum(0) + counts.sum(1) > 0
    by_class = iou.compute()[there]
    reached = finished.flip(0).cumsum(0).flip(0) / finished.sum()
    return {
        "mean_iou": float(by_class.mean()),
        "mean_iou_without_background": float(by_class[1:].mean()),
        "patch_accuracy": float(counts.diag().sum() / counts.sum()),
        "tokens_at_each_head": [round(float(one), 4) for one in reached],
        "flops_per_picture": flops / count,
    }
