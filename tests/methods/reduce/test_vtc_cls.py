"""VTC-CLS against its card: each property, each trap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveate
from foveate.method import InputError, Method
from foveate.methods.reduce.fopru import FoPru
from foveate.methods.reduce.vtc_cls import VtcCls
from reference import eager_vision, kept, top
from stub import HOST, numbered, numbers, plain_attention, stage
from tiny import prompt, vision, vlm


def layers_of(*scores: Tensor) -> dict[int, Tensor]:
    """Class attention of the layers that end with 22."""
    return {23 - len(scores) + i: score for i, score in enumerate(scores)}


def prune(scores: dict[int, Tensor], count: int = 6, combine: str = "sum") -> list[list[int]]:
    tokens = numbered(next(iter(scores.values())).shape[0])
    method = VtcCls(tokens=count, layers=len(scores), combine=combine)
    return numbers(method.prune(tokens, stage(tokens, cls=scores)))


def random_layers(count: int, batch: int = 2) -> dict[int, Tensor]:
    return layers_of(*(torch.rand(batch, 16) for _ in range(count)))


@pytest.mark.parametrize("settings", [{"tokens": 16}, {"tokens": 99}, {"keep": 1.0}])
@torch.no_grad()
def test_as_many_as_there_are_is_the_vanilla_model(settings: dict[str, float]) -> None:
    host = vlm()
    given = prompt(host, [(2, 5)])
    dense = host(**given).logits
    with foveate.apply(host, "vtc-cls", **settings):
        torch.testing.assert_close(host(**given).logits, dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", range(1, 17))
def test_raster_order_unique_and_exactly_u(count: int) -> None:
    for chosen in prune(random_layers(3), count):
        assert chosen == sorted(set(chosen)) and len(chosen) == count


@torch.no_grad()
def test_the_choice_does_not_depend_on_the_text() -> None:
    host = vlm()
    choices = []
    for length in (3, 8):
        given = prompt(host, [(2, length)])
        with foveate.apply(host, VtcCls(keep=0.4)) as applied:
            host(**given)
            choices.append(kept(applied.trace[0].source))
    assert choices[0] == choices[1]


def test_scaling_all_maps_or_adding_a_uniform_layer_changes_nothing() -> None:
    scores = random_layers(3)
    chosen = prune(scores)
    assert prune({layer: 7 * score for layer, score in scores.items()}) == chosen
    assert prune(layers_of(torch.full((2, 16), 1 / 17), *scores.values())) == chosen


def test_one_layer_is_the_top_of_the_head_mean_of_the_feature_layer() -> None:
    host = vlm()
    given = prompt(host, [(2, 5), (1, 4)])
    expected = [top(row, 7) for row in eager_vision(host, given["pixel_values"]).attentions[3].mean(1)[:, 0, 1:]]
    with foveate.apply(host, VtcCls(tokens=7, layers=1)) as applied, torch.no_grad():
        host(**given)
    assert kept(applied.trace[0].source) == expected


@torch.no_grad()
def test_features_are_gathered_bit_for_bit_before_the_projector() -> None:
    """Features come before the projector, so that it too works on U rows only."""
    host = vlm()
    given = prompt(host, [(2, 5)])
    seen: list[Tensor] = []
    features = host.model.vision_tower(given["pixel_values"], output_hidden_states=True).hidden_states[-2][0, 1:]
    with foveate.apply(host, VtcCls(tokens=5)) as applied:
        handle = host.model.multi_modal_projector.linear_1.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        host(**given)
        handle.remove()
    assert seen[0].shape[1] == 5 and torch.equal(seen[0][0], features[kept(applied.trace[0].source)[0]])


def test_sum_is_the_same_set_as_mean_and_max_and_min_are_others() -> None:
    scores = random_layers(4)
    stacked = torch.stack(list(scores.values()))
    for combine, expected in (("sum", stacked.mean(0)), ("max", stacked.amax(0)), ("min", stacked.amin(0))):
        assert prune(scores, combine=combine) == [top(row, 6) for row in expected]
    assert prune(scores) != prune(scores, combine="max") != prune(scores, combine="min")


def eager_scores(host: object, pixels: Tensor) -> Tensor:
    """(5 layers, B, 17): the class token's row of every layer, its own column first."""
    return torch.stack([one.mean(1)[:, 0] for one in eager_vision(host, pixels).attentions])


