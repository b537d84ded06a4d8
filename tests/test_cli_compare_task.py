from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.methods.reduce.hot import Hot
from motion_files import walking

Run = Callable[..., tuple[int, str, str]]


def noise(file: Path, seed: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task sleep", "--task: unknown 'sleep'"),
        ("--data d", "--task answering takes no --data"),
        ("--task recognition --dataset d.jsonl", "--task recognition takes no --dataset; it takes --data"),
        ("--task recognition --data d", "d: no such folder"),
        ("--task recognition --data empty", "no folders of classes"),
        ("--task segmentation --data empty", "empty/images: no such folder"),
        ("--task recognition --model nothing", "unknown model 'nothing'"),
        ("--task recognition --methods stvit", "stvit needs weights: name a folder that `foveate train stvit` wrote"),
        ("--task recognition --methods runs/stvit", "runs/stvit: no trained model here"),
        ("--task recognition --methods nonsense", "unknown method 'nonsense'"),
        ("--task recognition --methods pyramiddrop", "pyramiddrop acts inside a language model"),
        ("--task pose", "--task pose needs --model"),
        ("--task pose --model empty", "empty: no trained model here"),
    ],
)
def test_bad_input_is_one_line(run: Run, tmp_path: Path, arguments: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    code, out, err = run("compare", *arguments.split())
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err, err


def test_recognition_of_a_folder_with_a_broken_picture(run: Run, tmp_path: Path) -> None:
    for k, name in enumerate(("fox", "dog", "snow man")):
        noise(tmp_path / f"d/{name}/a.png", k)
    (tmp_path / "d/fox/b.png").write_bytes(b"no picture")
    code, out, err = run("compare", "--task", "recognition", "--data", "d", "--methods", "tome", "--keep", "0.5")
    assert code == 1 and "d/fox/b.png: not a picture that can be read" in err
    assert "classes are none of tiny-vit's (snow man)" in err
    assert "top-1" in out and "Choice:" in out and "mAP" not in out
    page = (tmp_path / "foveate-out/report.html").read_text()
    assert "3 pictures" in page and "snow man" in page and page.count("<figure") > 4 and "end of the encoder" in page
    values = json.loads((tmp_path / "foveate-out/comparison.json").read_text())
    assert values["name"] == "recognition" and "top-1" in values["rows"][0]["figures"]


def test_segmentation_of_scenes(run: Run, tmp_path: Path) -> None:
    asked = ["compare", "--task", "segmentation", "--samples", "3", "--methods", "tome", "--keep", "0.5", "--out", "o"]
    code, out, err = run(*asked)
    assert (code, err) == (0, "") and "mean IoU" in out and "resolution" in out
    assert "patches right" in (tmp_path / "o/report.html").read_text()


def test_pose(run: Run, tmp_path: Path) -> None:
    small = {"frames": 9, "width": 16, "depth": 3, "heads": 2, "recovery_heads": 2}
    (tmp_path / "m").mkdir()
    walking(tmp_path / "m", count=8)
    torch.manual_seed(0)
    Hot.named("tiny", **small, keep=9, recovery="none").save_pretrained(tmp_path / "host")
    Hot.named("tiny", **small, keep=3).save_pretrained(tmp_path / "hot")
    asked = ["compare", "--task", "pose", "--model", "host", "--data", "m", "--samples", "4", "--keep", "0.34"]
    code, out, err = run(*asked, "--methods", "hot,hot=hot")
    assert (code, err) == (0, "") and "MPJPE" in out and "(mm)" in out and "frames" in out
    page = (tmp_path / "foveate-out/report.html").read_text()
    assert "Which frames can host do without?" in page and "mean joint error (mm)" in page
    code, _, err = run(*asked, "--methods", "tome")
    assert code == 2 and "tome does not choose frames" in err
