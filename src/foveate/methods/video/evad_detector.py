"""EVAD's action detector: who does what, where, in a clip.

    clip (B, 3, T, H, W) -> VideoMAE with token dropout: K of t h w tokens are left, (B, K, D); t = T / 2
    the keyframe's tokens (B, h w, D) of four layers -> feature pyramid -> P proposals, S heads: boxes (B, P, 4)
    the boxes, wider, through all slots of the clip (B, t, h, w, d) -> RoIAlign: actors (B, P, d)
    [tokens left | actors] (B, K + P, d) -> decoder -> action logits (B, P, classes)

In the clip for RoIAlign a learnt token stands where one was dropped.

Efficient Video Action Detection with Token Dropout and Context Refinement, ICCV 2023, https://arxiv.org/abs/2304.08451,
section 3. The dropout is `foveate.methods.video.evad`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.method import InputError, configured
from foveate.methods.video.evad import Evad
from foveate.nn.attention import kernel
from foveate.nn.sparse_rcnn import FeaturePyramid, ProposalHead, Proposals, box_losses, look, match
from foveate.tokens import take

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "vit-b": {},
    "vit-l": {
        "hidden": 1024, "layers": 24, "heads": 16, "levels": (5, 11, 17, 23), "drop_path": 0.2,
        "decoder_hidden": 512, "decoder_layers": 12, "decoder_heads": 8, "action_weight": 6.0,
    },
    "tiny": {
        "image": 96, "frames": 8, "patch": 8, "hidden": 128, "layers": 6, "heads": 4, "levels": (1, 2, 4, 5),
        "drops": (2, 3, 5), "drop_path": 0.0, "channels": 64, "dynamic": 16, "feedforward": 256, "proposals": 12,
        "stages": 3, "decoder_hidden": 96, "decoder_layers": 3, "decoder_heads": 3, "decoder_drop_path": 0.0,
        "classifier": 256, "classes": 12,
    },
}  # fmt: skip
"""Arguments of `EvadDetector` by name: the paper's ViT-B (the defaults) and ViT-L, and this project's "tiny"."""

_CHUNK = 2**19
"""Most attention probabilities in one block on a CPU: 2 MiB of float32 stay in its cache."""
_CHUNK_ACCELERATOR = 2**26
"""The same elsewhere (256 MiB), where the launches of many small kernels would cost more."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """What the encoder makes of clips with N = t h w tokens, s = h w of them in the keyframe.

    Attributes:
        tokens: (B, K, D) those that are left, with the final norm; the keyframe's come first.
        index: (B, K) long, the place of each in [keyframe | other slots in time order]: in the card's words, the
            first s are 0 … s - 1, and `index[:, s:] - s` is idx.
        frames: the keyframe's tokens (B, s, D) after some layers, without a norm, for the feature pyramid.
        grid: (t, h, w).
        received: where it was asked for (`guided`), of each layer that drops tokens or, with keep < 1, would: the
            places `index` of the tokens that it began with and their scores, both (B, K'), with gradients.
    """

    tokens: Tensor
    index: Tensor
    frames: list[Tensor]
    grid: tuple[int, int, int]
    received: list[tuple[Tensor, Tensor]]

    @property
    def order(self) -> Tensor:
        """(N,) long: the place in time order of each place in [keyframe | other slots]."""
        return keyframe_first(self.grid, self.index.device)

    @property
    def source(self) -> Tensor:
        """(B, N) long: the token that carries each patch, in time order, -1 where it was dropped: for overlays."""
        batch, kept = self.index.shape
        place = self.order[self.index]
        empty = torch.full((batch, math.prod(self.grid)), -1, device=place.device)
        return empty.scatter(1, place, torch.arange(kept, device=place.device).expand(batch, -1))


@dataclass(frozen=True, eq=False)
class Detections:
    """What the model says of B clips with P proposals.

    Attributes:
        person: (S, B, P, 2) logits of [person, no object] of each of the S heads.
        boxes: (S, B, P, 4) (x1, y1, x2, y2) px of the input, not clipped.
        actions: (L, B, P, classes) logits of each decoder layer; in evaluation of the last alone, L = 1.
        size: (B, 2) height and width px of the pictures.
        encoded: see `Encoded`.
    """

    person: Tensor
    boxes: Tensor
    actions: Tensor
    size: Tensor
    encoded: Encoded


class Found(NamedTuple):
    """Persons of a clip: boxes (n, 4) px within the picture, score (n,) of being one, actions (n, classes) in 0..1."""

    boxes: Tensor
    score: Tensor
    actions: Tensor


class EvadDetector(nn.Module, PyTorchModelHubMixin, library_name="foveate"):
    """Finds persons in the keyframe of a clip and says what they do.

    VideoMAE with `Evad`'s dropout -> a feature pyramid of the keyframe -> P proposals that S heads turn into boxes
    (Sparse R-CNN) -> each box, widened and extended through all time slots, becomes a token that a decoder refines
    together with the clip's surviving tokens -> P x classes action scores. `save_pretrained`, `from_pretrained` and
    `push_to_hub` are those of huggingface_hub; `load_backbone` takes the weights of any VideoMAE checkpoint.

    Args:
        image, frames, patch, tubelet: what the position table is for: image / patch places a side and frames / tubelet
            slots, an even number. Clips may have another height and width, not another number of frames.
        hidden, layers, heads: of the encoder; its MLP is 4 times as wide.
        drops: layers in which tokens are dropped, see `Evad`; likewise `keep`, `weight`, `select`, `protect_keyframe`.
        levels: four layers whose output feeds the pyramid.
        drop_path: stochastic depth of the last encoder layer, rising linearly from 0 as VideoMAE's does (the paper
            gives one number).
        channels, dynamic, feedforward, proposals, stages: of the Sparse R-CNN part.
        decoder_hidden, decoder_layers, decoder_heads, decoder_drop_path, classifier, classes: of the decoder.
        extend: how much wider and higher than a box its context is.
        action_weight: of the action loss.
        released_order: give kept tokens the positions that the authors' code gives them (the highest score gets the
            first place, and so on), for their weights; otherwise each keeps its own.

    Raises:
        InputError: for numbers that do not go together.
    """

    positions: Tensor
    decoder_positions: Tensor

    def __init__(
        self, *, image: int = 224, frames: int = 16, patch: int = 16, tubelet: int = 2, hidden: int = 768,
        layers: int = 12, heads: int = 12, drops: Sequence[int | float] = (0.25, 0.5, 0.75), keep: float = 0.7,
        weight: float = 1.0, select: str = "attention", protect_keyframe: bool = True,
        levels: Sequence[int] = (2, 5, 8, 11), drop_path: float = 0.1, channels: int = 256, dynamic: int = 64,
        feedforward: int = 2048, proposals: int = 100, stages: int = 6, decoder_hidden: int = 384,
        decoder_layers: int = 6, decoder_heads: int = 6, decoder_drop_path: float = 0.1, classifier: int = 2048,
        classes: int = 80, extend: Sequence[float] = (0.4, 0.2), action_weight: float = 12.0,
        released_order: bool = False,
    ) -> None:  # fmt: skip
        from transformers import VideoMAEConfig, VideoMAEModel
        from transformers.models.videomae.modeling_videomae import VideoMAELayer

        super().__init__()
        if frames % (2 * tubelet) or image % patch or patch & (patch - 1):
            raise InputError(
                f"{frames} frames in tubelets of {tubelet} must make an even number of slots, {image} px a whole "
                f"number of patches, and patches of {patch} px a power of two"
            )
        if len(levels) != 4 or not all(0 <= level < layers for level in levels):
            raise InputError(f"levels must be four of the {layers} layers, not {levels!r}")
        if hidden % heads or decoder_hidden % decoder_heads:
            raise InputError("hidden must be a multiple of heads, and decoder_hidden of decoder_heads")
        self.dropout = Evad(keep=keep, layers=drops, weight=weight, select=select, protect_keyframe=protect_keyframe)
        self.dropout.drops(layers)
        self.patch, self.tubelet, self.levels, self.extend = patch, tubelet, tuple(levels), tuple(extend)
        self.action_weight, self.released_order, self.classes = action_weight, released_order, classes

        def config(width: int, depth: int, heads: int) -> Any:
            return VideoMAEConfig(
                image_size=image, patch_size=patch, num_frames=frames, tubelet_size=tubelet, hidden_size=width,
                num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width, layer_norm_eps=1e-6,
                use_mean_pooling=False, attn_implementation="sdpa",
            )  # fmt: skip

        self.backbone = VideoMAEModel(config(hidden, layers, heads))
        self.paths = [drop_path * layer / max(1, layers - 1) for layer in range(layers)]
        self.pyramid = FeaturePyramid(hidden, channels)
        self.proposals = Proposals(proposals, channels)
        self.heads = nn.ModuleList(ProposalHead(channels, dynamic, feedforward) for _ in range(stages))
        decoder = config(decoder_hidden, decoder_layers, decoder_heads)
        self.decoder = nn.ModuleDict(
            {
                "projection": nn.Linear(hidden, decoder_hidden, bias=False),
                "layers": nn.ModuleList(VideoMAELayer(decoder) for _ in range(decoder_layers)),
                "classifiers": nn.ModuleList(
                    nn.Sequential(
                        nn.Linear(decoder_hidden, classifier, bias=False), nn.LayerNorm(classifier), nn.ReLU(),
                        nn.Linear(classifier, classes),
                    )
                    for _ in range(decoder_layers)
                ),
            }
        )  # fmt: skip
        self.decoder_drop_path = decoder_drop_path
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_hidden))
        for weights in (self.mask_token, *self.heads.parameters(), *self.decoder.parameters()):
            if weights.ndim > 1:
                nn.init.xavier_uniform_(weights)
        # Fixed tables, not weights: in no checkpoint, but they move with the model.
        slots, side = frames // tubelet, image // patch
        for name, width in (("positions", hidden), ("decoder_positions", decoder_hidden)):
            table = sinusoid(slots * side * side, width).view(slots, side, side, width)
            self.register_buffer(name, table, persistent=False)
        self._resized: dict[str, tuple[Any, Tensor]] = {}

    @classmethod
    def named(cls, name: str, **changes: Any) -> EvadDetector:
        """An untrained model by its name in `CONFIGURATIONS`, with changes; InputError for an unknown name."""
        return cls(**configured(name, CONFIGURATIONS, changes))

    def set_dropout(self, **changes: Any) -> EvadDetector:
        """Changes arguments of `dropout` (see `Evad`), e.g. `keep`, under the same weights; returns the model."""
        self.dropout = Evad(**(self.dropout.hyperparameters() | changes))
        return self

    def load_backbone(self, checkpoint: str) -> None:
        """Takes the encoder's weights from a VideoMAE checkpoint (a hub id or a folder), safetensors only.

        A fine-tuned classifier has no final norm of the encoder's own; ours stays as it is then.
        """
        from transformers import VideoMAEModel

        loaded = VideoMAEModel.from_pretrained(
            checkpoint, config=self.backbone.config, use_safetensors=True, trust_remote_code=False
        )
        self.backbone.load_state_dict(loaded.state_dict())

    def groups(self, lr: float, weight_decay: float = 1e-4, factor: float = 8.0) -> list[dict[str, Any]]:
        """Parameter groups for AdamW as the paper trains: heads and decoder at `factor` times `lr`; no weight decay on
        what has one dimension, nor on the mask token."""
        found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, weights in self.named_parameters():
            if weights.requires_grad:
                decays = weights.ndim > 1 and name != "mask_token"
                found.setdefault((self.fast(name), decays), []).append(weights)
        return [
            {"params": some, "lr": lr * (factor if fast else 1), "weight_decay": weight_decay if decays else 0.0}
            for (fast, decays), some in found.items()
        ]

    @staticmethod
    def fast(name: str) -> bool:
        """Whether the parameter of that name belongs to what the paper trains at 8 times the rate."""
        return name.startswith(("heads.", "decoder.", "mask_token"))

    def forward(self, pixels: Tensor, size: Tensor | None = None, guided: bool = False) -> Detections:
        """pixels (B, 3, T, H, W) as `normalised` makes them; size (B, 2) height and width px where pictures are padded
        on the right and below, None where they are not. `guided` asks for `Encoded.received`.

        Raises:
            InputError: for another number of frames than the model is for.
        """
        height, width = pixels.shape[3:]
        if size is None:
            size = torch.tensor([[height, width]], device=pixels.device).expand(len(pixels), -1)
        step = 2 * self.patch
        pixels = F.pad(pixels, (0, -width % step, 0, -height % step))
        encoded = self.encode(pixels, guided)
        _, h, w = encoded.grid
        levels = self.pyramid([frame.transpose(1, 2).unflatten(2, (h, w)) for frame in encoded.frames])
        person, boxes = self.locate(levels, size)
        return Detections(person, boxes, self.classify(encoded, boxes[-1], size), size, encoded)

    def encode(self, pixels: Tensor, guided: bool = False) -> Encoded:
        """The encoder: pixels (B, 3, T, H, W), H and W multiples of twice the patch; `guided` as in `forward`."""
        table = self.positions
        if pixels.shape[2] != len(table) * self.tubelet:
            raise InputError(f"this model is for clips of {len(table) * self.tubelet} frames, not {pixels.shape[2]}")
        embedding = self.backbone.embeddings.patch_embeddings.projection
        # The convolution's patches do not overlap: a product of matrices, which a GPU is done with many times sooner.
        blocks = pixels.unflatten(4, (-1, self.patch)).unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.tubelet))
        blocks = blocks.permute(0, 2, 4, 6, 1, 3, 5, 7)
        grid = (blocks.shape[1], blocks.shape[2], blocks.shape[3])
        frame = grid[1] * grid[2]
        x = F.linear(blocks.flatten(4).flatten(1, 3), embedding.weight.flatten(1), embedding.bias)
        x = x + self._places("positions", grid, x)
        x = x.index_select(1, keyframe_first(grid, x.device))
        index = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        dropout, layers = self.dropout, self.backbone.encoder.layer
        drops, frames, canvas = dropout.drops(len(layers)), [], x[:, :frame]
        watched, received = dropout.numbers(len(layers)) if guided else (), []
        for number, (layer, path) in enumerate(zip(layers, self.paths)):
            left = dropout.after(x.shape[1], frame) if number in drops else x.shape[1]
            drop = left < x.shape[1]
            if number in watched or (drop and dropout.select == "attention"):
                x, score = self._scored(layer, x, path, torch.where(index < frame, dropout.weight, 1.0), guided)
                if number in watched:
                    received.append((index, score))
            else:
                x = self._attend(layer, x, path)
            if drop:
                if not dropout.protect_keyframe:
                    canvas = onto(canvas, x, index)
                if dropout.select == "random":
                    score = self._lot(index, number)
                chosen = dropout.chosen(score, index < frame, left, ordered=not self.released_order)
                x, index = take(x, chosen), index.gather(1, chosen)
            x = self._feed(layer, x, path)
            if number in self.levels:
                # A token of the keyframe that was dropped all the same stays as it was.
                canvas = x[:, :frame] if dropout.protect_keyframe else onto(canvas, x, index)
                frames.append(canvas)
        if self.released_order:
            index = index.sort(1).values
        return Encoded(self.backbone.layernorm(x), index, frames, grid, received)

    def _places(self, table: str, grid: tuple[int, int, int], like: Tensor) -> Tensor:
        """`resized` of that table, made once for clips of one size: on a GPU, bicubic takes longer than some layers."""
        key = grid, like.dtype, like.device
        if self._resized.get(table, (None,))[0] != key:
            # An ordinary tensor, whoever asks first: training may be next.
            with torch.inference_mode(False), torch.no_grad():
                self._resized[table] = key, resized(getattr(self, table), grid).to(like.dtype)
        return self._resized[table][1]

    def _attend(self, layer: Any, x: Tensor, path: float) -> Tensor:
        return x + self._survives(layer.attention(layer.layernorm_before(x)), path)

    def _scored(self, layer: Any, x: Tensor, path: float, rows: Tensor, guided: bool) -> tuple[Tensor, Tensor]:
        """As `_attend`, and the score (B, N) of each token."""
        normed, inner = layer.layernorm_before(x), layer.attention.attention
        query, key, value = (
            project(normed).unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2)
            for project in (inner.query, inner.key, inner.value)
        )
        out, score = attention_and_score(query, key, value, rows, guided)
        out = layer.attention.output(out.transpose(1, 2).flatten(2), normed)
        return x + self._survives(out, path), score

    def _lot(self, index: Tensor, number: int) -> Tensor:
        """Random scores (B, N): in training another lot for each clip and step."""
        if self.training:
            return torch.rand(index.shape, device=index.device)
        return self.dropout.lot(index.shape[1], number).to(index.device).expand(len(index), -1)

    def _feed(self, layer: Any, x: Tensor, path: float) -> Tensor:
        hidden = layer.intermediate(layer.layernorm_after(x))
        return x + self._survives(layer.output.dropout(layer.output.dense(hidden)), path)

    def _survives(self, branch: Tensor, path: float) -> Tensor:
        """Stochastic depth: in training, the branch is left out of some clips."""
        if not self.training or path == 0:
            return branch
        alive = torch.rand(len(branch), 1, 1, device=branch.device) >= path
        return branch * alive / (1 - path)

    def locate(self, levels: Sequence[Tensor], size: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (S, B, P, 2) and boxes (S, B, P, 4) of every head, of the pyramid's levels."""
        boxes, feature = self.proposals(size)
        person, found = [], []
        for head in self.heads:
            logits, boxes, feature = head(look(levels, boxes.detach(), self.patch / 4), feature, boxes)
            person.append(logits)
            found.append(boxes)
            # Each head learns from its own step alone.
            boxes = boxes.detach()
        return torch.stack(person), torch.stack(found)

    def classify(self, encoded: Encoded, boxes: Tensor, size: Tensor) -> Tensor:
        """Action logits (L, B, P, classes) of boxes (B, P, 4); outside training of the last layer alone."""
        visible = self.decoder["projection"](encoded.tokens)
        places = self._places("decoder_positions", encoded.grid, visible)
        volume = self.volume(visible, encoded, places)
        places = places.index_select(1, encoded.order)
        visible = visible + take(places.expand(len(visible), -1, -1), encoded.index)
        actors = actor_features(volume, widened(boxes.detach(), self.extend, size), self.patch)
        x, logits = torch.cat([visible, actors], 1), []
        layers: Any = self.decoder["layers"]
        classifiers: Any = self.decoder["classifiers"]
        for number, (layer, classifier) in enumerate(zip(layers, classifiers)):
            x = self._feed(layer, self._attend(layer, x, self.decoder_drop_path), self.decoder_drop_path)
            if self.training or number == len(layers) - 1:
                logits.append(classifier(x[:, -actors.shape[1] :]))
        return torch.stack(logits)

    def volume(self, visible: Tensor, encoded: Encoded, places: Tensor) -> Tensor:
        """(B, t, h, w, d): the whole clip again, the mask token where a token was dropped, plus `places` (1, N, d)."""
        batch, _, channels = visible.shape
        index = encoded.index.unsqueeze(-1).expand_as(visible)
        whole = self.mask_token.to(visible.dtype).expand(batch, places.shape[1], channels).scatter(1, index, visible)
        whole = whole.index_select(1, encoded.order.argsort()) + places
        return whole.unflatten(1, encoded.grid)

    def loss(
        self, found: Detections, boxes: Tensor, labels: Tensor, present: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of all weighted terms, and the last of each kind.

        Every head is matched by itself and pays 2 x cross entropy, 5 x L1 and 2 x GIoU; every decoder layer pays
        `action_weight` x binary cross entropy on the proposals that the last head matches.

        Args:
            boxes: (B, A, 4) px.
            labels: (B, A, classes) 0 or 1.
            present: (B, A) bool, which of them there are; the others are padding.
        """
        terms: list[Tensor] = []
        for person, moved in zip(found.person, found.boxes):
            matched = match(person, moved, boxes, present, found.size)
            parts = box_losses(person, moved, boxes, found.size, matched)
            terms += [2 * parts["person"], 5 * parts["l1"], 2 * parts["giou"]]
        wanted = labels[matched.picture, matched.target].to(found.actions.dtype)
        for logits in found.actions:
            ours = logits[matched.picture, matched.proposal]
            loss = F.binary_cross_entropy_with_logits(ours, wanted) if len(ours) else logits.sum() * 0
            terms.append(self.action_weight * loss)
            parts["action"] = loss
        return torch.stack(terms).mean(), parts

    @torch.no_grad()
    def detect(self, pixels: Tensor, size: Tensor | None = None, threshold: float = 0.7) -> list[Found]:
        """What `forward` finds, for each clip: proposals that are a person with at least `threshold`; where there are
        none, all of them. No suppression of overlaps; action scores are not multiplied with the person's."""
        return self.persons(self(pixels, size), threshold)

    @staticmethod
    def persons(found: Detections, threshold: float = 0.7) -> list[Found]:
        """What `detect` says of what `forward` found."""
        results = []
        for person, boxes, actions, (height, width) in zip(
            found.person[-1].softmax(-1)[..., 0], found.boxes[-1], found.actions[-1], found.size.tolist()
        ):
            sure = person >= threshold
            sure = sure if bool(sure.any()) else torch.ones_like(sure)
            limit = boxes.new_tensor([width, height, width, height])
            results.append(Found(boxes[sure].clamp(min=0).minimum(limit), person[sure], actions[sure].sigmoid()))
        return results


def normalised(frames: Tensor) -> Tensor:
    """uint8 frames as what the model reads: (value / 255 - 0.45) / 0.225."""
    return (frames.float() / 255 - 0.45) / 0.225


def sinusoid(count: int, width: int) -> Tensor:
    """(count, width): sin(n / 10000^(2 floor(j/2) / width)) at even j, cos at odd j."""
    place = torch.arange(count, dtype=torch.float64).unsqueeze(1)
    turns = torch.arange(width, dtype=torch.float64).div(2, rounding_mode="floor") * 2 / width
    angle = place / 10000**turns
    return torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos()).float()


