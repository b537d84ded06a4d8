"""Time of one thing as a share of another's, from interleaved pairs: drift of the machine hits both alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from foveate.method import InputError


@dataclass(frozen=True)
class Timing:
    """`ratio` is the median of second / first over the pairs, `low` and `high` its quartiles; medians in seconds."""

    ratio: float
    low: float
    high: float
    first_seconds: float
    second_seconds: float
    pairs: int

    @classmethod
    def of(cls, measured: Sequence[tuple[float, float]]) -> Timing:
        """From the seconds (first, second) of each pair."""
        ratios = [second / first for first, second in measured]
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        firsts, seconds_ = zip(*measured)
        return cls(
            float(middle), float(low), float(high), float(np.median(firsts)), float(np.median(seconds_)), len(measured)
        )


def seconds(
    run: Callable[[], object], device: torch.device | str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> float:
    """How long one call of `run` takes, the device's queue included."""
    _synchronize(device)
    start = clock()
    run()
    _synchronize(device)
    return clock() - start


def interleave(first: Callable[[], float], second: Callable[[], float], pairs: int = 10, warmup: int = 1) -> Timing:
    """Calls first, second, first, second, …; each returns the seconds of what it measured.

    Args:
        first: what to compare with (dense).
        second: what is compared.
        pairs: how many pairs count, at least 1.
        warmup: pairs before them that do not count.

    Raises:
        InputError: if pairs is not positive.
    """
    if pairs < 1:
        raise InputError(f"timing needs at least 1 pair, not {pairs}")
    return Timing.of([(first(), second()) for _ in range(warmup + pairs)][warmup:])


def _synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
