"""Muon: the momentum of each matrix, made orthogonal; Adam for the vectors. Knows no data."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sememe import kernels
from sememe.dictionaries.base import Trainable
from sememe.optimiser.adam import AdamOptions, UsesAdam

__all__ = ["Muon", "MuonConfig", "orthogonal"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that is iterated: steep at 0, singular values end up in about [0.7, 1.2]."""


class MuonConfig(AdamOptions):
    """Options of Muon."""

    kind: Literal["muon"] = "muon"
    """Name of the optimiser."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Signum: how near to the average the gradient is taken. Muon: decay rate of the momentum."""
    newton_schulz_steps: int = Field(default=5, ge=1)
    """Iterations by which Muon makes the momentum orthogonal."""

    def learning_rate(self, d_sae: int) -> float:
        """2e-3 at every width. Source: sparsify (EleutherAI), `trainer.py`, 1.1 to 1.3."""
        return 2e-3


def orthogonal(matrix: Float[Tensor, "rows columns"], n_steps: int) -> Float[Tensor, "rows columns"]:
    """About the orthogonal factor U V^T of a matrix U S V^T, by Newton-Schulz iteration.

    In bfloat16 where the device multiplies it natively, else in the matrix's own precision. Rows of zeros stay.

    Args:
        matrix: Any matrix.
        n_steps: Iterations.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    a, b, c = COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp_min(1e-7)  # the spectral norm is at most 1 then
    if kernels.native_bfloat16(x):
        x = x.bfloat16()
    for _ in range(n_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = (x if wide else x.T).to(matrix.dtype)
    return result


@final
class Muon(UsesAdam):
    """Every matrix steps by 0.2 sqrt(its longer side) times the orthogonal factor of its Nesterov momentum.

    So the entries of a step have a root mean square of about 0.2 lr, near what Adam's have. Vectors get Adam.
    Frozen latents have no part in the orthogonal factor.

    Source: Jordan et al. 2024; the scale from Liu et al. 2025, arXiv:2502.16982; momentum, learning rate and
    division of labour as in sparsify (EleutherAI). Differs: no weight decay (decoder rows have norm 1); radial
    gradients are removed before the momentum, and rows are brought back to norm 1 after the step.
    """

    config: MuonConfig

    def __init__(self, dictionary: Trainable, config: MuonConfig | None = None) -> None:
        super().__init__(dictionary, config or MuonConfig())

    def _new_slots(self, name: str, rows: Float[Tensor, "rows columns"]) -> dict[str, Tensor]:
        if self.parameters[name].dim() >= 2:
            return {"momentum": torch.zeros_like(rows)}
        return super()._new_slots(name, rows)

    def _update(
        self,
        name: str,
        rows: Float[Tensor, "rows columns"],
        grad: Float[Tensor, "rows columns"],
        lr: float,
        scale: float | Float[Tensor, ""],
        frozen: Bool[Tensor, " rows"] | None,
    ) -> None:
        if "momentum" not in self.slots[name]:
            super()._update(name, rows, grad, lr, scale, frozen)
            return
        momentum, config, unit_norm = self.slots[name]["momentum"], self.config, name in self.unit_norm
        grad = grad * scale
        if unit_norm:
            grad = grad - (grad * rows).sum(1, keepdim=True) * rows
        if frozen is not None:
            grad = grad.masked_fill(frozen[:, None], 0.0)
        momentum.lerp_(grad, 1 - config.momentum)
        direction = orthogonal(torch.lerp(grad, momentum, config.momentum), config.newton_schulz_steps)
        new = rows - lr * 0.2 * max(rows.shape) ** 0.5 * direction
        if unit_norm:
            new = new / new.norm(dim=1, keepdim=True).clamp_min(1e-12)
        rows.copy_(new if frozen is None else torch.where(frozen[:, None], rows, new))

    def freeze(self, latents: Bool[Tensor, " d_sae"]) -> None:
        """As every optimiser; the momentum of frozen latents is forgotten."""
        super().freeze(latents)
        self.forget(torch.nonzero(self.frozen).view(-1))
