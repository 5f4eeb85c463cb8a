"""Rough encoder products of the CPU path, tile by tile: int8, bfloat16 or float32. Knows no selection.

They rank pre-activations so that only a few have to be computed in float32. What is fastest where: int8 on a CPU with
VNNI and without AMX (half of bfloat16's time: docs/log.md), else bfloat16 where that is native, else float32.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sememe.kernels.cpu import loops, pool
from sememe.kernels.cpu.buffers import aligned

__all__ = ["Int8", "Tile", "Wide", "lift_of", "native_bfloat16", "native_int8", "product_of"]

N_TYPICAL = 128
"""Rows of x, and latents, that tell how large each input feature is."""

LEAST_WIDTH = 8
"""Narrower rows are not worth it, and at width 1 torch 2.13's int8 product leaves its output as it was."""

MOST_CREST = 16
"""Rows whose largest entry is more than this many times their root mean square are not ranked in int8: rounding
would move their pre-activations by more than 16 / 127 / sqrt(12) = 3.6% of what these spread."""


TILE = 2**21
"""Pre-activations per tile in bfloat16: 4 MB. Fewer make the product slower, more do not fit the cache."""

TILE_FLOAT32 = 2**22
"""Pre-activations per tile in float32: the product gains more from them than the selection loses."""

TILE_INT8 = 2**20
"""Pre-activations per tile in int8: 4 MB of sums."""


MOST_PEAKED = 1e-3
"""Share of the latents whose weights may be so; if there are more, nothing is ranked in int8."""


class Tile(NamedTuple):
    """Products of some rows with all latents: pre-activations are `entries * unit * scale + bias`."""

    entries: NDArray[Any]
    """(rows, d_sae): float32, the bits of bfloat16 as uint16, or int32. Valid until the thread's next tile."""
    scale: NDArray[np.float32]
    """(d_sae,)."""
    unit: NDArray[np.float32]
    """(rows,), above 0."""


class Slack(NamedTuple):
    """How far pre-activations may lie above their products: four standard deviations of what rounding does.

    `rounding * |value| + row_spread * spread + row_step * scale`.
    """

    spread: NDArray[np.float32]
    """(d_sae,)."""
    row_spread: NDArray[np.float32]
    """(rows,)."""
    row_step: NDArray[np.float32]
    """(rows,)."""
    rounding: np.float32


