"""T-Stitch: a small denoiser makes the first steps of the sampling, the pipeline's own the rest.

With shares r_1 .. r_K of the models, small to large, and c_k = r_1 + .. + r_k, model k makes the steps
`c_(k-1) n <= i < c_k n` of n, each `latents (B, C, h, w) -> (B, C, h, w)`; see `TStitch`.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from foveate.method import Card, Claim, HostShape, InputError, Method, Stage, at, choice, register, within
from foveate.nn.calls import DenoiserCall, denoiser_of

RULES = ("paper", "dit", "ldm", "sd", "lcm")

_SUM = 1e-6
"""How far from 1 fractions may sum to, and from a boundary a timestep may lie that is on it."""
_SHAPES = (
    "in_channels", "out_channels", "learn_sigma", "cross_attention_dim", "joint_attention_dim", "caption_channels",
    "cap_feat_dim", "pooled_projection_dim", "addition_embed_type", "num_embeds_ada_norm",
)  # fmt: skip
"""What denoisers that share latents and conditions have equal in their configurations."""
_DIT = {"s": (384, 12, 6), "b": (768, 12, 12), "xl": (1152, 28, 16)}
"""Width, depth and heads of DiT with patches of 2 pixels."""


@functools.lru_cache(maxsize=len(_DIT))
def _dit(name: str) -> nn.Module:
    """A DiT for 256² pictures on the meta device."""
    from diffusers import DiTTransformer2DModel

    width, depth, heads = _DIT[name]
    with torch.device("meta"):
        model: Any = DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=width // heads, num_layers=depth, out_channels=8
        )
    # One embedding of time and class, of which diffusers has a copy in each block.
    for block in model.transformer_blocks:
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    return model.eval()


def _latents() -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)


@functools.lru_cache(maxsize=len(_DIT))
def _macs(name: str) -> float:
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _dit(name)(*_latents())
    return counter.get_total_flops() / 2


def _speedup(method: Any) -> float:
    return _macs("xl") / float(method.cost([_macs("s"), _macs("xl")]))


def _exact(method: Any) -> float:
    """For how many of 55 pairs of n and r there are exactly r n small steps."""
    found = 0
    for steps in (10, 20, 50, 100, 250):
        # As DiT's own sampler spaces them.
        timesteps = [round(999 * (1 - step / (steps - 1))) for step in range(steps)]
        for tenth in range(11):
            plan = TStitch(ratio=tenth / 10, rule=method.rule).plan(timesteps)
            found += plan.count(0) * 10 == tenth * steps
    return float(found)


@register
class TStitch(Method):
    """The first steps of a sampling are made by a small denoiser, the others by the pipeline's own, large one.

    Denoisers of different sizes trained on the same data predict nearly the same while there is much noise. With the
    fractions r_1 … r_K of the models from small to large and c_k = r_1 + … + r_k, model k runs the steps
    `c_(k-1) n <= i < c_k n` of n; of two, the small one runs the first r n. Both halves of a guided batch go through
    the same model; the sampler, its random numbers and the denoiser's other arguments are the pipeline's,
    `(B, C, h, w) -> (B, C, h, w)`. Nothing is trained. All models are in memory: what is saved is time alone.

    T-Stitch: Accelerating Sampling in Pre-Trained Diffusion Models with Trajectory Stitching, ICLR 2025,
    https://arxiv.org/abs/2402.14167, section 3. Once a larger model has begun, no smaller one runs again. `rule` says
    where the boundaries are: "paper" `i < round(c n)`; and with T trained timesteps the authors' code for DiT, also for
    more than two models, `1 - t / T <= c`, for LDM `1 - t / T < c`, for Stable Diffusion `(i + 1) / n <= c`, and with
    its LCM sampler `i <= floor(c n)`. Steps and timesteps are those of the whole schedule: what starts from a picture,
    with less noise, has fewer small steps or none.
    """

    card = Card(
        slug="t-stitch",
        title="T-Stitch: Accelerating Sampling in Pre-Trained Diffusion Models with Trajectory Stitching",
        arxiv="2402.14167", year=2024, kind="diffuse", hosts=("diffusers",), identity={"ratio": 0.0},
        summary="Lets a smaller denoiser make the first steps of a sampling, while there is much noise.",
        parameters={
            "small": "a denoiser for the pipeline's latents, or a pipeline that has it, or a list from small to large",
            "ratio": "share of the steps that the small one makes; of several, a list of all models' shares, sum 1",
            "rule": "where one model's steps end: 'paper', or as in the authors' code 'dit', 'ldm', 'sd', 'lcm'",
            "arguments": "of each small one, a dict of the denoiser's arguments that are its own, such as embeddings",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(
                f"MACs of DiT-{name.upper()}/2 at 256²", "flops", figure, "card, counted", counting="macs",
                model=functools.partial(_dit, name), inputs=_latents,
            )
            for name, figure in (("s", 6.06e9), ("b", 23.0e9), ("xl", 118.6e9))
        ),
        *(
            Claim(
                f"parameters of DiT-{name.upper()}/2", "parameters", figure, "card", model=functools.partial(_dit, name)
            )
            for name, figure in (("s", 33e6), ("b", 131e6), ("xl", 675e6))
        ),
        *(
            Claim(
                f"fewer MACs by this factor, DiT-S and DiT-XL, ratio {ratio}", "value", figure, "card, counted",
                settings={"ratio": ratio}, value=_speedup,
            )
            for ratio, figure in ((0.4, 1.61), (0.5, 1.90))
        ),
        *(
            Claim(
                f"of 55 pairs of n and r, those with r n small steps, rule {rule}", "value", 55, "card", tolerance=0,
                settings={"rule": rule}, value=_exact,
            )
            for rule in ("paper", "dit", "sd")
        ),
        Claim(
            "allocations of three models in tenths", "value", 66, "card", tolerance=0,
            value=lambda method: float(len(allocations((1, 2, 3)))),
        ),
    )  # fmt: skip

    def __init__(
        self, *, small: Any = (), ratio: float | Sequence[float] = 0.4, rule: str = "paper",
        arguments: Sequence[Mapping[str, Any]] = (),
    ) -> None:  # fmt: skip
        self.small = small
        self._given = list(small) if isinstance(small, list | tuple) else [small]
        self._models = [_denoiser(one) for one in self._given]
        given: list[Any] = list(ratio) if isinstance(ratio, list | tuple) else [ratio]
        shares = tuple(within("ratio", one, "[0, 1]") for one in given)
        several = isinstance(ratio, list | tuple)
        self.ratio = shares if several else shares[0]
        self.fractions = shares if several else (shares[0], 1 - shares[0])
        if abs(math.fsum(self.fractions) - 1) > _SUM:
            raise InputError(f"ratio must sum to 1 over all models, not to {math.fsum(self.fractions):g}")
        if self._models and len(self.fractions) != len(self._models) + 1:
            raise InputError(
                f"ratio has shares of {len(self.fractions)} models; there are {len(self._models) + 1}, the pipeline's "
                "own the last"
            )
        self.rule = choice("rule", rule, RULES)
        if not isinstance(arguments, list | tuple) or not all(isinstance(one, Mapping) for one in arguments):
            raise InputError(f"arguments must be a list of dicts, one of each small model, not {arguments!r}")
        self.arguments = tuple(arguments)
        if arguments and len(arguments) != len(self._models):
            raise InputError(f"arguments has {len(arguments)} dicts; there are {len(self._models)} small models")

    @classmethod
    def for_budget(cls, budget: float, host: HostShape) -> Method:
        within("budget", budget, "(0, 1]")
        raise InputError("t-stitch has a budget once there is a small model: give small and ratio")

    def check(self, host: HostShape) -> None:
        if not self._models and any(self.fractions[:-1]):
            raise InputError("t-stitch needs a small denoiser for the first steps: small=…, a model or a pipeline")

    def model(self, step: int, steps: int, progress: float) -> int:
        """Which model runs a step of `steps`, 0 being the smallest; `progress` is 1 - t / T, 0 for noise."""
        done, last = 0.0, 0
        for number, fraction in enumerate(self.fractions):
            if fraction == 0:
                continue
            done, last = done + fraction, number
            covered = {
                "paper": step < math.floor(done * steps + 0.5 + _SUM),
                "dit": progress <= done + _SUM,
                "ldm": progress < done - _SUM,
                "sd": step + 1 <= done * steps + _SUM,
                "lcm": step <= math.floor(done * steps + _SUM),
            }[self.rule]
            if covered:
                return number
        return last

    def plan(self, timesteps: Sequence[float], trained: int = 1000) -> list[int]:
        """Which model runs each of the sampler's steps, of T = `trained`."""
        steps = len(timesteps)
        chosen = [self.model(step, steps, 1 - float(t) / trained) for step, t in enumerate(timesteps)]
        # Some samplers go back and forth in time.
        return [max(chosen[: step + 1]) for step in range(steps)]

    def cost(self, costs: Sequence[float]) -> float:
        """Mean cost of a step, of models that cost `costs` a step each."""
        return math.fsum(fraction * cost for fraction, cost in zip(self.fractions, costs, strict=True))

    @at("denoiser.call")
    def stitch(self, call: DenoiserCall, at: Stage) -> Tensor:
        plan: list[int] | None = at.memory.get(self.card.slug)
        if plan is None:
            self._match(call)
            plan = self.plan(call.scheduler.timesteps.tolist(), call.scheduler.config.num_train_timesteps)
            at.memory[self.card.slug] = plan
        number = plan[call.step]
        if number >= len(self._models):
            return call.function()
        model = self._models[number]
        own = self.arguments[number] if self.arguments else {}
        latents = next(iter(inspect.signature(model.forward).parameters))
        given = {latents: call.latents, "timestep": call.timestep, **call.arguments, **own}
        output: Tensor = model(**given, return_dict=False)[0]
        if output.shape[2:] != call.latents.shape[2:]:
            raise InputError(
                f"small: {type(model).__name__} makes {tuple(output.shape)} of latents {tuple(call.latents.shape)}"
            )
        return output

    def _match(self, call: DenoiserCall) -> None:
        """InputError where a small model cannot stand in for the pipeline's own."""
        for number, (given, model) in enumerate(zip(self._given, self._models)):
            if self.fractions[number] == 0:
                continue
            name, own = type(model).__name__, self.arguments[number] if self.arguments else {}
            for key in _SHAPES if not own else _SHAPES[:3]:
                ours, theirs = (getattr(one, "config", {}).get(key) for one in (model, call.module))
                if ours is not None and theirs is not None and ours != theirs:
                    raise InputError(f"small: {name} has {key} {ours}, the pipeline's denoiser {theirs}")
            if "image_rotary_emb" in call.arguments and "image_rotary_emb" not in own:
                widths = [getattr(one, "head_dim", None) for one in (model, call.module)]
                if widths[0] != widths[1]:
                    raise InputError(
                        f"small: {name} has heads of {widths[0]} channels, the pipeline's denoiser of {widths[1]}, for "
                        "which its positions are: give arguments=[{'image_rotary_emb': …}]"
                    )
            known = inspect.signature(model.forward).parameters
            foreign = [key for key in call.arguments if key not in known]
            if foreign:
                raise InputError(f"small: {name} does not take the pipeline's arguments {', '.join(foreign)}")
            place = next(model.parameters())
            if (place.device, place.dtype) != (call.latents.device, call.latents.dtype):
                raise InputError(
                    f"small: {name} is {place.dtype} on {place.device}, the latents are {call.latents.dtype} on "
                    f"{call.latents.device}; move it with to()"
                )
            if not isinstance(given, nn.Module):
                _same_noise(given.scheduler, call.scheduler)


