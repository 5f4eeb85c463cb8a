"""The optimisers' fast path on CPUs: numba loops that read and write each row of a parameter once, side by side.

Projection, update, renormalisation and the mask of frozen rows happen while a row is in the cache. Knows rows,
no dictionary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sememe.kernels.cpu import pool
from sememe.kernels.cpu.sparse_loops import jit

__all__ = ["adam_step", "signum_step"]


CHUNK = 2**19
"""Numbers per task."""


def _mask(frozen: Tensor | None) -> NDArray[np.bool_]:
    return np.zeros(0, np.bool_) if frozen is None else frozen.numpy()


@jit
def _adam(
    start: int, stop: int, param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, frozen: Any, step_size: Any,
    beta1: Any, beta2: Any, root_correction: Any, eps: Any, grad_scale: Any, unit_norm: bool,
) -> None:  # fmt: skip
    width = param.shape[1]
    one = np.float32(1.0)
    for row in range(start, stop):
        if frozen.shape[0] > 0 and frozen[row]:
            continue
        radial = np.float32(0.0)
        if unit_norm:
            for d in range(width):
                radial += grad[row, d] * param[row, d]
        norm_sq = np.float32(0.0)
        for d in range(width):
            g = (grad[row, d] - radial * param[row, d]) * grad_scale
            m = beta1 * exp_avg[row, d] + (one - beta1) * g
            v = beta2 * exp_avg_sq[row, d] + (one - beta2) * g * g
            exp_avg[row, d] = m
            exp_avg_sq[row, d] = v
            p = param[row, d] - step_size * m / (np.sqrt(v) * root_correction + eps)
            param[row, d] = p
            norm_sq += p * p
        if unit_norm:
            inverse = one / max(np.sqrt(norm_sq), np.float32(1e-12))
            for d in range(width):
                param[row, d] *= inverse


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    grad_scale: float | Tensor,
    unit_norm: bool,
    frozen: Tensor | None,
) -> None:
    """See `kernels.adam_step`. Parameter, gradient and moments must be contiguous."""
    f32 = np.float32
    parts = (
        param.detach().numpy(),
        grad.detach().contiguous().numpy(),
        exp_avg.numpy(),
        exp_avg_sq.numpy(),
        _mask(frozen),
        f32(lr / (1 - betas[0] ** step)),
        f32(betas[0]),
        f32(betas[1]),
        f32(1 / (1 - betas[1] ** step) ** 0.5),
        f32(eps),
        f32(float(grad_scale)),
        unit_norm,
    )
    pool.run(lambda start, stop: _adam(start, stop, *parts), param.shape[0], max(1, CHUNK // param.shape[1]))


@jit
def _signum(
    start: int, stop: int, param: Any, grad: Any, base: Any, average: Any, weight: Any, frozen: Any, lr: Any,
    momentum: Any, unit_norm: bool,
) -> None:  # fmt: skip
    width = param.shape[1]
    one, zero = np.float32(1.0), np.float32(0.0)
    for row in range(start, stop):
        if frozen.shape[0] > 0 and frozen[row]:
            continue
        radial = zero
        if unit_norm:
            for d in range(width):
                radial += grad[row, d] * param[row, d]
        norm_sq = zero
        for d in range(width):
            g = grad[row, d] - radial * param[row, d]
            z = base[row, d]
            if g > zero:
                z -= lr
            elif g < zero:
                z += lr
            elif g != zero:  # NaN is passed on, not stepped over
                z = g
            base[row, d] = z
            norm_sq += z * z
        inverse = one / max(np.sqrt(norm_sq), np.float32(1e-12)) if unit_norm else one
        share = weight[row]
        norm_sq = zero
        for d in range(width):
            z = base[row, d] * inverse
            x = average[row, d] + share * (z - average[row, d])
            y = z + momentum * (x - z)
            base[row, d] = z
            average[row, d] = x
            param[row, d] = y
            norm_sq += y * y
        if unit_norm:
            inverse = one / max(np.sqrt(norm_sq), np.float32(1e-12))
            for d in range(width):
                param[row, d] *= inverse


def signum_step(
    param: Tensor,
    grad: Tensor,
    base: Tensor,
    average: Tensor,
    weight: Tensor,
    lr: float,
    momentum: float,
    unit_norm: bool,
    frozen: Tensor | None,
) -> None:
    """See `kernels.signum_step`. Parameter, gradient, base and average must be contiguous."""
    f32 = np.float32
    parts = (
        param.detach().numpy(),
        grad.detach().contiguous().numpy(),
        base.numpy(),
        average.numpy(),
        weight.numpy(),
        _mask(frozen),
        f32(lr),
        f32(momentum),
        unit_norm,
    )
    pool.run(
        lambda start, stop: _signum(start, stop, *parts), param.shape[0], max(1, CHUNK // param.shape[1])
    )
