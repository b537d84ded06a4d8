"""What all comparisons share: figures, rows, the rule that picks one, what is measured, and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Generic, Self, TypeVar

from foveate.apply import apply
from foveate.configuration import is_file, load_configuration
from foveate.measure.provenance import Overlay
from foveate.method import HostShape, InputError, Method, method_class, registry

BUDGETS = (0.5, 0.25, 0.1)

Progress = Callable[[int, int, str], None]
Entry = str | Method | tuple[Method, ...]
"""What is measured: a name, set up for each budget, or one method or a stack as they are, measured once."""


@dataclass(frozen=True)
class Figure:
    """A figure that a task has a column for beside cost.

    Attributes:
        name: the column's head.
        legend: one line on what it is.
        words: what a sentence calls it.
        unit: "share" of a number in 0..1, shown in percent, or the unit of any other.
        near: how much worse than dense still is as good, as a share or in the unit; None where rows are not chosen by
            this figure.
        lower: whether less is better.
        decimals: how many are shown.
    """

    name: str
    legend: str
    words: str = ""
    unit: str = "share"
    near: float | None = None
    lower: bool = False
    decimals: int = 1

    def number(self, value: float) -> str:
        """As the table shows it, whose head has the unit."""
        return f"{100 * value:.{self.decimals}f} %" if self.unit == "share" else f"{value:.{self.decimals}f}"

    def text(self, value: float) -> str:
        """As a sentence says it."""
        return self.number(value) if self.unit == "share" else f"{self.number(value)} {self.unit}"

    def loss(self, dense: float, value: float) -> float:
        """By how much `value` is worse than dense's."""
        return value - dense if self.lower else dense - value


@dataclass(frozen=True)
class Task:
    """What a comparison is about, in the words of tables and reports.

    Attributes:
        name: as --task says it.
        figures: columns beside cost. By the first one that has `near` and a value for dense, rows are chosen.
        heading: the report's, with {model} in it.
        work: what FLOPs and time are of.
        inside: what tokens are dropped in.
        tokens: what methods spend less of.
        budget: one line on what a budget is.
        samples: one, and several.
        cost: what is to be saved, "FLOPs" or "time".
        plain: what the baselines are.
    """

    name: str
    figures: tuple[Figure, ...]
    heading: str
    work: str
    inside: str
    budget: str
    tokens: str = "visual tokens"
    samples: tuple[str, str] = ("sample", "samples")
    cost: str = "FLOPs"
    plain: str = "plain down-sampling"

    def spent(self, row: Measured) -> float:
        """What a row costs, as a share of dense."""
        ratio = row.time_ratio if self.cost == "time" else row.flops_ratio
        return float("nan") if ratio is None else ratio

    def quality(self, rows: Sequence[Measured]) -> Figure:
        """The figure that rows are chosen by."""
        able = [figure for figure in self.figures if figure.near is not None]
        return next((one for one in able if any(row.figure(one.name) is not None for row in rows)), able[-1])


ANSWERING = Task(
    "answering",
    (
        Figure("KV cache", "bytes that one sample's prefill leaves in the cache", unit="B"),
        Figure("accuracy", "share of answers that are right", "accuracy", near=0.01),
        Figure(
            "agreement", "share of samples where the generated answer is the same as dense's", "agreement with dense",
            near=0.01,
        ),
        Figure(
            "KL", "divergence of the first answer token's distribution from dense's, in nats; 0 is the same",
            unit="nats", lower=True, decimals=3,
        ),
    ),
    heading="Which visual tokens can {model} do without?",
    work="one prefill",
    inside="language model",
    budget="visual tokens averaged over the language model's layers, as a share of all",
)  # fmt: skip
"""What `foveate.compare` measures."""


