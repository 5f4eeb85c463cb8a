"""Losses of a batch computed some rows at a time, where all latents of all rows would not fit. Knows no loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from sememe import kernels
from sememe.encoded import Counts, Encoded
from sememe.recompute import recomputed

__all__ = ["Chunk", "Counted", "Rows", "Whole", "empty", "in_chunks"]

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

    shares, means = [], []
    whole, counted = Whole(target), Counted(n, d_sae, x.device)
    for start in range(0, n, size):
        part = slice(start, start + size)
        chunk: Chunk = recomputed(again, x[part], target[part], start)
        shares.append(chunk.error.shape[0] / n)
        means.append(chunk.means)
        whole.place(chunk.error, start)
        assert isinstance(chunk.encoded, Counts)
        counted.add(chunk.encoded, start)
        del chunk
    total = {
        name: torch.stack([share * mean[name] for share, mean in zip(shares, means, strict=True)]).sum()
        for name in means[0]
    }
    return Chunk(total, counted.counts, whole.joined())


class Whole:
    """A tensor of all rows, put together chunk by chunk, differentiable. It is made before any chunk: parts that lay
    where chunks leave them would part the memory that each of them needs.

    Args:
        like: Whose shape, dtype and device it has.
    """

    def __init__(self, like: Float[Tensor, "batch d_out"]) -> None:
        self._whole = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        self._parts: list[Tensor] = []

    def place(self, part: Float[Tensor, "rows d_out"], start: int) -> None:
        """Rows from a number on; parts are placed in their order."""
        self._parts.append(cast(Tensor, cast(Any, _Placed.apply)(part, self, start)))

    def rows(self, start: int, n: int) -> Float[Tensor, "rows d_out"]:
        """Their memory; to autograd a tensor of its own."""
        whole = self._whole
        return whole.new_empty(0).set_(
            whole.untyped_storage(), start * whole.stride(0), (n, whole.shape[1]), whole.stride()
        )

    def joined(self) -> Float[Tensor, "batch d_out"]:
        """All of it, once every part is placed."""
        return cast(Tensor, cast(Any, _Joined.apply)(self, *self._parts))


class Counted:
    """How many latents are active, put together chunk by chunk; made before any chunk, as `Whole`.

    Args:
        n: Rows of the batch.
        d_sae: Number of latents.
        device: Where.
    """

    def __init__(self, n: int, d_sae: int, device: torch.device) -> None:
        per_row = torch.empty(n, dtype=torch.int64, device=device)
        self.counts = Counts(per_row, torch.zeros(d_sae, dtype=torch.int64, device=device))

    def add(self, counts: Counts, start: int) -> None:
        """Of rows from a number on."""
        self.counts.per_row[start : start + counts.n_rows] = counts.per_row
        self.counts.per_latent.add_(counts.per_latent)


def empty(*shape: int, like: Tensor) -> Tensor:
    """A tensor whose contents are left over from before: on a CPU, the next chunk uses its memory again.

    Args:
        shape: Its shape.
        like: Whose dtype and device it has.
    """
    if like.device.type != "cpu" or like.dtype != torch.float32:
        return like.new_empty(shape)
    from sememe.kernels.cpu import buffers  # what loads compiled loops is loaded where they run

    return torch.from_numpy(buffers.empty(*shape))


class _Placed(torch.autograd.Function):
    """A part, moved to its rows of the whole."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, whole: Whole, start: int) -> Tensor:
        return whole.rows(start, part.shape[0]).copy_(part)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None


class _Joined(torch.autograd.Function):
    """The whole, once all parts are placed."""

    @staticmethod
    def forward(ctx: Any, whole: Whole, *parts: Tensor) -> Tensor:
        ctx.sizes = [part.shape[0] for part in parts]
        return whole.rows(0, sum(ctx.sizes))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *torch.split(grads[0], ctx.sizes)
