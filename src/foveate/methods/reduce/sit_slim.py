"""SiT: a vision transformer whose tokens become fewer convex combinations of themselves, stage by stage."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.method import Card, Claim, InputError, Published, choice, configured, register, share, whole, within
from foveate.nn.vit import LV_VIT, embed, take_weights, vision_transformer

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "sit-t": {
        "options": {"embed_dim": 320, "depth": 14, "num_heads": 5}, "stage_blocks": (1, 1, 1, 11),
    },
    "sit-xs": {
        "options": {"embed_dim": 384, "depth": 16, "num_heads": 6, "drop_path_rate": 0.1},
        "stage_blocks": (1, 1, 1, 13),
    },
    "sit-s": {
        "options": {"embed_dim": 384, "depth": 16, "num_heads": 6, "drop_path_rate": 0.1},
        "stage_blocks": (9, 3, 2, 2),
    },
    "sit-m": {
        "options": {"embed_dim": 512, "depth": 20, "num_heads": 8, "drop_path_rate": 0.1},
        "stage_blocks": (10, 4, 3, 3),
    },
    "sit-l": {
        "options": {
            "embed_dim": 768, "depth": 24, "num_heads": 12, "img_size": 288, "skip": 3.0, "thick_stem": True,
            "drop_path_rate": 0.3,
        },
        "stage_blocks": (10, 4, 3, 7),
    },
    "deit-t": {"backbone": "deit_tiny_patch16_224", "stage_blocks": (3, 3, 3, 3), "aux_head": False},
    "deit-s": {"backbone": "deit_small_patch16_224", "stage_blocks": (3, 3, 3, 3), "aux_head": False},
    "deit-b": {"backbone": "deit_base_patch16_224", "stage_blocks": (3, 3, 3, 3), "aux_head": False},
    "tiny": {
        "backbone": "vit_tiny_patch16_224",
        "options": {
            "img_size": 96, "patch_size": 8, "embed_dim": 128, "depth": 5, "num_heads": 4, "num_classes": 40,
            "pre_norm": True, "act_layer": "quick_gelu",
        },
        "stage_blocks": (2, 1, 1, 1), "aux_head": False,
    },
}  # fmt: skip
"""Arguments of `SitSlim` by name: the paper's five, DeiT (where the stages end is ours: the paper has such models, its
release none) and this project's "tiny", which takes the weights of the zoo's tiny-vit."""


def _meta(name: str, **changes: Any) -> Callable[[], nn.Module]:
    return lambda: SitSlim.named(name, **changes)


def _picture(side: int) -> Callable[[], Sequence[Any]]:
    return lambda: (torch.empty(1, 3, side, side),)


@functools.lru_cache(maxsize=8)
def _recalibration(name: str) -> FeatureRecalibration:
    with torch.device("meta"):
        return FeatureRecalibration(SitSlim.named(name), SitSlim.named(name, keep=1.0))


def _counts(stage: int, patches: int) -> Callable[[Any], float]:
    return lambda cls: float(cls.left(patches, 0.5, 4)[stage])


_SIZES = (
    # name, side, parameters, FLOPs of the table, FLOPs counted for the card, parameters of the reverse modules
    ("sit-t", 224, 15_872_934, 1.0e9, 0.992e9, 14.0e6),
    ("sit-xs", 224, 25_625_774, 1.5e9, 1.487e9, 21.8e6),
    ("sit-s", 224, 25_625_774, 4.0e9, 4.027e9, 11.1e6),
    ("sit-m", 224, 55_642_302, 8.1e9, 8.037e9, 25.3e6),
    ("sit-l", 288, 148_168_398, 34.4e9, 34.37e9, 78.8e6),
)
_TEACHERS = (("sit-t", 224, 3.5e9), ("sit-s", 224, 5.5e9), ("sit-m", 224, 11.9e9), ("sit-l", 288, 56.1e9))


@register
class SitSlim(Published, nn.Module, PyTorchModelHubMixin, library_name="foveate"):
    """A vision transformer that slims its patch tokens between stages, N -> floor(N/2) -> floor(N/4) -> floor(N/8).

    After the last block of each stage but the last, the patch tokens X (B, N, C) become K fewer (`TokenSlimming`):

        A = softmax over the N tokens of s W(X),   W = Linear(C/2 -> K)(GELU(Linear(C -> C/2)(LN(X)))),   X' = A^T X

    so that every new token is a convex combination of the old ones, and another one for every picture. K is
    `floor(keep^i N)` of the tokens that there were at first. Class and distillation tokens pass by; position
    embeddings are added once, before the first block. Pictures (B, 3, H, W) -> logits (B, classes), as any model of
    timm. `FeatureRecalibration` is how it is trained.

    Self-slimmed Vision Transformer, ECCV 2022, https://arxiv.org/abs/2111.12624, sections 3.1 to 3.3. Of the release
    only counts were at hand, for the paper's card. The stem's activations (GELU, none after the last) are this
    project's choice. `backbone` is any VisionTransformer of timm, or "lv-vit". With keep = 1 nothing is slimmed: that
    is the teacher.

    Args:
        backbone: a timm name, or "lv-vit" (`foveate.nn.vit.lv_vit`).
        options: of its constructor.
        stage_blocks: blocks in each stage; their sum is the depth.
        keep: share of the tokens that a stage's end leaves, of those that entered, in (0, 1].
        aux_head: whether there is LV-ViT's head for patch tokens, which is carried along frozen and unused.

    Raises:
        InputError: for numbers that do not go together, or a backbone that timm does not know.
    """

    card = Card(
        slug="sit-slim", title="Self-slimmed Vision Transformer", arxiv="2111.12624", year=2021, kind="reduce",
        hosts=("timm",), training_free=False,
        summary="Mixes the patch tokens of a vision transformer to fewer between stages; learns from the whole model.",
        parameters={
            "backbone": "a VisionTransformer of timm by name, or lv-vit",
            "options": "of the backbone's constructor",
            "stage_blocks": "blocks in each stage; tokens are slimmed between stages",
            "keep": "share of the tokens that each stage leaves",
            "aux_head": "whether LV-ViT's unused head for patch tokens is there",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(f"parameters of {name}", "parameters", figure, "card", tolerance=0, model=_meta(name))
            for name, _, figure, *_ in _SIZES
        ),
        *(
            Claim(
                f"MACs of {name}", "flops", figure, "card", tolerance=0.01, counting="macs", model=_meta(name),
                inputs=_picture(side),
            )
            for name, side, _, _, figure, _ in _SIZES
        ),
        *(
            Claim(
                f"MACs of {name}, rounded as printed", "flops", table, "README table", tolerance=0.015, counting="macs",
                model=_meta(name), inputs=_picture(side),
            )
            for name, side, _, table, *_ in _SIZES
        ),
        *(
            Claim(
                f"MACs of the teacher of {name}", "flops", figure, "README table", tolerance=0.015, counting="macs",
                model=_meta(name, keep=1.0), inputs=_picture(side),
            )
            for name, side, figure in _TEACHERS
        ),
        *(
            Claim(
                f"parameters of the reverse modules of {name}", "value", figure, "card", tolerance=0.005,
                value=lambda cls, name=name: float(_recalibration(name).reverse_parameters),  # type: ignore[misc]
            )
            for name, *_, figure in _SIZES
        ),
        *(
            Claim(
                f"patch tokens of {patches} in stage {stage + 1}", "value", figure, "card", tolerance=0,
                value=_counts(stage, patches),
            )
            for patches, figures in ((196, (196, 98, 49, 24)), (324, (324, 162, 81, 40)))
            for stage, figure in enumerate(figures)
        ),
    )  # fmt: skip

    def __init__(
        self, *, backbone: str = LV_VIT, options: Mapping[str, Any] | None = None,
        stage_blocks: Sequence[int] = (9, 3, 2, 2), keep: float = 0.5, aux_head: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(stage_blocks, list | tuple) or not stage_blocks:
            raise InputError(f"stage_blocks must be a list of numbers of blocks, not {stage_blocks!r}")
        self.stage_blocks = tuple(whole("stage_blocks", one, 1) for one in stage_blocks)
        self.keep = share("keep", keep)
        self.backbone = vision_transformer(backbone, options)
        depth, width = len(self.backbone.blocks), self.backbone.embed_dim
        if sum(self.stage_blocks) != depth:
            raise InputError(f"stage_blocks must add up to the {depth} blocks of {backbone}, not {stage_blocks!r}")
        self.patches = int(self.backbone.patch_embed.num_patches)
        counts = self.left(self.patches, self.keep, len(self.stage_blocks))[1:]
        self.slimming = nn.ModuleList(TokenSlimming(width, count) for count in counts if self.keep < 1)
        # Numbers of the blocks that a stage ends with, but for the last.
        self.ends = tuple(sum(self.stage_blocks[: stage + 1]) - 1 for stage in range(len(self.slimming)))
        self.aux_head = nn.Linear(width, self.backbone.num_classes).requires_grad_(False) if aux_head else None

    @staticmethod
    def left(patches: int, keep: float, stages: int) -> list[int]:
        """Patch tokens in each stage, from the number that there is at first: 64 at 0.6 are 64, 38, 23, 13."""
        return [max(1, math.floor(patches * keep**stage + 1e-9)) for stage in range(stages)]

    @classmethod
    def named(cls, name: str, **changes: Any) -> SitSlim:
        """The model of a name in `CONFIGURATIONS`, with some arguments changed, random weights; `options` are added
        to those of the name."""
        return cls(**configured(name, CONFIGURATIONS, changes))

    def load_backbone(self, model: nn.Module) -> list[str]:
        """Takes the weights of a timm VisionTransformer of the same shape, or of another `SitSlim` (the teacher): where
        a student starts. Returns the names of the backbone's weights that `model` does not have."""
        source = model.backbone if isinstance(model, SitSlim) else model
        return take_weights(self.backbone, source.state_dict())

    def layers(self, pictures: Tensor) -> list[Tensor]:
        """The tokens (B, prefix + N_i, C) after every block, and after the slimming where a stage ends."""
        host = self.backbone
        x = embed(host, pictures)
        prefix, found = host.num_prefix_tokens, []
        for number, block in enumerate(host.blocks):
            x = block(x)
            if number in self.ends:
                slimmed = self.slimming[self.ends.index(number)](x[:, prefix:])
                x = torch.cat([x[:, :prefix], slimmed], 1)
            found.append(x)
        return found

    def forward_features(self, pictures: Tensor) -> Tensor:
        """(B, prefix + K, C) with the final norm: class and distillation tokens, then those that are left."""
        normed: Tensor = self.backbone.norm(self.layers(pictures)[-1])
        return normed

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, classes) of `forward_features`, or what the classifier reads."""
        logits: Tensor = self.backbone.forward_head(tokens, pre_logits=pre_logits)
        return logits

    def forward(self, pictures: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(pictures))

    @torch.no_grad()
    def mixing(self, pictures: Tensor) -> Tensor:
        """(B, K, N): of what shares of the N patches' tokens each token at the end was mixed; rows add up to 1. What
        attention carried between them meanwhile is not in it. For overlays."""
        shares: list[Tensor] = []
        handles = [
            one.register_forward_pre_hook(lambda module, args: shares.append(module.weights(args[0])))
            for one in self.slimming
        ]
        try:
            self.layers(pictures)
        finally:
            for handle in handles:
                handle.remove()
        start = torch.eye(self.patches, device=pictures.device).expand(len(pictures), -1, -1)
        return functools.reduce(lambda before, one: one.float() @ before, shares, start)


class TokenSlimming(nn.Module):
    """X (B, N, C) -> (B, `count`, C): convex combinations of the tokens, with weights made of the tokens themselves."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.score = nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, count))
        self.scale = nn.Parameter(torch.ones(1))

    def weights(self, x: Tensor) -> Tensor:
        """(B, count, N): each row >= 0 and 1 in sum."""
        # Over the tokens, for each new one: over the new ones it would be an assignment of the old.
        shares: Tensor = (self.scale * self.score(self.norm(x))).softmax(1)
        return shares.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.weights(x) @ x


