"""Plots of a comparison: every arm, frontiers, sizes, densities, directions. Knows the layout of comparison.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from sememe.figures.data import Data
from sememe.figures.plots import dots_plot
from sememe.figures.tables import BETTER, MEANINGS

__all__ = ["density_plot", "directions_plot", "frontier_plot", "rows_plot", "size_plot"]

DICTIONARY_COLOUR, NULL_COLOUR = "#1f6feb", "#8c959f"
MAX_HISTOGRAMS = 10
MAX_LABEL = 44
"""Characters of a title in a legend."""


def rows_plot(data: Data, metric: str) -> Figure | None:
    """A metric of every dictionary and null as a dot with its interval, best at the top."""
    rows = [row for row in data["rows"] if _value(row.get("metrics", {}).get(metric)) is not None]
    if not rows:
        return None
    arms = [(f"null: {row['name']}" if row["null"] else row["name"], row["metrics"][metric]) for row in rows]
    colours = {name: NULL_COLOUR if name.startswith("null: ") else DICTIONARY_COLOUR for name, _ in arms}
    title = f"{metric} ({BETTER[metric]} is better), nulls in grey"
    return dots_plot(arms, title, MEANINGS[metric], colours=colours)


def frontier_plot(data: Data, metric: str) -> Figure | None:
    """A metric against l0: a line per group through its settings, with intervals; nulls dashed."""
    groups = {
        group: [p for p in one["points"] if _value(p.get(metric)) is not None and _value(p["l0"])]
        for group, one in data["frontiers"].items()
    }
    groups = {group: points for group, points in groups.items() if points}
    if not groups:
        return None
    figure = Figure(figsize=(6.4, 4.0 + 0.2 * max(0, len(groups) - 6)), layout="constrained")
    axes = figure.add_subplot()
    values = [_value(p[metric]) or 0.0 for points in groups.values() for p in points]
    for (group, points), colour in zip(groups.items(), _colours(groups), strict=True):
        null = group.startswith("null: ")
        l0 = [_value(p["l0"]) or 0.0 for p in points]
        value = [_value(p[metric]) or 0.0 for p in points]
        style: dict[str, Any] = {
            "linestyle": ":" if null else "-",
            "marker": "s" if null else "o",
            "markersize": 4.5,
        }
        axes.plot(l0, value, color=colour, linewidth=1.2, label=_short(group), **style)
        for x, p in zip(l0, points, strict=True):
            if p[metric]["low"] is not None:
                axes.plot([x, x], [p[metric]["low"], p[metric]["high"]], color=colour, linewidth=2, alpha=0.5)
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis)
    if min(values) > 0 and max(values) / min(values) > 20:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    axes.set_xlabel("l0: latents active per token")
    axes.set_ylabel(f"{metric}, {BETTER[metric]} is better")
    axes.set_title(f"{metric} against sparsity")
    axes.grid()
    axes.set_axisbelow(True)
    axes.legend(fontsize=7.5, ncols=2 if len(groups) > 6 else 1)
    return figure


def size_plot(data: Data) -> Figure | None:
    """Perplexity under reconstruction against the number of latents, where a kind has three sizes or more."""
    by_kind: dict[str, list[tuple[int, Data]]] = {}
    for row in data["rows"]:
        if not row["null"] and _value(row.get("metrics", {}).get("perplexity")) is not None:
            about = row["description"]
            title = f"{about['kind']} {row['setting']}".strip()
            by_kind.setdefault(title, []).append((about["d_sae"], row["metrics"]["perplexity"]))
    lines = {kind: sorted(own, key=lambda item: item[0]) for kind, own in by_kind.items()}
    lines = {kind: own for kind, own in lines.items() if len({size for size, _ in own}) >= 3}
    if not lines:
        return None
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for (kind, own), colour in zip(lines.items(), _colours(lines), strict=True):
        sizes = [size for size, _ in own]
        axes.plot(sizes, [one["value"] for _, one in own], "o-", color=colour, label=kind, linewidth=1.2)
        for size, one in own:
            if one["low"] is not None:
                axes.plot([size, size], [one["low"], one["high"]], color=colour, linewidth=2, alpha=0.4)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("latents")
    axes.set_ylabel("perplexity, lower is better")
    axes.set_title("Perplexity under reconstruction against size")
    axes.grid()
    axes.set_axisbelow(True)
    axes.legend(fontsize=8.5)
    return figure


def density_plot(data: Data) -> Figure | None:
    """Latents per density of the first dictionaries, each its own line."""
    rows = [row for row in data["rows"] if row.get("density") and not row["null"]][:MAX_HISTOGRAMS]
    if not rows:
        return None
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for row, colour in zip(rows, _colours(rows), strict=True):
        histogram = row["density"]
        counts = np.array(histogram["counts"]) / max(row["description"]["d_sae"], 1)
        label = f"{row['name']} ({histogram['n_silent']:,} silent)"
        axes.stairs(counts, histogram["edges"], color=colour, linewidth=1.3, label=label)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("density: share of tokens on which a latent is active")
    axes.set_ylabel("share of the latents")
    axes.set_title("How often latents are active")
    axes.legend(fontsize=7.5)
    return figure


def directions_plot(data: Data) -> Figure | None:
    """mmcs of every dictionary to every other as a heat map."""
    directions = data["directions"]
    names, n = directions["names"], len(directions["names"])
    mmcs = np.array(
        [
            [one["value"] for one in (*row, random)]
            for row, random in zip(directions["mmcs"], directions["random"], strict=True)
        ]
    )
    if n < 2:
        return None
    side = max(3.2, 0.42 * n + 1.8)
    figure = Figure(figsize=(min(side + 1.4, 12), min(side, 11)), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(mmcs, cmap="viridis", vmin=0, vmax=1)
    axes.axvline(n - 0.5, color="white", linewidth=2)
    axes.set_xticks(range(n + 1), [*names, "random directions"], rotation=60, ha="right", fontsize=7.5)
    axes.set_yticks(range(n), names, fontsize=7.5)
    if n <= 16:
        for i in range(n):
            for j in range(n + 1):
                colour = "white" if mmcs[i, j] < 0.6 else "black"
                axes.text(j, i, f"{mmcs[i, j]:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(shown, ax=axes, shrink=0.8)
    axes.set_title("mmcs of row in column")
    return figure


def _short(title: str) -> str:
    """A title that fits into a legend."""
    return title if len(title) <= MAX_LABEL else title[: MAX_LABEL - 1] + "\u2026"


def _plain_ticks(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axis.set_tick_params(which="minor", labelsize=7.5)


def _colours(things: Sequence[Any] | Mapping[str, Any]) -> list[Any]:
    palette = mpl.colormaps["tab10" if len(things) <= 10 else "tab20"]
    return [palette(index % palette.N) for index in range(len(things))]


def _value(statistic: Data | None) -> float | None:
    value = None if statistic is None else statistic["value"]
    return value if value is None or math.isfinite(value) else None
