"""What the recipes of tokenizers share: unused codes come to life again, and weights are averaged over steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveate.nn.vqgan import VectorQuantizer

REVIVE_EVERY = 25
"""Steps after which unused codes are moved."""


class Revival(nn.Module):
    """Moves codes that nothing has used for `REVIVE_EVERY` calls next to used ones, drawn by use.

    As far away as latents lie from their codes. Under several processes, uses are those of the first and random
    numbers those of the number of calls, so that codes move alike in all.
    """

    uses: Tensor
    calls: Tensor
    spread: Tensor

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.register_buffer("uses", torch.zeros(codes))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("spread", torch.zeros(()))

    @torch.no_grad()
    def start(self, quantizer: VectorQuantizer, z: Tensor) -> None:
        """Makes latents z (..., C), drawn at random, the codes; where there are too few, some twice, a little apart."""
        random, flat = torch.Generator().manual_seed(0), z.flatten(0, -2)
        count, channels = quantizer.embedding.weight.shape
        order = torch.cat([torch.randperm(len(flat), generator=random) for _ in range(-(-count // len(flat)))])[:count]
        noise = 0.01 * flat.std(0) * torch.randn(count, channels, generator=random).to(flat)
        quantizer.embedding.weight.copy_(flat[order.to(flat.device)] + noise)

    @torch.no_grad()
    def count(self, quantizer: VectorQuantizer, ids: Tensor, loss: Tensor) -> None:
        """Counts the ids of a batch, `loss` being the quantiser's."""
        self.uses += torch.bincount(ids.flatten(), minlength=len(self.uses))
        # Both parts of the loss are the mean square distance of latents to their codes.
        self.spread.copy_(loss / (1 + quantizer.commitment))
        self.calls += 1

    @torch.no_grad()
    def move(self, quantizer: VectorQuantizer) -> None:
        """Moves codes when it is time: before a batch, as the gradients of the last one need the codes as they were."""
        if self.calls == 0 or self.calls % REVIVE_EVERY:
            return
        random, weight = torch.Generator().manual_seed(int(self.calls)), quantizer.embedding.weight
        unused = torch.nonzero(self.uses == 0).flatten()
        if len(unused):
            near = torch.multinomial(self.uses.cpu(), len(unused), replacement=True, generator=random)
            noise = torch.randn(len(unused), weight.shape[1], generator=random).to(weight) * self.spread.sqrt()
            weight[unused] = quantizer.codebook[near.to(weight.device)] + noise
        self.uses.zero_()


class WeightAverage(nn.Module):
    """The exponential moving average of a model's trained weights, kept in buffers so that checkpoints have it.

    `decay` is reached after the first steps only: `min(decay, (1 + n) / (10 + n))` in step n.
    """

    steps: Tensor

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.names = {name: name.replace(".", "/") for name, p in model.named_parameters() if p.requires_grad}
        for name, key in self.names.items():
            self.register_buffer(key, model.get_parameter(name).detach().clone())

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + int(self.steps)) / (10 + int(self.steps)))
        self.steps += 1
        for name, key in self.names.items():
            self.get_buffer(key).lerp_(model.get_parameter(name), 1 - decay)

    @torch.no_grad()
    def apply_to(self, model: nn.Module) -> None:
        """Gives the model the averaged weights."""
        for name, key in self.names.items():
            model.get_parameter(name).copy_(self.get_buffer(key))
