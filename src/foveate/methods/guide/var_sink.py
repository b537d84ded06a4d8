"""VAR: attention that is wasted on sink tokens goes to the other patches of the picture."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.method import Card, Claim, HostShape, InputError, Method, Stage, at, choice, register, whole, within
from foveate.nn.calls import AttentionCall
from foveate.tokens import Tokens, compact, marked

_FIRST = 2
"""Layers 0 and 1 have no sinks yet."""
_EPSILON = 1e-6
"""Of the RMS norm, and what the head test adds to the weight of each visual token."""
_KNOWN = {(32, 4096): (1415, 2533), (40, 5120): (2100, 4743)}
"""(layers, width) -> the sink dimensions that the release names, of LLaMA-2-7B and -13B."""
_BLOCK = 2**23
"""Most attention weights of rows that are in memory at once (32 MiB)."""


@register
class VarSink(Method):
    """Takes attention from sink tokens, in heads that look at the picture, and gives it to the other visual tokens.

    Sinks: a prompt token with state x before layer l is a sink there if `phi(x) = max_d |x_d| / sqrt(mean(x^2) + 1e-6)`
    is above tau, d over a few sink dimensions of the model. They are found in the prefill; generated tokens are none.
    Heads: with w the attention of one head for one query after the picture, `a = sum w` over visual tokens V and
    `s = (sum w over visual sinks) / (a + 1e-6 |V|)`, the head is edited for this query if a >= `minimum` and s <= rho
    (the paper: 1 - s >= rho). Redistribution: every sink, text or visual, keeps the share p of its weight (the paper:
    1 - p); what they give, Omega, goes to the visual tokens that are no sinks in proportion to their weights,
    `w_j <- w_j + Omega w_j / sum w`. Rows still sum to 1; other text keeps its weight. `w (B, H, K, S)` -> the same.

    See What You Are Told: Visual Attention Sink in Large Multimodal Models, ICLR 2025,
    https://arxiv.org/abs/2503.03321. Where paper and release differ (the head test, the meaning of p, the last layer)
    the release is the default. It shortens nothing and saves nothing: tokens, cache and the model's own products stay.
    The model's fused attention makes all outputs; those of K rows after the picture are then made again from weights
    that can be edited, `2 K S d` more multiply-adds in each edited layer of S keys and width d.

    This project's choices: after the last of several pictures; sink dimensions of other models are those in which the
    prompt's first token (BOS) is above tau. LLaMA-2's are taken where that token shows one of them.
    """

    card = Card(
        slug="var-sink", title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        arxiv="2503.03321", year=2025, kind="guide", hosts=("hf-vlm",), identity={"p": 1.0},
        summary="Moves attention from sink tokens to the rest of the picture; as many tokens, no FLOPs saved.",
        parameters={
            "tau": "above which phi a token is a sink; phi is at most the square root of the model's width",
            "rho": "threshold of the head test, in [0, 1]; 0.5 in the release, 0.8 for general tasks, 0.9 for vision",
            "p": "how much sinks keep (see p_means), in [0, 1]",
            "minimum": "least attention of a head to the picture, in [0, 1]",
            "dimensions": "sink dimensions, a list of whole numbers; 'auto': LLaMA-2's, or those found at BOS",
            "rho_test": "'released': sinks hold at most rho of the visual attention; 'paper': the others at least rho",
            "p_means": "'released': the share that sinks keep; 'paper': the share that they give away",
            "last_layer": "whether the last layer is edited too, as the release does against its own setting",
        },
    )  # fmt: skip

    claims = (
        Claim(
            "MACs of the visual tokens, none saved", "flops", 3.82e12, "card", tolerance=0.005,
            architecture="llava-1.5-7b", counting="visual-macs",
        ),
        Claim("visual tokens per layer, none dropped", "tokens", 576, "card", 0, architecture="llava-1.5-7b"),
        Claim("visual KV bytes, none saved", "kv_bytes", 576 * 524_288, "card", 0, architecture="llava-1.5-7b"),
    )  # fmt: skip

    def __init__(
        self,
        *,
        tau: float = 20.0,
        rho: float = 0.5,
        p: float = 0.6,
        minimum: float = 0.2,
        dimensions: str | list[int] | tuple[int, ...] = "auto",
        rho_test: str = "released",
        p_means: str = "released",
        last_layer: bool = False,
    ) -> None:
        self.tau = within("tau", tau, "(0, inf)")
        self.rho = within("rho", rho, "[0, 1]")
        self.p = within("p", p, "[0, 1]")
        self.minimum = within("minimum", minimum, "[0, 1]")
        self.dimensions: str | tuple[int, ...]
        if isinstance(dimensions, list | tuple):
            if not dimensions:
                raise InputError("dimensions must name at least one")
            self.dimensions = tuple(whole("dimensions", one) for one in dimensions)
        else:
            self.dimensions = choice("dimensions", dimensions, ("auto",))
        self.rho_test = choice("rho_test", rho_test, ("released", "paper"))
        self.p_means = choice("p_means", p_means, ("released", "paper"))
        if not isinstance(last_layer, bool):
            raise InputError(f"last_layer must be True or False, not {last_layer!r}")
        self.last_layer = last_layer

    @property
    def kept(self) -> float:
        """The share of their weight that sinks keep."""
        return self.p if self.p_means == "released" else 1 - self.p

    def check(self, host: HostShape) -> None:
        if not self._layers(host):
            raise InputError(f"var-sink edits layers from 2 to the last but one; this host has {host.llm_layers}")

    def _layers(self, host: HostShape) -> range:
        return range(_FIRST, host.llm_layers - (not self.last_layer))

    def layers_at(self, stage: str, host: HostShape) -> Collection[int]:
        return self._layers(host) if self.kept < 1 else ()

    @at("llm.layer")
    def find(self, tokens: Tokens, at: Stage) -> Tokens:
        """Notes the sinks of the prompt for this layer, in the prefill and for decoding after it."""
        states, prompt, slots = at.signals.states().detach(), at.signals.prompt(), at.signals.slots()
        sinks = sink_score(states, self._sink_dimensions(states, prompt, at.host)) > self.tau
        at.memory[f"var-sink[{at.layer}]"] = note(sinks & at.active[:, None], tokens, slots, prompt)
        return tokens

    def _sink_dimensions(self, states: Tensor, prompt: Tensor, host: HostShape) -> Tensor:
        """(B, D) bool."""
        width = states.shape[-1]

        def mask(dimensions: tuple[int, ...]) -> Tensor:
            chosen = torch.zeros(len(states), width, dtype=torch.bool, device=states.device)
            chosen[:, list(dimensions)] = True
            return chosen

        if isinstance(self.dimensions, tuple):
            if max(self.dimensions) >= width:
                raise InputError(f"dimensions {self.dimensions}: this model is {width} wide, counted from 0")
            return mask(self.dimensions)
        first = prompt.long().argmax(1)
        opening = states[torch.arange(len(states), device=states.device), first]
        massive = opening.float().abs() > self.tau * root_mean_square(opening).unsqueeze(-1)
        known = mask(_KNOWN.get((host.llm_layers, width), ()))
        # Llama 3 and Mistral have the shape of LLaMA-2-7B, but massive activations elsewhere.
        return torch.where((massive & known).any(1, keepdim=True), known, massive)

    @at("llm.attention")
    def attend(self, call: AttentionCall, at: Stage) -> Tensor:
        output = call.run()
        noted = at.memory.get(f"var-sink[{at.layer}]")
        if noted is None:
            # A layer that is not edited, or a cache that was filled before this method was applied.
            return output
        visual, sinks = call.is_visual, recall(noted, call)
        # In the prefill only the text after the picture; in decoding, that is every new token.
        after = call.rows > call.visual.amax(1, keepdim=True)
        asking = after & (visual & sinks).any(1, keepdim=True)
        rows = asking.any(0).nonzero().squeeze(1)
        if len(rows) == 0:
            return output
        batch, _, heads, width = output.shape
        groups, length = call.key.shape[1], call.key.shape[2]
        for part in rows.split(max(1, _BLOCK // (batch * heads * length))):
            weights, changed = self.edit(call.weights(part), visual, sinks)
            # Heads that share a value are folded instead of repeating the values.
            folded = weights.to(call.value.dtype).reshape(batch, groups, -1, length)
            fresh = (folded @ call.value).reshape(batch, heads, len(part), width).transpose(1, 2)
            chosen = (changed & asking[:, None, part]).transpose(1, 2).unsqueeze(-1)
            output = output.index_copy(1, part, torch.where(chosen, fresh, output[:, part]))
        return output

    def edit(self, weights: Tensor, visual: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        """The weights (B, H, K, S) of K queries with redistribution, and (B, H, K) bool, for which it applies.

        Args:
            weights: float32, rows sum to 1.
            visual, sinks: (B, S) bool (or B = 1), which keys are visual tokens, and which are sinks of either kind.
        """

        def over(keys: Tensor) -> Tensor:
            return (weights * keys[:, None, None]).sum(-1)

        receivers = visual & ~sinks
        on_picture, on_sinks, giving, receiving = (over(k) for k in (visual, visual & sinks, sinks, receivers))
        share_of_sinks = on_sinks / (on_picture + _EPSILON * visual.sum(1)[:, None, None])
        passes = share_of_sinks <= self.rho if self.rho_test == "released" else 1 - share_of_sinks >= self.rho
        # Without a receiver, or with next to no weight on any, there is nothing to be in proportion to.
        nothing = torch.finfo(weights.dtype).eps
        changed = (on_picture >= self.minimum) & passes & (receiving > nothing)
        changed &= (visual & sinks).any(1)[:, None, None]
        gain = 1 + (1 - self.kept) * giving / receiving.clamp(min=nothing)
        factor = torch.where(receivers[:, None, None], gain.unsqueeze(-1), 1.0)
        factor = torch.where(sinks[:, None, None], self.kept, factor)
        return torch.where(changed.unsqueeze(-1), weights * factor, weights), changed


def root_mean_square(states: Tensor) -> Tensor:
    """(...): of states (..., D), in float32, without the model's gain."""
    return (states.float().square().mean(-1) + _EPSILON).sqrt()


