"""Schedule-free sign descent in one pass over a parameter, its gradient, base and average. Knows no dictionary."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sememe.kernels.gpu.optimiser import FLAT
from sememe.kernels.gpu.sparse import OPTIONS

__all__ = ["signum_step"]


@triton.jit
def _signum_flat(
    param, grad, base, average, average_weights, frozen, n, width, lr, momentum,
    BLOCK: tl.constexpr, FROZEN: tl.constexpr,
):  # fmt: skip
    """One step for a block of elements."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    if FROZEN:
        inside = inside & (tl.load(frozen + place // width, mask=inside, other=1).to(tl.int32) == 0)
    g = tl.load(grad + place, mask=inside, other=0.0)
    # a NaN stays one: its sign is none
    sign = tl.where(g > 0.0, 1.0, tl.where(g < 0.0, -1.0, g))
    z = tl.load(base + place, mask=inside, other=0.0) - lr * sign
    a = tl.load(average + place, mask=inside, other=0.0)
    a += tl.load(average_weights + place // width, mask=inside, other=0.0) * (z - a)
    tl.store(base + place, z, mask=inside)
    tl.store(average + place, a, mask=inside)
    tl.store(param + place, z + momentum * (a - z), mask=inside)


@triton.jit
def _signum_rows(
    param, grad, base, average, average_weights, frozen, n, width, lr, momentum,
    BLOCK: tl.constexpr, FROZEN: tl.constexpr,
):  # fmt: skip
    """One step for a row that keeps norm 1, base and parameter both."""
    column = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    inside = column < width
    if FROZEN:
        # a whole block of the one flag: the interpreter takes no mask made of a scalar
        inside = inside & (tl.load(frozen + row + 0 * column, mask=inside, other=1).to(tl.int32) == 0)
    place = row * width + column
    p = tl.load(param + place, mask=inside, other=0.0)
    g = tl.load(grad + place, mask=inside, other=0.0)
    g -= tl.sum(g * p) * p
    sign = tl.where(g > 0.0, 1.0, tl.where(g < 0.0, -1.0, g))
    z = tl.load(base + place, mask=inside, other=0.0) - lr * sign
    z = tl.where(inside, z, 0.0)
    z = z / tl.maximum(tl.sqrt(tl.sum(z * z)), 1e-12)
    a = tl.load(average + place, mask=inside, other=0.0)
    a += tl.load(average_weights + row) * (z - a)
    y = tl.where(inside, z + momentum * (a - z), 0.0)
    y = y / tl.maximum(tl.sqrt(tl.sum(y * y)), 1e-12)
    tl.store(base + place, z, mask=inside)
    tl.store(average + place, a, mask=inside)
    tl.store(param + place, y, mask=inside)


def signum_step(
    param: Tensor,
    grad: Tensor,
    base: Tensor,
    average: Tensor,
    weight: Tensor,
    lr: float,
    momentum: float,
    unit_norm: bool,
    frozen: Tensor | None = None,
) -> None:
    """See `kernels.signum_step`. Parameter, base and average must be contiguous."""
    rows, width = param.shape
    block = triton.next_power_of_2(width) if unit_norm else FLAT
    kernel = _signum_rows if unit_norm else _signum_flat
    kernel[(rows if unit_norm else triton.cdiv(param.numel(), FLAT),)](
        param.detach(), grad.detach().contiguous(), base, average, weight.contiguous(),
        param if frozen is None else frozen.to(torch.uint8), param.numel(), width, float(lr), float(momentum),
        BLOCK=block, FROZEN=frozen is not None, num_warps=8 if block >= 4096 else 4, **OPTIONS,
    )  # fmt: skip
