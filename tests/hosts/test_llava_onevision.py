"""LLaVA-OneVision: crops, several whole pictures, clips, pictures it resamples; see also contract/test_vlm_hosts.py."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_llava import by_hand
from torch import Tensor

import foveate
from foveate.method import InputError, Method, Stage
from foveate.tokens import Tokens
from reference import prompt_embeddings
from running import METHODS, generate, logits, none, odd
from tiny import IMAGE, VIDEO, probe, prompt, single, vlm

SAMPLES = [(2, 5, 3), (4,), (1, 5), (0, 2, 3), (3, 2)]
SIZES: list[tuple[int, ...]] = [(24, 12), (3, 16, 16), (30, 30), (20, 20), (16, 16), (3, 16, 16)]
"""A lone image with crops (2 x 1) and a clip of three frames; none; an image with crops (2 x 2); two whole images, one
of which opens the prompt; a clip."""

HOSTS: dict[str, dict[str, Any]] = {
    "crops": {},
    # Images of more than two crops: the 2 x 2 ones are resampled, 8 x 8 patches to 5 x 5 cells.
    "resampled": {"vision_aspect_ratio": "anyres_max_2"},
}
hosts = pytest.mark.parametrize("host", HOSTS)


def build(host: str = "resampled", **config: Any) -> Any:
    return vlm("onevision", **HOSTS[host] | config)


def given(model: Any, **settings: Any) -> dict[str, Tensor]:
    return prompt(model, SAMPLES, sizes=SIZES, **settings)


def visual(inputs: dict[str, Tensor]) -> Tensor:
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


@torch.no_grad()
def features(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(rows, P, D): what the unchanged model's projector makes of each row of patches."""
    pixels = inputs.get("pixel_values", inputs.get("pixel_values_videos"))
    assert pixels is not None
    tower = model.model.vision_tower(pixels.flatten(0, 1), output_hidden_states=True)
    return model.model.multi_modal_projector(tower.hidden_states[-1])


