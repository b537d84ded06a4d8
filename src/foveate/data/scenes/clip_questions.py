"""Questions about a clip, with one-word answers, its caption, and the vocabulary of both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from foveate.data.scenes.questions import NUMBERS, Question, words

if TYPE_CHECKING:
    from foveate.data.scenes.clips import Actor, Clip

CLIP_QUESTION_TYPES: tuple[str, ...] = (
    "what", "action", "direction", "follow", "where", "when", "order", "count",
)  # fmt: skip

VERBS: dict[str, str] = {
    "move left": "moves left", "move right": "moves right", "move up": "moves up", "move down": "moves down",
    "grow": "grows", "shrink": "shrinks", "shake": "shakes", "turn": "turns", "follow": "follows", "enter": "enters",
    "leave": "leaves", "stand still": "stands still",
}  # fmt: skip
"""action -> what a question or a caption says of an actor that does it."""

PLACES: tuple[str, ...] = ("left", "right", "top", "bottom", "center", "outside")
TIMES: tuple[str, ...] = ("beginning", "middle", "end")

# Those that carry an actor from one place to another.
_TRAVELS = frozenset({"move left", "move right", "move up", "move down", "follow", "enter", "leave"})
_GRAMMAR_WORDS = (
    "what does the do ? which way move is at when enter leave comes first , or how many objects stand still are there "
    "and then . follow stands"
)


def clip_words() -> list[str]:
    """All words of the pictures (`words()`) and of the questions, answers and captions of clips, sorted."""
    spoken = (word for verb in VERBS.values() for word in verb.split())
    return sorted({*words(), *_GRAMMAR_WORDS.split(), *spoken, *PLACES, *TIMES})


def caption_of(clip: Clip) -> str:
    """What every actor does, by the third of the clip in which it starts to; "then" where a later third begins.

    Within a third the actors come in the order of their identities: who starts a frame earlier can hardly be seen.
    """
    phrases: list[list[str]] = [[], [], []]
    for actor in clip.actors:
        for action in actor.actions:
            whom = "" if action.target is None else f" the {clip.actors[action.target].name}"
            third = 3 * action.start // len(clip.frames)
            phrases[third].append(f"the {actor.name} {VERBS[action.name]}{whom}")
    return " , then ".join(" and ".join(third) for third in phrases if third) + " ."


def place_of(actor: Actor, frame: int, size: int) -> str | None:
    """One of `PLACES`, or None where that is not clear.

    Center: within a sixth of the picture of its centre along both axes. Left, right, top, bottom: at least a fifth
    away along one axis, and 1.6 times as far as along the other. Outside: no part of it in the picture.
    """
    if not actor.present[frame]:
        return "outside"
    x, y = (float(v) / size - 0.5 for v in actor.track.centre[frame])
    far, near = max(abs(x), abs(y)), min(abs(x), abs(y))
    if far > 0.5 or not actor.boxes[frame].any():
        return None
    if far <= 1 / 6:
        return "center"
    if far < 0.2 or far < 1.6 * near:
        return None
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "top" if y < 0 else "bottom"


def time_of(frame: int, frames: int) -> str | None:
    """The third of the clip in which a frame lies, or None within a frame of its border."""
    thirds = [int(3 * (frame + step) / frames) for step in (-1, 0, 1)]
    return TIMES[thirds[1]] if 0 <= frame < frames and len({min(max(t, 0), 2) for t in thirds}) == 1 else None


def clip_questions(clip: Clip, rng: np.random.Generator) -> Iterator[Question]:
    """The questions of `Clip.questions`, only such as have one right answer; a name in them is that of one actor."""
    actors, size, last = clip.actors, clip.frames.shape[1], len(clip.frames) - 1
    names = [actor.name for actor in actors]
    unique = [i for i, name in enumerate(names) if names.count(name) == 1]
    done = {verb: [i for i, a in enumerate(actors) if any(x.name == verb for x in a.actions)] for verb in VERBS}

    # what: the only one that does it, and no other that seems to
    single = [
        (verb, who[0])
        for verb, who in done.items()
        if len(who) == 1 and who[0] in unique and verb != "follow"
        if not any(_drifts(actor, verb, size) for i, actor in enumerate(actors) if i != who[0])
    ]
    for k in rng.permutation(len(single))[:3]:
        verb, i = single[int(k)]
        yield Question("what", f"what {VERBS[verb]} ?", names[i])

    # action: of those that do one thing; where they move to is another question
    quiet = [i for i in unique if len(actors[i].actions) == 1 and not actors[i].actions[0].name.startswith("move")]
    for k in rng.permutation(quiet)[:2]:
        verb = actors[int(k)].actions[0].name
        yield Question("action", f"what does the {names[int(k)]} do ?", VERBS[verb].split()[0])

    # direction
    for i in unique:
        for action in actors[i].actions:
            if action.name.startswith("move"):
                yield Question("direction", f"which way does the {names[i]} move ?", action.name.split()[1])

    # follow: who, and whom
    for i in done["follow"]:
        target = next(a.target for a in actors[i].actions if a.name == "follow")
        if i in unique and target in unique:
            if rng.random() < 0.5:
                yield Question("follow", f"what does the {names[i]} follow ?", names[target])
            else:
                yield Question("follow", f"what follows the {names[target]} ?", names[i])

    # where: at the beginning and at the end
    placed = [(i, frame) for i in unique for frame in (0, last)]
    asked = 0
    for k in rng.permutation(len(placed)):
        i, frame = placed[int(k)]
        place = place_of(actors[i], frame, size)
        if place is not None and asked < 2:
            yield Question("where", f"where is the {names[i]} at the {'end' if frame else 'beginning'} ?", place)
            asked += 1

    # when, and in which order: it is seen first, it is seen last
    moments = [(i, "enter", a.start) for i in unique for a in actors[i].actions if a.name == "enter"]
    moments += [(i, "leave", a.end) for i in unique for a in actors[i].actions if a.name == "leave"]
    for i, verb, frame in moments:
        time = time_of(frame, last + 1)
        if time is not None:
            yield Question("when", f"when does the {names[i]} {verb} ?", time)
    for a, b in ((a, b) for k, a in enumerate(moments) for b in moments[:k] if a[0] != b[0]):
        if abs(a[2] - b[2]) >= 2:
            one, other = (a, b) if rng.random() < 0.5 else (b, a)
            question = (
                f"what comes first , the {names[one[0]]} {VERBS[one[1]]} or the {names[other[0]]} {VERBS[other[1]]} ?"
            )
            yield Question("order", question, names[min(one, other, key=lambda moment: moment[2])[0]])

    # count: two of six
    travelling = sum(any(a.name in _TRAVELS for a in actor.actions) for actor in actors)
    counts = {
        "enter ?": len(done["enter"]),
        "leave ?": len(done["leave"]),
        "stand still ?": len(done["stand still"]),
        "move ?": travelling,
        "are there at the beginning ?": sum(bool(actor.present[0]) for actor in actors),
        "are there at the end ?": sum(bool(actor.present[last]) for actor in actors),
    }
    asked = 0
    for k in rng.permutation(len(counts)):
        rest, number = list(counts.items())[int(k)]
        # Most clips have none that enters, leaves or stands still: not each of them is asked about it.
        if asked < 2 and (number or rng.random() < 0.25):
            yield Question("count", f"how many objects {rest}", NUMBERS[number])
            asked += 1


def _drifts(actor: Actor, verb: str, size: int) -> bool:
    """Whether the actor is carried, while in the picture, in the direction of `verb` mainly, whatever it does."""
    if not verb.startswith("move") or not actor.present.any():
        return False
    seen = np.flatnonzero(actor.present)
    dx, dy = (actor.track.centre[seen[-1]] - actor.track.centre[seen[0]]) / size
    if max(abs(dx), abs(dy)) < 0.1:
        return False
    if abs(dx) > abs(dy):
        return verb == ("move left" if dx < 0 else "move right")
    return verb == ("move up" if dy < 0 else "move down")
