"""The loops that select latents on the CPU, compiled by numba: serial over a range of rows, without the GIL.

Knows arrays, no tensor and no thread, as `sparse_loops.py`, whose sums it uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numba import types
from numba.extending import intrinsic

from sememe.kernels.cpu.sparse_loops import dots, dots_by_tiles, dots_of_row, jit

__all__ = ["above", "group_max", "mark_largest", "near", "quantise", "rescore", "select"]

INFINITE = 0x7F800000
"""The bits of an infinite float32; those of NaN are above."""

DEPTH = 16
"""Pre-activations per block in a selection: one maximum is kept for each."""


_intrinsic = cast("Callable[[Callable[..., Any]], Callable[[Any], Any]]", intrinsic)
"""numba's own, typed: the compiled function is called without the first argument, the context."""


@_intrinsic
def _value(_: Any, entry: Any) -> Any:
    """An entry of a product as a float32: bfloat16 comes as its bits in an uint16, the upper half of a float32's."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if entry == types.float32:
            return arguments[0]
        if entry == types.int32:
            return builder.sitofp(arguments[0], context.get_value_type(types.float32))
        wide = builder.zext(arguments[0], context.get_value_type(types.uint32))
        return builder.bitcast(builder.shl(wide, wide.type(16)), context.get_value_type(types.float32))

    return types.float32(entry), generate


@_intrinsic
def _as_float(_: Any, bits: Any) -> Any:
    """The float32 with these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@_intrinsic
