"""What every test shares. Builders of tiny models and inputs are in `tiny.py`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    """One thread (tests run side by side) and the same random numbers whatever ran before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in an empty folder: exit code, stdout, stderr."""
    from foveate.cli import main

    monkeypatch.chdir(tmp_path)
    # Whatever terminal, or none, the tests are started from: a table as wide as it wants to be.
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        # What the test itself, or a library that it loaded something with, has printed before.
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in arguments])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call
