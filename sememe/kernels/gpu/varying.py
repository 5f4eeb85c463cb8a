"""Encode and keep a number of latents that differs between rows: so many per batch, or all above a threshold.

Nothing here waits for the device: results are `Encoded`s in a buffer of fixed capacity, with the count and a flag
for too many entries on the device. Knows no decoder and no optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.encoded import Encoded
from sememe.kernels.gpu.selection import (
    SPARE,
    Chosen,
    Encoder,
    candidates_of,
    encode_by,
    scores_of,
)
from sememe.kernels.gpu.sparse import dots
from sememe.kernels.several import to_device

__all__ = ["encode_batch_topk", "encode_threshold"]

ROW_SHARE = 16
"""Candidates that one row may hold, as a multiple of the average over the batch."""

KEY_BITS = 15
"""Bits of a positive bfloat16: candidates are ranked by them."""


def encode_threshold(
    x: Float[Tensor, "*n batch d_in"],
    W_enc: Float[Tensor, "*n d_in d_sae"],
    b_enc: Float[Tensor, "*n d_sae"],
    b_pre: Float[Tensor, "*n d_in"],
    threshold: Float[Tensor, "*n d_sae"] | None,
    capacity: int | Sequence[int],
) -> Encoded:
    """See `kernels.encode_threshold`. Overflows too if a row has over 16 times its share of the capacity.

    What bfloat16 puts within rounding of the threshold is scored in float32 before it is dropped. The bound on
    the rounding is the worst case up to d_in 64; above, it takes errors of features for independent.
    """
    above = None if threshold is None else threshold.detach().reshape(-1)
    capacities = (capacity,) if isinstance(capacity, int) else tuple(capacity)
    chosen = encode_by(x, W_enc, b_enc, b_pre, lambda encoder: _above(encoder, above, capacities), False)
    overflow = chosen.overflow.view(b_enc.shape[:-1])
    return Encoded(chosen.acts, chosen.indices, chosen.row_ptr, b_enc.numel(), None, overflow)


def encode_batch_topk(
    x: Float[Tensor, "*n batch d_in"],
    W_enc: Float[Tensor, "*n d_in d_sae"],
    b_enc: Float[Tensor, "*n d_sae"],
    b_pre: Float[Tensor, "*n d_in"],
    n_kept: int,
) -> tuple[Encoded, Float[Tensor, "*n"]]:
    """See `kernels.encode_batch_topk`. Exact unless it overflows: if a row has candidates above the smallest kept
    beyond 16 times the average per row."""
    chosen = encode_by(x, W_enc, b_enc, b_pre, lambda encoder: _of_batch(encoder, n_kept), True)
    d_sae = b_enc.numel()  # of all
    overflow = chosen.overflow.view(b_enc.shape[:-1])
    encoded = Encoded(chosen.acts, chosen.indices, chosen.row_ptr, d_sae, None, overflow)
    return encoded, encoded.acts.detach().view(*x.shape[:-2], -1).amin(-1)


def _per_row(encoder: Encoder, n: int) -> int:
    """How many candidates a row may hold if n are kept in all, of each dictionary."""
    batch = encoder.centred.shape[0] // encoder.n
    return min(encoder.d_sae, ROW_SHARE * -(-n // batch))


def _above(
    encoder: Encoder, threshold: Float[Tensor, " latents"] | None, capacities: Sequence[int]
) -> Chosen:
    """Those of all dictionaries one after the other, of each as many as its capacity."""
    d_in, device = encoder.W.shape[1], encoder.W.device
    rounding = 2**-7 * min(1.0, 8 / d_in**0.5)
    candidates = candidates_of(
        encoder,
        [_per_row(encoder, capacity) for capacity in capacities],
        encoder.b if threshold is None else encoder.b - threshold,
        margins=(rounding * encoder.centred.norm(dim=1), encoder.W.norm(dim=1)),
    )
    scores = scores_of(encoder, candidates)
    slots = torch.arange(scores.shape[1], device=device)
    limit = 0.0 if threshold is None else threshold[candidates.latents]
    kept = (slots < candidates.used[:, None]) & ~(scores <= limit)  # so written, NaN is kept
    kept = kept.view(encoder.n, -1)
    reached = kept.cumsum(1)
    capacity = to_device(capacities, torch.int64, device)
    fits = (kept & (reached <= capacity[:, None])).view(-1)
    counted, acts, indices = _squeezed(fits, sum(capacities), scores.view(-1), candidates.latents.view(-1))
    stops = counted.view(len(candidates.used), -1)[:, -1]
    row_ptr = torch.cat([stops.new_zeros(1), stops])
    dropped = (candidates.dropped.view(encoder.n, -1) > 0).any(1)
    return Chosen(acts, indices, row_ptr, (reached[:, -1] > capacity) | dropped)


def _of_batch(encoder: Encoder, n_kept: int) -> Chosen:
    """Of each dictionary, over its own rows; all tensors here have a dictionary axis first."""
    n, device = encoder.n, encoder.W.device
    batch = encoder.centred.shape[0] // n
    n_keep = n_kept + max(SPARE, n_kept // 8)
    candidates = candidates_of(encoder, _per_row(encoder, n_kept), encoder.b)
    slots = torch.arange(candidates.keys.shape[1], device=device)
    keys = torch.where(slots < candidates.used[:, None], candidates.keys, 0)
    smallest = torch.where(keys > 0, keys, 2**KEY_BITS).amin(1).view(n, -1)
    keys = keys.view(n, -1)
    bound = _bound(keys, n_keep)
    # rows one after the other, latents rising in each: the order in which ties are decided
    over, ties = keys > bound, keys == bound
    kept = over | (ties & (ties.cumsum(1) <= n_keep - over.sum(1, keepdim=True)))
    n_scored = min(n_keep, kept.shape[1])
    counted, latents = _squeezed(kept, n_scored, candidates.latents.view(n, -1))
    stops = counted.view(n, batch, -1)[:, :, -1]
    starts = torch.cat([stops.new_zeros(n, 1), stops[:, :-1]], dim=1)
    begin = torch.arange(n, device=device)[:, None]
    first, last = ((ends + begin * n_scored).view(-1) for ends in (starts, stops))
    scores = dots(encoder.centred, latents.reshape(-1), first, last, encoder.W, encoder.b).view(n, -1)
    places = torch.arange(n_scored, device=device)
    size = torch.where(places < stops[:, -1:], scores, 0.0)
    largest = torch.sort(size, dim=1, descending=True, stable=True).indices[:, :n_kept]
    chosen = torch.zeros_like(size, dtype=torch.bool).scatter_(1, largest, True) & ~(size <= 0)
    reached, acts, indices = _squeezed(chosen, n_kept, scores, latents)
    rows = torch.cat([starts, stops[:, -1:]], dim=1)
    row_ptr = torch.cat([reached.new_zeros(n, 1), reached], dim=1).gather(1, rows)
    full = (candidates.dropped.view(n, -1) > 0) & (smallest >= bound)
    if n > 1:  # what fills a dictionary's buffer up goes to its last row, and names a latent of its own
        indices = torch.maximum(indices, (begin * encoder.d_sae).to(indices.dtype))
        last_end = row_ptr.new_full((1,), n * n_kept)
        flat_ptr = torch.cat([(row_ptr[:, :-1] + begin * n_kept).view(-1), last_end])
    else:
        flat_ptr = row_ptr.view(-1)
    return Chosen(acts.reshape(-1), indices.reshape(-1), flat_ptr, full.any(1))


def _bound(keys: Int[Tensor, "n places"], n: int) -> Int[Tensor, "n 1"]:
    """The largest key that at least n of a dictionary's reach, by bisection; 1 if fewer are positive."""
    low = torch.ones(keys.shape[0], 1, dtype=torch.int32, device=keys.device)
    high = low + 2**KEY_BITS
    for _ in range(KEY_BITS + 1):
        middle = (low + high + 1) // 2
        reached = (keys >= middle).sum(1, keepdim=True) >= n
        low, high = torch.where(reached, middle, low), torch.where(reached, high, middle - 1)
    return low


def _squeezed(kept: Bool[Tensor, "*n places"], size: int, *values: Tensor) -> tuple[Tensor, ...]:
    """How many places are kept up to and including each, and the values there, side by side in buffers of a size.

    Values that do not fit are left out; buffers end in zeros where there are fewer.
    """
    counted = kept.cumsum(-1)
    # what is not kept goes to one place past the end, which is cut off: no two kept ones share a place
    where = torch.where(kept & (counted <= size), counted - 1, size)
    buffers = (
        value.new_zeros(*value.shape[:-1], size + 1).scatter_(-1, where, value)[..., :size]
        for value in values
    )
    return counted, *buffers
