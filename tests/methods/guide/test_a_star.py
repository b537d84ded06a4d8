"""A-STAR against loops over cells, and against a sampler written out here."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import foveate
from foveate.method import InputError
from foveate.methods.guide.a_star import (
    AStar,
    binary_masks,
    nouns,
    retention_loss,
    segregation_loss,
    smoothed,
    token_positions,
)
from tiny_diffusion import pipeline
from tiny_prompted import prompted, tokenizer

PROMPT = "a cat and a frog"
CAT, FROG = (2, 3, 4), (9,)
"""Where their tokens are: start, a, c, a, t, a, n, d, a, frog."""
GUIDANCE, STEPS = 5.0, 3
STRONG = {"scale": 2000.0}
"""Random weights have nearly even maps, and small gradients."""


def sample(pipe: Any, prompt: str | list[str] | None = PROMPT, **given: Any) -> Tensor:
    """(pictures, 4, h, w) latents that a run ends with; every picture has the same first noise."""
    size = {"height": 16, "width": 16} | {name: given.pop(name) for name in ("height", "width") if name in given}
    count = (len(prompt) if isinstance(prompt, list) else 1) * given.get("num_images_per_prompt", 1)
    first = torch.randn(1, 4, size["height"], size["width"], generator=torch.Generator().manual_seed(5))
    settings = {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, "output_type": "latent", **size}
    images: Tensor = pipe(prompt, latents=first.repeat(count, 1, 1, 1), **{**settings, **given}).images
    return images


def farthest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def runs(pipe: Any, method: AStar, **given: Any) -> list[int]:
    """The batch of each run of the UNet."""
    seen: list[int] = []
    handle = pipe.unet.conv_in.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    with foveate.apply(pipe, method):
        sample(pipe, **given)
    handle.remove()
    return seen


# -- losses


def halves_of_dice(one: Tensor, other: Tensor) -> float:
    shared = total = 0.0
    for a, b in zip(one.flatten().tolist(), other.flatten().tolist()):
        shared += min(a, b)
        total += a + b
    return shared / total


def test_losses_are_the_papers() -> None:
    maps, masks = torch.rand(4, 5, 7), (torch.rand(4, 5, 7) > 0.6).float()
    wanted = sum(halves_of_dice(maps[m], maps[n]) for m in range(4) for n in range(m))
    assert float(segregation_loss(maps)) == pytest.approx(wanted, rel=1e-5)
    wanted = sum(1 - halves_of_dice(maps[m], masks[m]) for m in range(4))
    assert float(retention_loss(maps, masks)) == pytest.approx(wanted, rel=1e-5)
    both = AStar(segregation=0.5, retention=3.0).loss(maps, masks)
    assert float(both) == pytest.approx(0.5 * float(segregation_loss(maps)) + 3 * wanted, rel=1e-5)
    assert float(AStar().loss(maps, None)) == float(segregation_loss(maps))


def test_bounds_and_symmetries() -> None:
    left = torch.zeros(1, 4, 6)
    left[..., :3] = torch.rand(4, 3)
    right = left.flip(-1)
    assert float(segregation_loss(torch.cat((left, right)))) == 0
    assert float(segregation_loss(torch.cat((left, left)))) == 0.5
    assert float(retention_loss(left, right)) == 1 and float(retention_loss(left, left)) == 0.5
    assert float(segregation_loss(left)) == 0
    for words in (2, 3, 5):
        maps, masks = torch.rand(words, 4, 6), (torch.rand(words, 4, 6) > 0.5).float()
        loss = float(segregation_loss(maps))
        assert 0 < loss <= words * (words - 1) / 4
        assert float(segregation_loss(maps.flip(0))) == pytest.approx(loss)
        assert float(segregation_loss(maps * 0.01)) == pytest.approx(loss)
        kept = float(retention_loss(maps, masks))
        assert words / 2 <= kept <= words and abs(float(retention_loss(maps * 0.01, masks)) - kept) > 0.1


def test_gradient_reaches_the_smaller_map_only_and_never_the_mask() -> None:
    maps = torch.tensor([[[0.2]], [[0.6]]], requires_grad=True)
    segregation_loss(maps).backward()
    # a / (a + b) with a < b: b / (a + b)^2 and -a / (a + b)^2.
    assert maps.grad is not None
    assert maps.grad.flatten().tolist() == pytest.approx([0.6 / 0.64, -0.2 / 0.64])
    masks = binary_masks(torch.rand(2, 4, 4, requires_grad=True), 0.5)
    assert not masks.requires_grad


def test_empty_masks_and_maps_are_no_numbers_to_divide_by() -> None:
    for maps in (torch.rand(1, 3, 3), torch.zeros(1, 3, 3)):
        maps.requires_grad_()
        loss = retention_loss(maps, torch.zeros(1, 3, 3))
        loss.backward()
        assert float(loss.detach()) == 1 and torch.equal(maps.grad, torch.zeros(1, 3, 3))  # type: ignore[arg-type]
    nothing = torch.zeros(2, 3, 3, requires_grad=True)
    segregation_loss(nothing).backward()
    assert torch.equal(nothing.grad, torch.zeros(2, 3, 3))  # type: ignore[arg-type]


def test_masks_are_of_high_values() -> None:
    maps = torch.tensor([[[0.1, 0.2, 0.31, 0.5]], [[0.3, 0.3, 0.3, 0.3]]])
    # On the scale from 0.1 to 0.5: 0, 0.25, 0.525, 1. A map without highs has none.
    assert binary_masks(maps, 0.5).tolist() == [[[0, 0, 1, 1]], [[0, 0, 0, 0]]]
    assert binary_masks(maps, 0.2).tolist()[0] == [[0, 1, 1, 1]]


def gaussian(maps: Tensor, sigma: float) -> Tensor:
    line = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * sigma**2))
    kernel = torch.outer(line, line) / torch.outer(line, line).sum()
    padded = F.pad(maps[:, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel[None, None])[:, 0]


def test_smoothing_is_a_gaussian() -> None:
    maps = torch.rand(2, 5, 6)
    torch.testing.assert_close(smoothed(maps, 0.5), gaussian(maps, 0.5))


# -- the sampler


class Watching:
    """An attention processor in plain matrix products that keeps the cross-attention of (rows, columns) maps."""

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid
        self.maps: list[Tensor] = []

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query, key, value = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        if encoder_hidden_states is not None and weights.shape[2] == self.grid[0] * self.grid[1]:
            self.maps.append(weights)
        return attn.to_out[0]((weights @ value).transpose(1, 2).flatten(2))


def reference(
    pipe: Any, settings: dict[str, Any], words: tuple[tuple[int, ...], ...], size: tuple[int, int],
    prompt: str = PROMPT, grid: tuple[int, int] | None = None,
) -> tuple[Tensor, list[dict[str, Any]]]:  # fmt: skip
    """The latents that guided sampling of one picture ends with, and what each step saw."""
    pipe = copy.deepcopy(pipe)
    grid = grid or size
    watching = Watching(grid)
    pipe.unet.set_attn_processor(watching)
    pipe.unet.requires_grad_(False)
    with torch.no_grad():
        conditional, unconditional = pipe.encode_prompt(prompt, "cpu", 1, True)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS)
    z = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(5)) * scheduler.init_noise_sigma
    masks: Tensor | None = None
    if settings.get("masks") is not None:
        layout = torch.as_tensor(settings["masks"]).float()
        masks = (F.adaptive_avg_pool2d(layout, grid) >= 0.5).float()
    seen: list[dict[str, Any]] = []

    def maps() -> Tensor:
        mean = torch.stack([one[-1].mean(0) for one in watching.maps]).mean(0)
        made = torch.stack([mean[:, list(word)].mean(1).view(grid) for word in words])
        if settings.get("smoothing"):
            made = gaussian(made, settings["smoothing"])
        return made / made.amax((1, 2), keepdim=True) if settings.get("normalise") == "maximum" else made

    for i, t in enumerate(scheduler.timesteps):
        watching.maps.clear()
        z.requires_grad_()
        pipe.unet(scheduler.scale_model_input(z, t), t, conditional)
        made = maps()
        pairs = itertools.combinations(range(len(words)), 2)
        loss = z.sum() * 0
        for m, n in pairs:
            loss = loss + torch.minimum(made[m], made[n]).sum() / (made[m] + made[n]).sum()
        if masks is not None:
            for m in range(len(words)):
                term = 1 - torch.minimum(made[m], masks[m]).sum() / (made[m] + masks[m]).sum()
                loss = loss + settings.get("retention", 1.0) * term
        alpha = settings["scale"] * (1 - 0.5 * i / (STEPS - 1)) ** 0.5
        (gradient,) = torch.autograd.grad(loss, z)
        if i >= settings.get("steps", STEPS):
            gradient = gradient * 0
        with torch.no_grad():
            z = z - alpha * gradient
            watching.maps.clear()
            scaled = scheduler.scale_model_input(z, t)
            plain, wanted = pipe.unet(torch.cat((scaled, scaled)), t, torch.cat((unconditional, conditional)))[0].chunk(
                2
            )
            after = maps()
            if settings.get("masks") is None:
                low, high = after.amin((1, 2), keepdim=True), after.amax((1, 2), keepdim=True)
                masks = ((after - low) / (high - low) > settings.get("threshold", 0.5)).float()
            z = scheduler.step(plain + GUIDANCE * (wanted - plain), t, z).prev_sample
        seen.append({"loss": float(loss.detach()), "maps": after, "masks": masks})
    return z, seen


LAYOUT = [[[1] * 4 + [0] * 4] * 8, [[0] * 4 + [1] * 4] * 8]


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        (diffusers.DDIMScheduler, {}),
        (diffusers.EulerDiscreteScheduler, {"scale": 5e5}),
        (diffusers.DDIMScheduler, {"smoothing": 0.5, "normalise": "maximum", "threshold": 0.4}),
        (diffusers.DDIMScheduler, {"masks": LAYOUT, "retention": 2.0}),
        (diffusers.DDIMScheduler, {"steps": 2}),
    ],
    ids=["ddim", "euler", "smoothed", "layout", "first-steps"],
)
def test_a_run_is_the_papers(scheduler: Any, settings: dict[str, Any]) -> None:
    pipe = prompted(scheduler)
    settings = STRONG | settings
    dense = sample(pipe)
    with foveate.apply(pipe, AStar(words=("cat", "frog"), **settings)):
        ours = sample(pipe)
    wanted, _ = reference(pipe, settings, (CAT, FROG), (16, 16))
    assert farthest(wanted, dense) > 0.02 * float(wanted.abs().max())
    assert farthest(ours, wanted) < 0.01 * farthest(wanted, dense)


@pytest.mark.parametrize(
    ("size", "resolution", "grid"),
    [((16, 24), 16, (16, 24)), ((32, 32), 16, (16, 16)), ((24, 16), 8, (12, 8)), ((8, 8), 16, (8, 8))],
)
def test_which_maps_are_read(size: tuple[int, int], resolution: int, grid: tuple[int, int]) -> None:
    pipe = prompted()
    height, width = size
    dense = sample(pipe, height=height, width=width)
    with foveate.apply(pipe, AStar(words=("cat", "frog"), resolution=resolution, **STRONG)):
        ours = sample(pipe, height=height, width=width)
    wanted, _ = reference(pipe, STRONG, (CAT, FROG), size, grid=grid)
    assert farthest(ours, wanted) < 0.01 * farthest(wanted, dense)


def test_a_small_step_lowers_the_loss() -> None:
    _, seen = reference(prompted(), {"scale": 20.0}, (CAT, FROG), (16, 16))
    for before, step in zip([None, *seen], seen):
        assert float(AStar().loss(step["maps"], before and before["masks"])) < step["loss"]


def test_overlap_falls_and_places_are_kept() -> None:
    pipe = prompted()
    _, dense = reference(pipe, {"scale": 0.0}, (CAT, FROG), (16, 16))
    _, guided = reference(pipe, {"scale": 200.0}, (CAT, FROG), (16, 16))
    assert all(float(segregation_loss(b["maps"])) < float(segregation_loss(a["maps"])) for a, b in zip(dense, guided))

    def kept(run: list[dict[str, Any]]) -> float:
        """The share of its attention that a word has at the end where it was high at first."""
        return float(((run[-1]["maps"] * run[0]["masks"]).sum((1, 2)) / run[-1]["maps"].sum((1, 2))).mean())

    assert kept(guided) > kept(dense)


def test_what_changes_nothing() -> None:
    pipe = prompted()
    dense = sample(pipe)
    for method in (AStar(scale=0.0), AStar(words=()), AStar(steps=0), AStar(segregation=0.0, retention=0.0)):
        with foveate.apply(pipe, method):
            assert torch.equal(sample(pipe), dense)
    with foveate.apply(pipe, AStar(words=("cat", "frog"), scale=1e-9)):
        torch.testing.assert_close(sample(pipe), dense, atol=1e-6, rtol=1e-6)
    with foveate.apply(pipe, AStar()):
        assert not torch.equal(sample(pipe), dense)
    assert torch.equal(sample(pipe), dense)


def test_one_conditional_run_a_step_and_weights_without_gradients() -> None:
    pipe = prompted()
    assert runs(pipe, AStar(words=("cat", "frog"))) == [1, 2] * STEPS
    assert runs(pipe, AStar(words=("cat", "frog"), steps=1)) == [1, 2, 2, 2]
    # Nothing to keep apart, and at first nothing to retain: unless a layout is given.
    assert runs(pipe, AStar(words=("cat",))) == [2] + [1, 2] * (STEPS - 1)
    assert runs(pipe, AStar(words=("cat",), masks=LAYOUT[:1])) == [1, 2] * STEPS
    assert runs(pipe, AStar(words=("cat", "frog"), segregation=0.0)) == [2] + [1, 2] * (STEPS - 1)
    assert runs(pipe, AStar(words=("cat", "frog")), guidance_scale=1.0) == [1, 1] * STEPS
    assert all(weight.grad is None and weight.requires_grad for weight in pipe.unet.parameters())


def test_masks_are_the_runs_own() -> None:
    pipe = prompted()
    with foveate.apply(pipe, AStar(words=("cat", "frog"), **STRONG)):
        first = sample(pipe)
        assert torch.equal(sample(pipe), first)


def test_pictures_do_not_depend_on_each_other() -> None:
    pipe = prompted()
    prompts = [PROMPT, "a red frog", "a cat"]
    with foveate.apply(pipe, AStar(**STRONG)):
        alone = [sample(pipe, prompt) for prompt in prompts]
        together = sample(pipe, prompts)
        twice = sample(pipe, prompts[:2], num_images_per_prompt=2)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(twice, torch.cat(alone[:2]).repeat_interleave(2, 0), rtol=1e-3, atol=1e-3)


def test_half_precision() -> None:
    pipe = prompted().to(torch.bfloat16)
    with foveate.apply(pipe, AStar(words=("cat", "frog"))):
        pictures = pipe(PROMPT, height=16, width=16, num_inference_steps=2, output_type="latent").images
    assert pictures.dtype == torch.bfloat16 and bool(pictures.isfinite().all())


# -- words


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a cat and a frog", ["cat", "frog"]),
        ("A red car, a Blue bird.", ["car", "bird"]),
        ("a dog at the top left , an apple at the center .", ["dog", "apple"]),
        ("two t-shirts with a t-shirt and a t-shirt", ["t-shirts", "t-shirt"]),
        ("", []),
    ],
)
def test_guessed_nouns(prompt: str, found: list[str]) -> None:
    assert nouns(prompt) == found


def test_places_of_words() -> None:
    words = tokenizer()
    assert token_positions(words, PROMPT, "cat") == CAT and token_positions(words, PROMPT, "frog") == FROG
    assert token_positions(words, PROMPT, "a frog") == (8, 9)
    assert token_positions(words, PROMPT, "dog") == () == token_positions(words, "a very very very long frog", "frog")


def test_words_and_positions_are_the_same() -> None:
    pipe = prompted()
    results = []
    for words in (None, ("cat", "frog"), (CAT, 9)):
        with foveate.apply(pipe, AStar(words=words, **STRONG)):
            results.append(sample(pipe))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    embeddings = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt(PROMPT, "cpu", 1, True)))
    with foveate.apply(pipe, AStar(words=(CAT, 9), **STRONG)):
        assert torch.equal(sample(pipe, None, **embeddings), results[0])


def test_what_cannot_be() -> None:
    pipe = prompted()
    given = {"prompt_embeds": torch.randn(1, 7, 16), "negative_prompt_embeds": torch.randn(1, 7, 16)}
    for words, message in ((None, "give words as positions"), ((7,), "no position 7; the prompt has 7")):
        with foveate.apply(pipe, AStar(words=words)), pytest.raises(InputError, match=message):
            sample(pipe, None, **given)
    with (
        foveate.apply(pipe, AStar(masks=LAYOUT[:1])),
        pytest.raises(InputError, match="masks: 1 for the 2 words of"),
    ):
        sample(pipe)
    for word in ("dog", "long"):
        with (
            foveate.apply(pipe, AStar(words=(word,))),
            pytest.raises(InputError, match=f"'{word}' is not in the prompt"),
        ):
            sample(pipe, "a very very very very long frog")
    # A guess that is not read is none.
    assert runs(pipe, AStar(), prompt="a very very very very long frog") == [2] * STEPS
    with foveate.apply(pipe, AStar()), torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        sample(pipe)
    for name in ("dit", "sd3", "lumina"):
        with pytest.raises(InputError, match="reads cross-attention to the prompt"):
            foveate.apply(pipeline(name), AStar())
    for name, value in (("words", "cat"), ("words", (-1,)), ("words", ((),)), ("masks", [[0, 1]]), ("masks", [[[2]]])):
        with pytest.raises(InputError, match=name):
            AStar(**{name: value})
    with pytest.raises(InputError, match="masks: one for each of the 1 words"):
        AStar(words=("cat",), masks=LAYOUT)
    with pytest.raises(InputError, match="its budget is 1"):
        AStar.for_budget(0.5, foveate.apply(prompted(), AStar()).host.shape)
