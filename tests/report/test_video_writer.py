"""Videos that are written, read back by PyAV itself."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from foveate.method import InputError
from foveate.report.video import VideoWriter
from tiny_video import film, shown

COLOURS = np.array([[250, 20, 20], [20, 230, 40], [30, 30, 240], [240, 220, 30]], np.uint8)


def pixels(number: int) -> np.ndarray:
    """(36, 48, 3): one colour each, dark or bright."""
    return np.broadcast_to(COLOURS[number % 4] // (1 + number % 2), (36, 48, 3)).copy()


def write(path: Path, times: list[float], stop: BaseException | None = None, **options: object) -> VideoWriter:
    writer = VideoWriter(path, (48, 36), rate=10, **options)  # type: ignore[arg-type]
    with writer:
        for number, time in enumerate(times):
            writer.write(time, pixels(number))
        if stop is not None:
            raise stop
    return writer


def sizes(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        return [one.size for one in container.demux(audio=0) if one.size]


def test_frames_keep_their_times_and_colours(tmp_path: Path) -> None:
    times = [0.0, 0.04, 0.05, 1.0, 1.5, 7.0, 7.0, 7.033333]
    assert write(tmp_path / "a.mp4", times).result == tmp_path / "a.mp4"
    found, pictures = shown(tmp_path / "a.mp4")
    # Of the two at 7 s the second comes a tick later.
    assert found == pytest.approx(times, abs=1.5 / 90_000) and found[6] > found[5]
    for number, picture in enumerate(pictures):
        # As a player sees it, by the colours that the file says it has.
        assert np.abs(picture.astype(int) - pixels(number)).max() <= 12, number
    assert [one.name for one in tmp_path.iterdir()] == ["a.mp4"]


def test_pixels_and_sound_are_those_of_the_source(tmp_path: Path) -> None:
    source = film(tmp_path / "b.mp4", range(12), codec="mpeg4", sound="aac")
    writer = write(tmp_path / "a.mp4", [k / 10 for k in range(12)], aspect=Fraction(4, 3), sound=source)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(4, 3)
        assert container.streams.audio[0].codec_context.name == "aac"
    assert sizes(tmp_path / "a.mp4") == sizes(source)[-len(sizes(tmp_path / "a.mp4")) :]
    assert len(sizes(source)) - len(sizes(tmp_path / "a.mp4")) <= 1 and writer.left_out == ""


def test_sound_that_mp4_cannot_hold_is_named(tmp_path: Path) -> None:
    source = film(tmp_path / "b.mkv", range(3), sound="pcm_s16le")
    assert write(tmp_path / "a.mp4", [0.0, 0.1], sound=source).left_out == "pcm_s16le"
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert not container.streams.audio


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), InputError("no more")])
def test_an_interrupted_file_is_playable_and_the_old_one_stays(tmp_path: Path, stop: BaseException) -> None:
    (tmp_path / "a.mp4").write_text("earlier")
    with pytest.raises(type(stop)):
        write(tmp_path / "a.mp4", [0.0, 0.1, 0.2], stop)
    assert shown(tmp_path / "a.partial.mp4")[0] == pytest.approx([0, 0.1, 0.2])
    assert (tmp_path / "a.mp4").read_text() == "earlier"
    # What is complete takes the place of both.
    write(tmp_path / "a.mp4", [0.0, 0.1])
    assert [one.name for one in tmp_path.iterdir()] == ["a.mp4"] and len(shown(tmp_path / "a.mp4")[0]) == 2


def test_errors_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "a.mp4", [0.0], ZeroDivisionError())
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a.mp4", [], KeyboardInterrupt())
    with pytest.raises(InputError, match=r"no H\.264 video of 47 x 36"), VideoWriter(tmp_path / "a.mp4", (47, 36)):
        pass
    assert list(tmp_path.iterdir()) == []
