"""Sparsifiner against loops over heads and queries, dense timm models and closed forms."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("timm")

from foveate.measure.flops import count_flops
from foveate.method import InputError
from foveate.methods.reduce.sparsifiner import Sparsifiner
from tiny import shake

OPTIONS = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}


def model(**changes: Any) -> Sparsifiner:
    """37 tokens; heads of 8 channels; 6 reduced tokens; 10 keys of a query."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"backbone": "deit_tiny_patch16_224", "options": OPTIONS, "coefficients": 3}
    made = Sparsifiner(**(settings | changes))
    shake(made.backbone)
    for predictor in made.predictors:
        # Peaked coefficients, and a basis of which about half is above the threshold.
        torch.nn.init.normal_(predictor.query.weight, std=1.0)
        torch.nn.init.normal_(predictor.key.weight, std=1.0)
        torch.nn.init.normal_(predictor.down, std=0.3)
    return made.eval()


def pictures(count: int = 2, seed: int = 3) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def by_hand(made: Sparsifiner, picture: Tensor) -> tuple[Tensor, list[list[list[set[int]]]]]:
    """The last tokens (N, C) of one picture (3, H, W), and the keys of each layer, head and query, with plain loops."""
    host, chosen = made.backbone, []
    x = host._pos_embed(host.patch_embed(picture.unsqueeze(0)))[0]
    for block, predictor in zip(host.blocks, made.predictors):
        heads, width = block.attn.num_heads, block.attn.head_dim
        joint = block.attn.qkv(block.norm1(x))
        basis = predictor.back.abs()
        basis = torch.where(basis > 0.02, basis, 0).tolist()
        out, keys_of_head = [], []
        for h in range(heads):
            query, key, value = (joint[:, i * 32 + h * width : i * 32 + (h + 1) * width] for i in range(3))
            reduced = predictor.key(key).T @ predictor.down
            rows, keys = [], []
            for i in range(len(x)):
                mine = list(range(len(x)))
                if i:
                    soft = (predictor.query(query[i]) @ reduced / heads**0.5).softmax(0).tolist()
                    top = sorted(range(len(soft)), key=lambda n: -soft[n])[: predictor.coefficients]
                    estimate = [sum(soft[n] * basis[j][n] for n in top) for j in range(len(x))]
                    mine = sorted(sorted(mine, key=lambda j: (-estimate[j], j))[: math.ceil(len(x) / 4)])
                weights = (query[i] @ key[mine].T / width**0.5).softmax(0)
                rows.append(weights @ value[mine])
                keys.append(set(mine))
            out.append(torch.stack(rows))
            keys_of_head.append(keys)
        chosen.append(keys_of_head)
        x = x + block.attn.proj(torch.cat(out, 1))
        x = x + block.mlp(block.norm2(x))
    return host.norm(x), chosen


