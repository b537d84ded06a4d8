"""Building the zoo's `tiny-llava`: a LLaVA whose vision tower is a `SceneTransformer` and whose words are few.

Everything is a stock transformers class, so the saved folder loads with `AutoModelForImageTextToText` and
`AutoProcessor` without any code of this project.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
CHAT_WORDS = ("user", "assistant", ":")


def chat_template(kinds: tuple[str, ...]) -> str:
    """The form that LLaVA 1.5 uses: `USER: <image>\nquestion ASSISTANT: answer </s>`, for these kinds of visual input.

    The tokenizer puts <s> in front.
    """
    visual = "".join(
        f"{{% for part in message['content'] if part['type'] == '{kind}' %}}{{{{ '<{kind}>\n' }}}}{{% endfor %}}"
        for kind in kinds
    )
    return (
        "{% for message in messages %}"
        "{{ 'USER: ' if message['role'] == 'user' else ' ASSISTANT: ' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        f"{visual}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        "{% endif %}"
        "{% if message['role'] == 'assistant' %}{{ ' </s>' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    )


def build_tokenizer(words: list[str], kinds: tuple[str, ...] = ("image",)) -> PreTrainedTokenizerFast:
    """One token a word: text is lower-cased and split at white space and punctuation; other words are `<unk>`.

    There is a token for each of the `kinds` of visual input, `<image>` for "image".
    """
    visual = {f"{kind}_token": f"<{kind}>" for kind in kinds}
    vocabulary = [*SPECIAL_TOKENS, *visual.values(), *CHAT_WORDS, *(word for word in words if word not in CHAT_WORDS)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=visual,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_processor(words: list[str], *, image_size: int = 96, patch_size: int = 8) -> LlavaProcessor:
    """Pictures are resized to `image_size` px without a crop and scaled to -1..1; `<image>` stands for all patches."""
    square = {"height": image_size, "width": image_size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size=square,
            crop_size=square,
            do_center_crop=False,
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        ),
        tokenizer=build_tokenizer(words),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(("image",)),
    )


def build_llava(
    vision: CLIPVisionConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    layers: int = 8,
    width: int = 128,
    heads: int = 4,
    intermediate: int = 352,
) -> LlavaForConditionalGeneration:
    """An untrained LLaVA; the projector reads the tower's last but one layer, as LLaVA 1.5's does."""
    ids: dict[str, Any] = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
        **ids,
    )
    side = cast(int, vision.image_size) // cast(int, vision.patch_size)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=cast(int, tokenizer.convert_tokens_to_ids("<image>")),
        image_seq_length=side**2,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **ids,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=8, **ids)
    return model.eval()


def save_llava(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    """Writes model and processor into `folder`, each file to a hidden name first."""
    partial = folder / ".partial"
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    for file in partial.iterdir():
        file.replace(folder / file.name)
    partial.rmdir()
