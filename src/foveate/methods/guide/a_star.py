"""A-STAR: the words of a prompt get places of their own in the picture, and keep them.

Latents z (B, C, h, w) go down the gradient of L_seg + L_ret before each step: how far the cross-attention maps A^m of
the words overlap, `sum min(A^m, A^n) / sum (A^m + A^n)`, and how little of each is where it was; see `AStar`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.method import Card, Claim, HostShape, InputError, Method, Stage, at, choice, register, whole, within
from foveate.nn.calls import DenoiserAttention, DenoiserCall
from foveate.nn.gradients import frozen

_READING, _MASKS, _GRID = "a-star: reading", "a-star: masks", "a-star: grid"
_FUNCTION_WORDS = """
a above across against an and are around as at be behind below beside between bottom but by center each eight for five
four from front has have her his in inside into is its left near next nine no nothing of off on one onto or other our
outside over right seven six that the their there these this those three to top two under up upon very was were which
while who with without your
"""
"""What cannot be the name of a thing; where something is and how many there are counts as such."""
Concepts = Sequence[tuple[int, ...]]
"""For each word, its tokens' positions in the prompt, 0 being the start token."""


@dataclass(eq=False)
class _Reading:
    """Cross-attention maps that a run of the denoiser leaves behind, means over heads and added up over layers.

    Attributes:
        rows: of the run's batch that are read.
        resolution: see `AStar`.
        grid: (rows, columns) of the maps, None before the first.
        total: (B, rows * columns, S) float32.
        layers: how many were added up.
    """

    rows: slice
    resolution: int
    grid: tuple[int, int] | None = None
    total: Tensor | None = None
    layers: int = 0

    def _rank(self, grid: tuple[int, int] | None) -> tuple[bool, int]:
        side = 0 if grid is None else min(grid)
        return side >= self.resolution, -side if side >= self.resolution else side

    def wants(self, grid: tuple[int, int]) -> bool:
        """Whether maps of this grid are those to be read, by what was seen so far."""
        return self._rank(grid) >= self._rank(self.grid)

    def add(self, grid: tuple[int, int], weights: Tensor) -> None:
        """`weights` (B, heads, rows * columns, S) of a layer."""
        if grid != self.grid:
            self.grid, self.total, self.layers = grid, None, 0
        maps = weights[self.rows].mean(1)
        self.total = maps if self.total is None else self.total + maps
        self.layers += 1

    def maps(self, concepts: Concepts, row: int) -> Tensor:
        """(words, rows, columns) of one picture; a word of several tokens has the mean of their maps."""
        assert self.total is not None and self.grid is not None
        mean = self.total[row] / self.layers
        if not concepts:
            return mean.new_zeros(0, *self.grid)
        if (last := max(itertools.chain(*concepts))) >= mean.shape[1]:
            raise InputError(f"words: there is no position {last}; the prompt has {mean.shape[1]}, counted from 0")
        words = [mean[:, list(positions)].mean(1) for positions in concepts]
        return torch.stack(words).unflatten(1, self.grid)


