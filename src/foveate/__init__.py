"""foveate: spend visual compute where it matters. See `foveate.apply` and `foveate.compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foveate.apply import Applied, apply
from foveate.configuration import load_configuration
from foveate.method import Card, Claim, InputError, Method, Stage, at, method_class, register, registry

if TYPE_CHECKING:
    from foveate.measure.compare import compare
    from foveate.tokens import Tokens

__version__ = "0.1.0"

__all__ = [
    "Applied", "Card", "Claim", "InputError", "Method", "Stage", "Tokens", "apply", "at", "compare",
    "load_configuration", "method_class", "register", "registry",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # What needs torch is loaded when it is asked for: the command line answers most questions without.
    if name == "compare":
        from foveate.measure.compare import compare

        return compare
    if name == "Tokens":
        from foveate.tokens import Tokens

        return Tokens
    raise AttributeError(f"module 'foveate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
