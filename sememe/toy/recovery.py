"""How much of a planted dictionary was learned. Knows directions and activations; trains nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sememe import metrics
from sememe.dictionaries.base import Dictionary
from sememe.errors import ConfigError, ShapeError
from sememe.toy.planted import Planted
from sememe.toy.stream import Truth

__all__ = ["Absorption", "Recovery", "absorption", "on_rows", "recovery"]

FOUND_COSINE = 0.9


class Recovery(NamedTuple):
    """How much of a planted dictionary was learned, by cosine between directions."""

    recall: float
    """Mean over the planted features of the largest cosine to a learned direction (mmcs truth -> learned)."""
    precision: float
    """Mean over the learned directions of the largest cosine to a planted feature (mmcs learned -> truth)."""
    found: float
    """Share of planted features with a learned direction at a cosine above 0.9."""
    random: float
    """The recall of as many random directions: what is found without learning."""


def recovery(truth: Truth, dictionary: Dictionary) -> Recovery:
    """Compare the decoder directions of a dictionary with the planted features. Signs count, but where activations
    have signs of their own: there a direction and its opposite are the same.

    Raises:
        ShapeError: the dictionary has another width than the planted one.
    """
    learned = _learned(truth, dictionary)
    features = truth.features
    if getattr(dictionary, "signed", False):
        learned, features = torch.cat([learned, -learned]), torch.cat([features, -features])
    cosines = metrics.mcs(truth.features, learned)
    chance = metrics.random_rows(learned.shape[0], learned.shape[1])
    return Recovery(
        recall=float(cosines.mean()),
        precision=float(metrics.mmcs(learned, features)),
        found=float((cosines > FOUND_COSINE).double().mean()),
        random=metrics.mmcs(truth.features, chance),
    )


@torch.no_grad()
def on_rows(dictionary: Dictionary, x: Float[Tensor, "rows d"]) -> dict[str, float]:
    """What a dictionary does with rows: `dead` latents (never active on them), `l0`, `fvu`."""
    sums, active = metrics.Reconstruction(), torch.zeros(dictionary.d_sae, dtype=torch.int64)
    for part in torch.split(x, N_AT_ONCE):
        encoded = dictionary.encode(part)
        sums.update(part, dictionary.decode(encoded, part))
        active += torch.bincount(encoded.indices[encoded.acts != 0].long(), minlength=dictionary.d_sae)
    return {
        "dead": int((active == 0).sum()),
        "l0": float(active.sum()) / x.shape[0],
        "fvu": sums.compute()["fvu"].value,
    }


def _learned(truth: Truth, dictionary: Dictionary) -> Float[Tensor, "d_sae d_out"]:
    learned = dictionary.decoder_directions().detach().to("cpu", torch.float32)
    if learned.shape[1] != truth.features.shape[1]:
        raise ShapeError(
            f"the dictionary must have d_out={truth.features.shape[1]} like the planted one",
            learned.shape[1],
            "Compare it with the planted dictionary that it was trained on.",
        )
    return metrics.unit_rows(learned)


class Absorption(NamedTuple):
    """How parents of a hierarchy fare. Only families whose parent was found count in the first two."""

    silent_with_child: float
    """Share of the rows with an active child in which the parent's latent is silent, though the parent is active."""
    silent_alone: float
    """The same of rows in which the parent is active and none of its children."""
    split: float
    """Share of families whose parent has no latent at a cosine above 0.9 and whose children all have one."""
    leaning: float
    """Mean cosine of the children's latents to their parent: 0 for planted directions, more where they carry it."""
    n_found: int
    """Parents that have a latent at a cosine above 0.9."""


@torch.no_grad()
def absorption(
    truth: Planted, dictionary: Dictionary, n_rows: int = 16_384, generator: torch.Generator | None = None
) -> Absorption:
    """Whether children's latents swallowed their parents': a latent that should fire for every row with its feature
    keeps silent where a more specific one fires.

    Source: Chanin et al. 2024, arXiv:2409.14507, whose parents are first letters; here they are planted.

    Args:
        truth: A planted dictionary with families (n_children > 0).
        dictionary: What was learned from it.
        n_rows: Rows to encode.
        generator: What rows are drawn with; seeded with 0 if not given.

    Raises:
        ConfigError: the planted dictionary has no families.
        ShapeError: the dictionary has another width than the planted one.
    """
    config = truth.config
    if config.n_children == 0:
        raise ConfigError(
            "absorption must be asked of a planted dictionary with families",
            "n_children 0",
            "Raise n_children.",
        )
    cosines = truth.features @ _learned(truth, dictionary).T
    if getattr(dictionary, "signed", False):
        cosines = cosines.abs()
    device = dictionary.decoder_directions().device
    best = cosines.max(dim=1)
    size = 1 + config.n_children
    found = (best.values > FOUND_COSINE).view(-1, size)
    latents = best.indices.view(-1, size)
    parents = torch.nonzero(found[:, 0]).view(-1)
    n = torch.zeros(2, dtype=torch.int64)  # rows with a child, without
    silent = torch.zeros(2, dtype=torch.int64)
    generator = generator or torch.Generator().manual_seed(0)
    for start in range(0, n_rows, N_AT_ONCE):
        rows = truth.batch(min(N_AT_ONCE, n_rows - start), generator)
        active = (rows.codes.to_dense() > 0).view(rows.x.shape[0], -1, size)[:, parents]
        fires = dictionary.encode(rows.x.to(device)).to_dense().cpu()[:, latents[parents, 0]] != 0
        with_child = active[..., 1:].any(dim=-1)
        for place, among in enumerate((with_child, active[..., 0] & ~with_child)):
            n[place] += among.sum()
            silent[place] += (among & ~fires).sum()
    shares = silent.double() / n.double()  # NaN where there is no such row
    return Absorption(
        silent_with_child=float(shares[0]),
        silent_alone=float(shares[1]),
        split=float((~found[:, 0] & found[:, 1:].all(dim=1)).double().mean()),
        leaning=_leaning(truth, dictionary, latents, found),
        n_found=int(parents.shape[0]),
    )


N_AT_ONCE = 2048
"""Rows encoded at once: they are held densely."""


def _leaning(truth: Planted, dictionary: Dictionary, latents: Tensor, found: Tensor) -> float:
    """NaN if no child has a latent."""
    families = truth.features.view(*latents.shape, -1)
    directions = _learned(truth, dictionary)[latents[:, 1:]]
    cosines = (directions * families[:, :1]).sum(-1)
    has_one = found[:, 1:]
    return float(cosines[has_one].mean()) if bool(has_one.any()) else float("nan")
