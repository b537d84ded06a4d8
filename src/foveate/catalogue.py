"""What methods there are, read from their source files without running them.

Methods compute, so importing them loads torch, which takes seconds; a list of names, or hearing that a name is
misspelt, should not. Where the text does not tell, `foveate.registry()` is asked, so the answer is always its answer.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.method import InputError, did_you_mean, registry

_ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """A line of the list of methods: fields of the card, and the stages that have a handler."""

    slug: str
    summary: str
    arxiv: str
    baseline: bool
    stages: tuple[str, ...]


def catalogue() -> dict[str, Entry]:
    """slug -> entry of every method, in the order of `foveate.registry`: baselines first, then by name."""
    try:
        found = [entry for file in sorted((_ROOT / "methods").rglob("*.py")) for entry in _read(file)]
    except LookupError:
        cards = [(cls.card, tuple(cls.handlers())) for cls in registry().values()]
        found = [Entry(card.slug, card.summary, card.arxiv, card.baseline, stages) for card, stages in cards]
    return {entry.slug: entry for entry in sorted(found, key=lambda entry: (not entry.baseline, entry.slug))}


def known(slug: str) -> str:
    """`slug` if there is such a method, else an InputError with the nearest names."""
    names = catalogue()
    if slug not in names:
        raise InputError(f"unknown method {slug!r}; {did_you_mean(slug, names)}")
    return slug


def _read(file: Path) -> Iterator[Entry]:
    """Entries of the classes under `@register`. LookupError where a card or a base class cannot be read."""
    text = file.read_text(encoding="utf-8")
    if "@register" not in text:
        return
    module = ast.parse(text)
    for cls in module.body:
        if isinstance(cls, ast.ClassDef) and any(_name(one) == "register" for one in cls.decorator_list):
            card: dict[str, Any] = {"baseline": False, "arxiv": ""} | _card(cls)
            yield Entry(stages=tuple(_stages(cls, module)), **card)


def _card(cls: ast.ClassDef) -> dict[str, Any]:
    """Those fields of `card = Card(…)` that an entry has."""
    for part in cls.body:
        if isinstance(part, ast.Assign) and _name(part.targets[0]) == "card" and isinstance(part.value, ast.Call):
            fields = {one.arg: one.value for one in part.value.keywords if one.arg in Entry.__dataclass_fields__}
            return {str(name): _literal(value) for name, value in fields.items()}
    raise LookupError(f"{cls.name} has no card of its own")


def _stages(cls: ast.ClassDef, module: ast.Module) -> dict[str, None]:
    """The stages of handlers marked with `@at("…")`, those of base classes first."""
    found: dict[str, None] = {}
    for base in cls.bases:
        if _name(base) != "Method":
            found |= _stages(*_find(_name(base), module))
    for part in cls.body:
        for mark in part.decorator_list if isinstance(part, ast.FunctionDef) else ():
            if isinstance(mark, ast.Call) and _name(mark.func) == "at":
                found[str(_literal(mark.args[0]))] = None
    return found


def _find(name: str, module: ast.Module) -> tuple[ast.ClassDef, ast.Module]:
    """The class of that name and the module that it is in: this one, or one of ours that this one imports it from."""
    for part in module.body:
        if isinstance(part, ast.ClassDef) and part.name == name:
            return part, module
        if isinstance(part, ast.ImportFrom) and any((one.asname or one.name) == name for one in part.names):
            file = _ROOT.parent.joinpath(*str(part.module).split(".")).with_suffix(".py")
            if file.is_file():
                there = next(one.name for one in part.names if (one.asname or one.name) == name)
                return _find(there, ast.parse(file.read_text(encoding="utf-8")))
    raise LookupError(f"no class {name}")


def _literal(node: ast.expr) -> str | bool:
    if isinstance(node, ast.Constant) and isinstance(node.value, str | bool):
        return node.value
    raise LookupError(f"line {node.lineno}: not a literal")


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""
