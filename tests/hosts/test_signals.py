"""Signals against the attention that the models' eager implementation returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_vision import blocks, prefix
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import foveate
from foveate.method import InputError, Method, Stage
from foveate.nn import attention as attention_module
from foveate.tokens import Tokens
from tiny import IMAGE, TIMM, VISION, pixels, probe, prompt, single, vision, vlm


def asking(stage: str, ask: Any, *, layer: int = -1, reads: tuple[str, ...] = ()) -> tuple[Method, list[Any]]:
    """A method that keeps everything and notes what `ask(at)` returns."""
    answers: list[Any] = []

    def note(tokens: Tokens, at: Stage) -> Tensor:
        answers.append(ask(at))
        return tokens.mask()

    return probe(stage, note, layer=layer, reads=reads, slug="asking"), answers


@torch.no_grad()
def eager(model: Any, **inputs: Tensor) -> tuple[Tensor, ...]:
    """(B, H, S, S) of each layer."""
    model.set_attn_implementation("eager")
    attentions: tuple[Tensor, ...] = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return attentions


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("host", [name for name in VISION if not name.endswith("head")])
@pytest.mark.parametrize("layer", (0, 3))
def test_signals_of_encoders(host: str, layer: int) -> None:
    model, images, first = vision(host), pixels(2), prefix(host)
    full = eager(model, pixel_values=images)[layer]
    keys: list[Tensor] = []
    projection = next(
        module for name, module in blocks(model)[layer].named_modules() if name.split(".")[-1] in ("k_proj", "key")
    )
    projection.register_forward_hook(lambda module, args, output: keys.append(output))

    def ask(at: Stage) -> dict[str, Any]:
        attention = at.signals.attention(layer)
        index = torch.tensor([[1, 3], [0, 2]])
        return {
            "received": attention.received(),
            "some": attention.received(torch.arange(attention.length).expand(2, -1) >= first),
            "rows": attention.rows(index),
            "keys": at.signals.keys(layer),
            "class": at.signals.cls_attention(layer) if first else None,
            "grid": at.signals.grid(),
        }

    method, answers = asking("vision.output", ask, reads=(f"vision.attention[{layer}]",))
    with foveate.apply(model, method), torch.no_grad():
        model(pixel_values=images)
        if not first:
            with pytest.raises(InputError, match="no class token"):
                wrong, _ = asking("vision.output", lambda at: at.signals.cls_attention(0))
                method.act = wrong.act  # type: ignore[attr-defined]
                model(pixel_values=images)
    got = answers[0]
    assert close(got["received"], full.mean((1, 2)))
    assert close(got["some"], full[:, :, first:].mean((1, 2)))
    assert close(got["rows"][0], full[0][:, [1, 3]]) and close(got["rows"][1], full[1][:, [0, 2]])
    assert close(got["keys"], keys[0][:, first:])
    if first:
        assert close(got["class"], full[:, :, 0, first:].mean(1))
    assert got["grid"] == (4, 4)


@pytest.mark.parametrize("host", TIMM)
def test_signals_of_timm(host: str) -> None:
    model, images, first = vision(host), pixels(2), prefix(host)
    entered: list[Tensor] = []
    block: Any = blocks(model)[2]
    block.attn.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    method, answers = asking(
        "vision.output", lambda at: (at.signals.cls_attention(2), at.signals.keys(2)), reads=("vision.attention[2]",)
    )
    with foveate.apply(model, method), torch.no_grad():
        model(images)
        query, key, _ = (entered[0] @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, -1)
        heads = [
            (query[..., part] @ key[..., part].transpose(1, 2) / 8**0.5).softmax(-1)
            for part in (slice(8 * head, 8 * head + 8) for head in range(4))
        ]
    assert close(answers[0][0], torch.stack(heads).mean(0)[:, 0, first:])
    assert close(answers[0][1], key[:, first:])


def test_signals_of_encoders_after_drops() -> None:
    """Tokens are dropped before layer 2; what layers 0 and 3 thought of those that are left."""
    model, images = vision("clip"), pixels(2)
    dense = eager(model, pixel_values=images)

    class Both(Method):
        card = probe("vision.layer", lambda tokens, at: tokens.mask()).card

        def reads(self, host: Any) -> tuple[str, ...]:
            return ("vision.attention[0]", "vision.attention[3]")

        @foveate.at("vision.layer")
        def drop(self, tokens: Tokens, at: Stage) -> Tokens:
            return tokens if at.layer != 2 else tokens.keep(torch.tensor([[1, 4, 9], [2, 3, 15]]))

        @foveate.at("vision.output")
        def ask(self, tokens: Tokens, at: Stage) -> Tokens:
            answers.append((at.signals.cls_attention(0), at.signals.cls_attention(3)))
            return tokens

    answers: list[Any] = []
    with foveate.apply(model, Both()):
        short = eager(model, pixel_values=images)
        with torch.no_grad():
            model(pixel_values=images)
    kept = torch.tensor([[1, 4, 9], [2, 3, 15]]) + 1
    for early, late in answers:
        assert close(early, dense[0][:, :, 0].mean(1).gather(1, kept))
        assert close(late, short[3][:, :, 0, 1:].mean(1))


@pytest.mark.parametrize("host", ("clip-llama", "clip-qwen2", "siglip-qwen2", "next"))
@pytest.mark.parametrize("padding", ("left", "right"))
@pytest.mark.parametrize("layer", (0, 2))
def test_signals_of_language_models(host: str, padding: str, layer: int) -> None:
    model = vlm(host)
    inputs = prompt(model, [(2, 5), (0, 3, 6)], padding=padding)
    real, visual = inputs["attention_mask"].bool(), inputs["input_ids"] == IMAGE
    full = eager(model, **inputs)

    def ask(at: Stage) -> dict[str, Any]:
        attention = at.signals.attention(0)
        return {
            "text": at.signals.text_to_vision(at.layer),
            "received": attention.received(),
            "walk": attention.walk(real.float() / real.sum(1, keepdim=True), 3),
            "visual": attention.visual,
            "words": at.signals.text_embeddings(),
            "grid": at.signals.grid(),
        }

    stages = max(layer, 1)
    method, answers = asking("llm.layer", ask, layer=stages, reads=("llm.attention[0]",))
    with foveate.apply(model, method), torch.no_grad():
        model(**inputs)
    got = answers[0]
    words = model.get_input_embeddings()(inputs["input_ids"])
    for b in range(2):
        where = visual[b].nonzero().squeeze(1)
        last = real[b].nonzero().squeeze(1)[-1]
        rows = real[b].nonzero().squeeze(1)
        assert close(got["text"][b, : len(where)], full[stages][b, :, last, where].mean(0))
        assert close(got["received"][b, rows], full[0][b][:, rows][..., rows].mean((0, 1)))
        walked = full[0][b][:, rows][..., rows].matrix_power(3).mean(1)
        assert close(got["walk"][b][:, rows], walked)
        assert torch.equal(got["visual"][b, : len(where)], where)
        text = words[b, real[b] & ~visual[b]]
        assert torch.equal(got["words"][b, : len(text)], text) and not got["words"][b, len(text) :].any()
    assert got["grid"] == (4, 4)


def test_signals_of_language_models_after_drops() -> None:
    model = vlm("clip-qwen2")
    inputs = prompt(model, [(2, 5), (0, 3, 6)])
    answers: list[Any] = []

    class Both(Method):
        card = probe("llm.layer", lambda tokens, at: tokens.mask()).card

        def reads(self, host: Any) -> tuple[str, ...]:
            return ("llm.attention[0]", "llm.attention[2]")

        @foveate.at("llm.layer")
        def act(self, tokens: Tokens, at: Stage) -> Tokens:
            if at.layer == 1:
                every = torch.arange(1, tokens.x.shape[1], 2).expand(len(tokens.x), -1)
                # Sample 0 has fewer tokens than sample 1.
                return tokens.keep(torch.where(every < tokens.count.unsqueeze(1), every, -1))
            if at.layer == 3:
                early, late = at.signals.attention(0), at.signals.attention(2)
                answers.append(
                    (
                        at.signals.text_to_vision(3),
                        early.received().gather(1, early.visual),
                        late.received().gather(1, late.visual),
                    )
                )
            return tokens

    alone = single(model, inputs, 0)
    dense = eager(model, **alone)
    with foveate.apply(model, Both()):
        short = eager(model, **alone)
        answers.clear()
        with torch.no_grad():
            model(**alone)
            model(**inputs)
    where = (alone["input_ids"][0] == IMAGE).nonzero().squeeze(1)
    kept = where[1::2]
    # In the shortened sequence: two words, eight patches, five words.
    place = torch.arange(2, 10)
    for text, early, late in answers:
        assert close(text[0, :8], short[3][0, :, -1, place].mean(0))
        assert close(early[0, :8], dense[0][0].mean((0, 1))[kept])
        assert close(late[0, :8], short[2][0].mean((0, 1))[place])


def test_in_training_the_positions_before_the_answers_ask() -> None:
    model = vlm()
    inputs = prompt(model, [(2, 9), (3, 6)], padding="right")
    labels = torch.full_like(inputs["input_ids"], -100)
    # Two answers in the first sample: words 2..3 and 6..8 after its picture; one in the second.
    spans = {0: [(20, 22), (24, 27)], 1: [(22, 25)]}
    for b, pieces in spans.items():
        for start, end in pieces:
            labels[b, start:end] = inputs["input_ids"][b, start:end]
    full = eager(model, **inputs)[1]
    method, answers = asking("llm.layer", lambda at: at.signals.text_to_vision(1), layer=1)
    with foveate.apply(model, method), torch.no_grad():
        model(**inputs, labels=labels)
    for b, pieces in spans.items():
        where = (inputs["input_ids"][b] == IMAGE).nonzero().squeeze(1)
        askers = [start - 1 for start, _ in pieces]
        assert close(answers[0][b], full[b].mean(0)[askers][:, where].mean(0))


def test_without_cache_the_signals_are_those_of_the_prompt() -> None:
    model = vlm()
    inputs = prompt(model, [(2, 5), (0, 3, 6)])

    def ask(at: Stage) -> tuple[Tensor, ...]:
        attention = at.signals.attention(0)
        return at.signals.text_embeddings(), at.signals.text_to_vision(1), attention.received()

    method, answers = asking("llm.layer", ask, layer=1, reads=("llm.attention[0]",))
    with foveate.apply(model, method):
        model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=False)
    assert len(answers) == 3
    for later in answers[1:]:
        assert all(close(one, first) for one, first in zip(later, answers[0], strict=True))


def test_signals_of_the_other_half_are_refused() -> None:
    model = vlm()
    inputs = prompt(model, [(2, 5)])
    for stage, layer, ask in (
        ("vision.output", -1, lambda at: at.signals.text_to_vision(0)),
        ("vision.output", -1, lambda at: at.signals.text_embeddings()),
        ("llm.layer", 0, lambda at: at.signals.cls_attention(0)),
        ("llm.layer", 0, lambda at: at.signals.keys(0)),
    ):
        method, _ = asking(stage, ask, layer=layer)
        with foveate.apply(model, method), pytest.raises(InputError):
            model(**inputs)
    method, _ = asking("llm.layer", lambda at: at.signals.attention(0), layer=1)
    with foveate.apply(model, method), pytest.raises(RuntimeError, match=r"Method\.reads"):
        model(**inputs)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation returned, of those whose last two sides are S."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side, self.elements = side, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor) and one.ndim >= 2 and min(one.shape[-2:]) >= self.side:
                self.elements = max(self.elements, one.numel())
        return out


@pytest.mark.parametrize("name", ("fopru", "vtc-cls", "pyramiddrop"))
def test_no_whole_attention_map_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vlm(image=64)
    inputs = prompt(model, [(2, 5)])
    # 257 tokens in the encoder, 263 in the language model. Blocks of 32 rows, as blocks of 500 are at real sizes.
    monkeypatch.setattr(attention_module, "_CHUNK", 4 * 257 * 32)
    with foveate.apply(model, name, keep=0.5), Largest(256) as largest, torch.no_grad():
        model(**inputs)
    assert largest.elements < 4 * 256 * 256
