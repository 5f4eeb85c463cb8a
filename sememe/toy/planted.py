"""Rows made of planted features, and streams of them that a trainer can read like any other. Scores nothing.

Source: Sharkey, Braun & Millidge 2022, "Taking features out of superposition with sparse autoencoders", and
the replication in Cunningham et al. 2023, arXiv:2309.08600. Differs: by default the rates are normalised so
that `n_active` features are active on average; the replication multiplies by the decay without normalising,
which leaves about one (`rates="published"` does the same).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sememe.encoded import Encoded
from sememe.toy.config import ToyConfig, rates_of
from sememe.toy.stream import PlantedBatch, Stream, numbers

__all__ = ["Planted", "PlantedSource", "planted"]

N_FACTORS = 16
HEAVY_SPREAD = 1.0
"""Standard deviation of the logarithm of heavy-tailed magnitudes."""


class Planted:
    """A planted dictionary. `features` are its unit directions, `rates` how often each is active."""

    features: Float[Tensor, "n_features d"]
    rates: Float[Tensor, " n_features"]

    def __init__(self, config: ToyConfig) -> None:
        self.config = config
        generator = numbers("features", config.seed)
        if config.directions == "orthogonal":
            self.features = torch.eye(config.n_features, config.d)
        else:
            features = torch.randn(config.n_features, config.d, generator=generator)
            self.features = features / features.norm(dim=1, keepdim=True)
        self.rates = rates_of(config).float()
        self._parents = rates_of(config)[:: 1 + config.n_children]
        self._threshold = torch.special.ndtri(self._parents).float()
        loadings = torch.randn(config.n_factors or N_FACTORS, self._parents.shape[0], generator=generator)
        self._loadings = loadings / loadings.norm(dim=0, keepdim=True)
        self._colour = _colour(config)

    def batch(self, n: int, generator: torch.Generator) -> PlantedBatch:
        """n rows: x = codes @ features + noise."""
        active = self._active(n, generator)
        acts = self._magnitudes(active.shape, generator)
        # rand can return exactly 0, which would be an active feature without a trace in x
        acts = torch.where(active, acts.clamp_min(torch.finfo(acts.dtype).tiny), 0.0)
        x = acts @ self.features
        if self.config.noise > 0:
            noise = torch.randn(n, self.config.d, generator=generator)
            x += self.config.noise * (noise if self._colour is None else noise @ self._colour)
        return PlantedBatch(x, Encoded.from_dense(acts))

    def _magnitudes(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        if self.config.magnitudes == "binary":
            return torch.ones(shape)
        if self.config.magnitudes == "heavy":
            logs = HEAVY_SPREAD * torch.randn(shape, generator=generator)
            return 0.5 * (logs - HEAVY_SPREAD**2 / 2).exp()
        return torch.rand(shape, generator=generator)

    def _active(self, n: int, generator: torch.Generator) -> Tensor:
        shape = (n, self._parents.shape[0])
        if self.config.correlation > 0:
            share = self.config.correlation
            factors = torch.randn(n, self._loadings.shape[0], generator=generator)
            own = torch.randn(shape, generator=generator)
            # unit variance, because the columns of the loadings have norm 1: the rates are exact
            z = share**0.5 * (factors @ self._loadings) + (1 - share) ** 0.5 * own
            active: Tensor = z < self._threshold
        else:
            active = torch.rand(shape, generator=generator) < self._parents.float()
        if self.config.n_children:
            active = self._with_children(active, generator)
        if self.config.fill_empty:
            chosen = torch.randint(self.config.n_features, (n,), generator=generator)
            empty = ~active.any(dim=1)
            active[empty, chosen[empty]] = True
        return active

    def _with_children(self, parents: Tensor, generator: torch.Generator) -> Tensor:
        """Each parent, and after it its children: one of them, now and then, where it is active."""
        n_children = self.config.n_children
        has_one = parents & (torch.rand(parents.shape, generator=generator) < self.config.share_with_child)
        which = torch.randint(n_children, parents.shape, generator=generator)
        children = has_one[..., None] & (which[..., None] == torch.arange(n_children))
        return torch.cat([parents[..., None], children], dim=-1).flatten(1)


def _colour(config: ToyConfig) -> Tensor | None:
    """What makes white noise coloured: variances proportional to 1 / rank, of mean 1, along random directions."""
    if config.noise_colour == "white":
        return None
    variances = 1.0 / torch.arange(1, config.d + 1, dtype=torch.float64)
    variances *= config.d / variances.sum()
    made = torch.randn(config.d, config.d, generator=numbers("colour", config.seed), dtype=torch.float64)
    rotation = torch.linalg.qr(made).Q
    coloured: Tensor = variances.sqrt()[:, None] * rotation
    return coloured.float()


def planted(config: ToyConfig) -> Planted:
    """Plant a dictionary: the same config gives the same features and rows.

    Example:
        >>> toy = planted(ToyConfig(d=8, n_features=16, n_active=2))
        >>> toy.batch(4, torch.Generator().manual_seed(0)).x.shape
        torch.Size([4, 8])
    """
    return Planted(config)


class PlantedSource(Stream):
    """An endless stream of rows for a trainer. Its state is the generator's, so it resumes exactly."""

    def __init__(self, config: ToyConfig) -> None:
        self.planted = planted(config)
        super().__init__(self.planted, config.d, config.seed)
