from __future__ import annotations

import functools
import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import foveate
from foveate.measure.flops import count_flops
from foveate.measure.memory import kv_bytes
from foveate.measure.provenance import visual_tokens
from foveate.method import InputError
from foveate.methods.probe.verbose_images import (
    Answers,
    DecodeCost,
    Result,
    VerboseImages,
    _Target,
    diversity_loss,
    end_loss,
    uncertainty_loss,
)
from tiny import VOCABULARY, prompt, vlm

END = 5
MEAN, STD = np.array([0.45, 0.5, 0.4]).reshape(3, 1, 1), np.array([0.25, 0.3, 0.28]).reshape(3, 1, 1)


def processor(**changes: Any) -> Any:
    prepare = {"image_mean": MEAN.ravel().tolist(), "image_std": STD.ravel().tolist(), "rescale_factor": 1 / 255}
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join("a bb"[: 1 + i % 4] for i in ids))
    return SimpleNamespace(image_processor=SimpleNamespace(**prepare | changes), tokenizer=tokenizer)


def host(name: str = "clip-llama") -> tuple[Any, dict[str, Tensor]]:
    """A host with an end token, and a prompt whose picture has valid pixels, black and white ones among them."""
    model = vlm(name, layers=2)
    model.generation_config.eos_token_id = END
    inputs = prompt(model, [(2, 4)], sizes=[(16, 24)] if name == "next" else None)
    shades = (inputs["pixel_values"].numpy() * 0.4 + 0.5).clip(0, 1)
    inputs["pixel_values"] = torch.from_numpy((shades - MEAN) / STD).float()
    return model, inputs


@pytest.fixture(scope="module")
def llava() -> tuple[Any, dict[str, Tensor]]:
    return host()


