"""Hypothesised circuits: which latents of which dictionaries matter, and which act on which. Reads a file.

{"resid_post.4": [12, 99], "resid_post.8": [7]}         latents by dictionary (a bare list, if there is one)

[[node]]                                                or nodes and edges, as TOML or JSON
name = "names again"
dictionary = "resid_post.4"
latents = [12, 99]

[[edge]]
from = "names again"
to = "output"
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sememe.dictionaries.base import Dictionary
from sememe.errors import ConfigError, nearest

__all__ = ["OUTPUT", "Circuit", "Node", "Place", "named", "read_circuit"]

OUTPUT = "output"
"""What the model says, where edges end."""


class Place(NamedTuple):
    """A dictionary in its model."""

    name: str
    hookpoint: str
    dictionary: Dictionary


class Node(NamedTuple):
    """Latents that act as one."""

    name: str
    place: int
    """Which of the places, from the lowest on."""
    latents: tuple[int, ...]


class Circuit(NamedTuple):
    """Nodes, and the edges between them by number; without edges any of them may act on any later one."""

    nodes: tuple[Node, ...]
    edges: tuple[tuple[int, int | None], ...]
    """From, to; None is the output."""

    @property
    def n_latents(self) -> int:
        """How many it has."""
        return sum(len(node.latents) for node in self.nodes)

    def latents_at(self, place: int) -> list[int]:
        """All latents of a place."""
        return sorted({latent for node in self.nodes if node.place == place for latent in node.latents})

    def parents(self, node: int | None) -> frozenset[int]:
        """Nodes with an edge to this one."""
        return frozenset(start for start, end in self.edges if end == node)


def named(name: str, places: Sequence[Place]) -> int:
    """Which place is meant by a dictionary's name or its hookpoint.

    Raises:
        ConfigError: none is.
    """
    for number, place in enumerate(places):
        if name in (place.name, place.hookpoint):
            return number
    raise ConfigError(
        "a dictionary must be named by its folder or its hookpoint",
        repr(name),
        nearest(name, [word for place in places for word in (place.name, place.hookpoint)]),
    )


def read_circuit(path: Path, places: Sequence[Place]) -> Circuit:
    """A circuit out of a file.

    Args:
        path: A .toml or .json file.
        places: The dictionaries, the lowest first.

    Raises:
        ConfigError: the file cannot be read, names no latents, or names dictionaries, latents or nodes that are not
            there; a latent is in two nodes; an edge does not lead upwards.
    """
    data = _data(path)
    if isinstance(data, list):
        if len(places) != 1:
            raise ConfigError(
                "a circuit of several dictionaries must name them",
                f"a bare list in {path}",
                "Write {dictionary: [latents]}.",
            )
        data = {places[0].name: data}
    if not isinstance(data, Mapping):
        raise _malformed(path, type(data).__name__)
    nodes = data.get("node", data.get("nodes"))
    edges = data.get("edge", data.get("edges", ()))
    if nodes is None:
        nodes = [{"name": name, "dictionary": name, "latents": latents} for name, latents in data.items()]
        edges = ()
    if not isinstance(nodes, list) or not nodes:
        raise _malformed(path, "no nodes")
    found = tuple(_node(path, node, number, places) for number, node in enumerate(nodes))
    _check_nodes(path, found, places)
    made = Circuit(found, tuple(_edge(path, edge, found) for edge in edges))
    if made.edges and not made.parents(None):
        raise ConfigError(
            f"an edge of {path} must lead to {OUTPUT}",
            "none that does",
            "Add it: else the circuit says nothing.",
        )
    return made


def _data(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "a circuit must be a .toml or .json file", f"{path}: {error}", "Mend it, or name another."
        ) from None


def _malformed(path: Path, value: str) -> ConfigError:
    return ConfigError(
        f"{path} must hold latents by dictionary, or nodes with a dictionary and latents",
        value,
        "See docs/scrub.md for its form.",
    )


def _node(path: Path, node: Any, number: int, places: Sequence[Place]) -> Node:
    if not isinstance(node, Mapping) or "dictionary" not in node:
        raise _malformed(path, f"a node without dictionary ({node!r})")
    latents = node.get("latents")
    whole = isinstance(latents, list) and all(type(latent) is int for latent in latents)
    if not whole or not latents:
        raise _malformed(path, f"{latents!r} as latents")
    place = named(str(node["dictionary"]), places)
    d_sae = places[place].dictionary.d_sae
    for latent in latents:
        if not 0 <= latent < d_sae:
            raise ConfigError(
                f"a latent of {places[place].name} must be in [0, {d_sae - 1}]", latent, f"Change {path}."
            )
    return Node(str(node.get("name", f"node {number}")), place, tuple(dict.fromkeys(latents)))


def _check_nodes(path: Path, nodes: Sequence[Node], places: Sequence[Place]) -> None:
    names = [node.name for node in nodes]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None or OUTPUT in names:
        raise ConfigError(
            f"each node must have a name of its own, and none may be called {OUTPUT}",
            repr(double or OUTPUT),
            f"Change {path}.",
        )
    seen: dict[tuple[int, int], str] = {}
    for node in nodes:
        for latent in node.latents:
            other = seen.setdefault((node.place, latent), node.name)
            if other != node.name:
                raise ConfigError(
                    f"latent {latent} of {places[node.place].name} must be in one node",
                    f"{other} and {node.name}",
                    f"Change {path}.",
                )


def _edge(path: Path, edge: Any, nodes: Sequence[Node]) -> tuple[int, int | None]:
    names = [node.name for node in nodes]
    ends: list[Any] = [edge.get(end) for end in ("from", "to")] if isinstance(edge, Mapping) else [None, None]
    for end, known in zip(ends, (names, [*names, OUTPUT]), strict=True):
        if end not in known:
            raise ConfigError(
                f"an edge of {path} must lead from a node to a node or {OUTPUT}",
                repr(end),
                nearest(str(end), known),
            )
    start = names.index(ends[0])
    if ends[1] == OUTPUT:
        return start, None
    end_ = names.index(ends[1])
    if nodes[start].place >= nodes[end_].place:
        raise ConfigError(
            "an edge must lead to a dictionary of a later hookpoint",
            f"{ends[0]} to {ends[1]}",
            f"Change {path}.",
        )
    return start, end_
