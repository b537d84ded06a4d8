"""SiT's token slimming: quality against FLOPs and time on scenes, and how much of the FLOPs saved is time saved.

`scenes`: tiny-vit fine-tuned by `foveate train sit-slim` with slimming and, with equal numbers of tokens, equal loss
and equal training, with learned top-k, random and pooled tokens and ToMe's matching in its place; slimming also without
the recalibration of features, and without any teacher; ToMe also without training. At `deep`, one step to an eighth of
the tokens: where the paper says that mixing beats dropping. `large`: ViT-B/16 beside ToMe at the same FLOPs.
"""

from __future__ import annotations

from typing import Any

import torch
from llava_shaped import write
from slimmer import arguments, beside, large, small, summary, trained

from foveate import zoo
from foveate.methods.reduce.sit_slim import SitSlim
from foveate.train.sit_slim import REDUCERS, with_reducer

SHAPES: dict[str, dict[str, Any]] = {
    "staged": {"stages": (2, 1, 1, 1), "keep": 0.5},
    "deep": {"stages": (2, 3), "keep": 0.125},
}
LOSSES = {
    "slim, logits alone": {"token_weight": 0.0},
    "slim, labels alone": {"token_weight": 0.0, "logit_weight": 0.0},
}


def main() -> None:
    options = arguments(__doc__, "sit-slim").parse_args()
    torch.set_num_threads(options.threads)
    dense, pictures, scenes = zoo.load("tiny-vit"), torch.randn(4 * options.batch, 3, 96, 96), []
    count = 8 if options.smoke else options.test
    for shape, settings in SHAPES.items():
        rows = []
        for label in (*REDUCERS, *LOSSES):
            reducer = label if label in REDUCERS else "slim"
            more = {**settings, **LOSSES.get(label, {}), "reducer": reducer}
            runs = trained("sit-slim", options, f"{shape}-{label}", **more)
            row = summary(label, runs, ("names_mean_average_precision",))
            model = SitSlim.named("tiny", stage_blocks=settings["stages"], keep=settings["keep"])
            row |= beside(dense, with_reducer(model, reducer).eval(), pictures, options.pairs)
            rows.append(row)
            print(shape, row, flush=True)
        rows += small(rows[0]["flops_ratio"], count, options.pairs, 4 * options.batch)
        scenes.append({"shape": shape, **settings, "rows": rows})
    slimmed = {"sit-slim": SitSlim.named("deit-b")}
    results = {"scenes": scenes, "large": large(slimmed, options.pairs, options.batch, options.seed)}
    if not options.smoke:
        write("sit_slim", options, {"goal": "large: realised_share >= 0.95", **results})


if __name__ == "__main__":
    main()
