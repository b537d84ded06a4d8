"""Memory: bytes of a real key-value cache, and the peak on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def kv_bytes(cache: Any) -> int:
    """Bytes of the keys and values of all layers of a transformers cache; layers may differ in length."""
    held = [one for layer in cache.layers for one in (layer.keys, layer.values) if one is not None]
    return sum(one.numel() * one.element_size() for one in held)


def kv_lengths(cache: Any) -> list[int]:
    """Entries of each layer's cache, padding included."""
    return [int(layer.keys.shape[-2]) for layer in cache.layers]


def peak_bytes(run: Callable[[], object], device: torch.device | str) -> int | None:
    """Most bytes that one call of `run` had allocated above what was allocated before it; None unless on CUDA."""
    if torch.device(device).type != "cuda":
        run()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)
