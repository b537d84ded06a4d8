"""VTC-CLS: the class token's attention, summed over the encoder's late layers, picks the patches."""

from __future__ import annotations

import torch

from foveate.method import (
    Card,
    Claim,
    HostShape,
    InputError,
    Method,
    Stage,
    at,
    choice,
    floor_share,
    register,
    share,
    whole,
)
from foveate.tokens import Tokens, topk_in_order


@register
class VtcCls(Method):
    """Keeps the patches that the class token attends to most, over several layers of the vision encoder.

    With `a_l (B, N)` the attention of the class token to the patches in layer l, averaged over heads, the score is
    `s = sum_{l = e-K+1 .. e} a_l`, where e is the layer whose features the model uses (22 of CLIP-L's 24; the last
    layer stays out). The U patches with the highest score are kept, in raster order and unchanged:
    `(B, N, C) -> (B, U, C)`. The choice does not depend on the question.

    [CLS] Token Tells Everything Needed for Training-free Efficient MLLMs, https://arxiv.org/abs/2412.05819. The paper's
    scripts fix no K; 4 is this project's choice. An encoder without class token (SigLIP) is scored by the attention
    that each patch receives from all others instead, which is this project's substitute.
    """

    card = Card(
        slug="vtc-cls", title="[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs",
        arxiv="2412.05819", year=2024, kind="reduce", hosts=("hf-vlm", "hf-vision", "hf-video", "timm"),
        identity={"keep": 1.0}, summary="Keeps the patches with most class-token attention, summed over late layers.",
        parameters={
            "keep": "share of the patches of each crop that is kept, in (0, 1]; the paper's 256 of 576 is 4/9",
            "tokens": "number U of patches kept of each crop; overrides keep",
            "layers": "K, how many layers are summed, ending with the one whose features are used",
            "combine": "'sum' over layers (the paper), or their 'max' or 'min' (named in the release)",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(
                f"MACs of the visual tokens, U = {tokens}", "flops", figure, "card", tolerance=0.002,
                architecture="llava-1.5-7b", settings={"tokens": tokens}, counting="visual-macs",
            )
            for tokens, figure in ((576, 3.817e12), (256, 1.675e12), (128, 0.833e12), (64, 0.416e12))
        ),
        *(
            Claim(
                f"visual KV bytes, fp16, U = {tokens}", "kv_bytes", mebibytes * 2**20, "card", tolerance=0,
                architecture="llava-1.5-7b", settings={"tokens": tokens},
            )
            for tokens, mebibytes in ((576, 288), (256, 128), (128, 64), (64, 32))
        ),
        *(
            Claim(
                f"MACs of the projector, U = {tokens}", "flops", 12.08e9 * tokens / 576, "card", tolerance=0.001,
                architecture="llava-1.5-7b", settings={"tokens": tokens}, counting="projector-macs",
            )
            for tokens in (576, 256, 128, 64)
        ),
    )  # fmt: skip

    def __init__(
        self, *, keep: float = 4 / 9, tokens: int | None = None, layers: int = 4, combine: str = "sum"
    ) -> None:
        self.keep = share("keep", keep)
        self.tokens = tokens if tokens is None else whole("tokens", tokens, 1)
        self.layers = whole("layers", layers, 1)
        self.combine = choice("combine", combine, ("sum", "max", "min"))

    @classmethod
    def for_budget(cls, budget: float, host: HostShape) -> Method:
        """The budget is spent at the entry; fewer than four layers are summed where the encoder is short."""
        return cls(keep=share("budget", budget), layers=min(4, host.feature_layer + 1))

    def check(self, host: HostShape) -> None:
        if self.layers > host.feature_layer + 1:
            raise InputError(
                f"layers={self.layers}: the encoder has {host.feature_layer + 1} layers up to the one that is used"
            )

    def reads(self, host: HostShape) -> tuple[str, ...]:
        return () if self._keeps_all else tuple(f"vision.attention[{layer}]" for layer in self._window(host))

    @at("vision.output")
    def prune(self, tokens: Tokens, at: Stage) -> Tokens:
        if self._keeps_all:
            return tokens
        attention = torch.stack([_attended(layer, at) for layer in self._window(at.host)])
        score = {"sum": attention.sum(0), "max": attention.amax(0), "min": attention.amin(0)}[self.combine]
        budget = floor_share(tokens.count, self.keep) if self.tokens is None else self.tokens
        return tokens.keep(topk_in_order(score, budget, tokens.valid))

    @property
    def _keeps_all(self) -> bool:
        return self.tokens is None and self.keep == 1

    def _window(self, host: HostShape) -> range:
        return range(host.feature_layer - self.layers + 1, host.feature_layer + 1)


def _attended(layer: int, at: Stage) -> torch.Tensor:
    """(B, N): what the class token pays each patch; without one, what each patch receives from all (ours)."""
    if at.host.class_token:
        return at.signals.cls_attention(layer)
    return at.signals.received(layer)
