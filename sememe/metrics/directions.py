"""Directions of one dictionary among those of another. Knows matrices of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sememe.errors import ActivationError, ConfigError, ShapeError

__all__ = ["Nearest", "check_finite", "mcs", "mmcs", "nearest_directions", "unit_rows"]


class Nearest(NamedTuple):
    """For each direction of one set, the closest of another, closest first."""

    cosines: Float[Tensor, "n_a n"]
    indices: Int[Tensor, "n_a n"]


def nearest_directions(
    a: Float[Tensor, "n_a d"],
    b: Float[Tensor, "n_b d"],
    n: int = 1,
    *,
    absolute: bool = False,
    block: int = 4096,
) -> Nearest:
    """The n directions of `b` with the largest cosine to each direction of `a`, in blocks.

    Args:
        a: Directions of any length; one of length zero has cosine 0 with everything.
        b: Directions of any length.
        n: How many.
        absolute: Rank by |cosine|; the cosines that come back keep their sign.
        block: Rows of either set at a time: memory is block^2 + (n_a + n_b) d, whatever the sets' sizes.

    Raises:
        ShapeError: the two sets live in different spaces.
        ConfigError: `b` has fewer than n directions.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ShapeError(
            "directions that are compared must have one width",
            f"{tuple(a.shape)} and {tuple(b.shape)}",
            "Compare dictionaries of the same hookpoint.",
        )
    if not 1 <= n <= b.shape[0]:
        raise ConfigError(f"n must be in [1, {b.shape[0]}], the number of directions", n, "Lower n.")
    unit_a, unit_b = unit_rows(a), unit_rows(b)
    cosines, indices = [], []
    for start_a in range(0, a.shape[0], block):
        rows = unit_a[start_a : start_a + block]
        best = rows.new_empty(rows.shape[0], 0)
        best_ids = torch.empty(rows.shape[0], 0, dtype=torch.int64, device=rows.device)
        for start_b in range(0, b.shape[0], block):
            cosine = rows @ unit_b[start_b : start_b + block].T
            some = (cosine.abs() if absolute else cosine).topk(min(n, cosine.shape[1]), dim=1).indices
            best = torch.cat([best, cosine.gather(1, some)], 1)
            best_ids = torch.cat([best_ids, some + start_b], 1)
            keep = (best.abs() if absolute else best).topk(min(n, best.shape[1]), dim=1).indices
            best, best_ids = best.gather(1, keep), best_ids.gather(1, keep)
        cosines.append(best)
        indices.append(best_ids)
    if not cosines:
        return Nearest(unit_a.new_empty(0, n), torch.empty(0, n, dtype=torch.int64))
    return Nearest(torch.cat(cosines).clamp(-1, 1), torch.cat(indices))


def mcs(
    a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"], *, absolute: bool = False, block: int = 4096
) -> Float[Tensor, " n_a"]:
    """Per direction of `a`, its largest cosine with any direction of `b`.

    Source: Sharkey et al. 2022. Signed: an opposite direction does not count as found, unless `absolute` is said (what
    directions of activations that may be below 0 want: their signs mean nothing).
    """
    found = nearest_directions(a, b, absolute=absolute, block=block).cosines[:, 0]
    return found.abs() if absolute else found


def mmcs(a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"], *, block: int = 4096) -> float:
    """Mean over the directions of `a` of their `mcs` with `b`. Not symmetric.

    With truth as `a` it is a recall (how much of the truth was found), with truth as `b` a precision (how
    much of what was found is true).
    """
    return float(mcs(a, b, block=block).double().mean())


def unit_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows of norm 1 in float32; those of length 0 stay, and NaN does."""
    x = x.detach().float()
    norms = x.norm(dim=1, keepdim=True)
    return torch.where(norms == 0, 0.0, x / norms)  # so written, NaN stays


def check_finite(rows: Float[Tensor, "n ..."], what: str) -> None:
    """Refuse NaN and infinity where an answer is yes or no, or a choice, and cannot be NaN itself.

    Args:
        rows: Rows, or a number for each of something.
        what: What they are, for the message.

    Raises:
        ActivationError: some are not finite.
    """
    broken = torch.nonzero(~torch.isfinite(rows.detach()).view(rows.shape[0], -1).all(1)).view(-1)
    if broken.numel():
        raise ActivationError(
            f"{what} must be finite",
            f"NaN or infinity in {broken.numel()} of {rows.shape[0]}, the first being {int(broken[0])}",
            "Look for the step at which training lost them; its last good checkpoint is kept.",
        )
