"""Vision encoders: ViT, CLIP, SigLIP, DINOv2, InternViT, VideoMAE of transformers; timm's VisionTransformer, DeiT.

`Encoder` hooks one encoder; `VisionHost` is a model that is just that, and `hosts/llava.py` uses the same class for
the vision tower. The sequence in an encoder is [prefix | patches]: class and register tokens are never handed to a
method and never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from foveate.hosts.host import Host, named, split_read
from foveate.hosts.signals import NoSignals
from foveate.hosts.taps import Tap, Taps, tap_timm, tap_transformers
from foveate.method import Crops, HostShape, InputError, Method
from foveate.nn.attention import Attention
from foveate.tokens import Tokens, predecessors, take


@dataclass(frozen=True)
class _Anatomy:
    """Where the parts of an encoder are: dotted paths inside it."""

    layers: str
    attention: str
    norm: str
    """The norm before the MLP."""
    branch: str
    """The module whose output is added to the residual stream after the MLP."""
    final: str
    """The module whose output is the encoder's last hidden state."""
    pool: str = ""
    """The attention that pools the tokens, if there is one (torch's MultiheadAttention, timm's AttentionPoolLatent)."""
    scale: str = ""
    """The layer's parameter that scales what `branch` puts out, where that is not a module."""
    adds: bool = False
    """Whether `branch` is handed the residual stream, as its second argument, and adds to it itself."""
    masks: bool = True
    """Whether `attention` takes a mask."""


_ANATOMY = {
    "ViTModel": _Anatomy("layers", "attention", "layernorm_after", "mlp", "layernorm"),
    "CLIPVisionModel": _Anatomy("encoder.layers", "self_attn", "layer_norm2", "mlp", "encoder.layers.-1"),
    "SiglipVisionModel": _Anatomy(
        "encoder.layers", "self_attn", "layer_norm2", "mlp", "post_layernorm", "head.attention"
    ),
    "Dinov2Model": _Anatomy("encoder.layer", "attention", "norm2", "layer_scale2", "layernorm"),
    "Dinov2WithRegistersModel": _Anatomy("encoder.layer", "attention", "norm2", "layer_scale2", "layernorm"),
    "InternVLVisionModel": _Anatomy(
        "encoder.layer", "attention", "layernorm_after", "dropout", "layernorm", scale="lambda_2"
    ),
    "VideoMAEModel": _Anatomy(
        "encoder.layer", "attention.attention", "layernorm_after", "output", "layernorm", adds=True, masks=False
    ),
    "VisionTransformer": _Anatomy("blocks", "attn", "norm2", "drop_path2", "norm", "attn_pool"),
    "VisionTransformerDistilled": _Anatomy("blocks", "attn", "norm2", "drop_path2", "norm", "attn_pool"),
}
_NO_CLASS_TOKEN = ("SiglipVisionModel", "VideoMAEModel")
_CLIPS = ("VideoMAEModel",)
"""They see clips (B, frames, 3, H, W), of the configured size only: their position embeddings are a fixed table."""
_RESIZED_UNASKED = ("Dinov2Model", "Dinov2WithRegistersModel", "InternVLVisionModel")
"""They interpolate their position embeddings for any picture; the others have an argument for it."""


