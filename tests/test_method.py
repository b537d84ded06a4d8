"""What a method is made of: cards, handlers, the registry, and the checks of hyperparameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foveate.method import (
    Card,
    HostShape,
    InputError,
    Method,
    at,
    at_depth,
    build,
    choice,
    configured,
    depth,
    did_you_mean,
    floor_share,
    method_class,
    register,
    registry,
    share,
    whole,
    within,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (share, (1, 1.0, 0.001), (0, -0.5, 1.01, NAN, INF, True, "0.5", None, [0.5])),
        (lambda n, v: within(n, v, "[0, 1)"), (0, 0.99), (1, -0.01, NAN, False, "0", None)),
        (lambda n, v: within(n, v, "(0, inf)"), (1e-9, 1e9), (0, INF, NAN, -1, None)),
        (lambda n, v: whole(n, v, 2), (2, 10**9), (1, -1, 2.0, NAN, True, "2", None)),
        (lambda n, v: choice(n, v, ("a", "b")), ("a", "b"), ("c", "", None, 1, True, NAN, ["a"])),
        (lambda n, v: depth(n, v, 1), (1, 40, 0.25), (0, 0.0, 1.0, -1, NAN, INF, True, "1", None)),
    ],
)
def test_checks_take_what_is_in_range_and_name_what_is_not(check: Any, good: tuple[Any], bad: tuple[Any]) -> None:
    for value in good:
        assert check("speed", value) == value
    for value in bad:
        with pytest.raises(InputError, match="speed"):
            check("speed", value)


def test_at_depth_is_the_layer_or_a_share_of_the_depth() -> None:
    assert [at_depth("s", value, 32) for value in (0, 31, 0.25, 0.5, 0.75)] == [0, 31, 8, 16, 24]
    for value, layers, least in ((32, 32, 0), (0.99, 8, 0), (0.1, 4, 1)):
        with pytest.raises(InputError, match="s: "):
            at_depth("s", value, layers, least)


def test_floor_share_is_exact_for_decimal_ratios() -> None:
    count = torch.tensor([0, 1, 2, 100, 576, 2880])
    assert floor_share(count, 0.29).tolist() == [0, 1, 1, 29, 167, 835]
    assert floor_share(count, 0.29, least=0).tolist() == [0, 0, 0, 29, 167, 835]
    assert floor_share(count, 4 / 9).tolist()[4] == 256
    for hundredths in range(1, 101):
        assert int(floor_share(torch.tensor([100]), hundredths / 100)) == hundredths


def test_handlers_are_inherited_and_can_be_replaced() -> None:
    class First(Method):
        @at("vision.output")
        def one(self, tokens: Any, at: Any) -> Any:
            return 1

        @at("llm.layer")
        def two(self, tokens: Any, at: Any) -> Any:
            return 2

    class Second(First):
        @at("vision.output")
        def other(self, tokens: Any, at: Any) -> Any:
            return 3

    assert First.handlers() == {"vision.output": "one", "llm.layer": "two"}
    assert Second.handlers() == {"vision.output": "other", "llm.layer": "two"}
    with pytest.raises(ValueError, match="unknown stage"):
        at("vision.nowhere")


def test_register_refuses_bad_and_taken_slugs() -> None:
    def method(slug: str, kind: str = "reduce") -> type[Method]:
        card = Card(slug=slug, title="", arxiv="", kind=kind, hosts=(), summary="")
        return type("Dense", (Method,), {"card": card, "__qualname__": "Dense", "__module__": __name__})

    for slug, kind, message in (("dense", "reduce", "two methods"), ("Bad_slug", "reduce", "slug"), ("x", "y", "kind")):
        registry()
        with pytest.raises(ValueError, match=message):
            register(method(slug, kind))


def test_registry_puts_baselines_first() -> None:
    baseline = [cls.card.baseline for cls in registry().values()]
    assert baseline == sorted(baseline, reverse=True) and {"dense", "fopru", "aim"} <= set(registry())


def test_build_by_name_by_instance_and_with_errors_that_help() -> None:
    made = build("fopru", {"keep": 0.25})
    assert made.hyperparameters()["keep"] == 0.25 and build(made) is made
    for method, settings, message in (
        ("fopro", {}, "did you mean fopru"),
        ("fopru", {"kep": 1}, "no setting 'kep'; it has keep, strategy"),
        ("dense", {"keep": 1}, "it has none"),
        (made, {"keep": 1}, "not with an instance"),
    ):
        with pytest.raises(InputError, match=message):
            build(method, settings)
    assert method_class("aim").card.slug == "aim"
    assert did_you_mean("zzzz", ["a", "b"]) == "there are a, b"


def test_budget_of_a_plain_method_is_its_keep() -> None:
    host = HostShape("hf-vlm", (), 24, 22, 1, (24, 24), 32)
    made = method_class("fopru").for_budget(0.3, host)
    assert made.hyperparameters()["keep"] == 0.3
    with pytest.raises(InputError, match="budget"):
        method_class("fopru").for_budget(1.5, host)


def test_configured() -> None:
    known = {"small": {"width": 8, "options": {"depth": 2, "heads": 1}}, "plain": {"width": 4}}
    assert configured("plain", known, {"width": 5}) == {"width": 5}
    changed = configured("small", known, {"options": {"heads": 4}})
    assert changed == {"width": 8, "options": {"depth": 2, "heads": 4}}
    assert known["small"]["options"] == {"depth": 2, "heads": 1}
    assert configured("plain", known, {"options": {"depth": 3}}) == {"width": 4, "options": {"depth": 3}}
    with pytest.raises(InputError, match="no configuration 'smal'; did you mean small"):
        configured("smal", known, {})
