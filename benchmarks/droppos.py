"""DropPos with few labels: linear probe and fine-tuning, pre-trained beside from scratch, and what its parts do.

Trains `foveate train droppos` once for each variant and seed, with everything else equal: the paper's, without
attentive weights, without smoothing, and with all patches seen (then the task is a jigsaw puzzle). What an interrupted
run has trained is found again in --out.
"""

from __future__ import annotations

from typing import Any

from llava_shaped import write
from trainings import arguments, means, trained

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
    parser = arguments(__doc__, "droppos", seeds=2)
    parser.add_argument("--steps", type=int, default=2500, help="of pre-training")
    parser.add_argument("--tune-steps", type=int, default=400, help="of fine-tuning")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=tuple(VARIANTS), metavar="NAME")
    options = parser.parse_args()
    sizes = {"steps": options.steps, "tune_steps": options.tune_steps}
    results = []
    for name in options.variants:
        runs = trained("droppos", options, name, sizes, **VARIANTS[name])
        results.append({"variant": name, **VARIANTS[name], "labels": runs[0]["labels"], **means(runs, FIGURES)})
        print(results[-1])
    if not options.smoke:
        write("droppos", options, {"results": results})


if __name__ == "__main__":
    main()
