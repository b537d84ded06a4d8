"""PyramidDrop: the language model needs fewer and fewer visual tokens with depth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from foveate.method import (
    Card,
    Claim,
    HostShape,
    InputError,
    Method,
    Stage,
    at,
    at_depth,
    depth,
    floor_share,
    language_layers,
    register,
    share,
)
from foveate.tokens import Tokens, topk_in_order


@register
class PyramidDrop(Method):
    """At the end of each stage of the language model, a fixed share of the visual tokens is dropped.

    After `s` layers, for each s in `layers`, the V visual tokens are ranked by the attention that the instruction
    pays them in the layer about to run, `softmax(q_t k^T / sqrt(d))` over all keys, mean over heads, with t the last
    prompt token (in training: the positions right before each supervised answer, averaged). Stage i goes on with the
    best `int(V * keep^i)`, in their order, renumbered: `(B, V, D) -> (B, int(V * keep^i), D)`. Ranking passes no
    gradient. Text is never touched, and each layer's cache holds just its stage's tokens.

    PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction, CVPR 2025,
    https://arxiv.org/abs/2410.17247, section 3.
    """

    card = Card(
        slug="pyramiddrop",
        title="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
        arxiv="2410.17247", year=2024, kind="reduce", hosts=("hf-vlm",), identity={"keep": 1.0},
        summary="Drops a share of the visual tokens at each quarter of the language model, by instruction attention.",
        parameters={
            "layers": "after how many layers to drop: whole numbers, or shares of the depth (0.25 of 32 is 8)",
            "keep": "share kept at each of them (the paper's lambda), or what is left of V at each, one per layer",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(
                f"MACs of the visual tokens, {label}", "flops", figure, source, tolerance=0.005,
                architecture=architecture, settings=settings, counting="visual-macs", visual=visual,
            )
            for label, figure, source, architecture, settings, visual in (
                ("vanilla", 3.82e12, "Table 1", "llava-1.5-7b", {"keep": 1.0}, 576),
                ("4 stages", 1.78e12, "Table 1", "llava-1.5-7b", {}, 576),
                ("3 stages", 2.13e12, "supplement", "llava-1.5-7b", {"layers": (10, 20)}, 576),
                ("5 stages", 1.39e12, "card (1.38 printed)", "llava-1.5-7b", {"layers": (6, 12, 18, 24)}, 576),
                ("vanilla", 20.8e12, "Table 1", "llava-next-7b", {"keep": 1.0}, 2880),
                ("4 stages", 9.46e12, "Table 1", "llava-next-7b", {}, 2880),
            )
        ),
        *(
            Claim(
                f"visual tokens per layer, {label}", "tokens", figure, "card", tolerance=0, architecture=architecture,
                settings=settings, visual=visual,
            )
            for label, figure, architecture, settings, visual in (
                ("4 stages", 270, "llava-1.5-7b", {}, 576),
                ("3 stages", 324, "llava-1.5-7b", {"layers": (10, 20)}, 576),
                ("5 stages", 211.5, "llava-1.5-7b", {"layers": (6, 12, 18, 24)}, 576),
                ("4 stages", 1350, "llava-next-7b", {}, 2880),
            )
        ),
        Claim(
            "visual KV bytes, 270/576 of the full cache", "kv_bytes", 270 * 524_288, "card", tolerance=0,
            architecture="llava-1.5-7b",
        ),
    )  # fmt: skip

    def __init__(
        self, *, layers: Sequence[int | float] = (0.25, 0.5, 0.75), keep: float | Sequence[float] = 0.5
    ) -> None:
        if not isinstance(layers, list | tuple):
            raise InputError(f"layers must be a list of layers, not {layers!r}")
        self.layers = tuple(depth("layers", layer, least=1) for layer in layers)
        if len(set(self.layers)) != len(self.layers):
            raise InputError(f"layers must not repeat, not {layers!r}")
        if isinstance(keep, Sequence):
            ratios = tuple(share("keep", one) for one in keep)
            if len(ratios) != len(self.layers):
                raise InputError(f"keep has {len(ratios)} ratios for {len(self.layers)} layers")
            if any(later > earlier for earlier, later in pairwise(ratios)):
                raise InputError(f"keep must not grow from layer to layer, not {keep!r}")
            self.keep: float | tuple[float, ...] = ratios
        else:
            self.keep = share("keep", keep)

    @property
    def ratios(self) -> tuple[float, ...]:
        """What is left of V after each of `layers`."""
        if isinstance(self.keep, tuple):
            return self.keep
        return tuple(self.keep ** (i + 1) for i in range(len(self.layers)))

    @classmethod
    def for_budget(cls, budget: float, host: HostShape) -> Method:
        """Four stages. Where the first quarter of the layers alone costs more than the budget, they begin earlier."""
        if share("budget", budget) == 1:
            return cls(keep=1.0)
        count = language_layers(cls.card.slug, host)
        for first in range(max(1, count // 4), 0, -1):
            layers = tuple(s for s in (first, 2 * first, 3 * first) if s < count)

            def spent(keep: float, layers: tuple[int, ...] = layers) -> float:
                return sum(keep ** sum(layer >= s for s in layers) for layer in range(count)) / count

            # At least a tenth at each stage: with less, a stage would be a plain cut.
            if spent(0.1) <= budget:
                low, high = 0.1, 1.0
                for _ in range(50):
                    middle = (low + high) / 2
                    low, high = (middle, high) if spent(middle) < budget else (low, middle)
                return cls(layers=layers, keep=round(low, 4))
        raise InputError(
            f"pyramiddrop cannot spend as little as {budget} of the visual tokens: the first of {count} layers sees all"
        )

    def check(self, host: HostShape) -> None:
        stages = [at_depth("layers", layer, host.llm_layers, least=1) for layer in self.layers]
        if stages != sorted(set(stages)):
            raise InputError(f"layers {self.layers} are {stages} on this host; they must ascend")

    def layers_at(self, stage: str, host: HostShape) -> dict[int, float]:
        """layer -> share of the visual tokens that is left there."""
        # "After s layers" is before the layer with the 0-based number s, whose weights do the ranking.
        stages = {at_depth("layers", s, host.llm_layers): ratio for s, ratio in zip(self.layers, self.ratios)}
        return {layer: ratio for layer, ratio in stages.items() if ratio < 1}

    @at("llm.layer")
    def shrink(self, tokens: Tokens, at: Stage) -> Tokens:
        ratio = self.layers_at(at.name, at.host)[at.layer]
        # Of the V that entered, not of those that are left.
        left = torch.where(at.active, floor_share(at.entered, ratio, least=0), at.entered)
        rank = at.signals.text_to_vision(at.layer)
        return tokens.keep(topk_in_order(rank, left, tokens.valid))
