"""Exact shapes of published models as data, built on the meta device: counting needs no weights and no memory.

```python
architecture("llava-1.5-7b").build_meta()               # 7,063,427,072 parameters, none of them in memory
model, inputs = architecture("llava-1.5-7b").twin()     # the same depth and tokens, 16 wide: runs in a second
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from foveate.method import InputError, did_you_mean

_TWIN_WIDTH = 16
_TWIN_HEADS = 2
_TWIN_PATCH = 2
_PLACEHOLDER = 1
"""The twin's id of the image token; text ids come after it."""
_TWIN_VOCABULARY = 32


@dataclass(frozen=True)
class Architecture:
    """The shape of one published model.

    Attributes:
        name: how it is asked for.
        model, config: names of the classes in transformers.
        parameters: of the published checkpoint.
        source: which checkpoint that is.
        vision: arguments of the vision encoder's config (of the model's own, for a model without language model).
        vision_config: name of its class.
        text: arguments of the language model's config; empty for a vision model.
        text_config: name of its class.
        settings: other arguments of the model's config.
        crop_grid: (rows, columns) of visual tokens of one crop or frame at the language model's entry.
        residual_adds: how many of a layer's two residual additions the authors of AIM count on this model.
    """

    name: str
    model: str
    config: str
    parameters: int
    source: str
    vision: Mapping[str, Any]
    vision_config: str = ""
    text: Mapping[str, Any] = field(default_factory=dict)
    text_config: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    crop_grid: tuple[int, int] = (24, 24)
    residual_adds: int = 2

    def build_meta(self) -> Any:
        """The transformers model with exact shapes on the meta device, in evaluation mode."""
        config = getattr(transformers, self.config)
        if not self.text:
            return self._on_meta(config(**self.vision))
        return self._on_meta(
            config(
                vision_config=getattr(transformers, self.vision_config)(**self.vision),
                text_config=getattr(transformers, self.text_config)(**self.text),
                **self.settings,
            )
        )

    def _on_meta(self, config: Any) -> Any:
        with torch.device("meta"):
            return getattr(transformers, self.model)(config).eval()

    @property
    def language(self) -> Any:
        """The config of the language model. InputError for a vision model."""
        if not self.text:
            raise InputError(f"{self.name} has no language model")
        return getattr(transformers, self.text_config)(**self.text)

    def build_layer(self) -> nn.Module:
        """One decoder layer of the language model with exact shapes on the meta device, SDPA attention."""
        config = self.language
        config._attn_implementation = "sdpa"
        layer = {"LlamaConfig": "LlamaDecoderLayer", "Qwen2Config": "Qwen2DecoderLayer"}[self.text_config]
        kind = self.text_config.removesuffix("Config").lower()
        module = getattr(transformers.models, kind)
        with torch.device("meta"):
            return getattr(getattr(module, f"modeling_{kind}"), layer)(config, 0).eval()

    def build_projector(self) -> nn.Sequential:
        """The projector (vision width -> language width, two layers) with exact shapes on the meta device."""
        width = self.language.hidden_size
        with torch.device("meta"):
            return nn.Sequential(nn.Linear(self.vision["hidden_size"], width), nn.GELU(), nn.Linear(width, width))

    def twin(self, visual: int = 0, text: int = 8) -> tuple[Any, dict[str, Tensor]]:
        """A model that runs here and treats tokens as this one does, and one prompt for it.

        It has this model's depth (vision and language) and numbers of tokens, but is 16 wide, with random weights from
        a fixed seed. Pictures come as crops of `crop_grid` patches one after the other, without LLaVA-NeXT's newlines,
        and a model that pools its patches has that grid from the start, so that every token is a patch.

        Args:
            visual: visual tokens at the language model's entry, a multiple of a crop's; 0 for one crop.
            text: text tokens after them, at least 1.

        Returns:
            the model and its inputs for batch 1.

        Raises:
            InputError: for other numbers, and for a model without a language model.
        """
        rows, columns = self.crop_grid
        crops, rest = divmod(visual or rows * columns, rows * columns)
        if rest or crops < 1 or text < 1:
            raise InputError(
                f"{self.name} has {rows * columns} visual tokens a crop and needs text; "
                f"{visual} visual and {text} text tokens do not fit"
            )
        small = {
            "hidden_size": _TWIN_WIDTH, "intermediate_size": 2 * _TWIN_WIDTH, "num_attention_heads": _TWIN_HEADS,
        }  # fmt: skip
        language = self.language
        few = language.num_key_value_heads < language.num_attention_heads
        narrow_text = type(language)(
            **small, num_hidden_layers=language.num_hidden_layers, num_key_value_heads=1 if few else _TWIN_HEADS,
            vocab_size=_TWIN_VOCABULARY, max_position_embeddings=2 * (crops * rows * columns + text),
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        # CLIP's, SigLIP's or InternVL's.
        seen: type[CLIPVisionConfig] | type[SiglipVisionConfig] = getattr(transformers, self.vision_config)
        side = (rows * _TWIN_PATCH, columns * _TWIN_PATCH)
        narrow_vision = seen(
            **small, num_hidden_layers=self.vision["num_hidden_layers"], image_size=side[0], patch_size=_TWIN_PATCH
        )
        feature = self.settings.get("vision_feature_layer", -2)
        strategy = self.settings.get("vision_feature_select_strategy", "default")
        config = LlavaConfig(
            text_config=narrow_text, vision_config=narrow_vision, vision_feature_layer=feature,
            vision_feature_select_strategy=strategy, **{"image_token_id": _PLACEHOLDER},
        )  # fmt: skip
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model = LlavaForConditionalGeneration(config).eval()
            for weight in model.parameters():
                # Initial weights are so small that all attention is uniform, and every ranking a tie.
                weight.data *= 4
            pictures = torch.randn(crops, 3, *side)
            words = torch.randint(_PLACEHOLDER + 1, _TWIN_VOCABULARY, (text,))
        ids = torch.cat([torch.full((crops * rows * columns,), _PLACEHOLDER), words]).unsqueeze(0)
        return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures}


