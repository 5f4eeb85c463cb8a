"""What dictionaries find of each other's decoder directions. Runs no model.

Cosines are signed, but where activations of either dictionary may be below 0 (PCA, ICA, AbsTopK, sparse coders): there
the sign of a direction means nothing, and absolute ones count.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int32, Shaped
from scipy.stats import binom
from torch import Tensor

from sememe import metrics
from sememe.compare.config import CompareConfig
from sememe.dictionaries.base import Dictionary
from sememe.progress import track

__all__ = ["FOUND_COSINE", "all_pairs", "one_pair"]

MATCHES = "matches_{}_to_{}.npz"
FOUND_COSINE = 0.9
HISTOGRAM_BINS = 40

Entry = dict[str, Any]
"""A number with its interval, as plain data."""


def all_pairs(config: CompareConfig, loaded: dict[str, Dictionary]) -> dict[str, Any]:
    """mmcs of every dictionary to every other, and the share of its latents found there, with intervals over latents.

    Row by column: how much of the row's latents the column's hold. The diagonal is 1. `random` is each one's mmcs to as
    many random directions as the widest has latents: what no resemblance gives. `differences` says of each row in which
    column it is found best, and whether better than in every other: paired, as these are the same latents.
    """
    names = list(loaded)
    above = f"share_above_{FOUND_COSINE:g}"
    cells: dict[str, list[list[Entry]]] = {"mmcs": [], above: []}
    random: dict[str, list[Entry]] = {"random": [], f"random_{above}": []}
    differences: list[dict[str, Any]] = []
    pairs = list(itertools.permutations(names, 2))
    rows = {name: one.decoder_directions() for name, one in loaded.items()}
    signed = {name: one.signed for name, one in loaded.items()}
    first = next(iter(rows.values()))
    strangers = metrics.random_rows(max(len(one) for one in rows.values()), first.shape[1]).to(first.device)
    with track("compare directions", len(pairs), "pairs") as progress, torch.inference_mode():
        for one in names:
            found: dict[str, Float64[Tensor, " d_sae"]] = {}
            for other in names:
                if other != one:
                    absolute = signed[one] or signed[other]
                    found[other] = metrics.mcs(rows[one], rows[other], absolute=absolute).double().cpu()
                    progress.advance(1)
            itself: Entry = {"value": 1.0, "low": None, "high": None}
            cells["mmcs"].append([_mean(config, found[name]) if name in found else itself for name in names])
            cells[above].append([_share(config, found[name]) if name in found else itself for name in names])
            chance = metrics.mcs(rows[one], strangers, absolute=signed[one]).double().cpu()
            random["random"].append(_mean(config, chance))
            random[f"random_{above}"].append(_share(config, chance))
            differences += _differences(config, one, found)
    return {"names": names, **cells, **random, "differences": differences}


def _mean(config: CompareConfig, cosines: Shaped[Tensor, " latents"]) -> Entry:
    return metrics.over_latents(cosines, n_bootstrap=config.n_bootstrap, seed=config.seed).to_json()


def _share(config: CompareConfig, cosines: Float64[Tensor, " latents"]) -> Entry:
    return _mean(config, cosines > FOUND_COSINE)


def _differences(
    config: CompareConfig, one: str, found: Mapping[str, Float64[Tensor, " d_sae"]]
) -> list[dict[str, Any]]:
    """Of one dictionary: its mmcs where that is largest less that in each other, latent by latent."""
    means = {name: float(cosines.mean()) for name, cosines in found.items()}
    best = max(means, key=lambda name: means[name])
    told = []
    for other in found:
        if other == best:
            continue
        entry = _mean(config, found[best] - found[other])
        real = entry["low"] is not None and float(entry["low"]) > 0
        interval = "" if entry["low"] is None else f" ({entry['low']:.4g} to {entry['high']:.4g})"
        told.append(
            {
                "of": one,
                "best": best,
                "other": other,
                "difference": entry,
                "real": real,
                "sentence": f"Latents of {one} are found "
                + (f"better in {best} than in {other}" if real else f"in {best} and in {other} alike")
                + f": mmcs {means[best]:.4g} and {means[other]:.4g}, difference "
                + f"{means[best] - means[other]:.4g}{interval}"
                + ("." if real or entry["low"] is None else "; the interval holds 0."),
            }
        )
    return told


def one_pair(config: CompareConfig, loaded: dict[str, Dictionary], folder: Path) -> dict[str, Any]:
    """Of two dictionaries, a and b: mmcs both ways, and for each the share found, a histogram, the nearest latents.

    Each mean and share has its interval over latents, and beside it what as many random directions give.

    Writes `matches_a_to_b.npz` and `matches_b_to_a.npz`: `indices` and `cosines` of shape (d_sae, n_nearest), nearest
    first.
    """
    names = dict(zip("ab", loaded, strict=True))
    data: dict[str, Any] = {"a": names["a"], "b": names["b"]}
    edges = np.linspace(-1, 1, HISTOGRAM_BINS + 1)
    absolute = any(one.signed for one in loaded.values())
    for one, other in (("a", "b"), ("b", "a")):
        with torch.inference_mode():
            ours, theirs = (loaded[names[side]].decoder_directions() for side in (one, other))
            n_nearest = min(config.n_nearest, theirs.shape[0])
            nearest = metrics.nearest_directions(ours, theirs, n_nearest, absolute=absolute)
            strangers = metrics.random_rows(*theirs.shape).to(theirs.device)
            random = metrics.nearest_directions(ours, strangers, absolute=absolute)
        cosines, indices = nearest.cosines.cpu().numpy(), nearest.indices.cpu().numpy().astype(np.int32)
        np.savez_compressed(folder / MATCHES.format(one, other), indices=indices, cosines=cosines)
        best, chance = (
            (np.abs(side) if absolute else side).astype(np.float64)
            for side in (cosines[:, 0], random.cosines[:, 0].cpu().numpy())
        )
        order = np.argsort(-best, kind="stable").tolist()
        counts, _ = np.histogram(best.clip(-1, 1), bins=edges)
        own = torch.from_numpy(best)
        data[f"mmcs_{one}_to_{other}"] = _mean(config, own) | {"random": float(chance.mean())}
        data[f"{one}_to_{other}"] = {
            "n_latents": int(best.size),
            "n_there": int(theirs.shape[0]),
            "median_mcs": _median(config, best) | {"random": float(np.median(chance))},
            f"share_above_{FOUND_COSINE:g}": _share(config, own)
            | {"random": float((chance > FOUND_COSINE).mean())},
            "n_distinct_matches": int(np.unique(indices[:, 0]).size),
            "random_n_distinct_matches": int(np.unique(random.indices[:, 0].cpu().numpy()).size),
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            "best": [_match(i, indices, best) for i in order[: config.n_shown]],
            "worst": [_match(i, indices, best) for i in order[::-1][: config.n_shown]],
        }
    return data


def _median(config: CompareConfig, values: Float64[np.ndarray, " latents"]) -> Entry:
    """With the interval that a bootstrap of so many latents tends to: the order of draws is binomial."""
    found = metrics.Statistic(float(np.median(values)))
    if config.n_bootstrap and values.size > 1:
        ranks = binom.ppf([0.025, 0.975], values.size, 0.5).astype(int).clip(0, values.size - 1)
        low, high = (float(value) for value in np.sort(values)[ranks])
        found = found._replace(low=low, high=high)
    return found.to_json()


def _match(
    latent: int, indices: Int32[np.ndarray, "latents n_nearest"], best: Float64[np.ndarray, " latents"]
) -> dict[str, Any]:
    return {"latent": latent, "nearest": int(indices[latent, 0]), "cosine": float(best[latent])}
