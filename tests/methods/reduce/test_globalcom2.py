"""GlobalCom² against its card: each property, each trap."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

import foveate
from foveate.measure.claims import Checked, count
from foveate.method import Crops, InputError
from foveate.methods.reduce.globalcom2 import GlobalCom2, scores
from foveate.nn.attention import Attention
from foveate.tokens import Tokens
from reference import kept, prompt_embeddings, top
from stub import HOST, StubSignals, numbered, numbers, stage
from tiny import IMAGE, prompt, vlm

# -- the card's rule, in loops


def budgets(thumbnail: list[list[float]], grid: tuple[int, int], keep: float, tau: float = 10.0) -> list[float]:
    (rows, columns), height, width = grid, len(thumbnail), len(thumbnail[0])
    sums = [0.0] * (rows * columns)
    for y in range(height):
        for x in range(width):
            row, column = min(y // (height // rows), rows - 1), min(x // (width // columns), columns - 1)
            sums[row * columns + column] += thumbnail[y][x]
    powers = [math.exp((s - max(sums)) / tau) for s in sums]
    sigma = [power / (sum(powers) + 1e-8) for power in powers]
    return [min(1.0, keep * (1 + s - sum(sigma) / len(sigma))) for s in sigma]


def bilinear(image: list[list[float]], high: int, wide: int) -> list[list[float]]:
    """Half-pixel centres, clamped at the border."""

    def ends(place: int, new: int, old: int) -> tuple[int, int, float]:
        at = max(0.0, (place + 0.5) * old / new - 0.5)
        low = int(at)
        return low, min(low + 1, old - 1), at - low

    out = [[0.0] * wide for _ in range(high)]
    for y in range(high):
        y0, y1, fy = ends(y, high, len(image))
        for x in range(wide):
            x0, x1, fx = ends(x, wide, len(image[0]))
            above = image[y0][x0] * (1 - fx) + image[y0][x1] * fx
            below = image[y1][x0] * (1 - fx) + image[y1][x1] * fx
            out[y][x] = above * (1 - fy) + below * fy
    return out


def choose(
    scores: Tensor, grid: tuple[int, int], valid: list[list[int]], keep: float, side: int, *, alpha: float = 0.5,
    tau: float = 10.0,
) -> list[list[int]]:  # fmt: skip
    """The patches that stay of the thumbnail and each crop.

    Args:
        scores: (1 + n, side * side).
        valid: for each crop the patches that are no padding.
    """
    thumbnail = scores[0].reshape(side, side).tolist()
    ratios = budgets(thumbnail, grid, keep, tau)
    cells = {}
    for crop, patches in enumerate(valid):
        for patch in patches:
            at = (crop // grid[1] * side + patch // side, crop % grid[1] * side + patch % side)
            cells[at] = (crop, patch)
    ys, xs = sorted({y for y, _ in cells}), sorted({x for _, x in cells})
    resized = bilinear(thumbnail, len(ys), len(xs))
    command = {cells[y, x]: resized[i][j] for i, y in enumerate(ys) for j, x in enumerate(xs)}
    chosen = [top(scores[0], int(len(scores[0]) * keep + 1e-9))]
    for crop, patches in enumerate(valid):
        local = [float(scores[1 + crop, patch]) for patch in patches]
        votes = [command[crop, patch] for patch in patches]
        long, wide = math.sqrt(sum(v * v for v in local)), math.sqrt(sum(v * v for v in votes))
        mixed = torch.tensor([(1 - alpha) * a / long + alpha * b / wide for a, b in zip(local, votes)])
        chosen.append([patches[j] for j in top(mixed, int(len(patches) * ratios[crop] + 1e-9))])
    return chosen


# -- made-up scores


class Signals(StubSignals):
    pictures: tuple[Crops, ...]

    def crops(self) -> tuple[Crops, ...]:
        return self.pictures


def of_scores(scores: Tensor) -> Attention:
    """A layer whose class token has these logits: (B, N)."""
    batch, patches = scores.shape
    key = torch.zeros(batch, 1, patches + 1, 2)
    key[:, 0, 1:, 0] = scores
    query = torch.tensor([2.0, 5.0]).expand(batch, 1, patches + 1, 2)
    place = torch.arange(1, patches + 1).expand(batch, -1)
    return Attention(query, key, 0.5, False, None, None, place)


def compress(
    method: GlobalCom2, scores: Tensor, grid: tuple[int, int], packed: Tensor | None = None, side: int = 4
) -> list[list[int]]:
    tokens = numbered(len(scores), (side, side))
    at = stage(tokens, (side, side), host=replace(HOST, vision_layers=24))
    signals = Signals((side, side), {"attention": {23: of_scores(scores)}})
    packed = torch.ones(scores.shape, dtype=torch.bool) if packed is None else packed
    signals.pictures = (Crops(slice(0, len(scores)), grid, packed),)
    return numbers(method.compress(tokens, replace(at, signals=signals)))


def made_up(rows: int, patches: int = 16, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, patches, generator=torch.Generator().manual_seed(seed)) - 2


# -- budgets


@pytest.mark.parametrize("grid", [(1, 2), (2, 2), (1, 3), (3, 2), (1, 5), (4, 1)])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5])
def test_budgets_are_the_formulas(grid: tuple[int, int], keep: float) -> None:
    """24 columns in 5 blocks are 4, 4, 4, 4 and 8."""
    for seed in range(4):
        thumbnail = made_up(1, 576, seed).reshape(24, 24)
        ours = GlobalCom2(keep=keep).budgets(thumbnail, grid)
        assert ours.tolist() == pytest.approx(budgets(thumbnail.tolist(), grid, keep), abs=1e-6)
        count = grid[0] * grid[1]
        assert float(ours.sum()) == pytest.approx(count * keep)
        assert all(keep * (1 - 1 / count) <= r <= keep * (2 - 1 / count) + 1e-12 for r in ours.tolist())


@pytest.mark.parametrize("grid", [(1, 2), (2, 2), (1, 3), (2, 3)])
def test_uniform_scores_give_every_crop_the_same_ratio(grid: tuple[int, int]) -> None:
    for value in (-7.0, 0.0, 3.0):
        ours = GlobalCom2(keep=0.25).budgets(torch.full((24, 24), value), grid)
        assert ours.tolist() == pytest.approx([0.25] * (grid[0] * grid[1]), abs=1e-12)


def test_all_mass_in_one_crop() -> None:
    thumbnail = torch.zeros(24, 24)
    thumbnail[:12, 12:] = 9.0
    assert GlobalCom2(keep=0.25).budgets(thumbnail, (2, 2)).tolist() == pytest.approx([0.1875, 0.4375, 0.1875, 0.1875])


def test_ratios_are_at_most_1_and_grow_with_the_crops_sum() -> None:
    before = 0.0
    for extra in range(8):
        thumbnail = made_up(1, 576).reshape(24, 24) / 50
        thumbnail[:12, :12] += extra / 20
        ours = float(GlobalCom2(keep=0.7).budgets(thumbnail, (2, 2))[0])
        assert before < ours <= 1 or before == ours == 1
        before = ours
    assert before == 1


def test_budgets_do_not_change_when_all_scores_are_shifted() -> None:
    thumbnail = made_up(1, 576).reshape(24, 24) / 20
    method = GlobalCom2()
    before = method.budgets(thumbnail, (2, 2))
    torch.testing.assert_close(method.budgets(thumbnail + 11, (2, 2)), before, rtol=0, atol=1e-5)
    assert float(before.max() - before.min()) > 0.02


def test_probabilities_would_make_budgets_almost_uniform() -> None:
    """The scores are logits: their sums over tau = 10 differ, those of a softmax do not."""
    thumbnail = made_up(1, 576).reshape(24, 24) / 20
    thumbnail[:12, :12] += 0.3
    method, flat = GlobalCom2(), thumbnail.flatten().softmax(0).reshape(24, 24)
    assert float(method.budgets(thumbnail, (2, 2)).max()) > 0.4
    assert float(method.budgets(flat, (2, 2)).max()) < 0.26


# -- the choice


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.75])
def test_a_square_picture_of_real_size(keep: float) -> None:
    """Four crops of 24 x 24 without padding: exact counts, and the global map is 48 x 48."""
    scores = made_up(5, 576) / 20
    ours = compress(GlobalCom2(keep=keep), scores, (2, 2), side=24)
    expected = choose(scores, (2, 2), [list(range(576))] * 4, keep, 24)
    ratios = budgets(scores[0].reshape(24, 24).tolist(), (2, 2), keep)
    assert [len(one) for one in ours] == [int(576 * keep), *(int(576 * ratio) for ratio in ratios)]
    assert ours == expected
    assert 2880 * keep - 5 <= sum(map(len, ours)) <= 2880 * keep


@pytest.mark.parametrize("grid", [(2, 2), (1, 2), (2, 1), (1, 3)])
@pytest.mark.parametrize("mix", [0.0, 0.3, 0.5, 1.0])
def test_the_choice_with_padding(grid: tuple[int, int], mix: float) -> None:
    """The valid patches are those of a window in the stitched map; one crop has few of them."""
    side, n = 4, grid[0] * grid[1]
    for seed, (up, down, left, right) in enumerate([(0, 0, 0, 0), (1, 1, 0, 0), (0, 0, 1, 1), (0, 0, 1, 2)]):
        valid = [
            [
                p for p in range(16)
                if up <= c // grid[1] * side + p // side < grid[0] * side - down
                and left <= c % grid[1] * side + p % side < grid[1] * side - right
            ]
            for c in range(n)
        ]  # fmt: skip
        packed = torch.zeros(1 + n, 16, dtype=torch.bool)
        packed[0] = True
        for crop, patches in enumerate(valid):
            packed[1 + crop, patches] = True
        scores = made_up(1 + n, 16, seed)
        ours = compress(GlobalCom2(keep=0.4, mix=mix), scores, grid, packed)
        assert ours == choose(scores, grid, valid, 0.4, side, alpha=mix)


def test_a_crop_that_is_all_padding_keeps_nothing() -> None:
    packed = torch.ones(4, 16, dtype=torch.bool)
    packed[3] = False
    assert compress(GlobalCom2(keep=0.5), made_up(4), (1, 3), packed)[3] == []


@pytest.mark.parametrize("mix", [0.5, 0.2])
def test_fusion_ignores_scale(mix: float) -> None:
    """The temperature takes the thumbnail's factor out of the budgets, where it does count."""
    scores = made_up(5)
    before = compress(GlobalCom2(keep=0.4, mix=mix), scores, (2, 2))
    for factor in (0.01, 7.0):
        crops = torch.cat([scores[:1], factor * scores[1:]])
        assert compress(GlobalCom2(keep=0.4, mix=mix), crops, (2, 2)) == before
        thumbnail = torch.cat([factor * scores[:1], scores[1:]])
        assert compress(GlobalCom2(keep=0.4, mix=mix, temperature=10 * factor), thumbnail, (2, 2)) == before


