"""Qwen2-VL and Qwen2.5-VL of transformers: pictures and clips of any size, packed into one sequence of patches.

What is peculiar here (see `hosts/language.py` for the rest):

* A token is a cell of 2x2 patches, the least that the language model sees: at "vision.output" its four patches side by
  side, (rows, N, 4 * D), so that what is dropped there costs no merger; at "projector" what the merger made of them.
  The source patches of `Tokens` are these cells.
* A row of the batch at these two stages is a picture, or one of a clip's temporal patches (two frames). Pictures have
  grids of their own, so a handler is called once for all rows of one grid: `Signals.grid()` is exact, no row is padded,
  and what becomes of a picture does not depend on those beside it.
* There is no class token. Inside the encoder patches cannot leave: its attention is cut up by picture (in Qwen2.5-VL by
  window), and its order of patches is fixed before the first layer.
* Position ids have axes for time, row and column. Every token keeps those of its first cell, and what follows a
  picture keeps its own, whatever was dropped.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from foveate.hosts.host import named
from foveate.hosts.language import EncodedImage, VisionLanguageHost
from foveate.hosts.signals import NoSignals
from foveate.method import Crops, HostShape, InputError
from foveate.nn.attention import Attention
from foveate.tokens import DROPPED, Tokens, predecessors

_NOMINAL = (48, 48)
"""`HostShape.grid`, by which methods share out a budget before there is a picture. These models have no resolution of
their own; this many patches are 576 tokens, which is what the methods' papers count with."""


@dataclass(frozen=True, eq=False)
class EncodedClip(EncodedImage):
    """With the grid (rows, columns) of cells of each of its C temporal patches."""

    grid: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class Frames:
    """The rows of the batch that have one grid, g of them with M cells each.

    Attributes:
        grid: (rows, columns) of cells.
        rows: (g,) long, their numbers in the batch.
        cells: (g, M) long, where the encoder's sequence of cells has each of theirs.
    """

    grid: tuple[int, int]
    rows: Tensor
    cells: Tensor

    @property
    def count(self) -> int:
        return self.cells.shape[1]


