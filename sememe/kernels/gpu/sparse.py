"""Sums over the entries of sparse rows, and over those of each latent. Knows no selection and no optimiser.

Entries are those of a compressed sparse row matrix. What belongs to one latent is found through a transposed
index, made on the device by a stable sort: every output element is summed by one program in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sememe.encoded import Encoded
from sememe.kernels.several import together

__all__ = [
    "OPTIONS",
    "Transposed",
    "decode",
    "decode_encoded",
    "dots",
    "gather",
    "of_entries",
    "scatter",
    "transposed_index",
]

BLOCK = 128
"""Features per program. Programs of one block of features run side by side, and what they read of the weights
(65,536 x 128 float32: 34 MB) fits a large device's cache."""

OPTIONS = {"enable_fp_fusion": True}
"""Of every launch: products and sums may be rounded once. Said, because Triton's default changes with its version."""

ENTRIES = 16
"""Entries read at once: that many rows are on their way together."""


class Transposed(NamedTuple):
    """Which entries belong to each latent: those of latent i are `entries[ptr[i]:ptr[i + 1]]`, in order."""

    ptr: Int[Tensor, " d_sae_plus_1"]
    entries: Int[Tensor, " nnz"]


@triton.jit
def _gather(
    acts, indices, starts, stops, weights, bias, out, width, rows_each,
    BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """out[row] = bias + sum over the row's entries of acts * weights[indices], one block of features.

    Each run of rows_each rows has a bias of its own.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.load(bias + (row // rows_each) * width + columns, mask=inside, other=0.0)
    first = tl.load(starts + row)
    last = tl.load(stops + row)
    for start in range(first, last, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        act = tl.load(acts + entry, mask=entry < last, other=0.0)
        active = act != 0.0
        latent = tl.load(indices + entry, mask=active, other=0).to(tl.int64)
        values = tl.load(
            weights + latent[:, None] * width + columns[None, :],
            mask=active[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(act[:, None] * values, axis=0)
    tl.store(out + row * width + columns, total, mask=inside)


@triton.jit
def _dots(
    rows, indices, starts, stops, weights, bias, out, width,
    BLOCK: tl.constexpr, ENTRIES: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """out[entry] = rows[row] . weights[indices[entry]] (+ bias[indices[entry]]), for the entries of one row."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(starts + row)
    last = tl.load(stops + row)
    for start in range(first, last, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        valid = entry < last
        latent = tl.load(indices + entry, mask=valid, other=0).to(tl.int64)
        total = tl.zeros((ENTRIES, BLOCK), dtype=tl.float32)
        for column in range(0, width, BLOCK):
            columns = column + tl.arange(0, BLOCK)
            inside = columns < width
            left = tl.load(rows + row * width + columns, mask=inside, other=0.0)
            right = tl.load(
                weights + latent[:, None] * width + columns[None, :],
                mask=valid[:, None] & inside[None, :],
                other=0.0,
            )
            total += left[None, :] * right
        result = tl.sum(total, axis=1)
        if BIAS:
            result += tl.load(bias + latent, mask=valid, other=0.0)
        tl.store(out + entry, result, mask=valid)


@triton.jit
def _scatter(
    weights, ptr, entries, entry_rows, rows, out, totals, width,
    BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """out[latent] = sum over its entries of weights * rows[entry_rows]; totals[latent] = sum of weights."""
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    weight_sum = tl.zeros((ENTRIES,), dtype=tl.float32)
    first = tl.load(ptr + latent)
    last = tl.load(ptr + latent + 1)
    for start in range(first, last, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        valid = place < last
        entry = tl.load(entries + place, mask=valid, other=0)
        weight = tl.load(weights + entry, mask=valid, other=0.0)
        row = tl.load(entry_rows + entry, mask=valid, other=0).to(tl.int64)
        values = tl.load(
            rows + row[:, None] * width + columns[None, :],
            mask=valid[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(weight[:, None] * values, axis=0)
        weight_sum += weight
    tl.store(out + latent * width + columns, total, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(totals + latent, tl.sum(weight_sum))


def _blocks(width: int) -> int:
    return -(-width // BLOCK)


def gather(
    acts: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    row_ptr: Int[Tensor, " batch_plus_1"],
    weights: Float[Tensor, "d_sae width"],
    bias: Float[Tensor, "*n width"],
) -> Float[Tensor, "batch width"]:
    """The weighted sum of weights' rows, plus the bias. Entries of activation 0 read nothing.

    With several biases, the rows are as many equal runs, one for each.
    """
    n_rows, width = row_ptr.shape[0] - 1, weights.shape[1]
    out = torch.empty(n_rows, width, device=acts.device)
    _gather[(n_rows, _blocks(width))](
        acts, indices, row_ptr[:-1], row_ptr[1:], weights, bias.contiguous(), out, width,
        max(1, n_rows * width // max(1, bias.numel())),
        BLOCK=BLOCK, ENTRIES=ENTRIES, **OPTIONS,
    )  # fmt: skip
    return out


def dots(
    rows: Float[Tensor, "batch width"],
    indices: Int[Tensor, " nnz"],
    starts: Int[Tensor, " batch"],
    stops: Int[Tensor, " batch"],
    weights: Float[Tensor, "d_sae width"],
    bias: Float[Tensor, " d_sae"] | None = None,
) -> Float[Tensor, " nnz"]:
    """For each entry its row times its latent's weights, plus the bias if given; 0 for entries of no row."""
    out = torch.zeros(indices.shape[0], device=rows.device)
    _dots[(rows.shape[0],)](
        rows, indices, starts.contiguous(), stops.contiguous(), weights,
        weights if bias is None else bias, out, rows.shape[1],
        BLOCK=BLOCK, ENTRIES=ENTRIES, BIAS=bias is not None, **OPTIONS,
    )  # fmt: skip
    return out


def scatter(
    weights: Float[Tensor, " nnz"],
    index: Transposed,
    entry_rows: Int[Tensor, " nnz"],
    rows: Float[Tensor, "batch width"],
) -> tuple[Float[Tensor, "d_sae width"], Float[Tensor, " d_sae"]]:
    """For each latent the weighted sum of its entries' rows, and the sum of the weights."""
    d_sae, width = index.ptr.shape[0] - 1, rows.shape[1]
    out = torch.empty(d_sae, width, device=rows.device)
    totals = torch.empty(d_sae, device=rows.device)
    _scatter[(d_sae, _blocks(width))](
        weights, index.ptr, index.entries, entry_rows, rows, out, totals, width,
        BLOCK=BLOCK, ENTRIES=ENTRIES, **OPTIONS,
    )  # fmt: skip
    return out, totals


def transposed_index(indices: Int[Tensor, " nnz"], weights: Float[Tensor, " nnz"], d_sae: int) -> Transposed:
    """Entries grouped by latent; those of weight 0 (silent ones, and what fills a buffer up) belong to none."""
    keys = torch.where(weights != 0, indices, d_sae)
    ordered, entries = torch.sort(keys, stable=True)
    latents = torch.arange(d_sae + 1, dtype=ordered.dtype, device=ordered.device)
    return Transposed(torch.searchsorted(ordered, latents), entries)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, acts: Tensor, indices: Tensor, row_ptr: Tensor, entry_rows: Tensor, W: Tensor, b: Tensor
    ) -> Tensor:
        acts, indices, W = acts.contiguous(), indices.to(torch.int32).contiguous(), W.contiguous()
        ctx.save_for_backward(acts, indices, row_ptr, entry_rows, W)
        ctx.n = b.shape[:-1]
        return gather(acts, indices, row_ptr, W, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        acts, indices, row_ptr, entry_rows, W = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_acts = grad_W = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_acts = dots(grad, indices, row_ptr[:-1], row_ptr[1:], W)
        if ctx.needs_input_grad[4]:
            grad_W, _ = scatter(acts, transposed_index(indices, acts, W.shape[0]), entry_rows, grad)
        if ctx.needs_input_grad[5]:
            grad_b = grad.view(*ctx.n, -1, grad.shape[1]).sum(-2)
        return grad_acts, None, None, None, grad_W, grad_b


class _OfEntries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.n = values.shape[0]
        return values.index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        grad = grads[0].contiguous()
        index = transposed_index(indices, grad, ctx.n)
        return scatter(grad, index, torch.zeros_like(indices), grad.new_zeros(1, 1))[1], None


def of_entries(values: Float[Tensor, " d_sae"], indices: Int[Tensor, " nnz"]) -> Float[Tensor, " nnz"]:
    """See `kernels.of_entries`: torch's own gradient adds up in whatever order threads arrive."""
    return cast(Tensor, cast(Any, _OfEntries.apply)(values, indices))


def decode_encoded(
    encoded: Encoded, W_dec: Float[Tensor, "*n d_sae d_out"], b_dec: Float[Tensor, "*n d_out"]
) -> Float[Tensor, "rows d_out"]:
    """See `kernels.decode_encoded`; rows of any length, read where they lie. Several dictionaries are one, whose rows
    are active in their own part of it only."""
    apply = cast(Any, _Decode.apply)
    W = W_dec.reshape(-1, W_dec.shape[-1])
    return cast(Tensor, apply(encoded.acts, encoded.indices, encoded.row_ptr, encoded.row_ids(), W, b_dec))


def decode(
    acts: Float[Tensor, "*n batch k"],
    indices: Int[Tensor, "*n batch k"],
    W_dec: Float[Tensor, "*n d_sae d_out"],
    b_dec: Float[Tensor, "*n d_out"],
) -> Float[Tensor, "*n batch d_out"]:
    """See `kernels.decode`."""
    if acts.dim() == 2:
        return decode_encoded(Encoded.from_topk(acts, indices, W_dec.shape[0]), W_dec, b_dec)
    recon = decode_encoded(together(acts, indices, W_dec.shape[1]), W_dec, b_dec)
    return recon.view(*acts.shape[:2], -1)
