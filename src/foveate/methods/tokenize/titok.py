"""TiTok: a picture as a sequence of 32 ids, which has no grid, by a ViT around a vector quantiser.

Pictures (B, 3, H, W) -> [class, N patches, K learned latents] through a ViT -> z (B, K, C) -> K ids of the nearest
codes of unit length -> [class, N mask tokens, K latents] through another ViT -> N codes of a VQGAN -> pictures; see
`TiTok`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.method import Card, Claim, InputError, Published, choice, configured, register, whole, within
from foveate.nn.adversarial import Adversarial, PatchDiscriminator
from foveate.nn.codes import Codes
from foveate.nn.maskgit import MaskedGenerator, Sampling, schedule
from foveate.nn.vit import need_timm
from foveate.nn.vqgan import VectorQuantizer, Vqgan, VqganDecoder

SIZES = {"tiny": (128, 6, 4), "small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""(width, layers, heads) of a transformer."""

_ONE_STAGE: dict[str, Any] = {"head": "pixels", "legacy_layout": False}
_VAE: dict[str, Any] = {**_ONE_STAGE, "quantiser": "vae", "channels": 16}
TINY: dict[str, Any] = {
    "image": 64, "patch": 8, "encoder": "tiny", "decoder": "tiny", "codes": 1024, "legacy_layout": False,
    "pixel_codes": 512, "pixel_channels": 8, "pixel_width": 16, "pixel_multipliers": (1, 2, 4, 4),
}  # fmt: skip
"""What this project's tiny tokenizers share."""

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "l-32": {},
    "b-64": {"encoder": "base", "decoder": "base", "latents": 64},
    "s-128": {"encoder": "small", "decoder": "small", "latents": 128},
    "bl-64-vq": {"encoder": "base", "latents": 64, **_ONE_STAGE},
    "bl-128-vq": {"encoder": "base", "latents": 128, **_ONE_STAGE},
    "sl-256-vq": {
        "encoder": "small", "latents": 256, "codes": 8192, "channels": 64, "normalised": False, **_ONE_STAGE,
    },
    "ll-32-vae": {"latents": 32, **_VAE},
    "bl-64-vae": {"encoder": "base", "latents": 64, **_VAE},
    "bl-128-vae": {"encoder": "base", "latents": 128, **_VAE},
    "tiny": TINY,
}  # fmt: skip
"""Arguments of `TiTok` by name: the paper's, whose letters are the sizes of encoder and decoder and whose number is
that of the latents, and this project's "tiny". Those of one stage have no proxy codes."""

GENERATORS: dict[str, dict[str, Any]] = {
    "l-32": {},
    "b-64": {"tokens": 64},
    "s-128": {"tokens": 128, "backbone": "uvit", "width": 1024, "layers": 20},
    "tiny": {"codes": 1024, "classes": 40, "width": 128, "layers": 6, "heads": 4},
}  # fmt: skip
"""Arguments of `foveate.nn.maskgit.MaskedGenerator` for the tokenizer of that name."""

SAMPLING = {
    "l-32": Sampling(steps=8, temperature=9.5, guidance_scale=4.5, guidance="linear"),
    "b-64": Sampling(steps=8, temperature=11.0, guidance_scale=3.0, guidance="linear"),
    "s-128": Sampling(steps=64, temperature=2.8, guidance_scale=6.9, guidance="power-cosine"),
}
"""The paper's settings for the generator of that name."""


@dataclass(frozen=True, eq=False)
class Latents:
    """What the bottleneck lets through of B pictures.

    Attributes:
        z: (B, K, C) latents as the decoder reads them.
        ids: (B, K) of the codes; None for "vae".
        loss: scalar; the quantiser's, or for "vae" the mean over pictures of KL(posterior || normal) in nats.
    """

    z: Tensor
    ids: Tensor | None
    loss: Tensor


@functools.lru_cache(maxsize=2)
def _on_meta(name: str) -> TiTok:
    with torch.device("meta"):
        return TiTok.named(name)


