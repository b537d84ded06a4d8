"""Augmentation of pictures that are stored as ids of a codebook (SeiT++), without pixels.

Ids become codes (B, C, H, W), these are changed, and the nearest codes are ids again. `ColorAdapt` gives a picture
another's statistics, `x' = s_y (x - m_x) / s_x + m_y` for each channel; `TokenAdapt` moves codes to where flips and
crops act as on pixels, `x' = g(A(f(x)))`; `EmbNoise` and `TokenEda` are simpler ones, and `TokenAugmentation` is
several of them.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as vision

from foveate.method import InputError, whole, within
from foveate.methods.learn.cutmix import CutMix
from foveate.nn.vit import fixed_positions, transformer_blocks


class Codebook(nn.Module):
    """The frozen codes (K, C) of the tokenizer that made the ids.

    Raises:
        InputError: for another shape, a code that is zero or not finite, or two codes of the same direction, which the
            cosine cannot tell apart.
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        if weight.ndim != 2 or not weight.is_floating_point() or not bool(weight.isfinite().all()):
            raise InputError(f"a codebook must be (K, C) finite numbers, not {tuple(weight.shape)} {weight.dtype}")
        self.register_buffer("weight", weight.detach().float().clone())
        for first in range(0, len(weight), 1024):
            some = self.weight[first : first + 1024]
            if not torch.equal(self.quantise(some[:, :, None, None]).flatten(), torch.arange(len(some)) + first):
                raise InputError("every code must have a direction of its own, for ids are found by the cosine")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the codes as little-endian float32."""
        return hashlib.sha256(self.weight.cpu().numpy().astype("<f4").tobytes()).hexdigest()

    def embed(self, ids: Tensor) -> Tensor:
        """(B, H, W) ids -> (B, C, H, W)."""
        return F.embedding(ids, self.weight).permute(0, 3, 1, 2)

    def quantise(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H, W), the code with the largest cosine; the length of an embedding does not matter."""
        # In float64: bicubic weights that add up to nearly one must not turn a code into its neighbour.
        codes = F.normalize(self.weight.double(), dim=1)
        return (x.double().permute(0, 2, 3, 1) @ codes.T).argmax(-1)


def color_adapt(x: Tensor, partner: Tensor) -> Tensor:
    """`s2 (x - m1) / s1 + m2`: each channel of x (B, C, H, W) gets its partner's mean and (unbiased) deviation.

    A channel that is constant becomes the partner's mean; the release divides by zero there.
    """
    (s1, m1), (s2, m2) = (torch.std_mean(one, (2, 3), keepdim=True) for one in (x, partner))
    scale = torch.where(s1 > 1e-6 * (1 + m1.abs()), s2 / s1, 0.0)
    return scale * (x - m1) + m2


