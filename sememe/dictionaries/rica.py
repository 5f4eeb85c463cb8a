"""Reconstruction ICA: directions along which rows are sparse, as many as wanted, with a soft reconstruction.

Fitted by gradient descent on rows in memory, never trained as a `Trainable`. Knows no model.
"""

from __future__ import annotations

from typing import Any, Literal, Self, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from sememe.dictionaries.base import ArchitectureConfig, Sites
from sememe.dictionaries.fitted import Fitted, check_rows
from sememe.encoded import Encoded
from sememe.progress import track

__all__ = ["RICA", "RICAConfig"]


class RICAConfig(ArchitectureConfig):
    """Options of reconstruction ICA."""

    kind: Literal["rica"] = "rica"
    """Name of the baseline."""
    k: int | None = None
    """Latents kept per row, those furthest from 0; all if not given."""
    sparsity: float = Field(default=0.3, ge=0)
    """Weight of the mean log cosh of coefficients against the mean squared error, of rows scaled to unit variance."""
    n_steps: int = Field(default=2000, ge=1)
    """Steps of Adam."""
    batch_size: int = Field(default=2048, ge=1)
    """Rows per step."""
    lr: float = Field(default=1e-2, gt=0)
    """Its learning rate, which falls to 0."""
    seed: int = Field(default=0, ge=0)
    """Of the start and of the batches."""


@final
class RICA(Fitted):
    """`acts = top_k((x - mean) W^T)` by absolute value, `recon = acts W + mean`; acts are signed.

    W minimises `|x - x W^T W|^2 + sparsity * sum log cosh(x W^T)`: ICA whose orthogonality is softened to a
    reconstruction, so that there may be more directions than dimensions.

    Source: Le, Karpenko, Ngiam & Ng 2011. Differs: not whitened but centred and scaled by one number; Adam instead of
    L-BFGS.
    """

    kind = "rica"
    config: RICAConfig

    signed = True

    @classmethod
    def rebuild(cls, config: dict[str, Any], d_in: int, d_out: int, d_sae: int, sites: Sites | None) -> Self:
        """An empty dictionary of the given shape."""
        return cls(RICAConfig.build(config), d_in, d_out, d_sae, sites)

    @classmethod
    def fit(cls, x: Float[Tensor, "rows d"], config: RICAConfig, sites: Sites | None = None) -> Self:
        """Find directions for raw activations.

        Raises:
            ActivationError: a row is NaN or infinite.
        """
        check_rows(x)
        d_sae = config.width(x.shape[1])
        made = cls(config, x.shape[1], x.shape[1], d_sae, sites).to(x.device)
        made.b_dec.copy_(x.float().mean(0))
        rows = x.float() - made.b_dec
        rows = rows / rows.square().mean().sqrt().clamp_min(1e-12)
        generator = torch.Generator().manual_seed(config.seed)
        start = torch.randn(d_sae, x.shape[1], generator=generator).to(x.device)
        with torch.enable_grad():
            size = (x.shape[1] / d_sae) ** 0.5  # at which directions that lie evenly give a row back
            W = (start / start.norm(dim=1, keepdim=True) * min(1.0, size)).requires_grad_()
            search = torch.optim.Adam([W], lr=config.lr)
            with track("rica", config.n_steps, "steps") as progress:
                for step in range(config.n_steps):
                    picked = torch.randint(rows.shape[0], (config.batch_size,), generator=generator)
                    batch = rows[picked.to(x.device)]
                    acts = batch @ W.T
                    error = (batch - acts @ W).square().mean()
                    # log cosh without overflow
                    spread = (acts.abs() + torch.nn.functional.softplus(-2 * acts.abs())).mean()
                    search.param_groups[0]["lr"] = config.lr * (1 - step / config.n_steps)
                    search.zero_grad()
                    (error + config.sparsity * spread).backward()
                    search.step()
                    progress.advance()
        made.W_dec.copy_(W.detach())
        return made.eval()

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Encoded:
        """Signed coefficients of k directions."""
        self.check_input(x)
        return self.kept((x - self.b_dec) @ self.W_dec.T, self.config.k, signed=True)

    def encoder_directions(self) -> Float[Tensor, "d_sae d_in"]:
        """What each reads: the same."""
        return self.W_dec
