"""Embedding: are the windows in which it fires nearer to the explanation than the silent ones? Asks no judge.

Knows windows and a function from texts to vectors. Source: delphi's embedding scorer. Differs: as `detection`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from sememe.explain.scorers.base import Evidence, Score, cropped

__all__ = ["Encode", "auroc", "embedding"]

Encode = Callable[[Sequence[str]], Float[np.ndarray, "n d"]]
"""Texts to unit vectors."""


def embedding(explanation: str, evidence: Evidence, encode: Encode) -> list[Score]:
    """2 AUROC - 1 of the cosine between explanation and window, whole and by decile (each against all silent ones).

    NaN where the latent has no window of one kind.
    """
    rng = evidence.rng("embedding")
    yes = [cropped(window, rng) for window in evidence.active]
    no = [cropped(window, rng) for window in evidence.silent]
    vectors = encode([explanation, *(window.text for window in (*yes, *no))])
    cosines = vectors[1:] @ vectors[0]
    hits, alarms = cosines[: len(yes)], cosines[len(yes) :]
    deciles = np.array([-1 if window.decile is None else window.decile for window in yes])
    out = []
    for decile in (None, *sorted(set(deciles.tolist()) - {-1})):
        chosen = hits if decile is None else hits[deciles == decile]
        score = 2 * auroc(chosen, alarms) - 1 if chosen.size and alarms.size else math.nan
        out.append(Score("embedding", "cosine", decile, score, chosen.size + alarms.size, 0))
    return out


def auroc(yes: Float[np.ndarray, " n"], no: Float[np.ndarray, " m"]) -> float:
    """Probability that one of `yes` is larger than one of `no`, ties half. Neither is empty."""
    larger = (yes[:, None] > no[None, :]).mean()
    return float(larger + (yes[:, None] == no[None, :]).mean() / 2)
