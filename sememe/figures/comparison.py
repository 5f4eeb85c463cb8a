"""A comparison as people read it: which differences are real, frontiers, tables, one page and one CSV.

Knows the layout of comparison.json and nothing about how its numbers were made.
"""

from __future__ import annotations

import csv
import html
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from sememe.figures.comparison_plots import (
    density_plot,
    directions_plot,
    frontier_plot,
    rows_plot,
    size_plot,
)
from sememe.figures.data import HEADLINE, Data, number
from sememe.figures.frame import attributions, credit, page
from sememe.figures.plots import STYLE, svg
from sememe.figures.tables import (
    BETTER,
    DENSITIES,
    MEANINGS,
    Table,
    cell_note,
    density_table,
    html_table,
    markdown_table,
    percent,
    percent_note,
)

__all__ = ["comparison_sections", "write_comparison", "write_rows"]

FRONTIERS = ("fvu", "ce_increase", "ce_recovered_mean")
"""Metrics drawn against l0."""
TOLD = ("fvu", "ce_increase")
"""Metrics whose differences are told in words."""
MAX_SENTENCES = 12
MAX_VALUES = 12
"""Languages, sources or values of a tag that have a column."""
MAX_DIRECTIONS = 16
"""Dictionaries whose mmcs to one another are printed as a table."""
COLUMNS = (*HEADLINE, "perplexity")

MARKS_MUELLER = (
    ("0_8192", 0, 0.056, 6.132, 9.951, 0.998, 0.984),
    ("0_8192", 1, 0.089, 6.677, 44.739, 0.887, 0.924),
    ("0_8192", 2, 0.108, 11.44, 62.156, 0.587, 0.867),
    ("0_8192", 3, 0.135, 23.773, 175.303, 0.588, 0.902),
    ("0_8192", 4, 0.148, 27.084, 174.07, 0.806, 0.927),
    ("0_8192", 5, 0.179, 47.126, 235.05, 0.672, 0.972),
    ("1_32768", 0, 0.09, 4.32, 2.873, 0.174, 0.946),
    ("1_32768", 1, 0.13, 2.798, 11.256, 0.159, 0.768),
    ("1_32768", 2, 0.152, 6.151, 16.381, 0.118, 0.724),
    ("1_32768", 3, 0.211, 11.571, 39.863, 0.226, 0.765),
    ("1_32768", 4, 0.222, 13.665, 29.235, 0.19, 0.816),
    ("1_32768", 5, 0.265, 26.4, 43.846, 0.13, 0.931),
)
"""Dictionaries of pythia-70m-deduped's MLP outputs as their authors printed them: layer, rmse (which they call MSE: it
is the root), l1, l0, share alive on 8,192 tokens, share of the loss recovered from zero ablation.

Source: Marks & Mueller, the table of the repository dictionary_learning (December 2023)."""
Section = tuple[str, str, str]
"""A title, and what stands below it in Markdown and in HTML."""
THEIR_COLUMNS = ("rmse", "l1", "l0", "frac_alive_8192", "ce_recovered_zero")


def write_comparison(folder: Path, data: Data) -> None:
    """comparison.html, which holds everything itself, comparison.md with its plots beside it, and comparison.csv.

    Args:
        folder: Where to write.
        data: comparison.json.
    """
    (folder / "figures").mkdir(exist_ok=True)
    markdown, body = ["# Dictionaries compared", ""], []
    for notice in data["notices"]:
        markdown += [f"> {notice}", ""]
        body.append(f"<p class='legend'>{html.escape(notice)}</p>")
    makers: dict[str, Callable[[], Figure | None]] = {
        **{name: partial(rows_plot, data, name) for name in TOLD},
        **{f"frontier_{name}": partial(frontier_plot, data, name) for name in FRONTIERS},
        "size": partial(size_plot, data),
        "density": partial(density_plot, data),
        "mmcs": partial(directions_plot, data),
    }
    tables = _tables(data)
    sections = [*_drawn(makers, folder), *tables[:1], *_told(data), *tables[1:]]
    for title, in_markdown, in_html in sections:
        if title:
            markdown += [f"## {title}", ""]
            body.append(f"<h2>{html.escape(title)}</h2>")
        markdown += [in_markdown, ""]
        body.append(in_html)
    lines = attributions([data])
    if lines:
        markdown += ["**Text**", "", *(f"- {text} {url}".rstrip() for text, url in lines), ""]
        body.append("<h3>Text</h3><ul class='credits'>" + "".join(credit(*line) for line in lines) + "</ul>")
    (folder / "comparison.md").write_text("\n".join(markdown), encoding="utf-8")
    (folder / "comparison.html").write_text(page("Dictionaries compared", "\n".join(body)), encoding="utf-8")
    write_rows(folder / "comparison.csv", data)


