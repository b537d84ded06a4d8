"""SeiT++: pictures are kept as ids of a codebook, and a vision transformer is pre-trained and trained on the ids alone.

Masked token modelling (`Seit`, ids (B, h, w)): of N patches of ids a share r ~ normal(0.45, 0.25), truncated to
[0.4, 1], is hidden; the encoder sees what is not dropped, and a decoder says which ids were hidden, by cross entropy
over K codes: `logits (B, N, p^2, K) = h T^t + b`, T the table of words. `SeitClassifier` is tuned from its encoder.

Ids are augmented by `foveate.methods.learn.token_augmentation`, and stored by `foveate.nn.token_file`.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.method import Card, Claim, InputError, Published, choice, configured, register, whole, within
from foveate.methods.learn.token_augmentation import TokenAdapt
from foveate.nn.token_file import HEADER, write_tokens
from foveate.nn.vit import fixed_positions, transformer_blocks

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "vit-b": {},
    "vit-s": {"width": 384, "heads": 6},
    "scenes": {
        "grid": 20, "width": 96, "depth": 4, "heads": 3, "decoder_width": 64, "decoder_depth": 2, "decoder_heads": 4,
    },
}  # fmt: skip
"""Arguments by name: the paper's two (it has a decoder for ViT-B only), and the one that scenes are learned with."""


