"""Denoisers of which only some tokens go through the blocks: those of Stable Diffusion 3 and Lumina-Next.

Hooks behind the patch embedding and before the output take tokens out and put them back; hooks behind the projections
of keys and values fill in those of the tokens that are not there, as the last run made them that they took part in.
Norms of keys and rotations of positions come after that, token by token, so that any attention processor works.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from foveate.hosts.host import Host
from foveate.method import InputError
from foveate.tokens import take


def supported(denoiser: Any) -> bool:
    """Whether some of its tokens can be left out."""
    return type(denoiser).__name__ in _PLACES


class DenoiserPatches:
    """Lets tokens out of a denoiser's blocks, as long as `host` is installed.

    Args:
        choose: (B, N, D) patch embeddings with positions -> (B, A) long, the tokens that go on, in any order; None for
            all. Called once a run.

    Attributes:
        watching: False for runs that all tokens go through, and whose keys and values are not kept.
    """

    def __init__(self, host: Host, denoiser: Any, choose: Callable[[Tensor], Tensor | None]) -> None:
        self._choose = choose
        self.watching = True
        embedding, output, self._layers = _PLACES[type(denoiser).__name__](denoiser)
        self._index: Tensor | None = None
        self._count = 0
        self._held: dict[tuple[int, str], Tensor] = {}
        self._whole: dict[str, Tensor] = {}
        host.post(embedding, self._embedded)
        host.post(output, self._put_back)
        for number, layer in enumerate(self._layers):
            for name in ("to_k", "to_v"):
                host.post(getattr(layer, name), functools.partial(self._fill, (number, name)))
            if type(denoiser).__name__ == "LuminaNextDiT2DModel":
                host.pre(layer, functools.partial(self._before, layer.scale))
                host.post(layer, functools.partial(self._after, layer.scale), always=True)

    def forget(self) -> None:
        """Drops the keys and values of former runs."""
        self._held.clear()

    def keys(self, queries: int) -> int:
        """How many of the picture's tokens a layer of self-attention sees that so many of them enter."""
        return queries if self._index is None else self._count

    def _embedded(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        x: Tensor = output[0] if isinstance(output, tuple) else output
        self._index, self._count = self._choose(x) if self.watching else None, x.shape[1]
        if (index := self._index) is None:
            return None
        if any(getattr(layer, "fused_projections", False) for layer in self._layers):
            raise InputError("tokens can be left out where keys have their own projection: unfuse_qkv_projections()")
        if len(self._held) < 2 * len(self._layers):
            raise ValueError("in the first run of a denoiser all tokens have to take part")
        if not isinstance(output, tuple):
            return take(x, index)
        _, mask, sizes, rotary = output
        self._whole = {"attention_mask": mask, "key_rotary_emb": rotary}
        return take(x, index), mask.gather(1, index), sizes, rotary[0][index]

    def _fill(self, place: tuple[int, str], module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        if (index := self._index) is not None:
            output = self._held[place].scatter(1, index.unsqueeze(-1).expand_as(output), output)
        if self.watching:
            self._held[place] = output.detach()
        return output

    def _before(self, scale: float, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Lumina's self-attention: all keys have their positions; its scale is of their number, not the queries'."""
        if self._index is None:
            return None
        kwargs = {**kwargs, **self._whole}
        if (base := kwargs.pop("base_sequence_length", None)) is not None:
            module.scale = scale * math.sqrt(math.log(self._count, base))
        return args, kwargs

    def _after(self, scale: float, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        module.scale = scale

    def _put_back(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        index, self._index = self._index, None
        if index is None:
            return None
        places = index.unsqueeze(-1).expand_as(output)
        return output.new_zeros(len(output), self._count, output.shape[2]).scatter(1, places, output)


def _stable_diffusion_3(denoiser: Any) -> tuple[nn.Module, nn.Module, list[Any]]:
    layers = [layer for block in denoiser.transformer_blocks for layer in (block.attn, block.attn2)]
    return denoiser.pos_embed, denoiser.proj_out, [layer for layer in layers if layer is not None]


def _lumina(denoiser: Any) -> tuple[nn.Module, nn.Module, list[Any]]:
    return denoiser.patch_embedder, denoiser.norm_out, [block.attn1 for block in denoiser.layers]


_PLACES: dict[str, Callable[[Any], tuple[nn.Module, nn.Module, list[Any]]]] = {
    "SD3Transformer2DModel": _stable_diffusion_3, "LuminaNextDiT2DModel": _lumina,
}  # fmt: skip
"""class of a denoiser -> its patch embedding, the last of what works on tokens, and its layers of self-attention."""
