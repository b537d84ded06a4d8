"""Tokenizers by name or folder: what `foveate train titok`, `one-d-piece` or `tiny-vq` wrote."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from foveate import zoo
from foveate.method import InputError, did_you_mean, published
from foveate.nn.codes import Codes


class Tokenizer(Protocol):
    """What makes codes of pictures and pictures of codes: an `nn.Module`, in eval mode.

    Attributes:
        any_length: whether it decodes the first few ids of a picture, too.
    """

    any_length: bool

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures in px."""

    def encode(self, pixels: Tensor) -> Codes:
        """(B, 3, H, W) in [0, 1] -> codes."""

    def decode(self, codes: Codes, tokens: int | None = None) -> Tensor:
        """Codes, or only the first `tokens` of each picture -> (B, 3, H, W) in [0, 1]."""


class GridTokenizer(nn.Module):
    """A diffusers `VQModel`, such as `tiny-vq`, as a `Tokenizer` of grids."""

    any_length = False

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.size = (int(model.config.sample_size),) * 2

    def encode(self, pixels: Tensor) -> Codes:
        from foveate.zoo import vq

        return vq.encode(self.model, pixels)

    def decode(self, codes: Codes, tokens: int | None = None) -> Tensor:
        from foveate.zoo import vq

        return vq.decode(self.model, codes if tokens is None else codes.first(tokens))


def find_tokenizer(name: str) -> tuple[str, Path]:
    """The name that files get, and the folder to load; `name` is one of the zoo, or a folder.

    Raises:
        InputError: for anything else.
    """
    if name in _shipped():
        return name, zoo.path(name)
    if Path(name).is_dir():
        return Path(name).resolve().name, Path(name)
    if name in _classes():
        raise InputError(f"{name} is not shipped here; --tokenizer FOLDER takes what `foveate train {name}` writes")
    known = did_you_mean(name, [*_shipped(), *_classes()])
    raise InputError(f"unknown tokenizer {name!r}: neither shipped ({known}), nor a folder here")


def load_tokenizer(folder: str | Path) -> Any:
    """The `Tokenizer` of a folder with `config.json` and `model.safetensors`, in float32 and eval mode.

    Raises:
        InputError: no tokenizer there, or one whose weights do not fit its configuration.
    """
    folder = Path(folder)
    config = zoo.read_json(folder, "config.json", "tokenizer")
    config = config if isinstance(config, dict) else {}
    cls = _classes().get(str(config.pop("method", "")))
    grid = config.get("_class_name") == "VQModel"
    if cls is None and not grid:
        raise InputError(f"{folder}: no tokenizer; `foveate train titok` writes one")
    try:
        if cls is None:
            return GridTokenizer(zoo.load_folder(folder)).eval()
        # Not from_pretrained, which prints, and is silent about weights that are missing.
        tokenizer = cls(**config)
        tokenizer.load_state_dict(load_file(folder / "model.safetensors"))
        return tokenizer.eval()
    except InputError as error:
        raise InputError(f"{folder}/config.json: {error}") from None
    except (OSError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise InputError(f"{folder}: its weights cannot be loaded: {reason}") from None


def fingerprint(model: nn.Module) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of all weights: names, types, shapes, values."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _classes() -> dict[str, Any]:
    return {slug: cls for slug, cls in published().items() if cls.card.kind == "tokenize"}


def _shipped() -> list[str]:
    return [name for name in zoo.names() if name in ("tiny-vq", *_classes())]
