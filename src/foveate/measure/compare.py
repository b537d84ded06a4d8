"""`compare`: what each method costs and gives on a user's model and samples, beside plain baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from foveate.apply import apply
from foveate.configuration import describe
from foveate.data.samples import NO_VIDEOS, Sample
from foveate.data.samples import name as called
from foveate.hosts import adapt
from foveate.hosts.language import VisionLanguageHost
from foveate.measure.comparison import (
    ANSWERING,
    BUDGETS,
    Entry,
    Measured,
    Progress,
    Shown,
    Table,
    Task,
    candidates,
    check_budgets,
    choose,
    name_of,
    plan,
    set_up,
)
from foveate.measure.environment import environment
from foveate.measure.prefill import Prefill
from foveate.measure.provenance import Overlay, overlay, visual_tokens
from foveate.measure.quality import Answered, Batches, answer, answer_length, gather, score
from foveate.measure.timing import Timing
from foveate.method import InputError, Method

__all__ = ["ANSWERING", "METHODS", "Comparison", "Entry", "Progress", "Row", "Shown", "candidates", "choose", "compare"]

METHODS = ("fopru", "vtc-cls", "pyramiddrop", "aim")
"""Of `foveate compare` without arguments, which has to be done within 3 minutes on two cores; see `candidates`."""


@dataclass(frozen=True)
class Row(Measured):
    """A row of answers to questions. Budget and `visual_share` are means over the language model's layers (the latter
    over the samples too), of stages all crops of a sample together, FLOPs and time of one prefill of batch 1.

    Attributes:
        kv_bytes: that the prefill leaves in the cache.
        accuracy, accuracy_by_type: share of right answers; None without answers or types.
        agreement: share of samples whose generated answer is the same as dense's.
        kl: mean KL(dense || method) of the next token at the end of the prompt, nats.
    """

    kv_bytes: int | None = None
    accuracy: float | None = None
    accuracy_by_type: dict[str, float] | None = None
    agreement: float | None = None
    kl: float | None = None

    def figure(self, name: str) -> float | None:
        known = {"KV cache": self.kv_bytes, "accuracy": self.accuracy, "agreement": self.agreement, "KL": self.kl}
        return known[name]


@dataclass(frozen=True)
class Comparison(Table[Row]):
    """All rows of answers, dense first, and what they say."""

    row_type: ClassVar[type[Measured]] = Row

    @property
    def task(self) -> Task:
        return ANSWERING


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
    check_budgets(budgets)
    host = host_for(model, samples, "compare")
    shape = host.shape
    planned = plan(model, shape, methods, baselines, budgets)
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
        self._reference = answer(self.model, self.processor, self.batches, self.new_tokens, lambda: self._step("dense"))
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
        name, baseline, label = name_of(entry, budget)
        start = self.done
        try:
            methods = set_up(entry, budget, self.shape)
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
