"""Sums per unit of a bootstrap, ratios of them, and their intervals. Knows no metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sememe.errors import ShapeError

__all__ = [
    "Array",
    "Formula",
    "Statistic",
    "Sums",
    "Totals",
    "bootstrap",
    "drawn",
    "over_latents",
    "over_pairs",
    "select",
    "undrawn_share",
    "units_of",
]

Array = npt.NDArray[np.float64]
Totals = Mapping[str, Array]
Formula = Callable[[Totals], Array]


class Statistic(NamedTuple):
    """A number, its bootstrap interval, and, where it is NaN, why."""

    value: float
    low: float = math.nan
    high: float = math.nan
    cause: str = ""

    def to_json(self) -> dict[str, float | str | None]:
        """Plain data; JSON has no NaN, so NaN is null beside its cause."""
        out: dict[str, float | str | None] = {
            name: number if math.isfinite(number) else None
            for name, number in (("value", self.value), ("low", self.low), ("high", self.high))
        }
        if self.cause:
            out["cause"] = self.cause
        return out


class Sums:
    """Named float64 sums, one row per unit; a unit is what a bootstrap draws, a document or a few."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.n_units = 0

    def add(self, units: Int[Tensor, " rows"], values: Mapping[str, Float[Tensor, "rows ..."]]) -> None:
        """Add each row's values to the sums of its unit."""
        if units.numel() == 0:
            return
        needed = int(units.max()) + 1
        for name, value in values.items():
            if value.shape[0] != units.shape[0]:
                raise ShapeError(
                    f"{name} must have one row per unit id ({units.shape[0]})",
                    value.shape[0],
                    "Pass one unit id for each row.",
                )
            have = self._sums.get(name)
            if have is None or have.shape[0] < needed:
                grown = value.new_zeros(
                    (max(needed, 2 * self.n_units), *value.shape[1:]), dtype=torch.float64
                )
                if have is not None:
                    grown[: have.shape[0]] = have
                self._sums[name] = have = grown
            have.index_add_(0, units.to(value.device), value.to(torch.float64))
        self.n_units = max(self.n_units, needed)

    def arrays(self, n_units: int | None = None) -> dict[str, Array]:
        """The sums as NumPy arrays with one row per unit (zeros for units that were never seen)."""
        n = self.n_units if n_units is None else n_units
        out = {}
        for name, tensor in self._sums.items():
            array: Array = np.zeros((n, *tensor.shape[1:]))
            rows = min(n, tensor.shape[0])
            array[:rows] = tensor[:rows].cpu().numpy()
            out[name] = array
        return out


def bootstrap(
    sums: Mapping[str, Array],
    formulas: Mapping[str, Formula],
    *,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    causes: Mapping[str, str] | None = None,
) -> dict[str, Statistic]:
    """Ratios of sums with percentile intervals, units (documents) drawn with replacement.

    Equal seeds and numbers of units draw equal units: intervals of several calls are paired.

    Args:
        sums: Sums per unit, arrays of shape (units, ...).
        formulas: From sums with a leading axis (draws, ...) to values (draws,).
        n: Number of draws; 0 gives no intervals.
        seed: Of the draws.
        level: Probability that the interval covers.
        causes: What it means when a statistic is NaN, by name.
    """
    n_units = next(iter(sums.values())).shape[0] if sums else 0
    seen = np.flatnonzero(sums["n"] > 0) if "n" in sums else np.arange(n_units)
    whole = {name: array[seen].sum(0)[None] for name, array in sums.items()}
    draws: dict[str, Array] | None = None
    if n and seen.size > 1:
        weights = np.random.default_rng(seed).multinomial(
            seen.size, np.full(seen.size, 1 / seen.size), size=n
        )
        draws = {
            name: np.tensordot(weights.astype(np.float64), array[seen], axes=1)
            for name, array in sums.items()
        }
    out: dict[str, Statistic] = {}
    with np.errstate(all="ignore"):
        for name, formula in formulas.items():
            value = float(formula(whole)[0])
            low = high = math.nan
            cause = "" if math.isfinite(value) else (causes or {}).get(name, "its denominator is zero")
            if seen.size == 0:
                cause = "there were no rows"
            value = math.nan if cause else value
            if not cause and n:
                if draws is None:
                    cause = "an interval needs at least 2 documents"
                else:
                    drawn = formula(draws)
                    low, high = (float(q) for q in np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]))
                    if not (math.isfinite(low) and math.isfinite(high)):
                        cause = "some draws of documents leave it undefined"
            out[name] = Statistic(value, low, high, cause)
    return out


