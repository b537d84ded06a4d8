"""How generated pictures are judged, against cases counted by hand, slow loops and closed forms."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from torch import Tensor, nn

pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

from foveate.data.scenes import NAMES, CaptionedScenes, caption, stacked
from foveate.measure.generation import (
    FrechetDistance,
    Judge,
    Perceptual,
    Reconstruction,
    adherence,
    generator_scores,
    named,
)
from foveate.method import InputError


class Reader(nn.Module):
    """A tower of 8 px pictures: name k's logit, and feature k for k < 3, are the means of the parts below."""

    num_features = 3
    patch_embed = SimpleNamespace(img_size=(8, 8))

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.flatten(1)[:, : len(NAMES)]

    def forward_features(self, pictures: Tensor) -> Tensor:
        return pictures

    def forward_head(self, pictures: Tensor, pre_logits: bool) -> Tensor:
        assert pre_logits
        return pictures.mean((2, 3))


def saying(*rankings: tuple[str, ...]) -> Tensor:
    """Pictures in which `Reader` ranks these names first, in this order."""
    pictures = torch.zeros(len(rankings), 3 * 8 * 8)
    for picture, names in zip(pictures, rankings):
        for rank, name in enumerate(names):
            picture[NAMES.index(name)] = 1 - 0.1 * rank
    return pictures.view(-1, 3, 8, 8)


def test_names_of_captions() -> None:
    assert named("a dog") == ("dog",)
    assert named("an apple and a dog on gray") == ("apple", "dog")
    assert named("A dog at the top left , a dog at the right .") == ("dog",)
    assert named("nothing .") == ()
    scenes = CaptionedScenes("test", 3)
    assert all(set(named(scenes[k].caption)) == set(scenes[k].names) for k in range(20))


def test_adherence_counted_by_hand() -> None:
    pictures = saying(("dog",), ("fox", "dog"), ("apple", "dog", "car"), ("car", "apple", "dog"))
    captions = ["a dog", "a dog", "a dog and an apple", "a dog and an apple"]
    found = adherence(Judge(Reader()), pictures, captions, batch=3)
    assert found["captions"] == 4 and found["right"] == 2 / 4
    assert found["names_found"] == (1 + 0 + 2 + 1) / 6
    assert found["chance"] == pytest.approx((2 / 40 + 2 / (40 * 39 / 2)) / 4)


def test_guessing_is_right_as_often_as_chance_says() -> None:
    captions = ["a dog"] * 3000 + ["a dog and an apple"] * 3000
    found = adherence(Judge(Reader()), torch.rand(6000, 3, 8, 8), captions, batch=6000)
    assert found["right"] == pytest.approx(found["chance"], abs=4 * math.sqrt(found["chance"] / 6000))


def test_the_judge_sees_pictures_of_any_form_alike() -> None:
    judge = Judge()
    scenes = CaptionedScenes("test", 0, size=96)
    exact = stacked(scenes[k].scene for k in range(3))
    with torch.no_grad():
        wanted = judge.tower(exact.float() / 127.5 - 1)
        assert torch.equal(judge.names(exact), judge.names(exact.float() / 255))
        torch.testing.assert_close(judge.names(exact), wanted)
        features = judge.tower.forward_features(exact.float() / 127.5 - 1)[:, 0]
        torch.testing.assert_close(judge(exact), features)
        assert judge(exact).shape == (3, judge.num_features)
    for side in (64, 150):
        other = stacked([CaptionedScenes("test", 0, size=side)[0].scene])
        resized = Image.fromarray(other[0].permute(1, 2, 0).numpy()).resize((96, 96), Image.Resampling.BILINEAR)
        off = (judge.seen(other)[0].permute(1, 2, 0) + 1) * 127.5 - torch.from_numpy(np.array(resized))
        assert float(off.abs().max()) < 1.5  # Pillow rounds twice
    with pytest.raises(InputError, match=r"pictures must be \(B, 3, H, W\)"):
        judge(exact[0])


