"""CutMix against slow loops over pixels: what is pasted, how labels are mixed, what is left of objects."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from foveate.measure.claims import verify
from foveate.method import InputError
from foveate.methods.learn.cutmix import Cut, CutMix, Mixing


def mixing(cut: Cut | None, own: float, batch: int = 2) -> Mixing:
    swap = torch.arange(batch - 1, -1, -1)
    return Mixing(swap, torch.full((batch,), own), (cut,) * batch, torch.zeros(batch, dtype=torch.bool))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("size", [(20, 33), (7, 7)])
def test_every_pixel_is_one_of_the_two_and_lambda_is_their_share(mode: str, size: tuple[int, int]) -> None:
    made = CutMix(mode=mode, partner="reversed" if mode == "pair" else "permutation")
    images = torch.arange(5 * size[0] * size[1]).view(5, 1, *size)  # no two pixels are equal
    for _ in range(20):
        drawn = made.draw(5, size)
        before = images.clone()
        mixed = drawn.images(images)
        assert torch.equal(images, before), "the input stays as it is"
        partner = images[drawn.partner]
        own = mixed == images
        assert bool((own | (mixed == partner)).all())
        for b in range(5):
            if drawn.partner[b] != b:
                pasted = int((~own[b]).sum())
                assert 1 - float(drawn.own[b]) == pytest.approx(pasted / (size[0] * size[1]), abs=1e-6)
        if mode == "batch":
            assert len(set(drawn.cuts)) == 1 and len(set(drawn.own.tolist())) == 1
        if mode == "pair":
            assert drawn.partner.tolist() == [4, 3, 2, 1, 0] and drawn.cuts == drawn.cuts[::-1]
        if mode == "elem":
            assert len(set(drawn.cuts)) > 1


def slow_cut(row: int, column: int, kept: float, height: int, width: int) -> set[tuple[int, int]]:
    """The pixels of the paper's box, one by one."""
    high, wide = int(height * math.sqrt(1 - kept)), int(width * math.sqrt(1 - kept))
    return {
        (r, c)
        for r in range(row - high // 2, row + high // 2)
        for c in range(column - wide // 2, column + wide // 2)
        if 0 <= r < height and 0 <= c < width
    }


def test_the_box_has_the_pictures_shape_and_is_clipped() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        height, width = (int(v) for v in torch.randint(4, 40, (2,), generator=generator))
        row, column, kept = torch.rand(3, generator=generator).tolist()
        row, column = int(row * height), int(column * width)
        cut = Cut.around(row, column, kept, height, width)
        assert 0 <= cut.top <= cut.bottom <= height and 0 <= cut.left <= cut.right <= width
        wanted = slow_cut(row, column, kept, height, width)
        found = {(r, c) for r in range(cut.top, cut.bottom) for c in range(cut.left, cut.right)}
        assert found == wanted and cut.share == pytest.approx(len(wanted) / (height * width))
    wide = Cut.around(10, 50, 0.75, 20, 100)
    assert (wide.bottom - wide.top, wide.right - wide.left) == (10, 50), "height and width are not swapped"


def test_extremes_of_lambda_and_degenerate_cuts() -> None:
    images = torch.rand(2, 3, 16, 24)
    nothing = Cut.around(3, 5, 1.0, 16, 24)
    assert nothing.degenerate and torch.equal(mixing(nothing, 1.0).images(images), images)
    everything = Cut.around(8, 12, 0.0, 16, 24)
    assert everything.degenerate and everything.share == 1
    assert torch.equal(mixing(everything, 0.0).images(images), images.flip(0))
    corner = Cut.around(0, 0, 0.0, 16, 24)
    assert corner.share == 0.25 and not corner.degenerate
    some = Mixing(torch.arange(4), torch.ones(4), (nothing, None, corner, everything), torch.zeros(4).bool())
    assert some.degenerate.tolist() == [True, False, False, True]
    # On a small grid cuts are often empty; with attempts they are drawn again.
    torch.manual_seed(0)
    often = sum(bool(CutMix().draw(1, (4, 4)).degenerate[0]) for _ in range(400))
    seldom = sum(bool(CutMix(attempts=8).draw(1, (4, 4)).degenerate[0]) for _ in range(400))
    # Without attempts: sides of 2 * (int(4 sqrt(u)) // 2) are 0 for u < 1/4.
    assert 70 <= often <= 160 and seldom <= 2


@pytest.mark.parametrize("settings", [{"probability": 0.0}, {"alpha": 0.0}])
def test_identity(settings: dict[str, Any]) -> None:
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([2, 0, 1, 2])
    mixed, weights = CutMix(num_classes=3, **settings)(images, labels)
    assert torch.equal(mixed, images) and torch.equal(weights, torch.eye(3)[labels])
    still = CutMix(num_classes=3, smoothing=0.1).eval()
    assert torch.equal(still(images, labels)[0], images) and torch.equal(still(images, labels)[1], torch.eye(3)[labels])


def test_the_loss_is_that_of_soft_labels() -> None:
    made = CutMix(mode="elem")
    logits, labels = torch.randn(6, 5, dtype=torch.double), torch.randint(5, (6,))
    drawn = made.draw(6, (32, 32))
    soft = drawn.labels(labels, 5).double()
    assert torch.allclose(soft.sum(1), torch.ones(6).double(), atol=1e-6)
    loss, parts = drawn.loss(logits, labels)
    by_hand = 0.0
    for b in range(6):
        log_p = logits[b].log_softmax(0)
        own = float(drawn.own[b])
        by_hand -= float(own * log_p[labels[b]] + (1 - own) * log_p[labels[drawn.partner[b]]]) / 6
    assert float(loss) == pytest.approx(by_hand, abs=1e-6)
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits, soft)), abs=1e-6)
    assert float(parts["own"]) == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-9)
    smooth = drawn.labels(labels, 5, smoothing=0.1)
    assert torch.allclose(smooth, 0.9 * soft.float() + 0.02)
    weighted = torch.rand(6, 5)
    expected = drawn.own[:, None] * weighted + (1 - drawn.own[:, None]) * weighted[drawn.partner]
    assert torch.allclose(drawn.labels(weighted), expected)


