"""Scores of many latents: tables, means with intervals, the lift over nulls, and what scores go with.

Knows scores as numbers; reads and asks nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from scipy.stats import rankdata

from sememe.explain.scorers import Score

__all__ = ["SHAPE", "Column", "Interval", "Scores", "correlations", "lifts", "mean_of", "strata", "summarise"]

SHAPE = ("mcs", "max_cos", "self_similarity", "skew", "kurtosis", "bias", "density")
"""Columns of an atlas's latents whose rank correlation with the scores is reported, where they are there."""
MIN_FOR_RANKS = 8
CONTROLS = {("lexical", "shuffled"), ("lexical", "other")}
"""Scores that are themselves nulls: nothing is held against them."""
Values = Float[np.ndarray, " n"]


class Interval(NamedTuple):
    """A number with its 95% bootstrap interval over latents; None where there are too few."""

    mean: float | None
    low: float | None
    high: float | None
    n_latents: int

    def as_json(self) -> dict[str, float | int | None]:
        """As plain data."""
        return self._asdict()


class Column(NamedTuple):
    """One scorer's variant over latents, whole (decile None) or for one decile."""

    latent: np.ndarray
    score: np.ndarray
    """NaN where it is not defined for a latent."""
    n: np.ndarray
    n_malformed: np.ndarray
    n_missing: np.ndarray

    @property
    def defined(self) -> np.ndarray:
        """The scores that are numbers."""
        kept: np.ndarray = self.score[~np.isnan(self.score)]
        return kept


Key = tuple[str, str, int | None]


class Scores:
    """Every score of an artifact, by scorer, variant and decile."""

    def __init__(self) -> None:
        self._rows: dict[Key, list[tuple[np.ndarray, ...]]] = {}

    def add(self, latent: int, scores: Iterable[Score]) -> None:
        """The scores of one latent."""
        for s in scores:
            self.add_many(
                (s.scorer, s.variant, s.decile),
                np.array([latent]), np.array([s.score]), np.array([s.n]), np.array([s.n_malformed]),
                np.array([s.n_missing]),
            )  # fmt: skip

    def add_many(
        self,
        key: Key,
        latent: np.ndarray,
        score: np.ndarray,
        n: np.ndarray,
        n_malformed: np.ndarray | None = None,
        n_missing: np.ndarray | None = None,
    ) -> None:
        """One scorer's scores of many latents."""
        none = np.zeros(latent.shape, np.int64)
        bad, missing = (none if counts is None else counts for counts in (n_malformed, n_missing))
        self._rows.setdefault(key, []).append((latent, score, n, bad, missing))

    @property
    def names(self) -> list[Key]:
        """Scorer, variant and decile, in the order they came."""
        return list(self._rows)

    def column(self, key: Key) -> Column:
        """The scores under a key, ordered by latent."""
        parts = [np.concatenate(column) for column in zip(*self._rows[key], strict=True)]
        order = np.argsort(parts[0], kind="stable")
        return Column(*(part[order] for part in parts))

    def table(self) -> pa.Table:
        """A row per latent, scorer, variant and decile; score is NULL where it is not defined."""
        parts = []
        for scorer, variant, decile in sorted(
            self._rows, key=lambda k: (k[0], k[1], -1 if k[2] is None else k[2])
        ):
            c = self.column((scorer, variant, decile))
            size = c.latent.shape[0]
            parts.append(
                pa.table(
                    {
                        "latent": c.latent.astype(np.int32),
                        "scorer": pa.array([scorer] * size, pa.string()),
                        "variant": pa.array([variant] * size, pa.string()),
                        "decile": pa.array([decile] * size, pa.int8()),
                        "score": pa.array(c.score.astype(np.float64), mask=np.isnan(c.score)),
                        "n": c.n.astype(np.int32),
                        "n_malformed": c.n_malformed.astype(np.int32),
                        "n_missing": c.n_missing.astype(np.int32),
                    }
                )
            )
        return pa.concat_tables(parts)

    @classmethod
    def of_table(cls, table: pa.Table) -> Scores:
        """From what `table` gave."""
        found = cls()
        numbers = ("latent", "score", "n", "n_malformed", "n_missing")
        column = {name: table[name].to_pylist() for name in ("scorer", "variant", "decile")}
        number = {name: table[name].combine_chunks().to_numpy(zero_copy_only=False) for name in numbers}
        groups: dict[Key, list[int]] = {}
        for i, key in enumerate(zip(column["scorer"], column["variant"], column["decile"], strict=True)):
            groups.setdefault(key, []).append(i)
        for key, rows in groups.items():
            found.add_many(key, *(number[name][rows] for name in numbers))
        return found


def mean_of(values: Values, n_bootstrap: int, seed: int) -> Interval:
    """Mean and 95% percentile bootstrap interval over latents; NaN are refused."""
    assert not np.isnan(values).any()
    if values.size == 0:
        return Interval(None, None, None, 0)
    draws = _draws(values, n_bootstrap, seed)
    low, high = np.quantile(draws, (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high), int(values.size))


def _draws(values: Values, n: int, seed: int) -> Float[np.ndarray, " draws"]:
    """Means of latents drawn with replacement."""
    counts = np.random.default_rng(seed).multinomial(
        values.size, np.full(values.size, 1 / values.size), size=n
    )
    means: np.ndarray = counts @ values / values.size
    return means


