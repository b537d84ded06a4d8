"""Pictures a second of `foveate tokenize` and `foveate reconstruct` on a folder of JPEG files, and where time goes.

The whole job with several numbers of threads, beside the tokenizer alone on pictures in memory, in turns: a share of
1 says that nothing but the tokenizer's own work takes time. With --ray also on as many processes of a Ray on this
machine, its start and the loading of the tokenizer in each process included.

python benchmarks/tokenizer_throughput.py --tokenizer titok --threads 1
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llava_shaped import write
from PIL import Image

from foveate.data.scenes import Scenes
from foveate.measure.timing import Timing, interleave, seconds
from foveate.methods.tokenize.one_d_piece import OneDPiece
from foveate.tokenize import Job, Reconstruct, Tokenize, find_files, on_ray


def make_pictures(folder: Path, count: int, side: int, seed: int) -> None:
    """JPEG files of scenes."""
    folder.mkdir()
    scenes = Scenes("test", seed, size=side)
    for number in range(count):
        Image.fromarray(scenes[number].image).save(folder / f"{number:06}.jpg", quality=90)


def whole(make: Callable[..., Job], source: Path, out: Path, threads: int, processes: int = 0) -> float:
    """Seconds of the job into an empty folder; the loading of the tokenizer counts only where processes load it."""
    shutil.rmtree(out, ignore_errors=True)
    job = make(threads=threads)
    pairs = find_files([source], out, type(job))
    start = time.perf_counter()
    outcomes = list(on_ray(job, pairs, processes) if processes else job.run(pairs))
    spent = time.perf_counter() - start
    assert all(one.state == "written" for one in outcomes)
    return spent


def alone(job: Job, source: Path) -> Callable[[], float]:
    """How long the tokenizer takes for all of the files, which are in memory."""
    loaded = [job.load(pair) for pair in find_files([source], source / "none", type(job))]
    batches = [loaded[first : first + job.batch] for first in range(0, len(loaded), job.batch)]

    @torch.inference_mode()
    def run() -> None:
        for batch in batches:
            job.compute(batch)

    return lambda: seconds(run, job.device)


def row(timing: Timing, count: int) -> dict[str, Any]:
    """`share`: of the tokenizer alone in the time of the whole job."""
    return {
        "pictures_per_second": count / timing.second_seconds, "tokenizer_alone": count / timing.first_seconds,
        "share": 1 / timing.ratio, "quartiles": [1 / timing.high, 1 / timing.low],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="titok", help="of the zoo, or a folder")
    parser.add_argument("--count", type=int, default=512, help="pictures")
    parser.add_argument("--side", type=int, default=256, help="of the JPEG files, px")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="threads that read and write")
    parser.add_argument("--ray", type=int, nargs="*", default=[], help="processes")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a random tokenizer, few pictures, nothing is written")
    options = parser.parse_args()
    if options.smoke:
        options.count, options.pairs, options.workers = 32, 1, options.workers[:1]
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder, tokenizer = Path(place), options.tokenizer
        if options.smoke:
            tokenizer = str(folder / "random")
            OneDPiece.named("tiny").save_pretrained(tokenizer)
        make_pictures(folder / "in", options.count, options.side, options.seed)
        for kind, source, out in ((Tokenize, "in", "codes"), (Reconstruct, "codes", "pictures")):

            def make(kind: type[Job] = kind, **changes: Any) -> Job:
                return kind(tokenizer, batch=options.batch, device=options.device, **changes)

            ways = [(f"{threads} threads", threads, 0) for threads in options.workers]
            ways += [(f"{processes} processes", 1, processes) for processes in options.ray]
            model = alone(make(), folder / source)
            for label, threads, processes in ways:

                def job(
                    threads: int = threads, processes: int = processes, source: str = source, out: str = out
                ) -> float:
                    return whole(make, folder / source, folder / out, threads, processes)

                found = row(interleave(model, job, options.pairs), options.count)
                results.setdefault(kind.__name__.lower(), {})[label] = found
                print(kind.__name__.lower(), label, found, flush=True)
    if not options.smoke:
        write("tokenizer_throughput", options, {"methods": ["titok", "one-d-piece"], **results})


if __name__ == "__main__":
    main()
