"""DToP against loops over single pictures and tokens, timm's own blocks and closed forms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("timm")

from foveate.method import InputError
from foveate.methods.reduce.dtop import AtmHead, Dtop, atm_loss
from tiny import shake

OPTIONS: dict[str, Any] = {
    "img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "class_token": False,
    "global_pool": "avg",
}  # fmt: skip


def model(**changes: Any) -> Dtop:
    """36 patches, 3 stages, 6 classes."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "backbone": "deit_tiny_patch16_224", "options": OPTIONS, "exits": (2, 3, 4), "classes": 6, "width": 16,
        "heads": 2, "decoder_layers": 2, "context": 1, "stride": 16,
    } | changes  # fmt: skip
    made = Dtop(**settings)
    shake(made)
    if made.head == "atm":
        for decoder in made.decoders:
            # Some presences near 1, so that something is clear.
            nn.init.normal_(decoder.presence.weight, std=1.0)
    return made.eval()


def pictures(count: int = 3, seed: int = 3) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def by_hand(made: Dtop, picture: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor], list[list[int]], Tensor | None]:
    """One picture (3, H, W), dropping for real and token by token: the last tokens by place, the mask logits of every
    place, who was active at each head, and the last head's presence."""
    host = made.backbone
    x = host._pos_embed(host.patch_embed(picture.unsqueeze(0)))
    active, canvas, history, first = list(range(36)), {}, [], 0
    presence = None
    for stage, end in enumerate(made.exits):
        for block in host.blocks[first:end]:
            x = block(x) if active else x
        first = end
        history.append(list(active))
        mask, presence = made.decoders[stage](x, None) if active else (x.new_zeros(1, 6, 0), presence)
        for column, place in enumerate(active):
            canvas[place] = mask[0, :, column]
        if stage < len(made.exits) - 1:
            score = made.score(mask, presence)[0]
            clear: dict[int, list[tuple[float, int]]] = {}
            for column in range(len(active)):
                v, label = float(score[:, column].max()), int(score[:, column].argmax())
                if v > made.confidence:
                    clear.setdefault(label, []).append((-v, column))
            goes = {column for some in clear.values() for _, column in sorted(some)[made.context :]}
            x = x[:, [c for c in range(len(active)) if c not in goes]]
            active = [place for c, place in enumerate(active) if c not in goes]
    return {place: x[0, c] for c, place in enumerate(active)}, canvas, history, presence


@pytest.mark.parametrize("head", ["atm", "linear"])
@torch.no_grad()
def test_each_picture_is_what_loops_compute(head: str) -> None:
    made = model(head=head)
    made.set_exits(confidence=0.35 if head == "linear" else 0.6)
    said, features = made.stages(pictures()), made.forward_features(pictures())
    kinds = set()
    for b, picture in enumerate(pictures()):
        tokens, canvas, history, presence = by_hand(made, picture)
        for place in range(36):
            torch.testing.assert_close(said.masks[-1][b, :, place], canvas[place], rtol=1e-3, atol=1e-4)
            last = max(stage for stage, active in enumerate(history) if place in active)
            assert int(said.finished[b, place]) == last
            kinds.add(last)
            wanted = tokens.get(place, torch.zeros(32))
            torch.testing.assert_close(features[b, place], wanted, rtol=1e-3, atol=1e-4)
        if presence is not None:
            assert said.presences[-1] is not None
            torch.testing.assert_close(said.presences[-1][b], presence[0], rtol=1e-3, atol=1e-4)
    assert kinds == {0, 1, 2}, "the test needs tokens that finish at every head"


@torch.no_grad()
def test_a_confidence_of_one_is_the_plain_network() -> None:
    for confidence in (1.0, math.inf):
        made = model(confidence=confidence)
        x = made.backbone._pos_embed(made.backbone.patch_embed(pictures()))
        for block in made.backbone.blocks:
            x = block(x)
        assert torch.equal(made.forward_features(pictures()), x)
        mask, presence = made.decoders[-1](x, None)
        low = (presence.softmax(-1)[..., :1] * mask.sigmoid()).view(3, 6, 6, 6)
        wanted = F.interpolate(low, scale_factor=4, mode="bilinear", align_corners=False)
        torch.testing.assert_close(made(pictures()), wanted)
        assert (made.stages(pictures()).finished == 2).all()


@torch.no_grad()
def test_who_finishes_stays_finished_and_keeps_its_scores() -> None:
    said = model(confidence=0.6).stages(pictures())
    for stage in range(2):
        gone = said.finished <= stage
        assert gone.any()
        for b, place in gone.nonzero().tolist():
            for later in range(int(said.finished[b, place]), 3):
                own = said.masks[int(said.finished[b, place])]
                assert torch.equal(said.masks[later][b, :, place], own[b, :, place])
            for later in range(int(said.finished[b, place]) + 1, 3):
                assert (said.tokens[later][b, place] == 0).all()
    active = [(said.finished >= stage).sum(1) for stage in range(3)]
    assert (active[0] >= active[1]).all() and (active[1] >= active[2]).all()
    scores = model(confidence=0.6)(pictures())
    assert scores.shape == (3, 6, 24, 24) and scores.isfinite().all()


