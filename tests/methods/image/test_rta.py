"""RTA against slow loops: pooling position by position, the loss row by row, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")

from foveate import zoo
from foveate.measure.claims import verify
from foveate.method import InputError
from foveate.methods.image.rta import FanHybrid, Rta, TokenAwarePooling, attention_diversity_loss

VIT = "vit_base_patch16_clip_quickgelu_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
FAN = {"width": 16, "depth": 2, "heads": 2, "stages": (1, 1), "num_classes": 5}


def randomised(model: nn.Module) -> Any:
    """The model with weights that are far from their initial values, and statistics too."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) + 0.1 if tensor.ndim < 2 else 0.3 * torch.randn_like(tensor)
    return model.eval()


def slow_pool(x: Tensor, weights: Tensor) -> Tensor:
    """x (B, C, H, W), weights (B, H, W, K), one position at a time."""
    batch, _, height, width = x.shape
    out = torch.zeros_like(x)
    for b in range(batch):
        for row in range(height):
            for column in range(width):
                out[b, :, row, column] = weights[b, row, column, 0] * x[b, :, row, column]
                for r in range(1, weights.shape[3]):
                    total = torch.zeros(x.shape[1])
                    for dr in (-r, 0, r):
                        for dc in (-r, 0, r):
                            if 0 <= row + dr < height and 0 <= column + dc < width:
                                total += x[b, :, row + dr, column + dc]
                    out[b, :, row, column] += weights[b, row, column, r] * total / 9
    return out


@pytest.mark.parametrize("batch", [1, 2])
def test_pooling_is_the_weighted_sum_of_means(batch: int) -> None:
    pool = randomised(TokenAwarePooling(6, 4))
    tokens = torch.randn(batch, 35, 6)
    with torch.no_grad():
        pooled, weights = pool(tokens, (5, 7))
    assert weights.shape == (batch, 5, 7, 4) and float(weights.min()) >= 0
    assert torch.allclose(weights.sum(-1), torch.ones(batch, 5, 7))
    x = tokens.transpose(1, 2).reshape(batch, 6, 5, 7)
    assert torch.allclose(pooled.transpose(1, 2).reshape(x.shape), slow_pool(x, weights), atol=1e-5)
    # The weights, from the layers that the paper names.
    first, norm, second = pool.predictor
    hidden = torch.nn.functional.conv2d(x, first.weight, padding=1)
    shape = (1, -1, 1, 1)
    hidden = (hidden - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    hidden = hidden * norm.weight.view(shape) + norm.bias.view(shape)
    expected = torch.nn.functional.conv2d(hidden, second.weight, padding=1).softmax(1)
    assert torch.allclose(weights.movedim(3, 1), expected, atol=1e-5)


def fixed(pool: TokenAwarePooling, weights: list[float]) -> TokenAwarePooling:
    """The pooling with the same mixing weights everywhere."""

    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor(weights).log().view(1, -1, 1, 1).expand(len(x), -1, *x.shape[2:])

    pool.predictor = Same()  # type: ignore[assignment]
    return pool


def test_identity_and_constant_maps() -> None:
    tokens = torch.randn(2, 64, 6)
    pooled, _ = fixed(TokenAwarePooling(6, 4), [1, 0, 0, 0])(tokens, (8, 8))
    assert torch.equal(pooled, tokens)
    alone = randomised(TokenAwarePooling(6, 1))
    assert torch.allclose(alone(tokens, (8, 8))[0], tokens, atol=1e-6)
    flat = torch.ones(1, 81, 3)
    pooled, _ = fixed(TokenAwarePooling(3, 4), [0.25] * 4)(flat, (9, 9))
    grid = pooled.view(9, 9, 3)
    assert torch.allclose(grid[3:6, 3:6], torch.ones(3, 3, 3)), "of all dilations, neighbours are within"
    border = torch.ones(9, 9, dtype=torch.bool)
    border[3:6, 3:6] = False
    assert float(grid[border].max()) < 1, "zeros beyond the border count"
    assert grid[0, 0, 0] == pytest.approx(0.25 * (1 + 3 * 4 / 9))


@pytest.mark.parametrize("backbone", ["fan", "vit"])
def test_the_shortcut_does_not_see_the_pooling(backbone: str) -> None:
    model = Rta(backbone="fan-b-hybrid", options=FAN) if backbone == "fan" else Rta(backbone=VIT, options=TINY)
    randomised(model)
    pixels = torch.randn(2, 3, 64, 64) if backbone == "fan" else torch.randn(2, 3, 32, 32)
    before = model(pixels)
    states = {name: value.clone() for name, value in model.pools.state_dict().items()}
    randomised(model.pools)
    assert float((model(pixels) - before).detach().abs().max()) > 1e-5, "attention sees the pooling"
    for block in model.backbone.blocks:
        nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(block.attn.proj.bias)
    silent = model(pixels)
    model.pools.load_state_dict(states)
    assert torch.equal(model(pixels), silent)


def test_a_block_by_hand() -> None:
    model = randomised(Rta(backbone=VIT, options=TINY | {"depth": 1}))
    vit, pool = model.backbone, model.pools[0]
    pixels = torch.randn(2, 3, 32, 32)
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))
    averaged = torch.cat([x[:, :1], pool(x[:, 1:], (4, 4))[0]], 1)
    block = vit.blocks[0]
    hooks, block.norm1._forward_pre_hooks = block.norm1._forward_pre_hooks, type(block.norm1._forward_pre_hooks)()
    y = x + block.attn(block.norm1(averaged))
    y = y + block.mlp(block.norm2(y))
    wanted = vit.head(vit.norm(y)[:, 0])
    block.norm1._forward_pre_hooks = hooks
    assert torch.allclose(model(pixels), wanted, atol=1e-5)