class Watched:
    """What goes into a model while it is probed: pictures of answers, pictures and texts of losses, raw answers."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Tensor] = []
        self.said: list[Tensor] = []
        self.learned: list[tuple[Tensor, list[int]]] = []
        generate, forward = model.generate, model.forward

        def watched_generate(**given: Any) -> Tensor:
            self.asked.append(given["pixel_values"].clone())
            output: Tensor = generate(**given)
            self.said.append(output[:, given["input_ids"].shape[1] :])
            return output

        @functools.wraps(forward)
        def watched_forward(*args: Any, **given: Any) -> Any:
            pixels = given.get("pixel_values")
            if pixels is not None and pixels.requires_grad:
                self.learned.append((pixels.detach().clone(), []))
            elif given.get("output_hidden_states") and torch.is_grad_enabled():
                self.learned[-1][1].extend(given["input_ids"][0].tolist())
            return forward(*args, **given)

        monkeypatch.setattr(model, "generate", watched_generate)
        monkeypatch.setattr(model, "forward", watched_forward)


# -- losses and weights


def test_losses_are_the_formulas() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 3
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    log_p = logits.log_softmax(1)
    divergence = sum(math.log(1 / 7 / p[i, v]) / 7 for i in range(5) for v in range(7))
    assert float(uncertainty_loss(log_p)) == pytest.approx(divergence, rel=1e-5) and divergence > 0
    assert float(end_loss(log_p, [3])) == pytest.approx(sum(p[:, 3]) / 5, rel=1e-5)
    assert float(end_loss(log_p, [3, 0])) == pytest.approx((p[:, 3] + p[:, 0]).mean(), rel=1e-5)
    uniform = torch.full((4, 11), -math.log(11))
    assert float(uncertainty_loss(uniform)) == pytest.approx(0, abs=1e-5)
    certain = torch.full((3, 4), -50.0).index_fill_(1, torch.tensor([2]), 0.0)
    assert float(end_loss(certain, [2])) == 1 and float(end_loss(certain, [1])) < 1e-20


def test_diversity_is_minus_the_nuclear_norm_of_absolute_states() -> None:
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(n, 6, generator=generator, dtype=torch.bfloat16) for n in (4, 3)]
    rows = np.abs(np.concatenate([one.float().numpy() for one in states])).astype(np.float64)
    norm = np.linalg.svd(rows, compute_uv=False).sum()
    loss = diversity_loss(states)
    assert float(loss) == pytest.approx(-norm, rel=1e-5) and loss.dtype == torch.float32
    assert abs(norm - np.linalg.svd(np.concatenate([s.float() for s in states]), compute_uv=False).sum()) > 0.1


def test_weights_are_raw_at_first_and_smoothed_afterwards() -> None:
    probe = VerboseImages()
    series = [{"uncertainty": 600 - t, "end": 0.1 + 0.001 * t, "diversity": -6000.0 - t} for t in range(300)]
    found: dict[str, float] = {}
    expected: dict[str, float] = {}
    for t, losses in enumerate(series):
        end = abs(losses["uncertainty"] / (losses["end"] * (10 * math.log(t + 1) - 20)))
        diversity = abs(losses["uncertainty"] / (losses["diversity"] * (0.5 * math.log(t + 1) + 1)))
        raw = {"uncertainty": 1.0, "end": end, "diversity": diversity}
        expected = {name: 0.9 * expected[name] + 0.1 * raw[name] if expected else raw[name] for name in raw}
        found = probe.weights(losses, t, found)
        assert found == pytest.approx(expected)
        assert all(0 < value < math.inf for value in found.values())
    # At a pole of a schedule, and for a loss of 0, they are large but can be multiplied in float32.
    for value, schedule in ((0.5, (0, 0)), (0.0, (0, 1))):
        weight = VerboseImages(end_schedule=schedule).weights({"uncertainty": 600.0, "end": value}, 3, {})["end"]
        assert 0 < weight < 1e30


# -- the loop, against a reference that knows nothing of caches


def reference_update(
    model: Any, inputs: dict[str, Tensor], pixels: Tensor, answer: list[int], t: int, smoothed: dict[str, float],
    losses: tuple[str, ...], positions: str,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """The gradient's sign from one plain forward over prompt and answer, and the weights."""
    pixels = pixels.clone().requires_grad_()
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], 1)
    given = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    output = model(**given, output_hidden_states=True)
    start = inputs["input_ids"].shape[1] - 1 if positions == "answer" else 0
    p = output.logits[0, start:].softmax(-1)
    g = torch.cat([layer[0, start:] for layer in output.hidden_states[1:]]).abs()
    values = {
        "end": p[:, END].mean(),
        "uncertainty": (math.log(1 / VOCABULARY) - p.log()).sum() / VOCABULARY,
        "diversity": -torch.linalg.svd(g, full_matrices=False).S.sum(),
    }
    schedule = {"end": 10 * math.log(t + 1) - 20, "diversity": 0.5 * math.log(t + 1) + 1}
    weights = {"uncertainty": 1.0}
    for name, factor in schedule.items():
        raw = abs(values["uncertainty"].item() / (values[name].item() * factor))
        weights[name] = 0.9 * smoothed[name] + 0.1 * raw if smoothed else raw
    total: Any = sum(weights[name] * values[name] for name in losses)
    return torch.autograd.grad(total, pixels)[0].sign(), weights


