"""One picture as ids of a codebook, in one small file that says what it is.

All numbers are unsigned and little-endian.

| bytes | what |
|---|---|
| 4 | `MAGIC`: "FVC" and the version |
| 4 | CRC-32 of all that follows |
| 8 | the first of the SHA-256 of the tokenizer's weights |
| 4 | codebook_size - 1 |
| 2, 2 | height and width of the picture in px |
| 2, 2 | rows and columns of ids; a sequence has 0 rows |
| 1, n | length of the tokenizer's name, and its name in UTF-8 |
| ⌈N b / 8⌉ | the ids of b = ⌈log2 codebook_size⌉ bits each, the highest bit first; zeros fill the last byte |
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from foveate.data.files import one_line, regular_file
from foveate.method import InputError
from foveate.nn.codes import Codes

MAGIC = b"FVC\x01"
"""The first bytes of a code file; the last of them is its version."""
SUFFIX = ".codes"
MAX_BYTES = 16 * 2**20
"""Of one file; what is larger is no code file."""
_HEADER = struct.Struct("<4sI8sIHHHHB")
_CHECKED = 8
"""Where the part begins that the checksum is of."""


@dataclass(frozen=True, eq=False)
class CodeFile:
    """One picture's codes and whose they are.

    Attributes:
        codes: of a single picture, of at most 65,535 px a side and as many rows and columns of ids.
        tokenizer: its name, at most 255 bytes.
        fingerprint: of its weights, 16 hexadecimal digits (see `foveate.zoo.tokenizer.fingerprint`).

    Raises:
        InputError: for what a file cannot hold.
    """

    codes: Codes
    tokenizer: str
    fingerprint: str

    def __post_init__(self) -> None:
        if len(self.codes.ids) != 1:
            raise InputError(f"a code file holds one picture, not {len(self.codes.ids)}")
        if max(*self.codes.size, *self.codes.grid) >= 2**16 or self.codes.codebook_size > 2**32:
            raise InputError(f"{self.codes.size} px, {self.codes.grid} ids: a code file has up to 65,535 a side")
        if len(self.tokenizer.encode()) > 255 or not self.tokenizer.isprintable():
            raise InputError(f"a tokenizer's name must be printable and have at most 255 bytes: {self.tokenizer!r:.60}")
        if not re.fullmatch("[0-9a-f]{16}", self.fingerprint):
            raise InputError(f"a fingerprint must be 16 hexadecimal digits, not {self.fingerprint!r:.60}")

    def to_bytes(self) -> bytes:
        """The file's content; equal codes give equal bytes."""
        codes, name = self.codes, self.tokenizer.encode()
        grid = (0, *codes.grid) if len(codes.grid) == 1 else codes.grid
        head = _HEADER.pack(
            MAGIC, 0, bytes.fromhex(self.fingerprint), codes.codebook_size - 1, *codes.size, *grid, len(name)
        )
        body = head[_CHECKED:] + name + packed(codes.ids[0].cpu().numpy(), codes.bits_per_id)
        return MAGIC + struct.pack("<I", zlib.crc32(body)) + body

    @classmethod
    def from_bytes(cls, content: bytes) -> CodeFile:
        """What `to_bytes` made.

        Raises:
            InputError: for anything else: foreign, of another version, cut off, damaged.
        """
        if content[: len(MAGIC) - 1] != MAGIC[:-1]:
            raise InputError("not a code file")
        if content[: len(MAGIC)] != MAGIC and len(content) >= len(MAGIC):
            raise InputError(f"a code file of version {content[len(MAGIC) - 1]}; this reads version {MAGIC[-1]}")
        if len(content) < _HEADER.size:
            raise InputError("cut off within its header")
        _, checksum, weights, last, height, width, rows, columns, length = _HEADER.unpack_from(content)
        grid = (rows, columns) if rows else (columns,)
        count, bits = math.prod(grid), last.bit_length()
        start = _HEADER.size + length
        end = start + -(-count * bits // 8)
        if zlib.crc32(content[_CHECKED:]) != checksum:
            # Where the header is damaged its lengths are wrong too, and so is what they say here.
            cut = f" or cut off: {len(content)} bytes of {end}" if len(content) < end else ""
            raise InputError(f"damaged{cut}, its content does not have the right checksum")
        try:
            ids = unpacked(content[start:], count, bits)
            codes = Codes(torch.from_numpy(ids)[None], last + 1, (height, width), grid)
            return cls(codes, content[_HEADER.size : start].decode(), weights.hex())
        except ValueError as error:
            raise InputError(f"not what a code file can say: {one_line(error)}") from None

    @classmethod
    def read(cls, path: str | Path) -> CodeFile:
        """The file there. InputError with its path where it cannot be used."""
        path = regular_file(path, "code")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: not a code file, it has more than {MAX_BYTES // 2**20} MiB")
        try:
            return cls.from_bytes(path.read_bytes())
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def packed(ids: NDArray[np.int64], bits: int) -> bytes:
    """(N,) ids below 2^bits, bits <= 32, one after the other, the highest bit first; zeros fill the last byte."""
    every = np.unpackbits(ids.astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)
    return np.packbits(every[:, 32 - bits :]).tobytes()


def unpacked(content: bytes, count: int, bits: int) -> NDArray[np.int64]:
    """(count,) ids of what `packed` made. InputError where it is not exactly that."""
    every = np.unpackbits(np.frombuffer(content, dtype=np.uint8))
    if len(content) != -(-count * bits // 8) or every[count * bits :].any():
        raise InputError(f"{len(content)} bytes are not {count} ids of {bits} bits, filled up with zeros")
    rows = np.zeros((count, 32), dtype=np.uint8)
    rows[:, 32 - bits :] = every[: count * bits].reshape(count, bits)
    return np.packbits(rows, axis=1).view(">u4").ravel().astype(np.int64)
