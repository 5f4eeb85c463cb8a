"""TopK autoencoders and transcoders: the k largest latents of each row, and no penalty."""

from __future__ import annotations

from typing import Any, Literal, Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sememe import kernels
from sememe.dictionaries.base import ArchitectureConfig, Constraints, Loss, Sites, Trainable
from sememe.dictionaries.initial import geometric_median, latent_major, unit_rows
from sememe.encoded import Encoded
from sememe.errors import ConfigError

__all__ = ["TopK", "TopKConfig"]


class TopKConfig(ArchitectureConfig):
    """Options of a TopK dictionary."""

    kind: Literal["topk"] = "topk"
    """Name of the architecture."""
    k: int = 32
    """Latents kept per row."""
    b_dec_init: Literal["geometric_median", "mean"] = "geometric_median"
    """Where the decoder bias starts: the sample's geometric median (robust) or its mean."""
    auxk_coefficient: float = 1 / 32
    """Weight of the auxiliary loss by which dead latents model the residual; 0 turns it off."""
    auxk: int | None = None
    """Dead latents used per row in the auxiliary loss; d_in / 2 if not given."""
    dead_after_tokens: int = 10_000_000
    """A latent that has not been kept for this many training rows counts as dead."""


@final
class TopK(Trainable):
    """`acts = top_k(relu((x - b_pre) W_enc + b_enc))`, `recon = acts W_dec + b_dec`.

    Source: Gao et al. 2024, arXiv:2406.04093, section 2 and appendix A. Differs: b_pre is set once from the
    sample and kept (b_enc can learn whatever it would); ties go to the lower index; the auxiliary loss
    divides by the residual's mean square, so that its weight does not depend on the scale.
    """

    kind = "topk"
    config: TopKConfig

    def __init__(
        self, config: TopKConfig, d_in: int, d_out: int, d_sae: int, sites: Sites | None = None
    ) -> None:
        super().__init__(config, d_in, d_out, d_sae, sites)
        if not 1 <= config.k <= d_sae:
            raise ConfigError(f"k must be in [1, d_sae={d_sae}]", config.k, "Lower k or raise d_sae.")
        self.W_enc = nn.Parameter(latent_major(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.register_buffer("b_pre", torch.zeros(d_in))
        self.b_pre: Tensor

    @classmethod
    def rebuild(cls, config: dict[str, Any], d_in: int, d_out: int, d_sae: int, sites: Sites | None) -> Self:
        """An empty dictionary of the given shape."""
        return cls(TopKConfig.build(config), d_in, d_out, d_sae, sites)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """The k largest positive pre-activations of each row; fewer if fewer are positive (then acts are 0)."""
        self.check_input(x)
        acts, indices = kernels.encode_topk(x, self.W_enc, self.b_enc, self.b_pre, self.config.k)
        return Encoded.from_topk(acts, indices, self.d_sae)

    def decode(
        self, encoded: Encoded, x: Float[Tensor, "batch d_in"] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """The weighted sum of decoder rows, plus the bias."""
        return kernels.decode_encoded(encoded, self.W_dec, self.b_dec)

    def decoder_directions(self) -> Float[Tensor, "d_sae d_out"]:
        """Rows of W_dec."""
        return self.W_dec

    def fold(self) -> TopK:
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
        centre = geometric_median if self.config.b_dec_init == "geometric_median" else _mean
        with torch.no_grad():
            self.W_dec.copy_(unit_rows(self.d_sae, self.d_out, generator))
            tied = self.d_in == self.d_out
            self.W_enc.copy_((self.W_dec if tied else unit_rows(self.d_sae, self.d_in, generator)).T)
            self.b_enc.zero_()
            self.b_pre.copy_(centre(x))
            self.b_dec.copy_(centre(target))

    def loss(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], progress: float
    ) -> Loss:
        """Mean squared error, and AuxK over dead latents (Gao et al. 2024, appendix A.2)."""
        encoded = self.encode(x)
        residual = target - self.decode(encoded)
        mse = residual.square().mean()
        terms = {"mse": mse}
        total = mse
        if self.config.auxk_coefficient > 0:
            dead = torch.nonzero(self.tokens_since_fired > self.config.dead_after_tokens).view(-1)
            if dead.numel() > 0:
                terms["auxk"] = self._auxk(x, residual.detach(), dead)
                total = total + self.config.auxk_coefficient * terms["auxk"]
        return Loss(total, {name: term.detach() for name, term in terms.items()}, encoded.detach())

    def _auxk(self, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        """How badly the strongest dead latents reconstruct what the live ones leave over, in [0, 1] or so."""
        k = min(self.config.auxk or max(self.d_in // 2, 1), dead.numel())
        pre_acts = (x - self.b_pre) @ self.W_enc[:, dead] + self.b_enc[dead]
        values, columns = pre_acts.topk(k, dim=1, sorted=False)
        sparse = torch.zeros_like(pre_acts).scatter(1, columns, torch.relu(values))
        recon = sparse @ self.W_dec[dead]
        return (residual - recon).square().mean() / residual.square().mean().clamp_min(1e-12)

    def reset_latents(self, ids: Int[Tensor, " n"], directions: Float[Tensor, "n d_out"]) -> None:
        """Unit decoder rows along the directions; the encoder reads the same direction, at its usual length."""
        with torch.no_grad():
            units = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
            self.W_dec[ids] = units
            if self.d_in == self.d_out:
                self.W_enc[:, ids] = (units * self.W_enc.norm(dim=0).median()).T
            self.b_enc[ids] = 0.0
            self.tokens_since_fired[ids] = 0

    def constraints(self) -> Constraints:
        """Decoder rows keep norm 1."""
        return Constraints(unit_norm=("W_dec",))


def _mean(x: Tensor) -> Tensor:
    return x.mean(0)
