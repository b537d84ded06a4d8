"""Verbose Images: how much longer can a change of the picture that nobody sees make a model talk?"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from foveate.method import Card, Claim, InputError, Published, choice, register, whole, within
from foveate.nn.gradients import frozen

LOSSES = ("end", "uncertainty", "diversity")
_SMALLEST = 1e-20
"""Least denominator of a weight: at the pole of a schedule, or where a loss is 0, weights stay finite in float32."""


@dataclass(frozen=True)
class Answers:
    """What a model said to one picture, several times.

    Attributes:
        lengths: of the answers, in the unit of `VerboseImages.count`.
        tokens: their generated tokens, the end token not counted; at most `max_new_tokens`.
        longest: token ids of the longest (the first of the longest), without the end token.
        seconds: in which all were generated, as one batch.
    """

    lengths: tuple[int, ...]
    tokens: tuple[int, ...]
    longest: tuple[int, ...]
    seconds: float

    @property
    def mean(self) -> float:
        return sum(self.lengths) / len(self.lengths)

    @property
    def mean_tokens(self) -> float:
        return sum(self.tokens) / len(self.tokens)


@dataclass(frozen=True)
class Iteration:
    """One update: losses and smoothed weights before it, by the names of `LOSSES`, and the answers after it."""

    losses: Mapping[str, float]
    weights: Mapping[str, float]
    answers: Answers


@dataclass(frozen=True)
class DecodeCost:
    """What a generated token costs, counted on two real decoding steps after the prompt, batch 1.

    Attributes:
        flops: of taking in the first one; a multiply-add is 2.
        growth: more for each further one, whose attention has one key more.
        kv_bytes: that each leaves in the cache.
    """

    flops: int
    growth: int
    kv_bytes: int

    def total_flops(self, tokens: int) -> int:
        """Of taking in `tokens` generated tokens one by one."""
        return tokens * self.flops + self.growth * tokens * (tokens - 1) // 2


@dataclass(eq=False)
class Result:
    """What a probe found; it grows while the probe runs.

    Attributes:
        clean, noise: answers to the clean picture, and to it with random noise of the same size.
        cost: of a generated token.
        iterations: see `Iteration`, in order.
        best: index of the first iteration whose answers are longest on average, -1 before the first.
        perturbation: of that iteration, float32, shaped like `pixel_values` and, like them, normalised.
        picture: the perturbed picture in 8 bits, uint8, shaped like `pixel_values`.
        longest: token ids of the longest answer of any iteration; `longest_length` in the unit of `count`.
        again: answers to the best picture with luck it was not chosen by: what the choice of a maximum adds is gone.
        rounded: the same of `picture`, what is left of the effect when the picture is saved.
        complete: whether all iterations and the last two were made.
    """

    clean: Answers
    noise: Answers
    cost: DecodeCost
    perturbation: Tensor
    picture: Tensor
    iterations: list[Iteration] = field(default_factory=list)
    best: int = -1
    longest: tuple[int, ...] = ()
    longest_length: int = 0
    again: Answers | None = None
    rounded: Answers | None = None
    complete: bool = False

    @property
    def lengths(self) -> list[float]:
        """Mean length of each iteration's answers."""
        return [one.answers.mean for one in self.iterations]


