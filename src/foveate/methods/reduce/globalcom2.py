"""GlobalCom²: of a high-resolution picture, the thumbnail decides what may stay of each crop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.method import (
    Card,
    Claim,
    Crops,
    HostShape,
    InputError,
    Method,
    Stage,
    at,
    choice,
    floor_share,
    register,
    share,
    within,
)
from foveate.tokens import Tokens, topk_in_order


@register
class GlobalCom2(Method):
    """The class token's scores on the thumbnail set how much each crop may keep, and vote on what it keeps.

    An any-resolution model sees a picture as a thumbnail and n crops of a larger version, N patches each. A patch's
    score is its logit for the class token in the encoder's last layer, `q_cls k / sqrt(d)`, before softmax, mean over
    heads. R is `keep`.

    * Thumbnail: the best `int(N R)` stay.
    * Budgets: the thumbnail's score map (H, W) is cut into as many blocks as there are crops, with sums s_j;
      `sigma = softmax(s / temperature)` over crops, and crop j has the ratio `r_j = min(1, R (1 + sigma_j - 1/n))`. The
      ratios add up to n R where none is clipped.
    * Crops: of the N_j patches of crop j that are no padding, the best `int(N_j r_j)` stay, by
      `(1 - mix) l / |l| + mix g / |g|`: l are the crop's own scores, g those of the thumbnail, bilinearly resized to
      the unpadded picture and cut along the crops' borders; norms are over the N_j patches.

    `(1 + n, N, C) -> (1 + n, K, C)` before the projector, K the most that any of them keeps; kept patches are
    unchanged, and crops stay stitched to one map that is read row by row.

    Compression with Global Guidance: Towards Training-free High-Resolution MLLMs Acceleration,
    https://arxiv.org/abs/2501.05179, and the release, from which this differs so:

    * With padding, the release writes a crop's survivors to the cells with the number that they have among the N_j,
      which shifts them. Here each stays in its own cell. There is no switch for it: a token would have to claim to be
      another patch.
    * The release keeps a newline for every row of the stitched map, rows of padding too. Here rows of padding have
      none, as in LLaVA-NeXT itself; the others' stay, on top of the budget. `newlines="whole"` keeps only those of rows
      of which every token stays, which is what `for_budget` does: methods are compared at equal numbers of tokens.
    * The released thumbnail is in falling order of scores (`order="score"`), and at R = 1 crops with a sigma below 1/n
      still lose tokens (`full="budgets"`).
    * The release leaves pictures of a single part alone (`single="bypass"`). By default they are treated as a
      thumbnail, so that LLaVA-1.5 is shortened too.

    Without a class token (SigLIP), and where the host joins patches to one token (InternVL), a token's score is
    `log(a / mean a)`, with a the attention that it receives from all (of a class token, where there is one): this
    project's substitute, which is a difference of logits too, so that the temperature means much the same.
    """

    card = Card(
        slug="globalcom2",
        title="Compression with Global Guidance: Towards Training-free High-Resolution MLLMs Acceleration",
        arxiv="2501.05179", year=2025, kind="reduce", hosts=("hf-vlm",), identity={"keep": 1.0},
        summary="The thumbnail's class-token scores set each crop's budget and vote on its patches.",
        parameters={
            "keep": "R, the share of all patches that is kept, in (0, 1]",
            "temperature": "tau, divisor of the sums of scores; a higher one makes budgets more alike",
            "mix": "alpha, weight of the thumbnail's scores against the crop's own, in [0, 1]",
            "order": "of the thumbnail's tokens: 'raster', or by falling 'score' (release)",
            "single": "what to do with a picture of one part: treat it as a 'thumbnail', or 'bypass' it (release)",
            "full": "what keep=1 means: 'bypass' the method, or apply the crops' 'budgets' (release)",
            "newlines": "that stay: of 'every' row of the crops (card, release), or of rows that stay 'whole'",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(
                f"FLOPs of the visual tokens, R = {keep}", "flops", tera * 1e12, "efficiency table",
                # Of 576 patches, 57 are kept at 0.1: 285 of 2880, where the table has 288.
                tolerance=0.02 if keep == 0.1 else 0.006, architecture=f"llava-next-{size}", settings={"keep": keep},
                counting="visual-flops", visual=2880,
            )
            for size, figures in (("7b", (41.7, 30.4, 19.7, 9.6, 3.8)), ("13b", (80.0, 58.7, 38.3, 18.7, 7.4)))
            for keep, tera in zip((1.0, 0.75, 0.5, 0.25, 0.1), figures)
        ),
        *(
            Claim(
                f"visual KV bytes, fp16, R = {keep}", "kv_bytes", figure, source,
                tolerance=0.012 if keep == 0.1 else 0.002, architecture="llava-next-7b", settings={"keep": keep},
                visual=2880,
            )
            for keep, figure, source in (
                # 1536.0 and 1126.4 are 1.5 and 1.1 "G" of 1024 M.
                (1.0, 1509.9e6, "card (1536.0 MB printed)"), (0.75, 1132.5e6, "card (1126.4 MB printed)"),
                (0.5, 755.0e6, "efficiency table"), (0.25, 377.0e6, "efficiency table"),
                (0.1, 151.0e6, "efficiency table"),
            )
        ),
        *(
            Claim(
                f"visual KV bytes, fp16, R = {keep}", "kv_bytes", tokens * 819_200, "card", tolerance=0,
                architecture="llava-next-13b", settings={"keep": keep}, visual=2880,
            )
            for keep, tokens in ((0.5, 1440), (0.25, 720))
        ),
    )  # fmt: skip

    def __init__(
        self,
        *,
        keep: float = 0.25,
        temperature: float = 10.0,
        mix: float = 0.5,
        order: str = "raster",
        single: str = "thumbnail",
        full: str = "bypass",
        newlines: str = "every",
    ) -> None:
        self.keep = share("keep", keep)
        self.temperature = within("temperature", temperature, "(0, inf)")
        self.mix = within("mix", mix, "[0, 1]")
        self.order = choice("order", order, ("raster", "score"))
        self.single = choice("single", single, ("thumbnail", "bypass"))
        self.full = choice("full", full, ("bypass", "budgets"))
        self.newlines = choice("newlines", newlines, ("every", "whole"))

    @classmethod
    def for_budget(cls, budget: float, host: HostShape) -> Method:
        return cls(keep=share("budget", budget), newlines="whole")

    def reads(self, host: HostShape) -> tuple[str, ...]:
        return () if self._bypassed else (f"vision.attention[{host.vision_layers - 1}]",)

    @at("vision.output")
    def compress(self, tokens: Tokens, at: Stage) -> Tokens:
        if self._bypassed:
            return tokens
        score = scores(tokens, at)
        left = floor_share(tokens.count, self.keep)
        candidates = tokens.mask().clone()
        opens = torch.zeros_like(left, dtype=torch.bool)
        for picture in at.signals.crops():
            rows, first = picture.rows, picture.rows.start
            opens[first] = True
            if picture.single:
                if self.single == "bypass":
                    left[rows] = tokens.count[rows]
                continue
            if bool((tokens.source[first] < 0).any()):
                raise InputError("globalcom2 needs the whole thumbnail; let no other method drop patches before it")
            crops = slice(first + 1, rows.stop)
            packed = picture.packed[1:].to(score.device)
            source, count = tokens.source[crops], score.shape[1]
            # In patches, so that merged tokens (or a host's own cells) count as what they cover.
            thumbnail = score[first].gather(0, tokens.source[first]).reshape(at.signals.grid())
            patches = summed(packed.float(), source, count)
            candidates[crops] &= patches > 0
            there = candidates[crops]
            ratio = self.budgets(thumbnail, picture.grid)
            left[crops] = (there.sum(1) * ratio + 1e-9).long()
            command = summed(cut(thumbnail, picture, packed), source, count) / patches.clamp(min=1)
            own = F.normalize(score[crops] * there, dim=1)
            score[crops] = (1 - self.mix) * own + self.mix * F.normalize(command * there, dim=1)
        chosen = topk_in_order(score, left, candidates)
        if self.order == "score":
            value = score.gather(1, chosen.clamp(min=0)).masked_fill(chosen < 0, float("-inf"))
            falling = chosen.gather(1, torch.sort(value, dim=1, descending=True, stable=True).indices)
            chosen = torch.where(opens.unsqueeze(1), falling, chosen)
        return tokens.keep(chosen)

    def budgets(self, thumbnail: Tensor, grid: tuple[int, int]) -> Tensor:
        """(n,) float64 in (0, 1]: r_j of each crop, row by row, from the thumbnail's scores (H, W).

        Blocks have `H // rows` by `W // columns` patches, those at the end also what is left over.
        """
        rows, columns = grid
        height, width = thumbnail.shape
        y = (torch.arange(height, device=thumbnail.device) // max(1, height // rows)).clamp(max=rows - 1)
        x = (torch.arange(width, device=thumbnail.device) // max(1, width // columns)).clamp(max=columns - 1)
        block = (y[:, None] * columns + x).flatten()
        total = thumbnail.new_zeros(rows * columns, dtype=torch.float64)
        total.index_add_(0, block, thumbnail.flatten().double())
        sigma = (total / self.temperature).softmax(0)
        return (self.keep * (1 + sigma - sigma.mean())).clamp(max=1)

    @property
    def _bypassed(self) -> bool:
        return self.keep == 1 and self.full == "bypass"


def scores(tokens: Tokens, at: Stage) -> Tensor:
    """(B, N) float32: the class token's scaled logit for each token, before softmax, in the encoder's last layer.

    Without a class token, or of joined patches, the substitute of `GlobalCom2`.
    """
    layer = at.host.vision_layers - 1
    if at.host.class_token and at.host.joined == 1:
        attention = at.signals.attention(layer)
        logit = attention.query[:, :, :1].float() @ attention.key.float().transpose(-1, -2)
        return (logit.mean(1).squeeze(1) * attention.scaling).gather(1, attention.visual)
    paid = at.signals.cls_attention(layer) if at.host.class_token else at.signals.received(layer)
    paid = paid.float() * tokens.mask()
    mean = paid.sum(1, keepdim=True) / tokens.count.clamp(min=1).unsqueeze(1)
    tiny = torch.finfo(torch.float32).tiny
    return (paid.clamp(min=tiny) / mean.clamp(min=tiny)).log()


def cut(thumbnail: Tensor, picture: Crops, packed: Tensor) -> Tensor:
    """(n, N): the thumbnail's score at each patch of the crops, 0 in padding; packed (n, N) is False there."""
    (rows, columns), (height, width) = picture.grid, thumbnail.shape
    whole = packed.reshape(rows, columns, height, width).transpose(1, 2).reshape(rows * height, columns * width)
    high, wide = whole.any(1), whole.any(0)
    size = (int(high.sum()), int(wide.sum()))
    resized = F.interpolate(thumbnail[None, None], size=size, mode="bilinear", align_corners=False)
    stitched = thumbnail.new_zeros(whole.shape)
    stitched[high[:, None] & wide] = resized.flatten()
    return stitched.reshape(rows, height, columns, width).transpose(1, 2).reshape(rows * columns, -1)


def summed(values: Tensor, source: Tensor, count: int) -> Tensor:
    """(B, count): the sum over the patches of each token; values and source are (B, M)."""
    return values.new_zeros(len(values), count + 1).scatter_add(1, source % (count + 1), values)[:, :-1]
