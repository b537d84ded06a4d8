"""RTA on corrupted pictures: pooling and loss, each alone and both, beside the same fine-tuning without them.

Trains `foveate train rta` for each of four variants and seeds, with everything else equal. Every test picture is
corrupted in all ways of `foveate.data.corruptions`, in five strengths. The mean corruption error is ImageNet-C's: of
each corruption the errors of five strengths, summed and divided by those of the variant without either, then the mean.
What an interrupted run has trained is found again in --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from llava_shaped import write

from foveate import train

VARIANTS: dict[str, dict[str, Any]] = {
    "neither": {"scales": 0, "weight": 0.0},
    "pooling": {"scales": 4, "weight": 0.0},
    "loss": {"scales": 0, "weight": 1.0},
    "both": {"scales": 4, "weight": 1.0},
}
FIGURES = ("clean_error", "mean_corruption_error", "row_similarity", "row_stability")


def relative_error(run: dict[str, Any], plain: dict[str, Any]) -> float:
    """ImageNet-C's mCE as a ratio, `plain` being the model that it is relative to."""
    theirs = plain["corruption_error"]
    return float(np.mean([sum(errors) / sum(theirs[name]) for name, errors in run["corruption_error"].items()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rta"), help="where trainings are kept")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each variant")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--start", default="tiny-vit", choices=("tiny-vit", "scratch"))
    parser.add_argument("--test", type=int, default=500, help="pictures of the test split")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="tiny models and two steps, nothing is written")
    options = parser.parse_args()
    chosen: dict[str, Any] = {"threads": options.threads}
    if not options.smoke:
        chosen |= {"steps": options.steps, "start": options.start, "test_scenes": options.test}
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, settings in VARIANTS.items():
        runs[name] = [
            train.run("rta", out=options.out / f"{name}-{seed}", seed=seed, smoke=options.smoke, **settings, **chosen)
            for seed in range(options.seed, options.seed + options.seeds)
        ]
    results = []
    for name, made in runs.items():
        row: dict[str, Any] = {"variant": name, **VARIANTS[name]}
        for figure in FIGURES:
            row[figure] = {"mean": float(np.mean([run[figure] for run in made])), "by_seed": [r[figure] for r in made]}
        relative = [relative_error(run, plain) for run, plain in zip(made, runs["neither"])]
        row["relative_corruption_error"] = {"mean": float(np.mean(relative)), "by_seed": relative}
        row["corruption_error"] = [run["corruption_error"] for run in made]
        row["training_seconds"] = [run["training"]["training_seconds"] for run in made]
        results.append(row)
        print({key: value for key, value in row.items() if key != "corruption_error"})
    if not options.smoke:
        write("rta", options, {"results": results})


if __name__ == "__main__":
    main()
