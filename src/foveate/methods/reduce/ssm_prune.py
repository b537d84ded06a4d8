"""ToP: token pruning for vision state-space models, whose scans still know where the pruned tokens were."""

from __future__ import annotations

import functools
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from foveate.method import Card, Claim, InputError, Published, choice, configured, register, share, whole
from foveate.nn.selective_scan import SelectiveScan
from foveate.nn.vit import take_weights
from foveate.tokens import take

_VIM_SMALL: dict[str, Any] = {"family": "vim", "width": 384, "depth": 24, "start": 5, "gap": 5, "stop": 20}
_PLAIN: dict[str, Any] = {"family": "plain-mamba", "depth": 24}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "vim-t": _VIM_SMALL | {"width": 192, "start": 10, "gap": 10, "stop": 24},
    "vim-s": _VIM_SMALL,
    "plain-mamba-l1": _PLAIN | {"width": 192, "start": 5, "gap": 5, "stop": 20},
    "plain-mamba-l2": _PLAIN | {"width": 384, "start": 5, "gap": 5, "stop": 20},
    "plain-mamba-l3": _PLAIN | {"width": 448, "depth": 36, "start": 6, "gap": 3, "stop": 20},
    "tiny": {
        "family": "vim", "image": 96, "patch": 8, "width": 64, "depth": 4, "states": 4, "classes": 40,
        "start": 1, "gap": 1, "stop": 4, "keep": 0.8,
    },
}  # fmt: skip
"""Arguments of `SsmPrune` by name: the paper's models and this project's "tiny". ViM's schedules are the paper's (the
release stops before layer 20, which ViM-T's needs lifted); PlainMamba's are not known: ours, L3's chosen so that as
much of the FLOPs goes as in the paper."""

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "clip": lambda y: y.clamp(min=0).sum(-1),
    "l1": lambda y: y.abs().sum(-1),
    "l2": lambda y: y.square().sum(-1).sqrt(),
    "sum": lambda y: y.sum(-1),
}
"""How a token's outputs (…, D') become its importance; all but "clip" are the paper's ablation."""

_STEM = 48
_Array = np.ndarray[Any, Any]


def _meta(name: str, **changes: Any) -> Callable[[], nn.Module]:
    return lambda: SsmPrune.named(name, **changes)