def _sizes(**values: int) -> None:
    for name, value in values.items():
        whole(name, value, 1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_norm = functools.partial(nn.LayerNorm, eps=1e-6)


class _Words(nn.Module):
    """Ids (B, h, w) -> patches (B, N, width): a learned table of words, norm, dropout, a convolution of p x p ids."""

    def __init__(self, codes: int, channels: int, patch: int, width: int, dropout: float) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(codes, channels))
        nn.init.normal_(self.table, std=0.02)
        self.norm, self.dropout = _norm(channels), nn.Dropout(dropout)
        self.patches = nn.Conv2d(channels, width, patch, patch)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.norm(F.embedding(ids, self.table)))
        return self.patches(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Masking:
    """One draw: `dropped` (B, N) bool, patches that the encoder does not see; `masked` (B, N) bool, those that are to
    be found. All that are dropped are masked; each row has as many as the others."""

    dropped: Tensor
    masked: Tensor


def _b_of(part: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module: nn.Module = getattr(Seit.named("vit-b"), part)
        return module

    return build


def _with_adapt() -> nn.Module:
    return nn.ModuleList([Seit.named("vit-b"), TokenAdapt()])


def _f() -> nn.Module:
    return TokenAdapt().f


def _g() -> nn.Module:
    return TokenAdapt().g


def _seen(cls: type[Seit]) -> float:
    """Patches, and a class token, that the encoder gets."""
    with torch.device("meta"):
        model = cls.named("vit-b")
    with torch.random.fork_rng(devices=[]):
        return 1 + float((~model.draw(4).dropped).sum()) / 4


def _uniform_loss(cls: type[Seit]) -> float:
    """The loss of a model that knows nothing."""
    model = cls.named("scenes", depth=1, decoder_depth=1, codes=391).eval()
    ids = torch.zeros(2, model.grid, model.grid, dtype=torch.long)
    masking = Masking(*torch.ones(2, 2, (model.grid // 2) ** 2).bool())
    return float(model.loss_of(torch.zeros(2, (model.grid // 2) ** 2, 4, 391), ids, masking))


def _stored(cls: type[Seit]) -> float:
    """Bytes on disk, but for header, index and labels, of a picture that has 1024 ids, 136 of them >= 255."""
    ids = (torch.arange(1024) % 255).index_fill(0, torch.arange(136) * 7, 300).view(1, 32, 32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.tokens"
        write_tokens(path, ids, codes=391, compress=False)
        return float(path.stat().st_size - HEADER - 2)


def _gigabytes(cls: type[Seit]) -> float:
    """GB of the ids of ImageNet-1K, at log2 391 bits each."""
    return 1_281_167 * 1024 * math.log2(391) / 8 / 1e9


@register
class Seit(Published, nn.Module, PyTorchModelHubMixin):
    """Masked token modelling: finds the ids under patches that were hidden from an encoder. ids (B, h, w) in 0..K - 1.

    1. A learned table of words T (K, C), norm, dropout and a convolution make N = (h / p)^2 patches of p x p ids.
    2. Of a random order, the first `ceil(0.4 N)` patches are dropped and the first `ceil(r N)` are masked, with
       r ~ normal(0.45, 0.25) truncated to [0.4, 1], one draw for the batch. Patches that are masked but not dropped
       become a learned vector; fixed positions are added; the class token and the patches that were not dropped, in
       reading order, go through the encoder.
    3. Linear to the decoder's width; every masked patch is filled with the encoded class token; learned positions;
       the decoder's blocks and norm.
    4. Linear to p^2 vectors of C channels for each patch, GELU, norm; logits (B, N, p^2, K) = `h T^t + b`, T without
       a gradient.
    5. Loss: cross entropy, mean over a patch's ids, then over masked patches.

    `loss(ids)` gives the scalar and its parts; `forward_features(ids)` the encoder's tokens of whole pictures;
    `SeitClassifier.load_encoder` takes the encoder over. `TokenAugmentation` varies the ids.

    SeiT++: Masked Token Modeling Improves Storage-efficient Training, ECCV 2024, https://arxiv.org/abs/2312.10105,
    where it is called MTM. The paper's tokenizer is ViT-VQGAN, 32 x 32 ids of 391 codes for 256 px; any ids will do.
    """

    card = Card(
        slug="seit", title="SeiT++: Masked Token Modeling Improves Storage-efficient Training", arxiv="2312.10105",
        year=2023, kind="learn", hosts=(), training_free=False,
        summary="Stores pictures as ids of a codebook, pre-trains by finding masked ids, augments in token space.",
        parameters={
            "codes": "K, number of codes",
            "channels": "of the table of words",
            "grid": "ids a side of what the network reads",
            "patch": "ids a side of a patch",
            "width": "of the encoder",
            "depth": "blocks of the encoder",
            "heads": "of the encoder",
            "decoder_width": "of the decoder",
            "decoder_depth": "blocks of the decoder",
            "decoder_heads": "of the decoder",
            "dropout": "of words, and in the decoder's blocks",
            "mask_mean": "mean of the masked share, before it is truncated",
            "mask_std": "deviation of the masked share, before it is truncated",
            "mask_range": "least and greatest masked share; the least is dropped",
        },
    )  # fmt: skip

    claims = (
        Claim("parameters of f of TokenAdapt, positions too", "parameters", 2_229_152, "card", tolerance=0, model=_f),
        Claim("parameters of g of TokenAdapt, positions too", "parameters", 2_275_207, "card", tolerance=0, model=_g),
        Claim("parameters of ViT-B's blocks", "parameters", 85_054_464, "card", tolerance=0, model=_b_of("blocks")),
        Claim("parameters of the decoder's blocks", "parameters", 12_609_536, "card", tolerance=0,
              model=_b_of("decoder_blocks")),
        Claim("parameters of the head of the decoder", "parameters", 66_119, "card", tolerance=0, model=_b_of("head")),
        # The release has 197 x 512 fixed positions of the decoder, too, which it does not use.
        Claim("parameters of masked token modelling with f and g", "parameters", 103_096_974, "card", tolerance=0.001,
              model=_with_adapt),
        Claim("tokens that the encoder sees of 197", "value", 118, "card", tolerance=0, value=_seen),
        Claim("loss of uniform logits over 391 codes", "value", 5.969, "card", tolerance=0.0001, value=_uniform_loss),
        Claim("bytes on disk of 1024 ids, 136 of them >= 255", "value", 1160, "card", tolerance=0, value=_stored),
        Claim("GB of ImageNet-1K's ids at log2 391 bits", "value", 1.4, "card", value=_gigabytes),
    )  # fmt: skip

    def __init__(
        self, *, codes: int = 391, channels: int = 32, grid: int = 28, patch: int = 2, width: int = 768,
        depth: int = 12, heads: int = 12, decoder_width: int = 512, decoder_depth: int = 4, decoder_heads: int = 16,
        dropout: float = 0.1, mask_mean: float = 0.45, mask_std: float = 0.25,
        mask_range: Sequence[float] = (0.4, 1.0),
    ) -> None:  # fmt: skip
        super().__init__()
        _sizes(codes=codes, channels=channels, grid=grid, patch=patch, width=width, depth=depth)
        _sizes(decoder_width=decoder_width, decoder_depth=decoder_depth)
        if grid % patch:
            raise InputError(f"grid must be a multiple of patch, not {grid} with {patch}")
        if len(mask_range) != 2 or mask_range[0] > mask_range[1]:
            raise InputError(f"mask_range must be a least and a greatest share, not {mask_range!r}")
        self.mask_range = (within("mask_range", mask_range[0], "(0, 1)"), within("mask_range", mask_range[1], "(0, 1]"))
        self.mask_mean = within("mask_mean", mask_mean, "[0, 1]")
        self.mask_std = within("mask_std", mask_std, "(0, inf)")
        within("dropout", dropout, "[0, 1)")
        self.codes, self.channels, self.grid, self.patch = codes, channels, grid, patch
        side = grid // patch
        self.words = _Words(codes, channels, patch, width, dropout)
        self.positions = fixed_positions(side, width, prefix=1)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks, self.norm = transformer_blocks(depth, width, heads, norm_layer=_norm), _norm(width)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.decoder_positions = nn.Parameter(torch.zeros(1, 1 + side**2, decoder_width))
        self.decoder_blocks = transformer_blocks(
            decoder_depth, decoder_width, decoder_heads, norm_layer=_norm, proj_drop=dropout, attn_drop=dropout
        )
        self.decoder_norm = _norm(decoder_width)
        self.head = _Head(decoder_width, patch**2, codes, channels)
        self.apply(_initialise)
        nn.init.normal_(self.cls_token, std=0.02)

    @classmethod
    def named(cls, name: str, **changes: Any) -> Seit:
        """An untrained model by its name in `CONFIGURATIONS`, with changes; InputError for an unknown name."""
        return cls(**configured(name, CONFIGURATIONS, changes))

    def draw(self, batch: int, ratio: float | None = None, device: torch.device | str | None = None) -> Masking:
        """A draw for `batch` pictures; `ratio` is the masked share, drawn too where it is not given."""
        least, most = self.mask_range
        if ratio is None:
            drawn = torch.empty(1, device="cpu")
            ratio = float(nn.init.trunc_normal_(drawn, self.mask_mean, self.mask_std, least, most))
        count = (self.grid // self.patch) ** 2
        # Decimal shares: 0.55 * 100 is a little more than 55 in binary.
        dropped, masked = (math.ceil(one * count - 1e-6) for one in (least, min(max(ratio, least), most)))
        place = torch.rand(batch, count, device=device or "cpu").argsort(1).argsort(1)
        return Masking(place < dropped, place < masked)

    def forward_features(self, ids: Tensor, masking: Masking | None = None) -> Tensor:
        """(B, 1 + N', width) encoded class token and patches, in reading order; all of them without `masking`."""
        self._check(ids)
        x = self.words(ids)
        if masking is not None:
            x = torch.where(masking.masked.unsqueeze(2), self.mask_token, x)
        x = x + self.positions[1:]
        if masking is not None:
            x = x.gather(1, _seen_first(masking).unsqueeze(2).expand(-1, -1, x.shape[2]))
        x = torch.cat([(self.cls_token + self.positions[:1]).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, ids: Tensor, masking: Masking) -> Tensor:
        """(B, N, p^2, K) logits of the ids of every patch, in reading order."""
        x = self.decoder_embed(self.forward_features(ids, masking))
        cls_token, seen = x[:, :1], x[:, 1:]
        full = cls_token.expand(-1, masking.dropped.shape[1], -1)
        full = full.scatter(1, _seen_first(masking).unsqueeze(2).expand(-1, -1, x.shape[2]), seen)
        full = torch.where(masking.masked.unsqueeze(2), cls_token, full)
        x = torch.cat([cls_token, full], 1) + self.decoder_positions
        for block in self.decoder_blocks:
            x = block(x)
        return self.head(self.decoder_norm(x)[:, 1:], self.words.table.detach())

    def loss_of(self, logits: Tensor, ids: Tensor, masking: Masking) -> Tensor:
        """Step 5 of the class's docstring."""
        target = _by_patch(ids, self.patch)
        each = F.cross_entropy(logits.flatten(0, 2).float(), target.flatten(), reduction="none").view(target.shape)
        return each.mean(2)[masking.masked].mean()

    def loss(self, ids: Tensor, masking: Masking | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss of ids (B, h, w), and its parts: "masked", the masked share, and "accuracy" on those."""
        masking = masking or self.draw(len(ids), device=ids.device)
        logits = self(ids, masking)
        loss = self.loss_of(logits, ids, masking)
        right = logits.detach().argmax(-1) == _by_patch(ids, self.patch)
        return loss, {"masked": masking.masked.float().mean(), "accuracy": right[masking.masked].float().mean()}

    def _check(self, ids: Tensor) -> None:
        if ids.ndim != 3 or tuple(ids.shape[1:]) != (self.grid, self.grid) or ids.is_floating_point():
            wanted = f"(B, {self.grid}, {self.grid}) whole numbers"
            raise InputError(f"ids must be {wanted}, not {tuple(ids.shape)} {ids.dtype}")


def _seen_first(masking: Masking) -> Tensor:
    """(B, N') numbers of the patches that are not dropped, in reading order."""
    kept = int((~masking.dropped[0]).sum()) if len(masking.dropped) else 0
    return masking.dropped.long().argsort(dim=1, stable=True)[:, :kept]


def _by_patch(ids: Tensor, patch: int) -> Tensor:
    """(B, h, w) -> (B, N, p^2), patches and the ids in each in reading order."""
    return ids.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).transpose(2, 3).flatten(3).flatten(1, 2)


class _Head(nn.Module):
    def __init__(self, width: int, parts: int, codes: int, channels: int) -> None:
        super().__init__()
        self.parts, self.linear, self.norm = parts, nn.Linear(width, parts * channels), _norm(channels)
        self.bias = nn.Parameter(torch.zeros(codes))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        x = self.norm(F.gelu(self.linear(x)).unflatten(2, (self.parts, -1)))
        return x @ table.T + self.bias


class SeitClassifier(nn.Module, PyTorchModelHubMixin):
    """Ids, or embeddings, to logits (B, classes): a ViT whose patches are averaged, normalised and classified.

    Args:
        codes, channels, grid, patch, width, depth, heads: as those of `Seit`.
        classes: number of classes.
        dropout: of words.
        drop_path: stochastic depth of the last block, rising linearly.
        stem: "words", SeiT++'s, reads ids (B, h, w); "adaptor", that of SeiT, which is trained from scratch, reads
            embeddings (B, C, h, w) of the codebook, by a convolution 4 x 4 with stride 2 and padding 1.
    """

    def __init__(
        self, *, codes: int = 391, channels: int = 32, grid: int = 28, patch: int = 2, width: int = 768,
        depth: int = 12, heads: int = 12, classes: int = 1000, dropout: float = 0.1, drop_path: float = 0.1,
        stem: str = "words",
    ) -> None:  # fmt: skip
        super().__init__()
        _sizes(codes=codes, channels=channels, grid=grid, patch=patch, width=width, depth=depth, classes=classes)
        if grid % patch or (choice("stem", stem, ("words", "adaptor")) == "adaptor" and patch != 2):
            raise InputError(f"grid must be a multiple of patch, and patch 2 for the adaptor, not {grid} with {patch}")
        within("dropout", dropout, "[0, 1)")
        self.depth = depth
        self.words = _Words(codes, channels, patch, width, dropout) if stem == "words" else None
        self.adaptor = nn.Conv2d(channels, width, 4, 2, 1) if stem == "adaptor" else None
        self.positions = fixed_positions(grid // patch, width, prefix=1)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = transformer_blocks(
            depth, width, heads, within("drop_path", drop_path, "[0, 1)"), norm_layer=_norm
        )
        self.fc_norm, self.head = _norm(width), nn.Linear(width, classes)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.normal_(self.cls_token, std=0.02)

    @classmethod
    def named(cls, name: str, **changes: Any) -> SeitClassifier:
        """An untrained model by its name in `CONFIGURATIONS`, with changes; InputError for an unknown name."""
        given = configured(name, CONFIGURATIONS, {})
        return cls(**{key: value for key, value in given.items() if not key.startswith("decoder_")} | changes)

    def load_encoder(self, model: Seit) -> SeitClassifier:
        """Takes words, positions, class token and blocks of a pre-trained model; returns this one.

        Raises:
            InputError: for a model of another size.
        """
        own = self.state_dict()
        parts = ("words.", "positions", "cls_token", "blocks.")
        taken = {name: value for name, value in model.state_dict().items() if name.startswith(parts)}
        wrong = [name for name, value in taken.items() if name not in own or own[name].shape != value.shape]
        wrong += [name for name in own if name.startswith(parts) and name not in taken]
        if wrong:
            raise InputError(f"the pre-trained model has another {wrong[0]} than the classifier")
        self.load_state_dict(taken, strict=False)
        return self

    def rate(self, name: str, decay: float = 0.65) -> float:
        """Layer-wise decay: what to multiply the learning rate of that parameter with, 1 for the head."""
        if name.startswith("blocks."):
            layer = 1 + int(name.split(".")[1])
        else:
            layer = self.depth + 1 if name.startswith(("head.", "fc_norm.")) else 0
        return float(decay ** (self.depth + 1 - layer))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 1 + N, width) tokens before the last norm."""
        if self.words is not None:
            if x.is_floating_point() or x.ndim != 3:
                raise InputError(f"this stem reads ids (B, h, w), not {tuple(x.shape)} {x.dtype}")
            patches = self.words(x)
        else:
            assert self.adaptor is not None
            if not x.is_floating_point() or x.ndim != 4:
                raise InputError(f"this stem reads embeddings (B, C, h, w), not {tuple(x.shape)} {x.dtype}")
            patches = self.adaptor(x).flatten(2).transpose(1, 2)
        if patches.shape[1] + 1 != len(self.positions):
            raise InputError(f"there must be {len(self.positions) - 1} patches, not {patches.shape[1]}")
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], 1) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.head(self.fc_norm(self.forward_features(x)[:, 1:].mean(1)))
