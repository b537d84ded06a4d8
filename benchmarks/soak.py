"""Random combinations of method, host, budget and batch, each against every sample alone and without the cache.

A combination is a training-free method (a baseline, or a stack of two) with a budget and now and then another switch,
on a tiny host of a real transformers class, and a batch of 1 to 4 samples with different numbers and sizes of pictures
and lengths of text, left padded (by more than it needs, too), with or without the cache, in float32. With the method
applied, greedy decoding of the batch is compared with that of each sample alone without the cache: logits of the
prompt's last token and of every token after it, and ids. So are the logits of a right-padded forward. Ids may differ
where the two best logits are closer than `TIE`; what follows in that sample is then another text and not compared.
After the method was taken off, weights, buffers, hooks, configuration and logits must be bit for bit what they were.

A method that drops cache entries before decoding (MustDrop) says that text made with a cache is another one; there,
only the prompt's last token is compared with the uncached result, what follows with the sample alone with the cache.

What a method refuses (InputError) is noted with its sentence and another combination is drawn, until one runs. Where
float32 differs and float64 does not, a choice or a product hung on rounding: the outcome is then "rounding".

Writes benchmarks/results/soak.json after every combination; run again, it goes on after the last one. Exit code 1 if
any differs. The hosts are those of the tests: `PYTHONPATH=tests python benchmarks/soak.py --count 500`
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from llava_shaped import RESULTS, portable
from torch import Tensor, nn

from foveate.apply import apply
from foveate.configuration import describe
from foveate.measure.environment import environment
from foveate.method import HostShape, InputError, Method, registry
from foveate.report.write import write_files
from tiny import IMAGE, PAD, VIDEO, prompt, single, vlm

TOLERANCE = 1e-4
"""Of logits, times the greatest of them where that is above 1."""
PRECISE = 1e-6
"""The same in float64: generate hands out logits in float32."""
TIE = 1e-5
STEPS = 4
"""Tokens that are generated."""

HOSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava-1.5, CLIP and Llama": ("clip-llama", {}),
    "llava-1.5, CLIP and Qwen2": ("clip-qwen2", {}),
    "llava-1.5, SigLIP and Qwen2": ("siglip-qwen2", {}),
    "llava-next": ("next", {}),
    "llava-onevision": ("onevision", {}),
    "llava-onevision, resampled": ("onevision", {"vision_aspect_ratio": "anyres_max_2"}),
    "internvl": ("internvl", {}),
    "qwen2-vl": ("qwen2-vl", {}),
    "qwen2.5-vl": ("qwen2.5-vl", {}),
}
"""Names of `tiny.vlm`, and configuration; OneVision and Qwen take pictures and clips."""

BUDGETS = (1.0, 0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.25, 0.15, 0.1, 0.05)
UNREDUCED = ("dense", "var-sink")
"""Whose only budget is 1."""

SWITCHES: dict[str, dict[str, Sequence[Any]]] = {
    "aim": {
        "metric": ("features",), "order": ("spatial",), "removed": ("mask",), "first_layer": (0, 1),
        "step": (0.0, 0.2, 0.5),
    },
    "fastv": {"queries": ("all",), "layer": (1, 3)},
    "fopru": {"strategy": ("row",), "queries": ("patches", "class"), "layer": (0, 2)},
    "globalcom2": {
        "order": ("score",), "single": ("bypass",), "full": ("budgets",), "mix": (0.0, 1.0),
        "newlines": ("every",),
    },
    "hired": {"alpha": (0.0, 0.2, 1.0), "regions": ("strips",), "score": ("count",)},
    "mustdrop": {
        "window": (2,), "order": ("spatial",), "key": (0.0, 0.5), "cache": ("full",), "positions": ("original",),
        "merge": (None, 0.0, 1.0), "layers": ((0, 2),), "thr_g": (0.03,), "thr_i": (0.05,), "similarity": (0.1, 2.0),
    },
    "pyramiddrop": {"layers": ((1, 2), (0.5,), (1, 3))},
    "random": {"seed": (1, 2)},
    "tome": {"r": (1, 2, 4)},
    "var-sink": {
        "dimensions": ((3, 17), (5,)), "minimum": (0.0, 0.1), "p": (0.0, 0.3), "rho": (0.9,), "rho_test": ("paper",),
        "p_means": ("paper",), "last_layer": (True,),
    },
    "visionzip": {"contextual": (0.0, 0.5)},
    "vtc-cls": {"layers": (1, 2), "combine": ("max", "min")},
    "yopo": {
        "window": (1, 3, 7), "neighbours": ("earlier", "all"), "ffn": (1.0, 4.0), "removed": ("simulate", "keep"),
        "cut": (1, 0.75),
    },
}  # fmt: skip
"""Settings beside the budget, other values than the defaults. `minimum_over="batch"` of MustDrop is left out: it makes
samples depend on each other on purpose."""

SINK_TAU = (1.0, 1.5, 2.5)
"""So that there are sinks: random weights of this width have no activations above 20 times the mean."""


@dataclass(frozen=True)
class Combination:
    """What is run; all of it follows from the seed and the number.

    Attributes:
        samples, sizes: see `tiny.prompt`; `content` is its seed.
        extra: columns of left padding on top of what the longest sample leaves to the others.
    """

    number: int
    host: str
    layers: int
    image: int
    methods: list[dict[str, Any]]
    budget: float
    samples: list[tuple[int, ...]]
    sizes: list[tuple[int, ...]] | None
    content: int
    extra: int
    cached: bool


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        outcome: "same"; "rounding" if only float32 differs; else "differs", and `differences` say where.
        worst: greatest difference of a logit, in units of the tolerance.
        ties: samples whose ids part at a tie.
        visual: visual tokens of all samples in the prompt, and those that the language model's last layer has.
    """

    outcome: str = "same"
    worst: float = 0.0
    ties: int = 0
    differences: list[str] = field(default_factory=list)
    visual: tuple[int, int] = (0, 0)


