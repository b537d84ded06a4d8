"""Recipes for `tiny-ar` and `tiny-ar-draft`: causal models that write a captioned scene as codes of `tiny-vq`.

The loss is the mean cross entropy of the codes, given the caption or, for a share of the pictures, nothing. A fixed
number of scenes is encoded before training and kept in a file. The draft is the same thing, smaller, on the same file.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from foveate import zoo
from foveate.data.scenes import CaptionedScenes, caption_words, stacked
from foveate.measure.generation import generator_scores
from foveate.method import InputError
from foveate.train.diffusion import ZOO, caption_ids, without_some
from foveate.train.encoded import holds, keep
from foveate.train.loop import Batch, Recipe, Settings, train
from foveate.train.recognition import drawn
from foveate.train.tiny_vae import SIDE, save
from foveate.train.tiny_vq import TinyVq
from foveate.zoo.tokenizer import fingerprint


@dataclasses.dataclass(frozen=True)
class TinyArSettings(Settings):
    """`layers`, `width`, `heads`: of the language model.

    Attributes:
        vq: folder of a trained tiny-vq, or "zoo"; "" takes the zoo's, or trains one first where there is none.
        codes: file of encoded scenes; "" is OUT/codes.safetensors. It is made where it is not there.
        pictures: scenes that are encoded.
        drop: share of captions that are left out in training, for classifier-free guidance.
        guidance_scale: with which pictures are made.
    """

    steps: int = 3000
    batch: int = 16
    lr: float = 1.5e-3
    warmup: int = 200
    weight_decay: float = 0.05
    test_scenes: int = 1000
    vq: str = ""
    codes: str = ""
    pictures: int = 25_000
    drop: float = 0.1
    layers: int = 6
    width: int = 192
    heads: int = 6
    guidance_scale: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pictures", "layers"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, not {getattr(self, name)}")
        if not 0 <= self.drop < 1:
            raise InputError(f"drop must be >= 0 and < 1, not {self.drop}")
        if self.heads < 1 or self.width < 2 or self.width % (2 * self.heads):
            raise InputError(f"width must be a multiple of 2 * heads, not {self.width} with {self.heads} heads")
        if not 0 <= self.guidance_scale < float("inf"):
            raise InputError(f"guidance_scale must be >= 0, not {self.guidance_scale}")


@dataclasses.dataclass(frozen=True)
class TinyArDraftSettings(TinyArSettings):
    """The same, smaller."""

    lr: float = 2e-3
    layers: int = 2
    width: int = 96
    heads: int = 3


class _Objective(nn.Module):
    """All that is computed on a batch in one `forward`, as several processes need it."""

    def __init__(self, generator: Any, drop: float) -> None:
        super().__init__()
        self.llama, self.tokenizer, self.first, self.drop = (
            generator.model, generator.tokenizer, generator.codes[0], drop
        )  # fmt: skip

    def forward(self, prompt: Tensor, codes: Tensor) -> Tensor:
        """Mean cross entropy, in nats a code, of codes (B, N) after prompts (B, L) that are padded on the left."""
        prompt = without_some(prompt, self.tokenizer, self.drop) if self.training else prompt
        wanted = codes + self.first
        ids = torch.cat([prompt, wanted[:, :-1]], 1)
        mask = (ids != self.tokenizer.pad_token_id).long()
        logits = self.llama(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False,
            logits_to_keep=codes.shape[1],
        ).logits  # fmt: skip
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())


class TinyAr(Recipe):
    """See the module."""

    name = "tiny-ar"
    settings_type = TinyArSettings
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 2, "batch": 2, "warmup": 1, "layers": 1, "width": 16, "heads": 2, "workers": 0, "pictures": 6,
        "test_scenes": 4,
    }  # fmt: skip

    @classmethod
    def prepare(cls, settings: Settings, seed: int, out: Path) -> Settings:
        """Finds the tokenizer of pictures, or trains it into `out`/tiny-vq; encodes the scenes where no file has
        them."""
        assert isinstance(settings, TinyArSettings)
        zoo.need_diffusers()
        if settings.vq not in ("", ZOO):
            if not (Path(settings.vq) / "config.json").is_file():
                raise InputError(f"vq: there is no config.json in {settings.vq}")
        elif TinyVq.name in zoo.names():
            settings = dataclasses.replace(settings, vq=ZOO)
        else:
            trained = out / TinyVq.name
            if not (trained / "metrics.json").is_file():
                quick = settings.steps <= cls.smoke["steps"]
                train(TinyVq, out=trained, seed=seed, **(TinyVq.smoke if quick else {}))
            settings = dataclasses.replace(settings, vq=str(trained))
        vq = _load_vq(settings.vq)
        about = {
            "vq": fingerprint(vq), "pictures": str(settings.pictures), "seed": str(seed),
            "words": " ".join(caption_words()),
        }  # fmt: skip
        file = Path(settings.codes or out / "codes.safetensors")
        if not holds(file, about):
            if settings.codes and file.exists():
                raise InputError(f"codes: {file} has other scenes, or of another tokenizer; name another file")
            keep(file, encoded(vq, settings.pictures, seed), about)
        return dataclasses.replace(settings, codes=str(file))

    def __init__(self, settings: TinyArSettings, seed: int) -> None:
        from foveate.zoo.ar import PictureGenerator, build_ar, build_tokenizer
        from foveate.zoo.vq import pitch_of

        self.settings, self.seed = settings, seed
        self.data = load_file(settings.codes)
        vq, tokenizer = _load_vq(settings.vq), build_tokenizer(caption_words())
        side = SIDE // pitch_of(vq)
        sizes = {name: getattr(settings, name) for name in ("layers", "width", "heads", "guidance_scale")}
        llama = build_ar(tokenizer, vq, grid=(side, side), **sizes)
        self.generator = PictureGenerator(llama.train(), tokenizer, vq)
        self.model = _Objective(self.generator, settings.drop)

    def batch(self, step: int, rank: int, world: int) -> Batch:
        chosen = drawn(self.settings.pictures, self.seed, step, self.settings.batch)[rank::world]
        return {name: values[chosen].long() for name, values in self.data.items()}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        return model(**batch), {}

    def export(self, folder: Path) -> None:
        """The language model and what reads its captions, as transformers has them, and the tokenizer of pictures,
        unless it is the zoo's."""
        from foveate.zoo.ar import VQ

        save(self.generator.model, folder)
        save(self.generator.tokenizer, folder)
        if self.settings.vq != ZOO:
            (folder / VQ).mkdir(exist_ok=True)
            save(self.generator.vq, folder / VQ)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Nats a code on the test split, and `generator_scores` with guidance."""
        count = self.settings.test_scenes
        test = encoded(self.generator.vq, count, 0, split="test")
        parts = zip(test["prompt"].long().split(100), test["codes"].long().split(100))
        device = self.generator.model.device
        total = sum(float(self.model(prompt.to(device), codes.to(device))) * len(codes) for prompt, codes in parts)
        return {
            "split": "test",
            "nats_per_code": total / count,
            "parameters": self.generator.model.num_parameters(),
            **generator_scores(self.generator.draw, size=SIDE, count=count),
        }


class TinyArDraft(TinyAr):
    """The small one."""

    name = "tiny-ar-draft"
    settings_type = TinyArDraftSettings


def encoded(vq: Any, count: int, seed: int, *, split: str = "train") -> dict[str, Tensor]:
    """The first captioned scenes of a split: `prompt` (n, L) and `codes` (n, N), both int16."""
    from foveate.zoo.ar import build_tokenizer
    from foveate.zoo.vq import encode

    scenes, tokenizer = CaptionedScenes(split, seed, size=SIDE), build_tokenizer(caption_words())
    captions: list[str] = []
    codes: list[Tensor] = []
    for first in range(0, count, 100):
        some = [scenes[k] for k in range(first, min(first + 100, count))]
        captions += [one.caption for one in some]
        codes.append(encode(vq, stacked(one.scene for one in some)).ids.short())
    return {"prompt": caption_ids(tokenizer, captions).short(), "codes": torch.cat(codes)}


def _load_vq(name: str) -> Any:
    """The zoo's tiny-vq ("zoo") or that of a folder, frozen."""
    return zoo.load_folder(zoo.path(TinyVq.name) if name == ZOO else name).requires_grad_(False)
