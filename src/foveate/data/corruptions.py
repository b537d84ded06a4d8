"""Corrupted pictures: the corruptions of ImageNet-C (Hendrycks and Dietterich, 2019), each in five strengths.

They are those of the package `imagecorruptions-imaug`, an optional extra: pip install 'foveate[corruptions]'.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from foveate.method import InputError, choice

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "defocus_blur", "motion_blur", "zoom_blur", "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""13 of ImageNet-C's 15: the package draws random numbers of glass blur and impulse noise that cannot be seeded."""
STRENGTHS = (1, 2, 3, 4, 5)


def corrupted(image: NDArray[np.uint8], corruption: str, strength: int, seed: int = 0) -> NDArray[np.uint8]:
    """A picture (H, W, 3) uint8 RGB, H and W >= 32 px, with a corruption; the same for the same arguments.

    Raises:
        InputError: for an unknown corruption or strength, another kind of picture, or if the package is not installed.
    """
    choice("corruption", corruption, CORRUPTIONS)
    if strength not in STRENGTHS:
        raise InputError(f"strength must be one of 1..5, not {strength!r}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 32:
        raise InputError(f"pictures must be (H, W, 3) uint8, at least 32 px, not {image.shape} {image.dtype}")
    try:
        from imagecorruptions import corrupt
    except ImportError:
        raise InputError("corruptions need imagecorruptions-imaug: pip install 'foveate[corruptions]'") from None
    # The package uses numpy's global random numbers, which are no one else's business.
    state = np.random.get_state()
    try:
        np.random.seed(seed)
        made: NDArray[np.uint8] = corrupt(np.ascontiguousarray(image), corruption_name=corruption, severity=strength)
    finally:
        np.random.set_state(state)
    return made
