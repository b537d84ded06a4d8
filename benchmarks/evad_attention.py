"""Whether EVAD's dropout finds the actors: which tokens outside of the keyframe are left behind the last drop.

python benchmarks/evad_attention.py runs/keep07 runs/random

Each model with its own dropout, on clips of the size that it was trained with. `kept` is the share of the tokens
outside of the keyframe that are left, which is what a choice by chance leaves of anything; `actors_kept` the share of
those that show an actor, `actors` how many of all do.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from evad_quality import load
from llava_shaped import write
from torch import Tensor

from foveate.data.ava import collate
from foveate.data.scenes import Clips
from foveate.method import InputError
from foveate.methods.video.evad_detector import EvadDetector, normalised
from foveate.train.evad import EvadSettings, sample_of, shows_actor


@torch.no_grad()
def measured(model: EvadDetector, settings: EvadSettings, clips: Clips) -> dict[str, Any]:
    """Shares over all test clips, and of the actors' tokens also slot by slot."""
    left: list[Tensor] = []
    shown: list[Tensor] = []
    for number in range(settings.test_scenes):
        clip = clips[number]
        encoded = model.encode(normalised(collate([sample_of(clip, settings)])["clip"]))
        left.append((encoded.source[0] >= 0).view(encoded.grid))
        shown.append(shows_actor(clip, settings, model.tubelet, model.patch).view(encoded.grid))
    stays, actors = torch.stack(left), torch.stack(shown)
    slots = stays.shape[1]
    others = torch.arange(slots) != slots // 2
    there = stays[:, others], actors[:, others]
    return {
        "kept": float(there[0].float().mean()),
        "actors": float(there[1].float().mean()),
        "actors_kept": _among(*there),
        "actors_kept_by_slot": [_among(stays[:, t], actors[:, t]) for t in range(slots)],
    }


def _among(stays: Tensor, actors: Tensor) -> float:
    return float((stays & actors).sum() / actors.sum().clamp(min=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="what foveate train evad wrote")
    parser.add_argument("--test-scenes", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the test clips")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for folder in options.models:
        try:
            model, settings, training = load(folder, options.test_scenes)
        except InputError as error:
            parser.error(str(error))
        clips = Clips("test", options.seed, frames=settings.frames * settings.stride, size=settings.size)
        about = {name: getattr(settings, name) for name in ("size", "keep", "select", "protect_keyframe", "guide")}
        rows.append({**about, **measured(model, settings, clips), "trained": training["command"]})
        print(folder.name, rows[-1], flush=True)
    write("evad_attention", options, {"results": rows})


if __name__ == "__main__":
    main()