def drawn(
    sums: Mapping[str, Array], formulas: Mapping[str, Formula], *, n: int, seed: int, n_units: int
) -> dict[str, Array]:
    """Ratios of sums over all units, then over each of n draws of them: arrays of length 1 + n.

    Unlike `bootstrap`'s, draws depend on nothing but n, seed and n_units, so that those of measurements that saw the
    same units are paired, whatever each counted of them. NaN where a draw leaves a ratio undefined.
    """
    weights = np.ones((1 + n, n_units))
    weights[1:] = np.random.default_rng(seed).multinomial(n_units, np.full(n_units, 1 / n_units), size=n)
    totals = {name: np.tensordot(weights, array, axes=1) for name, array in sums.items()}
    with np.errstate(all="ignore"):
        return {name: np.asarray(formula(totals), dtype=np.float64) for name, formula in formulas.items()}


MAX_GROUPS = 1024
"""Latents, or groups of them, that a bootstrap over latents draws."""


NORMAL_975 = 1.959963984540054
"""Standard deviations of a normal that hold 97.5% below them."""


def undrawn_share(found: Statistic, n: int) -> Statistic:
    """A share that is 0 or 1 with Wilson's interval where draws gave none but itself.

    Where nothing, or everything, is counted, every draw of it is the same, and a bootstrap's interval has no length
    however few there are. Of n trials without a hit, Wilson's ends at 3.84 / (n + 3.84), about the rule of three.

    Args:
        found: A share with its interval.
        n: How many it is a share of.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    if not (found.value == found.low == found.high and found.value in (0.0, 1.0)) or n < 1:
        return found
    least = NORMAL_975**2 / (n + NORMAL_975**2)
    low, high = (0.0, least) if found.value == 0 else (1 - least, 1.0)
    return found._replace(low=low, high=high)


def over_latents(
    values: Shaped[Tensor, " n"],
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
    cause: str = "some latents have no value",
) -> Statistic:
    """The mean over latents with an interval from drawing latents; of many, groups of every 1,024th.

    Args:
        values: A number for each latent, or whether it counts: a share, with Wilson's interval where it is 0 or 1. NaN
            makes the mean NaN.
        n_bootstrap: Draws; 0 gives no interval.
        seed: Of the draws.
        cause: Why there may be NaN.
    """
    groups = torch.arange(values.shape[0], device=values.device) % MAX_GROUPS
    sums = Sums()
    sums.add(groups, {"n": torch.ones_like(values, dtype=torch.float64), "value": values.detach()})
    found = bootstrap(
        sums.arrays(),
        {"mean": lambda t: t["value"] / t["n"]},
        n=n_bootstrap,
        seed=seed,
        causes={"mean": cause},
    )["mean"]
    found = found._replace(cause=found.cause.replace("2 documents", "2 latents"))
    return undrawn_share(found, values.shape[0]) if values.dtype == torch.bool else found


def over_pairs(
    table: Float[Tensor, "k k"],
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
    cause: str = "some pairs have no value",
) -> Statistic:
    """The mean over pairs of different things with an interval from drawing the things, not the pairs, which hang
    together; a thing that is drawn twice makes no pair with itself.

    Source: Snijders & Borgatti 1999, the vertex bootstrap. Differs: pairs of a thing with itself are left out instead
    of filled.

    Args:
        table: A number for each pair, symmetric; the diagonal does not count. NaN makes the mean NaN.
        n_bootstrap: Draws; 0 gives no interval.
        seed: Of the draws.
        cause: Why there may be NaN.
    """
    k = table.shape[0]
    values = table.detach().cpu().double().numpy().copy()
    np.fill_diagonal(values, 0.0)
    value = float(values.sum() / (k * (k - 1))) if k > 1 else math.nan
    if not math.isfinite(value):
        return Statistic(math.nan, cause=cause if k > 1 else "there were no pairs")
    if n_bootstrap == 0:
        return Statistic(value)
    weights = (
        np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), size=n_bootstrap).astype(np.float64)
    )
    pairs = k**2 - np.square(weights).sum(1)
    if (pairs == 0).any():
        return Statistic(value, cause="some draws hold one thing alone")
    means = np.einsum("bi,bi->b", weights @ values, weights) / pairs
    low, high = (float(q) for q in np.quantile(means, [0.025, 0.975]))
    return Statistic(value, low, high)


def units_of(units: Int[Tensor, " rows"] | None, like: Tensor) -> Int[Tensor, " rows"]:
    if units is None:
        return torch.zeros(like.shape[0], dtype=torch.int64, device=like.device)
    return units.to(like.device)


def select(sums: dict[str, Array], units: Bool[np.ndarray, " units"] | None) -> dict[str, Array]:
    if units is None:
        return sums
    return {name: array[units[: array.shape[0]]] for name, array in sums.items()}
