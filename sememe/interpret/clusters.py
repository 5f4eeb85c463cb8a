"""A map of the decoder directions, and the groups on it. Knows directions and the tokens latents fire on."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sememe.interpret.relations import Neighbours

__all__ = ["Cluster", "Map", "make_map", "named"]

MIN_LATENTS = 32
"""With fewer latents alive there is no map."""
MIN_CLUSTER = 5
N_NEIGHBOURS = 15
N_NAMES = 4


class Map(NamedTuple):
    """Each latent's place, and the group it is in."""

    places: np.ndarray
    """(d_sae, 2) float32; NaN where the latent is dead."""
    cluster: np.ndarray
    """(d_sae,) int32; -1 for none."""


class Cluster(NamedTuple):
    """A group of latents, by the tokens that most of them fire on."""

    label: str
    n_latents: int
    tokens: list[int]


def make_map(directions: np.ndarray, nearest: Neighbours, alive: np.ndarray, seed: int) -> Map:
    """Lay the living latents' directions out in two dimensions (UMAP over cosines), and find the crowds (HDBSCAN).

    Sources: McInnes et al. 2018, arXiv:1802.03426; Campello et al. 2013. The nearest directions are those
    already found, exactly; UMAP's own search is not run.

    Args:
        directions: (d_sae, d).
        nearest: Of the dictionary's own decoder directions.
        alive: Which latents fired.
        seed: Of the layout.
    """
    d_sae = directions.shape[0]
    places, cluster = np.full((d_sae, 2), np.nan, np.float32), np.full(d_sae, -1, np.int32)
    ids = np.flatnonzero(alive)
    if ids.shape[0] < MIN_LATENTS:
        return Map(places, cluster)
    from sklearn.cluster import HDBSCAN

    indices, distances = _among_alive(nearest, ids, d_sae)
    found = layout(directions[ids], indices, distances, seed)
    places[ids] = found
    cluster[ids] = _by_size(HDBSCAN(min_cluster_size=MIN_CLUSTER, copy=True).fit_predict(found))
    return Map(places, cluster)


def layout(points: np.ndarray, indices: np.ndarray, distances: np.ndarray, seed: int) -> np.ndarray:
    """UMAP of points whose nearest are known, (n, 2) float32: the same seed gives the same bits.

    It starts from the two leading principal components and not from the graph's spectrum, which takes minutes where
    the graph is nearly uniform.

    Args:
        points: (n, d).
        indices: (n, k): each point itself, then its nearest others.
        distances: Of those, ascending.
        seed: Of the layout.
    """
    with warnings.catch_warnings():
        # That tensorflow is missing, that new points cannot be placed, and that a seed means one thread.
        warnings.simplefilter("ignore")
        import umap  # takes seconds, so only where it is needed

        found: np.ndarray = umap.UMAP(
            n_neighbors=indices.shape[1],
            metric="cosine",
            init="pca",
            random_state=seed,
            n_jobs=1,
            precomputed_knn=(indices, distances),
        ).fit_transform(points)
    return found


def _among_alive(nearest: Neighbours, ids: np.ndarray, d_sae: int) -> tuple[np.ndarray, np.ndarray]:
    """The graph UMAP wants: each living latent itself, then its nearest living others, as cosine distances."""
    number = np.full(d_sae, -1, np.int64)
    number[ids] = np.arange(ids.shape[0])
    others, cosines = number[nearest.others[ids]], nearest.cosines[ids].astype(np.float32)
    # The dead go to the end of each row; a row with too few living neighbours repeats its last.
    order = np.argsort(others < 0, axis=1, kind="stable")
    others, cosines = np.take_along_axis(others, order, axis=1), np.take_along_axis(cosines, order, axis=1)
    for column in range(1, others.shape[1]):
        gone = others[:, column] < 0
        others[gone, column], cosines[gone, column] = others[gone, column - 1], cosines[gone, column - 1]
    none = others[:, 0] < 0
    others[none], cosines[none] = np.flatnonzero(none)[:, None], 0
    n = min(N_NEIGHBOURS - 1, others.shape[1])
    own = np.arange(ids.shape[0])[:, None]
    distances = np.concatenate((np.zeros((ids.shape[0], 1), np.float32), 1 - cosines[:, :n]), axis=1)
    return np.concatenate((own, others[:, :n]), axis=1), np.maximum(distances, 0)


def _by_size(found: np.ndarray) -> np.ndarray:
    """Groups numbered anew, the largest 0; -1 stays."""
    sizes = np.bincount(found[found >= 0])
    number = np.empty(sizes.shape[0] + 1, np.int32)
    number[np.argsort(-sizes, kind="stable")] = np.arange(sizes.shape[0])
    number[-1] = -1
    renumbered: np.ndarray = number[found]
    return renumbered


def named(cluster: np.ndarray, top_tokens: np.ndarray, text_of: Callable[[int], str]) -> list[Cluster]:
    """Each group by the tokens that lead most of its latents.

    Args:
        cluster: Of each latent, or -1.
        top_tokens: (d_sae, n), the heaviest first, -1 beyond the last.
        text_of: A token's text.
    """
    out = []
    for group in range(int(cluster.max(initial=-1)) + 1):
        members = np.flatnonzero(cluster == group)
        # A latent's first token says most of it; tokens that differ in blanks and case only count as one word.
        votes: Counter[str] = Counter()
        spelt: dict[str, Counter[int]] = {}
        for latent in members:
            for rank, token in enumerate(top_tokens[latent][:3].tolist()):
                if token >= 0:
                    word = text_of(token).strip().lower() or text_of(token)
                    votes[word] += 3 - rank
                    spelt.setdefault(word, Counter())[token] += 3 - rank
        words = sorted(votes, key=lambda word: (-votes[word], word))[:N_NAMES]
        tokens = [spelt[word].most_common(1)[0][0] for word in words]
        label = ", ".join(f"“{word}”" for word in words)
        out.append(Cluster(label or "no token", int(members.shape[0]), tokens))
    return out
