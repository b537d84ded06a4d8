"""Vision transformers of timm as the inside of whole models, LV-ViT on timm's blocks, and attention between two sets.

timm is an optional extra: it is loaded when a model is built. B pictures, N tokens, C channels.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.method import InputError

LV_VIT = "lv-vit"


def vision_transformer(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """An untrained timm `VisionTransformer`: that of a timm name, or "lv-vit", with its constructor's `options`.

    Raises:
        InputError: where timm is not installed, does not know the name or an option, or has another kind of model.
    """
    need_timm()
    import timm
    from timm.models.vision_transformer import VisionTransformer

    options = dict(options or {})
    try:
        model = lv_vit(**options) if name == LV_VIT else timm.create_model(name, pretrained=False, **options)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise InputError(f"backbone {name!r} cannot be built with {options}: {error}") from None
    if not isinstance(model, VisionTransformer):
        raise InputError(f"backbone must be a VisionTransformer of timm, not {name!r}, a {type(model).__name__}")
    return model


def need_timm() -> None:
    """Raises an InputError that says what to install where timm is not."""
    if importlib.util.find_spec("timm") is None:
        raise InputError("vision transformers need timm: pip install 'foveate[timm]'")


def fixed_positions(side: int, width: int, prefix: int = 0) -> nn.Parameter:
    """(prefix + side^2, width) fixed positions, the first `prefix` zero. A parameter, as those of the release are."""
    need_timm()
    from timm.layers import build_sincos2d_pos_embed

    if width % 4:
        raise InputError(f"width must be a multiple of 4 for positions in two dimensions, not {width}")
    table = build_sincos2d_pos_embed([side, side], width)
    return nn.Parameter(F.pad(table, (0, 0, prefix, 0)), requires_grad=False)


def transformer_blocks(depth: int, width: int, heads: int, drop_path: float = 0.0, **options: Any) -> nn.ModuleList:
    """timm's pre-norm blocks with `options`; `drop_path` is the last one's rate, to which it rises from 0.

    Raises an InputError where the width is no multiple of the heads.
    """
    need_timm()
    from timm.models.vision_transformer import Block

    if heads < 1 or width % heads:
        raise InputError(f"width must be a multiple of heads, not {width} with {heads} heads")
    rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
    return nn.ModuleList(Block(width, heads, drop_path=rate, **({"qkv_bias": True} | options)) for rate in rates)


def lv_vit(
    *, embed_dim: int = 384, depth: int = 16, num_heads: int = 6, img_size: int = 224, skip: float = 2.0,
    thick_stem: bool = False, distilled: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """LV-ViT as SiT has it: patches of 16 px from 3x3 convolutions, MLPs 3 times as wide, no bias in q, k and v.

    What attention and MLP add is divided by `skip`. A thick stem has two more convolutions, at the first width.
    """
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    def stem(img_size: int, embed_dim: int, **_: Any) -> ConvStem:
        first = embed_dim // 8
        widths = [first, first, first] if thick_stem else [first]
        strides = [2, 1, 1] if thick_stem else [2]
        return ConvStem(
            (*widths, 2 * first, 4 * first, embed_dim), (*strides, 2, 2, 2), nn.GELU, img_size, last_activated=False
        )

    kind = VisionTransformerDistilled if distilled else VisionTransformer
    settings: dict[str, Any] = {"mlp_ratio": 3.0, "qkv_bias": False, "norm_layer": nn.LayerNorm}
    return kind(
        img_size=img_size, patch_size=16, embed_dim=embed_dim, depth=depth, num_heads=num_heads, embed_layer=stem,
        block_fn=functools.partial(_divided_block, skip), **settings | options,
    )  # fmt: skip


def _divided_block(skip: float, **options: Any) -> nn.Module:
    from timm.models.vision_transformer import Block

    block = Block(**options)
    # Where timm has its layer scale: what comes out of a branch goes through it.
    block.ls1, block.ls2 = Divided(skip), Divided(skip)
    return block


class Divided(nn.Module):
    """x / skip."""

    def __init__(self, skip: float) -> None:
        super().__init__()
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        return x / self.skip

    def extra_repr(self) -> str:
        return str(self.skip)


class ConvStem(nn.Module):
    """3x3 convolutions without bias, each with batch norm and an activation, in place of a patch embedding.

    Pictures (B, 3, H, W) -> (B, N, C), or (B, h, w, C) with `as_map`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        strides: Sequence[int],
        activation: Callable[[], nn.Module],
        image: int,
        last_activated: bool = True,
        as_map: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        side = image
        for before, width, stride in zip((3, *widths), widths, strides):
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), activation()]
            side = (side + stride - 1) // stride
        self.layers = nn.Sequential(*(layers if last_activated else layers[:-1]))
        self.grid_size = (side, side)
        self.num_patches = side**2
        self.img_size = (image, image)
        self.patch_size = (image // side, image // side)
        self.as_map = as_map

    def forward(self, pictures: Tensor) -> Tensor:
        x: Tensor = self.layers(pictures)
        return x.permute(0, 2, 3, 1) if self.as_map else x.flatten(2).transpose(1, 2)


def take_weights(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Copies every weight that `model` has under the same name and in the same shape; returns its other names."""
    own = model.state_dict()
    shared = {name: weight for name, weight in state.items() if name in own and own[name].shape == weight.shape}
    model.load_state_dict(shared, strict=False)
    return [name for name in own if name not in shared]


def take_backbone(own: Any, model: nn.Module) -> list[str]:
    """`take_weights` of a timm VisionTransformer; the place of a class token that `own` does not have is left out."""
    state, prefix = dict(model.state_dict()), int(getattr(model, "num_prefix_tokens", 0))
    if not own.num_prefix_tokens and prefix and not getattr(model, "no_embed_class", False) and "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"][:, prefix:]
    return take_weights(own, state)


def embed(host: Any, pictures: Tensor) -> Tensor:
    """(B, prefix + N, C) of pictures (B, 3, H, W): what enters the first block of a timm VisionTransformer."""
    return enter(host, host.patch_embed(pictures))


def enter(host: Any, patches: Tensor) -> Tensor:
    """The same of what its patch embedding makes."""
    x: Tensor = host.norm_pre(host.patch_drop(host._pos_embed(patches)))
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Attention of one set to another, with the weights of timm's self-attention


def queries(attention: Any, x: Tensor) -> Tensor:
    """(B, H, Q, D) of x (B, Q, C), by the rows of timm's joint `qkv` that make queries."""
    width, bias = attention.attn_dim, attention.qkv.bias
    made = F.linear(x, attention.qkv.weight[:width], None if bias is None else bias[:width])
    normed: Tensor = attention.q_norm(made.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2))
    return normed


def keys_values(attention: Any, x: Tensor) -> Tensor:
    """(B, K, 2C): keys and values of x (B, K, C)."""
    width, bias = attention.attn_dim, attention.qkv.bias
    return F.linear(x, attention.qkv.weight[width:], None if bias is None else bias[width:])


def split_keys_values(attention: Any, made: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, K, D) keys and values of what `keys_values` made."""
    key, value = made.unflatten(-1, (2, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return attention.k_norm(key), value


def project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, N, D) queries, keys and values of x (B, N, C)."""
    query, key, value = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return attention.q_norm(query), attention.k_norm(key), value


def project_out(attention: Any, out: Tensor) -> Tensor:
    """(B, N, C) of what the heads make, (B, H, N, D)."""
    projected: Tensor = attention.proj_drop(attention.proj(attention.norm(out.transpose(1, 2).flatten(2))))
    return projected


def attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, Q, C) of query (B, H, Q, D), key and value (B, H, K, D), through timm's output projection.

    `mask`, of two axes at least, is what is added to the logits.
    """
    dropout = attention.attn_drop.p if attention.training else 0.0
    out = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=attention.scale)
    return project_out(attention, out)


def attention_weights(attention: Any, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, H, Q, K) float32: the probabilities of `attend`."""
    logits = query.float() @ key.float().transpose(-1, -2) * attention.scale
    return (logits if mask is None else logits + mask).softmax(-1)


def add_branches(block: Any, residual: Tensor | None, attended: Tensor) -> Tensor:
    """The rest of timm's `Block` after its attention: attended + residual (None for 0), then the MLP on top."""
    x: Tensor = block.drop_path1(block.ls1(attended))
    x = x if residual is None else residual + x
    added: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return added
