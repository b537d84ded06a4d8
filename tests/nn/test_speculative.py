"""The parts of decoders: a cache that rows cut differently against whole forwards, residuals by the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from causal import llama, prompts
from foveate.method import InputError
from foveate.nn.draft_tree import static_shape
from foveate.nn.speculative import CachedModel, DecodeReport, Prompt, leading, residual


@torch.no_grad()
@pytest.mark.parametrize("branches", [1, 2])
def test_a_cache_that_rows_cut_differently_is_that_of_their_texts(branches: int) -> None:
    """Rows keep 0 to 3 of three entries, not the first ones, several times; prompts are padded, too."""
    model, asked = llama(), [prompts(4, 5), prompts(4, 3, seed=1)][:branches]
    cached = CachedModel(model, [Prompt(one["input_ids"], one["attention_mask"]) for one in asked], room=30)
    texts = [one["input_ids"][row, one["attention_mask"][row].bool()].tolist() for one in asked for row in range(4)]

    def behind(text: list[int]) -> Tensor:
        return model(torch.tensor([text])).logits[0, -1]

    first = cached.prefill()
    for logits, text in zip(first[:, 0], texts):
        torch.testing.assert_close(logits, behind(text), atol=1e-4, rtol=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        # Three siblings at the same place, of which some are kept: the others may not be seen any more.
        tokens = torch.randint(1, 40, (4, 3), generator=generator)
        cached.score(tokens, torch.zeros(4, 3).long(), torch.eye(3, dtype=torch.bool).expand(4, -1, -1))
        chosen = torch.randint(-1, 3, (4,), generator=generator)
        cached.keep(torch.arange(3) == chosen.unsqueeze(1))
        for row, text in enumerate(texts):
            place = int(chosen[row % 4])
            if place >= 0:
                text.append(int(tokens[row % 4, place]))
        assert cached.count.tolist() == [len(text) for text in texts]
        assert cached.cache.get_seq_length() == max(map(len, texts))
        # Two in a row on top of it, and away again.
        more = torch.randint(1, 40, (4, 2), generator=generator)
        logits = cached.score(more, torch.arange(2))
        cached.keep(torch.zeros(4, 2, dtype=torch.bool))
        for row, text in enumerate(texts):
            torch.testing.assert_close(logits[row, 1], behind(text + more[row % 4].tolist()), atol=1e-4, rtol=1e-4)


def test_residual() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]), torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.3, 0.2]])
    assert residual(p, q).tolist() == [[1.0, 0.0, 0.0], pytest.approx([0.5, 0.3, 0.2])]


def test_leading() -> None:
    passed = torch.tensor([[True, True, False, True], [False, True, True, True], [True] * 4])
    assert leading(passed).tolist() == [2, 0, 4]
    assert leading(torch.zeros(2, 0, dtype=torch.bool)).tolist() == [0, 0]


def test_report() -> None:
    report = DecodeReport(emitted=[torch.tensor([3, 1]), torch.tensor([0, 2])])
    assert report.mean_emitted == 2
    assert DecodeReport().mean_emitted != DecodeReport().mean_emitted


@pytest.mark.parametrize("tree", [[], [[1]], [[0], [0, 0, 0]], [[0], [2]], [3], [["a"]], [[]]])
def test_bad_trees(tree: Any) -> None:
    with pytest.raises(InputError, match="tree must"):
        static_shape(tree)
