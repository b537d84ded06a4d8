"""The contact sheet: whose pictures stand where."""

from __future__ import annotations

import numpy as np
from PIL import Image

from foveate.generate import Column
from foveate.report.contact_sheet import SIDE, contact_sheet

COLOURS = {"dense": ["red", "lime"], "fast": ["blue", "yellow"]}


def column(label: str, size: tuple[int, int], flops: int, seconds: float) -> Column:
    pictures = tuple(Image.new("RGB", size, colour) for colour in COLOURS[label])
    return Column(label, (), pictures, 4, {"denoiser": 8}, flops, seconds)


def test_a_row_a_prompt_and_a_column_an_entry() -> None:
    columns = [column("dense", (100, 60), 4_000_000, 2.0), column("fast", (600, 300), 1_000_000, 1.0)]
    prompts = ["a frog", "a very long prompt " * 20]
    sheet = contact_sheet(prompts, [*columns, Column("other", refused="does not fit")])
    pixels = np.asarray(sheet)
    places = {}
    for label, (first, second) in COLOURS.items():
        # Small pictures are enlarged by a whole number, large ones shown as they are.
        size = (300, 180) if label == "dense" else (600, 300)
        for row, colour in enumerate((first, second)):
            rows, columns_of = np.nonzero((pixels == Image.new("RGB", (1, 1), colour).getpixel((0, 0))).all(-1))
            assert len(rows) == size[0] * size[1]
            assert (np.ptp(columns_of) + 1, np.ptp(rows) + 1) == size
            places[label, row] = (columns_of.min(), rows.min())
    assert places["dense", 0][0] == places["dense", 1][0] < places["fast", 0][0] - SIDE
    assert places["dense", 0][1] == places["fast", 0][1] < places["dense", 1][1] == places["fast", 1][1]
    # The second prompt needs several lines.
    assert places["dense", 1][1] - places["dense", 0][1] > 300 + 3 * 18


def test_what_it_costs_is_written_above() -> None:
    cheap, dear = (contact_sheet(["a frog"], [column("dense", (256, 256), flops, 2.0)]) for flops in (1000, 2000))
    difference = np.nonzero((np.asarray(cheap) != np.asarray(dear)).any((1, 2)))[0]
    assert 0 < len(difference) <= 12 and difference.max() < 80
