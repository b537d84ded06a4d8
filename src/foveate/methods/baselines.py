"""What every method is compared with at the same budget. Plain down-sampling beats many published methods."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.method import Card, HostShape, InputError, Method, Stage, at, choice, floor_share, register, share, whole
from foveate.tokens import Tokens, compact, topk_in_order

_HOSTS = ("hf-vlm", "hf-vision", "hf-video", "timm")
_KEEP = {"keep": "share of the patches of each crop that is kept, in (0, 1]"}
_PLACED = _KEEP | {"place": "'output' of the vision encoder, or its 'patches' before the first layer (not in VLMs)"}


@register
class Dense(Method):
    """The model as it is."""

    card = Card(
        slug="dense", title="The unchanged model", arxiv="", kind="reduce", hosts=_HOSTS, baseline=True,
        summary="Changes nothing: what everything else is measured against.", identity={},
    )  # fmt: skip

    @classmethod
    def for_budget(cls, budget: float, host: HostShape) -> Method:
        if share("budget", budget) != 1:
            raise InputError("dense keeps everything; its budget is 1")
        return cls()


class _Placed(Method):
    """Acts behind the vision encoder, or before its first layer. For a budget it does the latter where there is no
    language model behind: there, tokens that go at the end have cost all that they can."""

    def __init__(self, *, keep: float = 0.5, place: str = "output") -> None:
        self.keep, self.place = share("keep", keep), choice("place", place, ("output", "patches"))

    @classmethod
    def for_budget(cls, budget: float, host: HostShape) -> Method:
        return cls(keep=share("budget", budget), place="output" if host.llm_layers else "patches")

    def acts_at(self, host: HostShape) -> tuple[str, ...]:
        return (f"vision.{self.place}",)

    def check(self, host: HostShape) -> None:
        if self.place == "patches" and host.llm_layers:
            raise InputError("place 'patches' is for vision models alone: what a language model reads goes at 'output'")


@register
class Random(_Placed):
    """Keeps `floor(keep * N)` patches drawn at random, the same ones in every crop of N patches."""

    card = Card(
        slug="random", title="Random patches", arxiv="", kind="reduce", hosts=_HOSTS, baseline=True,
        summary="Keeps patches drawn at random after the vision encoder.", identity={"keep": 1.0},
        parameters={**_PLACED, "seed": "seed of the draw"},
    )  # fmt: skip

    def __init__(self, *, keep: float = 0.5, place: str = "output", seed: int = 0) -> None:
        super().__init__(keep=keep, place=place)
        self.seed = whole("seed", seed)

    @at("vision.output")
    def draw(self, tokens: Tokens, at: Stage) -> Tokens:
        if self.keep == 1:
            return tokens
        batch, count = tokens.x.shape[:2]
        # On the CPU and one draw for all samples: the choice depends on neither the device nor the batch.
        score = torch.rand(count, generator=torch.Generator().manual_seed(self.seed)).to(tokens.x.device)
        chosen = topk_in_order(score.expand(batch, -1), floor_share(tokens.count, self.keep), tokens.valid)
        return tokens.keep(chosen)

    @at("vision.patches")
    def draw_first(self, tokens: Tokens, at: Stage) -> Tokens:
        return self.draw(tokens, at)


@register
class Grid(_Placed):
    """Keeps the patches nearest to the centres of a coarser grid: uniform sub-sampling without averaging."""

    card = Card(
        slug="grid", title="Uniform sub-sampling", arxiv="", kind="reduce", hosts=_HOSTS, baseline=True,
        summary="Keeps the patches at the centres of a coarser grid after the vision encoder.", identity={"keep": 1.0},
        parameters=_PLACED, coarse=True,
    )  # fmt: skip

    @at("vision.output")
    def sample(self, tokens: Tokens, at: Stage) -> Tokens:
        if self.keep == 1:
            return tokens
        height, width = at.signals.grid()
        rows, columns = coarser((height, width), self.keep)
        y = {int((row + 0.5) * height / rows) for row in range(rows)}
        x = {int((column + 0.5) * width / columns) for column in range(columns)}
        cell = tokens.position.round().long()
        on_row = torch.isin(cell[..., 1], torch.tensor(sorted(y), device=cell.device))
        on_column = torch.isin(cell[..., 2], torch.tensor(sorted(x), device=cell.device))
        return tokens.keep(compact(on_row & on_column & tokens.mask()))

    @at("vision.patches")
    def sample_first(self, tokens: Tokens, at: Stage) -> Tokens:
        return self.sample(tokens, at)


@register
class Pool(_Placed):
    """Averages neighbouring patches: the grid becomes the coarser one that comes nearest to the budget from below."""

    card = Card(
        slug="pool", title="Average pooling", arxiv="", kind="reduce", hosts=_HOSTS, baseline=True,
        summary="Averages neighbouring patches after the vision encoder.", identity={"keep": 1.0}, parameters=_PLACED,
        coarse=True,
    )  # fmt: skip

    @at("vision.output")
    def average(self, tokens: Tokens, at: Stage) -> Tokens:
        if self.keep == 1:
            return tokens
        height, width = at.signals.grid()
        rows, columns = coarser((height, width), self.keep)
        return tokens.pool((height / rows, width / columns))

    @at("vision.patches")
    def average_first(self, tokens: Tokens, at: Stage) -> Tokens:
        return self.average(tokens, at)


@register
class Resolution(Method):
    """Gives the vision encoder a smaller picture (antialiased), so that it too has fewer tokens."""

    card = Card(
        slug="resolution", title="Lower input resolution", arxiv="", kind="reduce", hosts=("hf-vlm", "hf-vision"),
        baseline=True, summary="Shrinks the picture before the vision encoder.", identity={"keep": 1.0},
        parameters=_KEEP, coarse=True,
    )  # fmt: skip

    def __init__(self, *, keep: float = 0.5) -> None:
        self.keep = share("keep", keep)

    @at("vision.pixels")
    def shrink(self, pixels: Tensor, at: Stage) -> Tensor:
        if self.keep == 1:
            return pixels
        height, width = at.signals.grid()
        rows, columns = coarser((height, width), self.keep)
        patch = pixels.shape[-2] // height, pixels.shape[-1] // width
        size = (rows * patch[0], columns * patch[1])
        small = F.interpolate(pixels.float(), size=size, mode="bilinear", antialias=True, align_corners=False)
        return small.to(pixels.dtype)


def coarser(grid: tuple[int, int], keep: float) -> tuple[int, int]:
    """(rows, columns) of the coarser grid with the most cells, at most `keep` of those of `grid`, at least one cell.

    Cells stretched beyond 3:2 are no fair down-sampling, however well they fill the budget; they are taken only where
    nothing else fits. Of grids with equally many cells, the one whose cells are nearest to square is taken.
    """
    height, width = grid
    budget = max(1, int(height * width * keep + 1e-9))
    shapes = [
        (rows, columns)
        for rows in range(1, min(height, budget) + 1)
        for columns in range(1, min(width, budget // rows) + 1)
    ]

    def stretch(shape: tuple[int, int]) -> float:
        return abs(math.log((height / shape[0]) / (width / shape[1])))

    fair = [shape for shape in shapes if stretch(shape) <= math.log(1.5) + 1e-9] or [min(shapes, key=stretch)]
    return max(fair, key=lambda shape: (shape[0] * shape[1], -stretch(shape)))
