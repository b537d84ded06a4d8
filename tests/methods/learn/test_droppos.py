"""DropPos against slow loops and closed forms: what is seen, what is hidden, what is asked and how it counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")

import timm

from foveate.measure.claims import verify
from foveate.method import InputError
from foveate.methods.learn.droppos import DropPos, Hidden, released_targets, sincos_table, smoothed_targets

TINY = {"img_size": (32, 40), "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SMALL: dict[str, Any] = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "options": TINY, "mask": 0.4}


def model(**changes: Any) -> DropPos:
    made = DropPos(**(SMALL | changes))
    # Far from initial values, so that nothing is hidden in zeros.
    for name, weight in made.named_parameters():
        if weight.requires_grad and "norm" not in name:
            weight.data = 0.5 * torch.randn_like(weight)
    return made


def pictures(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 32, 40)


def test_numbers_of_patches() -> None:
    made = model()
    assert (made.grid, made.places, made.seen, made.told) == ((4, 5), 20, 12, 3)
    assert (model(mask=0.9).seen, model(mask=0.9).told) == (2, 0)
    drawn = made.draw(200)
    assert drawn.place.shape == drawn.hidden.shape == (200, 12)
    assert all(len(set(row)) == 12 for row in drawn.place.tolist()) and bool((drawn.hidden.sum(1) == 9).all())
    assert len({tuple(row) for row in drawn.place.tolist()}) > 190, "every picture has its own"
    seen = torch.zeros(20).scatter_add(0, drawn.place.flatten(), torch.ones(2400)) / 200
    told = torch.zeros(20).scatter_add(0, drawn.place[~drawn.hidden], torch.ones(600)) / 200
    assert float((seen - 0.6).abs().max()) < 0.15 and float((told - 0.15).abs().max()) < 0.12, "uniform"


def test_positions_are_columns_then_rows() -> None:
    table = sincos_table((3, 4), 8)
    for row in range(3):
        for column in range(4):
            angles = [(column, 1.0), (column, 0.01), (row, 1.0), (row, 0.01)]
            sines = [f(place * w) for place, w in angles for f in (math.sin, math.cos)]
            c1s, c1c, c2s, c2c, r1s, r1c, r2s, r2c = sines
            expected = [c1s, c2s, c1c, c2c, r1s, r2s, r1c, r2c]
            assert table[row * 4 + column].tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(InputError, match="multiple of 4"):
        sincos_table((3, 4), 10)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
@pytest.mark.parametrize("sigma", [1.0, 0.5, 2.0])
def test_targets(grid: tuple[int, int], sigma: float) -> None:
    made = smoothed_targets(grid, sigma)
    places = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    for i, one in enumerate(places):
        near = [math.exp(-(math.dist(one, other) ** 2) / sigma**2) for other in places]
        assert made[i].tolist() == pytest.approx([v / sum(near) for v in near], abs=1e-6)
    assert torch.equal(made.argmax(1), torch.arange(len(places)))
    assert torch.allclose(made.sum(1), torch.ones(len(places)))


def test_targets_without_smoothing() -> None:
    assert torch.equal(smoothed_targets((3, 4), 0.0), torch.eye(12))
    assert torch.allclose(smoothed_targets((3, 4), 0.05), torch.eye(12)), "the limit"
    made = model(sigma=2.0)
    assert [made.sigma_at(e, 4) for e in range(4)] == [2.0, 1.5, 1.0, 0.5]


def test_released_targets_have_the_wrong_neighbours() -> None:
    made = released_targets(14, 224, 1.0)
    # Patch 14 of a 14 x 14 grid is the first of row 1; its real neighbours are 0, 15 and 28.
    assert set(made[14].topk(5).indices.tolist()) == {13, 14, 15, 30, 31}
    real = smoothed_targets((14, 14), 1.0)
    assert set(real[14].topk(4).indices.tolist()) == {0, 14, 15, 28}
    sums = made.sum(1)
    assert float(sums.min()) == pytest.approx(0.66, abs=0.01) and float(sums.max()) == pytest.approx(1.11, abs=0.01)
    assert torch.equal(released_targets(14, 224, 0.0), torch.eye(196))
    with pytest.raises(InputError, match="too small"):
        released_targets(14, 100, 1.0)


@pytest.mark.parametrize("hide", ["token", "zeros", "shuffled"])
def test_what_the_encoder_is_handed(hide: str) -> None:
    made = model(hide=hide)
    pixels, drawn = pictures(), made.draw(3)
    entered: list[Tensor] = []
    made.encoder.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        made.encode(pixels, drawn)
        patches = made.encoder.patch_embed(pixels)
    table = torch.cat([torch.zeros(1, 16), sincos_table((4, 5), 16)])
    assert torch.allclose(entered[0][:, 0], made.encoder.cls_token[0, 0].expand(3, -1), atol=1e-6)
    for b in range(3):
        extra = entered[0][b, 1:] - patches[b, drawn.place[b]]
        for v in range(12):
            own = table[1 + drawn.place[b, v]]
            if not drawn.hidden[b, v]:
                assert torch.allclose(extra[v], own, atol=1e-5)
            elif hide == "token":
                assert torch.allclose(extra[v], made.position_token, atol=1e-5)
            elif hide == "zeros":
                assert torch.allclose(extra[v], torch.zeros(16), atol=1e-5)
        if hide == "shuffled":
            some = drawn.hidden[b]
            distance = torch.cdist(extra[some], table[1 + drawn.place[b, some]])
            assert float(distance.min(1).values.max()) < 1e-3
            assert sorted(distance.argmin(1).tolist()) == list(range(9)), "each of the hidden positions once"


def test_no_path_tells_where_a_hidden_patch_is() -> None:
    made = model(position_mask=1.0)
    pixels, drawn = pictures(), made.draw(3)
    assert made.told == 0 and bool(drawn.hidden.all())
    logits = made(pixels, drawn)
    order = torch.randperm(12)
    assert torch.allclose(made(pixels, Hidden(drawn.place[:, order], drawn.hidden)), logits[:, order], atol=1e-4)
    # The same patches elsewhere in the picture: nothing changes but the answer that would be right.
    moved = pixels.unflatten(3, (5, 8)).roll(1, 3).flatten(3)
    row, column = drawn.place // 5, drawn.place % 5
    elsewhere = Hidden(5 * row + (column + 1) % 5, drawn.hidden)
    assert torch.allclose(made(moved, elsewhere), logits, atol=1e-4)


def answering(made: DropPos, answer: Tensor) -> DropPos:
    """The model, its answer replaced."""
    made.locate = lambda features: answer  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize("attentive", [False, True])
def test_perfect_and_ignorant_answers(attentive: bool) -> None:
    made, pixels = model(attentive=attentive), pictures()
    drawn = made.draw(3)
    truth = torch.nn.functional.one_hot(drawn.place, 20).float()
    # What is said of patches whose position was told does not count.
    perfect = torch.where(drawn.hidden.unsqueeze(-1), 100 * truth, -100 * truth)
    loss, parts = answering(made, perfect).loss(pixels, 0.0, drawn)
    assert float(loss) == pytest.approx(0, abs=1e-6) and float(parts["accuracy"]) == 1
    loss, _ = answering(made, torch.zeros(3, 12, 20)).loss(pixels, 0.7, drawn)
    assert float(loss) == pytest.approx(math.log(20), abs=1e-5)


def slow_loss(logits: Tensor, drawn: Hidden, weights: Tensor, sigma: float) -> float:
    places = [(r, c) for r in range(4) for c in range(5)]
    total = mass = 0.0
    for b in range(len(logits)):
        for v in range(logits.shape[1]):
            if not drawn.hidden[b, v]:
                continue
            p = int(drawn.place[b, v])
            near = [math.exp(-(math.dist(places[p], other) ** 2) / sigma**2) for other in places]
            norm = math.log(sum(math.exp(float(one)) for one in logits[b, v]))
            loss = -sum(w / sum(near) * (float(one) - norm) for w, one in zip(near, logits[b, v]))
            total, mass = total + float(weights[b, v]) * loss, mass + float(weights[b, v])
    return total / mass


def test_the_loss_patch_by_patch() -> None:
    made, pixels = model().eval(), pictures()
    drawn = made.draw(3)
    with torch.no_grad():
        logits = made(pixels, drawn)
        features = made.encoder.forward_features(pixels)
    weights = torch.zeros(3, 12)
    for b in range(3):
        first = features[b, 0]
        near = [math.exp(float(first @ one / (first.norm() * one.norm())) / 0.1) for one in features[b, 1:]]
        seen = [near[p] for p in drawn.place[b].tolist()]
        weights[b] = torch.tensor([one / sum(seen) for one in seen])
    found = made.attention(pixels, drawn.place)
    assert torch.allclose(found, weights, atol=1e-5) and not found.requires_grad
    assert float(found.min()) >= 0 and torch.allclose(found.sum(1), torch.ones(3))
    loss, parts = made.loss(pixels, 0.8, drawn)
    assert float(loss.detach()) == pytest.approx(slow_loss(logits, drawn, weights, 0.8), abs=1e-4)
    right = (logits.argmax(-1) == drawn.place)[drawn.hidden]
    assert float(parts["accuracy"]) == pytest.approx(float(right.float().mean()))
    plain = model(attentive=False)
    plain.load_state_dict(made.state_dict())
    loss, _ = plain.loss(pixels, 0.8, drawn)
    assert float(loss.detach()) == pytest.approx(slow_loss(logits, drawn, torch.ones(3, 12), 0.8), abs=1e-4)
    made.attention = lambda pixels, place: torch.full((3, 12), 1 / 12)  # type: ignore[method-assign]
    assert float(made.loss(pixels, 0.8, drawn)[0].detach()) == pytest.approx(float(loss.detach()), abs=1e-6)


def test_confident_answers_are_skipped() -> None:
    made, pixels = model(skip_confident=True, attentive=False), pictures()
    drawn = made.draw(3)
    truth = torch.nn.functional.one_hot(drawn.place, 20).float()
    sure = torch.zeros(3, 12, dtype=torch.bool)
    sure[:, :6] = True
    answer = torch.where(sure.unsqueeze(-1), 100 * truth, torch.zeros(20))
    loss, _ = answering(made, answer).loss(pixels, 1.0, drawn)
    assert float(loss) == pytest.approx(math.log(20), abs=1e-5), "only the ignorant ones are left"
    nothing, _ = answering(made, 100 * truth).loss(pixels, 1.0, drawn)
    assert float(nothing) == 0


def test_pixels() -> None:
    made, pixels = model(pixels=True, position_weight=0.3), pictures()
    drawn = made.draw(3)
    loss, parts = made.loss(pixels, 1.0, drawn)
    assert float(loss.detach()) == pytest.approx(float((0.3 * parts["positions"] + parts["pixels"]).detach()), abs=1e-5)
    decoder = made.pixel_decoder
    assert decoder is not None
    nn.init.zeros_(decoder["head"].weight)  # type: ignore[arg-type]
    nn.init.zeros_(decoder["head"].bias)  # type: ignore[arg-type]
    # An answer of zeros: the mean square of a normalised patch of 192 values is 191 / 192 of its variance.
    assert float(made.loss(pixels, 1.0, drawn)[1]["pixels"].detach()) == pytest.approx(191 / 192, abs=1e-3)
    # An answer that is right for one unseen patch only takes that one's share of the error away.
    unseen = next(p for p in range(20) if p not in drawn.place[0].tolist())
    row, column = divmod(unseen, 5)
    patch = pixels[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].permute(1, 2, 0).flatten()
    answer = torch.zeros(3, 21, 192)
    answer[0, 1 + unseen] = (patch - patch.mean()) / patch.std()

    class Says(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return answer

    decoder["head"] = Says()
    wanted = 191 / 192 * (1 - 1 / (3 * 8))
    assert float(made.loss(pixels, 1.0, drawn)[1]["pixels"].detach()) == pytest.approx(wanted, abs=1e-3)


def test_the_encoder_is_a_standard_vit_and_weights_come_back(tmp_path: Path) -> None:
    made = model().eval()
    plain = timm.create_model("vit_base_patch16_224", num_classes=7, **TINY).eval()
    left = plain.load_state_dict(made.encoder.state_dict(), strict=False)
    assert set(left.missing_keys) == {"head.weight", "head.bias"} and not left.unexpected_keys
    pixels = pictures()
    assert torch.equal(plain.forward_features(pixels), made.encoder.forward_features(pixels))
    # All patches with their own positions are the plain model, whatever their order.
    every = Hidden(torch.randperm(20).expand(3, -1), torch.zeros(3, 20, dtype=torch.bool))
    features = plain.forward_features(pixels)
    wanted = torch.cat([features[:, :1], features[:, 1:][:, every.place[0]]], 1)
    assert torch.allclose(made.encode(pixels, every), wanted, atol=1e-5)
    made.save_pretrained(tmp_path)
    again = DropPos.from_pretrained(tmp_path).eval()
    drawn = made.draw(3)
    assert torch.equal(again(pixels, drawn), made(pixels, drawn))


def test_gradients_reach_every_parameter() -> None:
    made = model(pixels=True)
    made.loss(pictures())[0].backward()
    for name, weight in made.named_parameters():
        assert weight.requires_grad != (name == "encoder.pos_embed")
        if weight.requires_grad:
            assert weight.grad is not None and bool((weight.grad != 0).any()), name


@pytest.mark.parametrize(
    "settings",
    [{"mask": 1.0}, {"position_mask": 0.0}, {"hide": "noise"}, {"sigma": -1.0}, {"temperature": 0.0},
     {"position_weight": -1.0}, {"attentive": 1}, {"skip_confident": 0}, {"released_map": None}, {"pixels": 2},
     {"decoder_width": 15}, {"decoder_heads": 0}, {"decoder_depth": 0}],
)  # fmt: skip
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        DropPos(**(SMALL | settings))


def test_bad_backbones() -> None:
    with pytest.raises(InputError, match="no class token"):
        DropPos(**(SMALL | {"options": TINY | {"class_token": False, "global_pool": "avg"}}))
    with pytest.raises(InputError, match="nothing is to be found"):
        DropPos(**(SMALL | {"mask": 0.99}))
    with pytest.raises(InputError, match="square grids"):
        DropPos(**(SMALL | {"released_map": True}))
    with pytest.raises(InputError, match="no configuration"):
        DropPos.named("vit-h")


def test_claims() -> None:
    assert all(one.holds for one in verify("droppos"))
