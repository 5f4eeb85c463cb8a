"""Graphs: JSON there and back, what is refused, and sums over paths against graphs small enough to do by hand."""

import json

import numpy as np
import pytest

from sememe import graph as graphs
from sememe.errors import ArtifactError, ConfigError, CorruptError
from sememe.graph import DictionaryRef, Edge, Graph, GraphNode, Links, node_id


def links_of(graph: graphs.Graph) -> graphs.Links:
    """The edges of a graph by the number of their ends in its list of nodes."""
    number = {node.id: i for i, node in enumerate(graph.nodes)}
    return graphs.Links(
        np.array([number[edge.source] for edge in graph.edges], dtype=np.int64),
        np.array([number[edge.target] for edge in graph.edges], dtype=np.int64),
        np.array([edge.weight for edge in graph.edges], dtype=np.float64),
        np.array([node.kind for node in graph.nodes], dtype=str),
    )


def hand_made() -> Graph:
    """token -> a -> logit; error -> a, b -> logit; c feeds nothing."""
    nodes = [
        GraphNode("-1:token@0", "token", -1, 0, act=2.0, label="The"),
        GraphNode("0:error@0", "error", 0, 0, act=1.0),
        GraphNode(node_id(0, 3, 0), "latent", 0, 0, 0, 3, 1.5, 0.6),
        GraphNode(node_id(0, 4, 0), "latent", 0, 0, 0, 4, 0.5, -0.2),
        GraphNode(node_id(0, 5, 0), "latent", 0, 0, 0, 5, 0.1, 0.0),
        GraphNode("1:logit 7@0", "logit", 1, 0, None, 7, 0.5, 1.0),
    ]
    edges = [
        Edge("-1:token@0", "0:3@0", 3.0),
        Edge("0:error@0", "0:3@0", -1.0),
        Edge("0:error@0", "0:4@0", 2.0),
        Edge("-1:token@0", "0:5@0", 1.0),
        Edge("0:3@0", "1:logit 7@0", 0.6),
        Edge("0:4@0", "1:logit 7@0", -0.2),
        Edge("-1:token@0", "1:logit 7@0", 0.2),
    ]
    return Graph(
        "linear",
        "tiny",
        (5,),
        ("The",),
        {"name": "logits", "text": "7", "clean": 0.5, "patched": None},
        nodes,
        edges,
        [DictionaryRef("d", ("mlp_out.0",), "f" * 64, 8, None)],
    )


SINKS = np.array([0.0, 0, 0, 0, 0, 1.0])


def test_json_there_and_back(tmp_path):
    path = tmp_path / "graph.json"
    graphs.write_graph(path, hand_made())
    assert graphs.read_graph(path) == hand_made()
    data = json.loads(path.read_text())
    assert data["edges"][0] == {"from": "-1:token@0", "to": "0:3@0", "weight": 3.0}
    assert set(data["nodes"][2]) == set(GraphNode._fields)
    assert data["format_version"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["nodes"][2].update(id="0:4@0"), r"each node's id once, got '0:4@0'"),
        (lambda d: d["nodes"][2].update(position=1), r"positions in \[0, 0\]"),
        (lambda d: d["nodes"][2].update(latent=8), r"latents in \[0, 7\]"),
        (lambda d: d["nodes"][2].update(dictionary=1), r"latents of its 1 dictionaries"),
        (lambda d: d["nodes"][2].update(kind="neuron"), r"nodes of a kind in"),
        (lambda d: d["nodes"][2].update(effect=float("nan")), r"finite numbers at its nodes"),
        (lambda d: d["edges"][0].update(to="9:9@9"), r"edges between two of its nodes.*'9:9@9'"),
        (lambda d: d["edges"][0].update(weight=float("inf")), r"finite weights"),
        (lambda d: d.pop("edges"), r"must be a graph, got KeyError: 'edges'"),
        (lambda d: d["prompt"].update(ids=[]), r"as many tokens as ids in its prompt, got 1 and 0"),
        (lambda d: d.update(kind="causal"), r"of a kind in"),
    ],
)
def test_what_is_no_graph_is_refused(change, message):
    data = graphs.to_json(hand_made())
    change(data)
    with pytest.raises(CorruptError, match=message):
        graphs.from_json(data)


def test_files_that_hold_no_graph_are_refused(tmp_path):
    with pytest.raises(
        ArtifactError, match=r"must hold a graph, got nothing there\. Name a folder that `sememe trace`"
    ):
        graphs.read_graph(tmp_path / "nothing")
    (tmp_path / "broken.json").write_text('{"kind": ')
    with pytest.raises(CorruptError, match="must be JSON"):
        graphs.read_graph(tmp_path / "broken.json")
    newer = graphs.to_json(hand_made()) | {"format_version": 2}
    with pytest.raises(ArtifactError, match=r"format_version <= 1, got 2. Upgrade"):
        graphs.from_json(newer)


