"""Recipe for `hot`: a small MixSTE that lifts 2-D keypoints to 3-D, from scratch, on motion-capture clips.

The paper's loss. With `recovery="none"` and `keep` as many as `frames` it is the host alone; to compare with, frames
can be averaged instead of chosen.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.data.motion import Motions
from foveate.measure.flops import count_flops
from foveate.method import InputError, choice
from foveate.methods.reduce.hot import CONFIGURATIONS, Hot
from foveate.nn.matching import partners
from foveate.tokens import Tokens, take
from foveate.train.loop import Batch, Recipe, Settings, write_json, write_tensors
from foveate.train.sit_slim import save


@dataclasses.dataclass(frozen=True)
class HotSettings(Settings):
    """`config`: a name in `CONFIGURATIONS`; the others change it.

    Attributes:
        host, frames, keep, prune_layer, select, recovery: of `foveate.methods.reduce.hot.Hot`; "" and 0 for the
            configuration's.
        width, depth, heads: of the host; 0 for the configuration's.
        reducer: "" to choose frames, or one of `AVERAGES` instead.
        noise: of the keypoints, see `foveate.data.motion.Motions`.
        clips: a folder of clips, "" for those of the package `pybullet`.
    """

    steps: int = 3000
    batch: int = 8
    lr: float = 1e-3
    warmup: int = 100
    test_scenes: int = 400
    workers: int = 0
    config: str = "tiny"
    host: str = ""
    frames: int = 0
    keep: int = 0
    prune_layer: int = 0
    select: str = ""
    recovery: str = ""
    width: int = 0
    depth: int = 0
    heads: int = 0
    reducer: str = ""
    noise: float = 0.01
    clips: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config not in CONFIGURATIONS:
            raise InputError(f"config must be one of {', '.join(CONFIGURATIONS)}, not {self.config!r}")
        if self.reducer:
            choice("reducer", self.reducer, AVERAGES)


_CHANGES = ("host", "frames", "keep", "prune_layer", "select", "recovery", "width", "depth", "heads")
AVERAGES = ("pool", "merge")
"""Means of frames one after the other, and ToMe's matching on the mean over the joints, until f are left."""


