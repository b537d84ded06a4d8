"""What a method is: a class with a `Card`, handlers bound to stages with `@at`, and `Claim`s that can be checked.

```python
@register
class KeepFirst(Method):
    card = Card(slug="keep-first", title="…", arxiv="0000.00000", kind="reduce", hosts=("hf-vlm",), summary="…")

    def __init__(self, *, keep: float = 0.5) -> None:
        self.keep = share("keep", keep)

    @at("vision.output")
    def shorten(self, tokens: Tokens, at: Stage) -> Tokens:
        return tokens.keep(...)
```
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

# Nothing here computes: what a method is can be told without loading torch.
if TYPE_CHECKING:
    from torch import Tensor, nn

    from foveate.nn.attention import Attention
    from foveate.tokens import Tokens

KINDS = ("reduce", "connect", "tokenize", "image", "video", "decode", "diffuse", "guide", "learn", "probe", "sequence")

STAGES = {
    "vision.pixels": "the picture (B, 3, H, W) before the vision encoder",
    "vision.patches": "patch embeddings before the first encoder layer",
    "vision.layer": "the input of each encoder layer, 0-based",
    "vision.mlp": "between the attention and the MLP of each encoder layer",
    "vision.output": "the encoder's features that the host uses, before the projector",
    "projector": "the projector's output",
    "llm.layer": "the input of each language-model layer, 0-based: layer s sees what s layers have made",
    "llm.attention": "each call of a language-model layer's attention, decoding included",
    "llm.mlp": "each call of a language-model layer's MLP that has visual tokens among its inputs",
    "llm.decode": "the cache of each language-model layer, once, between prefill and decoding",
    "denoiser.call": "every call of a diffusion pipeline's denoiser",
    "denoiser.attention": "every call of an attention layer of the denoiser",
    "denoiser.patches": (
        "patch embeddings before the denoiser's blocks, once a step; those dropped keep the keys and values of the "
        "last step that they took part in, and their output is 0"
    ),
    "sampler.step": "every step of the sampler",
}
"""The places where tokens, or what is computed on them, may change."""


class InputError(ValueError):
    """The user's input cannot be used; the message is one line that says why and what to do instead."""


@dataclass(frozen=True)
class Card:
    """A method's metadata.

    Attributes:
        slug, title, arxiv, year: of the paper; `arxiv` is its number, "" for a baseline.
        kind: one of `KINDS`.
        hosts: families the method applies to: "hf-vlm", "hf-vision", "hf-video", "timm", "diffusers", "hf-causal-lm".
        summary: one sentence for `foveate methods`.
        training_free: whether it works without trained weights of its own.
        identity: arguments with which the method changes nothing, where there are such.
        parameters: hyperparameter -> one line on what it means.
        coarse: whether only some budgets can be met (whole grids), so that `for_budget` takes the nearest below.
    """

    slug: str
    title: str
    arxiv: str
    kind: str
    hosts: tuple[str, ...]
    summary: str
    year: int = 0
    training_free: bool = True
    baseline: bool = False
    identity: Mapping[str, Any] | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    coarse: bool = False


@dataclass(frozen=True)
class Claim:
    """A number that can be checked here without the authors' weights.

    Attributes:
        what: what is counted, in words.
        kind: "flops", "kv_bytes", "tokens", "parameters", "steps" or "value" (a function of the method alone).
        figure: the figure to compare with.
        tolerance: relative.
        source: where the figure stands ("Table 3"), or "card" where it was counted for the paper's card.
        architecture: a name of `foveate.hosts.architectures`; "" for "value" and with `model`.
        settings: the method's arguments.
        model, inputs: for what is counted on a whole model of the method's own instead of an architecture: functions
            that build it and its forward's arguments; both are called under the meta device.
        counting: for "flops", the convention: see `foveate.measure.claims`.
        visual, text: tokens of the prompt.
        value: for "value", a function that returns our figure, of the method with `settings`; for kinds that are not
            applied to a model, of the class.
    """

    what: str
    kind: str
    figure: float
    source: str
    tolerance: float = 0.01
    architecture: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    counting: str = ""
    visual: int = 576
    text: int = 0
    value: Callable[[Any], float] | None = None
    model: Callable[[], nn.Module] | None = None
    inputs: Callable[[], Sequence[Any]] | None = None


