"""What nodes and edges really do: one at a time changed in the model, and what is above computed again.

The truth that predicted effects are held against. Knows splicing; draws nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sememe.lm import LanguageModel
from sememe.splice import BaseRun, Splicer
from sememe.trace.attribution import Pass, Passes
from sememe.trace.places import Inputs, kept, read
from sememe.trace.table import ERROR, Table

__all__ = ["Agreement", "agreement", "exact_edges", "exact_effects"]


@torch.no_grad()
def exact_effects(
    passes: Passes, table: Table, base: Pass, nodes: Sequence[int], *, batch_rows: int = 16
) -> Float[Tensor, " k"]:
    """The change of the number when each node alone is changed, mean over prompts.

    Args:
        passes: The model, its prompts and the number.
        table: What the nodes are.
        base: The run in which nothing is changed.
        nodes: Which.
        batch_rows: Rows of tokens in a forward.
    """
    out = torch.zeros(len(nodes))
    n = table.n_prompts
    clean = base.value.cpu()
    where = table.node_place[list(nodes)].tolist() if len(nodes) else []
    for place, placed in enumerate(table.places):
        mine = [i for i, at in enumerate(where) if at == place]
        if not mine:
            continue
        splicer = Splicer(passes.lm, [placed.writes], [placed.writes])
        run = splicer.base(passes.inputs.ids, passes.inputs.mask)
        step = max(batch_rows // n, 1)
        for start in range(0, len(mine), step):
            part = mine[start : start + step]
            moves = torch.stack(
                [table.moved(place, table.entries_of(torch.tensor([nodes[i]]))) for i in part]
            )
            x = run.activations[placed.writes]
            moves = moves.reshape(len(part) * n, *x.shape[1:])
            several = _repeated(run, len(part))
            old = several.activations[placed.writes]
            new = (old.float() + moves.to(old.device)).to(old.dtype)
            value = passes.metric.spliced(splicer, several, {placed.writes: new}).float().cpu()
            out[part] = (value.reshape(-1, n) - clean).mean(1)
    return out


def _repeated(run: BaseRun, times: int) -> BaseRun:
    return BaseRun(
        run.ids.repeat(times, 1),
        None if run.mask is None else run.mask.repeat(times, 1),
        run.hidden,
        {name: x.repeat(times, 1, 1) for name, x in run.activations.items()},
    )


@torch.no_grad()
def exact_edges(
    passes: Passes,
    table: Table,
    base: Pass,
    edges: Sequence[tuple[int, int]],
    *,
    direct: bool = True,
    batch_rows: int = 16,
) -> Float[Tensor, " k"]:
    """What each edge carries when its source is changed: the target's own change, times the number's gradient at it.

    Args:
        passes: The model, its prompts and the number.
        table: What the nodes are.
        base: The run in which nothing is changed.
        edges: Source and target, each a node; target -1 is the number itself.
        direct: Whether places between the two keep what they hold.
        batch_rows: Rows of tokens in a forward.
    """
    out = torch.zeros(len(edges))
    kinds: dict[tuple[int, int], list[int]] = {}
    for i, (source, target) in enumerate(edges):
        at = int(table.node_place[target]) if target >= 0 else len(table.places)
        kinds.setdefault((int(table.node_place[source]), at), []).append(i)
    step = max(batch_rows // table.n_prompts, 1)
    for (first, last), mine in kinds.items():
        for start in range(0, len(mine), step):
            part = mine[start : start + step]
            out[part] = _edges(passes, table, base, [edges[i] for i in part], first, last, direct)
    return out


def _edges(
    passes: Passes,
    table: Table,
    base: Pass,
    edges: Sequence[tuple[int, int]],
    first: int,
    last: int,
    direct: bool,
) -> Float[Tensor, " k"]:
    lm, n, k = passes.lm, table.n_prompts, len(edges)
    moves = torch.stack([table.moved(first, table.entries_of(torch.tensor([s]))) for s, _ in edges])
    edits: dict[str, Any] = {
        table.places[first].writes: lambda x: (x.float() + moves.to(x.device).reshape(x.shape)).to(x.dtype)
    }
    if direct:
        for placed in table.places[first + 1 : last]:
            held = base.activations[placed.writes].repeat(k, 1, 1)
            edits[placed.writes] = lambda x, held=held: held.to(x.device, x.dtype)
    inputs = passes.inputs.repeated(k)
    with lm.edit(edits):
        if last == len(table.places):
            value = passes.metric.forward(lm, inputs).float().cpu().reshape(k, n)
            return (value - base.value.cpu()).mean(1)
        found = _captured(lm, table, last, inputs)
    return torch.stack(
        [
            _along_target(
                lm, table, base, target, {name: x[i * n : (i + 1) * n] for name, x in found.items()}
            )
            for i, (_, target) in enumerate(edges)
        ]
    )


def _captured(lm: LanguageModel, table: Table, place: int, inputs: Inputs) -> dict[str, Tensor]:
    placed = table.places[place]
    return lm.capture(inputs.ids, list(dict.fromkeys((placed.reads, placed.writes))), inputs.mask)


def _along_target(
    lm: LanguageModel, table: Table, base: Pass, target: int, activations: Mapping[str, Tensor]
) -> Float[Tensor, ""]:
    """How far a target moved, times the number's gradient at it, mean over prompts."""
    place = int(table.node_place[target])
    placed = table.places[place]
    gradient = base.gradients[place]
    keep = kept(lm, placed, table.inputs)
    before = read(placed, base.activations[placed.reads], base.activations[placed.writes], keep)
    after = read(placed, activations[placed.reads], activations[placed.writes], keep)
    mine = table.entries_of(torch.tensor([target]))
    token, latent = table.token[mine], table.latent[mine]
    if int(latent[0]) == ERROR:
        return ((after.error - before.error)[token] * gradient[token]).sum().cpu() / table.n_prompts
    at = {int(t): i for i, t in enumerate(token)}
    total = 0.0
    slope = (gradient[token] * placed.directions[latent]).sum(1)
    for reading, sign in ((after, 1.0), (before, -1.0)):
        for i in torch.nonzero(reading.latent == latent[0])[:, 0].tolist():
            if int(reading.token[i]) in at:
                total += sign * float(reading.act[i]) * float(slope[at[int(reading.token[i])]])
    return torch.tensor(total / table.n_prompts)


class Agreement(NamedTuple):
    """Predictions beside the truth."""

    n: int
    correlation: float | None
    """Pearson's; None where either does not vary."""
    slope: float | None
    """Truth over prediction, least squares through 0."""
    spearman: float | None


def agreement(predicted: Sequence[float], exact: Sequence[float]) -> Agreement:
    """How well predictions hold."""
    a, b = np.asarray(predicted, dtype=np.float64), np.asarray(exact, dtype=np.float64)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return Agreement(len(a), None, None, None)
    from scipy.stats import spearmanr

    return Agreement(
        len(a),
        float(np.corrcoef(a, b)[0, 1]),
        float((a * b).sum() / (a * a).sum()),
        float(spearmanr(a, b).statistic),
    )