class Refused(Exception):
    """Raised for a combination that a method refuses, with the sentence."""


# -- drawing


@functools.cache
def methods() -> dict[str, type[Method]]:
    """slug -> class of what is drawn, as it was when the soak began."""
    return {slug: cls for slug, cls in registry().items() if "hf-vlm" in cls.card.hosts and cls.card.training_free}


_MODELS: dict[tuple[str, int, int], Any] = {}


def host(name: str, layers: int, image: int) -> Any:
    key = (name, layers, image)
    if key not in _MODELS:
        kind, config = HOSTS[name]
        _MODELS[key] = vlm(kind, layers=layers, image=image, **config)
    return _MODELS[key]


def draw(seed: int, number: int, attempt: int) -> Combination:
    """Raises `Refused` where the methods cannot be set to the budget."""
    dice = random.Random(f"{seed}-{number}-{attempt}")
    name = dice.choice(list(HOSTS))
    layers = dice.choice((4, 6, 8))
    # Of LLaVA-1.5, a larger picture has more patches.
    image = dice.choice((16, 24)) if name.startswith("llava-1.5") else 16
    with apply(host(name, layers, image), "dense") as applied:
        shape = applied.host.shape
    budget = dice.choice(BUDGETS)
    try:
        chosen = _methods(dice, budget, shape)
    except InputError as error:
        raise Refused(str(error)) from None
    samples = _samples(dice, apart=HOSTS[name][0].startswith("qwen"))
    return Combination(
        number, name, layers, image, describe(chosen), budget, samples,
        _sizes(dice, HOSTS[name][0], sum(len(one) - 1 for one in samples)), dice.randrange(10**6),
        dice.choice((0, 0, 0, 1, 5)), dice.random() < 0.6,
    )  # fmt: skip


def _methods(dice: random.Random, budget: float, shape: HostShape) -> list[Method]:
    """One method, or (a third of the time) two whose stages do not clash and of which neither is a baseline."""
    if dice.random() < 2 / 3:
        return [_method(dice, dice.choice(list(methods())), budget, shape)]
    names = [slug for slug, cls in methods().items() if not cls.card.baseline]
    while True:
        pair = [_method(dice, slug, budget**0.5, shape) for slug in dice.sample(names, 2)]
        if not set(pair[0].acts_at(shape)) & set(pair[1].acts_at(shape)):
            return pair


