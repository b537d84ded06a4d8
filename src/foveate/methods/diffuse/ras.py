"""RAS: at most steps of a diffusion transformer, only the regions that it is at work on are computed.

Tokens `(B, N, D) -> (B, N - n, D)` in the blocks: the n ranked by `R_j = m_j exp(k D_j)` are left out and move on with
their last velocity; m_j is how much the velocity of token j varies over channels, D_j how often it was left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.method import Card, Claim, HostShape, InputError, Method, Stage, at, choice, register, share, whole, within
from foveate.nn.calls import SamplerStep
from foveate.tokens import Tokens

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "sd3": {"resets": (12, 20), "high": 0.3, "starvation": 1.0},
    "lumina": {"ramp": 256, "ramp_every": 4},
}
"""The authors' settings by host; the defaults are those of their code."""

_RAMP_UNIT = 64
"""With a ramp, the number of tokens that are skipped is a multiple of this."""


@dataclass(frozen=True, eq=False)
class _State:
    """What one step leaves to the next, of n pictures with N tokens.

    Attributes:
        velocity: (n, C, h, w) that the last step was taken with.
        skipped: (n, N) bool, tokens that the next step leaves out; None for none.
        drops: (n, N) long, how often each token was left out, the next step included.
    """

    velocity: Tensor
    skipped: Tensor | None
    drops: Tensor


def _processed(steps: int) -> Callable[[Any], float]:
    return lambda ras: float(sum(4096 - skipped for skipped in ras.skips(steps, 4096)))


def _skipped(step: int) -> Callable[[Any], float]:
    return lambda ras: float(ras.skips(30, 4096)[step])


