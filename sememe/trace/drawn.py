"""What was found as a graph, and as plain JSON. Knows atlases' labels; computes no effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sememe import artifact
from sememe.atlas import dictionary_of, open_atlas
from sememe.errors import MismatchError
from sememe.graph import DictionaryRef, Edge, Graph, GraphNode, NodeKind, node_id
from sememe.lm import LanguageModel
from sememe.trace.config import TraceConfig
from sememe.trace.edges import METRIC
from sememe.trace.exact import agreement
from sememe.trace.feeds import Fed
from sememe.trace.places import Placed
from sememe.trace.results import Traced
from sememe.trace.table import ERROR

__all__ = ["About", "about", "details", "details_of", "graph", "tree"]


class About(NamedTuple):
    """Dictionaries in their places' order, and labels of their latents."""

    refs: tuple[DictionaryRef, ...]
    labels: tuple[Mapping[int, str], ...]


def about(
    places: Sequence[Placed],
    folders: Mapping[str, Path],
    config: TraceConfig,
    saved: Mapping[str, artifact.Artifact],
) -> About:
    """What is known of the dictionaries.

    Args:
        places: In order.
        folders: Of the dictionaries, by name.
        config: Where atlases and explanations are, in the order of config.dictionaries.
        saved: The dictionaries' folders, opened.
    Raises:
        MismatchError: an atlas is of another dictionary.
    """
    atlases = dict(zip(config.dictionaries, config.atlases, strict=False))
    explained = dict(zip(config.dictionaries, config.explanations, strict=False))
    refs, labels = [], []
    for placed in places:
        folder = folders[placed.name]
        own = saved[str(folder)]
        path = atlases.get(folder)
        sites = dict.fromkeys((placed.reads, placed.writes))
        refs.append(
            DictionaryRef(
                placed.name, tuple(sites), own.fingerprint, placed.d_sae, None if path is None else str(path)
            )
        )
        labels.append({} if path is None else _labels(path, explained.get(folder), own))
    return About(tuple(refs), tuple(labels))


def _labels(path: Path, explanations: Path | None, dictionary: artifact.Artifact) -> dict[int, str]:
    atlas = open_atlas(path, explanations=explanations)
    try:
        if dictionary_of(atlas) != dictionary.fingerprint:
            raise MismatchError(
                f"the atlas {path} must be of the dictionary {dictionary.path} "
                f"(fingerprint {dictionary.fingerprint[:16]})",
                f"an atlas of {dictionary_of(atlas)[:16]}",
                "Name atlases in the order of the dictionaries.",
            )
        if explanations is None:
            return {}
        rows = atlas.query("SELECT latent, label FROM explanations WHERE label IS NOT NULL")
        return {row["latent"]: row["label"] for row in rows}
    finally:
        atlas.close()


def _layer_names(places: Sequence[Placed]) -> list[int | str]:
    """How a place is called in ids: by its layer, or by its hookpoint where several are in one."""
    layers = [placed.layer for placed in places]
    return [p.layer if layers.count(p.layer) == 1 else p.writes for p in places]


