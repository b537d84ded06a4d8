"""Reading the user's videos with PyAV, one picture at a time; anything unusable is an `InputError` of one line.

Times are seconds from the start of the file's first video stream, whatever its rate, constant or not. Pictures are RGB
and upright: turned and mirrored by the stream's display matrix. What cannot be decoded is left out and counted.
"""

from __future__ import annotations

import heapq
import itertools
import math
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from foveate.data.files import one_line, regular_file
from foveate.method import InputError

if TYPE_CHECKING:
    from av import Packet, VideoFrame

MAX_PIXELS = 40_000_000
"""Of one frame; 8K has 33 million."""
MAX_SECONDS = 12 * 3600
MAX_FRAMES = 4_000_000
"""Of one file: 12 hours at 90 a second."""
MAX_SAMPLED_PIXELS = 1_000_000_000
"""Of all frames that are kept of one file together: 3 GB."""

# Containers and raw streams. Without such a list FFmpeg also reads playlists, which open other files and addresses,
# and takes text for pictures.
_FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,ogg,asf,gif,h263,h264,hevc,av1,obu,ivf,yuv4mpegpipe,nut,mxf,dv,"
    "rm,wtv,mjpeg,wav,mp3,flac,aac"
)


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of its video.

    Attributes:
        width, height: px of an upright frame.
        duration: seconds; None where the file does not say.
        frames: how many; None where the file does not say.
        rate: frames a second, on average; None where the file does not say.
        aspect: width of a pixel over its height, upright.
    """

    width: int
    height: int
    duration: float | None
    frames: int | None
    rate: float | None
    aspect: Fraction = Fraction(1)


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a clip.

    Attributes:
        frames: (T, H, W, 3) uint8 RGB.
        times: (T,) float64, seconds, ascending: when each is shown first.
        broken: frames of the file that could not be decoded on the way to the last of these.
    """

    frames: NDArray[np.uint8]
    times: NDArray[np.float64]
    broken: int = 0


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of a stream: seconds and (H, W, 3) uint8 RGB."""

    time: float
    pixels: NDArray[np.uint8]


def probe(path: str | Path) -> VideoInfo:
    """What a file says of its video; its first frame is decoded, no other.

    Raises:
        InputError: no such file, no video, nothing that can be decoded, beyond a limit.
    """
    path = regular_file(path, "video")
    with _opened(path) as container:
        stream = _video_stream(container, path)
        duration, frames, rate = _duration(container, stream), stream.frames or None, stream.average_rate
        aspect = stream.sample_aspect_ratio or Fraction(1)
        _check_duration(path, duration or 0.0)
    decoded = _Decoded(path)
    _, frame = next(iter(decoded))
    height, width = _upright(frame, decoded.matrix).shape[:2]
    aspect = 1 / aspect if _transposes(decoded.matrix) else aspect
    return VideoInfo(width, height, duration, frames, None if rate is None else float(rate), aspect)


def sample_frames(path: str | Path, count: int) -> Video:
    """`count` frames at equal distances in time, from the first to the last (of one: the middle).

    When each frame is shown is read from the file without decoding anything; then it is decoded once, and no more
    frames are held than are asked for. A clip with fewer frames gives all, and its last one again.

    Raises:
        InputError: no such file, no video, nothing that can be decoded, beyond a limit, `count` below 1.
    """
    if count < 1:
        raise InputError(f"at least 1 frame has to be taken of a video, not {count}")
    path = regular_file(path, "video")
    shown, missing = _timeline(path)
    if len(shown) <= count:
        times = [*shown, *[shown[-1]] * (count - len(shown))]
    elif count == 1:
        times = [(shown[0] + shown[-1]) / 2]
    else:
        times = np.linspace(shown[0], shown[-1], count).tolist()
    video = frames_at(path, times)
    return Video(video.frames, video.times, video.broken + missing)


def frames_at(
    path: str | Path, times: Sequence[float], *, short: int | None = None, long: int | None = None,
    start: float | None = None, most: int = MAX_FRAMES,
) -> Video:  # fmt: skip
    """The frames that are shown nearest to ascending `times`, seconds; before and after the video its first and last.

    Args:
        path: of the file.
        times: at least one.
        short, long: px; frames are scaled so that the shorter side has `short`, but the longer one `long` at most.
        start: where decoding begins (at the key frame before), seconds; None: at the beginning.
        most: limit of frames to decode.

    Raises:
        InputError: no such file, no video, nothing that can be decoded, beyond a limit.
    """
    path = regular_file(path, "video")
    decoded = _Decoded(path, start, most)
    pictures: list[NDArray[np.uint8]] = []
    found: list[float] = []
    last: VideoFrame | None = None
    for time, frame in _nearest(decoded, times):
        if frame is not last:
            picture = _upright(frame, decoded.matrix, short, long)
            if picture.shape[0] * picture.shape[1] * len(times) > MAX_SAMPLED_PIXELS:
                raise InputError(
                    f"{path}: {len(times)} frames of {picture.shape[1]} x {picture.shape[0]} are more than "
                    f"{MAX_SAMPLED_PIXELS:,} pixels; take fewer, or scale the video down"
                )
            if pictures and picture.shape != pictures[0].shape:
                # Streams may change their size on the way.
                height, width = pictures[0].shape[:2]
                picture = _resized(picture, width, height)
        pictures.append(picture)
        found.append(time)
        last = frame
    return Video(np.stack(pictures), np.array(found), decoded.broken)


class Stream:
    """The frames of a file one after the other, of which only one or two are in memory at a time.

    Args:
        path: of the file.
        rate: frames a second: the k-th frame is the one that is shown nearest to k / rate, as long as the video is.
            None: every frame of the file once, when it is shown.

    Attributes:
        broken: frames that could not be decoded, so far in the current or last pass.

    Raises:
        InputError: no such file, a rate that is not above 0; when iterated, no video, nothing that can be decoded,
            beyond a limit.
    """

    def __init__(self, path: str | Path, rate: float | None = None) -> None:
        if rate is not None and not 0 < rate <= 1000:
            raise InputError(f"a video's rate must be above 0 and at most 1000 frames a second, not {rate}")
        self.path, self.rate = regular_file(path, "video"), rate
        self._decoded: _Decoded | None = None

    @property
    def broken(self) -> int:
        return 0 if self._decoded is None else self._decoded.broken

    def __iter__(self) -> Iterator[Frame]:
        decoded = self._decoded = _Decoded(self.path)
        pairs: Iterable[tuple[float, VideoFrame]] = decoded
        if self.rate is not None:
            pairs = _nearest(decoded, (k / self.rate for k in itertools.count()), stop=True)
        last: VideoFrame | None = None
        for time, frame in pairs:
            if frame is not last:
                picture = _upright(frame, decoded.matrix)
            last = frame
            yield Frame(time, picture)


def stream(path: str | Path, rate: float | None = None) -> Stream:
    """A file's frames, `rate` a second or all of them, in bounded memory; see `Stream`."""
    return Stream(path, rate)


