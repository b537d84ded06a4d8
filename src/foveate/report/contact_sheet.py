"""Pictures beside each other: a row for each prompt, a column for each way to make it, and what that cost."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from foveate.report.wording import share, si

if TYPE_CHECKING:
    from foveate.generate import Column

SIDE = 256
"""Least pixels of a picture's longer side; smaller ones are shown enlarged, cell by cell."""
_GAP, _LINE = 12, 18
_PAPER, _INK, _SOFT = (255, 255, 255), (24, 26, 30), (96, 100, 108)


def contact_sheet(prompts: Sequence[str], columns: Sequence[Column]) -> Image.Image:
    """RGB. Above each column its label, steps, model calls, FLOPs and time, as a share of the first column's too; above
    each row its prompt. Columns that were refused are left out."""
    shown = [column for column in columns if not column.refused]
    dense, pictures = shown[0], [[_enlarged(one) for one in column.pictures] for column in shown]
    font, bold = _font("DejaVuSans", 12), _font("DejaVuSans-Bold", 14)
    texts = [_cost(column, dense) for column in shown]
    widths = [
        max(max(one.width for one in made), max(round(font.getlength(text)) for text in said), SIDE)
        for made, said in zip(pictures, texts)
    ]
    width = sum(widths) + _GAP * (len(widths) + 1)
    # A character is about half as wide as a line is high.
    captions = [textwrap.wrap(prompt, max(20, width // 7)) or [""] for prompt in prompts]
    heights = [max(made[row].height for made in pictures) for row in range(len(prompts))]
    head = _GAP + _LINE * (1 + max(map(len, texts))) + _GAP
    height = head + sum(len(lines) * _LINE + tall + 2 * _GAP for lines, tall in zip(captions, heights))
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    x = _GAP
    for column, said, wide, made in zip(shown, texts, widths, pictures):
        draw.text((x, _GAP), column.label, _INK, bold)
        for number, text in enumerate(said, 1):
            draw.text((x, _GAP + number * _LINE + 2), text, _SOFT, font)
        y = head
        for row, lines in enumerate(captions):
            y += len(lines) * _LINE + _GAP // 2
            sheet.paste(made[row], (x, y))
            y += heights[row] + 2 * _GAP - _GAP // 2
        x += wide + _GAP
    y = head
    for lines, tall in zip(captions, heights):
        for number, line in enumerate(lines):
            draw.text((_GAP, y + number * _LINE), line, _INK, font)
        y += len(lines) * _LINE + tall + 2 * _GAP
    return sheet


def _cost(column: Column, dense: Column) -> list[str]:
    of = "" if column is dense else f" ({share(column.flops / dense.flops)}×)" if dense.flops else ""
    longer = "" if column is dense else f" ({share(column.seconds / dense.seconds)}×)"
    calls = " + ".join(
        f"{count} {name}" if len(column.calls) > 1 else str(count) for name, count in column.calls.items()
    )
    return [
        f"{column.steps} steps, {calls} model calls",
        f"{si(column.flops)}FLOPs{of}",
        f"{column.seconds:.2f} s{longer}",
    ]


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Of those that matplotlib brings along: they have more than Latin letters."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", f"{name}.ttf"), size)


def _enlarged(picture: Image.Image) -> Image.Image:
    times = -(-SIDE // max(picture.size))
    if times < 2:
        return picture.convert("RGB")
    return picture.convert("RGB").resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
