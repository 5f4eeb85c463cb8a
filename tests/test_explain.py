"""Lexical explanations: planted rules are found, documents do not leak, nulls score nothing, scores are true."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from atlas_fixture import World, make_world
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_atlas import ID, N_DOCUMENTS, VOCABULARY, Planted, edit, plant
from sklearn.metrics import roc_auc_score

from sememe.atlas import open_atlas
from sememe.errors import ArtifactError, MismatchError, TextError
from sememe.explain import ExplainConfig, Explanations, explain, side_of
from sememe.explain.examples import EXPLAIN, read
from sememe.explain.lexical.classes import CLASSES, POSITIONS, classes_of
from sememe.explain.lexical.loops import CURRENT, N_CLASSES, N_OF_TOKENS
from sememe.explain.lexical.rules import _fit, _places, _score, _strangers
from sememe.explain.lexical.words import Rule, as_json, in_words
from sememe.interpret import interpret


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted") / "atlas")


@pytest.fixture(scope="module")
def found(atlas: Planted) -> Explanations:
    return explain(ExplainConfig(atlas=atlas.path, out=atlas.path.parent / "explanations", n_bootstrap=200))


def test_planted_rules_are_found(found: Explanations) -> None:
    rows = found.rows()
    words = [row["rule_words"] for row in rows]
    assert words[0] == "“ king”"
    assert sorted(words[1].replace(" or ", ", ").split(", ")) == sorted(["“ the”", "“ing”", "“カ”"])
    assert words[2] == "a number"
    assert words[3] == "Cyrillic letters"
    assert words[4] == "after “ the”"
    assert words[5] == "“ river” after “ and”"
    assert (
        words[6] == "“ stone” or “ light”, after a number"
        or words[6] == "“ light” or “ stone”, after a number"
    )
    assert words[9] == "after a number"
    for latent in (0, 1, 2, 3, 4, 5, 6, 9):
        assert rows[latent]["auroc"] == pytest.approx(1, abs=0.02)
        assert rows[latent]["label"] == words[latent]
    rule = json.loads(rows[4]["rule"])
    assert rule == {"previous": [{"id": ID[" the"], "text": " the"}]}


def test_noise_and_dead_latents_get_no_label(found: Explanations) -> None:
    noise, dead = found.rows()[7], found.rows()[8]
    assert noise["label"] is None and abs(noise["score"]) < 0.25
    assert dead["label"] is None and dead["rule"] is None and dead["score"] is None and dead["n_train"] == 0
    assert set(found.labels()) == {0, 1, 2, 3, 4, 5, 6, 9}


def test_nulls_score_nothing(found: Explanations) -> None:
    """The same procedure on shuffled activations, and every rule on another latent: both near 0."""
    summary = found.summary
    assert abs(summary["score_shuffled"]["mean"]) < 0.15
    assert abs(summary["score_other"]["mean"]) < 0.25
    assert (
        summary["score"]["mean"] > 0.85
        and summary["score"]["low"] < summary["score"]["mean"] < summary["score"]["high"]
    )
    assert summary["lift"]["low"] > 0.4
    assert summary["n_scored"] == 9 and summary["n_labelled"] == 8


def test_a_stranger_always_has_a_rule() -> None:
    has = np.random.default_rng(1).random(200) < 0.3
    for seed in range(5):
        other = _strangers(has, seed)
        assert has[other].all() and (other != np.arange(200)).all()
        assert sorted(other[has]) == np.flatnonzero(has).tolist()
    assert _strangers(np.zeros(3, bool), 0).tolist() == [0, 1, 2]


def says(row: dict[str, Any], at: int, current: int, previous: int, recent: list[int]) -> bool:
    """A rule's JSON, followed word by word: the slow truth of what `loops.score` computes."""
    rule = json.loads(row["rule"])

    def has(token: int, name: str) -> bool:
        return bool(classes_of(VOCABULARY[token].encode()) >> CLASSES.index(name) & 1)

    yes = "conditions" in rule and not (set(rule) - {"conditions"})
    yes |= current in {item["id"] for item in rule.get("tokens", ())}
    yes |= previous in {item["id"] for item in rule.get("previous", ())}
    yes |= [previous, current] in [pair["ids"] for pair in rule.get("pairs", ())]
    yes |= "class" in rule and has(current, rule["class"])
    for condition in rule.get("conditions", ()):
        if condition["class"] in POSITIONS:
            holds = at < POSITIONS[condition["class"]]
        elif condition["token"] == "current":
            holds = has(current, condition["class"])
        elif condition["token"] == "previous":
            holds = has(previous, condition["class"]) if previous >= 0 else condition["class"] == CLASSES[-1]
        else:
            holds = any(has(token, condition["class"]) for token in recent)
        yes &= holds != condition["not"]
    return yes


