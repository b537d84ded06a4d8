"""FoPru against its card: each property, each trap."""

from __future__ import annotations

import dataclasses
import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import foveate
from foveate.method import InputError
from foveate.methods.reduce.fopru import FoPru, significance
from foveate.nn.attention import Attention
from reference import eager_vision, kept, top
from stub import HOST, numbered, numbers, plain_attention, stage
from tiny import prompt, vision, vlm

KEEPS = (0.01, 0.06, 0.1, 0.25, 0.29, 0.4, 0.5, 0.7, 0.75, 0.99, 1.0)


def written_out(attention: Attention) -> Tensor:
    """(B, H, S, S) float64."""
    return (attention.query.double() @ attention.key.double().transpose(-1, -2) * attention.scaling).softmax(-1)


def prune(keep: float, attention: Attention, grid: tuple[int, int] = (4, 4), **settings: str) -> list[list[int]]:
    tokens = numbered(attention.query.shape[0], grid)
    return numbers(FoPru(keep=keep, **settings).prune(tokens, stage(tokens, grid, attention={22: attention})))


@pytest.mark.parametrize("strategy", ["rank", "row"])
@torch.no_grad()
def test_keeping_all_is_the_identity_for_values_and_order(strategy: str) -> None:
    host = vlm()
    given = prompt(host, [(2, 5)])
    dense = host(**given).logits
    with foveate.apply(host, "fopru", keep=1.0, strategy=strategy):
        assert torch.equal(host(**given).logits, dense)


@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (7, 9)])
@pytest.mark.parametrize("keep", KEEPS)
def test_indices_increase_and_their_number_is_exact_and_never_0(keep: float, grid: tuple[int, int]) -> None:
    rows, columns = grid
    attention = plain_attention(2, 4, rows * columns)
    share = Fraction(str(keep))
    for chosen in prune(keep, attention, grid):
        assert chosen == sorted(set(chosen)) and len(chosen) == max(1, int(share * rows * columns))
    for chosen in prune(keep, attention, grid, strategy="row"):
        assert chosen == sorted(set(chosen)) and len(chosen) == columns * max(1, int(share * rows))


@pytest.mark.parametrize("keep", KEEPS)
def test_row_strategy_keeps_the_best_full_rows(keep: float) -> None:
    attention = plain_attention(2, 4, 35)
    chosen = prune(keep, attention, (5, 7), strategy="row")
    received = written_out(attention).mean((1, 2))[:, 1:].reshape(2, 5, 7).sum(-1)
    for b in range(2):
        best = top(received[b], max(1, int(Fraction(str(keep)) * 5)))
        assert chosen[b] == [row * 7 + column for row in best for column in range(7)]


@pytest.mark.parametrize("strategy", ["rank", "row"])
def test_permuting_the_heads_changes_nothing(strategy: str) -> None:
    attention = plain_attention(2, 4, 16)
    order = [2, 0, 3, 1]
    other = dataclasses.replace(attention, query=attention.query[:, order], key=attention.key[:, order])
    assert prune(0.5, attention, strategy=strategy) == prune(0.5, other, strategy=strategy)


@pytest.mark.parametrize("strategy", ["rank", "row"])
def test_adding_a_constant_to_all_scores_changes_nothing(strategy: str) -> None:
    tokens, score = numbered(2), torch.rand(2, 16)
    method = FoPru(keep=0.5, strategy=strategy, queries="class")
    plain, raised = (method.prune(tokens, stage(tokens, cls={22: score + c})) for c in (0.0, 3.0))
    assert numbers(plain) == numbers(raised)


def test_both_strategies_keep_as_many_if_the_rows_are_whole() -> None:
    attention = plain_attention(2, 4, 24)
    for keep in (0.25, 0.5, 0.75):
        rank, row = (prune(keep, attention, (4, 6), strategy=s) for s in ("rank", "row"))
        assert [len(one) for one in rank] == [len(one) for one in row]


def test_the_score_of_all_columns_sums_to_1_when_all_rows_are_averaged() -> None:
    attention = plain_attention(3, 4, 16)
    torch.testing.assert_close(attention.received().sum(1), torch.ones(3))


@pytest.mark.parametrize("strategy", ["rank", "row"])
def test_fewer_is_a_subset_of_more(strategy: str) -> None:
    attention = plain_attention(2, 4, 35)
    ladder = [prune(keep, attention, (5, 7), strategy=strategy) for keep in KEEPS]
    for fewer, more in itertools.pairwise(ladder):
        assert all(set(a) <= set(b) for a, b in zip(fewer, more))


@torch.no_grad()
def test_the_choice_does_not_depend_on_the_question() -> None:
    host = vlm()
    given = prompt(host, [(2, 5)])
    asked = given["input_ids"].clone()
    asked[:, -5:] = torch.tensor([9, 10, 11, 12, 13])
    with foveate.apply(host, "fopru", keep=0.4) as applied:
        first = host(**given), kept(applied.trace[0].source)
        second = host(**{**given, "input_ids": asked}), kept(applied.trace[0].source)
    assert first[1] == second[1] and not torch.equal(first[0].logits, second[0].logits)


# -- where it is easy to get wrong


