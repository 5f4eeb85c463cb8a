"""Planted dictionaries: data made of known features, so that what was learned can be compared with the truth.

Knows how to make the data and how to score what was learned from it. Knows nothing about language models,
stores or trainers; `PlantedSource` is a stream that a trainer can read like any other.

Source: Sharkey, Braun & Millidge 2022, "Taking features out of superposition with sparse autoencoders", and
the replication in Cunningham et al. 2023, arXiv:2309.08600. Differs: by default the rates are normalised so
that `n_active` features are active on average; the replication multiplies by the decay without normalising,
which leaves about one (`rates="published"` does the same).
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal, NamedTuple, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from sememe import metrics
from sememe.config import Config
from sememe.dictionaries.base import Batch, Dictionary, Sites
from sememe.encoded import Encoded
from sememe.errors import ConfigError, CorruptError, ShapeError

__all__ = ["Planted", "PlantedBatch", "PlantedSource", "Recovery", "ToyConfig", "planted", "recovery"]

FOUND_COSINE = 0.9
N_FACTORS = 16


class ToyConfig(Config):
    """How to plant a dictionary and sample from it."""

    d: int = Field(default=256, ge=1)
    """Width of the data."""
    n_features: int = Field(default=512, ge=1)
    """Planted unit directions, drawn uniformly from the sphere."""
    n_active: float = Field(default=5.0, gt=0)
    """Features active in a row, on average."""
    decay: float = Field(default=0.99, gt=0, le=1)
    """Feature i is active with a probability proportional to decay ** i."""
    rates: Literal["normalised", "published"] = "normalised"
    """normalised: `n_active` is the mean, decay included. published: decay ** i * n_active / n_features."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of white Gaussian noise, per dimension."""
    correlation: float = Field(default=0.0, ge=0, lt=1)
    """Share of each feature's Gaussian copula variable that comes from factors shared with other features."""
    n_factors: int | None = Field(default=None, ge=1)
    """Shared factors, 16 if not given; only with correlation > 0."""
    fill_empty: bool = False
    """Give one feature, drawn uniformly, to each row that has none (the replication's correlated variant)."""
    seed: int = Field(default=0, ge=0)
    """Decides the features and the stream of rows."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.n_factors is not None and self.correlation == 0:
            raise ConfigError(
                "n_factors must go with correlation > 0",
                "correlation 0",
                "Raise correlation or leave n_factors out.",
            )
        largest = float(_rates(self).max())
        if largest > 1:
            raise ConfigError(
                "every feature's probability must be at most 1",
                f"{largest:.3g} for the commonest one",
                "Lower n_active, raise n_features, or bring decay nearer to 1.",
            )
        return self


def _rates(config: ToyConfig) -> Float[Tensor, " n_features"]:
    decayed = config.decay ** torch.arange(config.n_features, dtype=torch.float64)
    total = float(decayed.sum()) if config.rates == "normalised" else float(config.n_features)
    return decayed * (config.n_active / total)


def _generator(config: ToyConfig, purpose: str) -> torch.Generator:
    """Random numbers of their own for each purpose: neighbouring seeds share nothing."""
    digest = hashlib.sha256(f"{purpose} {config.seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class PlantedBatch(NamedTuple):
    """Rows and the codes they were made from."""

    x: Float[Tensor, "n d"]
    codes: Encoded


class Planted:
    """A planted dictionary. `features` are its unit directions, `rates` how often each is active."""

    features: Float[Tensor, "n_features d"]
    rates: Float[Tensor, " n_features"]

    def __init__(self, config: ToyConfig) -> None:
        self.config = config
        generator = _generator(config, "features")
        features = torch.randn(config.n_features, config.d, generator=generator)
        self.features = features / features.norm(dim=1, keepdim=True)
        self.rates = _rates(config).float()
        self._threshold = torch.special.ndtri(_rates(config)).float()
        loadings = torch.randn(config.n_factors or N_FACTORS, config.n_features, generator=generator)
        self._loadings = loadings / loadings.norm(dim=0, keepdim=True)

    def batch(self, n: int, generator: torch.Generator) -> PlantedBatch:
        """n rows: x = codes @ features + noise, where active codes are uniform in [0, 1)."""
        active = self._active(n, generator)
        acts = torch.rand(n, self.config.n_features, generator=generator)
        # rand can return exactly 0, which would be an active feature without a trace in x
        acts = torch.where(active, acts.clamp_min(torch.finfo(acts.dtype).tiny), 0.0)
        x = acts @ self.features
        if self.config.noise > 0:
            x += self.config.noise * torch.randn(n, self.config.d, generator=generator)
        return PlantedBatch(x, Encoded.from_dense(acts))

    def _active(self, n: int, generator: torch.Generator) -> Tensor:
        shape = (n, self.config.n_features)
        if self.config.correlation > 0:
            share = self.config.correlation
            factors = torch.randn(n, self._loadings.shape[0], generator=generator)
            own = torch.randn(shape, generator=generator)
            # unit variance, because the columns of the loadings have norm 1: the rates are exact
            z = share**0.5 * (factors @ self._loadings) + (1 - share) ** 0.5 * own
            active: Tensor = z < self._threshold
        else:
            active = torch.rand(shape, generator=generator) < self.rates
        if self.config.fill_empty:
            chosen = torch.randint(self.config.n_features, (n,), generator=generator)
            empty = ~active.any(dim=1)
            active[empty, chosen[empty]] = True
        return active


def planted(config: ToyConfig) -> Planted:
    """Plant a dictionary: the same config gives the same features and rows.

    Example:
        >>> toy = planted(ToyConfig(d=8, n_features=16, n_active=2))
        >>> toy.batch(4, torch.Generator().manual_seed(0)).x.shape
        torch.Size([4, 8])
    """
    return Planted(config)


class PlantedSource:
    """An endless stream of rows for a trainer. Its state is the generator's, so it resumes exactly."""

    sites: Sites | None = None
    n_rows: int | None = None

    def __init__(self, config: ToyConfig) -> None:
        self.planted = planted(config)
        self.d_in = self.d_out = config.d
        self._generator = _generator(config, "rows")

    def next_batch(self, n: int) -> Batch:
        """The next n rows."""
        x = self.planted.batch(n, self._generator).x
        return Batch(x, x)

    def sample(self, n: int) -> Batch:
        """n rows for initialisation, the same ones on every call; the stream does not advance."""
        x = self.planted.batch(n, _generator(self.planted.config, "sample")).x
        return Batch(x, x)

    def hold_out(self, n: int) -> Batch:
        """n rows from random numbers of their own; the stream never gives them."""
        x = self.planted.batch(n, _generator(self.planted.config, "held out")).x
        return Batch(x, x)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another stream of the same config was.

        Raises:
            CorruptError: the state is not a generator's.
        """
        try:
            self._generator.set_state(state["generator"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise CorruptError(
                "the state of a planted stream must hold a generator's state",
                f"{type(error).__name__}: {str(error).splitlines()[0]}",
                "Delete the checkpoint and train again.",
            ) from None


class Recovery(NamedTuple):
    """How much of a planted dictionary was learned, by cosine between directions."""

    recall: float
    """Mean over the planted features of the largest cosine to a learned direction (mmcs truth -> learned)."""
    precision: float
    """Mean over the learned directions of the largest cosine to a planted feature (mmcs learned -> truth)."""
    found: float
    """Share of planted features with a learned direction at a cosine above 0.9."""


def recovery(truth: Planted, dictionary: Dictionary) -> Recovery:
    """Compare the decoder directions of a dictionary with the planted features. Signs count, but where activations
    have signs of their own: there a direction and its opposite are the same.

    Raises:
        ShapeError: the dictionary has another width than the planted one.
    """
    learned = dictionary.decoder_directions().detach().to("cpu", torch.float32)
    if learned.shape[1] != truth.features.shape[1]:
        raise ShapeError(
            f"the dictionary must have d_out={truth.features.shape[1]} like the planted one",
            learned.shape[1],
            "Compare it with the planted dictionary that it was trained on.",
        )
    features = truth.features
    if getattr(dictionary, "signed", False):
        learned, features = torch.cat([learned, -learned]), torch.cat([features, -features])
    cosines = metrics.mcs(truth.features, learned)
    return Recovery(
        recall=float(cosines.mean()),
        precision=float(metrics.mmcs(learned, features)),
        found=float((cosines > FOUND_COSINE).double().mean()),
    )
