"""What the ReLU family shares: sparsity from a penalty, resampling of silent latents. Knows no penalty."""

from __future__ import annotations

import abc
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.auxiliary import ghost_loss
from sememe.dictionaries.base import Sites
from sememe.dictionaries.initial import bricken_norm
from sememe.dictionaries.linear import Linear, LinearConfig
from sememe.encoded import Encoded

__all__ = ["Penalised", "PenalisedConfig"]


class PenalisedConfig(LinearConfig):
    """Options of every architecture that is made sparse by a penalty."""

    decoder_bias: bool = True
    """Learn a decoder bias; else it is 0, and latents have to carry the mean."""
    resample: Literal["none", "loss", "worst", "random", "mcs"] = "loss"
    """Which latents are pointed anew, and where to: none, loss, worst, random or mcs."""
    ghost_after_tokens: int | None = Field(default=None, ge=1)
    """A latent that has not fired for this many training rows gets ghost gradients; none does if not given."""


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

    def revival_loss(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], encoded: Encoded
    ) -> Float[Tensor, ""] | None:
        """Ghost gradients for latents that are silent for too long, if the config asks for them."""
        if self.config.ghost_after_tokens is None:
            return None
        dead = torch.nonzero(self.tokens_since_fired > self.config.ghost_after_tokens).view(-1)
        if dead.numel() == 0:
            return None
        with torch.no_grad():
            residual = target - self.decode(encoded, x)
        return ghost_loss(self, x, residual, dead)
