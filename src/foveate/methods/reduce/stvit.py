"""STViT: the deep layers of a vision transformer run on a few semantic tokens, made by attention from pooled seeds.

Of X (B, N, C), 16 seeds P (B, 16, C), one a region, become semantic tokens: `S' = P + Attention(q = P, k = v = X)`,
`S = S' + FFN(S')`; once more with learned centres G, `q = S + G`, `k = v = [S | X]`; the later layers run on S alone.
STViT-R brings all tokens back, `X' = X + Attention(q = X, k = v = S)`. `STViT` does that in a plain vision transformer,
`STViTSwin` within windows; both by `SemanticLayers`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from foveate.method import Card, Claim, InputError, Published, choice, configured, register, whole, within
from foveate.nn.semantic_tokens import SemanticLayers
from foveate.nn.vit import (
    ConvStem,
    enter,
    need_timm,
    take_backbone,
    take_weights,
    vision_transformer,
)

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "deit-t": {"backbone": "deit_tiny_patch16_224"},
    "deit-s": {"backbone": "deit_small_patch16_224"},
    "deit-b": {"backbone": "deit_base_patch16_224"},
    # Where LV-ViT is cut is ours: the same thirds as DeiT.
    "lv-vit-s": {"backbone": "lv-vit", "layers": "fffffggsssssssss"},
    "tiny": {
        "backbone": "vit_tiny_patch16_224",
        "options": {
            "img_size": 96, "patch_size": 8, "embed_dim": 128, "depth": 5, "num_heads": 4, "num_classes": 40,
            "pre_norm": True, "act_layer": "quick_gelu",
        },
        "layers": "ffggs",
    },
}  # fmt: skip
"""Arguments of `STViT` by name: the paper's DeiT and LV-ViT, and this project's "tiny", which takes the weights of the
zoo's tiny-vit ("ffggr" recovers its 144 tokens)."""

_RELEASED: dict[str, Any] = {
    "layers": "fgglsr" * 3, "stem": "conv", "seeds": "max", "centres": "spatial", "shortcut": False, "seed_keys": True,
    "reach": (10, 0, 0), "layer_scale": 1e-5,
}  # fmt: skip
_DETECTION = _RELEASED | {
    "shortcut": True, "seed_keys": False, "reach": (14, 21, 27), "border": "masked", "drop_path": 0.2, "image": 800,
    "classes": 0,
}  # fmt: skip
_SWIN = {
    "t": {"width": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24), "drop_path": 0.2},
    "s": {"width": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24), "drop_path": 0.3},
    "b": {"width": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "drop_path": 0.4},
}
SWIN_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    **{f"stvit-r-swin-{size}": _SWIN[size] | _RELEASED for size in "sb"},
    **{f"stvit-r-swin-{size}-detection": _SWIN[size] | _DETECTION for size in "sb"},
    **{
        f"stvit-swin-{size}": _SWIN[size] | {"layers": layers}
        for size, layers in (("t", "ffffgg"), ("s", "f" * 12 + "ggslsl"), ("b", "f" * 12 + "ggslsl"))
    },
}
"""Arguments of `STViTSwin` by name: with recovery as released for classification and for detection; without as in the
paper, where the layers of the third stage are ours, chosen so that about a quarter of the FLOPs goes, as there."""

_AVERAGED = {"class_token": False, "global_pool": "avg", "fc_norm": False}
"""Options of a backbone whose head reads the mean of the tokens."""


def _meta(name: str, **changes: Any) -> Callable[[], nn.Module]:
    return lambda: STViT.named(name, **changes)


def _meta_swin(name: str) -> Callable[[], nn.Module]:
    return lambda: STViTSwin.named(name)


def _picture() -> Sequence[Any]:
    return (torch.empty(1, 3, 224, 224),)


@functools.lru_cache(maxsize=16)
def _macs(build: Callable[[], nn.Module]) -> float:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build().eval()(*_picture())
    return counter.get_total_flops() / 2


def _saved(name: str) -> Callable[[Any], float]:
    """Which share of DeiT's multiply-adds goes; both without a class token."""

    def count(_: Any) -> float:
        backbone = CONFIGURATIONS[name]["backbone"]
        return 1 - _macs(_meta(name)) / _macs(lambda: vision_transformer(backbone, _AVERAGED))

    return count


def _projected_anew(name: str) -> Callable[[Any], float]:
    """Multiply-adds of a released Swin as its authors spend them.

    They cut the enlarged windows out first and project keys and values of each; here every token is projected once.
    """

    def count(_: Any) -> float:
        settings = SWIN_CONFIGURATIONS[name]
        again = 4 * 10**2 - 14**2
        units = settings["layers"].count("r")
        return _macs(_meta_swin(name)) + units * again * 2 * (4 * settings["width"]) ** 2

    return count


