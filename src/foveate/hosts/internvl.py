"""InternVL of transformers: a vision tower with class token, whose patches are joined 2x2 before the projector.

What is peculiar here (see `hosts/llava.py` and `hosts/cells.py` for the rest):

* At "vision.output" and "projector" a token is a cell of 2x2 patches: at the first its four patches side by side,
  (rows, N, 4 * D), at the second what the projector made of them.
* The model is not told which tiles belong to one picture: at the vision stages each is a picture of its own.
* Merging within the tower saves compute there and leaves the language model all cells (see `hosts/cells.py`).
* A picture is made smaller ("vision.pixels") by whole cells, so that its patches can still be joined: at this stage
  `Signals.grid()` counts cells.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.hosts.cells import Cells, only, unmerged
from foveate.hosts.llava import LlavaHost, singles
from foveate.hosts.vision import covering, over
from foveate.method import InputError
from foveate.tokens import Tokens


class InternVLHost(LlavaHost):
    """`InternVLForConditionalGeneration`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.encoder.joined = round(1 / self.config.downsample_ratio)
        self.shape = replace(self.shape, joined=self.encoder.joined**2)
        # From the tower to the projector: which cells are left of the picture that the tower saw, and what the
        # projector gets if that was a smaller one.
        self._there: Tensor | None = None
        self._smaller: Tensor | None = None

    def units(self, pixels: Tensor) -> tuple[int, int]:
        return self._joined(super().units(pixels))

    def hook_vision(self, layers: set[int]) -> None:
        super().hook_vision(layers)
        if self._acts:
            self.post(self.encoder.tower, self._after_tower)

    def _joined(self, grid: tuple[int, int]) -> tuple[int, int]:
        return grid[0] // self.encoder.joined, grid[1] // self.encoder.joined

    def _join(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(rows, cells, 4 * D) from patches (rows, P, D) of that grid, in the model's own way."""
        shuffled: Tensor = self.inner.pixel_shuffle(patches.unflatten(1, grid), self.config.downsample_ratio)
        return shuffled.flatten(1, 2)

    def _members(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """(cells, 4) long: the patches of each cell of that grid of patches."""
        number = torch.arange(grid[0] * grid[1], device=device, dtype=torch.float64)
        return self._join(number[None, :, None], grid)[0].long()

    def _after_tower(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Puts every token back on all of its patches, since the model joins neighbours."""
        encoder = self.encoder
        tokens = encoder.after(self.shape.feature_layer)
        source, device = tokens.source, tokens.source.device
        native, grid = encoder.source_grid, encoder.grid
        members = self._members(native, device)
        joined, shape = self._joined(native), (len(source), len(members))
        self._cells = Cells(
            Tokens.from_grid(torch.zeros(*shape, 0, device=device), joined),
            lambda values: values[:, members].mean(2),
            joined,
            singles(*shape, device),
        )
        self._there = self._smaller = None
        covers = covering(grid, native, device)
        if grid != native:
            side = encoder.joined
            if grid[0] % side or grid[1] % side:
                raise InputError(
                    f"pictures of {grid[0]}x{grid[1]} patches cannot be joined {side}x{side}; resize by whole cells"
                )
            # The tower's own patches, each where the first patch is that it covers.
            number = torch.arange(len(covers), device=device)
            first = number.new_full((grid[0] * grid[1],), len(covers)).scatter_reduce(0, covers, number, "amin")
            source, members = source[:, first], self._members(grid, device)
        if grid == native and torch.equal(source, torch.arange(len(covers), device=device).expand_as(source)):
            return
        name = "last_hidden_state" if self.config.vision_feature_layer == -1 else "hidden_states"
        states = output[name] if name == "last_hidden_state" else output[name][self.config.vision_feature_layer]
        prefix, carried = encoder.prefix, source >= 0
        patches = unmerged(source, states[:, prefix:])
        if not bool(carried.all()):
            patches, self._there = self._filled(patches, carried, members)
        if grid != native:
            self._smaller = self._join(patches, grid)
            # Of the right size for the model; the projector gets the other.
            patches = patches[:, covers]
        states = torch.cat([states[:, :prefix], patches], 1)
        if name == "hidden_states":
            every = list(output[name])
            every[self.config.vision_feature_layer] = states
            output[name] = tuple(every)
        else:
            output[name] = states

    def _filled(self, patches: Tensor, carried: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (rows, P, D), those not `carried` (zero) as the means of their cells; which cells have any."""
        share = carried[:, members].float().mean(2)
        mean = patches[:, members].mean(2) / share.clamp(min=torch.finfo(share.dtype).tiny).unsqueeze(-1)
        cell = members.new_empty(members.numel())
        cell[members] = torch.arange(len(members), device=members.device).unsqueeze(1)
        return torch.where(carried.unsqueeze(-1), patches, mean[:, cell].to(patches.dtype)), share > 0

    def _leaving(self, features: Tensor) -> Tokens:
        assert self._cells is not None
        x = features if self._smaller is None else self._smaller
        self._note_marks()
        tokens = over(x, self._joined(self.encoder.grid), self._cells.grid)
        self._entered = tokens.count
        return tokens if self._there is None else only(tokens, self._there)
