"""A concept taken out of the activations, as people read it: one page and one CSV. Knows the layout of erasure.json."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sememe.figures.data import Data, number
from sememe.figures.document import Document
from sememe.figures.plots import STYLE, svg
from sememe.figures.tables import Table, cell_note

__all__ = ["write_erasure"]

COLOURS = {
    "latents": "#1f6feb",
    "random latents": "#8250df",
    "leace": "#1a7f37",
    "difference in means": "#d1730b",
    "mean projection": "#bf3989",
    "random directions": "#57606a",
}
LEGEND = (
    "Everything is chosen and fitted on training texts and scored on held-out ones. refitted: balanced accuracy (the "
    "mean over classes of their accuracy) and AUROC of a linear probe that was fitted anew after the erasure; probe "
    "before: of the one fitted to the unedited activations. kl: KL divergence from the unedited model on neutral text, "
    "nats per token; ce_increase: cross-entropy added there. answers apart: how far the model's own answers after the "
    "texts of two classes lie apart, in nats. Beside each number: its 95% interval over documents; of random draws, "
    "the lowest and the highest."
)


def write_erasure(folder: Path, data: Data) -> None:
    """erasure.html, erasure.md with its plots, and erasure.csv.

    Args:
        folder: Where to write.
        data: erasure.json.
    """
    with mpl.rc_context(STYLE):
        drawn = {"probe": svg(_probe_plot(data), "erasure-probe")}
        if "answers" in data:
            drawn["answers"] = svg(_answers_plot(data), "erasure-answers")
    outputs = ", ".join(data["dictionary"]["outputs"])
    document = Document(folder, f"{_what(data)} taken out at {outputs}")
    document.text(_facts(data))
    document.plots(drawn)
    document.legend(LEGEND)
    document.heading("What is left, and what it cost")
    document.table(_table(data))
    document.heading("The latents")
    document.table(_latents_table(data))
    document.credits(data, "Neutral text")
    document.write("erasure")
    _write_csv(folder / "erasure.csv", data)


def _what(data: Data) -> str:
    names = list(data["classes"])
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _facts(data: Data) -> str:
    counts, about = data["classes"].values(), data["dictionary"]
    labels = data["labels"] if isinstance(data["labels"], str) else ", ".join(data["labels"])
    train, heldout = (sum(one[side] for one in counts) for side in ("train", "heldout"))
    return (
        f"{about['kind']} dictionary {about['name']} of {about['d_sae']:,} latents, {about['model']}; labels from "
        f"{labels}; {train:,} training and {heldout:,} held-out texts, "
        f"rows are the {'means over' if data['pooling'] == 'mean' else 'last of'} their kept positions; latents set to "
        f"{data['ablation']}; cost over {data['neutral']['n_predictions']:,} predictions on neutral text."
    )


def _groups(data: Data) -> dict[tuple[str, int], list[Data]]:
    """Arms by kind and number; several where they were drawn."""
    found: dict[tuple[str, int], list[Data]] = {}
    for arm in data["arms"]:
        found.setdefault((arm["arm"], arm["n"]), []).append(arm)
    return found


def _together(found: Sequence[Data]) -> dict[str, Any]:
    """A statistic of one arm, or the mean of several draws' with their lowest and highest."""
    if len(found) == 1:
        return dict(found[0])
    values = [one["value"] for one in found]
    if any(value is None for value in values):
        return {"value": None, "low": None, "high": None, "cause": "a draw has none"}
    return {"value": sum(values) / len(values), "low": min(values), "high": max(values)}


def _table(data: Data) -> Table:
    columns: list[tuple[str, Callable[[Data], Data]]] = [
        ("refitted: accuracy", lambda one: one["refitted"]["balanced_accuracy"]),
        ("refitted: AUROC", lambda one: one["refitted"]["auroc"]),
        ("probe before: accuracy", lambda one: one["before"]["balanced_accuracy"]),
        ("kl", lambda one: one["cost"]["kl"]),
        ("ce_increase", lambda one: one["cost"]["ce_increase"]),
    ]
    if "answers" in data:
        columns.append(("answers apart", lambda one: one["answers"]["separation"]))
    table = Table(["", "n", *(name for name, _ in columns)], [], [])
    probe, answers = data["base"]["probe"], data["base"].get("answers")
    first = {"refitted: accuracy": probe["balanced_accuracy"], "refitted: AUROC": probe["auroc"]}
    first["probe before: accuracy"] = probe["balanced_accuracy"]
    if answers:
        first["answers apart"] = answers["separation"]
    table.rows.append(
        ["unedited", "", *(number(first[n]["value"]) if n in first else "" for n, _ in columns)]
    )
    table.notes.append(["", "", *(cell_note(first[n]) if n in first else "" for n, _ in columns)])
    for (kind, n), arms in _groups(data).items():
        found = [_together([read(arm) for arm in arms]) for _, read in columns]
        null = "null: " if kind.startswith("random") else ""
        table.rows.append([null + kind, str(n), *(number(one["value"]) for one in found)])
        table.notes.append(["", "", *(cell_note(one) for one in found)])
    table.rows.append(
        ["chance", "", number(data["chance"]), "0.5", number(data["chance"])] + [""] * (len(columns) - 3)
    )
    table.notes.append([""] * (2 + len(columns)))
    return table