@register
class STViT(Published, nn.Module, PyTorchModelHubMixin, library_name="foveate"):
    """A vision transformer that makes 16 semantic tokens of its patch tokens after a third of its layers.

    One letter of `layers` for each block of the backbone says what it does with X (B, N, C) on its h x w grid:

    - f: it runs on X as always.
    - g, the first: seeds P, one for each of `regions` x `regions` regions of the grid (`Seeds`), attend to X:
      `S' = P + Attention(q = P, k = v = X)`, `S = S' + FFN(S')`. X stays as it is.
    - g, the next: with learned centres G, `Q = S + G`, `S' = Q + Attention(q = Q, k = v = [S | X])`, and the FFN.
    - s: it runs on S alone: from here on, cost does not depend on how many patches there are.
    - r: `X' = X + Attention(q = X, k = v = S)`, `X = X' + FFN(X')`: all N tokens again, in raster order (STViT-R).
      After it, f and g may follow.

    Queries, keys and values are those of the block's own `qkv`, with its one norm before, so that no weights but G and
    the seeds' few come on top, and those of a trained DeiT fit. There is no class token: logits are the head's of the
    mean of the tokens that there are at the end. Pictures (B, 3, H, W) -> (B, classes).

    Making Vision Transformers Efficient from A Token Sparsification View, CVPR 2023,
    https://arxiv.org/abs/2303.08685, sections 3.1 to 3.3. `STViTSwin` is the same within windows. The authors released
    only the recovering Swin; of the paper's seeds the exact form is not known here (see `Seeds`), nor whether the
    second layer's residual is its query (as released) or, as a note on the paper prints it, the seeds.

    Args:
        backbone: a VisionTransformer of timm by name, or "lv-vit".
        options: of its constructor; class_token and global_pool are set here.
        layers: see above.
        regions: regions a side.
        seeds: "predicted", "max" or "mean", see `Seeds`.
        centres: "both" P and G, "spatial" (no G) or "global" (G in place of P).
        residual: "query" or "seeds", of the layers that come after the first g.

    Raises:
        InputError: for numbers that do not go together, or a backbone that timm does not know.
    """

    card = Card(
        slug="stvit", title="Making Vision Transformers Efficient from A Token Sparsification View",
        arxiv="2303.08685", year=2023, kind="reduce", hosts=("timm",), training_free=False,
        summary="Runs the deep layers of a vision transformer on 16 semantic tokens; can bring all tokens back.",
        parameters={
            "backbone": "a VisionTransformer of timm by name, or lv-vit",
            "options": "of the backbone's constructor",
            "layers": "a letter a block: f full, g generates semantic tokens, s runs on them, r recovers all tokens",
            "regions": "regions a side, each of which makes a semantic token",
            "seeds": "'predicted' by a small network, or the 'max' or 'mean' of a region",
            "centres": "'both' seeds and learned centres, or 'spatial' or 'global' ones alone",
            "residual": "'query' or 'seeds': what later generating layers add to",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(f"share of DeiT-{name[-1].upper()}'s MACs that goes", "value", 0.58, "Table 1", value=_saved(name))
            for name in ("deit-t", "deit-s", "deit-b")
        ),
        *(
            Claim(
                f"MACs of DeiT-S, {what}", "flops", figure, "ablation tables", tolerance=0.01, counting="macs",
                model=_meta("deit-s", layers=layers), inputs=_picture,
            )
            for what, layers, figure in (
                ("2 generating layers", "ffffggssssss", 1.91e9),
                ("3 generating layers", "ffffgggsssss", 1.97e9),
                ("4 generating layers", "ffffggggssss", 2.03e9),
                ("after 3 layers", "fffggsssssss", 1.56e9),
                ("after 8 layers", "ffffffffggss", 3.30e9),
            )
        ),
        *(
            Claim(f"parameters of {name}", "parameters", figure, "card", tolerance=0, model=_meta_swin(name))
            for name, figure in (("stvit-r-swin-s", 49_625_518), ("stvit-r-swin-b", 87_812_336))
        ),
        *(
            Claim(
                f"MACs of {name}, enlarged windows projected one by one", "value", figure, "card",
                value=_projected_anew(name),
            )
            for name, figure in (("stvit-r-swin-s", 5.826e9), ("stvit-r-swin-b", 10.264e9))
        ),
    )  # fmt: skip

    def __init__(
        self, *, backbone: str = "deit_small_patch16_224", options: Mapping[str, Any] | None = None,
        layers: str = "ffffggssssss", regions: int = 4, seeds: str = "predicted", centres: str = "both",
        residual: str = "query",
    ) -> None:  # fmt: skip
        super().__init__()
        if clash := sorted(_AVERAGED.keys() & dict(options or {}).keys()):
            raise InputError(f"options cannot set {', '.join(clash)}: the mean of all tokens is what the head reads")
        self.backbone = vision_transformer(backbone, {**(options or {}), **_AVERAGED})
        depth = len(self.backbone.blocks)
        self.semantic = SemanticLayers(
            self.backbone.embed_dim, layers, per_window=regions, seeds=seeds, centres=centres, residual=residual
        )
        if len(layers) != depth:
            raise InputError(f"layers must have a letter for each of the {depth} blocks of {backbone}, not {layers!r}")
        if self.backbone.num_prefix_tokens:
            raise InputError(f"backbone {backbone!r} has register tokens; choose one without")

    @classmethod
    def named(cls, name: str, **changes: Any) -> STViT:
        """The model of a name in `CONFIGURATIONS`, with some arguments changed, random weights; `options` are added
        to those of the name."""
        return cls(**configured(name, CONFIGURATIONS, changes))

    def load_backbone(self, model: nn.Module) -> list[str]:
        """Takes the weights of a timm VisionTransformer with the same blocks; its class token is left out. Returns the
        names of the backbone's weights that `model` does not have."""
        return take_backbone(self.backbone, model)

    def _tokens(self, pictures: Tensor, record: list[Tensor] | None = None) -> tuple[Tensor, tuple[int, int]]:
        host = self.backbone
        x = host.patch_embed(pictures)
        # With dynamic_img_size it is a map.
        grid = (x.shape[1], x.shape[2]) if x.ndim == 4 else host.patch_embed.grid_size
        x = enter(host, x)
        found: tuple[Tensor, tuple[int, int]] = self.semantic(host.blocks, x, grid, record=record)
        return found

    def forward_features(self, pictures: Tensor) -> Tensor:
        """The tokens at the end, with the final norm: (B, regions^2, C), or (B, N, C) where they were recovered."""
        normed: Tensor = self.backbone.norm(self._tokens(pictures)[0])
        return normed

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, classes) of `forward_features`, or what the classifier reads."""
        logits: Tensor = self.backbone.forward_head(tokens, pre_logits=pre_logits)
        return logits

    def forward(self, pictures: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(pictures))

    @torch.no_grad()
    def mixing(self, pictures: Tensor) -> Tensor:
        """(B, regions^2, N): the attention that each semantic token pays the patches in the last layer that makes it,
        mean over heads; rows add up to 1 less what it pays semantic tokens. For overlays."""
        record: list[Tensor] = []
        self._tokens(pictures, record)
        weights = record[-1].mean(1)
        return weights[..., -int(self.backbone.patch_embed.num_patches) :]


class STViTSwin(nn.Module, PyTorchModelHubMixin, library_name="foveate"):
    """Swin whose third stage runs on semantic tokens: of every window of 7 x 7 tokens, 3 x 3.

    The letters of `layers` are those of `STViT`, and l runs on each window's own tokens where s runs on all. f are
    Swin's own blocks (shifted, where their number in the stage is odd); the others are plain ones, without relative
    positions. Without an r at the end, the fourth stage goes on with the semantic tokens. Pictures (B, 3, H, W) of any
    size -> (B, classes); `stages` gives the maps that detectors and segmenters read.

    In the first g, each window's seeds see a larger window, of reach[0]^2 keys, around their own; in the next ones of
    reach[1]^2, besides the window's semantic tokens; in r, its tokens see reach[2]^2 semantic tokens. 0 is everything.

    Args:
        width, depths, heads: of Swin; classes 0 is no classifier.
        layers: one letter for each block of the third stage.
        image: px a side that windows of the last stage are laid out for; pictures may have other sizes.
        window, per_window: sides of a window in tokens and in semantic tokens.
        stem: "patch", Swin's own, or "conv": two 3x3 convolutions of stride 2 with batch norm and Hardswish.
        seeds, centres, residual: as of `STViT`; G is the same for all windows.
        shortcut: whether the first g adds the seeds to what they attend to. The release for classification does not.
        seed_keys: whether the seeds are also among the keys of the first g.
        reach: see above.
        border: where an enlarged window passes the edge: "inside", it is moved in as far as the grid allows, or
            "masked", there are keys of zeros, hidden by -1000 in the logits.
        mask: which of these are hidden: "union", all; or "corner", as released, only those outside in both directions.
        layer_scale: of the blocks that are not f, 0 for none.
        drop_path: stochastic depth of the last block, rising from 0.

    Raises:
        InputError: for numbers that do not go together.
    """

    def __init__(
        self, *, width: int = 96, depths: Sequence[int] = (2, 2, 6, 2), heads: Sequence[int] = (3, 6, 12, 24),
        layers: str = "ffffgg", image: int = 224, classes: int = 1000, window: int = 7, per_window: int = 3,
        stem: str = "patch", seeds: str = "predicted", centres: str = "both", residual: str = "query",
        shortcut: bool = True, seed_keys: bool = False, reach: Sequence[int] = (10, 0, 0), border: str = "inside",
        mask: str = "union", layer_scale: float = 0.0, drop_path: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        need_timm()
        from timm.layers import PatchEmbed
        from timm.models.swin_transformer import SwinTransformer
        from timm.models.vision_transformer import Block

        self.semantic = SemanticLayers(
            4 * width, layers, window=whole("window", window, 1), per_window=per_window, seeds=seeds, centres=centres,
            residual=residual, shortcut=shortcut, seed_keys=seed_keys, reach=reach, border=border, mask=mask,
        )  # fmt: skip
        if len(depths) != 4 or len(heads) != 4 or len(layers) != depths[2]:
            raise InputError(
                f"depths and heads must be 4 numbers, and layers a letter for each block of the third stage, not "
                f"{depths!r}, {heads!r}, {layers!r}"
            )
        within("layer_scale", layer_scale, "[0, 1]")
        whole("classes", classes)
        embed: Any = PatchEmbed
        if choice("stem", stem, ("patch", "conv")) == "conv":
            embed = _conv_stem
        side = math.ceil(whole("image", image, 32) / 16)
        last = window
        if not self.semantic.recovers:
            # The fourth stage has half of the semantic grid.
            last = min(window, math.ceil(math.ceil(side / window) * per_window / 2))
        self.backbone = SwinTransformer(
            img_size=image, num_classes=classes, embed_dim=width, depths=tuple(depths), num_heads=tuple(heads),
            window_size=((window, window),) * 3 + ((last, last),), embed_layer=embed, strict_img_size=False,
            drop_path_rate=within("drop_path", drop_path, "[0, 1)"),
        )  # fmt: skip
        blocks: Any = self.backbone.layers[2].blocks
        for number, kind in enumerate(layers):
            if kind != "f":
                path = getattr(blocks[number].drop_path1, "drop_prob", 0.0)
                blocks[number] = Block(
                    4 * width, heads[2], qkv_bias=True, init_values=layer_scale or None, drop_path=path,
                    norm_layer=nn.LayerNorm,
                )  # fmt: skip
        self.backbone.init_weights(needs_reset=False)

    @classmethod
    def named(cls, name: str, **changes: Any) -> STViTSwin:
        """The model of a name in `SWIN_CONFIGURATIONS`, with some arguments changed, random weights."""
        return cls(**configured(name, SWIN_CONFIGURATIONS, changes))

    def load_backbone(self, model: nn.Module) -> list[str]:
        """Takes the weights of a timm SwinTransformer that fit. Returns the names of those that `model` has not."""
        return take_weights(self.backbone, model.state_dict())

    def _maps(self, pictures: Tensor) -> list[Tensor]:
        host: Any = self.backbone
        x, maps = host.patch_embed(pictures), []
        for number, stage in enumerate(host.layers):
            if number == 2:
                x = stage.downsample(x)
                tokens, grid = self.semantic(stage.blocks, x.flatten(1, 2), (x.shape[1], x.shape[2]), _on_map)
                x = tokens.unflatten(1, grid)
            else:
                x = stage(x)
            maps.append(x)
        return maps

    def stages(self, pictures: Tensor) -> list[Tensor]:
        """Four maps (B, C, h, w), of strides 4, 8, 16 and 32 px where the third stage recovers its tokens."""
        return [x.permute(0, 3, 1, 2) for x in self._maps(pictures)]

    def forward_features(self, pictures: Tensor) -> Tensor:
        """(B, h, w, C) with the final norm, as timm's Swin."""
        normed: Tensor = self.backbone.norm(self._maps(pictures)[-1])
        return normed

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, classes) of `forward_features`, or what the classifier reads."""
        logits: Tensor = self.backbone.forward_head(x, pre_logits=pre_logits)
        return logits

    def forward(self, pictures: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(pictures))


def _conv_stem(img_size: int, embed_dim: int, **_: Any) -> ConvStem:
    return ConvStem((embed_dim // 2, embed_dim), (2, 2), nn.Hardswish, img_size, as_map=True)


def _on_map(block: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A block of Swin's, which takes maps, on tokens."""
    out: Tensor = block(x.unflatten(1, grid)).flatten(1, 2)
    return out
