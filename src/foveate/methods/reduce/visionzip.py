"""VisionZip: a few dominant tokens, and a few that stand for all the rest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.method import Card, Claim, HostShape, Method, Stage, at, equal_counts, register, share, whole, within
from foveate.tokens import Tokens, compact, topk_in_order


@register
class VisionZip(Method):
    """Keeps the patches that the class token attends to most and merges the others into a few contextual ones.

    Of N patches K are left, D dominant and T contextual ones, K = D + T. With `a (B, N)` the class token's attention in
    the encoder layer whose features are used, mean over heads (without a class token: the attention that each patch
    receives from all), the D patches with the greatest a are dominant and stay as they are. Of the others, T evenly
    spaced ones are targets; with k the same layer's keys, each of the rest joins the target with the greatest cosine
    `k_i . k_t / |k_i| |k_t|`, and a contextual token is the mean of all its members. The language model sees [dominant,
    in raster order | contextual, in raster order of their targets]: `(B, N, C) -> (B, K, C)`.

    VisionZip: Longer is Better but Not Necessary in Vision Language Models, CVPR 2025,
    https://arxiv.org/abs/2412.04467. Written from the paper and from what is known of its release, without a card.
    This project's choices: targets at `floor(i n / T)` of the n others, the plain mean over target and members, keys of
    all heads side by side, the class token is never handed on, and 10 of 64 tokens are contextual at every budget,
    rounded down (the paper has 10 of 64, 20 of 128 and 30 of 192).
    """

    card = Card(
        slug="visionzip", title="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
        arxiv="2412.04467", year=2024, kind="reduce",
        hosts=("hf-vlm", "hf-vision", "hf-video", "timm"), identity={"keep": 1.0},
        summary="Keeps the patches with most class-token attention, merges the rest into a few contextual tokens.",
        parameters={
            "keep": "share of the patches of each crop that is left, in (0, 1]; 64 of 576 is 1/9",
            "tokens": "number K of tokens left of each crop; overrides keep",
            "contextual": "share of what is left that is contextual, in [0, 1); 0 drops the rest instead",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(
                f"dominant tokens, {left} of 576 left", "value", figure, "settings of the paper (from memory)",
                tolerance=0, settings={"tokens": left}, value=lambda method: float(method.split(576)[0]),
            )
            for left, figure in ((192, 162), (128, 108), (64, 54))
        ),
        *(
            Claim(
                f"visual tokens per layer, {left} left", "tokens", left, "settings of the paper (from memory)",
                tolerance=0, architecture="llava-1.5-7b", settings={"tokens": left},
            )
            for left in (192, 128, 64)
        ),
        *(
            Claim(
                f"MACs of the visual tokens, {left} left", "flops", figure, "formula", tolerance=0.002,
                architecture="llava-1.5-7b", settings={"tokens": left}, counting="visual-macs",
            )
            # 32 (4 n d^2 + 2 n^2 d + 3 n d m), d = 4096, m = 11008.
            for left, figure in ((192, 1.253e12), (128, 0.833e12), (64, 0.416e12))
        ),
    )  # fmt: skip

    def __init__(self, *, keep: float = 1 / 9, tokens: int | None = None, contextual: float = 10 / 64) -> None:
        self.keep = share("keep", keep)
        self.tokens = tokens if tokens is None else whole("tokens", tokens, 1)
        self.contextual = within("contextual", contextual, "[0, 1)")

    def split(self, patches: int) -> tuple[int, int]:
        """(D, T): how many of `patches` tokens become dominant, and how many contextual ones are made of the rest."""
        left = max(1, int(patches * self.keep + 1e-9)) if self.tokens is None else min(self.tokens, patches)
        if left == patches:
            return patches, 0
        contextual = int(left * self.contextual + 1e-9)
        return left - contextual, contextual

    def reads(self, host: HostShape) -> tuple[str, ...]:
        return () if self.tokens is None and self.keep == 1 else (f"vision.attention[{host.feature_layer}]",)

    @at("vision.output")
    def zip(self, tokens: Tokens, at: Stage) -> Tokens:
        dominant, contextual = self.split(tokens.x.shape[1])
        if dominant == tokens.x.shape[1]:
            return tokens
        equal_counts(self.card.slug, tokens, at)
        layer = at.host.feature_layer
        score = at.signals.cls_attention(layer) if at.host.class_token else at.signals.received(layer)
        chosen = topk_in_order(score, dominant)
        if not contextual:
            return tokens.keep(chosen)
        return tokens.merge(groups(chosen, contextual, at.signals.keys(layer)), groups=dominant + contextual)


def groups(dominant: Tensor, contextual: int, keys: Tensor) -> Tensor:
    """(B, N): the new token of each old one.

    Args:
        dominant: (B, D), ascending, which become the new tokens 0..D-1.
        contextual: T, at most N - D; the others go into the new tokens D..D+T-1.
        keys: (B, N, K).
    """
    batch, count = keys.shape[:2]
    among = dominant.shape[1]
    device = keys.device
    is_rest = torch.ones(batch, count, dtype=torch.bool, device=device).scatter(1, dominant, False)
    rest = compact(is_rest)
    # Every sample has as many others, so that targets stand at the same places among them.
    at_targets = torch.arange(contextual, device=device) * rest.shape[1] // contextual
    unit = F.normalize(keys.float(), dim=-1).gather(1, rest.unsqueeze(-1).expand(-1, -1, keys.shape[2]))
    nearest = (unit @ unit[:, at_targets].transpose(-1, -2)).argmax(-1)
    # A target is in its own group, also where another one has the same key.
    nearest[:, at_targets] = torch.arange(contextual, device=device)
    into = torch.empty(batch, count, dtype=torch.long, device=device)
    into.scatter_(1, dominant, torch.arange(among, device=device).expand(batch, -1))
    return into.scatter_(1, rest, among + nearest)
