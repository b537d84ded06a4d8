"""What the stages "llm.attention" and "llm.mlp" hand to a method: a call that it may change, replace or let through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate.tokens import Tokens


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of a layer's attention: R queries, which are the last of S keys.

    Attributes:
        query: (B, H, R, D) after position encoding.
        key, value: (B, G, S, D), G dividing H; the cache's entries come first.
        mask: what the model itself would use: (B, 1, R, S), bool (True is seen) or added to the logits; None is causal.
        scaling: factor on the logits.
        tokens: the visual tokens among the keys, without features: x is (B, N, 0).
        visual: (B, N) long, the key that each of them is; -1 for padding.
        patches: (B,) long, how many of `tokens.source` are patches; the others stand for tokens that are none.
        prompt: (B, S) bool, keys that are tokens of the prompt: neither padding nor generated.
        function: the model's own attention: (query, key, value, mask) -> (B, R, H, D).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    tokens: Tokens
    visual: Tensor
    patches: Tensor
    prompt: Tensor
    function: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

    def run(
        self,
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, R, H, D): the model's attention, with some of its arguments replaced."""
        return self.function(
            self.query if query is None else query,
            self.key if key is None else key,
            self.value if value is None else value,
            self.mask if mask is None else mask,
        )

    @property
    def is_visual(self) -> Tensor:
        """(B, S) bool: which keys are visual tokens."""
        length = self.key.shape[2]
        marked = torch.zeros(len(self.visual), length + 1, dtype=torch.bool, device=self.visual.device)
        return marked.scatter(1, torch.where(self.visual >= 0, self.visual, length), True)[:, :-1]

    @property
    def on_patch(self) -> Tensor:
        """(B, N) bool: which visual tokens carry a patch, unlike newlines and padding."""
        source, count = self.tokens.source, self.visual.shape[1]
        number = torch.arange(source.shape[1], device=source.device)
        carrier = torch.where((source >= 0) & (number < self.patches.unsqueeze(1)), source, count)
        marked = torch.zeros(len(source), count + 1, dtype=torch.bool, device=source.device)
        return marked.scatter(1, carrier, True)[:, :-1]

    @property
    def rows(self) -> Tensor:
        """(R,) long: the keys that the queries are themselves."""
        length = self.key.shape[2]
        return torch.arange(length - self.query.shape[2], length, device=self.key.device)

    def visible(self) -> Tensor:
        """(B or 1, 1, R, S) bool: which keys each query sees."""
        causal = torch.arange(self.key.shape[2], device=self.key.device) <= self.rows[:, None]
        if self.mask is not None and self.mask.ndim == 2:
            # FlashAttention's form: which keys there are.
            return causal & self.mask.bool()[:, None, None]
        if self.mask is not None:
            return self.mask if self.mask.dtype == torch.bool else self.mask > torch.finfo(self.mask.dtype).min / 2
        return causal[None, None]

    def weights(self, rows: Tensor) -> Tensor:
        """(B, H, K, S) float32 attention of the queries number `rows` (K,) of R."""
        batch, heads, _, width = self.query.shape
        groups = self.key.shape[1]
        # Queries of a group share a key: fold them instead of repeating the keys.
        query = self.query[:, :, rows].reshape(batch, groups, heads // groups * len(rows), width)
        logits = (query.float() @ self.key.float().transpose(-1, -2)).reshape(batch, heads, len(rows), -1)
        seen = self.visible()[:, :, rows]
        return (logits * self.scaling).masked_fill(~seen, torch.finfo(torch.float32).min).softmax(-1)


@dataclass(frozen=True, eq=False)
class MlpCall:
    """One call of a layer's MLP.

    Attributes:
        hidden: (B, R, D), after the norm.
        module: the MLP; Llama's and Qwen2's have `gate_proj`, `up_proj`, `down_proj` and `act_fn`.
        is_visual: (B, R) bool, which of them are visual tokens.
        function: the MLP itself.
    """

    hidden: Tensor
    module: nn.Module
    is_visual: Tensor
    function: Callable[[Tensor], Tensor]
