"""EVAD against loops over single clips and tokens, closed forms, and VideoMAE itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import VideoMAEModel
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

import foveate
from foveate.measure.claims import Checked, count
from foveate.method import HostShape, InputError
from foveate.methods.video import evad_detector as module
from foveate.methods.video.evad import Evad
from foveate.methods.video.evad_detector import EvadDetector, normalised
from tiny import shake, vision
from tiny_video import clips, videomae

SHAPE = HostShape("hf-video", (), 12, 11, 0, (18, 18), slots=8, class_token=False)


def detector(**changes: Any) -> EvadDetector:
    """Clips of 8 frames of 16 px, 4 slots of 4 x 4 patches; drops in layers 1, 2, 3 of 4."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "image": 16, "frames": 8, "patch": 4, "hidden": 32, "layers": 4, "heads": 4, "levels": (0, 1, 2, 3),
        "drop_path": 0.0, "channels": 16, "dynamic": 8, "feedforward": 16, "proposals": 5, "stages": 2,
        "decoder_hidden": 24, "decoder_layers": 2, "decoder_heads": 2, "decoder_drop_path": 0.0, "classifier": 16,
        "classes": 3,
    } | changes  # fmt: skip
    model = EvadDetector(**settings)
    shake(model.backbone)
    torch.nn.init.normal_(model.mask_token)
    return model.eval()


def pixels(count: int = 2, seed: int = 3) -> Tensor:
    return clips(count, seed=seed).transpose(1, 2).contiguous()


