"""Motion capture: clips of a person's joints in 3-D, seen by made-up cameras as 2-D keypoints.

The clips are those of the package `pybullet`, an optional extra (pip install 'foveate[motion]'), or a folder of files
like them: JSON with "Frames", each a duration in s and the pose of DeepMimic's humanoid (root, then rotations of 12
joints), 44 numbers. Joints are Human3.6M's 17, see `foveate.nn.pose_lifting.BONES`; nose and top of the head are the
middle and the top of the humanoid's ball. Cameras, and the noise that stands for a detector, are this project's.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation, Slerp

from foveate.method import InputError, choice, whole, within
from foveate.nn.pose_lifting import LEFT, RIGHT

RATE = 50.0
"""Frames a second, Human3.6M's."""
FOCAL = 2.3
"""Of Human3.6M's cameras, where the picture reaches from -1 to 1."""

# Metres in the frame of the joint before: x forward, y up, z to the right.
_HIP, _KNEE, _ANKLE = (0, 0, 0.084887), (0, -0.421546, 0), (0, -0.40987, 0)
_CHEST, _NECK, _NOSE, _HEAD = (0, 0.236151, 0), (0, 0.223894, 0), (0, 0.175, 0), (0, 0.2775, 0)
_SHOULDER, _ELBOW, _WRIST = (-0.02405, 0.2435, 0.18311), (0, -0.274788, 0), (0, -0.258947, 0)

# Columns of a frame: where the quaternions (w, x, y, z) begin, and the hinges, in rad about z.
_TURNS = {
    "root": 4, "chest": 8, "neck": 12, "right hip": 16, "right shoulder": 25, "left hip": 30, "left shoulder": 39,
}  # fmt: skip
_HINGES = {"right knee": 20, "right elbow": 29, "left knee": 34, "left elbow": 43}
_COLUMNS = 44


def read_motion(file: Path, rate: float = RATE) -> NDArray[np.float32]:
    """(T, 17, 3) joints in metres, y up, `rate` frames a second; rotations in between are interpolated.

    Raises:
        InputError: for a file that is not of that kind.
    """
    frames = _frames(file)
    if frames is None:
        raise InputError(f"{file} does not have a humanoid's motion: JSON with Frames of {_COLUMNS} numbers")
    times = np.concatenate([[0.0], np.cumsum(frames[:-1, 0])])
    # The last of them may be behind the end by a rounding error.
    wanted = np.minimum(np.arange(0, times[-1] + 1e-9, 1 / rate), times[-1])
    turn = {
        name: Slerp(times, Rotation.from_quat(frames[:, first : first + 4], scalar_first=True))(wanted)
        for name, first in _TURNS.items()
    }
    hinge = {
        name: Rotation.from_euler("z", np.interp(wanted, times, frames[:, column])[:, None])
        for name, column in _HINGES.items()
    }
    joints = np.zeros((len(wanted), 17, 3))
    pelvis = np.stack([np.interp(wanted, times, frames[:, column]) for column in (1, 2, 3)], 1)
    root, chest = turn["root"], turn["root"] * turn["chest"]
    neck = chest * turn["neck"]
    joints[:, 0] = pelvis
    joints[:, 7] = pelvis + root.apply(_CHEST)
    joints[:, 8] = joints[:, 7] + chest.apply(_NECK)
    joints[:, 9], joints[:, 10] = (joints[:, 8] + neck.apply(up) for up in (_NOSE, _HEAD))
    for side, hip, shoulder, outward in (("right", 1, 14, 1), ("left", 4, 11, -1)):
        thigh = root * turn[f"{side} hip"]
        joints[:, hip] = pelvis + root.apply(_mirrored(_HIP, outward))
        joints[:, hip + 1] = joints[:, hip] + thigh.apply(_KNEE)
        joints[:, hip + 2] = joints[:, hip + 1] + (thigh * hinge[f"{side} knee"]).apply(_ANKLE)
        arm = chest * turn[f"{side} shoulder"]
        joints[:, shoulder] = joints[:, 7] + chest.apply(_mirrored(_SHOULDER, outward))
        joints[:, shoulder + 1] = joints[:, shoulder] + arm.apply(_ELBOW)
        joints[:, shoulder + 2] = joints[:, shoulder + 1] + (arm * hinge[f"{side} elbow"]).apply(_WRIST)
    return joints.astype(np.float32)


