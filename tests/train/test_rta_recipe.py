"""The recipe of `rta`: its loss, its figures, running statistics after a resume, and a smoke run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("timm")
pytest.importorskip("imagecorruptions")

from foveate import train, zoo
from foveate.data.corruptions import CORRUPTIONS, corrupted
from foveate.method import InputError
from foveate.methods.image.rta import Rta
from foveate.train.loop import train as loop
from foveate.train.rta import RtaRecipe, RtaSettings, attention_figures, corrupt_all
from foveate.train.tiny_vit import normalised


def recipe(**overrides: Any) -> RtaRecipe:
    torch.manual_seed(0)
    return RtaRecipe(RtaSettings(**(RtaRecipe.smoke | overrides)), 3)


def test_the_loss_has_both_parts() -> None:
    made = recipe(weight=0.5)
    batch = made.batch(0, 0, 1)
    loss, parts = made.loss(made.model, batch)
    assert float(loss.detach()) == pytest.approx(parts["task"] + 0.5 * parts["diversity"], abs=1e-6)
    plain, parts = (other := recipe(weight=0.0, scales=0)).loss(other.model, batch)
    logits = other.rta(normalised(batch["image"]))
    assert float(plain.detach()) == pytest.approx(float(F.cross_entropy(logits, batch["label"]).detach()), abs=1e-6)
    assert set(parts) == {"task"} and not len(other.rta.pools)


def test_it_starts_from_tiny_vit() -> None:
    made = recipe(start="tiny-vit", width=128, depth=5, heads=4, scales=0)
    pixels = torch.rand(1, 3, 96, 96)
    assert torch.allclose(made.rta.eval()(pixels), zoo.load("tiny-vit")(pixels), atol=1e-5)
    with pytest.raises(InputError, match="start must be"):
        RtaSettings(start="imagenet")


def test_corruption_is_each_pictures_own() -> None:
    images = torch.full((2, 3, 40, 40), 128, dtype=torch.uint8)
    made = corrupt_all(images, "gaussian_noise", 2)
    for number in range(2):
        alone = corrupted(np.full((40, 40, 3), 128, np.uint8), "gaussian_noise", 2, seed=number)
        assert np.array_equal(made[number].permute(1, 2, 0).numpy(), alone)
    assert not torch.equal(made[0], made[1])


def test_attention_figures_pair_by_pair() -> None:
    rta = recipe().rta.eval()
    clean, noisy = torch.randint(0, 256, (2, 3, 3, 96, 96), dtype=torch.uint8)
    with torch.no_grad():
        maps, others = (rta.attend(normalised(some))[1] for some in (clean, noisy))
    alike, stable = [], []
    for one, two in zip(maps, others):
        for b in range(3):
            rows, disturbed = one[b].mean(0), two[b].mean(0)
            matrix = F.cosine_similarity(rows[:, None], rows[None], dim=-1)
            alike.append(matrix[~torch.eye(len(rows), dtype=torch.bool)].mean())
            stable.append(F.cosine_similarity(rows, disturbed, dim=-1).mean())
    found = attention_figures(rta, clean, noisy)
    assert found["row_similarity"] == pytest.approx(float(torch.stack(alike).mean()), abs=1e-4)
    assert found["row_stability"] == pytest.approx(float(torch.stack(stable).mean()), abs=1e-4)


def test_smoke_and_resume(tmp_path: Path) -> None:
    metrics = train.run("rta", out=tmp_path / "one", smoke=True, threads=1)
    assert set(metrics["corruption_error"]) == set(CORRUPTIONS) and len(CORRUPTIONS) >= 8
    assert all(len(errors) == 5 for errors in metrics["corruption_error"].values())
    assert metrics["mean_corruption_error"] == pytest.approx(np.mean(list(metrics["corruption_error"].values())))
    for stop in (1, None):
        loop(RtaRecipe, out=tmp_path / "two", stop_after=stop, **(RtaRecipe.smoke | {"threads": 1}))
    one, two = (Rta.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one), "batch norm's statistics included"
