"""EVAD's token dropout: the keyframe of a clip keeps all of its tokens, the rest only what receives attention.

The detector that it was made for is in `evad_detector`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.method import (
    Card,
    Claim,
    HostShape,
    InputError,
    Method,
    Stage,
    at,
    at_depth,
    choice,
    depth,
    register,
    share,
    whole,
    within,
)
from foveate.tokens import Tokens

if TYPE_CHECKING:
    from foveate.methods.video.evad_detector import EvadDetector


@functools.lru_cache(maxsize=4)
def _on_meta(name: str, frames: int) -> EvadDetector:
    from foveate.methods.video.evad_detector import EvadDetector

    with torch.device("meta"):
        return EvadDetector.named(name, frames=frames)


def _meta(name: str, keep: float, weight: float, frames: int) -> Callable[[], nn.Module]:
    return lambda: _on_meta(name, frames).set_dropout(keep=keep, weight=weight)


def _clip(side: int, frames: int) -> Callable[[], Sequence[Any]]:
    return lambda: (torch.empty(1, 3, frames, side, side),)


def _left(drop: int, patches: int, keyframe: int) -> Callable[[Any], float]:
    return lambda evad: float(evad.left(patches, keyframe)[drop])


@register
class Evad(Method):
    """Between attention and MLP of a few layers, tokens of a clip are dropped, but never those of the keyframe.

    With A (B, H, N, N) the layer's attention after the softmax and w_i = `weight` for rows of the keyframe and 1 for
    the others, token j scores `s_j = mean over heads and rows i of w_i A_ij`. Of N tokens, t h w at first, the best
    `max(ceil(keep N), h w)` stay, the h w of the keyframe (time slot t // 2) before all others; they alone go
    through the layer's MLP: `(B, N, C) -> (B, ceil(keep N), C)`. They stay in raster order: positions are in the
    features already, so order means nothing to the layers that follow.

    Efficient Video Action Detection with Token Dropout and Context Refinement, ICCV 2023,
    https://arxiv.org/abs/2304.08451, section 3.2. `select` and `protect_keyframe` are what the paper's ablations vary.
    `foveate.methods.video.evad_detector` has the whole model.
    """

    forgets = True

    card = Card(
        slug="evad", title="Efficient Video Action Detection with Token Dropout and Context Refinement",
        arxiv="2304.08451", year=2023, kind="video", hosts=("hf-video",), identity={"keep": 1.0},
        summary="Drops tokens of a clip in three layers of its encoder, but none of the keyframe's; detects actions.",
        parameters={
            "keep": "share of all tokens that is left by each drop, the keyframe's included",
            "layers": "in which layers tokens are dropped: whole numbers, or shares of the depth (0.25 of 12 is 3)",
            "weight": "of the keyframe's rows in the score, others having 1 (4 in the paper's setting with keep 0.6)",
            "select": "'attention', or 'random' with the same numbers of tokens",
            "protect_keyframe": "whether the keyframe's tokens always stay",
            "seed": "of a random selection",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(
                f"MACs of {label}", "flops", figure, source, tolerance=0.01, counting="macs",
                model=_meta(name, keep, weight, frames), inputs=_clip(side, frames),
            )
            for label, figure, source, name, keep, weight, side, frames in (
                ("ViT-B, dense", 425e9, "README table", "vit-b", 1.0, 1.0, 288, 16),
                ("ViT-B, keep 0.7", 243e9, "README table", "vit-b", 0.7, 1.0, 288, 16),
                ("ViT-B, keep 0.6, weight 4", 209e9, "README table", "vit-b", 0.6, 4.0, 288, 16),
                ("ViT-L, keep 0.7", 737e9, "README table", "vit-l", 0.7, 1.0, 288, 16),
                ("ViT-L, dense", 1325e9, "card", "vit-l", 1.0, 1.0, 288, 16),
                ("ViT-B, 8 frames, dense", 182e9, "card", "vit-b", 1.0, 1.0, 288, 8),
                ("ViT-B, 8 frames, keep 0.7", 112e9, "card", "vit-b", 0.7, 1.0, 288, 8),
                ("ViT-B, 8 frames, keep 0.6", 98e9, "card", "vit-b", 0.6, 1.0, 288, 8),
                ("ViT-L, 8 frames, dense", 570e9, "card", "vit-l", 1.0, 1.0, 288, 8),
                ("ViT-L, 8 frames, keep 0.7", 336e9, "card", "vit-l", 0.7, 1.0, 288, 8),
                ("ViT-B, 320 px, keep 0.7", 318e9, "card", "vit-b", 0.7, 1.0, 320, 16),
                ("ViT-B, 352 px, keep 0.7", 409e9, "card", "vit-b", 0.7, 1.0, 352, 16),
                ("ViT-B, 384 px, keep 0.7", 521e9, "card", "vit-b", 0.7, 1.0, 384, 16),
            )
        ),
        *(
            Claim(
                f"parameters of {label}", "parameters", figure, "card", tolerance=0, model=_meta(name, 0.7, 1.0, 16),
            )
            for label, figure, name in (("ViT-B", 185_359_636, "vit-b"), ("ViT-L", 439_535_220, "vit-l"))
        ),
        *(
            Claim(
                f"tokens of 2592 after drop {drop + 1}, keep {keep}", "value", figure, "card", tolerance=0,
                settings={"keep": keep}, value=_left(drop, 2592, 324),
            )
            for keep, figures in ((0.7, (1815, 1271, 890)), (0.6, (1556, 934, 561)))
            for drop, figure in enumerate(figures)
        ),
    )  # fmt: skip

    def __init__(
        self, *, keep: float = 0.7, layers: Sequence[int | float] = (0.25, 0.5, 0.75), weight: float = 1.0,
        select: str = "attention", protect_keyframe: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        self.keep = share("keep", keep)
        if not isinstance(layers, list | tuple):
            raise InputError(f"layers must be a list of layers, not {layers!r}")
        self.layers = tuple(depth("layers", layer) for layer in layers)
        if len(set(self.layers)) != len(self.layers):
            raise InputError(f"layers must not repeat, not {layers!r}")
        self.weight = within("weight", weight, "(0, inf)")
        self.select = choice("select", select, ("attention", "random"))
        if not isinstance(protect_keyframe, bool):
            raise InputError(f"protect_keyframe must be true or false, not {protect_keyframe!r}")
        self.protect_keyframe = protect_keyframe
        self.seed = whole("seed", seed)

    def numbers(self, count: int) -> tuple[int, ...]:
        """`layers` as numbers, of a model with `count` layers."""
        return tuple(at_depth("layers", layer, count) for layer in self.layers)

    def drops(self, count: int) -> tuple[int, ...]:
        """The layers, of `count`, in which tokens are dropped."""
        return self.numbers(count) if self.keep < 1 else ()

    def after(self, tokens: int, keyframe: int) -> int:
        """How many of `tokens`, of which `keyframe` are the keyframe's, a drop leaves."""
        # In binary 0.7 * 10 may be above 7, and a token is not added for that.
        left = max(1, math.ceil(self.keep * tokens - 1e-9))
        return min(tokens, max(left, keyframe) if self.protect_keyframe else left)

    def left(self, tokens: int, keyframe: int) -> list[int]:
        """How many are left after each of `layers`."""
        counts = [tokens]
        for _ in self.layers:
            counts.append(self.after(counts[-1], keyframe))
        return counts[1:]

    @classmethod
    def for_budget(cls, budget: float, host: HostShape) -> Method:
        """The greatest `keep` with which the encoder's output has at most `budget` of the patches."""
        target = int(share("budget", budget) * host.patches + 1e-9)
        keyframe = host.patches // host.slots
        if budget == 1:
            return cls(keep=1.0)
        if target < keyframe or host.slots == 1:
            raise InputError(
                f"evad keeps the {keyframe} tokens of the keyframe: it cannot bring {host.patches} tokens to {target}"
            )
        # Three drops: never fewer tokens than the cube root of the budget leaves, but for rounding.
        low, high = 0.0, budget ** (1 / 3)
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if cls(keep=middle).left(host.patches, keyframe)[-1] <= target else (low, middle)
        return cls(keep=low)

    def check(self, host: HostShape) -> None:
        if host.slots == 1:
            raise InputError("evad needs clips: a picture is its own keyframe, and nothing of that is dropped")
        layers = self.numbers(host.vision_layers)
        if list(layers) != sorted(set(layers)):
            raise InputError(f"layers {self.layers} are {list(layers)} on this host; they must ascend")

    def layers_at(self, stage: str, host: HostShape) -> Collection[int]:
        return self.drops(host.vision_layers)

    def reads(self, host: HostShape) -> tuple[str, ...]:
        if self.select == "random":
            return ()
        return tuple(f"vision.attention[{layer}]" for layer in self.drops(host.vision_layers))

    def chosen(self, score: Tensor, keyframe: Tensor, left: int, ordered: bool = True) -> Tensor:
        """(B, left) indices of the tokens that stay, of score (B, N); `keyframe` (B, N) bool marks those of the
        keyframe. In their order, or the highest score first."""
        if self.protect_keyframe:
            score = score.masked_fill(keyframe, math.inf)
        index = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :left]
        return index.sort(1).values if ordered else index

    @at("vision.mlp")
    def drop(self, tokens: Tokens, at: Stage) -> Tokens:
        batch, count = tokens.x.shape[:2]
        left = self.after(count, at.host.patches // at.host.slots)
        if left == count:
            return tokens
        if tokens.valid is not None:
            raise InputError("evad drops equally many tokens of each clip; let no other method act before it")
        keyframe = tokens.position[..., 0].round() == at.host.slots // 2
        if self.select == "random":
            score = self.lot(count, at.layer).to(tokens.x.device).expand(batch, -1)
        else:
            attention = at.signals.attention(at.layer)
            rows = torch.where(keyframe, self.weight, 1.0)
            # A weighted mean instead of the sum: the order is the same.
            weights = torch.zeros(batch, attention.length, device=rows.device).scatter_(1, attention.visual, rows)
            score = attention.received(weights).gather(1, attention.visual)
        return tokens.keep(self.chosen(score, keyframe, left), full=True)

    def lot(self, count: int, layer: int) -> Tensor:
        """(count,) random scores in [0, 1): the same for all clips."""
        return torch.rand(count, generator=torch.Generator().manual_seed(1000 * self.seed + layer))