def test_a_seed_gives_the_same_and_in_place_is_right() -> None:
    for mode in ("batch", "elem"):
        images, labels = torch.rand(6, 3, 16, 16), torch.arange(6)
        results = []
        for inplace in (False, False, True):
            torch.manual_seed(5)
            given = images.clone()
            mixed, weights = CutMix(num_classes=6, mode=mode, inplace=inplace)(given, labels)
            assert torch.equal(given, mixed if inplace else images)
            results.append((mixed, weights))
        assert all(torch.equal(a, b) for one in results[1:] for a, b in zip(one, results[0]))
        assert not torch.equal(results[0][0], images)


def test_centres_are_uniform() -> None:
    torch.manual_seed(3)
    made = CutMix()
    made.lambdas = lambda count, alpha=None: torch.tensor([1 - (2.5 / 8) ** 2])  # type: ignore[method-assign]
    counts = torch.zeros(8, 12)
    for _ in range(4800):
        cut = made.draw(1, (8, 12)).cuts[0]
        assert cut is not None
        # Half sides are int(2.5) // 2 = 1 and int(3.75) // 2 = 1: the last row and column are the centre's own.
        counts[cut.bottom - 1, cut.right - 1] += 1
    expected = 4800 / 96
    assert float(((counts - expected) ** 2 / expected).sum()) < 150, "chi-squared with 95 degrees of freedom"


