"""`Tokens`: a set of visual tokens that knows which source patch every token stands for.

A method never indexes features by hand. It calls one of five verbs (`keep`, `merge`, `mix`, `pool`, `append`), each of
which returns a new `Tokens` whose provenance is right, so that overlays, coverage and token counts come for free.

Shapes: B samples (or crops, at the vision stages), N tokens, M source patches, C channels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DROPPED = -1
"""The entry of `source` for a patch that no token carries, and of an index for "no token here"."""

_FEW = 4
"""Tokens that nothing is merged with are copied, not summed, where at most one token in this many goes."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """An immutable set of tokens.

    Attributes:
        x: (B, N, C) features.
        position: (B, N, 3) float, (t, y, x) in source-patch units; the mean over the patches of a merged token.
        size: (B, N) long, how many source patches each token stands for.
        source: (B, M) long, the token that carries source patch m now, -1 where it was dropped.
        valid: (B, N) bool, False for padding (samples keep different numbers) and for tokens that stay in the
            sequence but are hidden from attention; None means that all are valid.

    Raises:
        ValueError: if the shapes do not belong together.
    """

    x: Tensor
    position: Tensor
    size: Tensor
    source: Tensor
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        if self.x.ndim != 3:
            raise ValueError(f"x must be (B, N, C), not {tuple(self.x.shape)}")
        batch, count = self.x.shape[:2]
        if self.position.shape != (batch, count, 3):
            raise ValueError(f"position must be {(batch, count, 3)}, not {tuple(self.position.shape)}")
        if self.size.shape != (batch, count):
            raise ValueError(f"size must be {(batch, count)}, not {tuple(self.size.shape)}")
        if self.source.ndim != 2 or self.source.shape[0] != batch:
            raise ValueError(f"source must be ({batch}, M), not {tuple(self.source.shape)}")
        if self.valid is not None and self.valid.shape != (batch, count):
            raise ValueError(f"valid must be {(batch, count)}, not {tuple(self.valid.shape)}")

    @classmethod
    def from_grid(cls, x: Tensor, grid: tuple[int, ...]) -> Tokens:
        """One token a patch, in raster order: x (B, T*H*W, C), grid (H, W) or (T, H, W)."""
        t, h, w = (1, *grid) if len(grid) == 2 else grid
        batch, count = x.shape[:2]
        if count != t * h * w:
            raise ValueError(f"a grid of {t}x{h}x{w} has {t * h * w} patches, x has {count} tokens")
        axes = [torch.arange(n, device=x.device, dtype=torch.float32) for n in (t, h, w)]
        position = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, count, 3)
        source = torch.arange(count, device=x.device).expand(batch, count)
        return cls(x, position.expand(batch, count, 3), torch.ones_like(source), source)

    @functools.cached_property
    def count(self) -> Tensor:
        """(B,) long: valid tokens of each sample."""
        if self.valid is None:
            return torch.full((self.x.shape[0],), self.x.shape[1], device=self.x.device)
        return self.valid.sum(1)

    def mask(self) -> Tensor:
        """(B, N) bool: `valid`, also where it is None."""
        if self.valid is None:
            return torch.ones(self.x.shape[:2], dtype=torch.bool, device=self.x.device)
        return self.valid

    def with_x(self, x: Tensor) -> Tokens:
        """The same tokens with other features (B, N, any C)."""
        return replace(self, x=x)

    def keep(self, index: Tensor, full: bool = False) -> Tokens:
        """Keeps the tokens at `index` (B, K) long, in that order; the others are dropped.

        -1 marks "no token": a sample that keeps fewer than K. `full` promises that there is none; then no number is
        read off the device. An index must not repeat within a sample.
        """
        filled = index.clamp(min=0)
        present = index >= 0
        # Where in the new order each old token stands; the extra column takes the writes of "no token" and
        # answers for patches that were dropped before.
        slots = torch.arange(index.shape[1], device=index.device).expand_as(index)
        rank = self.source.new_full((index.shape[0], self.x.shape[1] + 1), DROPPED)
        rank.scatter_(1, torch.where(present, index, self.x.shape[1]), slots)
        rank[:, -1] = DROPPED
        valid = None if self.valid is None else self.valid.gather(1, filled)
        if not full and not bool(present.all()):
            valid = present if valid is None else valid & present
        return Tokens(
            x=take(self.x, filled),
            position=self.position.gather(1, filled.unsqueeze(-1).expand(-1, -1, 3)),
            size=self.size.gather(1, filled) * present,
            source=rank.gather(1, self.source % rank.shape[1]),
            valid=valid,
        )

    def merge(
        self, into: Tensor, weight: Tensor | None = None, groups: int | None = None, full: bool = False
    ) -> Tokens:
        """Averages tokens in groups: token j goes into group `into[b, j]` (B, N), -1 drops it.

        Args:
            into: (B, N) long in -1..G-1. Tokens that are not valid are left out whatever it says.
            weight: (B, N) float > 0, None for a plain mean; pass `size` for ToMe's proportional mean.
            groups: G; read from `into` if None.
            full: promises that every token is valid and has a group, and that no group is empty: with it and `groups`,
                no number is read off the device, and where few tokens go, only those that meet are summed.
        """
        batch, count = self.x.shape[:2]
        # Sums of many bf16 values need more digits than bf16 has.
        exact = torch.promote_types(self.x.dtype, torch.float32)
        into = into if self.valid is None else torch.where(self.valid, into, DROPPED)
        groups = int(into.max()) + 1 if groups is None else groups
        # Samples one after the other: sums of whole rows are several times as fast as over a batch axis.
        row = (into if full else into.clamp(min=0)) + groups * torch.arange(batch, device=into.device).unsqueeze(1)
        row = row.flatten()

        def total(values: Tensor) -> Tensor:
            rows = values.flatten(0, 1)
            out = rows.new_zeros(batch * groups, rows.shape[1])
            return out.scatter_add_(0, row.unsqueeze(1).expand_as(rows), rows)

        share = (torch.ones_like(self.size) if weight is None else weight).to(exact).unsqueeze(-1)
        patches = self.size.to(exact).unsqueeze(-1)
        columns = [share, patches, self.position * patches]
        if not full:
            member = (into >= 0).to(exact).unsqueeze(-1)
            columns = [column * member for column in columns] + [member]
        mass, size, position, *members = total(torch.cat(columns, -1)).split([one.shape[-1] for one in columns], -1)
        mass = mass.clamp(min=torch.finfo(exact).tiny)
        if full and _FEW * (count - groups) <= count:
            x = _met(self.x.flatten(0, 1), row, share.flatten(0, 1), mass, batch * (count - groups))
        else:
            x = total(self.x * columns[0]) / mass
        moved = torch.cat([into, into.new_full((batch, 1), DROPPED)], 1)
        valid = None if full else (members[0] > 0).view(batch, groups)
        return Tokens(
            x=x.to(self.x.dtype).unflatten(0, (batch, groups)),
            position=(position / size.clamp(min=1)).to(self.position.dtype).unflatten(0, (batch, groups)),
            size=size.long().view(batch, groups),
            source=moved.gather(1, self.source % (count + 1)),
            valid=None if valid is None or bool(valid.all()) else valid,
        )

    def mix(self, weights: Tensor) -> Tokens:
        """Soft assignment: new token k is `sum_j weights[b, k, j] * x[b, j]`, weights (B, K, N).

        Each patch is counted with the new token that its old token gives most weight to (of equal ones the first); a
        new token that no old one gives most weight to has size 0. Where no weight is above 0 the patch is dropped.
        """
        if self.valid is not None:
            weights = weights * self.valid.unsqueeze(1)
        owner = weights.argmax(1)
        owner = torch.where(self.mask() & (weights.amax(1) > 0), owner, DROPPED)
        hard = self.merge(owner, groups=weights.shape[1])
        return replace(hard, x=(weights.to(self.x.dtype) @ self.x), valid=None)

    def pool(self, factor: float | tuple[float, float]) -> Tokens:
        """Averages the tokens of each cell of `factor` (y, x) patches; cells need not be whole numbers of patches.

        Tokens of different t are never averaged. Cells without a token do not appear.
        """
        fy, fx = factor if isinstance(factor, tuple) else (factor, factor)
        if fy < 1 or fx < 1:
            raise ValueError(f"factor must be at least 1, not {factor}")
        if self.x.shape[1] == 0:
            return self
        t, y, x = self.position.unbind(-1)
        rows = ((y + 0.5) / fy).long()
        columns = ((x + 0.5) / fx).long()
        width, height = int(columns.max()) + 1, int(rows.max()) + 1
        pooled = self.merge((t.long() * height + rows) * width + columns, groups=(int(t.max()) + 1) * height * width)
        return pooled if pooled.valid is None else pooled.keep(compact(pooled.valid))

    def append(self, other: Tokens) -> Tokens:
        """The tokens of both, `other` last; its source patches follow this one's."""
        moved = torch.where(other.source >= 0, other.source + self.x.shape[1], DROPPED)
        valid = None
        if self.valid is not None or other.valid is not None:
            valid = torch.cat([self.mask(), other.mask()], 1)
        return Tokens(
            x=torch.cat([self.x, other.x], 1),
            position=torch.cat([self.position, other.position], 1),
            size=torch.cat([self.size, other.size], 1),
            source=torch.cat([self.source, moved], 1),
            valid=valid,
        )


