"""What a few latents say about a label, beside what everything together says. Knows a matrix and labels.

Nothing is chosen on test data: in every outer fold, latents are chosen and the regression's strength is set on the
training part alone, and rows of one unit (equal texts, say) are never on both sides.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sememe.errors import ActivationError, ConfigError
from sememe.metrics.cuts import LEAST_PER_CLASS, folds, numbered_units, once_each, units_per_class
from sememe.metrics.sums import Statistic, undrawn_share

__all__ = [
    "LinearProbe",
    "Probe",
    "ProbeScores",
    "class_scores",
    "dense_probe",
    "linear_probe",
    "probe_scores",
    "sparse_probe",
]

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Inverse regularisation strengths that are tried on the training part."""


class ProbeScores(NamedTuple):
    """Of one probe, on rows that it was not fitted to: each row is tested once."""

    accuracy: float
    balanced_accuracy: float
    """Mean of the two classes' accuracies: 0.5 for always answering one of them."""
    auroc: float
    """Share of the pairs (one row with, one without) of a fold that are in the right order, ties half; folds' models'
    answers are not comparable. Chance is 0.5, whatever the shares."""


class Probe(NamedTuple):
    """Scores, which columns were used in each fold, and the answers."""

    scores: ProbeScores
    chosen: tuple[tuple[int, ...], ...]
    answers: Float[np.ndarray, " n"]
    """Log-odds of each row by the fold that did not see it."""
    folds: Int[np.ndarray, " n"]
    """Which fold tested each row."""
    units: Int[np.ndarray, " n"]
    """What each row is of: rows of one unit share a fold, and are drawn together."""


class LinearProbe(NamedTuple):
    """`x @ weights + bias` is the log-odds of a label."""

    weights: Float[np.ndarray, " d"]
    bias: float

    def answers(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """Log-odds of rows."""
        found: np.ndarray = x @ self.weights + self.bias
        return found


def sparse_probe(
    acts: Float[Tensor, "n d_sae"],
    labels: Bool[Tensor, " n"],
    ks: tuple[int, ...] = (1, 2, 5, 10),
    *,
    units: Shaped[np.ndarray, " n"] | None = None,
    n_folds: int = 5,
    seed: int = 0,
) -> dict[int, Probe]:
    """Logistic regression on the k columns whose means differ most between the classes, over their spread.

    Source: Gurnee et al. 2023, arXiv:2305.01610; SAEBench (Karvonen et al. 2025), which chooses by the plain
    difference of means. Differs: that difference over the pooled standard deviation, so that the units of latents
    do not count.

    Args:
        acts: A row per text: e.g. the largest activation of each latent in it.
        labels: Its class.
        ks: How many columns.
        units: What each row is of: no fold, outer or inner, splits those of one. Each row for itself, if not given.
        n_folds: Outer folds, each stratified; at most three inner ones.
        seed: Of the folds.

    Raises:
        ConfigError: a class with fewer than 10 units, or a k outside the columns.
        ActivationError: a row is NaN or infinite.
    """
    x, y, of = _checked(acts, labels, units, n_folds)
    for k in ks:
        if not 1 <= k <= x.shape[1]:
            raise ConfigError(f"k must be in [1, {x.shape[1]}], the number of latents", k, "Lower k.")
    found = {}
    for k in ks:
        answers, chosen = np.zeros(len(y)), []
        for train, test in folds(y, n_folds, seed, of):
            columns = _most_different(x[train], y[train], k)
            chosen.append(tuple(int(column) for column in columns))
            probe = linear_probe(x[train][:, columns], y[train], units=of[train], n_folds=n_folds, seed=seed)
            answers[test] = probe.answers(x[test][:, columns])
        found[k] = _probe(answers, y, of, n_folds, seed, tuple(chosen))
    return found


def dense_probe(
    acts: Float[Tensor, "n d"],
    labels: Bool[Tensor, " n"],
    *,
    units: Shaped[np.ndarray, " n"] | None = None,
    n_folds: int = 5,
    seed: int = 0,
) -> Probe:
    """The same on all columns: what a probe on the activations themselves gives. Arguments and errors as there."""
    x, y, of = _checked(acts, labels, units, n_folds)
    answers = np.zeros(len(y))
    for train, test in folds(y, n_folds, seed, of):
        probe = linear_probe(x[train], y[train], units=of[train], n_folds=n_folds, seed=seed)
        answers[test] = probe.answers(x[test])
    return _probe(answers, y, of, n_folds, seed)


def _probe(
    answers: np.ndarray,
    y: np.ndarray,
    units: np.ndarray,
    n_folds: int,
    seed: int,
    chosen: tuple[tuple[int, ...], ...] = (),
) -> Probe:
    tested = np.zeros(len(y), dtype=np.int64)
    for number, (_, test) in enumerate(folds(y, n_folds, seed, units)):
        tested[test] = number
    scores = {
        name: float(draws[0]) for name, draws in _drawn(answers, y, tested, np.ones((1, len(y)))).items()
    }
    return Probe(ProbeScores(**scores), chosen, answers, tested, units)


def probe_scores(
    probe: Probe, labels: Bool[Tensor, " n"], *, n_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Statistic]:
    """A probe's scores with 95% intervals from drawing its units again; no probe is fitted anew.

    Where a score is exactly 0 or 1 every draw is, too: an accuracy then has Wilson's interval, the others the bound of
    disjoint pairs (`_undrawn_pairs`, with its sources).

    Args:
        probe: As `sparse_probe` or `dense_probe` made it.
        labels: Those it was made with.
        n_bootstrap: Draws; 0 gives no intervals.
        seed: Of the draws. Equal seeds draw equal units, so that a null's interval is paired.
    """
    y = labels.detach().cpu().numpy().astype(bool)
    n = int(probe.units.max()) + 1
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_bootstrap)[:, probe.units]
    found = {}
    for name, draws in _drawn(probe.answers, y, probe.folds, weights).items():
        value = getattr(probe.scores, name)
        if n_bootstrap == 0:
            found[name] = Statistic(value)
        elif np.isfinite(draws).all():
            low, high = (float(q) for q in np.quantile(draws, [0.025, 0.975]))
            drawn = Statistic(value, low, high)
            if name == "accuracy":
                found[name] = undrawn_share(drawn, n)
            else:
                found[name] = _undrawn_pairs(drawn, _n_pairs(y, probe, name))
        else:
            found[name] = Statistic(
                value, cause="some draws of texts hold none with, or none without, the label"
            )
    return found


