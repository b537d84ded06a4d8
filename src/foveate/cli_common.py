"""What the commands share: their options and the checks of these, the console, devices, models and samples."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from foveate.configuration import is_file, load_configuration
from foveate.method import InputError, did_you_mean, method_class, share

if TYPE_CHECKING:
    from PIL import Image

    from foveate.data.samples import Sample
    from foveate.measure.comparison import R, Table

DEFAULT_QUESTIONS = 256
DEFAULT_FRAMES = 8
ALL = "all"
PARTIAL = "comparison.partial.json"

DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
QuestionsOption = Annotated[
    int | None, typer.Option(help="Use this many questions; 256 of the scenes, or the data set's first.")
]


def is_main_process() -> bool:
    # Set by `accelerate launch`; asked before torch and accelerate are imported.
    return os.environ.get("RANK", "0") == "0"


def make_console(stderr: bool = False) -> Console:
    console = Console(stderr=stderr, quiet=not is_main_process(), highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        from foveate.report.table import MINIMUM_WIDTH

        console.width = MINIMUM_WIDTH
    return console


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A bar with the time left on stderr; nothing where that is no terminal."""
    console = make_console(stderr=True)
    if not console.is_terminal or console.quiet:
        yield lambda done, total, text: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


def printable(message: str) -> str:
    """The message in one line, without control characters."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(message.split()))


def fail(message: str, everywhere: bool = False) -> NoReturn:
    """One line on stderr, without control characters, and exit 2; of several processes only the first says it."""
    if everywhere or is_main_process():
        print(f"error: {printable(message)}", file=sys.stderr)
    raise SystemExit(2)


def at_least(option: str, value: int | None, least: int) -> None:
    """InputError that names the option for a number below `least`."""
    if value is not None and value < least:
        raise InputError(f"{option} must be at least {least}, not {value}")


def check_dtype(name: str) -> str:
    known = ("auto", "float32", "bfloat16", "float16")
    if name not in known:
        raise InputError(f"--dtype: unknown {name!r}; {did_you_mean(name, known)}")
    return name


def parse_setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value a Python literal, true, false or a bare word."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set wants NAME=VALUE, not {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, {"true": True, "false": False}.get(value, value)


def parse_methods(text: str | None) -> Sequence[str] | None:
    """The methods and configuration files that are named; None for all."""
    if text is None or text.strip() == ALL:
        return None
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise InputError("--methods: no name given; `foveate methods` lists them")
    chosen = list(dict.fromkeys(name for name in names if is_file(name) or not method_class(name).card.baseline))
    for name in filter(is_file, chosen):
        load_configuration(name)
    if not chosen:
        raise InputError("--methods names baselines only, which always run; name a method to compare with them")
    return chosen


def parse_budgets(text: str) -> tuple[float, ...]:
    """Those of --keep, the largest first."""
    found = set()
    for part in text.split(","):
        try:
            found.add(share("--keep", float(part)))
        except InputError:
            raise
        except ValueError:
            raise InputError(f"--keep: {part.strip()!r} is not a number; give e.g. 0.5,0.25,0.1") from None
    return tuple(sorted(found, reverse=True))


@contextlib.contextmanager
def rows_kept(out: Path) -> Iterator[list[Any]]:
    """A list for a comparison's rows, which an interruption leaves behind as JSON in the folder."""
    rows: list[Any] = []
    try:
        yield rows
    except KeyboardInterrupt:
        if rows and is_main_process():
            from foveate.report.write import write_files

            values = {"complete": False, "rows": [dataclasses.asdict(row) for row in rows]}
            write_files(out, {PARTIAL: json.dumps(values, indent=2) + "\n"})
            print(f"interrupted; {len(rows)} rows are in {out / PARTIAL}", file=sys.stderr)
        raise


def show_comparison(
    comparison: Table[R], out: Path, model: str, picture: Image.Image | None = None,
    clip: Sequence[tuple[float, Image.Image]] = (),
    made: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]] = (),
) -> None:  # fmt: skip
    """Writes a comparison and its report into the folder, and prints the table and the choice.

    Args:
        model: as the user named it.
        picture, clip: what the model saw, for the overlays; see `foveate.report.html.report_html`.
        made: what the model made; see there.
    """
    from foveate.report.html import report_html
    from foveate.report.table import comparison_table
    from foveate.report.wording import reason
    from foveate.report.write import write_files

    command = shlex.join(["foveate", *sys.argv[1:]])
    page = report_html(comparison, command=command, model=model, picture=picture, clip=clip, made=made)
    write_files(out, {"comparison.json": comparison.to_json(), "report.html": page})
    (out / PARTIAL).unlink(missing_ok=True)
    console = make_console()
    console.print(comparison_table(comparison))
    console.print()
    console.print(Text(f"Choice: {reason(comparison)}", style="bold"))
    console.print(f"[bright_black]{escape(str(out / 'report.html'))} · {escape(str(out / 'comparison.json'))}[/]")


