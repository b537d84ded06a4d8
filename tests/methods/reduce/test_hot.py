"""HoT against loops over frames, closed forms and the hosts run by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")

from foveate.method import InputError
from foveate.methods.reduce.hot import (
    CONFIGURATIONS,
    JOINT_WEIGHTS,
    AsPrinted,
    Hot,
    TokenRecovery,
    between,
    density_peaks,
    mirror,
    motion,
)
from foveate.nn.pose_lifting import LIFTERS
from tiny import shake

FRAMES, KEEP = 9, 4


def model(**changes: Any) -> Hot:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "frames": FRAMES, "keep": KEEP, "prune_layer": 1, "width": 16, "depth": 3, "heads": 2, "recovery_heads": 4,
        "representation": 8, "tie_noise": 0.0,
    } | changes  # fmt: skip
    made = Hot(**settings)
    shake(made)
    if made.recover is not None:
        nn.init.normal_(made.recover.queries)
    if made.position is not None:
        nn.init.normal_(made.position)
    return made.eval()


def clips(count: int = 2, frames: int = FRAMES, seed: int = 5) -> Tensor:
    return torch.randn(count, frames, 17, 2, generator=torch.Generator().manual_seed(seed))


def peaks(z: Tensor, neighbours: int) -> tuple[list[float], list[float]]:
    """Density and distance to the nearest denser frame of z (F, C), frame by frame."""
    count, width = z.shape
    far = [[float((z[i] - z[j]).pow(2).sum().sqrt()) / math.sqrt(width) for j in range(count)] for i in range(count)]
    rho = [math.exp(-sum(d * d for d in sorted(row)[:neighbours]) / neighbours) for row in far]
    delta = []
    for i in range(count):
        # To the last digits mutual nearest neighbours are equally dense: the earlier counts as denser.
        above = [
            far[i][j]
            for j in range(count)
            if j != i and (rho[j] > rho[i] + 1e-9 or (abs(rho[j] - rho[i]) <= 1e-9 and j < i))
        ]
        delta.append(min(above, default=max(max(row) for row in far)))
    return rho, delta


@pytest.mark.parametrize("neighbours", [1, 2, 3])
def test_density_peaks_against_a_loop(neighbours: int) -> None:
    z = torch.randn(3, 12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).float() * 0.5
    density, distance = density_peaks(z, neighbours)
    for b in range(3):
        rho, delta = peaks(z[b].double(), neighbours)
        torch.testing.assert_close(density[b], torch.tensor(rho))
        torch.testing.assert_close(distance[b], torch.tensor(delta))
        far = torch.cdist(z[b], z[b]).max() / math.sqrt(5)
        torch.testing.assert_close(distance[b, density[b].argmax()], far)


def test_the_greatest_distance_is_the_clips_own() -> None:
    z = torch.randn(1, 6, 4)
    both = torch.cat([z, 100 * z])
    for b, (density, distance) in enumerate(zip(*density_peaks(both))):
        far = torch.cdist(both[b], both[b]).max() / 2
        torch.testing.assert_close(distance[density.argmax()], far)
    for together, alone in zip(density_peaks(both), density_peaks(z)):
        assert torch.equal(together[:1], alone)


@pytest.mark.parametrize("host", LIFTERS)
@pytest.mark.parametrize("recovery", ["attention", "none"])
@torch.no_grad()
def test_forward_by_hand(host: str, recovery: str) -> None:
    made, keypoints = model(host=host, recovery=recovery), clips()
    lifted = made.lift(keypoints)
    for b in range(2):
        x = made.lifter.layer(0, made.lifter.embed(keypoints[b : b + 1]))
        assert torch.allclose(x, made.forward_features(keypoints[b : b + 1]))
        z = x[0].flatten(1) if host == "mhformer" else x[0].mean(1)
        score = [rho * delta for rho, delta in zip(*peaks(z.double(), 2))]
        if recovery == "none":
            score[4] = math.inf
        kept = sorted(sorted(range(FRAMES), key=lambda i: -score[i])[:KEEP])
        assert lifted.kept[b].tolist() == kept
        x = x[:, kept]
        if recovery == "attention":
            assert made.position is not None
            x = x + made.position
        for index in (1, 2):
            x = made.lifter.layer(index, x)
        if recovery == "attention":
            recover: Any = made.recover
            q, a = recover.queries, recover.attention
            rows = []
            for s in range(x.shape[2]):
                track, heads = x[0, :, s], []
                for h in range(4):
                    part = slice(4 * h, 4 * h + 4)
                    query, key, value = (
                        layer(one)[:, part] for layer, one in ((a.query, q[0]), (a.key, track), (a.value, track))
                    )
                    heads.append((query @ key.T / 2).softmax(-1) @ value)
                rows.append(q[0] + a.out(torch.cat(heads, 1)))
            x = torch.stack(rows, 1)[None]
        torch.testing.assert_close(lifted.poses[b], made.lifter.head(x)[0], rtol=1e-3, atol=1e-3)
        frames = list(range(FRAMES)) if recovery == "attention" else kept
        assert lifted.frames[b].tolist() == frames and lifted.poses.shape == (2, len(frames), 17, 3)


@pytest.mark.parametrize("select", ["density", "attention", "motion", "uniform", "random"])
@pytest.mark.parametrize("recovery", ["attention", "linear", "nearest", "none"])
@pytest.mark.parametrize("keep", [1, 4, 5, 8])
@torch.no_grad()
def test_frames_kept_ascend_and_tpc_has_the_centre(select: str, recovery: str, keep: int) -> None:
    made = model(select=select, recovery=recovery, keep=keep, tie_noise=1e-6)
    lifted = made.lift(clips(4))
    assert lifted.kept.shape == (4, keep) and (lifted.kept.diff(dim=1) > 0).all()
    assert int(lifted.kept.min()) >= 0 and int(lifted.kept.max()) < FRAMES
    assert lifted.poses.shape == (4, keep if recovery == "none" else FRAMES, 17, 3)
    if recovery == "none":
        assert (lifted.kept == 4).any(1).all() and torch.equal(lifted.kept, lifted.frames)
        assert lifted.at(4).shape == (4, 17, 3)


@torch.no_grad()
def test_the_centre_may_go_under_hot() -> None:
    keypoints = clips()
    # A frame like the one before it goes first.
    keypoints[:, 4] = keypoints[:, 3]
    for recovery, there in (("attention", False), ("none", True)):
        kept = model(recovery=recovery, keep=8).choose(*features(keypoints))
        assert bool((kept == 4).any()) == there


def features(keypoints: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that are keypoints, repeated to 16 channels."""
    return keypoints.repeat(1, 1, 1, 8), keypoints


