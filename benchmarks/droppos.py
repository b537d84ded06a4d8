"""DropPos with few labels: linear probe and fine-tuning, pre-trained beside from scratch, and what its parts do.

Trains `foveate train droppos` once for each variant and seed, with everything else equal: the paper's, without
attentive weights, without smoothing, and with all patches seen (then the task is a jigsaw puzzle). What an interrupted
run has trained is found again in --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from llava_shaped import write

from foveate import train

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "not attentive": {"attentive": False},
    "not smoothed": {"sigma": 0.0},
    "all patches seen": {"mask": 0.0},
}
FIGURES = (
    "pretrained_linear_probe", "scratch_linear_probe", "pretrained_fine_tuned", "scratch_fine_tuned",
    "position_accuracy",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/droppos"), help="where trainings are kept")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each variant")
    parser.add_argument("--steps", type=int, default=2500, help="of pre-training")
    parser.add_argument("--tune-steps", type=int, default=400, help="of fine-tuning")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=tuple(VARIANTS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="tiny models and two steps, nothing is written")
    options = parser.parse_args()
    chosen: dict[str, Any] = {"threads": options.threads}
    if not options.smoke:
        chosen |= {"steps": options.steps, "tune_steps": options.tune_steps}
    results = []
    for name in options.variants:
        runs = []
        for seed in range(options.seed, options.seed + options.seeds):
            out = options.out / f"{name.replace(' ', '-')}-{seed}"
            runs.append(train.run("droppos", out=out, seed=seed, smoke=options.smoke, **VARIANTS[name], **chosen))
        row: dict[str, Any] = {"variant": name, **VARIANTS[name], "labels": runs[0]["labels"]}
        for figure in FIGURES:
            values = [run[figure] for run in runs]
            row[figure] = {"mean": float(np.mean(values)), "by_seed": values}
        row["training_seconds"] = [run["training"]["training_seconds"] for run in runs]
        results.append(row)
        print(row)
    if not options.smoke:
        write("droppos", options, {"results": results})


if __name__ == "__main__":
    main()
