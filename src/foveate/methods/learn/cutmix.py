"""CutMix: a rectangle of one training picture is pasted into another, and the labels are mixed by area.

Of images x (B, C, H, W) with labels y and a partner p for each: `lambda ~ Beta(alpha, alpha)`, a box with sides
`sqrt(1 - lambda) (W, H)` anywhere, clipped to the picture; within it `x = x[p]`, and with lambda = 1 - area / (H W) of
what was copied, `y = lambda y + (1 - lambda) y[p]`. `Cut` is such a box, `Mixing` a draw for a batch, `CutMix` the
transform.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from foveate.method import Card, Claim, InputError, Published, choice, register, whole, within


@dataclass(frozen=True)
class Cut:
    """A rectangle of a picture of `height` x `width` px: rows `top`..`bottom`, columns `left`..`right`, the last
    exclusive. On a feature map or a grid of tokens the unit is a cell."""

    top: int
    left: int
    bottom: int
    right: int
    height: int
    width: int

    @property
    def share(self) -> float:
        """Area as a share of the picture, 0..1: the weight of the partner's label, 1 - lambda."""
        return (self.bottom - self.top) * (self.right - self.left) / (self.height * self.width)

    @property
    def degenerate(self) -> bool:
        """Whether nothing would be pasted, or the whole picture replaced: no two pictures are mixed."""
        return not 0 < self.share < 1

    @classmethod
    def around(cls, row: int, column: int, kept: float, height: int, width: int, patch: int = 1) -> Cut:
        """The cut centred on a pixel, for `kept` = lambda before clipping.

        Its sides are `2 * (int(side * sqrt(1 - lambda)) // 2)`, then it is clipped to the picture, and its edges are
        rounded to multiples of `patch`.
        """
        ratio = math.sqrt(1 - kept)
        up, aside = int(height * ratio) // 2, int(width * ratio) // 2

        def edge(value: int, end: int) -> int:
            return min(max(round(min(max(value, 0), end) / patch) * patch, 0), end)

        return cls(
            edge(row - up, height), edge(column - aside, width), edge(row + up, height), edge(column + aside, width),
            height, width,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Mixing:
    """What is mixed with what: one draw for a batch of B pictures, applied to whatever belongs to them.

    Attributes:
        partner: (B,) long, the picture that each is mixed with.
        own: (B,) float lambda in 0..1, the weight of each picture's own label.
        cuts: of each picture, None where nothing is pasted.
        blended: (B,) bool, pictures that are blended with their partner (mixup) instead of being cut.
    """

    partner: Tensor
    own: Tensor
    cuts: tuple[Cut | None, ...]
    blended: Tensor

    @property
    def degenerate(self) -> Tensor:
        """(B,) bool: pictures whose cut is empty or everything; not those that are left alone or blended."""
        return torch.tensor([cut is not None and cut.degenerate for cut in self.cuts])

    def images(self, images: Tensor, inplace: bool = False) -> Tensor:
        """Pictures or feature maps (B, ..., H, W) of any dtype, mixed; blending needs floats.

        Raises:
            InputError: for another number or size of pictures than was drawn for.
        """
        partner = self.partner.to(images.device)
        if len(images) != len(partner):
            raise InputError(f"the mixing is for {len(partner)} pictures, not {len(images)}")
        # What is pasted is read before anything is written: in place, a partner may be changed before it is used.
        pasted: list[tuple[Any, Tensor]] = []
        shared = all(cut == self.cuts[0] for cut in self.cuts)
        for number, cut in enumerate(self.cuts[:1] if shared else self.cuts):
            if cut is None:
                continue
            if tuple(images.shape[-2:]) != (cut.height, cut.width):
                raise InputError(f"the cut is for {cut.height} x {cut.width} px, not {tuple(images.shape[-2:])}")
            box = (..., slice(cut.top, cut.bottom), slice(cut.left, cut.right))
            if shared:
                pasted.append((box, images[box][partner]))
            else:
                pasted.append(((number, *box), images[(partner[number], *box)].clone()))
        mixed = images if inplace else images.clone()
        if bool(self.blended.any()):
            if not images.is_floating_point():
                raise InputError(f"mixup blends pictures: they must be floats, not {images.dtype}")
            own = torch.where(self.blended, self.own, 1.0).to(images)
            own = own.view(-1, *[1] * (images.ndim - 1))
            mixed.copy_(own * images + (1 - own) * images[partner])
        for where, content in pasted:
            mixed[where] = content
        return tv_tensors.wrap(mixed, like=images) if isinstance(images, tv_tensors.TVTensor) else mixed

    def tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, N, ...) of a grid of (rows, columns), mixed: the draw has to be for a picture of grid cells."""
        rows, columns = grid
        if tokens.shape[1] != rows * columns:
            raise InputError(f"a grid of {rows} x {columns} has no {tokens.shape[1]} tokens")
        cells = tokens.unflatten(1, (rows, columns)).movedim((1, 2), (-2, -1))
        return self.images(cells).movedim((-2, -1), (1, 2)).flatten(1, 2)

    def labels(self, labels: Tensor, classes: int = 0, smoothing: float = 0.0) -> Tensor:
        """(B, K) float: `lambda y + (1 - lambda) y[partner]`, then smoothed: `(1 - e) y + e / K`.

        Args:
            labels: (B,) class numbers, or (B, K) weights.
            classes: K, needed for class numbers.
            smoothing: e in [0, 1).

        Raises:
            InputError: for labels of another shape, or class numbers outside 0..K - 1.
        """
        if labels.ndim == 1:
            if not classes:
                raise InputError("num_classes is needed where labels are class numbers")
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                raise InputError(f"labels must be in 0..{classes - 1}, not {int(labels.min())}..{int(labels.max())}")
            labels = F.one_hot(labels.long(), classes)
        if labels.ndim != 2 or len(labels) != len(self.partner) or classes not in (0, labels.shape[1]):
            wanted = f"({len(self.partner)}, {classes or 'classes'})"
            raise InputError(f"labels must be ({len(self.partner)},) or {wanted}, not {tuple(labels.shape)}")
        weights = labels if labels.is_floating_point() else labels.float()
        own = self.own.to(weights).unsqueeze(1)
        mixed = own * weights + (1 - own) * weights[self.partner.to(weights.device)]
        return (1 - smoothing) * mixed + smoothing / mixed.shape[1]

    def loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`lambda CE(f, y) + (1 - lambda) CE(f, y[partner])`, mean over the batch, of logits (B, K) and class numbers
        (B,); the parts are the two cross entropies without their weights, "own" and "partner"."""
        partner, own = self.partner.to(labels.device), self.own.to(logits)
        first = F.cross_entropy(logits, labels, reduction="none")
        second = F.cross_entropy(logits, labels[partner], reduction="none")
        return (own * first + (1 - own) * second).mean(), {"own": first.mean(), "partner": second.mean()}

    def objects(self, targets: Sequence[Mapping[str, Any]], visible: float = 0.0) -> list[dict[str, Any]]:
        """Targets for detection: what is left of each picture's objects, then what was pasted of its partner's.

        An object's new box is the smallest around the part that can still be seen; the share of its old box that can
        be seen is noted. Degenerate objects are dropped: those of which nothing, or less than `visible`, is left.

        Args:
            targets: of each picture "boxes" (n, 4), x1 y1 x2 y2 px, and "labels" (n, ...); "masks" (n, H, W) where
                there are some; "image_id" stays.
            visible: the least share of a box that has to be left.

        Returns:
            the same with "visible" (n,) float in 0..1.

        Raises:
            InputError: for other keys, boxes of another format, or blended pictures, whose objects have no place.
        """
        if bool(self.blended.any()):
            raise InputError("mixup blends pictures: objects of both are everywhere; set mixup=0 for detection")
        mixed = []
        for number, (own, cut) in enumerate(zip(targets, self.cuts, strict=True)):
            if unknown := set(own) - {"boxes", "labels", "masks", "image_id"}:
                raise InputError(f"targets have boxes, labels, masks and image_id, not {', '.join(sorted(unknown))}")
            parts = [_remaining(own, cut)]
            if cut is not None:
                parts.append(_pasted(targets[int(self.partner[number])], cut))
            kept = [part["visible"] >= max(visible, 1e-12) for part in parts]
            result: dict[str, Any] = {"image_id": own["image_id"]} if "image_id" in own else {}
            for name in parts[0]:
                result[name] = torch.cat([part[name][some] for part, some in zip(parts, kept)])
            if isinstance(own["boxes"], tv_tensors.BoundingBoxes):
                result["boxes"] = tv_tensors.wrap(result["boxes"], like=own["boxes"])
            mixed.append(result)
        return mixed


