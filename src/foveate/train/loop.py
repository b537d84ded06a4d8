"""One training loop for everything that is trained here.

A recipe says what is trained, on which data and with which loss; this loop does the rest: learning-rate schedule,
clipping, progress, log, checkpoints, resuming, several processes (`accelerate launch -m foveate.cli train …`).

Resuming gives the same numbers as never having stopped, because nothing depends on history but the weights and the
optimizer's moments, which are saved: the batch is a function of (seed, step), and so is every random number.

What lies in the output folder: `log.jsonl` (a line per step), `checkpoint-<step>/` (the latest, safetensors and JSON
only), and, when training is done, the trained thing's own files with `metrics.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from foveate.measure.environment import device_name, processor
from foveate.method import InputError

Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every recipe can be told.

    Attributes:
        steps: number of optimizer steps.
        batch: pictures a step, over all processes.
        lr: greatest learning rate; it rises over `warmup` steps, then falls as a cosine to a hundredth.
        warmup: steps.
        weight_decay: of AdamW, on matrices only.
        clip: greatest norm of the gradient.
        save_every: steps between two checkpoints.
        log_every: steps between two log lines where there is no terminal.
        workers: processes that make data, 0 to make it in the training process.
        threads: CPU threads of PyTorch.
        test_scenes: scenes (or questions) of the final evaluation.
    """

    steps: int = 1000
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    save_every: int = 250
    log_every: int = 25
    workers: int = 1
    threads: int = 2
    test_scenes: int = 2000

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "save_every", "log_every", "threads", "test_scenes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, not {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "workers"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be >= 0, not {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a number > 0, not {getattr(self, name)}")


class Recipe(ABC):
    """What is trained. `model` is the module whose parameters with `requires_grad` are trained and saved."""

    name: ClassVar[str]
    settings_type: ClassVar[type[Settings]] = Settings
    smoke: ClassVar[dict[str, Any]] = {}
    """Settings under which the whole recipe takes seconds."""

    model: nn.Module

    @classmethod
    def prepare(cls, settings: Settings, seed: int, out: Path) -> Settings:
        """What must be there before the recipe is built, e.g. another trained model; returns completed settings."""
        return settings

    @abstractmethod
    def __init__(self, settings: Any, seed: int) -> None: ...

    @abstractmethod
    def batch(self, step: int, rank: int, world: int) -> Batch:
        """Process `rank`'s share of the batch of `step`; a function of (seed, step, rank, world) alone."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Scalar loss, and figures for the log; `model` is `self.model`, wrapped if there are several processes."""

    def rate(self, name: str) -> float:
        """Learning rate of the parameter of that name in `model`, in multiples of the schedule's."""
        return 1.0

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Writes the trained thing's files (safetensors and JSON) into the existing `folder`."""

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """Figures on the test split."""


class _Steps(Dataset[Batch]):
    """Map-style dataset whose item k is the whole batch of step `first + k`."""

    def __init__(self, recipe: Recipe, first: int, last: int, rank: int, world: int) -> None:
        self.recipe, self.first, self.last, self.rank, self.world = recipe, first, last, rank, world

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> Batch:
        return self.recipe.batch(self.first + index, self.rank, self.world)


