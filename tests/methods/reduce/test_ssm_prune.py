"""ToP against transformers' Mamba and slow loops over all positions: alignment, selection, the position map, snakes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from foveate.method import InputError
from foveate.methods.reduce.ssm_prune import SCORES, PlainMixer, SsmPrune, VimMixer, snakes

SMALL: dict[str, Any] = {
    "image": 16, "patch": 4, "width": 8, "depth": 4, "states": 3, "classes": 5, "start": 1, "gap": 1, "stop": 4,
    "keep": 0.7,
}  # fmt: skip
FAMILIES = ("vim", "plain-mamba")


def small(**changes: Any) -> SsmPrune:
    torch.manual_seed(1)
    model = SsmPrune(**(SMALL | changes)).eval()
    for weight in model.parameters():
        # So that nothing is too small to be seen.
        nn.init.normal_(weight, std=0.4)
    return model


def shaken(mixer: Any) -> Any:
    torch.manual_seed(2)
    for weight in mixer.parameters():
        nn.init.normal_(weight, std=0.5)
    return mixer.eval()


def vim(length: int) -> Any:
    return shaken(VimMixer(width=6, states=3, rank=2, length=length))


def kept(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def scanned(scan: Any, u: list[Tensor | None], rates: str, shift: list[Tensor] | None = None) -> list[Tensor | None]:
    """One sequence position by position; None is a pruned one. `rates`: what happens there, "decay" or "copy"."""
    rank, states, _ = scan.split
    rate = -scan.A_log.exp()
    state, out = torch.zeros_like(rate), []
    for t, x in enumerate(u):
        if x is None:
            if rates == "decay":
                state = state * torch.exp(F.softplus(scan.dt_proj.bias)[:, None] * rate)
            out.append(None)
            continue
        said = scan.x_proj.weight @ x
        step = F.softplus(scan.dt_proj.weight @ said[:rank] + scan.dt_proj.bias)
        write, read = said[rank : rank + states], said[rank + states :]
        if shift is not None:
            write = write + shift[t]
        state = state * torch.exp(step[:, None] * rate) + (step * x)[:, None] * write
        out.append(state @ read + scan.D * x)
    return out


def looped_vim(mixer: Any, x: Tensor, places: list[int], rates: str) -> Tensor:
    """y (K, D') of tokens x (K, C) at those places of the dense sequence."""
    u, z = (x @ mixer.in_proj.weight.T).chunk(2, 1)
    total = torch.zeros_like(u)
    for backward in (0, 1):
        line: list[Tensor | None] = [None] * mixer.length
        for place, token in zip(places, u):
            line[place] = token
        if backward:
            line = line[::-1]
        weight, bias = mixer.convs[backward].weight[:, 0], mixer.convs[backward].bias
        after: list[Tensor | None] = []
        for t, token in enumerate(line):
            seen = [(j, line[t - j]) for j in range(4) if t >= j]
            mixed = bias + sum(weight[:, 3 - j] * one for j, one in seen if one is not None)
            after.append(None if token is None else F.silu(mixed))
        y = scanned(mixer.scans[backward], after, rates)
        if backward:
            y = y[::-1]
        total = total + torch.stack([one for one in y if one is not None])
    return total / 2 * F.silu(z)


@torch.no_grad()
def test_vims_mixer_is_transformers_twice() -> None:
    theirs = MambaMixer(MambaConfig(hidden_size=6, state_size=3, time_step_rank=2, conv_kernel=4, expand=2), 0).eval()
    shaken(theirs)
    mine, state = vim(7), theirs.state_dict()
    for part in ("in_proj", "out_proj"):
        getattr(mine, part).load_state_dict({"weight": state[f"{part}.weight"]})
    for way in (0, 1):
        mine.convs[way].load_state_dict({name: state[f"conv1d.{name}"] for name in ("weight", "bias")})
        mine.scans[way].load_state_dict({name: state[name] for name in mine.scans[way].state_dict()})
    x = torch.randn(2, 7, 6)
    wanted = (theirs(x) + theirs(x.flip(1)).flip(1)) / 2
    torch.testing.assert_close(mine(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rates", ["decay", "copy"])
@torch.no_grad()
def test_vims_alignment_is_the_dense_scan_without_inputs(rates: str) -> None:
    mixer, x = vim(12), torch.randn(3, 6, 6)
    # Runs of pruned tokens in the middle and at both ends.
    places = kept([0, 1, 5, 6, 10, 11], [3, 4, 5, 6, 7, 8], [2, 3, 7, 8, 9, 10])
    found, _ = mixer.inner(x, places, rates == "decay")
    for b in range(3):
        wanted = looped_vim(mixer, x[b], places[b].tolist(), rates)
        torch.testing.assert_close(found[b], wanted, rtol=1e-4, atol=1e-5)
    other = mixer.inner(x, places, rates != "decay")[0]
    assert (found - other).abs().amax((1, 2))[0] > 1e-3
    # Without gaps there is nothing to align, wherever the tokens begin.
    torch.testing.assert_close(other[1], found[1])


@pytest.mark.parametrize("rates", ["decay", "copy"])
@torch.no_grad()
def test_plain_mambas_alignment(rates: str) -> None:
    mixer = shaken(PlainMixer(width=4, states=3, rank=2, grid=(3, 4)))
    x, places = torch.randn(2, 5, 4), kept([0, 3, 4, 9, 10], [1, 2, 6, 7, 11])
    found, _ = mixer.inner(x, places, rates == "decay")
    named = {(0, 0): 0, (0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}
    for b in range(2):
        u, z = (x[b] @ mixer.in_proj.weight.T + mixer.in_proj.bias).chunk(2, 1)
        at = {divmod(place, 4): token for place, token in zip(places[b].tolist(), u)}
        mixed = {}
        for i, j in at:
            y = mixer.conv2d.bias.clone()
            for (k, m), token in at.items():
                if abs(k - i) <= 3 and abs(m - j) <= 3:
                    y += mixer.conv2d.weight[:, 0, 3 + k - i, 3 + m - j] * token
            mixed[i, j] = F.silu(y)
        rows = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 3), (1, 2), (1, 1), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]
        columns = [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1), (0, 2), (1, 2), (2, 2), (2, 3), (1, 3), (0, 3)]
        total = {place: torch.zeros(8) for place in at}
        for walk in (rows, rows[::-1], columns, columns[::-1]):
            moves = [named[i - k, j - m] for (i, j), (k, m) in zip(walk, [walk[0], *walk])]
            shift = [mixer.directions[move] for move in moves]
            for place, y in zip(walk, scanned(mixer.ssm, [mixed.get(place) for place in walk], rates, shift)):
                if place in at:
                    total[place] += y
        wanted = torch.stack([total[place] for place in at]) * F.silu(z)
        torch.testing.assert_close(found[b], wanted, rtol=1e-4, atol=1e-5)
    whole = torch.randn(1, 12, 4)
    torch.testing.assert_close(
        mixer(whole, torch.arange(12)[None], rates == "decay"), mixer(whole), rtol=1e-5, atol=1e-6
    )


@torch.no_grad()
def test_tokens_without_an_input_are_pruned_without_loss() -> None:
    mixer, places = vim(9), kept([0, 4, 5, 8], [1, 2, 6, 7])
    for conv in mixer.convs:
        # Nothing but the token itself: then a token of zeros writes nothing, and takes the step softplus(b).
        conv.weight.zero_()
        conv.weight[:, :, 3] = 1
        conv.bias.zero_()
    x = torch.zeros(2, 9, 6)
    few = torch.randn(2, 4, 6)
    x.scatter_(1, places[..., None].expand(-1, -1, 6), few)
    dense = mixer.inner(x)[0]
    wanted = torch.stack([row[index] for row, index in zip(dense, places)])
    torch.testing.assert_close(mixer.inner(few, places, True)[0], wanted, rtol=1e-5, atol=1e-6)
    # On the scan alone, copying is forgetting.
    plain = mixer.inner(few)[0]
    torch.testing.assert_close(mixer.inner(few, places, False)[0], plain)
    assert (plain - wanted).abs().max() > 1e-3


@torch.no_grad()
def test_convolutions_tell_copying_from_forgetting() -> None:
    mixer, x, places = vim(9), torch.randn(1, 4, 6), kept([0, 4, 5, 8])
    assert (mixer.inner(x, places, False)[0] - mixer.inner(x)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keeping_all_is_the_dense_model(family: str) -> None:
    pictures = torch.randn(2, 3, 16, 16)
    dense = small(family=family, stop=0)
    x = dense.embed(pictures)
    for layer in dense.layers:
        x = x + layer.mixer(layer.norm(x))
    wanted = dense.head(dense.norm_f(x)[:, 8] if family == "vim" else dense.norm_f(x).mean(1))
    for align in ("decay", "copy", "none"):
        model = small(family=family, keep=1.0, align=align)
        stages = model.stages(pictures)
        assert len(stages.positions) == 1 and stages.counts == (16 + (family == "vim"),) * 4
        torch.testing.assert_close(model(pictures), wanted)


@pytest.mark.parametrize("align", ["decay", "copy", "none"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_pruned_run_layer_by_layer(family: str, align: str) -> None:
    model, pictures = small(family=family, align=align, depth=3, start=1, gap=2), torch.randn(2, 3, 16, 16)
    stages = model.stages(pictures)
    first, second, third = model.layers
    x = model.embed(pictures)
    x = x + first.mixer(first.norm(x))
    index = stages.positions[1]
    x = torch.stack([row[some] for row, some in zip(x, index)])
    if align == "none":
        where = None if family == "vim" else torch.arange(x.shape[1]).expand(2, -1)
    else:
        where = model.places(index)
    for layer in (second, third):
        x = x + layer.mixer(layer.norm(x), where, align == "decay")
    # After the third layer tokens go again.
    assert stages.counts == (x.shape[1] + 16 - math.ceil(16 * 0.7), x.shape[1], x.shape[1])
    # The class token may have moved along the list.
    places = [[one.index(p) for p in some] for one, some in zip(index.tolist(), stages.positions[2].tolist())]
    after = torch.stack([row[some] for row, some in zip(x, places)])
    torch.testing.assert_close(stages.x, after, rtol=1e-4, atol=1e-5)


def test_how_many_stay() -> None:
    model = SsmPrune(**SMALL | {"keep": 0.8})
    counts = [197]
    for _ in range(3):
        counts.append(model.kept(counts[-1]))
    assert counts == [197, 157, 125, 101]
    plain = SsmPrune(**SMALL | {"family": "plain-mamba", "keep": 0.8})
    assert plain.kept(196) == 157 and plain.kept(5) == 4
    assert all(model.kept(n) % 2 == 1 and model.kept(n) <= n for n in range(1, 60, 2))
    assert list(SsmPrune(**SMALL | {"start": 5, "gap": 5, "stop": 20}).prunes_after) == [5, 10, 15]


@pytest.mark.parametrize("score", list(SCORES))
@torch.no_grad()
def test_choice_against_a_loop(score: str) -> None:
    model, y = small(score=score), torch.randn(3, 17, 16)
    rules = {
        "clip": lambda row: sum(max(0.0, v) for v in row),
        "l1": lambda row: sum(abs(v) for v in row),
        "l2": lambda row: sum(v * v for v in row) ** 0.5,
        "sum": lambda row: sum(row),
    }
    # A class token that would be chosen twice, or left out, if it took part.
    y[0, 8], y[1, 8] = 9, -9
    found = model.choose(y)
    for b in range(3):
        value = [rules[score](row) for row in y[b].tolist()]
        patches = sorted((i for i in range(17) if i != 8), key=lambda i: -value[i])[:12]
        wanted = sorted(patches)
        assert found[b].tolist() == [*wanted[:6], 8, *wanted[6:]]
        assert torch.equal(model.choose(y[b : b + 1])[0], found[b])
    plain = small(family="plain-mamba", score=score)
    value = [rules[score](row) for row in y[2, :16].tolist()]
    assert plain.choose(y[2:, :16])[0].tolist() == sorted(sorted(range(16), key=lambda i: -value[i])[:12])


def test_the_score_goes_with_the_token_and_is_not_negative() -> None:
    y, order = torch.randn(2, 9, 5), torch.randperm(9)
    assert torch.equal(SCORES["clip"](y[:, order]), SCORES["clip"](y)[:, order])
    assert (SCORES["clip"](y) >= 0).all() and (SCORES["clip"](-y.abs()) == 0).all()


@torch.no_grad()
def test_what_is_scored() -> None:
    mixer, x = vim(5), torch.randn(1, 5, 6)
    both, backward = mixer.inner(x)
    for conv, scan in ((mixer.convs[0], mixer.scans[0]),):
        conv.weight.zero_()
        conv.bias.zero_()
        scan.D.zero_()
    # With nothing from the forward scan the mean is half of the backward one, in natural order.
    torch.testing.assert_close(mixer.inner(x)[0], backward / 2)
    assert (both - backward / 2).abs().max() > 1e-3
    pictures = torch.randn(2, 3, 16, 16)
    model = small(scored="backward", stop=2)
    y, backward = model.layers[0].mixer.inner(model.layers[0].norm(model.embed(pictures)))
    assert torch.equal(model.stages(pictures).positions[1], model.choose(backward))
    assert torch.equal(model.set_pruning(scored="all").stages(pictures).positions[1], model.choose(y))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_position_map(family: str) -> None:
    model, pictures = small(family=family), torch.randn(3, 3, 16, 16)
    stages = model.stages(pictures)
    assert [one.shape[1] for one in stages.positions] == [17, 13, 9, 7] if family == "vim" else [16, 12, 9, 7]
    for before, after in zip(stages.positions, stages.positions[1:]):
        for old, new in zip(before.tolist(), after.tolist()):
            assert set(new) <= set(old) and len(set(new)) == len(new)
            if family == "vim":
                assert len(new) % 2 == 1 and new[len(new) // 2] == 8
                new.remove(8)
            assert new == sorted(new)
    places = model.places(stages.positions[-1])
    assert (places.diff(dim=1) > 0).all() and places.min() >= 0 and places.max() < stages.counts[0]
    alone = torch.cat([model(pictures[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(model(pictures), alone, rtol=1e-4, atol=1e-5)


def test_where_the_class_token_stands() -> None:
    model = small()
    rows = kept([2, 7, 8, 9, 16], [9, 10, 8, 12, 13], [0, 1, 8, 3, 5], [3, 7, 8, 11, 12])
    # Patches are 0-7 and, behind the class token at 8, 9-16; a patch behind it in the list that was before it moves up.
    wanted = [[2, 7, 8, 9, 16], [8, 9, 10, 12, 13], [0, 1, 3, 4, 6], [3, 7, 8, 11, 12]]
    assert model.places(rows).tolist() == wanted
    assert model.places(torch.arange(17)[None]).tolist() == [list(range(17))]
    assert model.places(kept([8])).tolist() == [[8]]
    assert model.set_pruning(align="none").places(rows) is None


def test_snakes() -> None:
    rank, came = snakes((2, 3))
    assert rank.tolist() == [[0, 1, 2, 5, 4, 3], [5, 4, 3, 0, 1, 2], [0, 3, 4, 1, 2, 5], [5, 2, 1, 4, 3, 0]]
    right, left, up, down = 1, 2, 3, 4
    assert came[0].tolist() == [0, right, right, left, left, down]
    assert came[1].tolist() == [left, left, up, 0, right, right]
    assert came[2].tolist() == [0, up, right, down, right, down]
    assert came[3].tolist() == [up, left, up, left, down, 0]


@torch.no_grad()
def test_a_released_vim_fits() -> None:
    mine, other = small(), small()
    for weight in other.parameters():
        nn.init.normal_(weight)
    theirs = {}
    for name, weight in other.state_dict().items():
        for part in ("convs", "scans"):
            for way, ending in enumerate(("", "_b")):
                name = name.replace(f"{part}.{way}.A_log", f"A{ending}_log").replace(f"{part}.{way}.D", f"D{ending}")
                for layer in ("x_proj", "dt_proj"):
                    name = name.replace(f"{part}.{way}.{layer}", f"{layer}{ending}")
                name = name.replace(f"convs.{way}", f"conv1d{ending}")
        theirs[name] = weight
    assert "layers.0.mixer.A_b_log" in theirs and "layers.3.mixer.conv1d_b.bias" in theirs
    assert "patch_embed.proj.weight" in theirs and "layers.1.mixer.dt_proj.bias" in theirs
    assert mine.load_backbone(theirs) == []
    pictures = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(mine(pictures), other(pictures))
    assert small().load_backbone({}) == list(mine.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_and_round_trip(family: str, tmp_path: Path) -> None:
    model, pictures = small(family=family), torch.randn(2, 3, 16, 16)
    model(pictures).square().sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []
    model.save_pretrained(tmp_path)
    again = SsmPrune.from_pretrained(tmp_path).eval()
    assert torch.equal(again(pictures), model(pictures)) and again.keep == 0.7
    half = model.bfloat16()(pictures.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "mamba"}, "family"),
        ({"image": 18}, "multiple of patch"),
        ({"image": 12}, "as many patches"),
        ({"family": "plain-mamba", "patch": 1}, "patch must be even"),
        ({"keep": 0.0}, "keep"),
        ({"align": "zero"}, "align"),
        ({"score": "max"}, "score"),
        ({"family": "plain-mamba", "scored": "backward"}, "scored"),
        ({"start": 0}, "start"),
        ({"gap": 0}, "gap"),
        ({"stop": -1}, "stop"),
        ({"depth": 0}, "depth"),
        ({"width": 0}, "width"),
        ({"states": 0}, "states"),
        ({"classes": -1}, "classes"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SsmPrune(**SMALL | changes)


def test_bad_names_and_pictures() -> None:
    with pytest.raises(InputError, match=r"no configuration 'vim'"):
        SsmPrune.named("vim")
    with pytest.raises(InputError, match="16 x 16"):
        small()(torch.randn(1, 3, 32, 32))
