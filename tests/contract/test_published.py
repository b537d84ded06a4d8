"""What everything with a card must do that is not applied to a model: tokenizers, backbones, objectives, probes."""

from __future__ import annotations

import math
import re

import pytest

from foveate.method import KINDS, InputError, Method, method_class, published

OTHERS = {slug: cls for slug, cls in published().items() if not issubclass(cls, Method)}


@pytest.mark.parametrize("slug", OTHERS)
def test_card_and_claims_are_complete(slug: str) -> None:
    cls, card = OTHERS[slug], OTHERS[slug].card
    assert card.slug == slug and card.title and card.summary.endswith(".") and cls.__doc__
    assert card.kind in KINDS and re.fullmatch(r"\d{4}\.\d{4,5}", card.arxiv)
    assert card.year == 2000 + int(card.arxiv[:2])
    assert f"arxiv.org/abs/{card.arxiv}" in cls.__doc__, "the class docstring links the paper"
    assert cls.__module__ == f"foveate.methods.{card.kind}.{slug.replace('-', '_')}"
    seen = set()
    for claim in cls.claims:
        assert claim.kind in ("flops", "parameters", "steps", "tokens", "value") and claim.what and claim.source
        assert math.isfinite(claim.figure) and 0 <= claim.tolerance <= 0.05
        assert (claim.value is not None) != (claim.model is not None)
        assert claim.what not in seen, "two claims look the same in a report"
        seen.add(claim.what)
    assert cls.claims


@pytest.mark.parametrize("slug", OTHERS)
def test_it_cannot_be_applied(slug: str) -> None:
    with pytest.raises(InputError, match=f"{slug} is of kind {OTHERS[slug].card.kind}"):
        method_class(slug)
