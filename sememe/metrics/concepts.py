"""What latents do for labels: probes that they break, spurious ones that they clean, concepts that they absorb.

Knows rows (means of a model's activations over a text, or one position's), the same means of the latents, and labels.
Latents are ablated in the rows, to their mean over the training rows: what they tell is gone, what the dictionary does
not reconstruct stays, and no row is moved across a probe's threshold merely because a latent is usually active. That is
exact for means over positions, as decoding is linear.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sememe.errors import ConfigError
from sememe.metrics.probing import LEAST_PER_CLASS, LinearProbe, linear_probe

__all__ = [
    "Absorption",
    "SpuriousRemoval",
    "TargetedPerturbation",
    "absorption",
    "spurious_removal",
    "targeted_perturbation",
]

Rows = Float[np.ndarray, "n d"]
Acts = Float[np.ndarray, "n d_sae"]
Weights = Float[np.ndarray, "d_sae d"]


class TargetedPerturbation(NamedTuple):
    """What ablating the latents of one class does to every class's probe."""

    score: float
    """Mean over classes of the own probe's loss of balanced accuracy less the mean of the others'."""
    own: float
    """Mean loss of the class's own probe."""
    others: float
    """Mean loss of the other classes' probes."""
    losses: Float[np.ndarray, "ablated probe"]
    """Loss of balanced accuracy of each class's probe when each class's latents are ablated."""


class SpuriousRemoval(NamedTuple):
    """What ablating the latents of a spurious label does to a probe that learned from it."""

    score: float
    """(ablated - biased) / (clean - biased): 1 if the probe becomes as good as one trained on balanced rows; NaN if it
    was that already."""
    biased: float
    """Accuracy on balanced rows of the probe trained where both labels agree."""
    clean: float
    """That of a probe trained on balanced rows."""
    ablated: float
    """That of the biased probe on ablated rows."""


class Absorption(NamedTuple):
    """How often the latents that stand for a concept are silent on it while others carry its direction."""

    full: float
    """Share of the probe's true positives on which all of them are silent and one other latent carries the concept."""
    fraction: float
    """Mean share of the concept's direction that other latents carry."""
    n_true_positives: int
    """Test rows of the concept that the dense probe recognises."""
    latents: tuple[int, ...]
    """Those that stand for it: so many as each raised the probe's F1 by more than 0.03."""
    f1: float
    """Test F1 of a probe on these alone."""


def targeted_perturbation(
    x: Rows,
    acts: Acts,
    W_dec: Weights,
    labels: Int[np.ndarray, " n"],
    n_ablated: tuple[int, ...],
    *,
    seed: int = 0,
) -> dict[int, TargetedPerturbation]:
    """Targeted probe perturbation: probes are trained, and latents chosen, on one half; scored on the other.

    Source: SAEBench (Karvonen et al. 2025), after SHIFT of Marks et al. 2024. Differs: balanced accuracies; ablated to
    the mean instead of to 0.

    Args:
        x: Means of activations.
        acts: Means of latents.
        W_dec: Decoder rows.
        labels: Class of each row, 0 and up; at least two classes.
        n_ablated: Numbers of latents to ablate per class: those with the largest product of the difference of their
            means and what their decoder row adds to the class's probe.
        seed: Of the halves and folds.

    Raises:
        ConfigError: fewer than two classes, or one with too few rows.
    """
    classes = np.unique(labels)
    if len(classes) < 2:
        raise ConfigError(
            "targeted perturbation needs at least two classes", len(classes), "Give more labels."
        )
    train, test = _halves(labels, seed)
    probes, latents = [], []
    for one in classes:
        mine = labels[train] == one
        probe = linear_probe(x[train], mine, seed=seed)
        probes.append(probe)
        latents.append(_most_telling(acts[train], mine, W_dec, probe, max(n_ablated)))
    truth = [labels[test] == one for one in classes]
    before = [_balanced(probe, x[test], right) for probe, right in zip(probes, truth, strict=True)]
    found, means = {}, acts[train].mean(0)
    for n in n_ablated:
        losses = np.zeros((len(classes), len(classes)))
        for i, ordered in enumerate(latents):
            ablated = _without(x[test], acts[test] - means, W_dec, ordered[:n])
            for j, (probe, right) in enumerate(zip(probes, truth, strict=True)):
                losses[i, j] = before[j] - _balanced(probe, ablated, right)
        own = float(np.diag(losses).mean())
        others = float((losses.sum() - np.trace(losses)) / (len(classes) * (len(classes) - 1)))
        found[n] = TargetedPerturbation(own - others, own, others, losses)
    return found


