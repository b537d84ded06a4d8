"""A comparison with made-up numbers, of the fields that the report reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from foveate.measure.comparison import ANSWERING

FIGURES = {"KV cache": "kv_bytes", "accuracy": "accuracy", "agreement": "agreement", "KL": "kl"}
NAMES = ("random", "pool", "fopru", "pyramiddrop")


def row(method: str, budget: float, **changes: Any) -> SimpleNamespace:
    """Numbers that differ from row to row, so that a test can find each in the output."""
    shift = sum(map(ord, method)) % 50 / 1000 + budget
    values: dict[str, Any] = {
        "method": method,
        "settings": {"keep": budget},
        "budget": budget,
        "baseline": method in ("dense", "random", "grid", "pool", "resolution"),
        "stages": [("llm.input", 144 * budget)],
        "visual_share": budget,
        "flops": 1e9 * budget,
        "flops_ratio": 0.2 + 0.5 * shift,
        "time_ratio": 0.3 + 0.5 * shift,
        "time_low": 0.25 + 0.5 * shift,
        "time_high": 0.4 + 0.5 * shift,
        "kv_bytes": 1000 + 1e5 * shift,
        "accuracy": 0.4 + 0.3 * shift,
        "accuracy_by_type": {"count": 0.25 + 0.1 * shift, "where": 0.5},
        "agreement": 0.5 + 0.3 * shift,
        "kl": 1.3 - shift,
        "refused": None,
    }
    values |= changes
    figures = {name: values[key] for name, key in FIGURES.items()}
    return SimpleNamespace(**values, figure=figures.get)


def comparison(**changes: Any) -> SimpleNamespace:
    rows = [row("dense", 1, flops_ratio=1.0, accuracy=0.91, agreement=1.0)]
    rows += [row(name, budget) for name in NAMES for budget in (0.5, 0.25)]
    rows.append(row("pyramiddrop", 0.1, refused="the first of 8 layers sees all [red]tokens[/red]"))
    overlays = [
        SimpleNamespace(
            method=one.method,
            budget=one.budget,
            grid=(3, 4),
            depth=(1.0,) * 12,
            group=(-1,) * 12,
            answer=f"{one.method} {one.budget}",
        )
        for one in rows
        if one.refused is None
    ]
    values: dict[str, Any] = {
        "task": ANSWERING,
        "rows": rows,
        "environment": {"command": "x", "device": "cpu", "versions": {"torch": "2.9"}},
        "samples": 256,
        "choice": rows[-3],
        "why": "It keeps most at least cost.",
        "overlays": overlays,
        "shown": SimpleNamespace(id="a", prompt="what is left ?", expected="ant", answer="bee"),
    }
    return SimpleNamespace(**(values | changes))
