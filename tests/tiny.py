"""Real transformers and timm models at tiny sizes, built from their configs: random weights, no network.

Weights are scaled so that attention is peaked and logits differ a lot; otherwise every ranking is a tie and every test
passes. `from tiny import …` works in all tests (pytest puts this folder on the path).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from foveate.method import Card, HostShape, Method, Stage, at
from foveate.tokens import Tokens, compact

IMAGE, VIDEO, PAD, VOCABULARY = 98, 2, 1, 99
"""Token ids: the placeholders of images and clips, padding; text is 3..97."""

LLAVA = ("clip-llama", "clip-qwen2", "siglip-llama", "siglip-qwen2")
QWEN_VL = ("qwen2-vl", "qwen2.5-vl")
VLMS = (*LLAVA, "next")
"""Names of `vlm`: those with LLaVA's vision half; `QWEN_VL`, "onevision" and "internvl" are the others."""

VISION = ("vit", "vit-head", "clip", "siglip", "siglip-head", "dinov2", "dinov2-head", "dinov2-reg")
TIMM = ("timm", "timm-reg-avg", "timm-distilled")
"""Names of `vision`."""


def shake(model: nn.Module, seed: int = 0, gain: float = 2.0) -> Any:
    """Weights of variance gain^2 / fan-in for queries and keys and 1 / fan-in elsewhere; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim < 2:
                one = ("norm" in name and name.endswith("weight")) or "lambda_" in name
                weight.copy_(0.2 * noise + (1.0 if one else 0.0))
            elif ("embed" in name or "token" in name or "probe" in name) and weight.ndim < 5:
                weight.copy_(noise)
            else:
                sharp = any(part in name for part in ("q_proj", "k_proj", "query", "key", "qkv"))
                # Qwen's merger would make much the same of all cells.
                strong = 3.0 if "merger" in name else 1.0
                weight.copy_(noise * (gain if sharp else strong) / math.sqrt(weight[0].numel()))
    return model.eval()


def clip_config(image: int = 16, patch: int = 4, layers: int = 5) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        image_size=image, patch_size=patch, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=64, projection_dim=32,
    )  # fmt: skip


def siglip_config(image: int = 16, patch: int = 4, layers: int = 5) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        image_size=image, patch_size=patch, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip


def text_config(kind: str = "llama", layers: int = 4) -> LlamaConfig | Qwen2Config:
    """Llama with as many key-value heads as heads, Qwen2 with half as many."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 1024, "pad_token_id": PAD, "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    if kind == "qwen2":
        return Qwen2Config(num_key_value_heads=2, **settings)
    return LlamaConfig(num_key_value_heads=4, **settings)


def qwen_vl(name: str, layers: int = 4, **config: Any) -> Any:
    """Qwen2-VL or Qwen2.5-VL with a vision encoder of 5 layers and patches of 4x4 pixels.

    In Qwen2.5-VL layers 1 and 4 see the whole picture and the others windows of 2x2 cells; clips are timed.
    """
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 1024, "pad_token_id": PAD,
        "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    shared = {
        "text_config": text, "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 0,
        "vision_end_token_id": 0, "pad_token_id": PAD, "eos_token_id": None, "bos_token_id": None,
    }  # fmt: skip
    tower: dict[str, Any] = {"depth": 5, "num_heads": 4, "patch_size": 4}
    if name == "qwen2-vl":
        tower |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(**shared | {"vision_config": tower} | config))
    tower |= {
        "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "window_size": 16,
        "fullatt_block_indexes": [1, 4], "tokens_per_second": 3,
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**shared | {"vision_config": tower} | config))


