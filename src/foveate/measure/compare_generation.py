"""`compare --task generation`: what each method costs and gives on a generator of pictures, beside plain baselines.

Cost is that of one picture made alone; quality is of the pictures of all prompts, made in batches. Picture k of every
row begins with the same noise. An autoregressive model has no such noise: its methods draw other random numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

from foveate.generate import DENSE, DiffusionGenerator, Generator, settings_of
from foveate.measure.comparison import Figure, Measured, Progress, Table, Task, TaskRow, choose
from foveate.measure.environment import environment
from foveate.measure.flops import flop_counter
from foveate.measure.generation import FrechetDistance, Judge, Perceptual, adherence, named
from foveate.measure.timing import interleave, seconds
from foveate.method import InputError, Published

if TYPE_CHECKING:
    from PIL import Image

OTHER_NOISE = "other noise"
FEWER, MORE, SMALLER = "fewer steps", "more steps", "lower resolution"
SPECULATIVE = "plain speculative"
SHOWN = 6
"""Pictures of each row that a report shows."""
_LEAST = 2
"""Pictures to each of the judge's features, below which a Fréchet distance says nothing."""
_LUCK = 0.5
"""Greatest standard deviation of whether a caption holds."""
_SEED_STRIDE = 1_000_003
_OWN = ("denoiser", "model")
"""What counters of `Generator.at_work` call the model itself."""

OnRow = Callable[[TaskRow, Sequence["Image.Image"]], None]


def generation_task(judged: int, autoregressive: bool) -> Task:
    """The words and columns; `judged` captions name something that the judge knows."""
    return Task(
        "generation",
        (
            Figure("steps", "of the sampler; of an autoregressive model, tokens", unit="", decimals=0),
            Figure("calls", "runs of the model for one picture, mean over those that were timed", unit="", decimals=1),
            Figure("small calls", "of a smaller model that a method takes", unit="", decimals=1),
            Figure(
                "right", f"share of the {judged} captions whose objects tiny-vit ranks first in their pictures",
                "of captions right",
                # One standard error of the share; what is nearer may be luck.
                near=max(0.01, round(_LUCK / math.sqrt(judged), 3)) if judged else None,
            ),
            Figure(
                "Fréchet", "distance of the pictures to real scenes, on tiny-vit's features", unit="", lower=True,
                decimals=2,
            ),
            Figure("PSNR", "to dense's pictures from the same noise; – where all are the same", unit="dB"),
            Figure(
                "apart", "perceptual distance to these; 100 % is as far as pictures from other noise are",
                "of the way to other noise", near=0.1, lower=True,
            ),
        ),
        heading="What do the pictures of {model} cost?",
        work="one picture",
        inside="denoiser",
        budget="FLOPs as a share of dense: of methods measured, of baselines what they were set up for",
        samples=("prompt", "prompts"),
        cost="time" if autoregressive else "FLOPs",
        plain="plain speculative decoding" if autoregressive else "fewer steps and smaller pictures",
    )  # fmt: skip


@dataclass(frozen=True)
class GenerationComparison(Table[TaskRow]):
    """All rows, dense first; see `Table`.

    Attributes:
        judged: how many prompts name something that the judge knows.
        autoregressive: whether the model is.
    """

    judged: int = 0
    autoregressive: bool = False

    row_type: ClassVar[type[Measured]] = TaskRow

    @property
    def task(self) -> Task:
        return generation_task(self.judged, self.autoregressive)


@dataclass(frozen=True, eq=False)
class _Cost:
    """Of one picture, mean over those that are timed."""

    flops: float
    calls: float
    small_calls: float
    steps: int


@dataclass(frozen=True, eq=False)
class _Entry:
    """What makes a row: methods, or other settings of the generator."""

    name: str
    generator: Generator
    baseline: bool = True
    methods: tuple[Published, ...] = ()
    settings: Mapping[str, Any] | None = None
    budget: float | None = None
    cost: _Cost | None = None
    seed: int = 0


