"""Trees of drafted tokens: what a cheaper model proposes for one pass of the model that decides.

A draft takes in the newest tokens, then nodes of the tree level by level; `static_tree` and `dynamic_tree` say which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.method import InputError, whole
from foveate.nn.speculative import CachedModel, Decoding, Prompt

Node = tuple[int, ...]
"""A node of a static tree: its ancestors' ranks among their siblings, from below the root, and its own."""


@dataclass(frozen=True, eq=False)
class Tree:
    """Drafted tokens of each row as a tree whose root, node 0, is the row's last token; parents come before children.

    Attributes:
        tokens, parent, depth: (B, L) long; the root has depth 0 and is its own parent.
        paths: (B, L, D) long, the tokens from below the root to each node, then -1s.
        q: (B, L, V) float, what the children of each node were drawn from without replacement; None where they are the
            draft's most probable ones.
        entry: (B, L) long, where the draft's cache has each node, -1 where the draft did not take it in.
    """

    tokens: Tensor
    parent: Tensor
    depth: Tensor
    paths: Tensor
    q: Tensor | None
    entry: Tensor

    @property
    def visible(self) -> Tensor:
        """(B, L, L) bool, which nodes are ancestors of each, itself included."""
        batch, length = self.tokens.shape
        seen = torch.eye(length, dtype=torch.bool, device=self.tokens.device).repeat(batch, 1, 1)
        above = self.parent
        for _ in range(self.paths.shape[2]):
            seen = seen.scatter(2, above.unsqueeze(2), True)
            above = self.parent.gather(1, above)
        return seen

    @property
    def children(self) -> Tensor:
        """(B, L, C) long, the children of each node in the order in which they were drafted, then -1s."""
        batch, length = self.tokens.shape
        same = (self.parent.unsqueeze(2) == self.parent.unsqueeze(1)).tril(-1)
        # The root is no sibling of its children.
        rank = same[:, :, 1:].sum(2)
        found = torch.full((batch, length, int(rank.max()) + 1), -1, device=self.tokens.device)
        nodes = torch.arange(1, length, device=self.tokens.device).expand(batch, -1)
        rows = torch.arange(batch, device=self.tokens.device).unsqueeze(1)
        found[rows, self.parent[:, 1:], rank[:, 1:]] = nodes
        return found


class Draft:
    """A causal model of the same vocabulary, its cache, and the entries that this round's tree has in it."""

    cached: CachedModel
    _own: Tensor
    _seen: Tensor
    _heads: Tensor | None

    def __init__(self, rows: Decoding, model: Any) -> None:
        self.rows = rows
        # (B,) tokens at the end of each row that have not been taken in: the last one, and where the path that was
        # accepted ends in a leaf, that too.
        self.new = torch.ones_like(rows.length)
        self._start(model)
        rows.report.draft_calls += 1

    def _start(self, model: Any) -> None:
        self.cached = self.rows.cached(model)
        self.cached.prefill()

    def root(self) -> Tensor:
        """(B, 1, V) scores of what follows each row."""
        rows, new = self.rows, self.new
        columns = torch.arange(int(new.max()), device=new.device)
        own = columns < new.unsqueeze(1)
        visible = own.unsqueeze(1) | torch.eye(len(columns), dtype=torch.bool, device=own.device)
        index = (rows.length - new).unsqueeze(1) + columns
        tokens = rows.ids.gather(1, index.clamp(max=rows.ids.shape[1] - 1))
        inputs = self._inputs_of_new(len(columns))
        logits = self.cached.score(tokens, columns, None if bool(own.all()) else visible.tril(), **inputs)
        rows.report.draft_calls += 1
        self._own, self._seen = own, own.unsqueeze(1)
        last = self.cached.doubled(new - 1)[:, None, None]
        self._heads = last
        return rows.scores(logits.take_along_dim(last, 1), tokens.new_empty(len(own), 1, 0))

    def feed(self, tokens: Tensor, paths: Tensor, parent: Tensor) -> tuple[Tensor, int]:
        """Takes in M nodes of one level: (B, M, V) scores of their children, and where their cache entries begin.

        Args:
            tokens, paths: (B, M) and (B, M, depth).
            parent: (B, M) index of each one's parent among the nodes that were fed before.
        """
        many, begin = tokens.shape[1], self.cached.pending
        above = self._seen.take_along_dim(parent.unsqueeze(2), 1)
        own = torch.eye(many, dtype=torch.bool, device=tokens.device).expand(len(tokens), -1, -1)
        self._seen = torch.cat([above, own], 2)
        depth = (self.new - 1 + paths.shape[2]).unsqueeze(1).expand(-1, many)
        inputs = self._inputs_of(parent)
        logits = self.cached.score(tokens, depth, None if bool(self._seen.all()) else self._seen, **inputs)
        self.rows.report.draft_calls += 1
        return self.rows.scores(logits, paths), begin

    def keep(self, tree: Tree, kept: Tensor, node: Tensor, features: Tensor | None) -> None:
        """Keeps the accepted path: nodes `kept` (B, L) bool, the last of them `node` (B,)."""
        entries = torch.zeros(len(kept), self.cached.pending + 1, dtype=torch.bool, device=kept.device)
        # Nodes without an entry, and those that are not kept, mark a last one too many.
        index = torch.where(kept & (tree.entry >= 0), tree.entry, self.cached.pending)
        entries = entries.scatter(1, index, True)[:, :-1]
        entries[:, : self._own.shape[1]] = self._own
        self.cached.keep(entries)
        self.new = 1 + (tree.entry.gather(1, node.unsqueeze(1)).squeeze(1) < 0).long()

    def _inputs_of_new(self, count: int) -> dict[str, Any]:
        return {}

    def _inputs_of(self, parent: Tensor) -> dict[str, Any]:
        return {}