def _met(x: Tensor, row: Tensor, share: Tensor, mass: Tensor, joiners: int) -> Tensor:
    """(R, C) in the precision of `share`: the means of x (S, C), weighted with share (S, 1), in R full groups `row`
    (S,), whose weights add up to mass (R, 1). Of each group the first token leads, and `joiners` tokens join others:
    `mean = x_lead + sum over joiners j of (share_j / mass) (x_j - x_lead)`. Groups that nobody joins are copied.
    """
    place = torch.arange(len(row), device=row.device)
    leader = place.new_full((len(mass),), len(row)).scatter_reduce_(0, row, place, "amin")
    led = leader.index_select(0, row)
    joining = torch.sort((led != place).to(torch.uint8), descending=True, stable=True).indices[:joiners]
    group = row.index_select(0, joining)
    change = x.index_select(0, joining).to(share.dtype) - x.index_select(0, led.index_select(0, joining))
    change = change * (share.index_select(0, joining) / mass.index_select(0, group)).to(share.dtype)
    return x.index_select(0, leader).to(share.dtype).index_add_(0, group, change)


def take(states: Tensor, index: Tensor) -> Tensor:
    """(B, K, D): rows `index` (B, K) of `states` (B, S, D); -1 takes row 0."""
    batch, length = states.shape[:2]
    # Copying whole rows is ten times as fast as a gather with the index spread over D.
    rows = index.clamp(min=0)
    if batch > 1:
        rows = rows + length * torch.arange(batch, device=index.device).unsqueeze(1)
    return states.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, index.shape)


