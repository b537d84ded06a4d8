"""Pictures: what goes where (`sample_layout`), and how it is painted (`compose`). The two steps are kept apart."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foveate.data.scenes.sprites import NAMES, PHOTOGRAPHS, photograph_pixels, sprite, sprite_mask

BASE_SIZE = 96
"""Side of a picture in px unless another is asked for."""

OBJECT_SIDES = (20, 44)
"""Least and greatest px of an emoji's square in a picture of 96 px, unless others are asked for."""

GROUNDS: dict[str, int] = {"black": 35, "gray": 128, "white": 220}
"""Plain grounds that can take a photograph's place, with their brightness in 0..255. They have no colour: on those the
zoo's tiny-vit, which has seen photographs only, mistakes half of the objects."""

_MIN_VISIBLE = 0.75  # share of every object that stays visible when others are pasted over it


@dataclass(frozen=True)
class Placement:
    """Where one emoji is pasted: `left`, `top` (px) of its square of `side` px."""

    name: str
    left: int
    top: int
    side: int


@dataclass(frozen=True)
class Background:
    """A crop of a photograph: `box` (left, upper, right, lower) in px of the photograph, and how it is changed.

    Where `photograph` is a name of `GROUNDS`, the background has that brightness, changed likewise.
    """

    photograph: str
    box: tuple[int, int, int, int]
    mirrored: bool
    brightness: float
    contrast: float


@dataclass(frozen=True)
class Layout:
    """All that `compose` needs to paint a picture; later placements are in front of earlier ones."""

    background: Background
    placements: tuple[Placement, ...]


def sample_layout(
    rng: np.random.Generator,
    split: str,
    *,
    size: int = BASE_SIZE,
    objects: tuple[int, int] = (1, 5),
    sides: tuple[int, int] = OBJECT_SIDES,
    plain: bool = False,
    copies: bool = True,
) -> Layout:
    """Draws a background and placements for a picture of `size` px; every object stays at least 75 % visible.

    `sides` are those of the objects in a picture of 96 px. The background is a photograph or, if `plain`, one of
    `GROUNDS`. Without `copies` no name occurs twice.
    """
    background = _plain_background(rng) if plain else _sample_background(rng, split)
    count = int(rng.integers(objects[0], objects[1] + 1))
    names = [str(name) for name in rng.choice(NAMES, size=count, replace=False)]
    # Some names occur two or three times, so that "how many times does the dog appear" is a question.
    if copies and count >= 2 and rng.random() < 0.45:
        names[1] = names[0]
        if count >= 3 and rng.random() < 0.45:
            names[2] = names[0]
    least, greatest = (round(side * size / BASE_SIZE) for side in sides)
    owner = np.full((size, size), -1, dtype=np.int16)
    placements: list[Placement] = []
    totals: list[int] = []
    for name in names:
        for attempt in range(60):
            # The second half of the attempts takes the smallest size: a full picture has room for little else.
            side = int(rng.integers(least, greatest + 1)) if attempt < 30 else least
            left, top = (int(v) for v in rng.integers(0, size - side + 1, size=2))
            mask = sprite_mask(name, side)
            covered = owner[top : top + side, left : left + side][mask]
            lost = np.bincount(covered[covered >= 0], minlength=len(totals)) if totals else np.zeros(0)
            shown = [np.count_nonzero(owner == i) for i in range(len(totals))]
            if all(s - l >= _MIN_VISIBLE * t for s, l, t in zip(shown, lost, totals)):
                owner[top : top + side, left : left + side][mask] = len(totals)
                placements.append(Placement(name, left, top, side))
                totals.append(int(mask.sum()))
                break
    order = rng.permutation(len(placements)) if _disjoint(placements) else range(len(placements))
    return Layout(background, tuple(placements[i] for i in order))


def compose(layout: Layout, size: int) -> tuple[NDArray[np.uint8], list[NDArray[np.bool_]]]:
    """Paints a layout.

    Returns the image (size, size, 3) uint8 and for every placement the mask (size, size) bool of its visible pixels:
    those where it is at least half opaque and no later placement is. Placements may lie partly outside.
    """
    canvas = _paint_background(layout.background, size).astype(np.float32)
    owner = np.full((size, size), -1, dtype=np.int16)
    for i, placement in enumerate(layout.placements):
        colour, alpha = sprite(placement.name, placement.side)
        x1, y1 = max(placement.left, 0), max(placement.top, 0)
        x2, y2 = min(placement.left + placement.side, size), min(placement.top + placement.side, size)
        if x1 >= x2 or y1 >= y2:
            continue
        inside = np.s_[y1 - placement.top : y2 - placement.top, x1 - placement.left : x2 - placement.left]
        opacity = alpha[inside][..., None]
        patch = canvas[y1:y2, x1:x2]
        patch += opacity * (colour[inside] - patch)
        owner[y1:y2, x1:x2][alpha[inside] >= 0.5] = i
    image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return image, [owner == i for i in range(len(layout.placements))]


def moved(layout: Layout, offsets: list[tuple[int, int]]) -> Layout:
    """The layout with every placement moved by its (dx, dy) px: the next frame of a clip."""
    if len(offsets) != len(layout.placements):
        raise ValueError(f"offsets must have {len(layout.placements)} entries, not {len(offsets)}")
    placements = tuple(replace(p, left=p.left + dx, top=p.top + dy) for p, (dx, dy) in zip(layout.placements, offsets))
    return Layout(layout.background, placements)


def _disjoint(placements: list[Placement]) -> bool:
    """Whether no two squares meet, so that the order of painting does not matter."""
    for i, a in enumerate(placements):
        for b in placements[:i]:
            if abs(2 * a.left + a.side - 2 * b.left - b.side) < a.side + b.side and (
                abs(2 * a.top + a.side - 2 * b.top - b.side) < a.side + b.side
            ):
                return False
    return True


def _sample_background(rng: np.random.Generator, split: str) -> Background:
    photograph = str(rng.choice(PHOTOGRAPHS[split]))
    height, width = photograph_pixels(photograph).shape[:2]
    side = int(rng.integers(96, min(height, width) + 1))
    left, upper = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
    return Background(
        photograph,
        (left, upper, left + side, upper + side),
        mirrored=bool(rng.random() < 0.5),
        brightness=float(rng.uniform(-25, 25)),
        contrast=float(rng.uniform(0.7, 1.15)),
    )


def _plain_background(rng: np.random.Generator) -> Background:
    name = str(rng.choice(list(GROUNDS)))
    return Background(name, (0, 0, 0, 0), mirrored=False, brightness=float(rng.uniform(-8, 8)), contrast=1.0)


def _paint_background(background: Background, size: int) -> NDArray[np.uint8]:
    if background.photograph in GROUNDS:
        return toned(np.full((size, size, 3), GROUNDS[background.photograph], np.float32), background)
    left, upper, right, lower = background.box
    crop = Image.fromarray(photograph_pixels(background.photograph)[upper:lower, left:right])
    if background.mirrored:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0), dtype=np.float32)
    return toned(pixels, background)


def toned(pixels: NDArray[np.float32], background: Background) -> NDArray[np.uint8]:
    """Pixels in 0..255 with the background's contrast and brightness, rounded."""
    changed = (pixels - 128) * background.contrast + 128 + background.brightness
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)