def _part(name: str, part: str = "") -> Callable[[], nn.Module]:
    return lambda: _on_meta(name).get_submodule(part)


def _generator(name: str) -> Callable[[], nn.Module]:
    return lambda: MaskedGenerator(**GENERATORS[name])


def _bytes(name: str) -> Callable[[Any], float]:
    def count(cls: type[TiTok]) -> float:
        made = _on_meta(name)
        return Codes(torch.zeros(1, made.tokens, dtype=torch.long), made.codes, made.size, (made.tokens,)).bytes

    return count


def _masked(tokens: int, step: int) -> Callable[[Any], float]:
    return lambda cls: schedule(tokens, SAMPLING["l-32"].steps)[step]


def _fewer_than_dit(cls: type[TiTok]) -> float:
    # A DiT of 512 px denoises latents of 8 px a side.
    return (512 // 8) ** 2 / int(CONFIGURATIONS["b-64"]["latents"])


@register
class TiTok(Published, nn.Module, PyTorchModelHubMixin, library_name="foveate"):
    """A ViT reads [class, patches, K learned latents]; only what becomes of the latents is kept, as K ids.

    `z (B, K, C) = W LN(latents)`, each replaced by the nearest of the codes, both of unit length. Another ViT reads
    [class, N times one mask token, K latents], told apart by positions, and at the N places says which codes a VQGAN
    would have for the patches, (B, N, 1024): "proxy codes". Their expectation (soft codes) goes through the VQGAN's
    decoder: pictures (B, 3, H, W) in [0, 1]. With `head="pixels"` the N places are patches of the picture.

    An Image is Worth 32 Tokens for Reconstruction and Generation, NeurIPS 2024, https://arxiv.org/abs/2406.07550.
    Trained by `code_loss`, then `PixelObjective`, which alone trains the variants of one stage. Ids are generated by
    `foveate.nn.maskgit.MaskedGenerator`, with `GENERATORS` and `SAMPLING`.

    Args:
        image, patch: side of pictures and of patches in px.
        latents: K.
        encoder, decoder: a name in `SIZES`, or (width, layers, heads).
        quantiser: "vq", or "vae": latents are drawn from a normal distribution (its mean, in evaluation), not coded.
        codes, channels: of the codebook; C.
        normalised: whether codes and latents are brought to unit length.
        commitment: weight of the commitment loss.
        head: "codes" or "pixels".
        pixel_codes, pixel_channels, pixel_width, pixel_multipliers: of the VQGAN, with "codes"; see
            `foveate.nn.vqgan.Vqgan`. It has as many px a code as a patch has.
        legacy_layout: whether the encoder's latents (B, K, W) are read as (B, W, K) without being transposed, which
            mixes latents and channels. The weights that the paper was released with are trained like that.

    Raises:
        InputError: for sizes that do not fit each other.
    """

    card = Card(
        slug="titok", title="An Image is Worth 32 Tokens for Reconstruction and Generation", arxiv="2406.07550",
        year=2024, kind="tokenize", hosts=(), training_free=False,
        summary="Makes a picture a sequence of 32 to 256 ids by a vision transformer, and pictures of such sequences.",
        parameters={
            "image": "side of the pictures in px",
            "patch": "side of a patch in px",
            "latents": "ids of a picture",
            "encoder": "tiny, small, base or large, or (width, layers, heads)",
            "decoder": "likewise",
            "quantiser": "vq for ids, vae for continuous latents",
            "codes": "number of codes, of which an id is one",
            "channels": "of a code",
            "normalised": "whether codes and latents are brought to unit length",
            "commitment": "weight of the commitment loss",
            "head": "codes for the paper's two stages, pixels for its variants of one",
            "pixel_codes": "codes of the VQGAN whose ids are the proxy codes",
            "pixel_channels": "of one of these",
            "pixel_width": "channels of its decoder at the largest picture",
            "pixel_multipliers": "of that width at each level, the largest picture first",
            "legacy_layout": "whether latents are reshaped as in the weights that were released first",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(f"parameters of {what}", "parameters", figure, "card", tolerance=tolerance, model=_part(name, part))
            for what, name, part, figure, tolerance in (
                ("L-32", "l-32", "", 641_054_735, 0),
                ("L-32's encoder", "l-32", "encoder", 303_410_188, 0),
                ("L-32's decoder", "l-32", "decoder", 306_822_144, 0),
                ("L-32's pixel decoder", "l-32", "pixel_decoder", 30_478_339, 0),
                ("L-32's pixel codebook", "l-32", "pixel_codebook", 262_144, 0),
                ("B-64", "b-64", "", 204_814_095, 0),
                ("S-128", "s-128", "", 83_674_639, 0),
                ("BL-128 VAE", "bl-128-vae", "", 389.6e6, 0.0005),
            )
        ),
        *(
            Claim(
                f"parameters of {what}'s generator", "parameters", figure, "card", tolerance=0, model=_generator(name),
            )
            for what, name, figure in (
                ("L-32", "l-32", 177_202_432), ("B-64", "b-64", 177_227_008), ("S-128", "s-128", 294_990_848),
            )
        ),
        Claim("bytes of a 256 px picture, L-32", "value", 48, "card", tolerance=0, value=_bytes("l-32")),
        Claim("tokens of a DiT at 512 px over TiTok's", "value", 64, "abstract", tolerance=0, value=_fewer_than_dit),
        *(
            Claim(
                f"masked of {tokens} after step {step + 1} of 8", "value", figure, "card", tolerance=0,
                value=_masked(tokens, step),
            )
            for tokens, figures in ((32, (29, 26, 24, 21, 18, 14, 10, 0)), (64, (58, 53, 48, 42, 36, 29, 20, 0)))
            for step, figure in enumerate(figures)
        ),
    )  # fmt: skip

    any_length: ClassVar[bool] = False
    """Whether fewer than K latents can be decoded."""

    def __init__(
        self, *, image: int = 256, patch: int = 16, latents: int = 32, encoder: str | Sequence[int] = "large",
        decoder: str | Sequence[int] = "large", quantiser: str = "vq", codes: int = 4096, channels: int = 12,
        normalised: bool = True, commitment: float = 0.25, head: str = "codes", pixel_codes: int = 1024,
        pixel_channels: int = 256, pixel_width: int = 128, pixel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        legacy_layout: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if whole("image", image, 1) % whole("patch", patch, 1):
            raise InputError(f"image must be a multiple of patch, not {image} with {patch}")
        self.image_size, self.patch, self.tokens = image, patch, whole("latents", latents, 1)
        self.codes, self.channels = whole("codes", codes, 2), whole("channels", channels, 1)
        for name, value in (("normalised", normalised), ("legacy_layout", legacy_layout)):
            if not isinstance(value, bool):
                raise InputError(f"{name} must be true or false, not {value!r}")
        self.legacy_layout = legacy_layout
        patches, is_vae = (image // patch) ** 2, choice("quantiser", quantiser, ("vq", "vae")) == "vae"
        inside = _size("encoder", encoder)
        self.encoder = _Encoder(inside, patch, patches, latents, 2 * channels if is_vae else channels, legacy_layout)
        self.latents = nn.Parameter(_table(latents, inside[0]))
        self.quantizer = (
            None if is_vae else VectorQuantizer(codes, channels, normalised=normalised, commitment=commitment)
        )
        in_pixels = choice("head", head, ("codes", "pixels")) == "pixels"
        for name, size in (("pixel_channels", pixel_channels), ("pixel_width", pixel_width)):
            whole(name, size, 1)
        self.decoder = _Decoder(
            _size("decoder", decoder), patches, latents, channels, patch, 0 if in_pixels else pixel_codes
        )
        self.pixel_codebook = None if in_pixels else nn.Embedding(whole("pixel_codes", pixel_codes, 2), pixel_channels)
        self.pixel_decoder = None if in_pixels else VqganDecoder(pixel_width, pixel_multipliers, pixel_channels)
        if not in_pixels and 2 ** (len(pixel_multipliers) - 1) != patch:
            raise InputError(f"pixel_multipliers must make patches of {patch} px, not {tuple(pixel_multipliers)}")

    @classmethod
    def named(cls, name: str, **changes: Any) -> Self:
        """An untrained tokenizer by its name in `CONFIGURATIONS`, with changes; InputError for an unknown name."""
        return cls(**configured(name, CONFIGURATIONS, changes))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of pictures in px."""
        return self.image_size, self.image_size

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """As huggingface_hub's; `config.json` says by which method the tokenizer is, too."""
        given: Any = self._hub_mixin_config
        config = {**given, "method": self.card.slug}
        return super().save_pretrained(save_directory, config=config, **options)

    # -- pictures to latents

    def latents_of(self, pixels: Tensor) -> Latents:
        """What is kept of pictures (B, 3, H, W) in [0, 1]: all K latents, whatever `kept` would leave."""
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, *self.size) or not pixels.is_floating_point():
            wanted = (
                f"(B, 3, {self.image_size}, {self.image_size}) numbers in 0..1; resize them to {self.image_size} px"
            )
            raise InputError(f"pictures must be {wanted}, not {tuple(pixels.shape)} {pixels.dtype}")
        z = self.encoder(pixels, self.latents)
        if self.quantizer is not None:
            quantised = self.quantizer(z)
            return Latents(quantised.z, quantised.ids, quantised.loss)
        mean, log_variance = z.float().chunk(2, -1)
        log_variance = log_variance.clamp(-30, 20)
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1).mean() / 2
        drawn = mean + (log_variance / 2).exp() * torch.randn_like(mean) if self.training else mean
        return Latents(drawn, None, kl)

    def kept(self, z: Tensor) -> Tensor:
        """The latents that are decoded in training: all."""
        return z

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Codes:
        """Ids (B, K) of pictures (B, 3, H, W) in [0, 1]. InputError for another size or range, and for "vae"."""
        if self.quantizer is None:
            raise InputError("this tokenizer has continuous latents, no ids; latents_of(pixels).z has them")
        if pixels.numel() and not (0 <= float(pixels.min()) <= float(pixels.max()) <= 1):
            raise InputError(f"pictures must be in 0..1, not {float(pixels.min()):g}..{float(pixels.max()):g}")
        ids = self.latents_of(pixels).ids
        assert ids is not None
        return Codes(ids, self.codes, self.size, (self.tokens,))

    # -- latents to pictures

    def decode(self, codes: Codes, tokens: int | None = None) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1], of the first `tokens` ids of each.

        Raises:
            InputError: for codes of another tokenizer, or a number of ids that it cannot decode.
        """
        if (codes.codebook_size, codes.size) != (self.codes, self.size) or len(codes.grid) != 1:
            raise InputError(
                f"these are no codes of this tokenizer: {codes.codebook_size} codes, {codes.size} px, {codes.grid} ids;"
                f" it has {self.codes} codes, {self.size} px, ({self.tokens},) ids"
            )
        return self.decode_tokens(codes.ids if tokens is None else codes.first(tokens).ids).clamp(0, 1)

    def decode_tokens(self, ids: Tensor) -> Tensor:
        """Pictures of ids (B, K), not clamped."""
        if self.quantizer is None:
            raise InputError("this tokenizer has continuous latents, no ids; decode_latents(z) makes pictures")
        return self.decode_latents(self.quantizer.look_up(ids))

    def decode_latents(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of latents z (B, K, C), not clamped."""
        made = self.decoded(z)
        if self.pixel_codebook is None:
            return made
        assert self.pixel_decoder is not None
        soft = made.softmax(-1) @ self.pixel_codebook.weight
        side = self.image_size // self.patch
        pixels: Tensor = self.pixel_decoder(soft.transpose(1, 2).unflatten(2, (side, side)))
        return pixels

    def decoded(self, z: Tensor) -> Tensor:
        """What the transformer says of latents z: logits (B, N, pixel codes) of patches, or pictures with "pixels"."""
        if z.ndim != 3 or z.shape[2] != self.channels or not 1 <= z.shape[1] <= self.tokens:
            wanted = f"(B, {f'1..{self.tokens}' if self.any_length else self.tokens}, {self.channels})"
            raise InputError(f"latents must be {wanted}, not {tuple(z.shape)}")
        if z.shape[1] < self.tokens and not self.any_length:
            raise InputError(f"titok decodes all {self.tokens} latents, not {z.shape[1]}; one-d-piece any number")
        made: Tensor = self.decoder(z)
        return made

    # -- training

    def forward(self, pixels: Tensor) -> tuple[Tensor, Latents]:
        """What becomes of pictures, not clamped, and their latents."""
        latents = self.latents_of(pixels)
        return self.decode_latents(self.kept(latents.z)), latents

    def code_loss(self, pixels: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor], Latents]:
        """Stage 1: cross entropy with target (B, N), the VQGAN's ids of the pictures, plus the quantiser's loss.

        The parts are "codes", "quantiser" and "accuracy", the share of ids that are right. The latents come along.
        """
        if self.pixel_codebook is None:
            raise InputError('head="pixels" has one stage, that of PixelObjective')
        latents = self.latents_of(pixels)
        logits = self.decoded(self.kept(latents.z))
        codes = F.cross_entropy(logits.transpose(1, 2).float(), target)
        right = (logits.argmax(-1) == target).float().mean()
        return codes + latents.loss, {"codes": codes, "quantiser": latents.loss, "accuracy": right}, latents

    def freeze_tokens(self) -> Self:
        """For stage 2: encoder, latents and codebook learn no more. Returns the tokenizer."""
        for part in (self.encoder, self.quantizer):
            if part is not None:
                part.requires_grad_(False)
        self.latents.requires_grad_(False)
        return self

    def take_pixel_decoder(self, vqgan: Vqgan) -> Self:
        """Takes codes and decoder of the VQGAN whose ids are the proxy codes. Returns the tokenizer.

        Raises:
            InputError: for a VQGAN of another size.
        """
        if self.pixel_codebook is None or self.pixel_decoder is None:
            raise InputError('head="pixels" has no pixel decoder')
        try:
            self.pixel_codebook.load_state_dict(vqgan.quantizer.embedding.state_dict())
            self.pixel_decoder.load_state_dict(vqgan.decoder.state_dict())
        except RuntimeError:
            raise InputError("the VQGAN has other sizes than pixel_codes, pixel_channels, pixel_width …") from None
        return self

    def load_release(self, state: Mapping[str, Tensor]) -> Self:
        """Takes weights under the names of the authors' release. Returns the tokenizer.

        Raises:
            InputError: for weights that are missing, left over, or of another shape.
        """
        own, taken = self.state_dict(), dict[str, Tensor]()
        for released, value in state.items():
            name = self._own_name(released)
            # The release has convolutions of 1 x 1 where linear layers are here.
            fits = name in own and own[name].numel() == value.numel()
            taken[name] = value.reshape(own[name].shape) if fits else value
        try:
            self.load_state_dict(taken)
        except RuntimeError as error:
            raise InputError(f"these are no weights of this tokenizer: {str(error).splitlines()[1].strip()}") from None
        return self

    def _own_name(self, released: str) -> str:
        name = released
        for pattern, own in _RENAMED:
            name = re.sub(pattern, own, name)
        if self.pixel_decoder is None:
            return re.sub(r"^decoder\.ffn\.0\.", "decoder.head.", name)
        # There the levels count from the largest picture, here from the smallest, and there are three modules for each.
        top = (len(self.pixel_decoder.levels) - 1) // 3
        return re.sub(
            r"^pixel_decoder\.up\.(\d+)\.(block\.|upsample_conv\.)",
            lambda found: f"pixel_decoder.levels.{3 * (top - int(found[1])) + 2 * (found[2] != 'block.')}.",
            re.sub(r"^decoder\.ffn\.", "decoder.head.", name),
        )


