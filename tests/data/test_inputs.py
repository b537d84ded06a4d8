from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_video import numbers
from test_video import write as write_video

from foveate.data import inputs
from foveate.data.inputs import read_image, read_jsonl
from foveate.method import InputError


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_rgb_upright_and_over_white(tmp_path: Path, picture: Path) -> None:
    assert read_image(picture).mode == "RGB" and read_image(str(picture)).size == (30, 20)
    source = Image.open(picture).convert("RGB")
    exif = source.getexif()
    exif[0x0112] = 6  # the camera was turned: shown, it is 90° clockwise
    source.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "turned.png")), np.rot90(np.asarray(source), -1))
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (np.asarray(read_image(tmp_path / "clear.png")) == 255).all()
    Image.fromarray(np.array([[0, 25700, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(read_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 100, 255]


def test_floating_point_pixels(tmp_path: Path) -> None:
    for name, values in (("unit", [0.0, 1.0]), ("byte", [0.0, 255.0])):
        Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / f"{name}.tiff")
        assert np.asarray(read_image(tmp_path / f"{name}.tiff"))[0, :, 0].tolist() == [0, 255]
    for value in (np.nan, np.inf, -1.0, 300.0):
        Image.fromarray(np.array([[0.0, value]], dtype=np.float32)).save(tmp_path / "bad.tiff")
        with pytest.raises(InputError, match=r"bad.tiff: .*(NaN|0\.\.255)"):
            read_image(tmp_path / "bad.tiff")


def test_unusable_pictures(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:400])
    (tmp_path / "ghost.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    cases = {"empty.png": "empty", "text.png": "not a picture", "cut.png": "truncated", "none.png": "no such",
             "ghost.eps": "not a picture", "\0": "cannot be read|no such"}  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="a folder"):
        read_image(tmp_path)
    with pytest.raises(InputError, match="not a regular file"):
        read_image("/dev/zero")
    monkeypatch.setattr(inputs, "MAX_PIXELS", 599)
    with pytest.raises(InputError, match="30 x 20 pixels"):
        read_image(picture)


def test_pictures_may_not_be_threads(tmp_path: Path) -> None:
    for size, fits in (((1, 200), True), ((1, 201), False), ((402, 2), False)):
        Image.new("L", size).save(tmp_path / "thin.png")
        if fits:
            assert read_image(tmp_path / "thin.png").size == size
        else:
            with pytest.raises(InputError, match="one side may be at most 200 times the other"):
                read_image(tmp_path / "thin.png")


def test_decompression_bomb_is_not_decoded(tmp_path: Path) -> None:
    # A header alone: whoever decodes finds no pixels and says "damaged".
    for side, name in ((12_000, "warned.png"), (20_000, "refused.png")):
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        chunks += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
        with pytest.raises(InputError, match="limit"):
            read_image(tmp_path / name)


def write(folder: Path, *records: Any) -> Path:
    path = folder / "q.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


def test_records(tmp_path: Path, picture: Path) -> None:
    path = write(
        tmp_path,
        {"image": "a.png", "prompt": "p", "answer": "yes", "type": "t", "id": "x"},
        "",
        {"image": ["a.png", "a.png"], "question": "q", "answer": None},
    )
    first, second = read_jsonl(path)
    assert (first.prompt, first.answer, first.type, first.id) == ("p", "yes", "t", "x")
    assert (second.prompt, second.answer, second.type, second.id) == ("q", None, None, "3")
    assert len(second.images) == 2 and second.images[0] is first.images[0]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_jsonl(path)) == 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"image": "a.png", "prompt"', "not JSON"),
        ("[" * 100_000, "not usable JSON"),
        ("[1]", "JSON object"),
        ({"prompt": "p"}, "'image' is missing"),
        ({"image": "a.png"}, "'prompt' is missing"),
        ({"image": "a.png", "prompt": "p", "question": "q"}, "not both"),
        ({"image": "a.png", "prompt": " "}, "must be text"),
        ({"image": "a.png", "prompt": "p", "answer": 3}, "'answer' must be text, not 3"),
        ({"image": "a.png", "prompt": "p", "anwser": "x"}, "unknown field 'anwser'"),
        ({"image": [], "prompt": "p"}, "'image' must be"),
        ({"image": 7, "prompt": "p"}, "'image' must be"),
        ({"image": "b.png", "prompt": "p"}, "no such picture"),
        ({"image": None, "prompt": "p"}, "'image' must be .* not null"),
        ({"image": "a.png", "prompt": "p", "id": "1"}, "the id '1' is that of line 1 already"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, picture: Path, record: Any, message: str) -> None:
    path = write(tmp_path, {"image": "a.png", "prompt": "fine"}, "", record)
    with pytest.raises(InputError, match=message) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}:3: ") and "\n" not in str(caught.value)


def test_unusable_data_sets(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no records"):
        read_jsonl(write(tmp_path, "", "  "))
    with pytest.raises(InputError, match="empty"):
        read_jsonl(write(tmp_path))
    with pytest.raises(InputError, match="no such data set"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"image": "é"}'.encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        read_jsonl(tmp_path / "latin.jsonl")
    path = write(tmp_path, {"image": "a.png", "prompt": "p"})
    monkeypatch.setattr(inputs, "MAX_TOTAL_PIXELS", 10)
    with pytest.raises(InputError, match=":1: the pictures so far"):
        read_jsonl(path)
    monkeypatch.setattr(inputs, "MAX_JSONL_BYTES", 10)
    with pytest.raises(InputError, match="split it"):
        read_jsonl(path)


def test_lines_may_name_clips(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    write_video(tmp_path / "a.mkv", range(9), "ffv1")
    path = write(
        tmp_path,
        {"video": "a.mkv", "prompt": "p", "answer": "x"},
        {"video": ["a.mkv"], "image": "a.png", "prompt": "q"},
    )
    first, second = read_jsonl(path, frames=3)
    assert first.images == () and first.answer == "x" and len(second.images) == 1
    assert numbers(first.videos[0].frames) == [0, 4, 8] and first.videos[0].times.tolist() == [0, 0.4, 0.8]
    # A file that several lines name is read once.
    assert second.videos[0] is first.videos[0]
    with pytest.raises(InputError, match="'video' must be a file name or a list of them, not 3"):
        read_jsonl(write(tmp_path, {"video": 3, "prompt": "p"}))
    with pytest.raises(InputError, match=r":1: .*a\.png: not a video that can be read"):
        read_jsonl(write(tmp_path, {"video": "a.png", "prompt": "p"}))
