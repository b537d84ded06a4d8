"""The user's files: what can be opened at all, said in one line where not."""

from __future__ import annotations

from pathlib import Path

from foveate.method import InputError


def regular_file(path: str | Path, what: str) -> Path:
    """The path of a file with something in it that can be opened; `what` ("picture") says what was expected.

    Raises:
        InputError: no such file, a folder, a pipe or device, empty, not allowed to be read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{path}: a folder, not a {what} file")
        if not path.exists():
            raise InputError(f"{path}: no such {what} file")
        # A pipe would block and /dev/zero would never end.
        if not path.is_file():
            raise InputError(f"{path}: not a regular file")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the {what} file is empty")
        with path.open("rb"):
            pass
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(path)[:200]!r}: cannot be read ({one_line(error)})") from None
    return path


def one_line(error: BaseException) -> str:
    """The error's message in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