@pytest.mark.parametrize("host", LIFTERS)
@torch.no_grad()
def test_all_frames_kept_is_the_host(host: str) -> None:
    made = model(host=host, recovery="none", keep=FRAMES)
    x = made.lifter.embed(clips())
    for index in range(3):
        x = made.lifter.layer(index, x)
    lifted = made.lift(clips())
    assert torch.equal(lifted.poses, made.lifter.head(x))
    assert lifted.kept.tolist() == [list(range(FRAMES))] * 2
    hot = model(host=host, keep=FRAMES)
    seen: list[int] = []
    layer = hot.lifter.layer
    hot.lifter.layer = lambda index, x: seen.append(x.shape[1]) or layer(index, x)  # type: ignore
    assert hot.lift(clips()).kept.tolist() == [list(range(FRAMES))] * 2 and seen == [FRAMES] * 3


@torch.no_grad()
def test_every_distinct_pose_of_a_clip_that_repeats_them_stays() -> None:
    poses = torch.randn(3, KEEP, 17, 2, generator=torch.Generator().manual_seed(2))
    order = torch.tensor([2, 0, 0, 3, 1, 2, 2, 1, 0])
    kept = model().choose(*features(poses[:, order]))
    for row in kept:
        assert sorted(order[row].tolist()) == [0, 1, 2, 3]