def attention_map(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of states x (N, D): the output of the attention block (N, D), and the map (heads, N, N)."""
    normed, inner = layer.layernorm_before(x), layer.attention.attention
    maps, out = [], []
    for h in range(inner.num_attention_heads):
        part = slice(h * inner.attention_head_size, (h + 1) * inner.attention_head_size)
        query, key, value = (one(normed)[:, part] for one in (inner.query, inner.key, inner.value))
        maps.append((query @ key.T / inner.attention_head_size**0.5).softmax(-1))
        out.append(maps[-1] @ value)
    return layer.attention.output(torch.cat(out, 1), None), torch.stack(maps)


def encode_by_hand(
    tower: Any, x: Tensor, frame: int, slots: int, drops: dict[int, float], weight: float = 1.0
) -> tuple[dict[int, Tensor], list[dict[int, Tensor]], list[Tensor]]:
    """Embedded tokens (N, D) in time order of one clip through the layers, dropping as the card says.

    Returns the tokens that are left by their place in time order, with the final norm; the states after each layer;
    and the scores at each drop (of all tokens that were there).
    """
    states = {place: x[place] for place in range(len(x))}
    key = range(slots // 2 * frame, (slots // 2 + 1) * frame)
    history, scores = [], []
    for number, layer in enumerate(tower.encoder.layer):
        places = list(states)
        x = torch.stack(list(states.values()))
        branch, maps = attention_map(layer, x)
        x = x + branch
        if number in drops:
            rows = [weight if place in key else 1.0 for place in places]
            score = [
                sum(float(maps[h, i, j].detach()) * rows[i] for h in range(len(maps)) for i in range(len(places)))
                for j in range(len(places))
            ]
            scores.append(torch.tensor(score))
            room = math.ceil(drops[number] * len(places) - 1e-9) - frame
            others = sorted((j for j, place in enumerate(places) if place not in key), key=lambda j: -score[j])
            stay = sorted([j for j, place in enumerate(places) if place in key] + others[: max(0, room)])
            x, places = x[stay], [places[j] for j in stay]
        x = layer.output(layer.intermediate(layer.layernorm_after(x)), x)
        states = dict(zip(places, x))
        history.append(states)
    final = tower.layernorm(torch.stack(list(states.values()))) if tower.layernorm is not None else x
    return dict(zip(states, final)), history, scores


# -- the method on a host


@pytest.mark.parametrize("weight", [1.0, 3.0])
@torch.no_grad()
def test_a_host_drops_what_the_card_says(weight: float) -> None:
    model, clip = videomae(), clips()
    with foveate.apply(model, "evad", keep=0.6, weight=weight) as applied:
        ours = model(clip).last_hidden_state
    # ceil(0.6 * 64) = 39, then 24, then ceil(14.4) = 15, which is fewer than the keyframe's 16.
    assert [(one.stage, one.tokens_out) for one in applied.trace] == [
        ("vision.mlp[1]", (39, 39)), ("vision.mlp[2]", (24, 24)), ("vision.mlp[3]", (16, 16)),
    ]  # fmt: skip
    for b in range(2):
        x = model.embeddings(clip[b : b + 1], None)[0]
        left, _, _ = encode_by_hand(model, x, 16, 4, {1: 0.6, 2: 0.6, 3: 0.6}, weight)
        places = sorted(left)
        assert [int(applied.trace[-1].source[b, place]) for place in places] == list(range(16))
        torch.testing.assert_close(ours[b], torch.stack([left[p] for p in places]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_ablations_keep_as_many_tokens() -> None:
    model, clip = videomae(), clips()
    sources = {}
    for name, settings in (
        ("paper", {}), ("random", {"select": "random"}), ("other seed", {"select": "random", "seed": 1}),
        ("unprotected", {"protect_keyframe": False}),
    ):  # fmt: skip
        with foveate.apply(model, Evad(keep=0.8, **settings)) as applied:
            model(clip)
        assert [one.tokens_out for one in applied.trace] == [(52, 52), (42, 42), (34, 34)]
        sources[name] = [one.source for one in applied.trace]
    for name, (first, *_, last) in sources.items():
        held = (last[:, 32:48] >= 0).sum(1).tolist()
        assert (held == [16, 16]) == (name != "unprotected"), name
        if name != "unprotected":
            assert first[:, 32:48].min() >= 0
    assert torch.equal(sources["random"][0][0] >= 0, sources["random"][0][1] >= 0)
    assert not torch.equal(sources["random"][0], sources["other seed"][0])
    # Without protection, the best by the same scores: recomputed by hand.
    x = model.embeddings(clip[:1], None)[0]
    _, _, scores = encode_by_hand(model, x, 16, 4, {1: 0.8})
    assert set(scores[0].topk(52).indices.tolist()) == set((sources["unprotected"][0][0] >= 0).nonzero()[:, 0].tolist())


def test_counts() -> None:
    assert Evad().left(2592, 324) == [1815, 1271, 890] and Evad(keep=0.6).left(2592, 324) == [1556, 934, 561]
    for keep in (0.1, 0.3, 0.55, 0.7, 0.9, 1.0):
        for tokens in (4, 10, 64, 100, 199):
            # In exact arithmetic, whatever 0.7 * 10 is in binary.
            exact = -(-round(keep * 100) * tokens // 100)
            assert Evad(keep=keep).after(tokens, 4) == max(4, exact)
            assert Evad(keep=keep, protect_keyframe=False).after(tokens, 4) == max(1, exact)


def test_budgets() -> None:
    for budget in (1.0, 0.9, 0.5, 0.34, 0.2, 0.125):
        made = Evad.for_budget(budget, SHAPE)
        assert isinstance(made, Evad)
        left = made.left(2592, 324)[-1]
        assert left <= budget * 2592 and (left >= budget * 2592 - 3 or left == 324)
    with pytest.raises(InputError, match="keyframe"):
        Evad.for_budget(0.12, SHAPE)


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(InputError, match="clips"):
        foveate.apply(vision("vit"), "evad")
    with pytest.raises(InputError, match="ascend"):
        foveate.apply(videomae(), "evad", layers=(2, 1))
    with pytest.raises(InputError, match="number of slots"):
        EvadDetector.named("tiny", frames=6)
    with pytest.raises(InputError, match="did you mean vit-b"):
        EvadDetector.named("vitb")
    with pytest.raises(InputError, match="clips of 8 frames, not 10"):
        detector()(torch.zeros(1, 3, 10, 16, 16))


# -- the encoder of the whole model


@torch.no_grad()
def test_keeping_everything_is_the_plain_encoder() -> None:
    model, clip = detector(keep=1.0), pixels()
    encoded = model.encode(clip)
    plain = model.backbone(clip.transpose(1, 2)).last_hidden_state
    assert encoded.index.tolist() == [list(range(64))] * 2
    assert encoded.order.tolist() == [*range(32, 48), *range(32), *range(48, 64)]
    torch.testing.assert_close(encoded.tokens, plain[:, encoded.order], rtol=1e-5, atol=1e-5)
    assert torch.equal(encoded.source.sort(1).values, torch.arange(64).expand(2, -1))


@torch.no_grad()
def test_the_encoder_drops_what_the_card_says() -> None:
    model, clip = detector(keep=0.7, weight=4.0), pixels()
    encoded = model.encode(clip)
    assert encoded.index.shape == (2, 23)  # 64 -> 45 -> 32 -> 23
    for b in range(2):
        x = model.backbone.embeddings(clip[b : b + 1].transpose(1, 2), None)[0]
        left, history, _ = encode_by_hand(model.backbone, x, 16, 4, {1: 0.7, 2: 0.7, 3: 0.7}, 4.0)
        places = encoded.order[encoded.index[b]].tolist()
        assert places[:16] == list(range(32, 48)) and sorted(places[16:]) == places[16:]
        assert set(places) == set(left)
        torch.testing.assert_close(encoded.tokens[b], torch.stack([left[p] for p in places]), rtol=1e-4, atol=1e-5)
        for frame, states in zip(encoded.frames, history):
            wanted = torch.stack([states[place] for place in range(32, 48)])
            torch.testing.assert_close(frame[b], wanted, rtol=1e-4, atol=1e-5)
        # The card's idx, into the original sequence of the other slots.
        others = [*range(32), *range(48, 64)]
        assert [others[i] for i in (encoded.index[b, 16:] - 16).tolist()] == places[16:]
        source = encoded.source[b].tolist()
        assert [source[place] for place in places] == list(range(23)) and source.count(-1) == 64 - 23


@torch.no_grad()
def test_few_tokens_are_those_of_the_keyframe() -> None:
    encoded = detector(keep=0.05).encode(pixels())
    assert encoded.index.tolist() == [list(range(16))] * 2


def test_gradients_are_those_of_the_loop() -> None:
    """Only what stays passes gradients on; what was dropped gets some as a key and a value of its last attention."""
    model, clip = detector(keep=0.7), pixels(1).requires_grad_()
    weights = torch.randn(23, 32, generator=torch.Generator().manual_seed(1))
    encoded = model.encode(clip)
    (ours,) = torch.autograd.grad((encoded.tokens[0] * weights).sum(), clip)
    x = model.backbone.embeddings(clip.transpose(1, 2), None)[0]
    left, _, _ = encode_by_hand(model.backbone, x, 16, 4, {1: 0.7, 2: 0.7, 3: 0.7})
    states = torch.stack([left[p] for p in encoded.order[encoded.index[0]].tolist()])
    (wanted,) = torch.autograd.grad((states * weights).sum(), clip)
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-5)
    gone = (encoded.source[0] < 0).nonzero()[:, 0]
    t, y, x_ = int(gone[0]) // 16, int(gone[0]) % 16 // 4, int(gone[0]) % 4
    assert ours[0, :, 2 * t : 2 * t + 2, 4 * y : 4 * y + 4, 4 * x_ : 4 * x_ + 4].abs().sum() > 0


@torch.no_grad()
def test_ablations_of_the_encoder() -> None:
    clip = pixels()
    assert not torch.equal(
        detector(select="random").encode(clip).index, detector(select="attention").encode(clip).index
    )
    drawn = detector(select="random")
    assert torch.equal(drawn.encode(clip).index, drawn.encode(clip).index)
    lots = [drawn.train().encode(clip).index for _ in range(2)]
    assert not torch.equal(*lots) and not torch.equal(lots[0][0], lots[0][1])
    model = detector(protect_keyframe=False, keep=0.5)
    encoded = model.encode(clip)
    assert encoded.index.shape == (2, 8)
    x = model.backbone.embeddings(clip[:1].transpose(1, 2), None)[0]
    states, places = x, list(range(64))
    last = {place: x[place] for place in places}
    for number, layer in enumerate(model.backbone.encoder.layer):
        branch, maps = attention_map(layer, states)
        states = states + branch
        last |= dict(zip(places, states))
        if number:
            stay = maps.sum((0, 1)).topk(math.ceil(len(places) / 2)).indices.sort().values
            states, places = states[stay], [places[j] for j in stay.tolist()]
        states = layer.output(layer.intermediate(layer.layernorm_after(states)), states)
        last |= dict(zip(places, states))
        wanted = torch.stack([last[place] for place in range(32, 48)])
        torch.testing.assert_close(encoded.frames[number][0], wanted, rtol=1e-4, atol=1e-5)
    assert set(encoded.order[encoded.index[0]].tolist()) == set(places)


def test_scores() -> None:
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, 3, 10, 4, generator=generator) for _ in range(3))
    rows = torch.tensor([2.5] * 4 + [1.0] * 6).expand(2, -1)
    out, score = module.attention_and_score(query, key, value, rows)
    weights = (query @ key.transpose(-1, -2) / 2).softmax(-1)
    torch.testing.assert_close(out, weights @ value)
    torch.testing.assert_close(score, (weights * rows[:, None, :, None]).mean((1, 2)))
    order = torch.tensor([0, 1, 2, 3, 9, 5, 7, 4, 6, 8])
    _, permuted = module.attention_and_score(query[:, :, order], key[:, :, order], value[:, :, order], rows)
    torch.testing.assert_close(permuted, score[:, order])
    _, tripled = module.attention_and_score(query, key, value, 3 * rows)
    torch.testing.assert_close(tripled, 3 * score)
    keyframe = torch.arange(10).expand(2, -1) < 4
    assert torch.equal(Evad().chosen(score, keyframe, 7), Evad().chosen(tripled, keyframe, 7))
    chosen = Evad().chosen(score, keyframe, 6, ordered=False)
    for b in range(2):
        best = sorted(range(4, 10), key=lambda j: -float(score[b, j]))[:2]
        assert chosen[b].tolist() == [0, 1, 2, 3, *best]


@pytest.mark.parametrize("chunk", [1, 2 * 10 * 4, 2 * 10 * 10 * 2])
def test_scores_in_blocks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single rows, 4 + 4 + 2 rows of a head, 2 + 1 heads."""
    generator = torch.Generator().manual_seed(2)
    made = [torch.randn(2, 3, 10, 4, generator=generator).requires_grad_() for _ in range(3)]
    query, key, value = made
    rows = torch.rand(2, 10, generator=generator)
    weights = (query @ key.transpose(-1, -2) / 2).softmax(-1)
    wanted = torch.autograd.grad((weights @ value).square().sum(), made, retain_graph=True)
    monkeypatch.setattr(module, "_CHUNK", chunk)
    out, score = module.attention_and_score(query, key, value, rows)
    torch.testing.assert_close(out, weights @ value)
    torch.testing.assert_close(score, (weights * rows[:, None, :, None]).mean((1, 2)).detach())
    assert not score.requires_grad
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), made), wanted)
    _, guided = module.attention_and_score(query, key, value, rows, guided=True)
    torch.testing.assert_close(guided.detach(), score)
    wanted = torch.autograd.grad((weights * rows[:, None, :, None]).mean((1, 2)).square().sum(), made[:2])
    torch.testing.assert_close(torch.autograd.grad(guided.square().sum(), made[:2]), wanted)


