"""Perturbation, spurious removal and absorption where the answer is known, and against slow versions."""

import numpy as np
import pytest

from sememe import metrics
from sememe.errors import ConfigError


def world(n=400, n_classes=4, d=24, seed=0):
    """Each class but the last has two latents of its own, the others tell nothing; directions are orthonormal."""
    rng = np.random.default_rng(seed)
    d_sae = d
    W_dec = np.linalg.qr(rng.standard_normal((d, d)))[0]
    labels = np.arange(n) % n_classes
    acts = np.maximum(0, rng.standard_normal((n, d_sae))) * 0.5
    for one in range(n_classes - 1):
        acts[:, 2 * one] = np.where(labels == one, 3 + rng.random(n), 0)
        acts[:, 2 * one + 1] = np.where(labels == one, 2 + rng.random(n), 0)
    x = acts @ W_dec + 0.05 * rng.standard_normal((n, d))
    return x, acts, W_dec, labels


def test_a_linear_probe_is_for_rows_as_they_come():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 4)) * [1, 100, 0.01, 1] + [5, -300, 0, 0]
    y = x[:, 0] - 5 > 0.1
    probe = metrics.linear_probe(x, y)
    assert ((probe.answers(x) > 0) == y).mean() > 0.97
    assert np.allclose(probe.answers(x), x @ probe.weights + probe.bias)


def test_ablating_a_classs_latents_breaks_its_own_probe():
    x, acts, W_dec, labels = world()
    found = metrics.targeted_perturbation(x, acts, W_dec, labels, (1, 2, 6))
    assert np.all(np.diag(found[2].losses)[:3] > 0.2) and found[2].score > 0.2
    assert found[2].score == pytest.approx(found[2].own - found[2].others)
    assert found[2].own == pytest.approx(np.diag(found[2].losses).mean())
    assert found[1].own < found[2].own  # one latent of two is left


def test_random_directions_break_no_probe_in_particular():
    x, _, _, labels = world()
    rng = np.random.default_rng(1)
    W_dec = rng.standard_normal((64, x.shape[1]))
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    acts = np.maximum(0, rng.standard_normal((len(x), 64)))
    found = metrics.targeted_perturbation(x, acts, W_dec, labels, (2,))
    assert abs(found[2].score) < 0.05


def test_perturbation_is_that_of_a_slow_version():
    from sememe.metrics.cuts import halves

    x, acts, W_dec, labels = world(n=120, n_classes=3)
    found = metrics.targeted_perturbation(x, acts, W_dec, labels, (2,), seed=3)[2]
    train, test = halves(labels, 3)
    assert set(train) | set(test) == set(range(120)) and not set(train) & set(test)

    def accuracy(probe, rows, truth):
        said = [float(row @ probe.weights + probe.bias) > 0 for row in rows]
        shares = [
            np.mean([s == t for s, t in zip(said, truth, strict=True) if t == side]) for side in (True, False)
        ]
        return np.mean(shares)

    for i in range(3):
        mine = labels[train] == i
        probe = metrics.linear_probe(x[train], mine, seed=3)
        effects = []
        for latent in range(acts.shape[1]):
            difference = acts[train][mine, latent].mean() - acts[train][~mine, latent].mean()
            effects.append(abs(difference * float(W_dec[latent] @ probe.weights)))
        chosen = sorted(range(len(effects)), key=lambda latent: -effects[latent])[:2]
        ablated = [
            row - sum((a[latent] - acts[train][:, latent].mean()) * W_dec[latent] for latent in chosen)
            for row, a in zip(x[test], acts[test], strict=True)
        ]
        for j in range(3):
            other = metrics.linear_probe(x[train], labels[train] == j, seed=3)
            truth = labels[test] == j
            assert found.losses[i, j] == pytest.approx(
                accuracy(other, x[test], truth) - accuracy(other, ablated, truth)
            )


def two_labels(n=800, seed=0):
    """The spurious label is louder than the concept; each has a latent of its own."""
    rng = np.random.default_rng(seed)
    concept, spurious = rng.random(n) < 0.5, rng.random(n) < 0.5
    acts = np.zeros((n, 8))
    acts[:, 0] = np.where(concept, 1.0, 0) + 0.3 * rng.random(n)
    acts[:, 1] = np.where(spurious, 1.5, 0) + 0.3 * rng.random(n)
    acts[:, 2:] = rng.random((n, 6)) * 0.2
    W_dec = np.eye(8)
    x = acts @ W_dec + 0.3 * rng.standard_normal((n, 8))
    return x, acts, W_dec, concept, spurious


