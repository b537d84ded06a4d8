"""A clip's frames in the report: each with its own patches, its time below, in rows that end."""

from __future__ import annotations

import base64
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
from comparisons import comparison
from PIL import Image

from foveate.measure.provenance import Overlay
from foveate.report.html import report_html
from foveate.report.overlay import ROW, draw_strip

BLUE = (0, 0, 250)


def clip(count: int) -> list[Image.Image]:
    """Frame k has 10 k in its green."""
    return [Image.new("RGB", (60, 40), (0, 10 * k, 250)) for k in range(count)]


def strip(depth: list[float], frames: int) -> list[np.ndarray]:
    shown = SimpleNamespace(method="x", budget=0.5, grid=(2, 3), depth=depth, group=[-1] * len(depth))
    return [np.asarray(one).astype(int) for one in draw_strip(clip(frames), shown)]


def cell(image: np.ndarray, frame: int, row: int, column: int) -> np.ndarray:
    """The middle pixel of a cell: frames are 111 px wide and 74 high (cells of 112 // 3), 4 px apart."""
    side = 112 // 3
    return image[row * side + side // 2, frame * (3 * side + 4) + column * side + side // 2]


def test_every_frame_has_its_own_patches_dimmed() -> None:
    depth = [1.0] * 6 + [1.0, 0.0, 1.0, 1.0, 0.5, 1.0] + [1.0] * 5 + [0.0]
    (image,) = strip(depth, 3)
    assert image.shape == (2 * 37, 3 * 111 + 2 * 4, 3)
    for k, kept in enumerate(depth):
        frame, row, column = k // 6, k % 6 // 3, k % 3
        red, green, _ = cell(image, frame, row, column)
        if kept == 1:
            assert (red, green) == (0, 10 * frame)
        else:
            assert red > (150 if kept == 0 else 80)


def test_long_clips_take_several_rows_of_one_width() -> None:
    frames = ROW + 3
    images = strip([1.0] * 6 * frames, frames)
    assert len(images) == 2 and images[0].shape == images[1].shape
    for k in range(frames):
        assert cell(images[k // ROW], k % ROW, 1, 2).tolist() == [0, 10 * k, 250]
    with pytest.raises(ValueError, match="3 grids of 2x3 have 18 patches, not 12"):
        strip([1.0] * 12, 3)


def test_the_report_of_a_clip_has_strips_with_times() -> None:
    frames = ROW + 2
    made = comparison()
    made.overlays = [
        Overlay(one.method, one.budget, (3, 4), (1.0,) * 12 * frames, (-1,) * 12 * frames, one.answer, frames)
        for one in made.overlays
    ]
    shown = [(0.25 * k, frame) for k, frame in enumerate(clip(frames))]
    page = report_html(made, command="c", model="m", clip=shown)
    drawn = len([one for one in made.overlays if one.method != "dense"]) + 1
    times = re.findall(r"<span>([\d.]+) s</span>", page)
    assert times == [f"{0.25 * k:.2f}" for k in range(frames)] * drawn
    strips = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    assert len(strips) == 2 * drawn
    sizes = {Image.open(io.BytesIO(base64.b64decode(one))).size for one in strips}
    assert sizes == {(ROW * 112 + (ROW - 1) * 4, 84)}
    assert "Under each frame is the time" in page and page.count('class="clip" style="--frames: 8"') == drawn
    assert "Under each frame" not in report_html(comparison(), command="c", model="m", picture=clip(1)[0])