class Averaged(Hot):
    """`Hot` with means of frames in place of frames that are chosen."""

    reducer = "pool"

    def shorten(self, x: Tensor, keypoints: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.reducer == "pool":
            middles = torch.arange(self.keep, device=x.device).add(0.5).mul(self.frames / self.keep).long()
            mean = F.adaptive_avg_pool1d(x.flatten(2).transpose(1, 2), self.keep).transpose(1, 2)
            return mean.unflatten(2, x.shape[2:]), middles.expand(len(x), -1)
        tokens = Tokens.from_grid(x.flatten(2), (1, self.frames))
        while (now := tokens.x.shape[1]) > self.keep:
            left = max(self.keep, now - now // 2)
            metric = self.lifter.pool(tokens.x.detach().unflatten(2, x.shape[2:]))
            tokens = tokens.merge(partners(metric, now - left, "place"), tokens.size, groups=left)
        frame = torch.arange(self.frames, device=x.device).expand_as(tokens.source)
        first = frame.new_full((len(x), self.keep), self.frames)
        first.scatter_reduce_(1, tokens.source, frame, "amin")
        return tokens.x.unflatten(2, x.shape[2:]), first


class _Objective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it."""

    def __init__(self, lifter: Hot) -> None:
        super().__init__()
        self.lifter = lifter

    def forward(self, keypoints: Tensor, poses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.lifter.loss(keypoints, poses)


class HotRecipe(Recipe):
    """See the module."""

    name = "hot"
    settings_type = HotSettings
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 2, "batch": 2, "warmup": 1, "width": 16, "depth": 2, "frames": 9, "keep": 3, "test_scenes": 4,
    }  # fmt: skip

    def __init__(self, settings: HotSettings, seed: int) -> None:
        self.settings = settings
        changes = {name: value for name in _CHANGES if (value := getattr(settings, name))}
        self.lifter: Hot = (Averaged if settings.reducer else Hot).named(settings.config, **changes)
        if isinstance(self.lifter, Averaged):
            if self.lifter.recovery != "attention":
                raise InputError("a reducer goes with recovery 'attention': what is averaged is of no one frame")
            self.lifter.reducer = settings.reducer
        self.channels: int = (CONFIGURATIONS[settings.config] | changes)["channels"]
        self.model: _Objective = _Objective(self.lifter)
        self.motions = self._motions("train", seed)

    def _motions(self, split: str, seed: int) -> Motions:
        settings = self.settings
        return Motions(split, seed, frames=self.lifter.frames, noise=settings.noise, folder=settings.clips or None)

    def _windows(self, motions: Motions, numbers: range) -> Batch:
        keypoints, poses = zip(*(motions[number] for number in numbers))
        made = [torch.stack([torch.from_numpy(one) for one in some]) for some in (keypoints, poses)]
        return {"keypoints": made[0][..., : self.channels], "poses": made[1]}

    def batch(self, step: int, rank: int, world: int) -> Batch:
        first = step * self.settings.batch
        return self._windows(self.motions, range(first + rank, first + self.settings.batch, world))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        loss, parts = model(**batch)
        return loss, {name: float(value.detach()) for name, value in parts.items()}

    def export(self, folder: Path) -> None:
        if self.settings.reducer:
            write_tensors(folder / "model.safetensors", self.lifter.state_dict())
            write_json(folder / "config.json", {"name": self.name, "reducer": self.settings.reducer})
            return
        save(self.lifter, folder)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Mean distances on the test split in mm: of all poses made, of the middle frame's, and of the change from one
        frame to the next (`velocity_mm`, of all F frames only); FLOPs and time of a clip."""
        motions, settings, lifter = self._motions("test", 0), self.settings, self.lifter
        device, spent = next(lifter.parameters()).device, 0.0
        errors: dict[str, list[Tensor]] = {"mpjpe_mm": [], "centre_mpjpe_mm": [], "mirrored_mpjpe_mm": []}
        if lifter.recovery != "none" or lifter.keep == lifter.frames:
            errors["velocity_mm"] = []
        with torch.random.fork_rng(devices=[]):
            # Ties are decided at random.
            torch.manual_seed(0)
            for first in range(0, settings.test_scenes, settings.batch):
                batch = self._windows(motions, range(first, min(first + settings.batch, settings.test_scenes)))
                keypoints, poses = (batch[name].to(device) for name in ("keypoints", "poses"))
                begun = time.monotonic()
                lifted = lifter.lift(keypoints)
                spent += time.monotonic() - begun
                wanted = take(poses.flatten(2), lifted.frames).unflatten(2, (17, 3))
                errors["mpjpe_mm"] += list(_distance(lifted.poses, wanted))
                middle = lifted.frames == lifter.centre
                errors["centre_mpjpe_mm"] += list((lifted.poses[middle] - poses[:, lifter.centre]).norm(dim=-1))
                errors["mirrored_mpjpe_mm"] += list(_distance(lifter.predict(keypoints).poses, wanted))
                if "velocity_mm" in errors:
                    errors["velocity_mm"] += list(_distance(lifted.poses.diff(dim=1), poses.diff(dim=1)))
        example = keypoints[:1]
        return {
            "split": "test", "windows": settings.test_scenes, "frames": lifter.frames, "kept": lifter.keep,
            "train_clips": list(self.motions.clips), "test_clips": list(motions.clips),
            **{name: 1000 * float(torch.stack([one.mean() for one in some]).mean()) for name, some in errors.items()},
            "flops": count_flops(lambda: lifter(example)), "milliseconds": 1000 * spent / settings.test_scenes,
        }  # fmt: skip


def _distance(made: Tensor, wanted: Tensor) -> Tensor:
    """(B, n, J) of two (B, n, J, 3)."""
    return (made - wanted).norm(dim=-1)
