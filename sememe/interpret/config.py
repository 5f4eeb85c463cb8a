"""What can be chosen about an atlas. Knows options and their ranges; reads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sememe.config import Config
from sememe.errors import ConfigError
from sememe.lm import ModelConfig
from sememe.options import changed
from sememe.text import TextConfig

__all__ = ["InterpretConfig"]


class InterpretConfig(Config):
    """Which dictionary, over which text, and how many examples to keep."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"out", "dictionary", "store", "batch_rows", "snapshot_seconds"}
    )

    out: Path = Path("artifacts/atlas")
    """The folder to make."""
    dictionary: Path = Path("artifacts/dictionary")
    """The dictionary's folder."""
    model: ModelConfig = ModelConfig()
    """The language model, the one the dictionary was trained on."""
    store: Path | None = None
    """Go over the text of this store and read its activations, instead of running the model over `text`."""
    text: TextConfig = TextConfig()
    """The corpus."""
    split: Literal["train", "heldout", "all"] = "all"
    """Which documents: train, heldout, or all."""
    n_tokens: int = Field(default=1_000_000, ge=1)
    """Tokens that go through the model; a little fewer are kept."""
    n_top: int = Field(default=20, ge=1)
    """Largest activations shown of each latent, one per document."""
    n_decile: int = Field(default=3, ge=0)
    """Examples shown from each tenth of a latent's activations, one per document."""
    n_random: int = Field(default=10, ge=0)
    """Windows shown in which the latent is silent."""
    n_reservoir: int = Field(default=200, ge=10)
    """Uniform sample of each latent's activations from which the examples of the tenths are drawn."""
    n_logits: int = Field(default=15, ge=1)
    """Output tokens shown at each end of a latent's direct effect."""
    n_bins: int = Field(default=40, ge=2)
    """Bars of the histogram of activations."""
    before: int = Field(default=40, ge=0)
    """Tokens of an example's window before the peak."""
    after: int = Field(default=24, ge=0)
    """Tokens of an example's window after the peak."""
    seed: int = Field(default=0, ge=0)
    """Of the random choices."""
    batch_rows: int = Field(default=64, ge=1)
    """Contexts per forward."""
    snapshot_seconds: float = Field(default=60.0, ge=0)
    """How often the state is saved, so that an interrupted run loses no more than that."""

    @model_validator(mode="after")
    def _no_inert_option(self) -> InterpretConfig:
        if self.store is not None:
            for name, value in changed(self, "text", "split", "n_tokens"):
                raise ConfigError(
                    f"{name} must be left out when store is given",
                    value,
                    "A store brings its own text; drop one of the two.",
                )
        return self
