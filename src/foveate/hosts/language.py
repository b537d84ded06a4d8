"""The half that all vision-language adapters share: from the visual features to the language model's output.

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
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from foveate.hosts.host import Host, Record, named, split_read
from foveate.hosts.sequence import Prefill, Remembered, Sequence, deal, reslot, shorten
from foveate.hosts.signals import LanguageSignals
from foveate.hosts.taps import Taps, tap_transformers
from foveate.method import InputError
from foveate.nn.calls import AttentionCall, MlpCall
from foveate.tokens import DROPPED, Tokens, marked, predecessors, put, take

_PREFILL = "foveate_prefill"
"""The attribute of a cache that holds a `Prefill`."""


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """Where everything in one picture's (or clip's) features came from; n features, C crops or frames, M patches each.

    It rides on the features themselves: `generate` encodes pictures once, repeats them for beams and hands them to
    every forward.

    Attributes:
        alive: (n,) bool, False for slots that hold no token any more.
        position: (n, 3) float, (crop, y, x).
        by_patch: (C * M,) long, the feature that carries each source patch, -1 where none does.
        crops: C.
        records: what the methods in the vision encoder did, for the trace.
        marks: name -> (C * M,), what methods noted of each source patch (`Stage.marks`).
    """

    alive: Tensor
    position: Tensor
    by_patch: Tensor
    crops: int
    records: tuple[Record, ...] = ()
    marks: Mapping[str, Tensor] = field(default_factory=dict)

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
    """(B, S) long: 0 for text, k for placeholders of the k-th modality, counted from 1."""
    visual_cpu: Tensor
    """The same where numbers can be read; copied before the encoder begins, when nobody has to wait for it."""
    labels: Tensor | None
    images: dict[str, list[EncodedImage]]
    embeds: Tensor | None = None
    """(B, S, D), what entered the language model."""


class VisionLanguageHost(Host):
    """Base of the adapters of vision-language models.

    A subclass sets `shape`, implements `hook_vision`, which fills `self.encoded` for the current forward, and names
    in `modalities` what the model takes: name in `mm_encoder_outputs` -> (argument with the pixels, config entry with
    the placeholder's id).
    """

    modalities: Mapping[str, tuple[str, str]] = {"image": ("pixel_values", "image_token_id")}

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.inner: Any = self.model.model
        self.config: Any = self.model.config
        self.language: Any = self.inner.language_model
        self.depth = len(self.language.layers)
        self.sequence: Sequence | None = None
        self.full_length = 0
        self.encoded: dict[str, list[EncodedImage]] = {}
        self._taps = Taps("llm")
        self._inputs: _Inputs | None = None
        self._labels: Tensor | None = None
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
        self._given_positions: Tensor | None = None
        self._pruned: frozenset[int] = frozenset()
        self._new = 0
        self._decoded: tuple[Remembered, tuple[Any, Any, Any]] | None = None

    @property
    def language_stages(self) -> tuple[str, ...]:
        return ("llm.layer", "llm.attention", "llm.mlp", "llm.decode")

    # -- what a family has to say

    def hook_vision(self, layers: set[int]) -> None:
        """Hooks the vision half; `layers` are those whose attention is read."""
        raise NotImplementedError

    def grid(self) -> tuple[int, int]:
        """(rows, columns) of source patches of one crop."""
        raise NotImplementedError

    def recall(self, modality: str, encoded: Any) -> list[EncodedImage | None]:
        """The `EncodedImage`s that ride on an encoder output that is handed back to a forward, None where none does."""
        return [getattr(one, "foveate", None) for one in encoded.pooler_output]

    def lengths(self, modality: str, encoded: Any) -> list[int]:
        """How many features each picture of such an output has."""
        return [len(one) for one in encoded.pooler_output]

    # -- hooks

    def hook(self) -> None:
        reads: dict[str, set[int]] = {"vision": set(), "llm": set()}
        for method in dict.fromkeys(self.plan.values()):
            for kind, layer in map(split_read, method.reads(self.shape)):
                reads[kind].add(layer)
        self.pre(self.model, self._note_labels)
        self.pre(self.inner, self._note_inputs)
        self.hook_vision(reads["vision"])
        self.pre(self.language, self._enter_language)
        acting = {stage: self.acting(stage, self.depth) for stage in self.language_stages}
        self._pruned, self._taps.forgets = acting["llm.decode"], self.forgets("llm")
        for index, layer in enumerate(self.language.layers):
            self.pre(layer, self._layer_hook(index, index in acting["llm.layer"]))
            edits = index in acting["llm.attention"]
            if edits or index in reads["llm"]:
                around = functools.partial(self._around_attention, index) if edits else None
                self._taps[index] = tap_transformers(self, layer.self_attn, around)
            if index in acting["llm.mlp"]:
                self.replace(layer.mlp, "forward", functools.partial(self._around_mlp, index, layer.mlp.forward))
        self.post(self.language, self._leave_language)
        # Without the cache every step of generate is a forward over prompt and answer; methods must still decide by
        # the prompt alone. Only generate knows where it ends.
        generate = self.model.generate

        @functools.wraps(generate)
        def noting_the_prompt(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else next((kwargs[k] for k in ("inputs", "input_ids") if k in kwargs), None)
            given = kwargs.get("inputs_embeds") if given is None else given
            past: Prefill | None = getattr(kwargs.get("past_key_values"), _PREFILL, None)
            mask = kwargs.get("attention_mask")
            short = past is not None and not past.layers[0].full
            if short and given is not None and (mask is None or mask.shape[1] <= given.shape[1]):
                # generate would count the new tokens as those that the cache has no entry for.
                raise InputError(
                    "the cache has fewer entries than tokens: give only the new ids, and the mask of all tokens"
                )
            self._prompt = None if given is None else given.shape[1]
            try:
                return generate(*args, **kwargs)
            finally:
                self._prompt = None

        self.replace(self.model, "generate", noting_the_prompt)

    def _note_labels(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._labels = named(module, args, kwargs).get("labels")

    def _note_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = named(module, args, kwargs)
        labels, self._labels = self._labels, None
        self._given_positions = given.get("position_ids")
        self._inputs = self.sequence = None
        outputs = {name: (given.get("mm_encoder_outputs") or {}).get(name) for name in self.modalities}
        fresh = [name for name, (pixels, _) in self.modalities.items() if given.get(pixels) is not None]
        if not fresh and all(one is None for one in outputs.values()):
            return
        ids: Any = given.get("input_ids")
        embeds: Any = given.get("inputs_embeds")
        if self._prompt is not None and (embeds if ids is None else ids).shape[1] < self._prompt:
            raise InputError("a prompt with pictures must be prefilled in one piece; leave prefill_chunk_size out")
        visual = self._placeholders(ids, embeds)
        visual_cpu = visual.cpu()
        if not bool(visual_cpu.any()):
            raise InputError("there is a picture but no image token in the prompt")
        self.encoded = {}
        self._inputs = _Inputs(visual, visual_cpu, labels, self.encoded)
        for name, encoded in outputs.items():
            if encoded is None:
                continue
            images = self.recall(name, encoded)
            if None in images and any(stage.startswith(("vision", "projector")) for stage in self.plan):
                raise InputError("these image features were computed before the method was applied; compute them again")
            self.encoded[name] = [
                image or EncodedImage.unknown(count) for image, count in zip(images, self.lengths(name, encoded))
            ]

    def _placeholders(self, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        """(B, S) long: see `_Inputs.visual`."""
        marked = None
        for number, (_, entry) in enumerate(self.modalities.values(), 1):
            token = getattr(self.config, entry)
            if ids is not None:
                here = ids == token
            else:
                assert embeds is not None
                embedding = self.inner.get_input_embeddings()(torch.tensor(token, device=embeds.device))
                here = (embeds == embedding).all(-1)
            marked = here * number if marked is None else torch.where(here, number, marked)
        assert marked is not None
        return marked

    # -- the language model's entry

    def _visual_tokens(self, embeds: Tensor) -> tuple[Tokens, Tensor, Tensor]:
        """The visual tokens of each sample at the language model's entry, where they stand (B, N), -1 padding, and how
        many of their sources are patches (B,).

        Sources are the patches of all crops of a sample, crop by crop, and after them one entry for every token that
        is no patch (newlines, a class token that the model keeps). `self.marks` are laid out alike.
        """
        assert self._inputs is not None
        visual = self._inputs.visual_cpu
        upcoming = [iter(self._inputs.images.get(name, ())) for name in self.modalities]
        names = {name for images in self._inputs.images.values() for image in images for name in image.marks}
        wheres, spots, sources, counts = [], [], [], []
        marks: dict[str, list[Tensor]] = {name: [] for name in names}
        for b in range(len(visual)):
            places = visual[b].nonzero().squeeze(1)
            mine: list[EncodedImage] = []
            taken = 0
            while taken < len(places):
                mine.append(next(upcoming[int(visual[b, places[taken]]) - 1]))
                taken += len(mine[-1].alive)
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
            counts.append(len(by_patch))
            sources.append(torch.cat([by_patch, patchless.nonzero().squeeze(1)]))
            wheres.append(places[alive])
            spots.append(torch.cat([*position, torch.zeros(0, 3)])[alive])
            for name, rows in marks.items():
                rows.append(torch.cat([torch.zeros(0), *(image.marks[name].float().cpu() for image in mine)]))
        device = embeds.device
        pad = nn.utils.rnn.pad_sequence
        where = pad(wheres, batch_first=True, padding_value=DROPPED)
        source = pad(sources, batch_first=True, padding_value=DROPPED)
        longest = source.shape[1]
        self.marks = {
            name: nn.functional.pad(pad(rows, batch_first=True), (0, longest))[:, :longest].to(device)
            for name, rows in marks.items()
        }
        most = where.shape[1]
        size = torch.zeros(where.shape[0], most + 1, dtype=torch.long)
        size.scatter_add_(1, source % (most + 1), torch.ones_like(source))
        present = None if bool((where >= 0).all()) else (where >= 0).to(device)
        where, source = where.to(device), source.to(device)
        spot = pad(spots, batch_first=True).to(device)
        tokens = Tokens(take(embeds, where), spot, size[:, :most].to(device), source, present)
        return tokens, where, torch.tensor(counts, device=device)

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
            past: Prefill | None = getattr(cache, _PREFILL, None)
            if past is None:
                return None
            self._past, self.memory = past.layers, past.memory
            return (), self._continue(given, cache)
        assert self._inputs is not None
        self._inputs.images = self._inputs.images or self.encoded
        self._inputs.embeds = embeds
        self.trace = [record for images in self._inputs.images.values() for record in images[0].records]
        self.memory = {}
        batch, length = embeds.shape[:2]
        self.full_length = length
        tokens, where, patches = self._visual_tokens(embeds)
        number = torch.arange(length, device=embeds.device).expand(batch, -1)
        positions = given.get("position_ids")
        positions = number if positions is None else positions
        positions = (positions if positions.ndim == 3 else positions.unsqueeze(0)).expand(-1, batch, -1)
        present = torch.ones_like(number, dtype=torch.bool) if mask is None else mask.bool()
        index = torch.where(present, number, DROPPED)
        end = torch.where(present, positions[-3:], -1).amax((0, 2)) + 1
        # Slots that lost their token leave the sequence; so does the padding, which is laid anew.
        dropped = (self._inputs.visual.to(embeds.device) > 0) & ~marked(where, length)
        full, shorter = torch.stack([present.all(), dropped.any()]).tolist()
        whole = Sequence(index, None if full else present, positions, end, tokens, where, patches)
        self.record("llm.input", "", tokens, tokens)
        if not shorter:
            self.sequence = self._entry = whole
            self._shortened = False
            return None
        self._shortened = True
        # A prompt that is shorter from the start is numbered like any other; see Method.renumbers.
        sequence, order = shorten(whole, present & ~dropped, renumber=True)
        sequence = replace(sequence, slots=reslot(order, where, length))
        self.sequence = self._entry = sequence
        given["inputs_embeds"] = take(embeds, order)
        given["attention_mask"] = sequence.seen
        given["position_ids"] = sequence.positions if positions.shape[0] > 1 else sequence.positions[0]
        return (), given

    # -- layers

    def _layer_hook(self, index: int, acts: bool) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if self._past is not None:
                return self._decode_layer(index, args, kwargs)
            if self.sequence is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            if acts:
                changed = self._shrink(index, hidden, kwargs)
                if changed is not None:
                    hidden = changed
            self._ran.append(self.sequence)
            if self._masks is not None:
                mask, embeddings, positions = self._masks
                kwargs = {
                    **kwargs, "attention_mask": mask, "position_embeddings": embeddings, "position_ids": positions
                }  # fmt: skip
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def _shrink(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Lets the method act before layer `index`; returns the new hidden states or None."""
        sequence = self.sequence
        assert sequence is not None and self._entry is not None and self._inputs is not None
        if sequence.tokens.x.shape[1] == 0:
            return None
        tokens = sequence.tokens.with_x(take(hidden, sequence.slots))
        signals = LanguageSignals(self, sequence, hidden, kwargs)
        at = self.stage("llm.layer", index, signals, self._entry.tokens.count, self._active(tokens))
        result = self.run(at, tokens)
        if result is tokens:
            return None
        shorter, order = self._without(sequence, tokens, result, self.plan["llm.layer"].renumbers)
        hidden = take(hidden, order)
        # Features of merged or changed tokens; for kept ones this writes what is there.
        hidden = put(hidden, shorter.slots, result.x)
        # Without features, which would stay in memory.
        self.sequence = replace(shorter, tokens=result.with_x(result.x.detach()[..., :0]))
        self._masks = self._attend(hidden, shorter.valid, shorter.positions, None, 0)
        return hidden

    def _without(self, sequence: Sequence, before: Tokens, after: Tokens, renumber: bool) -> tuple[Sequence, Tensor]:
        """The sequence when its visual tokens have become `after`, and the old slot of each new one.

        A token takes the slot of the first token in it; slots are dealt out in sequence order, so that a method's own
        order of tokens is the order in which the model sees them. Where positions tell row and column, a token stays
        where it was.
        """
        came_from = predecessors(before, after)
        slot = torch.where(came_from >= 0, sequence.slots.gather(1, came_from.clamp(min=0)), DROPPED)
        if len(sequence.positions) == 1:
            slot = deal(slot)
        length = sequence.index.shape[1]
        here, valid = marked(slot, length), sequence.valid
        if after.valid is not None:
            hidden = marked(torch.where(after.valid, DROPPED, slot), length)
            valid = (sequence.seen | here) & ~hidden
        keep = sequence.present & ~sequence.visual | here
        shorter, order = shorten(replace(sequence, valid=valid, tokens=after), keep, renumber)
        return replace(shorter, slots=reslot(order, slot, length)), order

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
        # With several axes, the row before time, row and column is that of the text; layers are given only it.
        axes = len(positions)
        text = positions[0] if axes in (1, 4) else None
        rotary = positions[0] if axes == 1 else positions[-3:]
        return mask, self.language.rotary_emb(hidden, position_ids=rotary), text

    # -- inside a layer

    def _around_attention(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, function: Any
    ) -> Tensor:
        """Lets the method of "llm.attention" make a layer's attention."""
        sequence = self.sequence if self._past is None else self._past[index].sequence
        if sequence is None or sequence.tokens.x.shape[1] == 0:
            output: Tensor = function(query, key, value, mask)
            return output
        assert self._past is not None or self._inputs is not None
        batch, length = len(query), key.shape[2]
        prompt = self._of_prompt(sequence)[:, :length]
        prompt = nn.functional.pad(prompt, (0, length - prompt.shape[1])).expand(batch, -1)
        tokens = sequence.tokens
        call = AttentionCall(
            query, key, value, mask, scaling, tokens, sequence.slots, sequence.patches, prompt, function
        )
        signals = LanguageSignals(self, sequence, None, {})
        at = self.stage("llm.attention", index, signals, tokens.count, tokens.count > 0)
        return self.call(at, call)

    def _around_mlp(self, index: int, function: Any, hidden: Tensor) -> Tensor:
        """Lets the method of "llm.mlp" make a layer's MLP, where there are visual tokens among its inputs."""
        sequence = self.sequence
        if self._past is not None or sequence is None or sequence.tokens.x.shape[1] == 0:
            output: Tensor = function(hidden)
            return output
        call = MlpCall(hidden, self.language.layers[index].mlp, sequence.visual, function)
        signals = LanguageSignals(self, sequence, None, {})
        at = self.stage("llm.mlp", index, signals, sequence.tokens.count, sequence.tokens.count > 0)
        return self.call(at, call)

    def _of_prompt(self, sequence: Sequence) -> Tensor:
        """(B, S) bool: which of a sequence's tokens are the prompt's, where a generated text may follow it."""
        if self._past is not None or self._prompt is None:
            return sequence.present
        return sequence.present & (sequence.index < self._prompt)

    # -- decoding

    def _continue(self, given: dict[str, Any], cache: Cache) -> dict[str, Any]:
        """The first layer's mask and positions for new tokens on top of a shortened cache."""
        assert self._past is not None
        self._new = given["inputs_embeds"].shape[1]
        self._late_mask = given.get("attention_mask")
        self._decoded = None
        self._cache = cache
        past = self._past[0]
        valid, positions = self._extend(past, cache.get_seq_length(0), len(given["inputs_embeds"]))
        given["attention_mask"] = valid
        given["position_ids"] = positions if len(positions) > 1 else positions[0]
        return given

    def _extend(self, past: Remembered, length: int, batch: int) -> tuple[Tensor, Tensor]:
        """(B, length + new) what can be seen and (P, B, new) positions, for tokens after a cache of `length`."""
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
        axes, given = len(past.sequence.positions), self._given_positions
        if axes > 1 and given is not None:
            # With several axes nothing is numbered anew, and what is given (generate does) holds for every layer.
            positions = given if given.ndim == 3 else given.unsqueeze(0)
        else:
            positions = past.start.unsqueeze(1) + after.long().cumsum(1).sub(1).clamp(min=0)
            positions = positions.expand(axes, -1, -1)
        return torch.cat([before.expand(batch, -1), after], 1), positions[..., -self._new :]

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
        self._taps.let_go()
        sequence = self.sequence
        if sequence is None or self._past is not None:
            return None
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            held = self._prune_cache(cache) if "llm.decode" in self.plan else self._ran
            # On the cache itself: it is what the next forward brings back, and copies of it keep it.
            kinds = {one: Remembered.of(one, self.full_length) for one in dict.fromkeys(held)}
            setattr(cache, _PREFILL, Prefill([kinds[one] for one in held], self.memory))
        if sequence is not self._entry or self._shortened:
            output["last_hidden_state"] = take(output.last_hidden_state, self._places(sequence))
        self._inputs = self._entry = self.sequence = self._masks = None
        self._ran = []
        return output

    def _prune_cache(self, cache: Any) -> list[Sequence]:
        """Lets the method of "llm.decode" drop entries of each layer's cache; returns what each layer holds then."""
        assert self._entry is not None
        method, held = self.plan["llm.decode"], []
        for index, sequence in enumerate(self._ran):
            tokens = sequence.tokens.with_x(sequence.tokens.x.detach()[..., :0])
            result = tokens
            if tokens.x.shape[1] and index in self._pruned:
                signals = LanguageSignals(self, sequence, None, {})
                at = self.stage("llm.decode", index, signals, self._entry.tokens.count, tokens.count > 0)
                result = self.run(at, tokens)
            if result is tokens:
                held.append(sequence)
                continue
            shorter, order = self._without(sequence, tokens, result, method.renumbers)
            layer = cache.layers[index]
            if not isinstance(getattr(layer, "keys", None), Tensor) or layer.keys.shape[2] != sequence.index.shape[1]:
                raise InputError(f"{method.card.slug} drops cache entries; a {type(layer).__name__} cannot lose any")
            rows = order.clamp(min=0)[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys = layer.keys.gather(2, rows)
            layer.values = layer.values.gather(2, rows[..., :1].expand(-1, -1, -1, layer.values.shape[3]))
            held.append(shorter)
        return held

    def _places(self, sequence: Sequence) -> Tensor:
        """(B, full length): for each position the user gave, the token there or the last before it; else the first."""
        batch, length = sequence.index.shape
        target = torch.where(sequence.present, sequence.index, self.full_length)
        place = target.new_full((batch, self.full_length + 1), -1)
        place.scatter_(1, target, torch.arange(length, device=target.device).expand(batch, -1))
        first = sequence.present.long().argmax(1, keepdim=True)
        return place[:, :-1].cummax(1).values.maximum(first)