def graph(found: Traced, known: About) -> Graph:
    """The kept nodes and edges of one number."""
    table, lm = found.setting.table, found.setting.passes.lm
    metric = found.setting.passes.metric
    places = table.places
    called = _layer_names(places)
    last = int(metric.positions.max())
    ids = table.inputs.ids[0][table.inputs.mask[0]].tolist()
    acts = table.acts().tolist()
    effects = found.attribution.effects.tolist()
    exact = dict(zip(found.checked, found.exact, strict=True))
    positions = _positions(found)
    nodes: list[GraphNode] = []
    names: dict[int, str] = {}
    for number in found.nodes:
        node = table.describe(number)
        is_error = node.latent == ERROR
        position = min(positions[number], len(ids) - 1)
        names[number] = node_id(called[node.place], "error" if is_error else node.latent, position)
        nodes.append(
            GraphNode(
                names[number],
                "error" if is_error else "latent",
                places[node.place].layer,
                position,
                node.place,
                None if is_error else node.latent,
                acts[number],
                effects[number],
                exact.get(number),
                None,
                None if is_error else known.labels[node.place].get(node.latent),
            )
        )
    names[METRIC] = node_id(lm.n_layers, "metric", min(last, len(ids) - 1))
    nodes.append(
        GraphNode(
            names[METRIC],
            "logit",
            lm.n_layers,
            min(last, len(ids) - 1),
            act=found.attribution.clean,
            effect=1.0,
            label=metric.text,
        )
    )
    edges = (
        []
        if found.edges is None
        else [
            Edge(names[s], names[t], w)
            for s, t, w in zip(
                found.edges.source.tolist(),
                found.edges.target.tolist(),
                found.edges.weight.tolist(),
                strict=True,
            )
        ]
    )
    return Graph(
        "attribution",
        lm.name,
        tuple(ids),
        tuple(lm.token_text(i) for i in ids),
        {
            "name": metric.name,
            "text": metric.text,
            "clean": found.attribution.clean,
            "patched": found.setting.patched,
        },
        nodes,
        edges,
        known.refs,
        _pair(found),
        _scores(found),
        _checks(found),
    )


def _positions(found: Traced) -> list[int]:
    """Of each node; where nodes are not at one, that at which its entries do most."""
    table = found.setting.table
    if table.by_position:
        return table.node_position.tolist()  # type: ignore[no-any-return]
    entries = table.effects(found.setting.base.gradients).abs()
    sums = entries.new_zeros(table.n_nodes, table.seq)
    sums.index_put_((table.node, table.token % table.seq), entries, accumulate=True)
    return sums.argmax(1).tolist()


def _pair(found: Traced) -> dict[str, Any] | None:
    config = found.config
    if not config.patched:
        return {
            "prompts": list(config.prompts),
            "ablation": config.ablation,
            "by_position": config.by_position,
        }
    return {
        "prompts": list(config.prompts),
        "patched": list(config.patched),
        "ablation": config.ablation,
        "by_position": config.by_position,
    }


def _scores(found: Traced) -> dict[str, Any]:
    table, effects = found.setting.table, found.attribution.effects
    errors = table.node_latent == ERROR
    by_place = [
        {
            "hookpoint": placed.writes,
            "latents": float(effects[(table.node_place == i) & ~errors].sum()),
            "errors": float(effects[(table.node_place == i) & errors].sum()),
            "rest": float(found.attribution.rest[i]),
            "share_of_errors": _share(effects[table.node_place == i].abs(), errors[table.node_place == i]),
        }
        for i, placed in enumerate(table.places)
    ]
    return {
        "n_nodes": table.n_nodes,
        "n_prompts": table.n_prompts,
        "method": found.config.method
        if found.config.method == "gradient"
        else f"ig, path {found.config.path}",
        "n_forwards": found.attribution.n_forwards,
        "n_backwards": found.attribution.n_backwards,
        "places": by_place,
        "curves": found.curves,
    }


def _share(sizes: Any, chosen: Any) -> float | None:
    total = float(sizes.sum())
    return float(sizes[chosen].sum()) / total if total else None


def _checks(found: Traced) -> dict[str, Any]:
    """How well predictions hold: the largest, the random ones, latents and errors apart, edges."""
    effects, n = found.attribution.effects.tolist(), found.config.n_largest
    predicted = [effects[node] for node in found.checked]
    is_error = (found.setting.table.node_latent == ERROR).tolist()
    out = {
        "largest": agreement(predicted[:n], found.exact[:n])._asdict(),
        "random": agreement(predicted[n:], found.exact[n:])._asdict(),
    }
    for name, wanted in (("largest_latents", False), ("largest_errors", True)):
        chosen = [i for i, node in enumerate(found.checked[:n]) if is_error[node] == wanted]
        out[name] = agreement([predicted[i] for i in chosen], [found.exact[i] for i in chosen])._asdict()
    if found.checked_edges:
        out["edges"] = agreement(_edge_weights(found), found.exact_edges)._asdict()
    return out


