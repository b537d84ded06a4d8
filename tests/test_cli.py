from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

import foveate
from foveate import train as recipes
from foveate import zoo
from foveate.cli import main
from foveate.data.samples import from_scenes

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (96, 96), (200, 100, 50)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def clip(file: Path) -> None:
    """Three grey frames."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "bgr0"
        for k in range(3):
            pixels = np.full((32, 32, 3), 60 * k, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


needs_zoo = pytest.mark.skipif("tiny-llava" not in zoo.names(), reason="tiny-llava is not trained yet")

BAD = [
    (["bogus"], "bogus"),
    (["compare", "--bogus"], "--bogus"),
    (["compare", "--questions", "many"], "--questions"),
    (["compare", "--questions", "0"], "--questions must be at least 1"),
    (["compare", "--batch-size", "-1"], "--batch-size"),
    (["compare", "--seed", "-1"], "--seed"),
    (["compare", "--keep", "half"], "'half' is not a number"),
    (["compare", "--keep", "0.5,,0.1"], "is not a number"),
    (["compare", "--keep", "0"], "(0, 1]"),
    (["compare", "--keep", "1.5"], "(0, 1]"),
    (["compare", "--keep", "nan"], "(0, 1]"),
    ([], ""),
    (["compare", "--methods", "pyramidrop"], "did you mean pyramiddrop"),
    (["compare", "--methods", ","], "no name"),
    (["compare", "--methods", "random"], "baselines only"),
    (["compare", "--dtype", "float61"], "did you mean float16"),
    (["compare", "--device", "warp9", "--image", "a.png", "--prompt", "p"], "--device 'warp9'"),
    (["compare", "--out", "a.png"], "not a folder"),
    (["compare", "--out", "/proc/foveate"], "cannot be written"),
    (["compare", "--image", "none.png", "--prompt", "p"], "no such picture"),
    (["compare", "--image", ".", "--prompt", "p"], "a folder"),
    (["compare", "--image", "cut.png", "--prompt", "p"], "truncated"),
    (["compare", "--image", "empty.png", "--prompt", "p"], "empty"),
    (["compare", "--image", "thin.png", "--prompt", "p"], "1 x 900 pixels"),
    (["compare", "--image", "text.png", "--prompt", "p"], "not a picture"),
    (["compare", "--image", "nan.tiff", "--prompt", "p"], "NaN"),
    (["compare", "--image", "a.png"], "--image needs --prompt"),
    (["compare", "--prompt", "p"], "--prompt needs --image"),
    (["compare", "--frames", "0"], "--frames must be at least 1"),
    (["compare", "--model", "tiny-llava", "--video", "none.mp4", "--prompt", "p"], "no such video file"),
    (["compare", "--model", "tiny-llava", "--video", "a.png", "--prompt", "p"], "a.png: not a video that can be read"),
    (["compare", "--model", "tiny-llava", "--video", "empty.png", "--prompt", "p"], "the video file is empty"),
    (["compare", "--model", "tiny-llava", "--video", "clip.mkv"], "--video needs --prompt"),
    (["compare", "--model", "tiny-llava", "--video", "clip.mkv", "--prompt", "p"], "takes no videos, only pictures"),
    (["compare", "--model", "tiny-llava", "--video", "clip.mkv", "--dataset", "bad.jsonl"], "not both"),
    (["compare", "--dataset", "video.jsonl"], "video.jsonl:2: a.png: not a video that can be read"),
    (["compare", "--dataset", "bad.jsonl"], "bad.jsonl:2: not JSON"),
    (["compare", "--dataset", "text.jsonl"], "text.jsonl:1: the field 'image' is missing"),
    (["compare", "--dataset", "bad.jsonl", "--image", "a.png"], "not both"),
    (["compare", "--model", "tiny-lava", "--image", "a.png", "--prompt", "p"], "did you mean tiny-llava"),
    (["compare", "--model", "tiny-vit", "--image", "a.png", "--prompt", "p"], "tiny-vit answers no questions"),
    (["compare", "--model", "vit", "--image", "a.png", "--prompt", "p"], "vit is a ViTForImageClassification"),
    (["compare", "--model", "cut", "--image", "a.png", "--prompt", "p"], "cut cannot be loaded"),
    (["compare", "--image", "a.png", "--prompt", "is <image> there"], "leave '<image>' out"),
    (["compare", "--image", "a.png", "--prompt", "is there " * 2000], "tokens with the pictures"),
    (["compare", "--image", "a.png", "--prompt", "p", "--methods", "pyramiddrop", "--keep", "0.1"], "as little as 0.1"),
    (["compare", "--model", ".", "--image", "a.png", "--prompt", "p"], "config.json"),
    (["compare", "--model", "somebody/nothing", "--image", "a.png", "--prompt", "p"], "models shipped here"),
    (["methods", "fopruu"], "did you mean fopru"),
    (["verify", "fopruu"], "did you mean fopru"),
    (["train", "tiny-lava"], "did you mean tiny-llava"),
    (["train"], "name"),
    (["train", "tiny-llava", "--seed", "-1"], "--seed"),
    (["train", "tiny-llava", "--set", "steps"], "NAME=VALUE"),
    (["train", "tiny-llava", "--set", "stepz=3"], "no setting 'stepz'"),
    (["train", "tiny-llava", "--out", "a.png"], "not a folder"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a)[:80] for a, _ in BAD])
def test_bad_input_is_one_line(run: Run, picture: Path, arguments: list[str], message: str) -> None:
    folder = picture.parent
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes(picture.read_bytes()[:100])
    Image.new("L", (1, 900)).save(folder / "thin.png")
    Image.fromarray(np.full((1, 2), np.nan, dtype=np.float32)).save(folder / "nan.tiff")
    (folder / "text.jsonl").write_text('{"prompt": "p"}\n')
    clip(folder / "clip.mkv")
    (folder / "video.jsonl").write_text(
        '{"video": "clip.mkv", "prompt": "p"}\n{"video": ["clip.mkv", "a.png"], "prompt": "q"}\n'
    )
    (folder / "vit").mkdir()
    (folder / "vit/config.json").write_text('{"model_type": "vit", "architectures": ["ViTForImageClassification"]}')
    (folder / "bad.jsonl").write_text('{"image": "a.png", "prompt": "p"}\n{"image"\n')
    if "cut" in arguments:
        shutil.copytree(zoo.path("tiny-llava"), folder / "cut")
        (folder / "cut/model.safetensors").write_bytes((folder / "cut/model.safetensors").read_bytes()[:1000])
    before = sorted(folder.iterdir())
    code, out, err = run(*arguments)
    assert code == 2
    if arguments:
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert message in err
        assert out == ""
    else:
        assert err == "" and "Usage" in out
    assert sorted(folder.iterdir()) == before


def test_version_help_and_no_arguments(run: Run) -> None:
    assert run("--version") == (0, f"foveate {foveate.__version__}\n", "")
    for arguments in (["--help"], ["compare", "-h"]):
        code, out, _ = run(*arguments)
        assert code == 0 and "Usage" in out


def test_methods_lists_all_and_tells_about_one(run: Run) -> None:
    code, out, err = run("methods")
    assert code == 0 and err == ""
    words = out.split()
    assert set(foveate.registry()) <= set(words)
    assert words.index("pyramiddrop") < words.index("baselines") < words.index("random")
    code, out, _ = run("methods", "pyramiddrop")
    for text in ("https://arxiv.org/abs/2410.17247", "llm.layer", "hf-vlm", "(0.25, 0.5, 0.75)", "Table 1", "keep"):
        assert text in out
    assert "foveate compare --methods pyramiddrop" in out
    assert "compare" not in run("methods", "dense")[1]


def test_verify_prints_both_figures_and_fails_by_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.measure import claims

    claim = SimpleNamespace(what="MACs [x]", architecture="a-7b", figure=3.82e12, tolerance=0.005, source="Table 1")
    results = [SimpleNamespace(method="fopru", claim=claim, ours=3.83e12, holds=True)]
    monkeypatch.setattr(claims, "verify", lambda slug, on_progress=None: results)
    code, out, _ = run("verify")
    assert code == 0
    for text in ("MACs [x] (a-7b)", "3.82e+12", "3.83e+12", "0.5 %", "Table 1", "1 claims measured, 0 failed"):
        assert text in out
    results.append(SimpleNamespace(method="aim", claim=claim, ours=1.0, holds=False))
    code, out, _ = run("verify", "fopru")
    assert code == 1 and "FAILED" in out and "1 failed" in out


def test_train_passes_what_was_given(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(recipes, "run", lambda *args, **kwargs: calls.append((args, kwargs)))
    settings = ["--set", "steps=3", "--set", "lr=1e-3", "--set", "tower=runs/a=b", "--set", "vary=false"]
    assert run("train", "tiny-llava", "--out", "r", "--seed", "7", "--smoke", "--fresh", *settings)[0] == 0
    given = {"out": Path("r"), "seed": 7, "resume": False, "smoke": True}
    assert calls == [(("tiny-llava",), given | {"steps": 3, "lr": 0.001, "tower": "runs/a=b", "vary": False})]


def test_bugs_keep_their_traceback_and_files_do_not(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(error: Exception) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(recipes, "run", fail)

    raises(OSError(errno.ENOSPC, "No space left on device", "r/x"))
    assert run("train", "tiny-llava") == (2, "", "error: r/x: No space left on device\n")
    raises(foveate.InputError("two\nlines \x1b[31m"))
    assert run("train", "tiny-llava")[2] == "error: two lines �[31m\n"
    raises(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["train", "tiny-llava"])
    monkeypatch.setattr(recipes, "run", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert run("train", "tiny-llava")[0] == 130


def test_other_processes_stay_silent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run("compare", "--keep", "2") == (2, "", "")


@needs_zoo
def test_compare_writes_report_and_prints_the_table(run: Run, tmp_path: Path) -> None:
    code, out, err = run("compare", "--questions", "4", "--keep", "0.5", "--methods", "fopru", "--out", "o")
    assert code == 0, err
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["comparison.json", "report.html"]
    rows = json.loads((tmp_path / "o/comparison.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", "grid", "pool", "random", "resolution", "fopru"]
    for row in rows:
        assert f"{row['time_ratio']:.2f} ({row['time_low']:.2f}–{row['time_high']:.2f})" in out
        assert f"{100 * row['accuracy']:.1f} %" in out
    assert "Choice: " in out and err == ""
    report = (tmp_path / "o/report.html").read_text()
    shown = json.loads((tmp_path / "o/comparison.json").read_text())["shown"]
    asked = {sample.id: (sample.prompt, sample.answer) for sample in from_scenes("test", 4, 0)}
    assert (shown["prompt"], shown["expected"]) == asked[shown["id"]]
    assert f"Asked: <strong>{shown['prompt']}</strong>" in report and "data:image/png" in report


@needs_zoo
def test_compare_on_a_picture_without_answers(run: Run, picture: Path) -> None:
    code, out, err = run(
        "compare", "--image", picture, "--prompt", "is there a dog or a wug ?", "--keep", "0.5",
        "--methods", "pyramiddrop",
    )  # fmt: skip
    assert code == 0, err
    assert err == "note: tiny-llava was not taught 'wug'; its answers are guesses there\n"
    assert "accuracy" not in out.split("Choice")[0] and "100.0 %" in out
    assert "is there a dog or a wug ?" in (picture.parent / "foveate-out/report.html").read_text()


@needs_zoo
def test_interruption_keeps_earlier_results_and_rows_so_far(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o/report.html").write_text("earlier")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _INTERRUPTED, "compare", "--questions", "4", "--out", "o"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and "rows are in" in done.stderr
    assert (tmp_path / "o/report.html").read_text() == "earlier"
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["comparison.partial.json", "report.html"]
    kept = json.loads((tmp_path / "o/comparison.partial.json").read_text())
    assert [row["method"] for row in kept["rows"]] == ["dense", "grid"] and kept["complete"] is False


_INTERRUPTED = """
import importlib, os, signal
# A process started in the background of a script ignores Ctrl-C, and its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
from foveate import cli
module = importlib.import_module("foveate.measure.compare")
real = module.compare
def compare(*args, on_row, **kwargs):
    def noting(row):
        on_row(row)
        if row.method == "grid":
            os.kill(os.getpid(), signal.SIGINT)
    return real(*args, on_row=noting, **kwargs)
