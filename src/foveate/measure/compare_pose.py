"""`compare --task pose`: which frames a lifter of 2-D keypoints to 3-D poses can do without."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate import zoo
from foveate.data.motion import Motions
from foveate.measure.comparison import (
    BUDGETS,
    Figure,
    Measured,
    Progress,
    Shown,
    Table,
    Task,
    TaskRow,
    check_budgets,
    choose,
)
from foveate.measure.environment import environment
from foveate.measure.flops import count_flops
from foveate.measure.timing import interleave, seconds
from foveate.measure.vision_models import Trained, load_trained
from foveate.method import InputError
from foveate.methods.reduce.hot import Hot, Lifted
from foveate.tokens import take
from foveate.train.hot import Averaged

TIMED = 4
"""Clips of the batch that FLOPs and time are of."""
POSE = Task(
    "pose",
    (
        Figure(
            "MPJPE", "mean distance of the joints to where they are, relative to the pelvis", "mean joint error",
            unit="mm", near=1.0, lower=True,
        ),
        Figure("velocity", "mean distance of the joints' steps from frame to frame", unit="mm", lower=True),
        Figure("to dense", "mean distance of the joints to those of dense's poses", unit="mm", lower=True),
    ),
    heading="Which frames can {model} do without?",
    work=f"{TIMED} clips",
    inside="lifter",
    budget="frames in the layers behind the one where they go, as a share of all",
    tokens="frames",
    samples=("clip", "clips"),
)  # fmt: skip
SELECTIONS = {"grid": "uniform", "pool": "uniform", "random": "random", "hot": "density"}
"""Name in the table -> how frames are chosen. Those in between come from both sides, linearly; pool's are means."""


@dataclass(frozen=True)
class PoseComparison(Table[TaskRow]):
    """All rows, dense first."""

    notes: list[str] = field(default_factory=list)

    row_type: ClassVar[type[Measured]] = TaskRow

    @property
    def task(self) -> Task:
        return POSE


def load_lifter(folder: str, device: str = "cpu") -> Hot:
    """A lifter that sees all frames in all layers, of a folder that `foveate train hot` wrote; in evaluation mode.

    Raises:
        InputError: for another folder, and for a lifter that leaves frames out itself.
    """
    # Given by name, so that a folder without metrics.json will do.
    lifter: Hot = load_trained(folder if "=" in folder else f"hot={folder}", device).model
    if lifter.keep < lifter.frames or lifter.recover is not None:
        raise InputError(
            f"{folder} leaves out frames itself ({lifter.keep} of {lifter.frames} stay): name it in --methods, and in "
            f"--model the lifter as it is: foveate train hot --set recovery=none --set keep={lifter.frames}"
        )
    return lifter


def reduced(lifter: Hot, settings: dict[str, Any], name: str, keep: int) -> Hot:
    """The same weights with `keep` frames behind the layer where frames go; `settings` are those the lifter is of.

    Raises:
        InputError: for a host whose layers are tied to the number of frames.
    """
    layer = min(
        settings.get("prune_layer", inspect.signature(Hot).parameters["prune_layer"].default), lifter.lifter.depth - 1
    )
    changes = {"keep": keep, "recovery": "linear", "select": SELECTIONS[name], "prune_layer": layer, "tie_noise": 0.0}
    made = (Averaged if name == "pool" else Hot)(**settings | changes)
    own = made.state_dict()
    state = lifter.state_dict()
    if any(key not in state or state[key].shape != own[key].shape for key in own if key != "position"):
        raise InputError(
            f"the layers of {settings.get('host', 'this host')} are tied to their number of frames: train it so"
        )
    made.load_state_dict(state, strict=False)
    return made.to(next(lifter.parameters()).device).eval()


