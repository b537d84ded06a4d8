"""Quality of a model's answers: against right answers, and against the unchanged model's.

Sharded over processes by whole batches, which are the same however many processes there are; the values of single
samples are gathered, put in order and summed in float64. So two processes give exactly the numbers of one.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.data.samples import Sample, name, to_inputs
from foveate.method import InputError

_CACHE_BYTES = 2**30
"""Prepared batches are kept up to this size; beyond it each is prepared anew for every method."""
_LONGEST_ANSWER = 32


@dataclass(frozen=True, eq=False)
class Answered:
    """What a model said to one batch.

    Attributes:
        indices: of its samples.
        logits: (B, V) float32 on the CPU, of the token after the prompt.
        answers: normalised generated texts.
    """

    indices: tuple[int, ...]
    logits: Tensor
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Quality:
    """Means over samples; accuracies over those with an answer, None where there is none.

    `agreement` is the share of samples with the same generated answer as the unchanged model's, `kl` the mean
    KL(dense || method) of the next-token distribution at the end of the prompt, in nats.
    """

    accuracy: float | None
    accuracy_by_type: dict[str, float] | None
    agreement: float
    kl: float


class Batches:
    """The model inputs of samples in fixed batches; a process prepares its own batches only.

    Args:
        processor: of the model.
        samples: all samples.
        batch_size: samples a batch.
        process, processes: this process works on batches process, process + processes, ….
        longest: most tokens of a prompt, its pictures' included; None for any number. Iteration raises InputError for
            a sample that has more.
    """

    def __init__(
        self, processor: Any, samples: Sequence[Sample], batch_size: int, process: int = 0, processes: int = 1,
        longest: int | None = None,
    ) -> None:  # fmt: skip
        self.processor, self.samples, self.longest = processor, samples, longest
        starts = range(0, len(samples), batch_size)
        self.parts = [range(s, min(s + batch_size, len(samples))) for s in starts][process::processes]
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], dict[str, Tensor]]]:
        for number, part in enumerate(self.parts):
            inputs = self._kept.get(number)
            if inputs is None:
                inputs = to_inputs(self.processor, [self.samples[i] for i in part])
                self._check_lengths(part, inputs)
                size = sum(value.numel() * value.element_size() for value in inputs.values())
                if self._bytes + size <= _CACHE_BYTES:
                    self._kept[number] = inputs
                    self._bytes += size
            yield tuple(part), inputs

    def _check_lengths(self, part: range, inputs: dict[str, Tensor]) -> None:
        for index, length in zip(part, inputs["attention_mask"].sum(1).tolist()):
            if self.longest is not None and length > self.longest:
                raise InputError(
                    f"{name(self.samples[index])}: its prompt has {length} tokens with the pictures; the model takes "
                    f"{self.longest} beside the answer"
                )


def answer_length(processor: Any, samples: Sequence[Sample]) -> int:
    """Tokens to generate: those of the longest right answer and the end token, at most 32; 8 without answers."""
    given = {sample.answer for sample in samples if sample.answer is not None}
    if not given:
        return 8
    longest = max(len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in given)
    return min(longest + 1, _LONGEST_ANSWER)


@torch.inference_mode()
def answer(
    model: Any, processor: Any, batches: Batches, new_tokens: int, after_batch: Callable[[], None] = lambda: None
) -> list[Answered]:
    """Greedy answers to all batches of this process. One prefill gives both the answer and the logits."""
    said = []
    tokenizer = processor.tokenizer
    settings = model.generation_config
    pad = next(
        (p for p in (settings.pad_token_id, tokenizer.pad_token_id, settings.eos_token_id) if isinstance(p, int)), 0
    )
    for indices, inputs in batches:
        placed = place(inputs, model)
        output = model.generate(
            **placed, max_new_tokens=new_tokens, do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
            pad_token_id=pad, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        new = output.sequences[:, placed["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        said.append(Answered(indices, output.logits[0].float().cpu(), tuple(normalise(text) for text in texts)))
        after_batch()
    return said


def place(inputs: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The inputs on the model's device, pixels in its dtype."""
    return {
        name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for name, value in inputs.items()
    }


def normalise(text: str) -> str:
    """Lower case, single spaces, no final punctuation: how answers are compared."""
    return " ".join(text.casefold().split()).rstrip(string.punctuation + " ")


def kl_divergence(dense: Tensor, other: Tensor) -> Tensor:
    """(B,) float64: KL(dense || other) in nats from logits (B, V)."""
    p, q = dense.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


def mean_iou(confusion: Tensor) -> float:
    """Mean intersection over union of the classes that occur, in truth or answers; confusion (C, C) counts pairs."""
    shared = confusion.diag().double()
    union = confusion.sum(0) + confusion.sum(1) - shared
    return float((shared / union)[union > 0].mean())


def score(
    samples: Sequence[Sample], dense: Sequence[Answered], said: Sequence[Answered], accelerator: Any = None
) -> Quality:
    """Quality over all samples, of all processes; `dense` and `said` are this process's batches in the same order."""
    values: list[tuple[int, bool | None, bool, float]] = []
    for reference, answered in zip(dense, said):
        divergence = kl_divergence(reference.logits, answered.logits).tolist()
        for index, before, now, kl in zip(answered.indices, reference.answers, answered.answers, divergence):
            wanted = samples[index].answer
            values.append((index, None if wanted is None else now == normalise(wanted), now == before, kl))
    values = sorted(gather(values, accelerator))
    right = [(samples[index].type, ok) for index, ok, _, _ in values if ok is not None]
    by_type: dict[str, list[bool]] = {}
    for kind, ok in right:
        if kind is not None:
            by_type.setdefault(kind, []).append(ok)
    return Quality(
        accuracy=sum(ok for _, ok in right) / len(right) if right else None,
        accuracy_by_type={kind: sum(oks) / len(oks) for kind, oks in sorted(by_type.items())} or None,
        agreement=sum(same for _, _, same, _ in values) / len(values),
        kl=sum(kl for _, _, _, kl in values) / len(values),
    )


def gather(values: list[Any], accelerator: Any = None) -> list[Any]:
    """The lists of all processes one after the other; without an accelerator, or with one process, the list itself."""
    if accelerator is None or accelerator.num_processes == 1:
        return values
    from accelerate.utils import gather_object

    gathered: list[Any] = gather_object(values)
    return gathered
