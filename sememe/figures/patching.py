"""How few patches make one run say what another says, as people look at it: two plots and a page. Knows patch.json."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from sememe.figures.data import Data, number
from sememe.figures.document import Document
from sememe.figures.plots import LOGARITHMIC_FROM, STYLE, svg
from sememe.figures.tables import Table, cell_note

__all__ = ["write_patching"]

DICTIONARY_COLOURS = ("#0072B2", "#009E73", "#56B4E9", "#004D73", "#00664B")
"""Blues and greens of Okabe and Ito's palette, which the colour-blind tell apart; markers differ besides."""
BASELINES: dict[str, tuple[str, str]] = {
    "pca": ("#E69F00", "-"),
    "pca_signs": ("#D55E00", "-"),
    "ica": ("#CC79A7", "-"),
    "random_rotation": ("#666666", ":"),
    "random_directions": ("#999999", "--"),
    "difference_in_means": ("#000000", "-"),
}
MARKERS = "os^Dv"
TITLES = {
    "pca": "PCA",
    "pca_signs": "PCA, both signs",
    "ica": "ICA",
    "random_rotation": "random rotation",
    "random_directions": "random directions",
    "difference_in_means": "difference in means",
    "attribution": "by attribution",
    "acdc": "by ACDC's thresholds",
    "random": "in a random order",
}
DRAWN = ("attribution", "acdc")
LEAST_SHARE = 1e-4
"""Of the largest divergence: what lies below it is drawn at the bottom."""
LABEL_GAP = 0.055
LEGEND = (
    "KL of the edited run from the other after the last token, in nats, a mean over pairs; in brackets 95% intervals "
    "over pairs. An order is found on the pairs that it is scored on, for every arm. Edit: mean norm of what is added "
    "to the activations, over the positions from the first at which the prompts differ. Patches and edit needed: to "
    "come down to the reference, interpolated between the numbers of patches that were tried. Forwards: of all pairs, "
    "from the hookpoint on, to find the order; scoring it takes one more for each number of patches."
)


class _Line(NamedTuple):
    """One arm in one panel."""

    title: str
    colour: str
    style: str
    marker: str
    points: Sequence[Data]


def write_patching(folder: Path, data: Data) -> None:
    """patch.html, patch.md and two plots.

    Args:
        folder: Where to write.
        data: patch.json.
    """
    with mpl.rc_context(STYLE):
        drawn = {name: svg(_plot(data, name), f"patching-{name}") for name in ("patches", "edit")}
    document = Document(folder, f"Patching {', '.join(data['hookpoints'])} of {data['model']}")
    for fact in _facts(data):
        document.text(fact)
    document.plots(drawn)
    document.legend(LEGEND)
    for order, title in TITLES.items():
        if any(order in arm["orders"] for arm in data["arms"]):
            document.heading(f"Patched {title}")
            document.table(_table(data, order))
    document.credits(data, "Baselines were fitted to")
    document.write("patch")


def _facts(data: Data) -> list[str]:
    """What was done, in sentences."""
    about = data["prompts"]
    edited, other = ("corrupted", "clean") if data["direction"] == "restore" else ("clean", "corrupted")
    clean, corrupted = about["examples"][0]
    tokens = f"{about['least_tokens']} to {about['most_tokens']}"
    facts = [
        f"{about['n']} pairs of prompts of {tokens} tokens, {data['dtype']}. Latents of the {edited} run take the "
        f"activations that they have in the {other} run, at all positions, what the dictionary misses stays; the last "
        f'token is compared with the {other} run\'s. Clean: "{clean}". Corrupted: "{corrupted}".'
    ]
    if about.get("share_right") is not None:
        fact = (
            f"The model finds the right name likelier than the wrong one in {about['share_right']:.0%} of the clean "
            f"prompts (logit difference {about['logit_difference_clean']:.2f}, corrupted "
            f"{about['logit_difference_corrupted']:.2f})."
        )
        if not about["does_it"]:
            fact += " It does not do what is asked of it here: what follows says little about how it does."
        facts.append(fact)
    reference = data["reference"]
    if reference is not None:
        facts.append(
            f"Reference: {number(reference['kl']['value'])} nats, what PCA reaches with {reference['n']} directions "
            "patched by attribution."
        )
    return facts


def _table(data: Data, order: str) -> Table:
    """A row per arm."""
    columns = [
        "",
        "candidates",
        "least KL",
        "patches there",
        "patches needed",
        "edit needed",
        "forwards",
        "backwards",
    ]
    table = Table(columns, [], [])
    for arm in data["arms"]:
        own = arm["orders"].get(order)
        if own is None:
            continue
        title = arm["name"] if arm["is_dictionary"] else f"null: {TITLES.get(arm['name'], arm['name'])}"
        candidates = f"{own['n_candidates']:,} of {arm['n_candidates']:,}"
        least = own["least"]
        cells = [title, candidates, number(least["kl"]["value"]), f"{least['n']:,}"]
        notes = ["", f"{arm['n_latents']:,} in all", cell_note(least["kl"]), ""]
        for name in ("n_needed", "edit_needed"):
            found = own.get(name)
            value = None if found is None else found["value"]
            cells.append("–" if value is None else number(value))
            notes.append("" if found is None else str(found.get("cause") or cell_note(found)))
        table.rows.append([*cells, f"{own['n_forwards']:,}", f"{own['n_backwards']:,}"])
        table.notes.append([*notes, "", ""])
    return table