@torch.no_grad()
def test_the_rule() -> None:
    made = model(confidence=0.5, context=2)
    score = torch.zeros(1, 6, 8)
    #        class 0: three clear, one on the limit; class 1: two clear; class 2: one not clear; one not active any more
    for place, (label, value) in enumerate(
        [(0, 0.9), (1, 0.6), (0, 0.7), (0, 0.8), (1, 0.9), (0, 0.5), (2, 0.4), (0, 1.0)]
    ):
        score[0, label, place] = value
    active = torch.tensor([[True] * 7 + [False]])
    assert made.clear(score, active).nonzero()[:, 1].tolist() == [2]
    assert made.set_exits(context=0).clear(score, active).nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4]
    assert not made.set_exits(context=8).clear(score, active).any()
    assert made.set_exits(context=1).clear(score, active).nonzero()[:, 1].tolist() == [1, 2, 3]
    # Of equal ones the first stay.
    assert made.clear(torch.full((1, 6, 4), 0.7), torch.ones(1, 4, dtype=torch.bool)).tolist() == [[0, 1, 1, 1]]


@torch.no_grad()
def test_at_least_the_context_of_each_class_stays() -> None:
    made = model(confidence=0.6, context=3)
    said = made.stages(pictures())
    active = torch.ones(3, 36, dtype=torch.bool)
    for stage in range(2):
        best, label = made.score(said.masks[stage], said.presences[stage]).max(1)
        after = said.finished > stage
        for b in range(3):
            for c in range(6):
                candidates = active[b] & (best[b] > 0.6) & (label[b] == c)
                assert int((candidates & after[b]).sum()) == min(3, int(candidates.sum()))
        active = after


@torch.no_grad()
def test_lower_confidence_finishes_more() -> None:
    counts = []
    for confidence in (0.0, 0.4, 0.6, 0.8, 1.0):
        counts.append(int((model(confidence=confidence).stages(pictures()).finished == 0).sum()))
    assert counts == sorted(counts, reverse=True) and counts[0] == 3 * 36 - sum(present_classes()) and counts[-1] == 0
    assert (model(confidence=0.0, context=36).stages(pictures()).finished == 2).all()


@torch.no_grad()
def present_classes() -> list[int]:
    """How many classes each picture's tokens have at the first head: with context 1 as many stay."""
    made = model(confidence=1.0)
    said = made.stages(pictures())
    return [len(row.unique()) for row in made.score(said.masks[0], said.presences[0]).argmax(1)]


@pytest.mark.parametrize("head", ["atm", "linear"])
def test_all_tokens_finished(head: str) -> None:
    made = model(confidence=0.0, context=0, head=head)
    said = made.stages(pictures())
    assert (said.finished == 0).all() and (said.tokens[-1] == 0).all()
    assert torch.equal(said.masks[0], said.masks[-1])
    loss, _ = made.train().loss(pictures(), torch.randint(0, 6, (3, 6, 6)))
    loss.backward()
    grads = [weight.grad for weight in made.parameters() if weight.grad is not None]
    assert loss.isfinite() and all(one.isfinite().all() for one in grads)
    assert made.eval()(pictures()).isfinite().all()


