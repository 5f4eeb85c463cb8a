"""Published numbers beside ours: where a number is, what a claim is worth, what stands where nothing was measured."""

import json

import numpy as np
import pytest

from sememe import artifact
from sememe.errors import ConfigError
from sememe.patch.verb import _statistic
from sememe.results import ResultsConfig, results
from sememe.results.numbers import NEVER, NOT_ALWAYS

REPORT = {
    "metrics": {
        "l0": {"value": 9.5, "low": 9.0, "high": 10.0},
        "rmse": {"value": 0.5},
        "kl": {"value": None, "cause": "no predictions"},
        "n_never": {"value": None, "low": None, "high": None, "cause": "never reached"},
        "n_mostly": {"value": None, "low": 40.0, "high": None, "cause": "never reached"},
        "n_half": {"value": 50.0, "low": 30.0, "high": None, "cause": "not reached in 40% of the draws"},
        "n_100": {"value": 100.0, "low": 90.0, "high": 110.0},
        "n_20": {"value": 20.0, "low": 10.0, "high": 25.0},
    },
    "rows": [
        {"name": "a/b", "penalty": 0.1, "recall": 0.5, "score": {"mean": 0.25, "low": 0.2, "high": 0.3}},
        {"name": "c", "penalty": 1.0, "recall": 0.75, "score": {"mean": 0.5, "low": 0.28, "high": 0.6}},
        {"name": "d", "penalty": 10.0, "recall": 0.25, "score": {"mean": 0.1, "low": 0.05, "high": 0.15}},
    ],
    "plain": 3,
}


@pytest.fixture
def base(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(json.dumps(REPORT))
    return tmp_path


def made(base, **options):
    config = ResultsConfig.build({"base": base, "out": base / "results", "title": "A paper", **options})
    found = results(config)
    return json.loads((found.path / "results.json").read_text()), found


def table(*values, at="", published=(), file="report/report.json"):
    columns = [{"name": f"column {n}", "value": value} for n, value in enumerate(values)]
    rows = [{"name": "row", "at": at, "published": published}]
    return {"title": "Table 1", "source": "page 2", "file": file, "columns": columns, "rows": rows}


def claim(relation, *values, **more):
    return {"claim": f"it is {relation}", "relation": relation, "values": values, **more}


def test_numbers_are_found_where_their_paths_say(base):
    paths = {
        "metrics/l0": 9.5,
        "plain": 3,
        "rows/1/recall": 0.75,
        "rows/-1/penalty": 10,
        "rows/name=a~1b/recall": 0.5,
        "rows/penalty=1/score": 0.5,
        "rows/max:recall/penalty": 1,
        "rows/min:recall/penalty": 10,
        "rows/mean:recall": 0.5,
        "report/report.json#rows/name={at}/score": 0.5,
    }
    drawn = {"plot": True, **table(*paths, at="c", published=[9.951, "", "three", *[""] * 7])}
    data, found = made(base, tables=[drawn])
    here = data["tables"][0]["rows"][0]["here"]
    assert [cell["value"] for cell in here] == pytest.approx(list(paths.values()))
    assert (here[0]["low"], here[0]["high"]) == (9.0, 10.0) and data["n_missing"] == 0
    assert "column 9" in (found.path / "table-0.svg").read_text()
    page = (found.path / "results.html").read_text()
    for said in ("A paper", "Table 1", "9.951", "three", "9 to 10", "Published in: page 2"):
        assert said in page, said
    assert "| row | 9.951 | 9.5 (9 to 10) | 3 |" in (found.path / "results.md").read_text()


def test_what_is_written_breaks_its_lines(base):
    settings = [{"what": "model", "published": "theirs", "here": "ours"}]
    _, found = made(base, settings=settings, claims=[claim("above", "report/report.json#plain", than=1.0)])
    page = (found.path / "results.html").read_text()
    assert page.count("<div class='written'><div class='wide'><table>") == 2, "settings and claims"
    assert ".written th, .written td { white-space: normal" in page


def test_what_is_not_there_says_why_and_is_not_guessed(base):
    paths = {
        "metrics/l9": "no l9; Known: l0, rmse",
        "metrics/kl": "no predictions",
        "rows/7/recall": "only 3 entries",
        "rows/name=z/recall": "no entry with name=z",
        "rows/max:speed/penalty": "no entry has speed",
        "plain/x": "nothing below x",
        "rows": "is no number",
        "report/other.json#x": "no report/other.json",
        "atlas/none#SELECT 1": "must be a finished atlas",
    }
    data, found = made(base, tables=[table(*paths)])
    for cell, cause in zip(data["tables"][0]["rows"][0]["here"], paths.values(), strict=True):
        assert cell["value"] is None and cause in cell["cause"]
    assert data["n_missing"] == len(paths)
    assert f"{len(paths)} numbers are missing" in (found.path / "results.md").read_text()


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        (claim("above", "rows/1/recall", "rows/0/recall"), "holds"),
        (claim("above", "rows/0/recall", "rows/1/recall"), "does not hold"),
        (claim("below", "rows/0/recall", "rows/1/recall"), "holds"),
        (claim("above", "rows/1/score", "rows/0/score"), "undecided"),
        (claim("above", "rows/1/score", "rows/2/score"), "holds"),
        (claim("above", "metrics/l0", than=9.4), "undecided"),
        (claim("above", "metrics/l0", than=8.0), "holds"),
        (claim("below", "metrics/l0", than=8.0), "does not hold"),
        (claim("near", "metrics/rmse", than=0.6, within=0.2), "holds"),
        (claim("near", "metrics/rmse", than=0.9, within=0.2), "does not hold"),
        (claim("rising", "rows/0/penalty", "rows/1/penalty", "rows/2/penalty"), "holds"),
        (claim("falling", "rows/0/penalty", "rows/1/penalty", "rows/2/penalty"), "does not hold"),
        (claim("rising", "plain", "plain", "plain"), "does not hold"),
        (claim("above", "metrics/kl", than=0.0), "not measured"),
        (claim("below", "metrics/n_never", "metrics/kl"), "not measured"),
        (claim("below", "metrics/n_never", "metrics/n_100"), "does not hold"),
        (claim("below", "metrics/n_100", "metrics/n_never"), "holds"),
        (claim("above", "metrics/n_never", than=7.0), "holds"),
        (claim("near", "metrics/n_never", than=7.0, within=1.0), "does not hold"),
        (claim("below", "metrics/n_never", "metrics/n_never"), "undecided"),
        (claim("below", "metrics/n_mostly", "metrics/n_100"), "undecided"),
        (claim("below", "metrics/n_mostly", "metrics/n_20"), "does not hold"),
        (claim("below", "metrics/n_half", "metrics/n_100"), "undecided"),
        (claim("above", "metrics/n_half", "metrics/n_20"), "holds"),
        (claim("falling", "metrics/n_never", "metrics/n_100", "metrics/n_20"), "holds"),
        (claim("falling", "metrics/n_20", "metrics/n_100", "metrics/n_never"), "does not hold"),
    ],
)
def test_claims_hold_or_do_not(base, said, verdict):
    said = said | {"values": [f"report/report.json#{value}" for value in said["values"]]}
    data, found = made(base, claims=[said])
    assert data["claims"][0]["verdict"] == verdict
    assert found.extra["verdicts"] == {said["claim"]: verdict}
    assert verdict in (found.path / "results.md").read_text()