def class_scores(
    answers: Float[np.ndarray, "n classes"],
    labels: Int[np.ndarray, " n"],
    units: Int[np.ndarray, " n"] | None = None,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Statistic]:
    """What one probe for each class tells of rows that none was fitted to, with 95% intervals from drawing units again.

    `balanced_accuracy`: the mean over classes of the share of a class's rows on which its own answer is the largest;
    chance is 1 / classes, also for always saying the same. `auroc`: the mean over classes of the share of pairs (one
    row of the class, one of another) that are in the right order, ties half; chance is 0.5. Where a score is exactly
    0 or 1 it has the bound of `probe_scores`.

    Args:
        answers: Log-odds of every class; of two, the second's are the first's turned round.
        labels: Which class each row is of; every class has a row.
        units: What is drawn: rows of one document. Each row for itself, if not given.
        n_bootstrap: Draws; 0 gives no intervals.
        seed: Of the draws. Equal seeds and units draw equal units, so that arms are paired.
    """
    n_classes = answers.shape[1]
    numbered = (
        np.arange(len(labels)) if units is None else np.unique(units, return_inverse=True)[1].reshape(-1)
    )
    n_units = int(numbered.max()) + 1
    weights = np.ones((1 + n_bootstrap, n_units))
    weights[1:] = np.random.default_rng(seed).multinomial(
        n_units, np.full(n_units, 1 / n_units), size=n_bootstrap
    )
    weights = weights[:, numbered]
    right = answers.argmax(1) == labels
    folds = np.zeros(len(labels), dtype=np.int64)
    shares, ordered = [], []
    for number in range(n_classes):
        own = labels == number
        with np.errstate(all="ignore"):
            shares.append(weights[:, own] @ right[own].astype(np.float64) / weights[:, own].sum(1))
        ordered.append(_drawn(answers[:, number], own, folds, weights)["auroc"])
    found = {"balanced_accuracy": np.mean(shares, axis=0), "auroc": np.mean(ordered, axis=0)}
    counts = [len(np.unique(numbered[labels == number])) for number in range(n_classes)]
    others = [len(np.unique(numbered[labels != number])) for number in range(n_classes)]
    trials = {
        "balanced_accuracy": n_classes * min(counts),
        "auroc": min(min(pair) for pair in zip(counts, others, strict=True)),
    }
    return {name: _undrawn_pairs(_interval(draws), trials[name]) for name, draws in found.items()}


def _interval(draws: Float[np.ndarray, " draws"]) -> Statistic:
    """The first is the value, the others say how it might have come out."""
    value, others = float(draws[0]), draws[1:]
    if len(others) == 0:
        return Statistic(value)
    if not np.isfinite(others).all():
        return Statistic(value, cause="some draws of texts hold none of a class")
    low, high = (float(q) for q in np.quantile(others, [0.025, 0.975]))
    return Statistic(value, low, high)


def _n_pairs(y: Bool[np.ndarray, " n"], probe: Probe, name: str) -> int:
    """How many independent answers stand behind a score that is right, or wrong, of everything."""

    def least(among: Bool[np.ndarray, " n"]) -> int:
        return min(len(np.unique(probe.units[side & among])) for side in (y, ~y))

    if name == "balanced_accuracy":
        return 2 * least(np.ones_like(y))
    return sum(least(probe.folds == fold) for fold in np.unique(probe.folds))


