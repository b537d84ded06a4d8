"""YOPO against its card, and against a plain run of the language model that masks weights and hidden units."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import foveate
from foveate.measure.claims import Checked, count
from foveate.measure.flops import count_flops
from foveate.measure.memory import kv_lengths
from foveate.method import HostShape, InputError
from foveate.methods.reduce.globalcom2 import GlobalCom2
from foveate.methods.reduce.yopo import HeadVotes, Yopo
from foveate.nn.calls import AttentionCall, MlpCall
from foveate.tokens import Tokens
from reference import prompt_embeddings, rotated
from stub import stage
from tiny import IMAGE, prompt, single, vlm

Place = tuple[int, int, int]
"""(crop, row, column)."""

SOME: tuple[tuple[int, ...], ...] = ((0, 3), (1,))
"""Kept heads of layers 2 and 3; on a host of 2 key-value heads, heads that share one are of both kinds."""
PAIRS = ((2, 3), ())
"""The same with heads that share a key-value head kept or dropped together."""
OFF: dict[str, Any] = {"neighbours": "all", "ffn": 1.0, "removed": "keep"}


def grid_places(inputs: dict[str, Tensor], side: int = 4) -> list[Place | None]:
    """Where each visual token of a prompt of LLaVA-1.5 stands, picture by picture."""
    total = int((inputs["input_ids"] == IMAGE).sum())
    return [(n // side**2, n % side**2 // side, n % side) for n in range(total)]


def plain_run(
    model: Any, inputs: dict[str, Tensor], places: list[Place | None], *, window: int = 5, neighbours: str = "both",
    heads: tuple[tuple[int, ...], ...] = (), ffn: float = 2.0, cut: int = 2, removed: str = "drop",
    renormalise: bool = False,
) -> Tensor:  # fmt: skip
    """(n, V) logits by the card's rules, in full-size tensors; with "drop", of the text tokens from `cut` on.

    Args:
        renormalise: with "simulate", bring the rows' sums back to 1.
    """
    language = model.model.language_model
    ids = inputs["input_ids"][0].tolist()
    spots = iter(places)
    place: list[Place | None] = [next(spots) if token == IMAGE else None for token in ids]
    visual = torch.tensor([token == IMAGE for token in ids])
    hidden, positions = prompt_embeddings(model, inputs), torch.arange(len(ids))[None]
    for layer, block in enumerate(language.layers):
        if removed == "drop" and layer == cut:
            stay = ~visual
            hidden, positions, visual = hidden[:, stay], positions[:, stay], visual[stay]
            place = [None] * len(visual)
        n = len(visual)
        allowed = torch.ones(n, n, dtype=torch.bool).tril()
        for i in range(n):
            for j in range(n):
                a, b = place[i], place[j]
                if a is not None and b is not None and neighbours != "all":
                    near = a[0] == b[0] and max(abs(a[1] - b[1]), abs(a[2] - b[2])) <= (window - 1) // 2
                    allowed[i, j] = near and (neighbours == "both" or j <= i)
        module, normed = block.self_attn, block.input_layernorm(hidden)
        query, key, value = (
            project(normed).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
            for project in (module.q_proj, module.k_proj, module.v_proj)
        )
        cos, sin = language.rotary_emb(hidden, position_ids=positions)
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        logits = query @ key.transpose(-1, -2) / module.head_dim**0.5
        weights = logits.masked_fill(~allowed, float("-inf")).softmax(-1)
        kept = heads[layer - 2] if heads and layer >= 2 else range(query.shape[1])
        idle = [head for head in range(query.shape[1]) if head not in kept]
        weights[:, idle] *= ~visual
        if removed == "simulate" and layer >= cut:
            weights = weights * ~visual
            if renormalise:
                weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        output = weights @ value
        for head in idle:
            output[:, head, visual] = 0
        hidden = hidden + module.o_proj(output.transpose(1, 2).flatten(2))
        normed, mlp = block.post_attention_layernorm(hidden), block.mlp
        inner = mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
        inner[:, visual, int(inner.shape[-1] / ffn) :] = 0
        hidden = hidden + mlp.down_proj(inner)
    logits: Tensor = model.lm_head(language.norm(hidden))[0]
    return logits


# -- the whole run


@pytest.mark.parametrize("name", ["clip-llama", "clip-qwen2", "siglip-llama"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window": 1},
        {"window": 3, "neighbours": "earlier", "cut": 3},
        {"window": 47, "removed": "keep", "ffn": 1.0},
        {"heads": SOME, "cut": 3},
        {"heads": PAIRS, "removed": "keep", "ffn": 3.0},
        {"heads": SOME, "removed": "simulate", "neighbours": "all"},
        {"heads": PAIRS, "removed": "simulate", "cut": 1},
        {"neighbours": "all", "ffn": 4.0, "removed": "keep"},
    ],
)
@torch.no_grad()
def test_the_whole_run_equals_the_plain_one(name: str, settings: dict[str, Any]) -> None:
    """Also a prompt of two pictures, whose tokens are no neighbours."""
    host = vlm(name)
    for sample in ((3, 6), (2, 2, 5)):
        given = prompt(host, [sample])
        text = (given["input_ids"][0] != IMAGE).nonzero().flatten()
        expected = plain_run(host, given, grid_places(given), **settings)
        with foveate.apply(host, Yopo(**{"cut": 2, **settings})):
            ours = host(**given).logits[0]
        if settings.get("removed", "drop") == "drop":
            ours = ours[text]
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_newlines_see_what_they_did() -> None:
    """LLaVA-NeXT: neighbours only within a crop; a newline is nobody's neighbour, and not blind either."""
    host = vlm("next")
    given = prompt(host, [(2, 6)], sizes=[(24, 24)])
    places: list[Place | None] = [(0, n // 4, n % 4) for n in range(16)]
    for row in range(8):
        places += [(1 + row // 4 * 2 + column // 4, row % 4, column % 4) for column in range(8)]
        places.append(None)
    expected = plain_run(host, given, places, window=3, removed="keep")
    with foveate.apply(host, Yopo(window=3, removed="keep")):
        ours = host(**given).logits[0]
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_window_over_the_whole_picture_is_the_vanilla_model_but_for_later_tokens() -> None:
    host = vlm()
    given = prompt(host, [(3, 6)])
    dense = host(**given).logits
    settings = {**OFF, "window": 47, "heads": (tuple(range(4)),) * 2}
    with foveate.apply(host, Yopo(**{**settings, "neighbours": "earlier"})):
        torch.testing.assert_close(host(**given).logits, dense, rtol=1e-4, atol=1e-5)
    with foveate.apply(host, Yopo(**{**settings, "neighbours": "both"})):
        both = host(**given).logits
    assert float((both - dense).abs().max()) > 1e-2
    # Before the picture's last token, nobody sees more than before; its first token does.
    torch.testing.assert_close(both[:, :3], dense[:, :3], rtol=1e-4, atol=1e-5)
    assert float((both[:, 3] - dense[:, 3]).abs().max()) > 1e-3


@pytest.mark.parametrize("settings", [{}, {"heads": SOME, "removed": "simulate"}])
@torch.no_grad()
def test_text_alone_is_the_vanilla_model(settings: dict[str, Any]) -> None:
    host = vlm()
    given = {name: value for name, value in prompt(host, [(9,)]).items() if name != "pixel_values"}
    dense = host(**given).logits
    with foveate.apply(host, Yopo(**settings)):
        assert torch.equal(host(**given).logits, dense)


# -- neighbours


def made_up_call(side: int, before: int = 3, after: int = 4, mask: Tensor | None = None) -> AttentionCall:
    total = before + side**2 + after
    query = torch.randn(1, 2, total, 8, generator=torch.Generator().manual_seed(0))
    tokens = Tokens.from_grid(torch.zeros(1, side**2, 0), (side, side))
    where = torch.arange(before, before + side**2)[None]
    return AttentionCall(
        query, query, query, mask, 1.0, tokens, where, torch.tensor([side**2]), torch.ones(1, total, dtype=torch.bool),
        lambda query, key, value, mask: mask,  # type: ignore[arg-type, return-value]
    )  # fmt: skip


@pytest.mark.parametrize("window", [1, 3, 5, 7, 47])
@pytest.mark.parametrize("floating", [False, True])
def test_the_mask(window: int, floating: bool) -> None:
    side, before, after, reach = 24, 3, 4, (window - 1) // 2
    total = before + side**2 + after
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, total, total).masked_fill(~causal, torch.finfo(torch.float32).min) if floating else None
    call = made_up_call(side, before, after, mask)
    at = stage(call.tokens, name="llm.attention", layer=0)
    ours = Yopo(window=window, ffn=1.0, removed="keep").look(call, at)[0, 0]
    if floating:
        assert set(ours.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}
        ours = ours == 0
    picture = slice(before, before + side**2)
    block = ours[picture, picture]
    assert torch.equal(block, block.T) and bool(block.diagonal().all())
    number = torch.arange(side)
    near = (number[:, None] - number).abs() <= reach
    assert torch.equal(block, (near[:, None, :, None] & near[None, :, None, :]).reshape(side**2, side**2))
    if window == 5:
        assert (int(block.sum(1).min()), int(block.sum(1).max()), int(block.sum())) == (9, 25, 12_996)
    if window == 1:
        assert torch.equal(block, torch.eye(side**2, dtype=torch.bool))
    ours = ours.clone()
    ours[picture, picture] = causal[picture, picture]
    assert torch.equal(ours, causal), "text sees and is seen as before"


def test_pairs_by_hand() -> None:
    for rows, columns, window in ((24, 24, 5), (3, 7, 3), (2, 2, 9)):
        cells = [(y, x) for y in range(rows) for x in range(columns)]
        slow = sum(abs(a - c) <= window // 2 and abs(b - d) <= window // 2 for a, b in cells for c, d in cells)
        assert Yopo(window=window).pairs(rows, columns) == slow
    assert Yopo().pairs(24, 24) == (5 * 24 - 6) ** 2 == 12_996


@torch.no_grad()
def test_eager_attention_gives_the_same() -> None:
    host = vlm()
    given = prompt(host, [(2, 6), (1, 3)])
    results = []
    for implementation in ("sdpa", "eager"):
        host.set_attn_implementation(implementation)
        with foveate.apply(host, Yopo(window=3, heads=SOME, cut=3)):
            results.append(host(**given).logits)
    real = given["attention_mask"].bool()
    torch.testing.assert_close(results[0][real], results[1][real], rtol=1e-3, atol=1e-4)


def test_no_mask_outlives_its_forward() -> None:
    host, method = vlm(), Yopo()
    with foveate.apply(host, method), torch.no_grad():
        cache = host(**prompt(host, [(2, 6)]), use_cache=True).past_key_values
    assert cache is not None and len(method._masks) == 0


def test_flash_attentions_masks_are_refused() -> None:
    call = made_up_call(4, mask=torch.ones(1, 23, dtype=torch.long))
    with pytest.raises(InputError, match="FlashAttention takes no mask"):
        Yopo().look(call, stage(call.tokens, name="llm.attention", layer=0))


# -- heads


def projected(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """(n, H, D) of each layer: what the heads hand to the output projection."""
    seen: list[Tensor] = []
    layers = model.model.language_model.layers
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0][0].unflatten(-1, (4, 8))))
        for layer in layers
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ["clip-llama", "clip-qwen2"])
@torch.no_grad()
def test_a_head_dropped_in_all_layers(name: str) -> None:
    """The first two layers keep it. From then on picture queries get 0 from it, text queries its text part unscaled."""
    host = vlm(name)
    given = prompt(host, [(3, 6)])
    visual = (given["input_ids"] == IMAGE)[0]
    before = projected(host, given)
    with foveate.apply(host, Yopo(**OFF, heads=((0, 2, 3),) * 2)):
        ours = projected(host, given)
    for layer in (0, 1):
        torch.testing.assert_close(ours[layer], before[layer], rtol=0, atol=0)
    torch.testing.assert_close(ours[2][:, [0, 2, 3]], before[2][:, [0, 2, 3]], rtol=1e-4, atol=1e-5)
    assert not ours[2][visual, 1].any() and not ours[3][visual, 1].any()
    host.set_attn_implementation("eager")
    out = host(**given, output_attentions=True, output_hidden_states=True)
    block = host.model.language_model.layers[2]
    value = block.self_attn.v_proj(block.input_layernorm(out.hidden_states[2]))[0].unflatten(-1, (-1, 8))
    value = value[:, 1 * value.shape[1] // 4]
    text_part = (out.attentions[2][0, 1] * ~visual) @ value
    torch.testing.assert_close(ours[2][~visual, 1], text_part[~visual], rtol=1e-4, atol=1e-5)
    # Rows are not brought back to 1.
    assert float((out.attentions[2][0, 1] * ~visual)[~visual].sum(-1)[-1]) < 0.99


def test_heads_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    file.write_text(json.dumps([[3, 0], [1]]))
    assert Yopo(heads=str(file)).heads == SOME == Yopo(heads=[[0, 3], [1]]).heads
    for text in ("{", "{}", "[0, 1]", "[[0, 0]]", '[["0"]]', "[[true]]"):
        file.write_text(text)
        with pytest.raises(InputError, match="heads"):
            Yopo(heads=str(file))


@torch.no_grad()
def test_heads_that_a_host_does_not_have() -> None:
    host = vlm()
    with pytest.raises(InputError, match="heads has 3 layers; this host has 4"):
        foveate.apply(host, Yopo(heads=((0,),) * 3))
    with foveate.apply(host, Yopo(heads=((0,), (4,)), cut=3)):
        host(**prompt(host, [(2, 4)]))
    with foveate.apply(host, Yopo(heads=((4,), (0,)), cut=3)), pytest.raises(InputError, match=r"heads 0\.\.3, not 4"):
        host(**prompt(host, [(2, 4)]))


# -- the MLP


@pytest.mark.parametrize("ffn", [1.5, 2.0, 3.0, 64.0, 1000.0])
@torch.no_grad()
def test_visual_tokens_run_through_a_narrower_mlp(ffn: float) -> None:
    """The first int(64 / f) units, as a module of that width would; text through all. At least one unit is left."""
    host = vlm("clip-qwen2")
    given = prompt(host, [(2, 6), (1, 3)])
    visual, units = given["input_ids"] == IMAGE, max(1, int(64 / ffn))
    seen: list[tuple[Any, Tensor, Tensor]] = []
    for layer in host.model.language_model.layers:
        layer.mlp.register_forward_hook(lambda m, args, output: seen.append((m, args[0], output)))
    with foveate.apply(host, Yopo(neighbours="all", removed="keep", ffn=ffn)):
        host(**given)
    assert len(seen) == 4
    for mlp, hidden, output in seen:
        narrow = torch.nn.Sequential(torch.nn.Linear(32, units, bias=False), torch.nn.Linear(units, 32, bias=False))
        narrow[0].weight.data, narrow[1].weight.data = mlp.up_proj.weight[:units], mlp.down_proj.weight[:, :units]
        gate = F.silu(hidden @ mlp.gate_proj.weight[:units].T)
        image = narrow[1](gate * narrow[0](hidden))
        text = mlp.down_proj(F.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))
        torch.testing.assert_close(output, torch.where(visual.unsqueeze(-1), image, text), rtol=1e-4, atol=1e-5)


def test_an_mlp_that_cannot_be_cut_is_refused() -> None:
    class Wrapped(torch.nn.Linear):
        pass

    mlp = torch.nn.Module()
    call = MlpCall(torch.zeros(1, 2, 4), mlp, torch.ones(1, 2, dtype=torch.bool), lambda hidden: hidden)
    at = stage(Tokens.from_grid(torch.zeros(1, 2, 0), (1, 2)), name="llm.mlp", layer=0)
    with pytest.raises(InputError, match="gate_proj is missing: set ffn=1"):
        Yopo().think(call, at)
    mlp.gate_proj = Wrapped(4, 8)
    with pytest.raises(InputError, match="gate_proj is a Wrapped"):
        Yopo().think(call, at)


@torch.no_grad()
def test_flops_that_really_fall() -> None:
    """Counted on the run: the MLP of visual tokens by 1 / f in the first layers, all of a visual token in the others.

    The head is left out by keeping one position's logits, and the vision half by counting both runs.
    """
    host = vlm(layers=6)
    given = prompt(host, [(2, 6)])
    n, d, m, cut = 24, 32, 64, 3

    def layer(tokens: int) -> int:
        return 2 * (4 * tokens * d * d + 2 * tokens * tokens * d + 3 * tokens * d * m)

    def counted(**settings: Any) -> int:
        with foveate.apply(host, Yopo(**settings)):
            return count_flops(lambda: host(**given, logits_to_keep=1))

    dense = count_flops(lambda: host(**given, logits_to_keep=1))
    assert dense - counted(**{**OFF, "ffn": 4.0}) == 6 * 2 * 3 * 16 * d * (m - m // 4)
    assert dense - counted(**{**OFF, "removed": "drop", "cut": cut}) == (6 - cut) * (layer(n) - layer(8))
    both = cut * 2 * 3 * 16 * d * (m - m // 4) + (6 - cut) * (layer(n) - layer(8))
    assert dense - counted(ffn=4.0, cut=cut) == both


# -- layers


@pytest.mark.parametrize(
    ("removed", "where", "depends"),
    [
        ("drop", "layers.2", False), ("simulate", "layers.2.self_attn.v_proj", False),
        ("simulate", "layers.2.self_attn.k_proj", True), ("keep", "layers.2.self_attn.v_proj", True),
    ],
)  # fmt: skip
@torch.no_grad()
def test_text_does_not_depend_on_the_picture_after_the_cut(removed: str, where: str, depends: bool) -> None:
    """Even if what the picture's tokens hold there is exchanged for noise.

    The release's simulation keeps this only of values: the keys still weigh in the denominator of the softmax.
    """
    host = vlm()
    given = prompt(host, [(3, 6)])
    visual = given["input_ids"] == IMAGE
    noise = 3 * torch.randn(*visual.shape, 32, generator=torch.Generator().manual_seed(5)) * visual.unsqueeze(-1)
    method = Yopo(cut=2, removed=removed, heads=SOME)
    with foveate.apply(host, method):
        before = host(**given).logits[:, ~visual[0]]
    module = host.model.language_model.get_submodule(where)
    if where == "layers.2":
        # Registered before the method's own hook: the noise is there when the tokens are dropped.
        handle = module.register_forward_pre_hook(lambda m, args: (args[0] + noise, *args[1:]))
    else:
        handle = module.register_forward_hook(lambda m, args, output: output + noise)
    with foveate.apply(host, method):
        after = host(**given).logits[:, ~visual[0]]
    handle.remove()
    assert torch.equal(before, after) != depends


@torch.no_grad()
def test_dropping_is_the_simulation_with_weights_renormalised() -> None:
    host = vlm()
    given = prompt(host, [(3, 6)])
    text = (given["input_ids"][0] != IMAGE).nonzero().flatten()
    places = grid_places(given)
    with foveate.apply(host, Yopo(cut=2)):
        dropped = host(**given).logits[0, text]
    with foveate.apply(host, Yopo(cut=2, removed="simulate")):
        simulated = host(**given).logits[0, text]
    renormalised = plain_run(host, given, places, removed="simulate", renormalise=True)[text]
    torch.testing.assert_close(dropped, renormalised, rtol=1e-3, atol=1e-4)
    assert float((dropped - simulated).abs().max()) > 1e-2


@pytest.mark.parametrize(("layers", "cut", "expected"), [(4, 0.5, 2), (32, 0.5, 16), (40, 0.5, 20), (24, 0.75, 18)])
@torch.no_grad()
def test_caches_hold_the_picture_up_to_the_cut(layers: int, cut: float, expected: int) -> None:
    host = vlm(layers=layers)
    with foveate.apply(host, Yopo(cut=cut)):
        cache = host(**prompt(host, [(2, 6)]), use_cache=True).past_key_values
    assert kv_lengths(cache) == [24] * expected + [8] * (layers - expected)


@pytest.mark.parametrize("name", ["clip-llama", "clip-qwen2", "next"])
@pytest.mark.parametrize(
    "settings",
    [{"heads": SOME, "cut": 3}, {"heads": PAIRS, "removed": "keep"}, {"heads": SOME, "removed": "simulate", "cut": 1}],
)
@torch.no_grad()
def test_decoding_on_the_cache_equals_a_run_without(name: str, settings: dict[str, Any]) -> None:
    """Padded batch; the logits of each step, not only the words."""
    host = vlm(name)
    given = prompt(host, [(2, 6), (1, 3)])
    wanted = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with foveate.apply(host, Yopo(**settings)):
        cached, plain = (host.generate(**given, **wanted, use_cache=use) for use in (True, False))
        alone = host.generate(**single(host, given, 1), **wanted)
    assert torch.equal(cached.sequences, plain.sequences)
    for one, other, third in zip(cached.logits, plain.logits, alone.logits):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one[1], third[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_decoding_step_by_hand() -> None:
    """In a dropped head, a new token has the weights of the whole softmax on text, and none on the picture."""
    host = vlm()
    given = prompt(host, [(3, 6)])
    visual = torch.cat([(given["input_ids"] == IMAGE)[0], torch.tensor([False])])
    with foveate.apply(host, Yopo(**OFF, heads=((0, 2, 3), (0, 1, 2, 3)))):
        cache = host(**given, use_cache=True).past_key_values
        ours = projected(host, {"input_ids": torch.tensor([[7]]), "past_key_values": cache})[2][0, 1]
        keys, values = cache.layers[2].keys[0, 1], cache.layers[2].values[0, 1]
    host.set_attn_implementation("eager")
    cache = host(**given, use_cache=True).past_key_values
    # Layer 2 is the first that differs: up to its weights, the unchanged model computes the same.
    weights = host(input_ids=torch.tensor([[7]]), past_key_values=cache, output_attentions=True).attentions[2][0, 1, 0]
    assert keys.shape[0] == len(visual)
    torch.testing.assert_close(ours, (weights * ~visual) @ values, rtol=1e-4, atol=1e-5)


# -- budgets


def test_budgets_are_met_by_the_layers_alone() -> None:
    facts = HostShape("hf-vlm", (), 24, 22, 1, (24, 24), 32)
    for budget, cut in ((0.9, 28), (0.75, 24), (0.5, 16), (0.3, 9), (0.05, 1)):
        assert Yopo.for_budget(budget, facts).hyperparameters() == {**Yopo().hyperparameters(), "cut": cut}
    assert Yopo.for_budget(1.0, facts).hyperparameters()["removed"] == "keep"
    with pytest.raises(InputError, match=r"as little as 0\.03 .* the first of 32 layers sees all"):
        Yopo.for_budget(0.03, facts)


def test_a_cut_beyond_the_host_is_refused() -> None:
    with pytest.raises(InputError, match="cut"):
        foveate.apply(vlm(), Yopo(cut=4))
    foveate.apply(vlm(), Yopo(cut=4, removed="keep")).remove()
    with pytest.raises(InputError, match="window must be odd"):
        Yopo(window=4)


@pytest.mark.parametrize("claim", Yopo.claims, ids=lambda claim: claim.what)
def test_claims(claim: Any) -> None:
    assert Checked("yopo", claim, count(Yopo, claim)).holds


def test_the_formula_by_hand() -> None:
    n, d, m = 576, 4096, 11008
    first = Yopo(cut=16, ffn=2.0).flops(n, d, m, 32, heads=0.5)
    assert first == 2 * 16 * (4 * n * d * d / 2 + 2 * n * 25 * d / 2 + 3 * n * d * m / 2)
    assert Yopo(**OFF).flops(n, d, m, 32) == 2 * 32 * (4 * n * d * d + 2 * n * n * d + 3 * n * d * m)


# -- calibration


def eager_ratios(host: Any, inputs: dict[str, Tensor], rows: slice) -> Tensor:
    """(layers, B, H): attention on the picture over that on the rest, by sums over the maps of eager attention."""
    host.set_attn_implementation("eager")
    maps = host(**inputs, output_attentions=True).attentions
    host.set_attn_implementation("sdpa")
    visual, real = inputs["input_ids"] == IMAGE, inputs["attention_mask"].bool()
    found = torch.zeros(len(maps), len(visual), maps[0].shape[1])
    for layer, weights in enumerate(maps):
        for b in range(len(visual)):
            for head in range(weights.shape[1]):
                asked = weights[b, head][real[b]][rows]
                found[layer, b, head] = asked[:, visual[b]].sum() / asked[:, ~visual[b]].sum()
    return found


@pytest.mark.parametrize("name", ["clip-llama", "clip-qwen2"])
@torch.no_grad()
def test_votes_against_whole_maps(name: str) -> None:
    """Five samples in batches, with padding; a head needs votes of more than 40 %, so that 2 of 5 are too few."""
    host = vlm(name)
    batches = [prompt(host, [(2, 6), (1, 3)]), prompt(host, [(4, 2)], seed=1), prompt(host, [(1, 2), (3, 8)], seed=2)]
    ratios = torch.cat([eager_ratios(host, batch, slice(None)) for batch in batches], 1)
    threshold = float(ratios[2:].median()) + 1e-4
    votes = HeadVotes(threshold=threshold)
    with foveate.apply(host, votes):
        for batch in batches:
            dense = host(**batch).logits
    assert torch.equal(dense, host(**batches[-1]).logits)
    above = (ratios > threshold).sum(1)
    assert votes.samples == dict.fromkeys(range(4), 5)
    assert torch.equal(torch.stack([votes.votes[layer] for layer in range(4)]), above)
    expected = tuple(tuple(h for h in range(4) if above[layer, h] > 2) for layer in (2, 3))
    assert votes.kept() == expected and 0 < sum(map(len, expected)) < 8
    Yopo(heads=votes.kept()).check(HostShape("hf-vlm", (), 5, 3, 1, (4, 4), 4))


@torch.no_grad()
def test_votes_of_the_first_decoded_token() -> None:
    """One vote a sample and layer, however long the answer; text alone does not vote."""
    host = vlm()
    given = prompt(host, [(2, 6)])
    votes = HeadVotes(queries="decoded")
    with foveate.apply(host, votes):
        answer = host.generate(**given, max_new_tokens=4, do_sample=False)
        host.generate(input_ids=torch.tensor([[4, 5, 6]]), max_new_tokens=2, do_sample=False)
    first = answer[:, : given["input_ids"].shape[1] + 1]
    longer = {**given, "input_ids": first, "attention_mask": torch.ones_like(first)}
    ratios = eager_ratios(host, longer, slice(-1, None))[:, 0]
    assert votes.samples == dict.fromkeys(range(4), 1)
    assert torch.equal(torch.stack([votes.votes[layer] for layer in range(4)]), (ratios > 0.077).long())


def test_votes_need_samples() -> None:
    with pytest.raises(InputError, match="no votes yet"):
        HeadVotes().kept()
    with pytest.raises(InputError, match="threshold"):
        HeadVotes(threshold=0.0)


@torch.no_grad()
def test_behind_another_method() -> None:
    """On crops that GlobalCom² has thinned out, neighbours are still counted on the grid; newlines have none, although
    they stand where the first patch did, which is gone."""
    host = vlm("next")
    given = prompt(host, [(2, 6), (1, 3)], sizes=[(24, 12), (24, 24)])
    seen: list[Tensor] = []
    sources: list[list[int]] = []

    class Noting(Yopo):
        def _mask(self, call: AttentionCall) -> Tensor:
            mask = super()._mask(call)
            seen.append(mask[1, 0][call.visual[1]][:, call.visual[1]])
            sources.append(call.tokens.source[1].tolist())
            return mask

    method = Noting(window=3, cut=2)
    with foveate.apply(host, [GlobalCom2(keep=0.5), method]):
        texts = [host.generate(**given, max_new_tokens=3, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*texts)
    # A thumbnail and four crops of 16 patches; then the newlines of 8 rows, all of which stay.
    patch_of = {token: patch for patch, token in enumerate(sources[0]) if token >= 0}
    count = len(patch_of)
    assert sources[0][0] == -1 and sum(patch >= 80 for patch in patch_of.values()) == 8 and 44 <= count <= 48

    def near(a: int, b: int) -> bool:
        if max(patch_of[a], patch_of[b]) >= 80:
            return b <= a
        (crop_a, at_a), (crop_b, at_b) = divmod(patch_of[a], 16), divmod(patch_of[b], 16)
        return crop_a == crop_b and max(abs(at_a // 4 - at_b // 4), abs(at_a % 4 - at_b % 4)) <= 1

    expected = [[near(a, b) for b in range(count)] for a in range(count)]
    assert torch.equal(seen[0][:count, :count], torch.tensor(expected))
