"""What latents do for labels: probes that they break, spurious ones that they clean, concepts that they absorb.

Knows rows (means of a model's activations over a text, or one position's), the same means of the latents, and labels.
Latents are ablated in the rows, to their mean over the training rows: what they tell is gone, what the dictionary does
not reconstruct stays, and no row is moved across a probe's threshold merely because a latent is usually active. That is
exact for means over positions, as decoding is linear.

Everything is fitted and chosen on one half and scored on the other. `over_halvings` averages over several such cuts,
and draws the scored rows again for an interval: nothing is fitted or chosen anew, least of all on them. Rows of one
unit (equal texts, say) lie in one half, and are drawn together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from sememe.errors import ConfigError
from sememe.metrics.cuts import halves, numbered_units
from sememe.metrics.probing import LinearProbe, linear_probe
from sememe.metrics.sums import Array, Formula, Statistic, Totals, bootstrap, undrawn_share

__all__ = [
    "Absorption",
    "SpuriousRemoval",
    "TargetedPerturbation",
    "Tested",
    "absorption",
    "class_probes",
    "concept_probe",
    "over_halvings",
    "spurious_removal",
    "targeted_perturbation",
]

Rows = Float[np.ndarray, "n d"]
Acts = Float[np.ndarray, "n d_sae"]
Weights = Float[np.ndarray, "d_sae d"]
Units = Shaped[np.ndarray, " n"]


class Tested(NamedTuple):
    """What the scores are ratios of, row by row: an interval is drawn from it."""

    sums: dict[str, Array]
    """A row per example, 0 where it was trained on; `n` says which were not."""
    formulas: Mapping[str, Formula]
    """From sums with leading axes (draws, halvings) to each score (draws,)."""
    cause: str
    """What it means when a score is not a number."""
    units: Int[np.ndarray, " n"]
    """What each row is of: those of one unit are drawn together."""


def over_halvings(parts: Sequence[Tested], *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Statistic]:
    """Scores averaged over several cuts into halves, with intervals from drawing the examples again.

    A unit is drawn for every half in which it was tested. The interval says how the scores hang on the examples
    they were measured on, with probes and latents as they were fitted; another cut's are beside it in `parts`.

    Args:
        parts: The same examples cut into halves by several seeds.
        n_bootstrap: Draws; 0 gives no intervals.
        seed: Of the draws. Equal seeds draw equal units, so that a null's interval is paired.
    """
    first = parts[0]
    sums = {
        name: _by_unit(np.stack([part.sums[name] for part in parts], axis=1), first.units)
        for name in first.sums
    }
    sums["n"] = sums["n"].sum(1)
    causes = dict.fromkeys(first.formulas, first.cause)
    found = bootstrap(sums, first.formulas, n=n_bootstrap, seed=seed, causes=causes)
    shown = {}
    for name, one in found.items():
        shown[name] = one._replace(cause=one.cause.replace("documents", "texts").replace("rows", "texts"))
        if name in OF:
            counted = sums[OF[name]].reshape(len(sums["n"]), -1) > 0
            shown[name] = undrawn_share(shown[name], int(counted.any(1).sum()))
    return shown


def _by_unit(values: Array, units: Int[np.ndarray, " n"]) -> Array:
    """Sums over the rows of each unit."""
    found: Array = np.zeros((int(units.max(initial=-1)) + 1, *values.shape[1:]))
    np.add.at(found, units, values)
    return found


def _accuracy(right: Array, side: Array) -> Array:
    """Balanced accuracy (draws, halvings, ...) from who was right, and who there was, on either side of a label."""
    found: Array = (right / side).mean(-1)
    return found


def _loss(t: Totals, after: str) -> Array:
    """Balanced accuracy lost, mean over halvings and classes."""
    lost = _accuracy(t["before"], t["side"]) - _accuracy(t[after], t["side"])
    found: Array = lost.mean((-1, -2))
    return found


PERTURBATION: dict[str, Formula] = {
    # that of own less that of others: what was right before falls out
    "score": lambda t: _accuracy(t["others"] - t["own"], t["side"]).mean((-1, -2)),
    "own": lambda t: _loss(t, "own"),
    "others": lambda t: _loss(t, "others"),
}


def _mean_of(name: str) -> Formula:
    return lambda t: _accuracy(t[name], t["side"]).mean(-1)


def _removed(t: Totals) -> Array:
    """The share of the way: means over halvings first, as their ratio is less noisy than the mean of ratios."""
    biased, clean, ablated = (_mean_of(name)(t) for name in ("biased", "clean", "ablated"))
    found: Array = np.where(clean > biased, (ablated - biased) / (clean - biased), np.nan)
    return found


REMOVAL: dict[str, Formula] = {
    "score": _removed,
    **{name: _mean_of(name) for name in ("biased", "clean", "ablated")},
}
ABSORPTION: dict[str, Formula] = {
    "full": lambda t: (t["full"] / t["recognised"]).mean(-1),
    "fraction": lambda t: (t["fraction"] / t["recognised"]).mean(-1),
    "f1": lambda t: (2 * t["both"] / (t["said"] + t["labelled"])).mean(-1),
}


OF = {
    "full": "recognised",
    "fraction": "recognised",
    **dict.fromkeys(("f1", "biased", "clean", "ablated"), "n"),
}
"""Scores that are shares, and of what."""


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
    tested: Tested
    """The same row by row."""


class SpuriousRemoval(NamedTuple):
    """What ablating the latents of a spurious label does to a probe that learned from it."""

    score: float
    """(ablated - biased) / (clean - biased): 1 if the probe becomes as good as one trained on balanced rows; NaN if it
    was that already, or better."""
    biased: float
    """Accuracy on balanced rows of the probe trained where both labels agree."""
    clean: float
    """That of a probe trained on balanced rows."""
    ablated: float
    """That of the biased probe on ablated rows."""
    tested: Tested
    """The same row by row."""


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
    tested: Tested
    """The same row by row."""


def class_probes(
    x: Rows, labels: Int[np.ndarray, " n"], *, units: Units | None = None, seed: int = 0
) -> list[LinearProbe]:
    """The dense probes of `targeted_perturbation`, a class each, from the half that is trained on.

    They do not know latents: dictionaries of the same rows share them. The arguments as there.
    """
    of = numbered_units(units, len(labels))
    train, _ = halves(labels, seed, units=of)
    return [
        linear_probe(x[train], labels[train] == one, units=of[train], seed=seed) for one in np.unique(labels)
    ]


def concept_probe(
    x: Rows, label: Bool[np.ndarray, " n"], *, units: Units | None = None, seed: int = 0
) -> LinearProbe:
    """The dense probe of `absorption`, from the half that is trained on; shared and called as `class_probes`."""
    of = numbered_units(units, len(label))
    train, _ = halves(label.astype(np.int64), seed, units=of)
    return linear_probe(x[train], label[train], units=of[train], seed=seed)


def targeted_perturbation(
    x: Rows,
    acts: Acts,
    W_dec: Weights,
    labels: Int[np.ndarray, " n"],
    n_ablated: tuple[int, ...],
    *,
    units: Units | None = None,
    seed: int = 0,
    probes: Sequence[LinearProbe] | None = None,
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
        units: What each row is of: no half, and no fold, splits those of one. Each row for itself, if not given.
        seed: Of the halves and folds.
        probes: `class_probes` of the same rows, labels, units and seed, if they are known.

    Raises:
        ConfigError: fewer than two classes, or one with too few rows.
    """
    classes = np.unique(labels)
    if len(classes) < 2:
        raise ConfigError(
            "targeted perturbation needs at least two classes", len(classes), "Give more labels."
        )
    of = numbered_units(units, len(labels))
    train, test = halves(labels, seed, units=of)
    probes = class_probes(x, labels, units=units, seed=seed) if probes is None else probes
    latents = [
        _most_telling(acts[train], labels[train] == one, W_dec, probe, max(n_ablated))
        for one, probe in zip(classes, probes, strict=True)
    ]
    truth = np.stack([labels[test] == one for one in classes], axis=1)
    side = np.stack([truth, ~truth], axis=-1).astype(np.float64)  # (rows, probes, with or without the class)

    def right(answers: Float[np.ndarray, "n_test probes"]) -> Array:
        """Who was right, on which side."""
        found: Array = ((answers > 0) == truth)[..., None] * side
        return found

    answers = np.stack([probe.answers(x[test]) for probe in probes], axis=1)
    weights = np.stack([probe.weights for probe in probes], axis=1)
    before = right(answers)
    shared = _at(test, len(x), {"side": side, "before": before})
    found, means, k = {}, acts[train].mean(0), len(classes)
    for n in n_ablated:
        losses = np.zeros((k, k))
        own, others = np.zeros_like(before), np.zeros_like(before)
        for i, ordered in enumerate(latents):
            gone = acts[test[:, None], ordered[:n]] - means[ordered[:n]]
            after = right(answers - gone @ (W_dec[ordered[:n]] @ weights))  # probes are linear
            losses[i] = ((before - after).sum(0) / side.sum(0)).mean(-1)
            own[:, i] = after[:, i]
            others += after / (k - 1)
        others -= own / (k - 1)
        sums = shared | _at(test, len(x), {"own": own, "others": others})
        score = {"own": float(np.diag(losses).mean()), "others": float(losses[~np.eye(k, dtype=bool)].mean())}
        tested = Tested(sums, PERTURBATION, "no text of a class was tested", of)
        found[n] = TargetedPerturbation(score["own"] - score["others"], **score, losses=losses, tested=tested)
    return found


