"""LANTERN against its card: laws in closed form and by whole forwards, trees against drafting without a cache."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from causal import PAD, Forced, chi_square, law, llama, prompts
from foveate.method import InputError
from foveate.methods.decode import lantern
from foveate.methods.decode.lantern import CONFIGURATIONS, TREES, EagleDraft, Lantern, neighbour_table
from foveate.nn.draft_tree import Tree

NEGATIVE = torch.tensor([[7, 2], [9, 9], [4, 30]])
SMALL_TREES: list[dict[str, Any]] = [
    {"tree": "chain", "depth": 3},
    {"tree": [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0]]},
    {"nodes": 7, "depth": 3, "branches": 3},
]


def codebook(codes: int = 30, seed: int = 0) -> Tensor:
    return torch.randn(codes, 4, generator=torch.Generator().manual_seed(seed))


def eagle(width: int = 16) -> EagleDraft:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return EagleDraft(width=width, heads=2, mlp=8).eval()


# -- one decision


def lent_by_loop(p: list[float], x: int, table: list[list[int]], k: int, limit: float) -> tuple[float, list[int]]:
    """What x borrows, and of which tokens, neighbour by neighbour."""
    moved, of = 0.0, []
    for near in table[x][:k]:
        if moved + p[near] > limit:
            break
        moved, of = moved + p[near], [*of, near]
    return (moved, of) if moved > 0 else (0.0, [])


def left_by_loop(
    p: list[float], x: int, of: list[int], wider: list[int], q: list[float] | None, released: bool
) -> list[float]:
    """What is left of p behind a rejection; `wider` are k + 1 neighbours."""
    zeroed = {x, *((wider if of else []) if released else of)}
    if q is None:
        left = [0.0 if v in zeroed else p[v] for v in range(len(p))]
    elif released:
        left = [0.0 if v == x else max(0.0, p[v] - (0.0 if v in zeroed else q[v])) for v in range(len(p))]
    else:
        left = [max(0.0, (0.0 if v in zeroed else p[v]) - q[v]) for v in range(len(p))]
    if sum(left) == 0:
        left = [0.0 if v == x else p[v] for v in range(len(p))]
    return [value / sum(left) for value in left]


def test_neighbours_are_the_nearest_others() -> None:
    codes = codebook(40)
    table = neighbour_table(codes, 9)
    assert table.shape == (40, 9) and table.dtype == torch.uint16
    for code in range(40):
        distance = [float((codes[code].double() - other.double()).norm()) for other in codes]
        others = sorted((one for one in range(40) if one != code), key=lambda one: distance[one])
        assert table[code].tolist() == others[:9]
    assert neighbour_table(codes, 100).shape == (40, 39)
    assert neighbour_table(torch.empty(2**16 + 1, 4, device="meta"), 9).dtype == torch.int32
    # A code that is there twice is its twin's neighbour, not its own.
    assert neighbour_table(codes[[0, 0, 1]], 1)[:2].tolist() == [[1], [0]]


@pytest.mark.parametrize("ratio", [None, 1.0, 2.5])
@pytest.mark.parametrize(("k", "delta"), [(0, 0.3), (3, 0.0), (3, 0.05), (3, 0.4), (8, 0.1), (29, 1.0)])
def test_borrowed_probability(k: int, delta: float, ratio: float | None) -> None:
    """Of neighbours in order, by the loop; at most delta, or ratio times one's own; what is no code borrows nothing."""
    offset, words = 5, 38
    torch.manual_seed(0)
    p = torch.rand(64, words).pow(8) * (torch.rand(64, words) < 0.6)
    p = p / p.sum(1, keepdim=True)
    x = torch.randint(words, (64,))
    decoder = Lantern(draft=None, codebook=codebook(), offset=offset, k=k, delta=delta, ratio=ratio)
    moved, lent = decoder.relax(p, x)
    table = neighbour_table(codebook(), 29).long()
    for row in range(64):
        limit = delta if ratio is None else (ratio - 1) * float(p[row, x[row]])
        expected, of = 0.0, []
        if offset <= x[row] < offset + 30:
            near = [[int(one) + offset for one in table[x[row] - offset]]]
            expected, of = lent_by_loop(p[row].tolist(), 0, near, k, limit)
            assert [near[0][place] for place in lent[row].nonzero().squeeze(1)] == of if k else not of
        assert float(moved[row]) == pytest.approx(expected, abs=1e-6)
        assert 0 <= float(moved[row]) <= limit + 1e-6
        # In total variation p changes by just that.
        changed = p[row].clone()
        changed[of] = 0
        changed[x[row]] += moved[row]
        assert float((changed - p[row]).abs().sum()) / 2 == pytest.approx(float(moved[row]), abs=1e-6)


