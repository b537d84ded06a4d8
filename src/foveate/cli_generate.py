"""`foveate generate`: pictures of prompts by a generator as it is, and by methods at work on it, side by side."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from foveate.cli_common import (
    ALL,
    DeviceOption,
    DtypeOption,
    at_least,
    check_dtype,
    make_accelerator,
    make_console,
    progress_bar,
    unknown_words,
)
from foveate.configuration import is_file, load_configuration
from foveate.method import InputError, Published, did_you_mean, published_class

if TYPE_CHECKING:
    from foveate.generate import Column, Generator

DEFAULT_MODEL = "tiny-dit"
SHEET, RECORD = "contact-sheet.png", "generation.json"


def generate(
    prompt: Annotated[list[str], typer.Option(help="What to show; may be repeated.")],
    model: Annotated[
        str,
        typer.Option(
            help="A text-to-image pipeline of diffusers, shipped, a local folder, or a hub id OWNER/NAME (which is "
            "downloaded); or an autoregressive model, shipped or a folder that `foveate train tiny-ar` wrote."
        ),
    ] = DEFAULT_MODEL,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated names (see `foveate methods`) and configuration files (FILE.json), or all that "
            "there are for such a model. Without it: the model alone."
        ),
    ] = None,
    small: Annotated[
        str | None,
        typer.Option(
            help="A smaller model of the kind of --model, for methods that take one; a shipped model has its own."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first noise, the same for every prompt and method.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Of the sampler [the pipeline's own].")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of guidance [the pipeline's own].")] = None,
    height: Annotated[int | None, typer.Option(help="px [the pipeline's own].")] = None,
    width: Annotated[int | None, typer.Option(help="px [the pipeline's own].")] = None,
    out: Annotated[Path, typer.Option(help=f"Folder for {SHEET}, the pictures and {RECORD}.")] = Path(
        "foveate-pictures"
    ),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Make pictures with and without methods, from the same noise; show them side by side with what they cost."""
    from foveate.report.write import check_folder, write_files

    if not all(one.strip() for one in prompt):
        raise InputError("--prompt is empty")
    prompts = list(dict.fromkeys(prompt))
    names = parse_names(methods)
    for option, value, least in (
        ("--seed", seed, 0),
        ("--steps", steps, 1),
        ("--height", height, 1),
        ("--width", width, 1),
    ):
        at_least(option, value, least)
    kind = check_dtype(dtype)
    check_folder(out)
    source = find_generator(model)
    small = small or smaller_of(model)
    smaller = None if small is None else (small, find_generator(small))
    accelerator = make_accelerator(device)

    from foveate.generate import Column, compare_pictures, load_generator

    place = str(accelerator.device) if device == "auto" else device
    generator = load_generator(
        model, source, place, kind, smaller, seed=seed, steps=steps, guidance=guidance, height=height, width=width
    )
    entries, refused = build_entries(names, generator)
    with progress_bar() as advance:
        columns = compare_pictures(generator, prompts, entries, refusable=names is None, on_progress=advance)
    columns += [Column(label, refused=reason) for label, reason in refused.items()]
    write_files(out, _files(model, small, generator, prompts, columns))
    for column in columns:
        if column.refused:
            print(f"note: {column.label} left out: {column.refused}", file=sys.stderr)
    if generator.tokenizer is not None and (words := unknown_words(generator.tokenizer, prompts)):
        print(f"note: {model} was not taught {', '.join(words)}", file=sys.stderr)
    console = make_console()
    console.print(_table([column for column in columns if not column.refused]))
    console.print(f"[bright_black]{escape(str(out / SHEET))} · {escape(str(out / RECORD))}[/]")


def parse_names(text: str | None) -> dict[str, str] | None:
    """label -> method or configuration file; None for all methods that there are. InputError for what there is not."""
    if text is not None and text.strip() == ALL:
        return None
    names = list(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))
    if text is not None and not names:
        raise InputError("--methods: no name given; `foveate methods` lists them")
    labels: dict[str, str] = {}
    for name in names:
        label = Path(name).stem if is_file(name) else name
        if label in labels or label == "dense":
            raise InputError(f"--methods: two columns would be named {label!r}; rename the file")
        labels[label] = name
        _ = load_configuration(name) if is_file(name) else published_class(name)
    return labels


