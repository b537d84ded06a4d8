"""Recipe for `tiny-sd`: a Stable Diffusion with a small UNet, its text encoder trained with it.

The UNet predicts the noise (arXiv 2006.11239). Its squared error is weighted by min(SNR, 5) / SNR (arXiv 2303.09556,
section 3.4): the steps at little noise, where there is least to learn about what lies where, would otherwise hold back
the others.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.method import InputError
from foveate.train.diffusion import (
    DiffusionRecipe,
    DiffusionSettings,
    ObjectHead,
    watched,
    without_some,
)

_GREATEST_SNR = 5.0


@dataclasses.dataclass(frozen=True)
class TinySdSettings(DiffusionSettings):
    """`width`: of the UNet at 16 x 16, a multiple of 8; `heads`: of its attention; `text_width`: of the text
    encoder, a multiple of 4."""

    steps: int = 5000
    width: int = 32
    heads: int = 4
    text_width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1 or self.width < 8 or self.width % 8 or self.width % self.heads:
            raise InputError(f"width must be a multiple of 8 and of heads, not {self.width} with {self.heads} heads")
        if self.text_width < 4 or self.text_width % 4:
            raise InputError(f"text_width must be a multiple of 4, not {self.text_width}")


class _Objective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it."""

    def __init__(self, pipeline: Any, drop: float) -> None:
        super().__init__()
        self.unet, self.text_encoder = pipeline.unet, pipeline.text_encoder
        self.tokenizer, self.scheduler, self.drop = pipeline.tokenizer, pipeline.scheduler, drop
        self.head = ObjectHead(self.unet.config.block_out_channels[-1])

    def forward(self, latents: Tensor, ids: Tensor, objects: Tensor) -> dict[str, Tensor]:
        from diffusers.training_utils import compute_snr

        states = self.text_encoder(without_some(ids, self.tokenizer, self.drop)).last_hidden_state
        noise = torch.randn_like(latents)
        steps: int = self.scheduler.config.num_train_timesteps
        time = torch.randint(steps, (len(latents),), device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, time)
        found, middle = watched(self.unet.mid_block, lambda: self.unet(noisy, time, states).sample)
        snr = compute_snr(self.scheduler, time)
        error = (found - noise).square().mean((1, 2, 3))
        return {
            "denoising": (error * snr.clamp(max=_GREATEST_SNR) / snr).mean(),
            "objects": self.head.loss(middle.flatten(2).transpose(1, 2), objects),
        }


class TinySd(DiffusionRecipe):
    """See the module."""

    name = "tiny-sd"
    settings_type = TinySdSettings
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 2, "batch": 4, "warmup": 1, "width": 8, "heads": 2, "text_width": 16, "workers": 0, "pictures": 8,
        "test_scenes": 4, "inference_steps": 2,
    }  # fmt: skip

    def build_pipeline(self, vae: Any, tokenizer: Any) -> Any:
        from foveate.zoo.sd import build_sd_pipeline, build_unet

        settings = self.settings
        unet = build_unet(width=settings.width, heads=settings.heads, text_width=settings.text_width)
        return build_sd_pipeline(unet, vae, tokenizer)

    def build_objective(self) -> nn.Module:
        return _Objective(self.pipeline, self.settings.drop)