_CLIP_L_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_VICUNA_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
}
_VICUNA_13B: dict[str, Any] = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32064,
}
_LLAMA3_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128320,
    "rope_theta": 500000.0,
}
_QWEN2_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
_INTERNLM2_7B: dict[str, Any] = {
    # InternLM2 is LLaMA with one matrix for queries, keys and values.
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 92553,
}
_INTERNVIT_300M: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "attention_bias": True,
    "image_size": 448,
    "patch_size": 14,
}
_SIGLIP_SO400M: dict[str, Any] = {
    # The checkpoint's 27th layer is left out: the model uses the output of the 26th.
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}


def _vlm(name: str, parameters: int, source: str, text: dict[str, Any], kind: str = "Llava") -> Architecture:
    return Architecture(
        name, f"{kind}ForConditionalGeneration", f"{kind}Config", parameters, source, _CLIP_L_336, "CLIPVisionConfig",
        text, "LlamaConfig",
    )  # fmt: skip


ARCHITECTURES: dict[str, Architecture] = {
    one.name: one
    for one in (
        _vlm("llava-1.5-7b", 7_063_427_072, "llava-hf/llava-1.5-7b-hf", _VICUNA_7B),
        _vlm("llava-1.5-13b", 13_351_494_656, "llava-hf/llava-1.5-13b-hf", _VICUNA_13B),
        _vlm("llava-next-7b", 7_063_431_168, "llava-hf/llava-v1.6-vicuna-7b-hf", _VICUNA_7B, "LlavaNext"),
        _vlm("llava-next-13b", 13_351_499_776, "llava-hf/llava-v1.6-vicuna-13b-hf", _VICUNA_13B, "LlavaNext"),
        _vlm("llava-next-llama3-8b", 8_355_276_800, "llava-hf/llama3-llava-next-8b-hf", _LLAMA3_8B, "LlavaNext"),
        Architecture(
            "llava-onevision-7b", "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionConfig", 8_030_348_832,
            "llava-hf/llava-onevision-qwen2-7b-ov-hf", _SIGLIP_SO400M, "SiglipVisionConfig", _QWEN2_7B, "Qwen2Config",
            {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
            # 27 x 27 patches a frame, pooled.
            crop_grid=(14, 14), residual_adds=1,
        ),
        Architecture(
            "internvl2-8b", "InternVLForConditionalGeneration", "InternVLConfig", 8_075_365_376,
            "OpenGVLab/InternVL2-8B", _INTERNVIT_300M, "InternVLVisionConfig", _INTERNLM2_7B, "LlamaConfig",
            {"vision_feature_layer": -1, "vision_feature_select_strategy": "default", "tie_word_embeddings": False},
            # 32 x 32 patches a tile, joined.
            crop_grid=(16, 16),
        ),
        Architecture(
            "clip-l-14-336", "CLIPVisionModel", "CLIPVisionConfig", 303_507_456, "openai/clip-vit-large-patch14-336",
            _CLIP_L_336,
        ),
        Architecture(
            "vit-b-16", "ViTForImageClassification", "ViTConfig", 86_567_656, "google/vit-base-patch16-224",
            {"num_labels": 1000}, crop_grid=(14, 14),
        ),
    )
}  # fmt: skip
"""name -> shape."""


def architecture(name: str) -> Architecture:
    """The published model of that name; InputError with the nearest names otherwise."""
    if name not in ARCHITECTURES:
        raise InputError(f"unknown architecture {name!r}; {did_you_mean(name, ARCHITECTURES)}")
    return ARCHITECTURES[name]
