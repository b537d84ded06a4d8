"""`apply`: put methods to work on a model that people already run, and take them off again.

```python
with foveate.apply(model, "pyramiddrop", keep=0.5) as applied:
    model.generate(**inputs)
applied.trace  # per stage: tokens in and out, and where every source patch went

with foveate.apply(pipeline, "variable-size"):  # a pipeline of diffusers
    pipeline(prompt, height=1024, width=1024)
```
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from foveate.configuration import is_file, load_configuration
from foveate.method import InputError, Method, build

# Adapters bring torch, and with it seconds; they are loaded when the first method is applied.
if TYPE_CHECKING:
    from foveate.hosts.host import Host, Record


class Applied:
    """Methods at work on a model; `remove()` or leaving the `with` block restores the model bit for bit.

    Attributes:
        model: the model or pipeline, unmodified but for hooks.
        methods: the methods, in the order in which they were given.
        host: the adapter; `host.shape` tells what it found.
        trace: a `Record` per stage of the last forward that saw a picture.
    """

    def __init__(self, model: Any, methods: tuple[Method, ...]) -> None:
        from foveate.hosts import adapt

        self.model, self.methods = model, methods
        self.host: Host = adapt(model)
        for method in methods:
            missing = [stage for stage in method.acts_at(self.host.shape) if stage not in self.host.shape.stages]
            if missing:
                raise InputError(
                    f"{method.card.slug} needs the stage {missing[0]}, which {type(model).__name__} does not have; "
                    f"it has {', '.join(self.host.shape.stages)}"
                )
            method.check(self.host.shape)
        self.host.install(_assign(methods, self.host))

    @property
    def trace(self) -> list[Record]:
        return self.host.trace

    def remove(self) -> None:
        """Restores the model. Calling it again does nothing."""
        self.host.remove()

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def apply(model: Any, method: str | Method | Sequence[str | Method], **settings: Any) -> Applied:
    """Puts one method, or several whose stages do not clash, to work on a model at once.

    Args:
        model: a supported model or pipeline, by its class; `foveate.hosts.SUPPORTED` lists them.
        method: a registered name, a configuration file (a name that ends in ".json", see `foveate.configuration`), an
            instance, or a list of these.
        settings: the method's keyword arguments, with a single name only.

    Returns:
        an `Applied`, which is also a context manager.

    Raises:
        InputError: unknown names or settings, a file that is no configuration, a host without a needed stage, methods
            that clash, a model that has methods applied already.
    """
    if isinstance(method, str) and is_file(method):
        if settings:
            raise InputError("a configuration file has its own settings; give none beside it")
        method = [method]
    if isinstance(method, str | Method):
        return Applied(model, (build(method, settings),))
    if settings:
        raise InputError("settings go with one method's name; in a list, give instances")
    if not method:
        raise InputError("an empty list of methods; 'dense' is the method that changes nothing")
    return Applied(model, tuple(built for one in method for built in _built(one)))


def _built(entry: str | Method) -> list[Method]:
    return load_configuration(entry) if isinstance(entry, str) and is_file(entry) else [build(entry)]


def _assign(methods: tuple[Method, ...], host: Host) -> dict[str, Method]:
    """stage -> the method that acts there. InputError where two want the same stage."""
    taken: dict[str, Method] = {}
    for method in methods:
        for stage in method.acts_at(host.shape):
            if stage in taken:
                raise InputError(f"{taken[stage].card.slug} and {method.card.slug} clash: both act at {stage}")
            taken[stage] = method
    return taken