def settings_for(recipe: type[Recipe], overrides: dict[str, Any]) -> Settings:
    """The recipe's settings with overrides; raises InputError for an unknown name or a value of the wrong type."""
    fields = {field.name: field for field in dataclasses.fields(recipe.settings_type)}
    values: dict[str, Any] = {}
    for name, value in overrides.items():
        if name not in fields:
            raise InputError(f"{recipe.name} has no setting {name!r}; it has {', '.join(fields)}")
        kind = type(fields[name].default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise InputError(f"{name} must be a {kind.__name__}, not {value!r}")
        values[name] = value
    return recipe.settings_type(**values)


def learning_rate(step: int, settings: Settings) -> float:
    """Learning rate of 0-based `step`: linear warm-up, then a cosine down to a hundredth of the greatest."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    share = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


def train(
    recipe_type: type[Recipe],
    *,
    out: str | Path,
    seed: int = 0,
    resume: bool = True,
    stop_after: int | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Trains, writes the trained thing and `metrics.json` into `out`, and returns the metrics.

    Args:
        recipe_type: what is trained.
        out: folder, made if absent.
        seed: of the initial weights and of the data, >= 0.
        resume: whether to go on from the latest checkpoint in `out`; without, earlier progress there is deleted.
        stop_after: stop with a checkpoint after this step and return no metrics: for training in several sittings.
        overrides: settings by name. A resumed run may change them, e.g. to fewer steps when time runs out; with the
            same settings it gives the same numbers as an uninterrupted run.

    Raises:
        InputError: for a setting that does not exist or cannot be, or a checkpoint of another recipe or seed.
    """
    if type(seed) is not int or seed < 0:
        raise InputError(f"seed must be an integer >= 0, not {seed!r}")
    settings = settings_for(recipe_type, overrides)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.set_num_threads(settings.threads)
    out = Path(out)
    new = not out.exists()
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()

    try:
        settings = recipe_type.prepare(settings, seed, out)
        set_seed(seed)
        recipe = recipe_type(settings, seed)
    except InputError:
        if new and accelerator.is_main_process:
            with contextlib.suppress(OSError):
                # Only if nothing is in it.
                out.rmdir()
        raise
    if accelerator.is_main_process and not resume:
        for folder in _checkpoints(out):
            shutil.rmtree(folder)
        (out / "log.jsonl").unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    optimizer = _optimizer(recipe, settings)
    start, spent = 0, 0.0
    if checkpoints := _checkpoints(out):
        start, spent = _load(checkpoints[-1], recipe, optimizer, seed)
    model, optimizer = accelerator.prepare(recipe.model, optimizer)
    last = settings.steps if stop_after is None else min(stop_after, settings.steps)
    if accelerator.is_main_process:
        _truncate_log(out / "log.jsonl", start)

    data = iter(_loader(recipe, settings, start, last, accelerator))
    begun = time.monotonic()
    with _Report(out / "log.jsonl", recipe.name, settings, start, accelerator.is_main_process) as report:
        for step in range(start, last):
            torch.manual_seed(_mixed(seed, step, accelerator.process_index))
            batch = {key: value.to(accelerator.device) for key, value in next(data).items()}
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings) * group["rate"]
            loss, parts = recipe.loss(model, batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(recipe.model.parameters(), settings.clip)
            optimizer.step()
            optimizer.zero_grad()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise InputError(f"{recipe.name}: the loss is {value} at step {step}; try a smaller lr")
            seconds = spent + time.monotonic() - begun
            report.step(step, value, learning_rate(step, settings), seconds, parts)
            done = step + 1
            if (done % settings.save_every == 0 or done == last) and accelerator.is_main_process:
                _save(out, done, seconds, recipe, optimizer, seed, settings)

    accelerator.wait_for_everyone()
    if last < settings.steps or not accelerator.is_main_process:
        return {}
    seconds = spent + time.monotonic() - begun
    recipe.model.eval()
    recipe.export(out)
    evaluated = time.monotonic()
    metrics: dict[str, Any] = {"name": recipe.name, **recipe.evaluate()}
    metrics["training"] = {
        "command": shlex.join(["foveate", *sys.argv[1:]]),
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        "processes": accelerator.num_processes,
        "device": device_name(accelerator.device),
        "training_seconds": round(seconds, 1),
        "evaluation_seconds": round(time.monotonic() - evaluated, 1),
        **environment(),
    }
    write_json(out / "metrics.json", metrics)
    return metrics


def environment() -> dict[str, Any]:
    """Versions, processor and number of cores, for `metrics.json`."""
    packages = (
        "foveate",
        "torch",
        "transformers",
        "timm",
        "accelerate",
        "tokenizers",
        "safetensors",
        "numpy",
    )
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "cpu": processor(), "cores": os.cpu_count()}


def write_json(file: Path, value: Any) -> None:
    """Writes JSON to a temporary name and renames it."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, file)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file to a temporary name and renames it."""
    partial = file.with_name(f".{file.name}.partial")
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial, {"format": "pt"})
    os.replace(partial, file)


