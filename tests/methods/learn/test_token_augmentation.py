"""Augmentation of stored tokens: each of its steps against slow references, and what is drawn for whom."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("timm")

from foveate.method import InputError
from foveate.methods.learn.token_augmentation import (
    Codebook,
    ColorAdapt,
    EmbNoise,
    Geometry,
    TokenAdapt,
    TokenAugmentation,
    TokenEda,
    color_adapt,
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def codebook(codes: int = 391, channels: int = 8) -> Codebook:
    return Codebook(torch.randn(codes, channels))


def test_quantise() -> None:
    book, every = codebook(), torch.arange(391)
    assert torch.equal(book.quantise(book.weight[:, :, None, None]).flatten(), every)
    x = torch.randn(3, 8, 5, 4)
    scale = torch.rand(3, 1, 5, 4) * 100 + 1e-3
    slow = F.cosine_similarity(x.permute(0, 2, 3, 1).unsqueeze(3), book.weight.view(1, 1, 1, 391, 8), dim=4).argmax(3)
    assert torch.equal(book.quantise(x), slow) and torch.equal(book.quantise(scale * x), slow)
    assert torch.equal(book.embed(slow)[1, :, 2, 3], book.weight[slow[1, 2, 3]])
    same = Codebook(book.weight)
    assert same.fingerprint == book.fingerprint != codebook().fingerprint
    for bad in (torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([[1.0, 0], [2, 0]]), torch.tensor([[math.nan]])):
        with pytest.raises(InputError):
            Codebook(bad)


def test_color_adapt() -> None:
    x = torch.randn(6, 4, 8, 8) * torch.rand(6, 4, 1, 1) + torch.randn(6, 4, 1, 1)
    made = color_adapt(x, x.flip(0))
    for k in range(6):
        for channel in range(4):
            wanted = x[5 - k, channel]
            assert float(made[k, channel].mean()) == pytest.approx(float(wanted.mean()), abs=1e-5)
            assert float(made[k, channel].std()) == pytest.approx(float(wanted.std()), rel=1e-4)
    torch.testing.assert_close(color_adapt(x, x), x)
    x[0, 1] = 0.1  # Neither is this number binary, nor the mean of 64 of it.
    made = color_adapt(x, x.flip(0))
    assert made.isfinite().all()
    torch.testing.assert_close(made[0, 1], x[5, 1].mean().expand(8, 8))
    torch.testing.assert_close(made[5, 1], x[0, 1])
    kept = x.clone()
    half = ColorAdapt()(x)
    changed = [k for k in range(6) if not torch.equal(half[k], x[k])]
    assert len(changed) == 3 and torch.equal(x, kept), "half of the batch, and not in place"
    torch.testing.assert_close(half[changed], made[changed])


def test_emb_noise() -> None:
    x = torch.zeros(4, 50, 40, 40)
    made = EmbNoise(std=0.5)(x)
    changed = [k for k in range(4) if bool(made[k].any())]
    assert len(changed) == 2
    means = made[changed].mean((2, 3))
    assert float(means.std()) == pytest.approx(0.5, rel=0.2), "one draw for each channel"
    assert float((made[changed] - means[..., None, None]).std()) == pytest.approx(0.5, rel=0.02)


def test_token_eda() -> None:
    book = codebook(40)
    ids = torch.randint(40, (30, 12, 12))
    kept = ids.clone()
    made = TokenEda(book, swap=0.0)(ids)
    changed = made != ids
    assert float(changed.float().mean()) == pytest.approx(0.25, abs=0.03) and torch.equal(ids, kept)
    near = F.cosine_similarity(book.weight[:, None], book.weight[None], dim=2).fill_diagonal_(-2)
    allowed = near.argsort(1, descending=True)[:, :5]
    assert bool((allowed[ids[changed]] == made[changed][:, None]).any(1).all())
    numbered = torch.arange(144).view(1, 12, 12).repeat(20, 1, 1)
    moved = TokenEda(Codebook(torch.randn(144, 8)), replace=0.0)(numbered)
    assert not torch.equal(moved, numbered) and torch.equal(moved.flatten(1).sort(1).values, numbered.flatten(1))
    for one in moved:
        where = (one != numbered[0]).nonzero()
        for row, column in where.tolist():
            there = int(one[row, column])
            assert int(one[there // 12, there % 12]) == 12 * row + column, "what moved changed places"
        assert len(where) in (0, 2, 8, 18)
    with pytest.raises(InputError, match="synonyms"):
        TokenEda(codebook(5))


def test_geometry_is_the_same_at_every_size() -> None:
    boxes = torch.tensor([[2, 3, 8, 9], [0, 0, 12, 12]])
    geometry = Geometry(True, (), boxes, 12, 6)
    x = torch.rand(2, 3, 24, 24)
    for k in range(2):
        top, left, height, width = (2 * int(edge) for edge in boxes[k])
        cut = x[k : k + 1].flip(3)[:, :, top : top + height, left : left + width]
        wanted = F.interpolate(cut, size=(12, 12), mode="bicubic", antialias=True)
        torch.testing.assert_close(geometry(x)[k : k + 1], wanted)
    assert geometry(x[..., ::2, ::2]).shape == (2, 3, 6, 6)
    whole = torch.tensor([[0, 0, 8, 8]])
    picture = torch.rand(1, 1, 8, 8)
    moved = Geometry(False, (("translate x", 0.25), ("translate y", -0.125)), whole, 8, 8)(picture)
    torch.testing.assert_close(moved[..., :7, 2:], picture[..., 1:, :6])
    assert not moved[..., 7, :].any() and not moved[..., :2].any(), "zeros from outside"
    # A shear that is not zero moves rows in opposite directions above and below the middle.
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    sheared = Geometry(False, (("shear x", 15.0),), whole, 8, 8)(ramp)[0, 0, :, 4] - 4
    wanted_shift = math.tan(math.radians(15)) * (torch.arange(8.0) - 3.5)
    torch.testing.assert_close(sheared.abs(), wanted_shift.abs(), atol=1e-3, rtol=0)
    turned = Geometry(False, (("rotate", 30.0),), whole, 8, 8)(torch.ones(1, 1, 8, 8))
    assert float(turned[0, 0, 0, 0]) == 0 and float(turned[0, 0, 4, 4]) == pytest.approx(1)
    for bad in (torch.rand(2, 3, 20, 20), torch.rand(1, 3, 24, 24)):
        with pytest.raises(InputError):
            geometry(bad)


def test_ranges_of_the_moves() -> None:
    found: dict[str, list[float]] = {}
    flips = applied = 0
    for _ in range(400):
        one = Geometry.draw(1, 8, 4, (0.2, 1.0))
        flips += one.flip
        applied += bool(one.moves)
        for name, value in one.moves:
            found.setdefault(name, []).append(value)
        top, left, height, width = one.boxes[0].tolist()
        assert 0 <= top <= 8 - height and 0 <= left <= 8 - width
    limits = {"rotate": (-30, 30), "translate x": (-0.2, 0.2), "translate y": (-0.2, 0.2), "shear x": (0, 15)}
    limits["shear y"] = (0, 15)
    assert set(found) == set(limits)
    for name, (low, high) in limits.items():
        span = high - low
        assert low <= min(found[name]) < low + 0.1 * span and high - 0.1 * span < max(found[name]) <= high, name
        assert len(found[name]) / 400 == pytest.approx(0.25, abs=0.08)
    assert flips / 400 == pytest.approx(0.5, abs=0.1) and applied / 400 == pytest.approx(0.5 * 31 / 32, abs=0.1)


def test_crop_without_scaling_gives_the_ids_back(monkeypatch: pytest.MonkeyPatch) -> None:
    book, ids = codebook(391, 32), torch.randint(391, (3, 32, 32))
    boxes = torch.tensor([[0, 0, 28, 28], [4, 1, 28, 28], [2, 4, 28, 28]])
    monkeypatch.setattr(Geometry, "draw", lambda *_, **__: Geometry(False, (), boxes, 32, 28))
    made, labels = TokenAugmentation(book)(ids)
    assert labels is None
    for k, (top, left, _, _) in enumerate(boxes.tolist()):
        assert torch.equal(made[k], ids[k, top : top + 28, left : left + 28])


def adapt(codes: int = 50, **changes: Any) -> TokenAdapt:
    return TokenAdapt(**({"codes": codes, "channels": 8, "grid": 8, "crop": 6, "width": 16, "heads": 2} | changes))


def test_augmentation_of_two_halves() -> None:
    book, inner = codebook(50), adapt()
    augment = TokenAugmentation(book, inner, crop=6, color=True, classes=3, smoothing=0.0)
    ids, labels = torch.randint(50, (7, 8, 8)), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    first, second = set(), set()
    for _ in range(10):
        made, weights = augment(ids, labels)
        assert made.shape == (7, 6, 6) and made.dtype == torch.long and 0 <= int(made.min()) <= int(made.max()) < 50
        assert weights is not None
        first |= set(weights[:4].flatten().tolist())
        second |= set(weights[4:].flatten().tolist())
        torch.testing.assert_close(weights.sum(1), torch.ones(7))
    assert first == {0.0, 1.0} == second, "partners are of the same half, and their labels stay theirs"
    assert not inner.training and not any(weight.requires_grad for weight in inner.parameters())
    assert augment.train().training and not inner.training
    centre, same = augment.eval()(ids, labels)
    assert torch.equal(centre, ids[:, 1:7, 1:7]) and same is labels
    with pytest.raises(InputError, match="no labels"):
        augment.train()(ids)
    with pytest.raises(InputError, match="at least 6 x 6"):
        augment(ids[:, :5], labels)
    with pytest.raises(InputError, match="adapt makes 6 x 6"):
        TokenAugmentation(book, inner, crop=4)


def test_only_the_second_half_is_adapted_and_moves_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    book, inner = codebook(50), adapt()
    ids = torch.randint(50, (6, 8, 8))
    seen: list[Tensor] = []
    monkeypatch.setattr(inner.f, "forward", lambda x: seen.append(x) or torch.zeros(len(x), 8, 16, 16))
    drawn: list[tuple[int, bool]] = []
    original = Geometry.draw.__func__  # type: ignore[attr-defined]

    def draw(cls: Any, batch: int, side: int, crop: int, scale: Any, affine: bool = True) -> Geometry:
        drawn.append((batch, affine))
        made: Geometry = original(cls, batch, side, crop, scale, affine)
        return made

    monkeypatch.setattr(Geometry, "draw", classmethod(draw))
    for shared, wanted in ((True, [(3, False), (3, True)]), (False, [(3, False)] + [(1, True)] * 3)):
        drawn.clear()
        made, _ = TokenAugmentation(book, inner, crop=6, shared=shared)(ids)
        assert drawn == wanted and torch.equal(seen[-1], book.embed(ids[3:]))
        assert bool((made[3:] == made[3]).all()), "all that g saw was the same"


def test_adapt_loss_and_gradients() -> None:
    book, inner = codebook(50), adapt()
    ids, geometry = torch.randint(50, (2, 8, 8)), Geometry.draw(2, 16, 12, (0.2, 1.0))
    target = torch.randint(50, (2, 6, 6))
    loss = inner.loss(book.embed(ids), geometry, target)
    logits = inner.g(geometry(inner.f(book.embed(ids))))
    slow = [
        -float(logits.detach()[b, y, x].log_softmax(0)[target[b, y, x]])
        for b in range(2)
        for y in range(6)
        for x in range(6)
    ]
    assert float(loss.detach()) == pytest.approx(sum(slow) / len(slow), rel=1e-5)
    loss.backward()
    trained = {name for name, weight in inner.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert trained == {name for name, _ in inner.named_parameters()} - {"f.positions", "g.positions"}
    assert inner.f(book.embed(ids)).shape == (2, 8, 16, 16) and logits.shape == (2, 6, 6, 50)


def test_f_and_g_have_one_tanh_layer_without_bias() -> None:
    with torch.device("meta"):
        full = TokenAdapt()
    for part, side in ((full.f, 32), (full.g, 28)):
        layer: Any = part.block
        assert layer.attn.qkv.bias is None and isinstance(layer.mlp.act, torch.nn.Tanh)
        assert layer.attn.num_heads == 6 and layer.mlp.fc1.out_features == 1536
        assert tuple(part.positions.shape) == (side**2, 384)


def test_settings() -> None:
    with pytest.raises(InputError, match="crop must be <= grid"):
        adapt(crop=10)
    with pytest.raises(InputError, match="scale"):
        TokenAugmentation(codebook(), scale=(0.5, 0.2))
