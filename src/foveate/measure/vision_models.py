"""Models that look at pictures, as `compare --task` loads them: the zoo's tiny-vit, and classifiers of timm and
transformers; and models with weights of their own that `foveate train` wrote, to stand beside one."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from foveate import zoo
from foveate.data.scenes import NAMES
from foveate.hosts import SUPPORTED
from foveate.method import InputError, Published, did_you_mean, published, published_class

DEFAULT = "tiny-vit"
TRAINED = ("stvit", "sit-slim", "sparsifiner", "ssm-prune", "davit", "strip-mlp", "dtop", "hot")
"""Kinds of folders that stand beside a model: those that `foveate train` writes with `save_pretrained`."""


@dataclass(frozen=True, eq=False)
class VisionModel:
    """A model in evaluation mode, and what goes with it.

    Attributes:
        name: as the user gave it.
        model: pixels (B, 3, H, W) -> logits.
        prepare: a picture -> pixels (3, H, W).
        mean, std: of the three channels, which `prepare` took off and divided by.
        classes: for each logit its names, lower case; several where there are synonyms.
        scenes: whether it knows the 40 things of scenes, each a yes or no.
    """

    name: str
    model: Any
    prepare: Callable[[Image.Image], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: Sequence[frozenset[str]]
    scenes: bool = False

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def logits(self, pixels: Tensor) -> Tensor:
        """(B, classes) float32."""
        output = self.model(pixels)
        return (output if isinstance(output, Tensor) else output.logits).float()

    def restored(self, pixels: Tensor) -> Image.Image:
        """The picture of which `prepare` made these pixels (3, H, W)."""
        shape = (-1, 1, 1)
        shown = pixels.float().cpu().numpy() * np.reshape(self.std, shape) + np.reshape(self.mean, shape)
        return Image.fromarray(np.clip(np.rint(255 * shown), 0, 255).astype(np.uint8).transpose(1, 2, 0))


@dataclass(frozen=True, eq=False)
class Trained:
    """A model with weights of its own, measured as it is.

    Attributes:
        slug: of the paper.
        folder: that it was loaded from.
        model: as loaded.
        patch_head: of a model whose tokens come without classes: (B, N, C) -> (B, N, classes); None for none.
    """

    slug: str
    folder: str
    model: Any
    patch_head: nn.Module | None = field(default=None)


def load_vision_model(name: str = DEFAULT, device: str = "cpu", dtype: torch.dtype = torch.float32) -> VisionModel:
    """A model by the zoo's name, a folder, or a hub id OWNER/NAME, which is downloaded.

    A folder has a config.json, of the zoo's kind, of timm's or of transformers', and weights in model.safetensors.

    Raises:
        InputError: for what is none of these, cannot be loaded, or is a model that `foveate.apply` has no adapter for.
    """
    source = str(zoo.path(name)) if name in zoo.names() else name
    try:
        config = _config(name, source)
        if config.get("name") == DEFAULT:
            loaded = _scene_transformer(name, Path(source), config)
        elif "architecture" in config:
            loaded = _timm(name, source)
        else:
            loaded = _transformers(name, source, config)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{name} cannot be loaded: {reason[:300]}") from None
    loaded.model.to(device, dtype).eval()
    return loaded


def load_trained(entry: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Trained:
    """The model in a folder that `foveate train` wrote; "NAME=FOLDER" where its metrics.json does not tell whose it is.

    Raises:
        InputError: for a folder that is not such a one.
    """
    slug, equals, folder = entry.partition("=")
    if not equals:
        slug, folder = "", entry
    path = Path(folder)
    if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
        raise InputError(f"{folder}: no trained model here; its folder has a config.json and a model.safetensors")
    if not slug:
        file = path / "metrics.json"
        if not file.is_file():
            raise InputError(f"{folder}: whose weights are these? There is no metrics.json; write NAME={folder}")
        slug = str(zoo.read_json(path, "metrics.json", "trained model").get("name"))
    if slug not in TRAINED:
        raise InputError(f"{folder}: a trained {slug!r} cannot stand beside others; {did_you_mean(slug, TRAINED)}")
    cls: Any = published_class(slug)
    try:
        # huggingface_hub prints that it reads a folder.
        with contextlib.redirect_stdout(io.StringIO()):
            model = cls.from_pretrained(folder, local_files_only=True)
        head = None
        if (path / "patch_head.safetensors").is_file():
            state = load_file(path / "patch_head.safetensors")
            if set(state) == {"weight", "bias"}:
                head = nn.Linear(state["weight"].shape[1], state["weight"].shape[0])
                head.load_state_dict(state)
                head.to(device, dtype).eval()
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: no {slug} that can be loaded ({' '.join(str(error).split())[:200]})") from None
    return Trained(slug, folder, model.to(device, dtype).eval(), head)


def is_trained(entry: str) -> bool:
    """Whether an entry of --methods is a trained model's: NAME=FOLDER, a folder that is there and no method's name, or
    what can only be a folder."""
    return "=" in entry or "/" in entry or (Path(entry).is_dir() and entry not in published())


def check_untrained(name: str) -> None:
    """Raises an InputError for a name that needs weights, which says how to get them."""
    cls: type[Published] = published_class(name)
    if not cls.card.training_free and name in TRAINED:
        raise InputError(f"{name} needs weights: name a folder that `foveate train {name}` wrote, such as runs/{name}")


def spelled(name: str) -> str:
    """A class's name as it is compared."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def fitted(picture: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """The middle square of a picture, `side` px."""
    if picture.size == (side, side):
        return picture
    scale = side / min(picture.size)
    width, height = (max(side, round(scale * length)) for length in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    return picture.resize((width, height), resample).crop((left, top, left + side, top + side))


def _config(name: str, source: str) -> dict[str, Any]:
    if Path(source).exists():
        if not (Path(source) / "config.json").is_file():
            raise InputError(f"{name}: no model here; a model's folder has a config.json")
        file = Path(source) / "config.json"
    elif source.count("/") == 1 and all(source.split("/")):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging

        # Its warnings are one for every try, before the error that ends in one line.
        logging.set_verbosity_error()
        file = Path(hf_hub_download(source, "config.json"))
        hf_hub_download(source, "model.safetensors")
    else:
        raise InputError(f"unknown model {name!r}: neither {DEFAULT}, nor a folder here, nor a hub id OWNER/NAME")
    if Path(source).exists() and not (Path(source) / "model.safetensors").is_file():
        raise InputError(f"{name}: no weights here; they have to be in model.safetensors")
    values = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise InputError(f"{name}: its config.json is no model's")
    return values


def _scene_transformer(name: str, folder: Path, config: dict[str, Any]) -> VisionModel:
    sizes = {key: value for key, value in config.items() if key != "name"}
    # Of any size, so that lower resolution can stand beside the methods.
    model = zoo.build_vit(sizes | {"dynamic_img_size": True})
    model.load_state_dict(load_file(folder / "model.safetensors"))
    side = int(sizes["img_size"])

    def prepare(picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(fitted(picture, side))).permute(2, 0, 1).float() / 127.5 - 1

    half = (0.5,) * 3
    return VisionModel(name, model, prepare, half, half, [frozenset({spelled(one)}) for one in NAMES], scenes=True)


def _timm(name: str, source: str) -> VisionModel:
    try:
        import timm
    except ModuleNotFoundError:
        raise InputError(f"{name} is a model of timm: pip install 'foveate[timm]'") from None
    where = f"local-dir:{source}" if Path(source).exists() else f"hf-hub:{source}"
    try:
        model = timm.create_model(where, pretrained=True, dynamic_img_size=True)
    except TypeError:
        raise InputError(f"{name} is no vision transformer, of which alone timm's can be used here") from None
    _check_supported(name, model)
    settings = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**settings, is_training=False)
    cfg = model.pretrained_cfg
    count = model.num_classes
    if not count:
        raise InputError(f"{name} is a backbone without classes; give a classifier")
    labels = list(cfg.get("label_names") or ())
    told = cfg.get("label_descriptions") or {}
    classes = [frozenset(_synonyms(one, str(told.get(one, "")))) for one in labels]
    if len(classes) != count:
        subset = timm.data.infer_imagenet_subset(model)
        info = timm.data.ImageNetInfo(subset) if subset else None
        classes = [
            frozenset(_synonyms(info.index_to_label_name(k), info.index_to_description(k))) if info else frozenset()
            for k in range(count)
        ]
    return VisionModel(name, model, transform, tuple(settings["mean"]), tuple(settings["std"]), classes)


