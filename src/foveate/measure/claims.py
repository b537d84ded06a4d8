"""Checking every `Claim` of every method: what is counted here, against the figure that was printed.

How many visual tokens each layer of the language model sees is read from a real run of the method on a narrow twin
of the architecture (same depth, same numbers of tokens; see `hosts/architectures.py`). Costs follow from those and
the exact shapes:

* `visual-macs`: multiply-adds of the exact decoder layer at that many tokens, visual tokens only, counted on the meta
  device, summed over layers. The convention of FastV, PyramidDrop and most others.
* `visual-flops`: twice that, a multiplication and an addition being two operations. GlobalCom2's and YOPO's.
* `llm-viewer`: the formula of LLM-Viewer (2 FLOPs a multiply-add; softmax, norms, residuals, activations too), for
  visual and text tokens.
* `llm-viewer-charged`: the same on `method.charged_tokens`, where the authors' script charges other numbers than run;
  the run has to be the charged numbers one layer later.
* `projector-macs`: multiply-adds of the exact projector at the number of tokens that leave the encoder.

Models of a method's own (`Claim.model`) are built on the meta device; `macs` counts half of their FLOPs, `flops` all,
`linear-flops` those of linear and convolution layers alone, as counters do that watch layers.

KV bytes are the visual share of the cache in fp16, at the twin's real cache lengths.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foveate.apply import apply
from foveate.hosts.architectures import Architecture, architecture
from foveate.measure.flops import count_flops, count_linear_flops
from foveate.measure.memory import kv_lengths
from foveate.measure.provenance import visual_tokens
from foveate.method import Claim, InputError, Method, Published, build, published, published_class

_FP16 = 2
_FEW_WORDS = 8
"""Text tokens of the run where the claim counts none; something has to ask."""


@dataclass(frozen=True)
class Checked:
    """A claim and our figure for it; `error` is relative, `holds` whether it is within the claim's tolerance."""

    method: str
    claim: Claim
    ours: float

    @property
    def error(self) -> float:
        figure = self.claim.figure
        return abs(self.ours - figure) / abs(figure) if figure else abs(self.ours)

    @property
    def holds(self) -> bool:
        # A count that goes through floating point may differ in the last bit even where no tolerance is given.
        return self.error <= self.claim.tolerance + 1e-12


def verify(slug: str | None = None, on_progress: Callable[[int, int, str], None] | None = None) -> list[Checked]:
    """Measures every claim of one method, or of all; InputError for an unknown name."""
    classes = published() if slug is None else {slug: published_class(slug)}
    claims = [(name, cls, claim) for name, cls in classes.items() for claim in cls.claims]
    checked = []
    for number, (name, cls, claim) in enumerate(claims):
        checked.append(Checked(name, claim, count(cls, claim)))
        if on_progress:
            on_progress(number + 1, len(claims), f"{name}: {claim.what}")
    return checked


def count(cls: type[Published], claim: Claim) -> float:
    """Our figure for a claim of a method. InputError for a kind or counting that is not known."""
    if claim.model is not None:
        return _of_model(claim.model, claim)
    # Only methods that are applied have settings; for the others, the class itself says what it is.
    method: Any = cls(**claim.settings) if issubclass(cls, Method) else cls
    if claim.kind == "value":
        if claim.value is None:
            raise InputError(f"{cls.card.slug}: the claim {claim.what!r} has no function to count with")
        return float(claim.value(method))
    shape = architecture(claim.architecture)
    if claim.kind == "parameters":
        return float(sum(weight.numel() for weight in shape.build_meta().parameters()))
    settings = json.dumps(dict(claim.settings))
    ran = run(cls.card.slug, settings, claim.architecture, claim.visual, claim.text or _FEW_WORDS)
    if claim.kind == "tokens":
        return sum(ran.visual) / len(ran.visual)
    if claim.kind == "kv_bytes":
        language = shape.language
        width = getattr(language, "head_dim", None) or language.hidden_size // language.num_attention_heads
        return float(sum(ran.cached) * 2 * language.num_key_value_heads * width * _FP16)
    if claim.kind == "flops":
        return _flops(claim, method, shape, ran)
    raise InputError(f"{cls.card.slug}: nothing here counts {claim.kind!r}")


