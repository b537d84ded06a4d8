"""ToMe against the published formulation, written out over the whole sequence with class and register tokens."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.measure.flops import count_flops
from foveate.method import HostShape, InputError
from foveate.methods.reduce.tome import ToMe
from foveate.nn.matching import partners
from foveate.tokens import Tokens
from stub import numbered, stage
from tiny import pixels, prompt, vision, vlm


def soft_matching(metric: Tensor, r: int, protected: int) -> list[list[int]]:
    """One step over a whole sequence (S, D): the members of each new token, in the order of the new tokens.

    The first `protected` tokens take part in the alternating split, but neither leave nor are joined.
    """
    count = len(metric)
    unit = [one / one.norm() for one in metric.double()]
    even, odd = range(0, count, 2), range(1, count, 2)
    edges = []
    for a in even:
        candidates = [(float(unit[a] @ unit[b]), b) for b in odd if b >= protected]
        if a >= protected and candidates:
            edges.append((*max(candidates), a))
    edges.sort(reverse=True)
    joins = {a: b for _, b, a in edges[: min(r, (count - protected) // 2)]}
    lone = [[a] for a in even if a not in joins and a >= protected]
    joined = [[b, *(a for a in joins if joins[a] == b)] for b in odd if b >= protected]
    return [*([place] for place in range(protected)), *lone, *joined]


def by_hand(model: Any, picture: Tensor, merges: list[int], proportional: bool = True) -> tuple[Tensor, list[Any]]:
    """A whole timm ViT for one picture (1, 3, H, W), merging; the logits and, layer by layer, each token's patches."""
    prefix, heads = model.num_prefix_tokens, model.blocks[0].attn.num_heads
    x = model.norm_pre(model._pos_embed(model.patch_embed(picture)))[0]
    patches: list[list[int]] = [[] for _ in range(prefix)] + [[j] for j in range(len(x) - prefix)]
    history = []
    for block, r in zip(model.blocks, merges):
        query, key, value = block.attn.qkv(block.norm1(x)).reshape(len(x), 3, heads, -1).unbind(1)
        size = torch.tensor([max(1, len(one)) for one in patches], dtype=torch.float32)
        rows = []
        for h in range(heads):
            logits = query[:, h] @ key[:, h].T / query.shape[2] ** 0.5
            rows.append((logits + size.log() if proportional else logits).softmax(-1) @ value[:, h])
        x = x + block.attn.proj(torch.cat(rows, 1))
        # Where nothing is merged nothing is laid anew either.
        groups = soft_matching(key.mean(1), r, prefix) if r else [[j] for j in range(len(x))]
        x = torch.stack([(x[g] * size[g, None]).sum(0) / size[g].sum() for g in groups])
        patches = [[m for j in group for m in patches[j]] for group in groups]
        x = x + block.mlp(block.norm2(x))
        history.append(patches[prefix:])
    return model.forward_head(model.norm(x[None])), history


@pytest.mark.parametrize("name", ["timm", "timm-distilled", "timm-reg-avg"])
@pytest.mark.parametrize("r", [3, 8, (5, 0, 2), (1, 7)])
@torch.no_grad()
def test_a_whole_vit_equals_the_slow_loop(name: str, r: Any) -> None:
    """Prefixes of 1, 2 and 4 tokens; r below and above what half of the tokens allows."""
    model = vision(name)
    pictures = pixels(3)
    merges = [r] * 4 if isinstance(r, int) else [*r, 0, 0, 0, 0][:4]
    with foveate.apply(model, ToMe(r=r)) as applied:
        ours = model(pictures)
    records = iter(applied.trace)
    for b in range(3):
        logits, history = by_hand(model, pictures[b : b + 1], merges)
        torch.testing.assert_close(ours[b : b + 1], logits, rtol=1e-4, atol=1e-5)
        records = iter(applied.trace)
        before = 16
        for layer, groups in enumerate(history):
            if len(groups) == before:
                continue
            before, record = len(groups), next(records)
            assert record.stage == f"vision.mlp[{layer}]"
            for j, members in enumerate(groups):
                assert (record.source[b] == j).nonzero().flatten().tolist() == sorted(members)
    assert next(records, None) is None


