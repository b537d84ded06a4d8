"""The zoo's vision transformer: a timm `VisionTransformer` of CLIP's form, with linear heads on its patch tokens.

It has CLIP's pre-norm, CLIP's QuickGELU and no bias in the patch embedding, so that its weights convert exactly to a
transformers `CLIPVisionModel` (`to_clip`). timm is an optional extra: this module is imported on demand only.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel


class SceneTransformer(VisionTransformer):
    """A timm ViT that names the objects of a scene (class token) and the object under every patch (patch tokens).

    Pictures are (B, 3, img_size, img_size) float in -1..1, with `dynamic_img_size` of any multiple of `patch_size`.
    `forward` gives (B, num_classes) logits, one binary decision an object name, as for any timm model. The heads on the
    patch tokens:

    - `patch_head`: (N, 1 + num_classes) logits from the normalised last layer, class 0 is background;
    - `early_patch_head`: the same from the output of the last but one block, which LLaVA reads;
    - `early_box_head`: (N, 4) centre x, centre y, width, height of the patch's object as shares of the picture, also
      from there. It makes these tokens carry where an object is and how large, not only what it is.
    """

    def __init__(
        self,
        *,
        img_size: int = 96,
        patch_size: int = 8,
        embed_dim: int = 128,
        depth: int = 5,
        num_heads: int = 4,
        num_classes: int = 40,
        dynamic_img_size: bool = False,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            pre_norm=True,
            act_layer=QuickGELU,
            dynamic_img_size=dynamic_img_size,
        )
        self.patch_head = nn.Linear(embed_dim, 1 + num_classes)
        self.early_patch_head = nn.Linear(embed_dim, 1 + num_classes)
        self.early_box_head = nn.Linear(embed_dim, 4)

    def layers(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1 + N, embed_dim) tokens after the last but one block and, normalised, after the last block."""
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(pictures))))
        for block in self.blocks[:-1]:
            x = block(x)
        return x, self.norm(self.blocks[-1](x))

    def segment(self, pictures: Tensor) -> Tensor:
        """(B, N, 1 + num_classes) logits of the object under every patch, row by row."""
        return self.patch_head(self.layers(pictures)[1][:, 1:])


def to_clip(model: SceneTransformer) -> CLIPVisionModel:
    """The same tower as a transformers model: equal hidden states after every layer, the heads left out."""
    width = model.embed_dim
    blocks: Any = model.blocks
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=blocks[0].mlp.fc1.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
        hidden_act="quick_gelu",
        layer_norm_eps=float(cast(Any, model.norm).eps),
        projection_dim=width,
    )
    clip = CLIPVisionModel(config)
    source = model.state_dict()
    state = {
        "embeddings.class_embedding": source["cls_token"].reshape(width),
        "embeddings.patch_embedding.weight": source["patch_embed.proj.weight"],
        "embeddings.position_embedding.weight": source["pos_embed"][0],
    }
    modules = {"pre_layrnorm": "norm_pre", "post_layernorm": "norm"}
    for i in range(len(blocks)):
        layer, block = f"encoder.layers.{i}", f"blocks.{i}"
        modules |= {f"{layer}.layer_norm1": f"{block}.norm1", f"{layer}.layer_norm2": f"{block}.norm2"}
        modules |= {f"{layer}.mlp.fc1": f"{block}.mlp.fc1", f"{layer}.mlp.fc2": f"{block}.mlp.fc2"}
        modules[f"{layer}.self_attn.out_proj"] = f"{block}.attn.proj"
        for kind in ("weight", "bias"):
            parts = source[f"{block}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts):
                state[f"{layer}.self_attn.{name}.{kind}"] = part
    for target, origin in modules.items():
        for kind in ("weight", "bias"):
            state[f"{target}.{kind}"] = source[f"{origin}.{kind}"]
    wanted = {key for key in clip.state_dict() if "position_ids" not in key}
    if wanted != set(state):
        raise RuntimeError(f"transformers' CLIPVisionModel has other weights: {sorted(wanted ^ set(state))[:4]}")
    clip.load_state_dict({key: torch.clone(value) for key, value in state.items()}, strict=False)
    return clip.to(source["cls_token"].dtype).eval()
