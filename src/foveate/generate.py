"""Pictures of prompts from the same noise: by a diffusion pipeline as it is, and with each of several methods at work.

```python
columns = compare_pictures(DiffusionGenerator(pipeline, steps=20), ["a frog"], {"a-star": ["a-star"]})
contact_sheet(["a frog"], columns).save("sheet.png")
```
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import foveate
from foveate.measure.flops import flop_counter
from foveate.measure.timing import seconds
from foveate.method import InputError, Method, registry

if TYPE_CHECKING:
    from PIL import Image

DENSE = "dense"

Advance = Callable[[int, int, str], None]
"""Called after each step with how many are done, how many there are, and what is made."""


@dataclass(frozen=True, eq=False)
class Column:
    """What one entry made of all prompts, and what that cost.

    Attributes:
        label: what it is called.
        methods: that were at work, with their settings.
        pictures: one a prompt.
        steps: of the sampler, for one picture.
        calls: how often each model ran, over all prompts: its name -> count.
        flops: over all prompts, text encoder and decoder included.
        seconds: the same, in a run of its own after the one that FLOPs were counted in.
        refused: why it cannot be had here, "" where it can.
    """

    label: str
    methods: tuple[Method, ...] = ()
    pictures: tuple[Image.Image, ...] = ()
    steps: int = 0
    calls: Mapping[str, int] = field(default_factory=dict)
    flops: int = 0
    seconds: float = 0.0
    refused: str = ""


class DiffusionGenerator:
    """A text-to-image pipeline of diffusers.

    Args:
        pipeline: on its device; its components stay as they are.
        seed: of the first noise, which is the same for every prompt and method.
        steps, guidance, height, width: None for what the pipeline does without being told.

    Raises:
        InputError: a pipeline that takes no prompt, or not one of these arguments.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        self.pipeline, self.seed = pipeline, seed
        asked = {"num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": width}
        self.settings = {name: value for name, value in asked.items() if value is not None}
        check_call(type(pipeline), self.settings)

    @property
    def device(self) -> torch.device:
        return torch.device(self.pipeline.device)

    @property
    def methods(self) -> list[str]:
        """Registered methods for such a model."""
        return [slug for slug, cls in registry().items() if "diffusers" in cls.card.hosts and not cls.card.baseline]

    @contextlib.contextmanager
    def at_work(self, methods: Sequence[Method]) -> Iterator[Counter[str]]:
        """Has methods applied for the time of a block; the counter is of runs of the models in it."""
        calls: Counter[str] = Counter()
        with contextlib.ExitStack() as stack:
            stack.enter_context(counting(self._models(methods), calls))
            if methods:
                stack.enter_context(foveate.apply(self.pipeline, list(methods)))
            yield calls

    def _models(self, methods: Iterable[Method]) -> dict[str, nn.Module]:
        """The denoiser, and models that methods bring along."""
        name = "unet" if getattr(self.pipeline, "unet", None) is not None else "transformer"
        models = {name: getattr(self.pipeline, name)}
        for method in methods:
            models |= {key: one for key, one in method.hyperparameters().items() if isinstance(one, nn.Module)}
        return models

    def make(self, prompt: str, advance: Callable[[int, int], None]) -> tuple[Image.Image, int]:
        """A picture, and how many steps it took; `advance` is told how many of how many are done."""
        steps = 0

        def progress_bar(iterable: Any = None, total: int | None = None) -> _Progress:
            def note(done: int, of: int) -> None:
                nonlocal steps
                steps = done
                advance(done, of)

            return _Progress(iterable, total, note)

        # Whatever loop a pipeline has, it shows its progress there.
        before = self.pipeline.__dict__.get("progress_bar")
        self.pipeline.progress_bar = progress_bar
        try:
            # Noise is drawn on the CPU, so that it is the same on all devices.
            generator = torch.Generator().manual_seed(self.seed)
            made = self.pipeline(prompt, generator=generator, output_type="pil", **self.settings)
        except ValueError as error:
            if isinstance(error, InputError) or not _raised_in(error, "check_inputs"):
                raise
            raise InputError(str(error)) from None
        finally:
            del self.pipeline.progress_bar
            if before is not None:
                self.pipeline.progress_bar = before
        return made.images[0], steps


