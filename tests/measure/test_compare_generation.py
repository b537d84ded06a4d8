"""Comparisons of generators, tiny and random, against runs of the pipelines and figures counted here."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
pytest.importorskip("torchmetrics")

from foveate.data.scenes import NAMES
from foveate.generate import CausalGenerator, DiffusionGenerator
from foveate.measure.compare_generation import GenerationComparison, compare_generation
from foveate.measure.comparison import TaskRow
from foveate.measure.flops import count_flops
from foveate.measure.generation import FrechetDistance, Judge
from foveate.method import InputError
from foveate.methods.diffuse.t_stitch import TStitch
from foveate.methods.guide.a_star import AStar
from foveate.zoo.ar import PictureGenerator, build_ar, build_tokenizer
from foveate.zoo.vq import build_vq
from tiny_diffusion import sample  # noqa: F401
from tiny_prompted import prompted

PROMPTS = ["a dog", "a fish", "a fox and a dog", "a red frog", "a red one", "a frog"]
ANIMALS = ("dog", "fish", "fox", "frog")
STEPS, SEED = 4, 3


class Tower(nn.Module):
    """Of 8 px pictures: logits of animals, features and tokens are their first values, means of channels, and pixels.

    It knows nothing but animals.
    """

    num_features = 3
    patch_embed = SimpleNamespace(img_size=(8, 8))

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.flatten(1)[:, : len(NAMES)] - 10 * torch.tensor([name not in ANIMALS for name in NAMES])

    def forward_features(self, pictures: Tensor) -> Tensor:
        return pictures

    def forward_head(self, pictures: Tensor, pre_logits: bool) -> Tensor:
        return pictures.mean((2, 3))

    def forward_intermediates(self, pictures: Tensor, indices: list[int], **_: Any) -> list[Tensor]:
        return [pictures.flatten(2).transpose(1, 2)] * len(indices)


def diffusion(**settings: Any) -> DiffusionGenerator:
    return DiffusionGenerator(prompted(), seed=SEED, steps=STEPS, **settings)


def small() -> Any:
    """A pipeline of fewer channels, that reads prompts alike."""
    pipe = prompted(seed=1, block_out_channels=(4, 4))
    pipe.text_encoder.load_state_dict(prompted().text_encoder.state_dict())
    return pipe


def compared(generator: Any, entries: dict[str, Any], **given: Any) -> tuple[GenerationComparison, dict[str, Any]]:
    """And the pictures of rows, by method and budget."""
    shown: dict[str, Any] = {}

    def note(row: TaskRow, pictures: Any) -> None:
        shown[row.label] = [np.asarray(one) for one in pictures]

    given = {"batch_size": 4, "timing_pairs": 2, "judge": Judge(Tower()), **given}
    return compare_generation(generator, PROMPTS, entries, on_row=note, **given), shown


def drawn(pipe: Any, seed: int, **given: Any) -> list[Any]:
    """Pictures of all prompts, one by one."""
    generators = (torch.Generator().manual_seed(1_000_003 * seed + k) for k in range(len(PROMPTS)))
    given = {"num_inference_steps": STEPS, **given}
    return [np.asarray(pipe(p, generator=g, **given).images[0]) for p, g in zip(PROMPTS, generators)]


def test_rows_are_what_the_pipeline_and_a_loop_say() -> None:
    real = torch.rand(20, 3, 8, 8)
    stitched = TStitch(small=small(), ratio=0.5)
    found, shown = compared(diffusion(), {"t-stitch": [stitched]}, real=real)
    pipe = prompted()
    dense, other = drawn(pipe, SEED), drawn(pipe, SEED + 1)
    for made, wanted in ((shown["dense at 1"], dense), (shown["other noise at 1"], other)):
        # Convolutions of a batch round differently than those of one picture.
        assert max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(made, wanted)) <= 1
    rows = {row.label: row for row in found.rows}
    first, again = rows["dense at 1"], rows["other noise at 1"]
    with torch.no_grad():
        costs = [count_flops(lambda n=n: drawn_first(pipe, n)) for n in range(1, STEPS + 1)]
    assert first.flops == costs[-1] and first.flops_ratio == first.time_ratio == 1
    assert first.figures["steps"] == first.figures["calls"] == STEPS
    method = next(row for row in found.rows if row.method == "t-stitch")
    assert (
        method.figures["calls"] == method.figures["small calls"] == STEPS / 2
        and method.flops is not None
        and method.flops < costs[-1]
    )
    assert method.budget == round(method.flops / costs[-1], 2) and method.settings is not None
    assert method.settings["ratio"] == 0.5 and method.time_ratio is not None and method.time_ratio > 0
    # As many steps as come nearest to its FLOPs.
    fewer = next(row for row in found.rows if row.method == "fewer steps")
    wanted = 1 + int(np.argmin([abs(cost - method.flops) for cost in costs]))
    assert fewer.settings == {"num_inference_steps": wanted} and fewer.flops == costs[wanted - 1]
    assert fewer.figures["steps"] == wanted and fewer.baseline and fewer.budget == method.budget

    made = shown["other noise at 1"]
    squares = np.mean([((a / 255.0 - b / 255.0) ** 2).mean() for a, b in zip(made, shown["dense at 1"])])
    assert again.figures["PSNR"] == pytest.approx(-10 * math.log10(squares), abs=1e-4)
    assert "PSNR" not in first.figures and first.figures["apart"] == 0 and again.figures["apart"] == 1

    def apart(label: str) -> float:
        """Squared distance of pixels as unit vectors."""
        found = []
        for a, b in zip(shown[label], shown["dense at 1"]):
            u, v = ((one / 127.5 - 1).reshape(-1, 3) for one in (a, b))
            u, v = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (u, v))
            found.append(((u - v) ** 2).sum(1).mean())
        return float(np.mean(found))

    share = apart(method.label) / apart("other noise at 1")
    assert method.figures["apart"] == pytest.approx(share, abs=1e-4)

    def right(label: str) -> float:
        hits = []
        for prompt, picture in zip(PROMPTS, shown[label]):
            names = {word for word in prompt.split() if word in NAMES}
            if names:
                values = np.moveaxis(picture, 2, 0).ravel()
                seen = {name: int(values[NAMES.index(name)]) for name in ANIMALS}
                others = [value for name, value in seen.items() if name not in names]
                hits.append(names <= set(seen) and min(seen[name] for name in names) > max(others))
        return float(np.mean(hits))

    known = [prompt for prompt in PROMPTS if any(word in NAMES for word in prompt.split())]
    assert 0 < len(known) < len(PROMPTS) and found.judged == len(known)
    for row in found.rows:
        pictures = torch.from_numpy(np.stack(shown[row.label])).permute(0, 3, 1, 2)
        assert row.figures["Fréchet"] == pytest.approx(FrechetDistance(Judge(Tower())).real(real)(pictures), abs=1e-5)
        assert row.figures["right"] == right(row.label)
    assert len({row.figures["right"] for row in found.rows}) > 1


def drawn_first(pipe: Any, steps: int) -> Any:
    return pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), num_inference_steps=steps)


def test_smaller_pictures_cost_what_a_cheap_method_does_and_a_dear_one_gets_more_steps() -> None:
    generator = diffusion(height=24, width=16)
    larger = TStitch(small=prompted(block_out_channels=(12, 24)), ratio=1.0)
    found, shown = compared(generator, {"cheap": [TStitch(small=small(), ratio=1.0)], "dear": [larger]}, batch_size=3)
    by_name = {row.method: row for row in found.rows}
    cheap, dear, plain = by_name["cheap"], by_name["dear"], by_name["lower resolution"]
    assert cheap.flops_ratio is not None and dear.flops_ratio is not None and cheap.flops_ratio < 1 < dear.flops_ratio
    scale = math.sqrt(cheap.flops_ratio)
    assert plain.settings == {"height": 8 * round(3 * scale), "width": 8 * round(2 * scale)}
    assert shown[plain.label][0].shape == (plain.settings["height"], plain.settings["width"], 3)
    assert 0 < plain.figures["apart"] < 3
    more = by_name["more steps"]
    assert more.settings is not None and more.settings["num_inference_steps"] > STEPS
    # The settings of the generator itself are as they were.
    assert generator.settings == {"num_inference_steps": STEPS, "height": 24, "width": 16}
    assert found.rows[0].method == "dense" and [row.baseline for row in found.rows] == [True] * 5 + [False] * 2


def test_what_does_not_fit() -> None:
    strict = {"strict": [AStar(words=("dog",))]}
    with pytest.raises(InputError, match="strict: words: 'dog' is not in the prompt"):
        compare_generation(diffusion(), ["a cat"], strict, judge=Judge(Tower()))
    found = compare_generation(
        diffusion(), ["a cat"], strict, judge=Judge(Tower()), refusable=True, refused={"ras": "no such layer"}
    )  # fmt: skip
    assert [(row.method, row.refused) for row in found.rows[2:]] == [
        ("strict", "words: 'dog' is not in the prompt 'a cat', or behind what the text encoder reads of it"),
        ("ras", "no such layer"),
    ]
    assert found.choice is None and "nothing measured needs fewer FLOPs" in found.why
    assert GenerationComparison.from_json(found.to_json()) == found
    with pytest.raises(InputError, match="no prompts"):
        compare_generation(diffusion(), [], {})
    with pytest.raises(InputError, match="timing_pairs must be at least 1, not 0"):
        compare_generation(diffusion(), ["a cat"], {}, timing_pairs=0)


def test_without_names_the_nearest_to_dense_is_chosen() -> None:
    prompts = ["x y", "z"]
    entries = {"t-stitch": [TStitch(small=small(), ratio=0.5)]}
    found = compare_generation(diffusion(), prompts, entries, judge=Judge(Tower()), timing_pairs=1)
    assert all("right" not in row.figures and "Fréchet" not in row.figures for row in found.rows)
    cheaper = [row for row in found.rows if (row.flops_ratio or 2) < 1]
    near = [row for row in cheaper if row.figures["apart"] <= 0.1]
    assert found.choice in (near or cheaper) and "of the way to other noise" in found.why


def causal(layers: int, seed: int = 0) -> PictureGenerator:
    torch.manual_seed(seed)
    words, vq = build_tokenizer(["a", "cat", "dog", "and"]), build_vq(width=8, codes=16, pitch=8)
    model = build_ar(words, vq, grid=(4, 4), layers=layers, width=16, heads=2)
    return PictureGenerator(model, words, vq)


def test_autoregressive_models_are_compared_by_time() -> None:
    generator = CausalGenerator(causal(2), small=causal(1, seed=1), seed=SEED)
    entries = {slug: generator.build(slug) for slug in ("sjd", "lantern")}
    found, shown = compared(generator, entries)
    assert [row.method for row in found.rows] == ["dense", "other noise", "plain speculative", "sjd", "lantern"]
    dense, _, plain, sjd, _ = found.rows
    assert dense.figures["steps"] == dense.figures["calls"] == 16 and found.task.cost == "time"
    assert plain.settings is not None and plain.settings["delta"] == 0 and plain.baseline
    assert 1 < sjd.figures["calls"] <= 16 and 1 < plain.figures["calls"] <= 16 < 16 + plain.figures["small calls"]
    assert "small calls" not in sjd.figures
    assert all("PSNR" not in row.figures and "apart" not in row.figures for row in found.rows)
    fastest = min(found.rows[2:], key=lambda row: row.time_ratio or math.inf)
    assert (found.choice is None) == ((fastest.time_ratio or 2) >= 1)
    # A batch of four prompts, drawn with the first one's seed.
    torch.manual_seed(1_000_003 * SEED)
    model: Any = generator.generator.model
    with torch.no_grad():
        ids = model.generate(**generator.generator.prompts(PROMPTS[:4]))
    pictures = generator.generator.pictures(ids).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.stack(shown["dense at 1"][:4]) / 255 - pictures).max() <= 1 / 255
    alone = CausalGenerator(causal(2))
    found = compare_generation(alone, ["and"], {}, judge=Judge(Tower()), timing_pairs=1)
    assert [row.method for row in found.rows] == ["dense", "other noise"] and "look at the pictures" in found.why
