"""What an action detector found, drawn onto a video's frames, with a strip of the tokens that it kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from foveate.measure.provenance import Overlay
from foveate.report.overlay import draw_overlay
from foveate.report.plot import COLOURS

if TYPE_CHECKING:
    from foveate.detect import Keyframe, Person

NAMED = 3
"""Actions that are written beside a box, the likeliest."""
_STRIP = 0.22
"""Greatest height of the strip's pictures, of the frame's."""
_BACKGROUND, _TEXT, _KEYFRAME = (22, 24, 28), (236, 238, 240), (255, 196, 0)


class Annotator:
    """Draws onto frames of one size.

    Below each frame is a strip: from left to right the time slots of the window around the keyframe, as the detector
    saw them (the first frame of each), patches veiled whose token was dropped; the keyframe's slot has a border.

    Args:
        width, height: px of the frames.
        grid: (t, h, w) of the detector's tokens.
        labels: names of all actions; each has its colour.
    """

    def __init__(self, width: int, height: int, grid: tuple[int, int, int], labels: Sequence[str]) -> None:
        self.width, self.height, self.grid = width, height, grid
        self._colours = {label: COLOURS[number % len(COLOURS)] for number, label in enumerate(labels)}
        size = max(9, min(width, height) / 24)
        self._font = ImageFont.load_default(size)
        self._line = max(1, min(width, height) // 240)
        slots, rows, columns = grid
        self._gap = max(1, width // 160)
        # One picture a slot, side by side, in the grid's form.
        side = min((width - self._gap * (slots + 1)) / (slots * columns), _STRIP * height / rows)
        self._slot = max(1, round(side * columns)), max(1, round(side * rows))
        # A caption has to have space for some words.
        self._caption = round(1.4 * size) if width >= 200 else 0
        self._strip = self._caption + self._slot[1] + 2 * self._gap
        self.size = width + width % 2, height + self._strip + (height + self._strip) % 2
        self._drawn: tuple[Keyframe, NDArray[np.uint8]] | None = None

    def draw(self, pixels: NDArray[np.uint8], keyframe: Keyframe) -> NDArray[np.uint8]:
        """(height, width, 3) of `size`: the frame `pixels` (H, W, 3) with what was found in `keyframe`."""
        if self._drawn is None or self._drawn[0] is not keyframe:
            self._drawn = keyframe, np.asarray(self._tokens(keyframe))
        if pixels.shape[:2] != (self.height, self.width):
            # Streams may change their size on the way.
            pixels = np.asarray(Image.fromarray(pixels).resize((self.width, self.height), Image.Resampling.BICUBIC))
        width, height = self.size
        canvas = np.empty((height, width, 3), np.uint8)
        canvas[: self.height, : self.width] = pixels
        canvas[: self.height, self.width :] = pixels[:, -1:]
        canvas[self.height :] = self._drawn[1]
        image = Image.fromarray(canvas)
        draw = ImageDraw.Draw(image)
        # The surest last, on top of the others.
        for person in sorted(keyframe.persons, key=lambda one: one.score):
            self._person(draw, person)
        return np.asarray(image)

    def _person(self, draw: ImageDraw.ImageDraw, person: Person) -> None:
        actions = person.actions[:NAMED]
        colour = self._colours[actions[0][0]] if actions else "#8a8f98"
        x1, y1, x2, y2 = (round(one) for one in person.box)
        x2, y2 = max(x1, min(x2, self.width) - 1), max(y1, min(y2, self.height) - 1)
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=2 * self._line)
        text = "\n".join(f"{label} {score:.2f}" for label, score in actions) or f"person {person.score:.2f}"
        right, bottom = draw.multiline_textbbox((0, 0), text, font=self._font, spacing=self._line)[2:]
        wide, high = right + 4 * self._line, bottom + 4 * self._line
        # Above the box, where there is no space within it; in any case within the frame.
        x = max(0, min(x1, self.width - wide))
        y = y1 - high if y1 >= high else min(y1, max(0, self.height - high))
        draw.rectangle((x, y, x + wide - 1, y + high - 1), fill=colour)
        place = x + 2 * self._line, y + 2 * self._line
        draw.multiline_text(place, text, fill="white", font=self._font, spacing=self._line)

    def _tokens(self, keyframe: Keyframe) -> Image.Image:
        """The strip, as wide as `size`."""
        slots, rows, columns = self.grid
        strip = Image.new("RGB", (self.size[0], self.size[1] - self.height), _BACKGROUND)
        draw = ImageDraw.Draw(strip)
        if self._caption:
            kept = keyframe.kept.mean()
            text = f"keyframe {keyframe.time:.2f} s · tokens kept {100 * kept:.0f} %"
            draw.text((self._gap, self._gap), text, fill=_TEXT, font=self._font)
        width, height = self._slot
        left = (self.width - slots * width - (slots - 1) * self._gap) // 2
        for number, (seen, kept) in enumerate(zip(keyframe.seen, keyframe.kept)):
            depth = tuple(kept.ravel().astype(float).tolist())
            overlay = Overlay("evad", 1.0, (rows, columns), depth, (-1,) * len(depth))
            picture = draw_overlay(Image.fromarray(seen), overlay).resize((width, height), Image.Resampling.BOX)
            x, y = left + number * (width + self._gap), self._caption + self._gap
            if number == slots // 2:
                edge = self._gap
                draw.rectangle((x - edge, y - edge, x + width + edge - 1, y + height + edge - 1), fill=_KEYFRAME)
            strip.paste(picture, (x, y))
        return strip
