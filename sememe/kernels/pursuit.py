"""Matching pursuit on CPUs: numba loops over rows, no atomics. Knows tensors, no dictionary.

Correlations of a row with every latent are kept up to date through rows of the Gram matrix instead of being
multiplied again at each step: k + 1 encoder products become one, one product of the directions with themselves, and k
additions per row and latent. Both products are in bfloat16 where the CPU multiplies it natively, and the Gram matrix is
kept in 8 bits, each row in steps of its own size; a latent is accepted, and its activation computed, only with its
exact float32 correlation with the residual.

The backward pass holds nothing per step but activations, indices and one number each: residuals are rebuilt from the
last one by adding back what each step took.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

from sememe.kernels.cpu import native_bfloat16

__all__ = ["matching_pursuit"]

_F = TypeVar("_F", bound=Callable[..., Any])

LANES = 32
"""Correlations per maximum that is kept. Latents b, b + n, b + 2 n, ... share one: all are found side by side."""

LEAST = np.float32(np.finfo(np.float32).min)
"""Less than any score; not infinite, for infinity times 0 is not a number."""

STALE = 0.125
"""Scores are computed afresh once the residual's norm has fallen to this share."""

GRAM_BYTES = 1 << 30
"""The Gram matrix is used up to this size; above it, each step multiplies the residuals with every direction."""

SCORES = 2**21
"""Correlations of rows with latents that are held at once: 8 MB in float32."""

CODES = 127
"""The largest of the numbers that stand for a row of the Gram matrix."""

CODED = np.float32(4 * (2 / 12) ** 0.5)
"""Four standard deviations of the difference of two numbers that were rounded to whole ones."""

COLUMNS = 16
"""Columns of the input per thread come in multiples of this: a cache line."""


def _jit(**options: Any) -> Callable[[_F], _F]:
    """numba's njit; without NaN, so that maxima become vector instructions."""
    fastmath = {"contract", "reassoc", "nsz", "nnan"}
    return cast("Callable[[_F], _F]", njit(cache=True, fastmath=fastmath, nogil=True, **options))


@_jit()
def _dot(a: Any, b: Any) -> Any:
    total = np.float32(0.0)
    for d in range(a.shape[0]):
        total += a[d] * b[d]
    return total


@_jit()
def _maxima(scores: Any, out: Any) -> None:
    """The largest of scores[b], scores[b + n], ... for each b of n = out.shape[0]: whole vectors at a time."""
    n = out.shape[0]
    for b in range(n):
        out[b] = scores[b]
    for lane in range(1, LANES):
        for b in range(n):
            out[b] = max(out[b], scores[lane * n + b])


@_jit()
def _choose(scores: Any, maxima: Any, slack: Any, rounding: Any, residual: Any, W: Any) -> Any:
    """The latent that correlates most with the residual, ties to the lower one, and its exact correlation.

    Every latent whose score is so near the largest that rounding may have changed their order is multiplied again, in
    float32. -1 if none is positive.
    """
    n = maxima.shape[0]
    top = maxima[0]
    for b in range(n):
        top = max(top, maxima[b])
    bound = top - slack - rounding * abs(top)
    chosen, largest = -1, np.float32(0.0)
    for b in range(n):
        if maxima[b] >= bound:
            for lane in range(LANES):
                i = lane * n + b
                if scores[i] >= bound and i < W.shape[0]:
                    exact = _dot(residual, W[i])
                    if exact > largest or (exact == largest and i < chosen):
                        chosen, largest = i, exact
    return chosen, largest


@_jit()
def _widen(bits: Any, out: Any) -> None:
    """bfloat16, as 16-bit integers, to float32."""
    words = out.view(np.int32)
    for i in range(bits.shape[0]):
        words[i] = np.int32(bits[i]) << 16


@_jit()
def _start(scores: Any, narrow: bool) -> Any:
    """Scores in float32, filled up to whole lanes with what is never chosen, and their maxima."""
    d_sae = scores.shape[0]
    n = (d_sae + LANES - 1) // LANES
    current = np.full(n * LANES, LEAST, dtype=np.float32)
    if narrow:
        _widen(scores, current)
    else:
        current[:d_sae] = scores
    maxima = np.empty(n, dtype=np.float32)
    _maxima(current, maxima)
    return current, maxima


