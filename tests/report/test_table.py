from __future__ import annotations

import io
import re
from typing import Any

from comparisons import comparison, row
from rich.console import Console

from foveate.report.table import MINIMUM_WIDTH, comparison_table


def text(of: Any, width: int = MINIMUM_WIDTH) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(comparison_table(of))
    return file.getvalue()


def test_every_row_has_its_numbers() -> None:
    made = comparison()
    lines = [line for line in text(made).splitlines() if re.search(r"\d →?|\d  ", line)]
    measured = [one for one in made.rows if one.refused is None]
    for one in measured:
        wanted = [f"{one.time_ratio:.2f} ({one.time_low:.2f}–{one.time_high:.2f})", f"{one.kl:.3f}"]
        wanted += [f"{100 * one.accuracy:.1f} %", f"{100 * one.agreement:.1f} %", f"{one.flops_ratio:.2f}"]
        assert any(all(figure in line for figure in wanted) for line in lines), one


def test_baselines_come_first_and_a_rule_divides() -> None:
    lines = text(comparison()).splitlines()
    rules = [i for i, line in enumerate(lines) if line.startswith("────")]
    first = [(line.split() or [""])[0] for line in lines]
    place = {name: first.index(name) for name in ("dense", "pool", "fopru")}
    assert len(rules) >= 2
    assert rules[0] < place["dense"] < place["pool"] < rules[1] < place["fopru"]


def test_choice_is_marked_and_refusal_explained_literally() -> None:
    shown = text(comparison())
    assert shown.count("●") == 1 and "● pyramiddrop" in shown
    assert "pyramiddrop at 0.1: the first of 8 layers sees all [red]tokens[/red]" in shown


def test_without_answers_there_is_no_accuracy_column() -> None:
    rows = [row("dense", 1, accuracy=None, accuracy_by_type={}), row("fopru", 0.5, accuracy=None, accuracy_by_type={})]
    shown = text(comparison(rows=rows, choice=None))
    assert "accuracy" not in shown and "agreement" in shown and "●" not in shown


def test_fits_the_width_and_folds_where_it_is_narrow() -> None:
    stages = [("llm.input", 144.0), ("llm.layer[2]", 72.0), ("llm.layer[3]", 72.0), ("llm.layer[4]", 36.5)]
    made = comparison(rows=[row("pyramiddrop", 0.5, stages=stages)], choice=None)
    assert "144→72→36.5" in text(made)
    assert max(map(len, text(made, 80).splitlines())) <= 80
