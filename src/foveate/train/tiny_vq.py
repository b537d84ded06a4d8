"""Recipe for `tiny-vq`: pictures of 64 px as 16 x 16 codes, what `tiny-ar` generates.

The loss is the mean absolute error of the pixels and of the differences of neighbouring pixels, the distance of
tiny-vit's tokens (`foveate.measure.generation.Perceptual`, for pictures whose objects can still be named), and the
codebook's. Three quarters of the pictures are captioned scenes, the others crops of photographs; every step sees new
ones.

From the first step on, untrained latents would all get the same few codes, and the decoder would learn to ignore them.
So the first steps do without codes; then the codes are set to latents of a batch, and later those that no patch has
used for a while are set anew.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from foveate import zoo
from foveate.data.scenes import CaptionedScenes, Scenes, stacked
from foveate.measure.generation import Judge, Perceptual, Reconstruction, adherence
from foveate.method import InputError
from foveate.train.loop import Batch, Recipe, Settings
from foveate.train.tiny_vae import SIDE, save
from foveate.train.tiny_vit import normalised

REVIVE_EVERY = 25
"""Steps after which unused codes are set to other latents."""


@dataclasses.dataclass(frozen=True)
class TinyVqSettings(Settings):
    """Attributes:
    width: channels at full resolution, a multiple of 8.
    codes: number of codes.
    pitch: px from one code to the next, a power of two: what a code has to tell.
    free_steps: first steps, in which latents are decoded as they are.
    perceptual: weight of the distance of tiny-vit's tokens.
    """

    steps: int = 1500
    batch: int = 16
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.0
    test_scenes: int = 1000
    width: int = 16
    codes: int = 512
    pitch: int = 4
    free_steps: int = 200
    perceptual: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 8 or self.width % 8:
            raise InputError(f"width must be a multiple of 8, not {self.width}")
        if self.codes < 2:
            raise InputError(f"codes must be >= 2, not {self.codes}")
        if self.pitch not in (2, 4, 8, 16):
            raise InputError(f"pitch must be 2, 4, 8 or 16, not {self.pitch}")
        if self.free_steps < 0:
            raise InputError(f"free_steps must be >= 0, not {self.free_steps}")
        if not 0 <= self.perceptual < float("inf"):
            raise InputError(f"perceptual must be >= 0, not {self.perceptual}")


class VqObjective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it.

    Buffers: `calls` of `forward`, and `uses` (K,), how often each code was used since unused ones were last set. Under
    several processes both are the first's, and so are the latents that codes are set to: codes are the same in all.
    """

    calls: Tensor
    uses: Tensor

    def __init__(self, vq: Any, judge: Judge, free_steps: int) -> None:
        super().__init__()
        self.vq, self.perceptual, self.free_steps = vq, Perceptual(judge), free_steps
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("uses", torch.zeros(vq.config.num_vq_embeddings, dtype=torch.long))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        wanted = normalised(image)
        latents = self.vq.encode(wanted).latents
        coded = int(self.calls) - self.free_steps
        self.calls += 1
        if coded < 0:
            chosen, codebook = latents, 0 * self.vq.quantize.embedding.weight.sum()
        else:
            if coded % REVIVE_EVERY == 0:
                self.revive(latents)
            chosen, codebook, (_, _, indices) = self.vq.quantize(latents)
            self.uses += torch.bincount(indices, minlength=len(self.uses))
        made = self.vq.decode(chosen, force_not_quantize=True).sample
        error = made - wanted
        return {
            "pixels": error.abs().mean(),
            "edges": (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2,
            "perceptual": self.perceptual(made / 2 + 0.5, wanted / 2 + 0.5).mean(),
            "codebook": codebook,
        }

    @torch.no_grad()
    def revive(self, latents: Tensor) -> None:
        """Sets every code that was not used since the last time to one of the latents (B, D, h, w), drawn at random."""
        weight = self.vq.quantize.embedding.weight
        points = latents.movedim(1, -1).flatten(0, 2)
        drawn = points[torch.randint(len(points), (len(weight),), device=points.device)]
        weight.copy_(torch.where(self.uses[:, None] == 0, broadcast(drawn), weight))
        self.uses.zero_()


class TinyVq(Recipe):
    """See the module."""

    name = "tiny-vq"
    settings_type = TinyVqSettings
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 2, "batch": 4, "warmup": 1, "width": 8, "codes": 16, "pitch": 8, "free_steps": 1, "workers": 0,
        "test_scenes": 4,
    }  # fmt: skip

    @classmethod
    def prepare(cls, settings: Settings, seed: int, out: Path) -> Settings:
        zoo.need_diffusers()
        return settings

    def __init__(self, settings: TinyVqSettings, seed: int) -> None:
        from foveate.zoo.vq import build_vq

        self.settings = settings
        self.vq = build_vq(width=settings.width, codes=settings.codes, pitch=settings.pitch)
        self.model: VqObjective = VqObjective(self.vq, Judge(), settings.free_steps)
        self.scenes, self.crops = CaptionedScenes("train", seed, size=SIDE), crops("train", seed)

    def batch(self, step: int, rank: int, world: int) -> Batch:
        first = step * self.settings.batch
        numbers = range(first + rank, first + self.settings.batch, world)
        return {"image": stacked(self.crops[k] if k % 4 == 3 else self.scenes[k].scene for k in numbers)}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        parts: dict[str, Tensor] = model(batch["image"])
        weights = {"perceptual": self.settings.perceptual}
        total = torch.stack([weights.get(name, 1.0) * value for name, value in parts.items()]).sum()
        return total, {name: float(value.detach()) for name, value in parts.items()}

    def export(self, folder: Path) -> None:
        save(self.vq, folder)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """On the test split, whose photographs the training never saw: what decoding keeps of scenes and of crops of
        photographs, how well tiny-vit names the objects before and after, and how the codes are used."""
        from foveate.zoo.vq import decode, encode

        count, judge = self.settings.test_scenes, self.model.perceptual.judge
        captioned, photographs = CaptionedScenes("test", 0, size=SIDE), crops("test", 0)
        scenes = [captioned[k] for k in range(count)]
        captions = [one.caption for one in scenes]
        kinds = {
            "scenes": stacked(one.scene for one in scenes),
            "photographs": stacked(photographs[k] for k in range(count)),
        }
        about: dict[str, Any] = {"split": "test"}
        for kind, originals in kinds.items():
            codes = encode(self.vq, originals)
            decoded, kept = decode(self.vq, codes), Reconstruction(judge)
            for some, real in zip(decoded.split(100), originals.split(100)):
                kept.update(some, real.float() / 255)
            uses = torch.bincount(codes.ids.flatten(), minlength=codes.codebook_size).double()
            share = uses[uses > 0] / uses.sum()
            about[kind] = {
                **kept.compute(),
                "codes_used": len(share),
                "bits_per_code": float(-(share * share.log2()).sum()),
            }
            if kind == "scenes":
                about[kind]["adherence"] = adherence(judge, decoded, captions)
                about[kind]["adherence_of_originals"] = adherence(judge, originals, captions)
        return about


def crops(split: str, seed: int) -> Scenes:
    """Crops of the split's photographs, without objects."""
    return Scenes(split, seed, size=SIDE, objects=(0, 0))