@_jit(parallel=True)
def _code(block: Any, first: int, codes: Any, sizes: Any) -> None:
    """Rows of the Gram matrix from `first` on in whole numbers, and the size of 1 in each; the diagonal, which is 1
    and would make the others coarse, is left out."""
    for row in prange(block.shape[0]):
        own, most = first + row, np.float32(1e-30)
        block[row, own] = np.float32(0.0)
        for i in range(block.shape[1]):
            most = max(most, abs(block[row, i]))
        size = most / np.float32(CODES)
        sizes[own] = size
        inverse = np.float32(1.0) / size
        for i in range(block.shape[1]):
            codes[own, i] = np.int8(np.rint(block[row, i] * inverse))


@_jit(parallel=True)
def _pursue_gram(
    scores: Any,
    codes: Any,
    sizes: Any,
    narrow: bool,
    slack: Any,
    rounding: Any,
    W: Any,
    acts: Any,
    indices: Any,
    residual: Any,
) -> None:
    """k steps for every row. `scores` holds bfloat16 bits if narrow, else float32; residual starts as x."""
    n_rows, k = acts.shape
    d_sae, width = W.shape
    for row in prange(n_rows):
        current, maxima = _start(scores[row], narrow)
        coarse = np.float32(0.0)  # the sum of squares of what whole numbers stood for
        acts[row] = 0.0
        indices[row] = 0
        norm = np.sqrt(_dot(residual[row], residual[row]))
        for t in range(k):
            unsure = slack * norm + CODED * np.sqrt(coarse)
            latent, act = _choose(current, maxima, unsure, rounding, residual[row], W)
            if latent < 0:
                break
            acts[row, t] = act
            indices[row, t] = latent
            for d in range(width):
                residual[row, d] -= act * W[latent, d]
            if t + 1 == k:
                break
            left = np.sqrt(_dot(residual[row], residual[row]))
            if left < STALE * norm:
                # what is left is small beside the rounding of the scores: start again from exact ones
                norm, coarse = left, np.float32(0.0)
                for i in range(d_sae):
                    current[i] = _dot(residual[row], W[i])
            else:
                step, change = act * sizes[latent], codes[latent]
                coarse += step * step
                for before in range(t):  # a latent taken again is wrong by the same numbers: they add up
                    if indices[row, before] == latent:
                        coarse += np.float32(2) * step * sizes[latent] * acts[row, before]
                for i in range(d_sae):
                    current[i] -= step * np.float32(change[i])
                current[latent] -= act
            _maxima(current, maxima)


@_jit(parallel=True)
def _pursue_once(
    scores: Any, narrow: bool, slack: Any, rounding: Any, W: Any, acts: Any, indices: Any, residual: Any
) -> None:
    """One step for every row, from scores of the current residuals; acts and indices are of that step."""
    for row in prange(scores.shape[0]):
        current, maxima = _start(scores[row], narrow)
        norm = np.sqrt(_dot(residual[row], residual[row]))
        latent, act = _choose(current, maxima, slack * norm, rounding, residual[row], W)
        acts[row] = act
        indices[row] = max(latent, 0)
        if latent >= 0:
            for d in range(W.shape[1]):
                residual[row, d] -= act * W[latent, d]


@_jit(parallel=True)
def _adjoints(grad_acts: Any, indices: Any, acts: Any, W: Any, grad: Any, adjoints: Any) -> None:
    """Per step, the derivative by its activation, all later steps included; `grad` goes from the derivative by the last
    residual to that by the input."""
    n_rows, k = acts.shape
    for row in prange(n_rows):
        for back in range(k):
            t = k - 1 - back
            adjoints[row, t] = 0.0
            if acts[row, t] > 0.0:
                latent = indices[row, t]
                adjoint = grad_acts[row, t] - _dot(grad[row], W[latent])
                adjoints[row, t] = adjoint
                for d in range(W.shape[1]):
                    grad[row, d] += adjoint * W[latent, d]


@_jit(parallel=True)
def _grad_directions(
    acts: Any, adjoints: Any, indices: Any, W: Any, last: Any, grad_last: Any, edges: Any, out: Any
) -> None:
    """out[latent] += adjoint * (residual before the step) - act * (derivative by the residual after it).

    Each thread owns some columns of all latents and goes through the rows in order.
    """
    n_rows, k = acts.shape
    for part in prange(edges.shape[0] - 1):
        start, stop = edges[part], edges[part + 1]
        out[:, start:stop] = 0.0
        residual = np.empty(stop - start, dtype=np.float32)
        grad = np.empty(stop - start, dtype=np.float32)
        for row in range(n_rows):
            residual[:] = last[row, start:stop]
            grad[:] = grad_last[row, start:stop]
            for back in range(k):
                t = k - 1 - back
                act = acts[row, t]
                if act > 0.0:
                    latent, adjoint = indices[row, t], adjoints[row, t]
                    for d in range(stop - start):
                        direction = W[latent, start + d]
                        residual[d] += act * direction
                        out[latent, start + d] += adjoint * residual[d] - act * grad[d]
                        grad[d] += adjoint * direction


