"""LLaVA-1.5 and LLaVA-NeXT of transformers: vision tower, projector, packing of crops. See `hosts/language.py` too."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.hosts.cells import Cells, CellSignals
from foveate.hosts.host import Record
from foveate.hosts.language import EncodedImage, VisionLanguageHost
from foveate.hosts.sequence import deal
from foveate.hosts.vision import Encoder, VisionSignals
from foveate.method import Crops, HostShape, InputError
from foveate.tokens import DROPPED, Tokens, put

NEWLINE = -1
"""In a stream of slot numbers: a token of the model that ends a row of crops or a picture and belongs to no patch."""
Encode = Callable[..., Any]
"""A method of the model that turns pixels into features."""


@dataclass(frozen=True, eq=False)
class Packing:
    """How one picture's rows of slots (of its crops or frames) become the features that the language model gets.

    Attributes:
        rows: how many there are.
        grid: (rows, columns) of crops after a thumbnail, (0, 0) without crops.
        stream: (n,) long, the slot (row * slots of a row + number) of each feature, `NEWLINE` for newlines.
    """

    rows: int
    grid: tuple[int, int]
    stream: Tensor

    def packed(self, width: int) -> Tensor:
        """(rows, width) bool: which slots are among the features; the others are padding."""
        here = torch.zeros(self.rows * width, dtype=torch.bool)
        here[self.stream[self.stream >= 0]] = True
        return here.reshape(self.rows, width)

    def survivors(self, kept: Tensor, newlines: str = "whole") -> Tensor:
        """(n,) bool: which features stay, of kept (rows, width) slots.

        Which newlines stay, says `Method.newlines`. One that ends a picture without crops stays when anything of it
        did, unless none do.
        """
        alive = kept.reshape(-1)[self.stream.clamp(min=0)].clone()
        ends = (self.stream == NEWLINE).nonzero().squeeze(1).tolist()
        # The first row of crops begins after the thumbnail.
        start = kept.shape[1] if self.grid != (0, 0) else 0
        for end in ends:
            row = alive[start:end]
            stays = row.any() if self.grid == (0, 0) else newlines == "every" or bool(row.all())
            alive[end] = stays and newlines != "none"
            start = end + 1
        return alive


class LlavaHost(VisionLanguageHost):
    """`LlavaForConditionalGeneration` and `LlavaNextForConditionalGeneration`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.encoder = Encoder(self, self.inner.vision_tower)
        features = self.config.vision_feature_layer
        features = features if isinstance(features, list | tuple) else [features]
        # hidden_states[0] is the embedding, so state k is the output of layer k - 1.
        used = {one % (self.encoder.layers + 1) - 1 for one in features}
        self._several_layers = len(used) > 1
        self._select: str = self.config.vision_feature_select_strategy
        if self._select == "default" and not self.encoder.class_token:
            raise InputError(
                "vision_feature_select_strategy 'default' would cut off a patch: this vision tower has no class token; "
                "set it to 'full'"
            )
        self.shape = HostShape(
            family="hf-vlm",
            stages=(*self.encoder.stages, "projector", *self.language_stages),
            vision_layers=self.encoder.layers,
            feature_layer=max(used),
            prefix=self.encoder.prefix,
            grid=self.encoder.native,
            llm_layers=self.depth,
            class_token=self.encoder.class_token,
        )
        self._acts = False
        # Of the pictures that are being encoded: the grid of what a row has for source patches, how rows are packed,
        # and what the rows have become, without features: their tokens, and on which slots those are.
        self._grid = self.shape.grid
        self._packings: list[Packing] = []
        self._cells: Cells | None = None
        self._tokens: Tokens | None = None
        self._slots: Tensor | None = None
        self._entered: Tensor | None = None

    def grid(self) -> tuple[int, int]:
        return self._grid

    def units(self, pixels: Tensor) -> tuple[int, int]:
        """(rows, columns) of what the stages behind the encoder take for source patches, of pictures (…, H, W)."""
        return self.encoder.grid_of(pixels)

    def recall(self, modality: str, encoded: Any) -> list[EncodedImage | None]:
        if not isinstance(encoded.pooler_output, Tensor):
            return super().recall(modality, encoded)
        images = getattr(encoded, "foveate", None)
        if images is None:
            return [None] * len(encoded.pooler_output)
        # For beams, generate repeats the pictures of each sample: [A, B] and [C] become [A, B, A, B] and [C, C].
        copies = len(encoded.pooler_output) // len(images)
        assert self._inputs is not None
        number = list(self.modalities).index(modality) + 1
        upcoming = iter(images)
        repeated: list[EncodedImage | None] = []
        for places in (self._inputs.visual == number).sum(1).tolist()[::copies]:
            mine: list[EncodedImage] = []
            while sum(len(image.alive) for image in mine) < places:
                mine.append(next(upcoming))
            repeated += mine * copies
        return repeated

    # -- hooks

    def hook_vision(self, layers: set[int]) -> None:
        between = next((self.plan[stage] for stage in ("vision.layer", "vision.mlp") if stage in self.plan), None)
        if self._several_layers and between is not None:
            raise InputError(
                f"{between.card.slug} changes the number of tokens between encoder layers; this "
                f"model joins the features of several, {self.config.vision_feature_layer}"
            )
        self._acts = bool(layers) or any(stage.startswith(("vision", "projector")) for stage in self.plan)
        if self._acts:
            self.encoder.hook(layers)
            self.pre(self.inner.multi_modal_projector, self._before_projector)
            self.post(self.inner.multi_modal_projector, self._after_projector)
        self.watch("get_image_features", self._encode_pictures)

    def watch(self, name: str, instead: Callable[[Encode, dict[str, Any]], Any]) -> None:
        """Calls of the model's encoding method go to `instead(method, arguments)`."""
        encode = getattr(self.inner, name)
        signature = inspect.signature(encode)

        @functools.wraps(encode)
        def noting_provenance(*args: Any, **kwargs: Any) -> Any:
            given = dict(signature.bind(*args, **kwargs).arguments)
            given |= given.pop("kwargs", {})
            for setting in ("vision_feature_layer", "vision_feature_select_strategy"):
                if given.get(setting) not in (None, getattr(self.config, setting)):
                    raise InputError(f"{setting} must be set in the config before methods are applied, not in a call")
            self.trace = []
            return instead(encode, given)

        self.replace(self.inner, name, noting_provenance)

    def _encode_pictures(self, encode: Encode, given: dict[str, Any]) -> Any:
        self._begin(given["pixel_values"], self._pack_numbers(given))
        self.encoder.pictures = pictures(self._packings, self._kept_prefix, self._width)
        output = encode(**given)
        self.encoded["image"] = self._provenance(tuple(self.trace))
        attach(output, self.encoded["image"])
        return output

    def _begin(self, pixels: Tensor, packings: list[Packing]) -> None:
        """Before pictures (…, H, W) are encoded together that are packed like that."""
        self._grid = self.units(pixels)
        self._packings = packings
        self._cells = self._tokens = self._slots = None

    @property
    def _kept_prefix(self) -> int:
        """Tokens before the patches of each crop that the model takes for visual ones."""
        return self.encoder.prefix - (1 if self._select == "default" else 0)

    @property
    def _width(self) -> int:
        """Slots of a row: the prefix that is kept, and the source patches."""
        return self._kept_prefix + self._grid[0] * self._grid[1]

    def _pack_numbers(self, given: dict[str, Any]) -> list[Packing]:
        """The packing of each picture, given the arguments of the encoding method."""
        pixels = given["pixel_values"]
        rows, columns = self.units(pixels)
        width = self._kept_prefix + rows * columns
        if not hasattr(self.inner, "pack_image_features"):
            return [Packing(1, (0, 0), torch.arange(width))] * len(pixels)
        from transformers.models.llava_next.modeling_llava_next import (
            get_anyres_image_grid_shape,
            image_size_to_num_patches,
        )

        # The model's own packing, run on slot numbers instead of features, tells where every patch goes.
        sizes, where = given["image_sizes"], (self.config.image_grid_pinpoints, self.config.vision_config.image_size)
        counts = [int(image_size_to_num_patches(size, *where)) for size in sizes]
        newline = torch.full((1,), float(NEWLINE), dtype=torch.float64)
        streams, _ = self.inner.pack_image_features(numbered(counts, width), sizes, self._select, newline)
        return [
            Packing(count, get_anyres_image_grid_shape(size, *where), stream.squeeze(-1).long())
            for count, size, stream in zip(counts, sizes, streams)
        ]

    # -- projector

    def _before_projector(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        features, prefix = args[0], self._kept_prefix
        before = self._leaving(features)
        self._tokens = tokens = self._act("vision.output", before)
        if tokens is before and tokens.x.shape[1] == features.shape[1] - prefix:
            return None
        return (torch.cat([features[:, :prefix], tokens.x], 1), *args[1:]), kwargs

    def _after_projector(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        assert self._tokens is not None
        prefix = self._kept_prefix
        before = self._tokens.with_x(output[:, prefix:])
        tokens = self._act("projector", before)
        self.encoder.clear()
        full = self._lay_out(before, tokens)
        return None if full is None else torch.cat([output[:, :prefix], full], 1)

    def _leaving(self, features: Tensor) -> Tokens:
        """The tokens at "vision.output", of the features (rows, prefix + K, D) that the projector gets."""
        self._entered = self.encoder.entered
        return self.encoder.after(self.shape.feature_layer).with_x(features[:, self._kept_prefix :])

    def _act(self, stage: str, tokens: Tokens) -> Tokens:
        """Lets the method of a stage behind the encoder act."""
        if stage not in self.plan:
            return tokens
        signals = VisionSignals(self.encoder, tokens)
        if self._cells is not None:
            signals = CellSignals(self.encoder, tokens, self._cells)
        assert self._entered is not None
        return self.run(self.stage(stage, -1, signals, self._entered), tokens)

    def _note_marks(self) -> None:
        """What was noted of the encoder's patches becomes what is noted of cells."""
        assert self._cells is not None
        carried = torch.ones_like(self.encoder.during(0).source, dtype=torch.bool)
        self.marks = {
            name: self._cells.of_source(values.float().unsqueeze(-1), carried).squeeze(-1)
            for name, values in self.marks.items()
        }

    def _lay_out(self, before: Tokens, tokens: Tokens) -> Tensor | None:
        """(rows, M, D): the tokens on as many slots as the model expects, zeros between; None if it has just that."""
        packed = [one.packed(self._width)[:, self._kept_prefix :] for one in self._packings]
        self._slots = slots = spread(tokens, torch.cat(packed) if packed else None)
        # Without features, which would stay in memory.
        self._tokens = tokens.with_x(tokens.x.detach()[..., :0])
        number = torch.arange(tokens.source.shape[1], device=slots.device)
        if tokens is before and torch.equal(slots, number.expand(len(slots), -1)):
            return None
        return put(tokens.x.new_zeros(*tokens.source.shape, tokens.x.shape[2]), slots, tokens.x)

    # -- where features come from

    def _provenance(self, records: tuple[Record, ...]) -> list[EncodedImage]:
        """One `EncodedImage` for each picture."""
        tokens, prefix, width = self._tokens, self._kept_prefix, self._width
        patches = width - prefix
        place = Tokens.from_grid(torch.zeros(1, patches, 0), self._grid).position[0]
        place = torch.cat([torch.zeros(prefix, 3), place])
        before = (method for stage, method in self.plan.items() if stage.startswith(("vision", "projector")))
        # Of a stack, who keeps most of them has its way.
        newlines = max((method.newlines for method in before), key=("none", "whole", "every").index, default="whole")
        images, first = [], 0
        for packing in self._packings:
            count, stream = packing.rows, packing.stream
            real = stream >= 0
            owner = torch.full((count * width,), DROPPED)
            owner[stream[real]] = torch.arange(len(stream))[real]
            owner = owner.reshape(count, width)[:, prefix:]
            position = place.repeat(count, 1, 1)
            kept = torch.ones(count, width, dtype=torch.bool)
            here = slice(first, first + count)
            if tokens is not None:
                assert self._slots is not None
                slots, source = self._slots[here].cpu(), tokens.source[here].cpu()
                kept[:, prefix:] = False
                row, token = (slots >= 0).nonzero(as_tuple=True)
                kept[row, prefix + slots[row, token]] = True
                position[row, prefix + slots[row, token]] = tokens.position[here].cpu()[row, token]
                # The last column answers for patches that were dropped.
                slot = nn.functional.pad(slots, (0, 1), value=DROPPED).gather(1, source % (slots.shape[1] + 1))
                owner = torch.where(slot >= 0, owner.gather(1, slot.clamp(min=0)), DROPPED)
            position[..., 0] = torch.arange(count).unsqueeze(1)
            where = position.reshape(-1, 3)[stream.clamp(min=0)]
            marks = {name: values[here].reshape(-1) for name, values in self.marks.items()}
            alive = packing.survivors(kept, newlines)
            images.append(EncodedImage(alive, where, owner.reshape(-1), count, records, marks))
            first += count
        return images


def numbered(counts: list[int], width: int) -> list[Tensor]:
    """For pictures of so many rows, (rows, width, 1) float64 numbers in place of features."""
    return [torch.arange(count * width, dtype=torch.float64).reshape(count, width, 1) for count in counts]


def pictures(packings: list[Packing], prefix: int, width: int) -> tuple[Crops, ...]:
    """Which rows belong together; their slots have `prefix` ones that are no patches."""
    found, first = [], 0
    for packing in packings:
        found.append(Crops(slice(first, first + packing.rows), packing.grid, packing.packed(width)[:, prefix:]))
        first += packing.rows
    return tuple(found)


def singles(rows: int, patches: int, device: torch.device) -> tuple[Crops, ...]:
    """Each row is a picture of its own."""
    whole = torch.ones(1, patches, dtype=torch.bool, device=device)
    return tuple(Crops(slice(row, row + 1), (0, 0), whole) for row in range(rows))


def attach(output: Any, images: list[EncodedImage]) -> None:
    """Lets provenance ride on the features of an encoder's output, or on the output where they are one tensor."""
    features = output.pooler_output if hasattr(output, "pooler_output") else output[1]
    if not isinstance(features, Tensor):
        for one, image in zip(features, images):
            one.foveate = image
    elif hasattr(output, "pooler_output"):
        output.foveate = images


def spread(tokens: Tokens, packed: Tensor | None = None) -> Tensor:
    """(B, N): the slot, of as many as there are patches, that each token is put on; -1 for padding.

    The slots are those of the first patch of each token, dealt out in order. Of a token's patches those in `packed`
    (B, M) bool come first: LLaVA-NeXT cuts the others off, and a merged token shall stay as long as one of its patches.
    """
    count, patches = tokens.x.shape[1], tokens.source.shape[1]
    batch, device = tokens.source.shape[0], tokens.source.device
    number = torch.arange(patches, device=device).expand(batch, -1)
    if packed is not None and packed.shape == number.shape:
        number = torch.where(packed.to(device), number, number + patches)
    first = number.new_full((batch, count + 1), 2 * patches)
    first.scatter_reduce_(1, tokens.source % (count + 1), number, "amin")
    first = first[:, :count]
    slot = torch.where((first < 2 * patches) & tokens.mask(), first % patches, DROPPED)
    return deal(slot)
