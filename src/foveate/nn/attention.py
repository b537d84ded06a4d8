"""`Attention`: the attention map of one layer, from which only the rows that are asked for are computed.

The model's own output still comes from SDPA or FlashAttention. Only `transition` makes whole S x S maps, for methods
that need them; everything else is bounded by a block of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 2**23
"""Most attention probabilities that are in memory at once (32 MiB of float32)."""


@dataclass(frozen=True, eq=False)
class Attention:
    """Queries and keys of one layer after position encoding, for S tokens of B samples.

    Attributes:
        query: (B, H, S, D).
        key: (B, G, S, D), G dividing H (grouped-query attention).
        scaling: factor on the logits.
        causal: whether a token sees only itself and earlier ones.
        valid: (B, S) bool, keys that can be seen; None for all.
        present: (B, S) bool, False for padding. A token can be present and yet hidden from attention.
        visual: (B, N) long, where each visual token stands in the sequence (0 for padding).
    """

    query: Tensor
    key: Tensor
    scaling: float
    causal: bool
    valid: Tensor | None
    present: Tensor | None
    visual: Tensor

    @property
    def length(self) -> int:
        return self.query.shape[2]

    def rows(self, index: Tensor) -> Tensor:
        """(B, H, R, S) float32 softmax rows of the tokens at `index` (B, R)."""
        query = self.query.gather(2, index[:, None, :, None].expand(-1, self.query.shape[1], -1, self.query.shape[3]))
        return attention_rows(query, self.key, index, self.scaling, self.causal, self.valid)

    def received(self, queries: Tensor | None = None) -> Tensor:
        """(B, S) attention that each token receives, averaged over heads and over the rows in `queries` (B, S) bool.

        Computed in blocks of rows. With all rows as queries the result sums to 1 (each softmax row does).
        """
        batch, heads, length, _ = self.query.shape
        key = self.key.float()
        asked = self.present if queries is None else queries
        if asked is None:
            asked = torch.ones(batch, length, dtype=torch.bool, device=self.query.device)
        block = max(1, _CHUNK // (batch * heads * length))
        total = self.query.new_zeros(batch, length, dtype=torch.float32)
        for start in range(0, length, block):
            index = torch.arange(start, min(start + block, length), device=self.query.device).expand(batch, -1)
            weight = asked[:, start : start + block].float() / heads
            query = self.query[:, :, start : start + block]
            rows = attention_rows(query, key, index, self.scaling, self.causal, self.valid)
            total += torch.einsum("bhrs,br->bs", rows, weight)
        return total / asked.sum(1, keepdim=True).clamp(min=1)

    def transition(self, temperature: float = 1.0) -> Iterator[Tensor]:
        """(B, h, S, S) row-stochastic matrices softmax(logits / temperature), a few heads h at a time, float32.

        This is for methods that need the whole map; memory is bounded by taking few heads at once.
        """
        batch, heads, length, _ = self.query.shape
        few = max(1, _CHUNK // (batch * length * length))
        key = self.key.repeat_interleave(heads // self.key.shape[1], 1)
        mask = visible(torch.arange(length, device=key.device).expand(batch, -1), self.causal, self.valid, length)
        for start in range(0, heads, few):
            part = slice(start, start + few)
            logits = self.query[:, part].float() @ key[:, part].float().transpose(-1, -2)
            logits = logits * (self.scaling / temperature)
            if mask is not None:
                logits.masked_fill_(~mask, torch.finfo(torch.float32).min)
            yield logits.softmax(-1)


def attention_rows(
    query: Tensor, key: Tensor, index: Tensor, scaling: float, causal: bool, valid: Tensor | None
) -> Tensor:
    """(B, H, R, S) float32 attention of R queries (B, H, R, D), standing at `index` (B, R), to keys (B, G, S, D)."""
    batch, heads, count, width = query.shape
    groups, length = key.shape[1], key.shape[2]
    # Queries of a group share a key: fold them instead of repeating the keys.
    folded = query.reshape(batch, groups, heads // groups * count, width)
    # In float32: half precision would overflow before the scaling, and round near-equal scores into ties.
    logits = (folded.float() @ key.float().transpose(-1, -2)).reshape(batch, heads, count, length) * scaling
    mask = visible(index, causal, valid, length)
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(torch.float32).min)
    return logits.softmax(-1)


def visible(index: Tensor, causal: bool, valid: Tensor | None, length: int) -> Tensor | None:
    """(B, 1, R, S) bool: which keys the queries at `index` (B, R) see; None for all."""
    mask = None if valid is None else valid[:, None, None, :]
    if causal:
        earlier = torch.arange(length, device=index.device) <= index[:, None, :, None]
        mask = earlier if mask is None else mask & earlier
    return mask