def _denoiser(given: Any) -> Any:
    """The denoiser itself, of a model or a pipeline."""
    found = denoiser_of(given)
    if found is None or not (found is given or hasattr(given, "scheduler")):
        raise InputError(f"small must be a denoiser or a pipeline of diffusers, or a list of such, not {given!r}")
    return found


def _same_noise(ours: Any, theirs: Any) -> None:
    """InputError where two samplers are of models trained with different noise."""
    for key in ("num_train_timesteps", "prediction_type"):
        one, other = (sampler.config.get(key) for sampler in (ours, theirs))
        if one != other:
            raise InputError(f"small: its pipeline's scheduler has {key} {one}, this pipeline's {other}")
    # Flow matching has none: all such models have the same noise.
    levels = [sampler.alphas_cumprod.cpu() for sampler in (ours, theirs) if hasattr(sampler, "alphas_cumprod")]
    if len(levels) == 1 or (len(levels) == 2 and not torch.allclose(levels[0], levels[1], atol=1e-4)):
        raise InputError("small: it was trained with another noise schedule than the pipeline's denoiser")


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _compositions(total - first, parts - 1):
            yield (first, *rest)


def allocations(
    costs: Sequence[float], budget: float = math.inf, parts: int = 10
) -> list[tuple[tuple[float, ...], float]]:
    """All fractions of models, in `parts`, whose mean cost of a step is within a budget: the appendix's look-up.

    Args:
        costs: of a step of each model, small to large, in any unit: seconds, FLOPs.
        budget: in the same unit.

    Returns:
        (fractions, cost), the most expensive first; `fractions` is a `ratio` of `TStitch`.
    """
    found = []
    for counts in _compositions(parts, len(costs)):
        cost = math.fsum(count * cost for count, cost in zip(counts, costs)) / parts
        if cost <= budget:
            found.append((tuple(count / parts for count in counts), cost))
    return sorted(found, key=lambda one: -one[1])
