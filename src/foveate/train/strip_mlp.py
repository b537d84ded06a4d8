"""Recipe for `strip-mlp`: see `foveate.train.backbone`."""

from __future__ import annotations

from foveate.data.scenes import NAMES
from foveate.methods.image.strip_mlp import StripMlp
from foveate.train.backbone import SIDE, BackboneRecipe, BackboneSettings, SceneBackbone


class StripMlpRecipe(BackboneRecipe):
    """Trains a `StripMlp`, which `StripMlp.from_pretrained` loads from the output folder."""

    name = "strip-mlp"

    @staticmethod
    def build(settings: BackboneSettings) -> SceneBackbone:
        changes = {"image": SIDE, "classes": len(NAMES), "drop_path": settings.drop_path}
        return SceneBackbone(StripMlp.named(settings.config, **changes))