def test_mixup_takes_turns() -> None:
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    only = CutMix(alpha=0.0, mixup=0.4, num_classes=4, partner="reversed")
    drawn = only.draw(4, (8, 8))
    own = float(drawn.own[0])
    assert bool(drawn.blended.all()) and 0 < own < 1
    assert torch.allclose(drawn.images(images), own * images + (1 - own) * images.flip(0))
    expected = own * torch.eye(4) + (1 - own) * torch.eye(4).flip(0)
    assert torch.allclose(drawn.labels(labels, 4), expected)
    both = CutMix(mixup=0.8, mode="elem", switch=0.25)
    shares = torch.stack([both.draw(200, (8, 8)).blended.float().mean() for _ in range(10)])
    assert float(shares.mean()) == pytest.approx(0.75, abs=0.04)
    with pytest.raises(InputError, match="floats"):
        drawn.images((255 * images).byte())


def test_uncorrected_lambda_is_the_drawn_one() -> None:
    torch.manual_seed(7)
    corrected = CutMix().draw(2, (30, 30))
    torch.manual_seed(7)
    plain = CutMix(correct=False).draw(2, (30, 30))
    assert plain.cuts == corrected.cuts
    torch.manual_seed(7)
    torch.randperm(2)
    torch.rand(())
    assert float(plain.own[0]) == pytest.approx(float(CutMix().lambdas(1))) and plain.own[0] != corrected.own[0]


def test_patches_and_tokens() -> None:
    made = CutMix(patch=8, mode="elem")
    for cut in made.draw(50, (32, 48)).cuts:
        assert cut is not None and all(edge % 8 == 0 for edge in (cut.top, cut.left, cut.bottom, cut.right))
    drawn = CutMix(mode="elem").draw(3, (4, 5))
    tokens = torch.randn(3, 20, 6)
    mixed = drawn.tokens(tokens, (4, 5))
    for b in range(3):
        cut = drawn.cuts[b]
        assert cut is not None
        for n in range(20):
            row, column = divmod(n, 5)
            inside = cut.top <= row < cut.bottom and cut.left <= column < cut.right
            assert torch.equal(mixed[b, n], tokens[drawn.partner[b] if inside else b, n])
    with pytest.raises(InputError, match="no 20 tokens"):
        drawn.tokens(tokens, (4, 4))


def painted(boxes: Tensor, height: int, width: int) -> Tensor:
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = True
    return masks


def hull(mask: Tensor) -> list[int]:
    rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_objects_follow_their_pixels() -> None:
    torch.manual_seed(2)
    shrunk = dropped = 0
    for _ in range(60):
        targets = []
        for picture in range(2):
            corner = torch.stack([torch.randint(0, 20, (4,)), torch.randint(0, 12, (4,))], 1)
            extent = torch.randint(1, 10, (4, 2))
            boxes = torch.cat([corner, (corner + extent).minimum(torch.tensor([24, 16]))], 1).float()
            targets.append(
                {"boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(16, 24)),
                 "labels": torch.arange(4) + 10 * picture, "masks": painted(boxes, 16, 24), "image_id": picture}
            )  # fmt: skip
        least = 0.3
        drawn = CutMix(partner="reversed").draw(2, (16, 24))
        cut = drawn.cuts[0]
        assert cut is not None
        window = torch.zeros(16, 24, dtype=torch.bool)
        window[cut.top : cut.bottom, cut.left : cut.right] = True
        for b, result in enumerate(drawn.objects(targets, least)):
            assert isinstance(result["boxes"], tv_tensors.BoundingBoxes) and result["image_id"] == b
            wanted = []
            for source, seen in ((b, ~window), (1 - b, window)):
                for box, label, mask in zip(*(targets[source][name] for name in ("boxes", "labels", "masks"))):
                    left = mask & seen
                    share = float(left.sum() / mask.sum())
                    if share < least:
                        dropped += 1
                        continue
                    shrunk += hull(left) != box.int().tolist()
                    wanted.append((hull(left), int(label), round(share, 5), int(left.sum())))
            found = [
                (box.int().tolist(), int(label), round(float(share), 5), int(mask.sum()))
                for box, label, share, mask in zip(*(result[name] for name in ("boxes", "labels", "visible", "masks")))
            ]
            assert found == wanted
    assert shrunk > 20 and dropped > 20, "the cases occur"