def test_grids_that_are_no_squares() -> None:
    fan = randomised(Rta(backbone="fan-b-hybrid", options=FAN))
    tall = torch.randn(1, 3, 96, 32)
    assert fan.forward_features(tall).shape == (1, 1 + 6 * 2, 16)
    # Mirrored pictures have mirrored grids: pooling treats rows and columns as it should.
    pool = fan.pools[0]
    tokens = torch.randn(1, 12, 16)
    mirrored = tokens.view(1, 6, 2, 16).transpose(1, 2).reshape(1, 12, 16)
    for convolution in (pool.predictor[0], pool.predictor[2]):
        convolution.weight.data = (convolution.weight + convolution.weight.transpose(2, 3)) / 2
    one, other = pool(tokens, (6, 2))[0], pool(mirrored, (2, 6))[0]
    assert torch.allclose(one.view(1, 6, 2, 16).transpose(1, 2).reshape(1, 12, 16), other, atol=1e-5)
    with pytest.raises(InputError, match="multiples of 16 px"):
        fan(torch.randn(1, 3, 90, 32))


def slow_loss(maps: list[Tensor], factor: float) -> float:
    layers = []
    for attention in maps:
        batch, heads, queries, keys = attention.shape
        values = []
        for b in range(batch):
            rows = [sum(attention[b, h, i] for h in range(heads)) / heads for i in range(queries)]
            mean = sum(rows) / queries  # type: ignore[operator]
            clear = [torch.tensor([float(v) if v > factor / keys else 0.0 for v in row]) for row in (*rows, mean)]
            for row in clear[:-1]:
                lengths = float(row.norm() * clear[-1].norm())
                values.append(float(row @ clear[-1]) / lengths if lengths else 0.0)
        layers.append(sum(values) / len(values))
    return sum(layers) / len(layers)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_loss_row_by_row(batch: int) -> None:
    maps = [(4 * torch.randn(batch, 2, 9, 9)).softmax(-1) for _ in range(3)]
    loss = attention_diversity_loss(maps)
    assert float(loss) == pytest.approx(slow_loss(maps, 2.0), abs=1e-5) and 0 <= float(loss) <= 1
    assert float(attention_diversity_loss(maps, 1.5)) == pytest.approx(slow_loss(maps, 1.5), abs=1e-5)
    shuffled = [one.flip(1) for one in maps]
    assert float(attention_diversity_loss(shuffled)) == pytest.approx(float(loss), abs=1e-6)


def test_extremes_of_the_loss() -> None:
    peaked = torch.zeros(1, 2, 8, 8)
    peaked[..., 3] = 1
    assert float(attention_diversity_loss([peaked])) == pytest.approx(1)
    uniform = torch.full((2, 2, 8, 8), 1 / 8, requires_grad=True)
    nothing = attention_diversity_loss([uniform])
    nothing.backward()
    assert float(nothing.detach()) == 0 and uniform.grad is not None and bool((uniform.grad == 0).all())
    # 4 of 8 rows each at one of two places: disjoint halves are less alike than equal rows.
    halves = torch.zeros(1, 1, 8, 8)
    halves[:, :, :4, 0] = halves[:, :, 4:, 1] = 1
    assert float(attention_diversity_loss([halves])) == pytest.approx(0.5**0.5)
    with pytest.raises(InputError, match="at least one layer"):
        attention_diversity_loss([])


