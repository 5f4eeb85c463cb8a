"""Losses of a batch computed some rows at a time, where all latents of all rows would not fit. Knows no loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sememe import kernels
from sememe.encoded import Counts, Encoded
from sememe.recompute import recomputed

__all__ = ["Chunk", "Rows", "in_chunks"]

ENTRIES = 2**21
"""Pre-activations of a chunk: what a dense step holds for each (about 24 bytes) makes 50 MB of them."""


class Rows(NamedTuple):
    """Some rows of a batch."""

    x: Float[Tensor, "rows d_in"]
    target: Float[Tensor, "rows d_out"]
    dense: bool
    """What `kernels.is_dense` said of the batch."""
    start: int
    """Number of the first one."""


class Chunk(NamedTuple):
    """What some rows of a batch make of a loss."""

    means: dict[str, Float[Tensor, ""]]
    """Means over the rows, differentiable."""
    encoded: Encoded | Counts
    """Detached; counts only, of a batch in chunks."""
    error: Float[Tensor, "rows d_out"]


def in_chunks(
    of_rows: Callable[[Rows], Chunk],
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    d_sae: int,
    dense: bool,
) -> Chunk:
    """What all rows make: at once, or while the encoder is dense so many at a time that memory stays bounded.

    Then only counts and errors are held of all rows: chunks are computed again for the gradient.

    Args:
        of_rows: Computes what rows make; the same each time it is asked for the same rows.
        x: Inputs.
        target: Targets.
        d_sae: Number of latents.
        dense: What `kernels.is_dense` says of the batch.
    """
    n, size = x.shape[0], max(1, ENTRIES // d_sae)
    if not dense or n <= size:
        return of_rows(Rows(x, target, dense, 0))

    def again(x: Tensor, target: Tensor, start: int) -> Chunk:
        chunk = of_rows(Rows(x, target, dense, start))
        assert isinstance(chunk.encoded, Encoded)
        return chunk._replace(encoded=kernels.counts(chunk.encoded))

    shares, means, errors = [], [], []
    counts: list[Counts] = []
    for start in range(0, n, size):
        part = slice(start, start + size)
        chunk: Chunk = recomputed(again, x[part], target[part], start)
        shares.append(chunk.error.shape[0] / n)
        means.append(chunk.means)
        assert isinstance(chunk.encoded, Counts)
        counts.append(chunk.encoded)
        errors.append(chunk.error)
    whole = {
        name: torch.stack([share * mean[name] for share, mean in zip(shares, means, strict=True)]).sum()
        for name in means[0]
    }
    return Chunk(whole, Counts.cat(counts), torch.cat(errors))
