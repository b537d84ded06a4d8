"""DToP: in semantic segmentation, tokens whose class is clear early leave the network, but for a few of each class."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.method import Card, Claim, InputError, Published, choice, configured, register, whole, within
from foveate.nn.vit import add_branches, embed, project, project_out, take_backbone, vision_transformer
from foveate.tokens import take

_BASE = {"backbone": "vit_base_patch16_224", "exits": (6, 8, 12), "width": 384, "heads": 6}
_LARGE = {"backbone": "vit_large_patch16_224", "exits": (8, 16, 24), "width": 512}


def _options(image: int) -> dict[str, Any]:
    return {"img_size": image, "class_token": False, "global_pool": "avg"}


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "vit-b-ade20k": _BASE | {"options": _options(512), "classes": 150, "confidence": 0.9, "stride": 341},
    "vit-l-ade20k": _LARGE | {"options": _options(640), "classes": 150, "heads": 8, "stride": 320},
    "vit-l-pascal-context": _LARGE | {"options": _options(480), "classes": 59, "heads": 16, "stride": 320},
    "vit-l-coco-stuff": _LARGE | {"options": _options(512), "classes": 171, "heads": 16, "stride": 341},
    "setr-vit-b-ade20k": _BASE | {"options": _options(512), "classes": 150, "head": "linear", "stride": 341},
    "tiny": {
        "backbone": "vit_tiny_patch16_224",
        "options": {
            "img_size": 96, "patch_size": 8, "embed_dim": 128, "depth": 5, "num_heads": 4, "pre_norm": True,
            "act_layer": "quick_gelu",
        },
        "exits": (2, 3, 5), "classes": 41, "width": 64, "heads": 4, "stride": 64,
    },
}  # fmt: skip
"""Arguments of `Dtop` by name: the paper's, and this project's "tiny", which takes the weights of the zoo's tiny-vit.
Where the exits of SETR are, and the strides of Pascal-Context and COCO-Stuff, is not known: ours."""


def _meta(name: str, **changes: Any) -> Callable[[], nn.Module]:
    return lambda: Dtop.named(name, confidence=1.0, **changes)


def _encoder(name: str) -> Callable[[], nn.Module]:
    return lambda: Encoder(Dtop.named(name, confidence=1.0, decoder_layers=1))


def _picture(side: int) -> Callable[[], Sequence[Any]]:
    return lambda: (torch.empty(1, 3, side, side),)


_SIZES = (
    # name, side, GMACs of the table without exits, GMACs of the encoder alone as counted for the card
    ("vit-b-ade20k", 512, 109.9e9, 106.9e9),
    ("vit-l-ade20k", 640, 617.0e9, 610.3e9),
    ("vit-l-pascal-context", 480, 315.4e9, 312.3e9),
    ("vit-l-coco-stuff", 512, 366.9e9, 361.6e9),
)


@register
class Dtop(Published, nn.Module, PyTorchModelHubMixin, library_name="foveate"):
    """A plain vision transformer with a segmentation head after each of M stages; clear tokens finish at the first.

    With S (B, K, n) a head's score of each of K classes for each of n tokens, at all exits but the last:

        v_i = max_c S_ci,  y_i = argmax_c S_ci,  E = {i still active: v_i > confidence}

    of the tokens in E, the `context` with the greatest v of each class y stay active, all others finish: they go
    through no later layer, and no later token attends to them. A finished token keeps the mask logits of the head where
    it finished; the presence of the classes in the picture is the last head's. With "atm" heads (SegViT, `AtmHead`)
    S = p_c sigmoid(m_ci), of presence p and mask logits m, and the result is p_c of the last head times sigmoid(m).
    With "linear" heads (one linear layer a token, as SETR or Segmenter could have; ours) S is a softmax over the
    classes, and the result are the logits.

    Pictures (B, 3, H, W) -> scores (B, K, H, W), bilinear from one a patch. Tokens of different pictures finish at
    different layers, each picture by itself: its result does not depend on the others of its batch.

    Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation, ICCV 2023,
    https://arxiv.org/abs/2308.01045, sections 3.2 to 3.4. In training tokens finish as well; the choice has no
    gradient. Class tokens of a backbone that has them (the paper's have none) stay throughout.

    Args:
        backbone: a VisionTransformer of timm by name.
        options: of its constructor; there is no norm behind the last layer, the heads have their own.
        exits: after how many layers each stage ends; the last is the depth.
        classes: K.
        confidence: p0; with 1 or more nothing finishes early.
        context: k, how many of the newly clear tokens of each class stay.
        head: "atm" or "linear".
        width, heads, decoder_layers: of the "atm" heads. The paper's have three layers; the printed FLOPs are those of
            one (three make 1.5 to 3.5 % more), which is what claims are counted with.
        dropout: in the "atm" heads.
        stride: px between two windows of `slide`.

    Raises:
        InputError: for numbers that do not go together, or a backbone that timm does not know.
    """

    card = Card(
        slug="dtop", title="Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation",
        arxiv="2308.01045", year=2023, kind="reduce", hosts=("timm",), training_free=False,
        summary="Finishes clear tokens of a segmentation early, but for a few of each class, which stay as context.",
        parameters={
            "backbone": "a VisionTransformer of timm by name",
            "options": "of the backbone's constructor",
            "exits": "after how many layers each head stands",
            "classes": "number of classes",
            "confidence": "score above which a token is clear; 1 for no early exit",
            "context": "how many clear tokens of each class stay",
            "head": "'atm' (SegViT) or 'linear'",
            "width": "channels of the heads",
            "heads": "attention heads in the heads",
            "decoder_layers": "layers of the heads",
            "dropout": "in the heads",
            "stride": "pixels between two windows of a larger picture",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(
                f"MACs of the encoder of {name}, no exits", "flops", figure, "card", counting="macs",
                model=_encoder(name), inputs=_picture(side),
            )
            for name, side, _, figure in _SIZES
        ),
        *(
            Claim(
                f"MACs of {name}, no exits, heads of one layer", "flops", figure, "README table", counting="macs",
                model=_meta(name, decoder_layers=1), inputs=_picture(side),
            )
            for name, side, figure, _ in _SIZES
        ),
    )  # fmt: skip

    def __init__(
        self, *, backbone: str = "vit_base_patch16_224", options: Mapping[str, Any] | None = None,
        exits: Sequence[int] = (6, 8, 12), classes: int = 150, confidence: float = 0.95, context: int = 5,
        head: str = "atm", width: int = 384, heads: int = 6, decoder_layers: int = 3, dropout: float = 0.1,
        stride: int = 341,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone = vision_transformer(backbone, {**(options or {}), "num_classes": 0, "final_norm": False})
        depth = len(self.backbone.blocks)
        if not isinstance(exits, list | tuple) or not exits:
            raise InputError(f"exits must be a list of numbers of layers, not {exits!r}")
        self.exits = tuple(whole("exits", one, 1) for one in exits)
        if list(self.exits) != sorted(set(self.exits)) or self.exits[-1] != depth:
            raise InputError(f"exits must ascend and end with the {depth} layers of {backbone}, not {exits!r}")
        self.classes = whole("classes", classes, 1)
        self.set_exits(confidence=confidence, context=context)
        self.stride = whole("stride", stride, 1)
        self.head = choice("head", head, ("atm", "linear"))
        channels = self.backbone.embed_dim
        if head == "atm" and whole("width", width, 1) % whole("heads", heads, 1):
            raise InputError(f"width must be a multiple of heads, not {width} with {heads} heads")
        self.decoders = nn.ModuleList(
            AtmHead(
                channels, classes, width=width, heads=heads, layers=whole("decoder_layers", decoder_layers, 1),
                dropout=within("dropout", dropout, "[0, 1)"),
            )
            if head == "atm" else LinearHead(channels, classes)
            for _ in self.exits
        )  # fmt: skip

    def set_exits(self, *, confidence: float | None = None, context: int | None = None) -> Dtop:
        """Changes the rule under the same weights ("@Direct" of the release); returns the model."""
        if confidence is not None:
            self.confidence = within("confidence", confidence, "[0, inf]")
        if context is not None:
            self.context = whole("context", context)
        return self

    @classmethod
    def named(cls, name: str, **changes: Any) -> Dtop:
        """The model of a name in `CONFIGURATIONS`, with some arguments changed, random weights; `options` are added
        to those of the name."""
        return cls(**configured(name, CONFIGURATIONS, changes))

    def load_backbone(self, model: nn.Module) -> list[str]:
        """Takes the weights of a timm VisionTransformer with the same blocks; a class token that this one does not
        have is left out. Returns the names of the backbone's weights that `model` does not have."""
        return take_backbone(self.backbone, model)

    def _embed(self, pictures: Tensor) -> Tensor:
        host = self.backbone
        if (side := tuple(pictures.shape[2:])) != tuple(host.patch_embed.img_size):
            raise InputError(f"pictures must be {host.patch_embed.img_size} px, not {side}; larger ones: `slide`")
        return embed(host, pictures)

    def stages(self, pictures: Tensor) -> Segmented:
        """All stages: what every head says, and who finished where."""
        x, prefix = self._embed(pictures), self.backbone.num_prefix_tokens
        batch, count = len(x), x.shape[1] - prefix
        active = torch.ones(batch, count, dtype=torch.bool, device=x.device)
        finished = torch.full((batch, count), len(self.exits) - 1, device=x.device)
        canvas = x.new_zeros(batch, self.classes, count)
        masks, presences, tokens = [], [], []
        first = 0
        for stage, (end, decoder) in enumerate(zip(self.exits, self.decoders)):
            x = self._run(self.backbone.blocks[first:end], x, active)
            first = end
            full = x[:, prefix:]
            mask, presence = self._judge(decoder, full, active)
            # Who finished keeps what its own head said.
            canvas = torch.where(active.unsqueeze(1), mask, canvas)
            masks.append(canvas)
            presences.append(presence)
            tokens.append(full)
            if stage < len(self.exits) - 1:
                clear = self.clear(self.score(mask.detach(), None if presence is None else presence.detach()), active)
                finished = torch.where(clear, stage, finished)
                active = active & ~clear
        return Segmented(masks, presences, tokens, finished)

    def _run(self, blocks: Any, x: Tensor, active: Tensor) -> Tensor:
        """Blocks on the active of x (B, prefix + n, C) alone; the others become 0."""
        if bool(active.all()) if not active.is_meta else True:
            for block in blocks:
                x = block(x)
            return x
        prefix = x.shape[1] - active.shape[1]
        alive = F.pad(active, (prefix, 0), value=True)
        counts = alive.sum(1).tolist()
        # Everything but attention goes token by token: all pictures' tokens in one sequence, without padding.
        flat, rows = x.flatten(0, 1), alive.flatten().nonzero().squeeze(1)
        packed = flat.index_select(0, rows).unsqueeze(0)
        for block in blocks:
            parts = [one.split(counts, 2) for one in project(block.attn, block.norm1(packed))]
            out = [
                F.scaled_dot_product_attention(query, key, value, scale=block.attn.scale)
                for query, key, value in zip(*parts)
                if query.shape[2]
            ]
            attended = torch.cat(out, 2) if out else parts[2][0]
            packed = add_branches(block, packed, project_out(block.attn, attended))
        return torch.zeros_like(flat).index_copy(0, rows, packed.squeeze(0)).view(x.shape)

    def _judge(self, decoder: Any, full: Tensor, active: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a head says of the active of `full` (B, n, C): mask logits (B, K, n), 0 for the others, and presence."""
        if active.is_meta or bool(active.all()):
            said: tuple[Tensor, Tensor | None] = decoder(full, None)
            return said
        counts = active.sum(1)
        # The active ones first, in order; as many as the picture has that has most.
        order = (~active).long().argsort(dim=1, stable=True)[:, : max(1, int(counts.max()))]
        valid = torch.arange(order.shape[1], device=full.device) < counts.unsqueeze(1)
        mask, presence = decoder(take(full, order), valid)
        where = order.unsqueeze(1).expand_as(mask)
        out = mask.new_zeros(*mask.shape[:2], full.shape[1])
        return out.scatter(2, where, mask * valid.unsqueeze(1)), presence

    @staticmethod
    def score(mask: Tensor, presence: Tensor | None) -> Tensor:
        """S (B, K, n) of mask logits (B, K, n) and presence logits (B, K, 2)."""
        return mask.softmax(1) if presence is None else present(presence).unsqueeze(2) * mask.sigmoid()

    @torch.no_grad()
    def clear(self, score: Tensor, active: Tensor) -> Tensor:
        """(B, n) bool: which tokens finish, of scores (B, K, n)."""
        best, label = score.max(1)
        candidate = active & (best > self.confidence)
        # Of each class the most confident first, candidates before all others.
        order = best.masked_fill(~candidate, -math.inf).argsort(dim=1, descending=True, stable=True)
        group = torch.where(candidate, label, self.classes).gather(1, order)
        by_class = group.argsort(dim=1, stable=True)
        order, group = order.gather(1, by_class), group.gather(1, by_class)
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        starts = F.pad(group[:, 1:] != group[:, :-1], (1, 0), value=True)
        rank = place - torch.where(starts, place, 0).cummax(1).values
        goes = (rank >= self.context) & (group < self.classes)
        return torch.zeros_like(candidate).scatter(1, order, goes)

    def forward_features(self, pictures: Tensor) -> Tensor:
        """(B, n, C) tokens of the last layer, zeros where a token finished before."""
        return self.stages(pictures).tokens[-1]

    def forward(self, pictures: Tensor) -> Tensor:
        low = self.patch_scores(self.stages(pictures))
        return F.interpolate(low, size=pictures.shape[2:], mode="bilinear", align_corners=False)

    def patch_scores(self, said: Segmented) -> Tensor:
        """(B, K, h, w): the result, one for each patch in raster order."""
        presence = said.presences[-1]
        scores = said.masks[-1] if presence is None else self.score(said.masks[-1], presence)
        return scores.unflatten(2, self.backbone.patch_embed.grid_size)

    @torch.no_grad()
    def slide(self, picture: Tensor) -> Tensor:
        """Scores (B, K, H, W) of pictures at least as large as the model's: the mean of windows `stride` apart."""
        (height, width), (high, wide) = self.backbone.patch_embed.img_size, picture.shape[2:]
        if high < height or wide < width:
            raise InputError(f"pictures must be at least {height} x {width} px, not {high} x {wide}")
        total = picture.new_zeros(len(picture), self.classes, high, wide)
        seen = picture.new_zeros(high, wide)
        for top in _windows(high, height, self.stride):
            for left in _windows(wide, width, self.stride):
                window = (..., slice(top, top + height), slice(left, left + width))
                total[window] += self(picture[window])
                seen[window] += 1
        return total / seen

    def loss(self, pictures: Tensor, labels: Tensor, ignore: int = 255) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over all heads, and the last head's parts.

        "atm": 20 focal + dice of the masks, of the classes that are there (query c is class c: nothing is matched), and
        cross entropy of presence, absent classes with weight 0.1. "linear": cross entropy of the patches.

        Args:
            labels: (B, h, w) long, one for each pixel, patch or anything between; `ignore` counts nowhere.
        """
        said = self.stages(pictures)
        total, parts = pictures.new_zeros(()), {}
        for mask, presence in zip(said.masks, said.presences):
            logits = mask.unflatten(2, self.backbone.patch_embed.grid_size)
            if logits.shape[2:] != labels.shape[1:]:
                logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
            if presence is None:
                parts = {"patches": F.cross_entropy(logits, labels, ignore_index=ignore)}
                total = total + parts["patches"]
            else:
                parts = atm_loss(logits, presence, labels, ignore)
                total = total + 20 * parts["focal"] + parts["dice"] + parts["presence"]
        parts["active"] = (said.finished == len(self.exits) - 1).float().mean()
        return total, parts


def _windows(whole_: int, size: int, stride: int) -> list[int]:
    """Where windows begin; the last one ends where the picture does."""
    return sorted({min(start, whole_ - size) for start in range(0, whole_ - size + stride, stride)})


@dataclass(frozen=True, eq=False)
class Segmented:
    """What the heads say of B pictures with n patches.

    Attributes:
        masks: mask logits (B, K, n) of each head, of finished tokens those of the head where they finished.
        presences: presence logits (B, K, 2) of each head, [present, absent]; None for linear heads.
        tokens: (B, n, C) what each head saw, zeros for finished tokens.
        finished: (B, n) long, at which head each token finished, from 0; for overlays.
    """

    masks: list[Tensor]
    presences: list[Tensor | None]
    tokens: list[Tensor]
    finished: Tensor


class Encoder(nn.Module):
    """The backbone of a `Dtop` without its heads, for what it costs."""

    def __init__(self, model: Dtop) -> None:
        super().__init__()
        self.backbone = model.backbone

    def forward(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.backbone.forward_features(pictures)
        return features


def present(presence: Tensor) -> Tensor:
    """(B, K): the probability that a class is in the picture, of logits (B, K, 2)."""
    return presence.softmax(-1)[..., 0]


class LinearHead(nn.Module):
    """Logits (B, K, n) of tokens (B, n, C), each by itself."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm, self.classify = nn.LayerNorm(channels), nn.Linear(channels, classes)

    def forward(self, tokens: Tensor, valid: Tensor | None) -> tuple[Tensor, None]:
        return self.classify(self.norm(tokens)).transpose(1, 2), None


class AtmHead(nn.Module):
    """SegViT's attention-to-mask decoder: K learned queries, one a class, read the tokens.

    Tokens (B, n, C) -> LN(Linear) (B, n, d); each layer, with norms behind: self-attention of the queries, attention to
    the tokens, MLP. Mask logits (B, K, n) are those of the last layer's attention to the tokens, scaled, before the
    softmax, the mean over heads; presence logits (B, K, 2) are a linear layer's of the queries.
    """

    def __init__(
        self, channels: int, classes: int, *, width: int, heads: int, layers: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.reduce, self.norm = nn.Linear(channels, width), nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(classes, width))
        self.layers = nn.ModuleList(_AtmLayer(width, heads, dropout) for _ in range(layers))
        self.presence = nn.Linear(width, 2)

    def forward(self, tokens: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """`valid` (B, n) bool: False for tokens that nothing attends to; None for all."""
        memory = self.norm(self.reduce(tokens))
        # A view of a weight that is made without gradients trips PyTorch's FLOP counter.
        queries = self.queries.repeat(len(tokens), 1, 1)
        for layer in self.layers:
            queries, logits = layer(queries, memory, valid)
        return logits, self.presence(queries)


class _AtmLayer(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.among = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.drop = nn.Dropout(dropout)

    def forward(self, queries: Tensor, memory: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        queries = self.norms[0](queries + self.drop(self.among(queries, queries, queries, need_weights=False)[0]))
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, queries), (self.key, memory), (self.value, memory))
        )
        logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if valid is None:
            weights = logits.softmax(-1)
        else:
            seen = valid[:, None, None]
            # Of a picture without active tokens nothing is read, instead of NaN.
            weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1) * seen
        read = self.out((weights @ value).transpose(1, 2).flatten(2))
        queries = self.norms[1](queries + self.drop(read))
        return self.norms[2](queries + self.drop(self.mlp(queries))), logits.mean(1)


def atm_loss(logits: Tensor, presence: Tensor, labels: Tensor, ignore: int) -> dict[str, Tensor]:
    """The parts "focal", "dice" and "presence" of one head.

    Mask logits (B, K, h, w), presence logits (B, K, 2), labels (B, h, w).

    Focal (alpha 0.25, gamma 2): mean over the pixels of a mask; dice: 1 - (2 sum p t + 1) / (sum p + sum t + 1); both
    summed over the masks of all classes that are there, divided by their number. An ignored pixel is in no mask.
    """
    classes = logits.shape[1]
    known = labels != ignore
    target = F.one_hot(torch.where(known, labels, classes), classes + 1)[..., :classes].permute(0, 3, 1, 2)
    there = target.flatten(2).any(2)
    weight = presence.new_tensor([1.0, 0.1])
    found = F.cross_entropy(presence.flatten(0, 1), (~there).long().flatten(), weight)
    mask, wanted, seen = logits[there], target[there].to(logits.dtype), known.unsqueeze(1).expand_as(target)[there]
    count = max(1, len(mask))
    p = mask.sigmoid()
    error = F.binary_cross_entropy_with_logits(mask, wanted, reduction="none")
    missed = torch.where(wanted > 0, 1 - p, p)
    balance = torch.where(wanted > 0, 0.25, 0.75)
    focal = (balance * missed.square() * error * seen).flatten(1).sum(1) / seen.flatten(1).sum(1).clamp(min=1)
    p = (p * seen).flatten(1)
    wanted = wanted.flatten(1)
    dice = 1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)
    return {"focal": focal.sum() / count, "dice": dice.sum() / count, "presence": found}
