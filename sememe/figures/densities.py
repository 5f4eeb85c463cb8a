"""How often latents are active, several dictionaries in one picture. Knows histograms, not where they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from sememe.figures.plots import STYLE, svg

__all__ = ["densities_plot"]

COLUMNS = 4


def densities_plot(histograms: Mapping[str, tuple[Sequence[float], Sequence[float], int]]) -> str:
    """A panel for each dictionary, all on the same axis of densities, as an SVG.

    Args:
        histograms: By name: the edges of the bins (densities, ascending), latents in each bin, and silent latents.
    """
    columns = min(COLUMNS, len(histograms))
    rows = math.ceil(len(histograms) / columns)
    low = min(edges[0] for edges, _, _ in histograms.values())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * columns + 0.6, 1.9 * rows + 0.5), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flat
        for axes, (name, (edges, counts, n_silent)) in zip(panels, histograms.items(), strict=False):
            axes.stairs(counts, edges, fill=True, color="#1f6feb", alpha=0.75)
            axes.set_xscale("log")
            axes.set_xlim(low, 1)
            silent = f", {n_silent:,} silent" if n_silent else ""
            axes.set_title(f"{name}{silent}", fontsize=9)
            axes.grid(axis="y")
        for axes in list(panels):
            axes.set_axis_off()
        figure.supxlabel("density: share of tokens on which a latent is active", fontsize=9)
        figure.supylabel("latents", fontsize=9)
        return svg(figure, "densities")