@dataclass(frozen=True, eq=False)
class Crops:
    """Which rows of the batch at a vision stage belong to one picture.

    LLaVA-1.5 makes one row of a picture. Any-resolution models (LLaVA-NeXT, OneVision) make a thumbnail, first, and a
    grid of crops of a larger version of the picture, row by row, whose padding is cut off afterwards.

    Attributes:
        rows: the rows of the batch.
        grid: (rows, columns) of crops, (0, 0) where there is a single row.
        packed: (rows of the batch, M) bool, patches that the model will use; False for a crop's padding.
    """

    rows: slice
    grid: tuple[int, int]
    packed: Tensor

    @property
    def single(self) -> bool:
        """Whether the picture is one row: no thumbnail, no crops."""
        return self.grid == (0, 0)


@dataclass(frozen=True)
class HostShape:
    """The facts about a host that a method may need before it runs.

    Attributes:
        family: "hf-vlm", "hf-vision" (pictures), "hf-video" (clips), "timm" or "diffusers".
        stages: the stages that this host has.
        vision_layers: depth of the vision encoder, 0 if there is none.
        feature_layer: 0-based encoder layer whose output the host uses (LLaVA-1.5: 22 of 24).
        prefix: class and register tokens before the patches.
        grid: (rows, columns) of patches of one crop at the encoder's native resolution; of a denoiser's first layer at
            the size that it was trained with, (0, 0) where its configuration does not say.
        llm_layers: depth of the language model, 0 if there is none.
        class_token: whether the first of the prefix is a class token (SigLIP has no prefix, some ViTs only registers).
        joined: how many patches the host joins to one token behind the encoder (InternVL: 4), whatever has become of
            them there: what is merged within the encoder is put back on its patches before.
        slots: time slots of a clip, each with a `grid` of patches; 1 for pictures.
        text_maps: whether the denoiser has cross-attention to the prompt that `DenoiserAttention.watch` can read.
    """

    family: str
    stages: tuple[str, ...]
    vision_layers: int
    feature_layer: int
    prefix: int
    grid: tuple[int, int]
    llm_layers: int = 0
    class_token: bool = True
    joined: int = 1
    slots: int = 1
    text_maps: bool = False

    @property
    def patches(self) -> int:
        """Patches of one crop or clip."""
        return self.slots * self.grid[0] * self.grid[1]


class Signals(Protocol):
    """What a method may ask its host for. Nothing is computed before it is asked for."""

    def attention(self, layer: int) -> Attention:
        """The attention of an encoder or language-model layer that has run (named in `Method.reads`), lazily."""

    def cls_attention(self, layer: int) -> Tensor:
        """(B, N) head-mean attention of the class token to each patch. InputError without a class token."""

    def keys(self, layer: int) -> Tensor:
        """(B, N, C) key projections of the patches in an encoder layer that has run."""

    def text_to_vision(self, layer: int) -> Tensor:
        """(B, N) attention that each visual token gets from the instruction, in the layer about to run.

        Softmax over all keys, mean over heads. The query is the last prompt token; in training, every position right
        before a supervised answer, averaged.
        """

    def received(self, layer: int) -> Tensor:
        """(B, N) attention that each token receives from all others in an encoder layer that has run, mean over heads.

        The substitute for `cls_attention` without a class token. A token of several patches gets their mean.
        """

    def states(self) -> Tensor:
        """(B, S, D) what enters the language-model layer about to run: text and visual tokens."""

    def slots(self) -> Tensor:
        """(B, N) where in `states` each visual token stands, -1 for padding."""

    def prompt(self) -> Tensor:
        """(B, S) bool: which of `states` are tokens of the prompt, not padding and not generated."""

    def crops(self) -> tuple[Crops, ...]:
        """The pictures at a vision stage, in order. Each row of the batch belongs to one."""

    def text_embeddings(self) -> Tensor:
        """(B, T, D) input embeddings of the prompt's text tokens, zero where a prompt is shorter."""

    def grid(self) -> tuple[int, int]:
        """(rows, columns) of source patches of one crop."""