def test_more_is_borrowed_with_more_neighbours_and_greater_bounds() -> None:
    torch.manual_seed(0)
    p, x = torch.rand(200, 30).pow(4).softmax(-1), torch.randint(30, (200,))

    def moved(**settings: Any) -> Tensor:
        return Lantern(draft=None, codebook=codebook(), **settings).relax(p, x)[0]

    for name, values in (("k", (0, 1, 3, 10, 29)), ("delta", (0.0, 0.02, 0.1, 0.5)), ("ratio", (1.0, 1.5, 3.0, 9.0))):
        amounts = [moved(**{name: value}) for value in values]
        assert all(bool((b >= a - 1e-6).all()) for a, b in itertools.pairwise(amounts))
        assert bool((amounts[-1] > amounts[0]).any()) and not bool(amounts[0].any())


@pytest.mark.parametrize("residual", ["paper", "released"])
@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("delta", [0.0, 0.15])
def test_a_decision_with_siblings_has_the_law_of_the_rule(delta: float, drawn: bool, residual: str) -> None:
    """Three siblings of a root, 20,000 draws: sampled without replacement, or always the same ones."""
    words, k = 7, 2
    codes = codebook(words, 3)
    decoder = Lantern(draft=None, codebook=codes, k=k, delta=delta, residual=residual)
    table = [[int(one) for one in row] for row in neighbour_table(codes, words)]
    p, q = [0.3, 0.04, 0.2, 0.06, 0.1, 0.25, 0.05], [0.05, 0.3, 0.1, 0.25, 0.2, 0.05, 0.05]
    fixed = (1, 3, 0)

    def outcome(p: list[float], q: list[float], rank: int) -> list[float]:
        if rank == 3:
            return p
        total = [0.0] * words
        for x in range(words) if drawn else [fixed[rank]]:
            chance = q[x] if drawn else 1.0
            if chance == 0:
                continue
            moved, of = lent_by_loop(p, x, table, k, delta)
            passes = min(1.0, (p[x] + moved) / chance)
            total[x] += chance * passes
            if passes == 1:
                continue
            left = left_by_loop(p, x, of, table[x][: k + 1], q if drawn else None, residual == "released")
            rest = [0.0 if v == x else q[v] / (1 - q[x]) for v in range(words)]
            for v, after in enumerate(outcome(left, rest, rank + 1)):
                total[v] += chance * (1 - passes) * after
        return total

    torch.manual_seed(0)
    count = 20_000
    weights = torch.tensor([q]).expand(count, -1)
    children = weights.multinomial(3) if drawn else torch.tensor([fixed]).expand(count, -1)
    tokens = torch.cat([torch.zeros(count, 1).long(), children], 1)
    paths = torch.cat([torch.full((count, 1, 1), -1), children.unsqueeze(2)], 1)
    none = torch.full_like(tokens, -1)
    chances = torch.zeros(count, 4, words)
    chances[:, 0] = weights
    tree = Tree(tokens, torch.zeros_like(tokens), (tokens * 0 + torch.tensor([0, 1, 1, 1])), paths,
                chances if drawn else None, none)  # fmt: skip
    every = torch.tensor(p).expand(count, 4, -1)
    kept, node, token = decoder._sample(tree, every)
    accepted = node > 0
    assert torch.equal(kept.sum(1), 1 + accepted.long())
    said = torch.where(accepted, tokens.gather(1, node.unsqueeze(1)).squeeze(1), token)
    expected = torch.tensor(outcome(p, q, 0), dtype=torch.double)
    assert chi_square(said.unsqueeze(1), expected, words) > 1e-3
    # A token that was tried and rejected is not drawn after all; with delta 0, the law is p itself.
    assert not bool((token.unsqueeze(1) == children)[~accepted].any())
    if delta == 0:
        assert expected.tolist() == pytest.approx(p)


