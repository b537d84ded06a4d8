"""Lifters with fewer frames compared, against loops over joints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.data.motion import Motions
from foveate.measure.compare_pose import PoseComparison, compare_pose, load_lifter, reduced
from foveate.measure.vision_models import load_trained
from foveate.method import InputError
from foveate.methods.reduce.hot import Hot
from motion_files import walking

SMALL = {"frames": 9, "width": 16, "depth": 3, "heads": 2, "recovery_heads": 2}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str, Path]:
    """A lifter, one that prunes, and motions."""
    (tmp_path / "m").mkdir()
    host = Hot.named("tiny", **SMALL, keep=9, recovery="none")
    torch.nn.init.normal_(host.lifter.frame_position)
    host.save_pretrained(tmp_path / "host")
    Hot.named("tiny", **SMALL, keep=3).save_pretrained(tmp_path / "hot")
    return str(tmp_path / "host"), str(tmp_path / "hot"), walking(tmp_path / "m", count=8, length=14)


def test_rows_against_loops(folders: tuple[str, str, Path]) -> None:
    host, hot, data = folders
    beside = [load_trained(f"hot={hot}")]
    made = compare_pose(host, None, beside, data=data, count=5, budgets=(1 / 3,), batch_size=2, timing_pairs=1)
    assert [one.method for one in made.rows] == ["dense", "random", "grid", "pool", "hot", "hot"]
    motions = Motions("test", 0, frames=9, folder=data)
    lifter = Hot.from_pretrained(host).eval()
    kept = [1, 4, 7]
    total: dict[str, list[float]] = {"dense": [], "grid": [], "pool": []}
    with torch.no_grad():
        for k in range(5):
            keypoints, poses = motions[k]
            given = torch.from_numpy(keypoints)[None, ..., :2]
            x = lifter.lifter.layer(0, lifter.lifter.embed(given))
            threes = torch.stack([x[:, 3 * j : 3 * j + 3].mean(1) for j in range(3)], 1)
            for name, few in (("dense", x), ("grid", x[:, kept]), ("pool", threes)):
                for layer in (1, 2):
                    few = lifter.lifter.layer(layer, few)
                if name != "dense":
                    flat = few[0].flatten(1).numpy()
                    whole = [np.interp(range(9), kept, flat[:, c]) for c in range(flat.shape[1])]
                    few = torch.from_numpy(np.stack(whole, 1)).float().view(1, 9, *few.shape[2:])
                said = lifter.lifter.head(few)[0].numpy()
                for frame in range(9):
                    for joint in range(17):
                        total[name].append(float(np.sqrt(((said[frame, joint] - poses[frame, joint]) ** 2).sum())))
    for name, errors in total.items():
        found = next(one for one in made.rows if one.method == name)
        assert found.figures["MPJPE"] == pytest.approx(1000 * sum(errors) / len(errors), rel=1e-4)
    grid = made.rows[2]
    assert grid.stages == (("input", 9.0), ("layer[1]", 3.0)) and grid.flops_ratio < 1  # type: ignore[operator]
    assert made.rows[0].figures["to dense"] == 0 and made.rows[-1].settings == {"weights": hot}
    assert PoseComparison.from_json(made.to_json()) == made


def test_keeping_all_frames_is_dense(folders: tuple[str, str, Path]) -> None:
    host, _, data = folders
    made = compare_pose(host, (), data=data, count=2, budgets=(1.0,), timing_pairs=1)
    # A pool of single frames too.
    assert all(one.figures["to dense"] < 1e-3 for one in made.rows)


def test_what_is_no_lifter_or_not_for_one(folders: tuple[str, str, Path]) -> None:
    host, hot, data = folders
    with pytest.raises(InputError, match=r"leaves out frames itself .3 of 9 stay"):
        load_lifter(hot)
    with pytest.raises(InputError, match="no trained model here"):
        load_lifter(str(data))
    with pytest.raises(InputError, match="tome does not choose frames"):
        compare_pose(host, ["tome"], data=data)
    with pytest.raises(InputError, match="no motion of at least 9 frames"):
        compare_pose(host, data=Path(host))
    settings = {"host": "motionagformer", "channels": 3, **SMALL, "representation": 16}
    tied = Hot(**settings, keep=9, recovery="none", prune_layer=1)
    with pytest.raises(InputError, match="tied to their number of frames"):
        reduced(tied, settings | {"keep": 9, "recovery": "none"}, "grid", 3)
