"""Adam in one pass over a parameter, its gradient and its moments. Knows no dictionary."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sememe.kernels.gpu.sparse import OPTIONS

__all__ = ["adam_step"]

FLAT = 1024
"""Elements per program where rows do not matter."""


@triton.jit
def _adam_flat(
    param, grad, exp_avg, exp_avg_sq, grad_scale, frozen, step_sizes, n, width, rows_each,
    step_size, beta1, beta2, root_correction, eps,
    BLOCK: tl.constexpr, FROZEN: tl.constexpr, SEVERAL: tl.constexpr,
):  # fmt: skip
    """One step for a block of elements."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    if FROZEN:
        inside = inside & (tl.load(frozen + place // width, mask=inside, other=1).to(tl.int32) == 0)
    if SEVERAL:
        dictionary = place // width // rows_each
        step_size = tl.load(step_sizes + dictionary, mask=inside, other=0.0)
        scale = tl.load(grad_scale + dictionary, mask=inside, other=0.0)
    else:
        scale = tl.load(grad_scale)
    g = tl.load(grad + place, mask=inside, other=0.0) * scale
    m = beta1 * tl.load(exp_avg + place, mask=inside, other=0.0) + (1.0 - beta1) * g
    v = beta2 * tl.load(exp_avg_sq + place, mask=inside, other=0.0) + (1.0 - beta2) * g * g
    p = tl.load(param + place, mask=inside, other=0.0) - step_size * m / (tl.sqrt(v) * root_correction + eps)
    tl.store(exp_avg + place, m, mask=inside)
    tl.store(exp_avg_sq + place, v, mask=inside)
    tl.store(param + place, p, mask=inside)


@triton.jit
def _adam_rows(
    param, grad, exp_avg, exp_avg_sq, grad_scale, frozen, step_sizes, n, width, rows_each,
    step_size, beta1, beta2, root_correction, eps,
    BLOCK: tl.constexpr, FROZEN: tl.constexpr, SEVERAL: tl.constexpr,
):  # fmt: skip
    """One step for a row that keeps norm 1: it stays in registers from the projection to the division."""
    column = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    inside = column < width
    if FROZEN:
        # a whole block of the one flag: the interpreter takes no mask made of a scalar
        inside = inside & (tl.load(frozen + row + 0 * column, mask=inside, other=1).to(tl.int32) == 0)
    place = row * width + column
    p = tl.load(param + place, mask=inside, other=0.0)
    if SEVERAL:
        step_size = tl.load(step_sizes + row // rows_each)
        scale = tl.load(grad_scale + row // rows_each)
    else:
        scale = tl.load(grad_scale)
    g = tl.load(grad + place, mask=inside, other=0.0) * scale
    g -= tl.sum(g * p) * p
    m = beta1 * tl.load(exp_avg + place, mask=inside, other=0.0) + (1.0 - beta1) * g
    v = beta2 * tl.load(exp_avg_sq + place, mask=inside, other=0.0) + (1.0 - beta2) * g * g
    p -= step_size * m / (tl.sqrt(v) * root_correction + eps)
    p = tl.where(inside, p, 0.0)
    p = p / tl.maximum(tl.sqrt(tl.sum(p * p)), 1e-12)
    tl.store(exp_avg + place, m, mask=inside)
    tl.store(exp_avg_sq + place, v, mask=inside)
    tl.store(param + place, p, mask=inside)


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    grad_scale: float | Tensor,
    unit_norm: bool,
    frozen: Tensor | None = None,
) -> None:
    """See `kernels.adam_step`. Parameter, gradient and moments must be contiguous.

    Args:
        param: As there, and so are all that are not named here.
        grad: Its gradient.
        exp_avg: First moments.
        exp_avg_sq: Second moments.
        step: Number of this step.
        lr: Learning rate, or those of several dictionaries.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        grad_scale: What the gradient is multiplied by; a tensor is read on the device.
        unit_norm: Rows keep norm 1.
        frozen: Rows that stay as they are.
    """
    rows_each, width = param.shape[-2:]
    rows = param.numel() // max(1, width)
    several, n, device = param.dim() == 3, param.shape[:-2].numel(), param.device
    scale = grad_scale if isinstance(grad_scale, Tensor) else torch.full((n,), grad_scale, device=device)
    correction = 1 - betas[0] ** step
    # divided in float64, so that each of several has the bits of the one number
    step_sizes = (lr.double() / correction).float() if isinstance(lr, Tensor) else None
    assert several == (step_sizes is not None), "several dictionaries have a learning rate each"
    block = triton.next_power_of_2(width) if unit_norm else FLAT
    kernel = _adam_rows if unit_norm else _adam_flat
    kernel[(rows if unit_norm else triton.cdiv(param.numel(), FLAT),)](
        param.detach(), grad.detach().contiguous(), exp_avg, exp_avg_sq, scale,
        param if frozen is None else frozen.to(torch.uint8),
        scale if step_sizes is None else step_sizes, param.numel(), width, rows_each,
        0.0 if isinstance(lr, Tensor) else float(lr / correction), float(betas[0]), float(betas[1]),
        float(1 / (1 - betas[1] ** step) ** 0.5), float(eps),
        BLOCK=block, FROZEN=frozen is not None, SEVERAL=several,
        num_warps=8 if block >= 4096 else 4, **OPTIONS,
    )  # fmt: skip
