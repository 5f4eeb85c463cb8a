"""Which latents are active on the same tokens: every pair of the dictionary counted. Knows activations' indices only.

During the pass the active latents of up to `n_wanted` tokens go to two files, 4 bytes per activation; all tokens
while the text has no more, else a uniform sample by hash, so that the files do not grow with the text. Afterwards the
pairs are counted in blocks of latents whose counts fit in N_COUNTS numbers, whatever the width: exact, and the
dictionary's whole square never exists at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int64

from sememe.collect.pair_loops import best, count_pairs
from sememe.progress import track

__all__ = ["Coactive", "PairFiles", "sampled", "strongest"]

N_READ = 1 << 22
"""Entries looked at together."""
N_COUNTS = 1 << 26
"""Pair counts held at once, 4 bytes each."""


class Coactive(NamedTuple):
    """Each latent's partners, strongest first; -1, 0 and NaN beyond the last."""

    others: Int[np.ndarray, "d_sae n"]
    n_both: Int[np.ndarray, "d_sae n"]
    """Tokens on which both are active."""
    expected: Float32[np.ndarray, "d_sae n"]
    """How many there would be if they knew nothing of each other: n_a n_b / n_tokens."""
    phi: Float32[np.ndarray, "d_sae n"]
    """Correlation of the two as yes or no: 0 if they know nothing of each other, 1 if they are one."""
    n_tokens: int
    """Tokens counted over."""


class PairFiles:
    """Active latents of the tokens that are counted, on disk, appended batch by batch.

    Args:
        folder: Where.
        name: Of the files.
        n_bytes: How much of each file, entries and counts, belongs to a snapshot that is gone on from; (0, 0) if none.
    """

    def __init__(self, folder: Path, name: str, n_bytes: tuple[int, int] = (0, 0)) -> None:
        self.paths = tuple(folder / f"{name}.{end}" for end in ("entries", "counts"))
        self.files: tuple[IO[bytes], ...] = tuple(
            path.open("r+b" if n and path.exists() else "wb")
            for path, n in zip(self.paths, n_bytes, strict=True)
        )
        for file, n in zip(self.files, n_bytes, strict=True):
            file.seek(n)
            file.truncate()

    def add(
        self,
        indices: Int[np.ndarray, " nnz"],
        acts: Float32[np.ndarray, " nnz"],
        row_ptr: Int[np.ndarray, " n_plus_1"],
        wanted: np.ndarray,
    ) -> None:
        """Take in the rows that `wanted` (bool, one per row) marks; acts of 0 do not count."""
        row = np.repeat(np.arange(wanted.shape[0]), np.diff(row_ptr))
        taken = wanted[row] & (acts != 0)
        counts = np.bincount(row[taken], minlength=wanted.shape[0])[wanted]
        indices[taken].astype(np.int32).tofile(self.files[0])
        counts.astype(np.int32).tofile(self.files[1])

    def tell(self) -> tuple[int, int]:
        """Bytes written to each."""
        return self.files[0].tell(), self.files[1].tell()

    def flush(self) -> None:
        """Hand everything to the system."""
        for file in self.files:
            file.flush()

    def close(self) -> None:
        """Close both."""
        for file in self.files:
            file.close()

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Entries and where each token's begin: (nnz,) int32 on disk, (n_tokens + 1,) int64."""
        self.flush()
        counts = np.fromfile(self.paths[1], np.int32)
        ptr = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        entries = np.memmap(self.paths[0], np.int32, mode="r") if ptr[-1] else np.zeros(0, np.int32)
        return entries, ptr


def sampled(places: Int64[np.ndarray, " n"], n_wanted: int, n_tokens: int, seed: int) -> np.ndarray:
    """Which tokens are counted: all while the text has no more than wanted, else those whose hash says so.

    Args:
        places: A number of its own for each token.
        n_wanted: About how many of the text's tokens.
        n_tokens: How many the text has.
        seed: Of the hash.
    """
    if n_tokens <= n_wanted:
        return np.ones(places.shape, bool)
    with np.errstate(over="ignore"):
        x = places.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed) * np.uint64(
            0xD1B54A32D192ED03
        )
        for shift in (30, 27):
            x ^= x >> np.uint64(shift)
            x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(31)
    below: np.ndarray = x < np.uint64(min(int(n_wanted / n_tokens * 2**64), 2**64 - 1))
    return below


def strongest(
    entries: Int[np.ndarray, " nnz"],
    ptr: Int64[np.ndarray, " n_tokens_plus_1"],
    d_sae: int,
    n: int,
    min_both: int = 5,
) -> Coactive:
    """The n partners of each latent with which it correlates most, of all latents; ties go to the lower.

    Args:
        entries: Active latents, token by token; each at most once per token.
        ptr: Where each token's begin.
        d_sae: Number of latents.
        n: Partners kept.
        min_both: Tokens on which both must be active; fewer are chance.
    """
    n = min(n, max(d_sae - 1, 1))
    n_tokens = ptr.shape[0] - 1
    n_active = np.zeros(d_sae, np.int64)
    for start in range(0, entries.shape[0], N_READ):  # bincount copies what it counts
        n_active += np.bincount(entries[start : start + N_READ], minlength=d_sae)
    others = np.full((d_sae, n), -1, np.int32)
    n_both = np.zeros((d_sae, n), np.int64)
    expected = np.full((d_sae, n), np.nan, np.float32)
    phi = np.full((d_sae, n), np.nan, np.float32)
    step = max(1, min(N_COUNTS // d_sae, d_sae))
    with track("co-activation", d_sae, "latents") as progress:
        for low in range(0, d_sae, step):
            high = min(low + step, d_sae)
            counts = np.zeros((high - low, d_sae), np.int32)
            count_pairs(entries, ptr, low, counts)
            best(
                counts, n_active, n_tokens, low, min_both,
                others[low:high], n_both[low:high], expected[low:high], phi[low:high],
            )  # fmt: skip
            progress.advance(high - low)
    return Coactive(others, n_both, expected, phi, n_tokens)
