"""Pictures of prompts from the same noise: by a generator as it is, and with each of several methods at work.

```python
generator = DiffusionGenerator(pipeline, steps=20)
columns = compare_pictures(generator, ["a cat and a frog"], {"a-star": generator.build("a-star")})
contact_sheet(["a cat and a frog"], columns).save("sheet.png")
```
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import foveate
from foveate.measure.flops import flop_counter
from foveate.measure.timing import seconds
from foveate.method import InputError, Method, Published, build, published, published_class, registry
from foveate.nn.calls import denoiser_of

if TYPE_CHECKING:
    from PIL import Image

    from foveate.zoo.ar import PictureGenerator

DENSE = "dense"

Advance = Callable[[int, int, str], None]
"""Called after each step with how many are done, how many there are, and what is made."""


@dataclass(frozen=True, eq=False)
class Column:
    """What one entry made of all prompts, and what that cost.

    Attributes:
        label: what it is called.
        methods: that were at work.
        pictures: one a prompt.
        steps: of the sampler, or tokens of an autoregressive model, for one picture.
        calls: how often each model ran, over all prompts: its name -> count. The two branches of an autoregressive
            model's guidance are one run, whether it makes them together or not.
        flops: over all prompts, reading the prompt and decoding the picture included.
        seconds: the same, in a run of its own after the one that FLOPs were counted in.
        refused: why it cannot be had here, "" where it can.
    """

    label: str
    methods: tuple[Published, ...] = ()
    pictures: tuple[Image.Image, ...] = ()
    steps: int = 0
    calls: Mapping[str, int] = field(default_factory=dict)
    flops: int = 0
    seconds: float = 0.0
    refused: str = ""


class Generator(Protocol):
    """What makes pictures of prompts."""

    seed: int

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def tokenizer(self) -> Any:
        """What reads prompts, None where that is not known."""

    @property
    def facts(self) -> dict[str, Any]:
        """What it is, as JSON values."""

    @property
    def settings(self) -> dict[str, Any]:
        """What it was told, as JSON values."""

    @property
    def methods(self) -> list[str]:
        """Registered methods for such a generator."""

    def build(self, slug: str, **settings: Any) -> tuple[Published, ...]:
        """A method with its defaults but for `settings`. InputError where it is none for such a generator, or needs
        more than there is."""

    def at_work(self, methods: Sequence[Any]) -> contextlib.AbstractContextManager[Counter[str]]:
        """Has methods at work for the time of a block; the counter is of runs of models in it, see `Column`."""

    def make(
        self, prompts: Sequence[str], seeds: Sequence[int], advance: Callable[[int, int], None]
    ) -> tuple[list[Image.Image], int]:
        """A picture of each prompt, made at once, and how many steps these took; `advance` is told how many of how
        many are done. A pipeline draws the first noise of each picture with its seed, whatever others are made beside
        it; an autoregressive model draws all codes with the first seed."""


class DiffusionGenerator:
    """A text-to-image pipeline of diffusers.

    Args:
        pipeline: on its device; its components stay as they are.
        small: a smaller one, for methods that take such.
        seed: of the first noise, which is the same for every prompt and method.
        steps, guidance, height, width: None for what the pipeline does without being told.

    Raises:
        InputError: a pipeline that takes no prompt, or not one of these arguments.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        small: Any = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        if (height is None) != (width is None):
            raise InputError("height and width go together: most pipelines do not heed one alone")
        self.pipeline, self.small, self.seed = pipeline, small, seed
        asked = {"num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": width}
        self.settings: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        check_call(type(pipeline), self.settings)

    @property
    def device(self) -> torch.device:
        return torch.device(self.pipeline.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.pipeline.dtype
        return dtype

    @property
    def tokenizer(self) -> Any:
        return getattr(self.pipeline, "tokenizer", None)

    @property
    def facts(self) -> dict[str, Any]:
        return {"class": type(self.pipeline).__name__, "scheduler": type(self.pipeline.scheduler).__name__}

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that are asked for, as the pipeline counts them; (0, 0) where that is not known."""
        if "height" in self.settings:
            return self.settings["height"], self.settings["width"]
        denoiser: Any = denoiser_of(self.pipeline)
        sample: Any = getattr(self.pipeline, "default_sample_size", None) or denoiser.config.get("sample_size") or 0
        height, width = (sample, sample) if isinstance(sample, int) else sample[-2:]
        return height * self.scale, width * self.scale

    @property
    def scale(self) -> int:
        """px of a latent, as the pipeline counts them."""
        return int(getattr(self.pipeline, "vae_scale_factor", 8))

    def changed(self, **settings: Any) -> DiffusionGenerator:
        """The same pipeline with other settings, under the names of its arguments."""
        made = copy.copy(self)
        made.settings = self.settings | settings
        check_call(type(self.pipeline), made.settings)
        return made

    @property
    def methods(self) -> list[str]:
        return [slug for slug, cls in registry().items() if "diffusers" in cls.card.hosts and not cls.card.baseline]

    def build(self, slug: str, **settings: Any) -> tuple[Published, ...]:
        cls = published_class(slug)
        if "diffusers" not in cls.card.hosts:
            raise InputError(f"{slug} is no method for pipelines of diffusers; there are {', '.join(self.methods)}")
        return (build(slug, _told(cls, {"small": self.small, **settings})),)

    @contextlib.contextmanager
    def at_work(self, methods: Sequence[Method]) -> Iterator[Counter[str]]:
        calls: Counter[str] = Counter()
        models: dict[str, Any] = {"denoiser": denoiser_of(self.pipeline)}
        for method in methods:
            given = method.hyperparameters().get("small", ())
            for number, one in enumerate(given if isinstance(given, list | tuple) else [given]):
                models[f"small denoiser {number}" if number else "small denoiser"] = denoiser_of(one)
        with contextlib.ExitStack() as stack:
            stack.enter_context(counting(models, calls))
            if methods:
                stack.enter_context(foveate.apply(self.pipeline, list(methods)))
            yield calls

    def make(
        self, prompts: Sequence[str], seeds: Sequence[int], advance: Callable[[int, int], None]
    ) -> tuple[list[Image.Image], int]:
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
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            made = self.pipeline(list(prompts), generator=generators, output_type="pil", **self.settings)
        except ValueError as error:
            if isinstance(error, InputError) or not _raised_in(error, "check_inputs"):
                raise
            raise InputError(str(error)) from None
        finally:
            del self.pipeline.progress_bar
            if before is not None:
                self.pipeline.progress_bar = before
        return made.images, steps


class CausalGenerator:
    """An autoregressive model that writes pictures as codes: one of `foveate.zoo.ar`.

    Args:
        generator: on its device.
        small: a smaller one, for methods that take a draft.
        seed: of the random numbers that codes are drawn with. Methods draw other numbers of them than the model alone.
        guidance: None for the model's own.
    """

    def __init__(
        self,
        generator: PictureGenerator,
        *,
        small: PictureGenerator | None = None,
        seed: int = 0,
        guidance: float | None = None,
    ) -> None:
        self.generator, self.small, self.seed = generator, small, seed
        self.settings = {} if guidance is None else {"guidance_scale": guidance}
        self._decoder: Any = None

    @property
    def device(self) -> torch.device:
        return torch.device(self.generator.model.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.generator.model.dtype
        return dtype

    @property
    def tokenizer(self) -> Any:
        return self.generator.tokenizer

    @property
    def facts(self) -> dict[str, Any]:
        model: Any = self.generator.model
        return {"class": type(model).__name__, "pictures": type(self.generator.vq).__name__}

    @property
    def methods(self) -> list[str]:
        return [slug for slug, cls in published().items() if cls.card.kind == "decode"]

    def build(self, slug: str, **settings: Any) -> tuple[Published, ...]:
        cls = published_class(slug)
        if cls.card.kind != "decode":
            raise InputError(f"{slug} is no method for autoregressive models; there are {', '.join(self.methods)}")
        first, end = self.generator.codes
        known: dict[str, Any] = {
            "codes": (first, end), "row": self.generator.grid[1], "offset": first,
            "codebook": self.generator.vq.quantize.embedding.weight.detach(),
            "draft": None if self.small is None else self.small.model, **settings,
        }  # fmt: skip
        return (cls(**_told(cls, known)),)

    @contextlib.contextmanager
    def at_work(self, methods: Sequence[Any]) -> Iterator[Counter[str]]:
        if len(methods) > 1:
            raise InputError("one method decodes at a time")
        self._decoder, self._calls = next(iter(methods), None), Counter[str]()
        try:
            yield self._calls
        finally:
            self._decoder = None

    def make(
        self, prompts: Sequence[str], seeds: Sequence[int], advance: Callable[[int, int], None]
    ) -> tuple[list[Image.Image], int]:
        from torchvision.transforms.v2.functional import to_pil_image
        from transformers import StoppingCriteriaList

        model: Any = self.generator.model
        given = self.generator.prompts(prompts)
        start, total = given["input_ids"].shape[1], self.generator.grid[0] * self.generator.grid[1]

        def note(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            advance(ids.shape[1] - start, total)
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        settings: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([note]), **self.settings}
        if self._decoder is not None:
            settings["custom_generate"] = self._decoder
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seeds[0])
            sequences = model.generate(**given, **settings)
            pictures = [to_pil_image(one) for one in self.generator.pictures(sequences)]
        if self._decoder is None:
            self._calls["model"] += sequences.shape[1] - start
        else:
            self._calls["model"] += self._decoder.report.calls
            if self._decoder.report.draft_calls:
                self._calls["draft"] += self._decoder.report.draft_calls
        return pictures, sequences.shape[1] - start


def compare_pictures(
    generator: Generator,
    prompts: Sequence[str],
    entries: Mapping[str, Sequence[Published]],
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
    everything: dict[str, Sequence[Published]] = {DENSE: (), **entries}
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
    generator: Generator, prompts: Sequence[str], label: str, methods: tuple[Published, ...],
    advance: Callable[[int, int], None],
) -> Column:  # fmt: skip
    runs = 0

    def advance_in_run(done: int, total: int) -> None:
        advance(runs * total + done, 2 * len(prompts) * total)

    def make_all() -> None:
        nonlocal runs
        made.clear()
        for prompt in prompts:
            made.append(generator.make([prompt], [generator.seed], advance_in_run))
            runs += 1

    made: list[tuple[list[Image.Image], int]] = []
    with generator.at_work(methods) as calls:
        with flop_counter() as counter:
            make_all()
        counted = dict(calls)
        spent = seconds(make_all, generator.device)
    pictures, steps = zip(*made)
    shown = tuple(picture for (picture,) in pictures)
    return Column(label, methods, shown, steps[0], counted, int(counter.get_total_flops()), spent)


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
        for model, replaced in before:
            if replaced is None:
                model.__dict__.pop("forward", None)
            else:
                model.__dict__["forward"] = replaced


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


def load_generator(
    name: str, source: str, device: str, dtype: str, small: tuple[str, str] | None = None, **settings: Any
) -> Generator:
    """The generator that `source`, a folder or a hub id, holds.

    Args:
        name: what the user calls it.
        dtype: "auto" is float32 on a CPU and, of pipelines, bfloat16 elsewhere.
        small: name and source of a smaller one of its kind.
        settings: `DiffusionGenerator`'s; None for what is not asked.

    Raises:
        InputError: what cannot be loaded, needs code of its own, makes no pictures of prompts, or takes no such
            setting.
    """
    sources = [(name, source)] + ([small] if small else [])
    causal = {is_causal(one) for _, one in sources}
    if len(causal) > 1:
        raise InputError(f"{' and '.join(one for one, _ in sources)} are not of one kind")
    if causal == {False}:
        pipelines = [_load_pipeline(*one, device, dtype) for one in sources]
        return DiffusionGenerator(pipelines[0], small=pipelines[1] if small else None, **settings)
    if foreign := [key for key in ("steps", "height", "width") if settings.pop(key, None) is not None]:
        raise InputError(f"{name} is an autoregressive model: it takes no {foreign[0]}")
    models = [_load_causal(*one, device, dtype) for one in sources]
    return CausalGenerator(models[0], small=models[1] if small else None, **settings)


def is_causal(source: str | Path) -> bool:
    """Whether a folder is that of an autoregressive model of `foveate.zoo.ar`."""
    file = Path(source) / "config.json"
    return file.is_file() and "vq_fingerprint" in file.read_text(encoding="utf-8")


def _load_causal(name: str, source: str, device: str, dtype: str) -> PictureGenerator:
    from foveate.zoo.ar import load_generator as load

    with _loading(name):
        generator = load(source)
    if dtype != "auto":
        generator.model.to(getattr(torch, dtype))
    generator.model.to(device)
    generator.vq.to(device)
    return generator


def _load_pipeline(name: str, source: str, device: str, dtype: str) -> Any:
    from foveate.zoo import need_diffusers

    diffusers = need_diffusers()
    kind = (torch.float32 if device == "cpu" else torch.bfloat16) if dtype == "auto" else getattr(torch, dtype)
    with _loading(name):
        # What it is, before the weights are downloaded.
        called = diffusers.DiffusionPipeline.load_config(source).get("_class_name")
        cls = getattr(diffusers, called, None) if isinstance(called, str) else None
        if cls is None:
            raise InputError(f"{name} is no pipeline of this version of diffusers, but a {called}")
        check_call(cls, {})
        return cls.from_pretrained(source, dtype=kind, use_safetensors=True).to(device)


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """What a model's folder has wrong with it becomes one line."""
    import transformers

    from foveate.zoo import need_diffusers

    # Bars for what takes moments; that of downloads is the hub's own, and stays.
    for logging in (need_diffusers().utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{name} cannot be loaded: {reason[:300]}") from None


def check_call(cls: type, settings: Iterable[str]) -> None:
    """InputError for a class of pipelines that takes no prompt, or not one of these arguments."""
    takes = inspect.signature(cls.__call__).parameters
    if "prompt" not in takes or "image" in takes or "num_frames" in takes:
        raise InputError(f"{cls.__name__} makes no pictures of prompts alone")
    for name in settings:
        if name not in takes:
            raise InputError(f"{cls.__name__} takes no {name}")


def settings_of(method: Published) -> dict[str, Any]:
    """Those of a method's settings that are JSON values: not models and their weights."""
    plain = (str, int, float, bool, list, tuple, dict, type(None))
    values = ((name, getattr(method, name, ...)) for name in inspect.signature(type(method)).parameters)
    return {name: value for name, value in values if isinstance(value, plain)}


def _told(cls: type[Published], known: Mapping[str, Any]) -> dict[str, Any]:
    """What is known here of a method's arguments. InputError where it cannot do without one that is not."""
    takes = inspect.signature(cls).parameters
    given = {name: value for name, value in known.items() if name in takes and value is not None}
    if missing := [name for name, one in takes.items() if one.default is one.empty and name not in given]:
        raise InputError(f"{cls.card.slug} needs {missing[0]}: {dict(cls.card.parameters)[missing[0]]}")
    return given


def _raised_in(error: BaseException, function: str) -> bool:
    """Whether an error passed through a function of that name."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == function:
            return True
        trace = trace.tb_next
    return False
