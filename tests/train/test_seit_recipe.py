"""The recipe of `seit`: its tokens, each stage at smoke size, and what a stage takes from another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

from foveate import train
from foveate.method import InputError
from foveate.methods.learn.seit import Seit
from foveate.nn.token_file import TokenFile
from foveate.train.loop import write_tensors
from foveate.train.recognition import single_objects
from foveate.train.seit import PatchTokenizer, SeitRecipe, SeitSettings, on_disk, stored
from foveate.train.tiny_vit import normalised


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A smoke run of pre-training, and its metrics."""
    out = tmp_path_factory.mktemp("seit") / "pretrain"
    return out, train.run("seit", out=out, smoke=True, threads=1)


def recipe(**overrides: Any) -> SeitRecipe:
    torch.manual_seed(0)
    return SeitRecipe(SeitSettings(**(SeitRecipe.smoke | overrides)), 0)


def test_the_tokenizer_finds_the_nearest_code() -> None:
    pictures = single_objects("train", 0, 3)["image"]
    tokenizer = PatchTokenizer.fit(pictures, 40, 0)
    ids = tokenizer.encode(normalised(pictures))
    assert ids.shape == (3, 24, 24) and torch.equal(tokenizer.encode(tokenizer.decode(ids))[0, :2, :2], ids[0, :2, :2])
    made = tokenizer.decode(ids)
    patch = F.normalize(tokenizer.codebook.weight[ids[1, 5, 7]], dim=0) * tokenizer.radius
    wanted = tokenizer.basis @ patch[:-1] + tokenizer.mean
    torch.testing.assert_close(made[1, :, 20:24, 28:32], wanted.view(3, 4, 4).clamp(-1, 1))
    error = (made - normalised(pictures)).square().mean()
    flat = (normalised(pictures) - normalised(pictures).mean((0, 2, 3), keepdim=True)).square().mean()
    assert float(error) < 0.3 * float(flat), "40 codes tell more than the mean colour"
    measured = on_disk(pictures, ids, tokenizer)
    assert measured["ratio_to_png"] == measured["token_bytes"] / measured["png_bytes"]
    assert measured["undeflated_bytes"] == 3 * 576
    with pytest.raises(InputError, match="different patches"):
        PatchTokenizer.fit(torch.zeros(1, 3, 96, 96, dtype=torch.uint8), 40, 0)


def test_pretraining(folder: tuple[Path, dict[str, Any]]) -> None:
    out, metrics = folder
    file, pictures = TokenFile(out / "train.tokens"), single_objects("train", 0, 6)
    tokenizer = PatchTokenizer.load(out / "tokenizer.safetensors")
    assert torch.equal(file.batch(range(6)), tokenizer.encode(normalised(pictures["image"])))
    assert file.labels is not None and torch.equal(file.labels, pictures["label"])
    assert metrics["masked_loss"] > 0 and 0 <= metrics["masked_accuracy"] <= 1 and metrics["token_bytes"] > 512
    assert isinstance(Seit.from_pretrained(out), Seit)


def test_tokens_are_made_anew_for_other_pictures(tmp_path: Path) -> None:
    first = SeitSettings(**SeitRecipe.smoke)
    made = SeitRecipe.prepare(first, 0, tmp_path)
    before = (tmp_path / "train.tokens").read_bytes()
    assert SeitRecipe.prepare(first, 0, tmp_path) == made and (tmp_path / "train.tokens").read_bytes() == before
    SeitRecipe.prepare(first, 1, tmp_path)
    other = (tmp_path / "train.tokens").read_bytes()
    assert other != before
    (tmp_path / "train.tokens").write_bytes(other[:-1])
    SeitRecipe.prepare(first, 1, tmp_path)
    assert (tmp_path / "train.tokens").read_bytes() == other, "a damaged file is made again"


def test_the_other_stages(folder: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    start = str(folder[0])
    made = train.run("seit", out=tmp_path / "adapt", smoke=True, threads=1, stage="adapt", tokens=start)
    assert 0 <= made["same_ids"] <= 1 and 0 <= made["same_ids_without_adapt"] <= 1
    tuned = train.run(
        "seit", out=tmp_path / "tuned", smoke=True, threads=1, stage="finetune", start=start,
        adapt=str(tmp_path / "adapt"), color=True, mix=True,
    )  # fmt: skip
    assert 0 <= tuned["accuracy"] <= 1 and tuned["labelled"] == 6


def test_what_a_stage_trains(folder: tuple[Path, dict[str, Any]]) -> None:
    start = str(folder[0])
    probe = recipe(stage="probe", start=start, tokens=start)
    trained = [name for name, weight in probe.model.named_parameters() if weight.requires_grad]
    assert trained == ["student.head.weight", "student.head.bias"] and probe.rate(trained[0]) == 1
    own = Seit.from_pretrained(start)
    assert torch.equal(probe.student.words.table, own.words.table)
    tuned = recipe(stage="finetune", start=start, tokens=start, labels=0.5, layer_decay=0.5)
    assert tuned.rate("student.blocks.0.norm1.weight") == 0.5 and tuned.rate("student.positions") == 0.25
    batch = tuned.batch(0, 0, 1)
    assert tuned.labelled == 3 and set(batch["label"].tolist()) <= set(tuned.file.labels[:3].tolist())
    assert recipe(stage="finetune", tokens=start).rate("student.positions") == 1
    for bad, why in (
        ({"stage": "other"}, "stage must be"), ({"stage": "probe"}, "needs start"), ({"start": "x"}, "nothing starts"),
        ({"labels": 0.0}, "labels"), ({"codes": 1}, "codes"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=why):
            SeitSettings(**bad)
    with pytest.raises(InputError, match="another seed"):
        SeitRecipe(SeitSettings(**(SeitRecipe.smoke | {"stage": "adapt", "tokens": start})), 1)
    with pytest.raises(InputError, match="no tokenizer"):
        recipe(tokens="nowhere")
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        recipe(stage="finetune", tokens=start, start="nowhere")


def test_a_tokenizer_and_tokens_of_others_are_noticed(folder: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "train.tokens").write_bytes((folder[0] / "train.tokens").read_bytes())
    other = PatchTokenizer.fit(single_objects("test", 0, 2)["image"], 16, 0)
    write_tensors(tmp_path / "tokenizer.safetensors", other.state_dict())
    with pytest.raises(InputError, match="not made by the tokenizer"):
        stored(SeitSettings(tokens=str(tmp_path)))
