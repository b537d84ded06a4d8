"""Recipes for `tiny-dit` and `tiny-dit-small`: Stable Diffusion 3's transformer with flow matching, in two sizes.

With x the latents of a scene and n noise, the transformer sees (1 - s) x + s n at time 1000 s and predicts the velocity
n - x; s is drawn logit-normal, and the loss is the mean squared error (arXiv 2403.03206, sections 2 and 3). Large and
small share the latents and the text encoders, so that one prompt's embeddings serve both: tiny-dit trains the encoders
with it, tiny-dit-small takes them over as they are.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from foveate import zoo
from foveate.method import InputError
from foveate.train.diffusion import (
    ZOO,
    DiffusionRecipe,
    DiffusionSettings,
    ObjectHead,
    build_tokenizer,
    load_vae,
    watched,
    without_some,
)
from foveate.train.loop import Settings, train


@dataclasses.dataclass(frozen=True)
class TinyDitSettings(DiffusionSettings):
    """`layers`, `width`, `heads`: of the transformer."""

    steps: int = 4500
    layers: int = 6
    width: int = 144
    heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 2:
            raise InputError(f"layers must be >= 2, not {self.layers}")
        if self.heads < 1 or self.width < 4 or self.width % (4 * self.heads):
            raise InputError(f"width must be a multiple of 4 * heads, not {self.width} with {self.heads} heads")


@dataclasses.dataclass(frozen=True)
class TinyDitSmallSettings(TinyDitSettings):
    """`large`: folder of a trained tiny-dit, whose text encoders are taken; "zoo" or "" as for `vae`."""

    steps: int = 6000
    layers: int = 4
    width: int = 80
    large: str = ""


class _Objective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it."""

    def __init__(self, pipeline: Any, drop: float) -> None:
        super().__init__()
        self.transformer = pipeline.transformer
        self.text_encoders = nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2])
        self.tokenizer, self.drop = pipeline.tokenizer, drop
        self.head = ObjectHead(self.transformer.inner_dim)

    def embeddings(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) ids -> what the pipeline makes of a prompt: (B, 2 L, D) states, zeros for T5's, and (B, D) pooled."""
        found = [encoder(ids, output_hidden_states=True) for encoder in self.text_encoders]
        states = torch.cat([one.hidden_states[-2] for one in found], dim=-1)
        pooled = torch.cat([one.text_embeds for one in found], dim=-1)
        return torch.cat([states, torch.zeros_like(states)], dim=1), pooled

    def forward(self, latents: Tensor, ids: Tensor, objects: Tensor) -> dict[str, Tensor]:
        states, pooled = self.embeddings(without_some(ids, self.tokenizer, self.drop))
        noise = torch.randn_like(latents)
        time = torch.randn(len(latents), device=latents.device).sigmoid()
        share = time[:, None, None, None]
        blocks = self.transformer.transformer_blocks
        found, (_, middle) = watched(
            blocks[len(blocks) // 2 - 1],
            lambda: (
                self.transformer(
                    hidden_states=(1 - share) * latents + share * noise,
                    timestep=1000 * time,
                    encoder_hidden_states=states,
                    pooled_projections=pooled,
                ).sample
            ),
        )
        return {"denoising": F.mse_loss(found, noise - latents), "objects": self.head.loss(middle, objects)}


class TinyDit(DiffusionRecipe):
    """See the module."""

    name = "tiny-dit"
    settings_type = TinyDitSettings
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 2, "batch": 4, "warmup": 1, "layers": 2, "width": 16, "heads": 2, "workers": 0, "pictures": 8,
        "test_scenes": 4, "inference_steps": 2,
    }  # fmt: skip

    def __init__(self, settings: TinyDitSettings, seed: int) -> None:
        from foveate.zoo.dit import build_dit, build_dit_pipeline

        self.settings, self.seed = settings, seed
        self.data = load_file(settings.latents)
        transformer = build_dit(layers=settings.layers, width=settings.width, heads=settings.heads)
        self.pipeline = build_dit_pipeline(transformer, load_vae(settings.vae), build_tokenizer(), self.encoders())
        self.model = _Objective(self.pipeline, settings.drop)

    def encoders(self) -> tuple[Any, Any] | None:
        """Text encoders to take over; None for new ones."""
        return None


class TinyDitSmall(TinyDit):
    """See the module."""

    name = "tiny-dit-small"
    settings_type = TinyDitSmallSettings

    @classmethod
    def prepare(cls, settings: Settings, seed: int, out: Path) -> Settings:
        """As for tiny-dit; and finds the large one, or trains it into `out`/large."""
        assert isinstance(settings, TinyDitSmallSettings)
        settings = cast(TinyDitSmallSettings, super().prepare(settings, seed, out))
        if settings.large not in ("", ZOO):
            if not (Path(settings.large) / "model_index.json").is_file():
                raise InputError(f"large: there is no model_index.json in {settings.large}")
            return settings
        if "tiny-dit" in zoo.names():
            return dataclasses.replace(settings, large=ZOO)
        if not (out / "large" / "metrics.json").is_file():
            quick = TinyDit.smoke if settings.steps <= cls.smoke["steps"] else {}
            shared: dict[str, Any] = {name: getattr(settings, name) for name in ("vae", "latents", "pictures")}
            train(TinyDit, out=out / "large", seed=seed, **(quick | shared))
        return dataclasses.replace(settings, large=str(out / "large"))

    def encoders(self) -> tuple[Any, Any]:
        from transformers import CLIPTextModelWithProjection

        folder = zoo.path("tiny-dit") if self.settings.large == ZOO else Path(self.settings.large)
        first, second = (
            CLIPTextModelWithProjection.from_pretrained(folder / part, local_files_only=True).requires_grad_(False)
            for part in ("text_encoder", "text_encoder_2")
        )
        return first, second