def entering(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(B, S, D) what enters the language model, to be called with methods applied."""
    seen: list[Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    logits(model, inputs)
    handle.remove()
    return seen[0]


# -- what a stage acts on


def flat(lists: list[list[Tensor]]) -> list[Tensor]:
    return [one for some in lists for one in some]


def cells_of_a_clip(rows: Tensor, side: int) -> list[list[Tensor]]:
    """For each frame, the mean of each 2 x 2 patches of rows (frames, side * side, D)."""
    half = side // 2
    return [
        [
            torch.stack([frame[(2 * y + i) * side + 2 * x + j] for i in (0, 1) for j in (0, 1)]).mean(0)
            for y in range(half)
            for x in range(half)
        ]
        for frame in rows
    ]


def resampled_by_hand(rows: Tensor, newline: Tensor) -> list[list[Tensor]]:
    """Thumbnail and, row by row, the means of each 2 x 2 patches of 2 x 2 crops with 4 x 4 patches, newlines last."""
    stitched = [[rows[1 + (y // 4) * 2 + x // 4, (y % 4) * 4 + x % 4] for x in range(8)] for y in range(8)]
    lines = [list(rows[0])]
    for y in range(4):
        line = [torch.stack([stitched[2 * y + i][2 * x + j] for i in (0, 1) for j in (0, 1)]).mean(0) for x in range(4)]
        lines.append([*line, newline])
    return lines


@pytest.mark.parametrize("stage", ("vision.output", "projector"))
def test_a_stage_drops_cells_of_clips(stage: str) -> None:
    model = build()
    inputs = prompt(model, [(2, 5)], sizes=[(3, 16, 16)])
    frames = cells_of_a_clip(features(model, inputs), 4)
    embeds, where = prompt_embeddings(model, inputs)[0], visual(inputs)[0]
    assert torch.allclose(embeds[where], torch.stack([*flat(frames), model.model.image_newline]), atol=1e-5)
    kept = [one for frame in frames for one in frame[1::2]]
    shorter = torch.cat([embeds[:2], torch.stack(kept), model.model.image_newline.detach()[None], embeds[-5:]])
    with foveate.apply(model, probe(stage, odd)) as applied:
        result = logits(model, inputs)[0]
    assert [record.tokens_out for record in applied.trace] == [(2, 2, 2), (7,)]
    assert torch.allclose(result[-5:], by_hand(model, shorter, {}, True)[-5:], atol=1e-4)


@pytest.mark.parametrize("stage", ("vision.output", "projector"))
def test_a_stage_drops_cells_of_resampled_images(stage: str) -> None:
    model = build(vision_aspect_ratio="anyres_max_1")
    inputs = prompt(model, [(2, 5)], sizes=[(30, 30)])
    newline = model.model.image_newline.detach()
    lines = resampled_by_hand(features(model, inputs), newline)
    embeds, where = prompt_embeddings(model, inputs)[0], visual(inputs)[0]
    assert torch.allclose(embeds[where], torch.stack(flat(lines)), atol=1e-5)
    # One block of 4 x 4 cells: its second and fourth columns stay, of no row all, so that newlines go.
    kept = [*lines[0][1::2], *(one for line in lines[1:] for one in line[1:4:2])]
    shorter = torch.cat([embeds[:2], torch.stack(kept), embeds[-5:]])
    with foveate.apply(model, probe(stage, odd)) as applied:
        result = logits(model, inputs)[0]
    assert [record.tokens_out for record in applied.trace] == [(8, 8), (16,)]
    assert torch.allclose(result[-5:], by_hand(model, shorter, {}, True)[-5:], atol=1e-4)


def test_a_stage_drops_patches_of_crops_and_of_whole_images() -> None:
    model = build()
    for samples, sizes in (([(2, 5)], [(24, 12)]), ([(1, 2, 5)], [(16, 16), (30, 30)])):
        inputs = prompt(model, samples, sizes=sizes)
        embeds, where = prompt_embeddings(model, inputs)[0], visual(inputs)[0]
        newline = (embeds == model.model.image_newline).all(1)
        patch, number = (where & ~newline).tolist(), -1
        kept = []
        for place in range(len(embeds)):
            number += patch[place]
            # Whole images end with a newline that stays; of crops, no row is left whole.
            if not where[place] or (patch[place] and number % 2 == 1) or (newline[place] and len(sizes) > 1):
                kept.append(place)
        for stage in ("vision.output", "projector"):
            with foveate.apply(model, probe(stage, odd)):
                result = logits(model, inputs)[0]
            assert torch.allclose(result[-5:], by_hand(model, embeds[kept], {}, True)[-5:], atol=1e-4)


def run_tower(model: Any, pixels: Tensor, change: Callable[[int, Tensor], Tensor]) -> Tensor:
    """(rows, K, D) of the projector, with `change(l, hidden)` before each encoder layer l."""
    tower = model.model.vision_tower
    hidden = tower.embeddings(pixels)
    for number, layer in enumerate(tower.encoder.layers):
        hidden = layer(change(number, hidden), attention_mask=None)
    return model.model.multi_modal_projector(hidden)


@torch.no_grad()
def test_what_was_merged_in_the_tower_is_put_back_before_frames_are_pooled() -> None:
    """Patches are merged across cells, so that a cell has parts of several tokens."""
    model = build()
    inputs = prompt(model, [(2, 5)], sizes=[(3, 16, 16)])
    groups = [0, 1, 1, 2, 2, 2, 3, 4, 5, 6, 7, 7, 8, 9, 9, 9]

    class Merging(Method):
        card = probe("vision.layer", odd).card

        @foveate.at("vision.layer")
        def act(self, tokens: Tokens, at: Stage) -> Tokens:
            return tokens.merge(torch.tensor([groups] * 3)) if at.layer == 2 else tokens

    def merged(number: int, hidden: Tensor) -> Tensor:
        if number != 2:
            return hidden
        return torch.stack([hidden[:, [g == k for g in groups]].mean(1) for k in range(10)], 1)

    rows = run_tower(model, inputs["pixel_values_videos"][0], merged)[:, groups]
    wanted = torch.stack([*flat(cells_of_a_clip(rows, 4)), model.model.image_newline])
    with foveate.apply(model, Merging()) as applied:
        embeds = entering(model, inputs)
    assert torch.allclose(embeds[0, visual(inputs)[0]], wanted, atol=1e-5)
    assert [record.tokens_out for record in applied.trace] == [(10, 10, 10), (13,)]


@torch.no_grad()
def test_what_was_dropped_in_the_tower_is_left_out_of_the_means() -> None:
    model = build()
    inputs = prompt(model, [(2, 5)], sizes=[(3, 16, 16)])
    # The first cell loses one patch, the second two, the third all four, the last none.
    left = [1, 2, 4, 5, 7, 10, 11, 14, 15]
    keep = torch.zeros(16, dtype=torch.bool)
    keep[left] = True
    rows = run_tower(model, inputs["pixel_values_videos"][0], lambda number, x: x[:, left] if number == 2 else x)
    members = [(0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15)]
    wanted = [
        rows[frame][[left.index(m) for m in cell if m in left]].mean(0)
        for frame in range(3)
        for cell in members
        if set(cell) & set(left)
    ]
    with foveate.apply(model, probe("vision.layer", lambda tokens, at: keep.expand(3, -1), layer=2)) as applied:
        embeds = entering(model, inputs)
    assert [record.tokens_out for record in applied.trace] == [(9, 9, 9), (10,)]
    # The cell that lost all is gone; the newline stays.
    assert embeds.shape[1] == 2 + 9 + 1 + 5
    assert torch.allclose(embeds[0, 2:11], torch.stack(wanted), atol=1e-5)
    assert torch.equal(embeds[0, 11], model.model.image_newline)


# -- generation


@pytest.mark.parametrize("stage, layer", [("vision.output", -1), ("projector", -1), ("llm.layer", 0), ("llm.layer", 3)])
def test_nothing_is_left(stage: str, layer: int) -> None:
    model = build()
    inputs = given(model)
    text = inputs["input_ids"][1:2, -4:]
    with foveate.apply(model, probe(stage, none, layer=layer)):
        cached = generate(model, inputs, max_new_tokens=4)
        assert torch.equal(cached, generate(model, inputs, max_new_tokens=4, use_cache=False))
        last = logits(model, inputs)
    # Without pictures the last sample is its text.
    if stage != "llm.layer":
        words = inputs["input_ids"][4][inputs["attention_mask"][4].bool() & ~visual(inputs)[4]][None]
        assert torch.allclose(last[4, -1], logits(model, {"input_ids": words})[0, -1], atol=1e-4)
    assert torch.allclose(last[1, -1], logits(model, {"input_ids": text})[0, -1], atol=1e-4)


def test_features_that_were_computed_before() -> None:
    model = build()
    inputs = given(model)
    with torch.no_grad():
        encoded = {
            "image": model.model.get_image_features(
                inputs["pixel_values"], inputs["image_sizes"], batch_num_images=inputs["batch_num_images"],
                return_dict=True,
            ),
            "video": model.model.get_video_features(inputs["pixel_values_videos"], return_dict=True),
        }  # fmt: skip
    rest = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with foveate.apply(model, "fopru", keep=0.5), pytest.raises(InputError, match="computed before"):
        model(**rest, mm_encoder_outputs=encoded)
    with foveate.apply(model, "pyramiddrop"), torch.no_grad():
        assert torch.allclose(model(**rest, mm_encoder_outputs=encoded).logits, logits(model, inputs), atol=1e-5)


# -- batches


def test_pixels_that_come_as_one_list_of_crops() -> None:
    model = build()
    inputs = given(model)
    counts = [3, 5, 1, 1]
    flat = torch.cat([values[:count] for values, count in zip(inputs["pixel_values"], counts)])
    with foveate.apply(model, "fopru", keep=0.5):
        assert torch.allclose(logits(model, inputs | {"pixel_values": flat}), logits(model, inputs), atol=1e-5)


def test_frames_of_an_odd_side() -> None:
    """5 x 5 patches become 3 x 3 cells, of which those in the middle share patches with others."""
    model = build(image=20)
    inputs = prompt(model, [(2, 5), (0, 3)], sizes=[(2, 20, 20), (2, 20, 20)])
    dense = logits(model, inputs)
    alone = [single(model, inputs, b) for b in range(2)]
    with foveate.apply(model, probe("vision.layer", lambda tokens, at: tokens.mask(), layer=2)):
        assert torch.allclose(logits(model, inputs), dense, atol=1e-5)
    for name, settings in METHODS:
        with foveate.apply(model, name, **settings) as applied:
            together = logits(model, inputs)
            for b, inputs_b in enumerate(alone):
                real = inputs["attention_mask"][b].bool()
                assert torch.allclose(together[b, real], logits(model, inputs_b)[0], atol=1e-4)
            if name == "fopru":
                assert applied.trace[0].tokens_in == (9,) * 2 and applied.host.grid() == (3, 3)


# -- provenance


def layout(host: str) -> dict[int, list[tuple[int, int, int]]]:
    """For each picture of `SIZES` its slots in order: (call of the stage, row in it, number of the cell or patch)."""
    crops, whole, frames = range(3), range(1), range(3)
    slots: dict[int, list[tuple[int, int, int]]] = {}
    slots[0] = [(0, row, m) for row in crops for m in range(16)]
    large = [(row, m) for row in range(5) for m in range(16)]
    if host == "crops":
        slots[2] = [(0, 3 + row, m) for row, m in large]
        after = 8
    else:
        # 5 x 5 cells in blocks of 3 + 2 rows and 3 + 2 columns, on the slots of 4 x 4 patches.
        slots[2] = [(1, row, m) for row, m in large]
        after = 3
    slots[3] = [(0, after + row, m) for row in whole for m in range(16)]
    slots[4] = [(0, after + 1 + row, m) for row in whole for m in range(16)]
    last = 1 if host == "crops" else 2
    slots[1] = [(last, row, m) for row in frames for m in range(4)]
    slots[5] = [(last, 3 + row, m) for row in frames for m in range(4)]
    return slots


def exists(host: str, picture: int, row: int, m: int) -> bool:
    """Whether a slot holds a token: blocks of the resampled image have fewer than a crop has patches."""
    if host == "crops" or picture != 2 or row == 0:
        return True
    high, wide = (3, 2)[(row - 1) // 2], (3, 2)[(row - 1) % 2]
    return m // 4 < high and m % 4 < wide


@hosts
def test_every_cell_is_where_the_trace_says(host: str) -> None:
    """Features are replaced by numbers that name their slots; the language model must find what it expects."""
    model = build(host)
    inputs = given(model)
    seen: dict[str, Any] = {}
    calls: list[int] = []

    class Watch(Method):
        card = probe("projector", odd).card

        @foveate.at("projector")
        def name(self, tokens: Tokens, at: Stage) -> Tokens:
            rows, count = tokens.x.shape[:2]
            value = torch.full((rows, count), -1.0)
            for row in range(rows):
                for m, token in enumerate(tokens.source[row].tolist()):
                    if token >= 0:
                        value[row, token] = len(calls) * 10000 + row * 100 + m
            calls.append(rows)
            named = tokens.with_x(value.unsqueeze(-1).expand_as(tokens.x))
            kept = torch.arange(1, count, 2).expand(rows, -1)
            return named.keep(torch.where(tokens.mask().gather(1, kept), kept, -1))

        @foveate.at("llm.layer")
        def look(self, tokens: Tokens, at: Stage) -> Tokens:
            if at.layer == 0:
                seen["x"], seen["source"], seen["position"] = tokens.x[..., 0], tokens.source, tokens.position
            return tokens

    with foveate.apply(model, Watch()) as applied:
        logits(model, inputs)
    assert calls == ([10, 6] if host == "crops" else [5, 5, 6])
    slots = layout(host)
    checked = 0
    for b, mine in enumerate(([0, 1], [], [2], [3, 4], [5])):
        # Images come before clips where they stand so in the prompt.
        place = crop = 0
        for picture in mine:
            first_row = slots[picture][0][1]
            for call, row, m in slots[picture]:
                token = int(seen["source"][b, place])
                place += 1
                # Tokens stand on their slots, so that every second slot was kept.
                if not exists(host, picture, row - first_row, m) or m % 2 == 0:
                    assert token == -1
                    continue
                assert seen["x"][b, token] == call * 10000 + row * 100 + m
                side = 2 if picture in (1, 5) else 4
                where = [crop + row - first_row, m // side, m % side]
                assert seen["position"][b, token].tolist() == where
                checked += 1
            crop += 1 + slots[picture][-1][1] - first_row
        # After them only newlines, which are no patches: one entry a token.
        rest = [token for token in seen["source"][b, place:].tolist() if token >= 0]
        held = {token for token in seen["source"][b, :place].tolist() if token >= 0}
        assert len(set(rest)) == len(rest) and not held & set(rest)
        assert len(held) + len(rest) == applied.trace[-1].tokens_out[b]
        assert len(rest) == {0: 1, 1: 0, 2: 0, 3: 2, 4: 1}[b]
    assert checked == (8 * 3 + 2 * 3) + (8 * 5 if host == "crops" else 8 + 3 + 3 + 2 + 2) + 16 + 6


def test_crops_are_grouped_thumbnail_first() -> None:
    model = build()
    inputs = given(model)
    seen: list[tuple[str, Any, Any]] = []

    class Watch(Method):
        card = probe("projector", odd).card

        @foveate.at("vision.patches")
        def early(self, tokens: Tokens, at: Stage) -> Tokens:
            seen.append(("patches", at.signals.crops(), at.signals.grid()))
            return tokens

        @foveate.at("vision.output")
        def late(self, tokens: Tokens, at: Stage) -> Tokens:
            seen.append(("output", at.signals.crops(), at.signals.grid()))
            return tokens

    with foveate.apply(model, Watch()):
        logits(model, inputs)

    def shape(crops: Any) -> list[tuple[int, int, tuple[int, int], list[int]]]:
        return [(one.rows.start, one.rows.stop, one.grid, one.packed.sum(1).tolist()) for one in crops]

    single_rows = [(0, 3, (2, 1), [16] * 3), (3, 4, (0, 0), [16]), (4, 5, (0, 0), [16])]
    assert [one[0] for one in seen] == ["patches", "output"] * 3
    assert shape(seen[0][1]) == shape(seen[1][1]) == single_rows
    # The encoder sees crops, the stage behind it blocks of cells.
    assert shape(seen[2][1]) == [(0, 5, (2, 2), [16] * 5)]
    assert shape(seen[3][1]) == [(0, 5, (2, 2), [16, 9, 6, 6, 4])]
    assert shape(seen[4][1]) == [(row, row + 1, (0, 0), [16]) for row in range(6)]
    assert shape(seen[5][1]) == [(row, row + 1, (0, 0), [4]) for row in range(6)]
    assert [one[2] for one in seen] == [(4, 4)] * 5 + [(2, 2)]
    # What is cut off a crop: 32 x 16 pixels of which the image fills 32 x 8.
    inputs = prompt(model, [(2, 5)], sizes=[(32, 8)])
    seen.clear()
    with foveate.apply(model, Watch()):
        logits(model, inputs)
    assert shape(seen[1][1]) == [(0, 3, (2, 1), [16, 8, 8])]
    assert seen[1][1][0].packed[1].reshape(4, 4).tolist() == [[False, True, True, False]] * 4


# -- signals


def test_signals_of_cells_are_means_over_their_patches() -> None:
    model = build(vision_aspect_ratio="anyres_max_1")
    clip, image = prompt(model, [(2, 5)], sizes=[(3, 16, 16)]), prompt(model, [(2, 5)], sizes=[(30, 30)])
    answers: list[Any] = []

    def ask(tokens: Tokens, at: Stage) -> Tensor:
        answers.append((at.signals.received(3), at.signals.keys(3)))
        return tokens.mask()

    with foveate.apply(model, probe("vision.output", ask, reads=("vision.attention[3]",))):
        logits(model, clip)
        logits(model, image)
    keys: list[Tensor] = []
    model.model.vision_tower.encoder.layers[3].self_attn.k_proj.register_forward_hook(
        lambda module, args, output: keys.append(output)
    )
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        frames = tower(clip["pixel_values_videos"][0], output_attentions=True).attentions[3].mean((1, 2))
        crops = tower(image["pixel_values"][0], output_attentions=True).attentions[3].mean((1, 2))
        model.model.vision_tower(clip["pixel_values_videos"][0])
    by_cell = torch.tensor([[float(one) for one in frame] for frame in cells_of_a_clip(frames.unsqueeze(-1), 4)])
    assert torch.allclose(answers[0][0], by_cell, atol=1e-6)
    wanted = torch.stack([torch.stack(frame) for frame in cells_of_a_clip(keys[0], 4)])
    assert torch.allclose(answers[0][1], wanted, atol=1e-5)
    lines = resampled_by_hand(crops.unsqueeze(-1), torch.zeros(1))
    block = torch.cat([torch.stack(line[:4]) for line in lines[1:]]).squeeze(1)
    assert torch.allclose(answers[1][0], torch.stack([torch.stack(lines[0]).squeeze(1), block]), atol=1e-6)


def test_marks_of_patches_become_marks_of_cells() -> None:
    model = build()
    inputs = prompt(model, [(2, 5), (1, 3)], sizes=[(3, 16, 16), (24, 12)])

    class Marking(Method):
        card = probe("projector", odd).card
        seen: Tensor | None = None

        @foveate.at("vision.layer")
        def note(self, tokens: Tokens, at: Stage) -> Tokens:
            if at.layer == 1:
                rows, patches = tokens.source.shape
                at.marks["number"] = 100.0 * torch.arange(rows).unsqueeze(1) + torch.arange(patches) + 1
            return tokens

        @foveate.at("llm.layer")
        def look(self, tokens: Tokens, at: Stage) -> Tokens:
            self.seen = at.marks["number"]
            return tokens

    method = Marking()
    with foveate.apply(model, method):
        logits(model, inputs)
    assert method.seen is not None
    # The mean number of a cell's patches: 3.5, 5.5, 11.5, 13.5 in each frame.
    first = [100.0 * frame + value for frame in range(3) for value in (3.5, 5.5, 11.5, 13.5)]
    assert method.seen[0, : len(first)].tolist() == first
    assert method.seen[1, :48].tolist() == [100.0 * row + m + 1 for row in range(3) for m in range(16)]


def test_the_grid_is_that_of_images_where_there_are_both() -> None:
    model = build()
    grids: list[tuple[int, int]] = []

    def ask(tokens: Tokens, at: Stage) -> Tensor:
        grids.append(at.signals.grid())
        return tokens.mask()

    for samples, sizes in ((SAMPLES, SIZES), ([(2, 5)], [(3, 16, 16)])):
        inputs = prompt(model, samples, sizes=sizes)
        with foveate.apply(model, probe("llm.layer", ask, layer=1)):
            logits(model, inputs)
            generate(model, inputs, max_new_tokens=1)
    assert grids == [(4, 4), (4, 4), (2, 2), (2, 2)]


def test_a_smaller_clip_is_pooled_like_the_whole() -> None:
    """At half the resolution in the encoder there is a quarter of the cells too, here one a frame."""
    model = build()
    inputs = prompt(model, [(2, 5)], sizes=[(3, 16, 16)])
    with torch.no_grad():
        small = torch.nn.functional.interpolate(
            inputs["pixel_values_videos"][0], size=(8, 8), mode="bilinear", antialias=True
        )
        tower = model.model.vision_tower(small, output_hidden_states=True, interpolate_pos_encoding=True)
        wanted = model.model.multi_modal_projector(tower.hidden_states[-1]).mean(1)
    with foveate.apply(model, "resolution", keep=0.25) as applied:
        embeds = entering(model, inputs)
    assert [record.tokens_out for record in applied.trace] == [(4, 4, 4), (4,)]
    assert torch.allclose(embeds[0, 2:5], wanted, atol=1e-5)
    assert math.prod(applied.host.grid()) == 4


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
    with foveate.apply(model, "fopru"), pytest.raises(InputError, match="set in the config"):
        model.model.get_video_features(inputs["pixel_values_videos"], vision_feature_layer=-2)
    # Nothing acted before: it is the host whose blocks of cells are unequal.
    for name in ("aim", "visionzip"):
        with foveate.apply(model, name), pytest.raises(InputError, match="the host itself made 4 to 16"):
            logits(model, inputs)
    # Where the block is full, it can.
    even = build(vision_aspect_ratio="anyres_max_1")
    inputs = prompt(even, [(2, 5)], sizes=[(30, 30)])
    with foveate.apply(even, "aim") as applied:
        logits(even, inputs)
        assert applied.trace[0].tokens_in == (16, 16)
    with pytest.raises(InputError, match="no class token"):
        foveate.apply(build(vision_feature_select_strategy="default"), "fopru")
