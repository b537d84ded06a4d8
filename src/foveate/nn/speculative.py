"""What decoders share that judge several tokens in one pass: a cache whose rows grow by different numbers of tokens,
the rows themselves, the distributions of a whole window or tree, and the tests of speculative sampling.

A decoder is handed to transformers as `model.generate(ids, custom_generate=decoder, ...)`. `Decoding` is one such call.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from foveate.method import InputError

_BLIND = (
    EpsilonLogitsWarper, EtaLogitsWarper, InfNanRemoveLogitsProcessor, LogitNormalization, MinPLogitsWarper,
    SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper,
)  # fmt: skip
"""Processors that do not look at the ids before a token, so that they take all tokens of a window at once."""

_ABSENT = -1
"""Token id of what a path does not have."""


@dataclass
class DecodeReport:
    """What decoding took.

    Attributes:
        calls: forward passes of the model, that of the prompt included; with guidance, both branches are one pass.
        draft_calls: forward passes of the draft model.
        emitted: for each pass but the first, (B,) long, tokens that each row gained; 0 where the row had ended.
    """

    calls: int = 0
    draft_calls: int = 0
    emitted: list[Tensor] = field(default_factory=list)

    @property
    def mean_emitted(self) -> float:
        """Tokens that a pass adds to a row that has not ended; NaN where one pass was enough."""
        gained = torch.stack(self.emitted) if self.emitted else torch.zeros(0)
        return float(gained[gained > 0].double().mean())


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a model takes in first: ids and mask (B, S), padded on the left, and other arguments of its forward."""

    ids: Tensor
    mask: Tensor
    inputs: Mapping[str, Any] = field(default_factory=dict)