class _Bound:
    """A feature draft with the embeddings and the head of the model, called like a model of transformers."""

    def __init__(self, draft: nn.Module, model: Any) -> None:
        self.draft, self.model, self.dtype = draft, model, model.dtype

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Any, features: Tensor,
        **settings: Any,
    ) -> Any:  # fmt: skip
        words = self.model.get_input_embeddings()(input_ids)
        predicted = self.draft(words, features, attention_mask, position_ids, past_key_values)
        return SimpleNamespace(logits=self.model.get_output_embeddings()(predicted), hidden_states=(predicted,))

    __call__ = forward


class FeatureDraft(Draft):
    """A draft that foretells the model's next feature from a token and the feature of the one before it (EAGLE).

    Its entries are pairs (x_(t+1), f_t). Tokens of the tree have predicted features; behind each pass of the model
    those of the accepted ones are put in anew with the model's own.

    Args:
        draft: `(words (B, L, C), features (B, L, C), attention_mask, position_ids, past_key_values) -> (B, L, C)`.
        target: the model behind its prompt, keeping features.
    """

    def __init__(self, rows: Decoding, draft: nn.Module, target: CachedModel) -> None:
        self._target = target
        super().__init__(rows, _Bound(draft, target.model))

    def _start(self, model: Any) -> None:
        target, prompts = self._target, []
        for branch, one in zip(target.features.chunk(target.branches), target.prompts):
            features = branch[:, -one.ids.shape[1] :]
            # The first token has no feature before it.
            mask = F.pad(one.mask[:, :-1], (1, 0))
            prompts.append(Prompt(one.ids, mask, {"features": F.pad(features[:, :-1], (0, 0, 1, 0))}))
        self._features = target.features[:, -1:]
        self.cached = CachedModel(model, prompts, self.rows.room, keep_features=True)
        self.cached.prefill()

    def _inputs_of_new(self, count: int) -> dict[str, Any]:
        return {"features": self._features}

    def _inputs_of(self, parent: Tensor) -> dict[str, Any]:
        features = self.cached.features
        if self._heads is not None:
            features, self._heads = features.take_along_dim(self._heads, 1), None
        return {"features": features.take_along_dim(self.cached.doubled(parent).unsqueeze(2), 1)}

    def keep(self, tree: Tree, kept: Tensor, node: Tensor, features: Tensor | None) -> None:
        assert features is not None
        entries = torch.zeros(len(kept), self.cached.pending, dtype=torch.bool, device=kept.device)
        entries[:, : self._own.shape[1]] = self._own
        self.cached.keep(entries)
        self.new = kept.sum(1)
        path = (~kept).byte().argsort(dim=1, stable=True)[:, : int(self.new.max())]
        self._features = features.take_along_dim(self.cached.doubled(path).unsqueeze(2), 1)


def static_shape(tree: Sequence[Sequence[int]]) -> tuple[Node, ...]:
    """Nodes of a static tree, parents before children and siblings in order; InputError where it is none."""
    try:
        nodes = {tuple(whole("tree", rank) for rank in node) for node in tree}
    except TypeError:
        nodes = set()
    before = {node[:-1] for node in nodes} | {(*node[:-1], node[-1] - 1) for node in nodes if node and node[-1]}
    if not nodes or () in nodes or before - nodes - {()}:
        raise InputError(
            f"tree must be a list of nodes, each a list of ranks, with every parent and earlier sibling; not {tree!r}"
        )
    return tuple(sorted(nodes, key=lambda node: (len(node), node)))


