"""The baselines, against closed forms and slow loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import foveate
from foveate.method import HostShape, InputError
from foveate.methods.baselines import Dense, Grid, Pool, Random, coarser
from foveate.tokens import Tokens
from stub import numbered, numbers, stage
from tiny import pixels, prompt, vision, vlm


@torch.no_grad()
def test_dense_is_the_model_as_it_is() -> None:
    host = vlm()
    given = prompt(host, [(2, 5), (1, 3)])
    dense = host(**given).logits
    with foveate.apply(host, "dense"):
        assert torch.equal(host(**given).logits, dense)
    with pytest.raises(InputError, match="budget is 1"):
        Dense.for_budget(0.5, HostShape("hf-vlm", (), 24, 22, 1, (24, 24), 32))


def test_random_is_the_same_for_each_sample_and_depends_on_the_seed() -> None:
    tokens = numbered(4, (6, 6))
    draws = [numbers(Random(keep=0.29, seed=seed).draw(tokens, stage(tokens, (6, 6)))) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1] and len({tuple(draw[0]) for draw in draws[1:]}) == 3
    for draw in draws:
        assert all(one == draw[0] == sorted(set(one)) and len(one) == 10 for one in draw)
    one = numbered(1, (6, 6))
    assert numbers(Random(keep=0.29).draw(one, stage(one, (6, 6)))) == draws[0][:1]


def test_random_is_uniform() -> None:
    tokens, hits = numbered(1), [0] * 16
    for seed in range(400):
        for j in numbers(Random(keep=0.25, seed=seed).draw(tokens, stage(tokens)))[0]:
            hits[j] += 1
    assert all(60 < count < 140 for count in hits)


@pytest.mark.parametrize(
    ("grid", "keep", "expected"),
    [((4, 4), 0.25, [5, 7, 13, 15]), ((4, 4), 0.0625, [10]), ((6, 4), 0.5, None), ((24, 24), 0.1, None)],
)
def test_grid_keeps_the_patches_at_the_centres_of_equal_cells(
    grid: tuple[int, int], keep: float, expected: list[int] | None
) -> None:
    tokens = numbered(2, grid)
    chosen = numbers(Grid(keep=keep).sample(tokens, stage(tokens, grid)))
    rows, columns = coarser(grid, keep)
    assert chosen[0] == chosen[1] and len(chosen[0]) == rows * columns
    assert expected is None or chosen[0] == expected
    for axis, cells in ((0, rows), (1, columns)):
        lines = sorted({divmod(j, grid[1])[axis] for j in chosen[0]})
        gaps = {b - a for a, b in itertools.pairwise(lines)}
        assert len(lines) == cells and (not gaps or max(gaps) - min(gaps) <= 1)
        for cell, line in enumerate(lines):
            assert line == math.floor((cell + 0.5) * grid[axis] / cells)


@pytest.mark.parametrize("keep", [0.25, 0.0625])
def test_pool_equals_average_pooling_where_the_grid_divides(keep: float) -> None:
    x = torch.randn(2, 64, 5)
    pooled = Pool(keep=keep).average(Tokens.from_grid(x, (8, 8)), stage(Tokens.from_grid(x, (8, 8)), (8, 8)))
    image, factor = x.transpose(1, 2).reshape(2, 5, 8, 8), round(1 / math.sqrt(keep))
    for expected in (F.avg_pool2d(image, factor), F.adaptive_avg_pool2d(image, 8 // factor)):
        torch.testing.assert_close(pooled.x, expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("grid", [(4, 4), (7, 5), (6, 9)])
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.8])
def test_pool_elsewhere_averages_the_patches_whose_centre_is_in_a_cell(grid: tuple[int, int], keep: float) -> None:
    x = torch.randn(2, grid[0] * grid[1], 5)
    tokens = Tokens.from_grid(x, grid)
    pooled = Pool(keep=keep).average(tokens, stage(tokens, grid))
    rows, columns = coarser(grid, keep)
    assert pooled.x.shape[1] == rows * columns
    for row in range(rows):
        for column in range(columns):
            members = [
                y * grid[1] + z
                for y in range(grid[0])
                for z in range(grid[1])
                if row <= (y + 0.5) * rows / grid[0] < row + 1 and column <= (z + 0.5) * columns / grid[1] < column + 1
            ]
            torch.testing.assert_close(pooled.x[:, row * columns + column], x[:, members].mean(1))


@torch.no_grad()
def test_resolution_is_the_tower_on_the_smaller_picture() -> None:
    model = vision("clip")
    picture = pixels(2)
    small = F.interpolate(picture, size=(8, 8), mode="bilinear", antialias=True, align_corners=False)
    expected = model(small, interpolate_pos_encoding=True).last_hidden_state
    with foveate.apply(model, "resolution", keep=0.25):
        torch.testing.assert_close(model(picture).last_hidden_state, expected)


@torch.no_grad()
def test_resolution_makes_a_language_model_see_fewer_tokens() -> None:
    host = vlm(image=24)
    given = prompt(host, [(2, 5)])
    with foveate.apply(host, "resolution", keep=0.25) as applied:
        host(**given)
    assert applied.trace[0].tokens_out == (9,)
    # Each of the 3 x 3 tokens stands for 2 x 2 of the 6 x 6 patches.
    assert applied.trace[0].source[0].tolist() == [y // 2 * 3 + x // 2 for y in range(6) for x in range(6)]


@pytest.mark.parametrize(
    ("grid", "keep", "expected"),
    [
        ((24, 24), 1.0, (24, 24)), ((24, 24), 0.75, (18, 24)), ((24, 24), 0.5, (16, 18)), ((24, 24), 0.25, (12, 12)),
        ((24, 24), 0.001, (1, 1)), ((4, 8), 0.25, (2, 4)), ((16, 4), 0.25, (8, 2)), ((1, 9), 0.34, (1, 3)),
    ],
)  # fmt: skip
def test_coarser_in_closed_form(grid: tuple[int, int], keep: float, expected: tuple[int, int]) -> None:
    assert coarser(grid, keep) == expected


@pytest.mark.parametrize("grid", [(24, 24), (4, 4), (27, 27), (5, 11)])
def test_coarser_has_the_most_cells_of_all_grids_that_are_not_stretched(grid: tuple[int, int]) -> None:
    for hundredths in range(1, 101):
        rows, columns = coarser(grid, hundredths / 100)
        budget = max(1, grid[0] * grid[1] * hundredths // 100)
        assert 1 <= rows <= grid[0] and 1 <= columns <= grid[1] and rows * columns <= budget

        def fair(r: int, c: int) -> bool:
            height, width = grid[0] / r, grid[1] / c
            return max(height / width, width / height) <= 1.5 + 1e-9

        able = [r * c for r in range(1, grid[0] + 1) for c in range(1, grid[1] + 1) if r * c <= budget and fair(r, c)]
        if able:
            assert fair(rows, columns) and rows * columns == max(able)
