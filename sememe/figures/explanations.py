"""Scores of explanations as people read them: a Markdown page and a plot. Knows the layout of a summary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from sememe.figures.data import Data, number
from sememe.figures.plots import STYLE, svg
from sememe.figures.tables import Table, cell_note, markdown_table

__all__ = ["lift_table", "write_explanations"]

LEGEND = (
    "0 is guessing, 1 is perfect; in brackets 95% bootstrap intervals over latents. lift: the dictionary's mean minus "
    "that of the null that does best. malformed: answers that could not be read; they count as guesses. short: latents "
    "with fewer excerpts than the scorer asks for, scored on those they have."
)
COLOUR, NULL_COLOURS = "#1f6feb", ("#57606a", "#8250df", "#bf3989", "#d1730b", "#1a7f37", "#9a6700")


def write_explanations(folder: Path, data: Data) -> None:
    """explanations.md and its plot, explanations.svg.

    Args:
        folder: Where to write.
        data: The summary of explanations: `scorers`, `lifts`, `correlations`, tallies.
    """
    with mpl.rc_context(STYLE):
        (folder / "explanations.svg").write_text(svg(_plot(data), "explanations"), encoding="utf-8")
    counts = [f"{data['n_labelled']:,} of {data['n_scored']:,} latents with a rule's score have a label."]
    if data["judge"] is not None:
        counts.append(
            f"{data['judge']} was asked about {data['n_asked']:,} latents; {data['n_unexplained']:,} of its "
            f"explanations could not be read."
        )
    if data["clusters"]["n_asked"]:
        counts.append(
            f"It was asked about {data['clusters']['n_asked']:,} clusters; {data['clusters']['n_unexplained']:,} of "
            "those answers could not be read."
        )
    lines = ["# Explanations and their scores", "", " ".join(counts), "", "![scores](explanations.svg)", ""]
    lines += ["## Scores", "", markdown_table(lift_table(data)), "", LEGEND, ""]
    for heading, table in (
        ("By tenth of the activations, the weakest first", _decile_table(data)),
        ("Rank correlation of scores with what latents are like", _correlation_table(data)),
        ("Kinds of latents", _tally_table(data)),
    ):
        if table.rows:
            lines += [f"## {heading}", "", markdown_table(table), ""]
    (folder / "explanations.md").write_text("\n".join(lines), encoding="utf-8")


def _name(row: Data) -> str:
    return f"{row['scorer']}: {row['variant'].replace('_', ' ')}"


def _statistic(interval: Data) -> dict[str, Any]:
    return {
        "value": interval["mean"],
        "low": interval["low"],
        "high": interval["high"],
        "cause": "no latents",
    }


def lift_table(data: Data) -> Table:
    """A row per scorer and variant: the dictionary, each null, and the lift."""
    lifts = {(row["scorer"], row["variant"]): row for row in data["lifts"]}
    nulls = list(dict.fromkeys(name for row in lifts.values() for name in row["nulls"]))
    table = Table(
        ["score", "latents", "dictionary", *nulls, *(["lift"] if nulls else []), "malformed"], [], []
    )
    for row in data["scorers"]:
        lift = lifts.get((row["scorer"], row["variant"]))
        own = _statistic(row)
        cells = [_name(row), f"{row['n_latents']:,}", number(own["value"])]
        lacking = [
            f"{row[name]:,} {word}"
            for name, word in (("n_undefined", "undefined"), ("n_short", "short"))
            if row[name]
        ]
        notes = ["", ", ".join(lacking), cell_note(own)]
        for name in nulls:
            null = lift["nulls"].get(name) if lift else None
            cells.append(number(null["mean"]) if null else "")
            notes.append(cell_note(_statistic(null)) if null else "")
        if nulls:
            why = data["no_lift"].get(row["scorer"], "")
            cells.append(number(lift["lift"]) if lift else "no null" if why else "")
            notes.append(f"{number(lift['low'])} to {number(lift['high'])}" if lift else why)
        table.rows.append([*cells, f"{row['malformed_share']:.1%}"])
        table.notes.append([*notes, ""])
    return table


def _decile_table(data: Data) -> Table:
    table = Table(["score", *(str(decile + 1) for decile in range(10))], [], [])
    for row in data["scorers"]:
        if row["deciles"]:
            found = [row["deciles"].get(str(decile)) for decile in range(10)]
            table.rows.append([_name(row), *(number(d["mean"]) if d else "" for d in found)])
            table.notes.append(["", *(cell_note(_statistic(d)) if d else "" for d in found)])
    return table


def _correlation_table(data: Data) -> Table:
    properties = list(dict.fromkeys(row["property"] for row in data["correlations"]))
    table = Table(["score", *properties], [], [])
    by_score: dict[str, dict[str, Data]] = {}
    for row in data["correlations"]:
        by_score.setdefault(_name(row), {})[row["property"]] = row
    for name, found in by_score.items():
        told = [found.get(p) for p in properties]
        table.rows.append([name, *("" if t is None or t["rho"] is None else number(t["rho"]) for t in told)])
        table.notes.append(["", *("" if t is None else _range(t) for t in told)])
    return table


def _range(row: Mapping[str, Any]) -> str:
    if row["rho"] is None:
        return "too few latents, or all alike"
    return "no interval" if row["low"] is None else f"{number(row['low'])} to {number(row['high'])}"


def _tally_table(data: Data) -> Table:
    table = Table(["kind", "latents"], [], [])
    for name, count in (data["categories"] or data["kinds"]).items():
        table.rows.append([name, f"{count:,}"])
        table.notes.append(["", ""])
    return table


def _plot(data: Data) -> Figure:
    """Every score as a dot with its interval, the nulls' below it."""
    lifts = {(row["scorer"], row["variant"]): row["nulls"] for row in data["lifts"]}
    rows = [row for row in data["scorers"] if row["mean"] is not None]
    nulls = list(dict.fromkeys(name for found in lifts.values() for name in found))
    colours = {name: NULL_COLOURS[i % len(NULL_COLOURS)] for i, name in enumerate(nulls)}
    step = 0.62 / max(len(nulls), 1)
    figure = Figure(figsize=(6.8, 1.2 + (0.3 + 0.12 * len(nulls)) * max(len(rows), 1)), layout="constrained")
    axes = figure.add_subplot()
    for y, row in enumerate(reversed(rows)):
        told = [("dictionary", COLOUR, row)]
        told += [(n, colours[n], s) for n, s in lifts.get((row["scorer"], row["variant"]), {}).items()]
        for place, (name, colour, statistic) in enumerate(told):
            at = y - place * step
            axes.plot(
                [statistic["low"], statistic["high"]], [at, at], color=colour, linewidth=2.2, alpha=0.45
            )
            label = name if y == len(rows) - 1 else None
            axes.plot(
                [statistic["mean"]], [at], "o", color=colour, markersize=6 if place == 0 else 4, label=label
            )
    axes.axvline(0, color="#8c959f", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), [_name(row) for row in reversed(rows)])
    axes.set_ylim(-0.9, len(rows) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.set_xlabel("score: 0 is guessing, 1 is perfect")
    axes.set_title("How well explanations hold on documents they were not found on")
    if nulls:
        axes.legend(fontsize=8.5, loc="lower right")
    return figure
