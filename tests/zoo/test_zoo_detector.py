from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from foveate import zoo
from foveate.method import InputError
from foveate.zoo.detector import labels, load_detector, rate, short
from tiny_video import detector


def test_a_folder_gives_back_what_was_saved(tmp_path: Path) -> None:
    model = detector(keep=0.6)
    model.save_pretrained(tmp_path)
    loaded = zoo.load_folder(tmp_path)
    clip = torch.randn(1, 3, 8, 32, 32)
    with torch.no_grad():
        ours, theirs = loaded(clip), model(clip)
    assert torch.equal(ours.boxes, theirs.boxes) and torch.equal(ours.actions, theirs.actions)
    assert not loaded.training and loaded.dropout.keep == 0.6


def test_it_looks_as_often_as_it_was_trained_to(tmp_path: Path) -> None:
    """Clips of scenes have 15 frames a second; the paper takes every fourth of 30."""
    assert rate(tmp_path) == 7.5 and short(tmp_path) is None
    for stride, frames_a_second in ((1, 15.0), (2, 7.5), (3, 5.0)):
        (tmp_path / "metrics.json").write_text(json.dumps({"training": {"settings": {"stride": stride, "size": 96}}}))
        assert rate(tmp_path) == frames_a_second and short(tmp_path) == 96
    (tmp_path / "metrics.json").write_text("{}")
    assert rate(tmp_path) == 7.5 and short(tmp_path) is None


def test_names_of_actions(tmp_path: Path) -> None:
    # As AVA counts.
    assert labels(tmp_path, 3) == ["1", "2", "3"]
    (tmp_path / "labels.json").write_text('["walk", "run", "sit"]')
    assert labels(tmp_path, 3) == ["walk", "run", "sit"]
    for text in ('["walk"]', '{"walk": 1}', "[1, 2, 3]"):
        (tmp_path / "labels.json").write_text(text)
        with pytest.raises(InputError, match=r"labels\.json: a list of 3 names"):
            labels(tmp_path, 3)


def test_what_is_no_detector_is_said_in_one_line(tmp_path: Path) -> None:
    detector().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def refused(said: str) -> None:
        with pytest.raises(InputError, match=said) as caught:
            load_detector(tmp_path)
        assert "\n" not in str(caught.value)

    for change, said in (
        ({"hidden": 32}, "its weights cannot be loaded: Error"), ({"heads": 3}, r"config\.json: hidden must be"),
        ({"unknown": 1}, "its weights cannot be loaded: .*unknown"), ({"layers": 5}, "its weights cannot be loaded"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        refused(said)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    refused("its weights cannot be loaded")
    (tmp_path / "model.safetensors").unlink()
    refused("its weights cannot be loaded")
    for text, said in (("[]", "no action detector"), ('{"name": "x"}', "no action detector"), ("{", "no JSON")):
        (tmp_path / "config.json").write_text(text)
        refused(said)
    (tmp_path / "config.json").unlink()
    refused("no model here")
