"""Clips, step two: `compose_clip` paints a layout; `Clips` gives the frames with their ground truth."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foveate.data.scenes.clip_questions import caption_of, clip_questions
from foveate.data.scenes.motion import ACTIONS, Action, ClipLayout, Track, sample_clip_layout
from foveate.data.scenes.pictures import BASE_SIZE, Background, toned
from foveate.data.scenes.questions import Question
from foveate.data.scenes.sprites import CATEGORY_OF, SPLITS, generator, photograph_pixels, texture


class Flow(NamedTuple):
    """Dense optical flow of every pair of frames t, t + 1.

    `field` (T-1, H, W, 2) float32: (dx, dy) px that the surface seen at pixel (x, y) of frame t moves until frame
    t + 1. `valid` (T-1, H, W) bool: whether that surface is still seen there, neither outside nor hidden.
    """

    field: NDArray[np.float32]
    valid: NDArray[np.bool_]


@dataclass(frozen=True)
class Event:
    """Something that happens: `actor` (its identity) does `action` of `ACTIONS` from frame `start` to frame `end`."""

    start: int
    end: int
    actor: int
    action: str


@dataclass(frozen=True, eq=False)
class Actor:
    """One actor of a clip of T frames.

    `identity` is its index in `Clip.actors`; two actors may have the same name. `present` (T,) bool: some of it lies
    within the picture. `boxes` (T, 4) float32 are (x1, y1, x2, y2) px around the visible pixels, exclusive at the
    lower right, and zero where there are none (absent, or wholly behind others). `track` has its exact centre, side
    and angle.
    """

    identity: int
    name: str
    category: str
    boxes: NDArray[np.float32]
    present: NDArray[np.bool_]
    actions: tuple[Action, ...]
    track: Track
    owner: NDArray[np.int8] = field(repr=False)

    @property
    def masks(self) -> NDArray[np.bool_]:
        """(T, H, W) bool: the visible pixels."""
        return self.owner == self.identity

    @property
    def labels(self) -> NDArray[np.bool_]:
        """(12,) bool: which of `ACTIONS` it does in the clip, the keyframe's surroundings."""
        done = {action.name for action in self.actions}
        return np.array([name in done for name in ACTIONS])


@dataclass(frozen=True, eq=False)
class Clip:
    """A moving scene and its ground truth.

    `frames` (T, H, W, 3) uint8 RGB; `owner` (T, H, W) int8 is the identity of the actor seen at a pixel, -1 for
    background. `keyframe` is the frame whose contents say nothing about the actions of the actors in it.
    `events`, `caption` and `questions` are worked out when first read; they depend on (split, seed, index) only.
    """

    split: str
    seed: int
    index: int
    frames: NDArray[np.uint8]
    owner: NDArray[np.int8]
    actors: tuple[Actor, ...]
    keyframe: int
    layout: ClipLayout

    @functools.cached_property
    def events(self) -> tuple[Event, ...]:
        """All actions of all actors, those that start first first."""
        found = [Event(a.start, a.end, actor.identity, a.name) for actor in self.actors for a in actor.actions]
        return tuple(sorted(found, key=lambda e: (e.start, e.end, e.actor, ACTIONS.index(e.action))))

    @functools.cached_property
    def caption(self) -> str:
        """E.g. "the dog stands still and the car moves left , then the fox enters ." by the third of each start."""
        return caption_of(self)

    @functools.cached_property
    def questions(self) -> tuple[Question, ...]:
        """Questions with one-word answers, of `CLIP_QUESTION_TYPES`: every type that this clip allows."""
        return tuple(clip_questions(self, generator(self.split, self.seed, self.index, stream=4)))

    def flow(self) -> Flow:
        """Forward flow of the visible surface, exact; see `Flow`."""
        return flow_of(self.layout, self.owner)


