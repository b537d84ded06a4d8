"""Pictures for `compare --task recognition|segmentation`: held-out scenes and folders, read when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.data.inputs import read_image
from foveate.data.picture_folder import labelled_pictures, masked_pictures, patch_majority, read_mask
from foveate.data.scenes import Scenes, patch_labels, presence
from foveate.measure.comparison import Progress
from foveate.measure.vision_goals import Goal, Recognition, Segmentation
from foveate.measure.vision_models import fitted, spelled
from foveate.method import InputError

_CACHE_BYTES = 2**30
"""Prepared pictures are kept up to this size; those beyond it are read anew for every method."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture that is read when it is needed.

    Attributes:
        id: for messages and results.
        read: the picture, and what is right: (classes,) float with 1 for each name that is there; or () long, the
            class, -1 for one that the model does not know; or (patches,) long, the class of each patch.
    """

    id: str
    read: Callable[[], tuple[Image.Image, Tensor]]


class Prepared:
    """Pictures as pixels, in batches. Those that cannot be read are left out and stand in `broken`, id -> why.

    Raises InputError where none is left.
    """

    def __init__(
        self, samples: Sequence[Sample], prepare: Callable[[Image.Image], Tensor], batch_size: int,
        on_progress: Progress,
    ) -> None:  # fmt: skip
        self.samples: list[Sample] = []
        self.broken: dict[str, str] = {}
        self._prepare, self._size = prepare, batch_size
        self._kept: dict[int, Tensor] = {}
        truth, held = [], 0
        for number, sample in enumerate(samples):
            try:
                picture, right = sample.read()
            except InputError as error:
                self.broken[sample.id] = str(error)
                continue
            pixels = prepare(picture)
            if (held := held + pixels.numel() * pixels.element_size()) <= _CACHE_BYTES:
                self._kept[len(self.samples)] = pixels
            self.samples.append(sample)
            truth.append(right)
            if number % batch_size == 0:
                on_progress(number, len(samples), "reading pictures")
        if not truth:
            raise InputError(f"none of the {len(samples)} pictures can be read: {next(iter(self.broken.values()))}")
        self.truth = torch.stack(truth)

    def pixels(self, places: Sequence[int]) -> Tensor:
        """(B, 3, H, W)."""
        return torch.stack([self._kept[k] if k in self._kept else self._anew(k) for k in places])

    def _anew(self, place: int) -> Tensor:
        return self._prepare(self.samples[place].read()[0])

    def __len__(self) -> int:
        return -(-len(self.samples) // self._size)

    def __iter__(self) -> Iterator[Tensor]:
        for first in range(0, len(self.samples), self._size):
            yield self.pixels(range(first, min(first + self._size, len(self.samples))))


def scene_samples(goal: Goal, count: int, seed: int = 0) -> tuple[list[Sample], list[str]]:
    """Held-out scenes, and notes. What is right of them is known where the model knows the things of scenes."""
    scenes, notes = Scenes("test", seed), []
    if isinstance(goal, Recognition) and not goal.host.scenes:
        notes = [f"{goal.host.name} does not know the things of scenes: agreement with dense and KL only"]

    def read(number: int) -> tuple[Image.Image, Tensor]:
        scene = scenes[number]
        if isinstance(goal, Segmentation):
            right = torch.from_numpy(patch_labels(scene, goal.patch)).flatten()
        else:
            right = torch.from_numpy(presence(scene)) if goal.host.scenes else torch.tensor(-1)
        return Image.fromarray(scene.image), right

    return [Sample(f"scenes/test/{seed}/{k}", partial(read, k)) for k in range(count)], notes


def folder_samples(goal: Goal, folder: Path, count: int | None = None) -> tuple[list[Sample], list[str]]:
    """The pictures of a folder (see `foveate.data.picture_folder`), and notes on classes that the model does not have.

    Raises:
        InputError: for a folder that is not of that form.
    """
    if isinstance(goal, Segmentation):
        return [_masked(goal, picture, mask) for picture, mask in masked_pictures(folder, count)], []
    files = labelled_pictures(folder, count)
    number = class_numbers(goal.host.classes, sorted({name for _, name in files}))

    def read(file: Path, name: str) -> tuple[Image.Image, Tensor]:
        return read_image(file), torch.tensor(number[name])

    samples = [Sample(str(file), partial(read, file, name)) for file, name in files]
    unknown = [name for name, one in number.items() if one < 0]
    if not unknown:
        return samples, []
    if len(unknown) == len(number):
        return samples, [
            f"no folder of {folder} is called as a class of {goal.host.name}: agreement with dense and KL only"
        ]
    told = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
    return samples, [
        f"{len(unknown)} of {len(number)} classes are none of {goal.host.name}'s ({told}): not in top-1, top-5"
    ]


def class_numbers(classes: Sequence[frozenset[str]], names: Sequence[str]) -> dict[str, int]:
    """Of each name the number of the class that is called so; -1 where there is none, or several."""
    owners: dict[str, set[int]] = {}
    for number, synonyms in enumerate(classes):
        for one in synonyms:
            owners.setdefault(one, set()).add(number)
    found = {name: owners.get(spelled(name), set()) for name in names}
    return {name: next(iter(own)) if len(own) == 1 else -1 for name, own in found.items()}


def _masked(goal: Segmentation, picture: Path, mask: Path) -> Sample:
    side = goal.grid[0] * goal.patch

    def read() -> tuple[Image.Image, Tensor]:
        shown, numbers = read_image(picture), read_mask(mask, len(goal.classes))
        if shown.size != numbers.size:
            raise InputError(f"{mask}: {numbers.size} px, its picture {shown.size}")
        labels = patch_majority(np.asarray(fitted(numbers, side, Image.Resampling.NEAREST)), goal.patch)
        return shown, torch.from_numpy(labels).flatten()

    return Sample(str(picture), read)
