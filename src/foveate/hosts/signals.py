"""The signals of a language model, and the base that says no to those a place does not have."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.hosts.sequence import Sequence
from foveate.method import Crops, InputError
from foveate.nn.attention import Attention, attention_rows
from foveate.tokens import DROPPED, compact, predecessors, take

if TYPE_CHECKING:
    from foveate.hosts.language import VisionLanguageHost


class NoSignals:
    """Base of the signals (see `foveate.method.Signals`): an InputError for each that a place does not have."""

    where: str

    def _none(self, name: str) -> InputError:
        return InputError(f"{name} is not a signal of {self.where}")

    def attention(self, layer: int) -> Attention:
        raise self._none("attention")

    def cls_attention(self, layer: int) -> Tensor:
        raise self._none("cls_attention")

    def received(self, layer: int) -> Tensor:
        raise self._none("received")

    def keys(self, layer: int) -> Tensor:
        raise self._none("keys")

    def text_to_vision(self, layer: int) -> Tensor:
        raise self._none("text_to_vision")

    def states(self) -> Tensor:
        raise self._none("states")

    def slots(self) -> Tensor:
        raise self._none("slots")

    def prompt(self) -> Tensor:
        raise self._none("prompt")

    def crops(self) -> tuple[Crops, ...]:
        raise self._none("crops")

    def text_embeddings(self) -> Tensor:
        raise self._none("text_embeddings")

    def grid(self) -> tuple[int, int]:
        raise self._none("grid")


class LanguageSignals(NoSignals):
    """The signals of the language model (see `foveate.method.Signals`)."""

    where = "a language model"

    def __init__(
        self, host: VisionLanguageHost, sequence: Sequence, hidden: Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        self._host, self._sequence, self._hidden, self._kwargs = host, sequence, hidden, kwargs

    def attention(self, layer: int) -> Attention:
        """The attention of a layer that has run, restricted to the prompt when a generated text follows it."""
        host, sequence = self._host, self._sequence
        query, key, scaling = host._taps.read(layer)
        generated = 0 if host._prompt is None else host.full_length - host._prompt
        length = query.shape[2] - generated
        # Tokens may have been dropped since: look each up by the patch that it carries.
        then = host._ran[layer]
        visual = then.slots.gather(1, predecessors(then.tokens, sequence.tokens).clamp(min=0)).clamp(min=0)
        valid = None if then.valid is None else then.valid[:, :length]
        return Attention(
            query[:, :, :length], key[:, :, :length], scaling, True, valid, then.present[:, :length], visual
        )

    def states(self) -> Tensor:
        if self._hidden is None:
            raise RuntimeError("states are those that enter a layer: ask for them at 'llm.layer'")
        return self._hidden

    def slots(self) -> Tensor:
        return self._sequence.slots

    def prompt(self) -> Tensor:
        return self._host._of_prompt(self._sequence)

    @torch.no_grad()
    def text_to_vision(self, layer: int) -> Tensor:
        host, sequence = self._host, self._sequence
        block = host.language.layers[layer]
        attention = block.self_attn
        normed = block.input_layernorm(self.states().detach())
        queries, weight = self._queries()
        _, embeddings, _ = self._rotary()
        cos, sin = embeddings
        key = _heads(attention.k_proj(normed), attention.head_dim)
        query = _heads(attention.q_proj(take(normed, queries)), attention.head_dim)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        at = [one.expand(key.shape[0], -1, -1) for one in (cos, sin)]
        query = _rotate(attention, query, *(take(one, queries) for one in at))
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
        visible = sequence.seen & host._of_prompt(sequence)
        number = torch.arange(index.shape[1], device=index.device)
        last = torch.where(visible, number, -1).amax(1, keepdim=True).clamp(min=0)
        return last, torch.ones_like(last, dtype=torch.float32)

    def text_embeddings(self) -> Tensor:
        host, sequence = self._host, self._sequence
        assert host._inputs is not None and host._inputs.embeds is not None
        index = sequence.index
        visual = host._inputs.visual.to(index.device).gather(1, index.clamp(min=0)) > 0
        slots = compact(host._of_prompt(sequence) & ~visual)
        chosen = torch.where(slots >= 0, index.gather(1, slots.clamp(min=0)), DROPPED)
        return take(host._inputs.embeds.detach(), chosen) * (chosen >= 0).unsqueeze(-1)

    def grid(self) -> tuple[int, int]:
        return self._host.grid()


def _heads(projected: Tensor, head_dim: int) -> Tensor:
    return projected.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _rotate(attention: nn.Module, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position encoding of (B, H, S, D) with cos, sin (B, S, D), by the function of the model's own file."""
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    # It rotates queries and keys; of no heads costs nothing.
    rotated: Tensor = rotate(states, states[:, :0], cos, sin)[0]
    return rotated
