"""Pictures a second of a plain ViT with methods on it, beside itself and beside pooled patches.

python benchmarks/throughput.py --device cuda --dtype bfloat16 --batch 1 256 --pairs 20

timm's ViT (random weights; which tokens go does not change what a forward costs), interleaved pairs of whole forwards.
A row's `realised_share` is (1 - time ratio) / (1 - FLOPs ratio), `peak_bytes` what a forward allocates beside weights
and pictures (on CUDA). `dense` is the model beside itself: how much of a ratio is noise.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm
import torch
from llava_shaped import write

from foveate.apply import apply
from foveate.hosts import adapt
from foveate.measure.flops import count_flops
from foveate.measure.memory import peak_bytes
from foveate.measure.timing import interleave, seconds
from foveate.method import Method, method_class


def measured(model: Any, pictures: torch.Tensor, method: Method, pairs: int) -> dict[str, Any]:
    """One method beside the model as it is, on the same pictures."""

    @torch.inference_mode()
    def run() -> None:
        model(pictures)

    def once(context: AbstractContextManager[Any]) -> float:
        with context:
            return seconds(run, pictures.device)

    timing = interleave(lambda: once(nullcontext()), lambda: once(apply(model, method)), pairs, warmup=3)
    flops, peak = count_flops(run), peak_bytes(run, pictures.device)
    with apply(model, method):
        ratio, reduced_peak = count_flops(run) / flops, peak_bytes(run, pictures.device)
    share = None if ratio == 1 else (1 - timing.ratio) / (1 - ratio)
    return {
        "flops_ratio": ratio, "time_ratio": timing.ratio, "time_low": timing.low, "time_high": timing.high,
        "pictures_a_second": len(pictures) / timing.second_seconds,
        "dense_pictures_a_second": len(pictures) / timing.first_seconds,
        "realised_share": share, "peak_bytes": {"dense": peak, "method": reduced_peak},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_base_patch16_224", "vit_large_patch16_384"])
    parser.add_argument("--methods", nargs="+", default=["tome", "pool", "random"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--result", default="throughput", help="name of the JSON file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    dtype, rows = getattr(torch, options.dtype), []
    for name in options.models:
        model = timm.create_model(name).eval().to(options.device, dtype)
        side = model.default_cfg["input_size"][-1]
        methods = [("dense", 1.0)] + [(slug, budget) for slug in options.methods for budget in options.budgets]
        for batch in options.batch:
            pictures = torch.randn(batch, 3, side, side, device=options.device, dtype=dtype)
            for slug, budget in methods:
                method = method_class(slug).for_budget(budget, adapt(model).shape)
                about = {"model": name, "batch": batch, "method": slug, "budget": budget}
                rows.append(about | {"settings": method.hyperparameters()})
                rows[-1] |= measured(model, pictures, method, options.pairs)
                print(rows[-1], flush=True)
                write(options.result, options, {"results": rows})


if __name__ == "__main__":
    main()
