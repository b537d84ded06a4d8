"""Held-out questions about pictures, for measuring a model, and their export as files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foveate.data.scenes.ground_truth import Scenes
from foveate.data.scenes.pictures import BASE_SIZE
from foveate.data.scenes.questions import QUESTION_TYPES
from foveate.data.scenes.sprites import generator


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
    split: str = "test", count: int = 2000, seed: int = 0, *, size: int = BASE_SIZE
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
        scene, rng = scenes[index], generator(split, seed, index, stream=2)
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
