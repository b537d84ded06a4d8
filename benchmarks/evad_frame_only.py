"""Whether scenes' actions need time: the detector against one that is trained and measured on the keyframe alone.

foveate train evad --out runs/evad
foveate train evad --set frame_only=true --out runs/evad-frame-only
python benchmarks/evad_frame_only.py --model runs/evad --frame-only runs/evad-frame-only

Same recipe, same clips, same number of inputs; the second model's frames are all the keyframe. Frame mAP at 0.5 on the
test split, in four settings:

clip           the first model on clips
frame only     the second on keyframes
stopped        the first on keyframes: what it owes to motion
no knowledge   the true boxes, each said to do everything: what an action's average precision is without looking
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from llava_shaped import write

from foveate.data.scenes import ACTIONS, Clips
from foveate.measure.detection import frame_map
from foveate.method import InputError
from foveate.methods.video.evad import EvadDetector
from foveate.train.evad import EvadSettings, evaluate, sample_of


def load(folder: Path, scenes: int) -> tuple[EvadDetector, EvadSettings, dict[str, Any]]:
    """A trained model, its settings for `scenes` test clips, and how it was trained."""
    try:
        training = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["training"]
    except FileNotFoundError:
        raise InputError(f"{folder}: no metrics.json; train with foveate train evad --out {folder}") from None
    known = {field.name for field in dataclasses.fields(EvadSettings)}
    given = {name: value for name, value in training["settings"].items() if name in known}
    return EvadDetector.from_pretrained(folder), EvadSettings(**(given | {"test_scenes": scenes})), training


def no_knowledge(clips: Clips, settings: EvadSettings) -> dict[str, Any]:
    truth = [(one.boxes, one.labels) for one in (sample_of(clips, k, settings) for k in range(settings.test_scenes))]
    return frame_map([(boxes, torch.ones(labels.shape)) for boxes, labels in truth], truth, ACTIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="what foveate train evad wrote")
    parser.add_argument("--frame-only", type=Path, required=True, help="the same with --set frame_only=true")
    parser.add_argument("--keep", type=float, default=1.0, help="of both models' dropout (1: dense)")
    parser.add_argument("--test-scenes", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the test clips")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        moving, settings, trained = load(options.model, options.test_scenes)
        still, still_settings, still_trained = load(options.frame_only, options.test_scenes)
        differs = {
            name: (value, theirs)
            for name, value in dataclasses.asdict(settings).items()
            if (theirs := getattr(still_settings, name)) != value
        }
        if differs.pop("frame_only", None) != (False, True):
            raise InputError("--model must be trained without frame_only, --frame-only with it")
        if odd := differs.keys() & {"config", "size", "frames", "stride", "hidden", "layers", "heads"}:
            raise InputError(f"the models see different clips or have different shapes: {', '.join(sorted(odd))}")
    except InputError as error:
        parser.error(str(error))
    clips = Clips("test", options.seed, frames=settings.frames * settings.stride, size=settings.size)
    results = {
        "clip": evaluate(moving.set_dropout(keep=options.keep), clips, settings),
        "frame only": evaluate(still.set_dropout(keep=options.keep), clips, still_settings),
        "stopped": evaluate(moving, clips, still_settings),
        "no knowledge": no_knowledge(clips, settings),
    }
    for name, row in results.items():
        boxes = row.get("box_average_precision", 1.0)
        print(f"{name:<13} frame mAP {row['frame_map']:.3f}, boxes {boxes:.3f}")
    for action in results["clip"]["average_precision"]:
        print(f"{action:<13}", *(f"{name} {row['average_precision'][action]:.3f} " for name, row in results.items()))
    commands = {"clip": trained["command"], "frame only": still_trained["command"]}
    # More steps for one, say, and it is no fair comparison: whoever reads the results must see it.
    print("settings that differ besides frame_only:", differs or "none")
    write("evad_frame_only", options, {"trained": commands, "settings_that_differ": differs, "results": results})


if __name__ == "__main__":
    main()