def _method(dice: random.Random, slug: str, budget: float, shape: HostShape) -> Method:
    cls = methods()[slug]
    settings = cls.for_budget(1.0 if slug in UNREDUCED else budget, shape).hyperparameters()
    switches = SWITCHES.get(slug, {})
    for name in dice.sample(list(switches), min(len(switches), dice.choice((0, 0, 1, 2)))):
        settings[name] = dice.choice(switches[name])
    if slug == "var-sink":
        settings["tau"] = dice.choice(SINK_TAU)
    if slug == "mustdrop" and {settings["thr_g"], settings["thr_i"]} & {0.03, 0.05}:
        settings["keep"] = None
    if slug == "pyramiddrop" and not isinstance(settings["keep"], float):
        settings["keep"] = 0.5
    return cls(**settings)


def _samples(dice: random.Random, apart: bool) -> list[tuple[int, ...]]:
    """1 to 4 samples of 0 to 3 pictures, at least one in all; the text ends with at least one token.

    Qwen's own positions want text between any two pictures.
    """

    def sample() -> tuple[int, ...]:
        pictures = dice.choice((0, 1, 1, 1, 2, 3))
        text = [max(dice.choice((0, 1, 2, 5)), int(apart and k > 0)) for k in range(pictures)]
        return (*text, dice.randint(1, 9))

    while True:
        samples = [sample() for _ in range(dice.randint(1, 4))]
        if any(len(one) > 1 for one in samples):
            return samples


def _sizes(dice: random.Random, kind: str, pictures: int) -> list[tuple[int, ...]] | None:
    if kind == "next":
        return [(dice.randint(6, 40), dice.randint(6, 40)) for _ in range(pictures)]
    if kind == "onevision":
        frames = dice.randint(1, 4)
        return [
            (frames, 16, 16) if dice.random() < 0.3 else (dice.randint(6, 40), dice.randint(6, 40))
            for _ in range(pictures)
        ]
    if kind.startswith("qwen"):
        return [
            (
                *((dice.randint(1, 3),) if dice.random() < 0.3 else ()),
                2 * dice.randint(1, 5), 2 * dice.randint(1, 5),
            )
            for _ in range(pictures)
        ]  # fmt: skip
    return None


# -- running


def fingerprint(model: nn.Module) -> Any:
    """Hooks, attributes and configuration of every module."""
    modules = list(model.modules())
    hooks = [name for name in vars(nn.Module()) if "hooks" in name]
    return (
        [(sorted(vars(one)), [len(vars(one)[name]) for name in hooks]) for one in modules],
        copy.deepcopy(model.config.to_dict()),
        [getattr(one.config, "_attn_implementation", None) for one in modules if hasattr(one, "config")],
    )


