"""Training the zoo: `run(name, out=…)`, or `foveate train NAME --out DIR`."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import Any

from foveate.method import InputError

_RECIPES = {
    "tiny-vit": ("tiny_vit", "TinyVit"),
    "tiny-llava": ("tiny_llava", "TinyLlava"),
    "tiny-onevision": ("tiny_onevision", "TinyOnevision"),
    "tiny-vq": ("tiny_vq", "TinyVq"),
    "tiny-ar": ("tiny_ar", "TinyAr"),
    "tiny-ar-draft": ("tiny_ar", "TinyArDraft"),
    "tiny-vae": ("tiny_vae", "TinyVae"),
    "tiny-dit": ("tiny_dit", "TinyDit"),
    "tiny-dit-small": ("tiny_dit", "TinyDitSmall"),
    "tiny-sd": ("tiny_sd", "TinySd"),
    "titok": ("titok", "TitokRecipe"),
    "one-d-piece": ("one_d_piece", "OneDPieceRecipe"),
    "evad": ("evad", "EvadRecipe"),
    "sparsifiner": ("sparsifiner", "SparsifinerRecipe"),
    "dtop": ("dtop", "DtopRecipe"),
    "hot": ("hot", "HotRecipe"),
    "cutmix": ("cutmix", "CutMixRecipe"),
    "rta": ("rta", "RtaRecipe"),
    "droppos": ("droppos", "DropPosRecipe"),
    "seit": ("seit", "SeitRecipe"),
    "sit-slim": ("sit_slim", "SitSlimRecipe"),
    "stvit": ("stvit", "STViTRecipe"),
    "ssm-prune": ("ssm_prune", "SsmPruneRecipe"),
    "davit": ("davit", "DavitRecipe"),
    "strip-mlp": ("strip_mlp", "StripMlpRecipe"),
}


def names() -> list[str]:
    """What can be trained."""
    return sorted(_RECIPES)


def recipe(name: str) -> Any:
    """The recipe class of that name (a `foveate.train.loop.Recipe`); raises InputError for an unknown one."""
    if name not in _RECIPES:
        near = difflib.get_close_matches(str(name), _RECIPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"nothing to train is called {name!r}{hint} There are {', '.join(names())}")
    module, attribute = _RECIPES[name]
    return getattr(importlib.import_module(f"foveate.train.{module}"), attribute)


def run(
    name: str, *, out: str | Path, seed: int = 0, resume: bool = True, smoke: bool = False, **overrides: Any
) -> dict[str, Any]:
    """Trains `name` into the folder `out`, evaluates it on the test split and returns the metrics.

    Args:
        name: one of `names()`.
        out: folder for weights, `metrics.json`, `log.jsonl` and the latest checkpoint.
        seed: of weights and data, >= 0.
        resume: go on from the latest checkpoint in `out`; otherwise earlier progress there is deleted.
        smoke: a tiny model and a few steps, to see in seconds that everything works.
        overrides: settings of the recipe, e.g. `steps=100`.

    Raises:
        InputError: for an unknown name or setting, or a value that cannot be.
    """
    from foveate.train.loop import train

    chosen = recipe(name)
    return train(chosen, out=out, seed=seed, resume=resume, **((chosen.smoke if smoke else {}) | overrides))
