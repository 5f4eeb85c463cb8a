"""Encoders of the CPU path: rough products choose candidates tile by tile, float32 settles them.

Nothing of size batch x d_sae is held: a tile is a few rows' product (`rough.py`), in the cache of the core that made
it. What is kept is computed again in float32.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sememe.encoded import Encoded
from sememe.kernels import reference
from sememe.kernels.cpu import buffers, loops, pool, rough, sparse_loops
from sememe.kernels.cpu.rough import Int8, Wide
from sememe.kernels.cpu.sums import CHUNK, MANY, Transposed, block_of, scatter

__all__ = [
    "candidates_of",
    "encode_batch_topk",
    "encode_every",
    "encode_group_max",
    "encode_threshold",
    "encode_topk",
    "is_dense",
    "largest",
]

SPARE = 8
"""Candidates beyond k (at least; k / 4 if that is more) that are scored again in float32, so that rounding rarely
drops one of the true k. Half as many more in int8, whose rounding is about seven times as large."""

N_PROBE_ROWS = 32
"""Rows that tell roughly where a batch's threshold lies, or how many entries there will be."""

N_PROBE_LATENTS = 2048
"""Latents of which these rows' pre-activations are looked at."""

DENSE_SHARE = 0.06
"""Above this share of active latents a dense float32 product is faster than settling each entry."""


class _Entries(NamedTuple):
    """Entries of a batch, as in `Encoded`."""

    acts: NDArray[np.float32]
    indices: NDArray[np.int32]
    ptr: NDArray[np.int64]


def candidates_of(
    product: Int8 | Wide, n_rows: int, b_enc: Tensor, n_keep: int, signed: bool = False
) -> NDArray[np.int32]:
    """The latents of each row's n_keep largest positive pre-activations (furthest from 0), roughly; -1 fills up."""
    found, bias = np.empty((n_rows, n_keep), np.int32), b_enc.numpy()

    def choose(start: int, stop: int) -> None:
        tile = product.tile(start, stop)
        lift = np.zeros(stop - start, np.float32) if signed else rough.lift_of(product, start, stop)
        loops.select(*tile, lift, bias, n_keep, signed, found[start:stop])

    pool.run(choose, n_rows, product.rows_per_tile)
    return found