def test_greedy_acceptance_by_the_loop() -> None:
    """The longest path whose tokens are all the greatest of p with one entry changed; then the best token of p."""
    words, nodes, delta = 12, [(), (0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 1, 0)], 0.2
    codes = codebook(words)
    decoder = Lantern(draft=None, codebook=codes, k=4, delta=delta)
    table = [[int(one) for one in row] for row in neighbour_table(codes, words)]
    torch.manual_seed(0)
    rows = 300
    scores = 2 * torch.randn(rows, len(nodes), words)
    # Children among the best tokens, so that paths are accepted at all.
    parent = [nodes.index(node[:-1]) for node in nodes]
    order = scores.argsort(-1, descending=True)
    tokens = torch.stack([order[:, parent[i], node[-1] if node else 0] for i, node in enumerate(nodes)], 1)
    paths = torch.full((rows, len(nodes), 3), -1)
    for i, node in enumerate(nodes):
        for depth in range(len(node)):
            paths[:, i, depth] = tokens[:, nodes.index(node[: depth + 1])]
    expand = (rows, -1)
    tree = Tree(tokens, torch.tensor(parent).expand(*expand), torch.tensor([len(n) for n in nodes]).expand(*expand),
                paths, None, torch.full_like(tokens, -1))  # fmt: skip
    kept, node, token = decoder._greedy(tree, scores)
    lengths = set()
    for row in range(rows):
        good = {()}
        for i, name in enumerate(nodes[1:], 1):
            p = scores[row, parent[i]].softmax(-1).tolist()
            x = int(tokens[row, i])
            p[x] += lent_by_loop(p, x, table, 4, delta)[0]
            if name[:-1] in good and max(range(words), key=lambda v: p[v]) == x:
                good.add(name)
        longest = max(map(len, good))
        chosen = next(name for name in nodes if len(name) == longest and name in good)
        assert nodes[int(node[row])] == chosen
        assert {nodes[int(i)] for i in kept[row].nonzero()} == {chosen[:d] for d in range(longest + 1)}
        assert int(token[row]) == int(scores[row, int(node[row])].argmax())
        lengths.add(longest)
    assert len(lengths) > 1


# -- whole runs


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "guidance_scale": 2.0, "negative_prompt_ids": NEGATIVE, "eos_token_id": [6, 17, 23],
            "repetition_penalty": 1.3, "suppress_tokens": [1, 2],
        },
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [*SMALL_TREES, {"tree": "eagle"}, {}])
@pytest.mark.parametrize("draft", ["same", "other", "eagle"])
def test_greedy_decoding_without_neighbours_is_that_of_generate(
    draft: str, shape: dict[str, Any], settings: dict[str, Any]
) -> None:
    model, asked = llama(1), {**prompts(), "max_new_tokens": 24, "do_sample": False, **settings}
    drafts = {"same": model, "other": llama(1, sharpness=6), "eagle": eagle()}
    decoder = Lantern(draft=drafts[draft], **shape)
    assert torch.equal(model.generate(**asked, custom_generate=decoder), model.generate(**asked))
    if draft == "same" and shape.get("tree") in ("chain", "eagle"):
        # The draft is never wrong: every pass adds a path and one more token.
        assert all(int(one.max()) == decoder.depth + 1 for one in decoder.report.emitted[:1])


def test_models_whose_positions_end() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=25, n_embd=16, n_layer=2, n_head=2, bos_token_id=None,
                                       eos_token_id=None, pad_token_id=PAD)).eval()  # fmt: skip
    asked = {**prompts(), "max_new_tokens": 20, "do_sample": False}
    ours = model.generate(**asked, custom_generate=Lantern(draft=model, tree="eagle"))
    assert torch.equal(ours, model.generate(**asked))


@pytest.mark.parametrize(
    ("shape", "guided"),
    [(SMALL_TREES[0], False), (SMALL_TREES[1], False), (SMALL_TREES[2], False), (SMALL_TREES[1], True)],
)
def test_samples_without_neighbours_are_distributed_as_the_models(shape: dict[str, Any], guided: bool) -> None:
    """The joint law of three tokens, 20,000 draws, rows at different lengths; with delta 0, too."""
    model, draft = (llama(seed, words=4, layers=1, sharpness=12) for seed in (2, 3))
    prompt, other = torch.tensor([[1, 3]]), torch.tensor([[2]])
    settings: dict[str, Any] = {"guidance_scale": 1.8, "top_k": 3} if guided else {"top_k": 0}
    if guided:
        settings["negative_prompt_ids"] = other.expand(20_000, -1)
    torch.manual_seed(0)
    decoder = Lantern(draft=draft, codebook=None if guided else codebook(4), delta=0.0, **shape)
    ids = model.generate(prompt.expand(20_000, -1), max_new_tokens=3, do_sample=True, custom_generate=decoder,
                         **settings)  # fmt: skip
    expected = law(model, prompt, 3, top_k=3, scale=1.8, other=other) if guided else law(model, prompt, 3)
    assert chi_square(ids[:, 2:], expected, 4) > 1e-3
    assert len({int(count) for count in decoder.report.emitted[0]}) > 1


