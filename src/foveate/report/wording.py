"""How numbers and facts are written, the same in the terminal, in the HTML report and on the methods' pages."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.measure.compare import Comparison, Row
    from foveate.method import Claim

NOTHING = "–"
"""For a figure that was not measured."""

COLUMNS = ("method", "budget", "visual tokens", "FLOPs", "time", "KV cache", "accuracy", "agreement", "KL")

LEGEND = {
    "budget": "visual tokens averaged over the language model's layers, as a share of all",
    "visual tokens": "how many are left after each stage, mean over the samples",
    "FLOPs": "of one prefill, the method's own work included, as a share of dense",
    "time": "of one prefill, measured, as a share of dense: median of interleaved pairs (lower–upper quartile)",
    "KV cache": "bytes that one sample's prefill leaves in the cache",
    "accuracy": "share of answers that are right",
    "agreement": "share of samples where the generated answer is the same as dense's",
    "KL": "divergence of the first answer token's distribution from dense's, in nats; 0 is the same",
}

FAMILIES = {
    "hf-vlm": "vision-language models of transformers",
    "hf-vision": "vision encoders of transformers",
    "hf-video": "video encoders of transformers",
    "timm": "vision transformers of timm",
    "diffusers": "pipelines of diffusers",
}
"""What `Card.hosts` names."""


def setting(value: Any) -> str:
    """A hyperparameter's value; "" where there is none."""
    if value is inspect.Parameter.empty:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def source(claim: Claim) -> str:
    """Where the figure of a claim stands."""
    return re.sub("^card", "our own count", claim.source)


def cells(row: Row) -> dict[str, str]:
    """column -> text, for every one of `COLUMNS`."""
    if row.refused is not None:
        return dict.fromkeys(COLUMNS, "") | {"method": row.method, "budget": number(row.budget)}
    return {
        "method": row.method,
        "budget": number(row.budget),
        "visual tokens": "→".join(number(left, 1) for left in leaving(row)),
        "FLOPs": share(row.flops_ratio),
        "time": f"{row.time_ratio:.2f} ({row.time_low:.2f}–{row.time_high:.2f})",
        "KV cache": size(row.kv_bytes),
        "accuracy": percent(row.accuracy),
        "agreement": percent(row.agreement),
        "KL": NOTHING if row.kl is None else f"{row.kl:.3f}",
    }


def leaving(row: Row) -> list[float]:
    """Visual tokens after each stage, without stages that changed nothing."""
    counts = [count for _, count in row.stages or ()]
    return [count for i, count in enumerate(counts) if i == 0 or count != counts[i - 1]]


def sections(comparison: Comparison) -> list[list[list[Row]]]:
    """Baselines, then methods; in each, the rows of one method together, the larger budget first."""
    found = []
    for baseline in (True, False):
        rows = [row for row in comparison.rows if row.baseline == baseline]
        names = list(dict.fromkeys(row.method for row in rows))
        groups = [sorted((r for r in rows if r.method == name), key=lambda r: -r.budget) for name in names]
        found.append(groups)
    return found


def is_choice(comparison: Comparison, row: Row) -> bool:
    """Whether this is the row that the comparison would choose."""
    return comparison.choice is not None and row == comparison.choice


def reason(comparison: Comparison) -> str:
    """Why this row was chosen; it also says so where the FLOPs that it saves came to nothing on the clock."""
    chosen = comparison.choice
    if chosen is None or chosen.time_ratio is None or chosen.time_ratio < 1:
        return comparison.why
    return f"{comparison.why} It saved no time on this machine: {chosen.time_ratio:.2f} × dense, measured."


def shown_columns(rows: Iterable[Row]) -> tuple[str, ...]:
    """`COLUMNS` without accuracy where no sample has an answer."""
    known = any(row.accuracy is not None for row in rows)
    return tuple(column for column in COLUMNS if known or column != "accuracy")


def number(value: float, places: int = 3) -> str:
    """At most `places` decimals, without trailing zeros: 0.5, 36, 73.4."""
    return f"{value:.{places}f}".rstrip("0").rstrip(".") if value % 1 else str(int(value))


def share(value: float | None) -> str:
    """A share of dense: 0.53, and more digits where it is small."""
    if value is None:
        return NOTHING
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f} %"


def size(count: float | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return NOTHING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def si(count: float) -> str:
    """Three digits and an SI prefix, ready for a unit: "3.87 M"."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {prefix}"
    return f"{count:g} "
