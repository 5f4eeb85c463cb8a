"""Runs of `explain` with a language model: beside nulls, previewed, stopped, refused, and told what cannot be."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import rule_judge
from explain_world import DEAD, WORDS, config
from judge_server import JudgeServer, Reply
from planted_atlas import Planted, edit, plant
from rule_judge import RuleJudge

from sememe.cli import app
from sememe.errors import ConfigError, JudgeError, LimitError, TextError
from sememe.explain import ExplainConfig, explain, preview


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted") / "atlas")


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(chat=rule_judge.chat, top=rule_judge.top) as running:
        yield running


# -- nulls -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_nulls(atlas: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An atlas with two nulls inside: its latents' windows with activations at other, arbitrary places."""
    path = tmp_path_factory.mktemp("nulls") / "atlas"
    shutil.copytree(atlas.path, path)
    for i, name in enumerate(("null-early", "null-late")):
        shutil.copytree(atlas.path, path / name)
        edit(
            path / name,
            (
                "UPDATE examples SET positions = [start + ?], acts = [1.0], position = start + ? "
                "WHERE kind <> 'random'",
                [i + 2, i + 2],
            ),
        )
        meta = json.loads((path / name / "meta.json").read_text())
        meta["fingerprint"] = f"{i}" * 64
        (path / name / "meta.json").write_text(json.dumps(meta))
    return path


def test_the_lift_over_the_best_null_is_reported_for_every_scorer(
    with_nulls: Path, tmp_path: Path, server: JudgeServer
) -> None:
    options = config(with_nulls, tmp_path / "out", server, n_latents=5, scorers=["detection", "fuzzing"])
    found = explain(options)
    lifts = {(row["scorer"], row["variant"]): row for row in found.summary["lifts"]}
    for key in (("lexical", "score"), ("detection", "windows"), ("fuzzing", "highlights")):
        row = lifts[key]
        assert set(row["nulls"]) == {"early", "late"} and row["low"] <= row["lift"] <= row["high"]
        best = max(null["mean"] for null in row["nulls"].values())
        own = next(r["mean"] for r in found.summary["scorers"] if (r["scorer"], r["variant"]) == key)
        assert row["lift"] == pytest.approx(own - best)
    assert lifts["lexical", "score"]["low"] > 0.2 and lifts["fuzzing", "highlights"]["low"] > 0
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"out", "out-null-early", "out-null-late"}
    null = pq.read_table(tmp_path / "out-null-late" / "scores.parquet")
    assert set(null["scorer"].to_pylist()) == {"lexical", "detection", "fuzzing"}
    header = next(line for line in found.page().splitlines() if line.startswith("| score | latents"))
    assert header == "| score | latents | dictionary | early | late | lift | malformed |"
    n = server.n_requests
    explain(options.replace(out=tmp_path / "other"))
    assert server.n_requests == n
    # One null alone, by name; and none.
    one = explain(options.replace(nulls=(with_nulls / "null-late",), out=tmp_path / "one"))
    assert {name for row in one.summary["lifts"] for name in row["nulls"]} == {"late"}
    assert explain(options.replace(nulls=(), out=tmp_path / "none")).summary["lifts"] == []


def test_a_null_that_comes_later_is_scored_and_nothing_else_is_made_again(
    with_nulls: Path, tmp_path: Path, server: JudgeServer
) -> None:
    options = config(with_nulls, tmp_path / "out", server, n_latents=5, scorers=["fuzzing"])
    both = explain(options.replace(out=tmp_path / "both"))
    first = explain(options.replace(nulls=(with_nulls / "null-early",)))
    tables = {name: first.artifact.meta["files"][name] for name in ("explanations.parquet", "scores.parquet")}
    judge = RuleJudge()
    judge.name, judge.fingerprint = "rule", "other"
    later = explain(options, judge=judge)
    n_null = len(judge.asked)
    assert n_null > 0, "the null that was not there before"
    assert {name for row in later.summary["lifts"] for name in row["nulls"]} == {"early", "late"}
    assert later.summary == both.summary and later.page() == both.page()
    assert tables.items() <= later.artifact.meta["files"].items()
    assert later.artifact.identity == first.artifact.identity
    meta = later.artifact.meta
    assert explain(options, judge=judge).artifact.meta == meta and len(judge.asked) == n_null
    none = explain(options.replace(nulls=()), judge=judge)
    assert none.summary["lifts"] == [] and "| lift |" not in none.page() and len(judge.asked) == n_null
    assert none.rows() == later.rows() and none.scores() == later.scores()
    again = explain(options)
    assert again.summary == both.summary


