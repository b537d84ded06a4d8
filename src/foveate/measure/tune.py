"""`tune`: the configuration that reaches a goal on a user's model and samples, found by successive halving.

Candidates are methods at a geometric grid of budgets, stacks of one method before the language model and one within
it, and the plain baselines. First the FLOPs of all are counted; those that cannot reach the goal stop there. The others
answer 32 samples, the better half 64, and so on up to all samples. Every trial is written to a file at once, and
whoever runs the same search again reads what is there.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from foveate.apply import apply
from foveate.configuration import describe, release, save
from foveate.data.samples import Sample
from foveate.measure.compare import Progress, candidates, host_for
from foveate.measure.prefill import Prefill
from foveate.measure.quality import Answered, Batches, answer, answer_length, score
from foveate.measure.trials import Candidate, Trial, TrialLog, key_of, samples_digest, weights_digest
from foveate.method import HostShape, InputError, method_class, within

BUDGETS = (0.71, 0.5, 0.35, 0.25, 0.18, 0.125, 0.088, 0.0625)
"""Of single methods: each about 1/√2 of the one before."""
STACK_BUDGETS = (0.5, 0.25, 0.125, 0.0625)
"""Of stacks, each method of which gets the square root."""
FIRST_RUNG = 32
FINALISTS = 4
"""So many at least go on from a rung: those that are best by chance leave room for those that are."""
MARGIN = 2.0
"""Standard errors by which a candidate has to be outside before that, and not its rank, ends it."""
TRIALS, CHOSEN = "trials.jsonl", "chosen.json"
_EPSILON = 1e-9


@dataclass(frozen=True)
class Goal:
    """What is looked for; one of the two is given, InputError otherwise.

    Attributes:
        target_speedup: > 1; the best quality of what needs at most 1 / target_speedup of dense's FLOPs.
        max_loss: in [0, 1); the fewest FLOPs of what loses at most this share of quality against dense.
    """

    target_speedup: float | None = None
    max_loss: float | None = None

    def __post_init__(self) -> None:
        if (self.target_speedup is None) == (self.max_loss is None):
            raise InputError("give one goal: either a target speed-up (such as 2.0) or a largest loss (such as 0.01)")
        if self.target_speedup is not None:
            within("the target speed-up", self.target_speedup, "(1, inf)")
        if self.max_loss is not None:
            within("the largest loss", self.max_loss, "[0, 1)")

    def affords(self, cost: float) -> bool:
        """Whether something with these FLOPs (a share of dense) can be what is looked for, whatever its quality."""
        return cost < 1 if self.target_speedup is None else cost <= 1 / self.target_speedup + _EPSILON

    def reached(self, cost: float, quality: float, dense: float) -> bool:
        return self.affords(cost) and (self.max_loss is None or dense - quality <= self.max_loss + _EPSILON)

    def rank(self, cost: float, quality: float, dense: float) -> tuple[float, ...]:
        """A key that sorts the better first: by quality, or by cost, what loses too much last and by its loss."""
        if self.target_speedup is not None:
            return (-quality, cost)
        return (0.0, cost, -quality) if self.reached(cost, quality, dense) else (1.0, dense - quality, cost)


@dataclass(frozen=True)
class Found:
    """A candidate that was measured on all samples; `trial` has its time where that was measured."""

    candidate: Candidate
    trial: Trial


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        goal: what was looked for.
        samples: how many there are.
        finalists: what was measured on all samples, dense first, then the better first.
        front: of those, none of which another has both fewer FLOPs and no less quality; the most expensive first.
        chosen: what reaches the goal; None where nothing has so few FLOPs (dense always loses little enough).
        why: the reason, or what came nearest, in words.
        tried, refused: candidates whose FLOPs were counted, and those that cannot work on this model.
        read: trials that the file had from before.
    """

    goal: Goal
    samples: int
    finalists: list[Found]
    front: list[Found]
    chosen: Found | None
    why: str
    tried: int
    refused: int
    read: int


