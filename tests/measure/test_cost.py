"""FLOPs and cache bytes against counts by hand; timing on a clock that the test turns."""

from __future__ import annotations

import pytest
import torch
from stand_in import questions, tiny
from torch import nn
from torch.nn import functional as F

import foveate
from foveate.data.samples import to_inputs
from foveate.measure.flops import count_flops, count_linear_flops
from foveate.measure.memory import kv_bytes, kv_lengths, peak_bytes
from foveate.measure.timing import interleave, seconds
from foveate.method import InputError


def test_a_linear_layer_counts_two_per_multiply_add() -> None:
    layer = nn.Linear(5, 7)
    assert count_flops(lambda: layer(torch.ones(3, 5))) == 2 * 3 * 5 * 7


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_flops_leave_products_of_activations_out(device: str, bias: bool) -> None:
    layer, convolution = torch.nn.Linear(5, 7, bias, device=device), torch.nn.Conv1d(7, 2, 3, bias=bias, device=device)
    x = torch.ones(2, 3, 4, 5, device=device)

    def run() -> None:
        made = layer(x)
        made = F.scaled_dot_product_attention(made, made, made)
        made = (made @ made.transpose(-1, -2)).softmax(-1) @ made
        convolution(made[:, 0].transpose(1, 2))

    linear = 2 * 24 * 5 * 7 + 2 * 2 * 2 * 2 * 7 * 3
    assert count_linear_flops(run) == linear and count_flops(run) == linear + 2 * 2 * 6 * 2 * 4 * 4 * 7


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fused_attention_counts(device: str, causal: bool) -> None:
    query = torch.ones(2, 4, 10, 8, device=device)
    flops = count_flops(lambda: F.scaled_dot_product_attention(query, query, query, is_causal=causal))
    assert flops == 2 * 2 * 4 * 10 * 10 * 8 * 2


def test_attention_backward_is_counted() -> None:
    query = torch.ones(2, 3, 5, 8, requires_grad=True)
    key = torch.ones(2, 3, 7, 8)

    def run() -> None:
        F.scaled_dot_product_attention(query, key, key).sum().backward()

    # Two products forward; backward the scores anew, and what reaches probabilities, queries, keys and values.
    assert count_flops(run) == (2 + 5) * 2 * 2 * 3 * 5 * 7 * 8


def _prefill_flops(visual: int, text: int, crop: int = 36) -> int:
    """Closed form for `stand_in.tiny`: patches, tower, projector, language model, one row of the head."""

    def layer(n: int, d: int = 32, m: int = 64, mlp: int = 2) -> int:
        return 2 * n * (4 * d * d + mlp * d * m) + 4 * n * n * d

    vocabulary = tiny()[0].config.text_config.vocab_size
    tower = 2 * crop * 3 * 8 * 8 * 32 + 4 * layer(crop + 1)
    projector = 2 * visual * (32 * 32 + 32 * 32)
    return tower + projector + 4 * layer(visual + text, mlp=3) + 2 * 32 * vocabulary


def test_a_prefill_counts_what_the_closed_form_says() -> None:
    model, processor = tiny()
    inputs = to_inputs(processor, questions(1))
    text = inputs["input_ids"].shape[1] - 36
    with torch.inference_mode():
        dense = count_flops(lambda: model(**inputs, logits_to_keep=1))
        with foveate.apply(model, "pool", keep=0.25):
            pooled = count_flops(lambda: model(**inputs, logits_to_keep=1))
    assert dense == _prefill_flops(36, text)
    assert pooled == _prefill_flops(9, text)


def test_a_methods_own_work_counts() -> None:
    model, processor = tiny()
    inputs = to_inputs(processor, questions(1))

    def flops(method: str) -> int:
        with torch.inference_mode(), foveate.apply(model, method, keep=0.25):
            return count_flops(lambda: model(**inputs, logits_to_keep=1))

    # fopru looks at the logits of all 37 queries of 4 heads of 8, and sums the rows; "random" looks at nothing.
    assert flops("fopru") - flops("random") >= 2 * 4 * 37 * 37 * 8


def test_cache_bytes_by_hand() -> None:
    model, processor = tiny()
    inputs = to_inputs(processor, questions(1))
    text = inputs["input_ids"].shape[1] - 36
    with torch.inference_mode(), foveate.apply(model, "pyramiddrop"):
        cache = model(**inputs, use_cache=True).past_key_values
    lengths = [36 + text, 18 + text, 9 + text, 4 + text]
    assert kv_lengths(cache) == lengths
    assert kv_bytes(cache) == sum(lengths) * 2 * 32 * 4


def test_peak_memory_is_only_known_on_cuda() -> None:
    calls: list[int] = []
    assert peak_bytes(lambda: calls.append(1), "cpu") is None
    assert calls == [1]


def test_interleaving_takes_the_median_of_ratios() -> None:
    order: list[str] = []
    first, second = iter([100.0, 1.0, 2.0, 4.0, 1.0, 1.0]), iter([1.0, 0.5, 3.0, 4.0, 0.25, 0.75])

    def dense() -> float:
        order.append("dense")
        return next(first)

    def method() -> float:
        order.append("method")
        return next(second)

    timing = interleave(dense, method, pairs=5, warmup=1)
    assert order == ["dense", "method"] * 6
    # ratios .5 1.5 1 .25 .75; the warm-up pair does not count
    assert (timing.ratio, timing.low, timing.high) == (0.75, 0.5, 1.0)
    assert (timing.first_seconds, timing.second_seconds, timing.pairs) == (1.0, 0.75, 5)
    with pytest.raises(InputError, match="at least 1 pair"):
        interleave(dense, method, pairs=0)


def test_seconds_reads_the_clock_around_the_run() -> None:
    ticks = iter([10.0, 12.5])
    assert seconds(lambda: None, clock=lambda: next(ticks)) == 2.5


def test_a_module_on_a_parameter_is_counted_without_gradients() -> None:
    weight, layer = torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Linear(4, 5, bias=False)
    with torch.no_grad():
        assert count_flops(lambda: layer(weight.expand(2, 3, 4))) == 2 * 2 * 3 * 4 * 5
    assert count_flops(lambda: layer(weight).sum().backward()) == 3 * 2 * 3 * 4 * 5
