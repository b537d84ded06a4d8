"""The recipe of `dtop`: its stages, its data, figures of scores that are right, a smoke run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

from foveate import train
from foveate.data.scenes import Scenes
from foveate.method import InputError
from foveate.methods.reduce.dtop import Dtop
from foveate.train.dtop import CLASSES, VARIANTS, DtopRecipe, DtopSettings, evaluate
from foveate.train.tiny_vit import scene_batch


def recipe(**overrides: Any) -> DtopRecipe:
    torch.manual_seed(0)
    return DtopRecipe(DtopSettings(**(DtopRecipe.smoke | overrides)), 3)


def test_exits_come_with_the_fine_tuning() -> None:
    made = recipe(confidence=0.8)
    for step, wanted in ((0, 1.0), (1, 1.0), (2, 0.8)):
        batch = made.batch(step, 0, 1)
        scenes = scene_batch([Scenes("train", 3)[2 * step + i] for i in range(2)])
        assert torch.equal(batch["labels"].flatten(1), scenes["labels"]) and batch["labels"].shape == (2, 12, 12)
        made.loss(made.model, batch)
        assert made.segmenter.confidence == wanted
    assert made.rate("segmenter.decoders.0.queries") == 10.0 and made.rate("segmenter.backbone.pos_embed") == 1.0
    with pytest.raises(InputError, match="finetune_steps"):
        DtopSettings(steps=5, finetune_steps=6)


def test_figures_of_scores_that_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    made, settings = recipe(), DtopSettings(**(DtopRecipe.smoke | {"test_scenes": 3}))
    labels = scene_batch([Scenes("test", 0)[i] for i in range(3)])["labels"]
    right = torch.nn.functional.one_hot(labels, 41).transpose(1, 2).float().unflatten(2, (12, 12))
    given = iter([right[:2], right[2:]])
    monkeypatch.setattr(made.segmenter, "patch_scores", lambda said: next(given))
    made.segmenter.set_exits(confidence=1.0).eval()
    figures = evaluate(made.segmenter, settings)
    assert figures["mean_iou"] == figures["patch_accuracy"] == figures["mean_iou_without_background"] == 1
    assert figures["tokens_at_each_head"] == [1, 1, 1]
    # One object called something else: its class has no overlap left, nor has the other one.
    wrong = right.clone()
    name = int(labels.unique()[1])
    other = next(c for c in range(1, 41) if c not in labels.unique().tolist())
    wrong[:, [name, other]] = right[:, [other, name]]
    given = iter([wrong[:2], wrong[2:]])
    classes = len(labels.unique())
    assert evaluate(made.segmenter, settings)["mean_iou"] == pytest.approx((classes - 1) / (classes + 1))


def test_smoke(tmp_path: Path) -> None:
    metrics = train.run("dtop", out=tmp_path, smoke=True, threads=1)
    assert [(one["confidence"], one["context"]) for one in metrics["by_exit"]] == list(VARIANTS)
    assert json.loads((tmp_path / "labels.json").read_text()) == list(CLASSES)
    assert Dtop.from_pretrained(tmp_path).confidence == 0.9
