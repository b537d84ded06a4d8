"""SJD: a window of future image tokens is drafted by the model itself and judged as in speculative sampling.

One pass over L drafts d_i ~ q_i gives p_i; d_i is accepted if `u < p_i(d_i) / q_i(d_i)`, the first that is not
becomes a sample of `max(0, p_i - q_i)`, and samples behind it are the next drafts. ids (B, S) -> (B, S + N), in N / L
to N passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.method import Card, Claim, InputError, Published, choice, configured, register, whole
from foveate.nn.speculative import DecodeReport, Decoding, draw, leading, residual

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "lumina-mgpt-7b-768": {"codes": (4, 8196), "row": 49, "before": 3, "after": 10},
    "emu3-gen-720": {"codes": (151854, 184622), "row": 91},
    "llamagen-xl-512": {"init": "repeat_horizon", "codes": (0, 16384), "row": 32, "after": 18},
}
"""The paper's hosts by name: which ids are codes, tokens a row (with the end-of-line token, which LlamaGen lacks)."""

GENERATION: dict[str, dict[str, Any]] = {
    "lumina-mgpt-7b-768": {"do_sample": True, "temperature": 1.0, "guidance_scale": 3.0, "top_k": 2000},
    "emu3-gen-720": {"do_sample": True, "temperature": 1.0, "guidance_scale": 3.0, "top_k": 2048},
    "llamagen-xl-512": {"do_sample": True, "temperature": 1.0, "guidance_scale": 7.5, "top_k": 1000},
}
"""Arguments of `generate` by the same names; Lumina's text tokens have a top-k of 10, which needs a processor."""


