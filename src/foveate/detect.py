"""Who does what in a video: an action detector's window slides over the file, which may be of any length.

`Detection` yields one `Keyframe` after the other; `Annotation` draws them onto the video. The file is decoded once for
the detector, which sees small frames at a few times, and once more for the drawing, which needs all of them in full: so
neither has to wait for the other with frames in its hands.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from foveate.data.video import Window, Windows, probe, stream
from foveate.method import InputError, within
from foveate.methods.video.evad_detector import EvadDetector, normalised
from foveate.report.annotate import Annotator
from foveate.report.video import VideoWriter
from foveate.report.write import Growing

LONGEST = 1333 / 288
"""Greatest ratio of a picture's sides at which the shorter one is scaled to the size asked for, as in the paper."""
_EMPTY = 115
"""What is 0 to the detector, which pads with that."""

T = TypeVar("T")


@dataclass(frozen=True)
class Person:
    """Someone in a keyframe.

    Attributes:
        box: (x1, y1, x2, y2) px of the upright picture.
        score: of being a person, 0..1.
        actions: (name, score 0..1), the likeliest first.
    """

    box: tuple[float, float, float, float]
    score: float
    actions: tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False)
class Keyframe:
    """What was found at one time.

    Attributes:
        time: seconds.
        shown: when the frame is shown that is nearest to that, seconds.
        size: (width, height) px of the upright picture.
        persons: the surest first.
        kept: (t, h, w) bool, the tokens that the detector kept of its window.
        seen: (t, h, w, 3) uint8 RGB, the first frame of each time slot, padded as the detector does.
    """

    time: float
    shown: float
    size: tuple[int, int]
    persons: tuple[Person, ...]
    kept: NDArray[np.bool_]
    seen: NDArray[np.uint8]