def vlm(name: str = "clip-llama", *, seed: int = 0, layers: int = 4, image: int = 16, **config: Any) -> Any:
    """A LLaVA ("clip-llama", "clip-qwen2", "siglip-llama", "siglip-qwen2"), LLaVA-NeXT ("next"), one of `QWEN_VL`,
    LLaVA-OneVision ("onevision": SigLIP and Qwen2) or InternVL ("internvl": its own tower and Qwen2).

    `layers` is the depth of the language model; the vision tower has 4x4 patches and 5 layers, of which the output of
    the fourth is used (SigLIP: all tokens; Qwen: see `qwen_vl`). LLaVA-NeXT and LLaVA-OneVision have crops of 4x4
    patches and 2x2, 1x2, 2x1 layouts; OneVision uses the last layer's output and has patches of 4x4 pixels. InternVL
    uses the last layer's output too; its 8x8 patches become 4x4 cells. `config` goes to the model's configuration.
    """
    torch.manual_seed(seed)
    shared: dict[str, Any] = {"image_token_id": IMAGE, "pad_token_id": PAD, "eos_token_id": None, "bos_token_id": None}
    if name == "next":
        side = image
        shared |= {
            "text_config": text_config("llama", layers), "vision_config": clip_config(side, side // 4),
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
            "image_grid_pinpoints": [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]],
        }  # fmt: skip
        model: Any = LlavaNextForConditionalGeneration(LlavaNextConfig(**shared | config))
    elif name == "onevision":
        encoder = siglip_config(image)
        encoder.vision_use_head = False
        shared |= {
            "text_config": text_config("qwen2", layers), "vision_config": encoder, "video_token_id": VIDEO,
            "image_grid_pinpoints": [[image, 2 * image], [2 * image, image], [2 * image, 2 * image]],
        }  # fmt: skip
        model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**shared | config))
    elif name == "internvl":
        seen = InternVLVisionConfig(
            image_size=image, patch_size=image // 8, hidden_size=32, num_hidden_layers=5, num_attention_heads=4,
            intermediate_size=64,
        )  # fmt: skip
        shared |= {
            "text_config": text_config("qwen2", layers), "vision_config": seen, "image_seq_length": 16,
            "tie_word_embeddings": False,
        }  # fmt: skip
        model = InternVLForConditionalGeneration(InternVLConfig(**shared | config))
    elif name in QWEN_VL:
        model = qwen_vl(name, layers, **config)
    else:
        tower, language = name.split("-")
        shared |= {
            "text_config": text_config(language, layers),
            "vision_config": clip_config(image) if tower == "clip" else siglip_config(image),
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default" if tower == "clip" else "full",
        }  # fmt: skip
        model = LlavaForConditionalGeneration(LlavaConfig(**shared | config))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    # Never a placeholder or padding as an answer.
    model.generation_config.suppress_tokens = [0, PAD, 2, IMAGE]
    return shake(model, seed)


def vision(name: str, *, seed: int = 0, layers: int = 4, **config: Any) -> Any:
    """A vision model with 4x4 patches of 16x16 pixels: one of `VISION` and `TIMM`."""
    torch.manual_seed(seed)
    if name in TIMM:
        from timm.models.deit import VisionTransformerDistilled
        from timm.models.vision_transformer import VisionTransformer

        settings: dict[str, Any] = {
            "img_size": 16,
            "patch_size": 4,
            "embed_dim": 32,
            "depth": layers,
            "num_heads": 4,
            "num_classes": 7,
        }
        if name == "timm-distilled":
            return shake(VisionTransformerDistilled(**settings | config), seed)
        if name == "timm-reg-avg":
            settings |= {"reg_tokens": 3, "global_pool": "avg"}
        return shake(VisionTransformer(**settings | config), seed)
    settings = {
        "image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4,
        "intermediate_size": 64,
    } | config  # fmt: skip
    dino = {key: value for key, value in settings.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
    builders: dict[str, Any] = {
        "vit": lambda: ViTModel(ViTConfig(**settings)),
        "vit-head": lambda: ViTForImageClassification(ViTConfig(num_labels=7, **settings)),
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**settings)),
        "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**settings)),
        "siglip-head": lambda: SiglipForImageClassification(_siglip(settings)),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**dino)),
        "dinov2-head": lambda: Dinov2ForImageClassification(Dinov2Config(num_labels=7, **dino)),
        "dinov2-reg": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=3, **dino)),
    }
    return shake(builders[name](), seed)


