"""Building the zoo's `tiny-dit` and `tiny-dit-small`: a `StableDiffusion3Pipeline` with a small transformer.

Everything is a stock class of diffusers or transformers, so the saved folder loads with
`StableDiffusion3Pipeline.from_pretrained` without any code of this project. There is no T5: as in Stable Diffusion 3
without its third text encoder, zeros stand in its place.
"""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from foveate.zoo.text import build_text_encoder

TEXT_WIDTH = 64
"""Width of each of the two text encoders."""


def build_dit(*, layers: int, width: int, heads: int) -> SD3Transformer2DModel:
    """An untrained transformer of latents (B, 4, 16, 16), 8 x 8 patches; its position table reaches to 16 x 16."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=16,
    )


def build_dit_pipeline(
    transformer: SD3Transformer2DModel, vae: Any, tokenizer: Any, text_encoders: tuple[Any, Any] | None = None
) -> StableDiffusion3Pipeline:
    """The pipeline of these parts; without `text_encoders` it gets two untrained ones."""
    first, second = text_encoders or (
        build_text_encoder(tokenizer, width=TEXT_WIDTH, projection=True) for _ in range(2)
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
