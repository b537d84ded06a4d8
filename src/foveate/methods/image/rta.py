"""RTA: attention that corruptions do not throw off. Tokens average their neighbours first, and rows are kept apart.

`TokenAwarePooling` (TAP) gives each token of maps (B, C, H, W) a mixture of means over windows of several widths, with
weights that it chooses itself; a block is then `x + Attention(LN(TAP(x)))`. `attention_diversity_loss` punishes, over
all blocks, rows of attention (B, H, N, N) that look alike, entries up to threshold / N left out. `Rta` is a backbone
with both; the paper's backbones, FAN-Hybrid, are `FanHybrid`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.method import Card, Claim, InputError, Published, did_you_mean, register, whole, within
from foveate.nn.vit import need_timm, vision_transformer

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "fan-t-hybrid": {"width": 192, "depth": 8, "heads": 8},
    "fan-s-hybrid": {"width": 384, "depth": 10, "heads": 8},
    "fan-b-hybrid": {"width": 448, "depth": 16, "heads": 8},
    "fan-l-hybrid": {"width": 480, "depth": 22, "heads": 10, "stages": (3, 5)},
}
"""Arguments of `FanHybrid` by name: the paper's backbones."""


def dilated_mean(x: Tensor, dilation: int) -> Tensor:
    """Mean of the 3 x 3 neighbours at a distance of `dilation`, of maps (B, C, H, W); beyond the border are zeros, and
    they count: the sum is always divided by 9."""
    height, width = x.shape[2:]
    padded = F.pad(x, (dilation,) * 4)
    ends = (0, dilation, 2 * dilation)
    rows = sum(padded[:, :, end : end + height] for end in ends)
    assert isinstance(rows, Tensor)
    columns = sum(rows[:, :, :, end : end + width] for end in ends)
    assert isinstance(columns, Tensor)
    return columns / 9


