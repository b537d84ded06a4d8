"""`compare --task recognition|segmentation`: what each method costs and gives on a model that looks at pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.apply import apply
from foveate.configuration import describe
from foveate.hosts import adapt
from foveate.hosts.vision import VisionHost
from foveate.measure.comparison import (
    BUDGETS,
    Entry,
    Measured,
    Progress,
    Shown,
    Table,
    Task,
    TaskRow,
    candidates,
    check_budgets,
    choose,
    name_of,
    plan,
    set_up,
)
from foveate.measure.environment import environment
from foveate.measure.flops import count_flops
from foveate.measure.provenance import Overlay, encoder_overlay
from foveate.measure.timing import Timing, interleave, seconds
from foveate.measure.vision_goals import RECOGNITION, TASKS, TIMED, Goal
from foveate.measure.vision_models import Trained
from foveate.measure.vision_samples import Prepared, Sample
from foveate.method import HostShape, InputError, registry


@dataclass(frozen=True)
class VisionComparison(Table[TaskRow]):
    """All rows, dense first. FLOPs and time are of a batch of `TIMED` pictures, the first of which is `shown`.

    Attributes:
        name: of the task.
        notes: what a reader has to know of the data.
    """

    name: str = RECOGNITION.name
    notes: list[str] = field(default_factory=list)

    row_type: ClassVar[type[Measured]] = TaskRow

    @property
    def task(self) -> Task:
        return TASKS[self.name]


def baselines_of(shape: HostShape) -> tuple[str, ...]:
    """The baselines that such a host has the stages for."""
    known = registry()
    return tuple(
        slug for slug, cls in known.items()
        if cls.card.baseline and slug != "dense" and any(stage in shape.stages for stage in cls.handlers())
    )  # fmt: skip


def methods_of(shape: HostShape) -> tuple[str, ...]:
    """The methods that need no training and act inside such a host. What acts behind the encoder alone spares a
    language model tokens, which there is none of."""
    known = registry()
    return tuple(slug for slug in candidates(shape.family) if set(known[slug].handlers()) != {"vision.output"})


def compare_vision(
    goal: Goal,
    samples: Sequence[Sample],
    methods: Sequence[Entry] | None = None,
    trained: Sequence[Trained] = (),
    *,
    budgets: Sequence[float] = BUDGETS,
    baselines: Sequence[str] | None = None,
    batch_size: int = 32,
    timing_pairs: int = 10,
    seed: int = 0,
    notes: Sequence[str] = (),
    on_progress: Progress | None = None,
    on_row: Callable[[TaskRow], None] | None = None,
) -> tuple[VisionComparison, Prepared]:
    """Measures every method, baseline and trained model; quality over all pictures, FLOPs and time of the first few.

    Args:
        goal: of `goal_of`.
        samples: pictures, read when they are needed.
        methods, budgets, baselines, batch_size, timing_pairs, seed, on_progress, on_row: as for `foveate.compare`;
            budgets are shares of the tokens at the encoder's end. None for all of `methods_of`, () for none.
        trained: measured once each, as they are.
        notes: on the data, kept with the results.

    Returns:
        the comparison, and the pictures with what could not be read of them.

    Raises:
        InputError: no sample that can be read, a model without adapter, a budget out of range, unknown names, a method
            in `methods` that can be set to none of the budgets on this model.
    """
    check_budgets(budgets)
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}")
    progress = on_progress or (lambda done, total, text: None)
    model = goal.host.model
    shape = adapt(model).shape
    baselines = baselines_of(shape) if baselines is None else baselines
    methods = methods_of(shape) if methods is None else methods
    planned: list[tuple[Entry | Trained, float]] = [*plan(model, shape, methods, baselines, budgets)]
    planned += [(one, 0.0) for one in trained]
    pictures = Prepared(samples, goal.host.prepare, batch_size, progress)
    bench = _Bench(goal, pictures, shape, timing_pairs, progress, len(pictures) * (1 + len(planned)))
    rows, overlays = [bench.dense()], []
    if on_row:
        on_row(rows[0])
    for entry, budget in planned:
        row, drawn = bench.row(entry, budget)
        rows.append(row)
        overlays += [drawn] if drawn is not None else []
        if on_row:
            on_row(row)
    choice, why = choose(rows, goal.task)
    surroundings = environment(goal.host.device, goal.host.dtype, seed) | {"batch_size": batch_size}
    comparison = VisionComparison(
        rows, surroundings, len(pictures.samples), choice, why, overlays, bench.shown, goal.task.name, list(notes)
    )
    return comparison, pictures


class _Bench:
    """One model under measurement."""

    def __init__(
        self, goal: Goal, pictures: Prepared, shape: HostShape, pairs: int, on_progress: Progress, total: int
    ) -> None:
        self.goal, self.pictures, self.shape, self.pairs = goal, pictures, shape, pairs
        self.on_progress, self.done, self.total = on_progress, 0, total
        self.shown: Shown | None = None
        self._few = self._placed(pictures.pixels(range(min(TIMED, len(pictures.samples)))))
        self._reference = torch.empty(0)
        self._flops = 0

    def _placed(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.goal.host.device, self.goal.host.dtype)

    @torch.inference_mode()
    def _all(self, run: Callable[[Tensor], Tensor], label: str, note: Callable[[], None] = lambda: None) -> Tensor:
        """What is said of all pictures, on the CPU; `note` is called after each batch."""
        said = []
        for pixels in self.pictures:
            said.append(run(self._placed(pixels)).float().cpu())
            note()
            self.done += 1
            self.on_progress(self.done, self.total, label)
        return torch.cat(said)

    def dense(self) -> TaskRow:
        self._reference = self._all(self.goal.dense, "dense")
        with torch.inference_mode():
            self._flops = count_flops(lambda: self.goal.dense(self._few))
        truth = self.pictures.truth
        self.shown = Shown(
            self.pictures.samples[0].id, "", self.goal.expected(truth[0]), self.goal.words(self._reference[0], truth[0])
        )
        figures = self.goal.figures(self._reference, self._reference, truth)
        stages = (("vision.input", float(self.shape.patches)),)
        return TaskRow("dense", 1.0, True, {}, stages, 1.0, self._flops, 1.0, 1.0, 1.0, 1.0, figures=figures)

    def row(self, entry: Entry | Trained, budget: float) -> tuple[TaskRow, Overlay | None]:
        start = self.done
        if isinstance(entry, Trained):
            name, baseline, label = entry.slug, False, entry.folder
        else:
            name, baseline, label = name_of(entry, budget)
        try:
            if isinstance(entry, Trained):
                return self._trained(entry, label)
            return self._method(entry, budget, name, baseline, label)
        except InputError as error:
            self.done = start + len(self.pictures)
            self.on_progress(self.done, self.total, label)
            return TaskRow(name, budget, baseline, refused=str(error)), None

    def _method(
        self, entry: Entry, budget: float, name: str, baseline: bool, label: str
    ) -> tuple[TaskRow, Overlay | None]:
        goal = self.goal
        methods = set_up(entry, budget, self.shape)
        counts: dict[str, list[int]] = {}
        shares: list[float] = []
        with apply(goal.host.model, methods) as applied:
            assert isinstance(applied.host, VisionHost)

            def note() -> None:
                for record in applied.trace:
                    counts.setdefault(record.stage, []).extend(record.tokens_out)
                grid = applied.host.encoder.source_grid  # type: ignore[attr-defined]
                whole = grid[0] * grid[1]
                shares.extend([one / whole for one in applied.trace[-1].tokens_out] if applied.trace else [1.0])

            said = self._all(lambda pixels: goal.reduced(pixels, applied), label, note)
            with torch.inference_mode():
                flops = count_flops(lambda: goal.reduced(self._few, applied))
                drawn = encoder_overlay(applied.trace, self.shape, name, budget) if applied.trace else None

        def once(context: AbstractContextManager[Any]) -> float:
            # Putting the methods on and taking them off is no part of a forward.
            with context as applied, torch.inference_mode():
                return seconds(lambda: goal.reduced(self._few, applied), goal.host.device)

        dense = _Nothing()
        time = interleave(lambda: once(nullcontext(dense)), lambda: once(apply(goal.host.model, methods)), self.pairs)
        each = {one["method"]: one["settings"] for one in describe(methods)}
        after = ((stage, sum(left) / len(left)) for stage, left in counts.items())
        stages = (("vision.input", float(self.shape.patches)), *after)
        share = sum(shares) / len(shares)
        budget = budget or round(share, 4)
        row = self._measured(
            name, budget, baseline, each if len(methods) > 1 else each[name], stages, share, flops, time, said
        )
        return row, self._answered(drawn, budget, said)

    def _trained(self, entry: Trained, label: str) -> tuple[TaskRow, Overlay | None]:
        goal = self.goal

        def run(pixels: Tensor) -> Tensor:
            return goal.trained(entry, pixels)

        with torch.inference_mode():
            counts = tokens_by_layer(entry.model, self._few)
        said = self._all(run, label)
        with torch.inference_mode():
            flops = count_flops(lambda: run(self._few))

        def once(function: Callable[[Tensor], Tensor]) -> float:
            with torch.inference_mode():
                return seconds(lambda: function(self._few), goal.host.device)

        time = interleave(lambda: once(goal.dense), lambda: once(run), self.pairs)
        stages = tuple((f"layer[{number}]", count) for number, count in enumerate(counts))
        share = counts[-1] / counts[0] if counts else 1.0
        settings = {"weights": entry.folder}
        row = self._measured(entry.slug, round(share, 4), False, settings, stages, share, flops, time, said)
        with torch.inference_mode():
            drawn = trained_overlay(entry, self._few[:1], self.shape.grid, row.budget)
        return row, self._answered(drawn, row.budget, said)

    def _measured(
        self, name: str, budget: float, baseline: bool, settings: dict[str, Any], stages: tuple[tuple[str, float], ...],
        share: float, flops: int, time: Timing, said: Tensor,
    ) -> TaskRow:  # fmt: skip
        figures = self.goal.figures(said, self._reference, self.pictures.truth)
        return TaskRow(
            name, budget, baseline, settings, stages, share, flops, flops / self._flops, time.ratio, time.low,
            time.high, figures=figures,
        )  # fmt: skip

    def _answered(self, drawn: Overlay | None, budget: float, said: Tensor) -> Overlay | None:
        if drawn is None:
            return None
        words = self.goal.words(said[0], self.pictures.truth[0])
        return Overlay(drawn.method, budget, drawn.grid, drawn.depth, drawn.group, words)


class _Nothing:
    """In place of what `apply` returns, of the model as it is."""

    trace: ClassVar[list[Any]] = []


def tokens_by_layer(model: Any, pixels: Tensor) -> list[float]:
    """Tokens of a picture that each layer's MLP gets, class tokens left out, mean over the pictures; of a state-space
    model those of each layer. Empty for models of other kinds."""
    blocks = getattr(getattr(model, "backbone", None), "blocks", None)
    if blocks is None or not all(hasattr(block, "mlp") for block in blocks):
        if hasattr(model, "stages") and hasattr(found := model.stages(pixels), "counts"):
            return [float(count) for count in found.counts]
        return []
    counts = [0.0] * len(blocks)
    prefix = int(model.backbone.num_prefix_tokens)

    def counter(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            counts[number] += args[0].shape[:-1].numel() / len(pixels) - prefix

        return hook

    handles = [block.mlp.register_forward_pre_hook(counter(number)) for number, block in enumerate(blocks)]
    try:
        model(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def trained_overlay(trained: Trained, pixels: Tensor, grid: tuple[int, int], budget: float) -> Overlay | None:
    """Where the tokens of one picture went; None for models that do not tell.

    `dtop`: where each patch finished. Models that mix patches: which new token has most of each.
    """
    model: Any = trained.model
    patches = grid[0] * grid[1]
    if trained.slug == "dtop":
        finished = model.stages(pixels).finished[0].tolist()
        depth = tuple(model.exits[stage] / model.exits[-1] for stage in finished)
        return Overlay(trained.slug, budget, grid, depth, (-1,) * patches)
    if hasattr(model, "mixing") and not getattr(getattr(model, "semantic", None), "recovers", False):
        owner = model.mixing(pixels)[0].argmax(0)
        if len(owner) == patches:
            return Overlay(trained.slug, budget, grid, (1.0,) * patches, tuple(owner.tolist()))
    return None
