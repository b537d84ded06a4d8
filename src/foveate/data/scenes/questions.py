"""Questions about a picture, with the one right answer each, and the closed vocabulary they are written in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from foveate.data.scenes.sprites import CATEGORIES, NAMES

if TYPE_CHECKING:
    from foveate.data.scenes.ground_truth import Scene, SceneObject

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


def words() -> list[str]:
    """All words that questions, answers and captions can contain, sorted: the closed vocabulary of the scenes."""
    found = {*_GRAMMAR_WORDS.split(), *NUMBERS, *NAMES, *CATEGORIES}
    for region in REGIONS:
        found.update(region.split())
    return sorted(found)


@dataclass(frozen=True)
class Question:
    """A question about one picture; `type` is one of `QUESTION_TYPES`."""

    type: str
    question: str
    answer: str


def picture_questions(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    objects, size = scene.objects, scene.image.shape[0]
    present = [o.name for o in objects]
    unique = [i for i, name in enumerate(present) if present.count(name) == 1]
    cover = _region_cover(scene)

    # presence: one that is there, one that is not
    absent = [name for name in NAMES if name not in present]
    for pool, answer in ((sorted(set(present)), "yes"), (absent if present else [], "no")):
        for name in rng.choice(pool, size=min(1, len(pool)), replace=False):
            yield Question("presence", f"is there {article(str(name))} {name} ?", answer)

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


def article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def _region_cover(scene: Scene) -> NDArray[np.int64]:
    """(objects, 9) visible pixels of every object in every region; the last row or column of regions takes the rest."""
    side = scene.image.shape[0]
    edges = [0, round(side / 3), round(2 * side / 3)]
    cover = np.zeros((len(scene.objects), 9), dtype=np.int64)
    for i, thing in enumerate(scene.objects):
        rows = np.add.reduceat(thing.mask.astype(np.int64), edges, axis=0)
        cover[i] = np.add.reduceat(rows, edges, axis=1).reshape(9)
    return cover


def _side(thing: SceneObject) -> int:
    return max(thing.box[2] - thing.box[0], thing.box[3] - thing.box[1])