def test_scores_are_the_auroc_of_the_rule_on_documents_it_did_not_see(
    atlas: Planted, found: Explanations
) -> None:
    config = ExplainConfig()
    opened = open_atlas(atlas.path)
    rows = found.rows()
    examples = opened.query("SELECT e.*, token_ids, k.key FROM examples e JOIN contexts c ON c.id = e.context "
                            "JOIN document_keys k ON k.id = e.document")  # fmt: skip
    opened.close()
    for latent in (1, 4, 6, 7):
        truth, guess, weight, acts = [], [], [], []
        for e in (e for e in examples if e["latent"] == latent):
            if side_of(e["key"], config.test_fraction, config.seed) == 0:
                continue
            active = dict(zip(e["positions"], e["acts"], strict=True))
            for p in range(max(e["start"], 1), e["stop"]):
                ids = e["token_ids"]
                truth.append(p in active)
                acts.append(active.get(p, 0.0))
                guess.append(says(rows[latent], p, ids[p], ids[p - 1] if p else -1, ids[max(0, p - 8) : p]))
                weight.append(2 if truth[-1] else int(e["kind"] == "random"))
        truth_, guess_, weight_ = np.array(truth), np.array(guess, float), np.array(weight)
        sizes = np.bincount(weight_, minlength=3)
        auroc = roc_auc_score(truth_, guess_, sample_weight=1 / sizes[weight_])
        assert rows[latent]["auroc"] == pytest.approx(auroc, abs=1e-5)
        assert rows[latent]["n_test"] == truth_.sum()
        assert rows[latent]["correlation"] == pytest.approx(np.corrcoef(guess_, acts)[0, 1], abs=1e-4)


def test_rules_come_from_documents_on_which_they_are_not_scored(tmp_path: Path) -> None:
    """Changing every held-out document changes no rule. Whole books lie on one side: pieces of one share a key."""
    a, b = plant(tmp_path / "a", pieces=3), plant(tmp_path / "b", pieces=3)
    opened = open_atlas(b.path)
    keys = {row["id"]: row["key"] for row in opened.query("SELECT id, key FROM document_keys")}
    opened.close()
    held_out = [i for i, key in keys.items() if side_of(key, 0.4, 0) == 1]
    assert 20 < len(held_out) < 100
    assert all(side_of(keys[i], 0.4, 0) == side_of(keys[i - i % 3], 0.4, 0) for i in keys)
    # In the second atlas every held-out window is silent but for its first token: garbage, were it ever read.
    edit(
        b.path,
        (
            "UPDATE examples SET positions = [start + 1], acts = [100.0] WHERE document IN (SELECT unnest(?))",
            [held_out],
        ),
    )
    one = explain(ExplainConfig(atlas=a.path, out=tmp_path / "ea", n_bootstrap=10)).rows()
    other = explain(ExplainConfig(atlas=b.path, out=tmp_path / "eb", n_bootstrap=10)).rows()
    assert [row["rule"] for row in one] == [row["rule"] for row in other]
    assert [row["auroc_train"] for row in one if row["n_train"]] == [
        row["auroc_train"] for row in other if row["n_train"]
    ]
    assert sum(row["auroc"] != row2["auroc"] for row, row2 in zip(one, other, strict=True)) >= 8


