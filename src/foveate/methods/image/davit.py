"""DaViT: windows see what is near, channels see the whole picture, and both cost as much as there are patches."""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import StochasticDepth

from foveate.method import Card, Claim, InputError, Published, choice, configured, register, whole, within

_BASE = {"widths": (128, 256, 512, 1024), "heads": (4, 8, 16, 32), "depths": (1, 1, 9, 1)}
_HUGE = {"widths": (256, 512, 1024, 2048), "heads": (8, 16, 32, 64), "depths": (1, 1, 9, 1)}
_FLORENCE = {"window": 12, "merge_kernel": 3, "channel_attention": "florence", "classes": 0}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {"depths": (1, 1, 9, 1)},
    "base": _BASE,
    "large": {
        "widths": (192, 384, 768, 1536), "heads": (6, 12, 24, 48), "depths": (1, 1, 9, 1), "window": 12,
    },
    "huge": _HUGE,
    "giant": {"widths": (384, 768, 1536, 3072), "heads": (12, 24, 48, 96), "depths": (1, 1, 12, 3)},
    "base-fl": _BASE | _FLORENCE,
    "huge-fl": _HUGE | _FLORENCE,
    "scenes": {
        "widths": (42, 84, 168, 336), "heads": (2, 4, 8, 16), "window": 6, "classes": 40, "drop_path": 0.0,
    },
}  # fmt: skip
"""Arguments of `Davit` by name: the paper's six ("large" as it is fine-tuned, for 384 px), the two vision towers of
Florence-2 (without a classifier), and this project's "scenes", which costs what its tiny-vit does at 96 px."""

_REPOSITORIES = {
    "davit_base_fl.msft_florence2": "microsoft/Florence-2-base",
    "davit_huge_fl.msft_florence2": "microsoft/Florence-2-large",
}
"""Where timm finds checkpoints that are not its own."""


_CODE = "released code's comments"


@functools.lru_cache(maxsize=8)
def _on_meta(name: str) -> Davit:
    with torch.device("meta"):
        return Davit.named(name)


def _meta(name: str) -> Callable[[], nn.Module]:
    return lambda: _on_meta(name)


def _picture(side: int) -> Callable[[], Sequence[Any]]:
    return lambda: (torch.empty(1, 3, side, side),)


def _growth(_: type[Davit]) -> float:
    """FLOPs of the features of a picture of 448 x 448 px over those of 224 x 224 px."""
    counts = []
    with torch.device("meta"):
        model = _on_meta("tiny").eval()
        for side in (448, 224):
            with FlopCounterMode(display=False) as counter:
                model.forward_features(torch.empty(1, 3, side, side))
            counts.append(counter.get_total_flops())
    return counts[0] / counts[1]