def _of_model(build: Callable[[], torch.nn.Module], claim: Claim) -> float:
    with torch.device("meta"):
        model = build().eval()
        if claim.kind == "parameters":
            return float(sum(weight.numel() for weight in model.parameters()))
        if claim.kind != "flops" or claim.inputs is None or claim.counting not in ("macs", "flops", "linear-flops"):
            raise InputError(f"{claim.what}: a model has parameters, or flops ('macs', 'flops') of inputs")
        inputs = claim.inputs()
        if claim.counting == "linear-flops":
            return float(count_linear_flops(lambda: model(*inputs)))
        flops = count_flops(lambda: model(*inputs))
    return flops / 2 if claim.counting == "macs" else float(flops)


@dataclass(frozen=True)
class Ran:
    """A run on a twin: visual tokens at each layer that can be seen, that are in the cache, and projected ones."""

    visual: tuple[int, ...]
    cached: tuple[int, ...]
    projected: int


@functools.lru_cache(maxsize=256)
def run(slug: str, settings: str, name: str, visual: int, text: int) -> Ran:
    """Runs a method (settings as JSON) on the twin of an architecture and reads what the layers saw.

    Raises:
        RuntimeError: if the trace says other numbers than the cache: one of them lies.
    """
    model, inputs = architecture(name).twin(visual, text)
    with apply(model, build(slug, json.loads(settings))) as applied, torch.inference_mode():
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        seen = tuple(counts[0] for counts in visual_tokens(applied.trace, applied.host.shape.llm_layers))
        before = [sum(record.tokens_out) for record in applied.trace if record.stage == "vision.output"]
        pruned = {record.stage: record.tokens_out[0] for record in applied.trace}
    cached = tuple(length - text for length in kv_lengths(cache))
    hidden = json.loads(settings).get("removed") == "mask"
    told = tuple(pruned.get(f"llm.decode[{layer}]", count) for layer, count in enumerate(seen))
    if cached != told and not hidden:
        raise RuntimeError(f"{slug}: the trace says {told} visual tokens, the cache holds {cached}")
    return Ran(seen, cached, before[-1] if before else visual)


def _flops(claim: Claim, method: Method, shape: Architecture, ran: Ran) -> float:
    if claim.counting in ("visual-macs", "visual-flops"):
        operations = 2 if claim.counting == "visual-flops" else 1
        return float(operations * sum(_layer_macs(shape.name, n) for n in ran.visual))
    if claim.counting == "projector-macs":
        projector = shape.build_projector()
        features = torch.empty(ran.projected, shape.vision["hidden_size"], device="meta")
        return count_flops(lambda: projector(features)) / 2
    if claim.counting == "llm-viewer":
        return llm_viewer([n + claim.text for n in ran.visual], shape)
    if claim.counting == "llm-viewer-charged":
        charged: list[int] = method.charged_tokens(claim.visual, len(ran.visual))  # type: ignore[attr-defined]
        if tuple(charged[:-1]) != ran.visual[1:]:
            raise RuntimeError(f"{claim.what}: charged {charged}, but {list(ran.visual)} ran")
        return llm_viewer([n + claim.text for n in charged], shape)
    raise InputError(f"no counting {claim.counting!r}")


@functools.lru_cache(maxsize=4096)
def _layer_macs(name: str, tokens: int) -> float:
    """Multiply-adds of one decoder layer at `tokens` tokens, counted on the meta device."""
    if tokens == 0:
        return 0.0
    layer = _layer(name)
    config = architecture(name).language
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    hidden = torch.empty(1, tokens, config.hidden_size, device="meta")
    angles = torch.empty(1, tokens, width, device="meta")
    return count_flops(lambda: layer(hidden, position_embeddings=(angles, angles))) / 2


@functools.lru_cache(maxsize=8)
def _layer(name: str) -> torch.nn.Module:
    return architecture(name).build_layer()


def llm_viewer(tokens: Sequence[int], shape: Architecture) -> float:
    """FLOPs of one prefill with `tokens[l]` tokens in layer l, as LLM-Viewer counts them (the AIM paper's script).

    Per layer, with h the width, H heads, K key-value heads, m the MLP's width: 2n(2h^2 + 2h^2 K/H + 3hm) for the matrix
    products, 4n^2 h + 5 H n^2 for attention, 14hn for norms, h n for each counted residual addition and 2hn for the
    activation; h V once for the head.
    """
    config = shape.language
    h, m, heads, groups = (
        config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads
    )  # fmt: skip
    total = float(h * config.vocab_size)
    for n in tokens:
        linear = 2 * n * (2 * h * h + 2 * h * h * groups / heads + 3 * h * m)
        attention = 4 * n * n * h + 5 * heads * n * n
        total += linear + attention + (14 + shape.residual_adds + 2) * h * n
    return total