@register
class AStar(Method):
    """Moves the latents of Stable Diffusion, before each step, so that no word of the prompt is lost or blended.

    With A^m (rows, columns) the cross-attention of the picture to word m, the mean over the heads and the layers of
    16x16 maps, and B^m the mask of its high values at the step before:

        L_seg = sum_{m > n} sum min(A^m, A^n) / sum (A^m + A^n)                (Eq. 2: words apart from each other)
        L_ret = sum_m (1 - sum min(A^m, B^m) / sum (A^m + B^m))                (Eq. 3: words where they were)
        z' = z - alpha * grad_z (L_seg + L_ret)

    for which the conditional half of a guided batch runs once more, with gradients. The ratio is half of Dice's: 1/2
    for equal maps. Latents (B, C, h, w), and the denoiser's output as the pipeline expects it.

    A-STAR: Test-time Attention Segregation and Retention for Text-to-image Synthesis, ICCV 2023,
    https://arxiv.org/abs/2306.14544. There is no release. Where the paper says nothing, this project chose: alpha in
    step i of T is Attend-and-Excite's, 20 sqrt(linspace(1, 1/2, T)[i]); the losses take A as it is; B is 1 where A,
    scaled to [0, 1] by its least and greatest value, exceeds 1/2, and A is that of the denoiser's run on z', so that
    masks cost no further run. Where no layer has 16x16 maps, the coarsest of the larger ones are read, else the
    largest. Without `words`, a guess: the last of each run of words between function words and punctuation.
    """

    card = Card(
        slug="a-star",
        title="A-STAR: Test-time Attention Segregation and Retention for Text-to-image Synthesis",
        arxiv="2306.14544", year=2023, kind="guide", hosts=("diffusers",), identity={"scale": 0.0},
        summary="Keeps all things of a prompt in the picture, by gradients of its cross-attention; saves nothing.",
        parameters={
            "words": "of the prompt, each a string, a position or several (0 is the start token); None: guessed nouns",
            "scale": "alpha of the first step, >= 0; 0 changes nothing",
            "scale_range": "(first, last) factor whose root alpha is multiplied by, linear in between",
            "segregation": "weight of L_seg, >= 0",
            "retention": "weight of L_ret, >= 0",
            "steps": "how many of a run's first steps are guided; None: all",
            "resolution": "of the maps that are read: rows, or columns where these are fewer",
            "threshold": "of the scaled map, in [0, 1), above which the mask is 1",
            "normalise": "maps before the losses: 'none', or 'maximum', divided by their largest value",
            "smoothing": "sigma, in cells, of a 3x3 Gaussian over the maps; 0 is none",
            "masks": "a layout instead of computed masks: rows of 0 and 1 for each word; None: computed",
        },
    )  # fmt: skip

    claims = (
        Claim(
            "L_seg of two equal maps", "value", 0.5, "Eq. 2", 0,
            value=lambda method: float(segregation_loss(torch.linspace(0, 1, 256).view(1, 16, 16).expand(2, -1, -1))),
        ),
        Claim(
            "L_seg of two maps side by side", "value", 0, "Eq. 2", 0,
            value=lambda method: float(segregation_loss(_halves())),
        ),
        Claim(
            "L_seg of five equal maps, |C| (|C| - 1) / 4", "value", 5, "Eq. 2", 1e-6,
            value=lambda method: float(segregation_loss(torch.ones(5, 16, 16))),
        ),
        Claim(
            "L_ret of five maps that equal their masks, |C| / 2", "value", 2.5, "Eq. 3", 1e-6,
            value=lambda method: float(retention_loss(torch.ones(5, 16, 16), torch.ones(5, 16, 16))),
        ),
        Claim(
            "L_ret of five maps beside their masks, |C|", "value", 5, "Eq. 3", 1e-6,
            value=lambda method: float(retention_loss(*(half.expand(5, -1, -1) for half in _halves()))),
        ),
        Claim(
            "runs with gradients in 50 steps, two words", "value", 50, "Section 3.4", 0,
            value=lambda method: sum(method.acts(number, 2) for number in range(50)),
        ),
        Claim(
            "runs with gradients in 50 steps, one word: none in the first", "value", 49, "card", 0,
            value=lambda method: sum(method.acts(number, 1) for number in range(50)),
        ),
    )  # fmt: skip

    def __init__(
        self,
        *,
        words: Sequence[str | int | Sequence[int]] | None = None,
        scale: float = 20.0,
        scale_range: Sequence[float] = (1.0, 0.5),
        segregation: float = 1.0,
        retention: float = 1.0,
        steps: int | None = None,
        resolution: int = 16,
        threshold: float = 0.5,
        normalise: str = "none",
        smoothing: float = 0.0,
        masks: Any = None,
    ) -> None:
        self.words = None if words is None else _words(words)
        self.scale = within("scale", scale, "[0, inf)")
        if not isinstance(scale_range, list | tuple) or len(scale_range) != 2:
            raise InputError(f"scale_range must be two numbers, of the first and the last step, not {scale_range!r}")
        self.scale_range = tuple(within("scale_range", one, "[0, inf)") for one in scale_range)
        self.segregation = within("segregation", segregation, "[0, inf)")
        self.retention = within("retention", retention, "[0, inf)")
        self.steps = None if steps is None else whole("steps", steps)
        self.resolution = whole("resolution", resolution, 1)
        self.threshold = within("threshold", threshold, "[0, 1)")
        self.normalise = choice("normalise", normalise, ("none", "maximum"))
        self.smoothing = within("smoothing", smoothing, "[0, inf)")
        self.masks = None if masks is None else _layout(masks)
        if self.masks is not None and self.words is not None and len(self.masks) != len(self.words):
            raise InputError(f"masks: one for each of the {len(self.words)} words, not {len(self.masks)}")

    def check(self, host: HostShape) -> None:
        if not host.text_maps:
            raise InputError("a-star reads cross-attention to the prompt, which this model does not have")

    def alpha(self, step: int, steps: int) -> float:
        """The step size at step `step` of `steps`."""
        first, last = self.scale_range
        progress = step / max(1, steps - 1)
        return self.scale * (first + (last - first) * progress) ** 0.5

    def acts(self, number: int, words: int) -> bool:
        """Whether the latents are moved at the `number`-th step of a run, for a prompt with so many words."""
        if self.scale == 0 or words == 0 or (self.steps is not None and number >= self.steps):
            return False
        kept = self.retention > 0 and (number > 0 or self.masks is not None)
        return kept or (self.segregation > 0 and words > 1)

    @at("denoiser.call")
    def guide(self, call: DenoiserCall, at: Stage) -> Tensor:
        if len(call.latents[call.conditional]) == 0 or self.scale == 0:
            return call.function()
        concepts = self.concepts(call)
        number, most = call.step - call.begin, max(map(len, concepts), default=0)
        latents = None
        if self.acts(number, most):
            latents = call.replace_sample(self._moved(call, at, concepts))
        if self.masks is not None or self.retention == 0 or not self.acts(number + 1, most):
            return call.function(latents)
        # The next step's masks are of the latents that this one denoises.
        output, reading = self._run(call, at, call.conditional, latents)
        at.memory[_MASKS] = [
            binary_masks(self._maps(reading, words, row).detach(), self.threshold) for row, words in enumerate(concepts)
        ]
        return output

    @at("denoiser.attention")
    def read(self, call: DenoiserAttention, at: Stage) -> Any:
        reading = at.memory.get(_READING)
        if reading is None or not call.cross or not reading.wants(call.grid):
            return call.function()
        output, weights = call.watch()
        reading.add(call.grid, weights)
        return output

    def concepts(self, call: DenoiserCall) -> list[Concepts]:
        """The words of each of the call's pictures. InputError where the prompt does not have them."""
        if self.words is not None and not any(isinstance(word, str) for word in self.words):
            prompts: Sequence[str | None] = [None] * len(call.sample)
        else:
            if not call.prompts or call.tokenizer is None:
                raise InputError("a-star: the pipeline got embeddings instead of a prompt; give words as positions")
            prompts = call.prompts
        return [self._positions(prompt, call.tokenizer) for prompt in prompts]

    def _positions(self, prompt: str | None, tokenizer: Any) -> Concepts:
        if self.words is None:
            # What a guess found may be behind what the text encoder reads.
            places = (token_positions(tokenizer, prompt or "", noun) for noun in nouns(prompt or ""))
            concepts = [one for one in places if one]
        else:
            concepts = [self._place(word, prompt or "", tokenizer) for word in self.words]
        if self.masks is not None and len(self.masks) != len(concepts):
            raise InputError(f"masks: {len(self.masks)} for the {len(concepts)} words of {prompt!r}")
        return concepts

    def _place(self, word: str | int | tuple[int, ...], prompt: str, tokenizer: Any) -> tuple[int, ...]:
        if not isinstance(word, str):
            return word if isinstance(word, tuple) else (word,)
        if not (found := token_positions(tokenizer, prompt, word)):
            raise InputError(
                f"words: {word!r} is not in the prompt {prompt[:80]!r}, or behind what the text encoder reads of it"
            )
        return found

    def _moved(self, call: DenoiserCall, at: Stage, concepts: Sequence[Concepts]) -> Tensor:
        """z' (n, C, h, w)."""
        if torch.is_inference_mode_enabled():
            raise InputError("a-star needs gradients: run the pipeline outside of torch.inference_mode()")
        with torch.enable_grad(), frozen(call.module):
            sample = call.sample.detach().clone().requires_grad_()
            latents = call.replace_sample(sample)[call.conditional]
            arguments = {name: _rows(value, call) for name, value in call.arguments.items()}
            timestep = _rows(call.timestep, call)
            _, reading = self._run(call, at, slice(None), latents, timestep=timestep, **arguments)
            masks = self._known_masks(at, reading, concepts)
            losses = [self.loss(self._maps(reading, words, row), masks[row]) for row, words in enumerate(concepts)]
            (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), sample)
        if not bool(gradient.isfinite().all()):
            raise InputError(f"a-star: the gradient is not finite in {sample.dtype}; run the pipeline in float32")
        return (sample - self.alpha(call.step, call.steps) * gradient).detach()

    def _known_masks(self, at: Stage, reading: _Reading, concepts: Sequence[Concepts]) -> Sequence[Tensor | None]:
        if self.masks is None:
            found: Sequence[Tensor | None] = at.memory.get(_MASKS, [None] * len(concepts))
            return found
        assert reading.total is not None and reading.grid is not None
        layout = torch.tensor(self.masks, dtype=torch.float32, device=reading.total.device)
        scaled = F.interpolate(layout[None], size=reading.grid, mode="area")[0]
        return [(scaled >= 0.5).float()] * len(concepts)

    def _run(
        self, call: DenoiserCall, at: Stage, rows: slice, latents: Tensor | None, **arguments: Any
    ) -> tuple[Tensor, _Reading]:
        """The denoiser's output, and the maps of these rows of its batch."""
        reading = at.memory[_READING] = _Reading(rows, self.resolution, at.memory.get(_GRID))
        try:
            output = call.function(latents, **arguments)
        finally:
            del at.memory[_READING]
        at.memory[_GRID] = reading.grid
        return output, reading

    def _maps(self, reading: _Reading, concepts: Concepts, row: int) -> Tensor:
        """(words, rows, columns) as the losses take them."""
        maps = reading.maps(concepts, row)
        if self.smoothing:
            maps = smoothed(maps, self.smoothing)
        if self.normalise == "maximum":
            maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
        return maps

    def loss(self, maps: Tensor, masks: Tensor | None) -> Tensor:
        """(): of maps (words, rows, columns) of one picture, and the masks of the step before, None at the first."""
        loss = self.segregation * segregation_loss(maps)
        return loss if masks is None else loss + self.retention * retention_loss(maps, masks)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """(…): sum min(one, other) / sum (one + other) of maps (…, rows, columns) >= 0, in [0, 1/2]; 0 of empty ones."""
    total = (one + other).sum((-2, -1))
    shared = torch.minimum(one, other).sum((-2, -1))
    empty = total == 0
    return (shared / total.masked_fill(empty, 1)).masked_fill(empty, 0)


