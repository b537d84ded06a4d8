"""VAR against its card: the edit against slow loops, whole runs against the model's layers taken one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.measure.flops import count_flops
from foveate.method import HostShape, InputError, Method, Stage
from foveate.methods.guide.var_sink import VarSink, sink_score
from foveate.nn.calls import AttentionCall
from foveate.tokens import Tokens
from reference import attention, prompt_embeddings
from stub import HOST, numbered, stage
from tiny import IMAGE, prompt, single, vlm

TAU, DIMENSIONS = 1.5, (3, 17)
SETTINGS: dict[str, Any] = {"tau": TAU, "dimensions": DIMENSIONS, "minimum": 0.1}
"""On random weights, 32 wide, about a quarter of all tokens is a sink: phi cannot be above 5.7 there."""


# -- one row, by loops


def edit_row(
    row: list[float], visual: set[int], sinks: set[int], *, rho: float = 0.5, kept: float = 0.6, minimum: float = 0.2,
    paper_test: bool = False,
) -> list[float] | None:  # fmt: skip
    """The new weights of one head for one query; None where it is left alone."""
    on_picture = sum(row[j] for j in visual)
    held = sum(row[j] for j in visual & sinks) / sum(row[j] + 1e-6 for j in visual)
    rest = sum(row[j] for j in visual - sinks)
    if not visual & sinks or on_picture < minimum or rest == 0:
        return None
    if (1 - held < rho) if paper_test else (held > rho):
        return None
    budget = sum((1 - kept) * row[j] for j in sinks)
    return [
        row[j] * kept if j in sinks else row[j] + budget * row[j] / rest if j in visual else row[j]
        for j in range(len(row))
    ]


def mask_of(places: set[int], length: int) -> Tensor:
    return torch.tensor([[j in places for j in range(length)]])


VISUAL, SINKS = set(range(3, 9)), {0, 4, 7, 10}
"""Of 12 keys. Sinks: the first token, two visual ones, one of the text after."""


def random_rows(seed: int = 0, sharp: float = 2.0) -> Tensor:
    """(1, 4, 40, 12), rows of every kind: about the picture, about sinks, about neither."""
    return (sharp * torch.randn(1, 4, 40, 12, generator=torch.Generator().manual_seed(seed))).softmax(-1)


@pytest.mark.parametrize("rho_test", ["released", "paper"])
@pytest.mark.parametrize("p_means", ["released", "paper"])
@pytest.mark.parametrize(("rho", "p", "minimum"), [(0.5, 0.6, 0.2), (0.8, 0.3, 0.5), (0.25, 0.0, 0.0), (0.9, 1.0, 0.2)])
def test_edited_rows_equal_the_loop(rho: float, p: float, minimum: float, rho_test: str, p_means: str) -> None:
    """Both readings of rho and of p; rows that are not selected are bit for bit what they were."""
    method = VarSink(rho=rho, p=p, minimum=minimum, rho_test=rho_test, p_means=p_means)
    rows = random_rows()
    ours, changed = method.edit(rows, mask_of(VISUAL, 12), mask_of(SINKS, 12))
    kept = p if p_means == "released" else 1 - p
    seen = set()
    for h in range(4):
        for k in range(40):
            expected = edit_row(
                rows[0, h, k].double().tolist(), VISUAL, SINKS, rho=rho, kept=kept, minimum=minimum,
                paper_test=rho_test == "paper",
            )  # fmt: skip
            seen.add(expected is None)
            assert bool(changed[0, h, k]) == (expected is not None)
            if expected is None:
                assert torch.equal(ours[0, h, k], rows[0, h, k])
            else:
                torch.testing.assert_close(ours[0, h, k].double(), torch.tensor(expected).double(), rtol=1e-5, atol=0)
    assert seen == {True, False}
    # Budget taken is budget given.
    torch.testing.assert_close(ours.sum(-1), torch.ones(1, 4, 40), rtol=0, atol=1e-6)


def test_both_readings_of_rho_are_one_at_a_half_and_two_elsewhere() -> None:
    rows, visual, sinks = random_rows(), mask_of(VISUAL, 12), mask_of(SINKS, 12)
    selected = {
        (rho, test): VarSink(rho=rho, rho_test=test).edit(rows, visual, sinks)[1]
        for rho in (0.5, 0.8) for test in ("released", "paper")
    }  # fmt: skip
    assert torch.equal(selected[0.5, "released"], selected[0.5, "paper"])
    assert selected[0.8, "released"].sum() > selected[0.8, "paper"].sum() > 0


def test_the_default_moves_two_fifths_and_the_papers_reading_three() -> None:
    """One sink of weight 0.1 beside a visual token: 0.04 or 0.06 go over."""
    row = torch.tensor([[[[0.1, 0.3, 0.6]]]])
    visual, sinks = torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])
    for p_means, given in (("released", 0.04), ("paper", 0.06)):
        ours, _ = VarSink(p_means=p_means).edit(row, visual, sinks)
        torch.testing.assert_close(ours, torch.tensor([[[[0.1 - given, 0.3 + given, 0.6]]]]))


def test_ratios_among_sinks_among_receivers_and_other_text_stay() -> None:
    rows = random_rows()
    ours, changed = VarSink().edit(rows, mask_of(VISUAL, 12), mask_of(SINKS, 12))
    assert changed.any()
    before, after = rows[changed].double(), ours[changed].double()
    for group in (sorted(SINKS), sorted(VISUAL - SINKS)):
        factor = after[:, group] / before[:, group]
        torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-5, atol=0)
    text = sorted(set(range(12)) - SINKS - VISUAL)
    assert torch.equal(ours[changed][:, text], rows[changed][:, text])


def test_text_sinks_pay_too() -> None:
    row = torch.tensor([[[[0.4, 0.1, 0.3, 0.2]]]])  # text sink, visual sink, visual, text
    visual, sinks = torch.tensor([[False, True, True, False]]), torch.tensor([[True, True, False, False]])
    ours, _ = VarSink().edit(row, visual, sinks)
    torch.testing.assert_close(ours, torch.tensor([[[[0.24, 0.06, 0.5, 0.2]]]]))


def test_a_visual_mass_of_019_is_skipped_and_020_taken() -> None:
    for mass, taken in ((0.19, False), (0.2, True)):
        row = torch.tensor([[[[0.0, mass, 1 - mass]]]])
        visual, sinks = torch.tensor([[True, True, False]]), torch.tensor([[True, False, True]])
        assert bool(VarSink().edit(row, visual, sinks)[1]) == taken


def test_the_head_test_adds_a_millionth_to_every_visual_weight() -> None:
    """Sinks hold 0.50005 of the picture's weight; with 576e-6 more in the denominator that is 0.4986."""
    length = 576
    row = torch.zeros(1, 1, 1, length + 1)
    row[..., 0], row[..., 1], row[..., length] = 0.2 * 0.50005, 0.2 * 0.49995, 0.8
    for count, taken in ((length, True), (2, False)):
        visual = torch.arange(length + 1)[None] < count
        sinks = torch.arange(length + 1)[None] == 0
        assert bool(VarSink(minimum=0.1).edit(row, visual, sinks)[1]) == taken


