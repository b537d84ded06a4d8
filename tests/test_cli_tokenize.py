"""`foveate tokenize` and `foveate reconstruct` on pictures made here, with a tiny random tokenizer."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.data.code_file import CodeFile
from foveate.method import InputError
from foveate.methods.tokenize.one_d_piece import OneDPiece
from foveate.methods.tokenize.titok import TiTok
from foveate.nn.codes import Codes
from foveate.tokenize import Reconstruct, Tokenize, _Worker, find_files, on_ray
from foveate.zoo.tokenizer import fingerprint

Run = Callable[..., tuple[int, str, str]]
SETTINGS: dict[str, Any] = {
    "image": 16, "patch": 4, "latents": 6, "encoder": (16, 1, 2), "decoder": (16, 1, 2), "codes": 256, "channels": 4,
    "pixel_codes": 8, "pixel_channels": 8, "pixel_width": 8, "pixel_multipliers": (1, 1, 1),
}  # fmt: skip


@pytest.fixture(scope="session")
def model() -> OneDPiece:
    torch.manual_seed(0)
    made = OneDPiece(**SETTINGS).eval()
    # As it is made, it would find the same codes for all pictures.
    for weight in (one for one in made.parameters() if one.ndim > 1):
        torch.nn.init.normal_(weight, std=0.25)
    return made


@pytest.fixture
def home(tmp_path: Path, model: OneDPiece) -> Path:
    """A folder with a tokenizer `piece` and a folder `in` of three pictures, one of them of another size and deeper."""
    model.save_pretrained(tmp_path / "piece")
    noise = np.random.default_rng(0)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name, size in (("a.png", (16, 16)), ("b.jpg", (16, 16)), ("deep/a.png", (64, 40))):
        colours = noise.integers(0, 256, 3) + noise.integers(-40, 40, (*size, 3))
        Image.fromarray(colours.clip(0, 255).astype(np.uint8)).save(tmp_path / "in" / name)
    return tmp_path


def pixels(path: Path) -> torch.Tensor:
    """(1, 3, 16, 16) in 0..1: of the picture of 40 x 64 px its middle 40 x 40, scaled down."""
    picture = Image.open(path).convert("RGB")
    if picture.size == (40, 64):
        picture = picture.resize((16, 16), Image.Resampling.BICUBIC, box=(0, 12, 40, 52))
    return torch.tensor(np.array(picture)).movedim(2, 0)[None] / 255


def contents(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in sorted(folder.rglob("*")) if one.is_file()}


def test_codes_are_the_models_and_pictures_are_those_of_the_codes(run: Run, home: Path, model: OneDPiece) -> None:
    code, out, err = run("tokenize", "in", "--tokenizer", "piece", "--out", "codes", "--batch", "2")
    assert (code, err) == (0, ""), err
    # 6 ids of 8 bits behind 29 bytes of header and a name of 5.
    assert "40 bytes a picture, 1.25 bits a pixel (6 ids of 8 bits)" in out and "3 written · codes" in out
    made = contents(home / "codes")
    assert list(made) == ["a.png.codes", "b.jpg.codes", "deep/a.png.codes"]
    for name, content in made.items():
        file = CodeFile.from_bytes(content)
        wanted = model.encode(pixels(home / "in" / name.removesuffix(".codes")))
        assert torch.equal(file.codes.ids, wanted.ids) and file.codes.size == (16, 16) and len(content) == 40
        assert (file.tokenizer, file.fingerprint) == ("piece", fingerprint(model))
    assert len(set(made.values())) == 3, "the pictures have different codes"

    code, out, err = run("reconstruct", "codes", "--out", "pictures", "--tokenizer", "piece")
    assert (code, err) == (0, "") and "3 written · pictures" in out
    assert list(contents(home / "pictures")) == ["a.png.png", "b.jpg.png", "deep/a.png.png"]
    for name in made:
        picture = np.array(Image.open(home / "pictures" / f"{name.removesuffix('.codes')}.png"))
        wanted = model.decode(CodeFile.from_bytes(made[name]).codes)[0].detach().movedim(0, 2).numpy()
        assert np.abs(picture / 255 - wanted).max() <= 0.5 / 255 + 1e-6


def test_a_few_tokens_are_a_prefix(run: Run, home: Path, model: OneDPiece) -> None:
    for options in (["--out", "all"], ["--out", "few", "--tokens", "3"]):
        assert run("tokenize", "in/a.png", "--tokenizer", "piece", *options)[0] == 0
    every, few = (CodeFile.read(home / folder / "a.png.codes").codes for folder in ("all", "few"))
    assert few.grid == (3,) and torch.equal(few.ids, every.ids[:, :3])
    assert run("reconstruct", "all", "--out", "one", "--tokenizer", "piece", "--tokens", "3")[0] == 0
    assert run("reconstruct", "few/a.png.codes", "--out", "two", "--tokenizer", "piece")[0] == 0
    assert run("reconstruct", "all", "--out", "three", "--tokenizer", "piece")[0] == 0
    one, two, three = (contents(home / folder)["a.png.png"] for folder in ("one", "two", "three"))
    assert one == two != three
    # Files of different lengths are decoded by one command.
    shutil.copy(home / "few/a.png.codes", home / "all/b.codes")
    code, _, _ = run("reconstruct", "all", "--out", "one", "--tokenizer", "piece", "--workers", "1")
    assert code == 0 and contents(home / "one") == {"a.png.png": three, "b.png": two}


def test_only_what_is_missing_is_done_again(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*arguments: str) -> tuple[str, list[int]]:
        done: list[int] = []
        for job in (Tokenize, Reconstruct):
            own = job.__dict__["compute"]
            monkeypatch.setattr(
                job, "compute", lambda self, loaded, own=own: done.append(len(loaded)) or own(self, loaded)
            )
        code, out, err = run(*arguments, "--tokenizer", "piece")
        monkeypatch.undo()
        monkeypatch.chdir(home)
        assert (code, err) == (0, ""), err
        return out, done

    tokenize, reconstruct = ("tokenize", "in", "--out", "codes"), ("reconstruct", "codes", "--out", "pictures")
    for arguments, folder in ((tokenize, home / "codes"), (reconstruct, home / "pictures")):
        assert again(*arguments)[1] == [3]
        before = contents(folder)
        out, done = again(*arguments)
        assert done == [] and "3 were there" in out
        first, second, third = sorted(one for one in folder.rglob("*") if one.is_file())
        first.unlink()
        second.write_bytes(second.read_bytes()[:-2])
        out, done = again(*arguments)
        assert done == [2] and "2 written, 1 were there" in out and contents(folder) == before
        # One bit in the middle of the third.
        content = bytearray(third.read_bytes())
        content[len(content) // 2] ^= 1
        third.write_bytes(content)
        assert again(*arguments)[1] == [1] and contents(folder) == before
    # Other codes, other pictures; a newer picture; another number of ids.
    assert again(*reconstruct, "--tokens", "2")[1] == [3] and contents(home / "pictures") != before
    os.utime(home / "codes/a.png.codes", (1, 1))
    assert again(*tokenize)[1] == [1] and again(*tokenize, "--tokens", "5")[1] == [3] and again(*tokenize)[1] == [3]


_DIES = """
import os, signal, sys
from foveate.cli import main
from foveate.tokenize import Tokenize
own, calls = Tokenize.compute, iter(range(100))
def dying(self, loaded):
    if next(calls) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return own(self, loaded)
