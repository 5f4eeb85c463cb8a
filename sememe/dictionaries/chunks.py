"""Losses of a batch computed some rows at a time, where all latents of all rows would not fit. Knows no loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from sememe import kernels
from sememe.encoded import Counts, Encoded
from sememe.recompute import recomputed

__all__ = ["Chunk", "Rows", "in_chunks"]

ENTRIES = 2**20
"""Pre-activations of a chunk: what a dense step holds for each (about 24 bytes) makes 25 MB of them."""


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

    assert target.dtype == torch.float32 and target.device.type == "cpu", (
        "where a batch is dense, and chunks are made"
    )
    shares, means, errors = [], [], []
    # made before any chunk's: errors that lay where chunks leave them would part the memory that each of them needs
    whole = np.empty(target.shape, np.float32)
    per_row = torch.empty(n, dtype=torch.int64, device=x.device)
    per_latent = torch.zeros(d_sae, dtype=torch.int64, device=x.device)
    for start in range(0, n, size):
        part = slice(start, start + size)
        chunk: Chunk = recomputed(again, x[part], target[part], start)
        shares.append(chunk.error.shape[0] / n)
        means.append(chunk.means)
        errors.append(cast(Tensor, cast(Any, _Placed.apply)(chunk.error, whole, start)))
        assert isinstance(chunk.encoded, Counts)
        per_row[part] = chunk.encoded.per_row
        per_latent += chunk.encoded.per_latent
        del chunk
    total = {
        name: torch.stack([share * mean[name] for share, mean in zip(shares, means, strict=True)]).sum()
        for name in means[0]
    }
    error = cast(Tensor, cast(Any, _Joined.apply)(whole, *errors))
    return Chunk(total, Counts(per_row, per_latent), error)


class _Placed(torch.autograd.Function):
    """A chunk's error, moved to its rows of the whole."""

    @staticmethod
    def forward(ctx: Any, error: Tensor, whole: NDArray[np.float32], start: int) -> Tensor:
        return torch.from_numpy(whole[start : start + error.shape[0]]).copy_(error)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None


class _Joined(torch.autograd.Function):
    """The whole, once all chunks' errors are placed."""

    @staticmethod
    def forward(ctx: Any, whole: NDArray[np.float32], *errors: Tensor) -> Tensor:
        ctx.sizes = [error.shape[0] for error in errors]
        return torch.from_numpy(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *torch.split(grads[0], ctx.sizes)
