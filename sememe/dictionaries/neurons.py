"""The neuron basis as a dictionary with a ReLU: each dimension, or each and its opposite, behind a random threshold."""

from __future__ import annotations

from typing import Any, Literal, Self, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from sememe.dictionaries.base import ArchitectureConfig, Sites
from sememe.dictionaries.fitted import Fitted
from sememe.encoded import Encoded
from sememe.errors import ConfigError

__all__ = ["Neurons", "NeuronsConfig"]


class NeuronsConfig(ArchitectureConfig):
    """Options of the neuron basis with a ReLU."""

    kind: Literal["neurons"] = "neurons"
    """Name of the baseline."""
    d_sae: int | None = None
    """Number of latents; it is d_in, or twice that with both signs, and may be left out."""
    both_signs: bool = True
    """A latent for each dimension and one for its opposite; else for each dimension alone."""
    bias_scale: float = Field(default=1.0, ge=0)
    """Biases are drawn from a normal distribution times this and times the root mean square of an entry."""
    k: int | None = None
    """Latents kept per row, the largest; all that are positive if not given."""
    seed: int = Field(default=0, ge=0)
    """Of the biases."""

    def width(self, d_in: int) -> int:
        """d_in, or twice that.

        Raises:
            ConfigError: d_sae is something else.
        """
        d_sae = 2 * d_in if self.both_signs else d_in
        if self.d_sae not in (None, d_sae):
            raise ConfigError(f"d_sae must be {d_sae} for neurons", self.d_sae, "Leave d_sae out.")
        return d_sae


@final
class Neurons(Fitted):
    """`acts = top_k(relu((x - mean) [I, -I] + b))`, `recon = acts [I; -I] + mean`, b random.

    Source: the neuron-basis baseline of Cunningham et al. 2023, arXiv:2309.08600 (identity, +-identity, a random
    encoder bias scaled by the activations' norm, ReLU).
    """

    kind = "neurons"
    config: NeuronsConfig

    def __init__(
        self, config: NeuronsConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        eye = torch.eye(d_out)
        self.W_dec.copy_(torch.cat([eye, -eye]) if config.both_signs else eye)
        self.register_buffer("b_enc", torch.zeros(d_sae))
        self.b_enc: Tensor

    @classmethod
    def rebuild(cls, config: dict[str, Any], d_in: int, d_out: int, d_sae: int, sites: Sites | None) -> Self:
        """A dictionary of the given shape without biases."""
        return cls(NeuronsConfig.build(config), d_in, d_out, d_sae, sites)

    @classmethod
    def fit(cls, x: Float[Tensor, "rows d"], config: NeuronsConfig, sites: Sites | None = None) -> Self:
        """About the rows' mean, with biases of their size."""
        d = x.shape[1]
        made = cls(config, d, d, config.width(d), sites)
        mean = x.float().mean(0).cpu()
        size = (x.float().cpu() - mean).square().mean().sqrt()
        drawn = torch.randn(made.d_sae, generator=torch.Generator().manual_seed(config.seed))
        made.b_enc.copy_(drawn * config.bias_scale * size)
        made.b_dec.copy_(mean)
        return made.eval().to(x.device)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """What is above the thresholds."""
        self.check_input(x)
        centred = x - self.b_dec
        pre_acts = torch.cat([centred, -centred], 1) if self.config.both_signs else centred
        return self.kept((pre_acts + self.b_enc).relu(), self.config.k, signed=False)