@register
class Davit(Published, nn.Module, PyTorchModelHubMixin, library_name="foveate"):
    """A pyramid of four stages whose blocks attend by turns within windows of patches and between channels.

    A block, of a map x (B, H, W, C) and with CPE(x) = x + depth-wise 3 x 3 convolution of x:
    `x = CPE(x); x = x + attention(LN(x)); x = CPE(x); x = x + MLP(LN(x))`. The attention is `WindowAttention` in the
    first block of each pair and `ChannelAttention` in the second. There is no other position encoding. The first
    stage sees every 4th pixel (7 x 7 convolution, then a norm), each further one half as many patches (a norm, then a
    2 x 2 convolution). Cost is linear in the number of patches.

    Pictures (B, 3, H, W), ImageNet-normalised, of any size -> logits (B, classes): the mean over the last map's
    patches, then a norm and a linear layer.

    DaViT: Dual Attention Vision Transformers, ECCV 2022, https://arxiv.org/abs/2204.03645, section 3. Weights have
    the names that they have in timm, so that a state dict of timm's `davit_tiny` … `davit_giant` fits as it is;
    `from_timm` and `load_backbone` also take those of the authors and of Florence-2.

    Args:
        widths: channels C of each stage.
        heads: of the window attention in each stage, and groups of the channel attention.
        depths: pairs of blocks in each stage.
        window: patches on a side of a window.
        mlp_ratio: width of the MLP in multiples of C.
        attention: the blocks of which a "pair" consists: "spatial", "channel", or both in either order (the paper's
            ablation).
        ffn: whether blocks have an MLP.
        channel_attention: "davit", or "florence": see `ChannelAttention`.
        merge_kernel: of the convolution between stages: 2, or 3 with overlap (Florence-2).
        drop_path: stochastic depth of the last block, rising linearly from 0 over all blocks. The released code has
            0.1 for all sizes; the card recalls 0.1, 0.2, 0.4 for tiny, small, base without a source.
        classes: of the classifier; 0 for features in its place.
        map_norms: whether `maps` normalises each of its outputs, as heads for detection and segmentation need it.

    Raises:
        InputError: for numbers that do not go together.
    """

    card = Card(
        slug="davit", title="DaViT: Dual Attention Vision Transformers", arxiv="2204.03645", year=2022, kind="image",
        hosts=(), training_free=False,
        summary="A backbone whose blocks attend by turns within windows of patches and between groups of channels.",
        parameters={
            "widths": "channels of each stage",
            "heads": "of the window attention of each stage, and groups of the channel attention",
            "depths": "pairs of a spatial and a channel block in each stage",
            "window": "patches on a side of a window",
            "mlp_ratio": "width of the MLP in multiples of the channels",
            "attention": "the blocks of a pair: 'spatial', 'channel' or both, in order",
            "ffn": "whether blocks have an MLP",
            "channel_attention": "'davit', or 'florence': Florence-2's scale and order of queries, keys and values",
            "merge_kernel": "of the convolution between stages: 2, or 3 (Florence-2)",
            "drop_path": "stochastic depth of the last block, rising linearly from 0",
            "classes": "of the classifier, 0 for features in its place",
            "map_norms": "whether the maps for dense heads have a norm of their own",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(f"parameters of {name}", "parameters", figure, source, tolerance=0, model=_meta(name))
            for name, figure, source in (
                ("tiny", 28_360_168, _CODE), ("small", 49_745_896, _CODE), ("base", 87_954_408, _CODE),
                ("large", 196_811_752, _CODE), ("huge", 348_922_856, "card"), ("giant", 1_406_470_120, "card"),
            )
        ),
        *(
            # The figures have 5 operations for each element of a norm in them, which are not counted here: 0.4 %.
            Claim(
                f"MACs of {name} at {side} px", "flops", figure, _CODE, tolerance=0.005, counting="macs",
                model=_meta(name), inputs=_picture(side),
            )
            for name, side, figure in (
                ("tiny", 224, 4_540_244_736), ("small", 224, 8_800_488_192), ("base", 224, 15_510_430_720),
                ("large", 384, 102_966_676_992),
            )
        ),
        Claim(
            "MACs of tiny at 224 px, norms not counted", "flops", 4_162_566_144 + 243_403_776 + 115_831_296, "card",
            tolerance=0, counting="macs", model=_meta("tiny"), inputs=_picture(224),
        ),
        Claim("FLOPs at 448 px over those at 224 px", "value", 4, "section 3: linear", tolerance=0, value=_growth),
    )  # fmt: skip

    def __init__(
        self, *, widths: Sequence[int] = (96, 192, 384, 768), heads: Sequence[int] = (3, 6, 12, 24),
        depths: Sequence[int] = (1, 1, 3, 1), window: int = 7, mlp_ratio: float = 4.0,
        attention: Sequence[str] = ("spatial", "channel"), ffn: bool = True, channel_attention: str = "davit",
        merge_kernel: int = 2, drop_path: float = 0.1, classes: int = 1000, map_norms: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if not len(widths) == len(heads) == len(depths) > 0:
            raise InputError(f"widths {widths!r}, heads {heads!r} and depths {depths!r} must be equally many")
        for name, values in (("widths", widths), ("heads", heads), ("depths", depths)):
            for value in values:
                whole(name, value, 1)
        if any(width % count for width, count in zip(widths, heads)):
            raise InputError(f"widths must be multiples of heads, not {tuple(widths)!r} with {tuple(heads)!r}")
        if sorted(set(attention)) != sorted(attention) or not attention:
            raise InputError(f"attention must be 'spatial', 'channel' or both, not {attention!r}")
        for kind in attention:
            choice("attention", kind, ("spatial", "channel"))
        choice("channel_attention", channel_attention, ("davit", "florence"))
        whole("window", window, 1)
        whole("classes", classes)
        within("mlp_ratio", mlp_ratio, "(0, inf)")
        within("drop_path", drop_path, "[0, 1)")
        if merge_kernel not in (2, 3):
            raise InputError(f"merge_kernel must be 2 or 3, not {merge_kernel!r}")
        self.attention, self.classes = tuple(attention), classes
        self.stem = Embedding(3, widths[0], kernel=7, stride=4)
        rates = iter(torch.linspace(0, drop_path, len(attention) * sum(depths), device="cpu").tolist())
        stages = []
        for number, (width, count, depth) in enumerate(zip(widths, heads, depths)):
            make: dict[str, Callable[[], nn.Module]] = {
                "spatial": lambda w=width, h=count: WindowAttention(w, h, window),  # type: ignore[misc]
                "channel": lambda w=width, h=count: ChannelAttention(w, h, channel_attention),  # type: ignore[misc]
            }
            hidden = int(width * mlp_ratio) if ffn else 0
            pairs = [
                nn.Sequential(*(Block(width, make[kind](), hidden, next(rates)) for kind in self.attention))
                for _ in range(depth)
            ]
            merge = Embedding(widths[number - 1], width, merge_kernel, 2, norm_first=True) if number else nn.Identity()
            stages.append(nn.Sequential(OrderedDict(downsample=merge, blocks=nn.Sequential(*pairs))))
        self.stages = nn.Sequential(*stages)
        self.map_norms = nn.ModuleList(nn.LayerNorm(width) for width in widths) if map_norms else None
        self.head = nn.ModuleDict(
            {"norm": nn.LayerNorm(widths[-1]), "fc": nn.Linear(widths[-1], classes) if classes else nn.Identity()}
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def named(cls, name: str, **changes: Any) -> Davit:
        """An untrained model by its name in `CONFIGURATIONS`, with changes; InputError for an unknown name."""
        return cls(**configured(name, CONFIGURATIONS, changes))

    @classmethod
    def from_timm(cls, name: str, **changes: Any) -> Davit:
        """A trained model by timm's name for it, "davit_tiny.msft_in1k" or "davit_base_fl.msft_florence2", in eval
        mode. With other `classes` the classifier is new. InputError where there is no such checkpoint."""
        model = cls.named(name.partition(".")[0].removeprefix("davit_").replace("_", "-"), **changes)
        return model.load_backbone(name).eval()

    def load_backbone(self, source: nn.Module | str | Path) -> Davit:
        """Takes the weights of a checkpoint, the classifier's too where it has as many classes; returns the model.

        Args:
            source: a timm `DaVit`; a safetensors file, or a folder with a `model.safetensors`; a timm checkpoint's
                name; or the id of a hub repository. The authors' names of weights and those of Florence-2's own
                checkpoints are understood where timm is installed. Nothing but safetensors is read.

        Raises:
            InputError: for a checkpoint that cannot be had, or is of another architecture.
        """
        state = dict(source.state_dict()) if isinstance(source, nn.Module) else _read(source)
        if "stem.conv.weight" not in state:
            state = _from_release(state)
        # timm's Florence-2 towers name the two blocks of a pair.
        for number, kind in enumerate(self.attention):
            state = {key.replace(f".{kind}_block.", f".{number}."): value for key, value in state.items()}
        ours = self.state_dict()
        classifier = state.get("head.fc.weight")
        if classifier is None or len(classifier) != self.classes:
            state = {key: value for key, value in state.items() if not key.startswith("head.fc.")}
        # Florence-2 has no norm behind its tower, and no checkpoint has those of dense heads.
        optional = ("head.", "map_norms.")
        missing = sorted(key for key in ours.keys() - state.keys() if not key.startswith(optional))
        unknown = sorted(state.keys() - ours.keys())
        other = sorted(key for key in ours.keys() & state.keys() if ours[key].shape != state[key].shape)
        if missing or unknown or other:
            which = (missing or unknown or other)[0]
            what = "lacks" if missing else "has an unexpected" if unknown else "has another shape of"
            name = type(source).__name__ if isinstance(source, nn.Module) else source
            raise InputError(f"{name} is no checkpoint of this model: it {what} {which}")
        self.load_state_dict(state, strict=False)
        return self

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """What each stage makes of pixels (B, 3, H, W): (B, C, H / stride, W / stride), rounded up, at strides 4, 8,
        16, 32."""
        found, x = [], self.stem(pixels)
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        if self.map_norms is not None:
            found = [norm(one) for norm, one in zip(self.map_norms, found)]
        return [one.permute(0, 3, 1, 2) for one in found]

    def forward_features(self, pixels: Tensor) -> Tensor:
        """The last of `maps`, without a norm."""
        return self.stages(self.stem(pixels)).permute(0, 3, 1, 2)

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits (B, classes) of the last map; pooled and normalised features (B, C) where there are no classes."""
        return self.head["fc"](self.head["norm"](features.mean((2, 3))))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, classes) of pixels (B, 3, H, W)."""
        return self.forward_head(self.forward_features(pixels))


class Block(nn.Module):
    """`x = CPE(x); x = x + attention(LN(x)); x = CPE(x); x = x + MLP(LN(x))` of x (B, H, W, C).

    What the attention is added to is the output of the first CPE. With `hidden` 0 there is no MLP.
    """

    def __init__(self, width: int, attention: nn.Module, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.cpe1, self.cpe2 = PositionEncoding(width), PositionEncoding(width)
        self.norm1, self.attn = nn.LayerNorm(width), attention
        self.drop_path = StochasticDepth(drop_path, "row")
        self.mlp: nn.Sequential | None = None
        if hidden:
            self.norm2 = nn.LayerNorm(width)
            self.mlp = nn.Sequential(
                OrderedDict(fc1=nn.Linear(width, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, width))
            )

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = self.cpe2(x)
        return x if self.mlp is None else x + self.drop_path(self.mlp(self.norm2(x)))


class WindowAttention(nn.Module):
    """Multi-head attention within windows of `window` x `window` patches that do not overlap: (B, H, W, C) to the same.

    A map that the window does not divide is filled up with zeros on the right and below; they take part as keys and
    values, whose projection is the bias. No shift, no relative bias, no mask.
    """

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        side = self.window
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        down, across = x.shape[1] // side, x.shape[2] // side
        x = x.reshape(batch, down, side, across, side, channels).transpose(2, 3).reshape(-1, side**2, channels)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        x = x.reshape(batch, down, across, side, side, channels).transpose(2, 3)
        return self.proj(x.reshape(batch, down * side, across * side, channels)[:, :height, :width])


class ChannelAttention(nn.Module):
    """Attention in which channels are the tokens, within groups of d = C / groups: (B, H, W, C) to the same.

    With Q, K, V (d, N) the channels of a group over all N patches: `softmax(Q K^T / sqrt(d)) V`, the softmax over the
    d channels of K. Each product sums over all patches, so that a single block sees the whole picture, and logits grow
    with N.

    `form`: "davit" as released: of the fused projection's three parts the first is V, the second Q, the third K.
    "florence": Q, K, V in this order, and 1 / sqrt(N) in place of 1 / sqrt(d).
    """

    def __init__(self, width: int, groups: int, form: str = "davit") -> None:
        super().__init__()
        self.groups, self.form = groups, form
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        weights, value = self.weights_and_value(x)
        return self.proj((weights @ value).flatten(1, 2).transpose(1, 2).view(x.shape))

    def weights_and_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (B, groups, d, d), each row with sum 1, and the values (B, groups, d, N), of x (B, H, W, C)."""
        parts = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.groups, -1)).permute(2, 0, 3, 4, 1)
        value, query, key = parts if self.form == "davit" else (parts[2], parts[0], parts[1])
        scale = query.shape[-2 if self.form == "davit" else -1] ** -0.5
        return (query * scale @ key.transpose(-1, -2)).softmax(-1), value


class PositionEncoding(nn.Module):
    """x (B, H, W, C) + a depth-wise 3 x 3 convolution of it: zeros beyond the border tell a patch where it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Embedding(nn.Module):
    """A convolution to a coarser map. The stem reads (B, 3, H, W) and normalises its output; with `norm_first`, what
    it reads is a map (B, H, W, C), normalised before. Returns (B, H / stride, W / stride, outputs), rounded up."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, norm_first: bool = False) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm = nn.LayerNorm(inputs if norm_first else outputs)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2 if kernel % 2 else 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = self.norm(x).permute(0, 3, 1, 2)
        step = self.conv.stride[0]
        x = self.conv(F.pad(x, (0, -x.shape[3] % step, 0, -x.shape[2] % step))).permute(0, 2, 3, 1)
        return x if self.norm_first else self.norm(x)


def _read(source: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, a folder, a timm checkpoint's name or a hub repository."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(source)
    if path.is_dir():
        path = path / "model.safetensors"
    try:
        if not path.is_file():
            if path.suffix == ".safetensors" or isinstance(source, Path):
                raise InputError(f"there is no file {path}")
            repository = _REPOSITORIES.get(source, source if "/" in source else f"timm/{source}")
            path = Path(hf_hub_download(repository, "model.safetensors"))
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{os.fspath(source)} is no safetensors file: {error}") from None
    # The hub's errors of connection and of missing files are OSErrors.
    except (OSError, HFValidationError) as error:
        raise InputError(f"no weights of {os.fspath(source)!r}: {str(error).strip().splitlines()[0]}") from None


def _from_release(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the authors' names, or of the whole of Florence-2, with timm's."""
    try:
        from timm.models.davit import checkpoint_filter_fn
    except ModuleNotFoundError:
        raise InputError("weights with the authors' names need timm: pip install 'foveate[timm]'") from None
    return dict(checkpoint_filter_fn(dict(state), None))
