"""`Sample`: pictures, clips and a question, and how samples become a batch of model inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.data.scenes import held_out_clip_questions, held_out_questions
from foveate.data.video import Video
from foveate.method import InputError

NO_VIDEOS = "this model takes no videos, only pictures; LLaVA-OneVision and Qwen2-VL do"
_CLIP = 16
"""Frames of a scene's clip."""
_KINDS = {"image": "pictures", "video": "videos"}


@dataclass(frozen=True)
class Sample:
    """One question about pictures, clips or both.

    Attributes:
        images: RGB, in the order of the prompt.
        prompt: the question without chat words and without image tokens.
        answer: the right answer; None where it is not known.
        type: kind of question; None for no kind.
        id: a name for messages and results, unique among the samples of a comparison.
        videos: clips, which stand behind the pictures in the prompt.
    """

    images: tuple[Image.Image, ...]
    prompt: str
    answer: str | None = None
    type: str | None = None
    id: str = ""
    videos: tuple[Video, ...] = ()


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


def from_scene_clips(split: str = "test", count: int = 256, seed: int = 0, frames: int = 8) -> list[Sample]:
    """`count` questions about scenes' clips of 16 frames, `frames` of which are given, evenly from the first to the
    last; InputError for a bad split, count, seed or number of frames.

    The id is "clips/SPLIT/SEED/CLIP/QUESTION". A clip is taken to last a second.
    """
    if not 1 <= frames <= _CLIP:
        raise InputError(f"frames must be 1..{_CLIP}, not {frames}")
    try:
        questions = held_out_clip_questions(split, count, seed, frames=_CLIP)
    except ValueError as error:
        raise InputError(str(error)) from None
    shown = np.linspace(0, _CLIP - 1, frames).round().astype(int)
    asked: Counter[int] = Counter()
    samples = []
    for one in questions:
        asked[one.index] += 1
        id = f"clips/{split}/{seed}/{one.index}/{asked[one.index]}"
        video = Video(one.frames[shown], shown / (_CLIP - 1))
        samples.append(Sample((), one.prompt, one.answer, one.type, id, (video,)))
    return samples


def to_inputs(processor: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Model inputs of a batch: `input_ids`, `attention_mask`, `pixel_values`, … on the CPU, padded on the left.

    Args:
        processor: of a transformers vision-language model. Its chat template is used if it has one, otherwise
            LLaVA-1.5's form, "USER: <image>\nquestion ASSISTANT:". It gets every frame of a clip.
        samples: at least one, each with at least one picture or clip.

    Raises:
        InputError: for an empty batch, a sample without picture and clip, a clip where the processor takes none, a
            prompt without image or video token or with one of its own, and pixels that are not finite.
    """
    if not samples:
        raise InputError("there are no samples")
    kinds = [kind for kind in ("image", "video") if getattr(processor, f"{kind}_token", None) is not None]
    for sample in samples:
        if not sample.images and not sample.videos:
            raise InputError(f"{name(sample)} has no picture")
        if sample.videos and ("video" not in kinds or getattr(processor, "video_processor", None) is None):
            raise InputError(f"{name(sample)}: {NO_VIDEOS}")
        for kind in kinds:
            if (token := getattr(processor, f"{kind}_token")) and token in sample.prompt:
                raise InputError(
                    f"{name(sample)}: leave {token!r} out of the prompt; the {_KINDS[kind]} are put before it"
                )
    texts = [_chat(processor, sample) for sample in samples]
    visual: dict[str, Any] = {}
    if pictures := [image.convert("RGB") for sample in samples for image in sample.images]:
        visual["images"] = pictures
    if videos := [video for sample in samples for video in sample.videos]:
        visual["videos"] = [video.frames for video in videos]
        visual["videos_kwargs"] = {
            "do_sample_frames": False, "video_metadata": [_metadata(video) for video in videos]
        }  # fmt: skip
    try:
        batch = processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **visual)
    except (ValueError, IndexError, StopIteration):
        # Some processors count image tokens themselves, each in words of its own.
        for sample, text in zip(samples, texts):
            for kind in _present(sample, kinds):
                if getattr(processor, f"{kind}_token") not in text:
                    raise _without_token(sample, kind) from None
        raise
    inputs: dict[str, Tensor] = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    inputs.pop("token_type_ids", None)
    for key in ("pixel_values", "pixel_values_videos"):
        if key in inputs and not bool(torch.isfinite(inputs[key]).all()):
            raise InputError("a picture has pixels that are not finite (NaN or infinite)")
    for kind in kinds:
        number = getattr(processor, f"{kind}_token_id", None)
        if number is None:
            continue
        present = (inputs["input_ids"] == number).any(1).tolist()
        for sample, has in zip(samples, present):
            if not has and kind in _present(sample, kinds):
                raise _without_token(sample, kind)
    return inputs


def name(sample: Sample) -> str:
    """How a message calls a sample."""
    return f"sample {sample.id or sample.prompt[:60]!r}"


def _present(sample: Sample, kinds: Sequence[str]) -> list[str]:
    """Of what the processor takes, what the sample has."""
    there = {"image": sample.images, "video": sample.videos}
    return [kind for kind in kinds if there[kind]]


def _metadata(video: Video) -> dict[str, Any]:
    """What transformers' processors ask of a clip: models that are told the time get that of the frames they see."""
    count, span = len(video.times), float(video.times[-1] - video.times[0])
    height, width = video.frames.shape[1:3]
    return {
        "total_num_frames": count, "frames_indices": list(range(count)),
        "fps": (count - 1) / span if span > 0 else None, "height": height, "width": width,
    }  # fmt: skip


def _without_token(sample: Sample, kind: str) -> InputError:
    return InputError(f"{name(sample)}: its prompt has no {kind} token; is the model's chat template right?")


def _chat(processor: Any, sample: Sample) -> str:
    """The prompt with chat words and image and video tokens, ready for the answer."""
    parts = ["image"] * len(sample.images) + ["video"] * len(sample.videos)
    if getattr(processor, "chat_template", None):
        content: list[dict[str, str]] = [{"type": kind} for kind in parts]
        content.append({"type": "text", "text": sample.prompt})
        text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return text
    tokens = [getattr(processor, f"{kind}_token", f"<{kind}>") for kind in parts]
    return "USER: " + "".join(f"{token}\n" for token in tokens) + f"{sample.prompt} ASSISTANT:"
