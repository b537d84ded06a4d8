"""FastV against plain runs of the language model's own layers."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.method import HostShape, InputError
from foveate.methods.reduce.fastv import FastV
from reference import attention, kept, prompt_embeddings, run_layers, top
from tiny import IMAGE, prompt, single, vlm


def visual_places(inputs: dict[str, Tensor]) -> list[int]:
    return (inputs["input_ids"][0] == IMAGE).nonzero().flatten().tolist()


def survivors(trace: list[Any], b: int = 0) -> list[int]:
    (chosen,) = (kept(record.source)[b] for record in trace if record.stage.startswith("llm.layer"))
    return chosen


def ranking(host: Any, given: dict[str, Tensor], layer: int, count: int, queries: str) -> Any:
    """The rule for `run_layers`: attention of the layer that ran last, on what went into it."""
    picture, last = visual_places(given), {}

    def decide(now: int, hidden: Tensor, index: list[int], positions: Tensor) -> list[int] | None:
        stay = None
        if now == layer:
            weights = attention(host, layer - 1, last["hidden"], last["positions"]).mean(0)
            score = weights[-1] if queries == "last" else weights.sum(0) / len(weights)
            best = [picture[j] for j in top(score[picture], count)]
            stay = [place for place in index if place not in picture or place in best]
        last.update(hidden=hidden, positions=positions)
        return stay

    return decide


@pytest.mark.parametrize("name", ["clip-llama", "clip-qwen2"])
@pytest.mark.parametrize("queries", ["last", "all"])
@pytest.mark.parametrize("layer", [1, 2, 3])
@torch.no_grad()
def test_the_whole_run_equals_the_plain_one(name: str, queries: str, layer: int) -> None:
    """Head-mean attention of layer K - 1, lowest R dropped, order and original positions, text untouched."""
    host = vlm(name)
    given = prompt(host, [(3, 6)])
    rule = ranking(host, given, layer, 6, queries)
    logits, index, _ = run_layers(host, prompt_embeddings(host, given), rule)
    with foveate.apply(host, FastV(layer=layer, drop=0.6, queries=queries)) as applied:
        ours = host(**given)
    places = visual_places(given)
    assert [places[patch] for patch in survivors(applied.trace)] == [place for place in index if place in places]
    torch.testing.assert_close(ours.logits[0][index], logits, rtol=1e-4, atol=1e-4)
    assert [one.keys.shape[2] for one in ours.past_key_values.layers] == [25] * layer + [15] * (4 - layer)


@torch.no_grad()
def test_the_two_criteria_are_different() -> None:
    host = vlm()
    given = prompt(host, [(3, 6)])
    chosen = []
    for queries in ("last", "all"):
        with foveate.apply(host, FastV(queries=queries)) as applied:
            host(**given)
        chosen.append(survivors(applied.trace))
    assert chosen[0] != chosen[1]


@torch.no_grad()
def test_new_tokens_follow_on_the_original_positions() -> None:
    """A cached step equals a run over prompt and answer in which the same tokens are missing."""
    host = vlm()
    given = prompt(host, [(3, 6)])
    answer = [7, 20, 33]
    with foveate.apply(host, FastV()) as applied:
        cache, steps = host(**given, use_cache=True).past_key_values, []
        mask = given["attention_mask"]
        for token in answer:
            mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
            steps.append(host(input_ids=torch.tensor([[token]]), attention_mask=mask, past_key_values=cache).logits[0])
    places = visual_places(given)
    chosen = [places[patch] for patch in survivors(applied.trace)]

    def decide(layer: int, hidden: Tensor, index: list[int], positions: Tensor) -> list[int] | None:
        return [place for place in index if place not in places or place in chosen] if layer == 2 else None

    longer = torch.cat([prompt_embeddings(host, given), host.get_input_embeddings()(torch.tensor([answer]))], 1)
    logits, _, _ = run_layers(host, longer, decide)
    torch.testing.assert_close(torch.cat(steps), logits[-3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("queries", ["last", "all"])
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_a_batch_of_different_lengths_equals_single_runs(padding: str, queries: str) -> None:
    host = vlm()
    given = prompt(host, [(2, 9), (1, 3), (0, 2, 4), (7,)], padding=padding)
    method = FastV(queries=queries)
    with foveate.apply(host, method) as applied:
        together = host(**given).logits
        stages = [survivors(applied.trace, b) for b in range(3)]
        for b in range(4):
            alone = host(**single(host, given, b)).logits[0]
            assert b == 3 or survivors(applied.trace) == stages[b]
            torch.testing.assert_close(together[b, given["attention_mask"][b].bool()], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 0.51, 0.9, 1.0])
@pytest.mark.parametrize("image", [16, 20, 28])
@torch.no_grad()
def test_what_is_left_is_rounded_down(drop: float, image: int) -> None:
    host, count = vlm(image=image), (image // 4) ** 2
    with foveate.apply(host, FastV(drop=drop)) as applied:
        host(**prompt(host, [(2, 5)]))
    left = int((1 - Fraction(str(drop))) * count)
    assert applied.trace[-1].tokens_out == (left,)


@pytest.mark.parametrize(("budget", "layer"), [(1.0, 2), (0.5, 2), (1 / 16, 2), (0.05, 1), (1 / 32, 1)])
def test_for_budget_is_the_papers_setting_where_that_can_be(budget: float, layer: int) -> None:
    host = HostShape("hf-vlm", (), 24, 22, 1, (24, 24), 32)
    made = FastV.for_budget(budget, host)
    assert made.layer == layer
    assert (layer + (32 - layer) * (1 - made.drop)) / 32 == pytest.approx(budget, abs=1e-4)
    with pytest.raises(InputError, match="first of 32 layers"):
        FastV.for_budget(0.03, host)


def test_a_layer_that_nothing_follows_is_refused() -> None:
    with pytest.raises(InputError, match="layer=4"):
        foveate.apply(vlm(), FastV(layer=4))
