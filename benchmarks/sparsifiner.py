"""Sparsifiner: what sparse attention costs beside dense SDPA, at which share of the keys they break even, and quality.

`product`: of one layer, DeiT-S' heads, at several numbers of tokens N. Times from interleaved pairs as a ratio to dense
SDPA of all N x N: `product` is the sparse product with keys given; `all` finds them too (estimate and selection). The
break-even share is where the ratio crosses 1, interpolated between the budgets measured; null where all are above
(dense is never beaten), the greatest where all are below. The masked dense product, which skips nothing, stands beside.

`model`: ViT-B/16 at 224 x 224, batch 8, whole forwards, random weights: time and FLOPs to dense, beside ToMe.

`quality` (with --weights, a folder that `foveate train sparsifiner` wrote): mean average precision of the names on the
test scenes and time to dense for each budget, keys by the trained estimate; by lot; and a window of the nearest patches
(the class token's key and as many as the budget allows): what a user could have without training. ToMe and smaller
pictures (average pool) on the zoo's tiny-vit, as they come, stand beside. One thread measures best.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llava_shaped import write
from torch import Tensor
from torch.nn import functional as F

from foveate import zoo
from foveate.apply import apply
from foveate.measure.flops import count_flops
from foveate.measure.timing import interleave, seconds
from foveate.method import build
from foveate.methods.reduce.sparsifiner import Connectivity, Sparsifiner
from foveate.nn.sparse_attention import largest, places, sparse_attention
from foveate.train.sparsifiner import names_precision

CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


class Blind(Sparsifiner):
    """A `Sparsifiner` whose keys do not depend on the picture: "random", or a "local" window."""

    kind = "random"

    @torch.no_grad()
    def connect(
        self, layer: int, query: Tensor, key: Tensor, where: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        count = self.keys(self.count, self.budget)
        return _blind(self.kind, self.count, count, layer).expand(*query.shape[:3], -1), None


@functools.lru_cache(maxsize=64)
def _blind(kind: str, tokens: int, count: int, layer: int) -> Tensor:
    side = round((tokens - 1) ** 0.5)
    if kind == "random":
        score = torch.rand(tokens - 1, tokens, generator=torch.Generator().manual_seed(layer))
    else:
        axis = torch.arange(side, dtype=torch.float32)
        grid = torch.cartesian_prod(axis, axis)
        score = F.pad(-(torch.cdist(grid, grid)), (1, 0), value=1.0)
    return places(largest(score, count), count)


def ratio(dense: Callable[[], Any], other: Callable[[], Any], options: argparse.Namespace) -> dict[str, float]:
    clock = CLOCKS[options.clock]
    timing = interleave(
        lambda: seconds(dense, options.device, clock), lambda: seconds(other, options.device, clock), options.pairs,
        warmup=2,
    )  # fmt: skip
    return {
        "time_ratio": timing.ratio, "time_low": timing.low, "time_high": timing.high,
        "dense_seconds": timing.first_seconds, "seconds": timing.second_seconds,
    }  # fmt: skip


def break_even(shares: list[float], ratios: list[float]) -> float | None:
    """Where ratios cross 1, shares rising."""
    if ratios[0] >= 1:
        return None
    for (low, before), (high, after) in zip(zip(shares, ratios), zip(shares[1:], ratios[1:])):
        if after >= 1:
            return float(np.interp(1.0, [before, after], [low, high]))
    return shares[-1]


def products(options: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for tokens in options.tokens:
        query, key, value = torch.randn(3, options.batch, 6, tokens, 64, device=options.device).unbind()
        predictor, rows = Connectivity(tokens, 64, 6).to(options.device), query[:, :, 1:]
        measured = []
        for share in sorted(options.budgets):
            count = Sparsifiner.keys(tokens, share)
            index = places(largest(predictor.estimate(rows, key), count), count)

            def found(count: int = count, rows: Tensor = rows, key: Tensor = key, predictor: Any = predictor) -> Tensor:
                return places(largest(predictor.estimate(rows, key), count), count)

            def sparse(index: Tensor, how: str = "auto", q: Any = rows, k: Any = key, v: Any = value) -> Tensor:
                return sparse_attention(q, k, v, index, product=how)

            dense = functools.partial(F.scaled_dot_product_attention, query, key, value)
            row = {
                "tokens": tokens, "budget": share, "sparsity": 1 - count / tokens,
                "product": ratio(dense, functools.partial(sparse, index), options),
                "all": ratio(dense, lambda found=found, sparse=sparse: sparse(found()), options),
                "masked": ratio(dense, functools.partial(sparse, index, "masked"), options),
            }  # fmt: skip
            measured.append(row)
            print(tokens, share, *(f"{name} {row[name]['time_ratio']:.3f}" for name in ("product", "all", "masked")))
        budgets = [row["budget"] for row in measured]
        even = {name: break_even(budgets, [row[name]["time_ratio"] for row in measured]) for name in ("product", "all")}
        print(tokens, "break-even share of the keys", even)
        results.append({"tokens": tokens, "break_even_budget": even, "measured": measured})
    return results


def whole(options: argparse.Namespace) -> list[dict[str, Any]]:
    model = Sparsifiner(backbone=options.backbone).to(options.device).eval()
    side = model.backbone.patch_embed.img_size
    pictures = torch.randn(options.batch, 3, *side, device=options.device)
    dense = functools.partial(model.backbone, pictures)
    flops = count_flops(dense)
    results = []
    for budget in options.budgets:
        model.budget = budget
        run = functools.partial(model, pictures)
        row = {"method": "sparsifiner", "budget": budget, "flops_ratio": count_flops(run) / flops}
        results.append(row | ratio(dense, run, options))
        print(results[-1])
    for r in options.tome:
        applied = functools.partial(_applied, model.backbone, {"r": r}, pictures)
        row = {"method": "tome", "r": r, "flops_ratio": count_flops(applied) / flops}
        results.append(row | ratio(dense, applied, options))
        print(results[-1])
    return results


def _applied(model: Any, settings: dict[str, Any], pictures: Tensor) -> Tensor:
    with apply(model, build("tome", settings)):
        out: Tensor = model(pictures)
    return out


def quality(options: argparse.Namespace) -> list[dict[str, Any]]:
    dense_model = zoo.load("tiny-vit")
    pictures = torch.randn(options.batch, 3, 96, 96)
    dense = functools.partial(dense_model, pictures)
    flops = count_flops(dense)
    results: list[dict[str, Any]] = [{"method": "dense", "precision": names_precision(dense_model, options.scenes)}]

    def note(row: dict[str, Any], model: Any, run: Callable[[], Any]) -> None:
        row |= {"precision": names_precision(model, options.scenes), "flops_ratio": count_flops(run) / flops}
        results.append(row | ratio(dense, run, options))
        print(results[-1])

    for kind in ("learned", "random", "local"):
        cls = Sparsifiner if kind == "learned" else Blind
        model: Any = cls.from_pretrained(options.weights).eval()
        model.kind = kind
        for budget in options.budgets:
            model.budget = budget
            note({"method": f"sparsifiner, {kind} keys", "budget": budget}, model, functools.partial(model, pictures))
    for r in options.tome:
        with apply(dense_model, build("tome", {"r": r})):
            precision = names_precision(dense_model, options.scenes)
        run = functools.partial(_applied, dense_model, {"r": r}, pictures)
        row = {"method": "tome", "r": r, "precision": precision, "flops_ratio": count_flops(run) / flops}
        results.append(row | ratio(dense, run, options))
        print(results[-1])
    small = zoo.load("tiny-vit")
    small.set_input_size(img_size=(48, 48))
    smaller = _Smaller(small)
    note({"method": "pool, half the side"}, smaller, functools.partial(smaller, pictures))
    return results


class _Smaller(torch.nn.Module):
    """The model on pictures of half the side."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> Tensor:
        out: Tensor = self.model(F.avg_pool2d(pictures, 2))
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 577, 1025, 2305])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.05, 0.1, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--tome", type=int, nargs="+", default=[8, 13])
    parser.add_argument("--weights", type=Path, help="folder of a trained model; without, quality is left out")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs that count (9)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS), help="cpu: this thread alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="sparsifiner", help="of the file in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    with torch.inference_mode():
        results: dict[str, Any] = {"product": products(options), "model": whole(options)}
        if options.weights:
            results["quality"] = quality(options)
    write(options.name, options, results)


if __name__ == "__main__":
    main()
