"""`foveate tokenize`: pictures to code files. `foveate reconstruct`: code files to pictures."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.text import Text

from foveate.cli_common import (
    DeviceOption,
    at_least,
    make_accelerator,
    make_console,
    printable,
    progress_bar,
)

if TYPE_CHECKING:
    from foveate.tokenize import Job, Outcome, Pair

_STATES = {"written": "written", "kept": "were there", "broken": "could not be read"}
BATCH = 16
WORKERS = 4

TokensOption = Annotated[int | None, typer.Option(help="Use only the first ids of each picture, this many [all].")]
BatchOption = Annotated[int, typer.Option("--batch", help="Pictures computed together.")]
WorkersOption = Annotated[
    int, typer.Option("--workers", help="Threads that read and write; with --ray, processes that work.")
]
RayOption = Annotated[
    bool,
    typer.Option("--ray", help="Share the work out by Ray Data: on the cluster that there is, or on this machine."),
]


def tokenize(
    pictures: Annotated[
        list[Path], typer.Argument(metavar="FILES|DIR", help="Pictures, or folders of them.", show_default=False)
    ],
    tokenizer: Annotated[
        str, typer.Option(help="tiny-vq, or a folder that `foveate train` of titok, one-d-piece or tiny-vq wrote.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for a code file of each picture.")],
    tokens: TokensOption = None,
    batch: BatchOption = BATCH,
    workers: WorkersOption = WORKERS,
    ray: RayOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Write pictures as ids of a codebook, a small file each; the same command again goes on where it stopped."""
    from foveate.tokenize import Tokenize, find_files

    _check(out, batch, workers, device)
    pairs = find_files(pictures, out, Tokenize)
    job = Tokenize(tokenizer, tokens=tokens, batch=batch, threads=1 if ray else workers, device=device)
    form = job.form
    seen = _run(job, pairs, workers if ray else 0)
    files = seen["written"] + seen["kept"]
    if files:
        height, width = form.size
        each = seen["bytes"] / files
        bits = f"{form.ids.shape[1]} ids of {form.bits_per_id} bits"
        make_console().print(Text(f"{each:.4g} bytes a picture, {8 * each / height / width:.4g} bits a pixel ({bits})"))
    _end(out, seen)


def reconstruct(
    codes: Annotated[
        list[Path], typer.Argument(metavar="FILES|DIR", help="Code files, or folders of them.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for a PNG of each.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Its folder, where it is none that is shipped [what the files name].")
    ] = None,
    tokens: TokensOption = None,
    batch: BatchOption = BATCH,
    workers: WorkersOption = WORKERS,
    ray: RayOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Make pictures again of code files that `foveate tokenize` wrote; files tell by which tokenizer."""
    from foveate.tokenize import Reconstruct, find_files, made_by

    _check(out, batch, workers, device)
    pairs = find_files(codes, out, Reconstruct)
    first = made_by(pairs)
    job = Reconstruct(
        tokenizer or first.tokenizer, tokens=tokens, batch=batch, threads=1 if ray else workers, device=device
    )
    job.checked(first)
    _end(out, _run(job, pairs, workers if ray else 0))


def _check(out: Path, batch: int, workers: int, device: str) -> None:
    from foveate.report.write import check_folder

    at_least("--batch", batch, 1)
    at_least("--workers", workers, 1)
    make_accelerator(device)
    check_folder(out)


def _run(job: Job, pairs: list[Pair], processes: int) -> Counter[str]:
    """How many files came to which end, and their bytes; those that are broken are told on stderr."""
    from foveate.tokenize import on_ray

    outcomes: Iterator[Outcome] = on_ray(job, pairs, processes) if processes else job.run(pairs)
    seen: Counter[str] = Counter()
    broken: list[str] = []
    try:
        with progress_bar() as advance:
            for done, one in enumerate(outcomes, 1):
                seen.update([one.state], bytes=one.bytes)
                if one.state == "broken":
                    broken.append(one.reason)
                advance(done, len(pairs), "pictures")
    except KeyboardInterrupt:
        print(f"interrupted; {seen['written']} files more are there, the same command goes on", file=sys.stderr)
        raise
    finally:
        for reason in sorted(broken):
            print(f"broken: {printable(reason)}", file=sys.stderr)
    return seen


def _end(out: Path, seen: Counter[str]) -> None:
    console = make_console()
    counts = ", ".join(f"{seen[state]} {what}" for state, what in _STATES.items() if seen[state])
    console.print(f"{counts} [bright_black]· {escape(str(out))}[/]")
    if seen["broken"]:
        raise typer.Exit(1)
