"""The file of one picture's codes, against its format written out, and under every kind of damage."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.data.code_file import MAGIC, MAX_BYTES, CodeFile
from foveate.method import InputError
from foveate.nn.codes import Codes

WEIGHTS = "00ff10aa5500c3d2"


def codes(ids: list[int], size: int, grid: tuple[int, ...] = (), picture: tuple[int, int] = (256, 320)) -> Codes:
    return Codes(torch.tensor([ids]), size, picture, grid or (len(ids),))


def slow(ids: list[int], size: int, grid: tuple[int, ...], picture: tuple[int, int], name: str) -> bytes:
    """The table of the module's docstring, field by field, with the ids as a text of zeros and ones."""
    rows, columns = (0, *grid) if len(grid) == 1 else grid
    bits = math.ceil(math.log2(size))
    text = "".join(f"{one:0{bits}b}" for one in ids)
    text += "0" * (-len(text) % 8)
    body = bytes.fromhex(WEIGHTS) + (size - 1).to_bytes(4, "little")
    for side in (*picture, rows, columns):
        body += side.to_bytes(2, "little")
    body += bytes([len(name.encode())]) + name.encode()
    body += bytes(int(text[k : k + 8], 2) for k in range(0, len(text), 8))
    return b"FVC\x01" + zlib.crc32(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(
    ("size", "grid"), [(4096, (32,)), (2, (9,)), (3, (2, 5)), (391, (7, 3)), (1025, (1,)), (2**18, (5,)), (2**32, (3,))]
)
def test_format(size: int, grid: tuple[int, ...]) -> None:
    count = math.prod(grid)
    ids = [size - 1, *torch.randint(size, (count - 1,)).tolist()]
    content = CodeFile(codes(ids, size, grid), "tokenizer ä", WEIGHTS).to_bytes()
    assert content == slow(ids, size, grid, (256, 320), "tokenizer ä")
    read = CodeFile.from_bytes(content)
    assert read.codes.ids.tolist() == [ids] and read.codes.ids.dtype == torch.long
    assert (read.codes.codebook_size, read.codes.size, read.codes.grid) == (size, (256, 320), grid)
    assert (read.tokenizer, read.fingerprint) == ("tokenizer ä", WEIGHTS)


def test_a_titok_picture_is_48_bytes_and_a_header() -> None:
    made = codes(list(range(32)), 4096, picture=(256, 256))
    assert made.bytes == 48 and len(CodeFile(made, "titok", WEIGHTS).to_bytes()) == 29 + len("titok") + 48


def test_damage_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    content = CodeFile(codes([5, 1, 0, 6, 2], 7), "t", WEIGHTS).to_bytes()
    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            with pytest.raises(InputError, match="not a code file" if place < 3 else r"damaged|of version"):
                CodeFile.from_bytes(bytes(changed))
    for length in range(len(content)):
        with pytest.raises(InputError, match=r"not a code file|cut off"):
            CodeFile.from_bytes(content[:length])
    for foreign in (content + b"\0", b"", b"\x89PNG\r\n\x1a\n" + bytes(60), MAGIC + bytes(25), MAGIC + bytes(60)):
        with pytest.raises(InputError):
            CodeFile.from_bytes(foreign)
    path = tmp_path / "a.codes"
    path.write_bytes(content[:-1])
    for what, why in ((path, "cut off: 31 bytes of 32"), (tmp_path, "a folder"), (tmp_path / "b", "no such code")):
        with pytest.raises(InputError, match=f"{what}.*{why}"):
            CodeFile.read(what)
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(InputError, match="not a code file, it has more than"):
        CodeFile.read(path)


def forged(content: bytes, place: int, value: bytes) -> bytes:
    """The file with other bytes at one place and the checksum that they need."""
    body = bytearray(content[8:])
    body[place - 8 : place - 8 + len(value)] = value
    return content[:4] + zlib.crc32(body).to_bytes(4, "little") + bytes(body)


def test_forged_files_are_refused() -> None:
    content = CodeFile(codes([5, 1, 0, 6, 2], 7), "t", WEIGHTS).to_bytes()
    assert CodeFile.from_bytes(forged(content, 8, b"\0")).fingerprint == "00" + WEIGHTS[2:], "forging itself works"
    for place, value, why in (
        (16, b"\0\0\0\0", "5 ids of 0 bits"),
        (16, b"\x05", r"ids must be in 0\.\.5, not 0\.\.6"),
        (16, b"\x08", "5 ids of 4 bits"),
        (20, b"\0\0", "size must be"),
        (26, b"\0\0", "0 ids|grid"),
        (24, b"\xff\xff\xff\xff", "ids of 3 bits"),
        (26, b"\x04", "4 ids of 3 bits"),
        (28, b"\xff", "ids of 3 bits"),
        (28, b"\x00", "ids of 3 bits"),
        (29, b"\xff", "utf-8"),
        (29, b"\x07", "printable"),
        (len(content) - 1, bytes([content[-1] | 1]), "filled up with zeros"),
    ):
        with pytest.raises(InputError, match=why):
            CodeFile.from_bytes(forged(content, place, value))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"codes": Codes(torch.zeros(2, 3, dtype=torch.long), 4, (8, 8), (3,))}, "one picture, not 2"),
        ({"codes": codes([0], 4, picture=(8, 65536))}, "65,535"),
        ({"codes": codes([0], 2**32 + 1)}, "65,535"),
        ({"tokenizer": "ä" * 128}, "255 bytes"),
        ({"tokenizer": "a\n"}, "printable"),
        ({"fingerprint": "00"}, "16 hexadecimal"),
        ({"fingerprint": WEIGHTS.upper()}, "16 hexadecimal"),
    ],
)
def test_what_no_file_can_hold(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        CodeFile(**({"codes": codes([0, 1], 4), "tokenizer": "t", "fingerprint": WEIGHTS} | changes))
