"""Frame mAP at an IoU of 0.5, as AVA measures action detection, on COCO's evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.method import InputError

_RECALLS = 1001
"""AVA takes the area under the interpolated precision; with so many points COCO's mean is within 0.001 of it."""
MAX_BOXES = 100
"""Of one frame and class; the evaluator takes the best of more."""


def frame_map(
    found: Sequence[tuple[Tensor, Tensor]], truth: Sequence[tuple[Tensor, Tensor]], names: Sequence[str]
) -> dict[str, Any]:
    """Mean average precision over the actions that occur, each box counting once for each of its actions.

    A box is right for an action if it overlaps a true box that does it by at least 0.5 and none with a higher score
    has taken that; it is compared with the true box that it overlaps most of those still free (AVA's own script does
    not offer the next one).

    Args:
        found: of each keyframe boxes (n, 4) px and scores (n, classes).
        truth: of each keyframe boxes (A, 4) px and labels (A, classes).
        names: of the classes.

    Returns:
        "frame_map", "average_precision" by name (only what occurs), "keyframes".

    Raises:
        InputError: for different numbers of keyframes, or if torchmetrics and pycocotools are not installed.
    """
    if len(found) != len(truth) or not found:
        raise InputError(f"{len(found)} keyframes were found, {len(truth)} are true; there must be as many, and some")
    metric = _metric()
    for (boxes, scores), (theirs, labels) in zip(found, truth):
        box, action = torch.ones_like(scores, dtype=torch.bool).nonzero(as_tuple=True)
        there, does = labels.nonzero(as_tuple=True)
        metric.update(
            [{"boxes": boxes[box].float(), "scores": scores[box, action].float(), "labels": action}],
            [{"boxes": theirs[there].float(), "labels": does}],
        )
    result = metric.compute()
    numbers = result["classes"].reshape(-1).tolist()
    values = result["map_per_class"].reshape(-1).tolist()
    # -1 where a class was found and does not occur.
    precision = {names[number]: value for number, value in zip(numbers, values) if value >= 0}
    if not precision:
        raise InputError("no action occurs in these keyframes, so that there is nothing to measure")
    return {
        "frame_map": sum(precision.values()) / len(precision),
        "average_precision": precision,
        "keyframes": len(found),
    }


def box_average_precision(found: Sequence[tuple[Tensor, Tensor]], truth: Sequence[Tensor]) -> float:
    """Average precision of boxes alone: found boxes (n, 4) with scores (n,), true boxes (A, 4), of each keyframe."""
    pairs = [(boxes, scores.unsqueeze(1)) for boxes, scores in found]
    there = [(boxes, torch.ones(len(boxes), 1)) for boxes in truth]
    return float(frame_map(pairs, there, ("box",))["frame_map"])


def _metric() -> Any:
    try:
        import pycocotools  # noqa: F401
        from torchmetrics.detection import MeanAveragePrecision
    except ImportError:
        raise InputError("frame mAP needs torchmetrics and pycocotools: pip install 'foveate[metrics]'") from None
    metric = MeanAveragePrecision(
        iou_thresholds=[0.5], rec_thresholds=torch.linspace(0, 1, _RECALLS).tolist(), class_metrics=True,
        max_detection_thresholds=[1, 10, MAX_BOXES],
    )  # fmt: skip
    # It warns of many boxes over all classes, but the evaluator limits them within each.
    metric.warn_on_many_detections = False
    return metric
