"""Recipe for `ssm-prune`: a tiny Vision Mamba on scenes, dense first, then fine-tuned with pruned tokens.

It names a scene's objects with the class token and says what is under the patches that are left: binary cross entropy
of the 40 names, summed over them, plus twice the cross entropy of 41 classes of those patches. As in the paper the
fine-tuning has no other loss. Every step sees new scenes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.data.scenes import NAMES
from foveate.method import InputError
from foveate.methods.reduce.ssm_prune import SsmPrune, Stages
from foveate.train.fine_tune import FineTune, FineTuneSettings, average_precision, flops_of_a_picture
from foveate.train.loop import Batch, write_tensors
from foveate.train.sit_slim import save
from foveate.train.tiny_vit import normalised

HEAD = "patch_head.safetensors"
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"keep": 1.0},
    **{align: {"align": align} for align in ("decay", "copy", "none")},
}
"""Rules of the final evaluation, all with the same weights."""


@dataclasses.dataclass(frozen=True)
class SsmPruneSettings(FineTuneSettings):
    """`config`: a name in `CONFIGURATIONS`; `keep`, `align`, `score`: see `foveate.methods.reduce.ssm_prune.SsmPrune`.

    Attributes:
        finetune_steps: how many of the `steps`, the last, prune tokens.
        weights: folder of a model that this recipe wrote, to start from.
    """

    steps: int = 900
    lr: float = 2e-3
    warmup: int = 50
    config: str = "tiny"
    keep: float = 0.8
    align: str = "decay"
    score: str = "clip"
    finetune_steps: int = 200
    weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.finetune_steps <= self.steps:
            raise InputError(f"finetune_steps must be 0..{self.steps}, not {self.finetune_steps}")
        if self.weights and not (Path(self.weights) / HEAD).is_file():
            raise InputError(f"weights: {self.weights} has no {HEAD}; name a folder that `foveate train` wrote")


class _Objective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it."""

    def __init__(self, student: SsmPrune, settings: SsmPruneSettings) -> None:
        super().__init__()
        self.student, self.settings = student, settings
        self.patch_head = nn.Linear(student.norm_f.weight.shape[0], 1 + len(NAMES))

    def forward(self, step: Tensor, image: Tensor, present: Tensor, labels: Tensor) -> dict[str, Tensor]:
        pruned = int(step) >= self.settings.steps - self.settings.finetune_steps
        stages = self.student.set_pruning(keep=self.settings.keep if pruned else 1.0).stages(normalised(image))
        tokens = self.student.norm_f(stages.x)
        names = F.binary_cross_entropy_with_logits(self.student.forward_head(tokens), present.float(), reduction="none")
        patches, under = on_patches(tokens, stages, labels)
        return {
            "names": names.sum(1).mean(),
            "patches": F.cross_entropy(self.patch_head(patches).flatten(0, 1), under.flatten()),
        }


def on_patches(tokens: Tensor, stages: Stages, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The kept tokens (B, K - 1, C) of ViM without its class token, and what is under them (B, K - 1), of all patches'
    labels (B, N - 1)."""
    own, middle = tokens.shape[1] // 2, stages.counts[0] // 2
    place = torch.cat([stages.positions[-1][:, :own], stages.positions[-1][:, own + 1 :]], 1)
    number = place - (place > middle).long()
    return torch.cat([tokens[:, :own], tokens[:, own + 1 :]], 1), labels.gather(1, number)


class SsmPruneRecipe(FineTune):
    """See the module."""

    name = "ssm-prune"
    settings_type = SsmPruneSettings
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 3, "batch": 2, "warmup": 1, "finetune_steps": 1, "workers": 0, "test_scenes": 6,
    }  # fmt: skip

    def __init__(self, settings: SsmPruneSettings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        rule = {"keep": settings.keep, "align": settings.align, "score": settings.score}
        self.student: SsmPrune = SsmPrune.named(settings.config, **rule)
        if self.student.family != "vim" or self.student.grid != (12, 12) or self.student.classes != len(NAMES):
            raise InputError(f"config must be a ViM for scenes: 12 x 12 patches, {len(NAMES)} classes")
        self.model: _Objective = _Objective(self.student, settings)
        if settings.weights:
            missing = self.student.load_backbone(SsmPrune.from_pretrained(settings.weights).state_dict())
            if missing:
                raise InputError(f"{settings.weights} has another shape: it lacks {', '.join(missing[:3])}")
            self.model.patch_head.load_state_dict(load_file(Path(settings.weights) / HEAD))

    def batch(self, step: int, rank: int, world: int) -> Batch:
        made = super().batch(step, rank, world)
        return {"step": torch.tensor(step), **{name: made[name] for name in ("image", "present", "labels")}}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        parts: dict[str, Tensor] = model(**batch)
        return parts["names"] + 2 * parts["patches"], {name: float(value.detach()) for name, value in parts.items()}

    def export(self, folder: Path) -> None:
        self.student.set_pruning(keep=self.settings.keep)
        save(self.student, folder)
        write_tensors(folder / HEAD, self.model.patch_head.state_dict())

    def evaluate(self) -> dict[str, Any]:
        """Macro mean average precision of the names and FLOPs of a picture, for each of `VARIANTS`."""
        count, settings, found = self.settings.test_scenes, self.settings, {}
        for name, rule in VARIANTS.items():
            self.student.set_pruning(**({"keep": settings.keep, "align": settings.align} | rule))
            found[name] = {
                "names_mean_average_precision": average_precision(self.student, count),
                "flops": flops_of_a_picture(self.student),
            }
        self.student.set_pruning(keep=settings.keep, align=settings.align)
        return {"split": "test", "scenes": count, "by_rule": found}
