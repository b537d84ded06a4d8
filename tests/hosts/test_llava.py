"""LLaVA and LLaVA-NeXT against the model's own layers run by hand; see also contract/test_vlm_hosts.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import foveate
from foveate.method import InputError, Method, Stage
from foveate.tokens import Tokens
from running import METHODS, fingerprint, generate, lively, logits, none, odd, supervise
from tiny import IMAGE, LLAVA, VLMS, probe, prompt, single, vlm

ALL = pytest.mark.parametrize("name, settings", METHODS, ids=lambda value: value if isinstance(value, str) else "")
MIXED = [(2, 5), (4,), (0, 3, 6)]
"""One image; none; two, one of which opens the prompt. Of different lengths, so that there is padding."""


@torch.no_grad()
def merged(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(S, D) input embeddings of one sample with the pictures in their places, by the unchanged model."""
    embeds = model.get_input_embeddings()(inputs["input_ids"])[0].clone()
    tower = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    features = torch.cat(list(model.model.get_image_features(**tower, return_dict=True).pooler_output))
    embeds[inputs["input_ids"][0] == IMAGE] = features
    return embeds


@torch.no_grad()
def by_hand(model: Any, embeds: Tensor, left: dict[int, list[int]], renumber: bool) -> Tensor:
    """(S', V) logits: layer after layer, `left[l]` being the places of `embeds` (S, D) that layers from l on see."""
    language = model.model.language_model
    places = list(range(len(embeds)))
    position = list(places)
    hidden = embeds[None]
    for number, layer in enumerate(language.layers):
        if number in left:
            rows = [places.index(place) for place in left[number]]
            hidden, places = hidden[:, rows], left[number]
            position = list(range(len(places))) if renumber else [position[row] for row in rows]
        ids = torch.tensor([position])
        future = torch.ones(len(places), len(places)).triu(1).bool()
        mask = torch.zeros(future.shape).masked_fill(future, float("-inf"))[None, None]
        rotary = language.rotary_emb(hidden, ids)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=ids)
    return model.lm_head(language.norm(hidden))[0]


# -- nothing changed, nothing left behind


def test_the_model_is_as_before_after_an_error() -> None:
    model = vlm()
    inputs = prompt(model, [(2, 5)])
    dense, before = logits(model, inputs), fingerprint(model)

    def fail(*args: Any) -> None:
        raise RuntimeError("in the middle")

    tapped = model.model.vision_tower.encoder.layers[3].self_attn.out_proj
    with foveate.apply(model, "fopru", keep=0.5):
        expected = logits(model, inputs)
        handle = tapped.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            logits(model, inputs)
        handle.remove()
        assert model.model.vision_tower.config._attn_implementation == "sdpa"
        assert torch.equal(logits(model, inputs), expected)
    with pytest.raises(RuntimeError, match="in the middle"), foveate.apply(model, "fopru", keep=0.5):
        tapped.register_forward_pre_hook(fail)
        logits(model, inputs)
    tapped._forward_pre_hooks.clear()
    assert fingerprint(model) == before
    assert torch.equal(logits(model, inputs), dense)


# -- the layers by hand


@pytest.mark.parametrize("host", VLMS)
@pytest.mark.parametrize("renumbers", (True, False))
def test_prefill_and_decoding_equal_the_layers_run_by_hand(host: str, renumbers: bool) -> None:
    model = vlm(host)
    inputs = prompt(model, [(2, 5)])
    seen = (inputs["input_ids"][0] == IMAGE).nonzero().squeeze(1).tolist()
    text = [place for place in range(inputs["input_ids"].shape[1]) if place not in seen]
    answer = torch.tensor([[9, 44, 31, 60]])
    embeds = torch.cat([merged(model, inputs), model.get_input_embeddings()(answer)[0]])
    tail = list(range(len(text) + len(seen), len(embeds)))
    for layer in range(4):
        for rule, kept in ((odd, seen[1::2]), (none, [])):
            with foveate.apply(model, probe("llm.layer", rule, layer=layer, renumbers=renumbers)):
                first = model(**inputs)
                last = model(input_ids=answer, past_key_values=first.past_key_values)
            whole = by_hand(model, embeds, {layer: sorted(text + kept) + tail}, renumbers)
            assert torch.allclose(first.logits[0, -1], whole[-5], atol=1e-4), layer
            assert torch.allclose(last.logits[0], whole[-4:], atol=1e-4), layer
            lengths = [one.keys.shape[2] for one in first.past_key_values.layers]
            full = len(embeds)
            assert lengths == [full] * layer + [full - len(seen) + len(kept)] * (4 - layer)


