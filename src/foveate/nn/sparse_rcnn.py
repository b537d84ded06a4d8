"""Sparse R-CNN: a feature pyramid, and learned proposals that a stack of heads turns into boxes and scores.

Boxes are (x1, y1, x2, y2) in pixels of the picture. B pictures, P proposals, C channels. torchvision and scipy are
loaded when they are first used: listing the methods should not wait for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SCALES = (4.0, 2.0, 1.0, 0.5)
_POOLED = 7
_LARGEST = math.log(100_000 / 16)
"""Of a box's growth in one head, in logarithms."""


class FeaturePyramid(nn.Module):
    """Four maps of one stride become levels of a quarter, half, once and twice that stride, all C wide.

    A plain ViT has one resolution; each map is resized (nearest), projected, added to the coarser level (nearest), and
    smoothed by a 3x3 convolution. h and w must be even.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for _ in _SCALES)
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in _SCALES)
        for convolution in (*self.lateral, *self.smooth):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
            nn.init.zeros_(convolution.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """maps: four of (B, width, h, w), the shallowest first; returns (B, C, 4h, 4w) … (B, C, h/2, w/2)."""
        above: Tensor | None = None
        levels: list[Tensor] = []
        for scale, x, lateral, smooth in reversed(list(zip(_SCALES, maps, self.lateral, self.smooth))):
            level = lateral(x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="nearest"))
            above = level if above is None else level + F.interpolate(above, scale_factor=2, mode="nearest")
            levels.insert(0, smooth(above))
        return levels


class Proposals(nn.Module):
    """P boxes and features that are learned, the same for every picture; each box begins as the whole picture."""

    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.boxes = nn.Embedding(count, 4)
        self.features = nn.Embedding(count, channels)
        with torch.no_grad():
            self.boxes.weight[:, :2] = 0.5
            self.boxes.weight[:, 2:] = 1.0

    def forward(self, size: Tensor) -> tuple[Tensor, Tensor]:
        """size (B, 2): height and width px. Returns boxes (B, P, 4) and features (B, P, C)."""
        centre, extent = self.boxes.weight.split(2, dim=1)
        corners = torch.cat([centre - extent / 2, centre + extent / 2], 1)
        scale = size.flip(1).repeat(1, 2).to(corners.dtype)
        return corners * scale.unsqueeze(1), self.features.weight.expand(len(size), -1, -1)


class DynamicConvolution(nn.Module):
    """Each proposal filters what it sees, (n, 49, C), by two 1x1 convolutions that its own feature (n, C) makes."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.inner = inner
        self.parameters_of = nn.Linear(channels, 2 * channels * inner)
        self.norm_inner, self.norm_outer = nn.LayerNorm(inner), nn.LayerNorm(channels)
        self.out, self.norm = nn.Linear(_POOLED**2 * channels, channels), nn.LayerNorm(channels)

    def forward(self, feature: Tensor, seen: Tensor) -> Tensor:
        count, channels = feature.shape
        first, second = self.parameters_of(feature).chunk(2, 1)
        seen = F.relu(self.norm_inner(seen @ first.view(count, channels, self.inner)))
        seen = F.relu(self.norm_outer(seen @ second.view(count, self.inner, channels)))
        return F.relu(self.norm(self.out(seen.flatten(1))))


