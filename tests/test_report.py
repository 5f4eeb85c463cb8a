"""Pages from reports: self-contained, escaped, honest about NaN; and the figures behind them."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sememe import artifact, figures
from sememe.config import Config
from sememe.errors import ArtifactError, ConfigError, CorruptError, MismatchError
from sememe.figures.data import MAX_POINTS, number
from sememe.figures.plots import curves_plot, l0_plot, plots
from sememe.report import ReportConfig, report


def statistic(value: float | None, spread: float = 0.1, cause: str = "") -> dict[str, Any]:
    if value is None:
        return {"value": None, "low": None, "high": None, "cause": cause}
    return {"value": value, "low": value * (1 - spread), "high": value * (1 + spread)}


def arm(fvu: float, increase: float, l0: float = 32.0) -> dict[str, Any]:
    found = {name: statistic(0.5) for name in figures.HEADLINE}
    return found | {
        "fvu": statistic(fvu),
        "l0": statistic(l0),
        "ce_increase": statistic(increase),
        "frac_alive": {"value": 0.9, "low": None, "high": None},
    }


def histogram(n_silent: int) -> dict[str, Any]:
    edges = [10 ** (-6 + i) for i in range(7)]
    return {"edges": edges, "counts": [1, 2, 3, 4, 5, 6], "n_silent": n_silent, "n_below": 1}


def report_data(
    name: str = "demo", fingerprint: str = "a" * 64, fvu: float = 0.12, **changes: Any
) -> dict[str, Any]:
    metrics = arm(fvu, 0.2)
    return {
        "format_version": 1,
        "metrics": {**metrics, "ce_base": statistic(3.2)},
        "nulls": {"pca": arm(0.27, 0.9), "untrained": arm(0.74, 4.0)},
        "ablations": {"zero": {"ce_increase": statistic(8.0)}, "mean": {"ce_increase": statistic(6.0)}},
        "density": {"dictionary": histogram(3), "untrained": histogram(9)},
        "by_language": {
            language: {"n_documents": 5, "n_rows": 100, "metrics": arm(fvu, increase)}
            for language, increase in (("english", 0.1), ("german", 0.3))
        },
        "by_source": {"corpus.jsonl": {"n_documents": 10, "n_rows": 200, "metrics": arm(fvu, 0.2)}},
        "dictionary": {
            "name": name,
            "fingerprint": fingerprint,
            "kind": "topk",
            "d_sae": 22,
            "model": "tiny",
            "model_fingerprint": "b" * 64,
            "inputs": ["resid_post.8"],
            "outputs": ["resid_post.8"],
        },
        "text": {
            "policy": {"context_length": 128},
            "n_tokens": 1234567,
            "n_rows_kept": 1200000,
            "n_norm_outliers": 12,
            "n_predictions": 1190000,
            "n_documents": 10,
        },
        "store": None,
        "training": [
            {"step": s, "tokens": 100 * s, "fvu": 1 / s, "loss": 2 / s, "l0": 32} for s in range(1, 30)
        ],
        "attributions": [
            {
                "source": "wiki",
                "title": "Wikipedia <summaries>",
                "licence": "CC BY-SA 4.0",
                "url": "https://example.org/wiki",
                "notice": "Text by its authors.",
            },
            {"source": "x", "title": "Odd", "licence": "MIT", "url": "javascript:alert(1)", "notice": ""},
        ],
        **changes,
    }


def saved_report(path: Path, data: dict[str, Any]) -> Path:
    with artifact.building(path, kind="report", version=1, config=Config(), parents={"d": str(path)}) as work:
        artifact.write_json(work.path / figures.REPORT, data)
    return path


class Page(HTMLParser):
    """Collects what a page loads, and its tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = {name: value or "" for name, value in attrs}
        self.loads += [found[name] for name in ("src", "data", "srcset") if name in found]
        if tag == "link" and "href" in found:
            self.loads.append(found["href"])
        if tag == "a":
            self.links.append(found.get("href", ""))


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    done = report(ReportConfig(reports=(saved_report(tmp_path / "r", report_data()),), out=tmp_path / "page"))
    page = Page((done.path / "report.html").read_text())
    assert page.loads == [] and "script" not in page.tags
    assert page.tags.count("svg") == 5  # fvu, ce_increase, density, training, language
    assert page.links == ["https://example.org/wiki"]  # the other address is not one to follow


