"""What can be chosen about a look at directions. Knows options and their ranges."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from sememe.config import Config
from sememe.foreign import opens
from sememe.lm import ModelConfig

__all__ = ["GeometryConfig"]


class GeometryConfig(Config):
    """Which dictionaries, and what else is at hand."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"dictionaries", "out", "store", "probe"})

    _opens = opens("dictionaries")

    dictionaries: tuple[Path, ...]
    """Dictionaries, sweeps, or folders that hold such; one or more."""
    out: Path = Path("artifacts/geometry")
    """The folder to make."""
    store: Path | None = None
    """Activations of the dictionaries' hookpoints: gives densities, the rare cluster, correlations, cheats."""
    n_rows: int = Field(default=65_536, ge=2)
    """Rows of the store that are encoded."""
    embeddings: bool = False
    """Load the language model, and compare latents with its embedding, unembedding and output projection."""
    model: ModelConfig = ModelConfig()
    """The language model that was trained on; with embeddings."""
    probe: Path | None = None
    """A direction in a .npy file, d_out numbers: the latents nearest to it are listed."""
    rare_below: float = Field(default=1e-4, gt=0, lt=1)
    """Latents of a lower density are rare; with a store."""
    n_correlated: int = Field(default=64, ge=2)
    """Latents, those that write most, whose correlations are asked for; with a store."""
    n_shown: int = Field(default=20, ge=1)
    """Rows of the page's lists."""
    n_bootstrap: int = Field(default=1000, ge=0)
    """Draws of latents for the 95% intervals; 0 gives none."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the draws, of rows and of random directions."""

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        if self.store is None:
            self.check_inert("n_rows", "rare_below", "n_correlated", without="no store is named")
        if not self.embeddings:
            self.check_inert("model", without="--embeddings is not passed")
        return self