def compare_generation(
    generator: Generator,
    prompts: Sequence[str],
    entries: Mapping[str, Sequence[Published]],
    *,
    real: Tensor | None = None,
    refused: Mapping[str, str] | None = None,
    refusable: bool = False,
    batch_size: int = 16,
    timing_pairs: int = 5,
    judge: Judge | None = None,
    on_progress: Progress | None = None,
    on_row: OnRow | None = None,
) -> GenerationComparison:
    """Measures a generator as it is, with methods, and plain baselines of the same cost.

    Baselines of a pipeline: as many steps as cost the FLOPs of each method, and where that is less than dense as small
    pictures. Of an autoregressive model with a draft: plain speculative decoding. Of both: dense once more, from other
    noise, which shows how much is luck.

    Args:
        generator: on its device.
        prompts: one picture each.
        entries: label -> methods that are at work together.
        real: (n, 3, H, W) pictures for the Fréchet distance, which takes 256 prompts at least.
        refused: label -> why, of methods that are not tried.
        refusable: whether an entry that does not fit the model gets a row that says why; otherwise an InputError.
        batch_size: pictures made together.
        timing_pairs: interleaved pairs of dense and each row; FLOPs are counted on as many pictures.
        judge: tiny-vit's, if None.
        on_progress: called with (done, total, text) after each batch and each picture that is counted.
        on_row: called with each row as soon as it is measured, and its first `SHOWN` pictures.

    Raises:
        InputError: no prompts, numbers below 1, an entry that does not fit.
    """
    if not prompts:
        raise InputError("there are no prompts to compare on")
    for name, number in (("batch_size", batch_size), ("timing_pairs", timing_pairs)):
        if number < 1:
            raise InputError(f"{name} must be at least 1, not {number}")
    bench = _Bench(generator, prompts, real, batch_size, timing_pairs, judge or Judge(), on_progress)
    planned, refusals = bench.plan(entries, refusable)
    rows: list[TaskRow] = []

    def note(row: TaskRow, pictures: Sequence[Image.Image] = ()) -> None:
        rows.append(row)
        if on_row:
            on_row(row, pictures[:SHOWN])

    for number, entry in enumerate(planned):
        note(*bench.row(entry, number, len(planned)))
    for label, reason in {**refusals, **(refused or {})}.items():
        note(TaskRow(label, 0.0, False, refused=reason))
    judged, autoregressive = len(bench.named), not isinstance(generator, DiffusionGenerator)
    task = generation_task(judged, autoregressive)
    if judged or not autoregressive:
        choice, why = choose(rows, task)
    else:
        choice, why = None, "no prompt names an object that the judge knows; look at the pictures"
    facts = environment(generator.device, generator.dtype, generator.seed) | {
        "generator": generator.facts | generator.settings, "batch_size": batch_size, "pictures timed": bench.timed,
        "judge": bench.facts(),
    }  # fmt: skip
    return GenerationComparison(
        rows, facts, len(prompts), choice, why, judged=judged, autoregressive=autoregressive
    )  # fmt: skip


