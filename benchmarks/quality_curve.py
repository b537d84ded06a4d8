"""Accuracy against FLOPs of every method and baseline on a model of the zoo and held-out scenes.

Of tiny-llava, with benchmarks/results/quality_curve.json and docs/quality-cost.png and .svg; of tiny-onevision by
--model src/foveate/zoo/tiny-onevision --count 1000 --clips 1000 --result quality_curve_onevision
--figure docs/quality-cost-onevision.png. The same command again measures what is missing: rows of the same options and
versions are kept.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import torch
from llava_shaped import earlier, write, write_bytes
from matplotlib.figure import Figure

from foveate.data.samples import from_scene_clips, from_scenes
from foveate.measure.compare import Comparison, Row, Shown, candidates, choose, compare
from foveate.measure.environment import environment

_ROOT = Path(__file__).parent.parent
_MARKERS = "osD^vPX*"
# Baselines are grey, so that no method is.
_COLOURS = [*(f"C{number}" for number in range(10) if number != 7), "#393b79", "#637939", "#e7ba52", "#5b2c1f"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=_ROOT / "src/foveate/zoo/tiny-llava")
    parser.add_argument("--count", type=int, default=2000, help="questions about pictures")
    parser.add_argument("--clips", type=int, default=0, help="questions about clips")
    parser.add_argument("--result", default="quality_curve", help="name of the JSON file")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25, 0.1, 0.05])
    parser.add_argument("--methods", nargs="+", default=list(candidates()))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=_ROOT / "docs/quality-cost.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(options.model, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(options.model, local_files_only=True)
    samples = from_scenes("test", options.count, options.seed)
    if options.clips:
        samples += from_scene_clips("test", options.clips, options.seed)
    order = [*(name for name in candidates(baselines=True) if name != "dense"), *options.methods]
    rows = _earlier(options)
    missing = [name for name in order if any((name, budget) not in rows for budget in options.budgets)]

    def so_far(shown: Shown | None = None) -> Comparison:
        keys = [("dense", 1.0), *((name, budget) for name in order for budget in options.budgets)]
        known = [rows[key] for key in keys if key in rows]
        surroundings = environment("cpu", torch.float32, options.seed) | {"batch_size": options.batch_size}
        return Comparison(known, surroundings, len(samples), *choose(known), shown=shown)

    def save(row: Row) -> None:
        print(row.label, row.refused or f"{row.accuracy} accuracy, {row.flops_ratio:.3f} FLOPs", flush=True)
        rows[row.method, row.budget] = row
        keep(so_far())

    def keep(comparison: Comparison) -> None:
        results: dict[str, Any] = json.loads(comparison.to_json())
        # Thousands of numbers that no figure shows.
        del results["overlays"]
        write(options.result, options, {"comparison": results})

    if missing:
        baselines = [name for name in missing if name not in options.methods]
        comparison = compare(
            model, processor, samples, [name for name in missing if name in options.methods], budgets=options.budgets,
            baselines=baselines, batch_size=options.batch_size, timing_pairs=options.pairs, seed=options.seed,
            on_row=save,
        )  # fmt: skip
        keep(so_far(comparison.shown))
    figure = draw(so_far())
    for suffix in (".png", ".svg"):
        file = io.BytesIO()
        figure.savefig(file, format=suffix[1:], dpi=160)
        write_bytes(options.figure.with_suffix(suffix), file.getvalue())


def _earlier(options: argparse.Namespace) -> dict[tuple[str, float], Row]:
    """The rows of an earlier run with the same options and versions: it goes on where that ended."""
    found = earlier(options.result, options, apart=("budgets", "methods", "figure", "result"))
    if not found:
        return {}
    return {(row.method, row.budget): row for row in (Row(**one) for one in found["comparison"]["rows"])}


def draw(comparison: Comparison) -> Figure:
    """Accuracy over the share of dense's FLOPs: methods solid, baselines dashed and grey, dense a line across."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    rows = [row for row in comparison.rows if row.refused is None]
    axes.axhline(100 * (rows[0].accuracy or 0), color="black", linewidth=1, label="dense")
    for number, name in enumerate(dict.fromkeys(row.method for row in rows[1:])):
        mine = sorted((r for r in rows if r.method == name), key=lambda r: r.flops_ratio or 0)
        style: dict[str, Any] = (
            {"color": str(0.35 + 0.1 * (number % 4)), "linestyle": "--", "linewidth": 1.2}
            if mine[0].baseline
            else {"linewidth": 2.2, "color": _COLOURS[number % len(_COLOURS)]}
        )
        axes.plot(
            [r.flops_ratio for r in mine], [100 * (r.accuracy or 0) for r in mine], label=name,
            marker=_MARKERS[number % len(_MARKERS)], markersize=5, **style,
        )  # fmt: skip
    axes.set_xlabel("FLOPs of the prefill, the method's own work included, as a share of dense")
    axes.set_ylabel(f"accuracy, % of {comparison.samples} questions")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9, ncols=2)
    return figure


if __name__ == "__main__":
    main()
