"""FastV: after the second layer of the language model, half of the visual tokens go."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from foveate.method import (
    Card,
    Claim,
    HostShape,
    InputError,
    Method,
    Stage,
    at,
    choice,
    floor_share,
    register,
    share,
    whole,
    within,
)
from foveate.nn.attention import Attention
from foveate.tokens import Tokens, topk_in_order


@register
class FastV(Method):
    """Once, after layer K of the language model, the visual tokens that get least attention are dropped.

    With `A (B, H, S, S)` the attention of layer K (the last one that sees all tokens), token j is worth
    `phi_j = mean_h A[h, t, j]`, t the last token of the prompt (the release), or `phi_j = mean_h mean_i A[h, i, j]`
    over all tokens i (the paper's text: the average attention that it receives). Of V visual tokens the best
    `floor((1 - R) V)` go on, in their order and with their original positions: `(B, V, D) -> (B, floor((1 - R) V), D)`.
    With n visual tokens a layer of width d and MLP width m costs `4 n d^2 + 2 n^2 d + 2 n d m` (the paper's formula;
    LLaMA's MLP has three matrices, so 3 n d m), K layers at n = V and the others at n = (1 - R) V.

    An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models,
    ECCV 2024, https://arxiv.org/abs/2403.06764. Written from the paper and from what is known of its release, without
    a card. That a token's own row counts among all, and rounding down, are this project's choices. In training, too,
    the last token asks, answer or not: the method is made for inference.
    """

    card = Card(
        slug="fastv",
        title="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
        "Vision-Language Models",
        arxiv="2403.06764", year=2024, kind="reduce", hosts=("hf-vlm",), identity={"drop": 0.0},
        summary="Drops the visual tokens with least attention after layer 2 of the language model, all at once.",
        parameters={
            "layer": "K, how many layers see all visual tokens, at least 1",
            "drop": "R, the share of the visual tokens that is dropped after them, in [0, 1]",
            "queries": "whose attention counts: the 'last' token's (the release) or that of 'all' (the paper's text)",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(
                f"MACs of the visual tokens, K = {layer}, R = {drop}", "flops", figure, "formula with LLaMA's MLP",
                tolerance=0.001, architecture="llava-1.5-7b", settings={"layer": layer, "drop": drop},
                counting="visual-macs",
            )
            # K f(576) + (32 - K) f((1 - R) 576), f(n) = 4 n d^2 + 2 n^2 d + 3 n d m, d = 4096, m = 11008.
            for layer, drop, figure in ((2, 0.0, 3.817e12), (2, 0.5, 2.007e12), (3, 0.5, 2.068e12), (2, 0.75, 1.118e12))
        ),
        *(
            Claim(
                f"visual tokens per layer, K = {layer}, R = {drop}", "tokens", figure, "formula", tolerance=0,
                architecture="llava-1.5-7b", settings={"layer": layer, "drop": drop},
            )
            for layer, drop, figure in (
                (2, 0.5, (2 * 576 + 30 * 288) / 32), (3, 0.5, (3 * 576 + 29 * 288) / 32),
                (2, 0.75, (2 * 576 + 30 * 144) / 32),
            )
        ),
        Claim(
            "visual KV bytes, fp16, K = 2, R = 0.5", "kv_bytes", 306 * 524_288, "formula", tolerance=0,
            architecture="llava-1.5-7b",
        ),
    )  # fmt: skip

    renumbers = False

    def __init__(self, *, layer: int = 2, drop: float = 0.5, queries: str = "last") -> None:
        self.layer = whole("layer", layer, 1)
        self.drop = within("drop", drop, "[0, 1]")
        self.queries = choice("queries", queries, ("last", "all"))

    @classmethod
    def for_budget(cls, budget: float, host: HostShape) -> Method:
        """K = 2 and what R follows from it; K = 1 where two whole layers alone cost more than the budget.

        On tiny-llava K = 2 answers better than K = 1 at the same budget even where it leaves nothing after it.
        """
        share("budget", budget)
        for layer in (2, 1):
            keep = (budget * host.llm_layers - layer) / (host.llm_layers - layer)
            if keep >= 0:
                return cls(layer=layer, drop=round(1 - keep, 4))
        raise InputError(
            f"fastv cannot spend as little as {budget} of the visual tokens: the first of {host.llm_layers} layers "
            "sees all"
        )

    def check(self, host: HostShape) -> None:
        if self.layer >= host.llm_layers:
            raise InputError(f"layer={self.layer}: nothing comes after it; this host has {host.llm_layers} layers")

    def reads(self, host: HostShape) -> tuple[str, ...]:
        return (f"llm.attention[{self.layer - 1}]",) if self.drop else ()

    def layers_at(self, stage: str, host: HostShape) -> Collection[int]:
        # After K layers is before the one with the 0-based number K; the last that ran has the number K - 1.
        return (self.layer,) if self.drop else ()

    @at("llm.layer")
    def prune(self, tokens: Tokens, at: Stage) -> Tokens:
        attention = at.signals.attention(self.layer - 1)
        score = attention.received() if self.queries == "all" else last_row(attention)
        left = torch.where(at.active, floor_share(at.entered, 1 - self.drop, least=0), at.entered)
        return tokens.keep(topk_in_order(score.gather(1, attention.visual), left, tokens.valid))


def last_row(attention: Attention) -> Tensor:
    """(B, S): the attention that the last token pays each, mean over heads."""
    place = torch.arange(attention.length, device=attention.query.device).expand(attention.query.shape[0], -1)
    if attention.present is not None:
        place = torch.where(attention.present, place, 0)
    return attention.rows(place.amax(1, keepdim=True)).mean(1).squeeze(1)
