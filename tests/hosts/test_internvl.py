"""InternVL: its own tower, patches joined 2x2 before the projector, tiles; see also contract/test_vlm_hosts.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_llava import by_hand
from test_llava_onevision import entering, flat
from torch import Tensor

import foveate
from foveate.method import InputError, Method, Stage, registry
from foveate.tokens import Tokens
from reference import prompt_embeddings
from running import logits, odd
from tiny import IMAGE, probe, prompt, vlm

SAMPLES = [(2, 0, 0, 5), (4,), (0, 3, 6)]
"""A picture of three tiles; none; two pictures, one of which opens the prompt."""
SIDE = 8
"""Patches of a tile's side; 4 x 4 cells."""


def build(**config: Any) -> Any:
    return vlm("internvl", **config)


def given(model: Any, **settings: Any) -> dict[str, Tensor]:
    return prompt(model, SAMPLES, **settings)


def joined(tile: Tensor) -> list[Tensor]:
    """For each cell of 2x2 patches of a tile (64, D) its patches one after the other."""
    return [
        torch.cat([tile[(2 * y + i) * SIDE + 2 * x + j] for i in (0, 1) for j in (0, 1)])
        for y in range(SIDE // 2)
        for x in range(SIDE // 2)
    ]


def run_tower(model: Any, pixels: Tensor, change: Callable[[int, Tensor], Tensor]) -> Tensor:
    """(tiles, K, D) patches, with `change(l, hidden)` before each encoder layer l, class token included."""
    tower = model.model.vision_tower
    hidden = tower.embeddings(pixels)
    for number, layer in enumerate(tower.encoder.layer[: 6 + model.config.vision_feature_layer]):
        hidden = layer(change(number, hidden))
    return hidden[:, 1:]


# -- nothing changed, nothing left behind


def test_methods_that_keep_everything_change_no_bit_of_features_of_an_earlier_layer() -> None:
    model = build(vision_feature_layer=-2)
    inputs = given(model)
    dense = logits(model, inputs)
    for name, cls in registry().items():
        if cls.card.identity is not None and "hf-vlm" in cls.card.hosts:
            with foveate.apply(model, name, **cls.card.identity):
                assert torch.equal(logits(model, inputs), dense), name
    real = inputs["attention_mask"].bool()
    for stage, layer in (("vision.layer", 2), ("vision.mlp", 1), ("vision.output", -1), ("llm.layer", 1)):
        with foveate.apply(model, probe(stage, lambda tokens, at: tokens.mask(), layer=layer)):
            assert torch.allclose(logits(model, inputs)[real], dense[real], atol=1e-5), stage


# -- what a stage acts on


@torch.no_grad()
def test_a_stage_drops_cells() -> None:
    model = build()
    inputs = prompt(model, [(2, 5)])
    seen: list[Tensor] = []

    def look(tokens: Tokens, at: Stage) -> Tensor:
        seen.append(tokens.x)
        assert (at.host.joined, at.host.grid, at.signals.grid()) == (4, (8, 8), (4, 4))
        return odd(tokens, at)

    cells = torch.stack(joined(run_tower(model, inputs["pixel_values"], lambda number, x: x)[0]))
    embeds, where = prompt_embeddings(model, inputs)[0], inputs["input_ids"][0] == IMAGE
    assert torch.allclose(embeds[where], model.model.multi_modal_projector(cells), atol=1e-5)
    shorter = torch.cat([embeds[:2], embeds[where][1::2], embeds[-5:]])
    for stage in ("vision.output", "projector"):
        with foveate.apply(model, probe(stage, look)) as applied:
            result = logits(model, inputs)[0]
        assert [record.tokens_out for record in applied.trace] == [(8,), (8,)]
        assert torch.allclose(result[-5:], by_hand(model, shorter, {}, True)[-5:], atol=1e-4)
    assert torch.allclose(seen[0][0], cells, atol=1e-5) and torch.allclose(seen[1][0], embeds[where], atol=1e-5)


@pytest.mark.parametrize("config", ({}, {"vision_feature_layer": -2}), ids=("last", "before"))
@torch.no_grad()
def test_what_was_merged_in_the_tower_is_put_back_before_patches_are_joined(config: dict[str, Any]) -> None:
    """In rows of three, so that tokens reach across cells."""
    model = build(**config)
    inputs = prompt(model, [(2, 0, 5)])
    groups = [m // 8 * 3 + min(m % 8 // 3, 2) for m in range(64)]

    class Merging(Method):
        card = probe("vision.layer", odd).card

        @foveate.at("vision.layer")
        def act(self, tokens: Tokens, at: Stage) -> Tokens:
            return tokens.merge(torch.tensor([groups] * 2)) if at.layer == 2 else tokens

    def merged(number: int, hidden: Tensor) -> Tensor:
        if number != 2:
            return hidden
        means = [hidden[:, 1:][:, [g == k for g in groups]].mean(1) for k in range(24)]
        return torch.cat([hidden[:, :1], torch.stack(means, 1)], 1)

    rows = run_tower(model, inputs["pixel_values"], merged)[:, groups]
    wanted = model.model.multi_modal_projector(torch.stack(flat([joined(tile) for tile in rows])))
    with foveate.apply(model, Merging()) as applied:
        embeds = entering(model, inputs)
    assert torch.allclose(embeds[0, inputs["input_ids"][0] == IMAGE], wanted, atol=1e-5)
    assert [record.tokens_out for record in applied.trace] == [(24, 24), (32,)]


@torch.no_grad()
def test_merging_between_attention_and_mlp() -> None:
    """In layer 1 pairs are averaged after the attention, with this tower's scales on both branches."""
    model = build()
    inputs = prompt(model, [(2, 5)])

    class Merging(Method):
        card = probe("vision.mlp", odd).card

        @foveate.at("vision.mlp")
        def act(self, tokens: Tokens, at: Stage) -> Tokens:
            return tokens.merge((torch.arange(64) // 2).expand(1, -1)) if at.layer == 1 else tokens

    def pairs(module: Any, args: Any, output: Tensor) -> Tensor:
        hidden = args[0] + module.lambda_1 * module.attention(module.layernorm_before(args[0]))[0]
        hidden = torch.cat([hidden[:, :1], hidden[:, 1:].unflatten(1, (32, 2)).mean(2)], 1)
        return hidden + module.lambda_2 * module.mlp(module.layernorm_after(hidden))

    with foveate.apply(model, Merging()) as applied:
        embeds = entering(model, inputs)
    handle = model.model.vision_tower.encoder.layer[1].register_forward_hook(pairs)
    rows = run_tower(model, inputs["pixel_values"], lambda number, x: x).repeat_interleave(2, 1)
    handle.remove()
    wanted = model.model.multi_modal_projector(torch.stack(joined(rows[0])))
    assert torch.allclose(embeds[0, 2:18], wanted, atol=1e-5)
    assert applied.trace[0].tokens_out == (32,)


@torch.no_grad()
def test_what_was_dropped_in_the_tower_counts_as_the_mean_of_those_left_in_its_cell() -> None:
    model = build()
    inputs = prompt(model, [(2, 5)])
    # The first cell (0, 1, 8, 9) loses one patch, the second (2, 3, 10, 11) two, the third (4, 5, 12, 13) all.
    gone = [9, 3, 10, 4, 5, 12, 13]
    left = [m for m in range(64) if m not in gone]
    keep = torch.ones(1, 64, dtype=torch.bool)
    keep[0, gone] = False

    def drop(number: int, hidden: Tensor) -> Tensor:
        return hidden[:, [0, *(1 + m for m in left)]] if number == 2 else hidden

    short = run_tower(model, inputs["pixel_values"], drop)[0]
    tile = torch.zeros(64, short.shape[1])
    tile[left] = short
    tile[9] = tile[[0, 1, 8]].mean(0)
    tile[[3, 10]] = tile[[2, 11]].mean(0)
    cells = joined(tile)
    wanted = model.model.multi_modal_projector(torch.stack(cells[:2] + cells[3:]))
    with foveate.apply(model, probe("vision.layer", lambda tokens, at: keep, layer=2)) as applied:
        embeds = entering(model, inputs)
    assert [record.tokens_out for record in applied.trace] == [(57,), (15,)]
    assert embeds.shape[1] == 2 + 15 + 5 and torch.allclose(embeds[0, 2:17], wanted, atol=1e-5)
    assert applied.trace[1].source[0].tolist() == [0, 1, -1, *range(2, 15)]


@pytest.mark.parametrize("keep, grid", [(0.5, (2, 3)), (0.25, (2, 2))])
@torch.no_grad()
def test_a_smaller_picture_equals_the_model_on_a_smaller_picture(keep: float, grid: tuple[int, int]) -> None:
    model = build()
    inputs = prompt(model, [(2, 5)])
    rows, columns = grid
    small = torch.nn.functional.interpolate(
        inputs["pixel_values"], size=(4 * rows, 4 * columns), mode="bilinear", antialias=True
    )
    patches = run_tower(model, small, lambda number, x: x)
    cells = model.model.pixel_shuffle(patches.unflatten(1, (2 * rows, 2 * columns))).flatten(1, 2)
    with foveate.apply(model, "resolution", keep=keep) as applied:
        embeds = entering(model, inputs)
    count = rows * columns
    assert [record.tokens_out for record in applied.trace] == [(4 * count,), (count,)]
    assert torch.allclose(embeds[0, 2 : 2 + count], model.model.multi_modal_projector(cells)[0], atol=1e-5)
    # Each stands for the part of the picture that it covers, in cells.
    covers = [(y * rows // 4) * columns + x * columns // 4 for y in range(4) for x in range(4)]
    assert applied.trace[-1].source[0].tolist() == covers


# -- provenance and signals


def test_every_cell_is_where_the_trace_says() -> None:
    """Features are replaced by numbers that name their cells; the language model must find what it expects."""
    model = build()
    inputs = given(model)
    seen: dict[str, Tensor] = {}

    class Watch(Method):
        card = probe("projector", odd).card

        @foveate.at("projector")
        def name(self, tokens: Tokens, at: Stage) -> Tokens:
            assert tokens.source.tolist() == [list(range(16))] * 5 and at.entered.tolist() == [16] * 5
            assert [(one.rows.start, one.rows.stop, one.single) for one in at.signals.crops()] == [
                (row, row + 1, True) for row in range(5)
            ]
            value = 100.0 * torch.arange(5).unsqueeze(1) + torch.arange(16)
            return tokens.with_x(value.unsqueeze(-1).expand_as(tokens.x)).keep(torch.arange(1, 16, 2).expand(5, -1))

        @foveate.at("llm.layer")
        def look(self, tokens: Tokens, at: Stage) -> Tokens:
            if at.layer == 0:
                seen.update(x=tokens.x[..., 0], source=tokens.source, position=tokens.position)
            return tokens

    with foveate.apply(model, Watch()):
        logits(model, inputs)
    for b, tiles in enumerate(([0, 1, 2], [], [3, 4])):
        for number, tile in enumerate(tiles):
            for m in range(16):
                token = int(seen["source"][b, 16 * number + m])
                if m % 2 == 0:
                    assert token == -1
                else:
                    assert seen["x"][b, token] == 100 * tile + m
                    assert seen["position"][b, token].tolist() == [number, m // 4, m % 4]
        assert (seen["source"][b, 16 * len(tiles) :] == -1).all()


def test_signals_of_cells_are_means_over_their_patches() -> None:
    model = build()
    inputs = prompt(model, [(2, 0, 5)])
    answers: list[Any] = []

    def ask(tokens: Tokens, at: Stage) -> Tensor:
        answers.append((at.signals.cls_attention(3), at.signals.received(3), at.signals.keys(3)))
        return tokens.mask()

    with foveate.apply(model, probe("vision.output", ask, reads=("vision.attention[3]",))):
        logits(model, inputs)
    keys: list[Tensor] = []
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    tower.encoder.layer[3].attention.k_proj.register_forward_hook(lambda module, args, output: keys.append(output))
    with torch.no_grad():
        full = tower(inputs["pixel_values"], output_attentions=True).attentions[3]
    for ours, patches in zip(
        answers[0], (full[:, :, 0, 1:].mean(1), full.mean((1, 2))[:, 1:], keys[0][:, 1:]), strict=True
    ):
        for tile in range(2):
            # Side by side, the patches of a cell average to its mean.
            wanted = [one.reshape(4, -1).mean(0) for one in joined(patches[tile].reshape(64, -1))]
            assert torch.allclose(ours[tile].reshape(16, -1), torch.stack(wanted), atol=1e-5)


def test_marks_of_patches_become_marks_of_cells() -> None:
    model = build()
    inputs = given(model)

    class Marking(Method):
        card = probe("vision.layer", odd).card
        seen: Tensor | None = None

        @foveate.at("vision.layer")
        def note(self, tokens: Tokens, at: Stage) -> Tokens:
            if at.layer == 1:
                at.marks["number"] = 1000.0 * torch.arange(5).unsqueeze(1) + torch.arange(64)
            return tokens

        @foveate.at("llm.layer")
        def look(self, tokens: Tokens, at: Stage) -> Tokens:
            self.seen = at.marks["number"]
            return tokens

    method = Marking()
    with foveate.apply(model, method):
        logits(model, inputs)
    assert method.seen is not None
    corner = [(2 * y * 8 + 2 * x) + (0 + 1 + 8 + 9) / 4 for y in range(4) for x in range(4)]
    assert method.seen[0].tolist() == [1000.0 * tile + value for tile in range(3) for value in corner]
    assert method.seen[2, :32].tolist() == [1000.0 * tile + value for tile in (3, 4) for value in corner]


# -- refusals


def test_refusals() -> None:
    model = build()
    inputs = given(model)

    def ask(tokens: Tokens, at: Stage) -> Tensor:
        at.signals.attention(3)
        return tokens.mask()

    with (
        foveate.apply(model, probe("vision.output", ask, reads=("vision.attention[3]",))),
        pytest.raises(InputError, match="a token is a cell of several"),
    ):
        logits(model, inputs)

    class Shrinking(Method):
        card = probe("vision.pixels", odd).card

        @foveate.at("vision.pixels")
        def act(self, pixels: Tensor, at: Stage) -> Tensor:
            assert at.signals.grid() == (4, 4)
            return pixels[..., :10, :]

    with foveate.apply(model, Shrinking()), pytest.raises(InputError, match="5x8 patches cannot be joined 2x2"):
        logits(model, inputs)
    encoded = {"image": model.model.get_image_features(inputs["pixel_values"], return_dict=True)}
    rest = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with foveate.apply(model, "fopru", keep=0.5), pytest.raises(InputError, match="computed before"):
        model(**rest, mm_encoder_outputs=encoded)
    with foveate.apply(model, "pyramiddrop"), torch.no_grad():
        assert torch.equal(model(**rest, mm_encoder_outputs=encoded).logits, logits(model, inputs))
