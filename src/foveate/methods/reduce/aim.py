"""AIM: merge similar visual tokens before the language model, prune the unimportant ones gradually inside it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from foveate.method import (
    Card,
    Claim,
    HostShape,
    Method,
    Stage,
    at,
    at_depth,
    choice,
    depth,
    equal_counts,
    floor_share,
    language_layers,
    register,
    share,
    whole,
    within,
)
from foveate.nn.attention import Attention
from foveate.nn.matching import partners
from foveate.tokens import Tokens, marked, topk_in_order


@register
class Aim(Method):
    """Merges visual tokens by similarity before the language model and prunes them by PageRank inside it.

    Merging: tokens at even positions (A) and at odd positions (B) are compared by the cosine of a metric; the r tokens
    of A that are most similar to their best partner in B are averaged into it, `(B, N, C) -> (B, N - r, C)`. Steps of
    r = N/2 are repeated until `floor(keep * N)` tokens are left. Pruning: from layer l1 on, with M the softmax of the
    layer's attention logits divided by a temperature, a uniform row vector is passed through `v <- (1-d) v M + d/n`
    five times; the importance of a token is the root mean square of v over heads, and after layer l the best
    `floor(V * rho_l)` visual tokens are left, `rho_l = max(0, 1 - (l - l1 + 1) * step)`. Text is never pruned and
    positions stay the original ones.

    AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning, ICCV 2025,
    https://arxiv.org/abs/2412.03248. `metric="keys"` is the released LLaVA-1.5 variant (merging in the vision tower, by
    the keys of its last layer), `metric="features"` the LLaVA-OneVision one (after the projector, by the features).
    """

    card = Card(
        slug="aim", title="AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning",
        arxiv="2412.03248", year=2024, kind="reduce", hosts=("hf-vlm",), identity={"keep": 1.0, "step": 0.0},
        summary="Merges similar visual tokens before the language model, prunes by PageRank on attention inside it.",
        parameters={
            "keep": "share of the tokens of each crop left by merging, in (0, 1]; 1 merges nothing",
            "first_layer": "l1, the first layer after which is pruned: a whole number or a share of the depth",
            "step": "by how much the share of visual tokens falls with each layer from l1 on; 0 prunes nothing",
            "temperature": "divisor of the attention logits",
            "iterations": "steps of the power iteration",
            "damping": "d, the share of the uniform vector in each step, in [0, 1)",
            "metric": "'keys' of the last encoder layer, or the projected 'features' themselves",
            "order": "'released': unmerged tokens first, by similarity; 'spatial': by position",
            "removed": "'drop' pruned tokens from the sequence, or 'mask' them, as the release does",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(
                f"prefill FLOPs as the authors' script charges them, {label}", "flops", figure, source,
                tolerance=0.005, architecture=architecture, settings=settings, counting="llm-viewer-charged",
                visual=visual, text=text,
            )
            for label, figure, source, architecture, settings, visual, text in (
                ("base, 32 frames", 99.63e12, "Table 1", "llava-onevision-7b", {"keep": 1.0, "step": 0.0}, 6272, 100),
                ("AIM", 14.76e12, "Table 1", "llava-onevision-7b", {"keep": 0.25}, 6272, 100),
                ("merge only", 22.90e12, "card", "llava-onevision-7b", {"keep": 0.25, "step": 0.0}, 6272, 100),
                ("prune only", 62.01e12, "card", "llava-onevision-7b", {"keep": 1.0}, 6272, 100),
                ("AIM, 192 frames", 99.27e12, "card", "llava-onevision-7b", {"keep": 0.25}, 37632, 100),
                ("base", 8.18e12, "card", "llava-1.5-7b", {"keep": 1.0, "step": 0.0}, 576, 40),
                ("AIM 43.75 %", 2.22e12, "card", "llava-1.5-7b", {"keep": 0.4375, "first_layer": 13}, 576, 40),
                ("AIM 12.5 %", 1.00e12, "card", "llava-1.5-7b", {"keep": 0.125, "first_layer": 13}, 576, 40),
            )
        ),
        *(
            Claim(
                f"overhead FLOPs of merging and pruning, {label}", "value", figure, "card", tolerance=0.002,
                settings=settings, value=value,
            )
            for label, figure, settings, value in (
                # Merging 88.25 G, pruning 4.18 G. The script charges merging as if the 32 frames were one set of 6272
                # tokens; merging within frames, as it runs, takes 2.89 G.
                ("Qwen2-7B", 92.43e9, {"keep": 0.25},
                 lambda aim: aim.merge_flops(6272, 3584) + aim.prune_flops(1568, 100, 28, 28)),
                ("Vicuna-7B", 0.255e9, {"keep": 0.125, "first_layer": 13},
                 lambda aim: aim.merge_flops(576, 1024) + aim.prune_flops(72, 40, 32, 32)),
            )
        ),
    )  # fmt: skip

    renumbers, forgets = False, True

    def __init__(
        self,
        *,
        keep: float = 0.25,
        first_layer: int | float = 0.5,
        step: float = 0.125,
        temperature: float = 0.1,
        iterations: int = 5,
        damping: float = 0.0,
        metric: str = "keys",
        order: str = "released",
        removed: str = "drop",
    ) -> None:
        self.keep = share("keep", keep)
        self.first_layer = depth("first_layer", first_layer)
        self.step = within("step", step, "[0, 1]")
        self.temperature = within("temperature", temperature, "(0, inf)")
        self.iterations = whole("iterations", iterations, 1)
        self.damping = within("damping", damping, "[0, 1)")
        self.metric = choice("metric", metric, ("keys", "features"))
        self.order = choice("order", order, ("released", "spatial"))
        self.removed = choice("removed", removed, ("drop", "mask"))

    @classmethod
    def for_budget(cls, budget: float, host: HostShape) -> Method:
        """The default pruning; merging takes the rest of the budget. Above what pruning leaves, its step is smaller."""
        share("budget", budget)
        layers = language_layers(cls.card.slug, host)
        for step in (0.125, 0.0625, 0.03125):
            method = cls(keep=1.0, step=step)
            # What is left after a layer is what the next one sees.
            seen = sum([1.0, *(method.retained(layer, layers) for layer in range(layers - 1))]) / layers
            if seen >= budget:
                return cls(keep=round(budget / seen, 4), step=step)
        return cls(keep=budget, step=0.0)

    def check(self, host: HostShape) -> None:
        if self.step:
            at_depth("first_layer", self.first_layer, host.llm_layers)

    def acts_at(self, host: HostShape) -> tuple[str, ...]:
        merging = {"keys": "vision.output", "features": "projector"}[self.metric]
        return (*((merging,) if self.keep < 1 else ()), *(("llm.layer",) if self.step else ()))

    def layers_at(self, stage: str, host: HostShape) -> Collection[int] | None:
        if stage != "llm.layer":
            return None
        # A decision made on layer l takes effect at the next one; what follows the last one has no effect.
        return [layer + 1 for layer in range(host.llm_layers - 1) if self._prunes(layer, host.llm_layers)]

    def reads(self, host: HostShape) -> tuple[str, ...]:
        keys = (f"vision.attention[{host.vision_layers - 1}]",) if self.keep < 1 and self.metric == "keys" else ()
        prunes = self.layers_at("llm.layer", host) or ()
        return (*keys, *(f"llm.attention[{layer - 1}]" for layer in prunes))

    @at("vision.output")
    def merge_by_keys(self, tokens: Tokens, at: Stage) -> Tokens:
        return self._merge(tokens, at, at.signals.keys(at.host.vision_layers - 1))

    @at("projector")
    def merge_by_features(self, tokens: Tokens, at: Stage) -> Tokens:
        return self._merge(tokens, at, tokens.x)

    def _merge(self, tokens: Tokens, at: Stage, metric: Tensor) -> Tokens:
        equal_counts(self.card.slug, tokens, at)
        target = merged_count(tokens.x.shape[1], self.keep)
        while (count := tokens.x.shape[1]) > target:
            into = partners(metric, count - target, "place" if self.order == "spatial" else "similarity")
            left = max(target, count - count // 2)
            if left > target:
                # Another step follows: the metric is merged along, so that it stays that of the merged tokens.
                metric = tokens.with_x(metric).merge(into, groups=left, full=True).x
            tokens = tokens.merge(into, groups=left, full=True)
        return tokens

    @at("llm.layer")
    def prune(self, tokens: Tokens, at: Stage) -> Tokens:
        layer = at.layer - 1
        attention = at.signals.attention(layer)
        score = importance(attention, self.temperature, self.iterations, self.damping).gather(1, attention.visual)
        ratio = self.retained(layer, at.host.llm_layers)
        left = torch.where(at.active, floor_share(at.entered, ratio, least=0), at.entered)
        chosen = topk_in_order(score, left, tokens.valid)
        if self.removed == "drop":
            return tokens.keep(chosen)
        return hide_others(tokens, chosen)

    def retained(self, layer: int, layers: int) -> float:
        """rho_l, the share of visual tokens that is left after layer l of `layers`."""
        first = at_depth("first_layer", self.first_layer, layers)
        return 1.0 if layer < first else max(0.0, 1 - (layer - first + 1) * self.step)

    def _prunes(self, layer: int, layers: int) -> bool:
        if not self.step:
            return False
        before = self.retained(layer - 1, layers) if layer else 1.0
        return self.retained(layer, layers) < before

    def charged_tokens(self, visual: int, depth: int) -> list[int]:
        """Visual tokens of each layer as the authors' script counts them: rho_l already at layer l, not after it."""
        merged = merged_count(visual, self.keep)
        return [int(merged * (self.retained(layer, depth) if self.step else 1.0) + 1e-9) for layer in range(depth)]

    def merge_flops(self, count: int, width: int) -> float:
        """FLOPs of merging `count` tokens of `width` channels, by the authors' formula."""
        total, target = 0.0, merged_count(count, self.keep)
        while count > target:
            total += 2 * (count / 2) ** 2 * width + 4 * count * width
            count -= min(count // 2, count - target)
        return total

    def prune_flops(self, visual: int, text: int, depth: int, heads: int) -> float:
        """FLOPs of pruning, by the authors' formula: once at full length, then at each layer with 0 < rho < 1."""
        shares = [self.retained(layer, depth) for layer in range(depth)]
        lengths = [visual + text, *(int(visual * rho) + text for rho in shares if 0 < rho < 1)]
        per = 6 * heads + 2 * self.iterations * heads
        return float(sum(per * n * n + (2 * heads + 1) * n for n in lengths))


def merged_count(count: int, keep: float) -> int:
    """How many of `count` tokens merging leaves: `floor(keep * count)`, at least 1."""
    return max(1, int(count * keep + 1e-9))


def importance(attention: Attention, temperature: float, iterations: int, damping: float) -> Tensor:
    """(B, S) in [0, 1]: PageRank of each token on the attention of one layer, root mean square over heads."""
    batch, length = attention.query.shape[0], attention.length
    present = attention.present
    if present is None:
        present = torch.ones(batch, length, dtype=torch.bool, device=attention.query.device)
    uniform = present.float() / present.sum(1, keepdim=True)
    return attention.walk(uniform, iterations, damping, temperature).square().mean(1).sqrt()


def hide_others(tokens: Tokens, chosen: Tensor) -> Tokens:
    """The same tokens, with all but those at `chosen` (B, K) hidden from attention instead of removed."""
    return replace(tokens, valid=marked(chosen, tokens.x.shape[1]))
