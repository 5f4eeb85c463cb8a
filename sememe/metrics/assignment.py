"""The best one-to-one assignment of many directions, without the table of all pairs. Knows matrices of rows.

The table of 32,768 x 32,768 cosines alone is 4 GB, and scipy's solver copies it. Here a solver of shortest augmenting
paths sees a few candidates of each row, and its prices (dual variables) say, over all pairs in blocks, which pairs it
should have seen as well. When none is left, the assignment is the best of all pairs: column generation, with the
duality theorem as its proof.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from sememe.errors import SememeError
from sememe.metrics.loops import cheapest_assignment

__all__ = ["assign"]

N_CANDIDATES = 16
"""Pairs of each row that the solver begins with."""
N_ADDED, MOST_ADDED = 16, 256
"""Pairs of each row that the first look over all of them adds, the worst and as many at random; every look twice as
many as the one before, up to the second number. Without those at random, rows that nearly coincide would all be given
the same few columns, look after look."""
ALONE = 3.0
"""Price of leaving a row alone: more than any pair's, 1 - cosine <= 2, so that the best assignment leaves none."""
TOLERANCE = 1e-6
"""By how much a pair left out may be better than its prices: float32's error in a cosine and a sum of prices."""
MAX_ROUNDS = 100


def assign(
    a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"], *, absolute: bool = False, block: int = 2048
) -> tuple[Int[Tensor, " n_a"], int]:
    """The column of each row in the assignment with the largest sum of cosines, and the number of looks it took.

    Its mean cosine is within 1e-6 of the best one's. Rows of norm 0 do not care: they get what is left.

    Args:
        a: Directions of norm 1 or 0; no more of them than of b.
        b: Directions of norm 1 or 0.
        absolute: Of absolute cosines.
        block: Rows of `a` compared at a time: memory is about 12 block n_b bytes beside the candidates.

    Raises:
        SememeError: it did not settle, which has not been seen.
    """
    something = a.any(1)
    if not bool(something.all()):
        columns = torch.full((a.shape[0],), -1)
        own = something.cpu()
        columns[own], n_looks = (
            assign(a[something], b, absolute=absolute, block=block) if own.any() else (columns[own], 0)
        )
        taken = torch.zeros(b.shape[0], dtype=torch.bool)
        taken[columns[own]] = True
        columns[~own] = torch.nonzero(~taken).view(-1)[: int((~own).sum())]
        return columns, n_looks
    generator = torch.Generator(a.device).manual_seed(0)
    indices, costs = _first_candidates(a, b, absolute, block)
    indptr = np.arange(a.shape[0] + 1, dtype=np.int64) * indices.shape[1]
    flat, flat_costs = indices.reshape(-1), costs.reshape(-1)
    for n_looks in range(1, MAX_ROUNDS + 1):
        columns, rows_price, columns_price = cheapest_assignment(indptr, flat, flat_costs, b.shape[0], ALONE)
        n_added = min(MOST_ADDED, N_ADDED * 2 ** (n_looks - 1))
        rows, more, more_costs = _overlooked(
            a, b, (rows_price, columns_price), n_added, absolute, block, generator
        )
        if not rows.size:
            return torch.from_numpy(columns), n_looks
        owner = np.concatenate([np.repeat(np.arange(a.shape[0]), np.diff(indptr)), rows])
        order = np.argsort(owner, kind="stable")
        flat = np.concatenate([flat, more])[order]
        flat_costs = np.concatenate([flat_costs, more_costs])[order]
        indptr = np.concatenate([[0], np.bincount(owner, minlength=a.shape[0]).cumsum()])
    raise SememeError(
        f"one-to-one matching must settle within {MAX_ROUNDS} looks over all pairs",
        f"{rows.size} pairs still better than their prices",
        "Match fewer directions, and report this.",
    )


def _cosines(rows: Float[Tensor, "n d"], b: Float[Tensor, "n_b d"], absolute: bool) -> Float[Tensor, "n n_b"]:
    found = rows @ b.T
    return found.abs_() if absolute else found


def _first_candidates(
    a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"], absolute: bool, block: int
) -> tuple[Int64[np.ndarray, "n_a n"], Float64[np.ndarray, "n_a n"]]:
    """The nearest columns of each row, and 1 - cosine."""
    n = min(N_CANDIDATES, b.shape[0])
    found = [_cosines(rows, b, absolute).topk(n, dim=1) for rows in torch.split(a, block)]
    indices = torch.cat([one.indices for one in found]).cpu().numpy()
    return indices, 1 - torch.cat([one.values for one in found]).double().cpu().numpy()


def _overlooked(
    a: Float[Tensor, "n_a d"],
    b: Float[Tensor, "n_b d"],
    prices: tuple[Float64[np.ndarray, " n_a"], Float64[np.ndarray, " n_b"]],
    n_added: int,
    absolute: bool,
    block: int,
    generator: torch.Generator,
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Pairs that cost less than their prices: rows, columns and costs; of each row the worst, and some at random."""
    u, v = (torch.from_numpy(price).float().to(a.device) for price in prices)
    n = min(n_added, b.shape[0])
    rows, columns, costs = [], [], []
    for start in range(0, a.shape[0], block):
        cosines = _cosines(a[start : start + block], b, absolute)
        gain = (cosines + v).add_(u[start : start + block, None] - 1)
        some = torch.nonzero(gain.amax(1) > TOLERANCE).view(-1)
        if some.numel() == 0:
            continue
        gain = gain[some]
        wanted = gain > TOLERANCE
        chosen = torch.zeros_like(wanted).scatter_(1, gain.topk(n, dim=1).indices, True)
        if bool((wanted.sum(1) > n).any()):
            lots = torch.rand(gain.shape, generator=generator, device=gain.device).masked_fill_(~wanted, -1.0)
            chosen.scatter_(1, lots.topk(n, dim=1).indices, True)
        row, column = torch.nonzero(chosen & wanted, as_tuple=True)
        rows.append((some[row] + start).cpu())
        columns.append(column.cpu())
        costs.append(1 - cosines[some[row], column].double().cpu())
    if not rows:
        none = np.zeros(0, np.int64)
        return none, none, np.zeros(0)
    return torch.cat(rows).numpy(), torch.cat(columns).numpy(), torch.cat(costs).numpy()
