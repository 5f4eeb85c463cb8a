"""The fast path on CPUs: numba loops over rows or latents, accumulating in float32, no atomics.

Every loop writes each output element from one thread in a fixed order, so the bits do not depend on the number
of threads. The encoder product itself is torch's, in bfloat16 where the CPU multiplies it natively.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["decode", "encode_topk", "jit", "native_bfloat16", "set_threads", "transposed_index"]

_F = TypeVar("_F", bound=Callable[..., Any])

BLOCK = 32
"""Pre-activations per block in the selection: one maximum is kept for each."""

SPARE = 8
"""Candidates beyond k (at least; k / 4 if that is more) that are scored again in float32, so that rounding rarely
drops one of the true k."""


def jit(**options: Any) -> Callable[[_F], _F]:
    """numba's njit with our settings; typed, which numba's own decorator is not."""
    fastmath = {"contract", "reassoc", "nsz"}
    return cast("Callable[[_F], _F]", njit(cache=True, fastmath=fastmath, nogil=True, **options))


@functools.cache
def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX512-BF16 or AMX), and torch uses it."""
    capability = torch.backends.cpu.get_cpu_capability()
    supports = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return "AVX512" in capability and bool(supports and supports())


# -- encode ----------------------------------------------------------------------------------------


@jit(parallel=True)
def _select(ordered: Any, n_keep: int, candidates: Any) -> None:
    """The n_keep largest entries of each row of a non-negative-ordered integer matrix, ties to lower columns.

    Block maxima first: the n_keep-th largest of them bounds the n_keep-th largest entry from below, so only
    blocks that reach the bound are looked at. Negative integers (negative floats) never count.
    """
    n_rows, n_columns = ordered.shape
    n_blocks = (n_columns + BLOCK - 1) // BLOCK
    for row in prange(n_rows):
        maxima = np.empty(n_blocks, dtype=ordered.dtype)
        for block in range(n_blocks):
            start = block * BLOCK
            stop = min(start + BLOCK, n_columns)
            largest = ordered[row, start]
            for column in range(start, stop):
                largest = max(largest, ordered[row, column])
            maxima[block] = largest
        bound = 0
        if n_blocks > n_keep:
            bound = np.partition(maxima, n_blocks - n_keep)[n_blocks - n_keep]
        bound = max(bound, 0)
        n_found = 0
        found = np.empty(n_columns, dtype=np.int64)
        for block in range(n_blocks):
            if maxima[block] >= bound:
                start = block * BLOCK
                for column in range(start, min(start + BLOCK, n_columns)):
                    if ordered[row, column] >= bound:
                        # value in the high bits, reversed column in the low: sorts ties to lower columns
                        found[n_found] = (np.int64(ordered[row, column]) << 31) | (n_columns - 1 - column)
                        n_found += 1
        keys = found[:n_found]
        if n_found > n_keep:
            keys = np.partition(keys, n_found - n_keep)[n_found - n_keep :]
        n_kept = min(n_found, n_keep)
        for i in range(n_kept):
            candidates[row, i] = n_columns - 1 - (keys[i] & 0x7FFFFFFF)
        for i in range(n_kept, n_keep):
            candidates[row, i] = -1


@jit(parallel=True)
def _rescore(x: Any, W_enc_t: Any, b_enc: Any, candidates: Any, k: int, acts: Any, indices: Any) -> None:
    """Exact float32 pre-activations of the candidates; the k largest positive ones are kept."""
    n_rows, n_candidates = candidates.shape
    d_in = x.shape[1]
    for row in prange(n_rows):
        scores = np.empty(n_candidates, dtype=np.float32)
        columns = np.empty(n_candidates, dtype=np.int64)
        n_valid = 0
        for i in range(n_candidates):
            latent = candidates[row, i]
            if latent < 0:
                continue
            total = np.float32(0.0)
            for d in range(d_in):
                total += x[row, d] * W_enc_t[latent, d]
            scores[n_valid] = total + b_enc[latent]
            columns[n_valid] = latent
            n_valid += 1
        n_kept = 0
        for _ in range(min(k, n_valid)):
            best = -1
            for i in range(n_valid):
                if columns[i] >= 0 and (
                    best < 0
                    or scores[i] > scores[best]
                    or (scores[i] == scores[best] and columns[i] < columns[best])
                ):
                    best = i
            acts[row, n_kept] = max(scores[best], np.float32(0.0))
            indices[row, n_kept] = columns[best]
            columns[best] = -1
            n_kept += 1
        for i in range(n_kept, k):  # fewer positive pre-activations than k: silent entries
            acts[row, i] = 0.0
            indices[row, i] = 0


