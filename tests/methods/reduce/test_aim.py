"""AIM against its card: merging against slow loops, pruning against a dense PageRank and masked runs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.method import HostShape, InputError
from foveate.methods.reduce.aim import Aim, importance
from foveate.nn.attention import Attention
from foveate.nn.matching import partners
from foveate.tokens import Tokens
from reference import attention, kept, prompt_embeddings, run_layers, top
from stub import numbered, stage
from tiny import IMAGE, prompt, vlm

PRUNE: dict[str, Any] = {"keep": 1.0, "first_layer": 0, "step": 0.3}
"""On a model of 4 layers: 0.7, 0.4 and 0.1 of the visual tokens are left after layers 0, 1 and 2."""
RATIOS = (0.7, 0.4, 0.1)


# -- merging


def merge_step(metric: Tensor, surplus: int, spatial: bool) -> list[list[int]]:
    """One step for one sample (N, D), by loops: the members of each new token, in the order of the new tokens."""
    count = len(metric)
    unit = [one / one.norm() for one in metric.double()]
    first, second = range(0, count, 2), range(1, count, 2)
    best = {a: max(second, key=lambda b: (float(unit[a] @ unit[b]), -b)) for a in first}
    order = sorted(first, key=lambda a: (-float(unit[a] @ unit[best[a]]), a))
    merged = order[: min(surplus, count // 2)]
    alone = [[a] for a in order if a not in merged]
    groups = [[b, *sorted(a for a in merged if best[a] == b)] for b in second]
    # Led by the token of B, or by the lone one of A.
    return sorted([*alone, *groups], key=lambda one: one[0]) if spatial else [*alone, *groups]


def merge_all(x: Tensor, metric: Tensor, target: int, spatial: bool = False) -> tuple[Tensor, list[list[int]]]:
    """Steps until `target` tokens are left: features, and the patches of each token."""
    patches = [[j] for j in range(len(x))]
    while len(x) > target:
        groups = merge_step(metric, len(x) - target, spatial)
        x, metric = (torch.stack([one[group].mean(0) for group in groups]) for one in (x, metric))
        patches = [[m for j in group for m in patches[j]] for group in groups]
    return x, patches


def merged(x: Tensor, metric: Tensor, keep: float, order: str = "released") -> Tokens:
    tokens = Tokens.from_grid(x, (1, x.shape[1]))
    return Aim(keep=keep, order=order).merge_by_keys(tokens, stage(tokens, (1, x.shape[1]), keys={23: metric}))


@pytest.mark.parametrize("order", ["released", "spatial"])
@pytest.mark.parametrize(("count", "keep"), [(16, 0.5), (16, 0.7), (15, 0.5), (15, 0.9), (9, 0.2), (16, 0.1), (1, 0.5)])
def test_merging_equals_the_slow_loop(count: int, keep: float, order: str) -> None:
    """Both orders, r below and at N / 2, odd N, several steps with the metric merged along."""
    x, metric = torch.randn(2, count, 5), torch.randn(2, count, 3)
    tokens = merged(x, metric, keep, order)
    for b in range(2):
        features, patches = merge_all(x[b], metric[b], max(1, int(keep * count + 1e-9)), order == "spatial")
        torch.testing.assert_close(tokens.x[b], features, rtol=1e-4, atol=1e-5)
        for j, members in enumerate(patches):
            assert (tokens.source[b] == j).nonzero().flatten().tolist() == sorted(members)


@pytest.mark.parametrize(("count", "surplus", "left"), [(8, 3, 5), (8, 4, 4), (8, 99, 4), (9, 4, 5), (9, 99, 5)])
@pytest.mark.parametrize("order", ["similarity", "place"])
def test_a_step_keeps_n_minus_r_tokens_and_clips_r_to_half(count: int, surplus: int, left: int, order: str) -> None:
    into = partners(torch.randn(3, count, 4), surplus, order)
    for row in into.tolist():
        assert sorted(set(row)) == list(range(left))


def test_no_step_is_the_identity() -> None:
    tokens = numbered(2)
    assert Aim(keep=1.0).merge_by_features(tokens, stage(tokens)) is tokens


def test_merging_identical_tokens_returns_the_same_value() -> None:
    x = torch.randn(1, 1, 5).expand(2, 12, 5)
    torch.testing.assert_close(merged(x, x, 0.25).x, x[:, :3])


def test_half_of_an_even_number_keeps_the_odd_positions_in_order() -> None:
    """Every token of A is merged, and each group is led by its token of B."""
    tokens = merged(torch.randn(1, 12, 5), torch.randn(1, 12, 3), 0.5)
    assert [int(tokens.source[0, m]) for m in range(1, 12, 2)] == list(range(6))


@pytest.mark.parametrize(
    ("count", "keep", "schedule"),
    [
        (576, 0.4375, [576, 288, 252]), (576, 0.125, [576, 288, 144, 72]), (196, 0.25, [196, 98, 49]),
        (196, 0.12, [196, 98, 49, 25, 23]),
    ],
)  # fmt: skip
def test_schedules_of_the_release(count: int, keep: float, schedule: list[int]) -> None:
    torch.manual_seed(1)
    metric, steps = torch.randn(1, count, 8), []

    def noting(metric: Tensor, surplus: int, order: str) -> Tensor:
        steps.append(metric.shape[1])
        return partners(metric, surplus, order)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foveate.methods.reduce.aim.partners", noting)
        tokens = merged(torch.randn(1, count, 4), metric, keep)
    assert [*steps, tokens.x.shape[1]] == schedule


def test_the_metric_is_merged_along() -> None:
    """With a second step on the metric of the first tokens, the groups would be others."""
    x, metric = torch.randn(1, 16, 5), torch.randn(1, 16, 3)
    right = merge_all(x[0], metric[0], 4)[1]
    first = merge_step(metric[0], 8, False)
    stale = [[m for j in group for m in first[j]] for group in merge_step(metric[0, :8], 4, False)]
    tokens = merged(x, metric, 0.25)
    groups = [sorted((tokens.source[0] == j).nonzero().flatten().tolist()) for j in range(4)]
    assert groups == [sorted(one) for one in right] != [sorted(one) for one in stale]


def test_steps_average_tokens_plainly_without_their_sizes() -> None:
    """Two merged pairs of 3 + 1 and 1 patches: the plain mean, not the mean over patches."""
    x = torch.randn(1, 8, 4)
    features, patches = merge_all(x[0], x[0], 2)
    assert max(map(len, patches)) > 2
    weighted = torch.stack([x[0, members].mean(0) for members in patches])
    ours = merged(x, x, 0.25).x[0]
    torch.testing.assert_close(ours, features)
    assert not torch.allclose(ours, weighted, atol=1e-3)


@pytest.mark.parametrize("order", ["released", "spatial"])
def test_frames_of_a_batch_are_merged_as_each_alone(order: str) -> None:
    x, metric = torch.randn(4, 15, 5), torch.randn(4, 15, 3)
    together = merged(x, metric, 0.4, order)
    for b in range(4):
        alone = merged(x[b : b + 1], metric[b : b + 1], 0.4, order)
        torch.testing.assert_close(together.x[b], alone.x[0])
        assert torch.equal(together.source[b], alone.source[0])


def test_crops_with_different_numbers_are_refused() -> None:
    tokens = numbered(2).keep(torch.tensor([[0, 1, 2], [3, 4, -1]]))
    with pytest.raises(InputError, match="another method dropped some before"):
        Aim(metric="features").merge_by_features(tokens, replace(stage(tokens), entered=torch.tensor([16, 16])))


@pytest.mark.parametrize("metric", ["keys", "features"])
@torch.no_grad()
def test_metric_and_stage_on_a_real_host(metric: str) -> None:
    """'keys': of the last encoder layer, class token removed, for features of the one before. 'features': projected."""
    host = vlm()
    given = prompt(host, [(2, 5)])
    tower, seen = host.model.vision_tower, []
    handle = tower.encoder.layers[4].self_attn.k_proj.register_forward_hook(lambda m, a, out: seen.append(out))
    features = tower(given["pixel_values"], output_hidden_states=True).hidden_states[-2][0, 1:]
    handle.remove()
    projector = host.model.multi_modal_projector
    values = features if metric == "keys" else projector(features)
    expected, _ = merge_all(values, seen[0][0, 1:] if metric == "keys" else values, 6)
    if metric == "keys":
        expected = projector(expected)
    entered: list[Tensor] = []
    with foveate.apply(host, Aim(keep=0.4, metric=metric, step=0.0)):
        handle = host.model.language_model.layers[0].register_forward_pre_hook(lambda m, a: entered.append(a[0]))
        host(**given)
        handle.remove()
    torch.testing.assert_close(entered[0][0, 2:8], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_merged_prompt_is_numbered_consecutively() -> None:
    """Merging comes before the language model, which sees an ordinary, shorter prompt."""
    host, seen = vlm(), []
    given = prompt(host, [(2, 5)])
    with foveate.apply(host, Aim(keep=0.5, step=0.0)):
        handle = host.model.language_model.layers[0].register_forward_pre_hook(
            lambda m, a, k: seen.append(k["position_ids"]), with_kwargs=True
        )
        host(**given)
        handle.remove()
    assert seen[0].tolist() == [list(range(15))]


# -- PageRank


def causal(batch: int = 2, heads: int = 4, length: int = 11, seed: int = 0) -> Attention:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(batch, heads, length, 8, generator=generator) for _ in range(2))
    here = torch.ones(batch, length, dtype=torch.bool)
    return Attention(query, key, 8**-0.5, True, None, here, torch.arange(length).expand(batch, -1))


def dense_pagerank(
    matrix: Tensor, uniform: Tensor, iterations: int = 5, damping: float = 0.0
) -> tuple[Tensor, list[Tensor]]:
    """Root mean square over heads (n,) of the vectors (H, n), which are returned too, one after each iteration."""
    v, steps = uniform.expand(len(matrix), -1), []
    for _ in range(iterations):
        v = torch.stack([(1 - damping) * (v[h] @ matrix[h]) + damping * uniform for h in range(len(matrix))])
        steps.append(v)
    return v.square().mean(0).sqrt(), steps


def dense_matrix(attention: Attention, b: int, temperature: float = 0.1) -> Tensor:
    logits = attention.query[b].double() @ attention.key[b].double().transpose(-1, -2) * attention.scaling / temperature
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    unseen = future if attention.valid is None else future | ~attention.valid[b]
    return logits.masked_fill(unseen, float("-inf")).softmax(-1)


@pytest.mark.parametrize(("iterations", "damping", "temperature"), [(5, 0.0, 0.1), (1, 0.0, 1.0), (8, 0.3, 0.5)])
def test_importance_is_the_dense_pagerank_in_float64(iterations: int, damping: float, temperature: float) -> None:
    attention = causal()
    ours = importance(attention, temperature, iterations, damping)
    uniform = torch.full((11,), 1 / 11, dtype=torch.float64)
    for b in range(2):
        expected, _ = dense_pagerank(dense_matrix(attention, b, temperature), uniform, iterations, damping)
        torch.testing.assert_close(ours[b].double(), expected, rtol=1e-3, atol=1e-5)
    assert ours.min() >= 0 and ours.max() <= 1


def one_hot_importance(attention: Attention, iterations: int) -> Tensor:
    """(H, n): each head's own vector, by giving `importance` one head at a time (the RMS of one head is the vector)."""
    parts = []
    for h in range(attention.query.shape[1]):
        one = Attention(
            attention.query[:, h : h + 1], attention.key[:, h : h + 1], attention.scaling, True, attention.valid,
            attention.present, attention.visual,
        )  # fmt: skip
        parts.append(importance(one, 0.1, iterations, 0.0)[0])
    return torch.stack(parts)


