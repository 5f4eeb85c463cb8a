"""Dose and response of steering, as people read it: one page and one CSV. Knows the layout of steering.json."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sememe.figures.data import Data, number
from sememe.figures.document import Document
from sememe.figures.plots import STYLE, svg
from sememe.figures.tables import Table, cell_note

__all__ = ["write_steering"]

COLOURS = {
    "latents": "#1f6feb",
    "difference in means": "#d1730b",
    "random direction": "#8c959f",
    "prompt": "#1a7f37",
}
MAX_EXAMPLE = 260
"""Characters of a continuation that are shown."""
LEGEND = (
    "A dose is a multiple of the latents' largest activations on the text; other directions are as long as what the "
    "latents write there, so that equal doses move the activations equally far. perplexity: the unsteered model's, of "
    "the continuation after the prompt alone. Beside each number: its 95% interval over prompts."
)


def write_steering(folder: Path, data: Data) -> None:
    """steering.html, steering.md with its plots, and steering.csv.

    Args:
        folder: Where to write.
        data: steering.json.
    """
    drawn = {}
    with mpl.rc_context(STYLE):
        for name in data["meanings"]:
            drawn[f"{name}-strength"] = svg(_dose_plot(data, name), f"steering-{name}-strength")
        drawn["perplexity-strength"] = svg(_dose_plot(data, "perplexity"), "steering-perplexity")
        for name in data["meanings"]:
            drawn[f"{name}-perplexity"] = svg(_fair_plot(data, name), f"steering-{name}-perplexity")
    latents = ", ".join(str(one["latent"]) for one in data["latents"])
    document = Document(
        folder, f"Steering with {'latent' if len(data['latents']) == 1 else 'latents'} {latents}"
    )
    document.text(_facts(data))
    document.plots(drawn)
    document.legend(f"{LEGEND} " + " ".join(f"{name}: {text}." for name, text in data["meanings"].items()))
    broken = [
        f"{name} at {one['strength']:g}: {one['broken']}" for name, one in _points(data) if one["broken"]
    ]
    if broken:
        document.items("Doses that broke the model", broken)
    document.heading("Dose and response")
    document.table(_table(data))
    document.heading("What was written")
    document.table(_examples(data), written=True)
    document.credits(data, "Text")
    document.write("steering")
    _write_csv(folder / "steering.csv", data)


def _facts(data: Data) -> str:
    about = data["dictionary"]
    found = [
        f"{about['kind']} dictionary {about['name']} of {about['d_sae']:,} latents, {about['model']} at "
        f"{', '.join(about['outputs'])}; style {data['style']}; {len(data['prompts'])} prompts, {data['n_samples']} "
        f"continuations of {data['new_tokens']} tokens each at temperature {data['temperature']:g}.",
        "Largest activations: "
        + ", ".join(f"{one['latent']}: {number(one['largest'])}" for one in data["latents"])
        + ".",
        f"A dose of 1 adds a vector of length {number(data['length'])}.",
    ]
    for name, length in data["natural_lengths"].items():
        found.append(f"The {name} itself has length {number(length)}.")
    if data["classifier"]:
        found.append(
            f"The bag of words tells {data['classifier']['label']} with balanced accuracy "
            f"{number(data['classifier']['accuracy'])} on texts of other folds."
        )
    return " ".join(found)


def _points(data: Data) -> Iterator[tuple[str, Data]]:
    for arm in data["arms"]:
        for point in arm["points"]:
            yield _name(arm), point


def _name(arm: Data) -> str:
    return arm["arm"] if arm["draw"] is None else f"{arm['arm']} {arm['draw'] + 1}"


def _statistic(point: Data, name: str) -> Data:
    found: Data = point["perplexity"] if name == "perplexity" else point["measures"][name]
    return found


def _table(data: Data) -> Table:
    names = list(data["meanings"])
    table = Table(["", "strength", "perplexity", *names], [], [])

    def add(title: str, strength: str, point: Data) -> None:
        if point["broken"]:
            table.rows.append([title, strength, "broken", *("" for _ in names)])
            table.notes.append([""] * (3 + len(names)))
            return
        found = [_statistic(point, name) for name in ("perplexity", *names)]
        table.rows.append([title, strength, *(number(one["value"]) for one in found)])
        table.notes.append(["", "", *(cell_note(one) for one in found)])

    add("unsteered", "", data["unsteered"])
    if data["before"]:
        add("prompt", "", data["before"])
    for arm in data["arms"]:
        null = "null: " if arm["arm"].startswith("random") else ""
        for point in arm["points"]:
            add(null + _name(arm), f"{point['strength']:g}", point)
    return table


def _examples(data: Data) -> Table:
    """The first continuation of some prompts at every dose; of random directions the first alone."""
    table = Table(["", "strength", "prompt", "continuation"], [], [])

    def add(title: str, strength: str, point: Data) -> None:
        for one in point["examples"]:
            text = " ".join(one["text"].split())
            shown = text if len(text) <= MAX_EXAMPLE else text[:MAX_EXAMPLE] + "…"
            table.rows.append([title, strength, one["prompt"], shown])
            table.notes.append([""] * 4)

    add("unsteered", "", data["unsteered"])
    if data["before"]:
        add("prompt", "", data["before"])
    for arm in data["arms"]:
        if arm["draw"] in (None, 0):
            for point in arm["points"]:
                add(_name(arm), f"{point['strength']:g}", point)
    return table


def _lines(axes: Axes, data: Data, x_of: Callable[[Data], float | None], name: str) -> None:
    """A line per arm, with intervals; doses that broke the model are crosses on the axis."""
    labelled: set[str] = set()
    for arm in data["arms"]:
        colour = COLOURS.get(arm["arm"], "#24292f")
        whole = [one for one in arm["points"] if not one["broken"]]
        told = [(x_of(one), _statistic(one, name), one["strength"]) for one in whole]
        shown = [(x, y, s) for x, y, s in told if x is not None and y["value"] is not None]
        label = None if arm["arm"] in labelled else arm["arm"]
        labelled.add(arm["arm"])
        axes.plot(
            [x for x, _, _ in shown],
            [y["value"] for _, y, _ in shown],
            "o-",
            markersize=4.5,
            linewidth=1.3,
            color=colour,
            label=label,
        )
        for x, y, _ in shown:
            if y["low"] is not None:
                axes.plot([x, x], [y["low"], y["high"]], color=colour, linewidth=2.2, alpha=0.3)
        with_doses = arm["arm"] == "latents" and x_of is _perplexity
        for x, y, s in shown if with_doses else ():
            axes.annotate(
                f"{s:g}", (x, y["value"]), (5, 4), textcoords="offset points", fontsize=7.5, color=colour
            )


def _strength(point: Data) -> float | None:
    return float(point["strength"])


def _perplexity(point: Data) -> float | None:
    found: float | None = point["perplexity"]["value"]
    return found


def _dose_plot(data: Data, name: str) -> Figure:
    """A measure, or perplexity, against the dose."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    _lines(axes, data, _strength, name)
    base = _statistic(data["unsteered"], name)["value"]
    if base is not None:
        axes.axhline(base, color="#24292f", linewidth=1, linestyle="--", label="unsteered")
    told = _statistic(data["before"], name)["value"] if data["before"] else None
    if told is not None:
        axes.axhline(told, color=COLOURS["prompt"], linewidth=1, linestyle="-.", label="prompt")
    if name == "perplexity":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    broken = [(one["strength"], arm["arm"]) for arm in data["arms"] for one in arm["points"] if one["broken"]]
    for strength, kind in broken:
        axes.plot(
            [strength], [0.02], "x", color=COLOURS.get(kind, "#24292f"), transform=axes.get_xaxis_transform()
        )
    if broken:
        axes.plot([], [], "x", color="#24292f", linestyle="none", label="broken")
    axes.set_xlabel("strength, in largest activations")
    axes.set_ylabel(name)
    axes.set_title(f"{name.capitalize()} against strength")
    axes.grid()
    axes.set_axisbelow(True)
    axes.legend(fontsize=8)
    return figure


