"""The command line: `foveate compare`, `methods`, `verify`, `train`; `probe`, `tune`, `detect`, `generate`,
`tokenize`, `reconstruct` (cli_*.py).

Whatever the user gave and cannot be used ends with one line on stderr and exit code 2; an interruption with 130. Any
other exception is a bug and keeps its traceback. What is slow to import is imported by the command that needs it.
"""

from __future__ import annotations

import errno
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import foveate
from foveate import cli_compare, cli_detect, cli_generate, cli_probe, cli_tokenize, cli_tune
from foveate.cli_common import (
    at_least,
    fail,
    make_console,
    parse_setting,
    progress_bar,
)
from foveate.method import (
    STAGES,
    InputError,
    Method,
    Published,
    did_you_mean,
    published,
    published_class,
)

if TYPE_CHECKING:
    from foveate.method import Claim

app = typer.Typer(
    name="foveate",
    help="Spend visual compute where it matters: compare published token-reduction methods on your model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_probe.app, name="probe")
app.command()(cli_compare.compare)
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
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno == errno.EPIPE:
            # `foveate methods | head`: nobody reads on. Python would complain again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}")
    except Exception as error:
        # Typer's own usage errors (it brings its copy of click, or takes click's, by version).
        if type(error).__name__ == "Abort":
            raise SystemExit(130) from None
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            # Without a command typer has shown the help, and there is nothing to say.
            fail(error.format_message()) if error.format_message() else sys.exit(2)
        if type(error).__name__ == "OutOfMemoryError":
            fail("the GPU's memory is full; try a smaller --batch-size, or --dtype bfloat16")
        raise
    raise SystemExit(code if isinstance(code, int) else 0)


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