def _siglip(settings: dict[str, Any]) -> Any:
    from transformers import SiglipConfig, SiglipTextConfig

    text = SiglipTextConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    return SiglipConfig(text_config=text.to_dict(), vision_config=settings, num_labels=7)


def clip_dual(*, seed: int = 0) -> Any:
    """A two-tower CLIPModel; its text tower wants ids of `VOCABULARY` and 7 tokens at most."""
    from transformers import CLIPConfig

    text = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=8, projection_dim=32,
    )  # fmt: skip
    config = CLIPConfig(text_config=text.to_dict(), vision_config=clip_config(layers=4).to_dict(), projection_dim=32)
    return shake(CLIPModel(config), seed)


def probe(
    stage: str,
    choose: Callable[[Tokens, Stage], Tensor],
    *,
    layer: int = -1,
    renumbers: bool = True,
    reads: tuple[str, ...] = (),
    slug: str = "probe",
) -> Method:
    """A method for tests: keeps the tokens for which `choose(tokens, at)` (B, N) is True, at one stage and layer."""

    class Probe(Method):
        card = Card(slug=slug, title="probe", arxiv="", kind="reduce", hosts=("hf-vlm",), summary="for tests")

        def reads(self, host: HostShape) -> tuple[str, ...]:
            return reads

        @at(stage)
        def act(self, tokens: Tokens, at: Stage) -> Tokens:
            if at.layer != layer:
                return tokens
            return tokens.keep(compact(choose(tokens, at) & tokens.mask()))

    Probe.renumbers = renumbers
    return Probe()


