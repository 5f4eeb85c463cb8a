"""A release of several dictionaries: all layers of a model, say. Which there are, their one table, their one picture.

    RELEASE/README.md, LICENSE, dictionaries.json, densities.svg, dictionary/NAME/, report/NAME/, atlas/NAME/

Knows folders, meta.json and the layout of report.json; never loads torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sememe import artifact, figures
from sememe.errors import MismatchError
from sememe.figures.data import HEADLINE, number
from sememe.figures.densities import densities_plot
from sememe.figures.tables import MEANINGS, Table, cell_note, markdown_table

__all__ = ["INDEX", "PICTURE", "extras", "members", "results", "together"]

INDEX, PICTURE = "dictionaries.json", "densities.svg"
SHAPE = {
    "rmse": ("RMSE", "root of the mean squared error per dimension"),
    "l1": ("L1", "sum of a token's activations"),
    "l0": ("L0", "latents active per token"),
    "frac_alive": ("alive", "share of latents active on at least one of the tokens"),
    "ce_recovered_zero": ("loss recovered", "share of the cross-entropy lost to zero ablation that is kept"),
}
"""The columns of the table of Marks and Mueller's release; what they call MSE is its root."""


def members(folder: Path, kind: str) -> dict[str, Path]:
    """The artifacts of a kind in a folder that is none itself, by their path in it; empty if it is one, or has none.

    A sweep counts as a folder of its dictionaries. What lies inside an artifact is not looked at.
    """
    if artifact.kind_of(folder) not in (None, "sweep"):
        return {}
    found: dict[str, Path] = {}
    for path in artifact.below(folder):
        name = path.as_posix().removeprefix(f"{folder.as_posix()}/")
        own = artifact.kind_of(path)
        if own == kind:
            found[name] = path
        elif own == "sweep":
            found |= {f"{name}/{inner}": place for inner, place in members(path, kind).items()}
    return found


def together(
    dictionaries: Mapping[str, Path], report: Path | None, atlas: Path | None
) -> dict[str, artifact.Artifact]:
    """Every part by its path in the release; reports and atlases go with the dictionaries they are of.

    Args:
        dictionaries: By name.
        report: A folder of reports, or one report.
        atlas: A folder of atlases, or one.

    Raises:
        MismatchError: a report or an atlas is of none of the dictionaries, or two are of the same one.
        ArtifactError: a folder holds none.
    """
    parts = {f"dictionary/{name}": artifact.load(path, "dictionary") for name, path in dictionaries.items()}
    by_fingerprint = {part.fingerprint: role.split("/", 1)[1] for role, part in parts.items()}
    for kind, place in (("report", report), ("atlas", atlas)):
        if place is None:
            continue
        paths = members(place, kind) or {"": place}
        for path in paths.values():
            part = artifact.load(path, kind)
            name = by_fingerprint.get(part.meta["parents"].get("dictionary", ""))
            if name is None:
                raise MismatchError(
                    f"the {kind} {path} must be of one of the dictionaries that are published",
                    "one of another",
                    f"Make the {kind} again, or leave it out.",
                )
            if f"{kind}/{name}" in parts:
                raise MismatchError(
                    f"a dictionary must have one {kind}",
                    f"two of {name}, one of them {path}",
                    "Leave one out.",
                )
            parts[f"{kind}/{name}"] = part
    return parts


def names_in(parts: Mapping[str, artifact.Artifact]) -> list[str]:
    """The dictionaries' names, in their order."""
    return [role.split("/", 1)[1] for role in parts if role.startswith("dictionary/")]


def _reports(parts: Mapping[str, artifact.Artifact]) -> dict[str, Mapping[str, Any]]:
    """report.json of each dictionary that has one."""
    return {
        name: figures.open_report(parts[f"report/{name}"].path).data
        for name in names_in(parts)
        if f"report/{name}" in parts
    }


