"""Random unit directions as a dictionary: what an overcomplete basis reconstructs without having learned.

Knows the mean of the activations and nothing else about them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor

from sememe import kernels, metrics
from sememe.dictionaries.base import ArchitectureConfig, Sites
from sememe.dictionaries.fitted import Fitted
from sememe.encoded import Encoded
from sememe.errors import ShapeError

__all__ = ["RandomDirections", "RandomDirectionsConfig"]


STREAM = 0x6261736C
"""Of its directions' random numbers: no null's, and no training's."""


class RandomDirectionsConfig(ArchitectureConfig):
    """Options of the random-directions baseline."""

    kind: Literal["random_directions"] = "random_directions"
    """Name of the baseline."""
    k: int = 32
    """Directions kept per row."""
    signed: bool = False
    """Keep the largest projections by absolute value; else only positive ones, as a TopK dictionary does."""
    seed: int = 0
    """Of the directions."""


@final
class RandomDirections(Fitted):
    """`acts = top_k((x - mean) D^T)`, `recon = acts D + mean`; the rows of D are uniform on the sphere."""

    kind = "random_directions"
    config: RandomDirectionsConfig

    def __init__(
        self, config: RandomDirectionsConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        self.signed = config.signed

    @classmethod
    def rebuild(cls, config: dict[str, Any], d_in: int, d_out: int, d_sae: int, sites: Sites | None) -> Self:
        """An empty dictionary of the given shape."""
        return cls(RandomDirectionsConfig.build(config), d_in, d_out, d_sae, sites)

    @classmethod
    def fit(
        cls,
        rows: Iterable[Float[Tensor, "rows d"]],
        config: RandomDirectionsConfig,
        sites: Sites | None = None,
    ) -> Self:
        """Directions from the seed, and the mean of a stream of raw activations."""
        total, n = torch.zeros(()), 0
        for batch in rows:
            total = total + batch.detach().to(torch.float64).sum(0)
            n += batch.shape[0]
        if n == 0:
            raise ShapeError("a mean needs at least one row", "none", "Give it activations.")
        return cls.from_mean(total / n, config, sites)

    @classmethod
    def from_mean(
        cls, mean: Float[Tensor, " d"], config: RandomDirectionsConfig, sites: Sites | None = None
    ) -> Self:
        """Directions from the seed about a known mean."""
        d_in = mean.shape[0]
        self = cls(config, d_in, d_in, config.width(d_in), sites)
        self.W_dec.copy_(metrics.unit_rows(metrics.random_rows(self.d_sae, d_in, config.seed, STREAM)))
        self.b_dec.copy_(mean)
        return self.eval().to(mean.device)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """The k largest projections of each row."""
        self.check_input(x)
        if not self.config.signed:
            zeros = self.W_dec.new_zeros(self.d_sae)
            acts, indices = kernels.encode_topk(x, self.W_dec.T, zeros, self.b_dec, self.config.k)
            return Encoded.from_topk(acts, indices, self.d_sae)
        projections = (x - self.b_dec) @ self.W_dec.T
        indices = projections.abs().topk(self.config.k, dim=1, sorted=False).indices
        return Encoded.from_topk(projections.gather(1, indices), indices.to(torch.int32), self.d_sae)

    def encoder_directions(self) -> Float[Tensor, "d_sae d_in"]:
        """The directions."""
        return self.W_dec

    def fold(self) -> RandomDirections:
        """The same directions about the raw mean. The two scales are one: inputs are outputs."""
        folded = copy.deepcopy(self)
        folded.b_dec.div_(self.scale_in)
        folded.scale_in.fill_(1.0)
        folded.scale_out.fill_(1.0)
        return folded
