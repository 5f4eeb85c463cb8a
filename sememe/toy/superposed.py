"""Toy models of superposition: networks that carry n sparse features in d < n dimensions.

Many are trained side by side, one for each width and density, and what each carries is measured. The hidden
activations of one are a stream for a trainer, and its columns the truth to compare with.

Source: Elhage et al. 2022, "Toy Models of Superposition", arXiv:2209.10652, sections 2 to 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from sememe.config import Config
from sememe.encoded import Encoded
from sememe.errors import ConfigError
from sememe.progress import track
from sememe.toy.stream import PlantedBatch, Stream, numbers

__all__ = ["Superposed", "SuperposedConfig", "SuperposedSource", "Superposition", "superpose"]

LEAST_NORM = 0.5
"""A feature counts as carried if its column is at least this long."""


class SuperposedConfig(Config):
    """Networks `x_hat = relu(x W^T W + b)` and how they are trained: one for each width and density."""

    n_features: int = Field(default=80, ge=2)
    """Features of x."""
    widths: tuple[int, ...] = Field(default=(5, 10, 20, 40), min_length=1)
    """Hidden dimensions d."""
    densities: tuple[float, ...] = Field(default=(1.0, 0.3, 0.1, 0.03, 0.01), min_length=1)
    """Probabilities that a feature is active; active ones are uniform in [0, 1)."""
    importance_decay: float = Field(default=1.0, gt=0, le=1)
    """Feature i counts importance_decay ** i in the loss."""
    n_steps: int = Field(default=5000, ge=1)
    """Steps of Adam."""
    batch_size: int = Field(default=1024, ge=1)
    """Rows per step and network."""
    lr: float = Field(default=3e-3, gt=0)
    """Learning rate; falls to 0 along a cosine."""
    seed: int = Field(default=0, ge=0)
    """Of weights and rows."""

    def check(self) -> None:
        """Raises ConfigError where widths or densities are outside their ranges."""
        for d in self.widths:
            if not 1 <= d <= self.n_features:
                raise ConfigError(
                    f"widths must be in [1, n_features={self.n_features}]",
                    d,
                    "Lower it, or raise n_features.",
                )
        for density in self.densities:
            if not 0 < density <= 1:
                raise ConfigError("densities must be in (0, 1]", density, "Change it.")


class Superposition(NamedTuple):
    """What one network carries."""

    d: int
    density: float
    n_carried: int
    """Features whose column of W is longer than 0.5."""
    dimensions_per_feature: float
    """d / |W|^2, with the sum over all columns: 1 without superposition, less with it."""
    interference: float
    """Mean over carried features of the sum, over the other columns, of squared projections onto its direction; NaN
    where none is carried."""
    loss: float
    """Squared error, each feature weighed by its importance, over that of predicting each feature's mean."""


class Superposed:
    """One trained network as a truth to compare with.

    Args:
        W: Its weights.
        b: Its biases.
        density: How often a feature is active.
        seed: Decides the rows.
    """

    def __init__(
        self, W: Float[Tensor, "d n_features"], b: Float[Tensor, " n_features"], density: float, seed: int
    ) -> None:
        self.W, self.b, self.density, self.seed = W, b, density, seed
        self.norms = W.norm(dim=0)
        self.carried = torch.nonzero(self.norms > LEAST_NORM).view(-1)
        self.features: Float[Tensor, "n_carried d"] = (W[:, self.carried] / self.norms[self.carried]).T

    def batch(self, n: int, generator: torch.Generator) -> PlantedBatch:
        """n rows of hidden activations `x W^T`; codes are those of carried features, times their norms."""
        x = _sparse((n, self.W.shape[1]), self.density, generator)
        codes = x[:, self.carried] * self.norms[self.carried]
        return PlantedBatch(x @ self.W.T, Encoded.from_dense(codes))


class SuperposedSource(Stream):
    """An endless stream of a network's hidden activations."""

    def __init__(self, planted: Superposed) -> None:
        super().__init__(planted, planted.W.shape[0], planted.seed)


def _sparse(shape: tuple[int, ...], density: float | Tensor, generator: torch.Generator) -> Tensor:
    active = torch.rand(shape, generator=generator) < density
    return torch.where(active, torch.rand(shape, generator=generator), 0.0)


def superpose(config: SuperposedConfig) -> list[tuple[Superposition, Superposed]]:
    """Train a network for each width and density, all at once, and measure what each carries.

    Raises:
        ConfigError: a width or a density is outside its range.
    """
    config.check()
    pairs = [(d, density) for d in config.widths for density in config.densities]
    n, widest, n_features = len(pairs), max(config.widths), config.n_features
    generator = numbers("superposition", config.seed)
    width = torch.tensor([d for d, _ in pairs])
    density = torch.tensor([p for _, p in pairs])[:, None, None]
    mask = (torch.arange(widest) < width[:, None]).float()[:, :, None]
    W = torch.randn(n, widest, n_features, generator=generator) * mask
    W = (W / W.norm(dim=1, keepdim=True).clamp_min(1e-12)).requires_grad_()
    b = torch.zeros(n, 1, n_features, requires_grad=True)
    importance = config.importance_decay ** torch.arange(n_features)
    optimiser = torch.optim.Adam([W, b], lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.n_steps)
    with track("superposition", config.n_steps, "steps") as progress:
        for _ in range(config.n_steps):
            x = _sparse((n, config.batch_size, n_features), density, generator)
            error = (x - _output(x, W * mask, b)).square() * importance
            optimiser.zero_grad()
            error.mean(dim=(1, 2)).sum().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            progress.advance()
    found = []
    with torch.no_grad():
        for number, (d, p) in enumerate(pairs):
            weights, bias = W[number, :d].clone(), b[number, 0].clone()
            network = Superposed(weights, bias, p, config.seed)
            found.append((_measure(network, importance, generator), network))
    return found


def _output(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return torch.relu(x @ W.transpose(-1, -2) @ W + b)


N_TEST_ROWS = 16_384


def _measure(network: Superposed, importance: Tensor, generator: torch.Generator) -> Superposition:
    W, d = network.W, network.W.shape[0]
    x = _sparse((N_TEST_ROWS, W.shape[1]), network.density, generator)
    error = ((x - _output(x, W, network.b)).square() * importance).sum()
    spread = ((x - x.mean(0)).square() * importance).sum()
    overlap = (network.features @ W).square()
    overlap[torch.arange(overlap.shape[0]), network.carried] = 0.0
    n_carried = int(network.carried.shape[0])
    return Superposition(
        d=d,
        density=network.density,
        n_carried=n_carried,
        dimensions_per_feature=float(d / W.square().sum()),
        interference=float(overlap.sum(1).mean()) if n_carried else float("nan"),
        loss=float(error / spread),
    )
