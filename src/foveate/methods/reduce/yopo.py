"""YOPO: all visual tokens stay, and the language model does less with each of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.method import (
    Card,
    Claim,
    HostShape,
    InputError,
    Method,
    Stage,
    at,
    at_depth,
    choice,
    depth,
    register,
    share,
    whole,
    within,
)
from foveate.nn.calls import AttentionCall, MlpCall
from foveate.tokens import Tokens, compact

_FREE = 2
"""The first layers, all of whose heads look at the picture."""
_ROWS = 128
"""Queries whose attention is in memory at once."""


@register
class Yopo(Method):
    """Prunes the computation that is spent on visual tokens, in four ways and the same for every sample.

    * Neighbours: of the other visual tokens, a visual token sees those of its crop that are at most `(window - 1) / 2`
      rows and columns away, later ones too. What it sees of the text, and what text sees, stays causal.
    * Heads: in layer l, heads that are not in `heads[l - 2]` have nothing to do with visual tokens: after softmax the
      weights on visual keys are 0, without renormalisation, and the output of visual queries is 0. The first two
      layers keep all heads, and with the default `heads=()` all layers do; `HeadVotes` finds out which a model needs.
    * MLP: for visual tokens only the first `int(m / ffn)` of the m hidden units act, in all layers.
    * Layers: after `cut` layers the visual tokens are gone, (B, V, D) -> (B, 0, D), and later layers' caches hold none.

    "You Only Prune Once": Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See,
    https://arxiv.org/abs/2410.06169. LLaVA-1.5's figures are those of models that were fine-tuned with this at work;
    put on an untuned model, quality falls further. What differs from the release:

    * It sets weights to 0 in tensors of full size and works out FLOPs. Here layers and hidden units are really left
      out. Neighbours and heads save nothing that is measured: attention comes from the model's own kernel, with a mask
      for the former and values of 0 for the latter, which is the same as weights of 0.
    * For LLaVA, it drops layers by weights of 0 after softmax (`removed="simulate"`): visual keys still weigh in the
      denominator. Those of tokens that are really gone do not, as in its version for Qwen2-VL: text weighs more.

    A picture's newline tokens (LLaVA-NeXT) stand on no patch; what they see, and who sees them, stays causal. The mask
    of neighbours needs SDPA or eager attention.
    """

    card = Card(
        slug="yopo",
        title="Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See",
        arxiv="2410.06169", year=2024, kind="reduce", hosts=("hf-vlm",), coarse=True,
        identity={"neighbours": "all", "ffn": 1.0, "removed": "keep"},
        summary="Visual tokens see their neighbours only, use fewer heads and hidden units, and skip the last layers.",
        parameters={
            "window": "w, side of the square of visual tokens that a visual token sees, odd",
            "neighbours": "'both' ways (the paper), 'earlier' ones only, or 'all' that are earlier: no window",
            "heads": "of each layer from the third on, the heads kept, in a list of lists or a JSON file; () keeps all",
            "ffn": "f, by what the MLP's hidden units are divided for visual tokens; 1 keeps all",
            "cut": "how many layers see visual tokens: a whole number, or a share of the depth in (0, 1)",
            "removed": "from there on 'drop' visual tokens, 'simulate' that by weights of 0 (release), or 'keep' them",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(
                f"FLOPs of the visual tokens, vanilla {size}", "flops", figure, f"card ({printed} printed)",
                tolerance=0.0005, architecture=f"llava-1.5-{size}", counting="visual-flops",
                settings={"neighbours": "all", "ffn": 1.0, "removed": "keep"},
            )
            for size, figure, printed in (("7b", 7.634e12, "7.63 T"), ("13b", 14.888e12, "14.89 T"))
        ),
        *(
            Claim(
                f"FLOPs by the formula, {label}", "value", figure, source, tolerance=tolerance, settings=settings,
                value=value,
            )
            for label, figure, source, tolerance, settings, value in (
                # The printed quarter charges attention as if all visual tokens saw all. Which settings made the
                # printed eighth is not documented; these come nearest.
                ("7B, 1/2 of the heads, all pairs", 1.91e12, "25 % point", 0.002, {},
                 lambda yopo: yopo.flops(576, 4096, 11008, 32, heads=0.5, every_pair=True)),
                ("7B, 1/2 of the heads", 1.867e12, "card", 0.001, {},
                 lambda yopo: yopo.flops(576, 4096, 11008, 32, heads=0.5)),
                ("7B, 1/4 of the heads, MLP / 4", 0.92e12, "12 % point", 0.02, {"ffn": 4.0},
                 lambda yopo: yopo.flops(576, 4096, 11008, 32, heads=0.25)),
                ("7B, 24 of 32 heads", 2.18e12, "card", 0.002, {},
                 lambda yopo: yopo.flops(576, 4096, 11008, 32, heads=0.75)),
                ("13B, 1/2 of the heads, all pairs", 3.72e12, "25 % point", 0.002, {},
                 lambda yopo: yopo.flops(576, 5120, 13824, 40, heads=0.5, every_pair=True)),
                ("13B, 1/2 of the heads", 3.657e12, "card", 0.001, {},
                 lambda yopo: yopo.flops(576, 5120, 13824, 40, heads=0.5)),
                ("13B, 1/4 of the heads, MLP / 4", 1.79e12, "12 % point", 0.025, {"ffn": 4.0},
                 lambda yopo: yopo.flops(576, 5120, 13824, 40, heads=0.25)),
            )
        ),
        Claim("pairs of neighbours in 24 x 24", "value", 12_996, "card", tolerance=0,
              value=lambda yopo: yopo.pairs(24, 24)),
        Claim(
            "visual tokens per layer, 16 of 32 layers", "tokens", 288, "card", tolerance=0, architecture="llava-1.5-7b",
            settings={"cut": 16},
        ),
        # The printed T of InternVL2 and Qwen2-VL are means over pictures of unknown sizes; only this share does not
        # depend on them.
        Claim(
            "visual tokens per layer, of the 256 of a tile", "tokens", 256 * 33.19 / 44.25, "33.19 of 44.25 T printed",
            tolerance=0.0002, architecture="internvl2-8b", settings={"cut": 24, "neighbours": "all", "ffn": 1.0},
            visual=256,
        ),
    )  # fmt: skip

    renumbers = False

    def __init__(
        self,
        *,
        window: int = 5,
        neighbours: str = "both",
        heads: Sequence[Sequence[int]] | str = (),
        ffn: float = 2.0,
        cut: int | float = 0.5,
        removed: str = "drop",
    ) -> None:
        self.window = whole("window", window, 1)
        if not window % 2:
            raise InputError(f"window must be odd, so that it has a middle, not {window}")
        self.neighbours = choice("neighbours", neighbours, ("both", "earlier", "all"))
        self.heads = _heads(heads)
        self.ffn = within("ffn", ffn, "[1, inf)")
        self.cut = depth("cut", cut, least=1)
        self.removed = choice("removed", removed, ("drop", "simulate", "keep"))
        # One mask for all layers of a forward that have the same tokens; it goes when they do.
        self._masks: WeakKeyDictionary[Tokens, Tensor] = WeakKeyDictionary()

    @classmethod
    def for_budget(cls, budget: float, host: HostShape) -> Method:
        """The budget in visual tokens, averaged over layers, is met by `cut` alone, from below.

        The window and the MLP are those of the defaults: they make a token cheaper, and no token fewer. At 1 no layer
        is cut.
        """
        if share("budget", budget) == 1:
            return cls(removed="keep")
        cut = int(budget * host.llm_layers + 1e-9)
        if not cut:
            raise InputError(
                f"yopo cannot spend as little as {budget} of the visual tokens: the first of {host.llm_layers} layers "
                "sees all"
            )
        return cls(cut=cut)

    def check(self, host: HostShape) -> None:
        if self.removed != "keep":
            at_depth("cut", self.cut, host.llm_layers, least=1)
        if self.heads and len(self.heads) != host.llm_layers - _FREE:
            raise InputError(
                f"heads has {len(self.heads)} layers; this host has {host.llm_layers}, of which the first {_FREE} keep "
                "all heads and are left out"
            )

    def acts_at(self, host: HostShape) -> tuple[str, ...]:
        attention = self.neighbours != "all" or self.heads or self.removed == "simulate"
        acts = {"llm.layer": self.removed == "drop", "llm.attention": attention, "llm.mlp": self.ffn > 1}
        return tuple(stage for stage, does in acts.items() if does)

    def layers_at(self, stage: str, host: HostShape) -> Collection[int] | None:
        return (at_depth("cut", self.cut, host.llm_layers),) if stage == "llm.layer" else None

    @at("llm.layer")
    def leave(self, tokens: Tokens, at: Stage) -> Tokens:
        return tokens.keep(compact(tokens.mask() & ~at.active.unsqueeze(1)))

    @at("llm.attention")
    def look(self, call: AttentionCall, at: Stage) -> Tensor:
        count, groups = call.query.shape[1], call.key.shape[1]
        # Pictures come in the first forward of a cache, so that what comes on top of one has no visual queries.
        prefill = call.query.shape[2] == call.key.shape[2]
        mask = self._mask(call) if prefill and self.neighbours != "all" else None
        idle = self._idle(at.layer, count)
        past = self.removed == "simulate" and at.layer >= at_depth("cut", self.cut, at.host.llm_layers)
        blind = [True] * count if past else idle
        if not any(blind):
            return call.run(mask=mask)
        visual, per_group = call.is_visual, count // groups
        by_group = [blind[first : first + per_group] for first in range(0, count, per_group)]
        if all(len(set(group)) == 1 for group in by_group):
            hidden = visual[:, None, :, None] & _flags([group[0] for group in by_group], visual)[:, None, None]
            output = call.run(value=call.value.masked_fill(hidden, 0.0), mask=mask)
        else:
            # Heads that share values, of which some are blind.
            unseen = call.run(value=call.value.masked_fill(visual[:, None, :, None], 0.0), mask=mask)
            output = torch.where(_flags(blind, visual)[:, None], unseen, call.run(mask=mask))
        if prefill and any(idle):
            output = output.masked_fill(visual[:, :, None, None] & _flags(idle, visual)[:, None], 0.0)
        return output

    def _idle(self, layer: int, count: int) -> list[bool]:
        """For each of `count` heads, whether it has nothing to do with visual tokens in a layer."""
        if layer < _FREE or not self.heads:
            return [False] * count
        kept = self.heads[layer - _FREE]
        if kept and max(kept) >= count:
            raise InputError(f"heads: layer {layer} of this host has heads 0..{count - 1}, not {max(kept)}")
        return [head not in kept for head in range(count)]

    def _mask(self, call: AttentionCall) -> Tensor:
        """(B, 1, S, S), of the kind that the model uses: its own, with neighbours where both tokens are visual."""
        if call.mask is not None and call.mask.ndim == 2:
            raise InputError("FlashAttention takes no mask of neighbours; use SDPA, or set neighbours='all'")
        if call.tokens not in self._masks:
            place = call.tokens.position.new_full((*call.is_visual.shape, 3), float("nan"))
            row, token = (call.on_patch & call.tokens.mask()).nonzero(as_tuple=True)
            place[row, call.visual[row, token]] = call.tokens.position[row, token]
            near = within_reach(place, self.window // 2)
            seen = call.visible().squeeze(1)
            if self.neighbours == "earlier":
                near &= seen
            there = ~place[..., 0].isnan()
            seen = torch.where(there.unsqueeze(2) & there.unsqueeze(1), near, seen).unsqueeze(1)
            if call.mask is not None and call.mask.dtype != torch.bool:
                lowest = torch.finfo(call.mask.dtype).min
                seen = torch.zeros(seen.shape, dtype=call.mask.dtype, device=seen.device).masked_fill(~seen, lowest)
            self._masks[call.tokens] = seen
        return self._masks[call.tokens]

    @at("llm.mlp")
    def think(self, call: MlpCall, at: Stage) -> Tensor:
        gate, up, down = (_linear(call.module, name) for name in ("gate_proj", "up_proj", "down_proj"))
        units = max(1, int(gate.out_features / self.ffn + 1e-9))
        first = [None if one.bias is None else one.bias[:units] for one in (gate, up)]
        act: Any = call.module.act_fn
        flat, visual = call.hidden.flatten(0, 1), call.is_visual.flatten()
        # Whole rows by number: faster than a boolean mask in both directions.
        looks, reads = visual.nonzero().squeeze(1), (~visual).nonzero().squeeze(1)
        seen = flat.index_select(0, looks)
        hidden = act(F.linear(seen, gate.weight[:units], first[0])) * F.linear(seen, up.weight[:units], first[1])
        text = call.function(flat.index_select(0, reads).unsqueeze(0)).squeeze(0)
        output = text.new_empty(flat.shape)
        output.index_copy_(0, looks, F.linear(hidden, down.weight[:, :units], down.bias)).index_copy_(0, reads, text)
        return output.view(call.hidden.shape)

    def flops(
        self, visual: int, width: int, hidden: int, layers: int, *, heads: float = 1.0, every_pair: bool = False
    ) -> float:
        """FLOPs that the paper charges: `2 sum_{l < cut} (4 n d^2 h + 2 n p d h + 3 n d m / f)`, of n visual tokens.

        Args:
            width, hidden: d and m.
            layers: of the language model.
            heads: h, share of the heads that are kept.
            every_pair: p is n, instead of `window^2`.
        """
        pairs = visual if every_pair or self.neighbours == "all" else self.window**2
        attention = 4 * visual * width**2 * heads + 2 * visual * pairs * width * heads
        count = layers if self.removed == "keep" else at_depth("cut", self.cut, layers)
        return 2 * count * (attention + 3 * visual * width * hidden / self.ffn)

    def pairs(self, rows: int, columns: int) -> int:
        """How many pairs of visual tokens see each other in a picture, counting (a, a) once and (a, b) twice."""
        grid = Tokens.from_grid(torch.zeros(1, rows * columns, 0), (rows, columns))
        return int(within_reach(grid.position, self.window // 2).sum())


class HeadVotes(Method):
    """Finds the heads that look at pictures: the calibration of `Yopo`, which changes nothing.

    ```python
    votes = HeadVotes(threshold=0.077)
    with foveate.apply(model, votes):
        for inputs in some_hundred_samples:
            model(**inputs)
    Path("heads.json").write_text(json.dumps(votes.kept()))     # yopo's heads="heads.json"
    ```

    A sample votes for a head of a layer whose attention on visual keys, summed over queries, is more than `threshold`
    times that on all others; heads with votes from more than `majority` of the samples are kept. In LLaVA-1.5-13B, the
    authors' thresholds of 0.2, 0.077 and 0.035 keep about 10, 20 and 30 of 40 heads, 0 to all in a single layer.

    Args:
        queries: "prompt": the queries are the prompt, as for LLaVA; "decoded": the first generated token alone, as for
            the models that are not fine-tuned (there the thresholds are 0.052 to 0.11); let the model generate two.
    """

    card = Card(
        slug="yopo-head-votes", title=Yopo.card.title, arxiv=Yopo.card.arxiv, year=2024, kind="reduce",
        hosts=("hf-vlm",), summary="Notes which heads look at pictures, for yopo.", identity={},
    )  # fmt: skip

    def __init__(self, *, threshold: float = 0.077, majority: float = 0.4, queries: str = "prompt") -> None:
        self.threshold = within("threshold", threshold, "(0, inf)")
        self.majority = within("majority", majority, "[0, 1)")
        self.queries = choice("queries", queries, ("prompt", "decoded"))
        self.votes: dict[int, Tensor] = {}
        """layer -> (H,) long, votes for each head."""
        self.samples: dict[int, int] = {}
        """layer -> samples that have voted."""

    @at("llm.attention")
    def listen(self, call: AttentionCall, at: Stage) -> Tensor:
        prefill = call.query.shape[2] == call.key.shape[2]
        heard: set[int] = at.memory.setdefault("yopo-head-votes", set())
        if prefill == (self.queries == "prompt") and at.layer not in heard:
            heard.add(at.layer)
            votes = (self.ratio(call, prefill) > self.threshold)[at.active].cpu()
            self.votes[at.layer] = self.votes.get(at.layer, 0) + votes.sum(0)
            self.samples[at.layer] = self.samples.get(at.layer, 0) + len(votes)
        return call.run()

    @torch.no_grad()
    def ratio(self, call: AttentionCall, prefill: bool) -> Tensor:
        """(B, H) float32: attention on visual keys over attention on all others, summed over the prompt's queries."""
        visual = call.is_visual[:, None, None]
        asks = call.prompt if prefill else torch.ones_like(call.prompt[:, -call.query.shape[2] :])
        on = torch.zeros(len(call.query), 2, call.query.shape[1], device=call.query.device)
        for rows in torch.arange(call.query.shape[2], device=visual.device).split(_ROWS):
            weights = call.weights(rows) * asks[:, rows][:, None, :, None]
            on[:, 0] += (weights * visual).sum((2, 3))
            on[:, 1] += (weights * ~visual).sum((2, 3))
        return on[:, 0] / on[:, 1].clamp(min=torch.finfo(torch.float32).tiny)

    def kept(self) -> tuple[tuple[int, ...], ...]:
        """For each layer from the third on, the heads that are kept: `Yopo`'s `heads`.

        Raises:
            InputError: if no sample with a picture has run.
        """
        if not self.votes:
            raise InputError("no votes yet: apply this to a model and run samples with pictures")
        return tuple(
            tuple((self.votes[layer] > self.majority * self.samples[layer]).nonzero().flatten().tolist())
            for layer in sorted(self.votes)
            if layer >= _FREE
        )


