"""A vector quantiser, and the VQGAN of MaskGIT, whose codes and decoder 1-D tokenizers build on.

`Vqgan`: pictures (B, 3, H, W) in [0, 1] -> a grid of ids, 2^(levels - 1) px a side each -> pictures. Convolutions only,
after https://arxiv.org/abs/2202.04200, in the form of its PyTorch ports: what is skipped where a block changes the
number of channels is not the block's input but what its second convolution made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.method import InputError, whole, within
from foveate.nn.codes import Codes


@dataclass(frozen=True, eq=False)
class Quantised:
    """Vectors z (..., C) with codes in their place, their `ids` (...), and the quantiser's scalar loss."""

    z: Tensor
    ids: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    """z (..., C) -> the nearest of K codes, q, with the gradient of q passed straight on to z.

    The loss is `commitment * mean (sg(q) - z)^2 + mean (q - sg(z))^2`, sg stopping gradients. With `normalised`, codes
    and z are divided by their lengths first, so that the nearest is the one with the largest cosine. All of it in
    float32, under autocast too. Codes begin uniform in +-1 / K.

    Attributes:
        bypass: whether vectors are passed on as they are, and the loss is 0, for the first steps of a short training.
    """

    bypass = False

    def __init__(self, codes: int, channels: int, *, normalised: bool = False, commitment: float = 0.25) -> None:
        super().__init__()
        self.embedding = nn.Embedding(whole("codes", codes, 2), whole("channels", channels, 1))
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)
        self.normalised, self.commitment = normalised, within("commitment", commitment, "[0, inf)")

    @property
    def codebook(self) -> Tensor:
        """(K, C) float32."""
        weight = self.embedding.weight.float()
        return F.normalize(weight, dim=1) if self.normalised else weight

    def look_up(self, ids: Tensor) -> Tensor:
        """(..., C) codes of ids (...)."""
        return F.embedding(ids, self.codebook)

    def forward(self, z: Tensor) -> Quantised:
        with torch.autocast(z.device.type, enabled=False):
            z, codebook = z.float(), self.codebook
            if self.normalised:
                z = F.normalize(z, dim=-1)
            with torch.no_grad():
                ids = (z @ codebook.T - codebook.square().sum(1) / 2).argmax(-1)
            q = F.embedding(ids, codebook)
            loss = self.commitment * F.mse_loss(z, q.detach()) + F.mse_loss(q, z.detach())
            return Quantised(z, ids, 0 * loss) if self.bypass else Quantised(z + (q - z).detach(), ids, loss)


class VqganEncoder(nn.Module):
    """(B, 3, H, W) -> (B, channels, H / 2^(levels - 1), W / 2^(levels - 1)); levels are `multipliers * width` wide."""

    def __init__(self, width: int, multipliers: Sequence[int], channels: int) -> None:
        super().__init__()
        widths = [width * multiplier for multiplier in multipliers]
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        levels: list[nn.Module] = []
        for before, after in zip([width, *widths], widths):
            levels += [nn.Sequential(_Block(before, after), _Block(after, after)), nn.AvgPool2d(2)]
        self.levels = nn.Sequential(*levels[:-1])
        self.middle = nn.Sequential(*(_Block(widths[-1], widths[-1]) for _ in range(2)))
        self.out = nn.Sequential(_norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], channels, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        z: Tensor = self.out(self.middle(self.levels(self.stem(pixels))))
        return z


class VqganDecoder(nn.Module):
    """(B, channels, h, w) -> (B, 3, h 2^(levels - 1), w 2^(levels - 1)), not clamped."""

    def __init__(self, width: int, multipliers: Sequence[int], channels: int) -> None:
        super().__init__()
        widths = [width * multiplier for multiplier in reversed(multipliers)]
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.middle = nn.Sequential(*(_Block(widths[0], widths[0]) for _ in range(2)))
        levels: list[nn.Module] = []
        for before, after in zip([widths[0], *widths], widths):
            levels.append(nn.Sequential(_Block(before, after), _Block(after, after)))
            levels += [nn.Upsample(scale_factor=2), nn.Conv2d(after, after, 3, padding=1)]
        self.levels = nn.Sequential(*levels[:-2])
        self.out = nn.Sequential(_norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.out(self.levels(self.middle(self.stem(z))))
        return pixels


class _Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(before), nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm2, self.conv2 = _norm(after), nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(after, after, 1, bias=False) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv1(F.silu(self.norm1(x)))
        made = self.conv2(F.silu(self.norm2(made)))
        return made + (x if self.shortcut is None else self.shortcut(made))


def _norm(width: int) -> nn.GroupNorm:
    # Four channels a group at least, as at 128: a norm of each channel alone would take the brightness away.
    return nn.GroupNorm(math.gcd(32, max(1, width // 4)), width, eps=1e-6)


class Vqgan(nn.Module, PyTorchModelHubMixin, library_name="foveate"):
    """The whole autoencoder; the defaults are MaskGIT's, with 16 px a code.

    Args:
        width, multipliers: channels at full resolution, and their multiples at this and each halved one.
        codes, channels: of the codebook.
        commitment: see `VectorQuantizer`.
    """

    def __init__(
        self, *, width: int = 128, multipliers: Sequence[int] = (1, 1, 2, 2, 4), codes: int = 1024, channels: int = 256,
        commitment: float = 0.25,
    ) -> None:  # fmt: skip
        super().__init__()
        whole("width", width, 1)
        self.patch = 2 ** (len([whole("multipliers", one, 1) for one in multipliers]) - 1)
        self.encoder = VqganEncoder(width, multipliers, channels)
        self.quantizer = VectorQuantizer(codes, channels, commitment=commitment)
        self.decoder = VqganDecoder(width, multipliers, channels)

    def quantise(self, pixels: Tensor) -> Quantised:
        """z and ids are (B, h, w, channels) and (B, h, w)."""
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % self.patch or pixels.shape[3] % self.patch:
            wanted = f"(B, 3, H, W), H and W multiples of {self.patch}"
            raise InputError(f"pictures must be {wanted}, not {tuple(pixels.shape)}")
        made: Quantised = self.quantizer(self.encoder(pixels).permute(0, 2, 3, 1))
        return made

    def forward(self, pixels: Tensor) -> tuple[Tensor, Quantised]:
        """What becomes of pictures, not clamped, and their codes."""
        quantised = self.quantise(pixels)
        return self.decoder(quantised.z.permute(0, 3, 1, 2)), quantised

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Codes:
        """Pictures (B, 3, H, W) in [0, 1]; their sides are multiples of `patch`."""
        ids = self.quantise(pixels).ids
        height, width = pixels.shape[-2:]
        return Codes(ids.flatten(1), self.quantizer.embedding.num_embeddings, (height, width), tuple(ids.shape[1:]))

    def decode(self, codes: Codes) -> Tensor:
        """(B, 3, H, W) in [0, 1]."""
        if len(codes.grid) != 2 or codes.codebook_size != self.quantizer.embedding.num_embeddings:
            raise InputError(f"these are no codes of this VQGAN: a grid of {codes.grid}, {codes.codebook_size} codes")
        z = self.quantizer.look_up(codes.ids.unflatten(1, codes.grid))
        pixels: Tensor = self.decoder(z.permute(0, 3, 1, 2))
        return pixels.clamp(0, 1)
