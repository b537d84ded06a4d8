"""Tiny pipelines of diffusers with random weights, built from their classes; prompts are embeddings, made up here."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from torch import Tensor

PIPELINES = ("sd", "sd3", "pixart", "dit", "lumina", "lumina2")
TEXT = {"sd": (7, 16), "sd3": (7, 32), "pixart": (7, 16), "lumina": (7, 16), "lumina2": (7, 16)}
"""(length, width) of a prompt's embedding."""
SIDE = 8
"""Rows and columns of the latents by default, and of the pictures: the autoencoder has one level."""


def pipeline(name: str = "sd", scheduler: Any = None, seed: int = 0, **config: Any) -> Any:
    """A pipeline in evaluation mode; `config` changes the denoiser's, `scheduler` is a class of diffusers."""
    torch.manual_seed(seed)
    channels = 16 if name in ("sd3", "lumina2") else 4
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=1, latent_channels=channels, layers_per_block=1
    )
    cls = scheduler or DEFAULT[name]
    # Pipelines correct the configurations of older schedulers, with a warning.
    config_of_old = {"steps_offset": 1, "clip_sample": False, "skip_prk_steps": True}
    sampler = cls(**{key: value for key, value in config_of_old.items() if key in inspect.signature(cls).parameters})
    torch.manual_seed(seed)
    denoiser = _denoiser(name, config)
    # Some classes begin with zeros or with what was in memory; and attention has to be peaked to tell anything.
    with torch.no_grad():
        for key, weight in denoiser.named_parameters():
            if weight.ndim > 1:
                gain = 2.0 if any(part in key for part in ("to_q", "to_k", "add_q_proj", "add_k_proj")) else 0.8
                weight.copy_(torch.randn(weight.shape) * gain / weight[0].numel() ** 0.5)
            else:
                weight.copy_(torch.randn(weight.shape) * 0.1 + float(key.endswith(("weight", "gate"))))
    parts: dict[str, Any] = {"vae": vae, "scheduler": sampler}
    if name == "sd":
        parts |= {"unet": denoiser, "text_encoder": None, "tokenizer": None}
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        made: Any = diffusers.StableDiffusionPipeline(**parts)
    elif name == "sd3":
        parts |= {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
        made = diffusers.StableDiffusion3Pipeline(transformer=denoiser, **parts)
    elif name == "dit":
        made = diffusers.DiTPipeline(transformer=denoiser, **parts)
    else:
        classes = {"pixart": diffusers.PixArtAlphaPipeline, "lumina": diffusers.LuminaPipeline}
        made = classes.get(name, diffusers.Lumina2Pipeline)(
            transformer=denoiser, text_encoder=None, tokenizer=None, **parts
        )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


DEFAULT: dict[str, Any] = {
    "sd": diffusers.DDIMScheduler, "pixart": diffusers.DDIMScheduler, "dit": diffusers.DDIMScheduler,
    "sd3": diffusers.FlowMatchEulerDiscreteScheduler, "lumina": diffusers.FlowMatchEulerDiscreteScheduler,
    "lumina2": diffusers.FlowMatchEulerDiscreteScheduler,
}  # fmt: skip


def _denoiser(name: str, config: dict[str, Any]) -> Any:
    if name == "sd":
        # attention_head_dim is the number of heads.
        given: dict[str, Any] = {
            "sample_size": SIDE, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2,
            "cross_attention_dim": 16, "attention_head_dim": 2,
        }  # fmt: skip
        return diffusers.UNet2DConditionModel(**{**given, **config}).eval()
    heads = {"num_attention_heads": 2, "num_layers": 2, "patch_size": 2, "sample_size": SIDE}
    if name == "sd3":
        given = {**heads, "attention_head_dim": 8, "in_channels": 16, "out_channels": 16, "joint_attention_dim": 32}
        given |= {"caption_projection_dim": 16, "pooled_projection_dim": 8, "pos_embed_max_size": 16}
        return diffusers.SD3Transformer2DModel(**{**given, **config}).eval()
    if name == "pixart":
        given = {**heads, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 16}
        given |= {"caption_channels": 16, "norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000}
        return diffusers.PixArtTransformer2DModel(**{**given, **config}).eval()
    if name == "dit":
        given = {**heads, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 1000}
        return diffusers.DiTTransformer2DModel(**{**given, **config}).eval()
    if name == "lumina":
        given = {**heads, "hidden_size": 32, "num_kv_heads": 2, "multiple_of": 16, "cross_attention_dim": 16}
        return diffusers.LuminaNextDiT2DModel(**{**given, **config}).eval()
    given = {
        **heads,
        "hidden_size": 32,
        "num_kv_heads": 2,
        "multiple_of": 16,
        "cap_feat_dim": 16,
        "num_refiner_layers": 1,
    }
    given |= {"axes_dim_rope": (8, 4, 4), "in_channels": 16}
    return diffusers.Lumina2Transformer2DModel(**{**given, **config}).eval()


def denoiser(pipe: Any) -> Any:
    """The pipeline's UNet or transformer."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def embedding(name: str, prompts: int, seed: int) -> Tensor:
    """(prompts, length, width) of a made-up prompt."""
    return _drawn(prompts, TEXT[name], seed)


def pooled(prompts: int, seed: int) -> Tensor:
    """(prompts, 8) of made-up prompts, which Stable Diffusion 3 takes besides."""
    return _drawn(prompts, (8,), seed)


def _drawn(prompts: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """(prompts, *shape), the same for a prompt whichever follow it."""
    generators = (torch.Generator().manual_seed(100 * seed + number) for number in range(prompts))
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def noise(pipe: Any, pictures: int, height: int = SIDE, width: int = SIDE, seed: int = 5) -> Tensor:
    """(pictures, C, h, w)"""
    channels = denoiser(pipe).config.in_channels
    return torch.randn(pictures, channels, height, width, generator=torch.Generator().manual_seed(seed))


def sample(
    name: str, pipe: Any, prompts: int = 1, steps: int = 3, guidance: float = 4.0, height: int = SIDE,
    width: int = SIDE, dtype: torch.dtype = torch.float32, **given: Any,
) -> Tensor:  # fmt: skip
    """(pictures, C, h, w) latents that a run ends with; pictures, for DiT. Prompts differ, seeds do not."""
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(5)
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generator}
    if name == "dit":
        out: Tensor = pipe(class_labels=list(range(prompts)), output_type="pt", **settings, **given).images
        return out
    settings |= {"prompt_embeds": embedding(name, prompts, 1)}
    settings |= {
        "height": height * pipe.vae_scale_factor,
        "width": width * pipe.vae_scale_factor,
        "output_type": "latent",
    }
    settings["negative_prompt_embeds"] = embedding(name, prompts, 2)
    if name == "sd3":
        settings["pooled_prompt_embeds"] = pooled(prompts, 3)
        settings["negative_pooled_prompt_embeds"] = pooled(prompts, 4)
    elif name != "sd":
        mask = torch.ones(prompts, TEXT[name][0], dtype=torch.long)
        settings |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    if name == "pixart":
        settings |= {"use_resolution_binning": False, "negative_prompt": None}
    settings = {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in settings.items()
    }
    images: Tensor = pipe(**{**settings, **given}).images
    return images
