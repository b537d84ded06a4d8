"""The recipe of `cutmix`: its data, its loss, its figures with a model that knows, and a smoke run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

from foveate import train
from foveate.data.scenes import NAMES, Scenes
from foveate.method import InputError
from foveate.train.cutmix import CutMixRecipe, CutMixSettings
from foveate.train.recognition import drawn, largest_box, localisation, single_objects
from foveate.train.tiny_vit import normalised


def recipe(**overrides: Any) -> CutMixRecipe:
    torch.manual_seed(0)
    return CutMixRecipe(CutMixSettings(**(CutMixRecipe.smoke | overrides)), 3)


def test_pictures_are_scenes_with_one_object() -> None:
    made = single_objects("test", 0, 4)
    scenes = Scenes("test", 0, objects=(1, 1), size=96)
    singles = [scene for scene in (scenes[k] for k in range(8)) if len(scene.objects) == 1][:4]
    for k, scene in enumerate(singles):
        assert torch.equal(made["image"][k].permute(1, 2, 0), torch.from_numpy(scene.image))
        assert NAMES[int(made["label"][k])] == scene.objects[0].name
        assert tuple(made["box"][k].tolist()) == scene.objects[0].box


def test_every_epoch_sees_every_picture_once() -> None:
    seen = torch.cat([drawn(10, 1, step, 4) for step in range(5)])
    assert sorted(seen[:10].tolist()) == list(range(10)) == sorted(seen[10:].tolist())
    assert seen[:10].tolist() != seen[10:].tolist()
    made = recipe(batch=5)
    whole = made.batch(1, 0, 1)["label"]
    assert torch.equal(whole, made.pictures["label"][drawn(6, 3, 1, 5)])
    assert torch.equal(made.batch(1, 1, 2)["label"], whole[1::2])


def test_without_augmentation_the_loss_is_cross_entropy() -> None:
    made = recipe(augment="none")
    batch = made.batch(0, 0, 1)
    with torch.no_grad():
        wanted = float(F.cross_entropy(made.tower(normalised(batch["image"])), batch["label"]))
        assert float(made.loss(made.model, batch)[0]) == pytest.approx(wanted, abs=1e-6)
        for augment in ("cutmix", "mixup", "cutout"):
            other = recipe(augment=augment, probability=1.0)
            other.tower.load_state_dict(made.tower.state_dict())
            # The weights are the same, so that a difference is the augmentation's.
            assert abs(float(other.loss(other.model, batch)[0]) - wanted) > 1e-6, augment
    with pytest.raises(InputError, match="augment must be one of"):
        CutMixSettings(augment="flip")


class Knows:
    """A "ViT" whose patches' logits are large on the object, or one cell beside it where it is wrong."""

    num_prefix_tokens = 0
    patch_embed = SimpleNamespace(grid_size=(12, 12))

    def __init__(self, data: dict[str, Tensor], wrong: int) -> None:
        self.data, self.wrong = data, wrong

    def forward_features(self, pixels: Tensor) -> Tensor:
        tokens = torch.zeros(len(pixels), 12, 12, 40)
        for k in range(len(pixels)):
            x1, y1, x2, y2 = (self.data["box"][k] / 8).round().int().tolist()
            if k < self.wrong:
                tokens[k, 0, 0] = 1
            else:
                tokens[k, y1:y2, x1:x2, self.data["label"][k]] = 1
        return tokens.flatten(1, 2)

    def head(self, tokens: Tensor) -> Tensor:
        return tokens


def test_localisation_of_a_model_that_knows() -> None:
    boxes = torch.tensor([[8, 16, 40, 64], [40, 40, 88, 88], [16, 32, 80, 56], [24, 24, 64, 80]])
    data = {"image": torch.zeros(4, 3, 96, 96, dtype=torch.uint8), "label": torch.arange(4), "box": boxes}
    knows: Any = Knows(data, 0)
    result = localisation(knows, data, data, torch.tensor([True, False, True, True]))
    assert (result["located_of_known_class"], result["located_and_named"]) == (1.0, 0.75)
    half: Any = Knows(data, 2)
    assert localisation(half, data, data, torch.ones(4).bool())["located_of_known_class"] == 0.5
    heat = torch.zeros(8, 10)
    heat[1, 1] = heat[4:7, 3:9] = 1
    assert largest_box(heat, 0.5) == (3, 4, 9, 7) and largest_box(heat, 2.0) == (0, 0, 0, 0)


def test_smoke(tmp_path: Path) -> None:
    metrics = train.run("cutmix", out=tmp_path, smoke=True, threads=1)
    assert metrics["pictures"] == 8 and 0 <= metrics["accuracy"] <= 1
    assert 0 <= metrics["located_and_named"] <= metrics["located_of_known_class"] <= 1
    assert (tmp_path / "model.safetensors").is_file()
