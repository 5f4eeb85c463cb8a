"""Non-negative matrix factorisation as a dictionary: parts that only add, about the smallest entry of each dimension.

Fitted by scikit-learn in batches, on rows in memory or as they stream by; never trained. Knows no model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, Self, final

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from sememe.dictionaries.base import ArchitectureConfig, Sites
from sememe.dictionaries.fitted import Fitted, check_rows
from sememe.dictionaries.sparse_coder import fista
from sememe.encoded import Encoded
from sememe.errors import ShapeError
from sememe.progress import track

__all__ = ["NMF", "NMFConfig"]

BLOCK_ROWS = 4096
BATCH_ROWS = 1024
FORGET = 0.7
"""What a pass over all rows leaves of what was counted before it; scikit-learn's own."""
LEAST_CHANGE = 1e-3
"""How far a pass has to move the parts, against their length, for another to follow."""


class NMFConfig(ArchitectureConfig):
    """Options of the NMF baseline."""

    kind: Literal["nmf"] = "nmf"
    """Name of the baseline."""
    d_sae: int | None = None
    """Components; d_in if not given."""
    k: int | None = None
    """Components kept per row, the largest; all if not given."""
    max_iterations: int = Field(default=50, ge=1)
    """Passes over the rows at most."""
    n_steps: int = Field(default=50, ge=1)
    """Steps in which a row's coefficients are fitted."""
    seed: int = Field(default=0, ge=0)
    """Of its start."""

    def width(self, d_in: int) -> int:
        """d_in if not given."""
        return d_in if self.d_sae is None else self.d_sae


@final
class NMF(Fitted):
    """`acts = top_k(argmin_{a >= 0} |x - low - a W|)`, `recon = acts W + low`, W >= 0, rows of norm 1.

    `low` is each dimension's smallest entry among the rows that were fitted: activations have both signs, and what
    is factorised must not.

    Source: Lee & Seung 1999, as a baseline; scikit-learn's MiniBatchNMF. Coefficients by accelerated projected
    gradient.
    """

    kind = "nmf"
    config: NMFConfig

    def __init__(
        self, config: NMFConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        self.register_buffer("converged", torch.tensor(True))
        self.converged: Tensor

    @classmethod
    def rebuild(cls, config: dict[str, Any], d_in: int, d_out: int, d_sae: int, sites: Sites | None) -> Self:
        """An empty dictionary of the given shape."""
        return cls(NMFConfig.build(config), d_in, d_out, d_sae, sites)

    @classmethod
    def fit(cls, x: Float[Tensor, "rows d"], config: NMFConfig, sites: Sites | None = None) -> Self:
        """Factorise raw activations; `converged` says whether it came to rest.

        Raises:
            ShapeError: fewer rows than components.
            ActivationError: a row is NaN or infinite.
        """
        from sklearn.decomposition import MiniBatchNMF
        from sklearn.exceptions import ConvergenceWarning

        d_sae = config.width(x.shape[1])
        if x.shape[0] < d_sae:
            raise ShapeError(f"nmf with {d_sae} components takes as many rows", x.shape[0], "Give it more.")
        check_rows(x)
        made = cls(config, x.shape[1], x.shape[1], d_sae, sites)
        rows = x.float().cpu()
        low = rows.amin(0)
        search = MiniBatchNMF(
            d_sae,
            batch_size=BATCH_ROWS,
            max_iter=config.max_iterations,
            random_state=config.seed,
            init="random",
        )
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            search.fit((rows - low).clamp_min(0).numpy())
        made.converged.fill_(not any(issubclass(warning.category, ConvergenceWarning) for warning in warned))
        return made._of(search.components_, low).to(x.device)

    @classmethod
    def fit_stream(
        cls,
        passes: Callable[[int], Iterator[Float[Tensor, "rows d"]]],
        n_rows: int,
        config: NMFConfig,
        sites: Sites | None = None,
    ) -> Self:
        """Factorise rows of which only a batch is held at a time.

        Differs from `fit`: a batch's coefficients are not kept but found anew in each pass, and it ends when a pass
        moves the parts by less than a thousandth of their length.

        Args:
            passes: One pass over the rows in batches of so many; the same rows on every call.
            n_rows: How many those are.
            config: How.
            sites: What the rows are.

        Raises:
            ShapeError: fewer rows than components.
            ActivationError: a row is NaN or infinite.
        """
        from sklearn.decomposition import MiniBatchNMF

        low: Tensor | None = None
        for rows in passes(BATCH_ROWS):
            check_rows(rows)
            least = rows.float().cpu().amin(0)
            low = least if low is None else torch.minimum(low, least)
        d_in = 0 if low is None else low.shape[0]
        d_sae = config.width(d_in)
        if low is None or n_rows < d_sae:
            raise ShapeError(f"nmf with {d_sae} components takes as many rows", n_rows, "Give it more.")
        made = cls(config, d_in, d_in, d_sae, sites)
        search = MiniBatchNMF(
            d_sae,
            batch_size=BATCH_ROWS,
            forget_factor=FORGET ** (min(BATCH_ROWS, n_rows) / n_rows),
            random_state=config.seed,
            init="random",
        )
        before = np.zeros((d_sae, d_in))
        made.converged.fill_(False)
        with track("nmf", config.max_iterations, "passes") as progress:
            for _ in range(config.max_iterations):
                for rows in passes(BATCH_ROWS):
                    search.partial_fit((rows.float().cpu() - low).clamp_min(0).numpy())
                moved = np.linalg.norm(search.components_ - before) / np.linalg.norm(search.components_)
                progress.note = f"moved {moved:.4g}"
                progress.advance()
                if moved < LEAST_CHANGE:
                    made.converged.fill_(True)
                    break
                before = search.components_.copy()
        return made._of(search.components_, low)

    def _of(self, components: Float[np.ndarray, "d_sae d"], low: Float[Tensor, " d"]) -> Self:
        """With these parts, each of norm 1."""
        parts = torch.from_numpy(components).float()
        self.W_dec.copy_(parts / parts.norm(dim=1, keepdim=True).clamp_min(1e-12))
        self.b_dec.copy_(low)
        return self.eval()

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """Coefficients of k components; nothing flows back through the search."""
        self.check_input(x)
        parts = []
        for rows in torch.split(x - self.b_dec, BLOCK_ROWS):
            acts = fista(rows, self.W_dec, 0.0, self.config.n_steps, True)
            broken = ~torch.isfinite(rows).all(
                1, keepdim=True
            )  # no search ends well there; silence would hide it
            acts = torch.where(broken, torch.nan, acts)
            parts.append(self.kept(acts, self.config.k, signed=False))
        return Encoded.cat(parts) if len(parts) != 1 else parts[0]
