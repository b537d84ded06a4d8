"""Writing results so that a reader never sees half a file."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path

from foveate.method import InputError


def check_folder(folder: str | Path) -> Path:
    """The folder, if files can be written into it or it can be made; nothing is left behind.

    Raises:
        InputError: if it is a file, or it (or the nearest folder above it that exists) cannot be written to.
    """
    folder = Path(folder)
    if "\0" in str(folder):
        raise InputError(f"{str(folder)!r} is not the name of a folder")
    try:
        above = next(one for one in (folder, *folder.absolute().parents) if one.exists())
        if not above.is_dir():
            raise InputError(f"{above}: a file, not a folder to write results into")
        # Asked by doing it: permission bits say nothing about read-only file systems.
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise InputError(f"{folder}: results cannot be written here ({error.strerror}); give another --out") from None
    return folder


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Writes name -> text or bytes into `folder`, made if absent: all under temporary names first, then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[tuple[Path, Path]] = []
    try:
        for name, content in files.items():
            temporary = _temporary(folder / name)
            written.append((temporary, folder / name))
            temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        for partial, final in written:
            os.replace(partial, final)
    finally:
        for partial, _ in written:
            partial.unlink(missing_ok=True)


class Growing:
    """A file that is written bit by bit, under the temporary name `temporary` beside `path`, which has no reader yet.

    `publish` gives it its name when it is complete; when it is not, `NAME.partial.ENDING`, and whatever has the name
    stays. Without either, `discard` leaves nothing behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = _temporary(path)

    def publish(self, complete: bool = True) -> Path:
        """Where the file is now."""
        final = self.path if complete else self.partial
        os.replace(self.temporary, final)
        if complete:
            self.partial.unlink(missing_ok=True)
        return final

    def discard(self) -> None:
        self.temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A new, empty file beside `path`, with the permissions that the user's umask says; several threads may ask."""
    while True:
        temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        with contextlib.suppress(FileExistsError):
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            return temporary
