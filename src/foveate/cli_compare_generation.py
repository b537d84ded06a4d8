"""`foveate compare --task generation`: what methods save and cost on a generator of pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from foveate.cli_common import (
    ALL,
    make_accelerator,
    progress_bar,
    rows_kept,
    show_comparison,
    unknown_words,
)
from foveate.cli_generate import DEFAULT_MODEL, build_entries, find_generator, parse_names, smaller_of
from foveate.method import InputError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from foveate.measure.comparison import TaskRow

DEFAULT_COUNT = 256
_SIDE = 64
_SEED = 2**31 - 1
"""Captions and scenes that no generator of the zoo was trained on, the ones that its scores are of."""


def run(
    *, model: str | None, small: str | None, methods: str | None, prompts: Path | None, count: int | None,
    steps: int | None, seed: int, batch_size: int, out: Path, device: str, dtype: str,
) -> None:  # fmt: skip
    """The command; numbers, folder and dtype are checked already."""
    names = parse_names(methods or ALL)
    model = model or DEFAULT_MODEL
    source = find_generator(model)
    small = small or smaller_of(model)
    smaller = None if small is None else (small, find_generator(small))
    captions, real = _scenes(count or DEFAULT_COUNT) if prompts is None else (_read(prompts)[:count], None)
    accelerator = make_accelerator(device)

    from foveate.generate import load_generator
    from foveate.measure.compare_generation import compare_generation

    place = str(accelerator.device) if device == "auto" else device
    generator = load_generator(model, source, place, dtype, smaller, seed=seed, steps=steps)
    entries, refused = build_entries(names, generator)
    made: list[tuple[str, list[tuple[str, Image.Image]]]] = []
    with rows_kept(out) as rows, progress_bar() as advance:

        def note(row: TaskRow, pictures: Sequence[Image.Image]) -> None:
            rows.append(row)
            if pictures:
                settings = ", ".join(f"{name}={value}" for name, value in (row.settings or {}).items())
                label = f"{row.method} ({settings})" if row.baseline and settings else row.method
                made.append((label, list(zip(captions, pictures))))

        comparison = compare_generation(
            generator, captions, entries, real=real, refused=refused, refusable=names is None, batch_size=batch_size,
            on_progress=advance, on_row=note,
        )  # fmt: skip
    if generator.tokenizer is not None and (words := unknown_words(generator.tokenizer, captions)):
        print(f"note: {model} was not taught {', '.join(words)}", file=sys.stderr)
    show_comparison(comparison, out, model, made=made)


def _scenes(count: int) -> tuple[list[str], Tensor]:
    """Captions and real pictures of them."""
    from foveate.data.scenes import CaptionedScenes, stacked

    scenes = CaptionedScenes("test", _SEED, size=_SIDE)
    some = [scenes[number] for number in range(count)]
    return [one.caption for one in some], stacked(one.scene for one in some)


def _read(file: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"--prompts: {file} is no text in UTF-8") from None
    except OSError as error:
        raise InputError(f"--prompts: {file}: {(error.strerror or str(error)).lower()}") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"--prompts: {file} has no line with a prompt")
    return prompts
