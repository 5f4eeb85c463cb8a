"""Sums over sparse activations, compiled by numba: serial over a range of rows or latents, without the GIL.

Knows arrays, no tensor and no thread: `pool.py` runs ranges side by side. Every loop writes each output element once,
in a fixed order and with float32 accumulators, so the bits do not depend on how many threads share the ranges.

Sparse activations come as in `Encoded`: flat `acts` and `indices`, and `ptr`, where each row starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

__all__ = [
    "count_active",
    "count_latents",
    "decode",
    "dots",
    "dots_by_tiles",
    "dots_of_row",
    "jit",
    "mark_fired",
    "place_entries",
    "reconstruct",
    "reconstruct_by_tiles",
    "reconstruct_prefixes",
    "scatter",
    "scatter_by_blocks",
]

_F = TypeVar("_F", bound=Callable[..., Any])


def jit(function: _F) -> _F:
    """numba's njit with our settings; typed, which numba's own decorator is not.

    Divisions are those of the processor: Python's check for a divisor of 0 would keep loops from being vectorised.
    """
    fastmath = {"contract", "reassoc", "nsz"}
    return cast("_F", njit(cache=True, fastmath=fastmath, nogil=True, error_model="numpy")(function))


# -- four rows at a time: one vector is read once for all of them, and their latencies overlap --------


@jit
def dots_of_row(vector: Any, weights: Any, latents: Any, out: Any) -> None:
    """out[i] = vector . weights[latents[i]]."""
    n, width = latents.shape[0], vector.shape[0]
    for i in range(0, n - 3, 4):
        w0, w1, w2, w3 = (
            weights[latents[i]],
            weights[latents[i + 1]],
            weights[latents[i + 2]],
            weights[latents[i + 3]],
        )
        t0, t1, t2, t3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for d in range(width):
            t0 += vector[d] * w0[d]
            t1 += vector[d] * w1[d]
            t2 += vector[d] * w2[d]
            t3 += vector[d] * w3[d]
        out[i], out[i + 1], out[i + 2], out[i + 3] = t0, t1, t2, t3
    for i in range(n // 4 * 4, n):
        w0 = weights[latents[i]]
        t0 = np.float32(0.0)
        for d in range(width):
            t0 += vector[d] * w0[d]
        out[i] = t0


@jit
def _add(out: Any, factors: Any, rows: Any, vectors: Any) -> None:
    """out += sum of factors[i] * vectors[rows[i]]."""
    n, width = rows.shape[0], out.shape[0]
    for i in range(0, n - 3, 4):
        f0, f1, f2, f3 = factors[i], factors[i + 1], factors[i + 2], factors[i + 3]
        v0, v1, v2, v3 = vectors[rows[i]], vectors[rows[i + 1]], vectors[rows[i + 2]], vectors[rows[i + 3]]
        for d in range(width):
            out[d] += f0 * v0[d] + f1 * v1[d] + f2 * v2[d] + f3 * v3[d]
    for i in range(n // 4 * 4, n):
        f0, v0 = factors[i], vectors[rows[i]]
        for d in range(width):
            out[d] += f0 * v0[d]


# -- sparse sums -----------------------------------------------------------------------------------


@jit
def decode(
    start: int, stop: int, acts: Any, indices: Any, ptr: Any, weights: Any, bias: Any, out: Any
) -> None:
    """out[row] = bias + sum of acts * weights[indices] over the row's entries."""
    width = weights.shape[1]
    for row in range(start, stop):
        total = out[row]
        for d in range(width):
            total[d] = bias[d]
        _add(total, acts[ptr[row] : ptr[row + 1]], indices[ptr[row] : ptr[row + 1]], weights)


@jit
def dots(start: int, stop: int, vectors: Any, indices: Any, ptr: Any, weights: Any, out: Any) -> None:
    """out[entry] = vectors[its row] . weights[its latent]."""
    for row in range(start, stop):
        first, last = ptr[row], ptr[row + 1]
        dots_of_row(vectors[row], weights, indices[first:last], out[first:last])


@jit
def _first_from(latent: int, indices: Any, begin: int, end: int) -> int:
    """The first entry from `begin` on whose latent is not below this one; `end` if there is none."""
    while begin < end and indices[begin] < latent:
        begin += 1
    return begin


