"""LLaVA-1.5 and LLaVA-NeXT of transformers: vision tower, projector, language model.

How a shorter sequence gets through unmodified model code:

* Up to the projector, tokens are really fewer. After it they are put back on as many slots as the model expects,
  zeros between them, so that its check of image tokens against image features holds.
* At the language model's entry the empty slots leave the sequence. From there on hidden states, positions, masks and
  cache entries are those of the tokens that are left; a layer where tokens were dropped has a shorter cache.
* The language model's output gets its full length back: a dropped position repeats the last token before it that is
  left, which is the one whose prediction comes next. So logits and labels keep their shapes.
"""

from __future__ import annotations

import functools
import inspect
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from foveate.hosts.host import Host, Record, named
from foveate.hosts.taps import Tap, tap_transformers
from foveate.hosts.vision import Encoder, VisionSignals, predecessors, split_read
from foveate.method import HostShape, InputError
from foveate.nn.attention import Attention, attention_rows
from foveate.tokens import DROPPED, Tokens, compact

_MEMORY = "foveate_prefill"
"""The attribute of a cache that holds a `Remembered` for each layer."""

_NEWLINE = -1
"""In a stream of slot numbers: LLaVA-NeXT's end-of-row token, which belongs to no patch."""


@dataclass(frozen=True, eq=False)
class Sequence:
    """The language model's sequence at some depth, S tokens of B samples.

    Attributes:
        index: (B, S) long, where each token stood in the sequence that the user gave; -1 for padding.
        valid: (B, S) bool, False for padding and for tokens hidden from attention; None if all can be seen.
        positions: (B, S) long position ids.
        tokens: the visual tokens among them.
        slots: (B, N) long, where each visual token stands in the sequence; -1 for padding.
    """

    index: Tensor
    valid: Tensor | None
    positions: Tensor
    tokens: Tokens
    slots: Tensor

    @property
    def present(self) -> Tensor:
        return self.index >= 0


@dataclass(frozen=True, eq=False)
class Remembered:
    """What decoding must know of the prefill of one layer.

    A prompt ends with text, whose tokens have consecutive positions and of which the user's mask knows as much as we
    do. So only what is before that text has to be remembered, and the cache may be cropped within it.

    Attributes:
        valid: (B, head) bool, which of the entries before the closing text can be seen; None for all.
        head: how many these are.
        start: (B,) long, the position of the entry after them.
        full: whether the layer holds an entry for every token of the prompt.
    """

    valid: Tensor | None
    head: int
    start: Tensor
    full: bool

    @classmethod
    def of(cls, sequence: Sequence, full_length: int) -> Remembered:
        length = sequence.index.shape[1]
        # Where the closing text cannot have begun yet: padding, visual tokens, and whatever a gap in positions follows.
        ahead = ~sequence.present
        filled = sequence.slots >= 0
        ahead[filled.nonzero(as_tuple=True)[0], sequence.slots[filled]] = True
        ahead[:, :-1] |= sequence.positions.diff() != 1
        number = torch.arange(1, length + 1, device=ahead.device)
        head = int((ahead * number).max())
        if head < length:
            start = sequence.positions[:, head]
        else:
            start = torch.where(sequence.present, sequence.positions, -1).amax(1) + 1
        valid = None if sequence.valid is None else sequence.valid[:, :head]
        return cls(valid, head, start, length == full_length)


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """Where everything in one image's features came from; n features, C crops, M patches a crop.

    It rides on the feature tensor itself: `generate` encodes pictures once, repeats them for beams and hands them to
    every forward.

    Attributes:
        alive: (n,) bool, False for slots that hold no token any more.
        position: (n, 3) float, (crop, y, x).
        by_patch: (C * M,) long, the feature that carries each source patch, -1 where none does.
        crops: C.
        records: what the methods in the vision encoder did, for the trace.
    """

    alive: Tensor
    position: Tensor
    by_patch: Tensor
    crops: int
    records: tuple[Record, ...] = ()

    @classmethod
    def unknown(cls, count: int) -> EncodedImage:
        """For features that were computed before methods were applied: every feature is its own source."""
        number = torch.arange(count)
        position = torch.stack([0 * number, 0 * number, number], 1).float()
        return cls(torch.ones(count, dtype=torch.bool), position, number, 1)


