"""Multi-TopK: TopK that is also good with several times as many latents, so that k can change afterwards."""

from __future__ import annotations

from typing import Literal, final

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.base import Loss, Sites
from sememe.dictionaries.selection import Selection, SelectionConfig, unweighed
from sememe.encoded import Encoded
from sememe.errors import ConfigError

__all__ = ["MultiTopK", "MultiTopKConfig"]


class MultiTopKConfig(SelectionConfig):
    """Options of a Multi-TopK dictionary."""

    kind: Literal["multi_topk"] = "multi_topk"
    """Name of the architecture."""
    multiple: int = Field(default=4, ge=2)
    """The second loss keeps this many times k latents (all, where there are not so many)."""
    multi_coefficient: float = Field(default=1 / 8, gt=0)
    """Weight of the second loss."""


@final
class MultiTopK(Selection):
    """TopK, with `loss = mse at k + mse at 4k / 8`.

    Source: Gao et al. 2024, arXiv:2406.04093, section 6.2 and appendix. Differs: as our TopK; both losses share
    one selection, for the k largest are among the 4k largest.
    """

    kind = "multi_topk"
    config_class = MultiTopKConfig
    fires_only_above_zero = True
    config: MultiTopKConfig

    def __init__(
        self, config: MultiTopKConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        if config.k == d_sae:
            raise ConfigError(
                f"k must be less than d_sae={d_sae}: else the second loss is the first",
                config.k,
                "Lower k or raise d_sae.",
            )
        most = -(-d_sae // config.k)
        if config.multiple > most and config.multiple != MultiTopKConfig.model_fields["multiple"].default:
            raise ConfigError(
                f"multiple must be <= {most}, at which all {d_sae} latents are kept: more has no effect",
                config.multiple,
                "Lower multiple, or raise d_sae.",
            )

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """The k largest positive pre-activations of each row; fewer if fewer are positive (then acts are 0)."""
        weights = self._weights()
        return unweighed(self._encode(x, self.config.k, weights), weights)

    def _encode(
        self, x: Float[Tensor, "batch d_in"], k: int, weights: Float[Tensor, " d_sae"] | None
    ) -> Encoded:
        """Activations as they are weighed."""
        self.check_input(x)
        acts, indices = kernels.encode_topk(x, *self._choosing(weights), self.b_pre, k)
        return Encoded.from_topk(acts, indices, self.d_sae)

    def loss(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], progress: float
    ) -> Loss:
        """Mean squared error at k, an eighth of that at 4k, and AuxK over latents that k never keeps."""
        weights = self._weights()
        wide = self._encode(x, min(self.config.k * self.config.multiple, self.d_sae), weights)
        acts, indices = wide.topk_view()
        columns = acts.detach().topk(self.config.k, dim=1, sorted=False).indices
        encoded = Encoded.from_topk(acts.gather(1, columns), indices.gather(1, columns), self.d_sae)
        encoded, wide = unweighed(encoded, weights), unweighed(wide, weights)
        mse, _, error = self._reconstruct(encoded, x, target)
        multi = self._reconstruct(wide, x, target).mse
        total = mse + self.config.multi_coefficient * multi
        return self._with_auxk(x, error, total, {"mse": mse, "mse_multi": multi}, encoded)
