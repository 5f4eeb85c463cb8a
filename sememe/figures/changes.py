"""How an ablation changes the true tokens' logits, as a plot. Reads and writes no file."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from sememe.figures.plots import STYLE, svg

__all__ = ["changes_plot"]

COLOUR, MEAN = "#1f6feb", "#bf5700"


def changes_plot(edges: Sequence[float], counts: Sequence[float], mean: float, salt: str) -> str:
    """A histogram over positions, with their mean, as an SVG.

    Args:
        edges: Of the bins, ascending; what lies outside is in the first and the last.
        counts: Positions in each bin.
        mean: Of the changes as they are.
        salt: What keeps the ids of several pictures in a page apart.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 1.9), layout="constrained")
        axes = figure.subplots()
        axes.stairs(counts, edges, fill=True, color=COLOUR, alpha=0.75)
        axes.axvline(0, color="#8c959f", linewidth=0.8)
        axes.axvline(mean, color=MEAN, linewidth=1, linestyle="--")
        axes.set_xlabel("change of the true token's logit (dashed: mean)")
        axes.set_ylabel("positions")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        return svg(figure, salt)
