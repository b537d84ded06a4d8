"""Masked generation: schedule, masks, loss, guidance and the sampler, against loops written here."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("timm")

from foveate.method import InputError
from foveate.nn.maskgit import MaskedGenerator, Sampling, schedule


def small(**changes: Any) -> MaskedGenerator:
    torch.manual_seed(0)
    given: dict[str, Any] = {"tokens": 6, "codes": 10, "classes": 3, "width": 16, "layers": 2, "heads": 2}
    return MaskedGenerator(**(given | changes)).eval()


class Fixed(nn.Module):
    """Logits by class, the same for whatever ids, and a note of every call."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.calls = logits, list[tuple[Tensor, Tensor]]()

    def forward(self, ids: Tensor, label: Tensor) -> Tensor:
        self.calls.append((ids.clone(), label.clone()))
        return self.logits[label]


def with_logits(monkeypatch: pytest.MonkeyPatch, logits: Tensor) -> tuple[MaskedGenerator, Fixed]:
    generator, fixed = small(), Fixed(logits)
    monkeypatch.setattr(MaskedGenerator, "forward", lambda self, ids, label: fixed(ids, label))
    return generator, fixed


@pytest.mark.parametrize(
    ("tokens", "steps", "wanted"),
    [(32, 8, [29, 26, 24, 21, 18, 14, 10, 0]), (64, 8, [58, 53, 48, 42, 36, 29, 20, 0]), (5, 5, [4, 3, 2, 1, 0])],
)
def test_schedule(tokens: int, steps: int, wanted: list[int]) -> None:
    assert schedule(tokens, steps) == wanted


def test_schedule_always_gets_on() -> None:
    for tokens, steps in ((128, 64), (256, 16), (256, 256), (7, 7), (9, 1)):
        plan = [tokens, *schedule(tokens, steps)]
        assert len(plan) == steps + 1 and plan[-1] == 0 and all(a > b for a, b in itertools.pairwise(plan))
    with pytest.raises(InputError, match="at most the 7 ids"):
        schedule(7, 8)


@pytest.mark.parametrize("guidance", ["constant", "linear", "power-cosine"])
def test_guidance(monkeypatch: pytest.MonkeyPatch, guidance: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 6, 10)
    generator, fixed = with_logits(monkeypatch, logits)
    sampling = Sampling(steps=4, guidance_scale=2.5, guidance=guidance, power=2.0)
    label, ids = torch.tensor([2, 0]), torch.full((2, 6), 10)
    given, free = logits[label], logits[3]
    for step in range(4):
        found = generator._guided(ids, label, sampling, step)
        if guidance == "power-cosine":
            s = 1.5 * (1 - math.cos(math.pi * (step / 4) ** 2)) / 2 + 1
            wanted = free + s * (given - free)
        else:
            s = 2.5 if guidance == "constant" else 2.5 * step / 4
            wanted = given + s * (given - free)
        torch.testing.assert_close(found, wanted)
    fixed.calls.clear()
    off = Sampling(steps=4, guidance_scale=1.0 if guidance == "power-cosine" else 0.0, guidance=guidance)
    assert torch.equal(generator._guided(ids, label, off, 2), given), "without guidance, the conditional pass alone"
    assert len(fixed.calls) == 1 and torch.equal(fixed.calls[0][1], label)