def pixels(count: int = 1, seed: int = 0, side: int = 16) -> Tensor:
    """(count, 3, side, side) noise with large blobs in it, so that patches differ."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator).repeat_interleave(side // 4, 2)
    return coarse.repeat_interleave(side // 4, 3) + 0.5 * torch.randn(count, 3, side, side, generator=generator)


def prompt(
    model: Any, samples: list[tuple[int, ...]], *, sizes: list[tuple[int, ...]] | None = None, seed: int = 0,
    padding: str = "left",
) -> dict[str, Tensor]:  # fmt: skip
    """Inputs of a vision-language model: `input_ids`, `attention_mask`, `pixel_values` and what else it takes.

    Args:
        samples: for each sample the numbers of text tokens before, between and after its images: (2, 5) is one image
            between 2 and 5 text tokens, (4,) text alone, (0, 3, 6) two images of which the first opens the prompt.
        sizes: LLaVA-NeXT: original (height, width) of each image of the batch, in order; default 24 x 12 pixels.
            OneVision likewise, or (frames, height, width) of a clip; images are whole where a sample has several.
            Qwen: (rows, columns) of patches of an image, default 8 x 8, or (temporal patches, rows, columns) of a clip.
        seed: text and pictures depend on it and on the sample's place in the batch only.
        padding: "left" or "right".

    A sample alone is `single(model, inputs, b)`. Both encode pictures: call them before methods are applied.
    """
    images = sum(len(sample) - 1 for sample in samples)
    side = _side(model)
    extra: dict[str, Tensor] = {}
    tokens = [IMAGE] * images
    if hasattr(model.model, "visual"):
        grids = [(1, *size) if len(size) == 2 else size for size in sizes or [(8, 8)] * images]
        extra = _packed(grids, sizes or [], seed)
        lengths = [time * rows * columns // 4 for time, rows, columns in grids]
        tokens = [VIDEO if sizes and len(sizes[i]) == 3 else IMAGE for i in range(images)]
    elif hasattr(model.model, "apply_pooling"):
        sizes = sizes or [(24, 12)] * images
        tokens = [VIDEO if len(size) == 3 else IMAGE for size in sizes]
        extra = _onevision(model, [len(sample) - 1 for sample in samples], sizes, seed)
        found = {token: iter(_encode(model, extra, name)) for name, (token, _) in _PACKED.items()}
        lengths = [len(next(found[token])) for token in tokens]
    elif hasattr(model, "pack_image_features"):
        sizes = sizes or [(24, 12)] * images
        crops = [_crops(model, size) for size in sizes]
        values = torch.zeros(images, max(crops, default=1), 3, side, side)
        for i, count in enumerate(crops):
            values[i, :count] = pixels(count, seed * 1000 + i, side)
        extra = {"pixel_values": values, "image_sizes": torch.tensor(sizes)}
        lengths = [len(one) for one in _encode(model, extra)] if images else []
    else:
        values = torch.cat([pixels(1, seed * 1000 + i, side) for i in range(images)]) if images else torch.zeros(0)
        extra = {"pixel_values": values}
        lengths = [len(one) for one in _encode(model, extra)] if images else []
    following, rows = iter(zip(tokens, lengths)), []
    for b, sample in enumerate(samples):
        generator = torch.Generator().manual_seed(seed * 1000 + b)
        row: list[int] = []
        for k, count in enumerate(sample):
            if k:
                token, length = next(following)
                row += [token] * length
            row += torch.randint(3, IMAGE, (count,), generator=generator).tolist()
        rows.append(row)
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        part = slice(longest - len(row), None) if padding == "left" else slice(0, len(row))
        ids[b, part], mask[b, part] = torch.tensor(row), 1
    if hasattr(model.model, "visual"):
        extra["mm_token_type_ids"] = (ids == IMAGE) + 2 * (ids == VIDEO)
    return {"input_ids": ids, "attention_mask": mask, **(extra if images else {})}


def single(model: Any, inputs: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    """Sample `b` of a batch that `prompt` made (with `labels`, if there are), alone and without padding."""
    real = inputs["attention_mask"][b].bool()
    alone: dict[str, Tensor] = {
        name: inputs[name][b : b + 1, real]
        for name in ("input_ids", "attention_mask", "labels", "mm_token_type_ids")
        if name in inputs
    }
    if hasattr(model.model, "visual"):
        return alone | _unpacked(inputs, b)
    if hasattr(model.model, "apply_pooling"):
        return alone | _onevision_alone(model, inputs, b)
    if "pixel_values" not in inputs:
        return alone
    lengths = [len(one) for one in _encode(model, inputs)]
    wanted = (inputs["input_ids"] == IMAGE).sum(1).tolist()
    first = 0
    for count in wanted[:b]:
        while count:
            count, first = count - lengths[first], first + 1
    last, count = first, wanted[b]
    while count:
        count, last = count - lengths[last], last + 1
    if last > first:
        for name in ("pixel_values", "image_sizes"):
            if name in inputs:
                alone[name] = inputs[name][first:last]
    return alone


_PACKED = {"image": (IMAGE, "pixel_values"), "video": (VIDEO, "pixel_values_videos")}


def _packed(grids: list[tuple[int, ...]], sizes: list[tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Patches of Qwen's images and clips, each a row of 3 channels x 2 frames x 4 x 4 pixels, and their grids."""
    values: dict[str, list[Tensor]] = {name: [] for name in _PACKED}
    shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in _PACKED}
    for i, grid in enumerate(grids):
        generator = torch.Generator().manual_seed(seed * 1000 + i)
        count = math.prod(grid)
        coarse = torch.randn(count, 3, 1, generator=generator).expand(count, 3, 32).reshape(count, 96)
        name = "video" if sizes and len(sizes[i]) == 3 else "image"
        values[name].append(coarse + 0.5 * torch.randn(count, 96, generator=generator))
        shapes[name].append(grid)
    found: dict[str, Tensor] = {}
    for name, (_, pixels) in _PACKED.items():
        if values[name]:
            found |= {pixels: torch.cat(values[name]), f"{name}_grid_thw": torch.tensor(shapes[name])}
    return found