@torch.no_grad()
def test_a_class_token_of_the_backbone_stays() -> None:
    made = model(options=OPTIONS | {"class_token": True, "global_pool": "token"}, confidence=0.0, context=0)
    assert made.stages(pictures()).masks[-1].shape == (3, 6, 36)
    made.set_exits(confidence=0.6)
    together = made(pictures())
    for b in range(3):
        torch.testing.assert_close(made(pictures()[b : b + 1])[0], together[b], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_head_is_transformers_decoder_layer_but_for_its_masks() -> None:
    torch.manual_seed(0)
    head = AtmHead(32, 6, width=16, heads=2, layers=2).eval()
    tokens = torch.randn(2, 9, 32)
    queries, memory = head.queries.expand(2, -1, -1), head.norm(head.reduce(tokens))
    wanted: Any = None
    for ours in head.layers:
        layer: Any = ours
        other = nn.TransformerDecoderLayer(16, 2, 64, batch_first=True).eval()
        state = {f"self_attn.{name}": weight for name, weight in layer.among.state_dict().items()}
        for kind in ("weight", "bias"):
            parts = [getattr(one, kind) for one in (layer.query, layer.key, layer.value)]
            state[f"multihead_attn.in_proj_{kind}"] = torch.cat(parts)
            state[f"multihead_attn.out_proj.{kind}"] = getattr(layer.out, kind)
            state[f"linear1.{kind}"], state[f"linear2.{kind}"] = (getattr(layer.mlp[i], kind) for i in (0, 3))
            state |= {f"norm{i + 1}.{kind}": getattr(layer.norms[i], kind) for i in range(3)}
        other.load_state_dict(state)
        before = other.norm1(queries + other.self_attn(queries, queries, queries)[0])
        q, k = (one(x).view(2, -1, 2, 8) for one, x in ((layer.query, before), (layer.key, memory)))
        wanted = torch.einsum("bqhd,bnhd->bhqn", q, k).mul(8**-0.5).mean(1)
        queries = other(queries, memory)
    mask, presence = head(tokens, None)
    torch.testing.assert_close(mask, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(presence, head.presence(queries), rtol=1e-4, atol=1e-5)


def test_the_loss() -> None:
    logits, presence = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 2)
    labels = torch.randint(0, 3, (2, 3, 3))
    labels[0, 0, 0] = 255
    parts = atm_loss(logits, presence, labels, 255)
    focal, dice, entropy, weights, masks = 0.0, 0.0, 0.0, 0.0, 0
    for b in range(2):
        known = [(y, x) for y in range(3) for x in range(3) if int(labels[b, y, x]) != 255]
        for c in range(4):
            there = any(int(labels[b, y, x]) == c for y, x in known)
            weight = 1.0 if there else 0.1
            entropy -= weight * float(presence[b, c].log_softmax(0)[0 if there else 1])
            weights += weight
            if not there:
                continue
            masks += 1
            some, inside, both, total = 0.0, 0.0, 0.0, 0.0
            for y, x in known:
                p, t = float(logits[b, c, y, x].sigmoid()), float(labels[b, y, x] == c)
                q = p if t else 1 - p
                some -= (0.25 if t else 0.75) * (1 - q) ** 2 * math.log(q)
                both, inside, total = both + p * t, inside + p, total + t
            focal += some / len(known)
            dice += 1 - (2 * both + 1) / (inside + total + 1)
    assert float(parts["focal"]) == pytest.approx(focal / masks, rel=1e-4)
    assert float(parts["dice"]) == pytest.approx(dice / masks, rel=1e-4)
    assert float(parts["presence"]) == pytest.approx(entropy / weights, rel=1e-4)
    made = model(dropout=0.0).train().set_exits(confidence=0.6)
    target = torch.randint(0, 6, (3, 6, 6))
    loss, last = made.loss(pictures(), target)
    said, total = made.stages(pictures()), 0.0
    for mask, there in zip(said.masks, said.presences):
        assert there is not None
        each = atm_loss(mask.view(3, 6, 6, 6), there, target, 255)
        total += float((20 * each["focal"] + each["dice"] + each["presence"]).detach())
    assert float(loss.detach()) == pytest.approx(total, rel=1e-4)
    assert float(last["active"]) == pytest.approx(float((said.finished == 2).float().mean()))
    loss.backward()
    # The last layer's keys have biases that move all logits of a query alike; everything else learns.
    idle = [name for name, weight in made.named_parameters() if weight.grad is None]
    assert idle == []


@torch.no_grad()
def test_larger_pictures_by_windows() -> None:
    made = model(confidence=0.6)
    picture = torch.randn(1, 3, 24, 44)
    total, seen = torch.zeros(6, 24, 44), torch.zeros(44)
    for left in (0, 16, 20):
        total[..., left : left + 24] += made(picture[..., left : left + 24])[0]
        seen[left : left + 24] += 1
    torch.testing.assert_close(made.slide(picture)[0], total / seen)
    torch.testing.assert_close(made.slide(pictures()), made(pictures()))
    with pytest.raises(InputError, match="larger ones"):
        made(picture)
    with pytest.raises(InputError, match="at least 24 x 24"):
        made.slide(picture[:, :, :20])


@torch.no_grad()
def test_weights_load_and_come_back(tmp_path: Path) -> None:
    import timm

    made = model(confidence=0.7)
    made.save_pretrained(tmp_path)
    again = Dtop.from_pretrained(tmp_path).eval()
    assert again.confidence == 0.7 and torch.equal(again(pictures()), made(pictures()))
    plain = {name: OPTIONS[name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    other = shake(timm.create_model("deit_tiny_patch16_224", **plain), seed=5)
    assert made.load_backbone(other) == []
    assert torch.equal(made.backbone.pos_embed, other.pos_embed[:, 1:])
    assert torch.equal(made.backbone.blocks[3].mlp.fc1.weight, other.blocks[3].mlp.fc1.weight)
    half = made.bfloat16()(pictures().bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"exits": (2, 3)}, "exits"), ({"exits": (3, 2, 4)}, "exits"), ({"exits": 4}, "exits"),
        ({"confidence": -0.1}, "confidence"), ({"context": -1}, "context"), ({"classes": 0}, "classes"),
        ({"head": "mask"}, "head"), ({"heads": 3}, "heads"), ({"decoder_layers": 0}, "decoder_layers"),
        ({"dropout": 1.0}, "dropout"), ({"stride": 0}, "stride"), ({"backbone": "resnet18"}, "backbone"),
    ],
)  # fmt: skip
def test_nonsense_is_named(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=name):
        model(**changes)
    with pytest.raises(InputError, match="did you mean"):
        Dtop.named("vit-b-ade")