class ProposalHead(nn.Module):
    """One round: proposals attend to each other, look at the picture, and say person or not and how the box moves."""

    def __init__(self, channels: int, inner: int, feedforward: int, heads: int = 8) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.interaction = DynamicConvolution(channels, inner)
        self.feedforward = nn.Sequential(
            nn.Linear(channels, feedforward), nn.ReLU(), nn.Linear(feedforward, channels)
        )  # fmt: skip
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        self.classify = nn.Sequential(*_tower(channels, 1), nn.Linear(channels, 2))
        self.regress = nn.Sequential(*_tower(channels, 3), nn.Linear(channels, 4))

    def forward(self, seen: Tensor, feature: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """seen (B, P, 49, C), feature (B, P, C), boxes (B, P, 4) -> logits (B, P, 2), boxes, feature."""
        x = self.norms[0](feature + self.attention(feature, feature, feature, need_weights=False)[0])
        x = self.norms[1](x + self.interaction(x.flatten(0, 1), seen.flatten(0, 1)).view_as(x))
        x = self.norms[2](x + self.feedforward(x))
        return self.classify(x), moved(boxes, self.regress(x)), x


def _tower(channels: int, depth: int) -> list[nn.Module]:
    return [
        layer
        for _ in range(depth)
        for layer in (nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU())
    ]


def moved(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Boxes (…, 4) shifted by half of (dx, dy) of their width and height, and grown by exp(dw), exp(dh)."""
    corner, extent = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
    centre = corner + extent / 2 + deltas[..., :2] / 2 * extent
    grown = extent * deltas[..., 2:].clamp(max=_LARGEST).exp()
    return torch.cat([centre - grown / 2, centre + grown / 2], -1)


def look(levels: Sequence[Tensor], boxes: Tensor, finest: float) -> Tensor:
    """What boxes (B, P, 4) cover in the pyramid: (B, P, 49, C), aligned, 2 samples a bin and side.

    Each box is read from the level floor(4 + log2(sqrt(area) / 224)), level l having a stride of 2^l px, `finest` being
    the stride of the first.
    """
    from torchvision.ops import roi_align

    batch, count = boxes.shape[:2]
    flat = boxes.flatten(0, 1)
    if flat.is_meta:
        # Which level a box is read from depends on values, and there are none.
        return levels[0].new_empty(batch, count, _POOLED**2, levels[0].shape[1])
    number = torch.arange(batch, device=boxes.device, dtype=boxes.dtype).repeat_interleave(count)
    regions = torch.cat([number.unsqueeze(1), flat], 1)
    side = (flat[:, 2:] - flat[:, :2]).clamp(min=0).prod(1).sqrt()
    first = math.log2(finest)
    level = (4 + torch.log2(side / 224 + 1e-8)).floor().clamp(first, first + len(levels) - 1)
    seen = levels[0].new_zeros(len(flat), levels[0].shape[1], _POOLED, _POOLED)
    for step, x in enumerate(levels):
        here = (level == first + step).nonzero().squeeze(1)
        # In float32: half precision has no kernel everywhere, and too few digits for corners in pixels.
        scale = 1 / (finest * 2**step)
        part = roi_align(x.float(), regions[here].float(), _POOLED, scale, sampling_ratio=2, aligned=True)
        seen = seen.index_copy(0, here, part.to(seen.dtype))
    return seen.flatten(2).transpose(1, 2).unflatten(0, (batch, count))


def matching_costs(logits: Tensor, boxes: Tensor, truth: Tensor, size: Tensor) -> Tensor:
    """(B, P, A) what it costs to match: logits (B, P, 2), boxes (B, P, 4), true boxes (B, A, 4), size (B, 2) of height
    and width: 2 (-p(person)) + 5 L1(boxes / size) + 2 (-GIoU)."""
    from torchvision.ops import generalized_box_iou

    pictures, proposals, wanted = *boxes.shape[:2], truth.shape[1]
    boxes, truth = boxes.float(), truth.float()
    scale = size.flip(1).repeat(1, 2).float().unsqueeze(1)
    # All pictures at once: a launch for each of them would be most of a training step's time on an accelerator.
    overlap = generalized_box_iou(boxes.flatten(0, 1), truth.flatten(0, 1))
    overlap = overlap.view(pictures, proposals, pictures, wanted).diagonal(dim1=0, dim2=2).movedim(2, 0)
    cost = -2 * logits.float().softmax(-1)[..., :1]
    return cost + 5 * torch.cdist(boxes / scale, truth / scale, p=1) - 2 * overlap


class Matched(NamedTuple):
    """Which proposal (`picture`, `proposal`) belongs to which true box (`picture`, `target`): (n,) long each."""

    picture: Tensor
    proposal: Tensor
    target: Tensor


def match(logits: Tensor, boxes: Tensor, truth: Tensor, present: Tensor, size: Tensor) -> Matched:
    """The cheapest one-to-one assignment of true boxes to proposals in each picture, see `matching_costs`; of the true
    boxes those `present` (B, A) count. A picture with A of them and P proposals has min(P, A) pairs."""
    from scipy.optimize import linear_sum_assignment

    with torch.no_grad():
        # A run that diverges must reach its loss, which says so.
        costs = matching_costs(logits, boxes, truth, size).nan_to_num(1e6, 1e6, -1e6).cpu()
    pairs = [torch.zeros(3, 0, dtype=torch.long)]
    for b, (cost, there) in enumerate(zip(costs, present.cpu())):
        place = there.nonzero().squeeze(1)
        rows, columns = map(torch.as_tensor, linear_sum_assignment(cost[:, place].numpy()))
        pairs.append(torch.stack([torch.full_like(rows, b), rows, place[columns]]))
    return Matched(*torch.cat(pairs, 1).to(logits.device))


def box_losses(logits: Tensor, boxes: Tensor, truth: Tensor, size: Tensor, matched: Matched) -> dict[str, Tensor]:
    """Losses of one head: "person", cross entropy with a tenth of the weight on no object; "l1" and "giou" of matched
    boxes, summed and divided by their number (L1 in shares of the picture)."""
    from torchvision.ops import generalized_box_iou_loss

    target = torch.ones(logits.shape[:2], dtype=torch.long, device=logits.device)
    target[matched.picture, matched.proposal] = 0
    weight = logits.new_tensor([1.0, 0.1])
    ours = boxes[matched.picture, matched.proposal].float()
    theirs = truth[matched.picture, matched.target].float()
    scale = size.flip(1).repeat(1, 2).float()[matched.picture]
    count = max(1, len(ours))
    return {
        "person": F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight),
        "l1": (ours / scale - theirs / scale).abs().sum() / count,
        "giou": generalized_box_iou_loss(ours, theirs, reduction="sum") / count,
    }
