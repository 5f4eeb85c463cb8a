"""The graph of a computation on one prompt: nodes, weighted edges, JSON in and out, and what can be summed over it.

Knows what a graph is and how to read, check, write, prune and score one. Does not know how edges are found (`trace` and
`circuit` do that), and never loads torch, so that the browser's server can import it.

A node stands for something at one layer and position: a latent of a dictionary, an error (what dictionaries leave of
the layer), a token's embedding, or a logit (the number that is explained). An edge's weight is signed: what its source
gives to its target, in the target's units.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from sememe import artifact
from sememe.errors import ArtifactError, ConfigError, CorruptError

__all__ = [
    "FILE",
    "FORMAT_VERSION",
    "DictionaryRef",
    "Edge",
    "Floats",
    "Graph",
    "GraphKind",
    "GraphNode",
    "Integers",
    "Links",
    "Mask",
    "NodeKind",
    "Pruned",
    "Scores",
    "from_json",
    "influence",
    "node_id",
    "part",
    "prune",
    "read_graph",
    "scores",
    "to_json",
    "total_effects",
    "write_graph",
]

FORMAT_VERSION = 1
FILE = "graph.json"
"""A graph's name in the folder of the artifact that holds it."""

GraphKind = Literal["attribution", "linear"]
NodeKind = Literal["latent", "error", "token", "logit"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]


class GraphNode(NamedTuple):
    """Something at one layer and position. A token's layer is -1; a logit's is the number of layers."""

    id: str
    """Unique in the graph; see `node_id`."""
    kind: NodeKind
    layer: int
    position: int
    dictionary: int | None = None
    """Which of the graph's dictionaries a latent belongs to."""
    latent: int | None = None
    """A latent's number in its dictionary; a token's or a logit's id in the vocabulary."""
    act: float = 0.0
    """A latent's activation; the size of an error or an embedding; a logit's value."""
    effect: float = 0.0
    """What the node does to the metric, as predicted, signed; a logit's own is its weight in the metric."""
    exact: float | None = None
    """The same by a real forward, where that was run."""
    influence: float | None = None
    """The share of the metric's |paths| that go through the node; see `influence`."""
    label: str | None = None
    """What people read: an explanation, a token's text."""


class Edge(NamedTuple):
    """From a node to another; in JSON the fields are `from`, `to` and `weight`."""

    source: str
    target: str
    weight: float


class DictionaryRef(NamedTuple):
    """A dictionary whose latents are in the graph."""

    name: str
    hookpoints: tuple[str, ...]
    fingerprint: str
    d_sae: int
    atlas: str | None = None
    """The folder of an atlas of it, for whoever draws the graph."""


class Graph(NamedTuple):
    """A whole graph. `pair`, `scores` and `checks` are plain JSON objects of the verb that made it."""

    kind: GraphKind
    model: str
    ids: tuple[int, ...]
    """The prompt."""
    tokens: tuple[str, ...]
    """Its tokens as text."""
    metric: Mapping[str, Any]
    """What is explained: name, text, its value on the `clean` run and (attribution) on the `patched` one."""
    nodes: Sequence[GraphNode]
    edges: Sequence[Edge]
    dictionaries: Sequence[DictionaryRef] = ()
    pair: Mapping[str, Any] | None = None
    """The run it is compared with, where there is one."""
    scores: Mapping[str, Any] = {}
    checks: Mapping[str, Any] = {}


def node_id(layer: int | str, what: int | str, position: int) -> str:
    """The id of a node: `8:123@5`, `8:error@5`, `-1:token@5`.

    Args:
        layer: The layer; a hookpoint where dictionaries of several places of one layer are in the graph.
        what: The latent, or the kind of node; `logit 262` for a logit.
        position: Of the token.
    """
    return f"{layer}:{what}@{position}"


# ---- JSON ---------------------------------------------------------------------------------------------------


def to_json(graph: Graph) -> dict[str, Any]:
    """The graph as JSON data.

    Raises:
        CorruptError: it is not a graph, see `from_json`.
    """
    data = {
        "format_version": FORMAT_VERSION,
        "kind": graph.kind,
        "model": graph.model,
        "prompt": {"ids": list(graph.ids), "tokens": list(graph.tokens)},
        "pair": None if graph.pair is None else dict(graph.pair),
        "metric": dict(graph.metric),
        "dictionaries": [one._asdict() | {"hookpoints": list(one.hookpoints)} for one in graph.dictionaries],
        "nodes": [node._asdict() for node in graph.nodes],
        "edges": [{"from": edge.source, "to": edge.target, "weight": edge.weight} for edge in graph.edges],
        "scores": dict(graph.scores),
        "checks": dict(graph.checks),
    }
    from_json(data)
    return data


