"""Principal components as a dictionary: the linear baseline, with the k largest coefficients kept per row.

Fitted from one pass over raw activations (a streaming covariance), never trained. Knows no model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor

from sememe.dictionaries.base import ArchitectureConfig, Sites
from sememe.dictionaries.fitted import Fitted
from sememe.encoded import Encoded
from sememe.errors import ActivationError, ConfigError, ShapeError

__all__ = ["PCA", "Moments", "PCAConfig"]


class Moments:
    """Mean and covariance of a stream of rows, in float64, in memory d x d."""

    def __init__(self) -> None:
        self.n = 0
        self._shift: Tensor | None = None
        self._sum: Tensor
        self._products: Tensor

    def update(self, x: Float[Tensor, "rows d"]) -> None:
        """Add rows.

        Raises:
            ActivationError: a row is NaN or infinite.
        """
        if x.shape[0] == 0:
            return
        x = x.detach().to(torch.float64)
        finite = torch.isfinite(x).all(1)
        if not bool(finite.all()):
            bad = int(torch.nonzero(~finite)[0])
            raise ActivationError(
                "activations must be finite",
                f"NaN or infinity in row {self.n + bad}",
                "Harvest again in a wider dtype, or leave out the text it came from.",
            )
        if self._shift is None:
            self._shift = x[0].clone()
            self._sum = torch.zeros_like(self._shift)
            self._products = x.new_zeros(x.shape[1], x.shape[1])
        # About a row of the data rather than about zero: no cancellation at a large offset.
        x = x - self._shift
        self._sum += x.sum(0)
        self._products.addmm_(x.T, x)
        self.n += x.shape[0]

    def mean(self) -> Float[Tensor, " d"]:
        """Mean of the rows."""
        return self._seen() + self._sum / self.n

    def covariance(self) -> Float[Tensor, "d d"]:
        """Covariance of the rows, divided by their number."""
        self._seen()
        mean = self._sum / self.n
        return self._products / self.n - torch.outer(mean, mean)

    def _seen(self) -> Tensor:
        if self._shift is None:
            raise ShapeError("moments need at least one row", "none", "Give it activations.")
        return self._shift


class PCAConfig(ArchitectureConfig):
    """Options of the PCA baseline."""

    kind: Literal["pca"] = "pca"
    """Name of the baseline."""
    d_sae: int | None = None
    """Components, those of largest variance; all d_in if not given."""
    k: int | None = None
    """Components kept per row; all if not given."""
    keep: Literal["largest", "first"] = "largest"
    """largest: each row keeps its own k largest coefficients by absolute value. first: every row keeps the k
    components of largest variance (the classical rank-k reconstruction)."""

    def width(self, d_in: int) -> int:
        """The number of components: d_in if not given.

        Raises:
            ConfigError: d_sae is not in [1, d_in].
        """
        d_sae = d_in if self.d_sae is None else self.d_sae
        if not 1 <= d_sae <= d_in:
            raise ConfigError(f"d_sae must be in [1, d_in={d_in}] for pca", d_sae, "Lower d_sae.")
        return d_sae


@final
class PCA(Fitted):
    """`acts = top_k((x - mean) C^T)` by absolute value, `recon = acts C + mean`; C holds orthonormal rows.

    Acts are signed: one component stands for two half-lines, which flatters its l0 by up to two.

    Source: the "TopK-PCA" baseline of Cunningham et al. 2023, arXiv:2309.08600.
    """

    kind = "pca"
    signed = True
    config: PCAConfig

    def __init__(
        self, config: PCAConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        self.register_buffer("variance", torch.zeros(d_sae))
        self.variance: Tensor

    @classmethod
    def rebuild(cls, config: dict[str, Any], d_in: int, d_out: int, d_sae: int, sites: Sites | None) -> Self:
        """An empty dictionary of the given shape."""
        return cls(PCAConfig.build(config), d_in, d_out, d_sae, sites)

    @classmethod
    def fit(
        cls, rows: Iterable[Float[Tensor, "rows d"]], config: PCAConfig, sites: Sites | None = None
    ) -> Self:
        """The principal components of a stream of raw activations, in one pass."""
        moments = Moments()
        for batch in rows:
            moments.update(batch)
        return cls.from_moments(moments, config, sites)

    @classmethod
    def from_moments(cls, moments: Moments, config: PCAConfig, sites: Sites | None = None) -> Self:
        """The principal components of rows whose moments are known."""
        covariance = moments.covariance()
        d_in = covariance.shape[0]
        d_sae = config.width(d_in)
        values, vectors = torch.linalg.eigh(covariance)
        pca = cls(config, d_in, d_in, d_sae, sites)
        pca.W_dec.copy_(vectors.flip(1).T[:d_sae])
        pca.variance.copy_(values.flip(0)[:d_sae].clamp_min(0))
        pca.b_dec.copy_(moments.mean())
        return pca.eval().to(covariance.device)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """Signed coefficients of k components."""
        self.check_input(x)
        acts = (x - self.b_dec) @ self.W_dec.T
        k = self.config.k or self.d_sae
        if self.config.keep == "first" or k == self.d_sae:
            indices = torch.arange(k, dtype=torch.int32, device=x.device).expand(x.shape[0], k)
            return Encoded.from_topk(acts[:, :k], indices, self.d_sae)
        indices = acts.abs().topk(k, dim=1, sorted=False).indices
        return Encoded.from_topk(acts.gather(1, indices), indices.to(torch.int32), self.d_sae)

    def encoder_directions(self) -> Float[Tensor, "d_sae d_in"]:
        """The components."""
        return self.W_dec

    def fold(self) -> PCA:
        """The same components about the raw mean. The two scales are one: inputs are outputs."""
        folded = copy.deepcopy(self)
        folded.b_dec.div_(self.scale_in)
        folded.variance.div_(self.scale_in**2)
        folded.scale_in.fill_(1.0)
        folded.scale_out.fill_(1.0)
        return folded
