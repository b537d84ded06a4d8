from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate import zoo
from foveate.data.samples import from_scenes
from foveate.methods.probe.verbose_images import _Target

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def probe(run: Run) -> Run:
    """Runs `foveate probe verbose` in an empty folder: exit code, stdout, stderr."""
    return functools.partial(run, "probe", "verbose")


needs_zoo = pytest.mark.skipif("tiny-llava" not in zoo.names(), reason="tiny-llava is not trained yet")

BAD = [
    (["--bogus"], "--bogus"),
    (["--iterations", "0"], "iterations must be a whole number >= 1"),
    (["--eps", "8/0"], "'8/0' is not a number"),
    (["--eps", "some"], "'some' is not a number"),
    (["--eps", "2"], "eps must be a number in [0, 1]"),
    (["--max-new-tokens", "0"], "max_new_tokens"),
    (["--seed", "-1"], "seed"),
    (["--set", "stepz=1"], "no setting 'stepz'; --set takes step, unit"),
    (["--set", "eps=1"], "an option of its own, --eps"),
    (["--set", "top_p=2"], "top_p must be"),
    (["--prompt", "p"], "--prompt needs --image"),
    (["--image", "none.png"], "no such picture"),
    (["--methods", "ai"], "did you mean aim"),
    (["--methods", "verbose-images"], "not applied to a model"),
    (["--methods", ","], "no name"),
    (["--keep", "0.5"], "--keep needs --methods"),
    (["--methods", "aim", "--keep", "0"], "--keep must be"),
    (["--methods", "pyramiddrop", "--keep", "0.1"], "as little as 0.1"),
    (["--model", "tiny-lava"], "did you mean tiny-llava"),
    (["--dtype", "float61"], "did you mean float16"),
    (["--max-new-tokens", "4000"], "more than the 2048 tokens"),
]


@needs_zoo
@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line(probe: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, out, err = probe(*arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err
    assert not list(tmp_path.iterdir())


@needs_zoo
def test_probe_writes_what_it_prints(probe: Run, tmp_path: Path) -> None:
    code, out, err = probe(
        "--iterations", "2", "--max-new-tokens", "4", "--methods", "aim", "--set", "samples=2", "--eps", "4/255",
        "--out", "o",
    )  # fmt: skip
    assert (code, err) == (0, ""), err
    assert sorted(one.name for one in (tmp_path / "o").iterdir()) == ["verbose.json", "verbose.png"]
    found: dict[str, Any] = json.loads((tmp_path / "o/verbose.json").read_text())
    assert found["complete"] and len(found["iterations"]) == 2 and found["settings"]["samples"] == 2
    assert [one["method"] for one in found["methods"]] == ["aim"]
    assert [one["picture"] for one in found["answers"]][:2] == ["clean", "random noise"]
    for one in found["answers"]:
        assert len(one["lengths"]) == 2 and max(one["tokens"]) <= 4
        line = next(line for line in out.splitlines() if line.startswith(one["picture"] + "  "))
        assert f"{one['mean']:.1f}" in line and f"{one['mean'] / found['answers'][0]['mean']:.2f}" in line
    assert "tiny-llava with aim at 0.5; 2 iterations, eps 0.01569 (pixel), at most 4 tokens" in out
    # 8 layers of 4 heads of 32, keys and values, float32.
    assert found["decode"]["kv_bytes"] == 8 * 2 * 128 * 4 and "8,192 bytes" in out
    # The model sees the scene's 96 x 96 pixels as they are.
    picture = np.asarray(Image.open(tmp_path / "o/verbose.png")).astype(int)
    change = np.abs(picture - np.asarray(from_scenes("test", 1, 0)[0].images[0]).astype(int))
    assert 0 < change.max() <= 4


@needs_zoo
def test_interruption_keeps_what_there_is(probe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (50, 80), (200, 100, 50)).save(tmp_path / "a.png")
    (tmp_path / "o").mkdir()
    (tmp_path / "o/verbose.json").write_text("earlier")
    answers, calls = _Target.answers, iter(range(100))

    def interrupted(self: _Target, *args: Any) -> Any:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return answers(self, *args)

    monkeypatch.setattr(_Target, "answers", interrupted)
    code, out, err = probe("--image", "a.png", "--iterations", "9", "--max-new-tokens", "4", "--out", "o")
    assert (code, out) == (130, "") and "interrupted; 2 iterations are in" in err and "Traceback" not in err
    assert (tmp_path / "o/verbose.json").read_text() == "earlier"
    partial = json.loads((tmp_path / "o/verbose.partial.json").read_text())
    assert not partial["complete"] and len(partial["iterations"]) == 2 and (tmp_path / "o/verbose.partial.png").exists()
    assert partial["prompt"] == "" and partial["sample"] == "a.png"
