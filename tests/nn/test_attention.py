"""`Attention` against a loop over samples, heads and rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate.nn import attention as module
from foveate.nn.attention import Attention

B, H, S, D = 2, 4, 7, 5


def make(groups: int, causal: bool, padded: bool, dtype: torch.dtype = torch.float32) -> Attention:
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[1, :3] = False
    return Attention(
        2 * torch.randn(B, H, S, D).to(dtype), 2 * torch.randn(B, groups, S, D).to(dtype), D**-0.5, causal,
        valid if padded else None, valid if padded else None, torch.zeros(B, 1, dtype=torch.long),
    )  # fmt: skip


def slow(attention: Attention, temperature: float = 1.0) -> Tensor:
    """(B, H, S, S) with a loop; rows that see nothing are left zero."""
    out = torch.zeros(B, H, S, S)
    share = H // attention.key.shape[1]
    for b in range(B):
        for h in range(H):
            for i in range(S):
                seen = [
                    j for j in range(S)
                    if (not attention.causal or j <= i) and (attention.valid is None or attention.valid[b, j])
                ]  # fmt: skip
                logits = [
                    float(attention.query[b, h, i].float() @ attention.key[b, h // share, j].float()) * D**-0.5
                    for j in seen
                ]
                weights = [math.exp((one - max(logits)) / temperature) for one in logits]
                for j, weight in zip(seen, weights, strict=True):
                    out[b, h, i, j] = weight / sum(weights)
    return out


cases = pytest.mark.parametrize(
    "groups, causal, padded",
    [(4, False, False), (4, True, False), (2, True, True), (1, False, True)],
)


@cases
@pytest.mark.parametrize("chunk", (2**23, 2 * B * H * S, 1))
def test_rows_received_and_transition(
    groups: int, causal: bool, padded: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    attention = make(groups, causal, padded)
    expected = slow(attention)
    real = torch.ones(B, S, dtype=torch.bool) if attention.present is None else attention.present
    index = torch.tensor([[6, 0, 3], [4, 6, 5]])
    rows = attention.rows(index)
    for b in range(B):
        assert torch.allclose(rows[b], expected[b][:, index[b]], atol=1e-5)
        mean = expected[b][:, real[b]].mean((0, 1))
        assert torch.allclose(attention.received()[b], mean, atol=1e-5)
    assert torch.allclose(attention.received().sum(1), torch.ones(B), atol=1e-5)
    few = torch.zeros(B, S, dtype=torch.bool)
    few[0, 2] = few[1, 5] = True
    assert torch.allclose(attention.received(few)[1], expected[1, :, 5].mean(0), atol=1e-5)
    for temperature in (1.0, 0.1):
        parts = list(attention.transition(temperature))
        assert len(parts) == (1 if chunk == 2**23 else H)
        whole, sharp = torch.cat(parts, 1), slow(attention, temperature)
        for b in range(B):
            assert torch.allclose(whole[b][:, real[b]], sharp[b][:, real[b]], atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_scores_are_those_of_float32(dtype: torch.dtype) -> None:
    attention = make(2, True, True, dtype)
    # Products of 100 * 100 * 5 * 2 would overflow in float16 before the scaling.
    loud = Attention(
        attention.query * 100, attention.key * 100, 1e-4, True, attention.valid, attention.present, attention.visual
    )
    index = torch.tensor([[6], [6]])
    exact = Attention(loud.query.double(), loud.key.double(), 1e-4, True, loud.valid, loud.present, loud.visual).rows(
        index
    )
    assert torch.allclose(loud.rows(index), exact.float(), atol=1e-5)
    assert loud.rows(index).dtype == torch.float32