def summarise(scores: Scores, n_bootstrap: int, seed: int) -> list[dict[str, Any]]:
    """A row per scorer and variant: the mean with its interval, deciles' means, what is lacking counted.

    `n_short` is how many latents had fewer excerpts than the scorer asks for.
    """
    out = []
    keys = scores.names
    for scorer, variant, _ in [key for key in keys if key[2] is None]:
        column = scores.column((scorer, variant, None))
        n, n_bad = int(column.n.sum()), int(column.n_malformed.sum())
        deciles = {
            str(decile): mean_of(
                scores.column((scorer, variant, decile)).defined, n_bootstrap, seed
            ).as_json()
            for decile in range(10)
            if (scorer, variant, decile) in keys
        }
        out.append(
            {
                "scorer": scorer,
                "variant": variant,
                **mean_of(column.defined, n_bootstrap, seed).as_json(),
                "n_undefined": int(np.isnan(column.score).sum()),
                "n_short": int((column.n_missing > 0).sum()),
                "n": n,
                "malformed_share": n_bad / n if n else 0.0,
                "deciles": deciles,
            }
        )
    return out


def lifts(
    own: Scores,
    nulls: Mapping[str, Scores],
    n_bootstrap: int,
    seed: int,
    *,
    without: frozenset[str] = frozenset(),
) -> list[dict[str, Any]]:
    """For each scorer and variant, the mean score minus that of the null that does best, with an interval.

    Latents of the dictionary and of each null are drawn independently, and in every draw the best null is chosen
    anew, so the interval counts that choice. Scorers in `without` have no lift: nulls were not treated alike.
    """
    out = []
    for key in sorted(
        key for key in own.names if key[2] is None and key[:2] not in CONTROLS and key[0] not in without
    ):
        mine = own.column(key).defined
        others = {name: null.column(key).defined for name, null in nulls.items() if key in null.names}
        others = {name: values for name, values in others.items() if values.size}
        if not mine.size or not others:
            continue
        means = {name: float(values.mean()) for name, values in others.items()}
        best = max(means, key=lambda name: means[name])
        drawn = _draws(mine, n_bootstrap, seed) - np.max(
            [_draws(values, n_bootstrap, seed + 1 + i) for i, values in enumerate(others.values())], axis=0
        )
        low, high = np.quantile(drawn, (0.025, 0.975))
        out.append(
            {
                "scorer": key[0],
                "variant": key[1],
                "lift": float(mine.mean()) - means[best],
                "low": float(low),
                "high": float(high),
                "best_null": best,
                "nulls": {
                    name: mean_of(values, n_bootstrap, seed + 1 + i).as_json()
                    for i, (name, values) in enumerate(others.items())
                },
            }
        )
    return out


def correlations(
    scores: Scores, shape: Mapping[str, np.ndarray], n_bootstrap: int, seed: int
) -> list[dict[str, Any]]:
    """Spearman's rank correlation of each whole score with each property of the latents, with bootstrap intervals.

    Over latents where both are numbers; `rho` is None where these are too few or all alike.

    Args:
        scores: Of latents.
        shape: Properties by name, an entry per latent of the dictionary.
        n_bootstrap: Draws of latents.
        seed: Of the draws.
    """
    out = []
    for scorer, variant, decile in scores.names:
        if decile is not None or (scorer, variant) in CONTROLS:
            continue
        column = scores.column((scorer, variant, None))
        for name, values in shape.items():
            x = values[column.latent].astype(np.float64)
            kept = ~np.isnan(x) & ~np.isnan(column.score)
            rho, low, high = _spearman(x[kept], column.score[kept], n_bootstrap, seed)
            out.append(
                {
                    "scorer": scorer, "variant": variant, "property": name, "rho": rho, "low": low, "high": high,
                    "n_latents": int(kept.sum()),
                }
            )  # fmt: skip
    return out


def _spearman(x: Values, y: Values, n: int, seed: int) -> tuple[float | None, float | None, float | None]:
    if x.size < MIN_FOR_RANKS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None, None, None
    a, b = rankdata(x), rankdata(y)
    rho = float(np.corrcoef(a, b)[0, 1])
    # Ranks are those among all latents; drawing latents weighs them.
    a, b = a - a.mean(), b - b.mean()
    weights = np.random.default_rng(seed).multinomial(x.size, np.full(x.size, 1 / x.size), size=n) / x.size
    mean_a, mean_b, aa, bb, ab = (weights @ np.stack((a, b, a * a, b * b, a * b), axis=1)).T
    spread = (aa - mean_a**2) * (bb - mean_b**2)
    drawn = (ab - mean_a * mean_b)[spread > 0] / np.sqrt(spread[spread > 0])
    if drawn.size < n / 2 or not drawn.size:
        return rho, None, None
    low, high = np.quantile(drawn, (0.025, 0.975))
    return rho, float(low), float(high)


def strata(density: Values, eligible: Sequence[int], n: int, seed: int) -> list[int]:
    """n of the eligible latents, one at random from each of n strata of density with equally many; all, if fewer."""
    ordered = sorted(eligible, key=lambda latent: (density[latent], latent))
    if len(ordered) <= n:
        return sorted(ordered)
    rng = np.random.default_rng(seed)
    edges = [math.floor(i * len(ordered) / n) for i in range(n + 1)]
    return sorted(ordered[int(rng.integers(low, high))] for low, high in itertools.pairwise(edges))