class CachedModel:
    """A causal model and its cache, for rows that keep different numbers of tokens of a pass.

    Behind a pass every row holds as many new entries; `keep` says which stay. Entries of each row are then moved to the
    right end, as left padding is, so that the next pass has one shape again and nothing that was accepted is lost.

    Args:
        model: a causal language model of transformers, whose cache holds keys and values of every token.
        prompts: one, or two with guidance: the second is what it leads away from, the other half of a doubled batch.
        room: tokens that will be generated at most.
        keep_features: whether `features` are read.

    Attributes:
        features: (branches B, L, C) what the head made the last pass's logits of, for all tokens of that pass.
    """

    features: Tensor

    def __init__(self, model: Any, prompts: Sequence[Prompt], room: int, keep_features: bool = False) -> None:
        self.model, self.prompts, self.branches = model, prompts, len(prompts)
        self._width = max(one.mask.shape[1] for one in prompts)
        self.mask = torch.cat([F.pad(one.mask.bool(), (self._width - one.mask.shape[1], 0)) for one in prompts])
        self.count = self.mask.sum(1)
        self._last_position = (self.count + room - 1).clamp(min=0).unsqueeze(1)
        self.pending = 0
        self.cache = DynamicCache()
        self._settings: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if keep_features:
            self._settings["output_hidden_states"] = True
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def prefill(self) -> Tensor:
        """(branches B, 1, V) logits of the token after the prompt."""
        outputs, caches = [], []
        for one in self.prompts:
            extra = dict(one.inputs, logits_to_keep=1) if self._keeps_logits else one.inputs
            caches.append(DynamicCache())
            mask = one.mask.long()
            outputs.append(
                self.model(
                    input_ids=one.ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                    past_key_values=caches[-1], **extra, **self._settings,
                )
            )  # fmt: skip
        self.cache = caches[0]
        if self.branches > 1:
            for layers in zip(*(cache.layers for cache in caches)):
                for name in ("keys", "values"):
                    setattr(layers[0], name, self._joined([getattr(layer, name) for layer in layers]))
        if "output_hidden_states" in self._settings:
            self.features = self._joined([output.hidden_states[-1] for output in outputs])
        return torch.cat([output.logits[:, -1:] for output in outputs])

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """Of the branches, (B, ..., S, C) each, the shorter ones padded on the left."""
        return torch.cat([F.pad(part, (0, 0, self._width - part.shape[-2], 0)) for part in parts])

    def score(self, tokens: Tensor, depth: Tensor, visible: Tensor | None = None, **inputs: Any) -> Tensor:
        """(branches B, L, V) logits behind tokens (B, L), whose keys and values become pending entries of the cache.

        Args:
            depth: (L,) or (B, L), places after the last entry that was kept, from 0.
            visible: (B, L, P + L) bool, which of the P pending entries and the L new ones each token attends to
                besides all that were kept; without it all before it and itself.
            inputs: other arguments of the forward, of all branches.
        """
        batch, length = tokens.shape
        positions = self.count.unsqueeze(1) + self.doubled(depth.expand(batch, length))
        # What lies beyond the last token is never used, but must not lie beyond the model's last position either.
        positions = positions.minimum(self._last_position)
        if visible is None:
            mask = F.pad(self.mask, (0, self.pending + length), value=True).long()
        else:
            seen = torch.cat([self.mask.unsqueeze(1).expand(-1, length, -1), self.doubled(visible)], 2)
            dtype = self.model.dtype
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            mask = mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)
        output = self.model(
            input_ids=self.doubled(tokens), attention_mask=mask, position_ids=positions, past_key_values=self.cache,
            **inputs, **self._settings,
        )  # fmt: skip
        self.pending += length
        if "output_hidden_states" in self._settings:
            self.features = output.hidden_states[-1]
        return output.logits

    def keep(self, kept: Tensor) -> None:
        """Of the P pending entries, each row keeps those that `kept` (B, P) bool marks."""
        kept, before = self.doubled(kept), self.mask.shape[1]
        valid = torch.cat([self.mask, kept], 1)
        self.count = valid.sum(1)
        stay = int(kept[0].sum())
        if bool((kept == (torch.arange(self.pending, device=kept.device) < stay)).all()):
            # The usual case of one row, or of rows that agree: nothing has to move.
            self.cache.crop(stay - self.pending)
            self.mask = valid[:, : before + stay]
        else:
            order = valid.byte().argsort(dim=1, stable=True)[:, -int(self.count.max()) :]
            for layer in self.cache.layers:
                for name in ("keys", "values"):
                    entries = getattr(layer, name)
                    index = order[:, None, :, None].expand(-1, entries.shape[1], -1, entries.shape[3])
                    setattr(layer, name, entries.gather(2, index))
            self.mask = valid.gather(1, order)
        self.pending = 0

    def doubled(self, rows: Tensor) -> Tensor:
        """(branches B, ...): the same (B, ...) for both branches."""
        return torch.cat([rows] * self.branches) if self.branches > 1 else rows


