"""docs/methods: one page for each method, made from its class and from what the benchmarks measured of it."""

from __future__ import annotations

import importlib.resources
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

from foveate.method import KINDS, STAGES, InputError, Method, Published, published, published_class
from foveate.report.wording import FAMILIES, NOTHING, number, percent, setting, share, source
from foveate.report.write import check_folder, write_files

if TYPE_CHECKING:
    from foveate.measure.claims import Checked
    from foveate.method import Claim

INDEX = "index.md"
RESULTS = Path("benchmarks/results")
"""Where the benchmarks of this repository keep what they measured, a JSON file a run; what we say of one is beside it,
in Markdown, under the same name."""

KIND = {
    "reduce": "drop, merge, exit or skip tokens inside an existing model",
    "connect": "between vision encoder and language model",
    "tokenize": "pictures and clips to codes and back",
    "image": "backbones and heads for pictures",
    "video": "backbones and heads for clips",
    "decode": "autoregressive, masked and language-model decoding",
    "diffuse": "denoisers and samplers",
    "guide": "control and editing of what a model attends to or makes",
    "learn": "objectives, augmentation, pre-training",
    "probe": "analysis and attacks",
    "sequence": "sequences that are not pictures",
}
"""What belongs to each of `KINDS`."""

_DISAGREE = re.compile(r"\breleased?\b", re.IGNORECASE)
"""What the meaning of a setting says where the authors' code does other than the paper."""
_SURE = 1.96
"""Standard errors by which two accuracies must differ to be called different."""


def write_pages(
    folder: Path,
    slug: str | None = None,
    results: Path | None = None,
    recount: bool = False,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> list[Checked]:
    """Writes the page of one method, or of all, and the index into `folder`.

    A claim whose figure the page in `folder` has is not counted again (that of all takes minutes) but with `recount`.
    Each page is there as soon as its claims are counted, so that an interruption loses only the one in work.

    Args:
        folder: made if absent.
        slug: of the method; None for all.
        results: folder with the benchmarks' JSON files; None for `RESULTS`, where there is such a folder.

    Returns:
        the claims, with the figures on the pages. Pages show those that fail too.

    Raises:
        InputError: for an unknown method, a folder that cannot be written to, results that cannot be read.
    """
    from foveate.measure.claims import Checked, count

    classes = published() if slug is None else {slug: published_class(slug)}
    check_folder(folder)
    measured = read_results(results)
    write_files(folder, {INDEX: index_page()})
    found: list[Checked] = []
    for done, (name, cls) in enumerate(classes.items()):
        if on_progress:
            on_progress(done, len(classes), name)
        page = folder / page_name(name)
        known = counted(page.read_text(encoding="utf-8")) if page.is_file() and not recount else {}
        ours = [known[key] if (key := _key(claim)) in known else count(cls, claim) for claim in cls.claims]
        found += [Checked(name, claim, mine) for claim, mine in zip(cls.claims, ours)]
        write_files(folder, {page.name: method_page(cls, ours, measured)})
    return found


def counted(page: str) -> dict[tuple[str, str, str], float]:
    """(what, architecture, figure) -> ours, of the claims on a page."""
    found = {}
    for line in page.partition("\n## Claims\n")[2].partition("\n## ")[0].splitlines():
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        # The head of the table and the line below it have no figure.
        if len(cells) == 6 and re.fullmatch(r"[-+.\de]*\d[-+.\de]*", cells[3]):
            found[cells[0], cells[1], cells[2]] = float(cells[3])
    return found


def _key(claim: Claim) -> tuple[str, str, str]:
    return " ".join(claim.what.split()), claim.architecture or NOTHING, f"{claim.figure:.6g}"


def page_name(slug: str) -> str:
    return f"{slug}.md"


def read_results(folder: Path | None = None) -> dict[str, Any]:
    """File name -> content of the JSON files in `folder`, by name; see `write_pages`.

    Where a Markdown file of the same name is beside one, its text is the content's `notes`.
    """
    if folder is None:
        if not RESULTS.is_dir():
            return {}
        folder = RESULTS
    if not folder.is_dir():
        raise InputError(f"--results {folder}: no such folder")
    found = {}
    for file in sorted(folder.glob("*.json")):
        try:
            found[file.name] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file}: no JSON ({error})") from None
        notes = file.with_suffix(".md")
        if notes.is_file():
            found[file.name]["notes"] = notes.read_text(encoding="utf-8").strip()
    return found