def _fair_plot(data: Data, name: str) -> Figure:
    """A measure against perplexity: what each way of steering gives at the same cost."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    _lines(axes, data, _perplexity, name)
    singles: list[tuple[str, Any, str, str]] = [("unsteered", data["unsteered"], "#24292f", "s")]
    if data["before"]:
        singles.append(("prompt", data["before"], COLOURS["prompt"], "D"))
    for title, point, colour, marker in singles:
        x, y = _perplexity(point), _statistic(point, name)["value"]
        if x is not None and y is not None:
            axes.plot([x], [y], marker, color=colour, markersize=7, label=title, linestyle="none")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axes.set_xlabel("perplexity of the continuation under the unsteered model")
    axes.set_ylabel(name)
    axes.set_title(f"{name.capitalize()} against perplexity")
    axes.grid()
    axes.set_axisbelow(True)
    axes.legend(fontsize=8)
    return figure


def _write_csv(path: Path, data: Data) -> None:
    """A line per arm and dose."""
    names = ["perplexity", *data["meanings"]]
    ends = (("", "value"), ("_low", "low"), ("_high", "high"))
    rows: list[tuple[str, Data]] = [("unsteered", data["unsteered"])]
    rows += [("prompt", data["before"])] if data["before"] else []
    rows += list(_points(data))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "strength", "broken", *(f"{name}{end}" for name in names for end, _ in ends)])
        for title, point in rows:
            numbers = [
                None if point["broken"] else _statistic(point, name)[key] for name in names for _, key in ends
            ]
            row = [title, point["strength"], point["broken"], *numbers]
            writer.writerow(["" if value is None else value for value in row])
