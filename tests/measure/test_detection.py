"""Frame mAP against cases counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchmetrics")
pytest.importorskip("pycocotools")

from foveate.measure.detection import box_average_precision, frame_map
from foveate.method import InputError

A, B, C = [0.0, 0, 10, 10], [20.0, 20, 40, 40], [60.0, 0, 80, 30]
NAMES = ("run", "jump", "sit")


def boxes(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).reshape(-1, 4)


def shifted(box: list[float], dx: float) -> list[float]:
    return [box[0] + dx, box[1], box[2] + dx, box[3]]


def test_everything_right_is_one_and_classes_that_do_not_occur_do_not_count() -> None:
    truth = [(boxes(A, B), torch.tensor([[1, 1, 0], [0, 1, 0]])), (boxes(), torch.zeros(0, 3))]
    found = [
        (boxes(A, B), torch.tensor([[0.9, 0.8, 0.0], [0.1, 0.7, 0.1]])),
        (boxes(C), torch.tensor([[0.0, 0.0, 0.9]])),
    ]
    result = frame_map(found, truth, NAMES)
    assert result["keyframes"] == 2 and set(result["average_precision"]) == {"run", "jump"}
    assert result["frame_map"] == pytest.approx(1, abs=1e-3)


def test_precision_and_recall_counted_by_hand() -> None:
    """Ranked for "run": right, wrong, right, wrong; three are true. So: 1 to recall 1/3, 2/3 to 2/3, then 0."""
    truth = [(boxes(A, B), torch.tensor([[1], [1]])), (boxes(C), torch.tensor([[1]]))]
    found = [
        (boxes(A, [90.0, 90, 99, 99], B), torch.tensor([[0.9], [0.8], [0.7]])),
        (boxes(shifted(C, 15)), torch.tensor([[0.6]])),
    ]
    assert frame_map(found, truth, ("run",))["frame_map"] == pytest.approx(1 / 3 + 2 / 3 / 3, abs=2e-3)


def test_boxes_count_from_half_an_overlap_on() -> None:
    # Shifted by d, two boxes of width 10 overlap by (10 - d) / (10 + d): 0.5 at a third of the width.
    for shift, right in ((3.2, True), (3.4, False)):
        found, truth = [(boxes(shifted(A, shift)), torch.tensor([[0.5]]))], [(boxes(A), torch.tensor([[1]]))]
        assert frame_map(found, truth, ("run",))["frame_map"] == pytest.approx(float(right), abs=1e-3)


def test_a_second_box_on_the_same_person_is_wrong() -> None:
    truth = [(boxes(A, B), torch.tensor([[1], [1]]))]
    found = [(boxes(A, A, B), torch.tensor([[0.9], [0.8], [0.7]]))]
    assert frame_map(found, truth, ("run",))["frame_map"] == pytest.approx(0.5 + 0.5 * 2 / 3, abs=2e-3)


def test_boxes_of_other_keyframes_do_not_count() -> None:
    truth = [(boxes(A), torch.tensor([[1]])), (boxes(B), torch.tensor([[1]]))]
    found = [(boxes(B), torch.tensor([[0.9]])), (boxes(B), torch.tensor([[0.8]]))]
    assert frame_map(found, truth, ("run",))["frame_map"] == pytest.approx(0.5 * 0.5, abs=2e-3)


def test_the_mean_is_over_actions() -> None:
    truth = [(boxes(A, B), torch.tensor([[1, 0], [1, 1]]))]
    found = [(boxes(A), torch.tensor([[0.9, 0.9]]))]
    result = frame_map(found, truth, ("run", "jump"))
    assert result["average_precision"]["run"] == pytest.approx(0.5, abs=2e-3)
    assert result["average_precision"]["jump"] == 0
    assert result["frame_map"] == pytest.approx(0.25, abs=1e-3)


def test_boxes_alone() -> None:
    found = [(boxes(A, C), torch.tensor([0.9, 0.2])), (boxes(), torch.zeros(0))]
    assert box_average_precision(found, [boxes(A), boxes(B)]) == pytest.approx(0.5, abs=2e-3)


def test_what_cannot_be_measured() -> None:
    with pytest.raises(InputError, match="1 keyframes were found, 2 are true"):
        frame_map([(boxes(A), torch.ones(1, 1))], [(boxes(A), torch.ones(1, 1))] * 2, ("run",))
    with pytest.raises(InputError, match="no action occurs"):
        frame_map([(boxes(A), torch.ones(1, 1))], [(boxes(), torch.zeros(0, 1))], ("run",))
