"""Small files of motion in DeepMimic's format. `from motion_files import …` works in all tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def still(count: int) -> NDArray[np.float64]:
    """Frames (count, 44) of 0.02 s of somebody who stands upright, the pelvis 0.9 m high."""
    frames = np.zeros((count, 44))
    frames[:, 0], frames[:, 2] = 0.02, 0.9
    frames[:, [4, 8, 12, 16, 21, 25, 30, 35, 39]] = 1
    return frames


def write_motion(file: Path, frames: NDArray[np.float64]) -> Path:
    file.write_text(json.dumps({"Loop": "none", "Frames": frames.tolist()}))
    return file


def walking(folder: Path, count: int = 5, length: int = 14) -> Path:
    """A folder of `count` motions, each with other steps."""
    for k in range(count):
        frames, time = still(length), np.linspace(0, 1 + k / 3, length)
        frames[:, 1] = time
        frames[:, 20], frames[:, 34] = -0.5 - 0.5 * np.sin(7 * time), -0.5 + 0.5 * np.sin(7 * time)
        write_motion(folder / f"{k}.txt", frames)
    return folder
