"""HoT on motion-capture clips: error of lifted poses against FLOPs and time, and frames kept without any lifter.

`lifting`: `foveate train hot` once for each of `VARIANTS` and seed, a small MixSTE from scratch with everything else
equal: the host alone, HoT, TPC, other ways to choose frames, to recover them, and means of frames, as many in all. No
clip of the test split was seen in training. `interpolation`: nothing is learned; frames are chosen by the
poses themselves, and those in between are interpolated. `large`: MotionBERT and MixSTE of the paper's size, HoT beside
the host, random weights.

The clips are those of pybullet (pip install 'foveate[motion]'), real motion capture; cameras and the noise of the
keypoints are made up.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from llava_shaped import write
from slimmer import beside
from torch import Tensor
from trainings import arguments, means, trained

from foveate.data.motion import Motions
from foveate.methods.reduce.hot import Hot, between, density_peaks, motion
from foveate.tokens import take
from foveate.train.hot import HotRecipe, HotSettings

VARIANTS: dict[str, dict[str, Any]] = {
    "host": {"recovery": "none", "keep": 39},
    "hot": {},
    "tpc": {"recovery": "none"},
    "hot, uniform": {"select": "uniform"},
    "hot, random": {"select": "random"},
    "hot, motion": {"select": "motion"},
    "hot, attention": {"select": "attention"},
    "pooled": {"reducer": "pool"},
    "merged (ToMe)": {"reducer": "merge"},
    "hot, linear recovery": {"recovery": "linear"},
    "hot, nearest recovery": {"recovery": "nearest"},
    "uniform, linear recovery": {"select": "uniform", "recovery": "linear"},
}
"""The last is what a lower frame rate would be, from the second layer on."""
FIGURES = ("mpjpe_mm", "centre_mpjpe_mm", "mirrored_mpjpe_mm", "velocity_mm")


def main() -> None:
    parser = arguments(__doc__, "hot")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--windows", type=int, default=400, help="of the test split")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=tuple(VARIANTS), metavar="NAME")
    parser.add_argument("--parts", nargs="+", default=["lifting", "interpolation", "large"])
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs")
    parser.add_argument("--clips", default="", help="folder of motions instead of pybullet's")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {}
    if "interpolation" in options.parts:
        results["interpolation"] = interpolation(options)
    if "lifting" in options.parts:
        results["lifting"] = [lifting(name, options) for name in options.variants]
    if "large" in options.parts:
        results["large"] = [large(name, options) for name in ("motionbert", "mixste")]
    if not options.smoke:
        write("hot", options, results)


def lifting(name: str, options: argparse.Namespace) -> dict[str, Any]:
    changes = dict(VARIANTS[name])
    small: dict[str, Any] = HotRecipe.smoke if options.smoke else {}
    if options.smoke and "keep" in changes:
        changes["keep"] = small["frames"]
    sizes = {"steps": options.steps, "test_scenes": options.windows}
    runs = trained("hot", options, name, sizes, clips=options.clips, **changes)
    row: dict[str, Any] = {"variant": name, **changes, "frames": runs[0]["frames"], "kept": runs[0]["kept"]}
    row |= means(runs, [figure for figure in FIGURES if figure in runs[0]])
    row["test_clips"] = runs[0]["test_clips"]
    if name != "host":
        host = {**VARIANTS["host"], "keep": runs[0]["frames"]}
        dense, other = (
            HotRecipe(HotSettings(**(small | one | {"clips": options.clips})), 0).lifter.eval()
            for one in (host, changes)
        )
        row |= beside(dense, other, torch.randn(4, dense.frames, 17, 2), 1 if options.smoke else options.pairs)
    print(row, flush=True)
    return row


@torch.no_grad()
def interpolation(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Mean distance in mm of true poses to those interpolated between the frames kept, by how they are chosen."""
    windows, rows = 8 if options.smoke else options.windows, []
    for frames, keep in ((39, 13), (60, 10)):
        motions = Motions("train", options.seed, frames=frames, folder=options.clips or None)
        keypoints, poses = (torch.from_numpy(np.stack(some)) for some in zip(*(motions[k] for k in range(windows))))
        # The same clips with a pause: the middle third is one pose.
        time = torch.arange(frames)
        paused = torch.where((time >= frames // 3) & (time < 2 * frames // 3), frames // 3, time)
        for label, order in (("as they are", time), ("with a pause", paused)):
            moved, seen = poses[:, order], keypoints[:, order]
            row: dict[str, Any] = {"frames": frames, "kept": keep, "clips": label, "windows": windows}
            for how in ("density", "motion", "uniform", "random"):
                kept = chosen(how, moved, seen, keep, options.seed)
                stays = take(moved.flatten(2), kept).unflatten(2, moved.shape[2:])
                made = between(stays, kept, frames, "linear")
                row[how] = 1000 * float((made - moved).norm(dim=-1).mean())
            rows.append(row)
            print(row, flush=True)
    return rows


def chosen(how: str, poses: Tensor, keypoints: Tensor, keep: int, seed: int) -> Tensor:
    """(B, f) ascending."""
    batch, frames = poses.shape[:2]
    if how == "uniform":
        return torch.arange(keep).add(0.5).mul(frames / keep).long().expand(batch, -1)
    if how == "density":
        density, distance = density_peaks(poses.flatten(2))
        score = density * distance
    elif how == "motion":
        score = motion(keypoints)
    else:
        score = torch.rand(batch, frames, generator=torch.Generator().manual_seed(seed))
    return score.sort(dim=1, descending=True, stable=True).indices[:, :keep].sort(dim=1).values


def large(host: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    changes: dict[str, Any] = {"width": 16, "depth": 4} if options.smoke else {}
    dense, other = (Hot.named(name, **changes).eval() for name in (host, f"hot-{host}"))
    clip = torch.randn(1, dense.frames, 17, 3 if host == "motionbert" else 2)
    row = {"host": host, **beside(dense, other, clip, 1 if options.smoke else options.pairs)}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
