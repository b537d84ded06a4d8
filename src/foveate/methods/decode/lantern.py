"""LANTERN: speculative decoding of image tokens that counts a drafted code's neighbours in the codebook as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.method import Card, Claim, InputError, Published, choice, configured, register, whole, within
from foveate.nn.speculative import DecodeReport, Decoding, draw, normalised, residual

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llamagen-xl": {},
    "anole-7b": {"offset": 4},
    "lumina-mgpt-7b": {"offset": 4},
}
"""The paper's hosts by name: they differ in where image codes begin in the vocabulary."""

GENERATION: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 2000, "top_p": 1.0, "guidance_scale": 3.0}
"""Arguments of `generate` in the paper's runs; sampling ones only where they sample."""

TREES: dict[str, tuple[tuple[int, ...], ...]] = {
    "eagle": (
        (0,), (1,), (2,), (3,), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (0, 0, 0), (0, 0, 1),
        (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0), (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2),
        (0, 0, 0, 0, 0), (0, 0, 0, 0, 1),
    ),
}  # fmt: skip
"""Static trees by name; a node is the list of its ancestors' ranks among their siblings and its own."""


def neighbour_table(codebook: Tensor, k: int) -> Tensor:
    """(V, k) the nearest other codes of each code (V, d) by Euclidean distance, nearest first.

    uint16 where ids fit, else int32: a table of many neighbours is larger than the codebook.

    Raises:
        InputError: for another shape, or fewer than two codes.
    """
    if codebook.ndim != 2 or len(codebook) < 2 or not codebook.is_floating_point():
        raise InputError(f"a codebook must be (V, d) floating-point codes, not {tuple(codebook.shape)}")
    count = len(codebook)
    near = []
    for first in range(0, count, 1024):
        some = codebook[first : first + 1024].float()
        distance = torch.cdist(some, codebook.float(), compute_mode="donot_use_mm_for_euclid_dist")
        place = torch.arange(len(some), device=codebook.device)
        distance[place, place + first] = float("inf")
        near.append(distance.argsort(dim=1, stable=True)[:, : min(k, count - 1)])
    return torch.cat(near).to(torch.uint16 if count <= 2**16 else torch.int32)


def _table_bytes(codes: int, k: int) -> int:
    with torch.device("meta"):
        table = neighbour_table(torch.empty(codes, 8), k)
    return table.numel() * table.element_size()


