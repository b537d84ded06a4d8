"""`foveate detect` on videos made here, with a tiny random detector."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from foveate import zoo
from foveate.detect import Detection
from foveate.report.annotate import Annotator
from tiny_video import detector, film, shown

Run = Callable[..., tuple[int, str, str]]
LABELS = ["walk", "run", "sit"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    detector().save_pretrained(folder)
    (folder / "labels.json").write_text(json.dumps(LABELS))
    return folder


@pytest.fixture
def detect(run: Run, folder: Path) -> Run:
    """Runs `foveate detect` in an empty folder, with the tiny detector if no other is named."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        return run("detect", *arguments, *([] if "--model" in arguments else ["--model", folder]))

    return call


BAD = [
    ([], "VIDEO"),
    (["none.mp4"], "none.mp4: no such video file"),
    (["sound.m4a"], "no video in it, only sound"),
    (["text.mp4"], "not a video that can be read"),
    (["a.mkv", "--bogus"], "--bogus"),
    (["a.mkv", "--out", "b.avi"], "--out b.avi: the name must end in .mp4"),
    (["a.mkv", "--json", "b.txt"], "--json b.txt: the name must end in .json"),
    (["a.mkv", "--json", "dir.json"], "a folder, not a file"),
    (["b.mp4", "--out", "b.mp4"], "that is the video itself"),
    (["a.mkv", "--out", "a.mkv/b.mp4"], "a.mkv: a file, not a folder"),
    (["a.mkv", "--keep", "0"], "keep must be"),
    (["a.mkv", "--every", "0"], "every must be"),
    (["a.mkv", "--rate", "1000"], "rate must be"),
    (["a.mkv", "--short", "1"], "short must be"),
    (["a.mkv", "--person", "2"], "person must be"),
    (["a.mkv", "--batch-size", "0"], "--batch-size must be at least 1"),
    (["a.mkv", "--device", "tpu7"], "--device 'tpu7' cannot be used"),
    (["a.mkv", "--model", "evads"], "unknown detector 'evads'"),
    (["a.mkv", "--model", "empty"], "empty: no model here"),
    (["a.mkv", "--model", "tiny-llava"], "no action detector"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) or "nothing" for a, _ in BAD])
