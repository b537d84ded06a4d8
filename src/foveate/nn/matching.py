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
    a, b = slice(first, None, 2), slice(1 - first, None, 2)
    metric = metric.float()
    # Cosines are scaled after the product, where there is less to scale; the partner is the same without A's lengths.
    scale = metric.norm(dim=-1).clamp(min=1e-12).reciprocal()
    product = metric[:, a] @ metric[:, b].transpose(-1, -2)
    best, partner = (product * scale[:, None, b]).max(-1)
    ranked = torch.sort(best * scale[:, a], dim=1, descending=True, stable=True).indices
    place = torch.arange(count, device=metric.device).expand(batch, -1)
    goes, of_a, of_b = min(surplus, count // 2), best.shape[1], count - best.shape[1]
    rank = torch.empty_like(ranked).scatter_(1, ranked, place[:, :of_a])
    merged = rank < goes
    number = torch.empty_like(place)
    if order == "place":
        # Each group is led by its token of B, or by the token of A that is alone in it.
        leads = torch.ones_like(number)
        leads[:, a] -= merged.long()
        before = leads.cumsum(1) - 1
        number[:, b] = before[:, b]
        number[:, a] = torch.where(merged, before[:, b].gather(1, partner), before[:, a])
        return number
    alone = rank - goes if order == "similarity" else (~merged).cumsum(1) - 1
    number[:, a] = torch.where(merged, partner + (of_a - goes), alone)
    number[:, b] = place[:, of_a - goes : of_a - goes + of_b]
    return number
