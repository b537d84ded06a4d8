"""LLaVA-1.5 and LLaVA-NeXT of transformers: vision tower, projector, packing of crops. See `hosts/language.py` too."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from foveate.hosts.language import EncodedImage, VisionLanguageHost
from foveate.hosts.sequence import deal
from foveate.hosts.vision import Encoder, VisionSignals
from foveate.method import Crops, HostShape, InputError
from foveate.tokens import DROPPED, Tokens

_NEWLINE = -1
"""In a stream of slot numbers: LLaVA-NeXT's end-of-row token, which belongs to no patch."""


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
        self.crops: Tokens | None = None
        # From the projector to the language model.
        self._seen_slots: Tensor | None = None
        self._slots: Tensor | None = None

    def grid(self) -> tuple[int, int]:
        return self.encoder.source_grid

    # -- hooks

    def hook_vision(self, layers: set[int]) -> None:
        between = next((self.plan[stage] for stage in ("vision.layer", "vision.mlp") if stage in self.plan), None)
        if self._several_layers and between is not None:
            raise InputError(
                f"{between.card.slug} changes the number of tokens between encoder layers; this "
                f"model joins the features of several, {self.config.vision_feature_layer}"
            )
        if layers or any(stage.startswith("vision") or stage == "projector" for stage in self.plan):
            self.encoder.hook(layers)
            self.pre(self.inner.multi_modal_projector, self._before_projector)
            self.post(self.inner.multi_modal_projector, self._after_projector)

        encode = self.inner.get_image_features

        @functools.wraps(encode)
        def noting_provenance(*args: Any, **kwargs: Any) -> Any:
            self.trace, self.crops = [], None
            given = inspect.signature(encode).bind(*args, **kwargs).arguments
            for name in ("vision_feature_layer", "vision_feature_select_strategy"):
                if given.get(name) not in (None, getattr(self.config, name)):
                    raise InputError(f"{name} must be set in the config before methods are applied, not in a call")
            sizes = given.get("image_sizes")
            self._seen_slots = self._packed_slots(sizes)
            self.encoder.pictures = self._pictures(sizes)
            output = encode(*args, **kwargs)
            features = output.pooler_output if hasattr(output, "pooler_output") else output[1]
            self.encoded["image"] = self._provenance(features, sizes)
            for one, image in zip(features, self.encoded["image"]):
                one.foveate = image
            return output

        self.replace(self.inner, "get_image_features", noting_provenance)

    # -- projector

    def _before_projector(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        encoder = self.encoder
        features = args[0]
        tokens = encoder.after(self.shape.feature_layer)
        prefix = features.shape[1] - tokens.x.shape[1]
        before = tokens = tokens.with_x(features[:, prefix:])
        if "vision.output" in self.plan:
            tokens = encoder._run("vision.output", -1, tokens)
        encoder.clear()
        self.crops = tokens
        if tokens is before:
            return None
        return (torch.cat([features[:, :prefix], tokens.x], 1), *args[1:]), kwargs

    def _after_projector(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        assert self.crops is not None
        prefix = output.shape[1] - self.crops.x.shape[1]
        before = tokens = self.crops.with_x(output[:, prefix:])
        if "projector" in self.plan:
            entered = self.encoder._steps[0][1].count
            tokens = self.run(self.stage("projector", -1, VisionSignals(self.encoder, tokens), entered), tokens)
        self.crops = tokens
        slots = spread(tokens, self._seen_slots)
        self._slots = slots
        number = torch.arange(tokens.source.shape[1], device=slots.device)
        if tokens is before and torch.equal(slots, number.expand(slots.shape[0], -1)):
            return None
        full = tokens.x.new_zeros(tokens.x.shape[0], tokens.source.shape[1] + 1, tokens.x.shape[2])
        # Padding is written to one slot too many, which is cut off.
        target = torch.where(slots >= 0, slots, tokens.source.shape[1])
        full = full.scatter(1, target.unsqueeze(-1).expand_as(tokens.x), tokens.x)
        return torch.cat([output[:, :prefix], full[:, :-1]], 1)

    # -- where features come from

    def _provenance(self, features: list[Tensor], sizes: Tensor | None) -> list[EncodedImage]:
        """One `EncodedImage` for each image's features (n, D)."""
        crops = self.crops
        rows, columns = self.shape.grid
        patches = rows * columns if crops is None else crops.source.shape[1]
        prefix, width = self._kept_prefix, self._kept_prefix + patches
        place = Tokens.from_grid(torch.zeros(1, patches, 0), self._layout(patches)).position[0]
        place = torch.cat([torch.zeros(prefix, 3), place])
        records, images, first = tuple(self.trace), [], 0
        for stream in self._streams(features, sizes, width):
            count = int(stream.max()) // width + 1
            real = stream >= 0
            owner = torch.full((count * width,), DROPPED)
            owner[stream[real]] = torch.arange(len(stream))[real]
            owner = owner.reshape(count, width)[:, prefix:]
            position = place.repeat(count, 1, 1)
            kept = torch.ones(count, width, dtype=torch.bool)
            if crops is not None:
                assert self._slots is not None
                slots = self._slots[first : first + count].cpu()
                source = crops.source[first : first + count].cpu()
                kept[:, prefix:] = False
                row, token = (slots >= 0).nonzero(as_tuple=True)
                kept[row, prefix + slots[row, token]] = True
                position[row, prefix + slots[row, token]] = crops.position[first : first + count].cpu()[row, token]
                slot = torch.where(source >= 0, slots.gather(1, source.clamp(min=0)), DROPPED)
                owner = torch.where(slot >= 0, owner.gather(1, slot.clamp(min=0)), DROPPED)
            position[..., 0] = torch.arange(count).unsqueeze(1)
            alive = _survivors(stream, kept.reshape(-1), width)
            where = position.reshape(-1, 3)[stream.clamp(min=0)]
            marks = {name: values[first : first + count].reshape(-1) for name, values in self.marks.items()}
            images.append(EncodedImage(alive, where, owner.reshape(-1), count, records, marks))
            first += count
        return images

    def _layout(self, patches: int) -> tuple[int, int]:
        rows, columns = self.encoder.source_grid if self.crops is not None else self.shape.grid
        return (rows, columns) if rows * columns == patches else (1, patches)

    @property
    def _kept_prefix(self) -> int:
        """Tokens before the patches of each crop that the model takes for visual ones."""
        return self.encoder.prefix - (1 if self._select == "default" else 0)

    def _packed_slots(self, sizes: Tensor | None) -> Tensor | None:
        """(crops, patches) bool: which patches are left when the crops are packed; None if all are."""
        if not hasattr(self.inner, "pack_image_features") or sizes is None:
            return None
        rows, columns = self.shape.grid
        width, left = self._kept_prefix + rows * columns, []
        for stream in self._streams([], sizes, width):
            left.append(torch.zeros((int(stream.max()) // width + 1) * width, dtype=torch.bool))
            left[-1][stream[stream >= 0]] = True
        return torch.cat(left).reshape(-1, width)[:, self._kept_prefix :]

    def _pictures(self, sizes: Tensor | None) -> tuple[Crops, ...] | None:
        """Which crops belong to one picture; None where each picture is one row."""
        if self._seen_slots is None:
            return None
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        assert sizes is not None
        pictures, first = [], 0
        for size in sizes:
            side = self.config.vision_config.image_size
            rows, columns = get_anyres_image_grid_shape(size, self.config.image_grid_pinpoints, side)
            here = slice(first, first + 1 + rows * columns)
            pictures.append(Crops(here, (rows, columns), self._seen_slots[here]))
            first = here.stop
        return tuple(pictures)

    def _streams(self, features: list[Tensor], sizes: Tensor | None, width: int) -> list[Tensor]:
        """Per image, the slot (crop * width + slot) of each of its features, _NEWLINE for newlines."""
        if not hasattr(self.inner, "pack_image_features"):
            return [torch.arange(len(one)) for one in features]
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        # The model's own packing, run on slot numbers instead of features, tells where every patch goes.
        pinpoints, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        assert sizes is not None
        numbered = [
            torch.arange(int(image_size_to_num_patches(size, pinpoints, side)) * width).reshape(-1, width, 1).double()
            for size in sizes
        ]
        newline = torch.full((1,), float(_NEWLINE), dtype=torch.float64)
        packed, _ = self.inner.pack_image_features(numbered, sizes, self._select, newline)
        return [one.squeeze(-1).long() for one in packed]


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


def _survivors(stream: Tensor, kept: Tensor, width: int) -> Tensor:
    """(n,) bool: which features of an image stay. A newline stays when its whole row did."""
    alive = kept[stream.clamp(min=0)].clone()
    # The first row begins after the `width` features of the thumbnail; with one crop, that is the only row.
    start = width if int(stream.max()) >= width else 0
    for end in (stream == _NEWLINE).nonzero().squeeze(1).tolist():
        alive[end] = bool(alive[start:end].all())
        start = end + 1
    return alive
