"""SJD against its card: distributions against exact laws, windows against loops and `generate` of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from causal import PAD, Forced, chi_square, law, llama, prompts
from foveate.method import InputError
from foveate.methods.decode.sjd import CONFIGURATIONS, GENERATION, Sjd

NEGATIVE = torch.tensor([[7, 2], [9, 9], [4, 30]])


def watched(model: Any) -> list[dict[str, Any]]:
    """The ids of every forward of the model, and the length of the cache that it began with."""
    calls: list[dict[str, Any]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append({"ids": kwargs["input_ids"], "cached": kwargs["past_key_values"].get_seq_length()})

    model.register_forward_pre_hook(note, with_kwargs=True)
    return calls


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.7, "temperature": 1.3, "repetition_penalty": 1.5, "eos_token_id": [3, 5]},
        {"guidance_scale": 3.0, "negative_prompt_ids": NEGATIVE},
        {"guidance_scale": 0.5, "num_return_sequences": 2},
    ],
)
def test_a_window_of_one_is_ordinary_sampling_token_for_token(settings: dict[str, Any]) -> None:
    model, asked = llama(), {**prompts(), "max_new_tokens": 20, "do_sample": True, **settings}
    if settings.get("num_return_sequences"):
        # transformers itself takes only prompts as they are.
        asked["input_ids"], asked["attention_mask"] = prompts(1, 4)["input_ids"], torch.ones(1, 4).long()
    for seed in range(3):
        torch.manual_seed(seed)
        expected = model.generate(**asked)
        torch.manual_seed(seed)
        assert torch.equal(model.generate(**asked, custom_generate=Sjd(window=1)), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 2.0, "negative_prompt_ids": NEGATIVE},
        {"eos_token_id": [6, 17, 23]},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": [1, 2]},
        {"prefix_allowed_tokens_fn": lambda row, ids: [1 + row, 10 + len(ids) % 5, 20 + row]},
    ],
)
@pytest.mark.parametrize("rollback", ["row", "batch"])
def test_greedy_decoding_is_that_of_generate(settings: dict[str, Any], rollback: str) -> None:
    """Rows of different prompts are padded, accept different numbers, and end at different places."""
    model, asked = llama(1), {**prompts(), "max_new_tokens": 24, "do_sample": False, **settings}
    decoder = Sjd(window=6, rollback=rollback)
    assert torch.equal(model.generate(**asked, custom_generate=decoder), model.generate(**asked))
    assert decoder.report.calls <= 24
    # The same as sampling of the single best token.
    if not settings:
        ours = model.generate(**{**asked, "do_sample": True, "top_k": 1}, custom_generate=Sjd(window=6))
        assert torch.equal(ours, model.generate(**asked))


def test_other_models() -> None:
    """Learned positions end with the text; a sliding window counts tokens, not entries of the cache."""
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=25, n_embd=16, n_layer=2, n_head=2, bos_token_id=None,
                                     eos_token_id=None, pad_token_id=PAD)).eval()  # fmt: skip
    mistral = MistralForCausalLM(MistralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=4, bos_token_id=None, eos_token_id=None, pad_token_id=PAD,
    )).eval()  # fmt: skip
    for model in (gpt, mistral):
        for weight in model.parameters():
            weight.data.mul_(6 if weight.ndim == 2 else 1)
        asked = {**prompts(), "max_new_tokens": 20, "do_sample": False}
        assert torch.equal(model.generate(**asked, custom_generate=Sjd(window=7)), model.generate(**asked))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init": "repeat_horizon", "row": 3},
        {"init": "sample_horizon", "row": 10},
        {"init": "sample_horizon", "row": 10, "horizon": "argmax"},
        {"accept": "jacobi"},
    ],
)
def test_samples_are_distributed_as_in_ancestral_sampling(settings: dict[str, Any]) -> None:
    """The joint law of four tokens, 20,000 draws, rows at different lengths, against whole forwards without a cache."""
    model, prompt = llama(2, words=4, sharpness=14), torch.tensor([[1, 3]])
    torch.manual_seed(0)
    decoder = Sjd(window=3, **settings)
    ids = model.generate(prompt.expand(20_000, -1), max_new_tokens=4, do_sample=True, top_k=0, custom_generate=decoder)
    assert chi_square(ids[:, 2:], law(model, prompt, 4), 4) > 1e-3
    assert len({int(count) for count in decoder.report.emitted[0]}) > 1


def test_guided_samples_are_distributed_as_in_ancestral_sampling() -> None:
    model, prompt, other = llama(2, words=4, sharpness=14), torch.tensor([[1, 3]]), torch.tensor([[2, 0, 2]])
    torch.manual_seed(0)
    ids = model.generate(
        prompt.expand(20_000, -1), max_new_tokens=3, do_sample=True, top_k=3, guidance_scale=1.8,
        negative_prompt_ids=other.expand(20_000, -1), custom_generate=Sjd(window=3),
    )  # fmt: skip
    guided = law(model, prompt, 3, top_k=3, scale=1.8, other=other)
    assert chi_square(ids[:, 2:], guided, 4) > 1e-3
    # The test can tell it from the law without guidance.
    assert chi_square(ids[:, 2:], law(model, prompt, 3), 4) < 1e-6


def test_all_drafts_pass_where_nothing_has_changed() -> None:
    """p = q: a window of L gives L tokens, and a rejected token is never drawn again where p <= q."""
    torch.manual_seed(0)
    p = torch.rand(500, 6, 9).softmax(-1)
    drafts = p[:, :5].flatten(0, 1).multinomial(1).view(500, 5)
    samples = torch.randint(9, (500, 6))
    accepted, tokens = Sjd().judge(p, p[:, :5], drafts, samples, torch.full((500,), 6))
    assert bool((accepted == 5).all()) and torch.equal(tokens, torch.cat([drafts, samples[:, 5:]], 1))
    q = torch.rand(500, 5, 9).pow(3).softmax(-1).flip(2)
    drafts = q.flatten(0, 1).multinomial(1).view(500, 5)
    accepted, tokens = Sjd().judge(p, q, drafts, samples, torch.full((500,), 6))
    rejected = (accepted < 5).nonzero().squeeze(1)
    assert len(rejected) > 50
    for row in rejected.tolist():
        place = int(accepted[row])
        assert float(p[row, place, tokens[row, place]]) > float(q[row, place, tokens[row, place]])
        assert torch.equal(tokens[row, :place], drafts[row, :place])


def test_drafts_are_judged_by_the_loop() -> None:
    """Windows of different lengths; uniform numbers are drawn once for all drafts."""
    torch.manual_seed(0)
    p, q = torch.rand(200, 5, 7).pow(4), torch.rand(200, 4, 7).pow(4)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    drafts, samples = torch.randint(7, (200, 4)), torch.randint(7, (200, 5))
    length = torch.randint(1, 6, (200,))
    torch.manual_seed(1)
    u = torch.rand(200, 4)
    torch.manual_seed(1)
    accepted, tokens = Sjd().judge(p, q, drafts, samples, length)
    jacobi, kept = Sjd(accept="jacobi").judge(p, q, drafts, samples, length)
    for row in range(200):
        count = same = 0
        while count < length[row] - 1:
            d = int(drafts[row, count])
            if float(u[row, count]) >= min(1.0, float(p[row, count, d]) / float(q[row, count, d])):
                break
            count += 1
        while same < length[row] - 1 and drafts[row, same] == samples[row, same]:
            same += 1
        assert int(accepted[row]) == count and int(jacobi[row]) == same
        if count == length[row] - 1:
            assert int(tokens[row, count]) == int(samples[row, count])
    assert torch.equal(kept, samples)


def test_each_pass_adds_up_to_a_window_and_the_cache_ends_before_the_last_token() -> None:
    model, start = llama(3, sharpness=3), 5
    calls = watched(model)
    decoder = Sjd(window=4, row=8, init="repeat_horizon")
    torch.manual_seed(0)
    output = model.generate(**prompts(1), max_new_tokens=30, do_sample=True, top_k=3, return_dict_in_generate=True,
                            custom_generate=decoder)  # fmt: skip
    emitted = [int(one) for one in decoder.report.emitted]
    assert min(emitted) >= 1 and max(emitted) <= 4 and 1 + sum(emitted) == 30
    assert decoder.report.calls == len(calls) == 1 + len(emitted)
    length = start + 1
    for call, gained in zip(calls[1:], emitted):
        assert call["cached"] == length - 1
        assert int(call["ids"][0, 0]) == int(output.sequences[0, length - 1])
        length += gained
    assert output.past_key_values.get_seq_length() == start + 30 - 1
    assert decoder.report.mean_emitted == pytest.approx(29 / len(emitted))


@pytest.mark.parametrize("window", [2, 5, 16])
def test_forced_tokens_stand_in_their_places(window: int) -> None:
    """An end-of-line token behind every six codes, in rows of different lengths."""
    torch.manual_seed(0)
    ids = llama(4, sharpness=2).generate(
        **prompts(4), max_new_tokens=28, do_sample=True, logits_processor=[Forced(5, 7, 39)],
        custom_generate=Sjd(window=window, row=7, init="repeat_horizon"),
    )  # fmt: skip
    assert torch.equal(ids[:, 5:] == 39, (torch.arange(28) % 7 == 6).expand(4, -1))


def test_both_branches_of_guidance_take_in_the_same_ids() -> None:
    model = llama(5)
    calls = watched(model)
    model.generate(**prompts(), max_new_tokens=16, do_sample=True, guidance_scale=2.0, negative_prompt_ids=NEGATIVE,
                   custom_generate=Sjd(window=5))  # fmt: skip
    assert [tuple(call["ids"].shape) for call in calls[:2]] == [(3, 5), (3, 2)]
    for call in calls[2:]:
        conditional, other = call["ids"].chunk(2)
        assert torch.equal(conditional, other)


def test_outside_of_the_picture_tokens_come_one_by_one() -> None:
    model = llama(6, sharpness=1)
    calls = watched(model)
    decoder = Sjd(window=8, before=4, after=5)
    torch.manual_seed(0)
    model.generate(**prompts(1), max_new_tokens=30, do_sample=True, custom_generate=decoder)
    done = 1
    for call, emitted in zip(calls[1:], decoder.report.emitted):
        width = 1 if done < 4 else max(1, min(8, 25 - done))
        assert call["ids"].shape[1] == width
        done += int(emitted)


@pytest.mark.parametrize("horizon", ["draw", "argmax"])
@pytest.mark.parametrize("init", ["random", "repeat_horizon", "sample_horizon"])
def test_initial_tokens(init: str, horizon: str) -> None:
    """Carried drafts stay; a neighbour's token or distribution is taken on its row only; q is one-hot."""
    words, row = 12, 5
    decoder = Sjd(init=init, row=row, codes=(6, 9), horizon=horizon)
    drafts = torch.tensor([[3, 11], [2, -1]])
    # What a neighbour's distribution can give is known: 0 or 1 after the last token, 10 and 11 after drafts.
    newest, q = torch.zeros(2, words), torch.zeros(2, 2, words)
    newest[:, 0], newest[:, 1] = 0.4, 0.6
    q[:, :, 10], q[:, :, 11] = 0.3, 0.7
    last = torch.tensor([[4], [5]])
    columns = torch.tensor([[1, 2, 3, 4, 0, 1], [4, 0, 1, 2, 3, 4]])
    seen: dict[tuple[int, int], set[int]] = {}
    for seed in range(40):
        torch.manual_seed(seed)
        tokens, said = decoder.initialise(drafts, q, last, newest, columns)
        assert torch.equal(tokens[0, :2], drafts[0]) and int(tokens[1, 0]) == 2
        assert torch.equal(said[0, :2], q[0]) and torch.equal(said[1, 0], q[1, 0])
        for b, first in ((0, 2), (1, 1)):
            for place in range(first, 6):
                token = int(tokens[b, place])
                assert said[b, place].tolist() == [float(word == token) for word in range(words)]
                seen.setdefault((b, place), set()).add(token)
                if init == "repeat_horizon" and columns[b, place] != 0:
                    assert token == int(tokens[b, place - 1])
    for (b, place), found in seen.items():
        if init == "random" or columns[b, place] == 0:
            assert found == {6, 7, 8}
        elif init == "sample_horizon":
            assert found == ({10, 11} if horizon == "draw" else {11})


