"""What the trained action detector can do: ways to drop tokens side by side, and whether its actions need time.

python benchmarks/evad_quality.py                                  the zoo's weights

Frame mAP at 0.5 on the test split, all with the same weights: every way to drop tokens that the recipe trains with
(`foveate.train.evad.VARIANTS`), random without protecting the keyframe, which it does not, and

stopped        dense, on clips that stand still at the keyframe: what is left without motion
no knowledge   the true boxes, each said to do everything: what an action's average precision is without looking

With --frame-only FOLDER also a model that was trained on keyframes alone,

foveate train evad --set frame_only=true --out runs/evad-frame-only

and with --others FOLDER … models that were trained with other dropouts, each measured with its own. --as-trained leaves
out all that is measured otherwise: quicker, for more test clips (--seed).
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
from foveate.methods.video.evad_detector import EvadDetector
from foveate.train.evad import VARIANTS, EvadSettings, evaluate, sample_of

_ZOO = Path(__file__).parent.parent / "src/foveate/zoo/evad"


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
    truth = [(one.boxes, one.labels) for one in (sample_of(clips[k], settings) for k in range(settings.test_scenes))]
    return frame_map([(boxes, torch.ones(labels.shape)) for boxes, labels in truth], truth, ACTIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=_ZOO, help="what foveate train evad wrote")
    parser.add_argument("--frame-only", type=Path, help="the same with --set frame_only=true")
    parser.add_argument(
        "--others", type=Path, nargs="*", default=[], help="trained otherwise, each measured as trained"
    )
    parser.add_argument("--as-trained", action="store_true", help="every model with its own dropout, no more")
    parser.add_argument("--test-scenes", type=int, default=1000)
    parser.add_argument("--result", default="evad_quality", help="name of the JSON file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the test clips")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        moving, settings, trained = load(options.model, options.test_scenes)
        still = None if options.frame_only is None else load(options.frame_only, options.test_scenes)
        differs = {} if still is None else _differences(settings, still[1])
        others = [load(folder, options.test_scenes) for folder in options.others]
    except InputError as error:
        parser.error(str(error))

    def seen(by: EvadSettings) -> Clips:
        return Clips("test", options.seed, frames=by.frames * by.stride, size=by.size)

    clips = seen(settings)
    whole = {"keep": 1.0, "select": "attention", "protect_keyframe": True}
    rows: list[dict[str, Any]] = []

    def note(name: str, figures: dict[str, Any]) -> None:
        rows.append({"name": name, **figures})
        boxes = figures.get("box_average_precision", 1.0)
        print(f"{name:<60} frame mAP {figures['frame_map']:.3f}, boxes {boxes:.3f}", flush=True)

    if options.as_trained:
        others.insert(0, (moving, settings, trained))
    else:
        for variant in (*VARIANTS, *({"keep": k, "select": "random", "protect_keyframe": False} for k in (0.7, 0.5))):
            note(json.dumps(variant), evaluate(moving.set_dropout(**(whole | variant)), clips, settings))
        moving.set_dropout(**whole)
        note("stopped", evaluate(moving, clips, dataclasses.replace(settings, frame_only=True)))
        note("no knowledge", no_knowledge(clips, settings))
    commands = {"model": trained["command"]}
    if still is not None:
        note("frame only", evaluate(still[0].set_dropout(**whole), clips, still[1]))
        commands["frame only"] = still[2]["command"]
        # More steps for one, say, and it is no fair comparison: whoever reads the results must see it.
        print("settings that differ besides frame_only:", differs or "none")
    for model, theirs, training in others:
        trained_with = {name: getattr(theirs, name) for name in (*whole, "guide")}
        note(f"trained and measured with {json.dumps(trained_with)}", evaluate(model, seen(theirs), theirs))
        commands[json.dumps(trained_with)] = training["command"]
    write(options.result, options, {"trained": commands, "settings_that_differ": differs, "results": rows})


def _differences(settings: EvadSettings, still: EvadSettings) -> dict[str, Any]:
    """How the settings of two trainings differ besides `frame_only`; InputError where that makes no sense."""
    differs = {
        name: (value, theirs)
        for name, value in dataclasses.asdict(settings).items()
        if (theirs := getattr(still, name)) != value
    }
    if differs.pop("frame_only", None) != (False, True):
        raise InputError("--model must be trained without frame_only, --frame-only with it")
    if odd := differs.keys() & {"config", "size", "frames", "stride", "hidden", "layers", "heads"}:
        raise InputError(f"the models see different clips or have different shapes: {', '.join(sorted(odd))}")
    return differs


if __name__ == "__main__":
    main()
