"""What benchmarks of vision transformers with fewer tokens share: time beside dense, ToMe at equal cost, training."""

from __future__ import annotations

import argparse
import bisect
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm
import torch
import trainings
from torch import Tensor, nn

from foveate import zoo
from foveate.apply import apply
from foveate.measure.flops import count_flops
from foveate.measure.timing import interleave, seconds
from foveate.methods.reduce.tome import ToMe
from foveate.train.fine_tune import average_precision


def beside(dense: nn.Module, other: nn.Module, pictures: Tensor, pairs: int, method: Any = None) -> dict[str, float]:
    """FLOPs and time of `other`, with a method applied or (None) as it is, as shares of dense's, and how much of the
    FLOPs saved is time saved: (1 - time ratio) / (1 - FLOPs ratio)."""

    @torch.inference_mode()
    def run(model: nn.Module) -> Tensor:
        out: Tensor = model(pictures)
        return out

    def once(model: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> float:
        with context():
            return seconds(functools.partial(run, model))

    changed: Callable[[], AbstractContextManager[Any]] = (
        nullcontext if method is None else functools.partial(apply, other, method)
    )
    ratio = counted(other, pictures, changed) / counted(dense, pictures)
    timing = interleave(lambda: once(dense, nullcontext), lambda: once(other, changed), pairs)
    return {
        "flops_ratio": ratio, "time_ratio": timing.ratio, "time_low": timing.low, "time_high": timing.high,
        "dense_seconds": timing.first_seconds, "realised_share": (1 - timing.ratio) / (1 - ratio),
    }  # fmt: skip


@torch.inference_mode()
def counted(
    model: nn.Module, pictures: Tensor, context: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> int:
    """FLOPs of one forward."""
    with context():
        return count_flops(lambda: model(pictures))


def tome_at(dense: nn.Module, pictures: Tensor, flops_ratio: float, most: int) -> ToMe:
    """ToMe with the r in 1..`most` whose FLOPs are nearest to that share of dense's."""
    whole = counted(dense, pictures[:1])

    @functools.cache
    def ratio(r: int) -> float:
        return counted(dense, pictures[:1], functools.partial(apply, dense, ToMe(r=r))) / whole

    # More merged is less spent.
    first = bisect.bisect_left(range(1, most), -flops_ratio, key=lambda r: -ratio(r)) + 1
    return ToMe(r=min({max(1, first - 1), first}, key=lambda r: abs(ratio(r) - flops_ratio)))


def large(slimmed: dict[str, nn.Module], pairs: int, batch: int, seed: int) -> list[dict[str, Any]]:
    """ViT-B/16 at 224 x 224 px with random weights, its slimmed forms, and ToMe at the FLOPs of each."""
    torch.manual_seed(seed)
    dense, pictures = (
        timm.create_model("vit_base_patch16_224", pretrained=False).eval(),
        torch.randn(batch, 3, 224, 224),
    )
    rows = []
    for label, model in slimmed.items():
        row: dict[str, Any] = {"method": label, **beside(dense, model.eval(), pictures, pairs)}
        tome = tome_at(dense, pictures, row["flops_ratio"], 24)
        rows += [row, {"method": "tome", "r": tome.r, "beside": label, **beside(dense, dense, pictures, pairs, tome)}]
        print(*rows[-2:], sep="\n", flush=True)
    return rows


def arguments(description: str | None, slug: str) -> argparse.ArgumentParser:
    """The options of `trainings.arguments`, and how large the trainings and what is timed are."""
    parser = trainings.arguments(description, slug)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--test", type=int, default=2000, help="scenes of the test split")
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs")
    parser.add_argument("--batch", type=int, default=8, help="pictures of ViT-B/16; of tiny-vit 4 times as many")
    return parser


def trained(slug: str, options: argparse.Namespace, label: str, **settings: Any) -> list[dict[str, Any]]:
    """See `trainings.trained`."""
    return trainings.trained(slug, options, label, {"steps": options.steps, "test_scenes": options.test}, **settings)


def summary(label: str, runs: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, Any]:
    """A row of results: means over seeds, and each."""
    return {"method": label, **trainings.means(runs, names), "flops_ratio": runs[0]["flops"] / runs[0]["dense_flops"]}


def small(flops_ratio: float, scenes: int, pairs: int, batch: int) -> list[dict[str, Any]]:
    """tiny-vit as it is, and with ToMe without any training, at that share of its FLOPs."""
    dense, pictures = zoo.load("tiny-vit"), torch.randn(batch, 3, 96, 96)
    tome = tome_at(dense, pictures, flops_ratio, 72)
    with apply(dense, tome):
        precision = average_precision(dense, scenes)
    return [
        {"method": "dense", "names_mean_average_precision": average_precision(dense, scenes)},
        {"method": "tome, not trained", "r": tome.r, "names_mean_average_precision": precision,
         **beside(dense, dense, pictures, pairs, tome)},
    ]  # fmt: skip
