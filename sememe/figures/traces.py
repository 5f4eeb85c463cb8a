"""How well predicted effects hold, and how much of a number a circuit makes, as plots. Reads and writes no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sememe.figures.plots import STYLE, svg

__all__ = ["agreement_plot", "circuit_plot"]

COLOUR, OTHER, RANDOM = "#1f6feb", "#bf5700", "#8c959f"


def agreement_plot(panels: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> dict[str, str]:
    """Predicted effects against real ones, a panel for each kind; on the line they agree.

    Args:
        panels: Predicted and real, by title; empty ones are left out.
    """
    shown = {title: pair for title, pair in panels.items() if len(pair[0])}
    if not shown:
        return {}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(shown), 3.8), layout="constrained")
        axes: list[Axes] = list(figure.subplots(1, len(shown), squeeze=False).flat)
        for one, (title, (predicted, exact)) in zip(axes, shown.items(), strict=True):
            both = [*predicted, *exact]
            low, high = min(both), max(both)
            one.plot([low, high], [low, high], color=RANDOM, linewidth=0.8)
            one.plot(predicted, exact, "o", color=COLOUR, markersize=3.5, alpha=0.6, markeredgewidth=0)
            one.set_title(f"{title} ({len(predicted)})", fontsize=9.5)
            one.set_xlabel("predicted")
            one.set_ylabel("by a real forward")
            one.grid()
            one.set_axisbelow(True)
        return {"agreement": svg(figure, "agreement")}


def circuit_plot(curves: Mapping[str, Any] | None) -> dict[str, str]:
    """Faithfulness and completeness against the number of nodes, beside random circuits.

    Args:
        curves: `n_nodes`, and by name as many shares.
    """
    if curves is None:
        return {}
    panels = (
        ("faithfulness", "only the circuit, errors in"),
        ("faithfulness_without_errors", "only the circuit, errors out"),
        ("completeness", "all but the circuit"),
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 3.6), layout="constrained")
        for axes, (name, title) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
            for key, colour, label in (
                (name, COLOUR if name != "completeness" else OTHER, "largest effects"),
                (f"{name}_random", RANDOM, "random"),
            ):
                if key in curves:
                    axes.plot(
                        curves["n_nodes"], curves[key], marker="o", markersize=3.5, color=colour, label=label
                    )
            axes.set_xscale("symlog", linthresh=1)
            axes.axhline(0, color=RANDOM, linewidth=0.6)
            axes.axhline(1, color=RANDOM, linewidth=0.6)
            axes.set_title(title, fontsize=9.5)
            axes.set_xlabel("nodes")
            axes.grid(axis="y")
        figure.axes[0].set_ylabel("share of the metric")
        figure.axes[0].legend(fontsize=8)
        return {"circuit": svg(figure, "circuit")}
