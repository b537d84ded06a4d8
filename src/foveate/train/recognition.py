"""Scenes with one object, as a classification task with few pictures: what recipes of `methods/learn` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.data.scenes import NAMES, Scenes
from foveate.method import InputError
from foveate.train.loop import Batch
from foveate.train.tiny_vit import normalised

SIDE = 96
"""px of a picture."""
THRESHOLDS = tuple(k / 20 for k in range(2, 19))
"""Shares of a class map's range above which a pixel may belong to the object."""


def single_objects(split: str, seed: int, count: int) -> Batch:
    """`image` (n, 3, 96, 96) uint8, `label` (n,) long in 0..39, `box` (n, 4) x1 y1 x2 y2 px, of the first scenes of a
    split that have exactly one object."""
    scenes = Scenes(split, seed, objects=(1, 1), size=SIDE)
    images: list[Any] = []
    labels, boxes, number = [], [], 0
    while len(images) < count:
        scene = scenes[number]
        number += 1
        if len(scene.objects) != 1:
            continue  # Nothing of it can be seen.
        images.append(scene.image)
        labels.append(NAMES.index(scene.objects[0].name))
        boxes.append(scene.objects[0].box)
    return {
        "image": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        "label": torch.tensor(labels),
        "box": torch.tensor(boxes),
    }


def drawn(count: int, seed: int, step: int, batch: int) -> Tensor:
    """(batch,) long: which of `count` pictures step `step` sees; each once an epoch, in another order every epoch."""
    first, found = step * batch, list[int]()
    while len(found) < batch:
        epoch, place = divmod(first + len(found), count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
        found += order[place : place + batch - len(found)].tolist()
    return torch.tensor(found)


def vision_transformer(width: int, depth: int, heads: int, classes: int = len(NAMES), **changes: Any) -> Any:
    """A timm ViT for these pictures with 144 patches of 8 px. InputError where timm is missing or sizes do not fit."""
    if heads < 1 or width < 1 or depth < 1 or width % heads:
        raise InputError(f"width must be a multiple of heads, not {width} with {heads} heads")
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ModuleNotFoundError:
        raise InputError("this recipe needs timm: pip install 'foveate[timm]'") from None
    return VisionTransformer(
        img_size=SIDE, patch_size=8, embed_dim=width, depth=depth, num_heads=heads, num_classes=classes, **changes
    )


@torch.no_grad()
def logits_of(model: Callable[[Tensor], Tensor], images: Tensor, batch: int = 100) -> Tensor:
    """(n, classes) logits of uint8 pictures."""
    return torch.cat([model(normalised(some)).float().cpu() for some in images.split(batch)])


def accuracy_and_calibration(logits: Tensor, label: Tensor) -> dict[str, float]:
    """Top-1 accuracy, and the expected calibration error with 15 bins."""
    try:
        from torchmetrics.functional.classification import multiclass_calibration_error
    except ImportError:
        raise InputError("evaluating this needs torchmetrics: pip install 'foveate[metrics]'") from None
    error = multiclass_calibration_error(logits.softmax(1), label, num_classes=logits.shape[1], n_bins=15)
    return {
        "accuracy": float((logits.argmax(1) == label).float().mean()),
        "expected_calibration_error": float(error),
    }


@torch.no_grad()
def class_maps(model: Any, images: Tensor, label: Tensor, batch: int = 100) -> Tensor:
    """(n, H, W) class activation maps of the true classes in 0..1, as large as the pictures.

    For a timm ViT with average pooling: the logit that each patch would have alone.
    """
    maps = []
    for some, classes in zip(images.split(batch), label.split(batch)):
        tokens = model.forward_features(normalised(some))[:, model.num_prefix_tokens :]
        scores = model.head(tokens).gather(2, classes.view(-1, 1, 1).expand(-1, tokens.shape[1], 1))
        grid = scores.view(len(some), 1, *model.patch_embed.grid_size)
        large = F.interpolate(grid, size=tuple(some.shape[-2:]), mode="bilinear")[:, 0].float().cpu()
        low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
        maps.append((large - low) / (high - low).clamp(min=1e-12))
    return torch.cat(maps)


def largest_box(heat: Tensor, threshold: float) -> tuple[int, int, int, int]:
    """x1 y1 x2 y2 px around the largest connected part of a map (H, W) that is >= threshold; zeros if there is none."""
    parts, count = ndimage.label(heat.numpy() >= threshold)
    if not count:
        return 0, 0, 0, 0
    largest = int(np.bincount(parts.ravel())[1:].argmax())
    rows, columns = ndimage.find_objects(parts)[largest]
    return columns.start, rows.start, columns.stop, rows.stop


def located(maps: Tensor, boxes: Tensor, threshold: float) -> Tensor:
    """(n,) bool: whether the box of each map overlaps the true one by at least half (IoU)."""
    from torchvision.ops import box_iou

    found = torch.tensor([largest_box(heat, threshold) for heat in maps]).float()
    overlaps = [box_iou(one.unsqueeze(0), true.unsqueeze(0).float()) for one, true in zip(found, boxes)]
    return torch.cat(overlaps).flatten() >= 0.5


def localisation(model: nn.Module, validation: Batch, test: Batch, right: Tensor) -> dict[str, float]:
    """Share of test pictures whose object the map of the true class finds, and that are named right (n,) too.

    The threshold is the one of `THRESHOLDS` that is best on the validation pictures.
    """
    maps = class_maps(model, validation["image"], validation["label"])
    best = max(THRESHOLDS, key=lambda one: float(located(maps, validation["box"], one).float().mean()))
    found = located(class_maps(model, test["image"], test["label"]), test["box"], best)
    return {
        "map_threshold": best,
        "located_of_known_class": float(found.float().mean()),
        "located_and_named": float((found & right).float().mean()),
    }