def test_samples_with_the_learned_draft_are_distributed_as_the_models() -> None:
    model, prompt = llama(2, words=4, layers=1, sharpness=12), torch.tensor([[1, 3]])
    torch.manual_seed(0)
    ids = model.generate(prompt.expand(20_000, -1), max_new_tokens=3, do_sample=True, top_k=0,
                         custom_generate=Lantern(draft=eagle(), tree="chain", depth=2))  # fmt: skip
    assert chi_square(ids[:, 2:], law(model, prompt, 3), 4) > 1e-3


def test_accepted_length_grows_with_delta_and_k() -> None:
    model, draft = llama(4, sharpness=9), llama(5, sharpness=9)

    def length(**settings: Any) -> float:
        torch.manual_seed(0)
        decoder = Lantern(draft=draft, codebook=codebook(40), tree="chain", **settings)
        model.generate(**prompts(1), num_return_sequences=60, max_new_tokens=20, do_sample=True, top_k=0,
                       custom_generate=decoder)  # fmt: skip
        return decoder.report.mean_emitted - 1

    by_delta = [length(delta=delta) for delta in (0.0, 0.02, 0.05)]
    by_k = [length(delta=0.4, k=k) for k in (0, 1, 4)]
    for lengths in (by_delta, by_k):
        assert all(b > a for a, b in itertools.pairwise(lengths)), lengths


def test_the_cache_holds_the_accepted_path_and_statistics_count_passes() -> None:
    model = llama(4, sharpness=3)
    calls: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(
            (kwargs["past_key_values"].get_seq_length(), kwargs["input_ids"].shape[1])
        ),
        with_kwargs=True,
    )
    decoder = Lantern(draft=llama(5, sharpness=3), codebook=codebook(40), delta=0.5, **SMALL_TREES[1])
    torch.manual_seed(0)
    output = model.generate(**prompts(1), max_new_tokens=24, do_sample=True, return_dict_in_generate=True,
                            custom_generate=decoder)  # fmt: skip
    assert decoder.report.calls == len(calls) == 1 + len(decoder.report.emitted)
    length = 5
    for (cached, width), emitted in zip(calls[1:], decoder.report.emitted):
        # Old length + accepted + 1, and eight tokens in: the last one and seven drafted.
        assert cached == length and width == 8
        length += int(emitted)
    assert output.sequences.shape == (1, 29)
    # The prompt, then for each pass the nodes that the draft feeds on: the last token, three levels but the last.
    assert decoder.report.draft_calls == 1 + 3 * len(decoder.report.emitted)


def test_forced_tokens_stand_in_their_places() -> None:
    model = llama(4, sharpness=2)
    for shape in SMALL_TREES:
        torch.manual_seed(0)
        ids = model.generate(**prompts(4), max_new_tokens=28, do_sample=True, logits_processor=[Forced(5, 7, 39)],
                             custom_generate=Lantern(draft=model, codebook=codebook(39), **shape))  # fmt: skip
        assert torch.equal(ids[:, 5:] == 39, (torch.arange(28) % 7 == 6).expand(4, -1))


# -- trees


def watch(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[list[list[int]], Tree]]:
    """The rows, without padding at their ends, and the tree of each pass."""
    seen: list[tuple[list[list[int]], Tree]] = []
    build = getattr(lantern, name)

    def wrapped(rows: Any, *args: Any, **kwargs: Any) -> Tree:
        tree = build(rows, *args, **kwargs)
        texts = [rows.ids[row, : rows.length[row]].tolist() if live else [] for row, live in enumerate(rows.live)]
        seen.append((texts, tree))
        return tree

    monkeypatch.setattr(lantern, name, wrapped)
    return seen