class PixelObjective(nn.Module):
    """Stage 2, and the only stage of tokenizers with `head="pixels"`: pictures that look right.

    `l2 + 0.1 perceptual + 0.01 generator + discriminator`, the last two, see `foveate.nn.adversarial.Adversarial`, from
    step `adversarial_from` on. In stage 2 that is all, and the tokens are frozen; in one stage there are also the
    quantiser's loss, or `kl_weight` times that of "vae" (the customary 1e-6; the paper does not say), and all learns.

    Args:
        tokenizer: what is trained.
        one_stage: whether tokens are trained, too.
        perceptual: distance of pictures, a number or (B,); the paper's is `foveate.nn.adversarial.LogitDistance`.
        perceptual_weight, adversarial_weight, kl_weight: see above.
        adversarial_from: 0-based step.
        lecam, decay: see `Adversarial`.
        discriminator: pictures to logits; a `PatchDiscriminator` without.
    """

    def __init__(
        self, tokenizer: TiTok, *, one_stage: bool = False, perceptual: nn.Module | None = None,
        perceptual_weight: float = 0.1, adversarial_weight: float = 0.01, adversarial_from: int = 20_000,
        lecam: float = 0.001, decay: float = 0.999, kl_weight: float = 1e-6, discriminator: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokenizer = tokenizer if one_stage else tokenizer.freeze_tokens()
        self.one_stage, self.perceptual = one_stage, perceptual
        self.perceptual_weight = within("perceptual_weight", perceptual_weight, "[0, inf)")
        self.adversarial_weight = within("adversarial_weight", adversarial_weight, "[0, inf)")
        self.adversarial_from = whole("adversarial_from", adversarial_from)
        self.latent_weight = within("kl_weight", kl_weight, "[0, inf)") if tokenizer.quantizer is None else 1.0
        self.adversarial = Adversarial(discriminator or PatchDiscriminator(), lecam=lecam, decay=decay)

    def forward(self, pixels: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor], Latents]:
        """The loss of pictures (B, 3, H, W) in [0, 1], its parts before they are weighted, and the latents."""
        made, latents = self.tokenizer(pixels)
        parts = {"l2": F.mse_loss(made, pixels)}
        loss = parts["l2"]
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(made, pixels).mean()
            loss = loss + self.perceptual_weight * parts["perceptual"]
        if self.one_stage:
            parts["latents"] = latents.loss
            loss = loss + self.latent_weight * latents.loss
        parts |= self.adversarial(made, pixels)
        active = float(step >= self.adversarial_from)
        # Times nothing, and not left out: several processes need a gradient for every weight.
        loss = loss + active * (self.adversarial_weight * parts["generator"] + parts["discriminator"])
        return loss, parts, latents


