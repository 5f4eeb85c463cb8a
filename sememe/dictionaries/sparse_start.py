"""Encoders of a ReLU that start where few latents are active. Knows biases, no penalty."""

from __future__ import annotations

import abc

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from sememe.dictionaries.initial import median_of_others
from sememe.dictionaries.levels import levels
from sememe.dictionaries.steered import Steered, SteeredConfig

__all__ = ["SparseStart", "SparseStartConfig"]

N_START_ROWS = 4096
"""Rows of the sample that set the first biases."""

DENSITY = 0.025
MANY_LATENTS = 1024
"""From so many on DENSITY is the start, if none is given: 26 active latents a row."""


class SparseStartConfig(SteeredConfig):
    """Options of every architecture whose encoder is one product and a ReLU under a penalty."""

    start_density: float | None = Field(default=None, ge=0, le=0.5)
    """Share of the sample's rows on which each latent is active at the start; its bias is set so. 0 leaves biases at 0,
    as papers do, where half of the latents are active: a short run then ends before the penalty has silenced them. None
    given: 0.025 from 1,024 latents on, and 0 below, where so sparse a start would leave rows without any."""


class SparseStart(Steered, abc.ABC):
    """A penalised dictionary whose biases start as a quantile of the sample.

    From 0 the penalty first has to silence nearly all latents, which can take a short run whole.
    """

    config: SparseStartConfig

    def initialise(
        self, x: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"], generator: torch.Generator
    ) -> None:
        """As every linear dictionary; biases are the quantile of the sample that gives the density to start at."""
        super().initialise(x, target, generator)
        if self._start_density() == 0:
            return
        with torch.no_grad():
            kept = self.b_enc[0].clone()  # of a constant latent
            centred = x[:N_START_ROWS] - self.b_pre
            self.b_enc.copy_(-levels(centred, self.W_enc, None, self._start_density()).clamp_min(0))
            if self.config.constant_latent:
                self.b_enc[0] = kept

    def _reset_encoder(self, ids: Int[Tensor, " n"], units: Float[Tensor, "n d_in"]) -> None:
        """As every linear encoder. After a sparse start the bias is what is usual, until `settle`: from 0, half of the
        rows would be active again."""
        usual = median_of_others(self.b_enc, ids)
        super()._reset_encoder(ids, units)
        if self._start_density() > 0:
            self.b_enc[ids] = usual

    def _reset_norm(self, norms: Float[Tensor, " d_sae"], ids: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """After a sparse start as long as is usual: at a fifth of that no row would reach over the bias."""
        return median_of_others(norms, ids) if self._start_density() > 0 else super()._reset_norm(norms, ids)

    def settle(self, ids: Int[Tensor, " n"], x: Float[Tensor, "rows d_in"]) -> None:
        """After a sparse start: biases as at the start, of these rows. With those of other latents, one that is pointed
        at what many rows share would be active on all of them."""
        if self._start_density() > 0:
            with torch.no_grad():
                found = levels(x[:N_START_ROWS] - self.b_pre, self.W_enc[:, ids], None, self._start_density())
                self.b_enc[ids] = -found.clamp_min(0)

    def start_l0(self) -> float:
        """The density that biases start at; half of the latents where they start at 0."""
        return (self._start_density() or 0.5) * self.d_sae

    def _start_density(self) -> float:
        given = self.config.start_density
        if given is not None:
            return given
        return DENSITY if self.d_sae >= MANY_LATENTS else 0.0
