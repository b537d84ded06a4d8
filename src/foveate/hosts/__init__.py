"""Adapters: one a model family, on the family's official extension points; no code of a model is copied."""

from __future__ import annotations

from typing import Any

from foveate.hosts.host import Host
from foveate.method import InputError, did_you_mean

SUPPORTED: dict[str, str] = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    "InternVLForConditionalGeneration": "internvl",
    "Qwen2VLForConditionalGeneration": "qwen_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen_vl",
    "ViTModel": "vision",
    "ViTForImageClassification": "vision",
    "CLIPVisionModel": "vision",
    "CLIPVisionModelWithProjection": "vision",
    "CLIPForImageClassification": "vision",
    "CLIPModel": "vision",
    "SiglipVisionModel": "vision",
    "SiglipForImageClassification": "vision",
    "SiglipModel": "vision",
    "Dinov2Model": "vision",
    "Dinov2ForImageClassification": "vision",
    "Dinov2WithRegistersModel": "vision",
    "Dinov2WithRegistersForImageClassification": "vision",
    "VideoMAEModel": "vision",
    "VideoMAEForVideoClassification": "vision",
    "VisionTransformer": "vision",
    "VisionTransformerDistilled": "vision",
    "DiffusionPipeline": "diffusion",
}
"""class name -> module of its adapter."""


def adapt(model: Any) -> Host:
    """The adapter for a model or a pipeline of diffusers. InputError for a class that has none."""
    # A subclass that adds a head or a loss is still the model that it derives from.
    name = next((base.__name__ for base in type(model).__mro__ if base.__name__ in SUPPORTED), None)
    if name is None:
        name = type(model).__name__
        raise InputError(f"no adapter for {name}; {did_you_mean(name, SUPPORTED)}")
    # Imported here: an adapter of one family must not make the others' packages necessary.
    if SUPPORTED[name] == "llava":
        from foveate.hosts.llava import LlavaHost

        return LlavaHost(model)
    if SUPPORTED[name] == "llava_onevision":
        from foveate.hosts.llava_onevision import LlavaOnevisionHost

        return LlavaOnevisionHost(model)
    if SUPPORTED[name] == "internvl":
        from foveate.hosts.internvl import InternVLHost

        return InternVLHost(model)
    if SUPPORTED[name] == "qwen_vl":
        from foveate.hosts.qwen_vl import QwenVLHost

        return QwenVLHost(model)
    if SUPPORTED[name] == "diffusion":
        from foveate.hosts.diffusion import DiffusionHost

        return DiffusionHost(model)
    from foveate.hosts.vision import VisionHost

    return VisionHost(model)


__all__ = ["SUPPORTED", "Host", "adapt"]
