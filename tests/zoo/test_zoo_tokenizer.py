"""Tokenizers found by name and loaded from folders; what the commands say of wrong ones is in test_cli_tokenize.py."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from foveate import zoo
from foveate.data.scenes import Scenes, stacked
from foveate.method import InputError
from foveate.methods.tokenize.one_d_piece import OneDPiece
from foveate.methods.tokenize.titok import TiTok
from foveate.zoo.tokenizer import find_tokenizer, fingerprint, load_tokenizer
from foveate.zoo.vq import build_vq


def test_a_fingerprint_is_of_names_types_and_values() -> None:
    model = nn.Linear(3, 2).to(torch.bfloat16)
    wanted = hashlib.sha256()
    for name in ("bias", "weight"):
        value = getattr(model, name).detach()
        wanted.update(f"{name} torch.bfloat16 {tuple(value.shape)}\n".encode())
        wanted.update(value.float().numpy().astype("<f4").view("<u4").__rshift__(16).astype("<u2").tobytes())
    assert fingerprint(model) == wanted.hexdigest()[:16]
    with torch.no_grad():
        model.weight[1, 2] += 1
    assert fingerprint(model) != wanted.hexdigest()[:16] != fingerprint(model.float())


def test_a_folder_gives_the_tokenizer_that_was_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = TiTok(
        image=16, patch=4, latents=3, encoder=(16, 1, 2), decoder=(16, 1, 2), codes=8, channels=4, head="pixels",
        legacy_layout=False,
    )  # fmt: skip
    made.save_pretrained(tmp_path / "mine")
    assert find_tokenizer(str(tmp_path / "mine")) == ("mine", tmp_path / "mine")
    loaded = load_tokenizer(tmp_path / "mine")
    assert type(loaded) is TiTok and not loaded.training and fingerprint(loaded) == fingerprint(made)
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="neither shipped"):
        find_tokenizer(str(tmp_path / "other"))


def test_a_grid_of_codes_of_diffusers(tmp_path: Path) -> None:
    vq = build_vq(width=8, codes=32, pitch=8).eval()
    vq.save_pretrained(tmp_path)
    loaded, pixels = load_tokenizer(tmp_path), torch.rand(2, 3, 64, 64)
    codes = loaded.encode(pixels)
    assert (loaded.size, loaded.any_length, codes.grid, codes.codebook_size) == ((64, 64), False, (8, 8), 32)
    with torch.no_grad():
        latents = vq.encode(2 * pixels - 1).latents
        wanted = vq.decode(latents).sample / 2 + 0.5
    assert torch.allclose(loaded.decode(codes), wanted.clamp(0, 1), atol=1e-5)
    with pytest.raises(InputError, match="only a sequence"):
        loaded.decode(codes, tokens=3)


@pytest.mark.parametrize("name, cls", [("titok", TiTok), ("one-d-piece", OneDPiece)])
def test_shipped_tokenizers_keep_what_was_measured(name: str, cls: type[TiTok]) -> None:
    """Of 60 scenes, where `metrics.json` has 500; those of other ids are further away."""
    model = zoo.load(name)
    assert type(model) is cls and not model.training
    scenes = Scenes("test", 0, size=64)
    pixels = stacked(scenes[number] for number in range(60)).float() / 255
    with torch.no_grad():
        made = model.decode(model.encode(pixels))

    def psnr(other: torch.Tensor) -> float:
        return float(-10 * (other - pixels).square().mean().log10())

    measured = json.loads((zoo.path(name) / "metrics.json").read_text(encoding="utf-8"))["scenes"]["psnr"]
    assert psnr(made) == pytest.approx(measured, abs=1) and psnr(made) > psnr(made.roll(1, 0)) + 2
