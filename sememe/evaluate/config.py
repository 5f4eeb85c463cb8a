"""What can be chosen about an evaluation. Knows options and their ranges; measures nothing."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from sememe.config import Config
from sememe.errors import ConfigError
from sememe.lm import ModelConfig
from sememe.text import TextConfig, TokenPolicy

__all__ = ["AUTOENCODER_NULLS", "NULLS", "EvaluateConfig"]

NULLS = ("ica", "identity", "pca", "random_directions", "untrained")
AUTOENCODER_NULLS = ("ica", "identity", "pca", "random_directions")


class EvaluateConfig(Config):
    """Which dictionary, on what, against what."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"out", "dictionary", "store", "batch_rows"})

    dictionary: Path
    """The dictionary to measure."""
    out: Path = Path("artifacts/report")
    """The folder to make."""
    model: ModelConfig = ModelConfig()
    """The language model that the dictionary belongs to."""
    text: TextConfig = TextConfig()
    """The corpus; its held-out documents are used."""
    policy: TokenPolicy | None = None
    """The token policy, for dictionaries that do not say which they were trained with."""
    store: Path | None = None
    """The store that the dictionary was trained on. Nulls and the mean are fitted on its rows; without it, on
    activations of the training documents, computed here."""
    n_tokens: int = Field(default=65_536, ge=1)
    """Held-out tokens."""
    n_fit_rows: int = Field(default=65_536, ge=2)
    """Training rows from which nulls and the mean are fitted."""
    nulls: tuple[str, ...] = ("pca", "untrained")
    """Controls measured beside the dictionary, at its l0: pca, untrained, random_directions, identity, ica."""
    leave_out_above: tuple[float, ...] = ()
    """Measure the dictionary, too, without its latents of more than this density; dense latents flatter it."""
    top_latents: tuple[int, ...] = ()
    """Measure, too, so many of its latents of largest density alone, and the rest of them alone."""
    batch_rows: int = Field(default=16, ge=1)
    """Contexts per forward."""
    n_bootstrap: int = Field(default=1000, ge=0)
    """Draws of documents for the 95% intervals; 0 gives none."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the bootstrap and of nulls that are drawn."""

    @field_validator("leave_out_above")
    @classmethod
    def _densities(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        for density in value:
            if not 0 < density < 1:
                raise ConfigError("leave_out_above must be densities in (0, 1)", f"{density:g}", "Change it.")
        return value

    @field_validator("top_latents")
    @classmethod
    def _numbers(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        for n in value:
            if n < 1:
                raise ConfigError("top_latents must be at least 1", n, "Raise it.")
        return value