def static_tree(rows: Decoding, draft: Draft, nodes: Sequence[Node]) -> Tree:
    """A tree of the same shape for all rows: children are drawn, or the most probable ones where rows are greedy."""
    shape = [(), *nodes]
    number = {node: index for index, node in enumerate(shape)}
    inner = {node[:-1] for node in nodes}
    batch, device = len(rows.ids), rows.ids.device
    levels = max(map(len, shape))
    parent = torch.tensor([number[node[:-1]] for node in shape], device=device).expand(batch, -1)
    depth = torch.tensor([len(node) for node in shape], device=device).expand(batch, -1)
    tokens = rows.last.expand(-1, len(shape)).clone()
    paths = tokens.new_full((batch, len(shape), levels), -1)
    entry = tokens.new_full((batch, len(shape)), -1)
    entry[:, 0] = 0
    scores = draft.root()
    q = scores.new_zeros(batch, len(shape), scores.shape[2]) if rows.sample else None
    fed: list[Node] = [()]
    for level in range(levels):
        born = [node for node in shape if len(node) == level + 1]
        widest = min(max(node[-1] for node in born) + 1, scores.shape[2])
        if q is not None:
            chances = scores.softmax(-1)
            q[:, [number[node] for node in fed]] = chances
            # The order of draws without replacement: the smallest of exponentials with these rates.
            order = (chances / torch.empty_like(chances).exponential_()).topk(widest).indices
        else:
            order = scores.topk(widest).indices
        at = [fed.index(node[:-1]) for node in born]
        own = [number[node] for node in born]
        tokens[:, own] = order[:, at, [min(node[-1], widest - 1) for node in born]]
        paths[:, own] = paths[:, [number[node[:-1]] for node in born]]
        paths[:, own, level] = tokens[:, own]
        after = [node for node in born if node in inner]
        if after:
            numbers = [number[node] for node in after]
            above = torch.tensor([fed.index(node[:-1]) for node in after], device=device).expand(batch, -1)
            scores, begin = draft.feed(tokens[:, numbers], paths[:, numbers, : level + 1], above)
            entry[:, numbers] = begin + torch.arange(len(after), device=device)
            fed = after
    return Tree(tokens, parent, depth, paths, q, entry)


def dynamic_tree(rows: Decoding, draft: Draft, *, nodes: int, depth: int, branches: int) -> Tree:
    """A tree whose shape follows the draft's probabilities, of each row for itself (EAGLE-2).

    The `branches` best tokens follow the root; then, level by level, the `branches` best nodes by their joint
    probability have as many children each. Of all, the `nodes` best stay.
    """
    batch, device = len(rows.ids), rows.ids.device
    scores = draft.root()
    wide = min(branches, scores.shape[2])
    # Nodes fed to the draft last: their numbers (0 is the root), joint log-probabilities and paths.
    fed = torch.zeros(batch, 1, dtype=torch.long, device=device)
    joint, paths = scores.new_zeros(batch, 1), rows.ids.new_empty(batch, 1, 0)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    entry = torch.full((batch, 1 + wide + wide**2 * (depth - 1)), -1, device=device)
    entry[:, 0] = 0
    count = 1
    for level in range(depth):
        best = scores.log_softmax(-1).topk(wide)
        joints = (joint.unsqueeze(2) + best.values).flatten(1)
        paths = torch.cat([paths.repeat_interleave(wide, 1), best.indices.flatten(1).unsqueeze(2)], 2)
        found.append((joints, fed.repeat_interleave(wide, 1), paths))
        if level < depth - 1:
            joint, chosen = joints.topk(wide)
            paths = paths.take_along_dim(chosen.unsqueeze(2), 1)
            fed = chosen + count
            scores, begin = draft.feed(paths[:, :, -1], paths, chosen // wide)
            entry.scatter_(1, fed, (begin + torch.arange(wide, device=device)).expand(batch, -1))
        count += joints.shape[1]
    joints = torch.cat([one for one, _, _ in found], 1)
    # Stable, so that a parent comes before a child of the same joint probability.
    picked = joints.argsort(dim=1, descending=True, stable=True)[:, :nodes].sort(1).values + 1
    picked = F.pad(picked, (1, 0))
    number = torch.zeros(batch, count, dtype=torch.long, device=device)
    number.scatter_(1, picked, torch.arange(picked.shape[1], device=device).expand(batch, -1))
    parent = torch.cat([torch.zeros_like(fed[:, :1]), *(one for _, one, _ in found)], 1).gather(1, picked)
    full = torch.cat([F.pad(one, (0, depth - one.shape[2]), value=-1) for _, _, one in found], 1)
    full = F.pad(full, (0, 0, 1, 0), value=-1).take_along_dim(picked.unsqueeze(2), 1)
    levels = (full >= 0).sum(2)
    tokens = full.gather(2, (levels - 1).clamp(min=0).unsqueeze(2)).squeeze(2)
    tokens = torch.cat([rows.last, tokens[:, 1:]], 1)
    return Tree(tokens, number.gather(1, parent), levels, full, None, entry.gather(1, picked))