@torch.no_grad()
def test_it_is_what_loops_compute() -> None:
    made = model(options=OPTIONS | {"depth": 2})
    features, looked = made.forward_features(pictures()), made.look(pictures())
    for b, picture in enumerate(pictures()):
        wanted, keys = by_hand(made, picture)
        for layer, one in enumerate(looked):
            for h in range(4):
                assert [set(row.nonzero().flatten().tolist()) for row in one.mask[b, h]] == keys[layer][h]
        torch.testing.assert_close(features[b], wanted, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_with_all_keys_it_is_dense_attention() -> None:
    made = model(budget=1.0)
    assert torch.equal(made(pictures()), made.backbone(pictures()))
    assert not torch.allclose(model()(pictures()), made.backbone(pictures()), atol=1e-2)


@torch.no_grad()
def test_the_products_agree() -> None:
    outs = []
    for product in ("csr", "gather", "masked"):
        made = model(product=product)
        outs.append(made(pictures()))
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outs[1], outs[2], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_of_the_mask_and_of_the_attention() -> None:
    for one in model().look(pictures()):
        assert (one.mask[:, :, 0].sum(-1) == 37).all() and (one.mask[:, :, 1:].sum(-1) == 10).all()
        torch.testing.assert_close(one.attention.sum(-1), torch.ones(2, 4, 37))
        assert (one.attention[~one.mask] == 0).all() and (one.attention[one.mask] > 0).all()


@torch.no_grad()
def test_the_mask_depends_on_the_picture_and_the_head() -> None:
    made = model()
    first = made.look(pictures())[0].mask
    assert not torch.equal(first[0], first[1])
    for h in range(1, 4):
        assert not torch.equal(first[0, 0], first[0, h])


@torch.no_grad()
def test_the_estimate_is_not_negative_and_coefficients_are_few() -> None:
    made = model()
    predictor: Any = made.predictors[0]
    query, key = torch.randn(2, 4, 36, 8), torch.randn(2, 4, 37, 8)
    assert (predictor.estimate(query, key) >= 0).all() and (predictor.sparse_basis() >= 0).all()
    assert (predictor.basis() < 0).any()
    small = predictor.sparse_basis()
    assert (small[small > 0] > 0.02).all() and (small == 0).any()
    # With a basis of unit vectors the estimate is the coefficients themselves.
    predictor.back.zero_()[:6] = torch.eye(6)
    estimate, soft = predictor.estimate(query, key), predictor.soft_coefficients(query, key)
    assert ((estimate > 0).sum(-1) <= 3).all()
    torch.testing.assert_close(estimate[..., :6].amax(-1), soft.amax(-1))
    torch.testing.assert_close(soft.sum(-1), torch.ones(2, 4, 36))
    predictor.coefficients = 0
    loose = predictor.estimate(query, key)[..., :6]
    torch.testing.assert_close(loose, torch.where(soft > 0.05, soft, 0))


@torch.no_grad()
def test_scale_is_that_of_the_release_unless_asked() -> None:
    query, key = torch.randn(1, 4, 36, 8), torch.randn(1, 4, 37, 8)
    for scale, factor in (("heads", 4**-0.5), ("width", 8**-0.5)):
        predictor: Any = model(scale=scale).predictors[0]
        logits = predictor.query(query) @ (predictor.key(key).transpose(-1, -2) @ predictor.down)
        torch.testing.assert_close(predictor.soft_coefficients(query, key), (logits * factor).softmax(-1))


@torch.no_grad()
def test_a_threshold_instead_of_a_number_of_keys() -> None:
    made = model(select="threshold")
    looked = made.look(pictures())
    predictor: Any = made.predictors[0]
    x = made.backbone._pos_embed(made.backbone.patch_embed(pictures()))
    block = made.backbone.blocks[0]
    query, key, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    assert torch.equal(looked[0].mask[:, :, 1:], predictor.estimate(query[:, :, 1:], key) > 1e-4)
    assert len(looked[0].mask[:, :, 1:].sum(-1).unique()) > 1
    outs = {}
    for product in ("csr", "gather", "masked"):
        made.product = product
        outs[product] = made(pictures())
    torch.testing.assert_close(outs["csr"], outs["masked"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outs["gather"], outs["masked"], rtol=1e-5, atol=1e-5)


def test_a_shared_basis_has_no_matrix_of_its_own() -> None:
    own, shared = model(), model(share_basis=True)
    count = [sum(weight.numel() for weight in one.predictors.parameters()) for one in (own, shared)]
    assert count[0] - count[1] == 4 * 37 * 6
    one: Any = shared.predictors[0]
    assert torch.equal(one.basis(), one.down.T)


@torch.no_grad()
def test_another_number_of_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="must be"):
        model()(torch.randn(1, 3, 32, 24))
    predictor: Any = model().predictors[0]
    with pytest.raises(InputError, match="37 tokens, not 30"):
        predictor.estimate(torch.randn(1, 4, 5, 8), torch.randn(1, 4, 30, 8))


# -- tokens go too


@torch.no_grad()
def test_tokens_go_by_the_class_tokens_attention() -> None:
    made = model(prune=0.6, prune_layers=(0, 2))
    looked, features = made.look(pictures()), made.forward_features(pictures())
    assert [one.places.shape[1] for one in looked] == [37, 1 + 22, 1 + 22, 1 + 13]
    for b in range(2):
        for layer, left in ((0, 22), (2, 13)):
            before, after = looked[layer], looked[layer + 1]
            score = before.attention[b, :, 0].mean(0)
            best = sorted(range(1, len(score)), key=lambda j: -float(score[j]))[:left]
            wanted = {0} | {int(before.places[b, j]) for j in best}
            assert set(after.places[b].tolist()) == wanted
        left_out = sorted(set(range(37)) - set(looked[3].places[b].tolist()))
        assert (features[b, left_out] == 0).all() and len(left_out) == 23
        assert (features[b, looked[3].places[b]].abs().sum(-1) > 0).all()
    # Keys of a query: as many as before, or all that there are. Nothing else is in the sequence to attend to.
    assert [int(one.mask[0, 0, 1].sum()) for one in looked] == [10, 10, 10, 10]
    torch.testing.assert_close(made(pictures()), made.backbone.head(features[:, 0]))
    torch.testing.assert_close(made(pictures())[1:], made(pictures()[1:]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_predictor_sees_the_rows_of_the_tokens_that_are_left() -> None:
    predictor: Any = model().predictors[0]
    where = torch.tensor([[0, 3, 5, 20, 36], [0, 1, 2, 7, 8]])
    query, key = torch.randn(2, 4, 4, 8), torch.randn(2, 4, 5, 8)
    found = predictor.estimate(query, key, where)
    for b in range(2):
        soft = (
            predictor.query(query[b]) @ (predictor.key(key[b]).transpose(-1, -2) @ predictor.down[where[b]]) / 4**0.5
        ).softmax(-1)
        kth = soft.sort(-1, descending=True).values[..., 2:3]
        wanted = torch.where(soft >= kth, soft, 0) @ predictor.sparse_basis()[:, where[b]]
        torch.testing.assert_close(found[b], wanted)


# -- training


def test_the_first_stage_trains_the_predictors_alone() -> None:
    made = model().train()
    loss, parts = made.reconstruction_loss(pictures())
    loss.backward()
    parts = {name: part.detach() for name, part in parts.items()}
    for name, weight in made.named_parameters():
        # What is added to all keys alike is the same for all queries, so that the softmax may not feel the bias.
        assert (weight.grad is not None) == name.startswith("predictors."), name
    # Sums over everything but layers, of the dense model's own attention.
    wanted = 0.0
    for block, predictor, x in layer_inputs(made):
        query, key, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        attention = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)[:, :, 1:]
        soft = predictor.soft_coefficients(query[:, :, 1:], key)
        for b in range(2):
            for h in range(4):
                wanted += float(((soft[b, h] @ predictor.back.T) - attention[b, h]).detach().pow(2).sum())
    assert float(loss.detach()) == pytest.approx(0.01 * wanted / 4, rel=1e-4)
    assert 0 < float(parts["recall"]) < 1 and float(parts["reconstruction"]) == pytest.approx(wanted / 4, rel=1e-4)


@torch.no_grad()
def layer_inputs(made: Sparsifiner) -> list[tuple[Any, Any, Tensor]]:
    """Each block, its predictor and what enters it in the dense model."""
    x, found = made.backbone._pos_embed(made.backbone.patch_embed(pictures())), []
    for block, predictor in zip(made.backbone.blocks, made.predictors):
        found.append((block, predictor, x))
        x = block(x)
    return found


def test_the_second_stage_trains_everything_but_the_predictors() -> None:
    made = model().train()
    teacher = copy.deepcopy(made.backbone).eval()
    target = torch.tensor([1, 4])
    loss, parts = made.finetune_loss(pictures(), target, teacher)
    loss.backward()
    for name, weight in made.named_parameters():
        assert (weight.grad is None) == name.startswith("predictors."), name
    assert all(weight.grad is None for weight in teacher.parameters())
    with torch.no_grad():
        logits, tokens = made(pictures()), made.forward_features(pictures())[:, 1:]
        wanted, wanted_tokens = teacher(pictures()), teacher.forward_features(pictures())[:, 1:]
    task = -logits.log_softmax(-1)[[0, 1], target].mean()
    kl = (wanted.softmax(-1) * (wanted.log_softmax(-1) - logits.log_softmax(-1))).sum() / 2
    mse = (tokens - wanted_tokens).pow(2).mean()
    assert float(loss.detach()) == pytest.approx(float(task + 0.5 * kl + 0.5 * mse), rel=1e-4)
    assert float(parts["logits"]) == pytest.approx(float(kl), rel=1e-3)
    # A yes or no for each class.
    present = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 1]])
    _, parts = made.finetune_loss(pictures(), present, teacher)
    p, q = wanted.sigmoid(), logits.sigmoid()
    bernoulli = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum() / 2
    assert float(parts["logits"]) == pytest.approx(float(bernoulli), rel=1e-3)
    assert float(parts["task"]) == pytest.approx(float(F.binary_cross_entropy(q, present) * 5), rel=1e-3)


