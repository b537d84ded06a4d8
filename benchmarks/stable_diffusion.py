"""A-STAR on captions of two objects, attention-entropy scaling at other sizes: what each does for a Stable Diffusion.

On the zoo's tiny-sd, or a folder that `foveate train tiny-sd` wrote, measured as by `foveate compare --task
generation`. `guided`: A-STAR, and each of its losses alone, beside dense with as many steps as cost the same. `sizes`:
pictures of other sides than the model's 64 px, with and without the method, which should be right as often as at 64.
"other noise" is dense once more and says how much of a difference is luck.

python benchmarks/stable_diffusion.py --pictures 200 --threads 1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from diffusion import SIDE, note, of_folder
from llava_shaped import write

from foveate.data.scenes import CaptionedScenes
from foveate.generate import DiffusionGenerator
from foveate.measure.compare_generation import compare_generation
from foveate.method import Published
from foveate.methods.diffuse.variable_size import VariableSize
from foveate.methods.guide.a_star import AStar
from foveate.train.diffusion import build_tokenizer
from foveate.zoo.sd import build_sd_pipeline, build_unet
from foveate.zoo.vae import build_vae

GUIDED: dict[str, Sequence[Published]] = {
    "a-star": [AStar()],
    "a-star, segregation alone": [AStar(retention=0.0)],
    "a-star, retention alone": [AStar(segregation=0.0)],
}


def tiny() -> Any:
    """Random weights, for `--smoke`."""
    return build_sd_pipeline(build_unet(width=8, heads=2, text_width=16), build_vae(width=8), build_tokenizer())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-sd", help="a folder, or a name of the zoo")
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 48, 64, 96, 128], help="px, multiples of 8")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="random weights, 4 pictures, nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    guided = GUIDED
    if options.smoke:
        options.pictures, options.steps, options.batch, options.pairs, options.sides = 4, 3, 2, 1, [32]
        guided = {"a-star": [AStar()]}
        pipeline = tiny()
    else:
        pipeline = of_folder(options.model)
    scenes = CaptionedScenes("test", 2**31 - 1, size=SIDE)
    captions = [scenes[number].caption for number in range(4 * options.pictures)]  # a quarter of them have two objects
    sizes: dict[str, Any] = {"batch_size": options.batch, "timing_pairs": options.pairs, "on_row": note}
    generator = DiffusionGenerator(pipeline, seed=options.seed, steps=options.steps)
    two = [caption for caption in captions if " and " in caption][: options.pictures]
    found = compare_generation(generator, two, guided, **sizes)
    results: dict[str, Any] = {"judge": found.environment["judge"], "guided": [asdict(row) for row in found.rows]}
    results["sizes"] = {}

    def keep() -> None:
        if not options.smoke:
            write("stable_diffusion", options, {"methods": ["a-star", "variable-size"], **results})

    keep()
    for side in options.sides:
        print(f"{side} px")
        generator = DiffusionGenerator(pipeline, seed=options.seed, steps=options.steps, height=side, width=side)
        entries = {"variable-size": [VariableSize()]}
        found = compare_generation(generator, captions[: options.pictures], entries, **sizes)
        results["sizes"][str(side)] = [asdict(row) for row in found.rows]
        keep()


if __name__ == "__main__":
    main()
