"""What latents know of labels, as people read it: one page and one CSV. Knows the layout of concepts.json."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from sememe.figures.data import Data, number
from sememe.figures.document import Document
from sememe.figures.plots import STYLE, svg
from sememe.figures.tables import Table, cell_note

__all__ = ["write_concepts"]

COLOURS = {
    "dictionary": "#1f6feb",
    "neurons": "#57606a",
    "untrained": "#8250df",
    "shuffled labels": "#bf3989",
}
LEGEND = (
    "Balanced accuracy on texts that the probe was not fitted to, 0.5 for knowing nothing; latents and the "
    "probe's strength are chosen in each fold's training part. Beside each number: its 95% interval over texts, the "
    "same draws in every arm; absorption, perturbation and removal are means over three cuts into a half to fit on "
    "and a half to score on, and their interval is of the scored texts. neurons: the k best dimensions "
    "of the activations; untrained: an untrained dictionary's latents; shuffled labels: the same search "
    "where there is nothing to find; activations: a probe on all of them."
)


def write_concepts(folder: Path, data: Data) -> None:
    """concepts.html, concepts.md with its plots, and concepts.csv.

    Args:
        folder: Where to write.
        data: concepts.json.
    """
    with mpl.rc_context(STYLE):
        drawn = {"probes": svg(_probes_plot(data), "concepts-probes")}
        for name in ("targeted_perturbation", "spurious_removal"):
            if name in data:
                drawn[name] = svg(_ablations_plot(data[name], name), f"concepts-{name}")
    document = Document(folder, f"What the latents of {data['dictionary']['name']} know of labels")
    document.text(
        f"{data['n_texts']:,} texts ({data['n_cut']:,} of them cut to a context), rows are the "
        f"{'means over' if data['pooling'] == 'mean' else 'last of'} kept positions; "
        f"{len(data['left_out']):,} classes left out."
    )
    document.plots(drawn)
    document.legend(LEGEND)
    tables = [("Probes by class", _probes_table(data)), ("Absorption", _absorption_table(data))]
    tables += [
        (name.replace("_", " ").capitalize(), _ablations_table(data[name]))
        for name in ("targeted_perturbation", "spurious_removal")
        if name in data
    ]
    for heading, table in tables:
        document.heading(heading)
        document.table(table)
    document.write("concepts")
    _write_csv(folder / "concepts.csv", data)


def _probes_plot(data: Data) -> Figure:
    """Mean balanced accuracy against the number of latents."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for arm, by_k in data["mean_balanced_accuracy"].items():
        if arm == "activations":
            axes.axhline(
                by_k["dense"]["value"], color="#1a7f37", linestyle="--", linewidth=1.2, label="dense probe"
            )
            continue
        ks = [int(k) for k in by_k]
        colour = COLOURS.get(arm, "#d1730b")
        axes.plot(ks, [one["value"] for one in by_k.values()], "o-", color=colour, linewidth=1.3, label=arm)
        for k, one in zip(ks, by_k.values(), strict=True):
            if one["low"] is not None:
                axes.plot([k, k], [one["low"], one["high"]], color=colour, linewidth=2.2, alpha=0.4)
    axes.axhline(0.5, color="#8c959f", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axes.set_xlabel("latents in the probe")
    axes.set_ylabel("mean balanced accuracy")
    axes.set_title("What a few latents tell")
    axes.grid()
    axes.set_axisbelow(True)
    axes.legend(fontsize=8.5)
    return figure


def _ablations_plot(arms: Data, name: str) -> Figure:
    """The score against the number of ablated latents."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for arm, by_n in arms.items():
        shown = [(int(n), one["score"]) for n, one in by_n.items() if one["score"]["value"] is not None]
        colour = COLOURS.get(arm, "#d1730b")
        axes.plot([n for n, _ in shown], [one["value"] for _, one in shown], "o-", color=colour, label=arm)
        for n, one in shown:
            if one["low"] is None:
                continue
            axes.plot([n, n], [one["low"], one["high"]], color=colour, linewidth=2.2, alpha=0.4)
    axes.axhline(0, color="#8c959f", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("latents ablated")
    axes.set_ylabel("score, higher is better")
    axes.set_title(name.replace("_", " ").capitalize())
    axes.grid()
    axes.set_axisbelow(True)
    if arms:
        axes.legend(fontsize=8.5)
    return figure


def _probes_table(data: Data) -> Table:
    """A row per class, and their mean."""
    columns = [(arm, k) for arm, by_k in data["mean_balanced_accuracy"].items() for k in by_k]
    heads = [arm if k == "dense" else f"{arm}, {k}" for arm, k in columns]
    table = Table(["", "texts", *heads], [], [])
    for name, one in data["classes"].items():
        found = [one["probes"][arm][k]["balanced_accuracy"] for arm, k in columns]
        table.rows.append(
            [name, f"{one['n_with']:,} + {one['n_without']:,}", *(number(v["value"]) for v in found)]
        )
        table.notes.append(["", "", *(cell_note(v) for v in found)])
    means = [data["mean_balanced_accuracy"][arm][k] for arm, k in columns]
    table.rows.append(["mean", "", *(number(v["value"]) for v in means)])
    table.notes.append(["", "", *(cell_note(v) for v in means)])
    return table


def _absorption_table(data: Data) -> Table:
    table = Table(["", "arm", "latents that stand for it", "their F1", "fully absorbed", "fraction"], [], [])
    for name, one in data["classes"].items():
        for arm, found in one["absorption"].items():
            parts = [found[key] for key in ("f1", "full", "fraction")]
            latents = ", ".join(str(latent) for latent in found["latents"])
            table.rows.append([name, arm, latents, *(number(part["value"]) for part in parts)])
            table.notes.append(["", "", "", *(cell_note(part) for part in parts)])
    return table


def _ablations_table(arms: Data) -> Table:
    names = list(next(iter(next(iter(arms.values())).values())))
    table = Table(["", "latents ablated", *names], [], [])
    for arm, by_n in arms.items():
        for n, one in by_n.items():
            table.rows.append([arm, n, *(number(one[name]["value"]) for name in names)])
            table.notes.append(["", "", *(cell_note(one[name]) for name in names)])
    return table


def _write_csv(path: Path, data: Data) -> None:
    """A line per class, arm and number of latents."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        scores = ("balanced_accuracy", "accuracy", "auroc")
        ends = (("", "value"), ("_low", "low"), ("_high", "high"))
        writer.writerow(
            ["class", "arm", "latents", *(f"{score}{end}" for score in scores for end, _ in ends)]
        )
        for name, one in data["classes"].items():
            for arm, by_k in one["probes"].items():
                for k, found in by_k.items():
                    numbers = [found[score][key] for score in scores for _, key in ends]
                    writer.writerow([name, arm, k, *("" if value is None else value for value in numbers)])
