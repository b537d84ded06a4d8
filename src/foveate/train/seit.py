"""Recipe for `seit`: scenes as stored tokens; TokenAdapt, masked token modelling, and classifiers of few labels.

Pictures with one object are turned into 24 x 24 ids once, by codes of 4 x 4 px that k-means finds, and written to a
token file; from then on only ids are read. `stage` says what is trained:

- "adapt": f and g of TokenAdapt, from pictures and their augmented twins;
- "pretrain": masked token modelling on all pictures, without labels;
- "finetune": a classifier on the labelled share of the pictures, from `start` or from scratch;
- "probe": the same with everything but the head frozen.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.data.scenes import NAMES
from foveate.method import InputError
from foveate.methods.learn.seit import Seit, SeitClassifier
from foveate.methods.learn.token_augmentation import Codebook, Geometry, TokenAdapt, TokenAugmentation
from foveate.nn.token_file import TokenFile, storage, write_tokens
from foveate.train.loop import Batch, Recipe, Settings, write_tensors
from foveate.train.recognition import accuracy_and_calibration, drawn, single_objects
from foveate.train.tiny_vit import normalised

STAGES = ("pretrain", "adapt", "finetune", "probe")
PATCH, GRID, CROP = 4, 24, 20
"""px of a patch, ids a side of a stored picture, and ids a side of what the network reads."""
_PATCHES = 20_000
"""Patches that the codes are found from."""


@dataclasses.dataclass(frozen=True)
class SeitSettings(Settings):
    """`width`, `depth`, `heads`: of the encoder; `decoder_*`: of the decoder.

    Attributes:
        stage: one of `STAGES`.
        pictures: how many scenes there are, stored as tokens.
        codes: number of codes.
        labels: share of the pictures that has labels, in "finetune" and "probe".
        tokens: folder with `tokenizer.safetensors` and `train.tokens`; "" for that of `start`, or else the output's
            own, where they are made.
        start: folder of a pre-training that "finetune" and "probe" start from; "" for scratch.
        adapt: folder of a trained TokenAdapt that half of each batch is augmented with; "" for none.
        color: whether there is Emb-Noise and ColorAdapt.
        noise_std: of Emb-Noise; codes have a mean square of 1 in each channel.
        mix: whether labels are mixed, by CutMix and mixup.
        least: least share of the area that is cut out.
        layer_decay: of the learning rate, from each block to the one before, where there is a `start`.
    """

    steps: int = 1200
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 100
    workers: int = 0
    stage: str = "pretrain"
    pictures: int = 3000
    codes: int = 391
    labels: float = 0.1
    tokens: str = ""
    start: str = ""
    adapt: str = ""
    color: bool = False
    noise_std: float = 0.25
    mix: bool = False
    least: float = 0.2
    layer_decay: float = 0.75
    width: int = 96
    depth: int = 4
    heads: int = 3
    decoder_width: int = 64
    decoder_depth: int = 2
    decoder_heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in STAGES:
            raise InputError(f"stage must be one of {', '.join(STAGES)}, not {self.stage!r}")
        if self.pictures < 1 or self.codes < 2:
            raise InputError(f"pictures must be >= 1 and codes >= 2, not {self.pictures} and {self.codes}")
        for name in ("labels", "layer_decay", "least"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} must be in (0, 1], not {getattr(self, name)}")
        if self.start and self.stage in ("pretrain", "adapt"):
            raise InputError(f"nothing starts from weights in stage {self.stage!r}")
        if self.stage == "probe" and not self.start:
            raise InputError("a probe needs start, the folder of a pre-training")


class PatchTokenizer(nn.Module):
    """Codes of patches of 4 x 4 px, found by k-means: a linear map to `channels` numbers, and the nearest direction.

    A patch's first principal components z become `(z, sqrt(R^2 - |z|^2))`, all of length R, so that the direction tells
    dark from bright, too. Pictures (B, 3, H, W) in -1..1 <-> ids (B, H / 4, W / 4).
    """

    basis: Tensor
    mean: Tensor
    radius: Tensor

    def __init__(self, codes: Tensor, basis: Tensor, mean: Tensor, radius: Tensor) -> None:
        super().__init__()
        self.codebook = Codebook(codes)
        for name, value in (("basis", basis), ("mean", mean), ("radius", radius)):
            self.register_buffer(name, value)

    @classmethod
    def fit(cls, pictures: Tensor, codes: int, seed: int, channels: int = 32) -> PatchTokenizer:
        """Finds the codes in the uint8 pictures (n, 3, H, W)."""
        random = torch.Generator().manual_seed(seed)
        # Patches of one colour are many and the same; each counts once.
        patches = torch.cat([_patches(normalised(some)).flatten(0, 1) for some in pictures.split(256)]).unique(dim=0)
        patches = patches[torch.randperm(len(patches), generator=random)[:_PATCHES]]
        if len(patches) < codes:
            raise InputError(f"there are only {len(patches)} different patches for {codes} codes")
        mean = patches.mean(0)
        basis = torch.linalg.eigh((patches - mean).T @ (patches - mean)).eigenvectors[:, -(channels - 1) :]
        radius = ((patches - mean) @ basis).norm(dim=1).quantile(0.99)
        points = F.normalize(_lifted((patches - mean) @ basis, radius), dim=1)
        found, _ = kmeans2(points.numpy(), points[:codes].numpy().copy(), iter=15, minit="matrix", missing="warn")
        return cls(F.normalize(torch.from_numpy(found).float(), dim=1) * channels**0.5, basis, mean, radius)

    @classmethod
    def load(cls, file: Path) -> PatchTokenizer:
        """InputError where the file is none."""
        try:
            parts = load_file(file)
            return cls(parts["codebook.weight"], parts["basis"], parts["mean"], parts["radius"])
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{file}: no tokenizer ({' '.join(str(error).split())[:100]})") from None

    def encode(self, pictures: Tensor) -> Tensor:
        height, width = (side // PATCH for side in pictures.shape[-2:])
        lifted = _lifted((_patches(pictures) - self.mean) @ self.basis, self.radius)
        return self.codebook.quantise(lifted.transpose(1, 2).unflatten(2, (height, width)))

    def decode(self, ids: Tensor) -> Tensor:
        codes = F.normalize(self.codebook.embed(ids).flatten(2), dim=1).transpose(1, 2) * self.radius
        patches = codes[..., :-1] @ self.basis.T + self.mean
        size = (ids.shape[1] * PATCH, ids.shape[2] * PATCH)
        return F.fold(patches.transpose(1, 2), size, PATCH, stride=PATCH).clamp(-1, 1)


def _patches(pictures: Tensor) -> Tensor:
    return F.unfold(pictures, PATCH, stride=PATCH).transpose(1, 2)


def _lifted(z: Tensor, radius: Tensor) -> Tensor:
    rest = (radius**2 - z.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
    return torch.cat([z, rest], -1)


class _Objective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it."""

    def __init__(
        self, student: Any, tokenizer: PatchTokenizer, augmentation: TokenAugmentation, stage: str
    ) -> None:  # fmt: skip
        super().__init__()
        self.student, self.tokenizer, self.augmentation, self.stage = student, tokenizer, augmentation, stage

    def forward(
        self, ids: Tensor, label: Tensor | None = None, image: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        if image is not None:
            geometry = Geometry.draw(len(ids), 2 * GRID, 2 * CROP, self.augmentation.scale)
            with torch.no_grad():
                target = self.tokenizer.encode(geometry(normalised(image)))
            return self.student.loss(self.tokenizer.codebook.embed(ids), geometry, target), {}
        ids, weights = self.augmentation(ids, label)
        if self.stage == "pretrain":
            return self.student.loss(ids)
        if self.stage == "probe":
            self.student.eval()
        return F.cross_entropy(self.student(ids), weights), {}


class SeitRecipe(Recipe):
    """See the module."""

    name = "seit"
    settings_type = SeitSettings
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 2, "batch": 4, "warmup": 1, "width": 16, "depth": 1, "heads": 2, "decoder_width": 16,
        "decoder_depth": 1, "decoder_heads": 2, "pictures": 6, "codes": 16, "labels": 1.0, "test_scenes": 6,
    }  # fmt: skip

    @classmethod
    def prepare(cls, settings: Settings, seed: int, out: Path) -> Settings:
        """Stores the pictures as tokens, unless another folder has them."""
        assert isinstance(settings, SeitSettings)
        if settings.tokens or settings.start:
            return dataclasses.replace(settings, tokens=settings.tokens or settings.start)
        settings = dataclasses.replace(settings, tokens=str(out))
        try:
            file = stored(settings)[1]
            if (len(file), file.codes) == (settings.pictures, settings.codes) and _of_seed(file, seed):
                return settings
        except InputError:
            pass  # Nothing is there yet, or it was damaged.
        pictures = single_objects("train", seed, settings.pictures)
        tokenizer = PatchTokenizer.fit(pictures["image"], settings.codes, seed)
        write_tensors(out / "tokenizer.safetensors", tokenizer.state_dict())
        write_tokens(
            out / "train.tokens", (tokenizer.encode(normalised(some)) for some in pictures["image"].split(64)),
            codes=settings.codes, labels=pictures["label"], classes=len(NAMES),
            codebook=tokenizer.codebook.fingerprint,
        )  # fmt: skip
        return settings

    def __init__(self, settings: SeitSettings, seed: int) -> None:
        self.settings, self.seed, stage = settings, seed, settings.stage
        self.tokenizer, self.file = stored(settings)
        codes, channels = self.tokenizer.codebook.weight.shape
        sizes = {name: getattr(settings, name) for name in ("width", "depth", "heads")}
        sizes |= {"codes": codes, "channels": channels, "grid": CROP}
        if stage == "adapt":
            shape = {"codes": codes, "channels": channels, "width": settings.width, "heads": settings.heads}
            if not _of_seed(self.file, seed):
                raise InputError(f"{self.file.path} has pictures of another seed than {seed}")
            self.student: Any = TokenAdapt(grid=GRID, crop=CROP, **shape)
            self.pictures = single_objects("train", seed, len(self.file))["image"]
        elif stage == "pretrain":
            decoder = {name: getattr(settings, name) for name in ("decoder_width", "decoder_depth", "decoder_heads")}
            self.student = Seit(**sizes, **decoder)
        else:
            self.student = SeitClassifier(**sizes, classes=len(NAMES))
            if settings.start:
                self.student.load_encoder(_from_folder(Seit, settings.start))
            if stage == "probe":
                self.student.requires_grad_(False).head.requires_grad_(True)
        self.labelled = max(1, round(settings.labels * len(self.file)))
        tuned = stage in ("finetune", "probe")
        adapt = _from_folder(TokenAdapt, settings.adapt) if settings.adapt else None
        self.augmentation = TokenAugmentation(
            self.tokenizer.codebook, adapt, crop=CROP, scale=(settings.least, 1.0), color=settings.color,
            noise_std=settings.noise_std, classes=len(NAMES) if settings.mix and tuned else 0,
        )  # fmt: skip
        self.model = _Objective(self.student, self.tokenizer, self.augmentation, stage)

    def batch(self, step: int, rank: int, world: int) -> Batch:
        tuned = self.settings.stage in ("finetune", "probe")
        count = self.labelled if tuned else len(self.file)
        numbers = drawn(count, self.seed, step, self.settings.batch)[rank::world]
        made = {"ids": self.file.batch(numbers)}
        if tuned:
            assert self.file.labels is not None
            made["label"] = self.file.labels[numbers]
        if self.settings.stage == "adapt":
            made["image"] = self.pictures[numbers]
        return made

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        loss, parts = model(**batch)
        return loss, {name: float(value) for name, value in parts.items()}

    def rate(self, name: str) -> float:
        if self.settings.stage != "finetune" or not self.settings.start:
            return 1.0
        return float(self.student.rate(name.removeprefix("student."), self.settings.layer_decay))

    def export(self, folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            self.student.save_pretrained(partial)
            for name in ("model.safetensors", "config.json"):
                os.replace(Path(partial) / name, folder / name)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """On the test split: what the stage is about, and what the pictures take on disk as tokens."""
        device = next(self.student.parameters()).device
        self.model.to("cpu").eval()
        pictures = single_objects("test", 0, self.settings.test_scenes)
        ids = torch.cat([self.tokenizer.encode(normalised(some)) for some in pictures["image"].split(64)])
        about: dict[str, Any] = {"split": "test", "pictures": len(ids), "stage": self.settings.stage}
        cut = self.augmentation(ids)[0]
        if self.settings.stage == "adapt":
            about |= self._adapted(ids, pictures["image"])
        elif self.settings.stage == "pretrain":
            about |= self._found(cut) | on_disk(pictures["image"], ids, self.tokenizer)
        else:
            logits = torch.cat([self.student(some) for some in cut.split(100)])
            about |= {"labelled": self.labelled, **accuracy_and_calibration(logits, pictures["label"])}
        self.model.to(device)
        return about

    def _found(self, ids: Tensor) -> dict[str, float]:
        """Loss and share of masked ids that are found, with half of the patches masked; and how often the commonest
        id of the training pictures would have been right."""
        student: Seit = self.student
        totals = torch.zeros(2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for some in ids.split(50):
                loss, parts = student.loss(some, student.draw(len(some), 0.5))
                totals += len(some) * torch.stack([loss, parts["accuracy"]])
        seen = self.file.batch(range(len(self.file))).flatten()
        commonest = torch.bincount(seen, minlength=self.file.codes).argmax()
        return {
            "masked_loss": float(totals[0] / len(ids)),
            "masked_accuracy": float(totals[1] / len(ids)),
            "commonest_id_accuracy": float((ids == commonest).float().mean()),
        }

    def _adapted(self, ids: Tensor, pictures: Tensor) -> dict[str, float]:
        """How well augmented tokens agree with the tokens of augmented pictures: with f and g, and without (the same
        geometry on embeddings of ids, which are half as large, and the nearest code)."""
        right, off = torch.zeros(2), torch.zeros(2)
        book = self.tokenizer.codebook
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for some, images in zip(ids.split(10), pictures.split(10)):
                geometry = Geometry.draw(len(some), 2 * GRID, 2 * CROP, (self.settings.least, 1.0))
                target = self.tokenizer.encode(geometry(normalised(images)))
                plain = F.avg_pool2d(geometry(F.interpolate(book.embed(some), scale_factor=2)), 2)
                for k, made in enumerate((self.student(book.embed(some), geometry), book.quantise(plain))):
                    right[k] += (made == target).float().mean() * len(some)
                    off[k] += (self.tokenizer.decode(made) - self.tokenizer.decode(target)).square().mean() * len(some)
        return {
            "same_ids": float(right[0] / len(ids)),
            "same_ids_without_adapt": float(right[1] / len(ids)),
            "decoded_mean_square_error": float(off[0] / len(ids)),
            "decoded_mean_square_error_without_adapt": float(off[1] / len(ids)),
        }


def stored(settings: SeitSettings) -> tuple[PatchTokenizer, TokenFile]:
    """The tokenizer and the token file of a folder; InputError where there is none, or they do not belong together."""
    folder = Path(settings.tokens)
    tokenizer, file = PatchTokenizer.load(folder / "tokenizer.safetensors"), TokenFile(folder / "train.tokens")
    if file.codebook != tokenizer.codebook.fingerprint or file.grid != (GRID, GRID):
        raise InputError(f"{file.path} was not made by the tokenizer beside it")
    return tokenizer, file


def _of_seed(file: TokenFile, seed: int) -> bool:
    """Whether the file has the training pictures of that seed, told by the first labels."""
    some = min(16, len(file))
    return file.labels is not None and torch.equal(file.labels[:some], single_objects("train", seed, some)["label"])


def _from_folder(cls: type[Any], folder: str) -> Any:
    if not (Path(folder) / "model.safetensors").is_file():
        raise InputError(f"there is no model.safetensors in {folder}")
    return cls.from_pretrained(folder)


def on_disk(pictures: Tensor, ids: Tensor, tokenizer: PatchTokenizer) -> dict[str, float]:
    """What uint8 pictures take as tokens, as JPEG (quality 95) and as PNG, as files of their own; and how much the
    tokens keep of them (PSNR, in dB)."""
    error = float((tokenizer.decode(ids) - normalised(pictures)).square().mean())
    measured: dict[str, float] = {"tokenizer_psnr": float(10 * torch.tensor(4 / error).log10())}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test.tokens"
        write_tokens(path, ids, codes=len(tokenizer.codebook.weight))
        tokens = TokenFile(path)
        for kind, options in (("jpeg", {"quality": 95}), ("png", {"optimize": True})):
            files = [Path(folder) / f"{number}.{kind}" for number in range(len(pictures))]
            for file, one in zip(files, pictures):
                Image.fromarray(one.permute(1, 2, 0).numpy()).save(file, **options)
            result = storage(tokens, files)
            measured[f"{kind}_bytes"], measured[f"ratio_to_{kind}"] = result.picture_bytes, result.ratio
        measured |= {"token_bytes": result.token_bytes, "bits_per_token": result.bits_per_token}
        measured |= {"entropy": result.entropy, "undeflated_bytes": tokens.plain}
    return measured
