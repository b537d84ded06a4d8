"""Building the zoo's `tiny-sd`: a `StableDiffusionPipeline` with a small UNet.

Everything is a stock class of diffusers or transformers, so the saved folder loads with
`StableDiffusionPipeline.from_pretrained` without any code of this project. Noise schedule and prediction (of the noise)
are Stable Diffusion 1's; there is no safety checker.
"""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from foveate.zoo.text import build_clip


def build_unet(*, width: int, heads: int, text_width: int) -> UNet2DConditionModel:
    """An untrained UNet of latents (B, 4, 16, 16) with cross-attention at 16 x 16 (`width` channels) and at 8 x 8
    (twice as many): two calls of it on the way down, one in the middle, four on the way up."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=text_width,
        attention_head_dim=heads,  # of this class: the number of heads
        norm_num_groups=8,
    )


def build_sd_pipeline(unet: UNet2DConditionModel, vae: Any, tokenizer: Any) -> StableDiffusionPipeline:
    """The pipeline of these parts and an untrained text encoder."""
    width: int = unet.config["cross_attention_dim"]
    return StableDiffusionPipeline(
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        vae=vae,
        text_encoder=build_clip(tokenizer, width=width),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