def run(combination: Combination, dtype: torch.dtype = torch.float32) -> Outcome:
    """Runs a combination and compares. Raises `Refused`."""
    model = host(combination.host, combination.layers, combination.image)
    if dtype != torch.float32:
        model = copy.deepcopy(model).to(dtype)
    tolerance = TOLERANCE if dtype == torch.float32 else PRECISE
    given = _given(model, combination, "left", dtype)
    to_the_right = _given(model, combination, "right", dtype)
    alone = [single(model, given, b) for b in range(len(combination.samples))]
    given = _padded(given, combination.extra)
    applying = [
        methods()[one["method"]](**{name: _tuple(value) for name, value in one["settings"].items()})
        for one in combination.methods
    ]
    before = fingerprint(model)
    tensors = {name: one.clone() for name, one in (*model.named_parameters(), *model.named_buffers())}
    dense = _logits(model, given)
    outcome = Outcome()
    try:
        with apply(model, applying) as applied:
            shape = applied.host.shape
            late = combination.cached and any("llm.decode" in one.acts_at(shape) for one in applying)
            try:
                batch = _generate(model, given, combination.cached)
                outcome.visual = _visual(given, applied.trace)
                right = _logits(model, to_the_right)
            except InputError as error:
                raise Refused(_where_refused(model, alone, error)) from None
            for b, inputs in enumerate(alone):
                try:
                    uncached = _generate(model, inputs, False)
                    reference = _generate(model, inputs, True) if late else uncached
                except InputError as error:
                    outcome.differences.append(f"sample {b}: refused alone only: {error}")
                    continue
                last = int(to_the_right["attention_mask"][b].sum()) - 1
                _compare(outcome, f"sample {b}, right padded", right[b, last], uncached[1][0, 0], tolerance)
                _compare(outcome, f"sample {b}, token 0", batch[1][b, 0], uncached[1][0, 0], tolerance)
                _follow(outcome, b, model, batch, reference, tolerance)
    except InputError as error:
        raise Refused(str(error)) from None
    finally:
        kept = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        same = kept.keys() == tensors.keys() and all(torch.equal(one, tensors[name]) for name, one in kept.items())
        if not (same and fingerprint(model) == before and torch.equal(_logits(model, given), dense)):
            raise RuntimeError(f"the model is not as it was before: {combination}")
    if outcome.differences:
        outcome.outcome = "differs"
    return outcome


def _follow(
    outcome: Outcome, b: int, model: Any, batch: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], within: float
) -> None:
    """Compares what sample `b` of the batch says with what it says alone."""
    for step in range(STEPS):
        if step:
            _compare(outcome, f"sample {b}, token {step}", batch[1][b, step], reference[1][0, step], within)
        if batch[0][b, step] != reference[0][0, step]:
            allowed = reference[1][0, step].clone()
            allowed[model.generation_config.suppress_tokens] = -torch.inf
            first, second = allowed.topk(2).values.tolist()
            if first - second >= TIE:
                outcome.differences.append(f"sample {b}, token {step}: another id, the best lead by {first - second}")
            outcome.ties += first - second < TIE
            return


def _compare(outcome: Outcome, what: str, one: Tensor, other: Tensor, tolerance: float) -> None:
    difference = float((one - other).abs().max() / (tolerance * max(1.0, float(other.abs().max()))))
    # Not a number is a difference.
    if not difference <= 1:
        outcome.differences.append(f"{what}: logits differ by {difference:.3g} tolerances")
    outcome.worst = max(outcome.worst, difference)


def _where_refused(model: Any, alone: list[dict[str, Tensor]], error: InputError) -> str:
    """The sentence; marked where each sample alone is taken."""
    try:
        for inputs in alone:
            _logits(model, inputs)
    except InputError:
        return str(error)
    return f"(only together) {error}"


