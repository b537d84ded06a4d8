"""What the benchmarks share: a LLaVA of chosen width and depth with random weights, a probe, and results files."""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from foveate.measure.environment import environment
from foveate.method import Method
from foveate.tokens import Tokens

RESULTS = Path(__file__).parent / "results"
_ROOT = Path(__file__).resolve().parent.parent
_PLACEHOLDER = 1


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the shape of the model and how to measure it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="channels of the language model")
    parser.add_argument("--layers", type=int, default=8, help="of the language model")
    parser.add_argument("--vision-width", type=int, default=1024, help="channels of the vision tower")
    parser.add_argument("--vision-layers", type=int, default=6)
    parser.add_argument("--grid", type=int, default=24, help="rows and columns of patches")
    parser.add_argument("--text", type=int, default=64, help="text tokens")
    parser.add_argument("--batch", type=int, default=1, help="pictures, each with its text")
    parser.add_argument("--pairs", type=int, default=15, help="interleaved pairs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0)
    return parser


def build(options: argparse.Namespace) -> tuple[Any, dict[str, Tensor]]:
    """The model and a prefill: grid x grid visual tokens, then text."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    heads = max(1, options.width // 64), max(1, options.vision_width // 64)
    visual = options.grid**2
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=1000, hidden_size=options.width, num_hidden_layers=options.layers, num_attention_heads=heads[0],
            intermediate_size=int(options.width * 2.6875), max_position_embeddings=4 * (visual + options.text),
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=options.vision_width, intermediate_size=4 * options.vision_width, image_size=14 * options.grid,
            num_hidden_layers=options.vision_layers, num_attention_heads=heads[1], patch_size=14,
        ),
        image_token_id=_PLACEHOLDER, vision_feature_layer=-2,
    )  # fmt: skip
    # Made where it will be: seven billion random numbers take a CPU minutes.
    with torch.device(options.device):
        model = LlavaForConditionalGeneration(config).eval().to(getattr(torch, options.dtype))
    words = torch.randint(_PLACEHOLDER + 1, 1000, (options.text,))
    ids = torch.cat([torch.full((visual,), _PLACEHOLDER), words]).unsqueeze(0).to(options.device)
    ids = ids.expand(options.batch, -1)
    pixels = torch.randn(options.batch, 3, 14 * options.grid, 14 * options.grid).to(options.device, model.dtype)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def prefill(model: Any, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    @torch.inference_mode()
    def run() -> Any:
        return model(**inputs, use_cache=True, logits_to_keep=1)

    return run


class Section:
    """Measures a forward from the projector's entry to the language model's exit: that is where methods score,
    merge, drop and save, whatever the vision tower costs. Make it before a method is applied: hooks run in order.

    `read` is called at both ends (a clock, a FLOP counter); `spent` is the difference.
    """

    def __init__(self, model: Any, read: Callable[[], float]) -> None:
        self.read, self.spent, self._start = read, 0.0, 0.0
        self._handles = [
            model.model.multi_modal_projector.register_forward_pre_hook(self._enter),
            model.model.language_model.register_forward_hook(self._leave),
        ]

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._start = self.read()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.spent = self.read() - self._start

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def clock(device: str) -> Callable[[], float]:
    """`time.perf_counter` after the device's queue is empty."""

    def read() -> float:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


def nothing_dropped(method: Method) -> Method:
    """The same method, which asks for its signals, scores and selects, and then returns the tokens unchanged."""
    cls = type(method)

    def watched(name: str) -> Callable[..., Any]:
        handler = getattr(cls, name)

        def look(self: Method, tokens: Tokens, at: Any) -> Tokens:
            handler(self, tokens, at)
            return tokens

        look.stage = handler.stage  # type: ignore[attr-defined]
        return look

    watching = type(f"{cls.__name__}Watching", (cls,), {name: watched(name) for name in cls.handlers().values()})
    twin = copy.copy(method)
    twin.__class__ = watching
    return twin


def write(name: str, options: argparse.Namespace, results: dict[str, Any]) -> None:
    """benchmarks/results/<name>.json: the results, the options, and what they were measured with."""
    dtype = getattr(torch, getattr(options, "dtype", "float32"))
    about = environment(getattr(options, "device", "cpu"), dtype, options.seed)
    about["command"] = shlex.join(portable(one) for one in shlex.split(about["command"]))
    plain = {key: portable(value) for key, value in vars(options).items()}
    write_bytes(
        RESULTS / f"{name}.json",
        json.dumps({"environment": about, "options": plain, **results}, indent=2).encode() + b"\n",
    )


def earlier(name: str, options: argparse.Namespace, apart: tuple[str, ...] = ()) -> dict[str, Any]:
    """What an earlier run with the same options (but those in `apart`) and versions on such a machine has written."""
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    now = environment(getattr(options, "device", "cpu"), seed=options.seed)
    same = all(found["environment"][one] == now[one] for one in ("versions", "machine"))
    for key, value in vars(options).items():
        same &= key in apart or found["options"].get(key) == portable(value)
    return found if same else {}


def portable(value: Any) -> Any:
    """Paths of one machine become relative to the repository, or a bare name outside of it; the rest stays."""
    if isinstance(value, list | tuple):
        return [portable(one) for one in value]
    if isinstance(value, str | Path) and Path(value).is_absolute():
        path = Path(value).resolve()
        return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else path.name
    return str(value) if isinstance(value, Path) else value


def write_bytes(path: Path, content: bytes) -> None:
    """Under a temporary name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.chmod(partial, 0o644)
    os.replace(partial, path)
    print(path)
