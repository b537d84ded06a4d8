"""`Tokens`: each verb against a slow loop, and one property over random chains of verbs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.tokens import DROPPED, Tokens, compact, topk_in_order


def fresh(
    batch: int = 2, grid: tuple[int, int] = (3, 4), channels: int = 5, dtype: torch.dtype = torch.float32
) -> Tokens:
    return Tokens.from_grid(torch.randn(batch, grid[0] * grid[1], channels).to(dtype), grid)


def ragged() -> Tokens:
    """12 patches; sample 0 keeps 5 tokens, sample 1 keeps 3."""
    return fresh().keep(torch.tensor([[0, 3, 4, 8, 11], [2, 7, 9, -1, -1]]))


def check(tokens: Tokens) -> None:
    """size[b, j] counts the patches that point at j, and what no token holds was dropped."""
    for b in range(tokens.x.shape[0]):
        for j in range(tokens.x.shape[1]):
            assert int(tokens.size[b, j]) == int((tokens.source[b] == j).sum())
        dropped = int((tokens.source[b] == DROPPED).sum())
        assert int(tokens.size[b].sum()) + dropped == tokens.source.shape[1]
        assert int(tokens.source[b].max()) < tokens.x.shape[1]
        if tokens.valid is not None:
            assert not tokens.size[b][~tokens.valid[b]].any()


def slow_position(tokens: Tokens, original: Tokens, b: int, j: int) -> Tensor:
    return torch.stack([original.position[b, m] for m in (tokens.source[b] == j).nonzero().flatten()]).mean(0)


# -- from_grid


def test_from_grid_is_in_raster_order() -> None:
    tokens = Tokens.from_grid(torch.randn(2, 24, 3), (2, 3, 4))
    expected = [(t, y, x) for t in range(2) for y in range(3) for x in range(4)]
    assert tokens.position[1].tolist() == [list(map(float, one)) for one in expected]
    assert tokens.source.tolist() == [list(range(24))] * 2 and tokens.size.eq(1).all() and tokens.valid is None
    assert Tokens.from_grid(torch.randn(1, 12, 3), (3, 4)).position[0, 5].tolist() == [0, 1, 1]


def test_from_grid_and_shapes_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match="12 patches"):
        Tokens.from_grid(torch.randn(1, 11, 3), (3, 4))
    good = fresh()
    for name, bad in (
        ("x", good.x[0]), ("position", good.position[:, :-1]), ("size", good.size[:1]), ("source", good.source[0]),
        ("valid", torch.ones(2, 3, dtype=torch.bool)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(good, **{name: bad})


def test_tokens_are_immutable() -> None:
    tokens = ragged()
    before = {f.name: getattr(tokens, f.name).clone() for f in dataclasses.fields(tokens)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        tokens.x = tokens.x  # type: ignore[misc]
    tokens.keep(torch.tensor([[1, -1], [0, 2]]))
    tokens.merge(torch.zeros(2, 5, dtype=torch.long), groups=1)
    tokens.mix(torch.rand(2, 2, 5))
    tokens.pool(2)
    tokens.append(fresh())
    assert all(torch.equal(getattr(tokens, name), value) for name, value in before.items())


# -- keep


def test_keep_against_a_loop() -> None:
    original = fresh()
    index = torch.tensor([[7, 2, 11], [0, 5, -1]])
    kept = original.keep(index)
    check(kept)
    for b in range(2):
        for k, j in enumerate(index[b].tolist()):
            assert bool(kept.mask()[b, k]) == (j >= 0)
            if j >= 0:
                assert torch.equal(kept.x[b, k], original.x[b, j])
                assert torch.equal(kept.position[b, k], original.position[b, j])
                assert int(kept.source[b, j]) == k
        assert sorted((kept.source[b] >= 0).nonzero().flatten().tolist()) == sorted(
            j for j in index[b].tolist() if j >= 0
        )
    assert kept.count.tolist() == [3, 2]


def test_keep_of_ragged_tokens_and_of_nothing() -> None:
    tokens = ragged().keep(torch.tensor([[4, 0, 2], [1, 4, -1]]))
    check(tokens)
    assert tokens.mask().tolist() == [[True, True, True], [True, False, False]]
    assert tokens.source[0, 11] == 0 and tokens.source[1, 7] == 0
    nothing = fresh().keep(torch.zeros(2, 0, dtype=torch.long))
    assert nothing.x.shape == (2, 0, 5) and bool(nothing.source.eq(DROPPED).all()) and nothing.count.tolist() == [0, 0]


# -- merge


@pytest.mark.parametrize("weighted", [False, True])
def test_merge_against_a_loop(weighted: bool) -> None:
    tokens, original = ragged(), fresh()
    into = torch.tensor([[1, 0, 1, -1, 1], [0, 0, 0, 1, 1]])
    weight = torch.rand(2, 5) + 0.1 if weighted else None
    merged = tokens.merge(into, weight, groups=3)
    check(merged)
    for b in range(2):
        for group in range(3):
            members = [j for j in range(5) if int(into[b, j]) == group and bool(tokens.mask()[b, j])]
            assert bool(merged.mask()[b, group]) == bool(members)
            assert int(merged.size[b, group]) == len(members)
            if members:
                w = torch.ones(len(members)) if weight is None else weight[b, members]
                mean = sum(w[i] * tokens.x[b, j] for i, j in enumerate(members)) / w.sum()
                torch.testing.assert_close(merged.x[b, group], mean)
                torch.testing.assert_close(merged.position[b, group], slow_position(merged, original, b, group))


@pytest.mark.parametrize("weight", ["none", "size", "other"])
@pytest.mark.parametrize("groups", [3, 9, 10, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_merge_against_a_loop(dtype: torch.dtype, groups: int, weight: str) -> None:
    """Of tokens that stand for several patches already; where at most a quarter goes, a lone token is copied."""
    torch.manual_seed(groups)
    original = fresh(3, (3, 6), dtype=dtype)
    tokens = original.merge((torch.arange(18) % 12).expand(3, -1), groups=12)
    x = tokens.x.clone().requires_grad_()
    into = torch.cat([torch.arange(groups).expand(3, -1), torch.randint(groups, (3, 12 - groups))], 1)
    into = into.gather(1, torch.stack([torch.randperm(12) for _ in range(3)]))
    weights = {"none": None, "size": tokens.size, "other": torch.rand(3, 12) + 0.1}[weight]
    merged = tokens.with_x(x).merge(into, weights, groups, full=True)
    check(merged)
    assert merged.valid is None and merged.x.dtype == dtype
    rows = []
    for b in range(3):
        for group in range(groups):
            members = [j for j in range(12) if int(into[b, j]) == group]
            w = torch.ones(len(members)) if weights is None else weights[b, members]
            rows.append((w.unsqueeze(1) * x[b, members].float()).sum(0) / w.sum())
            assert int(merged.size[b, group]) == int(tokens.size[b, members].sum())
            torch.testing.assert_close(merged.position[b, group], slow_position(merged, original, b, group))
            if len(members) == 1 and groups >= 9:
                assert torch.equal(merged.x[b, group], x[b, members[0]])
    wanted = torch.stack(rows).view(3, groups, -1)
    torch.testing.assert_close(merged.x, wanted.to(dtype))
    if dtype == torch.bfloat16:
        return
    pull = torch.randn_like(wanted)
    (ours,) = torch.autograd.grad((merged.x.float() * pull).sum(), x)
    (theirs,) = torch.autograd.grad((wanted * pull).sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_merge_of_tokens_that_stand_for_no_patch() -> None:
    """`mix` makes such; a weight of 0 counts nothing, and nothing becomes NaN."""
    mixed = fresh(1, (2, 4)).mix(torch.eye(8)[None].index_select(1, torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])))
    assert mixed.size.tolist() == [[1, 0, 1, 1, 1, 1, 1, 1]] and mixed.valid is None
    for into in ([0, 1, 2, 3, 4, 5, 6, 6], [0, 1, 1, 2, 3, 4, 5, 6]):
        merged = mixed.merge(torch.tensor([into]), mixed.size, 7, full=True)
        assert merged.x.isfinite().all()
        apart = mixed.merge(torch.tensor([into]), groups=7)
        assert apart.valid is None, "a group with a member is one, whatever the member stands for"


def test_merging_twice_keeps_the_mean_position_over_patches() -> None:
    original = fresh(1, (1, 6))
    once = original.merge(torch.tensor([[0, 0, 0, 1, 2, 2]]))
    twice = once.merge(torch.tensor([[0, 0, 1]]))
    check(twice)
    assert twice.position[0, :, 2].tolist() == [1.5, 4.5] and twice.size.tolist() == [[4, 2]]
    # A plain mean of tokens, but ToMe's proportional one if asked.
    torch.testing.assert_close(twice.x[0, 0], (once.x[0, 0] + once.x[0, 1]) / 2)
    proportional = once.merge(torch.tensor([[0, 0, 1]]), weight=once.size)
    torch.testing.assert_close(proportional.x[0, 0], original.x[0, :4].mean(0))


def test_merge_in_bf16_sums_in_float32_and_keeps_the_dtype() -> None:
    tokens = fresh(1, (16, 16), dtype=torch.bfloat16)
    merged = tokens.merge(torch.zeros(1, 256, dtype=torch.long))
    assert merged.x.dtype == torch.bfloat16
    torch.testing.assert_close(merged.x[0, 0], tokens.x[0].double().mean(0).to(torch.bfloat16), rtol=0, atol=0)


def test_merge_in_float64_stays_exact() -> None:
    tokens = fresh(1, (4, 4), dtype=torch.float64)
    merged = tokens.merge(torch.zeros(1, 16, dtype=torch.long))
    torch.testing.assert_close(merged.x[0, 0], tokens.x[0].mean(0), rtol=1e-13, atol=1e-14)


# -- mix


def test_mix_against_a_loop() -> None:
    tokens = ragged()
    weights = torch.rand(2, 3, 5)
    weights[0, :, 3] = 0
    mixed = tokens.mix(weights)
    check(mixed)
    for b in range(2):
        members = [j for j in range(5) if bool(tokens.mask()[b, j])]
        for k in range(3):
            torch.testing.assert_close(mixed.x[b, k], sum(weights[b, k, j] * tokens.x[b, j] for j in members))
        for j in members:
            patches = (tokens.source[b] == j).nonzero().flatten()
            owner = max(range(3), key=lambda k: float(weights[b, k, j])) if weights[b, :, j].any() else DROPPED
            assert mixed.source[b, patches].eq(owner).all()
    assert mixed.valid is None


# -- pool


@pytest.mark.parametrize("factor", [1, 2, 1.5, (3.0, 1.0), (2.5, 1.25)])
def test_pool_against_a_loop(factor: float | tuple[float, float]) -> None:
    fy, fx = factor if isinstance(factor, tuple) else (factor, factor)
    tokens = Tokens.from_grid(torch.randn(2, 40, 3), (2, 4, 5))
    cells: dict[tuple[int, int, int], list[int]] = {}
    for m, (t, y, x) in enumerate(tokens.position[0].tolist()):
        cells.setdefault((int(t), int((y + 0.5) / fy), int((x + 0.5) / fx)), []).append(m)
    pooled = tokens.pool(factor)
    check(pooled)
    assert pooled.x.shape[1] == len(cells)
    for j, cell in enumerate(sorted(cells)):
        torch.testing.assert_close(pooled.x[:, j], tokens.x[:, cells[cell]].mean(1))
        assert pooled.source[0, cells[cell]].eq(j).all()


def test_pool_of_ragged_tokens_leaves_no_empty_cell() -> None:
    tokens = ragged()
    pooled = tokens.pool(2)
    check(pooled)
    for b in range(2):
        cells = {
            (int(y) // 2, int(x) // 2) for (_, y, x), ok in zip(tokens.position[b].tolist(), tokens.mask()[b]) if ok
        }
        assert int(pooled.count[b]) == len(cells)
    with pytest.raises(ValueError, match="at least 1"):
        tokens.pool(0.5)
    assert fresh().keep(torch.zeros(2, 0, dtype=torch.long)).pool(2).x.shape[1] == 0


# -- append


def test_append_against_a_loop() -> None:
    first, second = ragged(), fresh(2, (2, 2)).keep(torch.tensor([[3, 1], [0, 2]]))
    both = first.append(second)
    check(both)
    assert torch.equal(both.x, torch.cat([first.x, second.x], 1))
    for b in range(2):
        for m in range(4):
            old = int(second.source[b, m])
            assert int(both.source[b, 12 + m]) == (old + 5 if old >= 0 else DROPPED)
    assert both.mask().tolist() == [[True] * 7, [True] * 3 + [False] * 2 + [True] * 2]
    assert fresh().append(fresh()).valid is None


# -- compact and topk_in_order


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_compact_and_topk_in_order_against_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few different scores, so that there are ties; some of them -inf.
    score = torch.randint(0, 4, (3, 7), generator=generator).float()
    score[score == 0] = float("-inf")
    valid = torch.rand(3, 7, generator=generator) < 0.7
    k = torch.randint(0, 8, (3,), generator=generator)
    chosen, listed = topk_in_order(score, k, valid), compact(valid)
    for b in range(3):
        able = [j for j in range(7) if bool(valid[b, j])]
        assert [j for j in listed[b].tolist() if j >= 0] == able
        best = sorted(sorted(able, key=lambda j: (-float(score[b, j]), j))[: int(k[b])])
        assert chosen[b].tolist() == best + [-1] * (chosen.shape[1] - len(best))
    every = topk_in_order(score, 3)
    assert every.shape == (3, 3) and every.min() >= 0


# -- gradients


def test_gradients_pass_through_every_verb() -> None:
    x = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 2, 5, dtype=torch.float64, requires_grad=True)

    def chain(x: Tensor, weights: Tensor) -> Tensor:
        tokens = Tokens.from_grid(x, (3, 4)).keep(torch.arange(1, 11).expand(2, -1))
        tokens = tokens.merge(torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]] * 2))
        return tokens.append(tokens.mix(weights)).append(tokens.pool(2)).x

    assert torch.autograd.gradcheck(chain, (x, weights))


# -- the property


@given(st.integers(0, 2**32 - 1), st.lists(st.sampled_from(["keep", "merge", "mix", "pool", "append"]), max_size=6))
@settings(max_examples=120, deadline=None)
def test_sizes_and_dropped_patches_add_up_after_any_chain_of_verbs(seed: int, verbs: list[str]) -> None:
    generator = torch.Generator().manual_seed(seed)

    def number(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    tokens = fresh(2, (int(number(4)) + 1, int(number(4)) + 1))
    for verb in verbs:
        count = tokens.x.shape[1]
        if verb == "keep":
            tokens = tokens.keep(compact(torch.rand(2, count, generator=generator) < 0.8))
        elif verb == "merge" and count:
            tokens = tokens.merge(number(count + 1, 2, count) - 1, groups=count)
        elif verb == "mix" and count:
            tokens = tokens.mix(torch.rand(2, 3, count, generator=generator))
        elif verb == "pool":
            tokens = tokens.pool(1 + float(torch.rand((), generator=generator)) * 2)
        elif verb == "append":
            tokens = tokens.append(fresh(2, (1, 3)))
        if tokens.x.shape[1]:
            check(tokens)
        assert (tokens.size.sum(1) + (tokens.source == DROPPED).sum(1)).eq(tokens.source.shape[1]).all()
        assert tokens.x.isfinite().all() and tokens.position.isfinite().all()
