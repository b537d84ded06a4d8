"""Quality against cost, one line a method, as an SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from foveate.report.wording import sections

if TYPE_CHECKING:
    from foveate.measure.comparison import R, Table

# Colours that keep their contrast on white and on near-black; the order is that of the methods.
COLOURS = ("#1f7a8c", "#d1603d", "#7a5ea8", "#5b8c3a", "#b8478b", "#b08a1e", "#3d6fd1", "#8a5a44")
_DASHES = ((0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (2, 2)))
_MARKERS = ("o", "s", "^", "D")

# Stand-ins that matplotlib writes and the page's CSS variables replace, so that one plot serves light and dark.
_INK, _SOFT, _LINE = "#010203", "#040506", "#070809"
_VARIABLES = {_INK: "var(--ink)", _SOFT: "var(--soft)", _LINE: "var(--line)"}


def plot_svg(comparison: Table[R]) -> str:
    """Quality over the share of dense's cost, as inline SVG: the figure that the comparison chooses by, better above.

    Points are labelled with their method at the end of each line. No font, script or address is embedded.
    """
    # The object interface: pyplot would keep global state and may want a display.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    measured = [row for row in comparison.rows if row.refused is None]
    task = comparison.task
    by = task.quality(measured)
    scale, unit = (100, "%") if by.unit == "share" else (1, by.unit)
    dense = [row for row in measured if row.method == "dense"]

    def quality(row: R) -> float:
        value = row.figure(by.name)
        return float("nan") if value is None else scale * value

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "foveate", "font.family": "sans-serif", "font.size": 10}
    with rc_context(settings):
        figure = Figure(figsize=(8.4, 4.6))
        axes = figure.add_subplot()
        labels: list[tuple[float, float, str, str]] = []
        for baseline, groups in zip((True, False), sections(comparison)):
            for i, group in enumerate(g for g in groups if g[0].method != "dense"):
                points = sorted((task.spent(row), quality(row)) for row in group if row.refused is None)
                if not points:
                    continue
                colour = _SOFT if baseline else COLOURS[i % len(COLOURS)]
                axes.plot(
                    [x for x, _ in points],
                    [y for _, y in points],
                    color=colour,
                    linestyle=_DASHES[i % len(_DASHES)] if baseline else "-",
                    linewidth=1.2 if baseline else 2.2,
                    marker=_MARKERS[i % len(_MARKERS)],
                    markersize=4 if baseline else 6,
                    markeredgewidth=0,
                    zorder=2 if baseline else 3,
                    gid=f"line-{group[0].method}",
                )
                labels.append((*points[-1], group[0].method, colour))
        for row in dense:
            axes.axhline(quality(row), color=_LINE, linewidth=1, zorder=1)
            axes.plot([task.spent(row)], [quality(row)], marker="*", markersize=13, color=_INK, zorder=4)
            labels.append((task.spent(row), quality(row), "dense", _INK))
        # Labels stand in a column at the right, apart from each other, each tied to the end of its line.
        axes.margins(x=0.04, y=0.08)
        low, high = axes.get_ylim()
        gap = (high - low) / 19
        heights: list[float] = []
        ordered = sorted(labels, key=lambda label: label[1])
        for _, y, _, _ in ordered:
            heights.append(max(y, heights[-1] + gap) if heights else y)
        if heights and heights[-1] > high:
            heights = [height - (heights[-1] - high) for height in heights]
        for (x, y, name, colour), height in zip(ordered, heights):
            axes.annotate(
                name, (x, y), (1.06, height), textcoords=axes.get_yaxis_transform(), annotation_clip=False,
                va="center", color=colour,
                arrowprops={"arrowstyle": "-", "color": _LINE, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3},
            )  # fmt: skip
        if by.lower:
            axes.invert_yaxis()
        axes.set_xlabel(f"{task.cost} of {task.work}, as a share of dense", color=_INK)
        axes.set_ylabel(f"{by.words.removeprefix('of ')} ({unit})", color=_INK)
        axes.tick_params(colors=_SOFT, length=3)
        axes.grid(color=_LINE, linewidth=0.5, alpha=0.6)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_LINE)
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        figure.subplots_adjust(left=0.08, right=0.8, top=0.97, bottom=0.12)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(file.getvalue())


def _inline(svg: str) -> str:
    """Only the <svg> element, sized by the page, in the page's font and colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', r'\1role="img" aria-label="quality against cost"', svg, count=1)
    svg = re.sub(r"font: ([^;\"]*?)'[^;\"]*", r"font: \1sans-serif", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg
