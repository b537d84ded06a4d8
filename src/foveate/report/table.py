"""The comparison as one table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import Box
from rich.table import Table
from rich.text import Text

from foveate.report.wording import cells, is_choice, number, sections, shown_columns

if TYPE_CHECKING:
    from foveate.measure.comparison import R
    from foveate.measure.comparison import Table as Comparison

MINIMUM_WIDTH = 112
"""Columns of a terminal below which the table has to wrap; what is no terminal gets as many."""

_HEADERS = {"FLOPs": "FLOPs\n× dense", "time": "time × dense\n(quartiles)"}
# No frame; a rule under the head and between sections.
_RULES = Box("    \n    \n ── \n    \n ── \n    \n    \n    \n")


def comparison_table(comparison: Comparison[R]) -> Table:
    """Baselines, a rule, methods; the row that the comparison would choose is marked with ● and green.

    Why a method refused a budget stands under the table.
    """
    columns, task = shown_columns(comparison), comparison.task
    heads = _HEADERS | {task.tokens: f"{task.tokens}\nby stage"}
    heads |= {one.name: f"{one.name}\n({one.unit})" for one in task.figures if one.unit not in ("", "share", "B")}
    refusals = [f"{row.method} at {number(row.budget)}: {row.refused}" for row in comparison.rows if row.refused]
    table = Table(
        box=_RULES,
        show_edge=False,
        pad_edge=False,
        header_style="bold",
        border_style="bright_black",
        # Text, not markup, here and below: names and reasons may contain brackets.
        caption=Text("\n" + "\n".join(refusals)) if refusals else None,
        caption_justify="left",
        caption_style="bright_black",
    )
    for column in columns:
        text = column in ("method", task.tokens)
        table.add_column(
            heads.get(column, column),
            justify="left" if text else "right",
            no_wrap=column != task.tokens,
            vertical="bottom",
        )
    for baselines, groups in zip((True, False), sections(comparison)):
        for group in groups:
            for position, row in enumerate(group):
                text_of = cells(row, task)
                chosen = is_choice(comparison, row)
                if position:
                    text_of["method"] = ""
                if chosen:
                    text_of["method"] = f"● {row.method}"
                if row.refused is not None:
                    text_of[task.tokens if task.tokens in columns else "FLOPs"] = "refused"
                style = "bold green" if chosen else "bright_black" if baselines or row.refused is not None else ""
                table.add_row(*(Text(text_of[column]) for column in columns), style=style)
        table.add_section()
    return table
