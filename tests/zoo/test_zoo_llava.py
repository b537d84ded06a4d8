"""The zoo's LLaVA: format of the folder, tokenizer, processor, and that the shipped weights answer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from foveate import zoo
from foveate.data.scenes import held_out_questions, words
from foveate.zoo.llava import build_processor, build_tokenizer

QUESTION = "is there a dog ?"
PROMPT = f"USER: <image>\n{QUESTION} ASSISTANT:"


@pytest.fixture(scope="module")
def llava() -> LlavaForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(zoo.path("tiny-llava"), local_files_only=True).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(zoo.path("tiny-llava"), local_files_only=True)


def test_every_word_of_the_scenes_is_one_token():
    tokenizer = build_tokenizer(words())
    for word in words():
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        assert len(ids) == 1 and ids[0] != tokenizer.unk_token_id
        assert tokenizer.decode(ids) == word
    assert tokenizer("zebra", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]


def test_tokenizer_lower_cases_and_splits_at_punctuation():
    tokenizer = build_tokenizer(words())
    assert (
        tokenizer("USER: Is there a DOG? ASSISTANT:")["input_ids"]
        == tokenizer("user : is there a dog ? assistant :")["input_ids"]
    )
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(PROMPT)["input_ids"])
    assert tokens == ["<s>", "user", ":", "<image>", "is", "there", "a", "dog", "?", "assistant", ":"]


def test_processor_resizes_without_a_crop_and_scales_to_one():
    picture = np.zeros((48, 192, 3), dtype=np.uint8)
    picture[:, :96] = 255  # the left half: a crop of the middle square would lose the proportions
    made = build_processor(words())(images=Image.fromarray(picture), text=PROMPT, return_tensors="pt")
    pixels = made["pixel_values"][0]
    assert pixels.shape == (3, 96, 96)
    assert torch.allclose(pixels[:, :, :40], torch.ones(3, 96, 40))
    assert torch.allclose(pixels[:, :, 56:], -torch.ones(3, 96, 40))


def test_pictures_of_the_right_size_reach_the_tower_unchanged():
    scene = held_out_questions("test", 1)[0].image
    pixels = build_processor(words())(images=scene, text=PROMPT, return_tensors="pt")["pixel_values"][0]
    expected = torch.from_numpy(scene).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.allclose(pixels, expected, atol=1e-5)


def test_chat_template_gives_the_trained_prompt(processor):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == PROMPT
    answered = [*chat, {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]
    assert processor.apply_chat_template(answered) == PROMPT + " yes </s>"
    chat[0]["content"][0]["image"] = Image.new("RGB", (96, 96))
    made = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    alone = processor(images=Image.new("RGB", (96, 96)), text=PROMPT, return_tensors="pt")
    assert torch.equal(made["input_ids"], alone["input_ids"])  # one <s>, not two
    assert torch.equal(made["pixel_values"], alone["pixel_values"])


def test_folder_is_what_docs_say(llava, processor):
    config = llava.config
    assert config.text_config.num_hidden_layers == 8 and config.vision_feature_layer == -2
    assert llava.lm_head.weight is llava.get_input_embeddings().weight or torch.equal(
        llava.lm_head.weight, llava.get_input_embeddings().weight
    )
    inputs = processor(images=Image.new("RGB", (96, 96)), text=PROMPT, return_tensors="pt")
    assert int((inputs["input_ids"] == config.image_token_id).sum()) == config.image_seq_length == 144
    files = {file.name for file in zoo.path("tiny-llava").iterdir()}
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    assert (zoo.path("tiny-llava") / "model.safetensors").stat().st_size <= 25e6
    with safe_open(zoo.path("tiny-llava") / "model.safetensors", "pt") as weights:
        assert all(weights.get_tensor(key).dtype == torch.float32 for key in weights.keys())  # noqa: SIM118


def test_tower_is_tiny_vit(llava):
    pytest.importorskip("timm")
    vit = zoo.load("tiny-vit")
    pictures = torch.rand(2, 3, 96, 96) * 2 - 1
    with torch.no_grad():
        found = llava.model.vision_tower(pictures, output_hidden_states=True).hidden_states[-2]
        assert torch.allclose(found, vit.layers(pictures)[0], atol=1e-5)


def test_shipped_weights_answer(llava, processor):
    """A sample of the held-out questions agrees with `metrics.json`, with plain transformers calls."""
    questions = held_out_questions("test", 140)
    right = 0
    for first in range(0, 140, 35):
        asked = questions[first : first + 35]
        inputs = processor(
            images=[q.image for q in asked],
            text=[f"USER: <image>\n{q.prompt} ASSISTANT:" for q in asked],
            padding=True,
            return_tensors="pt",
        )
        made = llava.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(made, skip_special_tokens=True)
        right += sum(text.strip() == q.answer for text, q in zip(texts, asked))
    metrics = json.loads((zoo.path("tiny-llava") / "metrics.json").read_text())
    assert metrics["questions"] >= 2000
    # Four standard deviations of a share of 140 questions.
    assert abs(right / 140 - metrics["accuracy"]) < 4 * (metrics["accuracy"] * (1 - metrics["accuracy"]) / 140) ** 0.5
