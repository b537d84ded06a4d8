"""What all adapters share: hooks that come off again, the trace, and running a method's handler."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foveate.method import HostShape, InputError, Method, Signals, Stage
from foveate.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Record:
    """What happened at one stage of the last forward.

    Attributes:
        stage: "vision.output", "llm.layer[8]", …, or "llm.input" for what entered the language model.
        method: slug of the method that acted, "" for "llm.input".
        entered, left: (B,) visual tokens of each sample (of each crop at the vision stages) before and after.
        source: (B, M) long, the token that carries each source patch after the stage, -1 where none does.
    """

    stage: str
    method: str
    entered: tuple[int, ...] | Tensor
    left: tuple[int, ...] | Tensor
    source: Tensor

    # Numbers are read off a device when somebody asks for them, never while the model runs.

    @functools.cached_property
    def tokens_in(self) -> tuple[int, ...]:
        """`entered` as numbers."""
        return _numbers(self.entered)

    @functools.cached_property
    def tokens_out(self) -> tuple[int, ...]:
        """`left` as numbers."""
        return _numbers(self.left)


def _numbers(counts: tuple[int, ...] | Tensor) -> tuple[int, ...]:
    return tuple(counts.tolist()) if isinstance(counts, Tensor) else counts


def _counts(tokens: Tokens) -> tuple[int, ...] | Tensor:
    batch, count = tokens.x.shape[:2]
    return (count,) * batch if tokens.valid is None else tokens.count


_IN_USE: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Every module of every model that has methods applied, so that no part of one gets a second adapter."""
_ABSENT = object()


class Host:
    """Base of the adapters: `install` hooks the handlers of methods in, `remove` takes everything off."""

    shape: HostShape

    def __init__(self, model: Any, root: nn.Module | None = None) -> None:
        """`root` is the module that is hooked, where `model` is none itself (a pipeline)."""
        self.model: Any = model
        self._root: nn.Module = model if root is None else root
        if any(module in _IN_USE for module in self._root.modules()):
            raise InputError("this model has methods applied already; remove them first, or apply a list")
        self.plan: dict[str, Method] = {}
        self.trace: list[Record] = []
        self.marks: dict[str, Tensor] = {}
        self.memory: dict[str, Any] = {}
        self._installed = False
        self._handles: list[RemovableHandle] = []
        self._replaced: list[tuple[Any, str, Any]] = []

    def install(self, plan: dict[str, Method]) -> None:
        """Hooks in `plan`, stage -> method; all of it or, after an error, nothing."""
        self.plan, self._installed = plan, True
        _IN_USE.update(self._root.modules())
        try:
            self.hook()
        except BaseException:
            self.remove()
            raise

    def hook(self) -> None:
        """Registers the hooks that `self.plan` needs."""
        raise NotImplementedError

    def forgets(self, kind: str) -> bool:
        """Whether attention of "vision" or "llm" is asked for layer by layer (`Method.forgets`)."""
        readers = [
            method
            for method in self.plan.values()
            if any(split_read(name)[0] == kind for name in method.reads(self.shape))
        ]
        return all(method.forgets for method in readers)

    def acting(self, stage: str, layers: int) -> frozenset[int]:
        """Those of `layers` layers at which the plan has a method for `stage` that wants to be called."""
        if stage not in self.plan:
            return frozenset()
        named = self.plan[stage].layers_at(stage, self.shape)
        return frozenset(range(layers) if named is None else named)

    def remove(self) -> None:
        """Takes everything off; calling it again does nothing."""
        if not self._installed:
            return
        self._installed = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for owner, name, before in reversed(self._replaced):
            if before is _ABSENT:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = before
        self._replaced.clear()
        for module in self._root.modules():
            _IN_USE.discard(module)

    def replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Calls of `owner.<name>`, of a module or a scheduler, go to `function`, until `remove`."""
        # Past nn.Module's bookkeeping, so that the module tree and the state dict stay as they are.
        self._replaced.append((owner, name, owner.__dict__.get(name, _ABSENT)))
        owner.__dict__[name] = function

    def pre(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Calls `hook(module, args, kwargs) -> (args, kwargs) | None` before `module`."""
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def post(self, module: nn.Module, hook: Callable[..., Any], always: bool = False) -> None:
        """Calls `hook(module, args, kwargs, output) -> output | None` after `module`; `always` also after an error."""
        # Prepended: hooks that were there before (transformers records hidden states with such) see our output.
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True, always_call=always))

    def stage(self, name: str, layer: int, signals: Signals, entered: Tensor, active: Tensor | None = None) -> Stage:
        """What a handler is told; all samples are active if `active` is None."""
        if active is None:
            active = torch.ones_like(entered, dtype=torch.bool)
        return Stage(name, layer, self.shape, signals, entered, active, self.marks, self.memory)

    def call(self, at: Stage, given: Any) -> Any:
        """What the method of a stage makes of what it is handed there."""
        method = self.plan[at.name]
        return getattr(method, method.handlers()[at.name])(given, at)

    def run(self, at: Stage, tokens: Tokens) -> Tokens:
        """Lets the method of a stage act on `tokens` and records what it did."""
        result: Tokens = self.call(at, tokens)
        if result is not tokens:
            self.record(at.label, self.plan[at.name].card.slug, tokens, result)
        return result

    def record(self, label: str, slug: str, before: Tokens, after: Tokens) -> None:
        self.trace.append(Record(label, slug, _counts(before), _counts(after), after.source.detach()))


def split_read(name: str) -> tuple[str, int]:
    """("vision", 22) from "vision.attention[22]"."""
    kind, _, rest = name.partition(".attention[")
    return kind, int(rest.rstrip("]"))


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of `module.forward` by name, however they were passed; **kwargs are flattened in."""
    return by_name(module.forward, args, kwargs)


@functools.lru_cache(maxsize=256)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Of a class's function, called as a method. Kept: looking it up anew in every layer takes time."""
    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same of a call of any function."""
    method = getattr(function, "__func__", None)
    signature = inspect.signature(function) if method is None else _signature(method)
    bound = signature.bind(*args, **kwargs)
    arguments = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return arguments