def test_pieces_of_one_book_are_one_document(tmp_path: Path) -> None:
    """A token that fires in one book alone is no rule, in however many of its chapters it does."""
    path = plant(tmp_path / "atlas", pieces=N_DOCUMENTS // 20).path
    with closing(open_atlas(path)) as opened:
        examples = read(opened, 0.4, 0)
    assert len(examples.keys) == len(set(examples.keys)) == 20
    assert examples.document.max() == 19
    rows = explain(ExplainConfig(atlas=path, out=tmp_path / "all", n_bootstrap=10)).rows()
    assert rows[0]["rule_words"] == "“ king”" and rows[0]["n_train_documents"] < 20
    book = next(key for key in examples.keys if side_of(key, 0.4, 0) == EXPLAIN)
    pieces = [i for i in range(N_DOCUMENTS) if f"book {i // 6}" == book]
    on = "latent = 0 AND kind <> 'random' AND document NOT IN (SELECT unnest(?))"
    edit(path, (f"UPDATE examples SET positions = [], acts = [] WHERE {on}", [pieces]))
    rows = explain(ExplainConfig(atlas=path, out=tmp_path / "one", n_bootstrap=10)).rows()
    assert "king" not in str(rows[0]["rule"]), "it fires in several pieces of one book only"


def test_a_latent_of_a_position_gets_a_rule_of_it(atlas: Planted, tmp_path: Path) -> None:
    path = tmp_path / "atlas"
    shutil.copytree(atlas.path, path)
    edit(
        path,
        ("DELETE FROM examples WHERE latent = 7 AND kind = 'random' AND start < 8", []),
        ("UPDATE examples SET positions = list_filter(range(start, stop), lambda p: p < 8) "
         "WHERE latent = 7 AND kind <> 'random'", []),
        ("UPDATE examples SET acts = list_transform(positions, lambda p: 1.0) WHERE latent = 7", []),
    )  # fmt: skip
    made = explain(ExplainConfig(atlas=path, out=tmp_path / "out", n_bootstrap=10))
    row = made.rows()[7]
    assert row["rule_words"] == "one of the first 8 tokens of a context" and row["category"] == "a position"
    assert row["auroc"] == pytest.approx(1, abs=0.02)
    assert json.loads(row["rule"]) == {
        "conditions": [{"token": "current", "class": "one of the first 8 tokens of a context", "not": False}]
    }


def test_rules_are_scored_without_the_documents_they_come_from(atlas: Planted, tmp_path: Path) -> None:
    """The other way round: changing every explaining document changes no score of a rule that is there."""
    other = tmp_path / "atlas"
    shutil.copytree(atlas.path, other)
    sides = []
    for path in (atlas.path, other):
        with closing(open_atlas(path)) as opened:
            keys = {row["id"]: row["key"] for row in opened.query("SELECT id, key FROM document_keys")}
        if path == other:
            shown = [i for i, key in keys.items() if side_of(key, 0.4, 0) == EXPLAIN]
            edit(
                other,
                ("UPDATE examples SET positions = [start + 1], acts = [100.0] WHERE document IN (SELECT unnest(?))",
                 [shown]),
                ("UPDATE contexts SET token_ids = list_transform(token_ids, lambda t: (t * 7 + 3) % ?) "
                 "WHERE id IN (SELECT unnest(?))", [len(ID), shown]),
            )  # fmt: skip
        with closing(open_atlas(path)) as opened:
            sides.append(read(opened, 0.4, 0))
    one, two = sides
    own, places = np.arange(one.d_sae), (_places(one), _places(two))
    rules, gain, _ = _fit(one, places[0], 8, 0.02, -1, "rules")
    assert (gain != _fit(two, places[1], 8, 0.02, -1, "rules")[1]).sum() >= 8, "they would be other rules"
    for decile in (None, 3, 9):
        scores = [_score(e, p, rules, own, decile=decile) for e, p in zip(sides, places, strict=True)]
        for before, after in zip(*scores, strict=True):
            np.testing.assert_array_equal(before, after)
    assert np.nanmax(_score(one, places[0], rules, own).gain) > 0.9


def test_explanations_join_the_atlas(atlas: Planted, found: Explanations) -> None:
    opened = open_atlas(atlas.path, explanations=found.artifact.path)
    rows = opened.query(
        "SELECT id, label FROM explanations JOIN (SELECT unnest([0, 2]) AS id) ON id = latent ORDER BY id"
    )
    assert rows == [{"id": 0, "label": "“ king”"}, {"id": 2, "label": "a number"}]
    opened.close()
    assert "8 of 9 latents have a label" in found._repr_html_()


def test_explanations_of_another_atlas(atlas: Planted, found: Explanations, tmp_path: Path) -> None:
    other = plant(tmp_path / "other", n_documents=60)
    with pytest.raises(
        MismatchError, match=r"the explanations .* must be of the atlas .*Run `sememe explain`"
    ):
        open_atlas(other.path, explanations=found.artifact.path)


def test_made_once_and_the_same_again(atlas: Planted, found: Explanations, tmp_path: Path) -> None:
    config = ExplainConfig(atlas=atlas.path, out=found.artifact.path, n_bootstrap=200)
    assert explain(config).artifact.meta == found.artifact.meta
    again = explain(config.replace(out=tmp_path / "again"))
    assert again.rows() == found.rows() and again.summary == found.summary
    with pytest.raises(MismatchError, match=r"the explanations at .* must have been made with this config"):
        explain(config.replace(max_tokens=3))


def test_on_a_real_model(tmp_path: Path) -> None:
    """A tiny random model still has latents that follow the token: the whole way from text to labels."""
    world: World = make_world(tmp_path)
    interpret(world.config("atlas", n_top=20, n_random=10, n_decile=3), lm=world.lm).close()
    found = explain(ExplainConfig(atlas=tmp_path / "atlas", out=tmp_path / "explanations", n_bootstrap=50))
    summary = found.summary
    assert summary["n_scored"] > 20
    assert summary["score"]["mean"] > 0.5 > abs(summary["score_shuffled"]["mean"])
    assert summary["lift"]["low"] > 0.2
    for row in found.rows():
        assert row["label"] is None or row["label"] == row["rule_words"]


# -- kinds of tokens, rules in words -------------------------------------------------------------------


DATES = "a word of dates (a month, weekday, century or era)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" 1984", {"a number", "a year"}),
        (" 2984", {"a number"}),
        (
            " March",
            {"the start of a word", "a capitalised word", "ASCII letters", DATES},
        ),
        (" may", {"the start of a word", "lower-case letters", "ASCII letters"}),
        (" BC", {"the start of a word", "capitals only", "ASCII letters", DATES}),
        ("3.14", {"a number"}),
        (" Fluss", {"the start of a word", "a capitalised word", "ASCII letters"}),
        ("über", {"a later part of a word", "lower-case letters", "ASCII letters", "Latin letters beyond ASCII"}),
        (" река", {"the start of a word", "lower-case letters", "Cyrillic letters"}),
        ("שלום", {"a later part of a word", "Hebrew letters"}),
        ("水", {"a later part of a word", "a single letter", "Chinese characters"}),
        ("の", {"a later part of a word", "a single letter", "Japanese kana"}),
        ("\n\n", {"a line break", "white space only"}),
        ("    ", {"white space only", "indentation"}),
        (" “", {"a symbol or punctuation mark", "a quotation mark"}),
        (" –", {"a symbol or punctuation mark", "a dash"}),
        ("<|im_start|>", {"a special token"}),
        (" NATO", {"the start of a word", "capitals only", "ASCII letters"}),
        ("", set()),
    ],
)  # fmt: skip
def test_classes_of_tokens(text: str, expected: set[str]) -> None:
    bits = classes_of(text.encode())
    assert {name for i, name in enumerate(CLASSES) if bits >> i & 1} == expected


