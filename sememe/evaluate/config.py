"""What can be chosen about an evaluation. Knows options and their ranges; measures nothing."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from sememe.config import Config
from sememe.lm import ModelConfig
from sememe.text import TextConfig, TokenPolicy

__all__ = ["AUTOENCODER_NULLS", "NULLS", "EvaluateConfig"]

NULLS = ("identity", "pca", "random_directions", "untrained")
AUTOENCODER_NULLS = ("identity", "pca", "random_directions")


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
    """Controls measured beside the dictionary, at its l0: pca, untrained, random_directions, identity."""
    batch_rows: int = Field(default=16, ge=1)
    """Contexts per forward."""
    n_bootstrap: int = Field(default=1000, ge=0)
    """Draws of documents for the 95% intervals; 0 gives none."""
    seed: int = 0
    """Of the bootstrap and the untrained null."""