@pytest.mark.parametrize("queries", ["all", "patches", "class"])
def test_columns_not_rows_are_averaged(queries: str) -> None:
    """Averaging over a row's columns gives 1 / S for every patch; what a patch receives is the other direction."""
    host = vlm("clip-llama")
    given = prompt(host, [(2, 5), (1, 4)])
    eager = eager_vision(host, given["pixel_values"]).attentions[3]
    rows = {"all": slice(None), "patches": slice(1, None), "class": slice(0, 1)}[queries]
    expected = eager[:, :, rows, 1:].mean((1, 2))
    assert expected.std() > 1e-3 and eager[:, :, rows].mean(-1).std() < 1e-6
    with foveate.apply(host, FoPru(keep=0.4, queries=queries)) as applied, torch.no_grad():
        host(**given)
    assert kept(applied.trace[0].source) == [top(score, 6) for score in expected]


def test_the_significance_is_the_eager_attention_that_a_patch_receives() -> None:
    attention = plain_attention(2, 4, 16, prefix=3)
    dense = written_out(attention)
    for queries, rows in (("all", slice(None)), ("patches", slice(3, None))):
        expected = dense[:, :, rows, 3:].mean((1, 2)).float()
        torch.testing.assert_close(significance(attention, queries, 3), expected)


def test_padding_does_not_ask() -> None:
    attention = plain_attention(1, 4, 16)
    here = torch.ones(1, 17, dtype=torch.bool)
    here[0, 12:] = False
    short = plain_attention(1, 4, 11)
    short = dataclasses.replace(short, query=attention.query[:, :, :12], key=attention.key[:, :, :12])
    padded = dataclasses.replace(attention, valid=here, present=here)
    for queries in ("all", "patches"):
        torch.testing.assert_close(significance(padded, queries, 1)[:, :11], significance(short, queries, 1))


def test_the_layer_is_the_one_whose_features_are_used_not_the_last() -> None:
    host = vlm()
    given = prompt(host, [(2, 5), (3, 4)])
    attentions = eager_vision(host, given["pixel_values"]).attentions
    by_layer = [[top(score, 8) for score in one[..., 1:].mean((1, 2))] for one in attentions]
    assert len(by_layer) == 5 and by_layer[3] != by_layer[4]
    for layer, expected in ((None, by_layer[3]), (4, by_layer[4]), (0, by_layer[0])):
        with foveate.apply(host, FoPru(keep=0.5, layer=layer)) as applied, torch.no_grad():
            host(**given)
        assert kept(applied.trace[0].source) == expected
    with pytest.raises(InputError, match="layer"):
        foveate.apply(host, FoPru(layer=5))


@torch.no_grad()
def test_the_projector_gets_the_chosen_features_bit_for_bit_in_raster_order() -> None:
    """The class token stands before the patches in the attention map, but not in what the projector is given."""
    host = vlm()
    given = prompt(host, [(2, 5)])
    seen: list[Tensor] = []
    features = host.model.vision_tower(given["pixel_values"], output_hidden_states=True).hidden_states[-2][0, 1:]
    with foveate.apply(host, FoPru(keep=0.5)) as applied:
        handle = host.model.multi_modal_projector.linear_1.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        host(**given)
        handle.remove()
    assert torch.equal(seen[0][0], features[kept(applied.trace[0].source)[0]])


@torch.no_grad()
def test_each_crop_and_each_picture_is_pruned_by_itself() -> None:
    host = vlm("next")
    given = prompt(host, [(2, 5)], sizes=[(24, 30)])
    crops = given["pixel_values"][0]
    eager = eager_vision(host, crops).attentions[3][..., 1:].mean((1, 2))
    with foveate.apply(host, FoPru(keep=0.3)) as applied:
        host(**given)
    assert len(crops) > 2 and kept(applied.trace[0].source) == [top(score, 4) for score in eager]


def test_of_equal_scores_the_first_is_taken() -> None:
    tokens = numbered(1)
    flat = stage(tokens, cls={22: torch.ones(1, 16)})
    assert numbers(FoPru(keep=0.25, queries="class").prune(tokens, flat)) == [[0, 1, 2, 3]]
    assert numbers(FoPru(keep=0.5, queries="class", strategy="row").prune(tokens, flat)) == [list(range(8))]


def test_a_sink_is_kept() -> None:
    tokens, score = numbered(1), torch.rand(1, 16)
    score[0, 13] = 100.0
    assert 13 in numbers(FoPru(keep=0.1, queries="class").prune(tokens, stage(tokens, cls={22: score})))[0]


def test_rows_that_lost_all_their_tokens_do_not_count() -> None:
    tokens = numbered(1).keep(torch.arange(4, 12)[None])
    score = torch.arange(8.0)[None]
    method = FoPru(keep=0.5, queries="class", strategy="row")
    assert numbers(method.prune(tokens, stage(tokens, cls={22: score}))) == [[8, 9, 10, 11]]


def test_class_queries_need_a_class_token() -> None:
    with pytest.raises(InputError, match="no class token"):
        foveate.apply(vlm("siglip-llama"), FoPru(queries="class"))
    with foveate.apply(vision("siglip"), FoPru()) as applied, torch.no_grad():
        applied.model(torch.randn(1, 3, 16, 16))
        assert applied.trace[0].tokens_out == (8,)


def test_default_reads_only_the_feature_layer() -> None:
    assert FoPru().reads(HOST) == ("vision.attention[22]",) and FoPru(keep=1).reads(HOST) == ()
