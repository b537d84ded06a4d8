"""A clip's frames in the report: each with its own patches, its time below, in rows that end."""

from __future__ import annotations

import base64
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comparisons import comparison
from PIL import Image

import foveate
from foveate.measure.provenance import Overlay, encoder_overlay
from foveate.method import Card, InputError, Method, Stage, at
from foveate.report.html import report_html
from foveate.report.overlay import ROW, draw_applied, draw_strip
from foveate.tokens import Tokens
from tiny import vision
from tiny_video import clips, videomae

BLUE = (0, 0, 250)


def clip(count: int) -> list[Image.Image]:
    """Frame k has 10 k in its green."""
    return [Image.new("RGB", (60, 40), (0, 10 * k, 250)) for k in range(count)]


def strip(depth: list[float], frames: int) -> list[np.ndarray]:
    shown = SimpleNamespace(method="x", budget=0.5, grid=(2, 3), depth=depth, group=[-1] * len(depth))
    return [np.asarray(one).astype(int) for one in draw_strip(clip(frames), shown)]


def cell(image: np.ndarray, frame: int, row: int, column: int) -> np.ndarray:
    """The middle pixel of a cell: frames are 111 px wide and 74 high (cells of 112 // 3), 4 px apart."""
    side = 112 // 3
    return image[row * side + side // 2, frame * (3 * side + 4) + column * side + side // 2]


def test_every_frame_has_its_own_patches_dimmed() -> None:
    depth = [1.0] * 6 + [1.0, 0.0, 1.0, 1.0, 0.5, 1.0] + [1.0] * 5 + [0.0]
    (image,) = strip(depth, 3)
    assert image.shape == (2 * 37, 3 * 111 + 2 * 4, 3)
    for k, kept in enumerate(depth):
        frame, row, column = k // 6, k % 6 // 3, k % 3
        red, green, _ = cell(image, frame, row, column)
        if kept == 1:
            assert (red, green) == (0, 10 * frame)
        else:
            assert red > (150 if kept == 0 else 80)


def test_long_clips_take_several_rows_of_one_width() -> None:
    frames = ROW + 3
    images = strip([1.0] * 6 * frames, frames)
    assert len(images) == 2 and images[0].shape == images[1].shape
    for k in range(frames):
        assert cell(images[k // ROW], k % ROW, 1, 2).tolist() == [0, 10 * k, 250]
    with pytest.raises(ValueError, match="3 grids of 2x3 have 18 patches, not 12"):
        strip([1.0] * 12, 3)


def test_the_report_of_a_clip_has_strips_with_times() -> None:
    frames = ROW + 2
    made = comparison()
    made.overlays = [
        Overlay(one.method, one.budget, (3, 4), (1.0,) * 12 * frames, (-1,) * 12 * frames, one.answer, frames)
        for one in made.overlays
    ]
    shown = [(0.25 * k, frame) for k, frame in enumerate(clip(frames))]
    page = report_html(made, command="c", model="m", clip=shown)
    drawn = len([one for one in made.overlays if one.method != "dense"]) + 1
    times = re.findall(r"<span>([\d.]+) s</span>", page)
    assert times == [f"{0.25 * k:.2f}" for k in range(frames)] * drawn
    strips = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    assert len(strips) == 2 * drawn
    sizes = {Image.open(io.BytesIO(base64.b64decode(one))).size for one in strips}
    assert sizes == {(ROW * 112 + (ROW - 1) * 4, 84)}
    assert "Under each frame is the time" in page and page.count('class="clip" style="--frames: 8"') == drawn
    assert "Under each frame" not in report_html(comparison(), command="c", model="m", picture=clip(1)[0])


class Fades(Method):
    """Of slots 0 … 3, drops 0 between attention and MLP of layer 1, 1 before layer 3, 3 after the encoder."""

    card = Card(slug="fades", title="for tests", arxiv="", kind="reduce", hosts=("hf-video",), summary="for tests")

    def without(self, tokens: Tokens, slot: int) -> Tokens:
        there = (tokens.position[..., 0] != slot).nonzero()[:, 1].view(len(tokens.x), -1)
        return tokens.keep(there)

    @at("vision.mlp")
    def first(self, tokens: Tokens, at: Stage) -> Tokens:
        return self.without(tokens, 0) if at.layer == 1 else tokens

    @at("vision.layer")
    def second(self, tokens: Tokens, at: Stage) -> Tokens:
        return self.without(tokens, 1) if at.layer == 3 else tokens

    @at("vision.output")
    def third(self, tokens: Tokens, at: Stage) -> Tokens:
        return self.without(tokens, 3)


@torch.no_grad()
def test_an_encoder_of_clips_veils_what_it_drops_the_earlier_the_more() -> None:
    model = videomae()
    with foveate.apply(model, Fades()) as applied:
        model(clips())
        shown = encoder_overlay(applied.trace, applied.host.shape, "fades", 1.0)
        (image,) = draw_applied(clip(8), applied)
    # 4 layers and the output are 5 steps.
    assert np.allclose(np.reshape(shown.depth, (4, 16)), np.array([[1.5 / 5], [3 / 5], [1], [4 / 5]]))
    assert set(shown.group) == {-1} and shown.frames == 4
    pixels = np.asarray(image).astype(int).reshape(112, -1, 3)
    # Frames of 112 px, 4 px apart; the first of each slot's two, whose green is 0, 20, 40, 60. There is no red.
    for slot, veil in enumerate((0.88 - 0.63 * 0.3, 0.88 - 0.63 * 0.6, 0.0, 0.88 - 0.63 * 0.8)):
        part = pixels[:, slot * 116 : slot * 116 + 112]
        assert abs(part[..., 0] - veil * 236).max() <= 1
        assert abs(part[..., 1] - (veil * 238 + (1 - veil) * 20 * slot)).max() <= 1


@torch.no_grad()
def test_evad_leaves_the_keyframe_clear_and_each_clip_has_its_own_strip() -> None:
    model = videomae()
    with foveate.apply(model, "evad", keep=0.5) as applied:
        model(clips())
        strips = [np.asarray(draw_applied(clip(4), applied, sample)[0]).astype(int) for sample in range(2)]
        source = applied.trace[-1].source
        with pytest.raises(InputError, match="2 clips, counted from 0, not 2"):
            draw_applied(clip(4), applied, 2)
        with pytest.raises(InputError, match="4 time slots of a clip; 6 frames"):
            draw_applied(clip(6), applied)
    for sample, strip in enumerate(strips):
        cells = strip[14::28, :, 0]
        clear = np.stack([cells[:, slot * 116 + 14 : slot * 116 + 112 : 28] == 0 for slot in range(4)])
        assert clear[2].all() and (clear.reshape(-1) == (source[sample] >= 0).numpy()).all()
    assert (strips[0] != strips[1]).any()


@torch.no_grad()
def test_merged_patches_of_an_encoder_are_groups_and_nothing_applied_is_clear() -> None:
    model = videomae()
    with foveate.apply(model, "tome", r=5) as applied:
        model(clips(1))
        shown = encoder_overlay(applied.trace, applied.host.shape, "tome", 1.0)
        source = applied.trace[-1].source[0].tolist()
    assert set(shown.depth) == {1.0}
    for a in range(64):
        together = [b for b in range(64) if source[b] == source[a]]
        assert [b for b in range(64) if shown.group[b] == shown.group[a] != -1] == (together if together[1:] else [])
    with foveate.apply(model, "evad", keep=1.0) as applied:
        model(clips(1))
        assert not np.asarray(draw_applied(clip(4), applied)[0])[:, :112, 0].any()
    with foveate.apply(vision("vit"), "random") as applied, pytest.raises(InputError, match="no video encoder"):
        draw_applied(clip(4), applied)
