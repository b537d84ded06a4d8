"""`foveate probe`: measurements that are made on a model, not applied to it."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from foveate.cli_common import (
    DeviceOption,
    DtypeOption,
    check_dtype,
    find_model,
    load_model,
    make_accelerator,
    make_console,
    parse_setting,
    progress_bar,
    unknown_words,
)
from foveate.method import InputError, Method, method_class, share
from foveate.report.wording import si

if TYPE_CHECKING:
    from foveate.data.samples import Sample
    from foveate.methods.probe.verbose_images import Answers, Result, VerboseImages

DEFAULT_MODEL = "tiny-llava"
_NAME = "verbose"

app = typer.Typer(help="Measure how far a model can be pushed.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    pass


@app.command()
def verbose(
    model: Annotated[
        str, typer.Option(help="Shipped model, local folder, or hub id OWNER/NAME (which is downloaded).")
    ] = DEFAULT_MODEL,
    image: Annotated[
        Path | None, typer.Option(help="The picture; without it a held-out scene and its question.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What is asked about --image; nothing by default.")] = None,
    iterations: Annotated[int, typer.Option(help="Updates of the picture.")] = 1000,
    eps: Annotated[str, typer.Option(help="Largest change of a pixel, of the range from black to white.")] = "8/255",
    max_new_tokens: Annotated[int, typer.Option(help="Length cap of an answer.")] = 512,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated methods to apply to the model before it is probed.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of visual tokens that each of them may spend [0.5].")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for verbose.json and verbose.png.")] = Path("foveate-out"),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: Annotated[int, typer.Option(help="Of noise and answers.")] = 256,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Another setting; may be repeated.")
    ] = None,
) -> None:
    """How much longer can a change of the picture that nobody sees make a local model talk?"""
    from foveate.report.write import check_folder

    kind = check_dtype(dtype)
    names = _methods(methods, keep)
    check_folder(out)
    source = find_model(model)
    if prompt is not None and image is None:
        raise InputError("--prompt needs --image, the picture that it asks about")
    own = {"iterations": iterations, "eps": _fraction("--eps", eps), "max_new_tokens": max_new_tokens, "seed": seed}
    probe = _probe(own, dict(map(parse_setting, settings or ())))
    _run(probe, model, source, _sample(image, prompt), names, 0.5 if keep is None else keep, out, device, kind)


def _run(
    probe: VerboseImages,
    model: str,
    source: str,
    sample: Sample,
    names: Sequence[str],
    keep: float,
    out: Path,
    device: str,
    dtype: str,
) -> None:
    from foveate.data.samples import to_inputs

    accelerator = make_accelerator(device)
    loaded, processor = load_model(model, source, str(accelerator.device) if device == "auto" else device, dtype)
    inputs = to_inputs(processor, [sample])
    so_far: list[Result] = []
    with _applied(loaded, names, keep) as used, progress_bar() as advance:

        def note(result: Result) -> None:
            so_far[:] = [result]
            lengths = f"{max(result.lengths):.1f} {probe.count}, clean {result.clean.mean:.1f}"
            advance(len(result.iterations), probe.iterations, lengths)

        facts = _facts(probe, model, sample, used, loaded)
        try:
            probe.run(loaded, inputs, processor, on_iteration=note)
        except KeyboardInterrupt:
            for result in so_far:
                _write(out, f"{_NAME}.partial", facts, result, processor)
                done = len(result.iterations)
                print(f"interrupted; {done} iterations are in {out / _NAME}.partial.json", file=sys.stderr)
            raise
    (result,) = so_far
    _write(out, _NAME, facts, result, processor)
    for ending in ("json", "png"):
        (out / f"{_NAME}.partial.{ending}").unlink(missing_ok=True)
    if words := unknown_words(processor.tokenizer, [sample.prompt]):
        print(f"note: {model} was not taught {', '.join(words)}; its answers are guesses there", file=sys.stderr)
    console = make_console()
    console.print(_table(probe, result))
    console.print()
    told = " and ".join(f"{name} at {keep:g}" for name in names) or "no method"
    console.print(
        Text(
            f"{model} with {told}; {probe.iterations} iterations, eps {probe.eps:.4g} ({probe.unit}), at most "
            f"{probe.max_new_tokens} tokens. Each token costs {si(result.cost.flops)}FLOPs and "
            f"{result.cost.kv_bytes:,} bytes of cache."
        )
    )
    text = _said(processor, result.longest)
    console.print(Text(f"Longest answer: {text if len(text) <= 300 else text[:300] + ' …'}", style="bold"))
    console.print(f"[bright_black]{escape(str(out / _NAME))}.json · {escape(str(out / _NAME))}.png[/]")


def _methods(text: str | None, keep: float | None) -> list[str]:
    names = [part.strip() for part in (text or "").split(",") if part.strip()]
    if text is not None and not names:
        raise InputError("--methods: no name given; `foveate methods` lists them")
    if keep is not None and not names:
        raise InputError("--keep needs --methods, whose budget it is")
    if keep is not None:
        share("--keep", keep)
    for name in names:
        method_class(name)
    return list(dict.fromkeys(names))


def _fraction(option: str, text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise InputError(f"{option}: {text!r} is not a number; give e.g. 8/255 or 0.03") from None


def _probe(own: dict[str, Any], others: dict[str, Any]) -> VerboseImages:
    """The probe with the settings of options and of --set. InputError for unknown ones and bad values."""
    from foveate.methods.probe.verbose_images import VerboseImages

    for name in others:
        if name in own:
            raise InputError(f"--set {name}: it has an option of its own, --{name.replace('_', '-')}")
        if name not in _settings():
            free = ", ".join(one for one in _settings() if one not in own)
            raise InputError(f"verbose-images has no setting {name!r}; --set takes {free}")
    return VerboseImages(**own, **others)


def _settings() -> list[str]:
    import inspect

    from foveate.methods.probe.verbose_images import VerboseImages

    return list(inspect.signature(VerboseImages).parameters)


def _sample(image: Path | None, prompt: str | None) -> Sample:
    from foveate.data.inputs import read_image
    from foveate.data.samples import Sample, from_scenes

    if image is None:
        return from_scenes("test", 1, 0)[0]
    return Sample(images=(read_image(image),), prompt=prompt or "", id=str(image))


@contextlib.contextmanager
def _applied(model: Any, names: Sequence[str], keep: float) -> Iterator[list[Method]]:
    """The model with methods applied, each set up for the budget `keep`; gives those methods."""
    from foveate.apply import apply
    from foveate.hosts import adapt

    if not names:
        yield []
        return
    shape = adapt(model).shape
    used = [method_class(name).for_budget(keep, shape) for name in names]
    with apply(model, used):
        yield used


def _rows(result: Result) -> dict[str, Answers | None]:
    best = result.iterations[result.best].answers
    return {
        "clean": result.clean,
        "random noise": result.noise,
        f"perturbed (iteration {result.best + 1})": best,
        "the same, asked again": result.again,
        "the same, in 8 bits": result.rounded,
    }


def _table(probe: VerboseImages, result: Result) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("picture", f"{probe.count}, mean", "longest", "factor", "decode FLOPs", "KV bytes", "seconds"):
        table.add_column(column, justify="left" if column == "picture" else "right")
    for name, answers in _rows(result).items():
        if answers is None:
            continue
        flops = sum(map(result.cost.total_flops, answers.tokens)) / len(answers.tokens)
        cells = (
            name,
            f"{answers.mean:.1f}",
            str(max(answers.lengths)),
            f"{answers.mean / result.clean.mean:.2f}" if result.clean.mean else "–",
            si(flops),
            f"{answers.mean_tokens * result.cost.kv_bytes:,.0f}",
            f"{answers.seconds:.2f}",
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _said(processor: Any, ids: Sequence[int]) -> str:
    return str(processor.tokenizer.decode(list(ids), skip_special_tokens=True))


def _facts(probe: VerboseImages, model: str, sample: Sample, used: Sequence[Method], loaded: Any) -> dict[str, Any]:
    """What the results file says about how it was made."""
    from foveate.measure.environment import environment

    return {
        "model": model,
        "sample": sample.id,
        "prompt": sample.prompt,
        "methods": [{"method": one.card.slug, "settings": one.hyperparameters()} for one in used],
        "settings": {name: getattr(probe, name) for name in _settings()},
        "environment": environment(loaded.device, loaded.dtype, probe.seed),
    }


def _write(out: Path, name: str, facts: dict[str, Any], result: Result, processor: Any) -> None:
    """NAME.json, and NAME.png: the picture as the model gets it, the whole one where it gets crops too."""
    import io
    import json

    from PIL import Image

    from foveate.report.write import write_files

    def told(answers: Answers) -> dict[str, Any]:
        return dataclasses.asdict(answers) | {"mean": answers.mean, "longest": _said(processor, answers.longest)}

    values = {
        "complete": result.complete,
        **facts,
        "answers": [{"picture": key} | told(answers) for key, answers in _rows(result).items() if answers is not None],
        "longest": {"length": result.longest_length, "text": _said(processor, result.longest)},
        "best_iteration": result.best + 1,
        "largest_change": float(result.perturbation.abs().amax()),
        "decode": dataclasses.asdict(result.cost),
        "iterations": [
            {
                "losses": one.losses,
                "weights": one.weights,
                "lengths": one.answers.lengths,
                "tokens": one.answers.tokens,
                "seconds": one.answers.seconds,
            }
            for one in result.iterations
        ],
    }
    picture = result.picture.reshape(-1, *result.picture.shape[-3:])[0].permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    write_files(out, {f"{name}.json": json.dumps(values, indent=2) + "\n", f"{name}.png": file.getvalue()})