def _mirrored(offset: tuple[float, float, float], outward: int) -> tuple[float, float, float]:
    return (*offset[:2], outward * offset[2])


def _frames(file: Path) -> NDArray[np.float64] | None:
    """Frames of a humanoid's motion, None for any other file."""
    try:
        read: Any = json.loads(file.read_text(encoding="utf-8"))
        frames = np.asarray(read["Frames"], dtype=np.float64)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if frames.ndim != 2 or frames.shape[1] != _COLUMNS or len(frames) < 2 or not np.isfinite(frames).all():
        return None
    turns = [np.linalg.norm(frames[:, first : first + 4], axis=1) for first in _TURNS.values()]
    return frames if (frames[:-1, 0] > 0).all() and np.min(turns) > 0.5 else None


def clips_folder() -> Path:
    """The folder of the package's clips; InputError if it is not installed."""
    found = importlib.util.find_spec("pybullet_data")
    if found is None or found.origin is None:
        raise InputError("motion-capture clips need pybullet: pip install 'foveate[motion]', or name a folder of clips")
    return Path(found.origin).parent / "data" / "motions"


class Motions:
    """Windows of clips, each seen by a camera of its own; item k is a function of (split, seed, k).

    Item k: keypoints (F, 17, 3) float32, x and y in the picture and a confidence, always 1; and poses (F, 17, 3)
    float32, metres relative to the pelvis in the camera's frame: x right, y down, z forward.

    Args:
        split: "train", or "test": every fourth clip, by name. No clip is in both.
        seed: >= 0.
        frames: F; shorter clips are left out.
        noise: standard deviation of what is added to x and y; a person is about 1 tall.
        folder: of clips, None for the package's.

    Raises:
        InputError: for other values, or where no clip is long enough.
    """

    def __init__(
        self, split: str, seed: int, *, frames: int, noise: float = 0.01, folder: str | Path | None = None
    ) -> None:
        self.split, self.seed = choice("split", split, ("train", "test")), whole("seed", seed)
        self.frames, self.noise = whole("frames", frames, 2), within("noise", noise, "[0, inf)")
        folder = Path(folder) if folder else clips_folder()
        files = [file for file in sorted(folder.rglob("*.txt")) if _frames(file) is not None]
        chosen = [file for k, file in enumerate(files) if (k % 4 == 3) == (split == "test")]
        read = {file.relative_to(folder).with_suffix("").as_posix(): read_motion(file) for file in chosen}
        self.clips = {name: joints for name, joints in read.items() if len(joints) >= frames}
        if not self.clips:
            raise InputError(f"{folder} has no motion of at least {frames} frames for the split {split!r}")

    def __getitem__(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        random = np.random.default_rng([self.seed, int(self.split == "test"), index])
        starts = np.array([len(joints) - self.frames + 1 for joints in self.clips.values()])
        place, clip = int(random.integers(starts.sum())), 0
        while place >= starts[clip]:
            place, clip = place - int(starts[clip]), clip + 1
        joints = list(self.clips.values())[clip][place : place + self.frames].astype(np.float64)
        if random.random() < 0.5:
            joints = mirrored(joints)
        return seen(joints, random, self.noise)


def mirrored(joints: NDArray[np.float64]) -> NDArray[np.float64]:
    """The motion of the mirror image of a person, (T, 17, 3)."""
    order = np.arange(17)
    order[list(LEFT)], order[list(RIGHT)] = RIGHT, LEFT
    return joints[:, order] * (1, 1, -1)


def seen(
    joints: NDArray[np.float64], random: np.random.Generator, noise: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Keypoints and poses as `Motions` has them, by a camera that stands still and is turned to the clip's middle.

    It is 3.5 to 6 m away, anywhere around, 5 degrees below to 25 above the horizontal.
    """
    around, above = random.uniform(0, 2 * np.pi), np.deg2rad(random.uniform(-5, 25))
    forward = -np.array([np.cos(above) * np.cos(around), np.sin(above), np.cos(above) * np.sin(around)])
    right = np.cross(forward, (0, 1, 0))
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(forward, right), forward])
    local = (joints - joints[:, 0].mean(0)) @ axes.T + (0, 0, random.uniform(3.5, 6))
    picture = FOCAL * local[..., :2] / local[..., 2:] + noise * random.standard_normal((*local.shape[:2], 2))
    keypoints = np.concatenate([picture, np.ones_like(picture[..., :1])], -1)
    return keypoints.astype(np.float32), (local - local[:, :1]).astype(np.float32)
