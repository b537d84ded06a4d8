"""The layers of STViT, in a plain vision transformer and within windows: semantic tokens are made, used, and spread.

`SemanticLayers` runs blocks of timm on X (B, N, C) as a word of letters says; `Seeds` pools regions to where clusters
begin. The method, its formulas and its configurations are in `foveate.methods.reduce.stvit`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.method import InputError, choice, whole
from foveate.nn.vit import add_branches, attend, attention_weights, keys_values, queries, split_keys_values

_Array = np.ndarray[Any, Any]
_OUTSIDE = -1000.0
"""What is added to the logits of keys that there are none of."""


class SemanticLayers(nn.Module):
    """Runs blocks of timm as `layers` says, on X (B, N, C) of a grid; see `STViT` for the letters and `STViTSwin` for
    the windows. Its own weights are the seeds' and G alone.

    W windows (one, the whole grid, where `window` is 0) have s = per_window^2 semantic tokens each: S (B, W, s, C).
    """

    def __init__(
        self, width: int, layers: str, *, window: int = 0, per_window: int = 4, seeds: str = "predicted",
        centres: str = "both", residual: str = "query", shortcut: bool = True, seed_keys: bool = False,
        reach: Sequence[int] = (0, 0, 0), border: str = "inside", mask: str = "union",
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(layers, str) or not re.fullmatch(r"f*g+[sl]*(rf*g+[sl]*)*(rf*)?", layers):
            raise InputError(
                f"layers must be f (full) blocks, then g (generate), s or l (semantic), r (recover), then f or g "
                f"again, e.g. ffffggssssss, not {layers!r}"
            )
        self.layers, self.window = layers, window
        self.per_window = whole("per_window" if window else "regions", per_window, 1)
        self.centres = choice("centres", centres, ("both", "spatial", "global"))
        self.residual = choice("residual", residual, ("query", "seeds"))
        for name, value in (("shortcut", shortcut), ("seed_keys", seed_keys)):
            if not isinstance(value, bool):
                raise InputError(f"{name} must be true or false, not {value!r}")
        self.shortcut, self.seed_keys = shortcut, seed_keys
        if not isinstance(reach, list | tuple) or len(reach) != 3:
            raise InputError(f"reach must be three sides of windows, not {reach!r}")
        self.reach = tuple(whole("reach", one) for one in reach)
        self.border = choice("border", border, ("inside", "masked"))
        self.mask = choice("mask", mask, ("union", "corner"))
        units = len(re.findall("g+", layers))
        if centres != "global":
            choice("seeds", seeds, ("predicted", "max", "mean"))
            self.seeds = nn.ModuleList(Seeds(width, seeds) for _ in range(units))
        # The release has them in the first unit only.
        self.global_centres = nn.Parameter(torch.empty(per_window**2, width)) if centres != "spatial" else None
        if self.global_centres is not None:
            nn.init.trunc_normal_(self.global_centres, std=0.02)
            if centres == "global" and units > 1:
                raise InputError("centres: global ones are there in the first unit only, and layers have several")

    @property
    def recovers(self) -> bool:
        """Whether there are as many tokens at the end as at first."""
        return self.layers.rstrip("f").endswith("r")

    def windows(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of windows."""
        if not self.window:
            return 1, 1
        return -(-grid[0] // self.window), -(-grid[1] // self.window)

    def forward(
        self,
        blocks: Any,
        x: Tensor,
        grid: tuple[int, int],
        full: Callable[[nn.Module, Tensor, tuple[int, int]], Tensor] | None = None,
        record: list[Tensor] | None = None,
    ) -> tuple[Tensor, tuple[int, int]]:
        """The tokens at the end (B, K, C) in raster order, and their grid.

        Args:
            blocks: as many as there are letters.
            full: how an f block is run; None where it takes tokens.
            record: takes the attention (…, heads, queries, keys) of every g and r.
        """
        semantic: Tensor | None = None
        unit, step = -1, 0
        seeds = x
        for kind, block in zip(self.layers, blocks):
            if kind == "f":
                x = block(x) if full is None else full(block, x, grid)
            elif kind == "g" and semantic is None:
                unit, step = unit + 1, 1
                seeds = self._seeds(x, grid, unit)
                residual, extra = seeds if self.shortcut else None, seeds if self.seed_keys else None
                semantic = self._look(block, seeds, residual, x, extra, grid, self.reach[0], record)
            elif kind == "g":
                assert semantic is not None
                query = semantic
                if step == 1 and unit == 0 and self.global_centres is not None:
                    query = query + self.global_centres
                residual = query if self.residual == "query" else seeds
                semantic = self._look(block, query, residual, x, semantic, grid, self.reach[1], record)
                step += 1
            elif kind == "r":
                assert semantic is not None
                x, semantic = self._recover(block, x, semantic, grid, record), None
            else:
                assert semantic is not None
                ends = (1, 2) if kind == "s" else (0, 1)
                semantic = block(semantic.flatten(*ends)).view_as(semantic)
        if semantic is None:
            return x, grid
        rows, columns = self.windows(grid)
        return self.raster(semantic, grid), (rows * self.per_window, columns * self.per_window)

    def raster(self, semantic: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, W s, C) row by row over all windows, of (B, W, s, C)."""
        side = self.per_window
        return semantic.unflatten(1, self.windows(grid)).unflatten(3, (side, side)).transpose(2, 3).flatten(1, 4)

    def _seeds(self, x: Tensor, grid: tuple[int, int], unit: int) -> Tensor:
        """(B, W, s, C)."""
        rows, columns = self.windows(grid)
        if self.centres == "global":
            assert self.global_centres is not None
            return self.global_centres.expand(len(x), rows * columns, -1, -1)
        side = self.per_window
        plane = x.transpose(1, 2).unflatten(2, grid)
        if self.window:
            # What is beyond the edge equals the edge, so that no seed is of padding alone.
            bottom, right = rows * self.window - grid[0], columns * self.window - grid[1]
            if bottom or right:
                plane = F.pad(plane, (0, right, 0, bottom), mode="replicate")
        pooled = self.seeds[unit](plane, (rows * side, columns * side))
        pooled = pooled.unflatten(3, (columns, side)).unflatten(2, (rows, side))
        return pooled.permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2, 3)

    def _look(
        self, block: Any, query: Tensor, residual: Tensor | None, x: Tensor, extra: Tensor | None,
        grid: tuple[int, int], reach: int, record: list[Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """The block, with queries (B, W, s, C) that see their enlarged windows of x, and `extra` (B, W, s, C)."""
        attention = block.attn
        made = keys_values(attention, block.norm1(x))
        more = None if extra is None else keys_values(attention, block.norm1(extra))
        asked = block.norm1(query)
        if reach:
            made, mask = self._windowed(attention, made, grid, self.window, reach)
            if more is not None:
                made = torch.cat([more, made], 2)
            made, asked = made.flatten(0, 1), asked.flatten(0, 1)
        else:
            mask = None
            asked = asked.flatten(1, 2)
            if more is not None:
                made = torch.cat([more.flatten(1, 2), made], 1)
        attended = self._attend(attention, asked, made, mask, query.shape[1], record)
        return add_branches(block, residual, attended.reshape(query.shape))

    def _recover(
        self, block: Any, x: Tensor, semantic: Tensor, grid: tuple[int, int], record: list[Tensor] | None
    ) -> Tensor:
        attention, reach = block.attn, self.reach[2]
        asked, made = block.norm1(x), keys_values(attention, block.norm1(self.raster(semantic, grid)))
        if reach == 0:
            return add_branches(block, x, self._attend(attention, asked, made, None, 1, record))
        rows, columns = self.windows(grid)
        side = self.per_window
        made, mask = self._windowed(attention, made, (rows * side, columns * side), side, reach)
        own, outside = enlarged(grid, self.window, self.window, "masked", "union")
        # The padding of the last windows asks too, as the first token, and is thrown away.
        windowed = _chosen(asked, np.where(outside, 0, own)).flatten(0, 1)
        attended = self._attend(attention, windowed, made.flatten(0, 1), mask, rows * columns, record)
        # In raster order again: padding has the greatest number, and so comes last.
        place = own.ravel().argsort(kind="stable")[: grid[0] * grid[1]]
        return add_branches(block, x, _chosen(attended.reshape(len(x), -1, x.shape[2]), place))

    def _windowed(
        self, attention: Any, made: Tensor, grid: tuple[int, int], window: int, reach: int
    ) -> tuple[Tensor, Tensor | None]:
        """Keys and values (B, W, reach^2, 2C) of enlarged windows, and what is added to the logits (W, reach^2)."""
        index, hidden = enlarged(grid, window, reach, self.border, self.mask)
        if index.max() == grid[0] * grid[1]:
            # What is outside is a token of zeros behind the norm, of which a bias is left.
            width, bias = made.shape[2], attention.qkv.bias
            nothing = made.new_zeros(width) if bias is None else bias[-width:].to(made.dtype)
            made = torch.cat([made, nothing.expand(len(made), 1, -1)], 1)
        mask = torch.from_numpy(hidden).to(made.device).to(made.dtype) * _OUTSIDE if hidden.any() else None
        return _chosen(made, index), mask

    def _attend(
        self, attention: Any, asked: Tensor, made: Tensor, mask: Tensor | None, windows: int,
        record: list[Tensor] | None,
    ) -> Tensor:  # fmt: skip
        query = queries(attention, asked)
        key, value = split_keys_values(attention, made)
        if mask is not None:
            # Semantic tokens come before the window's, and are all there.
            mask = F.pad(mask, (key.shape[2] - mask.shape[1], 0))
            mask = mask.repeat(len(query) // windows, 1)[:, None, None]
        if record is not None:
            record.append(attention_weights(attention, query, key, mask))
        return attend(attention, query, key, value, mask)


def _chosen(x: Tensor, index: _Array) -> Tensor:
    """Rows `index` (…) of x (B, N, C): (B, …, C)."""
    rows = x.index_select(1, torch.from_numpy(index.ravel()).to(x.device))
    return rows.unflatten(1, index.shape)


class Seeds(nn.Module):
    """One vector for each region of a map (B, C, H, W), (B, C, rows, columns): where clusters begin.

    "max" (as released for Swin) and "mean" pool each region; where the map is not divisible they overlap.
    "predicted", after the paper: a depthwise 3x3 convolution, LayerNorm, GELU and a 1x1 convolution say of every place
    how much it counts within its region (a softmax over the region) and where the region should lie instead (the mean
    over the region of a shift, through tanh, of half a region at most). The region is then read there, at as many
    points a side as it has places, bilinearly. That the paper has such a network is known; its sizes and the scale of
    the shift are this project's choice.
    """

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "predicted":
            self.neighbours = nn.Conv2d(width, width, 3, padding=1, groups=width)
            self.norm = nn.LayerNorm(width)
            self.predict = nn.Linear(width, 3)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if self.kind == "max":
            return F.adaptive_max_pool2d(x, size)
        if self.kind == "mean":
            return F.adaptive_avg_pool2d(x, size)
        said = self.predict(F.gelu(self.norm(self.neighbours(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        points, places = [], []
        for axis, (length, count) in enumerate(zip(x.shape[2:], size)):
            extent = length / count
            few = math.ceil(extent)
            shift = F.adaptive_avg_pool2d(said[:, 1 + axis : 2 + axis], size).squeeze(1).tanh() * (extent / 2)
            line = (torch.arange(count * few, device=x.device, dtype=x.dtype) + 0.5) * (extent / few)
            line = line.unflatten(0, (count, few))
            points.append(few)
            # (B, rows, columns, points), in -1..1 from edge to edge.
            line = line[None, :, None] if axis == 0 else line[None, None]
            places.append((line + shift.unsqueeze(-1)) * (2 / length) - 1)
        down, across = places[0].unsqueeze(-1), places[1].unsqueeze(-2)
        where = torch.stack(torch.broadcast_tensors(across, down), -1).flatten(3, 4).flatten(1, 2)
        read = F.grid_sample(torch.cat([x, said[:, :1]], 1), where, padding_mode="border", align_corners=False)
        weights = read[:, -1:].softmax(-1)
        return (read[:, :-1] * weights).sum(-1).unflatten(2, size)


@functools.lru_cache(maxsize=64)
def enlarged(grid: tuple[int, int], window: int, reach: int, border: str, mask: str) -> tuple[_Array, _Array]:
    """For each window of `window` x `window` places of a grid, the places of the `reach` x `reach` around it.

    Returns index (W, reach^2) in raster order, h w where a place is outside of the grid, and hidden (W, reach^2) bool,
    which of them are not to be seen. See `STViTSwin` for `border` and `mask`. Arrays, since tensors that are kept
    remember whether they were made in inference mode.
    """
    places, outside = [], []
    for length in grid:
        start = np.arange(-(-length // window)) * window - (reach - window) // 2
        if border == "inside":
            start = start.clip(0, max(0, length - reach))
        along = start[:, None] + np.arange(reach)
        places.append(along)
        outside.append((along < 0) | (along >= length))
    down, across = outside[0][:, None, :, None], outside[1][None, :, None, :]
    index = np.where(down | across, grid[0] * grid[1], places[0][:, None, :, None] * grid[1] + places[1][:, None, :])
    hidden = (down & across) if mask == "corner" else (down | across)
    shape = (-1, reach**2)
    return index.reshape(shape), hidden.reshape(shape)