@pytest.mark.parametrize("host", LLAVA)
def test_dropping_before_the_language_model_equals_a_shorter_prompt(host: str) -> None:
    model = vlm(host)
    inputs = prompt(model, [(2, 5)])
    embeds, visual = merged(model, inputs), inputs["input_ids"][0] == IMAGE
    ordinal = visual.long().cumsum(0) - 1
    shorter = embeds[~visual | (ordinal % 2 == 1)]
    expected = by_hand(model, shorter, {}, True)
    for stage in ("vision.output", "projector"):
        with foveate.apply(model, probe(stage, odd)):
            result = logits(model, inputs)[0]
        assert torch.allclose(result[-5:], expected[-5:], atol=1e-4)
        # A dropped position repeats the last one before it that is left.
        assert torch.equal(result[visual][0], result[1]) and torch.equal(result[visual][2], result[visual][1])


# -- generation


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("renumbers", (True, False))
@pytest.mark.parametrize("rule", (odd, lively, none))
def test_any_layer_with_and_without_cache(layer: int, renumbers: bool, rule: Any) -> None:
    model = vlm("clip-qwen2")
    inputs = prompt(model, MIXED)
    with foveate.apply(model, probe("llm.layer", rule, layer=layer, renumbers=renumbers)):
        assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))


# -- batches


STAGES = [("vision.patches", -1), ("vision.layer", 2), ("vision.output", -1), ("projector", -1), ("llm.layer", 0)]


def test_a_sequence_that_is_laid_anew_without_getting_shorter() -> None:
    """The longest sample has no picture, so that dropping changes where the others stand and not how many slots."""
    model = vlm()
    inputs = prompt(model, [(2, 5), (30,)], padding="right")
    alone = single(model, inputs, 0)
    for stage in ("projector", "llm.layer"):
        with foveate.apply(model, probe(stage, odd, layer=1 if stage == "llm.layer" else -1)):
            together = logits(model, inputs)
            assert torch.allclose(together[0, :23], logits(model, alone)[0], atol=1e-4)


# -- training


def test_the_loss_is_that_of_the_shortened_sequence() -> None:
    model = vlm()
    inputs = supervise(prompt(model, [(2, 6)]))
    visual = inputs["input_ids"][0] == IMAGE
    left = (~visual | ((visual.long().cumsum(0) - 1) % 2 == 1)).nonzero().squeeze(1).tolist()
    for layer in range(4):
        with foveate.apply(model, probe("llm.layer", odd, layer=layer)), torch.no_grad():
            loss = model(**inputs).loss
        rows = by_hand(model, merged(model, inputs), {layer: left}, True)
        target = inputs["labels"][0, left]
        expected = torch.nn.functional.cross_entropy(rows[:-1], target[1:], ignore_index=-100)
        assert torch.allclose(loss, expected, atol=1e-5)


