"""Behind the encoder: hosts whose language model sees cells of patches, joined (InternVL) or resampled (OneVision).

At a stage behind that, `Tokens` takes the cells for source patches: what a method does with patches it does with cells,
on their grid. Signals of the encoder's patches become those of cells as features do, by their mean over a cell.

Where a method changed the number of tokens within the encoder, each token is put back on all of its patches before they
become cells. A patch that no token carries counts as the mean of those left in its cell; a cell that has none left is
dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate.hosts.vision import Encoder, VisionSignals
from foveate.method import Crops, InputError
from foveate.nn.attention import Attention
from foveate.tokens import DROPPED, Tokens, take


@dataclass(frozen=True, eq=False)
class Cells:
    """What a host makes of its encoder's patches: of R rows with P patches, R' rows with N cells.

    Attributes:
        whole: (R', N) the cells as tokens without features.
        pool: (R, P, C) -> (R', N, C), the mean over the patches of each cell, weighted as the host weights features.
        grid: (rows, columns) of what `whole` takes for source patches.
        pictures: which of the R' rows belong together.
    """

    whole: Tokens
    pool: Callable[[Tensor], Tensor]
    grid: tuple[int, int]
    pictures: tuple[Crops, ...]

    def mean(self, values: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        """(R', N, C) means of (R, P, C) over the patches that are `carried` (R, P), and (R', N) bool where there are.

        `values` is zero where they are not.
        """
        return self.share(self.pool(values), carried)

    def share(self, pooled: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        """As `mean`, of what is pooled already, (R', N, C)."""
        if bool(carried.all()):
            return pooled, self.whole.mask()
        share = self.pool(carried.unsqueeze(-1).float())
        there = share > 0
        filled = (pooled / share.clamp(min=torch.finfo(share.dtype).tiny)).to(pooled.dtype)
        return torch.where(there, filled, pooled), there.squeeze(-1) & self.whole.mask()

    def of_source(self, values: Tensor, carried: Tensor) -> Tensor:
        """(R', M, C), of what `whole` takes for source patches, from (R, P, C); zero where there is no cell."""
        return unmerged(self.whole.source, self.mean(values, carried)[0])


class CellSignals(VisionSignals):
    """The signals of an encoder where tokens are cells of its patches (see `foveate.method.Signals`)."""

    where = "a vision encoder whose patches have become cells"

    def __init__(self, encoder: Encoder, tokens: Tokens, cells: Cells) -> None:
        super().__init__(encoder, tokens)
        self._cells = cells

    def attention(self, layer: int) -> Attention:
        raise InputError(
            "attention is between patches, and here a token is a cell of several; "
            "ask for cls_attention, received or keys of the layer instead"
        )

    def _of_source(self, values: Tensor, carried: Tensor) -> Tensor:
        return self._cells.of_source(values, carried)

    def crops(self) -> tuple[Crops, ...]:
        return self._cells.pictures

    def grid(self) -> tuple[int, int]:
        return self._cells.grid


def unmerged(source: Tensor, x: Tensor) -> Tensor:
    """(R, P, C): for each patch the feature of the token `source` (R, P) of x (R, K, C), zero where it is -1."""
    return take(nn.functional.pad(x, (0, 0, 0, 1)), source % (x.shape[1] + 1))


def only(tokens: Tokens, there: Tensor) -> Tokens:
    """The tokens that are `there` (R, N) bool, each in its place; the places of the others hold none."""
    if bool(there.all()):
        return tokens
    return tokens.keep(torch.where(there, torch.arange(there.shape[1], device=there.device), DROPPED))
