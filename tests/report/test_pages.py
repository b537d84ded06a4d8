"""docs/methods: what is committed is what the classes and the benchmarks' results say."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foveate.cli import main
from foveate.method import KINDS, InputError, Method, published
from foveate.methods.baselines import Pool
from foveate.methods.reduce.hired import HiRed
from foveate.report.pages import INDEX, KIND, counted, index_page, method_page, page_name, read_results

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "methods"
PUBLISHED = published()
slugs = pytest.mark.parametrize("slug", PUBLISHED)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return read_results(ROOT / "benchmarks" / "results")


def table(page: str, heading: str) -> Iterator[list[str]]:
    """The cells of the first table under a heading, row by row."""
    lines = page.split(f"\n{heading}")[1].splitlines() if f"\n{heading}" in page else []
    started = False
    for line in lines[1:]:
        if line.startswith("#") or (started and not line.startswith("|")):
            return
        if line.startswith("|"):
            started = True
            yield [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@slugs
def test_the_committed_page_is_up_to_date(slug: str, results: dict[str, Any]) -> None:
    """Counting takes minutes: our figures are read back from the page, and must be within their claims' tolerances."""
    path, cls = PAGES / page_name(slug), PUBLISHED[slug]
    remedy = f"run `foveate methods {slug} --pages docs/methods`"
    assert path.is_file(), f"{path} is missing; {remedy}"
    page = path.read_text(encoding="utf-8")
    ours = list(counted(page).values())
    assert len(ours) == len(cls.claims), remedy
    assert page == method_page(cls, ours, results), remedy
    for claim, figure in zip(cls.claims, ours):
        assert figure == pytest.approx(claim.figure, rel=claim.tolerance + 1e-12), claim.what
        if claim.kind == "value" and claim.value is not None and issubclass(cls, Method):
            assert figure == pytest.approx(claim.value(cls(**claim.settings)), rel=1e-12), claim.what


def test_the_committed_index_is_up_to_date() -> None:
    assert (PAGES / INDEX).read_text(encoding="utf-8") == index_page(), "run `foveate methods --pages docs/methods`"
    assert {file.name for file in PAGES.iterdir()} == {INDEX, *map(page_name, PUBLISHED)}


def test_the_index_has_all_of_them_by_kind() -> None:
    page = index_page()
    assert set(KIND) == set(KINDS)
    for slug, cls in PUBLISHED.items():
        section = "baselines" if cls.card.baseline else cls.card.kind
        assert [row for row in table(page, f"## {section}\n") if row[0] == f"[{slug}]({slug}.md)"], slug


@slugs
def test_a_page_explains_every_hyperparameter(slug: str) -> None:
    page = (PAGES / page_name(slug)).read_text(encoding="utf-8")
    told = {row[0]: row[1:] for row in table(page, "## Hyperparameters")}
    for name, parameter in inspect.signature(PUBLISHED[slug]).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            # Handed on to the method that it derives from.
            assert set(inspect.signature(PUBLISHED[slug].__mro__[1]).parameters) <= {key.strip("`") for key in told}
            continue
        default, meaning = told[f"`{name}`"]
        if issubclass(PUBLISHED[slug], Method):
            value = parameter.default
            text = f"{value:.4g}" if isinstance(value, float) else repr(value)
            assert default == f"`{text}`" and len(meaning) > 5, name


def comparison(rows: list[tuple[str, float, float | None]]) -> dict[str, Any]:
    """A benchmark's file with rows (method, budget, accuracy; None where it refused)."""
    return {
        "environment": {"command": "python b.py", "machine": "M", "device": "cpu", "dtype": "float32"},
        "options": {"model": "some/where/tiny", "pairs": 3},
        "comparison": {
            "samples": 400,
            "rows": [
                {
                    "method": method, "budget": budget, "accuracy": accuracy, "baseline": method in ("dense", "pool"),
                    "refused": "it cannot" if accuracy is None else None, "visual_share": budget, "flops_ratio": 0.6,
                    "time_ratio": 0.7, "agreement": 0.5,
                }
                for method, budget, accuracy in rows
            ],
        },
    }  # fmt: skip


def test_it_says_plainly_where_a_method_loses() -> None:
    """400 questions at about one half: two standard errors of a difference are 7 points."""
    rows = [("dense", 1.0, 0.9), ("pool", 0.5, 0.6), ("pool", 0.25, 0.5), ("pool", 0.1, 0.4), ("pool", 0.05, 0.3)]
    rows += [("hired", 0.5, 0.5), ("hired", 0.25, 0.54), ("hired", 0.1, 0.5), ("hired", 0.05, None)]
    page = method_page(HiRed, [0.0] * len(HiRed.claims), {"quality.json": comparison(rows)})
    assert (
        "**loses to** pool at 0.5 (-10.0); **is level with** pool at 0.25 (+4.0); **beats** pool at 0.1 (+10.0)" in page
    )
    assert "python b.py" in page and "### tiny, 400 held-out questions" in page and "90.0 %" in page
    budgets = {row[0]: row for row in table(page, "### tiny")}
    assert budgets["0.5"] == ["0.5", "0.50", "0.60", "0.70", "50.0 %", "**50.0 %**", "60.0 %"]
    assert budgets["0.05"][1] == "refused: it cannot"
    # A baseline is not compared with itself.
    assert "loses" not in method_page(Pool, [], {"quality.json": comparison(rows)})


