"""foveate: spend visual compute where it matters. See `foveate.apply` and `foveate.compare`."""

from foveate.apply import Applied, apply
from foveate.method import Card, Claim, InputError, Method, Stage, at, method_class, register, registry
from foveate.tokens import Tokens

__version__ = "0.1.0"

__all__ = [
    "Applied", "Card", "Claim", "InputError", "Method", "Stage", "Tokens", "apply", "at", "method_class", "register",
    "registry",
]  # fmt: skip