@functools.cache
def _seven_billion() -> DecodeCost:
    """A token of LLaVA-1.5-7B in fp16, on its exact language model and after 576 others."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064,
        attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).half().eval()
        return decode_cost(model, {"input_ids": torch.zeros(1, 576, dtype=torch.long)})


@register
class VerboseImages(Published):
    """Optimises a small perturbation of the picture by sign gradients so that a model with known weights talks longer.

    With p_i the next-token distribution at position i of prompt and last answer (N positions, V words) and g the hidden
    states of all layers, in float32:

        L_end = mean_i p_i[end]
        L_unc = sum_i KL(uniform || p_i) = sum_i sum_v (1/V) (log(1/V) - log p_i[v])
        L_div = - nuclear norm of |g|, (layers x positions) x width
        total = L_unc + w_end L_end + w_div L_div,    w_k = |L_unc / (L_k T_k(t))|,   T_k(t) = a ln(t + 1) + b

    Weights are constants to the gradient, and from the second iteration on smoothed: momentum times the old ones plus
    1 - momentum times the new. Each iteration t = 0, 1, … makes one step against the sign of the gradient, clips the
    picture to valid pixels and the perturbation to [-eps, eps], samples answers, and takes the longest as the next
    one's text. Pixels (1, 3, H, W), or (1, crops, 3, H, W), in and out. Also measured: the clean picture, and random
    signs of size eps on it.

    Inducing High Energy-Latency of Large Vision-Language Models with Verbose Images, ICLR 2024,
    https://arxiv.org/abs/2401.11170. A measurement of one's own local models, with foveate methods applied or not
    (the probe then sees the tokens that are left, and only they carry gradient); the weights stay as they are. Where
    paper and release differ, the paper is the default: the release applies its 0.0039 and 0.032 to normalised pixels
    (unit="normalised") and counts words. Instead of energy, which no reading here gives, decode FLOPs and KV bytes are
    counted. `foveate probe verbose` runs it.

    This project's choices: every picture is answered with the same random numbers, so that lengths differ because
    pictures do, and the best one is asked again with others. The text is taken in on top of the prompt's cache, as in
    generation, so that applied methods decide by the prompt. g is without the embeddings. Of several end tokens the
    probabilities are added. "answer" positions are those that predict the answer and its end.
    """

    card = Card(
        slug="verbose-images",
        title="Inducing High Energy-Latency of Large Vision-Language Models with Verbose Images",
        arxiv="2401.11170", year=2024, kind="probe", hosts=("hf-vlm",),
        summary="Measures how much longer an invisible change of the picture can make a model's answer.",
        parameters={
            "iterations": "updates of the perturbation",
            "step": "of one update, in `unit`",
            "eps": "largest change of a pixel, in `unit`; in [0, 1] for 'pixel'",
            "unit": "'pixel': of the range from black to white; 'normalised': of the model's own input",
            "end_schedule": "(a, b) of the delayed-end loss",
            "diversity_schedule": "(a, b) of the diversity loss",
            "momentum": "of the weights, in [0, 1)",
            "losses": "which are used, of 'end', 'uncertainty', 'diversity'",
            "positions": "'all' of prompt, picture and answer; 'answer': those that predict the answer and its end",
            "samples": "answers to each picture",
            "top_p": "nucleus that answers are sampled from, in [0, 1]; 0 is greedy, where one answer is enough",
            "max_new_tokens": "the length cap of an answer",
            "count": "the unit of lengths: 'tokens', or 'words' between white space",
            "seed": "of the first noise, the control's noise and the answers",
        },
    )  # fmt: skip

    claims = (
        Claim(
            "KV bytes a generated token, fp16, LLaVA-1.5-7B", "value", 524_288, "card", 0,
            value=lambda cls: _seven_billion().kv_bytes,
        ),
        Claim(
            # 32 (4 h^2 + 3 h m) + h V + 2 * 32 * 577 h, h = 4096, m = 11008, V = 32064.
            "MACs of decoding a token after 576, LLaVA-1.5-7B", "value", 6_758_596_608, "card", 0,
            value=lambda cls: _seven_billion().flops / 2,
        ),
        Claim(
            "first iterations in which T of the delayed-end loss is negative", "value", 7, "card", 0,
            value=lambda cls: next(t for t in range(100) if temporal(cls().end_schedule, t) > 0),
        ),
    )  # fmt: skip

    def __init__(
        self,
        *,
        iterations: int = 1000,
        step: float = 1 / 255,
        eps: float = 8 / 255,
        unit: str = "pixel",
        end_schedule: Sequence[float] = (10.0, -20.0),
        diversity_schedule: Sequence[float] = (0.5, 1.0),
        momentum: float = 0.9,
        losses: Sequence[str] = LOSSES,
        positions: str = "all",
        samples: int = 3,
        top_p: float = 0.9,
        max_new_tokens: int = 512,
        count: str = "tokens",
        seed: int = 256,
    ) -> None:
        self.iterations = whole("iterations", iterations, 1)
        self.unit = choice("unit", unit, ("pixel", "normalised"))
        self.step = within("step", step, "(0, inf)")
        self.eps = within("eps", eps, "[0, 1]" if unit == "pixel" else "[0, inf)")
        self.end_schedule = _schedule("end_schedule", end_schedule)
        self.diversity_schedule = _schedule("diversity_schedule", diversity_schedule)
        self.momentum = within("momentum", momentum, "[0, 1)")
        if isinstance(losses, str) or not isinstance(losses, Sequence) or not losses:
            raise InputError(f"losses must be a list of at least one of {', '.join(LOSSES)}, not {losses!r}")
        self.losses = tuple(choice("losses", one, LOSSES) for one in losses)
        self.positions = choice("positions", positions, ("all", "answer"))
        self.samples = whole("samples", samples, 1)
        self.top_p = within("top_p", top_p, "[0, 1]")
        self.max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
        self.count = choice("count", count, ("tokens", "words"))
        self.seed = whole("seed", seed)

    def run(
        self,
        model: Any,
        inputs: Mapping[str, Tensor],
        processor: Any,
        *,
        on_iteration: Callable[[Result], None] = lambda result: None,
    ) -> Result:
        """Probes a model with one prompt and its picture.

        Args:
            model: a vision-language model of transformers whose `pixel_values` are (1, [crops,] 3, H, W), on its
                device, with methods applied or not. Its own generation settings hold but for sampling and length.
            inputs: of one prompt without padding, `pixel_values` best in float32; they are not changed.
            processor: the model's. Its `image_processor` says how pixels were normalised; its `tokenizer` is used to
                count words only.
            on_iteration: called with the result so far after each iteration; after an exception in `run`, an
                interruption included, that result is as it was then.

        Returns:
            a `Result`. The model's weights, modes and `requires_grad` are as before.

        Raises:
            InputError: other inputs than these, a model without an end token, a prompt and cap longer than the model
                takes, a gradient that is not finite.
        """
        target = _Target(self, model, inputs, processor)
        with frozen(model), torch.enable_grad():
            generator = torch.Generator().manual_seed(self.seed)
            shape = target.clean.shape
            signs = torch.randint(0, 2, shape, generator=generator).to(target.clean) * 2 - 1
            delta = torch.randn(shape, generator=generator).to(target.clean)
            clean = target.answers(target.clean, self.seed)
            noise = target.answers(target.clean + target.project(signs * target.eps), self.seed)
            nothing = torch.zeros_like(target.clean)
            cost = decode_cost(model, target.inputs | {"pixel_values": target.seen(target.clean)})
            result = Result(clean, noise, cost, nothing, target.in_bytes(target.clean))
            answer = clean.longest
            weights: dict[str, float] = {}
            for t in range(self.iterations):
                delta, losses, weights = self._update(target, delta, answer, weights, t)
                answers = target.answers(target.clean + delta, self.seed)
                answer = answers.longest
                if max(answers.lengths) > result.longest_length:
                    result.longest, result.longest_length = answer, max(answers.lengths)
                if not t or answers.mean > result.iterations[result.best].answers.mean:
                    result.best, result.perturbation = t, delta
                    result.picture = target.in_bytes(target.clean + delta)
                result.iterations.append(Iteration(losses, weights, answers))
                on_iteration(result)
            result.again = target.answers(target.clean + result.perturbation, self.seed + 1)
            result.rounded = target.answers(target.from_bytes(result.picture), self.seed + 1)
            result.complete = True
        return result

    def _update(
        self, target: _Target, delta: Tensor, answer: tuple[int, ...], weights: dict[str, float], t: int
    ) -> tuple[Tensor, dict[str, float], dict[str, float]]:
        """The next perturbation, and the losses and weights that made it."""
        delta = delta.detach().requires_grad_()
        log_p, states = target.forward(target.clean + delta, answer)
        # The base of the weights, so it is needed even where it is no part of the total.
        losses = {"uncertainty": uncertainty_loss(log_p)}
        if "end" in self.losses:
            losses["end"] = end_loss(log_p, target.ends)
        if "diversity" in self.losses:
            losses["diversity"] = diversity_loss(states)
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        weights = self.weights(values, t, weights)
        total = torch.stack([weights[name] * loss for name, loss in losses.items() if name in self.losses]).sum()
        (gradient,) = torch.autograd.grad(total, delta)
        if not bool(gradient.isfinite().all()):
            raise InputError(f"the gradient of the picture is not finite in {target.model.dtype}; use float32")
        return target.project(delta.detach() - target.step * gradient.sign()), values, weights

    def weights(self, losses: Mapping[str, float], t: int, before: Mapping[str, float]) -> dict[str, float]:
        """The weight of each loss in iteration t, counted from 0; `before` are the last one's, empty at the first."""
        schedules = {"end": self.end_schedule, "diversity": self.diversity_schedule}
        found = {"uncertainty": 1.0}
        for name in losses.keys() - {"uncertainty"}:
            raw = abs(losses["uncertainty"]) / max(abs(losses[name] * temporal(schedules[name], t)), _SMALLEST)
            found[name] = self.momentum * before[name] + (1 - self.momentum) * raw if before else raw
        return found


