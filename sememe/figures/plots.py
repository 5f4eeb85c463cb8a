"""Reports as plots. Knows the layout of report.json; reads and writes no file."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from sememe.figures.data import Curves, Data, arms_of, number
from sememe.figures.watched import density_map, short, watched_plot

__all__ = ["dots_plot", "frontier_plot", "plots", "svg"]

COLOURS = {
    "dictionary": "#1f6feb",
    "pca": "#d1730b",
    "untrained": "#8250df",
    "random_directions": "#bf3989",
    "identity": "#57606a",
    "ica": "#1a7f37",
    "mean": "#6e7781",
    "zero": "#24292f",
}
MAX_CURVES = 6
MAX_BINS = 80
LOGARITHMIC_FROM = 20
"""Largest over smallest value from which an axis is logarithmic."""
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#8c959f",
    "axes.labelcolor": "#424a53",
    "xtick.color": "#424a53",
    "ytick.color": "#424a53",
    "grid.color": "#d8dee4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.hashsalt": "sememe",
}


def density_plot(data: Data) -> Figure:
    """Latents per density, dictionary and nulls with as many latents as it."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for arm, histogram in data["density"].items():
        edges, counts = histogram["edges"], histogram["counts"]
        colour = COLOURS.get(arm, "#57606a")
        n_latents = sum(counts) + histogram["n_silent"] + histogram["n_below"]
        label = f"{arm} ({n_latents:,} latents, {histogram['n_silent']:,} silent)"
        axes.stairs(counts, edges, color=colour, linewidth=1.6, label=label, fill=False)
        if arm == "dictionary":
            axes.stairs(counts, edges, color=colour, alpha=0.18, fill=True)
    axes.set_xscale("log")
    axes.set_xlim(data["density"]["dictionary"]["edges"][0], 1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("density: share of tokens on which a latent is active")
    axes.set_ylabel("latents")
    axes.set_title("How often latents are active")
    axes.legend(fontsize=8.5)
    return figure


def l0_plot(data: Data) -> Figure | None:
    """Rows per number of active latents, where that differs between rows of the dictionary."""
    found = {arm: own.get("l0_histogram", ()) for arm, own in data["density"].items()}
    if len(found.get("dictionary", ())) < 2:
        return None
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    most = max(n for n, _ in found["dictionary"])
    width = -(-(most + 1) // MAX_BINS)
    edges = [width * i - 0.5 for i in range(-(-(most + 1) // width) + 1)]
    for arm, histogram in found.items():
        total = sum(count for _, count in histogram)
        shares = [0.0] * (len(edges) - 1)
        for n, count in histogram:
            if n <= most:
                shares[n // width] += count / total
        colour = COLOURS.get(arm, "#57606a")
        axes.stairs(shares, edges, color=colour, linewidth=1.6, label=arm, fill=False)
        if arm == "dictionary":
            axes.stairs(shares, edges, color=colour, alpha=0.18, fill=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("latents active on a token" + (f", in bins of {width}" if width > 1 else ""))
    axes.set_ylabel("share of tokens")
    axes.set_title("How many latents are active")
    axes.legend(fontsize=8.5)
    return figure


def arms_plot(data: Data, metric: str, title: str, label: str) -> Figure:
    """One metric of every arm as a dot with its interval, best at the top."""
    arms = [(name, stats[metric]) for name, stats in arms_of(data) if metric in stats]
    arms += [(f"{n} ablation", s[metric]) for n, s in data["ablations"].items() if metric in s]
    return dots_plot(arms, title, label)


def groups_plot(groups: Mapping[str, Data], metric: str, title: str, label: str) -> Figure:
    """One metric of the dictionary per language or source."""
    return dots_plot([(n, g["metrics"][metric]) for n, g in groups.items()], title, label, colour="#1f6feb")


def dots_plot(
    arms: Iterable[tuple[str, Mapping[str, Any]]],
    title: str,
    label: str,
    colour: str | None = None,
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """Each arm's number as a dot with its interval, largest at the bottom."""
    shown = sorted(((n, s) for n, s in arms if s["value"] is not None), key=lambda item: -item[1]["value"])
    figure = Figure(figsize=(6.4, 1.1 + 0.32 * max(len(shown), 1)), layout="constrained")
    axes = figure.add_subplot()
    values = [s["value"] for _, s in shown]
    logarithmic = bool(values) and min(values) > 0 and max(values) / min(values) > LOGARITHMIC_FROM
    for y, (name, statistic) in enumerate(shown):
        value, low, high = (statistic[key] for key in ("value", "low", "high"))
        tint = colour or (colours or COLOURS).get(name.removesuffix(" ablation"), "#57606a")
        if low is not None and high is not None and (low > 0 or not logarithmic):
            axes.plot([low, high], [y, y], color=tint, linewidth=2.4, alpha=0.45, solid_capstyle="round")
        axes.plot([value], [y], "o", color=tint, markersize=6)
        axes.annotate(number(value), (value, y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
    elif values and min(values) >= 0:
        axes.set_xlim(left=0)
    axes.margins(x=0.08)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_ylim(-0.6, len(shown) - 0.25)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.set_xlabel(label + (" (logarithmic)" if logarithmic else ""))
    axes.set_title(title)
    return figure


def curves_plot(curves: Curves) -> Figure | None:
    """The training log: a small panel per quantity, against the step or the tokens."""
    x_name = next((n for n in ("n_tokens", "tokens", "rows", "step") if any(n in row for row in curves)), "")
    preferred = ("fvu", "mse", "loss", "l0", "frac_dead", "n_dead", "dead", "auxk", "l1", "lr")
    found = {
        name
        for row in curves
        for name, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    found -= {"step", "n_tokens", "tokens", "rows", "seconds", "time"}
    rank = {name: place for place, name in enumerate(preferred)}
    names = sorted(found, key=lambda name: (rank.get(name, len(rank)), name))[:MAX_CURVES]
    if not names or not x_name:
        return None
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.0 * columns, 2.1 * rows), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, index + 1)
        points = [(row[x_name], row[name]) for row in curves if name in row and x_name in row]
        points = [(x, y) for x, y in points if isinstance(y, (int, float)) and math.isfinite(y)]
        axes.plot([x for x, _ in points], [y for _, y in points], color="#1f6feb", linewidth=1.2)
        axes.set_title(name)
        axes.set_xlabel(x_name)
        axes.grid()
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
    return figure


def frontier_plot(reports: Mapping[str, Data]) -> Figure:
    """fvu against l0 for several dictionaries, and their PCA nulls."""
    with mpl.rc_context(STYLE):
        return _frontier(reports)


def _frontier(reports: Mapping[str, Data]) -> Figure:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for title, data in reports.items():
        l0, fvu = (data["metrics"][name]["value"] for name in ("l0", "fvu"))
        if l0 is None or fvu is None:
            continue
        axes.plot([l0], [fvu], "o", color=COLOURS["dictionary"], markersize=7)
        axes.annotate(title, (l0, fvu), (7, 4), textcoords="offset points", fontsize=8.5)
    for data in reports.values():
        null = data["nulls"].get("pca")
        if null and null["l0"]["value"] is not None and null["fvu"]["value"] is not None:
            axes.plot([null["l0"]["value"]], [null["fvu"]["value"]], "s", color=COLOURS["pca"], markersize=5)
            axes.annotate(
                "pca",
                (null["l0"]["value"], null["fvu"]["value"]),
                (7, -9),
                textcoords="offset points",
                fontsize=8,
                color=COLOURS["pca"],
            )
    axes.set_xlabel("l0: latents active per token")
    axes.set_ylabel("fvu")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.2)
    axes.grid()
    axes.set_axisbelow(True)
    axes.set_title("Reconstruction against sparsity")
    return figure


def svg(figure: Figure, salt: str) -> str:
    """As an SVG element that can stand in a page; `salt` keeps the ids of several apart."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": salt}):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def plots(data: Data) -> dict[str, Figure]:
    """Every figure of one report, by file name."""
    figures: dict[str, Callable[[], Figure | None]] = {
        "fvu": lambda: arms_plot(data, "fvu", "What is left unexplained", "fvu, lower is better"),
        "ce_increase": lambda: arms_plot(
            data,
            "ce_increase",
            "What splicing it in costs the model",
            "ce_increase in nats per token, lower is better",
        ),
        "density": lambda: density_plot(data),
        "l0": lambda: l0_plot(data),
        "training": lambda: curves_plot(data.get("training", ())),
        "watched": lambda: watched_plot(data.get("watched", ())),
        "density_over_time": lambda: density_map(data.get("watched", ())),
    }
    if len(data["by_language"]) > 1:
        figures["language"] = lambda: groups_plot(
            data["by_language"], "ce_increase", "By language of the document", "ce_increase in nats per token"
        )
    with mpl.rc_context(STYLE):
        return {name: figure for name, make in figures.items() if (figure := make()) is not None}
