"""Independent components as a dictionary: a linear baseline, with the k largest coefficients kept per row.

Fitted by scikit-learn's FastICA on rows in memory, never trained. Knows no model.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, Self, final

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from sememe.dictionaries.base import ArchitectureConfig, Sites
from sememe.dictionaries.fitted import Fitted, check_rows
from sememe.encoded import Encoded
from sememe.errors import ConfigError, ShapeError

__all__ = ["ICA", "ICAConfig"]


class ICAConfig(ArchitectureConfig):
    """Options of the ICA baseline."""

    kind: Literal["ica"] = "ica"
    """Name of the baseline."""
    d_sae: int | None = None
    """Components; all d_in if not given."""
    k: int | None = None
    """Components kept per row; all if not given."""
    max_iterations: int = Field(default=200, ge=1)
    """Of FastICA."""
    tolerance: float = Field(default=1e-3, gt=0)
    """Change of the components at which it stops."""
    seed: int = Field(default=0, ge=0)
    """Of its start."""

    def width(self, d_in: int) -> int:
        """The number of components: d_in if not given.

        Raises:
            ConfigError: d_sae is not in [1, d_in].
        """
        d_sae = d_in if self.d_sae is None else self.d_sae
        if not 1 <= d_sae <= d_in:
            raise ConfigError(f"d_sae must be in [1, d_in={d_in}] for ica", d_sae, "Lower d_sae.")
        return d_sae


@final
class ICA(Fitted):
    """`acts = top_k((x - mean) A)` by absolute value, `recon = acts S + mean`; rows of S have norm 1.

    A, the analysis matrix, tells what a component reads; S, the synthesis matrix (the mixing matrix's columns), what it
    writes. They are not each other's transpose: taking A for the dictionary is a known mistake. Acts are signed.

    Source: the ICA baseline of Cunningham et al. 2023, arXiv:2309.08600; FastICA: Hyvärinen & Oja 2000.
    """

    kind = "ica"
    signed = True
    config: ICAConfig

    def __init__(
        self, config: ICAConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        self.register_buffer("W_enc", torch.zeros(d_in, d_sae))
        self.W_enc: Tensor
        self.register_buffer("converged", torch.tensor(True))
        self.converged: Tensor

    @classmethod
    def rebuild(cls, config: dict[str, Any], d_in: int, d_out: int, d_sae: int, sites: Sites | None) -> Self:
        """An empty dictionary of the given shape."""
        return cls(ICAConfig.build(config), d_in, d_out, d_sae, sites)

    @classmethod
    def fit(cls, x: Float[Tensor, "rows d"], config: ICAConfig, sites: Sites | None = None) -> Self:
        """The independent components of raw activations; `converged` says whether FastICA came to rest.

        Raises:
            ShapeError: fewer rows than twice the components, or more components than dimensions in which rows vary.
            ActivationError: a row is NaN or infinite.
        """
        from sklearn.decomposition import FastICA
        from sklearn.exceptions import ConvergenceWarning

        d_sae = config.width(x.shape[1])
        if x.shape[0] < 2 * d_sae:
            raise ShapeError(
                f"ica with {d_sae} components takes at least {2 * d_sae} rows", x.shape[0], "Give it more."
            )
        check_rows(x)
        centred = x.double().cpu() - x.double().cpu().mean(0)
        values = torch.linalg.eigvalsh(centred.T @ centred)
        rank = int((values > 1e-10 * values[-1]).sum())
        if config.d_sae is None and 2 <= rank < d_sae:
            d_sae = rank  # e.g. a dead dimension, or rows that sum to 0
            config = config.replace(d_sae=rank, k=None if config.k is None else min(config.k, rank))
        if d_sae > rank:
            raise ShapeError(
                f"ica must have at most as many components as the dimensions in which rows vary, {rank}",
                d_sae,
                "Lower d_sae.",
            )
        made = cls(config, x.shape[1], x.shape[1], d_sae, sites)
        search = FastICA(
            d_sae,
            whiten="unit-variance",
            max_iter=config.max_iterations,
            tol=config.tolerance,
            random_state=config.seed,
        )
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            search.fit(x.double().cpu().numpy())
        # others are about directions without variance, which come after the components
        made.converged.fill_(not any(issubclass(warning.category, ConvergenceWarning) for warning in warned))
        lengths = np.linalg.norm(search.mixing_, axis=0)
        made.W_dec.copy_(torch.from_numpy(search.mixing_.T / lengths[:, None]))
        made.W_enc.copy_(torch.from_numpy(search.components_.T * lengths))
        made.b_dec.copy_(torch.from_numpy(search.mean_))
        return made.eval().to(x.device)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """Signed coefficients of k components."""
        self.check_input(x)
        return self.kept((x - self.b_dec) @ self.W_enc, self.config.k or self.d_sae, signed=True)
