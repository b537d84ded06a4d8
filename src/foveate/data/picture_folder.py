"""Folders of pictures that someone has labelled: by a folder a class, or by a mask a picture."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foveate.data.files import one_line, regular_file
from foveate.data.inputs import MAX_PIXELS, picture_suffixes
from foveate.method import InputError

IGNORED = 255
"""The value of a mask's pixels that count nowhere."""


def labelled_pictures(folder: str | Path, count: int | None = None) -> list[tuple[Path, str]]:
    """(file, class) of every picture in `folder/CLASS/…`, as torchvision's ImageFolder has them.

    With `count`, as many from all classes in turn, of each the first by name.

    Raises:
        InputError: no such folder, no classes in it, a class without pictures.
    """
    folder = _existing(folder)
    classes = sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    if not classes:
        raise InputError(f"{folder}: no folders of classes; pictures are expected as {folder}/CLASS/NAME.jpg")
    found = {one.name: list(_pictures(one)) for one in classes}
    for name, files in found.items():
        if not files:
            raise InputError(f"{folder / name}: no pictures of this class ({', '.join(_usual())}); fill or delete it")
    in_turn = chain.from_iterable(zip_longest(*([(file, name) for file in files] for name, files in found.items())))
    return sorted(islice((one for one in in_turn if one is not None), count))


def masked_pictures(folder: str | Path, count: int | None = None) -> list[tuple[Path, Path]]:
    """(picture, mask) of every `folder/images/NAME.…` and `folder/masks/NAME.png`, the first `count` by name.

    Raises:
        InputError: no such folders, no pictures in it, a picture without a mask.
    """
    folder = _existing(folder)
    pictures = list(islice(_pictures(_existing(folder / "images")), count))
    masks = _existing(folder / "masks")
    if not pictures:
        raise InputError(f"{folder / 'images'}: no pictures ({', '.join(_usual())})")
    pairs = [(file, masks / file.relative_to(folder / "images").with_suffix(".png")) for file in pictures]
    if missing := next((mask for _, mask in pairs if not mask.is_file()), None):
        raise InputError(f"{missing}: no such mask; each picture in images/ needs a PNG of class numbers in masks/")
    return pairs


def read_mask(path: Path, classes: int) -> Image.Image:
    """A PNG of class numbers, 0..classes - 1 or `IGNORED`, as a picture of mode "L".

    Raises:
        InputError: no PNG with one 8-bit number a pixel (grey or palette), damaged, too large, other numbers.
    """
    path = regular_file(path, "mask")
    try:
        with Image.open(path, formats=["PNG"]) as mask:
            if mask.width * mask.height > MAX_PIXELS:
                raise InputError(f"{path}: more pixels than the limit of {MAX_PIXELS:,}; scale it down")
            if mask.mode not in ("L", "P"):
                raise InputError(f"{path}: a mask has one class number a pixel (grey or palette), not mode {mask.mode}")
            numbers: NDArray[np.uint8] = np.asarray(mask)
    except InputError:
        raise
    except Exception as error:
        # Pillow's decoders raise whatever they like on damaged files.
        raise InputError(f"{path}: no PNG that can be read ({one_line(error)})") from None
    if (largest := int(numbers[numbers != IGNORED].max(initial=0))) >= classes:
        raise InputError(f"{path}: class {largest}; the model has 0..{classes - 1}, and {IGNORED} counts nowhere")
    return Image.fromarray(numbers)


def patch_majority(mask: NDArray[np.uint8], patch: int) -> NDArray[np.int64]:
    """(H / patch, W / patch): the class that most pixels of each patch have, the smallest of several; `IGNORED` where
    most are."""
    rows, columns = mask.shape[0] // patch, mask.shape[1] // patch
    cells = mask.reshape(rows, patch, columns, patch).swapaxes(1, 2).reshape(rows * columns, patch * patch)
    counts = np.zeros((len(cells), 256), dtype=np.int64)
    np.add.at(counts, (np.arange(len(cells))[:, None], cells), 1)
    return counts.argmax(1).reshape(rows, columns)


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise InputError(f"{folder}: a file, not a folder")
    return folder


def _pictures(folder: Path) -> Iterator[Path]:
    """All pictures below a folder, by name."""
    endings = picture_suffixes()
    for where, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(where, file) for file in sorted(files) if Path(file).suffix.lower() in endings)


def _usual() -> tuple[str, ...]:
    return (".jpg", ".png", ".webp", "…")
