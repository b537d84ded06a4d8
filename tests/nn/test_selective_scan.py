"""The selective scan against a loop, autograd's own gradient, and transformers' Mamba."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from foveate.nn.selective_scan import SelectiveScan, in_blocks, recurrence, selective_scan


def loop(kept: Tensor, came: Tensor) -> Tensor:
    state, states = torch.zeros_like(came[0]), []
    for one, more in zip(kept, came):
        state = one * state + more
        states.append(state)
    return torch.stack(states)


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_blocks(count: int) -> None:
    kept, came = torch.rand(count, 2, 3, dtype=torch.float64), torch.randn(count, 2, 3, dtype=torch.float64)
    for block in (1, 2, 3, 4, 5, count, count + 3):
        torch.testing.assert_close(in_blocks(kept, came, block), loop(kept, came))


def test_gradient() -> None:
    kept, came = torch.rand(6, 2, 3, dtype=torch.float64), torch.randn(6, 2, 3, dtype=torch.float64)
    inputs = (kept.requires_grad_(), came.requires_grad_())
    weight = torch.randn(6, 2, 3, dtype=torch.float64)
    wanted = torch.autograd.grad((loop(*inputs) * weight).sum(), inputs)
    found = torch.autograd.grad((recurrence(*inputs) * weight).sum(), inputs)
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other)


def test_as_in_transformers() -> None:
    torch.manual_seed(0)
    x, step = torch.randn(2, 9, 4), torch.rand(2, 9, 4)
    rate, write, read, skip = -torch.rand(4, 3), torch.randn(2, 9, 3), torch.randn(2, 9, 3), torch.randn(4)
    turned = [one.transpose(1, 2) for one in (x, step, write, read)]
    wanted = mamba_selective_scan(turned[0], turned[1], rate, turned[2], turned[3], D=skip).transpose(1, 2)
    torch.testing.assert_close(selective_scan(x, step, rate, write, read, skip), wanted)


def test_missing_positions_are_tokens_of_zeros() -> None:
    torch.manual_seed(0)
    scan, kept = SelectiveScan(4, 3, 2), torch.tensor([[0, 3, 4, 8], [1, 2, 7, 9]])
    x = torch.zeros(2, 10, 4)
    for row, index in zip(x, kept):
        row[index] = torch.randn(4, 4)
    few = torch.stack([row[index] for row, index in zip(x, kept)])
    # One number for each token; the first says nothing, since there is no state before.
    missing = torch.tensor([[0, 2, 0, 3], [1, 0, 4, 1]])
    dense = scan(x)
    wanted = torch.stack([row[index] for row, index in zip(dense, kept)])
    torch.testing.assert_close(scan(few, missing), wanted)
    assert (scan(few) - wanted).abs().max() > 1e-4


def test_half_precision_goes_through_32_bits() -> None:
    torch.manual_seed(0)
    given = [torch.randn(1, 50, 2), torch.rand(1, 50, 2), -torch.rand(2, 3), torch.randn(1, 50, 3)]
    half = [one.bfloat16() for one in (*given, given[3])]
    found = selective_scan(*half)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, selective_scan(*(one.float() for one in half)).bfloat16())
