"""A stage with signals that the test makes up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.method import HostShape, Stage
from foveate.nn.attention import Attention
from foveate.tokens import Tokens

HOST = HostShape("hf-vlm", (), vision_layers=24, feature_layer=22, prefix=1, grid=(4, 4), llm_layers=32)


class StubSignals:
    """Signals from dictionaries layer -> tensor; asking for another layer fails."""

    def __init__(self, grid: tuple[int, int], given: dict[str, Any]) -> None:
        self._grid, self._given = grid, given

    def grid(self) -> tuple[int, int]:
        return self._grid

    def cls_attention(self, layer: int) -> Tensor:
        return self._given["cls"][layer]

    def attention(self, layer: int) -> Attention:
        return self._given["attention"][layer]

    def received(self, layer: int) -> Tensor:
        attention = self.attention(layer)
        return attention.received().gather(1, attention.visual)

    def keys(self, layer: int) -> Tensor:
        return self._given["keys"][layer]

    def text_to_vision(self, layer: int) -> Tensor:
        return self._given["text"][layer]


def stage(
    tokens: Tokens, grid: tuple[int, int] = (4, 4), *, name: str = "vision.output", layer: int = -1,
    host: HostShape = HOST, active: Tensor | None = None, **given: Any,
) -> Stage:  # fmt: skip
    """`given`: cls, attention, keys or text, each a dictionary layer -> tensor (or `Attention`)."""
    active = torch.ones(tokens.x.shape[0], dtype=torch.bool) if active is None else active
    return Stage(name, layer, host, StubSignals(grid, given), tokens.count, active)  # type: ignore[arg-type]


def numbered(batch: int, grid: tuple[int, int] = (4, 4)) -> Tokens:
    """Tokens whose only feature is their number."""
    count = grid[0] * grid[1]
    return Tokens.from_grid(torch.arange(count).float().expand(batch, count).unsqueeze(-1), grid)


def numbers(tokens: Tokens) -> list[list[int]]:
    """The numbers of the tokens that are there, in their order."""
    return [row[mask].long().tolist() for row, mask in zip(tokens.x[..., 0], tokens.mask())]


def plain_attention(batch: int, heads: int, patches: int, prefix: int = 1, width: int = 8, seed: int = 0) -> Attention:
    """Random queries and keys of [prefix | patches], attention that is not causal."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(batch, heads, prefix + patches, width, generator=generator) for _ in range(2))
    place = torch.arange(prefix, prefix + patches).expand(batch, -1)
    return Attention(2 * query, key, width**-0.5, False, None, None, place)