def compare_pose(
    model: str,
    names: Sequence[str] | None = None,
    trained: Sequence[Trained] = (),
    *,
    data: Path | None = None,
    count: int = 256,
    budgets: Sequence[float] = BUDGETS,
    batch_size: int = 32,
    timing_pairs: int = 10,
    seed: int = 0,
    device: str = "cpu",
    on_progress: Progress | None = None,
    on_row: Callable[[TaskRow], None] | None = None,
) -> PoseComparison:
    """Measures a lifter with fewer frames in its deep layers, chosen without any training, and trained ones beside it.

    Args:
        model: see `load_lifter`.
        names: "hot" or nothing; None for all. Baselines (random, grid, pool) are always there.
        trained: other lifters, measured as they are.
        data: a folder of motions, None for those of the package pybullet; every fourth by name is seen (`Motions`).
        count: clips.
        budgets, batch_size, timing_pairs, on_progress, on_row: as for `foveate.compare`.
        seed: of clips, cameras and the random choice.

    Raises:
        InputError: for what is no lifter, no motions, budgets out of range, methods that are not for lifters.
    """
    check_budgets(budgets)
    if wrong := next((name for name in names or () if name != "hot"), None):
        raise InputError(f"{wrong} does not choose frames of a pose lifter; hot does")
    lifter = load_lifter(model, device)
    settings = zoo.read_json(model.partition("=")[2] or model, "config.json", "lifter")
    motions = Motions("test", seed, frames=lifter.frames, folder=data)
    windows = [motions[k] for k in range(count)]
    keypoints, poses = (torch.stack([torch.from_numpy(one) for one in some]).to(device) for some in zip(*windows))
    keypoints = keypoints[..., : settings.get("channels", 2)]
    variants = ("random", "grid", "pool", *(("hot",) if names is None or "hot" in names else ()))
    bench = _Bench(lifter, keypoints, poses, batch_size, timing_pairs, seed, on_progress)
    bench.total = (1 + len(variants) * len(budgets) + len(trained)) * -(-count // batch_size)
    rows = [bench.dense()]
    if on_row:
        on_row(rows[0])

    def note(row: TaskRow) -> None:
        rows.append(row)
        if on_row:
            on_row(row)

    for name in variants:
        for budget in budgets:
            keep = max(1, int(lifter.frames * budget + 1e-9))
            try:
                other = reduced(lifter, settings, name, keep)
                changes = {"select": other.select, "keep": keep, "recovery": "linear", "prune_layer": other.prune_layer}
                note(bench.row(other, name, budget, name != "hot", changes))
            except InputError as error:
                note(TaskRow(name, budget, name != "hot", refused=str(error)))
    for one in trained:
        if one.slug != "hot":
            raise InputError(f"{one.folder}: a {one.slug} lifts no poses")
        if one.model.frames != lifter.frames:
            raise InputError(f"{one.folder} is for {one.model.frames} frames, {model} for {lifter.frames}")
        note(bench.row(one.model, "hot", round(one.model.keep / lifter.frames, 4), False, {"weights": one.folder}))
    choice, why = choose(rows, POSE)
    surroundings = environment(device, torch.float32, seed) | {"batch_size": batch_size}
    notes = [f"Clips: {', '.join(motions.clips)}; cameras are made up, with noise on the keypoints"]
    shown = Shown(f"motions/test/{seed}/0", "", None, "")
    return PoseComparison(rows, surroundings, count, choice, why, [], shown, notes)


class _Bench:
    """One lifter under measurement."""

    def __init__(
        self, lifter: Hot, keypoints: Tensor, poses: Tensor, batch_size: int, pairs: int, seed: int,
        on_progress: Progress | None,
    ) -> None:  # fmt: skip
        self.lifter, self.keypoints, self.poses, self.size, self.pairs = lifter, keypoints, poses, batch_size, pairs
        self.seed, self.done, self.total = seed, 0, 0
        self.on_progress = on_progress or (lambda done, total, text: None)
        self._few = keypoints[:TIMED]
        self._flops = 0
        self._reference = poses

    @torch.inference_mode()
    def _lifted(self, lifter: Hot, label: str) -> Lifted:
        """All clips; random choices are the same in every run."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            parts = []
            for some in self.keypoints.split(self.size):
                parts.append(lifter.lift(some))
                self.done += 1
                self.on_progress(self.done, self.total, label)
        return Lifted(*(torch.cat([getattr(one, name) for one in parts]) for name in ("poses", "kept", "frames")))

    def _figures(self, lifted: Lifted) -> dict[str, float]:
        def at_frames(poses: Tensor) -> Tensor:
            return take(poses.flatten(2), lifted.frames).unflatten(2, poses.shape[2:])

        def apart(one: Tensor, other: Tensor) -> float:
            return 1000 * float((one - other).norm(dim=-1).mean())

        found = {
            "MPJPE": apart(lifted.poses, at_frames(self.poses)),
            "to dense": apart(lifted.poses, at_frames(self._reference)),
        }
        if lifted.frames.shape[1] == self.poses.shape[1]:
            found["velocity"] = apart(lifted.poses.diff(dim=1), self.poses.diff(dim=1))
        return found

    def dense(self) -> TaskRow:
        lifted = self._lifted(self.lifter, "dense")
        self._reference = lifted.poses
        with torch.inference_mode():
            self._flops = count_flops(lambda: self.lifter(self._few))
        stages = (("input", float(self.lifter.frames)),)
        figures = self._figures(lifted)
        return TaskRow("dense", 1.0, True, {}, stages, 1.0, self._flops, 1.0, 1.0, 1.0, 1.0, figures=figures)

    def row(self, other: Hot, name: str, budget: float, baseline: bool, settings: dict[str, Any]) -> TaskRow:
        lifted = self._lifted(other, name)
        with torch.inference_mode():
            flops = count_flops(lambda: other(self._few))

        def once(lifter: Hot) -> float:
            with torch.inference_mode():
                return seconds(lambda: lifter(self._few), self._few.device)

        time = interleave(lambda: once(self.lifter), lambda: once(other), self.pairs)
        stages = (("input", float(other.frames)), (f"layer[{other.prune_layer}]", float(other.keep)))
        return TaskRow(
            name, budget, baseline, settings, stages, other.keep / other.frames, flops, flops / self._flops, time.ratio,
            time.low, time.high, figures=self._figures(lifted),
        )  # fmt: skip
