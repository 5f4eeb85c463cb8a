"""The verb that draws one page from one or several reports. Knows their layout; measures nothing, loads no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from sememe import artifact, figures, frontier
from sememe.config import Config, canonical_json
from sememe.errors import ConfigError, MismatchError
from sememe.figures.schema import PAGE_FORMAT, Page
from sememe.frontier import Point

__all__ = ["ReportConfig", "report"]

VERSION = 4
PAGE, SCHEMA = "page.json", "page.schema.json"


class ReportConfig(Config):
    """Which reports, and where the page goes."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"reports", "out", "across_models"})

    reports: tuple[Path, ...]
    """Reports that `sememe evaluate` made, or folders of such (a sweep's); a row and a section each."""
    out: Path = Path("artifacts/page")
    """The folder to make: report.html, report.md with its plots, page.json with its schema, page.csv."""
    across_models: bool = False
    """Show reports of different models on one page, side by side; nothing is compared then."""


def report(config: ReportConfig, *, fresh: bool = False) -> artifact.Artifact:
    """Draw the page, or open it if it is there.

    Args:
        config: Which reports, and where the page goes.
        fresh: Replace whatever stands at config.out.

    Raises:
        ConfigError: no report is named, or one twice.
        ArtifactError: a folder is not a report.
        CorruptError: a report is damaged.
        MismatchError: the reports are of different models, and across_models is not set; or another page stands at
            config.out.
    """
    if not config.reports:
        raise ConfigError(
            "at least one report must be named", "none", "Name a folder that `sememe evaluate` made."
        )
    opened = [figures.open_report(path) for folder in config.reports for path in _reports_in(folder)]
    parents = {f"report.{index}": one.artifact.fingerprint for index, one in enumerate(opened)}
    if len(set(parents.values())) < len(parents):
        raise ConfigError(
            "each report must be named once", ", ".join(map(str, config.reports)), "Leave the repeats out."
        )
    titled = _titled(opened)
    models = _models(titled)
    if len(models) > 1 and not config.across_models:
        raise MismatchError(
            "reports on one page must be of one model: numbers of different models do not compare",
            "; ".join(f"{about} ({fingerprint[:16]})" for fingerprint, about in models.items()),
            "Leave some out, or pass --across-models to see them side by side.",
        )
    identity = artifact.identity_of("page", VERSION, config, parents)
    found = None if fresh else artifact.find(config.out, "page", identity)
    if found is not None:
        return found
    with artifact.building(
        config.out, kind="page", version=VERSION, config=config, parents=parents, fresh=fresh
    ) as work:
        data = {title: one.data for title, one in titled.items()}
        compared = _compared(titled)
        notes = _notes(titled, compared)
        figures.write_pages(work.path, data, compared, notes)
        shown = _shown(data, compared, notes)
        Page.build(shown, PAGE)  # what is written is what is published
        artifact.write_json(work.path / PAGE, shown)
        schema = json.dumps(Page.model_json_schema(by_alias=True), indent=2)
        (work.path / SCHEMA).write_text(schema + "\n", encoding="utf-8")
        figures.write_rows(work.path / "page.csv", shown)
        work.extra = {"dictionaries": [one.data["dictionary"]["fingerprint"] for one in opened]}
    return artifact.load(config.out, "page")


def _shown(
    reports: dict[str, dict[str, Any]], compared: dict[str, Any] | None, notes: list[str]
) -> dict[str, Any]:
    """page.json."""
    places = frontier.grouped({title: data["dictionary"] for title, data in reports.items()})
    rows = []
    for title, data in reports.items():
        about, place = data["dictionary"], places[title]
        arms = {title: data["metrics"]}
        arms |= {
            f"{title}: {name}": found
            for kind in ("parts", "nulls")
            for name, found in data.get(kind, {}).items()
        }
        for name, found in arms.items():
            null = name.removeprefix(f"{title}: ") in data["nulls"] and name != title
            description = about if not null else {"kind": name.removeprefix(f"{title}: "), "d_sae": None}
            rows.append(
                {"name": name, **place._asdict(), "null": null, "description": description, "metrics": found}
            )
    nothing: dict[str, Any] = {"frontiers": {}, "differences": [], "left_out": {}, "dropped": {}}
    return {"format_version": PAGE_FORMAT, "rows": rows, **(compared or nothing), "notices": notes}


def _reports_in(folder: Path) -> list[Path]:
    """The folder itself, or the reports below it."""
    if artifact.exists(folder):
        return [folder]
    return [path for path in artifact.below(folder) if artifact.kind_of(path) == "report"] or [folder]


def _compared(opened: dict[str, figures.Report]) -> dict[str, Any] | None:
    """Frontiers and which differences are real, where all reports are of the same documents and kept their draws."""
    same = {_documents_of(one) for one in opened.values()}
    if len(opened) < 2 or len(same) > 1 or None in same:
        return None
    places = frontier.grouped({title: one.data["dictionary"] for title, one in opened.items()})
    points = {title: Point(places[title], figures.read_draws(one)) for title, one in opened.items()}
    return frontier.summary(points, figures.BETTER)


def _notes(opened: dict[str, figures.Report], compared: dict[str, Any] | None) -> list[str]:
    """Why reports that stand side by side are not compared, and settings without a place."""
    if len(opened) < 2:
        return []
    if compared is not None:
        return [
            f"{setting} has no place on a frontier: {why}." for setting, why in compared["dropped"].items()
        ]
    models = _models(opened)
    if len(models) > 1:
        return [
            f"These reports are of different models ({', '.join(models.values())}): their numbers stand side by side, "
            "and no difference is told."
        ]
    return [
        "These reports are not of the same documents, draws and token policy, or keep no draws: no difference is told."
    ]


def _models(opened: dict[str, figures.Report]) -> dict[str, str]:
    """The models that reports are of, by fingerprint: a report of each and the model's name."""
    found: dict[str, str] = {}
    for title, one in opened.items():
        about = one.data["dictionary"]
        found.setdefault(about["model_fingerprint"], f"{title} of {about['model']}")
    return found


def _documents_of(one: figures.Report) -> str | None:
    """What has to agree for the i-th draws of two reports to be the same documents; None if it is not known."""
    bootstrap, text = one.data.get("bootstrap", {}), one.data["text"]
    if not bootstrap.get("n") or "units" not in bootstrap:
        return None
    drawn = [bootstrap.get(name) for name in ("units", "n", "seed")]
    read = [text.get(name) for name in ("fingerprint", "policy", "n_tokens")]
    return canonical_json([drawn, read, one.data["dictionary"]["model_fingerprint"]])


def _titled(opened: list[figures.Report]) -> dict[str, figures.Report]:
    """Reports by the shortest titles that tell them apart: the dictionary's name, the report's folder, a number."""
    for name_of in (
        lambda one: str(one.data["dictionary"]["name"]),
        lambda one: one.path.name,
        lambda one: f"{one.path.parent.name}/{one.path.name}",
    ):
        titles = [name_of(one) for one in opened]
        if len(set(titles)) == len(titles):
            break
    else:
        titles = [f"{number}: {title}" for number, title in enumerate(titles, 1)]
    return dict(zip(titles, opened, strict=True))