def test_a_constant_thumbnail_leaves_the_local_ranking() -> None:
    scores = made_up(5)
    scores[0] = -1.5
    for crop, chosen in enumerate(compress(GlobalCom2(keep=0.4), scores, (2, 2))[1:]):
        assert chosen == top(scores[1 + crop], 6)


def test_the_alpha_of_one_half_is_the_plain_sum() -> None:
    """The paper mixes with alpha, the release adds: the same ranking."""
    scores = made_up(3)
    resized = torch.tensor(bilinear(scores[0].reshape(4, 4).tolist(), 4, 8))
    ours = compress(GlobalCom2(keep=0.4), scores, (1, 2))
    for crop in range(2):
        vote, own = resized[:, 4 * crop : 4 * crop + 4].flatten(), scores[1 + crop]
        assert ours[1 + crop] == top(own / own.norm() + vote / vote.norm(), len(ours[1 + crop]))


def test_keep_1_is_a_bypass_but_not_in_the_release() -> None:
    scores = made_up(5)
    scores[0] = torch.tensor([5.0, 5, 0, 0] * 2 + [0.0] * 8)
    assert compress(GlobalCom2(keep=1.0), scores, (2, 2)) == [list(range(16))] * 5
    ours = compress(GlobalCom2(keep=1.0, full="budgets"), scores, (2, 2))
    ratios = budgets(scores[0].reshape(4, 4).tolist(), (2, 2), 1.0)
    assert min(ratios) < 15 / 16 and max(ratios) == 1
    assert [len(one) for one in ours] == [16, *(int(16 * ratio) for ratio in ratios)]


