from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from foveate.detect import Keyframe, Person
from foveate.report.annotate import Annotator

BLUE = (0, 0, 250)


def keyframe(size: tuple[int, int], *persons: Person, kept: np.ndarray | None = None) -> Keyframe:
    kept = np.ones((4, 2, 3), bool) if kept is None else kept
    seen = np.broadcast_to(np.array(BLUE, np.uint8), (4, 16, 24, 3))
    return Keyframe(1.0, 1.0, size, persons, kept, seen)


def drawn(width: int, height: int, *persons: Person, **changes: Any) -> np.ndarray:
    annotator = Annotator(width, height, (4, 2, 3), ["walk", "run"])
    pixels = np.full((height, width, 3), 7, np.uint8)
    picture = annotator.draw(pixels, keyframe((width, height), *persons, **changes))
    assert picture.shape == (*annotator.size[::-1], 3) and not np.any(np.array(picture.shape[:2]) % 2)
    return picture


@pytest.mark.parametrize("size", [(240, 135), (37, 23), (16, 400), (401, 16), (2, 2)])
def test_without_persons_the_picture_is_as_it_was(size: tuple[int, int]) -> None:
    picture = drawn(*size)
    assert (picture[: size[1], : size[0]] == 7).all() and picture.shape[1] - size[0] == size[0] % 2


def test_a_box_has_its_actions_colour_and_its_place() -> None:
    plain, walks = drawn(320, 240), drawn(320, 240, Person((100, 80, 200.4, 180), 0.9, (("walk", 0.8),)))
    changed = (plain != walks).any(-1)
    rows, columns = np.nonzero(changed)
    # The label is above, the strip below stays.
    assert (columns.min(), columns.max(), rows.max()) == (100, 199, 179) and 40 < rows.min() < 80
    assert changed[80, 100:200].all() and changed[80:180, 199].all() and not changed[90:170, 110:190].any()
    runs = drawn(320, 240, Person((100, 80, 200, 180), 0.9, (("run", 0.8), ("walk", 0.7))))
    assert tuple(walks[179, 150]) != tuple(runs[179, 150])
    # Two lines are higher than one.
    assert np.nonzero((plain != runs).any(-1))[0].min() < rows.min()


@pytest.mark.parametrize("box", [(0, 0, 320, 240), (300, 0, 320, 5), (-3, 230, 2, 300), (50, 50, 50, 50)])
def test_labels_stay_within_the_picture(box: tuple[float, float, float, float]) -> None:
    changed = (drawn(320, 240) != drawn(320, 240, Person(box, 0.5, (("walk", 0.8),)))).any(-1)
    assert not changed[240:].any() and changed.sum() > 300


def test_the_strip_shows_the_tokens_of_each_slot() -> None:
    kept = np.zeros((4, 2, 3), bool)
    kept[2] = True
    kept[1, 1, 0] = kept[3, 0, 2] = True
    strip = drawn(640, 360, kept=kept)[360:]
    blue = (np.abs(strip.astype(int) - BLUE) <= 3).all(-1)
    rows = np.nonzero(blue.any(1))[0]
    # Veil is bright and blue, the background dark; the keyframe's yellow border is neither.
    columns = np.nonzero(strip[rows[0] + 5, :, 2] > 150)[0]
    slots = np.split(columns, np.nonzero(np.diff(columns) > 1)[0] + 1)
    assert len(slots) == 4
    for number, slot in enumerate(slots):
        cells = blue[rows[0] : rows[-1] + 1, slot[0] : slot[-1] + 1]
        high, wide = cells.shape[0] / 2, cells.shape[1] / 3
        middles = cells[np.ix_([int(high / 2), int(high * 1.5)], [int(wide * (k + 0.5)) for k in range(3)])]
        assert (middles == kept[number]).all(), number
    # The keyframe's has a border.
    borders = [tuple(strip[rows[0] + 5, slot[0] - 1]) for slot in slots]
    assert borders[0] == borders[1] != borders[2]
