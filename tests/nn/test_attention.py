"""`Attention` against a loop over samples, heads and rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


def blocks(monkeypatch: pytest.MonkeyPatch, rows: int, chunk: int) -> None:
    monkeypatch.setattr(module, "_ROWS", rows)
    monkeypatch.setattr(module, "_CHUNK", chunk)


sizes = pytest.mark.parametrize(
    "most_rows, chunk", [(64, 2**19), (3, 2**19), (3, B * 3 * S), (64, 2 * B * H * S), (64, 1)]
)


@cases
@sizes
def test_rows_and_received(
    groups: int, causal: bool, padded: bool, most_rows: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks(monkeypatch, most_rows, chunk)
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
    # Row weights that add up to less than one; row 5 counts three times as much as row 6.
    uneven = torch.tensor([0, 0, 0, 0, 0, 0.3, 0.1]).expand(B, -1)
    wanted = (0.75 * expected[:, :, 5] + 0.25 * expected[:, :, 6]).mean(1)
    assert torch.allclose(attention.received(uneven), wanted, atol=1e-5)


@pytest.mark.parametrize("groups, padded", [(4, False), (4, True), (2, True), (1, False)])
@sizes
def test_a_walk_is_so_many_products_with_the_whole_matrix(
    groups: int, padded: bool, most_rows: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks(monkeypatch, most_rows, chunk)
    attention = make(groups, True, padded)
    # Also from tokens that see nothing: they have nothing to pass on.
    start = torch.rand(B, S)
    for temperature, damping in ((1.0, 0.0), (0.1, 0.0), (0.5, 0.3)):
        matrix = slow(attention, temperature)
        v = start[:, None, None].expand(-1, H, -1, -1)
        for steps in range(1, 5):
            v = (1 - damping) * (v @ matrix) + damping * start[:, None, None]
            ours = attention.walk(start, steps, damping, temperature)
            assert torch.allclose(ours, v.squeeze(2), atol=1e-5)


def test_a_walk_needs_causal_attention() -> None:
    with pytest.raises(ValueError, match="causal"):
        make(4, False, False).walk(torch.ones(B, S), 1)


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has, and counts those that are a map of the whole sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.maps = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for one in output if isinstance(output, tuple | list) else (output,):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, min(one.numel(), one.untyped_storage().nbytes() // 4))
                self.maps += one.ndim >= 2 and one.shape[-1] >= 300 and one.shape[-2] >= 300
        return output


@pytest.mark.parametrize("groups", (8, 2))
def test_no_map_of_the_sequence_is_in_memory(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    length, heads = 300, 8
    blocks(monkeypatch, 16, 2**13)
    for causal in (True, False):
        attention = Attention(
            torch.randn(1, heads, length, 4), torch.randn(1, groups, length, 4), 0.5, causal, None, None,
            torch.zeros(1, 1, dtype=torch.long),
        )  # fmt: skip
        with Largest() as seen:
            attention.received()
            if causal:
                attention.walk(torch.full((1, length), 1 / length), 3)
        assert 0 < seen.elements < length * length / 5 and seen.maps == 0


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
