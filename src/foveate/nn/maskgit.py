"""Masked generation of ids, after MaskGIT: K ids at once, the surest kept in each of a few steps.

With r the share of steps that are done, `arccos(r) / (pi / 2)` of the ids are masked, in training (r uniform) and in
sampling alike. `MaskedGenerator` is the transformer with its loss, `Sampling` how ids are drawn from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.method import InputError, choice, whole, within
from foveate.nn.vit import need_timm


def masked_share(ratio: Tensor) -> Tensor:
    """arccos(r) / (pi / 2), from 1 at r = 0 to 0 at r = 1."""
    return torch.arccos(ratio) / (math.pi / 2)


def schedule(tokens: int, steps: int) -> list[int]:
    """How many of `tokens` ids are masked after each step, strictly decreasing to 0.

    floor(tokens * share), at least one id being found in every step, and at least one left for the next.
    """
    if whole("steps", steps, 1) > whole("tokens", tokens, 1):
        raise InputError(f"steps must be at most the {tokens} ids, of which each step finds one, not {steps}")
    masked = [tokens]
    for step in range(1, steps):
        share = math.acos(step / steps) / (math.pi / 2)
        masked.append(max(1, min(masked[-1] - 1, math.floor(tokens * share))))
    return [*masked[1:], 0]


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn.

    Attributes:
        steps: how many, at most as many as ids.
        temperature: of the Gumbel noise on logits and on confidences; multiplied with 1 - r, 0 in the last step.
        guidance_scale: see `guidance`.
        guidance: "constant" or "linear": `c + s (c - u)` of logits c with the class and u without, s being
            `guidance_scale`, or that times the share of steps already done; 0 is no guidance. "power-cosine":
            `u + s (c - u)`, s rising from 1 to `guidance_scale` as `1 + (guidance_scale - 1) (1 - cos(pi r'^p)) / 2`
            with r' the share of steps already done; 1 is no guidance.
        power: p of "power-cosine".
        anneal: whether logits are divided by 0.5 + 0.8 (1 - r).
    """

    steps: int = 8
    temperature: float = 4.5
    guidance_scale: float = 3.0
    guidance: str = "constant"
    power: float = 3.0
    anneal: bool = False

    def __post_init__(self) -> None:
        whole("steps", self.steps, 1)
        within("temperature", self.temperature, "[0, inf)")
        within("guidance_scale", self.guidance_scale, "[0, inf)")
        choice("guidance", self.guidance, ("constant", "linear", "power-cosine"))
        within("power", self.power, "(0, inf)")

    def scale(self, step: int) -> float:
        """s of 0-based `step`."""
        done = step / self.steps
        if self.guidance == "power-cosine":
            return 1 + (self.guidance_scale - 1) * (1 - math.cos(math.pi * done**self.power)) / 2
        return self.guidance_scale * (done if self.guidance == "linear" else 1)


