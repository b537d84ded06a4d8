"""RTA on corrupted pictures: pooling and loss, each alone and both, beside the same fine-tuning without them.

Trains `foveate train rta` for each of four variants and seeds, with everything else equal. Every test picture is
corrupted in all ways of `foveate.data.corruptions`, in five strengths. The mean corruption error is ImageNet-C's: of
each corruption the errors of five strengths, summed and divided by those of the variant without either, then the mean.
What an interrupted run has trained is found again in --out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llava_shaped import write
from trainings import arguments, means, trained

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
    parser = arguments(__doc__, "rta", seeds=2)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--start", default="tiny-vit", choices=("tiny-vit", "scratch"))
    parser.add_argument("--test", type=int, default=500, help="pictures of the test split")
    options = parser.parse_args()
    sizes = {"steps": options.steps, "start": options.start, "test_scenes": options.test}
    runs = {name: trained("rta", options, name, sizes, **settings) for name, settings in VARIANTS.items()}
    results = []
    for name, made in runs.items():
        row: dict[str, Any] = {"variant": name, **VARIANTS[name], **means(made, FIGURES)}
        relative = [relative_error(run, plain) for run, plain in zip(made, runs["neither"])]
        row["relative_corruption_error"] = {"mean": sum(relative) / len(relative), "by_seed": relative}
        row["corruption_error"] = [run["corruption_error"] for run in made]
        results.append(row)
        print({key: value for key, value in row.items() if key != "corruption_error"})
    if not options.smoke:
        write("rta", options, {"results": results})


if __name__ == "__main__":
    main()
