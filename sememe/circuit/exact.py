"""The same effects by real forwards: latents taken out of the model's MLP outputs, everything else free to follow.

Knows the model and what latents write. Attention patterns, norms, MLPs and the other latents respond here, which the
frozen model's prediction leaves out: how well the two agree is what says whether the graph is worth reading.
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

__all__ = ["agreement", "chosen", "exact_effects"]


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


def _without(sources: Sources, which: Sequence[int]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Edits that subtract from row r what the r-th latent writes."""
    at = sources.latents.position[list(which)]
    written = [sources.written(i) for i in which]
    edits: dict[str, Callable[[Tensor], Tensor]] = {}
    for layer in sorted({layer for one in written for layer in one}):
        width = sources.errors.shape[-1]
        rows = torch.stack([one.get(layer, sources.errors.new_zeros(width)) for one in written])

        def subtract(x: Tensor, rows: Tensor = rows) -> Tensor:
            x = x.clone()
            row = torch.arange(len(rows), device=x.device)
            x[row, at.to(x.device)] -= rows.to(x)
            return x

        edits[f"mlp_out.{layer}"] = subtract
    return edits


def agreement(predicted: Sequence[float], exact: Sequence[float]) -> float | None:
    """Pearson's correlation; None of fewer than three, or where one of them does not vary."""
    if len(predicted) < 3 or np.std(predicted) == 0 or np.std(exact) == 0:
        return None
    return float(np.corrcoef(predicted, exact)[0, 1])
