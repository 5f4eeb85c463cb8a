"""One dictionary against another, or against itself later: one-to-one matches, stability, splitting, cheats.

Knows matrices of rows. Cosines are signed unless `absolute` is said; nothing of size n_a x n_b is held. Where an answer
is yes or no, or a choice, NaN is refused, as it could not be seen in the answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.errors import ShapeError
from sememe.metrics.assignment import assign
from sememe.metrics.directions import check_finite, mcs, nearest_directions, unit_rows
from sememe.metrics.sums import Statistic, undrawn_share

__all__ = [
    "Cheats",
    "Match",
    "RareCluster",
    "Splits",
    "Stability",
    "cheats",
    "coincide",
    "larger_dictionary_test",
    "match",
    "mean_directions",
    "mmacs",
    "opposites",
    "rare_cluster",
    "self_similarity",
    "splits",
]

STABLE, LOST = 0.9, 0.6
COINCIDE = 0.95
ONE_HOT = 0.9
PAIRED = 0.05
"""Share of the latents in opposite pairs above which these are named: directions found one by one have none."""


DENSE_MODE = 0.01
"""Share of the latents that are dense above which these are named if they are a mode of their own: a few dense latents
are in most dictionaries, and a tail of them is no mode."""


class Match(NamedTuple):
    """A one-to-one matching of the directions of two sets, as many pairs as the smaller has."""

    a: Int[Tensor, " n"]
    b: Int[Tensor, " n"]
    cosines: Float[Tensor, " n"]


def match(
    a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"], *, absolute: bool = False, block: int = 2048
) -> Match:
    """The one-to-one matching with the largest sum of cosines (Hungarian), to 1e-6 in their mean.

    Args:
        a: Directions of any length; one of length zero has cosine 0 with everything.
        b: Directions of any length.
        absolute: Signs do not count: the cosines are absolute ones.
        block: Rows of the smaller set at a time: memory is about 12 block n bytes, n the larger set's size.

    Raises:
        ShapeError: the two sets live in different spaces.
        ActivationError: a direction is NaN or infinite.
    """
    _check(a, b)
    check_finite(a, "directions that are matched")
    check_finite(b, "directions that are matched")
    few, many = (unit_rows(side) for side in ((a, b) if a.shape[0] <= b.shape[0] else (b, a)))
    theirs, _ = assign(few, many, absolute=absolute, block=block)
    mine = torch.arange(few.shape[0])
    cosines = (few * many[theirs.to(many.device)]).sum(1).clamp(-1, 1).cpu()
    cosines = cosines.abs() if absolute else cosines
    if a.shape[0] <= b.shape[0]:
        return Match(mine, theirs, cosines)
    order = theirs.argsort()
    return Match(theirs[order], mine[order], cosines[order])


def mmacs(a: Float[Tensor, "n_a d"], b: Float[Tensor, "n_b d"], *, block: int = 4096) -> float:
    """Mean over the directions of `a` of the largest absolute cosine with any direction of `b`: signs do not count.

    Source: the sparse-coding project of Cunningham, Riggs, Ewart & Huben, for K-SVD's atoms.
    """
    return float(mcs(a, b, absolute=True, block=block).double().mean())


class Stability(NamedTuple):
    """What became of a dictionary's latents from checkpoint to checkpoint."""

    similarity: Float[Tensor, "steps d_sae"]
    """Cosine of each latent's direction to itself one checkpoint before."""
    reached: Bool[Tensor, " d_sae"]
    """Whether it ever was at least 0.9."""
    fell: Bool[Tensor, " d_sae"]
    """Whether it fell below 0.6 afterwards."""


def self_similarity(checkpoints: Iterable[Tensor]) -> Stability:
    """How much each latent still is what it was, over a training run.

    Source: the sparse-coding project's runs, in which 1,707 of 4,096 latents reached 0.9 and then fell below 0.6.

    Args:
        checkpoints: Decoder directions (d_sae, d) in the order of training, at least two; two are held at a time.

    Raises:
        ShapeError: fewer than two, or of different shapes.
        ActivationError: a direction is NaN or infinite.
    """
    shapes: set[tuple[int, ...]] = set()
    found: list[Tensor] = []
    before, number = None, 0
    for number, rows in enumerate(checkpoints, 1):
        check_finite(rows, f"directions of checkpoint {number - 1}")
        unit = unit_rows(rows)
        shapes.add(tuple(unit.shape))
        if before is not None and len(shapes) == 1:
            found.append((before * unit).sum(1))
        before = unit
    if number < 2 or len(shapes) != 1:
        raise ShapeError(
            "self-similarity must be asked of two checkpoints or more of one shape",
            f"{number} of shapes {sorted(shapes)}",
            "Train with --keep-checkpoints, and pass them all.",
        )
    similarity = torch.stack(found)
    so_far = torch.cummax(similarity, dim=0).values
    return Stability(
        similarity.clamp(-1, 1),
        so_far[-1] >= STABLE,
        ((so_far >= STABLE) & (similarity < LOST)).any(0),
    )


