"""TiTok against a forward written here with the names of the release's weights, its bottleneck, losses and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("timm")

from foveate.method import InputError
from foveate.methods.tokenize.titok import CONFIGURATIONS, GENERATORS, SAMPLING, PixelObjective, TiTok
from foveate.nn.adversarial import PatchDiscriminator
from foveate.nn.codes import Codes
from foveate.nn.maskgit import MaskedGenerator, schedule
from foveate.nn.vqgan import Vqgan

WIDTH, HEADS, LAYERS, LATENTS = 16, 2, 2, 6
SMALL: dict[str, Any] = {
    "image": 16, "patch": 4, "latents": LATENTS, "encoder": (WIDTH, LAYERS, HEADS), "decoder": (WIDTH, LAYERS, HEADS),
    "codes": 32, "channels": 4, "pixel_codes": 10, "pixel_channels": 8, "pixel_width": 8,
    "pixel_multipliers": (1, 1, 2),
}  # fmt: skip
PIXELS: dict[str, Any] = {"head": "pixels", "legacy_layout": False}
VAE: dict[str, Any] = {**PIXELS, "quantiser": "vae"}


def late() -> dict[str, Any]:
    """Of an objective whose discriminator fits small pictures and waits."""
    return {"adversarial_from": 9, "discriminator": PatchDiscriminator(4, 1)}


def small(**changes: Any) -> TiTok:
    torch.manual_seed(0)
    return TiTok(**(SMALL | changes)).eval()


def pictures(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def release(*, in_pixels: bool = False) -> dict[str, Tensor]:
    """Random weights under the release's names, in its shapes."""
    w, random = WIDTH, torch.Generator().manual_seed(7)
    shapes: dict[str, tuple[int, ...]] = {"latent_tokens": (LATENTS, w), "quantize.embedding.weight": (32, 4)}
    for side in ("encoder", "decoder"):
        shapes |= {f"{side}.class_embedding": (1, w), f"{side}.positional_embedding": (17, w)}
        shapes |= {f"{side}.latent_token_positional_embedding": (LATENTS, w)}
        for layer in range(LAYERS):
            at = f"{side}.transformer.{layer}"
            shapes |= {f"{at}.{norm}.{kind}": (w,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
            shapes |= {f"{at}.attn.in_proj_weight": (3 * w, w), f"{at}.attn.in_proj_bias": (3 * w,)}
            shapes |= {f"{at}.attn.out_proj.weight": (w, w), f"{at}.attn.out_proj.bias": (w,)}
            shapes |= {f"{at}.mlp.c_fc.weight": (4 * w, w), f"{at}.mlp.c_fc.bias": (4 * w,)}
            shapes |= {f"{at}.mlp.c_proj.weight": (w, 4 * w), f"{at}.mlp.c_proj.bias": (w,)}
        shapes |= {f"{side}.{norm}.{kind}": (w,) for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    shapes |= {"encoder.patch_embed.weight": (w, 3, 4, 4), "encoder.patch_embed.bias": (w,)}
    shapes |= {"encoder.conv_out.weight": (4, w, 1, 1), "encoder.conv_out.bias": (4,)}
    shapes |= {"decoder.decoder_embed.weight": (w, 4), "decoder.decoder_embed.bias": (w,)}
    shapes |= {"decoder.mask_token": (1, 1, w)}
    if in_pixels:
        shapes |= {"decoder.ffn.0.weight": (48, w, 1, 1), "decoder.ffn.0.bias": (48,)}
        shapes |= {"decoder.conv_out.weight": (3, 3, 3, 3), "decoder.conv_out.bias": (3,)}
    else:
        shapes |= {"decoder.ffn.0.weight": (2 * w, w, 1, 1), "decoder.ffn.0.bias": (2 * w,)}
        shapes |= {"decoder.ffn.2.weight": (10, 2 * w, 1, 1), "decoder.ffn.2.bias": (10,)}
        shapes |= {"pixel_quantize.embedding.weight": (10, 8)}
        at = "pixel_decoder"
        shapes |= {f"{at}.conv_in.weight": (16, 8, 3, 3), f"{at}.conv_in.bias": (16,)}
        blocks = [(f"{at}.mid.{k}", 16, 16) for k in range(2)]
        for level, before, after in ((2, 16, 16), (1, 16, 8), (0, 8, 8)):
            blocks += [(f"{at}.up.{level}.block.0", before, after), (f"{at}.up.{level}.block.1", after, after)]
            if level:
                shapes |= {f"{at}.up.{level}.upsample_conv.weight": (after, after, 3, 3)}
                shapes |= {f"{at}.up.{level}.upsample_conv.bias": (after,)}
        for name, before, after in blocks:
            shapes |= {f"{name}.norm1.weight": (before,), f"{name}.norm1.bias": (before,)}
            shapes |= {f"{name}.norm2.weight": (after,), f"{name}.norm2.bias": (after,)}
            shapes |= {f"{name}.conv1.weight": (after, before, 3, 3), f"{name}.conv2.weight": (after, after, 3, 3)}
            if before != after:
                shapes |= {f"{name}.nin_shortcut.weight": (after, after, 1, 1)}
        shapes |= {f"{at}.norm_out.weight": (8,), f"{at}.norm_out.bias": (8,)}
        shapes |= {f"{at}.conv_out.weight": (3, 8, 3, 3), f"{at}.conv_out.bias": (3,)}
    return {name: torch.randn(shape, generator=random) * 0.3 for name, shape in shapes.items()}


class Reference:
    """TiTok with torch's own attention and convolutions, on channels first, as the paper's card has it."""

    def __init__(self, state: dict[str, Tensor], legacy_layout: bool) -> None:
        self.state, self.legacy_layout = state, legacy_layout

    def norm(self, x: Tensor, at: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{at}.weight"], self.state[f"{at}.bias"])

    def linear(self, x: Tensor, at: str) -> Tensor:
        return F.linear(x, self.state[f"{at}.weight"], self.state[f"{at}.bias"])

    def conv(self, x: Tensor, at: str, **options: Any) -> Tensor:
        return F.conv2d(x, self.state[f"{at}.weight"], self.state.get(f"{at}.bias"), **options)

    def transformer(self, x: Tensor, side: str) -> Tensor:
        x = self.norm(x, f"{side}.ln_pre")
        for layer in range(LAYERS):
            at = f"{side}.transformer.{layer}"
            attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
            attention.load_state_dict(
                {
                    name.removeprefix(f"{at}.attn."): v
                    for name, v in self.state.items()
                    if name.startswith(f"{at}.attn.")
                }
            )
            h = self.norm(x, f"{at}.ln_1")
            x = x + attention(h, h, h, need_weights=False)[0]
            h = F.gelu(self.linear(self.norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc"))
            x = x + self.linear(h, f"{at}.mlp.c_proj")
        return x

    def sequence(self, places: Tensor, latents: Tensor, side: str) -> Tensor:
        batch = len(places)
        cls_token = self.state[f"{side}.class_embedding"].expand(batch, 1, -1)
        places = torch.cat([cls_token, places], 1) + self.state[f"{side}.positional_embedding"]
        count = latents.shape[1]
        latents = latents + self.state[f"{side}.latent_token_positional_embedding"][:count]
        return torch.cat([places, latents], 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, C, 1, K), not quantised."""
        patches = self.conv(pixels, "encoder.patch_embed", stride=4).flatten(2).mT
        latents = self.state["latent_tokens"].expand(len(pixels), -1, -1)
        x = self.norm(
            self.transformer(self.sequence(patches, latents, "encoder"), "encoder")[:, 17:], "encoder.ln_post"
        )
        if self.legacy_layout:
            x = x.reshape(len(x), WIDTH, LATENTS, 1)
        else:
            x = x.permute(0, 2, 1).unsqueeze(3)
        return self.conv(x, "encoder.conv_out").permute(0, 1, 3, 2)

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = F.normalize(z, dim=1)
        codes = F.normalize(self.state["quantize.embedding.weight"], dim=1)
        ids = torch.cdist(z[:, :, 0].mT, codes.expand(len(z), -1, -1)).argmin(2)
        return ids, codes[ids].mT.unsqueeze(2)

    def decode(self, z: Tensor) -> Tensor:
        """Logits (B, 10, 4, 4), or pictures."""
        latents = self.linear(z[:, :, 0].mT, "decoder.decoder_embed")
        masks = self.state["decoder.mask_token"].expand(len(z), 16, -1)
        x = self.transformer(self.sequence(masks, latents, "decoder"), "decoder")[:, 1:17]
        x = self.norm(x, "decoder.ln_post").mT.unflatten(2, (4, 4))
        x = self.conv(x, "decoder.ffn.0")
        if "decoder.ffn.2.weight" in self.state:
            return self.conv(torch.tanh(x), "decoder.ffn.2")
        whole = torch.zeros(len(x), 3, 16, 16)
        for channel in range(48):
            row, column, colour = channel // 12, channel // 3 % 4, channel % 3
            whole[:, colour, row::4, column::4] = x[:, channel]
        return self.conv(whole, "decoder.conv_out", padding=1)

    def resnet(self, x: Tensor, at: str) -> Tensor:
        given = x
        for k in (1, 2):
            weight, bias = self.state[f"{at}.norm{k}.weight"], self.state[f"{at}.norm{k}.bias"]
            x = F.silu(F.group_norm(x, x.shape[1] // 4, weight, bias, 1e-6))
            x = self.conv(x, f"{at}.conv{k}", padding=1)
        shortcut = f"{at}.nin_shortcut"
        return x + (self.conv(x, shortcut) if f"{shortcut}.weight" in self.state else given)

    def pixels(self, logits: Tensor) -> Tensor:
        soft = torch.einsum("bkhw,kc->bchw", logits.softmax(1), self.state["pixel_quantize.embedding.weight"])
        at = "pixel_decoder"
        x = self.conv(soft, f"{at}.conv_in", padding=1)
        names = [f"{at}.mid.{k}" for k in range(2)]
        for level in (2, 1, 0):
            for name in [*names, *(f"{at}.up.{level}.block.{k}" for k in range(2))]:
                x = self.resnet(x, name)
            names = []
            if level:
                x = self.conv(F.interpolate(x, scale_factor=2.0), f"{at}.up.{level}.upsample_conv", padding=1)
        weight, bias = self.state[f"{at}.norm_out.weight"], self.state[f"{at}.norm_out.bias"]
        x = F.silu(F.group_norm(x, 2, weight, bias, 1e-6))
        return self.conv(x, f"{at}.conv_out", padding=1)


# -- the forward


@pytest.mark.parametrize("legacy_layout", [True, False])
@torch.no_grad()
def test_against_a_reference(legacy_layout: bool) -> None:
    state = release()
    ours, theirs = small(legacy_layout=legacy_layout).load_release(state), Reference(state, legacy_layout)
    z = theirs.encode(pictures())
    ids, quantised = theirs.quantise(z)
    latents = ours.latents_of(pictures())
    assert latents.ids is not None and torch.equal(latents.ids, ids)
    torch.testing.assert_close(latents.z.mT.unsqueeze(2), quantised, atol=1e-5, rtol=0)
    unit = F.normalize(z, dim=1)
    assert float(latents.loss) == pytest.approx(1.25 * float((unit - quantised).square().mean()), rel=1e-4)
    logits = theirs.decode(quantised)
    torch.testing.assert_close(ours.decoded(latents.z), logits.flatten(2).mT, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.decode_tokens(ids), theirs.pixels(logits), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_head_of_pixels_against_a_reference() -> None:
    state = release(in_pixels=True)
    ours, theirs = small(**PIXELS).load_release(state), Reference(state, False)
    ids, quantised = theirs.quantise(theirs.encode(pictures()))
    torch.testing.assert_close(ours.decode_tokens(ids), theirs.decode(quantised), atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.encode(pictures()).ids, ids)


def test_weights_that_do_not_fit() -> None:
    state = release()
    for wrong in (
        {name: value for name, value in state.items() if name != "decoder.mask_token"},
        state | {"more": torch.zeros(1)},
        state | {"quantize.embedding.weight": torch.zeros(33, 4)},
    ):
        with pytest.raises(InputError, match="no weights of this tokenizer"):
            small().load_release(wrong)


@pytest.mark.parametrize("changes", [{}, {"legacy_layout": False}, PIXELS, {"normalised": False}])
@torch.no_grad()
def test_codes(changes: dict[str, Any]) -> None:
    model = small(**changes)
    for batch in (1, 3):
        codes = model.encode(pictures(batch))
        assert codes.ids.shape == (batch, LATENTS) and codes.codebook_size == 32 and codes.grid == (LATENTS,)
        assert codes.bits == 5 * LATENTS and codes.size == (16, 16)
    latents = model.latents_of(pictures(3))
    if changes.get("normalised", True):
        torch.testing.assert_close(latents.z.norm(dim=2), torch.ones(3, LATENTS))
    made = model(pictures(3))[0]
    torch.testing.assert_close(model.decode_tokens(codes.ids), made, atol=1e-5, rtol=0)
    decoded = model.decode(codes)
    assert decoded.shape == (3, 3, 16, 16) and torch.equal(decoded, model.decode_tokens(codes.ids).clamp(0, 1))
    torch.testing.assert_close(model.encode(pictures(3)[1:2]).ids, codes.ids[1:2])


@torch.no_grad()
def test_only_latents_carry_information() -> None:
    model = small()
    before = model(pictures())[0]

    def scramble(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        return torch.cat([torch.randn_like(out[:, :17]), out[:, 17:]], 1)

    hook = model.encoder.blocks[-1].register_forward_hook(scramble)
    assert torch.equal(model(pictures())[0], before), "class token and patches are not read"
    hook.remove()
    with torch.enable_grad():
        pixels = pictures().requires_grad_()
        z = model.latents_of(pixels).z
        assert not model.decode_latents(z.detach().requires_grad_()).isnan().any()
        assert torch.autograd.grad(model(pixels)[0].sum(), pixels)[0].any(), "and through them, pictures are reached"


@torch.no_grad()
def test_positions_of_latents_matter() -> None:
    model = small().load_release(release())
    ids = torch.arange(LATENTS).unsqueeze(0)
    assert not torch.allclose(model.decode_tokens(ids), model.decode_tokens(ids.flip(1)), atol=1e-4)


@torch.no_grad()
def test_layouts_differ_and_each_goes_round(tmp_path: Path) -> None:
    old, new = small(), small(legacy_layout=False)
    new.load_state_dict(old.state_dict())
    assert not torch.equal(old.encode(pictures()).ids, new.encode(pictures()).ids)
    for model in (old, new):
        folder = tmp_path / str(model.legacy_layout)
        model.save_pretrained(folder)
        again = TiTok.from_pretrained(folder, strict=True).eval()
        assert torch.equal(again.encode(pictures()).ids, model.encode(pictures()).ids)
        assert torch.equal(again(pictures())[0], model(pictures())[0])


def test_configurations() -> None:
    """What the counted claims do not say."""
    for name in CONFIGURATIONS:
        with torch.device("meta"):
            model = TiTok.named(name)
        assert model.legacy_layout == (name in ("l-32", "b-64", "s-128"))
        assert (model.pixel_decoder is None) == name.endswith(("vq", "vae"))
        assert (model.quantizer is None) == name.endswith("vae")
    with torch.device("meta"):
        sl = TiTok.named("sl-256-vq")
    assert (sl.tokens, sl.codes, sl.channels) == (256, 8192, 64) and not sl.quantizer.normalised  # type: ignore[union-attr]
    assert sl.encoder.cls_token.shape == (1, 512) and sl.decoder.cls_token.shape == (1, 1024)
    for name, sampling in SAMPLING.items():
        made = MaskedGenerator(**(GENERATORS[name] | {"width": 16, "layers": 2, "heads": 2}))
        assert made.tokens == CONFIGURATIONS[name].get("latents", 32) and schedule(made.tokens, sampling.steps)[-1] == 0
    assert [(s.steps, s.temperature, s.guidance_scale, s.guidance) for s in SAMPLING.values()] == [
        (8, 9.5, 4.5, "linear"), (8, 11.0, 3.0, "linear"), (64, 2.8, 6.9, "power-cosine"),
    ]  # fmt: skip
    with pytest.raises(InputError, match="no configuration"):
        TiTok.named("l-33")


# -- continuous latents


def test_vae() -> None:
    model = small(**VAE)
    with torch.no_grad():
        z = model.encoder(pictures(), model.latents)
        mean, log_variance = z[..., :4], z[..., 4:]
        latents = model.latents_of(pictures())
    assert torch.equal(latents.z, mean) and latents.ids is None
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    assert float(latents.loss) == pytest.approx(float(kl.sum() / 2), rel=1e-4)
    model.train()
    with torch.no_grad():
        draws = torch.stack([model.latents_of(pictures()).z for _ in range(400)])
    torch.testing.assert_close(draws.std(0), normal.stddev, atol=0.2, rtol=0.2)
    torch.testing.assert_close(draws.mean(0), mean, atol=0.25, rtol=0)
    for call in (lambda: model.encode(pictures()), lambda: model.decode_tokens(torch.zeros(1, 6, dtype=torch.long))):
        with pytest.raises(InputError, match="continuous latents"):
            call()
    loss, parts, _ = PixelObjective(model, one_stage=True, kl_weight=0.5, **late())(pictures(), 0)
    assert float(loss.detach()) == pytest.approx(float((parts["l2"] + 0.5 * parts["latents"]).detach()), rel=1e-5)


# -- training


def test_stage_one() -> None:
    model = small().train()
    vqgan = Vqgan(width=8, multipliers=(1, 1, 2), codes=10, channels=8)
    target = vqgan.encode(pictures()).ids
    loss, parts, latents = model.code_loss(pictures(), target)
    with torch.no_grad():
        log_p = model.decoded(model.latents_of(pictures()).z).log_softmax(2)
    wanted = -sum(float(log_p[b, n, target[b, n]]) for b in range(2) for n in range(16)) / 32
    assert float(parts["codes"].detach()) == pytest.approx(wanted, rel=1e-5)
    assert float(loss.detach()) == pytest.approx(wanted + float(latents.loss.detach()), rel=1e-5)
    loss.backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is None) == name.startswith("pixel_"), name
    model.take_pixel_decoder(vqgan)
    assert torch.equal(model.pixel_codebook.weight, vqgan.quantizer.embedding.weight)  # type: ignore[union-attr]

    # One-hot logits, through soft codes, are the VQGAN's own decoding.
    class Says(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return 1e4 * F.one_hot(target, 10).float()

    model.decoder = Says()  # type: ignore[assignment]
    made = model.decode_latents(torch.zeros(2, LATENTS, 4))
    torch.testing.assert_close(made.clamp(0, 1), vqgan.decode(vqgan.encode(pictures())), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="other sizes"):
        small().take_pixel_decoder(Vqgan(width=8, multipliers=(1, 1, 2), codes=11, channels=8))
    for call in (lambda m: m.code_loss(pictures(), target), lambda m: m.take_pixel_decoder(vqgan)):
        with pytest.raises(InputError, match="pixel"):
            call(small(**PIXELS))


def test_stage_two() -> None:
    class Halves(nn.Module):
        def forward(self, made: Tensor, real: Tensor) -> Tensor:
            return (made - real).abs().mean((1, 2, 3)) / 2

    objective = PixelObjective(
        small().train(), perceptual=Halves(), adversarial_from=5, discriminator=PatchDiscriminator(4, 1)
    )
    losses = {}
    for step in (4, 5):
        objective.adversarial.real.zero_(), objective.adversarial.made.zero_()
        losses[step], parts, _ = objective(pictures(), step)
    with torch.no_grad():
        made = objective.tokenizer(pictures())[0]
    error = made - pictures()
    plain = float(error.square().mean()) + 0.1 * float(error.abs().mean()) / 2
    gan = 0.01 * float(parts["generator"].detach()) + float(parts["discriminator"].detach())
    assert float(losses[4].detach()) == pytest.approx(plain, rel=1e-5)
    assert float(losses[5].detach()) == pytest.approx(plain + gan, rel=1e-5)
    losses[5].backward()
    for name, weight in objective.named_parameters():
        frozen = name.startswith(("tokenizer.encoder", "tokenizer.latents", "tokenizer.quantizer"))
        assert (weight.grad is None) == frozen and weight.requires_grad != frozen, name


def test_one_stage() -> None:
    objective = PixelObjective(small(**PIXELS).train(), one_stage=True, **late())
    loss, parts, latents = objective(pictures(), 0)
    assert float(loss.detach()) == pytest.approx(float((parts["l2"] + latents.loss).detach()), rel=1e-5)
    loss.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in objective.tokenizer.parameters())


# -- what is refused


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"image": 18}, "multiple of patch"), ({"patch": 0}, "patch"), ({"latents": 0}, "latents"),
        ({"encoder": "huge"}, "encoder must be"), ({"decoder": (16, 2)}, "decoder must be"),
        ({"encoder": (15, 2, 2)}, "multiple of the heads"), ({"quantiser": "ae"}, "quantiser"), ({"codes": 1}, "codes"),
        ({"channels": 0}, "channels"), ({"normalised": 1}, "normalised"), ({"commitment": -1.0}, "commitment"),
        ({"head": "rgb"}, "head"), ({"pixel_codes": 1}, "pixel_codes"), 
        ({"pixel_multipliers": (1, 2)}, "patches of 4 px"),
        ({"pixel_channels": 0}, "pixel_channels"), ({"pixel_width": 0}, "pixel_width"),
        ({"legacy_layout": None}, "legacy_layout"),
    ],
)  # fmt: skip
def test_bad_arguments(bad: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        small(**bad)


def test_bad_input() -> None:
    model = small()
    for wrong in (torch.rand(1, 3, 16, 20), torch.rand(3, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)):
        with pytest.raises(InputError, match="resize them to 16 px"):
            model.encode(wrong)
    for wrong in (pictures() * 2 - 1, 255 * pictures(), pictures() * float("nan")):
        with pytest.raises(InputError, match=r"must be in 0\.\.1"):
            model.encode(wrong)
    codes = model.encode(pictures())
    for other in (
        Codes(codes.ids, 33, codes.size, codes.grid), Codes(codes.ids, 32, (16, 17), codes.grid),
        Codes(codes.ids, 32, codes.size, (2, 3)),
    ):  # fmt: skip
        with pytest.raises(InputError, match="no codes of this tokenizer"):
            model.decode(other)
    with pytest.raises(InputError, match="titok decodes all 6 latents, not 5"):
        model.decode(codes, tokens=5)
    with pytest.raises(InputError, match="latents must be"):
        model.decode_latents(torch.zeros(1, 7, 4))
    for bad in (
        {"perceptual_weight": -1.0},
        {"adversarial_weight": -1.0},
        {"adversarial_from": -1},
        {"kl_weight": -1.0},
    ):
        with pytest.raises(InputError, match=next(iter(bad))):
            PixelObjective(small(**VAE), one_stage=True, **bad)  # type: ignore[arg-type]
