"""Rate and distortion of tokenizers on held-out photographs, beside JPEG, WebP and AVIF at equal bytes.

Bytes are those of whole files: code files as `foveate tokenize` writes them, pictures as Pillow does. At a number of
bytes every codec has, picture by picture, the quality and the size (whole, or a half, a quarter, an eighth of the
sides, scaled up again by bicubic interpolation) with the best PSNR that fits. Where some picture fits in none, the
codec has no point. `flat`: what a picture of the mean colour has, three bytes.

python benchmarks/rate_distortion.py --tokenizers titok one-d-piece
"""

from __future__ import annotations

import argparse
import io
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llava_shaped import write, write_bytes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from foveate.data.code_file import CodeFile
from foveate.data.scenes import Scenes, stacked
from foveate.measure.generation import Judge, Reconstruction
from foveate.method import InputError
from foveate.methods.tokenize.one_d_piece import OneDPiece
from foveate.nn.codes import Codes
from foveate.zoo.tokenizer import find_tokenizer, fingerprint, load_tokenizer

_ROOT = Path(__file__).parent.parent
CODECS: dict[str, dict[str, Any]] = {"JPEG": {"optimize": True}, "WebP": {"method": 6}, "AVIF": {"speed": 2}}
QUALITIES = (0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95)
SCALES = (1, 2, 4, 8)
BUDGETS = (50, 75, 100, 150, 200, 300, 400, 600, 800, 1200, 1600, 2400)
AXES = {"psnr": "PSNR, dB", "ssim": "SSIM", "perceptual": "distance of tiny-vit's tokens (less is better)"}


@torch.inference_mode()
def of_tokenizer(name: str, model: Any, originals: Tensor, judge: Judge, batch: int = 50) -> list[dict[str, float]]:
    """A row for each number of ids, halved again and again where the tokenizer can do with fewer: bytes of a file, of
    the ids in it, and what is kept of the pictures (n, 3, H, W) uint8."""
    codes = [model.encode(some.float() / 255) for some in originals.split(batch)]
    count, weights, rows = codes[0].ids.shape[1], fingerprint(model), []
    for tokens in [count >> k for k in range(count.bit_length())] if model.any_length else [count]:
        measured = Reconstruction(judge)
        for some, pictures in zip(codes, originals.split(batch)):
            measured.update(model.decode(some.first(tokens) if model.any_length else some), pictures)
        one = Codes(codes[0].ids[:1], codes[0].codebook_size, codes[0].size, codes[0].grid)
        one = one.first(tokens) if model.any_length else one
        size = len(CodeFile(one, name, weights).to_bytes())
        rows.append({"tokens": tokens, "bytes": size, "bytes_of_ids": one.bytes, **measured.compute()})
    return rows[::-1]


def variants(picture: Image.Image, codec: str) -> Iterator[tuple[int, float, NDArray[np.uint8]]]:
    """(bytes, mean squared error, decoded pixels) of a picture at every quality and size."""
    pixels = np.asarray(picture, dtype=np.float64)
    for scale in SCALES:
        small = picture.resize((picture.width // scale, picture.height // scale), Image.Resampling.LANCZOS)
        for quality in QUALITIES:
            file = io.BytesIO()
            small.save(file, codec, quality=quality, **CODECS[codec])
            decoded = np.asarray(Image.open(file).convert("RGB").resize(picture.size, Image.Resampling.BICUBIC))
            yield file.getbuffer().nbytes, float(((decoded - pixels) ** 2).mean()), decoded


def of_codec(codec: str, originals: Tensor, budgets: list[int], judge: Judge) -> dict[str, Any]:
    """A row for each number of bytes into which every picture fits, and the least such number."""
    chosen: dict[int, list[NDArray[np.uint8]]] = defaultdict(list)
    least = 0
    for pixels in originals.permute(0, 2, 3, 1).numpy():
        found = sorted(variants(Image.fromarray(pixels), codec), key=lambda one: one[1])
        least = max(least, min(size for size, _, _ in found))
        for budget in budgets:
            chosen[budget] += [decoded for size, _, decoded in found if size <= budget][:1]
    rows = []
    for budget in (one for one in budgets if one >= least):
        measured = Reconstruction(judge)
        measured.update(torch.from_numpy(np.stack(chosen[budget])).permute(0, 3, 1, 2), originals)
        rows.append({"bytes": budget, **measured.compute()})
    return {"least_bytes": least, "rows": rows}


def draw(results: dict[str, Any]) -> Figure:
    """Each measure over bytes: tokenizers solid, codecs dashed and grey."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    size, lines = results["size"], [(name, rows, True) for name, rows in results["tokenizers"].items()]
    lines += [(name, codec["rows"], False) for name, codec in results["codecs"].items()]
    for axes, (measure, label) in zip(figure.subplots(1, len(AXES)), AXES.items()):
        for number, (name, rows, ours) in enumerate(lines):
            style: dict[str, Any] = (
                {"linewidth": 2.2, "linestyle": "-"}
                if ours
                else {"linewidth": 1.2, "linestyle": "--", "color": str(0.25 + 0.08 * number)}
            )
            points = [one["bytes"] for one in rows], [one[measure] for one in rows]
            axes.plot(*points, label=name, marker="os^Dvx"[number % 6], markersize=5, **style)
        axes.set_xscale("log")
        axes.set_xlabel(f"bytes of a file, {size} x {size} px")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="+", default=["titok", "one-d-piece"], help="of the zoo, or folders")
    parser.add_argument("--count", type=int, default=200, help="crops of photographs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=_ROOT / "docs/rate-distortion.png")
    parser.add_argument("--smoke", action="store_true", help="a random tokenizer, few pictures, nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if options.smoke:
        models: dict[str, Any] = {"random": OneDPiece.named("tiny").eval()}
    else:
        found = [find_tokenizer(name) for name in options.tokenizers]
        models = {name: load_tokenizer(folder) for name, folder in found}
    if len(sizes := {model.size for model in models.values()}) > 1:
        raise InputError(f"tokenizers of different sizes cannot be compared: {sizes}")
    size, judge = sizes.pop()[0], Judge()
    crops = Scenes("test", options.seed, size=size, objects=(0, 0))
    originals = stacked(crops[number] for number in range(3 if options.smoke else options.count))
    flat = originals.float().mean((2, 3), keepdim=True).expand(originals.shape) / 255
    measured = Reconstruction(judge)
    measured.update(flat, originals)
    results: dict[str, Any] = {"size": size, "flat": {"bytes": 3, **measured.compute()}, "tokenizers": {}, "codecs": {}}
    print("flat", results["flat"])
    for name, model in models.items():
        results["tokenizers"][name] = of_tokenizer(name, model, originals, judge)
        print(name, *results["tokenizers"][name], sep="\n  ", flush=True)
    budgets = sorted({*BUDGETS, *(int(row["bytes"]) for rows in results["tokenizers"].values() for row in rows)})
    for codec in CODECS:
        results["codecs"][codec] = of_codec(codec, originals, budgets, judge)
        print(codec, *results["codecs"][codec]["rows"], sep="\n  ", flush=True)
    file = io.BytesIO()
    draw(results).savefig(file, format="png", dpi=160)
    if not options.smoke:
        write("rate_distortion", options, {"methods": ["titok", "one-d-piece"], **results})
        write_bytes(options.figure, file.getvalue())


if __name__ == "__main__":
    main()