def test_the_thumbnail_in_falling_order_of_scores() -> None:
    scores = made_up(5)
    raster = compress(GlobalCom2(keep=0.5), scores, (2, 2))
    falling = compress(GlobalCom2(keep=0.5, order="score"), scores, (2, 2))
    assert falling[0] == scores[0].argsort(descending=True)[:8].tolist() != raster[0] == sorted(falling[0])
    assert falling[1:] == raster[1:] and all(one == sorted(one) for one in raster)


def test_a_picture_of_one_part() -> None:
    scores = made_up(1)
    assert compress(GlobalCom2(keep=0.4), scores, (0, 0)) == [top(scores[0], 6)]
    assert compress(GlobalCom2(keep=0.4, single="bypass"), scores, (0, 0)) == [list(range(16))]


def test_dropped_patches_are_refused_and_merged_ones_are_counted_by_what_they_cover() -> None:
    """Cells of 2 x 2 patches, as of a model that merges them after its encoder, are ranked as cells."""
    scores = made_up(3, 4)
    wide = scores.reshape(3, 2, 2).repeat_interleave(2, 1).repeat_interleave(2, 2).reshape(3, 16)
    cell = torch.arange(16).reshape(4, 4) // 8 * 2 + torch.arange(4) % 4 // 2
    tokens = numbered(3).merge(cell.flatten().expand(3, -1))
    signals = Signals((4, 4), {"attention": {23: of_scores(scores)}})
    signals.pictures = (Crops(slice(0, 3), (1, 2), torch.ones(3, 16, dtype=torch.bool)),)
    method = GlobalCom2(keep=0.5)
    at = replace(stage(tokens), signals=signals)
    left = method.compress(tokens, at)
    ratios = budgets(wide[0].reshape(4, 4).tolist(), (1, 2), 0.5)
    vote = torch.tensor(bilinear(wide[0].reshape(4, 4).tolist(), 4, 8)).unfold(0, 2, 2).unfold(1, 2, 2).mean((2, 3))
    expected = [top(scores[0], 2)]
    for crop in range(2):
        mine, own = vote[:, 2 * crop : 2 * crop + 2].flatten(), scores[1 + crop]
        expected.append(top(own / own.norm() + mine / mine.norm(), int(4 * ratios[crop])))
    assert [sorted({int(cell.flatten()[p]) for p in patches}) for patches in kept(left.source)] == expected
    some = numbered(3).keep(torch.arange(15).expand(3, -1))
    with pytest.raises(InputError, match="whole thumbnail"):
        method.compress(some, at)


