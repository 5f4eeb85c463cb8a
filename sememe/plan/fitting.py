"""What a fit takes, in bytes and seconds. Pure arithmetic on a baseline's options: reads no rows.

Counted from the loops of each kind; unlike the other stages' constants, none of it was fitted to measurements.
"""

from __future__ import annotations

from typing import NamedTuple

from sememe.config import Config
from sememe.dictionaries.ica import ICAConfig
from sememe.dictionaries.nmf import NMFConfig
from sememe.dictionaries.pca import PCAConfig
from sememe.dictionaries.rica import RICAConfig
from sememe.dictionaries.sparse_coder import MAX_GRAM, KSVDConfig
from sememe.fit import STREAMED_ROWS
from sememe.needs import BASE, Bytes
from sememe.plan.costs import START
from sememe.plan.machine import Speed

__all__ = ["fit_seconds", "held_bytes", "streamed_bytes"]

LINE = 64
"""Bytes that are read for one number of a column of a matrix stored by rows."""
EIGEN = 30.0
"""Floating-point operations of an eigendecomposition over the cube of the width."""
SLOW = 2.0
"""Of float64 over float32 products."""
ENTRY = 24
"""Bytes of an active latent of a row, in the parts of the codes and in the whole."""


def streamed_bytes(d_in: int, d_sae: int, n_rows: int, shard: float) -> Bytes:
    """A batch of rows and its codes, and the sums over all of them.

    Args:
        d_in: Width of a row.
        d_sae: Directions.
        n_rows: All rows, of which a batch is held.
        shard: Bytes of a shard of the store.
    """
    weights = 4.0 * d_sae * (2 * d_in + 2)
    batch = 4.0 * min(n_rows, STREAMED_ROWS) * (3 * d_in + 2 * d_sae)
    return Bytes(BASE + 4 * weights + batch + 3 * 8.0 * d_in**2 + 2 * shard, weights)


def held_bytes(baseline: Config, d_in: int, d_sae: int, n_rows: int, shard: float) -> Bytes:
    """All rows at once. K-SVD and ICA hold a number for every row and direction beside them, twice: for K-SVD while
    the batches' codes are put together.

    Args:
        baseline: The options of the kind.
        d_in: Width of a row.
        d_sae: Directions.
        n_rows: Rows held.
        shard: Bytes of a shard of the store.
    """
    weights = 4.0 * d_sae * (2 * d_in + 2)
    number = 8.0 if isinstance(baseline, ICAConfig) else 4.0
    rows = number * n_rows * 4 * d_in
    codes = 0.0
    if isinstance(baseline, ICAConfig | KSVDConfig):
        codes = number * n_rows * d_sae * 2
    if isinstance(baseline, KSVDConfig):
        k = baseline.k_in_use()
        codes += ENTRY * float(n_rows) * (d_sae if k is None else k) + 4.0 * min(d_sae, MAX_GRAM) ** 2
        codes += 3 * 4.0 * d_sae**2 if baseline.update != "ksvd" else 0.0
    return Bytes(BASE + 4 * weights + rows + codes + 2 * shard, weights)


class _Work(NamedTuple):
    """Floating-point operations and bytes moved."""

    products: float
    moved: float = 0.0


def fit_seconds(baseline: Config, speed: Speed, d_in: int, d_sae: int, n_rows: int) -> float:
    """Reading the rows, and the kind's own loops to their last round: those that stop early take less.

    Args:
        baseline: The options of the kind.
        speed: The machine's.
        d_in: Width of a row.
        d_sae: Directions.
        n_rows: Rows read.
    """
    work = _work(baseline, float(d_in), float(d_sae), float(n_rows))
    return START + work.products / speed.dense + (work.moved + 20.0 * n_rows * d_in) / speed.bandwidth


def _work(baseline: Config, d: float, d_sae: float, n: float) -> _Work:
    product = 2.0 * d * d_sae
    if isinstance(baseline, PCAConfig):
        return _Work(SLOW * (2.0 * n * d**2 + EIGEN * d**3))
    if isinstance(baseline, ICAConfig):
        a_round = n * 4.0 * d_sae**2 + EIGEN * d_sae**3
        return _Work(
            SLOW * (2.0 * n * d**2 + EIGEN * d**3 + baseline.max_iterations * a_round),
            baseline.max_iterations * 40.0 * n * d_sae,
        )
    if isinstance(baseline, RICAConfig):
        rows = float(baseline.n_steps * baseline.batch_size)
        passes = rows / n + 1
        moved = 60.0 * rows * d_sae + 40.0 * baseline.n_steps * d * d_sae + passes * 10.0 * n * d
        return _Work(6.0 * product * rows, moved)
    if isinstance(baseline, NMFConfig):
        return _Work(baseline.max_iterations * 4.0 * product * n, baseline.max_iterations * 40.0 * n * d_sae)
    if isinstance(baseline, KSVDConfig):
        return _ksvd(baseline, d, d_sae, n)
    return _Work(0.0)  # identity, neurons, random directions, a coder over what is there: reading alone


def _ksvd(baseline: KSVDConfig, d: float, d_sae: float, n: float) -> _Work:
    """A search for codes and an update of the directions, each round."""
    product = 2.0 * d * d_sae
    k = baseline.k_in_use()
    if k is None:
        search = _Work(baseline.n_steps * 2 * product * n, baseline.n_steps * 40.0 * n * d_sae)
        entries = n * d_sae
    else:
        entries = n * k
        # Scanning all correlations for the best, in every one of the k steps; and k least-squares of growing size.
        moved, solved = 20.0 * n * k * d_sae, n * k**4 / 6.0
        if baseline.encoder == "omp" and d_sae <= MAX_GRAM:
            search = _Work(n * product + solved, moved + 4.0 * n * d_sae * k**2 / 2)
        else:
            search = _Work(n * k * product + solved + n * k**3 * d, moved + 4.0 * n * d * k**2)
    update = _Work(n * product, 12.0 * n * d_sae)  # what is left of the rows
    if baseline.update == "ksvd":
        update = _Work(update.products, update.moved + LINE * n * d_sae + 32.0 * entries * d)
    else:
        update = _Work(update.products + n * product + 2.0 * n * d_sae**2 + d_sae**3, update.moved)
    rounds = baseline.n_iterations
    return _Work(rounds * (search.products + update.products), rounds * (search.moved + update.moved))
