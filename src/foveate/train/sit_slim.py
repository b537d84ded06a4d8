"""Recipe for `sit-slim`: tiny-vit with its tokens slimmed between stages, taught by tiny-vit block by block.

`reducer` puts something else in the slimming's place, with the same numbers of tokens, the same loss and the same
training: what a comparison needs.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate import zoo
from foveate.method import InputError
from foveate.methods.reduce.sit_slim import FeatureRecalibration, SitSlim
from foveate.nn.matching import partners
from foveate.tokens import Tokens, take, topk_in_order
from foveate.train.fine_tune import FineTune, FineTuneSettings
from foveate.train.loop import Batch, write_json, write_tensors
from foveate.train.tiny_vit import normalised


@dataclasses.dataclass(frozen=True)
class SitSlimSettings(FineTuneSettings):
    """Of the student and the loss.

    Attributes:
        stages: blocks in each stage, 5 in all.
        keep: share of the tokens that each stage's end leaves.
        reducer: one of `REDUCERS`.
        token_weight, logit_weight, temperature: see `foveate.methods.reduce.sit_slim.FeatureRecalibration`.
        reverse_rate: learning rate of the reverse modules in multiples of `lr`.
    """

    stages: tuple[int, ...] = (2, 1, 1, 1)
    keep: float = 0.5
    reducer: str = "slim"
    token_weight: float = 2.0
    logit_weight: float = 2.0
    temperature: float = 1.0
    reverse_rate: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reducer not in REDUCERS:
            raise InputError(f"reducer must be one of {', '.join(REDUCERS)}, not {self.reducer!r}")
        if not 0 < self.reverse_rate < math.inf:
            raise InputError(f"reverse_rate must be a number > 0, not {self.reverse_rate}")


class TopK(nn.Module):
    """The tokens (B, N, C) with the highest learned scores, in their order: (B, count, C).

    Values are as they were; scores learn as if each token were multiplied with its own (straight through).
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count, self.norm, self.score = count, nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(self.norm(x)).sigmoid()
        return take(x * (1 + score - score.detach()), topk_in_order(score.detach().squeeze(2), self.count))


class Drawn(nn.Module):
    """Tokens drawn once, the same for all pictures."""

    def __init__(self, before: int, count: int) -> None:
        super().__init__()
        self.index = torch.randperm(before, generator=torch.Generator().manual_seed(before))[:count].sort().values

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index.to(x.device))


class Pooled(nn.Module):
    """Averages over the cells of a coarser grid of exactly as many cells."""

    def __init__(self, grid: tuple[int, int], coarse: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.coarse = grid, coarse

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, self.grid), self.coarse).flatten(2).transpose(1, 2)


class Merged(nn.Module):
    """ToMe's matching on the tokens themselves, until `count` are left; a plain mean of what is merged."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        while (now := x.shape[1]) > self.count:
            left = max(self.count, now - now // 2)
            into = partners(x.detach(), now - left, "sets")
            x = Tokens.from_grid(x, (1, now)).merge(into, groups=left).x
        return x


REDUCERS = ("slim", "topk", "random", "pool", "merge")


def with_reducer(student: SitSlim, reducer: str) -> SitSlim:
    """The student with one of `REDUCERS` in place of each slimming; the same object."""
    width, grid = student.backbone.embed_dim, student.backbone.patch_embed.grid_size
    counts = student.left(student.patches, student.keep, len(student.stage_blocks))
    for number, (before, count) in enumerate(zip(counts, counts[1:] if len(student.slimming) else ())):
        if reducer == "topk":
            student.slimming[number] = TopK(width, count)
        elif reducer == "random":
            student.slimming[number] = Drawn(before, count)
        elif reducer == "pool":
            coarse = cells(grid, count)
            student.slimming[number], grid = Pooled(grid, coarse), coarse
        elif reducer == "merge":
            student.slimming[number] = Merged(count)
    return student


def cells(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """Rows and columns of `count` cells, as near to squares as can be, no finer than `grid`."""
    fitting = [
        (rows, count // rows) for rows in range(1, grid[0] + 1) if count % rows == 0 and count // rows <= grid[1]
    ]
    if not fitting:
        raise InputError(f"no coarser grid than {grid[0]} x {grid[1]} has {count} cells; choose another keep")
    return min(fitting, key=lambda one: abs(math.log(one[0] * grid[1] / (one[1] * grid[0]))))


class SitSlimRecipe(FineTune):
    """See the module."""

    name = "sit-slim"
    settings_type = SitSlimSettings
    smoke: ClassVar[dict[str, Any]] = {"steps": 2, "batch": 2, "warmup": 1, "workers": 0, "test_scenes": 8}

    def __init__(self, settings: SitSlimSettings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        teacher = zoo.load("tiny-vit")
        self.student: SitSlim = with_reducer(
            SitSlim.named("tiny", stage_blocks=settings.stages, keep=settings.keep), settings.reducer
        )
        self.student.load_backbone(teacher)
        self.model = FeatureRecalibration(
            self.student, teacher, token_weight=settings.token_weight, logit_weight=settings.logit_weight,
            temperature=settings.temperature, labels="multiple",
        )  # fmt: skip

    def rate(self, name: str) -> float:
        return self.settings.reverse_rate if name.startswith("reverse.") else 1.0

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        loss, parts = model(normalised(batch["image"]), batch["present"].float())
        return loss, {name: float(value.detach()) for name, value in parts.items()}

    def export(self, folder: Path) -> None:
        """The student, without the reverse modules; one with another reducer is no `SitSlim` to load."""
        if self.settings.reducer != "slim":
            write_tensors(folder / "model.safetensors", self.student.state_dict())
            write_json(folder / "config.json", {"name": self.name, "reducer": self.settings.reducer})
            return
        save(self.student, folder)


def save(model: Any, folder: Path) -> None:
    """`save_pretrained` under a temporary name first."""
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        model.save_pretrained(partial)
        for name in ("model.safetensors", "config.json"):
            os.replace(Path(partial) / name, folder / name)
