"""STViT against loops and timm's own blocks: what each letter does, windows and their borders, recovery, seeds."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")
import timm
from timm.models.vision_transformer import Block

from foveate.measure.flops import count_flops
from foveate.method import InputError
from foveate.methods.reduce.stvit import SWIN_CONFIGURATIONS, STViT, STViTSwin
from foveate.nn.semantic_tokens import Seeds, SemanticLayers, enlarged

WIDTH = 16
SMALL_SWIN: dict[str, Any] = {"width": 8, "depths": (1, 1, 6, 1), "heads": (1, 1, 2, 2), "classes": 5}


def blocks(count: int, **options: Any) -> list[Any]:
    torch.manual_seed(1)
    made = [Block(WIDTH, 4, qkv_bias=True, **options).eval() for _ in range(count)]
    for weight in itertools.chain(*(one.parameters() for one in made)):
        nn.init.normal_(weight, std=0.3)
    return made


def semantic(layers: str, **settings: Any) -> SemanticLayers:
    torch.manual_seed(2)
    made = SemanticLayers(WIDTH, layers, **{"seeds": "mean", "centres": "spatial"} | settings)
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.5)
    return made.eval()


def looked(block: Any, query: Tensor, residual: Tensor | float, holds: Tensor) -> Tensor:
    """One block, of query (s, C) on keys of holds (K, C): a plain loop over heads."""
    attention = block.attn
    weight, bias = attention.qkv.weight, attention.qkv.bias
    q, (k, v) = block.norm1(query), (block.norm1(holds),) * 2
    q, k, v = (x @ w.T + b for x, w, b in zip((q, k, v), weight.chunk(3), bias.chunk(3)))
    heads = [
        ((q[:, part] @ k[:, part].T) / (WIDTH // 4) ** 0.5).softmax(-1) @ v[:, part]
        for part in (slice(4 * h, 4 * h + 4) for h in range(4))
    ]
    x = residual + block.ls1(attention.proj(torch.cat(heads, 1)))
    return x + block.ls2(block.mlp(block.norm2(x)))


@torch.no_grad()
def test_the_letters_against_a_loop() -> None:
    made, layers = semantic("fggsr", per_window=2, centres="both"), blocks(5)
    x = torch.randn(2, 24, WIDTH)
    out, grid = made(layers, x, (4, 6))
    assert out.shape == x.shape and grid == (4, 6)
    for b in range(2):
        y = layers[0](x[b : b + 1])[0]
        plane = y.view(4, 6, WIDTH)
        seeds = torch.stack([plane[2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean((0, 1)) for i in (0, 1) for j in (0, 1)])
        s = looked(layers[1], seeds, seeds, y)
        query = s + made.global_centres
        s = looked(layers[2], query, query, torch.cat([s, y]))
        s = layers[3](s[None])[0]
        torch.testing.assert_close(out[b], looked(layers[4], y, y, s), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", ["query", "seeds"])
@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("seed_keys", [True, False])
@torch.no_grad()
def test_switches_of_the_release(residual: str, shortcut: bool, seed_keys: bool) -> None:
    made = semantic("ggg", per_window=2, residual=residual, shortcut=shortcut, seed_keys=seed_keys)
    layers, x = blocks(3), torch.randn(1, 16, WIDTH)
    y, plane = x[0], x[0].view(4, 4, WIDTH)
    seeds = torch.stack([plane[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((0, 1)) for i in (0, 1) for j in (0, 1)])
    s = looked(layers[0], seeds, seeds if shortcut else 0.0, torch.cat([seeds, y]) if seed_keys else y)
    for layer in layers[1:]:
        s = looked(layer, s, s if residual == "query" else seeds, torch.cat([s, y]))
    torch.testing.assert_close(made(layers, x, (4, 4))[0][0], s, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_centres() -> None:
    layers, x = blocks(2), torch.randn(1, 16, WIDTH)
    made = semantic("gg", per_window=2, centres="global")
    centres = made.global_centres
    assert centres is not None and not hasattr(made, "seeds")
    s = looked(layers[0], centres, centres, x[0])
    s = looked(layers[1], s + centres, s + centres, torch.cat([s, x[0]]))
    torch.testing.assert_close(made(layers, x, (4, 4))[0][0], s, rtol=1e-4, atol=1e-4)
    assert semantic("gg", centres="spatial").global_centres is None


@pytest.mark.parametrize("seeds", ["mean", "max"])
@torch.no_grad()
def test_with_a_seed_for_each_token_it_is_self_attention(seeds: str) -> None:
    layers, x = blocks(1), torch.randn(2, 16, WIDTH)
    out, grid = semantic("g", per_window=4, seeds=seeds)(layers, x, (4, 4))
    torch.testing.assert_close(out, layers[0](x))
    assert grid == (4, 4)


@pytest.mark.parametrize("seeds", ["mean", "max"])
@torch.no_grad()
def test_order_within_a_region_does_not_matter(seeds: str) -> None:
    made, layers, x = semantic("ggs", per_window=2, seeds=seeds), blocks(3), torch.randn(1, 36, WIDTH)
    place = torch.arange(36).view(6, 6)
    for i, j in itertools.product((0, 3), repeat=2):
        region = place[i : i + 3, j : j + 3].reshape(-1)
        place[i : i + 3, j : j + 3] = region[torch.randperm(9)].view(3, 3)
    before, after = (made(layers, one, (6, 6))[0] for one in (x, x[:, place.flatten()]))
    torch.testing.assert_close(before, after)
    other = made(layers, x[:, torch.arange(36).roll(7)], (6, 6))[0]
    assert not torch.allclose(before, other, atol=1e-3)


@torch.no_grad()
def test_patch_tokens_stay_as_they_are_until_recovery() -> None:
    made, layers, x = semantic("ggsr", per_window=2), blocks(4), torch.randn(1, 16, WIDTH)
    kept = x.clone()
    seen = []
    layers[3].norm1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    made(layers, x, (4, 4))
    assert torch.equal(seen[0], kept) and torch.equal(x, kept)


@torch.no_grad()
def test_attention_adds_up_to_one() -> None:
    record: list[Tensor] = []
    semantic("ggsr", per_window=2)(blocks(4), torch.randn(2, 16, WIDTH), (4, 4), record=record)
    assert [one.shape[1:] for one in record] == [(4, 4, 16), (4, 4, 20), (4, 16, 4)]
    for one in record:
        torch.testing.assert_close(one.sum(-1), torch.ones(one.shape[:-1]))


# -- windows


def test_enlarged_windows_of_the_release_are_an_unfold() -> None:
    index, hidden = enlarged((14, 14), 7, 10, "inside", "union")
    plane = torch.arange(196.0).view(1, 1, 14, 14)
    wanted = nn.functional.unfold(plane, 10, stride=4)[0].T
    assert torch.equal(torch.from_numpy(index).float(), wanted) and not hidden.any()


@pytest.mark.parametrize("mask", ["union", "corner"])
@pytest.mark.parametrize(("grid", "reach"), [((7, 7), 14), ((10, 14), 14), ((16, 9), 21)])
def test_places_outside(grid: tuple[int, int], reach: int, mask: str) -> None:
    index, hidden = enlarged(grid, 7, reach, "masked", mask)
    number = 0
    for row, column in itertools.product(range(-(-grid[0] // 7)), range(-(-grid[1] // 7))):
        for k, (i, j) in enumerate(itertools.product(range(reach), repeat=2)):
            y, x = 7 * row - (reach - 7) // 2 + i, 7 * column - (reach - 7) // 2 + j
            out = not 0 <= y < grid[0], not 0 <= x < grid[1]
            assert index[number, k] == (grid[0] * grid[1] if any(out) else y * grid[1] + x)
            assert hidden[number, k] == (any(out) if mask == "union" else all(out))
        number += 1
    assert len(index) == number
    whole = enlarged((14, 14), 7, 7, "masked", mask)
    assert not whole[1].any(), "without padding nothing is hidden"


@pytest.mark.parametrize(("border", "mask"), [("masked", "union"), ("masked", "corner"), ("inside", "union")])
@torch.no_grad()
def test_windows_against_a_loop(border: str, mask: str) -> None:
    """Windows of 3 with 2 x 2 semantic tokens, on a grid that they do not divide."""
    made = semantic(
        "gglsr", window=3, per_window=2, reach=(5, 7, 6), border=border, mask=mask, seed_keys=True, seeds="max"
    )
    layers, x, grid = blocks(5, init_values=0.5), torch.randn(1, 7 * 5, WIDTH), (7, 5)
    record: list[Tensor] = []
    out, size = made(layers, x, grid, record=record)
    assert out.shape == x.shape and size == grid
    plane = x[0].view(7, 5, WIDTH)
    windows = list(itertools.product(range(3), range(2)))

    def enlarge(block: Any, whole: Tensor, row: int, column: int, side: int, reach: int) -> Tensor:
        """The keys' tokens before the norm; a missing one that is seen is whatever the norm makes zeros of."""
        found = []
        start = [side * one - (reach - side) // 2 for one in (row, column)]
        if border == "inside":
            start = [max(0, min(one, n - reach)) for one, n in zip(start, whole.shape[:2])]
        for y, z in itertools.product(*(range(one, one + reach) for one in start)):
            out_y, out_z = not 0 <= y < whole.shape[0], not 0 <= z < whole.shape[1]
            if not (out_y or out_z):
                found.append(block.norm1(whole[y, z]))
            elif mask == "corner" and not (out_y and out_z):
                found.append(torch.zeros(WIDTH))
        return torch.stack(found)

    def look(block: Any, query: Tensor, residual: Tensor, normed_keys: Tensor) -> Tensor:
        norm, block.norm1 = block.norm1, nn.Identity()
        try:
            return looked(block, norm(query), residual, normed_keys)
        finally:
            block.norm1 = norm

    padded = nn.functional.pad(plane.permute(2, 0, 1)[None], (0, 1, 0, 2), mode="replicate")[0]
    # Bins of 3 places in 2: the first two, and the last two.
    seeds = {
        (r, c): torch.stack([
            padded[:, 3 * r + a : 3 * r + a + 2, 3 * c + b : 3 * c + b + 2].amax((1, 2)) for a in (0, 1) for b in (0, 1)
        ])
        for r, c in windows
    }  # fmt: skip
    first, second, local, everywhere, recover = layers
    s = {
        at: look(first, seeds[at], seeds[at], torch.cat([first.norm1(seeds[at]), enlarge(first, plane, *at, 3, 5)]))
        for at in windows
    }
    s = {
        at: look(second, s[at], s[at], torch.cat([second.norm1(s[at]), enlarge(second, plane, *at, 3, 7)]))
        for at in windows
    }
    s = {at: local(one[None])[0] for at, one in s.items()}
    everything = everywhere(torch.cat([s[at] for at in windows])[None])[0]
    s = dict(zip(windows, everything.split(4)))
    raster = torch.empty(6, 4, WIDTH)
    for (r, c), one in s.items():
        raster[2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = one.view(2, 2, WIDTH)
    for y, z in itertools.product(range(7), range(5)):
        token = plane[y, z][None]
        wanted = look(recover, token, token, enlarge(recover, raster, y // 3, z // 3, 2, 6))
        torch.testing.assert_close(out[0, 5 * y + z], wanted[0], rtol=1e-4, atol=1e-4)
    for attention in record:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


@torch.no_grad()
def test_hidden_keys_weigh_nothing_and_the_corner_mask_leaves_some() -> None:
    layers, x, shares = blocks(1), torch.randn(1, 9, WIDTH), {}
    for mask in ("union", "corner"):
        record: list[Tensor] = []
        settings: dict[str, Any] = {"reach": (7, 0, 0), "border": "masked", "mask": mask}
        semantic("g", window=3, per_window=1, **settings)(layers, x, (3, 3), record=record)
        index, _ = enlarged((3, 3), 3, 7, "masked", mask)
        shares[mask] = record[0][..., torch.from_numpy(index[0] == 9)].amax()
    assert shares["union"] < 1e-6 < 1e-3 < shares["corner"]


# -- seeds


@torch.no_grad()
def test_predicted_seeds_against_a_loop() -> None:
    torch.manual_seed(0)
    made = Seeds(6, "predicted")
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.7)
    x = torch.randn(2, 6, 6, 8)
    said = made.predict(nn.functional.gelu(made.norm(made.neighbours(x).permute(0, 2, 3, 1))))
    both = torch.cat([x.permute(0, 2, 3, 1), said[..., :1]], -1)
    out = made(x, (2, 4))

    def read(b: int, y: float, z: float) -> Tensor:
        y, z = min(max(y, 0.0), 5.0), min(max(z, 0.0), 7.0)
        i, j = min(int(y), 4), min(int(z), 6)
        u, v = y - i, z - j
        top = (1 - v) * both[b, i, j] + v * both[b, i, j + 1]
        return (1 - u) * top + u * ((1 - v) * both[b, i + 1, j] + v * both[b, i + 1, j + 1])

    for b, i, j in itertools.product(range(2), range(2), range(4)):
        shift = said[b, 3 * i : 3 * i + 3, 2 * j : 2 * j + 2, 1:].mean((0, 1)).tanh() * torch.tensor([1.5, 1.0])
        # Regions of 3 x 2 places: read at their centres, moved.
        points = torch.stack([
            read(b, 3 * i + a + float(shift[0]), 2 * j + c + float(shift[1])) for a in range(3) for c in range(2)
        ])  # fmt: skip
        wanted = points[:, 6].softmax(0) @ points[:, :6]
        torch.testing.assert_close(out[b, :, i, j], wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_pooled_seeds_of_a_window_overlap_as_released() -> None:
    x = torch.randn(1, 2, 14, 14)
    out = Seeds(2, "max")(x, (6, 6))
    for i, j in itertools.product(range(6), repeat=2):
        window, bins = (7 * (i // 3), 7 * (j // 3)), ((0, 3), (2, 5), (4, 7))
        (a, b), (c, d) = bins[i % 3], bins[j % 3]
        part = x[0, :, window[0] + a : window[0] + b, window[1] + c : window[1] + d]
        assert torch.equal(out[0, :, i, j], part.amax((1, 2)))


# -- whole models


def tiny(**changes: Any) -> STViT:
    torch.manual_seed(0)
    options = {"embed_dim": 32, "num_heads": 2, "img_size": 48, "num_classes": 6}
    return STViT.named("tiny", **{"options": options} | changes).eval()


@torch.no_grad()
def test_shapes() -> None:
    pictures = torch.randn(2, 3, 48, 48)
    assert tiny().forward_features(pictures).shape == (2, 16, 32) and tiny()(pictures).shape == (2, 6)
    assert tiny(layers="ffggr").forward_features(pictures).shape == (2, 36, 32)
    assert tiny(regions=3).forward_features(pictures).shape == (2, 9, 32)
    with torch.device("meta"):
        # 4 + 2 + 6 layers, 196 tokens to 16.
        assert STViT.named("deit-t").forward_features(torch.empty(1, 3, 224, 224)).shape == (1, 16, 192)
    for name, settings in SWIN_CONFIGURATIONS.items():
        narrow = {"width": 8, "depths": (1, 1, len(settings["layers"]), 1), "heads": (1, 1, 2, 2)}
        made = STViTSwin.named(name, **narrow)
        if name == "stvit-swin-t":
            assert [x.shape[2] for x in made.eval().stages(torch.zeros(1, 3, 224, 224))] == [56, 28, 6, 3]
        assert made.semantic.recovers == name.startswith("stvit-r") and settings["depths"][2] == len(settings["layers"])


@torch.no_grad()
def test_weights_of_a_trained_vit_fit() -> None:
    """Where nothing is semantic until the last layer, the features before it are those of the trained model."""
    made = tiny(layers="ffffg")
    host = timm.create_model(
        "vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=32, depth=5, num_heads=2, num_classes=6,
        pre_norm=True, act_layer="quick_gelu", class_token=False, global_pool="avg", fc_norm=False,
    ).eval()  # fmt: skip
    for weight in host.parameters():
        nn.init.normal_(weight, std=0.1)
    assert made.load_backbone(host) == []
    seen: list[Tensor] = []
    for model in (made.backbone, host):
        model.blocks[3].register_forward_hook(lambda module, args, out: seen.append(out))
    pictures = torch.randn(1, 3, 48, 48)
    made(pictures), host(pictures)
    torch.testing.assert_close(*seen)
    with_class_token = timm.create_model(
        "vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=32, depth=5, num_heads=2, num_classes=6,
        pre_norm=True,
    )  # fmt: skip
    assert made.load_backbone(with_class_token) == []
    assert torch.equal(made.backbone.pos_embed, with_class_token.pos_embed[:, 1:])


@torch.no_grad()
def test_cost_behind_the_generating_layers_does_not_depend_on_the_picture() -> None:
    spent = []
    for side in (48, 96):
        made = [tiny(layers="fgg" + "s" * k, options={"img_size": side, "depth": 3 + k}) for k in (0, 2)]
        picture = torch.zeros(1, 3, side, side)
        flops = [count_flops(functools.partial(model, picture)) for model in made]
        spent.append(flops[1] - flops[0])
    # Two blocks on 16 tokens: 12 N C^2 + 2 N^2 C multiply-adds each.
    assert spent == [2 * 2 * (12 * 16 * 128**2 + 2 * 16**2 * 128)] * 2


@torch.no_grad()
def test_mixing_is_the_last_layers_attention() -> None:
    made, pictures = tiny(), torch.randn(2, 3, 48, 48)
    shares = made.mixing(pictures)
    assert shares.shape == (2, 16, 36) and (shares >= 0).all() and (shares.sum(-1) < 1).all()


@pytest.mark.parametrize("size", [(224, 224), (160, 96), (256, 320)])
@torch.no_grad()
def test_recovering_swin_gives_back_every_map(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for settings in (SWIN_CONFIGURATIONS["stvit-r-swin-s"], SWIN_CONFIGURATIONS["stvit-r-swin-s-detection"]):
        model = STViTSwin(**settings | SMALL_SWIN | {"layers": "fgglsr"}).eval()
        maps = model.stages(torch.randn(1, 3, *size))
        assert [tuple(x.shape[2:]) for x in maps] == [(size[0] // k, size[1] // k) for k in (4, 8, 16, 32)]


@torch.no_grad()
def test_seeds_are_pooled_anew_in_every_unit() -> None:
    """Three units as one stage are three stages of one unit, one after the other."""
    settings: dict[str, Any] = {"window": 4, "per_window": 2, "seeds": "max", "reach": (5, 0, 0), "shortcut": False}
    layers, x = blocks(8, init_values=0.5), torch.randn(1, 64, WIDTH)
    whole = semantic("gglr" * 2, **settings)(layers, x, (8, 8))[0]
    one = semantic("gglr", **settings)
    torch.testing.assert_close(whole, one(layers[4:], one(layers[:4], x, (8, 8))[0], (8, 8))[0])


def test_full_blocks_of_the_released_stage_do_not_shift_and_the_others_have_no_positions() -> None:
    settings = SWIN_CONFIGURATIONS["stvit-r-swin-s"] | SMALL_SWIN | {"depths": (1, 1, 18, 1)}
    model: Any = STViTSwin(**settings)
    stage = model.backbone.layers[2].blocks
    assert [tuple(stage[k].shift_size) for k in (0, 6, 12)] == [(0, 0)] * 3
    names = {name.split(".")[0] for name, _ in stage.named_parameters() if "relative_position" in name}
    assert names == {"0", "6", "12"}
    # A LayerScale on the others alone: the card's count is without those of Swin's own blocks.
    assert {name.split(".")[0] for name, _ in stage.named_parameters() if ".ls1." in name} == {
        str(k) for k in range(18)
    } - names
    assert stage[1].ls1.gamma.tolist() == pytest.approx([1e-5] * 32)


@pytest.mark.parametrize("swin", [False, True])
def test_gradients_reach_every_weight_and_a_round_trip(swin: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pictures = torch.randn(2, 3, 48, 48)
    model: Any = tiny(layers="fggsr")
    if swin:
        model = STViTSwin(**SMALL_SWIN | {"layers": "fgglsr", "window": 3, "per_window": 2, "image": 64}).eval()
        pictures = torch.randn(2, 3, 64, 64)
    model(pictures).square().sum().backward()
    # A window of Swin's last stage is the whole map of one token here; its table of positions is not looked up.
    silent = {name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert all("relative_position" in name or "qkv" in name for name in silent), silent
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(pictures), model(pictures))


@torch.no_grad()
def test_batch_and_bfloat16() -> None:
    model, pictures = tiny(layers="fggsr"), torch.randn(3, 3, 48, 48)
    torch.testing.assert_close(model(pictures)[1], model(pictures[1:2])[0], rtol=1e-4, atol=1e-5)
    half = model.bfloat16()(pictures.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
    swin = STViTSwin(**SWIN_CONFIGURATIONS["stvit-r-swin-s-detection"] | SMALL_SWIN | {"layers": "fgglsr"}).eval()
    assert swin.bfloat16()(torch.randn(1, 3, 96, 96).bfloat16()).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "fffff"}, "layers must be"),
        ({"layers": "ffsgg"}, "layers must be"),
        ({"layers": "ggrss"}, "layers must be"),
        ({"layers": "ffgg"}, "a letter for each of the 5 blocks"),
        ({"layers": 5}, "layers must be"),
        ({"regions": 0}, "regions must be"),
        ({"seeds": "best"}, "seeds must be"),
        ({"centres": "none"}, "centres must be"),
        ({"residual": "x"}, "residual must be"),
        ({"options": {"class_token": True}}, "options cannot set class_token"),
        ({"backbone": "vit_small_patch14_reg4_dinov2", "options": {}}, "."),
    ],
)
def test_nonsense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message), torch.device("meta"):
        STViT.named("tiny", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "gg"}, "third stage"),
        ({"depths": (1, 1, 6)}, "depths and heads"),
        ({"reach": (1, 2)}, "reach must be"),
        ({"reach": (-1, 0, 0)}, "reach must be"),
        ({"border": "wrap"}, "border must be"),
        ({"mask": "all"}, "mask must be"),
        ({"stem": "mlp"}, "stem must be"),
        ({"shortcut": 1}, "shortcut must be"),
        ({"layer_scale": -1.0}, "layer_scale must be"),
        ({"drop_path": 1.0}, "drop_path must be"),
        ({"window": 0}, "window must be"),
        ({"image": 16}, "image must be"),
        ({"classes": -1}, "classes must be"),
    ],
)
def test_nonsense_is_refused_by_swin(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message), torch.device("meta"):
        STViTSwin(**SMALL_SWIN | {"layers": "fgglsr"} | settings)
    with pytest.raises(InputError, match="did you mean"):
        STViTSwin.named("stvit-swin-x")
    with pytest.raises(InputError, match="no configuration"):
        STViT.named("deit-x")
