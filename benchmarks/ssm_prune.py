"""ToP on a tiny Vision Mamba: what pruning costs without training and with it, beside peers of the same cost.

A dense model is trained by `foveate train ssm-prune` on scenes. `zero_shot`: that model with each alignment, each
score, tokens by lot or merged, and pictures of fewer pixels (no pruning; position embeddings resized). `fine_tuned`:
each alignment, and the dense model, after as many further steps from the same weights. FLOPs are those of one picture;
time is of batches, beside the dense model, from interleaved pairs. ToMe's matching takes the tokens themselves for
keys, which scans do not have, and as many of them in the same layers; means of neighbours are the pictures of fewer
pixels. One thread measures best.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from llava_shaped import write
from slimmer import beside
from torch import Tensor
from torch.nn import functional as F

from foveate import train
from foveate.methods.reduce.ssm_prune import SCORES, SsmPrune
from foveate.nn.matching import partners
from foveate.tokens import Tokens
from foveate.train.fine_tune import average_precision

ALIGNMENTS = ("decay", "copy", "none")


class ByLot(SsmPrune):
    """As many tokens stay, whichever they are."""

    @torch.no_grad()
    def choose(self, y: Tensor) -> Tensor:
        return super().choose(torch.rand_like(y[..., :1]))


class Merged(SsmPrune):
    """ToMe's matching, on tokens instead of keys: as many patches as would go join those that are most like them, and
    stand where these stand."""

    def shorten(self, x: Tensor, positions: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        middle, left = x.shape[1] // 2, self.kept(x.shape[1]) - 1
        patches, own = torch.cat([x[:, :middle], x[:, middle + 1 :]], 1), slice(middle, middle + 1)
        into = partners(patches, patches.shape[1] - left, "place")
        merged = Tokens.from_grid(patches, (1, patches.shape[1])).merge(into, groups=left).x
        places = torch.cat([positions[:, :middle], positions[:, middle + 1 :]], 1)
        # Groups are numbered by the place of the token that is joined, which is odd, or alone.
        number = torch.arange(patches.shape[1], device=x.device).expand_as(into)
        odd_last = number + number % 2 * patches.shape[1]
        leader = into.new_zeros(len(x), left).scatter_reduce_(1, into, odd_last, "amax") % patches.shape[1]
        places = places.gather(1, leader)
        half = left // 2
        return (
            torch.cat([merged[:, :half], x[:, own], merged[:, half:]], 1),
            torch.cat([places[:, :half], positions[:, own], places[:, half:]], 1),
        )


class Smaller(torch.nn.Module):
    """The model on pictures of `side` px."""

    def __init__(self, model: SsmPrune, side: int) -> None:
        super().__init__()
        old = model.grid[0]
        self.model = SsmPrune.named("tiny", image=side, keep=1.0)
        new = self.model.grid[0]
        state = model.state_dict()
        whole = state["pos_embed"]
        middle = whole.shape[1] // 2
        patches = torch.cat([whole[:, :middle], whole[:, middle + 1 :]], 1)
        plane = patches.transpose(1, 2).unflatten(2, (old, old))
        resized = F.interpolate(plane, (new, new), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
        half = new**2 // 2
        state["pos_embed"] = torch.cat([resized[:, :half], whole[:, middle : middle + 1], resized[:, half:]], 1)
        self.model.load_state_dict(state)
        self.side = side

    def forward(self, pictures: Tensor) -> Tensor:
        small = F.interpolate(pictures, (self.side, self.side), mode="bilinear", antialias=True)
        logits: Tensor = self.model(small)
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ssm-prune"), help="where trainings are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=900, help="of the dense model")
    parser.add_argument("--finetune-steps", type=int, default=200)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.7], help="shares; the middle is tuned")
    parser.add_argument("--sides", type=int, nargs="+", default=[80, 64], help="px of the smaller pictures")
    parser.add_argument("--test", type=int, default=1000, help="scenes of the test split")
    parser.add_argument("--batch", type=int, default=16, help="pictures that are timed at once")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved pairs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a few steps, nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    scenes = 6 if options.smoke else options.test
    pictures = torch.randn(options.batch, 3, 96, 96)

    def trained(label: str, steps: int, **settings: Any) -> tuple[Path, dict[str, Any]]:
        folder = options.out / label
        if not options.smoke:
            settings |= {"steps": steps, "test_scenes": scenes}
        run = train.run(
            "ssm-prune", out=folder, seed=options.seed, smoke=options.smoke, threads=options.threads, **settings
        )
        return folder, run

    weights, _ = trained("dense", options.steps, finetune_steps=0)
    dense = SsmPrune.from_pretrained(weights).eval().set_pruning(keep=1.0)

    def row(label: str, model: torch.nn.Module, **settings: Any) -> dict[str, Any]:
        found = {"method": label, **settings, "names_mean_average_precision": average_precision(model, scenes)}
        found |= beside(dense, model, pictures, options.pairs)
        print(found, flush=True)
        return found

    untrained = [{"method": "dense", "names_mean_average_precision": average_precision(dense, scenes)}]
    print(untrained[0], flush=True)
    for keep in options.keep:
        for align in ALIGNMENTS:
            model = SsmPrune.from_pretrained(weights).eval().set_pruning(keep=keep, align=align)
            untrained.append(row("ssm-prune", model, keep=keep, align=align))
        for score in SCORES:
            if score != "clip":
                model = SsmPrune.from_pretrained(weights).eval().set_pruning(keep=keep, align="decay", score=score)
                untrained.append(row("ssm-prune", model, keep=keep, align="decay", score=score))
        for name, cls in {"random": ByLot, "merged as by ToMe": Merged}.items():
            model = cls.from_pretrained(weights).eval().set_pruning(keep=keep, align="decay")
            untrained.append(row(name, model, keep=keep, align="decay"))
    untrained += [row("smaller picture", Smaller(dense, side).eval(), side=side) for side in options.sides]

    middle, tuned = sorted(options.keep)[len(options.keep) // 2], []
    steps = options.finetune_steps
    for label, settings in (("dense", {"keep": 1.0}), *((one, {"keep": middle, "align": one}) for one in ALIGNMENTS)):
        count = {} if options.smoke else {"finetune_steps": steps}
        _, run = trained(f"tuned-{label}", steps, weights=str(weights), lr=3e-4, **count, **settings)
        found = {"method": label, "further_steps": steps, **settings, **run["by_rule"][label]}
        print(found, flush=True)
        tuned.append(found)
    if not options.smoke:
        write("ssm_prune", options, {"zero_shot": untrained, "fine_tuned": tuned})


if __name__ == "__main__":
    main()
