"""DToP on per-patch segmentation of test scenes: mean IoU against FLOPs and time, beside peers at the same cost.

Of weights that `foveate train dtop` wrote (--weights), for each confidence with and without context tokens: mean IoU
(torchmetrics), also of the third of the classes that are rarest in these scenes; FLOPs a picture; time to the same
model without exits, from interleaved pairs over the same pictures, one at a time as in use, and in batches. `random`
lets as many tokens of each picture finish at each head, but by lot. Beside: ToMe and half the picture's side on the
zoo's tiny-vit with its own patch head, merged tokens' classes put back on their patches. `flops_by_objects` says how
cost varies with what is on a picture. One thread measures best.

`share`: ViT-B/16 at 224 x 224, batch 8, random weights, with the confidences that the first head has in shares --sure
of the tokens (which finish there, but for the context tokens of each class): realised share = (1 - time ratio) /
(1 - FLOPs ratio), goal at least 0.95. Up to the "patches": encoder and heads; up to the "pixels": with the scores of
150 classes brought to the picture's size, which takes as long on both sides and no FLOPs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llava_shaped import write
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from foveate import zoo
from foveate.apply import apply
from foveate.data.scenes import Scenes
from foveate.measure.flops import flop_counter
from foveate.measure.timing import interleave, seconds
from foveate.method import build
from foveate.methods.reduce.dtop import Dtop
from foveate.train.dtop import CLASSES
from foveate.train.tiny_vit import normalised, scene_batch

CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
Patches = Callable[[Tensor], Tensor]
"""Pictures (B, 3, H, W) -> classes of the patches (B, n)."""


class ByLot(Dtop):
    """As many of each picture's tokens finish as by the rule, whichever they are."""

    @torch.no_grad()
    def clear(self, score: Tensor, active: Tensor) -> Tensor:
        many = super().clear(score, active).sum(1, keepdim=True)
        lot = torch.rand(active.shape, device=active.device).masked_fill(~active, 2.0)
        return lot.argsort(dim=1).argsort(dim=1) < many


