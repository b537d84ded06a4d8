"""The command line: `foveate compare`, `methods`, `verify`, `train`; `probe`, `tune`, `detect`, `generate`,
`tokenize`, `reconstruct` (cli_*.py).

Whatever the user gave and cannot be used ends with one line on stderr and exit code 2; an interruption with 130. Any
other exception is a bug and keeps its traceback. What is slow to import is imported by the command that needs it.
"""

from __future__ import annotations

import errno
import inspect
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

import foveate
from foveate import cli_detect, cli_generate, cli_probe, cli_tokenize, cli_tune
from foveate.cli_common import (
    DEFAULT_FRAMES,
    DeviceOption,
    DtypeOption,
    QuestionsOption,
    at_least,
    check_dtype,
    find_model,
    is_main_process,
    load_model,
    make_accelerator,
    make_console,
    parse_methods,
    parse_setting,
    printable,
    progress_bar,
    read_samples,
    unknown_words,
)
from foveate.method import (
    STAGES,
    InputError,
    Method,
    Published,
    did_you_mean,
    published,
    published_class,
    share,
)

if TYPE_CHECKING:
    from PIL import Image

    from foveate.data.samples import Sample
    from foveate.data.video import Video
    from foveate.method import Claim

DEFAULT_MODEL = "tiny-llava"
VIDEO_MODEL = "tiny-onevision"
_PARTIAL = "comparison.partial.json"