def _split(target: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """A target's tensors by object, and its boxes as plain floats."""
    boxes = target["boxes"]
    if isinstance(boxes, tv_tensors.BoundingBoxes) and boxes.format is not tv_tensors.BoundingBoxFormat.XYXY:
        raise InputError(f"boxes must be x1 y1 x2 y2, not {boxes.format.value}")
    plain = boxes.as_subclass(Tensor)
    if plain.ndim != 2 or plain.shape[1] != 4 or len(plain) != len(target["labels"]):
        raise InputError(f"boxes must be ({len(target['labels'])}, 4) as there are labels, not {tuple(plain.shape)}")
    others = {name: target[name] for name in ("labels", "masks") if name in target}
    return others, plain.float()


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)


def _inside(boxes: Tensor, cut: Cut) -> Tensor:
    """The part of each box within the cut."""
    edges = boxes.new_tensor([cut.left, cut.top, cut.right, cut.bottom])
    return torch.cat([torch.maximum(boxes[:, :2], edges[:2]), torch.minimum(boxes[:, 2:], edges[2:])], 1)


def _pasted(target: Mapping[str, Any], cut: Cut) -> dict[str, Tensor]:
    others, boxes = _split(target)
    inside = _inside(boxes, cut)
    if "masks" in others:
        masks = torch.zeros_like(others["masks"])
        box = (..., slice(cut.top, cut.bottom), slice(cut.left, cut.right))
        masks[box] = others["masks"][box]
        others["masks"] = masks
    visible = _areas(inside) / _areas(boxes).clamp(min=1e-12)
    return {"boxes": inside.to(target["boxes"].dtype), "visible": visible, **others}


