"""SeiT++: masking, encoder and decoder, and the classifier against slow references."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("timm")

from foveate.method import InputError
from foveate.methods.learn.seit import CONFIGURATIONS, Masking, Seit, SeitClassifier

TINY: dict[str, Any] = {"codes": 300, "channels": 4, "grid": 8, "width": 16, "depth": 1, "heads": 2}
DECODER: dict[str, Any] = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


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
