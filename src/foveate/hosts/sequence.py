"""The language model's sequence while tokens leave it, and what decoding has to know of it afterwards."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveate.tokens import DROPPED, Tokens, compacted, marked


@dataclass(frozen=True, eq=False)
class Sequence:
    """The language model's sequence at some depth, S tokens of B samples.

    Attributes:
        index: (B, S) long, where each token stood in the sequence that the user gave; -1 for padding.
        valid: (B, S) bool, False for padding and for tokens hidden from attention; None if all can be seen.
        positions: (P, B, S) long position ids; P is 1, or the number of axes of the model's position ids.
        end: (B,) long, the position of what comes after the prompt.
        tokens: the visual tokens among them.
        slots: (B, N) long, where each visual token stands in the sequence; -1 for padding.
        patches: (B,) long, how many of a sample's sources are patches; the others stand for tokens that are none.
    """

    index: Tensor
    valid: Tensor | None
    positions: Tensor
    end: Tensor
    tokens: Tokens
    slots: Tensor
    patches: Tensor

    @functools.cached_property
    def present(self) -> Tensor:
        """(B, S) bool: which of them are no padding."""
        return self.index >= 0

    @functools.cached_property
    def visual(self) -> Tensor:
        """(B, S) bool: where visual tokens stand."""
        return marked(self.slots, self.index.shape[1])

    @property
    def seen(self) -> Tensor:
        """(B, S) bool: `valid`, also where it is None."""
        return self.present if self.valid is None else self.valid


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
        sequence: what the layer's cache holds, in its order.
    """

    valid: Tensor | None
    head: int
    start: Tensor
    full: bool
    sequence: Sequence

    @classmethod
    def of(cls, sequence: Sequence, full_length: int) -> Remembered:
        length = sequence.index.shape[1]
        # Where the closing text cannot have begun yet: padding, visual tokens, and whatever a gap in positions follows.
        ahead = ~sequence.present | sequence.visual
        ahead[:, :-1] |= (sequence.positions.diff() != 1).any(0)
        number = torch.arange(1, length + 1, device=ahead.device)
        head = int((ahead * number).max())
        start = sequence.end - (length - head)
        valid = None if sequence.valid is None else sequence.valid[:, :head]
        # What decoding asks of the visual tokens does not include their features.
        held = replace(sequence, tokens=sequence.tokens.with_x(sequence.tokens.x.detach()[..., :0]))
        return cls(valid, head, start, length == full_length, held)


@dataclass(eq=False)
class Prefill:
    """What rides on a cache: a `Remembered` for each layer, and what methods noted (`Stage.memory`)."""

    layers: list[Remembered]
    memory: dict[str, Any]


def shorten(sequence: Sequence, keep: Tensor, renumber: bool) -> tuple[Sequence, Tensor]:
    """The sequence with only the slots in `keep` (B, S) bool, padded on the left, and the old slot of each new one."""
    chosen, full = compacted(keep)
    if not full:
        # Padding comes on the right; the newest token must stay last.
        width = chosen.shape[1]
        column = (torch.arange(width, device=keep.device) - (chosen < 0).sum(1, keepdim=True)) % width
        chosen = chosen.gather(1, column)
    filled = chosen.clamp(min=0)
    present = chosen >= 0
    index = torch.where(present, sequence.index.gather(1, filled), DROPPED)
    valid = present if sequence.valid is None else present & sequence.valid.gather(1, filled)
    consecutive = present.long().cumsum(1).sub(1).clamp(min=0).unsqueeze(0)
    axes, end = len(sequence.positions), sequence.end
    if renumber and axes == 1:
        positions, end = consecutive, present.sum(1)
    else:
        positions = sequence.positions.gather(2, filled.expand(axes, -1, -1)) * present
        if axes == 4:
            # The first axis turns no key: it numbers the tokens for attention that takes a gap for another sequence.
            positions = torch.cat([consecutive, positions[1:]])
    # Without padding or anything hidden there is nothing to look for.
    whole = (full and sequence.valid is None) or bool(valid.all())
    return replace(sequence, index=index, valid=None if whole else valid, positions=positions, end=end), chosen


def deal(slot: Tensor) -> Tensor:
    """The same slots of each sample, handed to its tokens in ascending order; -1 stays."""
    present = slot >= 0
    big = torch.iinfo(slot.dtype).max
    ascending = torch.where(present, slot, big).sort(1).values
    rank = present.long().cumsum(1).sub(1).clamp(min=0)
    return torch.where(present, ascending.gather(1, rank), DROPPED)


def reslot(order: Tensor, slots: Tensor, length: int) -> Tensor:
    """Where old slots (B, N), of `length`, stand in a sequence whose new slot k was old slot `order[b, k]`; -1 where it
    is gone."""
    new = order.new_full((len(order), length + 1), DROPPED)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    new.scatter_(1, torch.where(order >= 0, order, length), place)
    new[:, -1] = DROPPED
    return new.gather(1, torch.where(slots >= 0, slots, length))
