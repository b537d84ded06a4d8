"""Attention between two sets with timm's weights, LV-ViT and its stem, and what a wrong backbone is told."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
from timm.models.vision_transformer import Block

from foveate.method import InputError
from foveate.nn.vit import (
    ConvStem,
    add_branches,
    attend,
    attention_weights,
    keys_values,
    lv_vit,
    queries,
    split_keys_values,
    take_weights,
    vision_transformer,
)


def block(**options: object) -> Block:
    torch.manual_seed(0)
    made = Block(16, 4, qkv_bias=True, **options)
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.4)
    return made.eval()


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"init_values": 0.3}, {"scale_attn_norm": True}])
@torch.no_grad()
def test_to_itself_is_timms_block(options: dict[str, object]) -> None:
    made, x = block(**options), torch.randn(2, 7, 16)
    normed = made.norm1(x)
    key, value = split_keys_values(made.attn, keys_values(made.attn, normed))
    ours = add_branches(made, x, attend(made.attn, queries(made.attn, normed), key, value))
    torch.testing.assert_close(ours, made(x))


@torch.no_grad()
def test_two_sets_against_a_loop() -> None:
    attention = block().attn
    asks, holds, mask = torch.randn(3, 16), torch.randn(5, 16), torch.randn(1, 5)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    rows, shares = [], torch.zeros(4, 3, 5)
    for i in range(3):
        out = []
        for head in range(4):
            part = [slice(16 * kind + 4 * head, 16 * kind + 4 * head + 4) for kind in range(3)]
            q = weight[part[0]] @ asks[i] + bias[part[0]]
            logits = torch.tensor([float(q @ (weight[part[1]] @ one + bias[part[1]])) / math.sqrt(4) for one in holds])
            p = torch.exp(logits + mask[0]) / torch.exp(logits + mask[0]).sum()
            shares[head, i] = p
            out.append(sum(p[j] * (weight[part[2]] @ holds[j] + bias[part[2]]) for j in range(5)))
        rows.append(attention.proj.weight @ torch.cat(out) + attention.proj.bias)
    query = queries(attention, asks[None])
    key, value = split_keys_values(attention, keys_values(attention, holds[None]))
    torch.testing.assert_close(attend(attention, query, key, value, mask)[0], torch.stack(rows))
    torch.testing.assert_close(attention_weights(attention, query, key, mask)[0], shares)


@torch.no_grad()
def test_lv_vit_divides_its_branches() -> None:
    made = lv_vit(embed_dim=16, depth=1, num_heads=2, img_size=32, skip=3.0, num_classes=3).eval()
    first, x = made.blocks[0], torch.randn(2, 5, 16)
    assert first.attn.qkv.bias is None and first.mlp.fc1.out_features == 48
    y = x + first.attn(first.norm1(x)) / 3
    torch.testing.assert_close(first(x), y + first.mlp(first.norm2(y)) / 3)
    assert made.patch_embed(torch.randn(2, 3, 32, 32)).shape == (2, 4, 16)


@pytest.mark.parametrize(("thick", "widths"), [(False, [2, 4, 8, 16]), (True, [2, 2, 2, 4, 8, 16])])
def test_stem_of_lv_vit(thick: bool, widths: list[int]) -> None:
    stem = lv_vit(embed_dim=16, depth=1, num_heads=2, img_size=64, thick_stem=thick).patch_embed
    convolutions = [layer for layer in stem.layers if isinstance(layer, nn.Conv2d)]
    assert [one.out_channels for one in convolutions] == widths and all(one.bias is None for one in convolutions)
    assert math.prod(one.stride[0] for one in convolutions) == 16 and stem.grid_size == (4, 4)


def test_stem_as_map() -> None:
    stem = ConvStem((4, 6), (2, 2), nn.Hardswish, 32, as_map=True)
    assert stem(torch.randn(1, 3, 32, 24)).shape == (1, 8, 6, 6)
    assert stem.num_patches == 64 and stem.patch_size == (4, 4)


def test_weights_of_another_shape_stay() -> None:
    first, second = nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 4)]), nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 5)])
    before = first[1].weight.clone()
    assert take_weights(first, second.state_dict()) == ["1.weight", "1.bias"]
    assert torch.equal(first[0].weight, second[0].weight) and torch.equal(first[1].weight, before)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no_such_vit", {}, "no_such_vit"),
        ("vit_tiny_patch16_224", {"no_such_option": 1}, "no_such_option"),
        ("lv-vit", {"no_such_option": 1}, "no_such_option"),
        ("resnet18", {}, "must be a VisionTransformer of timm, not 'resnet18', a ResNet"),
    ],
)
def test_wrong_backbones(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        vision_transformer(name, options)