def test_each_heads_vector_sums_to_1_after_every_iteration() -> None:
    attention = causal(batch=1)
    for iterations in range(1, 8):
        torch.testing.assert_close(one_hot_importance(attention, iterations).sum(1), torch.ones(4))


def test_mass_moves_only_to_earlier_places_and_place_0_never_loses_any() -> None:
    """The mass of the first k places never falls, whatever k."""
    attention = causal(batch=1)
    below = [torch.full((4, 11), 1 / 11), *(one_hot_importance(attention, n) for n in range(1, 8))]
    for before, after in pairwise(one.cumsum(1) for one in below):
        assert (after >= before - 1e-5).all()


def test_padding_is_no_part_of_the_walk() -> None:
    attention = causal(batch=1)
    here = torch.ones(1, 14, dtype=torch.bool)
    here[0, :3] = False
    pad = torch.randn(1, 4, 3, 8)
    padded = Attention(
        torch.cat([pad, attention.query], 2), torch.cat([pad, attention.key], 2), attention.scaling, True, here, here,
        attention.visual,
    )  # fmt: skip
    ours = importance(padded, 0.1, 5, 0.0)[0]
    torch.testing.assert_close(ours[3:], importance(attention, 0.1, 5, 0.0)[0], rtol=1e-4, atol=1e-6)
    assert ours[:3].eq(0).all()