def spurious_removal(
    x: Rows,
    acts: Acts,
    W_dec: Weights,
    concept: Bool[np.ndarray, " n"],
    spurious: Bool[np.ndarray, " n"],
    n_ablated: tuple[int, ...],
    *,
    seed: int = 0,
) -> dict[int, SpuriousRemoval]:
    """Spurious correlation removal: a probe for the concept is trained where the spurious label goes with it.

    Latents are chosen on the training half by what they do to a probe for the spurious label; scores are on a test half
    with equally many rows of all four combinations.

    Source: Karvonen et al. 2024, arXiv:2411.18895 (SCR), after SHIFT of Marks et al. 2024. Differs: ablated to the
    mean instead of to 0.

    Args:
        x: Means of activations.
        acts: Means of latents.
        W_dec: Decoder rows.
        concept: The label that is wanted.
        spurious: The other.
        n_ablated: Numbers of latents to ablate.
        seed: Of the halves, draws and folds.

    Raises:
        ConfigError: one of the four combinations has too few rows.
    """
    four = 2 * concept.astype(np.int64) + spurious
    train, test = _halves(four, seed, n_classes=4)
    balanced, held_out = _balance(four, train, seed), _balance(four, test, seed)
    agreeing = train[concept[train] == spurious[train]]
    biased = linear_probe(x[agreeing], concept[agreeing], seed=seed)
    clean = linear_probe(x[balanced], concept[balanced], seed=seed)
    about = linear_probe(x[balanced], spurious[balanced], seed=seed)
    ordered = _most_telling(acts[balanced], spurious[balanced], W_dec, about, max(n_ablated))
    right = concept[held_out]
    before, best = (_balanced(probe, x[held_out], right) for probe in (biased, clean))
    found, means = {}, acts[balanced].mean(0)
    for n in n_ablated:
        after = _balanced(biased, _without(x[held_out], acts[held_out] - means, W_dec, ordered[:n]), right)
        score = (after - before) / (best - before) if best != before else float("nan")
        found[n] = SpuriousRemoval(score, before, best, after)
    return found


def absorption(
    x: Rows,
    acts: Acts,
    W_dec: Weights,
    label: Bool[np.ndarray, " n"],
    *,
    seed: int = 0,
    f1_gain: float = 0.03,
    max_latents: int = 10,
) -> Absorption:
    """Feature absorption: rows of a concept on which its own latents are silent and others write its direction.

    With p the unit direction of a dense probe, a latent writes `act * (W_dec . p)` along it. Its own latents are as
    many of the most telling ones as each raise the F1 of a probe by more than `f1_gain`. A row is fully absorbed if
    all of them are silent and the one other latent that writes most has a cosine of at least 0.025 with p and writes
    at least 0.4 of `x . p`. The fraction is A / (A + M): M is what its own latents write, A what the three strongest
    others write whose cosine is at least 0.1, at most `x . p - M`; 0 where M reaches `x . p` or A stays below 0.4 of
    it.

    Source: Chanin et al. 2024, arXiv:2409.14507; the fraction as SAEBench has it. Differs: any label and any rows, not
    only first letters; `x . p` counts from where the probe is undecided, so that an offset that all rows share is
    nobody's.

    Args:
        x: Activations, a row per example.
        acts: Latents.
        W_dec: Decoder rows.
        label: Whether the example has the concept.
        seed: Of the halves and folds.
        f1_gain: See above.
        max_latents: At most so many stand for the concept.

    Returns:
        NaN where the probe recognises no row, or the concept's own latents never fire.

    Raises:
        ConfigError: too few rows with or without the concept.
    """
    train, test = _halves(label.astype(np.int64), seed)
    probe = linear_probe(x[train], label[train], seed=seed)
    size = float(np.linalg.norm(probe.weights))
    direction = probe.weights / max(size, 1e-12)
    order = _most_telling(acts[train], label[train], W_dec, probe, max_latents)
    own, f1 = _split_latents(acts, label, train, test, order, f1_gain, seed)
    found = probe.answers(x[test])
    rows = test[(found > 0) & label[test]]
    if len(rows) == 0:
        return Absorption(float("nan"), float("nan"), 0, own, f1)
    along = probe.answers(x[rows]) / max(size, 1e-12)
    writes = acts[rows] * (W_dec @ direction)[None]
    cosines = (W_dec @ direction) / np.maximum(np.linalg.norm(W_dec, axis=1), 1e-12)
    mine = writes[:, own].sum(1)
    silent = (acts[rows][:, own] == 0).all(1)
    if (acts[:, own] == 0).all():  # latents that never fire stand for nothing, and so cannot be absorbed
        return Absorption(float("nan"), float("nan"), len(rows), own, f1)
    others = writes.copy()
    others[:, own] = -np.inf
    strongest = others.argmax(1)
    largest = others[np.arange(len(rows)), strongest]
    full = silent & (cosines[strongest] >= 0.025) & (largest >= 0.4 * along)
    others[:, cosines < 0.1] = 0.0
    others[:, own] = 0.0
    top = np.sort(np.maximum(others, 0.0), axis=1)[:, -3:].sum(1)
    absorbed = np.minimum(top, along - mine)
    counts = (mine < along) & (top >= 0.4 * along)
    fraction = np.where(counts, absorbed / np.maximum(absorbed + np.maximum(mine, 0.0), 1e-12), 0.0)
    return Absorption(float(full.mean()), float(fraction.mean()), len(rows), own, f1)


