"""The zoo's `tiny-vq`, which turns pictures into a grid of codes and back: a diffusers `VQModel`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor

from foveate.method import InputError
from foveate.nn.codes import Codes


def build_vq(*, width: int = 16, codes: int = 512, pitch: int = 4) -> VQModel:
    """An untrained model: a picture (B, 3, H, W) in -1..1 becomes a grid of codes, 8 numbers each.

    `width` is the number of channels at full resolution, a multiple of 8; it doubles with each halving. `pitch` is the
    number of px from one code to the next, a power of two.
    """
    levels = pitch.bit_length()
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(width * 2**level for level in range(levels)),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        num_vq_embeddings=codes,
        vq_embed_dim=8,
    )


def pitch_of(vq: Any) -> int:
    """Pixels from one code to the next."""
    return 2 ** (len(vq.config.block_out_channels) - 1)


@torch.no_grad()
def encode(vq: Any, pictures: Tensor, *, batch: int = 100) -> Codes:
    """The codes of pictures (n, 3, H, W), in 0..1 or uint8; sides must be multiples of the grid's pitch."""
    pitch = pitch_of(vq)
    height, width = pictures.shape[2:]
    if height % pitch or width % pitch:
        raise InputError(f"sides of pictures must be multiples of {pitch} px, not {height} x {width}")
    found = []
    for some in pictures.split(batch):
        values = some.float() / 255 if some.dtype == torch.uint8 else some
        indices = vq.quantize(vq.encode(2 * values.to(vq.device) - 1).latents)[2][2]
        found.append(indices.view(len(some), -1).cpu())
    return Codes(torch.cat(found), vq.config.num_vq_embeddings, (height, width), (height // pitch, width // pitch))


@torch.no_grad()
def decode(vq: Any, codes: Codes, *, batch: int = 100) -> Tensor:
    """(n, 3, H, W) pictures in 0..1."""
    if len(codes.grid) != 2 or codes.codebook_size != vq.config.num_vq_embeddings:
        raise InputError(
            f"{codes.codebook_size} codes in a grid of {codes.grid} were not made by this model, which has "
            f"{vq.config.num_vq_embeddings} codes in two dimensions"
        )
    found = []
    for ids in codes.ids.split(batch):
        shape = (len(ids), *codes.grid, vq.config.vq_embed_dim)
        latents = vq.quantize.get_codebook_entry(ids.flatten().to(vq.device), shape)
        found.append(vq.decode(latents, force_not_quantize=True).sample.cpu())
    return (torch.cat(found) / 2 + 0.5).clamp(0, 1)
