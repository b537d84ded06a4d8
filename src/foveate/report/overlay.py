"""Where the tokens of one picture or clip went: dropped patches dimmed, merged patches outlined as groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from foveate.method import InputError

if TYPE_CHECKING:
    from foveate.apply import Applied
    from foveate.measure.provenance import Overlay

SIDE = 336
"""Pixels of an overlay's longer side."""
ROW = 8
"""Frames of a clip beside each other."""
_FRAME, _GAP = 112, 4
"""Pixels of a frame's longer side, and between two."""
_VEIL = np.array([236.0, 238.0, 240.0])
_STRONGEST, _WEAKEST = 0.88, 0.25
_OUTLINE = np.array([255.0, 196.0, 0.0])


def dimming(depth: float) -> float:
    """How much of a patch is veiled, 0..1: 0.88 when dropped before the language model, less the later, 0 if never.

    `depth` is the share of the language model's (without one, the encoder's) depth that the patch has seen.
    """
    return 0.0 if depth >= 1 else _STRONGEST - (_STRONGEST - _WEAKEST) * max(depth, 0.0)


def draw_overlay(picture: Image.Image, overlay: Overlay) -> Image.Image:
    """RGB, longer side about `SIDE` pixels, every patch a whole number of pixels.

    Args:
        picture: what the model saw, so that its patch grid covers the whole of it.
        overlay: depth and group of every patch, row by row.

    Raises:
        ValueError: if depth or group are not one a patch.
    """
    depth, group = _by_frame(overlay, 1)
    return Image.fromarray(_painted(picture, depth[0], group[0], SIDE))


def draw_strip(frames: Sequence[Image.Image], overlay: Overlay) -> list[Image.Image]:
    """RGB, the frames of a clip from left to right, `ROW` in each picture; patches as in `draw_overlay`.

    Args:
        frames: what the model saw, one for each of the overlay's frames.
        overlay: depth and group of every patch, frame by frame. A group may run through several frames.

    Raises:
        ValueError: if depth or group are not one a patch of these frames.
    """
    depth, group = _by_frame(overlay, len(frames))
    painted = [_painted(frame, depth[k], group[k], _FRAME) for k, frame in enumerate(frames)]
    height, width = painted[0].shape[:2]
    strips = []
    for first in range(0, len(painted), ROW):
        # Each row is as long as the longest, so that a frame has the same place in all of them.
        strip = Image.new("RGB", (min(ROW, len(painted)) * (width + _GAP) - _GAP, height), tuple(_VEIL.astype(int)))
        for k, one in enumerate(painted[first : first + ROW]):
            strip.paste(Image.fromarray(one), (k * (width + _GAP), 0))
        strips.append(strip)
    return strips


def draw_applied(frames: Sequence[Image.Image], applied: Applied, sample: int = 0) -> list[Image.Image]:
    """Where the tokens of a clip went in the last forward of a video encoder: `draw_strip` of one frame a time slot.

    ```python
    with foveate.apply(videomae, "evad", keep=0.5) as applied:
        videomae(pixel_values)
        draw_applied(frames, applied)[0].save("tokens.png")
    ```
    A patch is veiled the more the earlier in the encoder it is dropped.

    Args:
        frames: what the model saw of the clip, all frames of it; each slot shows its first (of the keyframe's slot in
            `evad`, the keyframe).
        applied: of a model that is a video encoder, with or without a head.
        sample: which clip of the batch.

    Raises:
        InputError: if the model is none, the frames are not a clip of it, or there is no such sample.
    """
    # Not at the top: torch comes with it, and `foveate --help` has no use for that.
    from foveate.measure.provenance import encoder_overlay

    shape = applied.host.shape
    if shape.family != "hf-video":
        raise InputError(f"{type(applied.model).__name__} is no video encoder: it makes no time slots of clips")
    if len(frames) < shape.slots or len(frames) % shape.slots:
        raise InputError(f"the model makes {shape.slots} time slots of a clip; {len(frames)} frames do not fill them")
    clips = len(applied.trace[0].source) if applied.trace else sample + 1
    if not 0 <= sample < clips:
        raise InputError(f"sample must be one of the batch's {clips} clips, counted from 0, not {sample}")
    shown = encoder_overlay(applied.trace, shape, " + ".join(one.card.slug for one in applied.methods), 1.0, sample)
    return draw_strip(frames[:: len(frames) // shape.slots], shown)


def _by_frame(overlay: Overlay, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Depth and group, (frames, rows, columns) each."""
    rows, columns = overlay.grid
    depth = np.asarray(overlay.depth, dtype=np.float64)
    group = np.asarray(overlay.group, dtype=np.int64)
    count = frames * rows * columns
    if depth.size != count or group.size != count:
        many = f"{frames} grids" if frames > 1 else "a grid"
        raise ValueError(f"{many} of {rows}x{columns} have {count} patches, not {depth.size} and {group.size}")
    return depth.reshape(frames, rows, columns), group.reshape(frames, rows, columns)


def _painted(picture: Image.Image, depth: np.ndarray, group: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8: one grid (rows, columns) over its picture, longer side about `side` pixels."""
    rows, columns = depth.shape
    cell = max(2, side // max(rows, columns))
    pixels = np.asarray(picture.convert("RGB").resize((columns * cell, rows * cell), Image.Resampling.BICUBIC))
    veil = np.vectorize(dimming, otypes=[float])(depth)
    veil = veil.repeat(cell, 0).repeat(cell, 1)[..., None]
    painted = pixels * (1 - veil) + _VEIL * veil
    painted[_borders(group, cell)] = _OUTLINE
    painted = np.rint(painted).astype(np.uint8)
    return painted


def _borders(group: np.ndarray, cell: int) -> np.ndarray:
    """(H, W) bool: the edge pixels of merged patches whose neighbour belongs to another group."""
    rows, columns = group.shape
    width = max(1, cell // 16)
    padded = np.pad(group, 1, constant_values=-2)
    mask = np.zeros((rows * cell, columns * cell), dtype=bool)
    for row, column in zip(*np.nonzero(group >= 0)):
        own = group[row, column]
        inside = mask[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        inside[:width] |= padded[row, column + 1] != own
        inside[-width:] |= padded[row + 2, column + 1] != own
        inside[:, :width] |= padded[row + 1, column] != own
        inside[:, -width:] |= padded[row + 1, column + 2] != own
    return mask
