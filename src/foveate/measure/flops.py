"""FLOPs of one real run, a method's own work included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from foveate.nn.attention import kernel


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two matrix products: (B, H, S, D) x (B, G, T, D) and the probabilities x (B, G, T, E)."""
    batch, heads, rows, width = query
    columns, out = key[2], value[3]
    return int(2 * batch * heads * rows * columns * (width + out))


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Five matrix products: the probabilities anew, and the gradients of these, of query, key and value."""
    batch, heads, rows, width = query
    columns, out = key[2], value[3]
    return int(2 * batch * heads * rows * columns * (3 * width + 2 * out))


def _sampled_flops(wanted: Any, rows: Any, columns: Any, *args: Any, **kwargs: Any) -> int:
    """Of a product (R, D) x (D, S), the entries that a sparse matrix has."""
    return int(2 * wanted.values().numel() * rows.shape[-1])


def _bag_flops(
    table: Any, index: Any, offsets: Any, by_frequency: Any = False, mode: int = 0, sparse: Any = False,
    weights: Any = None, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Weighted sums of rows of a table (T, D); plain sums are additions only and count nothing."""
    return 0 if weights is None else int(2 * index.numel() * table.shape[1])


def _column_sums_flops(query: Any, key: Any, *args: Any, **kwargs: Any) -> int:
    """Two sweeps over queries and keys, and the sums of columns."""
    batch, heads, length, width = query
    return int(2 * batch * heads * length * length * (2 * width + 1))


# Their arguments come as they are, not as shapes.
_sampled_flops._get_raw = True  # type: ignore[attr-defined]
_bag_flops._get_raw = True  # type: ignore[attr-defined]

# Out of the box the counter knows the CUDA kernels only: on a CPU it would leave attention out without a word.
_KERNELS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.aten.sparse_sampled_addmm: _sampled_flops,
    torch.ops.aten._embedding_bag: _bag_flops,
    torch.ops.aten._embedding_bag_forward_only: _bag_flops,
}


def flop_counter() -> FlopCounterMode:
    """A `FlopCounterMode` that also counts the CPU's fused attention, sparse products, and our own kernels.

    Counted are matrix products, convolutions and attention, one multiply-add as 2. Causal attention counts as the full
    square, as everywhere in the literature. Softmax, norms, activations and sorting count nothing.
    """
    kernels = dict(_KERNELS)
    if torch.cuda.is_available() and kernel(torch.device("cuda")) is not None:
        kernels[torch.ops.foveate.column_sums] = _column_sums_flops
    counter = FlopCounterMode(display=False, custom_mapping=kernels)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


class _NoModules:
    """In place of the counter's own, which notes for each module what it costs. We ask for sums alone, and the original
    fails without gradients where a module gets a parameter, or a view of one, as its input."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of one call of `run`."""
    with flop_counter() as counter:
        run()
    return int(counter.get_total_flops())


def count_linear_flops(run: Callable[[], object]) -> int:
    """FLOPs of linear and convolution layers in one call of `run`, without products of activations (attention)."""
    aten = torch.ops.aten
    with flop_counter() as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return int(sum(counts.get(kernel, 0) for kernel in (aten.mm, aten.addmm, aten.convolution, aten._convolution)))