def tune(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    methods: Sequence[str] | None = None,
    *,
    goal: Goal,
    folder: str | Path,
    budgets: Sequence[float] = BUDGETS,
    stack_budgets: Sequence[float] = STACK_BUDGETS,
    first_rung: int = FIRST_RUNG,
    batch_size: int = 32,
    timing_pairs: int = 10,
    max_new_tokens: int | None = None,
    seed: int = 0,
    name: str = "",
    on_progress: Progress | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> Tuned:
    """Searches methods, stacks and budgets for the best that reaches `goal`, and writes it to `folder`/chosen.json.

    Args:
        model: a vision-language model that `foveate.apply` supports, on its device.
        processor: the model's.
        samples: questions; quality is accuracy where they have answers, else agreement with the unchanged model.
        methods: names; None: all that shorten such a model without training. The baselines always take part.
        goal: see `Goal`.
        folder: gets trials.jsonl, a line for each trial, and chosen.json. Trials that are there already are not run
            again, also those of another goal.
        budgets, stack_budgets: shares of visual tokens in (0, 1], averaged over the language model's layers.
        first_rung: samples of the first rung; each next has twice as many.
        batch_size: samples a batch.
        timing_pairs: interleaved pairs with dense, of the Pareto front and the choice.
        max_new_tokens: length of an answer; None: enough for the longest right one.
        seed: of the order in which samples are asked.
        name: of the model, for the file.
        on_progress: called with (done, total, text); the total shrinks when candidates are dropped.
        on_trial: called with each trial after it was written.

    Raises:
        InputError: as for `compare`; and a trials.jsonl of another model, other samples or another version.
    """
    if not samples:
        raise InputError("there are no samples to tune on")
    shape = host_for(model, samples, "tune").shape
    for budget in (*budgets, *stack_budgets):
        within("a budget", budget, "(0, 1]")
    # Before they are shuffled: `compare` counts on the same one.
    prefill = Prefill(model, processor, samples)
    # The first samples of a file are often of one kind; those of a rung should be like all.
    order = random.Random(seed).sample(range(len(samples)), len(samples))
    samples = [samples[index] for index in order]
    new_tokens = answer_length(processor, samples) if max_new_tokens is None else max_new_tokens
    field = plan(model, shape, methods, budgets, stack_budgets)
    steps = rungs(len(samples), first_rung)
    run = {
        "model": name or type(model).__name__,
        "weights": weights_digest(model),
        "samples": samples_digest(samples),
        "settings": {
            "rungs": steps,
            "batch_size": batch_size,
            "new_tokens": new_tokens,
            "dtype": str(model.dtype),
            "device": model.device.type,
        },
        "foveate": release(),
    }
    log = TrialLog(Path(folder) / TRIALS, run, on_trial)
    search = _Search(model, processor, samples, prefill, goal, log, steps, batch_size, new_tokens, on_progress)
    training = model.training
    model.eval()
    try:
        tuned = search.run(field, timing_pairs)
    finally:
        model.train(training)
    if tuned.chosen is not None:
        trial = tuned.chosen.trial
        measured = {k: v for k, v in asdict(trial).items() if k not in ("what", "configuration", "seconds", "refused")}
        facts = {"goal": {k: v for k, v in asdict(goal).items() if v is not None}, "model": run["model"]}
        save(Path(folder) / CHOSEN, tuned.chosen.candidate.methods, measured | facts)
    return tuned


def rungs(count: int, first: int = FIRST_RUNG) -> list[int]:
    """Numbers of samples: first, 2 first, 4 first, …, and at last all `count`."""
    steps = []
    size = first
    while size < count:
        steps.append(size)
        size *= 2
    return [*steps, count]


def plan(
    model: Any,
    shape: HostShape,
    methods: Sequence[str] | None = None,
    budgets: Sequence[float] = BUDGETS,
    stack_budgets: Sequence[float] = STACK_BUDGETS,
) -> list[Candidate]:
    """All candidates, dense first, then baselines, methods and stacks; those that cannot be applied are left out.

    A stack is one method that acts before the language model and one that acts within it. Each gets the square root of
    the stack's budget: the second spends its share of what the first leaves, so that the shares multiply. Baselines are
    not stacked.

    Raises:
        InputError: unknown names, and a name that can be set to none of the budgets on this model.
    """
    asked = None if methods is None else list(dict.fromkeys(methods))
    beside = candidates(shape.family, baselines=True)
    named = candidates(shape.family) if asked is None else [one for one in asked if not method_class(one).card.baseline]
    field = [Candidate((method_class("dense")(),), (1.0,))]
    sides: dict[str, list[str]] = {"vision": [], "llm": []}
    for slug in (*beside, *named):
        refusals: list[InputError] = []
        found = [one for budget in budgets if (one := _candidate(model, shape, (slug,), budget, refusals))]
        if asked is not None and slug in asked and not found and refusals:
            raise refusals[0]
        field += found
        if slug in named and (side := _side(slug, shape)):
            sides[side].append(slug)
    for pair in [(first, second) for first in sides["vision"] for second in sides["llm"]]:
        field += [one for budget in stack_budgets if (one := _candidate(model, shape, pair, budget, []))]
    # Two budgets may be one configuration.
    different: dict[str, Candidate] = {}
    for one in field:
        different.setdefault(key_of(one), one)
    return list(different.values())


def _candidate(
    model: Any, shape: HostShape, slugs: tuple[str, ...], budget: float, refusals: list[InputError]
) -> Candidate | None:
    """The methods set up for a budget; None, and the reason in `refusals`, where that cannot be applied here."""
    each = budget ** (1 / len(slugs))
    try:
        methods = tuple(method_class(slug).for_budget(each, shape) for slug in slugs)
        apply(model, methods).remove()
    except InputError as error:
        refusals.append(error)
        return None
    return Candidate(methods, (each,) * len(slugs))


def _side(slug: str, shape: HostShape) -> str | None:
    """ "vision" for what acts before the language model only, "llm" for what acts within it only, else None."""
    try:
        stages = method_class(slug).for_budget(0.5, shape).acts_at(shape)
    except InputError:
        return None
    within_llm = {stage.startswith("llm.") for stage in stages}
    return None if len(within_llm) != 1 else "llm" if within_llm.pop() else "vision"


def promote(trials: Sequence[Trial], dense: float, samples: int, goal: Goal) -> list[int]:
    """Indices of the trials of one rung that go on to the next, the better first.

    Out are those that by a margin lose too much, or that another with no more FLOPs beats. Of the rest the better half
    goes on, at least `FINALISTS`; with a largest loss also whatever reaches the goal and is on the Pareto front: what
    is cheapest on few samples may turn out to lose too much, and then the next cheapest has to be there.

    The margin is `MARGIN` standard errors of a difference in quality. Only samples with another answer than dense's can
    make one to dense, so that its standard error is at most sqrt(share of those / samples); between two candidates the
    shares add up. One sample more is counted, so that none that differ is no certainty.
    """

    def margin(*ones: Trial) -> float:
        differing = sum(1 - (one.agreement or 0) for one in ones)
        return MARGIN * math.sqrt((differing + 1 / samples) / samples)

    def out(one: Trial) -> bool:
        if goal.max_loss is not None and dense - one.quality > goal.max_loss + margin(one):
            return True
        return any(other.cost <= one.cost and other.quality > one.quality + margin(one, other) for other in trials)

    left = [index for index, one in enumerate(trials) if not out(one)]
    left.sort(key=lambda index: (*goal.rank(trials[index].cost, trials[index].quality, dense), index))
    count = max(math.ceil(len(left) / 2), FINALISTS)
    also = []
    if goal.max_loss is not None:
        front = pareto(trials)
        also = [i for i in left[count:] if i in front and goal.reached(trials[i].cost, trials[i].quality, dense)]
    return left[:count] + also


def pareto(trials: Sequence[Trial]) -> list[int]:
    """Indices of the trials that no other beats in FLOPs or quality without losing in the other; dearest first."""
    front: list[int] = []
    for index in sorted(range(len(trials)), key=lambda i: (trials[i].cost, -trials[i].quality, i)):
        if not front or trials[index].quality > trials[front[-1]].quality:
            front.append(index)
    return front[::-1]


class _Search:
    """One search on one model."""

    def __init__(
        self, model: Any, processor: Any, samples: Sequence[Sample], prefill: Prefill, goal: Goal, log: TrialLog,
        steps: Sequence[int], batch_size: int, new_tokens: int, on_progress: Progress | None,
    ) -> None:  # fmt: skip
        self.model, self.processor, self.samples, self.goal, self.log = model, processor, samples, goal, log
        self.prefill, self.steps, self.batch_size, self.new_tokens = prefill, steps, batch_size, new_tokens
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.longest = None if room is None else room - new_tokens
        self.on_progress: Progress = on_progress or (lambda done, total, text: None)
        self.done = self.total = 0
        self._batches: Batches | None = None
        self._reference: list[Answered] | None = None

    def run(self, field: Sequence[Candidate], pairs: int) -> Tuned:
        # One prefill counts as one sample answered.
        self.total = len(field) + self._expected(0, len(field) - 1)
        dense = self._flops(field[0], None)
        counted = [(one, dense if one is field[0] else self._flops(one, dense.flops)) for one in field]
        able = [(one, trial) for one, trial in counted if trial.refused is None]
        left = [pair for pair in able[1:] if self.goal.affords(pair[1].cost)]
        refused = len(counted) - len(able)
        cheapest = min(able, key=lambda pair: pair[1].cost)
        if not left and self.goal.target_speedup is not None:
            return self._nothing(cheapest, refused, len(field))
        reference = dense
        results: list[Trial] = []
        for number in range(len(self.steps)):
            if number:
                on = promote(results, reference.quality, self.steps[number - 1], self.goal)
                left = [left[index] for index in on]
            self.total = self.done + self._expected(number, len(left))
            reference, *results = self._rung(number, able[0], left)
            alive = [(pair, trial) for pair, trial in zip(left, results) if trial.refused is None]
            refused += len(left) - len(alive)
            left, results = [pair for pair, _ in alive], [trial for _, trial in alive]
        if not left and self.goal.target_speedup is not None:
            return self._nothing(cheapest, refused, len(field))
        ranked = sorted(
            zip(left, results),
            key=lambda pair: self.goal.rank(pair[1].cost, pair[1].quality, reference.quality),
        )
        finalists = [Found(able[0][0], reference), *(Found(one, trial) for (one, _), trial in ranked)]
        return self._conclude(finalists, refused, len(field), pairs)

    def _nothing(self, cheapest: tuple[Candidate, Trial], refused: int, tried: int) -> Tuned:
        assert self.goal.target_speedup is not None
        why = (
            f"nothing needs as little as {100 / self.goal.target_speedup:.3g} % of dense's FLOPs; {cheapest[0].label} "
            f"comes nearest with {100 * cheapest[1].cost:.3g} %"
        )
        return Tuned(self.goal, len(self.samples), [], [], None, why, tried, refused, self.log.read)

    def _conclude(self, finalists: list[Found], refused: int, tried: int, pairs: int) -> Tuned:
        dense = finalists[0].trial.quality
        fit = [one for one in finalists[1:] if self.goal.reached(one.trial.cost, one.trial.quality, dense)]
        # Dense loses nothing; and where a speed-up is asked for, all finalists have it.
        chosen = fit[0] if fit else finalists[0]
        front = [finalists[index] for index in pareto([one.trial for one in finalists])]
        timed = {id(one): self._timed(one, pairs) for one in finalists if one in front or one is chosen}
        why = reason(self.goal, finalists, chosen)
        return Tuned(
            self.goal, len(self.samples), [timed.get(id(one), one) for one in finalists],
            [timed[id(one)] for one in front], timed[id(chosen)], why, tried, refused, self.log.read,
        )  # fmt: skip

    def _expected(self, number: int, left: int) -> int:
        """Samples to answer from rung `number` on, of `left` candidates and dense, if half of them go on each time."""
        count = 0
        for start, end in list(pairwise((0, *self.steps)))[number:]:
            count += (left + 1) * (end - start)
            left = min(left, max(math.ceil(left / 2), FINALISTS))
        return count

    def _step(self, by: int, text: str) -> None:
        self.done += by
        self.on_progress(self.done, max(self.total, self.done), text)

    def _flops(self, candidate: Candidate, dense: int | None) -> Trial:
        trial = self.log.find("flops", candidate, 0)
        if trial is None:
            start = time.perf_counter()
            trial = Trial("flops", describe(candidate.methods), candidate.label)
            try:
                with apply(self.model, candidate.methods):
                    flops, _ = self.prefill.cost()
                trial = replace(trial, flops=flops, flops_ratio=flops / (dense or flops))
            except InputError as error:
                trial = replace(trial, refused=str(error))
            trial = self.log.add(replace(trial, seconds=time.perf_counter() - start))
        self._step(1, f"FLOPs of {candidate.label}")
        return trial

    def _rung(
        self, number: int, dense: tuple[Candidate, Trial], left: Sequence[tuple[Candidate, Trial]]
    ) -> list[Trial]:
        """Trials of dense and of all that are left on the first `steps[number]` samples."""
        start, end = (0, *self.steps)[number : number + 2]
        self._batches = self._reference = None
        results = []
        for candidate, counted in (dense, *left):
            trial = self.log.find("quality", candidate, end)
            if trial is None:
                trial = self._answered(candidate, counted, start, end)
            else:
                self._step(end - start, candidate.label)
            results.append(trial)
        return results

    def _answered(self, candidate: Candidate, counted: Trial, start: int, end: int) -> Trial:
        """Asks the samples start..end and joins that with the trial on those before."""
        part = self.samples[start:end]
        clock = time.perf_counter()
        if self._batches is None:
            self._batches = Batches(self.processor, part, self.batch_size, longest=self.longest)
        if self._reference is None:
            # Errors of samples, and not of a method, come up here.
            self._reference = self._ask(lambda size: None)
        trial = replace(counted, what="quality", samples=end)
        try:
            if candidate.methods[0].card.slug == "dense":
                said = self._reference
                self._step(end - start, candidate.label)
            else:
                with apply(self.model, candidate.methods):
                    said = self._ask(lambda size: self._step(size, f"{candidate.label}, {end} samples"))
        except InputError as error:
            return self.log.add(replace(trial, refused=str(error), seconds=time.perf_counter() - clock))
        quality = score(part, self._reference, said)
        before = self.log.find("quality", candidate, start) if start else None
        known, asked = (sum(one.answer is not None for one in group) for group in (self.samples[:start], part))
        trial = replace(
            trial,
            accuracy=_joined(before.accuracy if before else None, known, quality.accuracy, asked),
            agreement=_joined(before.agreement if before else None, start, quality.agreement, end - start),
            kl=((before.kl or 0.0) * start + quality.kl * (end - start)) / end if before else quality.kl,
            seconds=time.perf_counter() - clock,
        )
        return self.log.add(trial)

    def _ask(self, after: Callable[[int], None]) -> list[Answered]:
        assert self._batches is not None
        parts = iter(self._batches.parts)
        return answer(self.model, self.processor, self._batches, self.new_tokens, lambda: after(len(next(parts))))

    def _timed(self, found: Found, pairs: int) -> Found:
        count = len(self.samples)
        trial = self.log.find("time", found.candidate, count)
        if trial is None:
            start = time.perf_counter()
            if found.candidate.methods[0].card.slug == "dense":
                times = (1.0, 1.0, 1.0)
            else:
                timing = self.prefill.time(found.candidate.methods, pairs)
                times = (timing.ratio, timing.low, timing.high)
            ratio, low, high = times
            trial = replace(
                found.trial, what="time", time_ratio=ratio, time_low=low, time_high=high,
                seconds=time.perf_counter() - start,
            )  # fmt: skip
            self.log.add(trial)
        return replace(found, trial=trial)


def reason(goal: Goal, finalists: Sequence[Found], chosen: Found) -> str:
    """Why this was chosen, in words; finalists: dense first, then the better first."""
    dense, others = finalists[0].trial, finalists[1:]
    measure = "agreement with dense" if dense.accuracy is None else "accuracy"

    def told(one: Found) -> str:
        cost = f"{100 * one.trial.cost:.0f} % of the FLOPs"
        return f"{one.candidate.label} ({100 * one.trial.quality:.1f} % {measure} for {cost})"

    if goal.target_speedup is not None:
        limit = f"{100 / goal.target_speedup:.3g} % of dense's FLOPs"
        words = "closest to dense" if dense.accuracy is None else "most accurate"
        why = f"{told(chosen)} is the {words} of what needs at most {limit}; dense has {100 * dense.quality:.1f} %"
    else:
        assert goal.max_loss is not None
        limit = f"at most {100 * goal.max_loss:.3g} points against dense ({100 * dense.quality:.1f} %)"
        if chosen is finalists[0]:
            why = f"the unchanged model: nothing cheaper loses {limit}"
            return f"{why}; {told(others[0])} comes nearest" if others else why
        why = f"{told(chosen)} is the cheapest of what loses {limit}"
    if chosen.candidate.baseline:
        why += ". It is a plain baseline: no published method did better here"
        if published := [one for one in others if not one.candidate.baseline]:
            why += f"; the best of those that were asked everything is {told(published[0])}"
    return why


def _joined(before: float | None, count: int, now: float | None, more: int) -> float | None:
    """The share of successes among count + more from those among each, exactly; None where there are none of either."""
    right = (round(before * count) if before is not None else 0) + (round(now * more) if now is not None else 0)
    return right / (count + more) if count + more else None
