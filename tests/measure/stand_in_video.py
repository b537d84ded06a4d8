"""Tiny untrained models that take clips, with real processors, and clips for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stand_in import tiny
from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

from foveate.data.samples import Sample
from foveate.data.scenes import clip_words, held_out_clip_questions
from foveate.data.video import Video
from foveate.zoo.llava import build_tokenizer, chat_template
from foveate.zoo.onevision import KINDS, build_processor, from_llava
from tiny import qwen_vl, shake


def onevision() -> tuple[Any, Any]:
    """A LLaVA-OneVision with 6x6 patches, of a clip's frames 3x3 cells, and its processor."""
    llava, known = tiny()
    processor = build_processor(clip_words(), image_size=48, patch_size=8)
    torch.manual_seed(1)
    return from_llava(llava, known.tokenizer, processor.tokenizer), processor


def qwen() -> tuple[Any, Any]:
    """A Qwen2-VL that joins two frames and 2x2 patches of 4x4 pixels to a cell, and its processor."""
    tokenizer = build_tokenizer(clip_words(), KINDS)
    shared: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 48 * 48}}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**shared), video_processor=Qwen2VLVideoProcessor(**shared),
        tokenizer=tokenizer, chat_template=chat_template(KINDS),
    )  # fmt: skip
    ids = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<{kind}>") for kind in KINDS}
    model = qwen_vl("qwen2-vl", **ids)
    model.resize_token_embeddings(len(tokenizer))
    return shake(model), processor


def clips(count: int, frames: int = 4) -> list[Sample]:
    """Questions about scenes' clips, a tenth of a second from frame to frame."""
    found = []
    for one in held_out_clip_questions("test", count):
        shown = one.frames[np.linspace(0, len(one.frames) - 1, frames).round().astype(int)]
        video = Video(shown, np.arange(frames) / 10)
        found.append(Sample((), one.prompt, one.answer, one.type, f"{len(found)}", (video,)))
    return found
