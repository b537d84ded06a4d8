"""The file that ids are stored in, against a slow encoder and byte by byte."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.method import InputError
from foveate.nn.token_file import MAGIC, TokenFile, decode, encode, storage, write_tokens


def slow_encode(ids: list[int]) -> bytes:
    out = []
    for one in ids:
        while one >= 255:
            out.append(255)
            one -= 255
        out.append(one)
    return bytes(out)


def test_bytes_of_every_id() -> None:
    every = list(range(391))
    assert encode(torch.tensor(every)) == slow_encode(every) and len(encode(torch.tensor(every))) == 391 + 136
    assert encode(torch.tensor([254, 255, 256, 390])) == bytes([254, 255, 0, 255, 1, 255, 135])
    larger = [0, 509, 510, 511, 764, 765, 8191]
    for ids in (every, every[::-1], larger, [7]):
        assert decode(slow_encode(ids), len(ids)).tolist() == ids
    picture = torch.randint(391, (1024,))
    for count in (1023, 1025):
        with pytest.raises(InputError, match=f"has {count} ids, not 1024"):
            decode(encode(picture), count)
    with pytest.raises(InputError, match="has 2 ids"):
        decode(bytes([3, 4, 255]), 2)
    with pytest.raises(InputError, match=">= 0"):
        encode(torch.tensor([-1]))


@pytest.mark.parametrize("compress", [True, False])
def test_file_round_trip(tmp_path: Path, compress: bool) -> None:
    ids, labels, path = torch.randint(391, (5, 4, 6)), torch.tensor([2, 0, 1, 2, 2]), tmp_path / "a.tokens"
    write_tokens(path, iter(ids.split(2)), codes=391, labels=labels, classes=3, codebook="ab", compress=compress)
    file = TokenFile(path)
    assert (len(file), file.grid, file.codes, file.classes, file.codebook) == (5, (4, 6), 391, 3, "ab")
    assert torch.equal(file.batch(range(5)), ids) and file.labels is not None and torch.equal(file.labels, labels)
    assert torch.equal(file[-1][0], ids[4]) and file[1][1] == 0
    assert file.plain == ids.numel() + int((ids >= 255).sum()) and file.bytes == path.stat().st_size
    if not compress:
        assert file.bytes == 512 + file.plain + 2 * 5 + 2 * 5
    with pytest.raises(IndexError):
        file[5]
    write_tokens(path, ids, codes=400)
    assert TokenFile(path)[0][1] == -1 and TokenFile(path).labels is None
    assert [one.name for one in tmp_path.iterdir()] == ["a.tokens"], "nothing temporary is left"


def test_damage_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    path, other = tmp_path / "a.tokens", tmp_path / "b.tokens"
    write_tokens(path, torch.randint(16, (2, 3, 3)), codes=16, labels=torch.tensor([0, 1]), classes=2)
    content = path.read_bytes()
    for place in (*range(200), *range(200, len(content), 7)):
        changed = bytearray(content)
        changed[place] ^= 0x10
        other.write_bytes(changed)
        with pytest.raises(InputError, match=r"not a token file|of version 17|damaged"):
            TokenFile(other)
    for size in (len(content) - 1, 512, 511, 20, 9):
        other.write_bytes(content[:size])
        with pytest.raises(InputError, match="cut off"):
            TokenFile(other)
    for foreign in (b"", b"\x89PNG\r\n\x1a\n" + bytes(600), content + b"x"):
        other.write_bytes(foreign)
        with pytest.raises(InputError, match=r"not a token file|damaged"):
            TokenFile(other)
    with pytest.raises(InputError, match="cannot be read"):
        TokenFile(tmp_path / "none")
    with pytest.raises(InputError, match="cannot be read"):
        TokenFile(tmp_path)


def forged(content: bytes, **changes: Any) -> bytes:
    """The file with another header and body whose checksums are right."""
    about = json.loads(content[len(MAGIC) + 4 : 512])
    body = changes.pop("body", content[512:])
    about |= changes | {"sha256": hashlib.sha256(body).hexdigest()}
    text = json.dumps(about).encode().ljust(500)
    return MAGIC + zlib.crc32(text).to_bytes(4, "little") + text + body


def test_forged_files_are_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "a.tokens", tmp_path / "b.tokens"
    write_tokens(path, torch.randint(16, (2, 3, 3)), codes=16)
    content = path.read_bytes()
    sizes = json.loads(content[12:512])["bytes"]
    bomb = zlib.compress(bytes(10_000_000))
    for changes in (
        {"images": 3}, {"images": 0}, {"grid": [3]}, {"grid": [2, 3]}, {"classes": 2}, {"plain": 17}, {"plain": -1},
        {"bytes": [1, 2]}, {"deflated": False}, {"codes": "x"}, {"version": None, "images": None},
        {"body": bomb + content[512 + sizes[0] :], "bytes": [len(bomb), *sizes[1:]]},
    ):  # fmt: skip
        other.write_bytes(forged(content, **changes))
        with pytest.raises(InputError):
            TokenFile(other)[0]
    other.write_bytes(forged(content))
    assert torch.equal(TokenFile(other)[1][0], TokenFile(path)[1][0]), "the forger's tool itself works"


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path, ids = tmp_path / "a.tokens", torch.randint(16, (2, 3, 3))
    write_tokens(path, ids, codes=16)
    before = path.read_bytes()

    def interrupted() -> Any:
        yield ids
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(path, interrupted(), codes=16)
    bad = (
        ({"codes": 5}, "0..4"), ({"codes": 16, "classes": 2}, "labels"),
        ({"codes": 16, "labels": torch.tensor([0, 2]), "classes": 2}, "0..1"),
        ({"codes": 16, "labels": torch.tensor([0]), "classes": 2}, "labels"),
    )  # fmt: skip
    for options, message in bad:
        with pytest.raises(InputError, match=message):
            write_tokens(path, ids.clamp(min=5), **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="3 x 3 ids, not"):
        write_tokens(path, [ids, ids[:, :2]], codes=16)
    with pytest.raises(InputError, match="no pictures"):
        write_tokens(path, [], codes=16)
    with pytest.raises(InputError, match="cannot be written"):
        write_tokens(tmp_path / "none" / "a", ids, codes=16)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_storage_is_measured_on_disk(tmp_path: Path) -> None:
    ids = torch.tensor([0, 0, 1, 2]).repeat(2, 1, 1).view(2, 2, 2)
    write_tokens(tmp_path / "a.tokens", ids, codes=3, compress=False)
    for k in range(2):
        (tmp_path / f"{k}.jpg").write_bytes(bytes(1000))
    found = storage(TokenFile(tmp_path / "a.tokens"), [tmp_path / "0.jpg", tmp_path / "1.jpg"])
    assert found.token_bytes == 512 + 8 + 4 and found.picture_bytes == 2000 and found.ratio == 524 / 2000
    assert found.bits_per_token == 8 * 524 / 8 and found.entropy == pytest.approx(1.5)
    with pytest.raises(InputError, match="has 2 pictures"):
        storage(TokenFile(tmp_path / "a.tokens"), [tmp_path / "0.jpg"])
    with pytest.raises(InputError, match="cannot be read"):
        storage(TokenFile(tmp_path / "a.tokens"), [tmp_path / "0.jpg", tmp_path / "none"])