@dataclass(frozen=True)
class Measured:
    """One method at one budget. Where it refused, only method, budget, baseline and the reason are set.

    Attributes:
        method: slug; those of a stack joined by "+".
        budget: share of tokens that it was asked to spend; what is meant by that is the task's.
        baseline: whether it is one of the plain baselines (dense included).
        settings: the method's arguments; of a stack, slug -> arguments.
        stages: (stage, tokens after it, mean over samples).
        visual_share: measured share of tokens.
        flops, flops_ratio: and as a share of dense.
        time_ratio, time_low, time_high: median and quartiles of interleaved pairs, as a share of dense.
        refused: why the method cannot do this.
    """

    method: str
    budget: float
    baseline: bool
    settings: dict[str, Any] | None = None
    stages: tuple[tuple[str, float], ...] | None = None
    visual_share: float | None = None
    flops: int | None = None
    flops_ratio: float | None = None
    time_ratio: float | None = None
    time_low: float | None = None
    time_high: float | None = None
    refused: str | None = field(default=None, kw_only=True)

    @property
    def label(self) -> str:
        return f"{self.method} at {self.budget:g}"

    def figure(self, name: str) -> float | None:
        """The value of the task's figure of that name, None where it was not measured."""
        raise NotImplementedError


@dataclass(frozen=True)
class TaskRow(Measured):
    """A row of any task whose figures have no fields of their own: `figures`, name -> value."""

    figures: dict[str, float] = field(default_factory=dict)

    def figure(self, name: str) -> float | None:
        return self.figures.get(name)


@dataclass(frozen=True)
class Shown:
    """The sample that FLOPs, time and overlays are of.

    Attributes:
        id, prompt: of the sample; "" where nothing is asked.
        expected: the right answer, None where it is not known.
        answer: the unchanged model's, in lower case and without final punctuation, as answers are compared.
    """

    id: str
    prompt: str
    expected: str | None
    answer: str


R = TypeVar("R", bound=Measured)


