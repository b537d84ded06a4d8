"""The stages inside layers and after the prefill, against hooks and loops written out here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import foveate
from foveate.method import Card, Method, Stage, at
from foveate.nn.calls import AttentionCall, MlpCall
from foveate.tokens import Tokens
from tiny import IMAGE, prompt, vision, vlm


def acting(stage: str, act: Callable[[Any, Stage], Any], **attributes: Any) -> Method:
    """A method with one handler."""

    class Acting(Method):
        card = Card(slug="acting", title="for tests", arxiv="", kind="reduce", hosts=("hf-vlm",), summary="for tests")

        @at(stage)
        def handle(self, given: Any, at: Stage) -> Any:
            return act(given, at)

    for name, value in attributes.items():
        setattr(Acting, name, value)
    return Acting()


HOSTS = pytest.mark.parametrize("name", ["clip-llama", "siglip-qwen2", "next"])


@HOSTS
@pytest.mark.parametrize("stage", ["llm.attention", "llm.mlp"])
@torch.no_grad()
def test_letting_a_call_through_changes_nothing(name: str, stage: str) -> None:
    host = vlm(name)
    given = prompt(host, [(2, 6), (1, 3)])
    dense = host(**given).logits
    words = host.generate(**given, max_new_tokens=4, do_sample=False)

    def through(call: AttentionCall | MlpCall, at: Stage) -> Tensor:
        return call.run() if isinstance(call, AttentionCall) else call.function(call.hidden)

    with foveate.apply(host, acting(stage, through)):
        assert torch.equal(host(**given).logits, dense)
        assert torch.equal(host.generate(**given, max_new_tokens=4, do_sample=False), words)
    assert torch.equal(host(**given).logits, dense)


@HOSTS
@torch.no_grad()
def test_attention_without_visual_values_equals_zeroed_value_projections(name: str) -> None:
    host = vlm(name)
    given = prompt(host, [(2, 6), (1, 3)])
    visual = given["input_ids"] == IMAGE

    def blind(call: AttentionCall, at: Stage) -> Tensor:
        return call.run(value=call.value.masked_fill(call.is_visual[:, None, :, None], 0.0))

    with foveate.apply(host, acting("llm.attention", blind)):
        ours = host(**given).logits
        cached = host.generate(**given, max_new_tokens=5, do_sample=False)
        uncached = host.generate(**given, max_new_tokens=5, do_sample=False, use_cache=False)

    def zero(module: Any, args: Any, output: Tensor) -> Tensor | None:
        # Only prefills have pictures; their rows stay zero in the cache.
        if output.shape[1] != visual.shape[1]:
            return None
        return output.masked_fill(visual.unsqueeze(-1), 0.0)

    handles = [layer.self_attn.v_proj.register_forward_hook(zero) for layer in host.model.language_model.layers]
    torch.testing.assert_close(ours, host(**given).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(cached, host.generate(**given, max_new_tokens=5, do_sample=False))
    assert torch.equal(cached, uncached)
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_weights_are_those_of_eager_attention() -> None:
    host = vlm("clip-qwen2")
    given = prompt(host, [(2, 6), (1, 3)])
    seen: list[Tensor] = []

    def look(call: AttentionCall, at: Stage) -> Tensor:
        if at.layer == 1:
            seen.append(call.weights(torch.tensor([3, -1 + call.query.shape[2]])))
        return call.run()

    with foveate.apply(host, acting("llm.attention", look)):
        host(**given)
    host.set_attn_implementation("eager")
    maps = host(**given, output_attentions=True).attentions[1]
    real = given["attention_mask"][:, -1].bool()
    torch.testing.assert_close(seen[0][real][:, :, 1], maps[real][:, :, -1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[0][0, :, 0], maps[0, :, 3], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_mlp_without_visual_tokens_equals_a_hook() -> None:
    host = vlm("clip-llama")
    given = prompt(host, [(2, 6), (1, 3)])
    visual = given["input_ids"] == IMAGE

    def without(call: MlpCall, at: Stage) -> Tensor:
        assert torch.equal(call.is_visual, visual)
        return call.function(call.hidden).masked_fill(call.is_visual.unsqueeze(-1), 0.0)

    with foveate.apply(host, acting("llm.mlp", without)):
        ours = host(**given).logits
    for layer in host.model.language_model.layers:
        layer.mlp.register_forward_hook(lambda m, a, output: output.masked_fill(visual.unsqueeze(-1), 0.0))
    torch.testing.assert_close(ours, host(**given).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("renumbers", [False, True])
@torch.no_grad()
def test_dropping_from_the_cache_equals_masking_it(renumbers: bool) -> None:
    """All layers drop the same visual tokens after the prefill: as if decoding could not see them."""
    host = vlm("clip-llama")
    given = prompt(host, [(2, 6), (3, 6)])
    length = given["input_ids"].shape[1]
    first = (given["input_ids"] == IMAGE).long().argmax(1)
    gone = [0, 3, 5, 10]

    def drop(tokens: Tokens, at: Stage) -> Tokens:
        return tokens.keep(torch.tensor([j for j in range(tokens.x.shape[1]) if j not in gone]).expand(2, -1))

    new = torch.tensor([[7], [9]])
    with foveate.apply(host, acting("llm.decode", drop, renumbers=renumbers)) as applied:
        out = host(**given, use_cache=True)
        held = [layer.keys.clone() for layer in out.past_key_values.layers]
        mask = torch.cat([given["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        ours = host(input_ids=new, attention_mask=mask, past_key_values=out.past_key_values).logits
    dense = host(**given, use_cache=True)
    assert torch.equal(out.logits, dense.logits), "the prefill itself is not touched"
    assert [record.stage for record in applied.trace] == ["llm.input", *(f"llm.decode[{k}]" for k in range(4))]
    stay = [[i for i in range(length) if i not in [int(first[b]) + j for j in gone]] for b in range(2)]
    for layer, keys in zip(dense.past_key_values.layers, held):
        assert keys.shape[2] == length - len(gone)
        for b in range(2):
            padding = int((given["attention_mask"][b] == 0).sum())
            assert torch.equal(keys[b, :, padding:], layer.keys[b][:, stay[b]][:, padding:])
    for b in range(2):
        mask[b, [int(first[b]) + j for j in gone]] = 0
    # A plain forward numbers the padding too; what is numbered anew begins at the first real token.
    count = given["attention_mask"].sum(1, keepdim=True)
    position = count - len(gone) if renumbers else torch.full_like(count, length)
    wanted = host(
        input_ids=new, attention_mask=mask, past_key_values=dense.past_key_values, position_ids=position
    ).logits
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "clip", "siglip", "dinov2", "dinov2-reg", "timm", "timm-reg-avg"])
@torch.no_grad()
def test_merging_between_attention_and_mlp(name: str) -> None:
    """In layer 1: pairs of neighbours are averaged after the attention and the MLP runs on the averages."""
    model = vision(name)
    pictures = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def pairs(tokens: Tokens, at: Stage) -> Tokens:
        return tokens if at.layer != 1 else tokens.merge(torch.arange(16).div(2, rounding_mode="floor").expand(2, -1))

    with foveate.apply(model, acting("vision.mlp", pairs)) as applied:
        ours = model(pictures)
        prefix = applied.host.shape.prefix
        layers = list(applied.host.encoder.blocks)
    assert [(record.stage, record.tokens_out) for record in applied.trace] == [("vision.mlp[1]", (8, 8))]

    def merged(hidden: Tensor) -> Tensor:
        front, patches = hidden[:, :prefix], hidden[:, prefix:]
        return torch.cat([front, patches.unflatten(1, (8, 2)).mean(2)], 1)

    def by_hand(module: Any, args: Any, output: Tensor) -> Tensor:
        hidden = args[0]
        if name.startswith("timm"):
            hidden = merged(hidden + module.attn(module.norm1(hidden)))
            return hidden + module.mlp(module.norm2(hidden))
        if name.startswith("dinov2"):
            hidden = merged(hidden + module.layer_scale1(module.attention(module.norm1(hidden))[0]))
            return hidden + module.layer_scale2(module.mlp(module.norm2(hidden)))
        if name == "vit":
            hidden = merged(hidden + module.attention(module.layernorm_before(hidden))[0])
            return hidden + module.mlp(module.layernorm_after(hidden))
        hidden = merged(hidden + module.self_attn(module.layer_norm1(hidden), attention_mask=None)[0])
        return hidden + module.mlp(module.layer_norm2(hidden))

    handle = layers[1].register_forward_hook(by_hand)
    wanted = model(pictures)
    handle.remove()
    for one, other in ((ours, wanted),) if isinstance(ours, Tensor) else ((ours[0], wanted[0]),):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_proportional_attention_adds_the_logarithm_of_the_size() -> None:
    model = vision("vit")
    pictures = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    into = torch.tensor([[0, 0, 0, 1, 1, *range(2, 13)]])

    def merge(tokens: Tokens, at: Stage) -> Tokens:
        return tokens.merge(into) if at.layer == 1 else tokens

    seen: list[Tensor] = []
    layer = model.layers[2]
    with foveate.apply(model, acting("vision.layer", merge, proportional=True)):
        inner = [layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))]
        inner.append(layer.attention.register_forward_hook(lambda m, args, output: seen.append(output[0])))
        model(pictures)
    for handle in inner:
        handle.remove()
    hidden, output = seen
    attention = layer.attention
    normed = layer.layernorm_before(hidden)
    parts = dict(attention.named_modules())

    def heads(kind: str) -> Tensor:
        module = next(m for n, m in parts.items() if n.split(".")[-1] in (kind, f"{kind}_proj"))
        return module(normed).unflatten(-1, (4, 8)).transpose(1, 2)

    size = torch.tensor([1.0, 3, 2, *[1] * 11])
    logits = heads("q" if any(n.endswith("q_proj") for n in parts) else "query") @ heads(
        "k" if any(n.endswith("k_proj") for n in parts) else "key"
    ).transpose(-1, -2)
    weights = (logits / 8**0.5 + size.log()).softmax(-1)
    mixed = (weights @ heads("v" if any(n.endswith("v_proj") for n in parts) else "value")).transpose(1, 2).flatten(2)
    final = next(m for n, m in parts.items() if n.split(".")[-1] in ("o_proj", "out_proj", "dense"))
    torch.testing.assert_close(F.linear(mixed, final.weight, final.bias), output, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_marks_reach_the_language_model_by_patch() -> None:
    host = vlm("next")
    given = prompt(host, [(2, 6), (1, 2, 3)], sizes=[(24, 12), (16, 30), (24, 24)])

    class Marking(Method):
        card = Card(slug="marking", title="for tests", arxiv="", kind="reduce", hosts=("hf-vlm",), summary="for tests")
        seen: Tensor | None = None

        @at("vision.output")
        def drop(self, tokens: Tokens, at: Stage) -> Tokens:
            # Every patch is marked with its row of the batch and its number; every second one stays.
            rows, patches = tokens.source.shape
            at.marks["number"] = torch.arange(rows * patches).reshape(rows, patches) + 1
            return tokens.keep(torch.arange(0, patches, 2).expand(rows, -1))

        @at("llm.layer")
        def look(self, tokens: Tokens, at: Stage) -> Tokens:
            if at.layer == 2:
                self.seen, self.source, self.position = at.marks["number"], tokens.source, tokens.position
            return tokens

    method = Marking()
    with foveate.apply(host, method) as applied:
        host(**given)
        crops = applied.host.encoder.pictures
    assert method.seen is not None
    # (24, 12) has 1 + 2 crops of 16 patches, (16, 30) 1 + 2 and (24, 24) 1 + 4.
    assert [(one.rows.start, one.rows.stop, one.grid) for one in crops] == [
        (0, 3, (2, 1)), (3, 6, (1, 2)), (6, 11, (2, 2)),
    ]  # fmt: skip
    assert method.seen[0, :48].tolist() == [float(n) for n in range(1, 49)]
    assert method.seen[1, :128].tolist() == [float(n) for n in range(49, 177)]
    assert not method.seen[0, 48:].any(), "tokens that are no patch are not marked"
    carried = (method.source[0] >= 0).nonzero().flatten().tolist()
    assert all(patch % 2 == 0 for patch in carried if patch < 48)


@torch.no_grad()
def test_memory_rides_on_the_cache() -> None:
    host = vlm("clip-llama")
    one, two = prompt(host, [(2, 6)], seed=0), prompt(host, [(3, 4)], seed=1)
    seen: list[Any] = []

    def remember(call: AttentionCall, at: Stage) -> Tensor:
        if call.query.shape[2] > 1:
            at.memory["length"] = call.query.shape[2]
        elif at.layer == 0:
            seen.append(at.memory["length"])
        return call.run()

    with foveate.apply(host, acting("llm.attention", remember)):
        first = host(**one, use_cache=True).past_key_values
        second = host(**two, use_cache=True).past_key_values
        for cache in (first, second, first):
            host(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert seen == [one["input_ids"].shape[1], two["input_ids"].shape[1], one["input_ids"].shape[1]]
