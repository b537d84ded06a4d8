"""Qwen2-VL and Qwen2.5-VL against the model's own layers run by hand; see also contract/test_vlm_hosts.py."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from test_signals import asking, close, eager
from test_stages import acting
from torch import Tensor

import foveate
from foveate.method import Card, InputError, Method, Stage
from foveate.nn.calls import AttentionCall, MlpCall
from foveate.tokens import Tokens, compact
from running import generate, lively, logits, none, odd, supervise
from tiny import IMAGE, QWEN_VL, VIDEO, probe, prompt, single, vlm

HOSTS = pytest.mark.parametrize("host", QWEN_VL)
MIXED: dict[str, Any] = {
    "samples": [(2, 5), (4,), (0, 3, 6), (3, 4)],
    "sizes": [(8, 8), (6, 10), (3, 8, 4), (4, 6)],
}
"""An image; text alone; an image that opens the prompt and a clip of three temporal patches; a small image."""
STAGES = [("vision.output", -1), ("projector", -1), *(("llm.layer", layer) for layer in range(4))]


# -- the model by hand


def pictures(model: Any, inputs: dict[str, Tensor]) -> list[tuple[int, int, int]]:
    """(temporal patches, rows, columns) of cells of each picture of one sample, in the order of their placeholders."""
    left = {
        token: [(t, h // 2, w // 2) for t, h, w in inputs.get(f"{name}_grid_thw", torch.zeros(0, 3)).long().tolist()]
        for name, token in (("image", IMAGE), ("video", VIDEO))
    }
    row, found, k = inputs["input_ids"][0].tolist(), [], 0
    while k < len(row):
        if row[k] in left:
            found.append(left[row[k]].pop(0))
            k += found[-1][0] * found[-1][1] * found[-1][2]
        else:
            k += 1
    return found


def rope(model: Any, inputs: dict[str, Tensor]) -> tuple[list[tuple[int, int, int]], int]:
    """Time, row and column of every token of one sample, and one after the largest of all."""
    interval = getattr(model.config.vision_config, "tokens_per_second", 1)
    grids, row = pictures(model, inputs), inputs["input_ids"][0].tolist()
    places: list[tuple[int, int, int]] = []
    now = 0
    while len(places) < len(row):
        token = row[len(places)]
        if token not in (IMAGE, VIDEO):
            places.append((now, now, now))
            now += 1
            continue
        time, rows, columns = grids.pop(0)
        step = interval if token == VIDEO else 1
        places += [(now + t * step, now + y, now + x) for t in range(time) for y in range(rows) for x in range(columns)]
        now += max(rows, columns)
    return places, max(max(place) for place in places) + 1


@torch.no_grad()
def features(model: Any, inputs: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """What the unchanged model makes of each image and clip."""
    found = {}
    for name, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels in inputs:
            encode = getattr(model, f"get_{name}_features")
            grids = inputs[f"{name}_grid_thw"]
            found[name] = list(encode(inputs[pixels], grids, return_dict=True).pooler_output)
    return found


@torch.no_grad()
def embeddings(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(S, D) of one sample, with the pictures in their places."""
    embeds = model.get_input_embeddings()(inputs["input_ids"])[0].clone()
    for name, token in (("image", IMAGE), ("video", VIDEO)):
        for one in [features(model, inputs).get(name)]:
            if one is not None:
                embeds[inputs["input_ids"][0] == token] = torch.cat(one)
    return embeds


@torch.no_grad()
def by_hand(model: Any, embeds: Tensor, places: list[tuple[int, int, int]], left: dict[int, list[int]]) -> Tensor:
    """(S', V) logits: layer after layer, `left[l]` being the rows of `embeds` (S, D) that layers from l on see."""
    language = model.model.language_model
    rows, hidden = list(range(len(embeds))), embeds[None]
    for number, layer in enumerate(language.layers):
        if number in left:
            hidden, rows = hidden[:, [rows.index(row) for row in left[number]]], left[number]
        ids = torch.tensor([places[row] for row in rows]).T[:, None]
        future = torch.ones(len(rows), len(rows)).triu(1).bool()
        mask = torch.zeros(future.shape).masked_fill(future, float("-inf"))[None, None]
        hidden = layer(hidden, attention_mask=mask, position_embeddings=language.rotary_emb(hidden, ids))
    return model.lm_head(language.norm(hidden))[0]


