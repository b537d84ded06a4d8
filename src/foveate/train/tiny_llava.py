"""Recipe for `tiny-llava`: a LLaVA that answers questions about scenes.

The vision tower is `tiny-vit`, converted to CLIP and frozen. The language model and the projector are trained from
scratch on the generated questions, all questions of a picture in one sequence (see `packing.py`).

The start matters for so small a model. The embeddings of the object names are the tower's own class directions, and
the projector begins near the identity: a visual token on a dog points towards the word "dog" from the first step.

No question asks for the place of a named object, which "where is the dog relative to the fox ?" needs twice. So there
is a second loss: halfway up the language model, the state of a name in a question predicts the box of its object. Its
linear head is not part of the exported model.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from foveate import zoo
from foveate.data.scenes import NAMES, QUESTION_TYPES, Scene, Scenes, held_out_questions, words
from foveate.method import InputError
from foveate.train.loop import Batch, Recipe, Settings, train
from foveate.train.packing import NO_LABEL, answer_losses, pack, score, segment_mask
from foveate.train.tiny_vit import TinyVit, normalised

PREFIX = "USER: <image>"
_EMBEDDING_NORM = 1.0
_ZOO = "zoo"


@dataclasses.dataclass(frozen=True)
class TinyLlavaSettings(Settings):
    """`tower`: folder of a trained tiny-vit, or "zoo"; "" takes the zoo's, or trains one first where there is none.

    `layers`, `width`, `heads`, `intermediate`: of the language model; `width` must be the tower's.
    `box_weight`: of the boxes' loss, which counts from step `box_from` on.
    """

    steps: int = 2400
    batch: int = 24
    lr: float = 1e-3
    warmup: int = 100
    tower: str = ""
    layers: int = 8
    width: int = 128
    heads: int = 4
    intermediate: int = 352
    box_weight: float = 3.0
    box_from: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "width", "heads", "intermediate"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, not {getattr(self, name)}")
        for name in ("box_weight", "box_from"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be >= 0, not {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise InputError(f"width must be a multiple of 2 * heads, not {self.width} with {self.heads} heads")


class TinyLlava(Recipe):
    """See the module."""

    name = "tiny-llava"
    settings_type = TinyLlavaSettings
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 2, "batch": 2, "warmup": 1, "layers": 2, "width": 16, "heads": 2, "intermediate": 32, "workers": 0,
        "test_scenes": 14,
    }  # fmt: skip

    @classmethod
    def prepare(cls, settings: Settings, seed: int, out: Path) -> Settings:
        """Finds the tower, or trains it into `out`/tower: with this width, and in a smoke run as quickly."""
        assert isinstance(settings, TinyLlavaSettings)
        if settings.tower not in ("", _ZOO):
            if not (Path(settings.tower) / "model.safetensors").is_file():
                raise InputError(f"tower: there is no model.safetensors in {settings.tower}")
            return settings
        if "tiny-vit" in zoo.names() and _width(zoo.path("tiny-vit")) == settings.width:
            return dataclasses.replace(settings, tower=_ZOO)
        quick = TinyVit.smoke if settings.steps <= cls.smoke["steps"] else {}
        if not (out / "tower" / "metrics.json").is_file():
            train(TinyVit, out=out / "tower", seed=seed, **(quick | {"width": settings.width}))
        return dataclasses.replace(settings, tower=str(out / "tower"))

    def __init__(self, settings: TinyLlavaSettings, seed: int) -> None:
        from foveate.zoo.llava import build_llava, build_processor
        from foveate.zoo.vit import to_clip

        self.settings = settings
        # "zoo" and not its path: the settings are written down, and that path is of one machine.
        vit = zoo.load("tiny-vit") if settings.tower == _ZOO else zoo.load_folder(settings.tower)
        if vit.embed_dim != settings.width:
            raise InputError(f"width must be the tower's {vit.embed_dim}, not {settings.width}")
        clip = to_clip(vit)
        self.processor = build_processor(words(), image_size=cast(int, clip.config.image_size))
        self.tokenizer: PreTrainedTokenizerFast = self.processor.tokenizer
        self.llava = build_llava(
            clip.config,
            self.tokenizer,
            layers=settings.layers,
            width=settings.width,
            heads=settings.heads,
            intermediate=settings.intermediate,
        )
        self.llava.model.vision_tower.load_state_dict(clip.state_dict())
        self.llava.model.vision_tower.requires_grad_(False)
        # Pictures that the tower was not trained on: its features are a little less certain there, as in use.
        self.scenes = Scenes("train", seed + 1_000_003)
        self._start_from_the_tower(vit)
        self.model = _Objective(self.llava)

    @torch.no_grad()
    def _start_from_the_tower(self, vit: Any) -> None:
        """Projector near an affine identity map; embeddings of names along the tower's class directions."""
        pictures = torch.from_numpy(np.stack([self.scenes[i].image for i in range(32)])).permute(0, 3, 1, 2)
        features = vit.layers(normalised(pictures))[0][:, 1:].flatten(0, 1)
        mean = features.mean(0)
        scale = 1 / (features - mean).std()
        # gelu(x + 2) is about x + 2 for most x of unit variance, so the two layers undo each other's shift.
        shift, gain = 2.0, _EMBEDDING_NORM / self.settings.width**0.5
        projector: Any = self.llava.model.multi_modal_projector
        projector.linear_1.weight.copy_(torch.eye(self.settings.width) * scale)
        projector.linear_1.bias.copy_(shift - scale * mean)
        projector.linear_2.weight.copy_(torch.eye(self.settings.width) * gain)
        projector.linear_2.bias.fill_(-shift * gain)
        embedding = cast(nn.Embedding, self.llava.get_input_embeddings()).weight
        embedding.normal_(std=gain)
        directions = vit.early_patch_head.weight - vit.early_patch_head.weight.mean(0)
        for name, direction in zip(NAMES, directions[1:]):
            token = cast(int, self.tokenizer.convert_tokens_to_ids(name))
            embedding[token] = F.normalize(direction, dim=0) * _EMBEDDING_NORM

    def batch(self, step: int, rank: int, world: int) -> Batch:
        first = step * self.settings.batch
        scenes = [self.scenes[first + i] for i in range(rank, self.settings.batch, world)]
        visual = [("<image>", self.llava.config.image_seq_length)] * len(scenes)
        packed = pack([scene.questions for scene in scenes], self.tokenizer, visual, QUESTION_TYPES)
        packed["image"] = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2).contiguous()
        packed["boxes"] = name_boxes(packed, scenes, self.tokenizer)
        packed["box_weight"] = torch.tensor(self.settings.box_weight if step >= self.settings.box_from else 0.0)
        return packed

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Mean over the question types, so that rare types weigh as much as frequent ones; accuracies by type."""
        losses, right, distance = model(**{key: value for key, value in batch.items() if key != "box_weight"})
        kinds, parts, means = batch["kinds"], {"boxes": float(distance.detach())}, []
        for kind, name in enumerate(QUESTION_TYPES):
            chosen = kinds == kind
            if chosen.any():
                means.append(losses[chosen].mean())
                parts[name] = float(right[chosen].float().mean())
        return torch.stack(means).mean() + batch["box_weight"] * distance, parts

    def export(self, folder: Path) -> None:
        from foveate.zoo.llava import save_llava

        save_llava(self.llava, self.processor, folder)

    def evaluate(self) -> dict[str, Any]:
        return answer_accuracy(self.llava, self.processor, self.settings.test_scenes)


class _Objective(nn.Module):
    """Losses and correctness of all answers of a batch, in one `forward` as several processes need it."""

    def __init__(self, llava: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.llava = llava
        self.box_head = nn.Linear(cast(Any, llava.config.text_config).hidden_size, 4)
        # From the mean box on: a random start would only disturb the words.
        nn.init.zeros_(self.box_head.weight)
        self.box_head.bias.data = torch.tensor([0.5, 0.5, 0.3, 0.3])

    def forward(
        self,
        image: Tensor,
        ids: Tensor,
        position: Tensor,
        segment: Tensor,
        labels: Tensor,
        kinds: Tensor,
        boxes: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`losses` (questions,) of the answer's word and the end, `right` (questions,) bool, the boxes' loss."""
        outputs = self.llava.model(
            input_ids=ids,
            pixel_values=normalised(image),
            attention_mask=segment_mask(segment),
            position_ids=position,
            use_cache=False,
            output_hidden_states=True,
        )
        asked = labels != NO_LABEL
        losses, right = answer_losses(self.llava.lm_head(outputs.last_hidden_state[asked]), labels[asked])

        middle = outputs.hidden_states[(len(outputs.hidden_states) - 1) // 2]
        named = boxes[..., 2] > 0
        # The residual stream is large and grows: without a norm every optimizer step would throw the boxes about.
        state = F.layer_norm(middle[named], middle.shape[-1:]) / 4
        distance = F.smooth_l1_loss(self.box_head(state), boxes[named], reduction="sum", beta=0.05)
        return losses, right, distance / (4 * named.sum()).clamp(min=1)


def name_boxes(packed: dict[str, Tensor], scenes: list[Scene], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """(B, S, 4) centre x, centre y, width, height of the object that a question's token names.

    They are shares of the picture. Zero for all other tokens, for answers, and for names that several objects have.
    """
    boxes = torch.zeros(*packed["ids"].shape, 4)
    asking = (packed["segment"] > 0) & (packed["labels"] == NO_LABEL)
    for row, scene in enumerate(scenes):
        count = Counter(thing.name for thing in scene.objects)
        for thing in scene.objects:
            if count[thing.name] == 1:
                x1, y1, x2, y2 = (edge / scene.image.shape[0] for edge in thing.box)
                here = asking[row] & (packed["ids"][row] == tokenizer.convert_tokens_to_ids(thing.name))
                boxes[row, here] = torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])
    return boxes


@torch.no_grad()
def answer_accuracy(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, count: int, *, batch: int = 40
) -> dict[str, Any]:
    """Exact-match accuracy of greedy answers to `held_out_questions("test", count)`, in all and by type.

    Beside it what the commonest answer of every type would score on the same questions.
    """
    questions = held_out_questions("test", count)
    given: list[str] = []
    for first in range(0, count, batch):
        asked = questions[first : first + batch]
        inputs = processor(
            images=[q.image for q in asked],
            text=[f"{PREFIX}\n{q.prompt} ASSISTANT:" for q in asked],
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        made = cast(Any, model).generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        given += [text.strip() for text in processor.batch_decode(made, skip_special_tokens=True)]
    return score(((q.type, q.answer, text) for q, text in zip(questions, given)), QUESTION_TYPES)


def _width(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["embed_dim"])