class Encoder:
    """One vision encoder under a host's control.

    Attributes:
        layers: number of layers.
        prefix: class and register tokens before the patches.
        class_token: whether the first of them is a class token.
        native: (rows, columns) of patches at the configured resolution.
        joined: side, in patches, of the cells that the host joins them to behind the encoder.
        source_grid, grid: those of the picture that came in, and of what is left of it after "vision.pixels".
        slots: time slots of a clip, each with such a grid of patches; 1 for pictures.
        pictures: which rows belong together, None where each row is a picture; the host sets it before a forward.
    """

    def __init__(self, host: Host, tower: Any) -> None:
        kind = _kind(tower)
        assert kind is not None
        self.host, self.tower = host, tower
        self.timm = not hasattr(tower, "config")
        anatomy = _ANATOMY[kind]
        self.blocks: Any = tower.get_submodule(anatomy.layers)
        self.attentions = [block.get_submodule(anatomy.attention) for block in self.blocks]
        # Without a norm of its own (VideoMAE under a head that averages) the last layer's output is the encoder's.
        final = None if anatomy.final.endswith(".-1") else _submodule(tower, anatomy.final)
        self.final: nn.Module = self.blocks[-1] if final is None else final
        self.pool = _submodule(tower, anatomy.pool)
        self.layers = len(self.blocks)
        if self.timm:
            self.prefix = tower.num_prefix_tokens
            self.class_token = tower.cls_token is not None
            self.patch = _pair(tower.patch_embed.patch_size)
            self.native = tower.patch_embed.grid_size
        else:
            config = tower.config
            self.class_token = kind not in _NO_CLASS_TOKEN
            self.prefix = 1 + getattr(config, "num_register_tokens", 0) if self.class_token else 0
            self.patch = _pair(config.patch_size)
            height, width = _pair(config.image_size)
            self.native = (height // self.patch[0], width // self.patch[1])
        self.video = kind in _CLIPS
        self.slots = tower.config.num_frames // tower.config.tubelet_size if self.video else 1
        self.joined = 1
        self.grid: tuple[int, int] = self.native
        self.taps = Taps("vision")
        self.pictures: tuple[Crops, ...] | None = None
        # (l, tokens) when they entered layer l, (l + 0.5, tokens) when they left its attention.
        self._steps: list[tuple[float, Tokens]] = []
        self._anatomy = anatomy
        # Between a layer's norm and its end: what it ran its MLP on, and the MLP's output.
        self._merged: Tensor | None = None
        self._branch: Tensor | None = None
        self.source_grid: tuple[int, int] = self.native
        self._resized: Method | None = None

    @property
    def resizable(self) -> bool:
        """Whether pictures of another resolution can go in (position embeddings are interpolated)."""
        return bool(getattr(self.tower, "dynamic_img_size", False)) if self.timm else not self.video

    @property
    def stages(self) -> tuple[str, ...]:
        pixels = ("vision.pixels",) if self.resizable else ()
        return (*pixels, "vision.patches", "vision.layer", "vision.mlp", "vision.output")

    def hook(self, reads: set[int]) -> None:
        """Registers what the host's plan needs; `reads` are the layers whose attention is asked for.

        Raises InputError for a layer that there is none of.
        """
        if not reads <= set(range(self.layers)):
            raise InputError(f"a method reads the attention of encoder layer {max(reads)} of {self.layers}, from 0 on")
        plan, host = self.host.plan, self.host
        self.taps.forgets = host.forgets("vision")
        host.pre(self.tower, self._begin)
        before, within = (host.acting(stage, self.layers) for stage in ("vision.layer", "vision.mlp"))
        for index, block in enumerate(self.blocks):
            if index == 0 or index in before:
                host.pre(block, self._layer_hook(index, index in before))
        changed = {0} if "vision.patches" in plan else {*before, *(layer + 1 for layer in within)}
        for index, attention in enumerate(self.attentions):
            # From where tokens may be hidden, or stand for several patches.
            masked = bool(changed) and index >= min(changed)
            if not self._anatomy.masks and (masked or index in reads):
                self.taps[index] = self._tap_masked(index, index in reads)
            elif index in reads:
                self.taps[index] = (tap_timm if self.timm else tap_transformers)(host, attention)
            if self._anatomy.masks and masked:
                host.pre(attention, self._mask_hook(index))
        for index, block in enumerate(self.blocks):
            if index in within:
                branch = block.get_submodule(self._anatomy.branch)
                host.pre(block.get_submodule(self._anatomy.norm), self._before_mlp(index))
                if self._anatomy.adds:
                    host.pre(branch, self._add_to_merged)
                else:
                    host.post(branch, self._after_mlp)
                    host.post(block, self._after_block)
        if self.pool is not None:
            host.pre(self.pool, self._mask_pool)

    def during(self, layer: float) -> Tokens:
        """The tokens in the attention of a layer, without features: x is (B, N, 0)."""
        return [tokens for step, tokens in self._steps if step <= layer][-1]

    def after(self, layer: int) -> Tokens:
        """The tokens at the output of a layer, without features: x is (B, N, 0)."""
        return self.during(layer + 0.5)

    def settle(self, tokens: Tokens) -> None:
        """Notes what the tokens became at the encoder's output."""
        self._note(self.layers, tokens)

    @property
    def entered(self) -> Tensor:
        """(B,) long: tokens that entered the first layer."""
        return self._steps[0][1].count

    def _note(self, step: float, tokens: Tokens) -> None:
        # Without features: they would keep activations and their graph alive until the next forward.
        self._steps.append((step, tokens.with_x(tokens.x.detach()[..., :0])))

    def clear(self) -> None:
        """Lets go of the recorded queries and keys."""
        self.taps.let_go()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        arguments = {"x": args[0], **kwargs} if self.timm else named(module, args, kwargs)
        key = "x" if self.timm else "pixel_values"
        pixels = arguments[key]
        if arguments.get("bool_masked_pos") is not None:
            raise InputError("methods choose among all patches of a clip: leave out bool_masked_pos")
        self._steps = []
        self._resized = self._merged = self._branch = None
        self.host.marks = {}
        self.source_grid = self.grid = self.grid_of(pixels)
        if "vision.pixels" not in self.host.plan:
            return None
        entered = torch.full((pixels.shape[0],), self.grid[0] * self.grid[1], device=pixels.device)
        method = self.host.plan["vision.pixels"]
        changed = self._handle_pixels(pixels, entered)
        if changed is pixels:
            return None
        self._resized = method
        self.grid = self.grid_of(changed)
        arguments[key] = changed
        if self.timm:
            return (arguments.pop("x"),), arguments
        if _kind(module) not in _RESIZED_UNASKED:
            arguments["interpolate_pos_encoding"] = True
        return (), arguments

    def _handle_pixels(self, pixels: Tensor, entered: Tensor) -> Tensor:
        at = self.host.stage("vision.pixels", -1, VisionSignals(self, None), entered)
        result: Tensor = self.host.call(at, pixels)
        return result

    def grid_of(self, pixels: Tensor) -> tuple[int, int]:
        """(rows, columns) of patches of pictures (…, H, W)."""
        return pixels.shape[-2] // self.patch[0], pixels.shape[-1] // self.patch[1]

    def _layer_hook(self, index: int, acts: bool) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            plan = self.host.plan
            prefix, patches = hidden[:, : self.prefix], hidden[:, self.prefix :]
            if index == 0:
                if self.video:
                    tokens = Tokens.from_grid(patches, (self.slots, *self.grid))
                else:
                    tokens = over(patches, self.grid, self.source_grid)
                self._note(0, tokens)
                if self._resized is not None:
                    rows, columns = self.source_grid
                    whole = Tokens.from_grid(patches.new_zeros(len(patches), rows * columns, 0), (rows, columns))
                    self.host.record("vision.pixels", self._resized.card.slug, whole, tokens)
            else:
                tokens = self.during(index).with_x(patches)
            result = tokens
            if index == 0 and "vision.patches" in plan:
                result = self._run("vision.patches", -1, result)
            if acts:
                result = self._run("vision.layer", index, result)
            if result is tokens:
                return None
            self._note(index, result)
            hidden = _joined(prefix, result.x)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def _run(self, stage: str, layer: int, tokens: Tokens) -> Tokens:
        at = self.host.stage(stage, layer, VisionSignals(self, tokens), self.entered)
        return self.host.run(at, tokens)

    # A layer is x + mlp(norm(x)) in one piece of the model's code, so that the stage between attention and MLP has to
    # be had from outside: the MLP runs on fewer tokens, its output is withheld from the residual sum, which would not
    # fit, and the layer's output becomes the sum of what it should have been.

    def _before_mlp(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            tokens = self.during(index).with_x(hidden[:, self.prefix :])
            result = self._run("vision.mlp", index, tokens)
            if result is tokens:
                return None
            self._note(index + 0.5, result)
            self._merged = _joined(hidden[:, : self.prefix], result.x)
            self._length = hidden.shape[1]
            return ((self._merged, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": self._merged})

        return hook

    def _add_to_merged(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._merged is None:
            return None
        merged, self._merged = self._merged, None
        return (args[0], merged), kwargs

    def _after_mlp(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        if self._merged is None:
            return None
        self._branch = output
        return output.new_zeros(1, 1, 1).expand(output.shape[0], self._length, output.shape[2])

    def _after_block(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._merged is None:
            return None
        assert self._branch is not None
        scaled = getattr(module, self._anatomy.scale) * self._branch if self._anatomy.scale else self._branch
        hidden = self._merged + scaled
        self._merged = self._branch = None
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _tap_masked(self, index: int, read: bool) -> Tap:
        """A tap that also hands the layer's mask to the attention function; the layer itself has no way to."""
        mask: Tensor | None = None

        def prepare(module: Any, args: Any, kwargs: Any) -> None:
            nonlocal mask
            mask = self._mask(index, args[0] if args else kwargs["hidden_states"])

        def around(query: Tensor, key: Tensor, value: Tensor, _: Any, scaling: float, function: Any) -> Tensor:
            if not read:
                tap.clear()
            output: Tensor = function(query, key, value, mask)
            return output

        # Before the tap's own hook: what a mask looks like depends on the model's attention implementation.
        self.host.pre(self.attentions[index], prepare)
        tap = tap_transformers(self.host, self.attentions[index], around)
        return tap

    def _mask(self, index: int, hidden: Tensor) -> Tensor | None:
        """What a layer's attention adds or hides, in the form that it takes; None for nothing."""
        valid, weight = self.valid(index), self._log_size(index)
        if weight is not None:
            weight = weight.to(hidden.dtype)
            if valid is not None:
                weight = weight.masked_fill(~valid, torch.finfo(hidden.dtype).min)
            return weight[:, None, None, :]
        if valid is None:
            return None
        if self.timm:
            return valid[:, None, None, :]
        mask: Tensor | None = create_bidirectional_mask(self.tower.config, hidden, valid)
        return mask

    def _mask_hook(self, index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            mask = self._mask(index, args[0] if args else kwargs["x" if self.timm else "hidden_states"])
            if mask is None:
                return None
            arguments = named(module, args, kwargs)
            hidden = arguments.pop("x" if self.timm else "hidden_states")
            return (hidden,), {**arguments, "attn_mask" if self.timm else "attention_mask": mask}

        return hook

    def valid(self, layer: int) -> Tensor | None:
        """(B, prefix + N) bool: what can be seen in a layer's attention; None for all."""
        tokens = self.during(layer)
        if tokens.valid is None:
            return None
        return torch.cat([tokens.valid.new_ones(tokens.valid.shape[0], self.prefix), tokens.valid], 1)

    def _log_size(self, layer: int) -> Tensor | None:
        """(B, prefix + N): what a proportional method adds to a layer's logits; None for nothing."""
        if not any(method.proportional for stage, method in self.host.plan.items() if stage.startswith("vision")):
            return None
        tokens = self.during(layer)
        # Not by what they are: to look would make the model wait in every layer.
        if tokens is self._steps[0][1] and self._resized is None:
            return None
        size = tokens.size
        return nn.functional.pad(size.clamp(min=1).float().log(), (self.prefix, 0))

    def _mask_pool(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        valid = self.valid(self.layers)
        if valid is None:
            return None
        if self.timm:
            # timm may leave the class and register tokens out of the pooling.
            return args, {**kwargs, "attn_mask": valid[:, None, None, -args[0].shape[1] :]}
        return args, {**kwargs, "key_padding_mask": ~valid}


def _joined(prefix: Tensor, patches: Tensor) -> Tensor:
    """One after the other, (B, P, C) and (B, N, C). CUDA copies in wide steps only if both are contiguous, as what a
    method made is, unlike the view that a prefix is."""
    return torch.cat([prefix.contiguous(), patches], 1) if prefix.shape[1] else patches


class VisionSignals(NoSignals):
    """The signals of a vision encoder (see `foveate.method.Signals`)."""

    where = "a vision encoder"

    def __init__(self, encoder: Encoder, tokens: Tokens | None) -> None:
        self._encoder, self._tokens = encoder, tokens

    def attention(self, layer: int) -> Attention:
        assert self._tokens is not None
        # Tokens may have been dropped since: look each up by the patch that it carries.
        held = predecessors(self._encoder.during(layer), self._tokens)
        return self._attention(layer, held.clamp(min=0) + self._encoder.prefix)

    def _attention(self, layer: int, visual: Tensor) -> Attention:
        encoder = self._encoder
        query, key, scaling = encoder.taps.read(layer)
        valid = encoder.valid(layer)
        return Attention(query.detach(), key.detach(), scaling, False, valid, valid, visual)

    def _patches(self, layer: int) -> Attention:
        """As `attention`, of patches whatever became of them."""
        source = self._encoder.during(layer).source
        return self._attention(layer, source.clamp(min=0) + self._encoder.prefix)

    def cls_attention(self, layer: int) -> Tensor:
        if not self._encoder.class_token:
            raise InputError(f"{type(self._encoder.tower).__name__} has no class token")
        attention = self._patches(layer)
        row = attention.rows(attention.visual.new_zeros(attention.visual.shape[0], 1)).mean(1)
        return self._of_tokens(row.transpose(1, 2), layer).squeeze(2)

    def received(self, layer: int) -> Tensor:
        return self._of_tokens(self._patches(layer).received().unsqueeze(2), layer).squeeze(2)

    def keys(self, layer: int) -> Tensor:
        return self._of_tokens(self._patches(layer).key.transpose(1, 2).flatten(2), layer)

    def _of_tokens(self, values: Tensor, layer: int) -> Tensor:
        """(B, N, C) of the tokens now, from (B, S, C) of those in a layer: the mean over a token's patches."""
        then = self._encoder.during(layer).source
        carried = then >= 0
        # Sums of many bf16 values need more digits than bf16 has.
        exact = values.to(torch.promote_types(values.dtype, torch.float32))
        held = take(exact, then.clamp(min=0) + self._encoder.prefix)
        if not bool(carried.all()):
            held = held * carried.unsqueeze(-1)
        return self._mean(self._of_source(held, carried)).to(values.dtype)

    def _of_source(self, values: Tensor, carried: Tensor) -> Tensor:
        """(B, M, C) of what this stage takes for source patches, from the encoder's patches, where `carried`."""
        return values

    def _mean(self, values: Tensor) -> Tensor:
        """(B, N, C) means over the source patches of each token, of (B, M, C)."""
        assert self._tokens is not None
        source, count = self._tokens.source, self._tokens.x.shape[1]
        if source.shape[1] == count and bool((source == torch.arange(count, device=source.device)).all()):
            return values  # each token is its own patch
        target = (source % (count + 1)).unsqueeze(-1).expand_as(values)
        total = values.new_zeros(len(source), count + 1, values.shape[2]).scatter_add(1, target, values)
        return total[:, :-1] / self._tokens.size.clamp(min=1).unsqueeze(-1)

    def crops(self) -> tuple[Crops, ...]:
        if self._encoder.pictures is not None:
            return self._encoder.pictures
        assert self._tokens is not None
        source = self._tokens.source
        whole = torch.ones(1, source.shape[1], dtype=torch.bool, device=source.device)
        return tuple(Crops(slice(row, row + 1), (0, 0), whole) for row in range(len(source)))

    def grid(self) -> tuple[int, int]:
        rows, columns = self._encoder.source_grid
        # A picture is only made smaller by whole cells.
        side = self._encoder.joined if self._tokens is None else 1
        return rows // side, columns // side


class VisionHost(Host):
    """A model that is a vision encoder, with or without a head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        towers = [module for module in model.modules() if _kind(module)]
        self.encoder = Encoder(self, towers[0])
        family = "timm" if self.encoder.timm else "hf-video" if self.encoder.video else "hf-vision"
        last = self.encoder.layers - 1
        self.shape = HostShape(
            family, self.encoder.stages, self.encoder.layers, last, self.encoder.prefix, self.encoder.native,
            class_token=self.encoder.class_token, slots=self.encoder.slots,
        )  # fmt: skip

    def hook(self) -> None:
        reads = {
            layer for method in self.plan.values() for kind, layer in map(split_read, method.reads(self.shape))
            if kind == "vision"
        }  # fmt: skip
        self.pre(self.encoder.tower, self._forget)
        # Before the encoder's own: of hooks on one module the last comes first, and the output is what a layer really
        # made, once the encoder has put it right.
        self.post(self.encoder.final, self._output)
        self.encoder.hook(reads)

    def _forget(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.trace.clear()

    def _output(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        encoder = self.encoder
        prefix, patches = output[:, : encoder.prefix], output[:, encoder.prefix :]
        before = tokens = encoder.after(encoder.layers - 1).with_x(patches)
        if "vision.output" in self.plan:
            tokens = encoder._run("vision.output", -1, tokens)
            encoder.settle(tokens)
        encoder.clear()
        if tokens.valid is not None:
            # A head that averages over the tokens must not see padding; tokens that equal the mean leave it as it is.
            weight = tokens.valid.unsqueeze(-1).to(tokens.x.dtype)
            mean = (tokens.x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
            tokens = tokens.with_x(torch.where(tokens.valid.unsqueeze(-1), tokens.x, mean))
        return None if tokens is before else torch.cat([prefix, tokens.x], 1)


def over(x: Tensor, grid: tuple[int, int], whole: tuple[int, int]) -> Tokens:
    """Tokens of a smaller picture: those of `grid`, x (B, N, C), each for the part it covers of the `whole` grid."""
    tokens = Tokens.from_grid(x, grid)
    if grid == whole:
        return tokens
    source = covering(grid, whole, x.device).expand(x.shape[0], -1)
    size = torch.zeros_like(tokens.size).scatter_add(1, source, torch.ones_like(source))
    scale = torch.tensor([1.0, whole[0] / grid[0], whole[1] / grid[1]], device=x.device)
    position = torch.where(scale == 1, tokens.position, (tokens.position + 0.5) * scale - 0.5)
    return Tokens(x, position, size, source)


def covering(grid: tuple[int, int], whole: tuple[int, int], device: torch.device) -> Tensor:
    """(M,) long: for each place of the `whole` grid, the place of a coarser `grid` that covers it."""
    y = torch.arange(whole[0], device=device) * grid[0] // whole[0]
    x = torch.arange(whole[1], device=device) * grid[1] // whole[1]
    return (y[:, None] * grid[1] + x).flatten()


def _pair(value: Any) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path) if path else None
    except AttributeError:
        return None


def _kind(module: nn.Module) -> str | None:
    """The class in `_ANATOMY` that a module is of, or derives from."""
    return next((base.__name__ for base in type(module).__mro__ if base.__name__ in _ANATOMY), None)
