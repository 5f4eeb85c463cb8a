"""Some latents of a dictionary, the others left out. Measured like any dictionary; never saved."""

from __future__ import annotations

from typing import Any, Self, final

from jaxtyping import Bool, Float
from torch import Tensor

from sememe.dictionaries.base import Dictionary, Sites
from sememe.encoded import Encoded

__all__ = ["Part"]


@final
class Part(Dictionary):
    """`decode(encode(x))` of a dictionary with the entries of some latents only; its bias stays.

    Args:
        whole: The dictionary.
        keep: Its latents that count.
    """

    kind = "part"

    def __init__(self, whole: Dictionary, keep: Bool[Tensor, " d_sae"]) -> None:
        super().__init__(whole.config, whole.d_in, whole.d_out, whole.d_sae, whole.sites)
        self.whole, self.signed = whole, whole.signed
        self.register_buffer("keep", keep.to(whole.decoder_directions().device))
        self.keep: Tensor

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """Activations of the latents that count."""
        return self.whole.encode(x).select_latents(self.keep)

    def decode(
        self, encoded: Encoded, x: Float[Tensor, "batch d_in"] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """As the whole dictionary decodes them."""
        return self.whole.decode(encoded, x)

    def decoder_directions(self) -> Float[Tensor, "d_sae d_out"]:
        """Those of the whole."""
        return self.whole.decoder_directions()

    def fold(self) -> Part:
        """The same part of the folded whole."""
        return Part(self.whole.fold(), self.keep)

    @classmethod
    def rebuild(cls, config: dict[str, Any], d_in: int, d_out: int, d_sae: int, sites: Sites | None) -> Self:
        """Not possible: a part is never saved."""
        raise NotImplementedError("a part of a dictionary is never saved")
