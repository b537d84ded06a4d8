"""Pictures stored as ids of a codebook, in one compact file that says what it is.

A header of 512 bytes (magic, checksum, JSON), then sections with their SHA-256: an id below 255 is one byte, up to 510
codes take one or two (the form of SeiT++, `foveate.methods.learn.seit`), deflated unless told otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from foveate.method import InputError, whole

MAGIC = b"SEITTOK\x01"
"""The first bytes of a token file."""
HEADER = 512
"""Bytes before the first section."""
_MORE = 255
"""The byte that says: add 255 to the next."""


def encode(ids: NDArray[Any] | Tensor) -> bytes:
    """Ids >= 0 of any shape to bytes: `id // 255` times the byte 255, then `id % 255`.

    A byte below 255 is therefore always the last of its id, and with up to 510 codes an id takes one byte or two.
    """
    flat = np.asarray(ids, dtype=np.int64).ravel()
    if len(flat) and flat.min() < 0:
        raise InputError(f"ids must be >= 0, not {flat.min()}")
    last = np.cumsum(flat // _MORE + 1) - 1
    coded = np.full(int(last[-1]) + 1 if len(last) else 0, _MORE, dtype=np.uint8)
    coded[last] = flat % _MORE
    return coded.tobytes()


def decode(coded: bytes | memoryview, count: int) -> NDArray[np.int64]:
    """(count,) ids from bytes; InputError where there are more or fewer."""
    values = np.frombuffer(coded, dtype=np.uint8)
    last = np.flatnonzero(values != _MORE)
    if len(last) != count or (len(values) and values[-1] == _MORE):
        raise InputError(f"a picture has {count} ids, not {len(last)}")
    before = np.diff(last, prepend=-1) - 1
    return _MORE * before + values[last].astype(np.int64)


def write_tokens(
    path: str | Path, ids: Tensor | Iterable[Tensor], *, codes: int, labels: Tensor | None = None, classes: int = 0,
    codebook: str = "", compress: bool = True,
) -> None:  # fmt: skip
    """Writes pictures as ids into one file, under a temporary name that is renamed when everything is there.

    The file: 512 bytes of header (magic, checksum of the header, JSON that says the rest, spaces), then the ids as
    `encode` has them, the number of bytes of each picture, and the labels. Each of the three is deflated unless
    `compress` is False; the header has the SHA-256 of all three.

    Args:
        path: of the file.
        ids: (n, H, W) ids of all pictures, or several such one after the other.
        codes: K; every id is in 0..K - 1.
        labels: (n,) class numbers in 0..classes - 1.
        classes: number of classes, 0 without labels.
        codebook: `Codebook.fingerprint` of the codes that the ids are of.
        compress: whether the file is deflated.

    Raises:
        InputError: for ids or labels that are out of range, do not fit each other, or cannot be written there.
    """
    whole("codes", codes, 1)
    whole("classes", classes)
    if len(codebook) > 64:
        raise InputError(f"codebook must be a fingerprint of at most 64 characters, not {len(codebook)}")
    path = Path(path)
    try:
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.seek(HEADER)
            digest, packed = hashlib.sha256(), zlib.compressobj(9) if compress else None

            def put(content: bytes) -> int:
                digest.update(content)
                return file.write(content)

            grid: tuple[int, ...] = ()
            lengths: list[int] = []
            written = plain = 0
            for some in (ids,) if isinstance(ids, Tensor) else ids:
                _check_ids(some, codes)
                grid = grid or tuple(some.shape[1:])
                if tuple(some.shape[1:]) != grid:
                    raise InputError(f"all pictures must be {grid[0]} x {grid[1]} ids, not {tuple(some.shape[1:])}")
                for one in some.cpu().numpy():
                    coded = encode(one)
                    lengths.append(len(coded))
                    plain += len(coded)
                    written += put(packed.compress(coded) if packed else coded)
            if not lengths:
                raise InputError("there are no pictures to write")
            written += put(packed.flush()) if packed else 0
            if (labels is None) != (classes == 0) or (labels is not None and tuple(labels.shape) != (len(lengths),)):
                raise InputError(f"labels must be ({len(lengths)},) numbers of some classes, or none of none")
            if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                raise InputError(f"labels must be in 0..{classes - 1}")
            cells = grid[0] * grid[1]
            extra = np.array(lengths, dtype=np.int64) - cells
            tails = [extra.astype(_number(cells * ((codes - 1) // _MORE))).tobytes()]
            tails.append(b"" if labels is None else labels.cpu().numpy().astype(_number(classes - 1)).tobytes())
            sizes = [written, *(put(zlib.compress(one, 9) if compress else one) for one in tails)]
            about = {
                "version": 1, "images": len(lengths), "grid": grid, "codes": codes, "classes": classes,
                "codebook": codebook, "deflated": compress, "plain": plain, "bytes": sizes,
                "sha256": digest.hexdigest(),
            }  # fmt: skip
            text = json.dumps(about, separators=(",", ":")).encode().ljust(HEADER - len(MAGIC) - 4)
            file.seek(0)
            file.write(MAGIC + zlib.crc32(text).to_bytes(4, "little") + text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


class TokenFile(Dataset[tuple[Tensor, int]]):
    """Pictures that `write_tokens` has written, as a map-style dataset of (ids (H, W) long, label; -1 without labels).

    The whole file is read and its checksums are tested when it is opened; in memory a picture takes as many bytes as
    `encode` makes of it.

    Attributes:
        grid: (H, W).
        codes: K.
        labels: (n,) long, or None.
        classes: number of classes, 0 without labels.
        codebook: fingerprint of the codebook, "" where none was given.
        bytes: size on disk.
        plain: bytes of all ids before the file was deflated.

    Raises:
        InputError: for what is no token file, one of another version, cut off, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            content = memoryview(self.path.read_bytes())
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        if bytes(content[: len(MAGIC) - 1]) != MAGIC[:-1]:
            raise InputError(f"{path}: not a token file")
        about = self._header(content)
        self.bytes = len(content)
        self.grid: tuple[int, int] = (about["grid"][0], about["grid"][1])
        self.codes, self.classes, self.codebook = about["codes"], about["classes"], about["codebook"]
        self.plain, images, cells = about["plain"], about["images"], self.grid[0] * self.grid[1]
        length, label = _number(cells * ((self.codes - 1) // _MORE)), _number(self.classes - 1)
        wanted = (self.plain, images * length.itemsize, images * label.itemsize if self.classes else 0)
        parts, first = [], HEADER
        for size, plain in zip(about["bytes"], wanted):
            parts.append(self._inflated(content[first : first + size], plain, about["deflated"]))
            first += size
        self._tokens = parts[0]
        sizes = np.frombuffer(parts[1], length).astype(np.int64) + cells
        self._ends = np.cumsum(sizes)
        if self._ends[-1] != self.plain:
            raise InputError(f"{path}: damaged, its index does not fit its ids")
        self.labels: Tensor | None = None
        if self.classes:
            self.labels = torch.from_numpy(np.frombuffer(parts[2], label).astype(np.int64))

    def _header(self, content: memoryview) -> dict[str, Any]:
        start = len(MAGIC) + 4
        text = bytes(content[start:HEADER])
        if bytes(content[: len(MAGIC)]) != MAGIC:
            raise InputError(f"{self.path}: a token file of version {content[len(MAGIC) - 1]}; this reads version 1")
        if len(content) < HEADER:
            raise InputError(f"{self.path}: cut off within its header")
        if zlib.crc32(text) != int.from_bytes(content[len(MAGIC) : start], "little"):
            raise InputError(f"{self.path}: damaged, its header does not have the right checksum")
        try:
            about: dict[str, Any] = json.loads(text)
            for name in ("images", "codes"):
                whole(name, about[name], 1)
            for name, value in (("classes", about["classes"]), ("plain", about["plain"])):
                whole(name, value)
            rows, columns = about["grid"]
            whole("grid", rows, 1), whole("grid", columns, 1)
            ends = HEADER + sum(whole("bytes", size) for size in about["bytes"])
            if len(about["bytes"]) != 3 or not isinstance(about["sha256"], str):
                raise InputError("it has other parts")
            if not isinstance(about["deflated"], bool) or not isinstance(about["codebook"], str):
                raise InputError("it has other parts")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path}: not a token file of version 1: {error}") from None
        if len(content) != ends:
            what = "cut off" if len(content) < ends else "damaged"
            raise InputError(f"{self.path}: {what}, it has {len(content)} bytes and should have {ends}")
        if hashlib.sha256(content[HEADER:]).hexdigest() != about["sha256"]:
            raise InputError(f"{self.path}: damaged, its content does not have the right checksum")
        return about

    def _inflated(self, content: memoryview, size: int, deflated: bool) -> bytes:
        if not deflated or not len(content):
            plain = bytes(content)
        else:
            # Never more than was announced, whatever the file would become.
            stream = zlib.decompressobj()
            try:
                plain = stream.decompress(content, size + 1)
            except zlib.error as error:
                raise InputError(f"{self.path}: damaged ({error})") from None
        if len(plain) != size:
            raise InputError(f"{self.path}: damaged, a part of it has another size than its header says")
        return plain

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        if not -len(self) <= number < len(self):
            raise IndexError(f"{self.path} has {len(self)} pictures, no picture {number}")
        number %= len(self)
        first = int(self._ends[number - 1]) if number else 0
        rows, columns = self.grid
        ids = decode(memoryview(self._tokens)[first : int(self._ends[number])], rows * columns)
        if ids.max() >= self.codes:
            raise InputError(f"{self.path}: damaged, picture {number} has an id {ids.max()} of {self.codes} codes")
        return torch.from_numpy(ids).view(rows, columns), -1 if self.labels is None else int(self.labels[number])

    def batch(self, numbers: Sequence[int] | Tensor) -> Tensor:
        """(B, H, W) long ids of the pictures of these numbers."""
        return torch.stack([self[int(number)][0] for number in numbers])


def _number(most: int) -> np.dtype[Any]:
    """The smallest unsigned type of a token file for numbers up to `most`."""
    return np.dtype("<u2" if most < 2**16 else "<u4")


def _check_ids(ids: Tensor, codes: int) -> None:
    if ids.ndim != 3 or ids.is_floating_point():
        raise InputError(f"ids must be (B, H, W) whole numbers, not {tuple(ids.shape)} {ids.dtype}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < codes:
        raise InputError(f"ids must be in 0..{codes - 1}, not {int(ids.min())}..{int(ids.max())}")


@dataclass(frozen=True)
class Storage:
    """What pictures take on disk. `ratio`: bytes of the token file over those of the pictures' own files.

    `bits_per_token`: of the whole file, labels and header too; `entropy`: of the ids by how often each occurs, in bits,
    which is at most log2 of the number of codes; a coder that knows nothing of neighbours cannot do better.
    """

    token_bytes: int
    picture_bytes: int
    ratio: float
    bits_per_token: float
    entropy: float


def storage(tokens: TokenFile, pictures: Iterable[str | Path]) -> Storage:
    """Measures a token file against the files of the same pictures, on disk.

    Raises:
        InputError: where there are not as many files as pictures, or one cannot be read.
    """
    try:
        sizes = [os.stat(picture).st_size for picture in pictures]
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if len(sizes) != len(tokens) or not sum(sizes):
        raise InputError(f"{tokens.path} has {len(tokens)} pictures; the files are {len(sizes)} of {sum(sizes)} bytes")
    size, counts = os.stat(tokens.path).st_size, torch.zeros(tokens.codes, dtype=torch.long)
    for ids, _ in (tokens[k] for k in range(len(tokens))):
        counts += torch.bincount(ids.flatten(), minlength=tokens.codes)
    shares = counts[counts > 0] / counts.sum()
    return Storage(
        token_bytes=size, picture_bytes=sum(sizes), ratio=size / sum(sizes),
        bits_per_token=8 * size / int(counts.sum()), entropy=float(-(shares * shares.log2()).sum()),
    )  # fmt: skip
