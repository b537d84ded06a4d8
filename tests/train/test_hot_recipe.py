"""The recipe of `hot`: its data, its loss, its figures with a lifter that knows, and a smoke run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("timm")

from foveate import train
from foveate.data.motion import Motions
from foveate.method import InputError
from foveate.methods.reduce.hot import Hot, Lifted
from foveate.train.hot import AVERAGES, HotRecipe, HotSettings
from motion_files import walking


@pytest.fixture
def clips(tmp_path: Path) -> str:
    return str(walking(tmp_path))


def recipe(clips: str, **overrides: Any) -> HotRecipe:
    torch.manual_seed(0)
    return HotRecipe(HotSettings(**(HotRecipe.smoke | {"clips": clips} | overrides)), 3)


def test_batches_are_windows_and_processes_share_them(clips: str) -> None:
    made = recipe(clips, batch=3)
    whole = made.batch(2, 0, 1)
    motions = Motions("train", 3, frames=9, folder=clips)
    for k in range(3):
        keypoints, poses = motions[6 + k]
        assert torch.equal(whole["keypoints"][k], torch.from_numpy(keypoints)[..., :2])
        assert torch.equal(whole["poses"][k], torch.from_numpy(poses))
    parts = [made.batch(2, rank, 2)["poses"] for rank in range(2)]
    assert torch.equal(parts[0], whole["poses"][::2]) and torch.equal(parts[1], whole["poses"][1::2])
    three = recipe(clips, config="hot-motionbert", heads=2, batch=3)
    assert torch.equal(three.batch(2, 0, 1)["keypoints"][..., 2], torch.ones(3, 9, 17))


def test_the_loss_is_the_lifters(clips: str) -> None:
    made = recipe(clips)
    made.lifter.tie_noise = 0.0
    batch = made.batch(0, 0, 1)
    loss, parts = made.loss(made.model, batch)
    wanted, _ = made.lifter.loss(batch["keypoints"], batch["poses"])
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()))
    assert float(loss.detach()) == pytest.approx(parts["position"] + 0.5 * parts["smoothness"] + 2 * parts["velocity"])


@pytest.mark.parametrize("recovery", ["attention", "none"])
def test_figures_of_a_lifter_that_is_always_3_cm_off(clips: str, recovery: str) -> None:
    made = recipe(clips, recovery=recovery, test_scenes=5)
    motions, seen = made._motions("test", 0), []
    kept = torch.tensor([1, 4, 6])

    def lift(keypoints: Tensor, chosen: Tensor | None = None) -> Lifted:
        if chosen is None:
            known = [torch.from_numpy(motions[len(seen) + k][1]) for k in range(len(keypoints))]
            seen.extend(known)
            made.lifter.known = torch.stack(known)  # type: ignore[assignment]
        frames = kept if recovery == "none" else torch.arange(9)
        poses = made.lifter.known[:, frames] + torch.tensor([0.0, 0.03, 0.0])
        rows = frames.expand(len(poses), -1)
        return Lifted(poses, kept.expand(len(poses), -1), rows)

    made.lifter.lift = lift  # type: ignore[method-assign]
    made.lifter.predict = lambda keypoints: lift(keypoints, kept)  # type: ignore[method-assign]
    made.lifter.forward = lambda keypoints: keypoints @ torch.ones(2, 3)  # type: ignore[method-assign]
    figures = made.evaluate()
    for name in ("mpjpe_mm", "centre_mpjpe_mm", "mirrored_mpjpe_mm"):
        assert figures[name] == pytest.approx(30, rel=1e-4)
    assert figures["flops"] == 2 * 9 * 17 * 2 * 3 and figures["test_clips"] == ["3"]
    if recovery == "none":
        assert "velocity_mm" not in figures
    else:
        assert figures["velocity_mm"] == pytest.approx(0, abs=1e-3)


def test_smoke(clips: str, tmp_path: Path) -> None:
    metrics = train.run("hot", out=tmp_path / "out", smoke=True, threads=1, clips=clips)
    assert metrics["frames"] == 9 and metrics["kept"] == 3 and 0 < metrics["mpjpe_mm"] < 5000
    model = Hot.from_pretrained(tmp_path / "out")
    assert model.frames == 9 and model.recovery == "attention"
    with pytest.raises(InputError, match="config must be one of mixste"):
        HotSettings(config="huge")


@torch.no_grad()
def test_averages_of_frames(clips: str) -> None:
    x = torch.randn(2, 9, 17, 16, generator=torch.Generator().manual_seed(0))
    pooled = recipe(clips, reducer="pool").lifter
    mean, frames = pooled.shorten(x, x)
    torch.testing.assert_close(mean, torch.stack([x[:, k : k + 3].mean(1) for k in (0, 3, 6)], 1))
    assert frames.tolist() == [[1, 4, 7]] * 2
    # Frames 2 and 6 apart, each repeated: merged until the three that differ are left, each the mean of its own.
    merged = recipe(clips, reducer="merge").lifter
    distinct, order = torch.randn(2, 3, 17, 16), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    weight = torch.rand(2, 9, 17, 1) * 0.01 + 1
    mean, frames = merged.shorten(distinct[:, order] * weight, x)
    assert frames.tolist() == [[0, 4, 7]] * 2
    wanted = torch.stack([(distinct[:, order] * weight)[:, order == k].mean(1) for k in range(3)], 1)
    torch.testing.assert_close(mean, wanted)
    out = merged.lift(torch.randn(2, 9, 17, 2))
    assert out.poses.shape == (2, 9, 17, 3) and bool(out.poses.isfinite().all())


@pytest.mark.parametrize("reducer", AVERAGES)
def test_smoke_of_averages(clips: str, tmp_path: Path, reducer: str) -> None:
    out = tmp_path / "out"
    metrics = train.run("hot", out=out, smoke=True, threads=1, clips=clips, reducer=reducer)
    assert metrics["mpjpe_mm"] > 0 and json.loads((out / "config.json").read_text())["reducer"] == reducer


def test_averages_are_of_no_one_frame(clips: str) -> None:
    with pytest.raises(InputError, match="a reducer goes with recovery"):
        recipe(clips, reducer="pool", recovery="none")
    with pytest.raises(InputError, match="reducer must be one of pool, merge"):
        HotSettings(reducer="mean")
