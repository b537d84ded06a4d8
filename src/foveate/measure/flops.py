"""FLOPs of one real run, a method's own work included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two matrix products: (B, H, S, D) x (B, G, T, D) and the probabilities x (B, G, T, E)."""
    batch, heads, rows, width = query
    columns, out = key[2], value[3]
    return int(2 * batch * heads * rows * columns * (width + out))


# Out of the box the counter knows the CUDA kernels only: on a CPU it would leave attention out without a word.
_KERNELS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def flop_counter() -> FlopCounterMode:
    """A `FlopCounterMode` that also counts the CPU's fused attention.

    Counted are matrix products, convolutions and attention, one multiply-add as 2. Causal attention counts as the full
    square, as everywhere in the literature. Softmax, norms, activations and sorting count nothing.
    """
    return FlopCounterMode(display=False, custom_mapping=_KERNELS)


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of one call of `run`."""
    with flop_counter() as counter:
        run()
    return int(counter.get_total_flops())
