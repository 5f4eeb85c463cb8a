"""GroupMax: the latents in k groups, and the largest of each group."""

from __future__ import annotations

from typing import Literal, final

from jaxtyping import Float
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.base import Sites
from sememe.dictionaries.selection import Selection, SelectionConfig
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
    fires_only_above_zero = True
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
        return self._select(kernels.encode_group_max, x)
