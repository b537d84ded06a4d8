"""The whole of `foveate detect` on one video, split into decode, model, draw and encode: dense and with dropped tokens.

The video is a clip of `foveate.data.scenes`, enlarged and repeated. Times do not hang on the detector's weights, so a
random one of any configuration will do: `--config vit-b --short 288` is the paper's.

python benchmarks/detect_pipeline.py --config tiny --size 1280x720 --seconds 20
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from llava_shaped import write
from PIL import Image

from foveate.data.scenes import ACTIONS, Clips
from foveate.detect import Annotation, Detection, KeyframesFile, Stopwatch
from foveate.methods.video.evad_detector import CONFIGURATIONS, EvadDetector


def film(file: Path, seconds: float, rate: int, size: tuple[int, int]) -> Path:
    """A clip of scenes, forwards and backwards until it is long enough, in H.264 without sound."""
    frames = Clips("test", 0, frames=16, size=64)[0].frames
    pictures = [np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BICUBIC)) for one in frames]
    pictures += pictures[-2:0:-1]
    with av.open(str(file), "w") as container:
        out: Any = container.add_stream("h264", rate=rate, options={"preset": "ultrafast", "crf": "26"})
        out.width, out.height, out.pix_fmt = *size, "yuv420p"
        for number in range(round(seconds * rate)):
            frame = av.VideoFrame.from_ndarray(pictures[number // 2 % len(pictures)], format="rgb24")
            container.mux(out.encode(frame))
        container.mux(out.encode(None))
    return file


def random_detector(config: str, image: int, seed: int) -> EvadDetector:
    torch.manual_seed(seed)
    return EvadDetector.named(config, image=image, classes=len(ACTIONS)).eval()


def measured(file: Path, folder: Path, detector: EvadDetector, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each part, and of all together, of one run that writes both files."""
    watch = Stopwatch()
    detection = Detection(
        file, detector, ACTIONS, every=options.every, short=options.short, batch=options.batch, watch=watch
    )
    annotation = Annotation(file, folder / "out.mp4", ACTIONS, watch)
    start, count = time.perf_counter(), 0
    with KeyframesFile(folder / "out.json", {"model": options.config}, dict) as found:

        def keyframes() -> Any:
            nonlocal count
            for one in detection:
                found.add(one)
                count += 1
                yield one

        annotation.write(keyframes())
    whole = time.perf_counter() - start
    return {
        "keyframes": count,
        "seconds": whole,
        "parts": dict(watch.seconds),
        "shares": {name: spent / whole for name, spent in watch.seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", choices=sorted(CONFIGURATIONS))
    parser.add_argument("--short", type=int, default=64, help="px of the shorter side that the detector sees")
    parser.add_argument("--size", default="1280x720", help="of the video")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rate", type=int, default=30, help="frames a second of the video")
    parser.add_argument("--every", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.7, 0.5])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--result", default="detect_pipeline", help="name of the JSON file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    width, height = map(int, options.size.split("x"))
    detector = random_detector(options.config, options.short, options.seed).to(options.device)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        file = film(Path(folder) / "a.mp4", options.seconds, options.rate, (width, height))
        warm = film(Path(folder) / "b.mp4", 1, options.rate, (width, height))
        measured(warm, Path(folder), detector, options)
        for keep in options.keep:
            results[str(keep)] = measured(file, Path(folder), detector.set_dropout(keep=keep), options)
            print(keep, results[str(keep)])
    write(options.result, options, {"video_seconds": options.seconds, "by_keep": results})


if __name__ == "__main__":
    main()
