"""The neuron basis as a dictionary: each dimension of the activations is a latent. Knows no model.

With no k it is the identity, which reconstructs perfectly and explains nothing: the control for every metric
that a good reconstruction alone would satisfy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal, Self, final

import torch
from jaxtyping import Float
from torch import Tensor

from sememe.dictionaries.base import ArchitectureConfig, Dictionary, Sites
from sememe.encoded import Encoded
from sememe.errors import ConfigError, ShapeError

__all__ = ["Identity", "IdentityConfig"]


class IdentityConfig(ArchitectureConfig):
    """Options of the neuron-basis baseline."""

    kind: Literal["identity"] = "identity"
    """Name of the baseline."""
    d_sae: int | None = None
    """Number of latents; it is d_in, and may be left out."""
    k: int | None = None
    """Dimensions kept per row, those furthest from their mean; all, uncentred, if not given."""
    signed: bool = True
    """Keep negative entries too; else they become 0, as after a ReLU."""

    def width(self, d_in: int) -> int:
        """d_in.

        Raises:
            ConfigError: d_sae is something else.
        """
        if self.d_sae not in (None, d_in):
            raise ConfigError(f"d_sae must be d_in={d_in} for identity", self.d_sae, "Leave d_sae out.")
        return d_in


@final
class Identity(Dictionary):
    """`acts = x` and `recon = acts`; with k, the k entries of `x - mean` largest by absolute value."""

    kind = "identity"
    config: IdentityConfig

    def __init__(
        self, config: IdentityConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        if d_in != d_out or d_in != d_sae:
            raise ShapeError(
                "identity needs d_in = d_out = d_sae",
                f"{d_in}, {d_out}, {d_sae}",
                "Use an autoencoder's site.",
            )
        if config.k is not None and not 1 <= config.k <= d_sae:
            raise ConfigError(f"k must be in [1, d_sae={d_sae}]", config.k, "Lower k.")
        self.signed = config.signed
        self.register_buffer("b_dec", torch.zeros(d_out))
        self.b_dec: Tensor

    @classmethod
    def rebuild(cls, config: dict[str, Any], d_in: int, d_out: int, d_sae: int, sites: Sites | None) -> Self:
        """An empty dictionary of the given shape."""
        return cls(IdentityConfig.build(config), d_in, d_out, d_sae, sites)

    @classmethod
    def fit(
        cls, rows: Iterable[Float[Tensor, "rows d"]], config: IdentityConfig, sites: Sites | None = None
    ) -> Self:
        """Only the mean of the raw activations is learned."""
        total, n = torch.zeros(()), 0
        for batch in rows:
            total = total + batch.detach().to(torch.float64).sum(0)
            n += batch.shape[0]
        if n == 0:
            raise ShapeError("a mean needs at least one row", "none", "Give it activations.")
        return cls.from_mean(total / n, config, sites)

    @classmethod
    def from_mean(cls, mean: Float[Tensor, " d"], config: IdentityConfig, sites: Sites | None = None) -> Self:
        """The neuron basis about a known mean, which only counts with k."""
        d_in = mean.shape[0]
        self = cls(config, d_in, d_in, config.width(d_in), sites)
        if config.k is not None:
            self.b_dec.copy_(mean)
        return self.eval().to(mean.device)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """The entries of each row."""
        self.check_input(x)
        acts = x - self.b_dec
        if not self.config.signed:
            acts = torch.relu(acts)
        if self.config.k is None:
            indices = torch.arange(self.d_in, dtype=torch.int32, device=x.device).expand(x.shape)
            return Encoded.from_topk(acts, indices, self.d_sae)
        kept = acts.abs().topk(self.config.k, dim=1, sorted=False).indices
        return Encoded.from_topk(acts.gather(1, kept), kept.to(torch.int32), self.d_sae)

    def decode(
        self, encoded: Encoded, x: Float[Tensor, "batch d_in"] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """The entries back in their places, plus the mean."""
        return encoded.to_dense() + self.b_dec

    def decoder_directions(self) -> Float[Tensor, "d_sae d_out"]:
        """The unit vectors."""
        return torch.eye(self.d_in, device=self.b_dec.device)

    def encoder_directions(self) -> Float[Tensor, "d_sae d_in"]:
        """The unit vectors."""
        return self.decoder_directions()

    def fold(self) -> Identity:
        """The same basis about the raw mean. The two scales are one: inputs are outputs."""
        folded = copy.deepcopy(self)
        folded.b_dec.div_(self.scale_in)
        folded.scale_in.fill_(1.0)
        folded.scale_out.fill_(1.0)
        return folded
