"""The pipeline against direct calls of the detector on frames that are read one clip at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveate.data.ava import read_clip
from foveate.detect import Annotation, Detection, Keyframe, KeyframesFile, Stopwatch
from foveate.method import InputError
from foveate.methods.video.evad_detector import EvadDetector, normalised
from foveate.report.annotate import Annotator
from tiny_video import detector, film, shown

LABELS = ["walk", "run", "sit"]
VARIABLE = [0, 1, 2, 3, 9, 10, 11, 19, 20, 26, 27]


@torch.no_grad()
def directly(model: EvadDetector, file: Path, time: float, rate: float, short: int, person: float) -> Any:
    """Boxes in px of the file's pictures, scores and kept tokens of one clip, without the pipeline."""
    times = time + (np.arange(8) - 4) / rate
    clip = read_clip(file, times, short, 10_000)
    found = model(normalised(torch.from_numpy(clip).permute(3, 0, 1, 2).unsqueeze(0)))
    score = found.person[-1, 0].softmax(-1)[:, 0]
    order = score.argsort(descending=True)
    order = order[score[order] >= person]
    height, width = clip.shape[1:3]
    full = shown(file)[1][0].shape
    boxes = found.boxes[-1, 0, order].clamp(min=0).minimum(torch.tensor([width, height] * 2))
    boxes = boxes * torch.tensor([full[1] / width, full[0] / height] * 2)
    kept = np.zeros(found.encoded.grid, bool)
    kept.flat[found.encoded.order[found.encoded.index[0]].numpy()] = True
    return boxes.tolist(), score[order].tolist(), found.actions[-1, 0, order].sigmoid().tolist(), kept


@pytest.mark.parametrize(
    ("ticks", "size", "rate", "every"),
    [(VARIABLE, (50, 37), 5.0, 0.6), (range(14), (36, 70), 7.5, 0.5), ([0], (64, 48), 7.5, 0.5)],
    ids=["variable, odd", "short, upright", "one frame"],
)
def test_keyframes_are_what_the_detector_says_of_their_frames(
    tmp_path: Path, ticks: Sequence[int], size: tuple[int, int], rate: float, every: float
) -> None:
    file, model = film(tmp_path / "a.mkv", ticks, size=size), detector(keep=0.8)
    found = list(Detection(file, model, LABELS, every=every, rate=rate, short=40, person=0.75, action=0.5, batch=3))
    assert [one.time for one in found] == pytest.approx(
        [k * every for k in range(int(ticks[-1] / 10 / every + 1e-6) + 1)]
    )
    for one in found:
        boxes, score, actions, kept = directly(model, file, one.time, rate, 40, 0.75)
        assert one.size == size and len(one.persons) == len(boxes)
        assert one.shown == pytest.approx(min((t / 10 for t in ticks), key=lambda t: abs(t - one.time)), abs=1e-3)
        for person, box, sure, does in zip(one.persons, boxes, score, actions):
            assert person.box == pytest.approx(box, abs=1e-2) and person.score == pytest.approx(sure, abs=1e-4)
            wanted = sorted(((s, label) for label, s in zip(LABELS, does) if s >= 0.5), reverse=True)
            assert [label for label, _ in person.actions] == [label for _, label in wanted]
            assert [s for _, s in person.actions] == pytest.approx([s for s, _ in wanted], abs=1e-4)
        assert np.array_equal(one.kept, kept) and kept[2].all() and not kept.all()
    # Something is found, not everything, and not the same everywhere.
    counts = {len(one.persons) for one in found}
    assert max(counts) > 0 and min(counts) < 6
    if len(found) > 1:
        assert len({one.persons[0].box for one in found if one.persons}) > 1


def test_the_frames_seen_are_padded_like_the_detectors(tmp_path: Path) -> None:
    file = film(tmp_path / "a.mkv", range(8), size=(50, 36))
    (first, *_) = Detection(file, detector(), LABELS, short=36, rate=10)
    assert first.seen.shape == (4, 48, 64, 3) and (first.seen[:, 36:] == 115).all()
    assert abs(float(normalised(torch.tensor(115)))) < 0.005
    clip = read_clip(file, (np.arange(8) - 4) / 10, 36, 1000)
    assert np.array_equal(first.seen[:, :36, :50], clip[::2])


def test_nobody(tmp_path: Path) -> None:
    file = film(tmp_path / "a.mkv", range(3))
    assert [one.persons for one in Detection(file, detector(), LABELS, person=1.0)] == [()]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"every": 0.0}, "every must be"), ({"rate": 0.1}, "rate must be"), ({"person": 1.1}, "person must be"),
        ({"action": float("nan")}, "action must be"), ({"short": 4}, "short must be from 8"), ({"batch": 0}, "batch"),
        ({"labels": ["walk"]}, "knows 3 actions, not 1"),
    ],
)  # fmt: skip
def test_bad_settings(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = film(tmp_path / "a.mkv", range(3))
    with pytest.raises(InputError, match=said):
        Detection(file, detector(), **({"labels": LABELS} | change))


def marks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, float]]:
    """What the annotator is asked to draw: (picture, time of the keyframe)."""
    asked: list[tuple[np.ndarray, float]] = []
    draw = Annotator.draw

    def noted(self: Annotator, pixels: np.ndarray, keyframe: Keyframe) -> np.ndarray:
        asked.append((pixels, keyframe.time))
        return draw(self, pixels, keyframe)

    monkeypatch.setattr(Annotator, "draw", noted)
    return asked