@functools.cache
def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX512-BF16 or AMX), and torch uses it."""
    capability = torch.backends.cpu.get_cpu_capability()
    supports = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return "AVX512" in capability and bool(supports and supports())


@functools.cache
def native_int8() -> bool:
    """Whether this CPU multiplies int8 faster than anything else: with VNNI; with AMX, bfloat16 is as fast."""
    capability = torch.backends.cpu.get_cpu_capability()
    vnni, amx = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("vnni", "amx_tile"))
    return (
        "AVX512" in capability
        and hasattr(torch, "_int_mm")
        and bool(vnni and vnni())
        and not bool(amx and amx())
    )


class Wide:
    """In bfloat16 where that is native, else in float32."""

    def __init__(self, x: Tensor, weights: Tensor) -> None:
        self.x, self.d_sae = x, weights.shape[0]
        self.dtype = torch.bfloat16 if native_bfloat16() else torch.float32
        self.right = weights.to(self.dtype).T
        self.scale, self.norms = np.ones(self.d_sae, np.float32), weights.norm(dim=1).numpy()
        per_tile = TILE if self.dtype == torch.bfloat16 else TILE_FLOAT32
        self.rows_per_tile = max(32, per_tile // self.d_sae)

    def tile(self, start: int, stop: int) -> Tile:
        """The products of rows start to stop."""
        out = pool.scratch("product", (stop - start) * self.d_sae, self.dtype).view(stop - start, -1)
        torch.mm(self.x[start:stop].to(self.dtype), self.right, out=out)
        entries = out.view(torch.uint16).numpy() if self.dtype == torch.bfloat16 else out.numpy()
        return Tile(entries, self.scale, np.ones(stop - start, np.float32))

    def slack(self, start: int, stop: int) -> Slack:
        """Of the same rows: rounding x and w to bfloat16 moves the product of evenly spread vectors by a fifth of
        2^-8 |x| |w| / sqrt(d_in), as standard deviation, and the product itself is rounded once more."""
        share = 2.0**-8 if self.dtype == torch.bfloat16 else 2.0**-20
        norms = self.x[start:stop].norm(dim=1).numpy()
        spread = self.norms * np.float32(4 * share / self.x.shape[1] ** 0.5)
        return Slack(spread, norms, np.zeros_like(norms), np.float32(share))


class Int8:
    """In int8, with a scale for each row and for each latent; sums are exact.

    Features that are large in x are made smaller there and larger in the weights, so that the few outlying features
    that language models have do not cost the others their precision.

    Source: Xiao et al. 2022 (SmoothQuant), arXiv:2211.10438, eq. 4 at alpha 1/2. Differs: typical sizes, not the
    largest.
    """

    def __init__(self, x: Tensor, weights: Tensor) -> None:
        self.rows, (self.d_sae, d_in) = x.numpy(), weights.shape
        self.rows_per_tile = max(32, TILE_INT8 // self.d_sae)
        self.factor = _evened(x, weights)
        self.unit, self.crest = np.empty(x.shape[0], np.float32), np.empty(x.shape[0], np.float32)
        self.scale, self.latent_crest = np.empty(self.d_sae, np.float32), np.empty(self.d_sae, np.float32)
        self.whole = aligned(self.d_sae * d_in, torch.int8).view(self.d_sae, d_in)
        parts = (weights.numpy(), 1 / self.factor, self.whole.numpy(), self.scale, self.latent_crest)
        pool.run(lambda start, stop: loops.quantise(start, stop, 0, *parts), self.d_sae, 512)

    def tile(self, start: int, stop: int) -> Tile:
        """The products of rows start to stop."""
        narrow = pool.scratch("rows", (stop - start) * self.whole.shape[1], torch.int8).view(stop - start, -1)
        loops.quantise(start, stop, start, self.rows, self.factor, narrow.numpy(), self.unit, self.crest)
        out = pool.scratch("product", (stop - start) * self.d_sae, torch.int32).view(stop - start, -1)
        torch._int_mm(narrow, self.whole.T, out=out)
        return Tile(out.numpy(), self.scale, self.unit[start:stop])

    def slack(self, start: int, stop: int) -> Slack:
        """Of the same rows, once their tile was made: errors of a step / sqrt(12) in each entry of both vectors."""
        size = 127 * self.rows.shape[1] ** 0.5  # over the crest, the norm in steps
        spread = np.float32(4 * size / 12**0.5) * self.scale / self.latent_crest
        unit = self.unit[start:stop]
        row_step = np.float32(4 * size / 12**0.5) * unit / self.crest[start:stop]
        return Slack(spread, unit, row_step, np.float32(0.0))

    def unresolved(self) -> NDArray[np.int64]:
        """Rows, once every tile was made, whose ranks int8 does not tell well enough."""
        return np.flatnonzero(~(self.crest <= MOST_CREST))  # so written, NaN is among them


def product_of(x: Tensor, weights: Tensor, training: bool) -> Int8 | Wide:
    """`x @ weights.T`, in the fastest way that ranks pre-activations well.

    Args:
        x: Rows.
        weights: Latents.
        training: Outside training a row is encoded as if it were alone; int8 evens features out over the batch.
    """
    if training and native_int8() and x.shape[1] >= LEAST_WIDTH:
        product = Int8(x, weights)
        if float((~(product.latent_crest <= MOST_CREST)).mean()) <= MOST_PEAKED:  # so written, NaN counts
            return product
    return Wide(x, weights)


def lift_of(product: Int8 | Wide, start: int, stop: int) -> NDArray[np.float32]:
    """By how much the products of rows start to stop may be too low, for most latents, once their tile was made."""
    slack = product.slack(start, stop)
    lift: NDArray[np.float32] = slack.row_spread * np.mean(slack.spread) + slack.row_step * np.mean(
        product.scale
    )
    return np.nan_to_num(lift, nan=0.0, posinf=0.0)


def _evened(x: Tensor, weights: Tensor) -> NDArray[np.float32]:
    """What each feature of x is multiplied by, and divided by in the weights, to be about as large in both."""
    factor = (_typical(weights) / _typical(x)).sqrt().numpy()
    known = np.isfinite(factor) & (factor > 0)
    middle = np.median(factor[known]) if known.any() else 1.0  # for features that none of these rows has
    return np.where(known, factor, np.float32(middle))


def _typical(vectors: Tensor) -> Tensor:
    """Mean size of each feature, relative to the largest of its row, over some rows."""
    sizes = vectors[:: max(1, vectors.shape[0] // N_TYPICAL)].abs()
    return (sizes / sizes.amax(1, keepdim=True)).nan_to_num_(0.0, 0.0, 0.0).mean(0)