@dataclass(frozen=True, eq=False)
class Tree:
    """Drafted tokens of each row as a tree whose root, node 0, is the row's last token; parents come before children.

    Attributes:
        tokens, parent, depth: (B, L) long; depth of the root 0.
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
        """(B, L, C) long, the children of each node, those drafted first first, then -1s."""
        batch, length = self.tokens.shape
        same = (self.parent.unsqueeze(2) == self.parent.unsqueeze(1)).tril(-1)
        # The root is no sibling of its children.
        rank = same[:, :, 1:].sum(2)
        found = torch.full((batch, length, int(rank.max()) + 1), -1, device=self.tokens.device)
        nodes = torch.arange(1, length, device=self.tokens.device).expand(batch, -1)
        rows = torch.arange(batch, device=self.tokens.device).unsqueeze(1)
        found[rows, self.parent[:, 1:], rank[:, 1:]] = nodes
        return found


class _Draft:
    """The draft model, its cache, and the entries that this round's tree has in it."""

    def __init__(self, rows: Decoding, model: Any) -> None:
        self.rows, self.cached = rows, rows.cached(model)
        self.cached.prefill()
        rows.report.draft_calls += 1
        # The last node of a path that was accepted may be one that the draft has not taken in.
        self.behind = torch.zeros_like(rows.live)

    def root(self) -> tuple[Tensor, Tensor]:
        """(B, 1, V) scores of what follows each row, and (B, 1, P) bool, which entries the root has seen."""
        rows, last = self.rows, self.rows.last
        batch, device = len(last), last.device
        if not bool(self.behind.any()):
            self._base = torch.ones(batch, 1, dtype=torch.bool, device=device)
            logits = self.cached.score(last, torch.zeros(1, dtype=torch.long, device=device))
        else:
            tokens = torch.cat([rows.ids.gather(1, rows.length.unsqueeze(1) - 2), last], 1)
            depth = torch.stack([torch.zeros_like(rows.length), self.behind.long()], 1)
            self._base = torch.stack([self.behind, torch.ones_like(self.behind)], 1)
            visible = torch.ones(batch, 2, 2, dtype=torch.bool, device=device).tril()
            visible[:, 1, 0] = self.behind
            logits = self.cached.score(tokens, depth, None if bool(self.behind.all()) else visible)
        rows.report.draft_calls += 1
        nothing = last.new_empty(batch, 1, 0)
        return rows.scores(logits[:, -1:], nothing), self._base.unsqueeze(1)

    def feed(self, tokens: Tensor, paths: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, int]:
        """Takes in M nodes of one depth. (B, M, V) scores of their children, (B, M, P) what they have seen, themselves
        included, and where their entries begin.

        Args:
            tokens, paths: (B, M) and (B, M, depth).
            seen: (B, M, P') bool, what their parents have seen.
        """
        batch, many = tokens.shape
        first = self.cached.pending
        own = torch.eye(many, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        before = torch.zeros(batch, many, first - seen.shape[2], dtype=torch.bool, device=tokens.device)
        seen = torch.cat([seen, before, own], 2)
        depth = (self.behind.long() + paths.shape[2]).unsqueeze(1).expand(-1, many)
        logits = self.cached.score(tokens, depth, None if bool(seen.all()) else seen)
        self.rows.report.draft_calls += 1
        return self.rows.scores(logits, paths), seen, first

    def keep(self, tree: Tree, kept: Tensor, node: Tensor) -> None:
        """Keeps the accepted path: nodes `kept` (B, L) bool, the last of them `node` (B,)."""
        entries = torch.zeros(len(kept), self.cached.pending + 1, dtype=torch.bool, device=kept.device)
        # Nodes without an entry, and those that are not kept, mark a last one too many.
        index = torch.where(kept & (tree.entry >= 0), tree.entry, self.cached.pending)
        entries = entries.scatter(1, index, True)[:, :-1]
        entries[:, : self._base.shape[1]] = self._base
        self.cached.keep(entries)
        self.behind = tree.entry.gather(1, node.unsqueeze(1)).squeeze(1) < 0

    @property
    def root_entry(self) -> int:
        return self._base.shape[1] - 1


@register
class Lantern(Published):
    """Speculative decoding in which a drafted image token may borrow the probability of the codes next to its own.

    `model.generate(ids, custom_generate=Lantern(draft=small, codebook=codes), do_sample=True, ...)`; ids (B, S), left
    padding, guidance_scale with negative_prompt_ids (for the draft too), top_k and all logits processors are those of
    transformers. The draft, any causal model of the same vocabulary, proposes a tree of tokens behind the last one; one
    pass of the model judges all nodes. With p the model's distribution at a node, x a drafted child, n_1, n_2, … the
    neighbours of x by distance in the codebook:

        p'(x) = p(x) + c_i,    c_i = sum_(j <= i) p(n_j),    i <= k the largest with c_i <= delta

    which moves p by c_i in total variation. Children are tried in turn: x is accepted if `u <= p'(x) / q(x)`, u uniform
    in [0, 1); otherwise the next one is tried on `max(0, p' - q)`, normalised, where p'(n_1..n_i) = 0. If none is left,
    the token is drawn from that; behind the last node of a path, from p. With `delta=0` this is speculative sampling,
    and samples are distributed as those of the model. Greedy: x is accepted where p'(x) is the greatest of p with that
    entry changed, the longest accepted path counts, and the token behind it is the most probable one.

    Dynamic trees (EAGLE-2): the `branches` best tokens of a node, of the `branches` best nodes of a level, `depth`
    levels; the `nodes` best of all by their joint probability stay, and q = 1, for they are not drawn. Static trees:
    children are drawn without replacement, q(x) of one is conditional on its earlier siblings.

    LANTERN: Accelerating Visual Autoregressive Models with Relaxed Speculative Decoding, ICLR 2025,
    https://arxiv.org/abs/2410.03355, section 4; `ratio` is that of LANTERN++, https://arxiv.org/abs/2502.06352. Where
    paper and release differ, the paper is the default; see `residual`. The release's drafter, one layer on the model's
    features, is `EagleDraft`. This project's choices: nothing is moved, and no neighbour zeroed, where c_i = 0; where
    a residual has nothing left, only x is taken from p.

    Attributes:
        report: of the last call, see `DecodeReport`.
    """

    card = Card(
        slug="lantern", arxiv="2410.03355", year=2024, kind="decode", hosts=("hf-causal-lm",),
        title="LANTERN: Accelerating Visual Autoregressive Models with Relaxed Speculative Decoding",
        summary="Speculative decoding that lets a drafted image token borrow its codebook neighbours' probability.",
        parameters={
            "draft": "a smaller causal model of the same vocabulary, on the same device",
            "codebook": "(V, d) the tokenizer's codes, or None for plain speculative decoding",
            "offset": "token id of the first code",
            "k": "most neighbours of a code",
            "delta": "bound of the total variation, in [0, 1]",
            "ratio": "LANTERN++: instead of delta, p'(x) <= ratio p(x), at least 1",
            "tree": "'dynamic', 'chain', a name in TREES, or a list of nodes as there",
            "nodes": "of a dynamic tree, without its root",
            "depth": "levels of a dynamic tree or a chain",
            "branches": "children of a node, and nodes of a level that have children, in a dynamic tree",
            "residual": "behind a rejection 'paper' takes the borrowed neighbours from p; 'released' takes k + 1 of "
                        "them, and in static trees from q",
        },
    )  # fmt: skip

    claims = (
        Claim("MB of all neighbours of LlamaGen's codes", "value", 537, "card", 0.001,
              value=lambda cls: _table_bytes(16384, 16383) / 1e6),
        Claim("MB of 1000 neighbours of LlamaGen's codes", "value", 32.8, "card", 0.001,
              value=lambda cls: _table_bytes(16384, 1000) / 1e6),
        Claim("nodes of the default static tree", "value", 25, "card", 0, value=lambda cls: len(TREES["eagle"])),
    )  # fmt: skip

    def __init__(
        self,
        *,
        draft: Any,
        codebook: Tensor | None = None,
        offset: int = 0,
        k: int = 1000,
        delta: float = 0.1,
        ratio: float | None = None,
        tree: str | Sequence[Sequence[int]] = "dynamic",
        nodes: int = 58,
        depth: int = 5,
        branches: int = 10,
        residual: str = "paper",
    ) -> None:
        self.draft, self.offset = draft, whole("offset", offset)
        self.k = whole("k", k)
        self.delta = within("delta", delta, "[0, 1]")
        self.ratio = None if ratio is None else within("ratio", ratio, "[1, inf)")
        self.nodes, self.depth = whole("nodes", nodes, 1), whole("depth", depth, 1)
        self.branches = whole("branches", branches, 1)
        self.residual = choice("residual", residual, ("paper", "released"))
        self.tree: str | tuple[tuple[int, ...], ...] = "dynamic"
        if not isinstance(tree, str):
            self.tree = _checked(tree)
        elif choice("tree", tree, ("dynamic", "chain", *TREES)) != "dynamic":
            self.tree = TREES.get(tree) or tuple((0,) * level for level in range(1, depth + 1))
        # One more than k: the release takes that many from p.
        self.table = None if codebook is None or not k else neighbour_table(codebook, k + 1)
        self.report = DecodeReport()

    @classmethod
    def named(cls, name: str, **changes: Any) -> Lantern:
        """A decoder by its name in `CONFIGURATIONS`, with draft, codebook and changes; InputError for other names."""
        return cls(**configured(name, CONFIGURATIONS, changes))

    def __call__(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:  # fmt: skip
        """Called by `generate`; returns what it returns.

        Raises:
            InputError: see `Decoding`; for a draft of another vocabulary, codes beyond it.
        """
        words = model.config.get_text_config().vocab_size
        if self.draft.config.get_text_config().vocab_size != words:
            raise InputError(f"the draft must have the model's {words} tokens")
        if self.table is not None and self.offset + len(self.table) > words:
            raise InputError(f"{len(self.table)} codes from token {self.offset} on: this model has {words} tokens")
        rows = Decoding(
            "lantern", model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
        )  # fmt: skip
        self.report = rows.report
        cached, draft = rows.cached(model), _Draft(rows, self.draft)
        scores = rows.scores(cached.prefill(), input_ids.new_empty(len(input_ids), 1, 0))
        rows.report.calls += 1
        first = draw(scores.softmax(-1)) if rows.sample else scores.argmax(-1)
        rows.append(first, torch.ones_like(rows.length))
        while bool(rows.live.any()):
            tree = self._dynamic(rows, draft) if self.tree == "dynamic" else self._static(rows, draft)
            # A chain needs no mask of its own.
            visible = tree.visible if int(tree.children.shape[2]) > 1 else None
            p = rows.scores(cached.score(tree.tokens, tree.depth, visible), tree.paths)
            rows.report.calls += 1
            kept, node, token = self._sample(tree, p.softmax(-1)) if rows.sample else self._greedy(tree, p)
            accepted = kept.sum(1, keepdim=True) - 1
            path = tree.paths.take_along_dim(node[:, None, None], 1).squeeze(1)
            tokens = torch.cat([path, torch.zeros_like(path[:, :1])], 1).scatter(1, accepted, token.unsqueeze(1))
            rows.report.emitted.append(rows.append(tokens, accepted.squeeze(1) + 1))
            cached.keep(kept)
            draft.keep(tree, kept, node)
        return rows.result(cached.cache)

    def relax(self, p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(...) what tokens x (...) borrow at distributions p (..., V), and (..., K) bool, of which neighbours.

        K is k + 1 or what the codebook has; the last is never lent of by itself.
        """
        if self.table is None:
            return p.new_zeros(x.shape), torch.zeros(*x.shape, 0, dtype=torch.bool, device=p.device)
        code = x - self.offset
        mass = p.gather(-1, self._neighbours(x)).cumsum(-1)
        own = p.gather(-1, x.unsqueeze(-1))
        limit = own * (self.ratio - 1) if self.ratio is not None else self.delta
        lent = (mass <= limit) & ((code >= 0) & (code < len(self.table))).unsqueeze(-1)
        lent[..., self.k :] = False
        moved = torch.where(lent, mass, 0.0).amax(-1)
        return moved, lent & (moved > 0).unsqueeze(-1)

    def _neighbours(self, x: Tensor) -> Tensor:
        """(..., K) token ids of the neighbours of x; of anything where x is no code."""
        assert self.table is not None
        code = (x - self.offset).clamp(0, len(self.table) - 1)
        if self.table.device != x.device:
            self.table = self.table.to(x.device)
        return self.table[code].long() + self.offset

    def rejected(self, p: Tensor, x: Tensor, lent: Tensor, q: Tensor | None) -> Tensor:
        """(B, V) what is left of p (B, V) behind the rejection of x (B,), which had borrowed of `lent` (B, K).

        `q` (B, V) is what x was drawn from; None where it was not drawn.
        """
        without = p.scatter(1, x.unsqueeze(1), 0.0)
        taken = lent
        if self.table is not None:
            near = self._neighbours(x)
            if self.residual == "released":
                taken = lent.any(1, keepdim=True).expand_as(lent)
                if q is not None:
                    q = q.scatter(1, near, torch.where(taken, 0.0, q.gather(1, near)))
                    taken = torch.zeros_like(taken)
            without = without.scatter(1, near, torch.where(taken, 0.0, without.gather(1, near)))
        if q is not None:
            return residual(without, q)
        # Rounding, or the release's zeros, may leave nothing.
        alone = p.scatter(1, x.unsqueeze(1), 0.0)
        without = torch.where(without.sum(1, keepdim=True) > 0, without, alone)
        return normalised(torch.where(without.sum(1, keepdim=True) > 0, without, p))

    def _sample(self, tree: Tree, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nodes that are accepted (B, L) bool, the last of them (B,), and the token behind it (B,)."""
        children = tree.children
        batch = len(p)
        row = torch.arange(batch, device=p.device)
        node = torch.zeros(batch, dtype=torch.long, device=p.device)
        kept = torch.zeros_like(tree.tokens, dtype=torch.bool)
        kept[:, 0] = True
        now, walking = p[:, 0], torch.ones_like(kept[:, 0])
        for _ in range(tree.paths.shape[2]):
            q = None if tree.q is None else tree.q[row, node]
            reached, trying = node, walking
            walking = torch.zeros_like(walking)
            for child in children[row, node].unbind(1):
                x = tree.tokens.gather(1, child.clamp(min=0).unsqueeze(1))
                chance = 1.0 if q is None else q.gather(1, x).squeeze(1)
                # The draft may have had fewer tokens than there are places for siblings.
                tested = trying & (child >= 0) & (chance > 0)
                if not bool(tested.any()):
                    continue
                x = x.squeeze(1)
                moved, lent = self.relax(now, x)
                passed = tested & (torch.rand_like(moved) * chance < now[row, x] + moved)
                failed = tested & ~passed
                now = torch.where(failed.unsqueeze(1), self.rejected(now, x, lent, q), now)
                if q is not None:
                    rest = q.scatter(1, x.unsqueeze(1), 0.0)
                    rest = rest / rest.sum(1, keepdim=True).clamp(min=torch.finfo(rest.dtype).tiny)
                    q = torch.where(failed.unsqueeze(1), rest, q)
                reached = torch.where(passed, child, reached)
                walking, trying = walking | passed, trying & ~passed
            node = reached
            kept[row, node] = True
            now = torch.where(walking.unsqueeze(1), p[row, node], now)
            if not bool(walking.any()):
                break
        return kept, node, draw(now)

    def _greedy(self, tree: Tree, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `_sample`, of scores (B, L, V)."""
        p = scores.softmax(-1)
        best, first = p.max(-1)
        tokens, parent = tree.tokens[:, 1:], tree.parent[:, 1:]
        above = p.take_along_dim(parent.unsqueeze(2), 1)
        own = above.gather(2, tokens.unsqueeze(2)).squeeze(2) + self.relax(above, tokens)[0]
        best, first = best.gather(1, parent), first.gather(1, parent)
        # Of equal ones the first counts, as it does for `argmax`.
        right = (own > best) | (tokens == first) | ((own == best) & (tokens < first))
        right = torch.cat([torch.ones_like(right[:, :1]), right], 1)
        visible = tree.visible
        reached = (right.unsqueeze(1) | ~visible).all(2)
        node = torch.where(reached, tree.depth, -1).argmax(1)
        row = torch.arange(len(p), device=p.device)
        return visible[row, node], node, scores[row, node].argmax(-1)

    def _static(self, rows: Decoding, draft: _Draft) -> Tree:
        """A tree of `self.tree`'s shape; children are drawn, or the most probable ones where rows are greedy."""
        shape = [(), *self.tree]
        number = {node: index for index, node in enumerate(shape)}
        inner = {node[:-1] for node in shape[1:]}
        batch, device = len(rows.ids), rows.ids.device
        levels = max(map(len, shape))
        parent = torch.tensor([number[node[:-1]] for node in shape], device=device).expand(batch, -1)
        depth = torch.tensor([len(node) for node in shape], device=device).expand(batch, -1)
        tokens = rows.last.expand(-1, len(shape)).clone()
        paths = tokens.new_full((batch, len(shape), levels), -1)
        entry = tokens.new_full((batch, len(shape)), -1)
        scores, seen = draft.root()
        entry[:, 0] = draft.root_entry
        q = scores.new_zeros(batch, len(shape), scores.shape[2]) if rows.sample else None
        fed: list[tuple[int, ...]] = [()]
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
                above = seen[:, [fed.index(node[:-1]) for node in after]]
                scores, seen, begin = draft.feed(tokens[:, numbers], paths[:, numbers, : level + 1], above)
                entry[:, numbers] = begin + torch.arange(len(after), device=device)
                fed = after
        return Tree(tokens, parent, depth, paths, q, entry)

    def _dynamic(self, rows: Decoding, draft: _Draft) -> Tree:
        """The tree of EAGLE-2: its shape follows the draft's probabilities, and differs between rows."""
        batch, device = len(rows.ids), rows.ids.device
        scores, seen = draft.root()
        wide = min(self.branches, scores.shape[2])
        # Nodes fed to the draft last: their numbers (0 is the root), joint log-probabilities and paths.
        fed = torch.zeros(batch, 1, dtype=torch.long, device=device)
        joint, paths = scores.new_zeros(batch, 1), rows.ids.new_empty(batch, 1, 0)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        entry = torch.full((batch, 1 + wide + wide**2 * (self.depth - 1)), -1, device=device)
        entry[:, 0] = draft.root_entry
        count = 1
        for level in range(self.depth):
            best = scores.log_softmax(-1).topk(wide)
            joints = (joint.unsqueeze(2) + best.values).flatten(1)
            paths = torch.cat([paths.repeat_interleave(wide, 1), best.indices.flatten(1).unsqueeze(2)], 2)
            parents = fed.repeat_interleave(wide, 1)
            found.append((joints, parents, paths))
            if level < self.depth - 1:
                joint, chosen = joints.topk(wide)
                paths = paths.take_along_dim(chosen.unsqueeze(2), 1)
                fed = chosen + count
                # Which of the nodes before is each one's parent, for what that has seen.
                above = seen.take_along_dim((chosen // wide).unsqueeze(2), 1)
                scores, seen, begin = draft.feed(paths[:, :, -1], paths, above)
                entry.scatter_(1, fed, (begin + torch.arange(wide, device=device)).expand(batch, -1))
            count += joints.shape[1]
        joints = torch.cat([one for one, _, _ in found], 1)
        # Stable, so that a parent comes before a child of the same joint probability.
        picked = joints.argsort(dim=1, descending=True, stable=True)[:, : self.nodes].sort(1).values + 1
        picked = torch.cat([torch.zeros_like(picked[:, :1]), picked], 1)
        number = torch.zeros(batch, count, dtype=torch.long, device=device)
        number.scatter_(1, picked, torch.arange(picked.shape[1], device=device).expand(batch, -1))

        def gathered(values: list[Tensor], root: Tensor) -> Tensor:
            return torch.cat([root, *values], 1).gather(1, picked)

        zero = torch.zeros(batch, 1, dtype=torch.long, device=device)
        parent = number.gather(1, gathered([one for _, one, _ in found], zero))
        tokens = gathered([one[:, :, -1] for _, _, one in found], rows.last)
        depth = gathered([torch.full_like(one[:, :, 0], one.shape[2]) for _, _, one in found], zero)
        full = [torch.nn.functional.pad(one, (0, self.depth - one.shape[2]), value=-1) for _, _, one in found]
        paths = torch.cat([zero.new_full((batch, 1, self.depth), -1), *full], 1)
        paths = paths.take_along_dim(picked.unsqueeze(2), 1)
        return Tree(tokens, parent, depth, paths, None, entry.gather(1, picked))


def _checked(tree: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Nodes of a static tree, parents before children and siblings in order; InputError where it is none."""
    try:
        nodes = {tuple(whole("tree", rank) for rank in node) for node in tree}
    except TypeError:
        nodes = set()
    before = {node[:-1] for node in nodes} | {(*node[:-1], node[-1] - 1) for node in nodes if node and node[-1]}
    if not nodes or () in nodes or before - nodes - {()}:
        raise InputError(
            "tree must be 'dynamic', 'chain', a name in TREES or a list of nodes, each the ranks on the way to it, "
            "with every parent and every earlier sibling"
        )
    return tuple(sorted(nodes, key=lambda node: (len(node), node)))