@dataclass(frozen=True)
class Table(Generic[R]):
    """All rows, dense first, and what they say.

    Attributes:
        rows: see `Measured`.
        environment: see `foveate.measure.environment`.
        samples: how many there were.
        choice: the row that the rule of `choose` picks; None if every method refused.
        why: the rule's reason, in words.
        overlays: one a row, of the sample `shown`.
        shown: the sample that FLOPs and time were measured on.
    """

    rows: list[R]
    environment: dict[str, Any]
    samples: int
    choice: R | None
    why: str
    overlays: list[Overlay] = field(default_factory=list)
    shown: Shown | None = None

    row_type: ClassVar[type[Measured]]

    @property
    def task(self) -> Task:
        raise NotImplementedError

    def to_json(self) -> str:
        values = asdict(self)
        values["choice"] = None if self.choice is None else self.rows.index(self.choice)
        return json.dumps(values, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The comparison that `to_json` wrote; InputError for anything else."""
        try:
            values = json.loads(text)
            rows: list[Any] = [
                cls.row_type(
                    **row | {"stages": row["stages"] and tuple((name, count) for name, count in row["stages"])}
                )
                for row in values.pop("rows")
            ]
            overlays = [
                Overlay(**one | {key: tuple(one[key]) for key in ("grid", "depth", "group")})
                for one in values.pop("overlays")
            ]
            index, shown = values.pop("choice"), values.pop("shown")
            return cls(
                rows=rows, overlays=overlays, choice=None if index is None else rows[index],
                shown=None if shown is None else Shown(**shown), **values,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(f"not a comparison ({' '.join(str(error).split())})") from None


def candidates(family: str = "hf-vlm", baselines: bool = False) -> tuple[str, ...]:
    """Names of all methods (or of all baselines but dense) that shorten such a host without any training."""
    return tuple(
        slug
        for slug, cls in registry().items()
        if (card := cls.card).kind == "reduce" and card.training_free and family in card.hosts
        and card.baseline == baselines and slug != "dense"
    )  # fmt: skip


def choose(rows: Sequence[R], task: Task = ANSWERING) -> tuple[R | None, str]:
    """The row to recommend and why.

    Quality is the task's (`Task.quality`): accuracy, or agreement with dense where there are no right answers. Of the
    rows that cost less than dense (`Task.cost`) and are as good as it but for `near` (1 point), the cheapest is chosen.
    Where there is none, the one that loses least for what it saves. Baselines take part; where one wins, the reason
    says so.
    """
    figure = task.quality(rows)
    assert figure.near is not None
    near = figure.near
    points = "1 point" if near == 0.01 else f"{100 * near:.3g} points"
    margin = points if figure.unit == "share" else f"{near:g} {figure.unit}"

    def quality(row: R) -> float:
        value = row.figure(figure.name)
        assert value is not None
        return value

    def loss(row: R) -> float:
        return figure.loss(full, quality(row))

    full = quality(rows[0])
    dense = f"dense ({figure.text(full)})"
    candidates = [row for row in rows[1:] if row.refused is None and task.spent(row) < 1]
    if not candidates:
        return None, f"nothing measured needs {'less time' if task.cost == 'time' else 'fewer FLOPs'} than dense"

    def best(among: Sequence[R]) -> tuple[R, bool]:
        good = [row for row in among if loss(row) <= near + 1e-9]
        if good:
            return min(good, key=lambda row: (task.spent(row), loss(row))), True
        return min(among, key=lambda row: (loss(row) / (1 - task.spent(row)), task.spent(row))), False

    def told(row: R) -> str:
        spent = f"{100 * task.spent(row):.0f} % of the {task.cost}"
        return f"{row.label} ({figure.text(quality(row))} {figure.words} for {spent})"

    winner, good = best(candidates)
    if good:
        why = f"{told(winner)} is the cheapest within {margin} of {dense}"
    else:
        saved = "second" if task.cost == "time" else "FLOP"
        why = f"nothing stays within {margin} of {dense}; {told(winner)} loses least per {saved} saved"
    published = [row for row in candidates if not row.baseline]
    if winner.baseline:
        why += ". It is a plain baseline: no published method did better here"
        if published:
            why += f"; the best of them is {told(best(published)[0])}"
    return winner, why + "."


def check_budgets(budgets: Sequence[float]) -> None:
    """Raises an InputError for one that is not in (0, 1]."""
    for budget in budgets:
        if not 0 < budget <= 1:
            raise InputError(f"budgets must be in (0, 1], not {budget!r}")


def plan(
    model: Any, shape: HostShape, methods: Sequence[Entry] | None, baselines: Sequence[str] | None,
    budgets: Sequence[float],
) -> list[tuple[Entry, float]]:  # fmt: skip
    """What is measured after dense, in order, with its budget (that of what is set up already is not known yet: 0).

    Who names a method wants to hear at once that it cannot work here at all; InputError says why.
    """
    asked = [_read(entry) for entry in dict.fromkeys(methods or ())]
    beside = candidates(shape.family, baselines=True) if baselines is None else tuple(baselines)
    others = candidates(shape.family) if methods is None else ()
    budgets = tuple(dict.fromkeys(budgets))
    planned: list[tuple[Entry, float]] = []
    for entry in dict.fromkeys((*beside, *asked, *others)):
        if entry == "dense":
            continue
        pairs = [(entry, budget) for budget in budgets] if isinstance(entry, str) else [(entry, 0.0)]
        refusals = [refusal for one, budget in pairs if (refusal := _refusal(model, shape, one, budget))]
        if entry in asked and len(refusals) == len(pairs):
            raise refusals[0]
        planned += pairs
    return planned


def _read(entry: Entry) -> Entry:
    """The methods of a configuration file; anything else as it is. Dense, which is always there, is its name."""
    if not (isinstance(entry, str) and is_file(entry)):
        return entry
    methods = tuple(load_configuration(entry))
    return "dense" if [one.card.slug for one in methods] == ["dense"] else methods


def _refusal(model: Any, shape: HostShape, entry: Entry, budget: float) -> InputError | None:
    """Why this cannot be measured, without having run it. InputError for an unknown name."""
    if isinstance(entry, str):
        method_class(entry)
    try:
        apply(model, set_up(entry, budget, shape)).remove()
    except InputError as error:
        return error
    return None


def set_up(entry: Entry, budget: float, shape: HostShape) -> tuple[Method, ...]:
    """The methods of an entry."""
    if isinstance(entry, str):
        return (method_class(entry).for_budget(budget, shape),)
    return entry if isinstance(entry, tuple) else (entry,)


def name_of(entry: Entry, budget: float) -> tuple[str, bool, str]:
    """An entry's name in the table, whether it is a baseline, and what a progress bar calls it."""
    if isinstance(entry, str):
        return entry, method_class(entry).card.baseline, f"{entry} at {budget:g}"
    stack = entry if isinstance(entry, tuple) else (entry,)
    slugs = "+".join(one.card.slug for one in stack)
    return slugs, all(one.card.baseline for one in stack), " + ".join(map(repr, stack))