class MaskedGenerator(nn.Module, PyTorchModelHubMixin, library_name="foveate"):
    """Partly masked ids (B, K) and a class (B,) to logits (B, K, codes) of every id, by a transformer without a mask.

    It reads [class, K ids]. Its table of words has the codes, the mask (number `codes`), the classes, and one that says
    that there is none, which is class number `classes`.

    Args:
        tokens, codes, classes: K, codes, classes.
        backbone: "bert", transformers' `BertModel`, or "uvit", pre-norm blocks of timm, `layers` / 2 on each side of a
            middle one, with long skips: `W [x, skip]` before each block of the second half.
        width, layers, heads: of the backbone; its MLPs are four times as wide.
        dropout: of "bert".
        drop_class: how often the class is dropped in training.
        smoothing: of labels.
        unmasked_weight: of ids that are not masked in the loss.
    """

    def __init__(
        self, *, tokens: int = 32, codes: int = 4096, classes: int = 1000, backbone: str = "bert", width: int = 768,
        layers: int = 24, heads: int = 16, dropout: float = 0.1, drop_class: float = 0.1, smoothing: float = 0.1,
        unmasked_weight: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens, self.codes = whole("tokens", tokens, 1), whole("codes", codes, 2)
        self.classes = whole("classes", classes, 1)
        self.drop_class = within("drop_class", drop_class, "[0, 1)")
        self.smoothing = within("smoothing", smoothing, "[0, 1)")
        self.unmasked_weight = within("unmasked_weight", unmasked_weight, "[0, 1]")
        within("dropout", dropout, "[0, 1)")
        if whole("width", width, 1) % whole("heads", heads, 1):
            raise InputError(f"width must be a multiple of heads, not {width} with {heads}")
        words, length = codes + 1 + classes + 1, tokens + 1
        if choice("backbone", backbone, ("bert", "uvit")) == "bert":
            self.backbone: nn.Module = _bert(words, length, width, whole("layers", layers, 1), heads, dropout)
        else:
            self.backbone = _UVit(words, length, width, whole("layers", layers, 2), heads)
        self.head = nn.Linear(width, codes)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def forward(self, ids: Tensor, label: Tensor) -> Tensor:
        """ids (B, K) in 0..codes, `codes` being the mask; label (B,) in 0..classes, `classes` being none."""
        if ids.ndim != 2 or ids.shape[1] != self.tokens or label.shape != ids.shape[:1]:
            wanted = f"(B, {self.tokens}) and (B,)"
            raise InputError(f"ids and label must be {wanted}, not {tuple(ids.shape)} and {tuple(label.shape)}")
        words = torch.cat([label.unsqueeze(1) + self.codes + 1, ids], 1)
        states = self.backbone(words)
        logits: Tensor = self.head(states if isinstance(states, Tensor) else states.last_hidden_state)[:, 1:]
        return logits

    def draw_mask(self, batch: int) -> Tensor:
        """(B, K) bool for training: each row masks a share of its own, one id at least."""
        share = masked_share(torch.rand(batch, device=self.device))
        count = (self.tokens * share).round().clamp(min=1)
        return torch.rand(batch, self.tokens, device=self.device).argsort(1) < count.unsqueeze(1)

    def loss(self, ids: Tensor, label: Tensor, masked: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy of ids (B, K), weighted, with some masked; and "accuracy" on those, "masked", their share."""
        masked = self.draw_mask(len(ids)) if masked is None else masked
        if self.training:
            dropped = torch.rand(len(label), device=label.device) < self.drop_class
            label = label.masked_fill(dropped, self.classes)
        logits = self(ids.masked_fill(masked, self.codes), label)
        each = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none", label_smoothing=self.smoothing)
        weight = torch.where(masked, 1.0, self.unmasked_weight)
        right = (logits.argmax(-1) == ids)[masked].float().mean()
        return (each * weight).sum() / weight.sum(), {"accuracy": right, "masked": masked.float().mean()}

    @torch.no_grad()
    def generate(
        self, label: Tensor, sampling: Sampling | None = None, *, generator: torch.Generator | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, K) ids of pictures of the classes label (B,) in 0..classes.

        In each step every masked id is drawn, by Gumbel-max, and those with the lowest logits, noise of the same
        strength added once more, are masked again. `on_step` is told the 0-based step and the ids after it.
        """
        sampling = sampling or Sampling()
        plan = schedule(self.tokens, sampling.steps)
        if label.ndim != 1 or label.dtype != torch.long or bool(((label < 0) | (label > self.classes)).any()):
            raise InputError(f"label must be (B,) whole numbers in 0..{self.classes}, of dtype long")
        label = label.to(self.device)
        ids = torch.full((len(label), self.tokens), self.codes, device=self.device)
        for step, left in enumerate(plan):
            remaining = 1 - (step + 1) / sampling.steps
            logits = self._guided(ids, label, sampling, step).float()
            if sampling.anneal:
                logits = logits / (0.5 + 0.8 * remaining)
            noise = sampling.temperature * remaining
            drawn = _noisy(logits, noise, generator).argmax(-1)
            confidence = _noisy(logits.gather(2, drawn.unsqueeze(2)).squeeze(2), noise, generator)
            masked = ids == self.codes
            ids = torch.where(masked, drawn, ids)
            again = confidence.masked_fill(~masked, math.inf).argsort(1)[:, :left]
            ids = ids.scatter(1, again, self.codes)
            if on_step is not None:
                on_step(step, ids)
        return ids

    def _guided(self, ids: Tensor, label: Tensor, sampling: Sampling, step: int) -> Tensor:
        scale, from_none = sampling.scale(step), sampling.guidance == "power-cosine"
        if scale == (1 if from_none else 0):
            return self(ids, label)
        none = torch.full_like(label, self.classes)
        given, free = self(torch.cat([ids, ids]), torch.cat([label, none])).chunk(2)
        return (free if from_none else given) + scale * (given - free)


def _noisy(x: Tensor, strength: float, generator: torch.Generator | None) -> Tensor:
    """x plus `strength` times Gumbel noise."""
    if strength == 0:
        return x
    uniform = torch.rand(x.shape, generator=generator, device=generator.device if generator else x.device).to(x.device)
    return x - strength * (-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()


def _bert(words: int, length: int, width: int, layers: int, heads: int, dropout: float) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=words, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=length, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, pad_token_id=None,
    )  # fmt: skip
    model: nn.Module = BertModel(config, add_pooling_layer=False)
    return model


class _UVit(nn.Module):
    """Words (B, N) -> (B, N, width)."""

    def __init__(self, words: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        need_timm()
        from timm.models.vision_transformer import Block

        if layers % 2:
            raise InputError(f"layers of a U-ViT must be even, not {layers}")
        self.words, self.positions = nn.Embedding(words, width), nn.Parameter(torch.empty(1, length, width))
        self.blocks = nn.ModuleList(Block(width, heads, norm_layer=nn.LayerNorm) for _ in range(layers + 1))
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers // 2))
        self.norm = nn.LayerNorm(width)
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, words: Tensor) -> Tensor:
        x, half, kept = self.words(words) + self.positions, len(self.skips), []
        for block in self.blocks[:half]:
            x = block(x)
            kept.append(x)
        x = self.blocks[half](x)
        for block, skip in zip(self.blocks[half + 1 :], self.skips):
            x = block(skip(torch.cat([x, kept.pop()], -1)))
        normed: Tensor = self.norm(x)
        return normed
