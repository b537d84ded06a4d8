"""`tune`: halving against a slow reference, candidates, goals, and that an interrupted run ends like a whole one."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_in import questions, tiny

import foveate
from foveate.configuration import describe, load_configuration
from foveate.data.samples import Sample, to_inputs
from foveate.data.video import Video
from foveate.hosts import adapt
from foveate.measure import quality
from foveate.measure.compare import Comparison, compare
from foveate.measure.flops import count_flops
from foveate.measure.trials import Candidate, Trial
from foveate.measure.tune import Goal, Tuned, pareto, plan, promote, rungs, tune
from foveate.method import InputError, build

SMALL: dict[str, Any] = {
    "budgets": (0.5, 0.25), "stack_budgets": (0.25,), "first_rung": 4, "batch_size": 4, "timing_pairs": 1,
    "max_new_tokens": 2,
}  # fmt: skip
METHODS = ("vtc-cls", "pyramiddrop")


# ---------------------------------------------------------------------------------------------------------------------
# goals and halving, on made-up scores


def test_rungs_double_and_end_with_all() -> None:
    assert rungs(300) == [32, 64, 128, 256, 300]
    assert (rungs(256), rungs(32), rungs(5), rungs(33)) == ([32, 64, 128, 256], [32], [5], [32, 33])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "one goal"),
        ({"target_speedup": 2.0, "max_loss": 0.1}, "one goal"),
        ({"target_speedup": 1.0}, "must be a number in"),
        ({"target_speedup": math.nan}, "must be a number in"),
        ({"target_speedup": math.inf}, "must be a number in"),
        ({"max_loss": 1.0}, "must be a number in"),
        ({"max_loss": -0.1}, "must be a number in"),
    ],
)
def test_a_goal_is_one_of_two(given: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Goal(**given)


def _trial(cost: float, accuracy: float, agreement: float = 0.8) -> Trial:
    return Trial("quality", [], "", 0, flops=1, flops_ratio=cost, accuracy=accuracy, agreement=agreement, kl=0.0)


def _slow_promote(trials: list[Trial], dense: float, samples: int, goal: Goal) -> list[int]:
    """By the words of the docstring: one candidate after the other is taken out, then the best is looked for."""

    def error(*ones: Trial) -> float:
        return 2 * ((sum(1 - one.agreement for one in ones) + 1 / samples) / samples) ** 0.5  # type: ignore[operator]

    left = list(range(len(trials)))
    for i, one in enumerate(trials):
        too_much = goal.max_loss is not None and dense - one.accuracy - error(one) > goal.max_loss  # type: ignore[operator]
        beaten = False
        for other in trials:
            if other.flops_ratio <= one.flops_ratio and other.accuracy - one.accuracy > error(one, other):  # type: ignore[operator]
                beaten = True
        if too_much or beaten:
            left.remove(i)
    ordered: list[int] = []
    while len(ordered) < len(left):
        best: int | None = None
        for i in left:
            if i not in ordered and (best is None or _better(trials[i], trials[best], dense, goal)):
                best = i
        assert best is not None
        ordered.append(best)
    kept = ordered[: max((len(left) + 1) // 2, 4)]
    if goal.max_loss is not None:
        for i in ordered:
            one = trials[i]
            beaten = any(
                (o.flops_ratio < one.flops_ratio and o.accuracy >= one.accuracy)  # type: ignore[operator]
                or (o.flops_ratio <= one.flops_ratio and o.accuracy > one.accuracy)  # type: ignore[operator]
                for o in trials
            )
            if i not in kept and not beaten and dense - one.accuracy <= goal.max_loss:  # type: ignore[operator]
                kept.append(i)
    return kept


def _better(one: Trial, other: Trial, dense: float, goal: Goal) -> bool:
    assert one.accuracy is not None and other.accuracy is not None
    assert one.flops_ratio is not None and other.flops_ratio is not None
    if goal.target_speedup is not None:
        return one.accuracy > other.accuracy or (one.accuracy == other.accuracy and one.flops_ratio < other.flops_ratio)
    fits, other_fits = (dense - trial.accuracy <= goal.max_loss for trial in (one, other))  # type: ignore[operator]
    if fits != other_fits:
        return fits
    if fits:
        return one.flops_ratio < other.flops_ratio
    return (one.accuracy, -one.flops_ratio) > (other.accuracy, -other.flops_ratio)


@pytest.mark.parametrize("goal", [Goal(target_speedup=2.0), Goal(max_loss=0.03), Goal(max_loss=0.0)])
def test_promotion_against_a_slow_reference(goal: Goal) -> None:
    draw = random.Random(0)
    dropped = extra = 0
    for _ in range(300):
        count, samples = draw.randint(0, 30), draw.choice([8, 64, 1024])
        # Different FLOPs, so that the reference needs no rule for ties; equal accuracies do happen.
        costs = draw.sample(range(10, 99), count)
        trials = [_trial(cost / 100, draw.randint(16, 48) / 64, draw.choice([0.5, 0.9, 1.0])) for cost in costs]
        dense = draw.choice([26, 44]) / 64
        expected = _slow_promote(trials, dense, samples, goal)
        assert promote(trials, dense, samples, goal) == expected
        dropped += len(expected) < min(4, count)
        extra += len(expected) > max(4, (count + 1) // 2)
    assert dropped and (extra or goal.target_speedup)


def test_the_pareto_front_against_all_pairs() -> None:
    draw = random.Random(1)
    for _ in range(200):
        trials = [_trial(draw.randint(1, 9) / 10, draw.randint(1, 9) / 10) for _ in range(draw.randint(1, 12))]
        points = {(one.flops_ratio, one.accuracy) for one in trials}
        expected = {
            (cost, right)
            for cost, right in points
            if not any((c <= cost and r >= right) and (c, r) != (cost, right) for c, r in points)  # type: ignore[operator]
        }
        front = pareto(trials)
        assert {(trials[i].flops_ratio, trials[i].accuracy) for i in front} == expected
        assert len(front) == len(expected)
        assert [trials[i].flops_ratio for i in front] == sorted((c for c, _ in expected), reverse=True)  # type: ignore[type-var]


# ---------------------------------------------------------------------------------------------------------------------
# candidates


def test_the_plan_has_every_budget_and_stacks_whose_shares_multiply() -> None:
    model, _ = tiny()
    shape = adapt(model).shape
    field = plan(model, shape, ["vtc-cls", "pyramiddrop", "aim"], (0.5, 0.25), (0.25, 0.04))
    assert field[0].label == "dense" and field[0].baseline
    names = ["+".join(m.card.slug for m in one.methods) for one in field[1:]]
    single = [(name, *one.budgets) for name, one in zip(names, field[1:]) if len(one.methods) == 1]
    baselines = ("grid", "pool", "random", "resolution")
    # Four layers, of which the first sees everything: a quarter is out of pyramiddrop's reach, and a fifth in a stack.
    assert [one for one in single if one[0] in baselines] == [(b, budget) for b in baselines for budget in (0.5, 0.25)]
    assert ("vtc-cls", 0.5) in single and ("vtc-cls", 0.25) in single and ("pyramiddrop", 0.5) in single
    assert ("pyramiddrop", 0.25) not in single
    stacks = [one for one in field if len(one.methods) > 1]
    # aim acts on both sides and stacks with nothing.
    assert [one.budgets for one in stacks] == [(0.5, 0.5)]
    assert stacks[0].label == "vtc-cls at 0.5 + pyramiddrop at 0.5" and not stacks[0].baseline
    assert describe(stacks[0].methods) == describe(
        [foveate.method_class(slug).for_budget(0.5, shape) for slug in ("vtc-cls", "pyramiddrop")]
    )
    assert len({json.dumps(describe(one.methods)) for one in field}) == len(field)


def test_a_name_that_can_do_nothing_here_is_refused() -> None:
    model, _ = tiny()
    shape = adapt(model).shape
    with pytest.raises(InputError, match=r"as little as 0\.1"):
        plan(model, shape, ["pyramiddrop"], (0.1,), ())
    with pytest.raises(InputError, match="did you mean pyramiddrop"):
        plan(model, shape, ["pyramid-drop"], (0.5,), ())


# ---------------------------------------------------------------------------------------------------------------------
# whole searches on a tiny model


def _tune(folder: Path, goal: Goal, count: int = 10, **settings: Any) -> Tuned:
    model, processor = tiny()
    return tune(model, processor, questions(count), METHODS, goal=goal, folder=folder, **SMALL | settings)


def _timeless(tuned: Tuned) -> Any:
    def told(one: Any) -> Any:
        trial = replace(one.trial, seconds=0.0, time_ratio=None, time_low=None, time_high=None)
        return one.candidate.label, trial

    assert tuned.chosen is not None
    return [told(one) for one in tuned.finalists], [told(one) for one in tuned.front], told(tuned.chosen), tuned.why


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tuned, list[tuple[int, int, str]]]:
    folder = tmp_path_factory.mktemp("whole")
    steps: list[tuple[int, int, str]] = []
    tuned = _tune(folder, Goal(target_speedup=1.5), on_progress=lambda *step: steps.append(step))
    return folder, tuned, steps


def test_trials_are_what_a_plain_measurement_gives(finished: tuple[Path, Tuned, list[Any]]) -> None:
    folder, tuned, steps = finished
    _, *lines = _lines(folder)
    flops = {one["label"]: one["flops_ratio"] for one in lines if one["what"] == "flops"}
    first = {one["label"] for one in lines if one["what"] == "quality" and one["samples"] == 4}
    assert first == {"dense"} | {label for label, ratio in flops.items() if ratio <= 1 / 1.5 + 1e-12}
    assert 4 < len(first) < len(flops) == tuned.tried
    last = [one for one in lines if one["what"] == "quality" and one["samples"] == 10]
    assert {one["label"] for one in last} == {one.candidate.label for one in tuned.finalists}
    # The chosen one again, without `tune`: all samples at once, and FLOPs of the median prompt.
    assert tuned.chosen is not None
    model, processor = tiny()
    samples = questions(10)
    batches = quality.Batches(processor, samples, 10)
    dense = quality.answer(model, processor, batches, 2)
    sample = sorted(samples, key=lambda one: len(one.prompt))[5]
    with torch.inference_mode():
        inputs = to_inputs(processor, [sample])
        dense_flops = count_flops(lambda: model(**inputs, logits_to_keep=1))
        with foveate.apply(model, str(folder / "chosen.json")):
            said = quality.answer(model, processor, batches, 2)
            chosen_flops = count_flops(lambda: model(**inputs, logits_to_keep=1))
    expected = quality.score(samples, dense, said)
    trial = tuned.chosen.trial
    assert (trial.accuracy, trial.agreement) == (expected.accuracy, expected.agreement)
    assert trial.kl == pytest.approx(expected.kl, rel=1e-3)
    assert trial.flops_ratio == chosen_flops / dense_flops
    assert trial.flops_ratio <= 1 / 1.5 and trial.time_ratio is not None
    best = max(one.trial.quality for one in tuned.finalists[1:])
    assert trial.quality == best
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    assert all(done <= total for done, total, _ in steps) and steps[-1][0] == steps[-1][1]


def test_the_chosen_file_says_what_was_measured(finished: tuple[Path, Tuned, list[Any]]) -> None:
    folder, tuned, _ = finished
    assert tuned.chosen is not None
    values = json.loads((folder / "chosen.json").read_text())
    assert values["measured"]["goal"] == {"target_speedup": 1.5}
    assert values["measured"]["flops_ratio"] == tuned.chosen.trial.flops_ratio
    assert describe(load_configuration(folder / "chosen.json")) == describe(tuned.chosen.candidate.methods)
    assert sorted(one.name for one in folder.iterdir()) == ["chosen.json", "trials.jsonl"]


@pytest.mark.parametrize("after", [3, 17])
def test_an_interrupted_run_ends_like_a_whole_one(
    finished: tuple[Path, Tuned, list[Any]], tmp_path: Path, after: int
) -> None:
    folder, whole, _ = finished
    seen: list[Trial] = []

    def interrupt(trial: Trial) -> None:
        seen.append(trial)
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _tune(tmp_path, Goal(target_speedup=1.5), on_trial=interrupt)
    assert len(_lines(tmp_path)) == 1 + after
    # And a line that was being written when the lights went out.
    with open(tmp_path / "trials.jsonl", "a") as file:
        file.write('{"what": "qual')
    more: list[Trial] = []
    again = _tune(tmp_path, Goal(target_speedup=1.5), on_trial=more.append)
    assert again.read == after and again.tried == whole.tried
    assert _timeless(again) == _timeless(whole)

    def told(lines: list[dict[str, Any]]) -> list[Any]:
        return [(one["what"], one["label"], one["samples"]) for one in lines[1:]]

    # No trial was run twice, and none left out.
    assert told(_lines(tmp_path)) == told(_lines(folder)) and len(more) == len(_lines(folder)) - 1 - after


def test_a_finished_search_runs_nothing_again(
    finished: tuple[Path, Tuned, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole, _ = finished
    before = (folder / "trials.jsonl").read_bytes()
    (folder / "chosen.json").unlink()
    monkeypatch.setattr("foveate.measure.tune.answer", None)
    monkeypatch.setattr("foveate.measure.tune.Prefill.cost", None)
    again = _tune(folder, Goal(target_speedup=1.5))
    assert replace(again, read=0) != again and _timeless(again) == _timeless(whole)
    assert [one.trial for one in again.front] == [replace(one.trial) for one in whole.front]
    assert (folder / "trials.jsonl").read_bytes() == before and (folder / "chosen.json").exists()


def test_another_goal_reads_the_same_trials_and_other_samples_do_not(
    finished: tuple[Path, Tuned, list[Any]], tmp_path: Path
) -> None:
    folder, _, _ = finished
    (tmp_path / "trials.jsonl").write_bytes((folder / "trials.jsonl").read_bytes())
    count = len(_lines(folder)) - 1
    more: list[Trial] = []
    tuned = _tune(tmp_path, Goal(target_speedup=50.0), on_trial=more.append)
    assert tuned.chosen is None and tuned.read == count and more == []
    cheapest = min((one for one in _lines(folder)[1:] if one["what"] == "flops"), key=lambda one: one["flops_ratio"])
    assert cheapest["label"] in tuned.why and f"{100 * cheapest['flops_ratio']:.3g} %" in tuned.why
    assert not (tmp_path / "chosen.json").exists()
    with pytest.raises(InputError, match="another run \\(different: samples, settings\\)"):
        _tune(tmp_path, Goal(target_speedup=1.5), count=6)
    text = (folder / "trials.jsonl").read_text().splitlines(keepends=True)
    for broken, message in (
        ([*text[:2], "{\n", *text[2:]], "jsonl:3: not JSON"),
        ([*text[:2], '{"a": 1}\n'], "jsonl:3: not a trial"),
        (text[1:], "line 1 does not say"),
    ):
        (tmp_path / "trials.jsonl").write_text("".join(broken))
        with pytest.raises(InputError, match=message):
            _tune(tmp_path, Goal(target_speedup=1.5))


def test_the_largest_loss_chooses_the_cheapest_or_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are made up, so that what each candidate loses is known."""
    agreement = {"grid": 0.9, "pool": 0.9, "random": 0.2, "resolution": 0.0, "vtc-cls": 0.95, "pyramiddrop": 1.0}
    samples = [replace(one, answer=None) for one in questions(20)]
    model, processor = tiny()

    def made_up(model: Any, processor: Any, batches: Any, new_tokens: int, after: Any) -> list[quality.Answered]:
        said = []
        for part in batches.parts:
            texts = []
            for index in part:
                number = order[id(batches.samples[index])]
                share = min(agreement[slug] for slug in at_work) if at_work else 1.0
                texts.append("same" if number < round(20 * share) else "other")
            said.append(quality.Answered(tuple(part), torch.zeros(len(part), 2), tuple(texts)))
            after()
        return said

    at_work: list[str] = []
    real = foveate.apply

    def applied(model: Any, methods: Any) -> Any:
        found = real(model, methods)
        at_work[:] = [one.card.slug for one in methods if one.card.slug != "dense"]

        def remove() -> None:
            at_work.clear()
            type(found).remove(found)

        found.remove = remove  # type: ignore[method-assign]
        return found

    order = {id(one): index for index, one in enumerate(samples)}
    monkeypatch.setattr("foveate.measure.tune.answer", made_up)
    monkeypatch.setattr("foveate.measure.tune.apply", applied)
    monkeypatch.setattr("foveate.measure.prefill.apply", applied)
    settings = SMALL | {"stack_budgets": ()}
    tuned = tune(model, processor, samples, METHODS, goal=Goal(max_loss=0.1), folder=tmp_path, **settings)
    assert tuned.chosen is not None and tuned.chosen.trial.accuracy is None
    costs = {
        one["label"]: one["flops_ratio"]
        for one in _lines(tmp_path)[1:]
        if one["what"] == "flops" and one["flops_ratio"] < 1
    }
    fits = {label: cost for label, cost in costs.items() if agreement[label.split()[0]] >= 0.9}
    assert tuned.chosen.trial.flops_ratio == min(fits.values())
    assert "agreement with dense" in tuned.why and "loses at most 10 points" in tuned.why
    if tuned.chosen.candidate.baseline:
        assert "plain baseline" in tuned.why
    agreement |= dict.fromkeys(agreement, 0.5)
    tuned = tune(model, processor, samples, METHODS, goal=Goal(max_loss=0.1), folder=tmp_path / "b", **settings)
    assert tuned.chosen is not None and tuned.chosen.candidate.label == "dense"
    assert "nothing cheaper loses at most 10 points" in tuned.why
    assert json.loads((tmp_path / "b/chosen.json").read_text())["methods"] == [{"method": "dense", "settings": {}}]


