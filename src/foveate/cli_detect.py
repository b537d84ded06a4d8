"""`foveate detect`: who does what, where, in a video file."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from foveate.cli_common import DeviceOption, at_least, make_accelerator, make_console, progress_bar
from foveate.method import InputError

if TYPE_CHECKING:
    from foveate.data.video import VideoInfo
    from foveate.detect import Annotation, Detection, Keyframe, Stopwatch
    from foveate.methods.video.evad_detector import EvadDetector

DEFAULT_MODEL = "evad"


def detect(
    video: Annotated[Path, typer.Argument(metavar="VIDEO", help="The video file.")],
    out: Annotated[
        Path | None, typer.Option(help="Write the video with boxes, actions and kept tokens drawn onto it, an MP4.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write what was found; see docs/detect.md for the fields.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Shipped detector, or a folder that `foveate train evad` wrote.")
    ] = DEFAULT_MODEL,
    keep: Annotated[
        float | None, typer.Option(help="Share of tokens that each drop leaves, in (0, 1] [what the model has].")
    ] = None,
    every: Annotated[float, typer.Option(help="Seconds from keyframe to keyframe.")] = 0.5,
    rate: Annotated[
        float | None, typer.Option(help="Frames a second that the detector sees of its window [as it was trained].")
    ] = None,
    short: Annotated[
        int | None, typer.Option(help="Scale the shorter side to this many px [what the model was trained with].")
    ] = None,
    person: Annotated[float, typer.Option(help="Least score of a person.")] = 0.7,
    action: Annotated[float, typer.Option(help="Least score of an action.")] = 0.3,
    batch_size: Annotated[int, typer.Option(help="Windows computed together.")] = 4,
    device: DeviceOption = "auto",
) -> None:
    """Find the persons in a video and what they do; without --out and --json, print them."""
    from foveate.data.video import probe
    from foveate.detect import Annotation, Detection, Stopwatch

    for option, file, ending in (("--out", out, ".mp4"), ("--json", json, ".json")):
        if file is not None:
            _check_file(option, file, ending, video)
    at_least("--batch-size", batch_size, 1)
    info = probe(video)
    detector, labels, usual_rate, usual_short = _load(model)
    if keep is not None:
        detector.set_dropout(keep=keep)
    accelerator = make_accelerator(device)
    detector.to(accelerator.device if device == "auto" else device)
    watch = Stopwatch()
    detection = Detection(
        video, detector, labels, every=every, rate=usual_rate if rate is None else rate,
        short=usual_short if short is None else short, person=person, action=action, batch=batch_size, watch=watch,
    )  # fmt: skip
    annotation = None if out is None else Annotation(video, out, labels, watch)
    facts = _facts(video, info, model, detector, detection)
    _run(detection, annotation, json, info, facts, watch)


def _check_file(option: str, file: Path, ending: str, video: Path) -> None:
    from foveate.report.write import check_folder

    if file.suffix.lower() != ending:
        raise InputError(f"{option} {file}: the name must end in {ending}")
    if file.is_dir():
        raise InputError(f"{option} {file}: a folder, not a file")
    if file.exists() and video.exists() and file.samefile(video):
        raise InputError(f"{option} {file}: that is the video itself; give another name")
    check_folder(file.parent)


def _load(model: str) -> tuple[EvadDetector, list[str], float, int | None]:
    """The detector, names of its actions, frames a second that it is made for, and px of their shorter side."""
    from foveate import zoo
    from foveate.zoo.detector import labels, load_detector, rate, short

    if model in zoo.names():
        folder = zoo.path(model)
    elif Path(model).is_dir():
        folder = Path(model)
    elif model == DEFAULT_MODEL:
        raise InputError("no detector is shipped here; --model FOLDER takes what `foveate train evad` writes")
    else:
        raise InputError(f"unknown detector {model!r}: neither shipped ({DEFAULT_MODEL}), nor a folder here")
    detector = load_detector(folder)
    return detector, labels(folder, detector.classes), rate(folder), short(folder)


def _facts(
    video: Path, info: VideoInfo, model: str, detector: EvadDetector, detection: Detection
) -> dict[str, Any]:  # fmt: skip
    """What the JSON file says about how it was made."""
    from foveate.measure.environment import environment

    return {
        "video": {"file": video.name, "width": info.width, "height": info.height, "duration": info.duration},
        "model": {"name": model, "dropout": detector.dropout.hyperparameters()},
        "settings": detection.settings,
        "environment": environment(detector.mask_token.device, detector.mask_token.dtype),
    }


def _run(
    detection: Detection, annotation: Annotation | None, json: Path | None, info: VideoInfo, facts: dict[str, Any],
    watch: Stopwatch,
) -> None:  # fmt: skip
    from foveate.detect import KeyframesFile

    seen: Counter[str] = Counter()
    console = make_console()
    total = math.ceil(info.duration or 0)

    def closing() -> dict[str, Any]:
        return {
            "until": round(detection.now, 6),
            "broken": detection.broken,
            "seconds": {name: round(spent, 4) for name, spent in watch.seconds.items()},
        }

    file = None if json is None else KeyframesFile(json, facts, closing)
    with ExitStack() as stack:
        stack.callback(_say_partial, file, annotation)
        if file is not None:
            stack.enter_context(file)
        advance = stack.enter_context(progress_bar())

        def note(now: float) -> None:
            advance(int(now), max(total, int(now)), "seconds of video")

        def keyframes() -> Iterator[Keyframe]:
            for keyframe in detection:
                if file is not None:
                    file.add(keyframe)
                seen.update(["keyframes"], persons=len(keyframe.persons))
                seen.update(f"action {label}" for one in keyframe.persons for label, _ in one.actions)
                if annotation is None:
                    note(keyframe.time)
                    if file is None:
                        _print(console, keyframe)
                yield keyframe

        coming = keyframes()
        if annotation is not None:
            annotation.write(coming, note)
        for _ in coming:
            pass
    _notes(detection, annotation, info)
    if file is not None or annotation is not None:
        _summary(console, seen, watch)
        written = [one.result for one in (annotation, file) if one is not None]
        console.print(f"[bright_black]{' · '.join(escape(str(one)) for one in written)}[/]")


def _say_partial(*files: Any) -> None:
    """Where an interruption left what there is."""
    for one in files:
        if one is not None and one.result is not None and ".partial" in one.result.suffixes:
            print(f"interrupted; what there is until then is in {one.result}", file=sys.stderr)


def _print(console: Console, keyframe: Keyframe) -> None:
    """A line for each person."""
    for one in keyframe.persons:
        box = " ".join(f"{side:.0f}" for side in one.box)
        does = ", ".join(f"{label} {score:.2f}" for label, score in one.actions) or "–"
        console.print(Text(f"{keyframe.time:9.2f} s  person {one.score:.2f} at {box}: {does}"), soft_wrap=True)
    if not keyframe.persons:
        console.print(Text(f"{keyframe.time:9.2f} s  nobody", style="bright_black"))


def _notes(detection: Detection, annotation: Annotation | None, info: VideoInfo) -> None:
    if detection.broken:
        print(f"note: broken frames left out: {detection.broken}", file=sys.stderr)
    # A frame's own length, and what containers round, is no reason to speak.
    if info.duration is not None and info.duration - detection.now > 1:
        where = f"{detection.now:.1f} s of the file's {info.duration:.1f} s"
        print(f"note: the video ends after {where}", file=sys.stderr)
    if annotation is not None and annotation.left_out:
        print(f"note: an MP4 cannot hold the sound ({annotation.left_out}); it is left out", file=sys.stderr)


def _summary(console: Console, seen: Counter[str], watch: Stopwatch) -> None:
    console.print(Text(f"{seen['keyframes']} keyframes, {seen['persons']} persons in them", style="bold"))
    does = [(label.removeprefix("action "), count) for label, count in seen.most_common() if label[:7] == "action "]
    if does:
        console.print(Text(", ".join(f"{label} {count}×" for label, count in does)))
    whole = sum(watch.seconds.values())
    parts = ", ".join(f"{name} {spent:.1f} s ({spent / whole:.0%})" for name, spent in watch.seconds.items())
    console.print(Text(parts, style="bright_black"))
