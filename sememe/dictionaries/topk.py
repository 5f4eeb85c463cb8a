"""TopK autoencoders and transcoders: the k largest latents of each row, and no penalty."""

from __future__ import annotations

from typing import Literal, final

from jaxtyping import Float
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.selection import Selection, SelectionConfig
from sememe.encoded import Encoded

__all__ = ["TopK", "TopKConfig"]


class TopKConfig(SelectionConfig):
    """Options of a TopK dictionary."""

    kind: Literal["topk"] = "topk"
    """Name of the architecture."""


@final
class TopK(Selection):
    """`acts = top_k(relu((x - b_pre) W_enc + b_enc))`, `recon = acts W_dec + b_dec`.

    Source: Gao et al. 2024, arXiv:2406.04093, section 2 and appendix A. Differs: b_pre is set once from the
    sample and kept (b_enc can learn whatever it would); ties go to the lower index; the auxiliary loss
    divides by the residual's mean square, so that its weight does not depend on the scale.
    """

    kind = "topk"
    config_class = TopKConfig
    fires_only_above_zero = True
    config: TopKConfig

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """The k largest positive pre-activations of each row; fewer if fewer are positive (then acts are 0)."""
        return self._select(kernels.encode_topk, x)