@pytest.mark.parametrize(
    ("name", "unit", "positions", "losses"),
    [
        ("clip-llama", "pixel", "all", ("end", "uncertainty", "diversity")),
        ("next", "normalised", "answer", ("end", "uncertainty", "diversity")),
        ("clip-llama", "normalised", "all", ("end",)),
        ("clip-llama", "pixel", "answer", ("uncertainty", "diversity")),
    ],
)
def test_every_update_is_the_papers(
    name: str, unit: str, positions: str, losses: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = host(name)
    model.double()
    clean = inputs["pixel_values"].clone()
    before = {key: value.clone() for key, value in inputs.items()}
    probe = VerboseImages(
        iterations=4, step=0.02, eps=0.05, unit=unit, positions=positions, losses=losses, max_new_tokens=4, samples=2
    )
    with monkeypatch.context() as patch:
        watched = Watched(model, patch)
        result = probe.run(model, inputs, processor())
    assert all(torch.equal(inputs[key], value) for key, value in before.items())

    assert len(watched.learned) == 4 and len(watched.asked) == 2 + 4 + 2
    start = watched.learned[0][0] - clean
    assert abs(float(start.mean())) < 0.2 and abs(float(start.std()) - 1) < 0.2 and start.abs().max() > 2
    factor = 1 / torch.from_numpy(STD) if unit == "pixel" else torch.ones(3, 1, 1)
    smoothed: dict[str, float] = {}
    for t, (pixels, answer) in enumerate(watched.learned):
        said = watched.said[0 if t == 0 else t + 1].tolist()
        texts = [list(itertools.takewhile(lambda token: token != END, row)) for row in said]
        assert answer == max(texts, key=len), "the longest answer is the next text"
        sign, smoothed = reference_update(model, inputs, pixels, answer, t, smoothed, losses, positions)
        for one in set(losses) - {"uncertainty"}:
            assert result.iterations[t].weights[one] == pytest.approx(smoothed[one], rel=1e-3)
        wanted = pixels - 0.02 * factor * sign
        wanted = torch.from_numpy((wanted.numpy() * STD + MEAN).clip(0, 1) - MEAN) / STD
        wanted = clean + (wanted - clean).maximum(-0.05 * factor).minimum(0.05 * factor)
        after = watched.asked[t + 2]
        # Where a gradient is all but 0 its sign is anybody's guess.
        assert ((after - wanted).abs() > 1e-5).float().mean() < 0.01
        shades = after.numpy() * STD + MEAN
        assert shades.min() > -1e-6 and shades.max() < 1 + 1e-6
        assert ((after - clean).abs() - 0.05 * factor).max() < 1e-6
        if t:
            assert torch.equal(pixels, watched.asked[t + 1])


@pytest.mark.parametrize("method", ["dense", "pyramiddrop", "fopru", "mustdrop"])
def test_losses_are_of_what_the_model_does_when_it_answers(method: str, llava: tuple[Any, dict[str, Tensor]]) -> None:
    """The distributions are those that `generate` draws from, with methods applied too, and the picture moves them."""
    model, inputs = vlm("clip-llama", layers=4), llava[1]
    model.generation_config.eos_token_id = END
    length = inputs["input_ids"].shape[1]
    with foveate.apply(model, method) as applied:
        output = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        answer = output.sequences[0, length:].tolist()[:4]
        pixels = inputs["pixel_values"].clone().requires_grad_()
        target = _Target(VerboseImages(positions="answer"), model, inputs, processor())
        log_p, states = target.forward(pixels, tuple(answer))
        assert len(answer) == 4 and [len(one) for one in states] == [5] * 4
        torch.testing.assert_close(log_p, torch.cat(output.logits).log_softmax(-1), rtol=1e-4, atol=1e-4)
        (gradient,) = torch.autograd.grad(log_p.sum(), pixels)
        assert gradient.abs().max() > 0
        target = _Target(VerboseImages(positions="all"), model, inputs, processor())
        log_p, states = target.forward(pixels, tuple(answer))
        left = visual_tokens(applied.trace, 4)
    assert [len(one) for one in states] == [length - 16 + layer[0] + 4 for layer in left]
    assert len(log_p) == len(states[-1]), "tokens that are gone count nothing"
    assert (left[-1][0] < 16) == (method != "dense")


def test_model_is_as_it_was(llava: tuple[Any, dict[str, Tensor]]) -> None:
    model, inputs = llava
    frozen = model.model.vision_tower
    frozen.requires_grad_(False)
    model.train()
    frozen.eval()
    before = {name: (weight.clone(), weight.requires_grad) for name, weight in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()

    def stop(result: Result) -> None:
        if len(result.iterations) == 2:
            raise KeyboardInterrupt

    try:
        probe = VerboseImages(iterations=3, max_new_tokens=3)
        with pytest.raises(KeyboardInterrupt):
            probe.run(model, inputs, processor(), on_iteration=stop)
        assert torch.equal(torch.random.get_rng_state(), state), "the user's random numbers are not touched"
        for name, weight in model.named_parameters():
            assert weight.grad is None and weight.requires_grad == before[name][1]
            assert torch.equal(weight, before[name][0])
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval().requires_grad_(True)


@pytest.mark.parametrize("top_p", [0.0, 0.9])
def test_same_seed_same_result(top_p: float, llava: tuple[Any, dict[str, Tensor]]) -> None:
    model, inputs = llava

    def once(seed: int) -> Result:
        probe = VerboseImages(iterations=2, eps=0.2, step=0.1, top_p=top_p, max_new_tokens=4, seed=seed)
        return probe.run(model, inputs, processor())

    first, second, other = once(1), once(1), once(2)
    assert torch.equal(first.perturbation, second.perturbation) and first.longest == second.longest
    assert [one.losses for one in first.iterations] == [one.losses for one in second.iterations]
    assert not torch.equal(first.perturbation, other.perturbation)
    assert len(first.clean.lengths) == (3 if top_p else 1) and first.complete and first.again and first.rounded


@pytest.mark.parametrize("top_p", [0.0, 0.9])
def test_without_room_for_change_everything_is_clean(
    top_p: float, llava: tuple[Any, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = llava
    watched = Watched(model, monkeypatch)
    result = VerboseImages(iterations=2, eps=0.0, top_p=top_p, max_new_tokens=4).run(model, inputs, processor())
    assert not result.perturbation.any()
    for pixels in watched.asked[:-1]:
        assert torch.equal(pixels, inputs["pixel_values"])
    lengths = result.clean.lengths
    assert result.noise.lengths == lengths and all(one.answers.lengths == lengths for one in result.iterations)


def test_noise_has_the_size_of_the_bound_and_the_picture_is_saved_in_bytes(
    llava: tuple[Any, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = llava
    watched = Watched(model, monkeypatch)
    result = VerboseImages(iterations=1, eps=4 / 255, max_new_tokens=2).run(model, inputs, processor())
    clean = inputs["pixel_values"].double().numpy() * STD + MEAN
    change = watched.asked[1].double().numpy() * STD + MEAN - clean
    inside = (clean > 4.1 / 255) & (clean < 1 - 4.1 / 255)
    np.testing.assert_allclose(np.abs(change[inside]), 4 / 255, atol=1e-6)
    assert 0.4 < (change[inside] > 0).mean() < 0.6 and not inside.all()
    assert (clean + change).min() > -1e-6 and (clean + change).max() < 1 + 1e-6
    shades = (watched.asked[2].double().numpy() * STD + MEAN) * 255
    assert result.picture.dtype == torch.uint8 and np.abs(result.picture.numpy() - shades).max() < 0.501
    saved = (result.picture.numpy() / 255 - MEAN) / STD
    np.testing.assert_allclose(watched.asked[-1].numpy(), saved, atol=1e-5)


# -- answers


def test_best_is_the_longest_and_not_the_last(
    llava: tuple[Any, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = llava
    # clean, noise; four iterations; again, in 8 bits.
    script = [(1, 1), (2, 1), (2, 4), (9, 3), (5, 7), (1, 1), (4, 4), (3, 3)]
    calls = iter(script)
    pictures: list[Tensor] = []

    def scripted(self: _Target, pixels: Tensor, seed: int) -> Answers:
        lengths = next(calls)
        pictures.append(pixels)
        longest = max(lengths)
        return Answers(lengths, lengths, (longest,) * longest, 0.0)

    monkeypatch.setattr(_Target, "answers", scripted)
    seen: list[tuple[int, int]] = []
    result = VerboseImages(iterations=4, max_new_tokens=9).run(
        model, inputs, processor(), on_iteration=lambda one: seen.append((one.best, one.longest_length))
    )
    assert seen == [(0, 4), (1, 9), (1, 9), (1, 9)], "of two equal means the first"
    assert result.lengths == [3.0, 6.0, 6.0, 1.0] and result.longest == (9,) * 9
    clean = inputs["pixel_values"]
    torch.testing.assert_close(clean + result.perturbation, pictures[3], rtol=0, atol=1e-6)
    assert torch.equal(pictures[6], pictures[3]) and not torch.equal(pictures[3], pictures[5])
    assert result.again and result.again.lengths == (4, 4) and result.rounded and result.rounded.lengths == (3, 3)


def test_lengths_are_counted_up_to_the_end_and_the_cap_holds(
    llava: tuple[Any, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = llava
    watched = Watched(model, monkeypatch)
    many = list(range(3, 60))  # so likely that answers differ in length
    monkeypatch.setattr(model.generation_config, "eos_token_id", many)
    probe = VerboseImages(iterations=2, max_new_tokens=6, samples=5, count="words", top_p=1.0)
    result = probe.run(model, inputs, processor())
    found = [result.clean, result.noise, *(one.answers for one in result.iterations), result.again, result.rounded]
    ended = set()
    for rows, answers in zip(watched.said, found):
        assert answers is not None and len(answers.lengths) == 5 and answers.seconds > 0
        texts = [list(itertools.takewhile(lambda token: token not in many, row)) for row in rows.tolist()]
        assert list(answers.tokens) == [len(text) for text in texts] and max(answers.tokens) <= 6
        # See `processor`: token i is "a", "a ", "a b" or "a bb".
        words = [sum((1, 1, 2, 2)[token % 4] for token in text) for text in texts]
        assert list(answers.lengths) == words and answers.mean == sum(words) / 5
        assert list(answers.longest) == texts[words.index(max(words))]
        ended |= {len(text) for text in texts}
    assert len(ended) > 2
    monkeypatch.setattr(model.generation_config, "eos_token_id", END)
    capped = VerboseImages(iterations=1, max_new_tokens=7, top_p=0.0).run(model, inputs, processor())
    assert max(capped.clean.tokens) <= 7 and capped.longest_length <= 7


def test_cost_of_a_token_is_counted(llava: tuple[Any, dict[str, Tensor]]) -> None:
    model, inputs = llava
    result = VerboseImages(iterations=1, max_new_tokens=2).run(model, inputs, processor())
    # 2 layers of width 32: four projections, three of the MLP (64 wide), attention over what is there; the head.
    length = inputs["input_ids"].shape[1] + 1
    macs = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32 * length) + 32 * VOCABULARY
    assert result.cost == DecodeCost(2 * macs, 2 * 2 * 2 * 32, 2 * 2 * 32 * 4)

    with torch.no_grad(), foveate.apply(model, "fopru", keep=0.25):
        short = VerboseImages(iterations=1, max_new_tokens=2).run(model, inputs, processor()).cost
        cache = model(**inputs, use_cache=True).past_key_values
        held, counted = kv_bytes(cache), []
        for taken in (1, 2, 3):
            given = {
                "input_ids": torch.tensor([[7]]), "past_key_values": cache,
                "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + taken, dtype=torch.long),
            }  # fmt: skip
            counted.append(count_flops(lambda given=given: model(**given)))
        assert kv_bytes(cache) - held == 3 * short.kv_bytes
    assert [short.total_flops(n) for n in range(4)] == [0, *np.cumsum(counted).tolist()]
    assert short.flops < result.cost.flops


# -- what cannot be


@pytest.mark.parametrize(
    "settings",
    [
        {"iterations": 0}, {"iterations": 1.5}, {"step": 0.0}, {"step": "1"}, {"eps": -0.1}, {"eps": 1.5},
        {"unit": "grey"}, {"end_schedule": (1.0,)}, {"end_schedule": "ab"}, {"diversity_schedule": (1.0, math.nan)},
        {"momentum": 1.0}, {"losses": ()}, {"losses": "end"}, {"losses": ("ends",)}, {"positions": "some"},
        {"samples": 0}, {"top_p": 1.1}, {"max_new_tokens": 0}, {"count": "letters"}, {"seed": -1},
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        VerboseImages(**settings)


def test_bad_inputs_say_why(llava: tuple[Any, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = llava
    padded = inputs | {"attention_mask": inputs["attention_mask"].clone().index_fill_(1, torch.tensor([0]), 0)}
    two = prompt(model, [(2, 4), (2, 4)])
    for bad, message in [
        (inputs | {"pixel_values": torch.zeros(4, 96)}, "pixel_values"),
        ({"input_ids": inputs["input_ids"]}, "pixel_values"),
        (padded, "without padding"),
        (two, "one prompt at a time"),
        (inputs | {"pixel_values": inputs["pixel_values"] * 2}, "outside black and white"),
        (inputs | {"pixel_values": inputs["pixel_values"] * math.nan}, "outside black and white"),
    ]:
        with pytest.raises(InputError, match=message):
            VerboseImages(iterations=1).run(model, bad, processor())
    with pytest.raises(InputError, match="more than the 1024 tokens"):
        VerboseImages(max_new_tokens=1024).run(model, inputs, processor())
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    with pytest.raises(InputError, match="eos_token_id"):
        VerboseImages().run(model, inputs, processor())
