"""Lifting 2-D keypoints of a video to 3-D: MixSTE, MotionBERT, MotionAGFormer and MHFormer, built on timm's blocks.

All keep one token for each frame and stream: (B, F, S, C) of B clips, F frames, S joints (MHFormer: S = 3 hypotheses,
each of all joints) and C channels. `embed` makes them of keypoints (B, F, J, c), `layer` is one of `depth` steps, of
as many frames as it is given, and `head` makes poses (B, F, J, 3) of them. timm is an optional extra: it is loaded
when a model is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.method import InputError
from foveate.nn.vit import add_branches, attention_weights, need_timm, project

BONES = (
    (0, 1), (1, 2), (2, 3), (0, 4), (4, 5), (5, 6), (0, 7), (7, 8), (8, 9), (9, 10),
    (8, 11), (11, 12), (12, 13), (8, 14), (14, 15), (15, 16),
)  # fmt: skip
"""Human3.6M's skeleton: pelvis; right hip, knee, ankle; left hip, knee, ankle; spine, thorax, nose, head; left
shoulder, elbow, wrist; right shoulder, elbow, wrist."""
LEFT, RIGHT = (4, 5, 6, 11, 12, 13), (1, 2, 3, 14, 15, 16)


class Lifter(nn.Module):
    """What the hosts share.

    Args:
        lengths: frames that each layer sees; the first is F.
        joints, channels: J and c of the keypoints.
        width, heads, mlp_ratio: of the blocks.
        representation: channels before the last linear layer, where the host has such.
        drop_path: greatest rate of stochastic depth, rising with the layers.
    """

    bias = True
    """Of queries, keys and values."""

    def __init__(
        self, lengths: Sequence[int], *, joints: int, channels: int, width: int, heads: int, mlp_ratio: float,
        representation: int = 512, drop_path: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        need_timm()
        if width % heads:
            raise InputError(f"width must be a multiple of heads, not {width} with {heads} heads")
        self.lengths, self.joints, self.width, self.depth = tuple(lengths), joints, width, len(lengths)
        self.streams = joints

    def embed(self, keypoints: Tensor) -> Tensor:
        raise NotImplementedError

    def layer(self, index: int, x: Tensor) -> Tensor:
        raise NotImplementedError

    def head(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def pool(self, x: Tensor) -> Tensor:
        """(B, F, D): one vector for each frame, the mean over the joints."""
        return x.mean(2)

    def frame_block(self, index: int) -> Any:
        """The timm block of a layer with attention among frames; InputError for a host without such."""
        raise InputError(f"{type(self).__name__} has no single block with attention among frames")

    def frame_attention(self, index: int, x: Tensor) -> Tensor:
        """(B, F): attention that each frame would receive in a layer, mean over frames, heads and joints."""
        block = self.frame_block(index)
        query, key, _ = project(block.attn, block.norm1(x.transpose(1, 2).flatten(0, 1)))
        return attention_weights(block.attn, query, key).mean((1, 2)).unflatten(0, (len(x), -1)).mean(1)


def _block(width: int, heads: int, mlp_ratio: float, drop_path: float = 0.0, **options: Any) -> Any:
    from timm.models.vision_transformer import Block

    return Block(width, heads, mlp_ratio, drop_path=drop_path, **{"qkv_bias": True} | options)


def _rising(rate: float, depth: int) -> list[float]:
    return [rate * k / max(1, depth - 1) for k in range(depth)]


def _among_joints(block: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = block(x.flatten(0, 1))
    return out.unflatten(0, x.shape[:2])


def _among_frames(block: nn.Module, x: Tensor) -> Tensor:
    tracks = x.transpose(1, 2)
    out: Tensor = block(tracks.flatten(0, 1))
    return out.unflatten(0, tracks.shape[:2]).transpose(1, 2)


class MixSTE(Lifter):
    """Blocks among joints and among frames in turn, one shared norm behind each kind.

    MixSTE, CVPR 2022, https://arxiv.org/abs/2203.00859. The positions of the frames are added within the
    first layer, behind its block among joints.
    """

    def __init__(self, lengths: Sequence[int], **settings: Any) -> None:
        super().__init__(lengths, **settings)
        width, heads, ratio = settings["width"], settings["heads"], settings["mlp_ratio"]
        rates = _rising(settings.get("drop_path", 0.0), self.depth)
        self.embedding = nn.Linear(settings["channels"], width)
        self.joint_position = nn.Parameter(torch.zeros(1, 1, self.joints, width))
        self.frame_position = nn.Parameter(torch.zeros(1, lengths[0], 1, width))
        self.spatial = nn.ModuleList(_block(width, heads, ratio, rate) for rate in rates)
        self.temporal = nn.ModuleList(_block(width, heads, ratio, rate) for rate in rates)
        self.spatial_norm, self.temporal_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.output = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3))

    def embed(self, keypoints: Tensor) -> Tensor:
        x: Tensor = self.embedding(keypoints) + self.joint_position
        return x

    def layer(self, index: int, x: Tensor) -> Tensor:
        x = self.spatial_norm(_among_joints(self.spatial[index], x))
        if index == 0:
            x = x + self.frame_position
        x = self.temporal_norm(_among_frames(self.temporal[index], x))
        return x

    def head(self, x: Tensor) -> Tensor:
        poses: Tensor = self.output(x)
        return poses

    def frame_block(self, index: int) -> Any:
        return self.temporal[index]


class MotionBERT(Lifter):
    """Two orders in each layer, joints before frames and frames before joints, mixed by learned weights.

    MotionBERT's DSTformer, ICCV 2023, https://arxiv.org/abs/2210.06551.
    """

    def __init__(self, lengths: Sequence[int], **settings: Any) -> None:
        super().__init__(lengths, **settings)
        width, heads, ratio = settings["width"], settings["heads"], settings["mlp_ratio"]
        rates = _rising(settings.get("drop_path", 0.0), self.depth)
        self.embedding = nn.Linear(settings["channels"], width)
        self.joint_position = nn.Parameter(torch.zeros(1, 1, self.joints, width))
        self.frame_position = nn.Parameter(torch.zeros(1, lengths[0], 1, width))
        # [joints, frames] of the order joints -> frames, then of the order frames -> joints.
        self.joints_first, self.frames_first = (
            nn.ModuleList(nn.ModuleList(_block(width, heads, ratio, rate) for _ in range(2)) for rate in rates)
            for _ in range(2)
        )
        self.fusion = nn.ModuleList(nn.Linear(2 * width, 2) for _ in rates)
        self.norm = nn.LayerNorm(width)
        representation = settings.get("representation", 512)
        self.output = nn.Sequential(nn.Linear(width, representation), nn.Tanh(), nn.Linear(representation, 3))
        self.apply(_narrow)
        for weight in (self.joint_position, self.frame_position):
            nn.init.trunc_normal_(weight, std=0.02)
        for one in self.fusion:
            _equal(one)

    def embed(self, keypoints: Tensor) -> Tensor:
        x: Tensor = self.embedding(keypoints) + self.joint_position + self.frame_position
        return x

    def layer(self, index: int, x: Tensor) -> Tensor:
        first: Any = self.joints_first[index]
        second: Any = self.frames_first[index]
        one = _among_frames(first[1], _among_joints(first[0], x))
        other = _among_joints(second[0], _among_frames(second[1], x))
        return _fused(self.fusion[index], one, other)

    def head(self, x: Tensor) -> Tensor:
        poses: Tensor = self.output(self.norm(x))
        return poses

    def frame_block(self, index: int) -> Any:
        order: Any = self.frames_first[index]
        return order[1]


class MotionAGFormer(Lifter):
    """Attention and graph convolution side by side in each layer, among joints then frames, mixed by learned weights.

    MotionAGFormer, WACV 2024, https://arxiv.org/abs/2310.16288. Frames are linked to the two that are most
    like them, themselves as a rule among them; joints along `BONES`. A layer is tied to its number of frames: each node
    of a graph has its own batch norm.
    """

    bias = False

    def __init__(self, lengths: Sequence[int], **settings: Any) -> None:
        super().__init__(lengths, **settings)
        if self.joints != 17:
            raise InputError(f"motionagformer knows the bones of 17 joints, not of {self.joints}")
        width, heads, ratio = settings["width"], settings["heads"], settings["mlp_ratio"]
        rate = settings.get("drop_path", 0.0)
        bones = torch.zeros(17, 17)
        for one, other in BONES:
            bones[one, other] = bones[other, one] = 1

        def block() -> Any:
            return _block(width, heads, ratio, rate, qkv_bias=False, init_values=1e-5)

        def graph(nodes: int, links: Tensor | None) -> GraphBlock:
            return GraphBlock(block(), Graph(width, nodes, links))

        self.embedding = nn.Linear(settings["channels"], width)
        self.joint_position = nn.Parameter(torch.zeros(1, 1, self.joints, width))
        self.attention = nn.ModuleList(nn.ModuleList([block(), block()]) for _ in lengths)
        self.graph = nn.ModuleList(nn.ModuleList([graph(17, bones), graph(count, None)]) for count in lengths)
        self.fusion = nn.ModuleList(nn.Linear(2 * width, 2) for _ in lengths)
        self.norm = nn.LayerNorm(width)
        representation = settings.get("representation", 512)
        self.output = nn.Sequential(nn.Linear(width, representation), nn.Tanh(), nn.Linear(representation, 3))
        for layer in self.fusion:
            _equal(layer)

    def embed(self, keypoints: Tensor) -> Tensor:
        x: Tensor = self.embedding(keypoints) + self.joint_position
        return x

    def layer(self, index: int, x: Tensor) -> Tensor:
        branches: list[Any] = [self.attention[index], self.graph[index]]
        one, other = (_among_frames(blocks[1], _among_joints(blocks[0], x)) for blocks in branches)
        return _fused(self.fusion[index], one, other)

    def head(self, x: Tensor) -> Tensor:
        poses: Tensor = self.output(self.norm(x))
        return poses

    def frame_block(self, index: int) -> Any:
        blocks: Any = self.attention[index]
        return blocks[1]


class MHFormer(Lifter):
    """Three hypotheses, each from the one before; refined each by itself, then (last layer) each from the others.

    MHFormer, CVPR 2022, https://arxiv.org/abs/2111.12707. The hypotheses come from transformers whose tokens
    are coordinates and whose channels are frames, so that F must be a multiple of their 9 heads.
    """

    def __init__(self, lengths: Sequence[int], **settings: Any) -> None:
        super().__init__(lengths, **settings)
        frames, width, heads, ratio = lengths[0], settings["width"], settings["heads"], settings["mlp_ratio"]
        if frames % 9:
            raise InputError(f"frames must be a multiple of 9 for mhformer, not {frames}")
        rate, rows = settings.get("drop_path", 0.0), self.joints * settings["channels"]
        self.streams = 3
        self.norms = nn.ModuleList(nn.LayerNorm(frames) for _ in range(3))
        self.generators = nn.ModuleList(_Generator(rows, frames, rate) for _ in range(3))
        self.embeddings = nn.ModuleList(nn.Linear(rows, width) for _ in range(3))
        self.frame_position = nn.Parameter(torch.zeros(1, frames, 3, width))
        self.refine = nn.ModuleList(_Refine(width, heads, ratio, rate) for _ in lengths[1:])
        self.interact = _Interact(width, heads, ratio, rate)
        self.norm, self.batch_norm = nn.LayerNorm(3 * width), nn.BatchNorm1d(3 * width)
        self.output = nn.Linear(3 * width, 3 * self.joints)

    def embed(self, keypoints: Tensor) -> Tensor:
        x, made = keypoints.flatten(2).transpose(1, 2), []
        for norm, generate, embedding in zip(self.norms, self.generators, self.embeddings):
            x = x + generate(norm(x))
            made.append(embedding(x.transpose(1, 2)))
        return torch.stack(made, 2) + self.frame_position

    def layer(self, index: int, x: Tensor) -> Tensor:
        out: Tensor = self.interact(x) if index == self.depth - 1 else self.refine[index](x)
        return out

    def head(self, x: Tensor) -> Tensor:
        joined = self.norm(x.flatten(2))
        joined = self.batch_norm(joined.flatten(0, 1)).unflatten(0, x.shape[:2])
        poses: Tensor = self.output(joined).unflatten(-1, (self.joints, 3))
        return poses

    def pool(self, x: Tensor) -> Tensor:
        """(B, F, 3C): the hypotheses side by side."""
        return x.flatten(2)


class _Generator(nn.Module):
    def __init__(self, rows: int, frames: int, rate: float) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, rows, frames))
        self.blocks = nn.Sequential(*(_block(frames, 9, 2, rate) for _ in range(4)))
        self.norm = nn.LayerNorm(frames)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.blocks(x + self.position))
        return out


class _Hypotheses(nn.Module):
    """Attention for each of three hypotheses, then one MLP on all three side by side."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        from timm.layers import DropPath, Mlp

        self.attention = nn.ModuleList(CrossAttention(width, heads) for _ in range(3))
        self.joined_norm = nn.LayerNorm(3 * width)
        self.mlp = Mlp(3 * width, int(mlp_ratio * width))
        self.drop_path = DropPath(drop_path)

    def mixed(self, streams: Sequence[Tensor]) -> Tensor:
        joined = torch.cat(list(streams), -1)
        joined = joined + self.drop_path(self.mlp(self.joined_norm(joined)))
        return joined.unflatten(-1, (3, -1))