class Stopwatch:
    """Seconds spent on each of several things, in `seconds`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def each(self, name: str, things: Iterable[T]) -> Iterator[T]:
        """The things, with the time that each takes to come."""
        waiting = iter(things)
        while True:
            with self.of(name):
                try:
                    thing = next(waiting)
                except StopIteration:
                    return
            yield thing


class Detection:
    """What a detector finds in a video, keyframe by keyframe.

    The keyframes are at 0, `every`, 2 `every`, … seconds. Around each the detector sees as many frames as it is for,
    `rate` a second whatever the file's own rate is, with the keyframe in the middle; beyond its ends the video stands
    still.

    Args:
        path: of the video.
        detector: in eval mode, on its device.
        labels: a name for each of its actions.
        every: seconds from keyframe to keyframe, at least 0.04.
        rate: frames a second, 0.5..240.
        short: px to which the shorter side of the frames is scaled, None for the size of the detector's positions.
        person: least score of a person, in [0, 1]. Unlike in the paper there may be nobody.
        action: least score of an action, in [0, 1].
        batch: windows that are computed together.
        watch: where times are added to: "decode" and "model".

    Attributes:
        broken: frames that could not be decoded, so far.
        now: seconds of the video that are decoded.
        settings: those above that are numbers.

    Raises:
        InputError: values out of range, no such file; when iterated, what cannot be decoded.
    """

    def __init__(
        self, path: str | Path, detector: EvadDetector, labels: Sequence[str], *, every: float = 0.5, rate: float = 7.5,
        short: int | None = None, person: float = 0.7, action: float = 0.3, batch: int = 4,
        watch: Stopwatch | None = None,
    ) -> None:  # fmt: skip
        self.detector, self.labels, self.watch = detector, list(labels), watch or Stopwatch()
        self.person, self.action = within("person", person, "[0, 1]"), within("action", action, "[0, 1]")
        every, rate = within("every", every, "[0.04, 3600]"), within("rate", rate, "[0.5, 240]")
        if len(self.labels) != detector.classes:
            raise InputError(f"the detector knows {detector.classes} actions, not {len(self.labels)}")
        if batch < 1:
            raise InputError(f"batch must be at least 1, not {batch}")
        self.batch = batch
        self.short = detector.backbone.config.image_size if short is None else short
        if not detector.patch <= self.short <= 4096:
            raise InputError(f"short must be from {detector.patch}, the detector's patch, to 4096 px, not {self.short}")
        self.frames = detector.backbone.config.num_frames
        steps = [(place - self.frames // 2) / rate for place in range(self.frames)]
        self._windows = Windows(path, steps, every, self.short, round(self.short * LONGEST))
        self.settings = {
            "every": every, "rate": rate, "short": self.short, "person": person, "action": action, "batch": batch,
        }  # fmt: skip

    @property
    def broken(self) -> int:
        return self._windows.broken

    @property
    def now(self) -> float:
        return self._windows.now

    def __iter__(self) -> Iterator[Keyframe]:
        windows = iter(self.watch.each("decode", self._windows))
        while some := list(islice(windows, self.batch)):
            with self.watch.of("model"):
                found = self._found(some)
            yield from found

    @torch.inference_mode()
    def _found(self, windows: Sequence[Window]) -> list[Keyframe]:
        detector = self.detector
        weights = detector.mask_token
        clips = torch.from_numpy(np.stack([one.clip for one in windows])).to(weights.device)
        seen = detector(normalised(clips.permute(0, 4, 1, 2, 3)).to(weights.dtype))
        kept = (seen.encoded.source >= 0).unflatten(1, seen.encoded.grid).cpu().numpy()
        keyframes = []
        for window, persons, tokens in zip(windows, detector.persons(seen, self.person), kept):
            sure = persons.score >= self.person
            scale = [full / side for full, side in zip(window.size, window.clip.shape[2:0:-1])] * 2
            boxes = persons.boxes[sure].float().cpu() * torch.tensor(scale)
            # Rounding may lead out of the picture again.
            corners = boxes.minimum(torch.tensor([*window.size, *window.size])).tolist()
            score, actions = persons.score[sure].float().cpu(), persons.actions[sure].float().cpu().tolist()
            people = [
                Person(tuple(corners[k]), float(score[k]), self._named(actions[k]))
                for k in score.argsort(descending=True).tolist()
            ]
            middle = float(window.times[self.frames // 2])
            slots = self._padded(window.clip[:: detector.tubelet])
            keyframes.append(Keyframe(window.time, middle, window.size, tuple(people), tokens, slots))
        return keyframes

    def _named(self, scores: Sequence[float]) -> tuple[tuple[str, float], ...]:
        found = [(label, score) for label, score in zip(self.labels, scores) if score >= self.action]
        return tuple(sorted(found, key=lambda one: -one[1]))

    def _padded(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        step = 2 * self.detector.patch
        height, width = frames.shape[1:3]
        padding = ((0, 0), (0, -height % step), (0, -width % step), (0, 0))
        return np.pad(frames, padding, constant_values=_EMPTY)


class Annotation:
    """The video with what was found drawn onto it, written as `foveate.report.video.VideoWriter` writes.

    Every frame shows what was found at the keyframe nearest to it.

    Args:
        path: of the video.
        out: of the file to write, ending in ".mp4".
        labels: names of all actions.
        watch: where times are added to: "decode", "draw" and "encode".

    Attributes:
        result: where the file is, None before, and where nothing was written.
        left_out: codec of sound that could not be copied, or empty.
    """

    def __init__(self, path: str | Path, out: Path, labels: Sequence[str], watch: Stopwatch | None = None) -> None:
        self.path, self.out, self.labels, self.watch = Path(path), out, labels, watch or Stopwatch()
        self.result: Path | None = None
        self.left_out = ""

    def write(self, keyframes: Iterable[Keyframe], on_frame: Callable[[float], object] = lambda time: None) -> None:
        """Writes it, while `keyframes` are taken as far as the frames need them; `on_frame` gets each frame's time.

        Raises:
            InputError: what cannot be decoded or written.
        """
        info = probe(self.path)
        coming = iter(keyframes)
        now = next(coming)
        following = next(coming, None)
        annotator = Annotator(*now.size, now.kept.shape, self.labels)
        writer = VideoWriter(self.out, annotator.size, rate=info.rate, aspect=info.aspect, sound=self.path)
        try:
            with writer:
                for frame in self.watch.each("decode", stream(self.path)):
                    while following is not None and frame.time >= (now.time + following.time) / 2:
                        now, following = following, next(coming, None)
                    with self.watch.of("draw"):
                        picture = annotator.draw(frame.pixels, now)
                    with self.watch.of("encode"):
                        writer.write(frame.time, picture)
                    on_frame(frame.time)
        finally:
            self.result, self.left_out = writer.result, writer.left_out


class KeyframesFile:
    """A JSON file with a line for each keyframe; a context, under the rule of `foveate.report.video.VideoWriter`.

    Args:
        path: of the file.
        facts: what stands before the keyframes.
        closing: asked at the end, for what stands behind them.

    Attributes:
        result: where the file is, None before.
    """

    def __init__(self, path: Path, facts: dict[str, Any], closing: Callable[[], dict[str, Any]]) -> None:
        self.path, self.facts, self.closing = path, facts, closing
        self.result: Path | None = None
        self._count = 0

    def __enter__(self) -> KeyframesFile:
        self._file = Growing(self.path)
        self._text = self._file.temporary.open("w", encoding="utf-8")
        head = json.dumps(self.facts, indent=1, ensure_ascii=False)
        self._text.write(head.removesuffix("\n}") + ',\n "keyframes": [')
        return self

    def add(self, keyframe: Keyframe) -> None:
        persons = [
            {
                "box": [round(side, 2) for side in one.box],
                "score": round(one.score, 4),
                "actions": {label: round(score, 4) for label, score in one.actions},
            }
            for one in keyframe.persons
        ]
        values = {
            "time": round(keyframe.time, 6),
            "frame": round(keyframe.shown, 6),
            "tokens_kept": round(float(keyframe.kept.mean()), 4),
            "persons": persons,
        }
        self._text.write(("," if self._count else "") + "\n  " + json.dumps(values, ensure_ascii=False))
        self._count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._text as text:
                tail = json.dumps({"complete": kind is None, **self.closing()}, indent=1, ensure_ascii=False)
                text.write("\n ],\n" + tail.removeprefix("{\n") + "\n")
            if kind is None or (issubclass(kind, KeyboardInterrupt | InputError) and self._count):
                self.result = self._file.publish(complete=kind is None)
        finally:
            self._file.discard()
