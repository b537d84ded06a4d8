"""Configuration files: what is written comes back, `apply` and `compare` take it, and what is wrong gets one line."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.configuration import load_configuration, save
from foveate.hosts import adapt
from foveate.method import InputError, build
from tiny import prompt, vlm


def _file(folder: Path, text: str) -> Path:
    (folder / "c.json").write_text(text)
    return folder / "c.json"


def test_every_method_comes_back_from_its_file(tmp_path: Path) -> None:
    shape = adapt(vlm()).shape
    for slug, cls in foveate.registry().items():
        methods = [cls()]
        with contextlib.suppress(InputError):
            methods.append(cls.for_budget(0.5, shape))
        save(tmp_path / "c.json", methods, {"flops_ratio": 0.5})
        again = load_configuration(tmp_path / "c.json")
        assert [(type(one), one.hyperparameters()) for one in again] == [
            (type(one), one.hyperparameters()) for one in methods
        ], slug
    values = json.loads((tmp_path / "c.json").read_text())
    assert set(values) == {"foveate", "methods", "measured"} and values["foveate"] == foveate.__version__
    assert [one.name for one in tmp_path.iterdir()] == ["c.json"]


def test_apply_takes_a_file_alone_and_in_a_list(tmp_path: Path) -> None:
    model = vlm()
    inputs = prompt(model, [(2, 5)])
    expected = []
    with foveate.apply(model, [build("fopru", {"keep": 0.5}), "pyramiddrop"]), torch.no_grad():
        expected.append(model(**inputs).logits)
    save(tmp_path / "c.json", [build("fopru", {"keep": 0.5}), build("pyramiddrop")])
    save(tmp_path / "one.json", [build("fopru", {"keep": 0.5})])
    given: Any
    for given in (str(tmp_path / "c.json"), [str(tmp_path / "one.json"), "pyramiddrop"]):
        with foveate.apply(model, given) as applied, torch.no_grad():
            assert [one.card.slug for one in applied.methods] == ["fopru", "pyramiddrop"]
            assert torch.equal(model(**inputs).logits, expected[0])
    with pytest.raises(InputError, match="its own settings"):
        foveate.apply(model, str(tmp_path / "one.json"), keep=0.5)
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        foveate.apply(model, "none.json")


METHOD = '{"foveate": "0.1.0", "methods": [%s]}'
BAD = [
    ("{", "not JSON"),
    ("\udcff", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[]", "not a configuration"),
    ('{"methods": []}', "not a configuration"),
    ('{"foveate": "1", "methods": [], "extra": 1}', "unknown field 'extra'"),
    (METHOD % "", "at least one method"),
    ('{"foveate": "1", "methods": {}}', "at least one method"),
    (METHOD % '"fopru"', "method 1 must be"),
    (METHOD % '{"method": 3}', "method 1 must be"),
    (METHOD % '{"method": "dense"}, {"method": "fopru", "keep": 0.5}', "method 2: unknown field 'keep'"),
    (METHOD % '{"method": "fopru", "settings": [0.5]}', "must be an object"),
    (METHOD % '{"method": "foprus"}', "did you mean fopru"),
    (METHOD % '{"method": "fopru", "settings": {"kep": 0.5}}', "no setting 'kep'"),
    (METHOD % '{"method": "fopru", "settings": {"keep": 2}}', "keep must be"),
    (METHOD % '{"method": "fopru", "settings": {"keep": {"a": 1}}}', "keep must be"),
    (METHOD % '{"method": "pyramiddrop", "settings": {"layers": [[1], 2]}}', "layers"),
    (METHOD % ('{"method": "dense"}' + " " * 2**20), "larger than"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message + str(i) for i, (_, message) in enumerate(BAD)])
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"c\.json: ") as error:
        load_configuration(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder"):
        load_configuration(tmp_path)


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    save(tmp_path / "c.json", [build("fopru")])
    before = (tmp_path / "c.json").read_text()
    with pytest.raises(TypeError):
        save(tmp_path / "c.json", [build("fopru")], {"x": object()})
    assert (tmp_path / "c.json").read_text() == before and len(list(tmp_path.iterdir())) == 1


ENCODER = ("hired", "vtc-cls", "visionzip", "tome")
LANGUAGE = ("pyramiddrop", "fastv")


def _run(model: Any, inputs: dict[str, Any], methods: list[Any]) -> tuple[dict[str, tuple[int, ...]], int, list[int]]:
    """Tokens out by stage, FLOPs without attention, and the sequence length that each of them saw."""
    lengths: list[int] = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
            with_kwargs=True,
        )
        for layer in model.model.language_model.layers
    ]
    with foveate.apply(model, methods) as applied, torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
        stages = {record.stage: record.tokens_out for record in applied.trace}
    for hook in hooks:
        hook.remove()
    return stages, sum(counter.get_flop_counts()["Global"].values()), lengths


@pytest.mark.parametrize("first", ENCODER)
@pytest.mark.parametrize("second", LANGUAGE)
def test_a_stack_is_counted_right(first: str, second: str) -> None:
    """Each method spends its share of what is left; the encoder's part costs what it costs alone, and the language
    model what a prompt with so many tokens costs."""
    model = vlm(layers=6)
    shape = adapt(model).shape
    inputs = prompt(model, [(1, 5)])
    a, b = (foveate.method_class(slug).for_budget(0.5, shape) for slug in (first, second))
    _, dense_flops, dense_lengths = _run(model, inputs, ["dense"])
    alone, alone_flops, alone_lengths = _run(model, inputs, [a])
    _, language_flops, language_lengths = _run(model, inputs, [b])
    both, both_flops, both_lengths = _run(model, inputs, [a, b])
    text = dense_lengths[0] - 16
    entered = alone["llm.input"][0]
    assert entered == 8 and both["llm.input"] == (8,)
    assert {stage for stage in both if not stage.startswith("llm.layer")} == {
        stage for stage in alone if not stage.startswith("llm.layer")
    }
    # By its own rule on 8 tokens: the same shares at the same layers as on 16, of the count that the layer sees.
    assert all(length == text + 8 for length in alone_lengths)
    ratio = [(length - text) / 16 for length in language_lengths]
    spent = [length - text for length in both_lengths]
    assert spent[0] == 8 and all(abs(one - 8 * share) <= 1 for one, share in zip(spent, ratio))
    assert sum(spent) < sum(language_lengths) - 6 * text and sum(spent) / (6 * 16) == pytest.approx(0.25, abs=0.06)
    assert both_flops < min(alone_flops, language_flops) < dense_flops
    # The decoder's matrix products, by hand (torch's counter leaves fused attention out). What is not saved is
    # the second method's own scoring, which costs more than nothing and less than on all the tokens.
    config = model.config.text_config
    d, inner = config.hidden_size, config.intermediate_size
    kv = d // config.num_attention_heads * config.num_key_value_heads
    a_token = 2 * (2 * d * d + 2 * d * kv + 3 * d * inner)

    def saved(before: list[int], after: list[int]) -> int:
        return a_token * (sum(before) - sum(after))

    scoring = language_flops - dense_flops + saved(dense_lengths, language_lengths)
    assert 0 <= both_flops - alone_flops + saved(alone_lengths, both_lengths) < scoring