def _passes(successor: bool, **settings: Any) -> int:
    """Passes for 256 greedy tokens of a real, tiny Llama that always says 0, or one more than it was told."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = 512
    config = LlamaConfig(
        vocab_size=words, hidden_size=words, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=300, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(words))
        if successor:
            model.lm_head.weight.copy_(torch.eye(words).roll(1, 0))
        decoder = Sjd(codes=(words - 2, words), **settings)
        model.generate(torch.zeros(1, 1).long(), custom_generate=decoder, max_new_tokens=256, do_sample=False)
    return decoder.report.calls


@register
class Sjd(Published):
    """Decodes up to `window` tokens in each pass of an autoregressive image model, without training or draft model.

    `model.generate(ids, custom_generate=Sjd(...), do_sample=True, ...)`; ids (B, S), left padding, guidance_scale with
    negative_prompt_ids, top_k and all logits processors are those of transformers. A pass takes in [last token, d_1,
    …, d_(L-1)], L = min(window, what remains), and gives p_i, the distributions of the L tokens that follow, of each of
    which a sample s_i is drawn, too. Drafts are judged from the left: d_i, which was drawn from q_i, is accepted if

        u_i < min(1, p_i(d_i) / q_i(d_i)),    u_i uniform in [0, 1)

    and the first that is not is replaced by a sample of `max(0, p_i - q_i)`, normalised; if all are accepted, s_L is
    kept as well. So a pass adds 1 to L tokens, distributed as in ancestral sampling. Behind a rejection the samples s_j
    are the next drafts, with q_j = p_j; the missing ones are initial tokens with q = 1, of the codes at random
    (`random`), equal to the left neighbour in the picture (`repeat_horizon`), or by its distribution
    (`sample_horizon`); in column 0, at random. `accept="jacobi"` is the plain Jacobi iteration: d_i is accepted while
    it equals s_i, and s_i is what is kept.

    Accelerating Auto-regressive Text-to-Image Generation with Training-free Speculative Jacobi Decoding, ICLR 2025,
    https://arxiv.org/abs/2410.01699, section 3. Where paper and release differ, the paper is the default: the release
    takes the argmax in `sample_horizon`, and cuts all rows of a batch to the shortest. Here each row keeps what it has
    accepted. This project's choices: a left neighbour that is itself an initial token has the distribution of the
    nearest token to its left that the model has judged; the residual is not put through the processors once more.

    Attributes:
        report: of the last call, see `DecodeReport`.
    """

    card = Card(
        slug="sjd", arxiv="2410.01699", year=2024, kind="decode", hosts=("hf-causal-lm",),
        title="Accelerating Auto-regressive Text-to-Image Generation with Training-free Speculative Jacobi Decoding",
        summary="Drafts a window of image tokens by Jacobi iteration and accepts them by speculative sampling.",
        identity={"window": 1},
        parameters={
            "window": "most tokens of a pass, W",
            "init": "tokens that no pass has drafted yet: 'random', 'repeat_horizon' or 'sample_horizon'",
            "accept": "'speculative', or 'jacobi': where draft and new sample are equal",
            "codes": "(first, end) ids of image codes, that random tokens are drawn from; None: the whole vocabulary",
            "row": "tokens of a row of the picture, with its end-of-line token; the horizontal schemes need it",
            "before": "generated tokens ahead of the picture's, decoded one by one; the first always is",
            "after": "tokens at the end, decoded one by one",
            "horizon": "'draw' from the left neighbour's distribution, or 'argmax' as released; for 'sample_horizon'",
            "rollback": "'row': each row of a batch keeps what it accepted; 'batch': as few as the row with the fewest",
        },
    )  # fmt: skip

    claims = (
        # The first token comes with the prompt.
        Claim("fewest passes for 256 tokens, W = 16", "value", 17, "formula", 0,
              value=lambda cls: _passes(False, init="repeat_horizon", row=1000)),
        Claim("passes for 256 tokens when no draft fits, W = 16", "value", 256, "formula", 0,
              value=lambda cls: _passes(True)),
        Claim("passes for 256 tokens, W = 1", "value", 256, "formula", 0,
              value=lambda cls: _passes(False, window=1)),
    )  # fmt: skip

    def __init__(
        self,
        *,
        window: int = 16,
        init: str = "random",
        accept: str = "speculative",
        codes: Sequence[int] | None = None,
        row: int | None = None,
        before: int = 0,
        after: int = 0,
        horizon: str = "draw",
        rollback: str = "row",
    ) -> None:
        self.window = whole("window", window, 1)
        self.init = choice("init", init, ("random", "repeat_horizon", "sample_horizon"))
        self.accept = choice("accept", accept, ("speculative", "jacobi"))
        self.codes = None
        if codes is not None:
            if isinstance(codes, str) or not isinstance(codes, Sequence) or len(codes) != 2:
                raise InputError(f"codes must be two ids (first, end), not {codes!r}")
            first = whole("codes", codes[0])
            self.codes = (first, whole("codes", codes[1], first + 1))
        self.row = None if row is None else whole("row", row, 1)
        self.before, self.after = whole("before", before), whole("after", after)
        self.horizon = choice("horizon", horizon, ("draw", "argmax"))
        self.rollback = choice("rollback", rollback, ("row", "batch"))
        if row is None and init != "random":
            raise InputError(f"init={init!r} needs row, the number of tokens in a row of the picture")
        self.report = DecodeReport()

    @classmethod
    def named(cls, name: str, **changes: Any) -> Sjd:
        """A decoder by its name in `CONFIGURATIONS`, with changes; InputError for an unknown name."""
        return cls(**configured(name, CONFIGURATIONS, changes))

    def __call__(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:  # fmt: skip
        """Called by `generate`; returns what it returns.

        Raises:
            InputError: see `Decoding`.
        """
        rows = Decoding(
            "sjd", model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
        )  # fmt: skip
        self.report = rows.report
        cached, start = rows.cached(model), rows.length.clone()
        end = rows.ids.shape[1] - self.after
        rows.report.calls += 1
        nothing = rows.ids.new_empty(len(rows.ids), 0)
        p = self._distributions(rows, cached.prefill(), nothing)
        rows.append(draw(p), torch.ones_like(start))
        # What the model last said of the newest token: initial tokens may go by it.
        drafts, q, newest = nothing, p[:, :0], p[:, 0]
        while bool(rows.live.any()):
            # (B,) how many tokens this pass may add to a row: one outside the picture.
            length = (end - rows.length).clamp(1, self.window)
            length = torch.where(rows.length - start < self.before, 1, length)
            length = torch.where(rows.live, length.minimum(rows.remaining), 1)
            width = int(length.max())
            places = rows.length.unsqueeze(1) + torch.arange(width - 1, device=start.device)
            columns = (places - start.unsqueeze(1) - self.before) % (self.row or 1)
            drafts, q = self.initialise(drafts, q, rows.last, newest, columns)
            logits = cached.score(torch.cat([rows.last, drafts], 1), torch.arange(width, device=start.device))
            rows.report.calls += 1
            p = self._distributions(rows, logits, drafts)
            samples = draw(p)
            accepted, tokens = self.judge(p, q, drafts, samples, length)
            count = accepted + 1
            if self.rollback == "batch":
                count = torch.where(rows.live, count, width).min().expand_as(count)
            count = rows.append(tokens, count)
            rows.report.emitted.append(count)
            # The newest token is taken in by the next pass.
            cached.keep(torch.arange(width, device=start.device) < count.unsqueeze(1))
            newest = p.take_along_dim((count - 1).clamp(min=0)[:, None, None], 1).squeeze(1)
            drafts, q = self._carried(samples, p, count)
        return rows.result(cached.cache)

    def _distributions(self, rows: Decoding, logits: Tensor, drafts: Tensor) -> Tensor:
        """(B, L, V) of the tokens after the newest and after each of its drafts (B, L - 1)."""
        width = drafts.shape[1]
        known = torch.ones(width + 1, width, dtype=torch.bool, device=drafts.device).tril(-1)
        scores = rows.scores(logits, torch.where(known, drafts.unsqueeze(1), -1))
        if rows.sample:
            return scores.softmax(-1)
        return F.one_hot(scores.argmax(-1), scores.shape[-1]).float()

    def judge(
        self, p: Tensor, q: Tensor, drafts: Tensor, samples: Tensor, length: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(B,) how many drafts are accepted, and (B, L) the tokens: those, one more, and what does not matter.

        Args:
            p, samples: (B, L, V) and (B, L) what the model says of the next tokens, and draws of it.
            q, drafts: (B, L - 1, V) and (B, L - 1) likewise, of an earlier pass.
            length: (B,) most tokens of each row.
        """
        if self.accept == "jacobi":
            accepted = leading(drafts == samples[:, :-1]).minimum(length - 1)
            return accepted, samples
        place = drafts.unsqueeze(2)
        chance = p[:, :-1].gather(2, place).squeeze(2) / q.gather(2, place).squeeze(2)
        accepted = leading(torch.rand_like(chance) < chance).minimum(length - 1)
        tokens = torch.cat([drafts, samples[:, -1:]], 1)
        rejected = accepted < length - 1
        at = accepted.unsqueeze(1)
        one = samples.gather(1, at)
        if bool(rejected.any()):
            index = at.unsqueeze(2)
            # A row without a rejection has no draft to look up at its last place.
            left = residual(p.take_along_dim(index, 1), q.take_along_dim(index.clamp(max=q.shape[1] - 1), 1))
            one = torch.where(rejected.unsqueeze(1), draw(left), one)
        return accepted, tokens.scatter(1, at, one)

    def initialise(
        self, drafts: Tensor, q: Tensor, last: Tensor, newest: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Drafts (B, L - 1), and q (B, L - 1, V) of them: the ones that are there, then initial tokens.

        Args:
            drafts, q: (B, D) and (B, D, V); -1 where a row has fewer.
            last, newest: (B, 1) and (B, V) the last token, and the distribution that it was drawn from.
            columns: (B, L - 1) where in its row of the picture each draft stands.
        """
        batch, width = columns.shape
        vocabulary = newest.shape[1]
        first, end = self.codes or (0, vocabulary)
        if end > vocabulary:
            raise InputError(f"codes {self.codes}: this model has {vocabulary} tokens")
        there = drafts.shape[1]
        drafts, q = F.pad(drafts, (0, max(0, width - there)), value=-1)[:, :width], q[:, :width]
        missing = drafts < 0
        if not bool(missing.any()):
            return drafts, q
        random = torch.randint(first, end, (batch, width), device=drafts.device)
        tokens, left, said = [], last[:, 0], newest
        for place in range(width):
            lacks = missing[:, place]
            fresh = random[:, place]
            if self.init == "repeat_horizon":
                fresh = torch.where(columns[:, place] == 0, fresh, left)
            elif self.init == "sample_horizon":
                by_left = draw(said) if self.horizon == "draw" else said.argmax(-1)
                fresh = torch.where(columns[:, place] == 0, fresh, by_left)
            left = torch.where(lacks, fresh, drafts[:, place])
            tokens.append(left)
            if place < q.shape[1]:
                said = torch.where(lacks.unsqueeze(1), said, q[:, place])
        drafts = torch.stack(tokens, 1)
        certain = F.one_hot(drafts, vocabulary).to(q)
        q = torch.where(missing.unsqueeze(2), certain, F.pad(q, (0, 0, 0, width - q.shape[1])))
        return drafts, q

    @staticmethod
    def _carried(samples: Tensor, p: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Samples and distributions behind the tokens that a row has gained: the next drafts, and their q."""
        width = samples.shape[1]
        index = count.unsqueeze(1) + torch.arange(width - int(count.min()), device=count.device)
        inside = index < width
        index = index.clamp(max=width - 1)
        return torch.where(inside, samples.gather(1, index), -1), p.take_along_dim(index.unsqueeze(2), 1)
