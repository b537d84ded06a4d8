"""The hosts that lift poses, against loops and closed forms; their sizes are checked by the claims of `hot`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")

from foveate.method import InputError
from foveate.nn.pose_lifting import BONES, LIFTERS, CrossAttention, Graph, Lifter, MixSTE, MotionBERT
from tiny import shake

FRAMES = 9


def lifter(name: str, **changes: Any) -> Lifter:
    torch.manual_seed(0)
    settings = {"joints": 17, "channels": 2, "width": 8, "heads": 2, "mlp_ratio": 2.0, "representation": 6} | changes
    made = LIFTERS[name]([FRAMES] * 3, **settings)
    shake(made)
    return made.eval()


def tokens(made: Lifter, frames: int = FRAMES, seed: int = 1) -> Tensor:
    return torch.randn(2, frames, made.streams, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", LIFTERS)
@torch.no_grad()
def test_shapes_and_clips_by_themselves(name: str) -> None:
    made = lifter(name)
    keypoints = torch.randn(2, FRAMES, 17, 2)

    def run(some: Tensor) -> Tensor:
        x = made.embed(some)
        for index in range(3):
            x = made.layer(index, x)
        return made.head(x)

    poses = run(keypoints)
    assert poses.shape == (2, FRAMES, 17, 3) and poses.std() > 0.01
    torch.testing.assert_close(run(keypoints[1:]), poses[1:], rtol=1e-3, atol=1e-4)
    pooled = made.pool(made.embed(keypoints))
    assert pooled.shape == (2, FRAMES, 24 if name == "mhformer" else 8)
    wanted = made.embed(keypoints)[1, 3]
    torch.testing.assert_close(pooled[1, 3], wanted.flatten() if name == "mhformer" else wanted.mean(0))


@torch.no_grad()
def test_mixste_against_a_loop() -> None:
    made = lifter("mixste")
    assert isinstance(made, MixSTE)
    x = tokens(made)
    for index in (0, 1):
        wanted = x.clone()
        for b in range(2):
            for t in range(FRAMES):
                wanted[b, t] = made.spatial_norm(made.spatial[index](wanted[b, t][None]))[0]
            if index == 0:
                wanted[b] += made.frame_position[0]
            for j in range(17):
                wanted[b, :, j] = made.temporal_norm(made.temporal[index](wanted[b, :, j][None]))[0]
        torch.testing.assert_close(made.layer(index, x), wanted, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_motionbert_against_a_loop() -> None:
    made = lifter("motionbert")
    assert isinstance(made, MotionBERT)
    x, orders = tokens(made), []
    for blocks, order in ((made.joints_first[1], "joints frames"), (made.frames_first[1], "frames joints")):
        y = x.clone()
        for axis in order.split():
            for b in range(2):
                for k in range(17 if axis == "frames" else FRAMES):
                    part = (b, slice(None), k) if axis == "frames" else (b, k)
                    y[part] = blocks[1 if axis == "frames" else 0](y[part][None])[0]  # type: ignore[index]
        orders.append(y)
    fusion: Any = made.fusion[1]
    logits = torch.cat(orders, -1) @ fusion.weight.T + fusion.bias
    share = torch.sigmoid(logits[..., :1] - logits[..., 1:])
    wanted = share * orders[0] + (1 - share) * orders[1]
    torch.testing.assert_close(made.layer(1, x), wanted, rtol=1e-3, atol=1e-4)


def test_both_orders_count_the_same_to_begin_with() -> None:
    for name in ("motionbert", "motionagformer"):
        settings = {"joints": 17, "channels": 2, "width": 8, "heads": 2, "mlp_ratio": 2.0}
        made: Any = LIFTERS[name]([FRAMES] * 2, **settings)
        for fusion in made.fusion:
            torch.testing.assert_close(fusion(torch.randn(5, 16)).softmax(-1), torch.full((5, 2), 0.5))


@torch.no_grad()
def test_graph_against_a_loop() -> None:
    torch.manual_seed(0)
    bones = torch.zeros(17, 17)
    for one, other in BONES:
        bones[one, other] = bones[other, one] = 1
    assert bones.sum(1).tolist() == [3, 2, 2, 1, 2, 2, 1, 2, 4, 2, 1, 2, 2, 1, 2, 2, 1]
    for links in (bones, None):
        made = Graph(8, 17, links)
        nn.init.normal_(made.norm.running_mean)  # type: ignore[arg-type]
        made.eval()
        x = torch.randn(2, 17, 8)
        out = made(x)
        for b in range(2):
            matrix = bones
            if links is None:
                matrix = torch.zeros(17, 17)
                for i in range(17):
                    for j in sorted(range(17), key=lambda j: -float(x[b, i] @ x[b, j]))[:2]:
                        matrix[i, j] = 1
            for i in range(17):
                total = made.own(x[b, i])
                for j in range(17):
                    if matrix[i, j]:
                        total = total + made.linked(x[b, j]) / (matrix[i].sum() * matrix[j].sum()) ** 0.5
                norm: Any = made.norm
                total = (total - norm.running_mean[i]) / (norm.running_var[i] + norm.eps) ** 0.5
                torch.testing.assert_close(out[b, i], (x[b, i] + total).relu(), rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_mhformer_refines_each_and_then_all_see_the_others() -> None:
    made: Any = lifter("mhformer")
    x = tokens(made)
    refine, interact = made.refine[0], made.interact
    # Without the joint MLP a hypothesis does not see the others in a refining layer, and does in the last.
    for layer in (refine, interact):
        nn.init.zeros_(layer.mlp.fc2.weight)
        nn.init.zeros_(layer.mlp.fc2.bias)
    changed = x.clone()
    changed[:, :, 0] += 1
    assert torch.equal(made.layer(0, changed)[:, :, 1:], made.layer(0, x)[:, :, 1:])
    out = made.layer(2, x)
    a, b, c = x.unbind(2)
    norm, attention = interact.norms, interact.attention
    a = a + attention[0](norm[0][0](b), norm[0][1](c), norm[0][2](a))
    b = b + attention[1](norm[1][0](a), norm[1][1](c), norm[1][2](b))
    c = c + attention[2](norm[2][0](a), norm[2][1](b), norm[2][2](c))
    torch.testing.assert_close(out, torch.stack([a, b, c], 2))


@torch.no_grad()
def test_cross_attention_is_pytorchs() -> None:
    torch.manual_seed(0)
    made, theirs = CrossAttention(8, 2), nn.MultiheadAttention(8, 2, batch_first=True)
    theirs.in_proj_weight.copy_(torch.cat([made.query.weight, made.key.weight, made.value.weight]))
    theirs.in_proj_bias.copy_(torch.cat([made.query.bias, made.key.bias, made.value.bias]))
    theirs.out_proj.load_state_dict(made.out.state_dict())
    query, key, value = torch.randn(1, 4, 8), torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    wanted = theirs(query.expand(3, -1, -1), key, value)[0]
    torch.testing.assert_close(made(query, key, value), wanted)
    assert CrossAttention(8, 2, bias=False).key.bias is None


@pytest.mark.parametrize("name", ["mixste", "motionbert", "motionagformer"])
@torch.no_grad()
def test_attention_that_frames_receive(name: str) -> None:
    made = lifter(name)
    x, block = tokens(made), made.frame_block(1)
    total = torch.zeros(2, FRAMES)
    for b in range(2):
        for j in range(17):
            q, k, _ = block.attn.qkv(block.norm1(x[b, :, j])).chunk(3, -1)
            for head in (slice(0, 4), slice(4, 8)):
                total[b] += (q[:, head] @ k[:, head].T / 2).softmax(-1).mean(0) / 34
    torch.testing.assert_close(made.frame_attention(1, x), total, rtol=1e-3, atol=1e-5)
    assert len({round(float(one), 5) for one in total[0]}) > 3


def test_refusals() -> None:
    with pytest.raises(InputError, match="width must be a multiple of heads"):
        lifter("mixste", heads=3)
    with pytest.raises(InputError, match="17 joints"):
        lifter("motionagformer", joints=16)
    with pytest.raises(InputError, match="frames must be a multiple of 9"):
        LIFTERS["mhformer"]([10, 10], joints=17, channels=2, width=8, heads=2, mlp_ratio=2.0)
    with pytest.raises(InputError, match="MHFormer has no single block"):
        lifter("mhformer").frame_block(0)
