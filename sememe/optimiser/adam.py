"""Adam for dictionaries, in one pass over parameters, gradients and moments. Knows no data."""

from __future__ import annotations

import math
from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.base import Trainable
from sememe.optimiser.base import BaseConfig, Optimiser

__all__ = ["Adam", "AdamConfig", "AdamOptions", "UsesAdam"]


class AdamOptions(BaseConfig):
    """Options of every optimiser that does as Adam does for some parameters."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of Adam's first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay rate of Adam's second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of Adam's second moment."""
    clip: float | None = Field(default=None, gt=0)
    """Largest global norm of the gradient; a longer one is scaled down to it."""


class AdamConfig(AdamOptions):
    """Options of Adam."""

    kind: Literal["adam"] = "adam"
    """Name of the optimiser."""

    def learning_rate(self, d_sae: int) -> float:
        """1.2e-3 / sqrt(d_sae / 4096), the same as 6e-4 / sqrt(d_sae / 2^14).

        Source: the 1/sqrt(width) rule of Gao et al. 2024, arXiv:2406.04093, appendix A.3. Differs: the constant,
        which is ours, for rows scaled to unit variance (sparsify takes 2e-4 at 2^14).
        """
        return 1.2e-3 / math.sqrt(d_sae / 4096)


class UsesAdam(Optimiser):
    """Adam for every parameter, until a subclass takes some for itself."""

    config: AdamOptions

    def __init__(self, dictionary: Trainable, config: AdamOptions) -> None:
        self.config = config
        super().__init__(dictionary, config.clip)

    def _new_slots(self, name: str, rows: Float[Tensor, "rows columns"]) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(rows), "exp_avg_sq": torch.zeros_like(rows)}

    def _update(
        self,
        name: str,
        rows: Float[Tensor, "rows columns"],
        grad: Float[Tensor, "rows columns"],
        lr: float,
        scale: float | Float[Tensor, ""],
        frozen: Bool[Tensor, " rows"] | None,
    ) -> None:
        slots, config = self.slots[name], self.config
        kernels.adam_step(
            rows,
            grad,
            slots["exp_avg"],
            slots["exp_avg_sq"],
            step=self.step_count,
            lr=lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            grad_scale=scale,
            unit_norm=name in self.unit_norm,
            frozen=frozen,
        )


@final
class Adam(UsesAdam):
    """Adam with bias correction. Moments of a changed latent begin at 0 again; the step count stays.

    Source: Kingma & Ba 2015, arXiv:1412.6980.
    """

    def __init__(self, dictionary: Trainable, config: AdamConfig | None = None) -> None:
        super().__init__(dictionary, config or AdamConfig())
