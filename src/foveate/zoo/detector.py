"""The zoo's action detector, and any other that `foveate train evad` wrote: weights, configuration, actions' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from foveate.method import InputError, whole
from foveate.methods.video.evad_detector import EvadDetector
from foveate.zoo import read_json

RATE = 7.5
"""Frames a second that the paper's detectors look at: every fourth of 30."""
SCENES_RATE = 15.0
"""Frames a second that clips of scenes are taken to have."""


def is_detector(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is of an `EvadDetector`."""
    return "tubelet" in config and "proposals" in config


def load_detector(folder: str | Path) -> EvadDetector:
    """The detector in float32 and eval mode.

    Raises:
        InputError: no detector there, or one whose weights do not fit its configuration.
    """
    folder = Path(folder)
    config = read_json(folder, "config.json", "detector")
    if not isinstance(config, dict) or not is_detector(config):
        raise InputError(f"{folder}: no action detector; `foveate train evad` writes one")
    try:
        detector = EvadDetector(**config)
        detector.load_state_dict(load_file(folder / "model.safetensors"))
    except InputError as error:
        raise InputError(f"{folder}/config.json: {error}") from None
    except (OSError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise InputError(f"{folder}: its weights cannot be loaded: {reason}") from None
    return detector.eval()


def labels(folder: str | Path, count: int) -> list[str]:
    """Names of the `count` actions of the detector there: those of `labels.json`, or without such a file "1", "2", …

    Raises:
        InputError: a file with something else in it.
    """
    folder = Path(folder)
    if not (folder / "labels.json").exists():
        return [str(number + 1) for number in range(count)]
    names = read_json(folder, "labels.json", "detector")
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        raise InputError(f"{folder}/labels.json: a list of {count} names was expected, one for each action")
    return names


def rate(folder: str | Path) -> float:
    """Frames a second that the detector there looks at: as its `metrics.json` says that it was trained on scenes, or
    without such a file `RATE`."""
    stride = _trained(folder, "stride")
    return RATE if stride is None else SCENES_RATE / stride


def short(folder: str | Path) -> int | None:
    """Px of the shorter side of the frames that the detector there was trained on, if its `metrics.json` says so; its
    table of positions may be for another size."""
    return _trained(folder, "size")


def _trained(folder: str | Path, setting: str) -> int | None:
    """A setting, at least 1, of the training that `metrics.json` tells of."""
    folder = Path(folder)
    if not (folder / "metrics.json").exists():
        return None
    try:
        return whole(setting, read_json(folder, "metrics.json", "detector")["training"]["settings"][setting], 1)
    except (KeyError, TypeError):
        return None
