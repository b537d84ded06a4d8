"""What the recipes of diffusion models share: captioned scenes as latents, encoded once, and the text drop.

Encoding costs more than a training step of so small a denoiser, so a fixed number of scenes is encoded before training
and kept in a file, with the ids of their captions and the object under each of 8 x 8 patches.

The objects under the patches are for a second loss: halfway through the denoiser, its states say which object lies
where. The names are in the caption and the places, more or less, in the noisy latents; a denoiser that has to name them
reads its caption from the first steps on (compare the representation alignment of arXiv 2410.06940, where the target
is another network's features). The linear head is not part of the exported model.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from foveate import zoo
from foveate.data.scenes import NAMES, CaptionedScenes, caption_words, patch_labels
from foveate.method import InputError
from foveate.train.encoded import holds, keep
from foveate.train.loop import Batch, Recipe, Settings, train
from foveate.train.recognition import drawn
from foveate.train.tiny_vae import SIDE, TinyVae, images, save
from foveate.zoo.tokenizer import fingerprint

ZOO = "zoo"
PATCHES = 8
"""Patches a side whose objects are told from the denoiser's states."""


@dataclasses.dataclass(frozen=True)
class DiffusionSettings(Settings):
    """What every recipe of a diffusion model can be told besides.

    Attributes:
        vae: folder of a trained tiny-vae, or "zoo"; "" takes the zoo's, or trains one first where there is none.
        latents: file of encoded scenes; "" is OUT/latents.safetensors. It is made where it is not there.
        pictures: scenes that are encoded.
        drop: share of captions that are left out in training, for classifier-free guidance.
        objects_weight: of the loss on which object lies where.
        guidance_scale, inference_steps: with which the evaluation's pictures are made.
    """

    batch: int = 32
    lr: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    workers: int = 0
    test_scenes: int = 1000
    vae: str = ""
    latents: str = ""
    pictures: int = 30_000
    drop: float = 0.1
    objects_weight: float = 0.2
    guidance_scale: float = 4.0
    inference_steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pictures", "inference_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, not {getattr(self, name)}")
        if not 0 <= self.drop < 1:
            raise InputError(f"drop must be >= 0 and < 1, not {self.drop}")
        for name in ("objects_weight", "guidance_scale"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be >= 0, not {getattr(self, name)}")


class DiffusionRecipe(Recipe):
    """A denoiser of latents, saved as a diffusers pipeline. A subclass builds this and the objective on it."""

    pipeline: Any
    data: Batch
    """`latents` (n, 4, 16, 16) float16, `ids` (n, L) int16, `objects` (n, 64) uint8: 0, or 1 + index into NAMES."""

    def __init__(self, settings: Any, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.data = load_file(settings.latents)
        self.pipeline = self.build_pipeline(load_vae(settings.vae), build_tokenizer())
        self.model = self.build_objective()

    def build_pipeline(self, vae: Any, tokenizer: Any) -> Any:
        """The untrained pipeline."""
        raise NotImplementedError

    def build_objective(self) -> nn.Module:
        """What is trained: (latents, ids, objects) -> the parts "denoising" and "objects" of the loss."""
        raise NotImplementedError

    @classmethod
    def prepare(cls, settings: Settings, seed: int, out: Path) -> Settings:
        """Finds the autoencoder, or trains it into `out`/vae; encodes the scenes where no file has them."""
        assert isinstance(settings, DiffusionSettings)
        zoo.need_diffusers()
        quick = settings.steps <= cls.smoke["steps"]
        if settings.vae not in ("", ZOO):
            if not (Path(settings.vae) / "config.json").is_file():
                raise InputError(f"vae: there is no config.json in {settings.vae}")
        elif "tiny-vae" in zoo.names():
            settings = dataclasses.replace(settings, vae=ZOO)
        else:
            if not (out / "vae" / "metrics.json").is_file():
                train(TinyVae, out=out / "vae", seed=seed, **(TinyVae.smoke if quick else {}))
            settings = dataclasses.replace(settings, vae=str(out / "vae"))
        vae = load_vae(settings.vae)
        about = _about(vae, settings.pictures, seed)
        file, given = Path(settings.latents or out / "latents.safetensors"), bool(settings.latents)
        if not holds(file, about):
            if given and file.exists():
                raise InputError(f"latents: {file} has other scenes, or of another autoencoder; name another file")
            encode_scenes(vae, settings.pictures, seed, file, about)
        return dataclasses.replace(settings, latents=str(file))

    def batch(self, step: int, rank: int, world: int) -> Batch:
        chosen = drawn(self.settings.pictures, self.seed, step, self.settings.batch)[rank::world]
        return {name: values[chosen] for name, values in self.data.items()}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        parts: dict[str, Tensor] = model(batch["latents"].float(), batch["ids"].long(), batch["objects"].long())
        total = parts["denoising"] + self.settings.objects_weight * parts["objects"]
        return total, {name: float(value.detach()) for name, value in parts.items()}

    def export(self, folder: Path) -> None:
        save(self.pipeline, folder)

    def evaluate(self) -> dict[str, Any]:
        """`generator_scores` with the guidance and the number of steps of the settings."""
        from foveate.measure.generation import generator_scores

        options = {"guidance_scale": self.settings.guidance_scale, "steps": self.settings.inference_steps}
        self.pipeline.to(next(self.model.parameters()).device)
        return {
            "split": "test",
            "guidance_scale": options["guidance_scale"],
            "inference_steps": options["steps"],
            **generator_scores(
                lambda captions: draw(self.pipeline, captions, seed=0, **options),
                size=SIDE, count=self.settings.test_scenes,
            ),
        }  # fmt: skip


class ObjectHead(nn.Module):
    """Which object lies under each patch, from the states that a module of the denoiser gives out; see the module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1 + len(NAMES))

    def loss(self, states: Tensor, objects: Tensor) -> Tensor:
        """Mean cross entropy of states (B, N, width) where `objects` (B, N) says 0, or 1 + index into NAMES."""
        return F.cross_entropy(self.linear(states).flatten(0, 1), objects.flatten())


def watched(module: nn.Module, call: Callable[[], Any]) -> tuple[Any, Any]:
    """What `call()` returns, and what `module` gave out while it ran."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        return call(), seen[-1]
    finally:
        handle.remove()


def caption_ids(tokenizer: Any, captions: list[str]) -> Tensor:
    """(n, L) ids as the pipelines make them, padded to the tokenizer's greatest length."""
    found = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return found.input_ids


def without_some(ids: Tensor, tokenizer: Any, share: float) -> Tensor:
    """(B, L) ids of captions, a random `share` of them replaced by the empty caption."""
    left_out = torch.rand(len(ids), 1, device=ids.device) < share
    return torch.where(left_out, caption_ids(tokenizer, [""]).to(ids.device), ids)


def load_vae(name: str) -> Any:
    """The zoo's tiny-vae ("zoo") or that of a folder, in eval mode and frozen."""
    from diffusers import AutoencoderKL

    folder = zoo.path("tiny-vae") if name == ZOO else Path(name)
    return AutoencoderKL.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)


def build_tokenizer() -> Any:
    """Of all captions of `CaptionedScenes`."""
    from foveate.zoo.text import build_caption_tokenizer

    return build_caption_tokenizer(caption_words())


def encode_scenes(vae: Any, count: int, seed: int, file: Path, about: dict[str, str]) -> None:
    """Writes the first `count` captioned scenes of the training split as `DiffusionRecipe.data`, under `file`."""
    from foveate.zoo.vae import encode

    scenes, tokenizer = CaptionedScenes("train", seed, size=SIDE), build_tokenizer()
    latents, captions, objects = [], [], []
    for first in range(0, count, 50):
        some = [scenes[i] for i in range(first, min(first + 50, count))]
        latents.append(encode(vae, images(some)).half().cpu())
        captions += [one.caption for one in some]
        objects += [torch.from_numpy(patch_labels(one.scene, SIDE // PATCHES).ravel()) for one in some]
    tensors = {
        "latents": torch.cat(latents),
        "ids": caption_ids(tokenizer, captions).short(),
        "objects": torch.stack(objects).byte(),
    }
    keep(file, tensors, about)


def _about(vae: Any, count: int, seed: int) -> dict[str, str]:
    """What a file of encoded scenes depends on."""
    return {"vae": fingerprint(vae), "pictures": str(count), "seed": str(seed), "words": " ".join(caption_words())}


@torch.no_grad()
def draw(
    pipeline: Any, captions: list[str], *, seed: int, guidance_scale: float, steps: int, batch: int = 50
) -> Tensor:
    """(n, 3, 64, 64) uint8 pictures of the captions; picture i depends on (seed, i) and its caption alone."""
    pipeline.set_progress_bar_config(disable=True)
    # Lumina cleans captions with packages that need not be here, and says so at every call.
    options = {"clean_caption": False} if "clean_caption" in inspect.signature(pipeline.__call__).parameters else {}
    made = []
    for first in range(0, len(captions), batch):
        some = captions[first : first + batch]
        noise = [torch.Generator().manual_seed(1_000_003 * seed + first + i) for i in range(len(some))]
        found = pipeline(
            some, guidance_scale=guidance_scale, num_inference_steps=steps, generator=noise, output_type="pt", **options
        ).images
        made.append((found * 255).round().byte().cpu())
    return torch.cat(made)
