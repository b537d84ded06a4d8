"""`Codes`: its sizes against counted ones, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foveate.method import InputError
from foveate.nn.codes import Codes


@pytest.mark.parametrize(
    ("codes", "count", "bits"),
    [(4096, 32, 384), (4096, 256, 3072), (2, 9, 9), (3, 9, 18), (1024, 3, 30), (1025, 3, 33)],
)
def test_sizes(codes: int, count: int, bits: int) -> None:
    made = Codes(torch.zeros(2, count, dtype=torch.long), codes, (64, 48), (count,))
    assert made.bits == bits and made.bytes == len(f"{0:0{bits}b}".ljust(8 * ((bits + 7) // 8), "0")) // 8
    assert 2**made.bits_per_id >= codes > 2 ** (made.bits_per_id - 1)


def test_a_prefix() -> None:
    codes = Codes(torch.arange(10).view(2, 5), 10, (8, 8), [5])  # type: ignore[arg-type]
    assert codes.grid == (5,) and torch.equal(codes.first(2).ids, torch.tensor([[0, 1], [5, 6]]))
    assert codes.first(2).grid == (2,) and codes.first(5).bits == codes.bits == 20
    for wrong in (0, 6, 1.0, True):
        with pytest.raises(InputError, match="tokens must be"):
            codes.first(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="only a sequence"):
        Codes(torch.zeros(1, 6, dtype=torch.long), 2, (8, 8), (2, 3)).first(1)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"ids": torch.zeros(2, 6)}, "dtype long"),
        ({"ids": torch.zeros(6, dtype=torch.long)}, "dtype long"),
        ({"ids": [[0] * 6]}, "dtype long"),
        ({"ids": torch.full((1, 6), 7)}, r"in 0\.\.6, not 7\.\.7"),
        ({"ids": torch.full((1, 6), -1)}, r"in 0\.\.6"),
        ({"codebook_size": 1}, "codebook_size"),
        ({"size": (8,)}, "size must have 2"),
        ({"size": (8, 0)}, "size must be"),
        ({"grid": (2, 2)}, "has 4 ids, not 6"),
        ({"grid": 6}, "grid must have 1 or 2"),
        ({"grid": (1, 2, 3)}, "grid must have 1 or 2"),
    ],
)
def test_bad_codes(changes: dict[str, Any], why: str) -> None:
    good: dict[str, Any] = {
        "ids": torch.zeros(2, 6, dtype=torch.long), "codebook_size": 7, "size": (8, 8), "grid": (2, 3),
    }  # fmt: skip
    assert Codes(**good).ids.shape == (2, 6)
    with pytest.raises(InputError, match=why):
        Codes(**(good | changes))