Tokenize.compute = dying
main(sys.argv[1:])
"""


def test_killed_in_the_middle_it_goes_on(run: Run, home: Path) -> None:
    for k in range(30):
        shutil.copy(home / "in" / ("a.png" if k % 2 else "b.jpg"), home / "in" / f"{k}.png")
    arguments = ["tokenize", "in", "--tokenizer", "piece", "--batch", "1", "--out"]
    killed = subprocess.run([sys.executable, "-c", _DIES, *arguments, "codes"], cwd=home, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = [one for one in contents(home / "codes") if one.endswith(".codes")]
    assert 0 < len(left) <= 20
    for name in left:
        CodeFile.read(home / "codes" / name)
    code, out, _ = run(*arguments, "codes")
    assert code == 0 and f"{33 - len(left)} written, {len(left)} were there" in out
    assert run(*arguments, "whole")[0] == 0
    whole = contents(home / "whole")
    assert len(whole) == 33 and whole.items() <= contents(home / "codes").items()


def test_interruption_says_what_is_there(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, calls = Tokenize.compute, iter(range(9))

    def interrupted(self: Tokenize, loaded: Any) -> list[Codes]:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return own(self, loaded)

    monkeypatch.setattr(Tokenize, "compute", interrupted)
    code, out, err = run("tokenize", "in", "--tokenizer", "piece", "--out", "codes", "--batch", "1", "--workers", "1")
    assert (code, out) == (130, "") and "interrupted" in err and "goes on" in err and err.count("\n") == 1
    assert all(CodeFile.read(one) for one in (home / "codes").rglob("*.codes"))
    assert not list((home / "codes").rglob(".*")), "nothing temporary is left"


def test_broken_files_are_told_and_the_others_done(run: Run, home: Path, model: OneDPiece) -> None:
    (home / "in/cut.png").write_bytes((home / "in/a.png").read_bytes()[:300])
    (home / "in/deep/text\x1b.jpg").write_text("no picture")
    (home / "in/notes.txt").write_text("not even looked at")
    code, out, err = run("tokenize", "in", "--tokenizer", "piece", "--out", "codes")
    assert code == 1 and "3 written, 2 could not be read" in out
    first, second = err.splitlines()
    assert first.startswith("broken: in/cut.png: the picture is damaged or truncated")
    assert second.startswith("broken: in/deep/text�.jpg: not a picture")

    good = (home / "codes/a.png.codes").read_bytes()
    other = CodeFile(CodeFile.from_bytes(good).codes, "other", "0" * 16)
    for name, content in (("cut", good[:-1]), ("foreign", b"GIF89a" + bytes(40)), ("theirs", other.to_bytes())):
        (home / f"codes/{name}.codes").write_bytes(content)
    code, out, err = run("reconstruct", "codes", "--tokenizer", "piece", "--out", "pictures")
    assert code == 1 and "3 written, 3 could not be read" in out
    assert err.splitlines()[0].startswith("broken: codes/cut.codes: damaged or cut off: 39 bytes of 40")
    assert err.splitlines()[1] == "broken: codes/foreign.codes: not a code file"
    assert f"theirs.codes: made by another tokenizer, other {'0' * 16}; this is piece {fingerprint(model)}" in err


BAD = [
    (["tokenize", "in", "--out", "codes"], "--tokenizer"),
    (["tokenize", "--tokenizer", "piece", "--out", "codes"], "FILES|DIR"),
    (["tokenize", "none.png", "--tokenizer", "piece", "--out", "codes"], "none.png: no such file or folder"),
    (["tokenize", "piece", "--tokenizer", "piece", "--out", "codes"], "piece: no file in this folder has an ending of"),
    (["tokenize", "in/a.png", "in/deep/a.png", "--tokenizer", "piece", "--out", "codes"], "would both become"),
    (["tokenize", "in", "--tokenizer", "piece", "--out", "in/a.png"], "in/a.png: a file, not a folder"),
    (["tokenize", "in", "--tokenizer", "titik", "--out", "codes"], "did you mean titok"),
    (["tokenize", "in", "--tokenizer", "in", "--out", "codes"], "in: no model here; a tokenizer's folder has a config"),
    (["tokenize", "in", "--tokenizer", "vit", "--out", "codes"], "vit: no tokenizer"),
    (["tokenize", "in", "--tokenizer", "cut", "--out", "codes"], "cut: its weights cannot be loaded"),
    (["tokenize", "in", "--tokenizer", "wrong", "--out", "codes"], "wrong/config.json: image must be a multiple"),
    (["tokenize", "in", "--tokenizer", "piece", "--out", "codes", "--tokens", "7"], "tokens must be in 1..6, not 7"),
    (["tokenize", "in", "--tokenizer", "piece", "--out", "codes", "--tokens", "0"], "tokens must be a whole number"),
    (["tokenize", "in", "--tokenizer", "fixed", "--out", "codes", "--tokens", "3"], "fixed decodes all ids"),
    (["tokenize", "in", "--tokenizer", "piece", "--out", "codes", "--batch", "0"], "--batch must be at least 1"),
    (["tokenize", "in", "--tokenizer", "piece", "--out", "codes", "--workers", "0"], "--workers must be at least 1"),
    (["tokenize", "in", "--tokenizer", "piece", "--out", "codes", "--device", "tpu7"], "--device 'tpu7' cannot"),
    (["reconstruct", "in", "--out", "pictures"], "in: no file in this folder has an ending of .codes"),
    (["reconstruct", "bad.codes", "--out", "pictures"], "no code file here can be read: bad.codes: not a code file"),
    (["reconstruct", "good.codes", "--out", "pictures"], "unknown tokenizer 'mine'"),
    (["reconstruct", "good.codes", "--tokenizer", "fixed", "--out", "pictures"], "made by another tokenizer, mine"),
    (["reconstruct", "good.codes", "--tokenizer", "piece", "--out", "p", "--tokens", "9"], "tokens must be in 1..6"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a)[:80] for a, _ in BAD])
def test_bad_input_is_one_line(run: Run, home: Path, model: OneDPiece, arguments: list[str], message: str) -> None:
    torch.manual_seed(1)
    TiTok(**SETTINGS).save_pretrained(home / "fixed")
    for name in ("vit", "cut", "wrong"):
        shutil.copytree(home / "piece", home / name)
    (home / "vit/config.json").write_text('{"name": "tiny-vit", "width": 8}')
    (home / "cut/model.safetensors").write_bytes((home / "piece/model.safetensors").read_bytes()[:500])
    (home / "wrong/config.json").write_text(
        (home / "piece/config.json").read_text().replace('"image": 16', '"image": 18')
    )
    (home / "bad.codes").write_text("no codes")
    codes = Codes(torch.zeros(1, 6, dtype=torch.long), 256, (16, 16), (6,))
    (home / "good.codes").write_bytes(CodeFile(codes, "mine", fingerprint(model)).to_bytes())
    before = sorted(home.rglob("*"))
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err
    assert sorted(home.rglob("*")) == before


def test_a_file_that_cannot_be_written_ends_the_job(run: Run, home: Path) -> None:
    (home / "codes/b.jpg.codes/full").mkdir(parents=True)
    code, _, err = run("tokenize", "in", "--tokenizer", "piece", "--out", "codes")
    assert code == 2 and err.startswith("error: ") and "b.jpg.codes" in err and err.count("\n") == 1


def test_a_name_that_is_too_long_is_a_broken_file(run: Run, home: Path) -> None:
    (home / "in/a.png").rename(home / "in" / f"{'a' * 250}.png")
    code, out, err = run("tokenize", "in", "--tokenizer", "piece", "--out", "codes")
    assert code == 1 and "2 written, 1 could not be read" in out and "its name is too long" in err


def test_a_ray_worker_that_cannot_work_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Tokenize(str(home / "piece"), batch=2)
    pairs = find_files([home / "in"], home / "codes", Tokenize)
    rows = {
        "number": np.arange(3),
        "source": np.array([str(one.source) for one in pairs]),
        "target": np.array([str(one.target) for one in pairs]),
    }
    other = _Worker(Tokenize, job.arguments, "0" * 16)(rows)
    assert other["state"] == ["failed"] and "other weights on the machine" in other["reason"][0]
    gone = _Worker(Tokenize, job.arguments | {"tokenizer": str(home / "gone")}, job.fingerprint)(rows)
    assert gone["state"] == ["failed"] and "unknown tokenizer" in gone["reason"][0]
    (home / "codes").write_text("in the way")
    full = _Worker(Tokenize, job.arguments, job.fingerprint)(rows)
    assert full["state"] == ["failed"] and "codes" in full["reason"][0]
    (home / "codes").unlink()
    good = _Worker(Tokenize, job.arguments, job.fingerprint)(rows)
    assert good["state"] == ["written"] * 3 and sorted(good["number"]) == [0, 1, 2]
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="needs Ray Data: pip install"):
        next(on_ray(job, pairs, 2))


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_two_ray_workers_make_the_same_bytes(run: Run, home: Path) -> None:
    for k in range(12):
        shutil.copy(home / "in" / ("a.png" if k % 2 else "b.jpg"), home / "in" / f"{k}.png")
    (home / "in/cut.png").write_bytes((home / "in/a.png").read_bytes()[:300])
    options = ("--tokenizer", "piece", "--batch", "4")
    code, _, err = run("tokenize", "in", *options, "--out", "alone")
    assert code == 1
    code, out, shared = run("tokenize", "in", *options, "--out", "ray", "--ray", "--workers", "2")
    assert code == 1 and "15 written, 1 could not be read" in out
    assert shared.splitlines()[-1] == err.strip().replace("in/cut.png", str(home / "in/cut.png"))
    assert contents(home / "ray") == contents(home / "alone")