@HOSTS
def test_the_reference_is_the_model(host: str) -> None:
    model = vlm(host)
    inputs = prompt(model, **MIXED)
    for b in range(4):
        alone = single(model, inputs, b)
        places, end = rope(model, alone)
        expected = by_hand(model, embeddings(model, alone), places, {})
        assert torch.allclose(logits(model, alone)[0], expected, atol=1e-4)
        assert model.model.rope_deltas is None or b == 1 or model.model.rope_deltas.item() == end - len(places)


# -- the layers by hand


def kept(model: Any, inputs: dict[str, Tensor], rule: str) -> tuple[list[int], list[int]]:
    """(rows that stay, rows that do not) of one sample, where of each row of the batch every other cell stays."""
    ids, left, gone, k = inputs["input_ids"][0].tolist(), [], [], 0
    grids = pictures(model, inputs)
    while k < len(ids):
        if ids[k] not in (IMAGE, VIDEO):
            left.append(k)
            k += 1
            continue
        time, rows, columns = grids.pop(0)
        for cell in range(time * rows * columns):
            stays = rule == "odd" and cell % (rows * columns) % 2 == 1
            (left if stays else gone).append(k + cell)
        k += time * rows * columns
    return left, gone


@HOSTS
@pytest.mark.parametrize("renumbers", (True, False))
@torch.no_grad()
def test_prefill_and_decoding_equal_the_layers_run_by_hand(host: str, renumbers: bool) -> None:
    """Tokens keep their time, row and column whatever the method says, and so does what is generated."""
    model = vlm(host)
    batch = prompt(model, **MIXED)
    answer = torch.tensor([[9, 44, 31, 60]])
    for b in (0, 2):
        inputs = single(model, batch, b)
        places, end = rope(model, inputs)
        embeds = torch.cat([embeddings(model, inputs), model.get_input_embeddings()(answer)[0]])
        length = len(places)
        tail = list(range(length, length + 4))
        visual = [k for k, token in enumerate(inputs["input_ids"][0].tolist()) if token in (IMAGE, VIDEO)]
        text = [k for k in range(length) if k not in visual]
        for layer in range(4):
            for rule, stays in ((odd, visual[1::2]), (none, [])):
                with foveate.apply(model, probe("llm.layer", rule, layer=layer, renumbers=renumbers)):
                    first = model(**inputs)
                    last = model(input_ids=answer, past_key_values=first.past_key_values)
                left = sorted(text + stays)
                whole = by_hand(model, embeds, places + [(end + k,) * 3 for k in range(4)], {layer: left + tail})
                assert torch.allclose(first.logits[0, -1], whole[-5], atol=1e-4), layer
                assert torch.allclose(last.logits[0], whole[-4:], atol=1e-4), layer
                held = [one.keys.shape[2] for one in first.past_key_values.layers]
                assert held == [length + 4] * layer + [len(left) + 4] * (4 - layer)


@HOSTS
@pytest.mark.parametrize("stage", ("vision.output", "projector"))
def test_dropping_before_the_language_model_equals_a_prompt_with_gaps(host: str, stage: str) -> None:
    model = vlm(host)
    batch = prompt(model, **MIXED)
    for b in (0, 2, 3):
        inputs = single(model, batch, b)
        left, gone = kept(model, inputs, "odd")
        expected = by_hand(model, embeddings(model, inputs), rope(model, inputs)[0], {0: left})
        with foveate.apply(model, probe(stage, odd)):
            result = logits(model, inputs)[0]
        assert torch.allclose(result[left], expected, atol=1e-4)
        # A dropped position repeats the last one before it that is left.
        for place in gone[1:]:
            assert torch.equal(result[place], result[max([one for one in left if one < place], default=left[0])])


@HOSTS
def test_a_method_that_reorders_leaves_every_token_on_its_row_and_column(host: str) -> None:
    model = vlm(host)
    inputs = prompt(model, [(2, 5)], sizes=[(6, 10)])
    order = torch.tensor([[11, 3, 7, 0, 14]])
    left = sorted([0, 1, *(2 + cell for cell in order[0].tolist()), *range(17, 22)])
    for stage, layer in (("vision.output", -1), ("projector", -1), ("llm.layer", 2)):

        def shuffle(tokens: Tokens, at: Stage) -> Tokens:
            return tokens.keep(order) if at.layer == layer else tokens  # noqa: B023

        expected = by_hand(model, embeddings(model, inputs), rope(model, inputs)[0], {max(layer, 0): left})
        with foveate.apply(model, acting(stage, shuffle)):
            assert torch.allclose(logits(model, inputs)[0, -5:], expected[-5:], atol=1e-4), stage


