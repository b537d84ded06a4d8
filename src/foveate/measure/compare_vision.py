"""`compare --task recognition|segmentation`: what each method costs and gives on a model that looks at pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from foveate.apply import apply
from foveate.configuration import describe
from foveate.data.inputs import read_image
from foveate.data.picture_folder import IGNORED, labelled_pictures, masked_pictures, patch_majority, read_mask
from foveate.data.scenes import NAMES, Scenes, patch_labels, presence
from foveate.hosts import adapt
from foveate.hosts.vision import VisionHost
from foveate.measure.comparison import (
    BUDGETS,
    Entry,
    Figure,
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
from foveate.measure.quality import kl_divergence
from foveate.measure.timing import Timing, interleave, seconds
from foveate.measure.vision_models import Trained, VisionModel, fitted, spelled
from foveate.method import HostShape, InputError, registry

TIMED = 8
"""Pictures of the batch that FLOPs and time are of."""
_CACHE_BYTES = 2**30
"""Prepared pictures are kept up to this size; those beyond it are read anew for every method."""
_BACKGROUND = "background"

_AGREEMENT = "agreement with dense"
RECOGNITION = Task(
    "recognition",
    (
        Figure("mAP", "mean over the names of the average precision of finding them", "mAP", near=0.01),
        Figure("top-1", "share of pictures whose class has the greatest logit", "top-1 accuracy", near=0.01),
        Figure("top-5", "share of pictures whose class is among the five greatest logits"),
        Figure(
            "agreement", "share of pictures with the same class (of models with several: the same set) as dense says",
            _AGREEMENT, near=0.01,
        ),
        Figure("KL", "divergence of the classes from dense's, in nats; 0 is the same", unit="nats", decimals=3),
    ),
    heading="Which visual tokens can {model} do without?",
    work=f"{TIMED} pictures",
    inside="encoder",
    budget="visual tokens at the encoder's end, as a share of all",
    samples=("picture", "pictures"),
)  # fmt: skip
SEGMENTATION = Task(
    "segmentation",
    (
        Figure("mean IoU", "intersection over union of the patches' classes, mean over these", "mean IoU", near=0.01),
        Figure("patches right", "share of patches with the right class"),
        Figure("agreement", "share of patches with the same class as dense says", _AGREEMENT, near=0.01),
        Figure("KL", "divergence of a patch's classes from dense's, in nats; 0 is the same", unit="nats", decimals=3),
    ),
    heading="Which visual tokens can {model} do without?",
    work=f"{TIMED} pictures",
    inside="encoder",
    budget="visual tokens at the encoder's end, as a share of all",
    samples=("picture", "pictures"),
)  # fmt: skip
TASKS = {task.name: task for task in (RECOGNITION, SEGMENTATION)}


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


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture that is read when it is needed.

    Attributes:
        id: for messages and results.
        read: the picture, and what is right: (classes,) float with 1 for each name that is there; or () long, the
            class, -1 for one that the model does not know; or (patches,) long, the class of each patch.
    """

    id: str
    read: Callable[[], tuple[Image.Image, Tensor]]


