"""Recipes for `tiny-dit` and `tiny-dit-small`: Lumina-Next's transformer with flow matching, in two sizes.

With x the latents of a scene and n noise, the transformer sees s n + (1 - s) x at time 1 - s and predicts the velocity
x - n; s is drawn logit-normal, and the loss is the mean squared error (arXiv 2403.03206, sections 2 and 3.1). Large and
small share the latents and the text encoder, so that one prompt's embeddings serve both: tiny-dit trains the encoder
with it, tiny-dit-small takes it over as it is.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate import zoo
from foveate.method import InputError
from foveate.train.diffusion import (
    PATCHES,
    ZOO,
    DiffusionRecipe,
    DiffusionSettings,
    ObjectHead,
    watched,
    without_some,
)
from foveate.train.loop import Settings, train


@dataclasses.dataclass(frozen=True)
class TinyDitSettings(DiffusionSettings):
    """`layers`, `width`, `heads`: of the transformer."""

    steps: int = 6000
    layers: int = 7
    width: int = 144
    heads: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 2:
            raise InputError(f"layers must be >= 2, not {self.layers}")
        if self.heads < 1 or self.width < 4 or self.width % (4 * self.heads):
            raise InputError(f"width must be a multiple of 4 * heads, not {self.width} with {self.heads} heads")


@dataclasses.dataclass(frozen=True)
class TinyDitSmallSettings(TinyDitSettings):
    """`large`: folder of a trained tiny-dit, whose text encoder is taken; "zoo" or "" as for `vae`.

    Heads are as wide as tiny-dit's: positions, which the pipeline makes for these, then serve both.
    """

    layers: int = 4
    width: int = 72
    heads: int = 3
    large: str = ""


class _Objective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it."""

    positions: Tensor

    def __init__(self, pipeline: Any, drop: float) -> None:
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

        super().__init__()
        self.transformer, self.text_encoder = pipeline.transformer, pipeline.text_encoder
        self.tokenizer, self.drop = pipeline.tokenizer, drop
        self.head = ObjectHead(self.transformer.hidden_size)
        table = get_2d_rotary_pos_embed_lumina(self.transformer.head_dim, 384, 384)  # as in the pipeline
        self.register_buffer("positions", table[:PATCHES, :PATCHES].clone(), persistent=False)

    def forward(self, latents: Tensor, ids: Tensor, objects: Tensor) -> dict[str, Tensor]:
        ids = without_some(ids, self.tokenizer, self.drop)
        mask = ids != self.tokenizer.pad_token_id
        states = self.text_encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        noise = torch.randn_like(latents)
        share = torch.randn(len(latents), device=latents.device).sigmoid()
        noisy = torch.lerp(latents, noise, share[:, None, None, None])
        layers = self.transformer.layers
        found, middle = watched(
            layers[len(layers) // 2 - 1],
            lambda: (
                self.transformer(
                    hidden_states=noisy,
                    timestep=1 - share,
                    encoder_hidden_states=states,
                    encoder_mask=mask,
                    image_rotary_emb=self.positions,
                    cross_attention_kwargs={},
                ).sample
            ),
        )
        velocity = found[:, : latents.shape[1]]  # the rest would be a variance, which Lumina does not use
        return {"denoising": F.mse_loss(velocity, latents - noise), "objects": self.head.loss(middle, objects)}


class TinyDit(DiffusionRecipe):
    """See the module."""

    name = "tiny-dit"
    settings_type = TinyDitSettings
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 2, "batch": 4, "warmup": 1, "layers": 2, "width": 16, "heads": 2, "workers": 0, "pictures": 8,
        "test_scenes": 4, "inference_steps": 2,
    }  # fmt: skip

    def build_pipeline(self, vae: Any, tokenizer: Any) -> Any:
        from foveate.zoo.dit import build_dit, build_dit_pipeline

        settings = self.settings
        transformer = build_dit(layers=settings.layers, width=settings.width, heads=settings.heads)
        return build_dit_pipeline(transformer, vae, tokenizer, self.text_encoder())

    def build_objective(self) -> nn.Module:
        return _Objective(self.pipeline, self.settings.drop)

    def text_encoder(self) -> Any:
        """One to take over; None for a new one."""
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

    def text_encoder(self) -> Any:
        from transformers import GemmaModel

        folder = zoo.path("tiny-dit") if self.settings.large == ZOO else Path(self.settings.large)
        encoder = GemmaModel.from_pretrained(folder / "text_encoder", local_files_only=True)
        return encoder.eval().requires_grad_(False)
