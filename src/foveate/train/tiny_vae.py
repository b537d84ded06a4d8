"""Recipe for `tiny-vae`: the autoencoder in whose latents `tiny-dit`, `tiny-dit-small` and `tiny-sd` diffuse.

The loss is the mean absolute error of the pixels, plus that of the differences of neighbouring pixels (what is lost
first are edges), plus a small Kullback-Leibler term to a unit normal, which keeps the latents smooth. Every step sees
new captioned scenes. Nothing adversarial and no other network: the decoder blurs rather than invents.
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

from foveate import zoo
from foveate.data.scenes import CaptionedScene, CaptionedScenes
from foveate.method import InputError
from foveate.train.loop import Batch, Recipe, Settings
from foveate.train.tiny_vit import normalised

SIDE = 64
"""px of a picture."""


@dataclasses.dataclass(frozen=True)
class TinyVaeSettings(Settings):
    """`width`: channels at full resolution, a multiple of 8. `kl`: weight of the Kullback-Leibler term (nats a latent
    value)."""

    steps: int = 2400
    batch: int = 16
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.01
    width: int = 16
    kl: float = 3e-4
    test_scenes: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 8 or self.width % 8:
            raise InputError(f"width must be a multiple of 8, not {self.width}")
        if not 0 <= self.kl < float("inf"):
            raise InputError(f"kl must be >= 0, not {self.kl}")


class _Objective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        wanted = normalised(image)
        posterior = self.vae.encode(wanted).latent_dist
        latents = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        error = self.vae.decode(latents).sample - wanted
        return {
            "pixels": error.abs().mean(),
            "edges": (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2,
            "kl": posterior.kl().sum() / posterior.mean.numel(),
        }


class TinyVae(Recipe):
    """See the module."""

    name = "tiny-vae"
    settings_type = TinyVaeSettings
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 2, "batch": 2, "warmup": 1, "width": 8, "workers": 0, "test_scenes": 4,
    }  # fmt: skip

    @classmethod
    def prepare(cls, settings: Settings, seed: int, out: Path) -> Settings:
        zoo.need_diffusers()
        return settings

    def __init__(self, settings: TinyVaeSettings, seed: int) -> None:
        from foveate.zoo.vae import build_vae

        self.settings = settings
        self.vae = build_vae(settings.width)
        self.model: _Objective = _Objective(self.vae)
        self.scenes = CaptionedScenes("train", seed, size=SIDE)

    def batch(self, step: int, rank: int, world: int) -> Batch:
        first = step * self.settings.batch
        return {"image": images([self.scenes[first + i] for i in range(rank, self.settings.batch, world)])}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        parts: dict[str, Tensor] = model(batch["image"])
        total = parts["pixels"] + parts["edges"] + self.settings.kl * parts["kl"]
        return total, {name: float(value.detach()) for name, value in parts.items()}

    def export(self, folder: Path) -> None:
        """Saves the autoencoder, its latents normalised on 256 pictures of the training split."""
        from foveate.zoo.vae import normalise_latents

        normalise_latents(self.vae, normalised(images([self.scenes[i] for i in range(256)])).to(self.vae.device))
        save(self.vae, folder)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """How well decoded means keep scenes of the test split, and how often the judge still finds what is named."""
        from foveate.measure.generation import Judge, Reconstruction, adherence
        from foveate.zoo.vae import encode

        judge = Judge()
        kept, decoded, captions, originals = Reconstruction(judge), [], [], []
        scenes, count = CaptionedScenes("test", 0, size=SIDE), self.settings.test_scenes
        for first in range(0, count, 50):
            some = [scenes[i] for i in range(first, min(first + 50, count))]
            pictures = self.vae.decode(encode(self.vae, images(some))).sample.cpu() / 2 + 0.5
            captions += [one.caption for one in some]
            originals.append(images(some))
            decoded.append((pictures.clamp(0, 1) * 255).round().byte())
            kept.update(decoded[-1], originals[-1])
        return {
            "split": "test",
            "reconstruction": kept.compute(),
            "adherence": adherence(judge, torch.cat(decoded), captions),
            "adherence_of_originals": adherence(judge, torch.cat(originals), captions),
        }


def images(scenes: list[CaptionedScene]) -> Tensor:
    """(n, 3, H, W) uint8."""
    return torch.from_numpy(np.stack([one.scene.image for one in scenes])).permute(0, 3, 1, 2).contiguous()


def save(model: Any, folder: Path) -> None:
    """`save_pretrained` (of a diffusers model or pipeline) into `folder`, each file under a temporary name first."""
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        model.save_pretrained(partial)
        for file in sorted(Path(partial).rglob("*")):
            if file.is_file():
                target = folder / file.relative_to(partial)
                target.parent.mkdir(exist_ok=True)
                os.replace(file, target)