class _Bench:
    """One generator under measurement."""

    def __init__(
        self, generator: Generator, prompts: Sequence[str], real: Tensor | None, batch: int, pairs: int, judge: Judge,
        on_progress: Progress | None,
    ) -> None:  # fmt: skip
        self.generator, self.prompts, self.batch, self.pairs, self.judge = generator, prompts, batch, pairs, judge
        self.on_progress: Progress = on_progress or (lambda done, total, text: None)
        self.timed = min(pairs, len(prompts))
        self.named = [number for number, prompt in enumerate(prompts) if named(prompt)]
        self.real, self.perceptual = real, Perceptual(judge)
        enough = real is not None and len(prompts) >= _LEAST * judge.num_features
        self.frechet = FrechetDistance(judge).real(real) if real is not None and enough else None
        self.dense: Tensor = torch.empty(0)
        self._dense_cost: _Cost | None = None
        self._away = 1.0

    # -- what is measured

    def plan(self, entries: Mapping[str, Sequence[Published]], refusable: bool) -> tuple[list[_Entry], dict[str, str]]:
        """Everything in its order, dense first, and why some entries cannot be had; counts what methods cost."""
        asked = [_Entry(label, self.generator, False, tuple(methods)) for label, methods in entries.items()]
        if not isinstance(self.generator, DiffusionGenerator):
            asked = self._speculative() + asked
        methods: list[_Entry] = []
        refusals: dict[str, str] = {}

        def refuse(entry: _Entry, error: InputError) -> None:
            if not refusable and not entry.baseline:
                raise InputError(f"{entry.name}: {error}") from None
            refusals[entry.name] = str(error)

        # What cannot even be applied is told before anything is made.
        for entry in asked:
            try:
                with self.generator.at_work(entry.methods):
                    pass
            except InputError as error:
                refuse(entry, error)
        asked = [entry for entry in asked if entry.name not in refusals]
        total = len(asked) + 1
        self._dense_cost = dense = self._cost(self.generator, ())
        self.on_progress(1, total, f"counting {DENSE}")
        for number, entry in enumerate(asked, 2):
            try:
                cost = self._cost(self.generator, entry.methods)
            except InputError as error:
                refuse(entry, error)
                continue
            finally:
                self.on_progress(number, total, f"counting {entry.name}")
            described = {one.card.slug: settings_of(one) for one in entry.methods}
            settings = described if len(described) > 1 else next(iter(described.values()))
            budget = round(cost.flops / dense.flops, 2)
            methods.append(
                _Entry(entry.name, self.generator, entry.baseline, entry.methods, settings, budget, cost)
            )  # fmt: skip
        plain = [
            _Entry(DENSE, self.generator, settings={}, budget=1.0, cost=dense),
            _Entry(OTHER_NOISE, self.generator, settings={}, budget=1.0, cost=dense, seed=1),
        ]
        if isinstance(self.generator, DiffusionGenerator):
            plain += self._equal_cost(self.generator, dense, [one.cost for one in methods if one.cost])
        return plain + methods, refusals

    def _speculative(self) -> list[_Entry]:
        try:
            return [_Entry(SPECULATIVE, self.generator, methods=self.generator.build("lantern", delta=0.0))]
        except InputError:
            return []  # there is no draft

    def _equal_cost(self, generator: DiffusionGenerator, dense: _Cost, costs: Sequence[_Cost]) -> list[_Entry]:
        """Numbers of steps and sizes whose FLOPs are nearest to those of methods."""
        found: dict[tuple[str, Any], _Entry] = {}

        def add(name: str, share: float, **settings: Any) -> None:
            entry = _Entry(name, generator.changed(**settings), settings=settings, budget=round(share, 2))
            found.setdefault((name, tuple(settings.values())), entry)

        steps_of = self._steps_of(generator, dense)
        height, width = generator.size
        unit = math.lcm(8, 2 * generator.scale)
        for cost in costs:
            share = cost.flops / dense.flops
            steps = steps_of(cost.flops)
            if steps != dense.steps:
                add(FEWER if steps < dense.steps else MORE, share, num_inference_steps=steps)
            sides = [max(unit, round(side * math.sqrt(share) / unit) * unit) for side in (height, width)]
            if height and share < 1 and sides != [height, width]:
                add(SMALLER, share, height=sides[0], width=sides[1])
        return sorted(found.values(), key=lambda one: one.name)

    def _steps_of(self, generator: DiffusionGenerator, dense: _Cost) -> Callable[[float], int]:
        """FLOPs -> the number of steps that comes nearest: a picture costs as much as its steps, and something more."""
        half = max(1, dense.steps // 2)
        if half == dense.steps:
            return lambda flops: max(1, round(flops / dense.flops))
        other = self._cost(generator.changed(num_inference_steps=half), ())
        step = (dense.flops - other.flops) / (dense.steps - half)
        return lambda flops: max(1, dense.steps + round((flops - dense.flops) / step))

    # -- cost

    def _seed(self, number: int, other: int = 0) -> int:
        return _SEED_STRIDE * (self.generator.seed + other) + number

    def _alone(self, generator: Generator, number: int) -> int:
        """Makes a picture by itself, and returns its steps."""
        return generator.make([self.prompts[number]], [self._seed(number)], _ignore)[1]

    def _cost(self, generator: Generator, methods: Sequence[Published]) -> _Cost:
        with generator.at_work(methods) as calls, flop_counter() as counter:
            steps = [self._alone(generator, number) for number in range(self.timed)]
        own = sum(count for name, count in calls.items() if name in _OWN)
        flops, small = counter.get_total_flops(), calls.total() - own
        return _Cost(flops / self.timed, own / self.timed, small / self.timed, steps[0])

    def _time(self, entry: _Entry) -> Any:
        def clock(generator: Generator, methods: Sequence[Published]) -> Callable[[], float]:
            numbers = itertools.cycle(range(self.timed))

            def once() -> float:
                number = next(numbers)
                with generator.at_work(methods):
                    return seconds(lambda: self._alone(generator, number), generator.device)

            return once

        first, second = clock(self.generator, ()), clock(entry.generator, entry.methods)
        # Everything has run when FLOPs were counted.
        return interleave(first, second, self.pairs, warmup=0)

    # -- quality

    def row(self, entry: _Entry, number: int, rows: int) -> tuple[TaskRow, Sequence[Image.Image]]:
        """A row, the `number`-th of so many, and all its pictures."""
        batches = -(-len(self.prompts) // self.batch)
        budget = entry.budget or 0.0
        try:
            cost = entry.cost or self._cost(entry.generator, entry.methods)
            pictures: list[Image.Image] = []
            with entry.generator.at_work(entry.methods):
                for done, some in enumerate(self._made(entry), 1):
                    pictures += some
                    self.on_progress(number * batches + done, rows * batches, entry.name)
        except InputError as error:
            return TaskRow(entry.name, budget, entry.baseline, refused=str(error)), ()
        assert self._dense_cost is not None
        figures = {"steps": float(cost.steps), "calls": cost.calls, **self._quality(entry.name, pictures)}
        if cost.small_calls:
            figures["small calls"] = cost.small_calls
        ratio = cost.flops / self._dense_cost.flops
        spread = (1.0, 1.0, 1.0)
        if entry.name not in (DENSE, OTHER_NOISE):
            timing = self._time(entry)
            spread = (timing.ratio, timing.low, timing.high)
        row = TaskRow(
            entry.name, budget, entry.baseline, dict(entry.settings or {}), None, None, round(cost.flops), ratio,
            *spread, figures=figures,
        )  # fmt: skip
        return row, pictures

    def _made(self, entry: _Entry) -> Iterator[list[Image.Image]]:
        numbers = range(len(self.prompts))
        for some in (numbers[first : first + self.batch] for first in numbers[:: self.batch]):
            prompts, seeds = [self.prompts[k] for k in some], [self._seed(k, entry.seed) for k in some]
            yield entry.generator.make(prompts, seeds, _ignore)[0]

    def _quality(self, name: str, made: Sequence[Image.Image]) -> dict[str, float]:
        pictures = torch.stack([pil_to_tensor(one.convert("RGB")) for one in made])
        found = self._right(pictures)
        if self.frechet is not None:
            found["Fréchet"] = self.frechet(pictures)
        if name == DENSE:
            self.dense = pictures
        if not isinstance(self.generator, DiffusionGenerator):
            return found
        squares, apart = self._apart(pictures)
        if squares:
            found["PSNR"] = -10 * math.log10(squares)
        if name == OTHER_NOISE and apart:
            self._away = apart
        return found | {"apart": apart / self._away}

    def _right(self, pictures: Tensor) -> dict[str, float]:
        if not self.named:
            return {}
        captions = [self.prompts[k] for k in self.named]
        return {"right": adherence(self.judge, pictures[self.named], captions)["right"]}

    @torch.no_grad()
    def _apart(self, pictures: Tensor) -> tuple[float, float]:
        """Mean squared difference to dense's pictures of values in 0..1, and mean perceptual distance."""
        squares = distance = 0.0
        for some, wanted in zip(pictures.split(self.batch), self.dense.split(self.batch)):
            one, other = some.float() / 255, wanted.float() / 255
            if one.shape != other.shape:
                one = F.interpolate(one, size=other.shape[2:], mode="bilinear", antialias=True)
            squares += float((one - other).square().mean((1, 2, 3)).sum())
            distance += float(self.perceptual(one, other).sum())
        return squares / len(pictures), distance / len(pictures)

    def facts(self) -> dict[str, Any]:
        """How the judge does where it could know everything."""
        found: dict[str, Any] = {"model": "tiny-vit", "captions": len(self.named)}
        if self.named:
            blank = torch.zeros(len(self.named), 3, *self.judge.tower.patch_embed.img_size)
            captions = [self.prompts[k] for k in self.named]
            found["right by chance"] = round(adherence(self.judge, blank, captions)["chance"], 4)
            if self.real is not None and len(self.real) == len(self.prompts):
                found["right on real scenes"] = round(self._right(self.real)["right"], 4)
        return found


def _ignore(done: int, total: int) -> None:
    pass
