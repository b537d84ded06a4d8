"""SeiT++: the token file against damage, each step of augmentation and masking against slow references."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("timm")

from foveate.method import InputError
from foveate.methods.learn.seit import CONFIGURATIONS, Masking, Seit, SeitClassifier
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

TINY: dict[str, Any] = {"codes": 300, "channels": 4, "grid": 8, "width": 16, "depth": 1, "heads": 2}
DECODER: dict[str, Any] = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


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


def test_masking() -> None:
    with torch.device("meta"):
        model = Seit()
    ratios = []
    for _ in range(200):
        draw = model.draw(3)
        assert draw.dropped.shape == (3, 196) and not bool((draw.dropped & ~draw.masked).any())
        assert draw.dropped.sum(1).tolist() == [79] * 3 and len(set(draw.masked.sum(1).tolist())) == 1
        ratios.append(float(draw.masked.float().mean()))
    # Mean of a normal distribution (0.45, 0.25) within 0.4..1, in closed form.
    low, high = (0.4 - 0.45) / 0.25, (1 - 0.45) / 0.25
    density = [math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) for z in (low, high)]
    below = [0.5 * (1 + math.erf(z / math.sqrt(2))) for z in (low, high)]
    mean = 0.45 + 0.25 * (density[0] - density[1]) / (below[1] - below[0])
    assert sum(ratios) / 200 == pytest.approx(mean, abs=0.04) and 79 / 196 <= min(ratios) <= max(ratios) <= 1
    least = model.draw(2, 0.4)
    assert torch.equal(least.masked, least.dropped) and bool(model.draw(2, 1.0).masked.all())
    with torch.device("meta"):
        ten = Seit(**(TINY | DECODER | {"grid": 20}))
    assert int(ten.draw(1, 0.55).masked.sum()) == 55, "decimal shares are exact"


def tiny(**changes: Any) -> Seit:
    return Seit(**(TINY | DECODER | changes)).eval()


def one_masking() -> Masking:
    """Of 16 patches 5 and 6 are dropped, 5, 6, 9 and 15 masked."""
    dropped, masked = torch.zeros(2, 16).bool(), torch.zeros(2, 16).bool()
    dropped[:, [5, 6]] = masked[:, [5, 6, 9, 15]] = True
    return Masking(dropped, masked)


def test_what_the_logits_depend_on() -> None:
    model, masking, ids = tiny(), one_masking(), torch.randint(300, (2, 8, 8))
    torch.nn.init.normal_(model.decoder_positions)
    with torch.no_grad():
        before = model(ids, masking)
        assert before.shape == (2, 16, 4, 300)
        for patch in range(16):
            other = ids.clone()
            row, column = 2 * (patch // 4), 2 * (patch % 4)
            other[:, row + 1, column] = (other[:, row + 1, column] + 1) % 300
            same = torch.equal(model(other, masking), before)
            assert same == (patch in (5, 6, 9, 15)), patch


def test_encoder_and_decoder_against_a_loop() -> None:
    model, masking, ids = tiny(), one_masking(), torch.randint(300, (1, 8, 8))
    for weight in (model.mask_token, model.decoder_positions):
        torch.nn.init.normal_(weight)
    tokens = [model.cls_token[0, 0] + model.positions[0]]
    assert not model.positions[0].any()
    for patch in range(16):
        row, column = 2 * (patch // 4), 2 * (patch % 4)
        words = model.words.norm(model.words.table[ids[0, row : row + 2, column : column + 2]])
        value = torch.einsum("yxc,dcyx->d", words, model.words.patches.weight) + model.words.patches.bias
        if patch in (9, 15):
            value = model.mask_token[0, 0]
        if patch not in (5, 6):
            tokens.append(value + model.positions[1 + patch])
    encoded = model.norm(model.blocks[0](torch.stack(tokens)[None]))
    masking = Masking(masking.dropped[:1], masking.masked[:1])
    torch.testing.assert_close(model.forward_features(ids, masking), encoded)
    reduced = model.decoder_embed(encoded)[0]
    seen = iter(reduced[1:])
    full = [reduced[0]]
    for patch in range(16):
        one = reduced[0] if patch in (5, 6) else next(seen)
        full.append(reduced[0] if patch in (9, 15) else one)
    out = model.decoder_norm(model.decoder_blocks[0](torch.stack(full)[None] + model.decoder_positions))[0, 1:]
    logits = model(ids, masking)[0]
    losses = []
    for patch in range(16):
        parts = model.head.norm(F.gelu(model.head.linear(out[patch])).view(4, 4))
        wanted = parts @ model.words.table.T + model.head.bias
        torch.testing.assert_close(logits[patch], wanted, rtol=1e-4, atol=1e-5)
        row, column = 2 * (patch // 4), 2 * (patch % 4)
        cells = [ids[0, row + y, column + x] for y in (0, 1) for x in (0, 1)]
        if patch in (5, 6, 9, 15):
            losses.append(-sum(wanted[k].log_softmax(0)[cell] for k, cell in enumerate(cells)) / 4)
    loss, parts_of_loss = model.loss(ids, masking)
    assert float(loss.detach()) == pytest.approx(float(torch.stack(losses).sum().detach()) / 4, rel=1e-5)
    assert float(parts_of_loss["masked"]) == 0.25
    whole = model.forward_features(ids)
    assert whole.shape == (1, 17, 16), "whole pictures without a mask"


def test_least_ratio_has_no_mask_vector_and_the_head_no_gradient_to_words() -> None:
    model, ids = tiny(dropout=0.0), torch.randint(300, (2, 8, 8))
    torch.nn.init.normal_(model.mask_token)
    least = model.draw(2, 0.4)
    assert torch.equal(least.masked, least.dropped)
    before = model.forward_features(ids, least)
    torch.nn.init.zeros_(model.mask_token)
    assert torch.equal(model.forward_features(ids, least), before)
    model.loss(ids, least)[0].backward()
    table = model.words.table.grad
    assert table is not None
    shown = ~least.dropped.view(2, 4, 4).repeat_interleave(2, 1).repeat_interleave(2, 2)
    unused = torch.ones(300).bool().index_fill(0, ids[shown], False)
    assert not table[unused].any() and table[~unused].any(), "only words that were read; the head would reach all"
    missing = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert missing == ["positions"] or set(missing) == {"positions", "mask_token"}


def test_uniform_logits() -> None:
    model = tiny(codes=391)
    masking = one_masking()
    loss = model.loss_of(torch.full((2, 16, 4, 391), 3.0), torch.randint(391, (2, 8, 8)), masking)
    assert float(loss) == pytest.approx(5.969, abs=1e-3)


def test_classifier(tmp_path: Path) -> None:
    model, classifier = tiny(), SeitClassifier(**TINY, classes=5).eval()
    ids = torch.randint(300, (2, 8, 8))
    classifier.load_encoder(model)
    features = classifier.forward_features(ids)
    torch.testing.assert_close(model.norm(features), model.forward_features(ids))
    pooled = torch.stack([one[1:].mean(0) for one in features])
    torch.testing.assert_close(classifier(ids), classifier.head(classifier.fc_norm(pooled)))
    assert classifier.words is not None and classifier.words.dropout.p == 0.1
    assert (classifier.rate("head.weight"), classifier.rate("blocks.0.norm1.bias")) == (1.0, 0.65)
    assert classifier.rate("words.table", 0.5) == 0.25 == classifier.rate("cls_token", 0.5)
    classifier.save_pretrained(tmp_path)
    assert torch.equal(SeitClassifier.from_pretrained(tmp_path)(ids), classifier(ids))
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(Seit.from_pretrained(tmp_path / "model").forward_features(ids), model.forward_features(ids))
    with pytest.raises(InputError, match="another"):
        SeitClassifier(**(TINY | {"depth": 2})).load_encoder(model)
    with pytest.raises(InputError, match="reads ids"):
        classifier(torch.rand(2, 4, 8, 8))
    adaptor = SeitClassifier(**TINY, classes=5, stem="adaptor")
    assert adaptor.adaptor is not None and adaptor.adaptor.kernel_size == (4, 4)
    assert adaptor(torch.rand(2, 4, 8, 8)).shape == (2, 5)
    for bad, why in ((ids, "reads embeddings"), (torch.rand(2, 4, 10, 10), "16 patches, not 25")):
        with pytest.raises(InputError, match=why):
            adaptor(bad)
    with pytest.raises(InputError, match="another words"):
        adaptor.load_encoder(model)


def test_settings() -> None:
    bad: tuple[dict[str, Any], ...] = (
        {"grid": 27}, {"heads": 5}, {"mask_range": (0.5, 0.4)}, {"mask_range": (0.0, 1.0)}, {"dropout": 1.0},
        {"codes": 0}, {"mask_std": 0}, {"decoder_heads": 3}, {"mask_mean": 2},
    )  # fmt: skip
    for one in bad:
        with pytest.raises(InputError):
            tiny(**one)
    with pytest.raises(InputError, match="did you mean vit-b"):
        Seit.named("vitb")
    assert set(CONFIGURATIONS) == {"vit-b", "vit-s", "scenes"}
    for ids in (torch.zeros(1, 7, 8).long(), torch.zeros(1, 8, 8)):
        with pytest.raises(InputError, match="ids must be"):
            tiny().loss(ids)
    with pytest.raises(InputError, match="crop must be <= grid"):
        adapt(crop=10)
    with pytest.raises(InputError, match="scale"):
        TokenAugmentation(codebook(), scale=(0.5, 0.2))
