"""Parameter updates of the CPU path: one pass over the memory. Knows no dictionary."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from sememe.kernels.cpu import loops, pool

__all__ = ["adam_step"]

CHUNK = 2**19
"""Numbers per task."""


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    grad_scale: float,
    unit_norm: bool,
) -> None:
    """See `kernels.adam_step`. All four tensors must be contiguous."""
    f32 = np.float32
    arrays = (param.detach().numpy(), grad.detach().contiguous().numpy(), exp_avg.numpy(), exp_avg_sq.numpy())
    numbers = (
        f32(lr / (1 - betas[0] ** step)),
        f32(betas[0]),
        f32(betas[1]),
        f32(1 / (1 - betas[1] ** step) ** 0.5),
        f32(eps),
        f32(grad_scale),
    )
    n_rows, width = param.shape
    pool.run(
        lambda start, stop: loops.adam(start, stop, *arrays, *numbers, unit_norm),
        n_rows,
        max(1, CHUNK // width),
    )
