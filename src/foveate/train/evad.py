"""Recipe for `evad`: the action detector on clips of `foveate.data.scenes`, seen from everywhere but one keyframe.

The paper's loss, with two changes because nothing here is pre-trained: one learning rate for all parts, and the loop's
cosine; a third, `guide`, if asked for. The paper trains one model for each way to drop tokens, with that dropout. So
that one set of weights can show them all, every step uses the next of `VARIANTS` (ours), unless told otherwise: what is
compared was then seen equally often in training.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.data.ava import ActionSample, collate, from_clip
from foveate.data.scenes import ACTIONS, Clip, Clips
from foveate.measure.detection import box_average_precision, frame_map
from foveate.method import InputError
from foveate.methods.video.evad import Evad
from foveate.methods.video.evad_detector import CONFIGURATIONS, Encoded, EvadDetector, normalised
from foveate.train.loop import Batch, Recipe, Settings, write_json
from foveate.zoo.detector import load_detector

VARIANTS: tuple[dict[str, Any], ...] = (
    {"keep": 1.0},
    *(
        {"keep": keep} | change
        for change in ({}, {"select": "random"}, {"protect_keyframe": False})
        for keep in (0.7, 0.5)
    ),
)  # fmt: skip
"""Ways to drop tokens, as arguments of `foveate.methods.video.evad.Evad`: none, the paper's, and its ablations'."""


@dataclasses.dataclass(frozen=True)
class EvadSettings(Settings):
    """`config`: a name in `CONFIGURATIONS`; the others change it.

    Attributes:
        size: side of the clips in px, a multiple of twice the patch.
        frames, stride: the model sees `frames` frames, every `stride`-th of a clip.
        hidden, layers, heads: of the encoder; 0 for the configuration's.
        keep, select, protect_keyframe: of the dropout, see `foveate.methods.video.evad.Evad`.
        vary: whether each step of training uses the next of `VARIANTS` instead.
        start: folder of a trained detector whose weights and size of positions are the first; with clips of another
            size or number of frames, too.
        head_rate: learning rate of heads and decoder in multiples of `lr` (the paper, fine-tuning: 8).
        guide: weight of a term (ours) by which tokens that show an actor are to receive the attention of the layers
            that drop, see `guidance`.
        frame_only: whether all frames are the keyframe, in training and in evaluation: a model that sees no motion, to
            compare with.
    """

    steps: int = 5000
    batch: int = 16
    lr: float = 5e-4
    warmup: int = 300
    weight_decay: float = 1e-4
    test_scenes: int = 500
    config: str = "tiny"
    size: int = 64
    frames: int = 8
    stride: int = 2
    hidden: int = 0
    layers: int = 0
    heads: int = 0
    keep: float = 0.7
    select: str = "attention"
    protect_keyframe: bool = True
    vary: bool = True
    start: str = ""
    head_rate: float = 1.0
    guide: float = 0.0
    frame_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config not in CONFIGURATIONS:
            raise InputError(f"config must be one of {', '.join(CONFIGURATIONS)}, not {self.config!r}")
        if self.head_rate <= 0:
            raise InputError(f"head_rate must be > 0, not {self.head_rate}")
        if self.guide < 0:
            raise InputError(f"guide must be >= 0, not {self.guide}")


class _Objective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it."""

    def __init__(self, detector: EvadDetector, vary: bool, guide: float) -> None:
        super().__init__()
        self.detector, self.vary, self.guide = detector, vary, guide
        self.dropout: Evad = detector.dropout

    def forward(
        self, step: Tensor, clip: Tensor, size: Tensor, boxes: Tensor, labels: Tensor, present: Tensor,
        shown: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        change = VARIANTS[int(step) % len(VARIANTS)] if self.vary else {}
        self.detector.set_dropout(**(self.dropout.hyperparameters() | change))
        found = self.detector(normalised(clip), size, shown is not None)
        loss, parts = self.detector.loss(found, boxes, labels, present)
        if shown is not None:
            parts["guide"] = guidance(found.encoded, shown, self.detector.dropout.protect_keyframe)
            loss = loss + self.guide * parts["guide"]
        return loss, parts


class EvadRecipe(Recipe):
    """See the module."""

    name = "evad"
    settings_type = EvadSettings
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 2, "batch": 2, "warmup": 1, "size": 48, "hidden": 16, "layers": 4, "heads": 2, "workers": 0,
        "test_scenes": 6,
    }  # fmt: skip

    def __init__(self, settings: EvadSettings, seed: int) -> None:
        self.settings = settings
        changes: dict[str, Any] = {"image": settings.size, "frames": settings.frames, "classes": len(ACTIONS)}
        changes |= {name: getattr(settings, name) for name in ("keep", "select", "protect_keyframe")}
        changes |= {name: value for name in ("hidden", "layers", "heads") if (value := getattr(settings, name))}
        if settings.layers:
            changes["levels"] = tuple(settings.layers * (k + 1) // 4 - 1 for k in range(4))
            changes["drops"] = (0.25, 0.5, 0.75)
        start = load_detector(settings.start) if settings.start else None
        if start is not None:
            # As from pre-training to fine-tuning: what is learnt goes with its positions, which are resized.
            changes["image"] = start.backbone.config.image_size
        self.detector = EvadDetector.named(settings.config, **changes).train()
        if start is not None:
            try:
                self.detector.load_state_dict(start.state_dict())
            except RuntimeError:
                raise InputError(f"start: the detector in {settings.start} has another shape") from None
        if settings.size % (2 * self.detector.patch):
            raise InputError(f"size must be a multiple of {2 * self.detector.patch}, not {settings.size}")
        self.model: _Objective = _Objective(self.detector, settings.vary, settings.guide)
        self.clips = self._clips("train", seed)

    def _clips(self, split: str, seed: int) -> Clips:
        settings = self.settings
        return Clips(split, seed, frames=settings.frames * settings.stride, size=settings.size)

    def rate(self, name: str) -> float:
        return self.settings.head_rate if self.detector.fast(name.removeprefix("detector.")) else 1.0

    def batch(self, step: int, rank: int, world: int) -> Batch:
        first = step * self.settings.batch
        numbers = range(first + rank, first + self.settings.batch, world)
        clips = [self.clips[number] for number in numbers]
        batch = {"step": torch.tensor(step), **collate([sample_of(clip, self.settings) for clip in clips])}
        if self.settings.guide:
            tubelet, patch = self.detector.tubelet, self.detector.patch
            batch["shown"] = torch.stack([shows_actor(clip, self.settings, tubelet, patch) for clip in clips])
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        loss, parts = model(**batch)
        return loss, {name: float(value.detach()) for name, value in parts.items()}

    def export(self, folder: Path) -> None:
        self.detector.dropout = self.model.dropout
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            self.detector.save_pretrained(partial)
            for name in ("model.safetensors", "config.json"):
                os.replace(Path(partial) / name, folder / name)
        write_json(folder / "labels.json", list(ACTIONS))

    def evaluate(self) -> dict[str, Any]:
        """Frame mAP at 0.5 on the test split, and the average precision of the boxes, for each of `VARIANTS`."""
        figures = []
        for variant in VARIANTS:
            self.detector.set_dropout(**(self.model.dropout.hyperparameters() | variant))
            figures.append({"dropout": variant, **evaluate(self.detector, self._clips("test", 0), self.settings)})
        self.detector.dropout = self.model.dropout
        return {"split": "test", "clips": self.settings.test_scenes, "by_dropout": figures}


def sample_of(clip: Clip, settings: EvadSettings) -> ActionSample:
    """What the model sees of a clip, and who does what in its keyframe."""
    sample = from_clip(clip, settings.stride)
    if not settings.frame_only:
        return sample
    frames = sample.clip.shape[1]
    return dataclasses.replace(sample, clip=sample.clip[:, [frames // 2] * frames])


def shows_actor(clip: Clip, settings: EvadSettings, tubelet: int, patch: int) -> Tensor:
    """(N,) bool: which of the clip's tokens, in time order, show a pixel of an actor."""
    owner = torch.from_numpy(clip.owner[clip.keyframe % settings.stride :: settings.stride])
    if settings.frame_only:
        owner = owner[[len(owner) // 2] * len(owner)]
    blocks = (owner >= 0).unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).unflatten(0, (-1, tubelet))
    return blocks.any(5).any(3).any(1).flatten()


def guidance(encoded: Encoded, shown: Tensor, protected: bool) -> Tensor:
    """How far the attention that tokens receive is from attention to actors: a mean over the layers that score tokens.

    Of each clip, the divergence of the scores, as shares, from equal shares of all tokens that show an actor, those in
    `shown` (B, N) bool; tokens that stay in any case, the keyframe's where it is `protected`, are left out. Encoders
    that were pre-trained on actions need nothing of this kind; without, attention prefers slots to actors.
    """
    frame = encoded.grid[1] * encoded.grid[2]
    losses = []
    for index, score in encoded.received:
        counts = index >= frame if protected else torch.ones_like(index, dtype=torch.bool)
        wanted = (shown.gather(1, encoded.order[index]) & counts).float()
        score = score * counts
        # Of nothing but the keyframe, nothing is asked.
        share = score / score.sum(1, keepdim=True).clamp(min=torch.finfo(score.dtype).tiny)
        wanted = wanted / wanted.sum(1, keepdim=True).clamp(min=1)
        losses.append(F.kl_div(share.clamp(min=1e-9).log(), wanted, reduction="batchmean"))
    return torch.stack(losses).mean()


@torch.no_grad()
def evaluate(detector: EvadDetector, clips: Clips, settings: EvadSettings) -> dict[str, Any]:
    """Figures on the first `settings.test_scenes` of `clips`; every proposal counts, ranked by person x action score.

    The paper leaves proposals below 0.7 out and does not multiply; with a small model that would make the figure hang
    on how its person score is calibrated.
    """
    device = next(detector.parameters()).device
    training = detector.training
    detector.eval()
    found, persons, truth = [], [], []
    for first in range(0, settings.test_scenes, settings.batch):
        numbers = range(first, min(first + settings.batch, settings.test_scenes))
        samples = [sample_of(clips[number], settings) for number in numbers]
        batch = collate(samples)
        pixels, size = normalised(batch["clip"].to(device)), batch["size"].to(device)
        for sample, one in zip(samples, detector.detect(pixels, size, threshold=0.0)):
            boxes, score = one.boxes.cpu(), one.score.cpu()
            found.append((boxes, one.actions.cpu() * score.unsqueeze(1)))
            persons.append((boxes, score))
            truth.append((sample.boxes, sample.labels))
    detector.train(training)
    return {
        **frame_map(found, truth, ACTIONS),
        "box_average_precision": box_average_precision(persons, [boxes for boxes, _ in truth]),
    }