@dataclass(frozen=True, eq=False)
class Window:
    """A clip around a keyframe.

    Attributes:
        time: the keyframe's, seconds; the frame itself is the one shown nearest to that.
        clip: (T, H, W, 3) uint8 RGB.
        times: (T,) float64, seconds, ascending: when each frame is shown first.
        size: (width, height) px of the upright picture before it was scaled.
    """

    time: float
    clip: NDArray[np.uint8]
    times: NDArray[np.float64]
    size: tuple[int, int]


class Windows:
    """Clips around the keyframes 0, `every`, 2 `every`, … seconds, up to the last frame; the file is decoded once.

    Each is what `frames_at` gives for the times around its keyframe. Only frames that are asked for are converted, and
    only clips whose last frame is still to come are in memory.

    Args:
        path: of the file.
        steps: seconds before and after a keyframe, ascending, from below to above 0.
        every: seconds.
        short, long: px, see `frames_at`.

    Attributes:
        broken: frames that could not be decoded, so far in the current or last pass.
        now: seconds that are decoded, likewise.

    Raises:
        InputError: no such file; when iterated, no video, nothing that can be decoded, beyond a limit.
    """

    def __init__(self, path: str | Path, steps: Sequence[float], every: float, short: int, long: int) -> None:
        if not (every > 0 and len(steps) > 1 and steps[0] <= 0 < steps[-1] and list(steps) == sorted(steps)):
            raise ValueError(f"steps must ascend from below to above 0, and every be above 0: {steps}, {every}")
        self.path, self.steps, self.every = regular_file(path, "video"), steps, every
        self.short, self.long, self.now = short, long, 0.0
        self._decoded: _Decoded | None = None

    @property
    def broken(self) -> int:
        return 0 if self._decoded is None else self._decoded.broken

    def __iter__(self) -> Iterator[Window]:
        decoded = self._decoded = _Decoded(self.path)
        self.now, end = 0.0, math.inf
        asked: deque[tuple[float, int, int]] = deque()
        clips: dict[int, list[tuple[float, NDArray[np.uint8]]]] = {}

        def frames() -> Iterator[tuple[float, VideoFrame]]:
            nonlocal end
            for self.now, frame in decoded:
                yield self.now, frame
            end = self.now + 1e-6

        def times() -> Iterator[float]:
            waiting: list[tuple[float, int, int]] = []
            for number in itertools.count():
                time = number * self.every
                # Known only when the file has ended, shortly before these times are due.
                if time > end:
                    break
                while waiting and waiting[0][0] <= time + self.steps[0]:
                    asked.append(heapq.heappop(waiting))
                    yield asked[-1][0]
                for place, step in enumerate(self.steps):
                    heapq.heappush(waiting, (time + step, number, place))
            while waiting:
                asked.append(heapq.heappop(waiting))
                yield asked[-1][0]

        last: VideoFrame | None = None
        size = shape = (0, 0)
        for shown, frame in _nearest(frames(), times()):
            _, number, place = asked.popleft()
            if frame is not last:
                picture = _upright(frame, decoded.matrix, self.short, self.long)
                if last is None:
                    shape, size = picture.shape[:2], (frame.width, frame.height)
                    size = size[::-1] if _transposes(decoded.matrix) else size
                if picture.shape[:2] != shape:
                    # Streams may change their size on the way.
                    picture = _resized(picture, shape[1], shape[0])
            last = frame
            clips.setdefault(number, []).append((shown, picture))
            if place == len(self.steps) - 1:
                clip = clips.pop(number)
                if number * self.every <= end:
                    found = np.stack([one for _, one in clip])
                    yield Window(number * self.every, found, np.array([one for one, _ in clip]), size)