module.compare = compare
cli.main()
"""


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    command = f"{sys.executable} -m foveate.cli methods | true"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    ["--help", "compare --help", "compare --keep 2", "train nothing"],
)
def test_what_computes_nothing_loads_no_torch(arguments: str) -> None:
    code = """
import sys
from foveate.cli import main
try:
    main(sys.argv[1:])
finally:
    print([name for name in ("torch", "transformers", "matplotlib", "numpy") if name in sys.modules], file=sys.stderr)
"""
    command = [sys.executable, "-c", code, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr.endswith("[]\n"), done.stderr


def test_the_package_has_all_its_names() -> None:
    for name in foveate.__all__:
        assert name in dir(foveate) and getattr(foveate, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = foveate.nothing  # type: ignore[attr-defined]


@needs_zoo
def test_two_processes_give_exactly_the_numbers_of_one(run: Run, tmp_path: Path) -> None:
    """Through `accelerate launch` as docs/cli.md says it; five questions in batches of two: three and two."""
    asked = ["compare", "--device", "cpu", "--questions", "5", "--batch-size", "2"]
    asked += ["--keep", "0.5", "--methods", "fopru"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    # A port of its own, so that tests can run side by side.
    command = [*launch, "--main_process_port", "0", "-m", "foveate.cli", *asked, "--out", "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Choice: ") == 1
    assert run(*asked, "--out", "one")[0] == 0
    one, two = (json.loads((tmp_path / out / "comparison.json").read_text()) for out in ("one", "two"))
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    for row in (*one["rows"], *two["rows"]):
        for key in ("time_ratio", "time_low", "time_high"):
            row.pop(key)
    for key in ("rows", "shown", "overlays", "samples"):
        assert one[key] == two[key]
