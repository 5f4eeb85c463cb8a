"""How to plant a dictionary: its options and what they imply. Draws nothing."""

from __future__ import annotations

from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from sememe.config import Config
from sememe.errors import ConfigError

__all__ = ["ToyConfig", "rates_of"]


class ToyConfig(Config):
    """How to plant a dictionary and sample from it."""

    d: int = Field(default=256, ge=1)
    """Width of the data."""
    n_features: int = Field(default=512, ge=1)
    """Planted unit directions."""
    directions: Literal["random", "orthogonal"] = "random"
    """random: drawn uniformly from the sphere. orthogonal: the first axes."""
    n_active: float = Field(default=5.0, gt=0)
    """Features active in a row, on average."""
    decay: float = Field(default=0.99, gt=0, le=1)
    """Feature i is active with a probability proportional to decay ** i."""
    rates: Literal["normalised", "published"] = "normalised"
    """normalised: `n_active` is the mean, decay included. published: decay ** i * n_active / n_features."""
    magnitudes: Literal["uniform", "binary", "heavy"] = "uniform"
    """Of active features: uniform in [0, 1); always 1; or log-normal with a mean of 1/2 and a heavy tail."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise, per dimension."""
    noise_colour: Literal["white", "coloured"] = "white"
    """white: the same in every direction. coloured: variances fall as 1 / rank along random orthogonal directions."""
    correlation: float = Field(default=0.0, ge=0, lt=1)
    """Share of each feature's Gaussian copula variable that comes from factors shared with other features."""
    n_factors: int | None = Field(default=None, ge=1)
    """Shared factors, 16 if not given; only with correlation > 0."""
    n_children: int = Field(default=0, ge=0)
    """Features come in families: a parent and so many children, at most one of them active and only with its parent."""
    child_share: float | None = Field(default=None, gt=0, le=1)
    """How often an active parent has an active child, 0.5 if not given; only with n_children > 0."""
    fill_empty: bool = False
    """Give one feature, drawn uniformly, to each row that has none (the replication's correlated variant); `n_active`
    and rates do not count these."""
    seed: int = Field(default=0, ge=0)
    """Decides the features and the stream of rows."""

    @property
    def share_with_child(self) -> float:
        """`child_share`, or its default."""
        return 0.5 if self.child_share is None else self.child_share

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        if self.correlation == 0 and self.n_factors is not None:
            raise ConfigError(
                "n_factors must go with correlation > 0",
                "correlation 0",
                "Raise correlation or leave n_factors out.",
            )
        if self.noise == 0 and self.noise_colour != "white":
            raise ConfigError(
                "noise_colour must go with noise > 0", "noise 0", "Raise noise or leave noise_colour out."
            )
        if self.n_children == 0 and self.child_share is not None:
            raise ConfigError(
                "child_share must go with n_children > 0",
                "n_children 0",
                "Raise n_children or leave child_share out.",
            )
        return self

    @model_validator(mode="after")
    def _features_fit(self) -> Self:
        if self.directions == "orthogonal" and self.n_features > self.d:
            raise ConfigError(
                f"orthogonal features must be at most d={self.d}",
                self.n_features,
                "Lower n_features, raise d, or take random directions.",
            )
        if self.n_features % (1 + self.n_children):
            raise ConfigError(
                f"n_features must be a multiple of a family's size {1 + self.n_children}",
                self.n_features,
                "Change n_features or n_children.",
            )
        if self.n_children and self.fill_empty:
            raise ConfigError(
                "fill_empty must be left out with families, which it would give children without a parent",
                f"n_children {self.n_children}",
                "Drop one of them.",
            )
        largest = float(rates_of(self).max())
        if largest > 1:
            raise ConfigError(
                "every feature's probability must be at most 1",
                f"{largest:.3g} for the commonest one",
                "Lower n_active, raise n_features, or bring decay nearer to 1.",
            )
        return self


def rates_of(config: ToyConfig) -> Float[Tensor, " n_features"]:
    """How often each feature is active; families one after the other, each parent before its children."""
    size = 1 + config.n_children
    parents = config.decay ** torch.arange(config.n_features // size, dtype=torch.float64)
    family = torch.full((size,), config.share_with_child / max(1, config.n_children), dtype=torch.float64)
    family[0] = 1.0
    decayed = (parents[:, None] * family).view(-1)
    total = float(decayed.sum()) if config.rates == "normalised" else float(config.n_features)
    return decayed * (config.n_active / total)
