"""Videos written here, with the number of each frame in its grey, so that the right frames are proven."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from foveate.data import video
from foveate.data.video import Sound, Windows, frames_at, probe, sample_frames, stream
from foveate.method import InputError


def write(
    file: Path, ticks: Sequence[int], codec: str = "h264", size: tuple[int, int] = (48, 32), rate: int = 10,
    picture: np.ndarray | None = None, **options: str,
) -> Path:  # fmt: skip
    """A frame at each tick of a tenth of a second (or of `rate`): all of grey 10 + 5 k, or all `picture`."""
    with av.open(str(file), "w", options=options) as container:
        out = container.add_stream(codec, rate=rate)
        out.width, out.height = size
        out.pix_fmt = {"ffv1": "bgr0", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        # At its usual quality mpeg4 would leave small steps of grey out.
        out.options = {"qmin": "1", "qmax": "2"} if codec == "mpeg4" else {}
        out.time_base = out.codec_context.time_base = Fraction(1, rate)
        for k, tick in enumerate(ticks):
            pixels = np.full((size[1], size[0], 3), (10 + 5 * k) % 256, np.uint8) if picture is None else picture
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, rate)
            container.mux(out.encode(frame))
        container.mux(out.encode(None))
    return file


def number(pixels: np.ndarray) -> int:
    """Which frame this is; its grey may be off by what a lossy codec changes."""
    assert pixels.dtype == np.uint8 and int(pixels.max()) - int(pixels.min()) <= 4
    return round((float(pixels.mean()) - 10) / 5)


def numbers(frames: np.ndarray) -> list[int]:
    return [number(one) for one in frames]


def nearest(ticks: Sequence[float], time: float) -> int:
    return min(range(len(ticks)), key=lambda k: (abs(ticks[k] - time), k))


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "h264"), ("a.mkv", "ffv1"), ("a.avi", "mpeg4"), ("a.mov", "mjpeg"), ("a.ts", "h264")]
)
def test_frames_at_equal_distances_with_their_times(tmp_path: Path, name: str, codec: str) -> None:
    file = write(tmp_path / name, range(25), codec)
    found = sample_frames(file, 5)
    assert found.frames.shape == (5, 32, 48, 3) and found.broken == 0
    assert numbers(found.frames) == [0, 6, 12, 18, 24]
    assert found.times == pytest.approx([0, 0.6, 1.2, 1.8, 2.4], abs=1e-6)
    assert numbers(sample_frames(file, 25).frames) == list(range(25))
    assert numbers(sample_frames(file, 1).frames) == [12]


def test_variable_rate_is_sampled_by_time(tmp_path: Path) -> None:
    file = write(tmp_path / "a.mkv", [0, 1, 2, 3, 20, 21, 40])
    # 0, 1, 2, 3 and 4 s: 1 s is nearer to 0.3 than to 2 s, 3 s nearer to 2.1 than to 4 s.
    found = sample_frames(file, 5)
    assert numbers(found.frames) == [0, 3, 4, 5, 6]
    assert found.times == pytest.approx([0, 0.3, 2.0, 2.1, 4.0], abs=1e-3)


def test_times_count_from_the_start_of_the_video(tmp_path: Path) -> None:
    file = write(tmp_path / "a.mkv", range(30, 40), "ffv1")
    assert sample_frames(file, 10).times == pytest.approx(np.arange(10) / 10, abs=1e-3)
    assert [one.time for one in stream(file)] == pytest.approx(np.arange(10) / 10, abs=1e-3)


def test_a_short_clip_repeats_its_last_frame(tmp_path: Path) -> None:
    found = sample_frames(write(tmp_path / "a.mp4", range(3)), 5)
    assert numbers(found.frames) == [0, 1, 2, 2, 2]
    assert found.times == pytest.approx([0, 0.1, 0.2, 0.2, 0.2])
    still = sample_frames(write(tmp_path / "b.mp4", range(1)), 2)
    assert numbers(still.frames) == [0, 0] and probe(tmp_path / "b.mp4").frames == 1


@pytest.mark.parametrize("rate", [2.5, 3, 10, 30])
def test_a_stream_has_its_rate_whatever_the_file_has(tmp_path: Path, rate: float) -> None:
    ticks = [0, 1, 2, 3, 9, 10, 17, 18]
    file = write(tmp_path / "a.mkv", ticks, "ffv1")
    found = list(stream(file, rate))
    # Ties aside, as the file's milliseconds are not exact.
    wanted = [k / rate for k in range(int(1.8 * rate + 1e-6) + 1)]
    assert len(found) == len(wanted)
    for one, time in zip(found, wanted):
        k = number(one.pixels)
        assert one.time == pytest.approx(ticks[k] / 10, abs=1e-3)
        assert abs(ticks[k] / 10 - time) <= abs(ticks[nearest([t / 10 for t in ticks], time)] / 10 - time) + 2e-3
    every = list(stream(file))
    assert [number(one.pixels) for one in every] == list(range(8))


def test_frames_at_begins_at_the_key_frame_before(tmp_path: Path) -> None:
    file = write(tmp_path / "a.mp4", range(40), "mpeg4")
    times = [2.01, 2.52, 9.0]
    assert numbers(frames_at(file, times, start=1.5).frames) == numbers(frames_at(file, times).frames) == [20, 25, 39]
    assert frames_at(file, times, short=16, long=20).frames.shape == (3, 13, 20, 3)
    with pytest.raises(InputError, match="more than 9 frames to decode"):
        frames_at(file, times, most=9)


MATRICES = {
    "as it is": (1, 0, 0, 1), "90": (0, 1, -1, 0), "180": (-1, 0, 0, -1), "270": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1), "upside down": (1, 0, 0, -1), "transposed": (0, 1, 1, 0), "anti": (0, -1, -1, 0),
}  # fmt: skip


def turn(file: Path, matrix: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Writes the display matrix into an MP4."""
    a, b, c, d = matrix
    data = bytearray(file.read_bytes())
    # Of the track's header: version and flags, times, number, duration, layer, group and volume are before the matrix.
    place = data.index(b"tkhd") + 4 + 40
    for k, one in enumerate((a, b, 0, c, d)):
        data[place + 4 * k : place + 4 * k + 4] = (one * 65536).to_bytes(4, "big", signed=True)
    file.write_bytes(data)
    return matrix


