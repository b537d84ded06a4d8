"""Strip-MLP against loops over rows, columns and channels, closed forms and counted numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from foveate.measure.claims import verify
from foveate.method import InputError
from foveate.methods.image.strip_mlp import (
    Block,
    CascadeGroupStrip,
    ChannelMix,
    GlobalResponse,
    LocalStrip,
    PositionMap,
    StripLinear,
    StripMlp,
    TokenMix,
)

SMALL: dict[str, Any] = {"image": 64, "width": 8, "depths": (1, 1, 2, 1), "groups": 2, "classes": 5}


def shaken(model: nn.Module) -> Any:
    """Weights and running statistics that are not what they are at the start."""
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    for one in model.modules():
        if isinstance(one, nn.BatchNorm2d):
            assert one.running_mean is not None and one.running_var is not None
            one.running_mean.normal_()
            one.running_var.uniform_(0.5, 2)
    return model.eval()


def ours(**changes: Any) -> StripMlp:
    return shaken(StripMlp(**(SMALL | changes)))


# ---------------------------------------------------------------------------------------------------------------------
# Strips


def by_rows(strips: StripLinear, x: Tensor, groups: int) -> Tensor:
    """The row step of x (D, H, W), place by place: W_c[out, in, delta] is read from the convolution's weight."""
    width = x.shape[2]
    each = len(x) // groups
    assert strips.bias is not None
    weight = strips.weight.view(each, width, width, 3)
    bias = strips.bias.view(each, width)
    out = torch.zeros_like(x)
    for group in range(groups):
        for c in range(each):
            for i in range(x.shape[1]):
                out[group * each + c, i] = bias[c]
                for delta in (-1, 0, 1):
                    if 0 <= i + delta < x.shape[1]:
                        out[group * each + c, i] += weight[c, :, :, delta + 1] @ x[group * each + c, i + delta]
    return out


def position(table: Tensor, side: int) -> Tensor:
    """(D, side, side), entry by entry."""
    out = torch.empty(table.shape[1], side, side)
    for i in range(side):
        for j in range(side):
            out[:, i, j] = table[max(-side, min(side, j - i)) + side]
    return out


def one_by_one(conv: nn.Conv2d, *x: Tensor) -> Tensor:
    """A 1 x 1 convolution of (C, H, W)."""
    assert conv.bias is None
    return torch.einsum("oc,chw->ohw", conv.weight[:, :, 0, 0], torch.cat(x))


