"""Slow and plain versions of what methods build on, for one sample, from the models' own modules.

Nothing of foveate runs here: attention is written out, or comes from the eager implementation of transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Decide = Callable[[int, Tensor, list[int], Tensor], list[int] | None]
"""(layer about to run, hidden (1, n, D), place of each row in the prompt, positions (1, n)) -> places that stay."""


def eager_vision(model: Any, pixels: Tensor) -> Any:
    """The vision tower's output with `attentions` (a tuple of (B, H, S, S)) and `hidden_states`."""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        return tower(pixels, output_attentions=True, output_hidden_states=True)


def top(score: Tensor, count: int) -> list[int]:
    """The places of the `count` highest scores, ascending."""
    return sorted(sorted(range(len(score)), key=lambda j: -float(score[j]))[:count])


def kept(source: Tensor) -> list[list[int]]:
    """For each sample of a trace record's `source`, the patches that a token carries."""
    return [(row >= 0).nonzero().flatten().tolist() for row in source]


def prompt_embeddings(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(1, S, D): what the unchanged model feeds its language model."""
    seen: list[Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    return seen[0]


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position encoding of (B, H, S, D)."""
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], -1)
    return states * cos[:, None] + turned * sin[:, None]


def attention(model: Any, layer: int, hidden: Tensor, positions: Tensor, hidden_keys: Tensor | None = None,
              temperature: float = 1.0) -> Tensor:  # fmt: skip
    """(H, n, n) float64 attention of a language-model layer; `hidden_keys` (n,) bool are seen by nobody."""
    block = model.model.language_model.layers[layer]
    module, normed = block.self_attn, block.input_layernorm(hidden)
    cos, sin = model.model.language_model.rotary_emb(hidden, position_ids=positions)
    query, key = (
        rotated(project(normed).unflatten(-1, (-1, module.head_dim)).transpose(1, 2), cos, sin).double()
        for project in (module.q_proj, module.k_proj)
    )
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = (query @ key.transpose(-1, -2))[0] / module.head_dim**0.5
    unseen = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    if hidden_keys is not None:
        unseen = unseen | hidden_keys
    return (logits / temperature).masked_fill(unseen, float("-inf")).softmax(-1)


def run_layers(
    model: Any, embeds: Tensor, decide: Decide, *, renumber: bool = False, masked: bool = False
) -> tuple[Tensor, list[int], list[Tensor]]:
    """The language model layer by layer, with `decide` before each.

    Args:
        renumber: number what stays from 0 again, else positions stay.
        masked: keep all rows and hide what does not stay from attention.

    Returns:
        logits (n, V) of the rows that are left, their places in the prompt, and each layer's input (1, n, D).
    """
    language = model.model.language_model
    hidden, index = embeds, list(range(embeds.shape[1]))
    positions = torch.arange(embeds.shape[1])[None]
    seen = torch.ones(len(index), dtype=torch.bool)
    entered = []
    for layer, block in enumerate(language.layers):
        stay = decide(layer, hidden, index, positions)
        if stay is not None and masked:
            seen = torch.tensor([place in stay for place in index])
        elif stay is not None:
            rows = [row for row, place in enumerate(index) if place in stay]
            hidden, positions, index = hidden[:, rows], positions[:, rows], [index[row] for row in rows]
            seen = seen[rows]
            if renumber:
                positions = torch.arange(len(index))[None]
        entered.append(hidden)
        visible = torch.ones(len(index), len(index), dtype=torch.bool).tril() & seen
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
        out = block(
            hidden, attention_mask=mask, position_ids=positions,
            position_embeddings=language.rotary_emb(hidden, position_ids=positions),
        )  # fmt: skip
        hidden = out[0] if isinstance(out, tuple) else out
    return model.lm_head(language.norm(hidden))[0], index, entered
