"""Levels that a chosen share of rows exceeds, latent by latent: where thresholds and biases start. Knows no penalty."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["levels"]

TILE = 2**23
"""Pre-activations held at once: 32 MB."""
N_TAIL = 8
"""Rows of a latent whose lowest is what the tail is measured from, where a level lies beyond all rows."""
FEWEST = 4
"""Rows below which no tail is looked at."""


@torch.no_grad()
def levels(
    x: Float[Tensor, "rows d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"] | None,
    share: float,
) -> Float[Tensor, " d_sae"]:
    """What `x @ W_enc + b_enc` exceeds on a share of rows like these, latent by latent.

    The r-th largest of n numbers is exceeded by r / (n + 1) of those to come, whatever their distribution: the level is
    read off at r = share (n + 1), between two of them at the logarithm of r. Where r is below 1, as for few active
    latents of very many, a latent's own rows do not reach so far. There the level is one of its largest in half
    of the rows, plus so many of its standard deviations, the same number for all latents, that in the other half the
    share is right over all of them together.

    Args:
        x: A sample, centred.
        W_enc: Encoder weights.
        b_enc: Their biases; 0 if not given.
        share: Of rows, in (0, 1).
    """
    n = x.shape[0]
    rank = share * (n + 1)
    if rank < 1 and n >= FEWEST:
        return _beyond(x, W_enc, b_enc, share)
    rank = min(max(rank, 1.0), float(n))
    return torch.cat([_at_rank(tile, rank) for (tile,) in _tiles((x,), W_enc, b_enc)])


def _tiles(
    parts: tuple[Tensor, ...], W_enc: Tensor, b_enc: Tensor | None
) -> Iterator[tuple[Float[Tensor, "rows some"], ...]]:
    """The pre-activations of each part of the rows, some latents at a time."""
    per_tile = max(1, TILE // max(1, sum(part.shape[0] for part in parts)))
    for start in range(0, W_enc.shape[1], per_tile):
        some = slice(start, start + per_tile)
        bias = 0.0 if b_enc is None else b_enc[some]
        yield tuple(part @ W_enc[:, some] + bias for part in parts)


def _at_rank(values: Float[Tensor, "rows some"], rank: float) -> Float[Tensor, " some"]:
    """The rank-th largest of each column; between two, at the logarithm of the rank."""
    low, high = math.floor(rank), math.ceil(rank)
    largest = values.topk(high, dim=0).values
    between = 0.0 if low == high else math.log(rank / low) / math.log(high / low)
    return torch.lerp(largest[low - 1], largest[high - 1], between)


def _beyond(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, share: float) -> Float[Tensor, " d_sae"]:
    """Levels beyond what single latents' rows tell."""
    half = x.shape[0] // 2
    n_tail = max(1, min(N_TAIL, half // N_TAIL))
    found, spreads, excesses = [], [], []
    for own, other in _tiles((x[:half], x[half:]), W_enc, b_enc):
        level = own.topk(n_tail, dim=0).values[-1]
        spread = own.std(dim=0, correction=0).clamp_min(1e-12)
        excess = (other - level) / spread
        found.append(level)
        spreads.append(spread)
        excesses.append(excess[excess > 0])
    excess = torch.cat(excesses)
    n_wanted = max(1, round(share * (x.shape[0] - half) * W_enc.shape[1]))
    step = float(excess.topk(n_wanted).values[-1]) if n_wanted <= excess.numel() else 0.0
    return torch.cat(found) + step * torch.cat(spreads)
