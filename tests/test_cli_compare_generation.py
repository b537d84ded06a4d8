"""`foveate compare --task generation` with tiny random pipelines that are saved here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("torchmetrics")

from foveate.generate import DiffusionGenerator
from foveate.measure.compare_generation import GenerationComparison
from tiny_prompted import prompted

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    prompted().save_pretrained(folder / "large")
    small = prompted(seed=1, block_out_channels=(4, 4))
    small.text_encoder.load_state_dict(prompted().text_encoder.state_dict())
    small.save_pretrained(folder / "small")
    return folder


@pytest.fixture
def compare(run: Run, folder: Path) -> Run:
    """Runs the command on the tiny pipeline in an empty folder."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        model = () if "--model" in arguments else ("--model", folder / "large")
        return run("compare", "--task", "generation", *model, *arguments)

    return call


BAD = [
    (["--image", "a.png"], "--task generation takes no --image; it takes --prompts, --steps, --small"),
    (["--prompts", "none.txt"], "--prompts: none.txt: no such file"),
    (["--prompts", "empty.txt"], "--prompts: empty.txt has no line with a prompt"),
    (["--prompts", "binary.txt"], "--prompts: binary.txt is no text in UTF-8"),
    (["--prompts", "."], "--prompts: .: is a directory"),
    (["--keep", "0.5"], "--task generation takes no --keep"),
    (["--count", "0"], "must be at least 1"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--methods", "ras"], "StableDiffusionPipeline"),
    (["--methods", "fopru"], "fopru is no method for pipelines of diffusers"),
    (["--methods", "t-stitch"], "t-stitch: t-stitch needs a small denoiser"),
    (["--small", "none"], "unknown model 'none'"),
    (["--model", "none"], "unknown model 'none'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line(compare: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "two.txt").write_text("a dog\na fox\n")
    if "--prompts" not in arguments and "--image" not in arguments:
        arguments = [*arguments, "--prompts", "two.txt"]
    code, out, err = compare(*arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err and not (tmp_path / "foveate-out").exists()


def test_the_options_of_other_tasks(run: Run) -> None:
    code, _, err = run("compare", "--prompts", "two.txt")
    assert code == 2 and "--task answering takes no --prompts" in err


def test_prompts_of_a_file(compare: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n\n<b>a frog</b>\nnot read\n")
    asked = ("--prompts", "prompts.txt", "--count", "2", "--steps", "4", "--small", folder / "small", "--out", "o")
    code, out, err = compare(*asked, "--methods", "t-stitch", "--batch-size", "2")
    assert code == 0 and err.endswith("was not taught '<b>a', 'frog</b>'\n") and err.count("\n") == 1, err
    found = GenerationComparison.from_json((tmp_path / "o/comparison.json").read_text())
    assert found.samples == 2 and [row.method for row in found.rows] == [
        "dense", "other noise", "fewer steps", "t-stitch"
    ]  # fmt: skip
    assert found.environment["generator"]["class"] == "StableDiffusionPipeline"
    page = (tmp_path / "o/report.html").read_text()
    assert len(re.findall(r"<figure><img", page)) == 2 * len(found.rows)
    assert "&lt;b&gt;a frog" in page and "<b>" not in page
    assert "num_inference_steps=" in page and "visual tokens" not in page
    assert "Choice: " in out and "PSNR" in out and "apart" in out


def test_scenes_by_default_and_all_methods(compare: Run, tmp_path: Path) -> None:
    code, out, err = compare("--count", "2", "--steps", "2", "--out", "o")
    assert code == 0, err
    values = json.loads((tmp_path / "o/comparison.json").read_text())
    rows = {row["method"]: row for row in values["rows"]}
    assert {"a-star", "variable-size"} <= set(rows) and rows["t-stitch"]["refused"].startswith("t-stitch needs")
    judge = values["environment"]["judge"]
    assert judge["captions"] == 2 and 0 <= judge["right on real scenes"] <= 1 and 0 < judge["right by chance"] <= 1 / 40
    assert "t-stitch at 0: t-stitch needs" in " ".join(out.split())


def test_what_an_interruption_leaves(compare: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, made = DiffusionGenerator.make, []

    def interrupted(*given: object) -> object:
        made.append(given)
        if len(given[1]) == 2 and sum(len(one[1]) == 2 for one in made) == 2:  # type: ignore[arg-type,index]
            raise KeyboardInterrupt
        return make(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(DiffusionGenerator, "make", interrupted)
    code, out, err = compare("--count", "2", "--steps", "2", "--out", "o", "--methods", "variable-size")
    assert (code, out) == (130, "") and "1 rows are in" in err
    (row,) = json.loads((tmp_path / "o/comparison.partial.json").read_text())["rows"]
    assert row["method"] == "dense"
