"""Actions of persons at keyframes: AVA's annotation format over a folder of videos, and the same from scenes' clips."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from foveate.data.scenes import Clip
from foveate.data.video import frames_at
from foveate.method import InputError

MAX_FRAMES = 100_000
"""Decoded on the way to one clip: an hour at 30 frames a second, should a file have no index to seek in."""
_VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v")


@dataclass(frozen=True, eq=False)
class ActionSample:
    """A clip around a keyframe, and who does what in that.

    Attributes:
        clip: (3, T, H, W) uint8 RGB; frame T // 2 is the keyframe.
        boxes: (A, 4) float32 (x1, y1, x2, y2) px in the keyframe.
        labels: (A, classes) bool.
        name: for messages and results.
    """

    clip: Tensor
    boxes: Tensor
    labels: Tensor
    name: str


def from_clip(clip: Clip, stride: int = 1) -> ActionSample:
    """Every `stride`-th frame of a clip of `foveate.data.scenes`, and the actors that can be seen in its keyframe."""
    first = clip.keyframe % stride
    frames = torch.from_numpy(clip.frames[first::stride])
    if (clip.keyframe - first) // stride != len(frames) // 2:
        raise InputError(f"of {len(clip.frames)} frames, every {stride}th has no keyframe in the middle")
    seen = [actor for actor in clip.actors if actor.boxes[clip.keyframe, 2] > 0]
    boxes = np.stack([actor.boxes[clip.keyframe] for actor in seen]) if seen else np.zeros((0, 4), np.float32)
    labels = np.stack([actor.labels for actor in seen]) if seen else np.zeros((0, len(clip.actors[0].labels)), bool)
    name = f"clips/{clip.split}/{clip.seed}/{clip.index}"
    return ActionSample(
        frames.permute(3, 0, 1, 2).contiguous(), torch.from_numpy(boxes), torch.from_numpy(labels), name
    )


def collate(samples: Sequence[ActionSample]) -> dict[str, Tensor]:
    """One batch, padded with zeros: `clip` (B, 3, T, H, W) uint8, `size` (B, 2) height and width before padding,
    `boxes` (B, A, 4), `labels` (B, A, classes) float32, `present` (B, A) bool."""
    height, width = (max(one.clip.shape[axis] for one in samples) for axis in (2, 3))
    most = max(1, *(len(one.boxes) for one in samples))
    clips = [F.pad(one.clip, (0, width - one.clip.shape[3], 0, height - one.clip.shape[2])) for one in samples]
    return {
        "clip": torch.stack(clips),
        "size": torch.tensor([one.clip.shape[2:] for one in samples]),
        "boxes": torch.stack([F.pad(one.boxes, (0, 0, 0, most - len(one.boxes))) for one in samples]),
        "labels": torch.stack([F.pad(one.labels.float(), (0, 0, 0, most - len(one.boxes))) for one in samples]),
        "present": torch.tensor([[k < len(one.boxes) for k in range(most)] for one in samples]),
    }


class Ava(Dataset[ActionSample]):
    """Keyframes of an AVA CSV, one item each, in the order of the file.

    A line is `video_id,timestamp,x1,y1,x2,y2,action_id,person_id`: seconds, corners in shares of the picture, an action
    from 1. Lines of the same video, timestamp and person (or, without a person, box) are one box with several actions.
    A line without a box (`video_id,timestamp,,,,,,`) says that there is nobody.

    Args:
        file: the CSV, with or without a header line.
        videos: folder with `video_id` and a video's ending.
        classes: number of actions.
        frames, stride, rate: the clip has `frames` frames, `stride` apart at `rate` a second, whatever the video's own
            rate is: with 16, 4 and 30 those at -32/30 … +28/30 s. Beyond its ends the video stands still.
        short, long: the clip's shorter side, as far as its longer one does not exceed `long` px.
        flip: whether to mirror half of the items, at random (torch's generator).

    Raises:
        InputError: for a line that cannot be read, with its number, or a video that is missing; when an item is read,
            for a video that cannot be decoded.
    """

    def __init__(
        self, file: str | Path, videos: str | Path, *, classes: int = 80, frames: int = 16, stride: int = 4,
        rate: float = 30.0, short: int = 288, long: int = 1333, flip: bool = False,
    ) -> None:  # fmt: skip
        self.classes, self.frames, self.stride, self.rate = classes, frames, stride, rate
        self.short, self.long, self.flip = short, long, flip
        self._keyframes = _read(Path(file), classes)
        files = {one.stem: one for one in sorted(Path(videos).iterdir()) if one.suffix.lower() in _VIDEOS}
        for video, _ in self._keyframes:
            if video not in files:
                raise InputError(f"{videos} has no video {video!r} ({', '.join(_VIDEOS)}), which {file} names")
        self._files = files
        self._items = list(self._keyframes)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> ActionSample:
        video, time = self._items[index]
        steps = (np.arange(self.frames) - self.frames // 2) * self.stride / self.rate
        clip = read_clip(self._files[video], float(time) + steps, self.short, self.long)
        height, width = clip.shape[1:3]
        corners: list[tuple[float, ...]] = []
        labels = torch.zeros(len(self._keyframes[video, time]), self.classes, dtype=torch.bool)
        for row, (box, actions) in enumerate(self._keyframes[video, time].values()):
            corners.append(box)
            labels[row, sorted(actions)] = True
        boxes = torch.tensor(corners).reshape(-1, 4) * torch.tensor([width, height, width, height])
        sample = ActionSample(torch.from_numpy(clip).permute(3, 0, 1, 2).contiguous(), boxes, labels, f"{video},{time}")
        return mirrored(sample) if self.flip and bool(torch.rand(()) < 0.5) else sample


def mirrored(sample: ActionSample) -> ActionSample:
    """The sample with left and right exchanged."""
    x1, y1, x2, y2 = sample.boxes.unbind(1)
    width = sample.clip.shape[3]
    return replace(sample, clip=sample.clip.flip(3), boxes=torch.stack([width - x2, y1, width - x1, y2], 1))


_Keyframes = dict[tuple[str, str], dict[str, tuple[tuple[float, ...], set[int]]]]


def _read(file: Path, classes: int) -> _Keyframes:
    """(video, timestamp) -> person or box -> (box, 0-based actions)."""
    keyframes: _Keyframes = {}
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            for number, line in enumerate(csv.reader(lines), 1):
                if not line or (number == 1 and line[0] == "video_id"):
                    continue
                where = f"{file}, line {number}"
                if len(line) not in (7, 8):
                    raise InputError(f"{where}: 7 or 8 fields were expected, there are {len(line)}")
                video, time, *corners = line[:6]
                _number(time, where, "timestamp")
                persons = keyframes.setdefault((video, time), {})
                if not any(corners):
                    continue
                box = tuple(_number(one, where, "corner") for one in corners)
                if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
                    raise InputError(f"{where}: x1 < x2 and y1 < y2 must be shares of the picture, 0..1, not {box}")
                if not line[6].isdigit() or not 1 <= int(line[6]) <= classes:
                    raise InputError(f"{where}: an action is a number 1..{classes}, not {line[6]!r}")
                person = line[7] if len(line) == 8 and line[7] else ",".join(corners)
                persons.setdefault(person, (box, set()))[1].add(int(line[6]) - 1)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: not a text file in UTF-8") from None
    if not keyframes:
        raise InputError(f"{file}: no keyframe in it")
    return keyframes


def _number(text: str, where: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise InputError(f"{where}: {text!r} is no {what}")
    return value


def read_clip(file: Path, times: NDArray[np.float64], short: int, long: int) -> NDArray[np.uint8]:
    """(T, H, W, 3) uint8 RGB: the frames shown nearest to ascending `times` (T,) in seconds from the video's start.

    Upright by the video's rotation; scaled so that the shorter side has `short` px, but the longer one `long` at most.

    Raises:
        InputError: not a video, damaged before the first of the frames, or more than `MAX_FRAMES` to decode.
    """
    return frames_at(file, times.tolist(), short=short, long=long, start=float(times[0]) - 0.5, most=MAX_FRAMES).frames
