from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import foveate
from foveate import zoo
from foveate.configuration import load_configuration, save
from foveate.hosts import adapt
from foveate.method import build

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two budgets and one for stacks, so that a search takes seconds."""
    module = importlib.import_module("foveate.measure.tune")
    whole = module.tune
    few = {"budgets": (0.5, 0.25), "stack_budgets": (0.25,), "first_rung": 2, "timing_pairs": 1}
    monkeypatch.setattr(module, "tune", lambda *args, **kwargs: whole(*args, **few | kwargs))


needs_zoo = pytest.mark.skipif("tiny-llava" not in zoo.names(), reason="tiny-llava is not trained yet")
GOAL = ("--target-speedup", "2")

BAD = [
    ([], "give one goal"),
    (["--target-speedup", "2", "--max-loss", "0.1"], "give one goal"),
    (["--target-speedup", "1"], "--target-speedup must be a number greater than 1, not 1"),
    (["--target-speedup", "0.5"], "greater than 1"),
    (["--target-speedup", "nan"], "greater than 1"),
    (["--target-speedup", "fast"], "--target-speedup"),
    (["--max-loss", "1"], "--max-loss must be a share in [0, 1)"),
    (["--max-loss", "-0.1"], "--max-loss must be a share in [0, 1)"),
    ([*GOAL, "--methods", "pyramidrop"], "did you mean pyramiddrop"),
    ([*GOAL, "--methods", "random"], "baselines only"),
    ([*GOAL, "--methods", ","], "no name"),
    ([*GOAL, "--methods", "good.json"], "tune looks for settings itself"),
    ([*GOAL, "--methods", "bad.json"], "bad.json: not JSON"),
    ([*GOAL, "--questions", "0"], "--questions must be at least 1"),
    ([*GOAL, "--batch-size", "0"], "--batch-size must be at least 1"),
    ([*GOAL, "--seed", "-1"], "--seed"),
    ([*GOAL, "--dtype", "float61"], "did you mean float16"),
    ([*GOAL, "--out", "bad.json"], "not a folder"),
    ([*GOAL, "--model", "tiny-lava"], "did you mean tiny-llava"),
    ([*GOAL, "--prompt", "p"], "--prompt needs --image"),
    ([*GOAL, "--image", "none.png", "--prompt", "p"], "no such picture"),
    ([*GOAL, "--dataset", "none.jsonl"], "none.jsonl"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) or "nothing" for a, _ in BAD])
def test_bad_input_is_one_line(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "bad.json").write_text("{")
    save(tmp_path / "good.json", [build("fopru")])
    before = sorted(tmp_path.iterdir())
    code, out, err = run("tune", *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


def test_several_processes_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run("tune", *GOAL)
    assert code == 2 and "one process" in err


def test_compare_checks_the_file_before_any_work(run: Run, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"foveate": "0.1.0", "methods": [{"method": "foprus"}]}')
    code, out, err = run("compare", "--methods", "c.json")
    assert (code, out) == (2, "") and err == "error: c.json: unknown method 'foprus'; did you mean fopru?\n"


@needs_zoo
@pytest.mark.usefixtures("small")
def test_a_search_is_interrupted_goes_on_and_is_used(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("tune", "--target-speedup", "1.2", "--methods", "vtc-cls,pyramiddrop", "--questions", "4", "--out", "o")
    module = importlib.import_module("foveate.measure.tune")
    add, calls = module.TrialLog.add, iter(range(100))

    def interrupted(self: Any, trial: Any) -> Any:
        if next(calls) == 14:
            raise KeyboardInterrupt
        return add(self, trial)

    with monkeypatch.context() as patch:
        patch.setattr(module.TrialLog, "add", interrupted)
        code, out, err = run(*command)
    assert (code, out) == (130, "") and "interrupted; 14 more trials are in o/trials.jsonl" in err, err
    assert "Traceback" not in err
    assert [one.name for one in (tmp_path / "o").iterdir()] == ["trials.jsonl"]
    kept = (tmp_path / "o/trials.jsonl").read_text()
    assert kept.count("\n") == 15

    code, out, err = run(*command)
    assert (code, err) == (0, ""), err
    assert (tmp_path / "o/trials.jsonl").read_text().startswith(kept)
    assert "14 trials read from an earlier run" in out and "4 samples" in out
    (chosen,) = load_configuration(tmp_path / "o/chosen.json") or [None]
    values = json.loads((tmp_path / "o/chosen.json").read_text())["measured"]
    assert f"Choice: {values['label']} ({100 * values['accuracy']:.1f} % accuracy" in out
    assert f"● {values['label']}" in out and values["flops_ratio"] <= 1 / 1.2
    assert ("plain baseline" in out) == chosen.card.baseline
    assert 'foveate.apply(model, "o/chosen.json")' in out and "foveate compare --methods o/chosen.json" in out

    # A goal that nothing reaches; the trials are those of before.
    before = (tmp_path / "o/chosen.json").read_text()
    code, out, err = run(*["100" if one == "1.2" else one for one in command])
    assert (code, err) == (1, "") and "Not reached: nothing needs as little as 1 % of dense's FLOPs" in out
    assert "comes nearest with" in out and (tmp_path / "o/chosen.json").read_text() == before


@needs_zoo
def test_compare_takes_a_stack_from_a_file(run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (96, 96), (200, 100, 50)).save(tmp_path / "a.png")
    shape = adapt(zoo.load("tiny-llava")).shape
    stack = [foveate.method_class(slug).for_budget(0.5, shape) for slug in ("vtc-cls", "pyramiddrop")]
    save(tmp_path / "c.json", stack)
    code, out, err = run(
        "compare", "--methods", "c.json", "--image", "a.png", "--prompt", "is there a dog ?", "--keep", "0.5",
        "--out", "o",
    )  # fmt: skip
    assert (code, err) == (0, ""), err
    row = json.loads((tmp_path / "o/comparison.json").read_text())["rows"][-1]
    assert row["method"] == "vtc-cls+pyramiddrop" and 0.2 < row["visual_share"] < 0.3
    assert "vtc-cls+pyramiddrop" in out and "vtc-cls+pyramiddrop" in (tmp_path / "o/report.html").read_text()
