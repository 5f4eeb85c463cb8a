"""How much a circuit recovers and what latents do downstream, as people read it: one page. Knows scrub.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from sememe.figures.data import Data, number
from sememe.figures.document import Document
from sememe.figures.plots import STYLE, dots_plot, svg
from sememe.figures.tables import Table, cell_note

__all__ = ["write_scrubbing"]

METRICS = {
    "loss": "cross-entropy of the next token, in nats",
    "kl": "KL of the scrubbed model from the unedited one, in nats",
    "logit_difference": "logit of the answer less that of the wrong one, after the last token",
}
COLOURS = {"circuit": "#0072B2", "random latents": "#8c959f"}
SCORE_LEGEND = (
    "Score: what the circuit recovers of the way from everything resampled (0) to the unedited model (1); above 1 or "
    "below 0 it goes too far, or the wrong way. In brackets 95% intervals over resamples, the same for every row. "
    "Random latents: a circuit of the same form, of latents that fire on the inputs, drawn anew for each resample."
)
EDGE_LEGEND = (
    "Mean change of the target's activation over the positions at which the source fires, when the source is ablated "
    "wherever it fires. Control: as much taken out along one random direction, one for each source."
)


def write_scrubbing(folder: Path, data: Data) -> None:
    """scrub.html and scrub.md, with a plot where a circuit was tested.

    Args:
        folder: Where to write.
        data: scrub.json.
    """
    document = Document(folder, f"Scrubbing {data['model']}")
    places = ", ".join(
        f"{one['name']} ({one['hookpoint']}, {one['d_sae']:,} latents)" for one in data["dictionaries"]
    )
    document.text(f"Dictionaries: {places}. Model in {data['dtype']}.")
    if "circuit" in data:
        with mpl.rc_context(STYLE):
            drawn = {"score": svg(_plot(data["circuit"]), "scrubbing")}
        document.heading("The circuit")
        document.text(_circuit_facts(data))
        document.table(_circuit_table(data["circuit"]))
        document.plots(drawn)
        document.legend(SCORE_LEGEND)
    if "downstream" in data:
        found = data["downstream"]
        document.heading(f"What latents of {found['source']} do downstream")
        document.text(_downstream_facts(found))
        document.table(_layers_table(found))
        document.table(_edges_table(found))
        document.legend(EDGE_LEGEND)
    document.credits(data, "Text")
    document.write("scrub")


def _circuit_facts(data: Data) -> str:
    found = data["circuit"]
    edges = f" and {found['n_edges']} edges" if found["n_edges"] else ""
    left_out = f" ({data['n_left_out']} left out, of a length of their own)" if data["n_left_out"] else ""
    error = "stays" if found["error"] == "keep" else "is resampled, too"
    return (
        f"{found['n_latents']:,} latents in {len(found['nodes'])} nodes{edges}; {found['n_inputs']:,} inputs of "
        f"{data['inputs']}{left_out}, {found['n_resamples']} resamples; what the dictionaries miss {error}. Metric: "
        f"{METRICS[found['metric']]}; unedited {number(found['unedited'])}."
    )


def _circuit_table(found: Data) -> Table:
    table = Table(["", found["metric"], "score"], [], [])
    rows = (
        ("the circuit stays", "circuit"),
        ("null: random latents stay", "random"),
        ("nothing stays", "nothing"),
    )
    for title, name in rows:
        score = found.get(f"score_{name}")
        table.rows.append(
            [title, number(found[name]["value"]), "0" if score is None else number(score["value"])]
        )
        table.notes.append(["", cell_note(found[name]), "" if score is None else cell_note(score)])
    table.rows.append(["unedited", number(found["unedited"]), "1"])
    table.notes.append(["", "", ""])
    return table


def _plot(found: Data) -> Figure:
    arms: list[tuple[str, Any]] = [
        ("circuit", found["score_circuit"]),
        ("random latents", found["score_random"]),
    ]
    return dots_plot(
        arms, "What stays recovers so much", "score: 0 nothing, 1 the unedited model", colours=COLOURS
    )


def _downstream_facts(found: Data) -> str:
    silent = sum(one["n"] == 0 for one in found["latents"])
    left = f"; {silent} of them never fire here" if silent else ""
    largest = found["largest"]
    return (
        f"{len(found['latents'])} latents ablated one at a time{left}; {found['n_edges']:,} edges are in "
        "downstream.parquet. "
        f"The largest change is {number(largest['latents'])}, of the controls {number(largest['controls'])}."
    )


def _layers_table(found: Data) -> Table:
    table = Table(["sum of changes at", "ablated", "control"], [], [])
    for one in found["later"]:
        table.rows.append([one["dictionary"], number(one["total"]), number(one["total_control"])])
        table.notes.append(["", "", ""])
    return table


def _edges_table(found: Data) -> Table:
    table = Table(["source", "target of", "target", "mean change", "positions", "target fires there"], [], [])
    for edge in found["edges"]:
        share = f"{edge['n_both'] / edge['n']:.0%}" if edge["n"] else "–"
        table.rows.append(
            [
                str(edge["source"]),
                edge["dictionary"],
                str(edge["target"]),
                f"{edge['mean_change']:+.4g}",
                f"{edge['n']:,}",
                share,
            ]
        )
        table.notes.append([""] * 6)
    return table