@dataclass(eq=False)
class _Inputs:
    """What the user passed to the current forward."""

    visual: Tensor
    """(B, S) bool, the image placeholders."""
    labels: Tensor | None
    images: list[EncodedImage]
    embeds: Tensor | None = None
    """(B, S, D), what entered the language model."""


class LlavaHost(Host):
    """`LlavaForConditionalGeneration` and `LlavaNextForConditionalGeneration`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.inner: Any = self.model.model
        self.config: Any = self.model.config
        self.encoder = Encoder(self, self.inner.vision_tower)
        self.language: Any = self.inner.language_model
        self.depth = len(self.language.layers)
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
            stages=(*self.encoder.stages, "projector", "llm.layer"),
            vision_layers=self.encoder.layers,
            feature_layer=max(used),
            prefix=self.encoder.prefix,
            grid=self.encoder.native,
            llm_layers=self.depth,
            class_token=self.encoder.class_token,
        )
        self.crops: Tokens | None = None
        self.sequence: Sequence | None = None
        self.full_length = 0
        self._taps: dict[int, Tap] = {}
        self._inputs: _Inputs | None = None
        self._labels: Tensor | None = None
        # From the projector to the language model.
        self._seen_slots: Tensor | None = None
        self._slots: Tensor | None = None
        self._images: list[EncodedImage] = []
        # A prefill: the length of the prompt if generate runs, what entered, what each layer so far ran on, and the
        # mask, rotary embeddings and positions of the current sequence where it differs from the model's own.
        self._prompt: int | None = None
        self._entry: Sequence | None = None
        self._ran: list[Sequence] = []
        self._shortened = False
        self._masks: tuple[Any, Any, Any] | None = None
        # A forward on top of a cache.
        self._past: list[Remembered] | None = None
        self._cache: Any = None
        self._late_mask: Tensor | None = None
        self._new = 0
        self._decoded: tuple[Remembered, tuple[Any, Any, Any]] | None = None

    # -- hooks

    def hook(self) -> None:
        reads: dict[str, set[int]] = {"vision": set(), "llm": set()}
        for method in dict.fromkeys(self.plan.values()):
            for kind, layer in map(split_read, method.reads(self.shape)):
                reads[kind].add(layer)
        self.pre(self.model, self._note_labels)
        self.pre(self.inner, self._note_inputs)
        if self._several_layers and "vision.layer" in self.plan:
            raise InputError(
                f"{self.plan['vision.layer'].card.slug} changes the number of tokens between encoder layers; this "
                f"model joins the features of several, {self.config.vision_feature_layer}"
            )
        if reads["vision"] or any(stage.startswith("vision") or stage == "projector" for stage in self.plan):
            self.encoder.hook(reads["vision"])
            self.pre(self.inner.multi_modal_projector, self._before_projector)
            self.post(self.inner.multi_modal_projector, self._after_projector)
        self.pre(self.language, self._enter_language)
        for index, layer in enumerate(self.language.layers):
            self.pre(layer, self._layer_hook(index))
        for index in sorted(reads["llm"]):
            self._taps[index] = tap_transformers(self, self.language.layers[index].self_attn)
        self.post(self.language, self._leave_language)
        # Without the cache every step of generate is a forward over prompt and answer; methods must still decide by
        # the prompt alone. Only generate knows where it ends.
        generate = self.model.generate

        @functools.wraps(generate)
        def noting_the_prompt(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else next((kwargs[k] for k in ("inputs", "input_ids") if k in kwargs), None)
            given = kwargs.get("inputs_embeds") if given is None else given
            past = getattr(kwargs.get("past_key_values"), _MEMORY, None)
            mask = kwargs.get("attention_mask")
            if past and not past[0].full and given is not None and (mask is None or mask.shape[1] <= given.shape[1]):
                # generate would count the new tokens as those that the cache has no entry for.
                raise InputError(
                    "the cache has fewer entries than tokens: give only the new ids, and the mask of all tokens"
                )
            self._prompt = None if given is None else given.shape[1]
            try:
                return generate(*args, **kwargs)
            finally:
                self._prompt = None

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
            output = encode(*args, **kwargs)
            features = output.pooler_output if hasattr(output, "pooler_output") else output[1]
            self._images = self._provenance(features, sizes)
            for one, image in zip(features, self._images):
                one.foveate = image
            return output

        self.replace(self.model, "generate", noting_the_prompt)
        self.replace(self.inner, "get_image_features", noting_provenance)

    def _note_labels(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._labels = named(module, args, kwargs).get("labels")

    def _note_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = named(module, args, kwargs)
        labels, self._labels = self._labels, None
        self._inputs = self.sequence = None
        encoded = (given.get("mm_encoder_outputs") or {}).get("image")
        if given.get("pixel_values") is None and encoded is None:
            return
        ids: Any = given.get("input_ids")
        embeds: Any = given.get("inputs_embeds")
        if self._prompt is not None and (embeds if ids is None else ids).shape[1] < self._prompt:
            raise InputError("a prompt with pictures must be prefilled in one piece; leave prefill_chunk_size out")
        if embeds is None:
            visual = ids == self.config.image_token_id
        else:
            token = torch.tensor(self.config.image_token_id, device=embeds.device)
            visual = (embeds == self.inner.get_input_embeddings()(token)).all(-1)
        if not bool(visual.any()):
            raise InputError("there is a picture but no image token in the prompt")
        self._images = []
        if encoded is not None:
            images = [getattr(one, "foveate", None) for one in encoded.pooler_output]
            if None in images and any(stage.startswith(("vision", "projector")) for stage in self.plan):
                raise InputError("these image features were computed before the method was applied; compute them again")
            self._images = [
                image or EncodedImage.unknown(len(one)) for image, one in zip(images, encoded.pooler_output)
            ]
        self._inputs = _Inputs(visual, labels, self._images)

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
            active = torch.ones_like(entered, dtype=torch.bool)
            signals = VisionSignals(self.encoder, tokens)
            tokens = self.run("projector", -1, tokens, signals, entered, active)
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
            images.append(EncodedImage(alive, where, owner.reshape(-1), count, records))
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

    # -- the language model's entry

    def _visual_tokens(self, embeds: Tensor) -> tuple[Tokens, Tensor]:
        """The visual tokens of each sample at the language model's entry, and where they stand (B, N), -1 padding.

        Sources are the patches of all crops of a sample, crop by crop, and after them one entry for every token that
        is no patch (newlines, a class token that the model keeps).
        """
        assert self._inputs is not None
        visual = self._inputs.visual.cpu()
        images = iter(self._inputs.images)
        wheres, spots, sources = [], [], []
        for b, wanted in enumerate(visual.sum(1).tolist()):
            mine: list[EncodedImage] = []
            while sum(len(image.alive) for image in mine) < wanted:
                mine.append(next(images))
            alive = torch.cat([image.alive for image in mine] or [torch.zeros(0, dtype=torch.bool)])
            token = torch.where(alive, alive.long().cumsum(0) - 1, DROPPED)
            patches, position, start, crop = [], [], 0, 0
            for image in mine:
                patches.append(torch.where(image.by_patch >= 0, image.by_patch + start, DROPPED))
                position.append(image.position + torch.tensor([float(crop), 0.0, 0.0]))
                start, crop = start + len(image.alive), crop + image.crops
            held = torch.cat([*patches, torch.zeros(0, dtype=torch.long)])
            by_patch = torch.where(held >= 0, token[held.clamp(min=0)] if len(token) else held, DROPPED)
            patchless = torch.ones(int(alive.sum()), dtype=torch.bool)
            patchless[by_patch[by_patch >= 0]] = False
            sources.append(torch.cat([by_patch, patchless.nonzero().squeeze(1)]))
            wheres.append(visual[b].nonzero().squeeze(1)[alive])
            spots.append(torch.cat([*position, torch.zeros(0, 3)])[alive])
        device = embeds.device
        pad = nn.utils.rnn.pad_sequence
        where = pad(wheres, batch_first=True, padding_value=DROPPED).to(device)
        source = pad(sources, batch_first=True, padding_value=DROPPED).to(device)
        most = where.shape[1]
        size = torch.zeros(where.shape[0], most + 1, dtype=torch.long, device=device)
        size.scatter_add_(1, source % (most + 1), torch.ones_like(source))
        present = where >= 0
        tokens = Tokens(
            _take(embeds, where), pad(spots, batch_first=True).to(device), size[:, :most], source,
            None if bool(present.all()) else present,
        )  # fmt: skip
        return tokens, where

    def _enter_language(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = named(module, args, kwargs)
        embeds, cache = given["inputs_embeds"], given.get("past_key_values")
        seen = 0 if cache is None else cache.get_seq_length()
        self._past = self.sequence = self._entry = self._masks = None
        self._ran = []
        if self._inputs is None and not seen:
            return None
        if cache is not None and getattr(cache, "is_compileable", False):
            raise InputError(
                "a static cache has one length for all layers and cannot go with fewer tokens; use the default"
            )
        mask = given.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise InputError("a custom 4-D attention mask cannot go with fewer tokens; use a 2-D mask")
        if cache is not None and seen:
            if self._inputs is not None:
                raise InputError("pictures must come in the first forward of a cache; this one holds text already")
            self._past = getattr(cache, _MEMORY, None)
            return None if self._past is None else ((), self._continue(given, cache))
        assert self._inputs is not None
        self._inputs.images = self._inputs.images or self._images
        self._inputs.embeds = embeds
        self.trace = list(self._inputs.images[0].records)
        batch, length = embeds.shape[:2]
        self.full_length = length
        tokens, where = self._visual_tokens(embeds)
        number = torch.arange(length, device=embeds.device).expand(batch, -1)
        positions = given.get("position_ids")
        positions = number if positions is None else positions.expand(batch, -1)
        present = torch.ones_like(number, dtype=torch.bool) if mask is None else mask.bool()
        index = torch.where(present, number, DROPPED)
        whole = Sequence(index, None if bool(present.all()) else present, positions, tokens, where)
        # Slots that lost their token leave the sequence; so does the padding, which is laid anew.
        gone = self._inputs.visual.to(embeds.device)
        keep_slot = torch.zeros_like(gone)
        filled = where >= 0
        keep_slot[filled.nonzero(as_tuple=True)[0], where[filled]] = True
        dropped = gone & ~keep_slot
        self.record("llm.input", "", tokens, tokens)
        if not bool(dropped.any()):
            self.sequence = self._entry = whole
            self._shortened = False
            return None
        self._shortened = True
        # A prompt that is shorter from the start is numbered like any other; see Method.renumbers.
        sequence, order = shorten(whole, present & ~dropped, renumber=True)
        sequence = replace(sequence, slots=_reslot(order, where))
        self.sequence = self._entry = sequence
        given["inputs_embeds"] = _take(embeds, order)
        given["attention_mask"] = sequence.present if sequence.valid is None else sequence.valid
        given["position_ids"] = sequence.positions
        return (), given

    # -- layers

    def _layer_hook(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if self._past is not None:
                return self._decode_layer(index, args, kwargs)
            if self.sequence is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            if "llm.layer" in self.plan:
                changed = self._shrink(index, module, hidden, kwargs)
                if changed is not None:
                    hidden = changed
            self._ran.append(self.sequence)
            kwargs = dict(kwargs)
            if self._masks is not None:
                mask, embeddings, positions = self._masks
                kwargs.update(attention_mask=mask, position_embeddings=embeddings, position_ids=positions)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def _shrink(self, index: int, module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Lets the method act before layer `index`; returns the new hidden states or None."""
        sequence = self.sequence
        assert sequence is not None and self._entry is not None and self._inputs is not None
        if sequence.tokens.x.shape[1] == 0:
            return None
        slots = sequence.slots.clamp(min=0)
        tokens = sequence.tokens.with_x(_take(hidden, slots))
        signals = LanguageSignals(self, sequence, hidden, kwargs)
        active = self._active(tokens)
        result = self.run("llm.layer", index, tokens, signals, self._entry.tokens.count, active)
        if result is tokens:
            return None
        # A token takes the slot of the first token in it; slots are dealt out in sequence order, so that a method's
        # own order of tokens is the order in which the model sees them.
        came_from = predecessors(tokens, result)
        slot = torch.where(came_from >= 0, sequence.slots.gather(1, came_from.clamp(min=0)), DROPPED)
        slot = _deal(slot)
        keep = sequence.present.clone()
        old = sequence.slots
        filled = old >= 0
        keep[filled.nonzero(as_tuple=True)[0], old[filled]] = False
        filled = slot >= 0
        rows = filled.nonzero(as_tuple=True)[0]
        keep[rows, slot[filled]] = True
        seen = sequence.present if sequence.valid is None else sequence.valid
        if result.valid is not None:
            seen = seen.clone()
            seen[rows, slot[filled]] = result.valid[filled]
        method = self.plan["llm.layer"]
        shorter, order = shorten(replace(sequence, valid=seen, tokens=result), keep, method.renumbers)
        shorter = replace(shorter, slots=_reslot(order, slot))
        hidden = _take(hidden, order)
        # Features of merged or changed tokens; for kept ones this writes what is there.
        target = torch.where(shorter.slots >= 0, shorter.slots, hidden.shape[1])
        padded = torch.cat([hidden, hidden.new_zeros(hidden.shape[0], 1, hidden.shape[2])], 1)
        hidden = padded.scatter(1, target.unsqueeze(-1).expand_as(result.x), result.x.to(hidden.dtype))[:, :-1]
        # Without features, which would stay in memory.
        self.sequence = replace(shorter, tokens=result.with_x(result.x.detach()[..., :0]))
        self._masks = self._attend(hidden, shorter.valid, shorter.positions, None, 0)
        return hidden

    def _active(self, tokens: Tokens) -> Tensor:
        """(B,) bool: samples without a picture are left alone; in training, also those without a supervised answer."""
        assert self._inputs is not None
        active = tokens.count > 0
        labels = self._inputs.labels
        return active if labels is None else active & self.answer_starts().any(1)

    def answer_starts(self) -> Tensor:
        """(B, S) bool in the user's sequence: positions right before a supervised span."""
        assert self._inputs is not None and self._inputs.labels is not None
        supervised = self._inputs.labels != -100
        starts = torch.zeros_like(supervised)
        starts[:, :-1] = supervised[:, 1:] & ~supervised[:, :-1]
        return starts

    def _attend(
        self, hidden: Tensor, valid: Tensor | None, positions: Tensor, cache: Cache | None, layer: int
    ) -> tuple[Any, Any, Any]:
        """The mask, rotary embeddings and position ids of a layer, made by the model's own functions."""
        if "sliding_attention" in (getattr(self.language.config, "layer_types", None) or ()):
            raise InputError("language models with sliding-window attention are not supported inside their layers")
        mask = create_causal_mask(
            config=self.language.config, inputs_embeds=hidden, attention_mask=valid, past_key_values=cache,
            layer_idx=layer,
        )  # fmt: skip
        return mask, self.language.rotary_emb(hidden, position_ids=positions), positions

    # -- decoding

    def _continue(self, given: dict[str, Any], cache: Cache) -> dict[str, Any]:
        """The first layer's mask and positions for new tokens on top of a shortened cache."""
        assert self._past is not None
        self._new = given["inputs_embeds"].shape[1]
        self._late_mask = given.get("attention_mask")
        self._decoded = None
        self._cache = cache
        valid, positions = self._extend(self._past[0], cache.get_seq_length(0), len(given["inputs_embeds"]))
        given["attention_mask"], given["position_ids"] = valid, positions
        return given

    def _extend(self, past: Remembered, length: int, batch: int) -> tuple[Tensor, Tensor]:
        """(B, length + new) what can be seen and (B, new) positions, for tokens after a cache of `length`."""
        if length < past.head:
            raise InputError("the cache was cropped back into the picture; only the text after it can be taken back")
        if len(past.start) not in (1, batch):
            raise InputError(f"the cache was filled with {len(past.start)} samples, not {batch}")
        device = past.start.device
        late = length - past.head + self._new
        mask = self._late_mask
        if mask is not None and mask.shape[1] < late:
            raise InputError("the attention mask must cover the tokens in the cache too, not only the new ones")
        after = torch.ones(batch, late, dtype=torch.bool, device=device)
        if mask is not None:
            after = mask[:, mask.shape[1] - late :].bool().to(device)
        before = torch.ones(1, past.head, dtype=torch.bool, device=device) if past.valid is None else past.valid
        positions = past.start.unsqueeze(1) + after.long().cumsum(1).sub(1).clamp(min=0)
        return torch.cat([before.expand(batch, -1), after], 1), positions[:, -self._new :]

    def _decode_layer(self, index: int, args: Any, kwargs: Any) -> Any:
        assert self._past is not None
        past = self._past[index]
        if past is self._past[0]:
            return None
        if self._decoded is None or self._decoded[0] is not past:
            hidden = args[0] if args else kwargs["hidden_states"]
            valid, positions = self._extend(past, self._cache.get_seq_length(index), len(hidden))
            self._decoded = past, self._attend(hidden, valid, positions, self._cache, index)
        mask, embeddings, positions = self._decoded[1]
        changed = {"attention_mask": mask, "position_embeddings": embeddings, "position_ids": positions}
        return args, {**kwargs, **changed}

    # -- the language model's output

    def _leave_language(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        for tap in self._taps.values():
            tap.clear()
        sequence = self.sequence
        if sequence is None or self._past is not None:
            return None
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            # On the cache itself: it is what the next forward brings back, and copies of it keep it.
            kinds = {id(one): Remembered.of(one, self.full_length) for one in self._ran}
            setattr(cache, _MEMORY, [kinds[id(one)] for one in self._ran])
        if sequence is not self._entry or self._shortened:
            output["last_hidden_state"] = _take(output.last_hidden_state, self._places(sequence))
        self._inputs = self._entry = self.sequence = self._masks = None
        self._ran = []
        return output

    def _places(self, sequence: Sequence) -> Tensor:
        """(B, full length): for each position the user gave, the token there or the last before it; else the first."""
        batch, length = sequence.index.shape
        target = torch.where(sequence.present, sequence.index, self.full_length)
        place = target.new_full((batch, self.full_length + 1), -1)
        place.scatter_(1, target, torch.arange(length, device=target.device).expand(batch, -1))
        first = sequence.present.long().argmax(1, keepdim=True)
        return place[:, :-1].cummax(1).values.maximum(first)


class LanguageSignals:
    """The signals of the language model (see `foveate.method.Signals`)."""

    def __init__(self, host: LlavaHost, sequence: Sequence, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        self._host, self._sequence, self._hidden, self._kwargs = host, sequence, hidden, kwargs

    def attention(self, layer: int) -> Attention:
        """The attention of a layer that has run, restricted to the prompt when a generated text follows it."""
        host, sequence = self._host, self._sequence
        if layer not in host._taps:
            raise RuntimeError(f"name 'llm.attention[{layer}]' in Method.reads to look at it")
        query, key, scaling = host._taps[layer].read()
        generated = 0 if host._prompt is None else host.full_length - host._prompt
        length = query.shape[2] - generated
        # Tokens may have been dropped since: look each up by the patch that it carries.
        then = host._ran[layer]
        visual = then.slots.gather(1, predecessors(then.tokens, sequence.tokens).clamp(min=0)).clamp(min=0)
        valid = None if then.valid is None else then.valid[:, :length]
        return Attention(
            query[:, :, :length], key[:, :, :length], scaling, True, valid, then.present[:, :length], visual
        )

    @torch.no_grad()
    def text_to_vision(self, layer: int) -> Tensor:
        host, sequence = self._host, self._sequence
        block = host.language.layers[layer]
        attention = block.self_attn
        normed = block.input_layernorm(self._hidden.detach())
        queries, weight = self._queries()
        _, embeddings, _ = self._rotary()
        cos, sin = embeddings
        key = _heads(attention.k_proj(normed), attention.head_dim)
        query = _heads(attention.q_proj(_take(normed, queries)), attention.head_dim)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        at = [one.expand(key.shape[0], -1, -1) for one in (cos, sin)]
        query = _rotate(attention, query, *(_take(one, queries) for one in at))
        key = _rotate(attention, key, *at)
        rows = attention_rows(query, key, queries, attention.scaling, True, sequence.valid)
        score = (rows.mean(1) * weight.unsqueeze(-1)).sum(1)
        return score.gather(1, sequence.slots.clamp(min=0))

    def _rotary(self) -> tuple[Any, Any, Any]:
        host = self._host
        if host._masks is not None:
            return host._masks
        return None, self._kwargs["position_embeddings"], None

    def _queries(self) -> tuple[Tensor, Tensor]:
        """(B, R) slots of the asking tokens and (B, R) their weights, which sum to 1."""
        host, sequence = self._host, self._sequence
        index = sequence.index
        assert host._inputs is not None
        if host._inputs.labels is not None:
            starts = host.answer_starts().to(index.device)
            asked = starts.gather(1, index.clamp(min=0)) & sequence.present
            slots = compact(asked)
            if slots.shape[1]:
                weight = (slots >= 0).float()
                return slots.clamp(min=0), weight / weight.sum(1, keepdim=True).clamp(min=1)
        visible = sequence.present if sequence.valid is None else sequence.valid
        if host._prompt is not None:
            visible = visible & (index < host._prompt)
        number = torch.arange(index.shape[1], device=index.device)
        last = torch.where(visible, number, -1).amax(1, keepdim=True).clamp(min=0)
        return last, torch.ones_like(last, dtype=torch.float32)

    def text_embeddings(self) -> Tensor:
        host, sequence = self._host, self._sequence
        assert host._inputs is not None and host._inputs.embeds is not None
        index = sequence.index
        visual = host._inputs.visual.to(index.device).gather(1, index.clamp(min=0))
        is_text = sequence.present & ~visual
        if host._prompt is not None:
            is_text &= index < host._prompt
        slots = compact(is_text)
        chosen = torch.where(slots >= 0, index.gather(1, slots.clamp(min=0)), DROPPED)
        return _take(host._inputs.embeds.detach(), chosen) * (chosen >= 0).unsqueeze(-1)

    def cls_attention(self, layer: int) -> Tensor:
        raise InputError("cls_attention is a signal of vision encoders; this stage is in the language model")

    def keys(self, layer: int) -> Tensor:
        raise InputError("keys is a signal of vision encoders; this stage is in the language model")

    def grid(self) -> tuple[int, int]:
        return self._host.encoder.source_grid


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
    return _deal(slot)


def shorten(sequence: Sequence, keep: Tensor, renumber: bool) -> tuple[Sequence, Tensor]:
    """The sequence with only the slots in `keep` (B, S) bool, padded on the left, and the old slot of each new one."""
    chosen = compact(keep)
    padding = (chosen < 0).sum(1)
    if bool((padding > 0).any()):
        # compact pads on the right; the newest token must stay last
        width = chosen.shape[1]
        column = (torch.arange(width, device=keep.device) - padding.unsqueeze(1)) % width
        chosen = chosen.gather(1, column)
    filled = chosen.clamp(min=0)
    present = chosen >= 0
    index = torch.where(present, sequence.index.gather(1, filled), DROPPED)
    valid = present if sequence.valid is None else present & sequence.valid.gather(1, filled)
    if renumber:
        positions = present.long().cumsum(1).sub(1).clamp(min=0)
    else:
        positions = sequence.positions.gather(1, filled) * present
    whole = None if bool(valid.all()) else valid
    return replace(sequence, index=index, valid=whole, positions=positions), chosen


def _survivors(stream: Tensor, kept: Tensor, width: int) -> Tensor:
    """(n,) bool: which features of an image stay. A newline stays when its whole row did."""
    alive = kept[stream.clamp(min=0)].clone()
    # The first row begins after the `width` features of the thumbnail; with one crop, that is the only row.
    start = width if int(stream.max()) >= width else 0
    for end in (stream == _NEWLINE).nonzero().squeeze(1).tolist():
        alive[end] = bool(alive[start:end].all())
        start = end + 1
    return alive


def _deal(slot: Tensor) -> Tensor:
    """The same slots of each sample, handed to its tokens in ascending order; -1 stays."""
    present = slot >= 0
    big = torch.iinfo(slot.dtype).max
    ascending = torch.where(present, slot, big).sort(1).values
    rank = present.long().cumsum(1).sub(1).clamp(min=0)
    return torch.where(present, ascending.gather(1, rank), DROPPED)


def _reslot(order: Tensor, slots: Tensor) -> Tensor:
    """Where old slots (B, N) stand in a sequence whose new slot k was old slot `order[b, k]`."""
    batch, length = order.shape
    longest = int(torch.cat([order, slots], 1).max()) + 1
    new = order.new_full((batch, longest + 1), DROPPED)
    new.scatter_(
        1, torch.where(order >= 0, order, longest), torch.arange(length, device=order.device).expand(batch, -1)
    )
    new[:, -1] = DROPPED
    return new.gather(1, torch.where(slots >= 0, slots, longest))


def _take(states: Tensor, index: Tensor) -> Tensor:
    """(B, K, D): rows `index` (B, K) of `states` (B, S, D); -1 takes row 0."""
    return states.gather(1, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, states.shape[2]))


def _heads(projected: Tensor, head_dim: int) -> Tensor:
    return projected.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _rotate(attention: nn.Module, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position encoding of (B, H, S, D) with cos, sin (B, S, D), by the function of the model's own file."""
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    rotated: Tensor = rotate(states, states, cos, sin)[0]
    return rotated
