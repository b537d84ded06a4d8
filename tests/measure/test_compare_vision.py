"""Recognition and segmentation compared: figures against slow loops, hosts of all kinds, folders, trained models."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import foveate
from foveate import zoo
from foveate.data.picture_folder import labelled_pictures, masked_pictures, patch_majority, read_mask
from foveate.data.scenes import Scenes, patch_labels, presence
from foveate.measure.compare_vision import VisionComparison, compare_vision, tokens_by_layer
from foveate.measure.comparison import TaskRow, choose
from foveate.measure.vision_goals import RECOGNITION, Recognition, Segmentation, goal_of, nearest_source
from foveate.measure.vision_models import Trained, VisionModel, fitted, load_trained, load_vision_model
from foveate.measure.vision_samples import class_numbers, folder_samples, scene_samples
from foveate.method import InputError
from foveate.methods.reduce.dtop import Dtop
from foveate.methods.reduce.sit_slim import SitSlim
from foveate.methods.reduce.stvit import STViT
from foveate.train.tiny_vit import normalised, scene_batch

FEW: dict[str, Any] = {"timing_pairs": 1, "batch_size": 8}


@pytest.fixture(scope="module")
def tiny() -> VisionModel:
    return load_vision_model()


def compared(goal: Any, count: int = 12, *arguments: Any, **settings: Any) -> VisionComparison:
    samples, notes = scene_samples(goal, count)
    return compare_vision(goal, samples, *arguments, notes=notes, **FEW | settings)[0]


def row(of: VisionComparison, method: str) -> TaskRow:
    return next(one for one in of.rows if one.method == method)


def picture(file: Path, seed: int = 0, size: tuple[int, int] = (40, 30)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


# -- figures


def _precision(score: list[float], truth: list[float]) -> float:
    """Average precision by its definition: over the right ones, precision down to each."""
    order = sorted(range(len(score)), key=lambda k: -score[k])
    hits, total = 0, 0.0
    for place, k in enumerate(order, 1):
        if truth[k]:
            hits += 1
            total += hits / place
    return total / hits


def test_recognition_of_scenes_against_slow_loops(tiny: VisionModel) -> None:
    comparison = compared(Recognition(tiny), 24, ["tome"], budgets=(0.25,), baselines=("random",))
    scenes = [Scenes("test", 0)[k] for k in range(24)]
    pixels = normalised(scene_batch(scenes)["image"])
    truth = np.stack([presence(scene) for scene in scenes])
    with torch.inference_mode():
        dense = tiny.model(pixels).double()
        with foveate.apply(tiny.model, "random", keep=0.25, place="patches"):
            fewer = tiny.model(pixels).double()
    said = row(comparison, "random")
    there = [k for k in range(40) if truth[:, k].any()]
    wanted = [_precision(fewer[:, k].tolist(), truth[:, k].tolist()) for k in there]
    assert said.figures["mAP"] == pytest.approx(sum(wanted) / len(there), abs=1e-4)
    same = [
        set((a > 0).nonzero().flatten().tolist()) == set((b > 0).nonzero().flatten().tolist())
        for a, b in zip(dense, fewer)
    ]
    assert said.figures["agreement"] == pytest.approx(sum(same) / 24)
    kl = 0.0
    for a, b in zip(dense.flatten().tolist(), fewer.flatten().tolist()):
        p, q = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
        kl += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert said.figures["KL"] == pytest.approx(kl / 24, rel=1e-3)
    assert row(comparison, "dense").figures["agreement"] == 1 and row(comparison, "dense").figures["KL"] == 0
    assert 0.2 < said.flops_ratio < 0.3 and said.visual_share == 0.25  # type: ignore[operator]
    assert said.stages == (("vision.input", 144.0), ("vision.patches", 36.0))
    assert row(comparison, "tome").stages[-1][1] == 36  # type: ignore[index]
    assert len(comparison.overlays) == 2 and sorted(comparison.overlays[0].depth) == [0.0] * 108 + [1.0] * 36


def test_segmentation_puts_classes_back_on_patches(tiny: VisionModel) -> None:
    goal = goal_of("segmentation", tiny)
    comparison = compared(goal, 12, ["tome"], budgets=(0.5,), baselines=("grid", "resolution"))
    scenes = [Scenes("test", 0)[k] for k in range(12)]
    pixels = normalised(scene_batch(scenes)["image"])
    truth = torch.from_numpy(np.stack([patch_labels(scene, 8).ravel() for scene in scenes]))
    with torch.inference_mode():
        dense = tiny.model.segment(pixels).argmax(-1)
        with foveate.apply(tiny.model, "grid", keep=0.5, place="patches") as applied:
            tokens: list[Tensor] = []
            handle = tiny.model.norm.register_forward_hook(lambda *given: tokens.append(given[2]))
            tiny.model(pixels)
            handle.remove()
            classes = tiny.model.patch_head(tokens[0][:, 1:]).argmax(-1)
            source = applied.trace[-1].source
    found = torch.empty_like(truth)
    for b in range(12):
        held = [m for m in range(144) if source[b, m] >= 0]
        for m in range(144):
            near = min(held, key=lambda one: ((one // 12 - m // 12) ** 2 + (one % 12 - m % 12) ** 2, one))
            found[b, m] = classes[b, source[b, near]]
    for method, labels in (("dense", dense), ("grid", found)):
        pairs = list(zip(truth.flatten().tolist(), labels.flatten().tolist()))
        shares = [
            sum(right == said == k for right, said in pairs) / sum(k in pair for pair in pairs)
            for k in sorted({k for pair in pairs for k in pair})
        ]
        assert row(comparison, method).figures["mean IoU"] == pytest.approx(sum(shares) / len(shares), abs=1e-5)
        assert row(comparison, method).figures["patches right"] == pytest.approx(
            float((labels == truth).float().mean())
        )
        assert row(comparison, method).figures["agreement"] == pytest.approx(float((labels == dense).float().mean()))
    assert row(comparison, "resolution").visual_share == pytest.approx(0.5, abs=0.03)
    assert 0.4 < row(comparison, "resolution").flops_ratio < 0.6  # type: ignore[operator]


def test_by_default_methods_act_inside_the_encoder(tiny: VisionModel) -> None:
    comparison = compared(Recognition(tiny), 2, budgets=(0.5,))
    assert {one.method for one in comparison.rows if not one.baseline} == {"tome"}
    behind = compared(Recognition(tiny), 2, ["fopru"], budgets=(0.5,), baselines=())
    assert row(behind, "fopru").flops_ratio >= 1  # type: ignore[operator]


def test_a_dropped_patch_takes_the_nearest_token() -> None:
    source = torch.tensor([[0, -1, -1, -1, -1, 1], [-1, -1, -1, -1, -1, -1]])
    assert nearest_source(source, (2, 3)).tolist() == [[0, 0, 1, 0, 1, 1], [0] * 6]


def test_classes_are_found_by_any_of_their_names() -> None:
    classes = [frozenset({"n01", "tench", "tinca tinca"}), frozenset({"crane"}), frozenset({"crane", "machine"})]
    names = ["Tinca_tinca", "crane", "MACHINE", "n01", "nothing"]
    assert class_numbers(classes, names) == {"Tinca_tinca": 0, "crane": -1, "MACHINE": 2, "n01": 0, "nothing": -1}


def test_of_figures_where_less_is_better_the_least_wins() -> None:
    task = replace(
        RECOGNITION, figures=(replace(RECOGNITION.figures[0], name="error", lower=True, unit="mm", near=1.0),)
    )
    rows = [
        TaskRow(name, 0.5, name == "dense", flops_ratio=cost, figures={"error": error})
        for name, cost, error in (("dense", 1.0, 40.0), ("a", 0.5, 40.9), ("b", 0.4, 41.5), ("c", 0.9, 30.0))
    ]
    choice, why = choose(rows, task)
    assert choice is rows[1] and "within 1 mm of dense (40.0 mm)" in why


# -- hosts


def test_a_classifier_of_transformers_and_a_folder(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    labels = {0: "tabby, tabby cat", 1: "dog", 2: "owl", 3: "newt", 4: "boat", 5: "car", 6: "tree"}
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        id2label=labels, label2id={name: number for number, name in labels.items()},
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "m")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "m")
    for k in range(3):
        picture(tmp_path / f"d/tabby_cat/{k}.png", k)
        picture(tmp_path / f"d/Dog/{k}.png", 10 + k)
        picture(tmp_path / f"d/unicorn/{k}.png", 20 + k)
    host = load_vision_model(str(tmp_path / "m"))
    goal = goal_of("recognition", host)
    samples, notes = folder_samples(goal, tmp_path / "d")
    assert "1 of 3 classes are none of" in notes[0] and "unicorn" in notes[0]
    comparison, pictures = compare_vision(goal, samples, ["tome"], budgets=(0.5,), **FEW)
    files = [(Path(one.id), {"tabby_cat": 0, "Dog": 1}.get(Path(one.id).parent.name)) for one in pictures.samples]
    top: dict[int, list[bool]] = {1: [], 5: []}
    with torch.inference_mode():
        for file, right in files:
            logits = model(**processor(images=[Image.open(file)], return_tensors="pt")).logits[0].tolist()
            order = sorted(range(7), key=lambda k: -logits[k])
            if right is not None:
                for most, hits in top.items():
                    hits.append(right in order[:most])
    figures = comparison.rows[0].figures
    assert (figures["top-1"], figures["top-5"]) == tuple(pytest.approx(sum(hits) / 6) for hits in top.values())
    assert row(comparison, "resolution").flops_ratio < 1  # type: ignore[operator]
    assert comparison.rows[0].stages == (("vision.input", 16.0),)
    seen = host.restored(pictures.pixels([0])[0])
    near = np.asarray(Image.open(files[0][0]).resize((32, 32), Image.Resampling.BILINEAR), dtype=int)
    assert np.abs(np.asarray(seen, dtype=int) - near).mean() < 3
    with pytest.raises(InputError, match="no classes for patches"):
        goal_of("segmentation", host)
    assert VisionComparison.from_json(comparison.to_json()) == comparison


def test_a_classifier_of_timm_knows_imagenet(tmp_path: Path) -> None:
    import timm
    from timm.models import save_for_hf

    model = timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=2, img_size=64)
    save_for_hf(model, tmp_path / "m", model_config={"label_names": None}, safe_serialization=True)
    values = json.loads((tmp_path / "m/config.json").read_text())
    values["model_args"] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 64}
    (tmp_path / "m/config.json").write_text(json.dumps(values))
    host = load_vision_model(str(tmp_path / "m"))
    assert class_numbers(host.classes, ["n01440764", "goldfish", "tiger_cat"]) == {
        "n01440764": 0, "goldfish": 1, "tiger_cat": 282,
    }  # fmt: skip
    comparison = compared(Recognition(host), 3, (), budgets=(0.5,))
    assert "agreement with dense and KL only" in comparison.notes[0]
    assert set(comparison.rows[0].figures) == {"agreement", "KL"}
    assert {one.method for one in comparison.rows} == {"dense", "grid", "pool", "random", "resolution"}
    assert all(one.refused is None for one in comparison.rows)


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere", "neither tiny-vit"), (".", "no model here"), ("tiny-llava", "LlavaForConditionalGeneration")],
)
def test_what_is_no_such_model(name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        load_vision_model(name)


# -- trained models


def test_trained_models_stand_beside(tiny: VisionModel, tmp_path: Path) -> None:
    folders = {}
    for name, model in (
        ("sit-slim", SitSlim.named("tiny")),
        ("stvit", STViT.named("tiny")),
        ("dtop", Dtop.named("tiny")),
    ):
        model.load_backbone(zoo.load("tiny-vit"))
        model.save_pretrained(tmp_path / name)
        folders[name] = load_trained(f"{name}={tmp_path / name}")
    comparison = compared(Recognition(tiny), 4, (), list(folders.values()), baselines=())
    slim = row(comparison, "sit-slim")
    pixels = normalised(scene_batch([Scenes("test", 0)[k] for k in range(4)])["image"])
    with torch.inference_mode():
        layers = [float(one.shape[1] - 1) for one in folders["sit-slim"].model.layers(pixels)]
    # What a block ends with, the next one's MLP gets.
    assert [count for _, count in slim.stages][1:] == layers[:-1]  # type: ignore[union-attr]
    assert slim.settings == {"weights": str(tmp_path / "sit-slim")} and slim.flops_ratio < 1  # type: ignore[operator]
    assert [count for _, count in row(comparison, "stvit").stages] == [144, 144, 16, 16, 16]  # type: ignore[union-attr]
    assert "names no picture" in (row(comparison, "dtop").refused or "")
    assert [one.method for one in comparison.overlays] == ["sit-slim", "stvit"]
    segmented = compared(Segmentation(tiny), 4, (), list(folders.values()), baselines=())
    assert "no classes for patches" in (row(segmented, "stvit").refused or "")
    assert "mean IoU" in row(segmented, "dtop").figures and segmented.overlays[0].method == "dtop"
    with pytest.raises(InputError, match="whose weights are these"):
        load_trained(str(tmp_path / "stvit"))
    with pytest.raises(InputError, match="no trained model here"):
        load_trained("nothing/here")


def test_other_models_have_no_layers_to_count() -> None:
    assert tokens_by_layer(nn.Conv2d(3, 1, 1), torch.zeros(1, 3, 4, 4)) == []
    assert Trained("davit", "x", nn.Identity()).patch_head is None


# -- folders


def test_pictures_are_taken_from_all_classes_in_turn(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 1)):
        for k in range(count):
            picture(tmp_path / f"{name}/{k}.png")
    assert [(file.name, label) for file, label in labelled_pictures(tmp_path, 3)] == [
        ("0.png", "a"),
        ("1.png", "a"),
        ("0.png", "b"),
    ]
    assert len(labelled_pictures(tmp_path)) == 4
    (tmp_path / "c").mkdir()
    with pytest.raises(InputError, match="c: no pictures of this class"):
        labelled_pictures(tmp_path)
    with pytest.raises(InputError, match="no folders of classes"):
        labelled_pictures(tmp_path / "c")
    with pytest.raises(InputError, match="no such folder"):
        labelled_pictures(tmp_path / "d")


def test_masks(tmp_path: Path, tiny: VisionModel) -> None:
    picture(tmp_path / "images/one.jpg", size=(96, 96))
    numbers = np.zeros((96, 96), np.uint8)
    numbers[:8, :8] = 7
    numbers[8:16, :6], numbers[8:16, 6:8] = 255, 3
    (tmp_path / "masks").mkdir()
    with pytest.raises(InputError, match=r"one.png: no such mask"):
        masked_pictures(tmp_path)
    Image.fromarray(numbers).save(tmp_path / "masks/one.png")
    goal = Segmentation(tiny)
    samples, _ = folder_samples(goal, tmp_path)
    _, right = samples[0].read()
    assert right[:13].tolist() == [7] + [0] * 11 + [255]
    comparison, _ = compare_vision(goal, samples, (), baselines=(), **FEW)
    with torch.inference_mode():
        said = tiny.model.segment(tiny.prepare(Image.open(tmp_path / "images/one.jpg").convert("RGB"))[None])
    hits = (said.argmax(-1)[0] == right)[right != 255]
    assert comparison.rows[0].figures["patches right"] == pytest.approx(float(hits.float().mean()))
    with pytest.raises(InputError, match=r"class 7; the model has 0\.\.4"):
        read_mask(tmp_path / "masks/one.png", 5)
    with pytest.raises(InputError, match="not mode RGB"):
        read_mask(picture(tmp_path / "c.png"), 5)
    assert patch_majority(np.array([[1, 2], [2, 1]], np.uint8), 2).tolist() == [[1]]


def test_the_middle_square() -> None:
    wide = Image.fromarray(np.arange(60, dtype=np.uint8)[None].repeat(20, 0))
    assert np.asarray(fitted(wide, 20, Image.Resampling.NEAREST))[0].tolist() == list(range(20, 40))
    assert fitted(wide.resize((9, 30)), 12).size == (12, 12)


def test_broken_pictures_are_left_out(tmp_path: Path, tiny: VisionModel) -> None:
    picture(tmp_path / "cat/a.png")
    (tmp_path / "cat/b.png").write_bytes((tmp_path / "cat/a.png").read_bytes()[:200])
    goal = Recognition(tiny)
    comparison, pictures = compare_vision(goal, folder_samples(goal, tmp_path)[0], (), baselines=(), **FEW)
    assert comparison.samples == 1 and list(pictures.broken) == [str(tmp_path / "cat/b.png")]
    (tmp_path / "cat/a.png").unlink()
    with pytest.raises(InputError, match="none of the 1 pictures can be read"):
        compare_vision(goal, folder_samples(goal, tmp_path)[0], (), baselines=(), **FEW)
