"""Strip-MLP: no attention; whole rows of patches mix with the rows above and below, then columns likewise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from foveate.method import Card, Claim, InputError, Published, configured, register, whole, within

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "t-star": {"width": 80, "depths": (2, 2, 6, 2), "groups": 2},
    "t": {},
    "s": {"width": 96, "depths": (2, 2, 18, 2), "groups": 4},
    "b": {"width": 112, "depths": (2, 2, 18, 2), "groups": 4},
    "scenes": {
        "image": 96, "width": 48, "depths": (2, 2, 6, 2), "groups": 2, "drop_path": 0.0, "classes": 40,
    },
}  # fmt: skip
"""Arguments of `StripMlp` by name: the paper's T*, T (the defaults), S and B, and this project's "scenes", which costs
what its tiny-vit does at 96 px."""


@functools.lru_cache(maxsize=4)
def _on_meta(name: str) -> StripMlp:
    with torch.device("meta"):
        return StripMlp.named(name)


def _meta(name: str) -> Callable[[], nn.Module]:
    return lambda: _on_meta(name)


def _weights(channels: int, length: int) -> Callable[[Any], float]:
    def count(_: type[StripMlp]) -> float:
        with torch.device("meta"):
            return float(sum(weight.numel() for weight in StripLinear(channels, length).parameters()))

    return count


@register
class StripMlp(Published, nn.Module, PyTorchModelHubMixin, library_name="foveate"):
    """A pyramid of four stages of blocks `x = x + TokenMix(x); x = x + ChannelMix(x)`, without any attention.

    `TokenMix` gives half of the channels to `CascadeGroupStrip`, where a row of patches, all its columns at once, mixes
    with the two adjacent rows, and columns with adjacent columns after that; the other half goes to `LocalStrip`, which
    weighs a wide and a high depth-wise convolution. A mixing in strips keeps its power where maps are small.
    Stages see every 4th, 8th, 16th and 32nd pixel, with `width` x 1, 2, 4, 8 channels. With 2 x 2 merges M1, M2, M3 and
    grouped 2 x 2 convolutions s1, s1', s2, the input of stage 3 is `M2(x2) + s1(M1(x1))`, and that of stage 4 is
    `M3(x3) + s1'(s1(M1(x1))) + s2(M2(x2))`.

    Pictures (B, 3, image, image), ImageNet-normalised -> logits (B, classes): batch norm, mean over patches, linear.
    The weights of the token mixing depend on the size of the map: a model is for one size of pictures.

    Strip-MLP: Efficient Token Interaction for Vision MLP, ICCV 2023, https://arxiv.org/abs/2307.11458, section 3.

    Args:
        image: side of the pictures in px, a multiple of 32.
        width: channels of the first stage.
        depths: blocks of each of the four stages.
        groups: of channels within which every channel has strip weights of its own; the groups share them. The release
            does not ask: it takes 2 where a stage's channels are a multiple of 80, else 4.
        strip: how many neighbouring rows (columns) mix: odd, 1 for each by itself (the paper's ablation).
        cascade: whether the columns' step reads what the rows' step made; otherwise both read the input (the paper's
            ablation, in our wording: the rows' result then takes the input's place before the last convolution).
        drop_path: stochastic depth, the same in every block. 0.1 in the release, whatever its configurations say.
        classes: of the classifier; 0 for features in its place.

    Raises:
        InputError: for numbers that do not go together.
    """

    card = Card(
        slug="strip-mlp", title="Strip-MLP: Efficient Token Interaction for Vision MLP", arxiv="2307.11458", year=2023,
        kind="image", hosts=(), training_free=False,
        summary="A backbone without attention: whole rows, then columns, of patches mix with adjacent ones.",
        parameters={
            "image": "side of the pictures in px, a multiple of 32",
            "width": "channels of the first stage",
            "depths": "blocks of each of the four stages",
            "groups": "of channels that share their strip weights",
            "strip": "how many neighbouring rows or columns mix, odd",
            "cascade": "whether columns mix after rows, not beside them",
            "drop_path": "stochastic depth of every block",
            "classes": "of the classifier, 0 for features in its place",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(f"parameters of {name}", "parameters", figure, "card", tolerance=0, model=_meta(name))
            for name, figure in (("t-star", 18_243_920), ("t", 24_903_920), ("s", 42_568_600), ("b", 57_216_480))
        ),
        *(
            # The figures have 5 operations an element of a layer norm and 2 of a batch norm in them, not counted here.
            Claim(
                f"MACs of {name} at 224 px", "flops", figure, "card", tolerance=0.005, counting="macs",
                model=_meta(name), inputs=lambda: (torch.empty(1, 3, 224, 224),),
            )
            for name, figure in (("t-star", 2.531e9), ("t", 3.665e9), ("s", 6.828e9), ("b", 9.214e9))
        ),
        *(
            # 3 W^2 m + m W, and no g in it.
            Claim(
                f"weights of a strip step, {channels} channels a group, {length} columns", "value", figure, "card",
                tolerance=0, value=_weights(channels, length),
            )
            for channels, length, figure in ((20, 56, 189_280), (40, 28, 95_200), (80, 14, 48_160), (160, 7, 24_640))
        ),
    )  # fmt: skip

    def __init__(
        self, *, image: int = 224, width: int = 80, depths: Sequence[int] = (2, 2, 12, 2), groups: int = 2,
        strip: int = 3, cascade: bool = True, drop_path: float = 0.1, classes: int = 1000,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("image", image), ("width", width), ("groups", groups), ("strip", strip)):
            whole(name, value, 1)
        whole("classes", classes)
        within("drop_path", drop_path, "[0, 1)")
        if image % 32:
            raise InputError(f"image must be a multiple of 32 px, not {image}")
        if len(depths) != 4:
            raise InputError(f"depths must be four numbers of blocks, not {depths!r}")
        for depth in depths:
            whole("depths", depth, 1)
        if width % (2 * groups):
            raise InputError(f"width must be a multiple of twice the groups, not {width} with groups {groups}")
        if strip % 2 == 0:
            raise InputError(f"strip must be odd, not {strip}")
        if not isinstance(cascade, bool):
            raise InputError(f"cascade must be true or false, not {cascade!r}")
        self.image, self.classes = image, classes
        widths = [width * 2**stage for stage in range(4)]
        self.stem = nn.Conv2d(3, width, 4, stride=4, bias=False)
        sides = [image // 4 // 2**stage for stage in range(4)]
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(some, side, groups, strip, cascade, drop_path) for _ in range(depth)))
            for some, side, depth in zip(widths, sides, depths)
        )
        self.merges = nn.ModuleList(nn.Conv2d(some, 2 * some, 2, stride=2, bias=False) for some in widths[:3])
        # s1, s1' and s2.
        self.skips = nn.ModuleList(
            nn.Conv2d(some, 2 * some, 2, stride=2, groups=some, bias=False)
            for some in (widths[1], widths[2], widths[2])
        )
        self.norm = nn.BatchNorm2d(widths[3])
        self.head: nn.Module = nn.Linear(widths[3], classes) if classes else nn.Identity()
        for module in self.modules():
            # As the Swin recipe that the paper trains with does; the card says nothing of linear layers.
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @classmethod
    def named(cls, name: str, **changes: Any) -> StripMlp:
        """An untrained model by its name in `CONFIGURATIONS`, with changes; InputError for an unknown name."""
        return cls(**configured(name, CONFIGURATIONS, changes))

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """What each stage makes of pixels (B, 3, image, image): (B, C, h, w) at strides 4, 8, 16, 32.

        Raises:
            InputError: for pictures of another size than the model is for.
        """
        if pixels.shape[2:] != (self.image, self.image):
            height, width = pixels.shape[2:]
            raise InputError(f"this model is for pictures of {self.image} x {self.image} px, not {height} x {width}")
        first, second, third = self.merges
        near, far, late = self.skips
        x1 = self.stages[0](self.stem(pixels))
        merged = first(x1)
        x2 = self.stages[1](merged)
        skipped, again = near(merged), second(x2)
        x3 = self.stages[2](again + skipped)
        x4 = self.stages[3](third(x3) + far(skipped) + late(again))
        return [x1, x2, x3, x4]

    def forward_features(self, pixels: Tensor) -> Tensor:
        """The last of `maps`, without a norm."""
        return self.maps(pixels)[-1]

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits (B, classes) of the last map; pooled and normalised features (B, C) where there are no classes."""
        return self.head(self.norm(features).mean((2, 3)))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, classes) of pixels (B, 3, image, image)."""
        return self.forward_head(self.forward_features(pixels))


class Block(nn.Module):
    """`x = x + TokenMix(x); x = x + ChannelMix(x)` of x (B, C, side, side)."""

    def __init__(self, width: int, side: int, groups: int, strip: int, cascade: bool, drop_path: float) -> None:
        super().__init__()
        self.tokens, self.channels = TokenMix(width, side, groups, strip, cascade), ChannelMix(width)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.tokens(x))
        return x + self.drop_path(self.channels(x))


class TokenMix(nn.Module):
    """Pre-activation, a depth-wise 3 x 3 and a 1 x 1 convolution; then half of the channels mix in strips, half
    locally; a 1 x 1 convolution joins them. (B, C, side, side) to the same."""

    def __init__(self, width: int, side: int, groups: int, strip: int = 3, cascade: bool = True) -> None:
        super().__init__()
        self.before = nn.Sequential(
            nn.BatchNorm2d(width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.GELU(),
        )  # fmt: skip
        self.strips, self.local = CascadeGroupStrip(width // 2, side, groups, strip, cascade), LocalStrip(width // 2)
        self.after = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.before(x).chunk(2, 1)
        return self.after(torch.cat([self.strips(first), self.local(second)], 1))


class CascadeGroupStrip(nn.Module):
    """Rows mix, then columns: CGSMM, section 3.3. Of x (B, D, side, side), with P_h, P_w the position maps:

    `y = rows(x + P_h); x_h = GELU(BN(conv [y, x])) + P_w; y' = columns(x_h); out = conv [x, y']`.

    The D channels are `groups` times m: channel g m + c uses the c-th weights of a strip step, whatever its group.
    """

    def __init__(self, width: int, side: int, groups: int, strip: int = 3, cascade: bool = True) -> None:
        super().__init__()
        self.groups, self.cascade = groups, cascade
        self.row_position, self.column_position = PositionMap(width, side), PositionMap(width, side)
        self.rows, self.columns = (StripLinear(width // groups, side, strip) for _ in range(2))
        self.between = nn.Sequential(nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width), nn.GELU())
        self.after = nn.Conv2d(2 * width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.step(self.rows, x + self.row_position())
        mixed = self.between(torch.cat([mixed, x], 1))
        seen = (mixed if self.cascade else x) + self.column_position()
        turned = self.step(self.columns, seen.transpose(2, 3)).transpose(2, 3)
        return self.after(torch.cat([x if self.cascade else mixed, turned], 1))

    def step(self, strips: nn.Module, x: Tensor) -> Tensor:
        """Rows of x (B, D, rows, length), each with its neighbours, through the weights that the groups share."""
        return strips(x.unflatten(1, (self.groups, -1)).flatten(0, 1)).unflatten(0, (len(x), -1)).flatten(1, 2)


class StripLinear(nn.Conv1d):
    """A linear layer from `strip` neighbouring rows to the middle one: section 3.2. x (B, m, rows, length) to the same.

    `y[c, i, :] = sum over d in -1, 0, 1 of W_c[:, :, d] x[c, i + d, :] + b_c`, rows outside being zero: the same
    weights for all rows, others for each of the m channels. That is a convolution along the rows, whose channels are
    all m x length places of a row, in m groups.
    """

    def __init__(self, channels: int, length: int, strip: int = 3) -> None:
        super().__init__(channels * length, channels * length, strip, padding=strip // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        mixed = super().forward(x.transpose(2, 3).flatten(1, 2))
        return mixed.unflatten(1, (x.shape[1], -1)).transpose(2, 3)


class PositionMap(nn.Module):
    """A learned map (D, side, side) that depends on column minus row alone: entry (i, j) is row j - i + side of a table
    (2 side + 1, D). The table has a row more on each side than a square map needs, as the release's has."""

    index: Tensor

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(2 * side + 1, width))
        nn.init.trunc_normal_(self.table, std=0.02)
        place = torch.arange(side)
        self.register_buffer("index", place - place.unsqueeze(1) + side, persistent=False)

    def forward(self) -> Tensor:
        return self.table[self.index].permute(2, 0, 1)


