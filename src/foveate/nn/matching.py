"""Bipartite soft matching: which tokens of two interleaved sets are averaged (ToMe, and AIM after it)."""

from __future__ import annotations

import torch
from torch import Tensor


def partners(metric: Tensor, surplus: int, order: str, first: int = 0) -> Tensor:
    """(B, N) long: the group of each token in one merge step, which leaves N - min(surplus, N // 2) groups.

    Tokens at places first, first + 2, … are A, the others B. Each token of A finds its partner in B, the one with the
    greatest cosine; the `surplus` tokens of A that are most similar to theirs join them, the others stay alone.

    Args:
        metric: (B, N, D), N at least 2.
        surplus: how many tokens are to go; one step takes away N // 2 at most.
        order: how the groups are numbered. "similarity": the lone tokens of A, the most similar one first, then B;
            "sets": the lone tokens of A by place, then B; "place": all by the place of B's token, or of the lone one.
        first: 0 or 1.
    """
    batch, count, _ = metric.shape
    place = torch.arange(count, device=metric.device).expand(batch, -1)
    a, b = slice(first, None, 2), slice(1 - first, None, 2)
    metric = metric.float()
    # Cosines are scaled after the product, where there is less to scale.
    scale = 1 / metric.norm(dim=-1).clamp(min=1e-12)
    product = metric[:, a] @ metric[:, b].transpose(-1, -2)
    best, partner = (product * scale[:, a, None] * scale[:, None, b]).max(-1)
    ranked = torch.sort(best, dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(ranked).scatter_(1, ranked, place[:, : best.shape[1]])
    goes = min(surplus, count // 2)
    merged = rank < goes
    # Each group is led by its token of B, or by the token of A that is alone in it.
    leader = place.clone()
    leader[:, a] = torch.where(merged, 2 * partner + 1 - first, place[:, a])
    if order == "place":
        number = (leader == place).long().cumsum(1) - 1
    else:
        number = torch.zeros_like(place)
        number[:, a] = rank - goes if order == "similarity" else (~merged).long().cumsum(1) - 1
        number[:, b] = best.shape[1] - goes + place[:, : count - best.shape[1]]
    return number.gather(1, leader)