# -- pruning


def visual_places(inputs: dict[str, Tensor]) -> list[int]:
    return (inputs["input_ids"][0] == IMAGE).nonzero().flatten().tolist()


def survivors(trace: list[Any], b: int = 0) -> list[list[int]]:
    return [kept(record.source)[b] for record in trace if record.stage.startswith("llm.layer")]


def prune_plainly(host: Any, given: dict[str, Tensor], masked: bool) -> tuple[Tensor, list[int], list[list[int]]]:
    """The language model layer by layer with the card's rule: logits, places that are left, visible ones by stage."""
    picture, stages = visual_places(given), [visual_places(given)]
    last: dict[str, Any] = {}

    def decide(layer: int, hidden: Tensor, index: list[int], positions: Tensor) -> list[int] | None:
        stay = None
        if layer:
            inside, where = last["hidden"], last["positions"]
            seen = [place in stages[-1] or place not in picture for place in last["index"]]
            unseen = ~torch.tensor(seen)
            matrix = attention(host, layer - 1, inside, where, unseen, temperature=0.1)
            score, _ = dense_pagerank(matrix, torch.full((len(seen),), 1 / len(seen), dtype=torch.float64))
            values = score[[last["index"].index(place) for place in stages[-1]]]
            best = top(values, int(RATIOS[layer - 1] * len(picture) + 1e-9))
            stages.append([stages[-1][j] for j in best])
            stay = [place for place in index if place not in picture or place in stages[-1]]
            if not masked:
                rows = [row for row, place in enumerate(index) if place in stay]
                hidden, positions, index = hidden[:, rows], positions[:, rows], [index[row] for row in rows]
        last.update(hidden=hidden, index=index, positions=positions)
        return stay

    logits, index, _ = run_layers(host, prompt_embeddings(host, given), decide, masked=masked)
    return logits, index, stages[1:]


