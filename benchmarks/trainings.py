"""What benchmarks that train share: their options, one training for each seed, and the means of what these measured."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from foveate import train


def arguments(description: str | None, slug: str, seeds: int = 1) -> argparse.ArgumentParser:
    """A parser with where trainings are kept, how many there are of each variant, and whether it is only a try."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / slug, help="where trainings are kept")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"trainings of each variant ({seeds})")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="tiny models and two steps, nothing is written")
    return parser


def trained(
    slug: str, options: argparse.Namespace, label: str, sizes: Mapping[str, Any], **settings: Any
) -> list[dict[str, Any]]:
    """Metrics of `foveate train SLUG` for each seed; what is in the folder already is not trained again.

    `sizes` are settings that a try (`--smoke`) has of its own: steps, pictures, scenes.
    """
    name = label.replace(", ", "-").replace(" ", "-")
    chosen = {"threads": options.threads, **({} if options.smoke else sizes), **settings}
    return [
        train.run(slug, out=options.out / f"{name}-{seed}", seed=seed, smoke=options.smoke, **chosen)
        for seed in range(options.seed, options.seed + options.seeds)
    ]


def means(runs: list[dict[str, Any]], figures: Iterable[str]) -> dict[str, Any]:
    """Of each figure its mean and the value of each seed; and how long the trainings took."""
    found: dict[str, Any] = {}
    for figure in figures:
        values = [run[figure] for run in runs]
        found[figure] = {"mean": sum(values) / len(values), "by_seed": values}
    return found | {"training_seconds": [run["training"]["training_seconds"] for run in runs]}