def compare_pictures(
    generator: DiffusionGenerator,
    prompts: Sequence[str],
    entries: Mapping[str, Sequence[Method]],
    *,
    refusable: bool = False,
    on_progress: Advance = lambda done, total, text: None,
) -> list[Column]:
    """A column for the model as it is, then one for each entry: label -> methods that are at work together.

    Everything is made twice: once to count FLOPs, once for the time.

    Args:
        refusable: whether a method that does not fit the model or the prompts gets a column that says why; otherwise
            that is an InputError.
    """
    columns = []
    everything: dict[str, Sequence[Method]] = {DENSE: (), **entries}
    for number, (label, methods) in enumerate(everything.items()):

        def advance(done: int, total: int, label: str = label, number: int = number) -> None:
            on_progress(number * total + done, len(everything) * total, label)

        try:
            columns.append(_column(generator, prompts, label, tuple(methods), advance))
        except InputError as error:
            if not refusable or not methods:
                raise InputError(f"{label}: {error}" if methods else str(error)) from None
            columns.append(Column(label, tuple(methods), refused=str(error)))
    return columns


def _column(
    generator: DiffusionGenerator, prompts: Sequence[str], label: str, methods: tuple[Method, ...],
    advance: Callable[[int, int], None],
) -> Column:  # fmt: skip
    runs = 0

    def advance_in_run(done: int, total: int) -> None:
        advance(runs * total + done, 2 * len(prompts) * total)

    def make_all() -> None:
        nonlocal runs
        made.clear()
        for prompt in prompts:
            made.append(generator.make(prompt, advance_in_run))
            runs += 1

    made: list[tuple[Image.Image, int]] = []
    with generator.at_work(methods) as calls:
        with flop_counter() as counter:
            make_all()
        counted = dict(calls)
        spent = seconds(make_all, generator.device)
    pictures, steps = zip(*made)
    return Column(label, methods, pictures, steps[0], counted, int(counter.get_total_flops()), spent)


@contextlib.contextmanager
def counting(models: Mapping[str, nn.Module], calls: Counter[str]) -> Iterator[None]:
    """Adds to `calls` each run of the models, by their names, also where methods pass by a model's hooks."""

    def forward(name: str, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return own(*args, **kwargs)

    before = [(model, model.__dict__.get("forward")) for model in models.values()]
    try:
        for name, model in models.items():
            own = model.forward
            model.__dict__["forward"] = functools.wraps(own)(functools.partial(forward, name, own))
        yield
    finally:
        for model, own in before:
            if own is None:
                model.__dict__.pop("forward", None)
            else:
                model.__dict__["forward"] = own


class _Progress:
    """What a pipeline's loop runs over, or updates."""

    def __init__(self, iterable: Any, total: int | None, note: Callable[[int, int], None]) -> None:
        self._iterable, self._note, self._done = iterable, note, 0
        self._total = len(iterable) if iterable is not None else total or 0

    def update(self, count: int = 1) -> None:
        self._done += count
        self._note(self._done, max(self._total, self._done))

    def __iter__(self) -> Iterator[Any]:
        for one in self._iterable:
            yield one
            self.update()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def load_pipeline(name: str, source: str, device: str, dtype: str) -> Any:
    """The pipeline of diffusers that `source`, a folder or a hub id, holds.

    Args:
        name: what the user calls it.
        dtype: "auto" is float32 on a CPU and bfloat16 elsewhere.

    Raises:
        InputError: what cannot be loaded, needs code of its own, or makes no pictures of prompts.
    """
    from foveate.zoo import need_diffusers

    diffusers = need_diffusers()
    diffusers.utils.logging.set_verbosity_error()
    kind = (torch.float32 if device == "cpu" else torch.bfloat16) if dtype == "auto" else getattr(torch, dtype)
    try:
        # What it is, before the weights are downloaded.
        names = diffusers.DiffusionPipeline.load_config(source).get("_class_name")
        cls = getattr(diffusers, names, None) if isinstance(names, str) else None
        if cls is None:
            raise InputError(f"{name} is no pipeline of this version of diffusers, but a {names}")
        check_call(cls, {})
        pipeline = cls.from_pretrained(source, torch_dtype=kind, use_safetensors=True)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{name} cannot be loaded: {reason[:300]}") from None
    return pipeline.to(device)


def check_call(cls: type, settings: Iterable[str]) -> None:
    """InputError for a class of pipelines that takes no prompt, or not one of these arguments."""
    takes = inspect.signature(cls.__call__).parameters
    if "prompt" not in takes or "image" in takes or "num_frames" in takes:
        raise InputError(f"{cls.__name__} makes no pictures of prompts alone")
    for name in settings:
        if name not in takes:
            raise InputError(f"{cls.__name__} takes no {name}")


def _raised_in(error: BaseException, function: str) -> bool:
    """Whether an error passed through a function of that name."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == function:
            return True
        trace = trace.tb_next
    return False
