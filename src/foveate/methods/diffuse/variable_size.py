"""Attention entropy scaling: sizes that a diffusion model was not trained at, by a factor on attention's logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.method import Card, Claim, HostShape, InputError, Method, Stage, at, register
from foveate.nn.calls import DenoiserAttention


def attention_factor(keys: int | Tensor, trained: int | Tensor) -> Any:
    """`sqrt(ln N / ln T)`, what the logits of a layer with N keys instead of T are multiplied by; 1 at N or T below 2.

    A float of two ints, otherwise a float32 tensor.
    """
    if isinstance(keys, int) and isinstance(trained, int):
        return math.sqrt(math.log(keys) / math.log(trained)) if min(keys, trained) > 1 else 1.0
    n, t = torch.as_tensor(keys), torch.as_tensor(trained)
    known = (n > 1) & (t > 1)
    ratio = n.clamp(min=2).float().log() / t.clamp(min=2).float().log()
    return torch.where(known, ratio.sqrt(), 1.0)


def attention_scale(keys: int, trained: int, width: int) -> float:
    """`lambda = sqrt(log_T(N) / d)`: the `scale` of a fused attention with heads of width d."""
    return float(attention_factor(keys, trained)) / math.sqrt(width)


def entropy(keys: int, factor: float = 1.0, *, queries: int = 256, width: int = 40, std: float = 1.5) -> float:
    """Mean entropy in nats of `queries` rows of attention to that many random keys, in float64.

    Queries and keys are normal with standard deviation `std`, the same ones in each call.
    """
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(queries, width, generator=generator, dtype=torch.float64) * std
    key = torch.randn(keys, width, generator=generator, dtype=torch.float64) * std
    rows = (query @ key.T * (factor / math.sqrt(width))).log_softmax(-1)
    return float(-(rows.exp() * rows).sum(-1).mean())


def _factor(keys: int, trained: int) -> Callable[[Any], float]:
    return lambda method: float(attention_factor(keys, trained))


def _entropy(keys: int, trained: int | None) -> Callable[[Any], float]:
    return lambda method: entropy(keys, 1.0 if trained is None else attention_factor(keys, trained))


@register
class VariableSize(Method):
    """Pictures of other sizes and shapes than a diffusion model was trained at, with the attention's entropy kept.

    A row A_i of attention to N keys has the entropy `H_i = - sum_j A_ij ln A_ij`, which grows with ln N: objects are
    incomplete in pictures smaller than those of the training, and repeated in larger ones. In each self-attention layer
    the logits are therefore scaled by `lambda = sqrt(log_T(N) / d)` instead of `1 / sqrt(d)`, with N the layer's keys
    and T those that it has at the size of the training: `softmax(lambda Q K^T) V`, which is the model itself at N = T.
    Larger pictures get sharper attention, smaller ones smoother. Every layer has its own N and T, of its own grid;
    cross-attention to text stays as it is, since the text does not grow. Nothing is trained, and nothing costs more.

    Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis, NeurIPS 2023,
    https://arxiv.org/abs/2306.08645. T is counted at the `sample_size` of the denoiser's configuration. The queries are
    what is scaled, behind their norm, which changes the logits of any attention processor alike. `attention_scale` is
    lambda itself, for other code.

    Ours: where text and picture share one attention (Stable Diffusion 3, Lumina2), the text counts in N and in T and
    its queries are scaled too. Padding does not count, and where tokens were merged or dropped before the layer, N is
    what is left of them. Lumina's own proportional attention is the same rule: it is not applied twice.
    """

    card = Card(
        slug="variable-size",
        title="Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis",
        arxiv="2306.08645", year=2023, kind="diffuse", hosts=("diffusers",),
        summary="Scales self-attention so that a diffusion model draws sizes and shapes it was not trained at.",
    )  # fmt: skip

    claims = (
        *(
            Claim(
                f"factor at {side}², of {trained} tokens at 512²", "value", figure, "card", tolerance=1e-4,
                value=_factor(keys, trained),
            )
            for side, counts, figures in (
                # The last grid is 4 x 4: half of 7 rounds up.
                (224, (28**2, 14**2, 7**2, 4**2), (0.8951, 0.8726, 0.8378, 0.8165)),
                (256, (32**2, 16**2, 8**2, 4**2), (0.9129, 0.8944, 0.8660, 0.8165)),
                (512, (64**2, 32**2, 16**2, 8**2), (1.0, 1.0, 1.0, 1.0)),
                (768, (96**2, 48**2, 24**2, 12**2), (1.0476, 1.0569, 1.0706, 1.0932)),
                (1024, (128**2, 64**2, 32**2, 16**2), (1.0801, 1.0954, 1.1180, 1.1547)),
            )
            for keys, trained, figure in zip(counts, (4096, 1024, 256, 64), figures)
        ),
        *(
            Claim(
                f"entropy in nats of attention to {keys} random keys, {label}", "value", figure, "card", tolerance=0.05,
                value=_entropy(keys, trained),
            )
            for label, trained, figures in (
                ("scale 1 / √d", None, (2.50, 3.33, 4.57, 5.98, 7.20)),
                ("scaled for T = 1024", 1024, (2.93, 3.84, 4.65, 5.46, 6.30)),
            )
            for keys, figure in zip((64, 256, 1024, 4096, 16384), figures)
        ),
    )  # fmt: skip

    def check(self, host: HostShape) -> None:
        if 0 in host.grid:
            raise InputError(
                "variable-size has to know the size that the model was trained at: the configuration of this denoiser "
                "has no sample_size; set it with register_to_config(sample_size=…)"
            )

    @at("denoiser.attention")
    def scale(self, attention: DenoiserAttention, at: Stage) -> Any:
        own = attention.arguments.get("base_sequence_length") is not None
        if own or (isinstance(attention.image, int) and attention.image == 0):
            return attention.function()
        return attention.function(attention_factor(attention.keys, attention.keys - attention.image + attention.native))
