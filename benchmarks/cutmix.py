"""CutMix beside mixup, Cutout and nothing: accuracy, calibration and localisation after equal training.

Trains `foveate train cutmix` once for each augmentation and seed, with everything else equal, and keeps the figures of
the test split. What an interrupted run has trained is found again in --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from llava_shaped import write

from foveate import train
from foveate.train.cutmix import AUGMENTATIONS

FIGURES = ("accuracy", "expected_calibration_error", "located_of_known_class", "located_and_named")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/cutmix"), help="where trainings are kept")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each augmentation")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--pictures", type=int, default=2000, help="to learn from")
    parser.add_argument("--test", type=int, default=2000, help="pictures of the test split")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="tiny models and two steps, nothing is written")
    options = parser.parse_args()
    chosen: dict[str, Any] = {"threads": options.threads}
    if not options.smoke:
        chosen |= {"steps": options.steps, "pictures": options.pictures, "test_scenes": options.test}
    results = []
    for augment in AUGMENTATIONS:
        runs = []
        for seed in range(options.seed, options.seed + options.seeds):
            out = options.out / f"{augment}-{seed}"
            runs.append(train.run("cutmix", out=out, seed=seed, smoke=options.smoke, augment=augment, **chosen))
        row: dict[str, Any] = {"augment": augment}
        for name in FIGURES:
            values = [run[name] for run in runs]
            row[name] = {"mean": float(np.mean(values)), "by_seed": values}
        row["training_seconds"] = [run["training"]["training_seconds"] for run in runs]
        results.append(row)
        print(row)
    if not options.smoke:
        write("cutmix", options, {"results": results})


if __name__ == "__main__":
    main()
