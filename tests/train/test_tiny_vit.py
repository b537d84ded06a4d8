"""The recipe of `tiny-vit`: its targets, its loss and its figures against slow computations, and a smoke run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

from foveate import train, zoo
from foveate.data.scenes import NAMES, Scenes
from foveate.train.tiny_vit import TinyVit, TinyVitSettings, normalised, scene_batch


def recipe(seed: int = 0, **overrides: object) -> TinyVit:
    torch.manual_seed(seed)
    return TinyVit(TinyVitSettings(**(TinyVit.smoke | overrides)), seed)  # type: ignore[arg-type]


def test_targets_are_those_of_the_scenes() -> None:
    scenes = [Scenes("train", 2)[i] for i in range(5)]
    batch = scene_batch(scenes)
    assert batch["image"].shape == (5, 3, 96, 96)
    assert batch["image"].dtype == torch.uint8
    for b, scene in enumerate(scenes):
        assert np.array_equal(batch["image"][b].permute(1, 2, 0).numpy(), scene.image)
        assert {NAMES[k] for k in torch.nonzero(batch["present"][b]).flatten()} == {o.name for o in scene.objects}
        for n in range(144):
            row, column = divmod(n, 12)
            cell = np.s_[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            counts = [int(thing.mask[cell].sum()) for thing in scene.objects]
            owner = int(np.argmax(counts))
            if counts[owner] <= 64 - sum(counts):
                assert batch["labels"][b, n] == 0
                continue
            thing = scene.objects[owner]
            assert NAMES[int(batch["labels"][b, n]) - 1] == thing.name
            x1, y1, x2, y2 = thing.box
            expected = [(x1 + x2) / 192, (y1 + y2) / 192, (x2 - x1) / 96, (y2 - y1) / 96]
            assert batch["boxes"][b, n].tolist() == pytest.approx(expected, abs=1e-6)


def test_loss_is_the_sum_the_page_states() -> None:
    made = recipe()
    batch = made.batch(0, 0, 1)
    loss, parts = made.loss(made.model, batch)
    tower = made.model.tower
    with torch.no_grad():
        early, last = tower.layers(batch["image"].float() / 127.5 - 1)
        logits = tower(batch["image"].float() / 127.5 - 1)
        patches, sooner, boxes = tower.patch_head(last), tower.early_patch_head(early), tower.early_box_head(early)
    names = cross = earlier = distance = objects = 0.0
    for b in range(4):
        for c in range(40):
            probability = 1 / (1 + math.exp(-float(logits[b, c])))
            names -= math.log(probability if batch["present"][b, c] else 1 - probability)
        for n in range(144):
            label = int(batch["labels"][b, n])
            cross -= float(patches[b, n + 1].double().log_softmax(0)[label])
            earlier -= float(sooner[b, n + 1].double().log_softmax(0)[label])
            if label:
                objects += 1
                for k in range(4):
                    off = abs(float(boxes[b, n + 1, k] - batch["boxes"][b, n, k]))
                    distance += off**2 / 0.1 if off < 0.05 else off - 0.025
    expected = names / 4 + 2 * cross / 576 + 2 * earlier / 576 + 5 * distance / objects
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert set(parts) == {"names", "patches", "early", "boxes"}


def test_batches_depend_on_the_step_alone_and_are_shared_by_processes() -> None:
    whole = recipe(seed=3).batch(7, 0, 1)
    for name, value in recipe(seed=3).batch(7, 0, 1).items():
        assert torch.equal(value, whole[name])
    halves = [recipe(seed=3).batch(7, rank, 2) for rank in range(2)]
    for rank, half in enumerate(halves):
        assert torch.equal(half["image"], whole["image"][rank::2])
    assert not torch.equal(recipe(seed=3).batch(8, 0, 1)["image"], whole["image"])
    assert not torch.equal(recipe(seed=4).batch(7, 0, 1)["image"], whole["image"])


def test_learns(tmp_path: Path) -> None:
    """Forty steps on a narrow tower: all four losses fall well below their start."""
    options = {"steps": 40, "batch": 8, "lr": 3e-3, "warmup": 5, "width": 32, "workers": 0, "threads": 1}
    train.run("tiny-vit", out=tmp_path, smoke=True, **options)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for part in ("names", "patches", "early", "boxes"):
        start = sum(line[part] for line in lines[:3])
        end = sum(line[part] for line in lines[-3:])
        assert end < 0.8 * start, part


def test_figures_of_a_perfect_and_of_a_blind_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate` on a tower that knows the answers gives 1; on one that says background everywhere it gives little."""
    made = recipe(test_scenes=60)
    tower, scenes = made.model.tower, Scenes("test", 0)
    truth = [scene_batch([scenes[i]]) for i in range(60)]
    known = {t["image"][0].numpy().tobytes(): t for t in truth}
    asked: list[dict[str, torch.Tensor]] = []

    def layers(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raw = ((pictures + 1) * 127.5).round().to(torch.uint8)
        asked[:] = [known[picture.numpy().tobytes()] for picture in raw]
        labels = torch.cat([t["labels"] for t in asked])
        one_hot = torch.nn.functional.one_hot(labels, 41).float()
        boxes = torch.cat([t["boxes"] for t in asked])
        token = torch.cat([one_hot, boxes], dim=-1)
        token = torch.cat([torch.zeros(len(asked), 1, 45), token], dim=1)
        return token, token

    monkeypatch.setattr(tower, "layers", layers)
    monkeypatch.setattr(tower, "forward_head", lambda last: torch.cat([t["present"] for t in asked]) * 2 - 1)
    for head, first, size in (("patch_head", 0, 41), ("early_patch_head", 0, 41), ("early_box_head", 41, 4)):
        reader = torch.nn.Linear(45, size, bias=False)
        reader.weight.data = torch.eye(45)[first : first + size]
        setattr(tower, head, reader)
    perfect = made.evaluate()
    assert perfect["scenes"] == 60
    assert perfect["names_mean_average_precision"] == pytest.approx(1)
    assert perfect["patch_mean_iou"] == pytest.approx(1)
    assert perfect["patch_mean_iou_last_but_one_layer"] == pytest.approx(1)
    assert perfect["patch_accuracy"] == pytest.approx(1)
    assert perfect["box_mean_absolute_error_px"] == pytest.approx(0, abs=1e-4)

    tower.patch_head.weight.data.zero_()  # argmax of equals is class 0, background
    tower.early_box_head.weight.data.zero_()
    blind = made.evaluate()
    labels = torch.cat([t["labels"].flatten() for t in truth])
    boxes = torch.cat([t["boxes"].flatten(0, 1) for t in truth])
    background = float((labels == 0).double().mean())
    assert blind["patch_accuracy"] == pytest.approx(background, rel=1e-5)
    assert blind["patch_mean_iou"] == pytest.approx(background / len(labels.unique()), rel=1e-5)
    assert blind["patch_mean_iou_last_but_one_layer"] == pytest.approx(1)
    assert blind["box_mean_absolute_error_px"] == pytest.approx(96 * float(boxes[labels > 0].mean()), rel=1e-4)


def test_smoke_run_is_complete(tmp_path: Path) -> None:
    metrics = train.run("tiny-vit", out=tmp_path, smoke=True, seed=1, threads=1)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["name"] == "tiny-vit"
    assert metrics["split"] == "test"
    assert metrics["scenes"] == 8
    model = zoo.load_folder(tmp_path)
    assert not model.training
    state = load_file(tmp_path / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    pictures = normalised(scene_batch([Scenes("test")[0]])["image"])
    assert model(pictures).shape == (1, 40)
    assert model.segment(pictures).shape == (1, 144, 41)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [({"depth": 1}, "depth"), ({"width": 30, "heads": 4}, "width"), ({"heads": 0}, "width"), ({"layers": 3}, "layers")],
)
def test_nonsense_is_rejected(overrides: dict[str, int], named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        train.run("tiny-vit", out=tmp_path / "run", smoke=True, **overrides)
    assert not (tmp_path / "run").exists()
