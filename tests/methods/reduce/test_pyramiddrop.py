"""PyramidDrop against its card, and against a plain run of the language model layer by layer."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.hosts.signals import LanguageSignals
from foveate.method import HostShape, InputError
from foveate.methods.reduce.pyramiddrop import PyramidDrop
from reference import Decide, attention, kept, prompt_embeddings, run_layers, top
from stub import numbered, numbers, stage
from tiny import IMAGE, prompt, single, vlm

SETTINGS: dict[str, Any] = {"layers": (1, 2, 3), "keep": 0.7}


def ranking(
    model: Any, inputs: dict[str, Tensor], stages: dict[int, float], queries: list[int] | None = None,
    only_image: bool = False,
) -> Decide:  # fmt: skip
    """The card's rule, written out: places that stay after `stages` (layer -> what is left of V).

    Args:
        queries: places of the asking tokens, the last one if None.
        only_image: the wrong way, a softmax over the image columns alone.
    """
    ids = inputs["input_ids"][0].tolist()
    picture = [place for place, token in enumerate(ids) if token == IMAGE]

    def decide(layer: int, hidden: Tensor, index: list[int], positions: Tensor) -> list[int] | None:
        if layer not in stages:
            return None
        rows = [index.index(place) for place in (queries or [len(ids) - 1])]
        columns = [row for row, place in enumerate(index) if place in picture]
        weights = attention(model, layer, hidden, positions)[:, rows]
        if only_image:
            weights = weights / weights[..., columns].sum(-1, keepdim=True)
        score = weights.mean((0, 1))[columns]
        best = top(score, int(Fraction(str(stages[layer])).limit_denominator(10**6) * len(picture)))
        stay = {index[columns[j]] for j in best}
        return [place for place in index if place not in picture or place in stay]

    return decide


STAGES = {1: 0.7, 2: 0.49, 3: 0.343}
"""What SETTINGS come to."""


def visual_places(inputs: dict[str, Tensor]) -> list[int]:
    return (inputs["input_ids"][0] == IMAGE).nonzero().flatten().tolist()


def survivors(trace: list[Any], b: int = 0) -> list[list[int]]:
    return [kept(record.source)[b] for record in trace if record.stage.startswith("llm.layer")]


# -- the card's properties


@pytest.mark.parametrize("settings", [{"keep": 1.0}, {"layers": (1, 2), "keep": (1.0, 1.0)}, {"layers": ()}])
@torch.no_grad()
def test_ratios_of_1_or_no_layers_are_the_vanilla_model(settings: dict[str, Any]) -> None:
    host = vlm()
    given = prompt(host, [(2, 5), (1, 3)])
    dense = host(**given).logits
    with foveate.apply(host, PyramidDrop(**settings)):
        torch.testing.assert_close(host(**given).logits, dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep", [0.1, 0.29, 0.5, 0.7, 0.9, (0.5, 0.3, 0.3)])
@pytest.mark.parametrize("image", [16, 20, 28])
@torch.no_grad()
def test_counts_are_int_of_ratio_times_the_original_number(keep: Any, image: int) -> None:
    """V is 16, 25 or 49. Based on the previous count, 25 at 0.7 would go 17, 11, 7 instead of 17, 12, 8."""
    host, count = vlm(image=image), (image // 4) ** 2
    with foveate.apply(host, PyramidDrop(layers=(1, 2, 3), keep=keep)) as applied:
        host(**prompt(host, [(2, 5)]))
    ratios = keep if isinstance(keep, tuple) else [Fraction(str(keep)) ** (i + 1) for i in range(3)]
    expected = [int(Fraction(str(one)) * count) for one in ratios]
    found = [len(one) for one in survivors(applied.trace)]
    # Where nothing is left, no later stage acts.
    assert found + [0] * (3 - len(found)) == expected


def test_counts_of_few_tokens_go_down_to_0() -> None:
    tokens = numbered(1, (1, 5))
    for ratio, expected in ((0.5, 2), (0.2, 1), (0.19, 0), (0.125, 0)):
        method = PyramidDrop(layers=(8,), keep=(ratio,))
        at = stage(tokens, (1, 5), name="llm.layer", layer=8, text={8: torch.rand(1, 5)})
        assert len(numbers(method.shrink(tokens, at))[0]) == expected


def test_counts_of_the_papers_models() -> None:
    for count, expected in ((576, [288, 144, 72]), (2880, [1440, 720, 360]), (577, [288, 144, 72])):
        method, tokens, found = PyramidDrop(), numbered(1, (1, count)), []
        at = stage(tokens, (1, count), name="llm.layer", text=dict.fromkeys((8, 16, 24), torch.rand(1, count)))
        for layer in range(32):
            if layer in method.layers_at("llm.layer", at.host):
                tokens = method.shrink(tokens, type(at)(at.name, layer, at.host, at.signals, at.entered, at.active))
            found.append(tokens.x.shape[1])
            at.signals._given["text"] = dict.fromkeys((8, 16, 24), torch.rand(1, tokens.x.shape[1]))  # type: ignore
        assert found == [count] * 8 + [expected[0]] * 8 + [expected[1]] * 8 + [expected[2]] * 8


@pytest.mark.parametrize("name", ["clip-llama", "clip-qwen2", "siglip-llama"])
@torch.no_grad()
def test_the_whole_run_equals_the_plain_one(name: str) -> None:
    """Next layer's weights, softmax over all keys, text untouched, raster order, renumbered positions: all at once."""
    host = vlm(name)
    given = prompt(host, [(3, 6)])
    logits, index, entered = run_layers(
        host, prompt_embeddings(host, given), ranking(host, given, STAGES), renumber=True
    )
    inputs_of_layers: list[Tensor] = []
    with foveate.apply(host, PyramidDrop(**SETTINGS)) as applied:
        handles = [
            layer.self_attn.register_forward_pre_hook(
                lambda m, a, k: inputs_of_layers.append(k.get("hidden_states", a[0] if a else None)), with_kwargs=True
            )
            for layer in host.model.language_model.layers
        ]
        result = host(**given).logits[0]
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(result[index], logits, rtol=1e-4, atol=1e-4)
    places = visual_places(given)
    assert [places[patch] for patch in survivors(applied.trace)[-1]] == [p for p in index if p in places]
    for layer, (ours, plain) in enumerate(zip(inputs_of_layers, entered)):
        normed = host.model.language_model.layers[layer].input_layernorm(plain)
        torch.testing.assert_close(ours, normed, rtol=1e-4, atol=1e-4)
    assert [state.shape[1] for state in entered] == [9 + n for n in (16, 11, 7, 5)]


