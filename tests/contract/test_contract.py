"""What every registered method must do. Parametrised on the registry: a new method is covered without a line here."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate
from foveate.hosts.host import Host
from foveate.method import KINDS, STAGES, Claim, HostShape, InputError, registry
from foveate.tokens import DROPPED, Tokens
from tiny import prompt, single, vision, vlm
from tiny_video import clips, videomae

METHODS = registry()
FAMILIES = {
    "hf-vlm": ("clip-llama", "next", "onevision", "internvl"), "hf-vision": ("vit",), "hf-video": ("videomae",),
    "timm": ("timm-reg-avg",),
}  # fmt: skip
"""family -> names of tiny hosts; of pipelines, see `test_diffusion_methods.py`. The timm head averages the patches, so
that it notices what happens to them."""

QUIET = ("dense", "var-sink")
"""What changes nothing on these hosts: var-sink waits for massive activations, which random weights do not have."""

PAIRS = [(slug, family) for slug, cls in METHODS.items() for family in cls.card.hosts if family in FAMILIES]
per_method = pytest.mark.parametrize("slug", METHODS)
per_host = pytest.mark.parametrize(("slug", "family"), PAIRS)
in_language_models = pytest.mark.parametrize("slug", [slug for slug, family in PAIRS if family == "hf-vlm"])


def model(name: str, **config: Any) -> Any:
    if name == "videomae":
        return videomae(**config)
    return vision(name, **config) if name in ("vit", "timm-reg-avg") else vlm(name, **config)


def inputs(host: Any, samples: int = 2) -> Any:
    """Two samples of different lengths, left padded, or two pictures, or two clips."""
    if hasattr(host, "config") and host.config.model_type == "videomae":
        return clips()[:samples]
    if not hasattr(host, "generate"):
        return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))[:samples]
    sizes = [(24, 12), (16, 30)][:samples] if hasattr(host.model, "pack_image_features") else None
    return prompt(host, [(2, 6), (1, 3)][:samples], sizes=sizes)


def forward(host: Any, given: Any) -> Tensor:
    if isinstance(given, Tensor):
        out = host(given)
        return out if isinstance(out, Tensor) else out.last_hidden_state
    return host(**given).logits


@contextmanager
def watched(pairs: list[tuple[Tokens, Tokens]]) -> Iterator[None]:
    """Collects the tokens before and after each stage that a method changed."""
    record = Host.record

    def noting(self: Host, label: str, slug: str, before: Tokens, after: Tokens) -> None:
        pairs.append((before, after))
        record(self, label, slug, before, after)

    Host.record = noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        Host.record = record  # type: ignore[method-assign]


# -- the card


@per_method
def test_card_is_complete(slug: str) -> None:
    cls, card = METHODS[slug], METHODS[slug].card
    assert card.slug == slug and card.title and card.summary.endswith(".") and cls.__doc__
    assert card.kind in KINDS and card.hosts and set(card.hosts) <= {*FAMILIES, "diffusers"}
    assert set(card.parameters) == set(inspect.signature(cls).parameters)
    assert all(line and "\n" not in line for line in card.parameters.values())
    assert set(cls.handlers()) <= set(STAGES)
    if card.baseline:
        assert card.arxiv == "" and cls.__module__ == "foveate.methods.baselines"
        return
    assert re.fullmatch(r"\d{4}\.\d{4,5}", card.arxiv) and card.year == 2000 + int(card.arxiv[:2])
    assert f"arxiv.org/abs/{card.arxiv}" in cls.__doc__, "the class docstring links the paper"
    assert cls.__module__ == f"foveate.methods.{card.kind}.{slug.replace('-', '_')}"


@per_method
def test_arguments_are_keyword_only_and_have_defaults(slug: str) -> None:
    for parameter in inspect.signature(METHODS[slug]).parameters.values():
        assert parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty


@per_method
def test_repr_builds_the_same_method(slug: str) -> None:
    cls = METHODS[slug]
    for settings in ({}, cls.card.identity or {}, *(claim.settings for claim in cls.claims)):
        made = cls(**settings)
        again = eval(repr(made), {cls.__name__: cls})
        assert again.hyperparameters() == made.hyperparameters()
        assert {**made.hyperparameters(), **settings} == made.hyperparameters()


@per_method
def test_every_hyperparameter_rejects_nonsense(slug: str) -> None:
    cls = METHODS[slug]
    for name, parameter in inspect.signature(cls).parameters.items():
        nonsense: list[Any] = [True, float("nan"), -1, "nonsense", object(), float("inf"), b"", {}, 1j]
        if parameter.default is not None:
            nonsense.append(None)
        if isinstance(parameter.default, tuple):
            nonsense += [(True,), (float("nan"),), (-1,), ("nonsense",), (None,), 0.5, 3]
        elif isinstance(parameter.default, str):
            nonsense += ["", parameter.default.upper() + "x", 0]
        for value in nonsense:
            if value is True and isinstance(parameter.default, bool):
                continue
            with pytest.raises(InputError, match=name):
                cls(**{name: value})


@per_method
def test_claims_are_well_formed(slug: str) -> None:
    cls = METHODS[slug]
    kinds = ("flops", "kv_bytes", "tokens", "parameters", "steps", "value")
    seen = set()
    for claim in cls.claims:
        assert isinstance(claim, Claim) and claim.kind in kinds and claim.what and claim.source
        assert math.isfinite(claim.figure) and claim.figure >= 0 and 0 <= claim.tolerance <= 0.05
        counted_on = [bool(claim.architecture), claim.value is not None, claim.model is not None]
        assert sum(counted_on) == 1, "an architecture, a model, or a value of the method alone"
        made = cls(**claim.settings)
        if claim.value is not None:
            assert math.isfinite(claim.value(made))
        if claim.kind == "flops":
            assert claim.counting
        seen.add((claim.what, claim.architecture))
    assert len(seen) == len(cls.claims), "two claims look the same in a report"
    if not cls.card.baseline:
        assert cls.claims


# -- at work


@per_host
@torch.no_grad()
def test_identity_settings_change_nothing(slug: str, family: str) -> None:
    cls = METHODS[slug]
    if cls.card.identity is None:
        return
    for name in FAMILIES[family]:
        host = model(name)
        given = inputs(host)
        dense = forward(host, given)
        with foveate.apply(host, cls(**cls.card.identity)) as applied:
            changed = forward(host, given)
        assert torch.equal(dense, changed)
        assert all(record.tokens_in == record.tokens_out for record in applied.trace)


@per_host
@torch.no_grad()
def test_default_settings_change_something_and_come_off(slug: str, family: str) -> None:
    cls = METHODS[slug]
    for name in FAMILIES[family]:
        host = model(name)
        given = inputs(host)
        dense = forward(host, given)
        with foveate.apply(host, cls()):
            changed = forward(host, given)
        if slug not in QUIET:
            assert changed.shape != dense.shape or not torch.equal(changed, dense)
        assert torch.equal(forward(host, given), dense)


@per_host
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(slug: str, family: str) -> None:
    cls = METHODS[slug]
    for name in FAMILIES[family]:
        host = model(name)
        given = inputs(host)
        # Before the method is applied: what `prompt` and `single` ask the host for is the unchanged model's.
        each = [given[b : b + 1] if isinstance(given, Tensor) else single(host, given, b) for b in range(2)]
        with foveate.apply(host, cls()) as applied:
            together = forward(host, given)
            counts = [record.tokens_out for record in applied.trace]
            for b in range(2):
                if isinstance(given, Tensor):
                    alone, batched = forward(host, each[b])[0], together[b]
                else:
                    real = given["attention_mask"][b].bool()
                    alone, batched = forward(host, each[b])[0], together[b, real]
                    last = [record for record in applied.trace if record.stage.startswith("llm")]
                    then = [c for c, r in zip(counts[-len(last) :], last)]
                    assert [record.tokens_out[0] for record in last] == [c[b] for c in then]
                torch.testing.assert_close(alone, batched, rtol=1e-3, atol=1e-4)


@per_host
@torch.no_grad()
def test_the_same_input_gives_the_same_output(slug: str, family: str) -> None:
    cls = METHODS[slug]
    host = model(FAMILIES[family][0])
    given = inputs(host)
    with foveate.apply(host, cls()):
        first = forward(host, given)
        torch.manual_seed(99)
        assert torch.equal(first, forward(host, given))
    with foveate.apply(host, cls()):
        assert torch.equal(first, forward(host, given))


@per_host
@torch.no_grad()
def test_provenance_adds_up_at_every_stage(slug: str, family: str) -> None:
    cls = METHODS[slug]
    for name in FAMILIES[family]:
        host = model(name)
        given = inputs(host)
        pairs: list[tuple[Tokens, Tokens]] = []
        with watched(pairs), foveate.apply(host, cls()) as applied:
            forward(host, given)
            trace = applied.trace
        for before, after in pairs:
            patches = after.source.shape[1]
            assert patches == before.source.shape[1]
            for b in range(after.x.shape[0]):
                for j in range(after.x.shape[1]):
                    assert int(after.size[b, j]) == int((after.source[b] == j).sum())
                dropped = int((after.source[b] == DROPPED).sum())
                assert int(after.size[b].sum()) + dropped == patches
                gone = before.source[b] == DROPPED
                assert (after.source[b][gone] == DROPPED).all(), "a dropped patch came back"
        for record in trace:
            for b, count in enumerate(record.tokens_out):
                held = record.source[b][record.source[b] != DROPPED]
                assert len(held.unique()) == count and count <= record.tokens_in[b]


@per_host
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_precisions(slug: str, family: str, dtype: torch.dtype) -> None:
    cls = METHODS[slug]
    for name in FAMILIES[family]:
        host = model(name).to(dtype)
        given = inputs(host, 1)
        if isinstance(given, Tensor):
            given = given.to(dtype)
        else:
            given["pixel_values"] = given["pixel_values"].to(dtype)
        with foveate.apply(host, cls()):
            out = forward(host, given)
        assert out.dtype == dtype and out.isfinite().all()


@per_host
def test_gradients_reach_every_parameter(slug: str, family: str) -> None:
    cls = METHODS[slug]
    host = model(FAMILIES[family][0])
    given = inputs(host)

    def reached() -> set[str]:
        host.zero_grad(set_to_none=True)
        forward(host, given).float().square().mean().backward()
        return {name for name, weight in host.named_parameters() if weight.grad is not None and weight.grad.any()}

    dense = reached()
    made = cls()
    with foveate.apply(host, made):
        assert reached() >= dense
    if isinstance(made, nn.Module):
        assert all(weight.grad is not None and weight.grad.any() for weight in made.parameters())


@in_language_models
@torch.no_grad()
def test_generate_with_the_cache_equals_generate_without(slug: str) -> None:
    cls = METHODS[slug]
    host = vlm("clip-llama")
    given = inputs(host)
    with foveate.apply(host, cls()) as applied:
        texts = [
            host.generate(**given, max_new_tokens=4, do_sample=False, use_cache=cached) for cached in (True, False)
        ]
        if "llm.decode" in cls().acts_at(applied.host.shape):
            # Decoding sees fewer tokens than the prefill did, on purpose; the first word still comes from the prefill.
            texts = [text[:, :-3] for text in texts]
    assert torch.equal(*texts)


# -- budgets


@in_language_models
@pytest.mark.parametrize("layers", [8, 32])
@torch.no_grad()
def test_for_budget_meets_its_budget(slug: str, layers: int) -> None:
    """Mean visual tokens per layer of the language model within one of the budget; a coarse method at most it."""
    cls = METHODS[slug]
    host = _budget_host(layers)
    given = prompt(host, [(2, 5)])
    shape = foveate.apply(host, "dense")
    facts = shape.host.shape
    shape.remove()
    total, met = int((given["input_ids"] == host.config.image_token_id).sum()), 0
    for budget in (1.0, 0.9, 0.75, 0.5, 0.3, 0.1, 0.05):
        try:
            made = cls.for_budget(budget, facts)
        except InputError as error:
            assert len(str(error)) > 20
            continue
        met += 1
        with foveate.apply(host, made) as applied:
            host.model(**given)
            spent = mean_tokens(applied.trace, layers)
        assert spent <= budget * total + 1, (budget, made)
        assert METHODS[slug].card.coarse or spent >= budget * total - 1, (budget, made)
    assert met


@per_method
@pytest.mark.parametrize("budget", [0, -0.5, 1.5, float("nan"), True, "half", None])
def test_for_budget_rejects_nonsense(slug: str, budget: Any) -> None:
    facts = HostShape("hf-vlm", tuple(STAGES), 24, 22, 1, (24, 24), 32)
    with pytest.raises(InputError, match="budget"):
        METHODS[slug].for_budget(budget, facts)


def mean_tokens(trace: list[Any], layers: int) -> float:
    """Visual tokens, averaged over the layers of the language model."""
    now, seen = 0, {}
    for record in trace:
        if record.stage == "llm.input":
            seen[0] = record.tokens_out[0]
        elif found := re.fullmatch(r"llm\.layer\[(\d+)\]", record.stage):
            seen[int(found[1])] = record.tokens_out[0]
    total = 0
    for layer in range(layers):
        now = seen.get(layer, now)
        total += now
    return total / layers


_HOSTS: dict[int, Any] = {}


def _budget_host(layers: int) -> Any:
    """144 patches, so that one token is less than a hundredth."""
    if layers not in _HOSTS:
        _HOSTS[layers] = vlm("clip-llama", layers=layers, image=48)
    return _HOSTS[layers]
