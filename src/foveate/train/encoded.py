"""Pictures that a frozen encoder turned into something smaller, once before training, and the file they are kept in."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def holds(file: Path, about: dict[str, str]) -> bool:
    """Whether the file is there, whole, and was made from what `about` says."""
    try:
        with safe_open(file, "pt") as tensors:
            return bool(tensors.metadata() == about)
    except (OSError, SafetensorError):
        return False


def keep(file: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Writes tensors and what they were made from to a temporary name and renames it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    save_file(tensors, partial, about)
    os.replace(partial, file)
