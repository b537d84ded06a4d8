"""The recipe of `tiny-vq`: its pictures, its loss and its codes against slow computations, its figures, a smoke run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("diffusers")
pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

from foveate import train, zoo
from foveate.data.scenes import CaptionedScenes, Scenes, stacked
from foveate.method import InputError
from foveate.nn.codes import Codes
from foveate.train import loop
from foveate.train.tiny_vq import REVIVE_EVERY, TinyVq, TinyVqSettings


def recipe(**overrides: Any) -> TinyVq:
    torch.manual_seed(0)
    return TinyVq(TinyVqSettings(**(TinyVq.smoke | overrides)), 3)


def test_three_scenes_and_one_crop_and_processes_share_them() -> None:
    made = recipe()
    whole = made.batch(2, 0, 1)["image"]
    scenes, crops = CaptionedScenes("train", 3, size=64), Scenes("train", 3, size=64, objects=(0, 0))
    wanted = [*(scenes[k].scene for k in (8, 9, 10)), crops[11]]
    assert torch.equal(whole, stacked(wanted)) and not crops[11].objects
    halves = [made.batch(2, rank, 2)["image"] for rank in range(2)]
    assert torch.equal(halves[0], whole[::2]) and torch.equal(halves[1], whole[1::2])


def nearest(latents: Tensor, codes: Tensor) -> Tensor:
    """(B, D, h, w) -> the nearest codes, (B, D, h, w), by a loop."""
    found = torch.empty_like(latents)
    for b in range(latents.shape[0]):
        for i in range(latents.shape[2]):
            for j in range(latents.shape[3]):
                found[b, :, i, j] = min(codes, key=lambda code: float((latents[b, :, i, j] - code).detach().norm()))
    return found


def test_loss() -> None:
    made = recipe(free_steps=0, perceptual=0.5, batch=2)
    batch = made.batch(0, 0, 1)
    loss, parts = made.loss(made.model, batch)
    wanted = batch["image"].float() / 127.5 - 1
    with torch.no_grad():
        latents = made.vq.encode(wanted).latents
        codes = nearest(latents, made.vq.quantize.embedding.weight)
        picture = made.vq.decode(codes, force_not_quantize=True).sample
        looks = made.model.perceptual((picture + 1) / 2, (wanted + 1) / 2).mean()
    error = picture - wanted
    edges = [(error[:, :, 1:] - error[:, :, :-1]).abs().mean(), (error[..., 1:] - error[..., :-1]).abs().mean()]
    expected = {
        "pixels": float(error.abs().mean()),
        "edges": float(sum(edges)) / 2,
        "perceptual": float(looks),
        # Codes are drawn to latents, and with a quarter of the weight latents to codes.
        "codebook": 1.25 * float((latents - codes).square().mean()),
    }
    assert parts == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert float(loss.detach()) == pytest.approx(sum(expected.values()) - 0.5 * expected["perceptual"], rel=1e-3)


def test_first_steps_go_without_codes_then_codes_are_latents() -> None:
    made = recipe(free_steps=2)
    before = made.vq.quantize.embedding.weight.detach().clone()
    for step in range(2):
        loss, parts = made.loss(made.model, made.batch(step, 0, 1))
        assert parts["codebook"] == 0 and torch.equal(made.vq.quantize.embedding.weight, before)
    loss.backward()
    assert not any(weight.grad is None for weight in made.vq.parameters())
    batch = made.batch(2, 0, 1)
    made.loss(made.model, batch)
    with torch.no_grad():
        latents = made.vq.encode(batch["image"].float() / 127.5 - 1).latents.movedim(1, -1).flatten(0, 2)
    distance = torch.cdist(made.vq.quantize.embedding.weight.detach(), latents)
    assert float(distance.amin(1).max()) < 1e-3 and int(made.model.uses.sum()) == 4 * 64


def test_only_unused_codes_are_set_anew() -> None:
    made = recipe(free_steps=0)
    weight = made.vq.quantize.embedding.weight
    made.loss(made.model, made.batch(0, 0, 1))
    with torch.no_grad():
        weight[5:] += 1e4  # as far from all latents as no code gets by training
    made.model.calls.fill_(REVIVE_EVERY)
    made.model.uses.copy_(torch.arange(16) < 5)
    before = weight.detach().clone()
    made.loss(made.model, made.batch(1, 0, 1))
    assert torch.equal(weight[:5], before[:5]) and float(weight.detach()[5:].abs().max()) < 1e3
    assert int(made.model.uses.sum()) == 4 * 64
    made.loss(made.model, made.batch(2, 0, 1))
    assert int(made.model.uses.sum()) == 2 * 4 * 64


def test_figures_of_a_tokenizer_that_keeps_pictures_but_for_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[int, Tensor] = {}

    def encode(vq: Any, pictures: Tensor) -> Codes:
        first = 4 * len(known)
        ids = torch.arange(first, first + 4 * len(pictures)).view(len(pictures), 4) % 16
        known[len(known)] = pictures.float() / 255
        return Codes(ids, 16, (64, 64), (2, 2))

    monkeypatch.setattr("foveate.zoo.vq.encode", encode)
    monkeypatch.setattr("foveate.zoo.vq.decode", lambda vq, codes: known[len(known) - 1] + 0.1)
    figures = recipe(test_scenes=8).evaluate()
    for kind in ("scenes", "photographs"):
        assert figures[kind]["pictures"] == 8 and figures[kind]["psnr"] == pytest.approx(20, rel=1e-4)
        # 8 pictures with 4 codes each: each of the 16 twice.
        assert figures[kind]["codes_used"] == 16 and figures[kind]["bits_per_code"] == pytest.approx(4)
    assert figures["scenes"]["adherence"]["captions"] == 8
    assert figures["scenes"]["adherence_of_originals"]["right"] >= 0.25


def test_smoke_run_is_complete(tmp_path: Path) -> None:
    from foveate.zoo.vq import decode, encode

    metrics = train.run("tiny-vq", out=tmp_path, smoke=True, threads=1)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["split"] == "test" and metrics["scenes"]["pictures"] == 4
    vq = zoo.load_folder(tmp_path)
    assert not vq.training and vq.config.num_vq_embeddings == 16
    pictures = TinyVq(TinyVqSettings(**TinyVq.smoke), 3).batch(0, 0, 1)["image"]
    codes = encode(vq, pictures)
    assert (codes.grid, codes.size, codes.bits) == ((8, 8), (64, 64), 64 * 4)
    with torch.no_grad():
        latents = vq.encode(pictures.float() / 127.5 - 1).latents
        expected = vq.decode(latents).sample
    torch.testing.assert_close(decode(vq, codes), (expected / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)
    rows = nearest(latents[:1], vq.quantize.embedding.weight)[0].flatten(1).T
    assert torch.equal(F.embedding(codes.ids[0], vq.quantize.embedding.weight), rows)


def test_an_interrupted_run_gives_the_same_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.train.tiny_vq.REVIVE_EVERY", 2)
    options = {**TinyVq.smoke, "steps": 5, "threads": 1, "perceptual": 0.0}
    loop.train(TinyVq, out=tmp_path / "whole", stop_after=4, **options)
    for last in (2, 4):
        loop.train(TinyVq, out=tmp_path / "parts", stop_after=last, **options)
    whole, parts = (load_file(tmp_path / name / "checkpoint-0000004/model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert int(parts["calls"]) == 4 and int(parts["uses"].sum()) == 4 * 64


@pytest.mark.parametrize(
    ("overrides", "named"),
    [({"width": 12}, "width"), ({"codes": 1}, "codes"), ({"perceptual": -1.0}, "perceptual"),
     ({"free_steps": -1}, "free_steps"), ({"pitch": 6}, "pitch")],
)  # fmt: skip
def test_nonsense_is_rejected(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        TinyVqSettings(**overrides)


def test_what_cannot_be_coded() -> None:
    from foveate.zoo.vq import build_vq, decode, encode

    vq = build_vq(width=8, codes=4, pitch=8)
    with pytest.raises(InputError, match="multiples of 8 px, not 20 x 16"):
        encode(vq, torch.rand(1, 3, 20, 16))
    with pytest.raises(InputError, match="were not made by this model"):
        decode(vq, Codes(torch.zeros(1, 4, dtype=torch.long), 5, (16, 16), (2, 2)))


@pytest.mark.parametrize("pitch", [2, 4, 16])
def test_a_code_stands_for_a_square_of_the_pitch(pitch: int) -> None:
    from foveate.zoo.vq import build_vq, decode, encode

    torch.manual_seed(0)
    vq = build_vq(width=8, codes=4, pitch=pitch)
    codes = encode(vq, torch.rand(2, 3, 32, 16))
    assert codes.grid == (32 // pitch, 16 // pitch) and codes.ids.shape == (2, 512 // pitch**2)
    assert decode(vq, codes).shape == (2, 3, 32, 16)
