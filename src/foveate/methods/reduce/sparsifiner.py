"""Sparsifiner: every query of a vision transformer attends to a few keys, which a small network finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.method import Card, Claim, InputError, Published, choice, configured, register, share, whole, within
from foveate.nn.sparse_attention import PRODUCTS, largest, places, ragged_places, sparse_attention, weighted_rows
from foveate.nn.vit import add_branches, embed, project, project_out, take_weights, vision_transformer
from foveate.tokens import take

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "deit-t": {"backbone": "deit_tiny_patch16_224"},
    "deit-s": {},
    "deit-b": {"backbone": "deit_base_patch16_224"},
    "lv-vit-s": {"backbone": "lv-vit"},
    "tiny": {
        "backbone": "vit_tiny_patch16_224",
        "options": {
            "img_size": 96, "patch_size": 8, "embed_dim": 128, "depth": 5, "num_heads": 4, "num_classes": 40,
            "pre_norm": True, "act_layer": "quick_gelu",
        },
        "prune_layers": (1, 2, 3),
    },
}  # fmt: skip
"""Arguments of `Sparsifiner` by name: the paper's DeiT-S and LV-ViT-S, DeiT's other sizes, and this project's "tiny",
which takes the weights of the zoo's tiny-vit."""

_ABOVE = 1e-4
"""Entries of the estimate above it are kept with select = "threshold"."""
_SMALL_COEFFICIENT = 0.05
"""Coefficients up to it are 0 where their number is not limited."""


def _saved(budget: float) -> Callable[[Any], float]:
    def count(cls: Any) -> float:
        return 1 - cls.attention_macs(197, 6, 64, budget) / (2 * 197**2 * 384)

    return count


def _predictors(_: Any) -> float:
    with torch.device("meta"):
        return float(sum(weight.numel() for weight in Sparsifiner.named("deit-s").predictors.parameters()))


def _sparsity(cls: Any) -> float:
    """Of one head of DeiT-S, the class token's row included."""
    return 1 - (196 * cls.keys(197, 0.25) + 197) / 197**2


