"""Quality, the comparison, its rule, and that two processes give the numbers of one."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from stand_in import questions, tiny

import foveate
from foveate.data.samples import Sample, to_inputs
from foveate.hosts import adapt
from foveate.measure.compare import METHODS, Comparison, Row, candidates, choose, compare
from foveate.measure.provenance import Overlay, overlay, visual_tokens
from foveate.measure.quality import Batches, answer, kl_divergence, normalise
from foveate.method import InputError

SMALL = {
    "budgets": (0.5, 0.1), "baselines": ("pool", "resolution"), "timing_pairs": 1, "batch_size": 4, "max_new_tokens": 3,
}  # fmt: skip


def test_kl_against_a_slow_loop() -> None:
    p, q = torch.randn(3, 11) * 3, torch.randn(3, 11) * 3
    expected = []
    for a, b in zip(p.tolist(), q.tolist()):
        za, zb = sum(map(math.exp, a)), sum(map(math.exp, b))
        expected.append(sum(math.exp(x) / za * math.log((math.exp(x) / za) / (math.exp(y) / zb)) for x, y in zip(a, b)))
    assert kl_divergence(p, q).tolist() == pytest.approx(expected, rel=1e-9)
    assert kl_divergence(p, p).tolist() == [0, 0, 0]


@pytest.mark.parametrize("text", ["Top  left.", " top left ", "TOP\tLEFT !", "top left"])
def test_answers_are_compared_by_their_words(text: str) -> None:
    assert normalise(text) == "top left"


def test_logits_and_answers_are_those_of_the_model_alone() -> None:
    model, processor = tiny()
    samples = questions(5)
    said = answer(model, processor, Batches(processor, samples, 5), 3)
    for b, sample in enumerate(samples):
        inputs = to_inputs(processor, [sample])
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -1]
            ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert torch.allclose(said[0].logits[b], logits, atol=1e-4)
        assert said[0].answers[b] == normalise(processor.tokenizer.decode(ids, skip_special_tokens=True))


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    torch.manual_seed(0)
    model, processor = tiny()
    return compare(model, processor, questions(10), METHODS, **SMALL)  # type: ignore[arg-type]


def test_rows_are_complete(comparison: Comparison) -> None:
    assert comparison.rows[0].method == "dense"
    assert comparison.samples == 10
    names = ("pool", "resolution", *METHODS)
    assert [(row.method, row.budget) for row in comparison.rows[1:]] == [(n, b) for n in names for b in (0.5, 0.1)]
    for row in comparison.rows:
        if row.refused is not None:
            assert (row.method, row.flops) == ("pyramiddrop", None)
            continue
        assert row.visual_share is not None and row.visual_share <= row.budget + 0.02
        assert row.flops_ratio is not None
        assert row.flops_ratio < 1 or row.method not in ("pool", "resolution")
        assert row.time_low is not None and row.time_ratio is not None and row.time_high is not None
        assert row.time_low <= row.time_ratio <= row.time_high
        assert row.accuracy is not None and row.accuracy_by_type and row.kl is not None and row.kl >= 0
        assert row.stages and row.stages[0][1] > 0
    assert {row.method for row in comparison.rows if row.baseline} == {"dense", "pool", "resolution"}
    assert "command" in comparison.environment


def test_it_survives_json(comparison: Comparison) -> None:
    again = Comparison.from_json(comparison.to_json())
    assert again == comparison
    assert again.choice is None or any(again.choice is row for row in again.rows)
    with pytest.raises(InputError, match="not a comparison"):
        Comparison.from_json('{"rows": 3}')


def test_keeping_everything_is_dense() -> None:
    model, processor = tiny()
    result = compare(
        model, processor, questions(4), [foveate.method_class("fopru")(keep=1.0)], baselines=(), timing_pairs=1,
        batch_size=2,
    )  # fmt: skip
    dense, same = result.rows
    assert (same.agreement, same.kl, same.flops, same.kv_bytes) == (1.0, 0.0, dense.flops, dense.kv_bytes)
    assert (same.accuracy, same.visual_share, same.budget) == (dense.accuracy, 1.0, 1.0)


def test_progress_and_rows_come_as_they_are_measured() -> None:
    model, processor = tiny()
    steps: list[tuple[int, int, str]] = []
    seen: list[str] = []

    def on_row(row: Row) -> None:
        seen.append(row.method)
        if row.method == "vtc-cls":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(
            model, processor, questions(5), ("fopru", "vtc-cls", "aim"), budgets=(0.5,), baselines=("pool",),
            batch_size=2, timing_pairs=1, max_new_tokens=2, on_progress=lambda *step: steps.append(step), on_row=on_row,
        )  # fmt: skip
    assert seen == ["dense", "pool", "fopru", "vtc-cls"]
    assert [done for done, _, _ in steps] == list(range(1, 13))
    assert {total for _, total, _ in steps} == {15}
    # The model is as it was: methods can be applied again.
    with foveate.apply(model, "fopru"):
        pass


def _row(method: str, cost: float, accuracy: float | None, *, agreement: float = 1.0, baseline: bool = False) -> Row:
    return Row(method, 0.5, baseline, flops_ratio=cost, accuracy=accuracy, agreement=agreement)


@pytest.mark.parametrize(
    ("rows", "winner", "words"),
    [
        ([_row("a", 0.6, 0.80), _row("b", 0.4, 0.795), _row("c", 0.2, 0.5)], "b", "cheapest within 1 point"),
        ([_row("a", 0.6, 0.80), _row("pool", 0.3, 0.80, baseline=True)], "pool", "plain baseline"),
        ([_row("a", 0.6, 0.70), _row("b", 0.5, 0.60)], "a", "loses least per FLOP"),
        ([_row("a", 1.2, 0.80)], None, "nothing measured"),
        ([_row("a", 0.6, None, agreement=0.995), _row("b", 0.4, None, agreement=0.98)], "a", "agreement with dense"),
    ],
)
def test_the_rule(rows: list[Row], winner: str | None, words: str) -> None:
    answers = rows[0].accuracy is not None
    dense = _row("dense", 1.0, 0.80 if answers else None, baseline=True)
    choice, why = choose([dense, *rows, Row("z", 0.1, False, refused="cannot")])
    assert (choice.method if choice else None) == winner
    assert words in why


def test_counts_and_overlay_follow_the_trace() -> None:
    model, processor = tiny()
    inputs = to_inputs(processor, questions(2))
    with torch.inference_mode(), foveate.apply(model, "pyramiddrop") as applied:
        model(**inputs)
        trace = list(applied.trace)
    assert visual_tokens(trace, 4) == [(36, 36), (18, 18), (9, 9), (4, 4)]
    for b in range(2):
        shown = overlay(trace, 4, (6, 6), "pyramiddrop", 0.5, b)
        assert sorted(shown.depth) == [0.25] * 18 + [0.5] * 9 + [0.75] * 5 + [1.0] * 4
        assert set(shown.group) == {-1}
    with torch.inference_mode(), foveate.apply(model, "pool", keep=0.25) as applied:
        model(**inputs)
        shown = overlay(applied.trace, 4, (6, 6), "pool", 0.25)
    assert set(shown.depth) == {1.0}
    assert shown.group == tuple(row // 2 * 3 + column // 2 for row in range(6) for column in range(6))
    with torch.inference_mode(), foveate.apply(model, "fopru", keep=0.25) as applied:
        model(**inputs)
        assert sorted(overlay(applied.trace, 4, (6, 6), "fopru", 0.25).depth) == [0.0] * 27 + [1.0] * 9


def test_the_sample_that_is_shown(comparison: Comparison) -> None:
    model, processor = tiny()
    shape, samples = adapt(model).shape, questions(10)
    assert comparison.shown is not None
    sample = next(one for one in samples if one.id == comparison.shown.id)
    assert (comparison.shown.prompt, comparison.shown.expected) == (sample.prompt, sample.answer)
    assert sorted(len(one.prompt) for one in samples)[5] == len(sample.prompt)
    assert len(comparison.overlays) == sum(row.refused is None for row in comparison.rows[1:])
    for one in [comparison.shown, *comparison.overlays]:
        with contextlib.ExitStack() as stack:
            if isinstance(one, Overlay):
                method = foveate.method_class(one.method).for_budget(one.budget, shape)
                stack.enter_context(foveate.apply(model, method))
            said = answer(model, processor, Batches(processor, [sample], 1), 3)
        assert one.answer == said[0].answers[0]


def test_candidates_are_all_that_need_no_training() -> None:
    cards = [cls.card for cls in foveate.registry().values()]
    for family in ("hf-vlm", "hf-vision", "timm"):
        fits = {card.slug for card in cards if card.kind == "reduce" and card.training_free and family in card.hosts}
        baselines = {card.slug for card in cards if card.baseline and family in card.hosts}
        assert set(candidates(family)) == fits - baselines
        assert set(candidates(family, baselines=True)) == baselines - {"dense"}
    assert set(METHODS) <= set(candidates())


def test_a_method_that_can_do_nothing_is_refused_before_any_work() -> None:
    model, processor = tiny()
    steps: list[object] = []
    for asked in (["pyramiddrop"], [foveate.method_class("pyramiddrop")(layers=(1, 2, 9))]):
        with pytest.raises(InputError):
            compare(model, processor, questions(2), asked, budgets=(0.1,), on_progress=lambda *step: steps.append(step))
    assert not steps


def test_a_prompt_longer_than_the_model_takes() -> None:
    model, processor = tiny()
    short, long = questions(2)
    long = replace(long, prompt="is there a dog ? " * 60, id="the-long-one")
    with pytest.raises(InputError, match=r"'the-long-one': its prompt has \d+ tokens .* takes 253 beside"):
        compare(model, processor, [short, short, long], **SMALL)  # type: ignore[arg-type]


def test_bad_input_gets_one_line() -> None:
    model, processor = tiny()
    good = questions(2)
    nothing = Sample((), "what is there ?", id="empty-one")
    with pytest.raises(InputError, match="'empty-one' has no picture"):
        compare(model, processor, [*good, nothing], **SMALL)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no samples"):
        compare(model, processor, [])
    with pytest.raises(InputError, match="budgets must be in"):
        compare(model, processor, good, budgets=(1.5,))
    with pytest.raises(InputError, match="did you mean pool"):
        compare(model, processor, good, baselines=("pol",))
    processor.chat_template = "{% for message in messages %}USER: hello{% endfor %}"
    with pytest.raises(InputError, match=f"'{good[0].id}': its prompt has no image token"):
        to_inputs(processor, good)
    with pytest.raises(InputError, match="no image token"):
        processor.chat_template = "{% for message in messages %}USER: hello{% endfor %}"
        to_inputs(_deaf(processor), good)


def _deaf(processor: object) -> object:
    """A processor that forgets the pictures of the prompt."""

    class Deaf:
        chat_template = None
        image_token, image_token_id = "", processor.image_token_id  # type: ignore[attr-defined]

        def __call__(self, images: list[Image.Image], text: list[str], **kwargs: object) -> dict[str, torch.Tensor]:
            ids = torch.zeros(len(text), 3, dtype=torch.long)
            return {"input_ids": ids, "pixel_values": torch.zeros(len(images), 3, 4, 4)}

    return Deaf()


def test_pixels_that_are_not_finite_are_refused() -> None:
    _, processor = tiny()
    processor.image_processor.image_std = [0.0, 0.0, 0.0]
    black = Sample((Image.fromarray(np.zeros((8, 8, 3), np.uint8)),), "what is there ?")
    with np.errstate(all="ignore"), pytest.raises(InputError, match="not finite"):
        to_inputs(processor, [black])