# -- real models


def class_logits(model: Any, pixels: Tensor) -> Tensor:
    """(B, N): the class token's scaled logits of the last layer from its own projections, head by head."""
    seen: dict[str, Tensor] = {}
    tower = model.model.vision_tower
    module = tower.encoder.layers[-1].self_attn
    handles = [
        getattr(module, name).register_forward_hook(lambda m, a, output, name=name: seen.__setitem__(name, output))
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        tower(pixels)
    for handle in handles:
        handle.remove()
    query, key = seen["q_proj"], seen["k_proj"]
    width = query.shape[-1] // 4
    heads = [slice(width * h, width * (h + 1)) for h in range(4)]
    total = sum((query[:, :1, h] * key[:, 1:, h]).sum(-1) for h in heads)
    return total / 4 / math.sqrt(width)  # type: ignore[operator]


def expected_features(
    model: Any, pixels: Tensor, size: Tensor, keep: float, newline: str
) -> tuple[Tensor, list[list[int]], int]:
    """What should enter the language model for one picture, its patches, and how many newlines there are."""
    side = model.config.vision_config.image_size
    grid = get_anyres_image_grid_shape(size, model.config.image_grid_pinpoints, side)
    rows, columns = grid
    count = 1 + rows * columns
    cells = torch.arange(rows * columns * 16).reshape(rows, columns, 4, 4).transpose(1, 2).reshape(1, 4 * rows, -1)
    left = unpad_image(cells, size)[0].tolist()
    valid = [[cell % 16 for row in left for cell in row if cell // 16 == crop] for crop in range(count - 1)]
    chosen = choose(class_logits(model, pixels[:count]), grid, [sorted(v) for v in valid], keep, 4)
    with torch.no_grad():
        states = model.model.vision_tower(pixels[:count], output_hidden_states=True).hidden_states[-2][:, 1:]
        features = model.model.multi_modal_projector(states)
    sequence, newlines = [features[0, p] for p in chosen[0]], 0
    for row in left:
        stay = [cell for cell in row if cell % 16 in chosen[1 + cell // 16]]
        sequence += [features[1 + cell // 16, cell % 16] for cell in stay]
        if newline == "every" or stay == row:
            sequence.append(model.model.image_newline)
            newlines += 1
    return torch.stack(sequence), chosen, newlines


@pytest.mark.parametrize("newline", ["every", "whole"])
@pytest.mark.parametrize("keep", [0.25, 0.6, 0.97])
@torch.no_grad()
def test_what_enters_the_language_model(keep: float, newline: str) -> None:
    """Logits of the last layer, features of the one before, raster order of the stitched map, each picture its own.

    Sizes: two without padding and two with.
    """
    host = vlm("next", seed=1)
    sizes = [(24, 12), (16, 24), (48, 40), (24, 24)]
    given = prompt(host, [(2, 3, 6), (1, 4, 3)], sizes=sizes)
    pictures = zip(given["pixel_values"], given["image_sizes"])
    parts = [expected_features(host, crops, size, keep, newline) for crops, size in pictures]
    if newline == "every":
        # One for each row of the stitched map: two crops high, but for the second, which is one crop high.
        assert [newlines for _, _, newlines in parts] == [8, 4, 8, 8]
    else:
        assert any(newlines for _, _, newlines in parts) == (keep > 0.25)
    with foveate.apply(host, GlobalCom2(keep=keep, newlines=newline)) as applied:
        ours = prompt_embeddings(host, given)
        found = kept(applied.trace[0].source)
    assert found == [patches for _, chosen, _ in parts for patches in chosen]
    for b in range(2):
        embeddings, ids = host.get_input_embeddings(), given["input_ids"][b].tolist()
        upcoming, wanted, inside = iter(parts[2 * b : 2 * b + 2]), [], False
        for token in [token for token, there in zip(ids, given["attention_mask"][b]) if there]:
            if token == IMAGE and not inside:
                wanted.append(next(upcoming)[0])
            elif token != IMAGE:
                wanted.append(embeddings(torch.tensor([token])))
            inside = token == IMAGE
        expected = torch.cat(wanted)
        torch.testing.assert_close(ours[b, -len(expected) :], expected, rtol=1e-4, atol=1e-5)


def test_a_budget_is_of_tokens_newlines_included() -> None:
    """Compared methods spend the same; the card's newlines come on top."""
    host = vlm("next", seed=1)
    given = prompt(host, [(2, 6)], sizes=[(24, 24)])
    assert GlobalCom2().newlines == "every"
    method = GlobalCom2.for_budget(0.25, HOST)
    with foveate.apply(host, method) as applied, torch.no_grad():
        host(**given)
        assert applied.trace[-1].tokens_out[0] <= 0.25 * (5 * 16 + 8)


@torch.no_grad()
def test_the_last_layer_and_logits_matter() -> None:
    """The wrong layer (that of the features) and the wrong scores (probabilities) would choose otherwise."""
    host = vlm("next", seed=1)
    given = prompt(host, [(2, 6)], sizes=[(24, 24)])
    with foveate.apply(host, GlobalCom2(keep=0.5)) as applied:
        host(**given)
    ours = kept(applied.trace[0].source)
    tower = host.model.vision_tower
    tower.set_attn_implementation("eager")
    maps = tower(given["pixel_values"][0], output_attentions=True).attentions
    full = [list(range(16))] * 4
    for wrong in (maps[-1].mean(1)[:, 0, 1:], maps[-2].mean(1)[:, 0, 1:]):
        assert choose(wrong, (2, 2), full, 0.5, 4) != ours


def relative(attention: Tensor) -> Tensor:
    """The substitute's score: how much more than the mean patch, on a scale of logits."""
    return (attention / attention.mean(-1, keepdim=True)).log()


def eager_maps(tower: Any, pixels: Tensor) -> Tensor:
    """(B, H, S, S) attention of the tower's last layer."""
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps: Tensor = tower(pixels, output_attentions=True).attentions[-1]
    tower.set_attn_implementation(before)
    return maps


@torch.no_grad()
def test_crops_without_a_class_token() -> None:
    """LLaVA-OneVision: what patches receive from all others takes the class token's place."""
    host = vlm("onevision")
    given = prompt(host, [(2, 6)], sizes=[(16, 32)])
    received = eager_maps(host.model.vision_tower, given["pixel_values"].flatten(0, 1)).mean(1).mean(1)
    assert received.shape == (3, 16)
    expected = choose(relative(received), (1, 2), [list(range(16))] * 2, 0.4, 4)
    with foveate.apply(host, GlobalCom2(keep=0.4)) as applied:
        host(**given)
    assert kept(applied.trace[0].source) == expected


@torch.no_grad()
def test_joined_patches_are_scored_by_the_mean_of_their_class_attention() -> None:
    """InternVL: a token is a cell of 2 x 2 of 8 x 8 patches."""
    host = vlm("internvl")
    given = prompt(host, [(2, 6), (1, 4)])
    paid = eager_maps(host.model.vision_tower, given["pixel_values"]).mean(1)[:, 0, 1:].reshape(-1, 8, 8)
    cells = [[float(row[y : y + 2, x : x + 2].mean()) for y in (0, 2, 4, 6) for x in (0, 2, 4, 6)] for row in paid]
    with foveate.apply(host, GlobalCom2(keep=0.4)) as applied:
        host(**given)
    assert kept(applied.trace[0].source) == [top(torch.tensor(row), 6) for row in cells]


def test_the_substitute_is_a_difference_of_logits() -> None:
    """Of one head it is the logit up to a constant, which changes neither budgets nor ranking."""
    logit, tokens = made_up(1), numbered(1)

    class Received(StubSignals):
        def received(self, layer: int) -> Tensor:
            assert layer == 23
            return logit.softmax(-1)

    host = replace(HOST, class_token=False)
    score = scores(tokens, replace(stage(tokens), host=host, signals=Received((4, 4), {})))
    torch.testing.assert_close(score - score.mean(), logit - logit.mean(), rtol=0, atol=1e-5)


@torch.no_grad()
def test_bypassed_single_pictures_leave_llava_15_as_it_is() -> None:
    host = vlm()
    given = prompt(host, [(2, 5), (1, 4)])
    dense = host(**given).logits
    with foveate.apply(host, GlobalCom2(keep=0.3, single="bypass")):
        assert torch.equal(host(**given).logits, dense)


def test_the_trend_that_budgets_follow_objects() -> None:
    """All objects in one crop: that crop keeps more than R, the others less; a uniform split would not."""
    scores = made_up(5, 576) / 100
    scores[0].reshape(24, 24)[12:, :12] += 0.3
    lengths = [len(one) for one in compress(GlobalCom2(keep=0.25), scores, (2, 2), side=24)[1:]]
    assert lengths[2] > 144 > max(lengths[:2] + lengths[3:])


def test_a_batch_of_which_one_picture_has_no_crops() -> None:
    scores = made_up(4)
    tokens = numbered(4)
    signals = Signals((4, 4), {"attention": {23: of_scores(scores)}})
    signals.pictures = (
        Crops(slice(0, 3), (1, 2), torch.ones(3, 16, dtype=torch.bool)),
        Crops(slice(3, 4), (0, 0), torch.ones(1, 16, dtype=torch.bool)),
    )
    left = GlobalCom2(keep=0.4).compress(tokens, replace(stage(tokens), signals=signals))
    assert numbers(left) == [*choose(scores[:3], (1, 2), [list(range(16))] * 2, 0.4, 4), top(scores[3], 6)]


@pytest.mark.parametrize(
    "claim", [c for c in GlobalCom2.claims if c.settings["keep"] == 0.1], ids=lambda claim: claim.what[:5]
)
def test_claims_at_a_tenth(claim: Any) -> None:
    assert Checked("globalcom2", claim, count(GlobalCom2, claim)).holds


def test_tokens_stay_one_set_a_row() -> None:
    """Rows that keep different numbers are padded, and padding stands for no patch."""
    tokens = numbered(5)
    signals = Signals((4, 4), {"attention": {23: of_scores(made_up(5))}})
    signals.pictures = (Crops(slice(0, 5), (2, 2), torch.ones(5, 16, dtype=torch.bool)),)
    left: Tokens = GlobalCom2(keep=0.5).compress(tokens, replace(stage(tokens), signals=signals))
    assert left.valid is not None and int(left.size.sum()) == int(left.count.sum())