def put(states: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """`states` (B, S, D) with `values` (B, K, D) at the rows `index` (B, K), which must not repeat; -1 puts nowhere."""
    batch, length, width = states.shape
    first = length * torch.arange(batch, device=index.device).unsqueeze(1)
    # The extra row takes what is put nowhere.
    rows = torch.where(index >= 0, index + first, batch * length)
    room = torch.cat([states.flatten(0, 1), states.new_zeros(1, width)])
    room.index_copy_(0, rows.flatten(), values.flatten(0, 1).to(states.dtype))
    return room[:-1].unflatten(0, (batch, length))


def marked(index: Tensor, length: int) -> Tensor:
    """(B, length) bool: True at `index` (B, N); -1 marks nothing."""
    # The extra column takes the writes of "nothing".
    places = torch.zeros(len(index), length + 1, dtype=torch.bool, device=index.device)
    return places.scatter_(1, torch.where(index >= 0, index, length), True)[:, :-1]


def predecessors(before: Tokens, after: Tokens) -> Tensor:
    """(B, K): for every token of `after`, the token of `before` that carries the first of its patches; -1 for none.

    For tokens that were kept this is where they came from; for a merged one, the first of those merged.
    """
    batch, patches = after.source.shape
    count = after.x.shape[1]
    if before.source is after.source:
        return torch.arange(count, device=after.source.device).expand(batch, -1)
    number = torch.arange(patches, device=after.source.device).expand(batch, -1)
    first = number.new_full((batch, count + 1), patches)
    first.scatter_reduce_(1, after.source % (count + 1), number, "amin")
    first = first[:, :count]
    holder = before.source.gather(1, first.clamp(max=max(patches - 1, 0)))
    return torch.where(first < patches, holder, DROPPED)


def compact(chosen: Tensor) -> Tensor:
    """Indices (B, K) of the True entries of `chosen` (B, N), ascending, -1 where a sample has fewer than K."""
    return compacted(chosen)[0]


def compacted(chosen: Tensor) -> tuple[Tensor, bool]:
    """As `compact`, and whether every sample has K."""
    count = chosen.sum(1)
    # One look at numbers on the device: each makes the model wait.
    least, most = torch.stack(count.aminmax()).tolist()
    order = torch.sort((~chosen).to(torch.uint8), dim=1, stable=True).indices[:, :most]
    if least == most:
        return order, True
    return torch.where(torch.arange(most, device=chosen.device) < count.unsqueeze(1), order, DROPPED), False


def topk_in_order(score: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """Indices (B, K) of the k highest scores of each sample, ascending; of equal scores the first is taken.

    Args:
        score: (B, N) float.
        k: how many, one number or (B,) long; K is the largest. Capped at the number of valid tokens.
        valid: (B, N) bool; entries that are False are never taken.
    """
    order = torch.sort(score, dim=1, descending=True, stable=True).indices
    if valid is not None:
        # Behind all others, also behind valid entries of -inf.
        order = order.gather(1, torch.sort(valid.gather(1, order).byte(), dim=1, descending=True, stable=True).indices)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(score.shape[1], device=score.device).expand_as(order)
    )
    budget = k.unsqueeze(1) if isinstance(k, Tensor) else k
    chosen = rank < budget
    return compact(chosen if valid is None else chosen & valid)