@register
class Sparsifiner(Published, nn.Module, PyTorchModelHubMixin, library_name="foveate"):
    """A vision transformer whose queries attend to few keys, chosen by a low-rank estimate of the attention.

    Of a layer's q, k, v (B, H, N, d), the class token first, a `Connectivity` of the layer estimates the attention of
    all queries but the class token's, A' (B, H, N-1, N) = C U:

        C = softmax(q' k~ / sqrt(H)),  q' = W_q q + b,  k~ = (W_k k + b)^T P,   d -> d/2 channels, N -> N/6 tokens

    with the `coefficients` greatest of each row of C and a sparse, non-negative basis U = |P_back|^T. The
    b = ceil(budget N) greatest entries of each row of A' are the query's keys: another set for each image, head and
    query. Attention proper, softmax(q k^T / sqrt(d)) v, is computed for these only (`sparse_attention`: the rest is
    skipped, not masked); the class token attends to all. Pictures (B, 3, H, W) -> logits (B, classes).

    With `prune` < 1, tokens go as well: after each of `prune_layers` the patch tokens to which the class token attends
    most stay, ceil(prune^i (N-1)) of them. In the release they stay as zeros in a sequence of the same length; here
    they leave it, and so add nothing to k~ either.

    Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers, CVPR 2023,
    https://arxiv.org/abs/2303.13755, section 3. Training has two stages: `reconstruction_loss` makes the predictors
    (and nothing else) imitate the dense attention; then `finetune_loss` trains the rest, to which the choice of keys is
    a constant. With gradients the product is a dense one under a mask, as in the release.

    Args:
        backbone: a VisionTransformer of timm by name, or "lv-vit".
        options: of its constructor. The predictors work for the number of tokens that its image size makes.
        budget: share of the N keys that a query attends to; 1 is dense attention.
        reduce_channels, reduce_tokens: by what d and N are divided.
        coefficients: how many of each row of C stay; 0 to keep those above 0.05 instead.
        basis_threshold: entries of |P_back| up to it are 0.
        select: "top", the b greatest entries of A'; or "threshold", all above 1e-4.
        share_basis: whether U is made of P instead of a P_back of its own.
        scale: "heads", C's logits are divided by sqrt(H), as released; or "width", by sqrt(d).
        prune, prune_layers: see above; no tokens go with prune = 1.
        product: how attention is computed, see `foveate.nn.sparse_attention.sparse_attention`.

    Raises:
        InputError: for numbers that do not go together, or a backbone that timm does not know.
    """

    card = Card(
        slug="sparsifiner",
        title="Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
        arxiv="2303.13755", year=2023, kind="reduce", hosts=("timm",), training_free=False,
        summary="Lets every query of a vision transformer attend to a few keys that a low-rank estimate finds.",
        parameters={
            "backbone": "a VisionTransformer of timm by name, or lv-vit",
            "options": "of the backbone's constructor",
            "budget": "share of all keys that a query attends to",
            "reduce_channels": "by what the estimate divides the channels of a head",
            "reduce_tokens": "by what it divides the tokens",
            "coefficients": "non-zero coefficients of each query, 0 for those above 0.05",
            "basis_threshold": "entries of the basis up to it are 0",
            "select": "'top' entries of the estimate, or all above a 'threshold'",
            "share_basis": "whether the basis is the matrix that reduces the tokens",
            "scale": "of the estimate's logits: 1 / sqrt of the number of 'heads' or of a head's 'width'",
            "prune": "share of the patch tokens that each of prune_layers leaves",
            "prune_layers": "layers after which tokens go",
            "product": "how the sparse attention is computed",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(
                f"share of DeiT-S's attention MACs that goes, budget {budget}", "value", figure, "abstract",
                tolerance=0.01, value=_saved(budget),
            )
            for budget, figure in ((0.25, 0.48), (0.05, 0.69))
        ),
        Claim(
            "parameters of deit-s", "parameters", 22_251_880, "card", tolerance=0,
            model=lambda: Sparsifiner.named("deit-s"),
        ),
        Claim("parameters of the predictors of deit-s", "value", 201_216, "card", tolerance=0, value=_predictors),
        Claim(
            "keys of a query of 197, budget 0.25", "value", 50, "card", tolerance=0,
            value=lambda cls: float(cls.keys(197, 0.25)),
        ),
        Claim("share of 0 in the mask of DeiT-S, budget 0.25", "value", 0.742, "card", 0.001, value=_sparsity),
    )  # fmt: skip

    def __init__(
        self, *, backbone: str = "deit_small_patch16_224", options: Mapping[str, Any] | None = None,
        budget: float = 0.25, reduce_channels: int = 2, reduce_tokens: int = 6, coefficients: int = 8,
        basis_threshold: float = 0.02, select: str = "top", share_basis: bool = False, scale: str = "heads",
        prune: float = 1.0, prune_layers: Sequence[int] = (3, 6, 9), product: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        self.budget = share("budget", budget)
        self.select = choice("select", select, ("top", "threshold"))
        self.prune = share("prune", prune)
        self.product = choice("product", product, PRODUCTS)
        if not isinstance(prune_layers, list | tuple):
            raise InputError(f"prune_layers must be a list of layers, not {prune_layers!r}")
        self.prune_layers = tuple(whole("prune_layers", layer) for layer in prune_layers)
        self.backbone = vision_transformer(backbone, options)
        blocks = self.backbone.blocks
        if self.prune < 1:
            if list(self.prune_layers) != sorted(set(self.prune_layers)) or max(self.prune_layers, default=0) >= len(
                blocks
            ):
                raise InputError(f"prune_layers must ascend within 0..{len(blocks) - 1}, not {prune_layers!r}")
            if self.backbone.cls_token is None:
                raise InputError(f"tokens go by the class token's attention, which {backbone} does not have; prune = 1")
        if blocks[0].attn.attn_drop.p:
            raise InputError("attn_drop_rate must be 0: attention that is not computed cannot be dropped")
        self.count = int(self.backbone.patch_embed.num_patches) + self.backbone.num_prefix_tokens
        attention = blocks[0].attn
        self.predictors = nn.ModuleList(
            Connectivity(
                self.count, attention.head_dim, attention.num_heads, reduce_channels=reduce_channels,
                reduce_tokens=reduce_tokens, coefficients=coefficients, basis_threshold=basis_threshold,
                share_basis=share_basis, scale=scale,
            )
            for _ in blocks
        )  # fmt: skip

    @staticmethod
    def keys(tokens: int, budget: float) -> int:
        """b = ceil(budget N): 50 of 197 at 0.25."""
        return math.ceil(budget * tokens - 1e-9)

    @classmethod
    def attention_macs(
        cls, tokens: int, heads: int, width: int, budget: float, *, reduce_channels: int = 2, reduce_tokens: int = 6,
        coefficients: int = 8, density: float = 0.3,
    ) -> float:  # fmt: skip
        """Multiply-adds of q k^T and its product with v in one layer, the predictor's included, as the paper counts.

        `density` is the share of the basis that is not 0 (0.3 for the card); `forward` does not skip these zeros: 1.
        The class token's row counts like the others.
        """
        reduced, narrow = tokens // reduce_tokens, width // reduce_channels
        predictor = 2 * tokens * heads * width * narrow + 2 * heads * narrow * tokens * reduced
        estimate = heads * tokens * coefficients * tokens * density
        return predictor + estimate + 2 * heads * tokens * cls.keys(tokens, budget) * width

    @classmethod
    def named(cls, name: str, **changes: Any) -> Sparsifiner:
        """The model of a name in `CONFIGURATIONS`, with some arguments changed, random weights; `options` are added
        to those of the name."""
        return cls(**configured(name, CONFIGURATIONS, changes))

    def load_backbone(self, model: nn.Module) -> list[str]:
        """Takes the weights of a timm VisionTransformer of the same shape, or of another `Sparsifiner`'s backbone.
        Returns the names of the backbone's weights that `model` does not have."""
        source = model.backbone if isinstance(model, Sparsifiner) else model
        return take_weights(self.backbone, source.state_dict())

    def _embed(self, pictures: Tensor) -> Tensor:
        host = self.backbone
        if (side := tuple(pictures.shape[2:])) != tuple(host.patch_embed.img_size):
            raise InputError(
                f"pictures must be {host.patch_embed.img_size} px, not {side}: the predictors have a row of weights "
                f"for each of the {self.count} tokens"
            )
        return embed(host, pictures)

    def _run(self, pictures: Tensor, record: list[Looked] | None = None) -> tuple[Tensor, Tensor | None]:
        """The tokens that are left, (B, K, C), with the final norm, and the places (B, K) of each, None for all."""
        x, where, prefix = self._embed(pictures), None, self.backbone.num_prefix_tokens
        for number, block in enumerate(self.backbone.blocks):
            query, key, value = project(block.attn, block.norm1(x))
            scale = block.attn.scale
            rows = query[:, :, prefix:]
            index, valid = self.connect(number, rows, key, where)
            if index is None:
                out = F.scaled_dot_product_attention(query, key, value, scale=scale)
            else:
                few = sparse_attention(rows, key, value, index, valid, scale, self.product)
                out = torch.cat([F.scaled_dot_product_attention(query[:, :, :prefix], key, value, scale=scale), few], 2)
            if record is not None:
                record.append(_look(query, key, index, valid, scale, prefix, where))
            x = add_branches(block, x, project_out(block.attn, out))
            if self.prune < 1 and number in self.prune_layers:
                logits = query[:, :, :1].detach().float() @ key.detach().float().transpose(-1, -2) * scale
                score = logits.softmax(-1).mean(1)[:, 0, prefix:]
                left = math.ceil(self.prune ** (self.prune_layers.index(number) + 1) * (self.count - prefix) - 1e-9)
                stay = places(largest(score, left), min(left, score.shape[1])) + prefix
                first = torch.arange(prefix, device=x.device).expand(len(x), -1)
                stay = torch.cat([first, stay], 1)
                x = take(x, stay)
                where = stay if where is None else where.gather(1, stay)
        normed: Tensor = self.backbone.norm(x)
        return normed, where

    @torch.no_grad()
    def connect(
        self, layer: int, query: Tensor, key: Tensor, where: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The keys of each query: `index` and `valid` of `sparse_attention`; None for dense attention.

        query (B, H, R, d) without the class token's, key (B, H, K, d), at the places (B, K) of the N tokens.
        """
        count = min(self.keys(self.count, self.budget), key.shape[2])
        if count == key.shape[2] and self.select == "top":
            return None, None
        predictor: Any = self.predictors[layer]
        estimate = predictor.estimate(query, key, where)
        if self.select == "threshold":
            return ragged_places(estimate > _ABOVE)
        return places(largest(estimate, count), count), None

    def forward_features(self, pictures: Tensor) -> Tensor:
        """(B, N, C) tokens with the final norm; zeros where tokens went."""
        x, where = self._run(pictures)
        if where is None:
            return x
        return x.new_zeros(len(x), self.count, x.shape[2]).scatter(1, where.unsqueeze(-1).expand_as(x), x)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, classes) of tokens with the final norm, or what the classifier reads."""
        logits: Tensor = self.backbone.forward_head(tokens, pre_logits=pre_logits)
        return logits

    def forward(self, pictures: Tensor) -> Tensor:
        return self.forward_head(self._run(pictures)[0])

    @torch.no_grad()
    def look(self, pictures: Tensor) -> list[Looked]:
        """What every layer attends to, as dense maps: for overlays and tests."""
        record: list[Looked] = []
        self._run(pictures, record)
        return record

    # -- training

    def dense(self, pictures: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The last tokens (B, N, C) of the backbone with dense attention, and queries and keys of all its layers."""
        x, seen = self._embed(pictures), []
        for block in self.backbone.blocks:
            query, key, value = project(block.attn, block.norm1(x))
            out = F.scaled_dot_product_attention(query, key, value, scale=block.attn.scale)
            seen.append((query, key))
            x = add_branches(block, x, project_out(block.attn, out))
        normed: Tensor = self.backbone.norm(x)
        return normed, seen

    def reconstruction_loss(self, pictures: Tensor, weight: float = 0.01) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 1: `weight` x the mean over layers of the SUM of (A' - A)^2 over all but the class token's rows.

        Here A' = C P_back^T with all of C and the signs of P_back. The teacher is the model itself with dense
        attention, which this stage does not change: no gradient reaches the backbone. `recall` among the parts is the
        share of the truly greatest keys that the sparse estimate would choose.
        """
        prefix = self.backbone.num_prefix_tokens
        with torch.no_grad():
            _, seen = self.dense(pictures)
        losses, recalls = [], []
        predictors: Any = self.predictors
        for block, predictor, (query, key) in zip(self.backbone.blocks, predictors, seen):
            rows = query[:, :, prefix:]
            with torch.no_grad():
                wanted = (rows @ key.transpose(-1, -2) * block.attn.scale).softmax(-1)
                count = min(self.keys(self.count, self.budget), wanted.shape[-1])
                both = largest(predictor.estimate(rows, key), count) & largest(wanted, count)
                recalls.append(both.sum() / (both.numel() / both.shape[-1] * count))
            losses.append((predictor.reconstruct(rows, key) - wanted).square().sum())
        loss = torch.stack(losses).mean()
        return weight * loss, {"reconstruction": loss, "recall": torch.stack(recalls).mean()}

    def finetune_loss(
        self, pictures: Tensor, target: Tensor, teacher: Any, *, logit_weight: float = 0.5,
        token_weight: float = 0.5,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Stage 2: task + `logit_weight` KL(teacher || model) + `token_weight` MSE of the last layer's patch tokens.

        Args:
            target: (B,) long, classes of which there is one; or (B, classes) float, a yes or no for each (ours: binary
                cross entropy summed over the classes, for the KL too).
            teacher: a dense timm VisionTransformer of the same shape; it gets no gradient.
        """
        prefix = self.backbone.num_prefix_tokens
        with torch.no_grad():
            wanted_tokens = teacher.forward_features(pictures)
            wanted = teacher.forward_head(wanted_tokens)
        x, where = self._run(pictures)
        logits = self.forward_head(x)
        if target.is_floating_point():
            task = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1).mean()
            sure = wanted.sigmoid()
            entropy = F.binary_cross_entropy_with_logits(wanted, sure, reduction="none")
            agree = (F.binary_cross_entropy_with_logits(logits, sure, reduction="none") - entropy).sum(1).mean()
        else:
            task = F.cross_entropy(logits, target)
            agree = F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")
        if where is not None:
            wanted_tokens = take(wanted_tokens, where)
        tokens = F.mse_loss(x[:, prefix:], wanted_tokens[:, prefix:])
        loss = task + logit_weight * agree + token_weight * tokens
        return loss, {"task": task, "logits": agree, "tokens": tokens}


@dataclass(frozen=True, eq=False)
class Looked:
    """A layer's attention as dense maps.

    Attributes:
        mask: (B, H, K, K) bool, which keys each query attends to; the class token's rows come first.
        attention: (B, H, K, K) float32, probabilities.
        places: (B, K) long, the places of the K tokens among all N.
    """

    mask: Tensor
    attention: Tensor
    places: Tensor


def _look(
    query: Tensor, key: Tensor, index: Tensor | None, valid: Tensor | None, scale: float, prefix: int,
    where: Tensor | None,
) -> Looked:  # fmt: skip
    logits = query.float() @ key.float().transpose(-1, -2) * scale
    mask = torch.ones_like(logits, dtype=torch.bool)
    if index is not None:
        allowed = torch.ones_like(index) if valid is None else valid.long()
        mask[:, :, prefix:] = torch.zeros_like(logits[:, :, prefix:]).long().scatter_add(-1, index, allowed) > 0
    weights = logits.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num(0)
    if where is None:
        where = torch.arange(query.shape[2], device=query.device).expand(len(query), -1)
    return Looked(mask, weights, where)


class Connectivity(nn.Module):
    """Estimates the attention of a layer's heads, which share its weights: (B, H, R, d), (B, H, K, d) -> (B, H, R, K).

    R queries, K of the N keys that it was made for, the others having left. See `Sparsifiner` for the formula.
    """

    def __init__(
        self, tokens: int, width: int, heads: int, *, reduce_channels: int = 2, reduce_tokens: int = 6,
        coefficients: int = 8, basis_threshold: float = 0.02, share_basis: bool = False, scale: str = "heads",
    ) -> None:  # fmt: skip
        super().__init__()
        narrow = width // whole("reduce_channels", reduce_channels, 1)
        reduced = tokens // whole("reduce_tokens", reduce_tokens, 1)
        if not narrow or not reduced:
            raise InputError(f"reduce_channels or reduce_tokens leave nothing of {width} channels, {tokens} tokens")
        self.coefficients = whole("coefficients", coefficients)
        self.basis_threshold = within("basis_threshold", basis_threshold, "[0, inf)")
        if not isinstance(share_basis, bool):
            raise InputError(f"share_basis must be true or false, not {share_basis!r}")
        self.scale = {"heads": heads, "width": width}[choice("scale", scale, ("heads", "width"))] ** -0.5
        self.query, self.key = nn.Linear(width, narrow), nn.Linear(width, narrow)
        self.down = nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, reduced), std=0.02))
        self.back = None if share_basis else nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, reduced), std=0.02))

    def soft_coefficients(self, query: Tensor, key: Tensor, where: Tensor | None = None) -> Tensor:
        """(B, H, R, n): C before anything is left out; rows add up to 1."""
        if where is None and key.shape[2] != len(self.down):
            raise InputError(f"this predictor is for {len(self.down)} tokens, not {key.shape[2]}")
        down = self.down if where is None else self.down[where].unsqueeze(1)
        reduced = self.key(key).transpose(-1, -2) @ down
        coefficients: Tensor = (self.query(query) @ reduced * self.scale).softmax(-1)
        return coefficients

    def basis(self, where: Tensor | None = None) -> Tensor:
        """(n, N) or, for some of the tokens, (B, n, K): U with its signs, as the first stage of training has it."""
        back = self.down if self.back is None else self.back
        return back.T if where is None else back[where].transpose(1, 2)

    def sparse_basis(self, where: Tensor | None = None) -> Tensor:
        """`basis` without signs, and 0 where it is small."""
        basis = self.basis(where).abs()
        return basis * (basis > self.basis_threshold)

    def reconstruct(self, query: Tensor, key: Tensor) -> Tensor:
        """A' of the first stage of training: all coefficients, signed basis."""
        return self.soft_coefficients(query, key) @ self.basis()

    def estimate(self, query: Tensor, key: Tensor, where: Tensor | None = None) -> Tensor:
        """A' >= 0 of everything else, (B, H, R, K): the greatest coefficients, not made to add up to 1 again, times
        the sparse basis. Only the rows of the basis with a coefficient are added up."""
        soft = self.soft_coefficients(query, key, where)
        basis = self.sparse_basis(where)
        if not self.coefficients:
            return (soft * (soft > _SMALL_COEFFICIENT)) @ (basis if where is None else basis.unsqueeze(1))
        count = min(self.coefficients, soft.shape[-1])
        index = places(largest(soft, count), count)
        weights = soft.gather(-1, index)
        if where is not None:
            samples = torch.arange(len(soft), device=soft.device)
            index = index + basis.shape[1] * samples[:, None, None, None]
        # Rows of whole vectors are ten times as fast.
        table = F.pad(basis.flatten(0, -2), (0, -basis.shape[-1] % 16))
        rows = weighted_rows(table, index.flatten(0, 2), weights.flatten(0, 2))[:, : basis.shape[-1]]
        return rows.reshape(*soft.shape[:3], -1)