class Sound:
    """The compressed packets of a file's first sound track, to be copied; a context.

    Attributes:
        stream: PyAV's, the pattern of a stream to copy to; None where there is no sound.
        codec: its name, such as "aac"; empty where there is none.
        broken: whether reading ended at damage.

    Raises:
        InputError: when entered, no such file, not a video.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.codec, self.broken = regular_file(path, "video"), "", False
        self.stream: Any = None
        self._next: Packet | None = None

    def __enter__(self) -> Sound:
        self._container = _opened(self.path)
        base, begin = _clock(_video_stream(self._container, self.path))
        self._start = base * begin
        tracks = self._container.streams.audio
        if tracks and tracks[0].codec_context is not None:
            self.stream, self.codec = tracks[0], tracks[0].codec_context.name
            self._packets = self._container.demux(self.stream)
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def until(self, time: float) -> Iterator[Packet]:
        """The next packets that start before `time`, seconds from the start of the video, their clock set to that."""
        while self.stream is not None:
            packet, self._next = self._next or self._pull(), None
            if packet is None:
                return
            if float((packet.pts or 0) * packet.time_base) >= time:
                self._next = packet
                return
            yield packet

    def _pull(self) -> Packet | None:
        import av

        try:
            for packet in self._packets:
                # At the end comes an empty one; without times, sound and picture would part.
                if packet.size and packet.pts is not None and packet.dts is not None:
                    shift = round(self._start / float(packet.time_base))
                    packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                    if packet.dts >= 0:
                        return packet
        except av.FFmpegError:
            self.broken = True
        return None


class _Decoded:
    """Iterates over (seconds, frame) in the order of showing.

    Attributes:
        broken: how many frames were left out.
        matrix: a, b, c, d of the display matrix, by which (x, y) goes to (a x + c y, b x + d y).
    """

    def __init__(self, path: Path, start: float | None = None, most: int = MAX_FRAMES) -> None:
        self.path, self.start, self.most, self.broken = path, start, most, 0
        self.matrix = (1, 0, 0, 1)

    def __iter__(self) -> Iterator[tuple[float, VideoFrame]]:
        self.broken, now = 0, 0.0
        number = -1
        with _opened(self.path) as container:
            stream = _video_stream(container, self.path)
            stream.thread_type = "AUTO"
            base, begin = _clock(stream)
            rate = float(stream.average_rate or stream.base_rate or 25)
            if self.start is not None and self.start > 0:
                container.seek(int(self.start / base) + begin, stream=stream)
            for number, frame in enumerate(self._frames(container, stream)):
                if number == self.most:
                    raise InputError(f"{self.path}: more than {self.most:,} frames to decode")
                if frame.width * frame.height > MAX_PIXELS:
                    raise _too_large(self.path, frame.width, frame.height)
                # Some raw streams have no times; and no frame is shown before the one that it follows.
                now = max(now, number / rate if frame.pts is None else (frame.pts - begin) * base)
                _check_duration(self.path, now)
                if number == 0:
                    # Asked of the first only: a frame whose side data was read stays until the garbage collector comes.
                    self.matrix = _display_matrix(frame)
                yield now, frame
        if number < 0:
            raise InputError(f"{self.path}: no frame of its video can be decoded")

    def _frames(self, container: Any, stream: Any) -> Iterator[VideoFrame]:
        import av

        packets = container.demux(stream)
        ended = False
        while not ended:
            packet = None
            try:
                packet = next(packets, None)
            except av.FFmpegError:
                # The container is damaged here and nothing behind can be found; what the decoder holds comes still.
                self.broken += 1
            ended = packet is None
            try:
                frames = stream.codec_context.decode(packet)
            except EOFError:
                continue
            except av.FFmpegError:
                self.broken += 1
                continue
            for frame in frames:
                # Patched up by the decoder where data was missing.
                if frame.is_corrupt:
                    self.broken += 1
                else:
                    yield frame


def _nearest(
    frames: Iterable[tuple[float, VideoFrame]], times: Iterable[float], stop: bool = False
) -> Iterator[tuple[float, VideoFrame]]:
    """For each of ascending times the frame nearest to it, the earlier of two; past the last frame that, or with `stop`
    nothing."""
    wanted = iter(times)
    target = next(wanted, None)
    previous: tuple[float, VideoFrame] | None = None
    for now, frame in frames:
        while previous is not None and target is not None and target <= (previous[0] + now) / 2:
            yield previous
            target = next(wanted, None)
        if target is None:
            return
        previous = now, frame
    while previous is not None and target is not None and (not stop or target <= previous[0] + 1e-6):
        yield previous
        target = next(wanted, None)


def _timeline(path: Path) -> tuple[array[float], int]:
    """When the frames of the file are shown, ascending seconds, and how many the file promises beyond these.

    Nothing is decoded: the container has the times.
    """
    import av

    times = array("d")
    packets = 0
    with _opened(path) as container:
        stream = _video_stream(container, path)
        base, begin = _clock(stream)
        rate = float(stream.average_rate or stream.base_rate or 25)
        try:
            for packet in container.demux(stream):
                if not packet.size:
                    continue
                packets += 1
                # Packets before a cut are there for the decoder only.
                if packet.is_discard:
                    continue
                times.append(len(times) / rate if packet.pts is None else (packet.pts - begin) * base)
                if len(times) > MAX_FRAMES:
                    raise InputError(f"{path}: more than {MAX_FRAMES:,} frames")
        except av.FFmpegError:
            pass  # truncated: what there is up to here is used, and `_Decoded` counts
        promised = stream.frames
    if not times:
        raise InputError(f"{path}: no frame of its video can be decoded")
    _check_duration(path, max(times) - min(times))
    return array("d", sorted(times)), max(0, promised - packets)


def _opened(path: Path) -> Any:
    import av

    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    try:
        # Absolute: no file's name is then taken for a protocol.
        return av.open(str(path.absolute()), options=options, metadata_errors="replace")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a video that can be read ({_reason(error)})") from None


def _video_stream(container: Any, path: Path) -> Any:
    import av.stream

    # A sound file's cover is a video of one picture to FFmpeg.
    found = [one for one in container.streams.video if not one.disposition & av.stream.Disposition.attached_pic]
    if not found:
        sound = ", only sound" if container.streams.audio else ""
        raise InputError(f"{path}: there is no video in it{sound}")
    stream = found[0]
    if stream.codec_context is None:
        raise InputError(f"{path}: there is no decoder for its video here")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_PIXELS:
        raise _too_large(path, width, height)
    return stream


def _clock(stream: Any) -> tuple[float, int]:
    """Seconds of a tick, and the tick at which the video starts."""
    return float(stream.time_base or 0.001), int(stream.start_time or 0)


def _duration(container: Any, stream: Any) -> float | None:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return None if not container.duration else container.duration / 1_000_000


def _check_duration(path: Path, seconds: float) -> None:
    if not math.isfinite(seconds) or seconds > MAX_SECONDS:
        raise InputError(f"{path}: longer than {MAX_SECONDS // 3600} hours; cut it")


def _too_large(path: Path, width: int, height: int) -> InputError:
    return InputError(f"{path}: {width} x {height} pixels a frame are more than the limit of {MAX_PIXELS:,}")


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or one_line(error))


def _display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """a, b, c, d; see `_Decoded`."""
    from av.sidedata.sidedata import Type

    side_data: Any = frame.side_data
    matrix = side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return 1, 0, 0, 1
    # In the file's order a b _ c d; what follows is a shift.
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5].tolist()
    return a, b, c, d


def _upright(
    frame: VideoFrame, matrix: tuple[int, int, int, int], short: int | None = None, long: int | None = None
) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB, turned by whole right angles and mirrored, scaled as `frames_at` says."""
    width, height = frame.width, frame.height
    scale = min((short or min(width, height)) / min(width, height), (long or max(width, height)) / max(width, height))
    pixels = frame.to_ndarray(format="rgb24", width=max(1, round(width * scale)), height=max(1, round(height * scale)))
    a, b, c, d = matrix
    if _transposes(matrix):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1], dtype=np.uint8)


def _transposes(matrix: tuple[int, int, int, int]) -> bool:
    """Whether width and height change places."""
    a, b, c, d = matrix
    return abs(b) + abs(c) > abs(a) + abs(d)


def _resized(picture: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
