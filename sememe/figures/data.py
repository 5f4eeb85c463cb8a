"""A finished report, opened: report.json and the training log beside a dictionary. Draws nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from sememe import artifact
from sememe.errors import CorruptError, MismatchError

__all__ = [
    "HEADLINE",
    "REPORT",
    "Curves",
    "Data",
    "Draws",
    "Report",
    "arms_of",
    "number",
    "open_report",
    "read_curves",
    "read_draws",
    "read_watched",
    "stopped",
    "write_draws",
]

REPORT = "report.json"
CURVES = "metrics.jsonl"
WATCHED = "watched.jsonl"
DRAWS = "draws.npz"
MAX_POINTS = 300
HEADLINE = (
    "fvu",
    "fvu_all_rows",
    "l0",
    "frac_alive",
    "cosine",
    "ce_increase",
    "ce_recovered_zero",
    "ce_recovered_mean",
    "kl",
)
"""Metrics of the headline table; report.json repeats their values at its top level."""

Data = Mapping[str, Any]
Draws = Mapping[str, Float64[np.ndarray, " draws"]]
Curves = Sequence[Mapping[str, Any]]


class Report:
    """A finished report. `data` is its report.json."""

    def __init__(self, folder: artifact.Artifact, data: dict[str, Any]) -> None:
        self.artifact, self.data = folder, data

    @property
    def path(self) -> Path:
        """Its folder: report.json, report.md, report.html."""
        return self.artifact.path

    def value(self, metric: str, null: str | None = None) -> float:
        """A metric of the dictionary, or of a null; NaN where it is not a number."""
        metrics = self.data["metrics"] if null is None else self.data["nulls"][null]
        value = metrics[metric]["value"]
        return math.nan if value is None else float(value)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={number(self.data.get(name))}" for name in HEADLINE if name in self.data)
        return f"Report({self.data['dictionary']['name']}: {shown})"

    def _repr_html_(self) -> str:
        from sememe.figures.tables import headline_table, html_table

        return html_table(headline_table({self.data["dictionary"]["name"]: self.data}))


def open_report(path: str | Path) -> Report:
    """Open a finished report.

    Raises:
        ArtifactError: the folder is not a report.
        CorruptError: report.json is damaged.
    """
    folder = artifact.load(path, "report")
    file = folder.file(REPORT, verify=True)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        data["metrics"], data["dictionary"]["name"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(
            f"{file} must be a sememe report",
            f"{type(error).__name__}: {error}",
            "Run `sememe evaluate` again.",
        ) from None
    return Report(folder, data)


def write_draws(folder: Path, arms: Mapping[str, Draws]) -> None:
    """Each arm's metrics in every draw of the bootstrap, beside report.json."""
    held: dict[str, Any] = {
        f"{arm}/{name}": values for arm, own in arms.items() for name, values in own.items()
    }
    np.savez(folder / DRAWS, **held)


def read_draws(report: Report, arm: str = "dictionary") -> dict[str, Float64[np.ndarray, " draws"]]:
    """An arm's metrics: first over all documents, then in each draw of the bootstrap.

    Raises:
        MismatchError: the report is of a version that kept none.
    """
    if DRAWS not in report.artifact.meta["files"]:
        raise MismatchError(
            f"the report {report.path} must hold its draws for a comparison",
            "one of an earlier version",
            "Run `sememe evaluate --fresh` again.",
        )
    with np.load(report.artifact.file(DRAWS, verify=True)) as held:
        return {name.removeprefix(f"{arm}/"): held[name] for name in held.files if name.startswith(f"{arm}/")}


def read_curves(dictionary: artifact.Artifact) -> list[dict[str, float]]:
    """The numbers of the training log in a dictionary's folder, thinned out evenly; empty if there is none."""
    return [
        {name: value for name, value in row.items() if _plottable(name, value)}
        for row in _lines(dictionary, CURVES)
    ]


def read_watched(dictionary: artifact.Artifact) -> list[dict[str, Any]]:
    """What was measured on held-out rows while a dictionary was trained, thinned out evenly; empty if nothing was.

    The first line also holds `edges`, the bins of every line's `density`.
    """
    return _lines(dictionary, WATCHED)


def _lines(dictionary: artifact.Artifact, name: str) -> list[dict[str, Any]]:
    if name not in dictionary.meta["files"]:
        return []
    lines = [line for line in dictionary.file(name).read_text(encoding="utf-8").splitlines() if line.strip()]
    last = len(lines) - 1
    chosen = sorted({round(i * last / (MAX_POINTS - 1)) for i in range(MAX_POINTS)}) if last >= 0 else []
    return [json.loads(lines[index]) for index in chosen]


def _plottable(name: str, value: object) -> bool:
    if isinstance(value, bool) or name == "seconds":  # wall time differs from run to run
        return False
    return isinstance(value, (int, float)) and math.isfinite(value)


def arms_of(data: Data) -> list[tuple[str, Data]]:
    """The dictionary, parts of it and its nulls, with their statistics."""
    return [("dictionary", data["metrics"]), *data.get("parts", {}).items(), *data["nulls"].items()]


def number(value: float | None) -> str:
    """A number as people read it: three or four digits."""
    if value is None or not math.isfinite(value):
        return "NaN"
    if value == 0 or 0.001 <= abs(value) < 10_000:
        return f"{value:.4g}" if abs(value) < 100 else f"{value:,.1f}"
    return f"{value:.2e}"


def stopped(data: Data) -> str:
    """Why reading ended where there was a budget, and what that was spent on."""
    spent = data["spent"]
    because = "all tokens were read" if data["because"] == "all tokens" else data["because"]
    return (
        f"reading stopped at {data['n_tokens']:,} tokens because {because}; of {data['budget']}, "
        f"{spent['fitting']:,.0f} s went into fitting nulls and {spent['reading']:,.0f} s into reading"
    )
