"""Scorers of explanations against slow references: chance is 0, right is 1, and nothing but the content tells."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter

import numpy as np
import pytest
from rule_judge import RuleJudge
from scipy.stats import binom, spearmanr
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from sememe.atlas import VARIANT_OF
from sememe.browse.data import explained
from sememe.explain import ExplainConfig
from sememe.explain.asked import VARIANTS, Found
from sememe.explain.examples import SCORE, Window, excerpt, side_of
from sememe.explain.results import Scores, correlations, lifts, strata, summarise
from sememe.explain.scorers import (
    Asked,
    Evidence,
    Score,
    auroc,
    contrast,
    contrasted,
    detection,
    effect,
    embedding,
    fuzzing,
    generation,
    intruder,
    on_side,
    simulation,
)
from sememe.explain.scorers.base import cropped
from sememe.explain.scorers.fuzzing import marked
from sememe.explain.scorers.simulation import (
    CHOICES,
    EXCERPT,
    N_EXCERPTS,
    _unfiltered,
    prompt,
)
from sememe.explain.tables import _holds
from sememe.figures.explanations import lift_table
from sememe.interpret import InterpretConfig
from sememe.judge import Answer, Question, SlotQuestion, Slots

WORDS = [" a", " b", " c", " d", " e", " f", " g", " h"]


def window(
    kind: str, on: set[int], decile: int | None = None, document: str = "d", n: int = 40, seed: int = 0
) -> Window:
    """Tokens at random, " KEY" where it is active."""
    rng = np.random.default_rng(seed)
    tokens = tuple(" KEY" if i in on else WORDS[int(rng.integers(8))] for i in range(n))
    acts = tuple(float(2 + i % 3) if i in on else 0.0 for i in range(n))
    return Window(kind, decile, document, tokens, acts, min(on, default=n // 2))  # type: ignore[arg-type]


def evidence(seed: int = 0, density: float = 0.02, per_decile: int = 2, n_silent: int = 8) -> Evidence:
    """A latent that fires on " KEY" and nowhere else."""
    rng = np.random.default_rng(seed)
    windows = [
        window("decile", set(rng.choice(40, 2, replace=False).tolist()), d, f"doc {d} {i}", seed=100 * d + i)
        for d in range(10)
        for i in range(per_decile)
    ]
    windows += [window("random", set(), None, f"silent {i}", seed=5000 + i) for i in range(n_silent)]
    windows += [window("top", {20, 25}, None, f"top {i}", seed=9000 + i) for i in range(8)]
    return Evidence(3, tuple(windows), density, seed)


RIGHT = 'the tokens [" KEY"]'
WRONG = 'the tokens [" nothing"]'


def by_name(scores: list[Score]) -> dict[tuple[str, int | None], Score]:
    return {(score.variant, score.decile): score for score in scores}


# -- corrected for chance -------------------------------------------------------------------------------


def test_contrast_is_the_adjusted_balanced_accuracy() -> None:
    rng = np.random.default_rng(0)
    truth, said = rng.random(200) < 0.7, rng.random(200) < 0.5
    deciles = [int(d) if t else None for d, t in zip(rng.integers(0, 10, 200), truth, strict=True)]
    asked = [Asked(bool(t), d, float(s), False) for t, d, s in zip(truth, deciles, said, strict=True)]
    found = {score.decile: score for score in contrast("x", "y", asked)}
    assert found[None].score == pytest.approx(balanced_accuracy_score(truth, said, adjusted=True))
    for decile in range(10):
        part = [i for i in range(200) if not truth[i] or deciles[i] == decile]
        expected = balanced_accuracy_score(truth[part], said[part], adjusted=True)
        assert found[decile].score == pytest.approx(expected) and found[decile].n == len(part)
    for part in ([a for a in asked if a.positive], [a for a in asked if not a.positive], []):
        undefined = contrast("x", "y", part)
        assert undefined[0].n == len(part) and all(math.isnan(s.score) for s in undefined)


@pytest.mark.parametrize("scorer", [detection, fuzzing, simulation])
def test_right_words_score_one_and_wrong_words_zero(scorer: object) -> None:
    right = asyncio.run(scorer(RIGHT, evidence(), RuleJudge()))  # type: ignore[operator]
    wrong = asyncio.run(scorer(WRONG, evidence(), RuleJudge()))  # type: ignore[operator]
    assert right and len(right) == len(wrong)
    for good, bad in zip(right, wrong, strict=True):
        # Activations are 2, 3 or 4 where the simulator can but say 10.
        least = 0.93 if scorer is simulation else 1.0
        if not math.isnan(good.score):
            assert good.score >= least - 1e-9 and bad.score == 0, good
        assert good.n_malformed == bad.n_malformed == 0


@pytest.mark.parametrize("scorer", [detection, fuzzing, simulation])
@pytest.mark.parametrize("garbage", ["", "I am sorry.", "[1, 0", "[2, 2, 2, 2, 2]"])
def test_garbage_scores_what_guessing_does_and_is_counted(scorer: object, garbage: str) -> None:
    found = asyncio.run(scorer(RIGHT, evidence(), RuleJudge(answer=garbage)))  # type: ignore[operator]
    for score in found:
        assert (score.score == 0 or math.isnan(score.score)) and score.n_malformed == score.n > 0


class Guesser(RuleJudge):
    """Answers at random, in the form that is asked for."""

    rng = np.random.default_rng(0)

    async def ask(self, question: Question) -> Answer:
        text = question.messages[-1].content
        if "The number of the text" in text:
            return Answer(str(self.rng.integers(1, 6)))
        n = int(text.rsplit("Answer with ", 1)[1].split()[0])
        return Answer(json.dumps([int(x) for x in self.rng.integers(0, 2, n)]))


@pytest.mark.parametrize("name", ["detection", "fuzzing", "intruder"])
def test_guessing_scores_zero(name: str) -> None:
    judge, found = Guesser(), []
    for seed in range(150):
        one = evidence(seed)
        if name == "intruder":
            found += asyncio.run(intruder(one, judge))
        else:
            scorer = {"detection": detection, "fuzzing": fuzzing}[name]
            found += [s for s in asyncio.run(scorer(RIGHT, one, judge)) if s.decile is None]
    scores = np.array([score.score for score in found])
    assert abs(scores.mean()) < 4 * scores.std() / math.sqrt(len(scores)) and scores.std() > 0.05


# -- each scorer -----------------------------------------------------------------------------------------


def test_wrong_highlights_stand_where_right_ones_do() -> None:
    """Every wrong highlighting is a right one's pattern in a window of the same length."""
    for seed in range(20):
        one = evidence(seed)
        found = marked(one, one.rng("fuzzing"))
        right = {(len(w.tokens), places) for w, places in found if w.kind != "random"}
        wrong = [(len(w.tokens), places) for w, places in found if w.kind == "random"]
        assert len(wrong) == 8 and set(wrong) <= right
        for w, places in found:
            if w.kind != "random":
                assert places and places == {i for i, act in enumerate(w.acts) if act > 0}