def extras(parts: Mapping[str, artifact.Artifact]) -> dict[str, str]:
    """The files that only such a release has: what each dictionary is, for programs, and the picture."""
    reports = _reports(parts)
    index = []
    for name in names_in(parts):
        about = parts[f"dictionary/{name}"].extra
        measured = reports.get(name, {}).get("metrics", {})
        index.append(
            {
                "name": name,
                "path": f"dictionary/{name}",
                "inputs": _places(about, "inputs"),
                "outputs": _places(about, "outputs"),
                "architecture": about["architecture"],
                "d_in": about["d_in"],
                "d_out": about["d_out"],
                "d_sae": about["d_sae"],
                "fingerprint": parts[f"dictionary/{name}"].fingerprint,
                "metrics": {
                    metric: measured[metric]["value"]
                    for metric in dict.fromkeys((*HEADLINE, *SHAPE))
                    if metric in measured
                },
            }
        )
    files = {INDEX: json.dumps({"format_version": 1, "dictionaries": index}, indent=1, ensure_ascii=False)}
    histograms = {name: found for name in names_in(parts) if (found := _histogram(name, parts, reports))}
    if histograms:
        files[PICTURE] = densities_plot(histograms)
    return files


def _places(about: Mapping[str, Any], side: str) -> list[str]:
    return [site["hookpoint"] for site in (about.get("sites") or {}).get(side, ())]


def _histogram(
    name: str, parts: Mapping[str, artifact.Artifact], reports: Mapping[str, Mapping[str, Any]]
) -> tuple[list[float], list[float], int] | None:
    """The bins of density, latents in each, and silent ones: of the report, else as the training was watched."""
    told = reports.get(name, {}).get("density", {}).get("dictionary")
    if told:
        return told["edges"], told["counts"], told["n_silent"]
    watched = figures.read_watched(parts[f"dictionary/{name}"])
    lines = [line for line in watched if "density" in line]
    if not lines or "edges" not in watched[0]:
        return None
    counts = lines[-1]["density"]
    return watched[0]["edges"], counts, parts[f"dictionary/{name}"].extra["d_sae"] - sum(counts)


def results(parts: Mapping[str, artifact.Artifact]) -> list[str]:
    """The card's table, a row for each dictionary, and its picture."""
    reports = _reports(parts)
    columns = [metric for metric in HEADLINE if any(metric in data["metrics"] for data in reports.values())]
    table = Table(["dictionary", "reads and writes", "latents", *columns], [], [])
    for name in names_in(parts):
        about = parts[f"dictionary/{name}"].extra
        inputs, outputs = _places(about, "inputs"), _places(about, "outputs")
        places = ", ".join(inputs) + (" to " + ", ".join(outputs) if outputs != inputs else "")
        found = [reports.get(name, {}).get("metrics", {}).get(metric) for metric in columns]
        cells = [name, places or "bare tensors", f"{about['d_sae']:,}"]
        table.rows.append(cells + [number(one["value"]) if one else "" for one in found])
        table.notes.append(["", "", "", *(cell_note(one) if one else "" for one in found)])
    lines = ["## Dictionaries", "", markdown_table(table), ""]
    if reports:
        text = next(iter(reports.values()))["text"]
        lines += [
            f"Measured on {text['n_rows_kept']:,} tokens of {text['n_documents']:,} held-out documents; in brackets "
            "the 95% interval over documents. Each report has the nulls, which are controls at the same l0.",
            "",
            *(f"- `{metric}`: {MEANINGS[metric]}" for metric in columns if metric in MEANINGS),
            "",
        ]
    lines += _in_shape(parts, reports)
    lines += [f"For programs: [{INDEX}]({INDEX}).", ""]
    if any(_histogram(name, parts, reports) for name in names_in(parts)):
        lines += [f"![How often latents are active, dictionary by dictionary]({PICTURE})", ""]
    return lines


def _in_shape(parts: Mapping[str, artifact.Artifact], reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table that earlier releases came with: a row for each place, a block for each dictionary of one kind."""
    rows = {name: data["metrics"] for name, data in reports.items() if set(SHAPE) <= set(data["metrics"])}
    if not rows:
        return []
    places = {name: _places(parts[f"dictionary/{name}"].extra, "inputs") for name in rows}
    table = Table(["dictionary", "place", *(title for title, _ in SHAPE.values())], [], [])
    for name, measured in rows.items():
        cells = [
            name,
            ", ".join(places[name]) or "bare tensors",
            *(number(measured[one]["value"]) for one in SHAPE),
        ]
        table.rows.append(cells)
        table.notes.append([""] * len(cells))
    meanings = "; ".join(f"{title}: {meaning}" for title, meaning in SHAPE.values())
    return [
        "The same in the columns of Marks and Mueller's release:",
        "",
        markdown_table(table),
        "",
        f"{meanings}.",
        "",
    ]
