"""Recipe for `tiny-onevision`: a LLaVA-OneVision that answers questions about scenes' pictures and scenes' clips.

It begins as the zoo's `tiny-llava`, with more words; the vision tower stays frozen. A step sees new clips, eight frames
out of sixteen, and new pictures, the questions of each in one sequence (see `packing.py`).

A clip's answer is seldom in one frame, and no frame says when it was. Four more losses teach the steps in between;
their linear heads are no part of the exported model:

- time: a quarter up the language model, a visual token predicts which frame it is of;
- motion: halfway up, a visual token on an actor predicts how that actor's box has changed since the frame before and
  since it was first seen;
- tracks: two thirds up, the state of a name in a question predicts its actor's box in every frame and whether it is
  seen there (in a picture: its object's box);
- actions: two thirds up, the state of a name, and the visual tokens of the last frames that show an actor, predict
  which of `ACTIONS` it does.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate import zoo
from foveate.data.scenes import (
    ACTIONS,
    CLIP_QUESTION_TYPES,
    QUESTION_TYPES,
    Clip,
    Clips,
    Question,
    Scene,
    Scenes,
    clip_words,
    held_out_clip_questions,
    held_out_questions,
    patch_owner,
)
from foveate.method import InputError
from foveate.train.loop import Batch, Recipe, Settings, train
from foveate.train.packing import NO_LABEL, answer_losses, pack, score, segment_mask
from foveate.train.tiny_llava import TinyLlava, name_boxes
from foveate.train.tiny_vit import normalised

CLIP_FRAMES, FRAMES = 16, 8
SHOWN = np.linspace(0, CLIP_FRAMES - 1, FRAMES).round().astype(int)
"""Which frames of a clip the model gets: evenly spread, with the first and the last."""
# "where" and "count" are asked of both, and mean other things.
TYPES = (*QUESTION_TYPES, *(f"clip {kind}" for kind in CLIP_QUESTION_TYPES))
_LEAST_COVER = 0.2  # of a pooled cell's pixels, for it to lie on an actor
_CHANGE = 2.0  # changes of boxes are small: they are predicted enlarged
_ZOO = "zoo"


@dataclasses.dataclass(frozen=True)
class TinyOnevisionSettings(Settings):
    """`start`: folder of a trained tiny-llava, or "zoo"; "" takes the zoo's, or trains one first where there is none.

    `pictures` of the `batch` are pictures, the others clips; `picture_share` is the weight of the pictures' answers.
    Of each at most `asked` questions are asked.
    `time_weight`, `motion_weight`, `track_weight`, `action_weight`: of the four further losses.
    """

    steps: int = 1150
    batch: int = 12
    lr: float = 1e-3
    warmup: int = 60
    start: str = ""
    pictures: int = 3
    asked: int = 8
    picture_share: float = 0.25
    time_weight: float = 0.5
    motion_weight: float = 10.0
    track_weight: float = 6.0
    action_weight: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.pictures < self.batch:
            raise InputError(f"pictures must be 1..{self.batch - 1}, fewer than the batch, not {self.pictures}")
        if self.asked < 1:
            raise InputError(f"asked must be >= 1, not {self.asked}")
        if not 0 <= self.picture_share <= 1:
            raise InputError(f"picture_share must be 0..1, not {self.picture_share}")
        for name in ("time_weight", "motion_weight", "track_weight", "action_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be >= 0, not {getattr(self, name)}")


class TinyOnevision(Recipe):
    """See the module."""

    name = "tiny-onevision"
    settings_type = TinyOnevisionSettings
    smoke: ClassVar[dict[str, Any]] = {
        "steps": 2, "batch": 3, "pictures": 1, "warmup": 1, "workers": 0, "test_scenes": 16,
    }  # fmt: skip

    @classmethod
    def prepare(cls, settings: Settings, seed: int, out: Path) -> Settings:
        """Finds the tiny-llava to begin with, or trains it into `out`/start, in a smoke run quickly."""
        assert isinstance(settings, TinyOnevisionSettings)
        if settings.start not in ("", _ZOO):
            if not (Path(settings.start) / "model.safetensors").is_file():
                raise InputError(f"start: there is no model.safetensors in {settings.start}")
            return settings
        if "tiny-llava" in zoo.names():
            return dataclasses.replace(settings, start=_ZOO)
        quick = TinyLlava.smoke if settings.steps <= cls.smoke["steps"] else {}
        if not (out / "start" / "metrics.json").is_file():
            train(TinyLlava, out=out / "start", seed=seed, **quick)
        return dataclasses.replace(settings, start=str(out / "start"))

    def __init__(self, settings: TinyOnevisionSettings, seed: int) -> None:
        from transformers import AutoTokenizer

        from foveate.zoo.onevision import build_processor, from_llava

        self.settings = settings
        # "zoo" and not its path: the settings are written down, and that path is of one machine.
        folder = zoo.path("tiny-llava") if settings.start == _ZOO else Path(settings.start)
        self.start_sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        llava = zoo.load_folder(folder)
        vision = llava.config.vision_config
        self.processor = build_processor(clip_words(), image_size=vision.image_size, patch_size=vision.patch_size)
        self.tokenizer: PreTrainedTokenizerFast = self.processor.tokenizer
        known = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.onevision = from_llava(llava, known, self.tokenizer)
        self.onevision.model.vision_tower.requires_grad_(False)
        self.side = vision.image_size // vision.patch_size
        # As for tiny-llava, pictures that the tower was not trained on.
        self.scenes = Scenes("train", seed + 2_000_003)
        self.clips = Clips("train", seed + 2_000_003, frames=CLIP_FRAMES, size=vision.image_size)
        carry_places(self.onevision, [self.scenes[i] for i in range(64)])
        self.model = _Objective(self.onevision)

    def batch(self, step: int, rank: int, world: int) -> Batch:
        pictures = self.settings.pictures
        moving = self.settings.batch - pictures
        if min(pictures, moving) < world:
            raise InputError(f"batch: {moving} clips and {pictures} pictures are too few for {world} processes")
        clips = [self.clips[step * moving + i] for i in range(rank, moving, world)]
        scenes = [self.scenes[step * pictures + i] for i in range(rank, pictures, world)]
        most = self.settings.asked
        asked = [[dataclasses.replace(q, type=f"clip {q.type}") for q in chosen(c.questions, most)] for c in clips]
        asked += [chosen(scene.questions, most) for scene in scenes]
        visual = [("<video>", FRAMES * (self.side // 2) ** 2 + 1)] * len(clips)
        visual += [("<image>", 2 * self.side**2 + self.side)] * len(scenes)
        batch = pack(asked, self.tokenizer, visual, TYPES)
        batch["frames"] = (
            torch.from_numpy(np.stack([c.frames[SHOWN] for c in clips])).permute(0, 1, 4, 2, 3).contiguous()
        )
        batch["image"] = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2).contiguous()
        still = {key: value[len(clips) :] for key, value in batch.items() if key in ("ids", "segment", "labels")}
        batch["boxes"] = name_boxes(still, scenes, self.tokenizer)
        return batch | cell_targets(clips, self.side // 2) | name_targets(batch, clips, self.tokenizer)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Means over the question types, so that rare types weigh as much as frequent ones; accuracies by type."""
        losses, right, *further = model(**batch)
        settings, kinds = self.settings, batch["kinds"]
        weights = (settings.time_weight, settings.motion_weight, settings.track_weight, settings.action_weight)
        parts = {name: float(loss.detach()) for name, loss in zip(("time", "motion", "track", "action"), further)}
        means: dict[bool, list[Tensor]] = {False: [], True: []}
        for kind, name in enumerate(TYPES):
            these = kinds == kind
            if these.any():
                means[name in QUESTION_TYPES].append(losses[these].mean())
                parts[name] = float(right[these].float().mean())
        answers = sum(
            (share * torch.stack(means[still]).mean() for still, share in (
                (True, settings.picture_share), (False, 1 - settings.picture_share),
            ) if means[still]),
            torch.zeros(()),
        )  # fmt: skip
        return answers + sum(weight * loss for weight, loss in zip(weights, further)), parts

    def export(self, folder: Path) -> None:
        from foveate.zoo.llava import save_llava

        save_llava(self.onevision, self.processor, folder)

    def evaluate(self) -> dict[str, Any]:
        """Pictures and clips apart, `test_scenes` questions each; at the top their number and accuracy together."""
        count = self.settings.test_scenes
        stills, clips = held_out_questions("test", count), held_out_clip_questions("test", count, frames=CLIP_FRAMES)
        given = self._answers([q.prompt for q in stills], lambda i: {"images": stills[i].image}, "<image>")
        pictures = score(((q.type, q.answer, text) for q, text in zip(stills, given)), QUESTION_TYPES)
        given = self._answers([q.prompt for q in clips], lambda i: {"videos": clips[i].frames[SHOWN]}, "<video>")
        moving = score(((q.type, q.answer, text) for q, text in zip(clips, given)), CLIP_QUESTION_TYPES)
        return {
            "split": "test",
            "questions": 2 * count,
            "accuracy": (pictures["accuracy"] + moving["accuracy"]) / 2,
            "frames": SHOWN.tolist(),
            "pictures": pictures,
            "clips": moving,
            "start_sha256": self.start_sha256,
        }

    @torch.no_grad()
    def _answers(self, prompts: list[str], visual: Any, token: str, *, batch: int = 20) -> list[str]:
        """Greedy answers; `visual` gives the processor's picture or clip of a question's number."""
        given: list[str] = []
        for first in range(0, len(prompts), batch):
            asked = range(first, min(first + batch, len(prompts)))
            shown = [visual(i) for i in asked]
            inputs = self.processor(
                text=[f"USER: {token}\n{prompts[i]} ASSISTANT:" for i in asked],
                padding=True,
                return_tensors="pt",
                **{key: [one[key] for one in shown] for key in shown[0]},
            ).to(self.onevision.device)
            made = cast(Any, self.onevision).generate(**inputs)[:, inputs["input_ids"].shape[1] :]
            given += [text.strip() for text in self.processor.batch_decode(made, skip_special_tokens=True)]
        return given


