"""Where visual tokens went: counts at each layer of the language model, and the overlay of one picture or clip."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.hosts.host import Record
from foveate.method import HostShape


@dataclass(frozen=True)
class Overlay:
    """What became of every patch of one picture (of several crops: the first, which shows all of it) or of one clip.

    Attributes:
        method: slug.
        budget: that the method was set to.
        grid: (rows, columns) of patches, of a clip those of one frame; where patches are joined, of what they become.
        depth: frame by frame and row by row, the share of the language model's depth at which the patch was dropped:
            0 before the language model, 1 never. Without a language model, of the encoder's depth.
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
    steps = (
        (0.0 if record.stage == "llm.input" else _layer(record.stage) / depth, record.source[sample])
        for record in trace
        if record.stage == "llm.input" or record.stage.startswith("llm.layer")
    )
    return Overlay(method, budget, grid, *_fate(steps, frames * grid[0] * grid[1]), answer, frames)


def encoder_overlay(trace: Sequence[Record], host: HostShape, method: str, budget: float, sample: int = 0) -> Overlay:
    """The overlay of one sample of the forward of a vision encoder that `trace` recorded.

    Its depth counts the encoder's output as one more layer: what is dropped there is in no head's input.
    """
    steps = ((_encoder_depth(record.stage, host.vision_layers), record.source[sample]) for record in trace)
    return Overlay(method, budget, host.grid, *_fate(steps, host.patches), frames=host.slots)


def _encoder_depth(stage: str, layers: int) -> float:
    if stage == "vision.output":
        return layers / (layers + 1)
    within = {"vision.layer": 0.0, "vision.mlp": 0.5}.get(stage.partition("[")[0])
    return 0.0 if within is None else (_layer(stage) + within) / (layers + 1)


def _fate(steps: Iterable[tuple[float, Tensor]], patches: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """`Overlay.depth` and `Overlay.group` of the first `patches`, of (depth, source (M,)) in the order of the steps."""
    dropped = torch.ones(patches)
    group = torch.full((patches,), -1)
    first_free = 0
    for share, source in steps:
        whole = source.cpu()
        source = whole[:patches]
        dropped = torch.where((source < 0) & (dropped == 1), share, dropped)
        carried = torch.bincount(whole[whole >= 0], minlength=1)
        merged = (source >= 0) & (carried[source.clamp(min=0)] > 1)
        group = torch.where(merged, first_free + source, group)
        first_free += len(carried)
    numbers = {old: new for new, old in enumerate(dict.fromkeys(g for g in group.tolist() if g >= 0))}
    return tuple(dropped.tolist()), tuple(numbers.get(g, -1) for g in group.tolist())


def _layer(stage: str) -> int:
    return int(stage.partition("[")[2].rstrip("]"))