def within_reach(place: Tensor, reach: int) -> Tensor:
    """(B, S, S) bool: pairs at the same t and at most `reach` rows and columns apart; place (B, S, 3), NaN for none."""
    t, y, x = place.unbind(-1)
    near = t.unsqueeze(2) == t.unsqueeze(1)
    for axis in (y, x):
        near &= (axis.unsqueeze(2) - axis.unsqueeze(1)).abs() <= reach
    return near


def _flags(values: list[bool], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)


def _linear(module: nn.Module, name: str) -> nn.Linear:
    """A projection of an MLP. InputError unless its weight is a plain matrix, of which a part can be used."""
    found = getattr(module, name, None)
    if type(found) is not nn.Linear:
        raise InputError(
            f"yopo uses a part of an MLP's gate_proj, up_proj and down_proj; here {name} is "
            f"{'missing' if found is None else f'a {type(found).__name__}'}: set ffn=1"
        )
    return found


def _heads(given: Any) -> tuple[tuple[int, ...], ...]:
    """`Yopo`'s heads, checked; read from a file if `given` names one."""
    if isinstance(given, str):
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"heads: {given!r} is no JSON file that can be read ({error})") from None
    if not isinstance(given, list | tuple) or not all(isinstance(layer, list | tuple) for layer in given):
        raise InputError(f"heads must be a list of lists of heads, or the name of a JSON file with one, not {given!r}")
    layers = tuple(tuple(sorted(whole("heads", head) for head in layer)) for layer in given)
    if any(len(set(layer)) != len(layer) for layer in layers):
        raise InputError(f"heads must not repeat a head, not {given!r}")
    return layers