def test_numbers_stand_beside_their_intervals(tmp_path: Path) -> None:
    done = report(ReportConfig(reports=(saved_report(tmp_path / "r", report_data()),), out=tmp_path / "page"))
    markdown = (done.path / "report.md").read_text()
    lines = markdown.splitlines()
    head = next(line for line in lines if line.startswith("|  | fvu"))
    row = next(line for line in lines if line.startswith("| demo |"))
    cell = row.split("|")[head.split("|").index(" fvu ")]
    assert cell.strip() == "0.12 (0.108 to 0.132)"
    assert any(line.startswith("| null: pca | 0.27 (") for line in lines)
    assert "1,234,567 tokens of 10 documents" in markdown
    for name in re.findall(r"\(figures/(.*?)\)", markdown):
        assert (done.path / "figures" / name).read_text().startswith("<svg")


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    data = report_data(name="<script>alert(1)</script>")
    data["by_language"]["<b>"] = data["by_language"].pop("german")
    done = report(ReportConfig(reports=(saved_report(tmp_path / "r", data),), out=tmp_path / "page"))
    text = (done.path / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "b" not in page.tags and "summaries" not in page.tags
    assert "&lt;script&gt;alert(1)" in text and "Wikipedia &lt;summaries&gt;" in text


def test_nan_is_shown_with_its_cause(tmp_path: Path) -> None:
    data = report_data()
    data["metrics"]["ce_recovered_zero"] = statistic(
        None, cause="zero ablation leaves the cross-entropy as it was"
    )
    data["metrics"]["ce_increase"] = statistic(0.0)
    done = report(ReportConfig(reports=(saved_report(tmp_path / "r", data),), out=tmp_path / "page"))
    assert "NaN (zero ablation leaves the cross-entropy as it was)" in (done.path / "report.md").read_text()
    assert "NaN<small>zero ablation leaves" in (done.path / "report.html").read_text()


def test_several_reports_make_one_page(tmp_path: Path) -> None:
    one = saved_report(tmp_path / "one", report_data("topk"))
    two = saved_report(tmp_path / "two", report_data("relu", "c" * 64, fvu=0.3))
    done = report(ReportConfig(reports=(one, two), out=tmp_path / "page"))
    markdown = (done.path / "report.md").read_text()
    assert "![Reconstruction against sparsity](figures/frontier.svg)" in markdown
    assert markdown.count("| null: pca |") == 2 and "## topk" in markdown and "## relu" in markdown
    ids = re.findall(r"<svg[^>]*>.*?</svg>", (done.path / "report.html").read_text(), re.DOTALL)
    assert len(ids) == 11
    assert done.extra["dictionaries"] == ["a" * 64, "c" * 64]


def compared_report(path: Path, name: str, k: int, fvu: float, units: str = "u") -> Path:
    data = report_data(name, name * 8, fvu)
    data["dictionary"] |= {"config": {"kind": "topk", "k": k}, "training": {"seed": 0}}
    data["bootstrap"] = {"units": units, "n": 20, "seed": 0}
    draws = {"l0": np.full(21, float(k)), "fvu": np.concatenate([[fvu], fvu + np.linspace(-0.01, 0.01, 20)])}
    with artifact.building(path, kind="report", version=1, config=Config(), parents={"d": str(path)}) as work:
        artifact.write_json(work.path / figures.REPORT, data)
        figures.write_draws(work.path, {"dictionary": draws})
    return path


def test_a_folder_of_reports_is_drawn_as_frontiers(tmp_path: Path) -> None:
    for name, k, fvu in (("a", 16, 0.4), ("b", 32, 0.3)):
        compared_report(tmp_path / "sweep" / name, name, k, fvu)
    relu = compared_report(tmp_path / "relu", "c", 32, 0.5)
    data = json.loads((relu / "report.json").read_text())
    done = report(ReportConfig(reports=(tmp_path / "sweep", relu), out=tmp_path / "page"))
    markdown = (done.path / "report.md").read_text()
    assert "## a" in markdown and "## b" in markdown and "## c" in markdown
    assert "![frontier_fvu](figures/frontier_fvu.svg)" in markdown
    assert (
        data["dictionary"]["kind"] == "topk"
    )  # one group: three points of one frontier, nothing to tell apart
    assert "which differences are real" not in markdown


def test_reports_of_the_same_documents_are_told_apart(tmp_path: Path) -> None:
    one = compared_report(tmp_path / "one", "a", 32, 0.3)
    two = compared_report(tmp_path / "two", "b", 32, 0.5)
    for path, width in ((one, 22), (two, 44)):
        data = json.loads((path / "report.json").read_text())
        assert data["dictionary"]["d_sae"] == 22
        if width == 44:
            data["dictionary"]["d_sae"] = width
            draws = figures.read_draws(figures.open_report(path))
            shutil.rmtree(path)
            with artifact.building(path, kind="report", version=1, config=Config(), parents={}) as work:
                artifact.write_json(work.path / figures.REPORT, data)
                figures.write_draws(work.path, {"dictionary": draws})
    done = report(ReportConfig(reports=(one, two), out=tmp_path / "page"))
    markdown = (done.path / "report.md").read_text()
    assert (
        "- fvu at l0 32: topk d_sae=22 is better than topk d_sae=44, 0.3 against 0.5, a difference of 0.2 that is real"
        in markdown
    )
    other = compared_report(tmp_path / "three", "c", 32, 0.5, units="v")
    done = report(ReportConfig(reports=(one, other), out=tmp_path / "page2"))
    assert "which differences are real" not in (done.path / "report.md").read_text()  # not the same documents


@pytest.mark.parametrize(
    "what", ["bootstrap.n", "bootstrap.seed", "text.n_tokens", "dictionary.model_fingerprint"]
)
def test_draws_of_other_documents_models_or_seeds_are_not_paired(tmp_path: Path, what: str) -> None:
    compared_report(tmp_path / "one", "a", 32, 0.3)
    data = json.loads((compared_report(tmp_path / "two", "b", 32, 0.5) / "report.json").read_text())
    table, name = what.split(".")
    data[table][name] = "7" * 64 if name == "model_fingerprint" else 7
    with artifact.building(tmp_path / "other", kind="report", version=1, config=Config(), parents={}) as work:
        artifact.write_json(work.path / figures.REPORT, data)
        figures.write_draws(work.path, {"dictionary": {"l0": np.full(8, 32.0), "fvu": np.full(8, 0.5)}})
    config = ReportConfig(reports=(tmp_path / "one", tmp_path / "other"), out=tmp_path / "page")
    if name == "model_fingerprint":
        with pytest.raises(MismatchError) as raised:
            report(config)
        assert re.fullmatch(
            r"reports on one page must be of one model: numbers of different models do not compare, "
            r"got a of .* \([0-9a-f]{16}\); b of .* \(7777777777777777\)\. "
            r"Leave some out, or pass --across-models to see them side by side\.",
            str(raised.value),
        )
        assert not (tmp_path / "page").exists()
        config = config.replace(across_models=True)
    text = (report(config).path / "report.md").read_text()
    assert "frontier_fvu" not in text
    why = (
        "of different models (a of"
        if name == "model_fingerprint"
        else "not of the same documents, draws and token"
    )
    assert f"> These reports are {why}" in text


def test_a_report_without_draws_cannot_be_compared(tmp_path: Path) -> None:
    opened = figures.open_report(saved_report(tmp_path / "r", report_data()))
    with pytest.raises(
        MismatchError, match=r"must hold its draws for a comparison, got one of an earlier version"
    ):
        figures.read_draws(opened)


def test_reports_of_dictionaries_with_one_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    one = saved_report(tmp_path / "x" / "report", report_data("dictionary"))
    two = saved_report(tmp_path / "y" / "report", report_data("dictionary", "c" * 64))
    done = report(ReportConfig(reports=(one, two), out=tmp_path / "page"))
    markdown = (done.path / "report.md").read_text()
    assert "## x/report" in markdown and "## y/report" in markdown


def test_the_page_is_the_same_to_the_bit_and_reused(tmp_path: Path) -> None:
    one = saved_report(tmp_path / "r", report_data())
    config = ReportConfig(reports=(one,), out=tmp_path / "page")
    first = report(config)
    again = report(config)
    anew = report(config.replace(out=tmp_path / "page2"))
    assert first.fingerprint == again.fingerprint == anew.fingerprint
    other = saved_report(tmp_path / "r2", report_data("other"))
    with pytest.raises(MismatchError, match=r"the page at .* must have been made with this config"):
        report(ReportConfig(reports=(other,), out=tmp_path / "page"))


def test_what_is_not_a_report_is_an_error(tmp_path: Path) -> None:
    one = saved_report(tmp_path / "r", report_data())
    with pytest.raises(ConfigError, match="at least one report must be named, got none"):
        report(ReportConfig(reports=(), out=tmp_path / "page"))
    with pytest.raises(ConfigError, match="each report must be named once"):
        report(ReportConfig(reports=(one, one), out=tmp_path / "page"))
    with pytest.raises(ArtifactError, match="must be a finished report, got nothing there"):
        report(ReportConfig(reports=(tmp_path / "no",), out=tmp_path / "page"))
    broken = saved_report(tmp_path / "broken", {"metrics": {}})
    with pytest.raises(CorruptError, match="must be a sememe report, got KeyError"):
        figures.open_report(broken)
    text = (one / "report.json").read_text()
    (one / "report.json").write_text(text.replace("0.12", "0.11"))
    with pytest.raises(CorruptError, match="SHA-256"):
        report(ReportConfig(reports=(one,), out=tmp_path / "page"))
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (1.0, "1"), (0.123456, "0.1235"), (32.0, "32"), (123.456, "123.5"), (4321.0, "4,321.0"),
     (1e-5, "1.00e-05"), (-0.5, "-0.5"), (None, "NaN"), (float("nan"), "NaN"), (25000.0, "2.50e+04")],
)  # fmt: skip
def test_numbers_are_short(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_plots_draw_what_the_report_says() -> None:
    drawn = plots(report_data())
    assert set(drawn) == {"fvu", "ce_increase", "density", "training", "language"}
    axes = drawn["fvu"].axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["untrained", "pca", "dictionary"]
    points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert points == [0.74, 0.27, 0.12]
    costs = [tick.get_text() for tick in drawn["ce_increase"].axes[0].get_yticklabels()]
    assert costs == ["zero ablation", "mean ablation", "untrained", "pca", "dictionary"]
    assert [panel.get_title(loc="left") for panel in drawn["training"].axes] == ["fvu", "loss", "l0"]


def test_without_a_log_there_are_no_curves() -> None:
    assert "training" not in plots(report_data(training=[]))
    assert curves_plot([{"step": 1, "seconds": 3.0}]) is None


def test_the_training_log_is_thinned_and_ends_where_it_ended(tmp_path: Path) -> None:
    lines = [json.dumps({"step": s, "fvu": 1 / s, "seconds": s * 0.1, "note": "x"}) for s in range(1, 2001)]
    with artifact.building(tmp_path / "d", kind="dictionary", version=1, config=Config(), parents={}) as work:
        (work.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    curves = figures.read_curves(artifact.load(tmp_path / "d"))
    assert len(curves) == MAX_POINTS
    assert curves[0] == {"step": 1, "fvu": 1.0} and curves[-1] == {"step": 2000, "fvu": 1 / 2000}
    with artifact.building(tmp_path / "e", kind="dictionary", version=1, config=Config(), parents={}):
        pass
    assert figures.read_curves(artifact.load(tmp_path / "e")) == []


def test_a_report_shows_itself(tmp_path: Path) -> None:
    opened = figures.open_report(saved_report(tmp_path / "r", report_data()))
    assert opened.value("fvu") == 0.12 and opened.value("fvu", "pca") == 0.27
    assert "<table>" in opened._repr_html_() and "null: pca" in opened._repr_html_()
    assert repr(opened).startswith("Report(demo")


def test_how_many_latents_are_active_is_drawn_where_it_differs() -> None:
    density = {"dictionary": {"l0_histogram": [[2, 10], [90, 30]]}, "pca": {"l0_histogram": [[40, 40]]}}
    figure = l0_plot({"density": density})
    assert figure is not None
    (axes,) = figure.axes
    values = axes.patches[0].get_data().values
    assert values[1] == 0.25 and values[45] == 0.75 and sum(values) == 1
    assert "bins of 2" in axes.get_xlabel()
    density["dictionary"]["l0_histogram"] = [[3, 40]]
    assert l0_plot({"density": density}) is None, "a TopK dictionary has nothing to show"
    assert l0_plot({"density": {"dictionary": {}}}) is None, "nor has a report of an earlier version"


def test_numbers_and_their_schema_lie_beside_the_page(tmp_path: Path) -> None:
    one = compared_report(tmp_path / "one", "a", 32, 0.3)
    two = compared_report(tmp_path / "two", "b", 32, 0.5)
    done = report(ReportConfig(reports=(one, two), out=tmp_path / "page"))
    data = json.loads((done.path / "page.json").read_text())
    assert list(data["frontiers"]) == ["topk"] and not data["notices"]
    names = [row["name"] for row in data["rows"] if not row["null"]]
    assert len(names) == 2 and [
        row["metrics"]["fvu"]["value"] for row in data["rows"] if not row["null"]
    ] == [0.3, 0.5]
    assert any(row["null"] and row["name"].endswith(": pca") for row in data["rows"])
    schema = json.loads((done.path / "page.schema.json").read_text())
    published = Path(__file__).parent.parent / "docs" / "schemas" / "page.schema.json"
    assert schema == json.loads(published.read_text()) and set(schema["required"]) == set(data)
    with (done.path / "page.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == [row["name"] for row in data["rows"]]
    assert [float(line["fvu"]) for line in lines if line["name"] in names] == [0.3, 0.5]
