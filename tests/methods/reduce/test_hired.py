"""HiRED against its card: budgets and choices against loops over fractions, packing against the host's unpadding."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import unpad_image

import foveate
from foveate.method import Crops, Stage
from foveate.methods.reduce.hired import HiRed
from foveate.tokens import Tokens
from reference import eager_vision, kept, top
from stub import HOST, StubSignals, numbered, numbers
from tiny import IMAGE, prompt, vlm

SIZES = {(24, 12): (2, 1), (12, 30): (1, 2), (24, 24): (2, 2)}
"""Size of a picture -> grid of crops that the tiny LLaVA-NeXT cuts it in."""


# -- the rule, written out


def deal(
    first: Any, grid: tuple[int, int], crops: tuple[int, int], keep: float, alpha: float, how: str = "paper"
) -> list[int]:
    """Budgets of the thumbnail and of each crop; `first` is the thumbnail's attention in layer 0, row by row."""
    rows, columns = grid
    patches, count = rows * columns, crops[0] * crops[1]
    whole = int((count + 1) * patches * Fraction(str(keep)))
    thumbnail = min(int(Fraction(str(alpha)) * whole), patches)
    rest = min(whole - thumbnail, count * patches)
    values = [Fraction(float(one)) for one in first]
    if how == "release":
        # A 0/1 map of the best, cut in runs of consecutive patches.
        best = top(torch.as_tensor(first), int(patches * (1 - Fraction(str(alpha)))))
        runs = torch.tensor([float(j in best) for j in range(patches)]).reshape(*crops, -1).sum(-1).flatten()
        sums = [Fraction(float(one)) for one in runs]
    else:
        high, wide = rows // crops[0], columns // crops[1]
        sums = [Fraction(0)] * count
        for y in range(rows):
            for x in range(columns):
                sums[y // high * crops[1] + x // wide] += values[y * columns + x]
    return [thumbnail, *(min(int(rest * one / sum(sums)), patches) for one in sums)]


class Signals(StubSignals):
    """Made-up class-token attention, and one picture or several."""

    pictures: tuple[Crops, ...] = ()

    def crops(self) -> tuple[Crops, ...]:
        return self.pictures


def chosen(
    method: HiRed, first: Tensor, final: Tensor, crops: tuple[int, int] | list[tuple[int, int]],
    grid: tuple[int, int] = (24, 24),
) -> list[list[int]]:  # fmt: skip
    """What is kept in each partition; first, final (P, M) are the attentions in layers 0 and 22."""
    tokens = numbered(len(first), grid)
    signals = Signals(grid, {"cls": {0: first, 22: final}})
    start = 0
    for one in crops if isinstance(crops, list) else [crops]:
        rows = slice(start, start + 1 + one[0] * one[1])
        packed = torch.ones(rows.stop - start, grid[0] * grid[1], dtype=torch.bool)
        signals.pictures, start = (*signals.pictures, Crops(rows, one, packed)), rows.stop
    active = torch.ones(len(first), dtype=torch.bool)
    at = Stage("vision.output", -1, replace(HOST, grid=grid), signals, tokens.count, active)
    return numbers(method.drop(tokens, at))


def attention(partitions: int, patches: int = 576, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(partitions, patches, generator=generator).pow(4) / patches


@pytest.mark.parametrize("keep", [0.1, 0.2, 0.29, 0.4, 0.9])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("crops", [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (4, 1)])
def test_budgets_and_choices_equal_the_loop(crops: tuple[int, int], alpha: float, keep: float) -> None:
    partitions = 1 + crops[0] * crops[1]
    first, final = attention(partitions), attention(partitions, seed=1)
    ours = chosen(HiRed(keep=keep, alpha=alpha), first, final, crops)
    budgets = deal(first[0], (24, 24), crops, keep, alpha)
    assert ours == [top(final[p], budgets[p]) for p in range(partitions)]
    # The paper's caps, whatever the attention.
    whole = int(partitions * 576 * Fraction(str(keep)))
    assert sum(map(len, ours)) <= whole
    assert sum(map(len, ours[1:])) <= min(whole - len(ours[0]), (partitions - 1) * 576)
    assert max(map(len, ours)) <= 576


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("crops", [(1, 2), (2, 2), (3, 1)])
def test_the_release_counts_hits_in_strips(crops: tuple[int, int], alpha: float) -> None:
    partitions = 1 + crops[0] * crops[1]
    first, final = attention(partitions, seed=2), attention(partitions, seed=3)
    ours = chosen(HiRed(alpha=alpha, regions="strips", score="count"), first, final, crops)
    assert [len(one) for one in ours] == deal(first[0], (24, 24), crops, 0.2, alpha, "release")


@pytest.mark.parametrize(("crops", "lit", "best"), [((2, 2), "top right", 1), ((1, 2), "right", 1), ((2, 1), "low", 1)])
def test_attention_in_one_region_favours_the_crop_that_shows_it(crops: tuple[int, int], lit: str, best: int) -> None:
    """The paper's blocks: all that the crops get goes there, up to 576. The release's strips give it to others too."""
    place = torch.arange(576).reshape(24, 24)
    where = {"top right": place[:12, 12:], "right": place[:, 12:], "low": place[12:]}[lit].flatten()
    partitions = 1 + crops[0] * crops[1]
    first, final = torch.zeros(partitions, 576), attention(partitions)
    first[0, where] = 1 / len(where)
    rest = min(int(partitions * 576 * 0.2) - int(0.5 * int(partitions * 576 * 0.2)), 576)
    counts = [len(one) for one in chosen(HiRed(), first, final, crops)]
    assert counts[1 + best] == rest and sum(counts[1:]) == rest
    strips = [len(one) for one in chosen(HiRed(regions="strips"), first, final, crops)]
    if lit == "top right":
        # Of four runs of six rows, the first two hold half of the quadrant each.
        assert strips[1:] == [144, 144, 0, 0]
    if lit == "right":
        assert strips[1:] == [rest // 2, rest // 2]


def test_uniform_attention_gives_equal_budgets() -> None:
    even = torch.full((5, 576), 1 / 577)
    for settings in ({}, {"regions": "strips"}, {"regions": "strips", "score": "count", "alpha": 0.0}):
        counts = [len(one) for one in chosen(HiRed(keep=0.2, **settings), even, attention(5), (2, 2))]
        assert len(set(counts[1:])) == 1 and counts[1] == (576 - counts[0]) // 4
    # 576 - 288 = 288 over 4 crops; 57.6 * 3 = 172, half of it over two.
    assert [len(one) for one in chosen(HiRed(keep=0.1), even[:3], attention(3), (1, 2))] == [86, 43, 43]


def test_alpha_is_the_share_of_the_thumbnail() -> None:
    first, final = attention(5), attention(5, seed=1)

    def counts(keep: float, alpha: float) -> list[int]:
        return [len(one) for one in chosen(HiRed(keep=keep, alpha=alpha), first, final, (2, 2))]

    assert counts(0.2, 1.0) == [576, 0, 0, 0, 0]
    assert counts(0.1, 1.0) == [288, 0, 0, 0, 0]
    assert counts(0.2, 0.0)[0] == 0 and sum(counts(0.2, 0.0)) > 576 - 4
    # More than a thumbnail has goes to the crops.
    assert counts(0.4, 1.0)[0] == 576 and sum(counts(0.4, 1.0)[1:]) > 576 - 4


def test_the_choice_in_a_partition_depends_on_no_other() -> None:
    first, final = attention(5), attention(5, seed=1)
    whole = chosen(HiRed(), first, final, (2, 2))
    for p in range(5):
        other = attention(5, seed=7)
        other[p] = final[p]
        late = first.clone()
        late[1:] = attention(4, seed=8)  # only the thumbnail's first layer counts
        assert chosen(HiRed(), late, other, (2, 2))[p] == whole[p]


def test_pictures_of_a_batch_are_dealt_out_each_alone() -> None:
    grids = [(2, 2), (1, 2), (2, 1)]
    first, final = attention(11), attention(11, seed=1)
    together = chosen(HiRed(), first, final, grids)
    for crops, rows in zip(grids, (slice(0, 5), slice(5, 8), slice(8, 11))):
        assert together[rows] == chosen(HiRed(), first[rows], final[rows], crops)


def test_limits_are_exact_for_decimal_shares() -> None:
    """0.29 * 100 is 28.999... in binary."""
    for keep in (0.29, 0.07, 0.57, 0.1, 0.7):
        for partitions in range(2, 12):
            whole = int(partitions * 100 * Fraction(str(keep)))
            thumbnail = min(int(Fraction("0.3") * whole), 100)
            assert HiRed(keep=keep, alpha=0.3).limits(100 * partitions, 100) == (
                whole, thumbnail, min(whole - thumbnail, (partitions - 1) * 100),
            )  # fmt: skip


# -- on real hosts


def class_attention(model: Any, pixels: Tensor, layer: int) -> Tensor:
    """(P, M), summed over heads; without a class token, what all pay."""
    maps = eager_vision(model, pixels).attentions[layer]
    has_class = hasattr(model.model.vision_tower.embeddings, "class_embedding")
    return maps[:, :, 0, 1:].sum(1) if has_class else maps.sum((1, 2))


def expected(model: Any, pixels: Tensor, crops: tuple[int, int], keep: float, alpha: float) -> list[list[int]]:
    """Patches kept of each partition of one picture (P, 3, H, W)."""
    first, final = (class_attention(model, pixels, layer) for layer in (0, 3))
    budgets = deal(first[0].double(), (4, 4), crops, keep, alpha)
    return [top(final[p], budgets[p]) for p in range(len(pixels))]


def at_output(applied: Any) -> list[list[int]]:
    return kept(next(record.source for record in applied.trace if record.stage == "vision.output"))


@pytest.mark.parametrize("keep", [0.2, 0.4, 0.9])
@torch.no_grad()
def test_llava_next_keeps_what_the_eager_maps_say(keep: float) -> None:
    """Layer 0 deals, the layer that made the features (the fourth of five) chooses, over all keys."""
    host = vlm("next")
    given = prompt(host, [(2, 6), (1, 2, 3)], sizes=list(SIZES))
    with foveate.apply(host, HiRed(keep=keep)) as applied:
        host(**given)
        ours = at_output(applied)
    wanted = []
    for picture, crops in zip(given["pixel_values"], SIZES.values()):
        wanted += expected(host, picture[: 1 + crops[0] * crops[1]], crops, keep, 0.5)
    assert ours == wanted
    last = class_attention(host, given["pixel_values"][0, :3], 4)
    assert keep > 0.5 or [top(last[p], len(ours[p])) for p in range(3)] != ours[:3]


@pytest.mark.parametrize("name", ["clip-llama", "siglip-qwen2"])
@torch.no_grad()
def test_one_partition_keeps_its_best(name: str) -> None:
    """LLaVA-1.5's rule, whatever alpha is; without a class token by the attention that patches receive."""
    host = vlm(name)
    given = prompt(host, [(2, 5), (1, 3)])
    score = class_attention(host, given["pixel_values"], 3)
    for keep, count in ((0.2, 3), (0.4, 6), (0.57, 9)):
        with foveate.apply(host, HiRed(keep=keep, alpha=0.9)) as applied:
            host(**given)
            assert at_output(applied) == [top(one, count) for one in score]


@pytest.mark.parametrize("name", ["next", "clip-llama"])
@torch.no_grad()
def test_all_of_the_budget_is_the_vanilla_model(name: str) -> None:
    host = vlm(name)
    given = prompt(host, [(2, 5), (1, 3)])
    dense = host(**given).logits
    with foveate.apply(host, HiRed(keep=1.0)) as applied:
        assert torch.equal(host(**given).logits, dense)
    assert [record.stage for record in applied.trace] == ["llm.input"]


@torch.no_grad()
def test_a_text_alone_is_left_untouched() -> None:
    host = vlm("next")
    given = prompt(host, [(6,)])
    dense = host(**given).logits
    with foveate.apply(host, HiRed()):
        assert torch.equal(host(**given).logits, dense)


def packed(
    host: Any, pixels: Tensor, crops: tuple[int, int], size: tuple[int, int], stay: list[list[int]], newlines: str
) -> tuple[Tensor, int]:
    """The features of one picture as they enter the language model, and how many patches are among them.

    The thumbnail in raster order, then all crops laid out as one map, cut to the picture's shape, row by row. With
    "whole", a row of which everything stays ends with the newline token.
    """
    model = host.model
    state = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    features = model.multi_modal_projector(state)
    high, wide = 4 * crops[0], 4 * crops[1]
    laid = torch.zeros(features.shape[-1] + 1, high, wide)
    for p in range(1, len(pixels)):
        r, c = divmod(p - 1, crops[1])
        for patch in range(16):
            y, x = 4 * r + patch // 4, 4 * c + patch % 4
            laid[:-1, y, x], laid[-1, y, x] = features[p, patch], float(patch in stay[p])
    laid = unpad_image(laid, size)
    out = [features[0, patch] for patch in stay[0]]
    patches = len(out)
    for y in range(laid.shape[1]):
        row = [laid[:-1, y, x] for x in range(laid.shape[2]) if laid[-1, y, x]]
        out += row
        patches += len(row)
        if newlines == "whole" and len(row) == laid.shape[2]:
            out.append(model.image_newline)
    return torch.stack(out), patches


@pytest.mark.parametrize(("keep", "alpha"), [(0.3, 0.5), (0.4, 0.0), (0.95, 0.3)])
@pytest.mark.parametrize("size", [*SIZES, (20, 24), (13, 30), (24, 9)])
@pytest.mark.parametrize("rule", ["none", "whole"])
@torch.no_grad()
def test_what_enters_the_language_model(rule: str, size: tuple[int, int], keep: float, alpha: float) -> None:
    """Order, unpadding, newlines; and the budget is never exceeded by patches, padding only loses some."""
    host = vlm("next")
    given = prompt(host, [(2, 6)], sizes=[size])
    entered: list[Tensor] = []
    with foveate.apply(host, HiRed(keep=keep, alpha=alpha, newlines=rule)) as applied:
        handle = host.model.language_model.layers[0].register_forward_pre_hook(lambda m, a: entered.append(a[0]))
        host(**given)
        handle.remove()
        (picture,) = applied.host.encoder.pictures
    crops = picture.grid
    pixels = given["pixel_values"][0, : 1 + crops[0] * crops[1]]
    stay = expected(host, pixels, crops, keep, alpha)
    features, patches = packed(host, pixels, crops, size, stay, rule)
    torch.testing.assert_close(entered[0][0, 2:-6], features, rtol=1e-4, atol=1e-5)
    assert patches <= int(len(pixels) * 16 * Fraction(str(keep)))
    # Newlines stay only with their whole rows, which takes most of a crop.
    newlines = len(features) - patches
    assert newlines == 0 if rule == "none" or (keep < 0.5 and alpha) else newlines <= 4 * crops[0]
    # Dense, every row ends with one.
    dense = int((given["input_ids"] == IMAGE).sum())
    assert len(features) < dense


@torch.no_grad()
def test_positions_of_the_shorter_prompt_are_consecutive() -> None:
    host, seen = vlm("next"), []
    given = prompt(host, [(2, 6)], sizes=[(24, 24)])
    with foveate.apply(host, HiRed(keep=0.2)) as applied:
        handle = host.model.language_model.layers[0].register_forward_pre_hook(
            lambda m, a, k: seen.append(k["position_ids"]), with_kwargs=True
        )
        host(**given)
        handle.remove()
        count = applied.trace[-1].tokens_out[0]
    assert 0 < count <= 16 and seen[0].tolist() == [list(range(8 + count))]


def test_a_shorter_encoder_is_dealt_out_by_what_is_left() -> None:
    """Tokens that were dropped before do not come back, and a region is found by position."""
    tokens = numbered(3).keep(torch.arange(0, 16, 2).expand(3, -1))
    signals = Signals((4, 4), {"cls": {0: attention(3, 8), 22: attention(3, 8, seed=1)}})
    signals.pictures = (Crops(slice(0, 3), (2, 1), torch.ones(3, 16, dtype=torch.bool)),)
    at = Stage("vision.output", -1, HOST, signals, tokens.count, torch.ones(3, dtype=torch.bool))
    ours: Tokens = HiRed(keep=0.5).drop(tokens, at)
    # 3 * 8 * 0.5 = 12: 6 for the thumbnail; the first four of its eight tokens show crop 1.
    first = attention(3, 8)[0].double()
    share = float(first[:4].sum() / first.sum())
    assert [len(one) for one in numbers(ours)] == [6, int(6 * share), int(6 * (1 - share))]


@pytest.mark.parametrize("keep", [0.3, 0.4, 0.8])
@torch.no_grad()
def test_a_resampled_picture_spends_no_more_than_it_has(keep: float) -> None:
    """OneVision makes 5 x 5 cells of 2 x 2 crops: blocks of 9, 6, 6 and 4 tokens beside a thumbnail of 16."""
    host = vlm("onevision", vision_aspect_ratio="anyres_max_2")
    given = prompt(host, [(2, 6)], sizes=[(30, 30)])
    first = eager_vision(host, given["pixel_values"][0]).attentions[0][0].double().mean((0, 1)).reshape(4, 4)
    whole = int(41 * Fraction(str(keep)))
    thumbnail = min(whole // 2, 16)
    quarters = [first[y : y + 2, x : x + 2].sum() / first.sum() for y in (0, 2) for x in (0, 2)]
    rest = whole - thumbnail
    wanted = [thumbnail, *(min(int(rest * one), held) for one, held in zip(quarters, (9, 6, 6, 4)))]
    with foveate.apply(host, HiRed(keep=keep)) as applied:
        host(**given)
        record = next(one for one in applied.trace if one.stage == "vision.output")
    assert record.tokens_in == (16, 9, 6, 6, 4)
    assert list(record.tokens_out) == wanted and sum(record.tokens_out) <= whole
