"""Gated: one path decides which latents are active, another how much, so that the penalty shrinks nothing."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from sememe import kernels
from sememe.dictionaries.base import Loss, Sites
from sememe.dictionaries.chunks import Chunk, Rows
from sememe.dictionaries.sparse_start import SparseStart, SparseStartConfig
from sememe.encoded import Encoded

__all__ = ["Gated", "GatedConfig"]


class GatedConfig(SparseStartConfig):
    """Options of a gated dictionary."""

    kind: Literal["gated"] = "gated"
    """Name of the architecture."""
    l1_coefficient: float = Field(default=1e-3, ge=0)
    """Weight of the mean over rows of the sum of positive gates, against the mean squared error per dimension."""


@final
class Gated(SparseStart):
    """`gate = (x - b_pre) W_enc + b_enc`, `acts = H(gate) * relu(exp(r_mag) * (x - b_pre) W_enc + b_mag)`.

    b_enc is the paper's b_gate, W_enc its W_gate.

    Source: Rajamanoharan et al. 2024a, arXiv:2404.16014, eqs. 6-8. Differs: b_pre is set once and kept, instead
    of tied to b_dec; errors are means over dimensions; resampling as Bricken et al. 2023.
    """

    kind = "gated"
    config_class = GatedConfig
    config: GatedConfig
    latent_units = ("b_enc", "b_mag")

    def __init__(
        self, config: GatedConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    def initialise(
        self, x: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"], generator: torch.Generator
    ) -> None:
        """As every penalised dictionary; a constant latent has a constant magnitude too."""
        super().initialise(x, target, generator)
        if self.config.constant_latent:
            with torch.no_grad():
                self.b_mag[0] = self.b_enc[0]

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """Latents with an open gate; those of magnitude 0 are held as entries of activation 0."""
        self.check_input(x)
        return self._magnitudes(kernels.encode_threshold(x, self.W_enc, self.b_enc, self.b_pre, None))

    def _magnitudes(self, gates: Encoded) -> Encoded:
        b_enc, r_mag, b_mag = (kernels.of_entries(p, gates) for p in (self.b_enc, self.r_mag, self.b_mag))
        acts = torch.relu((gates.acts - b_enc) * r_mag.exp() + b_mag)
        return gates.with_acts(gates.only_stored(acts))

    def loss(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], progress: float
    ) -> Loss:
        """`mse + l1_coefficient * mean_rows sum_i relu(gate_i) + mse of relu(gate) through the frozen decoder`."""

        def of_rows(rows: Rows) -> Chunk:
            gates = self._encode_above(rows.x, None, rows.dense)
            encoded = self._magnitudes(gates)
            mse, _, error = self._reconstruct(encoded, rows.x, rows.target)
            target = rows.target
            if self.config.skip:
                target = target - rows.x @ self.W_skip.detach()
            frozen = self.W_dec.detach(), self.b_dec.detach()
            means = {
                "mse": mse,
                "l1": self._per_row(gates.acts, gates),
                "auxiliary": kernels.reconstruct(gates, *frozen, target).mse,
            }
            return Chunk(means, encoded.detach(), error)

        means, encoded, error = self._in_chunks(of_rows, x, target, None)
        penalty = self._factor(progress) * self.config.l1_coefficient * means["l1"]
        total = means["mse"] + penalty + means["auxiliary"]
        terms = {name: mean.detach() for name, mean in means.items()}
        return Loss(total, terms | self._steering_terms(), encoded, error)

    def reset_latents(
        self,
        ids: Int[Tensor, " n"],
        directions: Float[Tensor, "n d_out"],
        inputs: Float[Tensor, "n d_in"] | None = None,
    ) -> None:
        """As every ReLU; magnitudes start as the gates."""
        super().reset_latents(ids, directions, inputs)
        with torch.no_grad():
            self.r_mag[ids] = 0.0
            self.b_mag[ids] = 0.0