class ReverseTokenSlimming(nn.Module):
    """X (B, `count`, C) -> (B, `patches`, C): U = MLP over tokens of LN(X), without a skip; then U + MLP(LN(U))."""

    def __init__(self, width: int, count: int, patches: int) -> None:
        super().__init__()
        self.norm_tokens = nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(count, 4 * patches), nn.GELU(), nn.Linear(4 * patches, patches))
        self.norm_channels = nn.LayerNorm(width)
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        u = self.tokens(self.norm_tokens(x).transpose(1, 2)).transpose(1, 2)
        out: Tensor = u + self.channels(self.norm_channels(u))
        return out


class FeatureRecalibration(nn.Module):
    """How a `SitSlim` is trained: from the same model un-slimmed, block by block.

        loss = CE(labels) + token_weight mean over all L blocks of MSE(R_i(X_i), T_i)
               + logit_weight temperature^2 KL(teacher || student)

    X_i and T_i are the student's and the teacher's patch tokens after block i (the class token is left out), R_i brings
    them back to N: a `ReverseTokenSlimming` of its own for each block whose tokens are fewer, nothing before. A block
    that a stage ends with counts after its slimming: with that the card's numbers of parameters are met. These modules
    are of no use afterwards: they are here, not in the student. Paper, section 3.2 and 3.3.

    Args:
        student: what is trained; `student.load_backbone(teacher)` first, as the paper does.
        teacher: a `SitSlim` with keep 1, or a timm VisionTransformer of the student's shape. It gets no gradient and
            stays as it is, also in what `parameters` and `state_dict` say.
        token_weight, logit_weight, temperature: see above.
        labels: "single", logits of one distribution and targets as numbers or distributions (mixup); or "multiple", a
            yes or no for each class, binary cross entropy summed over the classes for both (ours).
        hard_teacher: a convolutional network whose decision the distillation token of a distilled backbone learns, by
            cross entropy with weight `hard_weight`. The release stores the weight and does not apply it: ours.
    """

    def __init__(
        self, student: SitSlim, teacher: nn.Module, *, token_weight: float = 2.0, logit_weight: float = 2.0,
        temperature: float = 1.0, labels: str = "single", hard_teacher: nn.Module | None = None,
        hard_weight: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.token_weight = within("token_weight", token_weight, "[0, inf)")
        self.logit_weight = within("logit_weight", logit_weight, "[0, inf)")
        self.temperature = within("temperature", temperature, "(0, inf)")
        self.hard_weight = within("hard_weight", hard_weight, "[0, inf)")
        self.labels = choice("labels", labels, ("single", "multiple"))
        self.student = student
        if hard_teacher is not None and not hasattr(student.backbone, "head_dist"):
            raise InputError("a hard_teacher needs a student with a distillation token, e.g. options distilled=True")
        # In a tuple, so that neither is trained, saved or counted.
        self._teachers = (teacher.eval(), None if hard_teacher is None else hard_teacher.eval())
        blocks = len(student.backbone.blocks)
        slimmed = sorted(student.ends)
        counts = student.left(student.patches, student.keep, len(student.stage_blocks))
        self.reverse = nn.ModuleDict({
            str(block): ReverseTokenSlimming(
                student.backbone.embed_dim, counts[sum(end <= block for end in slimmed)], student.patches
            )
            for block in range(blocks) if slimmed and block >= slimmed[0] and token_weight > 0
        })  # fmt: skip

    @property
    def teacher(self) -> nn.Module:
        return self._teachers[0]

    @property
    def reverse_parameters(self) -> int:
        """Parameters that are of use in training only."""
        return sum(weight.numel() for weight in self.reverse.parameters())

    def recovered(self, layers: Sequence[Tensor]) -> list[Tensor]:
        """(B, N, C) for every block, of the student's `layers`."""
        prefix = self.student.backbone.num_prefix_tokens
        return [
            self.reverse[str(block)](x[:, prefix:]) if str(block) in self.reverse else x[:, prefix:]
            for block, x in enumerate(layers)
        ]

    def _apply(self, fn: Any, recurse: bool = True) -> FeatureRecalibration:
        """Teachers go along to another device or precision."""
        for teacher in self._teachers:
            if teacher is not None:
                teacher._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    @torch.no_grad()
    def _taught(self, pictures: Tensor) -> tuple[list[Tensor], Tensor]:
        """The teacher's patch tokens after every block, and its logits."""
        teacher: Any = self.teacher
        host = teacher.backbone if isinstance(teacher, SitSlim) else teacher
        x = embed(host, pictures)
        found = []
        for block in host.blocks:
            x = block(x)
            found.append(x[:, host.num_prefix_tokens :])
        return found, host.forward_head(host.norm(x))

    def forward(self, pictures: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and its parts, not yet weighted: "labels", "tokens", "logits", and "hard" with a hard teacher.

        Args:
            pictures: (B, 3, H, W).
            targets: (B,) long or (B, classes) float.
        """
        student = self.student
        layers = student.layers(pictures)
        last = student.backbone.norm(layers[-1])
        hard_teacher = self._teachers[1]
        if hard_teacher is None:
            logits = student.forward_head(last)
        else:
            logits, decided = student.backbone.head(last[:, 0]), student.backbone.head_dist(last[:, 1])
        wanted, taught = self._taught(pictures)
        parts = {"labels": self._label_loss(logits, targets), "logits": self._logit_loss(logits, taught)}
        loss = parts["labels"] + self.logit_weight * parts["logits"]
        if self.token_weight > 0:
            distances = [F.mse_loss(ours, theirs) for ours, theirs in zip(self.recovered(layers), wanted)]
            parts["tokens"] = torch.stack(distances).mean()
            loss = loss + self.token_weight * parts["tokens"]
        if hard_teacher is not None:
            with torch.no_grad():
                decision = hard_teacher(pictures).argmax(-1)
            parts["hard"] = F.cross_entropy(decided, decision)
            loss = loss + self.hard_weight * parts["hard"]
        return loss, parts

    def _label_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.labels == "single":
            return F.cross_entropy(logits, targets)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()

    def _logit_loss(self, logits: Tensor, taught: Tensor) -> Tensor:
        """temperature^2 KL(teacher || student), summed over classes, the mean over pictures."""
        ours, theirs = logits / self.temperature, taught / self.temperature
        if self.labels == "single":
            ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
        else:
            # Two outcomes a class: yes, no.
            ours, theirs = (torch.stack([F.logsigmoid(one), F.logsigmoid(-one)], -1) for one in (ours, theirs))
        return self.temperature**2 * F.kl_div(ours, theirs, reduction="sum", log_target=True) / len(logits)
