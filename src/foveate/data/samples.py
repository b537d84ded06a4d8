"""`Sample`: pictures and a question, and how samples become a batch of model inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from foveate.data.scenes import held_out_questions
from foveate.method import InputError


@dataclass(frozen=True)
class Sample:
    """One question about pictures.

    Attributes:
        images: RGB, in the order of the prompt.
        prompt: the question without chat words and without image tokens.
        answer: the right answer; None where it is not known.
        type: kind of question; None for no kind.
        id: a name for messages and results, unique among the samples of a comparison.
    """

    images: tuple[Image.Image, ...]
    prompt: str
    answer: str | None = None
    type: str | None = None
    id: str = ""


def from_scenes(split: str = "test", count: int = 256, seed: int = 0) -> list[Sample]:
    """`count` questions about scenes, evenly over the types; InputError for a bad split, count or seed.

    The id is "scenes/SPLIT/SEED/PICTURE/QUESTION", the questions about one picture numbered from 1.
    """
    try:
        questions = held_out_questions(split, count, seed)
    except ValueError as error:
        raise InputError(str(error)) from None
    asked: Counter[int] = Counter()
    samples = []
    for one in questions:
        asked[one.index] += 1
        id = f"scenes/{split}/{seed}/{one.index}/{asked[one.index]}"
        samples.append(Sample((Image.fromarray(one.image),), one.prompt, one.answer, one.type, id))
    return samples


def to_inputs(processor: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Model inputs of a batch: `input_ids`, `attention_mask`, `pixel_values`, … on the CPU, padded on the left.

    Args:
        processor: of a transformers vision-language model. Its chat template is used if it has one, otherwise
            LLaVA-1.5's form, "USER: <image>\\nquestion ASSISTANT:".
        samples: at least one, each with at least one picture.

    Raises:
        InputError: for an empty batch, a sample without picture, a prompt without image token or with one of its own,
            and pixels that are not finite.
    """
    if not samples:
        raise InputError("there are no samples")
    token = getattr(processor, "image_token", None)
    for sample in samples:
        if not sample.images:
            raise InputError(f"{name(sample)} has no picture")
        if token and token in sample.prompt:
            raise InputError(f"{name(sample)}: leave {token!r} out of the prompt; the pictures are put before it")
    texts = [_chat(processor, sample) for sample in samples]
    pictures = [image.convert("RGB") for sample in samples for image in sample.images]
    try:
        batch = processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")
    except (ValueError, IndexError, StopIteration):
        # Some processors count image tokens themselves, each in words of its own.
        for sample, text in zip(samples, texts):
            if token and token not in text:
                raise _without_image_token(sample) from None
        raise
    inputs: dict[str, Tensor] = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    inputs.pop("token_type_ids", None)
    if not bool(torch.isfinite(inputs["pixel_values"]).all()):
        raise InputError("a picture has pixels that are not finite (NaN or infinite)")
    number = getattr(processor, "image_token_id", None)
    if number is not None:
        present = (inputs["input_ids"] == number).any(1).tolist()
        for sample, has in zip(samples, present):
            if not has:
                raise _without_image_token(sample)
    return inputs


def name(sample: Sample) -> str:
    """How a message calls a sample."""
    return f"sample {sample.id or sample.prompt[:60]!r}"


def _without_image_token(sample: Sample) -> InputError:
    return InputError(f"{name(sample)}: its prompt has no image token; is the model's chat template right?")


def _chat(processor: Any, sample: Sample) -> str:
    """The prompt with chat words and image tokens, ready for the answer."""
    if getattr(processor, "chat_template", None):
        content: list[dict[str, str]] = [{"type": "image"} for _ in sample.images]
        content.append({"type": "text", "text": sample.prompt})
        text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return text
    token = getattr(processor, "image_token", "<image>")
    return "USER: " + f"{token}\n" * len(sample.images) + f"{sample.prompt} ASSISTANT:"