def _top(x: Tensor, weights: Tensor, b_enc: Tensor, training: bool, k: int, signed: bool) -> _Entries:
    batch, d_sae = x.shape[0], weights.shape[0]
    product = rough.product_of(x, weights, training)
    spare = max(SPARE, k // 4)
    n_keep = min(k + (spare + spare // 2 if isinstance(product, Int8) else spare), d_sae)
    candidates = candidates_of(product, batch, b_enc, n_keep, signed)
    if isinstance(product, Int8) and (odd := product.unresolved()).size:
        part = x[torch.from_numpy(odd)]
        candidates[odd] = candidates_of(Wide(part, weights), len(part), b_enc, n_keep, signed)
    acts, indices = np.empty((batch, k), np.float32), np.empty((batch, k), np.int32)
    rows, W, b = x.numpy(), weights.numpy(), b_enc.numpy()

    def settle(start: int, stop: int) -> None:
        loops.rescore(
            rows[start:stop], W, b, candidates[start:stop], k, signed, acts[start:stop], indices[start:stop]
        )

    pool.run(
        settle, batch, CHUNK
    )  # afterwards: the float32 weights would fight with the product for the cache
    return _Entries(acts.reshape(-1), indices.reshape(-1), np.arange(0, batch * k + 1, k or 1)[: batch + 1])


def _above(
    x: Tensor, weights: Tensor, b_enc: Tensor, training: bool, threshold: NDArray[np.float32]
) -> _Entries:
    batch, d_sae = x.shape[0], weights.shape[0]
    product, rows, W, b = rough.product_of(x, weights, training), x.numpy(), weights.numpy(), b_enc.numpy()
    counts = np.empty(batch, np.int64)
    offset = b - threshold

    def find(start: int, stop: int) -> NDArray[np.int32]:
        found = pool.scratch("indices", (stop - start) * d_sae + 1, torch.int32).numpy()
        values, slack = product.tile(start, stop), product.slack(start, stop)
        n = loops.near(*values, offset, *slack, counts[start:stop], found)
        return found[:n].copy()

    indices = np.concatenate(pool.run(find, batch, product.rows_per_tile))
    near = _starts(counts)
    acts = np.empty(indices.shape, np.float32)
    tile = block_of(x.shape[1])
    if not training or indices.shape[0] < MANY * batch * (d_sae / tile):
        tile = 0  # as are rows outside training: what else is in their batch must not change how they are added up
    parts = (rows, W, b, threshold, near, indices, acts, counts, tile)

    def settle(start: int, stop: int) -> slice:
        first = int(near[start])
        return slice(first, first + loops.above(start, stop, *parts))

    kept = pool.run(settle, batch, CHUNK)
    return _Entries(
        np.concatenate([acts[part] for part in kept]),
        np.concatenate([indices[part] for part in kept]),
        _starts(counts),
    )


def _group_max(x: Tensor, weights: Tensor, b_enc: Tensor, training: bool, n_groups: int) -> _Entries:
    """In float32 from the first: in a group every latent is near its largest, and rounding would choose among them."""
    batch, d_sae = x.shape[0], weights.shape[0]
    acts, indices = np.empty((batch, n_groups), np.float32), np.empty((batch, n_groups), np.int32)
    right, b = weights.T, b_enc.numpy()

    def choose(start: int, stop: int) -> None:
        tile = pool.scratch("product", (stop - start) * d_sae, torch.float32).view(stop - start, -1)
        torch.mm(x[start:stop], right, out=tile)
        loops.group_max(tile.numpy(), b, n_groups, acts[start:stop], indices[start:stop])

    pool.run(choose, batch, max(32, rough.TILE_FLOAT32 // d_sae))
    ptr = np.arange(0, batch * n_groups + 1, n_groups)[: batch + 1]
    return _Entries(acts.reshape(-1), indices.reshape(-1), ptr)


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each row's entries start; one longer than there are rows."""
    ptr = np.zeros(counts.shape[0] + 1, np.int64)
    np.cumsum(counts, out=ptr[1:])
    return ptr


@torch.no_grad()
def is_dense(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor | None) -> bool:
    """Whether so large a share of all pre-activations is above the threshold, in some rows, that a dense product is
    faster than settling each."""
    probe = x[:: max(1, x.shape[0] // N_PROBE_ROWS)] - b_pre
    some = slice(None, None, max(1, W_enc.shape[1] // N_PROBE_LATENTS))
    dtype = torch.bfloat16 if rough.native_bfloat16() else torch.float32
    pre_acts = (probe.to(dtype) @ W_enc[:, some].to(dtype)).float() + b_enc[some]
    return float((pre_acts > (0.0 if threshold is None else threshold[some])).float().mean()) > DENSE_SHARE


def _batch_top(x: Tensor, weights: Tensor, b_enc: Tensor, training: bool, n_kept: int) -> _Entries:
    """All above a bound that some rows suggest, then the n_kept largest of them; a lower bound if that was too few."""
    batch, d_sae = x.shape[0], weights.shape[0]
    n_kept = min(n_kept, batch * d_sae)
    probe = x[:: max(1, batch // N_PROBE_ROWS)]
    likely = torch.relu(torch.addmm(b_enc, probe, weights.T)).view(-1).nan_to_num_(0.0)  # NaN is kept anyway
    n_wanted = min(likely.numel(), round(1.25 * n_kept * probe.shape[0] / batch) + 8)
    bound = float(likely.topk(n_wanted).values[-1])
    while True:
        entries = _above(x, weights, b_enc, training, np.full(d_sae, bound, np.float32))
        if entries.acts.shape[0] >= n_kept or bound == 0.0:
            return _largest(entries, n_kept, d_sae)
        bound = bound / 2 if bound > 1e-3 else 0.0


def _largest(entries: _Entries, n_kept: int, d_sae: int) -> _Entries:
    """The n_kept largest entries, ties to earlier rows and then to lower latents; silent ones if there are fewer."""
    acts, indices, ptr = entries
    batch = ptr.shape[0] - 1
    rows: NDArray[np.int64] = np.repeat(np.arange(batch), np.diff(ptr))
    if acts.shape[0] > n_kept:
        ranks = np.nan_to_num(acts, nan=np.inf, posinf=np.inf)
        last = np.partition(ranks, ranks.shape[0] - n_kept)[ranks.shape[0] - n_kept]
        keep = ranks > last
        ties = np.flatnonzero(ranks == last)
        ties = ties[np.lexsort((indices[ties], rows[ties]))]
        keep[ties[: n_kept - int(keep.sum())]] = True
        acts, indices, rows = acts[keep], indices[keep], rows[keep]
    elif (
        acts.shape[0] < n_kept
    ):  # as the reference: entries of activation 0 fill up the first places that are free
        free = _free_places(rows * d_sae + indices, n_kept - acts.shape[0])
        order = np.argsort(np.concatenate([rows, free // d_sae]), kind="stable")
        acts = np.concatenate([acts, np.zeros(free.shape[0], np.float32)])[order]
        indices = np.concatenate([indices, (free % d_sae).astype(np.int32)])[order]
        rows = np.concatenate([rows, free // d_sae])[order]
    new_ptr = np.zeros(batch + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=batch), out=new_ptr[1:])
    return _Entries(acts, indices, new_ptr)


def _free_places(taken: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """The n lowest whole numbers that are not taken."""
    places = np.arange(taken.shape[0] + n)
    return places[~np.isin(places, taken)][:n]


class _Encode(torch.autograd.Function):
    """Any selection: its entries' pre-activations, with sparse gradients for x, W_enc and b_enc."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, chosen: Any, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        centred = torch.sub(x.detach(), b_pre, out=torch.from_numpy(buffers.empty(*x.shape)))
        weights = W_enc.detach().T.contiguous()  # free when W_enc is stored latent by latent, as ours is
        found = chosen(centred, weights, b_enc.detach().contiguous(), any(ctx.needs_input_grad))
        acts, indices, ptr = (torch.from_numpy(part) for part in found)
        if relu:
            acts = acts.clamp_(min=0)
        ctx.save_for_backward(centred, weights, acts, indices, ptr)
        ctx.relu = relu
        ctx.mark_non_differentiable(indices, ptr)
        return acts, indices, ptr

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        centred, weights, acts, indices, ptr = ctx.saved_tensors
        grad = (grads[0] * (acts > 0) if ctx.relu else grads[0]).contiguous()
        grad_x = grad_W = grad_b = None
        if ctx.needs_input_grad[0]:
            out, zero = buffers.empty(*centred.shape), np.zeros(centred.shape[1], np.float32)
            parts = (grad.numpy(), indices.numpy(), ptr.numpy(), weights.numpy(), zero, out)
            pool.run(lambda start, stop: sparse_loops.decode(start, stop, *parts), centred.shape[0], CHUNK)
            grad_x = torch.from_numpy(out)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            transposed = Transposed.of(indices, ptr, weights.shape[0])
            grad_weights, grad_b = scatter(grad, centred, transposed)
            grad_W = grad_weights.T
        return grad_x, grad_W, grad_b, None, None, None


def _apply(
    x: Tensor, W: Tensor, b: Tensor, b_pre: Tensor, chosen: Any, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return cast(tuple[Tensor, Tensor, Tensor], cast(Any, _Encode.apply)(x, W, b, b_pre, chosen, relu))


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"],
    k: int,
    signed: bool = False,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """See `kernels.encode_topk`; if `signed`, `kernels.encode_abs_topk`."""
    chosen = functools.partial(_top, k=k, signed=signed)
    acts, indices, _ = _apply(x, W_enc, b_enc, b_pre, chosen, not signed)
    return acts.view(-1, k), indices.view(-1, k)


def encode_threshold(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"],
    threshold: Float[Tensor, " d_sae"] | None,
    dense: bool | None = None,
) -> Encoded:
    """See `kernels.encode_threshold`. While dense, some rows at a time, so that only entries are held of all."""
    d_sae = W_enc.shape[1]
    if not len(x) or (is_dense(x, W_enc, b_enc, b_pre, threshold) if dense is None else dense):
        parts = torch.split(x, max(1, reference.DENSE_TILE // d_sae)) if x.shape[0] else (x,)
        found = [reference.encode_threshold(part, W_enc, b_enc, b_pre, threshold) for part in parts]
        return found[0] if len(found) == 1 else Encoded.cat(found)
    least = np.zeros(d_sae, np.float32) if threshold is None else threshold.detach().contiguous().numpy()
    chosen = functools.partial(_above, threshold=least)
    return Encoded(*_apply(x, W_enc, b_enc, b_pre, chosen, False), d_sae)


class _Every(torch.autograd.Function):
    """A dense product and its gradients, in memory that the next chunk of rows uses again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        centred = x - b_pre
        acts = torch.from_numpy(buffers.empty(x.shape[0], W_enc.shape[1]))
        torch.addmm(b_enc, centred, W_enc, out=acts)
        below = acts <= (0.0 if threshold is None else threshold)  # so written, NaN is kept
        acts.masked_fill_(below, 0.0)
        ctx.save_for_backward(centred, W_enc, below)
        mask = ~below
        ctx.mark_non_differentiable(mask)
        return acts, mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        centred, W_enc, below = ctx.saved_tensors
        grad = torch.from_numpy(buffers.empty(*below.shape)).copy_(grads[0]).masked_fill_(below, 0.0)
        grad_x = grad @ W_enc.T if ctx.needs_input_grad[0] else None
        return (
            grad_x,
            (grad.T @ centred).T,
            grad.sum(0),
            None,
            None,
        )


def encode_every(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"],
    threshold: Float[Tensor, " d_sae"] | None,
) -> Encoded:
    """See `kernels.encode_every`."""
    least = None if threshold is None else threshold.detach()
    return Encoded.of_every(*cast(Any, _Every.apply)(x, W_enc, b_enc, b_pre, least))


def encode_group_max(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"],
    n_groups: int,
) -> tuple[Float[Tensor, "batch n_groups"], Int[Tensor, "batch n_groups"]]:
    """See `kernels.encode_group_max`."""
    chosen = functools.partial(_group_max, n_groups=n_groups)
    acts, indices, _ = _apply(x, W_enc, b_enc, b_pre, chosen, True)
    return acts.view(-1, n_groups), indices.view(-1, n_groups)


def encode_batch_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"],
    n_kept: int,
) -> tuple[Encoded, Float[Tensor, ""]]:
    """See `kernels.encode_batch_topk`."""
    chosen = functools.partial(_batch_top, n_kept=n_kept)
    encoded = Encoded(*_apply(x, W_enc, b_enc, b_pre, chosen, True), W_enc.shape[1])
    return encoded, encoded.acts.detach().min()


def largest(values: Float[Tensor, "batch n"], k: int, signed: bool) -> Bool[Tensor, "batch n"]:
    """See `kernels.largest`."""
    values = values.detach().contiguous()
    bits = values.view(torch.uint16) if values.dtype == torch.bfloat16 else values
    marks = torch.empty(values.shape, dtype=torch.bool)
    parts = (bits.numpy(), k, signed, marks.numpy())
    pool.run(lambda start, stop: loops.mark_largest(start, stop, *parts), values.shape[0], CHUNK)
    return marks