def comparison_sections(compared: Data, folder: Path) -> list[Section]:
    """Which differences are real, and the frontiers, of reports; their plots are written into figures/.

    Args:
        compared: `frontier.summary` of them.
        folder: Of the page.
    """
    makers = {f"frontier_{name}": partial(frontier_plot, compared, name) for name in FRONTIERS}
    return [*_told(compared), *_drawn(makers, folder)]


# -- in words ------------------------------------------------------------------------------------------------------


def _told(data: Data) -> list[Section]:
    """For each metric, how the best group compares with every other, and which difference is real."""
    found: list[Section] = []
    for metric in TOLD:
        mine = [one for one in data["differences"] if one["metric"] == metric and not _about_null(one)]
        if not mine:
            continue
        best = _best([one for one in mine if one["difference"] is not None], BETTER[metric])
        shown = [one for one in mine if best in (None, one["a"], one["b"])]
        shown.sort(key=lambda one: (one["difference"] is None, not one["real"], -abs(one["difference"] or 0)))
        sentences = [one["sentence"] for one in shown[:MAX_SENTENCES]]
        rest = len(mine) - len(sentences)
        if rest:
            sentences.append(f"{rest:,} more pairs are in comparison.json.")
        title = f"{metric}: which differences are real"
        items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
        found.append((title, "\n".join(f"- {sentence}" for sentence in sentences), f"<ul>{items}</ul>"))
    return found


def _about_null(difference: Data) -> bool:
    return any(str(difference[side]).startswith("null: ") for side in ("a", "b"))


def _best(differences: Sequence[Data], better: str) -> str | None:
    """The group that wins most of its comparisons."""
    wins: dict[str, int] = {}
    for one in differences:
        a_wins = (one["difference"] < 0) == (better == "lower")
        for group, won in ((one["a"], a_wins), (one["b"], not a_wins)):
            wins[group] = wins.get(group, 0) + (1 if won else -1)
    return max(wins, key=lambda group: wins[group]) if wins else None


# -- in pictures ---------------------------------------------------------------------------------------------------


def _drawn(makers: Mapping[str, Callable[[], Figure | None]], folder: Path) -> list[Section]:
    """Every plot there is something for."""
    with mpl.rc_context(STYLE):
        made = {name: maker() for name, maker in makers.items()}
    drawn = {name: svg(figure, f"comparison-{name}") for name, figure in made.items() if figure is not None}
    for name, text in drawn.items():
        (folder / "figures" / f"{name}.svg").write_text(text, encoding="utf-8")
    in_html = (
        "<div class='plots'>" + "".join(f"<figure>{text}</figure>" for text in drawn.values()) + "</div>"
    )
    return [("", "\n\n".join(f"![{name}](figures/{name}.svg)" for name in drawn), in_html)] if drawn else []


# -- in tables -----------------------------------------------------------------------------------------------------


def _tables(data: Data) -> list[Section]:
    found: list[Section] = []
    measured = [row for row in data["rows"] if row.get("metrics")]
    if measured:
        table = _main_table(measured)
        legend = (
            "Beside or under each number: its 95% bootstrap interval over documents, the same draws in every row. "
            + " ".join(f"{name}: {MEANINGS[name]}." for name in COLUMNS if name in MEANINGS)
        )
        in_html = html_table(table) + f"<p class='legend'>{html.escape(legend)}</p>"
        found.append(("On held-out documents", f"{markdown_table(table)}\n\n{legend}", in_html))
        areas = _area_table(data["frontiers"])
        if areas is not None:
            low, high = _common(data["frontiers"])
            title = f"Means over the l0 that these share, {number(low)} to {number(high)}"
            why = " ".join(f"Without {name}: {reason}." for name, reason in data["left_out"].items())
            in_html = html_table(areas) + (f"<p class='legend'>{html.escape(why)}</p>" if why else "")
            found.append((title, markdown_table(areas) + (f"\n\n{why}" if why else ""), in_html))
        theirs = _marks_mueller(measured)
        note = (
            "Theirs are of another model's MLP outputs (pythia-70m-deduped) and stand here for the shape. What they "
            "print as MSE is rmse, the root."
        )
        in_html = html_table(theirs) + f"<p class='legend'>{html.escape(note)}</p>"
        found.append(
            ("In the shape of Marks & Mueller's table", f"{markdown_table(theirs)}\n\n{note}", in_html)
        )
    active = density_table(
        {
            f"null: {row['name']}" if row["null"] else row["name"]: row["density"]
            for row in measured
            if row.get("density")
        }
    )
    if active is not None:
        in_html = html_table(active) + f"<p class='legend'>{html.escape(DENSITIES)}</p>"
        found.append(("How often latents are active", f"{markdown_table(active)}\n\n{DENSITIES}", in_html))
    for what, groups in (
        ("language", data["by_language"]),
        ("source", data["by_source"]),
        *data["by_tag"].items(),
    ):
        if len(groups) > 1:
            found.append(_grouped(what, groups, [row["name"] for row in data["rows"] if row["null"]]))
    if data["together"]:
        found.append(_together(data["together"]))
    found.append(_directions(data["directions"]))
    if data["pair"]:
        found += _pair(data["pair"])
    return found


