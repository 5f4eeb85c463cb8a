"""Tied: the decoder is the encoder's transpose, rows of norm 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from sememe.dictionaries.base import Loss, Sites
from sememe.dictionaries.initial import geometric_median
from sememe.dictionaries.penalised import Penalised, PenalisedConfig
from sememe.errors import ConfigError

__all__ = ["Tied", "TiedConfig"]


class TiedConfig(PenalisedConfig):
    """Options of a tied dictionary."""

    kind: Literal["tied"] = "tied"
    """Name of the architecture."""
    l1_coefficient: float = 1e-3
    """Weight of the mean over rows of the sum of activations, against the mean squared error per dimension."""
    bias_decay: float = Field(default=0.0, ge=0)
    """Weight of the encoder bias's Euclidean norm in the loss."""
    centre: bool = False
    """Subtract the sample's geometric median before encoding; b_dec starts there."""


@final
class Tied(Penalised):
    """`acts = relu((x - b_pre) W^T + b_enc)`, `recon = acts W + b_dec`, rows of W of norm 1; W is W_dec.

    Source: Cunningham et al. 2023, arXiv:2309.08600, section 2. Differs: rows are kept at norm 1 by the optimiser
    (radial gradient removed, then renormalised) instead of being normalised in the graph; resampling as Bricken
    et al. 2023.
    """

    kind = "tied"
    config_class = TiedConfig
    config: TiedConfig

    def __init__(
        self, config: TiedConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        if config.skip:
            raise ConfigError(
                "a tied dictionary reconstructs what it reads, which a skip connection could copy",
                "skip",
                "Drop skip, or use relu for a transcoder.",
            )
        if d_in != d_out or (sites is not None and sites.inputs != sites.outputs):
            raise ConfigError(
                "a tied dictionary must read and write the same place",
                f"d_in {d_in} and d_out {d_out}, or different sites",
                "Use relu for a transcoder.",
            )
        if config.centre and not config.decoder_bias:
            raise ConfigError("centre needs a decoder bias", "decoder_bias false", "Drop one of the two.")
        super().__init__(config, d_in, d_out, d_sae, sites)

    def _add_encoder(self) -> None:
        """The decoder's transpose serves."""

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # type: ignore[override]
        """The decoder's transpose, latent-major as every encoder."""
        return self.W_dec.T

    def _centre(self) -> Callable[[Tensor], Tensor]:
        return geometric_median if self.config.centre else _zero

    def loss(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], progress: float
    ) -> Loss:
        """`mean (target - recon)^2 + l1_coefficient * mean_rows sum_i acts_i + bias_decay * ||b_enc||`."""
        encoded = self.encode(x)
        mse = (target - self.decode(encoded, x)).square().mean()
        l1 = encoded.acts.sum() / encoded.n_rows
        total = mse + self.config.l1_coefficient * l1
        if self.config.bias_decay:
            total = total + self.config.bias_decay * self.b_enc.norm()
        return Loss(total, {"mse": mse.detach(), "l1": l1.detach()}, encoded.detach())

    def _reset_norm(self, norms: Float[Tensor, " d_sae"], ids: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """1: the encoder's weights are the decoder's."""
        return norms.new_ones(())


def _zero(x: Tensor) -> Tensor:
    return torch.zeros_like(x[0])
