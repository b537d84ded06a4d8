"""HiRED: a fixed number of tokens for a high-resolution picture, dealt out to its crops by class-token attention."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.method import Card, Claim, HostShape, Method, Stage, at, choice, floor_share, register, share, within
from foveate.tokens import Tokens, topk_in_order


@register
class HiRed(Method):
    """Deals a fixed number of tokens out to thumbnail and crops, and keeps each one's most attended patches.

    A picture comes as a thumbnail and k crops on a grid, P = k + 1 partitions of M patches. With `c_l (P, M)` the
    attention of the class token to the patches in encoder layer l (softmax over all keys, class token included):

    * Budget: `N = floor(P M keep)` in all, `N_0 = min(floor(alpha N), M)` for the thumbnail and
      `N_sub = min(N - N_0, k M)` for the crops. Crop i gets `min(floor(N_sub s_i / sum_j s_j), M)`, where s_i is what
      `c_0` of the thumbnail sums to in the block of patches that shows crop i.
    * Choice: in each partition the patches with most `c_e`, e the layer whose features the model uses (22 of 24), in
      raster order and unchanged: `(P, M, C) -> (P, N_i, C)`, different numbers in one batch.

    A picture of a single partition (LLaVA-1.5) keeps its best `floor(M keep)`. Then the model packs what is left: the
    thumbnail, then the crops' patches row by row over all crops, without padding. What was spent on padding is lost,
    and floors lose up to k more, so never more than N patches arrive. The choice does not depend on the question.

    HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models in
    Resource-Constrained Environments, AAAI 2025, https://arxiv.org/abs/2408.10945.

    While it drops there are no newline tokens. With `newlines="whole"` (ours, as for other methods here) one stays
    where its whole row of patches does: at a `keep` near 1, a few tokens that are no patches come on top of N.

    What differs: the paper sums attention over heads, here it is the mean, which ranks and shares alike. An encoder
    without class token (SigLIP) is scored by the attention that each patch receives from all others, which is this
    project's substitute.
    """

    card = Card(
        slug="hired",
        title="HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models"
        " in Resource-Constrained Environments",
        arxiv="2408.10945", year=2024, kind="reduce", hosts=("hf-vlm",), identity={"keep": 1.0},
        summary="Gives each crop a share of a token budget and keeps its patches with most class-token attention.",
        parameters={
            "keep": "share of the patches of all partitions that may stay, in (0, 1]; the paper has 0.2 and 0.4",
            "alpha": "share of the budget for the thumbnail, in [0, 1]",
            "regions": "which patches of the thumbnail show a crop: 'blocks' (paper), or raster 'strips' (release)",
            "score": "of a crop: 'attention' in its region (paper), or a 'count' of top patches there (first release)",
            "newlines": "that stay, of any-resolution models: 'none', or those of rows that stay 'whole' (ours)",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(
                f"tokens of 5 partitions at most, keep = {keep}", "value", figure, "card", tolerance=0,
                settings={"keep": keep}, value=lambda hired: hired.limits(2880, 576)[0],
            )
            for keep, figure in ((0.2, 576), (0.4, 1152), (0.1, 288))
        ),
        *(
            Claim(
                f"of these in the {part}, keep = {keep}", "value", figure, "card", tolerance=0, settings={"keep": keep},
                value=value,
            )
            for part, value, figures in (
                ("thumbnail", lambda hired: hired.limits(2880, 576)[1], (288, 576, 144)),
                ("crops", lambda hired: hired.limits(2880, 576)[2], (288, 576, 144)),
            )
            for keep, figure in zip((0.2, 0.4, 0.1), figures)
        ),
        # What runs for these has five pictures of one partition each, which floor once each: 575 tokens for 576.
        *(
            Claim(
                f"MACs of the visual tokens, keep = {keep}", "flops", figure, "card", tolerance=0.005,
                architecture="llava-next-7b", settings={"keep": keep}, counting="visual-macs", visual=2880,
            )
            for keep, figure in ((1.0, 20.83e12), (0.4, 7.81e12), (0.2, 3.82e12))
        ),
        *(
            Claim(
                f"visual KV bytes, fp16, keep = {keep}", "kv_bytes", mebibytes * 2**20, "card", tolerance=0.002,
                architecture="llava-next-7b", settings={"keep": keep}, visual=2880,
            )
            for keep, mebibytes in ((1.0, 1440), (0.2, 288))
        ),
    )  # fmt: skip

    def __init__(
        self, *, keep: float = 0.2, alpha: float = 0.5, regions: str = "blocks", score: str = "attention",
        newlines: str = "none",
    ) -> None:  # fmt: skip
        self.keep = share("keep", keep)
        self.alpha = within("alpha", alpha, "[0, 1]")
        self.regions = choice("regions", regions, ("blocks", "strips"))
        self.score = choice("score", score, ("attention", "count"))
        self.newlines = choice("newlines", newlines, ("none", "whole"))

    def acts_at(self, host: HostShape) -> tuple[str, ...]:
        return ("vision.output",) if self.keep < 1 else ()

    def reads(self, host: HostShape) -> tuple[str, ...]:
        layers = sorted({0, host.feature_layer}) if self.keep < 1 else ()
        return tuple(f"vision.attention[{layer}]" for layer in layers)

    @at("vision.output")
    def drop(self, tokens: Tokens, at: Stage) -> Tokens:
        # Rows need not have the same number of tokens: the blocks of a resampled picture (LLaVA-OneVision) differ.
        pictures, present = at.signals.crops(), tokens.mask()
        first = None if all(picture.single for picture in pictures) else _attended(0, at) * present
        budget = floor_share(tokens.count, self.keep)
        for picture in pictures:
            if first is None or picture.single:
                continue
            thumbnail, crops = picture.rows.start, slice(picture.rows.start + 1, picture.rows.stop)
            region = self.region(tokens.position[thumbnail], at.signals.grid(), picture.grid)
            scores = self.crop_scores(first[thumbnail], region, picture.grid)
            there = tokens.count[picture.rows]
            _, budget[thumbnail], left = self.limits(int(there.sum()), int(there[0]))
            budget[crops] = (left * scores / scores.sum() + 1e-9).long().minimum(there[1:])
        return tokens.keep(topk_in_order(_attended(at.host.feature_layer, at), budget, tokens.valid))

    def limits(self, patches: int, thumbnail: int) -> tuple[int, int, int]:
        """(N, N_0, N_sub): tokens in all, of the thumbnail and of all crops.

        Args:
            patches: of all partitions together, P M where each has M.
            thumbnail: how many of these are the thumbnail's.
        """
        whole = _floor(patches * self.keep)
        first = min(_floor(self.alpha * whole), thumbnail)
        return whole, first, min(whole - first, patches - thumbnail)

    def region(self, position: Tensor, grid: tuple[int, int], crops: tuple[int, int]) -> Tensor:
        """(M,) long: the crop, counted row by row, that shows each patch of the thumbnail.

        Args:
            position: (M, 3) float, (t, y, x) of the patches.
            grid: (rows, columns) of patches.
            crops: (rows, columns) of crops.
        """
        _, y, x = position.double().unbind(-1)
        if self.regions == "strips":
            # The release reshapes the flat map to (rows, columns, -1), which cuts it in runs of consecutive patches.
            place = y * grid[1] + x
            return ((place + 0.5) * (crops[0] * crops[1]) / (grid[0] * grid[1])).long()
        row, column = (y + 0.5) * crops[0] / grid[0], (x + 0.5) * crops[1] / grid[1]
        return row.long() * crops[1] + column.long()

    def crop_scores(self, attention: Tensor, region: Tensor, crops: tuple[int, int]) -> Tensor:
        """(k,) float64, s_i of each crop, from the thumbnail's attention (M,) and the crop of each patch (M,)."""
        given = attention.double()
        if self.score == "count":
            top = topk_in_order(given.unsqueeze(0), _floor(len(given) * (1 - self.alpha)))[0]
            given = torch.zeros_like(given).scatter(0, top, 1.0)
        scores = given.new_zeros(crops[0] * crops[1]).scatter_add(0, region, given)
        # No hits at all (alpha = 1): nothing speaks for any crop.
        return scores if bool(scores.any()) else torch.ones_like(scores)


def _floor(value: float) -> int:
    """The whole number below, exact for products with decimal shares (0.29 * 100 is 28.999... in binary)."""
    return int(value + 1e-9)


def _attended(layer: int, at: Stage) -> Tensor:
    """(B, M): what the class token pays each patch; without one, what each patch receives from all (ours)."""
    return at.signals.cls_attention(layer) if at.host.class_token else at.signals.received(layer)
