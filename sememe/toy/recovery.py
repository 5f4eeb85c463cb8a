"""How much of a planted dictionary was learned. Knows directions and activations; trains nothing.

Every number has a 95% interval, from drawing planted features (recall, found), learned directions (precision) or rows
again, and directions have as many random ones beside them. NaN comes out as NaN with its cause.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sememe import metrics
from sememe.dictionaries.base import Dictionary
from sememe.errors import ConfigError, ShapeError
from sememe.metrics import Statistic
from sememe.toy.planted import Planted
from sememe.toy.stream import Truth

__all__ = ["Absorption", "Recovery", "absorption", "on_rows", "recovery", "scores"]

FOUND_COSINE = 0.9


class Recovery(NamedTuple):
    """How much of a planted dictionary was learned, by cosine between directions."""

    recall: float
    """Mean over the planted features of the largest cosine to a learned direction (mmcs truth -> learned)."""
    recall_low: float
    recall_high: float
    """Its interval, from drawing features."""
    precision: float
    """Mean over the learned directions of the largest cosine to a planted feature (mmcs learned -> truth)."""
    precision_low: float
    precision_high: float
    """Its interval, from drawing learned directions."""
    found: float
    """Share of planted features with a learned direction at a cosine above 0.9."""
    found_low: float
    found_high: float
    """Its interval, from drawing features."""
    random: float
    """The recall of as many random directions: what is found without learning."""
    random_precision: float
    """Their precision."""
    random_found: float
    """What they find."""
    cause: str
    """Why numbers are NaN; empty if none is."""


def recovery(truth: Truth, dictionary: Dictionary, *, n_bootstrap: int = 1000, seed: int = 0) -> Recovery:
    """Compare the decoder directions of a dictionary with the planted features. Signs count, but where activations
    have signs of their own: there a direction and its opposite are the same.

    Args:
        truth: What was planted.
        dictionary: What was learned.
        n_bootstrap: Draws for the 95% intervals; 0 gives none.
        seed: Of the draws.

    Returns:
        NaN with its cause where a learned direction is NaN or infinite.

    Raises:
        ShapeError: the dictionary has another width than the planted one.
    """
    learned = _learned(truth, dictionary)
    broken = _broken(learned)
    features, signed = truth.features, dictionary.signed

    def compared(rows: Float[Tensor, "n d"], draws: int) -> dict[str, Statistic]:
        cosines = metrics.mcs(features, torch.cat([rows, -rows]) if signed else rows)
        back = metrics.mcs(rows, torch.cat([features, -features]) if signed else features)
        found = cosines > FOUND_COSINE
        return {
            name: metrics.over_latents(one, n_bootstrap=draws, seed=seed)
            for name, one in (("recall", cosines), ("precision", back), ("found", found))
        }

    if broken:  # a share, too, which would be 0
        ours = dict.fromkeys(("recall", "precision", "found"), Statistic(math.nan))
    else:
        ours = compared(learned, n_bootstrap)
    theirs = compared(metrics.random_rows(*learned.shape), 0)
    return Recovery(
        **{
            f"{name}{end}": getattr(one, place)
            for name, one in ours.items()
            for end, place in (("", "value"), ("_low", "low"), ("_high", "high"))
        },
        random=theirs["recall"].value,
        random_precision=theirs["precision"].value,
        random_found=theirs["found"].value,
        cause=broken,
    )


@torch.no_grad()
def on_rows(
    dictionary: Dictionary, x: Float[Tensor, "rows d"], *, n_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Statistic]:
    """What a dictionary does with rows: `dead` latents (never active on them), `l0`, `fvu`.

    Args:
        dictionary: The dictionary.
        x: Rows that are independent of each other.
        n_bootstrap: Draws of rows, of many in 256 groups, for the intervals; 0 gives none.
        seed: Of the draws.
    """
    sums, sparsity = metrics.Reconstruction(), metrics.Sparsity(dictionary.d_sae)
    units = torch.arange(x.shape[0], device=x.device) % N_ROW_GROUPS
    for part, of in zip(torch.split(x, N_AT_ONCE), torch.split(units, N_AT_ONCE), strict=True):
        encoded = dictionary.encode(part)
        sums.update(part, dictionary.decode(encoded, part), None, of)
        sparsity.update(encoded, None, of)
    options: dict[str, Any] = {"n_bootstrap": n_bootstrap, "seed": seed}
    found = sparsity.compute(**options)
    alive, n = found["frac_alive"], dictionary.d_sae
    dead = Statistic(n * (1 - alive.value), n * (1 - alive.high), n * (1 - alive.low), alive.cause)
    measured = {"dead": dead, "l0": found["l0"], "fvu": sums.compute(**options)["fvu"]}
    return {
        name: one._replace(cause=one.cause.replace("documents", "rows")) for name, one in measured.items()
    }


def scores(
    truth: Truth, dictionary: Dictionary, x: Float[Tensor, "rows d"], **others: Statistic
) -> dict[str, float | str | None]:
    """A line of a table: `recovery`, `on_rows`, and other numbers, each with its interval.

    A number that there is not is None, and `cause` says why.

    Args:
        truth: What was planted.
        dictionary: What was learned.
        x: Fresh rows.
        others: More numbers, by name.
    """
    found = recovery(truth, dictionary)._asdict()
    causes = [found.pop("cause")]
    for name, one in (on_rows(dictionary, x) | others).items():
        found |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
        causes += [f"{name}: {one.cause}"] if one.cause else []
    line: dict[str, float | str | None] = {
        name: value if math.isfinite(value) else None for name, value in found.items()
    }
    if line["dead"] is not None:
        line["dead"] = round(found["dead"])
    return line | {"cause": "; ".join(cause for cause in causes if cause)}


def _broken(learned: Float[Tensor, "d_sae d_out"]) -> str:
    """Why directions cannot be compared, if some are no numbers."""
    n = int((~torch.isfinite(learned).all(1)).sum())
    return f"{n:,} of {learned.shape[0]:,} learned directions are NaN or infinite" if n else ""


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
    n_found: float
    """Parents that have a latent at a cosine above 0.9."""
    causes: Mapping[str, str]
    """Why a number is NaN, by its name."""


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

    Returns:
        NaN with its cause where a learned direction or an activation is NaN or infinite, or there is nothing to count.

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
    learned = _learned(truth, dictionary)
    broken = _broken(learned)
    if broken:
        names = Absorption._fields[:-1]
        return Absorption(**dict.fromkeys(names, math.nan), causes=dict.fromkeys(names, broken))
    cosines = truth.features @ learned.T
    if dictionary.signed:
        cosines = cosines.abs()
    device = dictionary.decoder_directions().device
    best = cosines.max(dim=1)
    size = 1 + config.n_children
    found = (best.values > FOUND_COSINE).view(-1, size)
    latents = best.indices.view(-1, size)
    parents = torch.nonzero(found[:, 0]).view(-1)
    n = torch.zeros(2, dtype=torch.int64)  # rows with a child, without
    silent = torch.zeros(2, dtype=torch.int64)
    n_broken = 0
    generator = generator or torch.Generator().manual_seed(0)
    for start in range(0, n_rows, N_AT_ONCE):
        rows = truth.batch(min(N_AT_ONCE, n_rows - start), generator)
        active = (rows.codes.to_dense() > 0).view(rows.x.shape[0], -1, size)[:, parents]
        acts = dictionary.encode(rows.x.to(device)).to_dense().cpu()[:, latents[parents, 0]]
        n_broken += int((~torch.isfinite(acts)).any(1).sum())
        fires = acts != 0
        with_child = active[..., 1:].any(dim=-1)
        for place, among in enumerate((with_child, active[..., 0] & ~with_child)):
            n[place] += among.sum()
            silent[place] += (among & ~fires).sum()
    shares = silent.double() / n.double()  # NaN where there is no such row
    if n_broken:  # whether a latent fires there nobody knows
        shares[:] = math.nan
    leaning = _leaning(truth, learned, latents, found)
    causes = {}
    for place, (name, which) in enumerate((("silent_with_child", "with"), ("silent_alone", "without"))):
        if n_broken:
            causes[name] = f"activations are NaN or infinite in {n_broken:,} rows"
        elif not len(parents):
            causes[name] = "no parent was found"
        elif not n[place]:
            causes[name] = f"no row has a parent that was found {which} a child"
    if math.isnan(leaning):
        causes["leaning"] = "no child was found"
    return Absorption(
        silent_with_child=float(shares[0]),
        silent_alone=float(shares[1]),
        split=float((~found[:, 0] & found[:, 1:].all(dim=1)).double().mean()),
        leaning=leaning,
        n_found=int(parents.shape[0]),
        causes=causes,
    )


N_AT_ONCE = 2048
"""Rows encoded at once: they are held densely."""
N_ROW_GROUPS = 256
"""Groups of rows that a bootstrap draws."""


def _leaning(truth: Planted, learned: Float[Tensor, "d_sae d_out"], latents: Tensor, found: Tensor) -> float:
    """NaN if no child has a latent."""
    families = truth.features.view(*latents.shape, -1)
    directions = learned[latents[:, 1:]]
    cosines = (directions * families[:, :1]).sum(-1)
    has_one = found[:, 1:]
    return float(cosines[has_one].mean()) if bool(has_one.any()) else float("nan")
