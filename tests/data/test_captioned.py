"""Captioned scenes: every word of a caption is true of the picture, and the pictures are what generators can learn."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest

from foveate.data.scenes import GROUNDS, NAMES, PHOTOGRAPHS, CaptionedScenes, Scenes, caption_words


def test_captions_are_true() -> None:
    """Read word by word against masks and pixels."""
    kinds: collections.Counter[str] = collections.Counter()
    words = set(caption_words())
    for one in CaptionedScenes("test", 3, length=200):
        scene, said = one.scene, one.caption.split()
        assert set(said) <= words
        assert one.names == tuple(word for word in said if word in NAMES) == tuple(o.name for o in scene.objects)
        assert len(set(one.names)) == len(one.names) in (1, 2)
        for article, name in itertools.pairwise(said):
            if name in NAMES:
                assert article == ("an" if name[0] in "aeiou" else "a")
        ground = scene.layout.background.photograph
        outside = ~np.logical_or.reduce([thing.mask for thing in scene.objects])
        if ground in GROUNDS:
            usual = np.median(scene.image[outside], axis=0)
            assert min(GROUNDS, key=lambda g: float(np.abs(usual - GROUNDS[g]).sum())) == ground
        else:
            assert ground in PHOTOGRAPHS["test"]
        if "on" in said:
            assert said[-1] == ground
        if "at" in said:
            ys, xs = np.nonzero(scene.objects[0].mask)
            column, row = (int(3 * (v.min() + v.max() + 1) / 2 / 64) for v in (xs, ys))
            words_of = [w for w in (("top", "", "bottom")[row], ("left", "", "right")[column]) if w] or ["center"]
            stop = said.index("on") if "on" in said else len(said)
            assert said[said.index("the") + 1 : stop] == words_of
        kinds.update([f"{len(one.names)} objects", "plain" if ground in GROUNDS else "photograph"])
        kinds.update(word for word in ("at", "on") if word in said)
    assert min(kinds.values()) >= 20, kinds


def test_addressed_by_index_split_and_seed() -> None:
    first = CaptionedScenes("train", 5)[11]
    again = CaptionedScenes("train", 5)[11]
    assert first.caption == again.caption
    assert np.array_equal(first.scene.image, again.scene.image)
    for other in (CaptionedScenes("train", 6)[11], CaptionedScenes("train", 5)[12], CaptionedScenes("test", 5)[11]):
        assert not np.array_equal(first.scene.image, other.scene.image)
    assert not np.array_equal(first.scene.image, Scenes("train", 5, size=64)[11].image)


def test_nonsense_is_rejected() -> None:
    with pytest.raises(ValueError, match="split"):
        CaptionedScenes("dev")
    with pytest.raises(ValueError, match="size"):
        CaptionedScenes("train", size=16)
    with pytest.raises(IndexError, match="index"):
        CaptionedScenes("train")[-1]
