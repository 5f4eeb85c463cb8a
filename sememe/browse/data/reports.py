"""A dictionary's report as the landing page shows it, and the frontier it stands on. Knows reports as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sememe.browse.data.values import number

__all__ = ["FRONTIER", "frontier_point", "report_figures"]

Json = dict[str, Any]
FRONTIER = ("l0", "fvu", "ce_recovered_zero", "kl")
"""What is kept of the other dictionaries of a sweep."""


def report_figures(report: Mapping[str, Any] | None) -> Json | None:
    """Headline figures in one shape: {"metrics": {name: {"value", "low", "high"}}, "nulls": {null: {name: ...}}}.

    A plain mapping of numbers, as an atlas may carry in its meta table, has no nulls and no intervals.
    """
    if not report:
        return None
    nested = isinstance(report.get("metrics"), Mapping)

    def figures(source: Mapping[str, Any]) -> Json:
        out = {}
        for name, entry in source.items():
            value, low, high = (
                (entry.get("value"), entry.get("low"), entry.get("high"))
                if isinstance(entry, Mapping)
                else (entry, None, None)
            )
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                out[str(name)] = {
                    "value": number(value, 5),
                    "low": number(low, 5),
                    "high": number(high, 5),
                }
        return out

    return {
        "metrics": figures(report["metrics"] if nested else report),
        "nulls": {str(name): figures(null) for name, null in (report.get("nulls") or {}).items()}
        if nested
        else {},
    }


def frontier_point(name: str, report: Mapping[str, Any], own: bool) -> Json:
    """One dictionary of a sweep: its place in the plane of sparsity and quality."""
    figures = (report_figures(report) or {"metrics": {}})["metrics"]
    values = {metric: (figures.get(metric) or {}).get("value") for metric in FRONTIER}
    return {"name": name, "own": own, **values}