@torch.no_grad()
def test_text_is_never_touched_and_images_keep_raster_order() -> None:
    host = vlm()
    given = prompt(host, [(2, 4, 5)])  # two pictures
    seen: list[Any] = []
    with foveate.apply(host, PyramidDrop(**SETTINGS)) as applied:
        handles = [
            layer.register_forward_pre_hook(lambda m, a, k: seen.append(k["position_ids"]), with_kwargs=True)
            for layer in host.model.language_model.layers
        ]
        cache = host(**given).past_key_values
        for handle in handles:
            handle.remove()
    lengths = [11 + count for count in (32, 22, 15, 10)]
    assert [layer.keys.shape[2] for layer in cache.layers] == lengths
    assert [position.tolist() for position in seen] == [[list(range(length))] for length in lengths]
    for record in applied.trace:
        carriers = record.source[0][record.source[0] >= 0]
        assert carriers.tolist() == sorted(carriers.tolist())


@torch.no_grad()
def test_survivors_are_nested() -> None:
    host = vlm()
    with foveate.apply(host, PyramidDrop(**SETTINGS)) as applied:
        host(**prompt(host, [(2, 5), (4, 3)]))
    for b in range(2):
        stages = survivors(applied.trace, b)
        assert len(stages) == 3 and all(set(later) < set(earlier) for earlier, later in pairwise(stages))