def test_every_frame_shows_the_nearest_keyframe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, asked, watch, times = film(tmp_path / "a.mkv", VARIABLE), marks(monkeypatch), Stopwatch(), []
    found = Detection(file, detector(), LABELS, every=0.5, watch=watch)
    annotation = Annotation(file, tmp_path / "b.mp4", LABELS, watch)
    annotation.write(found, times.append)
    pictures = shown(file)[1]
    assert len(asked) == len(pictures) == len(VARIABLE) and times == pytest.approx([k / 10 for k in VARIABLE], abs=1e-3)
    for tick, picture, (pixels, key) in zip(VARIABLE, pictures, asked):
        assert np.array_equal(picture, pixels)
        assert abs(key - tick / 10) == pytest.approx(min(abs(k / 2 - tick / 10) for k in range(6)), abs=2e-3)
    assert annotation.result == tmp_path / "b.mp4"
    assert shown(tmp_path / "b.mp4")[0] == pytest.approx([k / 10 for k in VARIABLE], abs=1e-3)
    assert set(watch.seconds) == {"decode", "model", "draw", "encode"} and min(watch.seconds.values()) > 0


def test_a_turned_video_is_upright_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, asked = film(tmp_path / "a.mov", range(6), codec="mjpeg"), marks(monkeypatch)
    data = bytearray(file.read_bytes())
    # A quarter turn in the display matrix of the track's header.
    place = data.index(b"tkhd") + 4 + 40
    for k, one in enumerate((0, 1, 0, -1, 0)):
        data[place + 4 * k : place + 4 * k + 4] = (one * 65536).to_bytes(4, "big", signed=True)
    file.write_bytes(data)
    found = list(Detection(file, detector(), LABELS, person=0.0))
    boxes = np.array([one.box for one in found[0].persons])
    assert found[0].size == (36, 48) and (boxes[:, 2] <= 36).all() and (boxes[:, 3] <= 48).all()
    assert boxes[:, 3].max() > 36
    Annotation(file, tmp_path / "b.mp4", LABELS).write(found)
    # Lying: 48 wide. Clockwise, its left column is the upper row.
    lying = shown(file)[1][0]
    assert lying.shape == (36, 48, 3) and np.array_equal(asked[0][0], np.rot90(lying, -1))
    assert shown(tmp_path / "b.mp4")[1][0].shape[1] == 36


def test_keyframes_are_taken_only_as_far_as_the_frames_need(tmp_path: Path) -> None:
    """What makes memory bounded: neither side runs ahead of the other."""
    file = film(tmp_path / "a.mkv", range(40), size=(16, 16))
    detection = Detection(file, detector(), LABELS, every=0.5, rate=10, batch=1)
    ahead: list[float] = []
    annotation = Annotation(file, tmp_path / "b.mp4", LABELS)
    annotation.write(detection, lambda time: ahead.append(detection.now - time))
    # Two keyframes, and half of a window's 0.8 s.
    assert max(ahead[:25]) <= 1.7 and len(ahead) == 40


@pytest.mark.parametrize("stop", [None, KeyboardInterrupt(), InputError("no more"), ZeroDivisionError()])
def test_the_json_file(tmp_path: Path, stop: BaseException | None) -> None:
    (tmp_path / "a.json").write_text("earlier")
    keyframes = list(Detection(film(tmp_path / "a.mkv", range(8)), detector(), LABELS, person=0.4))
    file = KeyframesFile(tmp_path / "a.json", {"model": {"name": "x"}}, lambda: {"broken": 0, "seconds": {}})
    try:
        with file:
            for one in keyframes:
                file.add(one)
            if stop is not None:
                raise stop
    except type(stop or KeyError()):
        pass
    if isinstance(stop, ZeroDivisionError):
        assert file.result is None
    else:
        name = "a.json" if stop is None else "a.partial.json"
        assert file.result == tmp_path / name
        read = json.loads((tmp_path / name).read_text())
        assert list(read) == ["model", "keyframes", "complete", "broken", "seconds"]
        assert read["complete"] == (stop is None) and len(read["keyframes"]) == 2
        first = read["keyframes"][0]["persons"][0]
        assert first["box"] == pytest.approx(keyframes[0].persons[0].box, abs=6e-3)
        assert first["actions"] == pytest.approx(dict(keyframes[0].persons[0].actions), abs=6e-5)
    if stop is not None:
        assert (tmp_path / "a.json").read_text() == "earlier"
    assert len(list(tmp_path.iterdir())) == (3 if file.result not in (None, tmp_path / "a.json") else 2)