def index_page() -> str:
    """All that is registered, by kind."""
    classes = published().values()
    groups = [("baselines", "what every comparison shows beside the methods, at the same budgets")]
    groups += [(kind, KIND[kind]) for kind in KINDS]
    sections = []
    for kind, meaning in groups:
        here = [cls for cls in classes if (cls.card.baseline if kind == "baselines" else _of_kind(cls, kind))]
        if here:
            rows = [{"card": cls.card, "stages": ", ".join(stages(cls)) or NOTHING} for cls in here]
            sections.append({"kind": kind, "meaning": meaning, "rows": rows})
    return _render("index.md.j2", sections=sections)


def method_page(cls: type[Published], ours: Sequence[float], results: Mapping[str, Any]) -> str:
    """The page of one method, in Markdown.

    Args:
        ours: our figure of each of its claims, in their order.
        results: what benchmarks measured, see `read_results`.
    """
    card = cls.card
    defaults = hyperparameters(cls)
    return _render(
        "method.md.j2",
        card=card,
        module=cls.__module__,
        file=f"src/{cls.__module__.replace('.', '/')}.py",
        name=cls.__name__,
        applied=issubclass(cls, Method),
        says=_markdown(inspect.getdoc(cls) or card.summary),
        switches=[name for name in defaults if _DISAGREE.search(card.parameters.get(name, ""))],
        stages={stage: STAGES[stage] for stage in stages(cls)},
        families={name: FAMILIES.get(name, "") for name in card.hosts},
        defaults={name: setting(value) for name, value in defaults.items()},
        claims=[
            {
                **dict(zip(("what", "architecture", "figure"), _key(claim))),
                # In full: the next run reads it back, see `write_pages`.
                "ours": f"{mine:.13g}", "tolerance": f"±{100 * claim.tolerance:g} %", "source": source(claim),
            }
            for claim, mine in zip(cls.claims, ours, strict=True)
        ],
        qualities=list(_qualities(card.slug, results)),
        realised=list(_realised(card.slug, results)),
        overheads=list(_overheads(card.slug, results)),
        others=[
            {"file": file, "command": _command(content), "notes": content.get("notes", "")}
            for file, content in results.items() if _is_about(card.slug, file, content)
        ],
    )  # fmt: skip


def stages(cls: type[Published]) -> list[str]:
    """Where a method acts; nowhere, if it is not applied to a model."""
    return list(cls.handlers()) if issubclass(cls, Method) else []


def hyperparameters(cls: type[Published]) -> dict[str, Any]:
    """Name -> default of the constructor's arguments, and of the base's where it hands others on to that;
    `inspect.Parameter.empty` where one has to be given."""
    parameters = inspect.signature(cls).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = {one.name: one.default for one in parameters if one.kind not in kinds}
    base = cls.__mro__[1]
    if len(found) < len(parameters) and issubclass(base, Published) and hasattr(base, "card"):
        found = {**hyperparameters(base), **found}
    return found


def _markdown(text: str) -> str:
    """A docstring with its sections (Args, Raises) as lists; all else in it is Markdown."""

    def section(found: re.Match[str]) -> str:
        items = re.sub(r"^    (?=\S)", "- ", found[2], flags=re.MULTILINE)
        return f"{found[1]}:\n\n" + re.sub(r"^ {8}", "  ", items, flags=re.MULTILINE)

    return re.sub(r"^(Args|Attributes|Raises|Returns):\n((?: {4}.*\n?)+)", section, text, flags=re.MULTILINE)


def _of_kind(cls: type[Published], kind: str) -> bool:
    return not cls.card.baseline and cls.card.kind == kind


def _render(template: str, **values: Any) -> str:
    # Markdown, not HTML: nothing is escaped but what would end a table's cell.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    text = importlib.resources.files("foveate.report").joinpath(template).read_text(encoding="utf-8")
    page = environment.from_string(text).render(**values)
    return re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"


# -- what benchmarks measured


def _is_about(slug: str, file: str, content: Any) -> bool:
    """Whether a file is named after a method, or lists it among its `methods`."""
    return file.startswith(slug.replace("-", "_")) or slug in content.get("methods", ())


def _command(content: Any) -> str:
    # Benchmarks have it in "environment", trainings in "training".
    about = content if isinstance(content, dict) else {}
    return str((about.get("environment") or about.get("training") or {}).get("command", ""))


def _machine(content: Mapping[str, Any]) -> str:
    about = content["environment"]
    threads = f", {about['threads']} thread{'s' * (about['threads'] != 1)}" if "threads" in about else ""
    return f"{about['machine']}{threads}, {about['device']}, {about['dtype']}"


