"""The recipe of `tiny-onevision`: its start, its visual tokens, its further targets, and a complete smoke run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics")

from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig

from foveate import train, zoo
from foveate.data.scenes import ACTIONS, CLIP_QUESTION_TYPES, Clips, Question, Scenes, clip_words, patch_owner, words
from foveate.method import InputError
from foveate.train.packing import pack, score, segment_mask
from foveate.train.tiny_onevision import (
    SHOWN,
    TYPES,
    TinyOnevision,
    TinyOnevisionSettings,
    carry_places,
    cell_targets,
    chosen,
    name_targets,
    tracks_of,
    visual_tokens,
)
from foveate.zoo.llava import build_llava, build_processor, save_llava
from foveate.zoo.onevision import build_processor as build_onevision_processor
from foveate.zoo.onevision import from_llava

CLIP = ("<video>", 8 * 36 + 1)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A random tiny-llava of 16 dimensions; its tower is enlarged so that pictures give different features."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=96, patch_size=8
    )
    processor = build_processor(words())
    llava = build_llava(vision, processor.tokenizer, layers=3, width=16, heads=2, intermediate=32)
    llava.model.vision_tower.load_state_dict({k: 2 * v for k, v in llava.model.vision_tower.state_dict().items()})
    save_llava(llava, processor, folder)
    return folder


@pytest.fixture(scope="module")
def recipe(start) -> TinyOnevision:
    settings = dataclasses.replace(TinyOnevisionSettings(**TinyOnevision.smoke), start=str(start), batch=5, pictures=2)
    torch.manual_seed(1)
    return TinyOnevision(settings, seed=0)


def test_it_begins_as_the_llava(recipe, start):
    """Tower, language model, rows of known words, and the projector but for two units are the tiny-llava's."""
    llava, onevision = zoo.load_folder(start), recipe.onevision
    for part in ("vision_tower", "language_model.layers", "language_model.norm"):
        ours, theirs = (m.model.get_submodule(part).state_dict() for m in (onevision, llava))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), part
    one, two = (m.model.multi_modal_projector for m in (onevision, llava))
    changed = (one.linear_1.weight != two.linear_1.weight).any(1)
    assert torch.equal(changed, (one.linear_2.weight != two.linear_2.weight).any(0)) and int(changed.sum()) == 2
    old, new = build_processor(words()).tokenizer.get_vocab(), recipe.tokenizer.get_vocab()
    assert set(new) == {*old, *clip_words(), "<video>"}
    before, after = llava.get_input_embeddings().weight, onevision.get_input_embeddings().weight
    assert all(torch.equal(after[row], before[old[word]]) for word, row in new.items() if word in old)
    assert onevision.lm_head.weight is after
    fresh = after[[row for word, row in new.items() if word not in old]]
    assert 0.7 < float((fresh.std() / before.std()).detach()) < 1.3


def test_visual_tokens_say_where_their_objects_are():
    """Of other scenes, centres are read off along the two new directions; what was handed on before is still there."""
    llava = zoo.load("tiny-llava")
    tokenizer = build_onevision_processor(clip_words()).tokenizer
    onevision = from_llava(llava, build_processor(words()).tokenizer, tokenizer)
    scenes = [Scenes("validation", 5)[i] for i in range(24)]
    before = projected(onevision, scenes)
    carry_places(onevision, [Scenes("train", 5)[i] for i in range(64)])
    after = projected(onevision, scenes)
    units = onevision.model.multi_modal_projector.linear_1.weight != llava.model.multi_modal_projector.linear_1.weight
    units = units.any(1)
    directions = onevision.model.multi_modal_projector.linear_2.weight[:, units]
    read = torch.linalg.lstsq(directions, (after - after.mean((0, 1))).flatten(0, 1).T).solution.T.unflatten(
        0, (24, -1)
    )
    seen, true = [], []
    for scene, found in zip(scenes, read):
        owner = patch_owner(scene, 8).ravel()
        for i, thing in enumerate(scene.objects):
            seen.append(found[torch.from_numpy(owner == i)].detach())
            x1, y1, x2, y2 = thing.box
            true += [(x1 + x2, y1 + y2)] * len(seen[-1])
    found = np.corrcoef(torch.cat(seen).T.numpy(), np.array(true).T)[:2, 2:]
    assert sorted(found.argmax(1)) == [0, 1] and found.max(1).min() > 0.85
    rest = torch.linalg.qr(directions, mode="complete").Q[:, 2:]
    kept = torch.cosine_similarity((before - before.mean((0, 1))) @ rest, (after - after.mean((0, 1))) @ rest, dim=-1)
    assert float(kept.mean().detach()) > 0.95


def projected(onevision, scenes) -> torch.Tensor:
    """(scenes, patches, width) what the projector makes of pictures."""
    pictures = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
    with torch.no_grad():
        states = onevision.model.vision_tower(pictures.float() / 127.5 - 1, output_hidden_states=True).hidden_states
        return onevision.model.multi_modal_projector(states[-2][:, 1:])


