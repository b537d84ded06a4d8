"""Generators of pictures as transformers models: prompts, guidance by default, and what `generate` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from foveate import zoo
from foveate.data.scenes import caption_words
from foveate.method import InputError
from foveate.train.tiny_vae import save
from foveate.zoo.ar import VQ, PictureGenerator, build_ar, build_tokenizer, load_generator
from foveate.zoo.vq import build_vq, decode


def built() -> PictureGenerator:
    torch.manual_seed(0)
    tokenizer, vq = build_tokenizer(caption_words()), build_vq(width=8, codes=12, pitch=8).eval()
    model = build_ar(tokenizer, vq, grid=(2, 3), layers=2, width=16, heads=2)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.5)
    return PictureGenerator(model, tokenizer, vq)


@pytest.fixture(scope="module")
def generator() -> PictureGenerator:
    return built()


def test_prompts_end_where_the_picture_begins(generator: PictureGenerator) -> None:
    tokenizer: Any = generator.tokenizer
    found = generator.prompts(["a dog", "an apple and a dog on gray", ""])
    words = [["a", "dog", "<s>"], ["an", "apple", "and", "a", "dog", "on", "gray", "<s>"], ["<s>"]]
    for row, mask, wanted in zip(found["input_ids"].tolist(), found["attention_mask"].tolist(), words):
        assert tokenizer.convert_ids_to_tokens(row) == ["<pad>"] * (8 - len(wanted)) + wanted
        assert mask == [0] * (8 - len(wanted)) + [1] * len(wanted)
    assert len(tokenizer) + 12 == generator.model.config.vocab_size
    assert generator.codes == (len(tokenizer), len(tokenizer) + 12) and generator.grid == (2, 3)


def next_logits(model: Any, ids: list[int]) -> Tensor:
    """Without a cache and without padding."""
    return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(0)


@torch.no_grad()
def test_generate_is_guided_sampling_of_codes(generator: PictureGenerator) -> None:
    """Greedy, so that it is comparable: caption and empty prompt, mixed by the formula, words left out."""
    model, (first, end) = generator.model, generator.codes
    captions = ["a dog", "an apple and a dog on gray"]
    for scale in (3.0, 1.0):
        settings = {} if scale == 3.0 else {"guidance_scale": scale}
        found = model.generate(**generator.prompts(captions), do_sample=False, **settings)
        for row, caption in zip(found[:, -6:].tolist(), captions):
            prompt = generator.prompts([caption])["input_ids"][0].tolist()
            for k in range(6):
                with_caption = next_logits(model, prompt + row[:k])
                without = next_logits(model, prompt[-1:] + row[:k])
                mixed = without + scale * (with_caption - without)
                assert int(mixed[first:end].argmax()) + first == row[k]


def test_pictures_are_of_the_last_codes(generator: PictureGenerator) -> None:
    torch.manual_seed(1)
    sequences: Any = generator.model.generate(**generator.prompts(["a dog", "a fox on gray"]))
    codes = generator.codes_of(sequences)
    assert (codes.grid, codes.size, codes.codebook_size) == ((2, 3), (16, 24), 12)
    assert torch.equal(codes.ids + generator.codes[0], sequences[:, -6:])
    assert torch.equal(generator.pictures(sequences), decode(generator.vq, codes))
    with pytest.raises(InputError, match="ids must be in 0"):
        generator.pictures(sequences[:, :-1])


def test_drawing_is_sampling_from_a_seed(generator: PictureGenerator) -> None:
    captions = ["a dog", "a fox", "a car"]
    state = torch.get_rng_state()
    one = generator.draw(captions, seed=4, batch=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.shape == (3, 3, 16, 24) and torch.equal(one, generator.draw(captions, seed=4, batch=2))
    assert not torch.equal(one, generator.draw(captions, seed=5, batch=2))
    greedy = generator.draw(captions, do_sample=False)
    assert torch.equal(greedy, generator.draw(captions, seed=7, do_sample=False))


def test_a_folder_gives_back_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = built()
    (tmp_path / VQ).mkdir()
    save(generator.model, tmp_path)
    save(generator.tokenizer, tmp_path)
    save(generator.vq, tmp_path / VQ)
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} <= {".json", ".safetensors"}
    loaded = load_generator(tmp_path)
    assert not loaded.model.training and loaded.grid == (2, 3) and loaded.codes == generator.codes
    captions = ["a dog at the top left", "a fox"]
    assert torch.equal(loaded.draw(captions, seed=2), generator.draw(captions, seed=2))
    # One that was trained with the zoo's tokenizer has no copy of it.
    (tmp_path / VQ).rename(tmp_path / "elsewhere")
    monkeypatch.setattr(zoo, "path", {"tiny-vq": tmp_path / "elsewhere"}.__getitem__)
    assert torch.equal(load_generator(tmp_path).draw(captions, seed=2), loaded.draw(captions, seed=2))
    (tmp_path / "elsewhere").rename(tmp_path / VQ)
    with pytest.raises(InputError, match="no generator of pictures"):
        load_generator(tmp_path / VQ)
    with torch.no_grad():
        next(generator.vq.parameters()).add_(1)
    save(generator.vq, tmp_path / VQ)
    with pytest.raises(InputError, match="codes of another tiny-vq"):
        load_generator(tmp_path)
