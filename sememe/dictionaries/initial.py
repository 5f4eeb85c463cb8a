"""Where parameters start: shapes in memory, random directions, robust centres. Knows no architecture."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["bricken_norm", "geometric_median", "latent_major", "unit_rows"]


def latent_major(d_in: int, d_sae: int) -> Float[Tensor, "d_in d_sae"]:
    """Zeros of shape (d_in, d_sae) whose columns are contiguous: one latent's weights lie side by side.

    Sparse kernels read and update one latent at a time; the product with a batch costs the same either way.
    """
    return torch.zeros(d_sae, d_in).T


def unit_rows(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    """Directions uniform on the sphere."""
    rows = torch.randn(n, d, generator=generator)
    units: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return units


def geometric_median(
    x: Float[Tensor, "rows d"], max_iterations: int = 100, tolerance: float = 1e-5
) -> Float[Tensor, " d"]:
    """The point with the smallest sum of distances to the rows.

    Source: Weiszfeld 1937, iterated from the mean until the step is below tolerance x the spread.
    """
    point = x.mean(0)
    spread = (x - point).norm(dim=1).mean().clamp_min(1e-12)
    for _ in range(max_iterations):
        weights = 1 / (x - point).norm(dim=1).clamp_min(1e-6 * float(spread))
        moved = (weights[:, None] * x).sum(0) / weights.sum()
        step = (moved - point).norm()
        point = moved
        if step <= tolerance * spread:
            break
    return point


def bricken_norm(norms: Float[Tensor, " d_sae"], ids: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """How long the encoder weights of resampled latents are: 0.2 of the mean over the others (of 1 if none).

    Args:
        norms: Norms of all latents' encoder weights.
        ids: The resampled latents.

    Source: Bricken et al. 2023, appendix "Neuron Resampling".
    """
    alive = torch.ones_like(norms, dtype=torch.bool)
    alive[ids] = False
    n_alive = alive.sum()
    mean = torch.where(n_alive > 0, (norms * alive).sum() / n_alive.clamp_min(1), torch.ones_like(norms[0]))
    return 0.2 * mean


def median_of_others(x: Float[Tensor, " d_sae"], ids: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """What is usual among latents that are not pointed anew: most may be dead."""
    others = torch.ones_like(x, dtype=torch.bool)
    others[ids] = False
    return (x[others] if bool(others.any()) else x).median()