@jit
def dots_by_tiles(
    start: int, stop: int, vectors: Any, indices: Any, ptr: Any, weights: Any, tile: int, out: Any
) -> None:
    """As `dots`, `tile` latents at a time for all rows, so that their weights stay in the cache. Rows are ascending."""
    cursor = ptr[start:stop].copy()
    for first in range(0, weights.shape[0], tile):
        for row in range(start, stop):
            begin = cursor[row - start]
            last = _first_from(first + tile, indices, begin, ptr[row + 1])
            if last > begin:
                dots_of_row(vectors[row], weights, indices[begin:last], out[begin:last])
                cursor[row - start] = last


@jit
def reconstruct(
    start: int, stop: int, acts: Any, indices: Any, ptr: Any, weights: Any, bias: Any, target: Any, error: Any,
    pull: Any,
) -> float:  # fmt: skip
    """error[row] = recon - target, pull[entry] = error[its row] . weights[its latent]; returns the sum of squares.

    Both in one pass: a row's decoder rows are still in the cache when their gradients are taken.
    """
    width = weights.shape[1]
    squares = 0.0
    left = np.empty(width, dtype=np.float32)
    for row in range(start, stop):
        first, last = ptr[row], ptr[row + 1]
        wanted, kept = target[row], error[row]
        for d in range(width):
            left[d] = bias[d] - wanted[d]
        _add(left, acts[first:last], indices[first:last], weights)
        square = np.float32(0.0)
        for d in range(width):
            square += left[d] * left[d]
            kept[d] = left[d]
        squares += float(square)
        dots_of_row(left, weights, indices[first:last], pull[first:last])
    return squares


@jit
def reconstruct_by_tiles(
    start: int, stop: int, acts: Any, indices: Any, ptr: Any, weights: Any, bias: Any, target: Any, tile: int,
    error: Any, pull: Any,
) -> float:  # fmt: skip
    """As `reconstruct`, `tile` latents at a time for all rows, so that their weights stay in the cache.

    Entries that are not in ascending order wait for a later tile: right all the same, but not at hand.
    """
    width = weights.shape[1]
    for row in range(start, stop):
        wanted, left = target[row], error[row]
        for d in range(width):
            left[d] = bias[d] - wanted[d]
    squares = 0.0
    for forward in (True, False):
        cursor = ptr[start:stop].copy()
        for first in range(0, weights.shape[0], tile):
            for row in range(start, stop):
                begin = cursor[row - start]
                last = _first_from(first + tile, indices, begin, ptr[row + 1])
                if last > begin and forward:
                    _add(error[row], acts[begin:last], indices[begin:last], weights)
                elif last > begin:
                    dots_of_row(error[row], weights, indices[begin:last], pull[begin:last])
                cursor[row - start] = last
    for row in range(start, stop):
        square, left = np.float32(0.0), error[row]
        for d in range(width):
            square += left[d] * left[d]
        squares += float(square)
    return squares


@jit
def reconstruct_prefixes(
    start: int, stop: int, acts: Any, indices: Any, ptr: Any, weights: Any, bias: Any, target: Any, ends: Any,
    errors: Any, pull: Any, squares: Any,
) -> None:  # fmt: skip
    """As `reconstruct`, for the reconstructions from the latents below each of several ends, summed.

    Args:
        start, stop: Rows.
        acts, indices, ptr: Entries.
        weights, bias, target: As there.
        ends: Rising numbers of latents, the last being all.
        errors: (prefixes, rows, width), written: the sum of the errors of this prefix and all longer ones, which is
            what a latent that first counts in this prefix is pulled by.
        pull: (entries,), written.
        squares: (prefixes,), added to: sums of squares of each prefix's own error.
    """
    n_ends, width = ends.shape[0], weights.shape[1]
    for row in range(start, stop):
        for p in range(n_ends):
            part = errors[p, row]
            for d in range(width):
                part[d] = 0.0
        first = errors[0, row]
        for d in range(width):
            first[d] = bias[d] - target[row, d]
        for e in range(ptr[row], ptr[row + 1]):
            act, latent = acts[e], indices[e]
            p = 0
            while latent >= ends[p]:
                p += 1
            part = errors[p, row]
            for d in range(width):
                part[d] += act * weights[latent, d]
        for p in range(n_ends):  # sums over shorter prefixes: each prefix's own error
            square = np.float32(0.0)
            part = errors[p, row]
            for d in range(width):
                if p > 0:
                    part[d] += errors[p - 1, row, d]
                square += part[d] * part[d]
            squares[p] += square
        for p in range(n_ends - 2, -1, -1):
            for d in range(width):
                errors[p, row, d] += errors[p + 1, row, d]
        for e in range(ptr[row], ptr[row + 1]):
            latent = indices[e]
            p = 0
            while latent >= ends[p]:
                p += 1
            part = errors[p, row]
            total = np.float32(0.0)
            for d in range(width):
                total += part[d] * weights[latent, d]
            pull[e] = total


