"""Reading the queries and keys of an attention layer while its output still comes from SDPA or FlashAttention.

transformers calls a registered attention function with the final queries and keys. Ours notes them and hands the call
on to the implementation that the model uses anyway, so the tap costs two references. The name is in the config only
while the attention of a tapped layer runs; everything else, masks included, sees the model's own implementation.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.hosts.host import Host

_NAME = "foveate"


@dataclass(eq=False)
class Tap:
    """What one attention layer computed in its last forward: query (B, H, S, D), key (B, G, S, D), scaling.

    `around`, if there is one, makes the layer's output: (query, key, value, mask, scaling, function) -> (B, R, H, D),
    where `function(query, key, value, mask)` is what the model itself would do.
    """

    around: Callable[..., Tensor] | None = None
    implementation: str = ""
    query: Tensor | None = None
    key: Tensor | None = None
    scaling: float = 1.0

    def read(self) -> tuple[Tensor, Tensor, float]:
        if self.query is None or self.key is None:
            raise RuntimeError("this attention layer has not run yet")
        return self.query, self.key, self.scaling

    def clear(self) -> None:
        self.query = self.key = None


_TAPS: weakref.WeakKeyDictionary[nn.Module, Tap] = weakref.WeakKeyDictionary()


def _tapped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    tap = _TAPS[module]
    tap.query, tap.key = query.detach(), key.detach()
    tap.scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    # Eager attention is not in the interface: each modeling file has its own.
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(tap.implementation, eager)
    if tap.around is None:
        return function(module, query, key, value, attention_mask, **kwargs)

    def own(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output: Tensor = function(module, query, key, value, mask, **kwargs)[0]
        return output

    return tap.around(query, key, value, attention_mask, tap.scaling, own), None


AttentionInterface.register(_NAME, _tapped)


class Taps(dict[int, Tap]):
    """layer -> tap, of the layers whose attention is read; `name` is that of their stages.

    `forgets`: whether they are asked for in ascending order, so that each lets go of those before it.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.forgets = name, False

    def read(self, layer: int) -> tuple[Tensor, Tensor, float]:
        """See `Tap.read`. Raises RuntimeError for a layer that no method has announced."""
        if layer not in self:
            raise RuntimeError(f"name '{self.name}.attention[{layer}]' in Method.reads to look at it")
        if self.forgets:
            self.let_go(layer)
        return self[layer].read()

    def let_go(self, before: int | None = None) -> None:
        """Lets go of what layers before that one computed, or all."""
        for index, tap in self.items():
            if before is None or index < before:
                tap.clear()


def tap_transformers(host: Host, attention: nn.Module, around: Callable[..., Tensor] | None = None) -> Tap:
    """A tap on an attention module of transformers; comes off with the host's other hooks."""
    tap = _TAPS[attention] = Tap(around)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        config: Any = module.config
        tap.implementation = config._attn_implementation
        config._attn_implementation = _NAME

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        config: Any = module.config
        # Also called after an error, which may have come before `enter`.
        if config._attn_implementation == _NAME:
            config._attn_implementation = tap.implementation

    host.pre(attention, enter)
    host.post(attention, leave, always=True)
    return tap


def tap_timm(host: Host, attention: Any) -> Tap:
    """A tap on a timm attention block with a fused `qkv`: the projection's output is read, nothing is recomputed."""
    tap = Tap(scaling=attention.scale)

    def note(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        batch, length, _ = output.shape
        split = output.reshape(batch, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        with torch.no_grad():
            tap.query, tap.key = attention.q_norm(split[0]), attention.k_norm(split[1])

    host.post(attention.qkv, note)
    return tap
