"""Encode and keep k latents per row without ever holding batch x d_sae. Knows no decoder and no optimiser.

The encoder product goes tile by tile over the latents, in bfloat16, into one buffer that every tile reuses. After
each tile, one program per row merges the tile's entries into the row's candidates: the largest so far, exactly,
ties to the lower latent. The candidates are then scored again in float32, and the last choice is made among those.
So a latent is lost only if bfloat16 ranks it behind all the spare candidates too. NaN, of either sign, is the largest
value there is: a diverged run has to show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.kernels.gpu.sparse import OPTIONS, dots, gather, scatter, transposed_index
from sememe.kernels.several import to_device

__all__ = [
    "NAN",
    "Candidates",
    "Chosen",
    "Encoder",
    "candidates_of",
    "encode_abs_topk",
    "encode_by",
    "encode_topk",
    "products",
    "scores_of",
    "tile_of",
]

TILE = 4096
"""Latents per product: 64 MB for a batch of 8192, of the order of a large device's cache."""

NAN = tl.constexpr(0x7FC00000)
"""Bits of the one NaN that all count as: above those of infinity. As bfloat16, half of it."""

SPARE = 8
"""Candidates beyond those wanted (at least; a quarter if that is more) that are scored in float32."""


class Candidates(NamedTuple):
    """Per row, the latents with the largest values, by rising id; the first `used` of `width` slots hold them."""

    keys: Int[Tensor, "batch width"]
    """Rank of the value: larger for larger values. Slots that are not used hold anything."""
    latents: Int[Tensor, "batch width"]
    used: Int[Tensor, " batch"]
    dropped: Int[Tensor, " batch"]
    """1 where more latents qualified than there was room for, else 0."""


class Chosen(NamedTuple):
    """What an encoder keeps, as in `Encoded`; of several dictionaries, each has its own overflow or all have one."""

    acts: Float[Tensor, " nnz"]
    indices: Int[Tensor, " nnz"]
    row_ptr: Int[Tensor, " batch_plus_1"]
    overflow: Bool[Tensor, "*n"]


class Encoder(NamedTuple):
    """What a choice reads: inputs without their centre, weights latent by latent, biases; all contiguous.

    Several dictionaries stand one after the other, in rows, latents and biases alike: each row belongs to one, reads
    its latents only, and names them counted through all.
    """

    centred: Float[Tensor, "rows d_in"]
    W: Float[Tensor, "latents d_in"]
    b: Float[Tensor, " latents"]
    n: int = 1
    """Dictionaries."""

    @property
    def d_sae(self) -> int:
        """Latents of each."""
        return self.W.shape[0] // self.n


