"""What goes from one node to another: products of Jacobians, one backward for each target node.

The edge from a node s to a later node t weighs what changing s gives to the number through t, to first order:

    weight = dm/dt * dt/dx * dx/ds * (s' - s)

with t a latent (dt/dx from its encoder), an error, or the number itself. Direct edges stop at every dictionary in
between: latents and errors there are held, and so is the whole activation. Total edges do not stop.

Knows no text; the truth is in `exact.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.trace.attribution import Pass, Passes, check_slope, frozen
from sememe.trace.places import Inputs, Placed, along, kept
from sememe.trace.table import ERROR, Table

__all__ = ["METRIC", "Edges", "edges_of"]

METRIC = -1
"""In the place of a node as an edge's target: the number itself."""
TOKENS_AT_ONCE = 512
"""In a backward for several targets: the graph of all layers is kept for each of them."""


class Edges(NamedTuple):
    """Edges as three columns."""

    source: Int[Tensor, " n"]
    target: Int[Tensor, " n"]
    weight: Float[Tensor, " n"]


class _Graph(NamedTuple):
    """One forward whose graph is kept: what places hold before anything is added, and the zeros that were."""

    value: Tensor
    held: dict[str, Tensor]
    leaves: dict[str, Tensor]


def edges_of(
    passes: Passes,
    table: Table,
    base: Pass,
    nodes: Int[Tensor, " k"],
    *,
    direct: bool = True,
    batch_rows: int = 16,
) -> Edges:
    """All edges between some nodes, and from them to the number.

    Args:
        passes: The model, its prompts and the number.
        table: What the nodes are.
        base: The run in which nothing is changed.
        nodes: Between which.
        direct: Whether what goes through a dictionary in between is left out.
        batch_rows: Rows of tokens in a backward: as many targets at once as there is room for.
    Raises:
        ConfigError: the number is flat where nothing is changed: edges weigh its gradient there.
    """
    check_slope(passes, base)
    n = table.n_prompts
    times = max(min(batch_rows, TOKENS_AT_ONCE // table.seq) // n, 1)
    chosen = table.entries_of(nodes)
    found: list[Edges] = []
    graph = _forward(passes, table.places, passes.inputs.repeated(times), direct)
    grads = _backward(graph, graph.value, torch.ones_like(graph.value), table.places, len(table.places))
    found += _collect(table, chosen, nodes, grads, [METRIC], n)
    for place in range(1, len(table.places)):
        targets = nodes[table.node_place[nodes] == place]
        for part in torch.split(targets, times):
            grads = _to_targets(passes, table, base, graph, place, part)
            found += _collect(table, chosen, nodes, grads, part.tolist(), n)
    return Edges(*(torch.cat(columns) for columns in zip(*found, strict=True)))


def _forward(passes: Passes, places: Sequence[Placed], inputs: Inputs, direct: bool) -> _Graph:
    held: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    writes = {placed.writes for placed in places}

    def hook(name: str) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            held[name] = x
            if name not in writes:
                return x
            leaves[name] = torch.zeros_like(x, requires_grad=True)
            return (x.detach() if direct else x) + leaves[name]

        return change

    names = dict.fromkeys(name for placed in places for name in (placed.reads, placed.writes))
    with (
        torch.enable_grad(),
        frozen(passes.lm),
        passes.counted(),
        passes.lm.edit({n: hook(n) for n in names}),
    ):
        value = passes.metric.forward(passes.lm, inputs)
    return _Graph(value, held, leaves)


def _backward(
    graph: _Graph,
    output: Tensor | Sequence[Tensor],
    cotangent: Tensor | Sequence[Tensor],
    places: Sequence[Placed],
    n: int,
) -> list[Tensor | None]:
    """Gradients at the first n places; None where nothing arrives."""
    outputs = [output] if isinstance(output, Tensor) else list(output)
    cotangents = [cotangent] if isinstance(cotangent, Tensor) else list(cotangent)
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs:
        return [None] * n
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        [graph.leaves[placed.writes] for placed in places[:n]],
        [c for _, c in pairs],
        retain_graph=True,
        allow_unused=True,
    )
    return [None if g is None else g.float() for g in found]


def _to_targets(
    passes: Passes, table: Table, base: Pass, graph: _Graph, place: int, targets: Int[Tensor, " t"]
) -> list[Tensor | None]:
    """One backward for several targets of a place, each in rows of its own."""
    placed, n = table.places[place], table.n_prompts
    names = list(dict.fromkeys((placed.reads, placed.writes)))
    cotangents = {name: torch.zeros_like(graph.held[name], dtype=torch.float32) for name in names}
    keep = kept(passes.lm, placed, table.inputs)
    for i, target in enumerate(targets.tolist()):
        rows = slice(i * n, (i + 1) * n)
        for name, found in target_gradient(table, base, keep, target).items():
            cotangents[name][rows] += found.to(cotangents[name].device)
    passes.n_backwards += 1
    return _backward(
        graph,
        [graph.held[name] for name in names],
        [cotangents[name].to(graph.held[name].dtype) for name in names],
        table.places,
        place,
    )


def target_gradient(
    table: Table, base: Pass, keep: Bool[Tensor, " tokens"], target: int
) -> dict[str, Float[Tensor, "batch seq d"]]:
    """The number's gradient at what a target is made of: dm/dt dt/dx.

    Args:
        table: What the target is.
        base: The run in which nothing is changed.
        keep: Positions that its dictionary's policy keeps.
        target: A node.
    """
    place = int(table.node_place[target])
    placed, gradient = table.places[place], base.gradients[place]
    mine = table.entries_of(torch.tensor([target]))
    token, latent = table.token[mine], table.latent[mine]
    x = base.activations[placed.reads].reshape(table.n_tokens, -1).to(placed.directions.device, torch.float32)
    rows = x[token].detach().requires_grad_(True)
    out: dict[str, Tensor] = {}
    is_error = int(latent[0]) == ERROR
    with torch.enable_grad():
        encoded = placed.dictionary.encode(rows).compact()
        if is_error:
            alive = keep[token] & placed.site.admits(rows.detach())
            recon = placed.dictionary.decode(encoded, rows) * alive[:, None]
            number = -(recon * gradient[token]).sum()
        else:
            slope = along(placed, gradient, token, latent)
            row = encoded.row_ids()
            hit = encoded.indices.long() == latent[row]
            number = (encoded.acts * slope[row] * hit).sum()
    found = torch.autograd.grad(number, rows, allow_unused=True)[0] if number.requires_grad else None
    found = torch.zeros_like(rows) if found is None else found
    lead = base.activations[placed.reads].shape
    out[placed.reads] = x.new_zeros(x.shape).index_add_(0, token, found).reshape(lead)
    if is_error:
        own = torch.zeros_like(gradient).index_add_(0, token, gradient[token])
        own = own.reshape(base.activations[placed.writes].shape)
        out[placed.writes] = out[placed.writes] + own if placed.writes in out else own
    return out


def _collect(
    table: Table,
    chosen: Bool[Tensor, " n_entries"],
    nodes: Int[Tensor, " k"],
    gradients: Sequence[Tensor | None],
    targets: Sequence[int],
    n: int,
) -> list[Edges]:
    """Edges from the chosen nodes into some targets, whose gradients lie in rows of their own."""
    out = []
    for i, target in enumerate(targets):
        full = []
        for j, placed in enumerate(table.places):
            gradient = gradients[j] if j < len(gradients) else None
            if gradient is None:
                full.append(placed.directions.new_zeros(table.n_tokens, placed.directions.shape[1]))
            else:
                full.append(gradient[i * n : (i + 1) * n].reshape(table.n_tokens, -1))
        weights = table.per_node(table.effects(full, only=chosen))[nodes]
        sources = torch.nonzero(weights != 0)[:, 0]
        out.append(Edges(nodes[sources], torch.full_like(sources, target), weights[sources]))
    return out