def test_visual_tokens_are_those_of_processor_and_host(recipe):
    """What a user's pictures and clips become, on the host's own way through all layers of the tower."""
    scenes, clips = [Scenes("train", 5)[i] for i in range(2)], [Clips("train", 5, frames=16)[i] for i in range(2)]
    frames, image = torch.from_numpy(np.stack([c.frames[SHOWN] for c in clips])), torch.from_numpy(
        np.stack([s.image for s in scenes])
    )  # fmt: skip
    with torch.no_grad():
        made = visual_tokens(recipe.onevision, frames.permute(0, 1, 4, 2, 3), image.permute(0, 3, 1, 2))
        pictures = recipe.processor(images=[s.image for s in scenes], text=["USER: <image>\n"] * 2, return_tensors="pt")
        videos = recipe.processor(
            videos=[c.frames[SHOWN] for c in clips], text=["USER: <video>\n"] * 2, return_tensors="pt"
        )
        still = recipe.onevision.get_image_features(pictures["pixel_values"], pictures["image_sizes"]).pooler_output
        moving = recipe.onevision.get_video_features(videos["pixel_values_videos"]).pooler_output
    torch.testing.assert_close(made["video"].pooler_output, moving, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(made["image"].pooler_output, still, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert float(moving.std(1).mean()) > 1e-3
    ids = recipe.onevision.config
    assert (pictures["input_ids"] == ids.image_token_id).sum(1).tolist() == [len(one) for one in still] == [300, 300]
    assert (videos["input_ids"] == ids.video_token_id).sum(1).tolist() == [moving.shape[1]] * 2 == [289, 289]


def test_packed_questions_give_the_logits_of_separate_prompts(recipe):
    """The reference is what a user does: one clip or picture and one question through the processor."""
    batch = recipe.batch(3, 0, 1)
    clips, scenes = [recipe.clips[9 + i] for i in range(3)], [recipe.scenes[6 + i] for i in range(2)]
    with torch.no_grad():
        packed = recipe.onevision(
            input_ids=batch["ids"],
            mm_encoder_outputs=visual_tokens(recipe.onevision, batch["frames"], batch["image"]),
            attention_mask=segment_mask(batch["segment"]),
            position_ids=batch["position"],
            use_cache=False,
        ).logits
        for row, (token, shown) in enumerate(
            [("<video>", {"videos": clip.frames[SHOWN]}) for clip in clips]
            + [("<image>", {"images": s.image}) for s in scenes]
        ):
            for number in (1, int(batch["segment"][row].max())):
                places = (batch["segment"][row] == number) & (batch["labels"][row] >= 0)
                question = recipe.tokenizer.decode(batch["ids"][row, batch["segment"][row] == number])
                inputs = recipe.processor(text=f"USER: {token}\n{question}", return_tensors="pt", **shown)
                alone = recipe.onevision(**inputs).logits[0, -2:]
                assert torch.allclose(packed[row, places], alone, atol=1e-4)


def test_every_type_is_asked_and_no_more_than_so_many_questions(recipe):
    settings = recipe.settings
    assert settings.asked >= 8
    for step in range(5):
        batch = recipe.batch(step, 0, 1)
        for row in range(3):
            questions = recipe.clips[3 * step + row].questions
            assert int(batch["segment"][row].max()) == min(settings.asked, len(questions))
            first = int((batch["segment"][:row].amax(1)).sum()) if row else 0
            kinds = batch["kinds"][first : first + int(batch["segment"][row].max())]
            assert {TYPES[k] for k in kinds} == {f"clip {q.type}" for q in questions}


def test_targets_of_cells_by_loops():
    clips = [Clips("train", 5, frames=16)[i] for i in range(4)]
    made = cell_targets(clips, 6)
    owned = 0
    for c, clip in enumerate(clips):
        for cell in range(8 * 36):
            t, y, x = cell // 36, cell % 36 // 6, cell % 6
            counts = [int(a.masks[SHOWN[t], 16 * y : 16 * y + 16, 16 * x : 16 * x + 16].sum()) for a in clip.actors]
            assert bool(made["cell_owned"][c, cell]) == (max(counts) >= 0.2 * 256)
            if not made["cell_owned"][c, cell]:
                assert not made["cell_last"][c, cell]
                continue
            owned += 1
            actor = clip.actors[int(np.argmax(counts))]
            seen = [i for i in range(8) if actor.boxes[SHOWN[i]].any()]

            def box(i: int, boxes: np.ndarray = actor.boxes[SHOWN]) -> np.ndarray:
                x1, y1, x2, y2 = boxes[i]
                return np.array([x1 + x2, y1 + y2, 2 * (x2 - x1), 2 * (y2 - y1)]) / 192

            before = box(t) - box(t - 1) if t - 1 in seen else np.zeros(4)
            expected = [*before, *(box(t) - box(seen[0]))]
            assert np.allclose(made["cell_changes"][c, cell], expected, atol=1e-6)
            assert bool(made["cell_last"][c, cell]) == (t >= seen[-1] - 1)
            does = [ACTIONS[i] for i in torch.nonzero(made["cell_actions"][c, cell]).flatten()]
            assert set(does) == {action.name for action in actor.actions}
    assert owned > 100


def test_targets_of_names_are_at_the_names_in_questions(recipe):
    clips = [Clips("train", 5, frames=16)[i] for i in range(6)]
    asked = [clip.questions for clip in clips]
    packed = pack(asked, recipe.tokenizer, [CLIP] * 6, CLIP_QUESTION_TYPES)
    made = name_targets(packed, clips, recipe.tokenizer)
    expected = []
    for row, clip in enumerate(clips):
        place = 3 + 289
        names = [actor.name for actor in clip.actors]
        for question in clip.questions:
            for word in question.question.split():
                if names.count(word) == 1:
                    expected.append((row, place, names.index(word)))
                place += 1
            place += 3  # assistant : answer
    assert sorted(map(tuple, made["name_at"].tolist())) == sorted(e[:2] for e in expected) and len(expected) > 10
    which = {e[:2]: e[2] for e in expected}
    for at, track, actions in zip(made["name_at"].tolist(), made["name_tracks"], made["name_actions"]):
        actor = clips[at[0]].actors[which[tuple(at)]]
        assert actions.bool().tolist() == actor.labels.tolist()
        boxes = actor.boxes[[0, 2, 4, 6, 9, 11, 13, 15]]
        assert (track[:, 4] > 0).tolist() == [bool(box.any()) for box in boxes]
        centres = (boxes[:, :2] + boxes[:, 2:]) / 192
        assert np.allclose(track[:, :2], centres, atol=1e-6)
        assert np.allclose(track[:, 2:4] * 96, boxes[:, 2:] - boxes[:, :2], atol=1e-4)
    assert tracks_of(clips[0]).shape == (len(clips[0].actors), 8, 5)


def test_only_language_model_and_projector_learn(recipe):
    loss, parts = recipe.loss(recipe.model, recipe.batch(0, 0, 1))
    loss.backward()
    for name, parameter in recipe.onevision.named_parameters():
        assert (parameter.grad is None) == ("vision_tower" in name), name
    recipe.model.zero_grad()
    assert {"time", "motion", "track", "action", "clip what", "presence"} <= set(parts)


def test_processes_share_a_batch(recipe):
    whole, shares = recipe.batch(4, 0, 1), [recipe.batch(4, rank, 2) for rank in (0, 1)]
    for key in ("frames", "image"):
        assert torch.equal(whole[key][0::2], shares[0][key]) and torch.equal(whole[key][1::2], shares[1][key])
    with pytest.raises(InputError, match="batch"):
        recipe.batch(0, 0, 3)


def test_score_counts_by_type():
    made = score([("a", "yes", "yes"), ("a", "no", "yes"), ("a", "yes", "no"), ("b", "two", "two")], ("b", "a", "c"))
    assert made["accuracy"] == 0.5 and made["questions"] == 4
    assert made["accuracy_by_type"] == {"b": 1.0, "a": 1 / 3}
    assert made["commonest_answer_by_type"] == {"b": 1.0, "a": 2 / 3}
    assert made["commonest_answer"] == 0.75


def test_smoke_run_is_complete_and_loads_with_stock_classes(tmp_path, start):
    metrics = train.run("tiny-onevision", out=tmp_path, smoke=True, start=str(start), threads=1)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert metrics["questions"] == 32 and metrics["frames"] == [0, 2, 4, 6, 9, 11, 13, 15]
    assert metrics["pictures"]["questions"] == metrics["clips"]["questions"] == 16
    assert 0 <= metrics["accuracy"] <= 1
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, local_files_only=True)
    processor = AutoProcessor.from_pretrained(tmp_path, local_files_only=True)
    assert type(model).__name__ == "LlavaOnevisionForConditionalGeneration"
    assert type(processor).__name__ == "LlavaOnevisionProcessor"
    frames = Clips("test", 0, frames=16)[0].frames[SHOWN]
    inputs = processor(videos=[frames], text="USER: <video>\nwhat enters ? ASSISTANT:", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1


def test_wrong_settings_are_one_line(tmp_path):
    for overrides, named in (
        ({"start": str(tmp_path)}, "start"),
        ({"pictures": 3}, "pictures"),
        ({"pictures": 0}, "pictures"),
        ({"picture_share": 1.5}, "picture_share"),
        ({"track_weight": -1.0}, "track_weight"),
        ({"asked": 0}, "asked"),
    ):
        with pytest.raises(InputError, match=named) as error:
            train.run("tiny-onevision", out=tmp_path / "out", smoke=True, **overrides)
        assert "\n" not in str(error.value)


def test_a_question_type_is_asked_once_before_any_is_asked_twice():
    questions = [Question("a", str(i), "x") for i in range(3)] + [Question("b", "3", "x")]
    assert chosen(questions, 2) == [questions[0], questions[3]]
    assert chosen(questions, 3) == [questions[0], questions[1], questions[3]]
    assert chosen(questions, 9) == questions
