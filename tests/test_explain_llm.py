"""Explanations by a language model, the whole way: a server that speaks the real protocol, and real atlases."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rule_judge
import torch
from atlas_fixture import make_world
from explain_world import CYRILLIC, ENDINGS, KING, NOISE, NUMBERS, WORDS, config, whole
from judge_server import JudgeServer
from planted_atlas import ID, TUNED, Planted, PlantedConfig, edit, plant
from rule_judge import RuleJudge

from sememe import artifact, dictionaries
from sememe.atlas import EFFECTS, REMOVALS, labels, open_atlas
from sememe.effects import EffectsConfig, effects
from sememe.errors import MismatchError
from sememe.explain import ExplainConfig, explain, side_of
from sememe.explain.asked import VARIANTS, Found, ask_about
from sememe.explain.config import ASKING
from sememe.explain.examples import EXPLAIN, SCORE, read
from sememe.explain.explainers import CATEGORIES
from sememe.explain.verb import _choose, _with_generation
from sememe.explain.written import Reader
from sememe.interpret import interpret
from sememe.judge import Question, SlotQuestion


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted") / "atlas")


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(chat=rule_judge.chat, top=rule_judge.top) as running:
        yield running


def test_a_model_explains_and_scores_and_nothing_is_asked_twice(
    atlas: Planted, tmp_path: Path, server: JudgeServer
) -> None:
    options = config(atlas.path, tmp_path / "out", server, latents=(KING, NUMBERS, CYRILLIC, NOISE))
    found = explain(options)
    rows, scores, summary = found.rows(), whole(found), found.summary
    assert rows[KING]["explanation"] == 'the tokens [" king"]'
    assert rows[KING]["label"] == rows[KING]["explanation"] and rows[KING]["label_from"] == "model"
    assert rows[ENDINGS]["explanation"] is None and rows[ENDINGS]["label"] == rows[ENDINGS]["rule_words"]
    assert rows[ENDINGS]["label_from"] == "rule"
    assert rows[KING]["category"] == CATEGORIES[0] and summary["categories"] == {CATEGORIES[0]: 4}
    for latent in (NUMBERS, CYRILLIC):
        assert scores[latent, "detection", "windows"] == scores[latent, "fuzzing", "highlights"] == 1
    for latent in (KING, NUMBERS, CYRILLIC):
        assert scores[latent, "simulation", "top_only"] > 0.7
        assert scores[latent, "simulation", "top_and_random_activating"] > 0.7
    assert scores[KING, "detection", "windows"] is None, (
        "no window of a scoring document is silent: nothing to resist"
    )
    # What fires at random can be explained by no token: the judge names all that it saw, and is wrong about them.
    assert abs(scores[NOISE, "detection", "windows"]) < 0.5
    assert abs(scores[NOISE, "fuzzing", "highlights"]) < 0.7
    assert scores[NOISE, "simulation", "random_only_activating"] < 0.5
    assert scores[NUMBERS, "intruder", "marked"] is not None
    named = {(row["scorer"], row["variant"]): row for row in summary["scorers"]}
    for scorer in WORDS:
        for variant in VARIANTS[scorer]:
            assert named[scorer, variant]["malformed_share"] == 0
    deciles = [r for r in found.scores() if r["latent"] == CYRILLIC and r["scorer"] == "detection"]
    assert len(deciles) > 5 and {r["score"] for r in deciles} == {1.0}
    assert summary["judge"] is not None and summary["n_asked"] == 4 and summary["n_unexplained"] == 0

    n = server.n_requests
    again = explain(options.replace(out=tmp_path / "again"))
    assert server.n_requests == n, "every answer was kept"
    assert again.rows() == found.rows() and again.scores() == found.scores() and again.summary == summary
    assert explain(options).artifact.meta == found.artifact.meta
    page = found.page()
    assert "| fuzzing: highlights | 3 (1 undefined) |" in page and "0 is guessing, 1 is perfect" in page
    assert found.artifact.file("explanations.svg").read_text().startswith("<svg")
    assert "fuzzing: highlights" in found._repr_html_()
    assert labels(tmp_path / "out")[KING] == 'the tokens [" king"]'


@pytest.mark.parametrize("style", ["activations", "highlights"])
def test_both_styles_find_the_tokens(atlas: Planted, tmp_path: Path, server: JudgeServer, style: str) -> None:
    options = config(
        atlas.path,
        tmp_path / "out",
        server,
        latents=(KING,),
        style=style,
        show_deciles=True,
        scorers=["fuzzing"],
    )
    assert explain(options).rows()[KING]["explanation"] == 'the tokens [" king"]'


# -- no leaks -------------------------------------------------------------------------------------------


def _changed(atlas: Planted, path: Path, side: int) -> Path:
    """The atlas with every document of one side replaced: other tokens, other activations, at other places."""
    shutil.copytree(atlas.path, path)
    opened = open_atlas(path)
    keys = {row["id"]: row["key"] for row in opened.query("SELECT id, key FROM document_keys")}
    opened.close()
    documents = [i for i, key in keys.items() if side_of(key, 0.4, 0) == side]
    assert 20 < len(documents) < 100
    edit(
        path,
        (
            "UPDATE contexts SET token_ids = list_transform(token_ids, lambda t: (t * 7 + 3) % ?) "
            "WHERE id IN (SELECT unnest(?))",
            [len(ID), documents],
        ),
        (
            "UPDATE examples SET acts = list_transform(acts, lambda a: 5 * a + 1), position = start, rank = 99 - rank "
            "WHERE document IN (SELECT unnest(?))",
            [documents],
        ),
    )
    return path


def _sorted(questions: list[Question | SlotQuestion]) -> tuple[list[str], list[str]]:
    """What the judge was asked for explanations, and what for scores."""
    explaining, scoring = [], []
    for question in questions:
        text = question.text if isinstance(question, SlotQuestion) else json.dumps(question.messages)
        explains = any(
            s in text for s in ("what the neuron is looking for", "into categories", "have in common")
        )
        (explaining if explains else scoring).append(text)
    return sorted(explaining), sorted(scoring)


@pytest.mark.parametrize(
    ("style", "deciles"),
    [("activations", False), ("activations", True), ("highlights", False), ("highlights", True)],
)
def test_explaining_and_scoring_share_no_document(
    atlas: Planted, tmp_path: Path, server: JudgeServer, style: str, deciles: bool
) -> None:
    """With all scoring documents changed, explanation prompts are the same to the byte; and the other way round."""

    def asked(path: Path, name: str) -> tuple[list[str], list[str]]:
        judge = RuleJudge(explanation="some words")
        options = config(path, tmp_path / name, server, style=style, show_deciles=deciles, n_latents=7)
        found = explain(options, judge=judge)
        assert found.summary["n_asked"] == 7
        return _sorted(judge.asked)

    original = asked(atlas.path, "original")
    assert len(original[0]) > 2 * 7 and len(original[1]) > 10 * 7
    other_scores = asked(_changed(atlas, tmp_path / "scoring", SCORE), "changed scoring")
    assert other_scores[0] == original[0]
    assert len(set(other_scores[1]) & set(original[1])) <= 8, (
        "only those about the effect, which no document tells"
    )
    other_explains = asked(_changed(atlas, tmp_path / "explaining", EXPLAIN), "changed explaining")
    assert other_explains[1] == original[1]
    assert len(set(other_explains[0]) & set(original[0])) <= 8


def test_effects_texts_for_the_encoder_and_generation_share_no_document(
    atlas: Planted, tmp_path: Path, server: JudgeServer
) -> None:
    """What is known of context tokens, on both sides, is told for the explaining side alone."""
    changed = {side: _changed(atlas, tmp_path / f"changed {side}", side) for side in (EXPLAIN, SCORE)}

    def asked(path: Path) -> tuple[list[str], list[str], list[str]]:
        options = config(
            path, tmp_path / "x", server, scorers=["embedding", "generation"], dictionary="d", n_latents=7
        )
        opened = open_atlas(path)
        chosen = _choose(opened, options)
        opened.close()
        removals = {
            latent: {
                w.place: [(f"{w.tokens[w.peak]} of side {side}", 0.5)]
                for side in (EXPLAIN, SCORE)
                for w in chosen.examples.windows(latent, side)
            }
            for latent in chosen.latents
        }
        encoded: list[str] = []

        def encode(texts: Sequence[str]) -> np.ndarray:
            encoded.extend(texts)
            return np.ones((len(texts), 1), np.float32)

        judge = RuleJudge(explanation="some words")
        ask_about(chosen.latents, chosen.facts._replace(removals=removals), options, judge, encode)
        said = [json.dumps(q.messages) for q in judge.asked if isinstance(q, Question)]
        writing = sorted(text for text in said if "You write" in text)
        assert len(writing) == 7
        return sorted(text for text in said if "You write" not in text), sorted(encoded), writing

    original = asked(atlas.path)
    told = " ".join(original[0])
    assert "of side 0" in told and "of side 1" not in told and len(original[1]) > 7 * 10
    other_scores, other_explains = asked(changed[SCORE]), asked(changed[EXPLAIN])
    assert other_scores[0] == original[0] and other_scores[1] != original[1]
    assert other_explains[1] == original[1] and other_explains[0] != original[0]
    assert other_scores[2] == original[2] == other_explains[2], "texts are written from the words alone"


def test_clusters_are_named_without_the_scoring_side(
    atlas: Planted, tmp_path: Path, server: JudgeServer
) -> None:
    def asked(path: Path, name: str) -> list[str]:
        edit(
            path,
            ("UPDATE latents SET cluster = id % 2", []),
            ("INSERT INTO clusters VALUES (0, 'even', 5, []), (1, 'odd', 5, [])", []),
        )
        judge = RuleJudge()
        explain(config(path, tmp_path / name, server, n_latents=7, scorers=["fuzzing"]), judge=judge)
        questions = [json.dumps(q.messages) for q in judge.asked if isinstance(q, Question)]
        return sorted(text for text in questions if "what a group is about" in text)

    shutil.copytree(atlas.path, tmp_path / "same")
    original = asked(tmp_path / "same", "original")
    assert len(original) == 2 and "the tokens" in original[0]
    assert asked(_changed(atlas, tmp_path / "scoring", SCORE), "changed scoring") == original
    assert asked(_changed(atlas, tmp_path / "explaining", EXPLAIN), "changed explaining") != original


def test_removals_are_told_of_the_explaining_side_alone(
    atlas: Planted, tmp_path: Path, server: JudgeServer
) -> None:
    """From the table of effects to the prompt: each example is given a token that says which side it is of."""
    marks = {EXPLAIN: " x", SCORE: "%"}
    opened = open_atlas(atlas.path)
    rows = opened.query(
        "SELECT e.latent, rank, context, position, key FROM examples e JOIN document_keys k ON k.id = document "
        "WHERE kind = 'top'"
    )
    fingerprint = opened.artifact.fingerprint
    opened.close()
    sides = [side_of(row.pop("key"), 0.4, 0) for row in rows]
    assert set(sides) == {EXPLAIN, SCORE}
    gone = [
        row | {"removed": 0, "token": ID[marks[side]], "act": 1.0, "act_without": 0.25}
        for row, side in zip(rows, sides, strict=True)
    ]
    with artifact.building(
        tmp_path / "effects",
        kind="effects",
        version=1,
        config=PlantedConfig(),
        parents={"atlas": fingerprint},
    ) as work:
        pq.write_table(pa.Table.from_pylist(gone), work.path / REMOVALS)
        pq.write_table(pa.Table.from_pylist(rows), work.path / EFFECTS)
    judge = RuleJudge()
    options = config(
        atlas.path, tmp_path / "out", server, n_latents=7, scorers=["fuzzing", "detection"],
        effects=tmp_path / "effects",
    )  # fmt: skip
    explain(options, judge=judge)
    said = [m.content for q in judge.asked if isinstance(q, Question) for m in q.messages]
    told = [text for text in said if f'without "{marks[EXPLAIN]}" the activation changes by -75%' in text]
    assert len(told) >= 6
    assert not [text for text in said if f'without "{marks[SCORE]}"' in text]


def test_windows_of_the_sides_share_no_document(atlas: Planted) -> None:
    opened = open_atlas(atlas.path)
    examples = read(opened, 0.4, 0)
    opened.close()
    for latent in range(examples.d_sae):
        shown, scored = examples.windows(latent, EXPLAIN), examples.windows(latent, SCORE)
        assert not {w.document for w in shown} & {w.document for w in scored}
        assert all(w.n_active == 0 for w in (*shown, *scored) if w.kind == "random")
        assert all(w.acts[w.peak] > 0 for w in (*shown, *scored) if w.kind != "random")
    king = examples.windows(KING, SCORE)
    assert all(w.tokens[i] == " king" for w in king for i, act in enumerate(w.acts) if act > 0)


# -- malformed answers ------------------------------------------------------------------------------------


def test_unreadable_answers_are_counted_and_score_nothing(atlas: Planted, tmp_path: Path) -> None:
    def chat(request: dict[str, Any]) -> str:
        explains = "what the neuron is looking for" in request["messages"][0]["content"]
        return "words" if explains else "I'd rather not."

    with JudgeServer(chat=chat, top=lambda *_: {"rather": -0.1}) as server:
        found = explain(config(atlas.path, tmp_path / "out", server, latents=(KING, NUMBERS)))
    for row in found.summary["scorers"]:
        if row["scorer"] in ASKING and row["mean"] is not None:
            assert row["malformed_share"] == 1 and row["mean"] == pytest.approx(0), row
    assert found.summary["categories"] == {"malformed": 2}
    assert found.rows()[KING]["label"] == "“ king”", "words that score nothing are no label"
    assert "| 100.0% |" in found.page()


def test_a_latent_without_an_explanation_scores_as_a_guess(atlas: Planted, tmp_path: Path) -> None:
    with JudgeServer(chat=lambda request: "") as server:
        found = explain(config(atlas.path, tmp_path / "out", server, latents=(KING, NUMBERS)))
    assert found.summary["n_unexplained"] == 2
    scores = {(r["latent"], r["scorer"], r["variant"]): r for r in found.scores() if r["decile"] is None}
    for scorer in ("detection", "fuzzing", "simulation"):
        for variant in VARIANTS[scorer]:
            row = scores[KING, scorer, variant]
            assert (row["score"], row["n"], row["n_malformed"]) == (0, 1, 1)
    opened = open_atlas(atlas.path)
    windows = read(opened, 0.4, 0).windows(NUMBERS, SCORE)
    opened.close()
    there = {w.decile for w in windows if w.kind == "decile"}
    deciles = [r for r in found.scores() if r["latent"] == NUMBERS and r["scorer"] == "detection"]
    assert {r["decile"] for r in deciles} == {None, *there} and len(there) > 3
    assert {(r["score"], r["n_malformed"]) for r in deciles} == {(0, 1)}


# -- clusters, generation, embedding ------------------------------------------------------------------------


def test_clusters_are_explained_from_their_members(
    atlas: Planted, tmp_path: Path, server: JudgeServer
) -> None:
    path = tmp_path / "atlas"
    shutil.copytree(atlas.path, path)
    edit(
        path,
        ("UPDATE latents SET cluster = id % 2 WHERE id < 6", []),
        ("INSERT INTO clusters VALUES (0, 'even', 3, []), (1, 'odd', 3, []), (2, 'empty', 0, [])", []),
    )
    asked = explain(config(path, tmp_path / "out", server, latents=(KING, NUMBERS), scorers=["fuzzing"]))
    rows = pq.read_table(asked.artifact.file("clusters.parquet")).to_pylist()
    assert rows[0] == {
        "cluster": 0, "label": "even", "explanation": "things of one kind", "n_latents": 3, "n_shown": 2,
    }  # fmt: skip
    assert rows[1]["explanation"] is None and rows[1]["n_shown"] == 0 and rows[2]["explanation"] is None
    assert asked.summary["clusters"] == {"n_asked": 1, "n_unexplained": 0}
    with JudgeServer(chat=lambda request: "") as silent:
        options = config(
            path, tmp_path / "silent", silent, latents=(KING,), scorers=["fuzzing"],
            explainer={"answers": tmp_path / "silent.sqlite"},
        )  # fmt: skip
        assert explain(options).summary["clusters"] == {"n_asked": 0, "n_unexplained": 0}, "nothing to ask of"

    def chat(request: dict[str, Any]) -> str:
        return "" if "one group" in request["messages"][-1]["content"] else rule_judge.chat(request)

    with JudgeServer(chat=chat, top=rule_judge.top) as mute:
        made = explain(
            config(
                path, tmp_path / "mute", mute, latents=(KING, NUMBERS), scorers=["fuzzing"],
                explainer={"answers": tmp_path / "mute.sqlite"},
            )
        )  # fmt: skip
    assert made.summary["clusters"] == {"n_asked": 1, "n_unexplained": 1}
    assert "It was asked about 1 clusters; 1 of those answers could not be read." in made.page()
    by_rule = explain(ExplainConfig(atlas=path, out=tmp_path / "rules", n_bootstrap=10))
    rows = pq.read_table(by_rule.artifact.file("clusters.parquet")).to_pylist()
    assert "a number" in rows[0]["explanation"] and "Cyrillic letters" in rows[1]["explanation"]


def test_written_texts_are_run_through_model_and_dictionary(tmp_path: Path, server: JudgeServer) -> None:
    world = make_world(tmp_path)
    nulls = ("random_directions", "randomised")
    options = world.config("atlas", n_top=20, n_random=10, n_decile=3, nulls=nulls, n_fit_rows=500)
    atlas = interpret(options, lm=world.lm)
    reader = Reader(atlas, world.dictionary, world.model)
    texts = ["the river runs past the old town", "der Fluss", "", "12", "salt and apples " * 40]
    found = reader.largest(texts, [5, 3, 40])
    dictionary = dictionaries.load(world.dictionary)
    for i, text in enumerate(texts):
        ids = world.lm.tokenizer(text, add_special_tokens=False)["input_ids"][:32]
        if len(ids) < 2:
            assert not found[i].any()
            continue
        x = world.lm.capture(torch.tensor([ids]), "resid_post.0")["resid_post.0"][0, 1:]
        dense = dictionary.encode(x.to(torch.bfloat16).float()).to_dense().abs().max(0).values
        np.testing.assert_allclose(found[i], dense[[5, 3, 40]].detach().numpy(), rtol=2e-2, atol=1e-3)
    options = config(
        tmp_path / "atlas", tmp_path / "out", server, n_latents=6, scorers=["generation"], dictionary=world.dictionary,
        subject=world.model,
    )  # fmt: skip
    made = explain(options)
    scores = made.scores()
    rows = [r for r in scores if r["scorer"] == "generation"]
    assert {r["variant"] for r in rows} == {"auroc", "activation"} and len(rows) == 12
    lifts = {row["variant"]: row for row in made.summary["lifts"] if row["scorer"] == "generation"}
    assert set(lifts) == {"auroc", "activation"} and set(lifts["auroc"]["nulls"]) == set(nulls)
    for null, model in ((nulls[0], world.lm), (nulls[1], None)):
        folder = tmp_path / "atlas" / f"null-{null}"
        with closing(open_atlas(folder)) as of_null:
            reads = Reader(of_null, folder / "dictionary", world.model)
        dictionary = dictionaries.load(folder / "dictionary")
        ids = torch.tensor([world.lm.tokenizer(texts[0], add_special_tokens=False)["input_ids"]])
        assert (reads.lm.fingerprint == world.lm.fingerprint) == (model is not None), "a shuffled model"
        x = (model or reads.lm).capture(ids, "resid_post.0")["resid_post.0"][0, 1:]
        dense = dictionary.encode(x.to(torch.bfloat16).float()).to_dense().abs().max(0).values
        np.testing.assert_allclose(
            reads.largest(texts[:1], [5, 3])[0], dense[[5, 3]].detach(), rtol=2e-2, atol=1e-3
        )
    shutil.copytree(tmp_path / "atlas" / "null-randomised", tmp_path / "null-same")
    shutil.rmtree(tmp_path / "null-same" / "dictionary")
    meta = json.loads((tmp_path / "null-same" / "meta.json").read_text())
    meta["files"] = {name: file for name, file in meta["files"].items() if "/" not in name}
    (tmp_path / "null-same" / "meta.json").write_text(json.dumps(meta))
    beside = explain(options.replace(nulls=(tmp_path / "null-same",)))
    assert "| no null (no dictionary in null-same, of an earlier version) |" in beside.page()
    assert {row["scorer"] for row in beside.summary["lifts"]} == {"lexical"}
    assert np.mean([r["score"] for r in rows if r["variant"] == "auroc"]) > 0.3, "its own tokens make it fire"
    other = dictionaries.load(world.dictionary)
    with torch.no_grad():
        other.W_dec.mul_(2)  # type: ignore[operator, union-attr]
    other.save(tmp_path / "other", torch.randn(64, 32), extra={"policy": None, "store": {}})
    with pytest.raises(MismatchError, match=r"the dictionary must be the atlas's .*Pass the dictionary that"):
        Reader(atlas, tmp_path / "other", world.model)
    atlas.close()


def test_a_latent_without_texts_harms_no_other(atlas: Planted) -> None:
    """Nothing is written for the second of three: the third is held against the first, and scores as it would."""
    with closing(open_atlas(atlas.path)) as opened:
        examples = read(opened, 0.4, 0)
        sql = "SELECT max(list_max(acts)) AS most FROM examples GROUP BY latent ORDER BY latent"
        most = [row["most"] for row in opened.query(sql)]

    class Known(Reader):
        """Texts fire at 3 of 4 for the latent they name, at 1 of 4 for others."""

        def __init__(self) -> None:
            pass

        def largest(self, texts: Sequence[str], latents: Sequence[int]) -> np.ndarray:
            return np.array(
                [[most[j] * (0.75 if f"for {j}" in text else 0.25) for j in latents] for text in texts]
            )

    def written(latent: int) -> Found:
        return Found(latent, "words", texts=tuple(f"text {i} for {latent}" for i in range(5)))

    found = _with_generation([written(0), Found(1, "words"), written(2)], Known(), examples)
    scores = {(one.latent, s.variant): s.score for one in found for s in one.scores}
    for latent in (0, 2):
        assert scores[latent, "auroc"] == 1 and scores[latent, "activation"] == pytest.approx(0.5)
    assert scores[1, "auroc"] == scores[1, "activation"] == 0


@pytest.mark.model
def test_the_sentence_encoder_scores_rules_without_asking_anybody(atlas: Planted, tmp_path: Path) -> None:
    found = explain(
        ExplainConfig(
            atlas=atlas.path, out=tmp_path / "out", scorers=("embedding",), n_latents=6, n_bootstrap=20
        )
    )
    rows = [r for r in found.scores() if r["scorer"] == "embedding"]
    assert len({r["latent"] for r in rows}) == 6 and {r["decile"] for r in rows} == {None, *range(10)}
    assert found.summary["judge"] is None and found.summary["n_asked"] == 0
    from sememe.lm import sentence_encoder

    encode = sentence_encoder()
    one = encode(["a cat", "the kitten sleeps", "the stock market fell"])
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, rtol=1e-5)
    stored = pq.read_table(found.artifact.file("embeddings.parquet"))
    named = found.labels()
    assert stored["latent"].to_pylist() == sorted(named)
    expected = encode([named[latent] for latent in sorted(named)])
    np.testing.assert_allclose(np.array(stored["vector"].to_pylist()), expected, atol=1e-5)
    assert one[0] @ one[1] > 0.4 > 0.25 > one[0] @ one[2]
    np.testing.assert_allclose(encode(["a cat"])[0], one[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.model
def test_a_real_local_model(atlas: Planted, tmp_path: Path) -> None:
    options = ExplainConfig.build(
        {
            "atlas": atlas.path, "out": tmp_path / "out", "n_latents": 1, "scorers": ("simulation", "fuzzing"),
            "n_bootstrap": 10, "explainer": {"kind": "local", "answers": tmp_path / "answers.sqlite"},
        }
    )  # fmt: skip
    found = explain(options)
    assert sum(row["explanation"] is not None for row in found.rows()) == 1
    rows = {(r["scorer"], r["variant"]): r for r in found.scores() if r["decile"] is None}
    simulated = rows["simulation", "top_only"]
    assert simulated["n_malformed"] == 0 and -1 <= simulated["score"] <= 1
    assert rows["fuzzing", "highlights"]["n"] >= 5


def test_one_latents_effect_is_held_against_all_others(
    atlas: Planted, tmp_path: Path, server: JudgeServer
) -> None:
    """Whoever is asked about beside it, the same tokens are asked about; none of them was shown to an explainer."""

    def about_effect(name: str, *latents: int) -> tuple[list[dict[str, Any]], list[str]]:
        judge = RuleJudge()
        options = config(atlas.path, tmp_path / name, server, latents=latents, scorers=["effect"])
        scores = [r for r in explain(options, judge=judge).scores() if r["scorer"] == "effect"]
        said = [q.messages[-1].content for q in judge.asked if isinstance(q, Question)]
        return scores, said

    many, said = about_effect("many", *range(10))
    listed = [t for text in said for t in re.findall(r"^\d+\. '(.*)'$", text, re.M)]
    shown = [t for text in said if "Less likely" in text for t in re.findall(r'"(.*?)"[,\n]', text)]
    assert listed and shown and not {t.strip() for t in listed} & {t.strip() for t in shown}
    defined = [r["latent"] for r in many if r["score"] is not None]
    assert len(many) == 10 and len(defined) > 2
    alone, _ = about_effect("alone", defined[0])
    assert alone == [r for r in many if r["latent"] == defined[0]] and alone[0]["n"] >= 2


def test_a_tuned_lens_adds_nothing_to_what_is_asked(
    atlas: Planted, tmp_path: Path, server: JudgeServer
) -> None:
    """Nulls' atlases never have one, so latents read through one would not be treated alike."""
    path = tmp_path / "atlas"
    shutil.copytree(atlas.path, path)
    edit(path, (TUNED, []))
    options = config(path, tmp_path / "out", server, scorers=["effect"], n_latents=7)
    facts = []
    for of in (options, options.replace(atlas=atlas.path)):
        with closing(open_atlas(of.atlas)) as opened:
            facts.append(_choose(opened, of).facts)
    tuned, plain = facts
    assert tuned.promoted == plain.promoted and {len(words) for words in tuned.promoted.values()} == {4}
    assert tuned.demoted == plain.demoted and tuned.others == plain.others


