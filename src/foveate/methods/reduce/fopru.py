"""FoPru: focal pruning by the attention that patches receive in the vision encoder."""

from __future__ import annotations

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
    at_depth,
    choice,
    floor_share,
    register,
    share,
    whole,
)
from foveate.nn.attention import Attention
from foveate.tokens import Tokens, compact, topk_in_order


@register
class FoPru(Method):
    """Keeps the patches that receive most attention in the vision encoder, or the rows of patches that do.

    With `A (B, H, S, S)` the attention of the encoder layer whose features the model uses, patch j is as significant
    as the attention it receives, `s_j = mean_i mean_h A[h, i, j]`. The rank strategy keeps the `floor(keep * N)` most
    significant patches of each crop; the row strategy the `floor(keep * rows)` rows with the greatest sum, for content
    that has to stay in one piece, like lines of text; neither keeps less than one. What is kept stays in reading order
    and is not changed: `(B, N, C) -> (B, K, C)`.

    FoPru: Focal Pruning for Efficient Large Vision-Language Models, https://arxiv.org/abs/2411.14164. The three
    steps (significance, pruning, reordering) and both strategies are the paper's. The attention layer, the mean over
    heads and rows, and that each crop is pruned by itself could not be confirmed: those are this project's reading.
    """

    card = Card(
        slug="fopru", title="FoPru: Focal Pruning for Efficient Large Vision-Language Models", arxiv="2411.14164",
        year=2024, kind="reduce", hosts=("hf-vlm", "hf-vision", "hf-video", "timm"), identity={"keep": 1.0},
        summary="Keeps the patches (or rows of patches) that receive most attention in the vision encoder.",
        parameters={
            "keep": "share of the patches (or rows) of each crop that is kept, in (0, 1]",
            "strategy": "'rank': single patches; 'row': whole rows of the grid",
            "queries": "whose attention counts: 'all' tokens, only 'patches', or only the 'class' token",
            "layer": "encoder layer that is looked at, 0-based; None: the one whose features the model uses",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(
                f"prefill FLOPs, 40 text tokens, keep {keep}", "flops", figure, "card", tolerance=0.005,
                architecture="llava-1.5-7b", settings={"keep": keep}, counting="llm-viewer", text=40,
            )
            for keep, figure in ((1.0, 8.18e12), (0.75, 6.23e12), (0.5, 4.31e12), (0.25, 2.40e12))
        ),
        *(
            Claim(
                f"MACs of the visual tokens, keep {keep}", "flops", figure, "card", tolerance=0.005,
                architecture="llava-1.5-7b", settings={"keep": keep}, counting="visual-macs",
            )
            for keep, figure in ((1.0, 3.82e12), (0.75, 2.85e12), (0.5, 1.89e12), (0.25, 0.94e12))
        ),
        *(
            Claim(
                f"visual tokens kept of 576, {strategy}, keep {keep}", "tokens", figure, "card", tolerance=0,
                architecture="llava-1.5-7b", settings={"keep": keep, "strategy": strategy},
            )
            for strategy in ("rank", "row") for keep, figure in ((0.75, 432), (0.5, 288), (0.25, 144))
        ),
        *(
            Claim(
                f"prefill FLOPs on Llama-3-8B, 2880 visual tokens, keep {keep}", "flops", figure, "card",
                tolerance=0.01, architecture="llava-next-llama3-8b", settings={"keep": keep}, counting="llm-viewer",
                visual=2880, text=40,
            )
            for keep, figure in ((1.0, 45.3e12), (0.75, 33.3e12), (0.5, 21.8e12), (0.25, 10.9e12), (0.002, 0.63e12))
        ),
        Claim(
            "visual KV bytes at keep 0.25 (a quarter of 301,989,888)", "kv_bytes", 75_497_472, "card", tolerance=0,
            architecture="llava-1.5-7b", settings={"keep": 0.25},
        ),
    )  # fmt: skip

    def __init__(
        self, *, keep: float = 0.5, strategy: str = "rank", queries: str = "all", layer: int | None = None
    ) -> None:
        self.keep = share("keep", keep)
        self.strategy = choice("strategy", strategy, ("rank", "row"))
        self.queries = choice("queries", queries, ("all", "patches", "class"))
        self.layer = layer if layer is None else whole("layer", layer)

    def reads(self, host: HostShape) -> tuple[str, ...]:
        return () if self.keep == 1 else (f"vision.attention[{self._layer(host)}]",)

    def check(self, host: HostShape) -> None:
        if self.layer is not None:
            at_depth("layer", self.layer, host.vision_layers)
        if self.queries == "class" and not host.class_token:
            raise InputError("queries='class': this vision encoder has no class token; use 'all' or 'patches'")

    @at("vision.output")
    def prune(self, tokens: Tokens, at: Stage) -> Tokens:
        if self.keep == 1:
            return tokens
        layer = self._layer(at.host)
        if self.queries == "class":
            score = at.signals.cls_attention(layer)
        elif self.queries == "patches" and at.host.prefix:
            score = significance(at.signals.attention(layer), self.queries, at.host.prefix)
        else:
            score = at.signals.received(layer)
        if self.strategy == "rank":
            return tokens.keep(topk_in_order(score, floor_share(tokens.count, self.keep), tokens.valid))
        return tokens.keep(best_rows(score, tokens, at.signals.grid()[0], self.keep))

    def _layer(self, host: HostShape) -> int:
        return host.feature_layer if self.layer is None else self.layer


def significance(attention: Attention, queries: str, prefix: int) -> Tensor:
    """(B, N): the attention that each patch receives, mean over heads and over the rows in `queries`."""
    asked = torch.ones(attention.query.shape[0], attention.length, dtype=torch.bool, device=attention.query.device)
    if attention.present is not None:
        asked &= attention.present
    if queries == "patches":
        asked[:, :prefix] = False
    # The class column is left out only here, after the softmax: it is no candidate, but it takes its attention.
    return attention.received(asked).gather(1, attention.visual)


def best_rows(score: Tensor, tokens: Tokens, rows: int, keep: float) -> Tensor:
    """Indices (B, K), ascending, of all tokens in the rows with the greatest sum of `score` (B, N).

    `floor(keep * r)` rows, at least 1, where r of the grid's `rows` have a token at all.
    """
    row = tokens.position[..., 1].round().long().clamp(0, rows - 1)
    mask = tokens.mask()
    total = score.new_zeros(score.shape[0], rows).scatter_add(1, row, score * mask)
    filled = torch.zeros_like(total).scatter_add(1, row, mask.to(total.dtype)) > 0
    best = topk_in_order(total, floor_share(filled.sum(1), keep), filled)
    return compact((row.unsqueeze(-1) == best.unsqueeze(1)).any(-1) & mask)