def _remaining(target: Mapping[str, Any], cut: Cut | None) -> dict[str, Tensor]:
    others, boxes = _split(target)
    if cut is None or cut.share == 0:
        return {"boxes": boxes.to(target["boxes"].dtype), "visible": (_areas(boxes) > 0).float(), **others}
    inside = _inside(boxes, cut)
    visible = 1 - _areas(inside) / _areas(boxes).clamp(min=1e-12)
    # A box gets smaller along one axis only where the cut is as wide as the box along the other.
    low, high = boxes[:, :2].clone(), boxes[:, 2:].clone()
    meets = (inside[:, 2:] > inside[:, :2]).all(1)
    for axis, other in ((0, 1), (1, 0)):
        spans = meets & (inside[:, other] == boxes[:, other]) & (inside[:, other + 2] == boxes[:, other + 2])
        from_low = spans & (inside[:, axis] == boxes[:, axis])
        from_high = spans & (inside[:, axis + 2] == boxes[:, axis + 2])
        low[:, axis] = torch.where(from_low, inside[:, axis + 2], low[:, axis])
        high[:, axis] = torch.where(from_high & ~from_low, inside[:, axis], high[:, axis])
    if "masks" in others:
        masks = others["masks"].clone()
        masks[..., cut.top : cut.bottom, cut.left : cut.right] = 0
        others["masks"] = masks
    visible = torch.where(_areas(boxes) > 0, visible, 0.0)
    return {"boxes": torch.cat([low, high], 1).to(target["boxes"].dtype), "visible": visible, **others}


