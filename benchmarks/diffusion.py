"""RAS and T-Stitch on a diffusion transformer: quality against time, beside fewer steps and smaller pictures.

On two pipelines that `foveate train tiny-dit` and `tiny-dit-small` wrote, or the zoo's, with captions of the test
split; everything is measured as by `foveate compare --task generation`, whose baselines have the FLOPs of each method.
"other noise" is dense once more and says how much of a difference is luck.

python benchmarks/diffusion.py --model tiny-dit --small tiny-dit-small --threads 1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from diffusers.utils import logging
from llava_shaped import write
from torch import nn

from foveate import zoo
from foveate.data.scenes import CaptionedScenes, stacked
from foveate.generate import DiffusionGenerator
from foveate.measure.compare_generation import compare_generation
from foveate.measure.comparison import TaskRow
from foveate.method import Published
from foveate.methods.diffuse.ras import Ras
from foveate.methods.diffuse.t_stitch import TStitch
from foveate.train.diffusion import build_tokenizer
from foveate.zoo.dit import build_dit, build_dit_pipeline
from foveate.zoo.vae import build_vae

SIDE = 64
RAS_RATIOS = (0.125, 0.25, 0.5, 0.75)
STITCHED = (0.2, 0.4, 0.5, 0.6, 0.8, 1.0)


def of_folder(name: str) -> Any:
    return zoo.load(name) if name in zoo.names() else zoo.load_folder(name)


def tiny() -> tuple[Any, Any]:
    """Random weights, for `--smoke`: a pipeline and a smaller one that reads captions alike."""
    tokenizer, vae, text = build_tokenizer(), build_vae(width=8), None
    made = []
    for layers in (2, 1):
        transformer = build_dit(layers=layers, width=16, heads=2)
        for weight in transformer.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.2)
        made.append(build_dit_pipeline(transformer, vae, tokenizer, text))
        text = made[0].text_encoder
    return made[0], made[1]


def note(row: TaskRow, pictures: Any) -> None:
    told = {"FLOPs": row.flops_ratio, "time": row.time_ratio, **row.figures}
    print(row.label, row.refused or {name: value and round(value, 3) for name, value in told.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-dit", help="a folder, or a name of the zoo")
    parser.add_argument("--small", default="tiny-dit-small", help="the same, for T-Stitch")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=10, help="interleaved pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="random weights, 4 pictures, nothing is written")
    options = parser.parse_args()
    logging.set_verbosity_error()  # Lumina says at every call that it does not clean captions
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    ras, stitched = RAS_RATIOS, STITCHED
    if options.smoke:
        options.pictures, options.steps, options.batch, options.pairs = 4, 6, 2, 1
        ras, stitched = ras[1:2], stitched[1:2]
    large, small = tiny() if options.smoke else (of_folder(options.model), of_folder(options.small))
    entries: dict[str, Sequence[Published]] = {f"ras, ratio {ratio:g}": [Ras(ratio=ratio)] for ratio in ras}
    small = small.to(options.device)
    entries |= {f"t-stitch, ratio {ratio:g}": [TStitch(small=small, ratio=ratio)] for ratio in stitched}
    scenes = CaptionedScenes("test", 2**31 - 1, size=SIDE)
    some = [scenes[number] for number in range(options.pictures)]

    found = compare_generation(
        DiffusionGenerator(large.to(options.device), seed=options.seed, steps=options.steps),
        [one.caption for one in some], entries, real=stacked(one.scene for one in some), batch_size=options.batch,
        timing_pairs=options.pairs, on_row=note,
    )  # fmt: skip
    print(found.why)
    if not options.smoke:
        judge = found.environment["judge"]
        measured = {"judge": judge, "why": found.why, "rows": [asdict(row) for row in found.rows]}
        write("diffusion", options, {"methods": ["ras", "t-stitch"], **measured})


if __name__ == "__main__":
    main()
