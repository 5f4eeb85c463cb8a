"""Reconstruction ICA: directions along which rows are sparse, as many as wanted, with a soft reconstruction.

Fitted by gradient descent on rows in memory or as they stream by, never trained as a `Trainable`. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
        x = x.float()
        mean = x.mean(0)
        scale = float((x - mean).square().mean().sqrt())
        generator = torch.Generator().manual_seed(config.seed)
        torch.randn(config.width(x.shape[1]), x.shape[1], generator=generator)  # the start's numbers

        def picked() -> Iterator[Tensor]:
            while True:
                yield x[torch.randint(x.shape[0], (config.batch_size,), generator=generator).to(x.device)]

        return cls._searched(picked(), mean, scale, config, sites)

    @classmethod
    def fit_stream(
        cls,
        passes: Callable[[int], Iterator[Float[Tensor, "rows d"]]],
        config: RICAConfig,
        sites: Sites | None = None,
    ) -> Self:
        """Find directions for rows of which only a batch is held at a time: passes over them, until n_steps are done.

        Args:
            passes: One pass over the rows in batches of so many; the same rows on every call.
            config: How.
            sites: What the rows are.

        Raises:
            ActivationError: a row is NaN or infinite.
        """
        n, total, squares = 0, torch.zeros(()), torch.zeros(())
        for rows in passes(config.batch_size):
            check_rows(rows)
            x = rows.double()
            n, total, squares = n + x.shape[0], total + x.sum(0), squares + x.square().sum(0)
        mean = total / n
        scale = float((squares / n - mean.square()).mean().clamp_min(0).sqrt())

        def again() -> Iterator[Tensor]:
            while True:
                yield from passes(config.batch_size)

        return cls._searched(again(), mean.float(), scale, config, sites)

    @classmethod
    def _searched(
        cls,
        batches: Iterator[Float[Tensor, "rows d"]],
        mean: Float[Tensor, " d"],
        scale: float,
        config: RICAConfig,
        sites: Sites | None,
    ) -> Self:
        d, device = mean.shape[0], mean.device
        d_sae = config.width(d)
        made = cls(config, d, d, d_sae, sites).to(device)
        made.b_dec.copy_(mean)
        generator = torch.Generator().manual_seed(config.seed)
        start = torch.randn(d_sae, d, generator=generator).to(device)
        with torch.enable_grad():
            size = (d / d_sae) ** 0.5  # at which directions that lie evenly give a row back
            W = (start / start.norm(dim=1, keepdim=True) * min(1.0, size)).requires_grad_()
            search = torch.optim.Adam([W], lr=config.lr)
            with track("rica", config.n_steps, "steps") as progress:
                for step in range(config.n_steps):
                    batch = (next(batches).float() - mean) / max(scale, 1e-12)
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
