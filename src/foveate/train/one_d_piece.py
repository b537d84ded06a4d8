"""Recipe for `one-d-piece`: as that of `titok`, with 64 ids whose tail is dropped at random in both stages."""

from __future__ import annotations

from typing import Any, ClassVar

from foveate.methods.tokenize import one_d_piece
from foveate.methods.tokenize.one_d_piece import OneDPiece
from foveate.methods.tokenize.titok import TiTok
from foveate.train.titok import TitokRecipe


class OneDPieceRecipe(TitokRecipe):
    """See the module; the VQGAN of a `titok` run serves here, too: `start` of stage "codes"."""

    name = "one-d-piece"
    tokenizer_type: ClassVar[type[TiTok]] = OneDPiece
    module: ClassVar[Any] = one_d_piece