def test_the_sampler_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes the best id of each place and keeps those with the highest logits, all of it in a loop here."""
    torch.manual_seed(1)
    logits = torch.randn(4, 6, 10)
    generator, fixed = with_logits(monkeypatch, logits)
    sampling, seen = Sampling(steps=3, temperature=0.0, guidance_scale=0.0), list[Tensor]()
    ids = generator.generate(torch.tensor([1, 3]), sampling, on_step=lambda step, now: seen.append(now.clone()))
    for row, label in enumerate((1, 3)):
        best = [(float(one.max()), int(one.argmax()), place) for place, one in enumerate(logits[label])]
        best.sort(reverse=True)
        for step, left in enumerate(schedule(6, 3)):
            shown = {place: code for _, code, place in best[: 6 - left]}
            assert {k: int(v) for k, v in enumerate(seen[step][row]) if v != 10} == shown
    assert torch.equal(ids, seen[-1]) and len(fixed.calls) == 3 and (fixed.calls[0][0] == 10).all()


@pytest.mark.parametrize("anneal", [False, True])
def test_the_sampler_with_noise(monkeypatch: pytest.MonkeyPatch, anneal: bool) -> None:
    torch.manual_seed(2)
    generator, _ = with_logits(monkeypatch, torch.randn(4, 6, 10))
    sampling = Sampling(steps=4, temperature=3.0, guidance_scale=0.0, anneal=anneal)
    seen = list[Tensor]()
    label = torch.arange(4).repeat(8)
    random = torch.Generator().manual_seed(3)
    ids = generator.generate(label, sampling, generator=random, on_step=lambda _, now: seen.append(now.clone()))
    before = torch.full_like(ids, 10)
    for now, left in zip(seen, schedule(6, 4)):
        known = before != 10
        assert torch.equal(now[known], before[known]), "what is known stays"
        assert ((now == 10).sum(1) == left).all()
        before = now
    assert bool(((ids >= 0) & (ids < 10)).all())
    assert torch.equal(ids, generator.generate(label, sampling, generator=random.manual_seed(3)))
    assert not torch.equal(ids, generator.generate(label, sampling, generator=random.manual_seed(4)))


def test_ids_are_drawn_by_gumbel_max(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one place and its first of two steps, noise of strength t draws from softmax(logits / t)."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    torch.manual_seed(0)
    generator = small(tokens=2, codes=4)
    monkeypatch.setattr(MaskedGenerator, "forward", lambda self, ids, label: logits.expand(len(ids), 2, 4))
    seen = list[Tensor]()
    sampling = Sampling(steps=2, temperature=4.0, guidance_scale=0.0, anneal=True)
    generator.generate(torch.zeros(20_000, dtype=torch.long), sampling, on_step=lambda _, now: seen.append(now))
    # One of two equal draws survives by its own logit and noise: weight both draws accordingly, by counting pairs.
    strength, sharper = 4.0 * 0.5, 0.5 + 0.8 * 0.5
    probability = (logits / sharper / strength).softmax(0).double()
    survives = torch.sigmoid((logits[:, None] - logits[None]) / sharper / strength).double()
    wanted = probability * (survives @ probability) * 2
    counts = torch.bincount(seen[0][seen[0] != 4], minlength=4).double()
    expected = wanted / wanted.sum() * counts.sum()
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3, "chi-square, 3 degrees of freedom, p = 0.001"


def test_training_masks() -> None:
    generator = small(tokens=40)
    torch.manual_seed(0)
    masked = generator.draw_mask(4000)
    counts = masked.sum(1)
    assert int(counts.min()) >= 1 and int(counts.max()) == 40
    # The mean of arccos(r) / (pi / 2), r uniform, is 2 / pi.
    assert float(counts.float().mean() / 40) == pytest.approx(2 / math.pi, abs=0.01)
    torch.manual_seed(0)
    share = torch.arccos(torch.rand(4000)) * 2 / math.pi
    assert torch.equal(counts, (40 * share).round().clamp(min=1).long())
    assert float(masked.float().mean(0).std()) < 0.02, "every place alike"


def test_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 6, 10)
    generator, fixed = with_logits(monkeypatch, logits)
    ids, label = torch.randint(10, (3, 6)), torch.tensor([0, 2, 1])
    masked = torch.tensor([[1, 1, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    loss, parts = generator.loss(ids, label, masked)
    total = weights = right = 0.0
    for b in range(3):
        for n in range(6):
            log_p = logits[label[b], n].log_softmax(0)
            each = -(0.9 * log_p[ids[b, n]] + 0.1 * log_p.mean())
            weight = 1.0 if masked[b, n] else 0.1
            total, weights = total + weight * float(each), weights + weight
            right += bool(masked[b, n]) and int(log_p.argmax()) == int(ids[b, n])
    assert float(loss) == pytest.approx(total / weights, rel=1e-5)
    assert float(parts["accuracy"]) == pytest.approx(right / 10) and float(parts["masked"]) == pytest.approx(10 / 18)
    assert torch.equal(fixed.calls[0][0], ids.masked_fill(masked, 10)) and torch.equal(fixed.calls[0][1], label)
    generator.train()
    for _ in range(40):
        generator.loss(ids.repeat(50, 1), label.repeat(50))
    dropped = torch.cat([labels != label.repeat(50) for _, labels in fixed.calls[1:]])
    assert all(set(labels.tolist()) <= {0, 1, 2, 3} for _, labels in fixed.calls)
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.015), "6000 draws"


def test_words_and_classes() -> None:
    """[class, ids]: the mask is word K, class c word K + 1 + c, and none the last."""
    generator = small()
    words = list[Tensor]()
    embedding = generator.backbone.get_input_embeddings()  # type: ignore[operator]
    embedding.register_forward_pre_hook(lambda _, given: words.append(given[0]))
    assert embedding.num_embeddings == 10 + 3 + 2
    generator(torch.tensor([[0, 9, 10, 1, 2, 3]]), torch.tensor([2]))
    generator(torch.tensor([[0, 9, 10, 1, 2, 3]]), torch.tensor([3]))
    assert words[0].tolist() == [[13, 0, 9, 10, 1, 2, 3]] and words[1][0, 0] == 14


@pytest.mark.parametrize("backbone", ["bert", "uvit"])
def test_every_place_sees_every_other(backbone: str) -> None:
    generator = small(backbone=backbone)
    ids, label = torch.randint(10, (1, 6)), torch.tensor([1])
    before = generator(ids, label)
    assert before.shape == (1, 6, 10)
    for place in (0, 5):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % 10
        assert ((generator(other, label) - before).abs().amax(2) > 0).all()
    assert ((generator(ids, torch.tensor([2])) - before).abs().amax(2) > 0).all()
    generator.train().loss(ids, label)[0].backward()
    assert all(weight.grad is not None for weight in generator.parameters())


def test_long_skips() -> None:
    """The u-shaped backbone, block by block, with its weights."""
    generator = small(backbone="uvit", layers=4)
    net: Any = generator.backbone
    ids, label = torch.randint(11, (2, 6)), torch.tensor([0, 3])
    words = torch.cat([label[:, None] + 11, ids], 1)
    x = F.embedding(words, net.words.weight) + net.positions

    def block(k: int, x: Tensor) -> Tensor:
        one = net.blocks[k]
        h = F.layer_norm(x, (16,), one.norm1.weight, one.norm1.bias)
        q, k_, v = (h @ one.attn.qkv.weight.T).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = ((q @ k_.transpose(2, 3) / 8**0.5).softmax(3) @ v).transpose(1, 2).flatten(2)
        x = x + out @ one.attn.proj.weight.T + one.attn.proj.bias
        h = F.layer_norm(x, (16,), one.norm2.weight, one.norm2.bias)
        h = F.gelu(h @ one.mlp.fc1.weight.T + one.mlp.fc1.bias)
        return x + h @ one.mlp.fc2.weight.T + one.mlp.fc2.bias

    first = block(0, x)
    second = block(1, first)
    x = block(2, second)
    for k, skip, kept in ((3, net.skips[0], second), (4, net.skips[1], first)):
        x = block(k, x @ skip.weight[:, :16].T + kept @ skip.weight[:, 16:].T + skip.bias)
    x = F.layer_norm(x, (16,), net.norm.weight, net.norm.bias)
    torch.testing.assert_close(generator(ids, label), F.linear(x, generator.head.weight, generator.head.bias)[:, 1:])


def test_round_trip(tmp_path: Any) -> None:
    generator = small()
    generator.save_pretrained(tmp_path)
    again = MaskedGenerator.from_pretrained(tmp_path).eval()
    ids, label = torch.randint(10, (1, 6)), torch.tensor([1])
    assert torch.equal(again(ids, label), generator(ids, label))


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"tokens": 0}, "tokens"), ({"codes": 1}, "codes"), ({"classes": 0}, "classes"),
        ({"backbone": "gpt"}, "backbone"),
        ({"width": 15}, "multiple of heads"), ({"layers": 0}, "layers"), ({"dropout": 1.0}, "dropout"),
        ({"drop_class": -0.1}, "drop_class"), ({"smoothing": 1.0}, "smoothing"), ({"unmasked_weight": 2.0}, "unmasked"),
        ({"backbone": "uvit", "layers": 3}, "even"),
    ],
)  # fmt: skip
def test_bad_arguments(bad: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        small(**bad)


def test_bad_input() -> None:
    generator = small()
    for name, wrong in (
        ("steps", 0), ("temperature", -1.0), ("guidance_scale", -1.0), ("guidance", "some"), ("power", 0.0),
    ):  # fmt: skip
        with pytest.raises(InputError, match=name):
            Sampling(**{name: wrong})  # type: ignore[arg-type]
    for label in (torch.tensor([4]), torch.tensor([-1]), torch.tensor([0.5]), torch.tensor(0)):
        with pytest.raises(InputError, match="label must be"):
            generator.generate(label, Sampling(steps=2))
    with pytest.raises(InputError, match="ids and label"):
        generator(torch.zeros(1, 5, dtype=torch.long), torch.tensor([0]))
    with pytest.raises(InputError, match="at most the 6 ids"):
        generator.generate(torch.tensor([0]), Sampling(steps=7))