def test_what_refuses_while_it_runs_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, tokens: Any, at: Any) -> Any:
        raise InputError("not today")

    handler = foveate.method_class("vtc-cls").prune  # type: ignore[attr-defined]
    refuse.stage = handler.stage  # type: ignore[attr-defined]
    monkeypatch.setattr(foveate.method_class("vtc-cls"), "prune", refuse)
    tuned = _tune(tmp_path, Goal(target_speedup=1.5), count=4)
    lines = [one for one in _lines(tmp_path)[1:] if one.get("refused")]
    # Two budgets and the stack.
    assert len(lines) == 3 == tuned.refused and {one["refused"] for one in lines} == {"not today"}
    assert tuned.chosen is not None and "vtc-cls" not in tuned.chosen.candidate.label


def test_bad_input() -> None:
    model, processor = tiny()
    with pytest.raises(InputError, match="no samples"):
        tune(model, processor, [], goal=Goal(max_loss=0.1), folder="x")
    with pytest.raises(InputError, match="a budget must be"):
        tune(model, processor, questions(1), goal=Goal(max_loss=0.1), folder="x", budgets=(2.0,))
    clip = Video(np.zeros((2, 8, 8, 3), np.uint8), np.arange(2.0))
    with pytest.raises(InputError, match="'c': this model takes no videos"):
        tune(model, processor, [Sample((), "what ?", id="c", videos=(clip,))], goal=Goal(max_loss=0.1), folder="x")
    with pytest.raises(InputError, match="tune needs a vision-language model"):
        tune(model.model.vision_tower, processor, questions(1), goal=Goal(max_loss=0.1), folder="x")
    assert not Path("x").exists()