def test_degenerate_objects() -> None:
    whole = {"boxes": torch.tensor([[2.0, 2, 6, 6], [3, 3, 3, 9]]), "labels": torch.tensor([1, 2])}
    cut = Cut(0, 0, 8, 8, 8, 8)
    gone = mixing(cut, 0.0).objects([whole, whole])[0]
    assert gone["labels"].tolist() == [1], "of one's own nothing is left; a box without area is no object"
    kept = mixing(None, 1.0).objects([whole, whole])[0]
    assert kept["labels"].tolist() == [1] and kept["visible"].tolist() == [1.0]
    with pytest.raises(InputError, match="not area"):
        mixing(cut, 0.0).objects([{**whole, "area": torch.ones(2)}] * 2)
    with pytest.raises(InputError, match="x1 y1 x2 y2, not XYWH"):
        boxes = tv_tensors.BoundingBoxes(whole["boxes"], format="XYWH", canvas_size=(8, 8))
        mixing(cut, 0.0).objects([{**whole, "boxes": boxes}] * 2)


def test_it_fits_torchvision_and_timm() -> None:
    pictures = tv_tensors.Image(torch.randint(0, 256, (4, 3, 12, 12), dtype=torch.uint8))
    chain = v2.Compose([CutMix(num_classes=7), v2.ToDtype(torch.float32, scale=True)])
    mixed, weights = chain(pictures, torch.arange(4))
    assert isinstance(mixed, tv_tensors.Image) and mixed.dtype == torch.float32 and weights.shape == (4, 7)

    from timm.data import create_loader
    from torch.utils.data import TensorDataset

    class Pictures(TensorDataset):
        transform = None

    images = torch.rand(8, 3, 16, 16)
    loader = create_loader(
        Pictures(images, torch.arange(8)), (3, 16, 16), 4, is_training=True, use_prefetcher=False, num_workers=0,
        collate_fn=CutMix(num_classes=8).collate, no_aug=True,
    )  # fmt: skip
    loader.dataset.transform = None
    for mixed, weights in loader:
        assert mixed.shape == (4, 3, 16, 16) and torch.allclose(weights.sum(1), torch.ones(4))
    clip = torch.rand(2, 5, 3, 8, 8)
    drawn = CutMix().draw(2, (8, 8))
    assert torch.equal(drawn.images(clip)[:, 2], drawn.images(clip[:, 2])), "all frames have the same box"


@pytest.mark.parametrize(
    "settings",
    [{"alpha": -1.0}, {"probability": 1.1}, {"mode": "row"}, {"partner": "next"}, {"mixup": -0.1}, {"switch": 2.0},
     {"smoothing": 1.0}, {"patch": 0}, {"attempts": 0}, {"visible": -1.0}, {"correct": 1}, {"inplace": None},
     {"num_classes": -1}],
)  # fmt: skip
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        CutMix(**settings)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="needs partner='reversed'"):
        CutMix(mode="pair")
    made = CutMix(num_classes=3)
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(InputError, match="takes a batch"):
        made(images)
    with pytest.raises(InputError, match=r"must be \(B, C, H, W\)"):
        made(images[0], torch.zeros(3).long())
    with pytest.raises(InputError, match=r"0\.\.2"):
        made(images, torch.tensor([0, 3]))
    with pytest.raises(InputError, match="labels must be"):
        made(images, torch.rand(2, 4))
    with pytest.raises(InputError, match="num_classes is needed"):
        CutMix()(images, torch.tensor([0, 1]))
    drawn = made.draw(2, (9, 8))
    with pytest.raises(InputError, match="9 x 8"):
        drawn.images(images)
    with pytest.raises(InputError, match="for 2 pictures"):
        drawn.images(torch.rand(3, 3, 9, 8))


def test_claims() -> None:
    assert all(one.holds for one in verify("cutmix"))
    # After clipping, more of the own picture is left than lambda says.
    torch.manual_seed(0)
    assert float(torch.cat([CutMix().draw(1, (64, 64)).own for _ in range(1000)]).mean()) > 0.55