@register
class Ras(Method):
    """Most steps compute some of a picture's tokens; the others move on along their last velocity.

    The first `start` steps and those in `resets` are dense. With v the model's output after guidance and m_j the mean
    over the p x p pixels of token j of the standard deviation of v over channels, a step ranks the N tokens for the
    next by `R_j = m_j exp(k D_j)`, D_j being how often token j was left out before. n of them are left out, a share
    `1 - high` from the lowest R on and a share `high` from the highest on. The tokens that stay, and the text, go
    through the blocks `(B, N, D) -> (B, N - n, D)` at their original positions; in self-attention they see all N keys
    and values, of tokens left out those of the last step that these took part in. The sampler takes
    `v_j` of a token left out from the step before, so that it moves at constant velocity.

    Region-Adaptive Sampling for Diffusion Transformers, CVPR 2026, https://arxiv.org/abs/2502.10389, sections 3.2-3.4.
    The paper measures the step `(sigma' - sigma) v`; that factor is the same for all tokens and changes no order, so
    any sampler goes, though the paper's is Euler's on flow matching. With several pictures each has its own regions.
    Steps are counted from where a run begins. `CONFIGURATIONS` are the authors' settings; their code has k = 0.1
    whatever its `starvation_scale` is set to.

    In the paper's R the factor makes a token that was left out from the top (the highest R) still more likely to be
    left out again, against its purpose. By default those are therefore ranked by `m_j exp(-k D_j)`; `top="published"`
    is R.
    """

    card = Card(
        slug="ras", title="Region-Adaptive Sampling for Diffusion Transformers", arxiv="2502.10389", year=2025,
        kind="diffuse", hosts=("diffusers",), identity={"ratio": 1.0},
        summary="Computes at most steps of a diffusion transformer only the regions that it is at work on.",
        parameters={
            "ratio": "share of the picture's tokens that a step computes, on average with a ramp",
            "start": "dense steps before the first that leaves tokens out, at least 1",
            "end": "the step from which on all are dense again; None is never",
            "resets": "further dense steps, which end the drift of what was left out",
            "metric": "of v over the channels of a pixel: 'std', or 'l2norm'",
            "high": "share of the tokens left out that are those with the highest metric, 0 to 1",
            "starvation": "k, how fast tokens that were left out come up again",
            "top": "rank of tokens left out from the top: 'relieved', m exp(-k D), or 'published', m exp(k D)",
            "rounding": "of the two shares of n: 'exact', together n, or 'released', each rounded down",
            "ramp": "how many tokens more are left out every `ramp_every` steps, around the same mean; 0 is no ramp",
            "ramp_every": "steps from one level of the ramp to the next",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(
                f"tokens processed of {steps * 4096:,}, {label}", "value", figure, "card", tolerance=0,
                settings=settings, value=_processed(steps),
            )
            for label, steps, figure, settings in (
                ("SD3's settings", 28, 69_632, CONFIGURATIONS["sd3"]),
                ("SD3's, the release's rounding", 28, 69_654, CONFIGURATIONS["sd3"] | {"rounding": "released"}),
                ("SD3's, ratio 0.125", 28, 35_840, CONFIGURATIONS["sd3"] | {"ratio": 0.125}),
                ("Lumina's settings", 30, 75_264, CONFIGURATIONS["lumina"]),
            )
        ),
        *(
            Claim(
                f"tokens skipped in step {step} of 30, Lumina's settings", "value", figure, "card", tolerance=0,
                settings=CONFIGURATIONS["lumina"], value=_skipped(step),
            )
            for step, figure in ((4, 1280), (11, 1536), (12, 0), (16, 2048), (23, 2304), (29, 2816))
        ),
    )  # fmt: skip

    def __init__(
        self, *, ratio: float = 0.5, start: int = 4, end: int | None = None, resets: Sequence[int] = (12, 22),
        metric: str = "std", high: float = 1.0, starvation: float = 0.1, top: str = "relieved",
        rounding: str = "exact", ramp: int = 0, ramp_every: int = 4,
    ) -> None:  # fmt: skip
        self.ratio = share("ratio", ratio)
        # What is left out has been computed before.
        self.start = whole("start", start, 1)
        self.end = None if end is None else whole("end", end)
        if not isinstance(resets, list | tuple):
            raise InputError(f"resets must be a list of steps, not {resets!r}")
        self.resets = tuple(whole("resets", step) for step in resets)
        self.metric = choice("metric", metric, ("std", "l2norm"))
        self.high = within("high", high, "[0, 1]")
        self.starvation = within("starvation", starvation, "[0, inf)")
        self.top = choice("top", top, ("relieved", "published"))
        self.rounding = choice("rounding", rounding, ("exact", "released"))
        self.ramp = whole("ramp", ramp)
        self.ramp_every = whole("ramp_every", ramp_every, 1)

    @classmethod
    def for_budget(cls, budget: float, host: HostShape) -> Method:
        """The budget is the share of tokens in the steps that are not dense."""
        return cls(ratio=share("budget", budget))

    def tails(self, step: int, steps: int, patches: int) -> tuple[int, int]:
        """How many of the tokens with the lowest and with the highest metric are left out in a step."""
        end = steps if self.end is None else self.end
        if not self.start <= step < end or step in self.resets:
            return 0, 0
        # In binary, 0.9 is a little more than 1 - 0.1, and a token is not lost to that.
        count = int((1 - self.ratio) * patches + 1e-9)
        if self.ramp:
            level = step // self.ramp_every - (steps + self.start) // self.ramp_every // 2
            count = (count + self.ramp * level) // _RAMP_UNIT * _RAMP_UNIT
        count = min(max(count, 0), patches - 1)
        low, high = int(count * (1 - self.high) + 1e-9), int(count * self.high + 1e-9)
        return (count - high if self.rounding == "exact" else low), high

    def skips(self, steps: int, patches: int) -> list[int]:
        """How many of the tokens each step leaves out."""
        return [sum(self.tails(step, steps, patches)) for step in range(steps)]

    def measure(self, velocity: Tensor, patch: int) -> Tensor:
        """(n, N) metric of the tokens of v (n, C, h, w), float32."""
        exact = velocity.float()
        pixels = exact.std(1, correction=0) if self.metric == "std" else exact.norm(dim=1)
        return F.avg_pool2d(pixels, patch).flatten(1)

    def leave_out(self, metric: Tensor, drops: Tensor, low: int, high: int) -> Tensor:
        """(n, N) bool: which `low` + `high` tokens are left out, by their metric and drops (n, N)."""
        # The order of R, which could overflow.
        size, factor = metric.clamp(min=torch.finfo(metric.dtype).tiny).log(), self.starvation * drops
        lowest = (size + factor).sort(dim=1, stable=True).indices[:, :low]
        skipped = torch.zeros_like(drops, dtype=torch.bool).scatter(1, lowest, True)
        rank = size - factor if self.top == "relieved" else size + factor
        highest = rank.masked_fill(skipped, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :high]
        return skipped.scatter(1, highest, True)

    @at("denoiser.patches")
    def choose(self, tokens: Tokens, at: Stage) -> Tokens:
        state: _State | None = at.memory.get(self.card.slug)
        if state is None or state.skipped is None:
            return tokens
        # Left out are equally many of each picture, and both halves of a guided batch have the same pictures.
        stay = (~state.skipped).nonzero()[:, 1].unflatten(0, (len(state.skipped), -1))
        return tokens.keep(stay.repeat(len(tokens.x) // len(stay), 1))

    @at("sampler.step")
    def merge(self, step: SamplerStep, at: Stage) -> Tensor:
        state: _State | None = at.memory.get(self.card.slug)
        velocity, patch = step.output, step.patch
        rows, columns = (side // patch for side in velocity.shape[2:])
        drops = torch.zeros(len(velocity), rows * columns, dtype=torch.long, device=velocity.device)
        if state is not None:
            drops = state.drops
            if state.skipped is not None:
                old = state.skipped.view(-1, 1, rows, columns).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
                velocity = torch.where(old, state.velocity, velocity)
        low, high = self.tails(step.step + 1 - step.begin, step.steps - step.begin, rows * columns)
        skipped = self.leave_out(self.measure(velocity, patch), drops, low, high) if low + high else None
        drops = drops if skipped is None else drops + skipped
        at.memory[self.card.slug] = _State(velocity, skipped, drops)
        return velocity
