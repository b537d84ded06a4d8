"""The recipe of `tiny-llava`: packing is the same as asking one by one, the start, and a complete smoke run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

from foveate import train, zoo
from foveate.data.scenes import NAMES, QUESTION_TYPES, Question, Scenes
from foveate.method import InputError
from foveate.train.loop import write_json, write_tensors
from foveate.train.packing import pack, segment_mask
from foveate.train.tiny_llava import TinyLlava, TinyLlavaSettings, name_boxes
from foveate.train.tiny_vit import normalised

PICTURE = ("<image>", 144)


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    """A random tower of 16 dimensions; its weights are enlarged so that different pictures give different features."""
    folder = tmp_path_factory.mktemp("tower")
    config = {"img_size": 96, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 40}
    torch.manual_seed(0)
    model = zoo.build_vit(config)
    write_tensors(folder / "model.safetensors", {key: 2 * value for key, value in model.state_dict().items()})
    write_json(folder / "config.json", {"name": "tiny-vit", **config})
    return folder


@pytest.fixture(scope="module")
def recipe(tower) -> TinyLlava:
    settings = dataclasses.replace(TinyLlavaSettings(**TinyLlava.smoke), tower=str(tower), batch=3, layers=3)
    torch.manual_seed(1)
    return TinyLlava(settings, seed=0)


def test_packed_questions_give_the_logits_of_separate_prompts(recipe):
    """The reference is what a user does: the processor's prompt of one question, one forward pass each."""
    llava, processor = recipe.llava, recipe.processor
    scenes = [Scenes("train", 5)[i] for i in range(3)]
    batch = pack([s.questions for s in scenes], recipe.tokenizer, [PICTURE] * 3, QUESTION_TYPES)
    pictures = normalised(torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2))
    with torch.no_grad():
        packed = llava(
            input_ids=batch["ids"],
            pixel_values=pictures,
            attention_mask=segment_mask(batch["segment"]),
            position_ids=batch["position"],
            use_cache=False,
        ).logits
        compared = 0
        for row, scene in enumerate(scenes):
            for number, question in enumerate(scene.questions, 1):
                inputs = processor(
                    images=scene.image,
                    text=f"USER: <image>\n{question.question} ASSISTANT: {question.answer}",
                    return_tensors="pt",
                )
                alone = llava(**inputs).logits[0, -2:]
                places = (batch["segment"][row] == number) & (batch["labels"][row] >= 0)
                assert torch.allclose(packed[row, places], alone, atol=1e-4)
                word, end = recipe.tokenizer.convert_ids_to_tokens(batch["labels"][row, places])
                assert (word, end) == (question.answer, "</s>")
                compared += 1
    assert compared == len(batch["kinds"]) > 15


def test_packed_kinds_follow_the_questions(recipe):
    scenes = [Scenes("train", 5)[i] for i in range(3)]
    expected = [QUESTION_TYPES.index(q.type) for s in scenes for q in s.questions]
    packed = pack([s.questions for s in scenes], recipe.tokenizer, [PICTURE] * 3, QUESTION_TYPES)
    assert packed["kinds"].tolist() == expected


def test_pack_refuses_unknown_words(recipe):
    with pytest.raises(InputError, match="zebra"):
        pack([(Question("presence", "is there a zebra ?", "no"),)], recipe.tokenizer, [PICTURE], QUESTION_TYPES)
    with pytest.raises(InputError, match="top left"):
        pack([(Question("where", "where is the dog ?", "top left"),)], recipe.tokenizer, [PICTURE], QUESTION_TYPES)


def test_boxes_are_at_the_names_in_questions(recipe):
    """By a walk over the words of every question; names that occur twice and answers have none."""
    scenes = [Scenes("train", 5)[i] for i in range(6)]
    packed = pack([s.questions for s in scenes], recipe.tokenizer, [PICTURE] * 6, QUESTION_TYPES)
    boxes = name_boxes(packed, scenes, recipe.tokenizer)
    expected = torch.zeros_like(boxes)
    for row, scene in enumerate(scenes):
        place = 147
        names = [thing.name for thing in scene.objects]
        for question in scene.questions:
            for word in question.question.split():
                if names.count(word) == 1:
                    x1, y1, x2, y2 = scene.objects[names.index(word)].box
                    expected[row, place] = torch.tensor([x1 + x2, y1 + y2, 2 * (x2 - x1), 2 * (y2 - y1)]) / 192
                place += 1
            place += 3  # assistant : answer
    assert torch.allclose(boxes, expected) and int((boxes[..., 2] > 0).sum()) > 20


def test_segment_mask_by_loops():
    segment = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 0, 1, -1, -1, -1]])
    mask = segment_mask(segment)
    for b in range(2):
        for i in range(6):
            for j in range(6):
                looks = j <= i and (segment[b, j] == 0 or segment[b, j] == segment[b, i])
                assert bool(mask[b, 0, i, j]) == bool(looks)


def test_a_visual_token_starts_out_near_the_identity_map(recipe, tower):
    """Projected features keep the angles of the centred features, and names the angles of the class directions."""
    vit = zoo.load_folder(tower)
    pictures = normalised(torch.from_numpy(np.stack([recipe.scenes[i].image for i in range(8)])).permute(0, 3, 1, 2))
    with torch.no_grad():
        features = vit.layers(pictures)[0][:, 1:].flatten(0, 1)
        projected = recipe.llava.model.multi_modal_projector(features)
    centred = features - features.mean(0)
    assert float(torch.cosine_similarity(centred, projected - projected.mean(0)).mean()) > 0.9
    rows = recipe.llava.get_input_embeddings().weight[recipe.tokenizer.convert_tokens_to_ids(list(NAMES))]
    directions = vit.early_patch_head.weight - vit.early_patch_head.weight.mean(0)
    assert float(torch.cosine_similarity(rows, directions[1:]).min().detach()) > 0.999


def test_only_language_model_and_projector_learn(recipe, tower):
    before = {key: value.clone() for key, value in recipe.llava.state_dict().items()}
    losses, _ = recipe.loss(recipe.model, recipe.batch(0, 0, 1))
    losses.backward()
    for name, parameter in recipe.llava.named_parameters():
        assert (parameter.grad is None) == ("vision_tower" in name), name
    recipe.model.zero_grad()
    assert all(torch.equal(value, before[key]) for key, value in recipe.llava.state_dict().items())


def test_processes_share_a_batch(recipe):
    """Two processes see together what one process sees."""
    whole = recipe.batch(4, 0, 1)["image"]
    shares = [recipe.batch(4, rank, 2)["image"] for rank in (0, 1)]
    assert torch.equal(whole[0::2], shares[0]) and torch.equal(whole[1::2], shares[1])


def test_smoke_run_is_complete(tmp_path, tower):
    metrics = train.run("tiny-llava", out=tmp_path, smoke=True, tower=str(tower), threads=1)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert metrics["questions"] == 14 and 0 <= metrics["accuracy"] <= 1
    model = zoo.load_folder(tmp_path)
    assert model.config.text_config.num_hidden_layers == 2
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]


def test_wrong_settings_are_one_line(tmp_path, tower):
    for overrides, named in (
        ({"tower": str(tmp_path)}, "tower"),
        ({"width": 18, "heads": 4}, "width"),
        ({"layers": 0}, "layers"),
        ({"width": 32, "tower": str(tower)}, "width"),
    ):
        with pytest.raises(InputError, match=named) as error:
            train.run("tiny-llava", out=tmp_path / "out", smoke=True, **overrides)
        assert "\n" not in str(error.value)
