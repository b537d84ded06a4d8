"""VideoMAE with methods applied, against loops over its layers written here and against single clips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.hosts import adapt
from foveate.method import Card, InputError, Method, Stage, at, registry
from foveate.tokens import Tokens
from tiny import probe
from tiny_video import clips, videomae


def acting(stage: str, act: Any, proportional: bool = False) -> Method:
    class Acting(Method):
        card = Card(slug="acting", title="for tests", arxiv="", kind="reduce", hosts=("hf-video",), summary="for tests")

        @at(stage)
        def handle(self, tokens: Tokens, at: Stage) -> Tokens:
            return act(tokens, at)

    Acting.proportional = proportional
    return Acting()


def by_hand(model: Any, clip: Tensor, before: Any = None, between: Any = None, size: Any = None) -> Tensor:
    """One clip (1, T, 3, H, W) through the layers; `before` and `between` change the states (1, N, D) of layer l."""
    tower = getattr(model, "videomae", model)
    x = tower.embeddings(clip, None)
    for number, layer in enumerate(tower.encoder.layer):
        x = before(x, number) if before else x
        normed, inner = layer.layernorm_before(x), layer.attention.attention
        heads = [one(normed).unflatten(-1, (4, 8)).transpose(1, 2) for one in (inner.query, inner.key, inner.value)]
        logits = heads[0] @ heads[1].transpose(-1, -2) / 8**0.5
        if size is not None and number >= size[0]:
            logits = logits + size[1].log()
        x = x + layer.attention.output((logits.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2), None)
        x = between(x, number) if between else x
        x = layer.output(layer.intermediate(layer.layernorm_after(x)), x)
    return x if tower.layernorm is None else tower.layernorm(x)


@torch.no_grad()
def test_a_clip_is_a_grid_of_slots_rows_and_columns() -> None:
    model, seen = videomae(), []

    def note(tokens: Tokens, at: Stage) -> Tokens:
        seen.append((tokens.position, at.host, at.signals.grid()))
        return tokens

    with foveate.apply(model, acting("vision.patches", note)):
        model(clips())
    position, host, grid = seen[0]
    assert position.shape == (2, 64, 3) and grid == (4, 4)
    assert (host.family, host.slots, host.grid, host.prefix, host.patches) == ("hf-video", 4, (4, 4), 0, 64)
    assert not host.class_token and "vision.pixels" not in host.stages
    assert [tuple(one) for one in position[0].int().tolist()] == [
        (t, y, x) for t in range(4) for y in range(4) for x in range(4)
    ]


@pytest.mark.parametrize("stage", ["vision.layer", "vision.mlp"])
@torch.no_grad()
def test_dropping_equals_a_loop_without_the_dropped(stage: str) -> None:
    model, clip = videomae(), clips()
    chosen = torch.tensor([3, 4, 17, 30, 31, 50, 63])

    def drop(x: Tensor, layer: int) -> Tensor:
        return x[:, chosen] if layer == 2 else x

    where = {"before": drop} if stage == "vision.layer" else {"between": drop}
    method = probe(stage, lambda tokens, at: torch.isin(torch.arange(64), chosen).expand(2, -1), layer=2)
    with foveate.apply(model, method) as applied:
        ours = model(clip).last_hidden_state
    assert applied.trace[0].tokens_out == (7, 7)
    for b in range(2):
        torch.testing.assert_close(ours[b : b + 1], by_hand(model, clip[b : b + 1], **where), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(clip[:1]).last_hidden_state, by_hand(model, clip[:1]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_merging_between_attention_and_mlp_and_proportional_attention() -> None:
    model, clip = videomae(), clips(1)
    into = torch.arange(64).div(3, rounding_mode="floor").unsqueeze(0)
    size = torch.tensor([3.0] * 21 + [1.0])

    def merged(x: Tensor, layer: int) -> Tensor:
        if layer != 1:
            return x
        return torch.stack([x[:, 3 * k : 3 * k + 3].mean(1) for k in range(22)], 1)

    def act(tokens: Tokens, at: Stage) -> Tokens:
        return tokens.merge(into) if at.layer == 1 else tokens

    for proportional, given in ((False, None), (True, (2, size))):
        with foveate.apply(model, acting("vision.mlp", act, proportional)):
            ours = model(clip).last_hidden_state
        torch.testing.assert_close(ours, by_hand(model, clip, between=merged, size=given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("stage", ["vision.patches", "vision.mlp", "vision.output"])
@torch.no_grad()
def test_clips_that_keep_different_numbers(stage: str, attention: str) -> None:
    model, clip = videomae(head=True, attn_implementation=attention), clips()
    layer = 1 if stage == "vision.mlp" else -1
    with foveate.apply(model, probe(stage, lambda tokens, at: tokens.x[..., :3].sum(-1) > 0, layer=layer)) as applied:
        together = model(clip).logits
        assert len(set(applied.trace[0].tokens_out)) == 2
        for b in range(2):
            torch.testing.assert_close(model(clip[b : b + 1]).logits[0], together[b], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_tokens_receive_is_what_eager_attention_gives_them() -> None:
    model, clip, seen = videomae(attn_implementation="eager"), clips(), []
    maps = model(clip, output_attentions=True).attentions

    class Reads(Method):
        card = Card(slug="reads", title="for tests", arxiv="", kind="reduce", hosts=("hf-video",), summary="for tests")

        def reads(self, host: Any) -> tuple[str, ...]:
            return ("vision.attention[1]",)

        @at("vision.mlp")
        def handle(self, tokens: Tokens, at: Stage) -> Tokens:
            if at.layer == 1:
                seen.append(at.signals.received(1))
            return tokens

    with foveate.apply(model, Reads()) as applied:
        model(clip)
        assert all(tap.query is None for tap in applied.host.encoder.taps.values()), "activations are kept"
    torch.testing.assert_close(seen[0], maps[1].mean((1, 2)))


def test_what_it_cannot_do_is_said() -> None:
    model = videomae()
    with foveate.apply(model, probe("vision.layer", lambda tokens, at: tokens.mask(), layer=0)), torch.no_grad():
        with pytest.raises(InputError, match="bool_masked_pos"):
            model(clips(1), bool_masked_pos=torch.arange(64).unsqueeze(0) < 32)
        with pytest.raises(ValueError, match="doesn't match model"):
            model(clips(1, side=20))
    with pytest.raises(InputError, match=r"vision\.pixels"):
        foveate.apply(model, "resolution")


@torch.no_grad()
def test_other_methods_work_on_clips_and_come_off() -> None:
    model, clip = videomae(head=True), clips()
    dense = model(clip).logits
    for slug, settings in (("tome", {"r": 5}), ("random", {}), ("pool", {"keep": 0.25})):
        with foveate.apply(model, slug, **settings) as applied:
            assert not torch.equal(model(clip).logits, dense)
            assert applied.trace[-1].tokens_out == {"tome": (44, 44), "random": (32, 32), "pool": (16, 16)}[slug]
        assert torch.equal(model(clip).logits, dense)


@pytest.mark.parametrize("slug", registry())
@torch.no_grad()
def test_every_method_works_on_clips_or_says_in_a_sentence_why_not(slug: str) -> None:
    model, clip, cls = videomae(head=True), clips(), registry()[slug]
    shape = adapt(model).shape
    dense = model(clip).logits
    if set(cls().acts_at(shape)) <= set(shape.stages):
        method = cls() if slug == "dense" else cls.for_budget(0.25, shape)
        with foveate.apply(model, method) as applied:
            together = model(clip).logits
            counts = [record.tokens_out for record in applied.trace]
            for b in range(2):
                torch.testing.assert_close(model(clip[b : b + 1]).logits[0], together[b], rtol=1e-4, atol=1e-5)
        # A quarter of 4 slots of 4 x 4 patches.
        assert counts == [] if slug == "dense" else counts[-1] == (16, 16)
        assert torch.equal(together, dense) == (slug == "dense")
    else:
        assert "hf-video" not in cls.card.hosts
        with pytest.raises(InputError, match=r"^[^\n]+$"):
            foveate.apply(model, cls())
        try:
            method = cls.for_budget(0.25, shape)
        except InputError as refused:
            assert "\n" not in str(refused)
        else:
            with pytest.raises(InputError):
                foveate.apply(model, method)
    assert torch.equal(model(clip).logits, dense)


@pytest.mark.parametrize(("slug", "settings"), [("grid", {}), ("pool", {}), ("fopru", {"strategy": "row"})])
@torch.no_grad()
def test_grids_are_those_of_each_slot(slug: str, settings: dict[str, Any]) -> None:
    """2 x 2 of 4 x 4 patches in each of 4 slots; half of the rows, the same in all slots. Nothing crosses slots."""
    model = videomae()
    with foveate.apply(model, slug, keep=0.5 if settings else 0.25, **settings) as applied:
        model(clips(1))
        source = applied.trace[-1].source[0].view(4, 4, 4)
    kept = 8 if settings else 4
    for slot in source:
        assert len(set(slot[slot >= 0].tolist())) == kept
        assert torch.equal(slot >= 0, source[0] >= 0)
    assert len(set(source[source >= 0].tolist())) == 4 * kept
    if settings:
        assert (source[0] >= 0).all(1).sum() == 2
    if slug == "pool":
        assert all(
            int(slot[y, x]) == int(slot[y // 2 * 2, x // 2 * 2]) for slot in source for y in range(4) for x in range(4)
        )