def test_gradients_flow_through_entries_above_the_threshold_only() -> None:
    attention = (3 * torch.randn(2, 1, 6, 6)).softmax(-1).requires_grad_()
    attention_diversity_loss([attention]).backward()
    assert attention.grad is not None and bool(attention.grad.isfinite().all())
    mean = attention.detach().mean(2, keepdim=True)
    counts = (attention.detach() > 2 / 6) | (mean > 2 / 6)
    assert bool((attention.grad[~counts] == 0).all()) and bool((attention.grad[counts] != 0).any())


def test_attention_is_that_of_the_blocks() -> None:
    model = randomised(Rta(backbone=VIT, options=TINY))
    pixels = torch.randn(2, 3, 32, 32)
    seen: list[Tensor] = []
    handle = model.backbone.blocks[1].attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits, maps = model.attend(pixels)
    handle.remove()
    assert torch.allclose(logits, model(pixels), atol=1e-5)
    attn = model.backbone.blocks[1].attn
    assert attn.fused_attn and not attn.attn_drop._forward_pre_hooks, "left as it was"
    query, key, _ = attn.qkv(seen[0]).view(2, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected = torch.einsum("bhid,bhjd->bhij", query, key).div(8**0.5).softmax(-1)
    assert len(maps) == 2 and torch.allclose(maps[1], expected, atol=1e-5)
    labels = torch.tensor([1, 4])
    total, parts = model.loss(logits, maps, labels)
    wanted = (parts["task"] + attention_diversity_loss(maps)).detach()
    assert float(total.detach()) == pytest.approx(float(wanted), abs=1e-6)


@pytest.mark.parametrize("backbone", ["fan", "vit"])
def test_gradients_reach_every_parameter_and_weights_come_back(backbone: str, tmp_path: Path) -> None:
    model = Rta(backbone="fan-s-hybrid", options=FAN) if backbone == "fan" else Rta(backbone=VIT, options=TINY)
    # With equal rows of attention, or a layer scale of 1e-6, gradients would vanish.
    randomised(model).train()
    pixels = torch.randn(2, 3, 32, 32)
    logits, maps = model.attend(pixels)
    model.loss(logits, maps, torch.tensor([0, 3]))[0].backward()
    missing = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert not missing
    model.eval()
    model.save_pretrained(tmp_path)
    again = Rta.from_pretrained(tmp_path).eval()
    assert torch.equal(again(pixels), model(pixels))


def test_weights_of_a_plain_backbone() -> None:
    tower = zoo.load("tiny-vit")
    options = TINY | {"img_size": 96, "embed_dim": 128, "depth": 5, "num_heads": 4, "num_classes": 40}
    options |= {"norm_layer": "layernorm"}  # timm's, whose epsilon is the zoo's.
    plain = Rta(backbone=VIT, scales=0, options=options).eval()
    plain.load_backbone(tower)
    pixels = torch.randn(1, 3, 96, 96)
    assert torch.allclose(plain(pixels), tower(pixels), atol=1e-5)
    pooled = Rta(backbone=VIT, options=options).eval()
    pooled.load_backbone(tower)
    for pool in pooled.pools:
        fixed(pool, [1, 0, 0, 0])  # type: ignore[arg-type]
    assert torch.allclose(pooled(pixels), tower(pixels), atol=1e-5)
    with pytest.raises(InputError, match="no weights"):
        plain.load_backbone({name: value for name, value in tower.state_dict().items() if "blocks.1" not in name})


def test_bad_input() -> None:
    for settings in ({"scales": -1}, {"threshold": -0.5}, {"weight": -1.0}):
        with pytest.raises(InputError, match=next(iter(settings))):
            Rta(backbone=VIT, options=TINY, **settings)
    with pytest.raises(InputError, match="no backbone 'fan-b'; did you mean fan-"):
        Rta(backbone="fan-b")
    with pytest.raises(InputError, match="multiple of heads"):
        FanHybrid(width=10, heads=4)
    with pytest.raises(InputError, match="two depths"):
        FanHybrid(stages=(1,))
    with pytest.raises(InputError, match="backbone"):
        Rta(backbone="no_such_model")


def test_claims() -> None:
    checked = verify("rta")
    assert len(checked) == 8 and all(one.holds for one in checked)