class _Refine(_Hypotheses):
    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__(width, heads, mlp_ratio, drop_path)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        streams = []
        for one, norm, attention in zip(x.unbind(2), self.norms, self.attention):
            seen = norm(one)
            streams.append(one + self.drop_path(attention(seen, seen, seen)))
        return self.mixed(streams)


class _Interact(_Hypotheses):
    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__(width, heads, mlp_ratio, drop_path)
        self.norms = nn.ModuleList(nn.ModuleList(nn.LayerNorm(width) for _ in range(3)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        streams = list(x.unbind(2))
        for k, attention in enumerate(self.attention):
            norms: Any = self.norms[k]
            # Queries and keys of the two others, values of its own; the later ones see what the earlier became.
            first, second = (streams[other] for other in range(3) if other != k)
            read = attention(norms[0](first), norms[1](second), norms[2](streams[k]))
            streams[k] = streams[k] + self.drop_path(read)
        return self.mixed(streams)


class CrossAttention(nn.Module):
    """(B, Q, C) of query (B or 1, Q, C), key and value (B, K, C), with separate projections."""

    def __init__(self, width: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width, bias) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = [
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        ]
        read = F.scaled_dot_product_attention(parts[0].expand(len(key), -1, -1, -1), parts[1], parts[2])
        out: Tensor = self.out(read.transpose(1, 2).flatten(2))
        return out


class GraphBlock(nn.Module):
    """timm's block with a graph convolution in place of its attention."""

    def __init__(self, block: Any, graph: Graph) -> None:
        super().__init__()
        block.attn = graph
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return add_branches(self.block, x, self.block.attn(self.block.norm1(x)))


class Graph(nn.Module):
    """relu(x + BN(U x + D^-1/2 A D^-1/2 V x)) of x (N, nodes, C), D the sums of A's rows.

    `links` (nodes, nodes) are A; without, each node is linked to the 2 with which its dot product is greatest.
    """

    def __init__(self, width: int, nodes: int, links: Tensor | None) -> None:
        super().__init__()
        self.own, self.linked = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(nodes)
        self.links: Tensor | None
        self.register_buffer("links", links, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        links = self.links
        if links is None:
            likeness = x @ x.transpose(-1, -2)
            links = (likeness >= likeness.topk(min(2, x.shape[1]), -1).values[..., -1:]).to(x.dtype)
        scale = links.sum(-1).rsqrt()
        weights = scale.unsqueeze(-1) * links * scale.unsqueeze(-2)
        return F.relu(x + self.norm(self.own(x) + weights @ self.linked(x)))


def _fused(fusion: nn.Module, one: Tensor, other: Tensor) -> Tensor:
    shares = fusion(torch.cat([one, other], -1)).softmax(-1)
    return one * shares[..., :1] + other * shares[..., 1:]


def _equal(fusion: nn.Module) -> None:
    """Both branches count the same to begin with."""
    assert isinstance(fusion, nn.Linear)
    nn.init.zeros_(fusion.weight)
    nn.init.constant_(fusion.bias, 0.5)


def _narrow(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


LIFTERS: dict[str, type[Lifter]] = {
    "mixste": MixSTE, "motionbert": MotionBERT, "motionagformer": MotionAGFormer, "mhformer": MHFormer,
}  # fmt: skip
