"""Held-out questions about clips, for measuring a model."""

from __future__ import annotations

import collections
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from foveate.data.scenes.clip_questions import CLIP_QUESTION_TYPES
from foveate.data.scenes.clips import Clips
from foveate.data.scenes.pictures import BASE_SIZE
from foveate.data.scenes.sprites import generator


@dataclass(frozen=True, eq=False)
class HeldOutClipQuestion:
    """A question for measuring a model: `prompt` without chat words, `answer`, `type`; `index` of its clip.

    `frames` are painted anew whenever they are read, so that thousands of questions fit in memory.
    """

    prompt: str
    answer: str
    type: str
    index: int
    clips: Clips = field(repr=False)

    @property
    def frames(self) -> NDArray[np.uint8]:
        """(T, H, W, 3) RGB."""
        return self.clips[self.index].frames


def held_out_clip_questions(
    split: str = "test", count: int = 2000, seed: int = 0, *, frames: int = 16, size: int = BASE_SIZE
) -> list[HeldOutClipQuestion]:
    """`count` questions about clips 0, 1, 2, … of a split, about two a clip, evenly over the types.

    Of every clip the two types are asked that were asked least so far; within a type, the question whose answer was
    given least so far, so that guessing the commonest answer earns little. Raises ValueError for a bad split, a
    negative seed or count, and for what `Clips` rejects.
    """
    if count < 0:
        raise ValueError(f"count must be >= 0, not {count}")
    clips = Clips(split, seed, frames=frames, size=size)
    asked = dict.fromkeys(CLIP_QUESTION_TYPES, 0)
    given: collections.Counter[tuple[str, str]] = collections.Counter()
    found: list[HeldOutClipQuestion] = []
    index = 0
    while len(found) < count:
        questions, rng = clips[index].questions, generator(split, seed, index, stream=5)
        available = [t for t in CLIP_QUESTION_TYPES if any(q.type == t for q in questions)]
        for kind in sorted(available, key=lambda t: asked[t])[: min(2, count - len(found))]:
            pool = [questions[int(k)] for k in rng.permutation(len(questions)) if questions[int(k)].type == kind]
            question = min(pool, key=lambda q: given[kind, q.answer])
            found.append(HeldOutClipQuestion(question.question, question.answer, kind, index, clips))
            asked[kind] += 1
            given[kind, question.answer] += 1
        index += 1
    return found