app = typer.Typer(
    name="foveate",
    help="Spend visual compute where it matters: compare published token-reduction methods on your model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_probe.app, name="probe")
app.command()(cli_tune.tune)
app.command()(cli_detect.detect)
app.command()(cli_generate.generate)
app.command()(cli_tokenize.tokenize)
app.command()(cli_tokenize.reconstruct)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command line (that of the process if None) and exits: 0, 1 (claim or file failed), 2 (bad input), 130."""
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False, prog_name="foveate")
        sys.stdout.flush()
    except InputError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno == errno.EPIPE:
            # `foveate methods | head`: nobody reads on. Python would complain again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")
    except Exception as error:
        # Typer's own usage errors (it brings its copy of click, or takes click's, by version).
        if type(error).__name__ == "Abort":
            raise SystemExit(130) from None
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            # Without a command typer has shown the help, and there is nothing to say.
            _fail(error.format_message()) if error.format_message() else sys.exit(2)
        if type(error).__name__ == "OutOfMemoryError":
            _fail("the GPU's memory is full; try a smaller --batch-size, or --dtype bfloat16")
        raise
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(message: str, everywhere: bool = False) -> NoReturn:
    """One line on stderr, without control characters, and exit 2; of several processes only the first says it."""
    if everywhere or is_main_process():
        print(f"error: {printable(message)}", file=sys.stderr)
    raise SystemExit(2)


def _version(asked: bool) -> None:
    if asked:
        print(f"foveate {foveate.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# ---------------------------------------------------------------------------------------------------------------------
# compare


@app.command()
def compare(
    model: Annotated[
        str | None,
        typer.Option(
            help="Shipped model, local folder, or hub id OWNER/NAME (which is downloaded). Without it: tiny-llava, "
            "with --video tiny-onevision."
        ),
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture to ask --prompt about; may be repeated.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A clip to ask --prompt about; may be repeated.")] = None,
    frames: Annotated[int, typer.Option(help="Taken of every clip, at equal distances in time.")] = DEFAULT_FRAMES,
    prompt: Annotated[str | None, typer.Option(help="The question about every --image and --video.")] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="JSONL, a line {image or video, prompt, answer, type}; the last two optional.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated names (see `foveate methods`) and configuration files (FILE.json), or all. Without "
            "it: four on the shipped model and scenes, so that it takes minutes; otherwise all."
        ),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Comma-separated budgets in (0, 1]: the share of visual tokens that each may spend.")
    ] = "0.5,0.25,0.1",
    out: Annotated[Path, typer.Option(help="Folder for report.html and comparison.json.")] = Path("foveate-out"),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    questions: QuestionsOption = None,
    batch_size: Annotated[int, typer.Option(help="Samples run together.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the held-out scenes.")] = 0,
) -> None:
    """Measure what every method saves and costs on a model, beside plain down-sampling at the same budgets."""
    from foveate.report.write import check_folder

    # All that can be wrong with the arguments is found before anything is loaded, and that before any work.
    budgets = _budgets(keep)
    names = parse_methods(methods)
    at_least("--questions", questions, 1)
    at_least("--batch-size", batch_size, 1)
    at_least("--seed", seed, 0)
    at_least("--frames", frames, 1)
    kind = check_dtype(dtype)
    check_folder(out)
    model = model or (VIDEO_MODEL if video else DEFAULT_MODEL)
    source = find_model(model)
    samples = read_samples(image or [], prompt, dataset, questions, seed, video or [], frames)
    if methods is None and model == DEFAULT_MODEL and not image and not video and dataset is None:
        from foveate.measure.compare import METHODS

        names = METHODS
    _run_comparison(model, source, samples, names, budgets, out, device, kind, batch_size, seed)


def _run_comparison(
    model: str,
    source: str,
    samples: list[Sample],
    names: Sequence[str] | None,
    budgets: tuple[float, ...],
    out: Path,
    device: str,
    dtype: str,
    batch_size: int,
    seed: int,
) -> None:
    from foveate.measure.compare import Row
    from foveate.measure.compare import compare as measure
    from foveate.report.html import report_html
    from foveate.report.table import comparison_table
    from foveate.report.wording import reason
    from foveate.report.write import write_files

    console = make_console()
    accelerator = make_accelerator(device)
    loaded, processor = load_model(model, source, str(accelerator.device) if device == "auto" else device, dtype)
    rows: list[Row] = []
    try:
        with progress_bar() as advance:
            comparison = measure(
                loaded,
                processor,
                samples,
                names,
                budgets=budgets,
                batch_size=batch_size,
                seed=seed,
                on_progress=advance,
                on_row=rows.append,
                accelerator=accelerator,
            )
    except KeyboardInterrupt:
        if rows and is_main_process():
            write_files(out, {_PARTIAL: _rows_json(rows)})
            print(f"interrupted; {len(rows)} rows are in {out / _PARTIAL}", file=sys.stderr)
        raise
    except InputError as error:
        # Where the samples are shared out, only the process that has the one at fault knows of it.
        _fail(str(error), everywhere=True)
    if not is_main_process():
        return
    shown = next(sample for sample in samples if comparison.shown and sample.id == comparison.shown.id)
    page = report_html(
        comparison,
        command=shlex.join(["foveate", *sys.argv[1:]]),
        model=model,
        picture=_seen(processor, shown.images[0]) if shown.images else None,
        clip=[] if shown.images else _seen_frames(processor, shown.videos[0]),
    )
    write_files(out, {"comparison.json": comparison.to_json(), "report.html": page})
    (out / _PARTIAL).unlink(missing_ok=True)
    for sample in samples:
        if broken := sum(one.broken for one in sample.videos):
            print(f"note: {sample.id}: broken frames left out of its clip: {broken}", file=sys.stderr)
    if words := unknown_words(processor.tokenizer, (one.prompt for one in samples)):
        print(f"note: {model} was not taught {', '.join(words)}; its answers are guesses there", file=sys.stderr)
    console.print(comparison_table(comparison))
    console.print()
    console.print(Text(f"Choice: {reason(comparison)}", style="bold"))
    console.print(f"[bright_black]{escape(str(out / 'report.html'))} · {escape(str(out / 'comparison.json'))}[/]")


def _budgets(text: str) -> tuple[float, ...]:
    found = set()
    for part in text.split(","):
        try:
            found.add(share("--keep", float(part)))
        except InputError:
            raise
        except ValueError:
            raise InputError(f"--keep: {part.strip()!r} is not a number; give e.g. 0.5,0.25,0.1") from None
    return tuple(sorted(found, reverse=True))


def _seen(processor: Any, picture: Image.Image) -> Image.Image:
    """The picture as the model gets it: resized and cropped by the processor, normalisation undone."""
    import numpy as np

    prepare = processor.image_processor
    pixels = np.asarray(prepare(images=[picture], return_tensors="np")["pixel_values"][0], dtype=np.float64)
    if pixels.ndim < 3:
        # Qwen-VL: patches without an order of their own; they are of the whole picture.
        return picture
    # LLaVA-NeXT: crops before channels; the first is the whole picture.
    return _restored(prepare, pixels[0] if pixels.ndim == 4 else pixels)


def _seen_frames(processor: Any, video: Video) -> list[tuple[float, Image.Image]]:
    """The frames of a clip as the model gets them, with their times; of frames that it joins, the first."""
    import numpy as np
    from PIL import Image

    prepare = processor.video_processor
    made = prepare(videos=[video.frames], do_sample_frames=False, return_tensors="pt")
    pixels = np.asarray(made["pixel_values_videos"], dtype=np.float64)
    if pixels.ndim == 5:
        return [(float(time), _restored(prepare, frame)) for time, frame in zip(video.times, pixels[0])]
    # Qwen-VL, as above.
    together = prepare.temporal_patch_size
    return [
        (float(time), Image.fromarray(frame)) for time, frame in zip(video.times[::together], video.frames[::together])
    ]


def _restored(prepare: Any, pixels: Any) -> Image.Image:
    """The picture of which a processor made these pixels (3, H, W), without its normalisation."""
    import numpy as np
    from PIL import Image

    if getattr(prepare, "do_normalize", False):
        shape = (-1, 1, 1)
        pixels = pixels * np.reshape(prepare.image_std, shape) + np.reshape(prepare.image_mean, shape)
    if getattr(prepare, "do_rescale", True):
        pixels = pixels * 255
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8).transpose(1, 2, 0))


def _rows_json(rows: list[Any]) -> str:
    import dataclasses
    import json

    return json.dumps({"complete": False, "rows": [dataclasses.asdict(row) for row in rows]}, indent=2) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# methods


@app.command()
def methods(
    slug: Annotated[str | None, typer.Argument(help="A method's name, for all about it.")] = None,
    pages: Annotated[
        Path | None, typer.Option(help="Write Markdown pages into this folder: of all methods, or of the one named.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="With --pages: the benchmarks' JSON files [benchmarks/results].")
    ] = None,
    recount: Annotated[
        bool, typer.Option("--recount", help="With --pages: count the claims anew whose figures are there.")
    ] = False,
) -> None:
    """List the methods, or tell all about one; with --pages write that down."""
    if pages is not None:
        _write_pages(pages, slug, results, recount)
        return
    if results is not None or recount:
        raise InputError("--results and --recount go with --pages")
    if slug is not None:
        _describe(published_class(slug))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("method", "acts at", "summary", "paper"):
        table.add_column(column, no_wrap=column in ("method", "paper"))
    known = published().values()
    for baselines in (False, True):
        for cls in (one for one in known if one.card.baseline == baselines):
            card = cls.card
            stages = ", ".join(cls.handlers()) or "nowhere" if issubclass(cls, Method) else f"({card.kind})"
            paper = f"arXiv {card.arxiv}" if card.arxiv else ""
            cells = (card.slug, stages, card.summary, paper)
            table.add_row(*(Text(cell) for cell in cells), style="bright_black" if baselines else "")
        if not baselines:
            table.add_row(Text("baselines", style="bold"))
    console = make_console()
    console.print(table)
    console.print("\n[bright_black]foveate methods NAME tells all about one: what it does, settings, claims.[/]")


def _write_pages(folder: Path, slug: str | None, results: Path | None, recount: bool) -> None:
    from foveate.report.pages import write_pages

    with progress_bar() as advance:
        checked = write_pages(folder, slug, results, recount, on_progress=advance)
    failed = [one for one in checked if not one.holds]
    print(f"{folder}: {len(checked)} claims, {len(failed)} failed")
    if failed:
        raise typer.Exit(1)


def _describe(cls: type[Published]) -> None:
    from foveate.report.wording import source

    console, card = make_console(), cls.card
    console.print(Text(card.title, style="bold"))
    if card.arxiv:
        console.print(Text(f"https://arxiv.org/abs/{card.arxiv}" + (f" ({card.year})" if card.year else "")))
    console.print()
    # The lines of a docstring are broken for the source file; here they flow.
    paragraphs = (" ".join(one.split()) for one in (inspect.getdoc(cls) or card.summary).split("\n\n"))
    console.print(Text("\n\n".join(paragraphs)), soft_wrap=not console.is_terminal)
    if issubclass(cls, Method):
        _describe_use(console, cls)
    if cls.claims:
        _heading(console, f"claims that `foveate verify {card.slug}` measures")
        for claim in cls.claims:
            told = f"{claim.figure:.6g} ({source(claim)}, ±{100 * claim.tolerance:g} %)"
            console.print(Text(f"  {_what(claim)}: {told}"))


def _describe_use(console: Console, cls: type[Method]) -> None:
    """How a method is applied, where it acts, on what, and its settings."""
    from foveate.report.wording import FAMILIES, setting

    card = cls.card
    _heading(console, "how to use it")
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    keep = f", keep={defaults['keep']!r}" if "keep" in defaults else ""
    console.print(Text(f'  with foveate.apply(model, "{card.slug}"{keep}): …'))
    if not card.baseline and "hf-vlm" in card.hosts:
        console.print(Text(f"  foveate compare --methods {card.slug}"))
    _heading(console, "where it acts")
    for stage in cls.handlers():
        console.print(Text(f"  {stage:14} {STAGES[stage]}"))
    if not cls.handlers():
        console.print("  nowhere")
    _heading(console, "models it works on")
    for family in card.hosts:
        console.print(Text(f"  {family:14} {FAMILIES.get(family, '')}".rstrip()))
    if defaults:
        _heading(console, "settings and their defaults")
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for name, default in defaults.items():
            table.add_row(Text(f"  {name}"), Text(setting(default)), Text(card.parameters.get(name, "")))
        console.print(table)


def _what(claim: Claim) -> str:
    return f"{claim.what} ({claim.architecture})" if claim.architecture else claim.what


def _heading(console: Console, text: str) -> None:
    console.print(Text(f"\n{text}", style="bold"))


# ---------------------------------------------------------------------------------------------------------------------
# verify, train


@app.command()
def verify(
    slug: Annotated[str | None, typer.Argument(help="A method's name; all methods by default.")] = None,
) -> None:
    """Measure every hard claim now and print ours beside the paper's figure; exit 1 when one fails."""
    if slug is not None:
        published_class(slug)
    from foveate.measure.claims import verify as check

    with progress_bar() as advance:
        checked = check(slug, on_progress=advance)
    console = make_console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("method", "what", "ours", "figure", "tolerance", "source", ""):
        table.add_column(column, justify="right" if column in ("ours", "figure", "tolerance") else "left")
    for one in checked:
        claim = one.claim
        figures = (f"{one.ours:.6g}", f"{claim.figure:.6g}", f"{100 * claim.tolerance:g} %")
        cells = (one.method, _what(claim), *figures, claim.source, "ok" if one.holds else "FAILED")
        table.add_row(*(Text(cell) for cell in cells), style="" if one.holds else "bold red")
    console.print(table)
    failed = sum(not one.holds for one in checked)
    console.print(f"\n{len(checked)} claims measured, {failed} failed" if checked else "no claims to measure")
    if failed:
        raise typer.Exit(1)


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="What to train, e.g. tiny-vit, evad; a wrong name lists all.")],
    out: Annotated[Path | None, typer.Option(help="Folder for weights, metrics and checkpoints [runs/NAME].")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    config: Annotated[str | None, typer.Option(help="Of recipes with several sizes: the name of one.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the recipe; may be repeated.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete earlier progress in the folder.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny model and few steps: does everything work?")] = False,
) -> None:
    """Train a model of the zoo; the same command again resumes an interrupted run to the same numbers."""
    from foveate import train as recipes
    from foveate.report.write import check_folder

    at_least("--seed", seed, 0)
    if name not in recipes.names():
        raise InputError(f"nothing to train is called {name!r}; {did_you_mean(name, recipes.names())}")
    folder = check_folder(Path("runs") / name if out is None else out)
    overrides = dict(parse_setting(text) for text in settings or ())
    if config is not None:
        overrides["config"] = config
    recipes.run(name, out=folder, seed=seed, resume=not fresh, smoke=smoke, **overrides)


if __name__ == "__main__":
    main()
