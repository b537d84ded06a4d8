"""DaViT and Strip-MLP beside tiny-vit's architecture at equal FLOPs: names, patches and time after equal training.

Trains each from scratch on the same scenes with the same loss, steps and schedule (`foveate.train.backbone`; the
plain ViT is tiny-vit's architecture, not its weights), and keeps the figures of the test split. FLOPs are those of a
picture with both outputs. Time is that of a batch, from interleaved pairs with the plain ViT. What an interrupted run
has trained is found again in --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from llava_shaped import write
from torch import Tensor
from trainings import means

from foveate import train
from foveate.data.scenes import NAMES
from foveate.measure.timing import interleave, seconds
from foveate.train.backbone import BackboneRecipe, BackboneSettings
from foveate.train.loop import train as run
from foveate.train.loop import write_tensors
from foveate.zoo.vit import SceneTransformer

FIGURES = ("names_mean_average_precision", "patch_mean_iou")


class PlainViT(SceneTransformer):
    """tiny-vit with the two outputs that are compared; its other heads are not trained and do not run."""

    def both(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        _, last = self.layers(pictures)
        return self.forward_head(last), self.patch_head(last[:, 1:])


class PlainViTRecipe(BackboneRecipe):
    name = "plain-vit"

    @staticmethod
    def build(settings: BackboneSettings) -> PlainViT:
        model = PlainViT(num_classes=len(NAMES))
        for unused in (model.early_patch_head, model.early_box_head):
            unused.requires_grad_(False)
        return model

    def export(self, folder: Path) -> None:
        write_tensors(folder / "model.safetensors", self.student.state_dict())


RECIPES: dict[str, type[BackboneRecipe]] = {
    "plain-vit": PlainViTRecipe, "davit": train.recipe("davit"), "strip-mlp": train.recipe("strip-mlp"),
}  # fmt: skip


def timed(models: dict[str, Any], batch: int, pairs: int) -> dict[str, Any]:
    """Time of each model's two outputs for a batch, over the plain ViT's."""
    pictures = torch.randn(batch, 3, 96, 96)

    @torch.inference_mode()
    def once(name: str) -> float:
        return seconds(lambda: models[name].both(pictures))

    found = {}
    for name in models:
        timing = interleave(lambda: once("plain-vit"), lambda name=name: once(name), pairs)  # type: ignore[misc]
        found[name] = {
            "time_ratio": timing.ratio, "time_low": timing.low, "time_high": timing.high,
            "seconds": timing.second_seconds,
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/image-backbones"), help="where trainings are kept")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each backbone")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--test", type=int, default=1000, help="scenes of the test split")
    parser.add_argument("--pairs", type=int, default=15, help="interleaved pairs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="two steps each, nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen: dict[str, Any] = BackboneRecipe.smoke if options.smoke else {
        "steps": options.steps, "batch": options.batch, "test_scenes": options.test,
    }  # fmt: skip
    results: dict[str, dict[str, Any]] = {}
    for name, recipe in RECIPES.items():
        runs = [
            run(recipe, out=options.out / f"{name}-{seed}", seed=seed, **chosen, threads=options.threads)
            for seed in range(options.seed, options.seed + options.seeds)
        ]
        row = {figure: runs[0][figure] for figure in ("flops", "parameters")} | means(runs, FIGURES)
        results[name] = row
    models = {name: recipe.build(BackboneSettings()).eval() for name, recipe in RECIPES.items()}
    for name, times in timed(models, 8 if options.smoke else 32, 1 if options.smoke else options.pairs).items():
        results[name] |= times
        print(name, results[name], flush=True)
    if not options.smoke:
        write("image_backbones", options, {"methods": ["davit", "strip-mlp"], "results": results})


if __name__ == "__main__":
    main()
