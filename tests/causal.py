"""Tiny causal models of transformers for tests of decoders, and the exact law of what they say."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

PAD = 0


def llama(seed: int = 0, *, words: int = 40, width: int = 16, layers: int = 2, sharpness: float = 8.0) -> Any:
    """Random weights, scaled so that tokens depend on each other, and clearly differ in probability."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=words, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=PAD,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.data.mul_(sharpness)
    return model


def prompts(rows: int = 3, length: int = 5, words: int = 40, seed: int = 0) -> dict[str, Tensor]:
    """Prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, words, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : row % length] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


class Forced(LogitsProcessor):
    """Token `word` at every `period`-th place after the prompt, and nowhere else."""

    def __init__(self, prompt: int, period: int, word: int) -> None:
        self.prompt, self.period, self.word = prompt, period, word

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        due = (input_ids.shape[1] - self.prompt) % self.period == self.period - 1
        masked = torch.full_like(scores, -float("inf")) if due else scores.clone()
        masked[:, self.word] = 0.0 if due else -float("inf")
        return masked


@torch.no_grad()
def law(
    model: Any, prompt: Tensor, count: int, *, top_k: int = 0, scale: float = 1.0, other: Tensor | None = None
) -> Tensor:
    """(V^count,) the probability of every continuation, in lexicographic order: no cache, no window, whole forwards."""
    words = model.config.vocab_size
    every = torch.tensor(list(itertools.product(range(words), repeat=count)))

    def logits(start: Tensor) -> Tensor:
        ids = torch.cat([start.expand(len(every), -1), every], 1)
        return model(ids).logits[:, start.shape[1] - 1 : -1].double().log_softmax(-1)

    scores = logits(prompt)
    if other is not None:
        scores = scale * scores + (1 - scale) * logits(other)
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[..., -1:], -float("inf"))
    return scores.softmax(-1).gather(2, every.unsqueeze(2)).squeeze(2).prod(1)


def chi_square(sequences: Tensor, expected: Tensor, words: int) -> float:
    """The p-value of sequences (n, count) under their law (V^count,); rare ones are one cell."""
    powers = words ** torch.arange(sequences.shape[1] - 1, -1, -1)
    seen = torch.bincount((sequences * powers).sum(1), minlength=len(expected)).double()
    wanted = expected * len(sequences)
    assert int(seen[expected == 0].sum()) == 0
    rare = wanted < 5
    cells = [torch.cat([some[~rare], some[rare].sum()[None]]) for some in (seen, wanted)]
    if float(cells[1][-1]) < 5:
        cells = [torch.cat([some[:-2], some[-2:].sum()[None]]) for some in cells]
    return float(chisquare(cells[0].numpy(), (cells[1] * cells[0].sum() / cells[1].sum()).numpy()).pvalue)
