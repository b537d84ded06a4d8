"""What the zoo's diffusion pipelines read captions with: a word-level tokenizer and small text encoders."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import CLIPTextConfig, CLIPTextModel, GemmaConfig, GemmaModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")


def build_caption_tokenizer(words: list[str], length: int = 12) -> PreTrainedTokenizerFast:
    """One token a word between `<s>` and `</s>`, lower-cased; what exceeds `length` tokens is cut by truncation."""
    vocabulary = [*SPECIAL_TOKENS, *words]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, vocabulary.index(token)) for token in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    )


def build_clip(tokenizer: PreTrainedTokenizerFast, *, width: int, layers: int = 2, heads: int = 4) -> CLIPTextModel:
    """An untrained CLIP text encoder for captions of at most the tokenizer's length."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=width,
            hidden_act="gelu",
            **_ids(tokenizer),
        )
    )


def build_gemma(tokenizer: PreTrainedTokenizerFast, *, width: int, layers: int = 2, heads: int = 4) -> GemmaModel:
    """An untrained Gemma. Lumina reads its last but one hidden states, so the last layer and the norm are frozen."""
    model = GemmaModel(
        GemmaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=width // heads,
            max_position_embeddings=256,
            **_ids(tokenizer),
        )
    )
    for unread in (model.layers[-1], model.norm):
        unread.requires_grad_(False)
    return model


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
