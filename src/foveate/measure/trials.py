"""The trials of a search, and the file that keeps them: whoever runs the same search again reads what is there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from foveate.configuration import describe
from foveate.data.samples import Sample
from foveate.method import InputError, Method


@dataclass(frozen=True)
class Candidate:
    """What is tried: methods as they are set up, and the budget that each of them was given."""

    methods: tuple[Method, ...]
    budgets: tuple[float, ...]

    @property
    def label(self) -> str:
        named = zip((one.card.slug for one in self.methods), self.budgets)
        return " + ".join(slug if slug == "dense" else f"{slug} at {budget:.3g}" for slug, budget in named)

    @property
    def baseline(self) -> bool:
        return all(one.card.baseline for one in self.methods)


@dataclass(frozen=True)
class Trial:
    """One measurement of a candidate, as it stands in the file.

    Attributes:
        what: "flops" (of one prefill), "quality" (answers to the first `samples`) or "time".
        configuration: [{"method", "settings"}, …].
        label: the candidate in words.
        flops, flops_ratio: of one prefill of batch 1, and as a share of dense.
        accuracy, agreement, kl: see `foveate.measure.quality`, over the first `samples`.
        time_ratio, time_low, time_high: median and quartiles of interleaved pairs with dense.
        seconds: that this measurement took.
        refused: why it cannot be measured; then nothing else is.
    """

    what: str
    configuration: list[dict[str, Any]]
    label: str
    samples: int = 0
    flops: int | None = None
    flops_ratio: float | None = None
    accuracy: float | None = None
    agreement: float | None = None
    kl: float | None = None
    time_ratio: float | None = None
    time_low: float | None = None
    time_high: float | None = None
    seconds: float = 0.0
    refused: str | None = None

    @property
    def cost(self) -> float:
        assert self.flops_ratio is not None
        return self.flops_ratio

    @property
    def quality(self) -> float:
        """Accuracy, or agreement with dense where no sample has an answer."""
        value = self.agreement if self.accuracy is None else self.accuracy
        assert value is not None
        return value


class TrialLog:
    """The file of all trials; a line that was cut off by an interruption is taken away."""

    def __init__(self, path: Path, run: dict[str, Any], on_trial: Callable[[Trial], None] | None) -> None:
        self.path, self.on_trial = path, on_trial or (lambda trial: None)
        self._trials: dict[tuple[str, str, int], Trial] = {}
        # Through JSON, so that it compares with what is read.
        run = json.loads(json.dumps(run))
        self.read = 0
        complete = self._complete()
        if not complete:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"run": run})
            return
        head, *lines = complete
        self.read = len(lines)
        before = head.get("run") if isinstance(head, dict) else None
        if not isinstance(before, dict):
            raise InputError(f"{path}: line 1 does not say what was tuned; give another --out")
        if before != run:
            other = ", ".join(key for key in {**run, **before} if before.get(key) != run.get(key))
            raise InputError(f"{path} has trials of another run (different: {other}); delete it or give another --out")
        for number, line in enumerate(lines, 2):
            try:
                trial = Trial(**line)
            except TypeError:
                raise InputError(f"{path}:{number}: not a trial; delete the file or give another --out") from None
            self._trials[trial.what, _text(trial.configuration), trial.samples] = trial

    def _complete(self) -> list[Any]:
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        values = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                values.append(json.loads(line))
            except ValueError:
                raise InputError(f"{self.path}:{number}: not JSON; delete the file or give another --out") from None
        if len(whole) < len(content):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
        return values

    def _append(self, values: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def find(self, what: str, candidate: Candidate, samples: int) -> Trial | None:
        return self._trials.get((what, key_of(candidate), samples))

    def add(self, trial: Trial) -> Trial:
        self._append({key: value for key, value in asdict(trial).items() if value is not None})
        self._trials[trial.what, _text(trial.configuration), trial.samples] = trial
        self.on_trial(trial)
        return trial


def _text(configuration: list[dict[str, Any]]) -> str:
    return json.dumps(configuration, sort_keys=True)


def key_of(candidate: Candidate) -> str:
    return _text(describe(candidate.methods))


def samples_digest(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for one in samples:
        digest.update(json.dumps([one.id, one.prompt, one.answer, one.type]).encode())
        for image in one.images:
            digest.update(f"{image.mode}{image.size}".encode())
            digest.update(image.tobytes())
        for video in one.videos:
            digest.update(str(video.frames.shape).encode())
            digest.update(video.frames.tobytes())
    return digest.hexdigest()[:16]


def weights_digest(model: Any, most: int = 16) -> str:
    """Of `most` values of every parameter: other weights are noticed without reading all of a large model."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // most)][:most].double().cpu()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(torch.nan_to_num(values).numpy().tobytes())
    return digest.hexdigest()[:16]