def spoil(file: Path, number: int) -> None:
    """Zeros in the place of one packet."""
    data = bytearray(file.read_bytes())
    with av.open(str(file)) as container:
        packet = bytes([*container.demux(video=0)][number])
    at = data.index(packet)
    data[at : at + len(packet)] = bytes(len(packet))
    file.write_bytes(data)


@pytest.mark.parametrize("name", MATRICES)
def test_frames_are_upright(tmp_path: Path, name: str) -> None:
    corners = np.zeros((32, 48, 3), np.uint8)
    corners[:16, :24], corners[:16, 24:], corners[16:, :24] = (200, 40, 40), (40, 200, 40), (40, 40, 200)
    file = write(tmp_path / "a.mp4", range(2), "mjpeg", picture=corners)
    a, b, c, d = turn(file, MATRICES[name])
    found = sample_frames(file, 1).frames[0]
    # The matrix as the file format defines it: (x, y) goes to (a x + c y, b x + d y), shifted into the picture.
    xs, ys = [a * x + c * y for y in (0, 31) for x in (0, 47)], [b * x + d * y for y in (0, 31) for x in (0, 47)]
    wanted = np.zeros((max(ys) - min(ys) + 1, max(xs) - min(xs) + 1, 3), np.uint8)
    for y in range(32):
        for x in range(48):
            wanted[b * x + d * y - min(ys), a * x + c * y - min(xs)] = corners[y, x]
    assert found.shape == wanted.shape
    off = np.abs(found.astype(int) - wanted).max(2)
    # Away from the edges between the corners, where colours are smeared.
    assert np.median(off) <= 6 and (off > 30).mean() < 0.1
    info = probe(file)
    assert (info.width, info.height) == (wanted.shape[1], wanted.shape[0])


def test_odd_sizes_and_what_a_file_says_of_itself(tmp_path: Path) -> None:
    file = write(tmp_path / "a.mkv", range(12), "ffv1", size=(37, 23))
    assert numbers(sample_frames(file, 3).frames) == [0, 6, 11] or numbers(sample_frames(file, 3).frames) == [0, 5, 11]
    info = probe(file)
    assert (info.width, info.height, info.rate) == (37, 23, 10) and info.duration == pytest.approx(1.2, abs=0.11)
    assert probe(write(tmp_path / "b.mp4", range(12))).frames == 12