def _mixed(*numbers: int) -> int:
    """One 63-bit seed out of several integers, by a linear congruence."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return mixed


def _optimizer(recipe: Recipe, settings: Settings) -> torch.optim.AdamW:
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, weight in recipe.model.named_parameters():
        if weight.requires_grad:
            groups.setdefault((recipe.rate(name), weight.ndim >= 2), []).append(weight)
    return torch.optim.AdamW(
        [
            {"params": some, "weight_decay": settings.weight_decay if decays else 0.0, "rate": rate}
            for (rate, decays), some in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
        ],
        lr=settings.lr,
        betas=(0.9, 0.98),
    )


def _loader(recipe: Recipe, settings: Settings, start: int, last: int, accelerator: Accelerator) -> DataLoader[Batch]:
    steps = _Steps(recipe, start, last, accelerator.process_index, accelerator.num_processes)
    if settings.workers == 0:
        return DataLoader(steps, batch_size=None)
    return DataLoader(steps, batch_size=None, num_workers=settings.workers, prefetch_factor=4)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def _checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, the latest last; half-written ones have a name that begins with a dot."""
    return sorted(out.glob("checkpoint-*")) if out.is_dir() else []


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _saved(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters, and buffers that belong to a state dict: the running statistics of a batch norm."""
    kept = model.state_dict()
    return {**_trained(model), **{name: value for name, value in model.named_buffers() if name in kept}}


def _save(
    out: Path,
    step: int,
    seconds: float,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    seed: int,
    settings: Settings,
) -> None:
    partial = out / ".checkpoint-partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    parameters = _trained(recipe.model)
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    moments = {
        f"{names[parameter]}|{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    write_tensors(partial / "model.safetensors", _saved(recipe.model))
    write_tensors(partial / "optimizer.safetensors", moments)
    state = {"recipe": recipe.name, "seed": seed, "step": step, "seconds": seconds}
    write_json(partial / "state.json", state | {"settings": dataclasses.asdict(settings)})
    earlier = _checkpoints(out)
    target = out / f"checkpoint-{step:07d}"
    if target in earlier:
        shutil.rmtree(target)
    os.replace(partial, target)
    for folder in earlier:
        if folder != target:
            shutil.rmtree(folder)


def _load(folder: Path, recipe: Recipe, optimizer: torch.optim.Optimizer, seed: int) -> tuple[int, float]:
    """Puts a checkpoint into the recipe's model and the optimizer; returns (steps done, seconds spent)."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if (state["recipe"], state["seed"]) != (recipe.name, seed):
        raise InputError(
            f"{folder} is of {state['recipe']} with seed {state['seed']}; give another --out or start afresh"
        )
    parameters = _trained(recipe.model)
    weights = load_file(folder / "model.safetensors")
    saved = _saved(recipe.model)
    shapes = {name: value.shape for name, value in saved.items()}
    if shapes != {name: w.shape for name, w in weights.items()}:
        raise InputError(f"{folder} is of a model of another shape; give another --out or start afresh")
    with torch.no_grad():
        for name, value in saved.items():
            value.copy_(weights[name])
    for key, value in load_file(folder / "optimizer.safetensors").items():
        name, _, field = key.rpartition("|")
        optimizer.state[parameters[name]][field] = value
    return int(state["step"]), float(state["seconds"])


def _truncate_log(file: Path, step: int) -> None:
    """Drops the lines of steps after the checkpoint: they will be written again."""
    if not file.is_file():
        return
    kept = [line for line in _complete_lines(file) if json.loads(line)["step"] < step]
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, file)


def _complete_lines(file: Path) -> Iterator[str]:
    """Lines that end with a newline: a killed run may leave half a line."""
    with file.open(encoding="utf-8") as lines:
        yield from (line for line in lines if line.endswith("\n"))


# ---------------------------------------------------------------------------------------------------------------------
# Progress


class _Report:
    """`log.jsonl`, and a progress bar on a terminal or a plain line every `log_every` steps elsewhere."""

    def __init__(self, log: Path, name: str, settings: Settings, start: int, active: bool) -> None:
        self.log, self.name, self.settings, self.start, self.active = log, name, settings, start, active
        self.console = Console(stderr=True)
        self.bar: Progress | None = None

    def __enter__(self) -> _Report:
        self.begun = time.monotonic()
        if self.active:
            self.file = self.log.open("a", encoding="utf-8")
            if self.console.is_terminal:
                columns = (
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeRemainingColumn(),
                )
                self.bar = Progress(*columns, console=self.console)
                self.task = self.bar.add_task(self.name, total=self.settings.steps, completed=self.start)
                self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.active:
            self.file.close()
        if self.bar is not None:
            self.bar.stop()

    def step(self, step: int, loss: float, lr: float, seconds: float, parts: dict[str, float]) -> None:
        if not self.active:
            return
        figures = {"loss": loss, "lr": lr, "seconds": seconds} | parts
        line = {"step": step} | {key: float(f"{value:.6g}") for key, value in figures.items()}
        # The loss is written in full: the log is what shows that a resumed run gave the same numbers.
        self.file.write(json.dumps(line | {"loss": loss}) + "\n")
        self.file.flush()
        done = step + 1
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=f"{self.name} loss {loss:.3f}")
        elif done % self.settings.log_every == 0 or done == self.settings.steps:
            left = (time.monotonic() - self.begun) / (done - self.start) * (self.settings.steps - done)
            shown = " ".join(f"{key} {value:.3f}" for key, value in parts.items())
            print(
                f"{self.name} {done}/{self.settings.steps} loss {loss:.3f} {shown} left {left / 60:.1f} min",
                file=sys.stderr,
                flush=True,
            )