def _unpacked(inputs: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    """The images and clips of sample `b`, out of what `_packed` made."""
    found: dict[str, Tensor] = {}
    for name, (token, pixels) in _PACKED.items():
        if pixels not in inputs:
            continue
        grids = inputs[f"{name}_grid_thw"]
        ends = grids.prod(1).cumsum(0)
        wanted = (inputs["input_ids"] == token).sum(1).cumsum(0) * 4
        start = int(wanted[b - 1]) if b else 0
        mine = (ends > start) & (ends <= int(wanted[b]))
        if bool(mine.any()):
            found |= {pixels: inputs[pixels][start : int(wanted[b])], f"{name}_grid_thw": grids[mine]}
    return found


def _onevision(model: Any, counts: list[int], sizes: list[tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Crops of images and frames of clips, of so many pictures a sample; all clips have the same number of frames."""
    side, upcoming = _side(model), iter(enumerate(sizes))
    crops: list[Tensor] = []
    clips: list[Tensor] = []
    shapes: list[tuple[int, ...]] = []
    images: list[int] = []
    for count in counts:
        mine = [next(upcoming) for _ in range(count)]
        images.append(sum(len(size) == 2 for _, size in mine))
        for i, size in mine:
            if len(size) == 3:
                clips.append(pixels(size[0], seed * 1000 + i, side))
            else:
                crops.append(pixels(_crops(model, size) if images[-1] == 1 else 1, seed * 1000 + i, side))
                shapes.append(size)
    found: dict[str, Tensor] = {}
    if crops:
        most = max(map(len, crops))
        padded = [torch.cat([one, one.new_zeros(most - len(one), *one.shape[1:])]) for one in crops]
        found |= {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(shapes)}
        found["batch_num_images"] = torch.tensor(images)
    if clips:
        found["pixel_values_videos"] = torch.stack(clips)
    return found


def _onevision_alone(model: Any, inputs: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    """The images and clips of sample `b`, out of what `_onevision` made."""
    found: dict[str, Tensor] = {}
    if "batch_num_images" in inputs:
        ends = inputs["batch_num_images"].cumsum(0).tolist()
        mine = slice(ends[b - 1] if b else 0, ends[b])
        if mine.stop > mine.start:
            found = {name: inputs[name][mine] for name in ("pixel_values", "image_sizes")}
            found["batch_num_images"] = inputs["batch_num_images"][b : b + 1]
    if "pixel_values_videos" in inputs:
        length = len(_encode(model, inputs, "video")[0])
        ends = ((inputs["input_ids"] == VIDEO).sum(1).cumsum(0) // length).tolist()
        mine = slice(ends[b - 1] if b else 0, ends[b])
        if mine.stop > mine.start:
            found["pixel_values_videos"] = inputs["pixel_values_videos"][mine]
    return found


def _side(model: Any) -> int:
    """Pixels of a picture's side; 0 where pictures have any size."""
    side = getattr(model.config.vision_config, "image_size", 0)
    return int(side if isinstance(side, int) else side[0])


def _crops(model: Any, size: tuple[int, ...]) -> int:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return int(image_size_to_num_patches(size, model.config.image_grid_pinpoints, _side(model)))


@torch.no_grad()
def _encode(model: Any, inputs: dict[str, Tensor], modality: str = "image") -> list[Tensor]:
    """The unchanged model's features of each image or clip (only their number is used)."""
    names = {"image": ("pixel_values", "image_sizes", "batch_num_images"), "video": ("pixel_values_videos",)}[modality]
    tower = {name: inputs[name] for name in names if name in inputs}
    if not tower:
        return []
    encode = getattr(type(model.model), f"get_{modality}_features")
    return list(encode(model.model, **tower, return_dict=True).pooler_output)