@pytest.mark.parametrize("name", ["clip-llama", "clip-qwen2"])
@torch.no_grad()
def test_decoding_equals_a_run_over_prompt_and_answer_with_the_same_kept_sets(name: str) -> None:
    """Cache consistency, positions included: every layer holds its stage's tokens, the new one follows on."""
    host = vlm(name)
    given = prompt(host, [(3, 6)])
    embeds = prompt_embeddings(host, given)
    answer = [7, 20, 33]
    with foveate.apply(host, PyramidDrop(**SETTINGS)) as applied:
        first = host(**given, use_cache=True)
        chosen = [[visual_places(given)[patch] for patch in stage] for stage in survivors(applied.trace)]
        cache, steps = first.past_key_values, []
        mask = given["attention_mask"]
        for token in answer:
            mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
            step = host(input_ids=torch.tensor([[token]]), attention_mask=mask, past_key_values=cache, use_cache=True)
            steps.append(step.logits[0, -1])
    assert [layer.keys.shape[2] for layer in cache.layers] == [9 + 3 + n for n in (16, 11, 7, 5)]
    visual = set(visual_places(given))

    def decide(layer: int, hidden: Tensor, index: list[int], positions: Tensor) -> list[int] | None:
        return [place for place in index if place not in visual or place in chosen[layer - 1]] if layer else None

    longer = torch.cat([embeds, host.get_input_embeddings()(torch.tensor([answer]))], 1)
    logits, _, _ = run_layers(host, longer, decide, renumber=True)
    torch.testing.assert_close(torch.stack(steps), logits[-3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_a_batch_of_different_lengths_equals_single_runs(padding: str) -> None:
    """Padding rows never survive: the counts and the chosen patches are those of the sample alone."""
    host = vlm()
    given = prompt(host, [(2, 9), (1, 3), (0, 2, 4)], padding=padding)
    with foveate.apply(host, PyramidDrop(**SETTINGS)) as applied:
        together = host.model(**given).last_hidden_state
        stages = [survivors(applied.trace, b) for b in range(3)]
        for b in range(3):
            real = given["attention_mask"][b].bool()
            alone = host.model(**single(host, given, b)).last_hidden_state[0]
            assert survivors(applied.trace) == stages[b]
            torch.testing.assert_close(together[b, real], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_score_uses_the_weights_of_the_next_layer() -> None:
    host = vlm()
    given = prompt(host, [(2, 5)])
    layers = host.model.language_model.layers

    def chosen(spoil: int | None = None, before: bool = False) -> list[list[int]]:
        """Survivors of the stage after 2 layers, with layer `spoil`'s queries and keys spoilt after (before) it ran."""
        saved = {k: v.clone() for k, v in host.state_dict().items()}

        def scramble(*_: Any) -> None:
            for name in ("q_proj", "k_proj"):
                weight = getattr(layers[spoil].self_attn, name).weight
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))

        with foveate.apply(host, PyramidDrop(layers=(2,), keep=0.5)) as applied:
            handle = None
            if spoil is not None and before:
                scramble()
            elif spoil is not None:
                handle = layers[spoil].register_forward_hook(scramble)
            host(**given)
            if handle:
                handle.remove()
        host.load_state_dict(saved)
        return survivors(applied.trace)

    plain = chosen()
    assert chosen(spoil=1) == plain
    assert chosen(spoil=2, before=True) != plain
    assert chosen(spoil=3, before=True) == plain


@torch.no_grad()
def test_samples_without_a_picture_are_left_alone() -> None:
    host = vlm()
    given = prompt(host, [(2, 5), (9,), (3, 4)])
    real = given["attention_mask"][1].bool()
    dense = host(**given).logits[1, real]
    text_only = prompt(host, [(6,)])
    plain = host(**text_only).logits
    with foveate.apply(host, PyramidDrop(**SETTINGS)) as applied:
        torch.testing.assert_close(host(**given).logits[1, real], dense, rtol=1e-4, atol=1e-4)
        assert [record.tokens_out[1] for record in applied.trace] == [0] * 4
        assert torch.equal(host(**text_only).logits, plain)


# -- training


def labelled(given: dict[str, Tensor], answers: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
    """Labels for spans (first, last + 1) of each sample, from the end of the prompt."""
    labels = torch.full_like(given["input_ids"], -100)
    for b, spans in enumerate(answers):
        for start, end in spans:
            labels[b, start:end] = given["input_ids"][b, start:end]
    return {**given, "labels": labels}


@torch.no_grad()
def test_in_training_samples_without_an_answer_are_left_unpruned() -> None:
    host = vlm()
    given = labelled(prompt(host, [(2, 6), (2, 6)]), [[(-3, -1)], []])
    real = given["attention_mask"][1].bool()
    dense = host(**given).logits[1, real]
    with foveate.apply(host, PyramidDrop(**SETTINGS)) as applied:
        result = host(**given).logits[1, real]
    torch.testing.assert_close(result, dense, rtol=1e-4, atol=1e-4)
    assert [record.tokens_out for record in applied.trace] == [(16, 16), (11, 16), (7, 16), (5, 16)]


@torch.no_grad()
def test_in_training_the_rows_before_every_answer_are_averaged() -> None:
    host, differs = vlm(), 0
    for seed in range(4):
        plain = prompt(host, [(2, 12)], seed=seed)
        given = labelled(plain, [[(-9, -7), (-3, -1)]])
        length = plain["input_ids"].shape[1]
        # The position right before each supervised span.
        asking = [length - 10, length - 4]
        with foveate.apply(host, PyramidDrop(layers=(2,), keep=0.5)) as applied:
            host(**given)
        expected = []
        for queries in (asking, asking[:1], asking[1:], None):
            rule = ranking(host, plain, {2: 0.5}, queries)
            _, index, _ = run_layers(host, prompt_embeddings(host, plain), rule, renumber=True)
            expected.append([place - 2 for place in index if place in visual_places(plain)])
        assert survivors(applied.trace) == [expected[0]]
        differs += expected[0] not in expected[1:]
    assert differs


def test_no_gradient_passes_through_the_ranking() -> None:
    """Gradients are those of a run in which the kept sets are given."""
    host = vlm()
    given = labelled(prompt(host, [(3, 6)]), [[(-3, -1)]])
    scores: list[Tensor] = []
    rank = LanguageSignals.text_to_vision

    with foveate.apply(host, PyramidDrop(layers=(2,), keep=0.5)) as applied, pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageSignals, "text_to_vision", lambda self, n: (scores.append(rank(self, n)), scores[-1])[1])
        host(**given).logits[0, -1].square().sum().backward()
    assert len(scores) == 1 and not scores[0].requires_grad
    stay = {visual_places(given)[patch] for patch in survivors(applied.trace)[0]}
    visual = set(visual_places(given))
    ours = {name: weight.grad.clone() for name, weight in host.named_parameters() if weight.grad is not None}
    host.zero_grad()

    def decide(layer: int, hidden: Tensor, index: list[int], positions: Tensor) -> list[int] | None:
        return [place for place in index if place not in visual or place in stay] if layer == 2 else None

    plain = {name: value for name, value in given.items() if name != "labels"}
    logits, _, _ = run_layers(host, prompt_embeddings(host, plain), decide, renumber=True)
    logits[-1].square().sum().backward()
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = f"model.language_model.layers.2.self_attn.{name}.weight"
        torch.testing.assert_close(ours[weight], host.get_parameter(weight).grad, rtol=1e-3, atol=1e-4)


# -- traps


@torch.no_grad()
def test_the_softmax_is_over_all_keys_before_heads_are_averaged() -> None:
    """Over the image columns alone the ranking would differ, for some pictures."""
    host, differs = vlm(), 0
    for seed in range(6):
        given = prompt(host, [(2, 6)], seed=seed)
        embeds = prompt_embeddings(host, given)
        with foveate.apply(host, PyramidDrop(layers=(1,), keep=0.5)) as applied:
            host(**given)
        right, wrong = (
            [p - 2 for p in run_layers(host, embeds, rule, renumber=True)[1] if p in visual_places(given)]
            for rule in (ranking(host, given, {1: 0.5}), ranking(host, given, {1: 0.5}, only_image=True))
        )
        assert survivors(applied.trace) == [right]
        differs += right != wrong
    assert differs


@torch.no_grad()
def test_after_s_layers_is_before_the_layer_with_the_number_s() -> None:
    host = vlm()
    with foveate.apply(host, PyramidDrop(layers=(2,))) as applied:
        cache = host(**prompt(host, [(2, 5)])).past_key_values
    assert [record.stage for record in applied.trace] == ["llm.input", "llm.layer[2]"]
    assert [layer.keys.shape[2] for layer in cache.layers] == [23, 23, 15, 15]


def test_shares_of_the_depth_are_the_papers_layers() -> None:
    host = HostShape("hf-vlm", (), 24, 22, 1, (24, 24), llm_layers=32)
    assert PyramidDrop().layers_at("llm.layer", host) == {8: 0.5, 16: 0.25, 24: 0.125}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (1, 1)}, "repeat"), ({"layers": 8}, "layers"), ({"layers": (0,)}, "layers"),
        ({"layers": (1.0,)}, "layers"), ({"keep": (0.5, 0.25)}, "keep has 2 ratios for 3"),
        ({"keep": (0.5, 0.6, 0.1)}, "keep must not grow"), ({"keep": (0.5, 0.5, 0.0)}, "keep"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PyramidDrop(**settings)


@pytest.mark.parametrize("layers", [(4,), (3, 1), (0.1,), (2, 0.5)])
def test_layers_that_the_host_does_not_have(layers: Any) -> None:
    host = vlm()
    with pytest.raises(InputError, match="layers"):
        foveate.apply(host, PyramidDrop(layers=layers))
    assert not any(module._forward_pre_hooks for module in host.modules())
