"""One-D-Piece: prefixes, the draw of the tail drop, and that with all latents it is TiTok."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("timm")

from foveate.method import InputError
from foveate.methods.tokenize.one_d_piece import CONFIGURATIONS, GENERATORS, SAMPLING, OneDPiece
from foveate.methods.tokenize.titok import PixelObjective, TiTok
from foveate.nn.adversarial import PatchDiscriminator
from foveate.nn.maskgit import Sampling

LATENTS = 256
SMALL: dict[str, Any] = {
    "image": 8, "patch": 2, "encoder": (16, 1, 2), "decoder": (16, 2, 2), "codes": 32, "channels": 4, "pixel_codes": 10,
    "pixel_channels": 8, "pixel_width": 8, "pixel_multipliers": (1, 2),
}  # fmt: skip


def small(**changes: Any) -> OneDPiece:
    torch.manual_seed(0)
    return OneDPiece(**(SMALL | changes)).eval()


def pictures(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_prefixes() -> None:
    model = small()
    z, codes = model.latents_of(pictures()).z, model.encode(pictures())
    assert codes.ids.shape == (2, LATENTS)
    # The first latents' positions, cut here by hand, whatever comes after them.
    for k in (1, 7, 256):
        prefix = model.decode_tokens(codes.ids[:, :k])
        torch.testing.assert_close(model.decode_latents(z[:, :k]), prefix, atol=1e-5, rtol=0)
        assert torch.equal(model.decode(codes, tokens=k), prefix.clamp(0, 1))
        assert torch.equal(model.decode(codes.first(k)), prefix.clamp(0, 1))
        other = codes.ids.clone()
        other[:, k:] = (other[:, k:] + 1) % 32
        assert torch.equal(model.decode_tokens(other[:, :k]), prefix)
        if k < 256:
            assert not torch.allclose(model.decode_tokens(codes.ids[:, : k + 1]), prefix, atol=1e-6)
    for wrong in (0, 257):
        with pytest.raises(InputError, match=r"tokens must be"):
            model.decode(codes, tokens=wrong)
    for count in (0, 257):
        with pytest.raises(InputError, match=r"1\.\.256"):
            model.decode_latents(torch.zeros(1, count, 4))


@torch.no_grad()
def test_positions_do_not_depend_on_the_length() -> None:
    model, seen = small(), list[Tensor]()
    model.decoder.norm_pre.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    z = torch.randn(1, 256, 4, generator=torch.Generator().manual_seed(2))
    for k in (3, 50, 256):
        model.decode_latents(z[:, :k])
    assert [x.shape[1] for x in seen] == [1 + 16 + k for k in (3, 50, 256)]
    for x in seen:
        torch.testing.assert_close(x[:, 17:20], seen[2][:, 17:20])
        torch.testing.assert_close(x[:, :17], seen[2][:, :17])


@torch.no_grad()
def test_with_all_latents_it_is_titok() -> None:
    model = small()
    plain = TiTok(**SMALL, latents=256).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.encode(pictures()).ids, model.encode(pictures()).ids)
    assert torch.equal(plain(pictures())[0], model(pictures())[0])
    assert torch.equal(plain.decode(plain.encode(pictures())), model.decode(model.encode(pictures())))


def test_the_draw() -> None:
    """One length for a batch, uniform in 1..8; none in evaluation, none without tail drop."""
    model = small(latents=8).train()
    z = torch.randn(3, 8, 4)
    torch.manual_seed(0)
    lengths = []
    for _ in range(4000):
        kept = model.kept(z)
        lengths.append(kept.shape[1])
        assert torch.equal(kept, z[:, : kept.shape[1]])
    counts = torch.bincount(torch.tensor(lengths), minlength=9).double()
    assert counts[0] == 0 and len(counts) == 9
    assert float(((counts[1:] - 500) ** 2 / 500).sum()) < 24.3, "chi-square, 7 degrees of freedom, p = 0.001"
    assert model.eval().kept(z) is z
    assert small(latents=8, tail_drop=False).train().kept(z).shape[1] == 8


def test_both_stages_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(latents=8).train()
    lengths = list[int]()
    model.decoder.norm_pre.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1] - 17))
    target = torch.zeros(2, 16, dtype=torch.long)
    quantiser = set()
    for _ in range(20):
        loss, parts, _ = model.code_loss(pictures(), target)
        quantiser.add(float(parts["quantiser"].detach()))
    assert len(quantiser) == 1, "the quantiser's loss is that of all latents"
    assert len(set(lengths)) > 3 and set(lengths) <= set(range(1, 9))
    loss.backward()
    assert model.encoder.out.weight.grad is not None
    model.zero_grad()
    lengths.clear()
    objective = PixelObjective(model, discriminator=PatchDiscriminator(4, 1))
    for _ in range(20):
        loss, _, _ = objective(pictures(), 0)
    assert len(set(lengths)) > 3
    loss.backward()
    for part in (model.encoder, model.quantizer):
        assert part is not None and all(weight.grad is None for weight in part.parameters())
    assert model.latents.grad is None and model.decoder.mask_token.grad is not None
    lengths.clear()
    objective.eval()(pictures(), 0)
    assert lengths == [8]


@torch.no_grad()
def test_contributions() -> None:
    model = small(latents=5)
    codes = model.encode(pictures())
    maps = model.contributions(codes, seed=3)
    assert maps.shape == (2, 5, 8, 8)
    others = torch.randint(32, (2, 5), generator=torch.Generator().manual_seed(3))
    for b in range(2):
        for i in range(5):
            ids = codes.ids[b].clone()
            ids[i] = others[b, i]
            change = model.decode_tokens(ids[None]).clamp(0, 1)[0] - model.decode(codes)[b]
            torch.testing.assert_close(maps[b, i], change.abs().sum(0), atol=1e-5, rtol=0)


@torch.no_grad()
def test_round_trip(tmp_path: Path) -> None:
    model = small(latents=6, tail_drop=False)
    model.save_pretrained(tmp_path)
    again = OneDPiece.from_pretrained(tmp_path, strict=True).eval()
    assert again.tokens == 6 and not again.tail_drop
    assert torch.equal(again.decode(again.encode(pictures()), 4), model.decode(model.encode(pictures()), 4))


def test_arguments() -> None:
    assert OneDPiece.named("tiny").tokens == GENERATORS["tiny"]["tokens"] == 64
    for name in CONFIGURATIONS:
        with torch.device("meta"):
            made = OneDPiece.named(name)
        assert made.any_length and made.legacy_layout == (name != "tiny")
    assert SAMPLING["l-256"] == Sampling(16, 3.0, 5.5, "power-cosine", 3.0, False)
    for bad in ({"tail_drop": 1}, {"latents": 0}, {"codes": 1}):
        with pytest.raises(InputError, match=next(iter(bad))):
            small(**bad)
    with pytest.raises(InputError, match="no configuration"):
        OneDPiece.named("l-32")
    with pytest.raises(InputError, match="seed"):
        small().contributions(small().encode(pictures()), seed=-1)
