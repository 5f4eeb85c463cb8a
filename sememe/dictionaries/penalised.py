"""What the ReLU family shares: sparsity from a penalty, resampling of silent latents. Knows no penalty."""

from __future__ import annotations

import abc
from typing import Self

from jaxtyping import Float, Int
from pydantic import model_validator
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.base import Resampling, Sites
from sememe.dictionaries.initial import bricken_norm
from sememe.dictionaries.linear import Linear, LinearConfig
from sememe.encoded import Encoded
from sememe.errors import ConfigError

__all__ = ["Penalised", "PenalisedConfig"]


class PenalisedConfig(LinearConfig):
    """Options of every architecture that is made sparse by a penalty."""

    decoder_bias: bool = True
    """Learn a decoder bias; else it is 0, and latents have to carry the mean."""
    resample_at: tuple[float, ...] = (0.25, 0.5, 0.75)
    """When latents that have not fired lately are pointed at badly reconstructed rows, as shares of the run."""
    resample_after_tokens: int = 100_000
    """A latent that has not fired for this many training rows is resampled."""
    rewarmup_steps: int = 100
    """Steps over which the learning rate climbs back after each resampling."""

    @model_validator(mode="after")
    def _resampling_has_an_effect(self) -> Self:
        if not self.resample_at:
            self.check_inert("resample_after_tokens", "rewarmup_steps", without="resample_at is empty")
        if not all(0 < share < 1 for share in self.resample_at):
            raise ConfigError(
                "resample_at must hold shares of the run in (0, 1)", self.resample_at, "Change resample_at."
            )
        return self


class Penalised(Linear, abc.ABC):
    """A linear dictionary made sparse by a penalty; unless it says otherwise, every positive latent is active."""

    config: PenalisedConfig

    def __init__(
        self, config: PenalisedConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites, decoder_bias=config.decoder_bias)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """Every positive pre-activation."""
        self.check_input(x)
        return kernels.encode_threshold(x, self.W_enc, self.b_enc, self.b_pre, None)

    def _reset_norm(self, norms: Float[Tensor, " d_sae"], ids: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """A fifth of what live latents have. Source: Bricken et al. 2023, appendix "Neuron Resampling"."""
        return bricken_norm(norms, ids)

    def resampling(self) -> Resampling:
        """As its config says."""
        return Resampling(
            self.config.resample_at, self.config.resample_after_tokens, self.config.rewarmup_steps
        )
