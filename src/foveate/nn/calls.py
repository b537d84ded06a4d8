"""What stages hand to a method where it may change, replace or let through a call: "llm.attention", "llm.mlp",
"denoiser.call", "denoiser.attention", "sampler.step"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.tokens import DROPPED, Tokens, marked


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
        return marked(self.visual, self.key.shape[2])

    @property
    def on_patch(self) -> Tensor:
        """(B, N) bool: which visual tokens carry a patch, unlike newlines and padding."""
        source, count = self.tokens.source, self.visual.shape[1]
        number = torch.arange(source.shape[1], device=source.device)
        return marked(torch.where(number < self.patches.unsqueeze(1), source, DROPPED), count)

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


@dataclass(frozen=True, eq=False)
class DenoiserCall:
    """One call of a diffusion pipeline's denoiser. A handler returns its output (B, C', h, w), as the pipeline expects
    it: noise, velocity, or with the learned variance behind it (C' = 2 C).

    Attributes:
        latents: (B, C, h, w) as the denoiser gets them: scaled by the sampler, doubled for guidance.
        timestep: () or (B,), as the denoiser gets it; Lumina counts it from 0 (noise) to 1.
        step, steps: the sampler's 0-based step and how many are scheduled: one for each of `scheduler.timesteps`, so
            51 of 50 with PNDM. A run that starts late (image to image) starts at a later step.
        begin: the step that this run started with, 0 if it started from noise.
        number: 0-based, of the calls within this step: Lumina2's second is the unconditional one.
        guided: whether the batch is two halves, one of which is unconditional.
        conditional: the rows of the batch that see the prompt: half of them if guided, and in most pipelines the
            second; none in an unconditional call.
        sample: (n, C, h, w) the sampler's own latents, before it scales them; n = B / 2 if guided.
        prompts: of each of these pictures; () where the pipeline got embeddings, or none.
        tokenizer: that they are read with, None where the pipeline has none.
        arguments: the forward's further arguments by name, without `return_dict`.
        module: the denoiser.
        scheduler: the sampler.
        function: runs the denoiser, `function(latents=None, **changes) -> (B, C', h, w)`, with other latents or
            arguments than these. Gradients flow where `torch.enable_grad()` says so.
        replace_sample: `replace_sample(sample)`: the sampler's step starts from this (n, C, h, w) instead of its own
            latents. Returns `latents` made of it, scaled and doubled, for `function`. PNDM's second step starts from
            the sample of its first, whatever it is given.
    """

    latents: Tensor
    timestep: Tensor
    step: int
    steps: int
    begin: int
    number: int
    guided: bool
    conditional: slice
    sample: Tensor
    prompts: tuple[str, ...]
    tokenizer: Any
    arguments: Mapping[str, Any]
    module: nn.Module
    scheduler: Any
    function: Callable[..., Tensor]
    replace_sample: Callable[[Tensor], Tensor]

    @property
    def first(self) -> bool:
        """Whether this is the first call of a run."""
        return self.step == self.begin and self.number == 0


@dataclass(frozen=True, eq=False)
class DenoiserAttention:
    """One call of an attention layer of a denoiser. A handler returns what `function` does: (B, R, D), or a pair with
    the text's output where text attends too (Stable Diffusion 3).

    Attributes:
        name: of the module, "down_blocks.0.attentions.0.transformer_blocks.0.attn1".
        index: 0-based, in the order in which the layers run; begins anew with each run of the denoiser.
        module: the layer, with `heads`, `to_q`, `to_k` and `scale`.
        hidden: (B, R, D), what queries are made of; (B, D, h, w) in some UNets.
        context: (B, S, D') what keys are made of (cross-attention) or joined by (joint attention); None for others.
        cross: whether no key is of the picture.
        grid: (rows, columns) of the picture's tokens at this depth.
        image: how many keys are tokens of the picture, counted like `keys`; the int 0 where none is: cross-attention,
            the text alone, frames in time.
        native: how many there are at the size that the denoiser was trained with, 0 where its configuration does not
            say; if fewer tokens than the grid's enter the layer, this is still the whole grid's.
        keys: how many keys each query sees, those of the picture among them: an int, or (B,) where some are masked.
        mask: (B, 1, S) added to the logits of cross-attention, or (B, S) of which are real; None where all are.
        arguments: further arguments of the layer by name.
        call: the denoiser's call; its rows are those of the whole call, not those of a run with other latents.
        function: runs the layer, `function(query_scale=None)`; a float or (B,) multiplies the logits, whichever
            attention processor computes them.
        watch: runs it as `function` does, and returns the output and (B, H, R, S) float32 attention, with gradients
            where they are on. InputError where text has queries of its own or positions are rotated.
    """

    name: str
    index: int
    module: nn.Module
    hidden: Tensor
    context: Tensor | None
    cross: bool
    grid: tuple[int, int]
    image: int | Tensor
    native: int
    keys: int | Tensor
    mask: Tensor | None
    arguments: Mapping[str, Any]
    call: DenoiserCall
    function: Callable[..., Any]
    watch: Callable[[], tuple[Any, Tensor]]


@dataclass(frozen=True, eq=False)
class SamplerStep:
    """One step of a pipeline's sampler. A handler returns the output (n, C, h, w) that the sampler takes.

    Attributes:
        output: (n, C, h, w) what the denoiser said, after guidance and without learned variance: noise or velocity.
            DiT's pipeline steps both halves of a guided batch.
        sample: (n, C, h, w) the latents that it was said of.
        step, steps, begin: as of `DenoiserCall`.
        patch: pixels of the latents along a side of the denoiser's tokens, 1 for UNets.
        scheduler: the sampler.
    """

    output: Tensor
    sample: Tensor
    step: int
    steps: int
    begin: int
    patch: int
    scheduler: Any


def denoiser_of(model: Any) -> nn.Module | None:
    """The denoiser of a pipeline of diffusers, or the model itself if it is one; None where there is none."""
    if isinstance(model, nn.Module):
        return model
    parts = (getattr(model, name, None) for name in ("unet", "transformer"))
    return next((part for part in parts if isinstance(part, nn.Module)), None)
