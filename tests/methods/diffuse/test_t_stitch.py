"""T-Stitch on real tiny pipelines: bits, counts and boundaries against rules written here with exact fractions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import foveate
from foveate.method import HostShape, InputError
from foveate.methods.diffuse.t_stitch import RULES, TStitch, allocations
from tiny_diffusion import denoiser, embedding, noise, pipeline, sample

SMALL: dict[str, dict[str, Any]] = {
    "sd": {"block_out_channels": (4, 8)}, "sd3": {"num_layers": 1}, "pixart": {"num_layers": 1},
    "dit": {"num_layers": 1}, "lumina": {"num_layers": 1}, "lumina2": {"num_layers": 1},
}  # fmt: skip
each = pytest.mark.parametrize("name", SMALL)


def small_pipeline(name: str, **config: Any) -> Any:
    return pipeline(name, seed=3, **SMALL[name], **config)


@contextmanager
def counted(*models: nn.Module) -> Iterator[list[int]]:
    """Which of the models was called, in order. Hooks on their patch or pixel embedding: the forward is replaced."""
    calls: list[int] = []

    def note(number: int) -> Any:
        return lambda *_: calls.append(number)

    first = [next(iter(model.children())) for model in models]
    handles = [part.register_forward_hook(note(number)) for number, part in enumerate(first)]
    yield calls
    for handle in handles:
        handle.remove()


# -- the boundaries


def by_hand(rule: str, shares: list[Fraction], step: int, steps: int, t: Fraction) -> int:
    """The model of a step, straight from the rules of paper and code, in exact numbers."""
    for number in range(len(shares)):
        if shares[number] == 0:
            continue
        until = sum(shares[: number + 1], Fraction(0))
        if until == 1:
            return number
        runs = {
            "paper": step < math.floor(until * steps + Fraction(1, 2)),
            "dit": t >= 1 - until,
            "ldm": t > 1 - until,
            "sd": Fraction(step + 1, steps) <= until,
            "lcm": step < math.floor(until * steps) + 1,
        }
        if runs[rule]:
            return number
    raise AssertionError


SPACINGS = {
    "leading": lambda n: [1000 // n * i for i in range(n)][::-1],
    "trailing": lambda n: [1000 - 1 - 1000 * i // n for i in range(n)],
    "ends": lambda n: [round(999 * i / (n - 1)) for i in range(n)][::-1],
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_steps_of_each_model_are_the_rules(rule: str, spacing: str) -> None:
    """In tenths there is no pair of numbers at which floats could decide otherwise than fractions do."""
    for steps in (10, 20, 50, 100, 250):
        timesteps = SPACINGS[spacing](steps)
        for shares in [(a, 10 - a) for a in range(11)] + [(2, 0, 8), (1, 2, 7), (0, 3, 7), (3, 7, 0), (10, 0, 0)]:
            exact = [Fraction(share, 10) for share in shares]
            expected = [by_hand(rule, exact, i, steps, Fraction(t, 1000)) for i, t in enumerate(timesteps)]
            ratio = shares[0] / 10 if len(shares) == 2 else [share / 10 for share in shares]
            plan = TStitch(ratio=ratio, rule=rule).plan(timesteps)
            assert plan == expected and plan == sorted(plan)
            if rule in ("paper", "sd") or (rule == "dit" and len(shares) == 2):
                assert [plan.count(k) * 10 for k in range(len(shares))] == [share * steps for share in shares]


def test_where_the_rules_differ() -> None:
    timesteps = SPACINGS["leading"](10)
    counts = {rule: TStitch(ratio=0.4, rule=rule).plan(timesteps).count(0) for rule in RULES}
    # 600 of 1000 is on the boundary; the release's LCM sampler makes one step more.
    assert counts == {"paper": 4, "dit": 4, "ldm": 3, "sd": 4, "lcm": 5}
    # Four steps of a sampler whose timesteps are spaced by another rule than its steps.
    late = [999, 966, 933, 0]
    assert [TStitch(ratio=0.5, rule=rule).plan(late).count(0) for rule in ("paper", "dit")] == [2, 3]


def test_a_flow_that_begins_with_pure_noise_can_do_without_a_small_model() -> None:
    for rule in RULES:
        assert TStitch(ratio=0.0, rule=rule).plan([1000.0, 500.0]) == [1, 1]
        assert TStitch(ratio=1.0, rule=rule).plan([1000.0, 0.0]) == [0, 0]


def test_no_smaller_model_comes_back_where_a_sampler_goes_back_in_time() -> None:
    assert TStitch(ratio=0.5, rule="dit").plan([900, 400, 600, 300]) == [0, 1, 1, 1]


# -- at work


@each
def test_the_ends_are_the_models_alone(name: str) -> None:
    large, small = pipeline(name), small_pipeline(name)
    small.vae = large.vae
    alone = [sample(name, pipe) for pipe in (large, small)]
    assert not torch.equal(*alone)
    for ratio, expected in ((0.0, alone[0]), (1.0, alone[1])):
        for given in (denoiser(small), small):
            with foveate.apply(large, "t-stitch", small=given, ratio=ratio):
                assert torch.equal(sample(name, large), expected)
    assert torch.equal(sample(name, large), alone[0])


@each
def test_the_switch_is_a_change_of_models_between_two_steps(name: str) -> None:
    large, small = pipeline(name), denoiser(small_pipeline(name))
    # Lumina2 guides by a second call.
    each_step = 2 if name == "lumina2" else 1
    with foveate.apply(large, TStitch(small=small, ratio=0.5)), counted(small, denoiser(large)) as calls:
        stitched = sample(name, large, steps=4)
    assert calls == [0] * 2 * each_step + [1] * 2 * each_step

    # The same by hand: another model is in the pipeline's place during the first steps.
    own, step = denoiser(large), 0
    forward = own.forward

    def either(*args: Any, **kwargs: Any) -> Any:
        nonlocal step
        step += 1
        return (small.forward if step <= 2 * each_step else forward)(*args, **kwargs)

    own.forward = either
    assert torch.equal(sample(name, large, steps=4), stitched)


def test_equal_models_make_the_ratio_irrelevant() -> None:
    large, twin = pipeline("sd"), pipeline("sd").unet
    dense = sample("sd", large, steps=4)
    for ratio in (0.25, 0.6):
        with foveate.apply(large, TStitch(small=twin, ratio=ratio)), counted(twin) as calls:
            assert torch.equal(sample("sd", large, steps=4), dense)
        assert len(calls) == round(4 * ratio)


def test_three_models_in_turn() -> None:
    large = pipeline("dit", num_layers=3)
    models = [pipeline("dit", seed=seed, num_layers=seed).transformer for seed in (1, 2)] + [large.transformer]
    for shares in ((0.2, 0.2, 0.6), (0.0, 0.4, 0.6), (0.2, 0.8, 0.0)):
        expected = [k for k, share in enumerate(shares) for _ in range(round(5 * share))]
        for rule in ("paper", "dit", "sd"):
            method = TStitch(small=models[:2], ratio=shares, rule=rule)
            with foveate.apply(large, method), counted(*models) as calls:
                sample("dit", large, steps=5)
            assert calls == expected


@pytest.mark.parametrize("scheduler", ("DDIMScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler"))
def test_samplers_take_the_same_random_numbers(scheduler: str) -> None:
    large, small = pipeline("sd", getattr(diffusers, scheduler)), denoiser(small_pipeline("sd"))
    given = {"eta": 1.0} if scheduler == "DDIMScheduler" else {}
    left = []
    for ratio in (0.0, 0.5, 1.0):
        generator = torch.Generator().manual_seed(0)
        with foveate.apply(large, TStitch(small=small, ratio=ratio)):
            sample("sd", large, steps=4, **given | {"generator": generator})
        left.append(generator.get_state())
    start = torch.Generator().manual_seed(0).get_state()
    assert torch.equal(left[0], left[1]) and torch.equal(left[0], left[2]) and not torch.equal(left[0], start)


def test_what_starts_from_a_picture_is_already_behind_the_small_steps() -> None:
    parts = {**pipeline("sd").components, "requires_safety_checker": False}
    large, small = diffusers.StableDiffusionImg2ImgPipeline(**parts), denoiser(small_pipeline("sd"))
    large.set_progress_bar_config(disable=True)
    for strength, expected in ((0.6, [0] * 2 + [1] * 4), (0.3, [1] * 3)):
        with foveate.apply(large, TStitch(small=small, ratio=0.6)), counted(small, large.unet) as calls:
            large(
                prompt_embeds=embedding("sd", 1, 1), negative_prompt_embeds=embedding("sd", 1, 2),
                image=noise(large, 1), strength=strength, num_inference_steps=10, output_type="latent",
            )  # fmt: skip
        assert calls == expected


def test_a_control_net_runs_for_both_models() -> None:
    parts = pipeline("sd").components
    control = diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4,))
    large = diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False)
    large.set_progress_bar_config(disable=True)
    small = pipeline("sd", seed=3).unet
    with foveate.apply(large, TStitch(small=small, ratio=0.5)), counted(control, small, large.unet) as calls:
        sample("sd", large, steps=4, image=torch.rand(1, 3, 8, 8))
    assert calls == [0, 1, 0, 1, 0, 2, 0, 2]


def test_a_small_model_with_conditions_of_its_own() -> None:
    """LDM's small model has a narrower embedding of the class."""
    large, small = pipeline("sd"), small_pipeline("sd", cross_attention_dim=8)
    wide = {"prompt_embeds": embedding("sd", 1, 1), "negative_prompt_embeds": embedding("sd", 1, 2)}
    narrow = {key: value[..., :8] for key, value in wide.items()}
    alone = sample("sd", small, **narrow)
    own = {"encoder_hidden_states": torch.cat([narrow["negative_prompt_embeds"], narrow["prompt_embeds"]])}
    with foveate.apply(large, TStitch(small=small, ratio=1.0, arguments=[own])):
        assert torch.equal(sample("sd", large, **wide), alone)