class Prepared:
    """Pictures as pixels, in batches. Those that cannot be read are left out and stand in `broken`, id -> why.

    Raises InputError where none is left.
    """

    def __init__(
        self, samples: Sequence[Sample], prepare: Callable[[Image.Image], Tensor], batch_size: int,
        on_progress: Progress,
    ) -> None:  # fmt: skip
        self.samples: list[Sample] = []
        self.broken: dict[str, str] = {}
        self._prepare, self._size = prepare, batch_size
        self._kept: dict[int, Tensor] = {}
        truth, held = [], 0
        for number, sample in enumerate(samples):
            try:
                picture, right = sample.read()
            except InputError as error:
                self.broken[sample.id] = str(error)
                continue
            pixels = prepare(picture)
            if (held := held + pixels.numel() * pixels.element_size()) <= _CACHE_BYTES:
                self._kept[len(self.samples)] = pixels
            self.samples.append(sample)
            truth.append(right)
            if number % batch_size == 0:
                on_progress(number, len(samples), "reading pictures")
        if not truth:
            raise InputError(f"none of the {len(samples)} pictures can be read: {next(iter(self.broken.values()))}")
        self.truth = torch.stack(truth)

    def pixels(self, places: Sequence[int]) -> Tensor:
        """(B, 3, H, W)."""
        return torch.stack([self._kept[k] if k in self._kept else self._anew(k) for k in places])

    def _anew(self, place: int) -> Tensor:
        return self._prepare(self.samples[place].read()[0])

    def __len__(self) -> int:
        return -(-len(self.samples) // self._size)

    def __iter__(self) -> Iterator[Tensor]:
        for first in range(0, len(self.samples), self._size):
            yield self.pixels(range(first, min(first + self._size, len(self.samples))))


# ---------------------------------------------------------------------------------------------------------------------
# What is measured of a task


class Recognition:
    """Logits (B, classes) and what is right of them."""

    task = RECOGNITION

    def __init__(self, host: VisionModel) -> None:
        self.host = host

    def dense(self, pixels: Tensor) -> Tensor:
        return self.host.logits(pixels)

    def reduced(self, pixels: Tensor, applied: Any) -> Tensor:
        return self.host.logits(pixels)

    def trained(self, other: Trained, pixels: Tensor) -> Tensor:
        if other.slug in ("dtop", "hot"):
            raise InputError(f"{other.slug} names no picture")
        output: Tensor = other.model(pixels)
        if output.shape[1] != len(self.host.classes):
            raise InputError(f"{other.folder} has {output.shape[1]} classes, {self.host.name} {len(self.host.classes)}")
        return output.float()

    def figures(self, said: Tensor, dense: Tensor, truth: Tensor) -> dict[str, float]:
        several = self.host.scenes
        if several:
            same = ((said > 0) == (dense > 0)).all(1)
            kl = _binary_kl(dense, said)
        else:
            same, kl = said.argmax(1) == dense.argmax(1), kl_divergence(dense, said)
        found = {"agreement": float(same.float().mean()), "KL": float(kl.mean())}
        if truth.ndim == 2:
            return {"mAP": average_precision(said, truth)} | found
        known = truth >= 0
        if not bool(known.any()):
            return found
        ranks = said[known].topk(min(5, said.shape[1]), 1).indices == truth[known].unsqueeze(1)
        top = {"top-1": float(ranks[:, 0].float().mean())}
        if said.shape[1] > 5:
            top["top-5"] = float(ranks.any(1).float().mean())
        return top | found

    def expected(self, truth: Tensor) -> str | None:
        if truth.ndim:
            return self._names(truth.nonzero().flatten())
        return None if truth < 0 else self._names(truth.reshape(1))

    def words(self, said: Tensor, truth: Tensor) -> str:
        """What the model says of one picture, logits (classes,)."""
        return self._names((said > 0).nonzero().flatten() if self.host.scenes else said.argmax().reshape(1))

    def _names(self, classes: Tensor) -> str:
        return (
            ", ".join(min(self.host.classes[k], key=len, default=f"class {k}") for k in classes.tolist()) or "nothing"
        )


class Segmentation:
    """Logits (B, classes, patches) and what is right of them. A patch whose token was merged has what that token has;
    where it was dropped, that of the nearest patch that was not."""

    task = SEGMENTATION

    def __init__(self, host: VisionModel) -> None:
        self.host = host
        self.grid: tuple[int, int] = tuple(host.model.patch_embed.grid_size)
        self.patch = int(host.model.patch_embed.patch_size[0])
        self.classes = (_BACKGROUND, *NAMES)

    def dense(self, pixels: Tensor) -> Tensor:
        model, seen = self.host.model, list[Tensor]()
        # The whole forward, so that a method's hooks see it; those on the norm came before this one.
        handle = model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            model(pixels)
        finally:
            handle.remove()
        logits: Tensor = model.patch_head(seen[-1][:, model.num_prefix_tokens :])
        return logits.float().transpose(1, 2)

    def reduced(self, pixels: Tensor, applied: Any) -> Tensor:
        logits = self.dense(pixels)
        if not applied.trace:
            return logits
        token = nearest_source(applied.trace[-1].source, self.grid)
        return logits.gather(2, token.unsqueeze(1).expand(-1, logits.shape[1], -1))

    def trained(self, other: Trained, pixels: Tensor) -> Tensor:
        if other.slug == "dtop":
            scores: Tensor = other.model.patch_scores(other.model.stages(pixels)).flatten(2).float()
            # Of "atm" heads scores are no logits, but as logarithms they are, up to a constant.
            scores = scores if other.model.head == "linear" else scores.clamp(min=1e-9).log()
        elif other.slug == "stvit" and other.patch_head is not None:
            scores = other.patch_head(other.model.forward_features(pixels)).float().transpose(1, 2)
        else:
            raise InputError(f"{other.folder} has no classes for patches; dtop has, and stvit that recovers its tokens")
        wanted = (len(self.classes), self.grid[0] * self.grid[1])
        if tuple(scores.shape[1:]) != wanted:
            raise InputError(
                f"{other.folder} has {scores.shape[1]} classes for {scores.shape[2]} patches, {self.host.name} "
                f"{wanted[0]} for {wanted[1]}"
            )
        return scores

    def figures(self, said: Tensor, dense: Tensor, truth: Tensor) -> dict[str, float]:
        found = said.argmax(1)
        counted = truth != IGNORED
        count = len(self.classes)
        pairs = (truth[counted] * count + found[counted]).bincount(minlength=count * count).view(count, count)
        there = pairs.sum(0) + pairs.sum(1) > 0
        shared = pairs.diag().double()
        iou = shared / (pairs.sum(0) + pairs.sum(1) - shared).clamp(min=1)
        kl = kl_divergence(dense.transpose(1, 2), said.transpose(1, 2))
        return {
            "mean IoU": float(iou[there].mean()),
            "patches right": float(shared.sum() / pairs.sum().clamp(min=1)),
            "agreement": float((found == dense.argmax(1)).float().mean()),
            "KL": float(kl.mean()),
        }

    def expected(self, truth: Tensor) -> str | None:
        return ", ".join(self.classes[k] for k in truth.unique().tolist() if 0 < k < len(self.classes)) or _BACKGROUND

    def words(self, said: Tensor, truth: Tensor) -> str:
        counted = truth != IGNORED
        right = int((said.argmax(0)[counted] == truth[counted]).sum())
        return f"{right} of {int(counted.sum())} patches right"


Goal = Recognition | Segmentation


def nearest_source(source: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, M) long: the token of each patch; where it has none (-1), that of the nearest patch of the grid that has one,
    the first of several. A picture without any token has 0 everywhere."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    place = torch.stack([rows.flatten(), columns.flatten()], 1).to(source.device)
    apart = (place[:, None] - place[None]).square().sum(-1)
    held = source >= 0
    far = int(apart.max()) + 1
    nearest = torch.where(held[:, None], apart, far).argmin(2)
    return source.gather(1, nearest).clamp(min=0)


def average_precision(logits: Tensor, truth: Tensor) -> float:
    """Mean over the names that occur, of logits and (N, names) of 0 and 1."""
    try:
        from torchmetrics.functional.classification import multilabel_average_precision
    except ImportError:
        raise InputError("mean average precision needs torchmetrics: pip install 'foveate[metrics]'") from None
    there = truth.sum(0) > 0
    each = multilabel_average_precision(logits[:, there], truth[:, there].long(), int(there.sum()), average="macro")
    return float(each)


def _binary_kl(dense: Tensor, said: Tensor) -> Tensor:
    """(B,): sum over the names of the divergence between two yes or no decisions."""
    pairs = [torch.stack([one, torch.zeros_like(one)], -1) for one in (dense, said)]
    return kl_divergence(*pairs).sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def scene_samples(goal: Goal, count: int, seed: int = 0) -> tuple[list[Sample], list[str]]:
    """Held-out scenes, and notes. What is right of them is known where the model knows the things of scenes."""
    scenes, notes = Scenes("test", seed), []
    if isinstance(goal, Recognition) and not goal.host.scenes:
        notes = [f"{goal.host.name} does not know the things of scenes: agreement with dense and KL only"]

    def read(number: int) -> tuple[Image.Image, Tensor]:
        scene = scenes[number]
        if isinstance(goal, Segmentation):
            right = torch.from_numpy(patch_labels(scene, goal.patch)).flatten()
        else:
            right = torch.from_numpy(presence(scene)) if goal.host.scenes else torch.tensor(-1)
        return Image.fromarray(scene.image), right

    return [Sample(f"scenes/test/{seed}/{k}", partial(read, k)) for k in range(count)], notes


def folder_samples(goal: Goal, folder: Path, count: int | None = None) -> tuple[list[Sample], list[str]]:
    """The pictures of a folder (see `foveate.data.picture_folder`), and notes on classes that the model does not have.

    Raises:
        InputError: for a folder that is not of that form.
    """
    if isinstance(goal, Segmentation):
        return [_masked(goal, picture, mask) for picture, mask in masked_pictures(folder, count)], []
    files = labelled_pictures(folder, count)
    number = class_numbers(goal.host.classes, sorted({name for _, name in files}))

    def read(file: Path, name: str) -> tuple[Image.Image, Tensor]:
        return read_image(file), torch.tensor(number[name])

    samples = [Sample(str(file), partial(read, file, name)) for file, name in files]
    unknown = [name for name, one in number.items() if one < 0]
    if not unknown:
        return samples, []
    if len(unknown) == len(number):
        return samples, [
            f"no folder of {folder} is called as a class of {goal.host.name}: agreement with dense and KL only"
        ]
    told = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
    return samples, [
        f"{len(unknown)} of {len(number)} classes are none of {goal.host.name}'s ({told}): not in top-1, top-5"
    ]


def class_numbers(classes: Sequence[frozenset[str]], names: Sequence[str]) -> dict[str, int]:
    """Of each name the number of the class that is called so; -1 where there is none, or several."""
    owners: dict[str, set[int]] = {}
    for number, synonyms in enumerate(classes):
        for one in synonyms:
            owners.setdefault(one, set()).add(number)
    found = {name: owners.get(spelled(name), set()) for name in names}
    return {name: next(iter(own)) if len(own) == 1 else -1 for name, own in found.items()}


def _masked(goal: Segmentation, picture: Path, mask: Path) -> Sample:
    side = goal.grid[0] * goal.patch

    def read() -> tuple[Image.Image, Tensor]:
        shown, numbers = read_image(picture), read_mask(mask, len(goal.classes))
        if shown.size != numbers.size:
            raise InputError(f"{mask}: {numbers.size} px, its picture {shown.size}")
        labels = patch_majority(np.asarray(fitted(numbers, side, Image.Resampling.NEAREST)), goal.patch)
        return shown, torch.from_numpy(labels).flatten()

    return Sample(str(picture), read)


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


def goal_of(task: str, host: VisionModel) -> Goal:
    """What a task measures on a model; InputError for a model that cannot do it."""
    if task == RECOGNITION.name:
        return Recognition(host)
    if not hasattr(host.model, "patch_head"):
        raise InputError(
            f"{host.name} has no classes for patches; --task segmentation needs tiny-vit, or one of its kind"
        )
    return Segmentation(host)


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