def _given(model: Any, combination: Combination, padding: str, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = prompt(model, combination.samples, sizes=combination.sizes, seed=combination.content, padding=padding)
    return {name: one.to(dtype) if one.is_floating_point() else one for name, one in inputs.items()}


def _padded(inputs: dict[str, Tensor], extra: int) -> dict[str, Tensor]:
    """With `extra` columns of padding more at the left."""
    fillings = {"input_ids": PAD, "attention_mask": 0, "mm_token_type_ids": 0}
    return {
        name: nn.functional.pad(one, (extra, 0), value=fillings[name]) if name in fillings else one
        for name, one in inputs.items()
    }


@torch.no_grad()
def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    result: Tensor = model(**inputs).logits
    return result


def _generate(model: Any, inputs: dict[str, Tensor], cached: bool) -> tuple[Tensor, Tensor]:
    """Ids (B, STEPS) and logits (B, STEPS, V), before any token is suppressed."""
    found = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, use_cache=cached, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return found.sequences[:, -STEPS:], torch.stack(found.logits, 1)


def _visual(inputs: dict[str, Tensor], trace: Sequence[Any]) -> tuple[int, int]:
    ids = inputs["input_ids"]
    left = [sum(one.tokens_out) for one in trace if one.stage.startswith(("llm.input", "llm.layer"))]
    return int(((ids == IMAGE) | (ids == VIDEO)).sum()), left[-1]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def soak(seed: int, number: int) -> dict[str, Any]:
    """Draws combination `number` until one runs; JSON values of it, its outcome and what was refused before."""
    refused: list[dict[str, Any]] = []
    attempt = 0
    while True:
        combination = None
        try:
            combination = draw(seed, number, attempt)
            outcome = run(combination)
            break
        except Refused as error:
            refused.append({"sentence": str(error), "combination": combination and asdict(combination)})
        attempt += 1
    if outcome.differences:
        precise = run(combination, torch.float64)
        outcome.outcome = "differs" if precise.differences else "rounding"
    found: dict[str, Any] = json.loads(json.dumps({**asdict(combination), **asdict(outcome)}))
    found["refused"] = [f"{_names(one['combination'])}: {one['sentence']}" for one in refused]
    return found


def _names(combination: dict[str, Any] | None) -> str:
    if combination is None:
        return "budget"
    return f"{'+'.join(one['method'] for one in combination['methods'])} on {combination['host']}"


# -- results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="number of the first combination")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = environment(seed=options.seed)
    about["command"] = " ".join(["PYTHONPATH=tests", *(portable(one) for one in about["command"].split())])
    about["methods"] = list(methods())
    try:
        done = _read(options.out, about)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    started = time.perf_counter()
    for number in range(options.first, options.first + options.count):
        if number in done:
            continue
        one = done[number] = soak(options.seed, number)
        if one["outcome"] != "same":
            print(json.dumps(one), flush=True)
        _write(options.out, about, done)
        if number % 25 == 24:
            print(number + 1, _summary(done), f"{time.perf_counter() - started:.0f} s", flush=True)
    _write(options.out, about, done)
    summary = _summary(done)
    print(json.dumps(summary, indent=2))
    return int(summary["outcomes"].get("differs", 0) > 0)


def _read(path: Path, about: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The combinations of an earlier run. InputError for what is none, or draws or runs others."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        same = all(values["environment"][name] == about[name] for name in ("seed", "versions", "methods"))
        done = {int(one["number"]): one for one in values["combinations"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no results of a soak to go on with ({error!r}); give another --out") from None
    if not same:
        raise InputError(f"{path}: made with another seed, other methods or other versions; give another --out")
    return done


def _summary(done: dict[int, dict[str, Any]]) -> dict[str, Any]:
    every = done.values()
    methods = Counter("+".join(m["method"] for m in one["methods"]) for one in every)
    return {
        "combinations": len(done),
        "outcomes": dict(Counter(one["outcome"] for one in every)),
        "worst": max((one["worst"] for one in every if one["outcome"] == "same"), default=0.0),
        "ties": sum(one["ties"] for one in every),
        "fewer_tokens": sum(one["visual"][1] < one["visual"][0] for one in every),
        "cached": sum(one["cached"] for one in every),
        "samples": sum(len(one["samples"]) for one in every),
        "refusals": sum(len(one["refused"]) for one in every),
        "hosts": dict(Counter(one["host"] for one in every)),
        "single": {name: count for name, count in sorted(methods.items()) if "+" not in name},
        "stacks": sum(count for name, count in methods.items() if "+" in name),
    }


def _write(path: Path, about: dict[str, Any], done: dict[int, dict[str, Any]]) -> None:
    refusals = Counter(sentence for one in done.values() for sentence in one["refused"])
    head = {
        "environment": about, "tolerance": TOLERANCE, "tie": TIE, "steps": STEPS, "summary": _summary(done),
        "refusals": dict(refusals.most_common()),
    }  # fmt: skip
    rows = [json.dumps(done[number]) for number in sorted(done)]
    # A line for each combination.
    text = json.dumps(head, indent=2)[:-2] + ',\n  "combinations": [\n    ' + ",\n    ".join(rows) + "\n  ]\n}\n"
    write_files(path.parent, {path.name: text})


if __name__ == "__main__":
    sys.exit(main())
