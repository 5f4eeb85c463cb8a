"""Where latents lie, as people look at it: plots, tables, one page. Knows the layout of geometry.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Shaped
from matplotlib.figure import Figure

from sememe.figures.data import Data, number
from sememe.figures.document import Document
from sememe.figures.plots import STYLE, svg
from sememe.figures.tables import Table, cell_note, percent, percent_note

__all__ = ["write_geometry"]

Columns = Mapping[str, Shaped[np.ndarray, " latents"]]
Section = tuple[str, Table, str]
"""A heading, what stands below it, and what it means."""

MAX_POINTS = 20_000
"""Latents drawn in a scatter plot; of more, every n-th."""
MAX_DRAWN = 4
"""Dictionaries, and pairs of them, that get plots of their own."""
DOTS: dict[str, Any] = {"linestyle": "", "marker": ".", "markersize": 3, "alpha": 0.6, "rasterized": True}
CLASSES = (("dense", "#8c959f"), ("ten-sparse", "#d1730b"), ("one-sparse", "#1f6feb"))
BLUE, GREY, GREEN, RED = "#1f6feb", "#8c959f", "#1a7f37", "#cf222e"
MEANINGS = {
    "kurtosis": "of a direction's entries: 3 for random ones, more where a few neurons stand out",
    "skew": "of a direction's entries: 0 for random ones",
    "effective_neurons": "over how many neurons a direction is spread",
    "capacity": "how much of a dimension a latent has to itself: 1 if no other direction overlaps",
    "top_1": "share of a direction's square in its largest neuron",
    "next_9": "share in the nine after it",
    "share_one_sparse": "latents that are about one neuron (top_1 > 0.35, next_9 < 0.1)",
    "share_ten_sparse": "latents that are about ten neurons (their share > 0.35, and not one)",
    "share_dense": "the other latents",
    "encoder_decoder_cosine": "how much a latent reads along what it writes",
    "decoder_norm": "length of what a latent writes",
    "density": "share of the rows on which a latent is active",
    "embedding_cosine": "to the nearest row of the embedding, centred",
    "unembedding_cosine": "to the nearest row of the unembedding, centred",
    "null_space_share": "share of a direction's square that the output projection maps to nothing",
}


def write_geometry(folder: Path, data: Data, columns: Mapping[str, Columns]) -> None:
    """geometry.html, geometry.md and its plots.

    Args:
        folder: Where to write.
        data: geometry.json.
        columns: Each dictionary's numbers by latent.
    """
    with mpl.rc_context(STYLE):
        drawn = {name: svg(figure, f"geometry-{name}") for name, figure in _plots(data, columns).items()}
    names = [row["name"] for row in data["rows"]]
    of = ", ".join(names) if len(names) <= MAX_DRAWN else f"{len(names)} dictionaries"
    document = Document(folder, f"Where latents lie: {of}")
    for notice in data["notices"]:
        document.text(notice)
    document.plots(drawn)
    for heading, table, meaning in _sections(data):
        document.heading(heading)
        document.table(table)
        document.legend(meaning)
    document.write("geometry")


# -- plots ---------------------------------------------------------------------------------------------------------


def _plots(data: Data, columns: Mapping[str, Columns]) -> dict[str, Figure]:
    found = {}
    for number_, row in enumerate(data["rows"][:MAX_DRAWN]):
        own = columns[row["name"]]
        if "class" in own:
            found[f"neurons-{number_}"] = _neurons_plot(row, own)
        found[f"kurtosis-{number_}"] = _kurtosis_plot(row, own)
        if "density" in own and "encoder_decoder_cosine" in own:
            found[f"reading-{number_}"] = _reading_plot(row, own)
        if "history" in row:
            found[f"history-{number_}"] = _history_plot(row)
    for number_, pair in enumerate(data["pairs"][:MAX_DRAWN]):
        found[f"pair-{number_}"] = _pair_plot(pair)
    return found


def _axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(
        figsize=(6.4, 3.6), dpi=180, layout="constrained"
    )  # dpi: of scatter plots, which are pictures
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid()
    axes.set_axisbelow(True)
    return figure, axes


def _some(n: int) -> slice:
    return slice(None, None, -(-n // MAX_POINTS))


def _neurons_plot(row: Data, own: Columns) -> Figure:
    """Nanda's scatter plot: the largest neuron's share against that of the nine after it."""
    figure, axes = _axes(
        f"{row['name']}: one neuron, ten, or many",
        "share of the square in the largest neuron",
        "share in the nine after it",
    )
    take = _some(row["d_sae"])
    for kind, (label, colour) in enumerate(CLASSES):
        inside = own["class"][take] == kind
        share = row["numbers"][f"share_{label.replace('-', '_')}"]["value"]
        dots = own["top_1"][take][inside], own["next_9"][take][inside]
        axes.plot(*dots, **DOTS, color=colour, label=f"{label}: {share:.1%}")
    axes.plot([0.35, 0.35], [0, 0.1], color="#24292f", linewidth=0.8, linestyle=":")
    axes.plot([0.35, 1], [0.1, 0.1], color="#24292f", linewidth=0.8, linestyle=":")
    axes.plot([0, 0.35], [0.35, 0], color="#24292f", linewidth=0.8, linestyle=":")
    random = (row["numbers"]["top_1"]["random"], row["numbers"]["next_9"]["random"])
    axes.plot(*random, "x", color=RED, markersize=8, label="random directions, mean")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, max(0.6, float(own["next_9"].max()) * 1.05))
    axes.legend(fontsize=8.5, markerscale=1.6)
    return figure


def _kurtosis_plot(row: Data, own: Columns) -> Figure:
    figure, axes = _axes(
        f"{row['name']}: how directions stand out", "kurtosis of a direction's entries", "latents"
    )
    values = own["kurtosis"][np.isfinite(own["kurtosis"])]
    if values.size and values.min() > 0:
        axes.hist(values, bins=np.geomspace(values.min(), values.max() * 1.001, 50), color=BLUE, alpha=0.7)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    random = row["numbers"]["kurtosis"]["random"]
    axes.axvline(
        random, color=RED, linewidth=1.2, linestyle="--", label=f"random directions: {number(random)}"
    )
    axes.legend(fontsize=8.5)
    return figure


def _reading_plot(row: Data, own: Columns) -> Figure:
    figure, axes = _axes(
        f"{row['name']}: rare latents and what they read",
        "density: share of rows on which a latent is active",
        "cosine of encoder and decoder",
    )
    take = _some(row["d_sae"])
    density = own["density"][take]
    dots = density[density > 0], own["encoder_decoder_cosine"][take][density > 0]
    axes.plot(*dots, **DOTS, color=BLUE)
    if (density > 0).any():
        axes.set_xscale("log")
    if "rare" in row:
        axes.axvline(
            row["rare"]["below"], color="#24292f", linewidth=0.8, linestyle=":", label="rare below this"
        )
        axes.legend(fontsize=8.5)
    return figure


def _history_plot(row: Data) -> Figure:
    past = row["history"]
    figure, axes = _axes(
        f"{row['name']}: latents over training", "step", "cosine to itself one checkpoint before"
    )
    steps, q = past["steps"][1:], past["quantiles"]
    axes.fill_between(steps, q["0.05"], q["0.95"], color=BLUE, alpha=0.15, label="5% to 95% of the latents")
    axes.fill_between(steps, q["0.25"], q["0.75"], color=BLUE, alpha=0.3, label="middle half")
    axes.plot(steps, q["0.5"], "o-", color=BLUE, linewidth=1.3, markersize=3, label="median")
    for level in (0.9, 0.6):
        axes.axhline(level, color="#24292f", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(top=1.02)
    axes.legend(fontsize=8.5)
    return figure


def _pair_plot(pair: Data) -> Figure:
    figure, axes = _axes(f"{pair['small']} in {pair['large']}", "cosine of a latent and its match", "latents")
    for name, colour, label in (
        ("mmcs_small_to_large", BLUE, "at best"),
        ("matched_cosine", GREEN, "one to one"),
    ):
        one = pair[name]
        histogram = one["histogram"]
        axes.stairs(
            histogram["counts"],
            histogram["edges"],
            color=colour,
            linewidth=1.6,
            label=f"{label}: mean {number(one['value'])}, random {number(one['random'])}",
        )
    counts = np.array(pair["mmcs_small_to_large"]["histogram"]["counts"]) + np.array(
        pair["matched_cosine"]["histogram"]["counts"]
    )
    axes.set_xlim(left=pair["matched_cosine"]["histogram"]["edges"][int(np.argmax(counts > 0))], right=1.02)
    axes.legend(fontsize=8.5)
    return figure


# -- tables --------------------------------------------------------------------------------------------------------


def _sections(data: Data) -> list[Section]:
    rows = data["rows"]
    found: list[Section] = [("Means over latents", _numbers_table(rows), _meanings(rows))]
    if any("rare" in row for row in rows):
        found.append(("The rare cluster", _rare_table(data), RARE))
    if any(row.get("correlations") for row in rows):
        found.append(("Correlations", _correlations_table(rows), CORRELATIONS))
    if any("history" in row for row in rows):
        found.append(("Over training", _history_table(rows), HISTORY))
    if data["pairs"]:
        found.append(("Two by two", _pairs_table(data["pairs"]), PAIRS))
        found += [
            (f"Split: {pair['small']} in {pair['large']}", _splits_table(pair), SPLITS)
            for pair in data["pairs"][:MAX_DRAWN]
            if pair["splits"]["n"]
        ]
    found += [
        (f"Nearest to the probe: {row['name']}", _probe_table(row), PROBE) for row in rows if "probe" in row
    ]
    return found


RARE = (
    "Latents active on fewer rows than the threshold; of these, how many read one direction (cosine above 0.95 with "
    "their mean), and of those how many write one; the cosine of that direction to the other dictionaries'. Under each "
    "number: its 95% interval over latents. random: of the shares, as many random directions of which as many are "
    "active on each row; of the others, as many latents drawn from those that are not rare, 20 times."
)
CORRELATIONS = (
    "Of the latents that write most, of as many neurons of the largest variance, and of as many random directions (the "
    "null): the mean of |correlation| over pairs, and the share of the pairs below 0.05, with intervals from drawing "
    "the coordinates again. The fewer correlations, the sparser the covariance."
)
HISTORY = (
    "Share of the latents whose cosine to themselves one checkpoint before ever reached 0.9, and of those that fell "
    "below 0.6 after that; 95% intervals over latents. random: directions drawn anew at each checkpoint."
)
PAIRS = (
    "mmcs: mean over latents of the largest cosine with any of the other's; matched: one to one, with the largest sum "
    "of cosines. random: the same against as many random directions. split: latents of the smaller dictionary that two "
    "or more of the larger one are nearest to, with a cosine of at least 0.5. Under each number: its 95% interval over "
    "latents."
)
SPLITS = "Latents of the smaller dictionary, and those of the larger that are nearest to them, closest first."
PROBE = "By cosine; random: the largest cosine that as many random directions have."


def _numbers_table(rows: list[Data]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row["numbers"]))
    table = Table(["", *(cell for row in rows for cell in (row["name"], "random"))], [], [])
    for name in names:
        cells, notes = [name], [""]
        for row in rows:
            one = row["numbers"].get(name)
            cells += ["", ""] if one is None else [number(one["value"]), _or_dash(one["random"])]
            notes += ["", ""] if one is None else [cell_note(one), ""]
        table.rows.append(cells)
        table.notes.append(notes)
    outliers = [
        ", ".join(map(str, row[key][:8])) or "none"
        for row in rows
        for key in ("outlier_dimensions", "random_outlier_dimensions")
    ]
    table.rows.append(["outlier dimensions", *outliers])
    table.notes.append([""] * (1 + 2 * len(rows)))
    return table


def _or_dash(value: float | None) -> str:
    return "–" if value is None else number(value)


def _meanings(rows: list[Data]) -> str:
    names = dict.fromkeys(name for row in rows for name in row["numbers"])
    return (
        "Under each number: its 95% interval over latents; beside it what random directions have. "
        + " ".join(f"{name}: {MEANINGS[name]}." for name in names if name in MEANINGS)
        + " outlier dimensions: with more than 6 times the median dimension's mean square."
    )


def _rare_table(data: Data) -> Table:
    other = data["rare_agreement"] or {"names": [], "cosines": []}
    names = other["names"] if len(other["names"]) > 1 else []
    keys = ("share", "silent", "encoders_coincide", "decoders_coincide")
    heads = ["rare", "never active", "read one direction", "write one"]
    columns = [cell for head in heads for cell in (head, "random")]
    table = Table(["", "", *columns, *(f"cosine to {name}" for name in names)], [], [])
    for row in data["rows"]:
        if "rare" not in row:
            continue
        one = row["rare"]
        cells = [row["name"], f"{one['n']:,} below {one['below']:g}"]
        notes = ["", f"{one['n_coincide']:,} coincide"]
        for key in keys:
            cells += [percent(one[key]["value"]), percent(one[key]["random"])]
            notes += [percent_note(one[key]), ""]
        at = names.index(row["name"]) if row["name"] in names else None
        cosines = [None] * len(names) if at is None else other["cosines"][at]
        cells += ["" if cosine is None else number(cosine["value"]) for cosine in cosines]
        notes += [
            "" if cosine is None or cosine["random"] is None else _beside_random(cosine) for cosine in cosines
        ]
        table.rows.append(cells)
        table.notes.append(notes)
    return table


def _beside_random(one: Data) -> str:
    return f"{cell_note(one)}; random {number(one['random'])}".removeprefix("; ")


def _correlations_table(rows: list[Data]) -> Table:
    arms = next(list(row["correlations"]) for row in rows if row.get("correlations"))
    heads = [f"{arm.replace('_', ' ')}: {what}" for arm in arms for what in ("mean", "share below 0.05")]
    table = Table(["", *heads], [], [])
    for row in rows:
        if row.get("correlations"):
            found = [
                row["correlations"][arm][key] for arm in arms for key in ("mean_absolute", "share_small")
            ]
            table.rows.append([row["name"], *(number(one["value"]) for one in found)])
            table.notes.append(["", *map(cell_note, found)])
    return table


def _history_table(rows: list[Data]) -> Table:
    heads = ["checkpoints", "latents"]
    heads += [
        cell for head in ("reached 0.9", "then below 0.6", "mean at the end") for cell in (head, "random")
    ]
    table = Table(["", *heads, "spread of random cosines"], [], [])
    for row in rows:
        if "history" in row:
            past = row["history"]
            cells = [row["name"], str(len(past["steps"])), f"{past['n_latents']:,}"]
            notes = ["", "", ""]
            for key in ("reached_0.9", "fell_below_0.6"):
                cells += [percent(past[key]["value"]), percent(past[key]["random"])]
                notes += [percent_note(past[key]), ""]
            last = past["mean"][-1]
            cells += [number(last["value"]), number(last["random"]), number(past["random_spread"])]
            table.rows.append(cells)
            table.notes.append([*notes, cell_note(last), "", ""])
    return table


def _pairs_table(pairs: list[Data]) -> Table:
    keys = ("mmcs_small_to_large", "mmcs_large_to_small", "matched_cosine")
    heads = [
        cell for key in keys for cell in (key.replace("_", " "), "random", "above 0.9", "random above 0.9")
    ]
    table = Table(["", *heads, "split", "random split"], [], [])
    for pair in pairs:
        cells, notes = [f"{pair['small']} in {pair['large']}"], [""]
        for key in keys:
            one = pair[key]
            above = one["share_above_0.9"]
            cells += [number(one["value"]), number(one["random"])]
            cells += [percent(above["value"]), percent(above["random"])]
            notes += [cell_note(one), "", percent_note(above), ""]
        split = pair["splits"]["share"]
        cells += [f"{pair['splits']['n']:,} ({percent(split['value'])})", percent(split["random"])]
        table.rows.append(cells)
        table.notes.append([*notes, percent_note(split), ""])
    return table


def _splits_table(pair: Data) -> Table:
    table = Table(["latent", "children"], [], [])
    for one in pair["splits"]["most"]:
        children = one["children"]
        shown = ", ".join(map(str, children[:12])) + (
            f" and {len(children) - 12} more" if len(children) > 12 else ""
        )
        table.rows.append([str(one["latent"]), shown])
        table.notes.append(["", ""])
    return table


def _probe_table(row: Data) -> Table:
    table = Table(["latent", "cosine"], [], [])
    for one in row["probe"]["nearest"]:
        table.rows.append([str(one["latent"]), number(one["cosine"])])
        table.notes.append(["", ""])
    table.rows.append(["null: random", number(row["probe"]["random"])])
    table.notes.append(["", ""])
    return table
