"""foveate: spend visual compute where it matters. See `foveate.apply` and `foveate.compare`."""

from typing import Any

from foveate.apply import Applied, apply
from foveate.method import Card, Claim, InputError, Method, Stage, at, method_class, register, registry
from foveate.tokens import Tokens

__version__ = "0.1.0"

__all__ = [
    "Applied", "Card", "Claim", "InputError", "Method", "Stage", "Tokens", "apply", "at", "compare", "method_class",
    "register", "registry",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Measuring pulls in pictures, tables and data; applying a method does not need them.
    if name == "compare":
        from foveate.measure.compare import compare

        return compare
    raise AttributeError(f"module 'foveate' has no attribute {name!r}")