def test_rules_alone_are_held_against_nulls_too(with_nulls: Path, tmp_path: Path, capsys: Any) -> None:
    app(
        ["explain", str(with_nulls), "--out", str(tmp_path / "out"), "--n-bootstrap", "50"],
        result_action="return_value",
    )
    said = capsys.readouterr().out
    assert "| lexical: score |" in said and "| lift |" in said and "explanations: " in said
    with pytest.raises(ConfigError, match="must have different folder names, got null-late null-late"):
        explain(
            ExplainConfig(
                atlas=with_nulls, out=tmp_path / "x", nulls=(with_nulls / "null-late", tmp_path / "null-late")
            )
        )


# -- what it costs, stopping and going on ------------------------------------------------------------------


def test_a_dry_run_asks_nothing_and_foretells_the_calls(
    with_nulls: Path, tmp_path: Path, server: JudgeServer, capsys: Any
) -> None:
    options = config(
        with_nulls,
        tmp_path / "out",
        server,
        n_latents=3,
        explainer={"prompt_price": 1.0, "completion_price": 2.0},
    )
    cost = preview(options)
    assert server.n_requests == 0 and not (tmp_path / "out").exists()
    exact = preview(
        options.replace(scorers=tuple(s for s in options.used_scorers if s != "simulation"))
    ).n_calls
    assert cost.n_calls > 100 and cost.n_from_cache < 20 and cost.price is not None and cost.price > 0
    explain(options)
    # At most: a server whose tokenizer splits digits would be asked once more for every slot of a simulation.
    assert exact < server.n_requests <= cost.n_calls
    assert preview(options).n_calls == 0, "all is known now"
    flags = [
        "--explainer",
        "endpoint",
        "--base-url",
        server.url,
        "--model",
        "rule",
        "--n-latents",
        "2",
        "--dry-run",
    ]
    out = ["--out", str(tmp_path / "cli"), "--answers", str(tmp_path / "none.sqlite")]
    app(["explain", str(with_nulls), *flags, *out], result_action="return_value")
    said = capsys.readouterr().out
    assert "calls, up to" in said and "price not known" in said and not (tmp_path / "cli").exists()
    with pytest.raises(
        ConfigError, match="preview of the cost needs a language model as explainer, got lexical"
    ):
        preview(ExplainConfig(atlas=with_nulls))


def test_a_dry_run_counts_the_questions_about_clusters_too(
    with_nulls: Path, tmp_path: Path, server: JudgeServer
) -> None:
    """Of the atlas and of each null: one for every cluster with a member that is explained."""
    path = tmp_path / "atlas"
    shutil.copytree(with_nulls, path)
    for one in (path, *path.glob("null-*")):
        edit(
            one,
            ("UPDATE latents SET cluster = id % 2", []),
            ("INSERT INTO clusters VALUES (0, 'even', 3, []), (1, 'odd', 3, [])", []),
        )
    options = config(path, tmp_path / "out", server, n_latents=4, scorers=["fuzzing"])
    cost = preview(options)
    plain = preview(options.replace(atlas=with_nulls)).n_calls
    assert plain < cost.n_calls <= plain + 6
    found = explain(options)
    assert found.summary["clusters"]["n_asked"] == 2
    assert plain < server.n_requests <= cost.n_calls


def test_a_run_that_was_stopped_goes_on_and_ends_the_same(
    atlas: Planted, tmp_path: Path, server: JudgeServer
) -> None:
    options = config(atlas.path, tmp_path / "out", server, n_latents=4)
    n_whole = preview(options).n_calls
    stopped = config(atlas.path, tmp_path / "out", server, n_latents=4, explainer={"max_calls": 40})
    with pytest.raises(LimitError, match="raise the limit and run again"):
        explain(stopped)
    assert server.n_requests == 40 and not (tmp_path / "out").exists()
    found = explain(options)
    assert server.n_requests <= n_whole + 3, "what was answered was not asked again"
    with JudgeServer(chat=rule_judge.chat, top=rule_judge.top) as fresh:
        once = config(
            atlas.path, tmp_path / "once", fresh, n_latents=4, explainer={"answers": tmp_path / "o.sqlite"}
        )
        assert explain(once).scores() == found.scores()


