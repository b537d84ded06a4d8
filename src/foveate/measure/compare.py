"""`compare`: what each method costs and gives on a user's model and samples, beside plain baselines."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from foveate.apply import apply
from foveate.configuration import describe, is_file, load_configuration
from foveate.data.samples import NO_VIDEOS, Sample
from foveate.data.samples import name as called
from foveate.hosts import adapt
from foveate.hosts.language import VisionLanguageHost
from foveate.measure.environment import environment
from foveate.measure.prefill import Prefill
from foveate.measure.provenance import Overlay, overlay, visual_tokens
from foveate.measure.quality import Answered, Batches, answer, answer_length, gather, score
from foveate.measure.timing import Timing
from foveate.method import HostShape, InputError, Method, method_class, registry

METHODS = ("fopru", "vtc-cls", "pyramiddrop", "aim")
"""Of `foveate compare` without arguments, which has to be done within 3 minutes on two cores; see `candidates`."""
BUDGETS = (0.5, 0.25, 0.1)
NEAR = 0.01
"""How far below dense counts as "as good": 1 point."""

Progress = Callable[[int, int, str], None]
Entry = str | Method | tuple[Method, ...]
"""What is measured: a name, set up for each budget, or one method or a stack as they are, measured once."""


@dataclass(frozen=True)
class Row:
    """One method at one budget. Where it refused, only method, budget, baseline and the reason are set.

    Attributes:
        method: slug; those of a stack joined by "+".
        budget: share of visual tokens, averaged over the language model's layers, that it was asked to spend.
        baseline: whether it is one of the plain baselines (dense included).
        settings: the method's arguments; of a stack, slug -> arguments.
        stages: (stage, visual tokens after it, mean over samples, all crops of a sample together).
        visual_share: measured share of visual tokens, mean over the language model's layers and the samples.
        flops, flops_ratio: of one prefill of batch 1, and as a share of dense.
        time_ratio, time_low, time_high: median and quartiles of interleaved pairs, as a share of dense.
        kv_bytes: that the prefill leaves in the cache.
        accuracy, accuracy_by_type: share of right answers; None without answers or types.
        agreement: share of samples whose generated answer is the same as dense's.
        kl: mean KL(dense || method) of the next token at the end of the prompt, nats.
        refused: why the method cannot do this.
    """

    method: str
    budget: float
    baseline: bool
    settings: dict[str, Any] | None = None
    stages: tuple[tuple[str, float], ...] | None = None
    visual_share: float | None = None
    flops: int | None = None
    flops_ratio: float | None = None
    time_ratio: float | None = None
    time_low: float | None = None
    time_high: float | None = None
    kv_bytes: int | None = None
    accuracy: float | None = None
    accuracy_by_type: dict[str, float] | None = None
    agreement: float | None = None
    kl: float | None = None
    refused: str | None = None

    @property
    def label(self) -> str:
        return f"{self.method} at {self.budget:g}"


@dataclass(frozen=True)
class Shown:
    """The sample that FLOPs, time and overlays are of.

    Attributes:
        id, prompt: of the sample.
        expected: the right answer, None where it is not known.
        answer: the unchanged model's, in lower case and without final punctuation, as answers are compared.
    """

    id: str
    prompt: str
    expected: str | None
    answer: str


@dataclass(frozen=True)
class Comparison:
    """All rows, dense first, and what they say.

    Attributes:
        rows: see `Row`.
        environment: see `foveate.measure.environment`.
        samples: how many were asked.
        choice: the row that the rule of `choose` picks; None if every method refused.
        why: the rule's reason, in words.
        overlays: one a row, of the sample `shown`.
        shown: the sample that FLOPs and time were measured on.
    """

    rows: list[Row]
    environment: dict[str, Any]
    samples: int
    choice: Row | None
    why: str
    overlays: list[Overlay] = field(default_factory=list)
    shown: Shown | None = None

    def to_json(self) -> str:
        values = asdict(self)
        values["choice"] = None if self.choice is None else self.rows.index(self.choice)
        return json.dumps(values, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """The comparison that `to_json` wrote; InputError for anything else."""
        try:
            values = json.loads(text)
            rows = [
                Row(**row | {"stages": row["stages"] and tuple((name, count) for name, count in row["stages"])})
                for row in values.pop("rows")
            ]
            overlays = [
                Overlay(**one | {key: tuple(one[key]) for key in ("grid", "depth", "group")})
                for one in values.pop("overlays")
            ]
            index, shown = values.pop("choice"), values.pop("shown")
            return cls(
                rows=rows, overlays=overlays, choice=None if index is None else rows[index],
                shown=None if shown is None else Shown(**shown), **values,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(f"not a comparison ({' '.join(str(error).split())})") from None


def compare(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    methods: Sequence[Entry] | None = None,
    *,
    budgets: Sequence[float] = BUDGETS,
    baselines: Sequence[str] | None = None,
    batch_size: int = 32,
    timing_pairs: int = 10,
    max_new_tokens: int | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
    on_row: Callable[[Row], None] | None = None,
    accelerator: Any = None,
) -> Comparison:
    """Measures every method and baseline at every budget on one model.

    Quality is over all samples; FLOPs, cache and time are of one prefill of the sample with the median prompt, batch 1.

    Args:
        model: a vision-language model that `foveate.apply` supports, on its device.
        processor: the model's.
        samples: questions about pictures or clips; accuracy is measured where they have answers.
        methods: names, set up for each budget; instances, tuples of them (stacks) and configuration files (names that
            end in ".json"), measured once as they are; None: all `candidates`.
        budgets: shares of visual tokens in (0, 1], averaged over the language model's layers.
        baselines: what to measure beside them; None: all that there are. Dense is always there.
        batch_size: samples a batch. Results do not depend on the number of processes, but may in the last bits on this.
        timing_pairs: interleaved pairs of dense and method.
        max_new_tokens: length of an answer; None: enough for the longest right one.
        seed: noted in the environment; nothing here draws but the method "random", which has its own.
        on_progress: called with (done, total, text) after each batch.
        on_row: called with each row as soon as it is measured, so that an interrupted run has something to show.
        accelerator: an `accelerate.Accelerator` to share the samples among processes; every process gets all rows.

    Raises:
        InputError: no samples, a sample without picture, a clip for a model that takes none, pixels that are not
            finite, a prompt longer than the model takes, a budget out of range, a model without adapter or without
            language model, unknown names, a method in `methods` that can be set to none of the budgets on this model.
    """
    if not samples:
        raise InputError("there are no samples to compare on")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}")
    for budget in budgets:
        if not 0 < budget <= 1:
            raise InputError(f"budgets must be in (0, 1], not {budget!r}")
    host = host_for(model, samples, "compare")
    shape = host.shape
    planned = _plan(model, shape, methods, baselines, budgets)
    process, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    new_tokens = answer_length(processor, samples) if max_new_tokens is None else max_new_tokens
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = None if room is None else room - new_tokens
    batches = Batches(processor, samples, batch_size, process, processes, longest)
    bench = _Bench(model, processor, samples, host, batches, new_tokens, timing_pairs, accelerator)
    bench.total = len(batches) * (1 + len(planned))
    bench.on_progress = on_progress or (lambda done, total, text: None)
    training = model.training
    model.eval()
    try:
        rows, overlays = [bench.dense()], []
        if on_row:
            on_row(rows[0])
        for entry, budget in planned:
            row, picture = bench.row(entry, budget)
            rows.append(row)
            if picture is not None:
                overlays.append(picture)
            if on_row:
                on_row(row)
    finally:
        model.train(training)
    choice, why = choose(rows)
    surroundings = environment(model.device, model.dtype, seed) | {"processes": processes, "batch_size": batch_size}
    return Comparison(rows, surroundings, len(samples), choice, why, overlays, bench.shown)


def host_for(model: Any, samples: Sequence[Sample], command: str) -> VisionLanguageHost:
    """The adapter of a model that answers such samples; InputError, in the name of a command, for any other model."""
    host = adapt(model)
    if not isinstance(host, VisionLanguageHost):
        raise InputError(f"{command} needs a vision-language model; {type(model).__name__} has no language model")
    if "video" not in host.modalities and (moving := next((one for one in samples if one.videos), None)):
        raise InputError(f"{called(moving)}: {NO_VIDEOS}")
    return host


def candidates(family: str = "hf-vlm", baselines: bool = False) -> tuple[str, ...]:
    """Names of all methods (or of all baselines but dense) that shorten such a host without any training."""
    return tuple(
        slug
        for slug, cls in registry().items()
        if (card := cls.card).kind == "reduce" and card.training_free and family in card.hosts
        and card.baseline == baselines and slug != "dense"
    )  # fmt: skip


def choose(rows: Sequence[Row]) -> tuple[Row | None, str]:
    """The row to recommend and why.

    Quality is accuracy, or agreement with dense where there are no right answers. Of the rows that need fewer FLOPs
    than dense and are within 1 point of its quality, the cheapest is chosen. Where there is none, the one that loses
    fewest points for each FLOP saved. Baselines take part; where one wins, the reason says so.
    """
    by_accuracy = rows[0].accuracy is not None
    measure = "accuracy" if by_accuracy else "agreement with dense"

    def quality(row: Row) -> float:
        value = row.accuracy if by_accuracy else row.agreement
        assert value is not None
        return value

    def cost(row: Row) -> float:
        assert row.flops_ratio is not None
        return row.flops_ratio

    full = quality(rows[0])
    candidates = [row for row in rows[1:] if row.refused is None and cost(row) < 1]
    if not candidates:
        return None, "nothing measured needs fewer FLOPs than dense"

    def best(among: Sequence[Row]) -> tuple[Row, bool]:
        near = [row for row in among if quality(row) >= full - NEAR - 1e-9]
        if near:
            return min(near, key=lambda row: (cost(row), -quality(row))), True
        return min(among, key=lambda row: ((full - quality(row)) / (1 - cost(row)), cost(row))), False

    def told(row: Row) -> str:
        return f"{row.label} ({100 * quality(row):.1f} % {measure} for {100 * cost(row):.0f} % of the FLOPs)"

    winner, near = best(candidates)
    if near:
        why = f"{told(winner)} is the cheapest within 1 point of dense ({100 * full:.1f} %)"
    else:
        why = f"nothing stays within 1 point of dense ({100 * full:.1f} %); {told(winner)} loses least per FLOP saved"
    published = [row for row in candidates if not row.baseline]
    if winner.baseline:
        why += ". It is a plain baseline: no published method did better here"
        if published:
            why += f"; the best of them is {told(best(published)[0])}"
    return winner, why + "."


def _plan(
    model: Any, shape: HostShape, methods: Sequence[Entry] | None, baselines: Sequence[str] | None,
    budgets: Sequence[float],
) -> list[tuple[Entry, float]]:  # fmt: skip
    """What is measured after dense, in order, with its budget (that of what is set up already is not known yet: 0).

    Who names a method wants to hear at once that it cannot work here at all; InputError says why.
    """
    asked = [_read(entry) for entry in dict.fromkeys(methods or ())]
    beside = candidates(shape.family, baselines=True) if baselines is None else tuple(baselines)
    others = candidates(shape.family) if methods is None else ()
    budgets = tuple(dict.fromkeys(budgets))
    planned: list[tuple[Entry, float]] = []
    for entry in dict.fromkeys((*beside, *asked, *others)):
        if entry == "dense":
            continue
        pairs = [(entry, budget) for budget in budgets] if isinstance(entry, str) else [(entry, 0.0)]
        refusals = [refusal for one, budget in pairs if (refusal := _refusal(model, shape, one, budget))]
        if entry in asked and len(refusals) == len(pairs):
            raise refusals[0]
        planned += pairs
    return planned


def _read(entry: Entry) -> Entry:
    """The methods of a configuration file; anything else as it is. Dense, which is always there, is its name."""
    if not (isinstance(entry, str) and is_file(entry)):
        return entry
    methods = tuple(load_configuration(entry))
    return "dense" if [one.card.slug for one in methods] == ["dense"] else methods


def _refusal(model: Any, shape: HostShape, entry: Entry, budget: float) -> InputError | None:
    """Why this cannot be measured, without having run it. InputError for an unknown name."""
    if isinstance(entry, str):
        method_class(entry)
    try:
        apply(model, _set_up(entry, budget, shape)).remove()
    except InputError as error:
        return error
    return None


def _set_up(entry: Entry, budget: float, shape: HostShape) -> tuple[Method, ...]:
    if isinstance(entry, str):
        return (method_class(entry).for_budget(budget, shape),)
    return entry if isinstance(entry, tuple) else (entry,)


class _Bench:
    """One model under measurement."""

    def __init__(
        self, model: Any, processor: Any, samples: Sequence[Sample], host: VisionLanguageHost,
        batches: Batches, new_tokens: int, pairs: int, accelerator: Any,
    ) -> None:  # fmt: skip
        self.model, self.processor, self.samples, self.shape = model, processor, samples, host.shape
        self.modalities = host.modalities
        self.batches, self.new_tokens, self.pairs, self.accelerator = batches, new_tokens, pairs, accelerator
        self.prefill = Prefill(model, processor, samples)
        self.index = self.prefill.index
        self.shown: Shown | None = None
        self.on_progress: Progress = lambda done, total, text: None
        self.done = self.total = 0
        self._reference: list[Answered] = []
        self._flops = 0

    def _step(self, text: str) -> None:
        self.done += 1
        self.on_progress(self.done, self.total, text)

    def _answer(self, said: Sequence[Answered]) -> str:
        """The answer to the sample that is shown, whichever process asked it."""
        mine = [text for one in said for index, text in zip(one.indices, one.answers) if index == self.index]
        return str(gather(mine, self.accelerator)[0])

    def dense(self) -> Row:
        self._reference = answer(
            self.model, self.processor, self.batches, self.new_tokens, lambda: self._step("dense")
        )
        self._flops, cache = self.prefill.cost()
        sample = self.samples[self.index]
        self.shown = Shown(sample.id, sample.prompt, sample.answer, self._answer(self._reference))
        quality = score(self.samples, self._reference, self._reference, self.accelerator)
        counts = [int(count) for count in gather(self._image_tokens(), self.accelerator)]
        return Row(
            "dense", 1.0, True, {}, (("llm.input", sum(counts) / len(counts)),), 1.0, self._flops, 1.0, 1.0, 1.0, 1.0,
            cache, quality.accuracy, quality.accuracy_by_type, 1.0, 0.0,
        )  # fmt: skip

    def _image_tokens(self) -> list[int]:
        entries = [entry for _, entry in self.modalities.values()]
        tokens = torch.tensor([getattr(self.model.config, entry) for entry in entries])
        return [n for _, inputs in self.batches for n in torch.isin(inputs["input_ids"], tokens).sum(1).tolist()]

    def _overlay(self, host: Any, name: str, budget: float, answer: str) -> Overlay | None:
        """Of the sample that the last forward ran on; None for pictures of different grids."""
        try:
            grid = host.grid()
        except InputError:
            return None
        frames = 1 if self.samples[self.index].images else host.encoded["video"][0].crops
        return overlay(list(host.trace), self.shape.llm_layers, grid, name, budget, answer, frames=frames)

    def row(self, entry: Entry, budget: float) -> tuple[Row, Overlay | None]:
        if isinstance(entry, str):
            name, baseline = entry, method_class(entry).card.baseline
            label = f"{name} at {budget:g}"
        else:
            stack = _set_up(entry, budget, self.shape)
            name, baseline = "+".join(one.card.slug for one in stack), all(one.card.baseline for one in stack)
            label = " + ".join(map(repr, stack))
        start = self.done
        try:
            methods = _set_up(entry, budget, self.shape)
            with apply(self.model, methods) as applied:
                said, counts = self._ask(applied, label)
                flops, cache = self.prefill.cost()
                host = applied.host
        except InputError as error:
            self.done = start + len(self.batches)
            self.on_progress(self.done, self.total, label)
            return Row(name, budget, baseline, refused=str(error)), None
        quality = score(self.samples, self._reference, said, self.accelerator)
        time = self._time(methods)
        rows = gather(counts, self.accelerator)
        share = sum(sum(spent) / whole for whole, spent, _ in rows) / (len(rows) * self.shape.llm_layers)
        stages = {label: 0.0 for _, _, after in rows for label in after}
        for _, _, after in rows:
            for stage, count in after.items():
                stages[stage] += count / len(rows)
        budget = budget or round(share, 4)
        each = {one["method"]: one["settings"] for one in describe(methods)}
        settings = each if len(methods) > 1 else each[name]
        row = Row(
            name, budget, baseline, settings, tuple(stages.items()), share, flops, flops / self._flops,
            time.ratio, time.low, time.high, cache, quality.accuracy, quality.accuracy_by_type, quality.agreement,
            quality.kl,
        )  # fmt: skip
        return row, self._overlay(host, name, budget, self._answer(said))

    def _ask(self, applied: Any, label: str) -> tuple[list[Answered], list[tuple[int, list[int], dict[str, float]]]]:
        """Answers, and for each sample: image tokens of dense, visual tokens at each layer, tokens after each stage."""
        counts: list[tuple[int, list[int], dict[str, float]]] = []
        parts = iter(self.batches.parts)
        wholes = iter(self._image_tokens())

        def note() -> None:
            size = len(next(parts))
            layers = visual_tokens(applied.trace, self.shape.llm_layers)
            for b in range(size):
                after = {
                    # Before the language model a record counts crops; only their mean over samples is known there.
                    record.stage: record.tokens_out[b]
                    if record.stage.startswith("llm")
                    else sum(record.tokens_out) / size
                    for record in applied.trace
                }
                counts.append((next(wholes), [layer[b] for layer in layers], after))
            self._step(label)

        return answer(self.model, self.processor, self.batches, self.new_tokens, note), counts

    def _time(self, methods: tuple[Method, ...]) -> Timing:
        """Measured by the first process while the others wait, and told to all."""
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            timing = [self.prefill.time(methods, self.pairs) if self.accelerator.is_main_process else None]
            result: Timing = broadcast_object_list(timing)[0]
            return result
        return self.prefill.time(methods, self.pairs)
