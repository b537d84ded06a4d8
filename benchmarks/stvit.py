"""STViT's semantic tokens: quality against FLOPs and time on scenes, and how much of the FLOPs saved is time saved.

`scenes`: tiny-vit fine-tuned by `foveate train stvit` with 16 semantic tokens after two layers, with its ablations, and
`foveate train sit-slim` with random, pooled, top-k or merged tokens after two layers, as many as make the FLOPs equal,
under the same loss (labels alone) and as many steps; ToMe also without training. `dense_task`: all tokens recovered in
the last layer, and the object under every patch. `large`: ViT-B/16 beside ToMe at the same FLOPs.
"""

from __future__ import annotations

from typing import Any

import torch
from llava_shaped import write
from slimmer import arguments, beside, counted, large, small, summary, trained

from foveate import zoo
from foveate.methods.reduce.sit_slim import SitSlim
from foveate.methods.reduce.stvit import STViT
from foveate.train.sit_slim import with_reducer

ABLATIONS: dict[str, dict[str, Any]] = {
    "stvit": {},
    "stvit, spatial seeds alone": {"centres": "spatial"},
    "stvit, global centres alone": {"centres": "global"},
    "stvit, seeds by the mean": {"seeds": "mean"},
    "stvit, seeds by the maximum": {"seeds": "max"},
}
PEERS = ("random", "pool", "topk", "merge")
PATCHES = 144


def main() -> None:
    options = arguments(__doc__, "stvit").parse_args()
    torch.set_num_threads(options.threads)
    dense, pictures, rows = zoo.load("tiny-vit"), torch.randn(4 * options.batch, 3, 96, 96), []
    precision = ("names_mean_average_precision",)
    for label, settings in ABLATIONS.items():
        row = summary(label, trained("stvit", options, label, **settings), precision)
        rows.append(row | beside(dense, STViT.named("tiny", **settings).eval(), pictures, options.pairs))
        print(rows[-1], flush=True)
    keep = _equal(dense, rows[0]["flops_ratio"])
    for label in PEERS:
        settings = {"stages": (2, 3), "keep": keep, "reducer": label, "token_weight": 0.0, "logit_weight": 0.0}
        row = summary(label, trained("sit-slim", options, label, **settings), precision)
        model = with_reducer(SitSlim.named("tiny", stage_blocks=(2, 3), keep=keep), label).eval()
        rows.append(row | {"keep": keep} | beside(dense, model, pictures, options.pairs))
        print(rows[-1], flush=True)
    rows += small(rows[0]["flops_ratio"], 8 if options.smoke else options.test, options.pairs, 4 * options.batch)

    both = (*precision, "patch_mean_iou", "dense_patch_mean_iou")
    recovered = summary("stvit-r", trained("stvit", options, "recovering", layers="ffggr"), both)
    recovered |= beside(dense, STViT.named("tiny", layers="ffggr").eval(), pictures, options.pairs)
    print(recovered, flush=True)
    slimmed = {"stvit": STViT.named("deit-b"), "stvit-r": STViT.named("deit-b", layers="ffffggsssssr")}
    results = {
        "scenes": rows, "dense_task": recovered, "large": large(slimmed, options.pairs, options.batch, options.seed),
    }  # fmt: skip
    if not options.smoke:
        write("stvit", options, {"goal": "large: realised_share >= 0.95", **results})


def _equal(dense: Any, flops_ratio: float) -> float:
    """The share of tokens kept after two layers with which FLOPs are nearest to that share of dense's; of numbers of
    tokens that fill a grid."""
    picture, whole = torch.zeros(1, 3, 96, 96), counted(dense, torch.zeros(1, 3, 96, 96))

    def distance(count: int) -> float:
        model = with_reducer(SitSlim.named("tiny", stage_blocks=(2, 3), keep=count / PATCHES), "random").eval()
        return abs(counted(model, picture) / whole - flops_ratio)

    grids = sorted({rows * columns for rows in range(2, 13) for columns in range(rows, min(12, 3 * rows // 2) + 1)})
    return min(grids[:-1], key=distance) / PATCHES


if __name__ == "__main__":
    main()