def _transformers(name: str, source: str, config: dict[str, Any]) -> VisionModel:
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    from transformers.utils import logging

    logging.disable_progress_bar()
    usable = [one for one in SUPPORTED if one in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()]
    for architecture in config.get("architectures") or ("no model of transformers",):
        if architecture not in usable:
            raise InputError(f"{name} is {architecture}; --task can use {', '.join(usable)} and ViTs of timm")
    model: Any = AutoModelForImageClassification.from_pretrained(source, trust_remote_code=False, use_safetensors=True)
    processor: Any = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)

    def prepare(picture: Image.Image) -> Tensor:
        pixels: Tensor = processor(images=[picture], return_tensors="pt")["pixel_values"][0]
        return pixels

    labels = model.config.id2label
    classes = [frozenset(_synonyms(str(labels[k]))) for k in range(model.config.num_labels)]
    normalised = getattr(processor, "do_normalize", False)
    mean = tuple(processor.image_mean) if normalised else (0.0,) * 3
    return VisionModel(name, model, prepare, mean, tuple(processor.image_std) if normalised else (1.0,) * 3, classes)


def _synonyms(*names: str) -> set[str]:
    """All of the names, and their parts between commas."""
    return {spelled(part) for name in names if name for part in (name, *name.split(","))}


def _check_supported(name: str, model: Any) -> None:
    if not any(base.__name__ in SUPPORTED for base in type(model).__mro__):
        raise InputError(f"{name} is a {type(model).__name__}; of timm's, --task can use VisionTransformer and DeiT")
