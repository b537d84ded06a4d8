"""The kernel that adds up columns, interpreted on the CPU, beside plain softmax."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import torch
from torch.utils.flop_counter import FlopCounterMode
from foveate.measure.flops import _column_sums_flops
from foveate.nn.received import column_sums

def plain(query, key, scaling, weight, causal, valid):
    heads, groups, length = query.shape[1], key.shape[1], query.shape[2]
    out = torch.zeros(len(query), length)
    for b in range(len(query)):
        for h in range(heads):
            logits = query[b, h] @ key[b, h // (heads // groups)].T * scaling
            for i in range(length):
                seen = torch.ones(length, dtype=torch.bool) if valid is None else valid[b].clone()
                if causal:
                    seen[i + 1:] = False
                if seen.any():
                    row = torch.where(seen, logits[i], float("-inf")).softmax(0)
                    out[b] += weight[b, i] * row / heads
    return out

torch.manual_seed(0)
for batch, heads, groups, length, width, causal, masked in (
    (2, 4, 4, 70, 16, False, False), (1, 4, 2, 130, 24, True, True), (1, 2, 1, 64, 64, True, False),
    (2, 3, 3, 37, 80, False, True), (1, 1, 1, 1, 8, True, False),
):
    query = 3 * torch.randn(batch, length, heads, width).transpose(1, 2)
    key, weight = torch.randn(batch, groups, length, width), torch.rand(batch, length)
    valid = torch.rand(batch, length) > 0.4 if masked else None
    if masked:
        valid[0, :3] = False    # under causal attention, rows that see nothing
    given = (query, key, width**-0.5, weight, causal, valid)
    torch.testing.assert_close(column_sums(*given), plain(*given), rtol=1e-4, atol=1e-5)
counter = FlopCounterMode(display=False, custom_mapping={torch.ops.foveate.column_sums: _column_sums_flops})
with counter:
    column_sums(torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8), 1.0, torch.ones(2, 5), False, None)
assert counter.get_total_flops() == 2 * 2 * 3 * (2 * 5 * 5 * 8) + 2 * 2 * 3 * 5 * 5
print("equal")
"""


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from foveate.nn import received

kinds = {"query": "*bf16", "key": "*bf16", "valid": "*u8", "scaling": "fp32"}
kinds |= dict.fromkeys(("sums", "weight", "received"), "*fp32")
constants = {"block": 64, "size": 64, "causal": True, "masked": True, "precise": False}
for kernel in (received._row_sums, received._column_sums):
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 0
print("compiled")
"""


def test_kernels_compile_for_a_gpu_without_one() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert done.stdout == "compiled\n", done.stderr


def test_column_sums_are_those_of_softmax() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr
