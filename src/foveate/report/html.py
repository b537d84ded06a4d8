"""The HTML report: one file that needs nothing else, neither scripts nor the network."""

from __future__ import annotations

import base64
import importlib.resources
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from foveate.method import published
from foveate.report.overlay import ROW, SIDE, draw_overlay, draw_strip
from foveate.report.plot import plot_svg
from foveate.report.wording import cells, is_choice, legend, number, reason, sections, shown_columns

if TYPE_CHECKING:
    from foveate.measure.comparison import Measured, R, Table, Task
    from foveate.measure.provenance import Overlay


def report_html(
    comparison: Table[R],
    *,
    command: str,
    model: str,
    picture: Image.Image | None = None,
    clip: Sequence[tuple[float, Image.Image]] = (),
    made: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]] = (),
) -> str:
    """The report as text. Whatever the user gave (command, model, prompts, names) is escaped.

    Args:
        comparison: what was measured.
        command: the command line that makes this report again.
        model: name or path of the model.
        picture: what the model saw of the picture of `comparison.shown`, for the overlays.
        clip: where that is a clip, the second at which each frame is shown, and what the model saw of it.
        made: of models that make pictures, a row's label and its pictures with what stands below each.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = importlib.resources.files("foveate.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    columns, task = shown_columns(comparison), comparison.task
    chosen = next((row for row in comparison.rows if is_choice(comparison, row)), None)
    return environment.from_string(source).render(
        model=model,
        task=task,
        facts=_facts(task),
        notes=getattr(comparison, "notes", ()),
        command=command,
        shown=comparison.shown,
        samples=comparison.samples,
        environment=_flat({name: value for name, value in comparison.environment.items() if name != "command"}),
        why=reason(comparison),
        chosen=None if chosen is None else cells(chosen, task),
        plot=_plot(comparison),
        made=[(label, [(text, _data(_at_most(one))) for text, one in pictures]) for label, pictures in made],
        columns=columns,
        legend={name: text for name, text in legend(task).items() if name in columns},
        sections=[[_table_row(comparison, row, first=row is group[0]) for group in block for row in group]
                  for block in sections(comparison)],
        by_type=_by_type(comparison),
        gallery=[] if picture is None and not clip else _gallery(comparison, picture, clip),
        dense=_dense(comparison, picture, clip),
        in_row=min(ROW, len(clip)),
        papers=_papers(comparison.rows),
    )  # fmt: skip


def _plot(comparison: Table[R]) -> Markup | None:
    """None where there is no quality to plot."""
    by = comparison.task.quality(comparison.rows)
    if all(row.figure(by.name) is None for row in comparison.rows):
        return None
    return Markup(plot_svg(comparison))  # our own drawing; matplotlib escapes the names in it


def _table_row(comparison: Table[R], row: R, first: bool) -> dict[str, Any]:
    settings = ", ".join(f"{name}={value}" for name, value in (row.settings or {}).items())
    stages = " · ".join(f"{label}: {number(left, 1)}" for label, left in row.stages or ())
    return {
        "cells": cells(row, comparison.task),
        "refused": row.refused,
        "settings": settings,
        "stages": stages,
        "chosen": is_choice(comparison, row),
        "first": first,
    }


def _by_type(comparison: Table[R]) -> dict[str, Any] | None:
    """Accuracy by type of question: column heads and a line a row, or None without types."""
    shares: dict[int, dict[str, float]] = {
        id(row): getattr(row, "accuracy_by_type", None) or {} for row in comparison.rows
    }
    types = sorted({kind for share in shares.values() for kind in share})
    if len(types) < 2:
        return None
    lines: list[dict[str, Any]] = []
    for block in sections(comparison):
        for row in (row for group in block for row in group):
            if not (share := shares[id(row)]):
                continue
            values = [share.get(kind) for kind in types]
            lines.append(
                {
                    "method": row.method,
                    "budget": number(row.budget),
                    "first": not lines or lines[-1]["method"] != row.method,
                    "baseline": row.baseline,
                    "values": ["–" if value is None else f"{100 * value:.0f}" for value in values],
                }
            )
    return {"types": types, "lines": lines}


def _facts(task: Task) -> list[str]:
    """The columns that stand beside the choice: costs, and figures that need no explanation."""
    return ["FLOPs", "time", *(figure.name for figure in task.figures if figure.unit != "nats")]


def _gallery(
    comparison: Table[R], picture: Image.Image | None, clip: Sequence[tuple[float, Image.Image]]
) -> list[dict[str, Any]]:
    """A line a method, methods before baselines, with an overlay a budget."""
    baselines = {row.method for row in comparison.rows if row.baseline}
    names = list(dict.fromkeys(overlay.method for overlay in comparison.overlays))
    lines = []
    for name in sorted(names, key=lambda name: (name in baselines, names.index(name))):
        if name == "dense":
            continue
        shown = sorted((one for one in comparison.overlays if one.method == name), key=lambda one: -one.budget)
        pictures = [
            {"budget": number(one.budget), "answer": one.answer, "images": _images(one, picture, clip)} for one in shown
        ]
        lines.append({"method": name, "baseline": name in baselines, "pictures": pictures})
    return lines


def _images(
    overlay: Overlay, picture: Image.Image | None, clip: Sequence[tuple[float, Image.Image]]
) -> list[dict[str, Any]]:
    """What is drawn of an overlay: one image, or of a clip strips of its frames with the times for under them."""
    if not clip:
        assert picture is not None
        return [{"data": _data(draw_overlay(picture, overlay)), "times": []}]
    times = [f"{time:.2f} s" for time, _ in clip]
    strips = draw_strip([frame for _, frame in clip], overlay)
    return [{"data": _data(strip), "times": times[ROW * k : ROW * (k + 1)]} for k, strip in enumerate(strips)]


def _dense(
    comparison: Table[R], picture: Image.Image | None, clip: Sequence[tuple[float, Image.Image]]
) -> list[dict[str, Any]]:
    """What the unchanged model saw."""
    if picture is not None:
        return [{"data": _data(_shown(picture)), "times": []}]
    if not clip or not comparison.overlays:
        return []
    one = comparison.overlays[0]
    whole = replace(one, depth=(1.0,) * len(one.depth), group=(-1,) * len(one.group))
    return _images(whole, picture, clip)


def _shown(picture: Image.Image) -> Image.Image:
    scale = SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def _at_most(picture: Image.Image) -> Image.Image:
    """Small pictures as they are: the page enlarges them."""
    return _shown(picture) if max(picture.size) > SIDE else picture


def _data(picture: Image.Image) -> Markup:
    file = io.BytesIO()
    # Not optimize=True: two dozen overlays would take seconds to become a fifteenth smaller.
    picture.save(file, format="PNG")
    return Markup("data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii"))


def _papers(rows: Sequence[Measured]) -> list[dict[str, str]]:
    known = published()
    cards = [known[name].card for name in dict.fromkeys(row.method for row in rows) if name in known]
    return [{"slug": card.slug, "title": card.title, "arxiv": card.arxiv} for card in cards if card.arxiv]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested facts as `a.b -> text`."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name} ")
        else:
            found[f"{prefix}{name}"] = str(value)
    return found
