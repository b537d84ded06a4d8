"""HoT: lifting 2-D poses to 3-D, frames like others leave after the first layers; one attention brings them back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from foveate.method import Card, Claim, InputError, Published, choice, configured, register, whole, within
from foveate.nn.pose_lifting import LEFT, LIFTERS, RIGHT, CrossAttention, Lifter
from foveate.tokens import take

_MIXSTE = {
    "host": "mixste", "frames": 243, "channels": 2, "width": 512, "depth": 8, "heads": 8, "mlp_ratio": 2.0,
}  # fmt: skip
_MOTIONBERT = _MIXSTE | {"host": "motionbert", "channels": 3, "width": 256, "depth": 5, "mlp_ratio": 4.0}
_MOTIONAGFORMER = _MOTIONBERT | {"host": "motionagformer", "width": 128, "depth": 16, "recovery_heads": 4}
_MHFORMER = _MIXSTE | {"host": "mhformer", "frames": 351, "depth": 3}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "mixste": _MIXSTE | {"keep": 243, "recovery": "none"},
    "hot-mixste": _MIXSTE | {"keep": 81, "prune_layer": 3},
    "tpc-mixste": _MIXSTE | {"keep": 61, "prune_layer": 7, "recovery": "none"},
    "motionbert": _MOTIONBERT | {"keep": 243, "recovery": "none"},
    "hot-motionbert": _MOTIONBERT | {"keep": 81, "prune_layer": 1},
    "motionagformer": _MOTIONAGFORMER | {"keep": 243, "recovery": "none"},
    "hot-motionagformer": _MOTIONAGFORMER | {"keep": 81, "prune_layer": 7},
    "mhformer": _MHFORMER | {"keep": 351, "recovery": "none"},
    "tpc-mhformer": _MHFORMER | {"keep": 117, "prune_layer": 1, "recovery": "none"},
    "tiny": _MIXSTE | {"frames": 39, "keep": 13, "prune_layer": 1, "width": 64, "depth": 4, "heads": 4}
    | {"recovery_heads": 4},
}  # fmt: skip
"""Arguments of `Hot` by name: the hosts as they are, the paper's HoT and TPC on them, and this project's "tiny"."""

JOINT_WEIGHTS = (1, 1, 2.5, 2.5, 1, 2.5, 2.5, 1, 1, 1, 1.5, 1.5, 4, 4, 1.5, 4, 4)
"""Of the loss, for Human3.6M's 17 joints."""
SELECTIONS = ("density", "attention", "motion", "uniform", "random")
RECOVERIES = ("attention", "linear", "nearest", "none")

_PRINTED = {
    # name: parameters, FLOPs of the linear layers
    "mixste": (33_783_811, 277.25e9),
    "hot-mixste": (35_000_323, 167.51e9),
    "tpc-mixste": (33_783_811, 251.28e9),
    "motionbert": (16_001_549, 131.09e9),
    "hot-motionbert": (16_347_661, 63.21e9),
    "motionagformer": (11_723_811, 95.92e9),
    "hot-motionagformer": (11_828_031, 60.52e9),
    "mhformer": (31_516_125, 14.15e9),
    "tpc-mhformer": (31_516_125, 8.22e9),
}


class AsPrinted(nn.Module):
    """A model as the authors count it: they project the queries of the recovery once for each joint, which gives the
    same numbers each time; `Hot` does it once."""

    def __init__(self, model: Hot) -> None:
        super().__init__()
        self.model = model

    def forward(self, keypoints: Tensor) -> Tensor:
        recover = self.model.recover
        if recover is not None:
            again = len(keypoints) * self.model.lifter.streams - 1
            recover.attention.query(recover.queries.repeat(again, 1, 1))
        poses: Tensor = self.model(keypoints)
        return poses


def _named(name: str) -> Callable[[], nn.Module]:
    return lambda: Hot.named(name)


def _printed(name: str) -> Callable[[], nn.Module]:
    return lambda: AsPrinted(Hot.named(name))