class TokenAwarePooling(nn.Module):
    """Each token is averaged with its neighbours, over as wide a window as it chooses (section 3.1).

    With x (B, C, H, W), `p_0 = x`, `p_r` = `dilated_mean` of dilation r for r = 1 … K - 1, and weights
    `m = softmax_K(conv(BN(conv(x))))` of every position (3 x 3 convolutions without bias, C -> K -> K), the output is
    `sum_k m_k p_k`. K = 1 changes nothing.
    """

    def __init__(self, width: int, scales: int = 4) -> None:
        super().__init__()
        self.scales = whole("scales", scales, 1)
        self.predictor = nn.Sequential(
            nn.Conv2d(width, scales, 3, padding=1, bias=False), nn.BatchNorm2d(scales),
            nn.Conv2d(scales, scales, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """tokens (B, H W, C) row by row, grid (H, W) -> the same averaged, and the weights m (B, H, W, K)."""
        x = tokens.transpose(1, 2).unflatten(2, grid)
        weights = self.predictor(x).softmax(1)
        pooled = weights[:, :1] * x
        for dilation in range(1, self.scales):
            pooled = pooled + weights[:, dilation : dilation + 1] * dilated_mean(x, dilation)
        return pooled.flatten(2).transpose(1, 2), weights.movedim(1, 3)


def attention_diversity_loss(maps: Sequence[Tensor], threshold: float = 2.0) -> Tensor:
    """The attention diversification loss (section 3.2): how alike the rows of attention are, in 0..1, mean over layers.

    Of each layer's attention (B, heads, N, N) after the softmax, a = mean over heads and ā = mean of a over queries;
    entries of both that are not above `threshold / N` become 0; the loss is the mean of cos(ā, a_i) over queries i and
    pictures. Rows in which nothing is left count as 0.

    Raises:
        InputError: without maps.
    """
    if not maps:
        raise InputError("the attention of at least one layer is needed")
    similar = []
    for attention in maps:
        rows = attention.mean(1)
        mean = rows.mean(1, keepdim=True)
        least = threshold / attention.shape[-1]
        rows, mean = (torch.where(one > least, one, 0.0) for one in (rows, mean))
        similar.append(F.cosine_similarity(mean, rows, dim=-1).mean())
    return torch.stack(similar).mean()


class ChannelProcessing(nn.Module):
    """What stands in a FAN block for the MLP: an MLP with convolutions within, gated by how channels relate to tokens.

    With h heads of d channels: `gate = t sigmoid(softmax_N(q)^T mean_d(softmax_N(x)))`, (h, d), one number a channel;
    the output is `gate * LN(MLP(x))`, where the MLP adds two depth-wise 3 x 3 convolutions to its hidden features.
    """

    def __init__(self, width: int, heads: int) -> None:
        from timm.models.xcit import LPI

        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.temperature = nn.Parameter(torch.ones(heads, 1))
        self.expand, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.local = LPI(4 * width)
        self.local_scale = nn.Parameter(torch.ones(4 * width))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        query = self.query(x).softmax(1).unflatten(2, (self.heads, -1))
        key = x.softmax(1).unflatten(2, (self.heads, -1)).mean(3)
        gate = self.temperature * torch.einsum("bnhd,bnh->bhd", query, key).sigmoid()
        hidden = self.expand(x)
        hidden = hidden + self.local_scale * self.local(hidden, *grid)
        return self.norm(self.shrink(hidden)) * gate.flatten(1).unsqueeze(1)


class FanBlock(nn.Module):
    """`x + g1 Attention(LN(x))`, then `x + g2 ChannelProcessing(LN(x))`."""

    def __init__(self, width: int, heads: int, drop_path: float = 0.0) -> None:
        from timm.layers import Attention, DropPath

        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.channels = ChannelProcessing(width, heads)
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma2 * self.channels(self.norm2(x), grid))


class FanHybrid(nn.Module):
    """FAN-Hybrid (arXiv 2204.12451), the paper's backbone: two stages of ConvNeXt, then FAN blocks on a grid of H / 16
    x W / 16 tokens, then two layers of class attention. From timm's blocks; pictures (B, 3, H, W), multiples of 16 px.

    Args:
        width, depth, heads: of the FAN blocks.
        stages: depths of the ConvNeXt stages of 128 and 256 channels.
        drop_path: stochastic depth of the last block, rising linearly from 0.
        num_classes: of the head.
    """

    num_prefix_tokens = 0

    def __init__(
        self, *, width: int = 448, depth: int = 16, heads: int = 8, stages: Sequence[int] = (3, 3),
        drop_path: float = 0.0, num_classes: int = 1000,
    ) -> None:  # fmt: skip
        need_timm()
        from timm.layers import LayerNorm, LayerNorm2d
        from timm.models.convnext import ConvNeXtStage
        from timm.models.xcit import ClassAttentionBlock, PositionalEncodingFourier

        super().__init__()
        if width < 1 or heads < 1 or width % heads:
            raise InputError(f"width must be a multiple of heads, not {width} with {heads} heads")
        if len(stages) != 2:
            raise InputError(f"stages must be two depths, not {stages!r}")
        self.stem = nn.Sequential(nn.Conv2d(3, 128, 4, 4), LayerNorm2d(128, eps=1e-6))
        self.stages = nn.Sequential(
            *(
                ConvNeXtStage(
                    before,
                    after,
                    stride=stride,
                    depth=layers,
                    ls_init_value=1e-6,
                    norm_layer=LayerNorm2d,
                    norm_layer_cl=LayerNorm,
                )
                for before, after, stride, layers in ((128, 128, 1, stages[0]), (128, 256, 2, stages[1]))
            )
        )
        self.proj = nn.Conv2d(256, width, 2, 2)
        self.pos_embed = PositionalEncodingFourier(dim=width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            FanBlock(width, heads, drop_path * layer / max(1, depth - 1)) for layer in range(whole("depth", depth, 1))
        )
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(width, heads, qkv_bias=True, norm_layer=norm, tokens_norm=True) for _ in range(2)
        )
        self.norm = norm(width)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.embed_dim = width
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, pixels: Tensor) -> Tensor:
        """(B, 1 + N, C): the class token and N patches, normalised."""
        x = self.proj(self.stages(self.stem(pixels)))
        batch, _, height, width = x.shape
        x = (x + self.pos_embed(batch, height, width)).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, (height, width))
        x = torch.cat([self.cls_token.expand(batch, -1, -1), x], dim=1)
        for block in self.cls_attn_blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, num_classes) logits."""
        return self.head(self.forward_features(pixels)[:, 0])


@functools.lru_cache(maxsize=4)
def _on_meta(name: str, scales: int) -> Rta:
    with torch.device("meta"):
        return Rta(backbone=name, scales=scales)


def _meta(name: str, scales: int) -> Callable[[], nn.Module]:
    return lambda: _on_meta(name, scales)


def _picture() -> Sequence[Any]:
    return (torch.empty(1, 3, 224, 224),)


def _added(width: int, blocks: int) -> Callable[[Any], float]:
    def count(cls: type[Rta]) -> float:
        with torch.device("meta"):
            return float(blocks * sum(one.numel() for one in TokenAwarePooling(width).parameters()))

    return count


@register
class Rta(Published, nn.Module, PyTorchModelHubMixin, library_name="foveate"):
    """A vision transformer whose attention sees averaged tokens, and a loss that keeps the rows of attention apart.

    In each block `x + Attention(LN(x))` becomes `x + Attention(LN(TAP(x)))` (see `TokenAwarePooling`): queries, keys
    and values come from averaged tokens, the shortcut and the rest of the block from the tokens as they are. Class and
    register tokens are not averaged. In training `attend` also returns the attention of all blocks, after softmax, and
    `loss` adds `weight` times `attention_diversity_loss` to the cross entropy. Shapes: (B, 3, H, W) -> (B, classes).

    Robustifying Token Attention for Vision Transformers, ICCV 2023, https://arxiv.org/abs/2303.11126, section 3. The
    paper's backbones are in `CONFIGURATIONS`; any pre-norm vision transformer of timm is one too (the paper's other,
    RVT, is not there). With a class token, its row and column count in the loss like the others' (ours: the paper's
    blocks have none). `load_backbone` takes the weights of a backbone that was trained without.

    Args:
        backbone: a name in `CONFIGURATIONS`, or of a timm `VisionTransformer`.
        scales: K of the pooling; 1 averages nothing, 0 leaves the pooling out.
        threshold: entries of attention up to `threshold / N` do not count in the loss.
        weight: of the loss.
        options: arguments of the backbone, `FanHybrid`'s or timm's.
    """

    card = Card(
        slug="rta", title="Robustifying Token Attention for Vision Transformers", arxiv="2303.11126", year=2023,
        kind="image", hosts=("timm",), training_free=False,
        summary="Averages tokens with their neighbours before attention, and trains rows of attention to differ.",
        parameters={
            "backbone": "fan-t-hybrid, fan-s-hybrid, fan-b-hybrid, fan-l-hybrid, or a timm VisionTransformer",
            "scales": "K: widths of window that tokens choose from; 0 for no pooling",
            "threshold": "entries of attention up to threshold / N do not count in the loss",
            "weight": "of the attention diversification loss",
            "options": "arguments of the backbone",
        },
    )  # fmt: skip

    claims = (
        Claim("parameters that pooling adds to FAN-B-Hybrid", "value", 260_480, "card", tolerance=0,
              value=_added(448, 16)),
        *(
            Claim(f"parameters of {label}", "parameters", figure, source, tolerance=tolerance,
                  model=_meta(name, scales))
            for label, figure, source, tolerance, name, scales in (
                ("FAN-B-Hybrid without pooling", 50_475_048, "card", 0, "fan-b-hybrid", 0),
                ("FAN-B-Hybrid", 50_735_528, "card", 0, "fan-b-hybrid", 4),
                ("FAN-T-Hybrid", 7.52e6, "card", 0.01, "fan-t-hybrid", 4),
                ("FAN-S-Hybrid", 26.26e6, "card", 0.01, "fan-s-hybrid", 4),
                ("FAN-L-Hybrid", 77.24e6, "card", 0.01, "fan-l-hybrid", 4),
            )
        ),
        *(
            Claim(f"MACs of {label}", "flops", figure, "card", tolerance=0.01, model=_meta("fan-b-hybrid", scales),
                  inputs=_picture, counting="macs")
            for label, figure, scales in (
                ("FAN-B-Hybrid without pooling", 11.81e9, 0), ("FAN-B-Hybrid", 11.86e9, 4),
            )
        ),
    )  # fmt: skip

    def __init__(
        self, *, backbone: str = "fan-b-hybrid", scales: int = 4, threshold: float = 2.0, weight: float = 1.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scales = whole("scales", scales)
        self.threshold = within("threshold", threshold, "[0, inf)")
        self.weight = within("weight", weight, "[0, inf)")
        if backbone in CONFIGURATIONS:
            self.backbone: Any = FanHybrid(**(CONFIGURATIONS[backbone] | dict(options or {})))
        elif backbone.startswith("fan"):
            raise InputError(f"no backbone {backbone!r}; {did_you_mean(backbone, CONFIGURATIONS)}")
        else:
            self.backbone = vision_transformer(backbone, options)
        width = self.backbone.embed_dim
        for number, block in enumerate(self.backbone.blocks):
            if not all(hasattr(block, name) for name in ("norm1", "attn")) or not hasattr(block.attn, "attn_drop"):
                raise InputError(f"block {number} of {backbone} is not pre-norm with timm's Attention")
        pools = [TokenAwarePooling(width, scales) for _ in self.backbone.blocks] if scales else []
        self.pools = nn.ModuleList(pools)
        self._grid = (0, 0)
        for pool, block in zip(self.pools, self.backbone.blocks):
            block.norm1.register_forward_pre_hook(functools.partial(self._average, pool))

    @classmethod
    def named(cls, name: str, **changes: Any) -> Rta:
        """An untrained model by its backbone's name, with other arguments changed."""
        return cls(backbone=name, **changes)

    def load_backbone(self, source: nn.Module | Mapping[str, Tensor]) -> None:
        """Takes the backbone's weights from a model of the same kind, or its state dict; what else is there, is left.

        Raises:
            InputError: where weights are missing or have another shape.
        """
        state = source.state_dict() if isinstance(source, nn.Module) else source
        own = self.backbone.state_dict()
        wrong = [name for name, value in own.items() if name not in state or state[name].shape != value.shape]
        if wrong:
            raise InputError(f"the source has no weights {', '.join(wrong[:3])} of this backbone's shape")
        self.backbone.load_state_dict({name: state[name] for name in own})

    def _average(self, pool: nn.Module, norm: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """What the attention's norm is handed: averaged tokens, prefix tokens as they are."""
        (x,) = args
        prefix = self.backbone.num_prefix_tokens
        pooled, _ = pool(x[:, prefix:], self._grid)
        return (torch.cat([x[:, :prefix], pooled], dim=1) if prefix else pooled,)

    def _look(self, pixels: Tensor) -> None:
        """Notes the grid of tokens of these pictures."""
        height, width = pixels.shape[-2:]
        if isinstance(self.backbone, FanHybrid):
            if height % 16 or width % 16:
                raise InputError(f"pictures must be multiples of 16 px, not {height} x {width}")
            self._grid = (height // 16, width // 16)
        else:
            self._grid = self.backbone.patch_embed.dynamic_feat_size((height, width))

    def forward_features(self, pixels: Tensor) -> Tensor:
        """(B, prefix + N, C) tokens after the last block, normalised (with FAN the class token is the prefix)."""
        self._look(pixels)
        features: Tensor = self.backbone.forward_features(pixels)
        return features

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, classes) logits of pictures (B, 3, H, W)."""
        self._look(pixels)
        logits: Tensor = self.backbone(pixels)
        return logits

    def attend(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and of each block the attention (B, heads, N, N) after the softmax, before dropout.

        Fused attention never holds these maps; it is off here, so this takes the memory that it saves.
        """
        maps: list[Tensor] = []

        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            maps.append(args[0])

        attentions = [block.attn for block in self.backbone.blocks]
        fused = [attention.fused_attn for attention in attentions]
        hooks = [attention.attn_drop.register_forward_pre_hook(note) for attention in attentions]
        try:
            for attention in attentions:
                attention.fused_attn = False
            return self(pixels), maps
        finally:
            for hook in hooks:
                hook.remove()
            for attention, was in zip(attentions, fused):
                attention.fused_attn = was

    def loss(self, logits: Tensor, maps: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`CE + weight * diversity`, and both as "task" and "diversity"; labels (B,) numbers or (B, K) weights."""
        task = F.cross_entropy(logits, labels)
        diversity = attention_diversity_loss(maps, self.threshold)
        return task + self.weight * diversity, {"task": task, "diversity": diversity}
