"""Decoders and gradients of the CPU path: sums over entries, by row and by latent. Knows no selection."""

from __future__ import annotations

from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sememe.encoded import Counts, Encoded
from sememe.kernels.cpu import buffers, pool, sparse_loops

__all__ = ["CHUNK", "MANY", "Transposed", "block_of", "counts", "decode", "fired", "reconstruct", "scatter"]

CHUNK = 256
"""Rows or latents per task."""


CACHED = 2**19
"""Bytes of vectors that a core keeps at hand, beside what it writes: half of its cache."""
MANY = 6
"""Entries of a latent in a block of rows, or of a row in a tile of latents, from which on vectors are kept at hand."""

MOST_BLOCKS, LEAST_BLOCK = 8, 2**16
"""Blocks of rows that are sorted side by side, and entries in each at least."""


def block_of(width: int) -> int:
    """How many vectors of a width are kept at hand."""
    return max(16, CACHED // (4 * width))


class Transposed(NamedTuple):
    """The entries of a batch by latent."""

    starts: NDArray[np.int64]
    """Where each latent's entries start; one longer than there are latents."""
    entries: NDArray[np.int32]
    """Numbers of the entries."""
    rows: NDArray[np.int32]
    """Their rows."""

    @classmethod
    def of(cls, indices: Int[Tensor, " nnz"], ptr: Int[Tensor, " batch_plus_1"], d_sae: int) -> Self:
        """Sort by latent. The decoder's and the encoder's gradients ask for the same: an answer is kept once."""
        global _last
        last, _last = _last, None
        if last is not None and last.answers(indices, ptr, d_sae):
            return cast(Self, last.transposed)
        del last
        made = cls._sorted(indices.numpy(), ptr.numpy(), d_sae)
        _last = _Answer(indices, ptr.clone(), indices._version, made)
        return made

    @classmethod
    def _sorted(cls, indices: NDArray[np.int32], ptr: NDArray[np.int64], d_sae: int) -> Self:
        """A counting sort, stable; blocks of rows side by side, each from the place where the one before ends."""
        n, n_rows = indices.shape[0], ptr.shape[0] - 1
        n_blocks = max(1, min(MOST_BLOCKS, n // LEAST_BLOCK, n_rows))
        borders = [n_rows * block // n_blocks for block in range(n_blocks + 1)]
        counts = np.zeros((n_blocks, d_sae), np.int64)

        def count(block: int, _: int) -> None:
            sparse_loops.count_latents(borders[block], borders[block + 1], indices, ptr, counts[block])

        def place(block: int, _: int) -> None:
            rows_of = borders[block], borders[block + 1]
            sparse_loops.place_entries(*rows_of, indices, ptr, cursors[block], made.entries, made.rows)

        pool.run(count, n_blocks, 1)
        made = cls(np.zeros(d_sae + 1, np.int64), np.empty(n, np.int32), np.empty(n, np.int32))
        np.cumsum(counts.sum(0), out=made.starts[1:])
        cursors = made.starts[:-1] + np.cumsum(counts, axis=0) - counts
        pool.run(place, n_blocks, 1)
        return made


class _Answer(NamedTuple):
    """What was sorted last. It holds the indices, so that their memory cannot become another tensor's meanwhile."""

    indices: Tensor
    ptr: Tensor
    version: int
    transposed: Transposed

    def answers(self, indices: Tensor, ptr: Tensor, d_sae: int) -> bool:
        """Whether these are the same indices, nothing was written into them since, and the rows are as long."""
        return (
            indices.data_ptr() == self.indices.data_ptr()
            and indices.shape == self.indices.shape
            and indices._version == self.version
            and d_sae == self.transposed.starts.shape[0] - 1
            and torch.equal(ptr, self.ptr)
        )


_last: _Answer | None = None


def fired(encoded: Encoded) -> Bool[Tensor, " d_sae"]:
    """See `kernels.fired`."""
    marks = np.zeros(encoded.d_sae, np.uint8)
    acts, indices = encoded.acts.detach(), encoded.indices
    sparse_loops.mark_fired(acts.contiguous().numpy(), indices.contiguous().numpy(), marks)
    return torch.from_numpy(marks).bool()


def counts(encoded: Encoded) -> Counts:
    """See `kernels.counts`."""
    per_row, per_latent = np.zeros(encoded.n_rows, np.int64), np.zeros(encoded.d_sae, np.int64)
    acts, indices = encoded.acts.detach().contiguous(), encoded.indices.to(torch.int32).contiguous()
    sparse_loops.count_active(
        acts.numpy(), indices.numpy(), encoded.row_ptr.contiguous().numpy(), per_row, per_latent
    )
    return Counts(torch.from_numpy(per_row), torch.from_numpy(per_latent))


def scatter(
    factors: Float[Tensor, " nnz"],
    vectors: Float[Tensor, "batch width"],
    transposed: Transposed,
    scale: float = 1.0,
    out: NDArray[np.float32] | None = None,
    start: int = 0,
    stop: int | None = None,
) -> tuple[Float[Tensor, "d_sae width"], Float[Tensor, " d_sae"]]:
    """Per latent, `scale` times the sum of factors * vectors over its entries, and that of the factors alone.

    Args:
        factors: One per entry.
        vectors: One per row.
        transposed: The entries by latent.
        scale: A factor of all.
        out: Where to; new if not given.
        start: First latent to do.
        stop: One past the last; all if not given.
    """
    d_sae = transposed.starts.shape[0] - 1
    stop = d_sae if stop is None else stop
    if out is None:
        out = buffers.empty(d_sae, vectors.shape[1])
    totals = np.empty(d_sae, np.float32)
    inputs = (factors.numpy(), np.float32(scale), vectors.numpy(), *transposed)
    block = block_of(vectors.shape[1])
    if transposed.rows.shape[0] >= MANY * d_sae * (vectors.shape[0] / block):

        def some(a: int, b: int) -> None:
            sparse_loops.scatter_by_blocks(start + a, start + b, *inputs, block, out, totals)

        pool.run(some, stop - start, CHUNK // 2)
    else:
        pool.run(
            lambda a, b: sparse_loops.scatter(start + a, start + b, *inputs, out, totals), stop - start, CHUNK
        )
    return torch.from_numpy(out), torch.from_numpy(totals)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts: Tensor, indices: Tensor, ptr: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        acts, W_dec = acts.detach().contiguous(), W_dec.detach().contiguous()
        indices, ptr = indices.to(torch.int32).contiguous(), ptr.contiguous()
        bias = b_dec.detach().contiguous().numpy()
        out = buffers.empty(ptr.shape[0] - 1, W_dec.shape[1])
        parts = (acts.numpy(), indices.numpy(), ptr.numpy(), W_dec.numpy(), bias, out)
        pool.run(lambda start, stop: sparse_loops.decode(start, stop, *parts), out.shape[0], CHUNK)
        ctx.save_for_backward(acts, indices, ptr, W_dec)
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        acts, indices, ptr, W_dec = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_acts = grad_W = grad_b = None
        if ctx.needs_input_grad[0]:
            out = np.empty(acts.shape, np.float32)
            parts = (grad.numpy(), indices.numpy(), ptr.numpy(), W_dec.numpy(), out)
            pool.run(lambda start, stop: sparse_loops.dots(start, stop, *parts), grad.shape[0], CHUNK)
            grad_acts = torch.from_numpy(out)
        if ctx.needs_input_grad[3]:
            grad_W, _ = scatter(acts, grad, Transposed.of(indices, ptr, W_dec.shape[0]))
        if ctx.needs_input_grad[4]:
            grad_b = grad.sum(0)
        return grad_acts, None, None, grad_W, grad_b


def decode(
    encoded: Encoded, W_dec: Float[Tensor, "d_sae d_out"], b_dec: Float[Tensor, " d_out"]
) -> Float[Tensor, "batch d_out"]:
    """See `kernels.decode_encoded`."""
    parts = (encoded.acts, encoded.indices, encoded.row_ptr, W_dec, b_dec)
    return cast(Tensor, cast(Any, _Decode.apply)(*parts))


class _Reconstruct(torch.autograd.Function):
    """The gradients' directions come with the values, while the decoder's rows are in the cache."""

    @staticmethod
    def forward(
        ctx: Any, acts: Tensor, indices: Tensor, ptr: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor,
        ends: tuple[int, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        acts, W_dec = acts.detach().contiguous(), W_dec.detach().contiguous()
        indices, ptr = indices.to(torch.int32).contiguous(), ptr.contiguous()
        batch, d_out = target.shape
        errors = buffers.empty(len(ends), batch, d_out)
        pull = np.empty(acts.shape, np.float32)
        parts = (
            acts.numpy(),
            indices.numpy(),
            ptr.numpy(),
            W_dec.numpy(),
            b_dec.detach().contiguous().numpy(),
        )
        wanted = target.detach().contiguous().numpy()
        if len(ends) == 1:
            tile = block_of(d_out)
            many = acts.shape[0] >= MANY * batch * (W_dec.shape[0] / tile)

            def all_latents(start: int, stop: int) -> float:
                if many:
                    return sparse_loops.reconstruct_by_tiles(
                        start, stop, *parts, wanted, tile, errors[0], pull
                    )
                return sparse_loops.reconstruct(start, stop, *parts, wanted, errors[0], pull)

            squares = pool.run(all_latents, batch, CHUNK)
            sums = torch.tensor([sum(squares)], dtype=torch.float64)
        else:
            borders = np.array(ends, np.int64)

            def some(start: int, stop: int) -> NDArray[np.float64]:
                squares = np.zeros(len(ends))
                sparse_loops.reconstruct_prefixes(start, stop, *parts, wanted, borders, errors, pull, squares)
                return squares

            sums = torch.from_numpy(np.sum(pool.run(some, batch, CHUNK), axis=0))
        mses = (sums / (batch * d_out)).float()
        ctx.save_for_backward(acts, indices, ptr, W_dec)
        ctx.errors, ctx.pull, ctx.ends = errors, pull, ends
        error = torch.from_numpy(errors[-1])
        ctx.mark_non_differentiable(mses)
        ctx.set_materialize_grads(False)
        return mses.mean(), mses, error

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        acts, indices, ptr, W_dec = ctx.saved_tensors
        errors, ends, pull = ctx.errors, ctx.ends, torch.from_numpy(ctx.pull)
        scale = (
            0.0 if grads[0] is None else 2.0 * float(grads[0]) / errors.size
        )  # every prefix counts into the size
        if grads[2] is not None:  # somebody used the reconstruction itself: every prefix's latents are in it
            errors, pull = _with_pull_of(grads[2], scale, acts, indices, ptr, W_dec, errors, pull)
            scale = 1.0
        needs = ctx.needs_input_grad
        grad_acts = pull * scale if needs[0] else None
        grad_W = grad_b = grad_target = None
        if needs[3]:
            transposed = Transposed.of(indices, ptr, W_dec.shape[0])
            out = buffers.empty(*W_dec.shape)
            for start, stop, pulled in zip((0, *ends), ends, errors, strict=False):
                grad_W, _ = scatter(acts, torch.from_numpy(pulled), transposed, scale, out, start, stop)
        if needs[4]:
            grad_b = torch.from_numpy(errors[0]).sum(0) * scale
        if needs[5]:
            grad_target = torch.from_numpy(errors[0]) * -scale
        return grad_acts, None, None, grad_W, grad_b, grad_target, None


def _with_pull_of(
    grad: Tensor,
    scale: float,
    acts: Tensor,
    indices: Tensor,
    ptr: Tensor,
    W_dec: Tensor,
    errors: NDArray[np.float32],
    pull: Tensor,
) -> tuple[NDArray[np.float32], Tensor]:
    """The errors' gradients and the entries', with what flows back through the reconstruction from all latents."""
    grad = grad.contiguous()
    summed = errors * np.float32(scale) + grad.numpy()
    own = np.empty(acts.shape, np.float32)
    parts = (grad.numpy(), indices.numpy(), ptr.numpy(), W_dec.numpy(), own)
    pool.run(lambda start, stop: sparse_loops.dots(start, stop, *parts), grad.shape[0], CHUNK)
    return summed, pull * scale + torch.from_numpy(own)


def reconstruct(
    encoded: Encoded,
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"],
    target: Float[Tensor, "batch d_out"],
    ends: tuple[int, ...],
) -> tuple[Float[Tensor, ""], Float[Tensor, " prefixes"], Float[Tensor, "batch d_out"]]:
    """See `kernels.reconstruct`."""
    parts = (encoded.acts, encoded.indices, encoded.row_ptr, W_dec, b_dec, target, ends)
    return cast(tuple[Tensor, Tensor, Tensor], cast(Any, _Reconstruct.apply)(*parts))
