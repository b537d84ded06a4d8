"""ToMe: every layer of the vision encoder merges its most similar tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Any

from foveate.method import (
    Card,
    Claim,
    HostShape,
    InputError,
    Method,
    Stage,
    at,
    choice,
    equal_counts,
    register,
    share,
    whole,
)
from foveate.nn.matching import partners
from foveate.tokens import Tokens


def _macs(depth: int, width: int) -> Callable[[Any], float]:
    return lambda tome: float(tome.macs(196, depth, width))


def _left(depth: int) -> Callable[[Any], float]:
    return lambda tome: float(tome.left(196, depth)[-1])


@register
class ToMe(Method):
    """Between attention and MLP of each encoder layer, r tokens are merged into the ones that they are most like.

    Bipartite soft matching: the sequence is split alternately, tokens at even places (A) and at odd ones (B). With
    `k (B, N, D)` the layer's own keys, averaged over heads, each token of A draws one edge to the token of B with the
    greatest cosine; along the r best edges tokens are merged, `x_b <- sum_j s_j x_j / sum_j s_j`, where the size s_j is
    how many patches token j stands for: `(B, N, C) -> (B, max(N - r, ceil(N / 2)), C)`. What is left goes on as [lone
    tokens of A | B]. Later layers count a token as often as it has patches, `softmax(q k^T / sqrt(d) + log s)`.
    Class and register tokens take their places in the split, but are never merged.

    Token Merging: Your ViT But Faster, ICLR 2023, https://arxiv.org/abs/2210.09461, section 3. Written from the paper
    and from what is known of its release, without a card. In a vision-language model, merging ends with the layer
    whose features are used. The default of r is this project's choice: the paper has one for each model. The release
    also weighs tokens by size where a head averages them; here the model's own head averages as it always does.
    """

    card = Card(
        slug="tome", title="Token Merging: Your ViT But Faster", arxiv="2210.09461", year=2022, kind="reduce",
        hosts=("hf-vlm", "hf-vision", "hf-video", "timm"), identity={"r": 0},
        summary="Merges the most similar tokens in every layer of the vision encoder, by the attention's keys.",
        parameters={
            "r": "tokens merged away in each layer, or a list with one number per layer (missing ones are 0)",
            "schedule": "with one r: 'constant', or 'decreasing' linearly from 2 r to 0",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(
                f"MACs of {model}, r = {r}", "value", figure, source, tolerance=0.01, settings={"r": r},
                value=_macs(depth, width),
            )
            for model, r, figure, source, depth, width in (
                ("ViT-B/16 at 224", 0, 17.6e9, "known figure of the model", 12, 768),
                ("DeiT-S at 224", 0, 4.6e9, "paper's table of DeiT (from memory)", 12, 384),
                ("DeiT-S at 224", 13, 2.7e9, "paper's table of DeiT (from memory)", 12, 384),
                ("ViT-L/16 at 224", 0, 61.6e9, "paper's table of MAE (from memory)", 24, 1024),
                ("ViT-L/16 at 224", 8, 31.0e9, "paper's table of MAE (from memory)", 24, 1024),
            )
        ),
        *(
            Claim(
                f"patches left of 196 after {depth} layers, r = {r}", "value", figure, "formula", tolerance=0,
                settings={"r": r}, value=_left(depth),
            )
            # 16 a layer until 20 are left, of which 10 can go.
            for r, depth, figure in ((8, 12, 100), (13, 12, 40), (16, 12, 10), (8, 24, 6))
        ),
        *(
            Claim(
                f"visual tokens per layer, r = {r}, {schedule}", "tokens", figure, "formula", tolerance=0,
                architecture="llava-1.5-7b", settings={"r": r, "schedule": schedule},
            )
            # 23 of the tower's 24 layers count. Decreasing, they merge floor(8 k / 11) tokens, k = 22 … 0, 174 in all.
            for r, schedule, figure in ((8, "constant", 576 - 23 * 8), (8, "decreasing", 576 - 174))
        ),
    )  # fmt: skip

    proportional = forgets = True

    def __init__(self, *, r: int | list[int] | tuple[int, ...] = 8, schedule: str = "constant") -> None:
        self.r = tuple(whole("r", one) for one in r) if isinstance(r, list | tuple) else whole("r", r)
        self.schedule = choice("schedule", schedule, ("constant", "decreasing"))
        if isinstance(self.r, tuple) and schedule != "constant":
            raise InputError("a list of r is its own schedule; leave schedule out")

    def merges(self, layers: int) -> list[int]:
        """r of each of the `layers` layers that merge."""
        if isinstance(self.r, tuple):
            return [*self.r, *[0] * (layers - len(self.r))][:layers]
        if self.schedule == "constant" or layers == 1:
            return [self.r] * layers
        return [2 * self.r * (layers - 1 - layer) // (layers - 1) for layer in range(layers)]

    def left(self, patches: int, layers: int) -> list[int]:
        """Tokens that are left of `patches` after each layer; at most half of them go in one."""
        left = []
        for r in self.merges(layers):
            patches -= min(r, patches // 2)
            left.append(patches)
        return left

    def macs(self, patches: int, layers: int, width: int) -> float:
        """Multiply-adds of a ViT with 16 x 16 pixel patches, class token, an MLP 4 times as wide, 1000 classes."""
        total, now = float(patches * 3 * 16 * 16 * width + 1000 * width), patches + 1
        for left in self.left(patches, layers):
            # Attention still sees what the layer began with, the MLP only what is left.
            total += 4 * now * width**2 + 2 * now**2 * width
            now = left + 1
            total += 8 * now * width**2
        return total

    @classmethod
    def for_budget(cls, budget: float, host: HostShape) -> Method:
        """The smallest constant r that reaches the budget at the encoder's output, less in the last layers."""
        patches, layers = host.patches, host.feature_layer + 1
        target = max(1, int(patches * share("budget", budget) + 1e-9))
        if host.joined > 1 and budget < 1:
            raise InputError(
                "tome shortens only the encoder of this host: patches are joined behind it, and what was merged is put "
                "back on its patches for that; set r"
            )
        for r in range(patches // 2 + 1):
            left = [patches, *cls(r=r).left(patches, layers)]
            if left[-1] <= target:
                goes = [before - max(after, target) for before, after in pairwise(left)]
                return cls(r=tuple(max(0, one) for one in goes))
        raise InputError(
            f"tome merges half of the tokens in a layer at most: {layers} layers cannot bring {patches} to {target}"
        )

    def check(self, host: HostShape) -> None:
        if isinstance(self.r, tuple) and len(self.r) > host.feature_layer + 1:
            raise InputError(f"r has {len(self.r)} numbers; {host.feature_layer + 1} layers of this encoder are used")

    def layers_at(self, stage: str, host: HostShape) -> Collection[int]:
        return [layer for layer, r in enumerate(self.merges(host.feature_layer + 1)) if r]

    def reads(self, host: HostShape) -> tuple[str, ...]:
        return tuple(f"vision.attention[{layer}]" for layer in self.layers_at("vision.mlp", host))

    @at("vision.mlp")
    def merge(self, tokens: Tokens, at: Stage) -> Tokens:
        r = self.merges(at.host.feature_layer + 1)[at.layer]
        if tokens.x.shape[1] < 2:
            return tokens
        equal_counts(self.card.slug, tokens, at)
        attention = at.signals.attention(at.layer)
        keys = attention.key.mean(1)
        keys = keys.gather(1, attention.visual.unsqueeze(-1).expand(-1, -1, keys.shape[2]))
        # The first patch stands where the prefix ends, and so in A or in B.
        into = partners(keys, r, "sets", first=at.host.prefix % 2)
        count = tokens.x.shape[1]
        return tokens.merge(into, tokens.size, count - min(r, count // 2), full=True)
