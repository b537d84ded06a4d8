"""Building the zoo's `tiny-dit` and `tiny-dit-small`: a `LuminaPipeline` (Lumina-Next) with a small transformer.

Everything is a stock class of diffusers or transformers, so the saved folder loads with diffusers' `from_pretrained`
without any code of this project. LuminaPipeline takes any autoencoder to divide sides by 8, and this one divides them
by 4: `height` and `width`, where given, are twice those of the picture.
"""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, LuminaNextDiT2DModel, LuminaPipeline
from torch import nn

from foveate.zoo.text import build_gemma

TEXT_WIDTH = 64


def build_dit(*, layers: int, width: int, heads: int) -> LuminaNextDiT2DModel:
    """An untrained transformer of latents (B, 4, 16, 16), 8 x 8 tokens; it predicts 0 at first."""
    model = LuminaNextDiT2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=width,
        num_layers=layers,
        num_attention_heads=heads,
        num_kv_heads=heads,
        multiple_of=16,
        cross_attention_dim=TEXT_WIDTH,
    )
    nn.init.zeros_(model.pad_token).requires_grad_(False)  # its forward has no use for it
    nn.init.zeros_(model.norm_out.linear_2.weight)
    nn.init.zeros_(model.norm_out.linear_2.bias)
    return model


def build_dit_pipeline(
    transformer: LuminaNextDiT2DModel, vae: Any, tokenizer: Any, text_encoder: Any = None
) -> LuminaPipeline:
    """The pipeline of these parts; without `text_encoder` it gets an untrained one."""
    return LuminaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=build_gemma(tokenizer, width=TEXT_WIDTH) if text_encoder is None else text_encoder,
        tokenizer=tokenizer,
    )
