"""Where the tokens of one picture went: dropped patches dimmed, merged patches outlined as groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from foveate.measure.provenance import Overlay

SIDE = 336
"""Pixels of an overlay's longer side."""
_VEIL = np.array([236.0, 238.0, 240.0])
_STRONGEST, _WEAKEST = 0.88, 0.25
_OUTLINE = np.array([255.0, 196.0, 0.0])


def dimming(depth: float) -> float:
    """How much of a patch is veiled, 0..1: 0.88 when dropped before the language model, less the later, 0 if never.

    `depth` is the share of the language model's depth that the patch has seen.
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
    rows, columns = overlay.grid
    depth = np.asarray(overlay.depth, dtype=np.float64)
    group = np.asarray(overlay.group, dtype=np.int64)
    if depth.size != rows * columns or group.size != rows * columns:
        raise ValueError(f"a grid of {rows}x{columns} has {rows * columns} patches, not {depth.size} and {group.size}")
    cell = max(2, SIDE // max(rows, columns))
    pixels = np.asarray(picture.convert("RGB").resize((columns * cell, rows * cell), Image.Resampling.BICUBIC))
    veil = np.vectorize(dimming, otypes=[float])(depth).reshape(rows, columns)
    veil = veil.repeat(cell, 0).repeat(cell, 1)[..., None]
    painted = pixels * (1 - veil) + _VEIL * veil
    painted[_borders(group.reshape(rows, columns), cell)] = _OUTLINE
    return Image.fromarray(np.rint(painted).astype(np.uint8))


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
