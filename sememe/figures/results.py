"""Published numbers beside ours, as a page. Knows the layout of results.json and how people read it."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from sememe.figures.data import Data, number
from sememe.figures.frame import page
from sememe.figures.plots import STYLE, svg
from sememe.figures.tables import Table, cell_note, html_table, markdown_table

__all__ = ["claims_table", "results_tables", "write_results"]

LEGEND = (
    "Beside or under our numbers: 95% intervals. A claim holds where our numbers are as was said and their intervals "
    "do not overlap, is undecided where they do, and does not hold where they are the other way round. Series rise "
    "where their rank correlation with their order is at least 0.5. In plots dots with intervals are ours, rings "
    "theirs."
)
NOTHING = "–"
OURS, THEIRS = "#1f6feb", "#d1730b"


def write_results(folder: Path, data: Data) -> None:
    """results.md and results.html, which needs no other file.

    Args:
        folder: Where to write.
        data: results.json.
    """
    title = f"{data['title']}: published and here"
    markdown, body = [f"# {title}", ""], []

    def say(text: str, heading: int = 0) -> None:
        markdown.extend([f"{'#' * heading} {text}".lstrip(), ""])
        tag = f"h{heading}" if heading else "p"
        body.append(f"<{tag}>{html.escape(text)}</{tag}>")

    def draw(table: Table, written: bool = False) -> None:
        markdown.extend([markdown_table(table), ""])
        shown = html_table(table)
        body.append(f"<div class='written'>{shown}</div>" if written else shown)

    if data["scale"]:
        say(f"The recipe {data['name']} at its scale {data['scale']}.")
    if data["settings"]:
        say("What is different here", 2)
        rows = [[one["what"], one["published"], one["here"]] for one in data["settings"]]
        draw(Table(["", "published", "here"], rows, [[""] * 3 for _ in rows]), written=True)
    if data["conversion"]:
        say(data["conversion"])
    for place, (table, about) in enumerate(zip(results_tables(data), data["tables"], strict=True)):
        say(about["title"], 2)
        draw(table)
        if about["plot"]:
            with mpl.rc_context(STYLE):
                drawn = svg(_plot(about), f"results-{place}")
            (folder / f"table-{place}.svg").write_text(drawn, encoding="utf-8")
            markdown.extend([f"![{about['title']}](table-{place}.svg)", ""])
            body.append(f"<figure>{drawn}</figure>")
        for text in (about["source"] and f"Published in: {about['source']}.", about["note"]):
            if text:
                say(text)
    if data["claims"]:
        say("What was said", 2)
        draw(claims_table(data), written=True)
    if data["n_missing"]:
        say(f"{data['n_missing']} numbers are missing; each says why.")
    say(LEGEND)
    (folder / "results.md").write_text("\n".join(markdown), encoding="utf-8")
    (folder / "results.html").write_text(page(title, "\n".join(body)), encoding="utf-8")


def _plot(about: Data) -> Figure:
    """A line of the plot for each row, a panel for each column: ours with its interval, theirs as a ring."""
    rows, columns = about["rows"], about["columns"]
    figure = Figure(figsize=(3.2 + 2.2 * len(columns), 1.0 + 0.22 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for place, (axes, name) in enumerate(zip(panels, columns, strict=True)):
        for line, row in enumerate(rows):
            here, published = row["here"][place], row["published"][place]
            if here["value"] is not None:
                axes.plot(here["value"], line, "o", color=OURS, markersize=4)
                axes.hlines(line, here.get("low", here["value"]), here.get("high", here["value"]), color=OURS)
            if not isinstance(published, str):
                axes.plot(published, line, "o", color=THEIRS, markersize=6, fillstyle="none")
        axes.set_title(name)
        axes.grid(axis="x")
    panels[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    panels[0].invert_yaxis()
    return figure


def results_tables(data: Data) -> list[Table]:
    """Each published table: two columns for a metric, theirs and ours; ours alone where nothing was published."""
    found = []
    for about in data["tables"]:
        columns, told = [""], []
        for place, name in enumerate(about["columns"]):
            told.append(any(row["published"][place] != "" for row in about["rows"]))
            columns += [f"{name}, published", f"{name}, here"] if told[-1] else [name]
        table = Table(columns, [], [])
        for row in about["rows"]:
            cells, notes = [row["name"]], [""]
            for is_told, published, here in zip(told, row["published"], row["here"], strict=True):
                cells += [_said(published)] * is_told + [_cell(here)]
                notes += [""] * is_told + [cell_note(here)]
            table.rows.append(cells)
            table.notes.append(notes)
        found.append(table)
    return found


def claims_table(data: Data) -> Table:
    """A row per claim: what was said, their numbers, ours, whether it holds."""
    table = Table(["claim", "published", "here", "verdict"], [], [])
    for claim in data["claims"]:
        ours = ", ".join(map(_cell, claim["here"]))
        if claim["than"] is not None:
            ours += f" ({claim['relation']} {number(claim['than'])}?)"
        causes = "; ".join(filter(None, (one.get("cause", "") for one in claim["here"])))
        table.rows.append([claim["claim"], claim["published"] or NOTHING, ours, claim["verdict"]])
        table.notes.append([claim["source"], "", causes, ""])
    return table


def _cell(statistic: dict[str, Any]) -> str:
    return NOTHING if statistic["value"] is None else number(statistic["value"])


def _said(published: float | str) -> str:
    return (published or NOTHING) if isinstance(published, str) else number(published)