@torch.no_grad()
def log_p(model: Any, text: list[int], start: int) -> Tensor:
    """(V,) behind a text whose first `start` tokens are padding."""
    return model(torch.tensor([text[start:]])).logits[0, -1].log_softmax(-1)


def test_dynamic_trees_are_those_of_drafting_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    draft, asked = llama(5, sharpness=3), prompts()
    seen = watch(monkeypatch, "dynamic_tree")
    branches, depth, nodes = 3, 3, 8
    decoder = Lantern(draft=draft, codebook=codebook(40), delta=0.6, branches=branches, depth=depth, nodes=nodes)
    torch.manual_seed(0)
    llama(4, sharpness=3).generate(**asked, max_new_tokens=18, do_sample=True, custom_generate=decoder)
    assert len({len(text) for text in seen[2][0]}) > 1
    checked = 0
    for texts, tree in seen:
        for row, text in enumerate(texts):
            if not text:
                continue
            start = int((asked["attention_mask"][row] == 0).sum())
            pool: dict[tuple[int, ...], float] = {}
            frontier: dict[tuple[int, ...], float] = {(): 0.0}
            for _ in range(depth):
                born: dict[tuple[int, ...], float] = {}
                for path, joint in frontier.items():
                    values = log_p(draft, text + list(path), start)
                    for token in values.argsort(descending=True)[:branches].tolist():
                        born[(*path, token)] = joint + float(values[token])
                pool |= born
                frontier = dict(sorted(born.items(), key=lambda item: -item[1])[:branches])
            best = sorted(pool, key=lambda path: -pool[path])[:nodes]
            ours = [tuple(int(one) for one in path if one >= 0) for path in tree.paths[row]]
            assert ours[0] == () and set(ours[1:]) == set(best) and len(ours) == nodes + 1
            for index, path in enumerate(ours[1:], 1):
                assert int(tree.tokens[row, index]) == path[-1] and int(tree.depth[row, index]) == len(path)
                assert ours[int(tree.parent[row, index])] == path[:-1] and ours.index(path[:-1]) < index
            checked += 1
    assert checked > 10


def test_static_trees_of_greedy_rows_are_the_best_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the draft without a cache, rows at different lengths, behind leaves that the draft had not taken in."""
    draft, asked = llama(1, sharpness=7), prompts()
    seen = watch(monkeypatch, "static_tree")
    decoder = Lantern(draft=draft, **SMALL_TREES[1])
    llama(1).generate(**asked, max_new_tokens=24, do_sample=False, custom_generate=decoder)
    assert any(int(one.max()) == 4 for one in decoder.report.emitted)
    check_static(seen, asked, lambda text, start: log_p(draft, text, start))


def test_trees_of_the_learned_draft_are_those_of_whole_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of the text are the model's, those of drafted tokens the draft's own."""
    model, draft, asked = llama(1), eagle(), prompts()
    seen = watch(monkeypatch, "static_tree")
    model.generate(**asked, max_new_tokens=9, do_sample=False, custom_generate=Lantern(draft=draft, **SMALL_TREES[1]))

    @torch.no_grad()
    def foretold(text: list[int], start: int, decided: int) -> Tensor:
        ids = torch.tensor([text[start:]])
        decided -= start
        features = model(ids[:, : decided - 1], output_hidden_states=True).hidden_states[-1]
        words = model.get_input_embeddings()(ids)
        while features.shape[1] < ids.shape[1]:
            new = draft(words[:, 1 : features.shape[1] + 1], features)
            features = torch.cat([features, new[:, -1:]], 1)
        return model.lm_head(features[:, -1])[0].log_softmax(-1)

    check_static(seen, asked, None, foretold)


def check_static(seen: Any, asked: dict[str, Tensor], by_text: Any, by_features: Any = None) -> None:
    shape = sorted((tuple(node) for node in SMALL_TREES[1]["tree"]), key=lambda node: (len(node), node))
    checked = 0
    for texts, tree in seen:
        for row, text in enumerate(texts):
            if not text:
                continue
            start = int((asked["attention_mask"][row] == 0).sum())
            tokens: dict[tuple[int, ...], list[int]] = {(): []}
            for index, node in enumerate(shape, 1):
                before = text + tokens[node[:-1]]
                values = by_text(before, start) if by_text else by_features(before, start, len(text))
                token = int(values.argsort(descending=True)[node[-1]])
                tokens[node] = [*tokens[node[:-1]], token]
                assert int(tree.tokens[row, index]) == token
            checked += 1
    assert checked > 10