def test_removing_the_spurious_latent_frees_the_probe():
    x, acts, W_dec, concept, spurious = two_labels()
    found = metrics.spurious_removal(x, acts, W_dec, concept, spurious, (1, 8))
    assert found[1].biased < found[1].clean - 0.15
    assert found[1].score > 0.3 and found[1].ablated > found[1].biased
    assert found[1].score == pytest.approx(
        (found[1].ablated - found[1].biased) / (found[1].clean - found[1].biased)
    )
    assert found[8].ablated < found[1].ablated  # with everything ablated nothing is left to tell


def test_combinations_that_are_missing_are_refused():
    x, acts, W_dec, concept, _ = two_labels()
    with pytest.raises(
        ConfigError, match=r"each class \(or combination of classes\) must have at least 20 texts, got "
    ):
        metrics.spurious_removal(x, acts, W_dec, concept, concept, (1,))
    with pytest.raises(ConfigError, match="targeted perturbation needs at least two classes, got 1"):
        metrics.targeted_perturbation(x, acts, W_dec, np.zeros(len(x), dtype=int), (1,))


@pytest.mark.parametrize("share", [0.0, 0.15, 0.3])
def test_absorption_is_the_share_that_was_planted(share):
    """On some rows of the concept its latent is silent, and a child's latent writes both directions."""
    rng = np.random.default_rng(0)
    n, d = 600, 16
    label = np.arange(n) % 2 == 0
    child = label & (rng.random(n) < share)
    basis = np.eye(d)
    acts = np.zeros((n, 10))
    acts[:, 0] = np.where(label & ~child, 2.0, 0.0)
    acts[:, 1] = np.where(child, 2.0 * np.sqrt(2), 0.0)
    acts[:, 2:] = np.maximum(0, rng.standard_normal((n, 8))) * 0.3
    W_dec = np.vstack([basis[0], (basis[0] + basis[1]) / np.sqrt(2), basis[2:10]])
    x = acts @ W_dec + 0.02 * rng.standard_normal((n, d))
    found = metrics.absorption(x, acts, W_dec, label, max_latents=1)
    assert found.latents == (0,) and found.n_true_positives > 140
    assert found.full == pytest.approx(child[label].mean(), abs=0.06)
    assert found.fraction == pytest.approx(child[label].mean(), abs=0.06)
    # with two latents allowed, the child's joins those that stand for the concept once it lacks them
    wider = metrics.absorption(x, acts, W_dec, label, max_latents=4)
    assert wider.full <= found.full and (share == 0 or wider.latents == (0, 1))


@pytest.mark.parametrize("loudness", [0.7, 1.0, 1.5])
def test_the_other_class_s_latent_does_not_stand_for_the_concept(loudness):
    """Two classes, a latent for each, nothing absorbed: however loud the other one is."""
    rng = np.random.default_rng(0)
    n, d = 200, 8
    label = np.arange(n) % 2 == 0
    acts = np.zeros((n, 2))
    acts[label, 0] = rng.uniform(0.8, 1.2, label.sum())
    acts[~label, 1] = rng.uniform(0.8, 1.2, (~label).sum()) * loudness
    W_dec = np.eye(d)[:2]
    x = acts @ W_dec + 0.02 * rng.standard_normal((n, d))
    for seed in range(3):
        found = metrics.absorption(x, acts, W_dec, label, seed=seed)
        assert found.latents == (0,) and found.full == 0 and found.fraction < 0.02
    alone = metrics.absorption(x, acts[:, 1:], W_dec[1:], label)
    assert alone.latents == () and np.isnan(alone.full) and alone.f1 == 0


@pytest.mark.parametrize("own", [0.25, 0.5, 0.75])
def test_partial_absorption_is_the_published_formula_on_planted_rows(own):
    """On a third of the concept's rows its latent writes a part of the direction only, and a child's the rest."""
    rng = np.random.default_rng(0)
    n, d = 600, 16
    label = np.arange(n) % 2 == 0
    partly = label & (rng.random(n) < 0.3)
    acts = np.zeros((n, 3))
    acts[label, 0] = 2.0
    acts[partly, 0] = 2 * own
    acts[partly, 1] = 2 * (1 - own) * np.sqrt(2)
    W_dec = np.zeros((3, d))
    W_dec[0, 0] = W_dec[2, 5] = 1
    W_dec[1, :2] = 2**-0.5
    x = acts @ W_dec + 0.02 * rng.standard_normal((n, d))
    found = metrics.absorption(x, acts, W_dec, label, max_latents=1)
    # A / (A + M) with x . p = 2 from 0: A = min(2 (1 - own), 2 - M), and 0 where A is below 0.4 of 2
    by_hand = (1 - own) if 1 - own >= 0.4 else 0.0
    assert found.fraction == pytest.approx(by_hand * partly[label].mean(), abs=0.03)
    assert found.full == 0


