"""LANTERN: speculative decoding of image tokens that counts a drafted code's neighbours in the codebook as well.

A draft's token x ~ q is accepted if `u <= p'(x) / q(x)`, where `p'(x) = p(x) + sum_j<=i p(n_j)` borrows from its
nearest codes n_j as much as keeps p' within `delta` of p in total variation. ids (B, S) -> (B, S + N); see `Lantern`,
below the trees of drafted tokens that it works on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from foveate.method import Card, Claim, InputError, Published, choice, configured, register, whole, within
from foveate.nn.draft_tree import Draft, FeatureDraft, Node, Tree, dynamic_tree, static_shape, static_tree
from foveate.nn.speculative import DecodeReport, Decoding, draw, normalised

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llamagen-xl": {},
    "anole-7b": {"offset": 4},
    "lumina-mgpt-7b": {"offset": 4},
}
"""The paper's hosts by name: they differ in where image codes begin in the vocabulary."""

GENERATION: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 2000, "top_p": 1.0, "guidance_scale": 3.0}
"""Arguments of `generate` in the paper's runs; sampling ones only where they sample."""

TREES: dict[str, tuple[Node, ...]] = {
    "eagle": (
        (0,), (1,), (2,), (3,), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (0, 0, 0), (0, 0, 1),
        (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0), (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2),
        (0, 0, 0, 0, 0), (0, 0, 0, 0, 1),
    ),
}  # fmt: skip
"""Static trees by name: that of EAGLE, the release's default."""


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


