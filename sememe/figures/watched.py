"""A run as it was watched: numbers on held-out rows over time, and densities as a heat map. Reads no file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from sememe.figures.data import Curves

__all__ = ["density_map", "short", "watched_plot"]

TITLES = {
    "fvu": "fvu",
    "l0": "l0",
    "frac_dead": "frac_dead: share silent on all rows",
    "ce_recovered_zero": "ce_recovered_zero",
}
COLOUR = "#1f6feb"
LOGARITHMIC_FROM = 20
"""Largest over smallest value from which an axis is logarithmic."""


def watched_plot(watched: Curves) -> Figure | None:
    """fvu, l0, frac_dead and ce_recovered_zero on held-out rows, against the tokens trained on."""
    names = [name for name in TITLES if sum(_is_number(row.get(name)) for row in watched) > 1]
    if not names:
        return None
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.1 * rows), layout="constrained")
    figure.suptitle("On held-out rows, while training", x=0.01, ha="left", fontsize=11, fontweight="bold")
    for index, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, index + 1)
        points = [(row["tokens"], row[name]) for row in watched if _is_number(row.get(name))]
        axes.plot(*zip(*points, strict=True), color=COLOUR, linewidth=1.3, marker=".", markersize=3)
        axes.set_title(TITLES[name], fontsize=9.5)
        axes.set_xlabel("tokens")
        axes.grid()
        axes.set_axisbelow(True)
        values = [value for _, value in points]
        if name == "fvu" and 0 < LOGARITHMIC_FROM * min(values) < max(values):
            axes.set_yscale("log")
        elif min(values) >= 0:
            axes.set_ylim(bottom=0, top=None if max(values) else 1)
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
    return figure


def density_map(watched: Curves) -> Figure | None:
    """How many latents have which density, over time: a phase transition is a bend or a split of the band."""
    rows = [row for row in watched if "density" in row]
    if len(rows) < 2 or "edges" not in rows[0]:
        return None
    edges = np.asarray(rows[0]["edges"], dtype=float)
    counts = np.asarray([row["density"] for row in rows], dtype=float).T
    per_octave = counts / np.log2(edges[1:] / edges[:-1])[:, None]
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    shown = np.ma.masked_less_equal(per_octave, 0)
    mesh = axes.pcolormesh(
        _between([float(row["tokens"]) for row in rows]),
        edges,
        shown,
        cmap="viridis",
        norm=LogNorm(vmin=1, vmax=max(2.0, float(per_octave.max()))),
        rasterized=True,
    )
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("density: share of held-out rows")
    axes.set_title("How often latents are active, while training")
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    bar = figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.set_label("latents per octave of density")
    bar.outline.set_visible(False)
    return figure


def _between(places: Sequence[float]) -> np.ndarray:
    """Edges of cells around rising places."""
    middle = np.asarray(places)
    inner = (middle[1:] + middle[:-1]) / 2
    return np.concatenate(([2 * middle[0] - inner[0]], inner, [2 * middle[-1] - inner[-1]])).clip(min=0)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def short(value: float) -> str:
    """A number of tokens as an axis shows it: 500k, 1.2M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{suffix}"
    return f"{value:g}"
