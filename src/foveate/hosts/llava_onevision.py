"""LLaVA-OneVision of transformers: pictures in crops, several pictures a sample without crops, and clips.

What is peculiar here (see `hosts/llava.py` and `hosts/cells.py` for the rest):

* A lone picture is a thumbnail and crops, as in LLaVA-NeXT. Of several in one sample, each is one row without crops.
* The frames of a clip are pooled behind the projector to half their rows and columns of patches.
* A picture of more crops than `vision_aspect_ratio` names (anyres_max_9) is resampled behind the projector: its crops,
  stitched, become a smaller grid of cells.

What was dropped before such a mean would be in it as a zero. For clips and for resampled pictures "vision.output" and
"projector" therefore both act, in this order, on what the model has pooled: cells, features of the language model's
width. A clip's rows are its frames. A resampled picture's are the thumbnail and, instead of its crops, as few equal
blocks of cells as have no more rows and columns than a crop has patches; where a block has less, there is no token, as
in a crop's padding (`Crops.packed`). Pictures that the model does not resample are encoded apart from them, and their
stages act where they do in LLaVA-NeXT, so that a picture's features do not depend on those beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.hosts.cells import Cells, only, unmerged
from foveate.hosts.language import EncodedImage
from foveate.hosts.llava import NEWLINE, Encode, LlavaHost, Packing, attach, numbered, pictures, singles
from foveate.tokens import Tokens

_NEVER = "anyres_max_1000000000"
"""No picture has so many crops that it would be resampled."""


@dataclass(frozen=True, eq=False)
class Resampled(Packing):
    """Of a picture that the model resamples: rows are the thumbnail and blocks of cells.

    Attributes:
        crops: how it would be packed without that, which is what the encoder sees.
    """

    crops: Packing

    @classmethod
    def of(cls, stream: Tensor, grid: tuple[int, int], crops: Packing) -> Resampled:
        """From the model's packing of anything but newlines; `grid` are the rows and columns of a crop's patches."""
        height, width = grid
        patches = height * width
        ends = (stream == NEWLINE).nonzero().squeeze(1)
        rows, columns = len(ends), int(ends[0]) - patches
        high, wide = -(-rows // height), -(-columns // width)
        block_y, y = _dealt(rows, high)
        block_x, x = _dealt(columns, wide)
        block, own = block_y[:, None] * wide + block_x, y[:, None] * width + x
        slots = torch.cat([patches * (1 + block) + own, torch.full((rows, 1), NEWLINE)], 1)
        return cls(1 + high * wide, (high, wide), torch.cat([torch.arange(patches), slots.flatten()]), crops)


class LlavaOnevisionHost(LlavaHost):
    """`LlavaOnevisionForConditionalGeneration`."""

    modalities: Mapping[str, tuple[str, str]] = {
        "image": ("pixel_values", "image_token_id"),
        "video": ("pixel_values_videos", "video_token_id"),
    }

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._pack = self.inner.pack_image_features
        self._halve = self.inner.apply_pooling
        self._grids: dict[str, tuple[int, int]] = {}

    def grid(self) -> tuple[int, int]:
        """Of a batch with pictures and clips, that of pictures."""
        return next((self._grids[name] for name in self.modalities if name in self.encoded), self.shape.grid)

    def hook_vision(self, layers: set[int]) -> None:
        super().hook_vision(layers)
        self.watch("get_video_features", self._encode_clips)
        if self._acts:
            self.replace(self.inner, "apply_pooling", self._pool_frames)
            self.replace(self.inner, "pack_image_features", self._pack_crops)

    # -- pictures

    def _encode_pictures(self, encode: Encode, given: dict[str, Any]) -> Any:
        packings = self._pack_numbers(given)
        kinds = [isinstance(packing, Resampled) for packing in packings]
        groups = [[i for i, one in enumerate(kinds) if one == kind] for kind in (False, True)]
        groups = [group for group in groups if group] if self._acts else [list(range(len(packings)))]
        images: dict[int, EncodedImage] = {}
        features: dict[int, Tensor] = {}
        output: Any = None
        for group in groups:
            here = [packings[i] for i in group]
            crops = [one.crops if isinstance(one, Resampled) else one for one in here]
            self._begin(given["pixel_values"], here)
            self.encoder.pictures = pictures(crops, 0, self._width)
            if self._acts and kinds[group[0]]:
                self._cells = self._resampling(given, group)
            output = encode(**given if len(groups) == 1 else self._only(given, group))
            found = output.pooler_output if hasattr(output, "pooler_output") else output[1]
            images |= zip(group, self._provenance(()))
            features |= zip(group, found)
        self._grids["image"] = self._grid
        records = tuple(self.trace)
        self.encoded["image"] = [replace(images[i], records=records) for i in range(len(packings))]
        if len(groups) > 1:
            output = type(output)(pooler_output=[features[i] for i in range(len(packings))])
            if given.get("return_dict") is False:
                output = (None, *output.to_tuple())
        attach(output, self.encoded["image"])
        return output

    def _pack_numbers(self, given: dict[str, Any]) -> list[Packing]:
        from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape

        sizes, grid = given["image_sizes"], self.units(given["pixel_values"])
        counts = self._rows(given)
        values, newline = numbered(counts, grid[0] * grid[1]), torch.full((1,), float(NEWLINE), dtype=torch.float64)
        packings: list[Packing] = []
        streams, lengths = self._pack(values, sizes, newline, _NEVER)
        resampled, shorter = self._pack(values, sizes, newline, self._ratio(given))
        for size, count, stream, other, changed in zip(sizes, counts, streams, resampled, lengths != shorter):
            where = (self.config.image_grid_pinpoints, self.config.vision_config.image_size)
            crops = get_anyres_image_grid_shape(size, *where) if count > 1 else (0, 0)
            packing = Packing(count, crops, stream.squeeze(-1).long())
            packings.append(Resampled.of(other.squeeze(-1), grid, packing) if changed else packing)
        return packings

    def _ratio(self, given: dict[str, Any]) -> str:
        ratio: str = given.get("vision_aspect_ratio") or self.config.vision_aspect_ratio
        return ratio

    def _rows(self, given: dict[str, Any]) -> list[int]:
        """How many rows of the encoder each picture has; among several of one sample it has one."""
        from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

        sizes, batch = given["image_sizes"], given.get("batch_num_images")
        alone = [True] * len(sizes) if batch is None else [int(n) == 1 for n in batch for _ in range(int(n))]
        where = (self.config.image_grid_pinpoints, self.config.vision_config.image_size)
        return [int(image_size_to_num_patches(size, *where)) if one else 1 for size, one in zip(sizes, alone)]

    def _only(self, given: dict[str, Any], group: list[int]) -> dict[str, Any]:
        """The arguments of the encoding method for some of the pictures."""
        pixels, sizes, batch = given["pixel_values"], given["image_sizes"], given.get("batch_num_images")
        if pixels.ndim == 5:
            pixels = pixels[group]
        else:
            crops = pixels.split(self._rows(given))
            pixels = torch.cat([crops[i] for i in group])
        sizes = sizes[group] if isinstance(sizes, Tensor) else [sizes[i] for i in group]
        if batch is not None:
            # Pictures of a sample that has several are all of one kind.
            first, left = 0, []
            for count in map(int, batch):
                left += [count] if count and first in group else []
                first += count
            batch = torch.tensor(left)
        some = {"pixel_values": pixels, "image_sizes": sizes, "batch_num_images": batch, "return_dict": True}
        return given | some

    def _resampling(self, given: dict[str, Any], group: list[int]) -> Cells:
        """What the model makes of the crops of some pictures, all of which it resamples."""
        here = [one for one in self._packings if isinstance(one, Resampled)]
        sizes = [given["image_sizes"][i] for i in group]
        counts, ratio, device = [one.crops.rows for one in here], self._ratio(given), given["pixel_values"].device

        def pool(values: Tensor) -> Tensor:
            packed, _ = self._pack(values.split(counts), sizes, values.new_zeros(values.shape[2]), ratio)
            return self._unpacked(packed)

        there = torch.cat([one.packed(self._width) for one in here]).to(device)
        whole = only(Tokens.from_grid(torch.zeros(*there.shape, 0, device=device), self._grid), there)
        return Cells(whole, pool, self._grid, pictures(self._packings, 0, self._width))

    def _unpacked(self, packed: list[Tensor]) -> Tensor:
        """(rows, M, C): the features of each picture (n, C) on their slots."""
        found = []
        for one, features in zip(self._packings, packed):
            stream = one.stream.to(features.device)
            real = stream >= 0
            empty = features.new_zeros(one.rows * self._width, features.shape[1])
            found.append(empty.index_put((stream[real],), features[real]).unflatten(0, (one.rows, -1)))
        return torch.cat(found)

    def _pack_crops(
        self, image_features: Any, image_sizes: Any, image_newline: Tensor | None = None,
        vision_aspect_ratio: str = "anyres_max_9",
    ) -> Any:  # fmt: skip
        packed, lengths = self._pack(image_features, image_sizes, image_newline, vision_aspect_ratio)
        full = None if self._cells is None else self._act_on_cells(self._unpacked(packed))
        if full is None:
            return packed, lengths
        changed, rows = [], full.split([one.rows for one in self._packings])
        for one, features, mine in zip(self._packings, packed, rows):
            stream = one.stream.to(features.device)
            real = stream >= 0
            changed.append(features.index_put((real.nonzero().squeeze(1),), mine.flatten(0, 1)[stream[real]]))
        return changed, lengths

    # -- clips

    def _encode_clips(self, encode: Encode, given: dict[str, Any]) -> Any:
        pixels = given["pixel_values_videos"]
        clips, frames = pixels.shape[:2]
        rows, columns = self.encoder.native
        grid = (-(-rows // 2), -(-columns // 2))
        slots = torch.cat([torch.arange(frames * grid[0] * grid[1]), torch.tensor([NEWLINE])])
        self._begin(pixels, [Packing(frames, (0, 0), slots)] * clips)
        self._grid = self._grids["video"] = grid
        self.encoder.pictures = singles(clips * frames, rows * columns, pixels.device)
        if self._acts:
            whole = Tokens.from_grid(pixels.new_zeros(clips * frames, grid[0] * grid[1], 0), grid)
            self._cells = Cells(whole, self._halve, grid, singles(clips * frames, grid[0] * grid[1], pixels.device))
        output = encode(**given)
        self.encoded["video"] = self._provenance(tuple(self.trace))
        attach(output, self.encoded["video"])
        return output

    def _pool_frames(self, image_features: Tensor) -> Tensor:
        pooled: Tensor = self._halve(image_features)
        full = self._act_on_cells(pooled)
        return pooled if full is None else full

    # -- stages

    def _before_projector(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return super()._before_projector(module, args, kwargs) if self._cells is None else None

    def _after_projector(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        if self._cells is None:
            return super()._after_projector(module, args, kwargs, output)
        tokens = self.encoder.after(self.shape.feature_layer)
        place = torch.arange(tokens.source.shape[1], device=output.device)
        if torch.equal(tokens.source, place.expand_as(tokens.source)):
            return None
        return unmerged(tokens.source, output)

    def _act_on_cells(self, pooled: Tensor) -> Tensor | None:
        """Lets the methods of both stages act on what the model pooled (rows, N, D); what becomes of it, laid out."""
        cells, encoder = self._cells, self.encoder
        assert cells is not None
        self._note_marks()
        before = whole = cells.whole.with_x(pooled)
        carried = encoder.after(self.shape.feature_layer).source >= 0
        if not bool(carried.all()):
            means, there = cells.share(pooled, carried)
            before = only(whole.with_x(means), there)
        self._entered = whole.count
        if encoder.grid != encoder.source_grid:
            # The picture came in smaller, and with it what the model makes of it.
            factor = (encoder.source_grid[0] / encoder.grid[0], encoder.source_grid[1] / encoder.grid[1])
            before, self._entered = before.pool(factor), whole.pool(factor).count
        tokens = self._act("projector", self._act("vision.output", before))
        encoder.clear()
        return self._lay_out(whole, tokens)


def _dealt(count: int, blocks: int) -> tuple[Tensor, Tensor]:
    """(count,) long: in which of as equal blocks as can be each place is, and the how manieth there."""
    place = torch.arange(count)
    block = place * blocks // count
    sizes = block.bincount()
    return block, place - (sizes.cumsum(0) - sizes)[block]