def test_explanations_of_a_model_reach_the_browser(
    atlas: Planted, tmp_path: Path, server: JudgeServer
) -> None:
    explain(config(atlas.path, tmp_path / "out", server, latents=(CYRILLIC,), scorers=["fuzzing"]))
    opened = open_atlas(atlas.path, explanations=tmp_path / "out")
    rows = opened.query(f"SELECT label, label_from, category FROM explanations WHERE latent = {CYRILLIC}")
    opened.close()
    assert rows[0].pop("label").startswith("the tokens [")
    assert rows == [{"label_from": "model", "category": CATEGORIES[0]}]


def test_an_explainer_is_told_which_tokens_an_activation_depends_on(
    tmp_path: Path, server: JudgeServer
) -> None:
    world = make_world(tmp_path)
    interpret(world.config("atlas", n_top=20, n_random=10, n_decile=3), lm=world.lm).close()
    out = tmp_path / "effects"
    about = {"dictionary": world.dictionary, "model": world.model, "n_removals": 20, "n_latents": 48}
    effects(EffectsConfig.build({"atlas": tmp_path / "atlas", "out": out} | about))
    judge = RuleJudge(explanation="words")
    options = config(
        tmp_path / "atlas",
        tmp_path / "out",
        server,
        n_latents=6,
        scorers=["fuzzing"],
        effects=tmp_path / "effects",
    )
    found = explain(options, judge=judge)
    opened = open_atlas(tmp_path / "atlas", effects=out)
    told = 0
    for question in judge.asked:
        assert isinstance(question, Question)
        for line in question.messages[-1].content.splitlines():
            if match := re.fullmatch(
                r'In text \d+, without "(.*)" the activation changes by ([+-]\d+)%\.', line
            ):
                told += 1
                low, high = (float(match[2]) + d for d in (-0.51, 0.51))
                sql = "SELECT count(*) AS n FROM removals WHERE 100 * (act_without / act - 1) BETWEEN ? AND ?"
                assert opened.query(sql, low, high)[0]["n"] > 0 and abs(float(match[2])) >= 10
    opened.close()
    shutil.copytree(tmp_path / "atlas", tmp_path / "null-same")
    again = explain(options.replace(nulls=(tmp_path / "null-same",)), judge=judge)
    assert {row["scorer"] for row in again.summary["lifts"]} == {"lexical"}, "a null's explainer is told less"
    row = next(line for line in again.page().splitlines() if line.startswith("| fuzzing: highlights |"))
    assert "| no null (the nulls' explainer is not told effects) |" in row
    assert told >= 1 and "effects" in found.artifact.meta["parents"]