class _Objective(nn.Module):
    """Losses and correctness of all answers of a batch, in one `forward` as several processes need it."""

    def __init__(self, onevision: LlavaOnevisionForConditionalGeneration) -> None:
        super().__init__()
        self.onevision = onevision
        text = cast(Any, onevision.config.text_config)
        layers = text.num_hidden_layers
        self.read = (-(-layers // 4), layers // 2, -(-2 * layers // 3))
        width = text.hidden_size
        # All begin at a constant: random predictions would only disturb the words.
        self.time_head, self.motion_head = _constant(width, [0.0] * FRAMES), _constant(width, [0.0] * 8)
        self.track_head = _constant(width, [0.5, 0.5, 0.3, 0.3, 0.7] * FRAMES)
        self.box_head = _constant(width, [0.5, 0.5, 0.3, 0.3])
        self.action_heads = nn.ModuleList(_constant(width, [-2.0] * len(ACTIONS)) for _ in range(2))

    def forward(
        self,
        frames: Tensor,
        image: Tensor,
        ids: Tensor,
        position: Tensor,
        segment: Tensor,
        labels: Tensor,
        kinds: Tensor,
        boxes: Tensor,
        cell_changes: Tensor,
        cell_owned: Tensor,
        cell_actions: Tensor,
        cell_last: Tensor,
        name_at: Tensor,
        name_tracks: Tensor,
        name_actions: Tensor,
    ) -> tuple[Tensor, ...]:
        """`losses` (questions,) of word and end, `right` (questions,) bool; of time, motion, tracks and actions."""
        # A fifth faster on CPUs with bfloat16 instructions; weights, residual stream and losses stay float32.
        with torch.autocast(ids.device.type, torch.bfloat16):
            outputs = self.onevision.model(
                input_ids=ids,
                mm_encoder_outputs=visual_tokens(self.onevision, frames, image),
                attention_mask=segment_mask(segment),
                position_ids=position,
                use_cache=False,
                output_hidden_states=True,
            )
        asked = labels != NO_LABEL
        losses, right = answer_losses(self.onevision.lm_head(outputs.last_hidden_state[asked].float()), labels[asked])

        # The residual stream is large and grows: without a norm every optimizer step would throw predictions about.
        states = outputs.hidden_states
        quarter, middle, upper = (F.layer_norm(states[i].float(), states[i].shape[-1:]) / 4 for i in self.read)
        clips = len(frames)
        start = 3  # <s> user :
        cells = slice(start, start + cell_owned.shape[1])
        number = torch.arange(FRAMES, device=ids.device).repeat_interleave(cell_owned.shape[1] // FRAMES)
        time = F.cross_entropy(self.time_head(quarter[:clips, cells]).flatten(0, 1), number.repeat(clips))
        changed = self.motion_head(middle[:clips, cells][cell_owned])
        motion = F.smooth_l1_loss(changed, _CHANGE * cell_changes[cell_owned], beta=0.05)

        named = upper[name_at[:, 0], name_at[:, 1]]
        tracks = self.track_head(named).view(-1, FRAMES, 5)
        visible = name_tracks[..., 4] > 0
        track = _mean(F.smooth_l1_loss(tracks[..., :4], name_tracks[..., :4], reduction="none", beta=0.05), visible)
        track = track + F.mse_loss(tracks[..., 4], name_tracks[..., 4])
        still = boxes[..., 2] > 0
        placed = self.box_head(upper[clips:][still])
        track = track + F.smooth_l1_loss(placed, boxes[still], reduction="sum", beta=0.05) / (4 * still.sum() + 1)

        by_name, by_cell = self.action_heads
        action = F.binary_cross_entropy_with_logits(by_name(named), name_actions)
        last = upper[:clips, cells][cell_last]
        action = action + F.binary_cross_entropy_with_logits(by_cell(last), cell_actions[cell_last])
        return losses, right, time, motion, track, action


def chosen(questions: Sequence[Question], most: int) -> list[Question]:
    """At most so many of them, in their order: one of every type, then a second of every type, and so on."""
    asked: Counter[str] = Counter()
    turns = []
    for number, question in enumerate(questions):
        turns.append((asked[question.type], number))
        asked[question.type] += 1
    return [questions[number] for number in sorted(number for _, number in sorted(turns)[:most])]


def visual_tokens(
    onevision: LlavaOnevisionForConditionalGeneration, frames: Tensor, image: Tensor
) -> dict[str, BaseModelOutputWithPooling]:
    """What the host makes of clips (C, T, 3, H, W) and pictures (P, 3, H, W), uint8 of the tower's size.

    Cheaper: the tower's layers above the one that is read are left out, and base and crop of a picture, which are the
    same here, are computed once.
    """
    model: Any = onevision.model
    tower = model.vision_tower
    with torch.no_grad():
        state = tower.pre_layrnorm(tower.embeddings(normalised(torch.cat([frames.flatten(0, 1), image]))))
        for layer in tower.encoder.layers[: model.config.vision_feature_layer + 1]:
            state = layer(state, None)
    projected = model.multi_modal_projector(state[:, 1:])
    moving, still = projected.split([frames.shape[0] * frames.shape[1], len(image)])
    pooled = model.apply_pooling(moving).unflatten(0, frames.shape[:2]).flatten(1, 2)
    clips = torch.cat([pooled, model.image_newline.expand(len(frames), 1, -1)], dim=1)
    sizes = torch.tensor([image.shape[-2:]] * len(image))
    pictures, _ = model.pack_image_features([torch.stack([one, one]) for one in still], sizes, model.image_newline)
    return {
        "video": BaseModelOutputWithPooling(pooler_output=clips),
        "image": BaseModelOutputWithPooling(pooler_output=pictures),
    }


@torch.no_grad()
def carry_places(onevision: LlavaOnevisionForConditionalGeneration, scenes: list[Scene]) -> None:
    """Two hidden units of the projector, the weakest, are given over to where an object's centre is, across and down.

    The tower knows it of every patch on an object; the projector of tiny-llava, which could answer most questions
    without, hands on little of it. The directions are fitted on the scenes' patches by ridge regression.
    """
    model: Any = onevision.model
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
    layer = model.config.vision_feature_layer
    features = model.vision_tower(normalised(images), output_hidden_states=True).hidden_states[layer][:, 1:]
    size, patch = scenes[0].image.shape[0], model.config.vision_config.patch_size
    rows, centres = [], []
    for scene, found in zip(scenes, features):
        owner = patch_owner(scene, patch).ravel()
        for i, thing in enumerate(scene.objects):
            x1, y1, x2, y2 = thing.box
            rows.append(found[torch.from_numpy(owner == i)])
            centres += [((x1 + x2) / 2 / size, (y1 + y2) / 2 / size)] * len(rows[-1])
    x, y = torch.cat(rows), torch.tensor(centres)
    middle, place = x.mean(0), y.mean(0)
    spread = (x - middle).T @ (x - middle) + torch.eye(x.shape[1])
    direction = torch.linalg.solve(spread, (x - middle).T @ ((y - place) / y.std(0))).T
    projector = model.multi_modal_projector
    hidden = projector.act(projector.linear_1(features.flatten(0, 1)))
    weakest = (hidden.std(0) * projector.linear_2.weight.norm(dim=0)).argsort()[:2]
    strength = projector.linear_2(hidden).std(0).norm() / 2
    shift = 2.0  # gelu(z + 2) is about z + 2
    # What the two units did on average goes into the bias.
    projector.linear_2.bias += projector.linear_2.weight[:, weakest] @ hidden[:, weakest].mean(0)
    projector.linear_1.weight[weakest] = direction
    projector.linear_1.bias[weakest] = shift - direction @ middle
    out = F.normalize(torch.randn(2, len(projector.linear_2.bias)), dim=-1) * strength
    projector.linear_2.weight[:, weakest] = out.T
    projector.linear_2.bias -= shift * out.sum(0)


def tracks_of(clip: Clip) -> np.ndarray:
    """(actors, FRAMES, 5) in the frames shown: centre x, centre y, width, height of the visible box, shares of the
    picture, and 1 if visible."""
    boxes = np.stack([actor.boxes[SHOWN] for actor in clip.actors]) / clip.frames.shape[1]
    low, high = boxes[..., :2], boxes[..., 2:]
    visible = (high > low).all(-1, keepdims=True)
    return np.concatenate([(low + high) / 2, high - low, visible], axis=-1).astype(np.float32)


def cell_targets(clips: list[Clip], side: int) -> dict[str, Tensor]:
    """What the (C, FRAMES side²) visual tokens should know; a cell belongs to the actor that covers most of it.

    `cell_changes` (…, 8): the change of the owner's box (as in `tracks_of`) since the frame before, zero if it was not
    seen there, and since it was first seen. `cell_owned` bool. `cell_actions` (…, actions) of the owner; `cell_last`
    bool: in the last two frames that show the owner.
    """
    found: dict[str, list[np.ndarray]] = {}
    for clip in clips:
        tracks = tracks_of(clip)
        shown = clip.owner[SHOWN]
        frames, size = shown.shape[:2]
        blocks = shown.reshape(frames, side, size // side, side, size // side)
        cover = np.stack([(blocks == i).mean((2, 4)) for i in range(len(clip.actors))])
        owner = cover.argmax(0).reshape(frames, side**2)
        owned = cover.max(0).reshape(frames, side**2) >= _LEAST_COVER
        seen = tracks[..., 4] > 0
        changes = np.zeros((*tracks.shape[:2], 8), dtype=np.float32)
        changes[:, 1:, :4] = (tracks[:, 1:, :4] - tracks[:, :-1, :4]) * seen[:, :-1, None]
        changes[..., 4:] = tracks[..., :4] - np.stack([t[s.argmax(), :4] for t, s in zip(tracks, seen)])[:, None]
        final = frames - 1 - seen[:, ::-1].argmax(1)
        last = owned & (np.arange(frames)[:, None] >= final[owner] - 1)
        labels = np.stack([actor.labels for actor in clip.actors]).astype(np.float32)
        values = (changes[owner, np.arange(frames)[:, None]], owned, labels[owner], last)
        for key, value in zip(("cell_changes", "cell_owned", "cell_actions", "cell_last"), values):
            found.setdefault(key, []).append(value.reshape(frames * side**2, *value.shape[2:]))
    return {key: torch.from_numpy(np.stack(value)) for key, value in found.items()}


def name_targets(packed: dict[str, Tensor], clips: list[Clip], tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """What the names in questions should know: `name_at` (N, 2) sequence and place of a name that one actor has,
    `name_tracks` (N, FRAMES, 5) as in `tracks_of`, `name_actions` (N, actions). The first sequences are the clips'.
    """
    asking = (packed["segment"] > 0) & (packed["labels"] == NO_LABEL)
    at, tracks, actions = [], [], []
    for row, clip in enumerate(clips):
        names = [actor.name for actor in clip.actors]
        known = tracks_of(clip)
        for i, actor in enumerate(clip.actors):
            if names.count(actor.name) == 1:
                token = cast(int, tokenizer.convert_tokens_to_ids(actor.name))
                for place in torch.nonzero(asking[row] & (packed["ids"][row] == token)).flatten().tolist():
                    at.append((row, place))
                    tracks.append(known[i])
                    actions.append(actor.labels)
    return {
        "name_at": torch.tensor(at, dtype=torch.long).view(-1, 2),
        "name_tracks": torch.from_numpy(np.array(tracks, dtype=np.float32).reshape(-1, FRAMES, 5)),
        "name_actions": torch.from_numpy(np.array(actions, dtype=np.float32).reshape(-1, len(ACTIONS))),
    }


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    return values[chosen].sum() / (values[chosen].numel() + 1)


def _constant(width: int, bias: list[float]) -> nn.Linear:
    """A linear head that predicts `bias` whatever it is given, until it is trained."""
    head = nn.Linear(width, len(bias))
    nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor(bias)
    return head
