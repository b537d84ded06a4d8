"""Writing results so that a reader never sees half a file."""

from __future__ import annotations

import os
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
            handle, temporary = tempfile.mkstemp(prefix=f".{name}-", dir=folder)
            written.append((Path(temporary), folder / name))
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
            # mkstemp's files are private; results get the permissions that the user's umask says.
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
        for partial, final in written:
            os.replace(partial, final)
    finally:
        for partial, _ in written:
            partial.unlink(missing_ok=True)