def spurious_removal(
    x: Rows,
    acts: Acts,
    W_dec: Weights,
    concept: Bool[np.ndarray, " n"],
    spurious: Bool[np.ndarray, " n"],
    n_ablated: tuple[int, ...],
    *,
    units: Units | None = None,
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
        units: What each row is of: no half, and no fold, splits those of one. Each row for itself, if not given.
        seed: Of the halves, draws and folds.

    Raises:
        ConfigError: one of the four combinations has too few rows.
    """
    four = 2 * concept.astype(np.int64) + spurious
    of = numbered_units(units, len(four))
    train, test = halves(four, seed, n_classes=4, units=of)
    balanced, held_out = _balance(four, train, seed), _balance(four, test, seed)
    agreeing = train[concept[train] == spurious[train]]
    biased = linear_probe(x[agreeing], concept[agreeing], units=of[agreeing], seed=seed)
    clean = linear_probe(x[balanced], concept[balanced], units=of[balanced], seed=seed)
    about = linear_probe(x[balanced], spurious[balanced], units=of[balanced], seed=seed)
    ordered = _most_telling(acts[balanced], spurious[balanced], W_dec, about, max(n_ablated))
    truth = concept[held_out]
    side = np.stack([truth, ~truth], axis=-1).astype(np.float64)

    def right(probe: LinearProbe, rows: Rows) -> Array:
        found: Array = ((probe.answers(rows) > 0) == truth)[:, None] * side
        return found

    sums = {"side": side, "biased": right(biased, x[held_out]), "clean": right(clean, x[held_out])}
    found, means = {}, acts[balanced].mean(0)
    for n in n_ablated:
        left = _without(x[held_out], acts[held_out] - means, W_dec, ordered[:n])
        tested = Tested(
            _at(held_out, len(x), sums | {"ablated": right(biased, left)}),
            REMOVAL,
            "the probe trained where the labels agree was as good as the balanced one",
            of,
        )
        scores = over_halvings([tested], n_bootstrap=0)
        found[n] = SpuriousRemoval(**{name: one.value for name, one in scores.items()}, tested=tested)
    return found


def absorption(
    x: Rows,
    acts: Acts,
    W_dec: Weights,
    label: Bool[np.ndarray, " n"],
    *,
    units: Units | None = None,
    seed: int = 0,
    f1_gain: float = 0.03,
    max_latents: int = 10,
    probe: LinearProbe | None = None,
) -> Absorption:
    """Feature absorption: rows of a concept on which its own latents are silent and others write its direction.

    With p the unit direction of a dense probe, a latent writes `act * (W_dec . p)` along it. Its own latents are as
    many of those that fire more with the concept than without, and write along p, as each raise the F1 of a probe by
    more than `f1_gain`. A row is fully absorbed if
    all of them are silent and the one other latent that writes most has a cosine of at least 0.025 with p and writes
    at least 0.4 of `x . p`. The fraction is A / (A + M): M is what its own latents write, A what the three strongest
    others write whose cosine is at least 0.1, at most `x . p - M`; 0 where M reaches `x . p` or A stays below 0.4 of
    it.

    Source: Chanin et al. 2024, arXiv:2409.14507; the fraction as SAEBench has it. Differs: any label and any rows, not
    only first letters; `x . p` and what latents write count from their means over training rows without the concept,
    so that what those have, too, is nobody's; a latent that fires where the concept is not cannot stand for it.

    Args:
        x: Activations, a row per example.
        acts: Latents.
        W_dec: Decoder rows.
        label: Whether the example has the concept.
        units: What each row is of: no half, and no fold, splits those of one. Each row for itself, if not given.
        seed: Of the halves and folds.
        f1_gain: See above.
        max_latents: At most so many stand for the concept.
        probe: `concept_probe` of the same rows, label, units and seed, if it is known.

    Returns:
        NaN where the probe recognises no row, or the concept's own latents never fire.

    Raises:
        ConfigError: too few rows with or without the concept.
    """
    of = numbered_units(units, len(label))
    train, test = halves(label.astype(np.int64), seed, units=of)
    probe = concept_probe(x, label, units=units, seed=seed) if probe is None else probe
    size = float(np.linalg.norm(probe.weights))
    direction = probe.weights / max(size, 1e-12)
    without = train[~label[train]]
    order = _own_order(acts[train], label[train], W_dec @ direction, max_latents)
    own, said = _split_latents(acts, label, of, train, test, order, f1_gain, seed)
    known = (probe.answers(x[test]) > 0) & label[test]
    rows = test[known]
    sums = {"said": said, "labelled": label[test], "both": said & label[test], "recognised": known}
    sums = {name: one.astype(np.float64) for name, one in sums.items()}

    def found(
        full: Float[np.ndarray, " recognised"], fraction: Float[np.ndarray, " recognised"]
    ) -> Absorption:
        for name, values in (("full", full), ("fraction", fraction)):
            sums[name] = np.zeros(len(test))
            sums[name][known] = values
        cause = (
            "the probe recognised no text, or no latent stands for the concept: none that fires more with it than "
            "without writes along its direction"
        )
        tested = Tested(_at(test, len(x), sums), ABSORPTION, cause, of)
        scores = {name: one.value for name, one in over_halvings([tested], n_bootstrap=0).items()}
        return Absorption(scores["full"], scores["fraction"], len(rows), own, scores["f1"], tested=tested)

    nothing = np.full(len(rows), np.nan)
    if len(rows) == 0 or not own:
        return found(nothing, nothing)
    along = (x[rows] - x[without].mean(0)) @ direction
    writes = (acts[rows] - acts[without].mean(0)) * (W_dec @ direction)[None]
    cosines = (W_dec @ direction) / np.maximum(np.linalg.norm(W_dec, axis=1), 1e-12)
    mine = writes[:, own].sum(1)
    silent = (acts[rows][:, own] == 0).all(1)
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
    return found(full.astype(np.float64), fraction)


def _split_latents(
    acts: Acts,
    label: Bool[np.ndarray, " n"],
    units: Int[np.ndarray, " n"],
    train: Int[np.ndarray, " n_train"],
    test: Int[np.ndarray, " n_test"],
    order: Int[np.ndarray, " k"],
    gain: float,
    seed: int,
) -> tuple[tuple[int, ...], Bool[np.ndarray, " n_test"]]:
    """As many latents of an order as each raise F1 on the training half by more than `gain`, and which test rows a
    probe on them says have the concept: none where there are no latents."""
    if len(order) == 0:
        return (), np.zeros(len(test), dtype=bool)

    def on(latents: Int[np.ndarray, " k"]) -> LinearProbe:
        return linear_probe(acts[train][:, latents], label[train], units=units[train], seed=seed)

    taken, best = 1, -1.0
    for k in range(1, len(order) + 1):
        f1 = _f1(on(order[:k]), acts[train][:, order[:k]], label[train])
        if k > 1 and f1 - best <= gain:
            break
        taken, best = k, f1
    own = order[:taken]
    return tuple(int(latent) for latent in own), on(own).answers(acts[test][:, own]) > 0


def _f1(probe: LinearProbe, x: np.ndarray, label: Bool[np.ndarray, " n"]) -> float:
    said = probe.answers(x) > 0
    both = float((said & label).sum())
    return 2 * both / max(float(said.sum() + label.sum()), 1.0)


def _at(rows: Int[np.ndarray, " m"], n: int, sums: Mapping[str, Array]) -> dict[str, Array]:
    """What some of n rows have, in a table of all of them."""
    found: dict[str, Array] = {"n": np.zeros(n)}
    found["n"][rows] = 1
    for name, values in sums.items():
        found[name] = np.zeros((n, *values.shape[1:]))
        found[name][rows] = values
    return found


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


def _own_order(
    acts: Acts, label: Bool[np.ndarray, " n"], along: Float[np.ndarray, " d_sae"], n: int
) -> Int[np.ndarray, " own"]:
    """At most n latents that may stand for a concept, those first whose more activity with it writes most along it.

    Args:
        acts: Latents.
        label: Whether a row has the concept.
        along: What a unit of each latent writes along the concept's direction.
        n: At most so many.
    """
    more = acts[label].mean(0) - acts[~label].mean(0)
    effect = np.where((more > 0) & (along > 0), more * along, 0.0)
    order: np.ndarray = np.argsort(-effect, kind="stable")[:n]
    own: np.ndarray = order[effect[order] > 0]
    return own


def _balance(
    labels: Int[np.ndarray, " n"], rows: Int[np.ndarray, " m"], seed: int
) -> Int[np.ndarray, " balanced"]:
    """Of some rows, equally many of each class."""
    rng = np.random.default_rng(seed)
    least = min(int((labels[rows] == one).sum()) for one in np.unique(labels[rows]))
    chosen = [rng.choice(rows[labels[rows] == one], least, replace=False) for one in np.unique(labels[rows])]
    return np.sort(np.concatenate(chosen))