def _grouped(what: str, groups: Mapping[str, Data], nulls: Sequence[str]) -> Section:
    """Every dictionary and null by language, source, or value of a tag: a column per value, the most frequent first."""
    values = sorted(groups, key=lambda value: -groups[value]["n_documents"])
    shown, in_markdown, in_html = values[:MAX_VALUES], list[str](), list[str]()
    for metric in TOLD:
        heads = [f"{value} ({groups[value]['n_documents']:,})" for value in shown]
        table = Table([metric, *heads], [], [])
        for name in dict.fromkeys(name for value in shown for name in groups[value]["arms"]):
            arms = [
                groups[value]["arms"].get(name, {"metrics": {}})["metrics"].get(metric) for value in shown
            ]
            title = f"null: {name}" if name in nulls else name
            table.rows.append([title, *(number(one["value"]) if one else "" for one in arms)])
            table.notes.append(["", *(cell_note(one) if one else "" for one in arms)])
        in_markdown.append(markdown_table(table))
        in_html.append(html_table(table))
    rest = len(values) - len(shown)
    note = "Documents in brackets; under each number its 95% interval over these." + (
        f" {rest:,} more are in comparison.json." if rest else ""
    )
    in_html.append(f"<p class='legend'>{html.escape(note)}</p>")
    return f"By {what}", "\n\n".join([*in_markdown, note]), "".join(in_html)


def _directions(data: Data) -> Section:
    """mmcs and shares of each dictionary in each other, and where each is found best."""
    names = data["names"]
    table = Table(["", "", *names, "random"], [], [])
    for key, title, shown, note in (
        ("mmcs", "mmcs", number, cell_note),
        ("share_above_0.9", "above 0.9", percent, percent_note),
    ):
        random = data["random" if key == "mmcs" else f"random_{key}"]
        for name, row, chance in zip(names, data[key], random, strict=True):
            table.rows.append([name, title, *(shown(one["value"]) for one in (*row, chance))])
            table.notes.append(["", "", *(note(one) for one in (*row, chance))])
    lead = (
        "How much of the row's latents the column holds: the mean of their largest cosine with any of its latents, and "
        "the share of them for which that exceeds 0.9, each with its 95% interval over those. random: as many "
        "random directions as the widest dictionary has latents. A wider dictionary holds more by chance, too."
    )
    sentences = [one["sentence"] for one in data["differences"]]
    rest = len(sentences) - MAX_SENTENCES
    sentences = sentences[:MAX_SENTENCES] + ([f"{rest:,} more are in comparison.json."] if rest > 0 else [])
    if len(names) > MAX_DIRECTIONS:
        lead, table = lead + " The table of so many is in comparison.json.", Table([], [], [])
    in_markdown = [
        lead,
        markdown_table(table) if table.rows else "",
        "\n".join(f"- {one}" for one in sentences),
    ]
    items = "".join(f"<li>{html.escape(one)}</li>" for one in sentences)
    in_html = f"<p class='legend'>{html.escape(lead)}</p>" + (html_table(table) if table.rows else "")
    return (
        "Whose latents are in whom",
        "\n\n".join(part for part in in_markdown if part),
        in_html + (f"<ul>{items}</ul>" if items else ""),
    )


def _together(data: Data) -> Section:
    """All dictionaries spliced in at once."""
    columns = [name for name in COLUMNS if name in data["metrics"]]
    table = Table(["", *columns], [], [])
    table.rows.append(["together", *(number(data["metrics"][name]["value"]) for name in columns)])
    table.notes.append(["", *(cell_note(data["metrics"][name]) for name in columns)])
    note = f"At {', '.join(data['hookpoints'])}: each reads what those below it left."
    return (
        "All spliced in at once",
        f"{markdown_table(table)}\n\n{note}",
        f"{html_table(table)}<p class='legend'>{html.escape(note)}</p>",
    )


def _main_table(rows: Sequence[Data]) -> Table:
    columns = [name for name in COLUMNS if any(name in row["metrics"] for row in rows)]
    table = Table(["", "group", "latents", *columns], [], [])
    for row in rows:
        found = [row["metrics"].get(name) for name in columns]
        name = f"null: {row['name']}" if row["null"] else row["name"]
        own = [name, row["group"], f"{row['description']['d_sae']:,}"]
        table.rows.append(own + [number(one["value"]) if one else "" for one in found])
        table.notes.append(["", row["setting"], ""] + [cell_note(one) if one else "" for one in found])
    return table


