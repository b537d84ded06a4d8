"""EVAD's detector, dense and with dropout: time, peak memory, and how much of the FLOPs saved is time saved.

Realised share = (1 - time ratio) / (1 - FLOPs ratio), from interleaved pairs of whole forwards of one clip, goal at
least 0.95; the paper's ViT-B with 16 frames of 288 x 288 px unless told otherwise, random weights. In the same forwards
the three parts are timed: `encoder`, `locate` (pyramid and proposal heads: the same work with and without dropout) and
`decoder`. FLOPs are those of the real run, the scores' own included (see `foveate.measure.flops`). One thread measures
best: what is left besides matrix products then weighs what it costs.

`videomae` is the same for `foveate.apply(videomae, "evad")` on such an encoder alone. There a layer's output comes from
the model's own attention, and the scores from another pass over its queries and keys.

`peak_bytes` is the most that one forward has allocated at a time, above weights and clip.

python benchmarks/evad.py --device cuda --dtype bfloat16 --batch 8 --pairs 20 --result evad_gpu     on an accelerator
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from llava_shaped import clock, write
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from foveate.apply import apply
from foveate.measure import memory
from foveate.measure.flops import count_flops
from foveate.measure.timing import Timing, interleave, seconds
from foveate.methods.video.evad import Evad
from foveate.methods.video.evad_detector import CONFIGURATIONS, EvadDetector

SETTINGS: tuple[dict[str, float], ...] = ({"keep": 0.7, "weight": 1.0}, {"keep": 0.6, "weight": 4.0})
"""The paper's two."""
DENSE = {"keep": 1.0, "weight": 1.0}
PARTS = {"encoder": "encode", "locate": "locate", "decoder": "classify"}


class Parts:
    """Seconds, or FLOPs, of the detector's parts in the last forward. `pyramid` counts as part of `locate`."""

    def __init__(self, detector: EvadDetector, device: str) -> None:
        self.spent: dict[str, float] = {}
        self._read = clock(device)
        for name, method in PARTS.items():
            setattr(detector, method, self._watched(name, getattr(detector, method)))
        detector.pyramid.forward = self._watched("locate", detector.pyramid.forward)  # type: ignore[method-assign]

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*args: Any) -> Any:
            start = self._read()
            result = function(*args)
            self.spent[name] = self.spent.get(name, 0.0) + self._read() - start
            return result

        return watched


def build(options: argparse.Namespace) -> tuple[EvadDetector, Tensor]:
    """The detector, and clips."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    # Without gradients: the FLOP counter stumbles over parameters that are handed on as they are.
    detector = EvadDetector.named(options.config).eval().requires_grad_(False)
    frames = len(detector.positions) * detector.tubelet
    detector = detector.to(options.device, getattr(torch, options.dtype))
    clips = torch.randn(options.batch, 3, frames, options.side, options.side)
    return detector, clips.to(options.device, detector.mask_token.dtype)


def peak_bytes(detector: EvadDetector, clip: Tensor, setting: dict[str, float]) -> int:
    """Most bytes that one forward has allocated at a time, of what PyTorch allocates: tensors, scratch of kernels."""
    detector.set_dropout(**setting)
    if clip.is_cuda:
        with torch.no_grad():
            detector(clip)
            return memory.peak_bytes(lambda: detector(clip), clip.device) or 0
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        detector(clip)
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    return int(np.cumsum([one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]).max())


def timed(detector: EvadDetector, clip: Tensor, parts: Parts, setting: dict[str, float], pairs: int) -> dict[str, Any]:
    """Times of dense and dropped forwards, in pairs."""
    passed: dict[str, list[dict[str, float]]] = {"dense": [], "dropped": []}

    @torch.no_grad()
    def run() -> None:
        detector(clip)

    def once(name: str, dropout: dict[str, float]) -> float:
        detector.set_dropout(**dropout)
        parts.spent = {}
        spent = seconds(run, clip.device)
        passed[name].append(dict(parts.spent))
        return spent

    timing = interleave(lambda: once("dense", DENSE), lambda: once("dropped", setting), pairs)
    flops = {}
    for name, dropout in (("dense", DENSE), ("dropped", setting)):
        detector.set_dropout(**dropout)
        flops[name] = count_flops(run)
    return {
        **setting,
        **summary(timing, flops["dense"], flops["dropped"]),
        "parts": {
            part: {f"{name}_seconds": float(np.median([one[part] for one in runs[-pairs:]]))
                   for name, runs in passed.items()}
            for part in PARTS
        },
    }  # fmt: skip


def applied(options: argparse.Namespace, clip: Tensor, setting: dict[str, float]) -> dict[str, Any]:
    """Times of a VideoMAE without and with the method, in pairs."""
    model = EvadDetector.named(options.config, image=options.side).backbone.eval().requires_grad_(False)
    model, clip = model.to(clip.device, clip.dtype), clip.transpose(1, 2)

    def run() -> None:
        model(clip)

    def once(context: AbstractContextManager[Any], read: Callable[[], float]) -> float:
        with context:
            return read()

    def method() -> AbstractContextManager[Any]:
        return apply(model, Evad(**setting))

    timing = interleave(
        lambda: once(nullcontext(), lambda: seconds(run, clip.device)),
        lambda: once(method(), lambda: seconds(run, clip.device)),
        options.pairs,
    )
    return summary(timing, count_flops(run), once(method(), lambda: count_flops(run)))


def summary(timing: Timing, dense_flops: float, flops: float) -> dict[str, float]:
    ratio = flops / dense_flops
    return {
        "dense_flops": dense_flops, "flops_ratio": ratio,
        "time_ratio": timing.ratio, "time_low": timing.low, "time_high": timing.high,
        "dense_seconds": timing.first_seconds, "dropped_seconds": timing.second_seconds,
        "realised_share": (1 - timing.ratio) / (1 - ratio),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="vit-b", choices=tuple(CONFIGURATIONS))
    parser.add_argument("--side", type=int, default=288, help="px of a frame (288)")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs, after one that does not count (5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=1, help="clips (1)")
    parser.add_argument("--result", default="evad", help="name of the JSON file (evad)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    detector, clip = build(options)
    dense_peak = peak_bytes(detector, clip, DENSE)
    peaks = [peak_bytes(detector, clip, setting) for setting in SETTINGS]
    parts = Parts(detector, options.device)
    results = []
    for setting, peak in zip(SETTINGS, peaks):
        row = timed(detector, clip, parts, setting, options.pairs)
        row["peak_bytes"] = {"dense": dense_peak, "dropped": peak}
        row["videomae"] = applied(options, clip, setting)
        results.append(row)
        print(row)
    write(options.result, options, {"goal": "realised_share >= 0.95", "results": results})


if __name__ == "__main__":
    main()
