"""What probes still tell of rows after an erasure. Knows rows and labels; knows no model.

Fitted on the training texts' rows, scored on the held-out ones'. Linear, as everything here that erases is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sememe import metrics
from sememe.metrics import LinearProbe

__all__ = ["Probes", "fit_probes"]

ROUNDING = 1e-6
"""A column whose spread an edit brings below this share of what it was holds nothing but rounding, which a probe that
looks at columns over their spread would blow up."""


class Probes(NamedTuple):
    """One for each class; of two classes, one alone."""

    probes: tuple[LinearProbe, ...]
    read: Bool[np.ndarray, " d"]
    """Which columns."""

    def answers(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n classes"]:
        """Log-odds of every class."""
        found = [probe.answers(x[:, self.read]) for probe in self.probes]
        return np.stack([found[0], -found[0]] if len(found) == 1 else found, axis=1)


def fit_probes(
    x: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    spread: Float[np.ndarray, " d"],
    units: Int[np.ndarray, " n"],
    *,
    seed: int = 0,
) -> Probes:
    """A logistic regression of each class against the others, its strength chosen by folds of these rows.

    Args:
        x: Rows of the training texts, edited.
        labels: Their classes, 0 to classes - 1.
        spread: Standard deviation of each column before the edit.
        units: What each row is of: no fold splits those of one.
        seed: Of the folds.
    """
    read = x.std(0) > ROUNDING * spread
    if not read.any():
        read = np.ones(x.shape[1], dtype=bool)
        x = np.zeros_like(x)
    n_classes = int(labels.max()) + 1
    asked = range(1) if n_classes == 2 else range(n_classes)
    return Probes(
        tuple(metrics.linear_probe(x[:, read], labels == number, units=units, seed=seed) for number in asked),
        read,
    )
