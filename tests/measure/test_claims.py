"""Every claim holds, and a wrong one does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from foveate.hosts.architectures import architecture
from foveate.measure.claims import Checked, count, llm_viewer, verify
from foveate.method import Card, Claim, InputError, Published, method_class

_HEAVY = ("base, 32 frames", "prune only", "AIM, 192 frames")
"""Runs of 5 to 20 s on one core; `foveate verify` makes them."""


def _light() -> list[tuple[str, Claim]]:
    slugs = ("fopru", "vtc-cls", "pyramiddrop", "aim")
    return [(slug, claim) for slug in slugs for claim in method_class(slug).claims if not claim.what.endswith(_HEAVY)]


@pytest.mark.parametrize(("slug", "claim"), _light(), ids=lambda value: value if isinstance(value, str) else value.what)
def test_claim_holds(slug: str, claim: Claim) -> None:
    checked = Checked(slug, claim, count(method_class(slug), claim))
    assert checked.holds, f"{checked.ours:,.6g} is not {claim.figure:,.6g}"


@pytest.mark.parametrize("kind", ["flops", "tokens", "kv_bytes"])
def test_a_wrong_figure_fails(kind: str) -> None:
    cls = method_class("pyramiddrop")
    claim = next(claim for claim in cls.claims if claim.kind == kind)
    for factor in (0.9, 1.1):
        wrong = replace(claim, figure=claim.figure * factor)
        assert not Checked("pyramiddrop", wrong, count(cls, wrong)).holds


def test_wrong_settings_fail() -> None:
    cls = method_class("pyramiddrop")
    claim = next(claim for claim in cls.claims if claim.what.endswith("4 stages"))
    wrong = replace(claim, settings={"layers": (9, 16, 24)})
    assert not Checked("pyramiddrop", wrong, count(cls, wrong)).holds


@pytest.mark.parametrize(("keep", "tera"), [(1.0, 3.8172), (0.5, 1.7774)])
def test_pyramiddrop_to_five_digits(keep: float, tera: float) -> None:
    claim = Claim("", "flops", 1, "", architecture="llava-1.5-7b", settings={"keep": keep}, counting="visual-macs")
    assert count(method_class("pyramiddrop"), claim) / 1e12 == pytest.approx(tera, abs=5e-5)


def test_visual_macs_against_the_formula() -> None:
    claim = Claim("", "flops", 1, "", architecture="llava-next-7b", settings={}, counting="visual-macs", visual=2880)
    by_hand = sum(8 * (4 * n * 4096**2 + 2 * n * n * 4096 + 3 * n * 4096 * 11008) for n in (2880, 1440, 720, 360))
    assert count(method_class("pyramiddrop"), claim) == by_hand


def test_llm_viewer_by_hand() -> None:
    n, h, m = 616, 4096, 11008
    layer = 2 * n * (4 * h * h + 3 * h * m) + 4 * n * n * h + 5 * 32 * n * n + 18 * n * h
    assert llm_viewer([n] * 32, architecture("llava-1.5-7b")) == 32 * layer + h * 32064


def test_verify_reports_and_names_are_checked() -> None:
    heard: list[tuple[int, int, str]] = []
    checked = verify("vtc-cls", lambda *step: heard.append(step))
    assert len(checked) == len(heard) == len(method_class("vtc-cls").claims)
    assert heard[-1][0] == heard[-1][1]
    with pytest.raises(InputError, match="did you mean vtc-cls"):
        verify("vtc-clss")
    with pytest.raises(InputError, match="nothing here counts"):
        count(method_class("fopru"), Claim("", "steps", 1, "", architecture="llava-1.5-7b"))


class _Backbone(Published):
    card = Card(slug="backbone", title="for tests", arxiv="", kind="image", hosts=(), summary="for tests")


def test_a_model_of_the_methods_own_is_counted_on_the_meta_device() -> None:
    """One linear layer: 7 * 5 weights and 5 biases, 2 * 3 * 7 * 5 FLOPs on three rows; half of that are MACs."""
    asked: list[torch.device] = []

    def build() -> nn.Module:
        layer = nn.Linear(7, 5)
        asked.append(layer.weight.device)
        return layer

    claim = Claim("weights", "parameters", 40, "closed form", model=build)
    assert count(_Backbone, claim) == 40
    inputs = replace(claim, kind="flops", counting="flops", inputs=lambda: (torch.empty(3, 7),))
    assert count(_Backbone, inputs) == 2 * 3 * 7 * 5
    assert count(_Backbone, replace(inputs, counting="macs")) == 3 * 7 * 5
    assert {device.type for device in asked} == {"meta"}
    for wrong in (replace(inputs, counting=""), replace(inputs, inputs=None), replace(claim, kind="tokens")):
        with pytest.raises(InputError, match="weights"):
            count(_Backbone, wrong)


def test_a_value_of_a_kind_that_is_not_applied_is_of_the_class() -> None:
    claim = Claim("letters", "value", 8, "closed form", value=lambda cls: len(cls.card.slug))
    assert count(_Backbone, claim) == 8