def test_frechet_distance_is_that_of_two_normal_distributions() -> None:
    judge = Judge(Reader())
    torch.manual_seed(1)
    real, one, other = (torch.rand(n, 3, 8, 8) ** power for n, power in ((40, 1.0), (25, 2.0), (30, 0.5)))

    def reference(made: Tensor) -> float:
        a, b = ((2 * some - 1).double().mean((2, 3)).numpy() for some in (real, made))
        s, t = np.cov(a.T), np.cov(b.T)
        return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * linalg.sqrtm(s @ t).real))

    distance = FrechetDistance(judge, batch=7).real(real[:15]).real(real[15:])
    for made in (one, other, one):
        assert distance(made) == pytest.approx(reference(made), rel=1e-3)
    assert distance(real) == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="at least two"):
        distance(one[:1])
    assert distance(other) == pytest.approx(reference(other), rel=1e-3)


def test_perceptual_distance_against_a_slow_loop() -> None:
    judge = Judge()
    tokens: list[Tensor] = []
    for block in judge.tower.blocks[:2]:
        block.register_forward_hook(lambda module, inputs, output: tokens.append(output[:, 1:].double()))
    pair = torch.rand(2, 2, 3, 96, 96)
    found = Perceptual(judge, blocks=2)(*pair)
    wanted, made = tokens[:2], tokens[2:]
    for b in range(2):
        total = 0.0
        for layer in range(2):
            for n in range(144):
                x, y = made[layer][b, n], wanted[layer][b, n]
                total += float((x / x.norm() - y / y.norm()).square().sum())
        assert float(found[b]) == pytest.approx(total / 2 / 144, rel=1e-4)


def test_perceptual_distance_teaches_pictures_not_the_judge() -> None:
    judge = Judge()
    made = torch.rand(1, 3, 64, 64, requires_grad=True)
    Perceptual(judge)(made, torch.rand(1, 3, 64, 64)).sum().backward()
    assert made.grad is not None and bool((made.grad != 0).any())
    assert all(weight.grad is None for weight in judge.parameters()) and not judge.tower.training
    with torch.no_grad():
        assert Perceptual(judge)(made, made).tolist() == [0]


def test_reconstruction() -> None:
    judge = Judge()
    originals = torch.rand(3, 3, 32, 32)
    decoded = originals + torch.tensor([0.1, 0.01, 0.001]).view(3, 1, 1, 1)
    kept = Reconstruction(judge)
    for some in (slice(0, 1), slice(1, 3)):
        kept.update(decoded[some], originals[some])
    found = kept.compute()
    assert found["pictures"] == 3
    assert found["psnr"] == pytest.approx((20 + 40 + 60) / 3, rel=1e-3)
    with torch.no_grad():
        assert found["perceptual"] == pytest.approx(float(Perceptual(judge)(decoded, originals).mean()), rel=1e-4)
    same = Reconstruction(judge)
    same.update((originals * 255).byte(), (originals * 255).byte())
    assert same.compute()["ssim"] == pytest.approx(1) and same.compute()["perceptual"] == 0
    assert 0 < found["ssim"] < 1
    with pytest.raises(InputError, match="differ"):
        kept.update(decoded[:1], originals)


def test_scores_of_a_generator_that_paints_the_truth() -> None:
    """Asked for the test split's captions it returns that split's pictures; asked for single objects, a black one."""
    seed, asked = 2**31 - 1, list[list[str]]()
    scenes = [CaptionedScenes("test", seed, size=48)[k] for k in range(12)]

    def draw(captions: list[str]) -> Tensor:
        asked.append(captions)
        if captions == [one.caption for one in scenes]:
            return stacked(one.scene for one in scenes)
        return torch.zeros(len(captions), 3, 48, 48)

    scores: dict[str, Any] = generator_scores(draw, size=48, count=12)
    assert [caption(name) for name in NAMES[:12]] in asked
    assert scores["captions"] == scores["real_captions"]
    assert scores["frechet_distance"] == pytest.approx(0, abs=1e-2)
    assert scores["frechet_distance_of_training_scenes"] > 1
    assert scores["single_objects"]["chance"] == pytest.approx(1 / 40)
    single = sum(len(one.names) == 1 for one in scenes)
    assert scores["real_single_objects"]["captions"] == single


def test_what_cannot_be_judged() -> None:
    judge = Judge(Reader())
    with pytest.raises(InputError, match="there are 2 pictures for 1 captions"):
        adherence(judge, torch.rand(2, 3, 8, 8), ["a dog"])
    with pytest.raises(InputError, match="'a zebra' names no object"):
        adherence(judge, torch.rand(1, 3, 8, 8), ["a zebra"])
