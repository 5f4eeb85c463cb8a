"""Probes find what is there, and nothing where nothing is; nothing is chosen on test data."""

import numpy as np
import pytest
import torch

from sememe import metrics
from sememe.errors import ActivationError, ConfigError


def labelled(n: int = 200, d: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Column 7 tells most, column 20 the rest."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(n, generator=generator) < 0.4
    acts = torch.randn(n, d, generator=generator).relu()
    hidden = torch.rand(n, generator=generator) < 0.2
    acts[:, 7] = torch.where(labels & ~hidden, 3.0, 0.0) + 0.1 * acts[:, 7]
    acts[:, 20] = torch.where(labels & hidden, 3.0, 0.0) + 0.1 * acts[:, 20]
    return acts, labels


def test_the_latents_that_tell_are_chosen_and_tell():
    acts, labels = labelled()
    found = metrics.sparse_probe(acts, labels, (1, 2))
    assert all(columns == (7,) for columns in found[1].chosen)
    assert all(set(columns) == {7, 20} for columns in found[2].chosen)
    hidden = 1 - float(((acts[:, 7] > 1) == labels).double().mean())
    assert found[1].scores.accuracy == pytest.approx(1 - hidden, abs=0.03)
    assert found[2].scores == pytest.approx((1.0, 1.0, 1.0), abs=0.01)
    assert metrics.dense_probe(acts, labels).scores.auroc > 0.9


def test_units_of_latents_do_not_count():
    acts, labels = labelled()
    scaled = acts * torch.logspace(-3, 3, acts.shape[1])
    assert (
        metrics.sparse_probe(scaled, labels, (2,))[2].chosen
        == metrics.sparse_probe(acts, labels, (2,))[2].chosen
    )


def test_random_labels_are_not_told_however_many_latents_there_are():
    """Choosing on all rows would find columns that fit by chance: 0.5 only if it does not."""
    scores, leaking = [], []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        acts = torch.randn(60, 3000, generator=generator)
        labels = torch.arange(60) % 2 == 0
        scores.append(metrics.sparse_probe(acts, labels, (5,), seed=seed)[5].scores.auroc)
        x, y = acts.numpy(), labels.numpy()
        difference = np.abs(x[y].mean(0) - x[~y].mean(0))
        best = torch.from_numpy(np.argsort(-difference)[:5].copy())
        leaking.append(metrics.dense_probe(acts[:, best], labels, seed=seed).scores.auroc)
    assert np.mean(scores) == pytest.approx(0.5, abs=0.12)
    assert np.mean(leaking) > 0.85, "so large the leak would be"


def test_equal_texts_do_not_leak_through_folds():
    """Of drawn labels no more can be told than where each text is there once; else a text is known again."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(40, 60, generator=generator), torch.randperm(40, generator=generator) < 20
    again, truth, units = x.repeat(3, 1), labels.repeat(3), np.tile(np.arange(40), 3)
    names = np.array([f"text {unit}" for unit in units])
    for once, leaking, probe in (
        (
            metrics.dense_probe(x, labels),
            metrics.dense_probe(again, truth),
            metrics.dense_probe(again, truth, units=units),
        ),
        (
            metrics.sparse_probe(x, labels, (5,))[5],
            metrics.sparse_probe(again, truth, (5,))[5],
            metrics.sparse_probe(again, truth, (5,), units=names)[5],
        ),
    ):
        assert leaking.scores.auroc > once.scores.auroc + 0.1, "so large the leak would be"
        assert probe.scores.auroc == pytest.approx(once.scores.auroc, abs=0.08)
        assert np.array_equal(probe.folds[:40], probe.folds[40:80]) and len(set(probe.folds)) == 5
    shuffled = metrics.shuffled_labels(truth.numpy(), units, 3)
    assert np.array_equal(shuffled[:40], shuffled[80:]) and not np.array_equal(shuffled, truth.numpy())
    assert shuffled.sum() == 60
    with pytest.raises(ConfigError) as raised:
        metrics.dense_probe(again, truth, units=units % 15 + 100 * truth.numpy() * (units % 9 == 0))
    assert "at least 10 texts, those of one unit (equal ones, say) counted once, got " in str(raised.value)


def test_texts_that_occur_again_make_no_interval_narrower():
    acts, labels = labelled(n=60)
    once = metrics.sparse_probe(acts, labels, (1,))[1]
    thrice = metrics.Probe(
        once.scores, (), np.tile(once.answers, 3), np.tile(once.folds, 3), np.tile(np.arange(60), 3)
    )
    found = [
        metrics.probe_scores(probe, truth, n_bootstrap=40)
        for probe, truth in ((once, labels), (thrice, labels.repeat(3)))
    ]
    for name in found[0]:
        assert found[1][name][:3] == pytest.approx(found[0][name][:3]), name


def test_always_answering_one_class_is_worth_a_half():
    uneven = metrics.sparse_probe(torch.zeros(53, 3), torch.arange(53) < 13, (1,))[1].scores
    assert uneven.auroc == 0.5, "folds with other shares of the classes are not compared"
    acts, labels = torch.zeros(100, 3), torch.arange(100) < 20
    scores = metrics.sparse_probe(acts, labels, (1,))[1].scores
    assert scores.accuracy == pytest.approx(0.8) and scores.balanced_accuracy == 0.5 and scores.auroc == 0.5


def test_the_same_seed_gives_the_same_scores():
    acts, labels = labelled(n=80)
    first, again = (metrics.sparse_probe(acts, labels, (1, 5)) for _ in range(2))
    for k in (1, 5):
        assert first[k].scores == again[k].scores and first[k].chosen == again[k].chosen
        assert np.array_equal(first[k].answers, again[k].answers)


def test_a_probes_intervals_are_a_plain_bootstrap_of_its_rows():
    acts, labels = labelled(n=60)
    probe = metrics.sparse_probe(acts, labels, (1,))[1]
    found = metrics.probe_scores(probe, labels, n_bootstrap=50, seed=3)
    y, n = labels.numpy(), 60
    drawn: dict[str, list[float]] = {"accuracy": [], "balanced_accuracy": [], "auroc": []}
    for weights in np.random.default_rng(3).multinomial(n, np.full(n, 1 / n), size=50):
        rows = np.repeat(np.arange(n), weights)
        right = (probe.answers > 0) == y
        drawn["accuracy"].append(right[rows].mean())
        sides = [right[rows][y[rows] == side].mean() for side in (True, False)]
        drawn["balanced_accuracy"].append(np.mean(sides))
        ordered = [
            (probe.answers[i] > probe.answers[j]) + (probe.answers[i] == probe.answers[j]) / 2
            for i in rows[y[rows]]
            for j in rows[~y[rows]]
            if probe.folds[i] == probe.folds[j]
        ]
        drawn["auroc"].append(np.mean(ordered))
    for name, draws in drawn.items():
        expected = (getattr(probe.scores, name), *np.quantile(draws, [0.025, 0.975]))
        assert found[name][:3] == pytest.approx(expected), name
        assert found[name].low < found[name].high
    without = metrics.probe_scores(probe, labels, n_bootstrap=0)["auroc"]
    assert without.value == probe.scores.auroc and np.isnan(without.low) and without.cause == ""


def test_auroc_is_scikit_learns_where_folds_have_one_size():
    from sklearn.metrics import roc_auc_score

    acts, labels = labelled(n=200)
    labels = torch.arange(200) % 2 == 0
    probe = metrics.sparse_probe(acts, labels, (3,))[3]
    y = labels.numpy()
    folds = [roc_auc_score(y[probe.folds == f], probe.answers[probe.folds == f]) for f in range(5)]
    assert [int((probe.folds == f).sum()) for f in range(5)] == [40] * 5
    assert probe.scores.auroc == pytest.approx(np.mean(folds))


@pytest.mark.parametrize(
    ("acts", "labels", "ks", "error", "message"),
    [
        (
            torch.zeros(30, 3),
            torch.arange(30) < 4,
            (1,),
            ConfigError,
            "at least 10 texts, got 4 and 26. Give more",
        ),
        (torch.zeros(30, 3), torch.zeros(30, dtype=torch.bool), (1,), ConfigError, "got 0 and 30"),
        (
            torch.zeros(30, 3),
            torch.arange(30) < 15,
            (4,),
            ConfigError,
            "must be in [1, 3], the number of latents, got 4",
        ),
        (
            torch.full((30, 3), torch.nan),
            torch.arange(30) < 15,
            (1,),
            ActivationError,
            "NaN or infinity in row 0",
        ),
    ],
)
def test_what_cannot_be_probed_says_why(acts, labels, ks, error, message):
    with pytest.raises(error) as raised:
        metrics.sparse_probe(acts, labels, ks)
    assert message in str(raised.value)


@pytest.mark.parametrize(("n_one", "n_other"), [(10, 10), (10, 40)])
def test_a_score_of_one_has_a_bound_that_holds_where_it_is_a_matter_of_chance(n_one, n_other):
    """Truths at which all is right in 2.5% of the samples: whoever gets 1 there may not exclude the truth."""
    y = np.arange(n_one + n_other) < n_one
    folds = np.zeros(len(y), dtype=np.int64)
    answers = np.where(y, 1.0, -1.0)
    probe = metrics.Probe(metrics.ProbeScores(1.0, 1.0, 1.0), (), answers, folds, np.arange(len(y)))
    found = metrics.probe_scores(probe, torch.from_numpy(y), n_bootstrap=20)
    # one class always right, the other's rows right with chance p: all are, in 2.5% of the samples
    p = 0.025 ** (1 / n_one)
    assert found["balanced_accuracy"].low <= (1 + p) / 2 and found["auroc"].low <= p
    alike = 0.025 ** (1 / (n_one + n_other))  # both classes' rows right with one chance
    assert found["balanced_accuracy"].low <= alike + 1e-12
    assert found["auroc"].low == pytest.approx(0.025 ** (1 / 10)) and found["auroc"].high == 1
    wrong = metrics.Probe(metrics.ProbeScores(0.0, 0.0, 0.0), (), -answers, folds, np.arange(len(y)))
    mirrored = metrics.probe_scores(wrong, torch.from_numpy(y), n_bootstrap=20)
    for name in ("balanced_accuracy", "auroc"):
        assert (mirrored[name].low, mirrored[name].high) == (0.0, pytest.approx(1 - found[name].low)), name
