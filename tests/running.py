"""What tests of vision-language hosts run: methods, rules for `tiny.probe`, and the model itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.method import Stage
from foveate.tokens import Tokens

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("fopru", {"keep": 0.5}),
    ("vtc-cls", {"keep": 0.4}),
    ("pyramiddrop", {}),
    ("aim", {"keep": 0.5, "step": 0.3, "first_layer": 1}),
    ("aim", {"keep": 0.5, "metric": "features", "step": 0.6, "first_layer": 1, "removed": "mask"}),
    ("pool", {"keep": 0.5}),
    ("resolution", {"keep": 0.5}),
]
"""At every kind of stage, merging and dropping, with and without class token."""


def odd(tokens: Tokens, at: Stage) -> Tensor:
    """Every other visual token."""
    return torch.arange(tokens.x.shape[1]).expand(tokens.x.shape[:2]) % 2 == 1


def lively(tokens: Tokens, at: Stage) -> Tensor:
    """As many as have a positive first feature: another number in each sample."""
    return tokens.x[..., 0] > 0


def none(tokens: Tokens, at: Stage) -> Tensor:
    return torch.zeros(tokens.x.shape[:2], dtype=torch.bool)


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def generate(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    """(B, new tokens) ids, greedy."""
    start = inputs["input_ids"].shape[1]
    return model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False} | settings)[:, start:]


def fingerprint(model: Any) -> Any:
    """All that an adapter could leave behind, but weights."""
    modules = list(model.modules())
    return (
        [(sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules],
        [(len(module._forward_hooks_with_kwargs), len(module._forward_hooks_always_called)) for module in modules],
        model.config.to_dict(),
        [getattr(module.config, "_attn_implementation", None) for module in modules if hasattr(module, "config")],
    )


def supervise(inputs: dict[str, Tensor], answer: int = 3) -> dict[str, Tensor]:
    """Labels on the last `answer` tokens of each sample but the second, which has none."""
    labels = torch.full_like(inputs["input_ids"], -100)
    for b in range(len(labels)):
        places = inputs["attention_mask"][b].nonzero().squeeze(1)[-answer:]
        labels[b, places] = inputs["input_ids"][b, places]
    if len(labels) > 1:
        labels[1] = -100
    return {**inputs, "labels": labels}
