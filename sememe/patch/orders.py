"""In which order latents are patched: by attribution, by ACDC's thresholds, at random. Knows arms and runs, no file.

Source: attribution patching, Nanda 2023 and Syed et al. 2023, arXiv:2310.10348; thresholds, Conmy et al. 2023,
arXiv:2304.14997 (ACDC) as Cunningham et al. 2023, arXiv:2309.08600, use them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sememe.patch.arms import Arm
from sememe.patch.runs import Measured, Runs

__all__ = ["Curve", "Kept", "Point", "acdc", "along", "attribution", "sizes", "thresholds"]


class Point(NamedTuple):
    """What some patches lead to."""

    n: int
    measured: Measured
    threshold: float | None = None


class Curve(NamedTuple):
    """An arm in one order, from nothing patched on."""

    points: list[Point]
    n_candidates: int
    """How many the order began with."""
    n_forwards: int
    """Forwards of all pairs from the hookpoint on that it took to find the order; those that scored it not counted."""
    n_backwards: int
    first: list[int]
    """The first latents of the order, or those left last."""


class Kept(NamedTuple):
    """What ACDC leaves at a threshold."""

    threshold: float
    chosen: tuple[int, ...]


def attribution(
    arm: Arm, runs: Runs, of: Literal["kl", "logit_difference"], steps: int = 1
) -> Float[Tensor, " m"]:
    """What patching each candidate alone would change at first order; what is wanted is below 0.

    Args:
        arm: Whose candidates.
        runs: Where.
        of: What becomes small.
        steps: Gradients are averaged over so many points from nothing patched on towards everything.
    """
    whole = arm.moves(range(len(arm.latents))) if steps > 1 else runs.nothing()
    total = torch.zeros(len(arm.latents), device=arm.directions.device)
    for step in range(steps):
        slopes = runs.gradient([move * (step / steps) for move in whole], of)
        for change, slope in zip(arm.changes, slopes, strict=True):
            total += (change * (slope @ arm.directions.T)).sum(0)
    return total / steps


def sizes(m: int, reference: int) -> list[int]:
    """Numbers of patches at which an order is scored: none, all, about two in each octave, and the reference."""
    found = {0, m, min(reference, m)}
    for octave in range(m.bit_length()):
        found |= {size for size in (2**octave, 3 * 2**octave // 2) if 0 < size < m}
    return sorted(found)


def along(arm: Arm, runs: Runs, order: Sequence[int], at: Sequence[int]) -> Iterator[Point]:
    """Score the first so many of an order."""
    for n in at:
        yield Point(n, runs.measure(arm.moves(order[:n])))


def thresholds(n: int) -> list[float]:
    """From 1e-5 to 1 in equal ratios."""
    return [10 ** (-5 + 5 * step / (n - 1)) for step in range(n)]


def acdc(
    kl: Callable[[Sequence[int]], float], start: Sequence[int], at: Sequence[float], seed: int = 0
) -> Iterator[Kept]:
    """Take candidates out of a set, in a random order, as long as that costs less than a threshold; one pass for each.

    A pass begins with what the one before it left. What a candidate costs is not asked again while the set stays the
    same, which changes no result.

    Args:
        kl: What a set leads to.
        start: The set to begin with.
        at: The thresholds, the smallest first.
        seed: Of the order.
    """
    order = list(start)
    random.Random(seed).shuffle(order)
    now = kl(order) if order else math.nan
    without: dict[int, float] = {}
    for threshold in at:
        for one in list(order):
            if one not in without:
                without[one] = kl([other for other in order if other != one])
            if without[one] - now < threshold:
                now = without[one]
                order.remove(one)
                without = {}
        yield Kept(threshold, tuple(sorted(order)))