@jit
def count_latents(start: int, stop: int, indices: Any, ptr: Any, counts: Any) -> None:
    """counts[latent] += the entries of rows start to stop."""
    for e in range(ptr[start], ptr[stop]):
        counts[indices[e]] += 1


@jit
def place_entries(
    start: int, stop: int, indices: Any, ptr: Any, cursor: Any, entries: Any, rows: Any
) -> None:
    """The second half of a counting sort by latent: each entry of rows start to stop goes to its latent's cursor.

    Args:
        start, stop: Rows.
        indices: The latent of each entry.
        ptr: Where each row starts.
        cursor: (d_sae,), where these rows' first entry of each latent goes; moved on.
        entries: Written: numbers of the entries.
        rows: Written: their rows.
    """
    for row in range(start, stop):
        for e in range(ptr[row], ptr[row + 1]):
            place = cursor[indices[e]]
            entries[place] = e
            rows[place] = row
            cursor[indices[e]] = place + 1


@jit
def mark_fired(acts: Any, indices: Any, marks: Any) -> None:
    """marks[latent] = 1 where it has an entry that is not 0."""
    for e in range(acts.shape[0]):
        if acts[e] != 0:
            marks[indices[e]] = 1


@jit
def count_active(acts: Any, indices: Any, ptr: Any, per_row: Any, per_latent: Any) -> None:
    """Entries that are not 0, by row and by latent, added to what is there."""
    for row in range(ptr.shape[0] - 1):
        for e in range(ptr[row], ptr[row + 1]):
            if acts[e] != 0:
                per_row[row] += 1
                per_latent[indices[e]] += 1


@jit
def scatter(
    start: int, stop: int, factors: Any, scale: Any, vectors: Any, starts: Any, entries: Any, rows: Any, out: Any,
    totals: Any,
) -> None:  # fmt: skip
    """out[latent] = scale * sum of factors[entry] * vectors[its row]; totals[latent] = scale * sum of factors."""
    width = out.shape[1]
    own = np.empty(rows.shape[0], dtype=np.float32)
    for latent in range(start, stop):
        summed = out[latent]
        for d in range(width):
            summed[d] = 0.0
        first, last = starts[latent], starts[latent + 1]
        total = np.float32(0.0)
        for place in range(first, last):
            factor = factors[entries[place]] * scale
            own[place] = factor
            total += factor
        _add(summed, own[first:last], rows[first:last], vectors)
        totals[latent] = total


@jit
def scatter_by_blocks(
    start: int, stop: int, factors: Any, scale: Any, vectors: Any, starts: Any, entries: Any, rows: Any, block: int,
    out: Any, totals: Any,
) -> None:  # fmt: skip
    """As `scatter`, `block` rows at a time for all latents, so that their vectors stay in the cache."""
    width = out.shape[1]
    own = np.empty(rows.shape[0], dtype=np.float32)
    cursor = starts[start:stop].copy()
    for latent in range(start, stop):
        summed = out[latent]
        for d in range(width):
            summed[d] = 0.0
        total = np.float32(0.0)
        for place in range(starts[latent], starts[latent + 1]):
            factor = factors[entries[place]] * scale
            own[place] = factor
            total += factor
        totals[latent] = total
    for first in range(0, vectors.shape[0], block):
        for latent in range(start, stop):
            begin, end = cursor[latent - start], starts[latent + 1]
            last = begin
            while last < end and rows[last] < first + block:
                last += 1
            if last > begin:
                _add(out[latent], own[begin:last], rows[begin:last], vectors)
                cursor[latent - start] = last
