# mypy: disable-error-code="no-untyped-def"
# (arguments of Triton kernels are pointers and numbers, for which there are no types)
"""Attention that tokens receive, on a GPU: column sums of softmax maps that are never in memory.

Of query (B, H, S, D), key (B, G, S, D) and weight (B, S), with A = softmax(q k^T scaling) in float32,

    r[b, j] = mean over heads h of  sum_i weight[b, i] A[b, h, i, j]

by two sweeps over queries and keys: the first finds each row's logarithm of the sum of exponentials, the second adds up
the columns. Each costs as much as the product of queries and keys, and next to no memory. Needs Triton, which comes
with PyTorch's builds for CUDA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 64
"""Rows and columns of the part of a map that one program holds."""


@triton.jit
def _logits(
    query, key, valid, row, column, size: tl.constexpr, length, width,
    query_step, key_step, scaling, causal: tl.constexpr, masked: tl.constexpr, precise: tl.constexpr,
):  # fmt: skip
    """(block, block) logits in base 2 of the rows and columns at these places; -inf where nothing is seen."""
    channel = tl.arange(0, size)
    there = channel[None, :] < width
    q = tl.load(query + row[:, None] * query_step + channel[None, :], (row[:, None] < length) & there, 0.0)
    k = tl.load(key + column[:, None] * key_step + channel[None, :], (column[:, None] < length) & there, 0.0)
    # TF32 would round what are scores to three digits.
    found = tl.dot(q, tl.trans(k), input_precision="ieee" if precise else "tf32") * scaling
    seen = (row[:, None] < length) & (column[None, :] < length)
    if causal:
        seen = seen & (column[None, :] <= row[:, None])
    if masked:
        seen = seen & (tl.load(valid + column, column < length, 0) != 0)[None, :]
    return tl.where(seen, found, float("-inf"))


@triton.jit
def _start(query, key, valid, length, heads, share, query_batch, query_head, key_batch, key_head):
    """Where the queries, keys and mask of a program's sample and head begin."""
    one = tl.program_id(0)
    batch, head = (one // heads).to(tl.int64), one % heads
    query += batch * query_batch + head * query_head
    key += batch * key_batch + (head // share) * key_head
    return query, key, valid + batch * length


@triton.jit
def _row_sums(
    query, key, valid, sums, length, width, heads, share,
    query_batch, query_head, query_step, key_batch, key_head, key_step, scaling,
    block: tl.constexpr, size: tl.constexpr, causal: tl.constexpr, masked: tl.constexpr, precise: tl.constexpr,
):  # fmt: skip
    """sums (B H, S): log2 of each row's sum of exponentials, +inf where a row sees nothing."""
    query, key, valid = _start(
        query, key, valid, length, heads, share, query_batch, query_head, key_batch, key_head
    )  # fmt: skip
    row = tl.program_id(1) * block + tl.arange(0, block)
    greatest = tl.full((block,), float("-inf"), tl.float32)
    total = tl.zeros((block,), tl.float32)
    stop = tl.minimum(length, (tl.program_id(1) + 1) * block) if causal else length
    for first in range(0, stop, block):
        logits = _logits(
            query, key, valid, row, first + tl.arange(0, block), size, length, width,
            query_step, key_step, scaling, causal, masked, precise,
        )  # fmt: skip
        higher = tl.maximum(greatest, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(greatest - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        greatest = higher
    result = tl.where(total > 0, greatest + tl.log2(total), float("inf"))
    tl.store(sums + tl.program_id(0).to(tl.int64) * length + row, result, row < length)


@triton.jit
def _column_sums(
    query, key, valid, sums, weight, received, length, width, heads, share,
    query_batch, query_head, query_step, key_batch, key_head, key_step, scaling,
    block: tl.constexpr, size: tl.constexpr, causal: tl.constexpr, masked: tl.constexpr, precise: tl.constexpr,
):  # fmt: skip
    """received (B H, S): of each column the sum over rows i of weight[i] 2^(logit - sums[i])."""
    query, key, valid = _start(
        query, key, valid, length, heads, share, query_batch, query_head, key_batch, key_head
    )  # fmt: skip
    weight += (tl.program_id(0) // heads).to(tl.int64) * length
    column = tl.program_id(1) * block + tl.arange(0, block)
    total = tl.zeros((block,), tl.float32)
    start = tl.program_id(1) * block if causal else 0
    for first in range(start, length, block):
        row = first + tl.arange(0, block)
        logits = _logits(
            query, key, valid, row, column, size, length, width,
            query_step, key_step, scaling, causal, masked, precise,
        )  # fmt: skip
        base = tl.load(sums + tl.program_id(0).to(tl.int64) * length + row, row < length, float("inf"))
        counts = tl.load(weight + row, row < length, 0.0)
        total += tl.sum(tl.exp2(logits - base[:, None]) * counts[:, None], 0)
    tl.store(received + tl.program_id(0).to(tl.int64) * length + column, total, column < length)


@torch.library.custom_op("foveate::column_sums", mutates_args=())
def column_sums(
    query: Tensor, key: Tensor, scaling: float, weight: Tensor, causal: bool, valid: Tensor | None
) -> Tensor:
    """(B, S) float32: of each column j, the mean over heads of `sum_i weight[b, i] softmax(q k^T scaling)[i, j]`.

    Args:
        query, key: (B, H, S, D) and (B, G, S, D), G dividing H.
        weight: (B, S) float.
        causal: whether a token sees only itself and earlier ones.
        valid: (B, S) bool, keys that can be seen; None for all. A row that sees none adds nothing.
    """
    batch, heads, length, width = query.shape
    query, key = (one if one.stride(3) == 1 else one.contiguous() for one in (query.detach(), key.detach()))
    weight = weight.float().contiguous()
    mask = weight if valid is None else valid.to(torch.uint8).contiguous()
    sums = torch.empty(batch * heads, length, device=query.device)
    found = torch.empty_like(sums)
    # Heads come first: there may be more of them than the other axes of a grid take.
    grid = (batch * heads, triton.cdiv(length, _BLOCK))
    shape = (length, width, heads, heads // key.shape[1], *query.stride()[:3], *key.stride()[:3])
    # Exponentials are those of base 2, which a GPU has.
    rest = {
        "scaling": scaling * 1.4426950408889634, "block": _BLOCK, "size": max(16, triton.next_power_of_2(width)),
        "causal": causal, "masked": valid is not None, "precise": query.dtype == torch.float32,
    }  # fmt: skip
    _row_sums[grid](query, key, mask, sums, *shape, **rest)
    _column_sums[grid](query, key, mask, sums, weight, found, *shape, **rest)
    return found.view(batch, heads, length).mean(1)


@column_sums.register_fake
def _(query: Tensor, key: Tensor, scaling: float, weight: Tensor, causal: bool, valid: Tensor | None) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], dtype=torch.float32)
