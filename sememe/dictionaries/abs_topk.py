"""AbsTopK: the k latents of each row that are furthest from 0, signs kept."""

from __future__ import annotations

from typing import Literal, final

from jaxtyping import Float
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.selection import Selection, SelectionConfig
from sememe.encoded import Encoded

__all__ = ["AbsTopK", "AbsTopKConfig"]


class AbsTopKConfig(SelectionConfig):
    """Options of an AbsTopK dictionary."""

    kind: Literal["abs_topk"] = "abs_topk"
    """Name of the architecture."""


@final
class AbsTopK(Selection):
    """`acts = the k largest of |(x - b_pre) W_enc + b_enc|, signed`, `recon = acts W_dec + b_dec`.

    Source: Zhu, Khalili & Zhu 2025, arXiv:2510.00404. Differs: AuxK (by absolute value) for dead latents, unit
    decoder rows, and the start of our TopK.
    """

    kind = "abs_topk"
    config_class = AbsTopKConfig
    config: AbsTopKConfig
    signed = True

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """The k pre-activations of each row furthest from 0; acts may be negative."""
        return self._select(kernels.encode_abs_topk, x)