def test_without_a_receiver_the_row_stays() -> None:
    """All visual tokens are sinks, or those that are none have no weight at all."""
    row = torch.tensor([[[[0.3, 0.3, 0.4]]]])
    visual = torch.tensor([[True, True, False]])
    for rows, sinks in ((row, [[True, True, False]]), (torch.tensor([[[[0.6, 0.0, 0.4]]]]), [[True, False, False]])):
        ours, changed = VarSink(rho=1.0).edit(rows, visual, torch.tensor(sinks))
        assert torch.equal(ours, rows) and not changed.any() and ours.isfinite().all()


def test_without_a_visual_sink_no_row_is_touched() -> None:
    rows = random_rows()
    ours, changed = VarSink().edit(rows, mask_of(VISUAL, 12), mask_of({0, 10}, 12))
    assert torch.equal(ours, rows) and not changed.any()


def test_what_is_not_seen_stays_unseen() -> None:
    """Giving in proportion keeps zeros: of a causal row, its future."""
    rows = random_rows()
    rows[..., 8:] = 0
    rows = rows / rows.sum(-1, keepdim=True)
    ours, changed = VarSink().edit(rows, mask_of(VISUAL, 12), mask_of(SINKS, 12))
    assert changed.any() and ours[..., 8:].eq(0).all()


# -- which tokens are sinks


def phi(state: Tensor, dimensions: tuple[int, ...]) -> float:
    values = state.double().tolist()
    scale = (sum(v * v for v in values) / len(values) + 1e-6) ** 0.5
    return max(abs(values[d]) for d in dimensions) / scale


