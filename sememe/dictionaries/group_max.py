"""GroupMax: the latents in k groups, and the largest of each group."""

from __future__ import annotations

from typing import Literal, final

from jaxtyping import Float
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.base import Loss, Sites
from sememe.dictionaries.selection import Selection, SelectionConfig, unweighed
from sememe.encoded import Encoded
from sememe.errors import ConfigError

__all__ = ["GroupMax", "GroupMaxConfig"]


class GroupMaxConfig(SelectionConfig):
    """Options of a GroupMax dictionary; k is the number of groups, and so of latents kept per row."""

    kind: Literal["group_max"] = "group_max"
    """Name of the architecture."""


@final
class GroupMax(Selection):
    """`acts = relu of the largest pre-activation of each of k runs of d_sae / k latents`.

    Source: the `groupmax` activation of EleutherAI's sparsify. Differs: AuxK for dead latents as in our TopK.
    """

    kind = "group_max"
    config_class = GroupMaxConfig
    config: GroupMaxConfig

    def __init__(
        self, config: GroupMaxConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        if d_sae % config.k:
            raise ConfigError(
                f"k must divide d_sae={d_sae} into equal groups", config.k, "Change k or d_sae."
            )

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """The largest of each group, 0 if it is not positive."""
        self.check_input(x)
        weights = self._weights()
        acts, indices = kernels.encode_group_max(x, *self._choosing(weights), self.b_pre, self.config.k)
        return unweighed(Encoded.from_topk(acts, indices, self.d_sae), weights)

    def loss(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], progress: float
    ) -> Loss:
        """Mean squared error, and AuxK over dead latents."""
        encoded = self.encode(x)
        mse, _, error = self._reconstruct(encoded, x, target)
        return self._with_auxk(x, error, mse, {"mse": mse}, encoded)