@pytest.mark.parametrize("name", ["clip-llama", "clip-qwen2"])
@pytest.mark.parametrize("removed", ["drop", "mask"])
@torch.no_grad()
def test_pruning_equals_the_plain_run(name: str, removed: str) -> None:
    """PageRank on the layer that ran, effect from the next one on, text untouched, original positions."""
    host, masked = vlm(name), removed == "mask"
    given = prompt(host, [(3, 6)])
    logits, index, stages = prune_plainly(host, given, masked)
    with foveate.apply(host, Aim(**PRUNE, removed=removed)) as applied:
        output = host(**given)
    places = visual_places(given)
    counts = [record.tokens_out[0] for record in applied.trace]
    assert counts == [16, 11, 6, 1] == [16, *map(len, stages)]
    torch.testing.assert_close(output.logits[0, index], logits, rtol=1e-3, atol=1e-3)
    lengths = [layer.keys.shape[2] for layer in output.past_key_values.layers]
    assert lengths == ([25] * 4 if masked else [25, 20, 15, 10])
    if not masked:
        assert [[places[patch] for patch in one] for one in survivors(applied.trace)] == stages


@torch.no_grad()
def test_hidden_tokens_still_act_as_sources_of_mass() -> None:
    """In the masked behaviour the walk starts on all N places; without the hidden ones the scores are others."""
    attention = causal(batch=1)
    seen = torch.ones(1, 11, dtype=torch.bool)
    seen[0, [4, 6, 7]] = False
    hidden = Attention(
        attention.query, attention.key, attention.scaling, True, seen, attention.present, attention.visual
    )
    ours = importance(hidden, 0.1, 5, 0.0)[0].double()
    expected, _ = dense_pagerank(dense_matrix(hidden, 0), torch.full((11,), 1 / 11, dtype=torch.float64))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    left = seen[0].nonzero().flatten()
    dropped = Attention(
        attention.query[:, :, left], attention.key[:, :, left], attention.scaling, True, None, seen[:, left],
        attention.visual[:, left],
    )  # fmt: skip
    assert not torch.allclose(importance(dropped, 0.1, 5, 0.0)[0].double(), ours[left], rtol=1e-2)