def test_named_trees() -> None:
    assert len(TREES["eagle"]) == 25 and max(map(len, TREES["eagle"])) == 5
    assert Lantern(draft=None, tree="chain", depth=2).shape == ((0,), (0, 0))
    assert Lantern(draft=None, tree="eagle").shape == TREES["eagle"]


# -- the learned draft


def test_loss_of_the_learned_draft() -> None:
    """Without noise, by the loop over positions that have a feature before them; the model gets no gradient."""
    model, draft, asked = llama(6, sharpness=2), eagle(), prompts(3, 6)
    total, parts = draft.loss(model, asked["input_ids"], asked["attention_mask"], noise=0.0)
    total.backward()
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in draft.parameters())
    model.zero_grad()
    regressions, entropies = [], []
    for row in range(3):
        ids = asked["input_ids"][row : row + 1, asked["attention_mask"][row].bool()]
        with torch.no_grad():
            features = model(ids, output_hidden_states=True).hidden_states[-1]
            words = model.get_input_embeddings()(ids)
            for t in range(1, ids.shape[1]):
                ours = draft(words[:, 1 : t + 1], features[:, :t])[0, -1]
                error = (ours - features[0, t]).abs()
                regressions.append(torch.where(error < 1, error**2 / 2, error - 0.5).mean())
                p = model.lm_head(features[0, t]).softmax(-1)
                entropies.append(-(p * model.lm_head(ours).log_softmax(-1)).sum())
    assert float(parts["feature"].detach()) == pytest.approx(float(torch.stack(regressions).mean()), rel=1e-4)
    assert float(parts["token"].detach()) == pytest.approx(float(torch.stack(entropies).mean()), rel=1e-4)
    assert float(total.detach()) == pytest.approx(float((parts["feature"] + 0.1 * parts["token"]).detach()), rel=1e-5)
    noisy, _ = draft.loss(model, asked["input_ids"], asked["attention_mask"])
    assert float(noisy.detach()) != float(total.detach())


def test_the_learned_draft_is_saved(tmp_path: Path) -> None:
    draft = eagle()
    draft.save_pretrained(tmp_path)
    again = EagleDraft.from_pretrained(tmp_path).eval()
    x = torch.randn(1, 4, 16)
    assert torch.equal(again(x, x), draft(x, x))
    assert [one.name for one in tmp_path.glob("*.safetensors")]


# -- input


def test_named_configurations() -> None:
    for name in CONFIGURATIONS:
        decoder = Lantern.named(name, draft=None, codebook=codebook())
        assert decoder.k == 1000 and decoder.delta == 0.1 and decoder.shape is None
    assert Lantern.named("anole-7b", draft=None).offset == 4
    with pytest.raises(InputError, match="anole-7b"):
        Lantern.named("anole", draft=None)


@pytest.mark.parametrize(
    ("settings", "asked", "message"),
    [
        ({"k": -1}, {}, "k must"),
        ({"delta": 1.5}, {}, "delta"),
        ({"ratio": 0.5}, {}, "ratio"),
        ({"tree": "bush"}, {}, "tree"),
        ({"tree": [[1]]}, {}, "earlier sibling"),
        ({"tree": [[0, 0]]}, {}, "every parent"),
        ({"tree": []}, {}, "tree must"),
        ({"tree": [0, 1]}, {}, "tree must"),
        ({"nodes": 0}, {}, "nodes"),
        ({"residual": "none"}, {}, "residual"),
        ({"codebook": torch.zeros(4)}, {}, "codebook"),
        ({"codebook": torch.zeros(39, 2), "offset": 2}, {}, "39 codes from token 2"),
        ({"draft": llama(words=41)}, {}, "40 tokens"),
        ({"draft": EagleDraft(width=8, heads=2, mlp=4)}, {}, "as wide as the model, 16"),
        ({}, {"num_beams": 2}, "num_beams"),
        ({}, {"use_cache": False}, "use_cache"),
    ],
)
def test_bad_input(settings: dict[str, Any], asked: dict[str, Any], message: str) -> None:
    model = llama()
    with pytest.raises(InputError, match=message):
        model.generate(**prompts(), max_new_tokens=4, custom_generate=Lantern(**{"draft": model, **settings}), **asked)
    with pytest.raises(InputError, match="width"):
        EagleDraft(width=10, heads=4)
