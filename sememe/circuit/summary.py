"""A graph as a Markdown page: what is explained, how well, and the nodes that matter most. Knows graphs only."""

from __future__ import annotations

from sememe.graph import Graph, GraphNode

__all__ = ["page"]

N_SHOWN = 25


def page(graph: Graph) -> str:
    """Prompt, explained tokens, scores, checks, and the strongest latents."""
    checks, scores = graph.checks, graph.scores
    logits = [node for node in graph.nodes if node.kind == "logit"]
    latents = sorted((n for n in graph.nodes if n.kind == "latent"), key=lambda n: -abs(n.effect))
    lines = [
        f"# What {graph.model} computes on a prompt",
        "",
        f"Prompt: `{_code(''.join(graph.tokens))}`",
        "",
        "| explained token | probability | logit |",
        "|---|---|---|",
        *(f"| `{_code(node.label or '')}` | {node.effect:.3f} | {node.act:+.3f} |" for node in logits),
        "",
        "Logits are less their mean over the vocabulary.",
        "",
        "| measure | value |",
        "|---|---|",
        f"| replacement score | {scores['replacement']:.3f} |",
        f"| completeness score | {scores['completeness']:.3f} |",
        f"| latents active, looked into, kept | {checks['n_active']:,}, {checks['n_targets']:,}, {len(latents):,} |",
        f"| share of the latents' influence that was looked into | {checks['influence_covered']:.3f} |",
        f"| edges kept | {len(graph.edges):,} of {checks['n_edges']:,} |",
        f"| largest deviation of a sum from its target | {checks['sum_off']:.2g} |",
        f"| correlation with exact ablations ({checks['n_checked']}) | {_number(checks['correlation'])} |",
        f"| the same, of the strongest ({checks['n_strongest']}) | {_number(checks['correlation_strongest'])} |",
        f"| correlation of edges with what their targets really lose ({checks['n_checked_edges']}), MLPs in between "
        f"held | {_number(checks['correlation_edges'])} |",
        f"| the same, all of the model free to follow | {_number(checks['correlation_edges_free'])} |",
        "",
        f"The {min(N_SHOWN, len(latents))} latents with the largest effects on the metric:",
        "",
        "| layer | latent | at | activation | effect | exact | what |",
        "|---|---|---|---|---|---|---|",
        *(_row(graph, node) for node in latents[:N_SHOWN]),
        "",
    ]
    return "\n".join(lines)


def _row(graph: Graph, node: GraphNode) -> str:
    token = f"{node.position} `{_code(graph.tokens[node.position])}`"
    return (
        f"| {node.layer} | {node.latent} | {token} | {node.act:.3g} | {node.effect:+.4f} | {_number(node.exact)} | "
        f"{_code(node.label or '')} |"
    )


def _number(value: float | None) -> str:
    return "--" if value is None else f"{value:+.4f}"


def _code(text: str) -> str:
    """Text that leaves a table's cell whole."""
    return text.replace("\n", "\\n").replace("|", "\\|").replace("`", "'")