def test_bad_input_is_one_line(detect: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    film(tmp_path / "a.mkv", range(2))
    film(tmp_path / "b.mp4", range(2), codec="mpeg4")
    (tmp_path / "text.mp4").write_text("no video " * 100)
    for name in ("empty", "dir.json"):
        (tmp_path / name).mkdir()
    with av.open(str(tmp_path / "sound.m4a"), "w") as container:
        track: Any = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*track.encode(frame), *track.encode(None)])
    before = sorted(tmp_path.iterdir())
    code, out, err = detect(*arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif("evad" in zoo.names(), reason="evad is shipped")
def test_without_weights_it_says_so(detect: Run, tmp_path: Path) -> None:
    film(tmp_path / "a.mkv", range(2))
    code, out, err = detect("a.mkv", "--model", "evad")
    assert (code, out) == (2, "") and "no detector is shipped here; --model FOLDER" in err and err.count("\n") == 1


def test_files_hold_what_the_detector_says(detect: Run, tmp_path: Path) -> None:
    film(tmp_path / "a.mkv", [0, 1, 2, 6, 7, 8, 12], size=(49, 37), sound="aac")
    options = ("--keep", "0.6", "--person", "0.6", "--action", "0.4", "--every", "0.4", "--rate", "8", "--short", "40")
    code, out, err = detect("a.mkv", "--out", "o/b.mp4", "--json", "o/b.json", *options)
    assert (code, err) == (0, ""), err
    assert sorted(one.name for one in (tmp_path / "o").iterdir()) == ["b.json", "b.mp4"]
    model = detector(keep=0.6)
    wanted = list(
        Detection(tmp_path / "a.mkv", model, LABELS, every=0.4, rate=8, short=40, person=0.6, action=0.4, batch=1)
    )
    read = json.loads((tmp_path / "o/b.json").read_text())
    assert read["complete"] and read["broken"] == 0 and read["until"] == pytest.approx(1.2, abs=1e-3)
    assert read["video"]["width"] == 49 and read["model"]["dropout"]["keep"] == 0.6
    assert read["settings"] == {
        "every": 0.4, "rate": 8, "short": 40, "person": 0.6, "action": 0.4, "batch": 4,
    }  # fmt: skip
    assert len(read["keyframes"]) == len(wanted) == 4 and any(one["persons"] for one in read["keyframes"])
    for one, keyframe in zip(read["keyframes"], wanted):
        assert (one["time"], one["frame"]) == (pytest.approx(keyframe.time), pytest.approx(keyframe.shown))
        assert one["tokens_kept"] == pytest.approx(keyframe.kept.mean(), abs=1e-4)
        assert len(one["persons"]) == len(keyframe.persons)
        for person, ours in zip(one["persons"], keyframe.persons):
            assert person["box"] == pytest.approx(ours.box, abs=0.02)
            assert person["score"] == pytest.approx(ours.score, abs=2e-4)
            assert person["actions"] == pytest.approx(dict(ours.actions), abs=2e-4)
    persons = sum(len(one.persons) for one in wanted)
    assert f"4 keyframes, {persons} persons in them" in out and "o/b.mp4 · o/b.json" in out
    assert list(read["seconds"]) == ["decode", "model", "draw", "encode"] and min(read["seconds"].values()) > 0
    assert all(name in out for name in read["seconds"])
    times, pictures = shown(tmp_path / "o/b.mp4")
    assert times == pytest.approx([0, 0.1, 0.2, 0.6, 0.7, 0.8, 1.2], abs=1e-3) and pictures[0].shape[1] == 50
    with av.open(str(tmp_path / "o/b.mp4")) as container:
        assert container.streams.audio[0].codec_context.name == "aac"


def test_it_looks_at_what_the_detector_was_trained_on(detect: Run, tmp_path: Path) -> None:
    film(tmp_path / "a.mkv", range(3))
    detector().save_pretrained(tmp_path / "model")
    training = {"settings": {"stride": 1, "size": 40}}
    (tmp_path / "model/metrics.json").write_text(json.dumps({"training": training}))
    for extra, wanted in (((), (15, 40)), (("--rate", "6", "--short", "48"), (6, 48))):
        code, _, err = detect("a.mkv", "--model", "model", "--json", "b.json", *extra)
        assert (code, err) == (0, "")
        seen = json.loads((tmp_path / "b.json").read_text())["settings"]
        assert (seen["rate"], seen["short"]) == wanted


def test_without_files_it_prints(detect: Run, tmp_path: Path) -> None:
    film(tmp_path / "a.mkv", range(8))
    code, out, err = detect("a.mkv", "--person", "0.6")
    assert (code, err) == (0, "")
    first, *_ = Detection(tmp_path / "a.mkv", detector(), LABELS, person=0.6)
    lines = [line for line in out.splitlines() if line.split()[0] == "0.00"]
    assert len(lines) == len(first.persons) > 0
    label, score = first.persons[0].actions[0]
    assert f"person {first.persons[0].score:.2f} at " in lines[0] and f": {label} {score:.2f}" in lines[0]
    code, out, _ = detect("a.mkv", "--person", "1")
    assert code == 0 and [line.split() for line in out.splitlines()] == [
        ["0.00", "s", "nobody"],
        ["0.50", "s", "nobody"],
    ]
    assert [one.name for one in tmp_path.iterdir()] == ["a.mkv"]


def test_broken_and_missing_frames_are_counted(detect: Run, tmp_path: Path) -> None:
    film(tmp_path / "a.mkv", range(30), codec="mjpeg")
    data = bytearray((tmp_path / "a.mkv").read_bytes())
    with av.open(str(tmp_path / "a.mkv")) as container:
        packets = [bytes(one) for one in container.demux(video=0)]
    at = data.index(packets[4])
    data[at : at + len(packets[4])] = bytes(len(packets[4]))
    (tmp_path / "broken.mkv").write_bytes(data)
    code, _, err = detect("broken.mkv", "--out", "b.mp4", "--json", "b.json")
    assert (code, err) == (0, "note: broken frames left out: 1\n")
    assert json.loads((tmp_path / "b.json").read_text())["broken"] == 1
    times = shown(tmp_path / "b.mp4")[0]
    assert times == pytest.approx([k / 10 for k in range(30) if k != 4], abs=1e-3)
    # Cut before the sixteenth frame.
    (tmp_path / "cut.mkv").write_bytes((tmp_path / "a.mkv").read_bytes()[: data.index(packets[15])])
    code, _, err = detect("cut.mkv", "--out", "c.mp4")
    assert code == 0 and "note: the video ends after 1.4 s of the file's 3.0 s" in err
    assert shown(tmp_path / "c.mp4")[0] == pytest.approx([k / 10 for k in range(15)], abs=1e-3)


def test_interruption_leaves_playable_files(detect: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film(tmp_path / "a.mkv", range(20))
    (tmp_path / "b.mp4").write_text("earlier")
    draw, calls = Annotator.draw, iter(range(100))

    def interrupted(self: Annotator, *args: Any) -> Any:
        if next(calls) == 12:
            raise KeyboardInterrupt
        return draw(self, *args)

    monkeypatch.setattr(Annotator, "draw", interrupted)
    code, out, err = detect("a.mkv", "--out", "b.mp4", "--json", "b.json", "--batch-size", "1")
    assert (code, out) == (130, "") and "Traceback" not in err
    assert "what there is until then is in b.partial.mp4" in err and "is in b.partial.json" in err
    assert shown(tmp_path / "b.partial.mp4")[0] == pytest.approx([k / 10 for k in range(12)], abs=1e-3)
    read = json.loads((tmp_path / "b.partial.json").read_text())
    assert not read["complete"] and [one["time"] for one in read["keyframes"]][:3] == [0, 0.5, 1]
    assert (tmp_path / "b.mp4").read_text() == "earlier"
    names = ["a.mkv", "b.mp4", "b.partial.json", "b.partial.mp4"]
    assert sorted(one.name for one in tmp_path.iterdir()) == names