def test_ctrl_c_loses_no_answer(atlas: Planted, tmp_path: Path) -> None:
    calls = itertools.count(1)

    def interrupting(request: dict[str, Any]) -> str:
        if next(calls) == 20:  # two come at the same time: a length would be looked at too late
            os.kill(os.getpid(), signal.SIGINT)
        return rule_judge.chat(request)

    with JudgeServer(chat=interrupting, top=rule_judge.top) as server:
        options = config(
            atlas.path, tmp_path / "out", server, n_latents=4, scorers=["fuzzing", "detection"],
            explainer={"concurrency": 2},
        )  # fmt: skip
        n_whole = preview(options).n_calls
        with pytest.raises(KeyboardInterrupt):
            explain(options)
        assert 20 <= server.n_requests <= 22 < n_whole and not (tmp_path / "out").exists()
        explain(options)
        assert server.n_requests <= n_whole + 3, "but for those under way, nothing was asked again"


def test_a_server_that_refuses_leaves_nothing_half_written(atlas: Planted, tmp_path: Path) -> None:
    script = [None] * 5 + [Reply(401)]
    with (
        JudgeServer(chat=rule_judge.chat, top=rule_judge.top, script=script) as server,
        pytest.raises(JudgeError),
    ):
        explain(config(atlas.path, tmp_path / "out", server, n_latents=4))
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name and not p.name.endswith(".lock")] == []


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"scorers": ("detection",)},
            "scorers that ask a language model need one as explainer, got detection with",
        ),
        ({"style": "highlights"}, "style must be left out when explainer is lexical"),
        ({"show_deciles": True}, "show_deciles must be left out when explainer is lexical"),
        ({"n_latents": 5}, "n_latents must be left out when rules alone are scored"),
        ({"latents": (1,)}, "latents must be left out when rules alone are scored"),
        ({"scorers": ("embedding",), "latents": (1, 1)}, "latents must be different numbers from 0, got 1 1"),
        (
            {"scorers": ("embedding",), "latents": (1,), "n_latents": 3},
            "n_latents must be left out when latents are",
        ),
        ({"dictionary": "d"}, "dictionary must be left out when generation is not among the scorers"),
        ({"subject": {"model": "m"}}, "must be left out without the scorer generation"),
        (
            {"explainer": {"kind": "endpoint"}, "scorers": ("generation",)},
            "the scorer generation needs the dictionary, got none",
        ),
        (
            {
                "explainer": {"kind": "endpoint"},
                "scorers": ("generation",),
                "dictionary": "d",
                "latents": (3,),
            },
            "the scorer generation needs two latents or more: .*, got 1. Name more latents",
        ),
        ({"explainer": {"kind": "oracle"}}, "explainer must be one of"),
    ],
)
def test_options_without_effect_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExplainConfig.build(options)


def test_latents_that_are_not_there(atlas: Planted, tmp_path: Path, server: JudgeServer) -> None:
    with pytest.raises(
        ConfigError, match="latents must be numbers below 10, the latents of the atlas, got 10 99"
    ):
        explain(config(atlas.path, tmp_path / "out", server, latents=(1, 10, 99)))
    dead = explain(config(atlas.path, tmp_path / "dead", server, latents=(DEAD,)))
    assert dead.rows()[DEAD]["label"] is None
    scores = {r["scorer"]: r["score"] for r in dead.scores() if r["latent"] == DEAD and r["decile"] is None}
    assert set(scores) == set(WORDS), "what is not defined is counted"
    assert all(scores[scorer] is None for scorer in ("simulation", "detection", "fuzzing", "intruder"))
    undefined = {r["scorer"]: r["n_undefined"] for r in dead.summary["scorers"] if r["scorer"] != "lexical"}
    assert all(undefined[scorer] == 1 for scorer in ("detection", "fuzzing", "intruder"))


def test_an_atlas_without_silent_windows(tmp_path: Path, server: JudgeServer) -> None:
    path = plant(tmp_path / "atlas").path
    edit(path, ("DELETE FROM examples WHERE kind = 'random'", []))
    with pytest.raises(
        TextError, match=r"a silent one to score on, got none that has\. Make the atlas with larger"
    ):
        explain(config(path, tmp_path / "out", server))
