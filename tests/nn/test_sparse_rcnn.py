"""Sparse R-CNN's parts against loops, closed forms and all assignments."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.nn.sparse_rcnn import (
    DynamicConvolution,
    FeaturePyramid,
    ProposalHead,
    Proposals,
    box_losses,
    look,
    match,
    matching_costs,
    moved,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_pyramid() -> None:
    pyramid = FeaturePyramid(6, 5)
    maps = [noise(2, 6, 4, 2, seed=k) for k in range(4)]
    levels = pyramid(maps)
    assert [tuple(one.shape[2:]) for one in levels] == [(16, 8), (8, 4), (4, 2), (2, 1)]
    sized = [one.repeat_interleave(n, 2).repeat_interleave(n, 3) for n, one in ((4, maps[0]), (2, maps[1]))]
    sized += [maps[2], maps[3][:, :, ::2, ::2]]
    above = None
    for k in (3, 2, 1, 0):
        one, conv = pyramid.lateral[k], pyramid.smooth[k]
        level = torch.einsum("bchw,dc->bdhw", sized[k], one.weight[:, :, 0, 0]) + one.bias[:, None, None]
        above = level if above is None else level + above.repeat_interleave(2, 2).repeat_interleave(2, 3)
        wanted = F.conv2d(F.pad(above, (1, 1, 1, 1)), conv.weight, conv.bias)
        torch.testing.assert_close(levels[k], wanted, rtol=1e-4, atol=1e-5)


def test_learned_boxes_begin_as_the_whole_picture() -> None:
    boxes, features = Proposals(3, 7)(torch.tensor([[20, 50], [8, 4]]))
    assert boxes.tolist() == [[[0, 0, 50, 20]] * 3, [[0, 0, 4, 8]] * 3] and features.shape == (2, 3, 7)


@torch.no_grad()
def test_a_proposal_filters_with_its_own_parameters() -> None:
    layer = DynamicConvolution(4, 3)
    feature, seen = noise(2, 4), noise(2, 49, 4, seed=1)
    ours = layer(feature, seen)
    for n in range(2):
        made = layer.parameters_of(feature[n])
        first, second = made[:12].view(4, 3), made[12:].view(3, 4)
        rows = [F.relu(layer.norm_outer(F.relu(layer.norm_inner(row @ first)) @ second)) for row in seen[n]]
        torch.testing.assert_close(ours[n], F.relu(layer.norm(layer.out(torch.cat(rows)))), rtol=1e-4, atol=1e-5)


def test_boxes_move() -> None:
    boxes = torch.tensor([[10.0, 20, 30, 60]])
    ours = moved(boxes, torch.tensor([[0.5, -1, math.log(2), 0]]))
    assert ours[0].tolist() == pytest.approx([20 + 5 - 20, 40 - 20 - 20, 20 + 5 + 20, 40 - 20 + 20])
    grown = moved(boxes, torch.tensor([[0.0, 0, 99, 0]]))[0]
    assert float(grown[2] - grown[0]) == pytest.approx(20 * 100_000 / 16, rel=1e-5)


def test_looking_reads_the_right_level_and_is_aligned() -> None:
    """Each level holds (x, y, its number), x and y being pixels: a bin's mean is its centre."""
    levels = []
    for number, stride in enumerate((4, 8, 16, 32)):
        centre = (torch.arange(512 // stride) + 0.5) * stride
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        levels.append(torch.stack([x, y, torch.full_like(x, float(number))]).unsqueeze(0))
    boxes = torch.tensor([[[100.0, 120, 156, 176], [100, 120, 156, 177], [50, 50, 162, 162], [40, 40, 300, 300]]])
    seen = look(levels, boxes, 4)
    assert seen.shape == (1, 4, 49, 3)
    for box, bins in zip(boxes[0], seen[0]):
        area = math.sqrt(float((box[2] - box[0]) * (box[3] - box[1])))
        level = min(max(math.floor(4 + math.log2(area / 224) + 1e-6), 2), 5) - 2
        assert bins[:, 2].tolist() == pytest.approx([level] * 49)
        for k in range(49):
            row, column = divmod(k, 7)
            share = torch.tensor([column + 0.5, row + 0.5]) / 7
            wanted = box[:2] + share * (box[2:] - box[:2])
            assert bins[k, :2].tolist() == pytest.approx(wanted.tolist(), abs=1e-2)


@torch.no_grad()
def test_a_head_works_on_each_picture_alone() -> None:
    head = ProposalHead(16, 4, 8).eval()
    seen, feature, boxes = noise(2, 3, 49, 16), noise(2, 3, 16, seed=1), noise(2, 3, 4, seed=2).abs().cumsum(-1)
    together = head(seen, feature, boxes)
    for b in range(2):
        for one, other in zip(together, head(seen[b : b + 1], feature[b : b + 1], boxes[b : b + 1])):
            torch.testing.assert_close(one[b : b + 1], other, rtol=1e-4, atol=1e-5)


def overlap(one: Tensor, other: Tensor) -> float:
    """Generalised IoU."""
    shared = (torch.minimum(one, other)[2:] - torch.maximum(one, other)[:2]).clamp(min=0).prod()
    union = (one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - shared
    hull = (torch.maximum(one, other)[2:] - torch.minimum(one, other)[:2]).prod()
    return float(shared / union - (hull - union) / hull)


def random_boxes(count: int, seed: int) -> Tensor:
    corner = noise(count, 2, seed=seed).abs() * 20
    return torch.cat([corner, corner + 5 + noise(count, 2, seed=seed + 1).abs() * 20], 1)


def cost_of(logits: Tensor, boxes: Tensor, truth: Tensor, p: int, a: int) -> float:
    """Of one pair in a picture of 80 x 60 px."""
    person, scale = logits.softmax(-1)[p, 0], torch.tensor([80.0, 60, 80, 60])
    return float(-2 * person + 5 * ((boxes[p] - truth[a]) / scale).abs().sum()) - 2 * overlap(boxes[p], truth[a])


def test_the_cheapest_of_all_assignments_is_found() -> None:
    logits, size = noise(3, 5, 2), torch.tensor([[60, 80]]).expand(3, -1)
    boxes, truth = (torch.stack([random_boxes(n, seed + b) for b in range(3)]) for n, seed in ((5, 1), (3, 50)))
    present = torch.tensor([[True, True, True], [False, False, False], [True, False, True]])
    matched = match(logits, boxes, truth, present, size)
    costs = matching_costs(logits, boxes, truth, size)
    for b in range(3):
        there = present[b].nonzero().squeeze(1).tolist()
        wanted = [[cost_of(logits[b], boxes[b], truth[b], p, a) for a in range(3)] for p in range(5)]
        torch.testing.assert_close(costs[b], torch.tensor(wanted), rtol=1e-4, atol=1e-5)
        orders = itertools.permutations(range(5), len(there))
        cheapest = min(orders, key=lambda some: sum(wanted[p][a] for a, p in zip(there, some)))
        mine = matched.picture == b
        found = sorted(zip(matched.target[mine].tolist(), matched.proposal[mine].tolist()))
        assert found == list(zip(there, cheapest))


def test_more_boxes_than_proposals_and_none_at_all() -> None:
    logits, boxes, size = noise(2, 2, 2), random_boxes(4, 1).view(2, 2, 4), torch.tensor([[60, 80]]).expand(2, -1)
    truth = random_boxes(6, 9).view(2, 3, 4)
    matched = match(logits, boxes, truth, torch.ones(2, 3, dtype=torch.bool), size)
    assert matched.picture.tolist() == [0, 0, 1, 1] and sorted(matched.proposal[:2].tolist()) == [0, 1]
    assert match(logits, boxes, truth[:, :0], torch.ones(2, 0, dtype=torch.bool), size).picture.tolist() == []


def test_losses() -> None:
    logits, boxes = noise(1, 4, 2), random_boxes(4, 1).unsqueeze(0)
    truth, size = random_boxes(2, 7).unsqueeze(0), torch.tensor([[60, 80]])
    matched = match(logits, boxes, truth, torch.ones(1, 2, dtype=torch.bool), size)
    parts = box_losses(logits, boxes, truth, size, matched)
    chance = logits[0].log_softmax(-1)
    hits = dict(zip(matched.proposal.tolist(), matched.target.tolist()))
    terms = [(-chance[p, 0], 1.0) if p in hits else (-chance[p, 1] * 0.1, 0.1) for p in range(4)]
    assert float(parts["person"]) == pytest.approx(float(sum(t for t, _ in terms)) / sum(w for _, w in terms))
    scale = torch.tensor([80.0, 60, 80, 60])
    l1 = sum(float(((boxes[0, p] - truth[0, a]) / scale).abs().sum()) for p, a in hits.items()) / 2
    giou = sum(1 - overlap(boxes[0, p], truth[0, a]) for p, a in hits.items()) / 2
    assert float(parts["l1"]) == pytest.approx(l1, rel=1e-5) and float(parts["giou"]) == pytest.approx(giou, rel=1e-4)
