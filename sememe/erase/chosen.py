"""Which latents tell labels apart, on training texts alone. Knows activations and labels; knows no model.

With a_ij the activation of latent j on text i (pooled over its positions), m_cj its mean over the texts of class c and
v_cj its variance there, d_j the direction it writes, and every class counting alike:

    between_j      variance over classes of m_cj, times |d_j|^2: how far apart it writes the classes, in the units of
                   the activations, whatever those of the latent
    consistency_j  variance over classes of m_cj / (that + mean over classes of v_cj): 1 where all texts of a class
                   make it fire alike, 0 where the classes do not differ
    score_j        between_j * consistency_j

Source: consistency is the correlation ratio (Fisher 1925, "Statistical Methods for Research Workers": the share of a
variance that lies between classes), beside the numerator of his discriminant (1936). Either alone misleads: a
latent that fires once, in one class, has a large numerator; one that hardly writes anything a large ratio.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

__all__ = ["Ranking", "alike", "ranking"]

N_ALIKE = 16
"""Latents of about the same density from which a null's are drawn."""


class Ranking(NamedTuple):
    """Every latent's numbers, and the latents by falling score (ties: the lower one first)."""

    order: Int[np.ndarray, " d_sae"]
    score: Float[np.ndarray, " d_sae"]
    between: Float[np.ndarray, " d_sae"]
    consistency: Float[np.ndarray, " d_sae"]
    density: Float[np.ndarray, " d_sae"]
    """Share of the texts on which it is not silent."""
    means: Float[np.ndarray, "classes d_sae"]


def ranking(
    acts: Float[np.ndarray, "n d_sae"],
    labels: Int[np.ndarray, " n"],
    lengths: Float[np.ndarray, " d_sae"],
) -> Ranking:
    """Latents by how well they tell the labels apart, as the module says.

    Args:
        acts: A row per training text.
        labels: Which class each is of, 0 to classes - 1; every class has a row.
        lengths: Of the directions that the latents write.
    """
    classes = range(int(labels.max()) + 1)
    means = np.stack([acts[labels == c].mean(0, dtype=np.float64) for c in classes])
    within = np.mean([acts[labels == c].var(0, dtype=np.float64) for c in classes], axis=0)
    apart = means.var(0)
    total = apart + within
    consistency = np.divide(apart, total, out=np.zeros_like(apart), where=total > 0)
    between = apart * np.square(lengths.astype(np.float64))
    score = between * consistency
    return Ranking(
        np.argsort(-score, kind="stable"),
        score,
        between,
        consistency,
        (acts != 0).mean(0, dtype=np.float64),
        means,
    )


def alike(
    chosen: tuple[int, ...], density: Float[np.ndarray, " d_sae"], rng: np.random.Generator
) -> tuple[int, ...]:
    """As many other latents at random, one of about the density of each: a null.

    Args:
        chosen: Which they stand beside; none of them is taken.
        density: Of every latent.
        rng: Draws one of the 16 nearest.
    """
    free = np.ones(len(density), dtype=bool)
    free[list(chosen)] = False
    found = []
    for latent in chosen:
        others = np.flatnonzero(free)
        if len(others) == 0:
            break
        near = others[np.argsort(np.abs(density[others] - density[latent]), kind="stable")[:N_ALIKE]]
        found.append(int(rng.choice(near)))
        free[found[-1]] = False
    return tuple(found)
