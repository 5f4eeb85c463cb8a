"""A dictionary of rows that are normalised one by one, as some released ones are. Never trained here; knows no format.

A norm per row folds into no weights: it stays as an operation of the dictionary.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, NamedTuple, Self, final

import torch
from jaxtyping import Float
from torch import Tensor

from sememe.config import Config
from sememe.dictionaries.base import Dictionary, Sites, Trainable
from sememe.encoded import Encoded
from sememe.errors import ShapeError

__all__ = ["RowNorm", "RowNormConfig"]

EPSILON = 1e-5
"""Added to a row's standard deviation."""


class RowNormConfig(Config):
    """How rows are normalised, and what reads them then."""

    kind: Literal["row_norm"] = "row_norm"
    """Name of the dictionary."""
    norm: Literal["layer", "length"] = "layer"
    """layer: less the mean, over the standard deviation (n - 1) plus 1e-5. length: so that the norm is sqrt(d_in)."""
    inner: dict[str, Any]
    """The options of the dictionary of normalised rows, its kind among them."""


class _Scaled(NamedTuple):
    rows: Float[Tensor, "batch d"]
    centre: Float[Tensor, "batch 1"]
    spread: Float[Tensor, "batch 1"]


@final
class RowNorm(Dictionary):
    """`n = (x - c) / (s + e)`, `acts = s * inner.encode(n)`, `recon = acts W_dec + s * b_dec + c`.

    c is the row's mean and s its standard deviation (e = 1e-5), or c = 0, e = 0 and s the row's norm over sqrt(d_in).

    Source: the `LN` of openai/sparse_autoencoder; SAELens' `layer_norm` and `constant_norm_rescale`. Differs:
    activations are in units of the model, s times theirs, so that a latent adds its activation times its direction
    here as in every dictionary.
    """

    kind = "row_norm"
    config: RowNormConfig
    inner: Dictionary

    def __init__(
        self, config: RowNormConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        self.check_autoencoder()
        from sememe.dictionaries import TRAINABLE  # the table of all, which this is one of

        self.inner = TRAINABLE[config.inner["kind"]].rebuild(config.inner, d_in, d_out, d_sae, None)
        self.signed = self.inner.signed

    @classmethod
    def rebuild(cls, config: dict[str, Any], d_in: int, d_out: int, d_sae: int, sites: Sites | None) -> Self:
        """An empty dictionary of the given shape."""
        return cls(RowNormConfig.build(config), d_in, d_out, d_sae, sites)

    @classmethod
    def around(cls, inner: Dictionary, norm: str) -> Self:
        """What reads rows with an inner dictionary of normalised rows, which is copied.

        Args:
            inner: Of a kind that is trained here.
            norm: layer or length.
        """
        assert isinstance(inner, Trainable), inner.kind
        config = RowNormConfig.build({"norm": norm, "inner": {"kind": inner.kind, **inner.config.resolved()}})
        self = cls(config, inner.d_in, inner.d_out, inner.d_sae, inner.sites)
        self.inner.load_state_dict(inner.fold().state_dict())
        return self.eval()

    def _normalise(self, x: Float[Tensor, "batch d_in"]) -> _Scaled:
        if self.config.norm == "length":
            spread = x.norm(dim=1, keepdim=True) / self.d_in**0.5
            return _Scaled(x / spread.clamp_min(1e-30), torch.zeros_like(spread), spread)
        centre = x.mean(dim=1, keepdim=True)
        spread = x.std(dim=1, keepdim=True)
        return _Scaled((x - centre) / (spread + EPSILON), centre, spread)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """What the inner dictionary finds in normalised rows, in units of the rows as they were."""
        self.check_input(x)
        scaled = self._normalise(x)
        encoded = self.inner.encode(scaled.rows)
        return encoded.with_acts(encoded.acts * scaled.spread[:, 0].index_select(0, encoded.row_ids()))

    def decode(
        self, encoded: Encoded, x: Float[Tensor, "batch d_in"] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """The weighted sum of directions, and the row's own centre and spread.

        Raises:
            ShapeError: there is no x.
        """
        if x is None:
            raise ShapeError(
                "a dictionary of normalised rows needs the input beside the latents",
                "no x",
                "Pass decode(encoded, x).",
            )
        scaled = self._normalise(x)
        bias = self.inner.b_dec
        assert isinstance(bias, Tensor)
        sums = self.inner.decode(encoded, scaled.rows) - bias
        return sums + scaled.spread * bias + scaled.centre

    def decoder_directions(self) -> Float[Tensor, "d_sae d_out"]:
        """The inner dictionary's: activations carry the scale."""
        return self.inner.decoder_directions()

    def encoder_directions(self) -> Float[Tensor, "d_sae d_in"] | None:
        """What latents read of normalised rows."""
        return self.inner.encoder_directions()

    def fold(self) -> RowNorm:
        """A copy: it is in raw units from the start."""
        return copy.deepcopy(self)
