"""`CaptionedScenes`: scenes of one or two large objects with a short caption, what small generators are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from foveate.data.scenes.ground_truth import Scene, Scenes, region_of, scene_of
from foveate.data.scenes.pictures import GROUNDS, sample_layout
from foveate.data.scenes.questions import REGIONS, article
from foveate.data.scenes.sprites import NAMES, generator

SINGLE_SHARE = 0.75
"""Share of the scenes with one object; the others have two."""
PLAIN_SHARE = 0.6
"""Share of the scenes on a plain ground; the others are on a crop of a photograph."""
_PLACE_SHARE, _GROUND_SHARE = 0.25, 0.5  # shares of the captions that say place (of one object) or ground (if plain)
_SIDES = {1: (42, 56), 2: (32, 42)}  # px of the objects in a picture of 96 px, by their number


@dataclass(frozen=True)
class CaptionedScene:
    """A scene and what its caption says: `names` of the objects in the caption's order."""

    scene: Scene
    caption: str
    names: tuple[str, ...]


class CaptionedScenes:
    """A sequence of captioned scenes addressed by index; an item depends on (split, seed, index, size) only.

    Captions: "a dog", "a dog and an apple", with " at the top left" for the place of a single object, with " on gray"
    for a plain ground. A caption need not say all that is known.

    Args:
        split: "train", "validation" or "test", as for `Scenes`.
        seed: any integer >= 0.
        size: side of the square pictures in px, 48 to 2048.
        length: what `len` reports; any index >= 0 is valid all the same.

    Raises:
        ValueError: for an unknown split or a number out of range.
    """

    def __init__(self, split: str, seed: int = 0, *, size: int = 64, length: int = 10_000) -> None:
        Scenes(split, seed, size=size, length=length)  # the same limits
        self.split, self.seed, self.size, self.length = split, seed, size, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> CaptionedScene:
        if index < 0:
            raise IndexError(f"scene index must be >= 0, not {index}")
        rng = generator(self.split, self.seed, index, stream=6)
        count = 1 if rng.random() < SINGLE_SHARE else 2
        plain = bool(rng.random() < PLAIN_SHARE)
        says_place, says_ground = rng.random() < _PLACE_SHARE, rng.random() < _GROUND_SHARE
        layout = sample_layout(
            rng, self.split, size=self.size, objects=(count, count), sides=_SIDES[count], plain=plain, copies=False
        )
        scene = scene_of(layout, self.size, self.split, self.seed, index)
        names = tuple(thing.name for thing in scene.objects)
        place = region_of(scene.objects[0].box, self.size) if len(names) == 1 and says_place else ""
        ground = layout.background.photograph if plain and says_ground else ""
        return CaptionedScene(scene, caption(*names, place=place, ground=ground), names)

    def __iter__(self) -> Iterator[CaptionedScene]:
        return (self[index] for index in range(self.length))


def caption(*names: str, place: str = "", ground: str = "") -> str:
    """E.g. "a dog and an apple", "a dog at the top left on gray"."""
    things = " and ".join(f"{article(name)} {name}" for name in names)
    return things + (f" at the {place}" if place else "") + (f" on {ground}" if ground else "")


def caption_words() -> list[str]:
    """All words that these captions can contain, sorted."""
    places = {word for region in REGIONS for word in region.split()}
    return sorted({"a", "an", "and", "at", "the", "on", *places, *NAMES, *GROUNDS})