def _split_latents(
    acts: Acts,
    label: Bool[np.ndarray, " n"],
    train: Int[np.ndarray, " n_train"],
    test: Int[np.ndarray, " n_test"],
    order: Int[np.ndarray, " k"],
    gain: float,
    seed: int,
) -> tuple[tuple[int, ...], float]:
    """As many latents of an order as each raise F1 on the training half by more than `gain`, and the test F1."""
    taken, best = 1, -1.0
    for k in range(1, len(order) + 1):
        f1 = _f1(
            linear_probe(acts[train][:, order[:k]], label[train], seed=seed),
            acts[train][:, order[:k]],
            label[train],
        )
        if k > 1 and f1 - best <= gain:
            break
        taken, best = k, f1
    own = order[:taken]
    probe = linear_probe(acts[train][:, own], label[train], seed=seed)
    return tuple(int(latent) for latent in own), _f1(probe, acts[test][:, own], label[test])


def _f1(probe: LinearProbe, x: np.ndarray, label: Bool[np.ndarray, " n"]) -> float:
    said = probe.answers(x) > 0
    both = float((said & label).sum())
    return 2 * both / max(float(said.sum() + label.sum()), 1.0)


def _balanced(probe: LinearProbe, x: Rows, right: Bool[np.ndarray, " n"]) -> float:
    said = probe.answers(x) > 0
    return float(((said[right]).mean() + (~said[~right]).mean()) / 2)


def _without(x: Rows, acts: Acts, W_dec: Weights, latents: Int[np.ndarray, " k"]) -> Rows:
    """Rows less what some latents write."""
    left: np.ndarray = x - acts[:, latents] @ W_dec[latents]
    return left


def _most_telling(
    acts: Acts, label: Bool[np.ndarray, " n"], W_dec: Weights, probe: LinearProbe, n: int
) -> Int[np.ndarray, " telling"]:
    """Latents by |difference of class means x what a unit of them adds to the probe|; ties go to lower ones."""
    difference = acts[label].mean(0) - acts[~label].mean(0)
    effect = np.abs(difference * (W_dec @ probe.weights))
    return np.argsort(-effect, kind="stable")[:n]


def _halves(
    labels: Int[np.ndarray, " n"], seed: int, n_classes: int | None = None
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]:
    """Rows for training and for testing, half of each class in either."""
    from sklearn.model_selection import train_test_split

    counts = np.bincount(labels, minlength=n_classes or 0)
    counts = counts if n_classes else counts[counts > 0]
    if len(counts) < 2 or counts.min() < 2 * LEAST_PER_CLASS:
        raise ConfigError(
            f"each class (or combination of classes) must have at least {2 * LEAST_PER_CLASS} texts",
            ", ".join(str(int(count)) for count in counts),
            "Give more labelled texts, or leave that class out.",
        )
    train, test = train_test_split(np.arange(len(labels)), test_size=0.5, random_state=seed, stratify=labels)
    return np.sort(train), np.sort(test)


def _balance(
    labels: Int[np.ndarray, " n"], rows: Int[np.ndarray, " m"], seed: int
) -> Int[np.ndarray, " balanced"]:
    """Of some rows, equally many of each class."""
    rng = np.random.default_rng(seed)
    least = min(int((labels[rows] == one).sum()) for one in np.unique(labels[rows]))
    chosen = [rng.choice(rows[labels[rows] == one], least, replace=False) for one in np.unique(labels[rows])]
    return np.sort(np.concatenate(chosen))
