"""The fast path on CUDA devices: Triton kernels for the sparse products. No atomics: same bits every time.

Each has the contract of its namesake in `reference.py`. The weights' gradient goes through a transposed index
(which entries belong to each latent), made on the device by a sort.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["decode"]

BLOCK = 128
"""Features per program."""


@triton.jit
def _gather(
    acts, indices, weights, bias, out, k, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row] = bias + sum_i acts[row, i] * weights[indices[row, i]], one block of features per program."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.load(bias + columns, mask=inside, other=0.0)
    for i in range(k):
        act = tl.load(acts + row * k + i)
        latent = tl.load(indices + row * k + i).to(tl.int64)
        total += act * tl.load(weights + latent * width + columns, mask=inside, other=0.0)
    tl.store(out + row * width + columns, total, mask=inside)


@triton.jit
def _dots(
    grad, indices, weights, out, k, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row, i] = grad[row] . weights[indices[row, i]]."""
    row = tl.program_id(0)
    i = tl.program_id(1)
    latent = tl.load(indices + row * k + i).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        left = tl.load(grad + row * width + columns, mask=inside, other=0.0)
        right = tl.load(weights + latent * width + columns, mask=inside, other=0.0)
        total += left * right
    tl.store(out + row * k + i, tl.sum(total))


@triton.jit
def _scatter(
    acts, entries, ptr, rows, out, k, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[latent] = sum over its entries of acts[entry] * rows[entry // k]."""
    latent = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    first = tl.load(ptr + latent)
    last = tl.load(ptr + latent + 1)
    for place in range(first, last):
        entry = tl.load(entries + place)
        act = tl.load(acts + entry)
        total += act * tl.load(rows + (entry // k) * width + columns, mask=inside, other=0.0)
    tl.store(out + latent * width + columns, total, mask=inside)


def _blocks(width: int) -> int:
    return -(-width // BLOCK)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        acts, indices, W_dec = acts.contiguous(), indices.to(torch.int32).contiguous(), W_dec.contiguous()
        batch, k = acts.shape
        width = W_dec.shape[1]
        out = torch.empty(batch, width, device=acts.device)
        _gather[(batch, _blocks(width))](acts, indices, W_dec, b_dec.contiguous(), out, k, width, BLOCK=BLOCK)
        ctx.save_for_backward(acts, indices, W_dec)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        acts, indices, W_dec = ctx.saved_tensors
        grad = grads[0].contiguous()
        batch, k = acts.shape
        d_sae, width = W_dec.shape
        grad_acts = grad_W = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_acts = torch.empty_like(acts)
            _dots[(batch, k)](grad, indices, W_dec, grad_acts, k, width, BLOCK=BLOCK)
        if ctx.needs_input_grad[2]:
            flat = indices.view(-1).long()
            entries = torch.argsort(flat, stable=True)
            counts = torch.bincount(flat, minlength=d_sae)
            ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            grad_W = torch.empty_like(W_dec)
            _scatter[(d_sae, _blocks(width))](acts, entries, ptr, grad, grad_W, k, width, BLOCK=BLOCK)
        if ctx.needs_input_grad[3]:
            grad_b = grad.sum(0)
        return grad_acts, None, grad_W, grad_b


def decode(
    acts: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"],
) -> Float[Tensor, "batch d_out"]:
    """See `kernels.decode`."""
    apply = cast(Any, _Decode.apply)
    return cast(Tensor, apply(acts, indices, W_dec, b_dec))
