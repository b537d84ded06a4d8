"""MustDrop: merge tokens in the vision encoder, drop them in the prefill, and once more from the cache."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
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
    floor_share,
    language_layers,
    register,
    share,
    whole,
    within,
)
from foveate.tokens import DROPPED, Tokens, compact, marked, topk_in_order

_KEY = "mustdrop.key"
"""The mark of patches whose token is in the key set."""
_LEFT = "mustdrop.left"
"""The memory of which patches the last filter left a token for."""
_PAPER_TOKENS = 24 * 24
"""Of a crop on the paper's hosts, which its thresholds were chosen for."""
_ROWS = 32
"""Most rows of attention in memory at once."""


@register
class MustDrop(Method):
    """Takes visual tokens away at every stage of their life; a key set, found in the encoder, outlives them all.

    1. Merging, before encoder layer 1. The grid of M patches is cut in windows of 3 x 3; a window's score is the mean
       cosine of its 9 tokens to each other, `(|| sum_j x_j / |x_j| ||^2 - 9) / 72`. The r best windows become the mean
       of their tokens, with r the number of windows that score at least `similarity`, the least of the crops of a
       picture: `(B, M, C) -> (B, N0, C)`, N0 = M - 8 r. Merged tokens come first, the most similar one leading.
       The key set of a crop: its `ceil(key N0)` tokens with most class-token attention in the encoder's last layer.
    2. Dual-attention filter, after language-model layers 2, 6, 10, 14 of 32. With A (R, N) the attention of the R text
       tokens that follow the last picture to the N visual tokens, softmax over all keys, mean over heads,
       `g_j = sum_i A_ij` and `m_j = max_i A_ij`, token j is dropped where `g_j < thr_g sum_n g_n` and `m_j < thr_i`,
       unless it is in the key set: `(B, N, D) -> (B, n, D)`, in their order.
    3. Output-aware cache, once, before decoding: every layer from the first filter's on goes on with the entries of the
       tokens that the last filter left; the layers before it keep all N0. So text generated with a cache is, on
       purpose, not that generated without one. Cached keys keep the rotation that they have; a query's position follows
       its own layer's entries (`positions="original"`: the prompt's).

    Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model (MustDrop),
    https://arxiv.org/abs/2411.10803. Thresholds by default are those of the paper's 192-token setting.

    Ours: thresholds hold for 576 tokens a crop; where an encoder makes M' they are multiplied by 576 / M', and layers
    are shares of the depth. `merge` and `keep` set numbers instead of thresholds, for budgets: the best windows by
    score, and the tokens that stay longest when both thresholds grow in proportion, by
    `max(g_j / (thr_g sum g), m_j / thr_i)`; where fewer are to stay than are in the key set, the best of it. A grid's
    last rows and columns that fill no window are not merged; an encoder without class token is scored by the attention
    that patches receive; a host that cannot merge inside its encoder (Qwen2-VL) takes `similarity=2`.

    What differs from the release: r is the least of its batch (`minimum_over="batch"`). It lays LLaVA-NeXT's crops one
    after the other, without newlines or cutting off padding; here the model packs them as ever, so that merged tokens
    of such crops stay in their places and a newline stays where its whole row does.
    """

    forgets = True

    card = Card(
        slug="mustdrop",
        title="Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
        arxiv="2411.10803", year=2024, kind="reduce", hosts=("hf-vlm",),
        identity={"similarity": 2.0, "thr_g": 1.0, "thr_i": 0.0},
        summary="Merges similar windows in the encoder, drops by text attention in the prefill, prunes the cache.",
        parameters={
            "window": "rows and columns of a window of patches",
            "similarity": "windows that score at least this are merged; above 1 none are",
            "merge": "share of the windows that is merged, in [0, 1], instead of similarity (ours)",
            "minimum_over": "r is the least of the crops of a 'picture', or of the whole 'batch' (release)",
            "order": "'released': merged tokens first, by similarity, if a picture is one crop; 'spatial': in place",
            "key": "share of a crop's tokens in the key set, in [0, 1]",
            "layers": "after which layers to filter, 0-based: whole numbers, or shares of those that another follows",
            "thr_g": "a token is dropped only if its share of the text's attention is below this",
            "thr_i": "a token is dropped only if no text token pays it this much attention; 0 drops nothing",
            "keep": "share left by each filter, instead of thresholds (ours): 0.5 leaves 0.5, 0.25, ... of N0",
            "cache": "'final': decode with the last filter's tokens in all layers it can; 'full': with each layer's",
            "positions": "of what a filter leaves: 'released': numbered anew; 'original': those of the prompt",
        },
    )  # fmt: skip

    claims = (
        *(
            Claim(
                f"MACs of the visual tokens, {label}", "flops", figure, "card", tolerance=0.005,
                architecture=architecture, settings=settings, counting="visual-macs", visual=visual,
            )
            for label, figure, architecture, settings, visual in (
                ("vanilla 576", 3.817e12, "llava-1.5-7b", {"similarity": 2.0, "thr_i": 0.0}, 576),
                ("vanilla 2880", 20.83e12, "llava-next-7b", {"similarity": 2.0, "thr_i": 0.0}, 2880),
                ("64 in all layers (all windows merged)", 0.416e12, "llava-1.5-7b", {"merge": 1.0, "keep": 1.0}, 576),
                ("320 in all layers (the same)", 2.10e12, "llava-next-7b", {"merge": 1.0, "keep": 1.0}, 2880),
            )
        ),
        *(
            Claim(
                f"visual KV bytes, fp16, {label}", "kv_bytes", figure, source, tolerance=tolerance,
                architecture=architecture, settings=settings, visual=visual,
            )
            for label, figure, source, tolerance, architecture, settings, visual in (
                ("576 tokens at 524,288", 576 * 524_288, "card", 0, "llava-1.5-7b",
                 {"similarity": 2.0, "thr_i": 0.0}, 576),
                ("2880 tokens", 1512e6, "a later paper's table", 0.002, "llava-next-7b",
                 {"similarity": 2.0, "thr_i": 0.0}, 2880),
                ("320 tokens", 168e6, "a later paper's table", 0.002, "llava-next-7b",
                 {"merge": 1.0, "keep": 1.0}, 2880),
                # Layers 0 and 1 hold 576, the other 30 what is left of them after four halvings.
                ("four halvings, final cache", (2 * 576 + 30 * 36) * 16_384, "card", 0, "llava-1.5-7b",
                 {"merge": 0.0, "keep": 0.5}, 576),
            )
        ),
        *(
            Claim(
                f"visual tokens per layer, {label}", "tokens", figure, "card", tolerance=0,
                architecture="llava-1.5-7b", settings=settings,
            )
            for label, figure, settings in (
                ("no window merged", 576, {"merge": 0.0, "keep": 1.0}),
                ("32 windows merged", 320, {"merge": 0.5, "keep": 1.0}),
                ("all 64 windows merged", 64, {"merge": 1.0, "keep": 1.0}),
                # Layers 0-2 run on N0, 3-6, 7-10, 11-14 and 15-31 on what each filter left.
                ("four halvings", (3 * 576 + 4 * 288 + 4 * 144 + 4 * 72 + 17 * 36) / 32, {"merge": 0.0, "keep": 0.5}),
            )
        ),
        Claim(
            "key set of 576 tokens", "value", 47, "card", tolerance=0,
            value=lambda mustdrop: int(mustdrop.key_count(torch.tensor(576))),
        ),
        *(
            Claim(
                f"the figure's example (309, 168, .. 64 tokens): {label}", "value", figure, "method figure",
                tolerance=0, settings={"layers": (1, 2, 3)}, value=value,
            )
            for label, figure, value in (
                # The release logs a filtering layer with what it leaves, one layer too early.
                ("logged for layer 2", 168, lambda mustdrop: mustdrop.schedule((309, 168, 90, 64), 5)[2]),
                ("cached in layer 1", 309, lambda mustdrop: mustdrop.cached((309, 168, 90, 64), 5)[0]),
                ("cached in layer 2", 64, lambda mustdrop: mustdrop.cached((309, 168, 90, 64), 5)[1]),
                ("cached in the last layer", 64, lambda mustdrop: mustdrop.cached((309, 168, 90, 64), 5)[-1]),
            )
        ),
    )  # fmt: skip

    def __init__(
        self,
        *,
        window: int = 3,
        similarity: float = 0.8,
        merge: float | None = None,
        minimum_over: str = "picture",
        order: str = "released",
        key: float = 0.08,
        layers: Sequence[int | float] = (2 / 32, 6 / 32, 10 / 32, 14 / 32),
        thr_g: float = 0.001,
        thr_i: float = 0.001,
        keep: float | None = None,
        cache: str = "final",
        positions: str = "released",
    ) -> None:
        if not isinstance(layers, list | tuple):
            raise InputError(f"layers must be a list of layers, not {layers!r}")
        self.window = whole("window", window, 2)
        self.similarity = within("similarity", similarity, "[0, inf)")
        self.merge = merge if merge is None else within("merge", merge, "[0, 1]")
        self.minimum_over = choice("minimum_over", minimum_over, ("picture", "batch"))
        self.order = choice("order", order, ("released", "spatial"))
        self.key = within("key", key, "[0, 1]")
        self.layers = tuple(depth("layers", layer) for layer in layers)
        self.thr_g = within("thr_g", thr_g, "[0, 1]")
        self.thr_i = within("thr_i", thr_i, "[0, 1]")
        self.keep = keep if keep is None else share("keep", keep)
        self.cache = choice("cache", cache, ("final", "full"))
        self.positions = choice("positions", positions, ("released", "original"))
        self.renumbers = self.positions == "released"  # type: ignore[misc]

    @classmethod
    def for_budget(cls, budget: float, host: HostShape) -> Method:
        """Numbers instead of thresholds: merging leaves the square root of the budget, the filters take the rest.

        Where the layers before the first filter alone cost more, more windows are merged.
        """
        if share("budget", budget) == 1:
            return cls(merge=0.0, keep=1.0)
        patches = host.grid[0] * host.grid[1]
        # Where patches are joined behind the encoder, fewer of them in it make no fewer tokens behind.
        merges = "vision.layer" in host.stages and host.joined == 1
        windows = (host.grid[0] // 3) * (host.grid[1] // 3) if merges else 0
        filters = cls().filters(language_layers(cls.card.slug, host))
        for merged in range(min(windows, int((1 - math.sqrt(budget)) * patches / 8)), windows + 1):
            entered = 1 - 8 * merged / patches

            def spent(keep: float, entered: float = entered) -> float:
                left = [keep ** sum(before < layer for before in filters) for layer in range(host.llm_layers)]
                return entered * sum(left) / host.llm_layers

            # At least a tenth at each filter: with less, it would be a plain cut.
            if spent(0.1) <= budget:
                low, high = 0.1, 1.0
                for _ in range(50):
                    middle = (low + high) / 2
                    low, high = (middle, high) if spent(middle) < budget else (low, middle)
                return cls(merge=merged / windows if windows else 0.0, keep=round(low, 4))
        raise InputError(
            f"mustdrop cannot spend as little as {budget} of the visual tokens: {filters[0] + 1} of "
            f"{host.llm_layers} layers see all that merging leaves"
        )

    def check(self, host: HostShape) -> None:
        if self._merges and host.feature_layer < 1:
            raise InputError("mustdrop merges before encoder layer 1; the model uses the features of layer 0")
        if self._filters:
            self.filters(host.llm_layers)

    def acts_at(self, host: HostShape) -> tuple[str, ...]:
        stages = {
            "vision.layer": self._merges,
            "vision.output": self._filters and self.key > 0,
            "llm.layer": self._filters,
            "llm.decode": self._filters and self.cache == "final",
        }
        return tuple(stage for stage, acts in stages.items() if acts)

    def layers_at(self, stage: str, host: HostShape) -> Collection[int] | None:
        if stage == "vision.layer":
            return (1,)
        if stage == "llm.layer":
            # What layer l's attention says takes effect before the next one.
            return [layer + 1 for layer in self.filters(host.llm_layers)]
        if stage == "llm.decode":
            filters = self.filters(host.llm_layers)
            return range(filters[0], filters[-1] + 1) if filters else ()
        return None

    def reads(self, host: HostShape) -> tuple[str, ...]:
        if not self._filters:
            return ()
        key = (f"vision.attention[{host.vision_layers - 1}]",) if self.key else ()
        return (*key, *(f"llm.attention[{layer}]" for layer in self.filters(host.llm_layers)))

    @property
    def _merges(self) -> bool:
        return self.similarity <= 1 if self.merge is None else self.merge > 0

    @property
    def _filters(self) -> bool:
        return bool(self.layers) and (self.thr_i > 0 if self.keep is None else self.keep < 1)

    def filters(self, layers: int) -> list[int]:
        """Those of `layers` layers after which is filtered, never the last one; shares may fall on the same."""
        return sorted({at_depth("layers", layer, layers - 1) for layer in self.layers})

    # -- stage 1

    @at("vision.layer")
    def merge_windows(self, tokens: Tokens, at: Stage) -> Tokens:
        rows, columns = at.signals.grid()
        if tokens.valid is not None or tokens.x.shape[1] != rows * columns:
            raise InputError("mustdrop merges windows of whole grids of patches; let no other method act before it")
        batch, patches = tokens.x.shape[:2]
        device = tokens.x.device
        window = self.windows(rows, columns).to(device)
        count = len(window)
        score = window_scores(tokens.x, window)
        if self.merge is None:
            merged = (score >= self.similarity).sum(1)
        else:
            merged = torch.full((batch,), int(self.merge * count + 0.5), device=device)
        place = torch.arange(patches, device=device).expand(batch, -1)
        # A merged token stands in place of its first patch that the model will use; the others may be padding.
        number, single = place.clone(), torch.ones(batch, 1, dtype=torch.bool, device=device)
        for picture in at.signals.crops():
            if not picture.single:
                here = picture.rows
                merged[here] = merged[here].min()
                number[here] += patches * (~picture.packed).to(device)
                single[here] = False
        if self.minimum_over == "batch":
            merged = merged.min().expand(batch)
        order = torch.sort(score, dim=1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(1, order, place[:, :count])
        first = number[:, window].amin(-1) % patches + count
        if self.order == "released":
            first = torch.where(single, rank, first)
        # Tokens with the same number become one; the numbers say in which order they stand.
        goes = (rank < merged.unsqueeze(1)).unsqueeze(-1)
        into = place + count
        into[:, window] = torch.where(goes, first.unsqueeze(-1), into[:, window])
        taken = torch.zeros(batch, patches + count, dtype=torch.long, device=device).scatter(1, into, 1)
        return tokens.merge(taken.cumsum(1).gather(1, into) - 1)

    def windows(self, rows: int, columns: int) -> Tensor:
        """(W, window^2) long: the patches of each window of a grid, row by row."""
        place, side = torch.arange(rows * columns).reshape(rows, columns), self.window
        if rows < side or columns < side:
            return place.new_zeros(0, side * side)
        return place.unfold(0, side, side).unfold(1, side, side).reshape(-1, side * side)

    @at("vision.output")
    def note_key_set(self, tokens: Tokens, at: Stage) -> Tokens:
        layer = at.host.vision_layers - 1
        score = at.signals.cls_attention(layer) if at.host.class_token else at.signals.received(layer)
        chosen = topk_in_order(score, self.key_count(tokens.count), tokens.valid)
        at.marks[_KEY] = _carried(tokens, chosen)
        return tokens

    def key_count(self, count: Tensor) -> Tensor:
        """`ceil(key N0)`, exact for decimal shares."""
        return (count.double() * self.key - 1e-9).ceil().long()

    # -- stage 2

    @at("llm.layer")
    def filter(self, tokens: Tokens, at: Stage) -> Tokens:
        filters, layer = self.filters(at.host.llm_layers), at.layer - 1
        total, most = self._asked(tokens, layer, at)
        scale = _PAPER_TOKENS * at.host.joined / (at.host.grid[0] * at.host.grid[1])
        key = _marked(tokens, at.marks[_KEY]) if self.key else torch.zeros_like(tokens.mask())
        whole_sum = total.sum(1, keepdim=True)
        if self.keep is None:
            drops = (total < self.thr_g * scale * whole_sum) & (most < self.thr_i * scale) & ~key
            result = tokens.keep(compact(tokens.mask() & ~(drops & at.active.unsqueeze(1))))
        else:
            # The factor on both thresholds from which on a token would be dropped.
            tiny = torch.finfo(total.dtype).tiny
            factor = torch.maximum(total / (self.thr_g * whole_sum).clamp(min=tiny), most / max(self.thr_i, tiny))
            ranked = factor / factor.amax(1, keepdim=True).clamp(min=tiny) + 2 * key
            left = floor_share(at.entered, self.keep ** (filters.index(layer) + 1), least=0)
            left = torch.where(at.active, left, at.entered)
            result = tokens.keep(topk_in_order(ranked, left, tokens.valid))
        at.memory[_LEFT] = result.source
        return result

    def _asked(self, tokens: Tokens, layer: int, at: Stage) -> tuple[Tensor, Tensor]:
        """(B, N) g and m: sum and maximum over the text tokens after the last picture of their attention."""
        attention = at.signals.attention(layer)
        prompt = at.signals.prompt()[:, : attention.length]
        place = torch.arange(prompt.shape[1], device=prompt.device)
        index = compact(prompt & (place > at.signals.slots().amax(1, keepdim=True)))
        total = most = torch.zeros(tokens.mask().shape, device=tokens.x.device)
        for some in index.split(_ROWS, 1):
            paid = attention.rows(some.clamp(min=0)).mean(1) * (some >= 0).unsqueeze(-1)
            paid = paid.gather(2, attention.visual.unsqueeze(1).expand(-1, some.shape[1], -1))
            paid = paid * tokens.mask().unsqueeze(1)
            # Nothing is paid where no text follows.
            total, most = total + paid.sum(1), torch.cat([most.unsqueeze(1), paid], 1).amax(1)
        return total, most

    # -- stage 3

    @at("llm.decode")
    def prune_cache(self, tokens: Tokens, at: Stage) -> Tokens:
        left: Tensor = at.memory[_LEFT]
        return tokens.keep(compact(tokens.mask() & _marked(tokens, left >= 0)))

    # -- counting

    def schedule(self, left: Sequence[int], layers: int) -> list[int]:
        """Visual tokens that each of `layers` layers runs on, `left` being N0 and what each filter leaves."""
        filters = self.filters(layers)
        return [left[sum(before < layer for before in filters)] for layer in range(layers)]

    def cached(self, left: Sequence[int], layers: int) -> list[int]:
        """Visual entries in the cache of each layer after stage 3."""
        first = self.filters(layers)[0]
        return [left[0] if layer < first else left[-1] for layer in range(layers)]


def window_scores(x: Tensor, window: Tensor) -> Tensor:
    """(B, W) float32 in [-1, 1]: mean cosine of the tokens of each window to each other.

    Args:
        x: (B, N, C).
        window: (W, K) long, the tokens of each window.
    """
    unit = F.normalize(x.float(), dim=-1)[:, window]
    count = window.shape[1]
    # The sum over all pairs is the square of the sum; pairs of a token with itself are taken out.
    pairs = unit.sum(2).square().sum(-1) - unit.square().sum((2, 3))
    return pairs / (count * (count - 1))


def _carried(tokens: Tokens, chosen: Tensor) -> Tensor:
    """(B, M) bool: source patches that one of the tokens at `chosen` (B, K) carries; -1 is no token."""
    mark = marked(chosen, tokens.x.shape[1])
    return mark.gather(1, tokens.source.clamp(min=0)) & (tokens.source >= 0)


def _marked(tokens: Tokens, mark: Tensor) -> Tensor:
    """(B, N) bool: tokens that carry a source patch whose `mark` (B, M) is not 0."""
    return marked(torch.where(mark != 0, tokens.source, DROPPED), tokens.x.shape[1])