@dataclass(frozen=True)
class Stage:
    """Where a handler is called.

    Attributes:
        name: one of `STAGES`.
        layer: 0-based layer, -1 where the stage has none; the sampler's step at "denoiser.call", "denoiser.patches" and
            "sampler.step".
        host: facts about the host.
        signals: see `Signals`.
        entered: (B,) long, tokens of each sample when they entered this part of the host (encoder, language model).
        active: (B,) bool, False for samples that the method has to leave alone (training without a supervised answer).
        marks: what a method notes at a vision stage of each source patch, name -> (rows, M), for the language model's
            stages: there they are (B, M) float for all source patches of a sample, 0 where a token is no patch.
        memory: what methods note during a prefill for decoding. It rides on the cache, so that each conversation has
            its own. Keep there what cannot be had again, by your own keys. In a diffusion pipeline it is emptied
            whenever the sampler sets its steps, so that each run has its own.
    """

    name: str
    layer: int
    host: HostShape
    signals: Signals
    entered: Tensor
    active: Tensor
    marks: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.name if self.layer < 0 else f"{self.name}[{self.layer}]"


Handler = Callable[[Any, Any, Stage], Any]
_H = TypeVar("_H", bound=Callable[..., Any])


def at(stage: str) -> Callable[[_H], _H]:
    """Marks a method of a `Method` as the handler of a stage: `(tokens, at) -> Tokens`.

    Others are handed something else at seven stages: at "vision.pixels" pixels (B, 3, H, W), returning such; at
    "llm.attention" an `AttentionCall`, at "llm.mlp" an `MlpCall`, at "denoiser.call" a `DenoiserCall`, at
    "denoiser.attention" a `DenoiserAttention` and at "sampler.step" a `SamplerStep` (`foveate.nn.calls`), returning the
    output; at "llm.decode" the tokens that the layer's cache holds, without features, returning those that stay.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; there are {', '.join(STAGES)}")

    def mark(handler: _H) -> _H:
        handler.stage = stage  # type: ignore[attr-defined]
        return handler

    return mark


class Published:
    """Whatever comes from a paper: it has a card, and claims that can be checked. Other kinds than `Method` derive
    from this class and from what they are: a backbone from `nn.Module` too, an objective from whatever it likes."""

    card: ClassVar[Card]
    claims: ClassVar[tuple[Claim, ...]] = ()


class Method(Published):
    """Base of what `foveate.apply` puts to work on a model. Subclasses check keyword-only hyperparameters and mark
    handlers with `@at`."""

    renumbers: ClassVar[bool] = True
    """Whether tokens that are kept at "llm.layer" (and "llm.decode") get consecutive positions from there on; False
    keeps those they entered with. What enters the language model is always numbered consecutively: it is an ordinary,
    shorter prompt. Hosts whose positions have several axes (Qwen2-VL's time, row, column) always keep them."""
    proportional: ClassVar[bool] = False
    """Whether the encoder's attention counts a merged token as often as it has patches (ToMe's `+ log s`)."""
    forgets: ClassVar[bool] = False
    """Whether no handler asks for a layer's attention after it, or another method, has asked for a later layer's: then
    queries and keys are let go of at once, and not when the forward ends."""
    newlines: str = "whole"
    """Whose newline tokens stay, in any-resolution models, when tokens go before the language model: only those of rows
    that stay "whole", those of "every" row of the crops, or "none"."""

    @classmethod
    @functools.cache
    def handlers(cls) -> Mapping[str, str]:
        """stage -> name of the handler, in definition order."""
        found: dict[str, str] = {}
        for base in reversed(cls.__mro__):
            for name, value in vars(base).items():
                if stage := getattr(value, "stage", None):
                    found[stage] = name
        return MappingProxyType(found)

    @classmethod
    def for_budget(cls, budget: float, host: HostShape) -> Method:
        """The method set up so that visual tokens, averaged over the language model's layers, are `budget` of all.

        This is what makes methods comparable that spend their tokens at different depths. Without a language model
        the share is that of the encoder's output. Raises InputError where the method cannot reach the budget.
        """
        share("budget", budget)
        if "keep" in inspect.signature(cls).parameters:
            return cls(keep=budget)  # type: ignore[call-arg]
        if budget != 1:
            raise InputError(f"{cls.card.slug} does not reduce tokens: its budget is 1")
        return cls()

    def check(self, host: HostShape) -> None:
        """Raises InputError where the hyperparameters do not fit the host."""

    def reads(self, host: HostShape) -> tuple[str, ...]:
        """Attention layers whose queries and keys the method looks at after they ran: "vision.attention[22]"."""
        return ()

    def acts_at(self, host: HostShape) -> tuple[str, ...]:
        """The stages this instance uses; by default all that it has handlers for."""
        return tuple(self.handlers())

    def layers_at(self, stage: str, host: HostShape) -> Collection[int] | None:
        """The layers at which the handler of a stage that every layer has is called, counted from 0; None for all."""
        return None

    def hyperparameters(self) -> dict[str, Any]:
        """name -> value, as given to the constructor."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.hyperparameters().items())
        return f"{type(self).__name__}({settings})"


_REGISTRY: dict[str, type[Published]] = {}
_P = TypeVar("_P", bound=type[Published])


def register(cls: _P) -> _P:
    """Enters a class into the registry under its card's slug. Raises ValueError for a bad or taken slug."""
    slug = cls.card.slug
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug):
        raise ValueError(f"a slug is lower-case words joined by hyphens, not {slug!r}")
    if cls.card.kind not in KINDS:
        raise ValueError(f"{slug}: kind must be one of {', '.join(KINDS)}, not {cls.card.kind!r}")
    taken = _REGISTRY.get(slug, cls)
    if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"two methods are named {slug!r}")
    _REGISTRY[slug] = cls
    return cls


