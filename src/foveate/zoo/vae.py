"""The zoo's `tiny-vae`, in whose latents its diffusion models work, and how its folder is loaded."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor


def build_vae(width: int = 16) -> AutoencoderKL:
    """An untrained autoencoder: a picture (B, 3, H, W) in -1..1 becomes latents (B, 4, H / 4, W / 4).

    `width` is the number of channels at full resolution, a multiple of 8; it doubles with each halving. There is no
    attention. Latents need neither scale nor shift to be what a denoiser reads: see `normalise_latents`.
    """
    channels = (width, 2 * width, 4 * width)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Gives every latent channel mean 0 and variance 1 on `pictures` (B, 3, H, W), without a change of what is decoded.

    The change is folded into the 1 x 1 convolutions on both sides of the latents, so that Stable Diffusion's one scale
    and Stable Diffusion 3's scale and shift can stay 1 and 0.
    """
    latents = vae.encode(pictures).latent_dist.mean
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels, into, back = len(mean), vae.quant_conv, vae.post_quant_conv
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.weight[:channels] /= std[:, None, None, None]
    into.bias[channels:] -= 2 * std.log()  # log variances
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= std[:, None, None]


@torch.no_grad()
def encode(vae: Any, pictures: Tensor, *, batch: int = 50) -> Tensor:
    """(n, 3, H, W) uint8 -> (n, 4, H / 4, W / 4) float: the means, in latents as a denoiser reads them."""
    found = []
    for some in pictures.split(batch):
        means = vae.encode(some.to(vae.device).float() / 127.5 - 1).latent_dist.mean
        found.append((means - vae.config.shift_factor) * vae.config.scaling_factor)
    return torch.cat(found)