def test_rules_know_every_class() -> None:
    assert len(CLASSES) - len(POSITIONS) - 1 == N_OF_TOKENS and set(CLASSES[N_OF_TOKENS:-1]) == set(POSITIONS)
    assert len(CLASSES) == N_CLASSES and CLASSES[-1] == "the start of the document"
    of_dates = Rule(CURRENT, (), CLASSES.index(DATES), ())
    assert "dates" in in_words(of_dates, {}) and "month" in in_words(of_dates, {})


def test_code_and_broken_characters() -> None:
    for text in ("self._x", "()", " =>", "camelCase", "foo(", "::"):
        assert classes_of(text.encode()) >> CLASSES.index("code") & 1, text
    for text in (" house", ",", " (", "1984"):
        assert not classes_of(text.encode()) >> CLASSES.index("code") & 1, text
    assert classes_of(b"\xe6\x97") >> CLASSES.index("bytes of a broken character") & 1


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=12))
def test_any_bytes_have_classes(raw: bytes) -> None:
    assert 0 <= classes_of(raw) < 1 << (len(CLASSES) - 1), "no token is the start of the document"


def test_rules_in_words() -> None:
    tokens = {i: f" t{i}" for i in range(9)} | {9: "\n"}
    pair = (3 << 32) | 4
    number, code = CLASSES.index("a number"), CLASSES.index("code")
    cases = {
        "“ t1”": Rule(1, (1,), -1, ()),
        "“ t1”, “ t2”, “ t3”, “ t4” or 3 more": Rule(1, (1, 2, 3, 4, 5, 6, 7), -1, ()),
        "“ t1”, “ t2”, “ t3”, “ t4” or “ t5”": Rule(1, (1, 2, 3, 4, 5), -1, ()),
        "after “⏎”": Rule(2, (9,), -1, ()),
        "“ t4” after “ t3”": Rule(3, (pair,), -1, ()),
        "a number or “ t1”, not soon after code": Rule(1, (1,), number, ((2, code, True),)),
        "anything but a number, after code": Rule(0, (), -1, ((0, number, True), (1, code, False))),
        "after code, not a number": Rule(0, (), -1, ((1, code, False), (0, number, True))),
    }
    for words, rule in cases.items():
        assert in_words(rule, tokens) == words
        assert json.loads(json.dumps(as_json(rule, tokens)))
    assert in_words(Rule(0, (), -1, ()), tokens) is None and as_json(Rule(0, (), -1, ()), tokens) is None


# -- bad input -----------------------------------------------------------------------------------------


def test_not_an_atlas(found: Explanations, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"must be a finished atlas, got nothing there"):
        explain(ExplainConfig(atlas=tmp_path / "nowhere", out=tmp_path / "out"))
    with pytest.raises(ArtifactError, match=r"must be an? atlas, got an? explanations"):
        explain(ExplainConfig(atlas=found.artifact.path, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_documents_on_one_side_only(tmp_path: Path) -> None:
    lonely = plant(tmp_path / "atlas", pieces=N_DOCUMENTS)
    with pytest.raises(
        TextError, match=r"documents on both sides of the split, got \d+ documents, all on one side"
    ):
        explain(ExplainConfig(atlas=lonely.path, out=tmp_path / "out"))
    assert not list(tmp_path.glob("*out*"))
