"""What is shown to explainers and scorers, and what is read out of their answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_explain_scorers import window

from sememe.explain.explainers import CATEGORIES, _chosen, explanation_in, explanation_question
from sememe.explain.prompts import flags_in, highlighted, level, number_in, records, shown
from sememe.explain.scorers.generation import texts_in
from sememe.explain.scorers.simulation import (
    expected_level,
)


def test_levels_are_openais() -> None:
    rng = np.random.default_rng(0)
    acts = rng.normal(size=200) * 3
    largest = float(acts.max())
    expected = np.minimum(10, np.floor(10 * np.maximum(acts, 0) / largest)).astype(int)
    assert [level(float(a), largest) for a in acts] == expected.tolist() and level(1.0, 0.0) == 0


def test_expected_level_renormalises_over_what_is_known() -> None:
    assert expected_level({"0": math.log(0.2), "10": math.log(0.2), "the": math.log(0.6)}) == pytest.approx(5)
    assert expected_level({"3": -900.0}) == 3, "underflow is none"
    assert expected_level({"the": -0.1}) is None and expected_level({}) is None
    assert expected_level({"0": -math.inf}) is None


def test_records_repeat_non_zeros_only_if_sparse() -> None:
    sparse, dense = window("top", {3}, n=20), window("top", set(range(10)), n=20)
    question = explanation_question([sparse])
    user = question.messages[-1].content
    assert user.count("<start>") == 2 and "Same activations, but with all zeros filtered out:" in user
    assert user.endswith("Explanation of neuron 3 behavior: the main thing this neuron does is find")
    assert explanation_question([dense]).messages[-1].content.count("<start>") == 1
    lines = records([sparse], 4.0).strip().splitlines()
    assert lines[0] == "<start>" and lines[-1] == "<end>" and lines[4] == " KEY\t5" and len(lines) == 22
    assert [m.role for m in question.messages] == ["system", "user", "assistant", "user", "assistant", "user"]


def test_five_strongest_and_deciles_on_request() -> None:
    windows = [window("top", {5}, None, seed=i) for i in range(9)]
    windows += [window("decile", {5}, d, seed=50 + d) for d in range(10)]
    assert explanation_question(windows).messages[-1].content.count("<start>") == 10, (
        "five, and their non-zeros"
    )
    assert explanation_question(windows, deciles=True).messages[-1].content.count("<start>") == 20
    marked_text = explanation_question(windows, style="highlights").messages[-1].content
    assert marked_text.count("<< KEY>>") == 5 and '" KEY": 10' in marked_text and "\t" not in marked_text


def test_with_deciles_the_weakest_is_shown_too() -> None:
    """Three of each tenth on the explaining side, or fewer: five are shown, from the strongest to the weakest."""
    for n in range(1, 31):
        tenths = sorted(d % 10 for d in range(n))
        windows = [window("decile", {5}, d, f"doc {i}", seed=i) for i, d in enumerate(tenths)]
        shown_tenths = [w.decile for w in _chosen(windows, deciles=True)]
        assert len(shown_tenths) == min(n, 5) and shown_tenths == sorted(shown_tenths, reverse=True), n
        assert shown_tenths[0] == max(tenths) and shown_tenths[-1] == 0, n
    # Of one document, it is the weakest that stays.
    windows = [window("decile", {5}, d, f"doc {d // 2}", seed=d) for d in range(10)]
    assert [w.decile for w in _chosen(windows, deciles=True)] == [8, 6, 4, 2, 0]


def test_examples_shown_are_of_different_documents_where_there_are_enough() -> None:
    pieces = [window("top", {5}, None, f"book {i // 4}", seed=i) for i in range(20)]
    assert [w.document for w in _chosen(pieces, deciles=False)] == [f"book {i}" for i in range(5)]
    assert [w.document for w in _chosen(pieces[:12], deciles=False)] == ["book 0", "book 1", "book 2"] + [
        "book 0"
    ] * 2


def test_highlights_join_neighbours() -> None:
    assert highlighted(["a", "b", "c", "d"], {1, 2}) == "a<<bc>>d"
    assert highlighted(["a", "b", "c"], {0, 2}) == "<<a>>b<<c>>"
    assert shown("a\tb\n\\") == "a\\tb\\n\\\\"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("Sure: [0,0,0] or rather [1, 0, 1]!", [True, False, True]),
        ("[true, false, true]", [True, False, True]),
        ("[1, 0]", None),
        ("[1, 0, 2]", None),
        ("[1.0, 0.0, 1.0]", None),
        ("1, 0, 1", None),
        ("[1, 0, 1", None),
        ("", None),
        ("<think>[0, 0, 0]? No.</think>\n[1, 0, 1]", [True, False, True]),
        ("[0, 0, 0]? No.</think>[1, 0, 1]", [True, False, True]),
        ("<think>It may be [1, 0, 1], or", None),
    ],
)
def test_reading_flags(answer: str, expected: list[bool] | None) -> None:
    assert flags_in(answer, 3) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("2", 2),
        ("Text 2.", 2),
        ("2 (yes, 2)", 2),
        ("2 or 3", None),
        ("6", None),
        ("0", None),
        ("1.5", None),
        ("", None),
        ("<think>1, 3 or 4?</think>\n\n2", 2),
        ("<think>2", None),
    ],
)
def test_reading_a_number(answer: str, expected: int | None) -> None:
    assert number_in(answer, 5) == expected


def test_reading_explanations_and_texts() -> None:
    assert explanation_in("\n  the main thing this neuron does is find rain.\nNo more.") == "rain"
    assert explanation_in('"words about rain"') == "words about rain"
    assert explanation_in("") is None and explanation_in(" ... ") is None
    assert texts_in('Here: ["a b", "c", "d"]', 2) == ["a b", "c"]
    assert texts_in("1. one text\n2) another\n- third\nnoise", 5) == ["one text", "another", "third"]
    assert texts_in("I cannot.", 5) == [] and texts_in("[1, 2]", 5) == []
    assert len(set(CATEGORIES)) == len(CATEGORIES)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>\nThe words are all about rain.\n</think>\n\nwords about rain.", "words about rain"),
        ("The words are all about rain.\n</think>\nwords about rain", "words about rain"),
        ("<think>\nThe words are all about rain", None),
        ("<think></think>", None),
        ("Sure! Here is a summary of what the neuron looks for: words about rain.", "words about rain"),
        ("Sure! Here is a summary.\n\nWords about rain.", "Words about rain"),
        ("Sure!\n\nHere's what the neuron is looking for:\n\n**words about rain**", "words about rain"),
        ("Of course, here is the explanation:\nwords about rain", "words about rain"),
        ("**Explanation:** the main thing this neuron does is find rain.", "rain"),
        ("Explanation of neuron 3 behavior: the main thing this neuron does is find rain", "rain"),
        ("sure, certain and other words of assent", "sure, certain and other words of assent"),
        ("answers to questions: yes or no", "answers to questions: yes or no"),
        ("here and there, words of place", "here and there, words of place"),
        ("Sure!", None),
    ],
)
def test_an_explanation_is_what_is_left_of_thoughts_and_courtesies(answer: str, expected: str | None) -> None:
    assert explanation_in(answer) == expected


def test_texts_are_read_after_the_thoughts() -> None:
    assert texts_in('<think>["a"] or ["b"]?</think>["c", "d"]', 5) == ["c", "d"]
    assert texts_in('<think>- a\n- b\n["c", "d"]', 5) == []


# -- over latents ----------------------------------------------------------------------------------------
