"""Cuts of labelled rows into folds and halves. Knows labels and units; sees no row.

A unit is what rows are of that hang together: equal texts, the texts of one document. No cut goes through one, as what
a probe has seen of it in training it would know again in testing. Units are dealt, not rows: each counts once, however
many rows it has, and is of the class that most of its rows are of.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped

from sememe.errors import ConfigError

__all__ = ["LEAST_PER_CLASS", "folds", "halves", "numbered_units", "shuffled_labels", "units_per_class"]

LEAST_PER_CLASS = 10

Labels = Shaped[np.ndarray, " n"]
"""Of each row: true or false, or a class from 0 up."""
Units = Int[np.ndarray, " n"]


def numbered_units(units: Shaped[np.ndarray, " n"] | None, n: int) -> Units:
    """Numbers of units in the order of their first rows.

    Args:
        units: What each row is of: numbers or names. Each row for itself, if not given.
        n: Rows.
    """
    if units is None:
        return np.arange(n)
    _, first, inverse = np.unique(units, return_index=True, return_inverse=True)
    places = np.empty(len(first), dtype=np.int64)
    places[first.argsort()] = np.arange(len(first))
    found: Units = places[inverse.reshape(-1)]
    return found


def units_per_class(labels: Labels, units: Units, n_classes: int) -> Int[np.ndarray, " classes"]:
    """How many units each class has."""
    return np.bincount(_class_of_units(labels, units), minlength=n_classes)


def folds(
    labels: Labels, n_folds: int, seed: int, units: Units
) -> list[tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]]:
    """Rows for training and for testing of each fold: every unit is tested once, in a fold of as many of its class as
    the others have."""
    from sklearn.model_selection import StratifiedKFold

    of = _class_of_units(labels, units)
    cut = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    return [_rows(test, units) for _, test in cut.split(np.zeros(len(of)), of)]


def halves(
    labels: Int[np.ndarray, " n"], seed: int, n_classes: int | None = None, units: Units | None = None
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]:
    """Rows for training and for testing: half of the units of each class in either.

    Args:
        labels: Classes.
        seed: Of the cut.
        n_classes: How many classes there must be; those that there are, if not given.
        units: What each row is of. Each row for itself, if not given.

    Raises:
        ConfigError: a class has too few.
    """
    from sklearn.model_selection import train_test_split

    numbered = numbered_units(units, len(labels))
    of = _class_of_units(labels, numbered)
    counts = np.bincount(of, minlength=n_classes or (int(labels.max()) + 1 if len(labels) else 0))
    if n_classes is None:
        counts = counts[np.unique(labels)]
    if len(counts) < 2 or counts.min() < 2 * LEAST_PER_CLASS:
        raise ConfigError(
            f"each class (or combination of classes) must have at least {2 * LEAST_PER_CLASS} texts"
            + once_each(numbered),
            ", ".join(str(int(count)) for count in counts),
            "Give more labelled texts, or leave that class out.",
        )
    _, test = train_test_split(np.arange(len(of)), test_size=0.5, random_state=seed, stratify=of)
    return _rows(test, numbered)


def shuffled_labels(labels: Bool[np.ndarray, " n"], units: Units, seed: int) -> Bool[np.ndarray, " n"]:
    """Labels that say nothing: those of units, dealt anew among them, so that rows of one unit still have one."""
    of = _class_of_units(labels, units)
    order = torch.randperm(len(of), generator=torch.Generator().manual_seed(seed)).numpy()
    found: np.ndarray = of[order][units].astype(bool)
    return found


def once_each(units: Units) -> str:
    """What an error says about rows that count together, if there are such."""
    return (
        ", those of one unit (equal ones, say) counted once" if units.max(initial=-1) + 1 < len(units) else ""
    )


def _class_of_units(labels: Labels, units: Units) -> Int[np.ndarray, " units"]:
    """The class of most of a unit's rows; of several, the lowest."""
    numbers = labels.astype(np.int64)
    table = np.zeros((int(units.max(initial=-1)) + 1, int(numbers.max(initial=0)) + 1), dtype=np.int64)
    np.add.at(table, (units, numbers), 1)
    found: np.ndarray = table.argmax(1)
    return found


def _rows(
    test: Int[np.ndarray, " m"], units: Units
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]:
    """Rows of the other units, and of these."""
    inside = np.zeros(int(units.max()) + 1, dtype=bool)
    inside[test] = True
    tested = inside[units]
    return np.flatnonzero(~tested), np.flatnonzero(tested)
