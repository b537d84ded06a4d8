"""The recipes of `sit-slim` and `stvit`: where they start, what stands in for slimming, and smoke runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

from foveate import train, zoo
from foveate.method import InputError
from foveate.methods.reduce.sit_slim import SitSlim
from foveate.methods.reduce.stvit import STViT
from foveate.train.sit_slim import Drawn, Merged, Pooled, SitSlimRecipe, SitSlimSettings, TopK, cells
from foveate.train.stvit import STViTRecipe, STViTSettings
from foveate.train.tiny_vit import normalised


@torch.no_grad()
def test_it_starts_as_the_teacher_up_to_the_first_slimming() -> None:
    made = SitSlimRecipe(SitSlimSettings(**SitSlimRecipe.smoke), 3)
    pictures = normalised(made.batch(0, 0, 1)["image"])
    dense = zoo.load("tiny-vit")
    wanted = dense.blocks[0](dense.norm_pre(dense._pos_embed(dense.patch_embed(pictures))))
    torch.testing.assert_close(made.student.eval().layers(pictures)[0], wanted)
    untouched = SitSlimRecipe(SitSlimSettings(**SitSlimRecipe.smoke | {"keep": 1.0}), 3).student.eval()
    torch.testing.assert_close(untouched(pictures), dense(pictures))
    assert made.rate("reverse.2.tokens.0.weight") == 5 and made.rate("student.slimming.0.scale") == 1


def test_processes_share_a_batch() -> None:
    made = SitSlimRecipe(SitSlimSettings(**SitSlimRecipe.smoke | {"batch": 4}), 3)
    whole, halves = made.batch(5, 0, 1)["image"], [made.batch(5, rank, 2)["image"] for rank in range(2)]
    assert torch.equal(halves[0], whole[::2]) and torch.equal(halves[1], whole[1::2])


def test_top_k_keeps_values_and_learns_scores() -> None:
    made, x = TopK(8, 3), torch.randn(2, 10, 8, requires_grad=True)
    out = made(x)
    for b in range(2):
        score = made.score(made.norm(x[b])).squeeze(1)
        best = sorted(sorted(range(10), key=lambda j: -score[j].item())[:3])
        torch.testing.assert_close(out[b], x[b, best])
    out.square().sum().backward()
    assert made.score.weight.grad is not None and made.score.weight.grad.any()


@torch.no_grad()
def test_the_other_reducers() -> None:
    x = torch.randn(2, 12, 5)
    drawn = Drawn(12, 4)
    assert torch.equal(drawn(x), x[:, drawn.index]) and drawn.index.tolist() == sorted(set(drawn.index.tolist()))
    pooled = Pooled((3, 4), (3, 2))(x)
    torch.testing.assert_close(pooled, torch.stack([(x[:, 2 * k] + x[:, 2 * k + 1]) / 2 for k in range(6)], 1))
    same = torch.randn(1, 4, 5).repeat_interleave(2, 1)
    torch.testing.assert_close(Merged(4)(same), same[:, 1::2])
    assert Merged(3)(x).shape == (2, 3, 5)
    assert cells((12, 12), 72) in ((8, 9), (9, 8)) and cells((12, 12), 36) == (6, 6) and cells((6, 6), 18) == (3, 6)
    with pytest.raises(InputError, match="no coarser grid"):
        cells((12, 12), 23)


@pytest.mark.parametrize(("name", "value"), [("reducer", "best"), ("reverse_rate", 0.0)])
def test_nonsense_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        SitSlimSettings(**{name: value})


@pytest.mark.parametrize("reducer", ["slim", "topk", "pool"])
def test_smoke(reducer: str, tmp_path: Path) -> None:
    metrics = train.run("sit-slim", out=tmp_path, smoke=True, threads=1, reducer=reducer)
    assert 0 <= metrics["names_mean_average_precision"] <= 1 and metrics["flops"] < 0.65 * metrics["dense_flops"]
    assert (tmp_path / "model.safetensors").is_file()
    if reducer == "slim":
        model = SitSlim.from_pretrained(tmp_path)
        assert model.stage_blocks == (2, 1, 1, 1) and not any("reverse" in name for name in model.state_dict())


@torch.no_grad()
def test_stvit_starts_with_the_weights_of_tiny_vit() -> None:
    made, dense = STViTRecipe(STViTSettings(**STViTRecipe.smoke | {"layers": "ffggr"}), 0), zoo.load("tiny-vit")
    own = made.student.backbone.state_dict()
    for name, weight in dense.state_dict().items():
        if name in own:
            assert torch.equal(own[name], weight[:, 1:] if name == "pos_embed" else weight)
    assert made.model.patch_head is not None and torch.equal(made.model.patch_head.weight, dense.patch_head.weight)
    batch = made.batch(0, 0, 1)
    _, parts = made.loss(made.model, batch)
    logits = made.model.segment(normalised(batch["image"]))
    wrong = -logits.log_softmax(-1).gather(2, batch["labels"].unsqueeze(2)).mean()
    assert parts["patches"] == pytest.approx(float(wrong), rel=1e-4)
    scratch = STViTRecipe(STViTSettings(**STViTRecipe.smoke | {"scratch": True}), 0)
    assert not torch.equal(scratch.student.backbone.head.weight, dense.head.weight)
    assert scratch.model.patch_head is None


@pytest.mark.parametrize("layers", ["ffggs", "ffggr"])
def test_stvit_smoke(layers: str, tmp_path: Path) -> None:
    metrics = train.run("stvit", out=tmp_path, smoke=True, threads=1, layers=layers)
    assert metrics["flops"] < 0.75 * metrics["dense_flops"] and ("patch_mean_iou" in metrics) == layers.endswith("r")
    assert STViT.from_pretrained(tmp_path).semantic.layers == layers
