"""DaViT against timm's with the same random weights, loops over windows and channels, and closed forms."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("timm")

import timm

from foveate.measure.claims import verify
from foveate.method import InputError
from foveate.methods.image import davit as module
from foveate.methods.image.davit import Block, ChannelAttention, Davit, WindowAttention

SMALL: dict[str, Any] = {"widths": (8, 16, 32), "heads": (2, 4, 4), "depths": (1, 2, 1), "window": 3, "classes": 5}


def shaken(model: nn.Module) -> Any:
    """Norms, biases and attention that are not what they are at the start."""
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    return model.eval()


def theirs(**changes: Any) -> Any:
    settings = {
        "embed_dims": SMALL["widths"], "num_heads": SMALL["heads"], "depths": SMALL["depths"], "window_size": 3,
        "num_classes": 5,
    }  # fmt: skip
    return shaken(timm.create_model(changes.pop("name", "davit_tiny"), **(settings | changes)))


def ours(**changes: Any) -> Davit:
    return shaken(Davit(**(SMALL | changes)))


# ---------------------------------------------------------------------------------------------------------------------
# timm


@pytest.mark.parametrize(
    ("changes", "their_changes"),
    [
        ({}, {}),
        ({"attention": ("channel", "spatial")}, {"attn_types": ("channel", "spatial")}),
        ({"attention": ("spatial",)}, {"attn_types": ("spatial",)}),
        ({"attention": ("channel",), "ffn": False}, {"attn_types": ("channel",), "ffn": False}),
        ({"mlp_ratio": 2.0, "window": 5}, {"mlp_ratio": 2.0, "window_size": 5}),
        (
            {"channel_attention": "florence", "merge_kernel": 3, "classes": 0},
            {"name": "davit_base_fl", "num_classes": 0},
        ),
    ],
)
@pytest.mark.parametrize("size", [(48, 48), (61, 94)])
def test_equals_timms(changes: dict[str, Any], their_changes: dict[str, Any], size: tuple[int, int]) -> None:
    """Also at sizes that neither the strides nor the windows divide."""
    reference, model = theirs(**their_changes), Davit(**(SMALL | changes)).eval()
    model.load_backbone(reference)
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        wanted, features = reference(pixels), reference.forward_intermediates(pixels, intermediates_only=True)
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(model(pixels), wanted, atol=1e-5, rtol=1e-5)
        for one, other in zip(model.maps(pixels), features, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(model.forward_features(pixels), features[-1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "giant", "base-fl"])
def test_state_dicts_are_timms(name: str) -> None:
    with torch.device("meta"):
        reference = timm.create_model(f"davit_{name}".replace("-", "_"), **({"num_classes": 0} if "fl" in name else {}))
        model = Davit.named(name)
    key = {"spatial_block": "0", "channel_block": "1"}
    shapes = {
        re.sub("spatial_block|channel_block", lambda found: key[found[0]], name): weight.shape
        for name, weight in reference.state_dict().items()
    }
    assert {name: weight.shape for name, weight in model.state_dict().items()} == shapes


def test_loads_the_names_of_the_authors_and_of_florence(tmp_path: Path) -> None:
    reference = theirs()
    state = {}
    for key, weight in reference.state_dict().items():
        key = key.replace("stem.conv", "patch_embeds.0.proj").replace("stem.norm", "patch_embeds.0.norm")
        key = re.sub(r"stages\.(\d)\.downsample\.conv", r"patch_embeds.\1.proj", key)
        key = re.sub(r"stages\.(\d)\.downsample", r"patch_embeds.\1", key)
        key = re.sub(r"stages\.(\d)\.blocks", r"main_blocks.\1", key)
        key = key.replace("cpe1", "cpe.0").replace("cpe2", "cpe.1")
        state[key.replace("head.norm", "norms").replace("head.fc", "head")] = weight
    save_file(state, tmp_path / "model.safetensors")
    pixels = torch.randn(1, 3, 40, 40)
    for source in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        torch.testing.assert_close(Davit(**SMALL).load_backbone(source).eval()(pixels), reference(pixels))

    florence = theirs(name="davit_base_fl", num_classes=0)
    state = {"language_model.weight": torch.zeros(1)}
    for key, weight in florence.state_dict().items():
        if key.startswith("head."):
            continue
        key = key.replace("stem.", "convs.0.")
        key = re.sub(r"stages\.(\d)\.downsample", r"convs.\1", key).replace(".conv.", ".proj.")
        key = re.sub(r"stages\.(\d)\.blocks", r"blocks.\1", key)
        kind = "window_attn" if "spatial_block" in key else "channel_attn"
        key = key.replace("norm1", f"{kind}.norm").replace(".attn.", f".{kind}.fn.")
        key = key.replace("norm2", "ffn.norm").replace("mlp", "ffn.fn.net")
        state["vision_tower." + re.sub(r"cpe(\d)\.proj", r"conv\1.fn.dw", key)] = weight
    save_file(state, tmp_path / "florence.safetensors")
    model = Davit(**(SMALL | {"channel_attention": "florence", "merge_kernel": 3, "classes": 0}))
    model.load_backbone(tmp_path / "florence.safetensors").eval()
    torch.testing.assert_close(model.forward_features(pixels), florence.forward_features(pixels))


def test_timm_checkpoints_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []
    tiny, florence = theirs(window_size=7), theirs(name="davit_base_fl", num_classes=0)

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        path = tmp_path / repository.replace("/", "_")
        save_file((florence if "lorence" in repository else tiny).state_dict(), path)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    small = {name: SMALL[name] for name in ("widths", "heads", "depths")}
    pixels = torch.randn(1, 3, 56, 56)
    model = Davit.from_timm("davit_tiny.msft_in1k", **small, classes=5)
    assert not model.training
    torch.testing.assert_close(model(pixels), tiny(pixels))
    renamed = Davit.from_timm("davit_tiny.msft_in1k", **small, classes=7)
    assert renamed(pixels).shape == (1, 7)
    torch.testing.assert_close(renamed.forward_features(pixels), tiny.forward_features(pixels))
    tower = Davit.from_timm("davit_base_fl.msft_florence2", **small, window=3)
    torch.testing.assert_close(tower(pixels), florence(pixels))
    assert asked == [
        ("timm/davit_tiny.msft_in1k", "model.safetensors"),
        ("timm/davit_tiny.msft_in1k", "model.safetensors"),
        ("microsoft/Florence-2-base", "model.safetensors"),
    ]


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean tiny"):
        Davit.from_timm("davit_tinny.msft_in1k")
    with pytest.raises(InputError, match="lacks stages"):
        Davit(**(SMALL | {"depths": (1, 3, 1)})).load_backbone(theirs())
    with pytest.raises(InputError, match="an unexpected stages"):
        Davit(**(SMALL | {"depths": (1, 1, 1)})).load_backbone(theirs())
    with pytest.raises(InputError, match="another shape of stages"):
        Davit(**(SMALL | {"mlp_ratio": 2.0})).load_backbone(theirs())
    with pytest.raises(InputError, match="there is no file"):
        Davit(**SMALL).load_backbone(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is no safetensors file"):
        Davit(**SMALL).load_backbone(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The two attentions


def test_window_attention_is_a_loop_over_windows() -> None:
    attention: WindowAttention = shaken(WindowAttention(8, 2, 3))
    x = torch.randn(1, 4, 7, 8)
    padded = torch.zeros(6, 9, 8)
    padded[:4, :7] = x[0]
    wanted = torch.zeros(6, 9, 8)
    for top in (0, 3):
        for left in (0, 3, 6):
            query, key, value = attention.qkv(padded[top : top + 3, left : left + 3].reshape(9, 8)).chunk(3, -1)
            heads = []
            for part in (slice(0, 4), slice(4, 8)):
                weights = (query[:, part] @ key[:, part].T / 2).softmax(-1)
                heads.append(weights @ value[:, part])
            wanted[top : top + 3, left : left + 3] = attention.proj(torch.cat(heads, -1)).view(3, 3, 8)
    torch.testing.assert_close(attention(x)[0], wanted[:4, :7], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", ["davit", "florence"])
@pytest.mark.parametrize("groups", [1, 2])
def test_channel_attention_is_a_loop_over_channels(form: str, groups: int) -> None:
    attention: ChannelAttention = shaken(ChannelAttention(6, groups, form))
    x = torch.randn(2, 2, 5, 6)
    width, scale = 6 // groups, (6 // groups if form == "davit" else 10) ** -0.5
    for b in range(2):
        first, second, third = attention.qkv(x[b].view(10, 6)).chunk(3, -1)
        value, query, key = (first, second, third) if form == "davit" else (third, first, second)
        out = torch.zeros(10, 6)
        for channel in range(6):
            group = range(channel // width * width, (channel // width + 1) * width)
            scores = torch.stack([scale * sum(query[n, channel] * key[n, other] for n in range(10)) for other in group])
            for weight, other in zip(scores.softmax(0), group):
                out[:, channel] += weight * value[:, other]
        torch.testing.assert_close(attention(x)[b], attention.proj(out).view(2, 5, 6), atol=1e-6, rtol=1e-5)


def test_channel_attention_does_not_know_where_patches_are() -> None:
    order = torch.randperm(36)
    x = torch.randn(2, 6, 6, 8)
    mixed = x.flatten(1, 2)[:, order].view(x.shape)

    def moved(attention: nn.Module) -> bool:
        wanted = attention(x).flatten(1, 2)[:, order]
        return torch.allclose(attention(mixed).flatten(1, 2), wanted, atol=1e-5)

    assert moved(shaken(ChannelAttention(8, 2)))
    assert not moved(shaken(WindowAttention(8, 2, 3)))


def test_channel_weights() -> None:
    x = torch.randn(2, 3, 4, 8)
    weights, _ = shaken(ChannelAttention(8, 2)).weights_and_value(x)
    assert weights.shape == (2, 2, 4, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 4))
    # A channel by itself attends to itself alone.
    alone: ChannelAttention = shaken(ChannelAttention(8, 8))
    torch.testing.assert_close(alone(x), alone.proj(alone.qkv(x)[..., :8]))


def still(block: Block) -> Block:
    """Without the position encodings."""
    for encoding in (block.cpe1, block.cpe2):
        nn.init.zeros_(encoding.proj.weight)
        assert encoding.proj.bias is not None
        nn.init.zeros_(encoding.proj.bias)
    return block


def test_windows_do_not_see_each_other() -> None:
    block = still(shaken(Block(8, WindowAttention(8, 2, 3), 16, 0.0)))
    x = torch.randn(1, 6, 9, 8)
    changed = x.clone()
    changed[0, 4, 4, 0] += 1
    difference = (block(changed) - block(x)).abs().amax(-1)[0]
    window = torch.zeros(6, 9, dtype=torch.bool)
    window[3:6, 3:6] = True
    assert (difference[window] > 0).all() and (difference[~window] == 0).all()


def test_reach_of_one_block() -> None:
    """A channel block sees the whole picture; a spatial one its window, widened by the two convolutions."""

    def reach(attention: nn.Module) -> Tensor:
        x = torch.randn(1, 12, 12, 8, requires_grad=True)
        shaken(Block(8, attention, 16, 0.0))(x)[0, 4, 4].sum().backward()
        assert x.grad is not None
        return x.grad[0].abs().amax(-1) > 0

    assert reach(ChannelAttention(8, 2)).all()
    seen = reach(WindowAttention(8, 2, 3))
    # Patch (4, 4) is in the middle of its window (3..5, 3..5), so that the second convolution stays within it.
    wanted = torch.zeros(12, 12, dtype=torch.bool)
    wanted[2:7, 2:7] = True
    assert torch.equal(seen, wanted)


def test_without_mlp() -> None:
    """Blocks without an MLP are those whose MLP says nothing."""
    model = ours(attention=("spatial",))
    for stage in model.stages:
        for pair in stage.blocks:
            for one in pair:
                nn.init.zeros_(one.mlp.fc2.weight)
                nn.init.zeros_(one.mlp.fc2.bias)
    bare = Davit(**(SMALL | {"attention": ("spatial",), "ffn": False})).eval()
    assert not any("mlp" in name or "norm2" in name for name in bare.state_dict())
    bare.load_state_dict({name: w for name, w in model.state_dict().items() if name in bare.state_dict()})
    pixels = torch.randn(1, 3, 40, 52)
    torch.testing.assert_close(bare(pixels), model(pixels))


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def test_claims_hold() -> None:
    for checked in verify("davit"):
        assert checked.holds, f"{checked.claim.what}: {checked.ours}"


@pytest.mark.parametrize(
    ("name", "figure"), [("tiny", 4_540_244_736), ("small", 8_800_488_192), ("base", 15_510_430_720)]
)
def test_costs_to_the_unit(name: str, figure: int) -> None:
    """The released figures: multiply-adds, and 5 operations for each element that a norm reads. No window of a picture
    of 224 px is filled up: padding would cost more."""
    norms = []
    with torch.device("meta"):
        model = Davit.named(name).eval()
        for one in model.modules():
            if isinstance(one, nn.LayerNorm):
                one.register_forward_hook(lambda _, inputs, __: norms.append(inputs[0].numel()))
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() // 2 + 5 * sum(norms) == figure


def test_cost_of_each_kind_of_operation() -> None:
    """The closed forms of the card, 4 N C^2 + 2 N 49 C and 4 N C^2 + 2 N C d and 8 N C^2 for each pair of blocks."""
    with torch.device("meta"):
        model = Davit.named("tiny").eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    counts = {str(op): count // 2 for op, count in counter.get_flop_counts()["Global"].items()}
    linear = attention = 0
    for width, side, depth in ((96, 56, 1), (192, 28, 1), (384, 14, 3), (768, 7, 1)):
        places = side**2
        linear += depth * (2 * 4 + 2 * 8) * places * width**2
        attention += depth * (2 * places * 49 * width + 2 * places * width * 32)
    assert counts["aten.convolution"] == 243_403_776
    assert counts["aten.bmm"] == attention == 115_831_296
    assert counts["aten.addmm"] + counts.get("aten.mm", 0) == linear + 768 * 1000 == 4_162_566_144


@pytest.mark.parametrize("size", [(32, 32), (50, 75), (224, 224), (31, 129)])
def test_sizes(size: tuple[int, int]) -> None:
    with torch.device("meta"):
        shapes = [one.shape[1:] for one in Davit.named("tiny").maps(torch.empty(1, 3, *size))]
    for stage, (channels, height, width) in enumerate(shapes):
        stride = 4 * 2**stage
        assert (channels, height, width) == (96 * 2**stage, -(-size[0] // stride), -(-size[1] // stride))


def test_maps_with_a_norm() -> None:
    model = Davit(**(SMALL | {"map_norms": True})).eval()
    for one in model.maps(torch.randn(2, 3, 40, 40)):
        torch.testing.assert_close(one.mean(1), torch.zeros_like(one[:, 0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(one.var(1, correction=0), torch.ones_like(one[:, 0]), atol=1e-2, rtol=0)
    bare = Davit(**SMALL).eval()
    model.load_backbone(bare)
    pixels = torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(model(pixels), bare(pixels))


def test_stochastic_depth_rises_over_all_blocks() -> None:
    model = Davit(**(SMALL | {"drop_path": 0.35}))
    rates = [one.drop_path.p for one in model.modules() if isinstance(one, Block)]
    assert rates == pytest.approx([0.05 * k for k in range(8)])
    pixels = torch.randn(4, 3, 40, 40)
    model.eval()
    assert torch.equal(model(pixels), model(pixels))
    model.train()
    assert not torch.equal(model(pixels), model(pixels))


def test_pictures_do_not_see_each_other() -> None:
    model, pixels = ours(), torch.randn(3, 3, 44, 44)
    torch.testing.assert_close(model(pixels)[1:2], model(pixels[1:2]))


def test_gradients_and_a_round_trip(tmp_path: Path) -> None:
    model = ours()
    pixels = torch.randn(2, 3, 40, 40)
    model(pixels).square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and bool((weight.grad != 0).any()), name
    model.save_pretrained(tmp_path)
    back = Davit.from_pretrained(tmp_path).eval()
    assert torch.equal(back(pixels), model(pixels)) and back.attention == ("spatial", "channel")
    half = back.to(torch.bfloat16)(pixels.bfloat16()).float()
    torch.testing.assert_close(half, model(pixels), atol=0.25, rtol=0.1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"widths": (8, 16)}, "widths"), ({"heads": (3, 4, 4)}, "heads"), ({"depths": (1, 0, 1)}, "depths"),
        ({"window": 0}, "window"), ({"mlp_ratio": 0.0}, "mlp_ratio"), ({"attention": ("global",)}, "attention"),
        ({"attention": ()}, "attention"), ({"attention": ("spatial", "spatial")}, "attention"),
        ({"channel_attention": "v2"}, "channel_attention"), ({"merge_kernel": 5}, "merge_kernel"),
        ({"drop_path": 1.0}, "drop_path"), ({"classes": -1}, "classes"),
    ],
)  # fmt: skip
def test_nonsense_is_rejected(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Davit(**(SMALL | changes))


def test_configurations_are_the_cards() -> None:
    assert list(module.CONFIGURATIONS)[:6] == ["tiny", "small", "base", "large", "huge", "giant"]
    for name, settings in module.CONFIGURATIONS.items():
        model_widths, heads = settings.get("widths", (96, 192, 384, 768)), settings.get("heads", (3, 6, 12, 24))
        if name != "scenes":
            assert all(width == 32 * count for width, count in zip(model_widths, heads)), name
    with pytest.raises(InputError, match="no configuration 'mega'"):
        Davit.named("mega")