@HOSTS
def test_merged_tokens_stand_where_their_first_cell_did(host: str) -> None:
    """Each row of a picture's cells becomes one token: its mean, at the place of the row's first cell."""
    model = vlm(host)
    inputs = prompt(model, [(2, 5)], sizes=[(6, 10)])
    embeds = embeddings(model, inputs)
    left = [0, 1, 2, 7, 12, *range(17, 22)]
    for row in (2, 7, 12):
        embeds[row] = embeds[row : row + 5].mean(0)
    expected = by_hand(model, embeds, rope(model, inputs)[0], {0: left})
    with foveate.apply(model, acting("projector", lambda tokens, at: tokens.pool((1, 5)))) as applied:
        result = logits(model, inputs)[0]
    assert torch.allclose(result[left], expected, atol=1e-4)
    assert applied.trace[-1].source[0].tolist() == [0] * 5 + [1] * 5 + [2] * 5


# -- positions while decoding


def positions(model: Any) -> tuple[list[Tensor], Any]:
    """Collects the position ids (3, B, n) that the language model's rotary embedding is asked for."""
    seen: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        given = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        seen.append(given.expand(3, -1, -1).clone())

    return seen, model.model.language_model.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)


ENDINGS: list[tuple[list[tuple[int, ...]], list[tuple[int, ...]]]] = [
    ([(2, 5), (4,), (0, 3, 6)], [(8, 8), (6, 10), (3, 8, 4)]),
    # Longer in time than in space, so that the clip's positions go beyond those of the text after it.
    ([(3, 2), (2, 4)], [(9, 4, 4), (8, 8)]),
    # The prompts end with their pictures.
    ([(3, 0), (2, 0)], [(4, 8, 4), (8, 8)]),
]


@HOSTS
@pytest.mark.parametrize("samples, sizes", ENDINGS)
@pytest.mark.parametrize("stage, layer", (("vision.output", -1), ("llm.layer", 0), ("llm.layer", 2)))
def test_decoding_goes_on_at_the_positions_of_the_dense_run(
    host: str, samples: Any, sizes: Any, stage: str, layer: int
) -> None:
    model = vlm(host)
    inputs = prompt(model, samples, sizes=sizes)
    seen, handle = positions(model)
    generate(model, inputs, max_new_tokens=4)
    dense = seen[1:]
    beams = len(samples) * 2
    seen.clear()
    for rule in (odd, none):
        with foveate.apply(model, probe(stage, rule, layer=layer)):
            generate(model, inputs, max_new_tokens=4)
            later = [one for one in seen if one.shape[2] == 1]
            seen.clear()
            # Asked for once more where a layer's cache differs from the first one's.
            each = 2 if layer == 2 else 1
            assert len(dense) == 3 and len(later) == 3 * each
            for step, expected in enumerate(dense):
                for one in later[each * step : each * (step + 1)]:
                    assert torch.equal(one, expected)
            generate(model, inputs, max_new_tokens=3, num_beams=2)
            later = [one for one in seen if one.shape[2] == 1 and one.shape[1] == beams]
            assert torch.equal(later[0], dense[0].repeat_interleave(2, 1))
            seen.clear()
    handle.remove()


@HOSTS
@pytest.mark.parametrize("samples, sizes", ENDINGS)
@torch.no_grad()
def test_a_plain_forward_on_a_cache_goes_on_at_the_positions_of_the_dense_run(
    host: str, samples: Any, sizes: Any
) -> None:
    model = vlm(host)
    inputs = single(model, prompt(model, samples, sizes=sizes), 0)
    more = torch.tensor([[7, 8, 9]])
    seen, handle = positions(model)
    cache = model(**inputs).past_key_values
    model(input_ids=more, past_key_values=cache)
    dense = seen[-1]
    assert dense[0, 0].tolist() == [rope(model, inputs)[1] + k for k in range(3)]
    for stage, layer in (("vision.output", -1), ("llm.layer", 0), ("llm.layer", 2)):
        for rule in (odd, none):
            with foveate.apply(model, probe(stage, rule, layer=layer)):
                cache = model(**inputs).past_key_values
                seen.clear()
                model(input_ids=more, past_key_values=cache)
                assert seen and all(torch.equal(one, dense) for one in seen)
    handle.remove()


@HOSTS
@pytest.mark.parametrize("stage, layer", (("vision.output", -1), ("llm.layer", 0)))
def test_the_axis_that_only_counts_tokens_has_no_gaps(host: str, stage: str, layer: int) -> None:
    """generate gives four axes. FlashAttention takes a gap on the first for the border to another sequence."""
    model = vlm(host)
    inputs = single(model, prompt(model, **MIXED), 2)
    seen: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["position_ids"])

    with foveate.apply(model, probe(stage, odd, layer=layer)):
        # Behind our hook, so that it sees what the layer gets.
        model.model.language_model.layers[3].register_forward_pre_hook(note, with_kwargs=True)
        generate(model, inputs, max_new_tokens=1)
    left, _ = kept(model, inputs, "odd")
    assert seen[0].tolist() == [list(range(len(left)))]


