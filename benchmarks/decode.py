"""Fewer passes for an autoregressive picture than ancestral decoding has: SJD, or LANTERN and its delta.

On a folder that `foveate train tiny-ar` wrote, or the zoo's, with captions of the test split. Passes are counted for
each picture, as if it were decoded alone: rows of a batch do not wait for one another. Times are ratios to ancestral
decoding (LANTERN: to that, too), from interleaved pairs, at `--timed-batch` pictures at once. Pictures are judged as
in docs/zoo.md; "ancestral again" has another seed and says how much of a difference is luck.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from llava_shaped import write
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from foveate.data.scenes import CaptionedScenes, stacked
from foveate.measure.generation import FrechetDistance, Judge, adherence
from foveate.measure.timing import interleave, seconds
from foveate.methods.decode.lantern import Lantern
from foveate.methods.decode.sjd import Sjd
from foveate.zoo.ar import PictureGenerator, load_generator
from foveate.zoo.vq import pitch_of

DELTAS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)


@dataclass(frozen=True, eq=False)
class Source:
    """A generator, its draft, prompts, codes (the ids and their vectors) and codes a row; no pictures in a try."""

    model: Any
    draft: Any
    prompts: dict[str, Tensor]
    codes: tuple[int, int]
    codebook: Tensor
    row: int
    captions: tuple[str, ...] = ()
    real: Tensor | None = None
    generator: PictureGenerator | None = None


def of_folder(options: argparse.Namespace) -> Source:
    generator = load_generator(options.model)
    scenes = CaptionedScenes("test", 2**31 - 1, size=pitch_of(generator.vq) * generator.grid[0])
    some = [scenes[k] for k in range(options.pictures)]
    captions = tuple(one.caption for one in some)
    return Source(
        generator.model, load_generator(options.draft).model, generator.prompts(captions), generator.codes,
        generator.vq.quantize.embedding.weight.detach(), generator.grid[1], captions,
        stacked(one.scene for one in some), generator,
    )  # fmt: skip


def tiny(pictures: int) -> Source:
    """Random weights, for `--smoke`."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model, draft = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    for one in (model, draft):
        one.generation_config.update(max_new_tokens=16, do_sample=True, top_k=0, guidance_scale=2.0)
    ids = torch.randint(1, 8, (pictures, 4))
    prompts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Source(model, draft, prompts, (8, 40), torch.randn(32, 4), 4)


def run(source: Source, options: argparse.Namespace, decoder: Any = None, seed: int = 0, **asked: Any) -> Any:
    """(pictures, S + N) ids, and of each pass and picture the tokens that it added, (passes, pictures)."""
    torch.manual_seed(seed)
    made, gained = [], []
    for first in range(0, options.pictures, options.batch):
        prompts = {name: value[first : first + options.batch] for name, value in source.prompts.items()}
        made.append(source.model.generate(**prompts, custom_generate=decoder, **asked))
        if decoder is not None:
            gained.append(torch.stack(decoder.report.emitted))
    longest = max(map(len, gained), default=0)
    padded = [torch.cat([one, one.new_zeros(longest - len(one), one.shape[1])]) for one in gained]
    return torch.cat(made), torch.cat(padded, 1) if padded else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["sjd", "lantern"], default="sjd")
    parser.add_argument("--model", default="tiny-ar", help="a folder, or a name of the zoo")
    parser.add_argument("--draft", default="tiny-ar-draft", help="the same, for LANTERN")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--timed-batch", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5, help="interleaved pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="random weights, 8 pictures, nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if options.smoke:
        options.pictures, options.batch, options.pairs = 8, 4, 1
    source = tiny(options.pictures) if options.smoke else of_folder(options)
    tokens = int(source.model.generation_config.max_new_tokens)
    judge = None if source.real is None else Judge()
    distance = None if judge is None or source.real is None else FrechetDistance(judge).real(source.real)

    @torch.no_grad()
    def quality(ids: Tensor) -> dict[str, float]:
        if source.generator is None or judge is None or distance is None:
            return {}
        pictures = torch.cat([source.generator.pictures(some) for some in ids.split(options.batch)])
        return {
            "frechet_distance": distance(pictures),
            "right": adherence(judge, pictures, source.captions)["right"],
        }

    def measured(decoder: Any = None, seed: int = options.seed, timed: bool = True, **asked: Any) -> dict[str, Any]:
        ids, gained = run(source, options, decoder, seed, **asked)
        found: dict[str, Any] = {"passes": float(tokens)}
        if gained is not None:
            added = gained[gained > 0]
            found = {
                # The prompt's pass gives the first token.
                "passes": 1 + float((gained > 0).sum(0).double().mean()),
                "tokens_a_pass": float(added.double().mean()),
                "passes_that_add_one": float((added == 1).double().mean()),
            }
            found["fewer_passes"] = tokens / found["passes"]
        found |= quality(ids)
        if timed and decoder is not None:
            prompts = {name: value[: options.timed_batch] for name, value in source.prompts.items()}

            def one(chosen: Any) -> Callable[[], float]:
                return lambda: seconds(
                    lambda: source.model.generate(**prompts, custom_generate=chosen, **asked), source.model.device
                )

            timing = interleave(one(None), one(decoder), options.pairs)
            found |= {"time_ratio": timing.ratio, "time_low": timing.low, "time_high": timing.high}
        return found

    results: dict[str, Any] = {}

    def note(name: str, found: dict[str, Any]) -> None:
        results[name] = found
        if not options.smoke:
            write(
                f"decode_{options.method}", options, {"methods": [options.method], "tokens": tokens, "results": results}
            )
        print(name, {key: round(value, 3) for key, value in found.items()}, flush=True)

    note("ancestral", measured())
    note("ancestral again", measured(seed=options.seed + 1))
    if options.method == "sjd":
        jacobi = functools.partial(Sjd, codes=source.codes, row=source.row)
        note("jacobi", measured(jacobi(accept="jacobi")))
        for init in ("random", "repeat_horizon", "sample_horizon"):
            note(f"sjd, {init}", measured(jacobi(init=init)))
        for window in (4, 8, 32):
            note(f"sjd, W = {window}", measured(jacobi(window=window)))
        for top_k in (1, 10, 100):
            note(f"sjd, top-k {top_k}", measured(jacobi(), timed=False, top_k=top_k))
        return
    lantern = functools.partial(Lantern, draft=source.draft, codebook=source.codebook, offset=source.codes[0])
    for tree in ("chain", "eagle", "dynamic"):
        for delta in DELTAS:
            found = measured(lantern(delta=delta, tree=tree), timed=delta in (0.0, 0.1))
            note(f"lantern, {tree}, delta {delta}", {"delta": delta, **found})
    for ratio in (2.0, 5.0):
        note(f"lantern, dynamic, ratio {ratio}", measured(lantern(ratio=ratio), timed=False))


if __name__ == "__main__":
    main()