def _qualities(slug: str, results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """For each comparison that has rows of the method: these, and the baselines at the same budgets."""
    for file, content in results.items():
        comparison = content.get("comparison") if isinstance(content, dict) else None
        if not isinstance(comparison, dict):
            continue
        mine = [row for row in comparison["rows"] if row["method"] == slug]
        if not mine:
            continue
        samples = comparison["samples"]
        others: dict[str, dict[float, Any]] = {}
        for row in comparison["rows"]:
            if row["baseline"] and row["method"] not in (slug, "dense") and row["refused"] is None:
                others.setdefault(row["method"], {})[row["budget"]] = row
        dense = next((row for row in comparison["rows"] if row["method"] == "dense"), None)
        yield {
            "file": file,
            "command": _command(content),
            "machine": _machine(content),
            "model": Path(content["options"]["model"]).name,
            "samples": samples,
            "dense": None if dense is None else percent(dense["accuracy"]),
            "others": list(others),
            "rows": [
                {
                    "budget": number(row["budget"]),
                    "refused": row["refused"],
                    "share": share(row["visual_share"]),
                    "flops": share(row["flops_ratio"]),
                    # One pair is no median.
                    "time": share(row["time_ratio"]) if content["options"].get("pairs", 0) > 2 else "–",
                    "accuracy": percent(row["accuracy"]),
                    "agreement": percent(row["agreement"]),
                    "beside": [percent(rows.get(row["budget"], {}).get("accuracy")) for rows in others.values()],
                }
                for row in sorted(mine, key=lambda row: -row["budget"])
            ],
            "verdicts": [] if slug in others or slug == "dense" else list(_verdicts(mine, others, samples)),
        }


def _verdicts(mine: Sequence[Any], others: Mapping[str, Mapping[float, Any]], samples: int) -> Iterator[str]:
    """Against each baseline, at which budgets the method is worse, level and better in accuracy."""
    mine = [row for row in mine if row["refused"] is None and row["accuracy"] is not None]
    for name, rows in others.items():
        found: dict[str, list[str]] = {"loses to": [], "is level with": [], "beats": []}
        for row in mine:
            other = rows.get(row["budget"], {}).get("accuracy")
            if other is None:
                continue
            difference = row["accuracy"] - other
            # As if the questions were not the same ones: a wider margin than there is.
            margin = _SURE * math.sqrt(sum(p * (1 - p) for p in (row["accuracy"], other)) / samples)
            word = "is level with" if abs(difference) <= margin else "beats" if difference > 0 else "loses to"
            found[word].append(f"{number(row['budget'])} ({100 * difference:+.1f})")
        parts = [f"**{word}** {name} at {', '.join(budgets)}" for word, budgets in found.items() if budgets]
        if parts:
            yield "; ".join(parts)


def _realised(slug: str, results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of time saved against FLOPs saved."""
    for file, content in results.items():
        rows = content.get("results") if isinstance(content, dict) else None
        if not isinstance(rows, list):
            continue
        mine = [row for row in rows if isinstance(row, dict) and row.get("method") == slug]
        mine = [row for row in mine if all("realised_share" in row.get(part, {}) for part in ("llm", "model"))]
        if mine:
            yield {
                "file": file,
                "command": _command(content),
                "machine": _machine(content),
                "rows": [
                    {
                        "budget": number(row["budget"]),
                        **{
                            part: {
                                "flops": share(row[part]["flops_ratio"]),
                                "time": f"{row[part]['time_ratio']:.3f} "
                                f"({row[part]['time_low']:.3f}–{row[part]['time_high']:.3f})",
                                "realised": f"{row[part]['realised_share']:.2f}",
                            }
                            for part in ("llm", "model")
                        },
                    }
                    for row in mine
                ],
            }


def _overheads(slug: str, results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What it costs where the method scores and nothing is dropped."""
    for file, content in results.items():
        rows = content.get("results") if isinstance(content, dict) else None
        mine = rows.get(slug) if isinstance(rows, dict) else None
        if isinstance(mine, dict) and "time_ratio" in mine and "largest_sequence_by_sequence" in mine:
            again = rows.get("dense again") if isinstance(rows, dict) else None
            yield {
                "file": file,
                "command": _command(content),
                "machine": _machine(content),
                "time": _percent_more(mine),
                "again": None if again is None else _percent_more(again),
                "flops": f"{100 * (mine['flops_ratio'] - 1):+.2f} %",
                "bytes": mine["largest_sequence_by_sequence"]["bytes"],
            }


def _percent_more(row: Mapping[str, Any]) -> str:
    middle, low, high = (100 * (row[name] - 1) for name in ("time_ratio", "time_low", "time_high"))
    return f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"
