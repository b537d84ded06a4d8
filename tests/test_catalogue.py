"""The list that is read from source files, against the classes themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import foveate
from foveate import catalogue as module
from foveate.catalogue import Entry, catalogue, known


def _of(cls: type[foveate.Method]) -> Entry:
    card = cls.card
    return Entry(card.slug, card.summary, card.arxiv, card.baseline, tuple(cls.handlers()))


def test_it_is_the_registry() -> None:
    assert list(catalogue().items()) == [(slug, _of(cls)) for slug, cls in foveate.registry().items()]


def test_it_is_read_and_not_imported() -> None:
    """Where this fails a method was written so that only importing it tells its card or its handlers."""
    code = "import sys; from foveate.catalogue import catalogue; catalogue(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


INHERITED = '''
from foveate.method import Card, Method, at, register

class Base(Method):
    @at("vision.output")
    def first(self, tokens, at): ...

@register
class Derived(Base):
    card = Card(slug="derived", title="T", arxiv="2401.00001", kind="reduce", hosts=("hf-vlm",), summary="S" "S")

    @at("llm.layer")
    def second(self, tokens, at): ...
'''


def _package(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "foveate/methods").mkdir(parents=True)
    (folder / "foveate/methods/derived.py").write_text(text)
    monkeypatch.setattr(module, "_ROOT", folder / "foveate")


def test_inherited_handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path, INHERITED, monkeypatch)
    wanted = Entry("derived", "SS", "2401.00001", False, ("vision.output", "llm.layer"))
    assert catalogue() == {"derived": wanted}
    # The base may be in another of our files.
    base, derived = INHERITED.split("@register")
    (tmp_path / "foveate/base.py").write_text(base)
    head = "from foveate.base import Base as Parent\n@register"
    (tmp_path / "foveate/methods/derived.py").write_text(head + derived.replace("(Base)", "(Parent)"))
    assert catalogue() == {"derived": wanted}


@pytest.mark.parametrize(
    ("old", "new"),
    [('"S" "S"', "SUMMARY"), ("(Base)", "(elsewhere.Base)"), ('"llm.layer"', "STAGE"), ("card =", "other =")],
)
def test_what_cannot_be_read_is_asked_of_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    _package(tmp_path, INHERITED.replace(old, new), monkeypatch)
    assert list(catalogue()) == list(foveate.registry())


def test_names() -> None:
    assert known("pyramiddrop") == "pyramiddrop"
    with pytest.raises(foveate.InputError, match="unknown method 'pyramidrop'; did you mean pyramiddrop"):
        known("pyramidrop")