def test_a_choice_is_the_option_with_the_largest_number(base):
    among = {"0.001": "rows/0/recall", "0.003": "rows/1/recall", "0.01": "rows/2/recall"}
    among = {option: f"report/report.json#{path}" for option, path in among.items()}
    choices = [
        {"name": "best", "among": among},
        {"name": "none", "among": among | {"0.1": "report/report.json#x"}},
    ]
    columns = table("CHOICE#best", "CHOICE#none")
    said = [
        claim("apart", "CHOICE#best", than=0.001, within=1e-6),
        claim("near", "CHOICE#best", than=0.003, within=1e-6),
        claim("apart", "CHOICE#best", than=0.003, within=1e-6) | {"claim": "it moves"},
    ]
    data, _ = made(base, tables=[columns], choices=choices, claims=said)
    best, none = data["tables"][0]["rows"][0]["here"]
    assert best == {"value": 0.003} and none["value"] is None and none["cause"].startswith("0.1: no x")
    assert [one["verdict"] for one in data["claims"]] == ["holds", "holds", "does not hold"]
    with pytest.raises(ConfigError, match=r"a choice must be one of .*, got 'bets'\. Did you mean 'best'"):
        made(base, tables=[table("CHOICE#bets")], choices=choices)
    with pytest.raises(
        ConfigError, match=r"an option of the choice 'best' must be a number, got 'low'\. Write"
    ):
        made(base, tables=[columns], choices=[{"name": "best", "among": {"low": among["0.01"], "1": "a#b"}}])


def test_what_was_never_reached_was_measured_and_says_so(base):
    data, found = made(base, tables=[table("metrics/n_never")], claims=[])
    assert data["n_missing"] == 0 and "missing" not in (found.path / "results.md").read_text()
    assert "never reached" in (found.path / "results.md").read_text()


def test_the_cause_is_what_patching_writes():
    infinite = np.full(3, np.inf)
    assert _statistic(infinite)["cause"] == NEVER
    assert _statistic(np.array([5.0, 4.0, np.inf]))["cause"].startswith(NOT_ALWAYS)


def test_a_page_of_the_same_numbers_is_kept_and_of_others_written_again(base):
    config = ResultsConfig(base=base, out=base / "results", title="A paper", tables=(table("plain"),))
    first = results(config)
    made_at = first.file("results.json").stat().st_mtime_ns
    assert results(config).file("results.json").stat().st_mtime_ns == made_at
    data, _ = made(base, title="Another", tables=[table("plain")])
    assert data["title"] == "Another" and artifact.load(base / "results").kind == "results"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"\[expected\] must hold tables or claims, got neither\. Add"),
        (
            {"tables": [table("x", file="../up.json")]},
            r"must be named by a file in the recipe's folder .*FILE#PATH",
        ),
        ({"tables": [table("x", file="")]}, r"FILE#PATH, got '#x'\. Write"),
        (
            {"tables": [table("plain", published=[1.0, 2.0])]},
            r"Table 1, row: a number must be published for each of 1 columns, got 2\. Write",
        ),
        ({"claims": [claim("above", "r.json#x")]}, r"'it is above' must have two numbers, got 1\. Give two"),
        (
            {"claims": [claim("rising", "r.json#x", "r.json#y")]},
            r"at least 3 values and no than, got 2\. Add",
        ),
        ({"claims": [claim("near", "r.json#x", than=1.0)]}, r"must say within .*, got None\. Set within"),
        ({"claims": [claim("above", "r.json#x", than=1.0, within=0.1)]}, r"got 0\.1\. Drop within"),
    ],
)
def test_what_cannot_be_read_is_refused(base, options, message):
    with pytest.raises(ConfigError, match=message):
        made(base, **options)
