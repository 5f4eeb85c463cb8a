"""Frontiers: who belongs together, interpolation against a slow version, and intervals that cover."""

import math

import numpy as np
import pytest

from sememe.frontier import Frontier, Place, Point, differences, grouped, interval, summary

BETTER = {"fvu": "lower", "cosine": "higher"}


def about(kind="topk", seed=0, d_sae=64, training=None, **config):
    return {
        "kind": kind,
        "d_sae": d_sae,
        "config": {"kind": kind, "auxk": None, **config},
        "training": {"lr": None, "seed": seed, **(training or {})},
        "inputs": ["resid_post.8"],
        "outputs": ["resid_post.8"],
    }


def point(group, setting, l0, fvu, n=50, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    draws = np.concatenate([[0.0], rng.standard_normal(n)]) * noise
    return Point(Place(group, setting), {"l0": np.full(n + 1, float(l0)), "fvu": fvu + draws})


def test_seeds_are_one_setting_and_settings_one_group():
    found = grouped(
        {
            "a": about(k=16, seed=0),
            "b": about(k=16, seed=1),
            "c": about(k=32),
            "d": about(kind="relu", l1_coefficient=0.01, target_l0=None),
        }
    )
    assert found["a"] == found["b"] == Place("topk", "k=16")
    assert found["c"] == Place("topk", "k=32")
    assert found["d"] == Place("relu", "l1_coefficient=0.01")


def test_a_coder_s_frontier_is_walked_by_the_option_that_its_encoder_uses():
    def coder(encoder: str, **options):
        return about(kind="sparse_coder", encoder=encoder, **({"k": 32, "penalty": 0.1} | options))

    found = grouped({f"p{p:g}": coder("fista", penalty=p) for p in (2.0, 4.0, 8.0)})
    assert set(found.values()) == {Place("sparse_coder", f"penalty={p:g}") for p in (2, 4, 8)}
    found = grouped({f"k{k}": coder("omp", k=k) for k in (8, 16)})
    assert set(found.values()) == {Place("sparse_coder", f"k={k}") for k in (8, 16)}
    found = grouped({f"n{n}": about(kind="relu", noise=n) for n in (0.3, 0.5)})
    assert set(found.values()) == {Place("relu", "noise=0.3"), Place("relu", "noise=0.5")}


def test_what_sets_groups_apart_is_in_their_titles():
    found = grouped({"a": about(k=16), "b": about(k=16, d_sae=128), "c": about(k=16, training={"lr": 0.5})})
    assert [place.group for place in found.values()] == [
        "topk d_sae=64, lr=None",
        "topk d_sae=128, lr=None",
        "topk d_sae=64, lr=0.5",
    ]
    elsewhere = about(k=16) | {"inputs": ["resid_post.2"], "outputs": ["resid_post.2"]}
    found = grouped({"a": about(k=16), "b": elsewhere})
    assert [place.group for place in found.values()] == ["topk resid_post.8", "topk resid_post.2"]


def test_a_dictionary_that_takes_many_options_to_tell_apart_has_its_own_name():
    training = {"lr": 0.5, "steps": 3, "decay": 0.1}
    found = grouped({"plain": about(k=16), "mine": about(k=16, d_sae=128, training=training)})
    assert [place.group for place in found.values()] == ["plain", "mine"]
    found = grouped({"a": about(k=16), "b": about(k=8), "mine": about(k=16, d_sae=128, training=training)})
    assert found["mine"].group == "mine"
    assert found["a"].group == found["b"].group != "a", "two dictionaries are not called after one of them"


def test_ways_to_fit_are_told_apart_by_their_own_options():
    ways = {
        name: about(kind="sparse_coder", training={"baseline": {"kind": "ksvd", "update": name, "k": k}})
        for name, k in (("mod", 4), ("gradient", 8))
    }
    titles = [place.group for place in grouped(ways).values()]
    assert titles == ["sparse_coder update=mod", "sparse_coder update=gradient"]


def test_interpolation_is_that_of_a_slow_version():
    rng = np.random.default_rng(0)
    n_settings, n_draws = 4, 30
    l0 = np.exp(np.sort(rng.uniform(1, 4, n_settings)))[:, None] * np.exp(
        0.3 * rng.standard_normal((n_settings, n_draws))
    )
    l0[:, 0] = np.sort(l0[:, 0])
    fvu = rng.uniform(0, 1, (n_settings, n_draws))
    points = [Point(Place("g", f"k={i}"), {"l0": l0[i], "fvu": fvu[i]}) for i in rng.permutation(n_settings)]
    frontier = Frontier(points)
    for at in np.linspace(l0[0, 0], l0[-1, 0], 7):
        slow = []
        for draw in range(n_draws):
            order = np.argsort(l0[:, draw])
            slow.append(np.interp(math.log(at), np.log(l0[order, draw]), fvu[order, draw]))
        assert np.allclose(frontier.at("fvu", at), slow, atol=1e-12)
    assert np.isnan(frontier.at("fvu", l0[-1, 0] * 1.2)).all()


def test_the_area_of_a_straight_line_is_its_middle():
    frontier = Frontier([point("g", "k=8", 8, 0.6), point("g", "k=32", 32, 0.2)])
    assert frontier.mean("fvu", 8, 32) == pytest.approx(np.full(51, 0.4))
    assert frontier.at("fvu", 16) == pytest.approx(np.full(51, 0.4))  # halfway on a logarithmic axis


def test_seeds_are_averaged_and_widen_the_interval():
    one = Frontier([point("g", "k=8", 8, 0.5, n=400)])
    two = Frontier([point("g", "k=8", 8, 0.4, n=400), point("g", "k=8", 8, 0.6, n=400)])
    assert two.n_seeds == [2] and two.at("fvu", 8)[0] == pytest.approx(0.5)
    assert interval(one.at("fvu", 8)) == pytest.approx((0.5, 0.5))
    assert interval(two.at("fvu", 8)) == pytest.approx((0.4, 0.6))


def test_a_difference_is_paired_and_told_in_words():
    a = Frontier(
        [point("a", "k=8", 8, 0.5, noise=0.2, seed=3), point("a", "k=32", 32, 0.3, noise=0.2, seed=3)]
    )
    b = Frontier([point("b", "k=16", 16, 0.6, noise=0.2, seed=3)])
    (found,) = differences(a, b, BETTER)
    # the same documents' noise is in both: it falls out of the difference, though each alone is blurred
    assert found.l0 == pytest.approx(16) and found.difference == pytest.approx(-0.2)
    assert found.low == pytest.approx(-0.2) and found.high == pytest.approx(-0.2) and found.real
    assert found.sentence == (
        "fvu at l0 16: a is better than b, 0.4 against 0.6, a difference of 0.2 that is real "
        "(95% interval 0.2 to 0.2)."
    )


def test_higher_may_be_better():
    def made(group, value):
        return Frontier([Point(Place(group, ""), {"l0": np.full(5, 8.0), "cosine": np.full(5, value)})])

    (found,) = differences(made("a", 0.5), made("b", 0.9), BETTER)
    assert "cosine at l0 8: b is better than a, 0.9 against 0.5" in found.sentence


def test_without_a_common_l0_nothing_is_compared():
    (found,) = differences(Frontier([point("a", "", 8, 0.5)]), Frontier([point("b", "", 9, 0.4)]), BETTER)
    assert math.isnan(found.difference) and not found.real
    assert found.sentence == "fvu: a (l0 8) and b (l0 9) have no l0 in common and are not compared."
    (near,) = differences(Frontier([point("a", "", 8, 0.5)]), Frontier([point("b", "", 8.3, 0.4)]), BETTER)
    assert near.difference == pytest.approx(0.1)


def test_noise_is_not_called_real_more_often_than_it_says():
    """Two dictionaries that are equally good on every document but for noise: 5% of intervals leave out 0."""
    rng = np.random.default_rng(0)
    n_documents, n_draws, n_trials = 60, 300, 200
    real = 0
    for trial in range(n_trials):
        documents = rng.gamma(2, size=(2, n_documents)) + rng.gamma(2, size=n_documents)
        weights = np.concatenate(
            [
                np.ones((1, n_documents)),
                rng.multinomial(n_documents, np.full(n_documents, 1 / n_documents), n_draws),
            ]
        )
        made = [
            Frontier(
                [
                    Point(
                        Place(group, ""),
                        {"l0": np.full(n_draws + 1, 8.0), "fvu": weights @ own / n_documents},
                    )
                ]
            )
            for group, own in zip("ab", documents, strict=True)
        ]
        (found,) = differences(*made, BETTER)
        real += found.real
        assert ("not told apart" in found.sentence) == (not found.real), trial
    assert 2 <= real <= 22  # 10 expected; both ends are beyond the 0.1% tails of a binomial


def test_a_number_that_is_none_is_said_to_be_none():
    bad = Frontier([point("a", "", 8, math.nan)])
    (found,) = differences(bad, Frontier([point("b", "", 8, 0.4)]), BETTER)
    assert not found.real and "cannot be compared, one of them is not a number" in found.sentence
    alone = Frontier([point("a", "", 8, 0.3, n=0)])
    (found,) = differences(alone, Frontier([point("b", "", 8, 0.4, n=0)]), BETTER)
    assert not found.real and "without an interval" in found.sentence


def test_a_summary_is_plain_data_without_nan():
    points = {
        "1": point("a", "k=8", 8, 0.5),
        "2": point("a", "k=32", 32, 0.3),
        "3": point("b", "k=4", 4, 0.7),
        "4": point("b", "k=16", 16, 0.4),
        "5": point("c", "k=64", 64, math.nan),
    }
    found = summary(points, BETTER)
    assert [p["setting"] for p in found["frontiers"]["a"]["points"]] == ["k=8", "k=32"]
    assert found["frontiers"]["a"]["mean_over_common_l0"]["fvu"]["value"] == pytest.approx(0.45)
    assert found["frontiers"]["c"]["mean_over_common_l0"] == {}
    assert found["left_out"] == {"c": "it has one setting (l0 64), which is no range"}
    assert len(found["differences"]) == 3
    assert found["differences"][1]["difference"] is None and found["differences"][1]["real"] is False
    del points["5"]
    found = summary(points, BETTER)["frontiers"]
    assert (found["a"]["l0_from"], found["a"]["l0_to"]) == (8, 16)
    assert found["a"]["mean_over_common_l0"]["fvu"]["value"] == pytest.approx(0.45)


def test_seeds_of_baselines_group_and_other_makings_do_not():
    nmf = [
        about("nmf", seed=seed, k=8) | {"config": {"kind": "nmf", "k": 8, "seed": seed}} for seed in (0, 1)
    ]
    assert grouped({"a": nmf[0], "b": nmf[1]})["a"] == grouped({"a": nmf[0], "b": nmf[1]})["b"]
    coders = {
        name: about("sparse_coder", k=8, training={"over": over, "baseline": baseline})
        for name, over, baseline in (
            ("a", "f" * 64, {"kind": "sparse_coder", "k": 8}),
            ("b", "e" * 64, {"kind": "sparse_coder", "k": 8}),
            ("c", None, {"kind": "ksvd", "k": 8, "n_iterations": 3}),
            ("d", None, {"kind": "ksvd", "k": 8, "n_iterations": 30}),
        )
    }
    assert len({place.group for place in grouped(coders).values()}) == 4
    kept = {name: about(k=8, training={"step": step}) for name, step in (("a", 1), ("b", 2))}
    assert len({place.group for place in grouped(kept).values()}) == 2
    models = {name: about(k=8) | {"model_fingerprint": mark} for name, mark in (("a", "1"), ("b", "2"))}
    assert len({place.group for place in grouped(models).values()}) == 2


def test_the_order_of_seeds_decides_nothing():
    a = [point("a", "k=8", 8, value, n=400) for value in (0.10, 0.20, 0.30)]
    verdicts = []
    for order in ((0.11, 0.21, 0.31), (0.31, 0.11, 0.21)):
        b = [point("b", "k=8", 8, value, n=400) for value in order]
        (found,) = differences(Frontier(a), Frontier(b), BETTER)
        verdicts.append(found.real)
        assert found.high - found.low > 0.1  # two trainings have nothing to do with each other
    assert verdicts == [False, False]


def test_silent_dictionaries_are_no_points():
    silent = Frontier([point("g", "k=0", 0.0, 1.0), point("g", "k=40", 40, 0.2)])
    assert silent.range == (40, 40) and np.isnan(silent.at("fvu", 5)).all()
    assert np.isnan(Frontier([point("g", "k=0", 0.0, 1.0)]).at("fvu", 1)).all()


def test_areas_are_of_the_most_groups_that_share_a_range():
    def group(name, low, high):
        return {f"{name}{l0}": point(name, f"k={l0}", l0, 1 / l0) for l0 in (low, high)}

    points = group("a", 8, 64) | group("b", 4, 32) | group("c", 16, 128) | group("far", 200, 400)
    points["null"] = point("null: pca", "k=20", 20, 0.1)
    found = summary(points, BETTER)
    spans = {name: (one.get("l0_from"), one.get("l0_to")) for name, one in found["frontiers"].items()}
    assert spans == {
        **dict.fromkeys("abc", (16, 32)),
        "far": (None, None),
        "null: pca": (None, None),
    }
    assert found["left_out"] == {
        "far": "its l0 (200 to 400) do not reach over 16 to 32, which the others share",
        "null: pca": "it has one setting (l0 20), which is no range",
    }
    alone = summary(group("a", 8, 64) | group("far", 200, 400), BETTER)
    assert alone["left_out"] == {} and not any(
        one["mean_over_common_l0"] for one in alone["frontiers"].values()
    )


def test_a_setting_that_is_nan_is_not_interpolated_over():
    points = [point("a", f"k={l0}", l0, fvu) for l0, fvu in ((8, 0.3), (16, math.nan), (32, 0.1), (64, 0.05))]
    found = Frontier(points)
    assert np.isnan(found.at("fvu", 16.0)).all() and np.isnan(found.at("fvu", 12.0)).all()
    assert found.at("fvu", 45.0)[0] == pytest.approx(0.1 - 0.05 * math.log(45 / 32) / math.log(2))
    other = [point("b", f"k={l0}", l0, 0.2) for l0 in (8, 64)]
    told = summary({str(i): one for i, one in enumerate([*points, *other])}, BETTER)
    assert "one of them is not a number" in told["differences"][0]["sentence"]


def test_settings_without_a_place_are_named():
    points = [point("a", "k=8", 8, 0.3), point("a", "dead", 0.0, 1.0), point("a", "broken", math.nan, 1.0)]
    told = summary({str(i): one for i, one in enumerate(points)}, BETTER)
    assert told["dropped"] == {
        "a, dead": "its l0, 0, is below 0.5: hardly any latent is active",
        "a, broken": "its l0 is NaN",
    }
    assert [one["setting"] for one in told["frontiers"]["a"]["points"]] == ["k=8"]
