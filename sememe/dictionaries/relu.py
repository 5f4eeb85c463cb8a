"""ReLU autoencoders and transcoders with an L1 penalty and a unit-norm decoder."""

from __future__ import annotations

from typing import Any, Literal, Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sememe import kernels
from sememe.dictionaries.base import (
    ArchitectureConfig,
    Constraints,
    Loss,
    Resampling,
    Sites,
    Trainable,
)
from sememe.dictionaries.initial import geometric_median, latent_major, unit_rows
from sememe.encoded import Encoded

__all__ = ["ReLU", "ReLUConfig"]


class ReLUConfig(ArchitectureConfig):
    """Options of a ReLU dictionary."""

    kind: Literal["relu"] = "relu"
    """Name of the architecture."""
    l1_coefficient: float = 1e-3
    """Weight of the mean over rows of the sum of activations, against the mean squared error per dimension."""
    resample_at: tuple[float, ...] = (0.25, 0.5, 0.75)
    """When latents that have not fired lately are pointed at badly reconstructed rows, as shares of the run."""
    resample_after_tokens: int = 100_000
    """A latent that has not fired for this many training rows is resampled."""
    rewarmup_steps: int = 100
    """Steps over which the learning rate climbs back after each resampling."""


@final
class ReLU(Trainable):
    """`acts = relu((x - b_pre) W_enc + b_enc)`, `recon = acts W_dec + b_dec`, rows of W_dec of norm 1.

    Source: Bricken et al. 2023 (Towards Monosemanticity), appendix; Marks & Mueller's dictionaries. Differs:
    b_pre is set once from the sample and kept, instead of tied to b_dec (b_enc can learn whatever it would).
    """

    kind = "relu"
    config: ReLUConfig

    def __init__(
        self, config: ReLUConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        self.W_enc = nn.Parameter(latent_major(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.register_buffer("b_pre", torch.zeros(d_in))
        self.b_pre: Tensor

    @classmethod
    def rebuild(cls, config: dict[str, Any], d_in: int, d_out: int, d_sae: int, sites: Sites | None) -> Self:
        """An empty dictionary of the given shape."""
        return cls(ReLUConfig.build(config), d_in, d_out, d_sae, sites)

    def _dense(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        self.check_input(x)
        return torch.relu(torch.addmm(self.b_enc, x - self.b_pre, self.W_enc))

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """Every positive pre-activation."""
        return Encoded.from_dense(self._dense(x))

    def decode(
        self, encoded: Encoded, x: Float[Tensor, "batch d_in"] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """The weighted sum of decoder rows, plus the bias."""
        return kernels.decode_encoded(encoded, self.W_dec, self.b_dec)

    def decoder_directions(self) -> Float[Tensor, "d_sae d_out"]:
        """Rows of W_dec."""
        return self.W_dec

    def fold(self) -> ReLU:
        """Exact: the map is homogeneous, so only biases and the decoder change."""
        folded = self._copy_with_scales_one()
        s_in, s_out = float(self.scale_in), float(self.scale_out)
        with torch.no_grad():
            folded.b_pre.div_(s_in)
            folded.b_enc.div_(s_in)
            folded.W_dec.mul_(s_in / s_out)
            folded.b_dec.div_(s_out)
        return folded

    # -- training ----------------------------------------------------------------------------------

    def initialise(
        self, x: Float[Tensor, "rows d_in"], target: Float[Tensor, "rows d_out"], generator: torch.Generator
    ) -> None:
        """Random unit decoder rows; for an autoencoder the encoder starts as their transpose."""
        with torch.no_grad():
            self.W_dec.copy_(unit_rows(self.d_sae, self.d_out, generator))
            tied = self.d_in == self.d_out
            self.W_enc.copy_((self.W_dec if tied else unit_rows(self.d_sae, self.d_in, generator)).T)
            self.b_enc.zero_()
            self.b_pre.copy_(geometric_median(x))
            self.b_dec.copy_(geometric_median(target))

    def loss(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], progress: float
    ) -> Loss:
        """`mean (target - recon)^2 + l1_coefficient * mean_rows sum_i acts_i` (catalogue's convention)."""
        acts = self._dense(x)
        recon = torch.addmm(self.b_dec, acts, self.W_dec)
        mse = (target - recon).square().mean()
        l1 = acts.sum(1).mean()
        total = mse + self.config.l1_coefficient * l1
        return Loss(total, {"mse": mse.detach(), "l1": l1.detach()}, Encoded.from_dense(acts.detach()))

    def reset_latents(self, ids: Int[Tensor, " n"], directions: Float[Tensor, "n d_out"]) -> None:
        """Decoder row: the unit direction. Encoder column: the same at 0.2 of the mean live norm. Bias: 0.

        Source: Bricken et al. 2023, appendix "Neuron Resampling".
        """
        with torch.no_grad():
            units = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
            self.W_dec[ids] = units
            norms = self.W_enc.norm(dim=0)
            alive = torch.ones(self.d_sae, dtype=torch.bool, device=norms.device)
            alive[ids] = False
            length = norms[alive].mean() if bool(alive.any()) else norms.new_ones(())
            if self.d_in == self.d_out:
                self.W_enc[:, ids] = (units * 0.2 * length).T
            self.b_enc[ids] = 0.0
            self.tokens_since_fired[ids] = 0

    def constraints(self) -> Constraints:
        """Decoder rows keep norm 1."""
        return Constraints(unit_norm=("W_dec",))

    def resampling(self) -> Resampling:
        """As its config says."""
        return Resampling(
            self.config.resample_at, self.config.resample_after_tokens, self.config.rewarmup_steps
        )
