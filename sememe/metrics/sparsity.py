"""How many latents are active, and how often each. Knows sparse activations, not what they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sememe.encoded import Encoded
from sememe.errors import ShapeError
from sememe.metrics.sums import (
    Array,
    Formula,
    Statistic,
    Sums,
    bootstrap,
    drawn,
    select,
    undrawn_share,
    units_of,
)

__all__ = ["DensityHistogram", "Sparsity", "density_histogram"]

HISTOGRAM_LOW = 1e-6
HISTOGRAM_BINS = 60
N_FIRST_ROWS = 8192
"""Rows on which Marks & Mueller count latents as alive."""
BELOW, ABOVE = (1e-5, 1e-4, 1e-3), 1e-2
"""Densities that papers ask for the share of latents under, and over."""


MAX_GROUPS = 256
"""Groups of units that counts by latent are kept for: every 256th unit is in the same. Memory is 5 bytes each."""
COUNTED_AT_ONCE = 2**22
"""Densities of draws that are held at once."""
BROKEN = "activations are NaN or infinite"


class Sparsity:
    """How many latents are active, how much, and how often each: l0, l1, frac_alive, density.

    `active_rows` counts, per latent, the non-zero entries seen; `rows_with`, per number, the rows with so many active.
    For intervals the same is kept by groups of units.
    """

    def __init__(self, d_sae: int) -> None:
        self.sums = Sums()
        self.active_rows = torch.zeros(d_sae, dtype=torch.int64)
        self.rows_with = torch.zeros(1, dtype=torch.int64)
        self.alive_first = torch.zeros(d_sae, dtype=torch.bool)
        self.n_rows = self.n_broken = 0
        self._active = torch.zeros(0, d_sae, dtype=torch.int32)
        self._first = torch.zeros(0, d_sae, dtype=torch.bool)
        self._rows_with = torch.zeros(0, 1, dtype=torch.int32)

    def update(
        self,
        encoded: Encoded,
        mask: Bool[Tensor, " rows"] | None = None,
        units: Int[Tensor, " rows"] | None = None,
    ) -> None:
        """Add rows; arguments as in `Reconstruction.update`."""
        units = units_of(units, encoded.row_ptr[:-1])
        if mask is not None:
            encoded, units = encoded.select_rows(mask), units[mask]
        if encoded.n_rows == 0:
            return
        encoded = encoded.detach()
        size = encoded.acts.to(torch.float64).abs()
        l1 = size.new_zeros(encoded.n_rows).index_add_(0, encoded.row_ids(), size)
        l0 = encoded.l0()
        broken = ~torch.isfinite(l1)  # what counts as active there nobody knows
        self.n_broken += int(broken.sum())
        counted = torch.where(broken, torch.nan, l0.to(torch.float64))
        self.sums.add(units, {"n": torch.ones_like(l1), "l0": counted, "l1": l1})
        counts = torch.bincount(l0.long().cpu())
        longer = max(counts.shape[0], self.rows_with.shape[0])
        self.rows_with = _padded(self.rows_with, longer) + _padded(counts, longer)
        self.active_rows = self.active_rows.to(encoded.acts.device)
        active = encoded.acts != 0
        self.active_rows += torch.bincount(encoded.indices[active].long(), minlength=encoded.d_sae)
        early = active & (encoded.row_ids() < max(0, N_FIRST_ROWS - self.n_rows))
        self.alive_first[encoded.indices[early].long().cpu()] = True
        self._count(encoded, active, early, units % MAX_GROUPS)
        self.n_rows += encoded.n_rows

    def _count(
        self,
        encoded: Encoded,
        active: Bool[Tensor, " entries"],
        early: Bool[Tensor, " entries"],
        groups: Int[Tensor, " rows"],
    ) -> None:
        """The same by group of units."""
        device, l0 = encoded.acts.device, encoded.l0().long()
        n, width = int(groups.max()) + 1, int(l0.max()) + 1
        self._active, self._first = (_grown(one.to(device), n) for one in (self._active, self._first))
        self._rows_with = _grown(self._rows_with.to(device), n, width)
        groups = groups.to(device)
        of, latents = groups[encoded.row_ids().long()], encoded.indices.long()
        ones = torch.ones_like(latents, dtype=torch.int32)
        d_sae = encoded.d_sae
        self._active.view(-1).index_add_(0, (of * d_sae + latents)[active], ones[active])
        self._first[of[early], latents[early]] = True
        cells = groups * self._rows_with.shape[1] + l0
        self._rows_with.view(-1).index_add_(0, cells, torch.ones_like(cells, dtype=torch.int32))

    def density(self) -> Float[Tensor, " d_sae"]:
        """Per latent, the share of rows on which it is active; NaN before the first row."""
        return self.active_rows.to(torch.float64) / (self.n_rows or math.nan)

    def l0_quantiles(
        self,
        shares: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95),
        *,
        n_bootstrap: int = 0,
        seed: int = 0,
    ) -> dict[str, Statistic]:
        """The smallest number of active latents that so large a share of the rows does not exceed.

        Args:
            shares: Which.
            n_bootstrap: Draws of units for the intervals, as they fall (a quantile is not moved by drawing); 0: none.
            seed: Of the draws.
        """
        cause = self._cause()
        if cause:
            return {f"{share:g}": Statistic(math.nan, cause=cause) for share in shares}
        so_far = self.rows_with.cumsum(0).double() / self.n_rows
        values = {share: float((so_far < share - 1e-12).sum()) for share in shares}
        seen = self._rows_with.sum(1) > 0
        weights, few = self._weights(n_bootstrap, seed, seen)
        if weights is None:
            return {f"{share:g}": Statistic(value, cause=few) for share, value in values.items()}
        drawn = weights @ self._rows_with[seen].double().cumsum(1)
        drawn = drawn / drawn[:, -1:]
        found = {}
        for share, value in values.items():
            low, high = _ends((drawn < share - 1e-12).sum(1).double())
            found[f"{share:g}"] = Statistic(value, low, high)
        return found

    def density_shares(self, *, n_bootstrap: int = 0, seed: int = 0) -> dict[str, Statistic]:
        """Share of the latents whose density is below 1e-5, 1e-4, 1e-3, and above 1e-2.

        An interval says what as many other documents would give. Drawn documents lose latents and never find new ones,
        so that rare latents look rarer in every draw than in a sample: the draws' spread is used, their place is not.
        In simulations of topical latents such intervals held it in 84% to 97% of the cases; the draws as they fall hold
        the share of rare latents in next to none (docs/metrics.md).

        Args:
            n_bootstrap: Draws of units; 0 gives no intervals.
            seed: Of the draws.
        """
        names = [f"below_{limit:.0e}".replace("e-0", "e-") for limit in BELOW]
        names.append(f"above_{ABOVE:.0e}".replace("e-0", "e-"))

        def shares(density: Float[Tensor, "*draws d_sae"]) -> Float[Tensor, "*draws shares"]:
            parts = [*(density < limit for limit in BELOW), density > ABOVE]
            return torch.stack([part.double().mean(-1) for part in parts], dim=-1)

        found = self._shares(shares, self.density(), n_bootstrap, seed)
        return dict(zip(names, found, strict=True))

    def compute(
        self, *, n_bootstrap: int = 0, seed: int = 0, units: Bool[np.ndarray, " units"] | None = None
    ) -> dict[str, Statistic]:
        """l0, l1, frac_alive, and frac_alive_8192: on the first 8,192 rows, as Marks & Mueller have it.

        frac_alive's interval is made as that of `density_shares`; both are over all units whatever `units` says, and
        then have none."""
        sums = select(self.sums.arrays(), units)
        formulas = self._formulas()
        if not sums:
            names = (*formulas, "frac_alive", "frac_alive_8192")
            return dict.fromkeys(names, Statistic(math.nan, cause="there were no rows"))
        out = bootstrap(sums, formulas, n=n_bootstrap, seed=seed, causes=dict.fromkeys(formulas, BROKEN))

        def alive(density: Float[Tensor, "*draws d_sae"]) -> Float[Tensor, "*draws one"]:
            return (density > 0).double().mean(-1, keepdim=True)

        n = n_bootstrap if units is None else 0
        (out["frac_alive"],) = self._shares(alive, self.density(), n, seed)
        if self.n_rows < N_FIRST_ROWS:
            cause = f"there were {self.n_rows:,} rows, fewer than {N_FIRST_ROWS:,}"
            out["frac_alive_8192"] = Statistic(math.nan, cause=self._cause() or cause)
        else:
            first = self.alive_first.double()
            (out["frac_alive_8192"],) = self._shares(alive, first, n, seed, self._first)
        return out

    def _cause(self) -> str:
        """Why there are no numbers, if there are none."""
        if not self.n_rows:
            return "there were no rows"
        return f"{BROKEN} in {self.n_broken:,} rows" if self.n_broken else ""

    def _weights(
        self, n: int, seed: int, seen: Bool[Tensor, " groups"]
    ) -> tuple[Float[Tensor, "draws seen"] | None, str]:
        """How often each group of units that was seen is drawn, or why there are no draws."""
        size = int(seen.sum())
        if n == 0 or size < 2:
            return None, "an interval needs at least 2 documents" if n else ""
        weights = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=n)
        return torch.from_numpy(weights.astype(np.float64)).to(seen.device), ""

    def _shares(
        self,
        shares: Callable[[Tensor], Tensor],
        density: Float[Tensor, " d_sae"],
        n: int,
        seed: int,
        counts: Shaped[Tensor, "groups d_sae"] | None = None,
    ) -> list[Statistic]:
        """Shares of the latents from their densities; their intervals have the draws' spread about these."""
        cause = self._cause()
        values = shares(density).tolist()
        if cause:
            return [Statistic(math.nan, cause=cause) for _ in values]
        counts = self._active if counts is None else counts
        rows_of = self._rows_with.sum(1)
        seen = rows_of > 0 if counts is self._active else counts.any(1)
        weights, few = self._weights(n, seed, seen)
        if weights is None:
            return [Statistic(value, cause=few) for value in values]
        table, rows = counts[seen].double(), weights @ rows_of[seen].double()
        at_once = max(1, COUNTED_AT_ONCE // table.shape[1])
        parts = zip(torch.split(weights, at_once), torch.split(rows, at_once), strict=True)
        drawn = torch.cat([shares(part @ table / n_rows[:, None]) for part, n_rows in parts])
        found = []
        for value, own in zip(values, drawn.unbind(1), strict=True):
            # Of draws that pile up at 0 or 1, the mean lies beyond most of them: the ends would leave the value out.
            low, high = (value + end - float(own.mean()) for end in _ends(own))
            one = Statistic(value, min(max(0.0, low), value), max(min(1.0, high), value))
            found.append(undrawn_share(one, density.shape[0]))
        return found

    def drawn(self, *, n: int, seed: int, n_units: int) -> dict[str, Array]:
        """l0 and l1 over all units and in n draws of them, as `sums.drawn`."""
        sums = self.sums.arrays(n_units)
        if not sums:
            return {name: np.full(1 + n, math.nan) for name in self._formulas()}
        return drawn(sums, self._formulas(), n=n, seed=seed, n_units=n_units)

    @staticmethod
    def _formulas() -> dict[str, Formula]:
        return {"l0": lambda t: t["l0"] / t["n"], "l1": lambda t: t["l1"] / t["n"]}


def _ends(drawn: Float[Tensor, " draws"]) -> tuple[float, float]:
    """The middle 95%."""
    low, high = np.quantile(drawn.cpu().numpy(), [0.025, 0.975])
    return float(low), float(high)


def _grown(table: Shaped[Tensor, "n m"], n: int, width: int = 0) -> Shaped[Tensor, "more wider"]:
    """At least so many rows (doubling) and columns."""
    have, wide = table.shape
    more = 0 if n <= have else min(max(n, 2 * have), MAX_GROUPS) - have
    return torch.nn.functional.pad(table, (0, max(0, width - wide), 0, more))


def _padded(counts: Int[Tensor, " n"], n: int) -> Int[Tensor, " m"]:
    return torch.nn.functional.pad(counts, (0, n - counts.shape[0]))


class DensityHistogram(NamedTuple):
    """Latents per density on a logarithmic axis. `counts[i]` are in [edges[i], edges[i + 1])."""

    edges: list[float]
    counts: list[int]
    n_silent: int
    n_below: int


def density_histogram(
    density: Float[Tensor, " d_sae"], n_bins: int = HISTOGRAM_BINS, low: float = HISTOGRAM_LOW
) -> DensityHistogram:
    """Latents per density, in logarithmic bins between `low` and 1; density 1 belongs to the last bin.

    Latents that never fired are counted in `n_silent`, those that fired more rarely than `low` in `n_below`:
    every latent is counted once.
    """
    values = density.detach().cpu().to(torch.float64).numpy()
    if not np.isfinite(values).all():
        raise ShapeError(
            "densities must be finite", "NaN", "Count at least one row before asking for a histogram."
        )
    edges = np.logspace(math.log10(low), 0, n_bins + 1)
    edges[0], edges[-1] = low, 1.0
    silent, below = values == 0, (values > 0) & (values < low)
    inside = values[~silent & ~below].clip(max=1.0)  # duplicate entries of a row can count a latent twice
    counts, _ = np.histogram(inside, bins=edges)
    return DensityHistogram(edges.tolist(), counts.tolist(), int(silent.sum()), int(below.sum()))