@pytest.mark.parametrize("removed", ["drop", "mask"])
@pytest.mark.parametrize("step", [0.125, 0.3, 0.5, 1.0])
@torch.no_grad()
def test_visible_tokens_are_all_text_and_floor_of_the_rest_and_nested(step: float, removed: str) -> None:
    host = vlm(image=20)  # 25 visual tokens
    given, masks = prompt(host, [(3, 6), (1, 4)]), []
    with foveate.apply(host, Aim(keep=1.0, first_layer=1, step=step, removed=removed)) as applied:
        handle = host.model.language_model.layers[-1].register_forward_pre_hook(
            lambda m, a, k: masks.append(k["attention_mask"]), with_kwargs=True
        )
        output = host(**given)
        handle.remove()
    for b, text in ((0, 9), (1, 5)):
        counts = {record.stage: record.tokens_out[b] for record in applied.trace}
        for layer in (1, 2):
            ratio = max(0.0, 1 - layer * step)
            if f"llm.layer[{layer + 1}]" in counts:
                assert counts[f"llm.layer[{layer + 1}]"] == int(25 * ratio + 1e-9)
        if removed == "drop":
            assert all(set(later) < set(earlier) for earlier, later in pairwise(survivors(applied.trace, b)))
        # Protected places stay visible: the last row sees the text and the visual tokens of the last stage.
        assert int(masks[0][b, 0, -1].sum()) == text + applied.trace[-1].tokens_out[b]
    assert output.logits.isfinite().all()


def test_retention_falls_by_an_eighth_a_layer() -> None:
    qwen, vicuna = Aim(), Aim(first_layer=13)
    assert [qwen.retained(layer, 28) for layer in range(12, 23)] == [
        1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0,
    ]  # fmt: skip
    assert vicuna.retained(12, 32) == 1 and vicuna.retained(13, 32) == 0.875 and vicuna.retained(20, 32) == 0