def sink_score(states: Tensor, dimensions: Tensor) -> Tensor:
    """phi (B, S) float32 of states (B, S, D), with each sample's sink dimensions (B, D) bool; 0 where it has none."""
    used = dimensions.any(0).nonzero().squeeze(1)
    if len(used) == 0:
        return states.new_zeros(states.shape[:2], dtype=torch.float32)
    largest = (states[..., used].float().abs() * dimensions[:, None, used]).amax(-1)
    return largest / root_mean_square(states)


def note(sinks: Tensor, tokens: Tokens, slots: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Sinks (B, S) by what does not change when tokens leave the cache: (B, M) by patch, (B, T) by word of the text."""
    visual = sinks.gather(1, slots.clamp(min=0)) & (slots >= 0)
    by_patch = visual.gather(1, tokens.source.clamp(min=0)) & (tokens.source >= 0)
    words = compact(prompt & ~marked(slots, sinks.shape[1]))
    return by_patch, sinks.gather(1, words.clamp(min=0)) & (words >= 0)


def recall(noted: tuple[Tensor, Tensor], call: AttentionCall) -> Tensor:
    """(B, S) bool: which of the keys are sinks that `note` noted."""
    by_patch, by_word = noted
    count, length = call.visual.shape[1], call.key.shape[2]
    source = call.tokens.source
    token = marked(torch.where(by_patch, source, -1), count)
    visual = marked(torch.where(token, call.visual, -1), length)
    text = call.prompt & ~call.is_visual
    number = (text.cumsum(1) - 1).clamp(min=0)
    # One word more, which is never a sink, so that there is one to look up.
    by_word = F.pad(by_word, (0, 1)).expand(len(text), -1)
    return visual | (text & by_word.gather(1, number.clamp(max=by_word.shape[1] - 1)))
