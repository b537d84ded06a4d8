"""Clips, step one: what the camera and every actor do (`sample_clip_layout`); nothing is painted here.

A frame must not give an action away. So the keyframe is drawn first: who is in it, where, how large, at what angle.
What happens is drawn second, without looking at the keyframe, and runs from there in both directions of time. Only
what an action leaves open (speed, exact heading, the edge that an actor comes from) may depend on where the actors are.

Lengths are in sides of the picture while a layout is drawn and in px in the finished layout. Positions are continuous:
the picture spans [0, size], pixel (x, y) has its centre at (x + 0.5, y + 0.5). Angles are in degrees, clockwise.
Motions are relative to the picture, not to the photograph, over which the camera moves independently.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from foveate.data.scenes.pictures import Background
from foveate.data.scenes.sprites import NAMES, PHOTOGRAPHS, photograph_pixels

Floats = NDArray[np.float64]

ACTIONS: tuple[str, ...] = (
    "move left", "move right", "move up", "move down", "grow", "shrink", "shake", "turn", "follow", "enter", "leave",
    "stand still",
)  # fmt: skip
"""What an actor can do in a clip; class c of `Actor.labels` is `ACTIONS[c]`."""

_HEADINGS = {"move right": 0.0, "move down": 90.0, "move left": 180.0, "move up": 270.0}

# What an actor that the keyframe shows does with its place, and how often; "pass" enters and leaves.
_MAIN = {"rest": 0.25, **dict.fromkeys(_HEADINGS, 0.09), "shake": 0.12, "enter": 0.11, "leave": 0.11, "pass": 0.05}
_FOLLOW = 0.16  # share of the actors that follow another, where the keyframe shows two or more
_OFF_KEYFRAME = 0.34  # share of the actors after the first that come after the keyframe or are gone before it
_TWIN = 0.12  # share of the clips with two or more actors in which two have the same name

_SIDES = (0.22, 0.36)  # of an emoji's square in the keyframe
_CENTRES = (0.19, 0.81)
_TILT = 30.0  # greatest angle in the keyframe, to either side
_APART = 0.29  # least distance of two centres in the keyframe

# Rates per 1/15 of the clip: a frame of a clip of 16.
_SPEED = (0.0145, 0.033)  # of a mover
_SPEED_OF_LEADER = (0.0145, 0.0165)  # slow enough that its follower does not run into it
_SPEED_OF_FOLLOWER = (0.0145, 0.018)
_GROWTH = (0.035, 0.06)  # of the logarithm of the side
_TURN = (7.0, 14.0)  # degrees
_PAN = (0.003, 0.02)
_ZOOM = (-0.018, 0.018)  # of the logarithm of the view's side
_SHAKE = (0.03, 0.045)  # amplitude
_SHAKE_PERIOD = (3.0, 5.0)  # frames


@dataclass(frozen=True)
class Action:
    """`name` of `ACTIONS`, under way from frame `start` to frame `end`.

    The change happens between these two frames: until `start` all is as before, from `end` on as after. Of "enter",
    `start` is the first frame that shows the actor, of "leave", `end` is the last one. `target` is the identity of the
    actor that is followed, None for other actions.
    """

    name: str
    start: int
    end: int
    target: int | None = None


@dataclass(frozen=True, eq=False)
class Track:
    """Where an actor is in each of T frames, in the picture or not.

    `centre` (T, 2) px, `side` (T,) px of the emoji's square, `angle` (T,) degrees, clockwise. `actions` are as planned:
    "enter" starts in the last frame before the actor reaches the picture's edge, "leave" ends in the first frame after.
    """

    name: str
    centre: Floats
    side: Floats
    angle: Floats
    actions: tuple[Action, ...]


@dataclass(frozen=True, eq=False)
class ClipLayout:
    """All that `compose_clip` needs; later tracks are in front of earlier ones.

    `background.box` is the part of the photograph that the camera sees in the course of the clip; `views` (T, 3) are
    centre x, centre y and side of each frame's square view, in px of that part (after mirroring).
    """

    background: Background
    views: Floats
    tracks: tuple[Track, ...]
    size: int


@dataclass(frozen=True)
class _Role:
    """What an actor is to do with its place: a key of `_MAIN`, "follow" its `target`, or, if it is not in the keyframe,
    come "late" or be gone "early". `extras` ("grow", "shrink", "turn") are what it does besides.
    """

    main: str
    extras: tuple[str, ...] = ()
    target: int | None = None


def sample_clip_layout(
    rng: np.random.Generator, split: str, *, size: int = 96, frames: int = 16, actors: tuple[int, int] = (1, 4)
) -> ClipLayout:
    """Draws camera, keyframe and actions of a clip; the keyframe is frame `frames // 2`.

    `actors` are the least and the greatest number of actors; where they find no room it may be fewer, never none.
    """
    background, views = _sample_camera(rng, split, frames)
    names, centres, sides, angles, shown = _sample_keyframe(rng, int(rng.integers(actors[0], actors[1] + 1)))
    roles = _sample_roles(rng, shown)
    clock = _Clock(frames)
    tracks: list[Track | None] = [None] * len(names)
    # Those who follow come last: their way depends on whom they follow.
    for i in sorted(range(len(names)), key=lambda i: roles[i].target is not None):
        state = _State(names[i], centres[i], float(sides[i]), float(angles[i]))
        if roles[i].target is None:
            others = [centres[j] for j in range(len(names)) if j != i and shown[j]]
            led = any(role.target == i for role in roles)
            tracks[i] = _move(rng, state, roles[i], clock, others, _SPEED_OF_LEADER if led else _SPEED)
        else:
            leader = tracks[roles[i].target or 0]
            assert leader is not None
            tracks[i] = _follow(rng, state, roles[i], clock, leader)
    return ClipLayout(background, views, tuple(_in_pixels(track, size) for track in tracks if track), size)


# ---------------------------------------------------------------------------------------------------------------------
# The keyframe, and what is to happen


def _sample_keyframe(
    rng: np.random.Generator, count: int
) -> tuple[list[str], Floats, Floats, Floats, NDArray[np.bool_]]:
    """Names, centres, sides, angles of up to `count` actors, and whether the keyframe shows them.

    They come with the largest first, which is painted first: no actor hides a smaller one. An actor that is not in the
    keyframe has the state of its own first or last frame.
    """
    names = [str(name) for name in rng.choice(NAMES, size=count, replace=False)]
    if count >= 2 and rng.random() < _TWIN:
        names[1] = names[0]
    sides = np.sort(rng.uniform(*_SIDES, size=count))[::-1]
    shown = rng.random(count) >= _OFF_KEYFRAME
    shown[int(rng.integers(count))] = True
    angles = rng.uniform(-_TILT, _TILT, size=count)
    centres: list[Floats] = []
    for i in range(count):
        for _ in range(100):
            centre = rng.uniform(*_CENTRES, size=2)
            rivals = [(c, sides[j]) for j, c in enumerate(centres) if shown[i] and shown[j]]
            if all(np.hypot(*(centre - c)) >= max(_APART, 0.42 * (sides[i] + s)) for c, s in rivals):
                break
        else:
            break
        centres.append(centre)
    n = len(centres)
    return [names[k] for k in rng.permutation(count)[:n]], np.array(centres), sides[:n], angles[:n], shown[:n]


def _sample_roles(rng: np.random.Generator, shown: NDArray[np.bool_]) -> list[_Role]:
    """What every actor does; depends on nothing but who is in the keyframe (one alone cannot follow)."""
    roles = []
    for seen in shown:
        if not seen:
            roles.append(_Role("late" if rng.random() < 0.5 else "early"))
            continue
        main = str(rng.choice(list(_MAIN), p=list(_MAIN.values())))
        extras: tuple[str, ...] = ()
        if rng.random() < (0.5 if main == "rest" else 0.4):
            extras = (str(rng.choice(["grow", "shrink", "turn"])),)
            if rng.random() < 0.25:
                extras = ("turn", "grow" if rng.random() < 0.5 else "shrink")
        roles.append(_Role(main, extras))
    candidates = np.flatnonzero(shown)
    # In proportion to their number, so that it does not tell how likely it is that one of two or more follows.
    if len(candidates) >= 2 and rng.random() < _FOLLOW * len(candidates):
        leader, follower = (int(i) for i in rng.permutation(candidates)[:2])
        roles[leader] = replace(roles[leader], main=str(rng.choice(list(_HEADINGS))))
        roles[follower] = replace(roles[follower], main="follow", target=leader)
    return roles


# ---------------------------------------------------------------------------------------------------------------------
# Tracks


class _Clock:
    """Frames of a clip of `frames`; `unit` is 1/15 of the clip, in frames."""

    def __init__(self, frames: int) -> None:
        self.frames, self.key, self.last = frames, frames // 2, frames - 1
        self.unit = self.last / 15
        self.t = np.arange(frames, dtype=np.float64)

    def interval(self, rng: np.random.Generator) -> tuple[int, int]:
        """Start and end of an action that is under way in the keyframe: it takes at least 60 % of the clip."""
        margin = round(0.2 * self.last)
        return int(rng.integers(0, margin + 1)), self.last - int(rng.integers(0, margin + 1))

    def since_key(self, start: int, end: int) -> Floats:
        """(T,) how long an action has been under way since the keyframe, in units; negative before it."""
        return (np.clip(self.t, start, end) - self.key) / self.unit


@dataclass(frozen=True, eq=False)
class _State:
    name: str
    centre: Floats
    side: float
    angle: float


def _move(
    rng: np.random.Generator,
    state: _State,
    role: _Role,
    clock: _Clock,
    others: list[Floats],
    speeds: tuple[float, float],
) -> Track:
    """The track of an actor that does not follow; lengths in sides of the picture."""
    side, angle, actions = _in_place(rng, state, role, clock)
    centre = np.tile(state.centre, (clock.frames, 1))
    if role.main in _HEADINGS:
        start, end = clock.interval(rng)
        since = clock.since_key(start, end)
        direction = _heading(rng, _HEADINGS[role.main], state.centre, others)
        room = np.where(direction > 0, 0.96 - state.centre, state.centre - 0.04) / since[-1]
        behind = np.where(direction > 0, state.centre - 0.04, 0.96 - state.centre) / -since[0]
        greatest = float((np.minimum(room, behind) / np.maximum(np.abs(direction), 1e-9)).min())
        speed = rng.uniform(speeds[0], max(speeds[0], min(speeds[1], greatest)))
        centre += speed * since[:, None] * direction
        actions.append(Action(role.main, start, end))
    elif role.main == "shake":
        start, end = clock.interval(rng)
        phase = rng.uniform(0, 2 * np.pi)
        swing = np.sin(2 * np.pi * (np.clip(clock.t, start, end) - clock.key) / rng.uniform(*_SHAKE_PERIOD) + phase)
        axis = rng.uniform(0, np.pi)
        centre += rng.uniform(*_SHAKE) * (swing - np.sin(phase))[:, None] * [np.cos(axis), np.sin(axis)]
        actions.append(Action("shake", start, end))
    reach = 0.75 * float(side.max())  # more than half the diagonal: at any angle the actor is wholly outside
    key, last = clock.key, clock.last
    if role.main in ("enter", "pass"):
        out, there = int(rng.integers(0, max(1, key // 2))), key - int(rng.integers(0, 2))
        _come(centre, _outside(rng, state.centre, reach), out, there)
        actions.append(Action("enter", out, there))
    elif role.main == "late":
        # Half of them at once, so that something happens in the middle of clips too.
        out = key if rng.random() < 0.5 else int(rng.integers(key, last - max(2, round(4 * clock.unit)) + 1))
        there = min(last, out + max(2, round(rng.uniform(4, 7) * clock.unit)))
        _come(centre, _outside(rng, state.centre, reach), out, there)
        actions.append(Action("enter", out, there))
    if role.main in ("leave", "pass"):
        gone, off = last - int(rng.integers(0, max(1, (last - key) // 2))), key + int(rng.integers(0, 2))
        _come(centre[::-1], _outside(rng, state.centre, reach), last - gone, last - off)
        actions.append(Action("leave", off, gone))
    elif role.main == "early":
        gone = key if rng.random() < 0.5 else int(rng.integers(max(2, round(4 * clock.unit)), key + 1))
        off = max(0, gone - max(2, round(rng.uniform(4, 7) * clock.unit)))
        _come(centre[::-1], _outside(rng, state.centre, reach), last - gone, last - off)
        actions.append(Action("leave", off, gone))
    return Track(state.name, centre, side, angle, tuple(actions) or (Action("stand still", 0, last),))


def _follow(rng: np.random.Generator, state: _State, role: _Role, clock: _Clock, leader: Track) -> Track:
    """The track of an actor that heads for `leader` in every frame: pure pursuit, in both directions of time."""
    side, angle, actions = _in_place(rng, state, role, clock)
    start, end = clock.interval(rng)
    speed = rng.uniform(*_SPEED_OF_FOLLOWER) / clock.unit
    centre = np.tile(state.centre, (clock.frames, 1))
    for t in range(clock.key, end):
        centre[t + 1] = centre[t] + speed * _unit(leader.centre[t] - centre[t])
    centre[end:] = centre[end]
    for t in range(clock.key - 1, start - 1, -1):
        # Where it was so that a step towards the leader's place of then brought it here: on the line through both.
        centre[t] = centre[t + 1] - speed * _unit(leader.centre[t] - centre[t + 1])
    centre[:start] = centre[start]
    actions.append(Action("follow", start, end, role.target))
    return Track(state.name, centre, side, angle, tuple(actions))


def _in_place(
    rng: np.random.Generator, state: _State, role: _Role, clock: _Clock
) -> tuple[Floats, Floats, list[Action]]:
    """Sides and angles of every frame, and the actions that change them."""
    side, angle = np.full(clock.frames, state.side), np.full(clock.frames, state.angle)
    actions = []
    for extra in role.extras:
        start, end = clock.interval(rng)
        since = clock.since_key(start, end)
        if extra == "turn":
            angle += (1 if rng.random() < 0.5 else -1) * rng.uniform(*_TURN) * since
        else:
            side *= np.exp((1 if extra == "grow" else -1) * rng.uniform(*_GROWTH) * since)
        actions.append(Action(extra, start, end))
    return side, angle, actions


def _heading(rng: np.random.Generator, degrees: float, centre: Floats, others: list[Floats]) -> Floats:
    """Unit vector within 22 degrees of `degrees` that points well past the others: who moves does not follow."""
    bearings = np.array([np.degrees(np.arctan2(*(other - centre)[::-1])) for other in others])
    best, clearest = degrees, -1.0
    for candidate in degrees + rng.uniform(-22, 22, size=16):
        clearance = float(np.abs((bearings - candidate + 180) % 360 - 180).min()) if len(bearings) else 180.0
        if clearance > clearest:
            best, clearest = float(candidate), clearance
        if clearest >= 18:
            break
    return np.array([np.cos(np.radians(best)), np.sin(np.radians(best))])


def _outside(rng: np.random.Generator, centre: Floats, reach: float) -> Floats:
    """A place wholly outside, beyond the nearest edge or (three in ten) the second nearest."""
    distances = [centre[0], 1 - centre[0], centre[1], 1 - centre[1]]
    edge = int(np.argsort(distances)[int(rng.random() < 0.3)])
    place = centre + rng.uniform(-0.12, 0.12, size=2)
    place[edge // 2] = 1 + reach if edge % 2 else -reach
    return place


def _come(centre: Floats, outside: Floats, out: int, there: int) -> None:
    """Moves the frames before `there` to the straight way from `outside`, which is left after frame `out`."""
    share = np.clip((np.arange(len(centre)) - out) / (there - out), 0, 1)[:there, None]
    centre[:there] = outside + share * (centre[there] - outside)


def _unit(vector: Floats) -> Floats:
    return vector / max(float(np.hypot(*vector)), 1e-9)


def _in_pixels(track: Track, size: int) -> Track:
    return replace(track, centre=track.centre * size, side=track.side * size)


# ---------------------------------------------------------------------------------------------------------------------
# Camera


def _sample_camera(rng: np.random.Generator, split: str, frames: int) -> tuple[Background, Floats]:
    """A part of a photograph and the view of every frame in it: at rest (one in five), pan, zoom, or both."""
    clock = _Clock(frames)
    since = (clock.t - clock.key) / clock.unit
    mode = rng.random()
    heading = rng.uniform(0, 2 * np.pi)
    pan = rng.uniform(*_PAN) * np.array([np.cos(heading), np.sin(heading)]) * (0.2 <= mode < 0.85)
    zoom = rng.uniform(*_ZOOM) * (mode >= 0.5)
    centres, sides = since[:, None] * pan, np.exp(zoom * since)
    least = (centres - sides[:, None] / 2).min(0)
    span = (centres + sides[:, None] / 2).max(0) - least
    photograph = str(rng.choice(PHOTOGRAPHS[split]))
    height, width = photograph_pixels(photograph).shape[:2]
    greatest = min(width / span[0], height / span[1])
    side = rng.uniform(min(96.0, greatest), greatest)
    corner = rng.uniform(0, 1, size=2) * np.maximum([width, height] - side * span, 0)
    left, upper = (int(v) for v in np.floor(corner))
    right, lower = (int(v) for v in np.minimum(np.ceil(corner + side * span), [width, height]))
    background = Background(
        photograph,
        (left, upper, right, lower),
        mirrored=bool(rng.random() < 0.5),
        brightness=float(rng.uniform(-25, 25)),
        contrast=float(rng.uniform(0.7, 1.15)),
    )
    views = np.concatenate([corner - [left, upper] + side * (centres - least), side * sides[:, None]], axis=1)
    return background, views
