"""How close reconstructions come. Knows tensors, not what made them."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sememe.errors import ShapeError
from sememe.metrics.sums import Array, Formula, Statistic, Sums, Totals, bootstrap, drawn, select, units_of

__all__ = ["Reconstruction"]


class Reconstruction:
    """How close reconstructions are to their targets: mse, rmse, fvu, explained_variance, cosine, and the
    mean norm of what is reconstructed.

    The variance of fvu and explained_variance is about the mean of the rows that are counted.
    """

    def __init__(self) -> None:
        self.sums = Sums()
        self.d_out = 0
        self._shift: Tensor | None = None

    def update(
        self,
        target: Float[Tensor, "rows d_out"],
        recon: Float[Tensor, "rows d_out"],
        mask: Bool[Tensor, " rows"] | None = None,
        units: Int[Tensor, " rows"] | None = None,
    ) -> None:
        """Add rows.

        Args:
            target: What should have come out, in raw units.
            recon: What came out.
            mask: Rows to count; all if not given.
            units: The bootstrap unit of each row; one unit if not given.
        """
        if target.shape != recon.shape or target.dim() != 2:
            raise ShapeError(
                "target and recon must have one shape (rows, d_out)",
                f"{tuple(target.shape)} and {tuple(recon.shape)}",
                "Compare a reconstruction with the activations it reconstructs.",
            )
        units = units_of(units, target)
        if mask is not None:
            target, recon, units = target[mask], recon[mask], units[mask]
        if target.shape[0] == 0:
            return
        target, recon = target.detach().to(torch.float64), recon.detach().to(torch.float64)
        self.d_out = target.shape[1]
        if self._shift is None:
            # Variance is taken about this row and corrected at the end: no cancellation at a large offset.
            finite = torch.nonzero(torch.isfinite(target).all(1)).view(-1)
            self._shift = target[finite[0]].clone() if finite.numel() else None
        shifted = target if self._shift is None else target - self._shift
        norms = target.norm(dim=1) * recon.norm(dim=1)
        cosine = torch.where(norms == 0, 0.0, (target * recon).sum(1) / norms)
        error = (target - recon).square().sum(1)
        self.sums.add(
            units,
            {
                "n": torch.ones_like(error),
                "bad": (~torch.isfinite(error)).to(torch.float64),
                "error": error,
                "square": shifted.square().sum(1),
                "sum": shifted,
                "cosine": cosine,
                "norm": target.norm(dim=1),
            },
        )

    def compute(
        self, *, n_bootstrap: int = 0, seed: int = 0, units: Bool[np.ndarray, " units"] | None = None
    ) -> dict[str, Statistic]:
        """The metrics over all rows, or over those of some units."""
        sums = select(self.sums.arrays(), units)
        if not sums:
            return dict.fromkeys(self._formulas(), Statistic(math.nan, cause="there were no rows"))
        n_bad = int(sums.pop("bad").sum())
        self._about_the_mean(sums)
        if n_bad:
            why = f"{n_bad} rows of the reconstruction or its target are NaN or infinite"
            causes = dict.fromkeys(self._formulas(), why)
        else:
            causes = dict.fromkeys(("fvu", "explained_variance"), "the rows have no variance")
        return bootstrap(sums, self._formulas(), n=n_bootstrap, seed=seed, causes=causes)

    def drawn(self, *, n: int, seed: int, n_units: int) -> dict[str, Array]:
        """The metrics over all units and in n draws of them, as `sums.drawn`."""
        sums = self.sums.arrays(n_units)
        if not sums:
            return {name: np.full(1 + n, math.nan) for name in self._formulas()}
        del sums["bad"]
        self._about_the_mean(sums)
        return drawn(sums, self._formulas(), n=n, seed=seed, n_units=n_units)

    @staticmethod
    def _about_the_mean(sums: dict[str, Array]) -> None:
        """Sums of squares become those about the mean of all rows."""
        # About the mean of all these rows in every draw of the bootstrap too: a draw's own mean lies closer to its
        # few documents, which would push every drawn fvu up.
        with np.errstate(all="ignore"):
            mean = sums["sum"].sum(0) / sums["n"].sum()
            sums["variance"] = sums["square"] - 2 * sums["sum"] @ mean + sums["n"] * (mean @ mean)
        del sums["sum"], sums["square"]

    def _formulas(self) -> dict[str, Formula]:
        def fvu(t: Totals) -> Array:
            return t["error"] / t["variance"]

        def mse(t: Totals) -> Array:
            return t["error"] / (t["n"] * self.d_out)

        return {
            "mse": mse,
            "rmse": lambda t: np.sqrt(mse(t)),
            "fvu": fvu,
            "explained_variance": lambda t: 1 - fvu(t),
            "cosine": lambda t: t["cosine"] / t["n"],
            "target_norm": lambda t: t["norm"] / t["n"],
        }