def test_ranking_passes_no_gradient_and_skips_samples_without_an_answer() -> None:
    model = vlm()
    inputs = supervise(prompt(model, [(2, 5), (3, 6)], padding="right"))
    grown: list[bool] = []

    def watch(tokens: Tokens, at: Stage) -> Tensor:
        score = at.signals.text_to_vision(at.layer)
        grown.append(score.requires_grad or at.signals.attention(0).received().requires_grad)
        assert at.active.tolist() == [True, False]
        return score > 0

    with foveate.apply(model.train(), probe("llm.layer", watch, layer=1, reads=("llm.attention[0]",))):
        model(**inputs).loss.backward()
    assert grown == [False]


# -- conversations


@pytest.mark.parametrize("host", ("clip-llama", "next"))
@ALL
def test_a_conversation_goes_on(host: str, name: str, settings: dict[str, Any]) -> None:
    model = vlm(host)
    inputs = prompt(model, MIXED)
    more = torch.randint(3, IMAGE, (3, 7))
    with foveate.apply(model, name, **settings), torch.no_grad():
        first = model(**inputs, use_cache=True).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
        other, cropped = copy.deepcopy(first), copy.deepcopy(first)
        at_once = model(input_ids=more, attention_mask=mask, past_key_values=first).logits
        # In two goes, on a copy.
        model(input_ids=more[:, :3], attention_mask=mask[:, :-4], past_key_values=other)
        assert torch.allclose(
            model(input_ids=more[:, 3:], attention_mask=mask, past_key_values=other).logits, at_once[:, 3:], atol=1e-4
        )
        # Taken back, into the closing text of the prompt too (5 tokens after the picture).
        model(input_ids=more, attention_mask=mask, past_key_values=cropped)
        cropped.crop(-9)
        again = torch.cat([inputs["input_ids"][:, -2:], more], 1)
        result = model(input_ids=again, attention_mask=mask, past_key_values=cropped).logits
        assert torch.allclose(result[:, 2:], at_once, atol=1e-4)


def test_a_conversation_by_hand() -> None:
    model = vlm()
    inputs = prompt(model, [(2, 5)])
    more = torch.randint(3, IMAGE, (1, 4))
    visual = inputs["input_ids"][0] == IMAGE
    length = len(visual)
    left = (~visual | ((visual.long().cumsum(0) - 1) % 2 == 1)).nonzero().squeeze(1).tolist()
    embeds = torch.cat([merged(model, inputs), model.get_input_embeddings()(more)[0]])
    expected = by_hand(model, embeds, {0: [*left, *range(length, length + 4)]}, True)
    with foveate.apply(model, probe("projector", odd)), torch.no_grad():
        cache = DynamicCache()
        model(**inputs, past_key_values=cache)
        ids = torch.cat([inputs["input_ids"], more], 1)
        with pytest.raises(InputError, match="give only the new ids"):
            model.generate(input_ids=ids, past_key_values=copy.deepcopy(cache), max_new_tokens=1)
        answer = generate(
            model, {"input_ids": more, "attention_mask": torch.ones_like(ids)}, past_key_values=cache, max_new_tokens=1
        )
    forbidden = expected[-1].clone()
    forbidden[model.generation_config.suppress_tokens] = float("-inf")
    assert answer.item() == forbidden.argmax().item()