@torch.no_grad()
def test_no_pruning_and_no_merging_is_the_identity() -> None:
    host = vlm()
    given = prompt(host, [(2, 5), (1, 3)])
    dense = host(**given).logits
    with foveate.apply(host, Aim(keep=1.0, step=0.0)):
        torch.testing.assert_close(host(**given).logits, dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("removed", ["drop", "mask"])
@pytest.mark.parametrize("name", ["clip-llama", "clip-qwen2"])
@torch.no_grad()
def test_decoding_attends_to_the_kept_prefill_places_and_all_generated_tokens(name: str, removed: str) -> None:
    """Against a masked run over prompt and answer with the kept sets given; and what the cache holds."""
    host = vlm(name)
    given = prompt(host, [(3, 6)])
    embeds, places, answer = prompt_embeddings(host, given), visual_places(given), [7, 20, 33]
    dense = host(**given, use_cache=True).past_key_values
    with foveate.apply(host, Aim(**PRUNE, removed=removed)) as applied:
        first = host(**given, use_cache=True)
        stages = [[places[patch] for patch in one] for one in survivors(applied.trace)]
        cache, mask, steps = first.past_key_values, given["attention_mask"], []
        for token in answer:
            mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
            step = host(input_ids=torch.tensor([[token]]), attention_mask=mask, past_key_values=cache, use_cache=True)
            steps.append(step.logits[0, -1])
    if removed == "mask":
        # Hidden tokens keep their source: ask the plain run what was kept.
        _, _, stages = prune_plainly(host, given, masked=True)
        lengths = [28] * 4
    else:
        lengths = [28, 23, 18, 13]
    assert [layer.keys.shape[2] for layer in cache.layers] == lengths
    # Layer 0 holds the whole prompt, with the keys of the unchanged model.
    torch.testing.assert_close(cache.layers[0].keys[:, :, :25], dense.layers[0].keys)
    if removed == "drop":
        # Layer 1's keys depend on layer 0 alone, so those that it holds are the dense ones at the kept places.
        left = [place for place in range(25) if place not in places or place in stages[0]]
        torch.testing.assert_close(cache.layers[1].keys[:, :, :20], dense.layers[1].keys[:, :, left])

    def decide(layer: int, hidden: Tensor, index: list[int], positions: Tensor) -> list[int] | None:
        return [place for place in index if place not in places or place in stages[layer - 1]] if layer else None

    longer = torch.cat([embeds, host.get_input_embeddings()(torch.tensor([answer]))], 1)
    logits, _, _ = run_layers(host, longer, decide, masked=True)
    torch.testing.assert_close(torch.stack(steps), logits[-3:], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_positions_stay_those_of_the_prompt() -> None:
    host, seen = vlm(), []
    given = prompt(host, [(3, 6)])
    with foveate.apply(host, Aim(**PRUNE)) as applied:
        handles = [
            layer.register_forward_pre_hook(lambda m, a, k: seen.append(k["position_ids"]), with_kwargs=True)
            for layer in host.model.language_model.layers
        ]
        host(**given)
        for handle in handles:
            handle.remove()
    places = visual_places(given)
    for stage_, positions in zip(survivors(applied.trace), seen[1:]):
        left = [place for place in range(25) if place not in places or place in [places[patch] for patch in stage_]]
        assert positions.tolist() == [left]


# -- counting


def prefill_flops(
    lengths: list[int], width: int, heads: int, groups: int, mlp: int, vocabulary: int, adds: int
) -> float:
    """The card's formula, one forward."""
    linear = [2 * n * (2 * width**2 + 2 * width**2 * groups / heads + 3 * width * mlp) for n in lengths]
    attended = [4 * n**2 * width + 5 * heads * n**2 for n in lengths]
    rest = [(14 + 2 + adds) * width * n for n in lengths]
    return sum(linear) + sum(attended) + sum(rest) + width * vocabulary


@pytest.mark.parametrize(
    ("settings", "visual", "teraflops"),
    [
        ({"keep": 1.0, "step": 0.0}, 6272, 99.63), ({"keep": 0.25}, 6272, 14.76),
        ({"keep": 0.25, "step": 0.0}, 6272, 22.90), ({"keep": 1.0}, 6272, 62.01), ({"keep": 0.25}, 37632, 99.27),
    ],
)  # fmt: skip
def test_charged_tokens_give_the_papers_flops_on_qwen2(settings: dict[str, Any], visual: int, teraflops: float) -> None:
    lengths = [n + 100 for n in Aim(**settings).charged_tokens(visual, 28)]
    assert prefill_flops(lengths, 3584, 28, 4, 18944, 152064, 1) / 1e12 == pytest.approx(teraflops, abs=0.006)


@pytest.mark.parametrize(("keep", "step", "teraflops"), [(1.0, 0.0, 8.18), (0.4375, 0.125, 2.22), (0.125, 0.125, 1.00)])
def test_charged_tokens_give_the_papers_flops_on_vicuna(keep: float, step: float, teraflops: float) -> None:
    lengths = [n + 40 for n in Aim(keep=keep, step=step, first_layer=13).charged_tokens(576, 32)]
    assert prefill_flops(lengths, 4096, 32, 32, 11008, 32000, 2) / 1e12 == pytest.approx(teraflops, abs=0.006)


def test_overhead_of_merging_and_pruning() -> None:
    qwen, vicuna = Aim(keep=0.25), Aim(keep=0.125, first_layer=13)
    assert qwen.merge_flops(6272, 3584) / 1e9 == pytest.approx(88.25, abs=0.006)
    assert qwen.prune_flops(1568, 100, 28, 28) / 1e9 == pytest.approx(4.18, abs=0.006)
    assert vicuna.merge_flops(576, 1024) / 1e9 == pytest.approx(0.227, abs=0.0006)
    assert vicuna.prune_flops(72, 40, 32, 32) / 1e9 == pytest.approx(0.028, abs=0.0006)
    assert Aim(keep=0.001).merge_flops(7, 8) > 0  # ends


def test_budgets_up_to_all() -> None:
    host = HostShape("hf-vlm", (), 24, 22, 1, (24, 24), llm_layers=32)
    for budget in (0.05, 0.3, 0.6, 0.7, 0.8, 0.95, 1.0):
        made = Aim.for_budget(budget, host)
        assert isinstance(made, Aim)
        seen = [1.0, *((made.retained(n, 32) if made.step else 1.0) for n in range(31))]
        assert made.keep * sum(seen) / 32 == pytest.approx(budget, abs=1e-4)


def test_settings_that_the_host_cannot_have() -> None:
    host = vlm()
    for first in (4, 0.99):
        with pytest.raises(InputError, match="first_layer"):
            foveate.apply(host, Aim(first_layer=first))
    foveate.apply(host, Aim(first_layer=4, step=0.0)).remove()
