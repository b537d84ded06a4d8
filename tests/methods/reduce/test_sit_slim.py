"""SiT: token slimming and its reverse against loops, where tokens go, and what is learned from the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("timm")
import timm

from foveate.method import InputError
from foveate.methods.reduce.sit_slim import (
    CONFIGURATIONS,
    FeatureRecalibration,
    ReverseTokenSlimming,
    SitSlim,
    TokenSlimming,
)

SMALL = {"embed_dim": 16, "num_heads": 2, "img_size": 64, "num_classes": 6}


def sit(**changes: Any) -> SitSlim:
    """64 patches; shaken, so that nothing is nearly uniform."""
    torch.manual_seed(changes.pop("seed", 0))
    made = SitSlim.named("tiny", **{"options": SMALL} | changes)
    return shaken(made)


def shaken(made: Any) -> Any:
    for name, weight in made.named_parameters():
        nn.init.normal_(weight, mean=float(name.endswith(("norm.weight", "scale"))), std=0.3)
    return made.eval()


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(5))


# -- token slimming


@torch.no_grad()
def test_slimming_against_a_loop() -> None:
    made, x = shaken(TokenSlimming(8, 3)), torch.randn(2, 10, 8)
    weights = made.weights(x)
    for b in range(2):
        scores = torch.stack([made.score[2](F.gelu(made.score[0](made.norm(x[b, j])))) for j in range(10)])
        for k in range(3):
            shares = torch.exp(made.scale * scores[:, k])
            shares = shares / shares.sum()
            torch.testing.assert_close(weights[b, k], shares)
            # Of the tokens as they are, not behind the norm.
            torch.testing.assert_close(made(x)[b, k], sum(shares[j] * x[b, j] for j in range(10)))


@torch.no_grad()
def test_new_tokens_are_convex_combinations() -> None:
    made, x = shaken(TokenSlimming(8, 5)), 3 * torch.randn(4, 20, 8)
    weights = made.weights(x)
    assert (weights >= 0).all() and (weights.sum(-1) - 1).abs().max() < 1e-6
    out = made(x)
    assert (out >= x.amin(1, keepdim=True) - 1e-5).all() and (out <= x.amax(1, keepdim=True) + 1e-5).all()
    flat = x[:, :1].expand(-1, 20, -1)
    torch.testing.assert_close(made(flat), flat[:, :5])


@torch.no_grad()
def test_order_of_the_tokens_does_not_matter_and_pictures_differ() -> None:
    made, x = shaken(TokenSlimming(8, 5)), torch.randn(2, 20, 8)
    torch.testing.assert_close(made(x[:, torch.randperm(20)]), made(x))
    assert (made.weights(x)[0] - made.weights(x)[1]).abs().max() > 0.01


def test_size_and_start_of_slimming() -> None:
    made = TokenSlimming(12, 5)
    assert float(made.scale.detach()) == 1
    assert sum(p.numel() for p in made.parameters()) == 2 * 12 + 12 * 6 + 6 + 6 * 5 + 5 + 1


@torch.no_grad()
def test_reverse_against_a_loop() -> None:
    made, x = shaken(ReverseTokenSlimming(8, 3, 7)), torch.randn(2, 3, 8)
    normed = made.norm_tokens(x)
    assert made.tokens[0].out_features == 28 and made.channels[0].out_features == 32
    for b in range(2):
        u = torch.stack([made.tokens[2](F.gelu(made.tokens[0](normed[b, :, c]))) for c in range(8)], 1)
        wanted = u + made.channels[2](F.gelu(made.channels[0](made.norm_channels(u))))
        torch.testing.assert_close(made(x)[b], wanted)


# -- the model


@pytest.mark.parametrize(
    ("patches", "keep", "wanted"),
    [
        (196, 0.5, [196, 98, 49, 24]),
        (324, 0.5, [324, 162, 81, 40]),
        # Of the number at first, not of the stage before: 38 * 0.6 is 22.8.
        (64, 0.6, [64, 38, 23, 13]),
        (10, 0.1, [10, 1, 1, 1]),
    ],
)
def test_counts(patches: int, keep: float, wanted: list[int]) -> None:
    assert SitSlim.left(patches, keep, 4) == wanted


@torch.no_grad()
def test_layers_against_blocks_one_by_one() -> None:
    made = sit(stage_blocks=(2, 1, 1, 1), keep=0.6)
    host = made.backbone
    x = host.norm_pre(torch.cat([host.cls_token.expand(2, -1, -1), host.patch_embed(pictures())], 1) + host.pos_embed)
    found = made.layers(pictures())
    stages = {1: 0, 2: 1, 3: 2}
    for number, block in enumerate(host.blocks):
        x = block(x)
        if number in stages:
            x = torch.cat([x[:, :1], made.slimming[stages[number]](x[:, 1:])], 1)
        torch.testing.assert_close(found[number], x)
    assert [one.shape[1] - 1 for one in found] == [64, 38, 23, 13, 13]
    torch.testing.assert_close(made(pictures()), host.head(host.norm(x)[:, 0]))


@torch.no_grad()
def test_class_and_distillation_tokens_pass_by() -> None:
    made = SitSlim(
        backbone="lv-vit", options={**SMALL, "depth": 2, "distilled": True}, stage_blocks=(1, 1), aux_head=False
    ).eval()
    before: list[Tensor] = []
    made.backbone.blocks[0].register_forward_hook(lambda module, args, out: before.append(out))
    after = made.layers(pictures())[0]
    assert before[0].shape[1] == 2 + 16 and after.shape[1] == 2 + 8
    assert torch.equal(after[:, :2], before[0][:, :2])


def test_without_slimming_it_is_the_teacher() -> None:
    host = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=16, depth=5, num_heads=2, num_classes=6,
        pre_norm=True, act_layer="quick_gelu",
    )  # fmt: skip
    shaken(host)
    made = sit(keep=1.0)
    assert len(made.slimming) == 0 and made.load_backbone(host) == []
    with torch.no_grad():
        assert torch.equal(made(pictures()), host(pictures()))
    student = sit()
    assert student.load_backbone(made) == []
    assert torch.equal(student.backbone.blocks[4].mlp.fc1.weight, host.blocks[4].mlp.fc1.weight)


@torch.no_grad()
def test_mixing_says_of_what_patches_tokens_are() -> None:
    """With blocks that do nothing, the tokens at the end are the shares times those at first."""
    made = sit()
    for block in made.backbone.blocks:
        for weight in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(weight.weight), nn.init.zeros_(weight.bias)
    shares = made.mixing(pictures())
    assert shares.shape == (2, 8, 64)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 8))
    host = made.backbone
    first = host.norm_pre(host._pos_embed(host.patch_embed(pictures())))[:, 1:]
    torch.testing.assert_close(made.layers(pictures())[-1][:, 1:], shares @ first)
    assert sit(keep=1.0).mixing(pictures()).equal(torch.eye(64).expand(2, -1, -1))


def test_configurations() -> None:
    assert {name: one["stage_blocks"] for name, one in CONFIGURATIONS.items() if name.startswith("sit")} == {
        "sit-t": (1, 1, 1, 11), "sit-xs": (1, 1, 1, 13), "sit-s": (9, 3, 2, 2), "sit-m": (10, 4, 3, 3),
        "sit-l": (10, 4, 3, 7),
    }  # fmt: skip
    with torch.device("meta"):
        small = SitSlim.named("sit-s")
        assert [one.shape[1] for one in small.layers(torch.empty(1, 3, 224, 224))] == [197] * 8 + [99] * 3 + [
            50
        ] * 2 + [25] * 3
    assert small.aux_head is not None and not small.aux_head.weight.requires_grad


# -- feature recalibration distillation


def recalibration(**settings: Any) -> FeatureRecalibration:
    made = FeatureRecalibration(sit(), sit(keep=1.0, seed=1), **settings)
    shaken(made.reverse)
    return made


@torch.no_grad()
def test_every_block_is_brought_back_to_all_tokens() -> None:
    made = recalibration()
    layers = made.student.layers(pictures())
    found = made.recovered(layers)
    assert [one.shape for one in found] == [(2, 64, 16)] * 5
    assert torch.equal(found[0], layers[0][:, 1:]), "before the first slimming the tokens themselves are compared"
    assert list(made.reverse) == ["1", "2", "3", "4"]
    assert [made.reverse[name].tokens[0].in_features for name in made.reverse] == [32, 16, 8, 8]
    for k in range(1, 5):
        torch.testing.assert_close(found[k], made.reverse[str(k)](layers[k][:, 1:]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@torch.no_grad()
def test_loss_by_hand(temperature: float) -> None:
    made = recalibration(token_weight=3.0, logit_weight=0.5, temperature=temperature)
    x, labels = pictures(), torch.tensor([4, 0])
    loss, parts = made(x, labels)
    student, teacher = made.student, made.teacher
    ours = [made.reverse[str(k)](one[:, 1:]) if k else one[:, 1:] for k, one in enumerate(student.layers(x))]
    theirs = [one[:, 1:] for one in teacher.layers(x)]  # type: ignore[operator]
    tokens = sum(float(((a - b) ** 2).sum()) / a.numel() for a, b in zip(ours, theirs)) / 5
    p, q = (teacher(x) / temperature).softmax(-1), (student(x) / temperature).softmax(-1)
    logits = temperature**2 * float((p * (p.log() - q.log())).sum()) / 2
    right = -float(sum(student(x).log_softmax(-1)[b, labels[b]] for b in range(2))) / 2
    assert float(parts["tokens"]) == pytest.approx(tokens, rel=1e-4)
    assert float(parts["logits"]) == pytest.approx(logits, rel=1e-4)
    assert float(loss) == pytest.approx(right + 3 * tokens + 0.5 * logits, rel=1e-4)
    soft = torch.full((2, 6), 0.02)
    soft[torch.arange(2), labels] = 0.9
    mixed = -float((soft * student(x).log_softmax(-1)).sum()) / 2
    assert float(made(x, soft)[1]["labels"]) == pytest.approx(mixed, rel=1e-4)


@torch.no_grad()
def test_several_labels() -> None:
    made = recalibration(labels="multiple")
    x, labels = pictures(), torch.randint(2, (2, 6)).float()
    _, parts = made(x, labels)
    p, q = made.teacher(x).sigmoid(), made.student(x).sigmoid()
    kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum() / 2
    cross = -(labels * q.log() + (1 - labels) * (1 - q).log()).sum() / 2
    torch.testing.assert_close(parts["logits"], kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts["labels"], cross, rtol=1e-4, atol=1e-5)


def test_the_student_is_done_without_the_reverse_modules() -> None:
    made = recalibration()
    names = set(made.student.state_dict())
    calls: list[int] = []
    for one in made.reverse.values():
        one.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        before = made.student(pictures())
        assert not calls and not any("reverse" in name for name in names)
        training = made.student.forward_head(made.student.backbone.norm(made.train().student.layers(pictures())[-1]))
        torch.testing.assert_close(training, before)
        del made.reverse
        assert torch.equal(made.student.eval()(pictures()), before)
    assert recalibration(token_weight=0).reverse_parameters == 0


def test_gradients_reach_all_but_the_teacher(tmp_path: Path) -> None:
    made = recalibration()
    kept = {name: weight.clone() for name, weight in made.teacher.state_dict().items()}
    made.train()
    assert not made.teacher.training
    loss, _ = made(pictures(), torch.tensor([1, 2]))
    loss.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in made.parameters())
    assert all(weight.grad is None for weight in made.teacher.parameters())
    torch.optim.SGD(made.parameters(), 0.1).step()
    assert all(torch.equal(weight, kept[name]) for name, weight in made.teacher.state_dict().items())
    assert not any(weight is other for weight in made.parameters() for other in made.teacher.parameters())
    made.double()
    assert next(made.teacher.parameters()).dtype == torch.float64
    made.float().eval().student.save_pretrained(tmp_path)
    again = SitSlim.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(pictures()), made.student(pictures()))


def test_a_timm_model_teaches_as_well() -> None:
    teacher = sit(keep=1.0, seed=1)
    for one in (teacher, teacher.backbone):
        made = FeatureRecalibration(sit(), one)
        torch.manual_seed(3)
        shaken(made.reverse)
        loss, _ = made(pictures(), torch.tensor([1, 2]))
        assert float(loss.detach()) == pytest.approx(
            float(FeatureRecalibration.forward(made, pictures(), torch.tensor([1, 2]))[0].detach())
        )
        assert len(made._taught(pictures())[0]) == 5


def test_a_convolutional_teacher_decides_for_the_distillation_token() -> None:
    options = {**SMALL, "depth": 2, "distilled": True}
    made = {
        keep: SitSlim(backbone="lv-vit", options=options, stage_blocks=(1, 1), keep=keep, aux_head=False).eval()
        for keep in (0.5, 1.0)
    }

    class Says(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.one_hot(torch.tensor([3, 5]), 6).float()

    objective = FeatureRecalibration(made[0.5], made[1.0], hard_teacher=Says(), hard_weight=0.7)
    with torch.no_grad():
        loss, parts = objective(pictures(), torch.tensor([1, 2]))
        host = made[0.5].backbone
        last = host.norm(made[0.5].layers(pictures())[-1])
        wanted = F.cross_entropy(host.head_dist(last[:, 1]), torch.tensor([3, 5]))
        torch.testing.assert_close(parts["hard"], wanted)
        rest = parts["labels"] + 2 * parts["tokens"] + 2 * parts["logits"]
        torch.testing.assert_close(loss, rest + 0.7 * parts["hard"])
        torch.testing.assert_close(made[0.5](pictures()), (host.head(last[:, 0]) + host.head_dist(last[:, 1])) / 2)
    with pytest.raises(InputError, match="hard_teacher needs"):
        FeatureRecalibration(sit(), sit(keep=1.0), hard_teacher=Says())


@torch.no_grad()
def test_batch_and_bfloat16() -> None:
    made = sit()
    torch.testing.assert_close(made(pictures())[1], made(pictures()[1:])[0], rtol=1e-4, atol=1e-5)
    half = made.bfloat16()(pictures().bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage_blocks": (1, 1)}, "add up to the 5 blocks"),
        ({"stage_blocks": ()}, "stage_blocks must be"),
        ({"stage_blocks": (5, 0)}, "stage_blocks must be"),
        ({"stage_blocks": 5}, "stage_blocks must be"),
        ({"keep": 0.0}, "keep must be"),
        ({"keep": float("nan")}, "keep must be"),
        ({"backbone": "resnet18"}, "backbone"),
    ],
)
def test_nonsense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SitSlim.named("tiny", **{"options": SMALL} | settings)
    with pytest.raises(InputError, match="did you mean sit-s"):
        SitSlim.named("sit-ss")


@pytest.mark.parametrize("name", ["token_weight", "logit_weight", "temperature", "hard_weight", "labels"])
def test_nonsense_is_refused_by_the_objective(name: str) -> None:
    with pytest.raises(InputError, match=name):
        FeatureRecalibration(sit(), sit(keep=1.0), **{name: -1.0})  # type: ignore[arg-type]