def _edge_weights(found: Traced) -> list[float]:
    assert found.all_edges is not None
    edges = found.all_edges
    weights = dict(
        zip(
            zip(edges.source.tolist(), edges.target.tolist(), strict=True), edges.weight.tolist(), strict=True
        )
    )
    return [weights[pair] for pair in found.checked_edges]


def details(found: Traced) -> dict[str, Any]:
    """Every node with its effect, and the checks one by one."""
    table, effects = found.setting.table, found.attribution.effects.tolist()
    exact = dict(zip(found.checked, found.exact, strict=True))
    nodes = [
        {
            "place": table.places[node.place].writes,
            "latent": None if node.latent == ERROR else node.latent,
            "position": node.position,
            "effect": effects[number],
            "exact": exact.get(number),
        }
        for number in sorted(range(table.n_nodes), key=lambda i: -abs(effects[i]))
        for node in (table.describe(number),)
    ]
    edges = (
        {"predicted": _edge_weights(found), "exact": found.exact_edges}
        if found.checked_edges
        else {"predicted": [], "exact": []}
    )
    checked = {
        "predicted": [effects[node] for node in found.checked],
        "exact": found.exact,
        "n_largest": found.config.n_largest,
    }
    return {"nodes": nodes, "checked": checked, "checked_edges": edges}


def details_of(found: Sequence[Fed]) -> dict[str, Any]:
    """What feeds each latent, and the contexts in which it was looked at."""
    return {"feeds": [fed._asdict() | {"contexts": [c._asdict() for c in fed.contexts]} for fed in found]}


def tree(lm: LanguageModel, places: Sequence[Placed], found: Sequence[Fed], known: About) -> Graph:
    """What feeds a latent, as a graph on its strongest context; a node lies where it matters most, on average."""
    root = found[0]
    ids = list(root.contexts[0].ids)
    last = len(ids) - 1
    called = _layer_names(places)
    means = {(fed.place, fed.latent): fed.mean for fed in found}
    nodes: dict[tuple[int, int | None], GraphNode] = {}
    edges: list[Edge] = []

    def node(
        place: int, latent: int | None, position: int, effect: float = 0.0, exact: float | None = None
    ) -> str:
        key = (place, latent)
        if key not in nodes:
            name = node_id(called[place], "error" if latent is None else latent, position)
            label = None if latent is None else known.labels[place].get(latent)
            kind: NodeKind = "error" if latent is None else "latent"
            act = 0.0 if latent is None else means.get((place, latent), 0.0)
            nodes[key] = GraphNode(
                name, kind, places[place].layer, position, place, latent, act, effect, exact, label=label
            )
        return nodes[key].id

    for fed in found:
        at = node(fed.place, fed.latent, last)
        own = nodes[fed.place, fed.latent].position
        for source in fed.sources:
            if source["exact"] is None:
                continue
            position = min(max(own + source["offset"], 0), last)
            name = node(
                fed.place - 1, source["latent"], position, effect=source["effect"], exact=source["exact"]
            )
            # what taking it out takes away is what it gives
            edges.append(Edge(name, at, -source["exact"]))
    predicted = [value for fed in found for value in fed.checks["predicted"]]
    exact = [value for fed in found for value in fed.checks["exact"]]
    return Graph(
        "attribution",
        lm.name,
        tuple(ids),
        tuple(lm.token_text(i) for i in ids),
        {
            "name": "latent",
            "text": f"the activation of latent {root.latent} at {places[root.place].reads}",
            "clean": root.mean,
            "patched": None,
        },
        list(nodes.values()),
        edges,
        known.refs,
        None,
        {"n_contexts": len(root.contexts), "largest": root.largest},
        {"largest": agreement(predicted, exact)._asdict()},
    )
