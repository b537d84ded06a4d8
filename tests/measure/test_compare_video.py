"""Comparisons on clips: what reaches the model, what is counted, and where the tokens of every frame went."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from stand_in import questions, tiny
from stand_in_video import clips, onevision, qwen

import foveate
from foveate.cli import main
from foveate.data.samples import Sample, to_inputs
from foveate.hosts.host import Record
from foveate.measure.compare import Comparison, compare
from foveate.measure.provenance import overlay
from foveate.method import InputError
from tiny import probe

SMALL = {"budgets": (0.5,), "baselines": ("grid",), "timing_pairs": 1, "batch_size": 2, "max_new_tokens": 2}


def test_all_frames_reach_the_model_and_pictures_stand_before_clips() -> None:
    model, processor = onevision()
    clip, picture = clips(1)[0], questions(1)[0]
    both = replace(clip, images=picture.images, id="both")
    inputs = to_inputs(processor, [both, clip])
    frames = torch.from_numpy(clip.videos[0].frames).movedim(-1, -3).float()
    assert inputs["pixel_values_videos"].shape == (2, 4, 3, 48, 48)
    # Frames of 96 px are scaled to 48: their means stay.
    seen = (inputs["pixel_values_videos"][1] * 0.5 + 0.5) * 255
    assert torch.allclose(seen.mean((2, 3)), frames.mean((2, 3)), atol=2)
    ids, config = inputs["input_ids"], model.config
    # A frame is 3 x 3 cells, a clip has a new line; a picture is 6 x 6 twice, a new line after each row of the second.
    assert (ids == config.video_token_id).sum(1).tolist() == [4 * 9 + 1] * 2
    assert (ids == config.image_token_id).sum(1).tolist() == [36 + 6 * 7, 0]
    last_picture = (ids[0] == config.image_token_id).nonzero().max()
    assert last_picture < (ids[0] == config.video_token_id).nonzero().min()
    with torch.inference_mode():
        assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize("stand_in", [onevision, qwen])
def test_a_comparison_on_clips(stand_in) -> None:
    model, processor = stand_in()
    made = compare(model, processor, clips(3), ["pyramiddrop"], **SMALL)
    again = Comparison.from_json(made.to_json())
    assert again.overlays == made.overlays and [one.refused for one in made.rows] == [None] * 3
    # OneVision: four frames of 3 x 3 cells and a new line. Qwen: frames in twos, 48 px or less in cells of 8 px.
    frames, cells, rest = (4, 9, 1) if stand_in is onevision else (2, 36, 0)
    assert made.rows[0].stages == (("llm.input", frames * cells + rest),)
    for one in made.overlays:
        assert one.frames == frames and one.grid[0] * one.grid[1] == cells
        assert len(one.depth) == len(one.group) == frames * cells
    row, dropped = made.rows[2], made.overlays[1]
    assert row.method == dropped.method == "pyramiddrop" and row.stages is not None
    # The new line may be among what was kept.
    assert 0 <= row.stages[-1][1] - dropped.depth.count(1.0) <= rest


@pytest.mark.parametrize("stand_in", [onevision, qwen])
def test_the_overlay_shows_the_very_frames_and_cells_that_were_dropped(stand_in) -> None:
    model, processor = stand_in()
    inputs = to_inputs(processor, clips(1))

    def chosen(tokens, at):
        # Positions are (frame, row, column): nothing of frame 1, and of the others not the first column.
        return (tokens.position[..., 0] != 1) & (tokens.position[..., 2] > 0.5)

    with torch.inference_mode(), foveate.apply(model, probe("llm.layer", chosen, layer=2)) as applied:
        model(**inputs)
        grid, host = applied.host.grid(), applied.host
        shown = overlay(list(applied.trace), 4, grid, "probe", 0.5, frames=host.encoded["video"][0].crops)
    depth = np.array(shown.depth).reshape(shown.frames, *grid)
    wanted = np.ones_like(depth)
    wanted[1], wanted[:, :, 0] = 0.5, 0.5
    assert np.array_equal(depth, wanted)


def test_overlay_of_two_frames_by_hand() -> None:
    # Two frames of 1 x 2 and a new line; frame 1's first cell goes early, and two cells are merged across frames.
    entered = Record("llm.input", "", (4,), (4,), torch.tensor([[0, 1, -1, 2, 3]]))
    merged = Record("llm.layer[1]", "x", (4,), (2,), torch.tensor([[0, 1, -1, 0, -1]]))
    shown = overlay([entered, merged], 4, (1, 2), "x", 0.5, frames=2)
    assert shown.depth == (1.0, 1.0, 0.0, 1.0) and shown.group == (0, -1, -1, 0)
    # Without the frames it is the first that is shown.
    assert overlay([entered, merged], 4, (1, 2), "x", 0.5).depth == (1.0, 1.0)


def test_a_model_without_videos_says_so_in_one_line() -> None:
    model, processor = tiny()
    clip = clips(1)[0]
    for ask in (lambda: compare(model, processor, [questions(1)[0], clip]), lambda: to_inputs(processor, [clip])):
        with pytest.raises(InputError, match="sample '0': this model takes no videos, only pictures"):
            ask()


def test_the_command_on_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = onevision()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    # Two a second, 2.5 s; the fourth frame of the second file is overwritten.
    shown = clips(1)[0].videos[0].frames[0]
    for name in ("whole.avi", "broken.avi"):
        with av.open(name, "w") as container:
            stream = container.add_stream("mjpeg", rate=2)
            stream.height, stream.width, stream.pix_fmt = *shown.shape[:2], "yuvj420p"
            for k in range(6):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(shown, 8 * k, 1), format="rgb24")))
            container.mux(stream.encode(None))
    with av.open("broken.avi") as container:
        fourth = bytes([*container.demux(video=0)][3])
    data = bytearray(Path("broken.avi").read_bytes())
    at = data.index(fourth)
    data[at : at + len(fourth)] = bytes(len(fourth))
    Path("broken.avi").write_bytes(data)
    with pytest.raises(SystemExit) as ended:
        files = "--video whole.avi --video broken.avi --frames 6"
        how = "--model model --methods pyramiddrop --keep 0.5 --device cpu"
        main(["compare", *files.split(), *how.split(), "--prompt", "what leaves ?"])
    out, err = capsys.readouterr()
    assert ended.value.code == 0 and "pyramiddrop" in out
    assert "note: broken.avi: broken frames left out of its clip: 1" in err and "note: whole.avi" not in err
    made = Comparison.from_json(Path("foveate-out/comparison.json").read_text())
    assert made.samples == 2 and {(one.frames, one.grid) for one in made.overlays} == {(6, (3, 3))}
    times = re.findall(r"<span>([\d.]+) s</span>", Path("foveate-out/report.html").read_text())
    whole, broken = ([f"{k / 2:.2f}" for k in kept] for kept in ((0, 1, 2, 3, 4, 5), (0, 1, 2, 2, 4, 5)))
    assert times[:6] in (whole, broken) and times == times[:6] * (len(made.overlays) + 1)


def test_bad_samples_with_clips() -> None:
    _, processor = onevision()
    clip = clips(1)[0]
    with pytest.raises(InputError, match="leave '<video>' out of the prompt"):
        to_inputs(processor, [replace(clip, prompt="is <video> there")])
    with pytest.raises(InputError, match="has no picture"):
        to_inputs(processor, [Sample((), "what ?", id="nothing")])
    processor.chat_template = "{% for message in messages %}USER: hello{% endfor %}"
    with pytest.raises(InputError, match="its prompt has no video token"):
        to_inputs(processor, [clip])
