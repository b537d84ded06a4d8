"""Operations of one real run, and those among them that read a number off the device.

On an accelerator a small operation is a launch, and a look at a number (`bool(x.any())`, `x.nonzero()`, `x[mask]`)
makes the model wait for it. Both are counted, not timed, so that a CPU can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_LOOKS = frozenset(
    ("is_nonzero", "item", "_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "_unique2", "equal")
)
_INDEXING = frozenset(("index", "index_put", "index_put_"))
"""They look at a mask among their indices, and at nothing else."""


class Launches(NamedTuple):
    """How many operations a run asks PyTorch for, views included, and how many of them look at numbers. Numbers that
    lie on the CPU count too: on a CPU nothing tells them apart."""

    operations: int
    looks: int


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = self.looks = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masked = name in _INDEXING and any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1])
        self.operations += 1
        self.looks += name in _LOOKS or masked
        return function(*args, **(kwargs or {}))


def count_launches(run: Callable[[], object]) -> Launches:
    """Of one call of `run`, after one that does not count: what is made once is made then."""
    run()
    with _Counter() as counter:
        run()
    return Launches(counter.operations, counter.looks)