# -- generation and batches


@HOSTS
def test_several_methods_at_once(host: str) -> None:
    model = vlm(host)
    inputs = prompt(model, **MIXED)
    with foveate.apply(model, ["fopru", "pyramiddrop"]) as applied:
        tokens = generate(model, inputs)
        assert torch.equal(generate(model, inputs, use_cache=False), tokens)
        stages = [record.stage for record in applied.trace]
    # Once for images, once for clips.
    assert stages[:3] == ["vision.output", "vision.output", "llm.input"] and stages[3].startswith("llm.layer")


# -- training


@HOSTS
def test_the_loss_is_that_of_the_shortened_sequence(host: str) -> None:
    model = vlm(host)
    inputs = supervise(prompt(model, [(2, 6)], sizes=[(6, 10)]))
    left, _ = kept(model, inputs, "odd")
    for stage, layer in (("vision.output", -1), ("llm.layer", 0), ("llm.layer", 3)):
        with foveate.apply(model, probe(stage, odd, layer=layer)), torch.no_grad():
            loss = model(**inputs).loss
        rows = by_hand(model, embeddings(model, inputs), rope(model, inputs)[0], {max(layer, 0): left})
        target = inputs["labels"][0, left]
        expected = torch.nn.functional.cross_entropy(rows[:-1], target[1:], ignore_index=-100)
        assert torch.allclose(loss, expected, atol=1e-5)


# -- conversations


@HOSTS
@pytest.mark.parametrize("stage, layer", (("vision.output", -1), ("llm.layer", 2)))
@torch.no_grad()
def test_a_conversation_goes_on(host: str, stage: str, layer: int) -> None:
    model = vlm(host)
    inputs = prompt(model, **MIXED)
    more = torch.randint(3, IMAGE, (4, 7))
    with foveate.apply(model, probe(stage, lively, layer=layer)):
        first = model(**inputs, use_cache=True).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
        other, cropped, again = (copy.deepcopy(first) for _ in range(3))
        at_once = model(input_ids=more, attention_mask=mask, past_key_values=first).logits
        # In two goes, on a copy.
        model(input_ids=more[:, :3], attention_mask=mask[:, :-4], past_key_values=other)
        in_two = model(input_ids=more[:, 3:], attention_mask=mask, past_key_values=other).logits
        assert torch.allclose(in_two, at_once[:, 3:], atol=1e-4)
        # Taken back, into the closing text of the prompts too.
        model(input_ids=more, attention_mask=mask, past_key_values=cropped)
        cropped.crop(-9)
        ids = torch.cat([inputs["input_ids"][:, -2:], more], 1)
        result = model(input_ids=ids, attention_mask=mask, past_key_values=cropped).logits
        assert torch.allclose(result[:, 2:], at_once, atol=1e-4)
        # By generate, which has positions of its own for it.
        answer = generate(model, {"input_ids": more, "attention_mask": mask}, past_key_values=again, max_new_tokens=1)
        forbidden = at_once[:, -1].clone()
        forbidden[:, model.generation_config.suppress_tokens] = float("-inf")
        assert torch.equal(answer[:, 0], forbidden.argmax(1))


@HOSTS
def test_features_that_were_computed_before(host: str) -> None:
    model = vlm(host)
    inputs = prompt(model, **MIXED)
    pixels = ("pixel_values", "pixel_values_videos")
    rest = {name: value for name, value in inputs.items() if name not in pixels}

    @torch.no_grad()
    def encode() -> dict[str, Any]:
        images, clips = ((inputs[name], inputs[f"{kind}_grid_thw"]) for name, kind in zip(pixels, ("image", "video")))
        return {
            "image": model.get_image_features(*images, return_dict=True),
            "video": model.get_video_features(*clips, return_dict=True),
        }

    before = encode()
    with foveate.apply(model, "fopru"), pytest.raises(InputError, match="computed before"):
        model(**rest, mm_encoder_outputs=before)
    with foveate.apply(model, "pyramiddrop"), torch.no_grad():
        assert torch.equal(model(**rest, mm_encoder_outputs=before).logits, logits(model, inputs))
    with foveate.apply(model, "fopru"), torch.no_grad():
        assert torch.equal(model(**rest, mm_encoder_outputs=encode()).logits, logits(model, inputs))
        # By embeddings, the placeholders are found too; positions then have to be given.
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        ids, kinds, *grids = (
            inputs[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
        )
        given, _ = model.model.get_rope_index(ids, kinds, *grids, attention_mask=inputs["attention_mask"])
        by_embeds = model(
            inputs_embeds=embeds, position_ids=given, **{k: v for k, v in inputs.items() if k != "input_ids"}
        ).logits
        assert torch.equal(by_embeds, logits(model, inputs))


# -- where cells come from, and where they go


@HOSTS
@torch.no_grad()
def test_rows_cells_and_grids(host: str) -> None:
    """Each row that a handler gets is what the unchanged model makes of one picture or temporal patch."""
    model = vlm(host)
    inputs = prompt(model, [(2, 5), (1, 2, 3), (0, 3, 6)], sizes=[(8, 8), (6, 10), (8, 8), (3, 8, 4), (2, 6, 10)])
    alone = features(model, inputs)
    whole: dict[str, list[Tensor]] = {"image": alone["image"], "video": []}
    for one, (time, _, _) in zip(alone["video"], inputs["video_grid_thw"].tolist()):
        whole["video"] += list(one.reshape(time, -1, one.shape[1]))
    for stage in ("vision.output", "projector"):
        seen: list[tuple[Tensor, tuple[int, int], Tensor, Tensor]] = []

        def look(tokens: Tokens, at: Stage) -> Tokens:
            x = tokens.x
            if at.name == "vision.output":
                # The merger takes a cell's patches side by side.
                merger = copy.deepcopy(model.model.visual.merger)
                merger._forward_pre_hooks.clear()
                merger._forward_hooks.clear()
                x = merger(x.reshape(-1, 32)).reshape(*x.shape[:2], 32)
            seen.append((x, at.signals.grid(), tokens.position, at.entered))  # noqa: B023
            assert tokens.valid is None and [len(one.packed) for one in at.signals.crops()] == [1] * len(x)
            return tokens

        with foveate.apply(model, acting(stage, look)):
            logits(model, inputs)
        # Images of 4x4 and 3x5 cells, then clips of 4x2 and 3x5; rows of one grid together.
        assert [grid for _, grid, _, _ in seen] == [(4, 4), (3, 5), (4, 2), (3, 5)]
        groups = [whole["image"][0:3:2], whole["image"][1:2], whole["video"][:3], whole["video"][3:]]
        for (x, (rows, columns), position, entered), expected in zip(seen, groups, strict=True):
            assert torch.allclose(x, torch.stack(expected), atol=1e-5)
            assert entered.tolist() == [rows * columns] * len(expected)
            assert position[0].tolist() == [[0, y, x] for y in range(rows) for x in range(columns)]


@HOSTS
@pytest.mark.parametrize("stage", ("vision.output", "projector"))
@torch.no_grad()
def test_every_cell_is_where_the_trace_says(host: str, stage: str) -> None:
    """Features are replaced by numbers that name their cells; the language model must find the numbers it expects."""
    model = vlm(host)
    inputs = prompt(model, [(2, 5), (1, 2, 3), (0, 3, 6)], sizes=[(8, 8), (6, 10), (8, 8), (3, 8, 4), (2, 6, 10)])
    seen: dict[str, Any] = {}

    class Watch(Method):
        card = Card(slug="watch", title="for tests", arxiv="", kind="reduce", hosts=("hf-vlm",), summary="for tests")

        @foveate.at(stage)
        def name(self, tokens: Tokens, at: Stage) -> Tokens:
            # Cells are named by what the projector makes of them, every second one stays, the last first.
            where = 1000 * tokens.position[..., 1] + tokens.position[..., 2]
            at.marks["where"] = where
            count = tokens.x.shape[1]
            left = tokens.keep(torch.arange(count - 1, -1, -2).expand(len(tokens.x), -1))
            assert torch.equal(left.position[..., 1] * 1000 + left.position[..., 2], where.flip(1)[:, ::2])
            if at.name == "projector":
                left = left.with_x((where.flip(1)[:, ::2] + 1).unsqueeze(-1).expand_as(left.x))
            return left

        @foveate.at("llm.layer")
        def look(self, tokens: Tokens, at: Stage) -> Tokens:
            if at.layer == 0:
                seen.update(x=tokens.x[..., 0], tokens=tokens, marks=at.marks["where"], slots=at.signals.slots())
            return tokens

    with foveate.apply(model, Watch()) as applied:
        logits(model, inputs)
    # Per sample: (crop, row, column) of every cell, crop after crop, and which of them stay.
    crops = [[(4, 4)], [(3, 5), (4, 4)], [(4, 2)] * 3 + [(3, 5)] * 2]
    cells = [
        [(t, y, x) for t, (rows, columns) in enumerate(some) for y in range(rows) for x in range(columns)]
        for some in crops
    ]
    stays = [
        [(rows * columns - 1 - cell) % 2 == 0 for rows, columns in some for cell in range(rows * columns)]
        for some in crops
    ]
    sequences = []
    for b in range(3):
        ids, staying = single(model, inputs, b)["input_ids"][0].tolist(), iter(stays[b])
        sequences.append([token in (IMAGE, VIDEO) for token in ids if token not in (IMAGE, VIDEO) or next(staying)])
    tokens = seen["tokens"]
    entry = next(record for record in applied.trace if record.stage == "llm.input")
    assert torch.equal(entry.source, tokens.source)
    for b in range(3):
        source = tokens.source[b, : len(cells[b])].tolist()
        assert [token >= 0 for token in source] == stays[b] and entry.tokens_out[b] == sum(stays[b])
        assert (tokens.source[b, len(cells[b]) :] == -1).all()
        for (t, y, x), cell, token in zip(cells[b], range(len(source)), source):
            assert seen["marks"][b, cell] == 1000 * y + x
            if token >= 0:
                assert tokens.position[b, token].tolist() == [t, y, x]
                assert stage != "projector" or seen["x"][b, token] == 1000 * y + x + 1
        padding = max(map(len, sequences)) - len(sequences[b])
        slots = [padding + place for place, visual in enumerate(sequences[b]) if visual]
        assert [int(seen["slots"][b, token]) for token in source if token >= 0] == slots
    records = [record for record in applied.trace if record.stage == stage]
    # Rows of the images, in the order of the batch; then those of the clips.
    assert [record.tokens_in for record in records] == [(16, 15, 16), (8, 8, 8, 15, 15)]
    assert [record.tokens_out for record in records] == [(8, 8, 8), (4, 4, 4, 8, 8)]
    assert records[0].source[1].tolist() == [(14 - cell) // 2 if cell % 2 == 0 else -1 for cell in range(15)] + [-1]


# -- signals


@HOSTS
@pytest.mark.parametrize("layer", (0, 1, 4))
def test_what_cells_receive_and_their_keys(host: str, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the weights that the eager implementation computes, once for each picture or window."""
    model = vlm(host)
    inputs = prompt(model, [(2, 5), (1, 2, 3)], sizes=[(8, 8), (6, 10), (4, 6)])
    received, keys = [], []

    def ask(at: Stage) -> None:
        received.append(at.signals.received(layer))
        keys.append(at.signals.keys(layer))

    method, _ = asking("vision.output", ask, reads=(f"vision.attention[{layer}]",))
    with foveate.apply(model, method):
        logits(model, inputs)
    attention = model.model.visual.blocks[layer].attn
    module: Any = sys.modules[type(attention).__module__]
    original, weights, projected = module.eager_attention_forward, [], []

    def noting(which: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(which, *args, **kwargs)
        if which is attention:
            weights.append(output[1][0].mean(0))
        return output

    monkeypatch.setattr(module, "eager_attention_forward", noting)
    handle = attention.qkv.register_forward_hook(lambda module, args, output: projected.append(output[:, 32:64]))
    model.set_attn_implementation("eager")
    logits(model, inputs)
    handle.remove()
    # Where the encoder has each cell: Qwen2.5-VL goes window by window of 2x2 cells.
    start, grids = 0, [(4, 4), (3, 5), (2, 3)]
    paid = torch.block_diag(*weights)
    for number, (rows, columns) in enumerate(grids):
        cells = [(y, x) for y in range(rows) for x in range(columns)]
        if host == "qwen2.5-vl":
            cells.sort(key=lambda cell: (cell[0] // 2, cell[1] // 2, cell[0], cell[1]))
        here = slice(start, start + 4 * len(cells))
        own = paid[here, here]
        assert torch.allclose(own.sum(1), torch.ones(len(own)), atol=1e-5)
        for place, (y, x) in enumerate(cells):
            mine = slice(start + 4 * place, start + 4 * place + 4)
            expected = own[:, 4 * place : 4 * place + 4].mean()
            assert torch.allclose(received[number][0, y * columns + x], expected, atol=1e-6)
            assert torch.allclose(keys[number][0, y * columns + x], projected[0][mine].mean(0), atol=1e-5)
        start = here.stop
        assert abs(float(received[number].sum()) - 1 / 4) < 1e-5
    assert (len(weights) > 3) == (host == "qwen2.5-vl" and layer == 0)


@HOSTS
def test_signals_of_cells_after_drops(host: str) -> None:
    """At the projector, what the encoder thought of the cells that were merged before."""
    model = vlm(host)
    inputs = prompt(model, [(2, 5)], sizes=[(4, 6)])
    answers: list[Any] = []

    class Both(Method):
        card = Card(slug="both", title="for tests", arxiv="", kind="reduce", hosts=("hf-vlm",), summary="for tests")

        def reads(self, host: Any) -> tuple[str, ...]:
            return ("vision.attention[3]",)

        @foveate.at("vision.output")
        def merge(self, tokens: Tokens, at: Stage) -> Tokens:
            answers.append((at.signals.received(3), at.signals.keys(3)))
            return tokens.merge(torch.tensor([[1, 0, -1, 0, 0, 2]]))

        @foveate.at("projector")
        def ask(self, tokens: Tokens, at: Stage) -> Tokens:
            answers.append((at.signals.received(3), at.signals.keys(3)))
            assert at.entered.tolist() == [6]
            return tokens

    with foveate.apply(model, Both()):
        logits(model, inputs)
    for fresh, merged in zip(*answers, strict=True):
        groups = [fresh[0, [1, 3, 4]].mean(0), fresh[0, 0], fresh[0, 5]]
        assert torch.allclose(merged[0], torch.stack(groups), atol=1e-6)


@HOSTS
@pytest.mark.parametrize("padding", ("left", "right"))
def test_signals_of_the_language_model(host: str, padding: str) -> None:
    model = vlm(host)
    inputs = prompt(model, **MIXED, padding=padding)
    real, visual = inputs["attention_mask"].bool(), inputs["mm_token_type_ids"] > 0
    full = eager(model, **inputs)
    method, answers = asking(
        "llm.layer",
        lambda at: (at.signals.text_to_vision(2), at.signals.attention(0).received(), at.signals.text_embeddings()),
        layer=2,
        reads=("llm.attention[0]",),
    )
    with foveate.apply(model, method):
        logits(model, inputs)
    asked, received, words = answers[0]
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    for b in range(4):
        rows, where = real[b].nonzero().squeeze(1), visual[b].nonzero().squeeze(1)
        assert close(asked[b, : len(where)], full[2][b, :, rows[-1], where].mean(0))
        assert close(received[b, rows], full[0][b][:, rows][..., rows].mean((0, 1)))
        text = embedded[b, real[b] & ~visual[b]]
        assert torch.equal(words[b, : len(text)], text)


@HOSTS
def test_signals_of_the_language_model_after_drops(host: str) -> None:
    """The rotary embeddings are those of the rows and columns that are left."""
    model = vlm(host)
    inputs = single(model, prompt(model, **MIXED), 2)
    left, _ = kept(model, inputs, "odd")
    places, embeds = rope(model, inputs)[0], embeddings(model, inputs)
    seen: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    handle = model.model.language_model.layers[2].register_forward_pre_hook(note, with_kwargs=True)
    by_hand(model, embeds, places, {0: left})
    handle.remove()
    attention = model.model.language_model.layers[2].self_attn
    ids = torch.tensor([places[row] for row in left]).T[:, None]
    future = torch.ones(len(left), len(left)).triu(1) * -1e9
    model.set_attn_implementation("eager")
    weights = attention(
        hidden_states=model.model.language_model.layers[2].input_layernorm(seen[0]), attention_mask=future[None, None],
        position_embeddings=model.model.language_model.rotary_emb(seen[0], ids),
    )[1]  # fmt: skip
    model.set_attn_implementation("sdpa")
    where = torch.tensor([k for k, row in enumerate(left) if inputs["mm_token_type_ids"][0, row] > 0])

    class Both(Method):
        card = Card(slug="both", title="for tests", arxiv="", kind="reduce", hosts=("hf-vlm",), summary="for tests")

        @foveate.at("projector")
        def drop(self, tokens: Tokens, at: Stage) -> Tokens:
            return tokens.keep(torch.arange(1, tokens.x.shape[1], 2).expand(len(tokens.x), -1))

        @foveate.at("llm.layer")
        def ask(self, tokens: Tokens, at: Stage) -> Tokens:
            if at.layer == 2:
                answers.append(at.signals.text_to_vision(2))
            return tokens

    answers: list[Tensor] = []
    with foveate.apply(model, Both()):
        logits(model, inputs)
    assert close(answers[0][0], weights[0, :, -1, where].mean(0))


# -- the stages inside the language model


@HOSTS
@pytest.mark.parametrize("stage", ("llm.attention", "llm.mlp"))
@torch.no_grad()
def test_calls_inside_layers(host: str, stage: str) -> None:
    model = vlm(host)
    inputs = prompt(model, **MIXED)
    dense, words = logits(model, inputs), generate(model, inputs, max_new_tokens=3)
    visual = inputs["mm_token_type_ids"] > 0

    def through(call: AttentionCall | MlpCall, at: Stage) -> Tensor:
        return call.run() if isinstance(call, AttentionCall) else call.function(call.hidden)

    def blind(call: AttentionCall | MlpCall, at: Stage) -> Tensor:
        if isinstance(call, AttentionCall):
            return call.run(value=call.value.masked_fill(call.is_visual[:, None, :, None], 0.0))
        return call.function(call.hidden).masked_fill(call.is_visual.unsqueeze(-1), 0.0)

    def zero(module: Any, args: Any, output: Tensor) -> Tensor | None:
        return None if output.shape[1] != visual.shape[1] else output.masked_fill(visual.unsqueeze(-1), 0.0)

    with foveate.apply(model, acting(stage, through)):
        assert torch.equal(logits(model, inputs), dense)
        assert torch.equal(generate(model, inputs, max_new_tokens=3), words)
    with foveate.apply(model, acting(stage, blind)):
        ours = logits(model, inputs)
    for layer in model.model.language_model.layers:
        (layer.self_attn.v_proj if stage == "llm.attention" else layer.mlp).register_forward_hook(zero)
    assert torch.allclose(ours, logits(model, inputs), atol=1e-4)


@HOSTS
@torch.no_grad()
def test_dropping_from_the_cache_equals_hiding_in_the_cache(host: str) -> None:
    model = vlm(host)
    inputs = prompt(model, **MIXED)
    more = torch.randint(3, IMAGE, (4, 2))
    visual, mask = inputs["mm_token_type_ids"] > 0, inputs["attention_mask"]
    hidden = mask.masked_fill(visual & (visual.cumsum(1) % 2 == 1), 0)
    # The positions of new tokens are those of the dense run.
    given, delta = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"], inputs["video_grid_thw"],
        attention_mask=mask,
    )  # fmt: skip
    ids = (mask.sum(1, keepdim=True) + delta + torch.arange(2)).expand(3, -1, -1)
    cache = model(**inputs, position_ids=given).past_key_values
    late = torch.ones_like(more)
    expected = model(
        input_ids=more, position_ids=ids, attention_mask=torch.cat([hidden, late], 1), past_key_values=cache
    ).logits
    drop = acting("llm.decode", lambda tokens, at: tokens.keep(compact(odd(tokens, at) & tokens.mask())))
    with foveate.apply(model, drop):
        cache = model(**inputs).past_key_values
        assert cache.get_seq_length() < mask.shape[1]
        ours = model(input_ids=more, attention_mask=torch.cat([mask, late], 1), past_key_values=cache).logits
    assert torch.allclose(ours, expected, atol=1e-4)


# -- what there is not


def test_refusals() -> None:
    model = vlm("qwen2.5-vl")
    inputs = prompt(model, **MIXED)
    with pytest.raises(InputError, match=r"needs the stage vision\.pixels, which Qwen2_5_VLForConditionalGeneration"):
        foveate.apply(model, "resolution")
    with pytest.raises(InputError, match=r"needs the stage vision\.layer"):
        foveate.apply(model, probe("vision.layer", odd, layer=1))
    with pytest.raises(InputError, match="no class token"):
        foveate.apply(model, "fopru", queries="class")
    for ask, message in (
        (lambda at: at.signals.attention(1), "ask for received"),
        (lambda at: at.signals.cls_attention(1), "no class token"),
    ):
        method, _ = asking("vision.output", ask, reads=("vision.attention[1]",))
        with foveate.apply(model, method), pytest.raises(InputError, match=message):
            model(**inputs)
    method, _ = asking("vision.output", lambda at: at.signals.received(1))
    with foveate.apply(model, method), pytest.raises(RuntimeError, match=r"Method\.reads"):
        model(**inputs)
    method, answers = asking("llm.layer", lambda at: at.signals.grid(), layer=0)
    with foveate.apply(model, method):
        with pytest.raises(InputError, match="different grids"):
            model(**inputs)
        model(**prompt(model, [(2, 5), (3, 4)], sizes=[(6, 10), (2, 6, 10)]))
    assert answers == [(3, 5)]