def _clip(name: str) -> Callable[[], Sequence[Any]]:
    known = CONFIGURATIONS[name]
    return lambda: (torch.empty(1, known["frames"], 17, known["channels"]),)


@register
class Hot(Published, nn.Module, PyTorchModelHubMixin, library_name="foveate"):
    """A video pose transformer whose layers from n on see f of F frames; all joints of a frame stay or go together.

    Tokens x (B, F, J, C) enter layer n. Of each frame z = mean_j x_j (MHFormer: its three hypotheses side by side),

        D_ij = ||z_i - z_j|| / sqrt(C)
        rho_i = exp(-mean of D^2 over the k smallest of row i, itself included) + U(0, 1) * tie_noise
        delta_i = min {D_ij : rho_j > rho_i}, or the clip's greatest D where no frame is denser

    the f frames with the greatest rho * delta stay, in their order, as they are; nothing is merged and no gradient goes
    through the choice. Of equally dense frames the earlier counts as denser (with k = 2 mutual nearest neighbours are
    equally dense, so that `tie_noise` decides between them; with 0 the choice is deterministic).

    HoT (`recovery="attention"`): a learned position for each of the f, and behind the last layer, before the host's
    head, for each joint X = Q + MHA(Q, x, x) with learned Q (F, C): keypoints (B, F, J, c) -> poses (B, F, J, 3).
    TPC (`recovery="none"`): the frame in the middle, (F - 1) // 2, always stays; poses (B, f, J, 3) of the frames kept.
    The host as it is: `recovery="none", keep=frames`.

    Hourglass Tokenizer for Efficient Transformer-Based 3D Human Pose Estimation, CVPR 2024,
    https://arxiv.org/abs/2311.12028: its TPC and TRA. Where a host has a norm before its head, recovery comes before it
    (ours). MHFormer with recovery treats hypotheses like joints (ours; the paper has TPC alone there).

    Args:
        host: "mixste", "motionbert", "motionagformer" or "mhformer", see `foveate.nn.pose_lifting`.
        frames, keep: F and f.
        prune_layer: n, before which layer frames go, 0-based; at least 1.
        select: "density" (the paper's), or what it compares with: "attention" (that the frame would receive in layer
            n), "motion" (of the keypoints, to the frames before and after), "uniform", and "random".
        recovery: "attention", "none", or "linear" and "nearest" in time between the tokens of the frames kept.
        neighbours: k.
        tie_noise: see above; the authors' 1e-6 makes results depend on PyTorch's random state.
        joints, channels: J and c of the keypoints.
        width, depth, heads, mlp_ratio, representation: of the host, see `Lifter`.
        recovery_heads: of the recovery's attention.
        drop_path: greatest rate of stochastic depth.

    Raises:
        InputError: for numbers that do not go together.
    """

    card = Card(
        slug="hot", title="Hourglass Tokenizer for Efficient Transformer-Based 3D Human Pose Estimation",
        arxiv="2311.12028", year=2023, kind="reduce", hosts=(), training_free=False,
        summary="Keeps cluster centres of a video's frames while lifting poses to 3-D, and recovers all at the end.",
        parameters={
            "host": "'mixste', 'motionbert', 'motionagformer' or 'mhformer'",
            "frames": "frames of a clip",
            "keep": "frames that stay",
            "prune_layer": "layer before which frames go, at least 1",
            "select": "'density', 'attention', 'motion', 'uniform' or 'random'",
            "recovery": "'attention' (HoT), 'none' (TPC), 'linear' or 'nearest'",
            "neighbours": "frames that make a frame's density, itself included",
            "tie_noise": "added to the density at random; 0 for a deterministic choice",
            "joints": "keypoints of a frame",
            "channels": "numbers of a keypoint: x, y, and a confidence for some hosts",
            "width": "channels of the host",
            "depth": "layers of the host",
            "heads": "attention heads of the host",
            "mlp_ratio": "width of its MLPs in multiples of the width",
            "representation": "channels before the last layer of MotionBERT and MotionAGFormer",
            "recovery_heads": "attention heads of the recovery",
            "drop_path": "greatest rate of stochastic depth",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(f"parameters of {name}", "parameters", count, "card", tolerance=0.0, model=_named(name))
            for name, (count, _) in _PRINTED.items()
        ),
        *(
            Claim(
                f"FLOPs of the linear layers of {name}", "flops", flops, "card", tolerance=0.001,
                counting="linear-flops", model=_printed(name), inputs=_clip(name),
            )
            for name, (_, flops) in _PRINTED.items()
        ),
    )  # fmt: skip

    def __init__(
        self, *, host: str = "mixste", frames: int = 243, keep: int = 81, prune_layer: int = 3,
        select: str = "density", recovery: str = "attention", neighbours: int = 2, tie_noise: float = 1e-6,
        joints: int = 17, channels: int = 2, width: int = 512, depth: int = 8, heads: int = 8, mlp_ratio: float = 2.0,
        representation: int = 512, recovery_heads: int = 8, drop_path: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.frames, self.keep = whole("frames", frames, 1), whole("keep", keep, 1)
        if keep > frames:
            raise InputError(f"keep must be at most the {frames} frames, not {keep}")
        pruned = keep < frames or recovery != "none"
        self.prune_layer = whole("prune_layer", prune_layer, 1)
        if whole("depth", depth, 1) <= prune_layer and pruned:
            raise InputError(f"prune_layer must be less than the {depth} layers, not {prune_layer}")
        self.select, self.recovery = choice("select", select, SELECTIONS), choice("recovery", recovery, RECOVERIES)
        if whole("neighbours", neighbours, 1) > frames:
            raise InputError(f"neighbours must be at most the {frames} frames, not {neighbours}")
        self.neighbours, self.tie_noise = neighbours, within("tie_noise", tie_noise, "[0, 1]")
        self.lifter: Lifter = LIFTERS[choice("host", host, tuple(LIFTERS))](
            [frames] * min(prune_layer, depth) + [keep] * max(0, depth - prune_layer),
            joints=whole("joints", joints, 1), channels=whole("channels", channels, 2), width=whole("width", width, 1),
            heads=whole("heads", heads, 1), mlp_ratio=within("mlp_ratio", mlp_ratio, "(0, inf)"),
            representation=whole("representation", representation, 1),
            drop_path=within("drop_path", drop_path, "[0, 1)"),
        )  # fmt: skip
        if select == "attention":
            self.lifter.frame_block(min(prune_layer, depth - 1))
        self.position = None if recovery == "none" else nn.Parameter(torch.zeros(1, keep, 1, width))
        self.recover: TokenRecovery | None = None
        if recovery == "attention":
            if width % whole("recovery_heads", recovery_heads, 1):
                raise InputError(f"width must be a multiple of recovery_heads, not {width} with {recovery_heads} heads")
            self.recover = TokenRecovery(width, frames, recovery_heads, self.lifter.bias)
        weights = JOINT_WEIGHTS if joints == len(JOINT_WEIGHTS) else (1,) * joints
        self.joint_weights: Tensor
        self.register_buffer("joint_weights", torch.tensor(weights, dtype=torch.float32), persistent=False)

    @classmethod
    def named(cls, name: str, **changes: Any) -> Hot:
        """The model of a name in `CONFIGURATIONS`, with some arguments changed, random weights."""
        return cls(**configured(name, CONFIGURATIONS, changes))

    @property
    def centre(self) -> int:
        return (self.frames - 1) // 2

    @torch.no_grad()
    def choose(self, x: Tensor, keypoints: Tensor) -> Tensor:
        """(B, f) long, ascending: the frames that stay, of tokens x (B, F, S, C) and keypoints (B, F, J, c)."""
        batch, frames = x.shape[:2]
        if self.keep == frames:
            return torch.arange(frames, device=x.device).expand(batch, -1)
        if self.select == "uniform":
            middles = torch.arange(self.keep, device=x.device).add(0.5).mul(frames / self.keep).long()
            if self.recovery == "none":
                middles[(middles - self.centre).abs().argmin()] = self.centre
            return middles.expand(batch, -1)
        if self.select == "density":
            density, distance = density_peaks(self.lifter.pool(x), self.neighbours, self.tie_noise)
            score = density * distance
        elif self.select == "attention":
            score = self.lifter.frame_attention(self.prune_layer, x)
        elif self.select == "motion":
            score = motion(keypoints)
        else:
            score = torch.rand(batch, frames, device=x.device)
        if self.recovery == "none":
            # The pose that TPC is asked for.
            score[:, self.centre] = math.inf
        return score.sort(dim=1, descending=True, stable=True).indices[:, : self.keep].sort(dim=1).values

    def shorten(self, x: Tensor, keypoints: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (B, f, S, C) of tokens (B, F, S, C), and the frames (B, f) they are of, prescribed or chosen."""
        kept = self.choose(x, keypoints) if kept is None else kept
        if self.keep < self.frames:
            x = take(x.flatten(2), kept).unflatten(2, x.shape[2:])
        return x, kept

    def lift(self, keypoints: Tensor, kept: Tensor | None = None) -> Lifted:
        """Poses of clips (B, F, J, c), and which frames stayed; `kept` (B, f), ascending, prescribes them."""
        if keypoints.ndim != 4 or keypoints.shape[1] != self.frames:
            raise InputError(f"keypoints must be (B, {self.frames}, J, c), not {tuple(keypoints.shape)}")
        x = self.lifter.embed(keypoints)
        for index in range(self.lifter.depth):
            if index == self.prune_layer:
                x, kept = self.shorten(x, keypoints, kept)
                if self.position is not None:
                    x = x + self.position
            x = self.lifter.layer(index, x)
        every = torch.arange(self.frames, device=x.device).expand(len(x), -1)
        kept = every if kept is None else kept
        if self.recover is not None:
            x = self.recover(x)
        elif self.recovery != "none":
            x = between(x, kept, self.frames, self.recovery)
        return Lifted(self.lifter.head(x), kept, kept if self.recovery == "none" else every)

    def forward(self, keypoints: Tensor) -> Tensor:
        return self.lift(keypoints).poses

    def forward_features(self, keypoints: Tensor) -> Tensor:
        """(B, F, S, C): tokens as they enter the layer at which frames go."""
        x = self.lifter.embed(keypoints)
        for index in range(min(self.prune_layer, self.lifter.depth)):
            x = self.lifter.layer(index, x)
        return x

    @torch.no_grad()
    def predict(self, keypoints: Tensor) -> Lifted:
        """The mean of a clip's poses and its mirror image's, mirrored back; both keep the same frames.

        Only for Human3.6M's 17 joints, with x the first number of a keypoint and 0 in the middle of the picture.
        """
        plain = self.lift(keypoints)
        mirrored = self.lift(mirror(keypoints), plain.kept)
        return Lifted((plain.poses + mirror(mirrored.poses)) / 2, plain.kept, plain.frames)

    def loss(self, keypoints: Tensor, poses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Of poses (B, F, J, 3): position + 0.5 * smoothness + 2 * velocity, and these parts.

        position: mean of w_j ||p - t||; smoothness: mean of w_j (difference of p to the frame before)^2; velocity: mean
        of ||difference of p - difference of t||. t is the pose relative to joint 0. Under TPC the frames kept are
        compared with their poses, the one before being the one kept before, however long ago.
        """
        lifted = self.lift(keypoints)
        target = take(poses.flatten(2), lifted.frames).unflatten(2, poses.shape[2:])
        target = target - target[:, :, :1]
        weights, made = self.joint_weights, lifted.poses
        step, true_step = made.diff(dim=1), target.diff(dim=1)
        parts = {
            "position": (weights * (made - target).norm(dim=-1)).mean(),
            "smoothness": (weights.unsqueeze(-1) * step.square()).mean(),
            "velocity": (step - true_step).norm(dim=-1).mean(),
        }
        return parts["position"] + 0.5 * parts["smoothness"] + 2 * parts["velocity"], parts


@dataclass(frozen=True, eq=False)
class Lifted:
    """Poses of B clips.

    Attributes:
        poses: (B, n, J, 3).
        kept: (B, f) long, ascending, the frames that went through all layers.
        frames: (B, n) long, the frame that each pose is of: all F, or those kept.
    """

    poses: Tensor
    kept: Tensor
    frames: Tensor

    def at(self, frame: int) -> Tensor:
        """(B, J, 3): the poses of a frame; InputError where it is not among them for every clip."""
        found = self.frames == frame
        if not bool(found.any(1).all()):
            raise InputError(f"frame {frame} was not kept for every clip")
        return self.poses[found]


class TokenRecovery(nn.Module):
    """Token Recovering Attention: (B, f, S, C) -> (B, F, S, C), X = Q + MHA(Q, x, x) for each joint."""

    def __init__(self, width: int, frames: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1, frames, width))
        self.attention = CrossAttention(width, heads, bias)

    def forward(self, x: Tensor) -> Tensor:
        tracks = x.transpose(1, 2)
        memory = tracks.flatten(0, 1)
        # A weight as a module's argument, without gradients, trips PyTorch's FLOP counter.
        queries = self.queries.clone()
        made: Tensor = queries + self.attention(queries, memory, memory)
        return made.unflatten(0, tracks.shape[:2]).transpose(1, 2)


def density_peaks(x: Tensor, neighbours: int = 2, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Density rho and distance delta to the nearest denser point, both (B, N), of x (B, N, C); see `Hot`."""
    x = x.detach().float()
    # Differences instead of a matrix product: the distance of equal points is 0, and D is symmetric.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(x.shape[-1])
    density = distance.topk(neighbours, largest=False).values.square().mean(-1).neg().exp()
    if noise:
        density = density + noise * torch.rand_like(density)
    number = torch.arange(x.shape[1], device=x.device)
    own, other = density.unsqueeze(2), density.unsqueeze(1)
    denser = (other > own) | ((other == own) & (number.unsqueeze(0) < number.unsqueeze(1)))
    return density, torch.where(denser, distance, distance.amax((1, 2), keepdim=True)).amin(-1)


def motion(keypoints: Tensor) -> Tensor:
    """(B, F): how far the joints of keypoints (B, F, J, c) move in the picture from and to the frames beside, the mean
    over joints and over the one or two frames beside."""
    step = keypoints[..., :2].detach().diff(dim=1).norm(dim=-1).mean(-1)
    padded = torch.cat([step[:, :1], step, step[:, -1:]], 1)
    return (padded[:, 1:] + padded[:, :-1]) / 2


def between(x: Tensor, kept: Tensor, frames: int, how: str) -> Tensor:
    """(B, F, S, C) of tokens (B, f, S, C) at the frames `kept` (B, f): those in between "linear" or the "nearest".

    Of two equally near the earlier; before the first and behind the last, that one.
    """
    time = torch.arange(frames, device=x.device).expand(len(x), -1).contiguous()
    kept = kept.contiguous()
    after = torch.searchsorted(kept, time).clamp(max=kept.shape[1] - 1)
    before = (torch.searchsorted(kept, time, right=True) - 1).clamp(min=0)
    start, end = kept.gather(1, before), kept.gather(1, after)
    weight = ((time - start) / (end - start).clamp(min=1)).to(x.dtype)
    if how == "nearest":
        weight = (weight > 0.5).to(x.dtype)
    rows = x.flatten(2)
    return torch.lerp(take(rows, before), take(rows, after), weight.unsqueeze(-1)).unflatten(2, x.shape[2:])


def mirror(x: Tensor) -> Tensor:
    """Keypoints or poses (B, F, 17, c) of the mirror image: the first number negative, left and right exchanged."""
    order = list(range(17))
    for one, other in zip(LEFT, RIGHT):
        order[one], order[other] = other, one
    return torch.cat([-x[..., :1], x[..., 1:]], -1)[:, :, order]