def test_gradients_where_tokens_went() -> None:
    made = model(prune=0.5, prune_layers=(1,)).train()
    teacher = copy.deepcopy(made.backbone).eval()
    loss, _ = made.finetune_loss(pictures(), torch.tensor([0, 1]), teacher)
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in made.backbone.parameters())


# -- costs, files, errors


@torch.no_grad()
def test_flops_of_a_run_are_those_of_the_formula() -> None:
    """DeiT-S of two layers: on the meta device (keys are copied), and on the CPU with its own products."""
    formula = Sparsifiner.attention_macs(197, 6, 64, 0.25, density=0.0)
    # The class token's row is dense, and has no coefficients.
    exact = formula + 2 * 6 * (197 - 50) * 64 - 6 * (64 * 32 + 32 * 32)
    # Rows of the basis are 208 numbers long, zeros included.
    exact += 6 * 196 * 8 * 208
    for device in ("meta", "cpu"):
        with torch.device(device):
            made = Sparsifiner(options={"depth": 2}, budget=0.25).eval()
            picture = torch.empty(1, 3, 224, 224)
            sparse = count_flops(functools.partial(made, picture)) / 2
            made.budget = 1.0
            dense = count_flops(functools.partial(made, picture)) / 2
        assert dense - sparse == pytest.approx(2 * (2 * 197**2 * 384 - exact), rel=1e-9)