@torch.no_grad()
def test_attention_is_proportional_to_the_size() -> None:
    """The slow loop without `log s` is something else: the test above can tell."""
    model, picture = vision("timm"), pixels(1)
    with foveate.apply(model, ToMe(r=3)):
        ours = model(picture)
    plain, _ = by_hand(model, picture, [3] * 4, proportional=False)
    assert (ours - plain).abs().max() > 1e-2


def key_projection(attention: Any) -> Any:
    return next(m for n, m in attention.named_modules() if n.split(".")[-1] in ("k_proj", "key"))


@pytest.mark.parametrize("name", ["vit", "clip", "siglip", "dinov2", "dinov2-reg"])
@torch.no_grad()
def test_encoders_of_transformers_match_by_their_own_keys(name: str) -> None:
    """Mean over heads of the key projection, with the class and register tokens in their places of the split."""
    model, pictures = vision(name), pixels(2)
    seen: list[Tensor] = []
    with foveate.apply(model, ToMe(r=(4,))) as applied:
        prefix = applied.host.shape.prefix
        handle = key_projection(applied.host.encoder.attentions[0]).register_forward_hook(
            lambda m, a, out: seen.append(out.unflatten(-1, (4, 8)).mean(2))
        )
        model(pictures)
        handle.remove()
    assert [(record.stage, record.tokens_out) for record in applied.trace] == [("vision.mlp[0]", (12, 12))]
    for b in range(2):
        groups = soft_matching(seen[0][b], 4, prefix)[prefix:]
        for j, members in enumerate(groups):
            assert (applied.trace[0].source[b] == j).nonzero().flatten().tolist() == sorted(m - prefix for m in members)


@torch.no_grad()
def test_a_vision_language_models_tower_merges_up_to_the_features_that_are_used() -> None:
    host = vlm()  # 5 layers, of which the fourth's output is used
    given = prompt(host, [(2, 5), (1, 3)])
    with foveate.apply(host, ToMe(r=3)) as applied:
        host(**given)
        assert ToMe(r=3).reads(applied.host.shape) == tuple(f"vision.attention[{layer}]" for layer in range(4))
    assert [(record.stage, record.tokens_out) for record in applied.trace] == [
        ("vision.mlp[0]", (13, 13)), ("vision.mlp[1]", (10, 10)), ("vision.mlp[2]", (7, 7)), ("vision.mlp[3]", (4, 4)),
        ("llm.input", (4, 4)),
    ]  # fmt: skip


@torch.no_grad()
def test_features_are_weighted_by_size_when_merged_again() -> None:
    """Sizes 3 and 1 with features 0 and 1 make 1/4, whatever order they came in."""
    tokens = numbered(1, (1, 4)).with_x(torch.tensor([[[0.0], [0.0], [0.0], [1.0]]]))
    tokens = tokens.merge(torch.tensor([[0, 0, 0, 1]]))

    class Keys:
        key = torch.ones(1, 2, 2, 3)
        visual = torch.tensor([[0, 1]])

    at = stage(tokens, name="vision.mlp", layer=0, host=HostShape("timm", (), 1, 0, 0, (1, 4)), attention={0: Keys()})
    assert ToMe(r=1).merge(tokens, at).x.tolist() == [[[0.25]]]


# -- schedules


def test_schedules() -> None:
    assert ToMe(r=5).merges(4) == [5, 5, 5, 5]
    assert ToMe(r=(4, 2)).merges(4) == [4, 2, 0, 0]
    # From twice r to nothing, rounded down: 10, 6.67, 3.33, 0.
    assert ToMe(r=5, schedule="decreasing").merges(4) == [10, 6, 3, 0]
    assert ToMe(r=5, schedule="decreasing").merges(1) == [5]