# -- plots ---------------------------------------------------------------------------------------------------------


def _plot(data: Data, against: str) -> Figure:
    """The divergence against the number of patches or the size of the edit, a panel per order."""
    orders = [order for order in DRAWN if any(order in arm["orders"] for arm in data["arms"])]
    orders = orders or [next(iter(data["arms"][0]["orders"]))]
    figure = Figure(figsize=(6.6, 3.9 * len(orders)), layout="constrained")
    panels = figure.subplots(len(orders), 1, sharex=True, squeeze=False)[:, 0]
    what = "number of patches" if against == "patches" else "size of the edit"
    nothing = data["arms"][0]["orders"][orders[0]]["points"][0]["kl"]["value"]
    for axes, order in zip(panels, orders, strict=True):
        lines = _lines(data, order)
        values = [point["kl"]["value"] for line in lines for point in line.points]
        top = max(max(values), nothing)
        logarithmic = min(values) < top / LOGARITHMIC_FROM
        floor = top * LEAST_SHARE
        ends = []
        for line in lines:
            ends += _draw(axes, line, against, floor if logarithmic else 0.0)
        axes.axhline(nothing, color="#8c959f", linewidth=0.8, linestyle="--")
        axes.annotate(
            "nothing patched", (0.0, nothing), (2, 3), xycoords=axes.get_yaxis_transform(),
            textcoords="offset points", fontsize=7.5, color="#57606a",
        )  # fmt: skip
        reference = data["reference"]
        if reference is not None and reference["kl"]["value"] > floor:
            level = reference["kl"]["value"]
            axes.axhline(level, color=BASELINES["pca"][0], linewidth=0.8, linestyle=":")
            axes.annotate(
                f"PCA, {reference['n']} directions", (0.0, level), (2, 3), xycoords=axes.get_yaxis_transform(),
                textcoords="offset points", fontsize=7.5, color="#8a5f00",
            )  # fmt: skip
        if against == "patches":
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        else:
            axes.set_xlim(left=0)
        if logarithmic:
            axes.set_yscale("log")
            axes.set_ylim(floor * 0.8, top * 2)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axes.set_ylim(0, top * 1.15)
        axes.set_ylabel("KL from the other run, nats")
        axes.set_title(f"KL against {what}, {TITLES[order]}")
        axes.grid()
        axes.set_axisbelow(True)
        _label(axes, ends)
    panels[-1].set_xlabel(
        "latents or directions patched" if against == "patches" else "mean norm of the edit"
    )
    return figure


def _lines(data: Data, order: str) -> list[_Line]:
    lines = []
    dictionaries = [arm["name"] for arm in data["arms"] if arm["is_dictionary"]]
    for arm in data["arms"]:
        own = arm["orders"].get(order)
        if own is None:
            continue
        if arm["is_dictionary"]:
            place = dictionaries.index(arm["name"])
            colour = DICTIONARY_COLOURS[place % len(DICTIONARY_COLOURS)]
            title = f"{arm['name']} (l0 {arm['about']['l0']:.3g})"
            lines.append(_Line(title, colour, "-", MARKERS[place % len(MARKERS)], own["points"]))
        else:
            colour, style = BASELINES.get(arm["name"], ("#666666", "-."))
            lines.append(_Line(TITLES.get(arm["name"], arm["name"]), colour, style, "", own["points"]))
    return lines


def _draw(axes: Any, line: _Line, against: str, floor: float) -> list[tuple[float, float, str, str]]:
    """A line with its interval as a band; where its label goes."""
    points = [point for point in line.points if point["n"] > 0]
    if not points:
        return []
    x = [point["n"] if against == "patches" else point["edit"]["value"] for point in points]
    y = [max(point["kl"]["value"], floor) for point in points]
    marker = line.marker or ("D" if len(points) == 1 else "")
    style = {
        "color": line.colour,
        "linestyle": line.style,
        "marker": marker,
        "markersize": 3.5,
        "linewidth": 1.5,
    }
    axes.plot(x, y, **style)
    if all(point["kl"]["low"] is not None for point in points):
        low, high = ([max(point["kl"][end], floor) for point in points] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=line.colour, alpha=0.12, linewidth=0)
    return [(x[-1], y[-1], line.title, line.colour)]


def _label(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names at the right, each at the height of its line's end or as near as there is room, and joined to it."""
    axes.get_xlim(), axes.get_ylim()  # scales are final
    heights = [
        float(axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]) for x, y, _, _ in ends
    ]
    heights = [height if math.isfinite(height) else 0.0 for height in heights]
    order = sorted(range(len(ends)), key=heights.__getitem__)
    for lower, upper in itertools.pairwise(order):
        heights[upper] = max(heights[upper], heights[lower] + LABEL_GAP)
    if order and heights[order[-1]] > 1:
        heights[order[-1]] = 1.0
        for upper, lower in itertools.pairwise(order[::-1]):
            heights[lower] = min(heights[lower], heights[upper] - LABEL_GAP)
    for height, (x, y, title, colour) in zip(heights, ends, strict=True):
        axes.annotate(
            title, (x, y), (1.03, height), xycoords="data", textcoords="axes fraction", fontsize=8, color=colour,
            va="center", arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6},
        )  # fmt: skip
