"""Real VideoMAE models at tiny sizes, built from their configs: random weights, no network. See `tiny`. And videos."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEModel

from foveate.methods.video.evad_detector import EvadDetector
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


def detector(seed: int = 0, **changes: Any) -> EvadDetector:
    """An `EvadDetector` for clips of 4 slots of two frames, grid 4x4 a slot, 6 proposals and three actions; random."""
    torch.manual_seed(seed)
    settings = {
        "image": 32, "frames": 8, "patch": 8, "hidden": 16, "layers": 4, "heads": 2, "levels": (0, 1, 2, 3),
        "channels": 16, "dynamic": 4, "feedforward": 16, "proposals": 6, "stages": 2, "decoder_hidden": 12,
        "decoder_layers": 1, "decoder_heads": 3, "classifier": 16, "classes": 3,
    } | changes  # fmt: skip
    model = EvadDetector(**settings)
    with torch.no_grad():
        # As it starts, its proposals all are the whole picture, and its scores all nearly the same.
        for weights in (*model.heads.parameters(), *model.decoder.parameters()):
            weights.add_(0.3 * torch.randn_like(weights))
        model.proposals.boxes.weight.copy_(torch.rand(6, 4) * 0.6 + 0.2)
    return model.eval()


def film(
    file: Path, ticks: Sequence[int], *, size: tuple[int, int] = (48, 36), codec: str = "ffv1", sound: str = "",
    seed: int = 0,
) -> Path:  # fmt: skip
    """A video with another noisy picture at each of these tenths of a second; of `sound`, a codec, one track beside."""
    noise = np.random.default_rng(seed)
    with av.open(str(file), "w") as container:
        out: Any = container.add_stream(codec, rate=10)
        out.width, out.height = size
        out.pix_fmt = {"ffv1": "bgr0", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        out.time_base = out.codec_context.time_base = Fraction(1, 10)
        track: Any = container.add_stream(sound, rate=16000, layout="mono") if sound else None
        for tick in ticks:
            blocks = noise.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            pixels = np.asarray(Image.fromarray(blocks).resize(size, Image.Resampling.BILINEAR))
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 10)
            container.mux(out.encode(frame))
        container.mux(out.encode(None))
        if track is not None:
            samples = np.zeros((1, 1600 * (ticks[-1] + 1)), np.int16)
            heard = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            heard.sample_rate, heard.pts, heard.time_base = 16000, 0, Fraction(1, 16000)
            for one in av.AudioResampler(track.format, "mono", 16000, track.frame_size or 0).resample(heard):
                container.mux(track.encode(one))
            container.mux(track.encode(None))
    return file


def shown(file: Path) -> tuple[list[float], list[np.ndarray]]:
    """Times and RGB pictures of all frames, by PyAV alone."""
    with av.open(str(file)) as container:
        frames = list(container.decode(video=0))
        return [float(one.pts * one.time_base) for one in frames], [one.to_ndarray(format="rgb24") for one in frames]
