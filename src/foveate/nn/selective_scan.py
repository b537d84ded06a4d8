"""The selective scan of Mamba in PyTorch, on any device, also over sequences of which some positions are missing.

B sequences, N positions, D channels, S states a channel. Everything is computed in 32 bits at least.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def selective_scan(
    x: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor, skip: Tensor | None = None,
    idle: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`h_t = exp((step_t + idle_t) rate) h_{t-1} + step_t x_t write_t`, `y_t = read_t . h_t + skip x_t`; h_{-1} = 0.

    Args:
        x, step: (B, N, D), step > 0 (Delta).
        rate: (D, S), negative (A).
        write, read: (B, N, S) (B and C).
        skip: (D,), or None for 0 (D).
        idle: (B, N, D), further steps without an input before position t, or None for none.

    Returns:
        y (B, N, D) in the type of x.
    """
    kind, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, step, rate, write, read = (one.to(wide) for one in (x, step, rate, write, read))
    # Time first: each position's states lie together.
    lasting = step if idle is None else step + idle
    kept = torch.exp(lasting.transpose(0, 1).unsqueeze(-1) * rate)
    came = (step * x).transpose(0, 1).unsqueeze(-1) * write.transpose(0, 1).unsqueeze(-2)
    states = recurrence(kept, came)
    y = (states @ read.transpose(0, 1).unsqueeze(-1)).squeeze(-1).transpose(0, 1)
    return (y if skip is None else y + skip.to(wide) * x).to(kind)


def recurrence(kept: Tensor, came: Tensor) -> Tensor:
    """`h_t = kept_t h_{t-1} + came_t` along the first dimension, from 0; all of one shape (N, …)."""
    states: Tensor = _Recurrence.apply(kept, came)
    return states


class _Recurrence(torch.autograd.Function):
    """Autograd would keep every step's products; the gradient is the same recurrence backwards."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, came: Tensor) -> Tensor:
        # A loop over all positions works least; where starting a kernel costs more than running it, blocks do better.
        block = len(kept) if kept.device.type == "cpu" else math.isqrt(max(0, len(kept) - 1)) + 1
        states = in_blocks(kept, came, block)
        ctx.save_for_backward(kept, states)
        ctx.block = block
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        kept, states = ctx.saved_tensors
        after = torch.cat([kept[1:], torch.zeros_like(kept[:1])]).flip(0)
        total = in_blocks(after, gradient.flip(0), ctx.block).flip(0)
        before = torch.cat([torch.zeros_like(states[:1]), states[:-1]])
        return total * before, total


def in_blocks(kept: Tensor, came: Tensor, block: int) -> Tensor:
    """The recurrence in about `block + N / block` steps: all blocks at once, then from one block's end to the next."""
    count = len(kept)
    if block >= count:
        states = came.clone()
        for t in range(1, count):
            states[t].addcmul_(kept[t], states[t - 1])
        return states
    # What is missing in the last block comes last and is cut off.
    padded = [F.pad(one, (0, 0) * (one.ndim - 1) + (0, -count % block)) for one in (kept, came)]
    factor, states = (one.unflatten(0, (-1, block)).clone() for one in padded)
    for t in range(1, block):
        states[:, t].addcmul_(factor[:, t], states[:, t - 1])
        factor[:, t].mul_(factor[:, t - 1])
    for one in range(1, len(states)):
        states[one].addcmul_(factor[one], states[one - 1, -1])
    return states.flatten(0, 1)[:count]


class SelectiveScan(nn.Module):
    """What a Mamba block computes of x between its convolution and its gate: step, write and read are x's own.

    `[l | write | read] = x W`, `step = softplus(l V + b)`; l has `rank` channels.
    """

    def __init__(self, width: int, states: int, rank: int) -> None:
        super().__init__()
        self.split = (rank, states, states)
        self.x_proj = nn.Linear(width, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, width)
        self.A_log = nn.Parameter(torch.arange(1, states + 1, dtype=torch.float32).log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        # Steps between 0.001 and 0.1 at first, as Mamba's.
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        first = torch.exp(torch.empty(width).uniform_(math.log(0.001), math.log(0.1)))
        with torch.no_grad():
            self.dt_proj.bias.copy_(first + torch.log(-torch.expm1(-first)))

    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(step, write, read) of x (B, N, D)."""
        low, write, read = self.x_proj(x).split(self.split, -1)
        return F.softplus(self.dt_proj(low)), write, read

    def scan(self, x: Tensor, step: Tensor, write: Tensor, read: Tensor, missing: Tensor | None = None) -> Tensor:
        """y (B, N, D). `missing` (B, N): how many positions there were right before each that are gone; the state
        passes them by with the step of an input of zeros, `softplus(b)`."""
        idle = None if missing is None else missing.unsqueeze(-1) * F.softplus(self.dt_proj.bias)
        return selective_scan(x, step, -self.A_log.exp(), write, read, self.D, idle)

    def forward(self, x: Tensor, missing: Tensor | None = None) -> Tensor:
        step, write, read = self.select(x)
        return self.scan(x, step, write, read, missing)
