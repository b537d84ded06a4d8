"""The recipes of `tiny-ar` and `tiny-ar-draft`: their data, their loss against a slow computation, and smoke runs."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

from foveate import train, zoo
from foveate.data.scenes import CaptionedScenes, caption_words, stacked
from foveate.method import InputError
from foveate.train.tiny_ar import TinyAr, TinyArDraft, TinyArSettings
from foveate.zoo.ar import build_tokenizer, load_generator
from foveate.zoo.vq import build_vq, encode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tokenizer of pictures."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("vq")
    vq = build_vq(width=8, codes=16, pitch=8)
    torch.nn.init.normal_(vq.quantize.embedding.weight, std=0.3)
    vq.save_pretrained(out)
    return out


def recipe(folder: Path, out: Path, **overrides: Any) -> TinyAr:
    settings = TinyArSettings(**(TinyAr.smoke | {"vq": str(folder)} | overrides))
    torch.manual_seed(0)
    prepared = TinyAr.prepare(settings, 3, out)
    assert isinstance(prepared, TinyArSettings)
    return TinyAr(prepared, 3)


def test_data_are_captions_and_codes_of_scenes(folder: Path, tmp_path: Path) -> None:
    made = recipe(folder, tmp_path, batch=6)
    batches = [made.batch(step, 0, 1) for step in range(2)]
    scenes = [CaptionedScenes("train", 3, size=64)[k] for k in range(6)]
    ids = encode(zoo.load_folder(folder), stacked(one.scene for one in scenes)).ids
    tokenizer: Any = build_tokenizer(caption_words())
    known = {tuple(codes.tolist()): one.caption for codes, one in zip(ids, scenes)}
    for batch in batches:
        assert batch["codes"].dtype == torch.long and batch["codes"].shape == (6, 64)
        for prompt, codes in zip(batch["prompt"].tolist(), batch["codes"].tolist()):
            words = tokenizer.convert_ids_to_tokens(prompt)
            assert [word for word in words if word != "<pad>"] == [*known[tuple(codes)].split(), "<s>"]
            assert words[-1] == "<s>"
        # An epoch: each scene once.
        assert Counter(map(tuple, batch["codes"].tolist())) == Counter(known.keys())
    assert not torch.equal(batches[0]["codes"], batches[1]["codes"])
    parts = [made.batch(1, rank, 2)["codes"] for rank in range(2)]
    assert torch.equal(parts[0], batches[1]["codes"][::2]) and torch.equal(parts[1], batches[1]["codes"][1::2])


def test_codes_are_kept_and_belong_to_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    settings = TinyArSettings(**(TinyAr.smoke | {"vq": str(folder)}))
    file = tmp_path / "codes.safetensors"
    recipe(folder, tmp_path)
    written = file.stat().st_mtime_ns
    recipe(folder, tmp_path)
    assert file.stat().st_mtime_ns == written
    shared = dataclasses.replace(settings, codes=str(file))
    assert TinyArDraft.prepare(shared, 3, tmp_path / "other") == shared
    with pytest.raises(InputError, match="has other scenes"):
        TinyAr.prepare(shared, 4, tmp_path)
    file.write_bytes(file.read_bytes()[:-9])
    recipe(folder, tmp_path)
    assert file.stat().st_mtime_ns != written


def test_loss_is_the_mean_over_codes(folder: Path, tmp_path: Path) -> None:
    """Against one forward a picture, without padding, and a softmax by hand."""
    made = recipe(folder, tmp_path, batch=3, drop=0.0)
    batch = made.batch(0, 0, 1)
    loss, _ = made.loss(made.model, batch)
    model, (first, _) = made.generator.model, made.generator.codes
    pad, total = made.generator.tokenizer.pad_token_id, 0.0
    with torch.no_grad():
        for prompt, codes in zip(batch["prompt"], batch["codes"]):
            ids = torch.cat([prompt[prompt != pad], codes + first])
            logits = model(ids[None]).logits[0].double()
            for k in range(64):
                row = logits[len(ids) - 64 + k - 1]
                total -= float(row[first + codes[k]] - torch.logsumexp(row, 0))
    assert float(loss.detach()) == pytest.approx(total / 3 / 64, rel=1e-5)


def test_captions_are_left_out_in_training_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(folder, tmp_path, batch=6, drop=0.5)
    batch = made.batch(0, 0, 1)
    many = {name: value.repeat(50, 1) for name, value in batch.items()}
    seen: list[Tensor] = []
    made.generator.model.register_forward_pre_hook(
        lambda module, inputs, given: seen.append(given["input_ids"][:, : batch["prompt"].shape[1]]), with_kwargs=True
    )
    with torch.no_grad():
        made.loss(made.model, many)
        made.model.eval()
        made.loss(made.model, many)
    tokenizer: Any = made.generator.tokenizer
    bare = torch.tensor([tokenizer.pad_token_id] * (seen[0].shape[1] - 1) + [tokenizer.bos_token_id])
    dropped = (seen[0] == bare).all(1)
    assert float(dropped.float().mean()) == pytest.approx(0.5, abs=4 * (0.25 / 300) ** 0.5)
    assert torch.equal(seen[0][~dropped], many["prompt"][~dropped]) and torch.equal(seen[1], many["prompt"])


def test_smoke_run_is_complete(folder: Path, tmp_path: Path) -> None:
    metrics = train.run("tiny-ar-draft", out=tmp_path, smoke=True, threads=1, vq=str(folder))
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["name"] == "tiny-ar-draft" and metrics["split"] == "test"
    assert metrics["single_objects"]["captions"] == 4 and metrics["nats_per_code"] > 0
    generator = load_generator(tmp_path)
    assert generator.draw(["a dog"], seed=1).shape == (1, 3, 64, 64)
    assert type(zoo.load_folder(tmp_path)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [({"width": 50}, "width"), ({"layers": 0}, "layers"), ({"pictures": 0}, "pictures"), ({"drop": 1.0}, "drop"),
     ({"guidance_scale": -1.0}, "guidance_scale")],
)  # fmt: skip
def test_nonsense_is_rejected(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        TinyArSettings(**overrides)


def test_without_a_tokenizer_there_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vq: there is no config\.json"):
        TinyAr.prepare(TinyArSettings(vq=str(tmp_path)), 0, tmp_path)
