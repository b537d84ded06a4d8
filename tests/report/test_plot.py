from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from comparisons import comparison, row

from foveate.report.plot import plot_svg

SVG = "{http://www.w3.org/2000/svg}"


def lines(svg: str) -> dict[str, list[tuple[float, float]]]:
    """name -> vertices of its line in SVG units."""
    found = {}
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        name = group.get("id", "")
        if name.startswith("line-"):
            path = next(group.iter(f"{SVG}path")).get("d", "")
            numbers = [float(n) for n in re.findall(r"-?[\d.]+", path)]
            found[name.removeprefix("line-")] = list(zip(numbers[::2], numbers[1::2]))
    return found


def test_vertices_are_the_numbers_up_to_one_scale() -> None:
    made = comparison()
    drawn = lines(plot_svg(made))
    assert set(drawn) == {"random", "pool", "fopru", "pyramiddrop"}
    data, marks = [], []
    for name, vertices in drawn.items():
        points = sorted((r.flops_ratio, r.accuracy) for r in made.rows if r.method == name and r.refused is None)
        assert len(points) == len(vertices)
        data += points
        marks += vertices
    for axis in (0, 1):
        (a, b), (u, v) = ([p[axis] for p in data[:2]], [p[axis] for p in marks[:2]])
        scale = (v - u) / (b - a)
        for value, mark in zip(data, marks):
            assert mark[axis] == pytest.approx(u + scale * (value[axis] - a), abs=0.01)
        assert (scale > 0) == (axis == 0)  # y grows downwards in SVG


def test_baselines_are_dashed_and_methods_are_not() -> None:
    root = ElementTree.fromstring(plot_svg(comparison()))
    dashed = {
        group.get("id"): "stroke-dasharray" in next(group.iter(f"{SVG}path")).get("style", "")
        for group in root.iter(f"{SVG}g")
        if group.get("id", "").startswith("line-")
    }
    assert dashed == {"line-random": True, "line-pool": True, "line-fopru": False, "line-pyramiddrop": False}


def test_labels_and_axis_name_what_is_shown() -> None:
    svg = plot_svg(comparison())
    for text in ("dense", "fopru", "accuracy (%)", "share of dense"):
        assert text in svg
    rows = [row("dense", 1, accuracy=None), row("fopru", 0.5, accuracy=None)]
    assert "agreement with dense (%)" in plot_svg(comparison(rows=rows, choice=None))


def test_nothing_measured_still_draws() -> None:
    assert plot_svg(comparison(rows=[row("fopru", 0.1, refused="no")], choice=None)).startswith("<svg")
