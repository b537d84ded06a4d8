"""Peak memory of `foveate detect --out --json` by the length of the video, each in a process of its own.

Goal: an hour needs no more than a minute, but for the tables of frames that the MP4 format itself keeps to its end.

python benchmarks/detect_memory.py --minutes 1 10 60
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from detect_pipeline import film, random_detector
from llava_shaped import write


def peak(command: list[str]) -> int:
    """Bytes: the most that was resident while the command ran."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 60.0])
    parser.add_argument("--size", default="64x48", help="of the videos")
    parser.add_argument("--rate", type=int, default=25, help="frames a second of the videos")
    parser.add_argument("--every", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_detector("tiny", 64, options.seed).save_pretrained(folder / "model")
        for minutes in options.minutes:
            file = film(folder / "a.mp4", 60 * minutes, options.rate, (width, height))
            command = [sys.executable, "-m", "foveate.cli", "detect", str(file), "--model", str(folder / "model")]
            outputs = ["--out", str(folder / "b.mp4"), "--json", str(folder / "b.json"), "--every", str(options.every)]
            found = {"minutes": minutes, "peak_bytes": peak([*command, *outputs])}
            found["frames"] = round(60 * minutes * options.rate)
            found["keyframes"] = len(json.loads((folder / "b.json").read_text())["keyframes"])
            results.append(found)
            print(found, flush=True)
    write("detect_memory", options, {"goal": "an hour as a minute", "results": results})


if __name__ == "__main__":
    main()