def test_an_offset_that_all_rows_share_is_nobodys():
    rng = np.random.default_rng(0)
    n, d = 300, 12
    label = np.arange(n) % 2 == 0
    acts = np.maximum(0, rng.standard_normal((n, d))) * 0.2
    acts[:, 0] = np.where(label, 2.0, 0.0)
    x = acts + 0.01 * rng.standard_normal((n, d))
    plain = metrics.absorption(x, acts, np.eye(d), label)
    moved = metrics.absorption(x + 50.0, acts, np.eye(d), label)
    assert plain.fraction == pytest.approx(moved.fraction, abs=0.02) and plain.full == moved.full == 0


def test_dictionaries_of_the_same_rows_share_their_probes():
    x, acts, W_dec, labels = world()
    units = np.arange(len(labels)) // 8 * 4 + labels  # two of a class each
    shared = metrics.class_probes(x, labels, units=units, seed=3)
    alone, together = (
        metrics.targeted_perturbation(x, acts, W_dec, labels, (2,), units=units, seed=3, probes=probes)[2]
        for probes in (None, shared)
    )
    assert np.array_equal(alone.losses, together.losses) and alone.score == together.score
    probe = metrics.concept_probe(x, labels == 0, units=units, seed=3)
    one, other = (
        metrics.absorption(x, acts, W_dec, labels == 0, units=units, seed=3, probe=known)
        for known in (None, probe)
    )
    assert (one.full, one.fraction, one.latents, one.f1) == (
        other.full,
        other.fraction,
        other.latents,
        other.f1,
    )


def test_a_concept_that_no_probe_knows_has_no_absorption():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 6))
    found = metrics.absorption(x, np.maximum(x, 0), np.eye(6), np.arange(80) % 2 == 0)
    assert found.n_true_positives < 40
    nothing = metrics.absorption(np.zeros((80, 6)), np.zeros((80, 6)), np.eye(6), np.arange(80) < 30)
    assert np.isnan(nothing.full) and nothing.n_true_positives == 0


def test_a_dictionary_that_never_fires_absorbs_nothing_that_could_be_told():
    x, acts, W_dec, labels = world()
    found = metrics.absorption(x, np.zeros_like(acts), W_dec, labels == 0)
    assert np.isnan(found.full) and np.isnan(found.fraction)


def test_halvings_are_averaged_and_drawn_as_a_plain_bootstrap_does():
    x, acts, W_dec, labels = world(n=120, n_classes=3)
    parts = [metrics.targeted_perturbation(x, acts, W_dec, labels, (2,), seed=seed)[2] for seed in (0, 1)]
    found = metrics.over_halvings([part.tested for part in parts], n_bootstrap=40, seed=5)
    for name in ("score", "own", "others"):
        assert found[name].value == pytest.approx(np.mean([getattr(part, name) for part in parts]))
    seen = np.flatnonzero(sum(part.tested.sums["n"] for part in parts))
    assert 60 < len(seen) < 120, "some texts were trained on in both"
    drawn = []
    for weights in np.random.default_rng(5).multinomial(
        len(seen), np.full(len(seen), 1 / len(seen)), size=40
    ):
        rows, losses = np.repeat(seen, weights), []
        for part in parts:
            sums = part.tested.sums
            tested = rows[sums["n"][rows] > 0]
            for one in range(3):
                sides = [tested[labels[tested] == one], tested[labels[tested] != one]]
                means = {
                    name: np.mean([sums[name][side, one].sum(1).mean() for side in sides])
                    for name in ("before", "own")
                }
                losses.append(means["before"] - means["own"])
        drawn.append(np.mean(losses))
    assert found["own"][1:3] == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    assert found["own"].low < found["own"].value < found["own"].high


