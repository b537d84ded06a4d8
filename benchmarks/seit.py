"""Stored tokens: what they take on disk, and what pre-training and token-space augmentation give with few labels.

`foveate train seit` in all its stages, on one token file for each seed: TokenAdapt; masked token modelling with and
without TokenAdapt; a classifier on a tenth of the labels, from scratch and from the pre-training, with crops alone,
with ColorAdapt and Emb-Noise, with TokenAdapt, and with both, from the pre-training also without the layers' decay of
the learning rate; linear probes of the pre-trained encoder and of an untrained one. What an interrupted run has
trained is found again in --out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from llava_shaped import write
from trainings import means

from foveate import train
from foveate.methods.learn.seit import Seit

STORAGE = (
    "token_bytes", "undeflated_bytes", "jpeg_bytes", "png_bytes", "ratio_to_jpeg", "ratio_to_png", "bits_per_token",
    "entropy", "tokenizer_psnr",
)  # fmt: skip


def untrained(folder: Path, like: Path, seed: int) -> Path:
    """A pre-training of no steps: the encoder that a probe is compared with, with the same tokens."""
    torch.manual_seed(seed)
    Seit(**json.loads((like / "config.json").read_text())).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/seit"), help="where trainings are kept")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seeds", type=int, default=2, help="of everything")
    parser.add_argument("--steps", type=int, default=1200, help="of a pre-training")
    parser.add_argument("--tuning-steps", type=int, default=400, help="of each classifier, and of TokenAdapt")
    parser.add_argument("--batch", type=int, default=32, help="pictures a step")
    parser.add_argument("--pictures", type=int, default=3000, help="stored as tokens")
    parser.add_argument("--labels", type=float, default=0.1, help="share of them that has labels")
    parser.add_argument("--test", type=int, default=1000, help="pictures of the test split")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="tiny models and two steps, nothing is written")
    options = parser.parse_args()

    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seed, options.seed + options.seeds):
        folder = options.out / str(seed)

        def run(name: str, *, folder: Path = folder, seed: int = seed, **settings: Any) -> str:
            """Trains one of them, or finds it, and returns its folder."""
            if not options.smoke:
                tuning = settings.get("stage", "pretrain") != "pretrain"
                settings |= {"pictures": options.pictures, "test_scenes": options.test, "labels": options.labels}
                settings["batch"] = options.batch
                settings["steps"] = options.tuning_steps if tuning else options.steps
            settings["threads"] = options.threads
            runs.setdefault(name, []).append(
                train.run("seit", out=folder / name, seed=seed, smoke=options.smoke, **settings)
            )
            return str(folder / name)

        start = run("pre-training")
        adapt = run("TokenAdapt", stage="adapt", tokens=start)
        adapted = run("pre-training with TokenAdapt", tokens=start, adapt=adapt)
        color = {"color": True}
        for name, settings in {
            "crops": {},
            "crops and colour": color,
            "TokenAdapt": {"adapt": adapt},
            "TokenAdapt and colour": color | {"adapt": adapt},
        }.items():
            run(f"from scratch, {name}", stage="finetune", tokens=start, **settings)
            run(f"fine-tuned, {name}", stage="finetune", tokens=start, start=start, **settings)
            run(
                f"fine-tuned without decay, {name}",
                stage="finetune",
                tokens=start,
                start=start,
                layer_decay=1.0,
                **settings,
            )
        run("fine-tuned twice adapted", stage="finetune", tokens=start, start=adapted, adapt=adapt, **color)
        run("probe", stage="probe", tokens=start, start=start, lr=1e-2)
        nothing = untrained(folder / "untrained", Path(start), seed)
        run("probe of an untrained encoder", stage="probe", tokens=start, start=str(nothing), lr=1e-2)

    results = []
    for name, some in runs.items():
        row: dict[str, Any] = {"name": name, "stage": some[0]["stage"]}
        figures = [key for key, value in some[0].items() if isinstance(value, float) and key not in STORAGE]
        row |= means(some, figures)
        results.append(row)
        print(row)
    storage = [{name: one[name] for name in STORAGE} for one in runs["pre-training"]]
    print(storage)
    if not options.smoke:
        write("seit", options, {"storage_of_the_test_pictures": storage, "results": results})


if __name__ == "__main__":
    main()