@triton.jit
def _merge(
    tile, n_tile, first_latent, offset, row_margin, column_margin,
    keys, latents, used, bounds, dropped, n_keeps, rows_each, d_sae,
    TILE: tl.constexpr, SLOTS: tl.constexpr, SIGNED: tl.constexpr, MARGIN: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Add to a row's candidates what its tile holds above the row's bound. Where they would be more than there is room
    for, or after the last tile more than n_keep, the n_keep largest stay.

    Candidates stand by rising latent, so that what ties with the bound later on has a higher latent, and loses.
    Each run of rows_each rows has d_sae latents and an n_keep of its own.
    """
    row = tl.program_id(0).to(tl.int64)
    dictionary = (row // rows_each).to(tl.int32)
    first = dictionary * d_sae + first_latent
    n_keep = tl.load(n_keeps + dictionary)
    if LAST:
        limit = n_keep
    else:
        limit = SLOTS
    column = tl.arange(0, TILE)
    inside = column < n_tile
    # a bfloat16 is the upper half of a float32
    bits = tl.load(tile + row * n_tile + column, mask=inside, other=0).to(tl.int32)
    value = (bits << 16).to(tl.float32, bitcast=True)
    value += tl.load(offset + first + column, mask=inside, other=0.0)
    if MARGIN:
        margin = tl.load(column_margin + first + column, mask=inside, other=0.0)
        value += tl.load(row_margin + row) * margin
    nan = value != value
    if SIGNED:
        value = tl.abs(value)
        qualifies = inside
    else:
        qualifies = inside & (nan | (value > 0.0))
    rounded = tl.where(nan, NAN >> 16, ((value.to(tl.int32, bitcast=True) >> 15) + 1) >> 1)
    bound = tl.load(bounds + row)
    fresh = qualifies & (rounded + 1 > bound)
    key = tl.where(fresh, rounded + 1, 0)
    n_used = tl.load(used + row)
    n_new = tl.sum(fresh.to(tl.int32))
    if n_used + n_new <= limit:
        place = n_used + tl.cumsum(fresh.to(tl.int32), 0) - 1
        tl.store(keys + row * SLOTS + place, key, mask=fresh)
        tl.store(latents + row * SLOTS + place, first + column, mask=fresh)
        tl.store(used + row, n_used + n_new)
    else:
        slot = tl.arange(0, SLOTS)
        old = tl.load(keys + row * SLOTS + slot, mask=slot < n_used, other=0)
        old_latent = tl.load(latents + row * SLOTS + slot, mask=slot < n_used, other=0)
        # the largest key that at least n_keep entries reach, by bisection
        low = tl.maximum(bound, 1)
        high = tl.maximum(tl.max(key), tl.max(old))
        while low < high:
            middle = (low + high + 1) // 2
            if tl.sum((key >= middle).to(tl.int32)) + tl.sum((old >= middle).to(tl.int32)) >= n_keep:
                low = middle
            else:
                high = middle - 1
        room = n_keep - tl.sum((key > low).to(tl.int32)) - tl.sum((old > low).to(tl.int32))
        old_ties = tl.cumsum((old == low).to(tl.int32), 0)
        ties = tl.cumsum((key == low).to(tl.int32), 0) + tl.sum((old == low).to(tl.int32))
        old_kept = (old > low) | ((old == low) & (old_ties <= room))
        kept = (key > low) | ((key == low) & (ties <= room))
        old_place = tl.cumsum(old_kept.to(tl.int32), 0) - 1
        n_old = tl.sum(old_kept.to(tl.int32))
        place = n_old + tl.cumsum(kept.to(tl.int32), 0) - 1
        # in place: each store waits for sums over all that was loaded
        tl.store(keys + row * SLOTS + old_place, old, mask=old_kept)
        tl.store(latents + row * SLOTS + old_place, old_latent, mask=old_kept)
        tl.store(keys + row * SLOTS + place, key, mask=kept)
        tl.store(latents + row * SLOTS + place, first + column, mask=kept)
        tl.store(used + row, n_keep)
        tl.store(bounds + row, low)
        tl.store(dropped + row, 1)


@triton.jit
def _keep(
    scores, latents, used, acts, indices, width, k,
    SLOTS: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """The k candidates of a row with the largest scores, ties to the lower latent; the rest gets 0 and 0."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    valid = slot < tl.load(used + row)
    score = tl.load(scores + row * width + slot, mask=valid, other=0.0)
    latent = tl.load(latents + row * width + slot, mask=valid, other=0)
    if SIGNED:
        negative = (score < 0.0).to(tl.int64)
        bits = tl.abs(score).to(tl.int32, bitcast=True)
    else:
        negative = tl.zeros((SLOTS,), dtype=tl.int64)
        bits = tl.maximum(score, 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(score != score, NAN, bits)
    # the score's bits above, the latent's complement below, its sign last: one sort of integers decides all
    low = ((0x3FFFFFFF - latent).to(tl.int64) << 1) | negative
    packed = ((bits.to(tl.int64) + 1) << 31) | low
    packed = tl.sort(tl.where(valid, packed, 0), descending=True)
    filled = packed > 0
    act = tl.where(filled, (packed >> 31) - 1, 0).to(tl.int32).to(tl.float32, bitcast=True)
    act = tl.where((packed & 1) == 1, -act, act)
    index = tl.where(filled, 0x3FFFFFFF - ((packed & 0x7FFFFFFF) >> 1), 0)
    tl.store(acts + row * k + slot, act, mask=slot < k)
    tl.store(indices + row * k + slot, index.to(tl.int32), mask=slot < k)


def candidates_of(
    encoder: Encoder,
    n_keep: int | Sequence[int],
    offset: Float[Tensor, " d_sae"],
    *,
    signed: bool = False,
    margins: tuple[Float[Tensor, " batch"], Float[Tensor, " d_sae"]] | None = None,
) -> Candidates:
    """Per row the n_keep largest of `centred @ W.T + offset` among the positive ones (by size, if signed).

    Args:
        encoder: Inputs and weights.
        n_keep: Candidates per row; of several dictionaries, those of each.
        offset: Added to the products, in float32.
        signed: Rank by absolute value, and let everything qualify.
        margins: Their outer product is added as well.
    """
    batch, device, d_sae = encoder.centred.shape[0], encoder.centred.device, encoder.d_sae
    most = n_keep if isinstance(n_keep, int) else max(n_keep)
    n_keeps = (
        torch.full((encoder.n,), n_keep, dtype=torch.int32, device=device)
        if isinstance(n_keep, int)
        else to_device(n_keep, torch.int32, device)
    )
    width = min(tile_of(encoder.n), triton.next_power_of_2(d_sae))
    slots = triton.next_power_of_2(2 * most)  # room to collect in, so that most tiles only add
    keys, latents = (torch.zeros(batch, slots, dtype=torch.int32, device=device) for _ in range(2))
    used, bounds, dropped = (torch.zeros(batch, dtype=torch.int32, device=device) for _ in range(3))
    row_margin, column_margin = margins if margins is not None else (offset, offset)
    spans = [(first, min(width, d_sae - first)) for first in range(0, d_sae, width)]
    for (first, n), tile in zip(spans, products(encoder, spans), strict=True):
        _merge[(batch,)](
            tile, n, first, offset, row_margin, column_margin,
            keys, latents, used, bounds, dropped, n_keeps,
            max(1, batch // encoder.n), d_sae,
            TILE=width, SLOTS=slots, SIGNED=signed, MARGIN=margins is not None, LAST=first + n == d_sae,
            num_warps=8 if width >= 2048 else 4, **OPTIONS,
        )  # fmt: skip
    return Candidates(keys, latents, used, dropped)


def products(encoder: Encoder, spans: Sequence[tuple[int, int]]) -> Iterator[Int[Tensor, "batch n"]]:
    """For each span of latents of every dictionary the bits of `centred @ W.T` in bfloat16, in memory that all share.

    Args:
        encoder: Inputs and weights.
        spans: First latent, as each dictionary counts them, and number of latents.
    """
    x16 = encoder.centred.bfloat16()
    batch, d_in = x16.shape
    of_each = x16.view(encoder.n, -1, d_in), encoder.W.view(encoder.n, encoder.d_sae, d_in)
    widest = max(n for _, n in spans)
    product = torch.empty(batch * widest, dtype=torch.bfloat16, device=x16.device)
    rounded = torch.empty(encoder.n * widest * d_in, dtype=torch.bfloat16, device=x16.device)
    for first, n in spans:
        tile = product[: batch * n].view(batch, n)
        weights = rounded[: encoder.n * n * d_in].view(encoder.n, n, d_in)
        weights.copy_(of_each[1][:, first : first + n])
        if encoder.n == 1:
            torch.mm(x16, weights[0].T, out=tile)
        else:
            torch.bmm(of_each[0], weights.transpose(1, 2), out=tile.view(encoder.n, -1, n))
        yield tile.view(torch.int16)


def tile_of(n_dictionaries: int) -> int:
    """Latents per product: fewer of each where there are many dictionaries, but enough for a product to be worth it."""
    return max(min(TILE, 1024), TILE >> (n_dictionaries - 1).bit_length())


def scores_of(encoder: Encoder, candidates: Candidates) -> Float[Tensor, "batch width"]:
    """The candidates' pre-activations in float32; 0 in empty slots."""
    batch, slots = candidates.latents.shape
    starts = torch.arange(batch, device=candidates.used.device) * slots
    stops = starts + candidates.used
    flat = dots(encoder.centred, candidates.latents.view(-1), starts, stops, encoder.W, encoder.b)
    return flat.view(batch, slots)


# -- gradients -------------------------------------------------------------------------------------


class _Encode(torch.autograd.Function):
    """Chosen pre-activations; gradients only through them, each latent's summed over its entries in order."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_pre: Tensor,
        choose: Callable[[Encoder], Chosen],
        rectified: bool,
    ) -> tuple[Tensor, ...]:
        # W_enc.mT is contiguous when it is stored latent by latent, as ours is
        d_in = x.shape[-1]
        encoder = Encoder(
            (x - b_pre.unsqueeze(-2)).reshape(-1, d_in),
            W_enc.mT.reshape(-1, d_in),
            b_enc.reshape(-1),
            b_enc.shape[:-1].numel(),
        )
        chosen = choose(encoder)
        ctx.rectified, ctx.shapes = rectified, (x.shape, W_enc.mT.shape, b_enc.shape)
        ctx.save_for_backward(encoder.centred, encoder.W, chosen.acts, chosen.indices, chosen.row_ptr)
        ctx.mark_non_differentiable(*chosen[1:])
        return tuple(chosen)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        centred, W, acts, indices, row_ptr = ctx.saved_tensors
        places = torch.arange(acts.shape[0], device=acts.device)
        x_shape, W_shape, b_shape = ctx.shapes
        open_ = ~(acts <= 0) if ctx.rectified else places < row_ptr[-1]
        grad = torch.where(open_, grads[0], 0.0)
        grad_x = grad_W = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = gather(grad, indices, row_ptr, W, W.new_zeros(W.shape[1])).view(x_shape)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            index = transposed_index(indices, grad, W.shape[0])
            rows = torch.searchsorted(row_ptr[1:], places, right=True)
            grad_W_t, grad_b = scatter(grad, index, rows, centred)
            grad_W, grad_b = grad_W_t.view(W_shape).mT, grad_b.view(b_shape)
        return grad_x, grad_W, grad_b, None, None, None


def encode_by(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor,
    choose: Callable[[Encoder], Chosen],
    rectified: bool,
) -> Chosen:
    """What `choose` keeps, differentiable in x, W_enc and b_enc; if rectified, only through positive entries."""
    apply = cast(Any, _Encode.apply)
    return Chosen(*apply(x, W_enc, b_enc, b_pre, choose, rectified))


# -- a number per row ------------------------------------------------------------------------------


def _per_row(encoder: Encoder, k: int, signed: bool) -> Chosen:
    n_keep = min(k + max(SPARE, k // 4), encoder.d_sae)
    candidates = candidates_of(encoder, n_keep, encoder.b, signed=signed)
    scores = scores_of(encoder, candidates)
    batch, slots = scores.shape
    device = scores.device
    acts = torch.empty(batch * k, device=device)
    indices = torch.empty(batch * k, dtype=torch.int32, device=device)
    _keep[(batch,)](
        scores, candidates.latents, candidates.used, acts, indices, slots, k,
        SLOTS=triton.next_power_of_2(n_keep), SIGNED=signed, **OPTIONS,
    )  # fmt: skip
    row_ptr = torch.arange(0, batch * k + 1, k, device=device)
    return Chosen(acts, indices, row_ptr, torch.zeros((), dtype=torch.bool, device=device))


def _encode_per_row(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, k: int, own_k: Tensor | None, signed: bool
) -> tuple[Tensor, Tensor]:
    chosen = encode_by(x, W_enc, b_enc, b_pre, lambda e: _per_row(e, k, signed), not signed)
    acts, indices = chosen.acts.view(*x.shape[:-1], k), chosen.indices.view(*x.shape[:-1], k)
    if own_k is not None:  # the largest come first
        acts = torch.where(torch.arange(k, device=x.device) < own_k[:, None, None], acts, 0.0)
    if x.dim() == 3:  # named as each dictionary does
        indices = indices.remainder(W_enc.shape[-1])
    return acts, indices


def encode_topk(
    x: Float[Tensor, "*n batch d_in"],
    W_enc: Float[Tensor, "*n d_in d_sae"],
    b_enc: Float[Tensor, "*n d_sae"],
    b_pre: Float[Tensor, "*n d_in"],
    k: int,
    own_k: Int[Tensor, "*n"] | None = None,
) -> tuple[Float[Tensor, "*n batch k"], Int[Tensor, "*n batch k"]]:
    """See `kernels.encode_topk`."""
    return _encode_per_row(x, W_enc, b_enc, b_pre, k, own_k, False)


def encode_abs_topk(
    x: Float[Tensor, "*n batch d_in"],
    W_enc: Float[Tensor, "*n d_in d_sae"],
    b_enc: Float[Tensor, "*n d_sae"],
    b_pre: Float[Tensor, "*n d_in"],
    k: int,
    own_k: Int[Tensor, "*n"] | None = None,
) -> tuple[Float[Tensor, "*n batch k"], Int[Tensor, "*n batch k"]]:
    """See `kernels.encode_abs_topk`."""
    return _encode_per_row(x, W_enc, b_enc, b_pre, k, own_k, True)
