"""Where parameters start: shapes in memory, random directions, robust centres. Knows no architecture."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["geometric_median", "latent_major", "unit_rows"]


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
