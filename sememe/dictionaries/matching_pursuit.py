"""Matching pursuit: latents are taken one at a time, each from what those before it left over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from pydantic import model_validator
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.base import Loss, Sites
from sememe.dictionaries.linear import check_one_place
from sememe.dictionaries.selection import Selection, SelectionConfig
from sememe.encoded import Encoded
from sememe.errors import ConfigError

__all__ = ["MatchingPursuit", "MatchingPursuitConfig"]


class MatchingPursuitConfig(SelectionConfig):
    """Options of a matching pursuit dictionary; k is the number of steps."""

    kind: Literal["matching_pursuit"] = "matching_pursuit"
    """Name of the architecture."""

    @model_validator(mode="after")
    def _correlations_choose(self) -> MatchingPursuitConfig:
        if self.site_norms != "l2":
            raise ConfigError(
                "site_norms must be l2 in a pursuit, which takes away what it chose by: rows of norm 1",
                self.site_norms,
                "Drop it, or use topk.",
            )
        return self


@final
class MatchingPursuit(Selection):
    """From `r = x - b_dec`, k times: `i = argmax_i r . W_dec_i`, `acts_i += r . W_dec_i`, `r -= (r . W_dec_i) W_dec_i`.

    `recon = acts W_dec + b_dec`, so that r ends as the residual. Encoder and decoder are one: rows of W_dec have
    norm 1, and b_dec is subtracted from the input.

    Source: Costa et al. 2025, arXiv:2506.03093 (MP-SAE). Differs: a row ends when no correlation is
    positive, so that activations are; AuxK for dead latents, which go on with the pursuit where the live ones
    ended.
    """

    kind = "matching_pursuit"
    config_class = MatchingPursuitConfig
    config: MatchingPursuitConfig
    weakens = False  # its directions are the decoder's, of norm 1, and it has no bias
    scale_per_site = False  # one decoder for both ends cannot take up different scales

    def __init__(
        self, config: MatchingPursuitConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        check_one_place(config, "topk", d_in, d_out, sites)
        super().__init__(config, d_in, d_out, d_sae, sites)

    def _add_encoder(self) -> None:
        """The decoder serves."""

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # type: ignore[override]
        """The decoder's transpose."""
        return self.W_dec.T

    def encoder_directions(self) -> None:
        """None: what a latent reads depends on those that were taken before it."""

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """At most k latents per row; one that was taken twice has an entry of activation 0 for the second time."""
        return self._pursue(x)[0]

    def _pursue(self, x: Float[Tensor, "batch d_in"]) -> tuple[Encoded, Float[Tensor, "batch d_in"]]:
        self.check_input(x)
        acts, indices, residual = kernels.matching_pursuit(x, self.W_dec, self.b_dec, self.config.k)
        return Encoded.from_topk(acts, indices, self.d_sae), residual

    def pre_acts_of(self, ids: Int[Tensor, " n"]) -> Callable[[Tensor], Tensor]:
        """What gives the correlations of rows, once centred, with some latents."""
        directions = self.W_dec[ids].T
        return lambda x: (x - self.b_dec) @ directions

    def loss(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], progress: float
    ) -> Loss:
        """Mean squared error, differentiated through every step, and AuxK over dead latents."""
        encoded, left = self._pursue(x)
        error = -left if target is x else (x - left) - target
        mse = error.square().mean()
        return self._with_auxk((left + self.b_dec).detach(), error, mse, {"mse": mse}, encoded)

    def _start_encoder(self, centre: Float[Tensor, " d_in"], generator: torch.Generator) -> None:
        """Nothing: the decoder is set."""

    def _reset_encoder(self, ids: Int[Tensor, " n"], units: Float[Tensor, "n d_in"]) -> None:
        """Nothing: the decoder is set."""

    def _fold_encoder(self, s_in: Tensor, unit: Tensor) -> None:
        """Nothing: correlations and biases scale with the input, choices do not."""
