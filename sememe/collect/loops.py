"""The numba loops of the collector: one latent per thread, in the order of the text. Knows arrays only.

Arrays over latents are (d_sae, ...); `docs`, `wholes`, `ids`, `first` and `last` are the batch's token rows laid
end to end, and `where` is a place in them. Entries of latent l are [ptr[l], stops[l]).
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

__all__ = [
    "NO_EXPONENT",
    "N_DECILES",
    "absorb",
    "by_latent",
    "coarsen",
    "compact",
    "deciles",
    "extremes",
    "gather",
    "runs",
    "silent",
    "store",
]

N_DECILES = 10
"""Bands of a latent's activations, by rank, from which examples are drawn."""
NO_EXPONENT = -(1 << 20)
"""Of a histogram that has counted nothing yet."""


@njit
def _mix(a, b, c):  # type: ignore[no-untyped-def]
    """64 well-mixed bits of three integers (splitmix64's finaliser, twice)."""
    x = np.uint64(a) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(b) * np.uint64(0xD1B54A32D192ED03)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x += np.uint64(c) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    return x ^ (x >> np.uint64(29))


@njit
def _below(bits, n):  # type: ignore[no-untyped-def]
    """A number in [0, n) from 64 random bits."""
    return np.int64(np.float64(bits >> np.uint64(11)) * (1.0 / 9007199254740992.0) * n)


@njit(cache=True)
def by_latent(indices, acts, row_ptr, kept, d_sae):  # type: ignore[no-untyped-def]
    """Entries ordered by latent, then by position: (ptr, stop, flat position, act). Duplicates are added.

    The entries of latent l are [ptr[l], stop[l]); stop < ptr[l + 1] where duplicates were merged.
    """
    ptr = np.zeros(d_sae + 1, np.int64)
    for e in range(indices.shape[0]):
        if acts[e] != 0:
            ptr[indices[e] + 1] += 1
    for latent in range(d_sae):
        ptr[latent + 1] += ptr[latent]
    stop = ptr[:-1].copy()
    where = np.empty(ptr[-1], np.int32)
    value = np.empty(ptr[-1], np.float32)
    for row in range(row_ptr.shape[0] - 1):
        at = kept[row]
        for e in range(row_ptr[row], row_ptr[row + 1]):
            a = acts[e]
            if a != 0:
                latent = indices[e]
                s = stop[latent]
                if s > ptr[latent] and where[s - 1] == at:
                    value[s - 1] += a
                else:
                    where[s] = at
                    value[s] = a
                    stop[latent] = s + 1
    return ptr, stop, where, value


@njit(cache=True)
def runs(docs, ctx, first, last):  # type: ignore[no-untyped-def]
    """For each position the first and one past the last position of its document within its row."""
    n_rows = docs.shape[0] // ctx
    for row in range(n_rows):
        base = row * ctx
        begin = 0
        for p in range(1, ctx + 1):
            if p == ctx or docs[base + p] != docs[base + begin]:
                for q in range(begin, p):
                    first[base + q] = begin
                    last[base + q] = p
                begin = p