class QwenVLHost(VisionLanguageHost):
    """`Qwen2VLForConditionalGeneration` and `Qwen2_5_VLForConditionalGeneration`."""

    modalities: Mapping[str, tuple[str, str]] = {
        "image": ("pixel_values", "image_token_id"),
        "video": ("pixel_values_videos", "video_token_id"),
    }

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.tower: Any = self.inner.visual
        self.side: int = self.tower.spatial_merge_size
        self.unit = self.side**2
        depth = len(self.tower.blocks)
        self.shape = HostShape(
            family="hf-vlm",
            stages=("vision.output", "projector", *self.language_stages),
            vision_layers=depth,
            feature_layer=depth - 1,
            prefix=0,
            grid=_NOMINAL,
            llm_layers=self.depth,
            class_token=False,
            joined=self.unit,
        )
        self.projections: dict[int, Projections] = {}
        # While the encoder runs: the rows by grid, and what their tokens are now; `_merged` is whether the merger sees
        # fewer cells, `_changed` whether any token has.
        self._frames: list[Frames] = []
        self._tokens: list[Tokens] = []
        self._merged = self._changed = False
        self._noted: dict[str, Tensor] = {}

    def grid(self) -> tuple[int, int]:
        grids = {image.grid for images in self.encoded.values() for image in images if isinstance(image, EncodedClip)}
        if len(grids) != 1:
            raise InputError("the pictures of this batch have different grids; only at the vision stages there is one")
        return grids.pop()

    # -- hooks

    def hook_vision(self, layers: set[int]) -> None:
        if layers or {"vision.output", "projector"} & self.plan.keys():
            self.pre(self.tower, self._begin)
            self.pre(self.tower.merger, self._before_merger)
            self.post(self.tower.merger, self._after_merger)
        for layer in sorted(layers):
            self.projections[layer] = Projections(self, self.tower.blocks[layer].attn)
        for modality in self.modalities:
            self._note_provenance(modality)

    def _note_provenance(self, modality: str) -> None:
        name = f"get_{modality}_features"
        encode = getattr(self.inner, name)

        @functools.wraps(encode)
        def noting_provenance(*args: Any, **kwargs: Any) -> Any:
            self.trace, self._frames, self._changed = [], [], False
            given = inspect.signature(encode).bind(*args, **kwargs).arguments
            output = encode(*args, **kwargs)
            features = output.pooler_output if hasattr(output, "pooler_output") else output[1]
            self.encoded[modality] = self._provenance(self._grids(given[f"{modality}_grid_thw"]))
            for one, image in zip(features, self.encoded[modality]):
                one.foveate = image
            return output

        self.replace(self.inner, name, noting_provenance)

    def _grids(self, thw: Tensor) -> list[tuple[int, int, int]]:
        """(temporal patches, rows of cells, columns of cells) of each picture."""
        return [(time, rows // self.side, columns // self.side) for time, rows, columns in thw.tolist()]

    def _begin(self, module: Any, args: Any, kwargs: Any) -> None:
        given = named(module, args, kwargs)
        grids = self._grids(given["grid_thw"])
        number = torch.arange(sum(time * rows * columns for time, rows, columns in grids))
        if hasattr(module, "window_size"):
            # Qwen2.5-VL sorts the cells by window.
            order, _ = get_vision_window_index(
                given["grid_thw"], self.side, module.window_size, module.patch_size, kwargs=dict(given)
            )
            number = order.argsort()
        number = number.to(given["hidden_states"].device)
        members: dict[tuple[int, int], list[tuple[int, int]]] = {}
        row = first = 0
        for time, rows, columns in grids:
            for _ in range(time):
                members.setdefault((rows, columns), []).append((row, first))
                row, first = row + 1, first + rows * columns
        self._frames = []
        for grid, places in members.items():
            row_numbers, starts = torch.tensor(places, device=number.device).unbind(1)
            cell = torch.arange(grid[0] * grid[1], device=number.device)
            self._frames.append(Frames(grid, row_numbers, number[starts.unsqueeze(1) + cell]))
        self._noted = {}
        self._merged = self._changed = False

    # -- the two stages

    def _before_merger(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        states = args[0]
        cells = states.reshape(len(states) // self.unit, -1)
        if "vision.output" not in self.plan:
            cells = cells[:, :0]
        self._tokens = [Tokens.from_grid(cells[one.cells], one.grid) for one in self._frames]
        self._merged = self._changed = self._act("vision.output")
        if not self._merged:
            return None
        left = torch.cat([tokens.x[tokens.mask()] for tokens in self._tokens])
        if not len(left):
            # The merger cannot reshape nothing; what it makes of this is not used.
            left = cells.new_zeros(1, cells.shape[1])
        return (left.reshape(-1, states.shape[1]), *args[1:]), kwargs

    def _after_merger(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        full = self._put_back(output) if self._merged or "projector" in self.plan else None
        for layer in self.projections.values():
            layer.clear()
        # Without features, which would stay in memory.
        self._tokens = [tokens.with_x(tokens.x.detach()[..., :0]) for tokens in self._tokens]
        return full

    def _put_back(self, output: Tensor) -> Tensor | None:
        """(cells, D) in the encoder's order, zero where no token is left, of what the merger put out; None for that."""
        if self._merged:
            masks = [tokens.mask() for tokens in self._tokens]
            counts = [int(mask.sum()) for mask in masks]
            features = [
                output.new_zeros(*mask.shape, output.shape[1]).masked_scatter(mask.unsqueeze(-1), part)
                for mask, part in zip(masks, output[: sum(counts)].split(counts))
            ]
        else:
            features = [output[one.cells] for one in self._frames]
        self._tokens = [tokens.with_x(x) for tokens, x in zip(self._tokens, features)]
        self._changed |= self._act("projector")
        if not self._changed:
            return None
        full = output.new_zeros(sum(one.cells.numel() for one in self._frames), output.shape[1])
        for one, tokens in zip(self._frames, self._tokens):
            slots = first_cells(tokens)
            here = slots >= 0
            full = full.index_put((one.cells.gather(1, slots.clamp(min=0))[here],), tokens.x[here])
        return full

    def _act(self, stage: str) -> bool:
        """Lets the method of a stage act on the rows of every grid; whether it changed any."""
        if stage not in self.plan:
            return False
        before, after = self._tokens, []
        for one, tokens in zip(self._frames, before):
            self.marks = {name: values[one.rows, : one.count] for name, values in self._noted.items()}
            entered = torch.full_like(one.rows, one.count)
            after.append(self.call(self.stage(stage, -1, PackedSignals(self, one, tokens), entered), tokens))
            for name, values in self.marks.items():
                # Rows of other grids, and what a row has less than the longest, stay 0.
                whole = self._noted.get(name, values.new_zeros(self._rows, self._longest))
                cell = torch.arange(one.count, device=whole.device)
                self._noted[name] = whole.index_put((one.rows.unsqueeze(1), cell), values)
        self._tokens = after
        if all(now is then for now, then in zip(after, before)):
            return False
        self.record(stage, self.plan[stage].card.slug, self._batch(before), self._batch(after))
        return True

    @property
    def _rows(self) -> int:
        return sum(len(one.rows) for one in self._frames)

    @property
    def _longest(self) -> int:
        return max(one.count for one in self._frames)

    def _batch(self, parts: list[Tokens]) -> Tokens:
        """The tokens of all rows, in their order, without features."""
        fields = zip(*((one.x.detach()[..., :0], one.position, one.size, one.source, one.mask()) for one in parts))
        padding = (0, 0, 0, DROPPED, False)
        x, position, size, source, valid = (self._by_row(list(field), rest) for field, rest in zip(fields, padding))
        return Tokens(x, position, size, source, None if bool(valid.all()) else valid)

    def _by_row(self, parts: list[Tensor], rest: int) -> Tensor:
        """(rows, K, …) from (g, up to K, …) of the rows of each grid; where a row has less than K, `rest`."""
        most = max(part.shape[1] for part in parts)
        whole = parts[0].new_full((self._rows, most, *parts[0].shape[2:]), rest)
        for one, part in zip(self._frames, parts):
            whole[one.rows, : part.shape[1]] = part
        return whole

    # -- where features come from

    def _provenance(self, grids: list[tuple[int, int, int]]) -> list[EncodedImage]:
        """One `EncodedClip` for each picture."""
        # By row and cell: the cell whose slot has the token now, the position of the token on its slot, whether any is.
        owners: list[Tensor] = []
        places: list[Tensor] = []
        filled: list[Tensor] = []
        for one, tokens in zip(self._frames, self._tokens if self._changed else ()):
            slots = first_cells(tokens)
            # The last column answers for cells that were dropped.
            whole = nn.functional.pad(slots, (0, 1), value=DROPPED)
            owners.append(whole.gather(1, tokens.source % whole.shape[1]))
            target = torch.where(slots >= 0, slots, one.count)
            place = tokens.position.new_zeros(len(slots), one.count + 1, 3)
            places.append(place.scatter(1, target.unsqueeze(-1).expand(-1, -1, 3), tokens.position)[:, :-1])
            there = torch.zeros_like(place[..., 0], dtype=torch.bool)
            filled.append(there.scatter(1, target, True)[:, :-1])
        if self._changed:
            owned, placed, alive = (self._by_row(parts, 0).cpu() for parts in (owners, places, filled))
        marks = {name: values.cpu() for name, values in self._noted.items()}
        records, row = tuple(self.trace), 0
        images: list[EncodedImage] = []
        for time, rows, columns in grids:
            count, here = rows * columns, slice(row, row + time)
            fresh = Tokens.from_grid(torch.zeros(1, time * count, 0), (time, rows, columns))
            position, by_cell, left = fresh.position[0], fresh.source[0], torch.ones(time * count, dtype=torch.bool)
            if self._changed:
                held = owned[here, :count]
                by_cell = torch.where(held >= 0, held + by_cell.reshape(time, count)[:, :1], DROPPED).reshape(-1)
                left = alive[here, :count].reshape(-1)
                position = torch.cat([position[:, :1], placed[here, :count].reshape(-1, 3)[:, 1:]], 1)
            noted = {name: values[here, :count].reshape(-1) for name, values in marks.items()}
            images.append(EncodedClip(left, position, by_cell, time, records, noted, (rows, columns)))
            row += time
        return images


def first_cells(tokens: Tokens) -> Tensor:
    """(g, K): the first cell of each token, on whose slot it is put; -1 for padding and for tokens without a cell.

    Slots are not dealt out anew where a method reorders: with the slot, a token would get another one's row and column.
    """
    fresh = torch.arange(tokens.source.shape[1], device=tokens.source.device).expand_as(tokens.source)
    return torch.where(tokens.mask(), predecessors(replace(tokens, source=fresh), tokens), DROPPED)


class Projections:
    """Queries and keys of one encoder layer, as its own projection put them out.

    The attention function itself would see them too, but once for every picture (or window), or once for all of them:
    that depends on the implementation, which stays what it is.
    """

    def __init__(self, host: QwenVLHost, attention: Any) -> None:
        self.attention = attention
        self._projected: Tensor | None = None
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._lengths: list[int] = []
        self._received: Tensor | None = None
        host.pre(attention, self._enter)
        host.post(attention.qkv, self._note)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = named(module, args, kwargs)
        self._rotary, self._lengths = given["position_embeddings"], given["cu_seqlens"].diff().tolist()

    def _note(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self._projected, self._received = output.detach(), None

    def clear(self) -> None:
        self._projected = self._rotary = self._received = None

    def _parts(self) -> tuple[Tensor, Tensor]:
        """Queries and keys (S, H, D) before position encoding, of all patches in the encoder's order."""
        if self._projected is None:
            raise RuntimeError("this attention layer has not run yet")
        query, key, _ = self._projected.unflatten(1, (3, self.attention.num_heads, -1)).unbind(1)
        return query, key

    def keys(self) -> Tensor:
        """(S, H * D) before position encoding."""
        return self._parts()[1].flatten(1)

    @torch.no_grad()
    def received(self) -> Tensor:
        """(S,) what each patch receives from all patches together, mean over heads: 1 on average."""
        if self._received is None:
            rotate = sys.modules[type(self.attention).__module__].apply_rotary_pos_emb_vision
            assert self._rotary is not None
            query, key = rotate(*self._parts(), *self._rotary)
            lengths = torch.tensor(self._lengths)
            starts = lengths.cumsum(0) - lengths
            total = query.new_zeros(len(query), dtype=torch.float32)
            # Patches see those of their own picture or window only; all of one length are done at once.
            for length in lengths.unique().tolist():
                block = (starts[lengths == length].unsqueeze(1) + torch.arange(length)).to(query.device)
                queries, keys = query[block].transpose(1, 2), key[block].transpose(1, 2)
                attention = Attention(queries, keys, self.attention.scaling, False, None, None, block)
                total[block] = length * attention.received()
            self._received = total
        return self._received


class PackedSignals(NoSignals):
    """The signals of the encoder for the rows of one grid (see `foveate.method.Signals`), per cell of patches."""

    where = "a vision encoder whose tokens are cells of 2x2 patches"

    def __init__(self, host: QwenVLHost, frames: Frames, tokens: Tokens) -> None:
        self._host, self._frames, self._tokens = host, frames, tokens

    def attention(self, layer: int) -> Attention:
        raise InputError(
            "attention is between patches here, and a token is a cell of 2x2 of them; ask for received(layer) instead"
        )

    def cls_attention(self, layer: int) -> Tensor:
        raise InputError(f"{type(self._host.tower).__name__} has no class token")

    def received(self, layer: int) -> Tensor:
        """(g, K): mean over all patches of the row (picture or temporal patch) as those that pay, over heads, and over
        the patches of the token. Where Qwen2.5-VL attends within windows, a patch pays those of its own window only."""
        patches = self._frames.count * self._host.unit
        return self._pooled(self._read(layer).received().unsqueeze(1)).squeeze(2) / patches

    def keys(self, layer: int) -> Tensor:
        """(g, K, C) before position encoding, mean over the patches of the token."""
        return self._pooled(self._read(layer).keys())

    def _read(self, layer: int) -> Projections:
        if layer not in self._host.projections:
            raise RuntimeError(f"name 'vision.attention[{layer}]' in Method.reads to look at it")
        return self._host.projections[layer]

    def _pooled(self, values: Tensor) -> Tensor:
        """(g, K, C), the means over the patches of each token, of (S, C) by patch in the encoder's order."""
        # Sums of many bf16 values need more digits than bf16 has.
        exact = values.to(torch.promote_types(values.dtype, torch.float32))
        by_cell = exact.unflatten(0, (-1, self._host.unit)).mean(1)[self._frames.cells]
        source, count = self._tokens.source, self._tokens.x.shape[1]
        target = (source % (count + 1)).unsqueeze(-1).expand_as(by_cell)
        total = by_cell.new_zeros(len(source), count + 1, by_cell.shape[2]).scatter_add(1, target, by_cell)
        return (total[:, :-1] / self._tokens.size.clamp(min=1).unsqueeze(-1)).to(values.dtype)

    def crops(self) -> tuple[Crops, ...]:
        source = self._tokens.source
        whole = torch.ones(1, source.shape[1], dtype=torch.bool, device=source.device)
        return tuple(Crops(slice(row, row + 1), (0, 0), whole) for row in range(len(source)))

    def grid(self) -> tuple[int, int]:
        return self._frames.grid