@torch.no_grad()
def test_selection_is_each_clips_own_deterministic_and_blind_to_the_order_of_joints() -> None:
    made, (x, keypoints) = model(), features(clips(5))
    kept = made.choose(x, keypoints)
    assert torch.equal(kept, made.choose(x, keypoints)) and len(kept.unique(dim=0)) > 1
    for b in range(5):
        assert torch.equal(made.choose(x[b : b + 1], keypoints[b : b + 1])[0], kept[b])
    shuffled = x[:, :, torch.randperm(17, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(made.choose(shuffled, keypoints), kept)


@torch.no_grad()
def test_noise_decides_between_equal_frames_and_nothing_else() -> None:
    frames = torch.zeros(1, 6, 17, 16)
    for t, value in enumerate((0.0, 0.0, 5.0, 5.0, 11.0, 11.0)):
        frames[:, t] = value
    noisy = model(frames=6, keep=3, tie_noise=1e-6)
    torch.manual_seed(0)
    sets = {tuple(noisy.choose(frames, frames)[0].tolist()) for _ in range(40)}
    assert len(sets) > 1 and all([k // 2 for k in one] == [0, 1, 2] for one in sets)
    assert {tuple(model(frames=6, keep=3).choose(frames, frames)[0].tolist()) for _ in range(3)} == {(0, 2, 4)}


@torch.no_grad()
def test_other_selections() -> None:
    keypoints = torch.zeros(1, FRAMES, 17, 2)
    keypoints[:, 3:5, 8, 0] = 2.0
    keypoints[:, 6:, 8, 1] = 1.0
    step = torch.tensor([0, 0, 2, 0, 2, 1, 0, 0]) / 17
    wanted = torch.tensor([[step[0], *((step[:-1] + step[1:]) / 2), step[-1]]])
    torch.testing.assert_close(motion(keypoints), wanted)
    x = keypoints.repeat(1, 1, 1, 8)
    assert model(select="motion").choose(x, keypoints).tolist() == [[2, 3, 4, 5]]
    assert model(select="uniform", keep=3).choose(x, keypoints).tolist() == [[1, 4, 7]]
    assert model(select="uniform", keep=2).choose(x, keypoints).tolist() == [[2, 6]]
    assert model(select="uniform", keep=2, recovery="none").choose(x, keypoints).tolist() == [[4, 6]]
    watching = model(select="attention")
    tokens = watching.forward_features(clips())
    received = watching.lifter.frame_attention(1, tokens)
    assert torch.equal(watching.choose(tokens, clips()), received.topk(KEEP).indices.sort(1).values)


def test_all_frames_are_the_same_before_training_changes_the_queries() -> None:
    torch.manual_seed(0)
    recover = TokenRecovery(16, FRAMES, 4)
    assert not recover.queries.any()
    out = recover(torch.randn(2, KEEP, 17, 16))
    assert out.shape == (2, FRAMES, 17, 16)
    torch.testing.assert_close(out, out[:, :1].expand_as(out))
    nn.init.normal_(recover.queries)
    assert recover(torch.randn(2, KEEP, 17, 16)).std(dim=1).min() > 1e-3
    assert model(host="motionagformer").recover.attention.key.bias is None  # type: ignore[union-attr]


def test_gradients_reach_the_frames_kept_and_no_others() -> None:
    made = model()
    seen: list[Tensor] = []
    layer = made.lifter.layer

    def watch(index: int, x: Tensor) -> Tensor:
        x = layer(index, x)
        if index == 0:
            x.retain_grad()
            seen.append(x)
        return x

    made.lifter.layer = watch  # type: ignore[method-assign]
    lifted = made.lift(clips())
    lifted.poses.square().sum().backward()
    reached = seen[0].grad.flatten(2).norm(dim=-1) > 0  # type: ignore[union-attr]
    for row, kept in zip(reached, lifted.kept):
        assert row.nonzero().flatten().tolist() == kept.tolist()
    assert not density_peaks(clips().flatten(2).requires_grad_())[0].requires_grad
    assert not made.choose(seen[0], clips()).requires_grad


@torch.no_grad()
def test_recovery_in_time_is_interpolation() -> None:
    kept = torch.tensor([[1, 2, 6], [0, 4, 8]])
    x = torch.randn(2, 3, 2, 4)
    linear, nearest = (between(x, kept, FRAMES, how) for how in ("linear", "nearest"))
    for b in range(2):
        times = kept[b].tolist()
        for t in range(FRAMES):
            close = min(range(3), key=lambda k: (abs(times[k] - t), k))
            assert torch.equal(nearest[b, t], x[b, close])
            before = [k for k in range(3) if times[k] <= t]
            after = [k for k in range(3) if times[k] >= t]
            if not before or not after:
                wanted = x[b, (before or after)[-1 if before else 0]]
            elif before[-1] == after[0]:
                wanted = x[b, after[0]]
            else:
                share = (t - times[before[-1]]) / (times[after[0]] - times[before[-1]])
                wanted = (1 - share) * x[b, before[-1]] + share * x[b, after[0]]
            torch.testing.assert_close(linear[b, t], wanted)


@pytest.mark.parametrize("recovery", ["attention", "none"])
def test_loss_against_a_loop(recovery: str) -> None:
    made = model(recovery=recovery)
    poses = torch.randn(2, FRAMES, 17, 3)
    total, parts = made.loss(clips(), poses)
    lifted = made.lift(clips())
    position, smooth, velocity, count, steps = 0.0, 0.0, 0.0, 0, 0
    for b in range(2):
        last = None
        for row, t in enumerate(lifted.frames[b].tolist()):
            made_pose, true = lifted.poses[b, row].detach(), poses[b, t] - poses[b, t, 0]
            for j, weight in enumerate(JOINT_WEIGHTS):
                position += weight * float((made_pose[j] - true[j]).norm())
                count += 1
                if last is not None:
                    step, wanted = made_pose[j] - last[0][j], true[j] - last[1][j]
                    smooth += weight * float(step.square().sum()) / 3
                    velocity += float((step - wanted).norm())
                    steps += 1
            last = (made_pose, true)
    assert float(parts["position"].detach()) == pytest.approx(position / count, rel=1e-4)
    assert float(parts["smoothness"].detach()) == pytest.approx(smooth / steps, rel=1e-4)
    assert float(parts["velocity"].detach()) == pytest.approx(velocity / steps, rel=1e-4)
    wanted = position / count + 0.5 * smooth / steps + 2 * velocity / steps
    assert float(total.detach()) == pytest.approx(wanted, rel=1e-4)
    total.backward()
    assert all(weight.grad is not None for weight in made.parameters())


@torch.no_grad()
def test_the_mirror_image_keeps_the_same_frames() -> None:
    x = clips()
    assert torch.equal(mirror(mirror(x)), x) and torch.equal(mirror(x)[:, :, 16, 0], -x[:, :, 13, 0])
    assert torch.equal(mirror(x)[:, :, 1, 1], x[:, :, 4, 1]) and torch.equal(mirror(x)[:, :, 8, 1], x[:, :, 8, 1])
    made = model(recovery="none")
    plain, both = made.lift(x), made.predict(x)
    assert torch.equal(both.kept, plain.kept)
    other = made.lift(mirror(x), plain.kept).poses
    torch.testing.assert_close(both.poses, (plain.poses + mirror(other)) / 2)
    assert not torch.equal(made.lift(mirror(x)).kept, plain.kept), "the test needs a clip that would choose otherwise"


def test_sizes_of_what_hot_adds() -> None:
    with torch.device("meta"):
        plain, hot = (sum(one.numel() for one in Hot.named(name).parameters()) for name in ("mixste", "hot-mixste"))
    assert hot - plain == 4 * (512**2 + 512) + 243 * 512 + 81 * 512 == 1_216_512


@torch.no_grad()
def test_counting_as_printed_is_the_same_model() -> None:
    made = model()
    assert torch.equal(AsPrinted(made)(clips()), made(clips()))


def test_round_trip(tmp_path: Path) -> None:
    made = model(host="motionagformer", select="attention")
    made.save_pretrained(tmp_path)
    again = Hot.from_pretrained(tmp_path).eval()
    assert again.select == "attention" and torch.equal(again(clips()), made(clips()))


def test_bf16() -> None:
    made = model().bfloat16()
    out = made(clips().bfloat16())
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())


def test_names_and_refusals() -> None:
    assert Hot.named("tiny", keep=9).keep == 9 and "hot-motionbert" in CONFIGURATIONS
    with pytest.raises(InputError, match="did you mean hot-mixste"):
        Hot.named("hot-mixst")
    for changes, message in (
        ({"keep": 10}, "keep must be at most the 9 frames"),
        ({"keep": 0}, "keep must be a whole number >= 1"),
        ({"frames": 0}, "frames"),
        ({"prune_layer": 0}, "prune_layer"),
        ({"prune_layer": 3}, "prune_layer must be less than the 3 layers"),
        ({"depth": 0}, "depth"),
        ({"select": "best"}, "select must be one of density"),
        ({"recovery": "x"}, "recovery must be one of attention"),
        ({"host": "vit"}, "host must be one of mixste"),
        ({"neighbours": 0}, "neighbours"),
        ({"neighbours": 10}, "neighbours must be at most the 9 frames"),
        ({"tie_noise": -1}, "tie_noise"),
        ({"joints": 0}, "joints"),
        ({"channels": 1}, "channels"),
        ({"width": 0}, "width"),
        ({"heads": 3}, "width must be a multiple of heads"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
        ({"representation": 0}, "representation"),
        ({"recovery_heads": 3}, "recovery_heads"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"host": "mhformer", "select": "attention"}, "MHFormer has no single block"),
    ):
        with pytest.raises(InputError, match=message):
            model(**changes)
    with pytest.raises(InputError, match=r"keypoints must be \(B, 9"):
        model()(clips(frames=8))
    with pytest.raises(InputError, match="frame 3 was not kept"):
        model(recovery="none", keep=1).lift(clips()).at(3)
