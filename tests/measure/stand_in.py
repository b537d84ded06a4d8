"""A tiny untrained LLaVA with the zoo's processor, and samples for it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from foveate.data.samples import Sample, from_scenes
from foveate.data.scenes import words
from foveate.zoo.llava import build_processor


def tiny(seed: int = 0) -> tuple[Any, Any]:
    """A LLaVA with 6x6 patches and 4 + 4 layers of 32 channels, and its processor."""
    processor = build_processor(words(), image_size=48, patch_size=8)
    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    shape: dict[str, int] = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, **shape,
        ),
        vision_config=CLIPVisionConfig(image_size=48, patch_size=8, **shape),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    for weight in model.parameters():
        # Freshly made weights give uniform attention and the same answer to everything.
        weight.data *= 4
    return model, processor


def questions(count: int) -> list[Sample]:
    return from_scenes("test", count, 0)