def published() -> dict[str, type[Published]]:
    """slug -> class of everything that is registered, baselines first, then by name."""
    package = importlib.import_module("foveate.methods")
    for module in pkgutil.walk_packages(package.__path__, "foveate.methods."):
        importlib.import_module(module.name)
    return dict(sorted(_REGISTRY.items(), key=lambda item: (not item[1].card.baseline, item[0])))


def registry() -> dict[str, type[Method]]:
    """slug -> class of every method that `foveate.apply` takes, baselines first, then by name."""
    return {slug: cls for slug, cls in published().items() if issubclass(cls, Method)}


def published_class(slug: str) -> type[Published]:
    """The class registered under `slug`; InputError with the nearest names otherwise."""
    known = published()
    if slug not in known:
        raise InputError(f"unknown method {slug!r}; {did_you_mean(slug, known)}")
    return known[slug]


def method_class(slug: str) -> type[Method]:
    """The method registered under `slug`; InputError for other names, and for what is not applied to a model."""
    cls = published_class(slug)
    if not issubclass(cls, Method):
        raise InputError(f"{slug} is of kind {cls.card.kind}: not applied to a model; see `foveate methods {slug}`")
    return cls


def build(method: str | Method, settings: Mapping[str, Any] | None = None) -> Method:
    """A method from its name and keyword settings, or the instance itself. InputError for unknown names or settings."""
    if isinstance(method, Method):
        if settings:
            raise InputError("settings go with a method's name, not with an instance")
        return method
    cls = method_class(method)
    names = list(inspect.signature(cls).parameters)
    for name in settings or {}:
        if name not in names:
            raise InputError(f"{method} has no setting {name!r}; it has {', '.join(names) or 'none'}")
    return cls(**(settings or {}))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause that offers the nearest names."""
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"


def configured(name: str, known: Mapping[str, Mapping[str, Any]], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the configuration `name` of `known`, changed; of `options`, a dict of a backbone's, entry by entry.

    Raises InputError with the nearest names for an unknown one.
    """
    if name not in known:
        raise InputError(f"no configuration {name!r}; {did_you_mean(str(name), known)}")
    arguments = {**known[name], **changes}
    if "options" in arguments:
        arguments["options"] = {**known[name].get("options", {}), **changes.get("options", {})}
    return arguments