def test_phi_is_the_closed_form_and_does_not_depend_on_scale() -> None:
    states = 3 * torch.randn(2, 5, 32)
    dimensions = torch.zeros(2, 32, dtype=torch.bool)
    dimensions[0, [3, 17]] = dimensions[1, [5]] = True
    ours = sink_score(states, dimensions)
    for b, chosen in enumerate(((3, 17), (5,))):
        for s in range(5):
            assert float(ours[b, s]) == pytest.approx(phi(states[b, s], chosen), rel=1e-5)
    torch.testing.assert_close(sink_score(250 * states, dimensions), ours, rtol=1e-4, atol=0)
    half = states.bfloat16()
    torch.testing.assert_close(sink_score(half, dimensions), sink_score(half.float(), dimensions))


class StatesOnly:
    """Signals of "llm.layer": what enters, where visual tokens stand, what is prompt."""

    def __init__(self, states: Tensor, slots: Tensor, prompt: Tensor | None = None) -> None:
        self._states, self._slots = states, slots
        self._prompt = torch.ones(states.shape[:2], dtype=torch.bool) if prompt is None else prompt

    def states(self) -> Tensor:
        return self._states

    def slots(self) -> Tensor:
        return self._slots

    def prompt(self) -> Tensor:
        return self._prompt


def found(method: Method, states: Tensor, *, layer: int = 5, host: HostShape = HOST) -> tuple[list[int], list[int]]:
    """(patches, words) that are sinks in the only sample (1, S, D); four visual tokens stand at 2..5."""
    tokens, slots = numbered(1, (2, 2)), torch.arange(2, 6)[None]
    signals: Any = StatesOnly(states, slots)
    at = Stage("llm.layer", layer, host, signals, tokens.count, torch.ones(1, dtype=torch.bool))
    assert method.find(tokens, at) is tokens  # type: ignore[attr-defined]
    (noted,) = at.memory.values()
    patches, words = (one[0].nonzero().flatten().tolist() for one in noted)
    return patches, words


def planted(width: int, places: dict[int, tuple[int, ...]], length: int = 9) -> Tensor:
    """(1, length, width) noise in which the tokens at `places` have massive activations in the given dimensions."""
    states = torch.randn(1, length, width, generator=torch.Generator().manual_seed(3))
    for place, dimensions in places.items():
        states[0, place, list(dimensions)] = 1000.0
    return states


def test_other_models_sink_dimensions_are_the_massive_ones_of_the_first_token() -> None:
    """Dimension 700 is massive at the first token; 900, at a patch alone, is not one of the model's."""
    states = planted(2048, {0: (700,), 3: (700, 11), 5: (900,), 7: (700,)})
    assert found(VarSink(), states) == ([1], [0, 3])
    assert found(VarSink(dimensions=(900,)), states) == ([3], [])
    assert found(VarSink(), planted(2048, {3: (700,)})) == ([], [])


def test_llama_2_has_the_dimensions_of_the_release() -> None:
    """Both are taken where the first token shows one of them; another model of that shape is found out."""
    states = planted(4096, {0: (1415,), 3: (2533,), 4: (700,)})
    assert found(VarSink(), states) == ([1], [0])
    assert found(VarSink(), planted(4096, {0: (700,), 3: (2533,), 4: (700,)})) == ([2], [0])
    big = HostShape("hf-vlm", (), 24, 22, 1, (24, 24), 40)
    assert found(VarSink(), planted(5120, {0: (4743,), 3: (2100,)}), host=big) == ([1], [0])


def test_a_dimension_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(InputError, match="this model is 32 wide"):
        found(VarSink(dimensions=(32,)), torch.randn(1, 9, 32))


# -- whole runs, one sample, layer by layer