@njit
def _window(first, last, ctx, at, before, after):  # type: ignore[no-untyped-def]
    """The window around a flat position, clipped to its document and row, as flat positions."""
    base = (at // ctx) * ctx
    return max(at - before, base + first[at]), min(at + after + 1, base + last[at])


@njit
def _span(where, low, high, e, start, stop):  # type: ignore[no-untyped-def]
    """Which entries of a latent (among [low, high), ordered) lie in a window around entry e."""
    left = e
    while left > low and where[left - 1] >= start:
        left -= 1
    right = e + 1
    while right < high and where[right] < stop:
        right += 1
    return left, right


@njit
def _count_fine(hist, exponents, latent, strength):  # type: ignore[no-untyped-def]
    """Count a value in the latent's histogram, whose upper end is 2**exponent, doubled when exceeded."""
    mantissa, exponent = math.frexp(strength)
    have = exponents[latent]
    if have == NO_EXPONENT:
        exponents[latent] = exponent
        have = exponent
    elif exponent > have:
        shift = min(exponent - have, 31)
        for b in range(hist.shape[1]):
            count = hist[latent, b]
            if count:
                hist[latent, b] = 0
                hist[latent, b >> shift] += count
        exponents[latent] = exponent
        have = exponent
    hist[latent, np.int64(math.ldexp(mantissa, exponent - have) * hist.shape[1])] += np.uint32(1)


@njit
def _halve(keys, mass, counts, latent, used):  # type: ignore[no-untyped-def]
    """Drop the smaller half of a full token table; returns how many stay and the largest mass dropped."""
    size = keys.shape[1]
    old_keys = np.empty(used, np.int32)
    old_mass = np.empty(used, np.float64)
    old_counts = np.empty(used, np.uint32)
    n = 0
    for i in range(size):
        if keys[latent, i] >= 0:
            old_keys[n] = keys[latent, i]
            old_mass[n] = mass[latent, i]
            old_counts[n] = counts[latent, i]
            keys[latent, i] = -1
            mass[latent, i] = 0.0
            counts[latent, i] = 0
            n += 1
    order = np.argsort(old_mass)
    drop = used // 2
    for i in range(drop, used):
        key = old_keys[order[i]]
        at = _mix(key, 0, 0) & np.uint64(size - 1)
        while keys[latent, at] >= 0:
            at = (at + np.uint64(1)) & np.uint64(size - 1)
        keys[latent, at] = key
        mass[latent, at] = old_mass[order[i]]
        counts[latent, at] = old_counts[order[i]]
    return used - drop, old_mass[order[drop - 1]]


@njit
def _add_token(keys, mass, counts, used, lost, latent, token, strength):  # type: ignore[no-untyped-def]
    """Add to the mass and count of a token in the latent's table (open addressing)."""
    size = keys.shape[1]
    at = _mix(token, 0, 0) & np.uint64(size - 1)
    while keys[latent, at] >= 0 and keys[latent, at] != token:
        at = (at + np.uint64(1)) & np.uint64(size - 1)
    mass[latent, at] += strength
    counts[latent, at] += np.uint32(1)
    if keys[latent, at] < 0:
        keys[latent, at] = token
        used[latent] += 1
        if used[latent] > size * 3 // 4:
            n, dropped = _halve(keys, mass, counts, latent, used[latent])
            used[latent] = n
            lost[latent] += dropped


@njit
def _weakest(act, row, pos, latent, n):  # type: ignore[no-untyped-def]
    """The slot among the first n that goes first: smallest act, and of equal ones the latest."""
    worst = 0
    for i in range(1, n):
        a, b = abs(act[latent, i]), abs(act[latent, worst])
        later = row[latent, i] > row[latent, worst] or (
            row[latent, i] == row[latent, worst] and pos[latent, i] > pos[latent, worst]
        )
        if a < b or (a == b and later):
            worst = i
    return worst


@njit
def _fill(act, row, pos, doc, whole, off, latent, slot, a, g, p, d, w, e):  # type: ignore[no-untyped-def]
    act[latent, slot] = a
    row[latent, slot] = g
    pos[latent, slot] = p
    doc[latent, slot] = d
    whole[latent, slot] = w
    off[latent, slot] = -e - 1  # pending: which entry of this batch; `store` puts its window into the pool


@njit(parallel=True, cache=True)
def absorb(  # type: ignore[no-untyped-def]
    ptr, stops, where, value, ids, docs, wholes, first, last, ctx, first_row, before, after, seed, n_top,
    n_active, total, largest, hist, exponents, keys, mass, counts, used, lost, place_n, place_mass,
    filled, act, row, pos, doc, whole, begins, ends, off, length, need,
):  # fmt: skip
    """Take a batch's entries into each latent's statistics and slots; `need` is the room its new windows want."""
    n_slots = act.shape[1]
    n_reservoir = n_slots - n_top
    for latent in prange(ptr.shape[0] - 1):
        low, high = ptr[latent], stops[latent]
        floor = np.float32(-1.0)
        if filled[latent] == n_top and n_top > 0:
            floor = abs(act[latent, _weakest(act, row, pos, latent, n_top)])
        for e in range(low, high):
            a = value[e]
            strength = abs(a)
            if strength == 0:
                continue
            at = where[e]
            g = first_row + at // ctx
            p = at % ctx
            d, w = docs[at], wholes[at]
            seen = n_active[latent]
            n_active[latent] = seen + 1
            total[latent] += strength
            largest[latent] = max(largest[latent], strength)
            _count_fine(hist, exponents, latent, np.float64(strength))
            _add_token(keys, mass, counts, used, lost, latent, ids[at], np.float64(strength))
            band = p * place_n.shape[1] // ctx
            place_n[latent, band] += np.uint32(1)
            place_mass[latent, band] += np.float64(strength)

            if strength > floor and n_top > 0:
                n = filled[latent]
                slot = -1
                for i in range(n):
                    if whole[latent, i] == w:
                        slot = i
                        break
                if slot >= 0:
                    if strength <= abs(act[latent, slot]):
                        slot = -1
                elif n < n_top:
                    slot = n
                    n += 1
                    filled[latent] = n
                else:
                    slot = _weakest(act, row, pos, latent, n)
                if slot >= 0:
                    _fill(act, row, pos, doc, whole, off, latent, slot, a, g, p, d, w, e)
                    if n == n_top:
                        floor = abs(act[latent, _weakest(act, row, pos, latent, n)])

            slot = seen
            if seen >= n_reservoir:
                slot = _below(_mix(seed, latent, seen), seen + 1)
            if slot < n_reservoir:
                _fill(act, row, pos, doc, whole, off, latent, n_top + slot, a, g, p, d, w, e)

        room = 0
        if high > low:
            for slot in range(n_slots):
                if off[latent, slot] < 0:
                    e = -off[latent, slot] - 1
                    start, stop = _window(first, last, ctx, where[e], before, after)
                    left, right = _span(where, low, high, e, start, stop)
                    length[latent, slot] = right - left
                    begins[latent, slot] = start % ctx
                    ends[latent, slot] = (stop - 1) % ctx + 1
                    room += right - left
        need[latent] = room


@njit(parallel=True, cache=True)
def store(  # type: ignore[no-untyped-def]
    ptr, stops, where, value, first, last, ctx, before, after, offsets, off, pool_pos, pool_act
):  # fmt: skip
    """Copy the windows of the slots filled by this batch into the pool."""
    for latent in prange(ptr.shape[0] - 1):
        low, high = ptr[latent], stops[latent]
        out = offsets[latent]
        if high > low:
            for slot in range(off.shape[1]):
                if off[latent, slot] < 0:
                    e = -off[latent, slot] - 1
                    start, stop = _window(first, last, ctx, where[e], before, after)
                    left, right = _span(where, low, high, e, start, stop)
                    off[latent, slot] = out
                    for i in range(left, right):
                        pool_pos[out] = where[i] % ctx
                        pool_act[out] = value[i]
                        out += 1


@njit(cache=True)
def compact(off, length, old_pos, old_act, new_pos, new_act):  # type: ignore[no-untyped-def]
    """Copy what slots still refer to into a new pool; returns how much that is."""
    out = 0
    for latent in range(off.shape[0]):
        for slot in range(off.shape[1]):
            n = length[latent, slot]
            begin = off[latent, slot]
            if begin >= 0 and n > 0:
                off[latent, slot] = out
                for i in range(n):
                    new_pos[out] = old_pos[begin + i]
                    new_act[out] = old_act[begin + i]
                    out += 1
    return out


@njit(parallel=True, cache=True)
def silent(  # type: ignore[no-untyped-def]
    ptr, stops, where, docs, wholes, first, last, ctx, first_row, before, after, seed, kept, kept_ptr,
    n_silent, row, pos, doc, whole, begins, ends,
):  # fmt: skip
    """Offer each latent one random kept position of every row; those with a silent window enter its reservoir."""
    n_slots = row.shape[1]
    for latent in prange(ptr.shape[0] - 1):
        e, high = ptr[latent], stops[latent]
        for r in range(kept_ptr.shape[0] - 1):
            n_kept = kept_ptr[r + 1] - kept_ptr[r]
            row_end = (r + 1) * ctx
            begin = e
            while e < high and where[e] < row_end:
                e += 1
            if n_kept == 0:
                continue
            g = first_row + r
            bits = _mix(seed, latent, g)
            at = kept[kept_ptr[r] + _below(bits, n_kept)]
            start, stop = _window(first, last, ctx, at, before, after)
            quiet = True
            for i in range(begin, e):
                if where[i] >= start and where[i] < stop:
                    quiet = False
                    break
            if not quiet:
                continue
            seen = n_silent[latent]
            slot = seen
            if seen >= n_slots:
                slot = _below(_mix(bits, latent, seen), seen + 1)
            w = wholes[at]
            fresh = slot < n_slots
            if fresh:
                for i in range(min(seen, n_slots)):
                    if i != slot and whole[latent, i] == w:
                        fresh = False
                        break
            if fresh:
                row[latent, slot] = g
                pos[latent, slot] = at % ctx
                doc[latent, slot] = docs[at]
                whole[latent, slot] = w
                begins[latent, slot] = start % ctx
                ends[latent, slot] = (stop - 1) % ctx + 1
            if fresh or seen >= n_slots:
                n_silent[latent] = seen + 1


@njit(parallel=True, cache=True)
def deciles(act, row, pos, whole, n_top, n_active, n_decile, seed, decile):  # type: ignore[no-untyped-def]
    """Mark which reservoir slots are shown, and in which decile; the others stay -1. One per document."""
    n_reservoir = act.shape[1] - n_top
    for latent in prange(act.shape[0]):
        m = min(n_active[latent], n_reservoir)
        if m == 0:
            continue
        # Ties are ordered by place in the text: only the order of equal values, but it must not be chance.
        place = np.empty(m, np.int64)
        strength = np.empty(m, np.float32)
        for i in range(m):
            place[i] = (np.int64(row[latent, n_top + i]) << 16) | np.int64(pos[latent, n_top + i])
        order = np.argsort(place)
        for i in range(m):
            strength[i] = abs(act[latent, n_top + order[i]])
        rank = np.argsort(strength, kind="mergesort")
        of = np.empty(m, np.int64)
        lot = np.empty(m, np.float64)
        for i in range(m):
            slot = order[rank[i]]
            of[slot] = (2 * i + 1) * N_DECILES // (2 * m)
            bits = _mix(seed, place[slot], latent)
            lot[slot] = np.float64(bits >> np.uint64(11))
        drawn = np.argsort(lot)
        used = np.empty(n_decile * N_DECILES, np.int64)
        n_used = 0
        for _turn in range(n_decile):
            for step in range(N_DECILES):
                for i in range(m):
                    slot = drawn[i]
                    if of[slot] != N_DECILES - 1 - step or decile[latent, slot] >= 0:
                        continue
                    w = whole[latent, n_top + slot]
                    known = False
                    for u in range(n_used):
                        if used[u] == w:
                            known = True
                            break
                    if not known:
                        decile[latent, slot] = of[slot]
                        used[n_used] = w
                        n_used += 1
                        break


@njit(cache=True)
def gather(off, length, pool_pos, pool_act, offsets, out_pos, out_act):  # type: ignore[no-untyped-def]
    for i in range(off.shape[0]):
        out = offsets[i]
        for j in range(length[i]):
            out_pos[out + j] = pool_pos[off[i] + j]
            out_act[out + j] = pool_act[off[i] + j]


@njit(parallel=True, cache=True)
def coarsen(hist, exponents, largest, out):  # type: ignore[no-untyped-def]
    """Equal bins between 0 and `largest` from fine ones between 0 and 2**exponents, by each fine bin's middle."""
    n_fine, n_bins = hist.shape[1], out.shape[1]
    for latent in prange(hist.shape[0]):
        if largest[latent] > 0:
            step = math.ldexp(1.0, int(exponents[latent])) / n_fine / np.float64(largest[latent]) * n_bins
            for b in range(n_fine):
                out[latent, min(np.int64((b + 0.5) * step), n_bins - 1)] += hist[latent, b]


@njit(parallel=True, cache=True)
def spread_over(values, mean, std, limit, counts):  # type: ignore[no-untyped-def]
    """How many entries of each row lie how many standard deviations from its mean: equal bins up to the limit."""
    n_bins = counts.shape[1]
    scale = n_bins / (2.0 * limit)
    for row in prange(values.shape[0]):
        inverse = scale / std[row] if std[row] > 0 else 0.0
        for column in range(values.shape[1]):
            b = np.int64(np.floor((values[row, column] - mean[row]) * inverse + 0.5 * n_bins))
            counts[row, min(max(b, 0), n_bins - 1)] += 1


@njit(parallel=True, cache=True)
def extremes(values, largest_at, largest, smallest_at, smallest):  # type: ignore[no-untyped-def]
    """The n largest and n smallest entries of each row, strongest first; ties go to the lower column."""
    n = largest.shape[1]
    for row in prange(values.shape[0]):
        filled = 0
        for column in range(values.shape[1]):
            v = values[row, column]
            if filled < n or v > largest[row, n - 1]:
                at = min(filled, n - 1)
                while at > 0 and largest[row, at - 1] < v:
                    largest[row, at] = largest[row, at - 1]
                    largest_at[row, at] = largest_at[row, at - 1]
                    at -= 1
                largest[row, at] = v
                largest_at[row, at] = column
            if filled < n or v < smallest[row, n - 1]:
                at = min(filled, n - 1)
                while at > 0 and smallest[row, at - 1] > v:
                    smallest[row, at] = smallest[row, at - 1]
                    smallest_at[row, at] = smallest_at[row, at - 1]
                    at -= 1
                smallest[row, at] = v
                smallest_at[row, at] = column
            filled = min(filled + 1, n)
