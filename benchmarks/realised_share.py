"""How much of the FLOPs saved is time saved: (1 - time ratio) / (1 - FLOPs ratio). Goal: at least 0.95.

Measured from the projector's entry to the language model's exit (`llm`: scoring, merging and dropping are in it), and
on the whole forward (`model`).

FLOPs are counted on both sides alike: matrix products, convolutions and attention of the real run, a method's own
scoring included; softmax, norms, sorting and copying take time and count nothing. Causal attention counts as the full
square on both sides, although the kernel skips half of it: the FLOPs that shorter attention saves are thus rather over-
than underrated, which makes the goal harder. One thread measures best: what is left besides matrix products then weighs
what it costs. Rows that an earlier run with the same options has measured are kept.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from llava_shaped import Section, arguments, build, clock, earlier, prefill, write

from foveate.apply import apply
from foveate.hosts import adapt
from foveate.measure.flops import count_flops, flop_counter
from foveate.measure.timing import Timing, interleave, seconds
from foveate.method import Method, method_class


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--methods", nargs="+", default=["pyramiddrop", "fopru", "aim"])
    parser.add_argument("--result", default="realised_share", help="name of the JSON file")
    options = parser.parse_args()
    model, inputs = build(options)
    run = prefill(model, inputs)
    shape = adapt(model).shape

    def summary(timing: Timing, ratio: float) -> dict[str, float]:
        return {
            "flops_ratio": ratio, "time_ratio": timing.ratio, "time_low": timing.low, "time_high": timing.high,
            "dense_seconds": timing.first_seconds, "realised_share": (1 - timing.ratio) / (1 - ratio),
        }  # fmt: skip

    results = earlier(options.result, options, apart=("budgets", "methods")).get("results", [])
    for slug in options.methods:
        for budget in options.budgets:
            if any((row["method"], row["budget"]) == (slug, budget) for row in results):
                continue
            method = method_class(slug).for_budget(budget, shape)
            language, whole = _timed(model, run, method, options)
            dense_flops = count_flops(run), _section_flops(model, run, None)
            with apply(model, method):
                flops = count_flops(run)
            row = {
                "method": slug,
                "budget": budget,
                "settings": method.hyperparameters(),
                "llm": summary(language, _section_flops(model, run, method) / dense_flops[1]),
                "model": summary(whole, flops / dense_flops[0]),
            }
            results.append(row)
            print(slug, budget, row["llm"], row["model"])
            write(options.result, options, {"goal": "llm.realised_share >= 0.95", "results": results})


def _timed(model: Any, run: Callable[[], Any], method: Method, options: Namespace) -> tuple[Timing, Timing]:
    """Dense beside the method, of the language model's section and of the whole forward, in the same pairs."""
    section = Section(model, clock(options.device))
    spent: list[float] = []

    def once(context: AbstractContextManager[Any]) -> float:
        with context:
            whole = seconds(run, options.device)
        spent.append(section.spent)
        return whole

    whole = interleave(lambda: once(nullcontext()), lambda: once(apply(model, method)), options.pairs, warmup=2)
    section.remove()
    return Timing.of(list(zip(spent[::2], spent[1::2]))[-options.pairs :]), whole


def _section_flops(model: Any, run: Callable[[], Any], method: Any) -> float:
    """FLOPs from the projector's entry to the language model's exit, with a method or (None) without."""
    with flop_counter() as counter:
        section = Section(model, lambda: float(counter.get_total_flops()))
        try:
            with nullcontext() if method is None else apply(model, method):
                run()
        finally:
            section.remove()
    return section.spent


if __name__ == "__main__":
    main()
