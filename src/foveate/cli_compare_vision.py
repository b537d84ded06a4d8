"""`foveate compare --task recognition|segmentation|pose`: models that look at pictures, and lifters of keypoints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from foveate.cli_common import (
    ALL,
    make_accelerator,
    parse_methods,
    printable,
    progress_bar,
    rows_kept,
    show_comparison,
)
from foveate.configuration import is_file
from foveate.method import InputError

SCENES, CLIPS = 256, 256
POSE = "pose"


def run(
    task: str, model: str | None, data: Path | None, methods: str | None, budgets: tuple[float, ...], out: Path,
    device: str, dtype: str, count: int | None, batch_size: int, seed: int,
) -> None:  # fmt: skip
    """What the command does for a task; exit code 1 where pictures had to be left out."""
    if task == POSE and model is None:
        raise InputError(
            "--task pose needs --model, a folder of a lifter: foveate train hot --set recovery=none --set keep=39"
        )
    names, folders = split_methods(methods) if task == POSE else named_methods(methods)
    accelerator = make_accelerator(device)
    if accelerator.num_processes > 1:
        raise InputError(f"--task {task} runs in one process; start it without accelerate launch")
    where = str(accelerator.device) if device == "auto" else device
    if task == POSE:
        assert model is not None
        _compare_poses(model, data, names, folders, budgets, out, where, count, batch_size, seed)
    else:
        _compare_pictures(task, model, data, names, folders, budgets, out, where, dtype, count, batch_size, seed)


def split_methods(methods: str | None) -> tuple[Sequence[str] | None, list[str]]:
    """Of --methods, names and configuration files (None for all), and folders of trained models."""
    from foveate.measure.vision_models import is_trained

    if methods is None:
        return None, []
    entries = [part.strip() for part in methods.split(",") if part.strip()]
    folders = [one for one in entries if not is_file(one) and is_trained(one)]
    names = [one for one in entries if one not in folders]
    return (None if ALL in names else names), folders


def named_methods(methods: str | None) -> tuple[Sequence[str] | None, list[str]]:
    """`split_methods`, with names checked. InputError for unknown ones, and for one that needs weights."""
    from foveate.measure.vision_models import check_untrained

    names, folders = split_methods(methods)
    for name in names or ():
        if not is_file(name):
            check_untrained(name)
    if names is None or (folders and not names):
        return names, folders
    return parse_methods(",".join(names)), folders


def _compare_poses(
    model: str, data: Path | None, names: Sequence[str] | None, folders: Sequence[str], budgets: tuple[float, ...],
    out: Path, device: str, count: int | None, batch_size: int, seed: int,
) -> None:  # fmt: skip
    from foveate.measure.compare_pose import compare_pose
    from foveate.measure.vision_models import load_trained

    trained = [load_trained(one, device) for one in folders]
    with rows_kept(out) as rows, progress_bar() as advance:
        comparison = compare_pose(
            model, names, trained, data=data, count=count or CLIPS, budgets=budgets, batch_size=batch_size, seed=seed,
            device=device, on_progress=advance, on_row=rows.append,
        )  # fmt: skip
    show_comparison(comparison, out, model)


def _compare_pictures(
    task: str, model: str | None, data: Path | None, names: Sequence[str] | None, folders: Sequence[str],
    budgets: tuple[float, ...], out: Path, device: str, dtype: str, count: int | None, batch_size: int, seed: int,
) -> None:  # fmt: skip
    import torch

    from foveate.measure.compare_vision import compare_vision
    from foveate.measure.vision_goals import goal_of
    from foveate.measure.vision_models import DEFAULT, load_trained, load_vision_model
    from foveate.measure.vision_samples import folder_samples, scene_samples

    kind: Any = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    host = load_vision_model(model or DEFAULT, device, kind)
    goal = goal_of(task, host)
    trained = [load_trained(one, device, kind) for one in folders]
    samples, notes = scene_samples(goal, count or SCENES, seed) if data is None else folder_samples(goal, data, count)
    with rows_kept(out) as rows, progress_bar() as advance:
        comparison, pictures = compare_vision(
            goal, samples, names, trained, budgets=budgets, batch_size=batch_size, seed=seed, notes=notes,
            on_progress=advance, on_row=rows.append,
        )  # fmt: skip
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    show_comparison(comparison, out, host.name, host.restored(pictures.pixels([0])[0]))
    for why in pictures.broken.values():
        print(f"left out: {printable(why)}", file=sys.stderr)
    if pictures.broken:
        raise typer.Exit(1)
