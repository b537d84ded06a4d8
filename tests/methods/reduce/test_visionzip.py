"""VisionZip against slow loops and the eager vision tower."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import foveate
from foveate.method import HostShape, InputError
from foveate.methods.reduce.visionzip import VisionZip
from foveate.tokens import Tokens
from reference import eager_vision, top
from stub import numbered, plain_attention, stage
from tiny import prompt, vision, vlm


def members(score: Tensor, keys: Tensor, dominant: int, contextual: int) -> list[list[int]]:
    """For one sample: the patches of each new token, in the order of the new tokens."""
    best = top(score, dominant)
    rest = [j for j in range(len(score)) if j not in best]
    targets = [rest[i * len(rest) // contextual] for i in range(contextual)]
    unit = [one / one.norm() for one in keys.double()]
    groups = {t: [t] for t in targets}
    for j in rest:
        if j not in targets:
            groups[max(targets, key=lambda t: float(unit[j] @ unit[t]))].append(j)
    return [*([j] for j in best), *groups.values()]


def zipped(x: Tensor, score: Tensor, keys: Tensor, **settings: float) -> Tokens:
    tokens = Tokens.from_grid(x, (1, x.shape[1]))
    return VisionZip(**settings).zip(tokens, stage(tokens, (1, x.shape[1]), cls={22: score}, keys={22: keys}))


@pytest.mark.parametrize(
    ("count", "left", "contextual", "dominant"),
    [(16, 8, 0.25, 6), (16, 11, 0.3, 8), (16, 15, 0.2, 12), (17, 5, 0.8, 1), (64, 13, 10 / 64, 11), (9, 3, 0.99, 1)],
)
def test_zipping_equals_the_slow_loop(count: int, left: int, contextual: float, dominant: int) -> None:
    x, score, keys = torch.randn(3, count, 5), torch.rand(3, count), torch.randn(3, count, 4)
    ours = zipped(x, score, keys, tokens=left, contextual=contextual)
    assert ours.x.shape[1] == left
    for b in range(3):
        expected = members(score[b], keys[b], dominant, left - dominant)
        for j, group in enumerate(expected):
            assert (ours.source[b] == j).nonzero().flatten().tolist() == sorted(group)
            torch.testing.assert_close(ours.x[b, j], sum(x[b, m] for m in group) / len(group))
    assert (ours.source >= 0).all(), "every patch is in some token"
    assert torch.equal(ours.size.sum(1), torch.full((3,), count))


def test_dominant_tokens_are_bit_for_bit_what_they_were() -> None:
    x, score = torch.randn(1, 16, 5), torch.rand(1, 16)
    ours = zipped(x, score, torch.randn(1, 16, 4), tokens=8, contextual=0.25)
    assert torch.equal(ours.x[0, :6], x[0, top(score[0], 6)])


def test_equal_keys_still_make_as_many_contextual_tokens() -> None:
    """All similarities are ties: no target may join another."""
    ours = zipped(torch.randn(2, 16, 5), torch.rand(2, 16), torch.ones(2, 16, 4), tokens=8, contextual=0.5)
    assert ours.x.shape[1] == 8 and (ours.size > 0).all()


def test_without_contextual_tokens_the_rest_is_dropped() -> None:
    x, score = torch.randn(2, 16, 5), torch.rand(2, 16)
    ours = zipped(x, score, torch.randn(2, 16, 4), tokens=5, contextual=0.0)
    for b in range(2):
        assert torch.equal(ours.x[b], x[b, top(score[b], 5)])
        assert int((ours.source[b] < 0).sum()) == 11


def test_splits_of_the_paper() -> None:
    """162 + 30, 108 + 20 and 54 + 10 of CLIP's 576."""
    for left, expected in ((192, (162, 30)), (128, (108, 20)), (64, (54, 10))):
        assert VisionZip(tokens=left).split(576) == expected == VisionZip(keep=left / 576).split(576)
    assert VisionZip().split(576) == (54, 10)
    assert VisionZip().split(1) == VisionZip(tokens=9).split(1) == (1, 0)


@torch.no_grad()
def test_a_real_host_uses_its_feature_layers_attention_and_keys() -> None:
    """The language model sees the dominant ones first, then the contextual ones, projected after merging."""
    host = vlm()
    given = prompt(host, [(2, 5), (1, 4)])
    tower, keys = host.model.vision_tower, []
    handle = tower.encoder.layers[3].self_attn.k_proj.register_forward_hook(lambda m, a, out: keys.append(out))
    features = tower(given["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    handle.remove()
    score = eager_vision(host, given["pixel_values"]).attentions[3].mean(1)[:, 0, 1:]
    seen: list[Tensor] = []
    with foveate.apply(host, VisionZip(keep=0.5, contextual=0.25)) as applied:
        handle = host.model.language_model.layers[0].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        host(**given)
        handle.remove()
    assert [(one.stage, one.tokens_out) for one in applied.trace] == [("vision.output", (8, 8)), ("llm.input", (8, 8))]
    for b, place in ((0, 2), (1, 3)):  # two tokens of padding and one of text are before the second picture
        groups = members(score[b], keys[0][b, 1:], 6, 2)
        expected = host.model.multi_modal_projector(torch.stack([features[b, group].mean(0) for group in groups]))
        torch.testing.assert_close(seen[0][b, place : place + 8], expected, rtol=1e-4, atol=1e-4)


def test_without_a_class_token_it_is_the_attention_that_patches_receive() -> None:
    attention = plain_attention(2, 4, 16, prefix=0)
    weights = (attention.query @ attention.key.transpose(-1, -2) * attention.scaling).softmax(-1)
    x, keys = torch.randn(2, 16, 5), torch.randn(2, 16, 4)
    tokens = Tokens.from_grid(x, (4, 4))
    bare = HostShape("hf-vlm", (), 24, 22, 0, (4, 4), 32, class_token=False)
    at = stage(tokens, host=bare, keys={22: keys})
    at.signals.received = lambda layer: {22: attention.received()}[layer]  # type: ignore[method-assign]
    ours = VisionZip(tokens=8, contextual=0.25).zip(tokens, at)
    for b in range(2):
        for j, group in enumerate(members(weights[b].mean((0, 1)), keys[b], 6, 2)):
            assert (ours.source[b] == j).nonzero().flatten().tolist() == sorted(group)


@pytest.mark.parametrize("name", ["siglip", "dinov2-reg", "timm", "timm-reg-avg"])
@torch.no_grad()
def test_encoders_alone(name: str) -> None:
    model = vision(name)
    with foveate.apply(model, VisionZip(keep=0.5, contextual=0.25)) as applied:
        model(torch.randn(2, 3, 16, 16))
    assert [(one.stage, one.tokens_out) for one in applied.trace] == [("vision.output", (8, 8))]


def test_different_numbers_are_refused() -> None:
    tokens = numbered(2).keep(torch.tensor([[0, 1, 2], [3, 4, -1]]))
    with pytest.raises(InputError, match="another method dropped some before"):
        VisionZip(keep=0.5).zip(tokens, replace(stage(tokens), entered=torch.tensor([16, 16])))
