"""Clips: how long one takes to make, and the picture of `docs/scenes.md`.

python benchmarks/clips.py                         time, on one core
python benchmarks/clips.py --figure docs/clip.png  one clip, with boxes, masks and flow
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.utils import flow_to_image

from foveate.data.scenes import Clips

COLOURS = ((230, 25, 75), (60, 180, 75), (0, 130, 200), (255, 225, 25))


def measure(clips: Clips, count: int) -> None:
    """Prints CPU time a clip (median and 95th percentile), of the frames alone and of what is worked out later."""
    jobs = {"layout only": clips.layout, "frames, masks, boxes": clips.__getitem__}
    made = [clips[i] for i in range(count)]  # also fills the caches of emoji and photographs
    jobs |= {"questions": lambda i: made[i].questions, "flow": lambda i: made[i].flow()}
    for name, job in jobs.items():
        times = []
        for i in range(count):
            start = time.process_time()
            job(i)
            times.append(1000 * (time.process_time() - start))
        print(f"{name:<22} {np.median(times):6.2f} ms a clip, 95 % within {np.quantile(times, 0.95):6.2f} ms")
    print(f"{count} clips of {clips.frames} frames of {clips.size} px, CPU time of one process")


def figure(clips: Clips, index: int, file: Path, step: int = 2) -> None:
    """Every `step`-th frame of a clip, below it with boxes and masks, below that the flow (black: not valid)."""
    clip = clips[index]
    field, valid = clip.flow()
    # Full colour at the speed that one pixel in fifty exceeds.
    speed = np.linalg.norm(field, axis=-1, keepdims=True)
    field = field * np.minimum(1, np.quantile(speed[valid], 0.98) / np.maximum(speed, 1e-6))
    colours = flow_to_image(torch.from_numpy(field).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    colours[~valid] = 0
    columns = []
    for t in range(0, clips.frames - 1, step):
        marked = np.repeat(clip.frames[t].mean(-1, keepdims=True), 3, axis=-1)
        for actor in clip.actors:
            mask = actor.masks[t]
            marked[mask] = 0.4 * marked[mask] + 0.6 * np.array(COLOURS[actor.identity])
        picture = Image.fromarray(marked.astype(np.uint8))
        draw = ImageDraw.Draw(picture)
        for actor in clip.actors:
            x1, y1, x2, y2 = (int(v) for v in actor.boxes[t])
            if x2:
                draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=COLOURS[actor.identity])
        columns.append(np.concatenate([clip.frames[t], np.asarray(picture), colours[t]]))
    partial = file.with_name(f".{file.name}")
    # 128 colours keep the file small.
    Image.fromarray(np.concatenate(columns, axis=1)).quantize(128).save(partial, format="PNG", optimize=True)
    os.replace(partial, file)
    print(f"{file}: {file.stat().st_size} bytes\n{clip.caption}")
    for question in clip.questions:
        print(f"{question.type:<10} {question.question} {question.answer}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200, help="clips to time")
    parser.add_argument("--index", type=int, default=3, help="clip of the figure")
    parser.add_argument("--figure", type=Path, help="write the figure here instead of timing")
    options = parser.parse_args()
    sequence = Clips(options.split, options.seed)
    if options.figure is None:
        measure(sequence, options.count)
    else:
        figure(sequence, options.index, options.figure)
