"""The vector quantiser and the VQGAN, against loops and torch's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foveate.method import InputError
from foveate.nn.codes import Codes
from foveate.nn.vqgan import VectorQuantizer, Vqgan


@pytest.mark.parametrize("normalised", [True, False])
def test_the_nearest_code_its_loss_and_gradients(normalised: bool) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(20, 3, normalised=normalised, commitment=0.25)
    assert float(quantizer.embedding.weight.detach().abs().max()) <= 1 / 20
    nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(2, 5, 3, requires_grad=True)
    made = quantizer(z)
    codes, given = quantizer.embedding.weight.detach(), z.detach()
    if normalised:
        codes, given = codes / codes.norm(dim=1, keepdim=True), given / given.norm(dim=2, keepdim=True)
        torch.testing.assert_close(made.z.detach().norm(dim=2), torch.ones(2, 5))
    total = 0.0
    for b in range(2):
        for n in range(5):
            apart = [float((given[b, n] - code).square().sum()) for code in codes]
            nearest = apart.index(min(apart))
            assert int(made.ids[b, n]) == nearest
            torch.testing.assert_close(made.z[b, n].detach(), codes[nearest])
            torch.testing.assert_close(quantizer.look_up(made.ids)[b, n].detach(), codes[nearest])
            total += min(apart)
    assert float(made.loss.detach()) == pytest.approx(1.25 * total / 30, rel=1e-5)
    # Straight through: what is asked of the codes is asked of the (normalised) latents.
    weight = torch.randn(2, 5, 3)
    (made.z * weight).sum().backward()
    again = z.detach().requires_grad_()
    ((F.normalize(again, dim=2) if normalised else again) * weight).sum().backward()
    torch.testing.assert_close(z.grad, again.grad)
    assert quantizer.embedding.weight.grad is None or not quantizer.embedding.weight.grad.any()
    quantizer(z).loss.backward()
    assert quantizer.embedding.weight.grad is not None and quantizer.embedding.weight.grad.any()
    quantizer.bypass = True
    passed = quantizer(z)
    assert torch.equal(passed.ids, made.ids) and not passed.loss.any()
    torch.testing.assert_close(passed.z.detach(), given)


def test_float32_under_autocast() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(64, 8, normalised=True)
    z = torch.randn(3, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        low = quantizer(z)
    assert low.z.dtype == torch.float32 and torch.equal(low.z, quantizer(z).z)


def test_what_a_block_skips() -> None:
    """Where the number of channels changes, the skip is a convolution of what the second convolution made."""
    torch.manual_seed(0)
    vqgan = Vqgan(width=8, multipliers=(1, 2), codes=16, channels=4)
    block = next(m for m in vqgan.decoder.modules() if getattr(m, "shortcut", None) is not None)
    x = torch.randn(1, block.norm1.num_channels, 5, 6)  # type: ignore[union-attr]
    made = x
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        groups = norm.num_groups  # type: ignore[union-attr]
        made = F.group_norm(made, groups, norm.weight, norm.bias, 1e-6)  # type: ignore[union-attr,arg-type]
        made = F.conv2d(made * torch.sigmoid(made), conv.weight, padding=1)  # type: ignore[union-attr,arg-type]
    mixed = torch.einsum("oi,bihw->bohw", block.shortcut.weight[:, :, 0, 0], made)  # type: ignore[union-attr,index]
    torch.testing.assert_close(block(x), made + mixed)


def test_pictures_to_codes_and_back() -> None:
    torch.manual_seed(0)
    vqgan = Vqgan(width=8, multipliers=(1, 1, 2), codes=16, channels=4).eval()
    pixels = torch.rand(2, 3, 16, 24)
    codes = vqgan.encode(pixels)
    assert codes.grid == (4, 6) and codes.size == (16, 24) and codes.bits == 24 * 4
    made, quantised = vqgan(pixels)
    torch.testing.assert_close(vqgan.decode(codes), made.clamp(0, 1), atol=1e-4, rtol=0)
    assert torch.equal(quantised.ids.flatten(1), codes.ids) and made.shape == pixels.shape
    (made.square().mean() + quantised.loss).backward()
    assert all(weight.grad is not None for weight in vqgan.parameters())
    with pytest.raises(InputError, match="multiples of 4"):
        vqgan.encode(torch.rand(1, 3, 18, 16))
    with pytest.raises(InputError, match="no codes of this VQGAN"):
        vqgan.decode(Codes(codes.ids, 17, codes.size, codes.grid))
    for wrong in ({"width": 0}, {"multipliers": (1, 0)}, {"codes": 1}, {"commitment": -1.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Vqgan(**wrong)  # type: ignore[arg-type]
