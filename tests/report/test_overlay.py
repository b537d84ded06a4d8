from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from foveate.report.overlay import draw_overlay

BLUE = (0, 0, 250)


def drawn(depth: list[float], group: list[int], grid: tuple[int, int] = (2, 3)) -> np.ndarray:
    picture = Image.new("RGB", (60, 40), BLUE)
    overlay = SimpleNamespace(method="fopru", budget=0.5, grid=grid, depth=depth, group=group)
    image = np.asarray(draw_overlay(picture, overlay)).astype(int)
    assert image.shape[0] % grid[0] == 0 and image.shape[1] % grid[1] == 0
    return image.reshape(grid[0], image.shape[0] // grid[0], grid[1], image.shape[1] // grid[1], 3).swapaxes(1, 2)


def test_dropped_patches_are_dimmed_and_earlier_ones_more() -> None:
    cells = drawn([0.0, 0.25, 0.5, 0.75, 1.0, 1.0], [-1] * 6)
    red = cells[..., 0].mean((2, 3)).reshape(-1)  # none in the picture: all red is veil
    assert (np.diff(red[:4]) < 0).all()
    assert red[3] > 30
    assert (cells[1, 1:] == BLUE).all()
    assert (cells[0, 0] == cells[0, 0, 0, 0]).all()


def test_merged_patches_are_outlined_around_the_group_only() -> None:
    cells = drawn([1.0] * 6, [0, 0, -1, -1, -1, -1])
    touched = (cells != BLUE).any(-1)
    assert touched[0, 0, 0].all() and touched[0, 0, -1].all() and touched[0, 0, :, 0].all()
    middle = touched.shape[2] // 2
    assert not touched[0, 0, middle, -1] and not touched[0, 1, middle, 0]  # between the two
    assert touched[0, 1, :, -1].all()
    assert not touched[0, 2].any() and not touched[1].any()


def test_wrong_number_of_patches() -> None:
    with pytest.raises(ValueError, match="6 patches"):
        drawn([1.0] * 5, [-1] * 6)