def test_the_first_initial_token_goes_by_the_last_one() -> None:
    newest = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    nothing, last = torch.zeros(1, 0).long(), torch.tensor([[3]])
    for init, token in (("repeat_horizon", 3), ("sample_horizon", 2)):
        decoder = Sjd(init=init, row=9)
        tokens, _ = decoder.initialise(nothing, torch.zeros(1, 0, 4), last, newest, torch.tensor([[1, 2]]))
        assert tokens.tolist() == [[token, token]]


def test_columns_are_counted_from_the_first_code() -> None:
    """Repeating rows of a picture that is constant row by row fail at column 0 alone: 2 of 12 drafts."""

    class Rows(Forced):
        """Behind two tokens of another kind, rows of four equal codes; every row another one."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            place = input_ids.shape[1] - self.prompt
            masked = torch.full_like(scores, -float("inf"))
            masked[:, 1 if place < 2 else 10 + (place - 2) // 4] = 0.0
            return masked

    decoder = Sjd(window=4, init="repeat_horizon", row=4, before=2, codes=(30, 40))
    ids = llama().generate(**prompts(1), max_new_tokens=14, do_sample=True, logits_processor=[Rows(5, 4, 0)],
                           custom_generate=decoder)  # fmt: skip
    assert ids[0, 5:].tolist() == [1, 1] + [10] * 4 + [11] * 4 + [12] * 4
    # Token by token up to the first code, which no neighbour foretells; then whole rows, but for what begins one.
    assert [int(one) for one in decoder.report.emitted] == [1, 1, 4, 4, 3]


def test_named_configurations() -> None:
    assert set(CONFIGURATIONS) == set(GENERATION)
    for name in CONFIGURATIONS:
        assert Sjd.named(name).window == 16
    assert Sjd.named("llamagen-xl-512", window=4).init == "repeat_horizon"
    with pytest.raises(InputError, match="llamagen-xl-512"):
        Sjd.named("llamagen-xl")


@pytest.mark.parametrize(
    ("settings", "asked", "message"),
    [
        ({"window": 0}, {}, "window"),
        ({"init": "vertical"}, {}, "init"),
        ({"init": "repeat_horizon"}, {}, "needs row"),
        ({"codes": (4, 4)}, {}, "codes"),
        ({"codes": 7}, {}, "codes must be two ids"),
        ({"codes": (4, 41)}, {}, "has 40 tokens"),
        ({"accept": "always"}, {}, "accept"),
        ({}, {"num_beams": 2}, "num_beams"),
        ({}, {"use_cache": False}, "use_cache"),
        ({}, {"cache_implementation": "static"}, "dynamic cache"),
        ({}, {"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
        ({}, {"guidance_scale": 2.0, "negative_prompt_ids": NEGATIVE[:2]}, "negative_prompt_ids"),
    ],
)
def test_bad_input(settings: dict[str, Any], asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        llama().generate(**prompts(), max_new_tokens=4, custom_generate=Sjd(**settings), **asked)
