"""Matryoshka BatchTopK: every prefix of the latents is a dictionary of its own."""

from __future__ import annotations

from typing import Literal, final

from jaxtyping import Float
from torch import Tensor

from sememe.dictionaries.base import Loss, Sites
from sememe.dictionaries.selection import BatchSelection, BatchSelectionConfig
from sememe.errors import ConfigError

__all__ = ["Matryoshka", "MatryoshkaConfig"]


class MatryoshkaConfig(BatchSelectionConfig):
    """Options of a Matryoshka dictionary; k is the average number of latents per row, in all prefixes together."""

    kind: Literal["matryoshka"] = "matryoshka"
    """Name of the architecture."""
    prefixes: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Where the nested dictionaries end, as shares of the latents; rising, the last one 1."""


@final
class Matryoshka(BatchSelection):
    """BatchTopK whose loss is the mean over nested prefixes of the latents of each prefix's own squared error.

    Source: Bussmann, Nabeshima, Karvonen & Nanda 2025, arXiv:2503.17547, section 3. Differs: the mean over
    prefixes instead of the sum, so that learning rates and AuxK's weight carry over from BatchTopK; AuxK models
    what all latents together leave over; threshold as in our BatchTopK.
    """

    kind = "matryoshka"
    config_class = MatryoshkaConfig
    config: MatryoshkaConfig

    def __init__(
        self, config: MatryoshkaConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        self.ends = tuple(round(share * d_sae) for share in config.prefixes)
        if not self.ends or config.prefixes[-1] != 1 or list(self.ends) != sorted(set(self.ends) - {0}):
            raise ConfigError(
                f"prefixes must rise to 1 and end at different latents of d_sae={d_sae}",
                config.prefixes,
                "Give shares such as 0.25,0.5,1, or raise d_sae.",
            )

    def loss(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], progress: float
    ) -> Loss:
        """The mean of the prefixes' mean squared errors, and AuxK; the term `mse` is that of all latents."""
        encoded = self.kept(x)
        prefixes, mses, error = self._reconstruct(encoded, x, target, self.ends)
        terms = {"mse": mses[-1], "prefixes": prefixes}
        return self._with_auxk(x, error, prefixes, terms, encoded)
