"""The numba loops that count pairs of latents. Knows arrays only."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

__all__ = ["best", "count_pairs"]

N_LANES = 16
"""Latents of a block are dealt to so many lanes, each one thread's; the result does not depend on it."""


@njit(parallel=True, cache=True)
def count_pairs(entries, ptr, low, counts):  # type: ignore[no-untyped-def]
    """Add to counts[a - low, b] for every token on which a of the block and b are active; a latent with itself too."""
    high = low + counts.shape[0]
    for lane in prange(N_LANES):
        for token in range(ptr.shape[0] - 1):
            begin, end = ptr[token], ptr[token + 1]
            for i in range(begin, end):
                a = entries[i]
                if a >= low and a < high and a % N_LANES == lane:
                    for j in range(begin, end):
                        counts[a - low, entries[j]] += 1


@njit(parallel=True, cache=True)
def best(counts, n_active, n_tokens, low, min_both, others, n_both, expected, phi):  # type: ignore[no-untyped-def]
    """Each row's partners by correlation, sorted in as they are found."""
    n = others.shape[1]
    total = np.float64(n_tokens)
    for row in prange(counts.shape[0]):
        a = low + row
        n_a = np.float64(n_active[a])
        found = 0
        for b in range(counts.shape[1]):
            both = counts[row, b]
            if b == a or both < min_both:
                continue
            n_b = np.float64(n_active[b])
            spread = n_a * (total - n_a) * n_b * (total - n_b)
            if spread <= 0:
                continue  # one of them is active on every token: nothing to correlate
            value = np.float32((total * both - n_a * n_b) / np.sqrt(spread))
            if value <= 0 or (found == n and value <= phi[row, n - 1]):
                continue
            at = found if found < n else n - 1
            while at > 0 and phi[row, at - 1] < value:
                others[row, at], n_both[row, at] = others[row, at - 1], n_both[row, at - 1]
                expected[row, at], phi[row, at] = expected[row, at - 1], phi[row, at - 1]
                at -= 1
            others[row, at], n_both[row, at] = b, both
            expected[row, at], phi[row, at] = np.float32(n_a * n_b / total), value
            if found < n:
                found += 1
