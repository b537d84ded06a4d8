"""The recipe of `evad`: its data, its rates, its figures with a detector that knows, and a smoke run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("torchmetrics")
pytest.importorskip("pycocotools")

from foveate import train
from foveate.data.ava import from_clip
from foveate.data.scenes import ACTIONS, Clips
from foveate.method import InputError
from foveate.methods.video.evad_detector import EvadDetector, Found, normalised
from foveate.train.evad import VARIANTS, EvadRecipe, EvadSettings, evaluate


def recipe(**overrides: Any) -> EvadRecipe:
    torch.manual_seed(0)
    return EvadRecipe(EvadSettings(**(EvadRecipe.smoke | overrides)), 3)


def test_batches_are_clips_and_processes_share_them() -> None:
    made = recipe(batch=3)
    whole = made.batch(2, 0, 1)
    clips = Clips("train", 3, frames=16, size=48)
    for k in range(3):
        sample = from_clip(clips[6 + k], 2)
        assert torch.equal(whole["clip"][k], sample.clip)
        there = whole["present"][k]
        assert torch.equal(whole["boxes"][k][there], sample.boxes)
        assert torch.equal(whole["labels"][k][there].bool(), sample.labels)
    parts = [made.batch(2, rank, 2)["clip"] for rank in range(2)]
    assert torch.equal(parts[0], whole["clip"][::2]) and torch.equal(parts[1], whole["clip"][1::2])


def test_a_frame_only_model_sees_the_keyframe_and_is_asked_the_same() -> None:
    moving, still = recipe(guide=1.0).batch(1, 0, 1), recipe(guide=1.0, frame_only=True).batch(1, 0, 1)
    # Frame 8 of 16, the fourth of every second one.
    key = torch.from_numpy(Clips("train", 3, frames=16, size=48)[2].frames[8]).permute(2, 0, 1)
    for frame in range(8):
        assert torch.equal(still["clip"][0, :, frame], key)
        assert torch.equal(moving["clip"][0, :, frame], key) == (frame == 4)
    assert all(torch.equal(moving[name], still[name]) for name in moving if name not in ("clip", "shown"))
    slots = still["shown"].view(2, 4, -1)
    assert torch.equal(slots, slots[:, :1].expand_as(slots))
    settings = EvadSettings(**(EvadRecipe.smoke | {"frame_only": True, "test_scenes": 3}))
    knows: Any = Knows(Clips("test", 0, frames=16, size=48), 3)
    evaluate(knows, knows.clips, settings)
    assert len(knows.seen) == 3
    assert all(torch.equal(one, one[:, 4:5].expand_as(one)) for one in knows.seen)


def test_the_loss_is_the_detectors() -> None:
    made = recipe(vary=False)
    batch = made.batch(0, 0, 1)
    loss, parts = made.loss(made.model, batch)
    found = made.detector(normalised(batch["clip"]))
    wanted, _ = made.detector.loss(found, batch["boxes"], batch["labels"], batch["present"])
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5) and set(parts) == {"person", "l1", "giou", "action"}


def test_every_step_has_the_next_dropout_and_the_model_keeps_its_own() -> None:
    made = recipe(keep=0.6)
    for step in (0, 1, 4, 6, len(VARIANTS) + 2):
        made.loss(made.model, made.batch(step, 0, 1))
        wanted = {"keep": 0.6, "select": "attention", "protect_keyframe": True} | VARIANTS[step % len(VARIANTS)]
        used = made.detector.dropout.hyperparameters()
        assert {name: used[name] for name in wanted} == wanted
    assert made.model.dropout.keep == 0.6


def test_which_tokens_show_an_actor() -> None:
    made = recipe()
    assert "shown" not in made.batch(0, 0, 1)
    shown = recipe(guide=0.5).batch(0, 0, 1)["shown"].view(2, 4, 6, 6)
    for number in range(2):
        owner = Clips("train", 3, frames=16, size=48)[number].owner
        for (t, y, x), found in np.ndenumerate(shown[number].numpy()):
            # A slot is two frames of which every second one is seen.
            there = (owner[[4 * t, 4 * t + 2], 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] >= 0).any()
            assert found == there, (number, t, y, x)


@pytest.mark.parametrize(
    "change", [{}, {"keep": 1.0}, {"keep": 0.5}, {"select": "random"}, {"protect_keyframe": False}], ids=str
)
def test_guidance_is_the_divergence_of_scores_from_actors(change: dict[str, Any]) -> None:
    made = recipe(vary=False, guide=0.5, **change)
    detector, batch = made.detector, made.batch(0, 0, 1)
    # On the CPU, random tokens are drawn in the order of the calls.
    torch.manual_seed(0)
    loss, parts = made.loss(made.model, batch)
    torch.manual_seed(0)
    found = detector(normalised(batch["clip"]), guided=True)
    assert not detector(normalised(batch["clip"])).encoded.received
    wanted, _ = detector.loss(found, batch["boxes"], batch["labels"], batch["present"])
    encoded, total = found.encoded, 0.0
    assert len(encoded.received) == 3 and encoded.grid == (4, 6, 6)
    for index, score in encoded.received:
        for clip in range(2):
            places = [int(place) for place in encoded.order[index[clip]]]
            every = change.get("protect_keyframe") is False
            others = [k for k, place in enumerate(places) if every or place // 36 != 2]
            actors = [k for k in others if batch["shown"][clip, places[k]]]
            if not others:
                assert change == {"keep": 0.5} and len(places) == 36
                continue
            mass = sum(float(score[clip, k]) for k in others)
            total += sum(math.log(1 / len(actors) / (float(score[clip, k]) / mass)) / len(actors) for k in actors) / 6
    assert parts["guide"] == pytest.approx(total, rel=1e-4)
    assert float(loss) == pytest.approx(float(wanted) + 0.5 * total, rel=1e-4)


def test_guidance_moves_attention_to_actors() -> None:
    made = recipe(vary=False, guide=1.0, batch=4)
    batch = made.batch(0, 0, 1)
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=3e-3)
    figures = []
    for _ in range(30):
        optimizer.zero_grad()
        loss, parts = made.loss(made.model, batch)
        loss.backward()
        optimizer.step()
        figures.append(parts["guide"])
    assert figures[-1] < 0.7 * figures[0]


def test_rates() -> None:
    made = recipe(head_rate=8.0)
    for name, _ in made.model.named_parameters():
        fast = name.split(".")[1] in ("heads", "decoder", "mask_token")
        assert made.rate(name) == (8.0 if fast else 1.0), name
    with pytest.raises(InputError, match="config must be one of vit-b"):
        EvadSettings(config="huge")
    with pytest.raises(InputError, match="head_rate"):
        EvadSettings(head_rate=0.0)
    with pytest.raises(InputError, match="guide must be >= 0"):
        EvadSettings(guide=-0.1)


class Knows:
    """Finds what there is in the first `right` clips, and nothing in the others."""

    training = False

    def __init__(self, clips: Clips, right: int) -> None:
        self.clips, self.right, self.next = clips, right, 0
        self.seen: list[Tensor] = []

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])

    def train(self, mode: bool = True) -> None:
        pass

    eval = train

    def detect(self, pixels: Tensor, size: Tensor, threshold: float) -> list[Found]:
        found = []
        self.seen += list(pixels)
        for _ in range(len(pixels)):
            sample = from_clip(self.clips[self.next], 2)
            boxes = sample.boxes if self.next < self.right else sample.boxes[:0]
            found.append(Found(boxes, torch.ones(len(boxes)), sample.labels[: len(boxes)].float()))
            self.next += 1
        return found


def test_figures_of_a_detector_that_knows() -> None:
    settings = EvadSettings(**(EvadRecipe.smoke | {"test_scenes": 5}))
    clips = Clips("test", 0, frames=16, size=48)
    knows: Any = Knows(clips, 5)
    result = evaluate(knows, clips, settings)
    does = torch.cat([from_clip(clips[k], 2).labels for k in range(5)]).any(0)
    assert set(result["average_precision"]) == {name for name, some in zip(ACTIONS, does) if some}
    assert result["frame_map"] == pytest.approx(1, abs=2e-3) and result["keyframes"] == 5
    half: Any = Knows(clips, 2)
    boxes = [len(from_clip(clips[k], 2).boxes) for k in range(5)]
    share = sum(boxes[:2]) / sum(boxes)
    assert evaluate(half, clips, settings)["box_average_precision"] == pytest.approx(share, abs=2e-3)


def test_smoke(tmp_path: Path) -> None:
    metrics = train.run("evad", out=tmp_path, smoke=True, threads=1)
    assert [one["dropout"] for one in metrics["by_dropout"]] == list(VARIANTS) and metrics["clips"] == 6
    assert all(0 <= one["frame_map"] <= 1 for one in metrics["by_dropout"])
    assert json.loads((tmp_path / "labels.json").read_text()) == list(ACTIONS)
    model = EvadDetector.from_pretrained(tmp_path)
    assert model.classes == 12 and model.dropout.keep == 0.7 and len(model.backbone.encoder.layer) == 4


def test_a_trained_detector_is_where_training_begins(tmp_path: Path) -> None:
    first = recipe()
    first.detector.save_pretrained(tmp_path)
    torch.manual_seed(1)
    longer = EvadRecipe(EvadSettings(**(EvadRecipe.smoke | {"frames": 16, "stride": 1, "start": str(tmp_path)})), 3)
    assert longer.detector.backbone.config.num_frames == 16
    for (name, ours), theirs in zip(longer.detector.named_parameters(), first.detector.parameters()):
        assert torch.equal(ours, theirs), name
    # Larger clips keep the table of positions.
    larger = recipe(size=64, start=str(tmp_path))
    assert larger.detector.backbone.config.image_size == 48 and larger.batch(0, 0, 1)["clip"].shape[-1] == 64
    larger.loss(larger.model, larger.batch(0, 0, 1))
    with pytest.raises(InputError, match="has another shape"):
        recipe(hidden=32, start=str(tmp_path))
    with pytest.raises(InputError, match="size must be a multiple of 16, not 56"):
        recipe(size=56, start=str(tmp_path))
    with pytest.raises(InputError, match="no model here"):
        recipe(start=str(tmp_path / "nowhere"))