def test_what_a_cache_cannot_do_is_said_in_one_line() -> None:
    model = vlm()
    inputs = prompt(model, [(2, 5)])
    with foveate.apply(model, "fopru", keep=0.5), torch.no_grad():
        cache = model(**inputs).past_key_values
        more = torch.full((1, 2), 7)
        with pytest.raises(InputError, match="first forward"):
            model(**inputs, past_key_values=copy.deepcopy(cache))
        with pytest.raises(InputError, match="cover the tokens"):
            model(input_ids=more, attention_mask=torch.ones_like(more), past_key_values=copy.deepcopy(cache))
        cropped = copy.deepcopy(cache)
        cropped.crop(-7)
        with pytest.raises(InputError, match="cropped"):
            model(input_ids=more, past_key_values=cropped)
        static = StaticCache(config=model.config.text_config, max_cache_len=64)
        with pytest.raises(InputError, match="static cache"):
            model(**inputs, past_key_values=static)
        with pytest.raises(InputError, match="static cache"):
            generate(model, inputs, cache_implementation="static")
        with pytest.raises(InputError, match="4-D"):
            length = inputs["input_ids"].shape[1]
            model(**inputs | {"attention_mask": torch.zeros(1, 1, length, length)})
        with pytest.raises(InputError, match="one piece"):
            generate(model, inputs, prefill_chunk_size=8)
    with foveate.apply(model, probe("llm.layer", odd, layer=1)), torch.no_grad():
        two = prompt(model, [(2, 5), (2, 5)])
        cache = model(**two).past_key_values
        cache.batch_select_indices(torch.tensor([0]))
        with pytest.raises(InputError, match="filled with 2 samples"):
            model(input_ids=more, past_key_values=cache)
        # One prompt, several continuations.
        cache = model(**inputs).past_key_values
        one = model(input_ids=more, past_key_values=copy.deepcopy(cache)).logits
        cache.batch_repeat_interleave(3)
        assert torch.allclose(model(input_ids=more.repeat(3, 1), past_key_values=cache).logits[2], one[0], atol=1e-5)


# -- provenance


