"""Pipelines of diffusers: any `DiffusionPipeline` with a `unet` or `transformer` and a `scheduler`.

Tried with Stable Diffusion 1.x, 3, PixArt, DiT, Lumina-Next and Lumina2. The forward of the denoiser and of its
attention layers is replaced on the instances, as accelerate does to off-load them; attention processors stay the
user's. Logits are linear in the query: they are scaled by a hook behind `norm_q`, or `to_q` where there is none.

Steps are the scheduler's own. Each `set_timesteps` begins a run, each `step` ends a step.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.hosts.denoiser_patches import DenoiserPatches, supported
from foveate.hosts.host import Host, by_name
from foveate.hosts.signals import NoSignals
from foveate.method import HostShape, InputError, Stage
from foveate.nn.calls import DenoiserAttention, DenoiserCall, SamplerStep, denoiser_of
from foveate.tokens import Tokens, predecessors

_CONDITIONAL_FIRST = ("DiTTransformer2DModel", "LuminaNextDiT2DModel")
"""Denoisers whose pipelines put the conditional half of a guided batch first."""
_SEPARATE = ("Lumina2Transformer2DModel",)
"""Denoisers whose pipelines guide by a second, unconditional call."""
_NOT_OF_PICTURE = ("context_refiner", "motion_modules")
"""Parts of the names of layers that attend within the text, or in time."""


class _Layer:
    """An attention layer of the denoiser, and what it is told while it runs.

    Attributes:
        halvings: how often the picture is halved where it stands.
        scale: on the queries, None for 1.
        seen: the projections of a run that is watched, by name.
        scaled: whether the hook on the queries has run.
    """

    def __init__(self, name: str, module: Any, halvings: int) -> None:
        self.name, self.module, self.halvings = name, module, halvings
        self.forward: Callable[..., Any] = module.forward
        self.scale: float | Tensor | None = None
        self.seen: dict[str, Tensor] | None = None
        self.scaled = False

    def projections(self) -> list[tuple[str, nn.Module]]:
        """What makes its queries and keys; of text that attends too, the queries."""
        found = []
        for name, norm, linear in (
            ("query", "norm_q", "to_q"), ("key", "norm_k", "to_k"), ("text", "norm_added_q", "add_q_proj")
        ):  # fmt: skip
            made = next((part for one in (norm, linear) if (part := getattr(self.module, one, None)) is not None), None)
            if made is not None:
                found.append((name, made))
        return found

    def passing(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        """A hook behind a projection."""
        scale = self.scale
        if name != "key" and scale is not None:
            if isinstance(scale, Tensor):
                scale = scale.to(output).view(-1, *[1] * (output.ndim - 1))
            output, self.scaled = output * scale, True
        if self.seen is not None:
            self.seen[name] = output
        return output


class DiffusionHost(Host):
    """A pipeline of diffusers. Stages: "denoiser.call", "denoiser.attention" and "sampler.step", see
    `foveate.nn.calls`, and where the denoiser allows it "denoiser.patches", see `DenoiserPatches`."""

    def __init__(self, pipeline: Any) -> None:
        denoiser: Any = denoiser_of(pipeline)
        self._scheduler: Any = getattr(pipeline, "scheduler", None)
        if denoiser is None or self._scheduler is None:
            raise InputError(
                f"{type(pipeline).__name__} is no pipeline that methods can be applied to: "
                "it has no unet or transformer, or no scheduler"
            )
        super().__init__(pipeline, denoiser)
        self._denoiser: Any = denoiser
        self._forward = denoiser.forward
        self._latents = next(iter(inspect.signature(denoiser.forward).parameters))
        patch = denoiser.config.get("patch_size") or 1
        self._patch: int = patch if isinstance(patch, int) else patch[-1]
        size = denoiser.config.get("sample_size") or (0, 0)
        self._trained: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        self._done = self._number = self._began = 0
        self._call: DenoiserCall | None = None
        self._order: dict[_Layer, int] = {}
        self._unscaled: tuple[Tensor, tuple[Any, ...], dict[str, Any]] | None = None
        self._replacement: Tensor | None = None
        self._prompts: tuple[str, ...] = ()
        self._patches: DenoiserPatches | None = None
        stages: tuple[str, ...] = ("denoiser.call", "denoiser.attention", "sampler.step")
        stages += ("denoiser.patches",) if supported(denoiser) else ()
        self.shape = HostShape(
            "diffusers", stages, vision_layers=0, feature_layer=-1, prefix=0,
            grid=self._grid(self._trained, 0), class_token=False, text_maps=any(map(_reads_text, denoiser.modules())),
        )  # fmt: skip

    def hook(self) -> None:
        if not self.plan:
            return
        self.replace(self._denoiser, "forward", functools.wraps(self._forward)(functools.partial(self._denoise)))
        self._wrap(self._scheduler, "set_timesteps", self._set_timesteps)
        self._wrap(self._scheduler, "scale_model_input", self._scale)
        self._wrap(self._scheduler, "step", self._step)
        self._wrap(self.model, "encode_prompt", self._encode)
        if "denoiser.patches" in self.plan:
            self._patches = DenoiserPatches(self, self._denoiser, self._choose)
        if "denoiser.attention" in self.plan:
            for name, module in self._denoiser.named_modules():
                if hasattr(module, "to_q") and hasattr(module, "set_processor"):
                    layer = _Layer(name, module, _halvings(self._denoiser, name))
                    self.replace(module, "forward", functools.partial(self._attend, layer))
                    for projected, part in layer.projections():
                        self.post(part, functools.partial(layer.passing, projected))

    def _wrap(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Calls of `owner.<name>`, if there is such, go to `function(own, …)`, under its signature."""
        if (own := getattr(owner, name, None)) is not None:
            self.replace(owner, name, functools.wraps(own)(functools.partial(function, own)))

    # -- the prompt

    def _encode(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        prompt = inspect.signature(own).bind(*args, **kwargs).arguments.get("prompt") or ()
        self._prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
        return own(*args, **kwargs)

    # -- the sampler

    def _set_timesteps(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._done = self._number = 0
        self._unscaled = self._replacement = None
        self.memory.clear()
        self.trace.clear()
        if self._patches is not None:
            self._patches.forget()
        return own(*args, **kwargs)

    def _scale(self, own: Callable[..., Any], sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._unscaled = sample, args, kwargs
        return own(sample, *args, **kwargs)

    def _step(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(own).bind(*args, **kwargs)
        if (sample := self._replacement) is not None:
            # DiT's pipeline lets the sampler step both halves of a guided batch.
            bound.arguments["sample"] = torch.cat([sample] * (len(bound.arguments["sample"]) // len(sample)))
        if "sampler.step" in self.plan:
            output: Tensor = bound.arguments["model_output"]
            step = SamplerStep(
                output, bound.arguments["sample"], self._began + self._done, len(self._scheduler.timesteps),
                self._began, self._patch, self._scheduler,
            )  # fmt: skip
            tokens = math.prod(self._grid(output.shape, 0))
            bound.arguments["model_output"] = self.call(self._at("sampler.step", step.step, tokens, output), step)
        self._unscaled = self._replacement = None
        self._done, self._number = self._done + 1, 0
        if self._patches is not None and self._began + self._done == len(self._scheduler.timesteps):
            self._patches.forget()
        return own(*bound.args, **bound.kwargs)

    def _begin(self, timestep: Any) -> int:
        """The step that a run which makes its first call at `timestep` starts with."""
        begin = getattr(self._scheduler, "begin_index", None)
        if begin is not None:
            return int(begin)
        known = self._scheduler.timesteps
        found = (known == torch.as_tensor(timestep).flatten()[0].to(known.device)).nonzero()
        return int(found[0]) if len(found) else 0

    # -- the denoiser

    def _denoise(self, *args: Any, **kwargs: Any) -> Any:
        if self.model.scheduler is not self._scheduler:
            raise InputError("the pipeline has got another scheduler since methods were applied; apply them again")
        arguments = by_name(self._forward, args, kwargs)
        returns_dict = arguments.pop("return_dict", True)
        latents = arguments.pop(self._latents)
        call = self._called(latents, arguments.pop("timestep", None), arguments)
        before, self._call = self._call, call
        if self._patches is not None:
            # Later calls of a step are of other rows: Stable Diffusion 3's with skipped layers.
            self._patches.watching = call.number == 0
        try:
            if "denoiser.call" in self.plan:
                tokens = math.prod(self._grid(latents.shape, 0))
                output: Tensor = self.call(self._at("denoiser.call", call.step, tokens, latents), call)
            else:
                output = call.function()
        finally:
            self._call = before
            self._number += 1
        if not returns_dict:
            return (output,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output)

    def _called(self, latents: Tensor, timestep: Any, arguments: dict[str, Any]) -> DenoiserCall:
        if self._done == 0:
            self._began = self._begin(timestep)
        guided, conditional = self._conditional(latents)
        rows = conditional if guided else slice(None)
        sample = latents if self._unscaled is None else self._unscaled[0]
        sample = sample[rows] if len(sample) == len(latents) else sample

        def function(latents: Tensor | None = None, **changes: Any) -> Tensor:
            given = {self._latents: call.latents if latents is None else latents, "timestep": timestep}
            self._order.clear()
            output: Tensor = self._forward(**{**given, **arguments, **changes, "return_dict": False})[0]
            return output

        def replace_sample(sample: Tensor) -> Tensor:
            if sample.shape != call.sample.shape:
                raise ValueError(f"a sample of shape {tuple(call.sample.shape)}, not {tuple(sample.shape)}")
            self._replacement = sample.detach()
            made = torch.cat([sample] * 2) if guided else sample
            if self._unscaled is not None:
                _, args, kwargs = self._unscaled
                made = self._own_scale(made, *args, **kwargs)
            # Behind the sample, some pipelines give the denoiser a mask and a picture.
            return torch.cat([made, latents[:, made.shape[1] :]], 1)

        # All pictures of a prompt stand together.
        prompts = tuple(one for one in self._prompts for _ in range(len(sample) // len(self._prompts)))
        call = DenoiserCall(
            latents, timestep, self._began + self._done, len(self._scheduler.timesteps), self._began, self._number,
            guided, conditional, sample, prompts, getattr(self.model, "tokenizer", None), arguments, self._denoiser,
            self._scheduler, function, replace_sample,
        )  # fmt: skip
        return call

    @property
    def _own_scale(self) -> Callable[..., Tensor]:
        """The scheduler's `scale_model_input` itself."""
        own: Callable[..., Tensor] = self._scheduler.scale_model_input.__wrapped__
        return own

    def _conditional(self, latents: Tensor) -> tuple[bool, slice]:
        """Whether the batch is two halves for guidance, and its conditional rows."""
        name = type(self._denoiser).__name__
        if name in _SEPARATE:
            return False, slice(0, 0) if self._number else slice(None)
        half = len(latents) // 2
        # Pipelines without the property guide wherever they double the batch.
        guiding = getattr(self.model, "do_classifier_free_guidance", True)
        if not guiding or len(latents) % 2 or not torch.equal(latents[:half], latents[half:]):
            return False, slice(None)
        return True, slice(0, half) if name in _CONDITIONAL_FIRST else slice(half, None)

    def _choose(self, x: Tensor) -> Tensor | None:
        """(B, A) the tokens of (B, N, D) that the method at "denoiser.patches" keeps, None for all."""
        call = self._call
        if call is None:
            return None
        if call.arguments.get("block_controlnet_hidden_states") is not None:
            raise InputError("a ControlNet adds to all tokens of a denoiser: none can be left out")
        tokens = Tokens.from_grid(x, self._grid(call.latents.shape, 0))
        kept = self.run(self._at("denoiser.patches", call.step, x.shape[1], x), tokens)
        return None if kept is tokens else predecessors(tokens, kept)

    # -- its attention

    def _attend(self, layer: _Layer, *args: Any, **kwargs: Any) -> Any:
        call = self._call
        if call is None:
            return layer.forward(*args, **kwargs)
        arguments = by_name(layer.forward, args, kwargs)
        index = self._order.setdefault(layer, len(self._order))

        def function(query_scale: float | Tensor | None = None) -> Any:
            layer.scale, layer.scaled = query_scale, False
            try:
                output = layer.forward(*args, **kwargs)
            finally:
                layer.scale = None
            if query_scale is not None and not layer.scaled:
                raise InputError(
                    f"{type(layer.module.processor).__name__} does not make queries with the layer's own projection, "
                    "which is where they are scaled: set another attention processor, or unfuse_qkv_projections()"
                )
            return output

        seen = self._seen(layer, arguments)

        def watch() -> tuple[Any, Tensor]:
            return self._watch(layer, seen["mask"], arguments, function)

        attention = DenoiserAttention(
            layer.name, index, layer.module, arguments=arguments, call=call, function=function, watch=watch, **seen
        )
        return self.call(self._at("denoiser.attention", index, attention.image, attention.hidden), attention)

    def _seen(self, layer: _Layer, arguments: dict[str, Any]) -> dict[str, Any]:
        """The facts of a `DenoiserAttention`. Takes out of `arguments` what is told by them."""
        assert self._call is not None
        module = layer.module
        hidden = arguments.pop("hidden_states")
        context = arguments.pop("encoder_hidden_states", None)
        mask = arguments.pop("attention_mask", None)
        if context is hidden:
            context = None
        queries = hidden.shape[1] if hidden.ndim == 3 else math.prod(hidden.shape[2:])
        # With IP-adapters, the text comes first in a tuple.
        text = 0 if context is None else (context[0] if isinstance(context, tuple) else context).shape[1]
        joint = context is not None and getattr(module, "add_k_proj", None) is not None
        cross = context is not None and (not joint or bool(getattr(module, "only_cross_attention", False)))
        grid = self._grid(self._call.latents.shape, layer.halvings)
        native = self._grid(self._trained, layer.halvings)
        own = queries if self._patches is None else self._patches.keys(queries)
        keys: int | Tensor = text if cross else own + text
        if not cross and mask is not None and mask.ndim == 2:
            keys = (mask != 0).sum(1)
        image: int | Tensor = math.prod(grid)
        if cross or any(part in layer.name for part in _NOT_OF_PICTURE):
            image = 0
        elif joint:
            image = own
        elif queries <= image:
            # Fewer, where tokens were merged or dropped; more, where the text is among them.
            image = keys
        return {
            "hidden": hidden, "context": context, "cross": cross, "mask": mask, "grid": grid, "image": image,
            "native": math.prod(native), "keys": keys,
        }  # fmt: skip

    def _watch(
        self, layer: _Layer, mask: Tensor | None, arguments: dict[str, Any], function: Callable[[], Any]
    ) -> tuple[Any, Tensor]:
        layer.seen = {}
        try:
            output = function()
        finally:
            seen, layer.seen = layer.seen, None
        rotated = any(value is not None for name, value in arguments.items() if "rotary" in name)
        if rotated or "text" in seen or not {"query", "key"} <= set(seen):
            raise InputError(
                f"{layer.name}: attention can be read of layers without rotated positions or queries of the text, "
                "and with projections that are not fused"
            )
        query, key = (_heads(seen[name], layer.module.heads) for name in ("query", "key"))
        logits = query.float() @ key.float().transpose(-1, -2) * layer.module.scale
        return output, (logits if mask is None else logits + mask.unsqueeze(1)).softmax(-1)

    def _at(self, name: str, layer: int, tokens: int | Tensor, batch: Tensor) -> Stage:
        if isinstance(tokens, int):
            tokens = torch.full((len(batch),), tokens, device=batch.device)
        return self.stage(name, layer, _Nothing(), tokens)

    def _grid(self, size: Any, halvings: int) -> tuple[int, int]:
        """(rows, columns) of tokens made of latents (…, h, w)."""
        rows, columns = (int(side) // self._patch for side in tuple(size)[-2:])
        for _ in range(halvings):
            # Convolutions with stride 2 round up.
            rows, columns = -(-rows // 2), -(-columns // 2)
        return rows, columns


class _Nothing(NoSignals):
    where = "a diffusion pipeline"


def _reads_text(module: Any) -> bool:
    """Whether a module is cross-attention to the prompt without rotated positions."""
    if not getattr(module, "is_cross_attention", False):
        return False
    return not any("rotary" in name for name in inspect.signature(module.processor.__call__).parameters)


def _heads(projected: Tensor, heads: int) -> Tensor:
    """(B, H, R, D) of (B, R, H D), or of itself."""
    return projected if projected.ndim == 4 else projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def _halvings(denoiser: Any, name: str) -> int:
    """How often the picture is halved where a layer stands; 0 outside of UNets."""
    place, _, rest = name.partition(".")
    if place not in ("down_blocks", "mid_block", "up_blocks"):
        return 0
    down = [getattr(block, "downsamplers", None) is not None for block in denoiser.down_blocks]
    up = [getattr(block, "upsamplers", None) is not None for block in denoiser.up_blocks]
    number = 0 if place == "mid_block" else int(rest.partition(".")[0])
    return sum(down[:number]) if place == "down_blocks" else sum(down) - sum(up[:number])
