"""The four plots of a grid of penalties and sizes. Knows its lines, not how they were measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from sememe.figures.plots import STYLE, svg

__all__ = ["grid_plots"]

MOST_DEAD = 100
"""Where the colours of dead latents end."""

PANELS = (
    ("recall", "Planted features found (mmcs)", "viridis", 0.0, 1.0),
    ("dead", "Dead latents", "magma_r", 0.0, float(MOST_DEAD)),
    ("fvu", "Variance unexplained (fvu)", "viridis_r", 0.0, 1.0),
    ("next_larger", "Found in the next larger (mmcs)", "viridis", 0.0, 1.0),
)


def grid_plots(lines: Sequence[Mapping[str, Any]], n_features: int) -> dict[str, str]:
    """The four plots in one picture, as an SVG by file name.

    Args:
        lines: One per dictionary: penalty, d_sae, and the panels' numbers; None where there is none.
        n_features: Planted features: sizes are shown as multiples of it.
    """
    penalties = sorted({line["penalty"] for line in lines})
    sizes = sorted({line["d_sae"] for line in lines})
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(max(7.6, 2.4 + 1.1 * len(penalties)), max(5.4, 2.8 + 0.7 * len(sizes))),
            layout="constrained",
        )
        for axes, (name, title, colours, low, high) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
            values = np.full((len(sizes), len(penalties)), math.nan)
            for line in lines:
                if line[name] is not None:
                    place = sizes.index(line["d_sae"]), penalties.index(line["penalty"])
                    values[place] = line[name]
            image = axes.imshow(values, origin="lower", aspect="auto", cmap=colours, vmin=low, vmax=high)
            axes.set_title(title, fontsize=9.5)
            axes.set_xticks(range(len(penalties)), [f"{value:.3g}" for value in penalties], rotation=45)
            axes.set_yticks(range(len(sizes)), [f"{size / n_features:g} x" for size in sizes])
            axes.set_xlabel("penalty")
            axes.set_ylabel("latents per feature")
            for (row, column), value in np.ndenumerate(values):
                if math.isfinite(value):
                    red, green, blue, _ = image.cmap(image.norm(value))
                    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                    text = f"{value:.0f}" if name == "dead" else f"{value:.2f}"
                    axes.text(
                        column, row, text, ha="center", va="center", fontsize=7.5, color="w" if dark else "k"
                    )
        return {"grid": svg(figure, "grid")}
