"""A layout in two dimensions of points whose nearest neighbours are known: UMAP without its search. Knows arrays only.

Source: McInnes et al. 2018, arXiv:1802.03426, with umap-learn's constants (a test holds the graph to umap-learn's
and the layout to its quality). Differs: it starts from the two leading principal components and not from the
graph's spectrum, which takes minutes where a graph is nearly uniform; and its loop is compiled once and kept on disk,
where importing and compiling umap-learn takes 13 seconds of every process.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from scipy import sparse

__all__ = ["graph_of", "layout"]

A, B = 1.576943, 0.8950609
"""Of the curve 1 / (1 + A d^(2 B)), which fits a plateau up to a distance of 0.1 and then a decay of 1."""
N_NEGATIVE = 5
"""Points pushed away for each pair pulled together."""
N_EPOCHS, N_EPOCHS_OF_MANY, MANY = 300, 100, 20_000
EXTENT = 10.0
"""Of the first layout, to either side."""
SMALLEST_SCALE = 1e-3
"""A point's scale of distance is at least this share of its mean distance."""


def graph_of(indices: np.ndarray, distances: np.ndarray) -> sparse.coo_matrix:
    """How much each two points belong together, in (0, 1], both ways.

    Args:
        indices: (n, k): each point itself, then its nearest others.
        distances: Of those, ascending.
    """
    n, k = indices.shape
    distances = distances.astype(np.float64)
    nearest = np.where(distances > 0, distances, np.inf).min(1)
    nearest[~np.isfinite(nearest)] = 0
    beyond = np.maximum(distances - nearest[:, None], 0)[:, 1:]
    low, high, scale = np.zeros(n), np.full(n, np.inf), np.ones(n)
    for _ in range(64):  # the scale at which a point's neighbours weigh log2(k) together
        too_much = np.exp(-beyond / scale[:, None]).sum(1) > np.log2(k)
        high, low = np.where(too_much, scale, high), np.where(too_much, low, scale)
        scale = np.where(np.isfinite(high), (low + high) / 2, 2 * scale)
    means = np.where(nearest > 0, distances.mean(1), distances.mean())
    scale = np.maximum(scale, np.maximum(SMALLEST_SCALE * means, np.finfo(float).tiny))
    weights = np.exp(-np.maximum(distances - nearest[:, None], 0) / scale[:, None])
    weights[indices == np.arange(n)[:, None]] = 0
    own = np.repeat(np.arange(n), k)
    directed = sparse.csr_matrix((weights.ravel(), (own, indices.ravel())), shape=(n, n))
    directed.eliminate_zeros()
    directed.data = np.minimum(directed.data, 1)  # a neighbour may be named twice
    reverse = directed.T.tocsr()
    return (directed + reverse - directed.multiply(reverse)).tocoo()


def layout(points: np.ndarray, indices: np.ndarray, distances: np.ndarray, seed: int) -> np.ndarray:
    """A place for each point, (n, 2) float32: the same seed gives the same bits.

    Args:
        points: (n, d), which the layout starts from.
        indices: As for `graph_of`.
        distances: As for `graph_of`.
        seed: Of the noise in the first layout and of the points that push.
    """
    n_epochs = N_EPOCHS if points.shape[0] <= MANY else N_EPOCHS_OF_MANY
    graph = graph_of(indices, distances)
    kept = graph.data >= graph.data.max() / n_epochs  # the others would never have their turn
    every = (graph.data[kept].max() / graph.data[kept]).astype(np.float32)
    places = _first(points, seed)
    _settle(places, graph.row[kept].astype(np.int32), graph.col[kept].astype(np.int32), every, n_epochs, seed)
    return places


def _first(points: np.ndarray, seed: int) -> np.ndarray:
    """The two leading principal components, with a little noise so that twins can part."""
    centred = points - points.mean(0)
    _, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    axes = axes[:, :-3:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    found = (centred @ axes.astype(np.float32)).astype(np.float64)
    found *= EXTENT / max(np.abs(found).max(), np.finfo(float).tiny)
    noise = np.random.default_rng(seed).normal(scale=1e-4 * EXTENT, size=found.shape)
    return np.ascontiguousarray(found + noise, np.float32)


@njit(cache=True)
def _clip(x):  # type: ignore[no-untyped-def]
    return min(max(x, -4.0), 4.0)


@njit(cache=True)
def _settle(places, heads, tails, every, n_epochs, seed):  # type: ignore[no-untyped-def]
    """Pull pairs together as often as they weigh, and push random others away, ever less."""
    n = np.uint64(places.shape[0])
    due = every.copy()
    due_away = every / N_NEGATIVE
    state = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x2545F4914F6CDD1D)
    for epoch in range(n_epochs):
        rate = 1.0 - epoch / n_epochs
        for e in range(heads.shape[0]):
            if due[e] > epoch:
                continue
            i, j = heads[e], tails[e]
            dx, dy = places[i, 0] - places[j, 0], places[i, 1] - places[j, 1]
            square = dx * dx + dy * dy
            if square > 0.0:
                power = square**B
                pull = -2.0 * A * B * power / square / (A * power + 1.0)
                mx, my = _clip(pull * dx) * rate, _clip(pull * dy) * rate
                places[i, 0] += mx
                places[i, 1] += my
                places[j, 0] -= mx
                places[j, 1] -= my
            due[e] += every[e]
            n_away = int((epoch - due_away[e]) / (every[e] / N_NEGATIVE))
            for _ in range(n_away):
                state ^= state << np.uint64(13)
                state ^= state >> np.uint64(7)
                state ^= state << np.uint64(17)
                k = np.int64((state >> np.uint64(11)) % n)
                if k == i:
                    continue
                dx, dy = places[i, 0] - places[k, 0], places[i, 1] - places[k, 1]
                square = dx * dx + dy * dy
                if square > 0.0:
                    push = 2.0 * B / ((0.001 + square) * (A * square**B + 1.0))
                    places[i, 0] += _clip(push * dx) * rate
                    places[i, 1] += _clip(push * dy) * rate
            if n_away > 0:
                due_away[e] += n_away * every[e] / N_NEGATIVE