# -- positions


def test_position_tables() -> None:
    torch.testing.assert_close(module.sinusoid(50, 12), get_sinusoid_encoding_table(50, 12)[0])
    table = module.sinusoid(32, 6).view(2, 4, 4, 6)
    assert torch.equal(module.resized(table, (2, 4, 4))[0], table.flatten(0, 2))
    ours = module.resized(table, (2, 6, 3)).view(2, 6, 3, 6)

    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    def taps(size: int) -> list[list[tuple[int, float]]]:
        rows = []
        for k in range(size):
            centre = (k + 0.5) * 4 / size - 0.5
            low = math.floor(centre)
            rows.append([(min(max(i, 0), 3), kernel(centre - i)) for i in range(low - 1, low + 3)])
        return rows

    for t in range(2):
        for y, vertical in enumerate(taps(6)):
            for x, horizontal in enumerate(taps(3)):
                wanted = sum(a * b * table[t, i, j] for i, a in vertical for j, b in horizontal)
                torch.testing.assert_close(ours[t, y, x], wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_other_sizes_than_the_table_is_for() -> None:
    model = detector(keep=1.0)
    clip = torch.randn(1, 3, 8, 24, 16, generator=torch.Generator().manual_seed(4))
    encoded = model.encode(clip)
    assert encoded.grid == (4, 6, 4)
    x = model.backbone.embeddings.patch_embeddings.projection(clip).flatten(2).transpose(1, 2)[0]
    x = x + module.resized(model.positions, (4, 6, 4))[0]
    left, _, _ = encode_by_hand(model.backbone, x, 24, 4, {})
    wanted = torch.stack([left[p] for p in encoded.order.tolist()])
    torch.testing.assert_close(encoded.tokens[0], wanted, rtol=1e-4, atol=1e-5)
    # 20 x 13 px are padded to 24 x 16.
    odd = model(F.pad(torch.zeros(1, 3, 8, 20, 13), (0, 0)))
    assert odd.encoded.grid == (4, 6, 4) and odd.size.tolist() == [[20, 13]]


# -- context refinement


def see_decoder(model: EvadDetector, clip: Tensor) -> tuple[Any, Tensor]:
    seen: list[Tensor] = []
    first: Any = model.decoder["layers"][0]  # type: ignore[index]
    handle = first.layernorm_before.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    found = model(clip)
    handle.remove()
    return found, seen[0]


@torch.no_grad()
def test_the_decoder_sees_kept_tokens_at_their_own_places_and_no_mask_tokens() -> None:
    model, clip = detector(keep=0.7), pixels()
    found, seen = see_decoder(model, clip)
    encoded = found.encoded
    assert seen.shape == (2, 23 + 5, 24)
    table = get_sinusoid_encoding_table(64, 24)[0]
    visible = encoded.tokens @ model.decoder["projection"].weight.T  # type: ignore[union-attr]
    volume = model.volume(visible, encoded, table.unsqueeze(0)).flatten(1, 3)
    for b in range(2):
        places = encoded.order[encoded.index[b]].tolist()
        for k, place in enumerate(places):
            torch.testing.assert_close(seen[b, k], visible[b, k] + table[place])
            torch.testing.assert_close(volume[b, place], visible[b, k] + table[place])
        for place in set(range(64)) - set(places):
            assert torch.equal(volume[b, place], model.mask_token[0, 0] + table[place])


@torch.no_grad()
def test_the_released_order_gives_places_in_raster_order_to_tokens_in_score_order() -> None:
    ours, theirs, clip = detector(), detector(released_order=True), pixels()
    plain, released = ours.encode(clip), theirs.encode(clip)
    assert torch.equal(plain.index, released.index)
    assert torch.equal(plain.tokens[:, :16], released.tokens[:, :16]) or torch.allclose(
        plain.tokens[:, :16], released.tokens[:, :16], atol=1e-5
    )
    x = theirs.backbone.embeddings(clip[:1].transpose(1, 2), None)[0]
    left, _, scores = encode_by_hand(theirs.backbone, x, 16, 4, {1: 0.7, 2: 0.7, 3: 0.7})
    # The places that were there at the last drop are those left after the first two.
    before = detector(drops=(1, 2)).encode(clip[:1])
    there = sorted(before.order[before.index[0]].tolist())
    best = sorted((p for p in left if not 32 <= p < 48), key=lambda p: -float(scores[-1][there.index(p)]))
    wanted = torch.stack([left[p] for p in best])
    torch.testing.assert_close(released.tokens[0, 16:], wanted, rtol=1e-4, atol=1e-5)
    assert best != sorted(best)


def test_context_boxes() -> None:
    boxes = torch.tensor([[[10.0, 20, 29, 59], [-3, 5, 70, 52], [0, 0, 4, 4]]])
    size = torch.tensor([[60, 64]])
    same = module.widened(boxes, (0.0, 0.0), size)
    assert same.tolist() == [[[10, 20, 29, 59], [0, 5, 63, 52], [0, 0, 4, 4]]]
    # 20 wide and 40 high with the released code's extra pixel: 4 on each side, 4 above and below.
    wide = module.widened(boxes, (0.4, 0.2), size)
    assert wide[0, 0].tolist() == pytest.approx([6, 16, 33, 59])
    assert wide[0, 2].tolist() == pytest.approx([0, 0, 5, 4.5])


def test_actor_features() -> None:
    """In a volume that is linear in space the greatest bin's centre is known; over slots it is the mean."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    volume = torch.stack([torch.stack([x, y, torch.full_like(x, float(t))], -1) * (t + 1) for t in range(4)])
    box = torch.tensor([[[4.0, 8.0, 25.0, 22.0]]])
    ours = module.actor_features(volume.unsqueeze(0), box, 4)[0, 0]
    # Corners in cells, a cell's value being at its centre; a bin is averaged, so its centre counts.
    right, below = 25 / 4 - 0.5, 22 / 4 - 0.5
    right, below = right - (21 / 4) / 14, below - (14 / 4) / 14
    assert ours.tolist() == pytest.approx([2.5 * right, 2.5 * below, (0 + 2 + 6 + 12) / 4], rel=1e-5)


# -- the whole


@torch.no_grad()
def test_shapes_and_what_is_found() -> None:
    model, clip = detector(), pixels()
    found = model(clip)
    assert found.person.shape == (2, 2, 5, 2) and found.boxes.shape == (2, 2, 5, 4)
    assert found.actions.shape == (1, 2, 5, 3) and model.train()(clip).actions.shape == (2, 2, 5, 3)
    model.eval()
    person = found.person[-1].softmax(-1)[..., 0]
    threshold = float(person[0].sort().values[2])
    results = model.detect(clip, threshold=threshold)
    for b, one in enumerate(results):
        sure = [p for p in range(5) if float(person[b, p]) >= threshold] or list(range(5))
        assert one.score.tolist() == pytest.approx(person[b, sure].tolist())
        torch.testing.assert_close(one.actions, 1 / (1 + (-found.actions[-1, b, sure]).exp()))
        for p, box in zip(sure, one.boxes):
            assert box.tolist() == pytest.approx([min(max(0, float(v)), 16) for v in found.boxes[-1, b, p]], abs=1e-5)
    assert len(results[0].boxes) == 3
    assert [len(one.boxes) for one in model.detect(clip, threshold=1.0)] == [5, 5]
    frames = torch.tensor([0, 255], dtype=torch.uint8)
    assert normalised(frames).tolist() == pytest.approx([-2, 0.55 / 0.225])


def test_the_loss_is_the_mean_of_all_weighted_terms_and_reaches_every_weight() -> None:
    from foveate.nn.sparse_rcnn import match

    model = detector().train()
    found = model(pixels())
    boxes = torch.tensor([[[1.0, 1, 9, 8], [5, 6, 15, 16]], [[2, 3, 7, 14], [0, 0, 0, 0]]])
    labels = torch.zeros(2, 2, 3)
    labels[0, 0, 1] = labels[0, 1, 0] = labels[0, 1, 2] = labels[1, 0, 2] = 1
    present = torch.tensor([[True, True], [True, False]])
    loss, _ = model.loss(found, boxes, labels, present)
    terms = []
    for person, moved in zip(found.person, found.boxes):
        pairs = []
        for b, number in enumerate((2, 1)):
            matched = match(
                person[b : b + 1],
                moved[b : b + 1],
                boxes[b : b + 1],
                torch.arange(2).unsqueeze(0) < number,
                found.size[b : b + 1],
            )
            pairs += [(b, int(p), int(k)) for p, k in zip(matched.proposal, matched.target)]
        chance = person.log_softmax(-1)
        total = weight = l1 = giou = torch.zeros(())
        for b in range(2):
            for p in range(5):
                hit = any((b, p) == pair[:2] for pair in pairs)
                share = 1.0 if hit else 0.1
                total, weight = total - chance[b, p, 0 if hit else 1] * share, weight + share
        for b, p, k in pairs:
            l1 = l1 + ((moved[b, p] - boxes[b, k]) / 16).abs().sum()
            one, other = moved[b, p], boxes[b, k]
            shared = (torch.minimum(one, other)[2:] - torch.maximum(one, other)[:2]).clamp(min=0).prod()
            union = (one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - shared
            hull = (torch.maximum(one, other)[2:] - torch.minimum(one, other)[:2]).prod()
            giou = giou + 1 - (shared / union - (hull - union) / hull)
        terms += [2 * total / weight, 5 * l1 / 3, 2 * giou / 3]
    for logits in found.actions:
        values = [
            -(labels[b, k] * logits[b, p].sigmoid().log() + (1 - labels[b, k]) * (1 - logits[b, p].sigmoid()).log())
            for b, p, k in pairs
        ]
        terms.append(12 * torch.stack(values).mean())
    assert len(terms) == 2 * 3 + 2
    torch.testing.assert_close(loss, sum(terms) / 8, rtol=1e-4, atol=1e-5)
    loss.backward()
    missed = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    # No box here is so large that it is read from the coarsest level.
    assert [name for name in missed if not name.startswith("pyramid.smooth.3")] == []
    nobody = model.loss(model(pixels()), boxes, labels, torch.zeros(2, 2, dtype=torch.bool))[0]
    assert nobody.isfinite()


def test_parameter_groups() -> None:
    model = detector()
    groups = model.groups(1e-3)
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert sorted(names[id(w)] for group in groups for w in group["params"]) == sorted(names.values())
    for group in groups:
        for weight in group["params"]:
            name = names[id(weight)]
            fast = name.split(".")[0] in ("heads", "decoder", "mask_token")
            assert group["lr"] == pytest.approx(8e-3 if fast else 1e-3), name
            assert group["weight_decay"] == (0 if weight.ndim == 1 or name == "mask_token" else 1e-4), name


@torch.no_grad()
def test_saving_and_loading(tmp_path: Path) -> None:
    model, clip = detector(keep=0.5, weight=2.0), pixels(1)
    model.save_pretrained(tmp_path / "whole")
    assert sorted(one.name for one in (tmp_path / "whole").iterdir() if one.suffix != ".md") == [
        "config.json", "model.safetensors"
    ]  # fmt: skip
    again = EvadDetector.from_pretrained(tmp_path / "whole").eval()
    assert again.dropout.keep == 0.5 and torch.equal(again(clip).actions, model(clip).actions)
    for head in (False, True):
        donor = videomae(head=head, seed=5, intermediate_size=128)
        donor.save_pretrained(tmp_path / str(head))
        model.load_backbone(str(tmp_path / str(head)))
        tower: VideoMAEModel = donor.videomae if head else donor
        mine = model.backbone.state_dict()
        assert all(torch.equal(mine[name], weight) for name, weight in tower.state_dict().items())


@torch.no_grad()
def test_padding_and_precision() -> None:
    """Of a picture padded on the right and below, boxes begin as the picture and end in it; bfloat16 works."""
    model = detector()
    clip, size = pixels(1), torch.tensor([[12, 16]])
    padded = F.pad(clip[..., :12, :], (0, 8, 0, 12))
    for layer in (one.regress[-1] for one in model.heads):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    assert model(padded, size).boxes.unique(dim=2).tolist() == [[[[0, 0, 16, 12]]]] * 2
    for layer in (one.regress[-1] for one in model.heads):
        torch.nn.init.normal_(layer.weight, std=3.0)
    boxes = model.detect(padded, size)[0].boxes
    assert boxes[:, 2].max() == 16 and boxes[:, 3].max() == 12
    half = model.to(torch.bfloat16)(clip.to(torch.bfloat16))
    assert half.actions.dtype == torch.bfloat16 and half.actions.isfinite().all() and half.boxes.isfinite().all()


LIGHT = ("ViT-B, dense", "ViT-B, keep 0.7", "ViT-B, keep 0.6, weight 4", "ViT-B, 384 px, keep 0.7", "ViT-L, keep 0.7")


@pytest.mark.parametrize("claim", Evad.claims, ids=lambda claim: claim.what)
def test_claims(claim: Any) -> None:
    if claim.kind == "flops" and claim.what.removeprefix("MACs of ") not in LIGHT:
        pytest.skip("`foveate verify evad` counts it")
    checked = Checked("evad", claim, count(Evad, claim))
    assert checked.holds, f"{checked.ours:,.6g} is not {claim.figure:,.6g}"


def test_multiplications_of_the_tokens_add_up() -> None:
    """The encoder's share by the formula: projections, the MLP behind each drop, and attention at full width."""
    from foveate.measure.flops import count_flops

    with torch.device("meta"):
        model = EvadDetector.named("vit-b", keep=0.7).eval()
    with torch.device("meta"):
        clip = torch.empty(1, 3, 16, 288, 288)
        counted = count_flops(lambda: model.encode(clip)) / 2
    total, tokens = 2592 * 1536 * 768, 2592
    for layer in range(12):
        total += 4 * tokens * 768**2 + 2 * tokens**2 * 768
        if layer in (3, 6, 9):
            total += 12 * tokens**2  # the score
            tokens = math.ceil(0.7 * tokens)
        total += 8 * tokens * 768**2
    assert counted == total


def test_sizes_and_modes_may_alternate() -> None:
    model, small, wide = detector(), pixels(), torch.randn(1, 3, 8, 32, 48)
    with torch.inference_mode():
        model(wide)
    found = model.train()(small)
    (found.person.sum() + found.actions.sum()).backward()
    assert model.backbone.embeddings.patch_embeddings.projection.weight.grad is not None
    model.eval()
    for clip in (wide, small, wide):
        torch.testing.assert_close(model(clip).actions, detector()(clip).actions)