def build_entries(
    names: dict[str, str] | None, generator: Generator
) -> tuple[dict[str, Sequence[Published]], dict[str, str]]:
    """label -> methods that are at work together; and why others, of all that there are, cannot be."""
    entries: dict[str, Sequence[Published]] = {}
    refused = {}
    for label, name in ({slug: slug for slug in generator.methods} if names is None else names).items():
        try:
            entries[label] = load_configuration(name) if is_file(name) else generator.build(name)
        except InputError as error:
            if names is not None:
                raise
            refused[label] = str(error)
    return entries, refused


def smaller_of(name: str) -> str | None:
    """The zoo's smaller model for a model of the zoo; None where there is none."""
    from foveate import zoo

    return next((one for one in (f"{name}-small", f"{name}-draft") if one in zoo.names()), None)


def find_generator(name: str) -> str:
    """What diffusers loads `name` from: a folder or a hub id. InputError where it is neither."""
    from foveate import zoo

    shipped = [one for one in zoo.names() if _generates(zoo.path(one))]
    if name in shipped:
        return str(zoo.path(name))
    hint = f" (shipped: {', '.join(shipped)})" if shipped else ""
    if name in zoo.names():
        raise InputError(f"{name} makes no pictures of prompts; this command needs a model that does{hint}")
    if Path(name).exists():
        if not _generates(Path(name)):
            raise InputError(
                f"{name}: no generator here; the folder of a pipeline has a model_index.json, that of an "
                "autoregressive model a folder vq"
            )
        return name
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    near = f"; {did_you_mean(name, shipped)}" if shipped else ""
    raise InputError(f"unknown model {name!r}: neither shipped{near}, nor a folder here, nor a hub id OWNER/NAME")


def _generates(folder: Path) -> bool:
    from foveate.generate import is_causal

    return is_causal(folder) or (folder / "model_index.json").is_file()


def _files(
    model: str, small: str | None, generator: Generator, prompts: Sequence[str], columns: Sequence[Column]
) -> dict[str, str | bytes]:  # fmt: skip
    import json

    from foveate.generate import settings_of
    from foveate.measure.environment import environment
    from foveate.report.contact_sheet import contact_sheet

    files: dict[str, str | bytes] = {SHEET: _png(contact_sheet(prompts, columns))}
    runs: list[dict[str, Any]] = []
    for column in columns:
        run: dict[str, Any] = {
            "label": column.label,
            "methods": [{"method": one.card.slug, "settings": settings_of(one)} for one in column.methods],
        }
        runs.append(run)
        if column.refused:
            run["refused"] = column.refused
            continue
        names = [f"{column.label}-{number}.png" for number in range(len(prompts))]
        files |= {name: _png(picture) for name, picture in zip(names, column.pictures)}
        run |= {
            "steps": column.steps, "calls": dict(column.calls), "flops": column.flops,
            "seconds": round(column.seconds, 4), "pictures": names,
        }  # fmt: skip
    record = {
        "model": {"name": model, **generator.facts, "small": small},
        "prompts": list(prompts),
        "settings": generator.settings,
        "runs": runs,
        "environment": environment(generator.device, generator.dtype, generator.seed),
    }
    files[RECORD] = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    return files


def _png(picture: Any) -> bytes:
    import io

    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def _table(columns: Sequence[Column]) -> Table:
    from foveate.report.wording import share, si

    dense = columns[0]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("method", no_wrap=True)
    for header in ("steps", "model calls", "FLOPs", "× dense", "seconds", "× dense"):
        table.add_column(header, justify="right", no_wrap=True)
    for one in columns:
        cells = (
            one.label, str(one.steps), str(sum(one.calls.values())), si(one.flops), share(one.flops / dense.flops),
            f"{one.seconds:.2f}", share(one.seconds / dense.seconds),
        )  # fmt: skip
        table.add_row(*map(Text, cells))
    return table
