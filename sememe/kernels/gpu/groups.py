"""Encode and keep the largest latent of each group without ever holding batch x d_sae. Knows no decoder.

As in `selection`: the encoder product goes tile by tile in bfloat16, a kernel keeps the few largest of each group, and
those are scored again in float32. So the largest is lost only if bfloat16 ranks it behind all of these. Whole groups
make up a tile; of a group longer than a tile, each tile's largest are kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sememe.kernels.gpu.selection import NAN, Chosen, Encoder, encode_by, products, tile_of
from sememe.kernels.gpu.sparse import OPTIONS, dots

__all__ = ["encode_group_max"]

KEPT = 4
"""Latents of each group, or of each tile of one, that are scored in float32."""

ELEMENTS = 2048
"""Pre-activations per program, about: of several groups if they are short."""

LOWEST = tl.constexpr(-(2**63))
"""Below all that is packed."""


@triton.jit
def _largest(
    tile, offset, latents, n_tile, first_latent, first_run, n_runs, length, all_runs, rows_each, d_sae,
    RUNS: tl.constexpr, SIZE: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The KEPT latents with the largest values of each run of `length` latents in a row's tile; ties to the lower one.

    A run of fewer names its first once more. Each run of rows_each rows has d_sae latents of its own.
    """
    row = tl.program_id(0).to(tl.int64)
    first = (row // rows_each).to(tl.int32) * d_sae + first_latent
    run = tl.program_id(1) * RUNS + tl.arange(0, RUNS)
    within = tl.arange(0, SIZE)
    column = run[:, None] * length + within[None, :]
    inside = (run[:, None] < n_runs) & (within[None, :] < length)
    # a bfloat16 is the upper half of a float32
    bits = tl.load(tile + row * n_tile + column, mask=inside, other=0).to(tl.int32)
    value = (bits << 16).to(tl.float32, bitcast=True)
    value += tl.load(offset + first + column, mask=inside, other=0.0)
    value = tl.where(value == 0.0, 0.0, value)  # -0 is 0
    # bits that rise as values do, negative ones too; the latent's complement below: one maximum decides all
    bits = value.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bits = tl.where(value != value, NAN, bits)
    packed = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
    packed = tl.where(inside, packed, LOWEST)
    for place in tl.static_range(KEPT):
        top = tl.max(packed, axis=1)
        found = 0x7FFFFFFF - (top & 0x7FFFFFFF).to(tl.int32)
        found = tl.where(top == LOWEST, run * length, found)
        slot = (row * all_runs + first_run + run) * KEPT + place
        tl.store(latents + slot, first + found, mask=run < n_runs)
        packed = tl.where(packed == top[:, None], LOWEST, packed)


def _of_groups(encoder: Encoder, n_groups: int) -> Chosen:
    batch, device = encoder.centred.shape[0], encoder.W.device
    size = encoder.d_sae // n_groups
    width = tile_of(encoder.n)
    pieces = -(-size // width)
    if pieces == 1:
        step = width // size * size
        spans = [(first, min(step, encoder.d_sae - first)) for first in range(0, encoder.d_sae, step)]
    else:
        spans = [
            (group * size + first, min(width, size - first))
            for group in range(n_groups)
            for first in range(0, size, width)
        ]
    kept, all_runs, first_run = min(KEPT, size), n_groups * pieces, 0
    latents = torch.empty(batch, all_runs * kept, dtype=torch.int32, device=device)
    for (first, n), tile in zip(spans, products(encoder, spans), strict=True):
        length = min(n, size)
        n_runs = n // length
        block = triton.next_power_of_2(length)
        runs = min(max(1, ELEMENTS // block), triton.next_power_of_2(n_runs))
        _largest[(batch, triton.cdiv(n_runs, runs))](
            tile, encoder.b, latents, n, first, first_run, n_runs, length, all_runs,
            max(1, batch // encoder.n), encoder.d_sae,
            RUNS=runs, SIZE=block, KEPT=kept, num_warps=8 if runs * block >= 2048 else 4, **OPTIONS,
        )  # fmt: skip
        first_run += n_runs
    starts = torch.arange(0, latents.numel() + 1, latents.shape[1], device=device)
    scores = dots(encoder.centred, latents.view(-1), starts[:-1], starts[1:], encoder.W, encoder.b)
    scores, latents = scores.view(batch, n_groups, -1), latents.view(batch, n_groups, -1)
    largest = scores.amax(2)
    chosen = (scores == largest[:, :, None]) | scores.isnan()
    indices = torch.where(chosen, latents, torch.iinfo(torch.int32).max).amin(2)
    row_ptr = torch.arange(0, batch * n_groups + 1, n_groups, device=device)
    nothing_lost = torch.zeros((), dtype=torch.bool, device=device)
    return Chosen(torch.relu(largest).view(-1), indices.view(-1), row_ptr, nothing_lost)


def encode_group_max(
    x: Float[Tensor, "*n batch d_in"],
    W_enc: Float[Tensor, "*n d_in d_sae"],
    b_enc: Float[Tensor, "*n d_sae"],
    b_pre: Float[Tensor, "*n d_in"],
    n_groups: int,
) -> tuple[Float[Tensor, "*n batch n_groups"], Int[Tensor, "*n batch n_groups"]]:
    """See `kernels.encode_group_max`."""
    chosen = encode_by(x, W_enc, b_enc, b_pre, lambda encoder: _of_groups(encoder, n_groups), True)
    shape = (*x.shape[:-1], n_groups)
    indices = chosen.indices.view(shape)
    if x.dim() == 3:  # named as each dictionary does
        indices = indices.remainder(W_enc.shape[-1])
    return chosen.acts.view(shape), indices
