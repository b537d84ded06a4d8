"""Recipe for `davit`: see `foveate.train.backbone`."""

from __future__ import annotations

from foveate.data.scenes import NAMES
from foveate.methods.image.davit import Davit
from foveate.train.backbone import BackboneRecipe, BackboneSettings, SceneBackbone


class DavitRecipe(BackboneRecipe):
    """Trains a `Davit`, which `Davit.from_pretrained` loads from the output folder."""

    name = "davit"

    @staticmethod
    def build(settings: BackboneSettings) -> SceneBackbone:
        return SceneBackbone(Davit.named(settings.config, classes=len(NAMES), drop_path=settings.drop_path))