def test_a_truncated_file_gives_what_decodes(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.mkv", range(40), "ffv1").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 6 // 10])
    left = [number(one.pixels) for one in stream(tmp_path / "cut.mkv")]
    assert left == list(range(len(left))) and 10 < len(left) < 40
    found = sample_frames(tmp_path / "cut.mkv", 3)
    # Over what there is, not over what there should be.
    assert numbers(found.frames)[0] == 0 and abs(numbers(found.frames)[2] - left[-1]) <= 1
    assert abs(numbers(found.frames)[1] - left[-1] / 2) <= 1


def test_a_file_with_an_index_tells_what_is_missing(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.mp4", range(40), "mjpeg", movflags="faststart").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    left = [number(one.pixels) for one in stream(tmp_path / "cut.mp4")]
    found = sample_frames(tmp_path / "cut.mp4", 3)
    assert left == list(range(len(left))) and 10 < len(left) < 40
    assert numbers(found.frames)[2] == left[-1] and 40 - len(left) <= found.broken <= 41 - len(left)
    # The index is at the end of this one.
    whole = write(tmp_path / "b.mp4", range(40), "mjpeg").read_bytes()
    (tmp_path / "lost.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    with pytest.raises(InputError, match=r"lost\.mp4: not a video that can be read"):
        sample_frames(tmp_path / "lost.mp4", 3)


def test_a_broken_frame_is_left_out_and_counted(tmp_path: Path) -> None:
    file = write(tmp_path / "a.mkv", range(10), "mjpeg")
    spoil(file, 4)
    frames = stream(file)
    assert frames.broken == 0
    assert [number(one.pixels) for one in frames] == [0, 1, 2, 3, 5, 6, 7, 8, 9] and frames.broken == 1
    found = sample_frames(file, 10)
    assert numbers(found.frames) in ([0, 1, 2, 3, 3, 5, 6, 7, 8, 9], [0, 1, 2, 3, 5, 5, 6, 7, 8, 9])
    assert found.broken == 1


def test_memory_is_that_of_the_frames_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "a.mp4", range(300), "mpeg4", size=(160, 120))
    one = 160 * 120 * 3
    for few, many in ((lambda: sample_frames(file, 4), 12), (lambda: sum(1 for _ in stream(file, 15)), 6)):
        few()
        tracemalloc.start()
        few()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < many * one + 300_000 < 300 * one / 10


def test_frames_that_were_read_are_gone(tmp_path: Path) -> None:
    """A reference cycle would keep them until the garbage collector comes, some hundred frames later."""
    file = write(tmp_path / "a.mp4", range(50), "mpeg4")
    gc.collect()
    gc.disable()
    try:
        frames = iter(stream(file, 10))
        for _ in range(45):
            next(frames)
        living = sum(type(one) is av.VideoFrame for one in gc.get_objects())
    finally:
        gc.enable()
    # Of those at work, the first, whose display matrix was read, and none of the forty others.
    assert 1 <= living <= 8


def sound(file: Path) -> Path:
    with av.open(str(file), "w") as container:
        out = container.add_stream("pcm_s16le" if file.suffix == ".wav" else "aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, 0, Fraction(1, 8000)
        for one in av.AudioResampler(out.format, out.layout, 8000, 1024 if out.name == "aac" else 0).resample(frame):
            container.mux(out.encode(one))
        container.mux(out.encode(None))
    return file


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.mp4", "no such video file"), (".", "a folder"), ("empty.mp4", "the video file is empty"),
        ("text.mp4", "not a video that can be read"), ("picture.mp4", "not a video that can be read"),
        ("list.m3u8", "not a video that can be read"), ("list.txt", "not a video that can be read"),
        ("sound.wav", "there is no video in it, only sound"), ("sound.m4a", "there is no video in it, only sound"),
        ("head.mp4", "no frame of its video can be decoded"),
    ],
)  # fmt: skip
def test_what_is_no_video_is_said_in_one_line(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video at all " * 100)
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.mp4", format="PNG")
    # Playlists name files; nothing is opened that the user did not give.
    clip = write(tmp_path / "a.mp4", range(3), "mjpeg", movflags="faststart")
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{clip}\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.txt").write_text(f"ffconcat version 1.0\nfile {clip.name}\n")
    (tmp_path / "head.mp4").write_bytes(clip.read_bytes()[: clip.read_bytes().index(b"mdat") + 6])
    if name.startswith("sound"):
        sound(tmp_path / name)
    for read in (probe, lambda file: sample_frames(file, 2), lambda file: list(stream(file))):
        with pytest.raises(InputError, match=said) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.mkv", [0, 1, 2, 50])
    with pytest.raises(InputError, match="at least 1 frame"):
        sample_frames(file, 0)
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="rate must be above 0"):
            stream(file, rate)
    readers = (probe, lambda file: sample_frames(file, 2), lambda file: list(stream(file, 2)))
    for name, value, said in (
        ("MAX_PIXELS", 48 * 32 - 1, "48 x 32 pixels a frame are more than the limit of 1,535"),
        ("MAX_SECONDS", 4, "longer than"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(video, name, value)
            for read in readers:
                with pytest.raises(InputError, match=said):
                    read(file)
    monkeypatch.setattr(video, "MAX_FRAMES", 3)
    with pytest.raises(InputError, match="more than 3 frames"):
        sample_frames(file, 2)
    monkeypatch.setattr(video, "MAX_SAMPLED_PIXELS", 48 * 32 * 2)
    with pytest.raises(InputError, match="3 frames of 48 x 32 are more than 3,072 pixels"):
        frames_at(file, [0.0, 0.1, 0.2])


@pytest.mark.parametrize("every", [0.3, 0.75, 5.0])
@pytest.mark.parametrize(
    "ticks", [range(33), [0, 1, 2, 3, 11, 12, 30, 31, 32, 33, 60], [0], [4, 5]], ids=["even", "variable", "one", "two"]
)
def test_windows_are_the_clips_around_keyframes(tmp_path: Path, ticks: Sequence[int], every: float) -> None:
    file = write(tmp_path / "a.mkv", ticks, "ffv1", size=(40, 24))
    steps = [-0.55, -0.2, 0.0, 0.13, 0.6]
    windows = Windows(file, steps, every, short=12, long=18)
    found = list(windows)
    end = (ticks[-1] - ticks[0]) / 10
    assert [one.time for one in found] == pytest.approx([k * every for k in range(int(end / every + 1e-6) + 1)])
    for one in found:
        wanted = frames_at(file, [one.time + step for step in steps], short=12, long=18)
        assert np.array_equal(one.clip, wanted.frames) and np.array_equal(one.times, wanted.times)
        assert one.size == (40, 24) and one.clip.shape == (5, 11, 18, 3)
    assert windows.broken == 0 and windows.now == pytest.approx(end, abs=1e-3)


def test_windows_of_a_turned_video_and_over_a_broken_frame(tmp_path: Path) -> None:
    file = write(tmp_path / "a.mov", range(20), "mjpeg", size=(40, 24))
    turn(file, MATRICES["90"])
    spoil(file, 4)
    windows = Windows(file, [-0.1, 0.0, 0.1], 0.3, short=24, long=40)
    found = list(windows)
    assert [one.size for one in found] == [(24, 40)] * 7 and found[0].clip.shape == (3, 40, 24, 3)
    # 0.2, 0.3 and 0.4 s: the last is broken.
    assert numbers(found[1].clip) in ([2, 3, 3], [2, 3, 5]) and numbers(found[2].clip) == [5, 6, 7]
    assert windows.broken == 1
    with pytest.raises(ValueError, match="steps must ascend"):
        Windows(file, [0.0, -0.1, 0.1], 0.3, short=24, long=40)


def test_windows_hold_only_what_is_still_needed(tmp_path: Path) -> None:
    def peak(frames: int) -> int:
        file = write(tmp_path / f"{frames}.mp4", range(frames), "mpeg4", size=(160, 120))
        tracemalloc.start()
        assert sum(1 for _ in Windows(file, [-0.4, 0.0, 0.4], 0.5, short=120, long=160)) == frames // 5
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(20)
    assert peak(400) < peak(100) + 160 * 120 * 3


def test_sound_is_handed_on_by_the_videos_clock(tmp_path: Path) -> None:
    file = tmp_path / "a.mkv"
    with av.open(str(file), "w") as container:
        out, track = container.add_stream("mpeg4", rate=10), container.add_stream("pcm_s16le", rate=8000)
        out.width, out.height, out.pix_fmt, track.layout = 48, 32, "yuv420p", "mono"
        # The picture starts half a second after the sound.
        for tick in range(20):
            frame = av.AudioFrame.from_ndarray(np.full((1, 800), tick, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 8000, 800 * tick, Fraction(1, 8000)
            container.mux(track.encode(frame))
            if tick >= 5:
                picture = av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")
                picture.pts, picture.time_base = tick, Fraction(1, 10)
                container.mux(out.encode(picture))
        container.mux([*out.encode(None), *track.encode(None)])
    with Sound(file) as sounding:
        assert sounding.codec == "pcm_s16le"
        times = [float(one.pts * one.time_base) for one in sounding.until(0.55)]
        assert times == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5], abs=2e-3)
        one = next(sounding.until(9))
        assert np.frombuffer(bytes(one), np.int16).tolist() == [11] * 800
        assert len(list(sounding.until(9))) == 8 and not sounding.broken
    with Sound(write(tmp_path / "b.mp4", range(3))) as sounding:
        assert sounding.stream is None and list(sounding.until(9)) == []


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    with av.open(str(file), "w") as container:
        out = container.add_stream("h264", rate=10)
        out.width, out.height, out.pix_fmt = 48, 32, "yuv420p"
        out.codec_context.sample_aspect_ratio = Fraction(16, 15)
        container.mux(out.encode(av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")))
        container.mux(out.encode(None))
    assert probe(file).aspect == Fraction(16, 15)
    turn(file, (0, 1, -1, 0))
    assert probe(file).aspect == Fraction(15, 16)
    assert probe(write(tmp_path / "b.mkv", range(2))).aspect == 1
