"""The recipe of `sparsifiner`: its two stages, its data, a smoke run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

from foveate import train, zoo
from foveate.data.scenes import Scenes
from foveate.method import InputError
from foveate.methods.reduce.sparsifiner import Sparsifiner
from foveate.train.sparsifiner import SparsifinerRecipe, SparsifinerSettings
from foveate.train.tiny_vit import scene_batch


def test_only_the_predictors_learn_first_and_only_the_others_then() -> None:
    torch.manual_seed(0)
    made = SparsifinerRecipe(SparsifinerSettings(**SparsifinerRecipe.smoke), 3)
    for step in (1, 2):
        made.model.zero_grad(set_to_none=True)
        batch = made.batch(step, 0, 1)
        wanted = scene_batch([Scenes("train", 3)[2 * step + i] for i in range(2)])
        assert torch.equal(batch["image"], wanted["image"]) and torch.equal(batch["present"], wanted["present"])
        loss, _ = made.loss(made.model, batch)
        loss.backward()
        moved = {name for name, weight in made.model.named_parameters() if weight.grad is not None}
        predictors = {name for name, _ in made.model.named_parameters() if name.startswith("student.predictors.")}
        rest = {name for name, weight in made.model.named_parameters() if weight.requires_grad} - predictors
        assert moved == (predictors if step < 2 else rest)
        assert {made.rate(name) for name in predictors} == {10.0} and {made.rate(name) for name in rest} == {1.0}


def test_stages_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="reconstruct_steps"):
        SparsifinerSettings(steps=5, reconstruct_steps=5)


def test_smoke(tmp_path: Path) -> None:
    metrics = train.run("sparsifiner", out=tmp_path, smoke=True, threads=1)
    assert 0 <= metrics["mean_average_precision"] <= 1
    # Names that are in none of six scenes count as 0.
    named = scene_batch([Scenes("test", 0)[i] for i in range(6)])["present"].any(0).float().mean()
    assert 0.8 * float(named) <= metrics["dense_mean_average_precision"] <= float(named)
    made = Sparsifiner.from_pretrained(tmp_path).eval()
    # One step at a small rate: still close to the zoo's weights, and not the same.
    before, after = zoo.load("tiny-vit").head.weight, made.backbone.head.weight
    assert not torch.equal(before, after) and torch.allclose(before, after, atol=1e-2)