def normed(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


@pytest.mark.parametrize("cascade", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_the_cascade_is_a_loop(groups: int, cascade: bool) -> None:
    side = 4
    mix: CascadeGroupStrip = shaken(CascadeGroupStrip(6, side, groups, cascade=cascade))
    x = torch.randn(2, 6, side, side)
    for one, out in zip(x, mix(x)):
        rows = by_rows(mix.rows, one + position(mix.row_position.table, side), groups)
        between: Any = mix.between
        after_rows = F.gelu(normed(between[1], one_by_one(between[0], rows, one)))
        seen = (after_rows if cascade else one) + position(mix.column_position.table, side)
        columns = by_rows(mix.columns, seen.transpose(1, 2), groups).transpose(1, 2)
        wanted = one_by_one(mix.after, one if cascade else after_rows, columns)
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strip", [3, 1])
def test_what_a_row_reads(strip: int) -> None:
    """Whole rows of its neighbourhood, of its own channel; for columns the same on the transposed map."""
    mix: CascadeGroupStrip = shaken(CascadeGroupStrip(4, 5, 2, strip))
    for axis in (2, 3):
        x = torch.randn(1, 4, 5, 5, requires_grad=True)
        if axis == 2:
            out = mix.step(mix.rows, x)[0, 1, 3, 2]
        else:
            out = mix.step(mix.columns, x.transpose(2, 3)).transpose(2, 3)[0, 1, 2, 3]
        (gradient,) = torch.autograd.grad(out, x)
        wanted = torch.zeros(4, 5, 5, dtype=torch.bool)
        wanted[1].narrow(axis - 2, 3 - strip // 2, strip).fill_(True)
        assert torch.equal(gradient[0] != 0, wanted)


def test_groups_share_their_weights() -> None:
    mix: CascadeGroupStrip = shaken(CascadeGroupStrip(6, 4, 2))
    half = torch.randn(2, 3, 4, 4)
    first, second = mix.step(mix.rows, torch.cat([half, half], 1)).chunk(2, 1)
    assert torch.equal(first, second)
    # Within a group every channel has its own.
    same = mix.step(mix.rows, half[:, :1].expand(-1, 6, -1, -1))
    assert not torch.allclose(same[:, 0], same[:, 1])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_strip_weights_do_not_depend_on_how_many_groups_share_them(groups: int) -> None:
    """3 W^2 m + m W for m channels a group."""
    mix = CascadeGroupStrip(3 * groups, 7, groups)
    assert sum(weight.numel() for weight in mix.rows.parameters()) == 3 * 49 * 3 + 3 * 7


def test_positions_are_constant_along_diagonals() -> None:
    places = PositionMap(3, 5)
    made = places()
    assert places.table.shape == (11, 3)
    torch.testing.assert_close(made, position(places.table, 5))
    for offset in range(-4, 5):
        diagonal = made.diagonal(offset, 1, 2)
        assert torch.equal(diagonal, diagonal[:, :1].expand_as(diagonal))
    assert not torch.equal(made[:, 0, 1], made[:, 1, 0])


# ---------------------------------------------------------------------------------------------------------------------
# The other parts


@torch.no_grad()
def test_local_branches() -> None:
    local: LocalStrip = shaken(LocalStrip(4))
    x = torch.randn(2, 4, 9, 8)
    wide = torch.stack(
        [F.conv2d(x[:, c : c + 1], local.wide.weight[c : c + 1], padding=(1, 3))[:, 0] for c in range(4)], 1
    )
    high = torch.stack(
        [F.conv2d(x[:, c : c + 1], local.high.weight[c : c + 1], padding=(3, 1))[:, 0] for c in range(4)], 1
    )
    assert local.wide.weight.shape[2:] == (3, 7) and local.high.weight.shape[2:] == (7, 3)
    first, _, last = local.score
    mean = (wide + high + x).mean((2, 3))
    scores = F.gelu(mean @ first.weight[:, :, 0, 0].T + first.bias) @ last.weight[:, :, 0, 0].T + last.bias
    wanted = torch.empty_like(x)
    for b in range(2):
        for c in range(4):
            # Stored channel by channel, three scores each.
            share = scores[b, 3 * c : 3 * c + 3].softmax(0)
            assert float(share.sum()) == pytest.approx(1, abs=1e-6)
            wanted[b, c] = share[0] * high[b, c] + share[1] * wide[b, c] + share[2] * x[b, c]
    torch.testing.assert_close(local(x), wanted, atol=1e-5, rtol=1e-4)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, 0.7)
    torch.testing.assert_close(local(x), (wide + high + x) / 3)


def test_global_response() -> None:
    x = torch.randn(2, 3, 4, 5)
    response = GlobalResponse(5)
    assert torch.equal(response(x), x)
    shaken(response)
    out = response(x)
    for b in range(2):
        norms = [float(x[b, :, :, c].square().sum()) ** 0.5 for c in range(5)]
        for c in range(5):
            ratio = norms[c] / (sum(norms) / 5 + 1e-6)
            wanted = response.gamma[c] * x[b, :, :, c] * ratio + response.beta[c] + x[b, :, :, c]
            torch.testing.assert_close(out[b, :, :, c], wanted)


@torch.no_grad()
def test_the_order_within_a_block() -> None:
    block: Block = shaken(Block(8, 4, 2, 3, True, 0.1))
    x = torch.randn(2, 8, 4, 4)
    mix = block.tokens
    before: Any = mix.before
    y = F.gelu(F.batch_norm(x, before[0].running_mean, before[0].running_var, before[0].weight, before[0].bias))
    y = F.conv2d(y, before[2].weight, None, padding=1, groups=8)
    y = F.conv2d(y, before[3].weight, before[3].bias)
    y = F.gelu(F.batch_norm(y, before[4].running_mean, before[4].running_var, before[4].weight, before[4].bias))
    y = torch.cat([mix.strips(y[:, :4]), mix.local(y[:, 4:])], 1)
    z = x + F.conv2d(y, mix.after.weight)
    norm, wide, _, response, narrow = block.channels.mlp
    c = F.conv2d(z, block.channels.near.weight, padding=3, groups=8).permute(0, 2, 3, 1)
    c = F.gelu(F.linear(F.layer_norm(c, (8,), norm.weight, norm.bias, 1e-6), wide.weight, wide.bias))
    assert c.shape[-1] == 24
    wanted = z + F.linear(response(c), narrow.weight, narrow.bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_without_token_weights_only_channels_mix() -> None:
    block: Block = shaken(Block(8, 4, 2, 3, True, 0.0))
    for one in block.tokens.modules():
        if isinstance(one, StripLinear) or (isinstance(one, nn.Conv2d) and one.kernel_size == (1, 1)):
            nn.init.zeros_(one.weight)
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(block(x), x + block.channels(x))


# ---------------------------------------------------------------------------------------------------------------------
# The whole


@torch.no_grad()
def test_skips() -> None:
    model, pixels = ours(), torch.randn(2, 3, 64, 64)

    def stage(number: int, x: Tensor) -> Tensor:
        for block in model.stages[number]:
            x = block(x)
        return x

    def merged(number: int, x: Tensor) -> Tensor:
        return F.conv2d(x, model.merges[number].weight, stride=2)

    def skipped(number: int, x: Tensor) -> Tensor:
        """Two outputs of every channel, from its own 2 x 2 places."""
        weight = model.skips[number].weight
        assert weight.shape == (2 * x.shape[1], 1, 2, 2)
        return torch.cat([F.conv2d(x[:, c : c + 1], weight[2 * c : 2 * c + 2], stride=2) for c in range(x.shape[1])], 1)

    stem = F.conv2d(pixels, model.stem.weight, stride=4)
    for used in (1, 0):
        x1 = stage(0, stem)
        m1 = merged(0, x1)
        x2 = stage(1, m1)
        a, m2 = skipped(0, m1), merged(1, x2)
        x3 = stage(2, m2 + used * a)
        x4 = stage(3, merged(2, x3) + used * (skipped(1, a) + skipped(2, m2)))
        for one, wanted in zip(model.maps(pixels), (x1, x2, x3, x4), strict=True):
            torch.testing.assert_close(one, wanted, atol=1e-4, rtol=1e-4)
        norm = model.norm
        logits = model.head(F.batch_norm(x4, norm.running_mean, norm.running_var, norm.weight, norm.bias).mean((2, 3)))
        torch.testing.assert_close(model(pixels), logits, atol=1e-4, rtol=1e-4)
        for skip in model.skips:
            nn.init.zeros_(skip.weight)


def test_claims_hold() -> None:
    for checked in verify("strip-mlp"):
        assert checked.holds, f"{checked.claim.what}: {checked.ours}"


@pytest.mark.parametrize(("name", "figure"), [("t-star", 2.531), ("t", 3.665), ("s", 6.828), ("b", 9.214)])
def test_costs_to_the_last_digit(name: str, figure: float) -> None:
    """The counted GMACs of the card have what norms and pooling cost in them: 5 operations an element of a layer norm,
    2 of a batch norm, 1 of a mean over the map."""
    extra = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
        nonlocal extra
        for kind, operations in ((nn.LayerNorm, 5), (nn.BatchNorm2d, 2), (LocalStrip, 1)):
            if isinstance(module, kind):
                extra += operations * inputs[0].numel()

    with torch.device("meta"):
        model = StripMlp.named(name).eval()
        for one in model.modules():
            one.register_forward_hook(count)
        with FlopCounterMode(display=False) as counter:
            shapes = [tuple(one.shape) for one in model.maps(torch.empty(1, 3, 224, 224))]
            model.forward_head(torch.empty(shapes[-1]))
    assert shapes == [(1, model.stem.out_channels * 2**k, 56 // 2**k, 56 // 2**k) for k in range(4)]
    assert round((counter.get_total_flops() / 2 + extra) / 1e9, 3) == pytest.approx(figure, abs=1e-9)


def test_sizes_and_numbers_that_do_not_go_together() -> None:
    with pytest.raises(InputError, match="pictures of 64 x 64 px, not 64 x 96"):
        ours()(torch.randn(1, 3, 64, 96))
    for changes, named in (
        ({"image": 100}, "image"), ({"width": 9}, "width"), ({"width": 12, "groups": 4}, "groups"),
        ({"depths": (1, 1, 1)}, "depths"), ({"depths": (1, 0, 1, 1)}, "depths"), ({"strip": 2}, "strip"),
        ({"cascade": 1}, "cascade"), ({"drop_path": 1.0}, "drop_path"), ({"classes": -1}, "classes"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=named):
            StripMlp(**(SMALL | changes))
    with pytest.raises(InputError, match="did you mean t-star"):
        StripMlp.named("t-stra")


def test_evaluation_knows_no_other_pictures_and_no_chance() -> None:
    model, pixels = ours(), torch.randn(3, 3, 64, 64)
    assert [one.drop_path.p for one in model.modules() if isinstance(one, Block)] == [0.1] * 5
    assert torch.equal(model(pixels), model(pixels))
    torch.testing.assert_close(model(pixels)[1:2], model(pixels[1:2]), atol=1e-5, rtol=1e-4)


def test_gradients_and_a_round_trip(tmp_path: Path) -> None:
    model = ours()
    pixels = torch.randn(2, 3, 64, 64)
    model(pixels).square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and bool((weight.grad != 0).any()), name
    model.save_pretrained(tmp_path)
    back = StripMlp.from_pretrained(tmp_path).eval()
    assert torch.equal(back(pixels), model(pixels))
    scale = float(model(pixels).detach().abs().max())
    half = back.to(torch.bfloat16)(pixels.bfloat16()).detach().float()
    assert float((half - model(pixels).detach()).abs().max()) < 0.1 * scale


def test_parts_keep_their_shape() -> None:
    x = torch.randn(2, 8, 4, 4)
    assert TokenMix(8, 4, 2)(x).shape == x.shape and ChannelMix(8)(x).shape == x.shape
