"""Graphs of prompts in columns, from what `sememe trace` and `sememe circuit` wrote.

Knows graphs; computes nothing. Nodes are told apart by their place in the columns, and edges name those places.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sememe import artifact, graph
from sememe.browse.data.values import number
from sememe.graph import Graph, GraphNode

__all__ = ["about_graph", "read_graphs"]

Json = dict[str, Any]


def read_graphs(paths: Iterable[Path]) -> tuple[list[Json], dict[str, str]]:
    """Each graph as the page gets it, and their fingerprints by role.

    Args:
        paths: Folders of graphs, or their JSON files.
    Raises:
        ArtifactError: a path holds no graph.
        CorruptError: a file is not a graph.
    """
    graphs, parents = [], {}
    for i, path in enumerate(paths):
        found = graph.read_graph(path)
        name = path.name if path.is_dir() else path.stem
        graphs.append({"name": name, **_columns(found)})
        file = path / graph.FILE if path.is_dir() else path
        parents[f"graph.{i}"] = artifact.file_sha256(file)
    return graphs, parents


def about_graph(shown: Json) -> Json:
    """What a list of graphs says of one."""
    return {
        "name": shown["name"],
        "kind": shown["kind"],
        "prompt": "".join(shown["prompt"]["tokens"]),
        "n_nodes": len(shown["nodes"]["id"]),
        "n_edges": len(shown["edges"]["weight"]),
    }


def _columns(found: Graph) -> Json:
    data = graph.to_json(found._replace(nodes=(), edges=()))
    place = {node.id: i for i, node in enumerate(found.nodes)}
    data["nodes"] = {name: _column(found.nodes, name) for name in GraphNode._fields}
    data["edges"] = {
        "from": [place[edge.source] for edge in found.edges],
        "to": [place[edge.target] for edge in found.edges],
        "weight": [number(edge.weight, 5) for edge in found.edges],
    }
    return data


def _column(nodes: Sequence[GraphNode], name: str) -> list[Any]:
    values = [getattr(node, name) for node in nodes]
    return [number(value, 5) if isinstance(value, float) else value for value in values]
