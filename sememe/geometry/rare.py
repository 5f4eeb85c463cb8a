"""The rare cluster: how many latents hardly fire, whether they read and write one direction, and whose else that is.

Knows one dictionary's weights and densities; directions of several are compared in `between.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sememe import metrics
from sememe.dictionaries.base import Dictionary
from sememe.geometry.config import GeometryConfig
from sememe.geometry.latents import Activity

__all__ = ["Direction", "rare"]

N_NULLS = 20
"""Draws of other latents, as many as are rare, of which the null is a mean."""


class Direction(NamedTuple):
    """The direction that a dictionary's rare latents read, if they do."""

    drawn: Float[Tensor, "draws d_in"]
    """The mean of all of them, then that of each draw of a bootstrap."""
    others: Float[Tensor, "nulls d_in"]
    """Means of as many other latents, drawn at random."""


def rare(
    config: GeometryConfig,
    dictionary: Dictionary,
    W_dec: Float[Tensor, "d_sae d"],
    active: Activity,
    place: int,
) -> tuple[dict[str, Any], Direction | None]:
    """The latents below a density: their share, and how many coincide, beside as many others; none where the encoder is
    not linear.

    Args:
        config: From which density on a latent is not rare, and the draws.
        dictionary: Whose encoder is asked.
        W_dec: Its decoder rows.
        active: Its densities.
        place: Which of the dictionaries it is: their draws are independent.
    """
    W_enc = dictionary.encoder_directions()
    if W_enc is None:
        return {}, None
    read = W_enc.detach().float().cpu()
    cluster = metrics.rare_cluster(read.T, active.density, config.rare_below, W_dec)
    options: dict[str, Any] = {"n_bootstrap": config.n_bootstrap, "seed": config.seed}
    below, silent = active.density < config.rare_below, active.density == 0
    random = active.random_density
    found: dict[str, Any] = {
        "below": config.rare_below,
        "n": int(below.sum()),
        "share": _beside(metrics.over_latents(below, **options), random < config.rare_below),
        "silent": _beside(metrics.over_latents(silent, **options), random == 0),
        "n_coincide": int(cluster.latents.numel()),
    }
    rows, others = read[below], torch.nonzero(~below).view(-1)
    rng = np.random.default_rng([config.seed, place])
    chosen = [_some(others, rows.shape[0], rng) for _ in range(N_NULLS)]
    kept = [_some(others, cluster.latents.numel(), rng) for _ in range(N_NULLS)]
    for name, own, table, nulls in (
        ("encoders_coincide", rows, read, chosen),
        ("decoders_coincide", W_dec[cluster.latents], W_dec, kept),
    ):
        shares = [metrics.coincide(table[one], n_bootstrap=0).value for one in nulls if one.numel()]
        found[name] = {
            **metrics.coincide(own, **options).to_json(),
            "random": float(np.mean(shares)) if shares else None,
        }
    if cluster.latents.numel() < 2 or others.numel() == 0:
        return found, None
    drawn = metrics.mean_directions(rows, n_bootstrap=config.n_bootstrap, seed=(config.seed, place))
    strangers = [metrics.mean_directions(read[one], n_bootstrap=0)[0] for one in chosen]
    return found, Direction(drawn, torch.stack(strangers))


def _beside(found: metrics.Statistic, random: Tensor) -> dict[str, Any]:
    return {**found.to_json(), "random": float(random.double().mean())}


def _some(others: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """As many of the other latents, or all of them if there are not so many."""
    return others[torch.from_numpy(rng.permutation(others.numel())[:n])]
