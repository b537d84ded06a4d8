"""What `compare --task recognition|segmentation` asks of a model, and what is right of its answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.data.picture_folder import IGNORED
from foveate.data.scenes import NAMES
from foveate.measure.comparison import Figure, Task
from foveate.measure.quality import kl_divergence, mean_iou
from foveate.measure.vision_models import Trained, VisionModel
from foveate.method import InputError

TIMED = 8
"""Pictures of the batch that FLOPs and time are of."""
_BACKGROUND = "background"

_AGREEMENT = "agreement with dense"
_COMMON: dict[str, Any] = {
    "heading": "Which visual tokens can {model} do without?",
    "work": f"{TIMED} pictures",
    "inside": "encoder",
    "budget": "visual tokens at the encoder's end, as a share of all",
    "samples": ("picture", "pictures"),
}
"""What both tasks say of pictures."""
RECOGNITION = Task(
    "recognition",
    (
        Figure("mAP", "mean over the names of the average precision of finding them", "mAP", near=0.01),
        Figure("top-1", "share of pictures whose class has the greatest logit", "top-1 accuracy", near=0.01),
        Figure("top-5", "share of pictures whose class is among the five greatest logits"),
        Figure(
            "agreement", "share of pictures with the same class (of models with several: the same set) as dense says",
            _AGREEMENT, near=0.01,
        ),
        Figure("KL", "divergence of the classes from dense's, in nats; 0 is the same", unit="nats", decimals=3),
    ),
    **_COMMON,
)  # fmt: skip
SEGMENTATION = Task(
    "segmentation",
    (
        Figure("mean IoU", "intersection over union of the patches' classes, mean over these", "mean IoU", near=0.01),
        Figure("patches right", "share of patches with the right class"),
        Figure("agreement", "share of patches with the same class as dense says", _AGREEMENT, near=0.01),
        Figure("KL", "divergence of a patch's classes from dense's, in nats; 0 is the same", unit="nats", decimals=3),
    ),
    **_COMMON,
)  # fmt: skip
TASKS = {task.name: task for task in (RECOGNITION, SEGMENTATION)}


class Recognition:
    """Logits (B, classes) and what is right of them."""

    task = RECOGNITION

    def __init__(self, host: VisionModel) -> None:
        self.host = host

    def dense(self, pixels: Tensor) -> Tensor:
        return self.host.logits(pixels)

    def reduced(self, pixels: Tensor, applied: Any) -> Tensor:
        return self.host.logits(pixels)

    def trained(self, other: Trained, pixels: Tensor) -> Tensor:
        if other.slug in ("dtop", "hot"):
            raise InputError(f"{other.slug} names no picture")
        output: Tensor = other.model(pixels)
        if output.shape[1] != len(self.host.classes):
            raise InputError(f"{other.folder} has {output.shape[1]} classes, {self.host.name} {len(self.host.classes)}")
        return output.float()

    def figures(self, said: Tensor, dense: Tensor, truth: Tensor) -> dict[str, float]:
        several = self.host.scenes
        if several:
            same = ((said > 0) == (dense > 0)).all(1)
            kl = _binary_kl(dense, said)
        else:
            same, kl = said.argmax(1) == dense.argmax(1), kl_divergence(dense, said)
        found = {"agreement": float(same.float().mean()), "KL": float(kl.mean())}
        if truth.ndim == 2:
            return {"mAP": average_precision(said, truth)} | found
        known = truth >= 0
        if not bool(known.any()):
            return found
        ranks = said[known].topk(min(5, said.shape[1]), 1).indices == truth[known].unsqueeze(1)
        top = {"top-1": float(ranks[:, 0].float().mean())}
        if said.shape[1] > 5:
            top["top-5"] = float(ranks.any(1).float().mean())
        return top | found

    def expected(self, truth: Tensor) -> str | None:
        if truth.ndim:
            return self._names(truth.nonzero().flatten())
        return None if truth < 0 else self._names(truth.reshape(1))

    def words(self, said: Tensor, truth: Tensor) -> str:
        """What the model says of one picture, logits (classes,)."""
        return self._names((said > 0).nonzero().flatten() if self.host.scenes else said.argmax().reshape(1))

    def _names(self, classes: Tensor) -> str:
        return (
            ", ".join(min(self.host.classes[k], key=len, default=f"class {k}") for k in classes.tolist()) or "nothing"
        )


class Segmentation:
    """Logits (B, classes, patches) and what is right of them. A patch whose token was merged has what that token has;
    where it was dropped, that of the nearest patch that was not."""

    task = SEGMENTATION

    def __init__(self, host: VisionModel) -> None:
        self.host = host
        self.grid: tuple[int, int] = tuple(host.model.patch_embed.grid_size)
        self.patch = int(host.model.patch_embed.patch_size[0])
        self.classes = (_BACKGROUND, *NAMES)

    def dense(self, pixels: Tensor) -> Tensor:
        model, seen = self.host.model, list[Tensor]()
        # The whole forward, so that a method's hooks see it; those on the norm came before this one.
        handle = model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            model(pixels)
        finally:
            handle.remove()
        logits: Tensor = model.patch_head(seen[-1][:, model.num_prefix_tokens :])
        return logits.float().transpose(1, 2)

    def reduced(self, pixels: Tensor, applied: Any) -> Tensor:
        logits = self.dense(pixels)
        if not applied.trace:
            return logits
        token = nearest_source(applied.trace[-1].source, self.grid)
        return logits.gather(2, token.unsqueeze(1).expand(-1, logits.shape[1], -1))

    def trained(self, other: Trained, pixels: Tensor) -> Tensor:
        if other.slug == "dtop":
            scores: Tensor = other.model.patch_scores(other.model.stages(pixels)).flatten(2).float()
            # Of "atm" heads scores are no logits, but as logarithms they are, up to a constant.
            scores = scores if other.model.head == "linear" else scores.clamp(min=1e-9).log()
        elif other.slug == "stvit" and other.patch_head is not None:
            scores = other.patch_head(other.model.forward_features(pixels)).float().transpose(1, 2)
        else:
            raise InputError(f"{other.folder} has no classes for patches; dtop has, and stvit that recovers its tokens")
        wanted = (len(self.classes), self.grid[0] * self.grid[1])
        if tuple(scores.shape[1:]) != wanted:
            raise InputError(
                f"{other.folder} has {scores.shape[1]} classes for {scores.shape[2]} patches, {self.host.name} "
                f"{wanted[0]} for {wanted[1]}"
            )
        return scores

    def figures(self, said: Tensor, dense: Tensor, truth: Tensor) -> dict[str, float]:
        found = said.argmax(1)
        counted = truth != IGNORED
        count = len(self.classes)
        pairs = (truth[counted] * count + found[counted]).bincount(minlength=count * count).view(count, count)
        kl = kl_divergence(dense.transpose(1, 2), said.transpose(1, 2))
        return {
            "mean IoU": mean_iou(pairs),
            "patches right": float(pairs.diag().sum() / pairs.sum().clamp(min=1)),
            "agreement": float((found == dense.argmax(1)).float().mean()),
            "KL": float(kl.mean()),
        }

    def expected(self, truth: Tensor) -> str | None:
        return ", ".join(self.classes[k] for k in truth.unique().tolist() if 0 < k < len(self.classes)) or _BACKGROUND

    def words(self, said: Tensor, truth: Tensor) -> str:
        counted = truth != IGNORED
        right = int((said.argmax(0)[counted] == truth[counted]).sum())
        return f"{right} of {int(counted.sum())} patches right"


Goal = Recognition | Segmentation


def nearest_source(source: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, M) long: the token of each patch; where it has none (-1), that of the nearest patch of the grid that has one,
    the first of several. A picture without any token has 0 everywhere."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    place = torch.stack([rows.flatten(), columns.flatten()], 1).to(source.device)
    apart = (place[:, None] - place[None]).square().sum(-1)
    held = source >= 0
    far = int(apart.max()) + 1
    nearest = torch.where(held[:, None], apart, far).argmin(2)
    return source.gather(1, nearest).clamp(min=0)


def average_precision(logits: Tensor, truth: Tensor) -> float:
    """Mean over the names that occur, of logits and (N, names) of 0 and 1."""
    try:
        from torchmetrics.functional.classification import multilabel_average_precision
    except ImportError:
        raise InputError("mean average precision needs torchmetrics: pip install 'foveate[metrics]'") from None
    there = truth.sum(0) > 0
    each = multilabel_average_precision(logits[:, there], truth[:, there].long(), int(there.sum()), average="macro")
    return float(each)


def _binary_kl(dense: Tensor, said: Tensor) -> Tensor:
    """(B,): sum over the names of the divergence between two yes or no decisions."""
    pairs = [torch.stack([one, torch.zeros_like(one)], -1) for one in (dense, said)]
    return kl_divergence(*pairs).sum(1)


def goal_of(task: str, host: VisionModel) -> Goal:
    """What a task measures on a model; InputError for a model that cannot do it."""
    if task == RECOGNITION.name:
        return Recognition(host)
    if not hasattr(host.model, "patch_head"):
        raise InputError(
            f"{host.name} has no classes for patches; --task segmentation needs tiny-vit, or one of its kind"
        )
    return Segmentation(host)
