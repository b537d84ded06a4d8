"""Reading the user's pictures, clips and questions, with limits; anything unusable is an `InputError` of one line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from foveate.data.files import one_line, regular_file
from foveate.data.samples import Sample
from foveate.data.video import Video, sample_frames
from foveate.method import InputError

MAX_PIXELS = 80_000_000
"""Of one picture; below the number from which Pillow itself warns."""
MAX_ASPECT = 200
"""Longer by shorter side of one picture; image processors scale by the shorter side, and memory by the longer."""
MAX_TOTAL_PIXELS = 1_000_000_000
"""Of all pictures and frames of a JSONL file together: 3 GB once decoded."""
MAX_JSONL_BYTES = 256 * 2**20

# Only formats that Pillow decodes itself: it would hand EPS to Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
_FIELDS = ("image", "video", "prompt", "question", "answer", "type", "id")


def read_image(path: str | Path) -> Image.Image:
    """The first frame of a picture file, RGB, upright by its EXIF orientation, transparency over white.

    Raises:
        InputError: no such file, not a regular file, not a picture, truncated, more than `MAX_PIXELS`, longer than
            `MAX_ASPECT` allows, or floating-point pixels that are NaN, infinite or outside 0..255.
    """
    path = regular_file(path, "picture")
    # Pillow knows a few formats from the start and loads the others when it fails, but not where formats are named.
    Image.init()
    try:
        # A bomb warning means more pixels than MAX_PIXELS; the check below words it better.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS:
                    raise InputError(
                        f"{path}: {width} x {height} pixels are more than the limit of {MAX_PIXELS:,}; scale it down"
                    )
                if max(width, height) > MAX_ASPECT * max(1, min(width, height)):
                    raise InputError(
                        f"{path}: {width} x {height} pixels; one side may be at most {MAX_ASPECT} times the other"
                    )
                picture.load()
                return _rgb(ImageOps.exif_transpose(picture), path)
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{path}: more pixels than the limit of {MAX_PIXELS:,}; scale it down") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not a picture that can be read; give one of {', '.join(_FORMATS)}") from None
    except MemoryError:
        raise InputError(f"{path}: there is not enough memory to decode this picture") from None
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, … on damaged files.
        raise InputError(f"{path}: the picture is damaged or truncated ({one_line(error)})") from None


def picture_suffixes() -> frozenset[str]:
    """Endings of the names of files that `read_image` takes, in lower case: ".jpg", ".png", …"""
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in _FORMATS)


def read_jsonl(path: str | Path, frames: int = 8) -> list[Sample]:
    """Questions about pictures and clips, one JSON object a line; blank lines are skipped.

    `{"image" or "video" or both: file or [files], "prompt" or "question": text, "answer": text, "type": text, "id":
    text}`, files relative to the JSONL's folder, the last three optional. Of a clip `frames` frames are taken (see
    `foveate.data.video.sample_frames`). Without an id the line's number is one. A file that several lines name is read
    once.

    Raises:
        InputError: with the line number, for malformed lines, missing or unknown fields, unusable files and an id
            that was there before; for a file without any record, or one beyond the limits.
    """
    path = regular_file(path, "data set")
    if path.stat().st_size > MAX_JSONL_BYTES:
        raise InputError(f"{path}: more than {MAX_JSONL_BYTES // 2**20} MiB; split it")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    files = _Files(frames)
    samples: list[Sample] = []
    lines_of: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
        except (RecursionError, ValueError) as error:
            raise InputError(f"{path}:{number}: not usable JSON: {one_line(error)}") from None
        try:
            sample = _sample(record, path.parent, number, files)
            if sample.id in lines_of:
                raise InputError(f"the id {sample.id[:60]!r} is that of line {lines_of[sample.id]} already")
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        lines_of[sample.id] = number
        samples.append(sample)
    if not samples:
        raise InputError(f'{path}: no records; a line is {{"image": FILE, "prompt": TEXT, "answer": TEXT}}')
    return samples


def _rgb(picture: Image.Image, path: Path) -> Image.Image:
    if picture.width == 0 or picture.height == 0:
        raise InputError(f"{path}: the picture has no pixels")
    if picture.mode == "F":
        values = np.asarray(picture)
        if not np.isfinite(values).all():
            raise InputError(f"{path}: the picture has NaN or infinite pixels")
        if values.min() < 0 or values.max() > 255:
            raise InputError(f"{path}: floating-point pixels must lie in 0..1 or 0..255")
        scale = 255 if values.max() <= 1 else 1
        return Image.fromarray(np.rint(values * scale).astype(np.uint8)).convert("RGB")
    if picture.mode.startswith("I"):
        # 16-bit grey: Pillow would clip at 255 and make nearly everything white.
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"{path}: integer pixels must lie in 0..65535")
        scaled = values if values.max() <= 255 and picture.mode == "I" else values // 257
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layered = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    return picture.convert("RGB")


def _sample(record: Any, folder: Path, number: int, read: _Files) -> Sample:
    if not isinstance(record, dict):
        raise InputError(f"a record must be a JSON object, not {type(record).__name__}")
    unknown = [name for name in record if name not in _FIELDS]
    if unknown:
        raise InputError(f"unknown field {unknown[0][:60]!r}; there are {', '.join(_FIELDS)}")
    if "prompt" in record and "question" in record:
        raise InputError("give either 'prompt' or 'question', not both")
    if "prompt" not in record and "question" not in record:
        raise InputError("the field 'prompt' is missing")
    if "image" not in record and "video" not in record:
        raise InputError("the field 'image' is missing, and there is no 'video'")
    name = "prompt" if "prompt" in record else "question"
    prompt = record[name]
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{name!r} must be text, not {_short(prompt)}")
    for optional in ("answer", "type", "id"):
        if not isinstance(record.get(optional), str | None):
            raise InputError(f"{optional!r} must be text, not {_short(record[optional])}")
    return Sample(
        images=tuple(read.picture(folder / file) for file in _names(record, "image")),
        prompt=prompt,
        answer=record.get("answer"),
        type=record.get("type"),
        id=record.get("id") or str(number),
        videos=tuple(read.video(folder / file) for file in _names(record, "video")),
    )


def _names(record: dict[str, Any], field: str) -> list[str]:
    """The file names of a field, which may be one or a list of them."""
    if field not in record:
        return []
    value = record[field]
    files = value if isinstance(value, list) else [value]
    if not files or not all(isinstance(one, str) and one for one in files):
        raise InputError(f"{field!r} must be a file name or a list of them, not {_short(value)}")
    return files


class _Files:
    """The files of a data set, each read once; of a clip `frames` frames. InputError where they are too many pixels."""

    def __init__(self, frames: int) -> None:
        self._frames = frames
        self._pictures: dict[Path, Image.Image] = {}
        self._videos: dict[Path, Video] = {}
        self._pixels = 0

    def picture(self, path: Path) -> Image.Image:
        if path not in self._pictures:
            picture = read_image(path)
            self._count(picture.width * picture.height)
            self._pictures[path] = picture
        return self._pictures[path]

    def video(self, path: Path) -> Video:
        if path not in self._videos:
            video = sample_frames(path, self._frames)
            self._count(video.frames.size // 3)
            self._videos[path] = video
        return self._videos[path]

    def _count(self, pixels: int) -> None:
        self._pixels += pixels
        if self._pixels > MAX_TOTAL_PIXELS:
            raise InputError(
                f"the pictures so far have more than {MAX_TOTAL_PIXELS:,} pixels; scale them down or split the file"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
