"""What one prefill of batch 1 costs: FLOPs and cache, counted exactly, and time as a share of dense."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from foveate.apply import apply
from foveate.data.samples import Sample, to_inputs
from foveate.measure.flops import count_flops
from foveate.measure.memory import kv_bytes
from foveate.measure.quality import place
from foveate.measure.timing import Timing, interleave, seconds
from foveate.method import Method


class Prefill:
    """One prefill of the sample with the median prompt, batch 1.

    Attributes:
        index: of the sample.
    """

    def __init__(self, model: Any, processor: Any, samples: Sequence[Sample]) -> None:
        self.model = model
        self.index = sorted(range(len(samples)), key=lambda index: len(samples[index].prompt))[len(samples) // 2]
        self._inputs = place(to_inputs(processor, [samples[self.index]]), model)

    @torch.inference_mode()
    def run(self) -> Any:
        """The model's output."""
        return self.model(**self._inputs, use_cache=True, logits_to_keep=1)

    def cost(self) -> tuple[int, int]:
        """FLOPs of one prefill and the bytes that it leaves in the cache, of the model as it is now."""
        caches: list[Any] = []
        flops = count_flops(lambda: caches.append(self.run().past_key_values))
        return flops, kv_bytes(caches[0])

    def time(self, methods: Sequence[Method], pairs: int) -> Timing:
        """Of a model without methods, and with these: interleaved pairs."""

        def once(context: AbstractContextManager[Any]) -> float:
            # Putting the methods on and taking them off is no part of a forward.
            with context:
                return seconds(self.run, self.model.device)

        return interleave(lambda: once(nullcontext()), lambda: once(apply(self.model, tuple(methods))), pairs)
