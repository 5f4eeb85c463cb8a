"""What toy models carry and compute, as plots. Knows tables' rows; reads and writes no file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from sememe.figures.plots import STYLE, svg

__all__ = ["layers_plot", "superposition_plot"]


def superposition_plot(lines: Sequence[Mapping[str, Any]], n_features: int) -> dict[str, str]:
    """Three panels over how sparse features are, a line for each width: features carried, dimensions for each, loss.

    Args:
        lines: One per network: d, density, n_carried, dimensions_per_feature, loss; None where there is no number.
        n_features: Features of the networks' input.
    """
    panels = (
        ("n_carried", f"features carried, of {n_features}"),
        ("dimensions_per_feature", "dimensions per feature"),
        ("loss", "error over the features' variance"),
    )
    widths = sorted({line["d"] for line in lines})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.4), layout="constrained")
        for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for shade, d in enumerate(widths):
                own = sorted(
                    (
                        (1 / line["density"], math.nan if line[name] is None else line[name])
                        for line in lines
                        if line["d"] == d
                    ),
                    key=lambda p: p[0],
                )
                colour = mpl.colormaps["viridis"](0.85 * shade / max(1, len(widths) - 1))
                axes.plot(*zip(*own, strict=True), marker="o", markersize=3.5, color=colour, label=f"d {d}")
            axes.set_xscale("log")
            axes.set_title(title, fontsize=9.5)
            axes.set_xlabel("1 / density of the features")
            axes.grid(axis="y")
        axes.legend(fontsize=8)
        return {"superposition": svg(figure, "superposition")}


def layers_plot(lines: Sequence[Mapping[str, Any]], n_layers: int) -> dict[str, str]:
    """Whose share of each feature is how large; and how many layers a feature has.

    Args:
        lines: One per feature: share_0, share_1 ... and effective_layers; None where it was not learned.
        n_layers: Layers of the stack.
    """
    learned = [line for line in lines if line["effective_layers"] is not None]
    shares = np.array([[line[f"share_{layer}"] for layer in range(n_layers)] for line in learned])
    shares = shares.reshape(len(learned), n_layers)
    order = (
        np.lexsort((-shares.max(axis=1, initial=0), shares.argmax(axis=1)))
        if len(learned)
        else np.zeros(0, int)
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        bottom = np.zeros(len(learned))
        for layer in range(n_layers):
            colour = mpl.colormaps["viridis"](0.85 * layer / max(1, n_layers - 1))
            own = shares[order, layer]
            left.bar(range(len(learned)), own, bottom=bottom, width=1.0, color=colour, label=f"layer {layer}")
            bottom += own
        left.set_title("share of each layer in a feature", fontsize=9.5)
        left.set_xlabel("features, by their main layer")
        left.legend(fontsize=8)
        right.hist([line["effective_layers"] for line in learned], bins=20, range=(1, max(n_layers, 1.01)))
        right.set_title("effective layers of a feature", fontsize=9.5)
        right.set_xlabel(f"1: one layer; {n_layers}: all alike")
        right.set_ylabel("features")
        return {"layers": svg(figure, "layers")}