# ---------------------------------------------------------------------------------------------------------------------
# what `compare` makes of it


def test_compare_measures_a_file_once(tmp_path: Path) -> None:
    from foveate.configuration import save

    model, processor = tiny()
    stack = [build("vtc-cls", {"keep": 0.5, "layers": 2}), build("pyramiddrop", {"keep": 0.5})]
    save(tmp_path / "c.json", stack)
    save(tmp_path / "dense.json", [build("dense")])
    files = [str(tmp_path / "c.json"), str(tmp_path / "dense.json")]
    result = compare(
        model, processor, questions(3), files, baselines=(), timing_pairs=1, batch_size=4, max_new_tokens=2
    )
    dense, row = result.rows
    assert (row.method, row.baseline, row.refused) == ("vtc-cls+pyramiddrop", False, None)
    assert row.settings == {one["method"]: one["settings"] for one in describe(stack)}
    # 36 patches, 18 of which enter; four layers see 18, 9, 4 and 2 of them.
    assert row.visual_share == pytest.approx((18 + 9 + 4 + 2) / (4 * 36)) and row.budget == round(row.visual_share, 4)
    assert row.flops is not None and dense.flops is not None and row.flops < dense.flops
    assert Comparison.from_json(result.to_json()) == result


def test_a_candidate_is_a_baseline_only_if_all_of_it_is() -> None:
    pool, fopru = build("pool"), build("fopru")
    assert Candidate((pool,), (0.5,)).baseline and not Candidate((pool, fopru), (0.5, 0.5)).baseline