def from_json(data: Any, where: str = "the graph") -> Graph:
    """A graph from JSON data, checked.

    Args:
        data: What `to_json` gave.
        where: What an error calls it.
    Raises:
        ArtifactError: it is of a newer format.
        CorruptError: a field is missing or of a wrong type; an id stands twice; a node's position, dictionary or latent
            does not exist; an edge has an unknown end; a number is not finite.
    """
    try:
        if int(data["format_version"]) > FORMAT_VERSION:
            raise ArtifactError(
                f"{where} must have format_version <= {FORMAT_VERSION}",
                data["format_version"],
                "Upgrade sememe to read it.",
            )
        graph = Graph(
            kind=data["kind"],
            model=str(data["model"]),
            ids=tuple(int(i) for i in data["prompt"]["ids"]),
            tokens=tuple(str(token) for token in data["prompt"]["tokens"]),
            metric=dict(data["metric"]),
            nodes=[_node(one) for one in data["nodes"]],
            edges=[Edge(str(one["from"]), str(one["to"]), float(one["weight"])) for one in data["edges"]],
            dictionaries=[
                DictionaryRef(
                    str(one["name"]),
                    tuple(str(name) for name in one["hookpoints"]),
                    str(one["fingerprint"]),
                    int(one["d_sae"]),
                    None if one.get("atlas") is None else str(one["atlas"]),
                )
                for one in data["dictionaries"]
            ],
            pair=None if data.get("pair") is None else dict(data["pair"]),
            scores=dict(data["scores"]),
            checks=dict(data["checks"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _corrupt(where, "be a graph", f"{type(error).__name__}: {error}") from None
    _check(graph, where)
    return graph


def _node(one: Mapping[str, Any]) -> GraphNode:
    def maybe(name: str, kind: type) -> Any:
        value = one.get(name)
        return None if value is None else kind(value)

    return GraphNode(
        str(one["id"]),
        one["kind"],
        int(one["layer"]),
        int(one["position"]),
        maybe("dictionary", int),
        maybe("latent", int),
        float(one["act"]),
        float(one["effect"]),
        maybe("exact", float),
        maybe("influence", float),
        maybe("label", str),
    )


def _check(graph: Graph, where: str) -> None:
    if graph.kind not in get_args(GraphKind):
        raise _corrupt(where, f"be of a kind in {get_args(GraphKind)}", repr(graph.kind))
    if len(graph.ids) != len(graph.tokens):
        raise _corrupt(
            where, "have as many tokens as ids in its prompt", f"{len(graph.tokens)} and {len(graph.ids)}"
        )
    known: set[str] = set()
    for node in graph.nodes:
        wrong = _wrong_with(node, graph)
        if wrong or node.id in known:
            raise _corrupt(where, wrong or "have each node's id once", f"{node.id!r}")
        known.add(node.id)
    for edge in graph.edges:
        if edge.source not in known or edge.target not in known or edge.source == edge.target:
            raise _corrupt(
                where, "have edges between two of its nodes", f"{edge.source!r} to {edge.target!r}"
            )
        if not math.isfinite(edge.weight):
            raise _corrupt(
                where, "have finite weights", f"{edge.weight} from {edge.source!r} to {edge.target!r}"
            )


def _wrong_with(node: GraphNode, graph: Graph) -> str:
    """Which rule a node breaks; empty if none."""
    numbers = (node.act, node.effect, node.exact, node.influence)
    if node.kind not in get_args(NodeKind):
        return f"have nodes of a kind in {get_args(NodeKind)}"
    if not 0 <= node.position < len(graph.ids):
        return f"have nodes at positions in [0, {len(graph.ids) - 1}]"
    if not all(number is None or math.isfinite(number) for number in numbers):
        return "have finite numbers at its nodes"
    if node.kind == "latent":
        if node.dictionary is None or not 0 <= node.dictionary < len(graph.dictionaries):
            return f"have latents of its {len(graph.dictionaries)} dictionaries"
        if node.latent is None or not 0 <= node.latent < graph.dictionaries[node.dictionary].d_sae:
            return f"have latents in [0, {graph.dictionaries[node.dictionary].d_sae - 1}]"
    return ""


def _corrupt(where: str, rule: str, value: str) -> CorruptError:
    return CorruptError(f"{where} must {rule}", value, "Make it again with the verb that wrote it.")


def read_graph(path: str | Path) -> Graph:
    """The graph of an artifact's folder, or of a JSON file.

    Raises:
        ArtifactError: there is none.
        CorruptError: it is not one.
    """
    path = Path(path)
    if path.is_dir():
        folder = artifact.load(path)
        if FILE not in folder.meta["files"]:
            raise ArtifactError(
                f"{path} must hold a graph",
                f"an artifact of kind {folder.kind} without {FILE}",
                "Name a folder that `sememe trace` or `sememe circuit` wrote.",
            )
        path = folder.file(FILE, verify=True)
    elif not path.is_file():
        raise ArtifactError(
            f"{path} must hold a graph",
            "nothing there",
            "Name a folder that `sememe trace` or `sememe circuit` wrote, or its graph.json.",
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise _corrupt(str(path), "be JSON", str(error).splitlines()[0]) from None
    return from_json(data, str(path))


def write_graph(path: str | Path, graph: Graph) -> None:
    """Write the graph into a JSON file, checked first.

    Raises:
        CorruptError: it is not one.
    """
    artifact.write_json(path, to_json(graph))


def part(graph: Graph, nodes: Mask, edges: Mask | None = None) -> Graph:
    """The graph with some of its nodes, and of the edges between them those that are asked for.

    Args:
        graph: The whole.
        nodes: True for each node that stays.
        edges: True for each edge that may stay; all, if not given.
    """
    kept = [node for node, stays in zip(graph.nodes, nodes, strict=True) if stays]
    ids = {node.id for node in kept}
    may = np.ones(len(graph.edges), dtype=bool) if edges is None else edges
    return graph._replace(
        nodes=kept,
        edges=[
            edge
            for edge, stays in zip(graph.edges, may, strict=True)
            if stays and edge.source in ids and edge.target in ids
        ],
    )


# ---- sums over paths ------------------------------------------------------------------------------------------


class Links(NamedTuple):
    """The edges by number: `weight[e]` goes from node `source[e]` to node `target[e]`."""

    source: Integers
    target: Integers
    weight: Floats
    kinds: NDArray[np.str_]
    """The kind of each node."""

    @property
    def n_nodes(self) -> int:
        """How many nodes there are."""
        return len(self.kinds)

    def dense(self) -> Floats:
        """`A[target, source]`, for small graphs."""
        out = np.zeros((self.n_nodes, self.n_nodes))
        np.add.at(out, (self.target, self.source), self.weight)
        return out


def _shares(links: Links) -> Floats:
    """Each edge's |weight| as a share of all that enters its target; rows of |A| divided by their sums."""
    size: Floats = np.abs(links.weight)
    total = np.bincount(links.target, size, links.n_nodes)
    return size / np.maximum(total[links.target], 1e-10)


def _paths(links: Links, weight: Floats, sinks: Floats) -> Floats:
    """sinks @ (A + A^2 + A^3 + ...): the sum over all paths that end in the sinks, by the node they begin at."""
    current: Floats = np.asarray(sinks, dtype=np.float64)
    total = np.zeros(links.n_nodes)
    for _ in range(links.n_nodes + 1):
        current = _summed(links.source, weight * current[links.target], links.n_nodes)
        if not current.any():
            return total
        total += current
    raise CorruptError(
        "a graph's edges must form no cycle",
        f"paths longer than its {links.n_nodes} nodes",
        "Let edges go from earlier to later layers only.",
    )


def _summed(places: Integers, values: Floats, n: int) -> Floats:
    """Values added up by place; floats also where there are none."""
    return np.bincount(places, values, n).astype(np.float64)


def influence(links: Links, sinks: Floats) -> Floats:
    """How much of what reaches the sinks goes through each node, by absolute shares.

    |A|'s rows (one per target) are divided by their sums; the influence is sinks @ (A + A^2 + ...).

    Args:
        links: The edges.
        sinks: The weight of each node as something to explain: the logits' probabilities, 0 elsewhere.
    Returns:
        One number per node; the sinks' own weight is not counted.
    Raises:
        CorruptError: the edges form a cycle.
    Source: Ameisen et al. 2025 (Circuit Tracing), "Graph pruning".
    """
    return _paths(links, _shares(links), sinks)


def total_effects(links: Links, sinks: Floats) -> Floats:
    """What each node gives to the sinks along all paths, signed: sinks @ (A + A^2 + ...), nothing normalised.

    Weights are multiplied along a path, so an edge has to hold what of its target's value is its source's: what enters
    a latent is divided by the latent's activation beforehand.

    Args:
        links: The edges, as factors.
        sinks: What one unit of each node is worth.
    Raises:
        CorruptError: the edges form a cycle.
    """
    return _paths(links, links.weight, sinks)


class Pruned(NamedTuple):
    """What stays of a graph."""

    nodes: Mask
    edges: Mask
    influence: Floats
    """Of each node of the whole graph."""


def prune(links: Links, sinks: Floats, keep_nodes: float = 0.8, keep_edges: float = 0.98) -> Pruned:
    """The nodes, and then the edges between them, that hold most of the influence; loose ends fall away.

    Tokens and logits always stay. A latent or an error stays only while an edge leaves it, a latent only while one
    enters it.

    Args:
        links: The edges.
        sinks: As for `influence`.
        keep_nodes: The share of all nodes' influence that the kept ones hold at least.
        keep_edges: The same of the edges between them.
    Raises:
        ConfigError: a share is outside [0, 1].
        CorruptError: the edges form a cycle.
    Source: circuit-tracer, `prune_graph`.
    """
    for name, asked in (("keep_nodes", keep_nodes), ("keep_edges", keep_edges)):
        if not 0 <= asked <= 1:
            raise ConfigError(f"{name} must be in [0, 1]", asked, "Give a share.")
    through = influence(links, sinks)
    always = np.isin(links.kinds, ("token", "logit"))
    nodes = (through >= _threshold(through, keep_nodes)) | always
    inside = nodes[links.source] & nodes[links.target]
    kept = links._replace(weight=np.where(inside, links.weight, 0.0))
    share = _shares(kept)
    of_edges = share * (_paths(kept, share, sinks) + sinks)[links.target]
    edges = inside & (of_edges >= _threshold(of_edges, keep_edges)) & (of_edges > 0)
    is_latent = links.kinds == "latent"
    while True:
        leaves, enters = np.zeros(links.n_nodes, dtype=bool), np.zeros(links.n_nodes, dtype=bool)
        leaves[links.source[edges]] = True
        enters[links.target[edges]] = True
        stays = nodes & (leaves | always) & (enters | ~is_latent)
        if bool((stays == nodes).all()):
            return Pruned(nodes, edges, through)
        nodes = stays
        edges = edges & nodes[links.source] & nodes[links.target]


def _threshold(values: Floats, share: float) -> float:
    """The smallest value among the largest ones that together hold a share of the sum."""
    if values.size == 0:
        return 0.0
    falling = np.sort(values)[::-1]
    total = falling.sum()
    if total <= 0:
        return 0.0
    place = int(np.searchsorted(np.cumsum(falling) / total, share))
    return float(falling[min(place, falling.size - 1)])


class Scores(NamedTuple):
    """How much of a graph its latents explain, each in [0, 1]."""

    replacement: float
    """Of the influence that begins in tokens or errors, the share that begins in tokens."""
    completeness: float
    """The share of what enters a node that comes from no error, on average over all nodes by their influence."""


def scores(links: Links, sinks: Floats) -> Scores:
    """Replacement and completeness.

    Args:
        links: The edges of the unpruned graph.
        sinks: As for `influence`.
    Raises:
        CorruptError: the edges form a cycle.
    Source: Ameisen et al. 2025, "Evaluating attribution graphs"; circuit-tracer, `compute_graph_scores`: nodes that
        nothing enters (tokens, errors) count as complete, as there.
    """
    share = _shares(links)
    through = _paths(links, share, sinks)
    tokens, errors = through[links.kinds == "token"].sum(), through[links.kinds == "error"].sum()
    from_errors = np.where(links.kinds[links.source] == "error", share, 0.0)
    without = 1 - np.bincount(links.target, from_errors, links.n_nodes)
    weight = through + sinks
    return Scores(
        float(tokens / max(tokens + errors, 1e-12)),
        float((without * weight).sum() / max(weight.sum(), 1e-12)),
    )