def make_accelerator(device: str) -> Any:
    import torch
    from accelerate import Accelerator

    if device != "auto":
        try:
            # Something has to be put there: a device's name may be right where there is no such device.
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise InputError(f"--device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())


def find_model(name: str) -> str:
    """What transformers loads `name` from: a folder or a hub id. InputError where it is neither."""
    from foveate import zoo

    shipped = shipped_models()
    if name in shipped:
        return str(zoo.path(name))
    if name in zoo.names():
        raise InputError(f"{name} answers no questions; this command needs a model that does, such as {shipped[0]}")
    if Path(name).exists():
        if not (Path(name) / "config.json").is_file():
            raise InputError(f"{name}: no model here; a model's folder has a config.json")
        return name
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    raise InputError(
        f"unknown model {name!r}: neither shipped ({did_you_mean(name, shipped)}), nor a folder here, nor a hub id "
        "OWNER/NAME"
    )


def shipped_models() -> list[str]:
    """Models of the zoo that compare can use; the others answer no questions."""
    from foveate import zoo

    files = {name: zoo.path(name) / "config.json" for name in zoo.names()}
    configs = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}
    return [name for name, config in configs.items() if "vision_config" in config]


def load_model(name: str, source: str, device: str, dtype: str) -> tuple[Any, Any]:
    """The model in evaluation mode on `device`, and its processor. InputError for what cannot be loaded.

    `source` is what `find_model(name)` found, and what transformers gets.
    """
    import torch
    from huggingface_hub.utils import logging as hub_logging
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    from transformers.utils import logging

    from foveate.hosts import SUPPORTED

    # Its bar for reading weights is a matter of moments; that of downloads is the hub's own, and stays. The hub's
    # warnings are one for every try to reach it, before the error that ends here in one line.
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    usable = [one for one in SUPPORTED if one in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()]
    kind = {"auto": "auto" if device != "cpu" else torch.float32}.get(dtype) or getattr(torch, dtype)
    try:
        # The configuration first: it is small, and tells whether the rest is worth downloading.
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        for architecture in config.architectures or ():
            if architecture not in usable:
                raise InputError(f"{name} is a {architecture}; compare can use {' and '.join(usable)}")
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source, config=config, dtype=kind, trust_remote_code=False, use_safetensors=True
        )
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        shipped = ", ".join(shipped_models())
        raise InputError(f"{name} cannot be loaded: {reason[:300]} (models shipped here: {shipped})") from None
    # Too long a prompt is our own error, with the sample's name; the tokenizer would only grumble.
    processor.tokenizer.model_max_length = sys.maxsize
    return loaded.to(device).eval(), processor


def read_samples(
    images: list[Path], prompt: str | None, dataset: Path | None, questions: int | None, seed: int,
    videos: Sequence[Path] = (), frames: int = DEFAULT_FRAMES,
) -> list[Sample]:  # fmt: skip
    from foveate.data.inputs import read_image, read_jsonl
    from foveate.data.samples import Sample, from_scenes
    from foveate.data.video import sample_frames

    if dataset is not None:
        if images or videos or prompt is not None:
            raise InputError("give either --dataset or --image with --prompt, not both")
        return read_jsonl(dataset, frames)[:questions]
    if images or videos:
        if prompt is None or not prompt.strip():
            needs, what = ("--image", "picture") if images else ("--video", "clip")
            raise InputError(f"{needs} needs --prompt, the question about the {what}")
        pictures = [Sample((read_image(path),), prompt, id=str(path)) for path in dict.fromkeys(images)]
        clips = [
            Sample((), prompt, id=str(path), videos=(sample_frames(path, frames),)) for path in dict.fromkeys(videos)
        ]
        return pictures + clips
    if prompt is not None:
        raise InputError("--prompt needs --image or --video, what it asks about")
    return list(from_scenes("test", questions or DEFAULT_QUESTIONS, seed))


def unknown_words(tokenizer: Any, prompts: Iterable[str], most: int = 5) -> list[str]:
    """Up to `most` words of the prompts that a model with whole words for tokens does not know."""
    if tokenizer.unk_token_id is None:
        return []
    words = dict.fromkeys(word for prompt in prompts for word in prompt.split())
    unknown = (w for w in words if tokenizer.unk_token_id in tokenizer(w, add_special_tokens=False)["input_ids"])
    return [repr(word[:40]) for word in itertools.islice(unknown, most)]
