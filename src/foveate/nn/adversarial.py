"""Losses that make pictures sharp: a discriminator of patches with hinge loss and LeCam, and a network's logits.

Both losses of a GAN come out of one forward and are added up: the discriminator's weights get gradients from its own
loss alone, and the pictures from the generator's alone, so that one optimizer and one backward train both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from foveate.method import whole, within

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class PatchDiscriminator(nn.Sequential):
    """(B, 3, H, W) -> (B, 1, h, w) logits of being real, one for each overlapping patch (PatchGAN, 1611.07004).

    4 x 4 convolutions, `stages` of them with stride 2, with group norm, so that pictures of a batch do not mix.
    """

    def __init__(self, width: int = 128, stages: int = 3) -> None:
        whole("width", width, 1)
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for stage in range(1, whole("stages", stages, 1) + 1):
            before, after = (width * 2 ** min(k, 3) for k in (stage - 1, stage))
            layers += [nn.Conv2d(before, after, 4, 2 if stage < stages else 1, 1, bias=False)]
            layers += [nn.GroupNorm(1, after), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(after, 1, 4, 1, 1))


class Adversarial(nn.Module):
    """Hinge losses of a discriminator D and of whoever makes pictures, with LeCam regularisation (2104.03310).

    `discriminator = mean(relu(1 - D(real)) + relu(1 + D(made))) / 2 + lecam (relu(r - f_ema)^2 + relu(r_ema - f)^2)`
    with r and f the batch's mean logits and r_ema, f_ema their moving averages; `generator = -mean D(made)`.
    """

    real: Tensor
    made: Tensor

    def __init__(self, discriminator: nn.Module, *, lecam: float = 0.001, decay: float = 0.999) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.lecam, self.decay = within("lecam", lecam, "[0, inf)"), within("decay", decay, "[0, 1)")
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("made", torch.zeros(()))

    def forward(self, made: Tensor, real: Tensor) -> dict[str, Tensor]:
        """ "generator" and "discriminator", scalars, and "real" and "made", the batch's mean logits."""
        frozen = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        generator = -functional_call(self.discriminator, frozen, (made,)).mean()
        of_real, of_made = self.discriminator(real), self.discriminator(made.detach())
        loss = (F.relu(1 - of_real).mean() + F.relu(1 + of_made).mean()) / 2
        r, f = of_real.mean(), of_made.mean()
        loss = loss + self.lecam * (F.relu(r - self.made).square() + F.relu(self.real - f).square())
        if self.training:
            self.real.lerp_(r.detach(), 1 - self.decay)
            self.made.lerp_(f.detach(), 1 - self.decay)
        return {"generator": generator, "discriminator": loss, "real": r.detach(), "made": f.detach()}


class LogitDistance(nn.Module):
    """Mean square difference of a frozen network's logits of two pictures (B, 3, H, W) in [0, 1].

    Args:
        network: pictures to logits (B, classes); TiTok's is torchvision's `convnext_small` with its ImageNet weights.
        size: side in px that pictures are resized to for it.
        mean, std: of its normalisation, for each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, *, size: int = 224, mean: Sequence[float] = _IMAGENET[0],
        std: Sequence[float] = _IMAGENET[1],
    ) -> None:  # fmt: skip
        super().__init__()
        self.network, self.size = network.eval().requires_grad_(False), whole("size", size, 1)
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> LogitDistance:
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        return F.mse_loss(self._logits(made), self._logits(real))

    def _logits(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        logits: Tensor = self.network((x - self.mean) / self.std)
        return logits
