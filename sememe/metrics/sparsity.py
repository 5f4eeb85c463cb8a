"""How many latents are active, and how often each. Knows sparse activations, not what they stand for."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.encoded import Encoded
from sememe.errors import ShapeError
from sememe.metrics.sums import Array, Formula, Statistic, Sums, bootstrap, drawn, select, units_of

__all__ = ["DensityHistogram", "Sparsity", "density_histogram"]

HISTOGRAM_LOW = 1e-6
HISTOGRAM_BINS = 60
N_FIRST_ROWS = 8192
"""Rows on which Marks & Mueller count latents as alive."""
BELOW, ABOVE = (1e-5, 1e-4, 1e-3), 1e-2
"""Densities that papers ask for the share of latents under, and over."""


class Sparsity:
    """How many latents are active, how much, and how often each: l0, l1, frac_alive, density.

    `active_rows` counts, per latent, the non-zero entries seen; `rows_with`, per number, the rows with so many active.
    """

    def __init__(self, d_sae: int) -> None:
        self.sums = Sums()
        self.active_rows = torch.zeros(d_sae, dtype=torch.int64)
        self.rows_with = torch.zeros(1, dtype=torch.int64)
        self.alive_first = torch.zeros(d_sae, dtype=torch.bool)
        self.n_rows = self.n_broken = 0

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
        if self.n_rows < N_FIRST_ROWS:
            early = active & (encoded.row_ids() < N_FIRST_ROWS - self.n_rows)
            self.alive_first[encoded.indices[early].long().cpu()] = True
        self.n_rows += encoded.n_rows

    def density(self) -> Float[Tensor, " d_sae"]:
        """Per latent, the share of rows on which it is active; NaN before the first row."""
        return self.active_rows.to(torch.float64) / (self.n_rows or math.nan)

    def l0_quantiles(self, shares: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> dict[str, float]:
        """The smallest number of active latents that so large a share of the rows does not exceed; NaN without rows."""
        so_far = self.rows_with.cumsum(0).double() / (self.n_rows or math.nan)
        return {
            f"{share:g}": float((so_far < share - 1e-12).sum()) if self.n_rows else math.nan
            for share in shares
        }

    def density_shares(self) -> dict[str, float]:
        """Share of the latents whose density is below 1e-5, 1e-4, 1e-3, and above 1e-2; NaN without rows."""
        density = self.density()
        found = {f"below_{limit:.0e}": (density < limit) for limit in BELOW} | {
            f"above_{ABOVE:.0e}": density > ABOVE
        }
        return {
            name.replace("e-0", "e-"): float(part.double().mean()) if self.n_rows else math.nan
            for name, part in found.items()
        }

    def compute(
        self, *, n_bootstrap: int = 0, seed: int = 0, units: Bool[np.ndarray, " units"] | None = None
    ) -> dict[str, Statistic]:
        """l0, l1, frac_alive, and frac_alive_8192: on the first 8,192 rows, as Marks & Mueller have it.

        frac_alive has no interval: drawing documents again loses latents, never
        finds new ones, so its bootstrap does not cover; it is over all units whatever `units` says."""
        sums = select(self.sums.arrays(), units)
        formulas = self._formulas()
        if not sums:
            names = (*formulas, "frac_alive", "frac_alive_8192")
            return dict.fromkeys(names, Statistic(math.nan, cause="there were no rows"))
        cause = "activations are NaN or infinite"
        out = bootstrap(sums, formulas, n=n_bootstrap, seed=seed, causes=dict.fromkeys(formulas, cause))
        if self.n_broken:
            broken = Statistic(math.nan, cause=f"{cause} in {self.n_broken:,} rows")
            return out | {"frac_alive": broken, "frac_alive_8192": broken}
        out["frac_alive"] = Statistic(float((self.active_rows > 0).double().mean()))
        out["frac_alive_8192"] = (
            Statistic(float(self.alive_first.double().mean()))
            if self.n_rows >= N_FIRST_ROWS
            else Statistic(math.nan, cause=f"there were {self.n_rows:,} rows, fewer than {N_FIRST_ROWS:,}")
        )
        return out

    def drawn(self, *, n: int, seed: int, n_units: int) -> dict[str, Array]:
        """l0 and l1 over all units and in n draws of them, as `sums.drawn`."""
        sums = self.sums.arrays(n_units)
        if not sums:
            return {name: np.full(1 + n, math.nan) for name in self._formulas()}
        return drawn(sums, self._formulas(), n=n, seed=seed, n_units=n_units)

    @staticmethod
    def _formulas() -> dict[str, Formula]:
        return {"l0": lambda t: t["l0"] / t["n"], "l1": lambda t: t["l1"] / t["n"]}


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