def _undrawn_pairs(found: Statistic, n: int) -> Statistic:
    """A balanced accuracy or AUROC of exactly 0 or 1, of which every draw is the same, with a bound that holds.

    Neither is a share of independent trials, so that Wilson's interval is not theirs. An AUROC of 1 says that the
    pairs (one row with the label, one without), no row in two of them, are all in the right order: n independent
    trials whose chance of that is at most auroc ** n. A balanced accuracy of 1 says that both classes' rows are all
    right, a chance of p ** n_p * q ** n_q <= (p * q) ** min(n_p, n_q) <= ((p + q) / 2) ** (2 * min(n_p, n_q)). Folds'
    models, as they are, each have a score of their own; of these scores' mean, weighted by the trials in each fold,
    the same holds. So a true score below 0.025 ** (1 / n) would do that in less than 2.5% of the samples; 0 is the
    mirror image.

    Sources: Hoeffding 1963, "Probability inequalities for sums of bounded random variables", section 5 (two-sample
    U-statistics by disjoint pairs); Clopper & Pearson 1934 (the bound where all n trials agree).

    Args:
        found: The score with the draws' interval.
        n: Disjoint pairs within folds, for AUROC; twice the smaller class, for balanced accuracy.
    """
    if not (found.value == found.low == found.high and found.value in (0.0, 1.0)) or n < 1:
        return found
    least = 0.025 ** (1 / n)
    low, high = (0.0, 1 - least) if found.value == 0 else (least, 1.0)
    return found._replace(low=low, high=high)


def _drawn(
    answers: Float[np.ndarray, " n"],
    y: Bool[np.ndarray, " n"],
    folds: Int[np.ndarray, " n"],
    weights: Shaped[np.ndarray, "draws n"],
) -> dict[str, Float[np.ndarray, " draws"]]:
    """Scores of rows that count so many times each."""
    weights = weights.astype(np.float64)
    right = ((answers > 0) == y).astype(np.float64)
    ordered, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for fold in np.unique(folds):
        one, other = (np.flatnonzero((folds == fold) & side) for side in (y, ~y))
        before = np.sign(answers[one][:, None] - answers[other][None]) / 2 + 0.5
        ordered += ((weights[:, one] @ before) * weights[:, other]).sum(1)
        pairs += weights[:, one].sum(1) * weights[:, other].sum(1)
    with np.errstate(all="ignore"):
        sides = [weights[:, side] @ right[side] / weights[:, side].sum(1) for side in (y, ~y)]
        return {
            "accuracy": weights @ right / weights.sum(1),
            "balanced_accuracy": (sides[0] + sides[1]) / 2,
            "auroc": ordered / pairs,
        }


def _checked(
    acts: Tensor, labels: Tensor, units: np.ndarray | None, n_folds: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y = acts.detach().cpu().double().numpy(), labels.detach().cpu().numpy().astype(bool)
    of = numbered_units(units, len(y))
    without, with_it = units_per_class(y, of, 2)
    least = max(LEAST_PER_CLASS, n_folds)
    if min(without, with_it) < least:
        raise ConfigError(
            f"each class must have at least {least} texts{once_each(of)}",
            f"{with_it} and {without}",
            "Give more labelled texts.",
        )
    finite = np.isfinite(x).all(1)
    if not finite.all():
        raise ActivationError(
            "activations must be finite",
            f"NaN or infinity in row {int(np.argmin(finite))}",
            "Look at that text.",
        )
    return x, y, of


def _most_different(x: np.ndarray, y: np.ndarray, k: int) -> np.ndarray:
    """Columns by difference of class means over the pooled standard deviation; ties go to lower ones."""
    one, other = x[y], x[~y]
    spread = np.sqrt((one.var(0) * len(one) + other.var(0) * len(other)) / len(x))
    difference = np.abs(one.mean(0) - other.mean(0))
    with np.errstate(divide="ignore", invalid="ignore"):
        score = np.where(spread > 0, difference / spread, np.where(difference > 0, math.inf, 0.0))
    return np.argsort(-score, kind="stable")[:k]


def linear_probe(
    x: Float[np.ndarray, "n d"],
    y: Bool[np.ndarray, " n"],
    *,
    units: Shaped[np.ndarray, " n"] | None = None,
    n_folds: int = 3,
    seed: int = 0,
) -> LinearProbe:
    """Logistic regression whose strength folds of these rows have chosen; its weights are for rows as they come.

    Args:
        x: Rows.
        y: Their label.
        units: What each row is of: no fold splits those of one. Each row for itself, if not given.
        n_folds: At most three are used, and no more than a class has units; with one alone, the strength is 1.
        seed: Of the folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    mean, std = x.mean(0), x.std(0)
    std[std == 0] = 1.0
    x = (x - mean) / std

    def fitted(strength: float, rows: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=1000).fit(x[rows], y[rows])

    of = numbered_units(units, len(y))
    n_inner = min(n_folds, 3, int(units_per_class(y, of, 2).min()))
    best = 1.0
    if n_inner > 1:
        inner = folds(y, n_inner, seed + 1, of)
        losses = [
            sum(
                log_loss(y[out], fitted(strength, into).predict_proba(x[out]), labels=[False, True])
                for into, out in inner
            )
            for strength in STRENGTHS
        ]
        best = STRENGTHS[int(np.argmin(losses))]
    model = fitted(best, np.arange(len(y)))
    weights = model.coef_[0] / std
    return LinearProbe(weights, float(model.intercept_[0] - mean @ weights))