def by_hand(
    host: Any, embeds: Tensor, visual: set[int], prompted: int, *, layers: tuple[int, ...], of_all: bool = False,
    gain: bool = False, gone: set[int] = frozenset(), **settings: Any,
) -> tuple[Tensor, list[set[int]]]:  # fmt: skip
    """Logits (S, V) with redistribution in `layers`, and the sinks of each of these.

    Sinks are among the first `prompted` tokens (with `of_all` among all); `gain` is the mistake of using the layer's
    own norm. Tokens after the prompt do not see those in `gone`.
    """
    language = host.model.language_model
    hidden, positions, sets = embeds, torch.arange(embeds.shape[1])[None], []
    for number, block in enumerate(language.layers):
        normed, module = block.input_layernorm(hidden), block.self_attn
        weights = attention(host, number, hidden, positions)
        weights[:, prompted:, sorted(gone)] = 0
        weights /= weights.sum(-1, keepdim=True)
        if number in layers:
            states = (normed if gain else hidden)[0]
            among = range(len(states) if of_all else prompted)
            sinks = {s for s in among if phi(states[s], DIMENSIONS) > TAU}
            sets.append(sinks)
            for h in range(len(weights)):
                for q in range(max(visual) + 1, weights.shape[1]):
                    edited = edit_row(weights[h, q].tolist(), visual, sinks, minimum=0.1, **settings)
                    if edited is not None:
                        weights[h, q] = torch.tensor(edited, dtype=weights.dtype)
        value = module.v_proj(normed)[0].unflatten(-1, (-1, module.head_dim)).transpose(0, 1)
        value = value.repeat_interleave(len(weights) // len(value), 0)
        mixed = (weights.float() @ value).transpose(0, 1).flatten(1)
        hidden = hidden + module.o_proj(mixed)[None]
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return host.lm_head(language.norm(hidden))[0], sets


def places_of(given: dict[str, Tensor]) -> set[int]:
    return set((given["input_ids"][0] == IMAGE).nonzero().flatten().tolist())


@pytest.mark.parametrize("name", ["clip-llama", "clip-qwen2", "siglip-llama"])
@pytest.mark.parametrize("last_layer", [False, True])
@torch.no_grad()
def test_a_whole_run_equals_the_layers_by_hand(name: str, last_layer: bool) -> None:
    """Sinks of the layer's input by the plain norm, the same layer's attention, layers 2 on, the last by the switch."""
    host = vlm(name, layers=5)
    given = prompt(host, [(3, 6)])
    embeds, visual = prompt_embeddings(host, given), places_of(given)
    layers = (2, 3, 4) if last_layer else (2, 3)
    expected, sets = by_hand(host, embeds, visual, 25, layers=layers)
    assert any(one & visual and one - visual for one in sets), "sinks of both kinds"
    wrong, _ = by_hand(host, embeds, visual, 25, layers=layers, gain=True)
    dense = host(**given).logits[0]
    with foveate.apply(host, VarSink(**SETTINGS, last_layer=last_layer)):
        ours = host(**given).logits[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    for other in (dense, wrong):
        assert (ours - other).abs().max() > 1e-2


@torch.no_grad()
def test_the_papers_conventions_in_a_whole_run() -> None:
    host = vlm(layers=5)
    given = prompt(host, [(3, 6)])
    embeds, visual = prompt_embeddings(host, given), places_of(given)
    expected, _ = by_hand(host, embeds, visual, 25, layers=(2, 3), rho=0.8, kept=0.4, paper_test=True)
    with foveate.apply(host, VarSink(**SETTINGS, rho=0.8, rho_test="paper", p_means="paper")):
        torch.testing.assert_close(host(**given).logits[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"p": 1.0}, {"p": 0.0, "p_means": "paper"}, {"tau": 1e9}, {"dimensions": "auto", "tau": 5.7}]
)
@torch.no_grad()
def test_identities(settings: dict[str, Any]) -> None:
    """Nothing is given away, or no activation is ever that large (5.7 is above the square root of the width)."""
    host = vlm(layers=5)
    given = prompt(host, [(3, 6), (1, 4)])
    dense = host(**given).logits
    with foveate.apply(host, VarSink(**SETTINGS | settings)):
        assert torch.equal(host(**given).logits, dense)


@torch.no_grad()
def test_queries_up_to_the_end_of_the_picture_are_never_edited() -> None:
    """What they lead to is bit for bit what it was; of several pictures it is the last that counts."""
    host = vlm(layers=5)
    given = prompt(host, [(3, 4, 6)])
    end = max(places_of(given)) + 1
    dense = host(**given).logits[0]
    with foveate.apply(host, VarSink(**SETTINGS)):
        ours = host(**given).logits[0]
    assert torch.equal(ours[:end], dense[:end])
    assert (ours[end:] - dense[end:]).abs().amax(1).gt(1e-3).all()


@torch.no_grad()
def test_decoding_uses_the_sinks_of_the_prefill() -> None:
    """New tokens are edited and are never sinks, though by their own states some would be."""
    host = vlm(layers=5)
    given = prompt(host, [(3, 6)])
    embeds, visual = prompt_embeddings(host, given), places_of(given)
    answer = [7, 20, 33, 41, 8]
    longer = torch.cat([embeds, host.get_input_embeddings()(torch.tensor([answer]))], 1)
    expected, _ = by_hand(host, longer, visual, 25, layers=(2, 3))
    wrong, sets = by_hand(host, longer, visual, 25, layers=(2, 3), of_all=True)
    assert any(max(one) >= 25 for one in sets) and (wrong - expected)[-1].abs().max() > 1e-3
    steps = []
    with foveate.apply(host, VarSink(**SETTINGS)):
        cache = host(**given, use_cache=True).past_key_values
        for token in answer:
            steps.append(host(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0])
    torch.testing.assert_close(torch.cat(steps), expected[-5:], rtol=1e-4, atol=1e-4)
    assert [layer.keys.shape[2] for layer in cache.layers] == [30] * 5


@pytest.mark.parametrize("name", ["clip-llama", "next"])
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generate_with_the_cache_equals_generate_without(name: str, beams: int) -> None:
    host = vlm(name, layers=5)
    given = prompt(host, [(2, 6), (1, 3)], sizes=[(24, 12), (16, 30)] if name == "next" else None)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    dense = host.generate(**given, **settings)
    with foveate.apply(host, VarSink(**SETTINGS, p=0.0, rho=1.0)):
        cached, whole = (host.generate(**given, **settings, use_cache=used) for used in (True, False))
    assert torch.equal(cached, whole) and not torch.equal(cached, dense)


@torch.no_grad()
def test_conversations_do_not_share_their_sinks() -> None:
    host = vlm(layers=5)
    one, two = prompt(host, [(2, 6)], seed=0), prompt(host, [(3, 4)], seed=1)
    token = {"input_ids": torch.tensor([[9]])}
    with foveate.apply(host, VarSink(**SETTINGS)):
        alone = host(**token, past_key_values=host(**one, use_cache=True).past_key_values).logits
        first = host(**one, use_cache=True).past_key_values
        host(**token, past_key_values=host(**two, use_cache=True).past_key_values)
        torch.testing.assert_close(host(**token, past_key_values=first).logits, alone)


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_a_batch_equals_single_runs(padding: str) -> None:
    """Different lengths, one and two pictures, and none."""
    host = vlm(layers=5)
    given = prompt(host, [(2, 9), (1, 3), (0, 2, 4), (7,)], padding=padding)
    for dimensions in (DIMENSIONS, "auto"):
        with foveate.apply(host, VarSink(tau=TAU, dimensions=dimensions, minimum=0.1)):
            together = host(**given).logits
            for b in range(4):
                alone = host(**single(host, given, b)).logits[0]
                torch.testing.assert_close(together[b, given["attention_mask"][b].bool()], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sinks_are_found_again_when_visual_tokens_leave_the_cache() -> None:
    """Beside a method that drops every third visual token from the cache: as if decoding could not see them."""
    from foveate.method import Card, at

    class Dropping(Method):
        card = Card(slug="dropping", title="for tests", arxiv="", kind="reduce", hosts=("hf-vlm",), summary="for tests")
        renumbers = False

        @at("llm.decode")
        def drop(self, tokens: Tokens, at: Stage) -> Tokens:
            return tokens.keep(torch.tensor([[j for j in range(16) if j % 3]]))

    host = vlm(layers=5)
    given = prompt(host, [(3, 6)])
    embeds, visual = prompt_embeddings(host, given), places_of(given)
    longer = torch.cat([embeds, host.get_input_embeddings()(torch.tensor([[9]]))], 1)
    gone = {3 + j for j in range(0, 16, 3)}
    expected, sets = by_hand(host, longer, visual, 25, layers=(2, 3), gone=gone)
    assert all(one & visual - gone for one in sets)
    with foveate.apply(host, [VarSink(**SETTINGS), Dropping()]):
        cache = host(**given, use_cache=True).past_key_values
        ours = host(input_ids=torch.tensor([[9]]), past_key_values=cache).logits[0]
    assert cache.layers[0].keys.shape[2] == 25 - 6 + 1
    torch.testing.assert_close(ours, expected[-1:], rtol=1e-4, atol=1e-4)


# -- cost, training, budgets


@torch.no_grad()
def test_the_model_runs_as_before_and_only_rows_after_the_picture_are_made_again() -> None:
    """Two products, of the rows after the picture with all keys, in each edited layer; nothing else."""
    host = vlm(layers=6)
    given = prompt(host, [(3, 6)])
    plain = count_flops(lambda: host(**given, logits_to_keep=1))
    embeds, visual = prompt_embeddings(host, given), places_of(given)
    _, sets = by_hand(host, embeds, visual, 25, layers=(2, 3, 4))
    assert all(one & visual for one in sets)
    with foveate.apply(host, VarSink(**SETTINGS)) as applied:
        ours = count_flops(lambda: host(**given, logits_to_keep=1))
    assert ours - plain == 3 * 2 * (2 * 6 * 25 * 32)
    assert [record.stage for record in applied.trace] == ["llm.input"]


def test_long_texts_are_edited_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    host = vlm(layers=5)
    given = prompt(host, [(3, 11), (2, 5)])
    with torch.no_grad(), foveate.apply(host, VarSink(**SETTINGS)):
        whole = host(**given).logits
        monkeypatch.setattr("foveate.methods.guide.var_sink._BLOCK", 2 * 4 * 30 * 3)
        rows: list[int] = []
        weights = AttentionCall.weights

        def noting(call: AttentionCall, part: Tensor) -> Tensor:
            rows.append(len(part))
            return weights(call, part)

        monkeypatch.setattr(AttentionCall, "weights", noting)
        torch.testing.assert_close(host(**given).logits, whole)
    assert set(rows) == {2, 3}


def test_gradients_are_those_of_the_edited_attention() -> None:
    """Against the run by hand, which is differentiable too; sinks are no part of the graph."""
    host = vlm(layers=5)
    given = prompt(host, [(3, 6)])
    with torch.no_grad():
        embeds = prompt_embeddings(host, given)
    with foveate.apply(host, VarSink(**SETTINGS)):
        host(**given).logits[0, -1].square().sum().backward()
    weight = host.model.language_model.layers[2].self_attn.v_proj.weight
    ours = weight.grad.clone()
    assert all(p.grad is None or p.grad.isfinite().all() for p in host.parameters())
    with foveate.apply(host, "dense"):
        host.zero_grad()
        host(**given).logits[0, -1].square().sum().backward()
    dense = weight.grad.clone()
    host.zero_grad()
    step = 1e-2
    # A directional derivative of the run by hand, in float32: good to a few hundredths.
    direction = ours / ours.norm()
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            weight += sign * step * direction
            logits, _ = by_hand(host, embeds, places_of(given), 25, layers=(2, 3))
            losses.append(float(logits[-1].double().square().sum()))
            weight -= sign * step * direction
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx(float(ours.norm()), rel=0.05)
    assert (ours - dense).norm() > 0.1 * dense.norm()


def test_it_spends_no_budget_but_the_whole() -> None:
    assert VarSink.for_budget(1, HOST).hyperparameters() == VarSink().hyperparameters()
    with pytest.raises(InputError, match="does not reduce tokens"):
        VarSink.for_budget(0.5, HOST)


@pytest.mark.parametrize("settings", [{"dimensions": ()}, {"dimensions": (3, -1)}, {"dimensions": 1415}])
def test_dimensions_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="dimensions"):
        VarSink(**settings)


def test_a_language_model_without_layers_between_is_refused() -> None:
    with pytest.raises(InputError, match="this host has 3"):
        foveate.apply(vlm(layers=3), VarSink())
    foveate.apply(vlm(layers=3), VarSink(last_layer=True)).remove()


def test_the_last_layer_is_left_out_unless_asked_for() -> None:
    tokens = numbered(1, (2, 2))
    for last_layer, expected in ((False, [*range(2, 31)]), (True, [*range(2, 32)])):
        acting = []
        for layer in range(32):
            signals: Any = StatesOnly(torch.randn(1, 9, 32), torch.arange(2, 6)[None])
            at = Stage("llm.layer", layer, HOST, signals, tokens.count, torch.ones(1, dtype=torch.bool))
            method = VarSink(last_layer=last_layer)
            if layer in method.layers_at("llm.layer", HOST):
                method.find(tokens, at)
            acting += [layer] * len(at.memory)
        assert acting == expected


def test_samples_that_methods_must_leave_alone_have_no_sinks() -> None:
    tokens = numbered(2, (2, 2))
    states = torch.randn(2, 9, 32)
    states[..., 3] = 100.0
    signals: Any = StatesOnly(states, torch.arange(2, 6).expand(2, -1))
    at = Stage("llm.layer", 2, HOST, signals, tokens.count, torch.tensor([True, False]))
    VarSink(tau=1.0, dimensions=(3,)).find(tokens, at)
    by_patch, by_word = at.memory["var-sink[2]"]
    assert by_patch.tolist() == [[True] * 4, [False] * 4] and by_word.any(1).tolist() == [True, False]
    assert isinstance(stage(tokens), Stage)