def _area_table(frontiers: Mapping[str, Data]) -> Table | None:
    """Each group's metrics, averaged along its frontier: the area under it over its width."""
    names = [name for name in BETTER if any(name in one["mean_over_common_l0"] for one in frontiers.values())]
    if not names:
        return None
    table = Table(["", *names], [], [])
    for group, one in frontiers.items():
        if not one["mean_over_common_l0"]:
            continue
        found = [one["mean_over_common_l0"].get(name) for name in names]
        table.rows.append([group] + [number(value["value"]) if value else "" for value in found])
        table.notes.append([""] + [cell_note(value) if value else "" for value in found])
    return table


def _common(frontiers: Mapping[str, Data]) -> tuple[float, float]:
    one = next(one for one in frontiers.values() if one["mean_over_common_l0"])
    return one["l0_from"], one["l0_to"]


def _marks_mueller(rows: Sequence[Data]) -> Table:
    """Ours by hookpoint in the columns of Marks & Mueller, then their twelve rows."""
    table = Table(["", "place", *THEIR_COLUMNS, "target_norm"], [], [])
    for row in rows:
        if row["null"]:
            continue
        found = [row["metrics"].get(name) for name in (*THEIR_COLUMNS, "target_norm")]
        place = "+".join(row["description"]["outputs"])
        table.rows.append([row["name"], place] + [number(one["value"]) if one else "" for one in found])
        table.notes.append(["", ""] + [cell_note(one) if one else "" for one in found])
    for name, layer, *values in MARKS_MUELLER:
        table.rows.append(
            [f"Marks & Mueller {name}", f"mlp_out.{layer}"] + [f"{value:g}" for value in values] + [""]
        )
        table.notes.append([""] * len(table.columns))
    return table


def _pair(pair: Data) -> list[Section]:
    """Matches of two dictionaries, both ways."""
    names = {side: pair[side] for side in "ab"}
    lead = (
        f"a is {names['a']}, b is {names['b']}. Cosines are between decoder directions, signed unless a notice says "
        "otherwise. If b is the truth, a to b is a precision (how much of a is in b), b to a a recall (how much of b "
        "was found). Under each number: its 95% interval over latents; random: against as many random directions."
    )
    heads = [cell for head in ("mmcs", "median", "share above 0.9") for cell in (head, "random")]
    table = Table(["", *heads, "latents matched", "random"], [], [])
    matches: list[Section] = []
    for one, other in (("a", "b"), ("b", "a")):
        way = pair[f"{one}_to_{other}"]
        cells, notes = [f"{one} to {other}"], [""]
        for found in (pair[f"mmcs_{one}_to_{other}"], way["median_mcs"]):
            cells += [f"{found['value']:.4f}", f"{found['random']:.4f}"]
            notes += [cell_note(found), ""]
        above = way["share_above_0.9"]
        cells += [percent(above["value"]), percent(above["random"])]
        matched = (way["n_distinct_matches"], way["random_n_distinct_matches"])
        cells += [f"{n:,} of {way['n_there']:,}" for n in matched]
        table.rows.append(cells)
        table.notes.append([*notes, percent_note(above), "", "", ""])
        for which in ("best", "worst"):
            if not way[which]:
                continue
            columns = [f"latent of {one}", f"nearest of {other}", "cosine"]
            listed = [[f"{m['latent']}", f"{m['nearest']}", f"{m['cosine']:.4f}"] for m in way[which]]
            own = Table(columns, listed, [[""] * 3] * len(listed))
            title = f"{which.capitalize()} matches of {one} in {other}"
            matches.append((title, markdown_table(own), html_table(own)))
    in_html = f"<p class='legend'>{html.escape(lead)}</p>{html_table(table)}"
    return [("Matched latents", f"{lead}\n\n{markdown_table(table)}", in_html), *matches]


def write_rows(path: Path, data: Data) -> None:
    """A line per dictionary and null; for each metric its value and the ends of its interval, empty where NaN."""
    names = list(dict.fromkeys(name for row in data["rows"] for name in row.get("metrics", {})))
    fields = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "group", "setting", "null", "kind", "d_sae", *fields])
        for row in data["rows"]:
            about = row["description"]
            own = [row["name"], row["group"], row["setting"], row["null"], about["kind"], about["d_sae"]]
            for name in names:
                one = row.get("metrics", {}).get(name, {})
                own += ["" if one.get(end) is None else one[end] for end in ("value", "low", "high")]
            writer.writerow(own)