def test_influence_by_hand():
    """The logit takes 0.6, 0.2, 0.2 of 1; latent 3 takes 3/4 of the token and 1/4 of the error."""
    links = links_of(hand_made())
    expected = [0.6 * 0.75 + 0.2, 0.6 * 0.25 + 0.2, 0.6, 0.2, 0.0, 0.0]
    assert graphs.influence(links, SINKS) == pytest.approx(expected)


def test_scores_by_hand():
    """Token 0.65 against error 0.35; of what enters, latent 3 has 3/4 and latent 4 nothing from elsewhere."""
    links = links_of(hand_made())
    through = np.array([0.65, 0.35, 0.6, 0.2, 0.0, 1.0])
    without = np.array([1, 1, 0.75, 0.0, 1.0, 1.0])
    found = graphs.scores(links, SINKS)
    assert found.replacement == pytest.approx(0.65)
    assert found.completeness == pytest.approx((through * without).sum() / through.sum())


def test_scores_without_errors_are_one():
    links = Links(np.array([0]), np.array([1]), np.array([-2.0]), np.array(["token", "logit"]))
    assert graphs.scores(links, np.array([0.0, 1.0])) == (1.0, 1.0)


def test_sums_over_paths_equal_the_inverse():
    """sinks @ ((I - A)^-1 - I), on random edges from lower to higher numbers."""
    generator = np.random.default_rng(0)
    n = 30
    source, target = np.nonzero(np.triu(generator.random((n, n)) < 0.3, k=1))
    links = Links(source, target, generator.normal(size=source.size), np.full(n, "latent"))
    sinks = np.zeros(n)
    sinks[-3:] = [0.5, 0.3, 0.2]
    matrix = links.dense()
    assert matrix[target[0], source[0]] == links.weight[0]
    assert graphs.total_effects(links, sinks) == pytest.approx(
        sinks @ (np.linalg.inv(np.eye(n) - matrix) - np.eye(n))
    )
    size = np.abs(matrix)
    rows = size / np.maximum(size.sum(1, keepdims=True), 1e-10)
    assert graphs.influence(links, sinks) == pytest.approx(
        sinks @ (np.linalg.inv(np.eye(n) - rows) - np.eye(n))
    )


def test_pruning_by_hand():
    """Of 1.8 in all, 1.25 are in the token and latent 3; the third is the error (0.35), whose edges must stay too."""
    links = links_of(hand_made())
    pruned = graphs.prune(links, SINKS, keep_nodes=0.69, keep_edges=1.0)
    assert pruned.nodes.tolist() == [True, False, True, False, False, True]
    assert pruned.edges.tolist() == [True, False, False, False, True, False, True]
    pruned = graphs.prune(links, SINKS, keep_nodes=0.85, keep_edges=1.0)
    assert pruned.nodes.tolist() == [True, True, True, False, False, True]
    small = graphs.part(hand_made(), pruned.nodes, pruned.edges)
    assert [edge.source for edge in small.edges] == ["-1:token@0", "0:error@0", "0:3@0", "-1:token@0"]
    assert graphs.from_json(graphs.to_json(small)) == small


def test_loose_ends_fall_away_in_turn():
    """token -> a -> b -> logit with a weak last edge: without it b leads nowhere, and then a does not."""
    links = Links(
        np.array([0, 1, 2, 0]),
        np.array([1, 2, 3, 3]),
        np.array([1.0, 1.0, 0.001, 1.0]),
        np.array(["token", "latent", "latent", "logit"]),
    )
    pruned = graphs.prune(links, np.array([0, 0, 0, 1.0]), keep_nodes=1.0, keep_edges=0.9)
    assert pruned.nodes.tolist() == [True, False, False, True]
    assert pruned.edges.tolist() == [False, False, False, True]


def test_everything_stays_when_all_is_asked_for():
    links = links_of(hand_made())
    pruned = graphs.prune(links, SINKS, 1.0, 1.0)
    assert pruned.nodes.tolist() == [True, True, True, True, False, True], "latent 5 leads nowhere"


def test_shares_outside_0_and_1_and_cycles_are_refused():
    links = links_of(hand_made())
    with pytest.raises(ConfigError, match=r"keep_nodes must be in \[0, 1\], got 80. Give a share."):
        graphs.prune(links, SINKS, 80)
    cycle = Links(np.array([0, 1]), np.array([1, 0]), np.ones(2), np.array(["latent", "latent"]))
    with pytest.raises(CorruptError, match="no cycle, got paths longer than its 2 nodes"):
        graphs.influence(cycle, np.array([1.0, 0.0]))
