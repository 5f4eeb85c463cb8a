"""Several dictionaries: who has whose latents, one to one and at best; splitting; the rare direction across seeds.

Knows matrices of directions by name.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe import metrics
from sememe.geometry.config import GeometryConfig
from sememe.geometry.rare import Direction
from sememe.progress import track

__all__ = ["agreement", "pairs"]

EDGES = np.linspace(-1, 1, 41)
FOUND = 0.9


def pairs(
    directions: dict[str, Float[Tensor, "n d"]], signed: dict[str, bool], config: GeometryConfig
) -> list[dict[str, Any]]:
    """Every two, the smaller first: the larger-dictionary test, beside random directions, and splitting.

    Args:
        directions: What latents write, by dictionary.
        signed: Whether a dictionary's activations may be below 0: then absolute cosines count.
        config: The verb's options.
    """
    found = []
    names = sorted(directions, key=lambda name: directions[name].shape[0])
    both = list(itertools.combinations(names, 2))
    if not both:
        return []
    with track("match dictionaries", len(both), "pairs") as progress, torch.inference_mode():
        for small, large in both:
            found.append(
                {
                    "small": small,
                    "large": large,
                    **_pair(directions[small], directions[large], signed[small] or signed[large], config),
                }
            )
            progress.advance(1)
    return found


def _pair(
    small: Float[Tensor, "n_small d"],
    large: Float[Tensor, "n_large d"],
    absolute: bool,
    config: GeometryConfig,
) -> dict[str, Any]:
    options: dict[str, Any] = {"n_bootstrap": config.n_bootstrap, "seed": config.seed}
    chance = {
        name: metrics.random_rows(rows.shape[0], rows.shape[1], config.seed)
        for name, rows in (("small", small), ("large", large))
    }
    mcs = partial(metrics.mcs, absolute=absolute)
    compared = {
        "mmcs_small_to_large": (mcs(small, large), mcs(small, chance["large"])),
        "mmcs_large_to_small": (mcs(large, small), mcs(large, chance["small"])),
        "matched_cosine": (
            metrics.match(small, large, absolute=absolute).cosines,
            metrics.match(small, chance["large"], absolute=absolute).cosines,
        ),
    }
    out: dict[str, Any] = {}
    for name, cosines in compared.items():
        own, random = (one.double() for one in cosines)
        counts, _ = np.histogram(own.numpy(), bins=EDGES)
        out[name] = {
            **metrics.over_latents(own, **options).to_json(),
            "random": float(random.mean()),
            f"share_above_{FOUND:g}": _share(own > FOUND, random > FOUND, options),
            "histogram": {"edges": EDGES.tolist(), "counts": counts.tolist()},
        }
    split, by_chance = (metrics.splits(small, rows, absolute=absolute) for rows in (large, chance["large"]))
    n = small.shape[0]
    order = sorted(range(len(split.children)), key=lambda i: -split.children[i].numel())
    out["splits"] = {
        "n": int(split.parents.numel()),
        "share": _share(_at(split.parents, n), _at(by_chance.parents, n), options),
        "most": [
            {"latent": int(split.parents[i]), "children": split.children[i].tolist()}
            for i in order[: config.n_shown]
        ],
    }
    return out


def _share(own: Bool[Tensor, " n"], random: Bool[Tensor, " n"], options: dict[str, Any]) -> dict[str, Any]:
    """A share of the latents with its interval, and that of random directions."""
    return {
        **metrics.over_latents(own, **options).to_json(),
        "random": float(random.double().mean()),
    }


def _at(latents: Int[Tensor, " m"], n: int) -> Bool[Tensor, " n"]:
    found = torch.zeros(n, dtype=torch.bool)
    found[latents.cpu()] = True
    return found


def agreement(directions: dict[str, Direction]) -> dict[str, Any]:
    """The cosine of each rare direction to each other's: near 1 across seeds if it is the data's own.

    With intervals from drawing each dictionary's rare latents again, by itself, and beside what the means of as many
    other latents have, who may share a direction, too.
    """
    names = list(directions)
    cosines: list[list[dict[str, Any]]] = []
    for one in names:
        row = []
        for other in names:
            drawn = (directions[one].drawn * directions[other].drawn).sum(1).double().numpy()
            random = (directions[one].others * directions[other].others).sum(1).double().mean()
            found = metrics.Statistic(float(np.clip(drawn[0], -1, 1)))
            if len(drawn) > 1 and one != other:
                low, high = (float(q) for q in np.quantile(drawn[1:], [0.025, 0.975]).clip(-1, 1))
                found = found._replace(low=low, high=high)
            row.append({**found.to_json(), "random": None if one == other else float(random)})
        cosines.append(row)
    return {"names": names, "cosines": cosines}
