"""Attention in which every query has a few keys of its own: only those logits and sums are computed.

B samples, H heads, R queries, S keys, K keys of each query, D channels of a head.
"""

from __future__ import annotations

import functools
import warnings

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

PRODUCTS = ("auto", "csr", "gather", "masked")
"""Ways to compute `sparse_attention`; all give the same."""

_CHUNK = 2**22
"""Most numbers that "gather" copies out of the keys at a time: 16 MiB of float32."""


def largest(score: Tensor, count: int) -> Tensor:
    """(…, N) bool with exactly min(count, N) True in each row of `score` (…, N): the largest, of equal ones the first.

    A threshold is enough, so nothing is sorted: `topk` takes ten times as long as the product that follows.
    """
    size = score.shape[-1]
    if count >= size:
        return torch.ones_like(score, dtype=torch.bool)
    score = score.detach()
    if score.device.type == "cpu" and score.dtype == torch.float32:
        # NumPy's quickselect is vectorised.
        kth = torch.from_numpy(np.partition(score.numpy(), size - count, axis=-1)[..., size - count, None])
    else:
        kth = score.topk(count, sorted=False).values.amin(-1, keepdim=True)
    chosen = score >= kth
    if not score.is_meta and int(chosen.sum()) == count * (score.numel() // size):
        return chosen
    above = score > kth
    equal = chosen & ~above
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def places(chosen: Tensor, count: int) -> Tensor:
    """(…, count) long, ascending: where the rows of `chosen` (…, N) are True, which each are `count` times."""
    shape = (*chosen.shape[:-1], count)
    if chosen.is_meta:
        # What is where depends on the data; on the meta device only costs are counted.
        return torch.empty(shape, dtype=torch.long, device="meta")
    if chosen.device.type == "cpu":
        found = torch.from_numpy(np.flatnonzero(chosen.numpy()))
    else:
        found = chosen.flatten().nonzero().flatten()
    return (found % chosen.shape[-1]).view(shape)


def ragged_places(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """`places` for rows that have different numbers of True: (…, K) long and bool, False for what fills up."""
    counts = chosen.sum(-1)
    width = max(1, int(counts.max()))
    valid = torch.arange(width, device=chosen.device) < counts.unsqueeze(-1)
    # Both lists go row by row, left to right.
    index = valid.new_zeros(valid.shape, dtype=torch.long).masked_scatter(valid, chosen.nonzero()[:, -1])
    return index, valid


def weighted_rows(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """(R, D): the sums over K of weights (R, K) times the rows `index` (R, K) of `table` (T, D). Nothing is copied."""
    return F.embedding_bag(index, table, per_sample_weights=weights.to(table.dtype), mode="sum")


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    valid: Tensor | None = None,
    scale: float | None = None,
    product: str = "auto",
) -> Tensor:
    """softmax over the keys of each query of scale q k^T, times v: (B, H, R, D).

    Args:
        query: (B, H, R, D).
        key, value: (B, H, S, D).
        index: (B, H, R, K) long, the keys of each query, none of them twice.
        valid: (B, H, R, K) bool, False for an entry that fills up; a query without a key gets zeros. None: all.
        scale: D^-1/2 if None.
        product: "csr", the sampled product of a sparse matrix and weighted sums of rows, float32: the fast one on a
            CPU; "gather", which copies keys and values, some queries at a time; "masked", the dense product under a
            mask, which skips nothing; "auto": "masked" where gradients are needed, otherwise "csr" on a CPU and
            "gather" elsewhere.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if product == "auto":
        learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        product = "masked" if learns else "csr" if query.device.type == "cpu" else "gather"
    compute = {"csr": _csr, "gather": _gather, "masked": _masked}[product]
    return compute(query, key, value, index, valid, scale)


def _softmax(logits: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return logits.softmax(-1)
    return logits.masked_fill(~valid, torch.finfo(logits.dtype).min).softmax(-1) * valid


def _masked(query: Tensor, key: Tensor, value: Tensor, index: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    mask = torch.zeros(*query.shape[:-1], key.shape[2], dtype=torch.bool, device=query.device)
    if valid is None:
        return F.scaled_dot_product_attention(query, key, value, mask.scatter(-1, index, True), scale=scale)
    # What fills up names a key that may be one of the others, so that it must not be written over with False.
    mask = mask.int().scatter_add(-1, index, valid.int()) > 0
    empty = ~mask.any(-1, keepdim=True)
    # A softmax over nothing would be NaN, in the gradient too.
    return F.scaled_dot_product_attention(query, key, value, mask | empty, scale=scale).masked_fill(empty, 0)


def _rows(index: Tensor, keys: int) -> Tensor:
    """`index` (B, H, R, K) into the (B H S) rows of all heads, (B H R, K)."""
    heads = torch.arange(index.shape[0] * index.shape[1], device=index.device)
    return (index.flatten(0, 1) + keys * heads[:, None, None]).flatten(0, 1)


def _gather(query: Tensor, key: Tensor, value: Tensor, index: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    width = query.shape[-1]
    rows, count = _rows(index, key.shape[2]), index.shape[-1]
    flat, keys, values = query.reshape(-1, width, 1), key.reshape(-1, width), value.reshape(-1, width)
    seen = None if valid is None else valid.flatten(0, 2)
    step = max(1, _CHUNK // (count * width))
    out = []
    for first in range(0, len(rows), step):
        some = rows[first : first + step]
        logits = (keys[some] @ flat[first : first + step]).squeeze(2).float() * scale
        weights = _softmax(logits, None if seen is None else seen[first : first + step]).to(value.dtype)
        out.append((weights.unsqueeze(1) @ values[some]).squeeze(1))
    return torch.cat(out).view(query.shape)


def _csr(query: Tensor, key: Tensor, value: Tensor, index: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    _silence()
    heads, queries, keys, count = query.shape[0] * query.shape[1], query.shape[2], key.shape[2], index.shape[-1]
    q, k = query.flatten(0, 1).float(), key.flatten(0, 1).float().transpose(1, 2)
    entries = torch.zeros(heads, queries * count, device=query.device)
    ends = torch.arange(0, queries * count + 1, count, device=query.device).expand(heads, -1).contiguous()
    # Every row has as many entries, so that the values of the matrix are a plain (R, K) table.
    wanted = torch.sparse_csr_tensor(
        ends, index.reshape(heads, -1), entries, size=(heads, queries, keys), check_invariants=False
    )
    logits = torch.sparse.sampled_addmm(wanted, q, k, beta=0.0, alpha=scale).values().view(-1, count)
    weights = _softmax(logits, None if valid is None else valid.flatten(0, 2))
    table = value.flatten(0, 2).float()
    return weighted_rows(table, _rows(index, keys), weights).view(query.shape).to(query.dtype)


@functools.cache
def _silence() -> None:
    """Makes the process's first sparse matrix: PyTorch warns, once, that the kind is in beta state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.long), torch.tensor([]), (1, 1))