# ---------------------------------------------------------------------------------------------------------------------
# The two transformers


class _Encoder(nn.Module):
    def __init__(
        self, size: tuple[int, int, int], patch: int, patches: int, latents: int, channels: int, legacy_layout: bool
    ) -> None:
        super().__init__()
        width = size[0]
        self.legacy_layout = legacy_layout
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.cls_token, self.positions = nn.Parameter(_table(1, width)), nn.Parameter(_table(1 + patches, width))
        self.latent_positions = nn.Parameter(_table(latents, width))
        self.norm_pre, self.blocks, self.norm = nn.LayerNorm(width), _blocks(size), nn.LayerNorm(width)
        self.out = nn.Linear(width, channels)
        self.apply(_initialise)

    def forward(self, pixels: Tensor, latents: Tensor) -> Tensor:
        """(B, K, C) of pictures."""
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        latents = (latents + self.latent_positions).expand(len(patches), -1, -1)
        x = torch.cat([_with_class(self.cls_token, patches) + self.positions, latents], 1)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x[:, -latents.shape[1] :])
        if self.legacy_layout:
            x = x.reshape(len(x), x.shape[2], x.shape[1]).transpose(1, 2)
        z: Tensor = self.out(x)
        return z


class _Decoder(nn.Module):
    def __init__(
        self, size: tuple[int, int, int], patches: int, latents: int, channels: int, patch: int, pixel_codes: int
    ) -> None:
        super().__init__()
        width = size[0]
        self.patches, self.patch, self.in_pixels = patches, patch, pixel_codes == 0
        self.embed = nn.Linear(channels, width)
        self.cls_token, self.positions = nn.Parameter(_table(1, width)), nn.Parameter(_table(1 + patches, width))
        self.mask_token, self.latent_positions = nn.Parameter(_table(1, width)), nn.Parameter(_table(latents, width))
        self.norm_pre, self.blocks, self.norm = nn.LayerNorm(width), _blocks(size), nn.LayerNorm(width)
        self.head = (
            nn.Linear(width, 3 * patch**2)
            if self.in_pixels
            else nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, pixel_codes))
        )
        self.smooth = nn.Conv2d(3, 3, 3, padding=1) if self.in_pixels else None
        self.apply(_initialise)

    def forward(self, z: Tensor) -> Tensor:
        masks = self.mask_token.expand(len(z), self.patches, -1)
        latents = self.embed(z) + self.latent_positions[: z.shape[1]]
        x = self.norm_pre(torch.cat([_with_class(self.cls_token, masks) + self.positions, latents], 1))
        for block in self.blocks:
            x = block(x)
        x = self.head(self.norm(x[:, 1 : 1 + self.patches]))
        if self.smooth is None:
            return x
        # Each patch has its rows, columns and colours in this order.
        side, patch = math.isqrt(self.patches), self.patch
        x = x.view(-1, side, side, patch, patch, 3).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        pixels: Tensor = self.smooth(x)
        return pixels