class Clips:
    """A sequence of clips addressed by index; `clips[i]` depends on (split, seed, i, frames, size, actors) only.

    Args:
        split: "train", "validation" or "test"; they differ in random streams and in photographs.
        seed: any integer >= 0.
        frames: 8..64.
        size: side of the square frames in px, 48..1024; actors grow with it.
        actors: least and greatest number of actors, 1 <= least <= greatest <= 4.
        length: what `len` reports; any index >= 0 is valid all the same.

    Raises:
        ValueError: for an unknown split or a number out of range.
    """

    def __init__(
        self,
        split: str,
        seed: int = 0,
        *,
        frames: int = 16,
        size: int = BASE_SIZE,
        actors: tuple[int, int] = (1, 4),
        length: int = 10_000,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, not {seed}")
        if not 8 <= frames <= 64:
            raise ValueError(f"frames must be 8..64, not {frames}")
        if not 48 <= size <= 1024:
            raise ValueError(f"size must be 48..1024 px, not {size}")
        if not 1 <= actors[0] <= actors[1] <= 4:
            raise ValueError(f"actors must be (least, greatest) within 1..4, not {actors}")
        if length < 0:
            raise ValueError(f"length must be >= 0, not {length}")
        self.split, self.seed, self.frames, self.size = split, seed, frames, size
        self.actors, self.length = actors, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Clip:
        layout = self.layout(index)
        frames, owner, present = compose_clip(layout)
        actors = tuple(
            Actor(
                i, track.name, CATEGORY_OF[track.name], _boxes(owner, i), present[i], _dated(track, present[i]),
                track, owner,
            )
            for i, track in enumerate(layout.tracks)
        )  # fmt: skip
        return Clip(self.split, self.seed, index, frames, owner, actors, self.frames // 2, layout)

    def __iter__(self) -> Iterator[Clip]:
        return (self[index] for index in range(self.length))

    def layout(self, index: int) -> ClipLayout:
        """What clip `index` shows, without painting it (some 20 times faster than the clip)."""
        if index < 0:
            raise IndexError(f"clip index must be >= 0, not {index}")
        rng = generator(self.split, self.seed, index, stream=3)
        return sample_clip_layout(rng, self.split, size=self.size, frames=self.frames, actors=self.actors)


def compose_clip(layout: ClipLayout) -> tuple[NDArray[np.uint8], NDArray[np.int8], NDArray[np.bool_]]:
    """Paints a layout.

    Returns the frames (T, H, W, 3) uint8; the owner (T, H, W) int8 of each pixel, the last track that is at least half
    opaque there, -1 for background; and (tracks, T) bool, whether some such pixel of a track lies within the picture,
    hidden or not.
    """
    frames = _paint_views(layout.background, layout.views, layout.size)
    count, size = len(frames), layout.size
    owner = np.full((count, size, size), -1, dtype=np.int8)
    present = np.zeros((len(layout.tracks), count), dtype=bool)
    for i, track in enumerate(layout.tracks):
        # One texture a clip, chosen by the keyframe: its sharpness there must not tell that the actor grows.
        picture, side, margin = texture(track.name, float(track.side[count // 2]))
        scale = side / track.side
        cos, sin = np.cos(np.radians(track.angle)), np.sin(np.radians(track.angle))
        half = (track.side / 2 * (np.abs(cos) + np.abs(sin)))[:, None] + 1
        low = np.clip(np.floor(track.centre - half), 0, size).astype(int)
        high = np.clip(np.ceil(track.centre + half), 0, size).astype(int)
        for t in range(count):
            (x1, y1), (x2, y2) = low[t].tolist(), high[t].tolist()
            if x1 >= x2 or y1 >= y2:
                continue
            a, b = float(cos[t] * scale[t]), float(sin[t] * scale[t])
            dx, dy = (low[t] - track.centre[t]).tolist()
            centre = side / 2 + margin
            matrix = (a, b, a * dx + b * dy + centre, -b, a, a * dy - b * dx + centre)
            moved = picture.transform((x2 - x1, y2 - y1), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
            pixels = np.asarray(moved).astype(np.uint16)
            alpha = pixels[..., 3]
            patch = frames[t, y1:y2, x1:x2]
            through = (patch * (255 - alpha)[..., None] + 127) // 255
            np.minimum(through + pixels[..., :3], 255, out=patch, casting="unsafe")
            solid = alpha >= 128
            present[i, t] = solid.any()
            owner[t, y1:y2, x1:x2][solid] = i
    return frames, owner, present


def flow_of(layout: ClipLayout, owner: NDArray[np.int8]) -> Flow:
    """Exact forward flow of a layout; `owner` (T, H, W) as of `compose_clip`. See `Flow`.

    Every surface moves by a similarity p' = A p + b, A = (c, -s; s, c), from a frame to the next: the background by the
    change of the view, an actor by the change of its centre, side and angle. A pixel takes the one of its owner.
    """
    count, size = len(owner), layout.size
    c, s = np.zeros((2, count - 1, len(layout.tracks) + 1))
    b = np.zeros((count - 1, len(layout.tracks) + 1, 2))
    # Owner -1, the background, is the last entry.
    centre, side = layout.views[:, :2], layout.views[:, 2]
    c[:, -1] = side[:-1] / side[1:]
    shift = (centre[:-1] - centre[1:]) / side[1:, None] + 0.5 - 0.5 * c[:, -1:]
    b[:, -1] = size * shift
    for i, track in enumerate(layout.tracks):
        turn = np.radians(np.diff(track.angle))
        growth = track.side[1:] / track.side[:-1]
        c[:, i], s[:, i] = growth * np.cos(turn), growth * np.sin(turn)
        x, y = track.centre[:-1].T
        b[:, i] = track.centre[1:] - np.stack([c[:, i] * x - s[:, i] * y, s[:, i] * x + c[:, i] * y], axis=1)
    pair = np.arange(count - 1)[:, None, None]
    here = owner[:-1]
    c, s, shifts = c[pair, here], s[pair, here], b[pair, here]
    y, x = np.mgrid[:size, :size] + 0.5
    to_x, to_y = c * x - s * y + shifts[..., 0], s * x + c * y + shifts[..., 1]
    column, row = np.floor(to_x).astype(int), np.floor(to_y).astype(int)
    inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    there = owner[pair + 1, np.clip(row, 0, size - 1), np.clip(column, 0, size - 1)]
    return Flow(np.stack([to_x - x, to_y - y], axis=-1).astype(np.float32), inside & (there == here))


def _paint_views(background: Background, views: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """(T, size, size, 3): what the camera sees of the photograph in each frame."""
    left, upper, right, lower = background.box
    part = Image.fromarray(photograph_pixels(background.photograph)[upper:lower, left:right])
    if background.mirrored:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # First to the scale of the closest view, so that a frame is not made from more pixels than it can show.
    scale = min(1.0, size / float(views[:, 2].min()))
    width, height = max(1, round(part.width * scale)), max(1, round(part.height * scale))
    resized = part.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    canvas = Image.fromarray(toned(np.asarray(resized, dtype=np.float32), background))
    by_axis = np.array([width / part.width, height / part.height])
    low = np.maximum((views[:, :2] - views[:, 2:] / 2) * by_axis, 0)
    high = np.minimum((views[:, :2] + views[:, 2:] / 2) * by_axis, [width, height])
    frames = np.empty((len(views), size, size, 3), dtype=np.uint8)
    for t in range(len(views)):
        box = (*low[t].tolist(), *high[t].tolist())
        frames[t] = np.asarray(canvas.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return frames


def _boxes(owner: NDArray[np.int8], identity: int) -> NDArray[np.float32]:
    """(T, 4) around the pixels of `identity` in (T, H, W), zero where there are none."""
    masks = np.equal(owner, identity)
    columns, rows = np.any(masks, axis=1), np.any(masks, axis=2)
    bounds = [columns.argmax(1), rows.argmax(1)]
    bounds += [columns.shape[1] - columns[:, ::-1].argmax(1), rows.shape[1] - rows[:, ::-1].argmax(1)]
    return (np.stack(bounds, axis=1) * rows.any(1)[:, None]).astype(np.float32)


def _dated(track: Track, present: NDArray[np.bool_]) -> tuple[Action, ...]:
    """The track's actions, with "enter" and "leave" dated by the first and the last frame that shows the actor."""
    first, last = int(present.argmax()), len(present) - 1 - int(present[::-1].argmax())
    dated = []
    for action in track.actions:
        if action.name == "enter":
            action = replace(action, start=first)
        elif action.name == "leave":
            action = replace(action, end=last)
        dated.append(action)
    return tuple(dated)
