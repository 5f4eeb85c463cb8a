"""What baselines and sparse coders share: directions that are written, a point they are written about, k at most.

They are fitted to rows in raw units and never trained. Knows no way to encode.
"""

from __future__ import annotations

import copy
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.base import ArchitectureConfig, Dictionary, Sites
from sememe.encoded import Encoded
from sememe.errors import ActivationError, ConfigError

__all__ = ["Fitted", "check_rows"]


class Fitted(Dictionary):
    """`recon = acts W_dec + b_dec`. An autoencoder in raw units."""

    W_dec: Tensor
    b_dec: Tensor

    def __init__(
        self, config: ArchitectureConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        self.check_autoencoder()
        k = config.k_in_use()
        if k is not None and not 1 <= k <= d_sae:
            raise ConfigError(f"k must be in [1, d_sae={d_sae}]", k, "Lower k.")
        self.register_buffer("W_dec", torch.zeros(d_sae, d_out))
        self.register_buffer("b_dec", torch.zeros(d_out))

    def keeping(self, k: int) -> Self:
        """The same directions, k of them kept per row (all there are, if fewer)."""
        made = copy.deepcopy(self)
        assert hasattr(self.config, "k")
        made.config = self.config.replace(k=min(k, self.d_sae))
        return made

    def decode(
        self, encoded: Encoded, x: Float[Tensor, "batch d_in"] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """The weighted sum of directions, plus the point they are written about."""
        return kernels.decode_encoded(encoded, self.W_dec, self.b_dec)

    def decoder_directions(self) -> Float[Tensor, "d_sae d_out"]:
        """What each latent writes."""
        return self.W_dec

    def fold(self) -> Self:
        """A copy: it is made in raw units."""
        return copy.deepcopy(self)

    def kept(self, acts: Float[Tensor, "batch d_sae"], k: int | None, *, signed: bool) -> Encoded:
        """The k largest of each row, by distance from 0 if signed; all without k."""
        if k is None:
            return Encoded.from_dense(acts)
        indices = (acts.abs() if signed else acts).topk(k, dim=1, sorted=False).indices
        return Encoded.from_topk(acts.gather(1, indices), indices.to(torch.int32), self.d_sae)


def check_rows(x: Float[Tensor, "rows d"]) -> None:
    """Raise an ActivationError if a row that something is fitted to is NaN or infinite."""
    if not bool(torch.isfinite(x).all()):
        raise ActivationError("activations must be finite", "NaN or infinity among the rows", "Look at them.")
