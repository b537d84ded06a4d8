"""The zoo's LLaVA-OneVision: format of the folder, tokenizer, processors, and that the shipped weights answer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaOnevisionForConditionalGeneration

from foveate import zoo
from foveate.data.scenes import clip_words, held_out_clip_questions, held_out_questions, words
from foveate.zoo.llava import build_tokenizer
from foveate.zoo.onevision import build_processor

SHOWN = [0, 2, 4, 6, 9, 11, 13, 15]
QUESTION = "what moves left ?"
needs_weights = pytest.mark.skipif("tiny-onevision" not in zoo.names(), reason="the weights are not there")


@pytest.fixture(scope="module")
def onevision() -> LlavaOnevisionForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(zoo.path("tiny-onevision"), local_files_only=True).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(zoo.path("tiny-onevision"), local_files_only=True)


def test_every_word_of_pictures_and_clips_is_one_token():
    tokenizer = build_processor(clip_words()).tokenizer
    for word in {*words(), *clip_words()}:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        assert len(ids) == 1 and ids[0] != tokenizer.unk_token_id
        assert tokenizer.decode(ids) == word
    assert (tokenizer.image_token, tokenizer.video_token) == ("<image>", "<video>")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(f"USER: <video>\n{QUESTION} ASSISTANT:")["input_ids"])
    assert tokens == ["<s>", "user", ":", "<video>", "what", "moves", "left", "?", "assistant", ":"]
    assert "<video>" not in build_tokenizer(words()).get_vocab()


def test_frames_and_pictures_reach_the_tower_unchanged():
    """Base and crop of a picture are the picture; frames are the frames; both scaled to -1..1."""
    processor = build_processor(clip_words())
    picture = held_out_questions("test", 1)[0].image
    frames = held_out_clip_questions("test", 1)[0].frames[SHOWN]
    made = processor(images=picture, videos=[frames], text="USER: <image>\n<video>\n", return_tensors="pt")

    def scaled(pixels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(pixels).movedim(-1, -3).float() / 127.5 - 1

    assert made["pixel_values"].shape == (1, 2, 3, 96, 96)
    assert torch.allclose(made["pixel_values"], scaled(picture).expand(1, 2, -1, -1, -1), atol=1e-5)
    assert torch.allclose(made["pixel_values_videos"][0], scaled(frames), atol=1e-5)
    tokenizer = processor.tokenizer
    counts = [int((made["input_ids"] == tokenizer.convert_tokens_to_ids(t)).sum()) for t in ("<image>", "<video>")]
    assert counts == [2 * 144 + 12, 8 * 36 + 1]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_chat_template_gives_the_trained_prompt(kind):
    processor = build_processor(clip_words())
    chat = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": QUESTION}]}]
    prompt = f"USER: <{kind}>\n{QUESTION} ASSISTANT:"
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == prompt
    answered = [*chat, {"role": "assistant", "content": [{"type": "text", "text": "dog"}]}]
    assert processor.apply_chat_template(answered) == prompt + " dog </s>"


@needs_weights
def test_folder_is_what_docs_say(onevision, processor):
    config = onevision.config
    assert type(onevision) is LlavaOnevisionForConditionalGeneration
    assert type(processor).__name__ == "LlavaOnevisionProcessor"
    assert config.vision_feature_layer == -2 and config.image_grid_pinpoints == [[96, 96]]
    assert config.text_config.num_hidden_layers == 8 and config.text_config.model_type == "llama"
    assert torch.equal(onevision.lm_head.weight, onevision.get_input_embeddings().weight)
    inputs = processor(images=Image.new("RGB", (96, 96)), text="USER: <image>\n", return_tensors="pt")
    assert int((inputs["input_ids"] == config.image_token_id).sum()) == 300
    assert (zoo.path("tiny-onevision") / "model.safetensors").stat().st_size <= 25e6
    with safe_open(zoo.path("tiny-onevision") / "model.safetensors", "pt") as weights:
        assert all(weights.get_tensor(key).dtype == torch.float32 for key in weights.keys())  # noqa: SIM118


@needs_weights
def test_tower_is_that_of_tiny_llava(onevision):
    llava = zoo.load("tiny-llava").model.vision_tower.state_dict()
    tower = onevision.model.vision_tower.state_dict()
    assert llava.keys() == tower.keys() and all(torch.equal(tower[key], llava[key]) for key in tower)


@needs_weights
@pytest.mark.parametrize("kind", ["pictures", "clips"])
def test_shipped_weights_answer(onevision, processor, kind):
    """A sample of the held-out questions agrees with `metrics.json`, with plain transformers calls."""
    count, moving = 112, kind == "clips"
    questions = held_out_clip_questions("test", count) if moving else held_out_questions("test", count)
    right = 0
    for first in range(0, count, 28):
        asked = questions[first : first + 28]
        shown = {"videos": [q.frames[SHOWN] for q in asked]} if moving else {"images": [q.image for q in asked]}
        inputs = processor(
            text=[f"USER: <{'video' if moving else 'image'}>\n{q.prompt} ASSISTANT:" for q in asked],
            padding=True,
            return_tensors="pt",
            **shown,
        )
        made = onevision.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(made, skip_special_tokens=True)
        right += sum(text.strip() == q.answer for text, q in zip(texts, asked))
    metrics = json.loads((zoo.path("tiny-onevision") / "metrics.json").read_text())
    assert metrics["frames"] == SHOWN
    assert metrics[kind]["questions"] >= 2000
    accuracy = metrics[kind]["accuracy"]
    # Four standard deviations of a share of that many questions.
    assert abs(right / count - accuracy) < 4 * (accuracy * (1 - accuracy) / count) ** 0.5


@needs_weights
def test_a_picture_and_a_clip_in_one_batch(onevision, processor):
    """They get the logits that they get alone."""
    picture, clip = held_out_questions("test", 1)[0], held_out_clip_questions("test", 1)[0]
    prompts = [f"USER: <image>\n{picture.prompt} ASSISTANT:", f"USER: <video>\n{clip.prompt} ASSISTANT:"]
    frames = clip.frames[SHOWN]
    with torch.no_grad():
        both = processor(images=[picture.image], videos=[frames], text=prompts, padding=True, return_tensors="pt")
        together = onevision(**both).logits[:, -1]
        still = onevision(**processor(images=[picture.image], text=prompts[:1], return_tensors="pt")).logits[:, -1]
        moving = onevision(**processor(videos=[frames], text=prompts[1:], return_tensors="pt")).logits[:, -1]
    torch.testing.assert_close(together, torch.cat([still, moving]), rtol=1e-3, atol=1e-3)
