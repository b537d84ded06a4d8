"""A short soak: random combinations of method, host, budget and batch against single, uncached runs.

The long one, and what is compared: benchmarks/soak.py.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from foveate.method import Card, Method, Stage, at
from foveate.tokens import Tokens

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SEED = 1


@pytest.fixture(scope="module")
def soak() -> Any:
    sys.path.append(str(BENCHMARKS))
    try:
        return importlib.import_module("soak")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("number", range(25))
def test_a_batch_says_what_each_sample_says_alone_without_the_cache(soak: Any, number: int) -> None:
    found = soak.soak(SEED, number)
    assert found["outcome"] in ("same", "rounding"), found


def batch(soak: Any, method: str, **settings: Any) -> Any:
    """Samples with one picture, none and two."""
    return soak.Combination(
        0, "llava-1.5, CLIP and Llama", 4, 24, [{"method": method, "settings": settings}], 0.5,
        [(2, 5), (4,), (0, 1, 3)], None, 7, 1, True,
    )  # fmt: skip


def test_in_float64_it_is_a_hundred_times_stricter(soak: Any) -> None:
    outcome = soak.run(batch(soak, "pyramiddrop"), torch.float64)
    assert outcome.outcome == "same" and soak.PRECISE <= soak.TOLERANCE / 100


class ByRow(Method):
    """Wrong on purpose: rows with odd numbers keep other patches."""

    card = Card(slug="by-row", title="", arxiv="", kind="reduce", hosts=("hf-vlm",), summary="")

    @at("vision.output")
    def choose(self, tokens: Tokens, at: Stage) -> Tokens:
        batch, count = tokens.x.shape[:2]
        return tokens.keep(torch.arange(count // 2).expand(batch, -1) + torch.arange(batch)[:, None] % 2)


def test_a_method_that_depends_on_the_batch_is_found(soak: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "methods", lambda: {"by-row": ByRow})
    outcome = soak.run(batch(soak, "by-row"))
    assert outcome.outcome == "differs" and outcome.worst > 100
    # Of the last sample's two pictures, the first is the second row here and the first alone.
    assert {line.split(",")[0] for line in outcome.differences} == {"sample 2"}


def test_a_model_that_is_left_changed_is_found(soak: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "_MODELS", {})
    given = batch(soak, "fopru")
    assert soak.run(given).outcome == "same"
    model = soak.host(given.host, given.layers, given.image)

    @contextmanager
    def careless(model: Any, methods: Any) -> Iterator[Any]:
        with foveate.apply(model, methods) as applied:
            yield applied
        with torch.no_grad():
            weight = model.lm_head.weight[5]
            weight.copy_(torch.nextafter(weight, weight + 1))

    monkeypatch.setattr(soak, "apply", careless)
    with pytest.raises(RuntimeError, match="not as it was"):
        soak.run(given)
    monkeypatch.setattr(soak, "apply", foveate.apply)
    handle = model.lm_head.register_forward_hook(lambda *args: None)
    before = soak.fingerprint(model)
    handle.remove()
    assert soak.fingerprint(model) != before


@pytest.mark.parametrize(("lead", "same", "ties"), [(0.5e-5, True, 1), (4e-5, False, 0)])
def test_only_ties_may_end_in_another_id(soak: Any, lead: float, same: bool, ties: int) -> None:
    """Token 5 leads token 6 alone, the other way round in the batch; the suppressed token 0 leads both."""
    alone, together = torch.zeros(2, 1, soak.STEPS, 99).double()
    alone[:, 0, [0, 5, 6]] = torch.tensor([9.0, 2 + lead, 2.0]).double()
    together[:, 0, [0, 5, 6]] = torch.tensor([9.0, 2.0, 2 + lead]).double()
    ids = torch.full((1, soak.STEPS), 7)
    outcome, one, other = soak.Outcome(), ids.clone(), ids.clone()
    one[0, 0], other[0, 0] = 6, 5
    # From there on it is another text.
    together[:, 1:] += 1.0
    soak._follow(outcome, 0, soak.host("llava-1.5, CLIP and Llama", 4, 16), (one, together), (other, alone), 1e-4)
    assert (outcome.differences == [], outcome.ties) == (same, ties)


def test_it_goes_on_after_an_interruption(
    soak: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[int] = []

    def one(seed: int, number: int) -> dict[str, Any]:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(number)
        given = asdict(batch(soak, "fopru")) | {"number": number}
        return given | asdict(soak.Outcome()) | {"refused": ["aim on next: no"]}

    def main(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["soak.py", "--out", str(tmp_path / "soak.json"), *options])
        code: int = soak.main()
        return code

    monkeypatch.setattr(soak, "soak", one)
    with pytest.raises(KeyboardInterrupt):
        main("--count", "3")
    assert ran == [0, 1]
    ran.clear()
    assert main("--count", "3") == 0 and ran == [2]
    values = json.loads((tmp_path / "soak.json").read_text())
    assert [row["number"] for row in values["combinations"]] == [0, 1, 2]
    assert values["summary"]["outcomes"] == {"same": 3} and values["refusals"] == {"aim on next: no": 3}
    assert main("--count", "3", "--seed", "5") == 2
    assert "another seed" in capsys.readouterr().err
