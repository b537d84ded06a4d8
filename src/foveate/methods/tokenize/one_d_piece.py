"""One-D-Piece: TiTok whose ids matter less and less, so that a picture is stored with as many as one likes.

In training only the first e of the K latents (B, K, C) are decoded, e uniform in 1..K: any prefix (B, e) is a picture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from foveate.method import Card, Claim, InputError, configured, register, whole
from foveate.methods.tokenize.titok import TINY, TiTok
from foveate.nn.codes import Codes
from foveate.nn.maskgit import Sampling

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "l-256": {},
    "b-256": {"encoder": "base", "decoder": "base"},
    "s-256": {"encoder": "small", "decoder": "small"},
    "tiny": {**TINY, "latents": 64},
}  # fmt: skip
"""Arguments of `OneDPiece` by name: the paper's, and this project's "tiny"."""

GENERATORS: dict[str, dict[str, Any]] = {
    "l-256": {"tokens": 256},
    "tiny": {"tokens": 64, "codes": 1024, "classes": 40, "width": 128, "layers": 6, "heads": 4},
}
"""Arguments of `foveate.nn.maskgit.MaskedGenerator` for the tokenizer of that name."""

SAMPLING = {"l-256": Sampling(steps=16, temperature=3.0, guidance_scale=5.5, guidance="power-cosine")}
"""The paper's settings for the generator of that name."""


@functools.lru_cache(maxsize=1)
def _on_meta(name: str) -> OneDPiece:
    with torch.device("meta"):
        return OneDPiece.named(name).eval()


def _model(name: str) -> Callable[[], nn.Module]:
    return lambda: _on_meta(name)


def _bytes(tokens: int) -> Callable[[Any], float]:
    def count(cls: type[OneDPiece]) -> float:
        made = _on_meta("s-256")
        ids = torch.zeros(1, made.tokens, dtype=torch.long)
        return Codes(ids, made.codes, made.size, (made.tokens,)).first(tokens).bytes

    return count


def _decoded_length(tokens: int) -> Callable[[Any], float]:
    """How many tokens the first block of the decoder sees."""

    def count(cls: type[OneDPiece]) -> float:
        made, seen = _on_meta("s-256"), list[int]()
        hook = made.decoder.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
        made.decoded(torch.empty(1, tokens, made.channels, device="meta"))
        hook.remove()
        return float(seen[0])

    return count


@register
class OneDPiece(TiTok, library_name="foveate"):
    """Tail token drop: in training, one e uniform in 1..K for each batch, and only latents 1..e are decoded.

    So what matters most goes to the head, and any prefix of the ids is a picture: `decode(codes, tokens=k)`. The
    sequence is really cut, in both stages of training, behind the quantiser, whose loss is that of all K latents.
    Everything else is `TiTok`, with K = 256: pictures (B, 3, H, W) in [0, 1] <-> ids (B, 1..K).

    One-D-Piece: Image Tokenizer Meets Quality-Controllable Compression, https://arxiv.org/abs/2501.10064.

    Args:
        tail_drop: whether latents are dropped in training; without, it is TiTok, of which short prefixes fall apart.
        latents: K.
        settings: the other arguments of `TiTok`.
    """

    card = Card(
        slug="one-d-piece", title="One-D-Piece: Image Tokenizer Meets Quality-Controllable Compression",
        arxiv="2501.10064", year=2025, kind="tokenize", hosts=(), training_free=False,
        summary="Makes a picture a sequence of ids of which any prefix is a picture, too, the better the longer it is.",
        parameters={
            **TiTok.card.parameters,
            "tail_drop": "whether training cuts the sequences at random places",
            "latents": "most ids of a picture",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(f"parameters of {name.upper()}", "parameters", figure, "card", tolerance=0, model=_model(name))
            for name, figure in (("s-256", 83_871_247), ("b-256", 205_256_463), ("l-256", 641_742_863))
        ),
        *(
            Claim(f"bytes of {tokens} tokens", "value", figure, "card", tolerance=0, value=_bytes(tokens))
            for tokens, figure in ((1, 2), (32, 48), (256, 384))
        ),
        *(
            Claim(
                f"sequence of the decoder, {tokens} tokens", "value", 257 + tokens, "card", tolerance=0,
                value=_decoded_length(tokens),
            )
            for tokens in (1, 32, 256)
        ),
        Claim("steps of L's generator", "value", 16, "card", tolerance=0, value=lambda cls: SAMPLING["l-256"].steps),
    )  # fmt: skip

    any_length: ClassVar[bool] = True

    def __init__(self, *, tail_drop: bool = True, latents: int = 256, **settings: Any) -> None:
        super().__init__(latents=latents, **settings)
        if not isinstance(tail_drop, bool):
            raise InputError(f"tail_drop must be true or false, not {tail_drop!r}")
        self.tail_drop = tail_drop

    @classmethod
    def named(cls, name: str, **changes: Any) -> Self:
        """An untrained tokenizer by its name in `CONFIGURATIONS`, with changes; InputError for an unknown name."""
        return cls(**configured(name, CONFIGURATIONS, changes))

    @classmethod
    def _from_pretrained(cls, *, method: str = "", **options: Any) -> Self:
        # Whatever is in `config.json` comes here, as the constructor takes any setting.
        return super()._from_pretrained(**options)

    def kept(self, z: Tensor) -> Tensor:
        """The latents (B, e, C) that are decoded in training; all K in evaluation."""
        if not (self.training and self.tail_drop):
            return z
        return z[:, : int(torch.randint(1, self.tokens + 1, ()))]

    @torch.no_grad()
    def contributions(self, codes: Codes, *, seed: int = 0) -> Tensor:
        """(B, K, H, W): how much of the picture hangs on each id.

        That id is replaced by a random one; the map is the absolute change of the pixels, summed over colours.
        """
        whole("seed", seed)
        before, maps = self.decode(codes), []
        others = torch.randint(codes.codebook_size, codes.ids.shape, generator=torch.Generator().manual_seed(seed))
        for place, other in enumerate(others.to(codes.ids.device).unbind(1)):
            ids = codes.ids.clone()
            ids[:, place] = other
            maps.append((self.decode_tokens(ids).clamp(0, 1) - before).abs().sum(1))
        return torch.stack(maps, 1)
