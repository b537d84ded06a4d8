"""What a method adds to a prefill besides arithmetic: operations that PyTorch is asked for, and looks at numbers.

python benchmarks/launches.py

On an accelerator a small operation is a launch, and a look at a number (`bool(x.any())`, `x.nonzero()`) makes the model
wait. Both are counted, not timed, on LLaVA-1.5-7B's depth with narrow layers: 24 layers of vision, 32 of language. The
counts are of a CPU; there methods that go over whole attention maps do it in more, smaller blocks than on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from llava_shaped import arguments, build, prefill, write
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.apply import apply
from foveate.hosts import adapt
from foveate.method import method_class

LOOKS = ("is_nonzero", "item", "_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "equal")
METHODS = (
    "pool", "random", "fopru", "visionzip", "vtc-cls", "fastv", "pyramiddrop", "yopo", "tome", "aim", "mustdrop"
)  # fmt: skip


class Operations(TorchDispatchMode):
    """Counts operations, and those among them that read a number off a device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.looks = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.looks += function.overloadpacket.__name__ in LOOKS
        return function(*args, **(kwargs or {}))


def counted(run: Callable[[], Any], context: AbstractContextManager[Any]) -> Operations:
    with context:
        # What is made once is made now.
        run()
        with Operations() as operations:
            run()
    return operations


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(width=64, layers=32, vision_width=64, vision_layers=24, grid=12, text=16)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args()
    model, inputs = build(options)
    run, shape = prefill(model, inputs), adapt(model).shape
    dense = counted(run, contextlib.nullcontext())
    rows = [{"method": "dense", "operations": dense.operations, "looks": dense.looks}]
    for slug in options.methods:
        method = method_class(slug).for_budget(options.budget, shape)
        changed = counted(run, apply(model, method))
        added = {"added": changed.operations - dense.operations, "added_looks": changed.looks - dense.looks}
        rows.append({"method": slug, "settings": method.hyperparameters(), **added})
        print(slug, added)
    write("launches", options, {"results": rows})


if __name__ == "__main__":
    main()
