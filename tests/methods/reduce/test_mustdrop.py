"""MustDrop against its card: merging against slow loops, the filter and the cache against plain runs of the layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.method import Crops, InputError, Stage
from foveate.methods.reduce.mustdrop import MustDrop
from foveate.tokens import Tokens
from reference import attention, eager_vision, kept, prompt_embeddings, rotated, run_layers, top
from stub import HOST, StubSignals, numbered, numbers
from tiny import IMAGE, PAD, prompt, vlm

OFF: dict[str, Any] = {"similarity": 2.0}
"""No merging."""
SCALE = 24 * 24 / 16
"""What thresholds are multiplied by on the tiny hosts' 4 x 4 patches."""
SOME: dict[str, Any] = {**OFF, "layers": (0, 1, 2), "thr_g": 0.04 / SCALE, "thr_i": 0.1 / SCALE}
"""Filters after three of four layers, each of which drops some."""


# -- stage 1: merging


class Signals(StubSignals):
    pictures: tuple[Crops, ...] = ()
    _prompt: Tensor
    _slots: Tensor

    def crops(self) -> tuple[Crops, ...]:
        return self.pictures

    def prompt(self) -> Tensor:
        return self._prompt

    def slots(self) -> Tensor:
        return self._slots


def merged(
    x: Tensor, grid: tuple[int, int], pictures: list[tuple[int, int]] | None = None, packed: Tensor | None = None,
    **settings: Any,
) -> Tokens:  # fmt: skip
    """Stage 1 on crops x (B, M, C); `pictures` are crop grids, (0, 0) for one row, by default one row each."""
    tokens = Tokens.from_grid(x, grid)
    signals = Signals(grid, {})
    used = torch.ones(x.shape[:2], dtype=torch.bool) if packed is None else packed
    start = 0
    for one in pictures or [(0, 0)] * len(x):
        rows = slice(start, start + 1 + one[0] * one[1])
        signals.pictures, start = (*signals.pictures, Crops(rows, one, used[rows])), rows.stop
    at = Stage("vision.layer", 1, replace(HOST, grid=grid), signals, tokens.count, torch.ones(len(x), dtype=torch.bool))
    return MustDrop(**settings).merge_windows(tokens, at)


def window_members(grid: tuple[int, int], side: int = 3) -> list[list[int]]:
    rows, columns = grid
    return [
        [(top + y) * columns + left + x for y in range(side) for x in range(side)]
        for top in range(0, rows - side + 1, side) for left in range(0, columns - side + 1, side)
    ]  # fmt: skip


def window_score(x: Tensor, members: list[int]) -> float:
    """Mean cosine over all ordered pairs of different tokens."""
    pairs = [(a, b) for a in members for b in members if a != b]
    return sum(float(torch.cosine_similarity(x[a].double(), x[b].double(), dim=0)) for a, b in pairs) / len(pairs)


def groups(tokens: Tokens, b: int = 0) -> list[list[int]]:
    """The patches of each token."""
    return [(tokens.source[b] == j).nonzero().flatten().tolist() for j in range(int(tokens.count[b]))]


def merge_plainly(x: Tensor, grid: tuple[int, int], count: int) -> list[list[int]]:
    """The patches of each token when the `count` best windows of x (M, C) are merged, merged ones first."""
    windows = window_members(grid)
    best = sorted(windows, key=lambda members: -window_score(x, members))[:count]
    gone = {j for members in best for j in members}
    return [*best, *([j] for j in range(len(x)) if j not in gone)]


def smooth(batch: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """(B, M, 6): windows of which some are alike and some are not."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, grid[0] * grid[1], 6, generator=generator)
    for members in window_members(grid):
        shared = torch.randn(batch, 1, 6, generator=generator) * 4 * torch.rand(batch, 1, 1, generator=generator)
        x[:, members] += shared
    return x


@pytest.mark.parametrize("grid", [(6, 6), (9, 6), (4, 4), (7, 8), (2, 5)])
@pytest.mark.parametrize("similarity", [0.0, 0.4, 0.7, 1.0])
def test_merging_equals_the_slow_loop(grid: tuple[int, int], similarity: float) -> None:
    """Signed cosines, >=, the plain mean; merged tokens first, by their scores, then the rest in raster order."""
    x = smooth(3, grid)
    tokens = merged(x, grid, similarity=similarity)
    for b in range(3):
        count = sum(window_score(x[b], members) >= similarity for members in window_members(grid))
        wanted = merge_plainly(x[b], grid, count)
        assert groups(tokens, b) == wanted
        assert tokens.count[b] == len(x[b]) - 8 * count
        means = torch.stack([x[b, members].mean(0) for members in wanted])
        torch.testing.assert_close(tokens.x[b, : len(wanted)], means, rtol=1e-4, atol=1e-5)


def test_similarity_is_signed() -> None:
    """Two opposite halves of a window have cosines of 1 and -1; clamped or absolute, the window would be merged."""
    x = torch.ones(1, 9, 4)
    x[:, 4:] *= -1
    signed = (4 * 3 + 5 * 4 - 2 * 4 * 5) / 72
    assert signed < 0 and merged(x, (3, 3), similarity=0.2).x.shape[1] == 9
    assert window_score(x[0], list(range(9))) == pytest.approx(signed)


@pytest.mark.parametrize("scale", [1.0, 0.01, 300.0])
def test_identical_tokens_give_64_of_the_same(scale: float) -> None:
    x = scale * torch.randn(1, 1, 32).expand(2, 576, 32)
    tokens = merged(x, (24, 24))
    assert tokens.x.shape[1] == 64 and tokens.size.eq(9).all()
    torch.testing.assert_close(tokens.x, x[:, :64])


@pytest.mark.parametrize("windows", [0, 1, 17, 64])
def test_each_window_saves_8_tokens(windows: int) -> None:
    """N0 = 576 - 8 r. Alike in exactly `windows` windows, everything else noise of zero mean."""
    torch.manual_seed(0)
    x = torch.randn(1, 576, 64)
    for members in window_members((24, 24))[:windows]:
        x[:, members] = x[:, members[:1]] + 0.1 * x[:, members]
    assert merged(x, (24, 24)).x.shape[1] == 576 - 8 * windows


def test_scores_do_not_depend_on_the_order_in_a_window_nor_on_lengths() -> None:
    x = smooth(1, (6, 6))
    before = groups(merged(x, (6, 6), merge=0.5))
    shuffled, stretched = x.clone(), x * torch.rand(1, 36, 1).add(0.1)
    for number, members in enumerate(window_members((6, 6))):
        order = torch.randperm(9, generator=torch.Generator().manual_seed(number)).tolist()
        shuffled[:, members] = x[:, [members[k] for k in order]]
    for other in (shuffled, stretched):
        assert groups(merged(other, (6, 6), merge=0.5)) == before
        # The threshold falls between the same two scores.
        for members in window_members((6, 6)):
            assert window_score(other[0], members) == pytest.approx(window_score(x[0], members), abs=1e-6)


def test_the_least_count_is_that_of_a_picture_or_of_the_batch() -> None:
    x = smooth(8, (9, 9), seed=3)
    counts = [sum(window_score(one, members) >= 0.5 for members in window_members((9, 9))) for one in x]
    assert len(set(counts)) > 2
    pictures = [(2, 1), (0, 0), (1, 3)]
    rows = [slice(0, 3), slice(3, 4), slice(4, 8)]
    tokens = merged(x, (9, 9), pictures, similarity=0.5)
    for here in rows:
        assert tokens.count[here].tolist() == [81 - 8 * min(counts[here])] * (here.stop - here.start)
    tokens = merged(x, (9, 9), pictures, similarity=0.5, minimum_over="batch")
    assert tokens.count.tolist() == [81 - 8 * min(counts)] * 8
    # Which windows: each crop's own best.
    for b in range(3):
        assert sorted(groups(tokens, b)) == sorted(merge_plainly(x[b], (9, 9), min(counts)))


@pytest.mark.parametrize("order", ["spatial", "released"])
def test_merged_tokens_of_crops_stand_where_their_first_used_patch_is(order: str) -> None:
    x = smooth(3, (6, 6))
    packed = torch.ones(3, 36, dtype=torch.bool)
    packed[1, :12] = packed[2, 30:] = False
    tokens = merged(x, (6, 6), [(2, 1)], packed, merge=0.5, order=order)
    for b in range(3):
        place = [min(members, key=lambda j: (not packed[b, j], j)) for members in groups(tokens, b)]
        assert place == sorted(place)
        assert sorted(map(len, groups(tokens, b)))[-2:] == [9, 9]


@pytest.mark.parametrize("order", ["spatial", "released"])
def test_order_of_a_picture_of_one_crop(order: str) -> None:
    x = smooth(4, (6, 6))
    tokens = merged(x, (6, 6), merge=0.5, order=order)
    differ = 0
    for b in range(4):
        released = merge_plainly(x[b], (6, 6), 2)
        spatial = sorted(released)
        assert groups(tokens, b) == (spatial if order == "spatial" else released)
        differ += spatial != released
    assert differ


def test_other_grids_and_other_methods_tokens_are_refused() -> None:
    tokens = numbered(1).keep(torch.tensor([[0, 1, 2]]))
    at = Stage("vision.layer", 1, HOST, Signals((4, 4), {}), tokens.count, torch.ones(1, dtype=torch.bool))
    with pytest.raises(InputError, match="whole grids"):
        MustDrop().merge_windows(tokens, at)
    with pytest.raises(InputError, match="features of layer 0"):
        foveate.apply(vlm(vision_feature_layer=1), MustDrop())


@torch.no_grad()
def test_features_and_key_set_are_those_of_a_plain_encoder() -> None:
    """Layer 0, merging by the loop, layers 1 to 3 on fewer tokens; the fifth layer's class token picks the key set."""
    host = vlm(image=24)
    given = prompt(host, [(2, 5)])
    pixels, tower = given["pixel_values"], host.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    layers = tower.encoder.layers
    hidden = layers[0](hidden, None)
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    patches = merge_plainly(hidden[0, 1:], (6, 6), 2)
    new = torch.stack([hidden[0, [1 + j for j in members]].mean(0) for members in patches])
    hidden = torch.cat([hidden[:, :1], new[None]], 1)
    for layer in layers[1:4]:
        out = layer(hidden, None)
        hidden = out[0] if isinstance(out, tuple) else out
    normed, module = layers[4].layer_norm1(hidden), layers[4].self_attn
    query, key = (
        project(normed)[0].unflatten(-1, (4, 8)).transpose(0, 1) for project in (module.q_proj, module.k_proj)
    )
    row = (query[:, :1] @ key.transpose(-1, -2) / 8**0.5).softmax(-1)[:, 0, 1:].mean(0)
    # ceil(0.41 * 20) = 9 tokens, some of them merged.
    wanted = [sorted(patches[j]) for j in top(row, 9)]

    method = MustDrop(merge=0.5, key=0.41, thr_g=1.0, thr_i=1.0, layers=(0,))
    entered: list[Tensor] = []
    with foveate.apply(host, method) as applied:
        handle = host.model.multi_modal_projector.register_forward_pre_hook(lambda m, a: entered.append(a[0]))
        host(**given)
        handle.remove()
        last = next(record.source[0] for record in applied.trace if record.stage == "llm.layer[1]")
    torch.testing.assert_close(entered[0][:, :20], hidden[:, 1:], rtol=1e-4, atol=1e-5)
    # Thresholds of 1 leave exactly the key set.
    found = [(last == j).nonzero().flatten().tolist() for j in range(int(last.max()) + 1)]
    assert found == wanted and any(len(members) == 9 for members in found)


# -- the key set


@pytest.mark.parametrize("name", ["clip-llama", "siglip-qwen2", "next"])
@pytest.mark.parametrize("key", [0.08, 0.25])
@torch.no_grad()
def test_thresholds_of_1_leave_exactly_the_key_set(name: str, key: float) -> None:
    """Of each crop the ceil(key * 16) patches with most class-token attention in the last layer, after every filter."""
    host = vlm(name)
    sizes = [(24, 24), (24, 24), (24, 24)] if name == "next" else None
    given = prompt(host, [(2, 6), (1, 2, 3)], sizes=sizes)
    pixels = given["pixel_values"].flatten(0, -4)
    maps = eager_vision(host, pixels).attentions[4]
    score = maps.sum((1, 2)) if name.startswith("siglip") else maps[:, :, 0, 1:].mean(1)
    wanted = [[16 * p + j for j in top(one, math.ceil(16 * key))] for p, one in enumerate(score)]
    crops = 5 if name == "next" else 1
    with foveate.apply(host, MustDrop(**OFF, key=key, thr_g=1.0, thr_i=1.0)) as applied:
        host(**given)
        stages = [record.source for record in applied.trace if record.stage.startswith("llm.layer")]
    assert len(stages) == 2
    for source in stages:
        ours = kept(source)
        assert ours[0] == [j for one in wanted[:crops] for j in one]
        assert ours[1] == [j - 16 * crops for one in wanted[crops:] for j in one]


@pytest.mark.parametrize(
    ("count", "key", "size"),
    [(576, 0.08, 47), (64, 0.08, 6), (200, 0.08, 16), (50, 0.29, 15), (100, 0.29, 29), (9, 0, 0)],
)
def test_size_of_the_key_set(count: int, key: float, size: int) -> None:
    assert math.ceil(Fraction(str(key)) * count) == size
    assert int(MustDrop(key=key).key_count(torch.tensor(count))) == size


# -- stage 2: the filter


@dataclass
class Rows:
    """Attention with made-up rows: (B, H, S, S)."""

    given: Tensor
    visual: Tensor

    @property
    def length(self) -> int:
        return self.given.shape[-1]

    def rows(self, index: Tensor) -> Tensor:
        return torch.stack([one[:, where] for one, where in zip(self.given, index)])


def filtered(
    matrix: Tensor, pictures: list[int], text: list[int], key: list[int], settings: dict[str, Any]
) -> list[int]:
    """Which of the visual tokens at `pictures` stay; matrix (H, S, S), `text` are all text tokens of the prompt."""
    tokens = numbered(1, (1, len(pictures)))
    length = matrix.shape[-1]
    signals = Signals((24, 24), {"attention": {2: Rows(matrix[None], torch.tensor([pictures]))}})
    signals._prompt = torch.tensor([[place in pictures or place in text for place in range(length)]])
    signals._slots = torch.tensor([pictures])
    mark = torch.tensor([[float(j in key) for j in range(len(pictures))]])
    at = Stage(
        "llm.layer", 3, replace(HOST, grid=(24, 24)), signals, tokens.count, torch.ones(1, dtype=torch.bool),
        {"mustdrop.key": mark},
    )  # fmt: skip
    return numbers(MustDrop(layers=(2,), **settings).filter(tokens, at))[0]


def dual_scores(matrix: Tensor, pictures: list[int], rows: list[int]) -> tuple[list[float], list[float]]:
    """g and m of each picture token, summed up and searched over the rows of the heads' mean."""
    paid = [[float(matrix[:, i, j].mean()) for i in rows] for j in pictures]
    return [sum(one) for one in paid], [max(one) for one in paid]


@pytest.mark.parametrize(("thr_g", "thr_i"), [(0.02, 0.05), (0.05, 0.02), (0.04, 0.1), (1.0, 0.03), (0.03, 1.0)])
def test_the_filter_equals_the_loop(thr_g: float, thr_i: float) -> None:
    """Both conditions, strict, by the text behind the last picture, over the mean of the heads; the key set stays."""
    differ = 0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        matrix = (4 * torch.randn(3, 60, 60, generator=generator)).softmax(-1)
        pictures = [*range(5, 25), *range(28, 45)]
        text = [*range(5), 25, 26, 27, *range(45, 58)]  # 58 and 59 are generated already
        g, m = dual_scores(matrix, pictures, list(range(45, 58)))
        key = [3, 20]
        wanted = [
            j for j in range(37) if j in key or not (g[j] < thr_g * sum(g) and m[j] < thr_i)
        ]  # fmt: skip
        ours = filtered(matrix, pictures, text, key, {"thr_g": thr_g, "thr_i": thr_i})
        assert ours == wanted
        differ += wanted not in ([j for j in range(37) if j in key or g[j] >= thr_g * sum(g)], list(range(37)))
    assert differ or 1.0 in (thr_g, thr_i)


def test_one_attentive_text_token_is_enough_to_stay() -> None:
    """Token 0: a tiny sum with all of it from one row. Token 1: the same sum, spread. Token 2 has the rest."""
    matrix = torch.zeros(1, 103, 103)
    matrix[0, 3:, 0], matrix[0, 3:, 1], matrix[0, 3:, 2] = 0.0, 0.0005, 0.4
    matrix[0, 50, 0] = 0.05
    g, _ = dual_scores(matrix, [0, 1, 2], list(range(3, 103)))
    assert g[0] == pytest.approx(g[1]) and g[0] < 0.01 * sum(g)
    settings = {"thr_g": 0.01, "thr_i": 0.05, "key": 0.0}
    assert filtered(matrix, [0, 1, 2], list(range(3, 103)), [], settings) == [0, 2]
    assert filtered(matrix, [0, 1, 2], list(range(3, 103)), [], settings | {"thr_i": 0.051}) == [2]
    # And one with a big sum of many small ones.
    assert filtered(matrix, [0, 1, 2], list(range(3, 103)), [], settings | {"thr_g": 0.001}) == [0, 1, 2]
    assert filtered(matrix, [0, 1, 2], list(range(3, 103)), [1], settings | {"key": 0.1}) == [0, 1, 2]


def test_without_text_behind_the_picture_nothing_is_dropped() -> None:
    matrix = torch.rand(2, 12, 12)
    assert filtered(matrix, list(range(4, 12)), [0, 1, 2, 3], [], {"thr_g": 1.0, "thr_i": 1.0}) == list(range(8))


@pytest.mark.parametrize("count", [3, 7, 15])
def test_keep_is_the_paper_rule_with_both_thresholds_grown_in_proportion(count: int) -> None:
    """A search for the factor at which the thresholds leave as many finds the same tokens."""
    for seed in range(5):
        matrix = (3 * torch.randn(2, 40, 40, generator=torch.Generator().manual_seed(seed))).softmax(-1)
        pictures, text, key = list(range(2, 22)), list(range(22, 40)), [1, 19]
        g, m = dual_scores(matrix, pictures, text)

        def left(factor: float) -> list[int]:
            return [
                j for j in range(20)
                if j in key or not (g[j] < factor * 0.02 * sum(g) and m[j] < factor * 0.3)  # noqa: B023
            ]  # fmt: skip

        low, high = 0.0, 1e3
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if len(left(middle)) >= count else (low, middle)
        assert len(left(low)) == count
        settings = {"thr_g": 0.02, "thr_i": 0.3, "keep": count / 20}
        assert filtered(matrix, pictures, text, key, settings) == left(low)
    # Fewer than the key set: the best of it.
    best = max(key, key=lambda j: max(g[j] / (0.02 * sum(g)), m[j] / 0.3))
    assert filtered(matrix, pictures, text, key, settings | {"keep": 0.05}) == [best]


@pytest.mark.parametrize("name", ["clip-llama", "siglip-qwen2", "next"])
@torch.no_grad()
def test_settings_that_drop_nothing_are_the_vanilla_model(name: str) -> None:
    host = vlm(name)
    given = prompt(host, [(2, 6), (1, 2, 3)])
    real = given["attention_mask"].bool()
    dense = host(**given).logits[real]
    everywhere = {"vision.layer", "llm.input", "llm.layer", "llm.decode"}
    for settings, acting in (
        ({**OFF, "thr_g": 1.0, "thr_i": 0.0}, {"llm.input"}),
        # Acts at every stage, merges nothing and drops nothing.
        ({"similarity": 1.0, "thr_i": 1e-12}, everywhere),
    ):
        with foveate.apply(host, MustDrop(**settings)) as applied:
            torch.testing.assert_close(host(**given).logits[real], dense, rtol=1e-5, atol=1e-5)
        assert {record.stage.partition("[")[0] for record in applied.trace} == acting


# -- whole runs


def visual_places(given: dict[str, Tensor]) -> list[int]:
    return (given["input_ids"][0] == IMAGE).nonzero().flatten().tolist()


@dataclass
class Plain:
    """The language model layer by layer, by the card's rule, for one sample.

    Attributes:
        logits: (n, V) of the rows that are left.
        index: for each layer, the places of the prompt that it ran on.
        positions: for each layer, their position ids.
        entered: for each layer, its input (1, n, D).
    """

    logits: Tensor
    index: list[list[int]]
    positions: list[Tensor]
    entered: list[Tensor]


def run_plainly(host: Any, given: dict[str, Tensor], settings: dict[str, Any], renumber: bool = True) -> Plain:
    picture = visual_places(given)
    asking = [place for place in range(given["input_ids"].shape[1]) if place > picture[-1]]
    score = eager_vision(host, given["pixel_values"]).attentions[4][:, :, 0, 1:].mean(1)
    key = [picture[16 * p + j] for p, one in enumerate(score) for j in top(one, 2)]
    last: dict[str, Any] = {}
    seen: list[list[int]] = []
    where: list[Tensor] = []

    def decide(layer: int, hidden: Tensor, index: list[int], positions: Tensor) -> list[int] | None:
        stay = None
        if layer - 1 in settings["layers"]:
            matrix = attention(host, layer - 1, last["hidden"], last["positions"]).mean(0)
            rows = [last["index"].index(place) for place in asking]
            columns = [place for place in last["index"] if place in picture]
            paid = matrix[rows][:, [last["index"].index(place) for place in columns]]
            g, m = paid.sum(0), paid.amax(0)
            goes = [
                place for k, place in enumerate(columns)
                if g[k] < settings["thr_g"] * SCALE * g.sum() and m[k] < settings["thr_i"] * SCALE and place not in key
            ]  # fmt: skip
            stay = [place for place in index if place not in goes]
            rows = [index.index(place) for place in stay]
            hidden, index = hidden[:, rows], stay
            positions = torch.arange(len(stay))[None] if renumber else positions[:, rows]
        last.update(hidden=hidden, index=index, positions=positions)
        seen.append(index)
        where.append(positions)
        return stay

    logits, _, entered = run_layers(host, prompt_embeddings(host, given), decide, renumber=renumber)
    return Plain(logits, seen, where, entered)


@pytest.mark.parametrize("positions", ["released", "original"])
@pytest.mark.parametrize("name", ["clip-llama", "clip-qwen2"])
@torch.no_grad()
def test_the_whole_run_equals_the_plain_one(name: str, positions: str) -> None:
    """That layer's attention, effect from the next one on, order and text untouched, positions: all at once."""
    host = vlm(name)
    given = prompt(host, [(3, 2, 6)])  # two pictures; the text between them asks nothing
    plain = run_plainly(host, given, SOME, renumber=positions == "released")
    counts = [len(one) for one in plain.index]
    assert all(later <= earlier for earlier, later in pairwise(counts)) and 11 + 4 < counts[-1] < counts[1] < 11 + 32
    seen: list[Tensor] = []
    with foveate.apply(host, MustDrop(**SOME, positions=positions)) as applied:
        handles = [
            layer.register_forward_pre_hook(lambda m, a, k: seen.append(k["position_ids"]), with_kwargs=True)
            for layer in host.model.language_model.layers
        ]
        result = host(**given).logits[0]
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(result[plain.index[-1]], plain.logits, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, plain.positions))
    stages = [kept(record.source)[0] for record in applied.trace if record.stage.startswith("llm.layer")]
    places = visual_places(given)
    for layer, patches in enumerate(stages, 1):
        assert [places[patch] for patch in patches] == [place for place in plain.index[layer] if place in places]


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_a_batch_of_different_lengths_equals_plain_runs(padding: str) -> None:
    host = vlm()
    given = prompt(host, [(2, 9), (1, 4), (3, 6)], padding=padding)
    with foveate.apply(host, MustDrop(**SOME)) as applied:
        together = host(**given).logits
        stages = [record.source for record in applied.trace if record.stage.startswith("llm.layer")]
    for b in range(3):
        real = given["attention_mask"][b].bool()
        alone = {"input_ids": given["input_ids"][b : b + 1, real], "pixel_values": given["pixel_values"][b : b + 1]}
        plain = run_plainly(host, alone, SOME)
        places = visual_places(alone)
        for layer, source in enumerate(stages, 1):
            assert [places[patch] for patch in kept(source)[b]] == [p for p in plain.index[layer] if p in places]
        torch.testing.assert_close(together[b, real][plain.index[-1]], plain.logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_samples_without_a_picture_are_left_alone() -> None:
    host = vlm()
    given = prompt(host, [(2, 5), (9,), (3, 4)])
    real = given["attention_mask"][1].bool()
    dense = host(**given).logits[1, real]
    text_only = prompt(host, [(6,)])
    plain = host(**text_only).logits
    with foveate.apply(host, MustDrop(**SOME)):
        torch.testing.assert_close(host(**given).logits[1, real], dense, rtol=1e-4, atol=1e-4)
        assert torch.equal(host(**text_only).logits, plain)


# -- stage 3: the cache


def decode_plainly(
    host: Any, plain: Plain, words: list[int], first: int, picture: list[int], renumber: bool
) -> tuple[Tensor, list[Tensor]]:
    """Logits (K, V) of words fed one by one after the prefill, and the keys (1, G, n, D) that they find in each layer.

    From layer `first` on, keys and values are those of the last layer's visual tokens; keys stay as they were rotated.
    A query's position is its layer's own cache length, or that in the prompt.
    """
    language = host.model.language_model
    final = set(plain.index[-1])
    caches = []
    for layer, block in enumerate(language.layers):
        module, normed = block.self_attn, block.input_layernorm(plain.entered[layer])
        cos, sin = language.rotary_emb(normed, position_ids=plain.positions[layer])
        key, value = (
            project(normed).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
            for project in (module.k_proj, module.v_proj)
        )
        key = rotated(key, cos, sin)
        rows = [
            row for row, place in enumerate(plain.index[layer])
            if layer < first or place not in picture or place in final
        ]  # fmt: skip
        caches.append((key[:, :, rows], value[:, :, rows]))
    held = [key.clone() for key, _ in caches]
    starts = [key.shape[2] if renumber else len(plain.index[0]) for key, _ in caches]
    steps = []
    for number, word in enumerate(words):
        hidden = host.get_input_embeddings()(torch.tensor([[word]]))
        for layer, block in enumerate(language.layers):
            module, normed = block.self_attn, block.input_layernorm(hidden)
            place = torch.tensor([[starts[layer] + number]])
            cos, sin = language.rotary_emb(hidden, position_ids=place)
            query, key, value = (
                project(normed).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
                for project in (module.q_proj, module.k_proj, module.v_proj)
            )
            key = torch.cat([caches[layer][0], rotated(key, cos, sin)], 2)
            value = torch.cat([caches[layer][1], value], 2)
            caches[layer] = key, value
            query = rotated(query, cos, sin)
            repeat = query.shape[1] // key.shape[1]
            logits = query @ key.repeat_interleave(repeat, 1).transpose(-1, -2) / module.head_dim**0.5
            mixed = logits.softmax(-1) @ value.repeat_interleave(repeat, 1)
            hidden = hidden + module.o_proj(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        steps.append(host.lm_head(language.norm(hidden))[0, -1])
    return torch.stack(steps), held


@pytest.mark.parametrize("positions", ["released", "original"])
@pytest.mark.parametrize("layers", [(0, 1), (1,), (1, 2)])
@pytest.mark.parametrize("name", ["clip-llama", "clip-qwen2"])
@torch.no_grad()
def test_decoding_on_the_final_cache(name: str, layers: tuple[int, ...], positions: str) -> None:
    """Lengths, the gathered rows themselves, and the next words: keys as they were rotated, queries where they are."""
    host = vlm(name)
    given = prompt(host, [(3, 6)])
    settings = {**SOME, "layers": layers}
    plain = run_plainly(host, given, settings, renumber=positions == "released")
    words = [7, 20, 33]
    wanted, keys = decode_plainly(host, plain, words, layers[0], visual_places(given), positions == "released")
    mask, steps = given["attention_mask"], []
    with foveate.apply(host, MustDrop(**settings, positions=positions)) as applied:
        cache = host(**given, use_cache=True).past_key_values
        held = [layer.keys.clone() for layer in cache.layers]
        for word in words:
            mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
            step = host(input_ids=torch.tensor([[word]]), attention_mask=mask, past_key_values=cache)
            steps.append(step.logits[0, -1])
    # Layers before the first filter's hold all 16, all others what the last filter left.
    left = len(plain.index[-1])
    assert left < 25 and [one.shape[2] for one in held] == [25 if layer < layers[0] else left for layer in range(4)]
    pruned = [record.stage for record in applied.trace if record.stage.startswith("llm.decode")]
    assert pruned == [f"llm.decode[{layer}]" for layer in range(layers[0], layers[-1] + 1)]
    for ours, theirs in zip(held, keys):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(steps), wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_full_cache_is_each_layers_own_and_generates_as_without() -> None:
    host = vlm()
    given = prompt(host, [(2, 6), (1, 4)])
    with foveate.apply(host, MustDrop(**SOME, cache="full")) as applied:
        cache = host(**given, use_cache=True).past_key_values
        # The longer sample sets the width.
        counts = [record.tokens_out for record in applied.trace]
        lengths = [max(8 + one[0], 5 + one[1]) for one in counts]
        assert [layer.keys.shape[2] for layer in cache.layers] == lengths
        texts = [host.generate(**given, max_new_tokens=5, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*texts)


@torch.no_grad()
def test_a_batch_decodes_on_the_final_cache_as_each_sample_alone() -> None:
    host = vlm()
    given = prompt(host, [(2, 9), (1, 4)])
    with foveate.apply(host, MustDrop(**SOME)):
        together = host.generate(**given, max_new_tokens=5, do_sample=False)[:, given["input_ids"].shape[1] :]
        for b in range(2):
            real = given["attention_mask"][b].bool()
            alone = {"input_ids": given["input_ids"][b : b + 1, real], "pixel_values": given["pixel_values"][b : b + 1]}
            ours = host.generate(**alone, max_new_tokens=5, do_sample=False)[0, int(real.sum()) :]
            assert together[b].tolist() == ours.tolist() and PAD not in ours


# -- numbers instead of thresholds, and counting


@pytest.mark.parametrize(("name", "image", "window", "left"), [("clip-llama", 28, 3, 33), ("next", 16, 2, 10)])
@torch.no_grad()
def test_merge_and_keep_set_the_numbers(name: str, image: int, window: int, left: int) -> None:
    """Two of four windows are merged: 49 - 16 tokens a crop, or 16 - 6; then 0.6, 0.36, 0.216 of what entered stay."""
    host = vlm(name, image=image)
    given = prompt(host, [(2, 6)], sizes=[(24, 24)] if name == "next" else None)
    with foveate.apply(host, MustDrop(window=window, merge=0.5, keep=0.6, layers=(0, 1, 2))) as applied:
        host(**given)
    counts = {record.stage: record.tokens_out for record in applied.trace}
    entered = counts["llm.input"][0]
    crops = 5 if name == "next" else 1
    assert counts["vision.layer[1]"] == (left,) * crops
    # On a LLaVA-NeXT a newline stays with its whole row only: of eight rows, those without a merged window.
    assert left * crops <= entered <= left * crops + (8 if name == "next" else 0)
    wanted = [int(entered * Fraction(share)) for share in ("0.6", "0.36", "0.216")]
    assert [counts[f"llm.layer[{layer}]"][0] for layer in (1, 2, 3)] == wanted
    assert [counts[f"llm.decode[{layer}]"][0] for layer in (0, 1, 2)] == [wanted[-1]] * 3


def test_filters_scale_with_the_depth() -> None:
    assert MustDrop().filters(32) == [2, 6, 10, 14]
    assert MustDrop(layers=(2, 6, 20)).filters(32) == [2, 6, 20]
    for layers in (2, 3, 4, 8, 28, 40, 80):
        found = MustDrop().filters(layers)
        assert found == sorted(set(found)) and found[0] >= 0 and found[-1] < max(1, layers / 2)
    for layers, depth in (((3,), 4), ((14,), 12)):
        with pytest.raises(InputError, match="layers"):
            MustDrop(layers=layers).filters(depth)
    with pytest.raises(InputError, match="layers"):
        foveate.apply(vlm(), MustDrop(layers=(3,)))


def test_budgets_are_met_on_paper() -> None:
    """Windows times 8 and shares of the layers, counted again."""
    host = replace(HOST, stages=("vision.layer",), grid=(24, 24))
    for budget in (0.03, 0.05, 0.1, 0.25, 0.5, 0.9, 1.0):
        made = MustDrop.for_budget(budget, host)
        assert isinstance(made, MustDrop) and made.merge is not None and made.keep is not None
        now, spent = 576 - 8 * round(made.merge * 64), 0.0
        for layer in range(32):
            passed = sum(before < layer for before in (2, 6, 10, 14))
            spent += now * made.keep**passed
        assert spent / 32 == pytest.approx(576 * budget, abs=0.1)
    with pytest.raises(InputError, match=r"as little as 0\.01"):
        MustDrop.for_budget(0.01, host)
    # Without the stage that merging needs, or where merging in the encoder saves nothing behind it: filters alone.
    for other in (replace(host, stages=()), replace(host, joined=4)):
        assert MustDrop.for_budget(0.3, other).merge == 0  # type: ignore[attr-defined]


def test_the_true_schedule() -> None:
    """Layers 0-2 run on N0, 3-6 on n1, 7-10 on n2, 11-14 on n3, 15-31 on n4; cached: 0-1 N0, the others n4."""
    left = (309, 168, 120, 90, 64)
    assert MustDrop().schedule(left, 32) == [309] * 3 + [168] * 4 + [120] * 4 + [90] * 4 + [64] * 17
    assert MustDrop().cached(left, 32) == [309] * 2 + [64] * 30
