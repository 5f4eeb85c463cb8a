"""A trace as a page of Markdown and figures. Knows a graph and its details; computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sememe.figures import agreement_plot, circuit_plot
from sememe.graph import Graph, GraphNode

__all__ = ["write"]

N_SHOWN = 40


def write(folder: Path, name: str, graph: Graph, details: Mapping[str, Any]) -> None:
    """The page, and the figures beside it."""
    figures = _figures(graph, details)
    for figure, text in figures.items():
        (folder / f"{figure}.svg").write_text(text, encoding="utf-8")
    (folder / name).write_text(_page(graph, details, list(figures)), encoding="utf-8")


def _figures(graph: Graph, details: Mapping[str, Any]) -> dict[str, str]:
    if "feeds" in details:
        checks = [fed["checks"] for fed in details["feeds"]]
        pairs = [[v for check in checks for v in check[side]] for side in ("predicted", "exact")]
        return agreement_plot({"latents that feed": (pairs[0], pairs[1])})
    checked, edges = details["checked"], details["checked_edges"]
    n = checked["n_largest"]
    panels = {
        "largest nodes": (checked["predicted"][:n], checked["exact"][:n]),
        "random nodes": (checked["predicted"][n:], checked["exact"][n:]),
        "edges": (edges["predicted"], edges["exact"]),
    }
    return agreement_plot(panels) | circuit_plot(graph.scores.get("curves"))


def _page(graph: Graph, details: Mapping[str, Any], figures: Sequence[str]) -> str:
    lines = [f"# {graph.metric['text']}", ""]
    lines += [
        f"Model {graph.model}; dictionaries "
        + ", ".join(f"{d.name} ({d.hookpoints[-1]})" for d in graph.dictionaries)
        + "."
    ]
    lines += ["", "> " + "".join(graph.tokens).replace("\n", "\\n"), ""]
    lines += [f"{graph.metric['text']} is {graph.metric['clean']:.4g} here"]
    lines[-1] += (
        "." if graph.metric["patched"] is None else f", {graph.metric['patched']:.4g} in the counterpart."
    )
    if "feeds" in details:
        lines += ["", *_feeds(graph, details["feeds"])]
    else:
        lines += ["", *_nodes(graph), "", *_scores(graph)]
    lines += ["", *_checks(graph)]
    for figure in figures:
        lines += ["", f"![{figure}]({figure}.svg)"]
    return "\n".join(lines) + "\n"


def _nodes(graph: Graph) -> list[str]:
    nodes = [node for node in graph.nodes if node.kind != "logit"]
    lines = [
        f"## The {min(N_SHOWN, len(nodes))} largest of {graph.scores['n_nodes']:,} nodes",
        "",
        "The effect is what the metric changes by when the node is ablated.",
        "",
        "| node | token | effect | real | activation | label |",
        "|---|---|---:|---:|---:|---|",
    ]
    return lines + [_row(graph, node) for node in nodes[:N_SHOWN]]


def _row(graph: Graph, node: GraphNode) -> str:
    token = graph.tokens[node.position].replace("|", "\\|").replace("\n", "\\n").strip() or "(space)"
    place = graph.dictionaries[node.dictionary or 0].hookpoints[-1]
    what = "error" if node.kind == "error" else str(node.latent)
    exact = "" if node.exact is None else f"{node.exact:+.4f}"
    label = (node.label or "").replace("|", "\\|")
    return f"| {place} {what} | {token} ({node.position}) | {node.effect:+.4f} | {exact} | {node.act:.3g} | {label} |"


def _scores(graph: Graph) -> list[str]:
    scores = graph.scores
    lines = [
        f"Found with {scores['method']}: {scores['n_forwards']} forwards and {scores['n_backwards']} backwards.",
        "",
        "| place | latents, together | errors | errors' share of all sizes |",
        "|---|---:|---:|---:|",
    ]
    for place in scores["places"]:
        share = "" if place["share_of_errors"] is None else f"{place['share_of_errors']:.0%}"
        lines.append(f"| {place['hookpoint']} | {place['latents']:+.4f} | {place['errors']:+.4f} | {share} |")
    curves = scores.get("curves")
    if curves:
        lines += [
            "",
            "| nodes | " + " | ".join(map(str, curves["n_nodes"])) + " |",
            "|---|" + "---:|" * len(curves["n_nodes"]),
        ]
        for name, values in curves.items():
            if isinstance(values, list) and name != "n_nodes":
                lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(f"{v:.2f}" for v in values) + " |")
    return lines


def _checks(graph: Graph) -> list[str]:
    lines = [
        "## Predictions against real forwards",
        "",
        "| | number | correlation | slope | rank correlation |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, found in graph.checks.items():
        numbers = [
            "" if found[key] is None else f"{found[key]:.3f}" for key in ("correlation", "slope", "spearman")
        ]
        lines.append(f"| {name.replace('_', ' ')} | {found['n']} | " + " | ".join(numbers) + " |")
    return lines


def _feeds(graph: Graph, feeds: Sequence[Mapping[str, Any]]) -> list[str]:
    labels = {(node.dictionary, node.latent): node.label for node in graph.nodes}
    lines: list[str] = []
    for fed in feeds:
        place, latent = fed["place"], fed["latent"]
        label = labels.get((place, latent))
        title = f"## {graph.dictionaries[place].hookpoints[0]} {latent}" + (f": {label}" if label else "")
        lines += [
            title,
            "",
            f"Mean activation {fed['mean']:.3g} in {len(fed['contexts'])} contexts, {fed['largest']:.3g} at most. "
            "Without:",
            "",
            "| latent before it | position | predicted | real | share | label |",
            "|---|---:|---:|---:|---:|---|",
        ]
        for source in fed["sources"]:
            if source["exact"] is None:
                continue
            name = "error" if source["latent"] is None else str(source["latent"])
            own = labels.get((place - 1, source["latent"])) or ""
            share = "" if source["share"] is None else f"{source['share']:.0%}"
            lines.append(
                f"| {graph.dictionaries[place - 1].hookpoints[-1]} {name} | {source['offset']} "
                f"| {source['effect']:+.4f} | "
                f"{source['exact']:+.4f} | {share} | {own} |"
            )
        lines.append("")
    return lines