def test_lv_vit_runs() -> None:
    made = Sparsifiner(backbone="lv-vit", options={"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2})
    out = made.eval()(torch.randn(1, 3, 64, 64))
    assert out.shape == (1, 1000)
    with torch.device("meta"):
        assert len(Sparsifiner.named("lv-vit-s").predictors) == 16


@torch.no_grad()
def test_weights_load_and_come_back(tmp_path: Path) -> None:
    made = model(budget=0.4)
    made.save_pretrained(tmp_path)
    again = Sparsifiner.from_pretrained(tmp_path).eval()
    assert again.budget == 0.4 and torch.equal(again(pictures()), made(pictures()))
    other = model(budget=1.0)
    torch.nn.init.normal_(other.backbone.head.weight)
    assert made.load_backbone(other.backbone) == []
    assert torch.equal(made.backbone(pictures()), other(pictures()))
    half = made.bfloat16()(pictures().bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"budget": 0.0}, "budget"), ({"prune": 1.5}, "prune"), ({"select": "best"}, "select"),
        ({"product": "fast"}, "product"), ({"prune_layers": 3}, "prune_layers"), ({"coefficients": -1}, "coefficients"),
        ({"prune": 0.5, "prune_layers": (1, 4)}, "prune_layers"), ({"reduce_tokens": 0}, "reduce_tokens"),
        ({"reduce_channels": 9}, "reduce_channels"), ({"basis_threshold": -1.0}, "basis_threshold"),
        ({"scale": "depth"}, "scale"), ({"share_basis": 1}, "share_basis"), ({"backbone": "resnet18"}, "backbone"),
        ({"options": OPTIONS | {"attn_drop_rate": 0.1}}, "attn_drop_rate"),
    ],
)  # fmt: skip
def test_nonsense_is_named(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=name):
        model(**changes)
    with pytest.raises(InputError, match="did you mean deit-s"):
        Sparsifiner.named("deit-small")