def _latents_table(data: Data) -> Table:
    names = list(data["classes"])
    table = Table(["latent", "score", "between", "consistency", "density", *names], [], [])
    for one in data["latents"]:
        numbers = [one[key] for key in ("score", "between", "consistency", "density")]
        numbers += [one["means"][name] for name in names]
        table.rows.append([str(one["latent"]), *map(number, numbers)])
        table.notes.append([""] * (5 + len(names)))
    return table


def _scatter(axes: Axes, data: Data, of: Any) -> None:
    """Every arm at its cost; one kind's arms of several numbers joined, the number beside each."""
    shown: set[str] = set()
    kinds = dict.fromkeys((arm["arm"], arm["draw"]) for arm in data["arms"])
    for kind, draw in kinds:
        own = [arm for arm in data["arms"] if (arm["arm"], arm["draw"]) == (kind, draw)]
        points = [(arm, arm["cost"]["kl"]["value"], of(arm)) for arm in own]
        points = [(arm, x, y) for arm, x, y in points if x is not None and y["value"] is not None]
        colour = COLOURS.get(kind, "#24292f")
        null = kind.startswith("random")
        axes.plot(
            [x for _, x, _ in points],
            [y["value"] for _, _, y in points],
            "-",
            marker="x" if null else "o",
            color=colour,
            linewidth=1.2,
            alpha=0.55 if null else 1,
            label=None if kind in shown else kind,
        )
        shown.add(kind)
        for arm, x, y in points:
            if not null and y["low"] is not None:
                axes.plot([x, x], [y["low"], y["high"]], color=colour, linewidth=2.2, alpha=0.35)
            if not null and len(points) > 1:
                axes.annotate(
                    str(arm["n"]),
                    (x, y["value"]),
                    (5, 4),
                    textcoords="offset points",
                    fontsize=8,
                    color=colour,
                )
    positive = [v for arm in data["arms"] if (v := arm["cost"]["kl"]["value"]) is not None and v > 0]
    if positive:
        axes.set_xscale("symlog", linthresh=max(min(positive), 1e-5))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("kl to the unedited model on neutral text, nats per token")
    axes.grid()
    axes.set_axisbelow(True)
    axes.legend(fontsize=8)


def _probe_plot(data: Data) -> Figure:
    """What a refitted probe tells against the cost; the number of latents beside its dot."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    unedited = data["base"]["probe"]["balanced_accuracy"]["value"]
    axes.axhline(unedited, color="#24292f", linewidth=1, linestyle="--", label="unedited")
    axes.axhline(data["chance"], color="#8c959f", linewidth=0.9, linestyle=":", label="chance")
    _scatter(axes, data, lambda arm: arm["refitted"]["balanced_accuracy"])
    axes.set_ylabel("balanced accuracy of a refitted probe")
    axes.set_title("What is left of the concept, and what it cost")
    return figure


def _answers_plot(data: Data) -> Figure:
    """How far the model's own answers lie apart, against the cost."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    unedited = data["base"]["answers"]["separation"]["value"]
    axes.axhline(unedited, color="#24292f", linewidth=1, linestyle="--", label="unedited")
    axes.axhline(0, color="#8c959f", linewidth=0.9, linestyle=":", label="no difference")
    _scatter(axes, data, lambda arm: arm["answers"]["separation"])
    one, other = data["answers"]["apart"]
    axes.set_ylabel(f"answers after {one} less after {other}, nats")
    axes.set_title("What the model itself answers")
    return figure


def _write_csv(path: Path, data: Data) -> None:
    """A line per arm."""
    ends = (("", "value"), ("_low", "low"), ("_high", "high"))
    fields = [("refitted", "balanced_accuracy"), ("refitted", "auroc"), ("before", "balanced_accuracy")]
    fields += [("before", "auroc"), ("cost", "kl"), ("cost", "ce_increase")]
    if "answers" in data:
        fields += [("answers", "separation"), ("answers", "auroc")]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["arm", "n", "draw", "latents", *(f"{a}_{b}{end}" for a, b in fields for end, _ in ends)]
        )
        for arm in data["arms"]:
            numbers = [arm[a][b][key] for a, b in fields for _, key in ends]
            row = [arm["arm"], arm["n"], arm["draw"], " ".join(map(str, arm["latents"])), *numbers]
            writer.writerow(["" if value is None else value for value in row])