def test_the_class_column_is_no_candidate_but_has_its_weight_in_the_softmax() -> None:
    """Layers are summed as they are: not renormalised over the patches. Some pictures tell the two apart."""
    host, differ = vlm(), 0
    given = prompt(host, [(2, 5)] * 8)
    rows = eager_scores(host, given["pixel_values"])[:4]
    plain = rows[:, :, 1:].sum(0)
    renormalised = (rows[:, :, 1:] / rows[:, :, 1:].sum(-1, keepdim=True)).sum(0)
    with foveate.apply(host, VtcCls(tokens=6, layers=4)) as applied, torch.no_grad():
        host(**given)
    for b, chosen in enumerate(kept(applied.trace[0].source)):
        assert chosen == top(plain[b], 6)
        differ += chosen != top(renormalised[b], 6)
    assert differ


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_window_ends_with_the_feature_layer_and_leaves_the_last_out(layers: int) -> None:
    host = vlm()
    given = prompt(host, [(2, 5)] * 6)
    rows = eager_scores(host, given["pixel_values"])[:, :, 1:]
    expected = [top(row, 6) for row in rows[4 - layers : 4].sum(0)]
    shifted = [top(row, 6) for row in rows[5 - layers : 5].sum(0)]
    with foveate.apply(host, VtcCls(tokens=6, layers=layers)) as applied, torch.no_grad():
        host(**given)
    assert kept(applied.trace[0].source) == expected != shifted


def test_window_on_clip_large_is_19_to_22() -> None:
    assert VtcCls(layers=4).reads(HOST) == tuple(f"vision.attention[{layer}]" for layer in (19, 20, 21, 22))
    with pytest.raises(InputError, match="layers"):
        foveate.apply(vlm(), VtcCls(layers=5))


def test_each_picture_of_a_batch_is_ranked_by_itself() -> None:
    scores = random_layers(3, batch=4)
    assert prune(scores) == [prune({layer: one[b : b + 1] for layer, one in scores.items()})[0] for b in range(4)]
    assert len({tuple(one) for one in prune(scores)}) == 4


def test_of_equal_scores_the_first_is_taken() -> None:
    assert prune(layers_of(torch.ones(1, 16))) == [[0, 1, 2, 3, 4, 5]]


def test_share_of_the_paper_is_256_of_576() -> None:
    tokens = numbered(1, (24, 24))
    scores = random_layers(1, 1)
    scores[22] = torch.rand(1, 576)
    assert [len(one) for one in numbers(VtcCls(layers=1).prune(tokens, stage(tokens, (24, 24), cls=scores)))] == [256]


def test_more_layers_recall_a_common_saliency_better() -> None:
    """The card's small-scale trend: noisy layers around one saliency."""
    saliency, noise = torch.rand(64, 16), torch.randn(8, 64, 16)
    recall = []
    for count in (1, 3, 8):
        chosen = prune(layers_of(*(saliency + noise[i] for i in range(count))))
        recall.append(sum(len(set(c) & set(top(saliency[b], 6))) for b, c in enumerate(chosen)))
    assert recall == sorted(recall) and recall[0] < recall[-1]


def test_without_a_class_token_the_patches_are_scored_by_what_they_receive() -> None:
    """This project's substitute, for SigLIP."""
    attention = plain_attention(2, 4, 16, prefix=0)
    dense = (attention.query @ attention.key.transpose(-1, -2) * attention.scaling).softmax(-1)
    expected = [top(row, 6) for row in dense.mean((1, 2))]
    tokens = numbered(2)
    host = stage(tokens).host
    bare = type(host)(host.family, (), 24, 22, 0, (4, 4), 32, class_token=False)
    method = VtcCls(tokens=6, layers=1)
    assert numbers(method.prune(tokens, stage(tokens, host=bare, attention={22: attention}))) == expected


@pytest.mark.parametrize("method", [VtcCls(layers=2, keep=0.5), FoPru(keep=0.5)])
@torch.no_grad()
def test_registers_are_not_taken_for_a_class_token(method: Method) -> None:
    model = vision("timm-reg-avg", class_token=False)
    with foveate.apply(model, method) as applied:
        model(torch.randn(2, 3, 16, 16))
        assert applied.host.shape.prefix == 3 and applied.trace[0].tokens_out == (8, 8)
    with pytest.raises(InputError, match="no class token"):
        foveate.apply(model, FoPru(queries="class"))
