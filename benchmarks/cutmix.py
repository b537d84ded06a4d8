"""CutMix beside mixup, Cutout and nothing: accuracy, calibration and localisation after equal training.

Trains `foveate train cutmix` once for each augmentation and seed, with everything else equal, and keeps the figures of
the test split. What an interrupted run has trained is found again in --out.
"""

from __future__ import annotations

from llava_shaped import write
from trainings import arguments, means, trained

from foveate.train.cutmix import AUGMENTATIONS

FIGURES = ("accuracy", "expected_calibration_error", "located_of_known_class", "located_and_named")


def main() -> None:
    parser = arguments(__doc__, "cutmix", seeds=2)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--pictures", type=int, default=2000, help="to learn from")
    parser.add_argument("--test", type=int, default=2000, help="pictures of the test split")
    options = parser.parse_args()
    sizes = {"steps": options.steps, "pictures": options.pictures, "test_scenes": options.test}
    results = []
    for augment in AUGMENTATIONS:
        runs = trained("cutmix", options, augment, sizes, augment=augment)
        results.append({"augment": augment, **means(runs, FIGURES)})
        print(results[-1])
    if not options.smoke:
        write("cutmix", options, {"results": results})


if __name__ == "__main__":
    main()