def test_sections_of_a_docstring_are_lists() -> None:
    class Documented(HiRed):
        """What it does.

        Args:
            keep: a share that
                takes two lines.
            alpha: another.

        Raises:
            InputError: for others.
        """

    page = method_page(Documented, [0.0] * len(HiRed.claims), {})
    assert "\nArgs:\n\n- keep: a share that\n  takes two lines.\n- alpha: another.\n\nRaises:\n\n- InputError" in page


def test_what_was_not_measured_is_not_told() -> None:
    page = method_page(HiRed, [0.0] * len(HiRed.claims), {"quality.json": comparison([("dense", 1.0, 0.9)])})
    assert "No benchmark has a row of it yet." in page and "###" not in page


def test_what_we_say_of_a_result_is_on_the_pages_of_its_methods(tmp_path: Path) -> None:
    content = {"environment": {"command": "python c.py"}, "methods": ["hired"]}
    (tmp_path / "several.json").write_text(json.dumps(content))
    (tmp_path / "several.md").write_text("### On scenes\n\nIt loses.\n")
    results = read_results(tmp_path)
    page = method_page(HiRed, [0.0] * len(HiRed.claims), results)
    assert "### On scenes\n\nIt loses.\n\n`python c.py` → `benchmarks/results/several.json`." in page
    assert "It loses" not in method_page(Pool, [], results)


def floats(value: Any) -> Iterator[float]:
    """All numbers in what JSON holds."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from floats(one)
    elif isinstance(value, int | float):
        yield float(value)


NOTES = sorted((ROOT / "benchmarks" / "results").glob("*.md"))


def among(quoted: str, measured: list[float]) -> bool:
    """Whether a figure is one of the numbers, rounded: as it is, in percent, in millions."""
    near = 0.5001 * 10.0 ** -len(quoted.partition(".")[2])
    return any(abs(times * one - float(quoted)) <= near for one in measured for times in (1, 100, 1e-6))


def entries(value: Any, number: float | None) -> Iterator[list[float]]:
    """The numbers of everything within the JSON, and of those elements of each list that have `number` in common."""
    if not isinstance(value, dict | list):
        return
    if isinstance(value, list) and number is not None:
        alike = [one for one in value if isinstance(one, dict) and number in one.values()]
        yield list(floats(alike))
    for one in value.values() if isinstance(value, dict) else value:
        yield list(floats(one))
        yield from entries(one, number)


@pytest.mark.parametrize("notes", NOTES, ids=lambda path: path.stem)
def test_figures_that_we_quote_were_measured(notes: Path) -> None:
    measured = list(floats(json.loads(notes.with_suffix(".json").read_text(encoding="utf-8"))))
    for quoted in re.findall(r"(?<![\w.])\d+\.\d+", notes.read_text(encoding="utf-8")):
        assert among(quoted, measured), quoted


@pytest.mark.parametrize("notes", NOTES, ids=lambda path: path.stem)
def test_figures_of_a_row_belong_together(notes: Path) -> None:
    """What stands in one row of a table is of one entry, or of entries that share the number in the row's first cell:
    in a large file nearly every figure is some row's."""
    content, rows = json.loads(notes.with_suffix(".json").read_text(encoding="utf-8")), 0
    for line in notes.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            continue
        _, first, others = line.split("|", 2)
        quoted = re.findall(r"(?<![\w.])\d+\.\d+", others)
        if len(quoted) < 2:
            continue
        rows += 1
        share = re.fullmatch(r"(\d+) %", first.strip())
        found = entries(content, int(share[1]) / 100 if share else None)
        assert any(len(one) <= 100 and all(among(figure, one) for figure in quoted) for one in found), line
    assert rows or "|" not in notes.read_text(encoding="utf-8")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["methods", "visionzip", "--pages", "pages"])
    assert done.value.code == 0 and "claims, 0 failed" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "pages").iterdir()} == {INDEX, "visionzip.md"}
    page = (tmp_path / "pages" / "visionzip.md").read_text(encoding="utf-8")
    # Nothing was measured here; all else is as committed, our figures too, which were counted anew.
    kept = (PAGES / "visionzip.md").read_text(encoding="utf-8")
    assert page.split("## Measured here")[0] == kept.split("## Measured here")[0]
    # A figure that is there stays until all are counted again.
    (tmp_path / "pages" / "visionzip.md").write_text(page.replace("| 162 | 162 |", "| 162 | 161 |"))
    for more, code, told in (([], 1, "1 failed"), (["--recount"], 0, "0 failed")):
        with pytest.raises(SystemExit) as done:
            main(["methods", "visionzip", "--pages", "pages", *more])
        assert done.value.code == code and told in capsys.readouterr().out
    assert (tmp_path / "pages" / "visionzip.md").read_text(encoding="utf-8") == page
    without, wrong = (["--recount"], ["--results", "r"]), ["dense", "--pages", "p", "--results", "no"]
    for arguments in (*without, wrong, ["nosuch", "--pages", "pages"]):
        with pytest.raises(SystemExit) as failed:
            main(["methods", *arguments])
        assert failed.value.code == 2
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="no JSON"):
        read_results(tmp_path)
    (tmp_path / "broken.json").write_text(json.dumps({}))
    assert read_results(tmp_path) == {"broken.json": {}}
