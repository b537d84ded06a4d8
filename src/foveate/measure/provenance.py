"""Where visual tokens went: counts at each layer of the language model, and the overlay of one picture or clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foveate.hosts.host import Record


@dataclass(frozen=True)
class Overlay:
    """What became of every patch of one picture (of several crops: the first, which shows all of it) or of one clip.

    Attributes:
        method: slug.
        budget: that the method was set to.
        grid: (rows, columns) of patches, of a clip those of one frame; where patches are joined, of what they become.
        depth: frame by frame and row by row, the share of the language model's depth at which the patch was dropped:
            0 before the language model, 1 never.
        group: in the same order, one number for all patches merged into one token, -1 for a patch that was not merged.
        answer: what the model said with the tokens that were left.
        frames: of a clip; a model that joins frames has one for each it makes of them. 1 for a picture.
    """

    method: str
    budget: float
    grid: tuple[int, int]
    depth: tuple[float, ...]
    group: tuple[int, ...]
    answer: str = ""
    frames: int = 1


def visual_tokens(trace: Sequence[Record], depth: int) -> list[tuple[int, ...]]:
    """For each layer of the language model, the visual tokens of each sample that are in its input."""
    entered = next(record.tokens_out for record in trace if record.stage == "llm.input")
    changes = {_layer(record.stage): record.tokens_out for record in trace if record.stage.startswith("llm.layer")}
    counts, now = [], entered
    for layer in range(depth):
        now = changes.get(layer, now)
        counts.append(now)
    return counts


def overlay(
    trace: Sequence[Record],
    depth: int,
    grid: tuple[int, int],
    method: str,
    budget: float,
    answer: str = "",
    sample: int = 0,
    frames: int = 1,
) -> Overlay:
    """The overlay of one sample of the forward that `trace` recorded; in `source`, the first crop comes first."""
    patches = frames * grid[0] * grid[1]
    dropped = torch.ones(patches)
    group = torch.full((patches,), -1)
    first_free = 0
    for record in trace:
        if record.stage != "llm.input" and not record.stage.startswith("llm.layer"):
            continue
        share = 0.0 if record.stage == "llm.input" else _layer(record.stage) / depth
        whole = record.source[sample].cpu()
        source = whole[:patches]
        dropped = torch.where((source < 0) & (dropped == 1), share, dropped)
        carried = torch.bincount(whole[whole >= 0], minlength=1)
        merged = (source >= 0) & (carried[source.clamp(min=0)] > 1)
        group = torch.where(merged, first_free + source, group)
        first_free += len(carried)
    numbers = {old: new for new, old in enumerate(dict.fromkeys(g for g in group.tolist() if g >= 0))}
    groups = tuple(numbers.get(g, -1) for g in group.tolist())
    return Overlay(method, budget, grid, tuple(dropped.tolist()), groups, answer, frames)


def _layer(stage: str) -> int:
    return int(stage.partition("[")[2].rstrip("]"))
