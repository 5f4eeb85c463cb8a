"""What is logged and remembered of each output where there are several. Knows tensors and sites, no trainer."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sememe.dictionaries import Sites, Trainable
from sememe.dictionaries.linear import Linear

__all__ = ["about_sites", "fvu_by_site", "fvu_of", "site_labels"]

N_BINS = 20
"""Of the histogram of each site's share of decoder norms, over [0, 1]."""


def site_labels(sites: Sites) -> list[str]:
    """A name for each output: its hookpoint, with a number where two models share it."""
    names = [site.hookpoint for site in sites.outputs]
    if len(set(names)) == len(names):
        return names
    models = list(dict.fromkeys(site.model_fingerprint for site in sites.outputs))
    return [f"{site.hookpoint}@{models.index(site.model_fingerprint)}" for site in sites.outputs]


def fvu_of(mse: float, target: Float[Tensor, "batch d"]) -> float:
    """A batch's mean square error over its own variance; NaN for one row, which has none."""
    if target.shape[0] == 1:
        return float("nan")
    return mse / max(float((target - target.mean(0)).square().mean()), 1e-12)


def fvu_by_site(
    sites: Sites | None, target: Float[Tensor, "batch d_out"], error: Float[Tensor, "batch d_out"] | None
) -> dict[str, float]:
    """`fvu.SITE` of a batch for each of several outputs; empty for one."""
    if sites is None or len(sites.outputs) < 2 or error is None:
        return {}
    out = {}
    for name, site in zip(site_labels(sites), sites.outputs, strict=True):
        part = slice(site.start, site.stop)
        rows, missed = target[:, part], error.detach()[:, part]
        out[f"fvu.{name}"] = fvu_of(float(missed.square().mean()), rows)
    return out


@torch.no_grad()
def about_sites(dictionary: Trainable) -> dict[str, Any]:
    """Of each of several outputs: its scale, and how latents' decoder norms are shared; empty for one.

    A latent's share at a site is its decoder norm there over the sum of its norms at all sites, in training units
    (in raw units the larger site would seem to have every latent). A share near 1 is a latent of that site alone.
    """
    sites = dictionary.sites
    if sites is None or len(sites.outputs) < 2 or not isinstance(dictionary, Linear):
        return {}
    norms = dictionary.site_norms()
    shares = (norms / norms.sum(1, keepdim=True).clamp_min(1e-12)).cpu()
    scale = dictionary.scale_out.expand(dictionary.d_out)
    return {
        name: {
            "scale": float(scale[site.start]),
            "mean_norm_share": float(shares[:, number].mean()),
            "norm_share_histogram": torch.histc(shares[:, number].float(), N_BINS, 0, 1).int().tolist(),
        }
        for number, (name, site) in enumerate(zip(site_labels(sites), sites.outputs, strict=True))
    }
