"""What the TopK family shares: sparsity set by a count, no penalty, AuxK for the dead. Knows no selection rule."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sememe.dictionaries.auxiliary import auxk_loss
from sememe.dictionaries.base import ArchitectureConfig, Loss, Sites
from sememe.dictionaries.initial import geometric_median
from sememe.dictionaries.linear import Linear
from sememe.encoded import Encoded
from sememe.errors import ConfigError

__all__ = ["Selection", "SelectionConfig"]


class SelectionConfig(ArchitectureConfig):
    """Options of every architecture that keeps a number of latents."""

    k: int = 32
    """Latents kept per row."""
    b_dec_init: Literal["geometric_median", "mean"] = "geometric_median"
    """Where the decoder bias starts: the sample's geometric median (robust) or its mean."""
    auxk_coefficient: float = 1 / 32
    """Weight of the auxiliary loss by which dead latents model the residual; 0 turns it off."""
    auxk: int | None = None
    """Dead latents used per row in the auxiliary loss; d_in / 2 if not given."""
    dead_after_tokens: int = 10_000_000
    """A latent that has not been kept for this many training rows counts as dead."""


class Selection(Linear, abc.ABC):
    """A linear dictionary that keeps a number of latents."""

    config: SelectionConfig
    signed: ClassVar[bool] = False
    """Whether activations may be negative."""

    def __init__(
        self, config: SelectionConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        if not 1 <= config.k <= d_sae:
            raise ConfigError(f"k must be in [1, d_sae={d_sae}]", config.k, "Lower k or raise d_sae.")

    def _centre(self) -> Callable[[Tensor], Tensor]:
        return geometric_median if self.config.b_dec_init == "geometric_median" else _mean

    def _with_auxk(
        self,
        x: Float[Tensor, "batch d_in"],
        residual: Float[Tensor, "batch d_out"],
        total: Float[Tensor, ""],
        terms: dict[str, Tensor],
        encoded: Encoded,
    ) -> Loss:
        """The loss, with AuxK over dead latents added if there are any.

        Args:
            x: Inputs.
            residual: What the kept latents leave over.
            total: The objective without AuxK.
            terms: Its parts.
            encoded: The latents that were kept.
        """
        config = self.config
        if config.auxk_coefficient > 0:
            dead = torch.nonzero(self.tokens_since_fired > config.dead_after_tokens).view(-1)
            if dead.numel() > 0:
                auxk = auxk_loss(self, x, residual, dead, config.auxk, signed=self.signed)
                terms = terms | {"auxk": auxk}
                total = total + config.auxk_coefficient * auxk
        return Loss(total, {name: term.detach() for name, term in terms.items()}, encoded.detach())


def _mean(x: Tensor) -> Tensor:
    return x.mean(0)
