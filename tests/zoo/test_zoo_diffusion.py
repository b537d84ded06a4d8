"""What the zoo's diffusion pipelines are built of, and what one is told where diffusers is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from foveate import zoo
from foveate.data.scenes import caption_words
from foveate.zoo.dit import TEXT_WIDTH, build_dit, build_dit_pipeline
from foveate.zoo.sd import build_sd_pipeline, build_unet
from foveate.zoo.text import build_caption_tokenizer, build_clip, build_gemma
from foveate.zoo.vae import build_vae


def test_tokenizer_has_a_token_a_word() -> None:
    tokenizer = build_caption_tokenizer(caption_words())
    ids = tokenizer("A Dog and an apple on gray", padding="max_length", return_tensors="pt")
    words = tokenizer.convert_ids_to_tokens(ids["input_ids"][0].tolist())
    assert words == ["<s>", "a", "dog", "and", "an", "apple", "on", "gray", "</s>", "<pad>", "<pad>", "<pad>"]
    assert ids["attention_mask"][0].tolist() == [1] * 9 + [0] * 3
    assert tokenizer("zebra , dog")["input_ids"][1:3] == [tokenizer.unk_token_id] * 2


def test_text_encoders_are_causal_and_see_no_padding() -> None:
    tokenizer = build_caption_tokenizer(caption_words())
    short, long = (tokenizer(text, return_tensors="pt")["input_ids"] for text in ("a dog", "a dog and an apple"))
    padded = tokenizer("a dog", padding="max_length", return_tensors="pt")
    with torch.no_grad():
        for encoder in (build_clip(tokenizer, width=16), build_gemma(tokenizer, width=16)):
            states = [encoder.eval()(ids).last_hidden_state[0] for ids in (short, long)]
            assert torch.allclose(states[0][:3], states[1][:3], atol=1e-5)
            whole = encoder(padded["input_ids"], attention_mask=padded["attention_mask"]).last_hidden_state[0]
            assert torch.allclose(whole[:4], states[0], atol=1e-5)


def test_only_what_lumina_reads_of_gemma_is_trained() -> None:
    tokenizer = build_caption_tokenizer(caption_words())
    encoder = build_gemma(tokenizer, width=16)
    ids = tokenizer("a dog", return_tensors="pt")["input_ids"]
    encoder(ids, output_hidden_states=True).hidden_states[-2].square().sum().backward()
    for parameter in encoder.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad


def test_transformer_begins_at_zero_and_stays_in_its_grid() -> None:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    model = build_dit(layers=2, width=16, heads=2)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    tokens: list[int] = []
    model.layers[0].register_forward_hook(lambda _m, _a, out: tokens.append(out.shape[1]))
    with torch.no_grad():
        found = model(
            hidden_states=torch.randn(2, 4, 16, 16),
            timestep=torch.rand(2),
            encoder_hidden_states=torch.randn(2, 5, TEXT_WIDTH),
            encoder_mask=torch.ones(2, 5),
            image_rotary_emb=get_2d_rotary_pos_embed_lumina(8, 16, 16),
            cross_attention_kwargs={},
        ).sample
    assert found.shape == (2, 8, 16, 16)
    assert not found.any()
    assert tokens == [64]


def test_unet_attends_to_the_caption_at_two_resolutions() -> None:
    unet = build_unet(width=16, heads=2, text_width=16)
    places: list[int] = []
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_hook(lambda _m, _a, out: places.append(out.shape[1]))
    with torch.no_grad():
        unet(torch.randn(1, 4, 16, 16), 10, torch.randn(1, 5, 16))
    assert places == [256, 64, 64, 64, 64, 256, 256]


@pytest.mark.parametrize("kind", ["dit", "sd"])
def test_a_saved_pipeline_loads_and_draws_the_same(kind: str, tmp_path: Path) -> None:
    vae, tokenizer = build_vae(8), build_caption_tokenizer(caption_words())
    if kind == "dit":
        transformer = build_dit(layers=2, width=16, heads=2)
        torch.nn.init.normal_(transformer.norm_out.linear_2.weight, std=0.2)
        made = build_dit_pipeline(transformer, vae, tokenizer)
    else:
        made = build_sd_pipeline(build_unet(width=8, heads=2, text_width=16), vae, tokenizer)
    made.save_pretrained(tmp_path)
    loaded = zoo.load_folder(tmp_path)
    assert type(loaded) is type(made)
    pictures = [
        pipeline("a dog", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for pipeline in (made, loaded)
    ]
    assert pictures[0].shape == (1, 3, 64, 64)
    assert torch.equal(*pictures)


def test_without_diffusers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "diffusers")

    class NoDiffusers:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "diffusers":
                raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    monkeypatch.setattr(sys, "meta_path", [NoDiffusers, *sys.meta_path])
    with pytest.raises(ValueError, match=r"pip install 'foveate\[diffusers\]'") as caught:
        zoo.load_folder(tmp_path)
    assert "\n" not in str(caught.value)