def _schedule(name: str, value: Sequence[float]) -> tuple[float, float]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise InputError(f"{name} must be two numbers (a, b), not {value!r}")
    a, b = (within(name, one, "(-inf, inf)") for one in value)
    return a, b


def temporal(schedule: tuple[float, float], t: int) -> float:
    """T(t) = a ln(t + 1) + b, t counted from 0."""
    return schedule[0] * math.log(t + 1) + schedule[1]


def end_loss(log_p: Tensor, ends: Sequence[int]) -> Tensor:
    """Mean probability of the end tokens, in [0, 1]; `log_p` (N, V) are log-probabilities."""
    return log_p[:, list(ends)].exp().sum(1).mean()


def uncertainty_loss(log_p: Tensor) -> Tensor:
    """Sum over positions of KL(uniform || p_i), nats, 0 for uniform distributions; `log_p` (N, V)."""
    return -(log_p.mean(1) + math.log(log_p.shape[1])).sum()


def diversity_loss(states: Sequence[Tensor]) -> Tensor:
    """Minus the nuclear norm of all layers' |states| one below the other, float32; each (positions, D)."""
    return -torch.linalg.svdvals(torch.cat([one.float().abs() for one in states])).sum()


@torch.no_grad()
def decode_cost(model: Any, inputs: Mapping[str, Any]) -> DecodeCost:
    """Counts two decoding steps of a model after the prefill of `inputs`."""
    output = model(**inputs, use_cache=True)
    token = inputs["input_ids"][:, -1:]
    mask = inputs.get("attention_mask")
    flops, held = [], [_cache_bytes(output.past_key_values)]
    for _ in range(2):
        step: dict[str, Any] = {"input_ids": token, "past_key_values": output.past_key_values, "use_cache": True}
        if mask is not None:
            mask = torch.cat([mask, mask[:, -1:]], 1)
            step["attention_mask"] = mask
        # Fused kernels of attention are not counted on every device; the plain products are.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            output = model(**step)
        flops.append(int(counter.get_total_flops()))
        held.append(_cache_bytes(output.past_key_values))
    return DecodeCost(flops[0], flops[1] - flops[0], held[1] - held[0])


