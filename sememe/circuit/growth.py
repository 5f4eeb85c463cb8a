"""Which targets are looked into, those with most influence first, and the edges that are found. Knows rows and sums.

Rows are looked at as they come and then kept sparsely: the largest entries of each, which hold nearly all of it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sememe import graph
from sememe.circuit.config import CircuitConfig
from sememe.circuit.rows import Rows, RowSet, Targets
from sememe.circuit.sources import Sources
from sememe.errors import ModelError
from sememe.graph import Floats, Integers, Links
from sememe.lm import Frozen
from sememe.progress import track

__all__ = ["Grown", "grow"]

HELD = 0.999
"""The share of the absolute sum of a latent's row that its kept entries hold; logits' rows are kept whole."""
BATCHES_BETWEEN = 4
"""Backwards between two rankings of what to look into next."""
SUM_RTOL = {torch.float32: 1e-3}
"""How far a row may be from adding up, as a share of its sizes' sum; 5e-2 in shorter types."""


class Grown(NamedTuple):
    """The edges into everything that was looked into, unpruned."""

    links: Links
    sinks: Floats
    n_targets: int
    """Latents that were looked into."""
    covered: float
    """Their share of all active latents' influence."""
    off: float
    """The largest deviation of a target from the sum of what enters it, as a share of the sizes' sum."""

    def effects(self, sources: Sources) -> Floats:
        """What each node gives to the metric along all paths, latents answering in proportion."""
        acts = np.ones(self.links.n_nodes)
        acts[: sources.n_latents] = sources.latents.act.double().cpu().numpy()
        shares = self.links.weight / acts[self.links.target]
        return graph.total_effects(self.links._replace(weight=shares), self.sinks) + self.sinks


class _Edges:
    """Rows so far, sparsely."""

    def __init__(self, kinds: np.ndarray) -> None:
        self.kinds = kinds
        self._parts: list[tuple[Integers, Integers, Floats]] = []
        self.off = 0.0

    def add(self, targets: Integers, rows: RowSet, held: float = HELD) -> None:
        self.off = max(self.off, float(rows.off.max()))
        weights = rows.weights.detach().cpu().numpy()
        for target, row in zip(targets, weights, strict=True):
            source = np.flatnonzero(row)
            if len(source) == 0:
                continue
            if held < 1:
                order = source[np.argsort(-np.abs(row[source]), kind="stable")]
                sums = np.cumsum(np.abs(row[order]), dtype=np.float64)
                source = np.sort(order[: int(np.searchsorted(sums, held * sums[-1])) + 1])
            self._parts.append((source, np.full(len(source), target), row[source].astype(np.float64)))

    def links(self) -> Links:
        if not self._parts:
            none = np.zeros(0, dtype=np.int64)
            return Links(none, none, np.zeros(0), self.kinds)
        source, target, weight = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        return Links(source, target, weight, self.kinds)


def grow(
    config: CircuitConfig,
    frozen: Frozen,
    sources: Sources,
    logits: Targets,
    probabilities: Float[Tensor, " n"],
) -> Grown:
    """Rows of the logits, and then of the latents that have most influence on them, until there are enough.

    Raises:
        ModelError: what enters a target does not add up to it.
    """
    n_logits, n_latents = len(logits.layer), sources.n_latents
    kinds = np.array(
        ["latent"] * n_latents
        + ["error"] * (sources.n_layers * sources.seq)
        + ["token"] * sources.seq
        + ["logit"] * n_logits
    )
    sinks = np.zeros(len(kinds))
    sinks[sources.n :] = probabilities.double().cpu().numpy()
    edges = _Edges(kinds)
    rows = Rows(frozen, sources, min(config.batch_rows, max(n_latents, n_logits)))
    for start in range(0, n_logits, rows.batch):
        part = slice(start, start + rows.batch)
        found = rows.of(Targets(*(column[part] for column in logits)))
        edges.add(np.arange(sources.n + start, sources.n + start + len(found.rest)), found, held=1.0)
    n_wanted = min(config.n_latents, n_latents)
    seen = np.zeros(n_latents, dtype=bool)
    with track("circuit", n_wanted, "latents") as progress:
        while (left := n_wanted - int(seen.sum())) > 0:
            if n_wanted == n_latents:
                queue = np.flatnonzero(~seen)
            else:
                through = graph.influence(edges.links(), sinks)[:n_latents]
                order = np.argsort(-through, kind="stable")
                queue = order[~seen[order]][: min(left, BATCHES_BETWEEN * rows.batch)]
            queue = queue[np.argsort(sources.latents.layer.cpu().numpy()[queue], kind="stable")]
            for start in range(0, len(queue), rows.batch):
                ids = queue[start : start + rows.batch]
                edges.add(ids, rows.of(_targets(sources, ids)))
                seen[ids] = True
                progress.advance(len(ids))
    tolerance = SUM_RTOL.get(frozen.lm.dtype, 5e-2)
    if not edges.off <= tolerance:
        raise ModelError(
            f"what enters a node must add up to it, to {tolerance:g} of the sum of sizes",
            f"{edges.off:.2g}",
            "Load the model in float32 (--dtype).",
        )
    links = edges.links()
    through = graph.influence(links, sinks)[:n_latents]
    # A latent that was not looked into has no known inputs, and so is no part of the graph.
    keep = np.append(seen, np.ones(len(kinds) - n_latents, dtype=bool))[links.source]
    links = links._replace(source=links.source[keep], target=links.target[keep], weight=links.weight[keep])
    covered = float(through[seen].sum() / through.sum()) if through.sum() > 0 else 1.0
    return Grown(links, sinks, int(seen.sum()), covered, edges.off)


def _targets(sources: Sources, ids: Integers) -> Targets:
    which = torch.from_numpy(ids).to(sources.latents.act.device)
    found = sources.latents
    return Targets(
        found.layer[which], found.position[which], sources.reads(which), found.offset[which], found.act[which]
    )
