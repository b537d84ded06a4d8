"""Writing a video whose frames come one after the other: H.264 in MP4, times as given, sound copied."""

from __future__ import annotations

from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.data.video import Sound
from foveate.method import InputError
from foveate.report.write import Growing

_TICKS = 90_000
"""Of a second: a multiple of the usual rates, so that their times stay exact."""
_SOUNDS = ("aac", "mp3", "ac3", "eac3", "alac", "opus")
"""Codecs that players expect in an MP4."""


class VideoWriter:
    """An MP4 file; a context. Nobody sees it before it is complete.

    Left without an error the file is at `path`. After Ctrl-C, or bad input on the way, what was written until then is a
    playable file too, `NAME.partial.mp4`, and an earlier file at `path` stays; `result` says where it is, None for
    nowhere. After any other error there is nothing.

    Args:
        path: ends in ".mp4".
        size: (width, height) px, both even.
        rate: frames a second, about; what counts is each frame's time.
        aspect: width of a pixel over its height.
        sound: file whose first sound track is copied, if MP4 can hold it; `left_out` is the codec of one that is not.

    Raises:
        InputError: when entered, for a size that H.264 or this machine's encoder does not take.
    """

    def __init__(
        self, path: Path, size: tuple[int, int], *, rate: float | None = None, aspect: Fraction = Fraction(1),
        sound: Path | None = None,
    ) -> None:  # fmt: skip
        self.path, self.size, self.aspect, self.sound = path, size, aspect, sound
        self.rate = Fraction(min(max(rate or 25, 1), 240)).limit_denominator(1001)
        self.result: Path | None = None
        self.left_out = ""
        self.frames, self._tick = 0, -1

    def __enter__(self) -> VideoWriter:
        import av

        self._file = Growing(self.path)
        self._stack = ExitStack()
        self._stack.callback(self._file.discard)
        try:
            self._container = self._stack.enter_context(av.open(str(self._file.temporary), "w", format="mp4"))
            out: Any = self._container.add_stream("h264", rate=self.rate, options={"preset": "veryfast", "crf": "21"})
            out.width, out.height, out.pix_fmt = *self.size, "yuv420p"
            out.time_base = out.codec_context.time_base = Fraction(1, _TICKS)
            out.codec_context.sample_aspect_ratio = self.aspect
            # BT.709, said in the file: what players take for granted hangs on the size.
            for name in ("colorspace", "color_primaries", "color_trc", "color_range"):
                setattr(out.codec_context, name, 1)
            self._stream = out
            self._sound: Sound | None = None
            if self.sound is not None:
                self._listen(self._stack.enter_context(Sound(self.sound)))
            self._container.start_encoding()
        except BaseException as error:
            self._stack.close()
            if isinstance(error, av.FFmpegError):
                width, height = self.size
                raise InputError(f"{self.path}: no H.264 video of {width} x {height} can be written here") from None
            raise
        return self

    def _listen(self, sound: Sound) -> None:
        if sound.codec in _SOUNDS:
            self._sound = sound
            self._track = self._container.add_stream_from_template(sound.stream)
        else:
            self.left_out = sound.codec

    def write(self, time: float, pixels: NDArray[np.uint8]) -> None:
        """Adds a frame: seconds, greater than the one before, and (height, width, 3) uint8 RGB."""
        import av
        from av.video.reformatter import ColorRange, Colorspace

        # To H.264 no two frames are at the same time.
        self._tick = max(self._tick + 1, round(time * _TICKS))
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
        frame.pts, frame.time_base = self._tick, Fraction(1, _TICKS)
        self._container.mux(self._stream.encode(frame))
        self.frames += 1
        self._copy(time)

    def _copy(self, until: float) -> None:
        """Sound beside the picture, so that the muxer need not hold much of either."""
        if self._sound is not None:
            for packet in self._sound.until(until):
                packet.stream = self._track
                self._container.mux(packet)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is None or (issubclass(kind, KeyboardInterrupt | InputError) and self.frames):
                self._container.mux(self._stream.encode(None))
                if kind is None:
                    self._copy(float("inf"))
                self._container.close()
                self.result = self._file.publish(complete=kind is None)
