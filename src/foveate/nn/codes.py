"""`Codes`: pictures as ids of a codebook, what tokenizers make and turn into pictures again."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.method import InputError, whole


@dataclass(frozen=True, eq=False)
class Codes:
    """B pictures as N ids each.

    Attributes:
        ids: (B, N) long in 0..codebook_size - 1; those of a grid in reading order.
        codebook_size: number of codes, >= 2.
        size: (height, width) of the pictures in px.
        grid: (N,) for a sequence, (rows, columns) for a grid.

    Raises:
        InputError: for ids that are no whole numbers, out of range, or do not fill the grid.
    """

    ids: Tensor
    codebook_size: int
    size: tuple[int, int]
    grid: tuple[int, ...]

    def __post_init__(self) -> None:
        whole("codebook_size", self.codebook_size, 2)
        if not isinstance(self.ids, Tensor) or self.ids.ndim != 2 or self.ids.dtype != torch.long:
            what = f"{tuple(self.ids.shape)} {self.ids.dtype}" if isinstance(self.ids, Tensor) else repr(self.ids)
            raise InputError(f"ids must be a (B, N) tensor of dtype long, not {what}")
        # Lists, too: what is read from JSON has no tuples.
        for name, lengths in (("size", (2,)), ("grid", (1, 2))):
            value = getattr(self, name)
            if not isinstance(value, tuple | list) or len(value) not in lengths:
                raise InputError(f"{name} must have {' or '.join(map(str, lengths))} whole numbers, not {value!r}")
            object.__setattr__(self, name, tuple(whole(name, one, 1) for one in value))
        if math.prod(self.grid) != self.ids.shape[1]:
            raise InputError(f"a grid of {self.grid} has {math.prod(self.grid)} ids, not {self.ids.shape[1]}")
        if self.ids.numel() and not 0 <= int(self.ids.min()) <= int(self.ids.max()) < self.codebook_size:
            low, high = int(self.ids.min()), int(self.ids.max())
            raise InputError(f"ids must be in 0..{self.codebook_size - 1}, not {low}..{high}")

    @property
    def bits_per_id(self) -> int:
        """ceil(log2(codebook_size)): a code of fixed length."""
        return (self.codebook_size - 1).bit_length()

    @property
    def bits(self) -> int:
        """Of one picture."""
        return self.ids.shape[1] * self.bits_per_id

    @property
    def bytes(self) -> int:
        """Of one picture, the last byte filled up."""
        return -(-self.bits // 8)

    def first(self, tokens: int) -> Codes:
        """The first `tokens` ids of every picture. InputError for a grid, none, or more than there are."""
        if len(self.grid) != 1:
            raise InputError(f"only a sequence of ids can be cut short, not a grid of {self.grid}")
        if whole("tokens", tokens, 1) > self.ids.shape[1]:
            raise InputError(f"tokens must be in 1..{self.ids.shape[1]}, not {tokens}")
        return dataclasses.replace(self, ids=self.ids[:, :tokens], grid=(tokens,))
