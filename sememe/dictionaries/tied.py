"""Tied: the decoder is the encoder's transpose, rows of norm 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from sememe.dictionaries.activation_penalty import ActivationPenalty, ActivationPenaltyConfig
from sememe.dictionaries.base import Loss, Sites
from sememe.dictionaries.chunks import Chunk, Rows
from sememe.dictionaries.initial import geometric_median
from sememe.dictionaries.linear import check_one_place
from sememe.errors import ConfigError

__all__ = ["Tied", "TiedConfig"]

REACH_ENTRIES = 2**23
"""Projections held at once: 32 MB."""


class TiedConfig(ActivationPenaltyConfig):
    """Options of a tied dictionary."""

    kind: Literal["tied"] = "tied"
    """Name of the architecture."""
    start_density: float = Field(default=0.025, ge=0, le=0.5)
    """Share of the sample's rows on which each latent is active at the start; its bias is set so. From 0 tied weights
    do not get there."""
    bias_decay: float = Field(default=0.0, ge=0)
    """Weight of the encoder bias's Euclidean norm in the loss."""
    centre: bool = False
    """Subtract the sample's geometric median before encoding; b_dec starts there."""

    @model_validator(mode="after")
    def _no_latent_reads_nothing(self) -> TiedConfig:
        if self.constant_latent:
            raise ConfigError(
                "constant_latent must be false when weights are tied: a latent that writes also reads",
                "true",
                "Drop it, or use relu.",
            )
        return self


@final
class Tied(ActivationPenalty):
    """`acts = relu((x - b_pre) W^T + b_enc)`, `recon = acts W + b_dec`, rows of W of norm 1; W is W_dec.

    Source: Cunningham et al. 2023, arXiv:2309.08600, section 2. Differs: rows are kept at norm 1 by the optimiser
    (radial gradient removed, then renormalised) instead of being normalised in the graph; biases start where few
    latents are active instead of at 0; resampling as Bricken et al. 2023.
    """

    kind = "tied"
    config_class = TiedConfig
    config: TiedConfig
    _reach: Tensor
    """The largest projection of the rows last looked at, for each latent pointed anew."""
    scale_per_site = False  # one decoder for both ends cannot take up different scales

    def __init__(
        self, config: TiedConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        check_one_place(config, "relu", d_in, d_out, sites)
        if config.centre and not config.decoder_bias:
            raise ConfigError("centre needs a decoder bias", "decoder_bias false", "Drop one of the two.")
        super().__init__(config, d_in, d_out, d_sae, sites)

    def _add_encoder(self) -> None:
        """The decoder's transpose serves."""
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.register_buffer("b_pre", torch.zeros(self.d_in))

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
        factor = self._factor(progress)
        lowest = self._lowest(factor)

        def of_rows(rows: Rows) -> Chunk:
            encoded = self._encode_noisy(rows, lowest, factor)
            error = self.decode(encoded, rows.x) - rows.target
            parts = self._penalty(encoded.acts, encoded)
            return Chunk({"mse": error.square().mean(), **parts}, encoded.detach(), error)

        loss = self._loss_of(self._in_chunks(of_rows, x, target, lowest), factor)
        if not self.config.bias_decay:
            return loss
        return loss._replace(total=loss.total + self.config.bias_decay * self.b_enc.norm())

    def settle(self, ids: Int[Tensor, " n"], x: Float[Tensor, "rows d_in"]) -> None:
        """As with every sparse start; `weaken` goes by how far these rows reach."""
        super().settle(ids, x)
        with torch.no_grad():
            some = torch.split(ids, max(1, REACH_ENTRIES // len(x)))
            self._reach = torch.cat([((x - self.b_pre) @ self.W_enc[:, part]).amax(0) for part in some])

    def weaken(self, ids: Int[Tensor, " n"], factor: float) -> None:
        """The encoder's length is the decoder's: the bias moves towards where no row reaches."""
        with torch.no_grad():
            nowhere = torch.minimum(-self._reach, self.b_enc[ids])
            self.b_enc[ids] = torch.lerp(nowhere, self.b_enc[ids], factor)

    def _reset_norm(self, norms: Float[Tensor, " d_sae"], ids: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """1: the encoder's weights are the decoder's."""
        return norms.new_ones(())


def _zero(x: Tensor) -> Tensor:
    return torch.zeros_like(x[0])
