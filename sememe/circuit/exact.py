"""The same effects by real forwards: latents taken out of the model's MLP outputs, everything else free to follow.

Knows the model and what latents write. Attention patterns, norms, MLPs and the other latents respond here, which the
frozen model's prediction leaves out: how well the two agree is what says whether the graph is worth reading. An edge is
looked at in two ways: with the MLPs between its ends held, which an edge leaves to other edges, and with all free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sememe.circuit.sources import Sources
from sememe.graph import Floats, Integers
from sememe.lm import LanguageModel
from sememe.progress import track

__all__ = ["agreement", "chosen", "exact_edges", "exact_effects"]

Change = Callable[[Tensor], Tensor]


def chosen(effects: Floats, candidates: Integers, n: int, seed: int) -> Integers:
    """Which of the candidates are checked: half of n the strongest, the rest drawn among the others."""
    order = candidates[np.argsort(-np.abs(effects[candidates]), kind="stable")]
    strongest, others = order[: (n + 1) // 2], order[(n + 1) // 2 :]
    drawn = np.random.default_rng(seed).permutation(others)[: n - len(strongest)]
    return np.concatenate([strongest, drawn]).astype(np.int64)


def exact_effects(
    lm: LanguageModel,
    ids: Int[Tensor, "1 seq"],
    sources: Sources,
    which: Sequence[int],
    metric: Callable[[Float[Tensor, "n d_hidden"]], Float[Tensor, " n"]],
    batch: int,
) -> list[float]:
    """What the metric loses when each of some active latents is taken out at its position.

    Args:
        lm: The model.
        ids: The prompt.
        sources: Its active latents.
        which: Some of them.
        metric: Of what the unembedding sees at the last position.
        batch: Rows of one forward.
    """
    found: list[float] = []
    with torch.inference_mode(), track("check", len(which), "latents") as progress:
        clean = float(metric(lm.hidden(ids)[:, -1].float())[0])
        for start in range(0, len(which), batch):
            part = list(which[start : start + batch])
            with lm.edit(_without(sources, part)):
                hidden = lm.hidden(ids.expand(len(part), -1))
            found += (clean - metric(hidden[:, -1].float())).tolist()
            progress.advance(len(part))
    return found


def exact_edges(
    lm: LanguageModel,
    ids: Int[Tensor, "1 seq"],
    sources: Sources,
    edges: Sequence[tuple[int, int]],
    batch: int,
    *,
    held: bool,
) -> list[float]:
    """What the target of each edge loses, before its activation function, when the source is taken out of the model.

    Args:
        lm: The model.
        ids: The prompt.
        sources: Its active latents.
        edges: Source and target, two of them, the target in a later layer.
        batch: Rows of one forward.
        held: Whether MLPs between the two keep what they wrote; attention and norms follow either way.
    """
    found = [0.0] * len(edges)
    layers = [int(sources.latents.layer[target]) for _, target in edges]
    with torch.inference_mode(), track("check", len(edges), "edges") as progress:
        for layer in sorted(set(layers)):
            name = f"mlp_in.{layer}"
            clean = lm.capture(ids, name)[name][0].float()
            mine = [i for i, own in enumerate(layers) if own == layer]
            for start in range(0, len(mine), batch):
                part = mine[start : start + batch]
                origins, targets = ([edges[i][side] for i in part] for side in (0, 1))
                edits = _without(sources, origins)
                if held:
                    edits = _held(sources, origins, layer)
                with lm.edit(edits):
                    x = lm.capture(ids.expand(len(part), -1), name)[name].float()
                at = sources.latents.position[targets].to(x.device)
                lost = clean[at] - x[torch.arange(len(part), device=x.device), at]
                reads = sources.reads(torch.tensor(targets)).to(lost)
                for i, value in zip(part, (lost * reads).sum(1).tolist(), strict=True):
                    found[i] = value
                progress.advance(len(part))
    return found


def _without(sources: Sources, which: Sequence[int]) -> dict[str, Change]:
    """Edits that subtract from row r what the r-th latent writes."""

    def subtract(at: Tensor, rows: Tensor) -> Change:
        def change(x: Tensor) -> Tensor:
            x = x.clone()
            x[torch.arange(len(rows), device=x.device), at.to(x.device)] -= rows.to(x)
            return x

        return change

    at = sources.latents.position[list(which)]
    return {f"mlp_out.{layer}": subtract(at, rows) for layer, rows in _written(sources, which).items()}


def _held(sources: Sources, which: Sequence[int], end: int) -> dict[str, Change]:
    """Edits after which MLPs below a layer write what they wrote on the prompt, less what row r's latent does.

    Skip connections are no part of what is held: they carry what their MLP reads now.
    """
    at, written = sources.latents.position[list(which)], _written(sources, which)
    read: dict[int, Tensor] = {}

    def keep(layer: int) -> Change:
        def see(x: Tensor) -> Tensor:
            read[layer] = x
            return x

        return see

    def put(layer: int) -> Change:
        leaf = sources.leaf(layer).expand(len(which), -1, -1).clone()
        if layer in written:
            leaf[torch.arange(len(which), device=leaf.device), at.to(leaf.device)] -= written[layer].to(leaf)
        return lambda x: sources.put(layer, leaf)(read).to(x)

    edits: dict[str, Change] = {}
    for layer in range(min(written), end):
        edits |= {f"mlp_in.{layer}": keep(layer), f"mlp_out.{layer}": put(layer)}
    return edits


def _written(sources: Sources, which: Sequence[int]) -> dict[int, Float[Tensor, "n d_model"]]:
    """What some latents write, by layer; nothing where one does not write to it."""
    written = [sources.written(i) for i in which]
    nothing = sources.errors.new_zeros(sources.errors.shape[-1])
    return {
        layer: torch.stack([one.get(layer, nothing) for one in written])
        for layer in sorted({layer for one in written for layer in one})
    }


def agreement(predicted: Sequence[float], exact: Sequence[float]) -> float | None:
    """Pearson's correlation; None of fewer than three, or where one of them does not vary."""
    if len(predicted) < 3 or np.std(predicted) == 0 or np.std(exact) == 0:
        return None
    return float(np.corrcoef(predicted, exact)[0, 1])