def _size(name: str, size: str | Sequence[int]) -> tuple[int, int, int]:
    """(width, layers, heads)."""
    if isinstance(size, str):
        return SIZES[choice(name, size, tuple(SIZES))]
    if not isinstance(size, list | tuple) or len(size) != 3:
        raise InputError(f"{name} must be one of {', '.join(SIZES)}, or width, layers and heads, not {size!r}")
    width, layers, heads = (whole(name, one, 1) for one in size)
    if width % heads:
        raise InputError(f"{name}: the width must be a multiple of the heads, not {width} with {heads}")
    return width, layers, heads


def _table(count: int, width: int) -> Tensor:
    return torch.randn(count, width) * width**-0.5


def _with_class(cls_token: Tensor, x: Tensor) -> Tensor:
    return torch.cat([cls_token.expand(len(x), 1, -1), x], 1)


def _blocks(size: tuple[int, int, int]) -> nn.ModuleList:
    need_timm()
    from timm.models.vision_transformer import Block

    width, layers, heads = size
    return nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(layers))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_RENAMED = (
    (r"^latent_tokens$", "latents"),
    (r"^quantize\.", "quantizer."),
    (r"^pixel_quantize\.embedding\.", "pixel_codebook."),
    (r"\.class_embedding$", ".cls_token"),
    (r"\.positional_embedding$", ".positions"),
    (r"\.latent_token_positional_embedding$", ".latent_positions"),
    (r"\.ln_pre\.", ".norm_pre."),
    (r"\.ln_post\.", ".norm."),
    (r"\.transformer\.", ".blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^encoder\.conv_out\.", "encoder.out."),
    (r"^decoder\.decoder_embed\.", "decoder.embed."),
    (r"^decoder\.conv_out\.", "decoder.smooth."),
    (r"^pixel_decoder\.conv_in\.", "pixel_decoder.stem."),
    (r"^pixel_decoder\.mid\.", "pixel_decoder.middle."),
    (r"^pixel_decoder\.norm_out\.", "pixel_decoder.out.0."),
    (r"^pixel_decoder\.conv_out\.", "pixel_decoder.out.2."),
    (r"^(pixel_decoder\..+)\.nin_shortcut\.", r"\1.shortcut."),
)