def _cache_bytes(cache: Any) -> int:
    return sum(one.numel() * one.element_size() for layer in cache.layers for one in (layer.keys, layer.values))


class _Target:
    """A model, one prompt and its picture.

    Attributes:
        inputs: all but the picture, on the model's device.
        clean: the picture, float32, normalised.
        eps, step: the probe's, in normalised pixels, (3, 1, 1).
        ends: token ids that end an answer.
    """

    def __init__(self, probe: VerboseImages, model: Any, inputs: Mapping[str, Tensor], processor: Any) -> None:
        self.probe, self.model, self.processor = probe, model, processor
        ids, pixels = inputs.get("input_ids"), inputs.get("pixel_values")
        if ids is None or pixels is None or pixels.ndim < 4 or pixels.shape[-3] != 3:
            raise InputError("verbose-images needs input_ids, and pixel_values (1, 3, H, W) or (1, crops, 3, H, W)")
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        if len(ids) != 1 or not bool(mask.all()):
            raise InputError("verbose-images probes one prompt at a time, without padding")
        self.inputs = {key: value.to(model.device) for key, value in inputs.items() if key != "pixel_values"}
        self.inputs["attention_mask"] = mask.to(model.device)
        ends = model.generation_config.eos_token_id
        self.ends: tuple[int, ...] = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
        if not self.ends:
            raise InputError("verbose-images delays the end token; generation_config.eos_token_id of the model is None")
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and ids.shape[1] + probe.max_new_tokens > room:
            raise InputError(
                f"a prompt of {ids.shape[1]} tokens and max_new_tokens={probe.max_new_tokens} are more than the "
                f"{room} tokens that the model takes"
            )
        self.clean = pixels.detach().to(model.device, torch.float32)
        self._read_normalisation(processor.image_processor)

    def _read_normalisation(self, prepare: Any) -> None:
        normalised = getattr(prepare, "do_normalize", True)
        rescale: float = prepare.rescale_factor if getattr(prepare, "do_rescale", True) else 1.0

        def by_channel(values: Any) -> Tensor:
            return torch.as_tensor(values, dtype=torch.float32, device=self.clean.device).reshape(3, 1, 1)

        self.white = 255 * rescale
        self.mean = by_channel(prepare.image_mean if normalised else [0.0] * 3)
        self.std = by_channel(prepare.image_std if normalised else [1.0] * 3)
        self.low, self.high = (0 - self.mean) / self.std, (self.white - self.mean) / self.std
        beyond = torch.maximum(self.low - self.clean, self.clean - self.high).amax()
        if not bool(beyond <= 0.01 * self.white / self.std.amin()):
            raise InputError("pixel_values are not what this processor makes: pixels outside black and white")
        factor = self.white / self.std if self.probe.unit == "pixel" else torch.ones_like(self.std)
        self.eps, self.step = self.probe.eps * factor, self.probe.step * factor

    def project(self, delta: Tensor) -> Tensor:
        """The perturbation whose picture is valid, and then itself within eps (which leaves the picture valid)."""
        picture = (self.clean + delta).clamp(self.low, self.high)
        return (picture - self.clean).clamp(-self.eps, self.eps)

    def seen(self, pixels: Tensor) -> Tensor:
        """The pixels in the model's own dtype."""
        return pixels.to(self.model.dtype)

    def in_bytes(self, pixels: Tensor) -> Tensor:
        """uint8, as a picture file holds them."""
        return ((pixels * self.std + self.mean) * (255 / self.white)).round().clamp(0, 255).to(torch.uint8)

    def from_bytes(self, picture: Tensor) -> Tensor:
        """Normalised pixels of a picture in 8 bits."""
        return (picture.float() * (self.white / 255) - self.mean) / self.std

    def forward(self, pixels: Tensor, answer: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """(N, V) log-probabilities, and each layer's states (N', D), of the prompt followed by `answer`.

        The answer is taken in on top of the prompt's cache, as in generation. Where methods dropped tokens within the
        language model, layers differ in N', and N is the last one's.
        """
        picture = self.seen(pixels)
        output = self.model(
            **self.inputs, pixel_values=picture, use_cache=True, output_hidden_states=True, logits_to_keep=1
        )
        prompt = output.hidden_states[1:]
        if self.probe.positions == "answer":
            prompt = [one[:, -1:] for one in prompt]
        parts = [prompt]
        if answer:
            ids = torch.tensor([answer], device=pixels.device)
            mask = self.inputs["attention_mask"]
            output = self.model(
                input_ids=ids, attention_mask=torch.cat([mask, torch.ones_like(ids, dtype=mask.dtype)], 1),
                past_key_values=output.past_key_values, use_cache=True, output_hidden_states=True, logits_to_keep=1,
            )  # fmt: skip
            parts.append(output.hidden_states[1:])
        states = [torch.cat([one[0] for one in layer]) for layer in zip(*parts)]
        # Not the forward's logits, which repeat tokens where methods dropped some.
        return self.model.get_output_embeddings()(states[-1]).float().log_softmax(-1), states

    def answers(self, pixels: Tensor, seed: int) -> Answers:
        """The model's answers to a picture, sampled with random numbers of `seed`."""
        probe, settings = self.probe, self.model.generation_config
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if probe.top_p:
            sampling = {
                "do_sample": True, "temperature": 1.0, "top_p": probe.top_p, "top_k": 0,
                "num_return_sequences": probe.samples,
            }  # fmt: skip
        pad = self.ends[0] if settings.pad_token_id is None else settings.pad_token_id
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            start = time.perf_counter()
            output = self.model.generate(
                **self.inputs, pixel_values=self.seen(pixels), max_new_tokens=probe.max_new_tokens, num_beams=1,
                pad_token_id=pad, **sampling,
            )  # fmt: skip
            rows: list[list[int]] = output[:, self.inputs["input_ids"].shape[1] :].tolist()
            seconds = time.perf_counter() - start
        said = [row[: next((i for i, token in enumerate(row) if token in self.ends), len(row))] for row in rows]
        lengths = [self._length(one) for one in said]
        longest = said[lengths.index(max(lengths))]
        return Answers(tuple(lengths), tuple(map(len, said)), tuple(longest), seconds)

    def _length(self, answer: list[int]) -> int:
        if self.probe.count == "tokens":
            return len(answer)
        return len(self.processor.tokenizer.decode(answer, skip_special_tokens=True).split())
