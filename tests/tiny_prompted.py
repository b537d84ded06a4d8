"""A tiny `StableDiffusionPipeline` with random weights that reads prompts, unlike those of `tiny_diffusion.py`."""

from __future__ import annotations

import string
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tiny_diffusion import pipeline

LENGTH, WIDTH = 16, 16
_WORDS = ("frog", "red")


def tokenizer() -> CLIPTokenizer:
    """One token a letter, but for "frog" and "red", which are one token each."""
    letters = [*string.ascii_lowercase, ",", "."]
    merges = [(word[:k], word[k] + "</w>" * (k == len(word) - 1)) for word in _WORDS for k in range(1, len(word))]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    pieces += ["".join(merge) for merge in merges]
    made = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
    made.model_max_length = LENGTH
    return made


def prompted(scheduler: Any = None, **config: Any) -> Any:
    """The pipeline; `config` changes the UNet's, `scheduler` is a class of diffusers."""
    pipe = pipeline("sd", scheduler, **config)
    words = tokenizer()
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    pipe.register_modules(tokenizer=words, text_encoder=CLIPTextModel(text).eval())
    return pipe
