"""How numbers and facts are written, the same in the terminal, in the HTML report and on the methods' pages."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.measure.comparison import Figure, Measured, R, Table, Task
    from foveate.method import Claim

NOTHING = "–"
"""For a figure that was not measured."""


FAMILIES = {
    "hf-vlm": "vision-language models of transformers",
    "hf-vision": "vision encoders of transformers",
    "hf-video": "video encoders of transformers",
    "timm": "vision transformers of timm",
    "diffusers": "pipelines of diffusers",
    "hf-causal-lm": "causal language models of transformers",
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


def legend(task: Task) -> dict[str, str]:
    """column -> what it says, of all columns but the method."""
    return {
        "budget": task.budget,
        task.tokens: f"how many are left after each stage, mean over the {task.samples[1]}",
        "FLOPs": f"of {task.work}, the method's own work included, as a share of dense",
        "time": f"of {task.work}, measured, as a share of dense: median of interleaved pairs (lower–upper quartile)",
    } | {figure.name: figure.legend for figure in task.figures}


def cells(row: Measured, task: Task) -> dict[str, str]:
    """column -> text, for the method and every column of `legend`."""
    if row.refused is not None:
        return dict.fromkeys(legend(task), "") | {"method": row.method, "budget": number(row.budget)}
    return {
        "method": row.method,
        "budget": number(row.budget),
        task.tokens: "→".join(number(left, 1) for left in leaving(row)),
        "FLOPs": share(row.flops_ratio),
        "time": f"{row.time_ratio:.2f} ({row.time_low:.2f}–{row.time_high:.2f})",
    } | {figure.name: value(figure, row.figure(figure.name)) for figure in task.figures}


def value(figure: Figure, measured: float | None) -> str:
    """A figure of quality in its column."""
    if figure.unit == "B":
        return size(measured)
    return NOTHING if measured is None else figure.number(measured)


def leaving(row: Measured) -> list[float]:
    """Tokens after each stage, without stages that changed nothing."""
    counts = [count for _, count in row.stages or ()]
    return [count for i, count in enumerate(counts) if i == 0 or count != counts[i - 1]]


def sections(comparison: Table[R]) -> list[list[list[R]]]:
    """Baselines, then methods; in each, the rows of one method together, the larger budget first."""
    found = []
    for baseline in (True, False):
        rows = [row for row in comparison.rows if row.baseline == baseline]
        names = list(dict.fromkeys(row.method for row in rows))
        groups = [sorted((r for r in rows if r.method == name), key=lambda r: -r.budget) for name in names]
        found.append(groups)
    return found


def is_choice(comparison: Table[R], row: R) -> bool:
    """Whether this is the row that the comparison would choose."""
    return comparison.choice is not None and row == comparison.choice


def reason(comparison: Table[R]) -> str:
    """Why this row was chosen; it also says so where the FLOPs that it saves came to nothing on the clock."""
    chosen = comparison.choice
    if chosen is None or chosen.time_ratio is None or chosen.time_ratio < 1:
        return comparison.why
    return f"{comparison.why} It saved no time on this machine: {chosen.time_ratio:.2f} × dense, measured."


def shown_columns(comparison: Table[R]) -> tuple[str, ...]:
    """All columns but those that no row has anything in: accuracy, where no sample has an answer."""
    task, rows = comparison.task, comparison.rows
    empty = {figure.name for figure in task.figures if all(row.figure(figure.name) is None for row in rows)}
    if not any(row.stages for row in rows):
        empty.add(task.tokens)
    return ("method", *(column for column in legend(task) if column not in empty))


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