def test_peaks_are_anywhere_in_what_is_shown() -> None:
    """Half of a window's place must not tell that it was kept for its middle."""
    rng = np.random.default_rng(0)
    whole = window("top", {40}, n=80)
    at = Counter(cropped(whole, rng).peak for _ in range(3200))
    assert set(at) == set(range(32)) and max(at.values()) < 160
    assert all(cropped(whole, rng).tokens[cropped(whole, np.random.default_rng(i)).peak] for i in range(3))


def test_excerpt_keeps_peak_and_acts_together() -> None:
    whole = window("top", {50}, n=60)
    for length, lead in ((10, 5), (64, 40), (7, 0), (20, 19)):
        piece = excerpt(whole, length, lead)
        assert piece.tokens[piece.peak] == " KEY" and piece.acts[piece.peak] > 0
        assert len(piece.tokens) == len(piece.acts) == min(length, 60)


def test_intruder_is_found_and_corrected_for_chance() -> None:
    found = asyncio.run(intruder(evidence(), RuleJudge()))
    assert [(s.score, s.n, s.n_malformed) for s in found] == [(1.0, 8, 0)]
    bad = asyncio.run(intruder(evidence(), RuleJudge(answer="number 2 or 3")))
    assert [(round(s.score, 9), s.n_malformed) for s in bad] == [(0.0, 8)]
    never = asyncio.run(intruder(evidence(), RuleJudge(answer="7")))
    assert never[0].n_malformed == 8
    (nobody,) = asyncio.run(intruder(evidence(n_silent=0), RuleJudge()))
    assert math.isnan(nobody.score) and nobody.n == 0


