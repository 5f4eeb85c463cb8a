"""Graphs of any size for the tests of the page, with texts in them that break pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sememe.graph import DictionaryRef, Edge, Graph, GraphNode, node_id, write_graph

TOKENS = ["The", " river", "<script>alert(1)</script>", "\u202eesrever", " runs", "\n", " past", " </svg>"]
LABEL = "<img src=x onerror=alert(1)> ${1+1}"


def synthetic_graph(
    n_latents: int = 60,
    n_edges: int = 240,
    n_layers: int = 6,
    n_tokens: int = 8,
    fingerprint: str = "f" * 64,
    seed: int = 0,
) -> Graph:
    """Latents and errors in random places, with edges from earlier layers and tokens to later ones."""
    rng = np.random.default_rng(seed)
    tokens = [TOKENS[i % len(TOKENS)] for i in range(n_tokens)]
    nodes = [
        GraphNode(node_id(-1, "token", p), "token", -1, p, latent=p, act=1.0, effect=0.1, label=tokens[p])
        for p in range(n_tokens)
    ]
    for i in range(n_latents):
        layer, position = int(rng.integers(n_layers)), int(rng.integers(n_tokens))
        effect = float(rng.normal()) * (3.0 if i < 3 else 0.4)
        nodes.append(
            GraphNode(
                node_id(layer, i, position), "latent", layer, position, 0, i, float(rng.exponential()), effect,
                effect * 0.9 if i % 4 == 0 else None, float(rng.random()) / 5, LABEL if i == 0 else None,
            )
        )  # fmt: skip
    for layer in range(0, n_layers, 2):
        nodes.append(
            GraphNode(node_id(layer, "error", 1), "error", layer, 1, act=2.0, effect=0.3, influence=0.1)
        )
    for token in (7, 9):
        name = node_id(n_layers, f"logit {token}", n_tokens - 1)
        nodes.append(
            GraphNode(
                name,
                "logit",
                n_layers,
                n_tokens - 1,
                None,
                token,
                3.0,
                0.4,
                label=" king" if token == 7 else " <b>",
            )
        )
    seen: set[tuple[int, int]] = set()
    edges = []
    for _ in range(40 * n_edges):
        a, b = (int(i) for i in rng.integers(len(nodes), size=2))
        ahead = nodes[a].layer < nodes[b].layer and nodes[a].position <= nodes[b].position
        if ahead and nodes[b].kind in ("latent", "logit") and nodes[a].kind != "logit" and (a, b) not in seen:
            seen.add((a, b))
            edges.append(Edge(nodes[a].id, nodes[b].id, float(rng.normal())))
        if len(edges) == n_edges:
            break
    return Graph(
        "linear", "synthetic-1m", tuple(range(n_tokens)), tuple(tokens),
        {"name": "logits", "text": "the logits of ' king' and ' <b>'", "clean": 2.5, "patched": None},
        nodes, edges, [DictionaryRef("d", ("mlp_in.0", "mlp_out.0"), fingerprint, 10**6, None)], None,
        {"replacement": 0.61, "completeness": 0.83}, {"correlation": 0.92, "n_checked": 16, "sum_off": 1e-6},
    )  # fmt: skip


def write_synthetic_graph(path: Path, **options: object) -> Path:
    """The same as a JSON file."""
    write_graph(path, synthetic_graph(**options))  # type: ignore[arg-type]
    return path