@pytest.mark.parametrize(("r", "expected"), [(13, 40), (16, 10), (99, 1), (0, 196)])
def test_half_of_the_tokens_go_at_most(r: int, expected: int) -> None:
    count = 196
    for _ in range(12):
        count = max(count - r, (count + 1) // 2)
    assert count == expected == ToMe(r=r).left(196, 12)[-1]


@pytest.mark.parametrize("grid", [(24, 24), (14, 14), (27, 27)])
@pytest.mark.parametrize("budget", [0.9, 0.5, 1 / 9, 0.02])
def test_for_budget_reaches_it_with_one_r_and_less_at_the_end(grid: tuple[int, int], budget: float) -> None:
    host = HostShape("hf-vlm", (), 24, 22, 1, grid, 32)
    made = ToMe.for_budget(budget, host)
    count = grid[0] * grid[1]
    left = [count, *made.left(count, 23)]
    assert left[-1] == int(count * budget + 1e-9)
    gone = [before - after for before, after in pairwise(left)]
    assert gone == sorted(gone, reverse=True)
    full = [one for one, before in zip(gone, left) if one < before // 2]
    assert len({one for one in full if one}) <= 2


def test_a_budget_that_halving_cannot_reach_is_refused() -> None:
    host = HostShape("timm", (), 3, 2, 1, (14, 14))
    assert ToMe.for_budget(25 / 196, host).left(196, 3)[-1] == 25
    with pytest.raises(InputError, match="half of the tokens"):
        ToMe.for_budget(24 / 196, host)


def test_a_host_that_joins_patches_behind_the_encoder_spends_no_budget() -> None:
    host = HostShape("hf-vlm", (), 24, 23, 1, (32, 32), 32, joined=4)
    assert ToMe.for_budget(1.0, host).merges(24) == [0] * 24
    with pytest.raises(InputError, match="only the encoder"):
        ToMe.for_budget(0.5, host)


@torch.no_grad()
def test_macs_are_those_of_a_real_run() -> None:
    """DeiT-S with r = 13: counted on timm's model, less the matching itself (|A| |B| 64 a layer)."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(embed_dim=384, depth=12, num_heads=6).eval()
    picture = torch.randn(1, 3, 224, 224)
    method = ToMe(r=13)
    with foveate.apply(model, method):
        counted = count_flops(lambda: model(picture)) / 2
    patches = [196, *method.left(196, 12)[:-1]]
    # With a class token in front, the first patch is at an odd place.
    matching = sum((n // 2) * (n - n // 2) * 64 for n in patches)
    assert counted - matching == method.macs(196, 12, 384)


# -- the matching itself


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("count", [2, 3, 8, 9])
@pytest.mark.parametrize("surplus", [1, 2, 99])
def test_partners_equal_the_loop_over_the_sequence(first: int, count: int, surplus: int) -> None:
    """A prefix of one more token shifts the split by one."""
    metric = torch.randn(2, count, 5)
    into = partners(metric, surplus, "sets", first)
    for b in range(2):
        whole = torch.cat([torch.randn(first, 5), metric[b]])
        groups = soft_matching(whole, surplus, first)[first:]
        for j, members in enumerate(groups):
            assert (into[b] == j).nonzero().flatten().tolist() == sorted(m - first for m in members)


# -- refusals


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="r must be"):
        ToMe(r=(3, -1))
    with pytest.raises(InputError, match="schedule"):
        ToMe(r=(3, 1), schedule="decreasing")
    with pytest.raises(InputError, match="r has 5 numbers"):
        foveate.apply(vision("timm"), ToMe(r=(1, 1, 1, 1, 1)))


def test_different_numbers_are_refused() -> None:
    tokens = numbered(2).keep(torch.tensor([[0, 1, 2], [3, 4, -1]]))
    assert isinstance(tokens, Tokens)
    with pytest.raises(InputError, match="another method dropped some before"):
        ToMe(r=1).merge(tokens, replace(stage(tokens, name="vision.mlp", layer=0), entered=torch.tensor([16, 16])))
