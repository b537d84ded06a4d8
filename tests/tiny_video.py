"""Real VideoMAE models at tiny sizes, built from their configs: random weights, no network. See `tiny`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEModel

from tiny import shake


def videomae(*, head: bool = False, seed: int = 0, layers: int = 4, **config: Any) -> Any:
    """Clips of 8 frames of 16x16 pixels, tubes of 2x4x4: a grid of 4x4x4. With a head, one that averages."""
    torch.manual_seed(seed)
    settings = {
        "image_size": 16, "patch_size": 4, "num_frames": 8, "tubelet_size": 2, "hidden_size": 32,
        "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 64, "use_mean_pooling": head,
    } | config  # fmt: skip
    if head:
        return shake(VideoMAEForVideoClassification(VideoMAEConfig(num_labels=7, **settings)), seed)
    return shake(VideoMAEModel(VideoMAEConfig(**settings)), seed)


def clips(count: int = 2, frames: int = 8, side: int = 16, seed: int = 3) -> Tensor:
    """(count, frames, 3, side, side), what VideoMAE reads."""
    return torch.randn(count, frames, 3, side, side, generator=torch.Generator().manual_seed(seed))
