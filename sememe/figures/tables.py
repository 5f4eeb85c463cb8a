"""Reports as tables: cells of text, then Markdown or HTML. Draws nothing."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sememe.figures.data import HEADLINE, Data, arms_of, number

__all__ = [
    "BETTER",
    "DENSITIES",
    "GROUPED",
    "MEANINGS",
    "Table",
    "cell_note",
    "csv_of",
    "density_table",
    "group_table",
    "headline_table",
    "html_table",
    "markdown_table",
    "percent",
    "percent_note",
]

BETTER = {
    "fvu": "lower",
    "fvu_all_rows": "lower",
    "ce_increase": "lower",
    "kl": "lower",
    "perplexity": "lower",
    "cosine": "higher",
    "frac_alive": "higher",
    "ce_recovered_zero": "higher",
    "ce_recovered_mean": "higher",
}
MEANINGS = {
    "fvu": "squared error over variance about the mean, kept rows",
    "fvu_all_rows": "the same over every row, attention sinks and position 0 included",
    "l0": "latents active per token",
    "frac_alive": "share of latents active on at least one of the tokens",
    "cosine": "mean cosine of reconstruction and activation",
    "ce_increase": "cross-entropy added by splicing the reconstruction in, nats per token",
    "ce_recovered_zero": "share of the cross-entropy lost to zero ablation that is kept",
    "ce_recovered_mean": "share of the cross-entropy lost to mean ablation that is kept",
    "kl": "KL divergence of the spliced model from the unedited one, nats per token",
    "perplexity": "exponential of the spliced model's cross-entropy",
}


GROUPED = ("fvu", "l0", "ce_base", "ce_increase", "ce_recovered_zero", "ce_recovered_mean", "kl")
"""Metrics that are told per language, source, or value of a tag."""
DENSITIES = (
    "Share of the latents active on fewer, or more, of the tokens than so many; and how many latents are active on a "
    "token, of which such a share of the tokens exceed no more. Under each number: its 95% interval, what as many "
    "other documents would give."
)


class Table(NamedTuple):
    """Cells as text. `notes` are cells' second lines: intervals and causes."""

    columns: list[str]
    rows: list[list[str]]
    notes: list[list[str]]


def cell_note(statistic: Mapping[str, Any]) -> str:
    """The interval, or why there is no number."""
    low, high = statistic.get("low"), statistic.get("high")
    if low is not None and high is not None:
        return f"{number(low)} to {number(high)}"
    if statistic["value"] is None:
        return str(statistic.get("cause", ""))
    return "no interval" if "cause" in statistic else ""


def percent(value: float | None) -> str:
    """A share as people read it."""
    return "–" if value is None else f"{value:.1%}"


def percent_note(statistic: Mapping[str, Any]) -> str:
    """A share's interval, or why there is none."""
    low, high = statistic.get("low"), statistic.get("high")
    return f"{low:.1%} to {high:.1%}" if low is not None and high is not None else cell_note(statistic)


def headline_table(reports: Mapping[str, Data]) -> Table:
    """Each dictionary and, below it, parts of it and its nulls; a column per headline metric."""
    columns = [name for name in HEADLINE if any(name in r["metrics"] for r in reports.values())]
    table = Table(["", *columns], [], [])
    for title, data in reports.items():
        for arm, statistics in arms_of(data):
            found = [statistics.get(name) for name in columns]
            table.rows.append(
                [
                    title
                    if arm == "dictionary"
                    else f"{'part' if arm in data.get('parts', {}) else 'null'}: {arm}"
                ]
                + [number(s["value"]) if s else "" for s in found]
            )
            table.notes.append([""] + [cell_note(s) if s else "" for s in found])
    return table


def group_table(groups: Mapping[str, Data]) -> Table:
    """A row per language, source, or value of a tag, and below it one for each null."""
    table = Table(["", "documents", "rows", *GROUPED], [], [])
    for name, group in groups.items():
        arms = {name: group["metrics"]} | {
            f"null: {null}": own for null, own in group.get("nulls", {}).items()
        }
        for title, metrics in arms.items():
            own = title == name
            found = [metrics.get(column) for column in GROUPED]
            counts = [f"{group['n_documents']:,}", f"{group['n_rows']:,}"] if own else ["", ""]
            table.rows.append([title, *counts, *(number(s["value"]) if s else "" for s in found)])
            table.notes.append(["", "", "", *(cell_note(s) if s else "" for s in found)])
    return table


def density_table(arms: Mapping[str, Data]) -> Table | None:
    """How often latents are active, and how many at once; None where that was not counted, or without intervals.

    Args:
        arms: By title, what report.json and comparison.json hold as `density`.
    """
    told = {  # reports of earlier versions have plain numbers, or none
        title: own
        for title, own in arms.items()
        if own.get("shares") and all(isinstance(one, Mapping) for one in own["shares"].values())
    }
    if not told:
        return None
    first = next(iter(told.values()))
    heads = [name.replace("_", " ") for name in first["shares"]]
    heads += [f"l0, {float(share):.0%}" for share in first["l0_quantiles"]]
    table = Table(["", *heads], [], [])
    for title, own in told.items():
        shares, quantiles = own["shares"].values(), own["l0_quantiles"].values()
        table.rows.append(
            [title, *(percent(one["value"]) for one in shares), *(number(one["value"]) for one in quantiles)]
        )
        table.notes.append(["", *map(percent_note, shares), *map(cell_note, quantiles)])
    return table


def markdown_table(table: Table) -> str:
    """As a Markdown table."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    for cells, notes in zip(table.rows, table.notes, strict=True):
        joined = [f"{c} ({n})" if n else c for c, n in zip(cells, notes, strict=True)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in joined) + " |")
    return "\n".join(lines)


def html_table(table: Table) -> str:
    """As an HTML table."""
    head = "".join(
        f"<th title='{html.escape(MEANINGS.get(c, ''))}'>{html.escape(c)}</th>" for c in table.columns
    )
    body = []
    for cells, notes in zip(table.rows, table.notes, strict=True):
        kind = " class='null'" if cells[0].startswith("null: ") else ""
        inner = "".join(
            f"<td>{html.escape(c)}" + (f"<small>{html.escape(n)}</small>" if n else "") + "</td>"
            for c, n in zip(cells, notes, strict=True)
        )
        body.append(f"<tr{kind}>{inner}</tr>")
    return (
        f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def csv_of(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines of one set of columns as CSV; what is None is left empty."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        return f'"{value}"' if isinstance(value, str) else f"{value:g}"

    names = list(lines[0])
    rows = [",".join(names), *(",".join(cell(line[name]) for name in names) for line in lines)]
    return "\n".join(rows) + "\n"
