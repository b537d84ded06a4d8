from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from foveate.method import InputError
from foveate.report.write import check_folder, write_files


def test_writes_all_and_leaves_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    write_files(out, {"one.txt": "é", "two.txt": "2"})
    assert sorted(p.name for p in out.iterdir()) == ["one.txt", "two.txt"]
    assert (out / "one.txt").read_text(encoding="utf-8") == "é"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((out / "one.txt").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("call", ["open", "replace"])
def test_a_failure_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    write_files(tmp_path, {"one.txt": "old"})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space"):
        write_files(tmp_path, {"one.txt": "new", "two.txt": "new"})
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"one.txt": "old"}


def test_checking_a_folder_leaves_nothing(tmp_path: Path) -> None:
    assert check_folder(tmp_path / "x" / "y") == tmp_path / "x" / "y"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/below", "\0"])
def test_unusable_folders(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError):
        check_folder(tmp_path / name)
    with pytest.raises(InputError):
        check_folder("/proc/foveate")
