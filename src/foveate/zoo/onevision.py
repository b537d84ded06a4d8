"""Building the zoo's `tiny-onevision`: a LLaVA-OneVision, for pictures and clips, that begins as a trained tiny-llava.

Everything is a stock transformers class, so the saved folder loads with `AutoModelForImageTextToText` and
`AutoProcessor` without any code of this project.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
)

from foveate.zoo.llava import build_tokenizer, chat_template

KINDS = ("image", "video")


def build_processor(words: list[str], *, image_size: int = 96, patch_size: int = 8) -> LlavaOnevisionProcessor:
    """Pictures and frames become `image_size` px squares in -1..1; a picture comes twice, as base and as one crop.

    Of S x S patches, a picture has 2 S² + S tokens: base, crop, and a new line after every row of the crop. A clip of
    T frames has T (S / 2)² + 1. All frames given are used: choosing them is the caller's task.
    """
    square = {"height": image_size, "width": image_size}
    scaling: dict[str, Any] = {"size": square, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(image_grid_pinpoints=[[image_size, image_size]], **scaling),
        video_processor=LlavaOnevisionVideoProcessor(**scaling),
        tokenizer=build_tokenizer(words, KINDS),
        num_image_tokens=(image_size // patch_size) ** 2 + 1,  # with the class token, which "default" leaves out
        vision_feature_select_strategy="default",
        chat_template=chat_template(KINDS),
    )


@torch.no_grad()
def from_llava(
    llava: LlavaForConditionalGeneration, known: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast
) -> LlavaOnevisionForConditionalGeneration:
    """A LLaVA-OneVision with the LLaVA's tower, projector, language model and words.

    `known` is the LLaVA's tokenizer. Words of `tokenizer` that it lacks, and the new line, begin small and random.
    """
    ids: dict[str, Any] = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision: Any = llava.config.vision_config
    text: Any = copy.deepcopy(llava.config.text_config)
    text.vocab_size = len(tokenizer)
    for name, value in ids.items():
        setattr(text, name, value)
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=cast(int, tokenizer.convert_tokens_to_ids("<image>")),
        video_token_index=cast(int, tokenizer.convert_tokens_to_ids("<video>")),
        projector_hidden_act="gelu",
        vision_feature_layer=llava.config.vision_feature_layer,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=[[vision.image_size, vision.image_size]],
        tie_word_embeddings=True,
        **ids,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=8, **ids)
    model.model.vision_tower.load_state_dict(llava.model.vision_tower.state_dict())
    model.model.multi_modal_projector.load_state_dict(llava.model.multi_modal_projector.state_dict())
    state = llava.model.language_model.state_dict()
    old = cast(nn.Embedding, llava.get_input_embeddings()).weight
    rows = torch.randn(len(tokenizer), old.shape[1]) * old.std()
    vocabulary = known.get_vocab()
    for word, row in tokenizer.get_vocab().items():
        if word in vocabulary:
            rows[row] = old[vocabulary[word]]
    model.model.language_model.load_state_dict(state | {"embed_tokens.weight": rows})
    model.tie_weights()
    model.model.image_newline.copy_(torch.randn(old.shape[1]) * old.std())
    return model.eval()
