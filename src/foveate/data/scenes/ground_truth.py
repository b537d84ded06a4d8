"""`Scenes`: pictures with their ground truth, worked out from the masks of the visible pixels."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from foveate.data.scenes.pictures import BASE_SIZE, Layout, compose, sample_layout
from foveate.data.scenes.questions import NUMBERS, REGIONS, Question, article, picture_questions
from foveate.data.scenes.sprites import CATEGORY_OF, NAMES, SPLITS, generator


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
        parts = [f"{article(o.name)} {o.name} at the {region_of(o.box, self.image.shape[0])}" for o in self.objects]
        return " , ".join(parts) + " ."

    @functools.cached_property
    def questions(self) -> tuple[Question, ...]:
        """Up to 17 questions, every type that this picture allows; yes/no types come as one yes and one no."""
        return tuple(picture_questions(self, generator(self.split, self.seed, self.index, stream=1)))


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
        size: int = BASE_SIZE,
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
            generator(self.split, self.seed, index, stream=0), self.split, size=self.size, objects=self.objects
        )
        return scene_of(layout, self.size, self.split, self.seed, index)

    def __iter__(self) -> Iterator[Scene]:
        return (self[index] for index in range(self.length))


def scene_of(layout: Layout, size: int, split: str, seed: int, index: int) -> Scene:
    """The painted layout with its ground truth, as scene `index` of that split and seed."""
    image, masks = compose(layout, size)
    objects = []
    for placement, mask in zip(layout.placements, masks):
        objects.append(SceneObject(placement.name, CATEGORY_OF[placement.name], _box(mask), mask, int(mask.sum())))
    return Scene(split, seed, index, image, tuple(objects), layout)


def stacked(scenes: Iterable[Scene]) -> torch.Tensor:
    """(n, 3, H, W) uint8: the pictures of scenes of one size."""
    return torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).contiguous()


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