def _as_int(_: Any, value: Any) -> Any:
    """A float32's bits as an int32: in the same order for positive numbers; negative ones are negative."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


@jit
def _key(value: Any, least: Any) -> Any:
    """A number's bits without the sign: in the order of sizes, and NaN the largest. 0 for numbers up to `least`, which
    is 0 where only positive ones count and minus infinity where all do."""
    return _as_int(np.float32(0.0) if value <= least else value) & np.int32(0x7FFFFFFF)


@jit
def quantise(
    start: int, stop: int, origin: int, vectors: Any, factor: Any, out: Any, scales: Any, crests: Any
) -> None:
    """Rows of `vectors * factor` as int8, -127 to 127, and what they have to be multiplied by.

    Args:
        start, stop: Rows.
        origin: The row that is the first of `out`.
        vectors: (rows, width).
        factor: (width,), above 0.
        out: (rows, width), written.
        scales: (rows,), written: the value of 1; NaN where the row holds a NaN or an infinity.
        crests: (rows,), written: each row's largest entry over its root mean square.
    """
    width = vectors.shape[1]
    scaled = np.empty(width, dtype=np.float32)
    for row in range(start, stop):
        bits = np.int32(0)
        vector = vectors[row]
        for d in range(width):
            scaled[d] = vector[d] * factor[d]
            bits = max(bits, _as_int(abs(scaled[d])))  # NaN is the largest
        largest = _as_float(bits) if bits > 0 else np.float32(1e-30)
        inverse = np.float32(127.0) / largest
        narrow, square = out[row - origin], np.float32(0.0)
        for d in range(width):
            value = scaled[d] * inverse
            square += value * value
            narrow[d] = np.int32(np.rint(value))
        scales[row] = largest / np.float32(127.0) if bits < INFINITE else np.float32(np.nan)
        crests[row] = np.float32(127.0) / np.sqrt(square / np.float32(width)) if bits > 0 else np.float32(1.0)


@jit
def _n_blocks(n_columns: int, least: int) -> int:
    """Into how many blocks columns are divided: at least so many, and as many as make them DEPTH columns each.

    Whole vectors, and an odd number of them: a block's columns would else all share the same few places of the cache.
    """
    n = max(1, max(n_columns // DEPTH, min(n_columns, least)))
    return 16 * (n // 16 | 1) if n + 16 <= n_columns else n


@jit
def select(
    product: Any, scale: Any, unit: Any, lift: Any, bias: Any, n_keep: int, signed: bool, candidates: Any
) -> None:
    """Columns of the n_keep largest positive `product * unit * scale + bias` of each row; -1 fills up.

    Ties go to lower columns. What is negative by less than the row's `lift` counts as positive. If `signed`, those
    furthest from 0.

    Columns are seen as blocks of DEPTH, a block being every n_blocks-th column, so that block maxima are taken side by
    side. The n_keep-th largest maximum bounds the n_keep-th largest entry from below: only blocks that reach it are
    looked into. Numbers are compared as int32, where NaN is the largest, so that it is not lost.
    """
    n_rows, n_columns = product.shape
    n_blocks = _n_blocks(n_columns, 2 * n_keep)
    least = np.float32(-np.inf if signed else 0.0)
    lowest = np.int32(0 if signed else 1)  # the bits of the smallest number that counts
    maxima = np.empty(n_blocks, dtype=np.int32)
    blocks = np.empty(n_blocks + 1, dtype=np.int32)
    found = np.empty(n_columns + 1, dtype=np.int32)
    keys = np.empty(n_columns + 1, dtype=np.int32)
    for row in range(n_rows):
        entries = product[row]
        u, up = unit[row], lift[row]
        for j in range(n_blocks):
            maxima[j] = _key(_value(entries[j]) * u * scale[j] + bias[j] + up, least)
        for start in range(n_blocks, n_columns, n_blocks):
            stop = min(start + n_blocks, n_columns)
            part, part_scale, part_bias = entries[start:stop], scale[start:stop], bias[start:stop]
            for j in range(stop - start):
                maxima[j] = max(
                    maxima[j], _key(_value(part[j]) * u * part_scale[j] + part_bias[j] + up, least)
                )
        largest = maxima[0]
        for j in range(n_blocks):
            largest = max(largest, maxima[j])
        bound = lowest
        if n_blocks > n_keep and largest > 0:
            low, high = np.int32(0), (largest >> np.int32(16)) + np.int32(1)  # upper halves are close enough
            while high - low > 1:
                middle = (low + high) >> np.int32(1)
                bar = middle << np.int32(16)
                count = np.int32(0)
                for j in range(n_blocks):
                    count += np.int32(1) if maxima[j] >= bar else np.int32(0)
                if count >= n_keep:
                    low = middle
                else:
                    high = middle
            bound = max(low << np.int32(16), lowest)

        n_reaching = 0
        for j in range(n_blocks):  # without a branch: the store is undone by the next one
            blocks[n_reaching] = j
            n_reaching += maxima[j] >= bound
        n_found = 0
        for i in range(n_reaching):
            for column in range(blocks[i], n_columns, n_blocks):
                key = _key(_value(entries[column]) * u * scale[column] + bias[column] + up, least)
                found[n_found] = column
                keys[n_found] = key
                n_found += key >= bound

        if n_found <= n_keep:
            for i in range(n_found):
                candidates[row, i] = found[i]
            for i in range(n_found, n_keep):
                candidates[row, i] = -1
            continue
        last = _nth_largest(keys, n_found, n_keep, bound, largest)
        n_kept, n_ties = 0, 0
        for i in range(n_found):
            if keys[i] > last:
                candidates[row, n_kept] = found[i]
                n_kept += 1
            elif keys[i] == last:
                found[n_ties] = found[i]
                n_ties += 1
        while n_kept < n_keep:
            first = 0
            for i in range(1, n_ties):
                if found[i] < found[first]:
                    first = i
            candidates[row, n_kept] = found[first]
            n_kept += 1
            n_ties -= 1
            found[first] = found[n_ties]


@jit
def _nth_largest(keys: Any, n_keys: int, n: int, low: Any, high: Any) -> Any:
    """The n-th largest of the first n_keys keys, all of which are in [low, high]: bisection of the value."""
    first, last = np.int64(low), np.int64(high) + 1
    while last - first > 1:
        middle = np.int32((first + last) >> 1)
        count = np.int32(0)
        for i in range(n_keys):
            count += np.int32(1) if keys[i] >= middle else np.int32(0)
        if count >= n:
            first = np.int64(middle)
        else:
            last = np.int64(middle)
    return np.int32(first)


@jit
def mark_largest(start: int, stop: int, values: Any, k: int, signed: bool, marks: Any) -> None:
    """marks[row]: where the k largest positive values of the row are, or the k furthest from 0; ties go to lower ones.

    Args:
        start, stop: Rows.
        values: (rows, n).
        k: At most this many per row.
        signed: Whether distance from 0 counts.
        marks: (rows, n) of bool, written.
    """
    n = values.shape[1]
    keys = np.empty(n, dtype=np.int32)
    lowest = np.float32(-np.inf if signed else 0.0)
    for row in range(start, stop):
        mine, marked = values[row], marks[row]
        largest, n_positive = np.int32(0), 0
        for j in range(n):
            key = _key(_value(mine[j]), lowest)
            keys[j] = key
            largest = max(largest, key)
            n_positive += 1 if key > 0 else 0
        least = _nth_largest(keys, n, k, 1, largest) if n_positive > k else np.int32(1)
        n_above = 0
        for j in range(n):
            marked[j] = keys[j] >= least
            n_above += 1 if keys[j] > least else 0
        left = k - n_above
        for j in range(n):
            if keys[j] == least:
                marked[j] = left > 0
                left -= 1


@jit
def group_max(product: Any, bias: Any, n_groups: int, acts: Any, indices: Any) -> None:
    """The largest `product + bias` in each of n_groups runs of columns; ties go to the lower one, NaN is the largest.

    Args:
        product: (rows, columns) of float32.
        bias: (columns,).
        n_groups: A divisor of the columns.
        acts: (rows, n_groups), written.
        indices: (rows, n_groups), written.
    """
    n_rows, n_columns = product.shape
    size = n_columns // n_groups
    for row in range(n_rows):
        entries = product[row]
        for group in range(n_groups):
            place = group * size
            best = entries[place] + bias[place]
            for j in range(place + 1, (group + 1) * size):
                value = entries[j] + bias[j]
                if value > best or (value != value and best == best):
                    best, place = value, j
            acts[row, group], indices[row, group] = best, place


@jit
def rescore(
    x: Any, weights: Any, bias: Any, candidates: Any, k: int, signed: bool, acts: Any, indices: Any
) -> None:
    """Float32 pre-activations of the candidates; the k largest are kept, those below 0 as 0.

    If `signed`, the k furthest from 0, with their signs.

    Args:
        x: (rows, d_in).
        weights: (d_sae, d_in), one row per latent.
        bias: (d_sae,).
        candidates: (rows, n), -1 at the end of rows that have fewer.
        k: Entries per row of the result.
        acts: (rows, k), written; 0 in entries that a row lacks.
        indices: (rows, k), written.
    """
    n_rows, n_candidates = candidates.shape
    scores = np.empty(n_candidates, dtype=np.float32)
    columns = np.empty(n_candidates, dtype=np.int32)
    for row in range(n_rows):
        n = 0
        while n < n_candidates and candidates[row, n] >= 0:
            columns[n] = candidates[row, n]
            n += 1
        dots_of_row(x[row], weights, columns[:n], scores)
        for i in range(n):
            scores[i] += bias[columns[i]]
        while n > k:
            worst = 0
            for i in range(1, n):
                mine, other = scores[i], scores[worst]
                if signed:
                    mine, other = abs(mine), abs(other)
                if mine < other or other != other or (mine == other and columns[i] > columns[worst]):
                    worst = i
            n -= 1
            scores[worst], columns[worst] = scores[n], columns[n]
        for i in range(n):
            silent = scores[i] < 0 and not signed  # so written, NaN stays
            acts[row, i] = np.float32(0.0) if silent else scores[i]
            indices[row, i] = columns[i]
        for i in range(n, k):
            acts[row, i] = 0.0
            indices[row, i] = 0


@jit
def near(
    product: Any, scale: Any, unit: Any, offset: Any, spread: Any, row_spread: Any, row_step: Any, rounding: Any,
    counts: Any, indices: Any,
) -> int:  # fmt: skip
    """The columns that rounding may have kept below 0: `highest = value + offset + ...` is not below it.

    `value = product * unit * scale`, and `highest` is that plus the offset and
    `rounding * |value| + row_spread * spread + row_step * scale`.

    Args:
        product, scale, unit: As in `select`.
        offset: (columns,), added.
        spread: (columns,).
        row_spread: (rows,).
        row_step: (rows,).
        rounding: Share of the value.
        counts: (rows,), written: columns of each row.
        indices: (rows * columns + 1,), written from the start, row after row, ascending within each.

    Returns:
        The number of entries.
    """
    n_rows, n_columns = product.shape
    n_words = -(-n_columns // 8)
    words = np.zeros(n_words, dtype=np.uint64)
    marks = words.view(np.uint8)  # a byte per column, eight of them at a time
    reaching = np.empty(n_words + 1, dtype=np.int32)
    n_total = 0
    for row in range(n_rows):
        entries, u, of_row, step = product[row], unit[row], row_spread[row], row_step[row]
        for j in range(n_columns):
            value = _value(entries[j]) * u * scale[j]
            highest = value + abs(value) * rounding + offset[j] + of_row * spread[j] + step * scale[j]
            marks[j] = 0 if highest <= 0 else 1  # so written, NaN is looked at
        n_reaching = 0
        for i in range(n_words):  # without a branch: the store is undone by the next one
            reaching[n_reaching] = i
            n_reaching += words[i] != 0
        before = n_total
        for i in range(n_reaching):
            first = 8 * reaching[i]
            for j in range(first, first + 8):
                indices[n_total] = j
                n_total += marks[j]
        counts[row] = n_total - before
    return n_total


@jit
def above(
    start: int, stop: int, x: Any, weights: Any, bias: Any, threshold: Any, ptr: Any, indices: Any, acts: Any,
    counts: Any, tile: int,
) -> int:  # fmt: skip
    """Float32 pre-activations of the entries; those above their latent's threshold move to the front.

    Args:
        start, stop: Rows.
        x: (rows, d_in).
        weights: (d_sae, d_in), one row per latent.
        bias: (d_sae,).
        threshold: (d_sae,).
        ptr: Where each row's entries start.
        indices: The latent of each entry; those that are kept, from ptr[start] on, written.
        acts: Written: theirs.
        counts: (rows,), written: how many each row keeps.
        tile: Latents whose weights stay in the cache, for many entries in ascending order; 0 for few.

    Returns:
        How many these rows keep.
    """
    if tile > 0:
        dots_by_tiles(start, stop, x, indices, ptr, weights, tile, acts)
    else:
        dots(start, stop, x, indices, ptr, weights, acts)
    n_kept = ptr[start]
    for row in range(start, stop):
        before = n_kept
        for e in range(ptr[row], ptr[row + 1]):
            latent = indices[e]
            act = acts[e] + bias[latent]
            acts[n_kept], indices[n_kept] = act, latent
            n_kept += not act <= threshold[latent]  # so written, NaN stays
        counts[row] = n_kept - before
    return int(n_kept - ptr[start])