def figures(patches: Patches, pictures: list[Tensor], labels: Tensor, rare: Tensor, batch: int) -> dict[str, Any]:
    iou, flops = MulticlassJaccardIndex(len(CLASSES), average=None), []
    for first in range(0, len(pictures), batch):
        with flop_counter() as counter:
            found = patches(torch.cat(pictures[first : first + batch]))
        flops.append(counter.get_total_flops())
        iou.update(found, labels[first : first + batch])
    there = iou.confmat.sum(0) + iou.confmat.sum(1) > 0
    by_class = iou.compute()
    return {
        "mean_iou": float(by_class[there].mean()),
        "rare_mean_iou": float(by_class[rare].mean()),
        "flops": sum(flops) / len(pictures),
        "each": flops,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder of a trained model; without, only `share` is measured")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--confidences", type=float, nargs="+", default=[0.95, 0.9, 0.8, 0.7, 0.5])
    parser.add_argument("--tome", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--sure", type=float, nargs="+", default=[0.5, 0.9], help="shares of the tokens, of `share`")
    parser.add_argument("--side", type=int, default=224, help="px, of `share`")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs that count (7)")
    parser.add_argument("--timed", type=int, default=32, help="pictures that are timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS), help="cpu: this thread alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="dtop", help="of the file in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    with torch.inference_mode():
        results: dict[str, Any] = {"methods": ["dtop"], "share": realised(options)}
        if options.weights:
            results["results"] = quality(options)
    write(options.name, options, results)


def realised(options: argparse.Namespace) -> list[dict[str, Any]]:
    image = {"img_size": options.side}
    model = Dtop.named("vit-b-ade20k", confidence=1.0, options=image).eval()
    pictures = torch.randn(options.batch, 3, options.side, options.side)
    said, clock = model.stages(pictures), CLOCKS[options.clock]
    best = model.score(said.masks[0], said.presences[0]).amax(1)
    runs: dict[str, Callable[[], Any]] = {
        "patches": lambda: model.patch_scores(model.stages(pictures)),
        "pixels": lambda: model(pictures),
    }

    def cost(run: Callable[[], Any], confidence: float) -> tuple[Callable[[], float], int]:
        def once() -> Any:
            model.set_exits(confidence=confidence)
            return run()

        with flop_counter() as counter:
            once()
        return lambda: seconds(once, clock=clock), counter.get_total_flops()

    rows: list[dict[str, Any]] = []
    for sure in options.sure:
        for up_to, run in runs.items():
            (dense, before), (exits, after) = cost(run, 1.0), cost(run, float(best.quantile(1 - sure)))
            timing = interleave(dense, exits, options.pairs)
            rows.append({
                "sure": sure, "up_to": up_to, "flops_ratio": after / before, "time_ratio": timing.ratio,
                "time_low": timing.low, "time_high": timing.high, "dense_seconds": timing.first_seconds,
                "realised_share": (1 - timing.ratio) / (1 - after / before),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def quality(options: argparse.Namespace) -> list[dict[str, Any]]:
    scenes = [Scenes("test", 0)[i] for i in range(options.scenes)]
    made = [scene_batch([scene]) for scene in scenes]
    pictures = [normalised(one["image"]) for one in made]
    labels = torch.cat([one["labels"] for one in made])
    counts = labels.flatten().bincount(minlength=len(CLASSES))
    there = (counts > 0).nonzero().flatten()
    rare = there[counts[there].argsort()][: max(1, len(there) // 3)]
    results: list[dict[str, Any]] = []
    clock = CLOCKS[options.clock]

    def note(row: dict[str, Any], patches: Patches, base: Patches, flops: float | None, each: bool = False) -> float:
        row |= figures(patches, pictures, labels, rare, 1 if each else options.batch)
        costs = row.pop("each")
        if each:
            objects = sorted({len(scene.objects) for scene in scenes})
            row["flops_by_objects"] = {
                str(n): sum(cost for cost, scene in zip(costs, scenes) if len(scene.objects) == n)
                / sum(len(scene.objects) == n for scene in scenes)
                for n in objects
            }
        row["flops_ratio"] = 1.0 if flops is None else row["flops"] / flops
        for batch in (1, options.batch):
            some = [torch.cat(pictures[k : k + batch]) for k in range(0, min(options.timed, len(pictures)), batch)]
            timing = interleave(
                lambda some=some: seconds(lambda: [base(one) for one in some], clock=clock),
                lambda some=some: seconds(lambda: [patches(one) for one in some], clock=clock),
                options.pairs,
            )
            row[f"batch_{batch}"] = {
                "time_ratio": timing.ratio, "time_low": timing.low, "time_high": timing.high,
                "base_seconds": timing.first_seconds, "seconds": timing.second_seconds,
            }  # fmt: skip
            if row["flops_ratio"] < 1:
                row[f"batch_{batch}"]["realised_share"] = (1 - timing.ratio) / (1 - row["flops_ratio"])
        results.append(row)
        print(row, flush=True)
        return float(row["flops"])

    def dtop(cls: type[Dtop], confidence: float, context: int) -> Patches:
        model = cls.from_pretrained(options.weights).eval().set_exits(confidence=confidence, context=context)
        return lambda given: model.patch_scores(model.stages(given)).argmax(1).flatten(1)

    plain = dtop(Dtop, 1.0, 5)
    flops = note({"method": "dtop, no exits"}, plain, plain, None)
    for confidence in options.confidences:
        for label, cls, context in (("dtop", Dtop, 5), ("dtop", Dtop, 0), ("random", ByLot, 5)):
            row = {"method": label, "confidence": confidence, "context": context}
            note(row, dtop(cls, confidence, context), plain, flops, each=label == "dtop")
    tower = zoo.load("tiny-vit")

    def dense(given: Tensor) -> Tensor:
        found: Tensor = tower.segment(given).argmax(-1)
        return found

    base = note({"method": "tiny-vit"}, dense, dense, None)
    for r in options.tome:

        def merged(given: Tensor, r: int = r) -> Tensor:
            with apply(tower, build("tome", {"r": r})) as applied:
                # The whole forward, so that the method's hooks see it; then the patch head on what is left.
                logits = tower.patch_head(tower.forward_features(given)[:, 1:])
                source = applied.trace[-1].source
            return logits.argmax(-1).gather(1, source)

        note({"method": "tome", "r": r}, merged, dense, base)
    small = zoo.load("tiny-vit")
    small.set_input_size(img_size=(48, 48))

    def pooled(given: Tensor) -> Tensor:
        logits = small.segment(F.avg_pool2d(given, 2)).transpose(1, 2).unflatten(2, (6, 6))
        return F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False).argmax(1).flatten(1)

    note({"method": "pool, half the side"}, pooled, dense, base)
    return results


if __name__ == "__main__":
    main()
