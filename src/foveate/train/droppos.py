"""Recipe for `droppos`: a small vision transformer learns from scenes without labels, and is then given a few.

The loss is the paper's, on the pictures of `foveate.train.recognition` with their labels left out; sigma falls from
step to step. `evaluate` compares with a transformer of the same form that was not pre-trained: a linear classifier on
frozen features, and fine-tuning of all weights, both from the same tenth of the labels and, of fine-tuning, with the
same steps.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.data.scenes import NAMES
from foveate.method import InputError
from foveate.methods.learn.droppos import DropPos
from foveate.train.loop import Batch, Recipe, Settings, learning_rate, write_json, write_tensors
from foveate.train.recognition import SIDE, drawn, logits_of, single_objects, vision_transformer
from foveate.train.tiny_vit import normalised


@dataclasses.dataclass(frozen=True)
class DropPosSettings(Settings):
    """`mask`, `position_mask`, `hide`, `sigma`, `attentive`, `pixels`: see `foveate.methods.learn.droppos.DropPos`.

    Attributes:
        pictures: how many scenes there are to learn from.
        labels: share of them with which probe and fine-tuning are trained.
        tune_steps, tune_lr, tune_batch: of fine-tuning; no layer decay (the paper: 0.75).
        width, depth, heads: of the transformer; pictures have 96 px and patches 8 px.
        decoder_width, decoder_depth: of the decoder, with heads of 16 channels.
    """

    steps: int = 2500
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 150
    clip: float = 5.0
    workers: int = 0
    test_scenes: int = 2000
    pictures: int = 4000
    labels: float = 0.1
    tune_steps: int = 400
    tune_lr: float = 5e-4
    tune_batch: int = 32
    mask: float = 0.75
    position_mask: float = 0.75
    hide: str = "token"
    sigma: float = 1.0
    attentive: bool = True
    pixels: bool = False
    width: int = 96
    depth: int = 4
    heads: int = 3
    decoder_width: int = 96
    decoder_depth: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pictures", "tune_steps", "tune_batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, not {getattr(self, name)}")
        if not (0 < self.labels <= 1 and self.labels * self.pictures >= 1):
            raise InputError(f"labels must be a share in (0, 1] of at least one picture, not {self.labels}")
        if self.decoder_width < 16 or self.decoder_width % 16:
            raise InputError(f"decoder_width must be a multiple of 16, not {self.decoder_width}")
        if self.width % 4:
            raise InputError(f"width must be a multiple of 4, not {self.width}")


class _Objective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it."""

    def __init__(self, droppos: DropPos, steps: int) -> None:
        super().__init__()
        self.droppos, self.steps = droppos, steps

    def forward(self, step: Tensor, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.droppos.loss(normalised(image), self.droppos.sigma_at(int(step), self.steps))


class DropPosRecipe(Recipe):
    """See the module."""

    name = "droppos"
    settings_type = DropPosSettings
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 2, "batch": 4, "warmup": 1, "width": 16, "depth": 2, "heads": 2, "decoder_width": 16, "pictures": 20,
        "test_scenes": 8, "tune_steps": 2, "tune_batch": 2,
    }  # fmt: skip

    def __init__(self, settings: DropPosSettings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.config = {
            "img_size": SIDE, "patch_size": 8, "embed_dim": settings.width, "depth": settings.depth,
            "num_heads": settings.heads,
        }  # fmt: skip
        taken = ("mask", "position_mask", "hide", "sigma", "attentive", "pixels", "decoder_width", "decoder_depth")
        self.droppos = DropPos(
            options=self.config, decoder_heads=settings.decoder_width // 16,
            **{name: getattr(settings, name) for name in taken},
        )  # fmt: skip
        self.model = _Objective(self.droppos, settings.steps)
        self.pictures = single_objects("train", seed, settings.pictures)
        self.untrained = {name: value.clone() for name, value in self.droppos.encoder.state_dict().items()}

    def batch(self, step: int, rank: int, world: int) -> Batch:
        numbers = drawn(self.settings.pictures, self.seed, step, self.settings.batch)[rank::world]
        return {"step": torch.tensor(step), "image": self.pictures["image"][numbers]}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        loss, parts = model(**batch)
        return loss, {name: float(value.detach()) for name, value in parts.items()}

    def export(self, folder: Path) -> None:
        write_tensors(folder / "model.safetensors", self.droppos.encoder.state_dict())
        write_json(folder / "config.json", {"name": self.name, **self.config})

    def evaluate(self) -> dict[str, Any]:
        """Accuracy on the test split with few labels, pre-trained and not, and of hidden positions."""
        settings, device = self.settings, next(self.droppos.parameters()).device
        test = {name: value.to(device) for name, value in single_objects("test", 0, settings.test_scenes).items()}
        count = max(1, int(settings.labels * settings.pictures + 1e-9))
        few = {name: self.pictures[name][:count].to(device) for name in ("image", "label")}
        result: dict[str, Any] = {
            "split": "test", "pictures": settings.test_scenes, "labels": count,
            "position_accuracy": self._position_accuracy(test["image"]), "chance": 1 / self.droppos.places,
        }  # fmt: skip
        for name, weights in (("pretrained", self.droppos.encoder.state_dict()), ("scratch", self.untrained)):
            model = self._classifier(weights).to(device)
            result[f"{name}_linear_probe"] = linear_probe(model, few, test)
            result[f"{name}_fine_tuned"] = self._fine_tuned(model, few, test)
        return result

    @torch.no_grad()
    def _position_accuracy(self, images: Tensor) -> float:
        """Share of hidden positions that are found, each picture drawn once."""
        torch.manual_seed(0)
        right = [
            float(self.droppos.loss(normalised(some), 0.0)[1]["accuracy"]) * len(some) for some in images.split(100)
        ]
        return sum(right) / len(images)

    def _classifier(self, weights: dict[str, Tensor]) -> Any:
        """A timm ViT that averages its patches, as the paper fine-tunes, with an encoder's weights."""
        settings = self.settings
        torch.manual_seed(self.seed)
        model = vision_transformer(settings.width, settings.depth, settings.heads, global_pool="avg", fc_norm=False)
        model.pos_embed.requires_grad_(False)
        model.load_state_dict(weights | {"head.weight": model.head.weight, "head.bias": model.head.bias})
        return model.eval()

    def _fine_tuned(self, model: Any, few: Batch, test: Batch) -> float:
        """Accuracy after `tune_steps` steps on the few labels."""
        settings = self.settings
        schedule = Settings(
            steps=settings.tune_steps, lr=settings.tune_lr, warmup=min(settings.warmup, settings.tune_steps // 10)
        )
        groups = [
            {"params": [p for p in model.parameters() if p.requires_grad and (p.ndim > 1) == decays],
             "weight_decay": settings.weight_decay if decays else 0.0}
            for decays in (True, False)
        ]  # fmt: skip
        optimizer = torch.optim.AdamW(groups, lr=settings.tune_lr, betas=(0.9, 0.999))
        model.train()
        for step in range(settings.tune_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, schedule)
            numbers = drawn(len(few["label"]), self.seed, step, settings.tune_batch).to(few["label"].device)
            loss = F.cross_entropy(model(normalised(few["image"][numbers])), few["label"][numbers])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            optimizer.zero_grad()
        return _accuracy(logits_of(model.eval(), test["image"]), test["label"])


def linear_probe(model: Any, few: Batch, test: Batch, decay: float = 1e-3) -> float:
    """Accuracy of a linear classifier on the frozen model's pooled features, each standardised over the few.

    It minimises cross entropy + `decay` * |weights|^2 with L-BFGS; the problem is convex.
    """

    def features(images: Tensor) -> Tensor:
        return logits_of(lambda some: model.forward_head(model.forward_features(some), pre_logits=True), images)

    known, unknown = features(few["image"]), features(test["image"])
    mean, deviation = known.mean(0), known.std(0, unbiased=False).clamp(min=1e-6)
    known, unknown, label = (known - mean) / deviation, (unknown - mean) / deviation, few["label"].cpu()
    weight = torch.zeros(len(NAMES), known.shape[1], requires_grad=True)
    bias = torch.zeros(len(NAMES), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(known, weight, bias), label) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return _accuracy(F.linear(unknown, weight, bias).detach(), test["label"])


def _accuracy(logits: Tensor, label: Tensor) -> float:
    return float((logits.argmax(1) == label.cpu()).float().mean())
