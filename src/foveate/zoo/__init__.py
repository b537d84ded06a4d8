"""Small real models trained by this project, so that every method has a trained host offline.

`names()`, `path(name)` (a folder with safetensors and JSON), `load(name)`. How they were trained and how good they
are is in `docs/zoo.md` and in each folder's `metrics.json`.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from foveate.method import InputError

_ROOT = Path(__file__).parent
_PIPELINE = "model_index.json"  # what the folder of a diffusers pipeline has in place of config.json


def names() -> list[str]:
    """Models whose weights are here."""
    return sorted({file.parent.name for form in ("config.json", _PIPELINE) for file in _ROOT.glob(f"*/{form}")})


def path(name: str) -> Path:
    """The model's folder; but for `tiny-vit` and `evad`, `from_pretrained` of transformers or diffusers loads it.

    Raises InputError if unknown."""
    known = names()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise InputError(f"the zoo has no model {name!r}{hint} It has {', '.join(known) or 'none'}")
    return _ROOT / name


def load(name: str) -> Any:
    """The model in float32 and eval mode: for `tiny-vit` a timm `VisionTransformer` (see `zoo/vit.py`), for
    `tiny-llava` a transformers `LlavaForConditionalGeneration`, for `tiny-onevision` a
    `LlavaOnevisionForConditionalGeneration`, for `evad` an `EvadDetector` (see `zoo/detector.py`), for `tiny-vq` a
    diffusers `VQModel`, for `tiny-ar` and `tiny-ar-draft` a transformers `LlamaForCausalLM` (`zoo/ar.py` loads it with
    what it needs to read captions and to paint), for `tiny-vae` a diffusers `AutoencoderKL`, for `tiny-dit` and
    `tiny-dit-small` a `LuminaPipeline`, for `tiny-sd` a `StableDiffusionPipeline`, for `titok` and `one-d-piece` the
    method's own class. Raises InputError for an unknown name."""
    return load_folder(path(name))


def load_folder(folder: str | Path) -> Any:
    """Like `load`, from any folder that a training run wrote."""
    folder = Path(folder)
    if (folder / _PIPELINE).is_file():
        return need_diffusers().DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "_class_name" in config:
        return need_diffusers().AutoModel.from_pretrained(str(folder), local_files_only=True).eval()
    if "model_type" in config:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        auto = AutoModelForCausalLM if config["model_type"] == "llama" else AutoModelForImageTextToText
        return auto.from_pretrained(folder, local_files_only=True).eval()
    # Imported on demand, as all models are: names and folders are asked for by commands that load none.
    from foveate.zoo.detector import is_detector, load_detector

    if is_detector(config):
        return load_detector(folder)
    if "method" in config:
        from foveate.zoo.tokenizer import load_tokenizer

        return load_tokenizer(folder)
    model = build_vit({key: value for key, value in config.items() if key != "name"})
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def read_json(folder: str | Path, name: str, what: str) -> Any:
    """What the folder's file of that name says. InputError where it cannot be read; `what` says whose folder it is."""
    try:
        return json.loads((Path(folder) / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: no model here; a {what}'s folder has a {name}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no JSON"
        raise InputError(f"{folder}/{name}: cannot be read ({reason})") from None


def build_vit(config: dict[str, Any]) -> Any:
    """An untrained `zoo.vit.SceneTransformer` of that config; raises InputError where timm is not installed."""
    try:
        from foveate.zoo.vit import SceneTransformer
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise InputError("tiny-vit needs timm: pip install 'foveate[timm]'") from None
    return SceneTransformer(**config)


def need_diffusers() -> Any:
    """The package; raises InputError where it is not installed."""
    try:
        import diffusers
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise InputError("diffusion models need diffusers: pip install 'foveate[diffusers]'") from None
    return diffusers
