"""What dictionaries find of each other's decoder directions: cosines, signed. Runs no model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int32

from sememe import metrics
from sememe.compare.config import CompareConfig
from sememe.dictionaries.base import Dictionary
from sememe.progress import track

__all__ = ["FOUND_COSINE", "all_pairs", "one_pair"]

MATCHES = "matches_{}_to_{}.npz"
FOUND_COSINE = 0.9
HISTOGRAM_BINS = 40


def all_pairs(loaded: dict[str, Dictionary]) -> dict[str, Any]:
    """mmcs of every dictionary to every other, and the share of its latents found there.

    Row by column: how much of the row's latents the column's hold. The diagonal is 1. `random` is each one's mmcs to as
    many random directions as the widest has latents: what no resemblance gives.
    """
    names = list(loaded)
    n = len(names)
    mmcs, found = np.eye(n), np.eye(n)
    pairs = list(itertools.permutations(range(n), 2))
    with track("compare directions", len(pairs), "pairs") as progress, torch.inference_mode():
        for one, other in pairs:
            best = metrics.mcs(
                loaded[names[one]].decoder_directions(), loaded[names[other]].decoder_directions()
            )
            mmcs[one, other] = float(best.double().mean())
            found[one, other] = float((best > FOUND_COSINE).double().mean())
            progress.advance(1)
        d_sae = max(one.d_sae for one in loaded.values())
        rows = [loaded[name].decoder_directions() for name in names]
        random = metrics.random_rows(d_sae, rows[0].shape[1]).to(rows[0].device)
        chance = [metrics.mmcs(one, random) for one in rows]
    share = {f"share_above_{FOUND_COSINE:g}": found.tolist()}
    return {"names": names, "mmcs": mmcs.tolist(), "random": chance, **share}


def one_pair(config: CompareConfig, loaded: dict[str, Dictionary], folder: Path) -> dict[str, Any]:
    """Of two dictionaries, a and b: mmcs both ways, and for each the share found, a histogram, the nearest latents.

    Writes `matches_a_to_b.npz` and `matches_b_to_a.npz`: `indices` and `cosines` of shape (d_sae, n_nearest), nearest
    first.
    """
    names = dict(zip("ab", loaded, strict=True))
    data: dict[str, Any] = {"a": names["a"], "b": names["b"]}
    edges = np.linspace(-1, 1, HISTOGRAM_BINS + 1)
    for one, other in (("a", "b"), ("b", "a")):
        with torch.inference_mode():
            ours, theirs = (loaded[names[side]].decoder_directions() for side in (one, other))
            nearest = metrics.nearest_directions(ours, theirs, min(config.n_nearest, theirs.shape[0]))
        cosines, indices = nearest.cosines.cpu().numpy(), nearest.indices.cpu().numpy().astype(np.int32)
        np.savez_compressed(folder / MATCHES.format(one, other), indices=indices, cosines=cosines)
        best = cosines[:, 0].astype(np.float64)
        order = np.argsort(-best, kind="stable").tolist()
        counts, _ = np.histogram(best.clip(-1, 1), bins=edges)
        data[f"mmcs_{one}_to_{other}"] = float(best.mean())
        data[f"{one}_to_{other}"] = {
            "n_latents": int(best.size),
            "n_there": int(theirs.shape[0]),
            "median_mcs": float(np.median(best)),
            f"share_above_{FOUND_COSINE:g}": float((best > FOUND_COSINE).mean()),
            "n_distinct_matches": int(np.unique(indices[:, 0]).size),
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            "best": [_match(i, indices, best) for i in order[: config.n_shown]],
            "worst": [_match(i, indices, best) for i in order[::-1][: config.n_shown]],
        }
    return data


def _match(
    latent: int, indices: Int32[np.ndarray, "latents n_nearest"], best: Float64[np.ndarray, " latents"]
) -> dict[str, Any]:
    return {"latent": latent, "nearest": int(indices[latent, 0]), "cosine": float(best[latent])}