def segregation_loss(maps: Tensor) -> Tensor:
    """() L_seg of maps (words, rows, columns), Eq. 2: in [0, words (words - 1) / 4]."""
    first, second = torch.triu_indices(len(maps), len(maps), 1, device=maps.device)
    return overlap(maps[first], maps[second]).sum()


def retention_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """() L_ret of maps (words, rows, columns) in [0, 1] and such masks, Eq. 3: in [words / 2, words]."""
    return (1 - overlap(maps, masks)).sum()


def binary_masks(maps: Tensor, threshold: float) -> Tensor:
    """Where maps (words, rows, columns) are high: 1 above `threshold` on the scale from a map's least to its greatest
    value. A map that is the same everywhere has an empty mask."""
    least, greatest = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - least > threshold * (greatest - least)).to(maps.dtype)


def smoothed(maps: Tensor, sigma: float) -> Tensor:
    """Maps (words, rows, columns) under a 3x3 Gaussian; beyond the border they are mirrored."""
    from torchvision.transforms.v2.functional import gaussian_blur

    blurred: Tensor = gaussian_blur(maps[:, None], [3, 3], [sigma, sigma])
    return blurred[:, 0]


def nouns(prompt: str) -> list[str]:
    """What a prompt seems to be about: the last of each run of words between function words and punctuation."""
    known = _FUNCTION_WORDS.split()
    words = re.findall(r"\w[\w'’-]*|[^\w\s]", prompt)
    runs = itertools.groupby(words, key=lambda word: word[0].isalnum() and word.lower() not in known)
    return list(dict.fromkeys(list(run)[-1] for content, run in runs if content))