class LocalStrip(nn.Module):
    """`w0 b + w1 a + w2 x`: a is a depth-wise convolution of 3 x 7, b of 7 x 3 patches (height x width): LSMM, section
    3.4. Of x (B, D, h, w); the three weights of a channel have sum 1 and depend on the mean of a + b + x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(width, width, (3, 7), padding=(1, 3), groups=width, bias=False)
        self.high = nn.Conv2d(width, width, (7, 3), padding=(3, 1), groups=width, bias=False)
        self.score = nn.Sequential(nn.Conv2d(width, width // 2, 1), nn.GELU(), nn.Conv2d(width // 2, 3 * width, 1))

    def forward(self, x: Tensor) -> Tensor:
        wide, high = self.wide(x), self.high(x)
        weights = self.weights(wide + high + x)
        return weights[:, :, 0] * high + weights[:, :, 1] * wide + weights[:, :, 2] * x

    def weights(self, total: Tensor) -> Tensor:
        """(B, D, 3, 1, 1): of b, a, x, from their sum (B, D, h, w). A channel's three scores stand side by side."""
        scores = self.score(total.mean((2, 3), keepdim=True))
        return scores.unflatten(1, (-1, 3)).softmax(2)


class ChannelMix(nn.Module):
    """A depth-wise 7 x 7 convolution, a norm, and an MLP of three times the width with `GlobalResponse` within: the
    block of ConvNeXt V2, whose epsilon 1e-6 the norm has here (the card gives none). (B, C, h, w) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.near = nn.Conv2d(width, width, 7, padding=3, groups=width, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 3 * width), nn.GELU(), GlobalResponse(3 * width),
            nn.Linear(3 * width, width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.near(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GlobalResponse(nn.Module):
    """Global response normalisation of x (B, h, w, C): `gamma x n + beta + x` with G the L2 norm of a channel over the
    map and `n = G / (mean of G over channels + 1e-6)`. At the start it is the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return self.gamma * x * (norm / (norm.mean(-1, keepdim=True) + 1e-6)) + self.beta + x