@pytest.mark.parametrize("host", VLMS)
def test_every_patch_is_where_the_trace_says(host: str) -> None:
    """Features are replaced by numbers that name their patches; every later stage must find the numbers it expects."""
    model = vlm(host)
    inputs = prompt(model, [(2, 5), (1, 3, 4)])
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    class Watch(Method):
        card = probe("projector", odd).card

        @foveate.at("projector")
        def name(self, tokens: Tokens, at: Stage) -> Tokens:
            kept = tokens.keep(torch.arange(1, tokens.x.shape[1], 2).expand(tokens.x.shape[0], -1))
            crop = torch.arange(kept.x.shape[0]).unsqueeze(1)
            number = (crop * 100 + torch.arange(1, tokens.x.shape[1], 2)).float() + 1
            return kept.with_x(number.unsqueeze(-1).expand_as(kept.x))

        @foveate.at("llm.layer")
        def look(self, tokens: Tokens, at: Stage) -> Tokens:
            if at.layer == 0:
                seen["in"] = tokens.x[..., 0], tokens.source
                return tokens.keep(torch.arange(0, tokens.x.shape[1], 3).expand(2, -1))
            return tokens

    with foveate.apply(model, Watch()) as applied:
        logits(model, inputs)
    numbers, source = seen["in"]
    crops, checked = 0, 0
    for b in range(2):
        patches = source.shape[1] if b else int((source[0] >= -1).sum())
        for m in range(patches):
            if source[b, m] >= 0:
                value = numbers[b, source[b, m]].item() - 1
                if value == int(value) and value >= 0 and value % 100 < 16:
                    crop, patch = divmod(int(value), 100)
                    assert patch % 2 == 1 and m % 16 == patch and m // 16 + crops == crop
                    checked += 1
        crops += (2 if host == "next" else 1) + (1 if host == "next" else 0)
    entry = next(record for record in applied.trace if record.stage == "llm.input")
    after = applied.trace[-1]
    assert after.stage == "llm.layer[0]" and checked > 0
    for b in range(2):
        # Every third token was kept, in order.
        for m, token in enumerate(entry.source[b].tolist()):
            kept = token >= 0 and token % 3 == 0 and token < entry.tokens_in[b]
            assert after.source[b, m].item() == (token // 3 if kept else -1)


@ALL
def test_sizes_and_dropped_patches_add_up(name: str, settings: dict[str, Any]) -> None:
    model = vlm()
    inputs = prompt(model, [(2, 5)])
    with foveate.apply(model, name, **settings) as applied:
        logits(model, inputs)
    assert applied.trace
    for record in applied.trace:
        source = record.source[0]
        assert len(source) == 16 and record.tokens_out[0] <= record.tokens_in[0]
        if settings.get("removed") != "mask":
            carried = set(source[source >= 0].tolist())
            assert carried == set(range(record.tokens_out[0]))
    with foveate.apply(model, "resolution", keep=0.25) as applied:
        logits(model, inputs)
    pixels = applied.trace[0]
    assert (pixels.stage, pixels.tokens_in, pixels.tokens_out) == ("vision.pixels", (16,), (4,))
    assert pixels.source[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]


# -- peculiarities


def test_several_encoder_layers_and_the_class_token_as_a_visual_one() -> None:
    for config in ({"vision_feature_layer": [-2, 1]}, {"vision_feature_select_strategy": "full"}):
        model = vlm(**config)
        inputs = prompt(model, [(0, 5), (3, 4)])
        dense = logits(model, inputs)
        alone = [single(model, inputs, b) for b in range(2)]
        with foveate.apply(model, "fopru", keep=1.0) as applied:
            assert torch.equal(logits(model, inputs), dense)
            assert applied.host.shape.feature_layer == 3
        for name, settings in METHODS:
            with foveate.apply(model, name, **settings):
                together = logits(model, inputs)
                assert torch.allclose(logits(model, alone[0])[0, -5:], together[0, -5:], atol=1e-4)
    model = vlm(vision_feature_layer=[-2, 1])
    with pytest.raises(InputError, match="features of several"):
        foveate.apply(model, probe("vision.layer", odd, layer=1))
    # Nothing is left of the failed attempt.
    foveate.apply(model, "fopru").remove()


def test_images_of_different_layouts() -> None:
    model = vlm("next")
    sizes = [(40, 10), (10, 40), (16, 16), (30, 20)]
    inputs = prompt(model, [(2, 0), (0, 1, 3), (4, 5)], sizes=sizes)
    alone = [single(model, inputs, b) for b in range(3)]
    for name, settings in METHODS:
        with foveate.apply(model, name, **settings):
            together = logits(model, inputs)
            for b, inputs_b in enumerate(alone):
                real = inputs["attention_mask"][b].bool()
                assert torch.allclose(together[b, real], logits(model, inputs_b)[0], atol=1e-4)


def test_one_token_left_and_none() -> None:
    model = vlm()
    inputs = prompt(model, [(2, 5), (0, 3)])
    with foveate.apply(model, "vtc-cls", tokens=1) as applied:
        generate(model, inputs)
        assert applied.trace[-1].tokens_out == (1, 1)
    with foveate.apply(model, "aim", keep=1.0, step=1.0, first_layer=1) as applied:
        assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))
        assert applied.trace[-1].tokens_out == (0, 0)


def test_features_that_were_computed_before() -> None:
    model = vlm()
    inputs = prompt(model, [(2, 5)])
    with torch.no_grad():
        features = model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    encoded = {"image": features}
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with foveate.apply(model, "fopru", keep=0.5), pytest.raises(InputError, match="computed before"):
        model(**rest, mm_encoder_outputs=encoded)
    with foveate.apply(model, "pyramiddrop"), torch.no_grad():
        assert torch.equal(model(**rest, mm_encoder_outputs=encoded).logits, logits(model, inputs))
        embeds = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
        by_embeds = model(**embeds, attention_mask=inputs["attention_mask"], pixel_values=inputs["pixel_values"]).logits
        assert torch.equal(by_embeds, logits(model, inputs))


def test_refusals_of_the_host() -> None:
    with pytest.raises(InputError, match="no class token"):
        foveate.apply(vlm("siglip-llama", vision_feature_select_strategy="default"), "fopru")
    model = vlm()
    inputs = prompt(model, [(2, 5)])
    with foveate.apply(model, "fopru"), pytest.raises(InputError, match="set in the config"):
        model(**inputs, vision_feature_layer=-1)