class Splits(NamedTuple):
    """Latents of a small dictionary that several of a larger one stand for."""

    parents: Int[Tensor, " n_split"]
    """Latents of the small one."""
    children: list[Int[Tensor, " n_children"]]
    """For each, the latents of the large one that are nearest to it, closest first."""


def splits(
    small: Float[Tensor, "n_small d"],
    large: Float[Tensor, "n_large d"],
    least: float = 0.5,
    *,
    absolute: bool = False,
    block: int = 4096,
) -> Splits:
    """Which latents of the small dictionary have become several of the large one.

    A latent of the large dictionary belongs to that of the small one that is nearest to it, if their cosine is at least
    `least` (the absolute one, where `absolute` is said); a small one's latent with two such or more is split.

    Source: Bricken et al. 2023, section "Feature splitting"; the assignment to the nearest is ours.

    Raises:
        ActivationError: a direction is NaN or infinite.
    """
    check_finite(small, "the small dictionary's directions")
    check_finite(large, "the large dictionary's directions")
    nearest = nearest_directions(large, small, absolute=absolute, block=block)
    cosines, parent = nearest.cosines[:, 0], nearest.indices[:, 0]
    cosines = cosines.abs() if absolute else cosines
    counts = torch.bincount(parent[cosines >= least], minlength=small.shape[0])
    parents = torch.nonzero(counts >= 2).view(-1)
    children = []
    for number in parents.tolist():
        mine = torch.nonzero((parent == number) & (cosines >= least)).view(-1)
        children.append(mine[cosines[mine].argsort(descending=True, stable=True)])
    return Splits(parents, children)


def opposites(
    rows: Float[Tensor, "n d"], most: float = -0.95, *, block: int = 4096
) -> Int[Tensor, " n_found"]:
    """Rows that have an opposite among the others: a cosine of at most `most`.

    A pair of opposite latents is a single signed one, and a whole dictionary of them, [U, -U], writes everything.

    Raises:
        ActivationError: a row is NaN or infinite.
    """
    check_finite(rows, "directions")
    found = nearest_directions(rows, -rows, block=block).cosines[:, 0]
    return torch.nonzero(found >= -most).view(-1)


class Cheats(NamedTuple):
    """Signs that a dictionary reconstructs without having found anything."""

    one_hot: float
    """Share of decoder rows with more than 0.9 of their square in one dimension: near the neuron basis."""
    in_opposite_pairs: float
    """Share of decoder rows with an opposite (cosine at most -0.95)."""
    dense: float
    """Share of latents active on more than one row in ten."""
    bimodal: bool
    """Whether these are a mode of their own: per decade of density, fewer than half as many latents lie just below."""
    named: tuple[str, ...]
    """What that amounts to, in words; empty if nothing does."""


def cheats(
    W_dec: Float[Tensor, "d_sae d"], density: Float[Tensor, " d_sae"], l0: float, *, block: int = 4096
) -> Cheats:
    """Look for the known ways of reconstructing without finding features.

    Source: the sparse-coding project, whose MLP dictionaries had high mcs to one another with 400 to 800 of 2,048
    latents active: they were the identity, and which looked for
    pairs at a cosine of -1. Thresholds are ours.

    Args:
        W_dec: Decoder rows.
        density: Share of the rows on which each latent is active.
        l0: Mean number of active latents.
        block: Rows compared at a time.

    Raises:
        ActivationError: a row or a density is NaN or infinite.
    """
    check_finite(W_dec, "decoder rows")
    check_finite(density, "densities")
    check_finite(torch.tensor([l0]), "l0")
    squares = unit_rows(W_dec).square()
    one_hot = float((squares.amax(1) > ONE_HOT).double().mean())
    paired = opposites(W_dec, block=block).numel() / W_dec.shape[0]
    dense = float((density > 0.1).double().mean())
    valley = float(((density > 0.03) & (density <= 0.1)).double().mean()) / math.log10(0.1 / 0.03)
    bimodal = dense > 0 and valley < dense / 2 and bool((density <= 0.03).any())
    named = []
    if one_hot > 0.5 and l0 > 0.1 * W_dec.shape[1]:
        named.append(
            f"the identity: {one_hot:.0%} of the decoder rows are single dimensions, and {l0:.0f} latents are active"
        )
    if paired > PAIRED:
        named.append(f"opposite pairs: {paired:.0%} of the latents have one, so signs are free")
    if dense > 0.1 or (bimodal and dense > DENSE_MODE):
        apart = ", apart from the others (two modes of density)" if bimodal else ""
        named.append(
            f"dense latents: {dense:.0%} of the latents are active on more than a tenth of the rows{apart}"
        )
    return Cheats(one_hot, paired, dense, bimodal, tuple(named))


class RareCluster(NamedTuple):
    """The latents that hardly ever fire, and whether they are one direction."""

    share: float
    """Share of the latents that are rare."""
    coincide: float
    """Share of these whose encoder direction has a cosine above 0.95 with their mean; 1 for a single one."""
    direction: Float[Tensor, " d_in"]
    """That mean, of norm 1; compare it across seeds. 0 where no latent is rare."""
    latents: Int[Tensor, " n"]
    """Those that coincide."""
    decoders_coincide: float | None = None
    """Share of the same latents whose decoder row has a cosine above 0.95 with these rows' mean, if asked."""


