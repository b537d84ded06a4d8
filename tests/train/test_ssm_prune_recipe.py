"""The recipe of `ssm-prune`: when tokens go, what is under those that are left, weights to start from, a smoke run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("torchmetrics")
pytest.importorskip("timm")

from foveate import train
from foveate.data.scenes import Scenes
from foveate.method import InputError
from foveate.methods.reduce.ssm_prune import SsmPrune
from foveate.train.ssm_prune import VARIANTS, SsmPruneRecipe, SsmPruneSettings
from foveate.train.tiny_vit import scene_batch


def recipe(**overrides: Any) -> SsmPruneRecipe:
    torch.manual_seed(0)
    return SsmPruneRecipe(SsmPruneSettings(**(SsmPruneRecipe.smoke | overrides)), 3)


@torch.no_grad()
def test_loss_before_and_after_pruning_begins() -> None:
    made = recipe()
    made.student.eval()
    for step, keep in ((0, 1.0), (1, 1.0), (2, 0.8)):
        batch = made.batch(step, 0, 1)
        scenes = scene_batch([Scenes("train", 3)[2 * step + i] for i in range(2)])
        assert torch.equal(batch["image"], scenes["image"])
        loss, parts = made.loss(made.model, batch)
        assert made.student.keep == keep
        pixels = scenes["image"].float() / 127.5 - 1
        stages, tokens = made.student.stages(pixels), made.student.forward_features(pixels)
        wrong = []
        for row, place, labels in zip(tokens, stages.positions[-1].tolist(), scenes["labels"]):
            for token, at in zip(row, place):
                if at != 72:
                    label = labels[at if at < 72 else at - 1]
                    wrong.append(-made.model.patch_head(token).log_softmax(0)[label])
        assert len(wrong) == (288 if keep == 1 else 148)
        logits, present = made.student.head(tokens[:, tokens.shape[1] // 2]), scenes["present"].float()
        names = F.binary_cross_entropy_with_logits(logits, present, reduction="sum") / 2
        assert parts["patches"] == pytest.approx(float(torch.stack(wrong).mean()), rel=1e-4)
        assert parts["names"] == pytest.approx(float(names), rel=1e-4)
        assert float(loss) == pytest.approx(float(names) + 2 * parts["patches"], rel=1e-4)


def test_smoke_and_weights_to_start_from(tmp_path: Path) -> None:
    metrics = train.run("ssm-prune", out=tmp_path, smoke=True, threads=1)
    assert list(metrics["by_rule"]) == list(VARIANTS)
    costs = {name: one["flops"] for name, one in metrics["by_rule"].items()}
    # By hand: the projections and C h of 64 and 128 channels, the convolutions of 4, patches and classifier.
    token, conv = 64 * 256 + 128 * 64 + 2 * (128 * 12 + 4 * 128 + 128 * 4), 2 * 4 * 128
    fixed = 144 * 192 * 64 + 64 * 40
    assert costs["dense"] == 2 * (580 * (token + conv) + fixed)
    assert costs["none"] == 2 * ((145 + 117 + 93 + 75) * (token + conv) + fixed)
    # Convolutions run over all places.
    assert costs["decay"] == costs["copy"] == 2 * (430 * token + 580 * conv + fixed)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    model = SsmPrune.from_pretrained(tmp_path)
    assert model.keep == 0.8
    again = recipe(weights=str(tmp_path), finetune_steps=3)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.student.state_dict()[name], weight), name


def test_bad_settings(tmp_path: Path) -> None:
    for settings, message in (
        ({"finetune_steps": 9}, "finetune_steps"),
        ({"weights": str(tmp_path)}, "weights"),
        ({"config": "vim-t"}, "12 x 12"),
    ):
        with pytest.raises(InputError, match=message):
            recipe(**settings)
