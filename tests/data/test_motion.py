"""Motion capture: joints against chains of rotation matrices, cameras against closed forms, files that are not any."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from foveate.data.motion import FOCAL, Motions, clips_folder, mirrored, read_motion, seen
from foveate.method import InputError
from foveate.nn.pose_lifting import BONES, LEFT, RIGHT
from motion_files import still, write_motion


def about(axis: tuple[float, float, float], angle: float) -> list[float]:
    """Quaternion (w, x, y, z)."""
    return [math.cos(angle / 2), *(math.sin(angle / 2) * one for one in axis)]


def about_z(angle: float) -> NDArray[np.float64]:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def about_y(angle: float) -> NDArray[np.float64]:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def test_standing_and_bent(tmp_path: Path) -> None:
    standing = still(2)
    joints = read_motion(write_motion(tmp_path / "a.txt", standing))[0]
    np.testing.assert_allclose(joints[0], (0, 0.9, 0), atol=1e-6)
    np.testing.assert_allclose(joints[3], (0, 0.9 - 0.421546 - 0.40987, 0.084887), atol=1e-6)
    np.testing.assert_allclose(joints[10], (0, 0.9 + 0.236151 + 0.223894 + 0.2775, 0), atol=1e-6)
    np.testing.assert_allclose(joints[[4, 5, 6]] * (1, 1, -1), joints[[1, 2, 3]], atol=1e-6)
    np.testing.assert_allclose(joints[[11, 12, 13]] * (1, 1, -1), joints[[14, 15, 16]], atol=1e-6)

    bent = still(2)
    bent[:, 4:8] = about((0, 1, 0), 0.4)
    bent[:, 16:20] = about((0, 0, 1), 0.3)
    bent[:, 20] = -0.7
    bent[:, 39:43] = about((0, 0, 1), 0.5)
    bent[:, 43] = 0.9
    joints = read_motion(write_motion(tmp_path / "b.txt", bent))[0]
    pelvis = np.array([0, 0.9, 0])
    hip = pelvis + about_y(0.4) @ (0, 0, 0.084887)
    knee = hip + about_y(0.4) @ about_z(0.3) @ (0, -0.421546, 0)
    ankle = knee + about_y(0.4) @ about_z(0.3 - 0.7) @ (0, -0.40987, 0)
    np.testing.assert_allclose(joints[[1, 2, 3]], [hip, knee, ankle], atol=1e-6)
    shoulder = pelvis + about_y(0.4) @ (-0.02405, 0.236151 + 0.2435, -0.18311)
    elbow = shoulder + about_y(0.4) @ about_z(0.5) @ (0, -0.274788, 0)
    wrist = elbow + about_y(0.4) @ about_z(0.5 + 0.9) @ (0, -0.258947, 0)
    np.testing.assert_allclose(joints[[11, 12, 13]], [shoulder, elbow, wrist], atol=1e-6)


def test_frames_in_between_are_interpolated(tmp_path: Path) -> None:
    frames = still(3)
    frames[:, 0] = 0.1
    frames[:, 1] = (0, 1, 3)
    for row, angle in enumerate((0, 0.4, 1.4)):
        frames[row, 4:8] = about((0, 1, 0), angle)
    joints = read_motion(write_motion(tmp_path / "a.txt", frames), rate=20)
    assert joints.shape == (5, 17, 3)
    np.testing.assert_allclose(joints[:, 0, 0], (0, 0.5, 1, 2, 3), atol=1e-6)
    hip = joints[:, 1] - joints[:, 0]
    angle = np.arctan2(hip[:, 0], hip[:, 2])
    np.testing.assert_allclose(angle, (0, 0.2, 0.4, 0.9, 1.4), atol=1e-5)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"Frames": 3}',
        '{"Frames": [[1, 2]]}',
        json.dumps({"Frames": [[0.0] * 44] * 3}),
        json.dumps({"Frames": [[0.1] + [0.0] * 43] * 3}),
    ],
)
def test_other_files(tmp_path: Path, content: str) -> None:
    file = tmp_path / "a.txt"
    file.write_text(content)
    with pytest.raises(InputError, match="does not have a humanoid's motion"):
        read_motion(file)
    with pytest.raises(InputError, match="no motion of at least 2 frames"):
        Motions("train", 0, frames=2, folder=tmp_path)


def folder_of(path: Path, names: str = "abcdefgh", length: int = 12) -> Path:
    for k, name in enumerate(names):
        frames = still(length)
        frames[:, 1] = np.linspace(0, 1 + k, length)
        frames[:, 20] = np.linspace(0, -1, length)
        write_motion(path / f"{name}.txt", frames)
    return path


def test_splits_and_windows(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    write_motion(folder / "short.txt", still(3))
    (folder / "other.txt").write_text("{}")
    train, test = (Motions(split, 3, frames=9, folder=folder, noise=0.0) for split in ("train", "test"))
    assert list(train.clips) == list("abcefg") and list(test.clips) == list("dh")
    keypoints, poses = train[5]
    assert keypoints.shape == poses.shape == (9, 17, 3) and keypoints.dtype == poses.dtype == np.float32
    again = Motions("train", 3, frames=9, folder=folder, noise=0.0)
    assert np.array_equal(again[5][0], keypoints) and np.array_equal(again[5][1], poses)
    assert not np.array_equal(train[6][0], keypoints)
    assert not np.array_equal(Motions("train", 4, frames=9, folder=folder, noise=0.0)[5][0], keypoints)
    with pytest.raises(InputError, match="no motion of at least 99 frames"):
        Motions("train", 0, frames=99, folder=folder)
    for changes, message in (
        ({"split": "all"}, "split"), ({"seed": -1}, "seed"), ({"frames": 1}, "frames"), ({"noise": -1}, "noise")
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            Motions(**({"split": "train", "seed": 0, "frames": 9, "folder": folder} | changes))  # type: ignore[arg-type]


def test_cameras(tmp_path: Path) -> None:
    joints = read_motion(write_motion(tmp_path / "a.txt", still(20))).astype(np.float64)
    joints = joints + np.linspace(0, 1, len(joints))[:, None, None] * (1, 0, 0)
    heights, sides = [], []
    for seed in range(20):
        keypoints, poses = seen(joints, np.random.default_rng(seed), 0.0)
        assert not poses[:, 0].any() and (keypoints[..., 2] == 1).all()
        # Lengths stay; what is seen is where the rays through the joints go.
        for one, other in BONES:
            length = np.linalg.norm(joints[:, one] - joints[:, other], axis=-1)
            np.testing.assert_allclose(np.linalg.norm(poses[:, one] - poses[:, other], axis=-1), length, atol=1e-5)
        # x Z = FOCAL X has the pelvis' place as its only unknown; least squares over all joints finds it.
        rows, right = [], []
        for j in range(17):
            for axis in (0, 1):
                row = np.zeros(3)
                row[axis], row[2] = FOCAL, -keypoints[0, j, axis]
                rows.append(row)
                right.append(keypoints[0, j, axis] * poses[0, j, 2] - FOCAL * poses[0, j, axis])
        place, left_over, rank, _ = np.linalg.lstsq(np.array(rows), np.array(right), rcond=None)
        assert rank == 3 and left_over < 1e-8
        assert 3 < np.linalg.norm(place) < 6.6
        # The head is above the feet in the picture, whose y goes down.
        heights.append(keypoints[0, 3, 1] - keypoints[0, 10, 1])
        sides.append(np.sign(keypoints[0, 1, 0] - keypoints[0, 4, 0]))
    assert min(heights) > 0.4 and set(sides) == {-1.0, 1.0}


def test_the_right_hand_is_right_from_behind(tmp_path: Path) -> None:
    joints = read_motion(write_motion(tmp_path / "a.txt", still(2))).astype(np.float64)

    class Behind:
        """A camera behind the person, who looks along x."""

        def uniform(self, low: float, high: float) -> float:
            return {2 * np.pi: np.pi, 25: 0.0, 6: 4.0}[high]

        def standard_normal(self, shape: Any) -> Any:
            return np.zeros(shape)

    random: Any = Behind()
    keypoints, poses = seen(joints, random, 1.0)
    assert keypoints[0, 16, 0] > 0 > keypoints[0, 13, 0]
    np.testing.assert_allclose(poses[0, 16], (0.18311, -joints[0, 16, 1] + 0.9, -0.02405), atol=1e-5)
    np.testing.assert_allclose(keypoints[0, 10, 1], -FOCAL * 0.737545 / 4, atol=1e-5)


def test_mirror_image() -> None:
    joints = np.random.default_rng(0).standard_normal((2, 17, 3))
    other = mirrored(joints)
    assert np.array_equal(mirrored(other), joints)
    for left, right in zip(LEFT, RIGHT):
        assert np.array_equal(other[:, left], joints[:, right] * (1, 1, -1))
    assert np.array_equal(other[:, 9], joints[:, 9] * (1, 1, -1))


def test_noise() -> None:
    joints = np.random.default_rng(0).uniform(-0.5, 0.5, (300, 17, 3))
    clean, noisy = (seen(joints, np.random.default_rng(1), noise)[0] for noise in (0.0, 0.02))
    assert (noisy - clean)[..., :2].std() == pytest.approx(0.02, rel=0.05)


def test_the_packages_clips_and_its_humanoid() -> None:
    pytest.importorskip("pybullet_data")
    train, test = (Motions(split, 0, frames=39) for split in ("train", "test"))
    assert len(train.clips) == 15 and list(test.clips) == [
        "humanoid3d_dance_a", "humanoid3d_jump", "humanoid3d_run", "walker/0walk_forward", "walker/turn_right1",
    ]  # fmt: skip
    walk = test.clips["walker/0walk_forward"]
    assert walk[-1, 0, 0] - walk[0, 0, 0] > 1 and abs(walk[:, [3, 6], 1].min()) < 0.1 and walk[:, 10, 1].min() > 1.4
    # The humanoid of the package, four times as large: where its joints are in the frame of the one before.
    text = (clips_folder().parents[1] / "humanoid" / "humanoid.urdf").read_text(encoding="utf-8").strip("\0\n")
    from xml.etree import ElementTree

    offsets = {
        joint.get("name"): np.array(joint.find("origin").get("xyz").split(), float) / 4  # type: ignore[union-attr]
        for joint in ElementTree.fromstring(text).iter("joint")
    }
    lengths = {name: float(np.linalg.norm(offset)) for name, offset in offsets.items()}
    joints = walk[0]
    for (one, other), name in {
        (0, 1): "right_hip", (1, 2): "right_knee", (2, 3): "right_ankle", (0, 4): "left_hip", (4, 5): "left_knee",
        (5, 6): "left_ankle", (0, 7): "chest", (7, 8): "neck", (7, 11): "left_shoulder", (11, 12): "left_elbow",
        (12, 13): "left_wrist", (7, 14): "right_shoulder", (14, 15): "right_elbow", (15, 16): "right_wrist",
    }.items():  # fmt: skip
        assert float(np.linalg.norm(joints[one] - joints[other])) == pytest.approx(lengths[name], abs=1e-5), name