def _product(a: Tensor, b: Tensor, narrow: bool) -> NDArray[Any]:
    """a @ b.T, as the bits of bfloat16 if narrow."""
    if narrow:
        return (a.bfloat16() @ b.bfloat16().T).view(torch.int16).numpy()
    return (a @ b.T).numpy()


def _gram(W: Tensor, narrow: bool) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Products of directions with each other, coded, and the size of 1 in each row; some rows at a time."""
    n = W.shape[0]
    codes, sizes = np.empty((n, n), np.int8), np.empty(n, np.float32)
    rows, n_rows = W.bfloat16() if narrow else W, max(1, SCORES // n)
    for start in range(0, n, n_rows):
        block = (rows[start : start + n_rows] @ rows.T).float()
        _code(block.numpy(), start, codes, sizes)
    return codes, sizes


class _Pursuit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b_pre: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        residual, W = (x - b_pre).contiguous(), W.contiguous()
        n_rows, d_sae = x.shape[0], W.shape[0]
        acts = torch.empty(n_rows, k)
        indices = torch.empty(n_rows, k, dtype=torch.int32)
        narrow = native_bfloat16()
        # Both factors are rounded to 1 in 2^9, and errors of many products add up like the root of their number:
        # four standard deviations, for each of two scores. The product itself is rounded once more.
        slack = np.float32(8 * (2 / 3) ** 0.5 * 2**-9 * float(W.abs().max()) if narrow else 1e-6)
        rounding = np.float32(2**-8 if narrow else 1e-6)
        options = narrow, slack, rounding, W.numpy()
        by_gram = k * n_rows > d_sae and d_sae**2 <= GRAM_BYTES
        gram = _gram(W, narrow) if by_gram else None
        size = max(1, SCORES // d_sae)
        for start in range(0, n_rows, size):
            rows = slice(start, start + size)
            left, own = residual[rows], (acts[rows].numpy(), indices[rows].numpy())
            if gram is not None:
                codes, sizes = gram
                _pursue_gram(_product(left, W, narrow), codes, sizes, *options, *own, left.numpy())
                continue
            for t in range(k):
                step = [part[:, t] for part in own]
                scores = _product(left, W, narrow)
                _pursue_once(scores, *options, step[0], step[1], left.numpy())
        ctx.save_for_backward(W, acts, indices, residual)
        ctx.mark_non_differentiable(indices)
        return acts, indices, residual

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        W, acts, indices, residual = ctx.saved_tensors
        grad_last = grads[2].contiguous()
        grad, adjoints = grad_last.clone(), torch.empty_like(acts)
        arrays = acts.numpy(), W.numpy(), indices.numpy()
        _adjoints(
            grads[0].contiguous().numpy(), arrays[2], arrays[0], arrays[1], grad.numpy(), adjoints.numpy()
        )
        grad_W = None
        if ctx.needs_input_grad[1]:
            grad_W = torch.empty_like(W)
            n_lines = -(-W.shape[1] // COLUMNS)
            n_parts = min(n_lines, numba.get_num_threads())
            lines = np.arange(n_parts + 1) * n_lines // n_parts
            edges = np.minimum(lines * COLUMNS, W.shape[1])
            _grad_directions(
                arrays[0], adjoints.numpy(), arrays[2], arrays[1], residual.numpy(), grad_last.numpy(), edges,
                grad_W.numpy(),
            )  # fmt: skip
        return grad, grad_W, -grad.sum(0), None


def matching_pursuit(
    x: Float[Tensor, "batch d_in"], W: Float[Tensor, "d_sae d_in"], b_pre: Float[Tensor, " d_in"], k: int
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"], Float[Tensor, "batch d_in"]]:
    """See `kernels.matching_pursuit`; steps are not merged."""
    apply = cast(Any, _Pursuit.apply)
    return cast(tuple[Tensor, Tensor, Tensor], apply(x, W, b_pre, k))
