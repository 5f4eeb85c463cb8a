"""A stack of MLPs that computes more features than any layer has neurons: one layer each, or shared?

A residual stream of width d carries n sparse inputs in [-1, 1]; MLPs of a few neurons each have to write their
absolute values. Which layer computes which feature is read from ablations.

Source: the computation is that of Elhage et al. 2022, arXiv:2209.10652 (computation in superposition); the stack
is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from sememe.config import Config
from sememe.progress import track
from sememe.toy.stream import numbers

__all__ = ["Layered", "LayeredConfig", "layered"]


class LayeredConfig(Config):
    """The stack and its training."""

    n_features: int = Field(default=40, ge=2)
    """Inputs, and absolute values wanted."""
    d: int = Field(default=40, ge=1)
    """Width of the residual stream."""
    n_layers: int = Field(default=3, ge=1)
    """MLPs, one after the other."""
    width: int = Field(default=20, ge=1)
    """Neurons of each."""
    density: float = Field(default=0.05, gt=0, le=1)
    """How often an input is active."""
    n_steps: int = Field(default=5000, ge=1)
    """Steps of Adam."""
    batch_size: int = Field(default=1024, ge=1)
    """Rows per step."""
    lr: float = Field(default=3e-3, gt=0)
    """Learning rate; falls to 0 along a cosine."""
    seed: int = Field(default=0, ge=0)
    """Of weights and rows."""


class Layered(NamedTuple):
    """Who computes what."""

    shares: Float[Tensor, "n_features n_layers"]
    """By how much a feature's error grows when a layer writes its mean instead: shares of the sum over layers. NaN for
    features that the stack did not learn to compute (fvu above 0.9)."""
    effective_layers: Float[Tensor, " n_features"]
    """1 / sum of squared shares: 1 where one layer computes a feature, n_layers where all do equally."""
    fvu: Float[Tensor, " n_features"]
    """Each feature's error over its variance."""


class _Stack(nn.Module):
    def __init__(self, config: LayeredConfig, generator: torch.Generator) -> None:
        super().__init__()
        n, d, width = config.n_features, config.d, config.width

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) / shape[-2] ** 0.5)

        self.embed, self.unembed = weights(n, d), weights(d, n)
        self.read, self.write = weights(config.n_layers, d, width), weights(config.n_layers, width, d)
        self.bias, self.last_bias = (
            nn.Parameter(torch.zeros(config.n_layers, width)),
            nn.Parameter(torch.zeros(n)),
        )

    def forward(self, x: Tensor, without: int | None = None) -> Tensor:
        residual = x @ self.embed
        for layer, (read, write, bias) in enumerate(zip(self.read, self.write, self.bias, strict=True)):
            written = torch.relu(residual @ read + bias) @ write
            residual = residual + (written.mean(0) if layer == without else written)
        return residual @ self.unembed + self.last_bias


def _rows(config: LayeredConfig, n: int, generator: torch.Generator) -> Tensor:
    shape = (n, config.n_features)
    active = torch.rand(shape, generator=generator) < config.density
    return torch.where(active, 2 * torch.rand(shape, generator=generator) - 1, 0.0)


N_TEST_ROWS = 16_384
UNLEARNED = 0.9


def layered(config: LayeredConfig) -> Layered:
    """Train the stack, and ask which layer computes which feature."""
    generator = numbers("layered", config.seed)
    stack = _Stack(config, generator)
    optimiser = torch.optim.Adam(stack.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.n_steps)
    with track("layers", config.n_steps, "steps") as progress:
        for _ in range(config.n_steps):
            x = _rows(config, config.batch_size, generator)
            optimiser.zero_grad()
            (stack(x) - x.abs()).square().mean().backward()
            optimiser.step()
            schedule.step()
            progress.advance()
    with torch.no_grad():
        x = _rows(config, N_TEST_ROWS, generator)
        target = x.abs()
        error = (stack(x) - target).square().mean(0)
        growth = torch.stack(
            [(stack(x, layer) - target).square().mean(0) - error for layer in range(config.n_layers)], dim=1
        ).clamp_min(0)
        fvu = error / target.var(0, correction=0)
        shares = growth / growth.sum(1, keepdim=True)
        shares[fvu > UNLEARNED] = torch.nan
        return Layered(shares, 1 / shares.square().sum(1), fvu)