class Decoding:
    """One call of `generate`: its rows, what makes distributions of logits, and when a row ends.

    Attributes:
        ids: (B, T) long, T the greatest length; the pad token where nothing has been written yet.
        length: (B,) long, tokens of each row, prompt and its padding included.
        live: (B,) bool, rows that have not ended.
        sample: whether tokens are drawn; otherwise each is the most probable one.
        report: see `DecodeReport`.

    Raises:
        InputError: for beam search, outputs that are not kept, and models without an ordinary cache.
    """

    def __init__(
        self, slug: str, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
        generation_config: Any, model_kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        self.slug, self.model, self.criteria, self.config = slug, model, stopping_criteria, generation_config
        self._check(model_kwargs)
        mask = model_kwargs.pop("attention_mask", None)
        self.mask = torch.ones_like(input_ids) if mask is None else mask
        for name in ("past_key_values", "use_cache", "position_ids", "logits_to_keep"):
            model_kwargs.pop(name, None)
        self.inputs = {name: value for name, value in model_kwargs.items() if value is not None}
        self.sample = bool(generation_config.do_sample)
        self.processors = list(logits_processor)
        self.unconditional = self._read_guidance(input_ids)
        self.prompt = input_ids
        batch, start = input_ids.shape
        pad = generation_config.pad_token_id
        if pad is None:
            ends = generation_config.eos_token_id
            pad = 0 if ends is None else ends if isinstance(ends, int) else ends[0]
        self.pad = int(pad)
        self.room = int(generation_config.max_length) - start
        self.ids = F.pad(input_ids, (0, self.room), value=self.pad)
        self.length = torch.full((batch,), start, device=input_ids.device)
        self.live = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
        self.report = DecodeReport()

    def _check(self, model_kwargs: Mapping[str, Any]) -> None:
        config, cache = self.config, model_kwargs.get("past_key_values")
        if (config.num_beams or 1) > 1:
            raise InputError(f"{self.slug} decodes one sequence a row; leave num_beams out")
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if getattr(config, name, None):
                raise InputError(f"{self.slug} keeps no {name.removeprefix('output_')}; leave {name} out")
        ordinary = isinstance(cache, DynamicCache) and all(
            isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionLayer) for layer in cache.layers
        )
        if cache is None or not ordinary or self.model.config.is_encoder_decoder:
            raise InputError(
                f"{self.slug} needs a decoder-only model with use_cache=True and the default, dynamic cache of keys "
                "and values; other caches cannot take tokens back"
            )
        if cache.get_seq_length():
            raise InputError(f"{self.slug} starts from a prompt, not from a cache that is filled already")

    def _read_guidance(self, input_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """(ids, mask) of the unconditional branch, which guidance of transformers would run token by token."""
        found = [one for one in self.processors if isinstance(one, UnbatchedClassifierFreeGuidanceLogitsProcessor)]
        guided = [one for one in found if one.guidance_scale != 1]
        if len(guided) > 1:
            raise InputError(f"{self.slug} takes one guidance scale, not {len(guided)}")
        if not guided:
            return None
        ids = guided[0].unconditional_context["input_ids"]
        mask = guided[0].unconditional_context["attention_mask"]
        ids = input_ids[:, -1:] if ids is None else ids
        mask = torch.ones_like(ids) if mask is None else mask
        if len(input_ids) % len(ids) or mask.shape != ids.shape:
            raise InputError(
                f"negative_prompt_ids {tuple(ids.shape)} and their mask {tuple(mask.shape)} must be alike, with one "
                f"row for each of the {len(input_ids)} prompts"
            )
        times = len(input_ids) // len(ids)
        return ids.repeat_interleave(times, 0), mask.repeat_interleave(times, 0)

    def cached(self, model: Any, keep_features: bool = False) -> CachedModel:
        """The model, or a draft of it, before the prompt."""
        return CachedModel(model, self.prompts(model), self.room, keep_features)

    def prompts(self, model: Any) -> list[Prompt]:
        """What it takes in first: the prompt, and the other branch of guidance."""
        prompt = Prompt(self.prompt, self.mask, self.inputs if model is self.model else {})
        return [prompt] if self.unconditional is None else [prompt, Prompt(*self.unconditional)]

    @property
    def remaining(self) -> Tensor:
        """(B,) tokens that may be added yet."""
        return self.ids.shape[1] - self.length

    @property
    def last(self) -> Tensor:
        """(B, 1) the last token of each row."""
        return self.ids.gather(1, self.length.unsqueeze(1) - 1)

    def scores(self, logits: Tensor, paths: Tensor) -> Tensor:
        """(B, L, V) float32 scores of the token at each of L places: guidance and all processors of `generate`.

        Args:
            logits: (branches B, L, V).
            paths: (B, L, D) token ids between what is decided and the token that is scored; a shorter path has -1s at
                its end.
        """
        places = paths.shape[1]
        scores = logits.float()
        ends = self.length.unsqueeze(1) + (paths != _ABSENT).sum(2)
        contexts: Tensor | None = None
        for processor in self.processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                scores = scores.log_softmax(-1)
                if processor.guidance_scale != 1:
                    conditional, other = scores.chunk(2)
                    scores = other + processor.guidance_scale * (conditional - other)
            elif isinstance(processor, _BLIND):
                scores = processor(self.ids[:1, :1], scores.flatten(0, 1)).unflatten(0, (-1, places))
            else:
                if contexts is None:
                    contexts = self._contexts(paths)
                scores = self._placewise(processor, contexts, ends, scores)
        return scores

    def _contexts(self, paths: Tensor) -> Tensor:
        """(B, L, T + D) the ids before each place."""
        batch, places, depth = paths.shape
        contexts = F.pad(self.ids, (0, depth), value=self.pad).unsqueeze(1).repeat(1, places, 1)
        index = self.length[:, None, None] + torch.arange(depth, device=paths.device)
        fill = torch.where(paths == _ABSENT, self.pad, paths)
        return contexts.scatter(2, index.expand(batch, places, depth), fill)

    def _placewise(self, processor: Any, contexts: Tensor, ends: Tensor, scores: Tensor) -> Tensor:
        """Processors see the whole batch, as in `generate`, at places that have the same number of ids before them."""
        scores = scores.clone()
        rows = torch.arange(len(ends), device=ends.device)
        for end in ends.unique().tolist():
            left = ends == end
            while bool((some := left.any(1)).any()):
                place = left.byte().argmax(1)
                result = processor(contexts[rows, place, :end], scores[rows, place])
                scores[rows[some], place[some]] = result[some]
                left[rows, place] = False
        return scores

    def append(self, tokens: Tensor, count: Tensor) -> Tensor:
        """Writes the first `count` (B,) of `tokens` (B, L) to the rows that are live; (B,) how many were written.

        A row ends with the token behind which a criterion stops it; what would follow is not written.
        """
        count = torch.where(self.live, count.minimum(self.remaining), 0)
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        index = self.length.unsqueeze(1) + steps
        rows, places = torch.nonzero(steps < count.unsqueeze(1), as_tuple=True)
        self.ids[rows, index[rows, places]] = tokens[rows, places]
        for end in (index[rows, places] + 1).unique().tolist():
            grown = self.live & (self.length < end) & (end <= self.length + count)
            if bool(grown.any()):
                stopped = grown & self.criteria(self.ids[:, :end], None)
                count = torch.where(stopped, end - self.length, count)
                self.live = self.live & ~stopped
        self.length = self.length + count
        self.live = self.live & (self.remaining > 0)
        beyond = torch.arange(self.ids.shape[1], device=self.ids.device) >= self.length.unsqueeze(1)
        self.ids.masked_fill_(beyond, self.pad)
        return count

    def result(self, cache: DynamicCache) -> Tensor | GenerateDecoderOnlyOutput:
        """What `generate` returns."""
        ids = self.ids[:, : int(self.length.max())]
        if self.config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=ids, past_key_values=cache)
        return ids


def draw(probabilities: Tensor) -> Tensor:
    """(...) long, one token of each distribution (..., V)."""
    return torch.multinomial(probabilities.flatten(0, -2), 1).view(probabilities.shape[:-1])


def residual(target: Tensor, draft: Tensor) -> Tensor:
    """(..., V) what tokens are drawn from behind a rejected one: `max(0, p - q)`, normalised.

    p itself where rounding leaves nothing: p and q are then the same.
    """
    return normalised((target - draft).clamp(min=0), target)


def normalised(*weights: Tensor) -> Tensor:
    """(..., V) distributions by the first of `weights`, each (..., V), that is not zero everywhere."""
    found = weights[-1]
    for one in reversed(weights[:-1]):
        found = torch.where(one.sum(-1, keepdim=True) > 0, one, found)
    return found / found.sum(-1, keepdim=True)


def leading(passed: Tensor) -> Tensor:
    """(B,) how many of `passed` (B, L) bool are True before the first that is not."""
    return passed.long().cumprod(1).sum(1)
