"""`Attention`: the attention map of one layer, from which only the rows that are asked for are computed.

The model's own output still comes from SDPA or FlashAttention. No S x S map is ever in memory: what needs all rows
goes over them in blocks, each of which is computed once, or on a GPU through a kernel (`foveate.nn.received`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 64
"""Most rows of a head in one block on a CPU."""
_CHUNK = 2**19
"""Most probabilities in one block on a CPU: 2 MiB of float32 stay in its cache, and softmax is bound by memory."""
_CHUNK_ACCELERATOR = 2**26
"""The same elsewhere (256 MiB), where the launches of many small kernels would cost more."""


def kernel(device: torch.device) -> Callable[..., Tensor] | None:
    """`foveate.nn.received.column_sums` for tensors on that device, None where it does not run."""
    if device.type != "cuda":
        return None
    try:
        from foveate.nn.received import column_sums
    except ImportError:
        # PyTorch without Triton.
        return None
    return column_sums


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
        """(B, S) attention that each token receives, averaged over heads and over the rows in `queries` (B, S): bool,
        or the rows' weights in the mean.

        With all rows as queries the result sums to 1 (each softmax row does).
        """
        batch, heads, length, _ = self.query.shape
        asked = self.present if queries is None else queries
        if asked is None:
            asked = torch.ones(batch, length, dtype=torch.bool, device=self.query.device)
        weight = asked.float()
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-30)
        if (column_sums := kernel(self.query.device)) is not None:
            return column_sums(self.query, self.key, self.scaling, weight, self.causal, self.valid)
        weight = weight / heads
        total = torch.zeros_like(weight)
        for _, rows, block in self._blocks():
            # Heads and rows are summed in one product: (B, 1, h * R) x (B, h * R, E).
            share = weight[:, None, rows].repeat(1, 1, block.shape[1])
            total[:, : block.shape[3]] += (share @ block.flatten(1, 2)).squeeze(1)
        return total

    def walk(self, start: Tensor, steps: int, damping: float = 0.0, temperature: float = 1.0) -> Tensor:
        """(B, H, S) float32: what `steps` times `v <- (1 - damping) v M + damping start` make of v = `start` (B, S).

        M (S, S) is a head's softmax(logits / temperature), with a row of zeros for a token that sees nothing. A token
        passes on to itself and to earlier ones only, so once all later rows are done, a block's part of every step is
        known: one sweep from the last rows to the first makes all steps, and each row of M is needed only once.

        Raises:
            ValueError: if the attention is not causal.
        """
        if not self.causal:
            raise ValueError("a walk in one sweep needs causal attention")
        batch, heads, length, _ = self.query.shape
        sees = None if self.valid is None else (self.valid.cumsum(1) > 0).float().unsqueeze(1)
        # What each step has brought so far to the tokens of the blocks to come.
        brought = torch.zeros(batch, heads, steps, length, device=self.query.device)
        end = torch.empty(batch, heads, length, device=self.query.device)
        for some, rows, block in self._blocks(temperature):
            among, earlier = block[..., rows], block[..., : rows.start]
            origin = start[:, None, None, rows]
            at = origin.expand(-1, block.shape[1], -1, -1)
            passed = []
            for arrived in brought[:, some, :, rows].split(1, 2):
                passed.append(at if sees is None else at * sees[:, None, :, rows])
                at = torch.lerp(arrived + passed[-1] @ among, origin, damping)
            end[:, some, rows] = at.squeeze(2)
            brought[:, some, :, : rows.start] += torch.cat(passed, 2) @ earlier
        return end

    def _blocks(self, temperature: float = 1.0) -> Iterator[tuple[slice, slice, Tensor]]:
        """All of softmax(logits / temperature) in blocks: heads h, rows R, and (B, h, R, E) float32 probabilities.

        Of each head the last rows come first. E is S; under causal attention it ends with the last row's own column.
        """
        batch, heads, length, _ = self.query.shape
        groups = self.key.shape[1]
        share = heads // groups
        on_cpu = self.query.device.type == "cpu"
        chunk = _CHUNK if on_cpu else _CHUNK_ACCELERATOR
        count = max(1, min(_ROWS if on_cpu else length, length, chunk // (batch * share * length)))
        few = max(1, chunk // (batch * share * count * length))
        hidden = None if self.valid is None else ~self.valid[:, None, None]
        later = torch.ones(count, count, dtype=torch.bool, device=self.query.device).triu(1) if self.causal else None
        lowest = torch.finfo(torch.float32).min
        for first in range(0, groups, few):
            key = self.key[:, first : first + few].float().transpose(-1, -2)
            some = slice(first * share, (first + key.shape[1]) * share)
            for stop in range(length, 0, -count):
                rows = slice(max(0, stop - count), stop)
                seen = key[..., :stop] if self.causal else key
                logits = _logits(self.query[:, some, rows], seen, self.scaling / temperature)
                if later is not None:
                    size = stop - rows.start
                    logits[..., rows].masked_fill_(later[:size, :size], lowest)
                if hidden is not None:
                    logits.masked_fill_(hidden[..., : logits.shape[3]], lowest)
                yield some, rows, logits.softmax(-1)


def attention_rows(
    query: Tensor, key: Tensor, index: Tensor, scaling: float, causal: bool, valid: Tensor | None
) -> Tensor:
    """(B, H, R, S) float32 attention of R queries (B, H, R, D), standing at `index` (B, R), to keys (B, G, S, D)."""
    logits = _logits(query, key.float().transpose(-1, -2), scaling)
    mask = visible(index, causal, valid, key.shape[2])
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(torch.float32).min)
    return logits.softmax(-1)


def _logits(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """(B, H, R, S) float32 of queries (B, H, R, D) and float32 keys that are transposed already, (B, G, D, S)."""
    batch, heads, count, width = query.shape
    # In float32: half precision would overflow before the scaling, and round near-equal scores into ties. Queries of a
    # group share a key: fold them instead of repeating the keys. Scaled while they are small.
    folded = (query.float() * scaling).reshape(batch, key.shape[1], heads // key.shape[1] * count, width)
    return (folded @ key).reshape(batch, heads, count, key.shape[3])


def visible(index: Tensor, causal: bool, valid: Tensor | None, length: int) -> Tensor | None:
    """(B, 1, R, S) bool: which keys the queries at `index` (B, R) see; None for all."""
    mask = None if valid is None else valid[:, None, None, :]
    if causal:
        earlier = torch.arange(length, device=index.device) <= index[:, None, :, None]
        mask = earlier if mask is None else mask & earlier
    return mask