# -- budgets


def test_all_allocations_within_a_budget() -> None:
    costs = (1.6, 4.0, 16.5)
    found = allocations(costs)
    assert len(found) == len({fractions for fractions, _ in found}) == math.comb(12, 2)
    for fractions, cost in found:
        assert math.isclose(sum(fractions), 1) and math.isclose(cost, sum(f * c for f, c in zip(fractions, costs)))
        assert math.isclose(TStitch(ratio=fractions).cost(costs), cost)
    assert [cost for _, cost in found] == sorted((cost for _, cost in found), reverse=True)
    under = allocations(costs, 10.0)
    assert under == [one for one in found if one[1] <= 10.0] and under[0][1] > 9
    assert len(allocations((1, 2), parts=4)) == 5


def test_cost_is_linear_in_the_ratio() -> None:
    costs = [TStitch(ratio=tenth / 10).cost((6.06, 118.62)) for tenth in range(11)]
    assert all(math.isclose(a - b, 11.256) for a, b in pairwise(costs))
    assert round(costs[0] / costs[4], 2) == 1.61 and round(costs[0] / costs[5], 2) == 1.90


# -- what does not go together


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"ratio": (0.2, 0.7)}, "sum to 1"),
        ({"ratio": (0.2, 0.3, 0.5)}, "shares of 3 models; there are 2"),
        ({"ratio": (0.5, 0.5 + 2e-6)}, "sum to 1"),
        ({"arguments": ({}, {})}, "arguments has 2 dicts; there are 1"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TStitch(small=denoiser(pipeline("dit")), **settings)


def test_fractions_are_exact_to_a_millionth() -> None:
    assert TStitch(ratio=(0.1,) * 9 + (0.1 + 5e-7,)).fractions[9] > 0.1


def test_it_needs_a_small_model() -> None:
    for ratio in (0.4, (0.0, 0.4, 0.6)):
        with pytest.raises(InputError, match="small="):
            foveate.apply(pipeline("sd"), "t-stitch", ratio=ratio)
    with pytest.raises(InputError, match="give small and ratio"):
        TStitch.for_budget(0.5, HostShape("diffusers", (), 0, -1, 0, (4, 4)))


def flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


@pytest.mark.parametrize(
    "name, other, message",
    [
        ("sd", lambda: pipeline("sd", in_channels=5), "in_channels 5"),
        ("sd", lambda: pipeline("sd", out_channels=8), "out_channels 8"),
        ("sd", lambda: pipeline("sd", cross_attention_dim=8), "cross_attention_dim 8"),
        ("sd", lambda: pipeline("pixart", out_channels=4), "does not take the pipeline's arguments"),
        ("sd", lambda: pipeline("sd").to(torch.bfloat16), "bfloat16"),
        ("sd", lambda: pipeline("sd", lambda: diffusers.DDIMScheduler(beta_end=0.012)), "another noise schedule"),
        ("sd", lambda: pipeline("sd", lambda: diffusers.DDIMScheduler(prediction_type="v_prediction")), "v_prediction"),
        ("sd", lambda: pipeline("sd", flow), "prediction_type None"),
        ("sd3", lambda: pipeline("sd3", lambda: flow(num_train_timesteps=500)), "num_train_timesteps 500"),
        ("lumina", lambda: pipeline("lumina", hidden_size=64), "heads of 32 channels, the pipeline's denoiser of 16"),
    ],
)
def test_models_that_do_not_go_together(name: str, other: Any, message: str) -> None:
    large = pipeline(name)
    with foveate.apply(large, TStitch(small=other())), pytest.raises(InputError, match=message):
        sample(name, large)


def test_a_model_of_another_latent_size() -> None:
    class Halving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(
            self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: None,
            cross_attention_kwargs: None, added_cond_kwargs: None, return_dict: bool,
        ) -> tuple[Tensor]:  # fmt: skip
            return (sample[..., ::2],)

    large = pipeline("sd")
    with foveate.apply(large, TStitch(small=Halving())), pytest.raises(InputError, match=r"makes \(2, 4, 8, 4\)"):
        sample("sd", large)