def rare_cluster(
    W_enc: Float[Tensor, "d_in d_sae"],
    density: Float[Tensor, " d_sae"],
    below: float = 1e-4,
    W_dec: Float[Tensor, "d_sae d_out"] | None = None,
) -> RareCluster:
    """Whether the rarest latents all read one direction.

    Source: Nanda 2023, "Open source replication and commentary": about 60% of a dictionary, none of them dead, shared
    one encoder direction, across seeds too, and had decoder rows of their own.

    Args:
        W_enc: Encoder weights.
        density: Share of the rows on which each latent is active.
        below: Latents with less than this are rare.
        W_dec: Decoder rows, if it is to be said whether those of the same latents coincide as well.

    Raises:
        ActivationError: an encoder column or a density is NaN or infinite.
    """
    check_finite(W_enc.T, "encoder columns")
    check_finite(density, "densities")
    rare = torch.nonzero(density < below).view(-1)
    share = rare.numel() / density.shape[0]
    if rare.numel() == 0:
        written = None if W_dec is None else 0.0
        return RareCluster(share, 0.0, W_enc.new_zeros(W_enc.shape[0]), rare, written)
    inside, direction = _about_one(unit_rows(W_enc.T[rare]))
    latents = rare[inside]
    written = None
    if W_dec is not None:
        check_finite(W_dec, "decoder rows")
        rows = unit_rows(W_dec[latents])
        written = float(_about_one(rows)[0].double().mean()) if latents.numel() else 0.0
    return RareCluster(share, float(inside.double().mean()), direction, latents, written)


def _about_one(rows: Float[Tensor, "n d"]) -> tuple[Bool[Tensor, " n"], Float[Tensor, " d"]]:
    """Which unit rows are nearly their mean, and that mean's direction."""
    mean = unit_rows(rows.mean(0, keepdim=True))
    return (rows @ mean.T).view(-1) > COINCIDE, mean[0]


def mean_directions(
    rows: Float[Tensor, "n d"], *, n_bootstrap: int = 1000, seed: int | tuple[int, ...] = 0
) -> Float[Tensor, "draws d"]:
    """The direction of the mean of unit rows: first of all rows, then of each of n_bootstrap draws of them.

    Args:
        rows: Directions of any length.
        n_bootstrap: Draws.
        seed: Of the draws.
    """
    unit = unit_rows(rows)
    n = unit.shape[0]
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_bootstrap)
    counts = np.concatenate([np.ones((1, n)), weights])
    return unit_rows(torch.from_numpy(counts / n).to(unit) @ unit)


def coincide(rows: Float[Tensor, "n d"], *, n_bootstrap: int = 1000, seed: int = 0) -> Statistic:
    """Share of directions that have a cosine above 0.95 with their mean; in each draw with that draw's mean.

    Args:
        rows: Directions of any length.
        n_bootstrap: Draws of rows for the interval; 0 gives none.
        seed: Of the draws.

    Raises:
        ActivationError: a row is NaN or infinite.
    """
    n = rows.shape[0]
    if n == 0:
        return Statistic(math.nan, cause="there are none")
    check_finite(rows, "directions")
    unit = unit_rows(rows)
    value = float(_about_one(unit)[0].double().mean())
    if n_bootstrap == 0:
        return Statistic(value)
    if n < 2:
        return Statistic(value, cause="an interval needs at least 2 latents")
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_bootstrap)
    shares = []
    for part in torch.split(torch.from_numpy(weights).to(unit.device), 64):  # draws x n cosines are held
        inside = unit_rows((part / n).to(unit) @ unit) @ unit.T > COINCIDE
        shares.append((inside * part).sum(1).double() / n)
    low, high = (float(q) for q in np.quantile(torch.cat(shares).cpu().numpy(), [0.025, 0.975]))
    return undrawn_share(Statistic(value, low, high), n)


def larger_dictionary_test(
    small: Float[Tensor, "n_small d"], large: Float[Tensor, "n_large d"], *, block: int = 4096
) -> dict[str, float]:
    """How much of a dictionary the next larger one of the same penalty has, one to one and at best.

    Source: Sharkey et al. 2022: what two dictionaries of different sizes agree on is likely true.
    """
    matched = match(small, large, block=block).cosines.double()
    best = mcs(small, large, block=block).double()
    return {
        "mmcs": float(best.mean()),
        "mean_matched_cosine": float(matched.mean()),
        "share_above_0.9": float((best > STABLE).double().mean()),
        "share_matched_above_0.9": float((matched > STABLE).double().mean()),
    }


def _check(a: Tensor, b: Tensor) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ShapeError(
            "directions that are matched must have one width",
            f"{tuple(a.shape)} and {tuple(b.shape)}",
            "Match dictionaries of the same hookpoint.",
        )
