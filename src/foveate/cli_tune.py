"""`foveate tune`: the configuration that reaches a goal on the user's own model and samples."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from foveate.cli_common import (
    DeviceOption,
    DtypeOption,
    QuestionsOption,
    at_least,
    check_dtype,
    find_model,
    load_model,
    make_accelerator,
    make_console,
    parse_methods,
    progress_bar,
    read_samples,
    unknown_words,
)
from foveate.configuration import is_file
from foveate.method import InputError

if TYPE_CHECKING:
    from foveate.measure.tune import Found, Tuned

DEFAULT_MODEL = "tiny-llava"


def tune(
    model: Annotated[
        str, typer.Option(help="Shipped model, local folder, or hub id OWNER/NAME (which is downloaded).")
    ] = DEFAULT_MODEL,
    image: Annotated[list[Path] | None, typer.Option(help="A picture to ask --prompt about; may be repeated.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The question about every --image.")] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="JSONL, a line {image, prompt, answer, type}; the last two optional.")
    ] = None,
    target_speedup: Annotated[
        float | None, typer.Option(help="Goal: the best answers for at most 1/THIS of the FLOPs; > 1.")
    ] = None,
    max_loss: Annotated[
        float | None, typer.Option(help="Goal: the fewest FLOPs that lose at most this share of right answers; [0, 1).")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated names (see `foveate methods`), or all, which is the default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for trials.jsonl and chosen.json.")] = Path("foveate-tune"),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    questions: QuestionsOption = None,
    batch_size: Annotated[int, typer.Option(help="Samples run together.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the held-out scenes and of the order of the samples.")] = 0,
) -> None:
    """Search methods, stacks and budgets for your goal, on your samples; the same command again resumes."""
    from foveate.report.write import check_folder

    # All that can be wrong with the arguments is found before anything is loaded.
    if (target_speedup is None) == (max_loss is None):
        raise InputError("give one goal: either --target-speedup (such as 2.0) or --max-loss (such as 0.01)")
    if target_speedup is not None and not 1 < target_speedup < float("inf"):
        raise InputError(f"--target-speedup must be a number greater than 1, not {target_speedup:g}")
    if max_loss is not None and not 0 <= max_loss < 1:
        raise InputError(f"--max-loss must be a share in [0, 1), such as 0.01 for one point, not {max_loss:g}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("tune runs in one process; start it without accelerate launch")
    names = parse_methods(methods)
    for name in names or ():
        if is_file(name):
            raise InputError(f"--methods {name}: tune looks for settings itself; give names of methods")
    at_least("--questions", questions, 1)
    at_least("--batch-size", batch_size, 1)
    at_least("--seed", seed, 0)
    kind = check_dtype(dtype)
    check_folder(out)
    source = find_model(model)
    samples = read_samples(image or [], prompt, dataset, questions, seed)

    from foveate.measure import tune as search

    goal = search.Goal(target_speedup, max_loss)
    accelerator = make_accelerator(device)
    loaded, processor = load_model(model, source, str(accelerator.device) if device == "auto" else device, kind)
    written = 0

    def note(trial: search.Trial) -> None:
        nonlocal written
        written += 1

    try:
        with progress_bar() as advance:
            tuned = search.tune(
                loaded, processor, samples, names, goal=goal, folder=out, batch_size=batch_size, seed=seed, name=model,
                on_progress=advance, on_trial=note,
            )  # fmt: skip
    except KeyboardInterrupt:
        path = out / search.TRIALS
        typer.echo(f"interrupted; {written} more trials are in {path}; the same command goes on from there", err=True)
        raise
    if words := unknown_words(processor.tokenizer, (one.prompt for one in samples)):
        typer.echo(f"note: {model} was not taught {', '.join(words)}; its answers are guesses there", err=True)
    _show(tuned, out / search.TRIALS, out / search.CHOSEN)
    if tuned.chosen is None:
        raise typer.Exit(1)


def _show(tuned: Tuned, trials: Path, chosen: Path) -> None:

    console = make_console()
    read = f", {tuned.read} trials read from an earlier run" if tuned.read else ""
    refused = f", {tuned.refused} of which this model cannot have" if tuned.refused else ""
    console.print(f"{tuned.tried} candidates{refused}; {tuned.samples} samples{read}")
    if tuned.chosen is None:
        console.print(Text(f"Not reached: {tuned.why}.", style="bold"))
        console.print(f"[bright_black]{escape(str(trials))}; no configuration was written[/]")
        return
    console.print()
    console.print(_table(tuned))
    console.print()
    console.print(Text(f"Choice: {tuned.why}.", style="bold"))
    time = tuned.chosen.trial.time_ratio
    if time is not None and time >= 1 and tuned.chosen.candidate.methods[0].card.slug != "dense":
        console.print(Text(f"It saved no time on this machine: {time:.2f} × dense, measured."))
    path = str(chosen)
    console.print(Text(f'Use it: foveate.apply(model, "{path}") or foveate compare --methods {shlex.quote(path)}'))
    console.print(f"[bright_black]every trial: {escape(str(trials))}[/]")


def _table(tuned: Tuned) -> Table:
    """The Pareto front of what was measured on all samples, the dearest first; ● is the choice."""
    from foveate.report.wording import NOTHING, percent, share

    rows: list[Found] = list(tuned.front)
    if tuned.chosen is not None and tuned.chosen not in rows:
        rows.append(tuned.chosen)
    answers = rows[0].trial.accuracy is not None
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    costs = ["FLOPs × dense", "time × dense (quartiles)"]
    headers = ["Pareto front", *costs, *(["accuracy"] if answers else []), "agreement"]
    for column in headers:
        table.add_column(column, justify="left" if column == headers[0] else "right")
    for row in rows:
        trial, is_choice = row.trial, row is tuned.chosen
        time = NOTHING
        if trial.time_ratio is not None:
            time = f"{trial.time_ratio:.2f} ({trial.time_low:.2f}–{trial.time_high:.2f})"
        cells = [
            f"● {row.candidate.label}" if is_choice else row.candidate.label,
            share(trial.flops_ratio),
            time,
            *([percent(trial.accuracy)] if answers else []),
            percent(trial.agreement),
        ]
        style = "bold green" if is_choice else "bright_black" if row.candidate.baseline else ""
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table
