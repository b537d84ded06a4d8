"""What a method adds to a prefill besides arithmetic: operations that PyTorch is asked for, and looks at numbers.

python benchmarks/launches.py

Counted, not timed (`foveate.measure.launches`), on LLaVA-1.5-7B's depth with narrow layers: 24 layers of vision, 32 of
language. The counts are of a CPU; there methods that go over whole attention maps do it in more, smaller blocks than on
a GPU, and looks at what lies on the CPU anyway are counted with the others.
"""

from __future__ import annotations

from llava_shaped import arguments, build, prefill, write

from foveate.apply import apply
from foveate.hosts import adapt
from foveate.measure.launches import count_launches
from foveate.method import method_class

METHODS = (
    "pool", "random", "fopru", "visionzip", "vtc-cls", "fastv", "pyramiddrop", "yopo", "tome", "aim", "mustdrop"
)  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(width=64, layers=32, vision_width=64, vision_layers=24, grid=12, text=16)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args()
    model, inputs = build(options)
    run, shape = prefill(model, inputs), adapt(model).shape
    dense = count_launches(run)
    rows = [{"method": "dense", "operations": dense.operations, "looks": dense.looks}]
    for slug in options.methods:
        method = method_class(slug).for_budget(options.budget, shape)
        with apply(model, method):
            changed = count_launches(run)
        added = {"added": changed.operations - dense.operations, "added_looks": changed.looks - dense.looks}
        rows.append({"method": slug, "settings": method.hyperparameters(), **added})
        print(slug, added)
    write("launches", options, {"results": rows})


if __name__ == "__main__":
    main()