def _top_candidates(x: Tensor, W_enc: Tensor, b_enc: Tensor, n_keep: int) -> NDArray[np.int32]:
    """Columns of the largest approximate pre-activations; -1 where a row has fewer positive ones."""
    if native_bfloat16():
        pre_acts = torch.addmm(b_enc.bfloat16(), x.bfloat16(), W_enc.bfloat16())
        ordered = pre_acts.view(torch.int16).numpy()
    else:
        ordered = torch.addmm(b_enc, x, W_enc).view(torch.int32).numpy()
    candidates = np.empty((x.shape[0], n_keep), dtype=np.int32)
    _select(ordered, n_keep, candidates)
    return candidates


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        centred = (x - b_pre).contiguous()
        W_enc_t = W_enc.T.contiguous()  # free when W_enc is stored latent by latent, as ours is
        n_keep = min(k + max(SPARE, k // 4), W_enc.shape[1])
        candidates = _top_candidates(centred, W_enc, b_enc, n_keep)
        acts = torch.empty(x.shape[0], k)
        indices = torch.empty(x.shape[0], k, dtype=torch.int32)
        _rescore(
            centred.numpy(),
            W_enc_t.numpy(),
            b_enc.contiguous().numpy(),
            candidates,
            k,
            acts.numpy(),
            indices.numpy(),
        )
        ctx.save_for_backward(centred, W_enc_t, acts, indices)
        ctx.mark_non_differentiable(indices)
        return acts, indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        centred, W_enc_t, acts, indices = ctx.saved_tensors
        grad_pre = (grads[0] * (acts > 0)).contiguous()
        grad_x = grad_W = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(centred)
            _gather(
                grad_pre.numpy(),
                indices.numpy(),
                W_enc_t.numpy(),
                np.zeros(centred.shape[1], np.float32),
                grad_x.numpy(),
            )
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            ptr, entries = transposed_index(indices, W_enc_t.shape[0])
            grad_W_t, grad_b = torch.empty_like(W_enc_t), torch.empty(W_enc_t.shape[0])
            _scatter(
                grad_pre.view(-1).numpy(),
                centred.numpy(),
                ptr,
                entries,
                indices.shape[1],
                grad_W_t.numpy(),
                grad_b.numpy(),
            )
            grad_W = grad_W_t.T
        return grad_x, grad_W, grad_b, None, None


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"],
    k: int,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """See `kernels.encode_topk`."""
    apply = cast(Any, _EncodeTopK.apply)
    return cast(tuple[Tensor, Tensor], apply(x, W_enc, b_enc, b_pre, k))


# -- decode ----------------------------------------------------------------------------------------


@jit(parallel=True)
def _gather(acts: Any, indices: Any, W: Any, bias: Any, out: Any) -> None:
    """out[row] = bias + sum_i acts[row, i] * W[indices[row, i]]."""
    n_rows, k = acts.shape
    width = W.shape[1]
    for row in prange(n_rows):
        for d in range(width):
            out[row, d] = bias[d]
        for i in range(k):
            act = acts[row, i]
            if act != 0.0:
                latent = indices[row, i]
                for d in range(width):
                    out[row, d] += act * W[latent, d]


@jit(parallel=True)
def _dots(grad: Any, indices: Any, W: Any, out: Any) -> None:
    """out[row, i] = grad[row] . W[indices[row, i]]."""
    n_rows, k = indices.shape
    width = W.shape[1]
    for row in prange(n_rows):
        for i in range(k):
            latent = indices[row, i]
            total = np.float32(0.0)
            for d in range(width):
                total += grad[row, d] * W[latent, d]
            out[row, i] = total


@jit()
def _count_sort(indices: Any, ptr: Any, entries: Any) -> None:
    """Entry numbers grouped by latent, in order within each: a counting sort."""
    for e in range(indices.shape[0]):
        ptr[indices[e] + 1] += 1
    for latent in range(ptr.shape[0] - 1):
        ptr[latent + 1] += ptr[latent]
    cursor = ptr[:-1].copy()
    for e in range(indices.shape[0]):
        latent = indices[e]
        entries[cursor[latent]] = e
        cursor[latent] += 1


@jit(parallel=True)
def _scatter(weights: Any, rows: Any, ptr: Any, entries: Any, k: int, out: Any, totals: Any) -> None:
    """out[latent] = sum over its entries of weights[entry] * rows[entry // k]; totals[latent] = sum of weights."""
    n_latents, width = out.shape
    for latent in prange(n_latents):
        for d in range(width):
            out[latent, d] = 0.0
        total = np.float32(0.0)
        for position in range(ptr[latent], ptr[latent + 1]):
            entry = entries[position]
            weight = weights[entry]
            if weight != 0.0:
                total += weight
                row = entry // k
                for d in range(width):
                    out[latent, d] += weight * rows[row, d]
        totals[latent] = total


def transposed_index(
    indices: Int[Tensor, "batch k"], d_sae: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Which entries (row * k + i) belong to each latent: pointers of length d_sae + 1, and entry numbers."""
    flat = indices.contiguous().view(-1).numpy()
    ptr = np.zeros(d_sae + 1, dtype=np.int64)
    entries = np.empty(flat.shape[0], dtype=np.int32)
    _count_sort(flat, ptr, entries)
    return ptr, entries


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        acts, W_dec = acts.contiguous(), W_dec.contiguous()
        indices = indices.to(torch.int32).contiguous()
        out = torch.empty(acts.shape[0], W_dec.shape[1])
        _gather(acts.numpy(), indices.numpy(), W_dec.numpy(), b_dec.contiguous().numpy(), out.numpy())
        ctx.save_for_backward(acts, indices, W_dec)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        acts, indices, W_dec = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_acts = grad_W = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_acts = torch.empty_like(acts)
            _dots(grad.numpy(), indices.numpy(), W_dec.numpy(), grad_acts.numpy())
        if ctx.needs_input_grad[2]:
            ptr, entries = transposed_index(indices, W_dec.shape[0])
            grad_W, totals = torch.empty_like(W_dec), np.empty(W_dec.shape[0], np.float32)
            _scatter(
                acts.view(-1).numpy(), grad.numpy(), ptr, entries, indices.shape[1], grad_W.numpy(), totals
            )
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


def set_threads(n: int) -> None:
    """Let numba use n threads; its OpenMP layer would else set torch's number to its own."""
    numba.set_num_threads(max(1, min(n, numba.config.NUMBA_NUM_THREADS)))
