"""Quality of generated and of decoded pictures, judged by the zoo's `tiny-vit`: nothing is downloaded.

Pictures are (B, 3, H, W) in 0..1, or uint8; the judge sees them resized to its own input size. Three questions:

- `adherence`: whether a picture shows what its caption names;
- `FrechetDistance`: how far the pictures as a whole are from real ones, by torchmetrics on the judge's features;
- `Reconstruction`: how well a decoded picture keeps the original (PSNR, SSIM, `Perceptual`).

The judge errs, too: real pictures put through the same functions say how often. `generator_scores` asks all that is to
be asked of a generator of captioned scenes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate import zoo
from foveate.data.scenes import NAMES, CaptionedScenes, caption, stacked
from foveate.method import InputError


class Judge(nn.Module):
    """A frozen scene transformer, `tiny-vit` unless another is given; `forward` gives its features (B, num_features).

    The features are its normalised class token. No gradient reaches its weights, but gradients reach the pictures.
    """

    num_features: int

    def __init__(self, tower: Any = None) -> None:
        super().__init__()
        self.tower = (zoo.load("tiny-vit") if tower is None else tower).eval().requires_grad_(False)
        self.num_features = self.tower.num_features

    def forward(self, pictures: Tensor) -> Tensor:
        return self.tower.forward_head(self.tower.forward_features(self.seen(pictures)), pre_logits=True)

    def names(self, pictures: Tensor) -> Tensor:
        """(B, 40) logits, a binary decision for each of `NAMES`."""
        return self.tower(self.seen(pictures))

    def tokens(self, pictures: Tensor, blocks: int) -> list[Tensor]:
        """`blocks` times (B, N, width): the patch tokens after each of the first blocks."""
        return self.tower.forward_intermediates(
            self.seen(pictures), indices=list(range(blocks)), stop_early=True, output_fmt="NLC", intermediates_only=True
        )

    def seen(self, pictures: Tensor) -> Tensor:
        """Pictures as the tower takes them: in -1..1 and of its size. InputError for what is no batch of pictures."""
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise InputError(f"pictures must be (B, 3, H, W), not {tuple(pictures.shape)}")
        values = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures
        size = self.tower.patch_embed.img_size
        if tuple(values.shape[2:]) != tuple(size):
            values = F.interpolate(values, size=size, mode="bilinear", antialias=True)
        return 2 * values - 1


class Perceptual(nn.Module):
    """How different two pictures look: distance of the judge's tokens, as LPIPS has it of a network's channels.

    Tokens after each of the first `blocks` blocks are made unit vectors; the squared distance is averaged over tokens
    and blocks. It is differentiable in the first argument, so it serves as a loss: (B, 3, H, W) twice -> (B,).
    Compare Zhang et al., https://arxiv.org/abs/1801.03924, equation 1, without its learned weights.
    """

    def __init__(self, judge: Judge, blocks: int = 3) -> None:
        super().__init__()
        self.judge, self.blocks = judge, blocks

    def forward(self, pictures: Tensor, originals: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.judge.tokens(originals, self.blocks)
        found = self.judge.tokens(pictures, self.blocks)
        apart = [F.normalize(a, dim=-1) - F.normalize(b, dim=-1) for a, b in zip(found, wanted)]
        return torch.stack([one.square().sum(-1).mean(-1) for one in apart]).mean(0)


def named(text: str) -> tuple[str, ...]:
    """The object names that a caption contains, each once, in its order."""
    words = text.replace(",", " ").replace(".", " ").lower().split()
    return tuple(dict.fromkeys(word for word in words if word in NAMES))


@torch.no_grad()
def adherence(judge: Judge, pictures: Tensor, captions: Sequence[str], *, batch: int = 100) -> dict[str, float]:
    """How often pictures (n, 3, H, W) show what their captions name.

    A caption with k names holds if the judge ranks exactly these k first among all 40. So guessing is right with
    probability 1 / binomial(40, k): a fortieth for a single name.

    Returns:
        `captions`: how many; `right`: share of captions that hold; `chance`: the mean of the probabilities above;
        `names_found`: share of the names that are among the first k.

    Raises:
        InputError: for no pictures, another number of captions, or a caption that names nothing.
    """
    if not len(pictures) or len(pictures) != len(captions):
        raise InputError(f"there are {len(pictures)} pictures for {len(captions)} captions")
    wanted = [named(one) for one in captions]
    if () in wanted:
        raise InputError(f"{captions[wanted.index(())]!r} names no object; there are {', '.join(NAMES)}")
    ranked = torch.cat([judge.names(some) for some in pictures.split(batch)]).argsort(1, descending=True).tolist()
    found = [len({NAMES[k] for k in row[: len(names)]} & set(names)) for row, names in zip(ranked, wanted)]
    count = len(wanted)
    return {
        "captions": count,
        "right": sum(hits == len(names) for hits, names in zip(found, wanted)) / count,
        "chance": sum(1 / math.comb(len(NAMES), len(names)) for names in wanted) / count,
        "names_found": sum(found) / sum(map(len, wanted)),
    }


class FrechetDistance:
    """Distance of the normal distributions fitted to the judge's features of real and of other pictures.

    The real pictures are kept, as statistics, so that one object can judge many models:

        distance = FrechetDistance(judge).real(real)
        distance(pictures_of_a_model), distance(pictures_of_another)

    It falls with the number of pictures: compare only distances between equally many, at least a few times the number
    of features (128 for tiny-vit).
    """

    def __init__(self, judge: Judge, *, batch: int = 100) -> None:
        metric = _torchmetrics().image.fid.FrechetInceptionDistance
        self.metric: Any = metric(feature=judge, normalize=True, reset_real_features=False)
        self.batch = batch

    def real(self, pictures: Tensor) -> FrechetDistance:
        """Adds real pictures (n, 3, H, W); returns itself."""
        self._update(pictures, real=True)
        return self

    def __call__(self, pictures: Tensor) -> float:
        """The distance of these pictures (n, 3, H, W); InputError where there are fewer than two, here or real ones."""
        self._update(pictures, real=False)
        try:
            if min(int(self.metric.real_features_num_samples), len(pictures)) < 2:
                raise InputError("a Fréchet distance needs at least two real and two other pictures")
            return float(self.metric.compute())
        finally:
            self.metric.reset()

    @torch.no_grad()
    def _update(self, pictures: Tensor, *, real: bool) -> None:
        for some in pictures.split(self.batch):
            self.metric.update(some, real=real)


def generator_scores(
    draw: Callable[[list[str]], Tensor], *, size: int, count: int = 1000, judge: Judge | None = None
) -> dict[str, Any]:
    """How well a generator of captioned scenes does, beside real scenes.

    Args:
        draw: makes one picture for each of a list of captions: (n, 3, size, size).
        size: px of a side.
        count: captions of either kind, and pictures for the distance.

    Returns:
        `single_objects`: adherence to "a dog" and the like, every name equally often; `captions`: to captions of the
        test split; `real_single_objects`, `real_captions`: of that split's real pictures; `frechet_distance`: of the
        pictures of the latter captions to the real ones; `frechet_distance_of_training_scenes`: the same of real
        pictures on the photographs of training, which is what a perfect generator would have.
    """
    judge = judge or Judge()
    tested, trained = (CaptionedScenes(split, 2**31 - 1, size=size) for split in ("test", "train"))
    some = [tested[k] for k in range(count)]
    captions, real = [one.caption for one in some], stacked(one.scene for one in some)
    single = [k for k, one in enumerate(some) if len(one.names) == 1]
    names = [caption(NAMES[k % len(NAMES)]) for k in range(count)]
    drawn, distance = draw(captions), FrechetDistance(judge).real(real)
    scores: dict[str, Any] = {
        "single_objects": adherence(judge, draw(names), names),
        "captions": adherence(judge, drawn, captions),
        "real_captions": adherence(judge, real, captions),
        "frechet_distance": distance(drawn),
        "frechet_distance_of_training_scenes": distance(stacked(trained[k].scene for k in range(count))),
    }
    if single:
        scores["real_single_objects"] = adherence(judge, real[single], [captions[k] for k in single])
    return scores


class Reconstruction:
    """Means over pictures of PSNR (dB), SSIM and `Perceptual`; `update` batch by batch, then `compute`."""

    def __init__(self, judge: Judge) -> None:
        image = _torchmetrics().image
        self.metrics: dict[str, Any] = {
            "psnr": image.PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean"),
            "ssim": image.StructuralSimilarityIndexMeasure(data_range=1.0),
        }
        self.perceptual, self.total, self.count = Perceptual(judge), 0.0, 0

    @torch.no_grad()
    def update(self, decoded: Tensor, originals: Tensor) -> None:
        """Both (B, 3, H, W) in 0..1, or uint8."""
        if decoded.shape != originals.shape:
            raise InputError(f"decoded pictures {tuple(decoded.shape)} and originals {tuple(originals.shape)} differ")
        pair = [some.float() / 255 if some.dtype == torch.uint8 else some for some in (decoded, originals)]
        for metric in self.metrics.values():
            metric.update(*pair)
        self.total += float(self.perceptual(*pair).sum())
        self.count += len(decoded)

    def compute(self) -> dict[str, float]:
        return {
            "pictures": self.count,
            **{name: float(metric.compute()) for name, metric in self.metrics.items()},
            "perceptual": self.total / self.count,
        }


def _torchmetrics() -> Any:
    try:
        import torchmetrics.image.fid
    except ImportError:
        raise InputError("judging pictures needs torchmetrics: pip install 'foveate[metrics]'") from None
    return torchmetrics