class EagleDraft(nn.Module, PyTorchModelHubMixin):
    """The release's drafter: one decoder layer on `[word x_(t+1), feature f_t]` foretells the feature f_(t+1).

    A feature is what the model's head reads; words and head are the model's own, and frozen. Shapes (B, L, width).
    Trained by `loss`; the release does so with AdamW, lr 1e-4, betas (0.9, 0.95), 20 epochs, linear warm-up over 0.03
    of one, gradients clipped to 0.5 each.

    Args:
        width: of the model. heads, mlp: of the layer. The defaults are LlamaGen-XL's.
    """

    def __init__(self, *, width: int = 1280, heads: int = 20, mlp: int = 3584) -> None:
        super().__init__()
        if whole("width", width, 1) % (2 * whole("heads", heads, 1)):
            raise InputError(f"width must be a multiple of 2 * heads, not {width} with {heads} heads")
        self.join = nn.Linear(2 * width, width)
        config = LlamaConfig(
            vocab_size=1, hidden_size=width, intermediate_size=whole("mlp", mlp, 1), num_hidden_layers=1,
            num_attention_heads=heads, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        self.layer = LlamaModel(config)
        del self.layer.embed_tokens
        # The model's head takes features as they are.
        self.layer.norm = nn.Identity()

    def forward(
        self, words: Tensor, features: Tensor, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None,
    ) -> Tensor:  # fmt: skip
        """Features of the next tokens."""
        return self.layer(
            inputs_embeds=self.join(torch.cat([words, features], 2)), attention_mask=attention_mask,
            position_ids=position_ids, past_key_values=past_key_values, use_cache=past_key_values is not None,
        ).last_hidden_state  # fmt: skip

    def loss(
        self, model: Any, ids: Tensor, mask: Tensor | None = None, noise: float = 0.2
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Smooth L1 of the features plus 0.1 cross entropy to the model's own distribution; the scalar and its parts.

        Args:
            ids, mask: (B, L) texts, padded on the left.
            noise: width of the uniform noise that is added to the features put in.
        """
        mask = torch.ones_like(ids) if mask is None else mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
            features, words = output.hidden_states[-1], model.get_input_embeddings()(ids)
            target = output.logits[:, 1:].float().softmax(-1)
        given = features[:, :-1] + (torch.rand_like(features[:, :-1]) - 0.5) * noise
        predicted = self(words[:, 1:], given, mask[:, :-1], positions[:, :-1])
        logits = model.get_output_embeddings()(predicted).float()
        counts = mask[:, :-1].bool()
        regression = F.smooth_l1_loss(predicted[counts], features[:, 1:][counts])
        entropy = F.cross_entropy(logits[counts], target[counts])
        return regression + 0.1 * entropy, {"feature": regression, "token": entropy}


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
            "draft": "a smaller causal model of the same vocabulary, or an `EagleDraft`, on the same device",
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
        self.tree = tree
        # None where the draft decides.
        self.shape: tuple[Node, ...] | None = None
        if not isinstance(tree, str):
            self.shape = static_shape(tree)
        elif choice("tree", tree, ("dynamic", "chain", *TREES)) != "dynamic":
            self.shape = TREES.get(tree) or tuple((0,) * level for level in range(1, depth + 1))
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
        learned = isinstance(self.draft, EagleDraft)
        self._check(model, learned)
        rows = Decoding(
            "lantern", model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
        )  # fmt: skip
        self.report = rows.report
        cached = rows.cached(model, keep_features=learned)
        scores = rows.scores(cached.prefill(), input_ids.new_empty(len(input_ids), 1, 0))
        rows.report.calls += 1
        draft = FeatureDraft(rows, self.draft, cached) if learned else Draft(rows, self.draft)
        first = draw(scores.softmax(-1)) if rows.sample else scores.argmax(-1)
        rows.append(first, torch.ones_like(rows.length))
        while bool(rows.live.any()):
            if self.shape is None:
                tree = dynamic_tree(rows, draft, nodes=self.nodes, depth=self.depth, branches=self.branches)
            else:
                tree = static_tree(rows, draft, self.shape)
            # A chain needs no mask of its own.
            visible = tree.visible if tree.children.shape[2] > 1 else None
            scores = rows.scores(cached.score(tree.tokens, tree.depth, visible), tree.paths)
            rows.report.calls += 1
            kept, node, token = self._sample(tree, scores.softmax(-1)) if rows.sample else self._greedy(tree, scores)
            accepted = kept.sum(1, keepdim=True) - 1
            path = tree.paths.take_along_dim(node[:, None, None], 1).squeeze(1)
            tokens = F.pad(path, (0, 1)).scatter(1, accepted, token.unsqueeze(1))
            rows.report.emitted.append(rows.append(tokens, accepted.squeeze(1) + 1))
            cached.keep(kept)
            draft.keep(tree, kept, node, cached.features if learned else None)
        return rows.result(cached.cache)

    def _check(self, model: Any, learned: bool) -> None:
        config = model.config.get_text_config()
        if learned:
            if self.draft.join.out_features != config.hidden_size:
                raise InputError(f"the draft must be as wide as the model, {config.hidden_size}")
        elif self.draft.config.get_text_config().vocab_size != config.vocab_size:
            raise InputError(f"the draft must have the model's {config.vocab_size} tokens")
        if self.table is not None and self.offset + len(self.table) > config.vocab_size:
            raise InputError(
                f"{len(self.table)} codes from token {self.offset} on: this model has {config.vocab_size} tokens"
            )

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
        if self.table.dtype == torch.uint16:
            # Unsigned rows cannot be looked up on every device.
            return (self.table.view(torch.int16)[code].long() & 0xFFFF) + self.offset
        return self.table[code].long() + self.offset

    def rejected(self, p: Tensor, x: Tensor, lent: Tensor, q: Tensor | None) -> Tensor:
        """(B, V) what is left of p (B, V) behind the rejection of x (B,), which had borrowed of `lent` (B, K).

        `q` (B, V) is what x was drawn from; None where it was not drawn.
        """
        alone = p.scatter(1, x.unsqueeze(1), 0.0)
        left = alone
        if self.table is not None:
            near, taken = self._neighbours(x), lent
            if self.residual == "released":
                taken = lent.any(1, keepdim=True).expand_as(lent)
                if q is not None:
                    q = q.scatter(1, near, torch.where(taken, 0.0, q.gather(1, near)))
                    taken = torch.zeros_like(taken)
            left = left.scatter(1, near, torch.where(taken, 0.0, left.gather(1, near)))
        # Rounding, or the release's zeros, may leave nothing.
        return normalised(left if q is None else (left - q).clamp(min=0), alone, p)

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
