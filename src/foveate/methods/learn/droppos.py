"""DropPos: a vision transformer learns where patches belong whose position it was not told."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.method import Card, Claim, InputError, Published, choice, configured, register, whole, within
from foveate.nn.vit import vision_transformer
from foveate.tokens import take

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "vit-b": {"backbone": "vit_base_patch16_224"},
    "vit-l": {"backbone": "vit_large_patch16_224"},
}
"""Arguments of `DropPos` by name."""


def sincos_table(grid: tuple[int, int], width: int) -> Tensor:
    """(rows * columns, width) fixed positions: the first half of the channels is the column's, the second the row's,
    each sines and then cosines of `place / 10000^(2 k / half)`."""
    if width % 4:
        raise InputError(f"width must be a multiple of 4 for two-dimensional sines, not {width}")
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    parts = [place.reshape(-1, 1) * frequency for place in (column, row)]
    return torch.cat([wave for angle in parts for wave in (angle.sin(), angle.cos())], dim=1).float()


def smoothed_targets(grid: tuple[int, int], sigma: float) -> Tensor:
    """(N, N) rows that sum to 1: `W_ij ~ exp(-|i - j|^2 / sigma^2)` on the grid of N places; one-hot for sigma = 0."""
    if sigma == 0:
        return torch.eye(grid[0] * grid[1])
    squared = _squared_distances(grid)
    return (-squared / sigma**2).softmax(dim=1).float()


def released_targets(grid: int, image: int, sigma: float) -> Tensor:
    """(N, N) what the authors' code uses in the place of `smoothed_targets`, for N = grid * grid patches.

    Its map is for a grid of `image // grid` places a side, and column j, not row i, is divided by the sum of row j; the
    first N rows and columns are used. At sigma = 0 it is one-hot as well.
    """
    side, places = image // grid, grid * grid
    if side * side < places:
        raise InputError(f"the released map of {side} x {side} places is too small for {places} patches")
    if sigma == 0:
        return torch.eye(places)
    near = (-_squared_distances((side, side)) / sigma**2).exp()
    return (near / near.sum(1))[:places, :places].float()


def _squared_distances(grid: tuple[int, int]) -> Tensor:
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid)).view(-1, 2)
    return (places[:, None] - places[None]).square().sum(-1)


@dataclass(frozen=True, eq=False)
class Hidden:
    """Which patches are seen, and of which the position is hidden.

    Attributes:
        place: (B, V) long, the grid place of each patch that is seen, in random order.
        hidden: (B, V) bool, those whose position is hidden, and to be found.
    """

    place: Tensor
    hidden: Tensor


@functools.lru_cache(maxsize=1)
def _on_meta(cls: type[DropPos]) -> DropPos:
    with torch.device("meta"):
        return cls.named("vit-b")


def _counted(what: Callable[[DropPos], float]) -> Callable[[Any], float]:
    return lambda cls: what(_on_meta(cls))


@register
class DropPos(Published, nn.Module, PyTorchModelHubMixin, library_name="foveate"):
    """Pre-trains a vision transformer by asking where patches belong: pictures -> loss and its parts.

    Of N patches `V = int(N (1 - mask))` are seen, in random order and without the others; of these `int(V (1 -
    position_mask))` keep their position embedding, the others get one learned vector instead. A small decoder without
    positions says of each which of the N places it is from: `(B, 3, H, W) -> (B, V, N)` logits. With W the targets
    smoothed over neighbouring places and weights w, 0 where the position was told,

        L = sum w l / sum w,   l = -sum_j W_pj log softmax(logits)_j,   p the true place.

    w is the attention that the encoder's class token would pay each patch of the whole picture, `softmax(cos / 0.1)`
    of their features, renormalised over the patches that are seen, without gradient; 1 with `attentive=False`. It takes
    a forward of all patches each step. `encoder` is a timm `VisionTransformer` with fixed sine positions: after
    training, its `state_dict` is all that is kept.

    DropPos: Pre-Training Vision Transformers by Reconstructing Dropped Positions, NeurIPS 2023,
    https://arxiv.org/abs/2309.03576, section 3. `released_map` takes the targets that the authors' code makes (see
    `released_targets`) instead of the paper's. Their option to shuffle the sequence is left out: the encoder cannot
    tell the order of its tokens.

    Args:
        backbone: a timm `VisionTransformer` with a class token; `options` are its arguments.
        mask: share of the patches that are not seen.
        position_mask: share of the patches seen whose position is hidden.
        hide: what they get: a learned "token", "zeros", or each other's positions, "shuffled".
        sigma: of the targets at the start, in patches; `loss` takes the current one (see `sigma_at`).
        attentive, temperature: of the weights.
        skip_confident: leave out patches whose true place is more probable than its target.
        pixels: also reconstruct the pixels of unseen patches, as MAE does, from a decoder of its own.
        position_weight: of the positions' loss beside that of the pixels; alone, the positions' has weight 1.
        decoder_width, decoder_depth, decoder_heads: of the decoder.
    """

    card = Card(
        slug="droppos", title="DropPos: Pre-Training Vision Transformers by Reconstructing Dropped Positions",
        arxiv="2309.03576", year=2023, kind="learn", hosts=("timm",), training_free=False,
        summary="Pre-trains a vision transformer by asking where patches belong whose position is hidden.",
        parameters={
            "backbone": "of timm, with a class token",
            "options": "arguments of the backbone",
            "mask": "share of the patches that are not seen",
            "position_mask": "share of the seen patches whose position is hidden",
            "hide": "'token', 'zeros' or 'shuffled'",
            "sigma": "of the smoothed targets at the start, in patches",
            "attentive": "whether patches count by the class token's attention",
            "temperature": "of that attention",
            "skip_confident": "whether patches that are placed well enough do not count",
            "released_map": "whether targets are those of the authors' code",
            "pixels": "whether pixels are reconstructed too",
            "position_weight": "of the positions' loss beside the pixels'",
            "decoder_width": "channels of the decoder",
            "decoder_depth": "blocks of the decoder",
            "decoder_heads": "heads of the decoder",
        },
    )  # fmt: skip

    claims = (
        Claim("tokens that the encoder sees, of 197", "value", 50, "section 3", tolerance=0,
              value=_counted(lambda one: 1 + one.seen)),
        Claim("places to choose from", "value", 196, "section 3", tolerance=0, value=_counted(lambda one: one.places)),
        Claim("positions that are told", "value", 12, "card", tolerance=0, value=_counted(lambda one: one.told)),
        Claim("positions to find, a picture", "value", 37, "card", tolerance=0,
              value=_counted(lambda one: one.seen - one.told)),
    )  # fmt: skip

    grid: tuple[int, int]
    """(rows, columns) of patches."""
    places: int
    seen: int
    told: int
    """Patches of a picture; those that are seen; those of them whose position is told."""

    def __init__(
        self, *, backbone: str = "vit_base_patch16_224", options: Mapping[str, Any] | None = None, mask: float = 0.75,
        position_mask: float = 0.75, hide: str = "token", sigma: float = 1.0, attentive: bool = True,
        temperature: float = 0.1, skip_confident: bool = False, released_map: bool = False, pixels: bool = False,
        position_weight: float = 1.0, decoder_width: int = 512, decoder_depth: int = 2, decoder_heads: int = 16,
    ) -> None:  # fmt: skip
        super().__init__()
        self.mask, self.position_mask = within("mask", mask, "[0, 1)"), within("position_mask", position_mask, "(0, 1]")
        self.hide = choice("hide", hide, ("token", "zeros", "shuffled"))
        self.sigma = within("sigma", sigma, "[0, inf)")
        self.temperature = within("temperature", temperature, "(0, inf)")
        self.position_weight = within("position_weight", position_weight, "[0, inf)")
        flags = {
            "attentive": attentive, "skip_confident": skip_confident, "released_map": released_map, "pixels": pixels
        }  # fmt: skip
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise InputError(f"{name} must be true or false, not {flag!r}")
        self.attentive, self.skip_confident, self.released_map = attentive, skip_confident, released_map
        self.encoder = vision_transformer(backbone, dict(options or {}) | {"num_classes": 0})
        width, patches = self.encoder.embed_dim, self.encoder.patch_embed
        if self.encoder.num_prefix_tokens != 1 or self.encoder.cls_token is None or self.encoder.no_embed_class:
            raise InputError(f"{backbone} has no class token with a position, or registers; droppos needs the former")
        self.grid = patches.grid_size
        self.places = self.grid[0] * self.grid[1]
        # In binary 1 - 0.9 is above a tenth; a patch is neither lost nor won to that.
        self.seen = int(self.places * (1 - self.mask) + 1e-9)
        self.told = int(self.seen * (1 - self.position_mask) + 1e-9)
        if self.seen < 1 or self.told == self.seen:
            raise InputError(
                f"mask {mask} and position_mask {position_mask} leave {self.seen} of {self.places} patches and "
                f"{self.told} told positions: nothing is to be found"
            )
        if released_map and self.grid[0] != self.grid[1]:
            raise InputError(f"the released map is for square grids, not {self.grid}")
        table = torch.cat([torch.zeros(1, width), sincos_table(self.grid, width)]).unsqueeze(0)
        self.encoder.pos_embed = nn.Parameter(table, requires_grad=False)
        if self.hide == "token":
            self.position_token = nn.Parameter(0.02 * torch.randn(width))
        for name, least in (("decoder_width", decoder_width), ("decoder_heads", decoder_heads)):
            whole(name, least, 1)
        if decoder_width % decoder_heads:
            raise InputError(f"decoder_width must be a multiple of decoder_heads, not {decoder_width}")
        depth = whole("decoder_depth", decoder_depth, 1)
        self.decoder = _decoder(width, decoder_width, depth, decoder_heads, self.places)
        self.pixel_decoder: nn.ModuleDict | None = None
        if pixels:
            size = 3 * patches.patch_size[0] * patches.patch_size[1]
            self.pixel_decoder = _decoder(width, decoder_width, depth, decoder_heads, size)
            self.pixel_token = nn.Parameter(0.02 * torch.randn(decoder_width))
            self.register_buffer("pixel_positions", sincos_table(self.grid, decoder_width), persistent=False)

    @classmethod
    def named(cls, name: str, **changes: Any) -> DropPos:
        """The paper's model by its name in `CONFIGURATIONS`, with changes; InputError for an unknown name."""
        return cls(**configured(name, CONFIGURATIONS, changes))

    def sigma_at(self, epoch: float, epochs: float) -> float:
        """The current sigma: falls linearly to 0, which the last epoch, counted from 0, does not reach."""
        return (1 - epoch / epochs) * self.sigma

    def targets(self, sigma: float) -> Tensor:
        """(N, N) the target over places, of each true place."""
        if self.released_map:
            return released_targets(self.grid[0], self.encoder.patch_embed.img_size[0], sigma)
        return smoothed_targets(self.grid, sigma)

    def draw(self, batch: int) -> Hidden:
        """Which patches are seen and which positions are hidden, drawn for each picture."""
        place = torch.rand(batch, self.places).argsort(dim=1)[:, : self.seen]
        hidden = torch.rand(batch, self.seen).argsort(dim=1) >= self.told
        return Hidden(place, hidden)

    def encode(self, pixels: Tensor, drawn: Hidden) -> Tensor:
        """(B, 1 + V, C): class token and the patches seen, after the encoder's norm."""
        encoder = self.encoder
        patches = encoder.patch_embed(pixels)
        place, hidden = drawn.place.to(patches.device), drawn.hidden.to(patches.device).unsqueeze(-1)
        positions = encoder.pos_embed[0, 1:][place]
        if self.hide == "token":
            positions = torch.where(hidden, self.position_token, positions)
        elif self.hide == "zeros":
            positions = positions.masked_fill(hidden, 0)
        else:
            positions = take(positions, _exchanged(hidden.squeeze(-1)))
        x = take(patches, place) + positions
        first = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = encoder.norm_pre(encoder.pos_drop(torch.cat([first, x], dim=1)))
        normed: Tensor = encoder.norm(encoder.blocks(x))
        return normed

    def locate(self, features: Tensor) -> Tensor:
        """(B, V, N) logits of places, from `encode`'s features."""
        return _decoded(self.decoder, features)[:, 1:]

    def forward(self, pixels: Tensor, drawn: Hidden | None = None) -> Tensor:
        """(B, V, N) logits of places for pictures (B, 3, H, W), for a given draw or a new one."""
        return self.locate(self.encode(pixels, drawn or self.draw(len(pixels))))

    @torch.no_grad()
    def attention(self, pixels: Tensor, place: Tensor) -> Tensor:
        """(B, V) non-negative weights that sum to 1: how near the patches seen are to the class token."""
        features = self.encoder.forward_features(pixels)
        similarity = F.cosine_similarity(features[:, :1], features[:, 1:], dim=-1)
        weights = (similarity.float() / self.temperature).softmax(-1).gather(1, place.to(features.device))
        return weights / weights.sum(1, keepdim=True)

    def loss(
        self, pixels: Tensor, sigma: float | None = None, drawn: Hidden | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of pictures (B, 3, H, W), and as parts "positions", the "accuracy" of hidden positions and, where
        they are reconstructed, "pixels".

        Args:
            sigma: of the targets; `self.sigma` unless told otherwise.
            drawn: what is seen and hidden; a new draw unless told otherwise.
        """
        drawn = drawn or self.draw(len(pixels))
        features = self.encode(pixels, drawn)
        logits = self.locate(features).float()
        place, hidden = drawn.place.to(logits.device), drawn.hidden.to(logits.device)
        target = self.targets(self.sigma if sigma is None else sigma).to(logits.device)[place]
        log_p = logits.log_softmax(-1)
        losses = -(target * log_p).sum(-1)
        weights = self.attention(pixels, place) * hidden if self.attentive else hidden.float()
        if self.skip_confident:
            true = place.unsqueeze(-1)
            weights = weights * (log_p.detach().exp().gather(2, true) <= target.gather(2, true)).squeeze(-1)
        # Where all are skipped, nothing is left to learn, and the sum is 0 too.
        positions = (weights * losses).sum() / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)
        right = (logits.argmax(-1) == place)[hidden].float().mean()
        parts = {"positions": positions, "accuracy": right}
        if self.pixel_decoder is None:
            return positions, parts
        parts["pixels"] = self._pixel_loss(pixels, features, place)
        return self.position_weight * positions + parts["pixels"], parts

    def _pixel_loss(self, pixels: Tensor, features: Tensor, place: Tensor) -> Tensor:
        """MAE's: mean squared error of the patches that were not seen, each normalised by its own mean and variance."""
        decoder = self.pixel_decoder
        assert decoder is not None
        known = decoder["embed"](features)
        canvas = self.pixel_token.to(known).expand(len(known), self.places, -1)
        canvas = canvas.scatter(1, place.unsqueeze(-1).expand(-1, -1, known.shape[-1]), known[:, 1:])
        positions: Any = self.pixel_positions
        x = torch.cat([known[:, :1], canvas + positions], dim=1)
        found = decoder["head"](decoder["norm"](decoder["blocks"](x)))[:, 1:]
        (rows, columns), (height, width) = self.grid, self.encoder.patch_embed.patch_size
        wanted = pixels.unflatten(3, (columns, width)).unflatten(2, (rows, height))
        wanted = wanted.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        wanted = (wanted - wanted.mean(-1, keepdim=True)) / (wanted.var(-1, keepdim=True) + 1e-6).sqrt()
        unseen = torch.ones(place.shape[0], self.places, device=place.device).scatter(1, place, 0.0)
        error = (found.float() - wanted).square().mean(-1)
        return (error * unseen).sum() / unseen.sum().clamp(min=1)


def _exchanged(hidden: Tensor) -> Tensor:
    """(B, V) long: a random permutation of the hidden ones among themselves; the others stay where they are."""
    index = torch.arange(hidden.shape[1], device=hidden.device).repeat(len(hidden), 1)
    for row, some in zip(index, hidden):
        places = some.nonzero().flatten()
        row[places] = places[torch.randperm(len(places), device=places.device)]
    return index


def _decoder(width: int, inner: int, depth: int, heads: int, outputs: int) -> nn.ModuleDict:
    from timm.models.vision_transformer import Block

    made = nn.ModuleDict(
        {
            "embed": nn.Linear(width, inner),
            "blocks": nn.Sequential(*(Block(inner, heads, qkv_bias=True) for _ in range(depth))),
            "norm": nn.LayerNorm(inner, eps=1e-6),
            "head": nn.Linear(inner, outputs),
        }
    )
    for module in made.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return made


def _decoded(decoder: nn.ModuleDict, features: Tensor) -> Tensor:
    out: Tensor = decoder["head"](decoder["norm"](decoder["blocks"](decoder["embed"](features))))
    return out
