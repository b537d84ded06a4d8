"""The recipes of titok and one-d-piece: every stage at smoke size, what it trains, resuming, and its two helpers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

from foveate import train
from foveate.data.scenes import Scenes
from foveate.method import InputError
from foveate.methods.tokenize import one_d_piece
from foveate.methods.tokenize.one_d_piece import OneDPiece
from foveate.methods.tokenize.titok import CONFIGURATIONS, TiTok
from foveate.nn.maskgit import MaskedGenerator
from foveate.nn.vqgan import VectorQuantizer, Vqgan
from foveate.train.codebook import REVIVE_EVERY, Revival, WeightAverage
from foveate.train.loop import train as run
from foveate.train.one_d_piece import OneDPieceRecipe
from foveate.train.titok import TitokRecipe, TitokSettings


@pytest.fixture(autouse=True, scope="module")
def _narrow() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        small = {"codes": 16, "channels": 4, "pixel_codes": 8, "pixel_channels": 8, "pixel_width": 4}
        for known in (CONFIGURATIONS, one_d_piece.CONFIGURATIONS):
            patch.setitem(known, "tiny", known["tiny"] | small)
        patch.setitem(CONFIGURATIONS, "vae", CONFIGURATIONS["tiny"] | {"head": "pixels", "quantiser": "vae"})
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, _narrow: Any) -> tuple[Path, dict[str, Any]]:
    """A smoke run of stage 2, and its metrics; the stages before are in folders in it."""
    out = tmp_path_factory.mktemp("titok") / "pixels"
    return out, train.run("titok", out=out, smoke=True, threads=1)


def recipe(**overrides: Any) -> TitokRecipe:
    torch.manual_seed(0)
    return TitokRecipe(TitokSettings(**(TitokRecipe.smoke | overrides)), 3)


def test_stages(folder: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, metrics = folder
    vqgan = Vqgan.from_pretrained(out / "codes" / "vqgan", strict=True)
    first, second = (TiTok.from_pretrained(one, strict=True).state_dict() for one in (out / "codes", out))
    assert set(json.loads((out / "config.json").read_text())) >= {"image", "method"}
    assert torch.equal(first["pixel_codebook.weight"], vqgan.quantizer.embedding.weight)
    assert torch.equal(first["pixel_decoder.stem.weight"], vqgan.decoder.stem.weight)
    tokens = [name for name in first if name.startswith(("encoder.", "latents", "quantizer."))]
    assert all(torch.equal(first[name], second[name]) for name in tokens) and len(tokens) > 10
    assert not torch.equal(first["pixel_decoder.stem.weight"], second["pixel_decoder.stem.weight"])
    for kind in ("scenes", "photographs"):
        assert metrics[kind]["pictures"] == 3 and metrics[kind]["psnr"] > 0 and metrics[kind]["codes_used"] >= 1
    made = train.run("titok", out=tmp_path, smoke=True, threads=1, stage="generator", start=str(out))
    assert made["single_objects"]["captions"] == 3 and made["frechet_distance"] > 0
    assert MaskedGenerator.from_pretrained(tmp_path, strict=True).tokens == 8


def test_what_a_stage_trains(folder: tuple[Path, dict[str, Any]]) -> None:
    codes = recipe(stage="codes", start=str(folder[0] / "codes" / "vqgan"))
    trained = {name for name, weight in codes.model.named_parameters() if weight.requires_grad}
    assert trained == {
        f"trained.{name}" for name, _ in codes.trained.named_parameters() if not name.startswith("pixel_")
    }
    pixels = recipe(stage="pixels", start=str(folder[0] / "codes"))
    assert {name.partition(".")[0] for name, w in pixels.trained.named_parameters() if w.requires_grad} == {
        "decoder", "pixel_codebook", "pixel_decoder",
    }  # fmt: skip
    batch = codes.batch(1, 0, 1)
    wanted = [Scenes("train", 3, size=48, objects=(0, 0))[2].image, Scenes("train", 3, size=48)[3].image]
    assert all((batch["image"][k].permute(1, 2, 0).numpy() == one).all() for k, one in enumerate(wanted))
    assert torch.equal(codes.batch(1, 1, 2)["image"], batch["image"][1:])
    generator = recipe(stage="generator", start=str(folder[0]))
    assert generator.ids.shape == (4, 8) and set(generator.batch(0, 0, 1)) == {"ids", "label", "step"}


def test_one_d_piece_and_continuous_latents(folder: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    start = str(folder[0] / "codes" / "vqgan")
    made = run(OneDPieceRecipe, out=tmp_path / "a", **_smoke(stage="codes", start=start))
    assert [one["tokens"] for one in made["scenes"]["by_tokens"]] == [2]
    assert OneDPiece.from_pretrained(tmp_path / "a", strict=True).tokens == 8
    made = run(TitokRecipe, out=tmp_path / "b", **_smoke(stage="single", config="vae"))
    assert made["photographs"]["psnr"] > 0 and "codes_used" not in made["photographs"]


def _smoke(**overrides: Any) -> dict[str, Any]:
    return TitokRecipe.smoke | {"threads": 1} | overrides


def test_resuming_gives_the_same_numbers(
    folder: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And codes can be moved between two steps."""
    monkeypatch.setattr("foveate.train.codebook.REVIVE_EVERY", 2)
    options = _smoke(stage="codes", steps=4, start=str(folder[0] / "codes" / "vqgan"))
    run(TitokRecipe, out=tmp_path / "whole", **options)
    run(TitokRecipe, out=tmp_path / "parts", stop_after=3, **options)
    run(TitokRecipe, out=tmp_path / "parts", **options)
    whole, parts = (load_file(tmp_path / one / "model.safetensors") for one in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_bad_settings(folder: tuple[Path, dict[str, Any]]) -> None:
    for bad, why in (
        ({"stage": "all"}, "stage must be"), ({"stage": "vqgan", "start": "x"}, "nothing comes before"),
        ({"ema": 1.0}, "ema"), ({"unquantised": -1}, "unq"),
        ({"codes_steps": 0}, "codes_steps"), ({"temperature": -1.0}, "temperature"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=why):
            TitokSettings(**bad)
    for bad, why in (
        ({"stage": "vqgan", "config": "huge"}, "config must be"), ({"stage": "vqgan", "heads": 0}, "go together"),
        ({"stage": "single"}, 'head="pixels"'), ({"stage": "codes", "start": "nowhere"}, "no model here"),
        ({"stage": "pixels", "start": str(folder[0] / "codes" / "vqgan")}, "another model"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=why):
            recipe(**bad)


def test_unused_codes_live_again() -> None:
    quantizer = VectorQuantizer(6, 3, normalised=True)
    nn.init.normal_(quantizer.embedding.weight)
    before, revival = quantizer.embedding.weight.detach().clone(), Revival(6)
    ids, loss = torch.tensor([[0, 1], [1, 4]]), torch.tensor(1.25e-6)
    for _ in range(REVIVE_EVERY - 1):
        revival.move(quantizer)
        revival.count(quantizer, ids, loss)
    assert torch.equal(quantizer.embedding.weight, before) and revival.uses.tolist() == [24, 48, 0, 0, 24, 0]
    revival.count(quantizer, ids, loss)
    revival.move(quantizer)
    now = quantizer.embedding.weight.detach()
    assert torch.equal(now[[0, 1, 4]], before[[0, 1, 4]]) and not revival.uses.any()
    used = nn.functional.normalize(before[[0, 1, 4]], dim=1)
    for moved in now[[2, 3, 5]]:
        # Latents lie 1e-3 from their codes: so do the moved ones, in each channel.
        assert 0 < float((used - moved).abs().amax(1).min()) < 6e-3


def test_latents_become_codes() -> None:
    quantizer, z = VectorQuantizer(6, 3), torch.randn(2, 2, 3)
    Revival(6).start(quantizer, z)
    apart = torch.cdist(quantizer.embedding.weight.detach(), z.flatten(0, 1))
    assert float(apart.amin(1).max()) < 0.1 and sorted(apart.argmin(1)[:4].tolist()) == [0, 1, 2, 3]


def test_average_of_weights() -> None:
    model = nn.Linear(2, 1, bias=False)
    average, wanted = WeightAverage(model, 0.5), model.weight.detach().clone()
    for step in range(12):
        with torch.no_grad():
            model.weight.normal_()
        average.update(model)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * model.weight.detach()
    average.apply_to(model)
    torch.testing.assert_close(model.weight.detach(), wanted)
