"""The zoo's `tiny-ar` and `tiny-ar-draft`: Llamas that write a picture as codes of `tiny-vq`, row by row.

The form is LlamaGen's (https://arxiv.org/abs/2406.06525) with words in front: words have the first ids, codes those
after them. A prompt is a caption and `<s>`, at which the picture begins; without a caption it is `<s>` alone. That is
also what transformers takes as the unconditional prompt if it is given none, so that classifier-free guidance needs
nothing but `guidance_scale`, and

    model.generate(**tokenizer(["a dog on blue"], return_tensors="pt"))

gives prompt and codes. Everything is a stock class of transformers or diffusers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import processors
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from foveate import zoo
from foveate.method import InputError
from foveate.nn.codes import Codes
from foveate.zoo.text import build_caption_tokenizer
from foveate.zoo.tokenizer import fingerprint
from foveate.zoo.vq import decode, pitch_of

VQ = "vq"
"""Folder of the tokenizer of pictures within a generator's folder; without it, it is the zoo's `tiny-vq`."""


@dataclasses.dataclass(frozen=True, eq=False)
class PictureGenerator:
    """A causal model over words and codes, what reads its captions, and what paints its codes."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    vq: Any

    @property
    def grid(self) -> tuple[int, int]:
        """Codes of a picture: rows, columns."""
        rows, columns = cast(Any, self.model.config).image_grid
        return rows, columns

    @property
    def codes(self) -> tuple[int, int]:
        """First id of a code, and the id behind the last."""
        end = cast(int, self.model.config.vocab_size)
        return end - self.vq.config.num_vq_embeddings, end

    def prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (B, L), padded on the left; "" is the unconditional prompt."""
        found = self.tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")
        return {name: found[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def codes_of(self, sequences: Tensor) -> Codes:
        """The pictures at the end of what `generate` returned: (B, L + N) ids. InputError where these are no codes."""
        rows, columns = self.grid
        pitch = pitch_of(self.vq)
        ids = sequences[:, -rows * columns :].cpu() - self.codes[0]
        return Codes(ids, self.vq.config.num_vq_embeddings, (pitch * rows, pitch * columns), self.grid)

    def pictures(self, sequences: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1, of what `generate` returned."""
        return decode(self.vq, self.codes_of(sequences))

    @torch.no_grad()
    def draw(self, captions: Sequence[str], *, seed: int = 0, batch: int = 50, **settings: Any) -> Tensor:
        """(n, 3, H, W) pictures of captions; the same for the same seed and batch. `settings`: of `generate`."""
        made = []
        with torch.random.fork_rng([self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for first in range(0, len(captions), batch):
                sequences = self.model.generate(**self.prompts(captions[first : first + batch]), **settings)
                made.append(self.pictures(sequences))
        return torch.cat(made)


def build_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One token a word, then `<s>`; padded on the left."""
    tokenizer = build_caption_tokenizer(words)
    tokenizer.padding_side = "left"
    begin = ("<s>", cast(int, tokenizer.convert_tokens_to_ids("<s>")))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A <s>", special_tokens=[begin])
    return tokenizer


def build_ar(
    tokenizer: PreTrainedTokenizerFast, vq: Any, *, grid: tuple[int, int], layers: int, width: int, heads: int,
    guidance_scale: float = 3.0,
) -> LlamaForCausalLM:  # fmt: skip
    """An untrained model of the codes of `vq`, whose weights its configuration remembers.

    `generate` samples codes only, exactly one picture, with that guidance unless told else.
    """
    codes = vq.config.num_vq_embeddings
    ids: dict[str, Any] = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": None,  # a picture ends when it is full
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer) + codes,
        hidden_size=width,
        intermediate_size=16 * round(width / 6),  # 8 / 3 of the width
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=tokenizer.model_max_length + grid[0] * grid[1],
        image_grid=list(grid),
        vq_fingerprint=fingerprint(vq),
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,
        guidance_scale=guidance_scale,
        max_new_tokens=grid[0] * grid[1],
        suppress_tokens=list(range(len(tokenizer))),
        **ids,
    )
    return model.eval()


def load_generator(name: str | Path) -> PictureGenerator:
    """A model of the zoo by its name, or one of a folder that a training run wrote; in float32 and eval mode.

    Raises:
        InputError: where there is none, or its codes are of another tokenizer than the one that is there.
    """
    folder = zoo.path(str(name)) if str(name) in zoo.names() else Path(name)
    config = zoo.read_json(folder, "config.json", "generator of pictures")
    if not isinstance(config, dict) or "vq_fingerprint" not in config:
        raise InputError(f"{folder}: no generator of pictures; `foveate train tiny-ar` writes one")
    own = folder / VQ
    vq = zoo.load_folder(own if own.is_dir() else zoo.path("tiny-vq"))
    if fingerprint(vq) != config["vq_fingerprint"]:
        where = own if own.is_dir() else "the zoo"
        raise InputError(f"{folder}: it was trained on codes of another tiny-vq than that of {where}; train it anew")
    model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    return PictureGenerator(model, AutoTokenizer.from_pretrained(folder, local_files_only=True), vq)