def token_positions(tokenizer: Any, prompt: str, word: str) -> tuple[int, ...]:
    """Where the tokens of a word, or of several in a row, first stand in a prompt; () where they do not."""
    ids = list(tokenizer(prompt, truncation=True)["input_ids"])
    wanted = list(tokenizer(word, add_special_tokens=False)["input_ids"])
    for start in range(len(ids) - len(wanted) + 1):
        if wanted and ids[start : start + len(wanted)] == wanted:
            return tuple(range(start, start + len(wanted)))
    return ()


def _words(words: Any) -> tuple[str | int | tuple[int, ...], ...]:
    if isinstance(words, str) or not isinstance(words, Sequence) or isinstance(words, bytes):
        raise InputError(f"words must be a list of words or of their positions in the prompt, not {words!r}")
    checked: list[str | int | tuple[int, ...]] = []
    for word in words:
        if isinstance(word, str) and word.strip():
            checked.append(word)
        elif isinstance(word, list | tuple) and word:
            checked.append(tuple(whole("words", position) for position in word))
        else:
            checked.append(whole("words", word))
    return tuple(checked)


def _layout(masks: Any) -> tuple[tuple[tuple[int, ...], ...], ...]:
    try:
        layout = torch.as_tensor(masks)
    except (TypeError, ValueError, RuntimeError):
        layout = torch.empty(0)
    if layout.ndim != 3 or layout.numel() == 0 or not bool(((layout == 0) | (layout == 1)).all()):
        raise InputError("masks must be rows of 0 and 1 for each word, all of one size: (words, rows, columns)")
    return tuple(tuple(tuple(int(cell) for cell in row) for row in mask) for mask in layout.tolist())


def _rows(value: Any, call: DenoiserCall) -> Any:
    """An argument of the call for its conditional rows."""
    if isinstance(value, Tensor):
        return value[call.conditional] if value.ndim and len(value) == len(call.latents) else value
    if isinstance(value, Mapping):
        return {name: _rows(one, call) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rows(one, call) for one in value)
    return value


def _halves() -> Tensor:
    """(2, 16, 16): the left half, and the right one."""
    left = torch.zeros(16, 16)
    left[:, :8] = 1
    return torch.stack((left, 1 - left))