@functools.lru_cache(maxsize=16)
def _ran(name: str, keep: float | None = None) -> tuple[float, tuple[int, ...]]:
    """Multiply-adds of one picture, and tokens at each layer."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = SsmPrune.named(name, **({} if keep is None else {"keep": keep})).eval()
        seen = model.stages(torch.empty(1, 3, 224, 224))
    return counter.get_total_flops() / 2, tuple(seen.counts)


def _tokens_after(name: str, layer: int) -> Callable[[Any], float]:
    return lambda _: float(_ran(name)[1][layer])


def _mean_tokens(name: str) -> Callable[[Any], float]:
    def count(_: Any) -> float:
        counts = _ran(name)[1]
        return sum(counts) / len(counts) / counts[0]

    return count


def _cost(name: str) -> Callable[[Any], float]:
    return lambda _: _ran(name)[0] / _ran(name, 1.0)[0]


@register
class SsmPrune(Published, nn.Module, PyTorchModelHubMixin, library_name="foveate"):
    """A Mamba-like vision backbone (Vision Mamba or PlainMamba) that drops tokens after some of its layers.

    Each layer is `X + W_out y(norm(X))`, X (B, N, C), with y (B, N, D') the scan's output behind the gate. After layer
    l = start, start + gap, … < stop (from 1), of n tokens (the class token left out) K stay:

    - importance `S_i = sum_d max(0, y_di)`; in ViM y is the mean of both directions, in natural order.
    - PlainMamba: `K = ceil(n keep)`, in raster order. ViM: K counts the class token too and is made odd, K + 1 where
      it is even; the K - 1 best patches stay in order, the class token between their halves.
    - `align="decay"`: between two kept tokens of a scan, a pruned position takes over its predecessor's state,
      `h_p = exp(Delta_p A) h_{p-1}`: what a token of zeros does, `Delta_p = softplus(b)`. No y_p is computed: with k
      pruned positions before it a kept one has `h_t = exp((Delta_t + k softplus(b)) A) h_{t-1} + Delta_t B_t x_t`.
    - `align="copy"`: `h_p = h_{p-1}`. `align="none"`: the tokens are numbered anew and placed so, as in ViTs.

    With decay and copy, convolutions and 2-D scan orders see the kept tokens where they were, and zeros where pruned
    ones were. Pictures (B, 3, H, W) -> logits (B, classes).

    Exploring Token Pruning in Vision State Space Models, NeurIPS 2024, https://arxiv.org/abs/2409.18962, section 4,
    eq. 5 and 6. The authors' repository has no kernel of the alignment, so decay or copy, Delta_p, zeros in
    convolutions, and where the class token stands among pruned ones (in the middle, as far as its neighbours in the
    list allow) are this project's reading. It scores with the backward scan, not flipped back, and without the clip.

    Args:
        family: "vim" (two scans with weights of their own, a class token in the middle, RMSNorm) or "plain-mamba"
            (four snaking scans of the grid with shared weights, a 7x7 depthwise convolution, mean of all tokens).
        image, patch: px; width C, depth layers, states a channel; D' = 2 C; classes 0 for no classifier.
        start, gap, stop: see above.
        keep: in (0, 1]; 1 is the dense model.
        align: see above.
        score: a name in `SCORES`.
        scored: "all" directions or, of ViM, "backward" alone.

    Raises:
        InputError: for numbers that do not go together.
    """

    start: int
    gap: int
    stop: int
    keep: float
    align: str
    score: str
    scored: str

    card = Card(
        slug="ssm-prune", title="Exploring Token Pruning in Vision State Space Models", arxiv="2409.18962", year=2024,
        kind="reduce", hosts=(), training_free=False,
        summary="Prunes tokens of Vision Mamba and PlainMamba; the scans' states pass over where they were.",
        parameters={
            "family": "'vim' or 'plain-mamba'",
            "image": "side of the picture in pixels",
            "patch": "side of a patch in pixels",
            "width": "channels",
            "depth": "layers",
            "states": "states of the scan for each channel",
            "classes": "outputs of the classifier, 0 for none",
            "start": "after which layer tokens are pruned first, from 1",
            "gap": "layers between two prunings",
            "stop": "no pruning after this layer or a later one",
            "keep": "share of the tokens that each pruning keeps, in (0, 1]",
            "align": "what a scan does at pruned positions: 'decay', 'copy', or 'none', they are forgotten",
            "score": "importance of a token's outputs: 'clip', 'l1', 'l2' or 'sum'",
            "scored": "'all' directions' outputs, or ViM's 'backward' ones",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(f"parameters of {name}", "parameters", figure, source, tolerance=tolerance, model=_meta(name))
            for name, figure, source, tolerance in (
                ("vim-s", 25_796_584, "card", 0.0), ("vim-t", 7e6, "table of results, rounded", 0.03),
                ("plain-mamba-l1", 7.3e6, "table of results; the stem is ours", 0.01),
                ("plain-mamba-l2", 25.7e6, "table of results; the stem is ours", 0.01),
                ("plain-mamba-l3", 50.5e6, "table of results; the stem is ours", 0.01),
            )
        ),
        *(
            Claim(
                f"tokens of {name} after layer {layer}", "value", figure, "card", tolerance=0,
                value=_tokens_after(name, layer),
            )
            for name, layer, figure in (
                ("vim-s", 5, 157), ("vim-s", 10, 125), ("vim-s", 15, 101), ("vim-t", 10, 157), ("vim-t", 20, 125),
            )
        ),
        *(
            Claim(f"mean share of the tokens, {name}", "value", figure, "card", value=_mean_tokens(name))
            for name, figure in (("vim-s", 0.699), ("vim-t", 0.854))
        ),
        *(
            Claim(f"MACs of {name} pruned, as a share", "value", figure, source, value=_cost(name))
            for name, figure, source in (
                ("vim-s", 3.60 / 5.10, "card, from memory"), ("vim-t", 1.28 / 1.50, "card, from memory"),
                ("plain-mamba-l3", 1 - 0.416, "abstract; the schedule is ours"),
            )
        ),
    )  # fmt: skip

    def __init__(
        self, *, family: str = "vim", image: int = 224, patch: int = 16, width: int = 384, depth: int = 24,
        states: int = 16, classes: int = 1000, start: int = 5, gap: int = 5, stop: int = 20, keep: float = 0.8,
        align: str = "decay", score: str = "clip", scored: str = "all",
    ) -> None:  # fmt: skip
        super().__init__()
        self.family = choice("family", family, ("vim", "plain-mamba"))
        self.image, self.classes = whole("image", image, 1), whole("classes", classes)
        if self.image % whole("patch", patch, 1):
            raise InputError(f"image must be a multiple of patch, not {image} with {patch}")
        if family == "plain-mamba" and patch % 2:
            raise InputError(f"patch must be even: the stem of plain-mamba halves the picture, not {patch}")
        side, whole_width = image // patch, whole("width", width, 1)
        self.grid = (side, side)
        self.set_pruning(start=start, gap=gap, stop=stop, keep=keep, align=align, score=score, scored=scored)
        count = side**2
        if family == "vim":
            if count % 2:
                raise InputError(f"vim's class token has as many patches before as after it: not {side} x {side}")
            self.patch_embed: nn.Sequential = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, patch, patch)))
            self.cls_token = nn.Parameter(torch.empty(1, 1, width))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
            count += 1
        else:
            self.patch_embed = _stem(width, patch)
        self.pos_embed = nn.Parameter(torch.empty(1, count, width))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        shape = {"width": whole_width, "states": whole("states", states, 1), "rank": math.ceil(width / 16)}
        self.layers = nn.ModuleList(
            _Layer(VimMixer(**shape, length=count), nn.RMSNorm(width, eps=1e-5))
            if family == "vim" else _Layer(PlainMixer(**shape, grid=self.grid), nn.LayerNorm(width))
            for _ in range(whole("depth", depth, 1))
        )  # fmt: skip
        for layer in self.layers:
            # As many residual branches as layers add up.
            layer.mixer.out_proj.weight.data.div_(math.sqrt(depth))  # type: ignore[union-attr, operator]
        self.norm_f = nn.RMSNorm(width, eps=1e-5) if family == "vim" else nn.LayerNorm(width)
        self.head = nn.Linear(width, classes) if classes else nn.Identity()

    @classmethod
    def named(cls, name: str, **changes: Any) -> SsmPrune:
        """The model of a name in `CONFIGURATIONS`, with some arguments changed, random weights."""
        return cls(**configured(name, CONFIGURATIONS, changes))

    def set_pruning(
        self, *, start: int | None = None, gap: int | None = None, stop: int | None = None, keep: float | None = None,
        align: str | None = None, score: str | None = None, scored: str | None = None,
    ) -> SsmPrune:  # fmt: skip
        """Changes the rule under the same weights; returns the model."""
        for name, value, least in (("start", start, 1), ("gap", gap, 1), ("stop", stop, 0)):
            if value is not None:
                setattr(self, name, whole(name, value, least))
        if keep is not None:
            self.keep = share("keep", keep)
        if align is not None:
            self.align = choice("align", align, ("decay", "copy", "none"))
        if score is not None:
            self.score = choice("score", score, tuple(SCORES))
        if scored is not None:
            self.scored = choice("scored", scored, ("all", "backward") if self.family == "vim" else ("all",))
        return self

    def load_backbone(self, state: Mapping[str, Tensor]) -> list[str]:
        """Takes a state dict of this class, or of a released ViM with bidirectional Mamba ("v2") and the class token in
        the middle. Returns the names of weights that it does not have in the right shape."""
        return take_weights(self, {_own_name(name): weight for name, weight in state.items()})

    @property
    def prunes_after(self) -> range:
        """Layers, from 1, after which tokens go."""
        return range(self.start, self.stop, self.gap)

    def kept(self, count: int) -> int:
        """How many of `count` tokens stay; of ViM both numbers have the class token in them."""
        # 0.8 of 5 is 4.000…1 in binary.
        patches = math.ceil((count - (self.family == "vim")) * self.keep - 1e-9)
        if self.family == "vim":
            patches += 1 - patches % 2
        return min(count, patches)

    def embed(self, pictures: Tensor) -> Tensor:
        """(B, N, C): what enters the first layer."""
        if tuple(pictures.shape[2:]) != (self.image, self.image):
            raise InputError(f"pictures must be {self.image} x {self.image} px, not {tuple(pictures.shape[2:])}")
        x: Tensor = self.patch_embed(pictures).flatten(2).transpose(1, 2)
        if self.family == "vim":
            middle = x.shape[1] // 2
            x = torch.cat([x[:, :middle], self.cls_token.expand(len(x), -1, -1), x[:, middle:]], 1)
        return x + self.pos_embed

    def stages(self, pictures: Tensor) -> Stages:
        """Everything up to the final norm, and which tokens there were."""
        x = self.embed(pictures)
        positions = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
        where, kept, counts = None, [positions], []
        for number, layer in enumerate(self.layers, 1):
            norm: Any = layer.norm
            mixer: Any = layer.mixer
            counts.append(x.shape[1])
            y, scored = mixer.inner(norm(x), where, self.align == "decay")
            x = x + mixer.out_proj(y)
            if number in self.prunes_after and self.kept(x.shape[1]) < x.shape[1]:
                x, positions = self.shorten(x, positions, y if self.scored == "all" else scored)
                kept.append(positions)
                where = self.places(positions)
        return Stages(x, tuple(kept), tuple(counts))

    def shorten(self, x: Tensor, positions: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, K, C) and their original positions (B, K), of (B, N, C), (B, N), and outputs y (B, N, D')."""
        index = self.choose(y)
        return take(x, index), positions.gather(1, index)

    @torch.no_grad()
    def choose(self, y: Tensor) -> Tensor:
        """Indices (B, K) of the tokens that stay, ascending, of their outputs y (B, N, D')."""
        score = SCORES[self.score](y.float())
        keep, count = self.kept(y.shape[1]), y.shape[1]
        if self.family != "vim":
            return score.topk(keep, 1).indices.sort(1).values
        middle = count // 2
        patches = torch.cat([score[:, :middle], score[:, middle + 1 :]], 1)
        best = patches.topk(keep - 1, 1).indices.sort(1).values
        best = best + (best >= middle)
        half = keep // 2
        return torch.cat([best[:, :half], best.new_full((len(best), 1), middle), best[:, half:]], 1)

    def places(self, positions: Tensor) -> Tensor | None:
        """(B, K): where the mixers see the kept tokens, of their original positions (B, K); None for side by side.

        PlainMamba's are on the grid. ViM's are strictly increasing, in 0..N-1: a patch behind the class token in the
        list is behind it here too, and so one place further than its number among the patches.
        """
        if self.align == "none":
            if self.family == "vim":
                return None
            return torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
        if self.family != "vim":
            return positions
        half, middle = positions.shape[1] // 2, self.pos_embed.shape[1] // 2
        number = positions - (positions > middle).long()
        before, own, after = number[:, :half], number[:, half : half + 1], number[:, half + 1 :]
        if half:
            own = own.maximum(before[:, -1:] + 1).minimum(after[:, :1])
        return torch.cat([before, own, after + 1], 1)

    def forward_features(self, pictures: Tensor) -> Tensor:
        """(B, K, C): the tokens at the end, with the final norm."""
        normed: Tensor = self.norm_f(self.stages(pictures).x)
        return normed

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Logits (B, classes) of the class token, in the middle, or of the mean of all."""
        logits: Tensor = self.head(tokens[:, tokens.shape[1] // 2] if self.family == "vim" else tokens.mean(1))
        return logits

    def forward(self, pictures: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(pictures))


@dataclass(frozen=True, eq=False)
class Stages:
    """A run of `SsmPrune`.

    Attributes:
        x: (B, K, C), before the final norm.
        positions: original positions (B, n) in the sequence, class token included, at first and after each pruning.
        counts: tokens at each layer.
    """

    x: Tensor
    positions: tuple[Tensor, ...]
    counts: tuple[int, ...]


class _Layer(nn.Module):
    def __init__(self, mixer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixer = norm, mixer


class VimMixer(nn.Module):
    """Vision Mamba's two scans ("v2"): `y = (SSM_f(conv_f(u)) + SSM_b(conv_b(u))) SiLU(z) / 2`, `[u | z] = x W`.

    Convolutions are causal over 4 positions in each direction, with SiLU behind.
    """

    def __init__(self, *, width: int, states: int, rank: int, length: int) -> None:
        super().__init__()
        inner = 2 * width
        self.length = length
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.convs = nn.ModuleList(nn.Conv1d(inner, inner, 4, groups=inner) for _ in range(2))
        self.scans = nn.ModuleList(SelectiveScan(inner, states, rank) for _ in range(2))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def inner(self, x: Tensor, where: Tensor | None = None, decay: bool = False) -> tuple[Tensor, Tensor]:
        """y (B, K, D') of both directions, and of the backward one alone.

        `where` (B, K): places of the tokens in the dense sequence of `length`, ascending; None for side by side.
        """
        u, z = self.in_proj(x).chunk(2, -1)
        outputs = []
        for backward, (conv, scan) in enumerate(zip(self.convs, self.scans)):
            way, place = u, where
            if backward:
                way = u.flip(1)
                # Counted from the last token; what is beyond it does not matter.
                place = None if where is None else (where[:, -1:] - where).flip(1)
            way = F.silu(_causal(conv, way, place, self.length))
            y = scan(way, _missing(place) if decay and place is not None else None)
            outputs.append((y.flip(1) if backward else y) * F.silu(z))
        return (outputs[0] + outputs[1]) / 2, outputs[1]

    def forward(self, x: Tensor, where: Tensor | None = None, decay: bool = False) -> Tensor:
        out: Tensor = self.out_proj(self.inner(x, where, decay)[0])
        return out


class PlainMixer(nn.Module):
    """PlainMamba's: `y = SiLU(z) sum_o SSM_o(conv(u))` over four orders o of the grid (`snakes`), with shared weights.

    Each scan adds to B a vector for the direction in which it came to a position, with all tokens there.
    """

    def __init__(self, *, width: int, states: int, rank: int, grid: tuple[int, int]) -> None:
        super().__init__()
        inner = 2 * width
        self.grid = grid
        self.in_proj = nn.Linear(width, 2 * inner)
        self.conv2d = nn.Conv2d(inner, inner, 7, padding=3, groups=inner)
        self.ssm = SelectiveScan(inner, states, rank)
        self.directions = nn.Parameter(torch.empty(5, states))
        nn.init.trunc_normal_(self.directions, std=0.02)
        self.out_proj = nn.Linear(inner, width)

    def inner(self, x: Tensor, where: Tensor | None = None, decay: bool = False) -> tuple[Tensor, Tensor]:
        """y (B, K, D'), twice. `where` (B, K): the tokens' places on the grid, row by row; None for all, in order."""
        u, z = self.in_proj(x).chunk(2, -1)
        batch, cells = len(u), self.grid[0] * self.grid[1]
        plane = u if where is None else _spread(u, where, cells)
        plane = F.silu(self.conv2d(plane.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2))
        u = plane if where is None else take(plane, where)
        step, write, read = self.ssm.select(u)
        if where is None:
            where = torch.arange(cells, device=u.device).expand(batch, -1)
        ranks, came = (torch.from_numpy(table).to(u.device) for table in snakes(self.grid))
        # All four orders in one scan, each a part of the batch.
        rank, order = ranks[:, where].sort(-1)
        turned = [torch.cat([take(one, index) for index in order]) for one in (u, step, write, read)]
        u, step, write, read = turned
        write = write + self.directions[came[:, where].gather(-1, order).flatten(0, 1)]
        y = self.ssm.scan(u, step, write, read, _missing(rank.flatten(0, 1)) if decay else None)
        back = order.flatten(0, 1).argsort(-1)
        y = take(y, back).unflatten(0, (4, batch)).sum(0) * F.silu(z)
        return y, y

    def forward(self, x: Tensor, where: Tensor | None = None, decay: bool = False) -> Tensor:
        out: Tensor = self.out_proj(self.inner(x, where, decay)[0])
        return out


def _missing(place: Tensor) -> Tensor:
    """(B, K): how many places are left out right before each of `place`, ascending. The first has no state before."""
    return F.pad(place.diff(dim=1) - 1, (1, 0))


def _spread(x: Tensor, place: Tensor, length: int) -> Tensor:
    """(B, length, D): x (B, K, D) at `place` (B, K), zeros elsewhere."""
    return x.new_zeros(len(x), length, x.shape[2]).scatter(1, place.unsqueeze(2).expand_as(x), x)


def _causal(conv: Any, x: Tensor, place: Tensor | None, length: int) -> Tensor:
    """A causal depthwise convolution of x (B, K, D), at `place` (B, K) of a sequence with zeros between."""
    spread = x if place is None else _spread(x, place, length)
    y: Tensor = conv(F.pad(spread.transpose(1, 2), (conv.kernel_size[0] - 1, 0))).transpose(1, 2)
    return y if place is None else take(y, place)


@functools.lru_cache(maxsize=16)
def snakes(grid: tuple[int, int]) -> tuple[_Array, _Array]:
    """PlainMamba's orders of a grid, each a walk to neighbours: along the rows from the top left, the same from its
    end, along the columns from the top left, the same from its end.

    Returns rank (4, h w), when each place has its turn, and came (4, h w), how the walk came there: 0 it began, 1
    right, 2 left, 3 up, 4 down. Arrays, since tensors that are kept remember whether they were made in inference mode.
    """
    height, width = grid
    rows = [(i, j if i % 2 == 0 else width - 1 - j) for i in range(height) for j in range(width)]
    columns = [(i if j % 2 == 0 else height - 1 - i, j) for j in range(width) for i in range(height)]
    named = {(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}
    rank = np.zeros((4, height * width), dtype=np.int64)
    came = np.zeros_like(rank)
    for number, walk in enumerate((rows, rows[::-1], columns, columns[::-1])):
        for turn, (i, j) in enumerate(walk):
            rank[number, i * width + j] = turn
            if turn:
                came[number, i * width + j] = named[i - walk[turn - 1][0], j - walk[turn - 1][1]]
    return rank, came


def _stem(width: int, patch: int) -> nn.Sequential:
    """Convolutions 7x7 of stride 2 and twice 3x3, of 48 channels, then patches. How many channels the paper's have is
    not known here: with 48 all three sizes have as many parameters as printed."""
    layers: list[nn.Module] = []
    for before, size, stride in ((3, 7, 2), (_STEM, 3, 1), (_STEM, 3, 1)):
        layers += [nn.Conv2d(before, _STEM, size, stride, size // 2, bias=False), nn.BatchNorm2d(_STEM), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(_STEM, width, patch // 2, patch // 2))


_RELEASED = re.compile(r"mixer\.(A|D|conv1d|x_proj|dt_proj)(_b)?(_log)?(?=\.|$)")


def _own_name(name: str) -> str:
    """Our name of a weight of a released ViM."""

    def change(found: re.Match[str]) -> str:
        part, backward = found[1], int(found[2] is not None)
        return f"mixer.convs.{backward}" if part == "conv1d" else f"mixer.scans.{backward}.{part}{found[3] or ''}"

    return _RELEASED.sub(change, name)
