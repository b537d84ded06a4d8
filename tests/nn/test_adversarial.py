"""The GAN's losses against their formulas, whose weights get which gradients, and the distance of logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.method import InputError
from foveate.nn.adversarial import Adversarial, LogitDistance, PatchDiscriminator


class Scaled(nn.Module):
    """Logits that are the mean of each picture times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x.mean((1, 2, 3))


def pictures(*means: float) -> Tensor:
    return torch.tensor(means).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()


def test_losses() -> None:
    losses = Adversarial(Scaled(), lecam=0.5, decay=0.9)
    real, made = pictures(0.2, 0.6), pictures(-0.1, 0.5).requires_grad_()
    first, second = losses(made, real), losses(made, real)
    # Logits are 0.6 and 1.8, -0.3 and 1.5.
    hinge = ((0.4 + 0.0) / 2 + (0.7 + 2.5) / 2) / 2
    first, second = ({name: float(one.detach()) for name, one in parts.items()} for parts in (first, second))
    assert first["generator"] == pytest.approx(-0.6, rel=1e-5)
    assert first["discriminator"] == pytest.approx(hinge + 0.5 * 1.2**2, rel=1e-5)
    # A tenth of the means, 1.2 and 0.6, is remembered.
    lecam = max(0, 1.2 - 0.06) ** 2 + max(0, 0.12 - 0.6) ** 2
    assert second["discriminator"] == pytest.approx(hinge + 0.5 * lecam, rel=1e-5)
    assert float(losses.real) == pytest.approx(0.12 * 0.9 + 0.12) and float(losses.made) == pytest.approx(0.114)
    losses.eval()(made, real)
    assert float(losses.real) == pytest.approx(0.228), "evaluation remembers nothing"


def test_each_loss_reaches_its_own() -> None:
    losses = Adversarial(Scaled())
    made = pictures(-0.1, 0.5).requires_grad_()
    parts = losses(made, pictures(0.2, 0.6))
    parts["generator"].backward()
    assert losses.discriminator.weight.grad is None and made.grad is not None  # type: ignore[union-attr]
    torch.testing.assert_close(made.grad, torch.full_like(made, -3 / 2 / 48))
    made.grad = None
    parts["discriminator"].backward()
    assert made.grad is None and losses.discriminator.weight.grad is not None  # type: ignore[union-attr]


def test_patches() -> None:
    """70 px of a picture reach a logit of the usual three stages, and no other picture of the batch."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(4)
    x = torch.rand(2, 3, 96, 96, requires_grad=True)
    logits = discriminator(x)
    assert logits.shape == (2, 1, 10, 10)
    norms = [layer for layer in discriminator if isinstance(layer, nn.GroupNorm)]
    # Without norms, which look at the whole picture, the field is what strides and kernels give.
    plain = nn.Sequential(*(layer for layer in discriminator if layer not in norms))
    (gradient,) = torch.autograd.grad(plain(x)[0, 0, 5, 5], x)
    rows = gradient[0].abs().sum((0, 2)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == 70 and not gradient[1].any()
    assert len(PatchDiscriminator(4, 5)) == 2 + 3 * 5 + 1
    for wrong in ({"width": 0}, {"stages": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            PatchDiscriminator(**wrong)
    for bad in ({"lecam": -1.0}, {"decay": 1.0}):
        with pytest.raises(InputError, match=next(iter(bad))):
            Adversarial(Scaled(), **bad)


def test_logit_distance() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5), nn.Dropout(0.9))
    distance = LogitDistance(network, size=8, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)).train()
    made, real = torch.rand(2, 3, 8, 8, requires_grad=True), torch.rand(2, 3, 8, 8)
    found = distance(made, real)
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3)))
    layer = network[1]
    logits = [F.linear(((x - mean) / std).flatten(1), layer.weight, layer.bias) for x in (made, real)]  # type: ignore[arg-type]
    torch.testing.assert_close(found, (logits[0] - logits[1]).square().mean())
    found.backward()
    assert made.grad is not None and layer.weight.grad is None, "the network is frozen"
    assert distance(torch.rand(1, 3, 20, 30), torch.rand(1, 3, 20, 30)).ndim == 0