class Told(RuleJudge):
    """Gives the same distributions whatever it is asked."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = np.random.default_rng(seed)
        self.said: dict[str, list[dict[str, float]]] = {}

    async def slots(self, question: SlotQuestion) -> Slots:
        assert [question.text[at : at + 7] for at in question.slots] == ["unknown"] * len(question.slots)
        assert question.choices == tuple(str(i) for i in range(11))
        known = [self.rng.choice(11, 5, replace=False) for _ in question.slots]
        answer = [{str(c): float(np.log(self.rng.random())) for c in choices} for choices in known]
        self.said[question.text] = answer
        return Slots(tuple(answer))


def test_simulation_is_pearson_over_concatenated_tokens_of_expected_levels() -> None:
    one, judge = evidence(density=0.5), Told(0)
    found = by_name(asyncio.run(simulation("numbers", one, judge)))
    top = one.top[:5]
    guess, truth = [], []
    for w in top:
        said = judge.said[prompt("numbers", w.tokens).text]
        for distribution, act in zip(said, w.acts, strict=True):
            p = np.exp(list(distribution.values()))
            guess.append(float(np.dot([int(c) for c in distribution], p / p.sum())))
            truth.append(act)
    score = found["top_only", None]
    assert score.score == pytest.approx(np.corrcoef(guess, truth)[0, 1]) and score.n == len(truth) == 200
    names = {
        "top_only",
        "random_only",
        "top_and_random",
        "random_only_activating",
        "top_and_random_activating",
    }
    assert {variant for variant, _ in found} == names
    assert found["top_and_random", None].n == 400


def test_simulation_prompt_is_openais() -> None:
    asked = prompt(" numbers ", [" a", "\n", "\t", " KEY"])
    text = asked.text
    assert text.startswith("We're studying neurons in a neural network.\n")
    tail = (
        "\n\nNeuron 3\nExplanation of neuron 3 behavior: the main thing this neuron does is find numbers\nActivations: "
        "\n<start>\n a\tunknown\n\\n\tunknown\n\\t\tunknown\n KEY\tunknown\n<end>\n"
    )
    assert text.endswith(tail) and len(asked.slots) == 4 and asked.choices == CHOICES
    assert "\n<start>\nThey\t0\n sold\t0\n 12\t10\n" in text


def test_excerpts_of_simulation_come_from_different_documents() -> None:
    one = evidence(density=0.5)
    same = one._replace(windows=tuple(w._replace(document="one book") for w in one.windows))
    found = by_name(asyncio.run(simulation(RIGHT, same, RuleJudge())))
    assert found["top_only", None].n == 40, "one excerpt of the one document"
    assert math.isnan(found["random_only", None].score) and found["random_only", None].n == 0


def test_missing_excerpts_are_counted_and_told() -> None:
    few = by_name(asyncio.run(simulation(RIGHT, evidence(density=0.0, n_silent=3), RuleJudge())))
    enough = by_name(asyncio.run(simulation(RIGHT, evidence(density=0.0), RuleJudge())))
    assert {variant: score.n_missing for (variant, _), score in few.items()} == {
        "top_only": 0,
        "random_only": 2,
        "top_and_random": 2,
        "random_only_activating": 0,
        "top_and_random_activating": 0,
    }
    assert {score.n_missing for score in enough.values()} == {0}
    scores = Scores()
    scores.add(0, few.values())
    scores.add(1, enough.values())
    again = Scores.of_table(scores.table())
    rows = {row["variant"]: row for row in summarise(again, 10, 0)}
    assert (rows["random_only"]["n_short"], rows["top_only"]["n_short"]) == (1, 0)
    table = lift_table({"scorers": list(rows.values()), "lifts": [], "no_lift": {}})
    told = {row[0]: note[1] for row, note in zip(table.rows, table.notes, strict=True)}
    assert told["simulation: random only"] == "2 undefined, 1 short" and told["simulation: top only"] == ""


def test_an_atlas_made_by_default_has_random_excerpts_enough_for_nearly_every_latent() -> None:
    few = binom.cdf(N_EXCERPTS - 1, InterpretConfig().n_random, ExplainConfig().test_fraction)
    assert few < 0.06


def test_constant_predictions_score_zero_and_constant_truth_is_undefined() -> None:
    silent = evidence(density=0.0)
    found = by_name(asyncio.run(simulation(RIGHT, silent, RuleJudge())))
    assert math.isnan(found["random_only", None].score), "five silent excerpts have nothing to correlate with"
    assert found["random_only_activating", None].score > 0.9


def test_unfiltered_excerpts_fire_as_often_as_the_texts_do() -> None:
    """Against the text itself: bursts of activity, windows kept as an atlas keeps them, excerpts drawn blindly."""
    rng = np.random.default_rng(1)
    n, length = 200_000, EXCERPT
    active = np.zeros(n, bool)
    for start in rng.choice(n - 8, 900, replace=False):
        active[start : start + int(rng.integers(1, 8))] = True
    starts = np.arange(0, n - length, length)
    truth = float(np.mean([active[s : s + length].any() for s in starts]))
    windows = []
    for i, at in enumerate(
        rng.choice(np.flatnonzero(active), 60)
    ):  # a uniform sample of activations, as a reservoir
        s = int(at) // length * length
        acts = tuple(active[s : s + length].astype(float).tolist())
        windows.append(Window("decile", 0, f"d{i}", (" x",) * len(acts), acts, int(at) - s))
    windows += [window("random", set(), None, f"s{i}", n=length) for i in range(10)]
    fired = []
    for seed in range(400):
        drawn = _unfiltered(Evidence(0, tuple(windows), float(active.mean()), seed), set())
        assert len(drawn) == 5
        fired.append(np.mean([w.n_active > 0 for w in drawn]))
    assert np.mean(fired) == pytest.approx(truth, abs=0.04)


def test_embedding_is_an_auroc() -> None:
    one = evidence()
    vectors = {}

    def encode(texts: list[str]) -> np.ndarray:
        rng = np.random.default_rng(7)
        out = rng.normal(size=(len(texts), 8))
        out /= np.linalg.norm(out, axis=1, keepdims=True)
        vectors["all"], vectors["texts"] = out, np.array([" KEY" in text for text in texts[1:]])
        return out

    found = {score.decile: score for score in embedding("words", one, encode)}  # type: ignore[arg-type]
    cosines = vectors["all"][1:] @ vectors["all"][0]
    assert found[None].score == pytest.approx(2 * roc_auc_score(vectors["texts"], cosines) - 1)
    assert set(found) == {None, *range(10)}
    nothing = embedding("words", evidence(n_silent=0), encode)  # type: ignore[arg-type]
    assert len(nothing) == 11 and all(math.isnan(score.score) for score in nothing)
    rng = np.random.default_rng(0)
    yes, no = rng.integers(0, 4, 30) * 1.0, rng.integers(0, 4, 20) * 1.0
    assert auroc(yes, no) == pytest.approx(roc_auc_score([1] * 30 + [0] * 20, [*yes, *no]))


def test_generation_against_another_latents_texts() -> None:
    rng = np.random.default_rng(0)
    own, other = rng.random(5), rng.random(5)
    found = {s.variant: s for s in generation(own, other, 2.0)}
    assert found["auroc"].score == pytest.approx(2 * roc_auc_score([1] * 5 + [0] * 5, [*own, *other]) - 1)
    assert found["activation"].score == pytest.approx((own.mean() - other.mean()) / 2)
    # Two of its texts were not written: they count as two of the other's.
    part = {s.variant: s for s in generation(own[:3] + 9, other, 2.0)}
    ties = [a > b for a in own[:3] + 9 for b in other] + [0.5] * 10
    assert part["auroc"].score == pytest.approx(2 * np.mean(ties) - 1)
    as_other = [*(own[:3] + 9), other.mean(), other.mean()]
    assert part["activation"].score == pytest.approx((np.mean(as_other) - other.mean()) / 2)
    assert {(s.n, s.n_malformed) for s in part.values()} == {(5, 2)}


@pytest.mark.parametrize("n_other", [5, 2, 1])
def test_texts_that_another_latent_lacks_leave_the_score_alone(n_other: int) -> None:
    """By hand: own texts fire at 3 of 4, the other's at 1, so they are 1/2 apart, however many of the other's are."""
    found = {s.variant: s for s in generation(np.full(5, 3.0), np.full(n_other, 1.0), 4.0)}
    assert found["auroc"].score == 1 and found["activation"].score == pytest.approx(0.5)
    assert {s.n_malformed for s in found.values()} == {0}, "they are counted at the other latent"
    weak = {s.variant: s for s in generation(np.full(4, 0.0), np.full(n_other, 1.0), 4.0)}
    assert weak["auroc"].score == pytest.approx(-0.8) and weak["activation"].score == pytest.approx(-0.2)


def test_generation_without_texts_is_a_guess_and_without_any_others_undefined() -> None:
    none = np.zeros(0)
    assert {s.score for s in generation(none, np.ones(5), 2.0)} == {0.0}
    assert {s.score for s in generation(none, none, 2.0)} == {0.0}
    assert all(math.isnan(s.score) and s.n_malformed == 0 for s in generation(np.ones(5), none, 2.0))


def test_texts_are_held_against_the_nearest_earlier_that_there_are() -> None:
    assert [contrasted([5, 3, 0, 0, 1], i) for i in range(5)] == [4, 0, 1, 1, 1]
    assert [contrasted([0, 5, 0], i) for i in range(3)] == [1, None, 1]
    assert contrasted([0, 0], 0) is None


def test_effect_is_asked_about_tokens_that_the_explainer_did_not_see() -> None:
    promoted = [f" word{i}" for i in range(30)] + [" Word3", "WORD4"]
    others = [f" other{i}" for i in range(50)] + [" word1"]
    judge = RuleJudge()
    known = 'the tokens ["' + '", "'.join(promoted) + '"]'
    args = (promoted, others, judge, np.random.default_rng(0))
    found = asyncio.run(effect(known, *args, test_fraction=0.4, seed=0))
    assert [s.score for s in found] == [1.0] and found[0].n_malformed == 0
    asked = " ".join(q.messages[-1].content.split("\n\n", 1)[1] for q in judge.asked)  # type: ignore[union-attr]
    for token in (*on_side(promoted, 0, 0.4, 0), *on_side(others, 0, 0.4, 0)):
        assert f"'{token}'" not in asked
    assert all(f"'{token}'" in asked for token in on_side(promoted, SCORE, 0.4, 0))
    sides = {t.strip().casefold(): side for side in (0, 1) for t in on_side(promoted, side, 0.4, 0)}
    assert all(
        sides[t.strip().casefold()] == side_of(f"token:{t.strip().casefold()}", 0.4, 0) for t in promoted
    )
    garbage = asyncio.run(
        effect(known, promoted, others, RuleJudge(answer="?"), args[3], test_fraction=0.4, seed=0)
    )
    assert garbage[0].score == 0 and garbage[0].n_malformed == garbage[0].n


def _scores(values: np.ndarray, key: tuple[str, str, int | None] = ("detection", "windows", None)) -> Scores:
    found = Scores()
    found.add_many(key, np.arange(values.size), values, np.full(values.size, 10))
    return found


def test_lift_is_over_the_best_null_and_its_interval_covers() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        own = rng.normal(0.5, 0.2, 60)
        nulls = {name: _scores(rng.normal(mean, 0.2, 60)) for name, mean in (("a", 0.1), ("b", 0.3))}
        (found,) = lifts(_scores(own), nulls, 300, trial)
        means = {name: float(s.column(s.names[0]).score.mean()) for name, s in nulls.items()}
        assert found["best_null"] == "b" and found["lift"] == pytest.approx(own.mean() - means["b"])
        inside += found["low"] <= 0.2 <= found["high"]
    assert 0.87 <= inside / 200 <= 0.99


def test_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    values = np.round(rng.normal(size=80), 1)
    density = np.round(values + rng.normal(size=80), 1)
    density[3] = np.nan
    (found,) = correlations(_scores(values), {"density": density}, 1000, 0)
    kept = ~np.isnan(density)
    assert found["rho"] == pytest.approx(spearmanr(density[kept], values[kept]).statistic)
    assert found["low"] < found["rho"] < found["high"] and found["n_latents"] == 79
    slow = []
    for _ in range(1000):  # ranks anew in every draw
        rows = rng.choice(np.flatnonzero(kept), 79)
        slow.append(spearmanr(density[rows], values[rows]).statistic)
    assert (found["low"], found["high"]) == pytest.approx(np.quantile(slow, (0.025, 0.975)), abs=0.04)
    (flat,) = correlations(_scores(values), {"density": np.ones(80)}, 200, 0)
    assert flat["rho"] is None, "all alike"


def test_scores_survive_a_table() -> None:
    found = Scores()
    found.add(
        4,
        [Score("simulation", "top_only", None, math.nan, 5, 1), Score("detection", "windows", 3, 0.5, 4, 0)],
    )
    found.add(2, [Score("simulation", "top_only", None, 0.25, 5, 0)])
    table = found.table()
    assert table["score"].null_count == 1
    again = Scores.of_table(table)
    assert sorted(map(str, again.names)) == sorted(map(str, found.names))
    for key in found.names:
        for a, b in zip(again.column(key), found.column(key), strict=True):
            np.testing.assert_array_equal(a, b)


def test_latents_are_drawn_from_every_stratum_of_density() -> None:
    density = np.random.default_rng(0).permutation(100) / 100
    chosen = strata(density, list(range(100)), 10, 0)
    assert sorted(int(density[latent] * 10) for latent in chosen) == list(range(10))
    assert strata(density, list(range(100)), 10, 1) != chosen == strata(density, list(range(100)), 10, 0)
    assert strata(density, [5, 3], 10, 0) == [3, 5]


TOP, RANDOM, BOTH = (("simulation", name) for name in ("top_only", "random_only", "top_and_random"))
WINDOWS, MARKS, COSINE = ("detection", "windows"), ("fuzzing", "highlights"), ("embedding", "cosine")
ACTIVATION, AUROC = ("generation", "activation"), ("generation", "auroc")


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        ({TOP: 0.9, RANDOM: 0.8, BOTH: 0.1}, 0.1),
        ({TOP: 0.1, RANDOM: 0.2, BOTH: 0.9}, 0.9),
        ({ACTIVATION: 0.9, AUROC: 0.3}, 0.3),
        ({ACTIVATION: 0.1, AUROC: 0.7}, 0.7),
        ({BOTH: math.nan, TOP: 0.9, WINDOWS: 0.5, MARKS: 0.1}, 0.5),
        ({("intruder", "marked"): 0.9, MARKS: 0.2, COSINE: 0.9}, 0.2),
        ({BOTH: math.nan, TOP: 0.9}, None),
    ],
)
def test_words_become_the_label_by_the_score_that_the_browser_shows(
    scores: dict[tuple[str, str], float], shown: float | None
) -> None:
    assert all(variant in VARIANTS[scorer] for scorer, variant in VARIANT_OF.items())
    table = Scores()
    table.add(3, [Score(*pair, None, score, 1, 0) for pair, score in scores.items()])
    browsed = explained.Explained(words={3: {"label_from": "model"}}, scores=explained._scores(table.table()))
    assert browsed.score(3) == shown
    found = Found(3, "words", scores=tuple(Score(*pair, None, score, 1, 0) for pair, score in scores.items()))
    for threshold in (0.05, 0.25, 0.6, 0.95):
        assert _holds(found, ExplainConfig(label_score=threshold)) == (
            shown is not None and shown >= threshold
        )