def _half(x: Tensor) -> Tensor:
    """(B // 2,) numbers of pictures of x, drawn without repetition."""
    return torch.randperm(len(x))[: len(x) // 2].to(x.device)


class ColorAdapt(nn.Module):
    """`color_adapt` of a random half of x (B, C, H, W), with the batch in reverse order as partners."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = _half(x)
        return x.index_copy(0, chosen, color_adapt(x, x.flip(0))[chosen])


class EmbNoise(nn.Module):
    """Gaussian noise on a random half of x (B, C, H, W): one draw for each channel, plus one for each element."""

    def __init__(self, *, std: float = 1.0) -> None:
        super().__init__()
        self.std = within("std", std, "[0, inf)")

    def forward(self, x: Tensor) -> Tensor:
        chosen = _half(x)
        noise = torch.randn_like(x[chosen][..., :1, :1]) + torch.randn_like(x[chosen])
        return x.index_add(0, chosen, self.std * noise)


class TokenEda(nn.Module):
    """SeiT's augmentation of ids (B, H, W): synonyms and a swap, from https://arxiv.org/abs/2303.11114.

    With probability `replace` an id becomes one of the `synonyms` codes that are nearest to it by the cosine. Then two
    square blocks change places, whose side is at most `swap` times that of the grid. The blocks lie on a lattice of
    their own side, so that they never overlap; where both are the same, nothing is swapped (ours).
    """

    nearest: Tensor

    def __init__(self, codebook: Codebook, *, synonyms: int = 5, replace: float = 0.25, swap: float = 0.25) -> None:
        super().__init__()
        self.replace, self.swap = within("replace", replace, "[0, 1]"), within("swap", swap, "[0, 1)")
        if whole("synonyms", synonyms, 1) >= len(codebook.weight):
            raise InputError(f"synonyms must be fewer than {len(codebook.weight)} codes, not {synonyms}")
        codes = F.normalize(codebook.weight, dim=1)
        self.register_buffer("nearest", (codes @ codes.T).fill_diagonal_(-2).topk(synonyms).indices, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        chosen = torch.rand(ids.shape, device=ids.device) < self.replace
        which = torch.randint(self.nearest.shape[1], ids.shape, device=ids.device)
        ids = torch.where(chosen, self.nearest[ids, which], ids)
        most = int(self.swap * min(ids.shape[1:]))
        for one in ids if most else ():
            side = int(torch.randint(1, most + 1, ()))
            (a, b), (c, d) = ([int(torch.randint(length // side, ())) * side for length in one.shape] for _ in range(2))
            first, second = one[a : a + side, b : b + side], one[c : c + side, d : d + side]
            kept = first.clone()
            first.copy_(second)
            second.copy_(kept)
        return ids


@dataclass(frozen=True, eq=False)
class Geometry:
    """One draw of a geometric augmentation, for pixels, or for maps of any size of the same pictures.

    Flip, rotation, shifts and shears are one draw for the whole batch; the crop is one for each picture.

    Attributes:
        flip: from left to right.
        moves: in order, ("rotate", degrees), ("translate x" or "translate y", share of the side), ("shear x" or
            "shear y", degrees); what comes from outside is zero.
        boxes: (B, 4) top, left, height, width of what is cut out, in cells of a map whose side is `side`.
        side: of that map.
        crop: side, on it, that each box is resized to.
    """

    flip: bool
    moves: tuple[tuple[str, float], ...]
    boxes: Tensor
    side: int
    crop: int

    @classmethod
    def draw(cls, batch: int, side: int, crop: int, scale: tuple[float, float], affine: bool = True) -> Geometry:
        """Flip with probability 0.5; with 0.5 the five moves, each with 0.5; a crop of `scale` of the area.

        Rotation by -30..30 degrees, shifts by up to 0.2 of the side, shears by 0..15 degrees, to one side only.
        """
        flip, moves = False, []
        if affine:
            flip = bool(torch.rand(()) < 0.5)
            ranges = (("rotate", -30, 30), ("translate x", -0.2, 0.2), ("translate y", -0.2, 0.2), ("shear x", 0, 15))
            if torch.rand(()) < 0.5:
                for name, low, high in (*ranges, ("shear y", 0, 15)):
                    if torch.rand(()) < 0.5:
                        moves.append((name, low + (high - low) * float(torch.rand(()))))
        cut, plane = v2.RandomResizedCrop(crop, scale=scale), torch.empty(1, side, side)
        drawn = [cut.make_params([plane]) for _ in range(batch)]
        boxes = torch.tensor([[one[name] for name in ("top", "left", "height", "width")] for one in drawn])
        return cls(flip, tuple(moves), boxes.view(batch, 4), side, crop)

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, C, S, S) -> (B, C, crop S / side, crop S / side); S is a multiple of `side`."""
        factor = x.shape[-1] // self.side
        if tuple(x.shape[-2:]) != (factor * self.side,) * 2 or len(x) != len(self.boxes):
            raise InputError(f"drawn for {len(self.boxes)} maps with sides that are multiples of {self.side}, "
                             f"not {tuple(x.shape)}")  # fmt: skip
        if self.flip:
            x = x.flip(-1)
        for name, value in self.moves:
            amounts = {"rotate": 0.0, "translate x": 0.0, "translate y": 0.0, "shear x": 0.0, "shear y": 0.0}
            amounts[name] = value * (x.shape[-1] if name.startswith("translate") else 1)
            x = vision.affine(
                x, angle=amounts["rotate"], translate=[amounts["translate x"], amounts["translate y"]], scale=1.0,
                shear=[amounts["shear x"], amounts["shear y"]], interpolation=InterpolationMode.BILINEAR,
            )  # fmt: skip
        size = [factor * self.crop] * 2
        cut = [
            vision.resized_crop(one, *(factor * int(edge) for edge in box), size, InterpolationMode.BICUBIC)
            for one, box in zip(x, self.boxes)
        ]
        return torch.stack(cut)


class TokenAdapt(nn.Module, PyTorchModelHubMixin):
    """Maps tokens to where geometry acts as it does on pixels, and back: `g(A(f(x)))`.

    `f`: embeddings (B, C, H, W) -> (B, C, 2 H, 2 W): linear, fixed positions, one pre-norm transformer layer with tanh
    in its MLP, norm, transposed 2 x 2 convolution. `g`: (B, C, 2 h, 2 w) -> logits (B, h, w, K): 2 x 2 convolution,
    positions, a layer of the same kind, norm, linear.

    Args:
        codes, channels: K and C of the codebook.
        grid: side H of the grid of stored ids.
        crop: side h of what goes back.
        width, heads: of both layers, whose MLPs are four times as wide.
    """

    def __init__(
        self, *, codes: int = 391, channels: int = 32, grid: int = 32, crop: int = 28, width: int = 384, heads: int = 6
    ) -> None:
        super().__init__()
        for name, value in (("codes", codes), ("channels", channels), ("grid", grid), ("crop", crop)):
            whole(name, value, 1)
        if crop > grid:
            raise InputError(f"crop must be <= grid, not {crop} of {grid}")
        self.grid, self.crop = grid, crop
        self.f, self.g = _Enlarge(channels, grid, width, heads), _Reduce(codes, channels, crop, width, heads)

    def loss(self, embeddings: Tensor, geometry: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
        """What f and g learn from: cross entropy of `g(A(f(tokens of x)))` with the tokens of A(x).

        Args:
            embeddings: (B, C, H, W) of the pictures' ids.
            geometry: A, on maps with side 2 H; the same draw made the pixels that `target` was read from.
            target: (B, h, w) ids of the augmented pictures.
        """
        logits = self.g(geometry(self.f(embeddings)))
        return F.cross_entropy(logits.flatten(0, 2), target.flatten())

    def forward(self, embeddings: Tensor, geometry: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, h, w) ids after the augmentation of maps (B, C, 2 H, 2 W) -> (B, C, 2 h, 2 w)."""
        return self.g(geometry(self.f(embeddings))).argmax(-1)


class _Enlarge(nn.Module):
    def __init__(self, channels: int, side: int, width: int, heads: int) -> None:
        super().__init__()
        self.inward = nn.Linear(channels, width)
        self.positions = fixed_positions(side, width)
        self.block = transformer_blocks(1, width, heads, qkv_bias=False, act_layer=nn.Tanh)[0]
        self.norm = nn.LayerNorm(width)
        self.outward = nn.ConvTranspose2d(width, channels, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.inward(x.flatten(2).transpose(1, 2)) + self.positions
        tokens = self.norm(self.block(tokens)).transpose(1, 2)
        return self.outward(tokens.unflatten(2, tuple(x.shape[2:])))


class _Reduce(nn.Module):
    def __init__(self, codes: int, channels: int, side: int, width: int, heads: int) -> None:
        super().__init__()
        self.inward = nn.Conv2d(channels, width, 2, 2)
        self.positions = fixed_positions(side, width)
        self.block = transformer_blocks(1, width, heads, qkv_bias=False, act_layer=nn.Tanh)[0]
        self.norm = nn.LayerNorm(width)
        self.outward = nn.Linear(width, codes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.inward(x)
        tokens = patches.flatten(2).transpose(1, 2) + self.positions
        return self.outward(self.norm(self.block(tokens))).unflatten(1, tuple(patches.shape[2:]))


class TokenAugmentation(nn.Module):
    """Stored ids (B, H, W), and labels, to ids (B, h, w) for the network: SeiT++'s augmentation of a batch.

    1. With `color`, the whole batch gets `EmbNoise` (probability `noise`) or `ColorAdapt`, one draw a batch.
    2. The first half is cut out and resized in embedding space, by a random resized crop of `scale` of the area.
    3. The second half goes through `adapt`: flip, moves and crop between f and g (`Geometry`).
    4. With `classes`, labels are mixed: CutMix of the first half in embedding space, CutMix or mixup (0.8) of the
       second between f and g; labels become (B, classes) weights, smoothed.
    5. Every position becomes the id of the nearest code.

    In evaluation mode: the centre of the grid, and labels as they are. Without `adapt` everything is in the first half.

    Args:
        codebook: of the ids.
        adapt: a trained `TokenAdapt`, which is frozen here: in evaluation mode and without gradients.
        crop: side h.
        scale: shares of the area; the paper's (0.2, 1) in pre-training and (0.08, 1) in fine-tuning.
        color: whether there is step 1; in the release's pre-training there is not.
        noise: probability of noise instead of ColorAdapt.
        noise_std: of each of the two draws of noise.
        shared: whether flip and moves are one draw for the half batch, as in the release; else one for each picture.
        classes: number of classes where labels are mixed, 0 where not.
        smoothing: of mixed labels.
    """

    def __init__(
        self, codebook: Codebook, adapt: TokenAdapt | None = None, *, crop: int = 28, scale: Sequence[float] = (0.2, 1),
        color: bool = False, noise: float = 0.75, noise_std: float = 1.0, shared: bool = True, classes: int = 0,
        smoothing: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.crop, self.color, self.shared = whole("crop", crop, 1), color, shared
        if len(scale) != 2 or scale[0] > scale[1]:
            raise InputError(f"scale must be a lower and an upper share, not {scale!r}")
        self.scale = (within("scale", scale[0], "(0, 1]"), within("scale", scale[1], "(0, 1]"))
        self.noise, self.classes = within("noise", noise, "[0, 1]"), whole("classes", classes)
        if adapt is not None and adapt.crop != crop:
            raise InputError(f"adapt makes {adapt.crop} x {adapt.crop} ids, not {crop} x {crop}")
        self.codebook = codebook
        self.adapt = adapt.requires_grad_(False).eval() if adapt is not None else None
        self.emb_noise, self.color_adapt = EmbNoise(std=noise_std), ColorAdapt()
        self.mixers = nn.ModuleList(
            CutMix(num_classes=classes, partner="reversed", mixup=mixup, smoothing=smoothing) for mixup in (0.0, 0.8)
        )

    def train(self, mode: bool = True) -> TokenAugmentation:
        """As `nn.Module.train`; f and g stay in evaluation mode."""
        super().train(mode)
        if self.adapt is not None:
            self.adapt.eval()
        return self

    @torch.no_grad()
    def forward(self, ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Ids (B, H, W) and labels (B,), or None, to ids (B, h, w) and labels."""
        if ids.ndim != 3 or min(ids.shape[1:]) < self.crop:
            raise InputError(f"ids must be (B, H, W) of at least {self.crop} x {self.crop}, not {tuple(ids.shape)}")
        if not self.training:
            return vision.center_crop(ids, [self.crop] * 2), labels
        if self.classes and labels is None:
            raise InputError("there are no labels to mix: hand them over, or set classes=0")
        x = self.codebook.embed(ids)
        if self.color:
            x = self.emb_noise(x) if torch.rand(()) < self.noise else self.color_adapt(x)
        middle = len(x) if self.adapt is None else (len(x) + 1) // 2
        parts = [self._in_embeddings(x[:middle], None if labels is None else labels[:middle])]
        if middle < len(x):
            parts.append(self._adapted(x[middle:], None if labels is None else labels[middle:]))
        found = [one for _, one in parts if one is not None]
        return torch.cat([one for one, _ in parts]), torch.cat(found) if found else None

    def _in_embeddings(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = Geometry.draw(len(x), x.shape[-1], self.crop, self.scale, affine=False)(x)
        x, labels = self._mixed(0, x, labels)
        return self.codebook.quantise(x), labels

    def _adapted(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert self.adapt is not None
        x = self.adapt.f(x)
        draw = functools.partial(Geometry.draw, side=x.shape[-1], crop=2 * self.crop, scale=self.scale)
        x = draw(len(x))(x) if self.shared else torch.cat([draw(1)(one) for one in x.split(1)])
        x, labels = self._mixed(1, x, labels)
        return self.adapt.g(x).argmax(-1), labels

    def _mixed(self, half: int, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.classes:
            return x, labels
        mixed: tuple[Tensor, Tensor] = self.mixers[half](x, labels)
        return mixed
