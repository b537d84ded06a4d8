"""Corrupted pictures: repeatable, stronger with strength, and nobody else's random numbers are touched."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("imagecorruptions")

from foveate.data.corruptions import CORRUPTIONS, STRENGTHS, corrupted
from foveate.data.scenes import Scenes
from foveate.method import InputError


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_repeatable_and_different(corruption: str) -> None:
    image = Scenes("test", 0)[2].image
    before = image.copy()
    made = {}
    for strength in STRENGTHS:
        np.random.seed(strength)  # Whatever is drawn elsewhere.
        made[strength] = corrupted(image, corruption, strength, seed=4)
        assert made[strength].shape == image.shape and made[strength].dtype == np.uint8
    np.random.seed(99)
    drawn = np.random.rand()
    np.random.seed(99)
    again = corrupted(image, corruption, 3, seed=4)
    assert np.random.rand() == drawn, "numpy's own stream goes on as if nothing had been drawn"
    assert np.array_equal(again, made[3]) and np.array_equal(image, before)
    assert len({one.tobytes() for one in made.values()}) == 5


@pytest.mark.parametrize("corruption", ["gaussian_noise", "shot_noise", "defocus_blur", "contrast", "jpeg_compression"])
def test_stronger_is_further_away(corruption: str) -> None:
    image = Scenes("test", 0)[5].image
    distance = [np.abs(corrupted(image, corruption, s).astype(float) - image).mean() for s in STRENGTHS]
    assert distance == sorted(distance) and distance[0] > 0


def test_bad_input() -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    with pytest.raises(InputError, match="corruption must be one of"):
        corrupted(image, "glass_blur", 1)
    with pytest.raises(InputError, match=r"1\.\.5"):
        corrupted(image, "fog", 6)
    for wrong in (image[:20], image.astype(float), image[..., 0]):
        with pytest.raises(InputError, match="at least 32 px"):
            corrupted(wrong, "fog", 1)