def test_halves_and_draws_keep_equal_texts_together():
    x, acts, W_dec, labels = world(n=120, n_classes=3)
    units = np.tile(np.arange(120), 2)
    again = [np.concatenate([rows, rows]) for rows in (x, acts, labels)]
    found = metrics.targeted_perturbation(again[0], again[1], W_dec, again[2], (2,), units=units)[2].tested
    absorbed = metrics.absorption(again[0], again[1], W_dec, again[2] == 0, units=units).tested
    for tested in (found, absorbed):
        assert np.array_equal(tested.sums["n"][:120], tested.sums["n"][120:])
        assert 110 <= tested.sums["n"].sum() <= 130
    once = metrics.targeted_perturbation(x, acts, W_dec, labels, (2,))[2].tested
    twice = once._replace(
        sums={name: np.concatenate([rows, rows]) for name, rows in once.sums.items()}, units=units
    )
    plain, doubled = (metrics.over_halvings([one], n_bootstrap=40, seed=2) for one in (once, twice))
    for name in ("score", "own", "others"):
        assert doubled[name][:3] == pytest.approx(plain[name][:3]), name


def test_a_draw_without_anything_to_score_is_no_score_of_0():
    x, acts, W_dec, labels = world(n=120, n_classes=3)
    tested = metrics.absorption(x, acts, W_dec, labels == 0).tested
    rare = {name: np.zeros_like(values) for name, values in tested.sums.items()}
    rare["n"] += 1
    for name in ("said", "labelled", "both", "recognised"):
        rare[name][0] = 1
    found = metrics.over_halvings([tested._replace(sums=rare)], n_bootstrap=50)["f1"]
    assert found.value == 1 and np.isnan(found.low)
    assert found.cause == "some draws of texts leave it undefined"


@pytest.mark.slow  # hundreds of bootstraps
def test_an_interval_of_absorption_covers_the_share_that_was_planted():
    """On fresh texts each time: of twelve 95% intervals, three that miss would be too many."""
    covered, widths = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        n, d, share = 240, 8, 0.3
        label = np.arange(n) % 2 == 0
        child = label & (rng.random(n) < share)
        acts = np.zeros((n, 6))
        acts[:, 0] = np.where(label & ~child, 2.0, 0.0)
        acts[:, 1] = np.where(child, 2.0 * np.sqrt(2), 0.0)
        acts[:, 2:] = np.maximum(0, rng.standard_normal((n, 4))) * 0.3
        basis = np.eye(d)
        W_dec = np.vstack([basis[0], (basis[0] + basis[1]) / np.sqrt(2), basis[2:6]])
        x = acts @ W_dec + 0.02 * rng.standard_normal((n, d))
        parts = [
            metrics.absorption(x, acts, W_dec, label, max_latents=1, seed=one).tested for one in range(3)
        ]
        full = metrics.over_halvings(parts, n_bootstrap=300, seed=seed)["full"]
        covered.append(full.low <= share <= full.high)
        widths.append(full.high - full.low)
    assert sum(covered) >= 10
    assert np.mean(widths) < 0.25, "as wide as 105 texts make it: 2 x 1.96 x sqrt(0.3 x 0.7 / 105) = 0.175"


def test_a_spurious_score_is_the_share_of_the_way_over_all_halvings():
    x, acts, W_dec, concept, spurious = two_labels()
    parts = [metrics.spurious_removal(x, acts, W_dec, concept, spurious, (1,), seed=s)[1] for s in range(3)]
    found = metrics.over_halvings([part.tested for part in parts], n_bootstrap=200)
    biased, clean, ablated = (np.mean([part[i] for part in parts]) for i in (1, 2, 3))
    assert found["biased"].value == pytest.approx(biased)
    assert found["score"].value == pytest.approx((ablated - biased) / (clean - biased))
    assert found["score"].low < found["score"].value < found["score"].high


def test_scores_that_are_no_number_say_why():
    nothing = metrics.absorption(np.zeros((80, 6)), np.zeros((80, 6)), np.eye(6), np.arange(80) < 30)
    found = metrics.over_halvings([nothing.tested], n_bootstrap=20)["full"]
    assert np.isnan(found.value) and np.isnan(found.low)
    assert found.cause.startswith("the probe recognised no text, or no latent stands for the concept")
    x, acts, W_dec, concept, _ = two_labels()
    spurious = np.arange(len(x)) % 2 == 0  # in no direction at all: nothing to be freed from
    removed = metrics.spurious_removal(x, acts * 0, W_dec * 0, concept, spurious, (1,))[1]
    again = removed.tested._replace(sums=removed.tested.sums | {"clean": removed.tested.sums["biased"]})
    found = metrics.over_halvings([again], n_bootstrap=20)["score"]
    assert np.isnan(found.value) and "as good as the balanced one" in found.cause
