"""Sparse attention against loops over queries, and the choice of the greatest against sorting."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate.nn.sparse_attention import largest, places, ragged_places, sparse_attention


def sorted_choice(row: list[float], count: int) -> list[int]:
    """The places of the `count` greatest; of equal ones the first."""
    return sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("values", ["different", "ties", "equal"])
def test_largest_are_those_that_sorting_finds(dtype: torch.dtype, values: str) -> None:
    score = torch.randn(3, 4, 11)
    if values != "different":
        score = score.mul(2).round().abs() if values == "ties" else torch.zeros_like(score)
    score = score.to(dtype)
    for count in (1, 4, 10, 11, 15):
        chosen = largest(score, count)
        wanted = [[sorted_choice(row, count) for row in head] for head in score.tolist()]
        assert places(chosen, min(count, 11)).tolist() == wanted


def test_ragged_places() -> None:
    chosen = torch.tensor([[[True, False, True, True], [False, False, False, False], [False, False, False, True]]])
    index, valid = ragged_places(chosen)
    assert [row[seen].tolist() for row, seen in zip(index[0], valid[0])] == [[0, 2, 3], [], [3]]
    index, valid = ragged_places(torch.zeros(1, 2, 4, dtype=torch.bool))
    assert index.shape == (1, 2, 1) and not valid.any()


def by_hand(query: Tensor, key: Tensor, value: Tensor, index: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    out = torch.zeros_like(query)
    for b, h, r in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        mine = index[b, h, r] if valid is None else index[b, h, r][valid[b, h, r]]
        logits = [float(query[b, h, r] @ key[b, h, j]) * scale for j in mine]
        total = sum(math.exp(one) for one in logits)
        for one, j in zip(logits, mine):
            out[b, h, r] += math.exp(one) / total * value[b, h, j]
    return out


@pytest.mark.parametrize("product", ["csr", "gather", "masked", "auto"])
@pytest.mark.parametrize("ragged", [False, True])
@torch.no_grad()
def test_every_product_is_the_sum_over_each_querys_keys(product: str, ragged: bool) -> None:
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    if ragged:
        chosen = torch.rand(2, 3, 5, 9) > 0.5
        chosen[0, 0, 0], chosen[1, 2, 4, :] = False, True
        index, valid = ragged_places(chosen)
    else:
        index, valid = torch.rand(2, 3, 5, 9).argsort(-1)[..., :4], None
    for scale in (None, 0.7):
        wanted = by_hand(query, key, value, index, valid, 8**-0.5 if scale is None else scale)
        found = sparse_attention(query, key, value, index, valid, scale, product)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("product", ["csr", "gather"])
@torch.no_grad()
def test_what_is_no_key_of_a_query_is_not_even_read(product: str) -> None:
    """Under a mask, a NaN among the values that are left out would reach the output: 0 * NaN is NaN."""
    query, key, value = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 4)
    key[..., 5, :] = value[..., 5, :] = math.nan
    index = torch.tensor([[0, 1], [2, 4], [3, 0]]).view(1, 1, 3, 2)
    assert sparse_attention(query, key, value, index, product=product).isfinite().all()


@torch.no_grad()
def test_half_precision_stays() -> None:
    query, key, value = (torch.randn(1, 2, 6, 8) for _ in range(3))
    index = torch.rand(1, 2, 6, 6).argsort(-1)[..., :3]
    wanted = by_hand(query, key, value, index, None, 8**-0.5)
    for product in ("csr", "gather"):
        found = sparse_attention(*(one.bfloat16() for one in (query, key, value)), index, product=product)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)


def test_gradients_are_those_of_masked_attention_and_finite_without_keys() -> None:
    tensors = [torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3)]
    chosen = torch.rand(1, 2, 4, 4) > 0.4
    chosen[0, 0, 1] = False
    index, valid = ragged_places(chosen)
    sparse_attention(*tensors, index, valid).square().sum().backward()
    found = [one.grad for one in tensors]
    query, key, value = (one.detach().requires_grad_() for one in tensors)
    logits = (query @ key.transpose(-1, -2) / 8**0.5).exp() * chosen
    weights = logits / logits.sum(-1, keepdim=True).clamp(min=1e-30)
    (weights @ value).square().sum().backward()
    for mine, other in zip(found, (query, key, value)):
        assert mine is not None and mine.isfinite().all()
        torch.testing.assert_close(mine, other.grad, rtol=1e-4, atol=1e-5)