def within(name: str, value: float, interval: str) -> float:
    """`value` if it is a number in `interval`, "[0, 1)" or the like, else an InputError that names it."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    above = number and (low <= value if interval[0] == "[" else low < value)
    if not above or not (value <= high if interval[-1] == "]" else value < high):
        raise InputError(f"{name} must be a number in {interval}, not {value!r}")
    return float(value)


def share(name: str, value: float) -> float:
    """`value` if it is a number in (0, 1], else an InputError that names it."""
    return within(name, value, "(0, 1]")


def whole(name: str, value: int, least: int = 0) -> int:
    """`value` if it is a whole number >= least, else an InputError that names it."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number >= {least}, not {value!r}")
    return value


def choice(name: str, value: str, options: tuple[str, ...]) -> str:
    """`value` if it is one of `options`, else an InputError that names it."""
    if not isinstance(value, str) or value not in options:
        raise InputError(f"{name} must be one of {', '.join(options)}, not {value!r}")
    return value


def depth(name: str, value: int | float, least: int = 0) -> int | float:
    """`value` if it is a whole number >= least, or a share of the depth in (0, 1), else an InputError that names it."""
    return within(name, value, "(0, 1)") if isinstance(value, float) else whole(name, value, least)


def at_depth(name: str, value: int | float, layers: int, least: int = 0) -> int:
    """The layer least..layers-1 that `value` names on a host with `layers` layers (see `depth`)."""
    layer = round(value * layers) if isinstance(value, float) else value
    if not least <= layer < layers:
        raise InputError(f"{name}: {value!r} is layer {layer}; on this host it can be {least}..{layers - 1}")
    return layer


def language_layers(slug: str, host: HostShape) -> int:
    """Layers of the host's language model; raises an InputError where there is none."""
    if host.llm_layers == 0:
        raise InputError(f"{slug} acts inside a language model, which this host does not have")
    return host.llm_layers


def equal_counts(slug: str, tokens: Tokens, at: Stage) -> None:
    """Raises an InputError that says why where rows of the batch have places without a token, so that counts differ."""
    if tokens.valid is None:
        return
    entered = at.entered.tolist()
    if min(entered) < max(entered):
        # LLaVA-OneVision: a resampled picture's thumbnail is whole, and its blocks of cells are smaller.
        why = (
            f"here the host itself made {min(entered)} to {max(entered)} of pictures whose crops it resampled; "
            "with a higher anyres_max in the config's vision_aspect_ratio it does not"
        )
    else:
        why = "another method dropped some before; let none act before it"
    raise InputError(f"{slug} takes crops with equal numbers of tokens: {why}")


def floor_share(count: Tensor, ratio: float, least: int = 1) -> Tensor:
    """`floor(count * ratio)` of each sample (B,), at least `least` where there are as many tokens.

    Exact for decimal ratios: 0.29 * 100 is 28.999... in binary, and a token is not lost to that.
    """
    return (count.double() * ratio + 1e-9).long().clamp(min=least).minimum(count)