def _mean_kept(cls: type[CutMix]) -> float:
    """Mean of lambda as drawn, before a box is cut."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return float(cls().lambdas(100_000).mean())


def _area_of_cuts(cls: type[CutMix]) -> float:
    """Mean over lambda of a cut's area over (1 - lambda) H W, where the border cuts nothing off."""
    side = 4096
    kept = [(k + 0.5) / 200 for k in range(200)]
    return sum(Cut.around(side // 2, side // 2, one, side, side).share / (1 - one) for one in kept) / len(kept)


def _from_either(cls: type[CutMix]) -> float:
    """Share of the pixels of mixed pictures that are those of one of the two pictures, at the same place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.rand(8, 1, 32, 48)
        made = cls()
        found = []
        for _ in range(50):
            mixing = made.draw(8, (32, 48))
            mixed = mixing.images(images)
            found.append(((mixed == images) | (mixed == images[mixing.partner])).float().mean())
        return float(torch.stack(found).mean())


@register
class CutMix(Published, v2.Transform):
    """Mixes pictures of a batch by cutting and pasting, and their labels by area: `(images, labels) -> the same mixed`.

    lambda ~ Beta(alpha, alpha); a box with sides `sqrt(1 - lambda)` times the picture's and its centre anywhere in the
    picture is clipped to it and copied from the partner `x[p]` into `x`; with lambda = 1 - area / (H W) of what was
    really copied, labels become `lambda y + (1 - lambda) y[p]`. Shapes: images (B, C, H, W) of any dtype (videos
    too), labels (B,) class numbers or (B, K) weights -> (B, K) float. Where labels are a list of detection targets,
    boxes and masks follow the pixels (`Mixing.objects`).

    Used as a torchvision v2 transform on batches (`CutMix(num_classes=10)(images, labels)`), as `mixup_fn` of timm's
    training script, or as `collate_fn=CutMix(...).collate` of a loader. Random numbers are torch's, as in v2; call
    `draw` for one draw that is applied by hand, e.g. to feature maps (Feature CutMix: draw for their size), to tokens,
    or for the loss with two labels (`Mixing.loss`). In evaluation mode nothing is mixed.

    CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features, ICCV 2019,
    https://arxiv.org/abs/1905.04899, section 3.1 and its Algorithm A1. The paper draws once a batch and pairs by a
    random permutation; `mode`, `partner`, `mixup` and `correct` are how timm varies it. `patch`, `attempts` and
    everything about detection targets are ours.

    Args:
        num_classes: K; 0 where labels are weights already.
        alpha: of the Beta distribution, 0 for no CutMix.
        probability: of mixing at all, of each batch, pair or picture.
        mode: "batch" for one lambda and box, "pair" for one each pair, "elem" for one each picture.
        partner: "permutation" at random, or "reversed" order.
        mixup: alpha of mixup, `lambda x + (1 - lambda) x[p]`, with which CutMix takes turns; 0 for none.
        switch: probability of CutMix where there is mixup too.
        correct: whether lambda is that of the clipped box.
        smoothing: of the mixed labels, in [0, 1).
        patch: edges of the box are multiples of so many px, so that whole patches of a transformer come from one
            picture.
        attempts: draws until a box is not degenerate; the last is taken as it is.
        visible: least share of an object's box that has to be left for it to stay a target.
        inplace: whether the pictures that are handed in are changed.
    """

    card = Card(
        slug="cutmix", title="CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features",
        arxiv="1905.04899", year=2019, kind="learn", hosts=(), identity={"probability": 0.0},
        summary="Pastes a rectangle of one training picture into another and mixes their labels by area.",
        parameters={
            "num_classes": "number of classes, 0 where labels are weights",
            "alpha": "of lambda's Beta distribution; 0 for no CutMix",
            "probability": "of mixing, in [0, 1]",
            "mode": "'batch', 'pair' or 'elem': what shares a box",
            "partner": "'permutation' or 'reversed'",
            "mixup": "alpha of mixup, taken in turns; 0 for none",
            "switch": "probability of CutMix where there is mixup",
            "correct": "whether lambda is that of the clipped box",
            "smoothing": "of labels, in [0, 1)",
            "patch": "px that edges of the box are multiples of",
            "attempts": "draws until a box is not degenerate",
            "visible": "least visible share of an object that stays a detection target",
            "inplace": "whether the pictures handed in are changed",
        },
    )  # fmt: skip

    claims = (
        Claim("mean lambda before clipping, alpha 1", "value", 0.5, "section 3.1", tolerance=0.01, value=_mean_kept),
        Claim("area of unclipped boxes over (1 - lambda) H W", "value", 1.0, "equation 2", value=_area_of_cuts),
        Claim("share of pixels that are one of the two pictures'", "value", 1.0, "equation 1", tolerance=0,
              value=_from_either),
    )  # fmt: skip

    def __init__(
        self, *, num_classes: int = 0, alpha: float = 1.0, probability: float = 1.0, mode: str = "batch",
        partner: str = "permutation", mixup: float = 0.0, switch: float = 0.5, correct: bool = True,
        smoothing: float = 0.0, patch: int = 1, attempts: int = 1, visible: float = 0.0, inplace: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_classes = whole("num_classes", num_classes)
        self.alpha = within("alpha", alpha, "[0, inf)")
        self.probability = within("probability", probability, "[0, 1]")
        self.mode = choice("mode", mode, ("batch", "pair", "elem"))
        self.partner = choice("partner", partner, ("permutation", "reversed"))
        if mode == "pair" and partner != "reversed":
            raise InputError("mode 'pair' mixes two pictures with each other: it needs partner='reversed'")
        self.mixup = within("mixup", mixup, "[0, inf)")
        self.switch = within("switch", switch, "[0, 1]")
        self.smoothing = within("smoothing", smoothing, "[0, 1)")
        self.patch = whole("patch", patch, 1)
        self.attempts = whole("attempts", attempts, 1)
        self.visible = within("visible", visible, "[0, 1]")
        for name, flag in (("correct", correct), ("inplace", inplace)):
            if not isinstance(flag, bool):
                raise InputError(f"{name} must be true or false, not {flag!r}")
        self.correct, self.inplace = correct, inplace

    def lambdas(self, count: int, alpha: float | None = None) -> Tensor:
        """(count,) draws from Beta(alpha, alpha), with `self.alpha` unless told otherwise."""
        concentration = torch.full((count,), self.alpha if alpha is None else alpha)
        return torch.distributions.Beta(concentration, concentration, validate_args=False).sample()

    def draw(self, batch: int, size: tuple[int, int]) -> Mixing:
        """One draw for `batch` pictures, feature maps or grids of `size` (height, width)."""
        reverse = torch.arange(batch - 1, -1, -1)
        partner = reverse if self.partner == "reversed" else torch.randperm(batch)
        if self.mode == "batch":
            drawn = [self._draw_one(size)] * batch
        elif self.mode == "elem":
            drawn = [self._draw_one(size) for _ in range(batch)]
        else:
            half = [self._draw_one(size) for _ in range((batch + 1) // 2)]
            drawn = half + half[: batch // 2][::-1]
        own, cuts, blended = zip(*drawn) if drawn else ((), (), ())
        return Mixing(partner, torch.tensor(own), tuple(cuts), torch.tensor(blended, dtype=torch.bool))

    def _draw_one(self, size: tuple[int, int]) -> tuple[float, Cut | None, bool]:
        """(lambda, the cut or None, whether it is mixup)."""
        active = [alpha for alpha in (self.alpha, self.mixup) if alpha > 0]
        if not active or float(torch.rand(())) >= self.probability:
            return 1.0, None, False
        blend = not self.alpha or (self.mixup > 0 and float(torch.rand(())) >= self.switch)
        if blend:
            return float(self.lambdas(1, self.mixup)), None, True
        height, width = size
        for _ in range(self.attempts):
            kept = float(self.lambdas(1))
            row, column = int(torch.randint(height, ())), int(torch.randint(width, ()))
            cut = Cut.around(row, column, kept, height, width, self.patch)
            if not cut.degenerate:
                break
        return (1 - cut.share if self.correct else kept), cut, False

    def forward(self, *inputs: Any) -> Any:
        """`(images, labels, ...)`, as arguments or as one tuple; what follows the labels is handed back as it is.

        Raises:
            InputError: for anything else.
        """
        given = inputs[0] if len(inputs) == 1 else inputs
        if not isinstance(given, tuple | list) or len(given) < 2 or not isinstance(given[0], Tensor):
            raise InputError("cutmix takes a batch: images (B, C, H, W) and their labels")
        images, labels, *rest = given
        if images.ndim < 4:
            raise InputError(f"cutmix mixes batches: images must be (B, C, H, W), not {tuple(images.shape)}")
        if self.training:
            mixing = self.draw(len(images), (images.shape[-2], images.shape[-1]))
        else:
            alone = torch.arange(len(images))
            mixing = Mixing(alone, torch.ones(len(images)), (None,) * len(images), alone < 0)
        if isinstance(labels, Tensor):
            mixed: Any = mixing.labels(labels, self.num_classes, self.smoothing if self.training else 0.0)
        else:
            mixed = mixing.objects(labels, self.visible)
        return (mixing.images(images, self.inplace), mixed, *rest)

    def collate(self, samples: Sequence[Any], collate: Callable[[Any], Any] = default_collate) -> Any:
        """`collate_fn` of a loader: samples to a batch, by `collate`, and then mixed."""
        return self(*collate(list(samples)))
