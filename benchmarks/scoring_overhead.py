"""What looking costs: a prefill in which a method scores and selects but nothing is dropped, against plain dense SDPA.

Goals: at most 3 % of the time, and no attention map of the whole sequence in memory, not even of one head: the largest
tensor with two axes of a sequence's length (`largest_sequence_by_sequence`) has 0 bytes. Beside it stands the usual way
to get at attention, eager attention with `output_attentions=True`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from llava_shaped import arguments, build, nothing_dropped, prefill, write
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from foveate.apply import apply
from foveate.measure.flops import count_flops
from foveate.measure.memory import peak_bytes
from foveate.measure.timing import interleave, seconds
from foveate.method import build as build_method

SETTINGS: dict[str, dict[str, Any]] = {
    "fopru": {"keep": 0.5},
    "vtc-cls": {"keep": 0.5},
    "pyramiddrop": {},
    "aim": {"keep": 0.5},
    "fastv": {},
    "globalcom2": {},
    "hired": {},
    "mustdrop": {},
    "tome": {},
    "visionzip": {},
}


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, and the largest with two axes of a sequence's length.

    Args:
        lengths: of the sequences.
        heads: of the attentions. Heads and rows may be in one axis.
    """

    def __init__(self, lengths: tuple[int, ...], heads: tuple[int, ...]) -> None:
        super().__init__()
        self.columns = set(lengths)
        self.rows = {length * count for length in lengths for count in (1, *heads)}
        self.largest: tuple[int, tuple[int, ...], str] = (0, (), "")
        self.maps: tuple[int, tuple[int, ...], str] = (0, (), "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for one in tree_flatten(output)[0]:
            if not isinstance(one, Tensor):
                continue
            # The storage: an expanded view of one number takes no memory.
            taken = min(one.untyped_storage().nbytes(), math.prod(one.shape) * one.element_size())
            found = (taken, tuple(one.shape), str(func))
            self.largest = max(self.largest, found)
            if one.ndim >= 2 and one.shape[-1] in self.columns and self.rows.intersection(one.shape[:-1]):
                self.maps = max(self.maps, found)
        return output


@contextmanager
def eagerly(model: Any) -> Iterator[None]:
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def main() -> None:
    options = arguments(__doc__).parse_args()
    model, inputs = build(options)
    model.set_attn_implementation("sdpa")
    dense = prefill(model, inputs)

    @torch.inference_mode()
    def with_attentions() -> Any:
        return model(**inputs, use_cache=True, logits_to_keep=1, output_attentions=True)

    visual = options.grid**2
    lengths = visual, visual + 1, visual + options.text
    heads = max(1, options.width // 64), max(1, options.vision_width // 64)
    plain_flops = count_flops(dense)

    def measured(context: Callable[[], AbstractContextManager[Any]], run: Callable[[], Any] = dense) -> dict[str, Any]:
        def once(within: AbstractContextManager[Any], what: Callable[[], Any]) -> float:
            with within:
                return seconds(what, options.device)

        timing = interleave(lambda: once(nullcontext(), dense), lambda: once(context(), run), options.pairs)
        with context():
            flops = count_flops(run)
            with LargestTensor(lengths, heads) as tensors:
                run()
            peak = peak_bytes(run, options.device)
        return {
            "time_ratio": timing.ratio, "time_low": timing.low, "time_high": timing.high,
            "dense_seconds": timing.first_seconds, "flops_ratio": flops / plain_flops, "peak_cuda_bytes": peak,
            "largest_tensor": dict(zip(("bytes", "shape", "operation"), tensors.largest)),
            "largest_sequence_by_sequence": dict(zip(("bytes", "shape", "operation"), tensors.maps)),
        }  # fmt: skip

    results: dict[str, Any] = {"dense again": measured(nullcontext)}
    for slug, settings in SETTINGS.items():
        method = nothing_dropped(build_method(slug, settings))
        results[slug] = measured(lambda method=method: apply(model, method))  # type: ignore[misc]
        print(slug, results[slug]["time_ratio"], results[slug]["largest_sequence_by_sequence"])
    results["eager with output_attentions"] = measured(lambda: eagerly(model), with_attentions)
    goal = "time_ratio <= 1.03, largest_sequence_by_sequence 0 bytes"
    write("scoring_overhead", options, {"goal": goal, "results": results})


if __name__ == "__main__":
    main()