def resized(table: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(1, t h w, D) positions for a grid, of a table (t, rows, columns, D): bicubic within each slot."""
    if table.shape[1:3] != grid[1:]:
        planes = F.interpolate(table.permute(0, 3, 1, 2), size=grid[1:], mode="bicubic", align_corners=False)
        table = planes.permute(0, 2, 3, 1)
    return table.flatten(0, 2).unsqueeze(0)


def keyframe_first(grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """(t h w,) long: the places of slot t // 2, then those of the other slots in time order."""
    t, frame = grid[0], grid[1] * grid[2]
    place = torch.arange(t * frame, device=device)
    first = t // 2 * frame
    return torch.cat([place[first : first + frame], place[:first], place[first + frame :]])


def onto(canvas: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """`canvas` (B, s, D) with the tokens x (B, K, D) at their places `index` (B, K), those below s."""
    frame = canvas.shape[1]
    target = index.clamp(max=frame).unsqueeze(-1).expand_as(x)
    return F.pad(canvas, (0, 0, 0, 1)).scatter(1, target, x)[:, :frame]


def attention_and_score(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, guided: bool = False
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v (B, H, N, d), and what each token receives: (B, N) float32, the mean over heads and
    rows i of `rows` (B, N) x attention.

    The map is needed for both, so each part of it is computed once, in blocks of some heads and rows; the whole of it
    is never in memory, unless a gradient needs it. On a GPU fused attention and a kernel for the scores take less time,
    although each computes it. Scores carry a gradient only where they are `guided`.
    """
    batch, heads, count, width = query.shape
    if not guided and (column_sums := kernel(query.device)) is not None:
        fused = F.scaled_dot_product_attention(query, key, value)
        return fused, column_sums(query, key, width**-0.5, rows, False, None) / count
    chunk = _CHUNK if query.device.type == "cpu" else _CHUNK_ACCELERATOR
    few = max(1, min(count, chunk // (batch * count)))
    some = max(1, chunk // (batch * few * count))
    out = []
    score = torch.zeros(batch, count, device=query.device)
    for q, k, v in zip((query * width**-0.5).split(some, 1), key.split(some, 1), value.split(some, 1)):
        parts = []
        for part, row in zip(q.split(few, 2), rows.split(few, 1)):
            weights = (part @ k.transpose(-1, -2)).softmax(-1, dtype=torch.float32)
            parts.append(weights.to(v.dtype) @ v)
            score = score + (row[:, None, None] @ (weights if guided else weights.detach())).sum((1, 2))
        out.append(torch.cat(parts, 2))
    return torch.cat(out, 1), score / (heads * count)


def widened(boxes: Tensor, extend: Sequence[float], size: Tensor) -> Tensor:
    """Boxes (B, P, 4) wider by extend[0] and higher by extend[1], half on each side, within pictures of `size`."""
    low, high = boxes[..., :2], boxes[..., 2:]
    pad = boxes.new_tensor(extend) / 2 * (high - low + 1)
    limit = size.flip(1).unsqueeze(1).to(boxes.dtype) - 1
    return torch.cat([one.clamp(min=0).minimum(limit) for one in (low - pad, high + pad)], -1)


def actor_features(volume: Tensor, boxes: Tensor, stride: int) -> Tensor:
    """(B, P, d): of volume (B, t, h, w, d), what each box (B, P, 4) px covers: the same box in every slot, the greatest
    of 7 x 7 bins, the mean over slots. The number of samples in a bin adapts to the box."""
    from torchvision.ops import roi_align

    batch, slots, _, _, channels = volume.shape
    # In float32, as in `foveate.nn.sparse_rcnn.look`.
    maps = volume.permute(0, 1, 4, 2, 3).flatten(1, 2).float()
    seen = roi_align(maps, list(boxes.float()), 7, 1 / stride, sampling_ratio=-1, aligned=True)
    return seen.amax((2, 3)).view(batch, -1, slots, channels).mean(2).to(volume.dtype)
